"""Answers on one thread, for transformers' server: within the context, up to a stop string, as long as someone waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    _GenerationCancelled,
    _StreamError,
    get_response_template,
    response_events_to_chunks,
)

from signbit.serve.requests import Refused


@dataclass(frozen=True)
class Wanted:
    """What an answer needs beside its GenerationConfig.

    `continues`: it goes on with the words of the prompt; `source`: the field of the request that the prompt is from.
    """

    stops: Sequence[str] = ()
    seed: int | None = None
    continues: bool = False
    source: str = "prompt"


class Stops:
    """Text up to the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is certain now."""
        held = self._held + text
        places = [place for stop in self.stops if (place := held.find(stop)) >= 0]
        self.found = bool(places)
        begun = (n for stop in self.stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
        certain = min(places) if places else len(held) - max(begun, default=0)
        self._held = "" if places else held[certain:]
        return held[:certain]

    def rest(self) -> str:
        """What was held back when the answer has ended."""
        held, self._held = self._held, ""
        return held


class _Stopped(Exception):
    pass


class _Closing(Exception):
    pass


class Failed(_StreamError):
    """The end of an answer that could not be finished."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status

    def refused(self) -> Refused:
        """The same as the answer to a request."""
        return Refused(self.status, self.msg, "unavailable" if self.status == 503 else "generation_failed")


class StopStreamer(DirectStreamer):
    """transformers' streamer, which also ends an answer at a stop string or where the server closes."""

    _first: bool

    def __init__(
        self, tokenizer: Any, queue: Any, parser: Any, wanted: Wanted, prompt: list[int], closing: threading.Event
    ) -> None:
        super().__init__(tokenizer, asyncio.get_running_loop(), queue, response_parser=parser)
        self.ids: list[int] = []
        self.stops = Stops(wanted.stops)
        self._closing = closing
        if wanted.continues:
            # A tokenizer that marks words by the space before them drops that space where a text begins.
            self._decode_stream = DecodeStream(prompt, skip_special_tokens=True)

    def put(self, value: torch.Tensor) -> None:
        if self._closing.is_set():
            raise _Closing
        if self._cancelled.is_set():
            raise _GenerationCancelled
        if self._first:  # the prompt
            self._first = False
            return
        for token in value.tolist():
            self.ids.append(token)
            self.total_tokens += 1
            text = self._decode_stream.step(self._tokenizer, token)
            if text is not None:
                self._write(self.stops.feed(text))
            if self.stops.found:
                raise _Stopped

    def end(self) -> None:
        self._write(self.stops.rest())
        super().end()

    def fail(self, status: int, message: str) -> None:
        """Ends the answer with an error."""
        self._enqueue(Failed(status, message))

    def _write(self, text: str) -> None:
        if not text:
            return
        for item in [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text)):
            self._enqueue(item)


class Answers(GenerateManager):
    """Generates one answer after the other; `limit` is the context in tokens, None where the model has none.

    transformers' own manager ends neither at a stop string as OpenAI's API means it (without it) nor, where the answer
    does not stream, for a client that has gone; and it begins on a prompt of any length.
    """

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit
        self.closing = threading.Event()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], StopStreamer]:
        wanted: Wanted = vars(gen_config).pop("wanted")
        prompt: list[int] = inputs["input_ids"][0].tolist()
        self._fit(len(prompt), gen_config, wanted.source)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = StopStreamer(processor._tokenizer, queue, response_parser, wanted, prompt, self.closing)
        # Some tokenizers give more (token_type_ids), which a decoder refuses.
        tensors = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        def run() -> None:
            try:
                if wanted.seed is not None:
                    torch.manual_seed(wanted.seed)
                model.generate(**tensors, streamer=streamer, generation_config=gen_config)
            except _Stopped:
                streamer.end()
            except _GenerationCancelled:
                pass
            except _Closing:
                streamer.fail(503, "the server is closing")
            except Exception as error:
                streamer.fail(500, f"the answer could not be generated ({type(error).__name__}: {error})")

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces: list[str] = []
        try:
            while (piece := await queue.get()) is not None:
                if isinstance(piece, Failed):
                    raise piece.refused()
                pieces.append(piece)
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        ids = streamer.ids
        if streamer.stops.found and get_response_template(processor, model) is not None:
            # The caller reads reasoning and tool calls out of the tokens, which must end before the stop string too.
            ids = processor.encode(Stops(streamer.stops.stops).feed(processor.decode(ids)), add_special_tokens=False)
        return "".join(pieces), inputs["input_ids"].shape[-1], ids

    def check(self, prompt_tokens: int, source: str) -> None:
        """Refuses a prompt that leaves no room in the context."""
        if self.limit is not None and prompt_tokens + 1 > self.limit:
            message = f"the prompt has {prompt_tokens} tokens, the context {self.limit}; shorten the prompt"
            raise Refused(400, message, "context_length_exceeded", source)

    async def check_texts(self, texts: Sequence[str], source: str, tokenizer: Any) -> None:
        """Refuses long texts before the event loop is given to them: others are answered while these are counted."""
        if self.limit is not None and sum(map(len, texts)) > 4 * self.limit:
            parts = await asyncio.to_thread(tokenizer._tokenizer.encode_batch, list(texts), add_special_tokens=False)
            self.check(sum(map(len, parts)), source)

    def _fit(self, prompt_tokens: int, gen_config: Any, source: str) -> None:
        """Refuses a prompt that is empty or too long; an answer may fill what it leaves of the context."""
        if prompt_tokens == 0:
            raise Refused(400, "the prompt has no token; give a text to continue", "invalid_value", source)
        self.check(prompt_tokens, source)
        if self.limit is not None:
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, self.limit - prompt_tokens)
