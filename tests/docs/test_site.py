"""What the site makes of the code: the command line's page and links as GitHub follows them. `make docs` builds it."""

import importlib.util
import re
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from signbit import cli
from signbit.methods import METHODS
from tests.docs.blocks import PAGES, ROOT

POSITIONAL = {"model", "models", "source", "prompt", "teacher", "run", "kind", "start", "a", "b"}


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hooks"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_option_of_every_verb_and_method_has_its_lines(hooks):
    page = hooks.command_pages()
    for verb, (_, options) in cli.VERBS.items():
        assert f"\n## signbit {verb}" in f"\n{page}"
        for option in set(options.__dataclass_fields__) - POSITIONAL:
            assert f"--{option.replace('_', '-')}" in page or option == "table_models"  # a table's: --model NAME=DIR
    methods = page.partition("## Options of the methods")[2]
    for name, method in METHODS.items():
        own = methods.partition(f"### --method {name}\n")[2].partition("\n### ")[0]
        for option in fields(method.options):
            flag = f"--{'no-' if option.default is True else ''}{option.name.replace('_', '-')}"
            assert f"`{flag}" in own, (name, flag)


def test_a_help_in_which_no_option_is_found_is_an_error(hooks, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: print("usage: signbit quantize"))
    with pytest.raises(ValueError, match="has tyro another form"):
        hooks.help_of(["quantize"])


@pytest.mark.parametrize(
    ("here", "written", "leads_to"),
    [
        ("training.md", "[x](../launch/README.md#slurm)", "[x](launch.md#slurm)"),
        ("guides/coming-from.md", "[x](../../launch/README.md)", "[x](../launch.md)"),
        ("contributing.md", "[x](docs/design.md)", "[x](design.md)"),
        ("guides/import.md", "[x](../training.md#measured)", "[x](../training.md#measured)"),
        ("index.md", "[x](https://arxiv.org/abs/2407.07093)", "[x](https://arxiv.org/abs/2407.07093)"),
        ("index.md", "[x](../src/signbit/linear.py)", "[x](../src/signbit/linear.py)"),  # of which mkdocs warns
    ],
)
def test_links_between_files_of_the_repository(hooks, here, written, leads_to):
    assert hooks.on_page_markdown(written, SimpleNamespace(file=SimpleNamespace(src_uri=here))) == leads_to


def test_the_blocks_of_every_page_are_looked_at_but_those_of_the_reports(hooks):
    sources = {page: ROOT / source for source, page in hooks.BESIDE.items()}
    pages = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pages) > 20 and set(sources) <= set(pages)
    unseen = {page for page in pages if sources.get(page, ROOT / "docs" / page) not in PAGES}
    said = (ROOT / "docs/index.md").read_text(encoding="utf-8").partition("Every block of commands")[2]
    assert unseen == {"reports/smollm2/report.md"} == set(re.findall(r"\]\((\S+)\)", said))
