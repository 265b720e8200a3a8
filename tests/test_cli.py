"""The command line, as a user types it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from signbit import cli
from signbit.cli import main
from signbit.cli.data import SelfGenerateOptions, TeacherLogitsOptions
from signbit.ops import cpu, cuda, explain, native

needs_kernels = pytest.mark.skipif(isinstance(native.library(), str), reason=f"no CPU kernels: {native.library()}")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))


def run(capsys, command):
    code = main(shlex.split(command))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i % 61}" for i in range(300)))
    return file


def test_help_and_version_import_no_torch():
    code = (
        "import sys\nfrom signbit.cli import main\n"
        "for word in ('--help', '--version'): assert main([word]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout
    assert "signbit 0." in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_that_names_its_options(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    options = set(cli.VERBS[verb][1].__dataclass_fields__) - {"model", "source", "prompt", "teacher", "run", "kind"}
    # Stand without a flag there.
    options -= {"finetune": {"start"}, "compare": {"models"}, "diff": {"a", "b"}, "push": {"out", "repo"}}.get(
        verb, set()
    )
    options = {"model" if option == "table_models" else option for option in options}  # a table's: --model NAME=DIR
    running = ("eval", "report", "compare", "generate", "chat", "serve")
    options |= {"device", "dtype", "activations"} if verb in running else set()
    options |= {"temperature", "max_new_tokens", "seed"} if verb in ("generate", "chat") else set()
    positional = {
        "distill": "TEACHER", "pack": "RUN", "flips": "RUN", "import": "SRC", "push": "OUT", "diff": "A", "export": "OUT",
    }  # fmt: skip
    assert {**positional, "data": "{self-generate,teacher-logits}"}.get(verb, "MODEL") in out
    for option in options:
        assert f"--{option.replace('_', '-')}" in out


def test_each_kind_of_data_has_help_that_names_its_options(capsys):
    for kind, options in (("self-generate", SelfGenerateOptions), ("teacher-logits", TeacherLogitsOptions)):
        with pytest.raises(SystemExit) as stop:
            main(["data", kind, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and f"signbit data {kind}" in out
        for option in set(options.__dataclass_fields__) - {"model", "teacher"}:
            assert f"--{option.replace('_', '-')}" in out


def test_help_of_a_method_lists_its_own_options(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--method", "pbllm", "--help"])
    out = capsys.readouterr().out
    assert "--salient FLOAT" in out
    assert "--no-gptq" in out
    assert "--scale-over" in out


def test_the_whole_way(llama_dir, tmp_path, text_file, capsys):
    out = tmp_path / "out"
    code, printed, err = run(capsys, f"quantize {llama_dir} -o {out} --method absmean --group 8 --head int8")
    assert code == 0, err
    assert "model.layers.*.mlp.up_proj" in printed
    assert "99." in printed
    assert "true bits per weight" in printed
    code, printed, _ = run(capsys, f"info {out} --json {tmp_path}/info.json")
    assert code == 0
    assert "whole file, bits per parameter" in printed
    saved = json.loads((tmp_path / "info.json").read_text())
    assert saved["linears_saved"] == pytest.approx(1 - saved["bits_per_weight"] / 16)
    assert json.loads((tmp_path / "info.json").read_text())["settings"]["options"]["group"] == 8
    code, printed, _ = run(capsys, f"info {out} --layers")
    assert "model.layers.1.mlp.up_proj" in printed
    code, printed, err = run(
        capsys, f"eval {out} --ppl {text_file} --window 50 --against {llama_dir} --json {tmp_path}/eval.json"
    )
    assert code == 0, err
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert [Path(r["model"]).name for r in results] == ["out", "llama"]
    assert all(r["windows"] == 6 and r["activations"] == "exact" and r["dtype"] == "float32" for r in results)
    assert f"{results[0]['perplexity']:.3f}" in printed
    assert results[0]["saved"] == [saved["linears_saved"], saved["file_saved"]] and results[1]["saved"] is None
    assert f"{saved['linears_saved']:.1%} / {saved['file_saved']:.1%}" in " ".join(printed.split())
    code, printed, err = run(capsys, f"generate {out} 'w3 w4' --max-new-tokens 5 --temperature 0.7 --seed 0")
    assert code == 0
    assert printed.startswith("w3 w4")
    assert "tokens/s after the first" in err
    again = run(capsys, f"generate {out} 'w3 w4' --max-new-tokens 5 --temperature 0.7 --seed 0")[1]
    assert printed == again
    code, printed, _ = run(
        capsys, f"generate {out} 'w3 w4' --activations int8 --dtype bfloat16 --chat --max-new-tokens 2"
    )
    assert code == 0


def test_pbllm_as_in_the_readme(llama_dir, tmp_path, capsys):
    out = tmp_path / "out"
    code, _, err = run(
        capsys, f"quantize {llama_dir} -o {out} --method pbllm --salient 0.3 --no-gptq --saliency magnitude"
    )
    assert code == 0, err
    card = (out / "README.md").read_text()
    assert f"signbit quantize {llama_dir} -o {out} --method pbllm" in card
    assert "salient=0.3" in card


def test_dry_run_writes_nothing_and_reads_no_weight(llama_dir, tmp_path, capsys):
    before = sorted(os.listdir(tmp_path))
    weights = Path(llama_dir, "model.safetensors")
    content = weights.read_bytes()
    weights.unlink()
    code, printed, err = run(capsys, f"quantize {llama_dir} -o {tmp_path}/out --group 8 --head int8 --dry-run")
    assert code == 0, err
    assert "no model was written" in printed
    assert "memory needed" in printed
    assert "3.000" in printed, "true bits of a group of 8: 1 + 16/8"
    assert sorted(os.listdir(tmp_path)) == before
    weights.write_bytes(content)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "quantize {llama} -o {out} --method absmeen",
            "there is no method 'absmeen'; there are absmean, bitnet, bitnet-transformers, bnn, xnor, bireal, irnet, fda, "
            "recu, fbi, onebit, pbllm, pb-gptq (did you mean absmean?)",
        ),
        ("quantize {llama}", "give -o OUT, or --dry-run"),
        ("quantize {llama} -o {llama} --overwrite", "is the source model"),
        ("quantize {tmp}/nowhere -o {out}", "there is no directory"),
        ("quantize {empty} -o {out}", "is empty"),
        ("quantize {text} -o {out}", "is a file; give a Hugging Face model directory"),
        ("quantize no-such-org/no-such-model -o {out}", "no-such-org/no-such-model could not be loaded"),
        ("quantize {llama} -o {out} --group 48", "q_proj: a group of 48 columns does not divide 32; use one of 32"),
        ("quantize {llama} -o {out} --keep layers.9", "--keep layers.9 matches no linear layer"),
        ("quantize {llama} -o {out} --device cuda:7", "the device 'cuda:7' cannot be used here"),
        ("quantize {llama} -o {text}", "is a file or a link"),
        ("info {llama}", "not packed by signbit; make it so with"),
        ("info {tmp}/nowhere", "is no directory"),
        ("eval {llama} --ppl nothing.txt", "nothing.txt is no file, and no named set either"),
        ("eval {llama} --ppl wikitext2 --data-dir {empty}", "has no file for wikitext2"),
        ("eval {llama} --ppl wikitext2 --window 64", "are for texts of your own"),
        ("eval {llama} --ppl {text} --window 64 --max-windows 0", "at least 1"),
        ("eval {llama} --ppl {text} --window 50 --json {tmp}/no/dir.json", "cannot be written"),
        ("generate {llama} ''", "the prompt is empty"),
        ("generate {llama} w3 --temperature -1", "--temperature is -1"),
        ("generate {llama} w3 --repetition-penalty 0", "--repetition-penalty is 0"),
        ("generate {llama} w3 --seed -1", "--seed is -1"),
        ("generate {llama} w3 --device meta", "the device 'meta' cannot be used here"),
        ("eval {llama} --ppl ,", "names nothing to measure"),
        ("quantize {llama} -o /dev/null", "is a file or a link"),
    ],
)
def test_errors_are_one_line_without_a_traceback(command, message, llama_dir, tmp_path, text_file, capsys):
    (tmp_path / "empty").mkdir()
    places = {
        "llama": llama_dir,
        "out": tmp_path / "out",
        "tmp": tmp_path,
        "empty": tmp_path / "empty",
        "text": text_file,
    }
    try:
        code, _, err = run(capsys, command.format(**places))
    except SystemExit as stop:  # tyro's own, for values that do not parse
        code, err = stop.code, capsys.readouterr().err
    assert code in (1, 2)
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_existing_out_is_refused_before_any_work(llama_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, f"quantize {llama_dir} -o {out}")[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, _, err = run(capsys, f"quantize {llama_dir} -o {out} --group 8")
    assert code == 1
    assert "exists; give another -o, or --overwrite to replace it" in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(capsys, f"quantize {llama_dir} -o {out} --group 8 --overwrite")[0] == 0
    code, _, err = run(capsys, f"quantize {out} -o {tmp_path}/twice")
    assert code == 1
    assert "is quantized already (signbit)" in err


def test_nan_in_the_weights_names_the_layer(llama, tokenizer, tmp_path, capsys):
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    llama.save_pretrained(tmp_path / "bad")
    code, _, err = run(capsys, f"quantize {tmp_path}/bad -o {tmp_path}/out")
    assert code == 1
    assert "model.layers.1.self_attn.o_proj: 1 of its 1024 weights are NaN or infinite" in err
    assert not (tmp_path / "out").exists()


def test_unknown_verbs_and_options(llama_dir, capsys):
    code, _, err = run(capsys, "quantise x")
    assert code == 2
    assert "there is no verb 'quantise'; there are quantize, import, distill" in err
    with pytest.raises(SystemExit) as stop:
        main(["quantize", llama_dir, "-o", "x", "--salient", "0.3"])
    assert stop.value.code == 2
    assert "Unrecognized options: --salient" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_noted(llama, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "bare")
    code, _, err = run(capsys, f"quantize {tmp_path}/bare -o {tmp_path}/out")
    assert code == 0
    assert "will have no tokenizer" in err


def test_ctrl_c_writes_nothing(llama_dir, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("signbit.ptq.Walk.run", interrupted)
    code, _, err = run(capsys, f"quantize {llama_dir} -o {tmp_path}/out")
    assert code == 130
    assert "the same command goes on at the last finished block" in err
    assert not (tmp_path / "out").exists()


def test_the_list_of_protocols(capsys):
    code, printed, _ = run(capsys, "eval --list")
    assert code == 0
    for name in ("wikitext2", "ptb", "c4-first1100", "c4-random256", "casterbridge"):
        assert name in printed


def test_the_installed_command_and_the_module(llama_dir, tmp_path):
    script = Path(sys.executable).parent / "signbit"
    for command in ([str(script)] if script.exists() else [], [sys.executable, "-m", "signbit"]):
        if command:
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
            assert done.stdout.startswith("signbit ")


def test_chat_reads_from_a_pipe(llama_dir, capsys, monkeypatch):
    read_end, write_end = os.pipe()
    os.write(write_end, b"w3\n/exit\n")
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        code, out, err = run(capsys, f"chat {llama_dir} --max-new-tokens 2")
    assert code == 0, err
    assert "/clear starts a new conversation" in out


def damage(llama_dir, change):
    """Changes the tensors of a dense model on disk."""
    from safetensors.torch import load_file, save_file

    file = Path(llama_dir, "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("verb", ["quantize {} -o {}", "generate {} w3", "eval {} --ppl {} --window 20"])
def test_a_source_with_a_missing_tensor_is_refused(verb, llama_dir, tmp_path, text_file, capsys):
    damage(llama_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    second = tmp_path / "out" if "-o" in verb else text_file
    code, _, err = run(capsys, verb.format(llama_dir, second))
    assert code == 1
    assert "the tensor model.layers.1.mlp.up_proj.weight is missing" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["quantize {} -o {}", "generate {} w3"])
def test_a_truncated_source_is_refused(verb, llama_dir, tmp_path, capsys):
    file = Path(llama_dir, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    code, _, err = run(capsys, verb.format(llama_dir, tmp_path / "out"))
    assert code == 1
    assert "damaged or cut short" in err


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm"])
@pytest.mark.parametrize("head", ["keep", "int8"])
def test_nan_anywhere_is_refused(name, head, llama_dir, tmp_path, capsys):
    damage(llama_dir, lambda tensors: tensors[f"{name}.weight"].view(-1)[:1].fill_(float("nan")))
    code, _, err = run(capsys, f"quantize {llama_dir} -o {tmp_path}/out --head {head}")
    assert code == 1
    assert f"{name}: 1 of its" in err
    assert not (tmp_path / "out").exists()


def test_the_source_cannot_be_overwritten_by_another_name(llama_dir, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(llama_dir)
    before = Path(llama_dir, "model.safetensors").read_bytes()
    for source, out in ((link, llama_dir), (llama_dir, f"{llama_dir}/../llama"), (llama_dir, tmp_path)):
        code, _, err = run(capsys, f"quantize {source} -o {out} --overwrite")
        assert code == 1
        assert "is the source model" in err or "more than a model" in err
    assert Path(llama_dir, "model.safetensors").read_bytes() == before


def test_int8_on_a_dense_model_is_said(llama_dir, tmp_path, text_file, capsys):
    code, _, err = run(
        capsys, f"eval {llama_dir} --ppl {text_file} --window 50 --activations int8 --json {tmp_path}/r.json"
    )
    assert code == 0
    assert "has no packed layer; its activations stay exact" in err
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["activations"] == "exact"


def test_int8_is_run_and_named(llama_dir, tmp_path, text_file, capsys):
    run(capsys, f"quantize {llama_dir} -o {tmp_path}/out")
    results = {}
    for mode in ("exact", "int8"):
        command = (
            f"eval {tmp_path}/out --ppl {text_file} --window 50 --activations {mode} --json {tmp_path}/{mode}.json"
        )
        assert run(capsys, command)[0] == 0
        results[mode] = json.loads((tmp_path / f"{mode}.json").read_text())["results"][0]
    assert [results[mode]["activations"] for mode in results] == ["exact", "int8"]
    assert 0 < abs(results["exact"]["nll"] - results["int8"]["nll"]) < 0.1


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{(7 * i * i + i) % 61}" for i in range(400)))
    return path


def test_a_calibrated_model_by_the_command(llama_dir, text, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra plot")
    code, out, err = run(
        capsys,
        f"quantize {llama_dir} -o {tmp_path}/out --method pbllm --salient 0.2 --calibration {text} --samples 4 "
        f"--sequence-length 32 --seed 3 --rule 'mlp.down_proj: salient=0.5' --keep layers.0 --plot {tmp_path}/p.png "
        f"--json {tmp_path}/report.json --inputs-on disk",
    )
    assert code == 0, err
    assert "--keep layers.0" in out
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    layers = {d["name"]: d for d in json.loads((tmp_path / "report.json").read_text())["layers"]}
    assert layers["model.layers.1.mlp.down_proj"]["error"] > 0
    assert layers["model.layers.1.mlp.down_proj"]["nbytes"] > 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["settings"]
    assert settings["rules"] == [["mlp.down_proj", {"salient": 0.5}]]
    assert settings["keep"] == ["layers.0"]
    assert settings["calibration"] == {
        "calibration": str(text), "samples": 4, "sequence_length": 32, "seed": 3, "text": str(text)
    }  # fmt: skip
    assert run(capsys, f"eval {tmp_path}/out --ppl {text} --window 32")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method pbllm", r"pbllm measures the layers' inputs: give --calibration c4\|wikitext2\|ptb\|FILE\|self"),
        (
            "--method pb-gptq --calibration nowhere.txt",
            r"--calibration nowhere\.txt: no such file; the sets with names",
        ),
        ("--calibration TEXT", "would not be used"),
        ("--method pbllm --calibration TEXT --sequence-length 500", "the model has 128 positions"),
        (
            "--method pbllm --calibration TEXT --sequence-length 128 --rule mlp",
            "is not of the form 'pattern: key=value",
        ),
        ("--method pbllm --calibration TEXT --rule 'mlp: salient=much'", "salient is 'much' in a --rule; a number"),
        ("--method pbllm --calibration TEXT --rule 'mlp: gptq=maybe'", "true or false is needed"),
        (
            "--method pbllm --calibration TEXT --rule 'mpl.up_proj: salient=0.3'",
            r"the nearest are model\.layers\.0\.mlp\.up",
        ),
        ("--device cuda:7", "cannot be used here"),
        ("--plot nowhere/p.png", "there is no directory"),
        ("--max-layer 0", "--max-layer above it"),
    ],
)
def test_bad_calibration_options_are_one_line(flags, message, llama_dir, text, tmp_path, capsys):
    code, out, err = run(capsys, f"quantize {llama_dir} -o {tmp_path}/out {flags.replace('TEXT', str(text))}")
    assert code == 1
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "message"), [("--damping 0", "damping is 0"), ("--block 0", "block is 0")])
def test_values_outside_of_their_range_are_usage_errors(flags, message, llama_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(capsys, f"quantize {llama_dir} -o out --method pbllm {flags}")
    assert message in capsys.readouterr().err


def test_a_text_shorter_than_a_window_is_one_line(llama_dir, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    code, _, err = run(capsys, f"quantize {llama_dir} -o {tmp_path}/out --method pbllm --calibration {tmp_path}/short.txt "
                               "--sequence-length 64")  # fmt: skip
    assert code == 1
    assert "3 tokens are not more than one window of 64" in err


def test_an_unfinished_run_of_other_settings_is_one_line(llama_dir, text, tmp_path, capsys, monkeypatch):
    command = (
        f"quantize {llama_dir} -o {tmp_path}/out --method pbllm --calibration {text} --samples 2 --sequence-length 16"
    )

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("signbit.hub.stream.save", interrupted)
        assert run(capsys, command)[0] == 130
    code, _, err = run(capsys, f"{command} --damping 0.1")
    assert code == 1
    assert "config.options.damping: 0.01 there, 0.1 here" in err
    code, _, err = run(capsys, command)
    assert code == 0
    assert "2 of 2 blocks are finished" in err


def test_dry_run_of_calibration(llama_dir, capsys):
    code, out, _ = run(capsys, f"quantize {llama_dir} --method pbllm --calibration c4 --sequence-length 128 --dry-run")
    assert code == 0
    assert "inputs of a block: 4.2 MB" in out
    assert "no model was written" in out


def break_kernels(monkeypatch, isa):
    """Makes the binary_linear of one instruction set give 2 for 1."""
    right = cpu.binary_linear
    monkeypatch.setattr(cpu, "binary_linear", lambda *a: right(*a) * (2 if a[3] == isa else 1))


@needs_kernels
@pytest.mark.usefixtures("chosen_anew")
def test_doctor_shows_what_multiplies_and_checks_every_set(tmp_path, capsys):
    library, (chosen, reason) = native.library(), cpu.selected()
    code, printed, err = run(capsys, f"doctor --json {tmp_path}/doctor.json")
    assert code == 0, err
    assert " ".join(library.features) in printed
    for fact in (torch.__version__, library.path, ", ".join(library.compiled), "SIGNBIT_CPU   not set"):
        assert fact in printed
    for op in ("binary_linear", "int8_linear"):
        assert f"  {op}: {chosen} ({reason})\n" in printed
    for isa in library.runs:
        assert f"  {isa}: right\n" in printed
    facts = json.loads((tmp_path / "doctor.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["features"] == list(library.features)
    assert facts["checks"] == dict.fromkeys(library.runs)
    assert facts["choices"][0] == {"op": "binary_linear", "device": "cpu", "backend": chosen, "reason": reason}
    assert facts["missing"] is None
    assert "model" not in facts


@pytest.mark.usefixtures("chosen_anew")
def test_doctor_shows_every_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(cuda.nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "check", lambda index: f"off by {index + 2}")
    cuda.selected.cache_clear()
    try:
        code, printed, err = run(capsys, "doctor")
        for index, backend in enumerate(("cuda", "reference")):
            choice = explain(f"cuda:{index}")[0]
            assert choice.backend == backend
            assert f"\ncuda:{index} (GPU {index})\n  binary_linear: {backend} ({choice.reason})\n" in printed
    finally:
        cuda.selected.cache_clear()
    assert "compute capability 7.5 is below 8.0" in printed
    assert "\n  cuda:0: off by 2\n" in printed and "cuda:1: off" not in printed
    assert code == 1 and "the check of cuda:0 failed" in err


@pytest.mark.usefixtures("chosen_anew")
def test_doctor_obeys_the_variable(monkeypatch, capsys):
    monkeypatch.setenv(cpu.VARIABLE, "reference")
    code, printed, _ = run(capsys, "doctor")
    assert code == 0
    assert "SIGNBIT_CPU   reference\n" in printed
    assert "binary_linear: reference (SIGNBIT_CPU=reference asks for plain torch)" in printed


@needs_kernels
@pytest.mark.usefixtures("chosen_anew")
def test_doctor_says_which_sets_there_are_for_a_wrong_variable(monkeypatch, capsys):
    monkeypatch.setenv(cpu.VARIABLE, "sse9")
    code, _, err = run(capsys, "doctor")
    assert code == 1
    assert err.startswith("signbit: SIGNBIT_CPU is 'sse9'; this processor runs ")


@needs_kernels
@pytest.mark.usefixtures("chosen_anew")
@pytest.mark.parametrize("place", [0, -1], ids=["the chosen set", "another set"])
def test_doctor_fails_if_any_set_is_wrong(place, tmp_path, monkeypatch, capsys):
    isa = list(native.library().runs)[place]
    break_kernels(monkeypatch, isa)
    code, printed, err = run(capsys, f"doctor --json {tmp_path}/doctor.json")
    assert code == 1
    assert f"  {isa}: binary_linear, exact, 3 tokens: off by " in printed
    assert f"the check of {isa} failed; please report this" in err
    wrong = {name for name, what in json.loads((tmp_path / "doctor.json").read_text())["checks"].items() if what}
    assert wrong == {isa}
    if isa == next(iter(native.library().runs)):
        assert f"binary_linear: reference (the {isa} kernels failed their check" in printed


@needs_kernels
@pytest.mark.usefixtures("chosen_anew")
def test_doctor_reports_kernels_that_give_an_error(monkeypatch, capsys):
    from signbit.errors import SignbitError

    def failing(isa):
        raise SignbitError("the CPU kernels: out of memory")

    cpu.selected()
    monkeypatch.setattr(cpu, "check", failing)
    code, printed, err = run(capsys, "doctor")
    assert code == 1
    for isa in native.library().runs:
        assert f"  {isa}: the CPU kernels: out of memory\n" in printed
    assert f"the check of {', '.join(native.library().runs)} failed" in err


@pytest.mark.usefixtures("chosen_anew")
def test_doctor_without_kernels_says_what_to_do(tmp_path, monkeypatch, capsys):
    why = "this installation was built without a C++ compiler; install one and reinstall signbit"
    monkeypatch.setattr(native, "library", lambda: why)
    code, printed, _ = run(capsys, f"doctor --json {tmp_path}/doctor.json")
    assert code == 0
    assert f"kernels       none: {why}\n" in printed
    assert f"int8_linear: reference ({why})" in printed
    assert "checked against" not in printed
    facts = json.loads((tmp_path / "doctor.json").read_text())
    assert (facts["missing"], facts["library"], facts["checks"]) == (why, None, {})


@needs_kernels
@pytest.mark.usefixtures("chosen_anew")
def test_doctor_names_the_layers_that_the_kernels_leave_out(llama_dir, tmp_path, capsys):
    out = tmp_path / "out"
    code, _, err = run(
        capsys, f"quantize {llama_dir} -o {out} --rule 'self_attn.*: group=8' --rule 'down_proj: group=24'"
    )
    assert code == 0, err
    code, printed, err = run(capsys, f"doctor {out} --json {tmp_path}/doctor.json")
    assert code == 0, err
    assert f"{out}: the kernels multiply 4 of 14 packed layers\n" in printed
    attention = ", ".join(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert f"plain torch multiplies 8: groups of 8 columns are no multiple of 32 ({attention}, …)\n" in printed
    down = "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    assert f"plain torch multiplies 2: groups of 24 columns are no multiple of 32 ({down})\n" in printed
    model = json.loads((tmp_path / "doctor.json").read_text())["model"]
    assert len(model["siblings"][0]) == 3 and model["no_siblings"] is None
    shared = sum(map(len, model["siblings"]))
    assert f"{shared} of them are given an input with others, and share {len(model['siblings'])} launches" in printed
    assert (model["layers"], model["kernels"]) == (14, 4)
    assert sorted(map(len, model["reference"].values())) == [2, 8]


@pytest.mark.usefixtures("chosen_anew")
def test_doctor_refuses_a_model_that_is_not_packed(llama_dir, capsys):
    code, printed, err = run(capsys, f"doctor {llama_dir}")
    assert code == 1
    assert "cpu (" in printed, "the machine is shown all the same"
    assert "not packed by signbit; make it so with" in err


@needs_kernels
@pytest.mark.usefixtures("chosen_anew")
def test_generate_and_eval_run_on_the_kernels_and_give_what_plain_torch_gives(
    stories, shared, tmp_path, capsys, monkeypatch
):
    options = "--method pbllm --salient 0.1 --no-gptq --saliency magnitude --head int8"
    code, _, err = run(capsys, f"quantize {stories} -o {tmp_path}/packed {options}")
    assert code == 0, err
    calls = {"linear": 0, "head": 0}

    def counted(name, function):
        def call(*arguments, **named):
            calls[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(cpu.Multiplication, "__call__", counted("linear", cpu.Multiplication.__call__))
    monkeypatch.setattr(cpu, "int8_linear", counted("head", cpu.int8_linear))
    text = shared / "data" / "tinystories"
    file = next(path for path in sorted(text.iterdir()) if path.suffix in (".txt", ".jsonl"))
    commands = {
        "generate": f"generate {tmp_path}/packed 'Once upon a time' --max-new-tokens 8 --activations exact",
        "eval": f"eval {tmp_path}/packed --ppl {file} --window 256 --max-windows 2 --again --json {tmp_path}/NAME.json",
    }
    found = {}
    for name in ("kernels", "reference"):
        if name == "reference":
            monkeypatch.setenv(cpu.VARIABLE, "reference")
            cpu.selected.cache_clear()
        for verb, command in commands.items():
            before = calls["linear"]
            code, printed, err = run(capsys, command.replace("NAME", name))
            assert code == 0, err
            assert (calls["linear"] > before) == (name == "kernels")
            found[name, verb] = printed if verb == "generate" else json.loads((tmp_path / f"{name}.json").read_text())
    assert found["kernels", "generate"].splitlines()[0] == found["reference", "generate"].splitlines()[0]
    kernels, reference = (str(found[name, "eval"]) for name in ("kernels", "reference"))
    values = [re.findall(r"'perplexity': ([\d.]+)", text) for text in (kernels, reference)]
    assert values[0] and [f"{float(v):.4g}" for v in values[0]] == [f"{float(v):.4g}" for v in values[1]]
