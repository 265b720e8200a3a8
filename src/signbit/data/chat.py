"""Conversations, and prompts with their completions, in the forms that TRL takes; and which of their tokens are learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from signbit.data.sources import JSON_LINES, json_lines, reading
from signbit.errors import DataError


class Chat(NamedTuple):
    """One conversation, and where it stands."""

    messages: list[dict[str, str]] | tuple[str, str]
    """Messages for the chat template, or a prompt and its completion, which need none."""
    where: str
    read: int
    """How much of the corpus is read by now, in the unit of its size."""


def is_chat(file: Path) -> bool:
    """Whether the first line of a .jsonl holds `messages`, or `prompt` and `completion`, and no text."""
    if not file.name.endswith(JSON_LINES):
        return False
    with reading(file):
        first = next(json_lines(file), (0, None))[1]
    return isinstance(first, dict) and "text" not in first and ("messages" in first or first.keys() >= set(_PAIR))


_PAIR = ("prompt", "completion")


def chats_of(file: Path, raw: BinaryIO) -> Iterator[Chat]:
    """The conversations in the lines of `file`: {"messages": [{"role": …, "content": …}, …]} or {"prompt": …, "completion": …}.

    Raises DataError for other lines.
    """
    for number, row in json_lines(file, raw):
        where = f"{file}, line {number}"
        if isinstance(row, dict) and "messages" not in row and all(isinstance(row.get(key), str) for key in _PAIR):
            yield Chat((row["prompt"], row["completion"]), where, 0)
            continue
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in messages
        ):
            raise DataError(
                f'{where}: not a conversation, {{"messages": [{{"role": "user", "content": "…"}}, …]}} or '
                '{"prompt": "…", "completion": "…"}'
            )
        yield Chat(messages, where, 0)


def template_digest(tokenizer: Any) -> str:
    """SHA-256, in hex, of the chat template, of nothing for a tokenizer that has none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(str(template).encode()).hexdigest()


def tokens_of(tokenizer: Any, chat: Chat) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and which are the assistant's: its words, and what ends its turn.

    Of a prompt and its completion: those of both texts end to end with what the tokenizer puts in front, and the token that
    ends a text; the completion's and that one are learnt.

    A token is the assistant's if it begins between the end of the template of the messages before, with the words that
    ask for an answer, and the end of the template with it. Raises DataError where the first is no beginning of the second.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("conversations need a fast tokenizer, which says where its tokens begin; this one is none")
    if isinstance(chat.messages, tuple):
        return _pair(tokenizer, *chat.messages)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{chat.where}: the model's tokenizer has no chat template, which conversations (messages) are written by; use "
            "the tokenizer of an instruct model, or lines of prompt and completion"
        )

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
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], learnt


def _pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    learnt = [start >= len(prompt) and end > start for start, end in offsets]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
        learnt.append(False)
    # What stands behind the last word is what ends the completion; an empty one teaches nothing.
    learnt[-1:] = [any(learnt)]
    return ids, learnt
