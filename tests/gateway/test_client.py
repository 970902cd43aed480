"""The HTTP/1.1 client: framing, connections that are kept, faults; servers here say what the test tells them."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import client
from serve_app.gateway.client import BrokenError, ClientError, ConnectError, Connections, GarbageError, Response

from .ports import reserve
from .routed import run
from .waiting import LONG_S, until

HEAD = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
ENDLESS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def insecure() -> ssl.SSLContext:
    raise AssertionError("no TLS here")


class Server:
    """A server on a free port of the loopback; `talk` is one connection's conversation."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.accepted = 0
        self.open = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        try:
            await self.talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


def saying(*answers: bytes) -> Talk:
    """Each request gets the next answer; the last one ends the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    return talk


def after(seconds: float) -> Talk:
    """Every request gets the same, so much later."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(seconds)
            writer.write(OK)

    return talk


always = after(0)


@asynccontextmanager
async def serving(talk: Talk, **fields: Any) -> AsyncIterator[tuple[Server, Connections]]:
    server = Server(talk)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=fields.pop("ssl", None))
    server.port = listening.sockets[0].getsockname()[1]
    scheme = fields.pop("scheme", "http")
    given: dict[str, Any] = {"tls": insecure, "idle": 8, **fields}
    connections = Connections(f"{scheme}://127.0.0.1:{server.port}", **given)
    try:
        yield server, connections
    finally:
        listening.close()
        await connections.close()
        assert len(connections) == 0


async def ask(connections: Connections, head: bytes = HEAD, body: bytes = b"") -> Response:
    connection = connections.kept() or await connections.open()
    return connection.send(head, body)


async def whole(response: Response) -> bytes:
    pieces = [await response.first()]
    while not response.over:
        pieces.append(await response.piece())
    return b"".join(pieces)


# --- answers

FRAMES = {
    "length": (OK, b"ok"),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;name=value\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"ok",
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Evil: 1\r\n\r\n",
        b"ok",
    ),
    "announced": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK, b"ok"),
    "empty": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
}


@pytest.mark.parametrize(("answer", "body"), FRAMES.values(), ids=FRAMES)
def test_framing_and_reuse(answer: bytes, body: bytes) -> None:
    async def main() -> None:
        async with serving(saying(answer, answer, answer)) as (server, connections):
            for _ in range(3):
                response = await ask(connections)
                assert await whole(response) == body
                assert response.status in (200, 204)
                names = [name for name, _ in response.headers]
                assert b"x-evil" not in names
                assert b"link" not in names
                assert all(name == name.lower() for name in names)
            assert server.accepted == 1

    run(main())


@given(cuts=st.sets(st.integers(1, 400), max_size=30), name=st.sampled_from(sorted(FRAMES)))
def test_answers_do_not_depend_on_how_they_are_cut(cuts: set[int], name: str) -> None:
    answer, body = FRAMES[name]
    places = sorted(cut for cut in cuts if cut < len(answer))

    class Deaf:
        def give_back(self, connection: client.Connection) -> None:
            self.kept = connection

        def lost(self, connection: client.Connection) -> None:
            raise AssertionError

    class Transport:
        def write(self, data: bytes) -> None: ...

        def is_closing(self) -> bool:
            return False

        def get_write_buffer_size(self) -> int:
            return 0

    owner: Any = Deaf()
    transport: Any = Transport()
    connection = client.Connection(owner)
    connection.connection_made(transport)
    for _ in range(2):
        response = connection.send(HEAD, b"")
        got = b""
        for begin, end in zip([0, *places], [*places, len(answer)], strict=True):
            connection.data_received(answer[begin:end])
            got += response.take()
        assert response.over
        assert got == body
        assert owner.kept is connection


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n\r\nall there is", b"HTTP/1.0 200 OK\r\n\r\nall there is"],
)
def test_a_body_without_a_length_ends_with_the_connection(answer: bytes) -> None:
    async def main() -> None:
        async with serving(saying(answer)) as (server, connections):
            for number in (1, 2):
                assert await whole(await ask(connections)) == b"all there is"
                assert server.accepted == number

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        OK + OK,
        OK + b"not asked for",
        OK + b"\x00\x00",
    ],
    ids=["close", "old", "two", "words", "bytes"],
)
def test_connections_that_are_not_used_again(answer: bytes) -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()

    async def main() -> None:
        async with serving(hold) as (server, connections):
            for number in (1, 2, 3):
                response = await ask(connections)
                assert await whole(response) == b"ok"
                assert response.headers[-1] == (b"content-length", b"2")
                assert server.accepted == number
            await until(lambda: server.open == 0)

    run(main())


