"""A conversation on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    only begins a new line. Raises OptionError if the model has no chat template or the conversation outgrows its
    context.
    """

    def show(text: str) -> None:
        print(text, end="", flush=True)

    show_text = write or show
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
        answer = generate(model, tokenizer, messages, options, show_text)
        show_text(" [stopped]\n" if answer.stopped else "\n")
        messages.append({"role": "assistant", "content": answer.text})
