"""What is asked of an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: Called with (stage, done, in all, name).
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What is written, and how; options that a form does not have stay at their defaults."""

    format: Literal["dense", "gguf", "bitnet"]
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    type: Literal["auto", "q1_0", "tq2_0"] = "auto"
    head: Literal["q8_0", "keep"] = "q8_0"
    approximate: bool = False
    approximate_type: Literal["f16", "q8_0"] = "f16"
