"""What the gateway's tests share: a real Redis, free ports, fake backends."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from rayplane_local.shell import DIE_WITH_PARENT

from serve_app.gateway import client, dynamic, store

from .ports import reserve
from .running import Gateway, start
from .waiting import LONG_S, wait_until

# The same examples in every run, and as much time as the machine needs; `--hypothesis-profile default` looks further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

StartGateway = Callable[..., Gateway]


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """In this process, what is looked at now and then is looked at often, and no connection is idle for too long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "HEARTBEAT_S", 0.2)
        patch.setattr(store, "RETRY_MOST_S", 0.1)
        patch.setattr(dynamic, "POLL_S", 0.05)
        patch.setattr(client, "KEEP_ALIVE_S", 600)
        yield


@pytest.fixture
def port() -> Iterator[Callable[[], int]]:
    """Ports of this test's own, where nobody listens unless the test starts somebody."""
    with ExitStack() as held:
        yield lambda: int(held.enter_context(reserve()).getsockname()[1])


REDIS = ("redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")


class RedisServer:
    """A Redis of the test's own; `stop`, `start`, `kill`, `freeze` and `thaw` are its faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held = reserve()
        self.port: int = self._held.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self, *words: str) -> bytes:
        """Send one command in the inline protocol and give the first reply line."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as one:
            one.sendall(" ".join(words).encode() + b"\r\n")
            return one.recv(65536)

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.process = subprocess.Popen(
            [*DIE_WITH_PARENT, *REDIS, "--port", str(self.port)],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers, "redis-server answers", lambda: self.process and self.process.poll())

    def _answers(self) -> bool:
        try:
            return self.command("PING").startswith(b"+PONG")
        except OSError:
            return False

    def stop(self) -> None:
        """End it as a restart would; nothing is saved."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(LONG_S)

    def freeze(self) -> None:
        """Stop it from answering while its connections stay open, as behind a partition."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # It runs on for a moment on another core.
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it for good."""
        self.thaw()
        self.stop()
        self._held.close()


@pytest.fixture(scope="session")
def redis_program() -> str:
    """redis-server; installed from Debian's packages where root may do so."""
    if not shutil.which("redis-server") and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        with (Path(tempfile.gettempdir()) / "rayplane-redis-server.lock").open("w") as lock:
            # Of several test processes one installs; the others then find it installed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "redis-server"]):
                if not shutil.which("redis-server"):
                    subprocess.run(["apt-get", *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    found = shutil.which("redis-server")
    if not found:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    return found


@pytest.fixture(scope="session")
def shared_redis(redis_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """An empty Redis that the tests of this run share."""
    shared_redis.command("FLUSHALL")
    return shared_redis.url


@pytest.fixture
def redis_server(redis_program: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test alone, which it may stop, start, freeze and thaw."""
    server = RedisServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[StartGateway]:
    """Start gateways: `gateway(settings(backend.url, redis_url))`. They end with the test."""
    made: list[Gateway] = []

    def make(config: dict[str, Any], environment: Mapping[str, str] | None = None, *, wait: bool = True) -> Gateway:
        one = start(tmp_path / f"gateway-{len(made)}.json", config, environment, wait=wait)
        made.append(one)
        return one

    yield make
    for one in made:
        one.stop()
