"""A conversation on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from signbit.errors import OptionError
from signbit.serve.generate import GenerateOptions, generate

HELP = "/clear starts a new conversation, /exit (or Ctrl-D) ends, Ctrl-C ends an answer"


def chat(
    model: Any,
    tokenizer: Any,
    options: GenerateOptions,
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
) -> None:
    """Reads a line, streams the answer, and keeps the conversation, until /exit or the end of the input.

    Ctrl-C while an answer comes ends that answer, which stays in the conversation as far as it got; at the prompt it
    only begins a new line. What the model's template or context refuses is said, and the chat goes on. Raises
    OptionError if the model has no chat template.
    """

    def show(text: str) -> None:
        print(text, end="", flush=True)

    show_text = write or show
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError("this model has no chat template, so it cannot chat; use signbit generate")
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    show_text(HELP + "\n")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            show_text("\n")
            return
        except KeyboardInterrupt:
            show_text("\n" + HELP + "\n")
            continue
        if line == "/exit":
            return
        if line == "/clear":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = generate(model, tokenizer, messages, options, show_text)
        except OptionError as error:
            messages.pop()
            show_text(f"[{error}; /clear starts a new conversation]\n")
            continue
        show_text(" [stopped]\n" if answer.stopped else "\n")
        messages.append({"role": "assistant", "content": answer.text})
