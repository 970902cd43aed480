"""The gateway's side of HTTP/1.1, byte by byte, against a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from .conftest import StartGateway
from .fake_backend import FakeBackend
from .ports import ends, taken
from .running import Answer, Gateway, ask, key, settings, start
from .waiting import LONG_S, wait_until

#: Time-outs of the gateway that has short ones.
HEAD_S = 0.5
WRITE_S = 1.5
MIB = 1024 * 1024
LIMIT = 10 * MIB
#: What the engine below answers: longer than all buffers of the kernel.
LONG = 20 * MIB
SOUND = b"RIFF" + bytes(range(256)) * 256


class Engine(socketserver.ThreadingTCPServer):
    """A backend with answers that are long, endless or broken."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        #: Requests other than health checks: path, length and digest of the body.
        self.got: list[tuple[str, int, str]] = []
        #: How often a client of an endless stream went away.
        self.left = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news here."""


class _Handler(socketserver.StreamRequestHandler):
    server: Engine

    def handle(self) -> None:
        while line := self.rfile.readline():
            _, path, _ = line.decode().split(" ")
            length = 0
            while (header := self.rfile.readline()) != b"\r\n":
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            body = self.rfile.read(length)
            if path != "/v1/models":
                self.server.got.append((path, length, hashlib.sha256(body).hexdigest()))
            if not self.answer(path, body):
                return

    def answer(self, path: str, body: bytes) -> bool:
        """Whether the connection goes on."""
        if path == "/v1/audio/speech":
            head = "HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ntransfer-encoding: chunked\r\n\r\n"
            self.wfile.write(head.encode() + b"%x\r\n%s\r\n" % (len(SOUND), SOUND))
            wait_until(lambda: taken(self.connection))
            return False
        if path == "/v1/files/cut/content":
            head = "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 1000000\r\n\r\n"
            self.wfile.write(head.encode() + SOUND)
            wait_until(lambda: taken(self.connection))
            return False
        if path == "/v1/files/long/content":
            return self.whole("application/octet-stream", long_file())
        if path != "/v1/chat/completions":
            return self.whole("application/json", b'{"object":"list","data":[]}')
        asked = json.loads(body)
        if asked.get("stream"):
            event = {"id": "1", "object": "chat.completion.chunk", "choices": [{"delta": {"content": "x" * 4000}}]}
            text = b"data: %s\n\n" % json.dumps(event).encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            try:
                while True:
                    self.wfile.write(text)
            except OSError:
                self.server.left += 1
            return False
        content = "y" * (LONG if asked["messages"][0]["content"] == "long" else 2)
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return self.whole("application/json", json.dumps({"id": "1", "choices": [choice]}).encode())

    def whole(self, kind: str, body: bytes) -> bool:
        self.wfile.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        self.wfile.write(body)
        return True


def long_file() -> bytes:
    return bytes(range(256)) * (LIMIT // 256)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as one:
        yield one
        one.shutdown()


def _started(engine: Engine, tmp_path_factory: pytest.TempPathFactory, **more: Any) -> Iterator[Gateway]:
    """A gateway of this file's tests. What it says on standard error is a mistake of its own."""
    config = settings(engine.url, open_operations=["audio", "files"])
    config["server"] |= {"max_body_bytes": LIMIT, **more}
    made = start(tmp_path_factory.mktemp("wire") / "gateway.json", config)
    yield made
    assert made.process.poll() is None
    assert made.stop() == 0
    assert made.errors == []


