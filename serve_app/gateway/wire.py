"""HTTP/1.1 on one connection: what is no request is refused, and whoever does not go on is not waited for.

uvicorn's protocol (httptools, that is llhttp) reads and writes; here is what it leaves open. A refusal has OpenAI's
shape and is the connection's last answer. Where a request could be read in two ways (RFC 9112, sections 6.1 and 11.2)
it is refused, so that no proxy in front takes for a body what would be a request here. The wish for another protocol
(Upgrade) is ignored.

A connection is looked at every few seconds, instead of having a timer for each request and each write:

* a head has to be there so many seconds after its first byte;
* an answer that waits to be sent goes on as long as the client takes some of it (by the kernel's count of acknowledged
  bytes, since buffers on both sides hide what a slow reader does);
* after an answer given before its request was read to the end, the client may send the rest for a while: closing at
  once would reset the connection, and the answer would be lost on the way (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import math
import re
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .errors import GatewayError, InvalidRequest
from .request import Message

#: Names and values of a request's headers, with its target: more is refused with 431, as proxies do.
MAX_HEADER_BYTES: Final = 32 * 1024
#: Bytes without an end of a head, or a piece of a body: a single header, trailers, a chunk's extensions.
_MAX_QUIET: Final = 2 * MAX_HEADER_BYTES
#: After the last answer, a client may go on sending for so many seconds: in all, and without a pause.
LINGER_S: Final = 30.0
LINGER_IDLE_S: Final = 5.0
#: The connection's handle in an ASGI scope: a `Wire`.
SCOPE_KEY: Final = "rayplane.wire"
#: In an ASGI scope, and true, as soon as the request has been read to its end.
WHOLE_KEY: Final = "rayplane.whole"

#: Where `struct tcp_info` (linux/tcp.h) has `tcpi_bytes_acked`.
_ACKED: Final = slice(120, 128)
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a client may take, in seconds."""

    #: For a request's head, from its first byte (or from the connection's begin).
    head_s: float = 20.0
    #: For taking any of what is to be sent.
    write_s: float = 60.0
    #: Called with the client's address and the bytes left when a client took nothing for so long.
    dropped: Callable[[str, int], None] | None = None


class Wire:
    """A connection as an answer sees it. uvicorn takes it for the transport until the request has been read."""

    __slots__ = ("_on_lost", "_protocol", "is_closing", "too_slow", "write")

    def __init__(self, protocol: BoundedProtocol, transport: asyncio.Transport) -> None:
        self._protocol: BoundedProtocol | None = protocol
        self._on_lost: Callable[[], None] | None = None
        self.write = transport.write
        self.is_closing = transport.is_closing
        #: The client took nothing of an answer for too long.
        self.too_slow = False

    def close(self) -> None:
        """End the connection after what was written; the client may first send what it has begun to."""
        if self._protocol is not None:
            self._protocol.linger()

    def abort(self) -> None:
        """End it at once by a reset, so that nobody takes what was sent so far for a whole answer."""
        if self._protocol is not None:
            self._protocol.abort()

    def say(self, message: Message) -> bool:
        """Send a message of the answer under way, unless something still waits to be sent; whether it was."""
        cycle = None if self._protocol is None else self._protocol.running
        if cycle is None or cycle.disconnected or cycle.response_complete or cycle.flow.write_paused:
            return False
        cast(_Cycle, cycle).send(message)
        return True

    def watch(self, on_lost: Callable[[], None] | None) -> bool:
        """Call `on_lost` (of the answer under way; None: nothing any more) when the connection ends; false: it has."""
        protocol = self._protocol
        if protocol is None:
            return False
        self._on_lost = on_lost
        if on_lost is not None:
            # A large body may have stopped it; an end that is not read is not seen.
            protocol.flow.resume_reading()
        return True

    def lost(self) -> None:
        """The connection is gone."""
        self._protocol = None
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()


