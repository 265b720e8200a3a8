"""Where text comes from: hub data sets through `datasets`, or local files without it."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Literal

from signbit.errors import DataError


@dataclass(frozen=True)
class TextSet:
    """A text that has a name: which documents, where they lie, and what joins them."""

    name: str
    help: str
    documents: int
    """Documents (rows) that are asked for."""
    joiner: str | None
    """What stands between documents; None where windows are cut from single ones."""
    local: tuple[str, ...]
    """Names under which --data-dir is searched for the file."""
    hub: tuple[str, str | None, str, str] | None = None
    """Data set, configuration (or data file), split, column."""
    hub_revision: str | None = None
    """Branch of the data set; the converted one where the main one is a script, which `datasets` ≥ 4 does not run."""
    rows: Literal["whole", "lines", "stripped"] = "whole"
    """How a plain text file is divided: not at all, into lines with their ends, or into lines without."""


@dataclass(frozen=True)
class Protocol(TextSet):
    """One way of measuring perplexity that has a name: a text and its windows.

    Published figures differ by these choices alone (C4 of LLaMA-7B: 7.34 over the first 1100 documents, 7.08 over
    random windows of long ones), so a figure without its protocol says little.
    """

    max_tokens: int | None = None
    """The joined text is cut to this many tokens."""
    random_windows: int | None = None
    """Instead of joining: this many windows at random offsets of random documents longer than one (seed 0)."""
    window: int = 2048


#: The branch of PTB that is no script.
_PARQUET = "refs/convert/parquet"
#: Training text that layers are calibrated on, as PB-LLM's and GPTQ's loaders take it.
SETS: dict[str, TextSet] = {
    s.name: s
    for s in (
        TextSet(
            "c4",
            "C4 train shard 0, windows of documents longer than one",
            356317,
            None,
            ("c4/c4-train.part.jsonl", "c4/c4-train.jsonl", "c4-train.00000-of-01024.json.gz"),
            ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "train", "text"),
        ),
        TextSet(
            "wikitext2",
            "WikiText-2 train, rows joined by spaces (raw; of local files also the tokenized form, whose rare words are <unk>)",
            36718,
            " ",
            ("wikitext2/wiki.train.raw", "wiki.train.raw", "wikitext2/wiki.train.tokens", "wiki.train.tokens"),
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
            rows="lines",
        ),
        TextSet(
            "ptb",
            "Penn Treebank train, rows joined by spaces",
            42068,
            " ",
            ("ptb/ptb.train.txt", "ptb.train.txt"),
            ("ptb-text-only/ptb_text_only", "penn_treebank", "train", "sentence"),
            hub_revision=_PARQUET,
            rows="stripped",
        ),
    )
}
PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            "wikitext2",
            "WikiText-2 raw test, rows joined by blank lines; the one that most papers report",
            4358,
            "\n\n",
            ("wikitext2/wiki.test.raw", "wiki.test.raw"),
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
            rows="lines",
        ),
        Protocol(
            "ptb",
            "Penn Treebank test, rows joined by spaces (PB-LLM's PTQ and FBI-LLM)",
            3761,
            " ",
            ("ptb/ptb.test.txt", "ptb.test.txt"),
            ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
            hub_revision=_PARQUET,
            rows="stripped",
        ),
        Protocol(
            "c4-first1100",
            "first 1100 documents of C4 validation shard 0 joined by spaces, 256 windows (PB-LLM's PTQ and FBI-LLM)",
            1100,
            " ",
            ("c4/c4-validation.part.jsonl", "c4/c4-validation.jsonl", "c4-validation.00000-of-00008.json.gz"),
            ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "validation", "text"),
            max_tokens=256 * 2048,
        ),
        Protocol(
            "c4-random256",
            "256 random windows of documents of C4 validation shard 0 that are longer than one, seed 0 (OneBit)",
            45576,
            "",
            ("c4/c4-validation.part.jsonl", "c4/c4-validation.jsonl", "c4-validation.00000-of-00008.json.gz"),
            ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "validation", "text"),
            random_windows=256,
        ),
        Protocol(
            "casterbridge",
            "24 kB of The Mayor of Casterbridge (Thomas Hardy, 1886), which signbit carries; windows of 512",
            1,
            "",
            ("casterbridge.txt",),
            window=512,
        ),
    )
}


@dataclass(frozen=True)
class Text:
    """Documents as read, and where from."""

    documents: tuple[str, ...]
    source: str


def _rows(path: Path, rows: str = "whole") -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix == ".jsonl" or path.name.endswith((".json.gz", ".jsonl.gz")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = json.loads(line)["text"]
                    if not isinstance(text, str):
                        raise TypeError(f"text is {text!r}")
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: not a JSON object with a text ({error})") from error
                yield text
        return
    text = path.read_text(encoding="utf-8")
    if rows == "lines":
        # The hub's rows are the file's lines, line end included, with blank ones empty.
        # Lines end at \n alone: str.splitlines would also cut at the Unicode line separators that the text contains.
        yield from (line if line.strip() else "" for line in re.findall("[^\n]*\n|[^\n]+$", text))
    elif rows == "stripped":
        yield from (line.strip() for line in text.split("\n") if line.strip())
    else:
        yield text


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"reading {path} needs the package pyarrow (pip install pyarrow); or give a .jsonl") from None
    try:
        with ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f"{path} has no column text; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=["text"]):
                yield from (str(row or "") for row in batch.column(0).to_pylist())
    except ArrowException as error:
        raise DataError(f"{path} is no parquet file that can be read ({str(error).splitlines()[0]})") from error


def _local_rows(directory: Path, wanted: TextSet) -> tuple[Iterator[str], str]:
    if not directory.is_dir():
        raise DataError(f"--data-dir {directory} is no directory")
    for name in wanted.local:
        if (directory / name).is_file():
            return _rows(directory / name, wanted.rows), str(directory / name)
    raise DataError(
        f"{directory} has no file for {wanted.name}; it is looked for as {', '.join(wanted.local)}. "
        "Without --data-dir it comes from the hub"
    )


def _hub_rows(wanted: TextSet) -> tuple[Iterator[str], str]:
    assert wanted.hub is not None
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{wanted.name} from the hub needs the package datasets (pip install 'signbit[eval]'); "
            "or give a directory of local files with --data-dir"
        ) from None
    name, configuration, split, column = wanted.hub
    try:
        if configuration is not None and "." in configuration:
            data = load_dataset(name, data_files={split: configuration}, split=split)
        else:
            data = load_dataset(name, configuration, split=split, revision=wanted.hub_revision)
    except Exception as error:  # datasets raises many kinds, all of which mean that the set is not to be had
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} could not be loaded from the hub ({first}); give a directory of local files with --data-dir"
        ) from error
    return (row[column] for row in data), f"{name} ({configuration}, {split})"


def read_set(wanted: TextSet, data_dir: str | Path | None = None) -> Text:
    """The documents of a named text: from `data_dir` if given, from the package, else from the hub.

    A local set smaller than the name asks is returned as it is; the result of an evaluation names the difference.
    Raises DataError if the text is not to be had.
    """
    if data_dir is not None and wanted.hub is not None:
        rows, source = _local_rows(Path(data_dir), wanted)
    elif wanted.hub is None:
        text = files("signbit.data").joinpath("texts", wanted.local[0]).read_text(encoding="utf-8")
        rows, source = iter([text]), "shipped with signbit"
    else:
        rows, source = _hub_rows(wanted)
    try:
        documents = tuple(islice(rows, wanted.documents))
    except (OSError, EOFError) as error:
        raise DataError(f"{source} cannot be read ({error})") from error
    if not any(document.strip() for document in documents):
        raise DataError(f"{source} holds no text")
    return Text(documents, source)


def read_text_file(path: str | Path) -> Text:
    """A text file (one document), or a .jsonl or .parquet file of rows with a "text" (one document each).

    Raises DataError if it is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(PROTOCOLS)
        raise DataError(f"{path} is no file, and no named set either; the named ones are {near}")
    try:
        documents = tuple(_rows(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} holds no text")
    return Text(documents, str(path))
