"""Loss spikes: told, gone back for, their data left out, by hand or by itself, and the same when killed and resumed."""

import json
import shutil

import pytest
import torch

from signbit.cli import main
from signbit.errors import TrainingError
from signbit.hub import distill as distill_module
from signbit.train import DistillTrainer, read_metrics
from signbit.train.checkpoints import checkpoints
from signbit.train.spikes import Unskipped, checkpoint_without, chunk_at, usual_loss
from tests.train.runs import metrics

#: Chunks of 4 steps of 4 blocks; a line each step.
SIZES = "--max-steps 16 --sequence-length 16 --batch-size 4 --log-every 1 --save-every 4 --validation-blocks 2"


def test_the_data_that_remains():
    data = list(range(20))
    left = Unskipped(data, 0, 4, [])
    assert [left[i] for i in range(len(left))] == data
    left = Unskipped(data, 0, 4, {3, 1})
    assert [left[i] for i in range(len(left))] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    left = Unskipped(data, 5, 4, (0, 1))
    assert [left[i] for i in range(len(left))] == [13, 14, 15, 16, 17, 18, 19]
    assert len(Unskipped(data, 0, 4, {100})) == 20
    assert [chunk_at(place, {0, 1, 4}) for place in range(4)] == [2, 3, 5, 6]


def test_what_is_usual():
    assert usual_loss([1.0] * 4) is None and usual_loss([5.0, 1.0, 2.0, 3.0, 4.0]) == 3
    assert usual_loss([100.0] * 50 + [1.0] * 20) == 1


