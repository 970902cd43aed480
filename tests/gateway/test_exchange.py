"""A request's way through a gateway: what is held of it, what goes on, who gets a copy, what is written down."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import StartGateway
from .fake_backend import FakeBackend
from .running import PROJECT, ROLES, Answer, Gateway, ask, key, settings, stored

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
MIB = 1024 * 1024
SECRET = "jane.doe@example.com"
REDACT = {"private": {"type": "sensitive_data", "action": "redact"}}


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def backend(engine: FakeBackend) -> FakeBackend:
    engine.reset()
    return engine


def audited(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """The section `audit`, with a key and a directory of this test's own."""
    private = tmp_path / "audit.key"
    words = [sys.executable, "-m", "serve_app.gateway.audit_cli", "keygen", str(private), str(tmp_path / "audit.pub")]
    subprocess.run(words, cwd=PROJECT, check=True, capture_output=True)
    return {"enabled": True, "directory": str(tmp_path / "audit"), "signing_key_file": str(private), **more}


def records(tmp_path: Path) -> list[dict[str, Any]]:
    """The records of a log that nobody writes any more, each with its kind."""
    paths = sorted((tmp_path / "audit").glob("audit-*.jsonl"))
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [{"kind": one["kind"], **one["payload"]} for one in map(json.loads, lines)]


# --- what is held


def _upload(gateway: Gateway, role: str, size: int, sent: int) -> socket.socket:
    """A request whose body never ends."""
    parts = urlsplit(gateway.url)
    made = socket.create_connection((parts.hostname, parts.port), timeout=60)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gateway.key(role)}\r\n"
    made.sendall(f"{head}content-type: application/json\r\ncontent-length: {size}\r\n\r\n".encode())
    with contextlib.suppress(OSError):
        made.sendall(b"x" * sent)
    return made


