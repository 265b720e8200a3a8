"""Generating text, streamed as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer, set_seed

from signbit.errors import OptionError

#: Below it logits divided by the temperature leave float32, and greedy is what they tend to.
LOWEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class GenerateOptions:
    """How the next token is chosen, in the terms of transformers."""

    max_new_tokens: int = 256
    """At most so many tokens are written."""
    temperature: float = 0.0
    """Randomness: 0 always takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this much probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were used are less likely."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"--max-new-tokens is {self.max_new_tokens}; at least 1")
        if self.temperature < 0:
            raise OptionError(f"--temperature is {self.temperature}; 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"--top-p is {self.top_p}; above 0, at most 1")
        if self.top_k < 0:
            raise OptionError(f"--top-k is {self.top_k}; 0 (off) or more")
        if self.repetition_penalty <= 0:
            raise OptionError(f"--repetition-penalty is {self.repetition_penalty}; above 0 (1 is off)")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"--seed is {self.seed}; 0 to 2**32 - 1")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `model.generate`."""
        sample = self.temperature >= LOWEST_TEMPERATURE
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": sample}
        if sample:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.repetition_penalty != 1:
            chosen["repetition_penalty"] = self.repetition_penalty
        return chosen


@dataclass(frozen=True)
class Generated:
    """A finished answer."""

    text: str
    new_tokens: int
    seconds_s: float
    decode_tokens_per_s: float
    """New tokens after the first over the time since the first; 0 for a single token."""
    stopped: bool
    """Whether it was interrupted."""
    context_full: bool = False
    """Whether it ended because the model's context has no room for more."""


class _Clock(StoppingCriteria):
    """Notes when each token came; it stops nothing."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.times_s.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), False, dtype=torch.bool, device=input_ids.device)


#: Tokens before a piece of text that are decoded with it: more than a character has bytes, few enough to be quick.
_BEFORE = 64


class _Printer(TextStreamer):
    """Hands each finished piece of text to a function.

    SentencePiece drops the blank before the first token that it decodes. So what goes on a prompt (`goes_on`) is decoded
    behind the prompt's last tokens, and a line behind those of the line before; transformers decodes each alone.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], goes_on: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.goes_on = goes_on
        self.token_cache: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        before = [*self.token_cache, *value.flatten().tolist()][-_BEFORE:]
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not self.token_cache and (self.goes_on or not is_prompt):
            self.token_cache = before
            self.print_len = len(self.tokenizer.decode(before, **self.decode_kwargs))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def context_tokens(model: Any) -> int | None:
    """The most tokens that a prompt and its answer may have together; None where the model sets no bound."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def _check_ids(ids: torch.Tensor, model: Any) -> None:
    """Raises OptionError for a token that is no row of the embedding."""
    rows, highest = model.config.get_text_config().vocab_size, int(ids.max())
    if highest >= rows:
        raise OptionError(
            f"the prompt has the token {highest}, and the model's embedding has {rows} rows (ids 0 to {rows - 1}): the "
            "tokenizer is not this model's; put the model's own beside it"
        )


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    options: GenerateOptions | None = None,
    write: Callable[[str], None] | None = None,
) -> Generated:
    """Continues a text, or answers a list of chat messages through the tokenizer's chat template.

    A continued text begins with the blank between the prompt and it, if there is one. Each piece of text goes to `write`
    as it comes. A KeyboardInterrupt ends the answer: what was written until then is returned with `stopped`. Raises
    OptionError for an empty prompt, a prompt that leaves no room in the model's context or has a token that the model
    has not, or messages without a chat template.
    """
    options = options or GenerateOptions()
    if isinstance(prompt, str):
        if not prompt:
            raise OptionError("the prompt is empty; give a text to continue")
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise OptionError("this model has no chat template, so it cannot chat; use signbit generate")
        try:
            encoded = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise OptionError(f"the model's chat template refuses these messages: {error}") from error
    ids = encoded["input_ids"].to(model.device)
    if not ids.numel():
        raise OptionError("the prompt has no token of the model's tokenizer; give another text")
    _check_ids(ids, model)
    limit = context_tokens(model)
    if limit is not None and ids.shape[1] + 1 > limit:
        raise OptionError(f"the prompt has {ids.shape[1]} tokens, the model's context {limit}; shorten the prompt")
    arguments = options.arguments()
    if limit is not None:
        arguments["max_new_tokens"] = min(options.max_new_tokens, limit - ids.shape[1])
    set_seed(options.seed)
    clock = _Clock()
    pieces: list[str] = []

    def collect(text: str) -> None:
        pieces.append(text)
        if write is not None:
            write(text)

    begin = time.perf_counter()
    stopped = False
    try:
        model.generate(
            input_ids=ids,
            attention_mask=encoded["attention_mask"].to(model.device),
            streamer=_Printer(tokenizer, collect, goes_on=isinstance(prompt, str)),
            stopping_criteria=StoppingCriteriaList([clock]),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **arguments,
        )
    except KeyboardInterrupt:
        stopped = True
    end = time.perf_counter()
    count = len(clock.times_s)
    decode_s = clock.times_s[-1] - clock.times_s[0] if count > 1 else 0.0
    rate = (count - 1) / decode_s if decode_s > 0 else 0.0
    full = not stopped and count == arguments["max_new_tokens"] < options.max_new_tokens
    return Generated("".join(pieces), count, end - begin, rate, stopped, full)
