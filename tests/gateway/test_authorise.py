"""Roles, keys and requests: what may pass, what is changed, and what the refusal says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.auth import Caller
from serve_app.gateway.authorise import authorise, may_use, visible_models
from serve_app.gateway.config import Backend, Config, Key, Role, Route, Target
from serve_app.gateway.errors import GatewayError, InvalidRequest, NotFound, PermissionDenied
from serve_app.gateway.policy import Policy

ROUTE = Route(backends=[Target(backend="one")])
POLICY = Policy(
    Config(
        backends={"one": Backend(url="http://one")},
        routes={"llama-3-8b": ROUTE, "llama-3-70b": ROUTE, "phi": ROUTE, "team/phi": ROUTE},
    )
)


def caller(*, key_operations: Any = None, most: int | None = None, **role: Any) -> Caller:
    """A caller with a role that may use all models; `key_operations` and `most` (max_tokens) are the key's own."""
    key = Key(id="k", prefix="p", hash="h", role="r", operations=key_operations, max_tokens=most)
    made = Role(**{"models": ["*"], **role})
    return Caller("k", "k", "acme", "r", made, key, made.limits, True)


def ask(who: Caller, body: dict[str, Any], operation: str = "chat") -> dict[str, Any] | None:
    return authorise(who, operation, "phi", ROUTE, {"model": "phi", **body})


@pytest.mark.parametrize(
    ("patterns", "visible"),
    [
        (["*"], ["llama-3-8b", "llama-3-70b", "phi", "team/phi"]),
        (["llama-*"], ["llama-3-8b", "llama-3-70b"]),
        (["phi", "llama-3-8b"], ["llama-3-8b", "phi"]),
        (["*/phi"], ["team/phi"]),
        (["LLAMA-*"], []),
        ([], []),
    ],
)
def test_models_of_a_role(patterns: list[str], visible: list[str]) -> None:
    who = Caller("k", "k", "t", "r", Role(models=patterns), None, Role().limits, True)
    for _ in range(2):
        assert visible_models(who, POLICY) == visible
        assert [one for one in POLICY.config.routes if may_use(who, one)] == visible


def test_a_key_narrows_its_role_and_never_widens_it() -> None:
    role = Role(models=["llama-*"])
    for models, visible in ((["*"], ["llama-3-8b", "llama-3-70b"]), (["phi", "*-8b"], ["llama-3-8b"]), ([], [])):
        key = Key(id="k", prefix="p", hash="h", role="r", models=models)
        who = Caller("k", "k", "t", "r", role, key, role.limits, True)
        assert visible_models(who, POLICY) == visible


def test_memory_of_models_is_bounded() -> None:
    who = caller()
    for number in range(10_000):
        assert may_use(who, f"model-{number}")
    assert len(who.usable) <= 4096


def test_operations_of_role_and_key() -> None:
    who = caller(key_operations=["chat", "admin"])
    assert ask(who, {}) is None
    with pytest.raises(PermissionDenied) as caught:
        ask(who, {}, "embeddings")
    assert (caught.value.status, caught.value.code) == (403, "permission_denied")
    # The key names `admin`, its role does not.
    with pytest.raises(PermissionDenied):
        authorise(who, "admin", None, None, None)
    with pytest.raises(PermissionDenied):
        ask(caller(), {}, "tokenize")


def test_operations_without_a_model() -> None:
    who = caller(operations=["models", "files", "admin", "chat", "audio"])
    for operation in ("models", "files", "admin"):
        assert authorise(who, operation, None, None, None) is None
    for operation in ("chat", "audio"):
        with pytest.raises(InvalidRequest) as caught:
            authorise(who, operation, None, None, None)
        assert caught.value.param == "model"


def test_an_absent_model_and_a_forbidden_one_look_the_same() -> None:
    who = Caller("k", "k", "t", "r", Role(models=["llama-*"]), None, Role().limits, True)
    answers = []
    for model_id, route in (("phi", ROUTE), ("phi", None)):
        with pytest.raises(NotFound) as caught:
            authorise(who, "chat", model_id, route, {"model": "phi"})
        answers.append((caught.value.status, caught.value.body(), caught.value.headers))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert b"model_not_found" in answers[0][1]


