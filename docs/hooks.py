"""What mkdocs does not do by itself: the command line's pages from its own help, and links as GitHub follows them."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Files beside docs/ that are pages of the site too, and their addresses there.
BESIDE = {"launch/README.md": "launch.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_COMMANDS = "<!-- commands -->"


@dataclass
class Section:
    """A box of a command's help: its title, what stands above the flags, and (flag, text) of each."""

    title: str
    about: str = ""
    flags: list[tuple[str, str]] = field(default_factory=list)


def help_of(argv: list[str]) -> list[Section]:
    """What `signbit ARGV --help` says, box by box."""
    from signbit import cli

    os.environ["COLUMNS"] = "100"  # one box beside another starts at 160
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # tyro draws its boxes by the stream's encoding
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*argv, "--help"])
    said.seek(0)
    sections = list(read_help(said.read()))
    if not any(section.flags for section in sections):
        raise ValueError(f"no option was found in what signbit {' '.join(argv)} --help says; has tyro another form?")
    return sections


def read_help(text: str) -> Iterator[Section]:
    """The boxes of a help text that tyro has drawn."""
    section = Section("")
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        if line.startswith("╭"):
            section = Section(line.strip("╭╮─ "))
        elif line.startswith("╰"):
            yield section
        elif line.startswith("│"):
            content = line.strip("│").rstrip()[1:]
            if not content.strip("─ "):
                section.about += "\n"
            elif content.startswith("-") or (section.title == "positional arguments" and content[0] != " "):
                flag, *said = re.split(r"\s{2,}", content, maxsplit=1)
                section.flags.append((flag, "".join(said)))
            elif section.flags:
                flag, said = section.flags[-1]
                section.flags[-1] = (flag, f"{said} {content.strip()}".strip())
            else:
                section.about += f"{content}\n"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def _definitions(section: Section) -> Iterator[str]:
    for flag, said in section.flags:
        if flag.startswith("-h,"):
            continue
        yield f"`{flag.replace('{None}|', '')}`\n:   {_escaped(said.replace('(default: None)', '').strip())}\n"


def command_pages() -> str:
    """Every verb with its options, and the options of each method, as Markdown."""
    from signbit.cli import VERBS
    from signbit.methods import METHODS

    known: dict[str, str] = {}
    parts: list[str] = []

    def show(argv: list[str], about: str) -> None:
        verb = " ".join(argv)
        parts.append(f"## signbit {verb}\n\n{_escaped(about)}\n")
        for section in help_of(argv):
            if section.title.removesuffix(" options") in {name.replace("-", "_") for name in METHODS} | set(METHODS):
                parts.append("The options of its method: [below](#options-of-the-methods).\n")
                continue
            said = "\n".join(_definitions(section))
            if section.title not in ("options", "positional arguments"):
                parts.append(f"### {section.title.capitalize()} of {verb}\n")
                if known.setdefault(said, verb) != verb:
                    anchor = f"{section.title}-of-{known[said]}".replace(" ", "-")
                    parts.append(f"[As those of {known[said]}](#{anchor}).\n")
                    continue
                parts.append(_escaped(section.about.strip()) + "\n")
            parts.append(said)

    for verb, (_, options) in VERBS.items():
        if verb == "data":
            for kind in ("self-generate", "teacher-logits"):
                show([verb, kind], "Makes what a student learns from.")
        else:
            show([verb], options.__doc__ or "")
    parts.append("## Options of the methods\n")
    for name in METHODS:
        parts.append(f"### --method {name}\n")
        for section in help_of(["quantize", "--method", name]):
            if section.title.removesuffix(" options").replace("_", "-") == name:
                parts += [_escaped(section.about.strip()) + "\n", *_definitions(section)]
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie beside docs/."""
    from mkdocs.structure.files import File

    for source, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to other files of the repository lead to their pages; the command line's reference is filled in."""
    here = page.file.src_uri
    source = next((path for path, uri in BESIDE.items() if uri == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target or target.startswith("/"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = BESIDE.get(path) or path.removeprefix("docs/")
        if uri == path:  # mkdocs says that the site has no such page
            return match[0]
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(here) or '.')}{match[3] or ''}{match[4]}"

    markdown = _LINK.sub(link, markdown)
    return markdown.replace(_COMMANDS, command_pages()) if _COMMANDS in markdown else markdown
