"""Recipes: the settings of a run that matters, as a file that the command line takes for defaults."""

from __future__ import annotations

import sys
from dataclasses import fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from signbit.errors import OptionError
from signbit.methods import METHODS
from signbit.methods.base import check_options, find_method
from signbit.models import Shape
from signbit.train.budget import Schedule
from signbit.train.objectives import Objective
from signbit.train.students import Trained
from signbit.train.trainer import TrainOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The method of a student in full precision.
DENSE = "none"
#: The tables of a recipe beside the method's own, which has its name.
_TABLES: dict[str, type] = {
    "shape": Shape, "objective": Objective, "train": TrainOptions, "schedule": Schedule, "trained": Trained,
}  # fmt: skip
#: What only a student that does not start as its teacher has; `vocabulary` is that of the published run, a run has its
#: tokenizer's.
PRETRAINED = ("shape", "model", "random", "tokenizer", "vocabulary")
_PLAIN = ("about", "teacher", "method", "data", "head", "keep", "result", "start", "masks", *PRETRAINED[1:])


def verb_of(recipe: dict[str, Any]) -> tuple[str | None, str]:
    """The key that tells, if one does, and which verb a recipe is for: pretrain, finetune, or else distill."""
    if found := [key for key in PRETRAINED if key in recipe]:
        return found[0], "pretrain"
    if "start" in recipe and "teacher" not in recipe:
        return "start", "finetune"
    return None, "distill"


def recipe_names(verb: str | None = None) -> dict[str, str]:
    """The recipes that signbit carries, and what each is; those of one verb (distill, finetune, pretrain), or all (None)."""
    folder = files("signbit.train").joinpath("recipes")
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".toml")), key=lambda path: path.name)
    recipes = {path.name.removesuffix(".toml"): _read(path.read_text(encoding="utf-8"), path.name) for path in paths}
    return {name: recipe["about"] for name, recipe in recipes.items() if verb in (None, verb_of(recipe)[1])}


def read_recipe(name: str) -> dict[str, Any]:
    """The recipe called `name`, or in the file `name` (.toml); tables become dicts of options.

    Raises OptionError for one that is not there, is no TOML, or has an unknown key.
    """
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--recipe {name} cannot be read ({error})") from error
        return _read(text, name)
    known = recipe_names()
    if name not in known:
        near = get_close_matches(name, list(known), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise OptionError(f"there is no recipe {name!r}; there are {', '.join(known)}{hint}, or give a .toml file")
    return _read(files("signbit.train").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8"), name)


def _read(text: str, name: str) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"the recipe {name} is no TOML ({error})") from error
    method = recipe.setdefault("method", "onebit")
    tables = dict(_TABLES)
    if method != DENSE:
        tables[method.replace("-", "_")] = options = find_method(METHODS, method).options
    for key, value in recipe.items():
        if key in tables and isinstance(value, dict):
            what = f"[{key}] in the recipe {name}"
            if key in _TABLES:
                allowed = [field.name for field in fields(_TABLES[key])]
                if unknown := [option for option in value if option not in allowed]:
                    near = get_close_matches(unknown[0], allowed, n=1)
                    hint = f" (did you mean {near[0]}?)" if near else ""
                    raise OptionError(f"{unknown[0]!r} is no option of {what}; it has {', '.join(allowed)}{hint}")
            else:
                check_options(options, value, what)
        elif key not in _PLAIN:
            raise OptionError(f"{key!r} is no key of a recipe ({name}); there are {', '.join((*_PLAIN, *tables))}")
    for key in ("data", "keep"):
        if key in recipe:
            recipe[key] = tuple(recipe[key])
    recipe.setdefault("about", "")
    return recipe
