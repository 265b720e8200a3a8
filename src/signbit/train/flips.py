"""How many signs of latents change: counted at each step of a run, and read from what it wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from signbit.errors import TrainingError
from signbit.models import kind_of
from signbit.train.checkpoints import METRICS, RUN, read_json, read_metrics
from signbit.train.divided import is_divided, local
from signbit.train.students import binary_layers

#: Entries of the latents that are looked at together.
_GROUP_ENTRIES = 1 << 26


class Flips:
    """Counts the signs of the latents that a step changes; of divided latents each process counts its part.

    Nothing is gathered: a step costs one pass over the latents where they lie, and a bool an entry is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(binary_layers(model))
        #: Layers of one shape together, because a small model's kernels are shorter than what their launch takes.
        self._groups: list[list[str]] = []
        self._before: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._sizes: dict[str, float] = {}
        #: Steps that are counted since `take`.
        self.steps = 0

    def _signs(self, group: list[str]) -> Tensor:
        """Where the latents of some layers are ≥ 0, bool [layers, …]."""
        latents = [local(self._layers[name].weight) for name in group]
        signs = torch.empty(len(group), *latents[0].shape, dtype=torch.bool, device=latents[0].device)
        for row, latent in zip(signs, latents, strict=True):
            torch.ge(latent, 0, out=row)
        return signs

    @torch.no_grad()
    def begin(self) -> None:
        """Counts from the signs on that there are now."""
        alike: dict[Any, list[str]] = {}
        for name, layer in self._layers.items():
            part = local(layer.weight)
            alike.setdefault((part.shape, part.device), []).append(name)
        self._groups = []
        for (shape, _), names in alike.items():
            most = max(1, _GROUP_ENTRIES // max(1, math.prod(shape)))
            self._groups += [names[i : i + most] for i in range(0, len(names), most)]
        self._before = [self._signs(group) for group in self._groups]
        self._counts = [signs.new_zeros(len(signs), dtype=torch.long) for signs in self._before]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Counts what changed since the last call, or since `begin`."""
        for place, group in enumerate(self._groups):
            signs = self._signs(group)
            self._counts[place] += (signs != self._before[place]).flatten(1).sum(1)
            self._before[place] = signs
        self.steps += 1

    def take(self) -> dict[str, float]:
        """Share of the signs of each layer that changed a step, on average over those counted; counts anew from here."""
        if not self._layers:
            return {}
        sizes = [signs[0].numel() for signs in self._before for _ in signs]
        counts = torch.stack([torch.cat(self._counts), self._counts[0].new_tensor(sizes)])
        if any(is_divided(layer.weight) for layer in self._layers.values()):
            counts = counts.to(
                PartialState().device
            )  # latents may be offloaded, where the GPUs' backend does not reach
            torch.distributed.all_reduce(counts)
        names = [name for group in self._groups for name in group]
        changed, entries = (dict(zip(names, row, strict=True)) for row in counts.tolist())
        self._sizes = {name: entries[name] for name in self._layers}
        shares = {name: changed[name] / max(entries[name] * self.steps, 1) for name in self._layers}
        self._counts, self.steps = [torch.zeros_like(count) for count in self._counts], 0
        return shares

    def share(self, by_layer: dict[str, float]) -> float:
        """Share of all signs, from the shares of the layers: their mean, weighted by size."""
        return sum(by_layer[name] * size for name, size in self._sizes.items()) / max(sum(self._sizes.values()), 1)


@dataclass(frozen=True)
class FlipHistory:
    """Which signs changed over a run; entry i of each list is of the steps from one line of metrics to the next.

    Source: FBI-LLM's analysis (arXiv 2407.07093), under its names.
    """

    step: list[int]
    """The last of those steps."""
    steps: list[int]
    """How many they are."""
    tokens: list[int]
    weights: dict[str, int]
    """Entries of each layer's latent matrix."""
    flip_rate: dict[str, list[float]]
    """Share of a layer's signs that changed a step."""
    ave_flip_rate: list[float]
    """Their mean, weighted by `weights`."""

    def mean(self, names: Iterable[str]) -> list[float]:
        """Share of the signs of some layers that changed a step, entry by entry."""
        chosen = list(names)
        size = sum(self.weights[name] for name in chosen)
        return [
            sum(self.flip_rate[name][i] * self.weights[name] for name in chosen) / size for i in range(len(self.step))
        ]

    def over_the_run(self, rates: Sequence[float]) -> float:
        """The average over all steps of shares a step."""
        return sum(rate * steps for rate, steps in zip(rates, self.steps, strict=True)) / sum(self.steps)

    def summary(self) -> list[tuple[str, int, int, float, float, float]]:
        """Kind of layer, how many, their signs, and the share that changed a step: at first, on average, at last."""
        kinds: dict[str, list[str]] = {}
        for name in self.weights:
            kinds.setdefault(kind_of(name), []).append(name)
        rows = []
        for kind, names in (*kinds.items(), ("all", list(self.weights))):
            rates = self.mean(names)
            weights = sum(self.weights[name] for name in names)
            rows.append((kind, len(names), weights, rates[0], self.over_the_run(rates), rates[-1]))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `flip_num` are the changes in all steps of an entry, a sign that changed twice counted twice."""
        layers = {
            name: {
                "weights": weights,
                "flip_rate": self.flip_rate[name],
                "flip_num": [
                    round(rate * weights * steps) for rate, steps in zip(self.flip_rate[name], self.steps, strict=True)
                ],
            }
            for name, weights in self.weights.items()
        }
        return {
            "step": self.step,
            "steps": self.steps,
            "tokens": self.tokens,
            "ave_flip_rate": self.ave_flip_rate,
            "layers": layers,
        }


def read_flips(run: str | Path) -> FlipHistory:
    """The flips of the run in the directory `run`, finished or not.

    Raises TrainingError for a directory that holds no run, for a run that has no line of metrics yet or no binary layer,
    and for one of an earlier signbit, which did not count at each step.
    """
    run = Path(run)
    if not (run / RUN).is_file():
        raise TrainingError(f"{run} holds no run; give the directory that a training was told to write (-o RUN)")
    written = (run / METRICS).is_file()
    lines = [line for line in read_metrics(run / METRICS) if "loss" in line] if written else []
    if not lines:
        raise TrainingError(f"{run / METRICS} has no line yet; wait for --log-every steps")
    if not all(line.get("flips_by_layer") for line in lines):
        raise TrainingError(f"{run} trains no binary layer, so that there are no signs to flip")
    if any("flip_steps" not in line for line in lines):
        raise TrainingError(
            f"{run / METRICS} is of an earlier signbit, which saw only what differed between two lines; train anew"
        )
    names = list(lines[0]["flips_by_layer"])
    decisions = read_json(run / RUN)["report"]["decisions"]
    weights = {decision["name"]: decision["weights"] for decision in decisions}
    return FlipHistory(
        [line["step"] for line in lines],
        [line["flip_steps"] for line in lines],
        [line["tokens"] for line in lines],
        {name: weights[name] for name in names},
        {name: [line["flips_by_layer"][name] for line in lines] for name in names},
        [line["flips"] for line in lines],
    )