def test_the_model_behind_an_alias_is_not_told() -> None:
    who = Caller("k", "k", "t", "r", Role(models=[]), None, Role().limits, True)
    with pytest.raises(NotFound) as caught:
        authorise(who, "chat", "secret-model", ROUTE, {"model": "alias"})
    assert "secret-model" not in caught.value.message
    assert "`alias`" in caught.value.message


def test_a_very_long_name_is_not_repeated_in_full() -> None:
    with pytest.raises(NotFound) as caught:
        authorise(caller(), "chat", "x" * 100_000, None, {"model": "x" * 100_000})
    assert len(caught.value.message) < 400


def test_parameters_that_are_denied() -> None:
    who = caller(denied_parameters=["logprobs", "tools"])
    assert ask(who, {"temperature": 1}) is None
    with pytest.raises(PermissionDenied) as caught:
        ask(who, {"tools": []})
    assert (caught.value.param, caught.value.code) == ("tools", "parameter_not_allowed")


def test_parameters_that_alone_are_allowed() -> None:
    who = caller(allowed_parameters=["temperature", "stream"])
    assert ask(who, {"messages": [], "temperature": 0, "stream": True}) is None
    assert ask(who, {"input": "x"}, "embeddings") is None
    with pytest.raises(PermissionDenied) as caught:
        ask(who, {"messages": [], "n": 4})
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("operation", "body", "changes"),
    [
        ("chat", {}, {"max_tokens": 100}),
        ("chat", {"max_tokens": None}, {"max_tokens": 100}),
        ("chat", {"max_tokens": 100}, None),
        ("chat", {"max_tokens": 0}, None),
        ("chat", {"max_tokens": 101}, {"max_tokens": 100}),
        ("chat", {"max_completion_tokens": 50}, None),
        ("chat", {"max_completion_tokens": 500}, {"max_completion_tokens": 100}),
        ("chat", {"max_tokens": 500, "max_completion_tokens": 5}, {"max_tokens": 100}),
        ("chat", {"max_output_tokens": 5}, {"max_tokens": 100}),
        ("chat", {"max_output_tokens": 500}, {"max_output_tokens": 100, "max_tokens": 100}),
        ("completions", {}, {"max_tokens": 100}),
        ("completions", {"max_completion_tokens": 5}, {"max_tokens": 100}),
        ("completions", {"max_completion_tokens": 0}, {"max_tokens": 100}),
        # Engines that read `max_completion_tokens or max_tokens` find none here.
        ("chat", {"max_completion_tokens": 0}, {"max_tokens": 100}),
        # What is not stated is divided.
        ("chat", {"n": 4}, {"max_tokens": 25}),
        ("chat", {"n": 3, "best_of": 2}, {"max_tokens": 33}),
        ("completions", {"n": 2, "prompt": ["a", "b", "c"]}, {"max_tokens": 16}),
        ("completions", {"prompt": [[1, 2], [3]], "best_of": 2}, {"max_tokens": 25}),
        ("completions", {"prompt": [1, 2, 3]}, {"max_tokens": 100}),
        ("chat", {"n": 4, "max_tokens": 25}, None),
        ("chat", {"n": 100}, {"max_tokens": 1}),
        ("responses", {"n": 1000}, {"max_output_tokens": 100}),
        ("responses", {}, {"max_output_tokens": 100}),
        ("responses", {"max_output_tokens": 1000}, {"max_output_tokens": 100}),
        ("embeddings", {}, None),
        ("embeddings", {"max_tokens": 1000}, {"max_tokens": 100}),
    ],
)
def test_bounds_on_tokens(operation: str, body: dict[str, Any], changes: dict[str, Any] | None) -> None:
    assert ask(caller(max_tokens=100), body, operation) == changes


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("operation", "body", "param"),
    [
        ("chat", {"n": 4, "max_tokens": 26}, "n"),
        ("chat", {"n": 2, "max_completion_tokens": 1000}, "n"),
        ("chat", {"n": 101}, "n"),
        ("chat", {"best_of": 101}, "best_of"),
        ("completions", {"n": 1, "best_of": 20, "max_tokens": 10}, "best_of"),
        ("completions", {"prompt": ["x"] * 11, "max_tokens": 10}, "prompt"),
        ("completions", {"prompt": ["x"] * 5, "n": 5, "max_tokens": 5}, "n"),
        ("completions", {"prompt": [[1]] * 101}, "prompt"),
    ],
)
def test_the_bound_is_for_all_answers_together(operation: str, body: dict[str, Any], param: str, strict: bool) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(caller(max_tokens=100, strict_max_tokens=strict), body, operation)
    assert caught.value.status == 400
    if not (strict and max(body.get("max_tokens", 0), body.get("max_completion_tokens", 0)) > 100):
        assert (caught.value.param, caught.value.code) == (param, "max_tokens_too_high")
        assert "100 tokens for all answers" in caught.value.message
    assert ask(caller(), body, operation) is None


