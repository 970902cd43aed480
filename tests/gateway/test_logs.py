"""Log lines: their shape, what they must not hold, and readers that do not read."""

from __future__ import annotations

import datetime
import fcntl
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import logs as module
from serve_app.gateway.config import Logging
from serve_app.gateway.keys import generate
from serve_app.gateway.logs import Logs, redact

PROJECT = Path(__file__).resolve().parents[2]
RECORD: dict[str, Any] = {
    "request_id": "req_1",
    "operation": "chat",
    "model": "m",
    "status": 200,
    "success": True,
    "client": "team-a",
    "input_tokens": 3,
    "output_tokens": 5,
    "latency_ms": 12.345,
}


class Sink:
    """A log whose lines can be looked at."""

    def __init__(self, config: Logging | None = None) -> None:
        self.text = io.StringIO()
        self.logs = Logs(config or Logging(), self.text)

    def lines(self) -> list[dict[str, Any]]:
        assert self.logs.flush()
        return [json.loads(line) for line in self.text.getvalue().splitlines()]


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.logs.close()


def test_a_request_is_one_line_with_the_names_that_the_design_fixes(sink: Sink) -> None:
    before = datetime.datetime.now(datetime.UTC)
    sink.logs.request(RECORD)
    (line,) = sink.lines()
    fixed = "timestamp level message request_id model input_tokens output_tokens latency_ms success client"
    assert set(fixed.split()) - set(line) == set()
    assert line["timestamp"].endswith("Z") and len(line["timestamp"]) == len("2026-01-01T00:00:00.000Z")
    said = datetime.datetime.fromisoformat(line["timestamp"])
    # Its milliseconds are cut off.
    assert before - datetime.timedelta(milliseconds=1) <= said <= datetime.datetime.now(datetime.UTC)
    assert {name: line[name] for name in RECORD} == RECORD
    assert (line["level"], line["message"]) == ("info", "request")


@pytest.mark.parametrize(
    ("success", "status", "level"),
    [(True, 200, "info"), (False, 429, "warning"), (False, 200, "warning"), (False, 502, "error")],
)
def test_the_level_tells_how_a_request_ended(sink: Sink, success: bool, status: int, level: str) -> None:
    sink.logs.request({**RECORD, "success": success, "status": status})
    assert [line["level"] for line in sink.lines()] == [level]


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels_below_the_configured_one_are_not_written(level: Any, said: list[str]) -> None:
    sink = Sink(Logging(level=level))
    for name in ("debug", "info", "warning", "error"):
        getattr(sink.logs, name)("x", name=name)
    sink.logs.request(RECORD)
    assert [line["level"] for line in sink.lines() if line["message"] == "x"] == said
    assert [line for line in sink.lines() if line["message"] == "request"] == [
        line for line in sink.lines() if line["message"] == "request" and level in ("debug", "info")
    ]
    sink.logs.close()


def test_request_lines_can_be_switched_off() -> None:
    sink = Sink(Logging(requests=False))
    sink.logs.request({**RECORD, "success": False, "status": 500})
    sink.logs.info("started", port=8080)
    assert [line["message"] for line in sink.lines()] == ["started"]
    sink.logs.close()


def test_a_text_cannot_forge_a_line(sink: Sink) -> None:
    sink.logs.request({**RECORD, "client": 'a"}\n{"level":"error","message":"forged"}'})
    (line,) = sink.lines()
    assert line["client"] == 'a"}\n{"level":"error","message":"forged"}'


def test_what_has_no_json_form_is_still_said(sink: Sink) -> None:
    sink.logs.info("odd", surrogate="a\ud800b", path=Path("/x"), raw=b"\xff", number=3, no=None)
    sink.logs.info("set", values={1, 2})
    first, second = sink.lines()
    assert (first["surrogate"], first["path"], first["number"], first["no"]) == ("a?b", "/x", 3, None)
    assert sorted(second["values"]) == [1, 2]


def test_long_texts_of_events_are_cut(sink: Sink) -> None:
    sink.logs.error("x" * 100_000, detail="y" * 100_000)
    (line,) = sink.lines()
    assert (len(line["message"]), len(line["detail"])) == (8192, 8192)


