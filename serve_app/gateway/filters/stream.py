"""Filters over streamed answers.

A streamed answer is several texts side by side: the content of each choice, its reasoning, the arguments of each call.
Each goes through the filters by itself, and what leaves is what would have left had the whole text been there at once.
A text ends where the next of its choice begins (reasoning before content, one call before the next), with the choice,
or with the stream. Where a filter blocks, the whole stream ends with `content_filter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import texts
from .base import About, Finding, RemoteFilter, Stage, TextFilter

_Filters = Sequence[TextFilter | RemoteFilter]


_LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})


class RemoteStage:
    """A text on its way past a filter that has to be asked: in pieces, cut between words where there are any."""

    __slots__ = ("_about", "_before", "_held", "_operation", "blocked", "found", "one")

    def __init__(self, one: RemoteFilter, operation: str, about: About) -> None:
        self.one = one
        self.blocked = False
        self.found: dict[str, int] = {}
        self._operation = operation
        self._about = about
        self._held = ""
        self._before = ""

    async def feed(self, text: str, final: bool = False) -> str:
        if self.blocked:
            return ""
        held = self._held + text
        size = self.one.hold_back
        out = ""
        while len(held) >= size or (final and held):
            cut = len(held)
            if cut > size or not final:
                cut = min(cut, size)
                space = max(held.rfind(" ", cut // 2, cut), held.rfind("\n", cut // 2, cut))
                cut = space + 1 if space >= 0 else cut
            piece, held = held[:cut], held[cut:]
            verdict = await self.one.judge("output", self._operation, [piece], self._before, self._about)
            if verdict.action != "allow":
                self.found[verdict.action] = self.found.get(verdict.action, 0) + 1
                if self.one.action != "flag":
                    if verdict.action == "block":
                        self.blocked = True
                        self._held = ""
                        return out
                    piece = verdict.texts[0]
            out += piece
            self._before = (self._before + piece)[-size:]
        self._held = held
        return out


class Pipe:
    """One text through all filters."""

    __slots__ = ("_stages", "blocked", "ended", "inn", "out", "plain")

    def __init__(self, filters: _Filters, operation: str, about: About, *, json: bool, keep: bool = False) -> None:
        self._stages: list[tuple[TextFilter | RemoteFilter, Stage | RemoteStage]] = [
            (
                one,
                RemoteStage(one, operation, about) if isinstance(one, RemoteFilter) else one.begin("output", json=json),
            )
            for one in filters
        ]
        self.blocked = False
        self.ended = False
        # What came and what left, where the whole text is said once more at its end.
        self.inn: list[str] | None = [] if keep else None
        self.out: list[str] = []

    async def feed(self, text: str, final: bool = False) -> str:
        if self.inn is not None:
            self.inn.append(text)
        for _, stage in self._stages:
            if isinstance(stage, RemoteStage):
                text = await stage.feed(text, final)
            else:
                text = stage.feed(text, final)
            if stage.blocked:
                # What was let through before it is still let through by those that follow.
                self.blocked = final = True
        self.ended = final
        if self.inn is not None:
            self.out.append(text)
        return text

    def found(self) -> list[tuple[TextFilter | RemoteFilter, Mapping[str, int]]]:
        return [(one, stage.found) for one, stage in self._stages if stage.found]


class StreamFilter:
    """Filters one streamed answer. Chunks are changed in place.

    Attributes:
        blocked: A filter stopped the stream. Its last chunk said so; what the backend still sends is of no use.
    """

    def __init__(self, filters: _Filters, operation: str, about: About) -> None:
        self._filters = tuple(filters)
        self._operation = operation
        self._about = about
        # Probabilities and tokens spell the text out a second time, ahead of the filters.
        self._hide = any(one.action != "flag" for one in filters)
        self.blocked = False
        # By choice: its texts, the one that is being written, and what a chunk of it looks like.
        self._choices: dict[int, dict[tuple[Any, ...], Pipe]] = {}
        self._current: dict[int, tuple[Any, ...]] = {}
        self._chat = True
        self._envelope: dict[str, Any] = {}
        self._done: set[int] = set()
        # Of the Responses API: texts, and the last whole response.
        self._events: dict[tuple[Any, ...], Pipe] = {}
        self._templates: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._response: dict[str, Any] = {}
        self._sequence: int | None = None
        self._gone: list[Pipe] = []

    @property
    def findings(self) -> list[Finding]:
        """What was found so far."""
        counts: dict[tuple[str, str], tuple[Any, int]] = {}
        pipes = [
            *self._gone,
            *self._events.values(),
            *(pipe for texts_ in self._choices.values() for pipe in texts_.values()),
        ]
        for pipe in pipes:
            for one, found in pipe.found():
                for kind, count in found.items():
                    counts[one.name, kind] = (one, counts.get((one.name, kind), (one, 0))[1] + count)
        return [Finding(one.name, kind, one.action, "output", count) for (_, kind), (one, count) in counts.items()]

    async def feed(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a chunk and give those that may be sent now: none, one or several.

        Raises:
            Unavailable: A filter that has to be asked does not answer. Nothing more may be sent.
        """
        choices = chunk.get("choices")
        if isinstance(choices, list):
            if not choices:
                return [chunk]
            return [] if self.blocked else await self._feed_choices(chunk, choices)
        if self.blocked:
            return []
        if isinstance(chunk.get("type"), str):
            return await self._feed_event(chunk, chunk["type"])
        return [chunk]

    async def finish(self) -> list[dict[str, Any]]:
        """The stream has ended: what was held back is decided now. Chunks as from `feed`; after `blocked`, none."""
        if self.blocked:
            return []
        out = await self._end()
        if self.blocked and self._choices:
            out.append(self._last())
        elif self.blocked:
            out.append(self._incomplete())
        return self._number(out) if self._events else out

    async def _end(self) -> list[dict[str, Any]]:
        """End all texts."""
        out: list[dict[str, Any]] = []
        for index in list(self._choices):
            if index not in self._done and not self.blocked:
                out += await self._flush(index)
        for key in list(self._events):
            if not self.blocked:
                out += await self._end_event(key)
        return out

    # Chat and completions.

    def _pipe(self, index: int, key: tuple[Any, ...], json: bool) -> Pipe:
        pipes = self._choices.setdefault(index, {})
        pipe = pipes.get(key)
        if pipe is None or pipe.ended:
            if pipe is not None:
                self._gone.append(pipe)
            pipe = pipes[key] = Pipe(self._filters, self._operation, self._about, json=json)
        return pipe

    async def _feed_choices(self, chunk: dict[str, Any], choices: list[Any]) -> list[dict[str, Any]]:
        if not self._envelope:
            self._envelope = {name: value for name, value in chunk.items() if name not in {"choices", "usage"}}
            self._chat = any(isinstance(one, dict) and "delta" in one for one in choices)
        before: list[dict[str, Any]] = []
        kept: list[Any] = []
        for choice in choices:
            if not isinstance(choice, dict):
                kept.append(choice)
                continue
            index = choice.get("index")
            index = index if isinstance(index, int) else 0
            if self._hide:
                texts.drop_tokens(choice)
            flushed, keep = await self._feed_choice(index, choice)
            before += flushed
            if keep:
                kept.append(choice)
            if self.blocked:
                break
            if choice.get("finish_reason") is not None:
                _add(choice, await self._rest(index))
                if self.blocked:
                    break
                self._done.add(index)
        if self.blocked:
            for choice in kept:
                # Another reason may have come with the text that is blocked.
                if isinstance(choice, dict) and choice.get("index", 0) not in self._done:
                    choice["finish_reason"] = None
            chunk["choices"] = kept
            return [*before, *([chunk] if kept else []), self._last()]
        if not kept and chunk.get("usage") is None:
            return before
        chunk["choices"] = kept
        return [*before, chunk]

    async def _feed_choice(self, index: int, choice: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        """Filter a choice in place: chunks to be sent before it, and whether anything of it is left."""
        before: list[dict[str, Any]] = []
        taken = fed = False
        left = choice.get("finish_reason") is not None
        delta = choice.get("delta")
        if isinstance(delta, dict):
            left = left or "role" in delta
            for name in ("reasoning_content", "reasoning", "content", "refusal"):
                text = delta.get(name)
                if isinstance(text, str) and text:
                    taken = True
                    before += await self._switch(index, (name,), choice if fed else None)
                    fed = True
                    if self.blocked:
                        delta[name] = ""
                        continue
                    delta[name] = await self._text(index, (name,), text, json=False)
                    left = left or bool(delta[name])
            calls = delta.get("tool_calls")
            holders = [("call", delta.get("function_call"))]
            if isinstance(calls, list):
                holders += [(number.get("index", 0), number) for number in calls if isinstance(number, dict)]
            for number, holder in holders:
                if not isinstance(holder, dict):
                    continue
                taken = True
                key = ("call", number)
                before += await self._switch(index, key, choice if fed else None)
                fed = True
                left = await self._call(index, key, holder) or left
            left = left or any(
                value not in (None, "", [])
                for name, value in delta.items()
                if name not in {"content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call"}
            )
        text = choice.get("text")
        if isinstance(text, str) and text:
            taken = True
            choice["text"] = await self._text(index, ("text",), text, json=False)
            left = left or bool(choice["text"])
        return before, left or not taken

    async def _call(self, index: int, key: tuple[Any, ...], holder: dict[str, Any]) -> bool:
        left = any(name in holder for name in ("id", "name"))
        for name, field, json in (("function", "arguments", True), ("custom", "input", False), ("", "arguments", True)):
            inner = holder.get(name) if name else holder
            if not isinstance(inner, dict):
                continue
            left = left or bool(inner.get("name"))
            text = inner.get(field)
            if isinstance(text, str) and text:
                inner[field] = "" if self.blocked else await self._text(index, (*key, name, field), text, json=json)
                left = left or bool(inner[field])
        return left

    async def _text(self, index: int, key: tuple[Any, ...], text: str, *, json: bool) -> str:
        pipe = self._pipe(index, key, json)
        out = await pipe.feed(text)
        self.blocked = self.blocked or pipe.blocked
        return out

    async def _switch(self, index: int, key: tuple[Any, ...], choice: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Another text of the choice begins: the one before it is complete.

        What was held back of that goes into `choice`, where a piece of it stands already, and into a chunk of its own
        otherwise.
        """
        old = self._current.get(index)
        self._current[index] = key
        if old is None or old == key:
            return []
        if choice is None:
            return await self._flush(index)
        _add(choice, await self._rest(index))
        return []

    async def _rest(self, index: int) -> dict[str, Any]:
        """End all texts of a choice, and give what was held back of them, as a delta."""
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for key, pipe in self._choices.get(index, {}).items():
            if pipe.ended:
                continue
            rest = await pipe.feed("", True)
            self.blocked = self.blocked or pipe.blocked
            if not rest:
                continue
            if key[0] != "call":
                delta[key[0]] = rest
                continue
            _, number, name, field = key
            if name:
                calls.append({"index": number, name: {field: rest}})
            else:
                delta["function_call"] = {field: rest}
        if calls:
            delta["tool_calls"] = calls
        return delta

    async def _flush(self, index: int) -> list[dict[str, Any]]:
        """End all texts of a choice, and give what was held back of them as a chunk."""
        delta = await self._rest(index)
        if not delta:
            return []
        choice: dict[str, Any] = {"index": index, **({"delta": {}} if self._chat else {"text": ""})}
        _add(choice, delta)
        return [{**self._envelope, "choices": [{**choice, "logprobs": None, "finish_reason": None}]}]

    def _last(self) -> dict[str, Any]:
        """The chunk that says that the stream was blocked."""
        open_ones = sorted(set(self._choices) - self._done) or [0]
        empty: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return {
            **self._envelope,
            "choices": [
                {"index": index, **empty, "logprobs": None, "finish_reason": "content_filter"} for index in open_ones
            ],
        }

    # Events: the Responses API, transcriptions.

    async def _feed_event(self, event: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        if isinstance(event.get("sequence_number"), int) and self._sequence is None:
            self._sequence = event["sequence_number"]
        if isinstance(event.get("response"), dict):
            self._response = event["response"]
        out: list[dict[str, Any]] = []
        if kind.endswith(".delta") and isinstance(event.get("delta"), str):
            key = self._key(event, kind.removesuffix(".delta"))
            pipe = self._events.get(key)
            if pipe is None:
                pipe = self._events[key] = Pipe(
                    self._filters, self._operation, self._about, json=kind.endswith("arguments.delta"), keep=True
                )
            self._templates[key] = event
            if self._hide and event.get("logprobs"):
                event["logprobs"] = []
            event["delta"] = await pipe.feed(event["delta"])
            self.blocked = pipe.blocked
            if event["delta"]:
                out.append(event)
        else:
            if kind.endswith(".done"):
                key = self._key(event, kind.removesuffix(".done"))
                if key in self._events:
                    out += await self._end_event(key)
            elif kind in _LAST_EVENTS:
                out += await self._end()
            if not self.blocked:
                await self._repeat(event)
            if not self.blocked:
                out.append(event)
        if self.blocked:
            out.append(self._incomplete())
        return self._number(out)

    @staticmethod
    def _key(event: dict[str, Any], kind: str) -> tuple[Any, ...]:
        names = ("item_id", "output_index", "content_index", "summary_index")
        return (kind, *(event.get(name) for name in names))

    async def _end_event(self, key: tuple[Any, ...]) -> list[dict[str, Any]]:
        pipe = self._events[key]
        if pipe.ended:
            return []
        rest = await pipe.feed("", True)
        self.blocked = self.blocked or pipe.blocked
        return [{**self._templates[key], "delta": rest}] if rest else []

    async def _repeat(self, event: dict[str, Any]) -> None:
        """Filter the whole texts that an event says once more."""
        known = {"".join(pipe.inn or ()): "".join(pipe.out) for pipe in self._events.values() if pipe.ended}
        for slot in texts.of_event(event):
            text = slot.text
            new = known.get(text)
            if new is None:
                pipe = Pipe(self._filters, self._operation, self._about, json=slot.json)
                new = await pipe.feed(text, True)
                self._gone.append(pipe)
                if pipe.blocked:
                    self.blocked = True
                    return
            if new != text:
                slot.put(new)
        if self._hide:
            _drop_logprobs(event)

    def _incomplete(self) -> dict[str, Any]:
        response = {
            **self._response,
            "status": "incomplete",
            "incomplete_details": {"reason": "content_filter"},
            "output": [],
        }
        return {"type": "response.incomplete", "response": response, "sequence_number": 0}

    def _number(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Events count up by one although some were held back and some came in between."""
        out = []
        for event in events:
            numbered = dict(event)
            if self._sequence is None:
                numbered.pop("sequence_number", None)
            else:
                numbered["sequence_number"] = self._sequence
                self._sequence += 1
            out.append(numbered)
        return out


def _add(choice: dict[str, Any], rest: dict[str, Any]) -> None:
    """Add what was held back to the last texts of a choice."""
    if "text" in rest:
        choice["text"] = (choice.get("text") or "") + rest.pop("text")
    if rest:
        delta = choice.setdefault("delta", {})
        for name, value in rest.items():
            delta[name] = value if not delta.get(name) else _joined(delta[name], value)


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {**first, "arguments": first.get("arguments", "") + second["arguments"]}
    return first + second


def _drop_logprobs(value: Any) -> None:
    if isinstance(value, dict):
        if value.get("logprobs"):
            value["logprobs"] = []
        for one in value.values():
            _drop_logprobs(one)
    elif isinstance(value, list):
        for one in value:
            _drop_logprobs(one)
