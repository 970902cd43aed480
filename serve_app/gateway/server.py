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

from .admin import Admin
from .app import Gateway
from .policy import Policy
from .runtime import Runtime
from .wire import Bounds, bounded


class StartError(Exception):
    """The gateway cannot listen."""


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


def _server(app: Any, drain_s: float, keep_alive_s: float, bounds: Bounds) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=bounded(bounds),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=max(1, round(keep_alive_s)),
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

    def dropped(client: str, unsent: int) -> None:
        runtime.logs.info("dropped a client that takes nothing of its answer", address=client, unsent_bytes=unsent)

    bounds = Bounds(settings.client_head_timeout_s, settings.client_write_timeout_s, dropped)
    main = _server(Gateway(runtime), settings.drain_s, settings.keep_alive_s, bounds)
    admin = _server(Admin(runtime), 2, settings.keep_alive_s, bounds)
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
