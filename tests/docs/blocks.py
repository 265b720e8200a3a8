"""The code blocks of the documentation, and what their markers say.

A marker is a comment in the line before a block that tests do not run:

    <!-- not run: WHY. Last run: 2026-11-25, commit fb03f89, MACHINE -->
    <!-- not run: WHY. Never run: WHAT IT WAITS FOR -->
"""

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
#: docs/reports is what `signbit report` wrote, with the commands of that day; docs/index.md says so.
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "reports" not in page.relative_to(ROOT).parts),
    *(ROOT / page for page in runpy.run_path(str(ROOT / "docs/hooks.py"))["BESIDE"]),
]

SHELL, PYTHON = {"", "sh", "bash", "console"}, {"python", "py"}
#: Languages of blocks that are no commands: pictures, formulas, what a program said, a file's content.
QUOTED = {"text", "json", "toml", "yaml"}

_MARKER = re.compile(
    r"<!-- not run: (?P<why>.{10,}?)\. "
    r"(Last run: (?P<date>\d{4}-\d\d-\d\d), commit (?P<commit>[0-9a-f]{7,40}), (?P<machine>.{3,})|"
    r"Never run: (?P<waits>.{10,})) -->"
)


class MarkerError(ValueError):
    """A marker that does not say why a block is not run and when it last was."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the file it is in, the line of its fence, its language and text, and the marker before it."""

    page: str
    line: int
    language: str
    text: str
    marker: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, without comments.

        `;` and `&&` divide commands, and `... --resume` is the command before once more.
        """
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&")
            words.whitespace_split, command = True, []
            for word in [*words, ";"]:
                if word in (";", "&&"):
                    if {"...", "--resume"} <= set(command):
                        command = [*found[-1], "--resume"]
                    found += [command] if command else []
                    command = []
                else:
                    command.append(word)
        return found


def marker_of(line: str, where: str) -> str | None:
    """The marker that a line is, None if it is none; raises MarkerError for one that does not say enough."""
    if "not run" not in line or not line.startswith("<!--"):
        return None
    if _MARKER.fullmatch(line) is None:
        raise MarkerError(
            f"{where}: {line!r} says too little; write <!-- not run: WHY. Last run: YYYY-MM-DD, commit HASH, MACHINE --> "
            "or <!-- not run: WHY. Never run: WHAT IT WAITS FOR -->"
        )
    return line


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a page; raises ValueError for one that is indented instead of fenced, or of no known language."""
    lines, found, row = text.split("\n"), [], 0
    while row < len(lines):
        where = f"{page}:{row + 1}"
        fence = re.fullmatch(r"( *)(```+|~~~+)\s*(\w*).*", lines[row])
        if fence is None:
            after_text = row and not lines[row - 1].strip()
            if lines[row].startswith("    ") and after_text and not _in_list(lines, row):
                raise ValueError(f"{where}: an indented block has no language; put it between ```sh and ```")
            row += 1
            continue
        indent, mark, language = fence[1], fence[2], fence[3]
        if language not in SHELL | PYTHON | QUOTED:
            raise ValueError(f"{where}: a block is sh, python or one of {', '.join(sorted(QUOTED))}, not {language}")
        end = next(i for i in range(row + 1, len(lines)) if lines[i].strip() == mark)
        body = "\n".join(line.removeprefix(indent) for line in lines[row + 1 : end])
        marker = marker_of(lines[row - 1].strip(), where) if row else None
        found.append(Block(page, row + 1, language, body, marker))
        row = end + 1
    return found


def _in_list(lines: list[str], row: int) -> bool:
    """Whether a line is the second paragraph of a list's entry, or an option of a mkdocstrings block."""
    above = next((line for line in reversed(lines[:row]) if line.strip() and not line.startswith(" ")), "")
    return re.match(r"([*-]|\d+\.|:::|:) ?", above) is not None


def not_installable(words: list[str], others: bool) -> list[str]:
    """What a `pip install` names beside this checkout and its extras; `others`: packages of others may stand there."""
    if words[:2] != ["pip", "install"]:
        return []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = []
    for word in words[2:]:
        own = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        known = set((own[1] or "").split(",")) <= {"", *extras} if own else others and not word.startswith("signbit")
        found += [] if known or word.startswith("-") else [word]
    return found


def all_blocks() -> list[Block]:
    """Those of all pages, in order."""
    return [
        block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    ]