def test_what_comes_without_a_question_ends_the_connection() -> None:
    read = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        await read.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison")
        await reader.read()

    async def main() -> None:
        async with serving(talk) as (server, connections):
            assert await whole(await ask(connections)) == b"ok"
            assert len(connections) == 1
            read.set()
            await until(lambda: len(connections) == 0)
            assert await whole(await ask(connections)) == b"ok"
            assert server.accepted == 2

    run(main())


# --- faults


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nno chunk\r\n",
        b"HTTP/1.1 099 Odd\r\ncontent-length: 3\r\n\r\nbad" + OK,
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;x=" + b"a" * 200_000,
        ENDLESS + b"0\r\n" + b"x: y\r\n" * 50_000,
    ],
    ids=["ssh", "tls", "negative", "lengths", "both", "chunk", "status", "upgrade", "head", "extension", "trailers"],
)
def test_garbage(answer: bytes) -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()

    async def main() -> None:
        async with serving(hold) as (server, connections):
            response = await ask(connections)
            with pytest.raises(GarbageError):
                await whole(response)
            assert response.take() == b""
            await until(lambda: server.open == 0)
            assert len(connections) == 0

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
        ENDLESS + b"2\r\nok\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_a_connection_that_ends_too_early(answer: bytes) -> None:
    async def main() -> None:
        async with serving(saying(answer)) as (_, connections):
            response = await ask(connections)
            with pytest.raises(BrokenError):
                await whole(response)

    run(main())


def test_what_came_before_the_end_is_read_first() -> None:
    more = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ENDLESS + b"3\r\none\r\n")
        await more.wait()
        writer.write(b"3\r\ntwo\r\n")

    async def main() -> None:
        async with serving(talk) as (server, connections):
            response = await ask(connections)
            assert await response.first() == b"one"
            more.set()
            await until(lambda: server.open == 0 and len(connections) == 0)
            assert await response.piece() == b"two"
            for _ in range(2):
                with pytest.raises(BrokenError):
                    await response.piece()

    run(main())


@pytest.mark.parametrize("ends", ["late", "closed"])
def test_a_body_without_a_length_that_is_cut_here_is_not_whole(ends: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await reader.read()

    async def main() -> None:
        async with serving(talk) as (_, connections):
            response = await ask(connections)
            assert await response.first() == b"half"
            reading = asyncio.ensure_future(response.piece())
            await asyncio.sleep(0)
            if ends == "late":
                response.fail(TimeoutError("late"))
            else:
                await connections.close()
            with pytest.raises((TimeoutError, BrokenError)):
                await reading
            assert not response.complete

    run(main())


def test_a_reader_who_goes_ends_the_connection() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ENDLESS)
        while True:
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def main() -> None:
        async with serving(endless) as (server, connections):
            response = await ask(connections)
            await response.first()
            response.close()
            response.close()
            await until(lambda: server.open == 0)
            response = await ask(connections)
            await response.first()
            response.fail(TimeoutError("late"))
            with pytest.raises((TimeoutError, BrokenError), match="late"):
                while True:
                    await response.piece()
            await until(lambda: server.open == 0)

    run(main())


