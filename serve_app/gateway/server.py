"""The process: two listening sockets (public and admin), signals, and an end that lets open requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .admin import Admin
from .app import Gateway
from .policy import Policy
from .runtime import Runtime

#: Names and values of a request's headers, with its target: more is refused with 431, as proxies do.
MAX_HEADER_BYTES = 32 * 1024
#: Seconds in which a request's headers have to arrive, on a new connection and on one that is kept alive.
HEADER_TIMEOUT_S = 20.0
#: Longer than the idle time of the usual load balancers (60 s), so that they close first and meet no closed connection.
KEEP_ALIVE_S = 75


class StartError(Exception):
    """The gateway cannot listen."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on a request's head: its size and the time it takes.

    httptools refuses what parsers read differently: both Content-Length and Transfer-Encoding, bare line feeds, names
    with spaces.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._expect_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEADER_BYTES:
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()
            raise ValueError("the request's head is too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._have_head()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._head_late)

    def _have_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are handled here: two of them share one process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int, what: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        raise StartError(
            f"{what}: cannot listen on {host}:{port} ({error.strerror}); choose another address or port, "
            "or end what listens there."
        ) from error


def _server(app: Any, drain_s: float) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            backlog=4096,
        )
    )


async def serve(path: Path, policy: Policy, began: float) -> None:
    """Run until SIGTERM or SIGINT, then drain. A second signal ends it at once; SIGHUP reads the configuration anew.

    Args:
        path: The configuration file.
        policy: What was read from it.
        began: `time.perf_counter()` when the process began.

    Raises:
        StartError: A port is taken, or the audit log's directory cannot be written.
    """
    settings = policy.config.server
    with (
        _listen(settings.host, settings.port, "server.port") as public,
        _listen(settings.admin_host, settings.admin_port, "server.admin_port") as inside,
    ):
        await _serve(path, policy, began, public, inside)


async def _serve(path: Path, policy: Policy, began: float, public: socket.socket, inside: socket.socket) -> None:
    settings = policy.config.server
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    runtime = Runtime(path, policy)
    await runtime.start()
    # Nothing made so far is garbage; collecting it again and again would only cost time.
    gc.collect()
    gc.freeze()
    # A request makes a few hundred objects and leaves hardly any cycles: the default looks for them twice a request.
    gc.set_threshold(50_000, 20, 20)
    main = _server(Gateway(runtime), settings.drain_s)
    admin = _server(Admin(runtime), 2)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[Any]] = set()

    def ended() -> None:
        if stop.is_set():
            main.force_exit = True
        stop.set()

    def finished(done: asyncio.Task[Any]) -> None:
        tasks.discard(done)
        done.exception()  # the reloader has told what went wrong

    def read_again() -> None:
        task = loop.create_task(runtime.reloader.now())
        tasks.add(task)
        task.add_done_callback(finished)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended)
    loop.add_signal_handler(signal.SIGHUP, read_again)
    admin_task = asyncio.create_task(admin.serve(sockets=[inside]))
    main_task = asyncio.create_task(main.serve(sockets=[public]))
    runtime.logs.info(
        "listening",
        address=_address(public),
        admin_address=_address(inside),
        policy=policy.version,
        start_ms=round((time.perf_counter() - began) * 1000),
    )
    try:
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({waiting, main_task, admin_task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        runtime.draining = True
        runtime.logs.info("draining", open=runtime.metrics.in_flight(), drain_s=settings.drain_s)
        if not main_task.done():
            await asyncio.sleep(settings.drain_delay_s)
        main.should_exit = True
        await main_task
        admin.should_exit = True
        await admin_task
    finally:
        await runtime.close()


def _address(one: socket.socket) -> str:
    host, port = one.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
