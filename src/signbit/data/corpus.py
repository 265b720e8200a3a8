"""Training text: which sources, in which shares, read piece by piece without ever being in memory as a whole."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from signbit.data.chat import Chat, chats_of, is_chat
from signbit.data.sources import (
    JSON_LINES,
    SETS,
    HubStream,
    TextSet,
    file_rows,
    hub_data,
    json_lines,
    local_file,
    open_text,
    reading,
    text_of,
)
from signbit.errors import DataError

#: How the name of a file of tokens ends (tokenfile.py).
TOKENS = ".tokens"
_HUB = "hub:"
_PLAIN = (".txt", ".txt.gz", ".txt.xz")
_SUFFIXES = (*_PLAIN, *JSON_LINES, ".parquet")
#: Characters that are tokenized at once; the time that some tokenizers take grows faster than the text.
PIECE_CHARACTERS = 100_000
_ALLOWED = (
    f"a source is a file ({', '.join(_SUFFIXES)}, {TOKENS}), a directory of such texts, "
    f"a set ({', '.join(SETS)}), or hub:DATASET:CONFIGURATION:SPLIT:COLUMN; "
    "a limit of tokens and a weight may follow (NAME@50M=0.7)"
)
#: A limit of tokens as it is written, and what its last letter multiplies.
_LIMIT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kMG]?)")
_TIMES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Source:
    """One text to train on, and its share of the blocks relative to the other sources' weights."""

    name: str
    """A file, a directory, a named set, or hub:DATASET:CONFIGURATION:SPLIT:COLUMN (DATASET@REVISION for one version)."""
    weight: float = 1.0
    max_tokens: int | None = None
    """No more than this many tokens of its beginning are taken, boundaries between documents counted."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"{self.name} has a limit of {self.max_tokens} tokens; a limit is a positive whole number")
        if self.max_tokens is not None and self.name.endswith(TOKENS):
            raise DataError(f"{self.name} is tokenized already and read as it is; leave its limit away")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"{self.name} has the weight {self.weight}; a weight is a positive number")


@dataclass(frozen=True)
class TrainingData:
    """The sources of a training run."""

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise DataError(f"no training text is given; {_ALLOWED}")
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{name} is given twice; give it once, with a larger weight")

    @classmethod
    def parse(cls, words: Sequence[str]) -> TrainingData:
        """Sources as the command line has them, NAME[@LIMIT][=WEIGHT]: weights of 1 if none is given.

        Raises DataError as `parse_source` does, for a source that is given twice, and if only some have a weight.
        """
        sources = tuple(map(parse_source, words))
        bare = [word for word in words if _split(word)[2] is None]
        if bare and len(bare) < len(words):
            raise DataError(
                f"{bare[0]} has no weight, but other sources have one; give all or none (a.txt=0.7 b.txt=0.3)"
            )
        return cls(sources)

    @property
    def weights(self) -> tuple[float, ...]:
        """One a source."""
        return tuple(source.weight for source in self.sources)


def _split(word: str) -> tuple[str, str | None, str | None]:
    """Name, limit and weight of NAME[@LIMIT][=WEIGHT]; a path that is there is a name, whatever signs it has."""
    if Path(word).exists():
        return word, None, None
    before, equals, after = word.rpartition("=")
    # What goes on behind a sign, with a limit (c=2.txt@1M), a path (x=1/a.txt) or a part of a hub data set
    # (DATASET@REVISION:…), has the sign in its name.
    name, weight = (before, after) if equals and not set(after) & set("@/:") else (word, None)
    if Path(name).exists():
        return name, None, weight
    before, at, after = name.rpartition("@")
    return (before, after, weight) if at and not set(after) & set("/:") else (name, None, weight)


def parse_source(text: str) -> Source:
    """The source that NAME[@LIMIT][=WEIGHT] means (`a.txt.xz`, `a.jsonl=0.7`, `c4`, `hub:allenai/c4:en:train:text@50M`).

    LIMIT is a number of tokens; k, M and G behind it stand for thousands, millions and thousand millions. Raises
    DataError, with what is allowed, for a name that is none of these, a path that does not exist, a limit that is no
    positive whole number, and a weight that is no positive number. The hub is not asked.
    """
    name, limit, weight = _split(text)
    tokens = None if limit is None else _limit(text, name, limit)
    try:
        number = 1.0 if weight is None else float(weight)
    except ValueError:
        raise DataError(f"{text}: {weight} is no weight, and there is no file of this name; {_ALLOWED}") from None
    source = Source(name, number, tokens)
    if name.startswith(_HUB):
        _hub_set(name)
    elif name.endswith(TOKENS):
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file; {_ALLOWED}")
    elif name not in SETS:
        _files(name)
    return source


def _limit(text: str, name: str, limit: str) -> int:
    """The tokens that `limit` means, which stands behind `name` in `text`."""
    match = _LIMIT.fullmatch(limit)
    tokens = Fraction(match[1]) * _TIMES[match[2]] if match else Fraction(0)
    if tokens < 1 or tokens.denominator > 1:
        raise DataError(
            f"{text}: {limit or 'nothing'} is no limit of tokens, and there is no file of this name; a limit is a "
            "positive whole number, or one of thousands (50k), millions (50M) or thousand millions (1.5G)"
        )
    if not Path(name).exists():
        before, at, other = name.rpartition("@")
        if at and _LIMIT.fullmatch(other):
            raise DataError(f"{text} has two limits; give one ({before}@{limit})")
        before, equals, weight = name.rpartition("=")
        if equals and re.fullmatch("[0-9.]+", weight):
            raise DataError(
                f"{text}: a limit stands before a weight ({before}@{limit}={weight}), and there is no file {name}"
            )
    return int(tokens)


def _files(name: str) -> list[Path]:
    """The files of text that a path means, sorted by name."""
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(_SUFFIXES))
        if not files:
            raise DataError(
                f"{name} holds no text to train on (directories in it are not looked into); "
                f"files that are read end in {', '.join(_SUFFIXES)}"
            )
        return files
    if not path.is_file():
        raise DataError(f"{name}: no such file; {_ALLOWED}")
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{name} is no file of a kind that is read; {_ALLOWED}")
    return [path]


def _hub_set(name: str) -> TextSet:
    parts = name.removeprefix(_HUB).split(":")
    if len(parts) != 4 or not all(part for index, part in enumerate(parts) if index != 1):
        raise DataError(
            f"{name}: a source of the hub is hub:DATASET:CONFIGURATION:SPLIT:COLUMN (hub:allenai/c4:en:train:text; the "
            "configuration may be empty, or a data file of the set; DATASET@REVISION is one version of it)"
        )
    dataset, configuration, split, column = parts
    revision = None
    if "@" in dataset and not Path(dataset).exists():
        dataset, _, revision = dataset.rpartition("@")
        if not (dataset and revision) or Path(dataset).exists():
            raise DataError(f"{name}: a revision is of a data set of the hub (DATASET@REVISION); give both, or neither")
    return TextSet(name, "", 0, None, (), (dataset, configuration or None, split, column), revision)


class Row(NamedTuple):
    """Token ids that are a row of their own, and where they stand."""

    ids: list[int]
    where: str
    read: int
    """How much of the corpus is read by now, in the unit of its size."""


class Piece(NamedTuple):
    """Text of one document, at most about `PIECE_CHARACTERS` of it."""

    text: str
    last: bool
    """Whether the document ends here."""
    read: int = 0
    """How much of the corpus is read by now, in the unit of its size."""


@dataclass(frozen=True)
class Corpus:
    """The text of one source, not yet read."""

    source: str
    """Where it is from."""
    size: Callable[[], int | None]
    """Bytes of its files, or rows of a hub data set (None if it does not say): for when it is read."""
    identity: Any
    """What changes when the text does (JSON values): digests of files, or the commit of a hub data set."""
    pieces: Callable[[], Generator[Piece, None, None]]
    """Reads it; raises DataError if a file is damaged or not UTF-8, and if the hub cannot be read."""
    rows: Callable[[], Generator[Row, None, None]] | None = None
    """Reads it where its lines hold token ids and no text, which has no pieces; raises DataError likewise."""
    chats: Callable[[], Generator[Chat, None, None]] | None = None
    """Reads it where its lines hold conversations; raises DataError likewise."""


def find_corpus(source: Source, data_dir: str | Path | None = None) -> Corpus:
    """The text of `source`, of which no document is read yet (the bytes of local files are, for their digests).

    Documents are: of .txt files, what two or more empty lines divide; of .jsonl and .parquet files and of hub data
    sets, the rows; of the sets with a joiner (wikitext2, ptb), all of it. A .jsonl file whose first line has
    `token_ids` and no text is tokenized already (the chunks of LLM360's AmberDatasets, which FBI-LLM learnt from); one
    whose first line has `messages` holds conversations.
    `data_dir` is where named sets lie; without it they come from the hub. Raises DataError if the text is not to be
    had, and for a directory in which only some files are tokenized; that a hub data set has the split and the column is
    seen when it is read.
    """
    name = source.name
    if name in SETS:
        return _named(SETS[name], data_dir)
    if name.startswith(_HUB):
        return _streamed(_hub_set(name))
    files = _files(name)
    kinds = ["chats" if is_chat(file) else "ids" if _is_tokenized(file) else "rows" for file in files]
    kind = kinds[0]
    if len(set(kinds)) > 1:
        other = next(i for i, its in enumerate(kinds) if its != kind)
        (one, first), (two, second) = sorted([(kind, files[0]), (kinds[other], files[other])])
        holds = {"ids": "token_ids", "chats": "messages", "rows": "text"}
        raise DataError(f"{first} holds {holds[one]} and {second} holds {holds[two]}; give them as two sources")
    identity = [["lines" if file.name.endswith(_PLAIN) else kind, file_digest(file)] for file in files]

    sizes = [file.stat().st_size for file in files]

    def read(parts: Callable[[Path, BinaryIO], Iterator[Any]]) -> Generator[Any, None, None]:
        before = 0
        for file, size in zip(files, sizes, strict=True):
            with reading(file), file.open("rb") as raw:
                for part in parts(file, raw):
                    yield part._replace(read=before + raw.tell())
            before += size

    return Corpus(
        name, lambda: sum(sizes), identity, lambda: read(_file_pieces),
        (lambda: read(_token_rows)) if kind == "ids" else None, (lambda: read(chats_of)) if kind == "chats" else None,
    )  # fmt: skip


def _is_tokenized(file: Path) -> bool:
    if not file.name.endswith(JSON_LINES):
        return False
    with reading(file):
        first = next(json_lines(file), (0, None))[1]
    return isinstance(first, dict) and "token_ids" in first and "text" not in first


def _token_rows(file: Path, raw: BinaryIO) -> Iterator[Row]:
    for number, row in json_lines(file, raw):
        where = f"{file}, line {number}"
        ids = row.get("token_ids") if isinstance(row, dict) else None
        if not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
            raise DataError(f"{where}: not a JSON object with token_ids, which are whole numbers")
        yield Row(ids, where, 0)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex; raises DataError if it cannot be read."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _named(wanted: TextSet, data_dir: str | Path | None) -> Corpus:
    def divided(rows: Iterator[str]) -> Iterator[Piece]:
        rows = islice(rows, wanted.documents)
        return _row_pieces(rows if wanted.joiner is None else (wanted.joiner.join(rows),))

    if data_dir is None:
        return _from_hub(wanted, divided)
    path = local_file(Path(data_dir), wanted)
    size = path.stat().st_size

    def pieces() -> Generator[Piece, None, None]:
        with reading(path), path.open("rb") as raw:
            for piece in divided(file_rows(path, wanted.rows, raw)):
                yield piece._replace(read=size if raw.closed else raw.tell())

    return Corpus(str(path), lambda: size, [wanted.name, file_digest(path)], pieces)


def _from_hub(wanted: TextSet, divided: Callable[[Iterator[str]], Iterator[Piece]]) -> Corpus:
    data, source = hub_data(wanted)
    assert wanted.hub is not None
    column = wanted.hub[3]
    if column not in data.column_names:
        raise DataError(f"{source} has no column {column}; it has {', '.join(data.column_names)}")

    def pieces() -> Generator[Piece, None, None]:
        with reading(source):
            yield from _counted((text_of(row[column], source, column) for row in data), divided)

    # The fingerprint covers the data set's name, configuration, revision and split.
    return Corpus(source, lambda: len(data), [wanted.name, data._fingerprint, column], pieces)


def _streamed(wanted: TextSet) -> Corpus:
    stream = HubStream(wanted)
    return Corpus(str(stream), lambda: stream.size, stream.identity, lambda: _counted(stream.rows(), _row_pieces))


def _counted(rows: Iterator[str], divided: Callable[[Iterator[str]], Iterator[Piece]]) -> Generator[Piece, None, None]:
    """The pieces of rows, with how many rows are read by then."""
    read = 0

    def counting() -> Iterator[str]:
        nonlocal read
        for row in rows:
            read += 1
            yield row

    for piece in divided(counting()):
        yield piece._replace(read=read)


def _file_pieces(path: Path, raw: BinaryIO) -> Iterator[Piece]:
    if not path.name.endswith(_PLAIN):
        yield from _row_pieces(file_rows(path, raw=raw))
        return
    with open_text(path, raw) as lines:
        for piece in _line_pieces(lines):
            for part in _cut(piece.text):
                yield Piece(part.text, part.last and piece.last)


def _line_pieces(lines: Iterable[str]) -> Iterator[Piece]:
    """Whole lines, of documents that two or more empty ones divide; the line end before these belongs to neither."""
    held: list[str] = []
    characters, empty = 0, 0
    for line in lines:
        if line == "\n":
            empty += 1
            continue
        if held and empty > 1:
            yield Piece("".join(held).removesuffix("\n"), True)
            held, characters = [], 0
        elif held:
            held.append("\n" * empty)
            if characters + len(line) > PIECE_CHARACTERS:
                yield Piece("".join(held), False)
                held, characters = [], 0
        held.append(line)
        characters += len(line)
        empty = 0
    if held:
        yield Piece("".join(held).removesuffix("\n"), True)


def _row_pieces(rows: Iterable[str]) -> Iterator[Piece]:
    for row in rows:
        if row.strip():
            yield from _cut(row)


def _cut(text: str) -> Iterator[Piece]:
    """A document in pieces, cut behind the last line end that fits, else before the last space, else anywhere."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, limit)
        if end <= start:
            end = limit
        yield Piece(text[start:end], False)
        start = end
    yield Piece(text[start:], True)