def test_a_server_that_is_quicker_than_its_reader_is_held_up() -> None:
    sent = 0
    size = 1 << 16

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (size * 1000))
        for _ in range(1000):
            writer.write(b"x" * size)
            await writer.drain()
            sent += size

    async def main() -> None:
        async with serving(talk) as (_, connections):
            response = await ask(connections)
            got = len(await response.first())
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.3)
            # What the kernel's buffers on both sides take, and no more.
            assert sent < 30 << 20
            while not response.over:
                got += len(await response.piece())
            assert got == size * 1000

    run(main())


def test_an_answer_before_the_request_was_sent() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        await asyncio.Event().wait()

    async def main() -> None:
        async with serving(talk) as (server, connections):
            size = 64 << 20
            head = b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % size
            response = await ask(connections, head, b"x" * size)
            assert (await whole(response), response.status) == (b"big", 413)
            # The rest of the body would be the next request.
            assert connections.kept() is None
            await until(lambda: len(connections) == 0)
            assert server.accepted == 1

    run(main())


@pytest.mark.parametrize("size", [0, 10, 100_000, 5_000_000])
def test_bodies_arrive(size: int) -> None:
    got = b""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        got = await reader.readexactly(size)
        writer.write(OK)

    async def main() -> None:
        async with serving(talk) as (_, connections):
            body = bytes(range(256)) * (size // 256) + b"y" * (size % 256)
            assert await whole(await ask(connections, HEAD, body)) == b"ok"
            assert got == body

    run(main())


# --- connections


def test_idle_connections_are_closed_before_the_server_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(always) as (server, connections):
            both = [await ask(connections) for _ in range(2)]
            for one in both:
                await whole(one)
            assert len(connections) == 2
            assert await whole(await ask(connections)) == b"ok"
            assert server.accepted == 2
            # The one that was not used goes first.
            unused, used = connections._idle
            unused.idle_since -= client.KEEP_ALIVE_S
            connections._sweep()
            assert list(connections._idle) == [used]
            used.idle_since -= client.KEEP_ALIVE_S
            assert connections.kept() is None
            await until(lambda: server.open == 0)
            assert await whole(await ask(connections)) == b"ok"
            assert server.accepted == 3
        monkeypatch.setattr(client, "KEEP_ALIVE_S", 0.05)
        async with serving(always) as (server, connections):
            await whole(await ask(connections))
            # By itself.
            await until(lambda: server.open == 0)
            assert len(connections) == 0

    run(main())


def test_one_that_has_been_idle_for_too_long_is_not_used_though_the_loop_was_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "KEEP_ALIVE_S", 0.1)

    async def main() -> None:
        async with serving(always) as (_, connections):
            await whole(await ask(connections))
            time.sleep(0.15)
            assert connections.kept() is None

    run(main())


@pytest.mark.parametrize("idle", [0, 1, 3])
def test_so_many_idle_connections_are_kept(idle: int) -> None:
    async def main() -> None:
        async with serving(always, idle=idle) as (server, connections):
            for one in [await ask(connections) for _ in range(5)]:
                await whole(one)
            await until(lambda: server.open == idle)
            assert len(connections) == idle

    run(main())


def test_so_many_connections_at_most() -> None:
    async def once(connections: Connections) -> bytes:
        return await whole(await ask(connections))

    async def main() -> None:
        async with serving(after(0.002), most=3) as (server, connections):
            answers = await asyncio.gather(*(once(connections) for _ in range(60)))
            assert answers == [b"ok"] * 60
            assert server.accepted == 3

    run(main())


def test_who_waits_for_a_connection_may_go() -> None:
    async def once(connections: Connections, seconds: float) -> bytes:
        async with asyncio.timeout(seconds):
            response = await ask(connections)
            try:
                return await whole(response)
            finally:
                response.close()

    async def main() -> None:
        async with serving(after(0.005), most=2) as (server, connections):
            for _ in range(20):
                tasks = [once(connections, 0.001 * number) for number in range(20)]
                await asyncio.gather(*tasks, return_exceptions=True)
            # No place was lost on the way, and none was given twice.
            answers = await asyncio.gather(*(once(connections, LONG_S) for _ in range(20)))
            assert answers == [b"ok"] * 20
            assert len(connections) == 2
            await until(lambda: server.open == 2)
            assert connections._open == 2

    run(main())


