"""What the guides name is there: commands, flags, recipes and files; and their commands run one after the other."""

import functools
import re
from dataclasses import dataclass

import pytest

from signbit.cli import VERBS
from signbit.methods import METHODS
from signbit.train.recipe import read_recipe
from tests.docs.blocks import ROOT, blocks_of
from tests.docs.published import PUBLISHED
from tests.docs.test_site import hooks  # noqa: F401 (a fixture)

PAGE = "docs/guides/coming-from.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
_FLAG = re.compile(r"--[a-z][a-z0-9-]*(?![a-z0-9_-])|(?<![\w-])-o\b")


@dataclass(frozen=True)
class Named:
    """A flag that a page names, and the commands of which it is one: `verbs`, or any where there are none."""

    line: str
    flag: str
    verbs: tuple[str, ...]


def flags_named(text):
    """Those of a page: in commands, in the second column of tables, and between backticks elsewhere."""
    found = []
    for block in blocks_of(text, PAGE):
        for words in block.commands():
            if words[0] == "signbit":
                verb = verb_of(words[1:])
                found += [Named(" ".join(words), flag, (verb,)) for word in words for flag in _FLAG.findall(word)]
    verb = None
    for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))] if line.startswith("|") else []
        if not cells:
            verb = None
            found += [Named(line, flag, ()) for span in spans(line) for flag in _FLAG.findall(span)]
        elif verb is None:
            verb = verb_of(cells[1].split()[1:])
        elif not line.startswith("|---"):
            for clause in cells[1].split(";"):
                verbs = tuple(named for span in spans(clause) if (named := verb_of(without_signbit(span)))) or (verb,)
                found += [Named(line, flag, verbs) for span in spans(clause) for flag in _FLAG.findall(span)]
    return found


def spans(text):
    """What stands between backticks; flags of the other projects, which have underscores, are none of ours."""
    return [span for span in re.findall(r"`([^`]*)`", text) if not re.search(r"--\w*_", span)]


def without_signbit(span):
    words = span.split()
    return words[1:] if words[:1] == ["signbit"] else words


def verb_of(words):
    """The command that words begin with; None if it is none."""
    if not words or words[0] not in VERBS:
        return None
    return " ".join(words[:2]) if words[0] == "data" else words[0]


@pytest.fixture(scope="module")
def flags_of(hooks):  # noqa: F811
    """A function that gives the flags of a command, with those of each method that it takes."""

    @functools.cache
    def flags(verb):
        words, made = verb.split(), set()
        methods = METHODS if verb in ("quantize", "distill", "finetune", "pretrain") else [None]
        for method in methods:
            for section in hooks.help_of(words if method is None else [*words, "--method", method]):
                made |= {flag for named, _ in section.flags for flag in _FLAG.findall(named)}
        return made

    return flags


def unknown(text, flags_of):
    verbs = [verb for verb in VERBS if verb != "data"] + ["data self-generate"]
    return [
        named for named in flags_named(text) if not any(named.flag in flags_of(verb) for verb in (named.verbs or verbs))
    ]


def test_every_flag_is_one_of_its_command(flags_of):
    assert len(flags_named(TEXT)) > 150
    assert not unknown(TEXT, flags_of)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("`--salient-bits`", "`--high-bits`"),  # in a table
        ("--skip-chunks 7 12 20", "--leave-chunks 7 12 20"),  # in a command
        ("`--accumulation` the parts", "`--accumulate` the parts"),  # in the text
        ("`signbit chat --system`", "`signbit generate --system`"),  # a flag of another command
        ("| `gptq_pb/run.py` | signbit quantize |", "| `gptq_pb/run.py` | signbit eval |"),
    ],
)
def test_a_flag_that_is_called_otherwise_is_seen(right, wrong, flags_of):
    assert right in TEXT
    assert unknown(TEXT.replace(right, wrong), flags_of)


def unsaid(text):
    """What the four projects have and their sections do not name, as a word of its own."""
    sections = {title: body for title, _, body in (part.partition("\n") for part in text.split("\n## "))}
    return [
        word
        for project, words in PUBLISHED.items()
        for word in words.split()
        if not whole(word).search(sections[project])
    ]


def whole(word):
    return re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")


def test_everything_of_the_four_projects_is_on_the_page():
    assert not unsaid(TEXT)


@pytest.mark.parametrize("word", ["--split", "LiqunMa/FBI-LLM_1.3B", "red_pajama", "notebooks", "Drive", "FILE.yaml"])
def test_what_the_page_leaves_out_is_seen(word):
    assert unsaid(whole(word).sub("", TEXT)) == [word]


def test_commands_recipes_methods_and_files_are_there():
    commands = set(re.findall(r"\bsignbit ([a-z]+)\b", TEXT))
    assert {"quantize", "pretrain", "distill", "finetune", "import"} <= commands <= {*VERBS, "generate"}
    recipes = set(re.findall(r"--recipe ([\w.-]*\w)", TEXT))
    assert len(recipes) > 8
    for recipe in recipes:
        assert read_recipe(recipe)
    assert set(re.findall(r"--method ([\w-]*\w)", TEXT)) <= set(METHODS)
    for file in re.findall(r"`(launch/[\w./]+)`", TEXT):
        assert (ROOT / file).exists(), file


def test_no_command_of_the_import_guide_is_in_the_way_of_another():
    page, written = "docs/guides/import.md", set()
    for block in blocks_of((ROOT / page).read_text(encoding="utf-8"), page):
        for words in block.commands():
            if words[:2] == ["signbit", "import"]:
                out = words[words.index("-o") + 1]
                assert ("--overwrite" in words) == (out in written), (
                    f"{' '.join(words)}: --overwrite where it is needed"
                )
                written.add(out)
    assert len(written) > 8
