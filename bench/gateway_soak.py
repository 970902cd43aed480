"""Load on the gateway for minutes at a steady rate: does anything grow?

    make soak-gateway

Plain requests, streams, and clients that go away (before the answer, and in the middle of a stream) come at random
times, on connections that are kept and on new ones. Every few seconds the gateway's memory, open files and sockets and
Redis's memory and keys are written down; at the end the load stops, and what then is still held is counted: open
sockets of clients, requests in flight, leases of concurrency. Keys, limits, the audit log and an output filter are on.

It ends with 1 where something grew, where an answer was an error, or where something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "bench")]

import gateway
import load
import redis
import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateway import MODEL, Credentials, Place, Running, progress
from reporting import BenchError

#: Shares of the requests.
KINDS = {"plain": 0.55, "stream": 0.35, "gone before": 0.05, "gone mid-stream": 0.05}
#: This share of the samples at the beginning is warming up: pools, caches, the allocator.
WARMUP = 0.25
#: What counts as flat: growth over the rest of the run below this share of the mean, or below this much.
TOLERANCE = {"memory MB": (0.03, 2.0), "files": (0.05, 8.0), "sockets": (0.05, 8.0), "Redis MB": (0.05, 0.5)}
SETTLE_SECONDS = 40.0


@dataclasses.dataclass
class Sample:
    """A moment of the run."""

    at: float
    values: dict[str, float]
    done: int
    failed: int
    aborted: int
    p50: float
    p99: float


def growth(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """How much a value grew over the time by the straight line that fits best, and the standard error of that, which
    comes of the values' scatter; 0 for less than three samples.
    """
    if len(values) < 3:
        return 0.0, 0.0
    slope, begin = statistics.linear_regression(times, values)
    middle, span = statistics.fmean(times), times[-1] - times[0]
    rest = sum((value - begin - slope * at) ** 2 for at, value in zip(times, values, strict=True))
    error = math.sqrt(rest / (len(values) - 2) / sum((at - middle) ** 2 for at in times))
    return slope * span, error * span


def verdicts(samples: Sequence[Sample]) -> dict[str, tuple[bool, float, float]]:
    """By measure: whether it was flat after the warm-up, its growth, and its mean.

    Open sockets go up and down with the load by more than is tolerated: what two standard errors explain is no growth.
    """
    kept = samples[int(len(samples) * WARMUP) :]
    times = [sample.at for sample in kept]
    found = {}
    for name, (share, least) in TOLERANCE.items():
        values = [sample.values[name] for sample in kept]
        (grown, error), mean = growth(times, values), statistics.fmean(values)
        found[name] = (grown - 2 * error <= max(least, share * mean), grown, mean)
    return found


class Soak:
    """The load."""

    def __init__(self, port: int, key: str, rate: float) -> None:
        self.port, self.rate = port, rate
        self.plain = load.request(f"127.0.0.1:{port}", key, MODEL, stream=False)
        self.stream = load.request(f"127.0.0.1:{port}", key, MODEL, stream=True)
        self.draw = random.Random(11)  # noqa: S311 - a mixture, not secrets
        self.free: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.latencies: list[float] = []

    async def run(self, until: float) -> None:
        """Send until then, and wait for the answers."""
        at = time.perf_counter()
        kinds, shares = list(KINDS), list(KINDS.values())
        while at < until:
            at += self.draw.expovariate(self.rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(self.one(self.draw.choices(kinds, shares)[0]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=30)
        self.errors["no answer"] += len(self.tasks)
        for _, writer in self.free:
            writer.close()

    async def one(self, kind: str) -> None:
        """One request of a kind."""
        try:
            async with asyncio.timeout(30):
                await self.exchange(kind)
            self.done[kind] += 1
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            self.errors[f"{kind}: {type(error).__name__} {error}"[:200]] += 1

    async def exchange(self, kind: str) -> None:
        """Send, read, and keep the connection or drop it."""
        # A connection now and then is new, as behind a load balancer.
        if self.free and self.draw.random() > 0.1:
            reader, writer = self.free.popleft()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        began = time.perf_counter()
        writer.write(
            self.plain if kind == "plain" or (kind == "gone before" and self.draw.random() < 0.5) else self.stream
        )
        if kind == "gone before":
            await asyncio.sleep(self.draw.random() * 0.002)
            writer.transport.abort()
            return
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if head[9:12] != b"200":
            raise ValueError(head[:40].decode())
        if kind == "gone mid-stream":
            await reader.readuntil(b"\n\n")
            await asyncio.sleep(self.draw.random() * 0.03)
            writer.transport.abort()
            return
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        body = await (reader.readexactly(int(length[1])) if length else reader.readuntil(b"\r\n0\r\n\r\n"))
        if not length and b"data: [DONE]" not in body:
            raise ValueError("a stream without an end")
        self.latencies.append(time.perf_counter() - began)
        if len(self.free) < 64:
            self.free.append((reader, writer))
        else:
            writer.close()


def redis_values(port: int) -> tuple[float, int]:
    """Memory in MB and number of keys."""
    memory = re.search(rb"used_memory:(\d+)", gateway.redis_command(port, "INFO memory"))
    keys = re.search(rb":(\d+)", gateway.redis_command(port, "DBSIZE"))
    return int(memory[1]) / 1e6 if memory else 0.0, int(keys[1]) if keys else 0


def held(pid: int) -> tuple[int, int]:
    """Open files of a process, and how many of them are sockets."""
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(path))  # noqa: PTH115 - the link of a socket is no path
        except OSError:
            continue
    return len(links), sum(link.startswith("socket:") for link in links)


def in_flight(admin_port: int) -> float:
    """Requests that the gateway itself says it has open."""
    with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/metrics", timeout=10) as answer:
        found = re.search(rb"^rayplane_gateway_in_flight(?:{[^}]*})? ([0-9.e+]+)$", answer.read(), re.MULTILINE)
    if not found:
        raise BenchError("the gateway has no metric rayplane_gateway_in_flight")
    return float(found[1])


def leases(redis_port: int) -> int:
    """Members of the sorted sets in Redis: a request in flight holds one in each of its concurrency limits."""
    with redis.Redis(port=redis_port) as client:
        return sum(int(str(client.zcard(key))) for key in client.scan_iter(count=1000) if client.type(key) == b"zset")


def configure(place: Place) -> tuple[list[str], dict[str, str], Credentials]:
    """Ours, with the audit log and a filter on the answers as well."""
    command, more, credentials = gateway.rayplane(place)
    path = Path(command[-1])
    config = json.loads(path.read_text(encoding="utf-8"))
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (place.folder / "head.pem").write_bytes(pem)
    config["audit"] = {
        "enabled": True,
        "directory": str(place.folder / "audit"),
        "signing_key_file": str(place.folder / "head.pem"),
    }
    config["filters"] = {"private": {"type": "sensitive_data", "action": "redact"}}
    config["roles"]["ample"]["filters"] = ["private"]
    path.write_text(json.dumps(config), encoding="utf-8")
    return command, more, credentials


async def soak(arguments: argparse.Namespace, place: Place, running: Running, key: str) -> tuple[list[Sample], Soak]:
    """Make the load and take the samples."""
    made = Soak(place.port, key, arguments.rate)
    begin = time.perf_counter()
    end = begin + arguments.minutes * 60
    task = asyncio.create_task(made.run(end))
    samples: list[Sample] = []
    while not task.done():
        await asyncio.wait({task}, timeout=arguments.every)
        if running.process.poll() is not None:
            raise running.failed("the gateway ended")
        if task.done() and samples:
            break
        memory = running.memory_mb()
        files, sockets = held(running.process.pid)
        redis_mb, redis_keys = redis_values(place.redis_port)
        seen, made.latencies = sorted(made.latencies), []
        aborted = made.done["gone before"] + made.done["gone mid-stream"]
        values = {
            "memory MB": memory,
            "files": files,
            "sockets": sockets,
            "Redis MB": redis_mb,
            "Redis keys": redis_keys,
        }
        at = time.perf_counter() - begin
        done, failed = made.done.total(), made.errors.total()
        p50, p99 = (load.percentile(seen, p) * 1000 for p in (50, 99))
        samples.append(Sample(at, values, done, failed, aborted, p50, p99))
        progress(f"{at:.0f} s: {done} requests, {failed} failed, {memory:.1f} MB, {files} files")
    await task
    return samples, made


def table(samples: Sequence[Sample], rows: int = 12) -> list[str]:
    """Some of the samples, in Markdown."""
    names = list(samples[0].values)
    lines = ["| s | requests | gone | failed | p50 ms | p99 ms | " + " | ".join(names) + " |"]
    lines += ["| --- " * (6 + len(names)) + "|"]
    step = math.ceil(len(samples) / rows)
    chosen = [*samples[:-1:step], samples[-1]]
    for sample in chosen:
        cells = [f"{sample.at:.0f}", f"{sample.done:,}", f"{sample.aborted:,}", f"{sample.failed}"]
        cells += [gateway.number(sample.p50), gateway.number(sample.p99)]
        cells += [gateway.number(value, 1 if name.endswith("MB") else 0) for name, value in sample.values.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


async def left(place: Place, pid: int, before: int) -> dict[str, float]:
    """What is still held when the load is over; waits a while for zero of each."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        found = {
            "requests in flight": in_flight(place.spare_port),
            "leases in Redis": float(leases(place.redis_port)),
            # Idle connections to the backend and to Redis are kept on purpose.
            "sockets beyond those kept": float(max(0, held(pid)[1] - before)),
        }
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(1)


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """The report, and whether all is well."""
    core = arguments.load_core
    os.sched_setaffinity(0, {core})
    with (
        gateway.backend(folder, str(core), arguments.token_ms) as address,
        gateway.redis(folder, str(core)) as redis_port,
    ):
        place = Place(folder, gateway.free_port(), gateway.free_port(), address, redis_port, folder)
        command, more, credentials = configure(place)
        pinned = gateway.pinned(str(arguments.server_core), command)
        with gateway.process(pinned, folder, "server", {**os.environ, **more}) as running:
            gateway.first_answer(running, place.port, credentials)
            gateway.prove(place.port, credentials)
            samples, made = uvloop.run(soak(arguments, place, running, credentials.key))
            # One connection to the backend for each request that was ever open at once, and Redis's few.
            kept = 16 + max(int(sample.values["sockets"]) for sample in samples) // 2
            remains = uvloop.run(left(place, running.process.pid, kept))
    lines = [
        f"{arguments.minutes:g} minutes at {arguments.rate:g} requests a second ({', '.join(KINDS)}): "
        f"{made.done.total():,} requests, {made.errors.total()} failed.",
        "",
        *table(samples),
        "",
    ]
    good = not made.errors.total() and not any(remains.values())
    for name, (flat, grown, mean) in verdicts(samples).items():
        good = good and flat
        word = "flat" if flat else "GROWS"
        lines.append(f"{name}: {word} ({grown:+.2f} after the warm-up, mean {mean:.1f})")
    lines += [f"{what} after the load: {value:g}" for what, value in remains.items()]
    lines += [f"failed: {why} ({count} times)" for why, count in made.errors.most_common(10) if count]
    lines += ["", "Flat." if good else "NOT flat, or not without loss."]
    return "\n".join(lines), good


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (%(default)s)")
    parser.add_argument("--rate", type=float, default=300.0, help="requests a second (%(default)s)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples (%(default)s)")
    parser.add_argument("--token-ms", type=float, default=2.0, help="between a stream's tokens (%(default)s)")
    parser.add_argument("--server-core", type=int, default=1)
    parser.add_argument("--load-core", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="rayplane-soak-"))
    try:
        text, good = measure(options, folder)
    except (BenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
