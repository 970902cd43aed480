"""Load for an OpenAI-compatible server: streams and plain requests, timed one by one.

    python bench/load.py --url http://127.0.0.1:8080 --key rp-... --connections 32 --seconds 5 --stream
    python bench/load.py --url http://127.0.0.1:8080 --connections 32 --rate 500

A raw asyncio protocol, so that the client's share of a latency is small and the same for all. Closed loop: every
connection sends its next request when the answer is complete. With `--rate`: requests come at random (Poisson) whether
or not the server keeps up, and wait in a queue that counts when all connections are busy.

Prints one JSON object: requests a second that ended within the window; latency and time to first event (milliseconds,
of the requests that began within it); and everything that was no complete answer with a 2xx status.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import math
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import uvloop

PERCENTILES = (50, 95, 99)
#: Seconds that requests have to finish after the window.
GRACE_S = 30.0


def request(
    host: str, key: str, model: str, *, stream: bool, path: str = "/v1/chat/completions", tokens: int = 0
) -> bytes:
    """The request's bytes. With `tokens` an engine writes exactly so many (vLLM's `ignore_eos`)."""
    body = {"model": model, "messages": [{"role": "user", "content": "Say something about a fox."}], "max_tokens": 64}
    if tokens:
        body |= {"max_tokens": tokens, "ignore_eos": True}
    if stream:
        body["stream"] = True
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    return head.encode() + b"\r\n" + text


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent of the sorted values lie (nearest rank)."""
    if not values:
        return float("nan")
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)]


@dataclasses.dataclass
class Result:
    """What a run saw. Times in seconds."""

    #: Within the window, and in all.
    completed: int = 0
    answered: int = 0
    latencies: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    errors: Counter[str] = dataclasses.field(default_factory=Counter)

    def summary(self, seconds: float) -> dict[str, object]:
        """Its JSON."""
        latencies, first = sorted(self.latencies), sorted(self.first)
        return {
            "rate": self.completed / seconds,
            "requests": len(latencies),
            "answered": self.answered,
            "errors": dict(self.errors),
            "latency_ms": {f"p{p}": percentile(latencies, p) * 1000 for p in PERCENTILES},
            "first_ms": {f"p{p}": percentile(first, p) * 1000 for p in PERCENTILES},
        }


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.head = b""
        self.sent = 0.0
        self.began = 0.0
        self.first = 0.0
        self.left = -1
        self.tail = b""
        self.busy = False
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.load.clients.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self.gone = True
        self.load.clients.discard(self)
        if self.busy:
            self.busy = False
            self.load.failed(self, "connection lost")
        self.load.lost(self)

    def send(self, began: float) -> None:
        """Send the request; `began` is when it was due."""
        self.busy = True
        self.began, self.first, self.head, self.left, self.tail = began, 0.0, b"", -1, b""
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        if self.left == -1:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self.head[:end].lower(), self.head[end + 4 :]
            self.status = head[9:12]
            at = head.find(b"\r\ncontent-length:")
            if at >= 0:
                stop = head.find(b"\r\n", at + 2)
                self.left = int(head[at + 17 : stop if stop >= 0 else end])
            else:
                self.left = -2  # chunked
            if not data and self.left:
                return
        if not self.first:
            self.first = time.perf_counter()
        if self.left >= 0:
            self.left -= len(data)
            if self.left <= 0:
                self.done()
            return
        self.tail = data if len(data) >= 7 else self.tail[-7:] + data
        if self.tail.endswith(b"\r\n0\r\n\r\n"):
            self.done()

    def done(self) -> None:
        """The answer is complete."""
        self.busy = False
        if self.status[:1] == b"2":
            self.load.completed(self)
        else:
            self.load.failed(self, f"status {self.status.decode()}")


