"""How a model writes text: many rows at once, drawn so that a seed means the same on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from signbit.errors import WeightError


def continued(model: Any, ids: Tensor, greedy: int, length: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of `length` tokens that go on from the rows of `ids` [B, 1]: the likeliest tokens up to `greedy`, then drawn ones.

    A token is where the sum of the probabilities before it passes a number of `generator`'s, which is on the CPU: a seed
    means the same on any device up to the model's own rounding, and a GPU waits for nothing.
    """
    rows = ids.new_empty(ids.shape[0], length)
    rows[:, :1] = ids
    chance = torch.rand(ids.shape[0], length, generator=generator).to(ids.device)
    cache, finite = None, torch.ones((), dtype=torch.bool, device=ids.device)
    for place in range(1, length):
        output = model(input_ids=rows[:, place - 1 : place], past_key_values=cache, use_cache=True)
        if cache is None:
            cache = _with_room(output.past_key_values, length)
        logits = output.logits[:, -1].float()
        finite &= logits.isfinite().all()
        if place <= greedy:
            rows[:, place] = logits.argmax(dim=-1)
        else:
            sums = logits.softmax(dim=-1).cumsum(dim=-1)
            # Not over all of it, which float32 need not sum to exactly 1.
            goal = chance[:, place : place + 1] * sums[:, -1:]
            rows[:, place] = torch.searchsorted(sums, goal, right=True)[:, 0].clamp_max(sums.shape[1] - 1)
    if not bool(finite):
        raise WeightError("the model's logits are NaN or infinite, so that it cannot write text; repair the model")
    return list(rows.cpu())


def _with_room(cache: Any, length: int) -> Any:
    """`cache` after its first token, whose plainly growing layers get room for `length`; others stay as they are.

    transformers' own copies all that a layer holds at each token, which for a thousand rows takes longer than the model.
    """
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ == "DynamicLayer":
            layer.update = _Room(layer, length).update
    return cache


class _Room:
    """Keys and values of one layer [B, heads, tokens, D], in tensors that are long enough from the start."""

    def __init__(self, layer: Any, length: int) -> None:
        self.layer = layer
        self.all = tuple(self._long(part, length) for part in (layer.keys, layer.values))

    @staticmethod
    def _long(held: Tensor, length: int) -> Tensor:
        room = held.new_empty(*held.shape[:-2], length, held.shape[-1])
        room[..., : held.shape[-2], :] = held
        return room

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin = self.layer.keys.shape[-2]
        end = begin + keys.shape[-2]
        for room, new in zip(self.all, (keys, values), strict=True):
            room[..., begin:end, :] = new
        self.layer.keys, self.layer.values = (room[..., :end, :] for room in self.all)
        return self.layer.keys, self.layer.values
