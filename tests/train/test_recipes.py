"""The recipes that signbit carries: each is read, and runs for two steps on a tiny random model of its family."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from signbit.cli import main
from signbit.errors import OptionError
from signbit.models import Shape
from signbit.train.recipe import read_recipe, recipe_names, verb_of
from tests import families

NAMES = recipe_names()


def test_the_published_ones_are_there(capsys):
    distilled, pretrained, finetuned = (recipe_names(verb) for verb in ("distill", "pretrain", "finetune"))
    onebit = ("llama-7b", "llama-13b", "llama-2-7b", "llama-2-13b", "opt-1.3b", "opt-2.7b")
    assert {f"onebit-{name}" for name in onebit} < set(distilled)
    bitnet = ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "30b")
    fbi = ("130m", "1.3b", "7b", "13b")
    assert set(pretrained) == {
        *(f"bitnet-{name}" for name in bitnet), *(f"fbi-{name}" for name in fbi), "bitllama-wikitext103",
        *(f"scratch-{name}" for name in ("dense", "fbi-ar", "fbi-ad", "bitnet")),
    }  # fmt: skip
    assert {f"pbllm-opt-{name}" for name in ("125m", "350m-quotes", "1.3b", "1.3b-hessian")} | {"onebit-alpaca"} == set(
        finetuned
    )
    assert {**distilled, **pretrained, **finetuned} == NAMES
    assert len(distilled) + len(pretrained) + len(finetuned) == len(NAMES)
    for verb, theirs in (("distill", distilled), ("pretrain", pretrained), ("finetune", finetuned)):
        assert main([verb, "--list"]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed and about in printed for name, about in theirs.items())
        assert len(printed.splitlines()) == len(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tokenizer, tmp_path, capsys):
    """For two steps, at tiny size; what no flag says is the recipe's."""
    model = families.DENSE["opt" if "opt" in name else "llama"][0]()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 61}" for i in range(4000)))
    recipe = read_recipe(name)
    _, verb = verb_of(recipe)
    if verb != "pretrain":
        words = f"{verb} {tmp_path}/model"
        if "masks" in recipe:
            made_by = (
                f"--method pb-gptq --salient 0.1 --calibration {tmp_path}/text.txt --samples 4 --sequence-length 16"
            )
            assert main(f"quantize {tmp_path}/model -o {tmp_path}/{recipe['masks']} {made_by}".split()) == 0
            words += f" --masks {tmp_path}/{recipe['masks']}"
    else:
        words = "pretrain --hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 4"
        words += f" --{'teacher' if recipe['objective']['kd_alpha'] > 0 else 'tokenizer'} {tmp_path}/model"
    words += (
        f" -o {tmp_path}/run --recipe {name} --data {tmp_path}/text.txt --sequence-length 16 --batch-size 4 "
        "--accumulation 2 --validation-blocks 1 --max-steps 2"
    )
    if recipe["train"].get("compile"):
        words += " --no-compile"
    assert main(words.split()) == 0, capsys.readouterr().err
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    method = recipe["method"].replace("-", "_")
    tables = {
        "train": made["options"], "objective": made["objective"], "schedule": made["schedule"],
        "trained": made["trained"], "shape": made["start"]["shape"],
    }  # fmt: skip
    if made["config"] is not None:
        tables[method] = made["config"]["options"]
        assert made["config"]["head"] == recipe.get("head", "keep")
    given = {"max_minutes", "max_passes", *(word[2:].replace("-", "_") for word in words.split() if word[:2] == "--")}
    for table, values in tables.items():
        for option, value in recipe.get(table, {}).items():
            if option not in given and not (option == "compile" and value):
                assert values[option] == value, (table, option)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert torch.isfinite(torch.tensor(line["loss"])) and line["grad_norm"] > 0
    assert main(f"pack {tmp_path}/run -o {tmp_path}/out".split()) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in recipe_names("pretrain") if not name.startswith("scratch")])
