"""What a backend gets, and what becomes of its answer, whole or broken."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.gateway.config import Backend, Config, Route, Target, Timeouts
from serve_app.gateway.errors import BackendFailed, BackendTimeout, InvalidRequest
from serve_app.gateway.health import Health
from serve_app.gateway.upstream import Failure, Pool, outcome_of

from .fake_backend import FakeBackend
from .routed import LIMIT, QUICK, routed, run, settings
from .waiting import until

STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def backend(server: FakeBackend) -> FakeBackend:
    server.reset()
    return server


def header(*pairs: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), *((name.encode(), value.encode()) for name, value in pairs)]


def pool(**fields: Any) -> Pool:
    made = Backend(**{"url": "http://127.0.0.1:9/", **fields})
    return Pool("one", made, Health(made.health), lambda *_: None)


def test_body_and_headers_arrive_to_the_byte(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            text = b'{ "model":"m",\n"messages":[{"role":"user","content":"caf\\u00e9 \xc3\xa9"}] }'
            await it.ask(
                body=None, headers=header(("x-custom", "é1")), query=b"a=1&b=%20", **{"decoded": {"model": "m"}}
            )
            call = it.call(headers=header(("x-custom", "1")))
            call.body = text
            answer = await it.router.open(call)
            await answer.close()

    run(main())
    first, second = backend.seen("/v1/chat")
    assert first["query"] == "a=1&b=%20"
    assert base64.b64decode(second["body_base64"]).startswith(b'{ "model":"m",\n')
    names = [name for name, _ in second["headers"]]
    # What a caller did not send is not made up, except that the answer must not be compressed.
    assert sorted(names) == ["accept-encoding", "content-length", "content-type", "host", "x-custom"]
    assert dict(second["headers"])["accept-encoding"] == "identity"


def test_the_backends_own_headers_and_key_win(backend: FakeBackend, tmp_path: Path) -> None:
    async def main() -> None:
        secret = tmp_path / "key"
        secret.write_text("first\n")
        config = settings({"one": backend.url}, api_key_file=str(secret), headers={"X-Team": "a"})
        async with routed(config) as it:
            headers = header(("authorization", "Bearer stolen"), ("x-team", "b"))
            await it.ask(headers=headers)
            secret.write_text("second one\n")
            it.router._pools["one"].read_key()
            await it.ask(headers=headers)
            secret.unlink()
            it.router._pools["one"].read_key()
            await it.ask(headers=headers)

    run(main())
    keys = [dict(one["headers"])["authorization"] for one in backend.seen("/v1/chat")]
    assert keys == ["Bearer first", "Bearer second one", "Bearer second one"]
    assert [value for name, value in backend.seen("/v1/chat")[0]["headers"] if name == "x-team"] == ["a"]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:
    monkeypatch.setitem(os.environ, "FAKE_KEY", "from-env")

    async def main() -> None:
        async with routed(settings({"one": backend.url}, api_key_env="FAKE_KEY")) as it:
            await it.ask()

    run(main())
    assert dict(backend.seen("/v1/chat")[0]["headers"])["authorization"] == "Bearer from-env"


def test_the_key_may_go_into_a_header_of_its_own(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:
    monkeypatch.setitem(os.environ, "FAKE_KEY", "from-env")

    async def main() -> None:
        async with routed(settings({"one": backend.url}, api_key_env="FAKE_KEY", api_key_header="Api-Key")) as it:
            await it.ask(headers=header(("api-key", "stolen")))

    run(main())
    seen = backend.seen("/v1/chat")[0]["headers"]
    assert [value for name, value in seen if name == "api-key"] == ["from-env"]
    assert "authorization" not in dict(seen)


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_large_bodies(backend: FakeBackend, size: int) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            answer, body = await it.ask({"messages": [{"role": "user", "content": "x" * size}]})
            assert answer.status == 200
            assert json.loads(body)["usage"]["prompt_tokens"] == 1

    run(main())
    assert backend.seen("/v1/chat")[0]["body_length"] > size


@pytest.mark.parametrize("split", [0, 1, 5, -1])
def test_streams_arrive_to_the_byte(backend: FakeBackend, split: int) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            _, whole = await it.ask(STREAM)
            answer = await it.router.open(it.call(STREAM, headers=header(("x-fake-split", str(split)))))
            pieces = [piece async for piece in answer.pieces()]
            await answer.close()
            assert b"".join(pieces) == whole
            assert all(pieces)
            assert whole.endswith(b"data: [DONE]\n\n")
            assert it.metric("backend_requests_total", outcome="ok") == 2
            assert it.metric("backend_in_flight") == 0

    run(main())


def test_connections_are_kept_and_bounded(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url}, keepalive=2)) as it:
            before = backend.generated()["accepted"]
            for _ in range(5):
                await it.ask()
            # One for the questions of this test each time.
            assert backend.generated()["accepted"] - before == 2
            await asyncio.gather(*(it.ask(headers=header(("x-fake-latency-s", "0.2"))) for _ in range(6)))
            counts = await asyncio.to_thread(backend.wait, lambda got: got["connections"] <= 2)
            assert counts["connections"] == 2

    run(main())


def test_connections_at_most(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url}, max_connections=2)) as it:
            slow = header(("x-fake-latency-s", "0.1"))
            answers = await asyncio.gather(*(it.ask(headers=slow) for _ in range(6)))
            assert [answer.status for answer, _ in answers] == [200] * 6
            assert backend.generated()["connections"] <= 2

    run(main())


def test_closing_an_answer_stops_the_backend(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            endless = header(("x-fake-tokens", "100000"), ("x-fake-token-s", "0.01"))
            answer = await it.router.open(it.call(STREAM, headers=endless))
            async for _ in answer.pieces():
                break
            await answer.close()
            await answer.close()
            await asyncio.to_thread(backend.wait, lambda counts: counts["active"] == 0)
            assert it.metric("backend_requests_total", outcome="aborted") == 1
            assert it.metric("backend_in_flight") == 0

    run(main())
    assert backend.generated()["output_tokens"] < 1000


@pytest.mark.parametrize("knobs", [{"x-fake-hang": "before"}, {"x-fake-hang": "headers"}])
def test_cancelling_before_the_first_byte_stops_the_backend(backend: FakeBackend, knobs: dict[str, str]) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            task = asyncio.ensure_future(it.router.open(it.call(STREAM, headers=header(*knobs.items()))))
            await asyncio.to_thread(backend.wait, lambda counts: counts["active"] == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(backend.wait, lambda counts: counts["active"] == 0)
            assert it.metric("backend_requests_total", outcome="aborted") == 1
            assert it.metric("backend_in_flight") == 0

    run(main())


@pytest.mark.parametrize("fault", [("x-fake-die", "mid"), ("x-fake-garbage", "chunk"), ("x-fake-garbage", "length")])
def test_a_stream_that_breaks(backend: FakeBackend, fault: tuple[str, str]) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            answer = await it.router.open(it.call(STREAM, headers=header(fault, ("x-fake-token-s", "0.05"))))
            got = b""
            with pytest.raises(BackendFailed, match="in the middle of its answer"):
                async for piece in answer.pieces():
                    got += piece
            await answer.close()
            assert got.count(b'"content":') == 3
            assert it.metric("backend_requests_total", outcome="broken") == 1
            assert it.state("one")["failures"] == 1

    run(main())
    # What a caller has begun to read is not asked for again.
    assert len(backend.seen("/v1/chat")) == 1


@pytest.mark.parametrize("fault", [("x-fake-die", "mid"), ("x-fake-garbage", "length")])
def test_an_answer_that_breaks(backend: FakeBackend, fault: tuple[str, str]) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            with pytest.raises(BackendFailed):
                await it.ask(headers=header(fault))
            assert it.metric("backend_in_flight") == 0

    run(main())


def test_time_out_between_tokens(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url}, timeouts={"one": Timeouts(between_tokens_s=0.2)})) as it:
            answer = await it.router.open(it.call(STREAM, headers=header(("x-fake-hang", "mid"))))
            with pytest.raises(BackendTimeout, match=r"nothing for 0\.2 s"):
                await answer.read(LIMIT)
            await answer.close()
            await asyncio.to_thread(backend.wait, lambda counts: counts["active"] == 0)
            assert it.metric("backend_requests_total", outcome="timeout") == 1

    run(main())


def test_slow_tokens_are_no_time_out(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url}, timeouts={"one": Timeouts(between_tokens_s=2)})) as it:
            _, body = await it.ask(STREAM, headers=header(("x-fake-token-s", "0.1"), ("x-fake-tokens", "24")))
            assert body.endswith(b"[DONE]\n\n")

    run(main())


def test_a_slow_reader_has_the_time_of_all_answers(backend: FakeBackend) -> None:
    async def main() -> None:
        timeouts = {"one": Timeouts(total_s=0.5, between_tokens_s=30)}
        async with routed(settings({"one": backend.url}, timeouts=timeouts)) as it:
            endless = header(("x-fake-token-s", "0.001"), ("x-fake-tokens", "100000"))
            answer = await it.router.open(it.call(STREAM, headers=endless))
            with pytest.raises(BackendTimeout, match=r"longer than 0\.5 s"):
                async for _ in answer.pieces():
                    await asyncio.sleep(0.05)
            await answer.close()
            assert it.metric("backend_requests_total", outcome="timeout") == 1

    run(main())


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
def test_a_connection_that_was_closed_when_it_was_used_again(method: str) -> None:
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        for number in (1, 2):
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            if number == 1:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            one = pool(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")

            async def ask() -> bytes:
                head = one.head(method, "/v1/files/1", b"", [], 0)
                answer = await one.send(head, b"", asyncio.get_running_loop().time())
                return await answer.read(LIMIT)

            assert await ask() == b"ok"
            if method == "POST":
                with pytest.raises(Failure, match="broken"):
                    await ask()
            else:
                assert await ask() == b"ok"
            assert asked == (2 if method == "POST" else 3)
            assert one.in_flight == 0
            await one.close()

    run(main())


def test_a_slow_reader_is_not_the_backends_fault(backend: FakeBackend) -> None:
    async def main() -> None:
        timeouts = {"one": Timeouts(between_tokens_s=0.2)}
        async with routed(settings({"one": backend.url}, timeouts=timeouts)) as it:
            answer = await it.router.open(it.call(STREAM, headers=header(("x-fake-hold", "mid"))))
            pieces = answer.pieces()
            got = b""
            while got.count(b'"content":"') < 3:
                got += await anext(pieces)
            # All is there before the reader comes back.
            await asyncio.sleep(0.5)
            await asyncio.to_thread(backend.release)
            await asyncio.to_thread(backend.wait, lambda counts: counts["active"] == 0)
            await asyncio.sleep(0.1)
            async for piece in pieces:
                got += piece
            await answer.close()
            assert got.endswith(b"[DONE]\n\n")

    run(main())


def test_time_out_in_all(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url}, timeouts={"one": Timeouts(total_s=1)})) as it:
            slow = header(("x-fake-token-s", "0.05"), ("x-fake-tokens", "1000"))
            answer = await it.router.open(it.call(STREAM, headers=slow))
            with pytest.raises(BackendTimeout, match=r"longer than 1 s"):
                await answer.read(LIMIT)
            await answer.close()

    run(main())


def test_too_large_an_answer_is_not_read_to_its_end(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            answer = await it.router.open(it.call(STREAM, headers=header(("x-fake-tokens", "100000"))))
            with pytest.raises(BackendFailed, match="more than 5000 bytes"):
                await answer.read(5000)
            await answer.close()
            small = await it.router.open(it.call())
            with pytest.raises(BackendFailed, match="more than 10 bytes"):
                await small.read(10)
            await small.close()
            await asyncio.to_thread(backend.wait, lambda counts: counts["active"] == 0)

    run(main())


def test_hop_by_hop_headers_end_here(backend: FakeBackend) -> None:
    async def main() -> None:
        backend.control(
            headers={"Keep-Alive": "5", "X-Kept": "yes", "Connection": "X-Named, keep-alive", "X-Named": "no"}
        )
        async with routed(settings({"one": backend.url})) as it:
            answer, _ = await it.ask()
            names = [name for name, _ in answer.headers]
            assert b"x-kept" in names
            assert answer.header(b"x-kept") == b"yes"
            assert answer.header(b"absent") == b""
            assert not {b"keep-alive", b"connection", b"x-named", b"transfer-encoding"} & set(names)

    run(main())


def test_redirects_are_not_followed(backend: FakeBackend) -> None:
    async def main() -> None:
        backend.control(status=302, headers={"Location": "http://169.254.169.254/latest"})
        async with routed(settings({"one": backend.url}, {"retries": 0})) as it:
            with pytest.raises(BackendFailed, match="redirect"):
                await it.ask()

    run(main())


def test_audio_and_get(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            answer, body = await it.ask(path="/v1/files", method="GET", body=None, **{"decoded": None})
            assert answer.status == 200
            assert json.loads(body)["object"] == "list"

    run(main())


@pytest.mark.parametrize("path", ["/v1/files/../../metrics", "/v1/./files", "v1/files", "/v1/files/.."])
def test_paths_do_not_go_upwards(path: str) -> None:
    with pytest.raises(InvalidRequest, match="path"):
        pool().target(path)


def test_paths_and_queries_are_encoded() -> None:
    one = pool(url="http://10.0.0.1:8000/base/")
    assert one.target("/v1/files/a b%2e\r\nx?y#z") == b"/base/v1/files/a%20b%252e%0D%0Ax%3Fy%23z"
    assert one.target("/v1/models", b"limit=1&x=%41") == b"/base/v1/models?limit=1&x=%41"
    for query in (b"a b", b"a#b", b"a\r\nb", b"\xff"):
        with pytest.raises(InvalidRequest, match="query"):
            one.target("/v1/models", query)


@pytest.mark.parametrize("fault", [b"zz\r\nnot a chunk\r\n", b""], ids=["garbage", "gone"])
def test_what_came_before_a_fault_is_read_by_a_reader_that_is_late(fault: bytes) -> None:
    more = asyncio.Event()
    pieces: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await more.wait()
        writer.write(b"3\r\ntwo\r\n" + fault)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            one = pool(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            head = one.head("GET", "/v1/models", b"", [], 0)
            answer = await one.send(head, b"", asyncio.get_running_loop().time())
            more.set()
            await until(lambda: len(one.connections) == 0)
            with pytest.raises(BackendFailed, match="broke off"):
                async for piece in answer.pieces():
                    pieces.append(piece)  # noqa: PERF401 - what came before the error counts
            await one.close()

    run(main())
    assert pieces == [b"one", b"two"]


def test_nothing_becomes_a_header_of_its_own(tmp_path: Path) -> None:
    one = pool(headers={"X-Team": "a"})
    for value in (b"a\r\nx-evil: 1", b"a\nb", b"a\rb", b"a\0"):
        for headers in ([(b"x-one", value)], [(b"x-team", b"b"), (b"accept", b"*/*"), (b"x-one", value)]):
            with pytest.raises(InvalidRequest, match="header"):
                one.head("GET", "/v1/models", b"", headers, 0)
    secret = tmp_path / "key"
    secret.write_text("good\r\nx-evil: 1")
    assert b"evil" not in pool(api_key_file=str(secret)).head("GET", "/v1/models", b"", [], 0)


@pytest.mark.parametrize(
    ("method", "length", "told"), [("GET", 0, False), ("DELETE", 0, False), ("POST", 0, True), ("POST", 5, True)]
)
def test_the_length_of_a_body_is_told(method: str, length: int, told: bool) -> None:
    head = pool(url="http://engine:1").head(method, "/v1/files", b"", [], length)
    assert (b"content-length: %d\r\n" % length in head) is told
    assert head.startswith(b"%s /v1/files HTTP/1.1\r\nhost: engine:1\r\n" % method.encode())
    assert head.endswith(b"\r\n\r\n")


def test_callers_cannot_fill_the_memory_with_paths() -> None:
    one = pool()
    for number in range(2000):
        one.head("GET", f"/v1/files/{number}", b"", [], 0)
    assert len(one._heads) < 1000


def test_tls_settings(tmp_path: Path) -> None:
    assert pool().tls().verify_mode is ssl.CERT_REQUIRED
    assert pool(verify_tls=False).tls().verify_mode is ssl.CERT_NONE
    with pytest.raises(OSError, match="No such file"):
        pool(verify_tls=str(tmp_path / "absent.pem")).tls()


def test_a_missing_ca_file_is_a_failed_backend(backend: FakeBackend, tmp_path: Path) -> None:
    async def main() -> None:
        url = backend.url.replace("http:", "https:")
        async with routed(settings({"one": url}, {"retries": 0}, verify_tls=str(tmp_path / "absent"))) as it:
            with pytest.raises(BackendFailed):
                await it.ask()
            assert it.metric("backend_in_flight") == 0

    run(main())


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (302, "ok"), (400, "client_error"), (429, "limited"), (500, "error"), (503, "error")],
)
def test_outcome_of(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome


def test_an_old_backend_ends_with_its_last_request(backend: FakeBackend) -> None:
    async def main() -> None:
        async with routed(settings({"one": backend.url})) as it:
            slow = header(("x-fake-token-s", "0.05"))
            answer = await it.router.open(it.call(STREAM, headers=slow))
            old = it.router._pools["one"]
            it.router.configure(
                type(it)(
                    Config(
                        backends={"one": Backend(url=backend.url, keepalive=1, health=QUICK)},
                        routes={"m": Route(backends=[Target(backend="one")])},
                    )
                )
            )
            assert it.router._pools["one"] is not old
            assert old in it.router._retired
            assert (await answer.read(LIMIT)).endswith(b"[DONE]\n\n")
            await until(lambda: not it.router._retired and len(old.connections) == 0)

    run(main())
