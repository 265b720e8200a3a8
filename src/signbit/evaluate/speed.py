"""How fast a model reads a prompt and writes behind it, and what it takes in memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from signbit.errors import OptionError
from signbit.evaluate.doctor import multiplied
from signbit.evaluate.machines import device_name
from signbit.linear import PackedLinear, get_activations
from signbit.ops import explain


@dataclass(frozen=True)
class SpeedOptions:
    """How much is read and written when speed is measured."""

    prompt_tokens: int = 128
    """Tokens of the prompt whose reading (prefill) is timed."""
    new_tokens: int = 32
    """Tokens whose writing (decode) is timed, one at a time."""
    repeats: int = 3
    """How often; medians count."""

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} is needed")


@dataclass(frozen=True)
class Speed:
    """Speed and memory of one model in a process of its own, at one sequence at a time."""

    load_s: float
    """From the call to a model in evaluation mode; imports are done before."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int
    """The process's highest resident memory; on a GPU the highest that torch had allocated there."""
    before_bytes: int
    """What the process took before the model: Python, torch and transformers; 0 on a GPU."""
    backend: str
    """What multiplies: the kernels' name, and how many layers are left to torch."""
    prompt_tokens: int
    new_tokens: int
    repeats: int
    dtype: str
    device: str
    activations: str
    machine: str
    """The processor's or GPU's name, and torch's threads."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def backend(model: Any) -> str:
    """What multiplies in `model` where it is now: "torch", or the kernels' name and the packed layers left to torch."""
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        return "torch"
    chosen = explain(next(model.parameters()).device)[0].backend
    found = multiplied(model)
    left = found.layers - found.kernels
    if left == found.layers or chosen == "reference":
        return "reference (plain torch)"
    return f"{chosen}, {left} of {found.layers} layers by torch" if left else chosen


def machine(device: str) -> str:
    """The name of what computes on `device`, with torch's threads on a CPU."""
    name = device_name(device)
    return name if torch.device(device).type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process now, or at its highest; elsewhere than on Linux always the latter."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            key = "VmHWM:" if peak else "VmRSS:"
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def peak_bytes(device: str) -> int:
    """The most memory up to now: on a GPU what torch had allocated there, elsewhere the process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes(peak=True)


@torch.inference_mode()
def _timed(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading `ids` [1, T] up to the first new token, and of writing the others."""

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    begin = now()
    output = model(input_ids=ids, use_cache=True)
    token = output.logits[:, -1:].argmax(dim=-1)
    read = now()
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return read - begin, now() - read


def speed(load: Callable[[], Any], options: SpeedOptions, device: str) -> Speed:
    """Loads a model by `load` and times it; medians over `options.repeats`, behind one run that is not counted.

    A model with fewer positions than are asked for reads and writes less, which the result says.
    """
    before = 0 if torch.device(device).type == "cuda" else resident_bytes()
    begin = time.perf_counter()
    model = load()
    load_s = time.perf_counter() - begin
    limit = getattr(model.config, "max_position_embeddings", None) or options.prompt_tokens + options.new_tokens
    new_tokens = min(options.new_tokens, limit // 2)
    prompt_tokens = min(options.prompt_tokens, limit - new_tokens)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(prompt_tokens) * 7919 % vocabulary)[None].to(device)
    _timed(model, ids, 2)
    reading, writing = zip(*(_timed(model, ids, new_tokens) for _ in range(options.repeats)), strict=True)
    return Speed(
        load_s, prompt_tokens / statistics.median(reading), (new_tokens - 1) / statistics.median(writing),
        peak_bytes(device), before, backend(model),
        prompt_tokens, new_tokens, options.repeats, str(model.dtype).removeprefix("torch."), device,
        get_activations(model), machine(device),
    )  # fmt: skip
