"""What a caller may do: operations, models, parameters, and how many tokens an answer may have."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any, Final

from .auth import Caller
from .config import Route
from .errors import InvalidRequest, NotFound, PermissionDenied
from .policy import Policy
from .request import BOUNDS, answers

#: Every name under which an engine takes the bound of an answer's tokens. All are checked whatever the operation:
#: engines read names that OpenAI does not.
_BOUNDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
#: What multiplies answers. Each of them has the whole bound to itself.
_MULTIPLIERS: Final = ("n", "best_of")
#: What a request cannot do without; a list of allowed parameters need not name these.
_ESSENTIAL: Final = frozenset(
    {"model", "messages", "prompt", "input", "query", "documents", "text_1", "text_2", "file"}
)
#: Operations that name no model.
_WITHOUT_MODEL: Final = frozenset({"models", "files", "admin"})
#: Answers remembered for a caller; more distinct models than this are looked up anew.
_REMEMBERED: Final = 4096


def _matches(model_id: str, patterns: Iterable[str]) -> bool:
    return any(pattern == model_id or fnmatch.fnmatchcase(model_id, pattern) for pattern in patterns)


def may_use(caller: Caller, model_id: str) -> bool:
    """Whether the role, and the key where it narrows the role, names the model (by id or pattern)."""
    known = caller.usable.get(model_id)
    if known is not None:
        return known
    allowed = _matches(model_id, caller.role.models)
    if allowed and caller.key is not None and caller.key.models is not None:
        allowed = _matches(model_id, caller.key.models)
    if len(caller.usable) >= _REMEMBERED:
        caller.usable.clear()
    caller.usable[model_id] = allowed
    return allowed


def visible_models(caller: Caller, policy: Policy) -> list[str]:
    """Ids of the models that the caller may use, in the configuration's order."""
    return [model_id for model_id in policy.config.routes if may_use(caller, model_id)]


def authorise(
    caller: Caller, operation: str, model_id: str | None, route: Route | None, body: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Check a request against the caller's role and key.

    Args:
        caller: Who asks.
        operation: What is asked.
        model_id: The route's id, or what the request names where no route has that name.
        route: The model's route; None where there is none.
        body: The decoded request; None where it is not JSON.

    Returns:
        Parameters to set in the body (`{"max_tokens": 512}`), or None where it may go on as it is.

    Raises:
        PermissionDenied: The operation or a parameter is not allowed.
        NotFound: There is no such model, or none that this caller may know of: the two look the same.
        InvalidRequest: No model is named, or a bound on tokens is not a number or (with `strict_max_tokens`) too high.
    """
    if operation not in caller.operations:
        raise PermissionDenied(f"Your API key's role does not allow the operation `{operation}`.")
    if model_id is None:
        if operation not in _WITHOUT_MODEL:
            raise InvalidRequest("You must provide a model parameter.", param="model")
    elif route is None or not may_use(caller, model_id):
        raise _no_model(model_id, body)
    if body is None:
        return None
    if not caller.role.chat_template:
        _no_template(body)
    if caller.unrestricted:
        return None
    _parameters(caller, body)
    return None if caller.max_tokens is None else _bound(caller, caller.max_tokens, operation, body)


def _asked(model_id: str, body: dict[str, Any] | None) -> str:
    """The model as the request names it: the id behind an alias is not told to those who do not know it."""
    asked = body.get("model") if body is not None else None
    text = asked if isinstance(asked, str) else model_id
    return text if len(text) <= 200 else text[:200] + "..."


def _no_model(model_id: str, body: dict[str, Any] | None) -> NotFound:
    return NotFound(
        f"The model `{_asked(model_id, body)}` does not exist or you do not have access to it.", param="model"
    )


def _no_template(body: dict[str, Any]) -> None:
    """A template is a program that makes the prompt: what it will say, no filter can see."""
    given = body.get("chat_template_kwargs")
    within = isinstance(given, dict) and given.get("chat_template") is not None
    if within or body.get("chat_template") is not None:
        name = "chat_template_kwargs" if within else "chat_template"
        raise PermissionDenied(
            "Your API key's role does not allow a chat template of your own.", param=name, code="parameter_not_allowed"
        )


def _parameters(caller: Caller, body: dict[str, Any]) -> None:
    role = caller.role
    for name in role.denied_parameters:
        if name in body:
            raise PermissionDenied(
                f"Your API key's role does not allow the parameter `{name}`.", param=name, code="parameter_not_allowed"
            )
    if role.allowed_parameters is not None:
        for name in body:
            if name not in role.allowed_parameters and name not in _ESSENTIAL:
                shown = name[:100]
                raise PermissionDenied(
                    f"Your API key's role does not allow the parameter `{shown}`.",
                    param=shown,
                    code="parameter_not_allowed",
                )


def _bound(caller: Caller, most: int, operation: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """Bound what a request may get: `most` tokens in all its answers together."""
    changes: dict[str, Any] = {}
    binding = BOUNDS.get(operation, ())
    stated = 0
    for name in (*_BOUNDS, *_MULTIPLIERS):
        value = body.get(name)
        if value is None:
            continue
        # Engines that read "4096" or 1e9 as a number must not see what was not compared; below zero means "no bound" to
        # some.
        if type(value) is not int or value < 0:
            raise InvalidRequest(f"`{name}` must be a whole number, 0 or more.", param=name)
        if name in _MULTIPLIERS:
            continue
        if name in binding:
            stated = max(stated, value)
        if value > most:
            if caller.role.strict_max_tokens:
                raise _too_high(f"`{name}` is {value}; your API key's role allows {most} at most.", name)
            changes[name] = most
    many, multiplier = answers(operation, body)
    if many > 1 and (stated or 1) * many > most:
        each = f"{many} answers of {stated} tokens" if stated else f"{many} answers"
        raise _too_high(
            f"`{multiplier}` is too large: your API key's role allows {most} tokens for all answers to a request "
            f"together, and this one asks for {each}.",
            multiplier,
        )
    # `max_completion_tokens: 0` is as good as not stated to engines that read `max_completion_tokens or max_tokens`.
    if binding and not stated and body.get(binding[0]) is None:
        changes[binding[0]] = most // many
    return changes or None


def _too_high(message: str, name: str) -> InvalidRequest:
    return InvalidRequest(message, param=name, code="max_tokens_too_high")
