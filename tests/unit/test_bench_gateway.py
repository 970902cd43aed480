"""The arithmetic of the gateway's benchmark, and what it refuses; what it measures is run by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "bench"))

import fake_openai
import gateway
import gateway_soak
import load
from gateway import BenchError, Credentials, Point, Series

from tests.gateway.ports import reserve
from tests.gateway.waiting import until

ONE, MANY, STREAM = Point(1, stream=False), Point(32, stream=False), Point(1, stream=True)


def summary(rate: float, p50: float, first: float = 0.0, **errors: int) -> dict[str, Any]:
    """What load.py prints, with p95 and p99 of two and three times the median."""
    times = {"p50": p50, "p95": 2 * p50, "p99": 3 * p50}
    return {
        "rate": rate,
        "requests": 7,
        "answered": 10,
        "errors": errors,
        "latency_ms": times,
        "first_ms": {"p50": first, "p99": first},
    }


def series(*rounds: dict[str, Any], point: Point = ONE) -> Series:
    made = Series()
    for one in rounds:
        made.add(point, one)
    return made


# --- arithmetic


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [load.percentile(values, percent) for percent in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert load.percentile([3.0], 99) == 3.0
    assert load.percentile([1.0, 2.0], 50) == 1.0
    assert math.isnan(load.percentile([], 50))


def test_added_time_is_the_median_of_the_rounds_differences() -> None:
    direct = series(summary(100, 1.0), summary(100, 5.0), summary(100, 2.0))
    mine = series(summary(50, 2.0), summary(60, 5.5), summary(40, 9.0))
    # 1.0, 0.5, 7.0: not the difference of the medians, which is 3.5.
    assert mine.added(direct, ONE, "p50") == 1.0
    assert mine.added(direct, ONE, "p99") == 3.0
    assert mine.rate(ONE) == 50
    assert math.isnan(mine.added(direct, MANY, "p50"))
    assert math.isnan(mine.rate(MANY))


def test_a_window_is_long_enough_for_slow_servers() -> None:
    assert gateway.window(3, 768, 10_000) == 3
    assert gateway.window(3, 768, 100) == 7.68
    assert gateway.window(3, 768, 1) == gateway.LONGEST_WINDOW
    assert gateway.window(3, 768, 0) == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "-"), (1.234, "1.23"), (999.999, "1,000.00"), (12345.6, "12,346"), (-0.5, "-0.50")],
)
def test_figures(value: float, text: str) -> None:
    assert gateway.number(value) == text


def test_figures_of_rounds_and_ratios() -> None:
    assert gateway.spread([3, 1, 2]) == "2 (1-3)"
    assert gateway.spread([2.5], 1) == "2.5"
    assert gateway.spread([]) == "-"
    assert gateway.ratio(2500, 100) == "25.00"
    assert gateway.ratio(math.nan, 100) == gateway.ratio(1, math.nan) == gateway.ratio(1, 0) == "-"


# --- refusals


def test_a_run_with_errors_has_no_figures() -> None:
    with pytest.raises(BenchError, match=r"plain, 1 connections: answers were errors: .*'status 500': 3"):
        series(summary(100, 1.0, **{"status 500": 3}))
    with pytest.raises(BenchError, match="no request was answered"):
        series({**summary(100, 1.0), "requests": 0})


@pytest.fixture(scope="module")
def bench_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with reserve() as held, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "free_port", lambda: held.getsockname()[1])
        with gateway.backend(tmp_path_factory.mktemp("backend"), 0, 1.0) as address:
            yield int(address.rpartition(":")[2])


def test_a_server_that_lets_anybody_in_is_no_peer(bench_backend: int) -> None:
    gateway.prove(bench_backend, Credentials())
    with pytest.raises(BenchError, match="401 was expected, for keys and limits are on"):
        gateway.prove(bench_backend, Credentials("rp-some-key", "rp-another-key"))


def test_another_answer_than_the_backends_is_refused(bench_backend: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "TOKENS", 3)
    with pytest.raises(BenchError, match="not the backend's answer"):
        gateway.prove(bench_backend, Credentials())


def test_a_peer_that_cannot_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BenchError, match="make bootstrap"):
        gateway.install(tmp_path / "bench", "litellm", ["litellm"])
    mark = tmp_path / "bench" / "litellm" / "requirements.txt"
    mark.parent.mkdir(parents=True)
    mark.write_text("litellm")
    gateway.install(tmp_path / "bench", "litellm-local", ["litellm"])


# --- backend and load


def test_the_backends_answers_are_http_as_vllm_writes_it() -> None:
    head, _, body = fake_openai.whole(5).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["usage"]["completion_tokens"] == 5
    text = "".join(fake_openai.words(5))
    assert gateway.said(body, stream=False) == text
    for include in (False, True):
        for continuous in (False, True):
            pieces = fake_openai.stream(5, include=include, continuous=continuous)
            head, _, chunked = b"".join(pieces).partition(b"\r\n\r\n")
            events = unchunk(chunked)
            assert events.endswith(b"data: [DONE]\n\n")
            assert gateway.said(events, stream=True) == text
            assert events.count(b'"usage"') == (6 if continuous else 0) + (1 if include else 0)


def unchunk(chunked: bytes) -> bytes:
    """The body of a chunked answer; fails where its framing is broken."""
    body = b""
    while True:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        body += rest[:length]
        chunked = rest[length + 2 :]
        if not length:
            assert not chunked
            return body


async def measured(port: int, **more: Any) -> load.Result:
    """A measurement that is long enough for this machine to get to a request."""
    for seconds in ("0.2", "2", "20"):
        options = load.parse(["--url", f"http://127.0.0.1:{port}", "--seconds", seconds, "--warmup", "0"])
        vars(options).update(more)
        result = await load.measure(options)
        if result.completed or result.errors:
            break
    return result


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rate", [0.0, 100.0])
def test_load_counts_what_was_answered(bench_backend: int, stream: bool, rate: float) -> None:
    result = asyncio.run(measured(bench_backend, connections=4, stream=stream, rate=rate))
    assert not result.errors
    assert result.completed
    assert len(result.latencies) == len(result.first) >= result.completed
    assert all(0 < first <= whole for first, whole in zip(result.first, result.latencies, strict=True))
    assert result.summary(2.0)["rate"] == result.completed / 2


class Answering(asyncio.Protocol):
    """Answers everything with the same bytes; without a complete answer it hangs up."""

    def __init__(self, answer: bytes, complete: bool, connections: set[Answering]) -> None:
        self.answer, self.complete, self.connections = answer, complete, connections

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.answer)
        if not self.complete:
            self.transport.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}", "status 429"),
        (b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "status 500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}", "connection lost"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n", "connection lost"),
        (b"", "connection lost"),
    ],
)
def test_load_counts_what_is_no_answer(answer: bytes, error: str) -> None:
    connections: set[Answering] = set()

    async def run() -> load.Result:
        loop = asyncio.get_running_loop()
        complete = error.startswith("status")
        server = await loop.create_server(lambda: Answering(answer, complete, connections), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        result = await measured(port)
        server.close()
        await until(lambda: not connections)
        return result

    result = asyncio.run(run())
    assert result.errors[error] == result.errors.total() > 0
    assert not result.completed


# --- the report


def test_the_report_sets_ours_beside_the_others() -> None:
    everything = argparse.Namespace(rounds=2, seconds=3.0, token_ms=2.0, server_core="1", load_core="0")
    measured = {
        "rayplane": series(summary(2600, 1.5), summary(2400, 1.7)),
        "litellm": series(summary(100, 10), summary(100, 10)),
        "vllm-router": series(summary(5000, 1.2), summary(5000, 1.2)),
    }
    measured["rayplane"].start += [0.8, 0.6]
    direct = series(summary(40_000, 1.0), summary(40_000, 1.0))
    direct.add(STREAM, summary(30, 34.0, 0.5))
    measured["rayplane"].add(STREAM, summary(29, 35.0, 0.75), 0.02)
    text = gateway.report(everything, measured, direct, dict.fromkeys(measured, "1.0"), ["A remark."])
    assert "| rayplane | 0.70 (0.60-0.80) s | - MB | - MB |" in text
    assert "| 1 | direct | 40,000 (40,000-40,000) | - | 1.00 | 2.00 | 3.00 |  |  |  |" in text
    assert "| 1 | rayplane | 2,500 (2,400-2,600) | - | 1.60 | 3.20 | 4.80 | 0.60 | 1.20 | 1.80 |" in text
    assert (
        "| 1 | rayplane | 29 | 2.000 | 35.00 | 70.00 | 105.00 | 1.00 | 2.00 | 3.00 | 0.75 | 0.75 | 0.25 | 0.25 |"
        in text
    )
    assert "| litellm's | 25.00 | - | - | - | - | - |" in text
    assert "| vllm-router's | 0.50 | - | - | - | - | - |" in text
    assert text.endswith("\nA remark.")
    assert "steady rate" not in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1, table


# --- the soak


def samples(memory: Callable[[float], float]) -> list[gateway_soak.Sample]:
    def values(at: float) -> dict[str, float]:
        return {"memory MB": memory(at), "files": 50.0, "sockets": 40.0, "Redis MB": 1.0, "Redis keys": 9.0}

    return [gateway_soak.Sample(at, values(at), int(at), 0, 0, 1.0, 2.0) for at in map(float, range(0, 600, 5))]


def test_what_warms_up_is_flat_and_what_leaks_is_not() -> None:
    warm = gateway_soak.verdicts(samples(lambda at: 80 - 20 * math.exp(-at / 30)))
    assert all(flat for flat, _, _ in warm.values())
    flat, grown, _ = gateway_soak.verdicts(samples(lambda at: 80 + at / 60))["memory MB"]
    assert not flat
    assert grown == pytest.approx(445 / 60)
    noisy = gateway_soak.verdicts(samples(lambda at: 80 + (at % 15) / 5))
    assert noisy["memory MB"][0]
    # Drawn at random: a line through it rises by some megabytes, or falls.
    draw = random.Random(3)
    scatter = {at: draw.gauss(50, 15) for at in map(float, range(0, 600, 5))}
    assert gateway_soak.verdicts(samples(scatter.__getitem__))["memory MB"][0]
    assert not gateway_soak.verdicts(samples(lambda at: scatter[at] + at / 10))["memory MB"][0]


def test_the_soaks_table_has_its_first_and_last_sample() -> None:
    lines = gateway_soak.table(samples(lambda at: 80.0))
    assert lines[2].startswith("| 0 | 0 |")
    assert lines[-1].startswith("| 595 | 595 |")
    assert len({line.count("|") for line in lines}) == 1
