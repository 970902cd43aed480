# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What preflight finds and how it tells it: problems, suggestions, and the report a person reads.

Nothing here imports Ansible, so every rule can be tested as a plain function.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["ABSENT", "Problem", "is_secret", "nearest", "render", "show", "split_path", "step"]

#: Columns of the report's text; a line of a terminal log, also inside a CI viewer's margins.
WIDTH = 118
_LONGEST_VALUE = 120
_SECRET_WORDS = ("token", "password", "secret", "access_key", "api_key", "private_key")
#: Names that hold such a word and no secret: switches, names of objects, references to where a secret lies.
_NOT_SECRET_ENDINGS = ("_name", "_names", "_enabled", "_store", "_arn", "_path", "_max_length", "_tokens")


class _Absent:
    """The value of what was not given, which is not the same as null."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclass(frozen=True)
class Problem:
    """One thing to put right before anything may be changed (or, as a warning, one thing to know)."""

    #: Path of the variable, such as ``rayservice_models[0].replicas.min``, or what else is wrong: ``ansible-core``.
    variable: str
    #: The value as found; ``ABSENT`` where there is none.
    value: object
    reason: str
    cure: str
    #: File and line the value was read from, where known.
    where: str = ""
    warning: bool = False

    def at(self, where: str) -> Problem:
        """The same problem with the place its value came from."""
        return replace(self, where=where)

    def as_dict(self) -> dict[str, str]:
        """Plain strings, for a registered result or a report file."""
        return {
            "variable": self.variable,
            "value": show(self.value, secret=is_secret(self.variable, self.value)),
            "reason": self.reason,
            "cure": self.cure,
            "where": self.where,
        }


def is_secret(variable: str, value: object = "") -> bool:
    """Whether a variable's value must not be printed: the last name in its path says so.

    A number is one where the name ends with the word, as ``api_token`` does and ``token_limit`` does not.
    """
    names = [part for part in split_path(variable) if isinstance(part, str)]
    last = names[-1].lower().replace("tokenizer", "") if names else ""
    if not any(word in last for word in _SECRET_WORDS) or last.endswith(_NOT_SECRET_ENDINGS):
        return False
    return last.endswith(_SECRET_WORDS) or not isinstance(value, int | float)


def show(value: object, secret: bool = False) -> str:
    """The value as a person would write it in JSON or YAML, cut to one line."""
    if value is ABSENT:
        return "(absent)"
    if secret and value:
        return "(not shown)"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 4] + " ..."


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, or None where nothing is alike (ratio of ``difflib``, 0 to 1)."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def split_path(variable: str) -> list[str | int]:
    """Split ``models[0].replicas.min`` into ``["models", 0, "replicas", "min"]``."""
    parts: list[str | int] = []
    for name in variable.split("."):
        head, *indices = name.split("[")
        if head:
            parts.append(head)
        for index in indices:
            key = index.rstrip("]")
            parts.append(int(key) if key.isdigit() else key)
    return parts


def step(value: object, part: str | int) -> object:
    """One step into nested data; ``ABSENT`` where the path ends."""
    if isinstance(value, Mapping):
        return value.get(part, ABSENT)
    if isinstance(part, int) and isinstance(value, Sequence) and not isinstance(value, str) and part < len(value):
        return value[part]
    return ABSENT


def render(problems: Sequence[Problem], host: str, warning: bool = False) -> str:
    """The report on one cluster: each entry names variable, value, reason and cure."""
    if not problems:
        return ""
    kind = "warning" if warning else "problem"
    count = f"{len(problems)} {kind}{'s' if len(problems) != 1 else ''}"
    tail = "" if warning else "; nothing has been changed"
    lines = [f"Preflight: {count} in cluster {host}{tail}", ""]
    for number, problem in enumerate(problems, 1):
        lines.extend(_entry(number, problem))
    return "\n".join(lines).rstrip() + "\n"


def _entry(number: int, problem: Problem) -> Iterator[str]:
    place = f"   ({problem.where})" if problem.where else ""
    yield f"{number:>3}. {problem.variable}{place}"
    rows = (
        ("value", show(problem.value, secret=is_secret(problem.variable, problem.value))),
        ("reason", problem.reason),
        ("cure", problem.cure),
    )
    for label, text in rows:
        if label == "value" and problem.value is ABSENT and not text:
            continue
        yield from textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"     {label:<8}",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
    yield ""