@pytest.fixture(scope="module")
def one(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The one that has time."""
    patient = dict.fromkeys(("client_head_timeout_s", "client_write_timeout_s", "client_read_timeout_s"), LONG_S)
    yield from _started(engine, tmp_path_factory, **patient)


@pytest.fixture(scope="module")
def hasty(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The one with short time-outs: what is to succeed here is sent in one piece."""
    short = {"client_head_timeout_s": HEAD_S, "client_write_timeout_s": WRITE_S, "client_read_timeout_s": 1.0}
    yield from _started(engine, tmp_path_factory, **short)


class Raw:
    """A connection to a gateway."""

    def __init__(self, gateway: Gateway, *, receive_buffer: int = 0) -> None:
        host, _, port = gateway.address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(LONG_S)
        self.socket.connect((host, int(port)))
        self.ports = int(port), self.socket.getsockname()[1]

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        """Send what the other side takes."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.socket.sendall(piece)

    def answer(self, method: str = "POST") -> Answer:
        """The next answer; there is no other behind it yet."""
        got = http.client.HTTPResponse(self.socket, method=method)
        got.begin()
        return Answer(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())

    def rest(self) -> bytes:
        """All that comes until the other side ends the connection."""
        pieces = []
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(1 << 20):
                pieces.append(piece)
        return b"".join(pieces)

    def held(self) -> bool:
        """Whether the kernel still has the other side's end of this connection, with what is unsent (Linux)."""
        return self.ports[0] in ends(*self.ports)

    def ends_within(self, seconds: float = LONG_S) -> bool:
        """Whether the other side ends the connection, without another answer."""
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


def chat(content: str = "Hello", *, role: str = "premium", headers: str = "", **more: Any) -> bytes:
    """A chat request's bytes; without `role`, without a key."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **more}).encode()
    return head(f"content-length: {len(body)}\r\n{headers}", role=role) + body


def head(
    headers: str = "", *, path: str = "/v1/chat/completions", role: str = "premium", method: str = "POST"
) -> bytes:
    bearer = f"authorization: Bearer {key(role).key}\r\n" if role else ""
    kind = "content-type: application/json\r\n"
    return f"{method} {path} HTTP/1.1\r\nhost: gateway\r\n{kind}{bearer}{headers}\r\n".encode()


def chunked(body: bytes, trailers: bytes = b"", *, role: str = "premium") -> bytes:
    """A chat request in chunks."""
    size = max(1, len(body) // 3)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces)
    return head("transfer-encoding: chunked\r\n", role=role) + chunks + b"0\r\n" + trailers + b"\r\n"


def split(raw: bytes) -> list[Answer]:
    """The answers in a connection's bytes; each has a content-length."""
    found = []
    while raw:
        top, mark, raw = raw.partition(b"\r\n\r\n")
        assert mark and top.startswith(b"HTTP/1.1 "), top[:100]
        status, *lines = top.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers["content-length"])
        assert len(raw) >= size
        found.append(Answer(int(status.split(" ")[1]), headers, raw[:size]))
        raw = raw[size:]
    return found


