"""The model card (README.md) of a packed directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from signbit.format import Description, total_bytes
from signbit.linear import Int8Embedding, Int8Head, PackedLinear
from signbit.models import Report
from signbit.version import VERSION

#: What stands in the card's example for the place of the model, until it is pushed to one.
HERE = "PATH/OF/THIS/DIRECTORY"


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model in full precision: N·K for a packed matrix, shared tensors once."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += sum(w.out_features * w.in_features for w in module.weights)
        for name, parameter in module.named_parameters(recurse=False):
            scale = isinstance(module, (Int8Embedding, Int8Head)) and name == "scale"
            if id(parameter) not in seen and not scale:
                seen.add(id(parameter))
                total += parameter.numel()
    return total


def make_card(
    model: nn.Module, tensors: Mapping[str, Tensor], report: Report | None, base_model: str | None, command: str | None
) -> str:
    """Markdown with the base model, the command, true bits and what was done to each kind of layer."""
    description: Description = model.config.quantization_config.description  # type: ignore[union-attr, assignment]
    settings: dict[str, Any] = description.settings
    parameters = count_parameters(model)
    nbytes = total_bytes(tensors)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    entries = sum(w.out_features * w.in_features for module in packed for w in module.weights)
    packed_bytes = sum(module.nbytes for module in packed)
    hub_id = base_model is not None and base_model.count("/") == 1 and not Path(base_model).exists()
    front = ["---", "library_name: transformers", "tags: [signbit, 1-bit, quantized]"]
    if hub_id:
        front += [f"base_model: {base_model}", "base_model_relation: quantized"]
    lines = [
        *front,
        "---",
        f"# {(base_model or type(model).__name__).rstrip('/').rpartition('/')[2]}, packed by signbit",
        "",
        f"The linear layers of this {type(model).__name__} hold packed binary weights.",
        "",
        "```python",
        "import signbit",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{HERE}")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | {settings.get('method', 'unknown')} |",
        f"| options | {', '.join(f'{k}={v}' for k, v in settings.get('options', {}).items()) or 'none'} |",
        f"| bits per weight of the binarized layers, from bytes | {8 * packed_bytes / max(1, entries):.3f} |",
        f"| bits per parameter, all tensors | {8 * nbytes / parameters:.3f} |",
        f"| parameters | {parameters:,} |",
        f"| bytes of weights | {nbytes:,} |",
        f"| written by | signbit {VERSION} |",
    ]
    if command:
        lines += ["", "Made with:", "", "```", command, "```"]
    if report is not None:
        lines += [
            "",
            f"{report.share:.1%} of the repeated blocks' parameters are binarized "
            "(what was kept on request does not count).",
            "",
            "| layers | count | what | why | error | true bits |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {line.name} | {line.layers} | {line.action} | {line.why} | {line.error} | {line.bits} |"
            for line in report.summary()
        ]
    return "\n".join(lines) + "\n"


#: Between these lines of a model card stands what `signbit report` knows.
_BEGIN, _END = "<!-- signbit report -->", "<!-- end of signbit report -->"


def with_report(card: str, report: str) -> str:
    """`card` with `report` (Markdown) at its end, or in the place of an earlier one."""
    begin, end = card.find(_BEGIN), card.find(_END)
    before, behind = (card, "") if begin < 0 or end < begin else (card[:begin], card[end + len(_END) :])
    return f"{before.rstrip()}\n\n{_BEGIN}\n{report.strip()}\n{_END}\n{behind.lstrip()}".lstrip()
