"""Where the texts are in requests and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_CONTENT = ("text", "refusal", "transcript", "thinking")
#: Fields of a chat message, apart from its content.
MESSAGE_FIELDS = ("reasoning_content", "reasoning", "refusal", "name")
#: Names that are no texts: identifiers.
_PLAIN = re.compile(r"[A-Za-z_$]{0,64}")
#: Values that are no texts: JSON Schema's and the API's own words.
_WORDS = frozenset(
    {"", "array", "boolean", "custom", "function", "grammar", "integer", "null", "number", "object", "string", "text"}
)


@dataclass(slots=True)
class Slot:
    """A text where it stands.

    Attributes:
        holder: The object or list that holds it.
        at: Its key or index there.
        role: Of its message; empty: it has none.
        group: Texts of the same message have the same number.
        json: It is the source of a JSON document.
    """

    holder: Any
    at: Any
    role: str = ""
    group: int = 0
    json: bool = False

    @property
    def text(self) -> str:
        text: str = self.holder[self.at]
        return text

    def put(self, text: str) -> None:
        """Put another text in its place."""
        self.holder[self.at] = text


def _field(holder: Any, at: Any, role: str, group: int, *, json: bool = False) -> Iterator[Slot]:
    if isinstance(holder[at], str) and holder[at]:
        yield Slot(holder, at, role, group, json)


def _named(holder: dict[str, Any], names: tuple[str, ...], role: str, group: int) -> Iterator[Slot]:
    for name in names:
        if isinstance(holder.get(name), str):
            yield from _field(holder, name, role, group)


def _content(holder: dict[str, Any], at: str, role: str, group: int) -> Iterator[Slot]:
    """A text, or a list of texts and parts (`{"type": "text", "text": ...}`)."""
    content = holder.get(at)
    if isinstance(content, str):
        yield from _field(holder, at, role, group)
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if isinstance(part, str):
                yield from _field(content, index, role, group)
            elif isinstance(part, dict):
                yield from _named(part, _CONTENT, role, group)
    elif isinstance(content, dict):
        yield from _named(content, _CONTENT, role, group)
        yield from _content(content, "content", role, group)


def _calls(message: dict[str, Any], role: str, group: int) -> Iterator[Slot]:
    calls = message.get("tool_calls")
    functions = [message.get("function_call")]
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            functions.append(call.get("function"))
            custom = call.get("custom")
            if isinstance(custom, dict):
                yield from _named(custom, ("input",), role, group)
    for function in functions:
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            yield from _field(function, "arguments", role, group, json=True)


def _message(message: dict[str, Any], group: int) -> Iterator[Slot]:
    role = message.get("role")
    role = role if isinstance(role, str) else ""
    yield from _content(message, "content", role, group)
    yield from _named(message, MESSAGE_FIELDS, role, group)
    yield from _calls(message, role, group)
    audio = message.get("audio")
    if isinstance(audio, dict):
        yield from _named(audio, ("transcript",), role, group)


def _item(item: dict[str, Any], group: int) -> Iterator[Slot]:
    """An item of the Responses API: a message, a call, its output, a reasoning."""
    role = item.get("role")
    kind = item.get("type")
    if not isinstance(role, str):
        role = "tool" if isinstance(kind, str) and kind.endswith("_output") else ""
    yield from _content(item, "content", role, group)
    yield from _content(item, "output", role, group)
    yield from _content(item, "summary", role, group)
    yield from _named(item, ("text", "input", "refusal"), role, group)
    if isinstance(item.get("arguments"), str):
        yield from _field(item, "arguments", role, group, json=True)


def _any(holder: Any, at: Any, group: int) -> Iterator[Slot]:
    """Every text of a document."""
    value = holder[at]
    if isinstance(value, str):
        yield from _field(holder, at, "", group)
    elif isinstance(value, dict):
        for name in value:
            yield from _any(value, name, group)
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from _any(value, index, group)


@dataclass(slots=True)
class _Name(Slot):
    """The name of a member, which is a text where the whole object is printed."""

    @property
    def text(self) -> str:
        name: str = self.at
        return name

    def put(self, text: str) -> None:
        members = list(self.holder.items())
        self.holder.clear()
        self.holder.update((text if name == self.at else name, value) for name, value in members)


def _printed(holder: Any, at: Any, group: int) -> Iterator[Slot]:
    """Every text of a document that is printed with its names: what describes tools, what templates are told."""
    value = holder[at]
    if isinstance(value, str):
        if value not in _WORDS:
            yield from _field(holder, at, "", group)
    elif isinstance(value, dict):
        for name in value:
            yield from _printed(value, name, group)
        # After what they stand for: a name that is replaced leads nowhere any more.
        for name in value:
            if not _PLAIN.fullmatch(name):
                yield _Name(value, name, "", group)
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from _printed(value, index, group)


def unreadable(body: dict[str, Any]) -> str:
    """The parameter of a request that gives its prompt as tokens or as embeddings; empty: none does."""
    for name in ("prompt", "input"):
        value = body.get(name)
        if isinstance(value, list) and any(isinstance(one, (int, float, list)) for one in value):
            return name
    return "prompt_embeds" if body.get("prompt_embeds") else ""


def of_request(body: dict[str, Any]) -> list[Slot]:
    """The texts of a request of any operation, in a fixed order.

    Tokens given as numbers are none, and neither are pictures and sounds.
    """
    slots: list[Slot] = []
    group = 0
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        group += 1
        if isinstance(message, dict):
            slots += _message(message, group)
    items = body.get("input")
    if isinstance(items, list):
        for index, item in enumerate(items):
            group += 1
            if isinstance(item, str):
                slots += _field(items, index, "", group)
            elif isinstance(item, dict):
                slots += _item(item, group)
    for name in ("input", "prompt", "suffix", "query", "text_1", "text_2", "data_1", "data_2"):
        value = body.get(name)
        group += 1
        if isinstance(value, str):
            slots += _field(body, name, "", group)
        elif isinstance(value, list) and name != "input":
            for index, one in enumerate(value):
                group += 1
                if isinstance(one, str):
                    slots += _field(value, index, "", group)
                elif isinstance(one, dict):
                    slots += _content(one, "content", "", group)
                    slots += _named(one, _CONTENT, "", group)
        elif isinstance(value, dict):
            slots += _content(body, name, "", group)
    for name in ("documents", "queries"):
        value = body.get(name)
        if isinstance(value, (list, dict, str)):
            parts = value if isinstance(value, list) else [value]
            for index in range(len(parts)):
                group += 1
                slots += _any(body, name, group) if parts is not value else _any(parts, index, group)
    group += 1
    if isinstance(body.get("instructions"), str):
        slots += _field(body, "instructions", "system", group)
    for name in ("tools", "functions"):
        value = body.get(name)
        for index in range(len(value) if isinstance(value, list) else 0):
            group += 1
            slots += _printed(value, index, group)
    if "chat_template_kwargs" in body:
        group += 1
        slots += _printed(body, "chat_template_kwargs", group)
    prediction = body.get("prediction")
    if isinstance(prediction, dict):
        slots += _content(prediction, "content", "assistant", group + 1)
    return slots


def of_answer(body: dict[str, Any]) -> list[Slot]:
    """The texts of an answer that was not streamed, in a fixed order."""
    slots: list[Slot] = []
    group = 0
    choices = body.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        group += 1
        if isinstance(choice, dict):
            if isinstance(choice.get("message"), dict):
                slots += _message(choice["message"], group)
            slots += _named(choice, ("text",), "assistant", group)
    output = body.get("output")
    for item in output if isinstance(output, list) else ():
        group += 1
        if isinstance(item, dict):
            slots += _item(item, group)
    group += 1
    slots += _named(body, ("text", "output_text"), "", group)
    for name in ("segments", "words"):
        parts = body.get(name)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                slots += _named(part, ("text", "word"), "", group)
    results = body.get("results")
    for result in results if isinstance(results, list) else ():
        if isinstance(result, dict) and "document" in result:
            group += 1
            slots += _any(result, "document", group)
    return slots


def of_event(event: dict[str, Any]) -> list[Slot]:
    """The whole texts in an event of a streamed response (`...done`, `response.completed`)."""
    slots = _named(event, ("text", "refusal", "transcript", "input", "code"), "", 0)
    found = list(slots)
    if isinstance(event.get("arguments"), str):
        found += _field(event, "arguments", "", 0, json=True)
    for name in ("part", "item"):
        if isinstance(event.get(name), dict):
            found += _item(event[name], 0)
    response = event.get("response")
    if isinstance(response, dict):
        found += of_answer(response)
    return found


def drop_repetitions(answer: dict[str, Any]) -> None:
    """Take out of an answer what says its texts once more, in other pieces: a text was changed."""
    for name in ("choices", "segments", "output"):
        parts = answer.get(name)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                drop_tokens(part)
                part.pop("tokens", None)
                content = part.get("content")
                for one in content if isinstance(content, list) else ():
                    if isinstance(one, dict) and one.get("logprobs"):
                        one["logprobs"] = []
    if isinstance(answer.get("text"), str):
        # A transcript.
        answer.pop("words", None)
        answer.pop("logprobs", None)


def drop_tokens(choice: dict[str, Any]) -> None:
    """Take out of a choice what spells its text a second time."""
    if choice.get("logprobs") is not None:
        choice["logprobs"] = None
    for name in ("token_ids", "prompt_token_ids", "prompt_logprobs"):
        choice.pop(name, None)
