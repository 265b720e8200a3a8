"""The analysis of a run's flips: against signs that are looked at after each step, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from signbit.cli import main
from signbit.errors import TrainingError
from signbit.train import read_flips, read_metrics
from signbit.train.flips import FlipHistory
from signbit.train.plot import plot_flips

SIZES = "--sequence-length 16 --batch-size 4 --validation-blocks 2 --learning-rate 0.02 --max-steps 6"


@pytest.fixture
def run(llama_dir, text, tmp_path, capsys):
    """A run of six steps with a line every third of them, and a checkpoint of each."""
    out = tmp_path / "run"
    words = f"distill {llama_dir} -o {out} --data {text} {SIZES} --log-every 3 --save-every 1 --keep-checkpoints 6"
    assert main(words.split()) == 0, capsys.readouterr().err
    return out


def test_flips_are_those_of_the_checkpoints(run, tmp_path):
    """FBI-LLM gathers the model after each step and compares; so do these checkpoints of every step."""
    history = read_flips(run)
    # There is a line at each checkpoint too.
    assert history.step == [1, 2, 3, 4, 5, 6] and history.steps == [1] * 6
    states = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 7)]
    changed = 0
    for name, weights in history.weights.items():
        signs = [state[f"{name}.weight"] >= 0 for state in states]
        assert weights == signs[0].numel()
        for step in range(1, 6):
            count = int((signs[step] != signs[step - 1]).sum())
            assert history.flip_rate[name][step] == pytest.approx(count / weights)
            assert history.to_dict()["layers"][name]["flip_num"][step] == count
            changed += count
    assert changed > 100
    total = sum(history.weights.values())
    for step in range(6):
        weighted = sum(history.flip_rate[name][step] * weights for name, weights in history.weights.items()) / total
        assert history.ave_flip_rate[step] == pytest.approx(weighted)


def test_a_line_of_several_steps_counts_each(llama_dir, text, tmp_path, run):
    words = f"distill {llama_dir} -o {tmp_path}/rare --data {text} {SIZES} --log-every 6 --save-every 6"
    assert main(words.split()) == 0
    every, rare = read_flips(run), read_flips(tmp_path / "rare")
    assert rare.steps == [6]
    for name in every.weights:
        assert rare.flip_rate[name][0] == pytest.approx(sum(every.flip_rate[name]) / 6)
    assert rare.to_dict()["layers"][name]["flip_num"] == [sum(every.to_dict()["layers"][name]["flip_num"])]


def test_the_command_prints_writes_and_draws(run, tmp_path, capsys):
    assert main(f"flips {run} --json {tmp_path}/flips.json --plot {tmp_path}/flips.png".split()) == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in printed and "all" in printed and "of 6 steps" in printed
    values = json.loads((tmp_path / "flips.json").read_text())
    assert values["ave_flip_rate"] == read_flips(run).ave_flip_rate and len(values["layers"]) == 14
    assert set(values["layers"]["model.layers.0.mlp.up_proj"]) == {"weights", "flip_rate", "flip_num"}
    assert (tmp_path / "flips.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_analysed_is_refused(run, tmp_path, capsys):
    assert main(f"flips {tmp_path}/none".split()) == 1
    assert "holds no run; give the directory that a training was told to write" in capsys.readouterr().err
    assert main(f"flips {run} --plot {tmp_path}/flips.gif".split()) == 1
    assert "the name ends in .png, .svg or .pdf" in capsys.readouterr().err
    lines = read_metrics(run / "metrics.jsonl")
    for changes, message in (
        ([line | {"flips_by_layer": {}} for line in lines], "trains no binary layer"),
        ([{k: v for k, v in line.items() if k != "flip_steps"} for line in lines], "is of an earlier signbit"),
        ([], "has no line yet"),
    ):
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changes))
        with pytest.raises(TrainingError, match=message):
            read_flips(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(TrainingError, match="has no line yet"):  # a run in its first steps
        read_flips(run)


def test_layers_outside_of_blocks_are_drawn_too(run, tmp_path):
    history = read_flips(run)
    names = {name: "odd" if name.endswith("0.mlp.up_proj") else name for name in history.weights}
    renamed = [{names[name]: value for name, value in part.items()} for part in (history.weights, history.flip_rate)]
    plot_flips(
        type(history)(history.step, history.steps, history.tokens, *renamed, history.ave_flip_rate),
        tmp_path / "odd.svg",
        "odd",
    )
    assert "odd" in (tmp_path / "odd.svg").read_text()


@pytest.fixture
def history():
    """Two kinds of layers, of unlike sizes, over one step and then three."""
    rates = {"blocks.0.up": [0.5, 0.1], "blocks.1.up": [0.1, 0.3], "blocks.0.down": [0.0, 0.2]}
    sizes = {"blocks.0.up": 100, "blocks.1.up": 300, "blocks.0.down": 600}
    return FlipHistory([1, 4], [1, 3], [8, 32], sizes, rates, [0.08, 0.22])


def test_means_are_weighted_by_size_and_by_steps(history):
    assert history.mean(["blocks.0.up", "blocks.1.up"]) == pytest.approx([0.2, 0.25])
    assert history.over_the_run([0.2, 0.6]) == pytest.approx(0.5)
    up, down, every = history.summary()
    assert up[1:3] == (2, 400) and up[3:] == pytest.approx((0.2, (0.2 + 3 * 0.25) / 4, 0.25))
    assert down[1:3] == (1, 600) and down[3:] == pytest.approx((0.0, 0.15, 0.2))
    assert every[:3] == ("all", 3, 1000) and every[3:] == pytest.approx((0.08, (0.08 + 3 * 0.22) / 4, 0.22))


def test_what_is_drawn_is_what_was_counted(history, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: drawn.append(self))
    plot_flips(history, tmp_path / "flips.png", "a run")
    left, right = ([(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in drawn[0].axes)
    tokens = [8e-6, 32e-6]
    for (x, y), want in zip(left, ([20, 25], [0, 20], [8, 22]), strict=True):
        assert x == pytest.approx(tokens) and y == pytest.approx(want)
    for (x, y), blocks, want in zip(right, ([0, 1], [0]), ([20, 25], [15]), strict=True):
        assert x == blocks and y == pytest.approx(want)


def test_a_latent_of_zero_is_a_plus(llama):
    from signbit.methods import METHODS
    from signbit.ptq import Plan
    from signbit.train import Flips, Trained, binary_layers, start_training_

    start_training_(llama, METHODS["fbi"], Plan(METHODS["fbi"].options()), Trained())
    flips, (name, layer) = Flips(llama), next(iter(binary_layers(llama)))
    layer.weight.data[0, :3] = torch.tensor([1.0, 2.0, -1.0])
    flips.begin()
    layer.weight.data[0, :3] = 0.0
    flips.step()
    assert flips.take()[name] == pytest.approx(1 / layer.weight.numel())


def test_groups_change_nothing(llama, monkeypatch):
    """Layers are looked at together as far as a bound goes; each keeps its own count."""
    from signbit.methods import METHODS
    from signbit.ptq import Plan
    from signbit.train import Flips, Trained, binary_layers, start_training_
    from signbit.train import flips as module

    start_training_(llama, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    counters = []
    for entries in (1, 1 << 11, 1 << 26):
        monkeypatch.setattr(module, "_GROUP_ENTRIES", entries)
        counters.append(Flips(llama))
        counters[-1].begin()
    assert [len(counter._groups) for counter in counters] == [14, 9, 4]
    for place, (_, layer) in enumerate(binary_layers(llama)):
        layer.weight.data[0, :place] *= -1
    for counter in counters:
        counter.step()
    found = [counter.take() for counter in counters]
    assert found[0] == found[1] == found[2]
    assert [found[0][name] for name, _ in binary_layers(llama)] == [
        min(place, layer.weight.shape[1]) / layer.weight.numel()
        for place, (_, layer) in enumerate(binary_layers(llama))
    ]


def test_nothing_is_gathered(run, monkeypatch):
    """Of divided latents each process counts its own part; only counts are added up."""
    from signbit.train import flips as module

    gathered = []
    monkeypatch.setattr(module, "is_divided", lambda parameter: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: gathered.append(counts.numel()))
    from signbit.methods import METHODS
    from signbit.ptq import Plan
    from signbit.train import Flips, Trained, start_training_
    from tests import families

    model = families.llama()
    start_training_(model, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    flips = Flips(model)
    flips.begin()
    flips.step()
    flips.take()
    assert gathered == [2 * 14]
