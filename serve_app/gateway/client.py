"""HTTP/1.1 to one server: connections that are kept, and answers that are read as they arrive.

llhttp (through httptools) reads what comes, and takes nothing that is not HTTP/1.1 to the letter. A general client
(aiohttp) stood here before; it took two fifths of the gateway's time for a request, and a third of its start. What a
gateway needs of one is little: it sends bodies that are whole, follows no redirects, keeps no cookies, decodes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools
from aiohappyeyeballs import start_connection

Header = tuple[bytes, bytes]

#: uvicorn (and so vLLM) closes idle connections after 5 s. Who closes first never sends into a closing connection.
KEEP_ALIVE_S: Final = 4.0
#: Headless services and failed-over names change their addresses.
_RESOLVED_S: Final = 5.0
#: RFC 8305: how long the first address is tried before the next one is tried beside it.
_NEXT_ADDRESS_S: Final = 0.25
#: A server whose host is silent is asked for a sign of life: after so many seconds, and so many times.
_PROBE_S: Final = 10
_PROBES: Final = 3
#: Bytes of a body that wait to be read before the server is held up.
_HIGH_WATER: Final = 256 * 1024
#: Bytes without a piece of a body: an answer's head, a chunk's extensions, trailers.
_MAX_QUIET: Final = 128 * 1024
#: Rounds of the loop until a connection over TLS is closed, and some more.
_ROUNDS: Final = 16
#: Larger bodies are not copied behind their head.
_JOINED: Final = 64 * 1024


class ClientError(Exception):
    """There is no answer, or no more of it."""


class ConnectError(ClientError):
    """The server cannot be reached."""


class BrokenError(ClientError):
    """The connection ended before the answer did."""


class GarbageError(ClientError):
    """What the server sent is no HTTP/1.1 answer."""


class Response:
    """An answer. What came before it broke can be read, and then raises."""

    __slots__ = ("_connection", "_error", "_pieces", "_size", "_waiter", "complete", "headers", "status")

    def __init__(self, connection: Connection) -> None:
        #: 0 until the head has come.
        self.status = 0
        #: As they came, names in lower case.
        self.headers: list[Header] = []
        #: All of it has come.
        self.complete = False
        self._connection: Connection | None = connection
        self._error: Exception | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None

    @property
    def over(self) -> bool:
        """All of it has come and been read."""
        return self.complete and not self._pieces

    async def first(self) -> bytes:
        """Wait for the head and the body's first bytes (none where the body is empty).

        Raises:
            ClientError: The answer broke before they were read, or what `fail` was told.
        """
        while not (self._error or (self.status and (self._pieces or self.complete))):
            await self._more()
        if self._error is not None:
            raise self._error
        return self.take()

    async def piece(self) -> bytes:
        """The body's next bytes, as soon as there are any; none at its end.

        Raises:
            ClientError: The answer broke, or what `fail` was told.
        """
        while not (self._pieces or self.complete):
            if self._error is not None:
                raise self._error
            await self._more()
        return self.take()

    def take(self) -> bytes:
        """The bytes that are there, without waiting."""
        pieces = self._pieces
        if not pieces:
            return b""
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._size > _HIGH_WATER and self._connection is not None:
            self._connection.go_on()
        self._size = 0
        return piece

    def fail(self, error: Exception) -> None:
        """End it: whoever reads gets what has come, and then this error."""
        if not self.complete and self._error is None:
            self._error = error
        self.close()
        self._wake()

    def close(self) -> None:
        """Do without the rest. Closing the connection is what makes a server stop its work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    async def _more(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # What the connection tells.

    def got(self, body: bytes) -> bool:
        """Some of the body has come; whether more of it waits to be read than should."""
        self._pieces.append(body)
        self._size += len(body)
        return self._size > _HIGH_WATER

    def told(self) -> None:
        """What came together has been taken in."""
        if self.status and (self._pieces or self.complete):
            self._wake()

    def ended(self) -> None:
        """The connection has nothing more to do with it."""
        self._connection = None

    def whole_at_end(self) -> bool:
        """Whether the end of the connection is the body's end: its length is not told (RFC 9112, section 6.3)."""
        return bool(self.status) and not any(
            name in (b"content-length", b"transfer-encoding") for name, _ in self.headers
        )


class Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self, owner: Connections) -> None:
        self.idle_since = 0.0
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._interim = False
        self._cut = False
        self._keep = False
        self._paused = False
        self._quiet = 0

    @property
    def usable(self) -> bool:
        """Whether a request can be sent."""
        transport = self._transport
        return transport is not None and not transport.is_closing()

    def send(self, head: bytes, body: bytes) -> Response:
        """Send a request; the connection is given back by itself when its answer has come.

        Args:
            head: Request line and header lines, with the empty line.
            body: As long as the head says.
        """
        transport = self._transport
        assert transport is not None
        response = self._response = Response(self)
        self._quiet = 0
        if len(body) <= _JOINED:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        return response

    def abort(self) -> None:
        """Close it at once. What was under way is not whole, whatever it looks like."""
        self._cut = True
        if self._transport is not None:
            self._transport.abort()

    def go_on(self) -> None:
        """Read again, after more had come than was read."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    # --- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if hasattr(transport, "set_read_buffer_limits"):
            # Over TLS: otherwise a pause holds up the reader alone, and what the socket goes on to give, a close
            # behind a large answer say, would throw away what was not read.
            transport.set_read_buffer_limits(1)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            # Nothing was asked.
            self.abort()
            return
        self._quiet += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not response.complete:
                response.fail(GarbageError(str(error)))
                return
            self._keep = False
        if response.complete:
            self._give_back(response)
        elif self._quiet > _MAX_QUIET:
            response.fail(GarbageError("the head has no end"))
            return
        response.told()

    def _give_back(self, response: Response) -> None:
        self._response = None
        response.ended()
        transport = self._transport
        assert transport is not None
        self.go_on()
        # An answer may come before its request has been sent.
        if self._keep and not transport.is_closing() and not transport.get_write_buffer_size():
            self._owner.give_back(self)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        response, self._response = self._response, None
        self._transport = None
        # The parser holds this object's methods, and this object holds the parser.
        self._parser = None
        self._owner.lost(self)
        if response is None:
            return
        response.ended()
        if exc is None and not self._cut and response.whole_at_end():
            response.complete = True
            response.told()
        else:
            response.fail(BrokenError(str(exc or "the connection was closed")))

    # --- what the parser finds

    def on_message_begin(self) -> None:
        if self._response is not None and self._response.complete:
            # What comes behind the answer was not asked for.
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the answer's end comes what nobody asked for, and after its head trailers, which nobody reads.
        response = self._response
        if response is not None and not response.status:
            response.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        response = self._response
        if response is None or response.complete:
            return
        status = self._parser.get_status_code()
        if status < 100:
            raise GarbageError(f"status {status}")
        if status < 200:
            # 100, 102 and 103 announce the answer, and are not it.
            self._interim = True
            response.headers.clear()
            return
        response.status = status

    def on_body(self, body: bytes) -> None:
        response = self._response
        if response is None or response.complete:
            return
        self._quiet = 0
        if response.got(body) and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif self._response is not None and not self._response.complete:
            self._response.complete = True
            self._keep = self._parser.should_keep_alive()


class Connections:
    """Connections to one server.

    Args:
        url: Its scheme, host and port count.
        tls: How certificates are checked; asked when the first connection over TLS is opened.
        idle: So many are kept at most.
        most: So many are open at most (0: no bound); who needs one more waits.
    """

    def __init__(self, url: str, *, tls: Callable[[], ssl.SSLContext], idle: int, most: int = 0) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        # A dot at the end keeps resolvers from their search lists, and is no part of the name itself.
        self._name = self._host.rstrip(".")
        host = f"[{self._host}]" if ":" in self._host else self._name
        told = f"{host}:{parts.port}" if parts.port else host
        #: What the header Host says.
        self.host = told.encode("ascii") if told.isascii() else told.encode("idna")
        self._tls = tls
        self._most_idle = idle
        self._most = most
        self._open = 0
        self._closed = False
        self._all: set[Connection] = set()
        #: The one used last is at the end, and the first to be used again.
        self._idle: dict[Connection, None] = {}
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self._addresses: list[Any] = []
        self._stale_at = 0.0
        self._turn = 0
        self._resolving: asyncio.Task[list[Any]] | None = None

    def __len__(self) -> int:
        """Connections that are open."""
        return len(self._all)

    def kept(self) -> Connection | None:
        """One that is kept, if there is one."""
        idle = self._idle
        while idle:
            connection = idle.popitem()[0]
            # Only now is it certain how long it was idle: the sweeper comes when the loop has time.
            if connection.usable and asyncio.get_running_loop().time() - connection.idle_since < KEEP_ALIVE_S:
                return connection
            connection.abort()
        return None

    async def open(self) -> Connection:
        """Open one, or wait until there may be one more.

        Raises:
            ConnectError: The server cannot be reached.
            OSError: The files that `tls` reads cannot be read.
        """
        while self._most and self._open >= self._most:
            connection = await self._wait()
            if connection is None:
                break
            if connection.usable:
                return connection
        else:
            self._open += 1
        opened = False
        try:
            connection = await self._connect()
            opened = True
        finally:
            if not opened:
                self._free()
        self._all.add(connection)
        if self._closed:
            connection.abort()
        if not connection.usable:
            self.lost(connection)
            raise ConnectError("the connection was closed at once")
        return connection

    async def _wait(self) -> Connection | None:
        """A connection that is given back, or the right to open one."""
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                connection = waiter.result()
                if connection is None:
                    self._free()
                else:
                    self.give_back(connection)
            raise

    async def _connect(self) -> Connection:
        context = self._tls() if self._secure else None
        loop = asyncio.get_running_loop()
        try:
            addresses = await self._resolve()
            sock = await start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S, loop=loop)
            try:
                _tune(sock)
                _, connection = await loop.create_connection(
                    lambda: Connection(self),
                    sock=sock,
                    ssl=context,
                    server_hostname=self._name if context is not None else None,
                )
            except BaseException:
                sock.close()
                raise
        except (OSError, RuntimeError, UnicodeError) as error:
            # RuntimeError: what uvloop says of sockets that were closed meanwhile. UnicodeError: of impossible names.
            raise ConnectError(str(error)) from error
        return connection

    async def _resolve(self) -> list[Any]:
        loop = asyncio.get_running_loop()
        addresses = self._addresses
        if loop.time() >= self._stale_at:
            # One look-up for all who wait; who gives up leaves it to the others, and to the next one.
            if self._resolving is None:
                self._resolving = loop.create_task(_look_up(self._host, self._port))
                self._resolving.add_done_callback(self._resolved)
            addresses = await asyncio.shield(self._resolving)
        if not addresses:
            raise OSError("the name has no address")
        # Each in turn: the resolver's order would send everything to one of a headless service's pods.
        self._turn = turn = (self._turn + 1) % len(addresses)
        return addresses[turn:] + addresses[:turn]

    def _resolved(self, done: asyncio.Task[list[Any]]) -> None:
        self._resolving = None
        if not done.cancelled() and done.exception() is None:
            self._addresses = done.result()
            self._stale_at = asyncio.get_running_loop().time() + _RESOLVED_S

    def give_back(self, connection: Connection) -> None:
        """Take a connection whose answer has come."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        if len(self._idle) >= self._most_idle:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle[connection] = None
        if self._sweeper is None:
            self._sweeper = loop.call_later(KEEP_ALIVE_S, self._sweep)

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        self._idle.pop(connection, None)
        if connection in self._all:
            self._all.discard(connection)
            self._free()

    def _free(self) -> None:
        """There is room for one more."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._open -= 1

    def _sweep(self) -> None:
        self._sweeper = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle:
            oldest = next(iter(self._idle))
            due = oldest.idle_since + KEEP_ALIVE_S
            if due > now:
                self._sweeper = loop.call_at(due, self._sweep)
                return
            del self._idle[oldest]
            oldest.abort()

    async def let_go(self) -> None:
        """Close what is idle, and from now on every connection after its answer."""
        self._most_idle = 0
        await self._end(self._idle)

    async def close(self) -> None:
        """Close all connections for good; requests under way fail."""
        self._closed = True
        if self._resolving is not None:
            self._resolving.cancel()
        await self._end(self._all)

    async def _end(self, those: Iterable[Connection]) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        ending = list(those)
        self._idle.clear()
        for connection in ending:
            connection.abort()
        # The loop closes sockets in its next rounds.
        for _ in range(_ROUNDS):
            if self._all.isdisjoint(ending):
                break
            await asyncio.sleep(0)


def _tune(sock: socket.socket) -> None:
    """A host that is gone says nothing: it is found long before the time-outs of an answer that may take minutes."""
    options = [(socket.IPPROTO_TCP, "TCP_NODELAY", 1), (socket.SOL_SOCKET, "SO_KEEPALIVE", 1)]
    options += [(socket.IPPROTO_TCP, "TCP_KEEPIDLE", _PROBE_S), (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_S)]
    options += [(socket.IPPROTO_TCP, "TCP_KEEPCNT", _PROBES)]
    for level, name, value in options:
        # Not every system has all of them.
        with contextlib.suppress(AttributeError, OSError):
            sock.setsockopt(level, getattr(socket, name), value)


async def _look_up(host: str, port: int) -> list[Any]:
    return list(await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))
