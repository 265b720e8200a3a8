"""Every code block of the documentation is run, at tiny size, or says why not and when it last was."""

import io
import shutil

import pytest

from tests.docs import tiny
from tests.docs.blocks import PYTHON, QUOTED, ROOT, SHELL, MarkerError, all_blocks, blocks_of

BLOCKS = all_blocks()
RUN = [
    block
    for block in BLOCKS
    if block.language not in QUOTED and block.marker is None and block.page not in tiny.PAGES_ELSEWHERE
]
#: Pages whose commands take longer: many trainings, and steps of tensors without content.
SLOW = {"docs/guides/coming-from.md", "docs/memory.md", "docs/training.md", "docs/binarizers.md"}


def of(languages):
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.page in SLOW else [])
        for block in RUN
        if block.language in languages
    ]


@pytest.fixture(scope="session")
def made(tmp_path_factory, tokenizer):
    return tiny.make(tmp_path_factory.mktemp("docs") / "made", tokenizer)


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of what the documentation talks about, as the current directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))


def is_run_elsewhere(words):
    """Whether another part of CI runs a command, by what that part says."""
    command = " ".join(words)
    if command not in tiny.ELSEWHERE:
        return False
    file, said = tiny.ELSEWHERE[command]
    assert said in (ROOT / file).read_text(), f"{file} does not run {command!r} any more"
    return True


def test_pages_that_other_tests_run():
    for page, test in tiny.PAGES_ELSEWHERE.items():
        name = page.rpartition("/")[2]
        assert name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not read {page} any more"


@pytest.mark.parametrize("block", of(SHELL))
def test_commands_run(block, place, capsys):
    if block.page in tiny.SETUP:
        tiny.run(tiny.SETUP[block.page])
    for words in block.commands():
        if is_run_elsewhere(words):
            continue
        assert words[0] == "signbit", (
            f"{block}: {' '.join(words)!r} is not signbit's; a marker says why it is not run, or tiny.ELSEWHERE who does"
        )
        tiny.run(words)


@pytest.mark.parametrize("block", of(PYTHON))
def test_python_runs(block, place, capsys):
    text = block.text
    for word, instead in tiny.PYTHON_WORDS.items():
        text = text.replace(word, instead)
    exec(compile(tiny.PRELUDE.get(block.page, "") + text, str(block), "exec"), {})


def test_what_a_block_is_and_what_a_marker_must_say():
    marker = "<!-- not run: a GPU is needed. Last run: 2026-11-25, commit fb03f89, one H100 -->"
    (block,) = blocks_of(f"{marker}\n```sh\nsignbit a \\\n  b # c\n```\n", "page.md")
    assert block.commands() == [["signbit", "a", "b"]] and block.marker == marker and str(block) == "page.md:2"
    for weak in (
        "<!-- not run -->",
        "<!-- not run: too long. -->",
        "<!-- not run: a GPU is needed. Last run: yesterday -->",
        "<!-- not run: a GPU is needed. Last run: 2026-11-25, commit ?, one H100 -->",
    ):
        with pytest.raises(MarkerError, match="says too little"):
            blocks_of(f"{weak}\n```sh\nsignbit a\n```\n", "page.md")
    with pytest.raises(ValueError, match="an indented block has no language"):
        blocks_of("Text.\n\n    signbit a\n", "page.md")
    with pytest.raises(ValueError, match="not cobol"):
        blocks_of("```cobol\n```\n", "page.md")


def test_a_command_that_fails_is_seen(place, capsys):
    with pytest.raises(AssertionError, match="ended with 1"):
        tiny.run(["signbit", "info", "MODEL"])
    with pytest.raises(SystemExit):
        tiny.run(["signbit", "info", "OUT", "--no-such-flag"])
    assert not is_run_elsewhere(["signbit-of-another", "x"])
