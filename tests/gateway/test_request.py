"""What the gateway reads out of a request: paths, headers, bodies, estimates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import request
from serve_app.gateway.errors import AuthenticationFailed, GatewayError, InvalidRequest, NotFound, TooLarge

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("POST", "/v1/chat/completions", "chat"),
        ("POST", "/v1/responses", "responses"),
        ("GET", "/v1/models", "models"),
        ("GET", "/v1/models/a/b", "models"),
        ("POST", "/v1/audio/transcriptions", "audio"),
        ("DELETE", "/v1/files/file-1", "files"),
        ("POST", "/tokenize", "tokenize"),
        ("POST", "/v2/rerank", "rerank"),
    ],
)
def test_operations(method: str, path: str, operation: str) -> None:
    assert request.operation_of(method, path) == operation


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("PATCH", "/v1/files", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "//v1/chat/completions", 404),
        ("POST", "/v1/../v1/chat/completions", 404),
        ("POST", "/start_profile", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/metrics", 404),
        ("GET", "/\x1b[31m", 404),
    ],
)
def test_everything_else_is_closed(method: str, path: str, status: int) -> None:
    with pytest.raises(GatewayError) as error:
        request.operation_of(method, path)
    assert error.value.status == status
    assert error.value.message.isprintable()


@given(st.text(max_size=60))
def test_any_path_is_an_operation_or_an_error_of_ours(path: str) -> None:
    try:
        request.operation_of("POST", path)
    except GatewayError as error:
        assert json.loads(error.body())["error"]["message"].isprintable()


def test_two_authorizations_are_refused() -> None:
    with pytest.raises(AuthenticationFailed):
        request.Headers([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")])
    with pytest.raises(InvalidRequest):
        request.Headers([(b"content-type", b"a"), (b"content-type", b"b")])


def test_only_known_headers_go_on() -> None:
    pairs = [
        (b"authorization", b"Bearer x"),
        (b"cookie", b"a=b"),
        (b"connection", b"close, x-tenant-id"),
        (b"x-tenant-id", b"root"),
        (b"x-forwarded-for", b"10.0.0.1"),
        (b"transfer-encoding", b"chunked"),
        (b"accept-encoding", b"gzip"),
        (b"content-type", b"application/json"),
        (b"traceparent", b"00-1-2-01"),
    ]
    assert request.Headers(pairs).forwarded == pairs[-2:]


@pytest.mark.parametrize("given_id", [b"", b"a b", b"x" * 129, b"\r\nset-cookie: a", "ä".encode()])
def test_a_harmful_request_id_is_replaced(given_id: bytes) -> None:
    made = request.request_id(request.Headers([(b"x-request-id", given_id)]))
    assert made.startswith("req_")


def test_a_harmless_request_id_is_kept() -> None:
    assert request.request_id(request.Headers([(b"x-request-id", b"my-1.a:b_c")])) == "my-1.a:b_c"


def _receive(*messages: dict[str, Any]) -> request.Receive:
    waiting: Iterator[dict[str, Any]] = iter(messages)

    async def receive() -> dict[str, Any]:
        try:
            return next(waiting)
        except StopIteration:
            await asyncio.sleep(60)
            raise

    return receive


def _read(*messages: dict[str, Any], headers: list[request.Header] | None = None, limit: int = 10) -> bytes:
    return asyncio.run(request.read_body(_receive(*messages), request.Headers(headers or []), limit, 0.05))


def _piece(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_pieces() -> None:
    assert _read(_piece(b"abc", True), _piece(b"", True), _piece(b"defghij")) == b"abcdefghij"


def test_bodies_out_of_bounds() -> None:
    with pytest.raises(TooLarge):
        _read(_piece(b"x" * 11))
    with pytest.raises(TooLarge):
        _read(_piece(b"x" * 6, True), _piece(b"x" * 6, True))
    with pytest.raises(TooLarge):
        _read(headers=[(b"content-length", b"11")])
    with pytest.raises(TooLarge):
        _read(headers=[(b"content-length", b"9" * 5000)])
    with pytest.raises(InvalidRequest) as late:
        _read(_piece(b"x", True))
    assert late.value.status == 408
    with pytest.raises(InvalidRequest) as silent:
        _read()
    assert silent.value.status == 408
    with pytest.raises(InvalidRequest) as encoded:
        _read(_piece(b"x"), headers=[(b"content-encoding", b"gzip")])
    assert encoded.value.status == 415
    with pytest.raises(request.ClientGone):
        _read(_piece(b"x", True), {"type": "http.disconnect"})


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_an_error_of_ours(body: bytes) -> None:
    try:
        assert isinstance(request.decode(body), dict)
    except InvalidRequest:
        with pytest.raises((ValueError, AssertionError)):
            assert isinstance(json.loads(body), dict) and b"NaN" not in body and b"Infinity" not in body


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":NaN}', b'{"a":"\xff"}', b"null", b'"x"', b""]
)
def test_hostile_bodies(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        request.decode(body)


@pytest.mark.parametrize("value", [None, "", 1, ["m"], {}, True])
def test_a_model_is_a_text(value: Any) -> None:
    with pytest.raises(InvalidRequest):
        request.model_of({"model": value})


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(InvalidRequest):
        request.flag({"stream": value}, "stream")


@given(st.dictionaries(st.text().filter(lambda name: name != "stream_options"), JSON, min_size=1, max_size=5))
def test_asking_for_usage_changes_nothing_else(body: dict[str, Any]) -> None:
    for text in (msgspec.json.encode(body), json.dumps(body, indent=1).encode(), b" \n" + json.dumps(body).encode()):
        changed = json.loads(request.with_usage(text, body, True))
        assert changed.pop("stream_options") == {"include_usage": True, "continuous_usage_stats": True}
        assert changed == body


def test_asking_for_usage_keeps_other_options() -> None:
    body = {"stream_options": {"include_usage": False, "other": 1}}
    changed = json.loads(request.with_usage(json.dumps(body).encode(), body, False))
    assert changed == {"stream_options": {"include_usage": True, "other": 1}}
    nothing: dict[str, Any] = {"stream_options": None}
    assert json.loads(request.with_usage(b"", nothing, False)) == {"stream_options": {"include_usage": True}}
    with pytest.raises(InvalidRequest):
        request.with_usage(b"", {"stream_options": 1}, False)


def test_estimates() -> None:
    assert request.output_tokens("chat", {"max_tokens": 10}, 256) == 10
    assert request.output_tokens("chat", {"max_completion_tokens": 7, "max_tokens": 10, "n": 3}, 256) == 21
    assert request.output_tokens("chat", {"max_tokens": "many", "n": -1}, 256) == 256
    assert request.output_tokens("embeddings", {"max_tokens": 10}, 256) == 0
    small = b'{"prompt":"' + b"x" * 400 + b'"}'
    assert 100 <= request.input_tokens(request.decode(small), small) <= 110
    image = b'{"image_url":"data:image/png;base64,' + b"A" * 4_000_000 + b'","text":"' + b"x" * 4000 + b'"}'
    assert 1000 <= request.input_tokens(request.decode(image), image) <= 1200


def test_usage_under_both_names() -> None:
    def counts(text: bytes) -> tuple[int, int] | None:
        usage = request.usage_of(text)
        return None if usage is None else usage.counts()

    assert counts(b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"x":{}}}') == (3, 4)
    assert counts(b'{"usage":{"input_tokens":3,"output_tokens":4}}') == (3, 4)
    assert counts(b'{"usage":{"total_tokens":9}}') == (9, 0)
    assert counts(b'{"usage":{"prompt_tokens":-3,"completion_tokens":-4}}') == (0, 0)
    assert counts(b'{"usage":null}') is None
    assert counts(b"{}") is None
    with pytest.raises(msgspec.DecodeError):
        counts(b'{"usage":{"prompt_tokens":"many"}}')


def test_the_model_of_a_form() -> None:
    def form(*fields: tuple[str, str]) -> bytes:
        parts = [f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
        return ("".join(parts) + "--b--\r\n").encode()

    kind = b"multipart/form-data; boundary=b"
    assert request.form_model(kind, form(("language", "de"), ("model", "whisper"))) == "whisper"
    for body in (form(("language", "de")), form(("model", "a"), ("model", "b")), b"garbage"):
        with pytest.raises(InvalidRequest):
            request.form_model(kind, body)
    with pytest.raises(InvalidRequest):
        request.form_model(b"application/json", form(("model", "a")))


def test_unknown_url_says_so() -> None:
    with pytest.raises(NotFound) as error:
        request.operation_of("POST", "/v1/engines")
    assert json.loads(error.value.body()) == {
        "error": {
            "message": "Unknown request URL: POST /v1/engines.",
            "type": "invalid_request_error",
            "param": None,
            "code": "unknown_url",
        }
    }
