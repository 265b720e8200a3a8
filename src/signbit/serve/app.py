"""transformers' OpenAI-compatible app around one loaded model, with what is amiss there put right."""

from __future__ import annotations

import inspect
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState

from signbit.serve.answers import Answers, Wanted
from signbit.serve.disconnects import Disconnects
from signbit.serve.requests import Asked, ChatRequest, Refused, TextRequest, read

#: What is answered; transformers' app has more: loading and unloading of models, audio, its own Responses API.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
_MAX_NEW_TOKENS = 1024
#: How transformers begins the event of an error, whose text it does not escape.
_ERROR = 'data: {"error": "'


class OneModel(ModelManager):
    """transformers' keeper of models, with one that is loaded already and stays."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.force_model, self._model, self._tokenizer, self._created = name, model, tokenizer, int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._model, self._tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "signbit"}]


class OneThread(GenerationState):
    """All requests share one thread, and so the memory of one context."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers

    def get_manager(self, model_id: str, use_cb: bool = False) -> Answers:
        return self.answers


class _Checked(BaseHandler):
    """Checks a request before transformers reads it, and ends a stream as OpenAI does."""

    form: type[Asked]
    continues: bool
    max_new_tokens: int

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        _check_characters(body)
        asked = read(self.form, body)
        model, tokenizer = self.model_manager.load_model_and_processor()
        if isinstance(asked, ChatRequest):
            _check_template(asked, tokenizer)
        if beyond := [token for token in asked.logit_bias or {} if token >= model.config.get_text_config().vocab_size]:
            raise Refused(400, f"logit_bias: there is no token {beyond[0]}", "invalid_value", "logit_bias")
        await self.generation_state.answers.check_texts(asked.texts, asked.source, tokenizer)
        try:
            response = await super().handle_request(body, request_id)
        except TemplateError as error:
            raise Refused(
                400, f"the model's chat template refuses this: {error}", "invalid_value", "messages"
            ) from None
        if isinstance(response, StreamingResponse):
            response.body_iterator = _ended(response.body_iterator)
        return response

    def _validate_request(self, body: dict[str, Any]) -> None:
        if unknown := sorted(body.keys() - self._valid_params_class.__mutable_keys__):
            raise Refused(422, f"OpenAI's API has no field {unknown[0]!r} here", "unknown_parameter", unknown[0])
        super()._validate_request(body)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served, asked = self.model_manager.force_model, body.get("model")
        if asked not in (None, served):
            raise _no_model(str(asked), served)
        return served, *self.model_manager.load_model_and_processor()

    def _build_generation_config(self, body: dict[str, Any], base: Any, use_cb: bool = False) -> Any:
        asked = read(self.form, body)
        # The seed and the stop strings belong to this answer alone: the thread sets and watches them. transformers
        # reads logit_bias in chats only, and only where it has no whole numbers.
        left = {name: value for name, value in body.items() if name not in ("seed", "stop", "logit_bias")}
        config = super()._build_generation_config(left, base, use_cb=use_cb)
        config.max_new_tokens = asked.new_tokens or self.max_new_tokens
        if asked.temperature is not None or (asked.top_p or 1) < 1:
            # transformers takes a temperature and stays greedy where the model's own configuration is.
            config.do_sample = asked.temperature != 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        elif config.top_k is None:
            config.top_k = 0  # None is 50 in transformers
        if asked.logit_bias:
            config.sequence_bias = {(token,): bias for token, bias in asked.logit_bias.items()}
        config.wanted = Wanted(asked.stops, asked.seed, self.continues, asked.source)
        return config


class Chat(_Checked, ChatCompletionHandler):
    """POST /v1/chat/completions."""

    form, continues = ChatRequest, False


class Text(_Checked, CompletionHandler):
    """POST /v1/completions."""

    form, continues = TextRequest, True


