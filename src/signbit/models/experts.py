"""Mixtures of experts whose weights transformers fuses into 3-D parameters, taken apart into one linear an expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from signbit.errors import StructureError


def fused_experts(module: nn.Module) -> list[str]:
    """The names of the 3-D parameters of `module` that hold one matrix an expert; empty for any other module."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return [] if convolution else [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]


def is_fused(module: nn.Module) -> bool:
    """Whether `module` is a fused mixture."""
    return bool(fused_experts(module))


def expert_names(name: str, fused: nn.Module) -> list[str]:
    """The names that the linears of the fused module `name` have once it is taken apart."""
    return [f"{name}.{which}.{e}" for which in fused_experts(fused) for e in range(len(getattr(fused, which)))]


class Experts(nn.Module):
    """The experts of a mixture as lists of linear layers: y = Σₑ wₑ · downₑ(gate(gate_upₑ(x))) over a token's experts.

    Made of a fused module of transformers ≥ 5 (its experts interface), whose matrices it takes over as views and whose
    activation it keeps. `forward` takes hidden states [T, K], the indices of each token's experts [T, k] and their
    weights [T, k]. The lists' members may be replaced by any layer of the same widths.

    Raises StructureError for a fused module that does not follow the interface (post norms, other parameters).
    """

    def __init__(self, name: str, fused: nn.Module) -> None:
        super().__init__()
        found = set(fused_experts(fused))
        first = "gate_up_proj" if getattr(fused, "has_gate", True) else "up_proj"
        if found != {first, "down_proj"} or getattr(fused, "has_post_expert_norm", False):
            raise StructureError(
                f"{name} is a {type(fused).__name__} with the 3-D parameters {', '.join(sorted(found))}; only experts "
                "that follow the interface of transformers 5 (gate_up_proj and down_proj, no norm after them) are "
                "taken apart. Keep them with --keep, or use another model"
            )
        self.first = first
        for which in (first, "down_proj"):
            self.add_module(which, nn.ModuleList(_take_apart(fused, which)))
            del fused._parameters[which]
            fused._parameters.pop(f"{which}_bias", None)
        self.gated = first == "gate_up_proj"
        # What is left of the fused module: its activation, and the gate that some families write themselves. In a
        # tuple, because transformers would initialize the parameters that a registered one no longer has.
        self._rest: tuple[Any] = (fused,)

    def extra_repr(self) -> str:
        return f"{len(self.down_proj)} experts"  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first: Any = getattr(self, self.first)
        down: Any = self.down_proj
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= len(down):  # transformers marks a place without an expert by the number after the last
                continue
            token, place = torch.where(top_k_index == expert)
            inner = first[expert](hidden_states[token])
            inner = self._rest[0]._apply_gate(inner) if self.gated else self._rest[0].act_fn(inner)
            weighted = down[expert](inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result


def _take_apart(fused: nn.Module, which: str) -> list[nn.Linear]:
    weights, biases = getattr(fused, which), getattr(fused, f"{which}_bias", None)
    layers = []
    for expert, stored in enumerate(weights):
        weight = stored.T if getattr(fused, "is_transposed", False) else stored
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=weights.requires_grad)
        if biases is not None:
            layer.bias = nn.Parameter(biases[expert], requires_grad=biases.requires_grad)
        layers.append(layer.train(fused.training))
    return layers
