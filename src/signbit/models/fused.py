"""Projections that share one launch on a GPU: q, k, v and gate, up of a block, found by what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging

from signbit import ops
from signbit.errors import StructureError
from signbit.linear import PackedLinear, offloaded
from signbit.ops import Prepared, layout

logger = logging.get_logger(__name__)
DEVICE = "cuda"
#: More tokens are multiplied matrix by matrix: the launches no longer count, and each result lies in one piece.
MOST_TOKENS = 16


class Fused:
    """Layers that are given the same tensor, multiplied by one launch: [W₁; W₂; …]·x, cut into its parts.

    The layers keep their names, tensors and stored form; in the kernels' order their rows lie one after the other in one
    tensor, of which theirs are views. The first that meets an input multiplies for all, the others take their part.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self._layers = tuple(layers)
        self._rows = [layer.out_features for layer in layers]
        self._columns = layers[0].in_features
        self._last: tuple[Tensor, int, str, tuple[Tensor, ...]] | None = None  # input, its version, mode, results
        self._whole: Prepared | None = None
        self._multiply: ops.Multiplication | None = None

    def join(self) -> None:
        """Lays the matrices one after the other, once all are prepared on the same GPU."""
        chains = [layer.prepared for layer in self._layers]
        if self._whole is not None or any(len(chain) != 1 for chain in chains):
            return
        matrices = [chain[0] for chain in chains]
        if any(not _alike(one, other) for one, other in pairwise(matrices)) or not _on_gpu(matrices[0]):
            return
        signs = torch.cat([matrix.signs for matrix in matrices])
        scale = torch.cat([matrix.scale for matrix in matrices], dim=1)
        whole = matrices[0]._replace(signs=signs, scale=scale, shape=[sum(self._rows), *matrices[0].shape[1:]])
        byte = block = 0
        for layer, matrix in zip(self._layers, matrices, strict=True):
            size, blocks = matrix.signs.numel(), matrix.scale.shape[1]
            layer.lay_in(signs[byte : byte + size], scale[:, block : block + blocks])
            byte, block = byte + size, block + blocks
        if signs.is_cuda:
            # As in cuda.prepare: a kernel may read its weights before the work ahead of it has ended.
            torch.cuda.current_stream(signs.device).synchronize()
        self._whole, self._multiply = whole, ops.multiplication(whole)

    def part(self) -> None:
        """Each layer for itself again; the next `join` finds the tensors that they have then."""
        self._whole = self._multiply = self._last = None

    def __call__(self, layer: PackedLinear, x: Tensor, activations: str, as_op: bool) -> Tensor | None:
        """What `layer` makes of `x`, or None if it has to multiply for itself."""
        if self._whole is None or self._multiply is None or x.numel() > MOST_TOKENS * self._columns:
            return None
        # What is traced has no versions, but was found to be given to all as it is (`find_siblings`).
        if not as_op and x.is_inference():
            return None
        version = 0 if as_op else x._version
        last = self._last
        if last is None or last[0] is not x or last[1:3] != (version, activations):
            y = ops.prepared_linear(x, self._whole, activations) if as_op else self._multiply(x, activations)
            last = (x, version, activations, y.split(self._rows, dim=-1))
        # The last one leaves nothing behind that would keep memory.
        self._last = None if layer is self._layers[-1] else last
        part = next(part for other, part in zip(self._layers, last[3], strict=True) if other is layer)
        return part if layer.bias is None else (part + layer.bias).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # As the layers, which give their copies the stored form.
        return {**self.__dict__, "_whole": None, "_multiply": None, "_last": None}


def fuse_(model: nn.Module) -> None:
    """Lets the packed layers on a GPU that are given the same tensor share a launch; `find_siblings` finds them.

    Where it cannot, a warning says why: each has a launch of its own then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not any(map(_on_gpu, (matrix for layer in layers.values() for matrix in layer.prepared))):
        return
    try:
        groups = find_siblings(model)
    except StructureError as error:
        logger.warning_once(f"signbit: {error}")
        return
    for names in groups:
        some = [layers[name] for name in names]
        if _may_share(some):
            fused = Fused(some)
            for layer in some:
                layer.fused = fused
            fused.join()


def find_siblings(model: nn.Module) -> list[list[str]]:
    """Names of the packed layers that are given the very same tensor, in the order in which they are called.

    One token goes through the model as a fake tensor: shapes without values, nothing is computed. Raises StructureError if a
    model cannot be followed so, because its way depends on values, or because parts of it are offloaded: what brings
    them would put fake tensors in their place.
    """
    if any(map(offloaded, model.modules())):
        raise StructureError("parts of the model are offloaded: no projections share a launch")
    given: dict[tuple[int, int], list[str]] = {}
    kept: list[Tensor] = []  # lest an id is given twice

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            kept.append(arguments[0])
            given.setdefault((id(arguments[0]), arguments[0]._version), []).append(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    ]
    device = next(iter(model.parameters())).device
    was_training = model.training
    try:
        model.eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    except Exception as error:
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StructureError(
            f"one token cannot be followed through the model: no projections share a launch ({what})"
        ) from error
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()
    return [names for names in given.values() if len(names) > 1 and len(set(names)) == len(names)]


def _may_share(layers: Sequence[PackedLinear]) -> bool:
    """Whether the layers differ in nothing but rows, as far as that does not change with their device."""
    *others, last = layers
    return all(
        layer.norm_in == layer.norm_out == "none" and layer.act_bits == last.act_bits for layer in layers
    ) and all(layer.out_features % layout.BLOCK_ROWS == 0 for layer in others)


def _on_gpu(matrix: Prepared) -> bool:
    # The CPU's order does not keep the rows of more than 1024 columns together, and a call costs less there.
    return matrix.signs.device.type == DEVICE


def _alike(one: Prepared, other: Prepared) -> bool:
    """Whether two prepared matrices may lie one after the other: one plane, a scale a row or group, no other terms."""
    plain = all(matrix.shape[3] == matrix.shape[4] == matrix.shape[5] == 1 for matrix in (one, other))
    lone = all(term is None for matrix in (one, other) for term in matrix[2:-1])
    same = one.shape[1:] == other.shape[1:] and one.scale.dtype is other.scale.dtype
    return plain and lone and same and one.signs.device == other.signs.device
