from __future__ import annotations

import asyncio
import contextlib
import datetime
import select
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import uvloop

from serve_app.gateway import config
from serve_app.gateway.store import Address, Store, StoreError, StoreRefusedError

from .conftest import RedisServer
from .redis_proxy import RedisProxy
from .waiting import LONG_S, until

#: Of calls that are to be answered, however busy the machine is.
PATIENT = 20_000


async def with_store(settings: config.Store, use: Callable[[Store], Awaitable[None]]) -> None:
    store = Store(settings)
    await store.start()
    try:
        await use(store)
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://redis", ("redis", 6379, 0, "", "given", "")),
        ("redis://u:p%40ss@10.0.0.1:1234/3", ("10.0.0.1", 1234, 3, "u", "p@ss", "")),
        ("redis://:secret@[::1]:7/", ("::1", 7, 0, "", "secret", "")),
        ("unix:///run/redis.sock?db=4", ("", 6379, 4, "", "given", "/run/redis.sock")),
        ("redis://h?db=5", ("h", 6379, 5, "", "given", "")),
    ],
)
def test_addresses(url: str, parts: tuple[str | int, ...]) -> None:
    address = Address(url, "given")
    found = (address.host, address.port, address.database, address.user, address.password, address.path)
    assert found == parts
    assert address.tls is None
    assert address.password not in str(address)


