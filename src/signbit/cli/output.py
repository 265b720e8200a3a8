"""What commands print and write beside their results: tables, reports, progress, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signbit.errors import OptionError

if TYPE_CHECKING:
    from signbit.models import Report


def quiet() -> None:
    """transformers' own progress bars go, and accelerate's word on what is offloaded; other warnings stay."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def note(line: str) -> None:
    """Says beside the results what a user should know."""
    print(f"note: {line}", file=sys.stderr)


class Bars:
    """One progress bar a stage of long work, with the time that is left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int | None, name: str) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            self._bar = tqdm(desc=stage, total=total, file=sys.stderr, disable=None, leave=False)
            self._stage = stage
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(done - self._bar.n)

    def tokenizing(self, source: str, done: int, total: int | None) -> None:
        """The bar of a source that is tokenized."""
        self(f"tokenizing {Path(source).name}", done, total, "")

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people; numbers to the right. A pipe gets lines as wide as they need."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def byte_text(count: float) -> str:
    """A number of bytes for people: 12.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_report(report: Report) -> None:
    """What became of each kind of layer, and the share that is binarized."""
    rows = [
        (
            line.name, str(line.layers), line.action, line.why, line.error, line.bits,
            byte_text(line.nbytes) if line.nbytes else "",
        )
        for line in report.summary()
    ]  # fmt: skip
    table(None, ("layers", "count", "what", "why", "error", "true bits", "packed"), rows)
    print(f"{report.share:.1%} of the repeated blocks' parameters are binarized", end="")
    print(f", at {report.bits_per_weight:.3f} true bits per weight" if report.binarized else "")


def check_file(flag: str, path: str | None) -> None:
    """Raises OptionError, before any work is done, if no file can be written to the `path` of a flag, if it has one."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise OptionError(f"{flag} {path} cannot be written: there is no directory {folder}")
    if Path(path).is_dir():
        raise OptionError(f"{flag} {path} cannot be written: it is a directory; name a file")


def write_json(path: str | None, value: Any) -> None:
    """Writes `value` to the file of --json, if there is one; raises OptionError where it cannot."""
    if path is not None:
        try:
            Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"--json {path} cannot be written ({error.strerror})") from error
