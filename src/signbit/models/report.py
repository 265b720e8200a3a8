"""What was done to each layer of a model, in words and numbers that the command prints and the model card keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from signbit.errors import StructureError


@dataclass(frozen=True)
class Decision:
    """One layer: what was done and why. `parameters` counts its weight and bias; `nbytes` is 0 unless packed."""

    name: str
    action: Literal["binarized", "int8", "kept"]
    why: str
    parameters: int
    nbytes: int = 0
    weights: int = 0
    """Entries of the binarized matrix, N·K; 0 unless binarized."""
    asked: bool = False
    """Kept on request, so that it does not count against the share binarized."""
    error: float | None = None
    """Share of the energy of the layer's output on calibration text (of its weights' without one) that is error, against
    the matrix that it was to come close to."""

    @property
    def bits_per_weight(self) -> float:
        """True bits of a binarized layer."""
        return 8 * self.nbytes / self.weights


def kind_of(name: str) -> str:
    """A layer's name with its block number replaced: 'model.layers.3.mlp.up_proj' → 'model.layers.*.mlp.up_proj'."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def bits_range(values: Iterable[float]) -> str:
    """'1.251', or '2.601–2.634' where layers of one kind differ."""
    low, high = f"{min(values := list(values)):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low}–{high}"


def error_range(values: Iterable[float | None]) -> str:
    """'1.2 %', '0.31–15 %' where layers of one kind differ, or nothing where no error is known."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    low, high = (f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in (min(known), max(known)))
    return f"{low} %" if low == high else f"{low}–{high} %"


@dataclass(frozen=True)
class Line:
    """Layers of one kind to which the same was done."""

    name: str
    layers: int
    action: str
    why: str
    bits: str
    error: str
    nbytes: int


@dataclass(frozen=True)
class Report:
    """All decisions on a model, in its own order, and the parameters of its repeated blocks."""

    decisions: tuple[Decision, ...]
    block_parameters: int

    @property
    def binarized(self) -> list[Decision]:
        """The decisions on layers that were binarized."""
        return [d for d in self.decisions if d.action == "binarized"]

    @property
    def share(self) -> float:
        """Binarized weights / parameters of the repeated blocks, what was kept on request left out of both."""
        asked = sum(d.parameters for d in self.decisions if d.asked)
        return sum(d.weights for d in self.binarized) / max(1, self.block_parameters - asked)

    @property
    def bits_per_weight(self) -> float:
        """True bits per binarized weight, over all binarized layers."""
        return 8 * sum(d.nbytes for d in self.binarized) / max(1, sum(d.weights for d in self.binarized))

    def summary(self) -> list[Line]:
        """The decisions, those that differ only in the block's number in one line."""
        kinds: dict[tuple[str, str, str], list[Decision]] = {}
        for decision in self.decisions:
            kinds.setdefault((kind_of(decision.name), decision.action, decision.why), []).append(decision)
        return [
            Line(
                same[0].name if len(same) == 1 else name, len(same), action, why,
                bits_range(d.bits_per_weight for d in same) if same[0].weights else "",
                error_range(d.error for d in same), sum(d.nbytes for d in same),
            )
            for (name, action, why), same in kinds.items()
        ]  # fmt: skip

    def require(self, share: float, allow_partial: bool) -> None:
        """Raises StructureError if less than `share` of the blocks was binarized and that was not allowed."""
        if self.share < share and not allow_partial:
            left = [f"{d.name} ({d.why})" for d in self.decisions if d.action == "kept" and not d.asked][:3]
            raise StructureError(
                f"only {self.share:.1%} of the repeated blocks' parameters would be binarized ({share:.0%} is expected); "
                f"left as they are, for example: {', '.join(left) or 'norms and biases'}. "
                "Use --allow-partial to accept that"
            )
