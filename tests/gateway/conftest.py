"""What the gateway's tests share: a real Redis, free ports, fake backends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from .running import Gateway, start

StartGateway = Callable[..., Gateway]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


class RedisServer:
    """A Redis of the test's own; `stop`, `start`, `kill`, `freeze` and `thaw` are its faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
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
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                if self.command("PING").startswith(b"+PONG"):
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as a restart would; nothing is saved."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def freeze(self) -> None:
        """Stop it from answering while its connections stay open, as behind a partition."""
        assert self.process is not None
        os.kill(self.process.pid, 19)

    def thaw(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, 18)


@pytest.fixture(scope="session")
def redis_program() -> str:
    """redis-server; installed from Debian's packages where root may do so."""
    if not shutil.which("redis-server") and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "redis-server"]):
            subprocess.run(["apt-get", *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    found = shutil.which("redis-server")
    if not found:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    return found


@pytest.fixture(scope="session")
def shared_redis(redis_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


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
    server.thaw()
    server.stop()


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
