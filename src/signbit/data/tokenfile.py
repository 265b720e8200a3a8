"""Token ids on the disk: one text, tokenized once, and read from there as often as a run likes."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from signbit.data.chat import template_digest, tokens_of
from signbit.data.corpus import TOKENS, Corpus, Piece, Source, find_corpus
from signbit.errors import DataError

#: Version of the files, and of how text becomes tokens: a new one makes all text be tokenized anew.
VERSION = 1
#: Characters that are handed to the tokenizer in one call.
_BATCH_CHARACTERS = 1_000_000
#: Rows of token ids between two calls of progress.
_REPORTED_ROWS = 500
#: Called with how much of the text is tokenized, and how much there is: tokens, of a source with a limit of them, else
#: bytes of its files or rows of a hub data set (None if that does not say how many it has).
TokenProgress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class TokenFile:
    """Token ids in a file, little-endian and nothing else, described by a .json of the same name beside it."""

    path: Path
    source: str
    """The text they are of."""
    documents: int
    tokens: int
    """Boundaries included."""
    dtype: str
    """uint16 if every id of the vocabulary fits, else uint32."""
    boundary: int | None
    """The id that ends each document: the tokenizer's end of sequence, else its beginning. None if it has neither, and
    then nothing divides the documents."""
    tokenizer: str
    """Digest of the tokenizer that the ids are of (`tokenizer_digest`)."""
    row_tokens: int | None = None
    """Length of the rows that the tokens are, which do not run on into each other; None for running text."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How a model wrote them (`self_generate`), or how many conversations were cut and left out."""
    learnt: bool = False
    """Whether only some of the tokens are learnt from, which a file beside it says (`open_learnt`)."""

    def open(self) -> np.ndarray:
        """The ids [tokens], mapped from the disk, read-only."""
        return np.memmap(self.path, on_disk(self.dtype), mode="r", shape=(self.tokens,))

    def open_learnt(self) -> np.ndarray:
        """For each token 1 if it is learnt from, else 0, uint8 [tokens], mapped from the disk, read-only."""
        return np.memmap(learnt_file(self.path), np.uint8, mode="r", shape=(self.tokens,))


def learnt_file(path: Path) -> Path:
    """Beside a file of tokens: which of them are learnt from."""
    return path.with_name(f"{path.name}.learnt")


def on_disk(dtype: str) -> np.dtype:
    """A dtype as it stands in a file: little-endian."""
    return np.dtype(dtype).newbyteorder("<")


