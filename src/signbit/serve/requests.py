"""What a request to the server may ask for; what transformers' server would drop without a word is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, ValidationError

from signbit.serve.generate import LOWEST_TEMPERATURE


class Refused(HTTPException):
    """A request that is not answered, in the terms of OpenAI's errors: HTTP status, message, code, field."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, _printable(message))
        self.code, self.param = code, None if param is None else _printable(param)

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read an error from."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def _printable(text: str) -> str:
    """`text` with escapes for lone surrogates, which a field's name may hold and UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def _or_greedy(temperature: float) -> float:
    return temperature if temperature >= LOWEST_TEMPERATURE else 0.0


class _Form(BaseModel):
    # Names that are unknown are told by transformers' own check, which has OpenAI's full list.
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Asked(_Form):
    """The fields that chat and text completions share; a type that allows but one value is what is not done here."""

    #: The field that holds the text.
    source: ClassVar[str]

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_or_greedy)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=2)] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Literal[0] | None = None
    n: Literal[1] | None = None
    generation_config: None = None

    @property
    def new_tokens(self) -> int | None:
        """The most tokens that the answer may have, if the request says so."""
        return self.max_tokens

    @property
    def texts(self) -> list[str]:
        """What a prompt is made of."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        """The strings before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class _Text(_Form):
    type: Literal["text"]
    text: str


class _Function(_Form):
    name: str
    arguments: Json[dict[str, Any]] | dict[str, Any]


class _Call(_Form):
    function: _Function


class _Message(_Form):
    role: str
    content: str | list[_Text] | None = None
    tool_calls: list[_Call] | None = None


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    source = "messages"

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    functions: None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] = {}

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def texts(self) -> list[str]:
        contents = [[m.content] if isinstance(m.content, str) else m.content or [] for m in self.messages]
        return [part if isinstance(part, str) else part.text for content in contents for part in content]


class TextRequest(Asked):
    """POST /v1/completions."""

    source = "prompt"

    prompt: Annotated[str, Field(min_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    suffix: Literal[""] | None = None

    @property
    def texts(self) -> list[str]:
        return [self.prompt]


_AskedT = TypeVar("_AskedT", bound=Asked)


def read(form: type[_AskedT], body: dict[str, Any]) -> _AskedT:
    """The request in `body`; raises Refused (400) with the field and what it may be."""
    try:
        asked: _AskedT = form.model_validate(body)
        return asked
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f", not {str(first['input'])[:40]}"
        raise Refused(400, f"{param}: {first['msg']}{given}", "invalid_value", param) from None
