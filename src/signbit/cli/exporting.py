"""`signbit export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from signbit.cli.output import Bars, note, quiet
from signbit.cli.parsing import parse
from signbit.errors import OptionError


@dataclass(frozen=True)
class ExportOptions:
    """Write a packed directory in another program's form (dense Hugging Face, GGUF for llama.cpp, transformers' bitnet)."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The packed directory."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Directory to write."""
    format: Literal["dense", "gguf", "bitnet"] | None = None
    """dense: 16 bits a weight, for any program. gguf: Q1_0 or TQ2_0, for llama.cpp. bitnet: ternary, for transformers alone."""
    approximate: bool = False
    """Where a layer does not fit: gguf, write it dense; dense, leave out that its activations have 8 bits."""
    approximate_type: Literal["f16", "q8_0"] = "f16"
    """gguf: what such a layer becomes."""
    type: Literal["auto", "q1_0", "tq2_0"] = "auto"
    """gguf: type of the packed layers; auto is Q1_0, and TQ2_0 where weights are ternary."""
    head: Literal["q8_0", "keep"] = "q8_0"
    """gguf: embedding and output head; keep leaves them as they are."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """dense and bitnet: of the tensors; auto is the model's own."""
    overwrite: bool = False
    """Replace DIR if it is a model directory."""


def export(argv: Sequence[str]) -> None:
    """`signbit export`."""
    args = parse("export", argv, ExportOptions)
    if args.out is None:
        raise OptionError("where to? give -o DIR")
    if args.format is None:
        raise OptionError("in which form? give --format dense, gguf or bitnet")
    from signbit.interop.export.request import ExportRequest
    from signbit.interop.export.run import export

    quiet()
    bars = Bars()
    request = ExportRequest(args.format, args.dtype, args.type, args.head, args.approximate, args.approximate_type)
    try:
        path = export(args.source, args.out, request, args.overwrite, bars, note)
    finally:
        bars.close()
    print(f"wrote {path}:")
    for file in sorted(path.iterdir()):
        print(f"  {file.name}")
