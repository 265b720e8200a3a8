"""Runs whose files were damaged: told which file and what to do, by every command that reads it, and nothing is lost."""

import shutil

import pytest

from signbit.cli import main

WORDS = "--max-steps 4 --sequence-length 16 --batch-size 4 --log-every 1 --save-every 2 --validation-blocks 2"


@pytest.fixture
def run(llama_dir, text, tmp_path, capsys):
    """A run that was killed at its fourth step, and the words to go on with it."""
    out = tmp_path / "run"
    words = f"distill {llama_dir} -o {out} --data {text} {WORDS}"
    assert main(words.split()) == 0, capsys.readouterr().err
    return out, f"{words} --resume"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [cut, lambda path: path.unlink()], ids=["cut", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"])
def test_a_checkpoint_that_is_not_whole_is_named(name, harm, run, tmp_path, capsys):
    out, resume = run
    harm(out / "checkpoint-4" / name)
    for command in (resume, f"pack {out} -o {tmp_path}/out"):
        assert main(command.split()) == 1
        err = capsys.readouterr().err
        assert f"checkpoint-4/{name} is damaged" in err and "take" in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()
    shutil.rmtree(out / "checkpoint-4")
    assert main(resume.split()) == 0, capsys.readouterr().err
    assert main(f"pack {out} -o {tmp_path}/out".split()) == 0


def test_its_state_may_be_what_is_cut(run, capsys):
    out, resume = run
    cut(out / "checkpoint-4" / "signbit.json")
    assert main(resume.split()) == 1
    assert "checkpoint-4/signbit.json is damaged" in capsys.readouterr().err


def test_what_describes_a_run_may_be_cut(run, tmp_path, capsys):
    out, resume = run
    cut(out / "run.json")
    for command in (resume, f"pack {out} -o {tmp_path}/out", f"flips {out}", f"finetune {out} -o {tmp_path}/more"):
        assert main(command.split()) == 1
        assert "run.json is damaged" in capsys.readouterr().err


def test_a_line_of_metrics_that_is_none_is_named(run, capsys):
    out, resume = run
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join([lines[0], "{\n", *lines[2:]]))
    before = (out / "metrics.jsonl").read_bytes()
    for command in (resume, f"flips {out}"):
        assert main(command.split()) == 1
        assert "metrics.jsonl is damaged (line 2:" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_weights_of_other_bytes_are_not_packed(run, tmp_path, capsys):
    out, _ = run
    path = out / "checkpoint-4" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:48] = b"x" * 40  # where its header begins
    path.write_bytes(content)
    assert main(f"pack {out} -o {tmp_path}/out".split()) == 1
    assert "model.safetensors cannot be read" in capsys.readouterr().err