class Load:
    """Connections, and who sends when."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        place = urlsplit(arguments.url)
        self.host, self.port = place.hostname or "127.0.0.1", place.port or 80
        self.request = request(
            place.netloc, arguments.key, arguments.model, stream=arguments.stream, tokens=arguments.tokens
        )
        self.result = Result()
        self.clients: set[Client] = set()
        self.reconnects: set[asyncio.Task[Client]] = set()
        self.free: deque[Client] = deque()
        self.due: deque[float] = deque()
        self.in_flight = 0
        self.opened = self.closed = 0.0
        self.idle = asyncio.Event()

    def completed(self, client: Client) -> None:
        """Count a good answer and go on."""
        now = time.perf_counter()
        self.result.answered += 1
        if self.opened <= now < self.closed:
            self.result.completed += 1
        if self.opened <= client.began < self.closed:
            self.result.latencies.append(now - client.began)
            self.result.first.append(client.first - client.began)
        self.next(client)

    def failed(self, client: Client, why: str) -> None:
        """Count what is none."""
        self.result.errors[why] += 1
        self.next(client)

    def lost(self, client: Client) -> None:
        """A server may close a connection between requests: open another."""
        if client in self.free:
            self.free.remove(client)
        if time.perf_counter() < self.closed:
            task = asyncio.get_running_loop().create_task(self.connect())
            self.reconnects.add(task)
            task.add_done_callback(self.connected)

    def connected(self, task: asyncio.Task[Client]) -> None:
        """A connection in place of a lost one: set it to work."""
        self.reconnects.discard(task)
        if task.exception():
            self.result.errors["connection refused"] += 1
        else:
            self.in_flight += 1
            self.next(task.result())

    async def connect(self) -> Client:
        """Open a connection."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Client(self), self.host, self.port)
        return client

    def next(self, client: Client) -> None:
        """The connection is free: its next request, or rest."""
        self.in_flight -= 1
        now = time.perf_counter()
        if client.gone:
            pass
        elif self.arguments.rate:
            if self.due:
                self.in_flight += 1
                client.send(self.due.popleft())
                return
            self.free.append(client)
        elif now < self.closed:
            self.in_flight += 1
            client.send(now)
            return
        if not self.in_flight and not self.due:
            self.idle.set()

    async def pace(self) -> None:
        """Send at random times, so many a second on average."""
        draw = random.Random(7)  # noqa: S311 - arrivals, not secrets
        at = time.perf_counter()
        while at < self.closed:
            at += draw.expovariate(self.arguments.rate)
            wait = at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            now = time.perf_counter()
            self.in_flight += bool(self.free)
            if self.free:
                # The timer's own lateness is not the server's.
                self.free.popleft().send(now)
            else:
                self.due.append(at)

    async def run(self) -> Result:
        """The whole run."""
        clients = await asyncio.gather(*(self.connect() for _ in range(self.arguments.connections)))
        begin = time.perf_counter()
        self.opened = begin + self.arguments.warmup
        self.closed = self.opened + self.arguments.seconds
        gc.disable()
        if self.arguments.rate:
            self.free.extend(clients)
            await self.pace()
        else:
            for client in clients:
                self.in_flight += 1
                client.send(time.perf_counter())
            await asyncio.sleep(self.closed - time.perf_counter())
        if self.in_flight or self.due:
            try:
                await asyncio.wait_for(self.idle.wait(), GRACE_S)
            except TimeoutError:
                self.result.errors["no answer"] += self.in_flight + len(self.due)
        if self.reconnects:
            await asyncio.wait(set(self.reconnects))
        for client in self.clients:
            client.busy = False
            client.transport.abort()
        while self.clients:
            await asyncio.sleep(0)
        return self.result


async def measure(arguments: argparse.Namespace) -> Result:
    """Make the load within the running loop."""
    return await Load(arguments).run()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the window that is counted (%(default)s)")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before it (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: as fast as answers come")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--tokens", type=int, default=0, help="of every answer, by vLLM's ignore_eos; 0: the model's")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    options = parse(arguments)
    print(json.dumps(uvloop.run(measure(options)).summary(options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
