"""The gateway side by side with LiteLLM's proxy and vLLM's router, in front of the same backend.

    make bench-gateway
    make bench-gateway ARGS='--rounds 5 --seconds 6 --output gateway.md'

Each server gets one core of its own; the other one carries the backend (fake_openai.py), Redis and the load (load.py).
Keys and limits are switched on in ours and in LiteLLM, shared through Redis, and it is checked that they are: a wrong
key must be refused, and a key that may ask once a minute must be refused the second time. The servers are measured in
turn, round after round, each started anew: start-up until the first answer, closed loops of 1, 32 and 256 connections
with plain answers and with streams, and a steady rate below saturation. The same is asked of the backend directly;
what a server adds is the difference. A run with any answer that was an error has no figures.

The peers come from PyPI when they are first needed, each into an environment of its own under $RAYPLANE_HOME/bench; one
that cannot be had is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "bench")]

import fake_openai
import load
import reporting
from reporting import BenchError

from serve_app.gateway import keys

CONNECTIONS = (1, 32, 256)
#: Requests a second below saturation, plain and streams: what every server holds, and what only the quick ones do.
PACED = {False: (20, 500), True: (10, 100)}
#: A paced point is for servers that did so many times its rate in a closed loop.
HEADROOM = 1.5
PACED_CONNECTIONS = 64
START_SECONDS = 120.0
SETTLE_SECONDS = 30.0
#: Each connection has so many turns at least, and a steady rate so many requests, within the longest window.
TURNS = 3
PACED_REQUESTS = 100
LONGEST_WINDOW = 10.0
MODEL = fake_openai.MODEL
TOKENS = 16
UNLIMITED = 1_000_000_000


def progress(what: str) -> None:
    """Tell on stderr what is going on: the report alone goes to stdout."""
    print(f"bench: {what}", file=sys.stderr, flush=True)


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """One load: so many connections in a closed loop, or a steady rate."""

    connections: int
    stream: bool
    rate: int = 0

    def __str__(self) -> str:
        kind = "streams" if self.stream else "plain"
        return f"{kind}, {self.rate}/s" if self.rate else f"{kind}, {self.connections} connections"


@dataclasses.dataclass
class Series:
    """One server's figures: a list with one entry a round for each of them."""

    #: By point: requests a second, and milliseconds by name (`p50`, `first p99` ...).
    rates: dict[Point, list[float]] = dataclasses.field(default_factory=dict)
    times: dict[Point, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    #: By point: milliseconds of its core for a request.
    work: dict[Point, list[float]] = dataclasses.field(default_factory=dict)
    start: list[float] = dataclasses.field(default_factory=list)
    idle_mb: list[float] = dataclasses.field(default_factory=list)
    peak_mb: list[float] = dataclasses.field(default_factory=list)

    def add(self, point: Point, summary: Mapping[str, Any], cpu_s: float = 0.0) -> None:
        """Take over what load.py printed, and the processor time that the server took for it."""
        if summary["errors"]:
            raise BenchError(f"{point}: answers were errors: {summary['errors']}")
        if not summary["requests"]:
            raise BenchError(f"{point}: no request was answered")
        self.rates.setdefault(point, []).append(summary["rate"])
        times = self.times.setdefault(point, {})
        for prefix, name in (("", "latency_ms"), ("first ", "first_ms")):
            for percentile, value in summary[name].items():
                times.setdefault(prefix + percentile, []).append(value)
        if cpu_s:
            self.work.setdefault(point, []).append(cpu_s * 1000 / summary["answered"])

    def rate(self, point: Point) -> float:
        """Median of the rounds; not a number where it was not measured."""
        return median(self.rates.get(point, ()))

    def time(self, point: Point, name: str) -> float:
        """Median of the rounds, milliseconds."""
        return median(self.times.get(point, {}).get(name, ()))

    def added(self, direct: Series, point: Point, name: str) -> float:
        """What this server adds to the backend's own time, milliseconds: median of the rounds' differences."""
        pairs = zip(self.times.get(point, {}).get(name, ()), direct.times.get(point, {}).get(name, ()), strict=False)
        return median([mine - bare for mine, bare in pairs])


def median(values: Sequence[float]) -> float:
    """The median; not a number where there is none."""
    return statistics.median(values) if values else math.nan


def window(seconds: float, requests: int, rate: float) -> float:
    """How many seconds to measure so many requests of a server that does `rate` a second (0: unknown).

    A window in which connections have less than a few turns would count the luck of its edges.
    """
    wanted = requests / rate if rate > 0 else 0.0
    return max(seconds, min(wanted, LONGEST_WINDOW))


# --- servers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a server runs and what is around it."""

    folder: Path
    port: int
    spare_port: int
    backend: str
    redis_port: int
    home: Path


@dataclasses.dataclass(frozen=True)
class Credentials:
    """The load's key, and one that may ask once a minute."""

    key: str = ""
    tight: str = ""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server that is measured."""

    name: str
    #: What is switched on, for the report.
    on: str
    requirements: tuple[str, ...]
    version: Callable[[Path], str]
    command: Callable[[Place], tuple[list[str], dict[str, str], Credentials]]


def rayplane(place: Place, *, redis: bool = True, model: str = MODEL) -> tuple[list[str], dict[str, str], Credentials]:
    """Ours: a key with limits of requests, tokens and concurrency and a daily budget; one log line a request."""
    ample, tight = keys.generate(), keys.generate()
    rate = {"limit": UNLIMITED, "per": "minute"}
    limits = {"requests": rate, "tokens": rate, "concurrency": 100_000, "daily_tokens": UNLIMITED * 1000}
    config = {
        "server": {"port": place.port, "admin_port": place.spare_port},
        "store": {"url": f"redis://127.0.0.1:{place.redis_port}/0"} if redis else {},
        "roles": {
            "ample": {"models": ["*"], "limits": limits},
            "tight": {"models": ["*"], "limits": {"requests": {"limit": 1, "per": "minute"}}},
        },
        "keys": [
            {"id": "ample", "prefix": ample.prefix, "hash": ample.hash, "role": "ample"},
            {"id": "tight", "prefix": tight.prefix, "hash": tight.hash, "role": "tight"},
        ],
        "backends": {"one": {"url": place.backend}},
        "routes": {model: {"backends": [{"backend": "one"}]}},
    }
    path = place.folder / "gateway.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    environment = {"PYTHONPATH": str(PROJECT)}
    return (
        [sys.executable, "-m", "serve_app.gateway", "--config", str(path)],
        environment,
        Credentials(ample.key, tight.key),
    )


#: LiteLLM keeps keys in PostgreSQL; without one this hook is its documented way to them, and the limits that it returns
#: are enforced by the proxy's own limiter (https://docs.litellm.ai/docs/proxy/custom_auth).
LITELLM_KEYS = """
import hashlib
import json
import pathlib

from fastapi import Request
from litellm.proxy._types import ProxyException, UserAPIKeyAuth

KEYS = json.loads((pathlib.Path(__file__).parent / "keys.json").read_text())


async def find(request: Request, api_key: str) -> UserAPIKeyAuth:
    limits = KEYS.get(hashlib.sha256(api_key.encode()).hexdigest())
    if limits is None:
        raise ProxyException(message="no such key", type="auth_error", param=None, code=401)
    return UserAPIKeyAuth(api_key=api_key, **limits)
"""


def litellm(place: Place, *, redis: bool = True) -> tuple[list[str], dict[str, str], Credentials]:
    """LiteLLM's proxy with one worker: keys with limits of requests, tokens and parallel requests, counted in Redis."""
    ample, tight = "sk-" + os.urandom(16).hex(), "sk-" + os.urandom(16).hex()
    limits = {
        hashlib.sha256(ample.encode()).hexdigest(): {
            "rpm_limit": UNLIMITED,
            "tpm_limit": UNLIMITED,
            "max_parallel_requests": 100_000,
        },
        hashlib.sha256(tight.encode()).hexdigest(): {"rpm_limit": 1},
    }
    general: dict[str, Any] = {"master_key": "sk-" + os.urandom(16).hex(), "custom_auth": "bench_keys.find"}
    if redis:
        general["coordination_redis"] = {"host": "127.0.0.1", "port": place.redis_port}
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{place.backend}/v1", "api_key": "none"},
            }
        ],
        "general_settings": general,
        "litellm_settings": {"telemetry": False},
    }
    (place.folder / "keys.json").write_text(json.dumps(limits), encoding="utf-8")
    (place.folder / "bench_keys.py").write_text(LITELLM_KEYS, encoding="utf-8")
    path = place.folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    python = place.home / "litellm" / "bin"
    command = [str(python / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(place.port)]
    # Nothing is fetched at the start, and only errors are logged apart from the access log.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"}
    return command, environment, Credentials(ample, tight)


def vllm_router(place: Place) -> tuple[list[str], dict[str, str], Credentials]:
    """The Rust router of the vLLM project: it has neither keys nor limits a caller."""
    command = [
        *(str(place.home / "vllm-router" / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(place.port)),
        *("--worker-urls", place.backend, "--policy", "round_robin", "--prometheus-port", str(place.spare_port)),
    ]
    return command, {}, Credentials()


def package_version(folder: str, package: str) -> Callable[[Path], str]:
    """How to ask an environment for a package's version."""

    def ask(home: Path) -> str:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run(
            [home / folder / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    return ask


OURS, DIRECT = "rayplane", "direct"
PEERS = {
    OURS: Peer(
        OURS,
        "API keys; limits of requests, tokens, concurrency and a daily budget, in Redis; a JSON log line a request; "
        "metrics",
        (),
        lambda _home: "this tree",
        rayplane,
    ),
    "rayplane-local": Peer(
        "rayplane-local",
        "as rayplane, the limits in the process instead of Redis",
        (),
        lambda _home: "this tree",
        lambda place: rayplane(place, redis=False),
    ),
    "litellm": Peer(
        "litellm",
        "API keys by a custom_auth hook (its own store of keys needs PostgreSQL); limits of requests, tokens and "
        "parallel requests, in Redis; no budgets (PostgreSQL); access log",
        ("litellm[proxy]>=1.100",),
        package_version("litellm", "litellm"),
        litellm,
    ),
    "litellm-local": Peer(
        "litellm-local",
        "as litellm, the limits in the process instead of Redis",
        ("litellm[proxy]>=1.100",),
        package_version("litellm", "litellm"),
        lambda place: litellm(place, redis=False),
    ),
    "vllm-router": Peer(
        "vllm-router",
        "no keys, no limits: it has none by caller; access log",
        ("vllm-router",),
        package_version("vllm-router", "vllm-router"),
        vllm_router,
    ),
}


def install(home: Path, name: str, requirements: Sequence[str]) -> None:
    """Bring a peer from PyPI into an environment of its own; nothing where it is there."""
    folder = home / name.removesuffix("-local")
    mark = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if not requirements or (mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
        return
    base = home.parent
    uv = shutil.which("uv") or str(base / "uv" / "bootstrap" / "bin" / "uv")
    if not Path(uv).is_file():
        raise BenchError(f"{uv} is not there: `make bootstrap` brings it.")
    progress(f"installing {wanted} into {folder}")
    environment = {**os.environ, "UV_CACHE_DIR": str(base / "uv" / "cache"), "UV_PYTHON_DOWNLOADS": "never"}
    home.mkdir(parents=True, exist_ok=True)
    steps = (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            str(folder / "bin" / "python"),
            "--only-binary",
            ":all:",
            *requirements,
        ],
    )
    for step in steps:
        done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise BenchError(f"{wanted} cannot be installed:\n{done.stderr[-2000:]}")
    mark.write_text(wanted, encoding="utf-8")


# --- processes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pinned(core: str, command: Sequence[str | Path]) -> list[str]:
    """The command on one core, or on cores as taskset names them (`4-7`)."""
    return ["taskset", "-c", core, *(str(part) for part in command)]


@contextlib.contextmanager
def process(command: Sequence[str | Path], folder: Path, name: str, env: Mapping[str, str]) -> Iterator[Running]:
    """A process with a log; it ends with the block."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        began = time.perf_counter()
        started = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=dict(env), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield Running(started, log, began)
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@dataclasses.dataclass
class Running:
    """A started process."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def memory_mb(self) -> float:
        """Resident memory of it and its children, MB (10^6 bytes)."""
        return sum(resident(pid) for pid in family(self.process.pid)) / 1e6

    def cpu_s(self) -> float:
        """Processor time of it and its children so far, seconds."""
        return sum(processor(pid) for pid in family(self.process.pid))

    def failed(self, what: str) -> BenchError:
        """An error with the end of the log."""
        return BenchError(f"{what}:\n{self.log.read_text(errors='replace')[-3000:]}")


def resident(pid: int) -> int:
    """Resident bytes of a process; 0 when it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def processor(pid: int) -> float:
    """Processor time of a process so far, user and system, seconds; 0 when it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


@contextlib.contextmanager
def redis(folder: Path, core: str) -> Iterator[int]:
    """A Redis of the run's own, which saves nothing. Yields its port."""
    if not shutil.which("redis-server"):
        raise BenchError("redis-server is not installed (Debian: apt-get install redis-server).")
    port = free_port()
    command = pinned(core, ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no"])
    with process(command, folder, "redis", os.environ) as running:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                if redis_command(port, "PING").startswith(b"+PONG"):
                    break
            if time.monotonic() > deadline or running.process.poll() is not None:
                raise running.failed("Redis does not answer")
            time.sleep(0.05)
        yield port


def redis_command(port: int, command: str) -> bytes:
    """One inline command, and its reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(command.encode() + b"\r\n")
        return connection.recv(65536)


@contextlib.contextmanager
def backend(folder: Path, core: str, token_ms: float) -> Iterator[str]:
    """The backend. Yields its address."""
    port = free_port()
    script = PROJECT / "bench" / "fake_openai.py"
    options = ("--port", str(port), "--tokens", str(TOKENS), "--token-ms", str(token_ms))
    with process(pinned(core, [sys.executable, script, *options]), folder, "backend", os.environ) as running:
        first_answer(running, port, Credentials())
        yield f"http://127.0.0.1:{port}"


# --- single requests -------------------------------------------------------------------------------------------------


def ask(port: int, key: str, *, stream: bool = False, seconds: float = 30.0, model: str = MODEL) -> tuple[int, bytes]:
    """One request as the load makes them: status and body."""
    body = load.request(f"127.0.0.1:{port}", key, model, stream=stream).partition(b"\r\n\r\n")[2]
    return post(port, key, body, seconds)


def post(port: int, key: str, body: bytes, seconds: float = 30.0) -> tuple[int, bytes]:
    """A chat completion's status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def first_answer(running: Running, port: int, credentials: Credentials, *, model: str = MODEL) -> float:
    """Wait for the first 200; the seconds since the process was started."""
    status, why = 0, b""
    while time.perf_counter() - running.began < START_SECONDS:
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, why = ask(port, credentials.key, model=model)
            if status == 200:
                return time.perf_counter() - running.began
        if running.process.poll() is not None:
            raise running.failed("it ended at once")
        time.sleep(0.01)
    raise running.failed(f"no 200 within {START_SECONDS:.0f} s, but {status} {why[:500]!r}")


def said(body: bytes, *, stream: bool) -> str:
    """What the model says in an answer."""
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    text = ""
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def prove(port: int, credentials: Credentials) -> None:
    """Check that answers are the backend's, and that keys and limits are switched on where they should be."""
    wanted = "".join(fake_openai.words(TOKENS))
    for stream in (False, True):
        status, body = ask(port, credentials.key, stream=stream)
        if status != 200 or said(body, stream=stream) != wanted:
            raise BenchError(f"not the backend's answer ({'stream' if stream else 'plain'}): {status} {body[:500]!r}")
    if not credentials.key:
        return
    wrong = credentials.key[:-4] + ("aaaa" if not credentials.key.endswith("aaaa") else "bbbb")
    for key, statuses in ((wrong, [401]), (credentials.tight, [200, 429])):
        for expected in statuses:
            status, body = ask(port, key)
            if status != expected:
                raise BenchError(
                    f"{expected} was expected, for keys and limits are on, but it is {status} {body[:500]!r}"
                )


def settle(port: int, credentials: Credentials) -> None:
    """Wait until a server has worked off what it still has to do."""
    deadline = time.monotonic() + SETTLE_SECONDS
    good = 0
    while good < 3 and time.monotonic() < deadline:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            ask(port, credentials.key)
        good = good + 1 if time.monotonic() - began < 0.1 else 0


def shoot(core: str, port: int, key: str, point: Point, seconds: float, *more: str) -> dict[str, Any]:
    """Make the load of one point with load.py, `more` being more of its options, and return what it printed."""
    command = [
        *(sys.executable, PROJECT / "bench" / "load.py", "--url", f"http://127.0.0.1:{port}", "--key", key),
        *("--connections", str(point.connections), "--seconds", str(seconds)),
        *(("--stream",) if point.stream else ()),
        *(("--rate", str(point.rate)) if point.rate else ()),
        *more,
    ]
    done = subprocess.run(pinned(core, command), capture_output=True, text=True, check=False, timeout=seconds + 60)
    if done.returncode:
        raise BenchError(f"{point}: the load ended with {done.returncode}:\n{done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """One run's surroundings."""

    arguments: argparse.Namespace
    folder: Path
    home: Path
    address: str
    redis_port: int

    def shoot(self, port: int, key: str, point: Point, seconds: float) -> dict[str, Any]:
        """Make the load of one point."""
        return shoot(self.arguments.load_core, port, key, point, seconds, "--model", MODEL)

    def measure(self, series: Series, port: int, credentials: Credentials, running: Running | None) -> None:
        """All points of one server, once."""
        seconds = self.arguments.seconds
        self.shoot(port, credentials.key, Point(8, stream=False), 1.0)
        self.shoot(port, credentials.key, Point(8, stream=True), 1.0)
        peak = 0.0

        def take(point: Point, wanted: int, known: float) -> None:
            nonlocal peak
            before = running.cpu_s() if running else 0.0
            summary = self.shoot(port, credentials.key, point, window(seconds, wanted, known))
            series.add(point, summary, running.cpu_s() - before if running else 0.0)
            peak = max(peak, running.memory_mb() if running else 0.0)
            settle(port, credentials)

        for stream in (False, True):
            rate = 0.0
            for connections in CONNECTIONS:
                point = Point(connections, stream)
                # One connection says little about how many requests a busy server does.
                known = rate if connections > CONNECTIONS[0] else 0.0
                take(point, TURNS * connections, known)
                rate = series.rates[point][-1]
            for paced in PACED[stream]:
                point = Point(PACED_CONNECTIONS, stream, paced)
                if rate >= HEADROOM * paced:
                    take(point, PACED_REQUESTS, paced)
        if running:
            series.peak_mb.append(peak)

    def round(self, peer: Peer, series: Series) -> None:
        """One server from its start to its end."""
        redis_command(self.redis_port, "FLUSHALL")
        folder = Path(tempfile.mkdtemp(prefix=f"{peer.name}-", dir=self.folder))
        place = Place(folder, free_port(), free_port(), self.address, self.redis_port, self.home)
        command, more, credentials = peer.command(place)
        pinned_command = pinned(self.arguments.server_core, command)
        with process(pinned_command, folder, "server", {**os.environ, **more}) as running:
            try:
                series.start.append(first_answer(running, place.port, credentials))
                prove(place.port, credentials)
                series.idle_mb.append(running.memory_mb())
                self.measure(series, place.port, credentials, running)
            except BenchError as error:
                raise running.failed(f"{peer.name}: {error}\nits log") from error


def compare(arguments: argparse.Namespace, folder: Path) -> str:
    """Measure all and return the report."""
    home = Path(os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache" / "rayplane") / "bench"
    say: list[str] = []
    peers = []
    for name in arguments.servers:
        try:
            install(home, name, PEERS[name].requirements)
        except (BenchError, subprocess.TimeoutExpired) as error:
            say.append(f"{name} was not measured: {error}")
            continue
        peers.append(PEERS[name])
    measured = {peer.name: Series() for peer in peers}
    direct = Series()
    before = busy()
    with (
        backend(folder, arguments.load_core, arguments.token_ms) as address,
        redis(folder, arguments.load_core) as port,
    ):
        bench = Bench(arguments, folder, home, address, port)
        for number in range(arguments.rounds):
            progress(f"round {number + 1} of {arguments.rounds}: the backend alone")
            bench.measure(direct, int(address.rpartition(":")[2]), Credentials(), None)
            for peer in peers if number % 2 == 0 else reversed(peers):
                progress(f"round {number + 1} of {arguments.rounds}: {peer.name}")
                bench.round(peer, measured[peer.name])
    versions = {peer.name: peer.version(home) for peer in peers}
    if before > 0.2:
        say.append(f"The machine was not idle before the run: {before:.1f} of its cores were busy.")
    return report(arguments, measured, direct, versions, say)


def busy(seconds: float = 1.0) -> float:
    """How many cores were busy over a moment, by /proc/stat."""

    def look() -> tuple[int, int]:
        parts = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(parts), parts[3] + parts[4]

    total, idle = look()
    time.sleep(seconds)
    total_after, idle_after = look()
    return (1 - (idle_after - idle) / max(1, total_after - total)) * (os.cpu_count() or 1)


# --- the report ------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    """A figure of a table; a dash where there is none."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median with the lowest and highest of the rounds."""
    if not values:
        return "-"
    middle = number(statistics.median(values), digits)
    return middle if len(values) == 1 else f"{middle} ({number(min(values), digits)}-{number(max(values), digits)})"


def ratio(mine: float, other: float) -> str:
    """How many times the other's."""
    return "-" if math.isnan(mine) or math.isnan(other) or other <= 0 else f"{mine / other:.2f}"


def report(
    arguments: argparse.Namespace,
    measured: Mapping[str, Series],
    direct: Series,
    versions: Mapping[str, str],
    say: Sequence[str],
) -> str:
    """The report, in Markdown."""
    lines = [
        f"{arguments.rounds} rounds in turn, {arguments.seconds:g} s a point, {platform.machine()}, Python "
        f"{platform.python_version()}. Each server on core {arguments.server_core}; backend, Redis and load on "
        f"{arguments.load_core}. An answer has "
        f"{TOKENS} tokens; a stream's come every {arguments.token_ms:g} ms. `core ms each`: processor time of the "
        "server for a request, which does not change when something else takes the core away. No answer was an error.",
        "",
        "| server | version | switched on |",
        "| --- | --- | --- |",
        *(f"| {name} | {version} | {PEERS[name].on} |" for name, version in versions.items()),
        "",
        "| server | start to first answer | memory at rest | memory under load |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {spread(series.start, 2)} s | {spread(series.idle_mb)} MB | {spread(series.peak_mb)} MB |"
            for name, series in measured.items()
        ),
    ]
    everyone = {DIRECT: direct, **measured}
    for stream in (False, True):
        what = "streams" if stream else "plain answers"
        first = ["first event p50", "p99", "added p50", "p99"] if stream else []
        columns = [
            "server",
            "requests/s",
            "core ms a request",
            "p50 ms",
            "p95",
            "p99",
            "added p50 ms",
            "p95",
            "p99",
            *first,
        ]
        for title, points in (
            (f"{what}, connections", [Point(connections, stream) for connections in CONNECTIONS]),
            (f"{what}, steady rate", paced_points(everyone, stream=stream)),
        ):
            if not points:
                continue
            lines += ["", f"| {title} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
            for point in points:
                lines += [
                    row(str(point.rate or point.connections), name, series, direct, point)
                    for name, series in everyone.items()
                    if point in series.rates
                ]
    lines += comparison(measured)
    return "\n".join([*lines, *([""] if say else []), *say])


def paced_points(everyone: Mapping[str, Series], *, stream: bool) -> list[Point]:
    """The steady rates that were measured, rising."""
    found = {point for series in everyone.values() for point in series.rates if point.rate and point.stream == stream}
    return sorted(found, key=lambda point: point.rate)


def row(title: str, name: str, series: Series, direct: Series, point: Point) -> str:
    """A server's line at a point."""
    names = ("p50", "p95", "p99")
    cells = [spread(series.rates[point]), number(median(series.work.get(point, ())), 3)]
    cells += [number(series.time(point, percentile)) for percentile in names]
    bare = series is direct
    cells += ["" if bare else number(series.added(direct, point, percentile)) for percentile in names]
    if point.stream:
        cells += [number(series.time(point, f"first {percentile}")) for percentile in ("p50", "p99")]
        cells += ["" if bare else number(series.added(direct, point, f"first {p}")) for p in ("p50", "p99")]
    return f"| {title} | {name} | " + " | ".join(cells) + " |"


def comparison(measured: Mapping[str, Series]) -> list[str]:
    """Ours against the others: requests a second."""
    others = [name for name in measured if not name.startswith(OURS)]
    if OURS not in measured or not others:
        return []
    points = [Point(connections, stream) for stream in (False, True) for connections in CONNECTIONS]
    lines = ["", "| requests/s of rayplane, times | " + " | ".join(map(str, points)) + " |"]
    lines += ["| --- " * (len(points) + 1) + "|"]
    for name in others:
        cells = [ratio(measured[OURS].rate(point), measured[name].rate(point)) for point in points]
        lines.append(f"| {name}'s | " + " | ".join(cells) + " |")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--servers", nargs="+", choices=list(PEERS), default=[OURS, "litellm", "vllm-router"])
    parser.add_argument("--rounds", type=int, default=3, help="of all servers in turn (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="a point is measured (%(default)s)")
    parser.add_argument("--token-ms", type=float, default=2.0, help="between a stream's tokens (%(default)s)")
    parser.add_argument("--server-core", default="1", help="core of the server that is measured (%(default)s)")
    parser.add_argument("--load-core", default="0", help="core of backend, Redis and load, or cores: 4-7 (%(default)s)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 with the reason where there is nothing to measure."""
    return reporting.run(parse(arguments), compare)


if __name__ == "__main__":
    sys.exit(main())
