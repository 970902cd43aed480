"""A running engine with the gateway in front of it and without, under the same load.

    python bench/engine.py --engine http://127.0.0.1:8000 --model NAME
    python bench/engine.py --engine http://127.0.0.1:8000 --model NAME --connections 1 32 256 --tokens 128

For engines whose own speed is the question (vLLM on a GPU): does the gateway, on one core, keep up with it? Keys,
limits and a daily budget are on, in Redis. Three parts:

- closed loops with plain answers and streams, directly and through the gateway in turn;
- the engine's refusals (a bad parameter, too many tokens, no messages ...): the same status and the same bytes;
- the count of tokens: the gateway's against the engine's own counters (`vllm:prompt_tokens_total`,
  `vllm:generation_tokens_total`), of complete answers and of streams whose clients went away.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "bench")]

import gateway
import load
import reporting
from gateway import Credentials, Place, Point, Series, number, pinned, progress, spread
from prometheus_client.parser import text_string_to_metric_families
from reporting import BenchError

DIRECT, THROUGH = "directly", "through the gateway"
#: Streams whose clients go away after the first events.
GONE = 20
#: Refusals of vLLM: what is asked, apart from the model and the messages.
REFUSED: dict[str, dict[str, Any]] = {
    "temperature of -1": {"temperature": -1},
    "max_tokens above the context": {"max_tokens": 10_000_000},
    "top_p of 7": {"top_p": 7},
    "no messages": {"messages": []},
    "messages is a number": {"messages": 3},
}


def tokens(port: int) -> dict[str, float]:
    """The tokens that an engine or the gateway has read (`input`) and written (`output`) by its own metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    engine = {"vllm:prompt_tokens_total": "input", "vllm:generation_tokens_total": "output"}
    found = {"input": 0.0, "output": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "rayplane_gateway_tokens_total":
                found[sample.labels["direction"]] += sample.value
            elif sample.name in engine:
                found[engine[sample.name]] += sample.value
    return found


def leave(port: int, key: str, model: str, tokens: int) -> None:
    """Ask for a stream and go away after its first piece of text."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(load.request(f"127.0.0.1:{port}", key, model, stream=True, tokens=tokens))
        seen = b""
        while seen.count(b"data: ") < 3:
            piece = connection.recv(65536)
            if not piece:
                raise BenchError(f"the stream ended: {seen[:500]!r}")
            seen += piece


class Engine:
    """An engine, the gateway in front of it, and the load."""

    def __init__(self, options: argparse.Namespace, port: int, admin_port: int, credentials: Credentials) -> None:
        self.options = options
        self.ports = {DIRECT: urlsplit(options.engine).port or 80, THROUGH: port}
        self.keys = {DIRECT: "", THROUGH: credentials.key}
        self.admin_port = admin_port
        self.series = {DIRECT: Series(), THROUGH: Series()}

    def shoot(self, way: str, point: Point, running: gateway.Running | None) -> None:
        """The load of one point on one way."""
        options = self.options
        more = ("--model", options.model, "--tokens", str(options.tokens), "--warmup", "2")
        before = running.cpu_s() if running else 0.0
        summary = gateway.shoot(options.load_core, self.ports[way], self.keys[way], point, options.seconds, *more)
        series = self.series[way]
        series.add(point, summary, running.cpu_s() - before if running else 0.0)
        if running:
            series.peak_mb.append(running.memory_mb())

    def measure(self, running: gateway.Running) -> list[str]:
        """Every point, both ways in turn, round after round; the table."""
        options = self.options
        points = [Point(connections, stream) for stream in (False, True) for connections in options.connections]
        for turn in range(options.rounds):
            for point in points:
                for way in (DIRECT, THROUGH) if turn % 2 == 0 else (THROUGH, DIRECT):
                    progress(f"round {turn + 1} of {options.rounds}: {point}, {way}")
                    self.shoot(way, point, running if way == THROUGH else None)
        lines = [
            "| load | way | requests/s | tokens/s | p50 ms | p99 ms | first event p50 ms | p99 | core ms a request |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for point in points:
            for way, series in self.series.items():
                times = [series.time(point, name) for name in ("p50", "p99", "first p50", "first p99")]
                first = [number(value, 1) if point.stream else "" for value in times[2:]]
                cells = [
                    *(str(point), way, spread(series.rates[point], 1), number(series.rate(point) * options.tokens, 0)),
                    *(number(times[0], 1), number(times[1], 1), *first),
                    number(gateway.median(series.work.get(point, ())), 2) if way == THROUGH else "",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        memory = max(self.series[THROUGH].peak_mb)
        return [*lines, "", f"The gateway's memory under this load: {memory:.0f} MB."]

    def refusals(self) -> list[str]:
        """What the engine refuses, both ways; one line a case."""
        base = {"model": self.options.model, "messages": [{"role": "user", "content": "Hello"}]}
        bodies = {name: json.dumps({**base, **more}).encode() for name, more in REFUSED.items()}
        lines = ["| refused | directly | through the gateway | bytes |", "| --- | --- | --- | --- |"]
        for name, body in bodies.items():
            (status, text), (other, answer) = (
                gateway.post(self.ports[way], self.keys[way], body) for way in (DIRECT, THROUGH)
            )
            same = "the same" if answer == text else f"{answer[:300]!r} instead of {text[:300]!r}"
            if status == other == 200:
                same = "not refused"
            lines.append(f"| {name} | {status} | {other} | {same} |")
        return lines

    def accounts(self) -> list[str]:
        """The gateway's count of tokens against the engine's: of complete answers, and of clients that went away."""
        options = self.options
        try:
            tokens(self.ports[DIRECT])
        except ValueError:
            return ["The engine shows no Prometheus metrics: tokens were not compared."]
        lines = [
            "| what | input: engine | gateway | output: engine | gateway |",
            "| --- | --- | --- | --- | --- |",
        ]

        def complete() -> None:
            for stream in (False, True):
                self.shoot(THROUGH, Point(32, stream), None)

        def gone() -> None:
            for _ in range(GONE):
                leave(self.ports[THROUGH], self.keys[THROUGH], options.model, 2000)

        for what, act in (("complete answers", complete), (f"{GONE} clients that went away", gone)):
            before, mine = tokens(self.ports[DIRECT]), tokens(self.admin_port)
            act()
            time.sleep(3)
            after, now = tokens(self.ports[DIRECT]), tokens(self.admin_port)
            cells = [
                f"{value:,.0f}"
                for direction in ("input", "output")
                for value in (after[direction] - before[direction], now[direction] - mine[direction])
            ]
            lines.append(f"| {what} | {' | '.join(cells)} |")
        return lines


def compare(options: argparse.Namespace, folder: Path) -> str:
    """Measure all and return the report."""
    with contextlib.ExitStack() as stack:
        redis_port = stack.enter_context(gateway.redis(folder, options.load_core))
        place = Place(folder, gateway.free_port(), gateway.free_port(), options.engine, redis_port, folder)
        command, more, credentials = gateway.rayplane(place, model=options.model)
        running = stack.enter_context(
            gateway.process(pinned(options.server_core, command), folder, "gateway", {**os.environ, **more})
        )
        engine = Engine(options, place.port, place.spare_port, credentials)
        try:
            start = gateway.first_answer(running, place.port, credentials, model=options.model)
            parts = [engine.measure(running), engine.refusals(), engine.accounts()]
        except BenchError as error:
            raise running.failed(f"{error}\nits log") from error
    head = (
        f"{options.model}, {options.tokens} tokens an answer, {options.seconds:g} s a point, {options.rounds} rounds. "
        f"The gateway's first answer {start:.2f} s after its start. No answer was an error."
    )
    return "\n\n".join([head, *("\n".join(part) for part in parts)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", required=True, help="its address, http://127.0.0.1:PORT")
    parser.add_argument("--model", required=True, help="that it serves")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=128, help="of every answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="a point is measured (%(default)s)")
    parser.add_argument("--server-core", default="1", help="the gateway's core (%(default)s)")
    parser.add_argument("--load-core", default="0", help="core of Redis and the load, or cores: 4-7 (%(default)s)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 with the reason where there is nothing to measure."""
    return reporting.run(parse(arguments), compare)


if __name__ == "__main__":
    sys.exit(main())