@pytest.mark.parametrize("url", ["http://redis", "redis://", "redis", "redis://h/zero", "redis://h:port"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValueError):
        Address(url)


def test_tls_checks_certificates_unless_told_otherwise() -> None:
    checked = Address("rediss://h").tls
    unchecked = Address("rediss://h?ssl_cert_reqs=none").tls
    assert checked is not None and checked.verify_mode == ssl.CERT_REQUIRED and checked.check_hostname
    assert unchecked is not None and unchecked.verify_mode == ssl.CERT_NONE


def test_a_local_store_needs_nothing() -> None:
    async def use(store: Store) -> None:
        assert store.local and store.available
        with pytest.raises(RuntimeError):
            _ = store.redis
        with pytest.raises(StoreError):
            await store.call("PING")

    asyncio.run(with_store(config.Store(), use))


def test_calls_in_order_and_error_replies(redis_url: str) -> None:
    async def use(store: Store) -> None:
        assert store.available
        answers = await asyncio.gather(*[store.call("INCR", "n") for _ in range(500)])
        assert answers == list(range(1, 501))
        with pytest.raises(StoreRefusedError, match="WRONGTYPE"):
            await store.call("HGET", "n", "field")
        assert await store.call("GET", "n") == b"500"
        assert await store.redis.get("n") == b"500"

    asyncio.run(with_store(config.Store(url=redis_url, timeout_ms=PATIENT), use))


def test_a_cancelled_call_does_not_shift_the_answers(redis_url: str) -> None:
    async def use(store: Store) -> None:
        task = asyncio.create_task(store.call("ECHO", "first"))
        await asyncio.sleep(0)
        task.cancel()
        assert await store.call("ECHO", "second") == b"second"
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(with_store(config.Store(url=redis_url, timeout_ms=PATIENT), use))


def test_start_with_redis_away_and_later_there(redis_server: RedisServer) -> None:
    redis_server.stop()
    states: list[bool] = []

    async def use(store: Store) -> None:
        store.on_state.append(states.append)
        assert not store.available
        with pytest.raises(StoreError):
            await store.call("PING")
        await until(lambda: store.last_error != "", "a reason is given")
        await asyncio.to_thread(redis_server.start)
        await until(lambda: store.available, "the store comes back")
        assert store.last_error == ""
        assert await store.call("PING") == b"PONG"

    asyncio.run(with_store(config.Store(url=redis_server.url), use))
    assert states == [True, False]


def test_restart(redis_server: RedisServer) -> None:
    async def use(store: Store) -> None:
        assert await store.redis.ping()
        for _ in range(3):
            redis_server.stop()
            await until(lambda: not store.available, "the loss is noticed")
            await asyncio.to_thread(redis_server.start)
            await until(lambda: store.available, "the store comes back")
            assert await store.call("PING") == b"PONG"
            assert await store.redis.ping()

    asyncio.run(with_store(config.Store(url=redis_server.url, timeout_ms=PATIENT), use))


def test_a_partition_is_noticed_without_traffic_and_calls_do_not_hang(redis_server: RedisServer) -> None:
    async def use(store: Store) -> None:
        redis_server.freeze()
        await until(lambda: not store.available, "an idle connection is watched")
        redis_server.thaw()
        await until(lambda: store.available, "the store comes back")
        redis_server.freeze()
        with pytest.raises(StoreError):
            await store.call("PING")
        assert not store.available
        redis_server.thaw()
        await until(lambda: store.available, "the store comes back")

    asyncio.run(with_store(config.Store(url=redis_server.url, timeout_ms=500), use))


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_busy_event_loop_is_no_lost_connection(redis_url: str, runner: Callable[[Awaitable[None]], None]) -> None:
    async def use(store: Store) -> None:
        await until(lambda: store.available)
        task = asyncio.create_task(store.call("ECHO", "still there"))
        await asyncio.sleep(0)
        # The loop does nothing until the time is out; by then the answer has come.
        time.sleep(0.4)
        assert store._pipe is not None and store._pipe._transport is not None
        assert select.select([store._pipe._transport.get_extra_info("socket").fileno()], [], [], LONG_S)[0]
        assert await task == b"still there"
        assert store.available

    runner(with_store(config.Store(url=redis_url, timeout_ms=300), use))


def test_an_answer_to_no_question_ends_the_connection(redis_url: str) -> None:
    async def use(store: Store) -> None:
        # Subscribed connections get messages unasked; that no such thing shifts the answers is what matters.
        states: list[bool] = []
        store.on_state.append(states.append)
        await store.call("SUBSCRIBE", "channel")
        async with contextlib.aclosing(store.redis.client()) as other:
            await other.publish("channel", "surprise")
        await until(lambda: states == [False, True], "the surprise ends the connection")
        assert await store.call("ECHO", "mine") == b"mine"

    asyncio.run(with_store(config.Store(url=redis_url, timeout_ms=PATIENT), use))


def test_something_else_listens_there() -> None:
    async def main() -> None:
        open_ = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal open_
            open_ += 1
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await reader.read()
            writer.close()
            open_ -= 1

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        async def use(store: Store) -> None:
            await until(lambda: store.last_error != "")
            assert not store.available

        await with_store(config.Store(url=f"redis://127.0.0.1:{port}/0"), use)
        server.close()
        await until(lambda: not open_)

    asyncio.run(main())


def test_password_and_database(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    redis_server.command("CONFIG", "SET", "requirepass", "sesame")
    wrong = config.Store(url=redis_server.url.replace("127", "wrong:sesam@127"))

    async def refused(store: Store) -> None:
        await until(lambda: store.last_error != "", "a wrong password is refused")
        assert not store.available
        assert "sesam" not in store.last_error

    asyncio.run(with_store(wrong, refused))

    monkeypatch.setenv("REDIS_PASSWORD", "sesame")

    async def accepted(store: Store) -> None:
        assert store.available
        await store.call("SET", "here", 1)
        assert await store.redis.get("here") == b"1"
        await store.call("SELECT", 0)
        assert await store.call("GET", "here") is None

    third = redis_server.url.replace("/0", "/3")
    asyncio.run(with_store(config.Store(url=third, timeout_ms=PATIENT, password_env="REDIS_PASSWORD"), accepted))


def test_unix_socket(redis_program: str, tmp_path: Path) -> None:
    socket = tmp_path / "r.sock"
    process = subprocess.Popen(
        [redis_program, "--port", "0", "--unixsocket", str(socket), "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )

    async def use(store: Store) -> None:
        await until(lambda: store.available, "a connection")
        assert await store.call("ECHO", "x") == b"x"

    try:
        asyncio.run(with_store(config.Store(url=f"unix://{socket}?db=1"), use))
    finally:
        process.terminate()
        process.wait(LONG_S)


def _certificate(folder: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_tls(redis_program: str, tmp_path: Path, port: Callable[[], int]) -> None:
    _certificate(tmp_path)
    number = port()
    files = ["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "cert.pem"]
    words = [redis_program, "--port", "0", "--tls-port", str(number), "--bind", "127.0.0.1", "--save", "", *files]
    process = subprocess.Popen([*words, "--tls-auth-clients", "no"], cwd=tmp_path, stdout=subprocess.DEVNULL)

    async def trusted(store: Store) -> None:
        await until(lambda: store.available, "a connection", lambda: store.last_error)
        assert await store.call("ECHO", "x") == b"x"
        assert await store.redis.ping()

    async def untrusted(store: Store) -> None:
        await until(lambda: "CERTIFICATE_VERIFY_FAILED" in store.last_error, "an unknown certificate is refused")
        assert not store.available

    try:
        asyncio.run(
            with_store(config.Store(url=f"rediss://localhost:{number}/0?ssl_ca_certs={tmp_path}/cert.pem"), trusted)
        )
        asyncio.run(with_store(config.Store(url=f"rediss://localhost:{number}/0"), untrusted))
    finally:
        process.terminate()
        process.wait(LONG_S)


def test_what_is_prepared_on_each_connection_may_refuse_it(redis_url: str) -> None:
    calls: list[str] = []

    async def main() -> None:
        store = Store(config.Store(url=redis_url, timeout_ms=PATIENT))

        async def prepare() -> None:
            calls.append("prepare")
            if len(calls) < 3:
                await store.call("NOSUCHCOMMAND")
            assert not store.available
            assert await store.call("ECHO", "usable already") == b"usable already"

        store.on_connect.append(prepare)
        await store.start()
        await until(lambda: store.available, "the store comes")
        assert len(calls) == 3
        store.reset("a test")
        assert not store.available
        await until(lambda: store.available, "the store comes back")
        assert len(calls) == 4
        await store.close()
        assert not store.available

    asyncio.run(main())


def test_close_while_connecting() -> None:
    async def main() -> None:
        served = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()
            served.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        store = Store(config.Store(url=f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", timeout_ms=50))
        await store.start()
        await store.start()
        await store.close()
        await store.close()
        server.close()
        await served.wait()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "store"]

    asyncio.run(main())


def test_no_connections_are_left_behind(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with RedisProxy(redis_server.port) as proxy:
            store = Store(config.Store(url=proxy.url, timeout_ms=PATIENT))
            await store.start()
            for number in range(2, 7):
                proxy.cut()
                await until(
                    partial(lambda wanted: proxy.connections == wanted and store.available, number), "it comes back"
                )
            # The store's, and the one that asks.
            await until(lambda: redis_server.command("CLIENT", "LIST").count(b" addr=") == 2)
            await store.close()

    asyncio.run(main())
