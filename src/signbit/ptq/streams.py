"""The inputs of each block, as the model's own forward hands them over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from signbit.errors import WeightError

Where = Literal["device", "cpu", "disk"]


#: Windows that go through a block together, by whether that is on a CPU: a GPU is idle between the kernels of one.
BATCH = {True: 1, False: 8}


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class Stream:
    """Calibration windows on their way through the blocks of a model, one block at a time.

    `run(i, window)` calls the model's own forward: blocks before i give back what block i − 1 last returned for these
    windows, block i runs on what the model then hands it, and the pass ends there. So every block gets its own
    positional and keyword arguments (masks, positions, caches by layer type), none of them guessed or stored.

    `windows` int64 [samples, T], of which `batch` (default: `BATCH`) go together; what a block returns is kept per batch
    on the `device`, the `cpu`, or the disk under `folder`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        windows: Tensor,
        device: str,
        where: Where,
        folder: Path | None,
        batch: int | None = None,
    ) -> None:
        self._model, self._blocks = model, blocks
        self._batches = windows.split(batch or BATCH[torch.device(device).type == "cpu"])
        self._device, self._where, self._folder = device, where, folder
        self._kept: dict[int, list[Any]] = {}
        self._spec: TreeSpec | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._batches)

    def run(self, index: int, batch: int, keep: bool = False) -> None:
        """One batch of windows through block `index`, whose hooks see it; with `keep`, for the next block to begin from.

        Raises WeightError if the block returns a value that is not finite.
        """
        block = self._blocks[index]
        result: list[Any] = []

        def last(_module: nn.Module, _args: Any, output: Any) -> None:
            result.append(output)
            raise Stop

        before = self._load(batch) if index else None
        with ExitStack() as stack:
            for earlier in self._blocks[:index]:
                stack.enter_context(_replaying(earlier, before))
            stack.callback(block.register_forward_hook(last).remove)
            with suppress(Stop):
                self._model(input_ids=self._batches[batch].to(self._device), use_cache=False)
        if keep and result:
            self._save(batch, result[0])

    def finish(self, batch: int) -> Any:
        """What the model makes of one batch in the end: its own forward, after what the last block returned."""
        output = self._load(batch)
        with ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(_replaying(block, output))
            return self._model(input_ids=self._batches[batch].to(self._device), use_cache=False)

    def _save(self, batch: int, output: Any) -> None:
        leaves, self._spec = tree_flatten(output)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()):
                raise WeightError("its output overflows or is NaN on the calibration text")
        if self._where == "disk":
            assert self._folder is not None
            tensors = {str(i): leaf.contiguous() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            save_file(tensors, self._folder / f"{batch}.safetensors")
            leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        elif self._where == "cpu":
            leaves = [leaf.to("cpu") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._kept[batch] = leaves

    def _load(self, batch: int) -> Any:
        assert self._spec is not None
        leaves = list(self._kept[batch])
        if self._where == "disk":
            assert self._folder is not None
            for place, tensor in load_file(self._folder / f"{batch}.safetensors", self._device).items():
                leaves[int(place)] = tensor
        leaves = [leaf.to(self._device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(leaves, self._spec)


@contextmanager
def _replaying(block: nn.Module, output: Any) -> Iterator[None]:
    """While open, `block` returns `output` whatever it is given; it keeps its attributes, which forwards read."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
