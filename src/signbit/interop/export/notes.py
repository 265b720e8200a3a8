"""What stands beside a GGUF file: a Modelfile for Ollama, and a README with the ways to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signbit.interop.export.ollama import Turns

_CONTEXT = 4096


@dataclass(frozen=True)
class Written:
    """The files of a GGUF export, and what is said of them."""

    model: str
    adapter: str | None
    kinds: tuple[str, ...]
    """GGUF's types of the layers that were binarized, the most frequent first."""
    bits: float
    """Bits per weight of the packed layers, from bytes, their shifts included."""
    whole: float
    """Bits per parameter of all tensors."""
    architecture: str
    context: int
    """Tokens that the model was made for."""
    chats: bool
    """Whether it has a chat template."""
    turns: Turns | None
    """What that puts around messages, where it is no more."""
    stops: tuple[str, ...]
    """Tokens that end an answer."""

    @property
    def is_dense(self) -> bool:
        """Whether none of the layers is stored in bits."""
        return not {"Q1_0", "TQ2_0"} & set(self.kinds)

    @property
    def num_ctx(self) -> int:
        """Tokens for which Ollama makes room, unless it is told otherwise."""
        return min(self.context, _CONTEXT)


def modelfile(files: Written) -> str:
    """For `ollama create NAME -f Modelfile`."""
    lines = [f"FROM ./{files.model}"]
    if files.adapter is not None:
        lines.append(f"ADAPTER ./{files.adapter}")
    if files.turns is not None:
        lines.append(f'TEMPLATE """{files.turns.go()}"""')
    lines.append(f"PARAMETER num_ctx {files.num_ctx}")
    lines += [f"PARAMETER stop {_quoted(token)}" for token in files.stops]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def readme(files: Written, settings: Mapping[str, Any], unfit: Mapping[str, str]) -> str:
    """The commands for llama.cpp, Ollama and LM Studio, and what is exact."""
    lora = f" --lora {files.adapter}" if files.adapter is not None else ""
    is_new = "Q1_0" in files.kinds
    lines = [
        f"# {files.model}",
        "",
        f"Made by signbit (method {settings.get('method', 'unknown')}). The layers that it binarized are stored as "
        f"{' and '.join(files.kinds)}{', dense' if files.is_dense else ''}: {files.bits:.3f} bits a weight. The whole has "
        f"{files.whole:.3f} bits a parameter. Both are counted from bytes.",
        "",
        "```",
        f"llama-server -m {files.model}{lora}",
        f"llama-cli -m {files.model}{lora} -p 'Once upon a time'",
        "ollama create NAME -f Modelfile && ollama run NAME",
        "```",
        "",
        "Q1_0 needs a llama.cpp that knows it; an older one, or a program built on one, says that the tensor type is unknown."
        if is_new else "Any llama.cpp of the last years reads it.",
        "",
        "**LM Studio**: put the file into its models folder as publisher/model/FILE.gguf, or `lms import FILE.gguf`"
        + ("; its runtime must be as new." if is_new else ".")
        + (" It loads no adapter: the shifts, and with them the model, need llama.cpp or Ollama." if lora else ""),
    ]  # fmt: skip
    if files.chats:
        lines += ["", _template_note(files)]
    if files.num_ctx < files.context:
        lines += [
            "",
            f"The model's context has {files.context} tokens. The Modelfile asks for {files.num_ctx}; num_ctx there, and -c of "
            "llama.cpp, take more, and memory with it.",
        ]
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


def _template_note(files: Written) -> str:
    in_file = "The chat template is in the GGUF file: LM Studio, and llama.cpp with --jinja, run it."
    if files.turns is None:
        return (
            f"{in_file} Ollama does not, and this one is more than texts around messages: write a TEMPLATE into the Modelfile "
            "before you chat there."
        )
    no_system = "" if files.turns.system is not None else ", without system messages, which it refuses"
    return f"{in_file} Ollama does not; TEMPLATE in the Modelfile is the same in its language{no_system}."
