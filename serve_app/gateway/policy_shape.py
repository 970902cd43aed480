"""From plain values (of YAML or JSON) to the structures of `config`, with every mistake named, not only the first."""

from __future__ import annotations

import difflib
import functools
import itertools
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from .keys import masked

T = TypeVar("T")

#: Names whose values are never shown in a message.
_SECRET_NAMES: Final = ("headers", "semantic_options")


@dataclass(frozen=True)
class Problem:
    """One mistake in the configuration."""

    #: Where: a path such as `roles.basic.filters[0]`, behind the file's name where it is not the main file's.
    variable: str
    #: The value as found, cut to one line; empty where there is none or it must not be shown.
    value: str
    reason: str
    cure: str

    def __str__(self) -> str:
        found = f" (it is {self.value})" if self.value else ""
        return f"{self.variable}: {self.reason}{found}. {self.cure}"


class Problems(list[Problem]):
    """The mistakes found so far.

    Attributes:
        left_out: By the path of a list, the numbers of items that could not be converted and are missing in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[str, set[int]] = {}

    def numbered(self, path: str, items: Iterable[T]) -> Iterator[tuple[int, T]]:
        """The items of a list, each with its number as written."""
        missing = self.left_out.get(path, set())
        return zip((number for number in itertools.count() if number not in missing), items, strict=False)

    def say(self, variable: str, value: object, reason: str, cure: str) -> None:
        """Add one. Keys in any text are masked; the value of a variable with secrets is left out."""
        hidden = any(name in variable for name in _SECRET_NAMES)
        shown = "" if hidden or value is None or value is msgspec.UNSET else show(value)
        self.append(Problem(masked(variable), shown, masked(reason), masked(cure)))


def show(value: object) -> str:
    """The value as JSON, in one line of at most 80 characters, without keys."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError):
        text = type(value).__name__
    text = masked(text)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A cure for a name that is not known: the most similar one, or all of them."""
    names = sorted(known)
    if not names:
        return "None is declared."
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."


@functools.cache
def _fields(struct: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.encode_name: field for field in msgspec.structs.fields(struct)}


class _Broken:
    """Stands for what could not be converted."""


_BROKEN: Final = _Broken()


def convert(value: object, kind: type[T], path: str, problems: Problems) -> T | None:
    """The value as `kind`. Where parts are wrong, each is a problem, and the rest is kept.

    A wrong part takes its default, so that what else is wrong around it is found in the same pass; an object that lacks
    what it must have is left out.

    Returns:
        None where nothing of it could be kept. With any new problem the result is good for further checks only.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        pass
    result = _part(value, kind, path, problems)
    return None if isinstance(result, _Broken) else typing.cast(T, result)


def _part(value: object, kind: Any, path: str, problems: Problems) -> object:
    origin = typing.get_origin(kind)
    if origin in {typing.Union, types.UnionType}:
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        others = [one for one in choices if one is not type(None)]
        if len(others) == 1:
            return _part(value, others[0], path, problems)
    elif origin is list:
        if isinstance(value, list):
            (inner,) = typing.get_args(kind)
            items = [_part(one, inner, f"{path}[{number}]", problems) for number, one in enumerate(value)]
            missing = {number for number, one in enumerate(items) if one is _BROKEN}
            if missing:
                problems.left_out[path] = missing
            return [one for one in items if one is not _BROKEN]
    elif origin is dict:
        if isinstance(value, dict):
            _, inner = typing.get_args(kind)
            result = {}
            for name, one in value.items():
                if not isinstance(name, str):
                    problems.say(path, name, "a name in it is no text", "Put the name in quotation marks.")
                    continue
                made = _part(one, inner, f"{path}.{name}" if path else name, problems)
                if made is not _BROKEN:
                    result[name] = made
            return result
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        return _structure(value, kind, path, problems)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, cure = _explained(str(error), kind)
        problems.say(path or "the file", value, reason, cure)
        return _BROKEN


def _structure(value: dict[Any, Any], kind: type[msgspec.Struct], path: str, problems: Problems) -> object:
    fields = _fields(kind)
    made: dict[str, Any] = {}
    whole = True
    for name, one in value.items():
        field = fields.get(name) if isinstance(name, str) else None
        here = f"{path}.{name}" if path else str(name)
        if field is None:
            problems.say(here, None, "there is no such setting", nearest(str(name), fields))
            continue
        converted = _part(one, field.type, here, problems)
        if converted is not _BROKEN:
            made[field.name] = converted
        elif field.required:
            whole = False
    for name, field in fields.items():
        if field.required and name not in value:
            problems.say(f"{path}.{name}" if path else name, None, "it is missing", f"Give {_described(field.type)}.")
            whole = False
    return kind(**made) if whole else _BROKEN


def _explained(message: str, kind: Any) -> tuple[str, str]:
    """msgspec's message as a reason without its path (`$`), and what to give instead."""
    reason = message.partition(" - at `")[0]
    if reason.startswith("Invalid enum value"):
        reason = "it is none of the known values"
    return reason[0].lower() + reason[1:], f"Give {_described(kind)}."


def _described(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(one) for one in typing.get_args(kind))
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(_described(one) for one in typing.get_args(kind))
    if origin is list:
        return f"a list, each {_described(typing.get_args(kind)[0])}"
    if origin is dict:
        return "a mapping of names"
    simple: dict[Any, str] = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return simple.get(kind, "a mapping")


def declared(value: object, section: str) -> Collection[str]:
    """Names under a section as written, also those whose content is wrong: what refers to them is right."""
    part = value.get(section) if isinstance(value, dict) else None
    return {name for name in part if isinstance(name, str)} if isinstance(part, dict) else set()