class Poisoned:
    """Blocks of which those of some chunks make the loss what `worse` makes of it, and are noted as they are seen."""

    def __init__(self, data, chunks, size):
        self.data, self.chunks, self.size = data, chunks, size

    def __getattr__(self, name):
        return getattr(self.__dict__["data"], name)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        item = dict(self.data[index])
        return {**item, "chunk": torch.tensor(index // self.size)}


@pytest.fixture
def spiking(monkeypatch):
    """Runs whose loss is `worse` on the data of some chunks: (chunks, worse) → the chunks that were learnt from, in order."""

    def make(chunks, worse=lambda loss: 10 * loss):
        seen = []
        build, step = distill_module._data, DistillTrainer.training_step

        def data(*given):
            train, validation = build(*given)
            return Poisoned(train, chunks, 16), validation

        def training_step(self, model, inputs, *more):
            chunk = int(inputs.pop("chunk")[0])
            seen.append(chunk)
            loss = step(self, model, inputs, *more)
            return worse(loss) if chunk in chunks else loss

        monkeypatch.setattr(distill_module, "_data", data)
        monkeypatch.setattr(DistillTrainer, "training_step", training_step)
        return seen

    return make


def run(llama_dir, text, out, *more):
    return main(f"distill {llama_dir} -o {out} --data {text} {SIZES}".split() + list(more))


def spikes(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if "spike" in line]


def test_a_spike_is_gone_back_for_and_its_data_skipped(llama_dir, text, tmp_path, spiking, capsys):
    seen, out = spiking({2}), tmp_path / "run"
    assert run(llama_dir, text, out, "--spike", "2") == 0, capsys.readouterr().err
    assert seen == [0] * 4 + [1] * 4 + [2] + [3] * 4 + [4] * 4
    (spike,) = spikes(out)
    assert spike["step"] == 8 and spike["spike"]["step"] == 9 and spike["spike"]["skipped_chunk"] == 2
    assert spike["spike"]["loss"] > 2 * spike["spike"]["usual"]
    err = capsys.readouterr().err
    assert "WARNING: the loss spiked at step 9" in err and "checkpoint-8, without chunk 2 of the data" in err
    steps = [line["step"] for line in metrics(out) if "loss" in line]
    assert steps == list(range(1, 17)), "the line of the spike is gone"
    assert json.loads((out / "checkpoint-16" / "signbit.json").read_text())["skipped"] == [2]
    # The rest is a run that never saw that chunk.
    by_hand = tmp_path / "by-hand"
    assert run(llama_dir, text, by_hand, "--skip-chunks", "2") == 0
    assert [line for line in metrics(out) if "spike" not in line] == metrics(by_hand)


def test_a_spike_at_a_checkpoint_is_not_saved(llama_dir, text, tmp_path, monkeypatch):
    """Seen in the last line of a chunk, where a checkpoint would be written next."""
    step = DistillTrainer.training_step

    def training_step(self, *given):
        loss = step(self, *given)
        return 10 * loss if self.state.global_step == 11 and 2 not in self.skipped else loss

    monkeypatch.setattr(DistillTrainer, "training_step", training_step)
    out, by_hand = tmp_path / "run", tmp_path / "by-hand"
    assert run(llama_dir, text, out, "--spike", "2") == 0
    assert [line["spike"]["step"] for line in spikes(out)] == [12]
    assert run(llama_dir, text, by_hand, "--skip-chunks", "2") == 0
    assert [line for line in metrics(out) if "spike" not in line] == metrics(by_hand)


def test_without_the_option_nothing_is_skipped(llama_dir, text, tmp_path, spiking):
    seen = spiking({2})
    assert run(llama_dir, text, tmp_path / "run") == 0
    assert seen == [chunk for chunk in range(4) for _ in range(4)] and not spikes(tmp_path / "run")


@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_killed_run_skips_the_same(llama_dir, text, tmp_path, spiking, at):
    spiking({1, 3})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(llama_dir, text, whole, "--spike", "2", "--keep-checkpoints", "9") == 0
    assert [line["spike"]["skipped_chunk"] for line in spikes(whole)] == [1, 3]
    shutil.copytree(whole, cut)
    for path in checkpoints(cut):
        if int(path.name.partition("-")[2]) > at:
            shutil.rmtree(path)
    assert run(llama_dir, text, cut, "--spike", "2", "--keep-checkpoints", "9", "--resume") == 0
    assert metrics(cut) == metrics(whole)


def test_a_loss_that_is_no_number_is_a_spike(llama_dir, text, tmp_path, spiking, capsys):
    seen, out = spiking({1}, lambda loss: loss * float("nan")), tmp_path / "run"
    assert run(llama_dir, text, out, "--spike", "2") == 0, capsys.readouterr().err
    assert seen[:6] == [0, 0, 0, 0, 1, 2] and spikes(out)[0]["spike"]["loss"] is None
    assert "the loss spiked at step 5 (no number)" in capsys.readouterr().err
    assert run(llama_dir, text, tmp_path / "other") == 1
    assert "the loss of step 5 is no number" in capsys.readouterr().err


def test_a_spike_before_the_first_checkpoint_is_told(llama_dir, text, tmp_path, spiking, capsys):
    spiking({1})
    assert run(llama_dir, text, tmp_path / "run", "--spike", "2", "--save-every", "16") == 0
    assert "WARNING: the loss spiked at step 6" in capsys.readouterr().err and not spikes(tmp_path / "run")


def test_spikes_in_a_row_end_the_run(llama_dir, text, tmp_path, spiking, capsys):
    seen = spiking(set(range(2, 9)))
    assert run(llama_dir, text, tmp_path / "run", "--spike", "2") == 1
    err = capsys.readouterr().err
    assert "spiked behind step 8 with each of the chunks 2, 3, 4: it is not the data. Lower --learning-rate" in err
    assert seen[8:] == [2, 3, 4] and "Traceback" not in err


def test_data_is_skipped_by_hand(llama_dir, text, tmp_path, spiking, capsys):
    """FBI-LLM's way: look at the loss, go back, name the chunk."""
    seen, out = spiking(set()), tmp_path / "run"
    assert run(llama_dir, text, out, "--keep-checkpoints", "9") == 0
    del seen[:]
    assert run(llama_dir, text, out, "--keep-checkpoints", "9", "--resume", "--skip-chunks", "2") == 0
    assert seen == [3] * 4 + [4] * 4
    assert "checkpoint-12 has learnt from a chunk that is skipped now, and is removed" in capsys.readouterr().err
    fresh = tmp_path / "fresh"
    assert run(llama_dir, text, fresh, "--skip-chunks", "2") == 0
    assert metrics(out) == metrics(fresh)
    assert run(llama_dir, text, out, "--keep-checkpoints", "9", "--resume") == 1
    assert (
        "left out chunks of its data; name them again, and others if you like: --skip-chunks 2"
        in capsys.readouterr().err
    )
    del seen[:]
    assert run(llama_dir, text, out, "--keep-checkpoints", "9", "--resume", "--skip-chunks", "2", "7") == 0
    assert not seen, "what comes later changes nothing"


def test_a_chunk_behind_all_checkpoints_cannot_be_skipped(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out) == 0
    assert run(llama_dir, text, out, "--resume", "--skip-chunks", "0") == 1
    err = capsys.readouterr().err
    assert (
        "checkpoint-12, the oldest checkpoint that is kept, has learnt from a chunk of --skip-chunks 0 already" in err
    )
    with pytest.raises(TrainingError, match="has learnt from a chunk"):
        checkpoint_without(out, (1,), 4)
    assert checkpoint_without(out, (3,), 4).name == "checkpoint-12"
    assert checkpoint_without(tmp_path, (3,), 4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--spike 1", "--spike is 1.0; it is a multiple of the usual loss, above 1 (1.5)"),
        ("--skip-chunks 3 -1", "--skip-chunks is 3 -1; each chunk is named once, by its number from 0"),
        ("--skip-chunks 3 3", "--skip-chunks is 3 3; each chunk is named once"),
    ],
)
def test_bad_values_are_refused(change, message, capsys):
    with pytest.raises(SystemExit):
        main(f"distill TEACHER -o RUN {change}".split())
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
