"""Perplexity of a model that is larger than the memory: one block after the other, all windows through each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from signbit import ptq
from signbit.errors import OptionError, WeightError
from signbit.evaluate.perplexity import Measured, Perplexity, TextOptions, Windows, logits_nll, windows_of
from signbit.hub.load import base_of, blocks_of, load_streamed, load_tokenizer, torch_device
from signbit.hub.quantizer import prepare_layers_
from signbit.hub.stream import release_memory
from signbit.linear import set_activations

#: Called with (windows through blocks so far, in all, the block's number).
Progress = Callable[[int, int, int], None]


def offloaded_perplexities(
    model: str,
    names: Sequence[str],
    data_dir: str | Path | None = None,
    options: TextOptions | None = None,
    max_windows: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    activations: str = "exact",
    inputs_on: ptq.Where = "cpu",
    progress: Progress | None = None,
) -> list[Perplexity]:
    """The perplexities `names` of the directory or hub id `model` with one block of it in memory at a time.

    The numbers are those of `perplexity` on the whole model: each window goes alone through the model's own forward, in
    which the blocks before the one that is loaded give back what they gave. What stands outside of the blocks is on
    `device`, where they compute; what a block has made of all windows waits on `inputs_on`. Each weight is read once.
    Raises as `perplexity` does, WeightError for a block whose output is not finite, OptionError for an adapter.
    """
    torch_device(device)
    if base_of(model) is not None:
        raise OptionError(f"{model} is an adapter, which stands beside a whole model: leave --offload out")
    name, tokenizer, begin = blocks_of(model), load_tokenizer(model), time.perf_counter()
    texts = [windows_of(text, tokenizer, data_dir, options, max_windows) for text in names]
    with TemporaryDirectory(prefix="signbit-offload-") as folder, torch.inference_mode():
        with _no_word_of_offloading():
            loaded, weights = load_streamed(model, name, folder, device, dtype)
        set_activations(loaded, activations)
        for text in texts:
            text.check_positions(loaded)
        blocks, streams = loaded.get_submodule(name), []
        for place, text in enumerate(texts):
            windows = torch.stack([ids for ids, _ in text.cut])
            kept = Path(folder, f"text-{place}") if inputs_on == "disk" else None
            streams.append(ptq.Stream(loaded, blocks, windows, device, inputs_on, kept, batch=1))
        _walk(model, name, blocks, weights, streams, device, progress or (lambda done, total, block: None))
        found = [_finished(text, stream, device) for text, stream in zip(texts, streams, strict=True)]
        where, seconds_s = str(loaded.get_input_embeddings().weight.device), time.perf_counter() - begin
        return [measured.result(loaded, where, seconds_s) for measured in found]


def _walk(
    model: str,
    name: str,
    blocks: nn.ModuleList,
    weights: Mapping[str, Tensor],
    streams: Sequence[ptq.Stream],
    device: str,
    progress: Progress,
) -> None:
    """All windows through each of the `blocks`, which is real only while they go through it."""
    done, total = 0, len(blocks) * sum(map(len, streams))
    for index, block in enumerate(blocks):
        _load(block, f"{name}.{index}", weights, device)
        for stream in streams:
            for window in range(len(stream)):
                try:
                    stream.run(index, window, keep=True)
                except WeightError as error:
                    raise WeightError(
                        f"{name}.{index} of {model}: its output overflows or is NaN; repair the model, or take a larger --dtype"
                    ) from error
                done += 1
                progress(done, total, index)
        block.to("meta")
        release_memory()


def _finished(text: Windows, stream: ptq.Stream, device: str) -> Measured:
    """What follows the last block, for each window of a text."""
    measured = Measured(text)
    for window, (ids, context) in enumerate(text.cut):
        measured.add(window, *logits_nll(stream.finish(window).logits[0], ids.to(device), context))
    return measured


def _load(block: nn.Module, prefix: str, weights: Mapping[str, Tensor], device: str) -> None:
    """Makes the tensors of `block` real, in the dtype in which the whole model has them."""
    for name, parameter in list(block.named_parameters()):
        if parameter.is_meta:
            tensor = weights[f"{prefix}.{name}"].to(device, parameter.dtype)
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
    for name, buffer in list(block.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            module = block.get_submodule(owner)
            module._buffers[last] = weights[f"{prefix}.{name}"].to(device, buffer.dtype)
    block.to(device)
    prepare_layers_(block)


@contextmanager
def _no_word_of_offloading() -> Iterator[None]:
    """While open, the quantizer does not warn that the layers' weights are not there: they come with their block."""
    logger = logging.getLogger("signbit.hub.quantizer")

    def other(record: logging.LogRecord) -> bool:
        return "offloaded" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
