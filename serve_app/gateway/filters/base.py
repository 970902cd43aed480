"""What every filter is, and how to bring one's own.

A filter of one's own is a class named in the configuration by its dotted path; `type` then only says which built-in
kind it stands beside::

    filters:
      house-style:
        type: words
        action: redact
        options: {class: "company.filters:HouseStyle", anything: else}

It derives from `TextFilter` (looks at text as it comes, in this process) or from `RemoteFilter` (asks somebody, and may
wait), and is made with the filter's name and its configuration. It raises `FilterError` for options that it cannot use.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import config
from ..errors import ContentBlocked

Phase = Literal["input", "output"]


class FilterError(ValueError):
    """A filter's configuration cannot be used; `problems` holds a sentence for each mistake."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class About:
    """Whose request it is, for filters that ask others. `retain` False: nobody may keep anything of it."""

    request_id: str
    client: str
    tenant: str
    model: str
    retain: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """How often a filter found a kind of text in a request or in its answer. It never holds the text."""

    filter: str
    kind: str
    action: config.Action
    phase: Phase
    count: int = 1


class Blocked(ContentBlocked):
    """A filter with action `block` found something. `findings` says what, for the audit and the metrics."""

    def __init__(self, filter_name: str, phase: Phase, findings: Sequence[Finding] = ()) -> None:
        what = "request" if phase == "input" else "answer"
        super().__init__(f"The {what} was blocked by the content filter {filter_name!r}.")
        self.findings = list(findings)


class Stage(ABC):
    """One text on its way through one filter, from its beginning to its end.

    Attributes:
        blocked: The filter's action is `block` and it found something; nothing leaves any more.
        found: How often each kind was found.
    """

    __slots__ = ("blocked", "found")

    def __init__(self) -> None:
        self.blocked = False
        self.found: dict[str, int] = {}

    @abstractmethod
    def feed(self, text: str, final: bool = False) -> str:
        """Take the next piece and give what may leave now; with `final`, all that is left.

        The joined results do not depend on how the text was cut into pieces.
        """

    def count(self, kind: str) -> None:
        """Note that `kind` was found."""
        self.found[kind] = self.found.get(kind, 0) + 1


class Filter:
    """What text filters and remote filters share.

    Attributes:
        reads: Requests whose prompts are no text, but numbers of tokens, are refused before they come here.
        joins: The texts of one message are looked at as one. Only for filters that change nothing.
        roles: The roles of the messages that are looked at in requests; None: all.
    """

    joins = False
    roles: frozenset[str] | None = None

    def __init__(self, name: str, settings: config.Filter) -> None:
        self.name = name
        self.action: config.Action = settings.action
        self.inputs = "input" in settings.on
        self.outputs = "output" in settings.on
        self.hold_back = settings.hold_back
        self.reads = settings.action != "flag" and settings.unreadable_prompts == "refuse"
        if settings.hold_back < 1:
            raise FilterError([f"hold_back is {settings.hold_back}: give at least 1 character"])


class TextFilter(Filter, ABC):
    """A filter that looks at text in this process."""

    @abstractmethod
    def begin(self, phase: Phase, *, json: bool = False) -> Stage:
        """Start with a new text. `json`: it is the source of a JSON document (arguments of a call), with escapes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a remote filter says: `texts` are the new ones, of the same number, where the action is `redact`."""

    action: Literal["allow", "block", "redact"]
    texts: Sequence[str] = ()
    reason: str = ""


def _untold(reason: str) -> None:
    """Nobody wants to know."""


class RemoteFilter(Filter, ABC):
    """A filter that asks somebody else.

    Attributes:
        on_error: Told why a question found no answer, whatever that means for the request.
    """

    def __init__(self, name: str, settings: config.Filter) -> None:
        super().__init__(name, settings)
        self.on_error: Callable[[str], None] = _untold

    @abstractmethod
    async def judge(self, phase: Phase, operation: str, texts: Sequence[str], before: str, about: About) -> Verdict:
        """Say what to do with `texts`.

        Args:
            before: What was let through directly before the (single) text, at most `hold_back` characters: streams are
                judged piece by piece.

        Raises:
            Unavailable: It cannot be said, and that means no.
        """

    async def close(self) -> None:
        """Let connections go. Judgements under way are finished first."""


class Options:
    """Reads a filter's options and gathers every mistake."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._values.pop("class", None)
        self.problems: list[str] = []

    def _take(self, name: str, default: Any, types: tuple[type, ...], what: str) -> Any:
        value = self._values.pop(name, default)
        # A bool is an int to Python, but not to whoever writes a configuration.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            self.problems.append(f"options.{name} is {value!r}: give {what}")
            return default
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._take(name, default, (bool,), "true or false"))

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = float(self._take(name, default, (int, float), f"a number from {low:g} to {high:g}"))
        if not low <= value <= high:
            self.problems.append(f"options.{name} is {value:g}: give a number from {low:g} to {high:g}")
            return default
        return value

    def text(self, name: str, default: str) -> str:
        return str(self._take(name, default, (str,), "a text"))

    def choice(self, name: str, default: str, known: Iterable[str]) -> str:
        value = self.text(name, default)
        if value not in known:
            self.problems.append(f"options.{name} is {value!r}: give one of {', '.join(known)}")
            return default
        return value

    def texts(self, name: str, default: Sequence[str]) -> list[str]:
        value = self._take(name, list(default), (list, tuple), "a list of texts")
        if not all(isinstance(one, str) and one for one in value):
            self.problems.append(f"options.{name} holds what is no text, or an empty one: give texts")
            return list(default)
        return list(value)

    def mapping(self, name: str) -> dict[str, str]:
        value = self._take(name, {}, (dict,), "a mapping of texts")
        if not all(isinstance(one, str) for pair in value.items() for one in pair):
            self.problems.append(f"options.{name} holds what is no text: give texts")
            return {}
        return dict(value)

    def end(self) -> None:
        """Raise `FilterError` when anything was wrong, names that nobody asked for included."""
        self.problems += [f"options.{name} is not known here" for name in self._values]
        if self.problems:
            raise FilterError(self.problems)


#: The built-in types; imported when first used.
_TYPES = {
    "injection": "injection:Injection",
    "sensitive_data": "sensitive:SensitiveData",
    "words": "words:Words",
    "webhook": "webhook:Webhook",
}


def make(name: str, settings: config.Filter) -> TextFilter | RemoteFilter:
    """Make the filter `name`.

    Raises:
        FilterError: Its configuration cannot be used.
    """
    path = settings.options.get("class")
    if path is None:
        path = f"{__package__}.{_TYPES[settings.type]}"
    if not isinstance(path, str) or path.count(":") != 1:
        raise FilterError([f"options.class is {path!r}: give package.module:Class"])
    module, _, attribute = path.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise FilterError([f"options.class is {path!r}: it cannot be imported ({error})"]) from error
    if not (isinstance(made, type) and issubclass(made, (TextFilter, RemoteFilter))):
        raise FilterError([f"options.class is {path!r}: it is no TextFilter and no RemoteFilter"])
    return made(name, settings)


def problems(name: str, settings: config.Filter) -> list[str]:
    """What is wrong with a filter's configuration, a sentence each; empty: nothing. Makes the filter to find out."""
    try:
        make(name, settings)
    except FilterError as error:
        return error.problems
    return []
