"""The bound on an answer's tokens that the gateway puts into a request that states none.

Engines refuse a request whose prompt and bound together exceed the model's context length (vLLM 0.29,
`renderers/params.py`), and give one without a bound what the prompt leaves. So a bound that does not fit can be left
out: what is left of the context is less than it. A completion without a bound gets 16 tokens, however, so there the
bound is lowered to what its prompt leaves for certain.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

#: Tokens of a completion that states no bound (OpenAI's default, and vLLM's).
UNSTATED = 16
#: Tokens that a tokenizer adds to a prompt: its beginning, its end.
_SPECIAL = 8
_TOO_LONG = re.compile(r"context (?:length|size|window)|max_model_len|max_new_tokens|completion tokens", re.IGNORECASE)
#: Where the caller's own truncation is too large for the bound, a short prompt would leave more than the bound.
_TRUNCATION = "truncate_prompt_tokens"
_CONTEXT = re.compile(r"maximum context length is (\d+)")


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound of `tokens` for each answer, under the parameter `name`."""

    name: str
    tokens: int
    #: The parameter of backends that do not take `name`; empty: there is none.
    other: str = ""
    #: The most tokens that the prompt can have. None: a request without a bound gets the rest of the context.
    prompt: int | None = None

    def within(self, context: int) -> Bound | None:
        """What of it fits a model's context length (0: unknown); None: nothing is to be put in."""
        if not context:
            return self
        if self.prompt is None:
            return self if self.tokens < context - 1 else None
        room = min(self.tokens, context - self.prompt)
        return replace(self, tokens=room) if room >= min(self.tokens, UNSTATED) else None

    def after(self, refusal: Refusal) -> Bound | None:
        """What to try after the backend refused it as too long."""
        lower = self.within(refusal.context) if self.prompt is not None and refusal.context else None
        return None if lower == self else lower

    def into(self, body: bytes, *, other: bool) -> bytes:
        """A JSON object's text with the bound in front, so that all else keeps its bytes."""
        name = self.other if other and self.other else self.name
        return b'{"%s":%d,%s' % (name.encode(), self.tokens, body.lstrip(b" \t\r\n")[1:])


def default(operation: str, name: str, tokens: int, decoded: Mapping[str, Any]) -> Bound:
    """The bound for a request."""
    if operation == "chat":
        return Bound(name, tokens, other="max_completion_tokens")
    if operation == "completions":
        unknown = decoded.get("prompt_embeds") is not None
        return Bound(name, tokens, prompt=1 << 53 if unknown else _most_tokens(decoded.get("prompt")) + _SPECIAL)
    return Bound(name, tokens)


def _most_tokens(prompt: object) -> int:
    """Of a text no more than its bytes; of several prompts the longest one's."""
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "surrogatepass"))
    if not isinstance(prompt, list) or not prompt:
        return 0
    return len(prompt) if isinstance(prompt[0], int) else max(_most_tokens(one) for one in prompt)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a backend said against a request."""

    #: Prompt and bound together are longer than the context, or the bound is more than the model ever writes.
    too_long: bool = False
    #: The context length, where the message tells; else 0.
    context: int = 0
    #: The parameter that the backend does not know.
    unsupported: str = ""


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None
    param: str | None = None


class _Body(msgspec.Struct):
    error: _Error | None = None
    # vLLM's older shape.
    message: str = ""


_body = msgspec.json.Decoder(_Body)


def refusal(body: bytes) -> Refusal:
    """Read a refusal's body."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = _body.decode(body)
        error = decoded.error or _Error(decoded.message)
        if error.code == "unsupported_parameter":
            return Refusal(unsupported=error.param or "")
        long = error.code == "context_length_exceeded" or _TOO_LONG.search(error.message)
        if long and _TRUNCATION not in error.message:
            told = _CONTEXT.search(error.message)
            return Refusal(too_long=True, context=int(told[1][:9]) if told else 0)
    return Refusal()


class _Metadata(msgspec.Struct):
    max_request_context_length: int | None = None


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    metadata: _Metadata | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


_cards = msgspec.json.Decoder(_Cards)


def contexts(body: bytes) -> dict[str, int]:
    """Context lengths by model, from an answer to /v1/models: as vLLM has them, or Ray Serve LLM."""
    found: dict[str, int] = {}
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        for card in _cards.decode(body).data:
            length = card.max_model_len or (card.metadata and card.metadata.max_request_context_length)
            if length:
                found[card.id] = length
    return found
