"""Serving a model over HTTP, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from signbit.errors import OptionError
from signbit.extras import install
from signbit.serve.generate import context_tokens


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens and what it lets a request ask for."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 answers other machines too."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    name: str | None = None
    """Name of the model in requests; default: that of its directory."""
    max_new_tokens: int | None = None
    """At most so many tokens are written where a request does not say; default: the model's generation config's, else 1024."""
    max_context: int | None = None
    """Most tokens of a prompt and its answer together; default: the model's context."""
    api_key: str | None = None
    """Answer only requests that carry this key; default: the environment's SIGNBIT_API_KEY, else all."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise OptionError(f"--port is {self.port}; 0 (any free one) to 65535")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise OptionError(f"--max-new-tokens is {self.max_new_tokens}; at least 1")
        if self.max_context is not None and self.max_context < 2:
            raise OptionError(f"--max-context is {self.max_context}; at least 2")
        if self.api_key == "" or self.name == "":
            raise OptionError("--api-key and --name may not be empty; leave them out")

    @property
    def key(self) -> str | None:
        """The key that requests must carry."""
        return self.api_key or os.environ.get("SIGNBIT_API_KEY") or None


def check_installed() -> None:
    """Raises OptionError where a package that the server needs is missing or too old."""
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import transformers.cli.serving.completion  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"the server needs fastapi, uvicorn, openai and transformers ≥ 5.17 ({error}): {install('serve')}"
        ) from error


def bind(options: ServerOptions) -> socket.socket:
    """A socket on the address of `options`; raises OptionError where it is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((options.host, options.port))
    except OSError as error:
        bound.close()
        raise OptionError(
            f"{options.host}:{options.port} cannot be listened on ({error.strerror}); give another --host or --port"
        ) from error
    return bound


def url(bound: socket.socket) -> str:
    """What a client calls the base URL of the server on this socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def context_limit(model: Any, options: ServerOptions) -> int | None:
    """Tokens of a prompt and its answer; raises OptionError if --max-context is more than the model has."""
    own, asked = context_tokens(model), options.max_context
    if own is not None and asked is not None and asked > own:
        raise OptionError(f"--max-context is {asked}; the model's context has {own} tokens")
    return asked or own


def serve(
    model: Any, tokenizer: Any, name: str, options: ServerOptions, bound: socket.socket, ready: Callable[[], None]
) -> None:
    """Answers OpenAI's chat and text completions on the socket `bound`, until SIGTERM or Ctrl-C.

    `ready` is called once connections are accepted. At the end answers that are being written are broken off with an
    error. Raises OptionError for a tokenizer that does not decode token by token, KeyboardInterrupt for Ctrl-C.
    """
    check_installed()
    import uvicorn

    from signbit.serve.answers import Answers
    from signbit.serve.app import build_app

    if not getattr(tokenizer, "is_fast", False):
        raise OptionError("the server needs a fast tokenizer (tokenizer.json); save the model with one")
    answers = Answers(context_limit(model, options))

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            answers.closing.set()
            super().handle_exit(sig, frame)

    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    # It warns of every request, which uvicorn's log has already.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    app = build_app(name, model, tokenizer, answers, options.max_new_tokens, options.key)
    server = Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=10))
    # uvicorn raises the signal that ended it once more; a SIGTERM is no failure.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    bound.listen(uvicorn.config.Config(app).backlog)
    ready()
    try:
        server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
