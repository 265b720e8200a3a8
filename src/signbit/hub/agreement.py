"""How near a model's answers are to its teacher's: KL divergence and the share of equal first choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit.data import (
    PROTOCOLS,
    Blocks,
    Source,
    TaughtBlocks,
    TokenFile,
    parse_source,
    read_teacher_logits,
    token_file,
)
from signbit.data import write_teacher_logits as write
from signbit.data.corpus import file_digest
from signbit.errors import DataError, OptionError, StructureError, WeightError
from signbit.evaluate.kept import cache_folder, digest
from signbit.evaluate.machines import forced_kernels
from signbit.hub.subject import Where
from signbit.train.objectives import Top, kl_divergence, top_kl_divergence
from signbit.version import VERSION

#: Called with (blocks done, blocks in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Agreement:
    """Means over all tokens of whole blocks of a text."""

    kl: float
    """KL(teacher ‖ model) in nats a token."""
    top1: float
    """Share of the tokens behind which both think the same token likeliest."""
    tokens: int
    block: int
    """Tokens a block; each is read on its own."""
    source: str
    outcomes: int
    """Tokens that the KL tells apart: the teacher's likeliest; the others are one outcome, so that it is a lower bound."""
    mass: float
    """What of the teacher's probability is on these."""
    teacher: str
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False).logits[0]
    if not bool(logits.isfinite().all()):
        raise WeightError("the model's logits are NaN or infinite, so that they agree with nothing; repair the model")
    return logits


def _averaged(rows: list[tuple[float, float, float, int]]) -> tuple[float, float, float, int]:
    tokens = sum(row[3] for row in rows)
    kl, same, mass = (sum(row[place] for row in rows) / tokens for place in range(3))
    return max(kl, 0.0), same, mass, tokens  # of equal models rounding can leave less than nothing


def text_tokens(tokenizer: Any, text: str, data_dir: str | None, limit: int) -> TokenFile:
    """The first `limit` tokens of a named set or a file, kept where measurements are."""
    folder, protocol = cache_folder() / "tokens", PROTOCOLS.get(text)
    if protocol is not None and protocol.hub is None:  # it lies in the package
        with as_file(files("signbit.data").joinpath("texts", protocol.local[0])) as path:
            return replace(token_file(tokenizer, Source(str(path), 1.0, limit), folder), source=text)
    source = parse_source(text)
    return token_file(tokenizer, replace(source, max_tokens=source.max_tokens or limit), folder, data_dir)


def check_block(config: Any, file: TokenFile, length: int) -> None:
    """Raises OptionError or DataError if a model of this configuration, or the text, has no block of `length` tokens."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise OptionError(f"--block is {length} tokens, and the model has {limit} positions; give a smaller one")
    if file.tokens < length:
        raise DataError(
            f"{file.source} has {file.tokens} tokens, fewer than one block of {length}; give a longer text, or a smaller "
            "--block"
        )


def _blocks(model: Any, file: TokenFile, length: int) -> Blocks:
    check_block(model.config, file, length)
    return Blocks([file], length)


@torch.inference_mode()
def agreement(
    model: Any,
    teacher: Callable[[], Any],
    teacher_sha256: str,
    teacher_name: str,
    file: TokenFile,
    length: int = 512,
    outcomes: int = 1024,
    progress: Progress = lambda done, total: None,
    where: Where | None = None,
    again: bool = False,
) -> Agreement:
    """`model` beside the answers of a teacher to whole blocks of `length` tokens, which are asked for once and kept.

    KL over the teacher's `outcomes` likeliest tokens and "any other" (`top_kl_divergence`, of float16 log-probabilities:
    of a model and itself it is some 1e-5). `teacher` loads the model whose hash is `teacher_sha256`, which runs as `where`
    says; it is not called if answers that it gave so, to this version of signbit and by the same kernels where
    SIGNBIT_CPU or SIGNBIT_CUDA name them, are there, unless `again`.
    Raises DataError if the text is shorter than a block, OptionError if the model's positions are fewer, StructureError
    for another vocabulary.
    """
    blocks = _blocks(model, file, length)
    vocabulary = _logits(model, blocks[0]["input_ids"][:1]).shape[-1]
    top = min(outcomes, vocabulary)
    path = _answers(teacher, teacher_sha256, file, length, top, progress, where or Where(), again)
    taught = TaughtBlocks(blocks, read_teacher_logits(path))
    if taught.logits.vocabulary != vocabulary:
        raise StructureError(
            f"{teacher_name} answers with {taught.logits.vocabulary} tokens and the model with {vocabulary}; compare models "
            "of one vocabulary"
        )
    rows = []
    for index in range(len(blocks)):
        item = taught[index]
        logits = _logits(model, item["input_ids"]).float()
        ids, log_p = item["top_ids"].to(logits.device), item["top_log_p"].to(logits.device).float()
        kl = top_kl_divergence(logits, Top(ids, log_p))
        same = logits.argmax(dim=-1) == ids[:, 0]
        mass = log_p.exp().sum(-1).clamp_max(1)
        rows.append((kl.sum().item(), same.sum().item(), mass.sum().item(), len(ids)))
        progress(index + 1, len(blocks))
    mean_kl, top1, on_top, tokens = _averaged(rows)
    return Agreement(
        mean_kl, top1, tokens, length, file.source, top, on_top, teacher_name, str(model.dtype).removeprefix("torch."),
        next(model.parameters()).device.type,
    )  # fmt: skip


def _answers(
    teacher: Callable[[], Any], sha256: str, file: TokenFile, length: int, top: int, progress: Progress, where: Where,
    again: bool,
) -> Path:  # fmt: skip
    """The file of the teacher's answers, made unless it is there, or `again`."""
    key = digest(
        [sha256, {**asdict(where), **forced_kernels()}, VERSION, file.tokenizer, file_digest(file.path), length, top]
    )
    path = cache_folder() / "teachers" / f"{key[:32]}.logits"
    if again:
        path.unlink(missing_ok=True)
    if not path.exists():
        write(teacher(), sha256, [file], path, length, top, batch=1, progress=progress)
    return path


@torch.inference_mode()
def exact_agreement(
    model: Any,
    reference: Any,
    name: str,
    file: TokenFile,
    length: int = 512,
    progress: Progress = lambda done, total: None,
) -> Agreement:
    """`model` beside `reference`, both in memory: KL(reference ‖ model) over the whole vocabulary.

    Raises as `agreement` does.
    """
    blocks = _blocks(model, file, length)
    rows = []
    for index in range(len(blocks)):
        ids = blocks[index]["input_ids"]
        mine, its = _logits(model, ids).float(), _logits(reference, ids).float()
        if mine.shape != its.shape:
            raise StructureError(
                f"{name} answers with {its.shape[-1]} tokens and the model with {mine.shape[-1]}; compare models of one "
                "vocabulary"
            )
        same = mine.argmax(dim=-1) == its.to(mine.device).argmax(dim=-1)
        kl = kl_divergence(mine, its.to(mine.device))
        rows.append((kl.sum().item(), same.sum().item(), float(len(ids)), len(ids)))
        progress(index + 1, len(blocks))
    mean_kl, top1, on_top, tokens = _averaged(rows)
    return Agreement(
        mean_kl, top1, tokens, length, file.source, mine.shape[-1], on_top, name, str(model.dtype).removeprefix("torch."),
        next(model.parameters()).device.type,
    )  # fmt: skip
