"""`signbit data`: what a student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from signbit.cli.output import Bars, byte_text, quiet
from signbit.cli.parsing import parse
from signbit.errors import OptionError


@dataclass(frozen=True)
class DataOptions:
    """Make what a student learns from: text that a model writes, or a teacher's logits (signbit data KIND --help)."""

    kind: Annotated[
        tyro.conf.Positional[Literal["self-generate", "teacher-logits"]],
        tyro.conf.arg(metavar="{self-generate,teacher-logits}"),
    ]
    """self-generate MODEL -o DATA.tokens: text. teacher-logits TEACHER -o FILE.logits --data SOURCE: what it answers."""


@dataclass(frozen=True)
class SelfGenerateOptions:
    """Let a model write the text that a student of it learns from: signbit data self-generate MODEL -o DATA.tokens."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """The model that writes: the later teacher."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DATA")]
    """File to write, NAME.tokens; the same command goes on with an unfinished one."""
    sequences: int = 132000
    """Sequences (OneBit: 132000)."""
    sequence_length: int = 2048
    """Tokens a sequence."""
    batch: int = 32
    """Sequences that are written at a time."""
    seed: int = 0
    """Seed of first tokens and sampling."""
    device: str = "cpu"
    """Device of torch: cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of the model; auto is float32 on a CPU and as stored elsewhere."""


@dataclass(frozen=True)
class TeacherLogitsOptions:
    """Ask a teacher once about all of a text, and keep what it answers: signbit data teacher-logits TEACHER -o FILE.logits."""

    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")]
    """Hugging Face model directory or hub id, or a packed model."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """File to write, NAME.logits; the same command goes on with an unfinished one."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text, as signbit distill has it; weights mean nothing here; may be repeated."""
    sequence_length: int = 1024
    """Tokens a block: the --sequence-length of the run that learns from it."""
    top: int = 64
    """How many of the likeliest tokens are kept; each takes four bytes (six, of more than 65536 tokens)."""
    batch: int = 8
    """Blocks that are asked about at a time."""
    device: str = "cpu"
    """Device of torch: cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of the teacher; auto is float32 on a CPU and as stored elsewhere."""
    data_dir: str | None = None
    """Directory of local copies of named sets in place of the hub."""
    cache: str | None = None
    """Directory in which tokenized text is kept and found again; default: data, beside FILE."""


def data(argv: Sequence[str]) -> None:
    """`signbit data`."""
    if argv and argv[0] in _DATA:
        _DATA[argv[0]](argv[1:])
        return
    if argv and argv[0] in ("-h", "--help"):
        parse("data", argv, DataOptions)
    raise OptionError(
        "signbit data makes what a student learns from: signbit data self-generate MODEL -o DATA.tokens, or "
        "signbit data teacher-logits TEACHER -o FILE.logits --data SOURCE"
    )


def self_generate(argv: Sequence[str]) -> None:
    """`signbit data self-generate`."""
    args = parse("data self-generate", argv, SelfGenerateOptions)
    from signbit.data import self_generate as write
    from signbit.hub.load import load_any, load_tokenizer

    quiet()
    model, tokenizer = load_any(args.model, args.dtype, args.device), load_tokenizer(args.model)
    bars = Bars()
    try:
        made = write(
            model, tokenizer, args.out, args.sequences, args.sequence_length, args.batch, args.seed,
            lambda done, total: bars("writing", done, total, ""),
        )  # fmt: skip
    finally:
        bars.close()
    print(f"{made.path}: {made.documents:,} sequences, {made.tokens:,} tokens; learn from it: --data {made.path}")


def teacher_logits(argv: Sequence[str]) -> None:
    """`signbit data teacher-logits`."""
    args = parse("data teacher-logits", argv, TeacherLogitsOptions)
    if not args.data:
        raise OptionError(
            "what is the teacher asked about? give --data FILE (.txt, .jsonl, .parquet, .tokens), or a named set"
        )
    from signbit.hub.distill import teacher_logits as write

    quiet()
    bars = Bars()
    try:
        made = write(
            args.teacher, args.data, args.out, args.sequence_length, args.top, args.batch, args.device, args.dtype,
            args.data_dir, args.cache, bars.tokenizing, lambda done, total: bars("asking", done, total, ""),
        )  # fmt: skip
    finally:
        bars.close()
    print(
        f"{made.path}: the {made.top} likeliest of {made.vocabulary} tokens behind each of {made.blocks * made.length:,}, "
        f"{byte_text(made.path.stat().st_size)}; learn from it: --teacher-logits {made.path} --sequence-length {made.length}"
    )


#: What `signbit data` makes.
_DATA = {"self-generate": self_generate, "teacher-logits": teacher_logits}
