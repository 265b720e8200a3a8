"""Quantizing a directory with one block in memory: the bytes of the whole way, killed or not."""

import gc
import itertools
import json
import multiprocessing
import random
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_llama_config
from tests.families import DENSE, MIXTURES

import signbit
from signbit import format as packed_format
from signbit.data import CalibrationOptions, draw_windows
from signbit.errors import FormatError, OptionError, WeightError
from signbit.hub import stream
from signbit.hub.stream import quantize

FAMILIES = {name: make for name, (make, _) in DENSE.items()} | MIXTURES


@pytest.fixture
def text(tmp_path):
    """Documents of words that the tokenizer knows, some longer than the windows."""
    generator = random.Random(0)
    path = tmp_path / "text.jsonl"
    lengths = [generator.randint(5, 120) for _ in range(60)]
    rows = [{"text": " ".join(f"w{generator.randint(0, 60)}" for _ in range(n))} for n in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def calibration(text):
    return CalibrationOptions(text, samples=6, sequence_length=40)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


# What a head becomes has nothing to do with what blocks are calibrated on.
@pytest.mark.parametrize(
    ("family", "method", "head"),
    [
        ("llama", "pbllm", "int8"),
        *itertools.product(FAMILIES, ["absmean"], ["keep", "int8"]),
        *itertools.product(FAMILIES, ["pbllm"], ["keep"]),
    ],
)
def test_the_bytes_are_those_of_quantizing_in_memory(family, method, head, tokenizer, calibration, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"allow_partial": True, "head": head}
    config = signbit.SignbitConfig(method, **settings)
    path, report = quantize(
        str(tmp_path / "model"), tmp_path / "out", config, calibration if method == "pbllm" else None
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    windows = draw_windows(tokenizer, calibration)[0] if method == "pbllm" else None
    other = signbit.quantize_(model, signbit.SignbitConfig(method, **settings), windows)
    signbit.save(model, tmp_path / "memory")
    assert files(path)["model.safetensors"] == files(tmp_path / "memory")["model.safetensors"]
    assert report.decisions == other.decisions
    assert not (tmp_path / "out.partial").exists()
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([[3, 5, 7, 11]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("where", ["device", "disk"])
def test_where_inputs_are_kept_changes_nothing(where, llama_dir, calibration, tmp_path):
    config = signbit.SignbitConfig("pbllm")
    one, _ = quantize(llama_dir, tmp_path / "one", config, calibration)
    other, _ = quantize(llama_dir, tmp_path / "two", signbit.SignbitConfig("pbllm"), calibration, inputs_on=where)
    assert files(one)["model.safetensors"] == files(other)["model.safetensors"]


class Killed(BaseException):
    """Stands for SIGKILL inside one process."""


@pytest.fixture
def deep_dir(tokenizer, tmp_path):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    out = tmp_path / "deep"
    LlamaForCausalLM(tiny_llama_config(num_hidden_layers=5)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


@pytest.mark.parametrize(
    ("method", "when"),
    [
        pytest.param("pbllm", "before", marks=pytest.mark.slow),
        ("pbllm", "between"),
        pytest.param("pbllm", "after", marks=pytest.mark.slow),
        ("absmean", "between"),
        ("pb-gptq", "after"),
    ],
)
def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(method, when, deep_dir, calibration, tmp_path, monkeypatch):
    chosen = None if method == "absmean" else calibration
    whole, report = quantize(deep_dir, tmp_path / "whole", signbit.SignbitConfig(method), chosen)
    put, write = packed_format.Parts.put, packed_format.Parts._write
    for place in (0, 1, 3, 5, 6):  # the windows, blocks, the last block, the mark that all is finished
        count = 0

        def counted(original, *arguments):
            nonlocal count
            count += 1
            if count == place + 1 and when == "before":  # noqa: B023
                raise Killed
            original(*arguments)
            if count == place + 1 and when == "after":  # noqa: B023
                raise Killed

        out = tmp_path / f"out{place}"
        with monkeypatch.context() as patched:
            if when == "between":  # tensors written, record not
                patched.setattr(packed_format.Parts, "_write", staticmethod(lambda p, t: counted(write, p, t)))
            else:
                patched.setattr(packed_format.Parts, "put", lambda *a: counted(put, *a))
            try:
                quantize(deep_dir, out, signbit.SignbitConfig(method), chosen)
            except Killed:
                assert not out.exists()
        again = signbit.SignbitConfig(method)
        if not out.exists():
            notes = []
            _, second = quantize(deep_dir, out, again, chosen, note=notes.append)
            assert second == report
        assert files(out) == files(whole), place
        assert not out.with_name(f"{out.name}.partial").exists()


def test_killed_after_the_rename_it_tidies_up(llama_dir, calibration, tmp_path, monkeypatch):
    def killed(self):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(packed_format.Parts, "remove", killed)
        with pytest.raises(Killed):
            quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)
    before = files(tmp_path / "out")
    quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)
    assert files(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(FormatError, match="exists; give another -o, or --overwrite"):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)


@pytest.fixture
def killed_behind(monkeypatch):
    """`with killed_behind(i): quantize(…)`: the run is killed once block i is written."""

    @contextmanager
    def killing(index):
        put = packed_format.Parts.put

        def put_and_kill(self, name, tensors, record):
            put(self, name, tensors, record)
            if name == stream.StreamedBlocks.part(index):
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(packed_format.Parts, "put", put_and_kill)
            with pytest.raises(Killed):
                yield

    return killing


@pytest.fixture
def unfinished(deep_dir, calibration, tmp_path, killed_behind):
    """OUT whose run was killed after three blocks."""
    with killed_behind(2):
        quantize(deep_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)
    return tmp_path / "out"


def test_a_resumed_run_says_so_and_solves_the_rest_only(unfinished, deep_dir, calibration):
    notes, names = [], []
    quantize(
        deep_dir, unfinished, signbit.SignbitConfig("pbllm"), calibration, note=notes.append,
        progress=lambda stage, done, total, name: names.append(name),
    )  # fmt: skip
    assert "going on in" in notes[0]
    assert "3 of 5 blocks are finished" in notes[0]
    assert names[:3] == [f"block {i}, from before" for i in range(3)]
    assert len(names) == 3 + 2 * 7


def test_other_settings_are_refused_and_named(unfinished, deep_dir, calibration):
    with pytest.raises(
        FormatError, match=r"unfinished run with other settings \(config\.options\.salient: 0\.1 there, 0\.3 "
    ):
        quantize(deep_dir, unfinished, signbit.SignbitConfig("pbllm", salient=0.3), calibration)
    other = CalibrationOptions(calibration.calibration, 6, 40, seed=1)
    with pytest.raises(FormatError, match=r"calibration\.seed: 0 there, 1 here.*--restart"):
        quantize(deep_dir, unfinished, signbit.SignbitConfig("pbllm"), other)
    path, _ = quantize(deep_dir, unfinished, signbit.SignbitConfig("pbllm", salient=0.3), calibration, restart=True)
    assert path.exists()


def test_a_changed_source_is_refused(unfinished, deep_dir, calibration):
    file = Path(deep_dir) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FormatError, match=r"the source model's model\.safetensors changed since"):
        quantize(deep_dir, unfinished, signbit.SignbitConfig("pbllm"), calibration)


def test_the_calibration_text_is_drawn_once(unfinished, deep_dir, calibration, text, tmp_path):
    whole, _ = quantize(deep_dir, tmp_path / "whole", signbit.SignbitConfig("pbllm"), calibration)
    Path(text).write_text('{"text": "w1 w2"}\n')
    quantize(deep_dir, unfinished, signbit.SignbitConfig("pbllm"), calibration)
    assert files(unfinished) == files(whole)


def test_two_runs_at_once_are_refused(llama_dir, tmp_path):
    settings = {"a": 1}
    with (
        packed_format.Parts.opened(tmp_path / "parts", settings),
        pytest.raises(FormatError, match="another process is at work"),
        packed_format.Parts.opened(tmp_path / "parts", settings),
    ):
        pass


def _run(source, out, text):
    torch.set_num_threads(1)
    gc.freeze()  # after each block garbage is looked for, and nearly all that is here are imports
    quantize(source, out, signbit.SignbitConfig("pbllm", salient=0.3), CalibrationOptions(text, 2, 40))


@pytest.mark.slow
def test_killed_at_twenty_random_moments(deep_dir, text, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["signbit.hub.stream", "transformers.models.llama.modeling_llama"])

    def start(out):
        process = context.Process(target=_run, args=(deep_dir, str(out), text))
        process.start()
        return process

    start(tmp_path / "warm").join()
    began = time.monotonic()
    start(tmp_path / "whole").join()
    whole_s = time.monotonic() - began
    want = files(tmp_path / "whole")
    generator = random.Random(time.time_ns())
    kills = 0
    while kills < 20:
        out = tmp_path / "out"
        process = start(out)
        time.sleep(generator.uniform(0, whole_s))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        again = start(out)
        again.join()
        assert again.exitcode == 0 or out.exists()
        assert files(out) == want
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)


def test_a_model_of_several_shards(llama, tokenizer, calibration, tmp_path):
    llama.save_pretrained(tmp_path / "one")
    llama.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    outs = []
    for name in ("one", "many"):
        tokenizer.save_pretrained(tmp_path / name)
        outs.append(
            quantize(str(tmp_path / name), tmp_path / f"{name}-out", signbit.SignbitConfig("pbllm"), calibration)[0]
        )
    assert files(outs[0])["model.safetensors"] == files(outs[1])["model.safetensors"]


def test_one_block_is_in_memory_at_a_time(deep_dir, calibration, tmp_path, monkeypatch):
    most = 0
    leave = stream.StreamedBlocks.leave

    def counted(self, index, decisions):
        nonlocal most
        real = [i for i, b in enumerate(self.modules) if not all(p.is_meta for p in b.parameters())]
        most = max(most, len(real))
        leave(self, index, decisions)
        assert all(t.is_meta for t in self.modules[index].state_dict().values())

    monkeypatch.setattr(stream.StreamedBlocks, "leave", counted)
    quantize(deep_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)
    assert most == 1


def test_rules_differ_by_layer_and_are_kept(llama_dir, calibration, tmp_path):
    rules = {"mlp.down_proj": {"salient": 0.3}, "layers.1.mlp.down_proj": {"salient": 0.5, "salient_bits": 4}}
    path, report = quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm", rules=rules), calibration)
    kept = json.loads((path / "config.json").read_text())["quantization_config"]["settings"]
    assert kept["rules"] == [[pattern, values] for pattern, values in rules.items()]
    assert signbit.SignbitConfig("pbllm", rules=kept["rules"]).plan.rules == rules
    bits = {d.name: d.bits_per_weight for d in report.binarized}
    assert bits["model.layers.0.mlp.down_proj"] > bits["model.layers.0.mlp.up_proj"] + 0.5
    model = signbit.load(path)
    assert model.model.layers[1].mlp.down_proj.weights[0].salient.bits == 4
    assert model.model.layers[0].mlp.down_proj.weights[0].salient.bits == 8


def test_a_rule_can_spare_a_layer_calibration(llama_dir, calibration, tmp_path):
    rules = {"q_proj": {"gptq": False, "saliency": "magnitude"}}
    _, report = quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm", rules=rules), calibration)
    assert report.share > 0.9


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"mlp.downproj": {"salient": 0.3}}, r"--rule mlp\.downproj matches no .*the nearest are .*\.mlp\.down_proj"),
        ({"mlp": {"salent": 0.3}}, r"--rule 'mlp': 'salent' is no option of the method.*did you mean salient"),
        ({"mlp": {"salient": 3}}, r"--rule 'mlp': salient is 3; it is a share"),
        ({"mlp": {"sequential": False}}, r"sequential holds for the whole model"),
        ({"mlp": {"group": 48}}, r"model\.layers\.0\.mlp\.gate_proj: a group of 48 columns does not divide 32"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit(rules, message, llama_dir, calibration, tmp_path):
    with pytest.raises(OptionError, match=message):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm", rules=rules), calibration)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize(
    ("selection", "binarized"),
    [
        ({"min_layer": 3}, [3, 4]),
        ({"max_layer": 1}, [0]),
        ({"min_layer": 1, "max_layer": 4, "invert": True}, [0, 4]),
        ({"keep": ("layers.1", "layers.2")}, [0, 3, 4]),
        ({"only": ("layers.2",)}, [2]),
    ],
)
def test_selected_layers(selection, binarized, deep_dir, calibration, tmp_path):
    config = signbit.SignbitConfig("pbllm", **selection)
    path, report = quantize(deep_dir, tmp_path / "out", config, calibration)
    assert sorted({int(d.name.split(".")[2]) for d in report.binarized}) == binarized
    assert signbit.load(path)(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_selection_of_nothing_is_refused(llama_dir, tmp_path):
    with pytest.raises(OptionError, match="--min-layer is 7, but the model has 2 blocks, 0 to 1"):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig(min_layer=7))
    with pytest.raises(OptionError, match="--only mlq matches no linear layer; the nearest are"):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig(only=("mlq",)))


