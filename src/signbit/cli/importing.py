"""`signbit import`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from signbit.cli.output import Bars, note, print_report, quiet
from signbit.cli.parsing import parse
from signbit.errors import OptionError


@dataclass(frozen=True)
class ImportOptions:
    """Make a packed directory of another program's 1-bit checkpoint (FBI-LLM, OneBit, BitNet, PB-LLM, GGUF)."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Directory of the checkpoint, or a GGUF file; its form is told by what is in it."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """Directory to write."""
    tokenizer: str | None = None
    """Directory or hub id to take the tokenizer from, where SRC has none."""
    masks: str | None = None
    """PB-LLM's mask files (gptq_pb/outputs/mask), which its dense saves need."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What everything but signs is stored in; auto keeps what the checkpoint has, and loses nothing."""
    overwrite: bool = False
    """Replace OUT if it is a model directory."""


def import_checkpoint(argv: Sequence[str]) -> None:
    """`signbit import`."""
    args = parse("import", argv, ImportOptions)
    if args.out is None:
        raise OptionError("where to? give -o OUT")
    from signbit.interop.convert import convert

    quiet()
    bars = Bars()
    command = shlex.join(["signbit", "import", *argv])
    try:
        path, report = convert(
            args.source, args.out, args.masks, args.tokenizer, args.dtype, args.overwrite, command, bars, note
        )  # fmt: skip
    finally:
        bars.close()
    print_report(report)
    print(f"wrote {path}; see `signbit info {args.out}`")
