"""The recipes that signbit carries: each is read, and runs for two steps on a tiny random model of its family."""

import json

import pytest
import torch

from signbit.cli import main
from signbit.errors import OptionError
from signbit.train.recipe import read_recipe, recipe_names
from tests import families

NAMES = recipe_names()


def test_the_published_ones_are_there(capsys):
    assert {
        f"onebit-{name}" for name in ("llama-7b", "llama-13b", "llama-2-7b", "llama-2-13b", "opt-1.3b", "opt-2.7b")
    } < set(NAMES)
    assert main(["distill", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and about in printed for name, about in NAMES.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tokenizer, tmp_path, capsys):
    model = families.DENSE["opt" if "opt" in name else "llama"][0]()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 61}" for i in range(4000)))
    words = f"distill {tmp_path}/model -o {tmp_path}/run --recipe {name} --data {tmp_path}/text.txt"
    words = [
        *words.split(),
        "--sequence-length",
        "16",
        "--batch-size",
        "4",
        "--accumulation",
        "2",
        "--validation-blocks",
        "1",
        "--max-steps",
        "2",
    ]
    recipe = read_recipe(name)
    if recipe["train"].get("compile"):
        words += ["--no-compile"]
    assert main(words) == 0, capsys.readouterr().err
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    # What no flag said is the recipe's.
    assert made["options"]["learning_rate"] == recipe["train"]["learning_rate"]
    assert made["options"]["optim"] == recipe["train"]["optim"]
    assert made["objective"]["kd_beta"] == recipe["objective"]["kd_beta"]
    assert made["config"]["options"]["norm"] == recipe["onebit"]["norm"]
    assert torch.isfinite(
        torch.tensor(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "'learning_rate' is no key of a recipe"),
        ("[train]\nlearning_rat = 1", r"'learning_rat' is no option of \[train\] .*did you mean learning_rate\?"),
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