def test_calibration_that_is_missing_or_not_used(llama_dir, calibration, tmp_path):
    with pytest.raises(OptionError, match=r"pbllm measures the layers' inputs: give --calibration"):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"))
    with pytest.raises(OptionError, match="would not be used"):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig(), calibration)


def test_nan_in_a_block_names_it_and_leaves_no_output(deep_dir, calibration, tmp_path):
    from safetensors.torch import load_file, save_file

    file = Path(deep_dir) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight"][2, 2] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"model\.layers\.3\.mlp\.up_proj: 1 of its 2304 weights are NaN"):
        quantize(deep_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)
    assert not (tmp_path / "out").exists()


def test_text_that_the_model_writes(llama_dir, tmp_path):
    options = CalibrationOptions("self", samples=3, sequence_length=24)
    one, _ = quantize(llama_dir, tmp_path / "one", signbit.SignbitConfig("pbllm"), options)
    two, _ = quantize(llama_dir, tmp_path / "two", signbit.SignbitConfig("pbllm"), options)
    assert files(one)["model.safetensors"] == files(two)["model.safetensors"]
    settings = json.loads((one / "config.json").read_text())["quantization_config"]["settings"]
    assert settings["calibration"]["text"] == "written by the model itself"


def test_a_full_disk_keeps_the_finished_blocks(deep_dir, calibration, tmp_path, monkeypatch):
    from signbit.format import parts

    def full(tensors, path):
        if "block-00002" in str(path):
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = parts.save_file
    monkeypatch.setattr(parts, "save_file", full)
    with pytest.raises(FormatError, match=r"No space left on device.*the finished blocks in it stay"):
        quantize(deep_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration)
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == 2


