"""A chat template as Ollama has it: Go's, with a text before and behind the message of each role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Messages = list[dict[str, str]]
#: What stands in the place of messages while a template is looked at.
_WORDS = {"system": "Sysword", "user": "Userword", "assistant": "Assistword"}
#: The conversations in which a template must be what was found in it.
_CONVERSATIONS = ("u", "uau", "uauau", "su", "suau")


@dataclass(frozen=True)
class Turns:
    """A template of which each message has its text around it, whatever stands before and behind."""

    start: str
    """Before the first message, where it is not the system's."""
    system: tuple[str, str] | None
    """Before and behind a system message, from the start on; None if the template refuses one."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """Before the answer."""

    def render(self, messages: Messages) -> str:
        """The prompt of a conversation that ends with a user's message."""
        first = messages[0]
        parts = [self.start]
        if first["role"] == "system":
            assert self.system is not None
            parts = [self.system[0], first["content"], self.system[1]]
        for message in messages:
            if message["role"] != "system":
                before, behind = self.user if message["role"] == "user" else self.assistant
                parts += [before, message["content"], behind]
        return "".join([*parts, self.answer])

    def go(self) -> str:
        """The template in Go's language, as Ollama calls it: with .System and .Messages."""
        head = self.start
        if self.system is not None:
            before, behind = self.system
            head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{self.start}{{{{ end }}}}"
        user, assistant = ("{{ .Content }}".join(around) for around in (self.user, self.assistant))
        turn = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        return f"{head}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.answer}"


def turns(tokenizer: Any, add_bos: bool) -> Turns | None:
    """What the chat template of `tokenizer` puts around messages; None where it is more than that, or there is none.

    A beginning of the text that `add_bos` puts there anyway is left out. Ollama runs no Jinja: a template that it does not
    know by its text, and that no TEMPLATE of a Modelfile replaces, it leaves out (its server/model.go, detectChatTemplate).
    """
    if not tokenizer.chat_template:
        return None
    bos = tokenizer.bos_token or "" if add_bos else ""

    def rendered(roles: str, answer: bool = True) -> str:
        text: str = tokenizer.apply_chat_template(_messages(roles), tokenize=False, add_generation_prompt=answer)
        return text.removeprefix(bos)

    try:
        found = _found(rendered)
        same = all(
            found.render(_messages(roles)) == rendered(roles)
            for roles in _CONVERSATIONS
            if found.system is not None or "s" not in roles
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    written = "".join((found.start, *(found.system or ()), *found.user, *found.assistant, found.answer))
    return found if same and "{{" not in written and '"""' not in written else None


def _messages(roles: str) -> Messages:
    names = {name[0]: name for name in _WORDS}
    return [{"role": names[role], "content": _WORDS[names[role]]} for role in roles]


def _found(rendered: Any) -> Turns:
    """Raises ValueError for a template whose texts cannot be told apart so."""
    user, assistant = _WORDS["user"], _WORDS["assistant"]
    start_user, behind_user = _split(rendered("u", answer=False), user)
    answer = _without(rendered("u"), f"{start_user}{user}{behind_user}")
    _, behind_assistant = _split(rendered("ua", answer=False), assistant)
    _, between, rest = rendered("uau", answer=False).split(user)
    _without(rest, behind_user)
    before_assistant, back = _split(_without(between, behind_user), assistant)
    before_user = _without(back, behind_assistant)
    start = _without(start_user[::-1], before_user[::-1])[::-1]
    try:
        before, more = _split(rendered("su"), _WORDS["system"])
        system = before, _without(_split(more, user)[0][::-1], before_user[::-1])[::-1]
    except TemplateError:
        system = None
    return Turns(start, system, (before_user, behind_user), (before_assistant, behind_assistant), answer)


def _split(text: str, word: str) -> tuple[str, str]:
    before, behind = text.split(word)
    return before, behind


def _without(text: str, begin: str) -> str:
    if not text.startswith(begin):
        raise ValueError(f"{text!r} does not begin with {begin!r}")
    return text[len(begin) :]