@pytest.mark.parametrize("value", ["4", 4.0, True, [4], -1])
@pytest.mark.parametrize("name", ["n", "best_of"])
def test_a_number_of_answers_that_an_engine_might_read_otherwise_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(caller(max_tokens=100), {name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"chat_template": "{{ 'x' }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x", "enable_thinking": True}}, "chat_template_kwargs"),
    ],
)
def test_a_template_of_ones_own_has_to_be_allowed(body: dict[str, Any], param: str) -> None:
    for who in (caller(), caller(max_tokens=5), caller(allowed_parameters=[param])):
        with pytest.raises(PermissionDenied) as caught:
            ask(who, body)
        assert (caught.value.param, caught.value.code) == (param, "parameter_not_allowed")
    assert ask(caller(chat_template=True), body) is None
    harmless = {"chat_template": None, "chat_template_kwargs": {"enable_thinking": False}}
    assert ask(caller(), harmless) is None


def test_the_smaller_bound_of_role_and_key_counts() -> None:
    assert ask(caller(max_tokens=100, most=50), {}) == {"max_tokens": 50}
    assert ask(caller(max_tokens=100, most=500), {}) == {"max_tokens": 100}
    assert ask(caller(most=7), {"max_tokens": 8}) == {"max_tokens": 7}
    assert ask(caller(), {"max_tokens": 10**9}) is None


@pytest.mark.parametrize("value", ["5000", 5000.0, 1e9, True, [1], {}, -1])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_bound_that_an_engine_might_read_otherwise_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(caller(max_tokens=100), {name: value})
    assert (caught.value.status, caught.value.param) == (400, name)
    # Without a bound the engine may say what it thinks of it.
    assert ask(caller(), {name: value}) is None


def test_a_strict_role_refuses_instead_of_lowering() -> None:
    who = caller(max_tokens=100, strict_max_tokens=True)
    assert ask(who, {}) == {"max_tokens": 100}
    assert ask(who, {"max_tokens": 100}) is None
    with pytest.raises(InvalidRequest) as caught:
        ask(who, {"max_completion_tokens": 101})
    assert (caught.value.param, caught.value.code) == ("max_completion_tokens", "max_tokens_too_high")


def test_bodies_that_are_not_json_are_not_looked_into() -> None:
    who = caller(max_tokens=100, operations=["audio"])
    assert authorise(who, "audio", "phi", ROUTE, None) is None


@given(
    st.sampled_from(["chat", "completions", "responses"]),
    st.dictionaries(
        st.sampled_from(["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "prompt"]),
        st.none()
        | st.integers()
        | st.integers(0, 5)
        | st.floats()
        | st.booleans()
        | st.text(max_size=3)
        | st.lists(st.text(max_size=1), max_size=9),
    ),
    st.integers(1, 10_000),
    st.none() | st.integers(1, 10_000),
)
def test_no_request_passes_with_more_than_the_bound(
    operation: str, body: dict[str, Any], of_role: int, of_key: int | None
) -> None:
    who = caller(max_tokens=of_role, most=of_key)
    try:
        changes = ask(who, body, operation)
    except GatewayError as error:
        assert error.status == 400
        return
    sent = {**body, **(changes or {})}
    most = min(of_role, of_key or of_role)
    bounds = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    stated = [sent[name] for name in bounds if sent.get(name) is not None]
    assert stated and all(type(one) is int and 0 <= one <= most for one in stated)
    names = {"chat": {"max_tokens", "max_completion_tokens"}, "completions": {"max_tokens"}}
    binding = [sent[name] for name in names.get(operation, {"max_output_tokens"}) if sent.get(name) is not None]
    assert binding
    prompts = len(sent["prompt"]) if operation == "completions" and isinstance(sent.get("prompt"), list) else 1
    many = max(1, sent.get("n") or 0, sent.get("best_of") or 0) if operation != "responses" else 1
    assert max(binding) * many * max(1, prompts) <= most
