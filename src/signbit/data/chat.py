"""Conversations: messages through a model's chat template, and which of their tokens are learnt from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from signbit.data.sources import JSON_LINES, json_lines, reading
from signbit.errors import DataError


class Chat(NamedTuple):
    """One conversation, and where it stands."""

    messages: list[dict[str, str]]
    where: str
    read: int
    """How much of the corpus is read by now, in the unit of its size."""


def is_chat(file: Path) -> bool:
    """Whether the first line of a .jsonl holds `messages` and no text."""
    if not file.name.endswith(JSON_LINES):
        return False
    with reading(file):
        first = next(json_lines(file), (0, None))[1]
    return isinstance(first, dict) and "messages" in first and "text" not in first


def chats_of(file: Path, raw: BinaryIO) -> Iterator[Chat]:
    """The conversations in the lines of `file`: {"messages": [{"role": …, "content": …}, …]}; raises DataError for others."""
    for number, row in json_lines(file, raw):
        where = f"{file}, line {number}"
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in messages
        ):
            raise DataError(f'{where}: not a conversation, {{"messages": [{{"role": "user", "content": "…"}}, …]}}')
        yield Chat(messages, where, 0)


def template_digest(tokenizer: Any) -> str:
    """SHA-256, in hex, of the chat template; raises DataError for a tokenizer that has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            "the model's tokenizer has no chat template, which conversations (messages) are written by; use the tokenizer "
            "of an instruct model, or give text"
        )
    return hashlib.sha256(str(template).encode()).hexdigest()


def tokens_of(tokenizer: Any, chat: Chat) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and which are the assistant's: its words, and what ends its turn.

    A token is the assistant's if it begins between the end of the template of the messages before, with the words that
    ask for an answer, and the end of the template with it. Raises DataError where the first is no beginning of the second.
    """

    def written(messages: list[dict[str, str]], asks: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # whatever a template raises: jinja2's errors, of roles that do not take turns too
            raise DataError(f"{chat.where}: the model's chat template refuses it ({error})") from error
        return text

    whole = written(chat.messages, False)
    spans = []
    for place, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before, after = written(chat.messages[:place], True), written(chat.messages[: place + 1], False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{chat.where}: the model's chat template writes earlier messages otherwise when later ones follow, so that "
                "what the assistant said cannot be told; use a tokenizer with a plain template"
            )
        spans.append((len(before), len(after)))
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("conversations need a fast tokenizer, which says where its tokens begin; this one is none")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], learnt