def _answered(one: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The answer on a connection that the gateway ends."""
    text = b""
    with one, contextlib.suppress(ConnectionResetError):
        while piece := one.recv(65536):
            text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, json.loads(body)["error"]


def test_bodies_on_their_way_do_not_fill_the_memory(gateway: StartGateway, backend: FakeBackend) -> None:
    config = settings(backend.url)
    config["server"] |= {"max_body_bytes": 4 * MIB, "max_buffered_bytes": 32 * MIB}
    one = gateway(config)
    name = "rayplane_gateway_buffered_bytes"
    basic = [_upload(one, "basic", 4 * MIB, 4 * MIB - 100) for _ in range(4)]
    one.wait_for(lambda: one.metric(name) == 16 * MIB - 400, "holding four bodies")
    # A caller gets half of the room ...
    status, headers, error = _answered(_upload(one, "basic", 4 * MIB, 1000))
    assert (status, headers["retry-after"], error["code"]) == (429, "1", "rate_limit_exceeded")
    # ... so that others go on, until all of it is taken.
    assert one.chat().status == 200
    premium = [_upload(one, "premium", 4 * MIB, 4 * MIB - 100) for _ in range(4)]
    one.wait_for(lambda: one.metric(name) == 32 * MIB - 800, "holding eight bodies")
    status, headers, error = _answered(_upload(one, "admin", 4 * MIB, 1000))
    assert (status, headers["retry-after"], error["type"]) == (503, "1", "server_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert one.metric("rayplane_gateway_limited_total", limit="buffered_bytes") == 2
    for each in (*basic, *premium):
        each.close()
    one.wait_for(lambda: one.metric(name) == 0, "giving back")
    # While an answer streams its body is held, and not longer.
    backend.control(tokens=30, token_s=0.02)
    assert one.chat("x" * MIB, stream=True).status == 200
    one.wait_for(lambda: one.metric(name) == 0, "giving back")


def test_a_body_that_grows_when_it_is_read_is_refused(gateway: StartGateway, backend: FakeBackend) -> None:
    config = settings(backend.url)
    config["server"] |= {"max_body_bytes": 4 * MIB, "max_buffered_bytes": 32 * MIB}
    one = gateway(config)
    body = b'{"model":"m","messages":[' + b"[]," * MIB + b"[]]}"
    got = ask(f"{one.url}/v1/chat/completions", body, key=one.key())
    assert (got.status, got.json()["error"]["code"]) == (413, "request_too_large")
    assert one.metric("rayplane_gateway_buffered_bytes") == 0
    assert one.chat("x" * (3 * MIB)).status == 200


# --- what is written down


def test_requests_of_nobody_fill_no_disk(gateway: StartGateway, backend: FakeBackend, tmp_path: Path) -> None:
    one = gateway(settings(backend.url, audit=audited(tmp_path)))
    for number in range(100):
        ask(f"{one.url}/v1/chat/completions", CHAT, key=f"rp-aaaaaaaaaaaa-{number:043d}")
        ask(f"{one.url}/v1/chat/completions", CHAT)
        ask(f"{one.url}/garbage/{number}", CHAT, key=one.key())
    one.chat(model="absent")
    one.chat()
    one.wait_for(lambda: len(one.requests()) == 202, "lines of requests")
    assert one.stop() == 0
    found = records(tmp_path)
    counts = {one["error"]: (one["count"], one["addresses"]) for one in found if one["kind"] == "refused"}
    assert counts == {"invalid_api_key": (100, 1), "missing_api_key": (100, 1), "unknown_url": (100, 1)}
    assert [(one["client"], one["status"]) for one in found if one["kind"] == "request"] == [
        ("premium", 404),
        ("premium", 200),
    ]


def test_callers_without_a_name_are_counted_until_they_are_let_in(
    gateway: StartGateway, backend: FakeBackend, tmp_path: Path
) -> None:
    config = settings(backend.url, audit=audited(tmp_path), auth={"anonymous_role": "basic"})
    one = gateway(config)
    for _ in range(5):
        assert ask(f"{one.url}/v1/chat/completions", {**CHAT, "model": "absent"}).status == 404
    assert ask(f"{one.url}/v1/chat/completions", CHAT).status == 200
    assert one.stop() == 0
    found = records(tmp_path)
    assert [one["status"] for one in found if one["kind"] == "request"] == [200]
    assert [(one["error"], one["count"]) for one in found if one["kind"] == "refused"] == [("model_not_found", 5)]


# --- what goes on


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        # Whoever takes the first name, or does not know the escape, must not find another model than was authorised.
        (rb'{"model":"secret","mod\u0065l":"m","messages":[]}', {"model": "there", "messages": []}),
        (rb'{"mod\u0065l":"m","metadata":{"model":"secret"}}', {"model": "there", "metadata": {"model": "secret"}}),
        (rb'{"mod\u0065l":"secret","model":"m"}', {"model": "there"}),
        (b'{"model":"m","temperature":0,"temperature":2}', {"model": "there", "temperature": 2}),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_there_is_one_reading_of_a_body(
    gateway: StartGateway, backend: FakeBackend, body: bytes, sent: dict[str, Any], renamed: bool
) -> None:
    config = settings(backend.url)
    config["routes"]["secret"] = config["routes"]["m"]
    if renamed:
        config["backends"]["one"]["model"] = "there"
    one = gateway(config)
    ask(f"{one.url}/v1/chat/completions", body, key=one.key())
    text = backend.seen("/v1/chat/completions")[0]["body"]
    pairs = json.loads(text, object_pairs_hook=list)
    assert pairs and len({name for name, _ in pairs}) == len(pairs) and "\\u" not in text
    sent = {name: "m" if value == "there" and not renamed else value for name, value in sent.items()}
    assert json.loads(text) == sent


def test_estimates_count_every_answer(gateway: StartGateway, backend: FakeBackend) -> None:
    limits = {"tokens": {"limit": 1000, "per": "day"}}
    roles = {**ROLES, "premium": {"models": ["*"], "limits": limits}}
    one = gateway(settings(backend.url, roles=roles))

    def complete(**more: Any) -> Answer:
        return ask(f"{one.url}/v1/completions", {"model": "m", "max_tokens": 100, **more}, key=one.key())

    for more in (
        {"prompt": ["x"] * 20},
        {"prompt": "x", "n": 20},
        {"prompt": "x", "best_of": 20},
        {"prompt": ["x"] * 5, "n": 4, "max_completion_tokens": 0},
        {"prompt": "x", "n": 20_000},
    ):
        got = complete(**more)
        assert (got.status, got.json()["error"]["code"]) == (429, "rate_limit_exceeded"), more
    assert not backend.seen("/v1/completions")
    assert complete(prompt="x", n=2).status == 200


def test_what_no_filter_can_see_is_refused(gateway: StartGateway, backend: FakeBackend) -> None:
    roles = {
        "basic": {"models": ["m"], "filters": ["private"]},
        "premium": {"models": ["m"]},
        "admin": {**ROLES["admin"], "chat_template": True},
    }
    one = gateway(settings(backend.url, roles=roles, filters=REDACT))
    for role in ("basic", "premium"):
        refused = one.chat(role=role, chat_template="{{ 'Ignore' }}")
        assert (refused.status, refused.json()["error"]["param"]) == (403, "chat_template")
    assert one.chat(role="admin", chat_template="{{ 'Hello' }}").status == 200
    for role, status in (("basic", 400), ("premium", 200)):
        assert ask(f"{one.url}/v1/completions", {"model": "m", "prompt": [1, 2]}, key=one.key(role)).status == status
    tool = {"type": "function", "function": {"name": "f", "description": f"Writes to {SECRET}", "parameters": {}}}
    assert one.chat(role="basic", tools=[tool]).status == 200
    assert SECRET not in json.dumps(backend.seen("/v1/chat/completions")[-1]["json"])
    deep: Any = SECRET
    for _ in range(800):
        deep = [deep]
    for role in ("basic", "premium"):
        got = one.chat(SECRET, role=role, documents=deep)
        assert (got.status, "nested" in got.json()["error"]["message"]) == (400, True)


def test_a_streams_head_does_not_wait_for_the_filters(gateway: StartGateway, backend: FakeBackend) -> None:
    roles = {**ROLES, "basic": {"models": ["m"], "filters": ["private"]}}
    one = gateway(settings(backend.url, roles=roles, filters=REDACT))
    # What may become the number of a card is held back.
    backend.control(text="4111 1111 1111 1111 1111 9", hold="mid", after=2)
    body = {"model": "m", "prompt": "Hello", "stream": True}
    request = urllib.request.Request(
        f"{one.url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {one.key('basic')}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
        backend.release()
        assert answer.read().endswith(b"data: [DONE]\n\n")


# --- copies


def test_what_nobody_may_keep_is_not_copied(gateway: StartGateway, backend: FakeBackend) -> None:
    with FakeBackend() as copy:
        config = settings({"one": backend.url, "copy": copy.url}, open_operations=["files", "audio"])
        config["routes"]["m"] = {"backends": [{"backend": "one"}], "shadow": {"backend": "copy", "percent": 100}}
        config["keys"][0]["retain"] = False
        one = gateway(config)
        one.chat("kept out 1", role="basic")
        one.chat("kept out 2", headers={"x-rayplane-retain": "false"})
        one.chat("kept out 3", store=False)
        one.chat("x" * (2 * MIB))
        files = {"content-type": "multipart/form-data; boundary=b"}
        body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nkept out\r\n--b--\r\n'
        assert ask(f"{one.url}/v1/files", body, key=one.key("admin"), headers=files).status == 200
        assert ask(f"{one.url}/v1/files/file-1", key=one.key("admin"), method="DELETE").status == 200
        one.chat("copied")
        copy.wait(lambda _: bool(copy.seen("/v1/chat/completions")))
        assert one.stop() == 0
        assert [seen["json"]["messages"][0]["content"] for seen in copy.seen("/v1/chat/completions")] == ["copied"]
        assert not copy.seen("/v1/files")
        assert len(backend.seen("/v1/files")) == 2


def test_the_canarys_answers_are_its_own(gateway: StartGateway, backend: FakeBackend) -> None:
    """Three callers of a tenant, one of them (premium) on the canary by the percentage."""
    with FakeBackend(text="from the canary") as canary:
        backend.control(text="from the main version")
        config = settings({"one": backend.url, "two": canary.url}, cache={"enabled": True})
        config["routes"]["m"] = {"backends": [{"backend": "one"}], "canary": {"backend": "two", "percent": 60}}
        for entry in config["keys"]:
            entry["tenant"] = "same"
        roles = {name: {"models": ["m"]} for name in ("basic", "premium")} | {"admin": ROLES["admin"]}
        one = gateway({**config, "roles": roles})
        found: dict[str, str] = {}
        for stream in (False, True):
            for round_ in range(2):
                for role in ("basic", "premium", "admin"):
                    got = one.chat("Who?", role=role, temperature=0, stream=stream)
                    variant = got.headers.get("x-rayplane-variant", "main")
                    text = got.body.decode()
                    assert ("from" in text) and (("canary" in text) == (variant == "canary"))
                    if round_:
                        assert got.headers["x-rayplane-cache"] == "hit"
                    assert found.setdefault(role, variant) == variant
                stored(one, one.metric("rayplane_gateway_cache_total", result="miss"))
        # By the header anybody gets there, and the answer is the one that is kept for the canary.
        asked = one.chat("Who?", role="basic", temperature=0, headers={"x-rayplane-canary": "always"})
        assert asked.headers["x-rayplane-variant"] == "canary" and b"canary" in asked.body
        assert set(found.values()) == {"main", "canary"}, "the keys' places in the percentage changed: take others"
        assert asked.headers["x-rayplane-cache"] == "hit"


# --- sound and files


FORM = {"content-type": "multipart/form-data; boundary=b"}


def _sound(**fields: str) -> bytes:
    body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    for name, value in fields.items():
        body += f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    return body + b"--b--\r\n"


def test_transcripts_go_through_the_filters(gateway: StartGateway, backend: FakeBackend) -> None:
    operations = ["audio"]
    roles = {
        **ROLES,
        "basic": {"models": ["m"], "operations": operations, "filters": ["private"]},
        "premium": {"models": ["m"], "operations": operations, "filters": ["never"]},
    }
    filters = {**REDACT, "never": {"type": "sensitive_data", "action": "block"}}
    one = gateway(settings(backend.url, roles=roles, filters=filters, open_operations=operations))
    backend.control(text=f"Write to {SECRET} at once.")

    def transcribe(role: str, **fields: str) -> Answer:
        url = f"{one.url}/v1/audio/transcriptions"
        return ask(url, _sound(model="m", **fields), key=one.key(role), headers=FORM)

    for fields in ({}, {"response_format": "text"}, {"stream": "true"}):
        assert SECRET in transcribe("admin", **fields).body.decode(), "no filters"
        got = transcribe("basic", **fields)
        assert got.status == 200 and got.body
        text = got.body.decode()
        assert SECRET not in text and "jane" not in text and "redacted email" in text and "at once." in text
        blocked = transcribe("premium", **fields)
        assert "jane" not in blocked.body.decode()
        if "stream" not in fields:
            assert (blocked.status, blocked.json()["error"]["code"]) == (400, "content_filter")
    backend.control(text="")
    backend.reset()
    assert transcribe("basic", prompt=f"A talk with {SECRET}").status == 200
    seen = backend.seen("/v1/audio/transcriptions")[0]["body"]
    assert SECRET not in seen and "A talk with [redacted email]" in seen
    assert transcribe("premium", prompt=f"A talk with {SECRET}").status == 400
    for line in one.requests():
        assert line["operation"] == "audio"


def test_an_ambiguous_form_goes_nowhere(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(settings(backend.url, open_operations=["audio"]))
    url = f"{one.url}/v1/audio/transcriptions"
    for kind, body in (
        ("multipart/form-data; boundary=b; boundary=c", _sound(model="m")),
        ("multipart/form-data; boundary=b", _sound(model="m").replace(b"\r\n", b"\n")),
        ("multipart/form-data; boundary=b", _sound(model="m", file="x", language="y\n--b\n")),
    ):
        got = ask(url, body, key=one.key("admin"), headers={"content-type": kind})
        assert (got.status, got.json()["error"]["type"]) == (400, "invalid_request_error")
    assert not backend.seen("/v1/audio")


def test_files_pass_through(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(settings(backend.url, open_operations=["files"]))
    url, admin = f"{one.url}/v1/files", one.key("admin")
    assert ask(url, key=one.key()).status == 403
    body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n{"a":1}\r\n--b--\r\n'
    made = ask(url, body, key=admin, headers=FORM)
    assert (made.status, made.json()["id"]) == (200, "file-1")
    sent = backend.seen("/v1/files")[0]
    assert sent["body"] == body.decode() and dict(sent["headers"])["content-type"] == FORM["content-type"]
    assert ask(url, key=admin).json()["object"] == "list"
    assert ask(f"{url}/file-1", key=admin, method="DELETE").json()["deleted"] is True
    content = ask(f"{url}/file-1/content", key=admin)
    assert (content.status, content.headers["content-type"]) == (200, "application/jsonl")
    assert content.body == b'{"custom_id":"1"}\n{"custom_id":"2"}\n'
    assert [seen["path"] for seen in backend.seen("/v1/files")][-1] == "/v1/files/file-1/content"
    assert ask(f"{url}/../models", key=admin).status in (400, 404)
    one.wait_for(lambda: len(one.requests()) >= 5, "lines of requests")
    assert [line["status"] for line in one.requests()][1:5] == [200] * 4
    assert key("admin").key not in json.dumps(backend.seen("/v1/files"))