def test_what_stands_in_the_way_of_the_unfinished_run_is_not_touched(llama_dir, calibration, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(FormatError, match=r"holds precious\.txt, so it is no unfinished run"):
            quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration, restart=restart)
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "mine"
    source = Path(llama_dir).rename(tmp_path / "m.partial")
    before = files(source)
    with pytest.raises(OptionError, match="is the source model"):
        quantize(str(source), tmp_path / "m", signbit.SignbitConfig())
    assert files(source) == before


def test_one_config_serves_again(unfinished, deep_dir, calibration, tmp_path):
    config = signbit.SignbitConfig("pbllm")
    quantize(deep_dir, unfinished, config, calibration)
    quantize(deep_dir, tmp_path / "second", config, calibration)
    assert files(unfinished) == files(tmp_path / "second")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_layer_resumes_to_the_same_bytes(family, tokenizer, calibration, tmp_path, killed_behind):
    torch.manual_seed(0)
    source = tmp_path / "source"
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    settings = {"low": "no", "salient": 0.5, "allow_partial": True}
    whole, _ = quantize(str(source), tmp_path / "whole", signbit.SignbitConfig("pbllm", **settings), calibration)
    with killed_behind(0):
        quantize(str(source), tmp_path / "out", signbit.SignbitConfig("pbllm", **settings), calibration)
    quantize(str(source), tmp_path / "out", signbit.SignbitConfig("pbllm", **settings), calibration)
    assert files(tmp_path / "out")["model.safetensors"] == files(whole)["model.safetensors"]


