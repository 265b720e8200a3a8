"""`signbit generate`, `chat` and `serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from signbit.cli.output import quiet
from signbit.cli.parsing import RunOptions, parse
from signbit.errors import OptionError


@dataclass(frozen=True)
class PromptOptions:
    """Continue a text, streamed."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed or full-precision model."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """Text to continue; - reads it from the standard input."""
    chat: bool = False
    """Put the prompt through the chat template, as one message of a user."""


@dataclass(frozen=True)
class ChatOptions:
    """Talk to a model through its chat template."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed or full-precision model."""
    system: str | None = None
    """System message that the conversation begins with."""


@dataclass(frozen=True)
class ServeOptions:
    """Answer OpenAI's API over HTTP: chat and text completions."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed or full-precision model."""
    threads: int | None = None
    """Threads that compute on a CPU; default: torch's."""


def generate(argv: Sequence[str]) -> None:
    """`signbit generate`."""
    from signbit.serve.generate import GenerateOptions

    args = parse("generate", argv, PromptOptions, sampling=GenerateOptions, run=RunOptions)
    from signbit.serve.generate import generate as continue_text

    model, tokenizer = _load_to_run(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    def show(text: str) -> None:
        print(text, end="", flush=True)

    if not args.chat:
        show(prompt)
    messages = [{"role": "user", "content": prompt}] if args.chat else prompt
    result = continue_text(model, tokenizer, messages, args.sampling, show)
    print()
    print(
        f"[{result.new_tokens} tokens in {result.seconds_s:.1f} s; {result.decode_tokens_per_s:.1f} tokens/s after "
        f"the first{'; stopped' if result.stopped else ''}{'; the context is full' if result.context_full else ''}]",
        file=sys.stderr,
    )


def chat(argv: Sequence[str]) -> None:
    """`signbit chat`."""
    from signbit.serve.generate import GenerateOptions

    args = parse("chat", argv, ChatOptions, sampling=GenerateOptions, run=RunOptions)
    from signbit.serve.chat import chat as talk

    model, tokenizer = _load_to_run(args)
    talk(model, tokenizer, args.sampling, args.system)


def serve(argv: Sequence[str]) -> None:
    """`signbit serve`."""
    from signbit.serve import server

    args = parse("serve", argv, ServeOptions, listen=server.ServerOptions, run=RunOptions)
    server.check_installed()
    if args.threads is not None and args.threads < 1:
        raise OptionError(f"--threads is {args.threads}; at least 1")
    with server.bind(args.listen) as bound:
        import torch

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        model, tokenizer = _load_to_run(args)
        name = args.listen.name or (Path(args.model).resolve().name if Path(args.model).is_dir() else args.model)
        line = f"{server.url(bound)}  model {name}  {_multiplies(model, args.run)}"
        server.serve(model, tokenizer, name, args.listen, bound, lambda: print(line, flush=True))


def _multiplies(model: Any, run: RunOptions) -> str:
    """What multiplies by the packed layers of `model`, in a few words."""
    from signbit.evaluate.doctor import multiplied
    from signbit.ops import explain

    found = multiplied(model)
    if not found.layers:
        return f"no packed layer, {run.device}"
    backend = explain(run.device)[0].backend
    share = "" if found.kernels == found.layers else f" for {found.kernels} of {found.layers} packed layers"
    return f"kernels {backend}{share}, {run.device}, {run.activations} activations"


def _load_to_run(args: Any) -> tuple[Any, Any]:
    from signbit.hub.load import load_any, load_tokenizer
    from signbit.linear import set_activations

    quiet()
    model = load_any(args.model, args.run.dtype, args.run.device)
    if not set_activations(model, args.run.activations):
        print(f"note: {args.model} has no packed layer; its activations stay exact", file=sys.stderr)
    return model, load_tokenizer(args.model)
