"""What a teacher answers to every block of a text: its likeliest next tokens, on the disk in the teacher's place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from signbit.data.blocks import Blocks
from signbit.data.calibration import Progress
from signbit.data.corpus import file_digest
from signbit.data.tokenfile import TokenFile, description, id_type, on_disk, write_json
from signbit.data.unfinished import check_same, evaluating, unfinished
from signbit.errors import DataError, OptionError, WeightError

#: How the name of a file of teacher's logits ends.
LOGITS = ".logits"
_VERSION = 1
_ANEW = "make it anew with signbit data teacher-logits"


@dataclass(frozen=True)
class Answered:
    """A file of tokens to whose blocks a teacher's answers are known."""

    name: str
    sha256: str
    blocks: int


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's `top` likeliest next tokens after each token of the whole blocks of `files`, block after block.

    A token is a record (ids [K], log_p [K]), likeliest first: log_p is the float16 of log p over the whole vocabulary, at
    temperature 1. Described by a .json of the same name beside the file.
    """

    path: Path
    teacher: str
    """Digest of the model."""
    tokenizer: str
    """Digest of the tokenizer (`tokenizer_digest`)."""
    vocabulary: int
    """Tokens that the teacher gives a probability."""
    length: int
    """Tokens a block."""
    top: int
    """K."""
    dtype: str
    """Of the ids: uint16 if the vocabulary fits, else uint32."""
    precision: str
    """Dtype of the teacher."""
    batch: int
    """Blocks that it was asked at a time."""
    files: tuple[Answered, ...]

    @property
    def blocks(self) -> int:
        """Blocks of all files."""
        return sum(file.blocks for file in self.files)

    @property
    def record(self) -> np.dtype:
        """What stands on the disk for a token: K·(2 + 2) bytes, or K·(4 + 2)."""
        return np.dtype([("ids", on_disk(self.dtype), (self.top,)), ("log_p", "<f2", (self.top,))])

    def recipe(self) -> dict[str, Any]:
        """What decides the content, as JSON values: all but where it lies."""
        values: dict[str, Any] = json.loads(json.dumps({**asdict(self), "path": None}))
        del values["path"]
        return values

    def open(self) -> np.ndarray:
        """The records [blocks, length], mapped from the disk, read-only."""
        return np.memmap(self.path, self.record, mode="r", shape=(self.blocks, self.length))

    def check(self, teacher: str, tokenizer: str, length: int) -> None:
        """Raises DataError unless this is what the model of these digests answers to blocks of `length` tokens."""
        if self.tokenizer != tokenizer:
            raise DataError(f"{self.path} was made with another tokenizer than the model's; {_ANEW}")
        if self.teacher != teacher:
            raise DataError(f"{self.path} holds what another model answers; {_ANEW}")
        if self.length != length:
            raise DataError(
                f"{self.path} answers blocks of {self.length} tokens, and --sequence-length is {length}; "
                f"give --sequence-length {self.length}, or {_ANEW}"
            )

    def first_blocks(self, files: Sequence[TokenFile]) -> list[int]:
        """Where the blocks of each file begin; raises DataError if those of one are not here."""
        begins, begin = {}, 0
        for answered in self.files:
            begins[answered.sha256] = begin
            begin += answered.blocks
        found = []
        for file in files:
            digest = file_digest(file.path)
            if digest not in begins:
                covered = ", ".join(answered.name for answered in self.files)
                raise DataError(
                    f"{self.path} has no answers to {file.source} ({file.path.name}), but to {covered}; "
                    f"{_ANEW} and all of --data"
                )
            found.append(begins[digest])
        return found


class TaughtBlocks(Dataset[dict[str, Tensor]]):
    """Blocks with what a teacher answers to them: item i of `blocks`, and top_ids int32 and top_log_p float16 [length, K].

    Raises DataError if `logits` are not those of each file of `blocks`.
    """

    def __init__(self, blocks: Blocks, logits: TeacherLogits) -> None:
        self.blocks, self.logits = blocks, logits
        self._firsts = logits.first_blocks(blocks.files)
        self._records: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would be pickled as an array of all its records.
        return {**self.__dict__, "_records": None}

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, block = self.blocks.locate(index)
        if self._records is None:
            self._records = self.logits.open()
        records = self._records[self._firsts[source] + block]
        return {
            "input_ids": self.blocks.ids(source, block),
            "top_ids": torch.from_numpy(records["ids"].astype(np.int32)),
            "top_log_p": torch.from_numpy(records["log_p"].astype(np.float16)),
        }


def check_logits_name(path: str | Path) -> None:
    """Raises OptionError for a name that does not end in .logits."""
    if Path(path).suffix != LOGITS:
        raise OptionError(f"{path} is no name of a file of teacher's logits; give one that ends in {LOGITS}")


@torch.no_grad()
def write_teacher_logits(
    model: Any,
    teacher: str,
    files: Sequence[TokenFile],
    path: str | Path,
    length: int,
    top: int = 64,
    batch: int = 8,
    progress: Progress | None = None,
) -> TeacherLogits:
    """Asks `model` once about all whole blocks of `length` tokens of `files`, as `Blocks` lays them, and writes `path`.

    `teacher` is the model's digest. Each batch of blocks stands in PATH.partial once it is done, so that the same call after
    a kill goes on there and ends with the same bytes (where the model's own arithmetic repeats itself). If `path` is there
    already, of the same model, text and options, it is opened.

    Raises DataError if `path` or PATH.partial is of another model, text or options, in use, or cannot be written, and as
    `Blocks` does; OptionError for another ending than .logits, a `batch` under 1, a `top` outside of 1 … vocabulary, and a
    length over the model's positions; WeightError if the model's logits are not finite.
    """
    path = Path(path)
    check_logits_name(path)
    blocks = Blocks(files, length)
    made = _described(model, teacher, blocks, path, top, batch)
    if path.exists():
        found = read_teacher_logits(path)
        check_same(path, found.recipe(), made.recipe())
        return found
    places = [(source, block) for source, file in enumerate(made.files) for block in range(file.blocks)]
    with unfinished(path, made.recipe(), length * made.record.itemsize) as file, evaluating(model):
        while file.done < len(places):
            some = places[file.done : file.done + batch]
            ids = torch.stack([blocks.ids(source, block) for source, block in some])
            file.add(_answers(model, ids, made).tobytes(), len(some))
            if progress is not None:
                progress(file.done, len(places))
        write_json(description(path), {"format": _VERSION, **made.recipe()})
    return made


def _described(model: Any, teacher: str, blocks: Blocks, path: Path, top: int, batch: int) -> TeacherLogits:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and blocks.length > limit:
        raise OptionError(f"blocks of {blocks.length} tokens are asked for, but the model has {limit} positions")
    if batch < 1:
        raise OptionError(f"{batch} blocks a batch are asked for; a positive number is needed")
    with evaluating(model):
        vocabulary = _logits(model, torch.zeros(1, 1, dtype=torch.long)).shape[-1]
    if not 1 <= top <= vocabulary:
        raise OptionError(f"the top {top} tokens are asked for, of a vocabulary of {vocabulary}; give 1 … {vocabulary}")
    return TeacherLogits(
        path, teacher, blocks.files[0].tokenizer, vocabulary, blocks.length, top, id_type(vocabulary),
        str(next(model.parameters()).dtype).removeprefix("torch."), batch,
        tuple(
            Answered(file.path.name, file_digest(file.path), use.blocks)
            for file, use in zip(blocks.files, blocks.uses, strict=True)
        ),
    )  # fmt: skip


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def _answers(model: Any, ids: Tensor, made: TeacherLogits) -> np.ndarray:
    """Records [blocks, length] of blocks of `ids`."""
    records = np.empty(ids.shape, made.record)
    # One block at a time: in float32 the logits of a batch are large.
    for row, logits in zip(records, _logits(model, ids), strict=True):
        logits = logits.float()
        highest, tokens = logits.topk(made.top, dim=-1)
        log_p = highest - logits.logsumexp(-1, keepdim=True)
        if not bool(log_p[:, 0].isfinite().all()):
            raise WeightError("the model's logits are NaN or infinite, so that it cannot teach; repair the model")
        row["ids"] = tokens.cpu().numpy()
        # Logits that mean never (-1e9, -inf) are beyond what float16 holds.
        row["log_p"] = log_p.clamp_min(torch.finfo(torch.float16).min).half().cpu().numpy()
    return records


def read_teacher_logits(path: str | Path) -> TeacherLogits:
    """Opens a file of teacher's logits (.logits, with its .json beside it).

    Raises OptionError for another name, DataError if either is missing, if there are not as many answers as described, or
    if a newer signbit wrote it.
    """
    path = Path(path)
    check_logits_name(path)
    try:
        values: dict[str, Any] = json.loads(description(path).read_bytes())
        if (version := values.pop("format")) != _VERSION:
            raise DataError(f"{path} has format {version}, this signbit reads {_VERSION}; {_ANEW}, or update signbit")
        files = tuple(Answered(**file) for file in values.pop("files"))
        found = TeacherLogits(path, files=files, **values)
        expected = found.blocks * found.length * found.record.itemsize
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}; a file of teacher's logits is written by signbit data teacher-logits, with "
            "a .json beside it when it is complete"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{description(path)} does not describe a file of teacher's logits ({error}); {_ANEW}"
        ) from error
    if size != expected:
        raise DataError(f"{path} has {size} bytes instead of {expected}: it is not complete; {_ANEW}")
    return found
