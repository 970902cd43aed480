"""A role's filters, in order, over requests, answers and streams."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from .. import config
from ..errors import InvalidRequest
from . import texts
from .base import About, Blocked, FilterError, Finding, Phase, RemoteFilter, Stage, TextFilter, make
from .scan import BLOCK
from .stream import StreamFilter

AnyFilter = TextFilter | RemoteFilter


class Tally:
    """Counts findings while a text is looked at."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[tuple[AnyFilter, str], int] = {}

    def add(self, one: AnyFilter, found: Mapping[str, int]) -> None:
        for kind, count in found.items():
            self._counts[one, kind] = self._counts.get((one, kind), 0) + count

    def findings(self, phase: Phase) -> list[Finding]:
        return [Finding(one.name, kind, one.action, phase, count) for (one, kind), count in self._counts.items()]


def _copy(value: Any) -> Any:
    """A copy of a JSON value whose lists and objects may be changed."""
    if isinstance(value, dict):
        return {name: _copy(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_copy(one) for one in value]
    return value


class Chain:
    """Filters in the order in which a role names them. Each sees what the one before it let through.

    Attributes:
        has_input: Requests have to go through `request`.
        has_output: Answers have to go through `answer` or `stream`.
    """

    def __init__(self, filters: Sequence[AnyFilter]) -> None:
        self._filters = tuple(filters)
        self._inputs = tuple(one for one in filters if one.inputs)
        self._outputs = tuple(one for one in filters if one.outputs)
        self._reader = next((one.name for one in self._inputs if one.reads), "")
        self.has_input = bool(self._inputs)
        self.has_output = bool(self._outputs)

    @classmethod
    def build(cls, names: Sequence[str], filters: Mapping[str, config.Filter]) -> Chain:
        """Make the filters `names`. Costs milliseconds: once for a policy and a role, not for a request.

        Raises:
            FilterError: One is unknown or cannot be used.
        """
        unknown = [name for name in names if name not in filters]
        if unknown:
            raise FilterError([f"filter {name!r} is not defined" for name in unknown])
        return cls([make(name, filters[name]) for name in names])

    async def request(
        self, operation: str, body: dict[str, Any], about: About
    ) -> tuple[dict[str, Any] | None, list[Finding]]:
        """Look at a request.

        Returns:
            A changed copy of the body, or None where nothing changed; and what was found.

        Raises:
            Blocked: A filter blocks it.
            InvalidRequest: A prompt is no text, and a filter has to look at all there is.
            Unavailable: A filter that has to be asked does not answer.
        """
        if self._reader:
            name = texts.unreadable(body)
            if name:
                raise InvalidRequest(
                    f"The content filter {self._reader!r} cannot look into tokens: send `{name}` as text.",
                    param=name,
                    code="content_filter",
                )
        return await self._run("input", operation, body, about)

    async def answer(
        self, operation: str, body: dict[str, Any], about: About
    ) -> tuple[dict[str, Any] | None, list[Finding]]:
        """Look at an answer that was not streamed: every choice, its reasoning, its calls' arguments. As `request`."""
        changed, findings = await self._run("output", operation, body, about)
        if changed is not None:
            texts.drop_repetitions(changed)
        return changed, findings

    def stream(self, operation: str, about: About) -> StreamFilter:
        """Begin a streamed answer."""
        return StreamFilter(self._outputs, operation, about)

    async def close(self) -> None:
        """Let connections go, when a newer policy has replaced this one. Requests still in this chain may finish."""
        for one in self._filters:
            if isinstance(one, RemoteFilter):
                await one.close()

    async def _run(
        self, phase: Phase, operation: str, body: dict[str, Any], about: About
    ) -> tuple[dict[str, Any] | None, list[Finding]]:
        filters = self._inputs if phase == "input" else self._outputs
        collect = texts.of_request if phase == "input" else texts.of_answer
        slots = collect(body) if filters else []
        if not slots:
            return None, []
        tally = Tally()
        original = [slot.text for slot in slots]
        current = original
        for one in filters:
            if isinstance(one, RemoteFilter):
                verdict = await one.judge(phase, operation, current, "", about)
                if verdict.action == "allow":
                    continue
                tally.add(one, {verdict.action: 1})
                if one.action == "flag":
                    continue
                if verdict.action == "block":
                    raise Blocked(one.name, phase, tally.findings(phase))
                current = list(verdict.texts)
            else:
                current = await self._apply(one, phase, slots, current, tally)
        findings = tally.findings(phase)
        if current == original:
            return None, findings
        changed: dict[str, Any] = _copy(body)
        for slot, before, after in zip(collect(changed), original, current, strict=True):
            if after != before:
                slot.put(after)
        return changed, findings

    async def _apply(
        self, one: TextFilter, phase: Phase, slots: Sequence[texts.Slot], current: list[str], tally: Tally
    ) -> list[str]:
        result = list(current)
        joins = one.joins and phase == "input"
        stage: Stage | None = None
        spent = 0
        for index, slot in enumerate(slots):
            if phase == "input" and one.roles is not None and slot.role and slot.role not in one.roles:
                continue
            if stage is None:
                stage = one.begin(phase, json=slot.json)
            text = current[index]
            last = (
                not joins
                or index + 1 == len(slots)
                or slots[index + 1].group != slot.group
                or slots[index + 1].json != slot.json
            )
            out: list[str] = []
            for start in range(0, len(text) or 1, BLOCK):
                piece = text[start : start + BLOCK]
                spent += len(piece)
                out.append(stage.feed(piece, last and start + BLOCK >= len(text)))
                if stage.blocked:
                    tally.add(one, stage.found)
                    raise Blocked(one.name, phase, tally.findings(phase))
                if spent >= BLOCK:
                    # A long text must not keep other requests waiting.
                    spent = 0
                    await asyncio.sleep(0)
            if not joins:
                result[index] = "".join(out)
            elif not last:
                stage.feed(" ")
            if last:
                tally.add(one, stage.found)
                stage = None
        return result
