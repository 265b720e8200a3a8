"""Log-likelihoods of continuations: as lm-eval's Hugging Face models compute them, with answers kept on the disk."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from signbit.errors import OptionError, WeightError
from signbit.evaluate.kept import append_lines, cache_folder, digest, read_lines
from signbit.evaluate.requests import Bos

#: (context, continuation).
Pair = tuple[str, str]
#: The sum of ln p over the continuation's tokens, and whether each of them is the likeliest.
Answer = tuple[float, bool]
#: Called with (answers there, answers in all).
Progress = Callable[[int, int], None]
#: Padded tokens in a batch, to begin with; memory that runs out halves it.
_CPU_TOKENS, _DEVICE_TOKENS = 2048, 65536


class Answers:
    """Answers by the hash of their pair, in memory and, with a `path`, on the disk as they come.

    Each line of the file is one answer, written whole batch by batch behind a line of the `machine` that gave it, so that
    a run that was killed has lost at most the batch it was at. Several processes write to files of their own (`place`),
    and all of them are read.
    """

    def __init__(self, path: Path | None = None, place: int = 0, machine: dict[str, str] | None = None) -> None:
        self.path, self._machine = path, machine or {}
        self._file = None if path is None else path.with_name(f"{path.name}-{place}.jsonl")
        self._known: dict[str, Answer] = {}
        self._given_on: dict[str, dict[str, str]] = {}
        if path is not None:
            for file in sorted(path.parent.glob(f"{path.name}-*.jsonl")):
                self._read(file)

    def _read(self, file: Path) -> None:
        machine: dict[str, str] = {}
        for found in read_lines(file):
            match found:
                case {"measured_on": dict(recorded)}:
                    machine = recorded
                case [str(key), float(logprob), bool(greedy)]:
                    self._known[key] = logprob, greedy
                    self._given_on[key] = machine

    @staticmethod
    def key(pair: Pair) -> str:
        """The name of a pair: SHA-256 of the JSON of its texts, 32 hexadecimal digits of it."""
        return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:32]

    def get(self, pair: Pair) -> Answer | None:
        """The answer to a pair, if it is known."""
        return self._known.get(self.key(pair))

    def machines(self, pairs: Iterable[Pair]) -> list[dict[str, str]]:
        """The machines that gave the answers to `pairs`, each once; {} is one that was not recorded.

        What is not known here was given by another process of this run, whose machine counts as this one.
        """
        found: list[dict[str, str]] = []
        for pair in pairs:
            if (machine := self._given_on.get(self.key(pair), self._machine)) not in found:
                found.append(machine)
        return found

    def add(self, answers: dict[Pair, Answer]) -> None:
        """Keeps the answers of a batch, given here; raises OptionError where they cannot be written."""
        named = {self.key(pair): answer for pair, answer in answers.items()}
        self._known.update(named)
        self._given_on.update(dict.fromkeys(named, self._machine))
        if self._file is None:
            return
        values = ({"measured_on": self._machine}, *([key, *answer] for key, answer in named.items()))
        append_lines(self._file, values, "answers")


def answers_path(model: dict[str, str], protocol: dict[str, Any]) -> Path:
    """Where the answers of a model (its digests) under a protocol are kept: SIGNBIT_CACHE, else ~/.cache/signbit."""
    return cache_folder() / "answers" / digest([model, protocol])[:32]


@dataclass(frozen=True)
class Encoder:
    """How texts become tokens: exactly as lm-eval 0.4 does it for Hugging Face decoders."""

    tokenizer: Any
    bos: Bos = "tokenizer"
    """tokenizer: special tokens as the tokenizer adds them. yes, no: the beginning-of-sequence token, or nothing."""

    def __post_init__(self) -> None:
        if self.bos == "yes" and self.tokenizer.bos_token_id is None:
            raise OptionError("--prompt-bos yes, but the tokenizer has no beginning-of-sequence token")
        if self.prefix is None:
            raise OptionError(
                "the tokenizer has neither a beginning- nor an end-of-sequence token, to score a text after"
            )

    @property
    def prefix(self) -> Any:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids of each text; all at once, which is many times faster."""
        beginning = self.tokenizer.decode(self.prefix)  # a text that spells the token out has it already
        by_tokenizer: dict[bool, list[str]] = {True: [], False: []}
        for text in dict.fromkeys(texts):
            by_tokenizer[self.bos == "tokenizer" and not text.startswith(beginning)].append(text)
        ids: dict[str, list[int]] = {}
        for special, some in by_tokenizer.items():
            if some:
                made = self.tokenizer(some, add_special_tokens=special, verbose=False).input_ids
                ids.update(zip(some, map(list, made), strict=True))
        if self.bos == "yes":
            bos = self.tokenizer.bos_token_id
            ids = {text: found if text.startswith(beginning) else [bos, *found] for text, found in ids.items()}
        return ids

    def __call__(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """Token ids of context and continuation, of each pair.

        A pair is tokenized as one text and cut where the context alone ends; blanks at the context's end go to the
        continuation, as words are tokenized with the blank before them. An empty context is one `prefix` token.
        """
        bare = [context.rstrip() for context, _ in pairs]
        ids = self._ids(t for b, (c, text) in zip(bare, pairs, strict=True) if b for t in (b, c + text))
        found = []
        for before, (context, continuation) in zip(bare, pairs, strict=True):
            if before:
                found.append((ids[before], ids[context + continuation][len(ids[before]) :]))
                continue
            alone = list(self.tokenizer.encode(context + continuation, add_special_tokens=False))
            found.append((alone[:1], alone[1:]) if alone[:1] == [self.prefix] else ([self.prefix], alone))
        return found

    def described(self) -> str:
        """What stands before a prompt, in words."""
        added = self._ids("a")["a"][: -len(self.tokenizer.encode("a", add_special_tokens=False))]
        names = " ".join(self.tokenizer.convert_ids_to_tokens(added))
        return f"{names} before each prompt" if added else "nothing before a prompt"


def positions(model: Any, tokenizer: Any) -> int:
    """The longest input of a model, found as lm-eval finds it: its configuration, else its tokenizer, else 2048."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    longest = getattr(tokenizer, "model_max_length", None)
    return int(longest) if longest is not None and longest < 1e12 else 2048


@dataclass
class _Row:
    """One input, and the pairs that it answers: those that differ in their last token alone share it."""

    ids: tuple[int, ...]
    asked: list[tuple[Pair, list[int]]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The first position whose prediction counts."""
        return min(len(self.ids) - len(continuation) for _, continuation in self.asked)


@dataclass(frozen=True)
class Scored:
    """The answers to all pairs, and how they came."""

    answers: dict[Pair, Answer]
    known: int
    """Pairs whose answers were on the disk."""
    truncated: int
    """Contexts that were cut on the left because the model has too few positions."""
    batch_tokens: int
    """Padded tokens of the largest batch allowed at the end."""


def score(
    model: Any,
    encoder: Encoder,
    pairs: Sequence[Pair],
    answers: Answers | None = None,
    processes: tuple[int, int] = (0, 1),
    progress: Progress = lambda done, total: None,
) -> Scored:
    """ln p(continuation | context) = Σ_t ln softmax(logits_t)[token_t] over the continuation's tokens, of each pair.

    As lm-eval's `hf` model computes it with softmax_dtype=float32: inputs in batches, the longest first, padded on the
    right (a decoder does not see it), contexts cut on the left to the model's positions. A batch begins at 65536 padded
    tokens on a GPU (2048 on a CPU) and is halved when memory runs out. Batches are cut from all pairs, whether answered
    or not, so that a run that goes on makes the same ones. `processes` is (place, number): each scores its share, all
    return all answers. Raises OptionError for a pair that cannot be scored, WeightError for logits that are NaN.
    """
    kept = Answers() if answers is None else answers
    unique = list(dict.fromkeys(pairs))
    found = {pair: answer for pair in unique if (answer := kept.get(pair)) is not None}
    known = len(found)
    limit = positions(model, encoder.tokenizer)
    budget = _CPU_TOKENS if next(model.parameters()).device.type == "cpu" else _DEVICE_TOKENS
    place, number = processes
    rows, truncated = _rows(encoder, unique, limit)
    mine = list(_batches(rows, budget))[place::number]
    waiting = deque(b for b in mine if any(pair not in found for row in b for pair, _ in row.asked))
    progress(known, len(unique))
    while waiting:
        batch = waiting.popleft()
        if len(batch) > 1 and _tokens(batch) > budget:
            waiting.extendleft([batch[len(batch) // 2 :], batch[: len(batch) // 2]])
            continue
        try:
            new = _answer(model, batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(batch) == 1:
                raise OptionError(
                    f"memory does not suffice for one text of {len(batch[0].ids)} tokens; take a smaller --dtype"
                ) from error
            budget = _tokens(batch) // 2
            torch.cuda.empty_cache()
            waiting.appendleft(batch)
            continue
        kept.add(new)
        found.update(new)
        progress(len(found), len(unique))
    if number > 1:  # also where all was known: another process may have begun before its answers were written
        for part in gather_object([found]):
            found.update(part)
    return Scored({pair: found[pair] for pair in unique}, known, truncated, budget)


def _rows(encoder: Encoder, pairs: Sequence[Pair], limit: int) -> tuple[list[_Row], int]:
    """The inputs of all pairs, the longest first, and how many pairs were cut to `limit` positions."""
    rows: dict[tuple[int, ...], _Row] = {}
    truncated = 0
    for pair, (context, continuation) in zip(pairs, encoder(pairs), strict=True):
        if not continuation or len(continuation) > limit:
            raise OptionError(
                f"the continuation {pair[1][:40]!r} has {len(continuation)} tokens; from 1 to the model's {limit} are allowed"
            )
        truncated += len(context) + len(continuation) - 1 > limit
        ids = tuple((context + continuation)[-(limit + 1) :][:-1])
        rows.setdefault(ids, _Row(ids)).asked.append((pair, continuation))
    return sorted(rows.values(), key=lambda row: (-len(row.ids), row.ids)), truncated


def _tokens(batch: Sequence[_Row]) -> int:
    return len(batch) * len(batch[0].ids)


def _batches(rows: Sequence[_Row], budget: int) -> Iterable[list[_Row]]:
    """Rows in order, as many as have `budget` tokens when padded to the first, which is the longest."""
    begin = 0
    while begin < len(rows):
        count = max(1, budget // len(rows[begin].ids))
        yield list(rows[begin : begin + count])
        begin += count


@torch.inference_mode()
def _answer(model: Any, batch: Sequence[_Row]) -> dict[Pair, Answer]:
    device = next(model.parameters()).device
    length = len(batch[0].ids)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    for place, row in enumerate(batch):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
    first = min(row.first for row in batch)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = length - first  # the head is a good part of a small model
    logits: Tensor = model(input_ids=ids.to(device), **options).logits
    first = length - logits.shape[1]
    pairs, sums, greedy = [], [], []
    for row, all_logits in zip(batch, logits, strict=True):
        end = len(row.ids) - first
        for pair, continuation in row.asked:
            predicted = torch.log_softmax(all_logits[end - len(continuation) : end], dim=-1, dtype=torch.float32)
            tokens = torch.tensor(continuation, device=device)
            pairs.append(pair)
            sums.append(predicted.gather(1, tokens[:, None]).sum())
            greedy.append((predicted.argmax(dim=-1) == tokens).all())
    values = torch.stack(sums)
    if bool(values.isnan().any()):
        raise WeightError("the model's logits are NaN, so that it answers nothing; repair the model")
    return dict(zip(pairs, zip(values.tolist(), torch.stack(greedy).tolist(), strict=True), strict=True))
