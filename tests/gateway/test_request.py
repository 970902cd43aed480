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
from serve_app.gateway.errors import (
    AuthenticationFailed,
    GatewayError,
    InvalidRequest,
    NotFound,
    RateLimited,
    TooLarge,
    Unavailable,
)

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


@pytest.mark.parametrize(
    "given_id", ["my-1.a:b_c", "task-550e8400-e29b-41d4-a716-446655440000", "rp-1", "corp-frontend-7d9f8b6c5d", "a.b.c"]
)
def test_a_harmless_request_id_is_kept(given_id: str) -> None:
    assert request.request_id(request.Headers([(b"x-request-id", given_id.encode())])) == given_id


@pytest.mark.parametrize(
    "given_id",
    [
        "rp-Xy12Ab34Cd56-" + "s" * 43,
        "id_rp-Xy12Ab34Cd56-" + "s" * 43,
        "xrp-Xy12Ab34Cd56-" + "s" * 12,
        "sk-proj-abc123DEF456ghi789JKL",
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
        "AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_a_key_is_no_request_id(given_id: str) -> None:
    made = request.request_id(request.Headers([(b"x-request-id", given_id.encode())]))
    assert made.startswith("req_") and given_id not in made


def _receive(*messages: dict[str, Any]) -> request.Receive:
    waiting: Iterator[dict[str, Any]] = iter(messages)

    async def receive() -> dict[str, Any]:
        try:
            return next(waiting)
        except StopIteration:
            await asyncio.Event().wait()
            raise

    return receive


def _read(
    *messages: dict[str, Any], headers: list[request.Header] | None = None, limit: int = 10, within: float = 60
) -> bytes:
    held: list[int] = []
    given = request.Headers(headers or [])
    body = asyncio.run(request.read_body(_receive(*messages), given, limit, within, held.append))
    assert sum(held) == len(body)
    return body


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
        _read(_piece(b"x", True), within=0.05)
    assert late.value.status == 408
    with pytest.raises(InvalidRequest) as silent:
        _read(within=0.05)
    assert silent.value.status == 408
    with pytest.raises(InvalidRequest) as encoded:
        _read(_piece(b"x"), headers=[(b"content-encoding", b"gzip")])
    assert encoded.value.status == 415
    with pytest.raises(request.ClientGone):
        _read(_piece(b"x", True), {"type": "http.disconnect"})


def test_a_body_is_counted_before_it_is_there() -> None:
    bodies = request.Bodies(100)
    bodies.take("other", 45)
    pieces = [_piece(b"x" * 20, True), _piece(b"x" * 20, True), _piece(b"x" * 20, True)]
    receive = _receive(*pieces)
    with pytest.raises(Unavailable) as full:
        asyncio.run(request.read_body(receive, request.Headers([]), 1000, 1, lambda size: bodies.take("me", size)))
    assert (full.value.status, full.value.headers) == (503, {"retry-after": "1"})
    assert bodies.held == 85


def test_bodies_held_are_bounded_in_all_and_for_each_caller() -> None:
    bodies = request.Bodies(100)
    for _ in range(2):
        bodies.take("one", 25)
    with pytest.raises(RateLimited) as own:
        bodies.take("one", 1)
    assert own.value.status == 429 and own.value.headers["retry-after"] == "1"
    bodies.take("two", 50)
    with pytest.raises(Unavailable):
        bodies.take("three", 1)
    with pytest.raises(TooLarge):
        bodies.take("three", 51)
    assert bodies.held == 100
    for name, size in (("one", 25), ("one", 25), ("two", 50)):
        bodies.give(name, size)
    assert bodies.held == 0
    bodies.take("one", 50)


@pytest.mark.parametrize(
    "item",
    [b"[]", b'{"a":1}', b'"a"', b"1000", b"1.5", b'{"a":{"b":{}}}', '"😀"'.encode(), b'"' + b"x" * 900 + b'"'],
)
def test_what_a_decoded_body_takes_is_not_underestimated(item: bytes) -> None:
    import tracemalloc

    body = b'{"a":[' + b",".join([item] * 20_000) + b"]}"
    tracemalloc.start()
    decoded = request.decode(body)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert decoded
    copies = 2 * len(body)
    assert 0.9 * taken < request.working_bytes(body) - copies < 6 * taken + 10_000


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


@pytest.mark.parametrize("kind", ["list", "object", "both"])
def test_bodies_are_nested_so_deep_and_no_deeper(kind: str) -> None:
    def nested(levels: int) -> bytes:
        value: Any = "x"
        for level in range(levels - 1):
            value = [value] if kind == "list" or (kind == "both" and level % 2) else {"a": value, "b": 1}
        return msgspec.json.encode({"v": value})

    wide = b'{"v":[' + b",".join([b'{"a":[]}'] * 1000) + b"]}"
    assert request.decode(wide) and request.decode(nested(request.MAX_DEPTH))
    for levels in (request.MAX_DEPTH + 1, 800, 900):
        with pytest.raises(InvalidRequest) as deep:
            request.decode(nested(levels))
        assert "nested" in deep.value.message


@pytest.mark.parametrize(
    ("body", "one"),
    [
        (b"{}", True),
        (b" {\n } ", True),
        (b'{"model":"m","n":1}', True),
        (b'{"model": "m", "n": 1}', True),
        (b'{ "model" :"m",\n\t"n":1e0 ,"x":{"model":"o"} }\n', True),
        ('{"ä": "ü"}'.encode(), True),
        (b'{"model":"a","model":"m"}', False),
        (b'{"model": "m", "n": 1, "model": "m"}', False),
        (b'{"model":"a","mod\\u0065l":"m"}', False),
        (b'{"mod\\u0065l":"m"}', False),
        (b'{"mod\\u0065l":"a", "model":"m"}', False),
        (b'{"max_tokens":1,"messages":[],"max\\u005ftokens":9}', False),
        # As long as one with spaces would be.
        (b'{"a":1,"b":2,"a":1}', False),
        (b'{"a":11,"bb":2,"a":1}', False),
    ],
)
def test_one_reading(body: bytes, one: bool) -> None:
    assert request.one_reading(body) is one


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_any_object_that_json_writes_has_one_reading(
    body: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        request.decode(text)
    except InvalidRequest:
        return
    plain = all(json.dumps(name, ensure_ascii=ascii_only) == f'"{name}"' for name in body)
    assert request.one_reading(text) is plain
    if body:
        name = json.dumps(next(iter(body)), ensure_ascii=ascii_only)
        again = text.rstrip()[:-1] + f",{name}:0}}".encode("utf-8", "surrogatepass")
        assert not request.one_reading(again)


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
    assert request.output_tokens("chat", {"max_completion_tokens": 7, "max_tokens": 10, "n": 3}, 256) == 30
    assert request.output_tokens("chat", {"max_tokens": "many", "n": -1}, 256) == 256
    assert request.output_tokens("embeddings", {"max_tokens": 10}, 256) == 0
    # Another operation's name bounds nothing, and to some engines 0 is no bound.
    assert request.output_tokens("completions", {"max_completion_tokens": 0, "max_tokens": 100}, 256) == 100
    assert request.output_tokens("completions", {"max_completion_tokens": 0}, 256) == 256
    assert request.output_tokens("responses", {"max_tokens": 1, "max_output_tokens": 100}, 256) == 100
    assert request.output_tokens("chat", {"max_completion_tokens": 0}, 256) == 256
    assert request.output_tokens("chat", {"max_tokens": "50", "n": 4.0}, 256) == 200
    assert request.output_tokens("chat", {"max_tokens": 10, "n": 5000}, 256) == 50_000
    assert request.output_tokens("completions", {"max_tokens": 10, "n": 2, "best_of": 5}, 256) == 50
    assert request.output_tokens("completions", {"max_tokens": 10, "prompt": ["a", "b", "c"], "n": 2}, 256) == 60
    assert request.output_tokens("completions", {"max_tokens": 10, "prompt": [[1, 2], [3]]}, 256) == 20
    assert request.output_tokens("completions", {"max_tokens": 10, "prompt": [1, 2, 3]}, 256) == 10
    assert request.output_tokens("completions", {"max_tokens": 10, "prompt": "a", "prompt_embeds": ["b", "c"]}, 9) == 30
    assert request.output_tokens("chat", {"max_tokens": 1e300, "n": 10**18}, 256) <= 1 << 106
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


def _form(*fields: tuple[str, str], boundary: str = "b") -> bytes:
    parts = [f'content-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    return ("".join(f"--{boundary}\r\n{part}" for part in parts) + f"--{boundary}--\r\n").encode()


FORM = b"multipart/form-data; boundary=b"
FILE = (
    b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\nRIFF\r\n'
)


def test_the_model_of_a_form() -> None:
    assert request.form(FORM, _form(("language", "de"), ("model", "whisper"))).model == "whisper"
    assert request.form(FORM, FILE + _form(("model", "whisper"))).model == "whisper"
    assert request.form(b'Multipart/Form-Data; charset=utf-8; boundary="b"', _form(("model", "a"))).model == "a"
    for body in (_form(("language", "de")), _form(("model", "a"), ("model", "b")), b"garbage", b"", _form()):
        with pytest.raises(InvalidRequest):
            request.form(FORM, body)
    with pytest.raises(InvalidRequest) as kind:
        request.form(b"application/json", _form(("model", "a")))
    assert kind.value.status == 415


@pytest.mark.parametrize(
    "kind",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=A; boundary=b",
        b"multipart/form-data; boundary=b; boundary=A",
        b"multipart/form-data; xboundary=A; boundary=b",
        b"multipart/form-data; boundary=b; x=boundary=A",
        b"multipart/form-data; boundary*=utf-8''b",
        b'multipart/form-data; boundary="b',
        b"multipart/form-data; boundary=",
        b"multipart/form-data, multipart/form-data; boundary=b",
        b"multipart/form-data-x; boundary=b",
        b"multipart/form-data; boundary=" + b"b" * 71,
    ],
)
def test_a_form_has_one_boundary(kind: bytes) -> None:
    with pytest.raises(InvalidRequest):
        request.form(kind, _form(("model", "a")))


@pytest.mark.parametrize(
    "change",
    [
        # Bare line feeds, everywhere and behind a value alone.
        (b"\r\n", b"\n"),
        (b"whisper\r\n", b"whisper\n"),
        (b'name="model"\r\n', b'name="model"\n'),
        (b"RIFF", b'RIFF\n--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nother'),
        (b"RIFF", b"RIFF --b"),
        (b"--b--", b"--bb--"),
        (b"--b--", b"--b"),
        (b"--b--\r\n", b"--b--\r\n--b"),
        (b"--b--\r\n", b"--b-- and more"),
        (b'--b\r\ncontent-disposition: form-data; name="file"', b'--b \r\ncontent-disposition: form-data; name="file"'),
        (b"--b\r\n", b"preamble\r\n--b\r\n"),
        (b'name="model"', b'name="model"; name="x"'),
        (b'name="model"', b"name*=utf-8''model"),
        (b'name="model"', b'name="mod\\el"'),
        (b'name="model"', b'name = "model"'),
        (b'name="model"', b'name="model"; filename="m"'),
        (b'name="model"\r\n', b'name="model"\r\ncontent-transfer-encoding: base64\r\n'),
        (b'name="model"\r\n', b'name="model"\r\ncontent-disposition: form-data; name="x"\r\n'),
        (b'name="model"\r\n', b'name="model"\r\n folded: x\r\n'),
        (b'filename="a.wav"', b'filename="; name=model"'),
        (b'form-data; name="model"', b'attachment; name="model"'),
        (b"whisper", b"whis\xffper"),
        (b"whisper", b" "),
    ],
)
def test_forms_with_two_readings_are_refused(change: tuple[bytes, bytes]) -> None:
    body = FILE + _form(("model", "whisper"))
    assert request.form(FORM, body).model == "whisper"
    changed = body.replace(*change)
    assert changed != body
    with pytest.raises(InvalidRequest) as error:
        request.form(FORM, changed)
    assert error.value.status == 400


def test_a_large_form_is_read_in_no_time() -> None:
    import time

    boundary = "-" * 69 + "b"
    kind = f"multipart/form-data; boundary={boundary}".encode()
    for sound in ("\r\n--" * 2_500_000, "-" * 10_000_000, "x" * 10_000_000):
        body = _form(("file", sound), ("model", "whisper"), boundary=boundary)
        began = time.process_time()
        assert request.form(kind, body).model == "whisper"
        assert time.process_time() - began < 0.2


def test_texts_of_a_form_can_be_replaced() -> None:
    body = FILE + _form(("prompt", "one"), ("model", "whisper"), ("language", ""))
    read = request.form(FORM, body)
    assert [text for _, _, text in read.fields] == ["one", ""]
    assert read.replaced(body, ["two", "de"]) == FILE + _form(
        ("prompt", "two"), ("model", "whisper"), ("language", "de")
    )
    with pytest.raises(InvalidRequest):
        read.replaced(body, ["\r\n--b\r\n", ""])


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
