"""Every code block of the documentation is run, at tiny size, or says why not and when it last was."""

import ast
import io
import shutil
from itertools import dropwhile

import pytest

from tests.docs import tiny
from tests.docs.blocks import PYTHON, QUOTED, ROOT, SHELL, MarkerError, all_blocks, blocks_of, not_installable

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
    """Whether another part of CI runs a command; `test_what_is_run_elsewhere_is_run_there` holds it to that."""
    return " ".join(words) in tiny.ELSEWHERE


def verb(words):
    """What a command does, without the variables before it: "serve" of signbit serve, the module of python -m."""
    words = list(dropwhile(lambda word: "=" in word, words))
    return words[{"signbit": 1, "make": 1, "pip": 1, "python": 2}.get(words[0], 0)]


def said_by(file):
    """What a part of CI says: the words of its commands, or the strings of a test's code; no comment, no docstring."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if not file.endswith(".py"):
        lines = [line for line in map(str.strip, text.splitlines()) if not line.startswith("#")]
        return " ".join(lines).split()
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
    ]


def is_run(words, said):
    """Whether one part of `said_by` is what a command does, or begins as the command: "the extra serve" does not."""
    return any(part == verb(words) or part.startswith(" ".join(words[:2])) for part in said)


@pytest.mark.parametrize("command", tiny.ELSEWHERE)
def test_what_is_run_elsewhere_is_run_there(command):
    file, words = tiny.ELSEWHERE[command]
    commands = [" ".join(words) for block in RUN if block.language in SHELL for words in block.commands()]
    assert command in commands, f"no page says {command!r} any more; take it out of tiny.ELSEWHERE"
    said = said_by(file)
    found = words in " ".join(said) and is_run(command.split(), said)
    assert found, f"{file} does not run {command!r} any more"


@pytest.mark.parametrize("page", tiny.PAGES_ELSEWHERE)
def test_pages_that_other_tests_run(page):
    test = tiny.PAGES_ELSEWHERE[page]
    said = said_by(test)
    assert page.rpartition("/")[2] in said, f"{test} does not read {page} any more"
    commands = [c for block in BLOCKS if block.page == page and block.language in SHELL for c in block.commands()]
    assert commands, f"{page} has no command any more; take it out of tiny.PAGES_ELSEWHERE"
    for words in commands:
        assert is_run(words, said), f"{test} does not run {' '.join(words)!r} any more"


def test_what_only_a_comment_or_a_docstring_says_is_not_run(tmp_path):
    (tmp_path / "test_x.py").write_text(
        '"""serve"""\n# serve\ndef test():\n    """serve"""\n    main(["server-x", "the extra serve"])\n'
    )
    (tmp_path / "run").write_text("# make demo\n  # make demo\nmake demo-all\nmake docs\n")
    said = said_by(str(tmp_path / "test_x.py"))
    assert said == ["server-x", "the extra serve"] and not is_run(["signbit", "serve", "OUT"], said)
    said = said_by(str(tmp_path / "run"))
    assert is_run(["make", "docs"], said) and not is_run(["make", "demo"], said)
    assert [verb(c.split()) for c in ("A=b signbit serve OUT", "make demo", "python -m x.y Z", "curl -s")] == [
        "serve", "demo", "x.y", "curl",
    ]  # fmt: skip


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


def test_what_pages_install_is_this_checkout():
    """signbit is on no index; what others have on theirs stands in blocks whose marker says that they are not run."""
    for block in BLOCKS:
        for words in block.commands() if block.language in SHELL else []:
            wrong = not_installable(words, others=block.marker is not None)
            assert not wrong, f"{block}: pip finds no {wrong[0]!r}; README.md installs `.`, its extras are '.[EXTRA]'"


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("pip install -e .[serve,lora]", []),
        ("pip install signbit[serve]", ["signbit[serve]"]),
        ("pip install .[sevre]", [".[sevre]"]),
        ("pip install vllm .", ["vllm"]),
        ("pip uninstall torchcodec", []),
    ],
)
def test_what_pip_cannot_install_is_seen(command, wrong):
    assert not_installable(command.split(), others=False) == wrong
    assert not_installable(command.split(), others=True) == [word for word in wrong if word != "vllm"]


def test_a_command_that_fails_is_seen(place, capsys):
    with pytest.raises(AssertionError, match="ended with 1"):
        tiny.run(["signbit", "info", "MODEL"])
    with pytest.raises(SystemExit):
        tiny.run(["signbit", "info", "OUT", "--no-such-flag"])
    assert not is_run_elsewhere(["signbit-of-another", "x"])
