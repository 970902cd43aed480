"""One JSON object a line, for requests and for events.

A line is encoded where it arises and put on a bounded queue; a thread writes the queue every 50 ms. A reader that does
not read (a full pipe) therefore stops that thread alone: requests go on, the queue fills to its bound, and what comes
beyond is counted and named in the first line that gets through afterwards.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

import msgspec

from .config import Logging

#: What the queue holds at most, in bytes.
MAX_QUEUE_BYTES = 8 * 1024 * 1024
#: A longer text of an event is cut.
_MAX_MESSAGE = 8192
_GATHER_S = 0.05
#: How long `close` waits for a reader.
_CLOSE_S = 2.0

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

#: Bytes that every secret below contains; a line without any of them needs no further look.
_MARKS = (b"rp-", b"sk-", b"eyJ", b"earer ", b"://", b"PRIVATE KEY", b"AKIA")
# A word begins here: after a control character, too, which the line holds as an escape (`\n`, `\u001b`).
_START = rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-f]{4}))"
# They match no quotation mark and no lone backslash, so that a line stays JSON.
_SECRETS: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    # The public prefix of our own keys stays: by it an operator finds the key.
    (re.compile(_START + rb"rp-([A-Za-z0-9]{12})-[A-Za-z0-9_-]{8,}"), rb"rp-\1-[redacted]"),
    (re.compile(_START + rb"(rp|sk)-[A-Za-z0-9_-]{16,}"), rb"\1-[redacted]"),
    (re.compile(_START + rb"eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){0,4}"), b"[redacted token]"),
    (re.compile(rb"([Bb]earer) +[A-Za-z0-9._~+/=-]{8,}"), rb"\1 [redacted]"),
    (re.compile(rb"://[^/@\s\"\\]{0,256}@"), b"://[redacted]@"),
    (
        re.compile(
            rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?:[A-Za-z0-9+/=\s]|\\[nr])*"
            rb"(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
        ),
        b"[redacted key]",
    ),
    (re.compile(_START + rb"AKIA[0-9A-Z]{16}"), b"[redacted key]"),
)


def redact(line: bytes) -> bytes:
    """`line` without anything that looks like a key, a token or a password in a URL."""
    if any(mark in line for mark in _MARKS):
        for pattern, instead in _SECRETS:
            line = pattern.sub(instead, line)
    return line


def _plain(value: object) -> object:
    """`value` as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value).encode(errors="replace").decode()


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=20))