def test_who_is_let_go_still_answers_and_keeps_nothing() -> None:
    answer = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if b"slow" in await reader.readuntil(b"\r\n\r\n"):
                await answer.wait()
            writer.write(OK)

    async def main() -> None:
        async with serving(talk) as (server, connections):
            idle, busy = await ask(connections), await ask(connections, HEAD.replace(b"/", b"/slow", 1))
            await whole(idle)
            await connections.let_go()
            await until(lambda: server.open == 1)
            answer.set()
            await whole(busy)
            await until(lambda: server.open == 0)
            assert await whole(await ask(connections)) == b"ok"
            await until(lambda: server.open == 0)
            assert len(connections) == 0

    run(main())


def test_who_waits_for_a_name_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(always) as (server, _):
            asked = 0
            known = asyncio.Event()

            async def look_up(host: str, port: int) -> list[Any]:
                nonlocal asked
                asked += 1
                await known.wait()
                if asked == 1:
                    raise OSError("no such name")
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]

            monkeypatch.setattr(client, "_look_up", look_up)
            connections = Connections("http://slow.test", tls=insecure, idle=1)
            opening = [asyncio.ensure_future(connections.open()) for _ in range(3)]
            await until(lambda: asked == 1)
            known.set()
            failed = await asyncio.gather(*opening, return_exceptions=True)
            assert [type(one) for one in failed] == [ConnectError] * 3
            assert asked == 1
            # Each waits for less than the look-up takes; together they get there.
            known.clear()
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await connections.open()
            known.set()
            assert (await connections.open()).usable
            assert asked == 2
            await connections.close()
            assert len(connections) == 0

    run(main())


def test_many_who_come_while_a_name_is_being_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(always) as (server, _):
            loop = asyncio.get_running_loop()
            found: asyncio.Future[list[Any]] = loop.create_future()

            async def look_up(host: str, port: int) -> list[Any]:
                return await found

            monkeypatch.setattr(client, "_look_up", look_up)
            connections = Connections("http://many.test", tls=insecure, idle=8)
            opening = [asyncio.ensure_future(connections.open())]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            found.set_result([(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))])
            # Some come before, some while, some after the answer is taken in.
            for _ in range(6):
                opening += [asyncio.ensure_future(connections.open()) for _ in range(5)]
                await asyncio.sleep(0)
            assert all(one.usable for one in await asyncio.gather(*opening))
            await connections.close()

    run(main())


def test_a_server_that_is_away() -> None:
    async def main() -> None:
        async with serving(always) as (_, connections):
            pass
        with reserve() as nobody:
            away = Connections(f"http://127.0.0.1:{nobody.getsockname()[1]}", tls=insecure, idle=1, most=1)
            for _ in range(3):
                with pytest.raises(ConnectError):
                    await away.open()
        for url in ("http://no.such.name.invalid", f"http://{'a' * 70}.test"):
            with pytest.raises(ConnectError):
                await Connections(url, tls=insecure, idle=1).open()
        with pytest.raises(ConnectError):
            await connections.open()

    run(main())


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="Linux has this option")
def test_a_silent_host_is_asked_for_a_sign_of_life() -> None:
    async def main() -> None:
        async with serving(always) as (_, connections):
            connection = await connections.open()
            assert connection._transport is not None
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            between = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            times = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert idle + between * times <= 60

    run(main())


