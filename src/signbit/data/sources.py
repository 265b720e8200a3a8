"""Where text comes from: hub data sets through `datasets`, or local files without it."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from signbit.errors import DataError
from signbit.extras import install


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
        TextSet(
            "wikitext-103-v1",
            "WikiText-103 train, tokenized form whose rare words are <unk>; each line a document",
            1801350,
            None,
            ("wikitext-103-v1/wiki.train.tokens", "wikitext-103/wiki.train.tokens"),
            ("Salesforce/wikitext", "wikitext-103-v1", "train", "text"),
            rows="lines",
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


#: A whole commit of a hub data set, which is one text for ever.
_COMMIT = re.compile("[0-9a-f]{40}")
#: How the names of files end that hold a JSON object with a text in each line.
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json.gz", ".json.xz")


def open_text(path: Path, raw: BinaryIO | None = None) -> TextIO:
    """A file of UTF-8 text, unpacked while it is read if its name ends in .gz or .xz; `raw` is the file, if open."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    if opener is not None:
        return cast(TextIO, opener(raw or path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8") if raw is None else TextIOWrapper(raw, encoding="utf-8")


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Raises DataError, with the name of `source`, for whatever goes wrong while it is read inside."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}); "
            "convert it (iconv -t UTF-8)"
        ) from error
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{source} is damaged, or not packed as its name says ({error}); get or pack it anew"
        ) from error
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error})") from error