class Logs:
    """The process's log.

    Args:
        config: Level, and whether requests are logged.
        stream: Where lines go; standard output if none is given.
    """

    def __init__(self, config: Logging, stream: TextIO | None = None) -> None:
        self.config = config
        #: Lines lost so far, because nobody read them or they could not be written.
        self.dropped = 0
        self._stream = sys.stdout if stream is None else stream
        try:
            self._descriptor: int | None = self._stream.fileno()
        except (OSError, AttributeError, ValueError):
            self._descriptor = None
        self._threshold = _LEVELS[config.level]
        self._encoder = msgspec.json.Encoder(enc_hook=str)
        self._queue: list[bytes] = []
        self._queued = 0
        self._reported = 0
        self._stamp = (0, "")
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler: _Handler | None = None

    # -- what the gateway says ------------------------------------------------------------------------------

    def request(self, record: Mapping[str, Any]) -> None:
        """A request's line: level `error` if it failed with a status from 500 on, `warning` if otherwise, else `info`.

        Args:
            record: At least `request_id`, `model`, `input_tokens`, `output_tokens`, `latency_ms`, `success`, `client`
                and `status`; whatever else there is to say (`operation`, `tenant`, `key`, `backend`, `ttft_ms`,
                `cache`, `error` ...). A stream that broke after its status was sent has `success` false and an `error`.
        """
        level = "info" if record["success"] else "error" if record["status"] >= 500 else "warning"
        if self.config.requests and _LEVELS[level] >= self._threshold:
            self._put({"timestamp": self._now(), "level": level, "message": "request", **record})

    def debug(self, message: str, /, **fields: Any) -> None:
        """An event that matters while looking for a mistake."""
        self._event("debug", message, fields)

    def info(self, message: str, /, **fields: Any) -> None:
        """An event of ordinary life: started, policy taken over."""
        self._event("info", message, fields)

    def warning(self, message: str, /, **fields: Any) -> None:
        """Something is wrong, and the gateway copes."""
        self._event("warning", message, fields)

    def error(self, message: str, /, **fields: Any) -> None:
        """Something is wrong and requests suffer, or will."""
        self._event("error", message, fields)

    def exception(self, message: str, /, error: BaseException, **fields: Any) -> None:
        """A mistake of the gateway's own, with where it happened."""
        self._event("error", message, {**fields, "exception": _told(error)})

    def start(self) -> None:
        """Take over what Python's own logging says (asyncio, uvicorn, aiohttp), so that every line has one shape."""
        if self._handler is None:
            self._handler = _Handler(self)
            logging.getLogger().addHandler(self._handler)

    # -- how it gets out ------------------------------------------------------------------------------------

    def flush(self, timeout: float = _CLOSE_S) -> bool:
        """Wait until everything said so far is written, at most `timeout` seconds; false if it is not."""
        deadline = time.monotonic() + timeout
        while self._queued:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def close(self, timeout: float = _CLOSE_S) -> None:
        """Write what is left, wait for a slow reader `timeout` seconds at most, and stop. Later lines are lost."""
        atexit.unregister(self.close)
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler = None
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _now(self) -> str:
        now = time.time()
        second, prefix = self._stamp
        if int(now) != second:
            second = int(now)
            prefix = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
            self._stamp = (second, prefix)
        return f"{prefix}{int((now - second) * 1000):03d}Z"

    def _event(self, level: str, message: str, fields: dict[str, Any]) -> None:
        if _LEVELS[level] < self._threshold:
            return
        line = {"timestamp": self._now(), "level": level, "message": message[:_MAX_MESSAGE]}
        for name, value in fields.items():
            line[name] = value[:_MAX_MESSAGE] if isinstance(value, str) else value
        self._put(line)

    def _put(self, line: dict[str, Any]) -> None:
        try:
            text = self._encoder.encode(line)
        except (ValueError, TypeError, RecursionError):
            # Half a surrogate pair in a caller's text, or a value without a JSON form; the line matters more.
            text = self._encoder.encode({name: _plain(value) for name, value in line.items()})
        text = redact(text) + b"\n"
        with self._lock:
            if self._queued + len(text) > MAX_QUEUE_BYTES or self._closing.is_set():
                self.dropped += 1
                return
            self._queue.append(text)
            self._queued += len(text)
            first = len(self._queue) == 1
        if first:
            if self._thread is None:
                self._start()
            self._wake.set()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()
        # A daemon thread ends with the interpreter wherever it stands, so what is queued is written before.
        atexit.register(self.close)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._closing.wait(_GATHER_S)
            with self._lock:
                lines, self._queue = self._queue, []
                lost, self._reported = self.dropped - self._reported, self.dropped
            size = sum(map(len, lines))
            told = [self._lost(lost)] if lost else []
            written = not (lines or told) or self._write(b"".join(lines + told))
            with self._lock:
                if not written:
                    self.dropped += len(lines)
                    self._reported -= lost
                # Lines count until they are written, so that the bound holds for those under way as well.
                self._queued -= size
                ending = ending and not self._queue
            if ending:
                return

    def _lost(self, number: int) -> bytes:
        message = f"{number} log lines were lost: nobody read them in time"
        line = {"timestamp": self._now(), "level": "warning", "message": message, "lost": number}
        return self._encoder.encode(line) + b"\n"

    def _write(self, text: bytes) -> bool:
        try:
            if self._descriptor is None:
                self._stream.write(text.decode())
                self._stream.flush()
                return True
            rest = memoryview(text)
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:
                    # Whoever shares this terminal or pipe made it non-blocking.
                    select.select([], [self._descriptor], [])
        except (OSError, ValueError):
            return False
        return True


class _Handler(logging.Handler):
    """Records of Python's logging as lines of ours."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= 40 else "warning" if record.levelno >= 30 else "info"
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = _told(record.exc_info[1])
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        self._logs._event(level, message, fields)
