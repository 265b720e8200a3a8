"""Perplexity by protocols that have names."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from signbit.data import PROTOCOLS, Protocol, read_set, read_text_file
from signbit.data.tokens import document_windows, tokens
from signbit.errors import DataError, OptionError, WeightError
from signbit.evaluate.kept import KeptWindows
from signbit.linear import get_activations

#: Called after each window with (windows done, windows in all, perplexity so far).
Progress = Callable[[int, int, float], None]
_LOGIT_ROWS = 256


@dataclass(frozen=True)
class TextOptions:
    """How a text of one's own is cut; a named protocol fixes all of it."""

    window: int = 2048
    """Tokens a window."""
    stride: int | None = None
    """Tokens from one window to the next; the tokens shared with the window before are context only. Default: window."""
    bos: bool = False
    """Put the beginning-of-sequence token before each window, in place of one token of the text."""

    @property
    def step(self) -> int:
        """Tokens of the text from one window to the next."""
        return self.window - self.bos if self.stride is None else self.stride


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity, exp(mean negative log-likelihood in nats), and everything that it depends on."""

    protocol: str
    """The protocol's name, and in words where less than all of it was measured."""
    perplexity: float
    nll: float
    windows: int
    predicted_tokens: int
    window: int
    stride: int
    bos: bool
    source: str
    dtype: str
    device: str
    activations: str
    seconds_s: float
    """Of this run: windows that were kept took it none."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def _windows(ids: Tensor, window: int, stride: int, bos: int | None) -> list[tuple[Tensor, int]]:
    """Windows of `ids` and how many of their first tokens are context only; the rest after the last window is left."""
    body = window - (bos is not None)
    cut: list[tuple[Tensor, int]] = []
    for start in range(0, len(ids) - body + 1, stride):
        piece = ids[start : start + body]
        context = 0 if start == 0 else body - stride
        if bos is not None:
            piece = torch.cat([piece.new_tensor([bos]), piece])
            context += context > 0
        cut.append((piece, context))
    return cut


def window_nll(model: Any, ids: Tensor, context: int) -> tuple[float, int]:
    """Sum of −ln p over the predicted tokens of one window int64 [T], and their number."""
    with torch.inference_mode():
        return logits_nll(model(input_ids=ids[None], use_cache=False).logits[0], ids, context)


def logits_nll(logits: Tensor, ids: Tensor, context: int) -> tuple[float, int]:
    """The same of a window whose logits [T, vocabulary] are there."""
    logits, targets = logits[:-1], ids[1:]
    first = max(context - 1, 0)
    total = 0.0
    # In pieces: float32 copies of 2048 × 150k logits would take more memory than the model.
    for begin in range(first, len(targets), _LOGIT_ROWS):
        rows = slice(begin, begin + _LOGIT_ROWS)
        total += F.cross_entropy(logits[rows].float(), targets[rows], reduction="sum").item()
    return total, len(targets) - first


def check(
    name: str,
    data_dir: str | Path | None = None,
    options: TextOptions | None = None,
    max_windows: int | None = None,
) -> None:
    """Raises DataError or OptionError, before any model is loaded, if `name` and `options` cannot be measured."""
    protocol = PROTOCOLS.get(name)
    chosen = options or TextOptions()
    if protocol is None:
        read_text_file(name)
    elif chosen != TextOptions():
        raise OptionError(
            f"--window, --stride and --bos are for texts of your own; {name} is windows of {protocol.window} "
            "without a beginning-of-sequence token, else it would not be that protocol"
        )
    elif data_dir is not None:
        read_set(protocol, data_dir)
    room = chosen.window - chosen.bos
    if chosen.window < 2 or not 1 <= chosen.step <= room:
        raise OptionError(f"a window of {chosen.window} tokens needs 1 ≤ stride ≤ {room}; the stride is {chosen.step}")
    if max_windows is not None and max_windows < 1:
        raise OptionError(f"--max-windows is {max_windows}; at least 1 window is needed")


@dataclass(frozen=True)
class Windows:
    """A text as it is measured: its windows int64 [T], how many of their first tokens are context only, what it is."""

    label: str
    source: str
    options: TextOptions
    cut: tuple[tuple[Tensor, int], ...]

    def check_positions(self, model: Any) -> None:
        """Raises OptionError if the configuration of `model` has fewer positions than a window has tokens."""
        limit, window = getattr(model.config, "max_position_embeddings", None), self.options.window
        if limit is not None and window > limit:
            raise OptionError(
                f"the model has {limit} positions, fewer than the window of {window} tokens of {self.label}"
            )


def windows_of(
    name: str,
    tokenizer: Any,
    data_dir: str | Path | None = None,
    options: TextOptions | None = None,
    max_windows: int | None = None,
) -> Windows:
    """The windows of the protocol or file `name`; raises DataError or OptionError for texts and options that do not fit."""
    check(name, data_dir, options, max_windows)
    cut, label, source, chosen = _prepare(name, tokenizer, data_dir, options)
    if max_windows is not None and max_windows < len(cut):
        label = f"{label}, first {max_windows} of {len(cut)} windows"
        cut = cut[:max_windows]
    return Windows(label, source, chosen, tuple(cut))


def _prepare(
    name: str, tokenizer: Any, data_dir: str | Path | None, options: TextOptions | None
) -> tuple[list[tuple[Tensor, int]], str, str, TextOptions]:
    """Windows with their context, label, source and the options in force."""
    protocol: Protocol | None = PROTOCOLS.get(name)
    if protocol is None:
        chosen = options or TextOptions()
        text = read_text_file(name)
        joined, label = "\n\n".join(text.documents), Path(name).name
    else:
        chosen = TextOptions(window=protocol.window)
        text = read_set(protocol, data_dir)
        joined, label = (protocol.joiner or "").join(text.documents), name
        if len(text.documents) < protocol.documents:
            label = f"{name}, {len(text.documents)} of {protocol.documents} documents"
    bos = None
    if chosen.bos:
        bos = tokenizer.bos_token_id
        if bos is None:
            raise OptionError("--bos was asked for, but the tokenizer has no beginning-of-sequence token")
    if protocol is not None and protocol.random_windows is not None:
        count, generator = protocol.random_windows, random.Random(0)
        cut = document_windows(tokenizer, text.documents, count, chosen.window, generator)
        return [(piece, 0) for piece in cut], label, text.source, chosen
    ids = tokens(tokenizer, joined)
    if protocol is not None and protocol.max_tokens is not None:
        ids = ids[: protocol.max_tokens]
    windows = _windows(ids, chosen.window, chosen.step, bos)
    if not windows:
        raise DataError(
            f"{text.source} has {len(ids)} tokens, fewer than one window of {chosen.window}; use a smaller --window"
        )
    return windows, label, text.source, chosen


def perplexity(
    model: Any,
    tokenizer: Any,
    name: str,
    data_dir: str | Path | None = None,
    options: TextOptions | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
    processes: tuple[int, int] = (0, 1),
    kept: KeptWindows | None = None,
) -> Perplexity:
    """exp of the mean negative log-likelihood over the windows of a text, each window on its own.

    `name` is a protocol of `signbit.data.PROTOCOLS` or the path of a text or jsonl file; `options` are for the latter.
    `max_windows` stops early, and the result says so. `processes` is (place, number): each measures its share of the
    windows, all return the whole. Windows that are `kept` are not measured again, the others are added there. Raises
    DataError or OptionError for texts and options that do not fit, WeightError if the model's logits are NaN.
    """
    windows = windows_of(name, tokenizer, data_dir, options, max_windows)
    windows.check_positions(model)
    device, (place, number) = next(model.parameters()).device, processes
    begin, found = time.perf_counter(), Measured(windows)
    mine = range(place, len(windows.cut), number)
    for done, at in enumerate(mine, start=1):
        known = None if kept is None else kept.known.get(at)
        if known is None:
            ids, context = windows.cut[at]
            known = window_nll(model, ids.to(device), context)
        found.add(at, *known)
        if kept is not None and at not in kept.known:
            kept.add(at, *known)
        if progress is not None:
            progress(done, len(mine), found.perplexity)
    if number > 1:
        for part in gather_object([found.counts]):
            found.counts.update(part)
    return found.result(model, str(device), time.perf_counter() - begin)


class Measured:
    """What was found in some windows of a text, summed in their order whoever measured them."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.counts: dict[int, tuple[float, int]] = {}

    def add(self, window: int, nll: float, tokens: int) -> None:
        """The sum of −ln p over the `tokens` of a window; raises WeightError if it is NaN."""
        if nll != nll:
            raise WeightError(f"window {window + 1} of {self.windows.label}: the model's logits are NaN")
        self.counts[window] = nll, tokens

    def _sums(self) -> tuple[float, int]:
        total, count = 0.0, 0
        for _, (nll, predicted) in sorted(self.counts.items()):
            total, count = total + nll, count + predicted
        return total, count

    @property
    def perplexity(self) -> float:
        """That of the windows so far."""
        total, count = self._sums()
        return _exp(total / count)

    def result(self, model: Any, device: str, seconds_s: float) -> Perplexity:
        """The perplexity of all windows, and what it depends on."""
        total, count = self._sums()
        windows, chosen = self.windows, self.windows.options
        return Perplexity(
            windows.label, _exp(total / count), total / count, len(windows.cut), count, chosen.window, chosen.step,
            chosen.bos, windows.source, str(model.dtype).removeprefix("torch."), device, get_activations(model), seconds_s,
        )  # fmt: skip


def _exp(nll: float) -> float:
    """exp, infinite where a float64 is not enough."""
    return float(torch.tensor(nll, dtype=torch.float64).exp())