def test_the_next_address_is_tried_and_all_get_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither is the next one tried because this machine is busy, nor is the name looked up again.
    monkeypatch.setattr(client, "_NEXT_ADDRESS_S", 60)
    monkeypatch.setattr(client, "_RESOLVED_S", 60)

    async def main() -> None:
        async with serving(always) as (one, _), serving(always) as (two, _):
            ports = [one.port, two.port, nobody.getsockname()[1]]
            asked = 0

            async def look_up(host: str, port: int) -> list[Any]:
                nonlocal asked
                asked += 1
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", number)) for number in ports]

            monkeypatch.setattr(client, "_look_up", look_up)
            connections = Connections("http://many.test", tls=insecure, idle=0)
            for _ in range(12):
                assert await whole(await ask(connections)) == b"ok"
            assert asked == 1
            assert one.accepted + two.accepted == 12
            assert min(one.accepted, two.accepted) >= 4

    with reserve() as nobody:
        run(main())


def test_the_host_as_the_server_is_told() -> None:
    def host(url: str) -> bytes:
        return Connections(url, tls=insecure, idle=1).host

    assert host("http://engine:8000/base") == b"engine:8000"
    assert host("https://engine") == b"engine"
    assert host("http://[::1]:80") == b"[::1]:80"
    assert host("http://bücher.example") == b"xn--bcher-kva.example"


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("engine.test")]
            ),
            False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "certificate.pem", folder / "key.pem"


def test_tls(certificate: tuple[Path, Path]) -> None:
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def main() -> None:
        fields = {"ssl": served, "scheme": "https"}
        async with serving(always, tls=lambda: trusting, **fields) as (server, connections):
            for _ in range(3):
                assert await whole(await ask(connections)) == b"ok"
            assert server.accepted == 1
            elsewhere = Connections(f"https://localhost:{server.port}", tls=lambda: trusting, idle=1)
            with pytest.raises(ConnectError, match=r"(?i)hostname|certificate"):
                await elsewhere.open()
        async with serving(always, tls=ssl.create_default_context, **fields) as (_, connections):
            with pytest.raises(ConnectError, match=r"(?i)certificate"):
                await connections.open()
            assert len(connections) == 0
        async with serving(plain, tls=lambda: trusting, scheme="https") as (_, connections):
            with pytest.raises(ConnectError):
                await connections.open()

    run(main())


def test_a_name_with_a_dot_at_its_end(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])

    async def main() -> None:
        async with serving(always, tls=insecure, ssl=served) as (server, _):
            looked: list[str] = []

            async def look_up(host: str, port: int) -> list[Any]:
                looked.append(host)
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

            monkeypatch.setattr(client, "_look_up", look_up)
            connections = Connections(f"https://engine.test.:{server.port}", tls=lambda: trusting, idle=1)
            assert connections.host == b"engine.test:%d" % server.port
            assert await whole(await ask(connections)) == b"ok"
            assert looked == ["engine.test."]
            await connections.close()

    run(main())


def test_the_end_of_a_large_answer_over_tls_is_not_lost(certificate: tuple[Path, Path]) -> None:
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])
    size, times = 700_000, 12

    def serve(listening: socket.socket) -> None:
        for _ in range(times):
            with served.wrap_socket(listening.accept()[0], server_side=True) as one:
                one.recv(4096)
                one.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size)
                one.sendall(b"x" * size)

    async def main() -> None:
        port = listening.getsockname()[1]
        connections = Connections(f"https://127.0.0.1:{port}", tls=lambda: trusting, idle=1)
        for _ in range(times):
            response = await ask(connections)
            got = len(await response.first())
            while not response.over:
                await asyncio.sleep(0.01)
                got += len(await response.piece())
            assert got == size
        await connections.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        run(main())
        thread.join(LONG_S)


def test_closing_ends_what_is_under_way() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with serving(hold) as (server, connections):
            response = await ask(connections)
            waiting = asyncio.ensure_future(response.first())
            await asyncio.sleep(0)
            await connections.close()
            with pytest.raises(ClientError):
                await waiting
            await until(lambda: server.open == 0)

    run(main())
