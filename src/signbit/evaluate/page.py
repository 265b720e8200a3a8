"""A page of tables, text and pictures, as Markdown and as HTML that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

#: What Markdown would read as its own.
_MARKDOWN = str.maketrans({"|": "\\|", "<": "&lt;", "\n": " "})


@dataclass(frozen=True)
class Table:
    """Rows of text under their columns; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows in words."""

    path: Path
    says: str


@dataclass(frozen=True)
class Quote:
    """Text that a model wrote behind a prompt."""

    name: str
    prompt: str
    text: str

    @property
    def written(self) -> str:
        """The text without blanks around it."""
        return self.text.strip() or "(nothing)"

    @property
    def gap(self) -> str:
        """The blank between prompt and text, if there is one."""
        return "" if self.text.strip() and not self.text[0].isspace() else " "


@dataclass(frozen=True)
class Code:
    """Commands, as they were typed."""

    text: str


@dataclass(frozen=True)
class Fold:
    """A long table that is shown when it is asked for."""

    title: str
    table: Table


#: A paragraph is a string.
Part = str | Table | Picture | Quote | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A title, a line of what it is, and sections."""

    title: str
    about: str
    sections: Sequence[Section]


def _table_lines(table: Table) -> list[str]:
    cells = [[cell.translate(_MARKDOWN) for cell in row] for row in (table.columns, *table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|")
    return [*lines, "", *([table.note, ""] if table.note else [])]


def markdown(page: Page, level: int = 1, pictures: bool = True) -> str:
    """The page as Markdown, its title a heading of `level`; pictures are links to files beside it, or left out."""
    lines = [f"{'#' * level} {page.title}", "", page.about, ""]
    for section in page.sections:
        lines += [f"{'#' * (level + 1)} {section.title}", ""]
        for part in section.parts:
            match part:
                case Table():
                    lines += _table_lines(part)
                case Picture():
                    lines += [f"![{part.says}]({part.path.name})", ""] if pictures else []
                case Quote():
                    text = " ".join(f"{part.prompt}{part.gap}**{part.written}**".split())
                    lines += [f"* {part.name}: {text.translate(_MARKDOWN)}", ""]
                case Code():
                    lines += ["```", part.text, "```", ""]
                case Fold():
                    lines += [
                        f"<details><summary>{part.title}</summary>",
                        "",
                        *_table_lines(part.table),
                        "</details>",
                        "",
                    ]
                case str():
                    lines += [part.translate(_MARKDOWN), ""]
    return "\n".join(lines).rstrip() + "\n"


_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { --ink: #1d2430; --soft: #5b6675; --line: #dfe3e9; --ground: #fff; --shade: #f5f7fa; --mark: #0b62a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #a3adba; --line: #39414d; --ground: #14181e; --shade: #1e242c; --mark: #7cc0ff; }
  img { background: #fff; border-radius: 4px; }
}
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  max-width: 76rem; padding: 1.2rem clamp(.9rem, 4vw, 2.5rem) 4rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.2; margin: .6em 0 .3em; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .5em; border-bottom: 1px solid var(--line); padding-bottom: .25em; }
p { max-width: 52rem; }
p.about, p.note { color: var(--soft); }
p.note { font-size: .9rem; margin-top: .4rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; background: var(--shade); white-space: normal; vertical-align: bottom; }
td.words { white-space: normal; min-width: 15rem; text-align: left; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); font-weight: 600; }
@media (max-width: 40rem) { th { min-width: 7rem; } th:first-child, td:first-child { max-width: 42vw; white-space: normal; } }
th:first-child { background: var(--shade); }
img { width: 46rem; max-width: 100%; height: auto; display: block; }
pre { background: var(--shade); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; font-size: .85rem; }
blockquote { margin: .8rem 0; padding: .1rem 1rem; border-left: 3px solid var(--line); }
blockquote cite { display: block; color: var(--soft); font-style: normal; font-size: .9rem; }
blockquote b { color: var(--mark); font-weight: 500; white-space: pre-line; }
summary { cursor: pointer; color: var(--mark); }
</style>
</head>
<body>
{% macro table(part) %}<div class="wide" tabindex="0"><table>
<thead><tr>{% for cell in part.columns %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.rows %}<tr>{% for cell in row %}<td{% if not loop.first and cell|length > 48 %} class="words"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if part.note %}<p class="note">{{ part.note }}</p>
{% endif %}{% endmacro -%}
<h1>{{ page.title }}</h1>
<p class="about">{{ page.about }}</p>
{% for section in page.sections %}
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part is string %}<p>{{ part }}</p>
{% elif kind(part) == "Table" %}{{ table(part) }}
{% elif kind(part) == "Fold" %}<details><summary>{{ part.title }}</summary>{{ table(part.table) }}</details>
{% elif kind(part) == "Picture" %}<p><img alt="{{ part.says }}" src="data:image/png;base64,{{ inline(part.path) }}"></p>
{% elif kind(part) == "Quote" %}<blockquote><cite>{{ part.name }}</cite><p>{{ part.prompt }}{{ part.gap }}<b>{{ part.written }}</b></p></blockquote>
{% elif kind(part) == "Code" %}<pre>{{ part.text }}</pre>
{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
"""  # noqa: E501


def html(page: Page) -> str:
    """The page as one HTML file: styles and pictures stand in it, tables scroll on a narrow screen."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(_HTML)
    return template.render(
        page=page,
        kind=lambda part: type(part).__name__,
        inline=lambda path: base64.b64encode(path.read_bytes()).decode("ascii"),
    )
