"""The role's bound where a request states none: it never makes a request fail that would have passed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.gateway.bound import Bound, Refusal, contexts, default, refusal

from .conftest import StartGateway
from .fake_backend import FakeBackend, encode
from .routed import routed, run
from .routed import settings as routes
from .running import ROLES, ask, settings
from .waiting import until

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
NAMES = {"chat": "max_tokens", "completions": "max_tokens", "responses": "max_output_tokens"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def backend(server: FakeBackend) -> FakeBackend:
    server.reset()
    return server


def request(operation: str, words: int) -> dict[str, Any]:
    text = "w " * words
    given = {"messages": [{"role": "user", "content": text}]} if operation == "chat" else {}
    return {"model": "m", **(given or {"prompt" if operation == "completions" else "input": text})}


@pytest.mark.parametrize(
    ("bound", "context", "left"),
    [
        (Bound("max_tokens", 8192), 0, 8192),
        (Bound("max_tokens", 8192), 8192, None),
        (Bound("max_tokens", 8191), 8192, None),
        (Bound("max_tokens", 8190), 8192, 8190),
        (Bound("max_tokens", 100, prompt=50), 200, 100),
        (Bound("max_tokens", 100, prompt=150), 200, 50),
        (Bound("max_tokens", 100, prompt=184), 200, 16),
        (Bound("max_tokens", 100, prompt=185), 200, None),
        (Bound("max_tokens", 4, prompt=196), 200, 4),
    ],
)
def test_what_fits_a_context(bound: Bound, context: int, left: int | None) -> None:
    fitting = bound.within(context)
    assert (fitting and fitting.tokens) == left


@pytest.mark.parametrize(
    ("prompt", "most"),
    [("café", 5), ([1, 2, 3], 3), (["a", "bcd"], 3), ([[1, 2], [3]], 2), ([], 0), (None, 0)],
)
def test_a_prompt_has_no_more_tokens_than_bytes(prompt: Any, most: int) -> None:
    assert default("completions", "max_tokens", 5, {"prompt": prompt}).prompt == most + 8


LENGTH = "This model's maximum context length is 2048 tokens. However, you requested 1024 output tokens."


@pytest.mark.parametrize(
    ("error", "found"),
    [
        ({"message": LENGTH, "param": "input_tokens", "code": 400}, Refusal(True, 2048)),
        ({"message": "Too long.", "code": "context_length_exceeded"}, Refusal(True)),
        ({"message": "max_tokens=8192 cannot be greater than max_model_len=max_total_tokens=2048."}, Refusal(True)),
        ({"message": "This model supports at most 16384 completion tokens.", "param": "max_tokens"}, Refusal(True)),
        ({"message": "truncate_prompt_tokens=9 cannot be greater than max_model_len - max_tokens = 4."}, Refusal()),
        ({"message": "min_tokens must be less than or equal to max_tokens=1024, got 5000."}, Refusal()),
        ({"message": "No.", "code": "unsupported_parameter", "param": "max_tokens"}, Refusal(False, 0, "max_tokens")),
        ({"message": ["no", "text"]}, Refusal()),
    ],
)
def test_reading_a_refusal(error: dict[str, Any], found: Refusal) -> None:
    assert refusal(encode({"error": error})) == found


def test_context_lengths_as_vllm_and_ray_tell_them() -> None:
    cards = [
        {"id": "a", "max_model_len": 8192},
        {"id": "b", "metadata": {"model_id": "b", "max_request_context_length": 2048}},
        {"id": "c", "metadata": {"max_request_context_length": None}},
    ]
    assert contexts(encode({"data": cards})) == {"a": 8192, "b": 2048}
    assert contexts(b"{}") == {}


@pytest.mark.parametrize("operation", PATHS)
def test_a_request_that_fits_passes(gateway: StartGateway, backend: FakeBackend, operation: str) -> None:
    backend.control(context=2048, tokens=3000)
    bounds = {"basic": 1024, "premium": 8192, "admin": 2048}
    one = gateway(
        settings(backend.url, roles={name: ROLES[name] | {"max_tokens": most} for name, most in bounds.items()})
    )
    for role, words, stream in itertools.product(bounds, (1, 1500, 2000), (False, True)):
        body = request(operation, words) | {"stream": stream}
        got = ask(one.url + PATHS[operation], body, key=one.key(role))
        assert got.status == 200, (role, words, got.body)
        sent = backend.seen(PATHS[operation])[-1]["tokens"]
        longest = min(bounds[role], 2048 - words)
        # A completion's prompt is counted by its bytes beforehand.
        assert sent == longest or (operation == "completions" and 16 <= sent < longest), (role, words, sent)


@pytest.mark.parametrize("operation", PATHS)
def test_a_request_that_fits_not_is_refused_as_before(
    gateway: StartGateway, backend: FakeBackend, operation: str
) -> None:
    backend.control(context=100)
    one = gateway(settings(backend.url, roles=ROLES | {"premium": {"models": ["*"], "max_tokens": 50}}))
    got = ask(one.url + PATHS[operation], request(operation, 200), key=one.key("premium"))
    assert got.status == 400
    assert "maximum context length is 100 tokens" in got.json()["error"]["message"]
    stated = request(operation, 60) | {NAMES[operation]: 50}
    assert ask(one.url + PATHS[operation], stated, key=one.key("premium")).status == 400
    assert one.metric("rayplane_gateway_retries_total") == 0


def test_the_body_keeps_its_bytes_and_states_a_bound_once(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(settings(backend.url))
    for body in (
        b' { "model": "m","messages":[{"role":"user","content":"x"}] }',
        b'{"model":"m","max_tokens":null,"messages":[{"role":"user","content":"x"}],"stream":true,"stream_options":{}}',
    ):
        assert ask(one.url + PATHS["chat"], body, key=one.key("basic")).status == 200
    first, second = backend.seen(PATHS["chat"])
    assert first["body"] == '{"max_tokens":512, "model": "m","messages":[{"role":"user","content":"x"}] }'
    assert second["body"].count("max_tokens") == 1
    assert second["json"]["max_tokens"] == 512


def test_the_backends_own_name_is_learned(gateway: StartGateway, backend: FakeBackend) -> None:
    backend.control(newer_bound=True)
    one = gateway(settings(backend.url))
    for _ in range(2):
        assert one.chat(role="basic").status == 200
    sent = [set(seen["json"]) & {"max_tokens", "max_completion_tokens"} for seen in backend.seen(PATHS["chat"])]
    assert sent == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


def test_the_length_that_a_backend_tells_saves_the_second_request(backend: FakeBackend) -> None:
    backend.control(context=2048, models=["m"])

    async def main() -> None:
        async with routed(routes({"one": backend.url})) as it:
            bound = default("chat", "max_tokens", 8192, {})
            await it.ask(bound=bound)
            await it.router.start()
            await until(lambda: it.router._pools["one"].contexts, "the check")
            await it.ask(bound=bound)

    run(main())
    sent = [seen["json"].get("max_tokens") for seen in backend.seen(PATHS["chat"])]
    assert sent == [8192, None, None]