def test_a_shape_has_the_parameters_in_its_name(name):
    """FBI-LLM's to four digits (methods.md 2.1), BitNet's nearly: the paper counts without saying what."""
    recipe = read_recipe(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(Shape(**recipe["shape"]).config(recipe["vocabulary"]))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    published = {
        "fbi-130m": 134.1, "fbi-1.3b": 1364, "fbi-7b": 6738, "fbi-13b": 13015, "bitllama-wikitext103": 64.2,
    }  # fmt: skip
    if name in published:
        assert count == pytest.approx(published[name], rel=1e-3)
    else:
        size = name.removeprefix("bitnet-")
        named = float(size[:-1]) * (1000 if size[-1] == "b" else 1)
        assert 0.85 * named < count < 1.05 * named


#: Peak learning rate, layers, width, heads, decay (BitNet, arXiv 2310.11453, appendix A).
BITNET = {
    "125m": (2.4e-3, 12, 768, 12, 0.01), "350m": (1.2e-3, 24, 1024, 16, 0.01), "760m": (1e-3, 24, 1536, 16, 0.01),
    "1.3b": (8e-4, 24, 2048, 32, 0.01), "2.7b": (6.4e-4, 32, 2560, 32, 0.01), "6.7b": (4.8e-4, 32, 4096, 32, 0.01),
    "13b": (4e-4, 40, 5120, 40, 0.05), "30b": (4e-4, 48, 7168, 56, 0.05),
}  # fmt: skip
#: Layers, width, width inside, heads, sequences a step, parts, steps in one of Amber's chunks (FBI-LLM's configs and scripts).
FBI = {
    "130m": (12, 768, 2048, 12, 1024, 8, 1667), "1.3b": (24, 2048, 5632, 32, 1152, 4, 1482),
    "7b": (32, 4096, 11008, 32, 1920, 10, 889), "13b": (40, 5120, 13824, 40, 1920, 10, 889),
}  # fmt: skip


def tables(name, **wanted):
    """Asserts that the tables of a recipe hold what is wanted."""
    recipe = read_recipe(name)
    for table, values in wanted.items():
        assert {key: recipe[table][key] for key in values} == values, (name, table)


@pytest.mark.parametrize("size", BITNET)
def test_bitnets_are_the_papers(size):
    rate, layers, width, heads, decay = BITNET[size]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    train = {
        "learning_rate": rate, "weight_decay": decay, "max_steps": 40_000, "beta1": 0.9, "beta2": 0.98,
        "max_grad_norm": 0.0, "optim": "adamw_torch",
    }  # fmt: skip
    tables(
        f"bitnet-{size}", shape=shape, train=train, schedule={"warmup_steps": 750, "lr_decay": "linear"},
        bitnet={"weights": "binary", "norm": "layer", "ste": "sign", "act_bits": 8}, objective={"kd_alpha": 0.0},
    )  # fmt: skip
    train = read_recipe(f"bitnet-{size}")["train"]
    assert train["batch_size"] * train["sequence_length"] == 256 * 1024, "256K tokens a step"


@pytest.mark.parametrize("size", FBI)
def test_fbis_are_the_codes(size):
    layers, width, inside, heads, batch, parts, chunk = FBI[size]
    train = {
        "learning_rate": 3e-4, "weight_decay": 0.1, "decay_all": True, "beta1": 0.9, "beta2": 0.95, "max_grad_norm": 1.0,
        "optim": "adamw_torch", "batch_size": batch, "accumulation": parts, "sequence_length": 2048, "seed": 11111,
        "save_every": chunk, "max_steps": {1667: 600_075, 1482: 533_430, 889: 320_040}[chunk],
    }  # fmt: skip
    shape = {
        "hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers, "num_attention_heads": heads,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    }  # fmt: skip
    tables(
        f"fbi-{size}", train=train, shape=shape, schedule={"warmup_steps": 2000, "last_share": 0.1},
        fbi={"pattern": "column"}, objective={"kd_alpha": 1.0},
    )  # fmt: skip
    assert chunk in (1706976 // batch, 1706976 // batch + 1)
    assert 360 * 1706976 // batch == pytest.approx(train["max_steps"], rel=1e-3)


def test_bitllama_is_as_published():
    shape = {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    train = {"optim": "adafactor", "learning_rate": 8e-4, "max_passes": 10.0, "sequence_length": 2048, "batch_size": 1}
    tables("bitllama-wikitext103", shape=shape, train=train, bitnet_transformers={"signs": "fixed"})
    recipe = read_recipe("bitllama-wikitext103")
    assert recipe["vocabulary"] == 46336 and recipe["data"] == ("wikitext-103-v1",)


def test_the_four_that_are_compared_differ_in_what_is_compared():
    dense, *others = (read_recipe(f"scratch-{name}") for name in ("dense", "fbi-ar", "fbi-ad", "bitnet"))
    for table in ("vocabulary", "shape", "trained"):
        assert all(other[table] == dense[table] for other in others)
    rates = [recipe["train"].pop("learning_rate") for recipe in (dense, *others)]
    assert all(rates) and all(other["train"] == dense["train"] for other in others)


def test_a_recipe_of_the_other_verb_is_refused(capsys):
    assert main(["distill", "TEACHER", "-o", "RUN", "--recipe", "fbi-130m", "--data", "x"]) == 1
    assert "has 'shape', which signbit pretrain takes and signbit distill does not" in capsys.readouterr().err
    assert main(["pretrain", "-o", "RUN", "--recipe", "pbllm-opt-125m", "--data", "x"]) == 1
    assert "has 'start', which signbit finetune takes and signbit pretrain does not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "'learning_rate' is no key of a recipe"),
        ("[train]\nlearning_rat = 1", r"'learning_rat' is no option of \[train\] .*did you mean learning_rate\?"),
        ("[shape]\nhidden = 1", r"'hidden' is no option of \[shape\]"),
        ('method = "none"\n[onebit]\nrank = 1', "'onebit' is no key of a recipe"),
        ("[onebit]\nranks = 1", r"'ranks' is no option of \[onebit\]"),
        ("[train", "is no TOML"),
        ('method = "twobit"', "there is no method 'twobit'"),
    ],
)
def test_a_wrong_recipe_is_refused(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_recipe(str(path))


def test_a_file_is_a_recipe_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('method = "absmean"\n[absmean]\ngroup = 64\n')
    assert read_recipe(str(path))["absmean"] == {"group": 64}
    with pytest.raises(OptionError, match=r"there is no recipe 'onebit-llama-7'; .*did you mean onebit-llama-7b"):
        read_recipe("onebit-llama-7")