SECRETS = [
    (generate().key, 16),
    ("sk-proj-abcdefghijklmnopqrstuvwxyz0123456789", 3),
    ("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJlLWJ5dGVz", 0),
    ("AKIAIOSFODNN7EXAMPLE", 0),
]


@pytest.mark.parametrize(("secret", "shown"), SECRETS, ids=["own", "openai", "jwt", "aws"])
@pytest.mark.parametrize(
    "around", ["{}", "key {} refused", "\n{}\t", "\x1b{}", '"{}"', "Bearer {}", "(x={})", "ü{}", "\\{}"]
)
def test_keys_and_tokens_are_never_written(sink: Sink, secret: str, shown: int, around: str) -> None:
    text = around.format(secret)
    sink.logs.error(text, nested={"a": [text]})
    sink.logs.request({**RECORD, "client": text, "error": text})
    sink.logs.exception("failed", error=ValueError(text))
    written = sink.text.getvalue() if sink.logs.flush() else ""
    assert written.count("\n") == 3
    assert secret[shown:] not in written
    assert "redacted" in written
    assert all(json.loads(line)["level"] for line in written.splitlines())


def test_the_public_prefix_of_a_key_stays(sink: Sink) -> None:
    made = generate()
    sink.logs.warning(f"the key {made.key} is not known")
    assert sink.lines()[0]["message"] == f"the key {made.key[:15]}-[redacted] is not known"


def test_other_secrets_are_taken_out(sink: Sink) -> None:
    pem = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIabcd+/=\nxyz\n-----END EC PRIVATE KEY-----"
    sink.logs.error(
        "away", url="rediss://user:hunter2@store:6379/0", pem=f'"{pem}"', header="authorization: Bearer abcdefgh123"
    )
    (line,) = sink.lines()
    assert line["url"] == "rediss://[redacted]@store:6379/0"
    assert line["pem"] == '"[redacted key]"'
    assert line["header"] == "authorization: Bearer [redacted]"


def test_words_that_only_look_like_keys_stay() -> None:
    for text in (
        b"task-queue-of-the-scheduler",
        b"http://backend:8000/v1 user@example.com",
        b"sk-short",
        b"rp-gateway",
    ):
        assert redact(text) == text


@given(st.text(max_size=200), st.sampled_from([secret for secret, _ in SECRETS]), st.text(max_size=50))
def test_a_redacted_line_is_still_json(before: str, secret: str, after: str) -> None:
    for text in (before + secret + after, before + "-----BEGIN RSA PRIVATE KEY-----" + after + '"'):
        line = json.dumps({"a": text, "b": [text]}, ensure_ascii=False).encode(errors="replace")
        assert set(json.loads(redact(line))) == {"a", "b"}


def test_pythons_own_logging_has_the_same_shape(sink: Sink) -> None:
    sink.logs.start()
    sink.logs.start()
    logger = logging.getLogger("asyncio.test")
    try:
        raise RuntimeError("sk-abcdefghijklmnopqrstuv")
    except RuntimeError:
        logger.exception("task %s failed", "t1")
    logger.warning("slow %d", 3)
    logger.critical("down")
    sink.logs.close()
    logger.warning("after the end")
    lines = [json.loads(line) for line in sink.text.getvalue().splitlines()]
    assert [(line["level"], line["message"], line["logger"]) for line in lines] == [
        ("error", "task t1 failed", "asyncio.test"),
        ("warning", "slow 3", "asyncio.test"),
        ("error", "down", "asyncio.test"),
    ]
    assert "RuntimeError: sk-[redacted]" in lines[0]["exception"]
    assert "test_logs.py" in lines[0]["exception"]


def test_a_record_whose_arguments_do_not_fit_is_said_as_it_is(sink: Sink) -> None:
    sink.logs.start()
    handler = logging.getLogger().handlers[-1]
    handler.handle(logging.LogRecord("lib", logging.WARNING, __file__, 1, "%d of %d", ("x",), None))
    assert [(line["logger"], line["message"]) for line in sink.lines()] == [("lib", "%d of %d")]