def as_bytes(ids: Any, dtype: str) -> bytes:
    """Ids (a list or an array) as they stand in a file."""
    return np.asarray(ids, dtype=on_disk(dtype)).tobytes()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256, in hex, of what decides the ids that a tokenizer gives: all of a fast one, the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        what: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        what = json.loads(backend.to_str())
        # Set by whoever called the tokenizer last; the call that makes the ids sets neither.
        del what["truncation"], what["padding"]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def boundary_id(tokenizer: Any) -> int | None:
    """The id that ends a document: end of sequence, else beginning of sequence, else None."""
    end: int | None = tokenizer.eos_token_id
    return tokenizer.bos_token_id if end is None else end


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the highest id, which in a vocabulary with holes is more than its length."""
    return 1 + max(map(int, tokenizer.get_vocab().values()))


def id_type(vocabulary: int) -> str:
    """The smallest of uint16 and uint32 that holds the ids of a vocabulary of this size."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def token_file(
    tokenizer: Any,
    source: Source,
    folder: str | Path,
    data_dir: str | Path | None = None,
    progress: TokenProgress | None = None,
    length: int | None = None,
) -> TokenFile:
    """The tokens of `source`, each document followed by the boundary id, in `folder`; made unless they are there.

    The file is named after all that decides its content: the text (bytes of local files, commit of a hub data set), the
    source's limit, the tokenizer and `VERSION`; nothing is read anew while these stay. No special token but the boundary
    is added. Documents of more than some 100 thousand characters are tokenized in pieces cut at line ends, which may
    make other tokens there than the whole would. With a limit the file holds the first tokens of what it would without:
    the document in which the limit falls is cut there and has no boundary, and little more than that is read. A source
    that is a .tokens file is opened where it lies. Of one whose lines hold token ids (`find_corpus`) each line is a row,
    to which no boundary is added; a limit takes whole rows. A conversation is a row of `length` tokens, cut there, or filled
    up with boundaries; these and what the assistant did not say are not learnt from. Several processes may call this at
    once: each writes its own file, and the last rename wins with the same bytes.

    Raises DataError if the text is missing, damaged, not UTF-8 or empty, if the hub cannot be read, if `folder` cannot be
    written, for a .tokens file of another tokenizer, and for rows of token ids that differ in length or are not in the
    vocabulary.
    """
    digest = tokenizer_digest(tokenizer)
    if source.name.endswith(TOKENS):
        found = read_token_file(source.name)
        if found.tokenizer != digest:
            raise DataError(
                f"{source.name} holds tokens of another tokenizer than the model's; make it anew with this one"
            )
        return found
    corpus = find_corpus(source, data_dir)
    boundary = boundary_id(tokenizer)
    limit, label = source.max_tokens, corpus.source
    key = [VERSION, corpus.identity, digest, boundary]
    if corpus.chats is not None:
        if length is None:
            raise DataError(
                f"{corpus.source} holds conversations (messages), which are learnt from without a teacher and without "
                "--cuda-graph (signbit finetune); give text"
            )
        key += ["chats", length, template_digest(tokenizer)]
    if limit is not None:
        key.append(limit)
        label = f"{label} (limit of {limit:,} tokens)"
    path = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}{TOKENS}"
    with suppress(DataError):  # not there, or not whole
        return replace(read_token_file(path), source=label)
    if corpus.rows is not None:
        made = _copy_rows(corpus, vocabulary_size(tokenizer), limit, path, progress)
        made = replace(made, source=label, tokenizer=digest)
        write_description(made)
        return made
    if corpus.chats is not None and length is not None:
        made = replace(_write_chats(corpus, tokenizer, length, limit, path, progress), source=label, tokenizer=digest)
        write_description(made)
        return made
    dtype = id_type(vocabulary_size(tokenizer))
    documents = tokens = 0
    with _partial(path) as stream, closing(corpus.pieces()) as pieces:
        # The tokens of the document at hand: one that gave none (blank, say) is no document.
        of_document = 0
        while tokens != limit:
            # Most tokens are longer than a character: as many characters as tokens are missing are hardly too many.
            most = _BATCH_CHARACTERS if limit is None else min(_BATCH_CHARACTERS, limit - tokens)
            if not (batch := _batch(pieces, most)):
                break
            rows = tokenizer(
                [piece.text for piece in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
            ids: list[int] = []
            for piece, row in zip(batch, rows, strict=True):
                if tokens == limit:
                    break
                of_document += len(row)
                if piece.last and of_document:
                    documents += 1
                    of_document = 0
                    if boundary is not None:
                        row.append(boundary)
                fitting = row if limit is None else row[: limit - tokens]
                tokens += len(fitting)
                ids += fitting
            stream.write(as_bytes(ids, dtype))
            if progress is not None and limit is None:
                progress(batch[-1].read, corpus.size())
            elif progress is not None:
                progress(tokens, limit)
        documents += of_document > 0  # one that the limit cut
        if not documents:
            raise DataError(f"{corpus.source} holds no text")
    made = TokenFile(path, label, documents, tokens, dtype, boundary, digest)
    write_description(made)
    return made


def _copy_rows(
    corpus: Corpus, vocabulary: int, limit: int | None, path: Path, progress: TokenProgress | None
) -> TokenFile:
    """The rows of a corpus that is tokenized already, written to `path`, one after another."""
    assert corpus.rows is not None
    dtype, length, documents = id_type(vocabulary), 0, 0
    with _partial(path) as stream, closing(corpus.rows()) as rows:
        for row in rows:
            length = length or len(row.ids)
            if len(row.ids) != length:
                raise DataError(
                    f"{row.where} has {len(row.ids)} token ids, and the lines before have {length}; rows of one length are "
                    "needed"
                )
            if not 0 <= min(row.ids) <= max(row.ids) < vocabulary:
                wrong = next(token for token in row.ids if not 0 <= token < vocabulary)
                raise DataError(
                    f"{row.where} has the token {wrong}, but the model's tokenizer has {vocabulary}; they are another "
                    "tokenizer's. Give a model with that one, or text"
                )
            if limit is not None and (documents + 1) * length > limit:
                break
            stream.write(as_bytes(row.ids, dtype))
            documents += 1
            if progress is not None and documents % _REPORTED_ROWS == 0:
                progress(*((row.read, corpus.size()) if limit is None else (documents * length, limit)))
        if not documents:
            short = f" that the limit of {limit} tokens has room for" if length else ""
            raise DataError(f"{corpus.source} holds no row{short}")
    return TokenFile(path, corpus.source, documents, documents * length, dtype, None, "", row_tokens=length)


def _write_chats(
    corpus: Corpus, tokenizer: Any, length: int, limit: int | None, path: Path, progress: TokenProgress | None
) -> TokenFile:
    """The conversations of a corpus as rows of `length` tokens, and beside them which are learnt from."""
    assert corpus.chats is not None
    dtype, boundary = id_type(vocabulary_size(tokenizer)), boundary_id(tokenizer)
    rows = cut = left_out = 0
    with _partial(path) as stream, _partial(learnt_file(path)) as marks, closing(corpus.chats()) as chats:
        for number, chat in enumerate(chats, start=1):
            ids, learnt = tokens_of(tokenizer, chat)
            cut += len(ids) > length
            missing = max(length - len(ids), 0)
            ids = ids[:length] + [boundary or 0] * missing
            learnt = learnt[:length] + [False] * missing
            if not any(learnt[1:]):
                left_out += 1
                continue
            if limit is not None and (rows + 1) * length > limit:
                break
            stream.write(as_bytes(ids, dtype))
            marks.write(as_bytes(learnt, "uint8"))
            rows += 1
            if progress is not None and number % _REPORTED_ROWS == 0:
                progress(*((chat.read, corpus.size()) if limit is None else (rows * length, limit)))
        if not rows:
            raise DataError(
                f"{corpus.source} holds no conversation in which the assistant says something in the first {length} tokens"
            )
    counts = {"conversations": rows, "cut": cut, "left_out": left_out}
    return TokenFile(path, "", rows, rows * length, dtype, None, "", length, counts, learnt=True)


def _batch(pieces: Iterator[Piece], characters: int) -> list[Piece]:
    """The next pieces, as few as have this many characters; fewer at the end of the text."""
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        characters -= len(piece.text)
        if characters <= 0:
            break
    return batch


@contextmanager
def _partial(path: Path) -> Iterator[BinaryIO]:
    """A new file that becomes `path` when the block ends well, and is gone when it does not; raises DataError."""
    host = f".partial-{socket.gethostname()}-"
    scratch = path.with_name(f".{path.name}{host}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".*{TOKENS}{host}*"):
            pid = stale.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
                stale.unlink(missing_ok=True)
        with scratch.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); give another folder") from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def description(path: Path) -> Path:
    """The .json beside a file of tokens, without which it is not complete."""
    return path.with_name(f"{path.name}.json")


def write_description(file: TokenFile) -> None:
    """Describes a file whose tokens are on the disk; raises DataError if that cannot be written."""
    values = {"format": VERSION, **asdict(file)}
    del values["path"]
    write_json(description(file.path), values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes all of `values` or leaves `path` as it was; raises DataError if it cannot be written."""
    with _partial(path) as stream:
        stream.write(f"{json.dumps(values, indent=2)}\n".encode())


def read_token_file(path: str | Path) -> TokenFile:
    """Opens a file of tokens (.tokens, with its .json beside it).

    Raises DataError if either is missing, if there are not as many tokens as described, or if a newer signbit wrote it.
    """
    path = Path(path)
    try:
        values = json.loads(description(path).read_bytes())
        if (version := values.pop("format")) != VERSION:
            raise DataError(
                f"{path} has format {version}, this signbit reads {VERSION}; make it anew, or update signbit"
            )
        file = TokenFile(path, **values)
        expected = file.tokens * np.dtype(file.dtype).itemsize
        size = path.stat().st_size
        if file.learnt and learnt_file(path).stat().st_size != file.tokens:
            raise DataError(f"{learnt_file(path)} is not complete; make it and {path} anew")
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}; a file of tokens is written by signbit, with a .json beside it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{description(path)} does not describe a file of tokens ({error}); make both anew") from error
    if size != expected:
        raise DataError(f"{path} has {size} bytes instead of {expected}: it is not complete; make it anew")
    return file
