"""What clients in the field send, and what load balancers and browsers in between need."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serve_app.gateway.request import plain
from serve_app.gateway.sse import error_of

from .conftest import StartGateway
from .fake_backend import FakeBackend
from .running import Answer, Gateway, ask, settings
from .waiting import LONG_S

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
ORIGIN = {"origin": "https://app.example.com"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def backend(server: FakeBackend) -> FakeBackend:
    server.reset()
    return server


def post(one: Gateway, body: Any = CHAT, path: str = "/v1/chat/completions", **more: Any) -> Answer:
    return ask(one.url + path, body, **{"key": one.key("premium"), **more})


def ejected(one: Gateway) -> float:
    """For how many seconds the backend is out."""
    seconds: float = one.admin("GET", "/admin/v1/routes").json()["backends"][0]["backends"][0]["ejected_s"]
    return seconds


# --- errors within streams


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"error":{"message":"x","type":"InternalServerError","param":null,"code":500}}\n\n', 500),
        (b'data: {"error": {"message": "x", "code": 400}}\n\n', 400),
        (b'data: {"error":{"message":"x","code":"server_error"}}\n\n', 502),
        (b'data: {"error":"gone"}\n\n', 502),
        (b'data: {"object":"error","message":"x \\"error\\"","code":503}\n\n', 503),
        (b'data: {"object":"error","message":"\'error\'","error":null,"code":503}\n\n', 503),
        (b'event: error\ndata: {"type":"error","message":"x","code":null}\n\n', 502),
        (b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{}}}\n\n', 502),
        (b'data: {"type":"response.created","response":{"error":null}}\n\n', 0),
        (b'data: {"choices":[{"delta":{"content":"{\\"error\\": 1}"}}]}\n\n', 0),
        (b'data: {"error":null,"choices":[]}\n\n', 0),
        (b': "error"\n\n', 0),
    ],
)
def test_which_events_are_errors(event: bytes, status: int) -> None:
    assert error_of(event) == status


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"], ids=lambda path: path.rpartition("/")[2]
)
def test_an_error_within_a_stream_is_a_failure(gateway: StartGateway, backend: FakeBackend, path: str) -> None:
    backend.control(error_event=500)
    config = settings(backend.url)
    config["backends"]["one"]["health"] |= {"eject_after": 3, "eject_s": 600}
    one = gateway(config)
    body = {"model": "m", "stream": True, "messages": CHAT["messages"], "prompt": "x", "input": "x"}
    failed = "502" if path == "/v1/responses" else "500"
    for _ in range(3):
        got = post(one, body, path)
        assert got.status == 200
        assert b"EngineCore" in got.body
        line = one.line(got.headers["x-request-id"])
        assert (line["success"], line["error"]) == (False, "backend_error")
    assert one.metric("rayplane_gateway_backend_requests_total", outcome="error") == 3
    assert one.metric("rayplane_gateway_backend_requests_total", outcome="ok") == 0
    assert one.metric("rayplane_gateway_requests_total", status=failed) == 3
    assert ejected(one) > 0


def test_a_callers_mistake_within_a_stream_ejects_nobody(gateway: StartGateway, backend: FakeBackend) -> None:
    backend.control(error_event=400)
    config = settings(backend.url)
    config["backends"]["one"]["health"] |= {"eject_after": 1}
    one = gateway(config)
    got = post(one, CHAT | {"stream": True})
    assert not one.line(got.headers["x-request-id"])["success"]
    assert one.metric("rayplane_gateway_requests_total", status="400") == 1
    assert ejected(one) == 0


def test_a_stream_with_an_error_is_not_kept(gateway: StartGateway, backend: FakeBackend, redis_url: str) -> None:
    one = gateway(settings(backend.url, redis_url, cache={"enabled": True}))
    body = CHAT | {"stream": True, "temperature": 0}
    backend.control(error_event=500)
    assert b"EngineCore" in post(one, body).body
    backend.control(error_event=0)
    got = post(one, body)
    assert b"EngineCore" not in got.body
    assert got.headers["x-rayplane-cache"] == "miss"


# --- HTTP/1.0


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(gateway: StartGateway, backend: FakeBackend, stream: bool) -> None:
    backend.control(tokens=2000)
    one = gateway(settings(backend.url))
    body = json.dumps(CHAT | {"stream": stream}).encode()
    host, _, port = one.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LONG_S) as wire:
        head = f"POST /v1/chat/completions HTTP/1.0\r\nauthorization: Bearer {one.key('premium')}\r\n"
        wire.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        got = b"".join(iter(lambda: wire.recv(65536), b""))
    head_, _, text = got.partition(b"\r\n\r\n")
    assert head_.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head_.lower()
    assert b"connection: close" in head_.lower()
    if stream:
        assert text.startswith(b"data: {")
        assert text.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(text)["usage"]["completion_tokens"] == 2000


# --- silence


@pytest.mark.parametrize("knobs", [{"latency_s": 0.5}, {"first_token_s": 0.5}, {"token_s": 0.5}])
def test_a_silent_stream_gets_comments(gateway: StartGateway, backend: FakeBackend, knobs: dict[str, Any]) -> None:
    one = gateway(settings(backend.url, server={"port": 0, "admin_port": 0, "stream_comment_s": 0.1}))
    backend.control(tokens=2)
    quiet = post(one, CHAT | {"stream": True, "max_tokens": 2}).body
    backend.control(**knobs)
    got = post(one, CHAT | {"stream": True, "max_tokens": 2})
    assert got.headers["content-type"].startswith("text/event-stream")
    assert b": \n\n" in got.body
    assert got.body.replace(b": \n\n", b"") == quiet.replace(b": \n\n", b"")
    client = openai.OpenAI(base_url=f"{one.url}/v1", api_key=one.key("premium"), max_retries=0, timeout=LONG_S)
    chunks = client.chat.completions.create(model="m", messages=CHAT["messages"], stream=True, max_tokens=2)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The café"
    assert one.errors == []


@pytest.mark.parametrize(
    ("knobs", "status"), [({"status": 400}, 400), ({"status": 503}, 503), ({"die": "before"}, 502)]
)
def test_an_error_after_a_comment_is_an_event(
    gateway: StartGateway, backend: FakeBackend, knobs: dict[str, Any], status: int
) -> None:
    config = settings(backend.url, server={"port": 0, "admin_port": 0, "stream_comment_s": 0.1})
    config["routes"]["m"]["retries"] = 0
    one = gateway(config)
    backend.control(latency_s=0.5, **knobs)
    got = post(one, CHAT | {"stream": True})
    assert got.status == 200
    event = json.loads(got.body.replace(b": \n\n", b"").removeprefix(b"data: "))
    assert event["error"]["message"]
    line = one.line(got.headers["x-request-id"])
    assert not line["success"]
    assert one.metric("rayplane_gateway_requests_total", status=str(status)) == 1
    # What is no stream has no comments.
    assert post(one).status == status
    assert one.errors == []


def test_no_comments_where_none_are_wanted(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(settings(backend.url, server={"port": 0, "admin_port": 0, "stream_comment_s": 0}))
    backend.control(latency_s=0.3)
    assert b": \n\n" not in post(one, CHAT | {"stream": True}).body


# --- browsers


def test_pages_may_call_where_they_are_named(gateway: StartGateway, backend: FakeBackend) -> None:
    config = settings(backend.url, cors={"origins": ["https://*.example.com", "http://localhost:*"], "max_age_s": 60})
    one = gateway(config)
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    before = ask(f"{one.url}/v1/chat/completions", method="OPTIONS", headers=ORIGIN | asks)
    assert before.status == 204
    assert before.headers["access-control-allow-origin"] == ORIGIN["origin"]
    assert before.headers["access-control-allow-headers"] == asks["access-control-request-headers"]
    assert "POST" in before.headers["access-control-allow-methods"]
    assert before.headers["access-control-max-age"] == "60"
    for got in (
        post(one, headers=ORIGIN),
        post(one, CHAT | {"stream": True}, headers=ORIGIN),
        post(one, headers=ORIGIN, key=""),
    ):
        assert got.headers["access-control-allow-origin"] == ORIGIN["origin"]
        assert got.headers["vary"] == "origin"
    for origin in ("https://example.com.evil.org", "https://app.example.org", "null"):
        refused = ask(f"{one.url}/v1/models", method="OPTIONS", headers={"origin": origin} | asks)
        assert refused.status == 405
        assert "access-control-allow-origin" not in post(one, headers={"origin": origin}).headers


def test_no_page_may_call_unless_told_otherwise(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(settings(backend.url))
    asks = ORIGIN | {"access-control-request-method": "POST"}
    assert ask(f"{one.url}/v1/chat/completions", method="OPTIONS", headers=asks).status == 405
    assert not any(name.startswith("access-control") for name in post(one, headers=ORIGIN).headers)


# --- addresses and keys


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("//v1///models//", "/v1/models"),
        ("/v1/models/org/name", "/v1/models/org/name"),
        ("/", ""),
    ],
)
def test_needless_slashes(path: str, same: str) -> None:
    assert plain(path) == same


def test_what_clients_send_is_taken(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(settings(backend.url))
    for path in ("/v1//chat/completions", "/v1/chat/completions/", "//v1/chat/completions"):
        assert post(one, path=path).status == 200
    assert {seen["path"] for seen in backend.seen("/v1/chat")} == {"/v1/chat/completions"}
    key = one.key("premium")
    for headers in ({"x-api-key": key}, {"api-key": key}, {"api-key": key, "authorization": "Bearer "}):
        assert post(one, key="", headers=headers).status == 200
    sent = [name for seen in backend.seen("/v1/chat") for name, _ in seen["headers"]]
    assert "x-api-key" not in sent
    assert "api-key" not in sent
    wrong = {"x-api-key": key, "authorization": "Bearer rp-aaaaaaaaaaaa-" + "a" * 43}
    assert post(one, key="", headers=wrong).status == 401
    assert post(one, key="", headers={"x-api-key": "nothing"}).status == 401


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/livez", "/health/"])
def test_health_on_the_public_port(gateway: StartGateway, backend: FakeBackend, path: str) -> None:
    one = gateway(settings(backend.url))
    assert ask(one.url + path).status == 200