def test_lines_come_whole_and_in_order_from_many_threads() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "w") as stream:
        made = Logs(Logging(), stream)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.extend(source))
        reader.start()

        def say(thread: int) -> None:
            for number in range(500):
                made.info("x", thread=thread, number=number, filling="y" * 300)

        threads = [threading.Thread(target=say, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.close()
        stream.close()
        reader.join()
    lines = [json.loads(line) for line in got]
    assert len(lines) == 2000
    assert made.dropped == 0
    for thread_number in range(4):
        assert [line["number"] for line in lines if line["thread"] == thread_number] == list(range(500))


def test_a_reader_that_does_not_read_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUEUE_BYTES", 200_000)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "w") as stream:
        made = Logs(Logging(), stream)
        said = 5000
        for number in range(said):
            made.info("x", number=number, filling="y" * 200)
        # Nobody has read a byte, and everything was said; the pipe holds 64 KiB and the queue its bound.
        assert 0 < made.dropped < said
        assert not made.flush(0.05)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.extend(source))
        reader.start()
        assert made.flush(20)
        dropped = made.dropped
        made.info("afterwards")
        made.close()
        stream.close()
        reader.join()
    lines = [json.loads(line) for line in got]
    lost = sum(line.get("lost", 0) for line in lines)
    assert lost == dropped
    assert len([line for line in lines if line["message"] == "x"]) == said - dropped
    assert "afterwards" in [line["message"] for line in lines]


def test_a_reader_that_never_reads_does_not_hold_up_the_end() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb"), os.fdopen(writing, "w") as stream:
        made = Logs(Logging(), stream)
        for _ in range(1000):
            made.info("x", filling="y" * 200)
        made.close(0.1)
        assert made._thread is not None and made._thread.is_alive()
        made.info("too late")
        assert made.dropped == 1
        os.read(reading, 1 << 20)
        os.read(reading, 1 << 20)
        while made._thread.is_alive():
            os.set_blocking(reading, False)
            try:
                os.read(reading, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)


def test_a_reader_that_is_gone_costs_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        made = Logs(Logging(), stream)
        made.info("x")
        made.info("y")
        assert made.flush()
        made.close()
    assert made.dropped == 2


class Failing(io.StringIO):
    """A stream whose first writes fail."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def write(self, text: str) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError("no space left on device")
        return super().write(text)


def test_lines_that_could_not_be_written_are_named_once_writing_works() -> None:
    stream = Failing(2)
    made = Logs(Logging(), stream)
    for number in range(4):
        made.info("x", number=number)
        assert made.flush()
    made.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("number", line.get("lost")) for line in lines] == [2, 2, 3]
    assert made.dropped == 2


def test_an_end_that_comes_between_two_waits_is_seen() -> None:
    made = Logs(Logging(), io.StringIO())

    class Late(threading.Event):
        """It is set in the moment after its wait has run out."""

        def wait(self, timeout: float | None = None) -> bool:
            if self.is_set():
                return True
            self.set()
            made._wake.set()
            return False

    made._closing = Late()
    made.info("x")
    assert made._thread is not None
    made._thread.join(20)
    assert not made._thread.is_alive()


def test_a_pipe_that_somebody_made_non_blocking_gets_every_line() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETFL, os.O_NONBLOCK)
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "w") as stream:
        made = Logs(Logging(), stream)
        for number in range(2000):
            made.info("x", number=number, filling="y" * 200)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.extend(source))
        reader.start()
        assert made.flush(20)
        made.close()
        stream.close()
        reader.join()
    assert [json.loads(line)["number"] for line in got] == list(range(2000))


def test_what_was_said_last_is_written_when_the_process_ends() -> None:
    code = (
        "from serve_app.gateway.logs import Logs\n"
        "from serve_app.gateway.config import Logging\n"
        "logs = Logs(Logging())\n"
        "for number in range(1000): logs.info('x', number=number)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, check=True, timeout=60)
    assert [json.loads(line)["number"] for line in done.stdout.splitlines()] == list(range(1000))
    assert done.stderr == b""


def test_an_idle_log_has_no_thread() -> None:
    before = set(threading.enumerate())
    made = Logs(Logging(), io.StringIO())
    made.debug("not written")
    assert set(threading.enumerate()) <= before
    made.close()