def test_its_own_text_of_too_many_positions(llama_dir, tmp_path):
    options = CalibrationOptions("self", samples=1, sequence_length=200)
    with pytest.raises(OptionError, match="the model has 128 positions"):
        quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), options)


def test_a_damaged_record_is_named(unfinished, deep_dir, calibration):
    partial = unfinished.with_name("out.partial")
    (partial / "signbit-run.json").write_text("{")
    with pytest.raises(FormatError, match=r"signbit-run\.json is damaged .* --restart"):
        quantize(deep_dir, unfinished, signbit.SignbitConfig("pbllm"), calibration)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("where", ["device", "cpu", "disk"])
def test_on_a_gpu_with_inputs_anywhere_and_resumed(where, deep_dir, calibration, tmp_path, killed_behind):
    whole, _ = quantize(deep_dir, tmp_path / "whole", signbit.SignbitConfig("pbllm"), calibration, device="cuda")
    with killed_behind(1):
        quantize(
            deep_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration, device="cuda", inputs_on=where
        )
    quantize(deep_dir, tmp_path / "out", signbit.SignbitConfig("pbllm"), calibration, device="cuda", inputs_on=where)
    assert files(tmp_path / "out") == files(whole)


def test_killed_while_it_began_it_begins_again(llama_dir, tmp_path, monkeypatch):
    def killed(self, target):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig())
    assert {p.name for p in (tmp_path / "out.partial").iterdir()} == {"lock", "signbit-run.tmp"}
    quantize(llama_dir, tmp_path / "out", signbit.SignbitConfig())
    assert not (tmp_path / "out.partial").exists()
