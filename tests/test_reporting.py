"""`signbit report`, `compare` and `diff`, and what they measure."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import signbit
from signbit.cli import main
from signbit.errors import DataError, OptionError, SignbitError, StructureError
from signbit.evaluate.difference import compared, differences
from signbit.evaluate.machines import here
from signbit.evaluate.speed import SpeedOptions
from signbit.hub.agreement import agreement, exact_agreement, text_tokens
from signbit.hub.load import load_any, load_tokenizer
from signbit.hub.subject import Subject, Where, _speed_alone, measured_as, named, perplexity_protocol
from tests import families
from tests.conftest import tiny_llama_config


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * i % 61}" for i in range(300)))
    return str(path)


@pytest.fixture
def packed(llama_dir, tmp_path):
    out = tmp_path / "one"
    assert main(["quantize", llama_dir, "-o", str(out), "--method", "absmean", "--group", "8"]) == 0
    return str(out)


def run(capsys, command):
    capsys.readouterr()
    code = main(shlex.split(command))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_layers_beside_each_other_are_what_their_definitions_say(packed, llama_dir):
    a, b = load_any(packed), load_any(llama_dir)
    w, v = a.model.layers[1].mlp.down_proj.weights[0].to_dense(), b.model.layers[1].mlp.down_proj.weight.detach()
    found = {layer.name: layer for layer in differences(a, b).layers}
    layer = found["model.layers.1.mlp.down_proj"]
    assert layer.form == "packed and dense" and not layer.equal
    assert layer.sign_agreement == 1, "absmean keeps every sign"
    assert layer.error == pytest.approx(((w - v) ** 2).sum().item() / (v**2).sum().item(), rel=1e-5)
    assert found["model.embed_tokens"].equal and found["model.norm.weight"].equal
    assert len(found) == 2 * 7 + 1 + 2 * 2 + 1, "linears, the tied embedding once, norms"


def test_a_flipped_sign_and_a_changed_norm_are_found(llama, llama_dir):
    b = load_any(llama_dir)
    with torch.no_grad():
        weight = llama.model.layers[0].self_attn.q_proj.weight
        weight[3, 5] *= -1
        llama.model.layers[1].input_layernorm.weight[0] = 2.0
    found = differences(llama, b)
    assert [layer.name for layer in found.differing] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.input_layernorm.weight",
    ]
    assert found.differing[0].sign_agreement == pytest.approx(1 - 1 / weight.numel())
    assert found.only == ((), ())


def test_the_sign_of_zero_is_plus_and_the_error_is_of_the_other_s_energy():
    mine, its = torch.tensor([[0.0, -1.0, 2.0, -3.0]]), torch.tensor([[1.0, -1.0, -2.0, -3.0]])
    assert compared(mine, its) == (0.75, pytest.approx(17 / 15), False)
    assert compared(its, its) == (1.0, 0.0, True)
    assert compared(mine, torch.zeros(1, 4))[1] == 1


def test_models_of_other_shapes_and_names_are_refused(llama):
    with pytest.raises(StructureError, match=r"mlp\.gate_proj is \[72, 32\] in one model and \[80, 32\]"):
        differences(llama, LlamaForCausalLM(tiny_llama_config(intermediate_size=80)))
    with pytest.raises(StructureError, match="no linear layer of one name"):
        differences(llama, GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)))


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_conv1d_and_experts_have_their_matrices_compared(family):
    a, b = (getattr(families, family)() for _ in range(2))
    b.load_state_dict(a.state_dict())
    signbit.quantize_(a, signbit.SignbitConfig(method="absmean"))
    packed = [layer for layer in differences(a, b).layers if layer.form == "packed and dense"]
    assert len(packed) >= 8 and all(layer.sign_agreement == 1 and 0 < layer.error < 1 for layer in packed)


def test_kl_and_top1_over_the_whole_vocabulary_are_what_their_definitions_say(packed, llama_dir, text):
    a, b, tokenizer = load_any(packed), load_any(llama_dir), load_tokenizer(llama_dir)
    file = text_tokens(tokenizer, text, None, 256)
    ids = torch.from_numpy(file.open().astype("int64"))[:256].reshape(4, 64)
    with torch.no_grad():
        q, p = (F.log_softmax(model(ids).logits.double(), dim=-1) for model in (a, b))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    found = exact_agreement(a, b, "b", file, 64)
    assert found.kl == pytest.approx(kl, rel=1e-4) and found.top1 == pytest.approx(same) and found.tokens == 256
    # Through the teacher's kept answers: the same for all 64 tokens, less for fewer of them.
    calls = []

    def teacher():
        calls.append(1)
        return b

    by_file = agreement(a, teacher, "t", "b", file, 64)
    assert by_file.kl == pytest.approx(kl, rel=2e-2) and by_file.top1 == pytest.approx(same) and by_file.outcomes == 64
    fewer = agreement(a, teacher, "t", "b", file, 64, outcomes=4)
    assert 0 < fewer.kl < by_file.kl and fewer.mass < 0.9
    again = agreement(a, teacher, "t", "b", file, 64)
    assert again == by_file and len(calls) == 2, "the teacher answers once"
    for where in (Where(), Where(dtype="float32"), Where(device="cuda"), Where(activations="int8")):
        agreement(a, teacher, "t", "b", file, 64, where=where)
    assert len(calls) == 5, "and once more where it runs otherwise"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("signbit.hub.agreement"), "VERSION", "another")
        agreement(a, teacher, "t", "b", file, 64)
    assert len(calls) == 6, "and for another version"
    for variable in ("SIGNBIT_CPU", "SIGNBIT_CUDA"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, "reference")
            agreement(a, teacher, "t", "b", file, 64)
    assert len(calls) == 8, "and for other kernels"
    assert agreement(a, teacher, "t", "b", file, 64, again=True) == by_file and len(calls) == 9
    assert agreement(b, teacher, "t", "b", file, 64).kl == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("offload", ["", "--offload"])
def test_eval_measures_a_kept_perplexity_again_only_where_it_is_asked(
    offload, packed, text, tmp_path, monkeypatch, capsys
):
    names = ("evaluate.perplexity", "hub.offload", "hub.load")  # two of them are functions of their package too
    perplexity, offloading, loading = (import_module(f"signbit.{name}") for name in names)
    other, measure, by_blocks = tmp_path / "other.txt", perplexity.perplexity, offloading.offloaded_perplexities
    other.write_text(" ".join(f"w{i * 7 % 61}" for i in range(200)))
    calls, loads, stopped = [], [], [str(other)]

    def counted(model, tokenizer, name, *rest):
        calls.append(name)
        if name in stopped:
            raise KeyboardInterrupt
        return measure(model, tokenizer, name, *rest)

    def counted_by_blocks(model, names, *rest):
        calls.extend(names)
        if set(names) & set(stopped):
            raise KeyboardInterrupt
        return by_blocks(model, names, *rest)

    def load(*arguments):
        loads.append(arguments)
        return load_any(*arguments)

    monkeypatch.setattr(perplexity, "perplexity", counted)
    monkeypatch.setattr(offloading, "offloaded_perplexities", counted_by_blocks)
    monkeypatch.setattr(loading, "load_any", load)

    def found(names, flags=""):
        calls.clear(), loads.clear()
        file = tmp_path / "found.json"
        code, out, err = run(capsys, f"eval {packed} --ppl {names} --window 64 {offload} {flags} --json {file}")
        return (json.loads(file.read_text())["results"], out, list(calls)) if code == 0 else (code, err, list(calls))

    # By blocks all texts go together, so that what is kept is of a command before.
    first = [] if not offload else found(text)[0]
    code, _, asked = found(f"{text},{other}")
    assert code == 130 and str(other) in asked
    stopped.clear()
    results, out, asked = found(f"{text},{other}")
    assert asked == [str(other)], "the first text was kept when it was measured"
    assert [r.get("kept", False) for r in results] == [True, False] and "--again measures anew" in out
    assert not first or results[0]["nll"] == first[0]["nll"]
    repeated, out, asked = found(f"{text},{other}")
    assert (asked, loads) == ([], []), "a model of which all is known is not loaded"
    assert [r["nll"] for r in repeated] == [r["nll"] for r in results] and out.count(" kept ") == 2
    anew, out, asked = found(f"{text},{other}", "--again")
    assert asked == [text, str(other)] and not any("kept" in r for r in anew) and "--again" not in out
    assert [r["nll"] for r in anew] == [r["nll"] for r in results]
    assert found(f"{text}", "--max-windows 1")[2] == [text], "fewer windows are another protocol"
    monkeypatch.setenv("SIGNBIT_CPU", "reference")
    assert found(f"{text}")[2] == [text], "what other kernels found is no answer"


def test_a_report_made_again_asks_the_teacher_once_more(packed, llama_dir, text, monkeypatch, capsys):
    module = import_module("signbit.hub.agreement")
    write, calls = module.write, []
    monkeypatch.setattr(module, "write", lambda *words, **more: calls.append(1) or write(*words, **more))
    skip = "--skip speed --skip samples --skip layers --ppl none"
    command = f"compare {packed} copy={packed} {llama_dir} --held-out {text} --block 64 {skip}"
    for flags, asked in (("", 1), ("", 1), ("--again", 2)):
        code, _, err = run(capsys, f"{command} {flags}")
        assert code == 0 and len(calls) == asked, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ppl wikitext2 --held-out {text}", "wikitext2 is not at hand"),
        ("--ppl none --held-out {text}.none", "text.txt.none"),
    ],
)
def test_a_text_that_is_not_to_be_had_ends_a_report_before_models_are_timed(
    flags, message, packed, llama_dir, text, tmp_path, monkeypatch, capsys
):
    def no_hub(wanted):
        raise DataError(f"{wanted.name} is not at hand")

    def timed(*_):
        raise AssertionError("a model was timed")

    monkeypatch.setattr(import_module("signbit.data.sources"), "hub_data", no_hub)
    monkeypatch.setattr(Subject, "speed", timed)
    code, _, err = run(capsys, f"report {packed} --against {llama_dir} -o {tmp_path}/r {flags.format(text=text)}")
    assert code == 1 and message in err


def test_the_text_that_signbit_carries_is_at_hand(tokenizer):
    file = text_tokens(tokenizer, "casterbridge", None, 256)
    assert (file.tokens, file.source) == (256, "casterbridge")


def test_what_agreement_refuses(llama_dir, llama, text):
    file = text_tokens(load_tokenizer(llama_dir), text, None, 100)
    with pytest.raises(OptionError, match="--block is 200 tokens, and the model has 128 positions"):
        exact_agreement(llama, llama, "b", file, 200)
    other = LlamaForCausalLM(tiny_llama_config(vocab_size=70)).eval()
    with pytest.raises(StructureError, match="answers with 70 tokens and the model with 64"):
        exact_agreement(llama, other, "other", file, 64)
    with pytest.raises(StructureError, match="answers with 70 tokens and the model with 64"):
        agreement(llama, lambda: other, "o", "other", file, 64)


def test_diff_shows_layers_and_answers(packed, llama_dir, text, tmp_path, capsys):
    out = tmp_path / "diff.json"
    code, said, _ = run(capsys, f"diff {packed} {llama_dir} --text {text} --block 64 --json {out}")
    assert code == 0
    assert (
        "model.layers.*.mlp.up_proj" in said
        and "packed and dense" in said
        and "14 of 20 layers and vectors differ" in said
    )
    written = json.loads(out.read_text())
    assert len(written["layers"]) == 20 and written["answers"]["kl"] > 0
    code, said, _ = run(capsys, f"diff {packed} {packed} --text none")
    assert code == 0 and "0 of 20 layers and vectors differ" in said and "KL" not in said
    code, _, err = run(capsys, f"diff {packed} {tmp_path}/none")
    assert code == 1 and "there is no directory" in err


@pytest.mark.slow
def test_diff_of_a_run_with_latent_weights(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    steps = "--max-steps 2 --sequence-length 16 --batch-size 2 --validation-blocks 0"
    assert main(shlex.split(f"distill {llama_dir} -o {out} --data {text} {steps}")) == 0
    assert main(["pack", str(out), "-o", str(tmp_path / "packed")]) == 0
    code, said, _ = run(capsys, f"diff {out} {tmp_path}/packed --text {text} --block 64")
    assert code == 0 and "0 of " in said and "KL(B ‖ A) 0.0000" in said, said
    code, said, _ = run(capsys, f"diff {out} {llama_dir} --text none")
    assert "latent and dense" in said


def test_report_measures_once_and_says_it_all(packed, llama_dir, text, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot")
    before = Subject("", packed, Where()).sha256
    out = tmp_path / "report"
    eval_json = tmp_path / "eval.json"
    assert run(capsys, f"eval {llama_dir} --ppl {text} --window 32 --json {eval_json}")[0] == 0
    command = (
        f"report One={packed} --against {llama_dir} --ppl none --held-out {text} --block 64 --sample-tokens 4 -o {out} "
        f"--skip speed --results {eval_json}"
    )
    code, _, err = run(capsys, command)
    assert code == 0, err
    facts = {model["name"]: model for model in json.loads((out / "report.json").read_text())["models"]}
    one, teacher = facts["One"], facts["llama"]
    assert one["agreement"]["kl"] > 0 and one["agreement"]["teacher"] == "llama" and teacher["agreement"] is None
    assert len(one["samples"]) == 3 and one["size"]["bits_per_weight"] > 1
    assert len(one["layers"]) == 14 and all(0 < layer["error"] < 1 for layer in one["layers"])
    assert len(teacher["perplexities"]) == 1, "taken from --results"
    machine = here()
    assert one["measured_on"] == [{"what": ["agreement", "layers", "sample"], **machine}]
    assert teacher["measured_on"] == [{"what": ["sample", "perplexity text.txt"], **machine}]
    assert one["unknown"] == {"speed": "it was left out (--skip speed)"}
    page, card = (out / "report.html").read_text(), (out.parent / "one" / "README.md").read_text()
    for words in ("What they write", "data:image/png;base64,", "signbit quantize", one["model_sha256"][:16]):
        assert words in page
    assert "## One: report" in card and "Made with:" in card and "](quality.png)" not in card
    assert Subject("", packed, Where()).sha256 == before, "the card is no part of what the model is"
    # The same command again loads no model.
    monkeypatch.setattr("signbit.hub.subject.load_any", lambda *args: pytest.fail("a model was loaded"))
    code, _, err = run(capsys, f"{command} --no-card")
    assert code == 0, err
    again = {model["name"]: model for model in json.loads((out / "report.json").read_text())["models"]}
    assert again == facts


@pytest.mark.slow
def test_speed_is_measured_in_a_process_of_its_own_and_once(packed, llama_dir, monkeypatch):
    one, dense = (Subject("", place, Where()).speed(SpeedOptions()) for place in (packed, llama_dir))
    assert one["decode_tokens_per_s"] > 0 and one["prefill_tokens_per_s"] > 0 and one["load_s"] > 0
    assert one["peak_bytes"] > one["before_bytes"] > 50e6, "Python and torch alone take more"
    assert (one["backend"], dense["backend"]) == ("reference (plain torch)", "torch"), "no kernel has groups of 8"
    assert one["prompt_tokens"] + one["new_tokens"] == 128, "the model has no more positions"
    monkeypatch.setattr("signbit.hub.subject._speed_alone", lambda *args: pytest.fail("speed was measured"))
    assert Subject("", packed, Where()).speed(SpeedOptions()) == one
    monkeypatch.undo()
    with pytest.raises(SignbitError, match="there is no directory"):
        _speed_alone(f"{llama_dir}/none", Where(), SpeedOptions())


def test_compare_has_models_that_are_elsewhere(packed, llama_dir, tmp_path, capsys):
    options = "--skip speed --skip samples --skip layers --skip agreement"
    away = tmp_path / "away.json"
    assert run(capsys, f"compare {packed} {llama_dir} --ppl none {options} --json {away}")[0] == 0
    written = json.loads(away.read_text())
    other = {**written["models"][0], "name": "far", "model": "/far", "model_sha256": "0" * 64}
    away.write_text(json.dumps({"models": [other]}))
    code, said, err = run(capsys, f"compare {packed} {llama_dir} --ppl none {options} --results Far={away}")
    assert code == 0, err
    header = next(line for line in said.splitlines() if "Far" in line)
    assert "one" in header and "llama" in header and "bits/weight" in said


def test_what_a_file_of_results_has_is_not_measured_again(packed, llama_dir, text, tmp_path, capsys, monkeypatch):
    asked = f"compare A={packed} B={llama_dir} --ppl none --skip speed --held-out {text} --block 32 --sample-tokens 3"
    asked += f" --json {tmp_path}"
    assert run(capsys, f"{asked}/there.json")[0] == 0
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "another machine"))
    for place in (
        "signbit.hub.agreement.agreement",
        "signbit.evaluate.difference.differences",
        "signbit.serve.generate",
    ):
        monkeypatch.setattr(place, lambda *_, place=place, **__: pytest.fail(f"{place} was called"))
    monkeypatch.setattr(import_module("signbit.evaluate.machines"), "versions", lambda: {"torch": "of another machine"})
    code, _, error = run(capsys, f"{asked}/here.json --results {tmp_path}/there.json")
    assert code == 0, error
    there, found = (json.loads((tmp_path / name).read_text())["models"] for name in ("there.json", "here.json"))
    names = ("agreement", "samples", "layers", "measured_on")
    assert [[model[name] for name in names] for model in found] == [[model[name] for name in names] for model in there]
    assert there[0]["agreement"] and there[0]["layers"][0]["error"] and len(there[0]["samples"]) == 3
    named = f"{asked.replace('B=', 'C=')}/other.json --results {tmp_path}/there.json"
    with pytest.raises(pytest.fail.Exception, match=r"agreement\.agreement was called"):
        run(capsys, named)


def test_eval_keeps_its_perplexity_for_reports(llama_dir, text, tmp_path, capsys, monkeypatch):
    assert run(capsys, f"eval {llama_dir} --ppl {text} --window 64 --max-windows 2")[0] == 0
    loads = []
    monkeypatch.setattr("signbit.hub.subject.load_any", lambda *args: loads.append(args) or load_any(*args))
    out = tmp_path / "c.json"
    command = (
        f"compare A={llama_dir} B={llama_dir} --skip speed --skip samples --skip agreement --skip layers --ppl {text}"
    )
    code, said, err = run(capsys, f"{command} --window 64 --max-windows 2 --json {out}")
    assert code == 0 and not loads, err
    (found,) = json.loads(out.read_text())["models"][0]["perplexities"]
    assert found["protocol"] == "text.txt, first 2 of 4 windows" and "text.txt, first 2" in said
    assert run(capsys, f"{command} --window 32 --max-windows 2")[0] == 0 and loads, "another window is another protocol"
    loads.clear()
    with open(text, "a") as stream:
        stream.write(" w1")
    assert run(capsys, f"{command} --window 64 --max-windows 2")[0] == 0 and loads, "another text"


@pytest.fixture
def windows(monkeypatch):
    """The windows that are measured from here on."""
    module, measured = import_module("signbit.evaluate.perplexity"), []
    of = module.window_nll
    monkeypatch.setattr(module, "window_nll", lambda *words: measured.append(words) or of(*words))
    return measured


def test_a_killed_perplexity_goes_on_behind_its_last_window(llama_dir, tmp_path, capsys, windows):
    text, count = tmp_path / "long.txt", 600
    text.write_text(" ".join(f"w{i * i % 61}" for i in range(8 * count)))
    command = f"eval {llama_dir} --ppl {text} --window 8"
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-m", "signbit", *shlex.split(command)], env=env)
    folder, deadline = tmp_path / "cache" / "measured", time.monotonic() + 120
    while not any(file.stat().st_size for file in folder.rglob("*.jsonl")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = sum(line.endswith("]") for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines())
    assert 0 < written < count

    def found(flags):
        windows.clear()
        code, _, err = run(capsys, f"{command} {flags} --json {tmp_path}/found.json")
        assert code == 0, err
        assert not any(folder.rglob("*.jsonl")), "the whole is kept"
        return json.loads((tmp_path / "found.json").read_text())["results"][0], len(windows), err

    went_on, measured, err = found("")
    assert measured == count - written and f"note: llama {text}: {written} windows are kept" in err
    anew, measured, err = found("--again")
    assert measured == count and "are kept" not in err
    assert (went_on["nll"], went_on["predicted_tokens"]) == (anew["nll"], anew["predicted_tokens"])


def test_again_begins_with_the_first_window(llama_dir):
    protocol = {"protocol": "x"}
    Subject("m", llama_dir, Where()).windows(protocol).add(3, 1.5, 7)
    assert Subject("m", llama_dir, Where()).recall("perplexity", protocol) is None
    assert Subject("m", llama_dir, Where()).windows(protocol).known == {3: (1.5, 7)}
    again = Subject("m", llama_dir, Where(), again=True)
    assert again.recall("perplexity", protocol) is None and again.windows(protocol).known == {}


def test_a_perplexity_of_a_file_of_results_is_not_measured_again(
    tokenizer, text, tmp_path, capsys, monkeypatch, windows
):
    model, data, there = tmp_path / "long", tmp_path / "data", tmp_path / "there.json"
    LlamaForCausalLM(tiny_llama_config(max_position_embeddings=2048)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (data / "c4").mkdir(parents=True)
    (data / "c4" / "c4-validation.jsonl").write_text((json.dumps({"text": "w1 w2 w3 " * 20}) + "\n") * 40)
    cut, local = "--window 64 --max-windows 2", f"--data-dir {data} --max-windows 2"
    assert run(capsys, f"eval {model} --ppl c4-first1100 {local} --json {there}")[::2] == (0, "")
    assert run(capsys, f"eval {model} --ppl {text} {cut} --json {tmp_path}/file.json")[0] == 0
    skip = "--skip agreement --skip layers --skip samples --skip speed"
    command = f"--ppl c4-first1100,{text} --data-dir {data} --results {there} --results {tmp_path}/file.json {skip}"

    def measured(verb, options=cut):
        windows.clear()
        monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / f"cache-{time.monotonic_ns()}"))
        code, said, err = run(capsys, f"{verb} {model} {command} {options} --json {tmp_path}/here.json")
        assert code == 0, err
        assert "c4-first1100, 40 of 1100" in (said if verb == "compare" else (tmp_path / "r/report.md").read_text())
        return len(windows), json.loads((tmp_path / "here.json").read_text())["models"][0]["perplexities"]

    report = f"report -o {tmp_path}/r"
    count, found = measured(report)
    assert count == 0 and {p["protocol"] for p in found} == {
        "c4-first1100, 40 of 1100 documents", "text.txt, first 2 of 4 windows",
    }  # fmt: skip
    assert measured("compare")[0] == 0
    there.write_text((tmp_path / "here.json").read_text())  # what a report or compare wrote says it too
    assert measured("compare")[0] == 0
    assert measured("compare", "--window 32 --max-windows 2")[0] == 2, "the file's windows are others"
    with open(text, "a") as stream:
        stream.write(" w1")
    assert measured("compare")[0] == 2, "the file is another"


@pytest.mark.parametrize(
    ("label", "asked", "options", "same"),
    [
        ("c4-first1100, 1025 of 1100 documents", "c4-first1100", {}, True),
        ("c4-first1100, 1025 of 1100 documents", "c4-random256", {}, False),
        ("wikitext2, first 2 of 166 windows", "wikitext2", {"max_windows": 2}, True),
        ("wikitext2, first 2 of 166 windows", "wikitext2", {"max_windows": 20}, False),
        ("wikitext2, first 2 of 166 windows", "wikitext2", {}, False),
        ("wikitext2", "wikitext2", {"max_windows": 2}, False),
        ("text.txt", "{text}", {}, True),
    ],
)
def test_an_older_file_of_results_is_known_by_its_label(label, asked, options, same, text):
    protocol = perplexity_protocol(asked.format(text=text), None, options.get("max_windows"))
    assert measured_as({"protocol": label}, protocol) is same


def test_a_named_set_is_known_by_its_name_and_a_file_by_its_text(text, tmp_path):
    (tmp_path / "ptb.test.txt").write_text("w1 w2\n")
    hub, local = (perplexity_protocol("ptb", data, None) for data in (None, str(tmp_path)))
    (tmp_path / "ptb.test.txt").write_text("w1 w3\n")
    other = perplexity_protocol("ptb", str(tmp_path), None)
    file = perplexity_protocol(text, None, None)
    moved = {**file, "protocol": "/gpu/text.txt"}
    protocols = [hub, local, other, file, moved]
    table = [[measured_as({"protocol": "", "asked": a}, b) for b in protocols] for a in protocols]
    assert table == [
        [True, True, True, False, False],
        [True, True, False, False, False],
        [True, False, True, False, False],
        [False, False, False, True, True],
        [False, False, False, True, True],
    ]


def test_what_is_kept_says_on_which_machine_it_was_found(llama_dir, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "asked.jsonl").write_text(
        '{"signbit_requests": 1, "harness": "made", "limit": null, "groups": [], "tasks": [{"name": "t", "kind": "choice", '
        '"metrics": ["acc"], "few_shot": 0, "version": "1", "documents": 2, "source": "here"}]}\n'
        '{"task": "t", "document": 0, "pairs": [["w1", " w2"], ["w1", " w3"]], "gold": [0], "lengths": [2, 2]}\n'
    )
    machines, out = import_module("signbit.evaluate.machines"), tmp_path / "e.json"

    def measured_on(flags):
        code, _, err = run(capsys, f"eval {llama_dir} --window 32 {flags} --json {out}")
        assert code == 0, err
        return json.loads(out.read_text())["models"][0]["measured_on"]

    monkeypatch.setattr(machines, "versions", lambda: {"torch": "of yesterday"})
    requests = f"--requests {tmp_path}/asked.jsonl"
    yesterday = {**here(), "torch": "of yesterday"}
    assert measured_on(f"--ppl {text} {requests}") == [{"what": ["perplexity text.txt", "tasks"], **yesterday}]
    monkeypatch.setattr(machines, "versions", lambda: {"torch": "of today"})
    today = {**here(), "torch": "of today"}
    assert measured_on(f"--ppl {text} {requests}") == [{"what": ["perplexity text.txt", "tasks"], **yesterday}]
    with (tmp_path / "asked.jsonl").open("a") as stream:
        stream.write('{"task": "t", "document": 1, "pairs": [["w4", " w2"]], "gold": [0], "lengths": [2]}\n')
    assert measured_on(f"--ppl {text} {requests}") == [
        {"what": ["perplexity text.txt"], **yesterday}, {"what": ["tasks"], **today},
    ], "the batch of both documents was answered today"  # fmt: skip
    monkeypatch.setattr(machines, "versions", lambda: {"torch": "of tomorrow"})
    monkeypatch.setenv("SIGNBIT_CUDA", "reference")
    (tasks,) = measured_on(requests)
    assert tasks["torch"] == "of tomorrow", "what other kernels answered is asked for anew"
    monkeypatch.delenv("SIGNBIT_CUDA")
    assert measured_on(f"--ppl {text} {requests}")[1] == {"what": ["tasks"], **today}
    command = f"report {llama_dir} --ppl none --results {out} --skip samples --skip speed -o {tmp_path}/r"
    assert run(capsys, command)[0] == 0
    page = (tmp_path / "r" / "report.md").read_text()
    assert re.search(r"\| llama \| .*torch of yesterday.* \| perplexity text\.txt \|", page)
    assert re.search(r"\| llama \| .*torch of today.* \| tasks \|", page) and re.search(
        "Made on: .*torch of tomorrow", page
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare {model}", "give at least two models"),
        ("compare {model} {model} --ppl none", "is named twice"),
        ("compare A={model} A={model} --ppl none", "is named twice"),
        ("compare A={model} B={model} --ppl none --results {model}/none.json", "cannot be read"),
        ("compare A={model} B={model} --ppl none --device no", "cannot be used here"),
        ("report {model} --ppl none -o {model}/config.json", "cannot be made"),
        ("report {model}/none --ppl none", "there is no directory"),
        ("compare A={model} B={model} --ppl nothing.txt", "nothing.txt"),
        ("compare A={model} B={model} --ppl none --limit 3", "--few-shot and --limit are for --tasks"),
        ("report {model} --ppl none --block -1", "--block is -1; at least 1 is needed"),
        ("report {model} --ppl none --held-out-tokens 0", "--held-out-tokens is 0; at least 1 is needed"),
        ("report {model} --ppl none --sample-tokens 0", "--sample-tokens is 0; at least 1 is needed"),
        ("report {model} --ppl none --max-windows 0", "--max-windows is 0; at least 1 is needed"),
        ("compare A={model} B={model} --ppl none --block 0", "--block is 0; at least 1 is needed"),
        ("diff {model} {model} --block 0", "--block is 0; at least 1 is needed"),
        ("diff {model} {model} --text-tokens 0", "--text-tokens is 0; at least 1 is needed"),
        ("eval {model} --requests none.jsonl --max-windows 0", "--max-windows is 0; at least 1 is needed"),
        *(
            (f"{words} --json no/x.json", "--json no/x.json cannot be written: there is no directory")
            for words in ("eval none", "report none", "compare none none", "diff none none", "info none", "doctor none")
        ),
        ("info none --json .", "--json . cannot be written: it is a directory"),
        ("eval --table onebit --markdown no/x.md", "--markdown no/x.md cannot be written: there is no directory"),
    ],
)
def test_what_is_refused(arguments, message, llama_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, arguments.format(model=llama_dir))
    assert code == 1 and message in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--block 200", "--block is 200 tokens, and the model has 128 positions"),
     ("--block 64 --held-out-tokens 50", "has 50 tokens, fewer than one block of 64")],
)  # fmt: skip
def test_a_block_that_is_not_to_be_had_ends_a_report_before_work(
    flags, message, packed, llama_dir, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Subject, "model", property(lambda _: pytest.fail("a model was loaded")))
    card = Path(packed, "README.md")
    before = card.read_text()
    command = f"report {packed} --against {llama_dir} --ppl none --held-out {text} --skip speed -o {tmp_path}/r"
    code, _, err = run(capsys, f"{command} {flags}")
    assert code == 1 and message in err and card.read_text() == before


def test_a_model_of_another_vocabulary_has_no_agreement_and_that_is_said(packed, text, tmp_path, capsys, tokenizer):
    other = tmp_path / "other"
    LlamaForCausalLM(tiny_llama_config(vocab_size=70, intermediate_size=80)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    out = tmp_path / "c.json"
    skip = "--skip speed --skip samples"
    code, _, err = run(capsys, f"compare {packed} {other} --ppl none --held-out {text} --block 64 {skip} --json {out}")
    assert code == 0
    assert "note: one, agreement beside other" in err and "note: one, layers beside other" in err
    (one, _) = json.loads(out.read_text())["models"]
    assert one["agreement"] is None and "answers with 70 tokens and the model with 64" in one["unknown"]["agreement"]
    assert "[70, 32] in the other" in one["unknown"]["layers"] and err.count(one["unknown"]["layers"]) == 1
    assert run(capsys, f"compare {packed} --results {out} --ppl none {skip} --json {out}")[0] == 0
    assert (
        json.loads(out.read_text())["models"][0]["unknown"]["agreement"]
        == "no teacher was named (report --against MODEL)"
    )
    skip += " --skip agreement --skip layers"
    assert run(capsys, f"compare {packed} {other} --ppl none {skip} --json {out}")[0] == 0
    assert json.loads(out.read_text())["models"][0]["unknown"] == {
        name: f"it was left out (--skip {name})" for name in ("agreement", "layers", "speed")
    }


def test_a_name_before_a_place(tmp_path):
    assert named("a/b/c/") == ("c", "a/b/c/")
    assert named("Name=a/b") == ("Name", "a/b")
    strange = tmp_path / "x=y"
    strange.mkdir()
    assert named(str(strange)) == ("x=y", str(strange))
