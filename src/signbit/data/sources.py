"""Where evaluation text comes from: hub data sets through `datasets`, or local files without it."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

from signbit.errors import DataError


@dataclass(frozen=True)
class Protocol:
    """One way of measuring perplexity that has a name: which documents, how joined, which windows.

    Published figures differ by these choices alone (C4 of LLaMA-7B: 7.34 over the first 1100 documents, 7.08 over
    random windows of long ones), so a figure without its protocol says little.
    """

    name: str
    help: str
    documents: int
    """Documents (rows) that the protocol asks for."""
    joiner: str
    """What stands between documents; unused with `random_windows`."""
    local: tuple[str, ...]
    """Names under which --data-dir is searched for the file."""
    hub: tuple[str, str | None, str, str] | None = None
    """Data set, configuration (or data file), split, column."""
    hub_revision: str | None = None
    """Branch of the data set; the converted one where the main one is a script, which `datasets` ≥ 4 does not run."""
    max_tokens: int | None = None
    """The joined text is cut to this many tokens."""
    random_windows: int | None = None
    """Instead of joining: this many windows at random offsets of random documents longer than one (seed 0)."""
    window: int = 2048


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
        ),
        Protocol(
            "ptb",
            "Penn Treebank test, rows joined by spaces (PB-LLM's PTQ and FBI-LLM)",
            3761,
            " ",
            ("ptb/ptb.test.txt", "ptb.test.txt"),
            ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
            hub_revision="refs/convert/parquet",
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


def _rows(path: Path, protocol: Protocol) -> Iterator[str]:
    if path.suffix == ".jsonl" or path.name.endswith((".json.gz", ".jsonl.gz")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: not a JSON object with a text ({error})") from error
        return
    text = path.read_text(encoding="utf-8")
    if protocol.name == "wikitext2":
        # The hub's rows are the file's lines, line end included, with blank ones empty.
        # Lines end at \n alone: str.splitlines would also cut at the Unicode line separators that the text contains.
        yield from (line if line.strip() else "" for line in re.findall("[^\n]*\n|[^\n]+$", text))
    elif protocol.name == "ptb":
        yield from (line.strip() for line in text.split("\n") if line.strip())
    else:
        yield text


def _local_rows(directory: Path, protocol: Protocol) -> tuple[Iterator[str], str]:
    if not directory.is_dir():
        raise DataError(f"--data-dir {directory} is no directory")
    for name in protocol.local:
        if (directory / name).is_file():
            return _rows(directory / name, protocol), str(directory / name)
    raise DataError(
        f"{directory} has no file for {protocol.name}; it is looked for as {', '.join(protocol.local)}. "
        "Without --data-dir it comes from the hub"
    )


def _hub_rows(protocol: Protocol) -> tuple[Iterator[str], str]:
    assert protocol.hub is not None
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{protocol.name} from the hub needs the package datasets (pip install 'signbit[eval]'); "
            "or give a directory of local files with --data-dir"
        ) from None
    name, configuration, split, column = protocol.hub
    try:
        if configuration is not None and "." in configuration:
            data = load_dataset(name, data_files={split: configuration}, split=split)
        else:
            data = load_dataset(name, configuration, split=split, revision=protocol.hub_revision)
    except Exception as error:  # datasets raises many kinds, all of which mean that the set is not to be had
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} could not be loaded from the hub ({first}); give a directory of local files with --data-dir"
        ) from error
    return (row[column] for row in data), f"{name} ({configuration}, {split})"


def read_protocol(protocol: Protocol, data_dir: str | Path | None = None) -> Text:
    """The documents of a protocol: from `data_dir` if given, from the package, else from the hub.

    A local set smaller than the protocol asks is returned as it is; the result of an evaluation names the difference.
    Raises DataError if the text is not to be had.
    """
    if data_dir is not None and protocol.hub is not None:
        rows, source = _local_rows(Path(data_dir), protocol)
    elif protocol.hub is None:
        text = files("signbit.data").joinpath("texts", protocol.local[0]).read_text(encoding="utf-8")
        rows, source = iter([text]), "shipped with signbit"
    else:
        rows, source = _hub_rows(protocol)
    documents = tuple(islice(rows, protocol.documents))
    if not any(document.strip() for document in documents):
        raise DataError(f"{source} holds no text")
    return Text(documents, source)


def read_text_file(path: str | Path) -> Text:
    """A text file (one document), or a .jsonl file of objects with a "text" (one document each).

    Raises DataError if it is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(PROTOCOLS)
        raise DataError(f"{path} is no file, and no named set either; the named ones are {near}")
    try:
        documents = tuple(_rows(path, PROTOCOLS["casterbridge"]))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} holds no text")
    return Text(documents, str(path))