def refusal(answer: Answer, status: int) -> dict[str, Any]:
    """The error of an answer that ends its connection, in OpenAI's shape."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"
    return error


# --- what could be read in two ways


INNER = b"DELETE /v1/files/smuggled HTTP/1.1\r\nhost: gateway\r\nx-request-id: smuggled\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1:22\r\n\r\n" + INNER,
        head(f"content-length: {len(INNER)}\r\n", path="gateway:443", method="CONNECT") + INNER,
    ],
)
def test_connect_is_refused_and_nothing_behind_it_is_read(one: Gateway, engine: Engine, raw: bytes) -> None:
    seen = len(engine.got)
    with Raw(one) as wire:
        wire.send(raw)
        (answer,) = split(wire.rest())
    assert "CONNECT" in refusal(answer, 400)["message"]
    assert len(engine.got) == seen
    after = one.chat()
    one.line(after.headers["x-request-id"])
    assert "smuggled" not in {line["request_id"] for line in one.requests()}


@pytest.mark.parametrize(
    "raw",
    [
        head(f"connection: Upgrade\r\nupgrade: h2c\r\ncontent-length: {len(INNER)}\r\n") + INNER,
        head(
            "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAQ\r\n"
            "transfer-encoding: chunked\r\n"
        )
        + b"%x\r\n%s\r\n0\r\n\r\n" % (len(INNER), INNER),
    ],
)
def test_a_body_behind_an_upgrade_is_a_body(one: Gateway, engine: Engine, raw: bytes) -> None:
    """Read as the next request, it would be one that a proxy in front has never seen."""
    seen = len(engine.got)
    with Raw(one) as wire:
        wire.send(raw, head("connection: close\r\n", path="/v1/models", method="GET"))
        first, second = split(wire.rest())
    assert (first.status, second.status) == (400, 200)
    assert len(engine.got) == seen


BODY = b'{"model":"m","messages":[{"role":"user","content":"Hello"}]}'
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = f"content-length: {len(BODY)}\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        head(LENGTH + "transfer-encoding: chunked\r\n") + CHUNKS,
        head("transfer-encoding: chunked\r\n" + LENGTH) + CHUNKS,
        head(LENGTH + LENGTH) + BODY,
        head(LENGTH + "content-length: 0\r\n") + BODY,
        *(
            head(f"content-length: {value}\r\n") + BODY
            for value in ("60, 60", "+60", "-60", "0x3c", "", "60 60", "6_0", "9" * 30)
        ),
        *(
            head(f"transfer-encoding: {value}\r\n") + CHUNKS
            for value in (
                "xchunked",
                "identity",
                "gzip, chunked",
                "chunked, identity",
                "chunked, chunked",
                ",chunked",
                "chunked;q=1",
                '"chunked"',
                "\x0bchunked",
                "",
            )
        ),
        head("transfer-encoding: chunked\r\n" * 2) + CHUNKS,
        head("transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n") + CHUNKS,
        head("transfer-encoding : chunked\r\n") + CHUNKS,
        head("transfer-encoding\t: chunked\r\n") + CHUNKS,
        head("transfer-encoding:\r\n chunked\r\n") + CHUNKS,
        head("transfer-encoding: chunked\r\n").replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNKS,
        head(LENGTH + "x-a: b\r\n c\r\n") + BODY,
        head(LENGTH + "x-a: b\r\n\tauthorization: c\r\n") + BODY,
        POST + b" host: gateway\r\n" + LENGTH.encode() + b"\r\n" + BODY,
        head(LENGTH + "x-a: b\nx-c: d\r\n") + BODY,
        head(LENGTH + "x-a: b\rx-c: d\r\n") + BODY,
        head(LENGTH).replace(b"\r\n", b"\n") + BODY,
        head(LENGTH)[:-2] + b"\n" + BODY,
        head(LENGTH + "x-a: b\0c\r\n") + BODY,
        head(LENGTH + "x-a\0: b\r\n") + BODY,
        head(LENGTH + "x-a: b\x01\r\n") + BODY,
        head(LENGTH + ": b\r\n") + BODY,
        head(LENGTH + "x-a\r\n") + BODY,
        head(LENGTH, path="/v1/chat/completions\0") + BODY,
        head(LENGTH).replace(b"POST ", b"POST\t") + BODY,
        head(LENGTH).replace(b"HTTP/1.1", b"HTTP/1.2") + BODY,
        *(
            head("transfer-encoding: chunked\r\n") + chunks
            for chunks in (
                CHUNKS.replace(b"\r\n", b"\n"),
                b"0x" + CHUNKS,
                b"-" + CHUNKS,
                b"+" + CHUNKS,
                b" " + CHUNKS,
                b"f" * 17 + b"\r\n" + BODY,
                b"3c \r\n" + BODY + b"\r\n0\r\n\r\n",
                b"3c;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n",
                b"3b\r\n" + BODY + b"\r\n0\r\n\r\n",
                b"3c\r\n" + BODY + b"0\r\n\r\n",
                b"3c\r\n" + BODY + b"\r\n0\r\nx-a : b\r\n\r\n",
                b"3c\r\n" + BODY + b"\r\n0\r\ncontent-length: 5\r\n\r\n",
            )
        ),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://gateway HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(one: Gateway, engine: Engine, raw: bytes) -> None:
    seen = len(engine.got)
    with Raw(one) as wire:
        wire.send(raw + INNER)
        (answer,) = split(wire.rest())
    refusal(answer, 400)
    assert len(engine.got) == seen


@pytest.mark.parametrize("line", [b"GET /v1/models", b"GET /v1/models HTTP/0.9", b"GET /v1/models HTTP/2.0"])
def test_other_versions_are_refused(one: Gateway, line: bytes) -> None:
    with Raw(one) as wire:
        wire.send(line + b"\r\n\r\n")
        (answer,) = split(wire.rest())
    refusal(answer, 505)


@pytest.mark.parametrize(
    "raw",
    [
        chat(),
        b"\r\n\r\n" + chat(),
        chunked(BODY),
        chunked(BODY).replace(b": chunked", b":\tCHUNKED "),
        chunked(BODY).replace(b"\r\n0\r\n", b"\r\n000;end=yes\r\n"),
        chat().replace(LENGTH.encode(), f"Content-Length: {len(BODY)}   \r\n".encode()),
        chat(headers="upgrade: h2c\r\n"),
        chat(headers="connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAQ\r\n"),
        chat(headers="connection: keep-alive, upgrade\r\nupgrade: websocket\r\n"),
        chunked(BODY).replace(b"\r\n", b"\r\nconnection: upgrade\r\nupgrade: h2c\r\n", 1),
        chat(headers="transfer_encoding: chunked\r\nx-empty:\r\n"),
    ],
)
def test_what_is_unusual_is_taken_and_the_connection_goes_on(one: Gateway, raw: bytes) -> None:
    with Raw(one) as wire:
        for _ in range(2):
            wire.send(raw)
            answer = wire.answer()
            assert answer.status == 200, answer
            assert "connection" not in answer.headers


def test_a_request_byte_by_byte(one: Gateway) -> None:
    with Raw(one) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.send(*(bytes([byte]) for byte in chunked(BODY, b"x-trailer: 1\r\n")))
        assert wire.answer().status == 200
        wire.send(*(bytes([byte]) for byte in chat(headers="connection: Upgrade\r\nupgrade: h2c\r\n")))
        assert wire.answer().status == 200


def test_trailers_are_no_headers(one: Gateway) -> None:
    bearer = f"authorization: Bearer {one.key()}\r\n".encode()
    with Raw(one) as wire:
        wire.send(chunked(BODY, bearer, role=""))
        assert wire.answer().status == 401
    with Raw(one) as wire:
        wire.send(chunked(BODY, b"x-request-id: mine\r\nauthorization: Bearer none\r\n"))
        answer = wire.answer()
        assert answer.status == 200 and answer.headers["x-request-id"] != "mine"
        wire.send(chat())
        assert wire.answer().status == 200


def test_refusals_wait_for_the_answers_before_them(one: Gateway, engine: Engine) -> None:
    with Raw(one) as wire:
        wire.send(chat() * 3 + b"nonsense\r\n\r\n" + INNER)
        *good, bad = split(wire.rest())
    assert [answer.status for answer in good] == [200, 200, 200]
    refusal(bad, 400)
    seen = len(engine.got)
    with Raw(one) as wire:
        wire.send(chat() + head("transfer-encoding: chunked\r\n") + b"5\r\nabcdeX" + INNER)
        good, bad = split(wire.rest())  # type: ignore[assignment]
    assert good.status == 200  # type: ignore[attr-defined]
    refusal(bad, 400)
    assert len(engine.got) == seen + 1


def test_an_answer_under_way_is_not_broken_by_what_comes_behind(gateway: StartGateway) -> None:
    with FakeBackend(tokens=10, hold="mid") as backend:
        one = gateway(settings(backend.url))
        with Raw(one) as wire:
            wire.send(chat(stream=True))
            raw = wire.socket.recv(65536)
            wire.send(b"\0\0\0")
            wait_until(lambda: taken(wire.socket))
            backend.release()
            raw += wire.rest()
        first, last, error = raw.partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 200") and last
        assert first.count(b'"content":') >= 10 and b"HTTP/1.1" not in first[9:]
        refusal(split(error)[0], 400)


# --- how large and how long


def _endless(first: bytes, piece: bytes) -> Callable[[Raw], None]:
    def send(wire: Raw) -> None:
        wire.send(first)
        wire.send(*itertools.repeat(piece, 3 * MIB // len(piece)))

    return send


@pytest.mark.parametrize(
    "send",
    [
        _endless(head()[:-2], b"x-a: " + b"b" * 4096 + b"\r\n"),
        _endless(head()[:-2], b"a:\r\n"),
        _endless(head()[:-2] + b"x-a: ", b"b" * 4096),
        _endless(head()[:-2], b"n" * 4096),
        _endless(b"GET /", b"u" * 4096),
        _endless(b"G", b"E" * 4096),
        _endless(b"", b"\r\n" * 2048),
        _endless(head("transfer-encoding: chunked\r\n") + b"5;", b"e" * 4096),
        _endless(head("transfer-encoding: chunked\r\n"), b"0" * 4096),
        _endless(head("transfer-encoding: chunked\r\n") + b"0\r\nx-a: ", b"b" * 4096),
        _endless(head("transfer-encoding: chunked\r\n") + b"0\r\n", b"x-a: b\r\n" * 512),
    ],
    ids=["headers", "empty", "value", "name", "target", "method", "lines", "extension", "size", "trailer", "trailers"],
)
def test_endless_heads_are_refused(one: Gateway, send: Callable[[Raw], None]) -> None:
    with Raw(one) as wire:
        send(wire)
        (answer,) = split(wire.rest())
    if answer.status == 400:  # no method, and no chunk's size, is as long as that
        refusal(answer, 400)
    else:
        assert refusal(answer, 431)["code"] == "headers_too_large"


def test_a_large_head_is_taken(one: Gateway) -> None:
    with Raw(one) as wire:
        wire.send(chat(headers="".join(f"x-{number}: {'v' * 1000}\r\n" for number in range(30))))
        assert wire.answer().status == 200
        wire.send(chat(headers="".join(f"x-{number}: {'v' * 1000}\r\n" for number in range(33))))
        refusal(wire.answer(), 431)
        assert wire.ends_within()


def test_a_head_that_does_not_end(hasty: Gateway) -> None:
    with Raw(hasty) as wire:
        wire.send(head()[:-2])
        assert refusal(wire.answer(), 408)["code"] == "request_timeout"
        assert wire.ends_within()
    with Raw(hasty) as wire:
        assert wire.ends_within()  # nothing was asked: nothing is answered
    with Raw(hasty) as wire:
        wire.send(head()[:-2] + b"x-a: ")
        wire.socket.settimeout(0.1)

        def answered() -> bytes:
            wire.send(b"b")
            with contextlib.suppress(TimeoutError):
                return wire.socket.recv(65536)
            return b""

        refusal(split(wait_until(answered, "an answer, although bytes come"))[0], 408)


@pytest.mark.parametrize("more", [b"\r\n", b"\r", b"G", b"POST /v1/chat/completions HTTP/1.1\r\nx-a: b"])
def test_a_byte_after_an_answer_does_not_hold_the_connection(hasty: Gateway, more: bytes) -> None:
    with Raw(hasty) as wire:
        wire.send(chat())
        assert wire.answer().status == 200
        wire.send(more)
        wire.rest()  # which ends before an idle connection does


def test_an_idle_connection_is_kept(hasty: Gateway) -> None:
    with Raw(hasty) as wire:
        for _ in range(2):
            wire.send(chat())
            assert wire.answer().status == 200
            assert not wire.ends_within(2 * HEAD_S)


def test_a_head_in_two_pieces_after_an_answer(one: Gateway) -> None:
    with Raw(one) as wire:
        wire.send(chat())
        assert wire.answer().status == 200
        wire.send(b"\r\n" + chat()[:30])
        wait_until(lambda: taken(wire.socket))
        wire.send(chat()[30:])
        assert wire.answer().status == 200


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (head("content-length: 100\r\n", role=""), 401),
        (head("content-length: 100\r\n", path="/v1/nothing"), 404),
        (head("content-length: 100\r\n", path="/v1/models", method="GET"), 200),
        (head("content-length: 100\r\n", path="/livez", method="GET"), 200),
        (head("content-length: 100\r\ncontent-encoding: gzip\r\n"), 415),
        (head("content-length: 100\r\nexpect: 100-continue\r\n", role=""), 401),
        (head("transfer-encoding: chunked\r\n", role="") + b"5\r\nabc", 401),
    ],
)
def test_an_answer_before_the_bodys_end_is_the_last_one(one: Gateway, raw: bytes, status: int) -> None:
    with Raw(one) as wire:
        wire.send(raw)
        answer = wire.answer()
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        wire.send(b"x")
        assert wire.ends_within()


def test_a_late_body_is_answered_and_the_connection_ends(hasty: Gateway) -> None:
    with Raw(hasty) as wire:
        wire.send(head("content-length: 100\r\n") + b"{")
        assert refusal(wire.answer(), 408)["code"] == "request_timeout"
        assert wire.ends_within()


def test_a_refused_client_may_end_what_it_sends(one: Gateway) -> None:
    """Were the connection closed at once, its reset could overtake the answer."""
    with Raw(one) as wire:
        wire.send(head(f"content-length: {8 * MIB}\r\n", role=""))
        assert wire.socket.recv(9, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 "
        for _ in range(16):
            wire.socket.sendall(b"x" * (MIB // 2))
            time.sleep(0.02)
        assert wire.answer().status == 401
        assert wire.ends_within()


# --- bodies


def _long_body(size: int) -> bytes:
    """A chat request of so many bytes."""
    start, end = b'{"model":"m","messages":[{"role":"user","content":"', b'"}]}'
    return start + b"z" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("pieces", [False, True])
def test_the_largest_body_goes_up_and_a_larger_one_does_not(one: Gateway, engine: Engine, pieces: bool) -> None:
    def sent(body: bytes) -> bytes:
        return chunked(body) if pieces else head(f"content-length: {len(body)}\r\n") + body

    body = _long_body(LIMIT)
    with Raw(one) as wire:
        wire.send(sent(body))
        assert wire.answer().status == 200
        assert engine.got[-1] == ("/v1/chat/completions", LIMIT, hashlib.sha256(body).hexdigest())
        seen = len(engine.got)
        # All of it is sent before the answer is read.
        wire.socket.sendall(sent(_long_body(LIMIT + 4 * MIB)))
        assert refusal(wire.answer(), 413)["code"] == "request_too_large"
        assert wire.ends_within()
    assert len(engine.got) == seen


def test_a_long_answer_comes_down_whole(one: Gateway) -> None:
    answer = ask(f"{one.url}/v1/files/long/content", key=one.key("admin"))
    assert answer.status == 200 and answer.body == long_file()
    said = one.chat("long")
    assert said.status == 200 and said.json()["choices"][0]["message"]["content"] == "y" * LONG


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/files/cut/content"])
def test_half_an_answer_does_not_look_whole(one: Gateway, path: str) -> None:
    with Raw(one) as wire:
        body = b'{"model":"m","input":"Hello","voice":"alloy"}' if path.endswith("speech") else b""
        method = "POST" if body else "GET"
        headers = f"content-length: {len(body)}\r\nx-request-id: half{path.replace('/', '.')}\r\n"
        wire.send(head(headers, path=path, role="admin", method=method) + body)
        raw = wire.rest()
    assert raw.startswith(b"HTTP/1.1 200") and b"transfer-encoding: chunked" in raw
    assert SOUND[:1000] in raw
    assert b'"error"' not in raw and b"data:" not in raw and not raw.endswith(b"0\r\n\r\n")
    line = one.line(f"half{path.replace('/', '.')}")
    assert (line["status"], line["success"], line["error"]) == (200, False, "bad_gateway")


def test_half_a_stream_says_so(gateway: StartGateway) -> None:
    with FakeBackend(die="mid", after=3) as backend:
        one = gateway(settings(backend.url))
        with Raw(one) as wire:
            wire.send(chat(stream=True))
            answer = wire.answer()
            assert answer.status == 200
            last = answer.body.strip().splitlines()[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "bad_gateway"
            wire.send(chat(stream=True))
            assert wire.answer().status == 200


# --- clients that do not read


def test_who_takes_nothing_of_a_whole_answer_is_dropped(hasty: Gateway) -> None:
    def dropped() -> int:
        return sum(1 for line in hasty.lines if line["message"].startswith("dropped a client"))

    before = dropped()
    with Raw(hasty, receive_buffer=4096) as wire:
        wire.send(chat("long"))
        assert wire.held()
        hasty.wait_for(lambda: dropped() > before, "dropping the client")
        hasty.wait_for(lambda: not wire.held(), "the connection's end")
        assert len(wire.rest()) < LONG
    with Raw(hasty, receive_buffer=4096) as wire:
        wire.send(chat("long", headers="connection: close\r\n"))
        hasty.wait_for(lambda: dropped() > before + 1, "dropping the client")
        hasty.wait_for(lambda: not wire.held(), "the connection's end")
        assert len(wire.rest()) < LONG


def test_who_takes_nothing_of_a_stream_is_dropped(hasty: Gateway, engine: Engine) -> None:
    left = engine.left
    with Raw(hasty, receive_buffer=4096) as wire:
        wire.send(chat(stream=True, headers="x-request-id: takes-nothing\r\n"))
        line = hasty.line("takes-nothing")
        assert (line["status"], line["error"], line["success"]) == (499, "client_too_slow", False)
        hasty.wait_for(lambda: engine.left > left, "the backend's end")
        hasty.wait_for(lambda: not wire.held(), "the connection's end")
        assert not wire.rest().endswith(b"0\r\n\r\n")


def test_a_slow_reader_gets_all(hasty: Gateway) -> None:
    def read() -> tuple[bytes, float]:
        """What came, and the longest time in which this process took nothing."""
        with Raw(hasty, receive_buffer=4096) as wire:
            wire.send(chat("long", headers="connection: close\r\n"))
            began = last = time.monotonic()
            pieces, longest = [], 0.0
            with contextlib.suppress(ConnectionError):
                while piece := wire.socket.recv(4096 if last < began + 3 * WRITE_S else 1 << 20):
                    pieces.append(piece)
                    if last < began + 3 * WRITE_S:
                        assert sum(map(len, pieces)) < 2 * MIB
                        time.sleep(WRITE_S / 8)
                    longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return b"".join(pieces), longest

    raw, longest = read()
    while not raw.endswith(b"}") and longest > WRITE_S / 2:  # on a busy machine: slower than it was to be
        raw, longest = read()
    (answer,) = split(raw)
    assert answer.json()["choices"][0]["message"]["content"] == "y" * LONG


# --- anything


_TOKENS = st.sampled_from(
    [
        *(b"GET ", b"POST ", b"PUT ", b"CONNECT ", b"/livez", b"/v1/chat/completions", b"*", b"http://a", b"//", b"%"),
        *(b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2.0", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b"\t", b": ", b":"),
        *(b"content-length", b"transfer-encoding", b"chunked", b"connection", b"upgrade", b"h2c", b"close", b"expect"),
        *(b"100-continue", b"keep-alive", b"host", b"0", b"5", b"-1", b"0\r\n\r\n", b"5\r\nhello\r\n", b"ffffffffff"),
        *(b"GET /livez HTTP/1.1\r\n", b"POST /v1/models HTTP/1.1\r\n", b"content-length: 5\r\n\r\n", b"\xff\xfe"),
        *(b"transfer-encoding: chunked\r\n\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"a" * 500, chat()),
    ]
)
_MIXED = st.lists(st.one_of(_TOKENS, st.binary(max_size=8)), max_size=20).map(b"".join)


@given(raw=st.one_of(st.binary(max_size=300), _MIXED), cut=st.integers(0, 300))
@examples(max_examples=100, suppress_health_check=list(HealthCheck))
def test_any_bytes(one: Gateway, raw: bytes, cut: int) -> None:
    with Raw(one) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.send(raw[:cut], raw[cut:])
        with contextlib.suppress(OSError):
            wire.socket.shutdown(socket.SHUT_WR)
        got = wire.rest()
    assert not got or re.match(rb"HTTP/1\.1 \d\d\d ", got)
    with Raw(one) as wire:
        wire.send(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
        assert wire.answer("GET").status == 200


# --- the end


def test_two_hundred_streams_end_before_the_process(gateway: StartGateway) -> None:
    count, tokens = 200, 30
    with FakeBackend(tokens=tokens, hold="mid") as backend:
        config = settings(backend.url)
        config["server"]["drain_s"] = LONG_S
        one = gateway(config)
        host, _, port = one.address.rpartition(":")

        async def stream(begun: asyncio.Semaphore) -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(chat(stream=True))
            raw = await reader.readuntil(b"\n\n")
            begun.release()
            raw += await reader.read()
            writer.close()
            return raw

        async def all_of_them() -> list[bytes]:
            begun = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(stream(begun)) for _ in range(count)]
            for _ in range(count):
                await begun.acquire()
            one.terminate()
            refused = False
            while not refused and not all(task.done() for task in tasks):
                try:
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.close()
                    await asyncio.sleep(0.02)
                except ConnectionRefusedError:
                    refused = True
                except ConnectionResetError:
                    # Reached the listener as it closed; the next one does not.
                    continue
            assert refused and not any(task.done() for task in tasks)
            await asyncio.to_thread(backend.release)
            return await asyncio.gather(*tasks)

        answers = asyncio.run(asyncio.wait_for(all_of_them(), 100))
        assert one.process.wait(LONG_S) == 0
    for raw in answers:
        assert raw.startswith(b"HTTP/1.1 200") and raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert len(re.findall(rb'"content":"[^"]', raw)) == tokens
    assert sum(line["success"] for line in one.requests()) == count
    assert one.errors == []