def file_rows(path: Path, rows: str = "whole", raw: BinaryIO | None = None) -> Iterator[str]:
    """The documents of a file, one after another; only plain text is read as a whole. `raw` is the file, if open."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, raw)
        return
    if path.name.endswith(JSON_LINES):
        for number, row in json_lines(path, raw):
            try:
                text = row["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {text!r}")
                text.encode()  # half of a surrogate pair, which JSON can spell, is no text
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not a JSON object with a text ({error})") from error
            yield text
        return
    with open_text(path, raw) as stream:
        text = stream.read()
    if rows == "lines":
        # The hub's rows are the file's lines, line end included, with blank ones empty.
        # Lines end at \n alone: str.splitlines would also cut at the Unicode line separators that the text contains.
        yield from (line if line.strip() else "" for line in re.findall("[^\n]*\n|[^\n]+$", text))
    elif rows == "stripped":
        yield from (line.strip() for line in text.split("\n") if line.strip())
    else:
        yield text


def json_lines(path: Path, raw: BinaryIO | None = None) -> Iterator[tuple[int, Any]]:
    """The JSON values in the lines of a file, and the number of each line; one line is in memory at a time."""
    with open_text(path, raw) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not a JSON object ({error})") from error


def _parquet_rows(path: Path, raw: BinaryIO | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"reading {path} needs the package pyarrow (pip install pyarrow); or give a .jsonl") from None
    try:
        with ParquetFile(raw or path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f"{path} has no column text; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from (str(row or "") for row in batch.column(0).to_pylist())
    except ArrowException as error:
        raise DataError(f"{path} is no parquet file that can be read ({str(error).splitlines()[0]})") from error


def local_file(directory: Path, wanted: TextSet) -> Path:
    """Where a named text lies in `directory`; raises DataError if it does not."""
    if not directory.is_dir():
        raise DataError(f"--data-dir {directory} is no directory")
    for name in wanted.local:
        if (directory / name).is_file():
            return directory / name
    raise DataError(
        f"{directory} has no file for {wanted.name}; it is looked for as {', '.join(wanted.local)}. "
        "Without --data-dir it comes from the hub"
    )


def _instead(wanted: TextSet) -> str:
    return "give a directory of local files with --data-dir" if wanted.local else "give local files"


@contextmanager
def _asking(wanted: TextSet) -> Iterator[None]:
    """Raises DataError for whatever `datasets` raises inside: many kinds, all of which mean that a set is not to be had."""
    assert wanted.hub is not None
    try:
        yield
    except Exception as error:
        offline = isinstance(error, ConnectionError) and not wanted.local
        pinned = "; tokens made before are found without the hub under the commit of their set (DATASET@COMMIT)"
        raise DataError(
            f"{wanted.hub[0]} could not be loaded from the hub ({_first_line(error)}); {_instead(wanted)}"
            + (pinned if offline else "")
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _ask_hub(wanted: TextSet, function: Literal["load_dataset", "load_dataset_builder"], **options: Any) -> Any:
    """What a function of `datasets` gives for a text."""
    assert wanted.hub is not None
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{wanted.name} from the hub needs the package datasets ({install('eval')}); or {_instead(wanted)}"
        ) from None
    name, configuration, split, _ = wanted.hub
    options["revision"] = wanted.hub_revision
    if configuration is not None and "." in configuration:
        options["data_files"], configuration = {split: configuration}, None
    with _asking(wanted):
        return getattr(datasets, function)(name, configuration, **options)


def hub_data(wanted: TextSet) -> tuple[Any, str]:
    """The `datasets.Dataset` of a text, downloaded as a whole, and what to call it; raises DataError if it is not to be had."""
    assert wanted.hub is not None
    name, configuration, split, _ = wanted.hub
    return _ask_hub(wanted, "load_dataset", split=split), f"{name} ({configuration}, {split})"


class HubStream:
    """The rows of a hub data set, read over the network one after another, in the set's order; none is kept.

    The hub is not asked before something is wanted that it alone knows; the identity of a set whose revision is a whole
    commit is not. Everything raises DataError if the set is not to be had.
    """

    def __init__(self, wanted: TextSet) -> None:
        self.wanted = wanted

    @cached_property
    def _builder(self) -> Any:
        builder = _ask_hub(self.wanted, "load_dataset_builder")
        if builder.name == "cache":
            # datasets did not reach the hub and took what it once loaded, whatever version and configuration that is.
            with _asking(self.wanted):
                raise ConnectionError("the hub does not answer")
        return builder

    @property
    def commit(self) -> str | None:
        """The commit of the set that is read; None for a set that is a local directory."""
        revision = self.wanted.hub_revision or ""
        # A builder's hash is the commit of the set on the hub, and something shorter for what lies elsewhere.
        found = revision if _COMMIT.fullmatch(revision) else str(self._builder.hash)
        return found if _COMMIT.fullmatch(found) else None

    @property
    def identity(self) -> list[Any]:
        """What changes when the text does (JSON values)."""
        assert self.wanted.hub is not None
        if self.commit is not None:
            return [*self.wanted.hub, self.commit]
        # Covers the directory's path, and the names and times of its files.
        return [*self.wanted.hub, self._builder._get_dataset_fingerprint(self.wanted.hub[2])]

    @property
    def size(self) -> int | None:
        """How many rows there are; None if the set does not say."""
        assert self.wanted.hub is not None
        split = (self._builder.info.splits or {}).get(self.wanted.hub[2])
        return split.num_examples or None if split is not None else None

    def __str__(self) -> str:
        assert self.wanted.hub is not None
        name, configuration, split, _ = self.wanted.hub
        version = "" if self.commit is None else f"@{self.commit}"
        return f"{name}{version} ({', '.join(filter(None, (configuration, split)))})"

    def rows(self) -> Iterator[str]:
        """The texts; raises DataError, with the number of rows that were read, if the network fails for good."""
        assert self.wanted.hub is not None
        _, _, split, column = self.wanted.hub
        with _asking(self.wanted):
            data = self._builder.as_streaming_dataset(split=split)
        names = data.column_names
        if names is not None:
            self._check(column, names)
            data = data.select_columns([column])  # the others need not be decoded
        rows, read = iter(data), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of the network, of the file's format: as many kinds as there are formats
                raise DataError(
                    f"{self} broke off after {read:,} rows ({_first_line(error)}), and nothing of it is kept; "
                    f"try again, or {_instead(self.wanted)}"
                ) from error
            if not read and names is None:
                self._check(column, list(row))
            read += 1
            yield text_of(row.get(column), self, column)

    def _check(self, column: str, names: Sequence[str]) -> None:
        if column not in names:
            raise DataError(f"{self} has no column {column}; it has {', '.join(names)}")


def text_of(value: Any, source: object, column: str) -> str:
    """The text in a column of a hub's set, "" for none; raises DataError for what is no text."""
    if value is None or isinstance(value, str):
        return value or ""
    raise DataError(
        f"column {column} of {source} holds {type(value).__name__}, no text; name another column (conversations are read from "
        "a .jsonl file)"
    )


def read_set(wanted: TextSet, data_dir: str | Path | None = None) -> Text:
    """The documents of a named text: from `data_dir` if given, from the package, else from the hub.

    A local set smaller than the name asks is returned as it is; the result of an evaluation names the difference.
    Raises DataError if the text is not to be had.
    """
    if data_dir is not None and wanted.hub is not None:
        path = local_file(Path(data_dir), wanted)
        rows, source = file_rows(path, wanted.rows), str(path)
    elif wanted.hub is None:
        text = files("signbit.data").joinpath("texts", wanted.local[0]).read_text(encoding="utf-8")
        rows, source = iter([text]), "shipped with signbit"
    else:
        data, source = hub_data(wanted)
        rows = (row[wanted.hub[3]] for row in data)
    with reading(source):
        documents = tuple(islice(rows, wanted.documents))
    if not any(document.strip() for document in documents):
        raise DataError(f"{source} holds no text")
    return Text(documents, source)


def read_text_file(path: str | Path) -> Text:
    """A text file (one document), or a .jsonl or .parquet file of rows with a "text" (one document each).

    Text and .jsonl may be packed (.gz, .xz).

    Raises DataError if it is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(PROTOCOLS)
        raise DataError(f"{path} is no file, and no named set either; the named ones are {near}")
    with reading(path):
        documents = tuple(file_rows(path))
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} holds no text")
    return Text(documents, str(path))