class _Done:
    """Something to wait for that has happened."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


_DONE: Final = _Done()
#: What stands in no header, but for the ends of lines.
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


#: Larger bodies are not copied behind their head.
_JOINED: Final = 64 * 1024


class _Cycle(RequestResponseCycle):
    """uvicorn's request and answer. It looks at each header by itself, and sends an answer's head before its body; here
    both are written in one go, for each write is a system call.
    """

    #: A head that waits for the body's first piece.
    _head = b""
    #: The end of the connection is the body's: HTTP/1.0 knows no chunks.
    _to_end = False

    def send(self, message: Any) -> Awaitable[None]:  # type: ignore[override]
        if self.disconnected or self.flow.write_paused or self.response_complete:
            return self._wait(message)
        kind = message["type"]
        if kind == "http.response.body" and self.response_started:
            self._body(message)
            return _DONE
        if kind == "http.response.start" and not self.response_started and self._start(message):
            return _DONE
        return super().send(message)

    async def _wait(self, message: Any) -> None:
        if self._head and not self.disconnected:
            self.transport.write(self._head)
        self._head = b""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected or self.response_complete:
            await super().send(message)
        else:
            await self.send(message)

    def _start(self, message: Any) -> bool:
        status = message["status"]
        lines = [STATUS_LINE[status]]
        length = None
        for one in (*self.default_headers, *message["headers"]):
            if one[0] == b"content-length":
                length = one[1]
            elif one[0] == b"connection" or one[0] == b"transfer-encoding":
                return False
            lines.append(b"%s: %s\r\n" % one)
        text = b"".join(lines)
        ends = len(lines)
        if text.count(b"\n") != ends or text.count(b"\r") != ends or _CONTROL.search(text):
            raise RuntimeError("a header of the answer holds what no header can")
        self.response_started = True
        self.waiting_for_100_continue = False
        if length is not None:
            self.expected_content_length = int(length)
            self.chunked_encoding = False
        elif self.scope["http_version"] == "1.0":
            self._to_end = True
            self.chunked_encoding = self.keep_alive = False
        elif self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            text += b"transfer-encoding: chunked\r\n"
        self._head = text + (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        return True

    def _body(self, message: Any) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        head, self._head = self._head, b""
        if self.scope["method"] == "HEAD":
            body = b""
            self.expected_content_length = 0
        elif self.chunked_encoding:
            if body:
                body = b"%x\r\n%s\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        elif not self._to_end:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("the answer is longer than its Content-Length")
        if head and len(body) > _JOINED:
            self.transport.write(head)
            head = b""
        if head or body:
            self.transport.write(head + body if head else body)
        if more:
            return
        if self.expected_content_length:
            raise RuntimeError("the answer is shorter than its Content-Length")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    bounds: ClassVar[Bounds] = Bounds()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        bounds = self.bounds
        self._wire = Wire(self, transport)
        #: The request that is being answered; uvicorn's `cycle` is the one read last, which may wait behind it.
        self.running: RequestResponseCycle | None = None
        #: Nothing is asked and nothing has come since the last answer.
        self._idle = False
        #: A head has begun and not ended.
        self._in_head = False
        self._head_bytes = 0
        self._head_by = self.loop.time() + bounds.head_s
        self._chunked = False
        #: Whether the request that is being read lets the connection go on.
        self._keep = False
        #: The head of a request that asks for another protocol, less that: to be read once more.
        self._once_more = b""
        #: Bytes that came since the last head or piece of a body ended.
        self._quiet = 0
        #: What comes is not read any more; `_ending`: the last answer was given, too.
        self._deaf = False
        self._ending = False
        self._end_by = self._end_at_last = math.inf
        #: The refusal of what stands behind requests that are still to be answered.
        self._last_words = b""
        #: Bytes to be sent, bytes acknowledged, and when one of them last showed that the client takes something.
        self._unsent = 0
        self._acked = 0
        self._moved = 0.0
        self._look_s = max(0.05, min(bounds.head_s, bounds.write_s) / 4)
        self._timer = self.loop.call_later(self._look_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._wire.lost()
        running = self.running
        if running is not None and running is not self.cycle and not running.response_complete:
            # uvicorn tells the last request alone.
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            if self._ending:
                self._end_by = min(self._end_at_last, self.loop.time() + LINGER_IDLE_S)
            return
        self._unset_keepalive_if_required()
        self._quiet += len(data)
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._refuse(_refusal(error))
            return
        if self._quiet > _MAX_QUIET:
            self._refuse(_too_large())
        elif self._idle:
            # The beginning of a head, or line ends before one: no reason to wait for ever.
            self._idle = False
            self._head_by = self.loop.time() + self.bounds.head_s

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._once_more:
                    raise
                data = self._once_more + data[upgrade.args[0] :]
                self._once_more = b""
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    # --- what the parser finds

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._chunked = False
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEADER_BYTES:
            raise _too_large()
        if not self._in_head:
            # A trailer. Read as headers they could name another caller than the head did (RFC 9110, section 6.5.1).
            return
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            if self._chunked or value.strip().lower() != b"chunked":
                raise InvalidRequest("Of transfer codings, chunked alone is understood, and once.")
            self._chunked = True
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        parser = self.parser
        if parser.should_upgrade():
            # llhttp takes the message for complete here, and a body would be read as the next request.
            self._once_more = self._without_upgrade()
            return
        version = parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                raise InvalidRequest("HTTP/1.1 and HTTP/1.0 are spoken here.", status=505)
            if self._chunked:
                raise InvalidRequest("HTTP/1.0 has no Transfer-Encoding.")
        cast(dict[str, Any], self.scope)[SCOPE_KEY] = self._wire
        super().on_headers_complete()
        self._in_head = self._idle = False
        self._head_by = math.inf
        # Until the request has been read to its end, an answer is the connection's last.
        cycle = self.cycle
        self._keep = cycle.keep_alive
        cycle.keep_alive = False
        cycle.transport = cast(asyncio.Transport, self._wire)

    def _without_upgrade(self) -> bytes:
        """The head that was read, without the wish for another protocol, which a server may ignore (RFC 9110, 7.8).

        Java's client sends it with the first request of a connection without TLS, and so does `curl --http2`.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise InvalidRequest("This is no proxy: CONNECT is not spoken here.")
        kept = [one for one in self.headers if one[0] not in (b"upgrade", b"connection", b"http2-settings")]
        if any(b"close" in value.lower() for name, value in self.headers if name == b"connection"):
            kept.append((b"connection", b"close"))
        lines = b"".join(b"%s: %s\r\n" % one for one in kept)
        return b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, self.parser.get_http_version().encode(), lines)

    def on_body(self, body: bytes) -> None:
        self._quiet = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._once_more:
            return
        self._quiet = 0
        cycle = self.cycle
        cast(dict[str, Any], cycle.scope)[WHOLE_KEY] = True
        cycle.transport = self.transport
        if not cycle.response_started:
            cycle.keep_alive = self._keep
        super().on_message_complete()

    # --- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        cycle.__class__ = _Cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self._ending:
            return
        waiting = bool(self.pipeline)
        super().on_response_complete()
        if waiting or self.transport.is_closing():
            return
        if self._last_words:
            self._say(self._last_words)
        else:
            self._idle = True
            if self._in_head:
                self._head_by = self.loop.time() + self.bounds.head_s

    def shutdown(self) -> None:
        self._keep = False
        if self._ending:
            self.transport.close()
        else:
            super().shutdown()

    def _refuse(self, error: GatewayError) -> None:
        """Answer what cannot be read, in its turn, and end the connection."""
        self._deaf = True
        self._head_by = math.inf
        body = error.body()
        lines = [b"%s: %s\r\n" % one for one in self.server_state.default_headers]
        status = http.HTTPStatus(error.status)
        words = (
            b"HTTP/1.1 %d %s\r\n%scontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
        )
        words %= status.value, status.phrase.encode(), b"".join(lines), len(body), body
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                self._last_words = words
                return
            # The body of the request read last is broken.
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
                self._last_words = words
                return
            if cycle.response_started:
                return  # its answer ends the connection
            cycle.disconnected = True
            cycle.message_event.set()
        self._say(words)

    def _say(self, words: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(words)
            self.linger()

    # --- ends

    def linger(self) -> None:
        """Send no more; read (and throw away) for a while what still comes."""
        self._deaf = True
        if self._ending or self.transport.is_closing():
            return
        self._ending = True
        self._unset_keepalive_if_required()
        now = self.loop.time()
        self._head_by = math.inf
        self._end_at_last = now + LINGER_S
        self._end_by = now + LINGER_IDLE_S
        self.flow.resume_reading()
        self.transport.write_eof()

    def abort(self) -> None:
        """End the connection at once, by a reset; nothing that is unsent is kept, here or in the kernel."""
        for cycle in (self.running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _look(self) -> None:
        """Is the connection getting on?"""
        now = self.loop.time()
        self._timer = self.loop.call_later(self._look_s, self._look)
        if self.transport.get_write_buffer_size():
            if not self._moves(now):
                self._wire.too_slow = True
                if self.bounds.dropped is not None:
                    self.bounds.dropped(self.client[0] if self.client else "", self._unsent)
                self.abort()
            return
        self._unsent = 0
        if now >= self._end_by:
            self.transport.close()
        elif now >= self._head_by:
            if self._in_head:
                self._refuse(
                    InvalidRequest("The request's head did not arrive in time.", status=408, code="request_timeout")
                )
            elif not self.transport.is_closing():
                self.transport.close()

    def _moves(self, now: float) -> bool:
        """Whether the client has taken some of what is to be sent, lately."""
        unsent, acked = self.transport.get_write_buffer_size(), 0
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                one = self.transport.get_extra_info("socket")
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.stop)
                acked = int.from_bytes(info[_ACKED], sys.byteorder)
        if not self._unsent or unsent < self._unsent or acked > self._acked:
            self._moved = now
        self._unsent, self._acked = unsent, acked
        return now - self._moved < self.bounds.write_s


def bounded(bounds: Bounds) -> type[BoundedProtocol]:
    """The protocol with these bounds."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})


def _too_large() -> GatewayError:
    limit = MAX_HEADER_BYTES // 1024
    return InvalidRequest(f"The request's head has more than {limit} KiB.", status=431, code="headers_too_large")


def _refusal(error: Exception) -> GatewayError:
    """What a caller is told about a parser's error."""
    if isinstance(error.__context__, GatewayError):
        return error.__context__
    if isinstance(error, httptools.HttpParserCallbackError):
        return InvalidRequest("The request's target cannot be read.")
    return InvalidRequest(f"This is no valid HTTP/1.1 request: {error}.")
