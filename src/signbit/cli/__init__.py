"""The command line: one command a verb, each generated from a frozen dataclass; torch is imported by a verb's body."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from signbit.cli.data import DataOptions, data
from signbit.cli.exporting import ExportOptions, export
from signbit.cli.importing import ImportOptions, import_checkpoint
from signbit.cli.measuring import DoctorOptions, EvalOptions, InfoOptions, MemoryOptions, doctor, evaluate, info, memory
from signbit.cli.publishing import PushOptions, push
from signbit.cli.quantizing import QuantizeOptions, quantize
from signbit.cli.reporting import CompareOptions, DiffOptions, ReportOptions, compare, diff, report
from signbit.cli.running import ChatOptions, PromptOptions, ServeOptions, chat, generate, serve
from signbit.cli.training import (
    DistillOptions,
    FinetuneOptions,
    FlipsOptions,
    PackOptions,
    PretrainOptions,
    distill,
    finetune,
    flips,
    pack,
    pretrain,
)
from signbit.errors import SignbitError
from signbit.version import VERSION

#: Exit statuses: 1 an error that a message explains, 2 a command line that does not parse, 130 Ctrl-C.
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


VERBS: dict[str, tuple[Callable[[Sequence[str]], None], type]] = {
    "quantize": (quantize, QuantizeOptions),
    "import": (import_checkpoint, ImportOptions),
    "distill": (distill, DistillOptions),
    "finetune": (finetune, FinetuneOptions),
    "pretrain": (pretrain, PretrainOptions),
    "pack": (pack, PackOptions),
    "flips": (flips, FlipsOptions),
    "data": (data, DataOptions),
    "info": (info, InfoOptions),
    "memory": (memory, MemoryOptions),
    "eval": (evaluate, EvalOptions),
    "report": (report, ReportOptions),
    "compare": (compare, CompareOptions),
    "diff": (diff, DiffOptions),
    "generate": (generate, PromptOptions),
    "chat": (chat, ChatOptions),
    "serve": (serve, ServeOptions),
    "export": (export, ExportOptions),
    "push": (push, PushOptions),
    "doctor": (doctor, DoctorOptions),
}


def _help() -> str:
    lines = [f"  {verb:10} {options.__doc__}" for verb, (_, options) in VERBS.items()]
    return "\n".join(
        [
            "usage: signbit VERB ...   (signbit VERB --help lists the options of a verb)",
            "",
            "1-bit language models: made from any Hugging Face decoder, packed, run and measured.",
            "",
            *lines,
            "",
            "  --version  Show the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else EXIT_USAGE
    if argv[0] in ("--version", "version"):
        print(f"signbit {VERSION}")
        return 0
    if argv[0] not in VERBS:
        print(
            f"signbit: there is no verb {argv[0]!r}; there are {', '.join(VERBS)} (see signbit --help)", file=sys.stderr
        )
        return EXIT_USAGE
    try:
        VERBS[argv[0]][0](argv[1:])
    except SignbitError as error:
        print(f"signbit: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        resumes = {
            "quantize": "; the same command goes on at the last finished block",
            "distill": "; with --resume it goes on at the last checkpoint",
            "finetune": "; with --resume it goes on at the last checkpoint",
            "pretrain": "; with --resume it goes on at the last checkpoint",
            "data": "; the same command goes on with what is written",
            "push": "; the same command uploads what the hub has not got yet",
            "report": "; the same command goes on with what is measured",
            "compare": "; the same command goes on with what is measured",
            "eval": "; the same command goes on with the windows and answers that are written",
        }
        resume = resumes.get(argv[0], "")
        print(f"signbit: interrupted{resume}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_ERROR
    return 0
