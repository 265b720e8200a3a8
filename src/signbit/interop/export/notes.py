"""What stands beside a GGUF file: a Modelfile for Ollama, and a README with the ways to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signbit.interop.export.vocabulary import Vocabulary


@dataclass(frozen=True)
class Written:
    """The files of a GGUF export, and what is said of them."""

    model: str
    adapter: str | None
    kind: str
    bits: float
    """Bits per weight of the packed layers, from bytes, their shifts included."""
    whole: float
    """Bits per parameter of all tensors."""
    words: Vocabulary
    architecture: str


def modelfile(files: Written, context: int) -> str:
    """For `ollama create NAME -f Modelfile`; Ollama finds the chat template in the GGUF file."""
    lines = [f"FROM ./{files.model}"]
    if files.adapter is not None:
        lines.append(f"ADAPTER ./{files.adapter}")
    lines.append(f"PARAMETER num_ctx {min(context, 4096)}")
    if "eos" in files.words.special:
        lines.append(f'PARAMETER stop "{files.words.tokens[files.words.special["eos"]]}"')
    return "\n".join(lines) + "\n"


def readme(files: Written, settings: Mapping[str, Any], unfit: Mapping[str, str]) -> str:
    """The commands for llama.cpp, Ollama and LM Studio, and what is exact."""
    lora = f" --lora {files.adapter}" if files.adapter is not None else ""
    lines = [
        f"# {files.model}",
        "",
        f"Made by signbit (method {settings.get('method', 'unknown')}). The binarized layers have {files.bits:.3f} bits a "
        f"weight, the whole has {files.whole:.3f} bits a parameter, both counted from bytes.",
        "",
        "```",
        f"llama-server -m {files.model}{lora}",
        f"llama-cli -m {files.model}{lora} -p 'Once upon a time'",
        "ollama create NAME -f Modelfile && ollama run NAME",
        "```",
        "",
        f"{files.kind} needs a llama.cpp that knows it; an older one, or a program built on one, says that the tensor type is "
        "unknown." if files.kind == "Q1_0" else "Any llama.cpp of the last years reads it.",
        "",
        "**LM Studio**: put the file into its models folder as publisher/model/FILE.gguf, or `lms import FILE.gguf`; its "
        "runtime must be as new. " + ("It loads no adapter: the shifts, and with them the model, need llama.cpp or Ollama."
                             if files.adapter is not None else ""),
    ]  # fmt: skip
    if files.adapter is not None:
        lines += [
            "",
            f"**{files.adapter} belongs to the model.** It holds the shifts of its weights; without it answers are wrong.",
        ]
    if unfit:
        name, reason = next(iter(unfit.items()))
        lines += [
            "",
            f"{len(unfit)} layers are dense: no 1-bit type of GGUF holds them exactly ({name}: {reason}).",
        ]
    return "\n".join(lines).rstrip() + "\n"