def build_app(
    name: str,
    model: Any,
    tokenizer: Any,
    answers: Answers,
    max_new_tokens: int | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The app that serves `model` under `name`.

    Answers have `max_new_tokens` where a request does not say; default: what the model's generation config says, else 1024.
    """
    manager, state = OneModel(name, model, tokenizer), OneThread(answers)
    chat, text = Chat(manager, state), Text(manager, state)
    most = max_new_tokens or model.generation_config.max_new_tokens or _MAX_NEW_TOKENS
    chat.max_new_tokens = text.max_new_tokens = most
    # Which handlers there are differs by transformers' version; those of PATHS are given.
    others = {n: None for n in inspect.signature(build_server).parameters if n.endswith("_handler")}
    handlers = {**others, "chat_handler": chat, "completion_handler": text}
    app: FastAPI = build_server(manager, **handlers, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]

    def one_model(model: str) -> dict[str, Any]:
        if model != name:
            raise _no_model(model, name)
        return manager.get_gen_models()[0]

    app.add_api_route("/v1/models/{model:path}", one_model)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _no_json)
    app.add_exception_handler(Exception, _failed)
    if api_key is not None:
        app.add_middleware(Keyed, key=api_key)
    app.add_middleware(Disconnects)
    return app


class Keyed:
    """ASGI: only requests that carry the key are answered, and /health."""

    def __init__(self, app: Any, key: str) -> None:
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.wanted):
                refused = Refused(401, "the API key is missing or wrong; send the one of --api-key", "invalid_api_key")
                await JSONResponse(refused.body(), 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _check_template(asked: ChatRequest, tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            400, "this model has no chat template, so it cannot chat; use /v1/completions", "no_chat_template"
        )
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if taken := [name for name in asked.chat_template_kwargs if name in own]:
        raise Refused(400, f"chat_template_kwargs: {taken[0]} is no variable of a template", "invalid_value", taken[0])


def _check_characters(body: dict[str, Any]) -> None:
    """Refuses lone surrogates, which JSON may hold and UTF-8 may not, in any field: templates print them all."""
    for field, value in body.items():
        try:
            json.dumps([field, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = f"{field}: a lone surrogate (\\ud800 to \\udfff) is no character"
            raise Refused(400, message, "invalid_value", field) from None


def _no_model(asked: str, served: str) -> Refused:
    return Refused(404, f"there is no model {asked!r} here; this server has {served!r}", "model_not_found", "model")


async def _ended(pieces: Any) -> AsyncGenerator[str, None]:
    """The events of a stream with [DONE] behind them, or with the error that ends it, as an object."""
    async with aclosing(pieces):
        async for piece in pieces:
            *events, last = piece.removesuffix("\n\n").split("\n\n")
            if failed := last.startswith(_ERROR):
                message = last.removeprefix(_ERROR).removesuffix('"}')
                last = f"data: {json.dumps(Refused(500, message, 'generation_failed').body())}"
            yield "".join(f"{event}\n\n" for event in (*events, last))
            if failed:
                return
    yield "data: [DONE]\n\n"


async def _http_error(request: Request, error: Any) -> JSONResponse:
    if not isinstance(error, Refused):
        where = f": {request.method} {request.url.path}; this server has {', '.join(PATHS)}"
        message = f"{error.detail}{where if error.status_code in (404, 405) else ''}"
        error = Refused(error.status_code, message, "invalid_request")
    return JSONResponse(error.body(), error.status_code)


async def _no_json(_: Request, error: Any) -> JSONResponse:
    if isinstance(error.body, bytes):  # FastAPI did not read it
        refused = Refused(400, "the body is read with the header Content-Type: application/json only", "invalid_json")
    else:
        refused = Refused(400, f"the body is no JSON object ({error.errors()[0]['msg']})", "invalid_json")
    return JSONResponse(refused.body(), 400)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    message = f"the server could not answer this ({type(error).__name__}); its log has the reason"
    return JSONResponse(Refused(500, message, "internal_error").body(), 500)
