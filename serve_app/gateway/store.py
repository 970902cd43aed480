"""Redis, as the replicas share it: one fast ordered connection for limits, a common client for everything else.

The ordered connection (a pipe) matters for exactness: what is sent first is executed first, so a request's settlement
is counted before the next request of the same caller is admitted. It also costs a fraction of a general client's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from . import config

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: An answer: what Redis said, or why there is none.
Receive = Callable[[Any], None]

#: A word of a command.
Word = bytes | str | int | float

#: Seconds between two looks whether an idle connection still answers.
HEARTBEAT_S = 1.0
#: Seconds before the first and the later attempts to connect again.
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 2.0


class StoreError(Exception):
    """Redis did not answer: what was asked may or may not have been done."""


class StoreRefusedError(StoreError):
    """Redis answered with an error (out of memory, read-only, no such script); its text is the message."""


def pack(*words: Word) -> bytes:
    """A command as it goes over the wire."""
    packed: bytes = hiredis.pack_command(cast("Any", words))
    return packed


class Address:
    """Where a Redis url points: `redis://[user:password@]host[:port][/db]`, `rediss://` (TLS), `unix:///path?db=n`.

    TLS takes `ssl_ca_certs=PATH` and `ssl_cert_reqs=none|required` from the query, as redis-py does.

    Raises:
        ValueError: The url is none of these.
    """

    def __init__(self, url: str, password: str = "") -> None:
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.scheme not in ("redis", "rediss", "unix") or (parts.scheme != "unix" and not parts.hostname):
            raise ValueError("a Redis url begins with redis://, rediss:// or unix:// and names a host or a path")
        self.path = unquote(parts.path) if parts.scheme == "unix" else ""
        self.host = parts.hostname or ""
        self.port = parts.port or 6379
        named = query.get("db") or ("" if self.path else parts.path.strip("/"))
        if named and not named.isdigit():
            raise ValueError(f"the database of a Redis url is a number, not {named!r}")
        self.database = int(named or 0)
        self.user = unquote(parts.username or "")
        self.password = unquote(parts.password or "") or password
        self.tls: ssl.SSLContext | None = None
        if parts.scheme == "rediss":
            self.tls = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
            if query.get("ssl_cert_reqs", "required") == "none":
                self.tls.check_hostname = False
                self.tls.verify_mode = ssl.CERT_NONE

    def __str__(self) -> str:
        """For logs: without user and password."""
        return self.path or f"{self.host}:{self.port}"


class Pipe(asyncio.Protocol):
    """One connection; answers come in the order of the commands, each to its own receiver.

    A command without an answer within `timeout` ends the connection, and every receiver then gets `StoreError`.
    """

    def __init__(self, timeout: float, on_lost: Callable[[Pipe], None]) -> None:
        self._timeout = timeout
        self._on_lost = on_lost
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[Receive, float]] = deque()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.lost = False
        self.heard = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, packed: bytes, receive: Receive) -> None:
        """Send one packed command.

        Raises:
            StoreError: The connection has ended; nothing was sent.
        """
        if self.lost or self._transport is None:
            raise StoreError("the connection to Redis is lost")
        self._waiting.append((receive, self._loop.time() + self._timeout))
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._check)
        self._transport.write(packed)

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                if not self._waiting:
                    self.abort()
                    return
                receive, _ = self._waiting.popleft()
                receive(StoreRefusedError(str(reply)) if isinstance(reply, hiredis.ReplyError) else reply)
        except hiredis.ProtocolError:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._end("Redis closed the connection")

    def abort(self, reason: str = "Redis did not answer in time") -> None:
        """End the connection at once; what was sent may still be executed later."""
        if self._transport is not None:
            self._transport.abort()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self.lost:
            return
        self.lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._on_lost(self)
        waiting, self._waiting = self._waiting, deque()
        for receive, _ in waiting:
            receive(StoreError(reason))

    def _check(self, late: float = 0.0) -> None:
        self._timer = None
        if not self._waiting:
            return
        deadline = self._waiting[0][1]
        if deadline > self._loop.time():
            self._timer = self._loop.call_at(deadline, self._check)
        elif late == deadline:
            self.abort()
        else:
            # The answer may lie in the socket already if it was this loop that was late: look once more after reading.
            self._timer = self._loop.call_later(0.02, self._check, deadline)


class Store:
    """The shared store, or (with an empty url) none: `local` is True, and limits hold in this process alone."""

    def __init__(self, settings: config.Store) -> None:
        self.settings = settings
        self.local = not settings.url
        self.prefix = settings.prefix
        #: Redis answers and takes writes. Always True where local.
        self.available = self.local
        #: Called with the new value whenever `available` changes.
        self.on_state: list[Callable[[bool], None]] = []
        #: Awaited on each new connection before the store is available; what they raise ends the connection.
        self.on_connect: list[Callable[[], Awaitable[None]]] = []
        #: Why Redis is away, in words that name no secret; empty while it is available.
        self.last_error = ""
        #: Usage where local: day (YYYYMMDD) -> (caller, client, tenant, model) -> usage.COLUMNS.
        self.usage: dict[int, dict[tuple[str, str, str, str], list[int]]] = {}
        self.timeout_s = settings.timeout_ms / 1000
        self._password = os.environ.get(settings.password_env, "") if settings.password_env else ""
        self.address = None if self.local else Address(settings.url, self._password)
        self._pipe: Pipe | None = None
        self._ended = asyncio.Event()
        self._redis: Redis | None = None
        self._runner: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def redis(self) -> Redis:
        """A client of redis-py for all but limits; its calls raise `redis.RedisError` within the store's time-out.

        Raises:
            RuntimeError: The store is local.
        """
        if self._redis is None:
            if self.local:
                raise RuntimeError("a local store has no Redis")
            # Imported here because it takes longer than everything else the gateway needs to start.
            client = importlib.import_module("redis.asyncio")
            retries = importlib.import_module("redis.asyncio.retry").Retry
            backoff = importlib.import_module("redis.backoff").NoBackoff
            more = {"password": self._password} if self._password else {}
            made: Redis = client.Redis.from_url(
                self.settings.url,
                socket_timeout=self.timeout_s,
                socket_connect_timeout=self.timeout_s,
                socket_keepalive=True,
                # Once more at once: connections of the pool that a restart of Redis broke are replaced unseen.
                retry=retries(backoff(), 1),
                max_connections=256,
                **more,
            )
            self._redis = made
        return self._redis

    async def start(self) -> None:
        """Begin to connect, and wait for it no longer than the store's time-out; Redis may be away."""
        if self.local or self._runner is not None:
            return
        connected = asyncio.Event()
        self._runner = asyncio.create_task(self._run(connected), name="store")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(connected.wait(), self.timeout_s)

    async def close(self) -> None:
        """End all connections. Write what must be written (`Limiter.drain`) before."""
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner
            self._runner = None
        if self._pipe is not None:
            self._pipe.abort("the store is closed")
            # The socket is closed in the loop's next round, which may be the last one.
            await asyncio.sleep(0)
        if self._redis is not None:
            await self._redis.aclose()
            self._redis = None

    def submit(self, packed: bytes, receive: Receive) -> None:
        """Send a packed command on the ordered connection; `receive` gets the reply, or a `StoreError` as a value.

        Raises:
            StoreError: There is no connection; nothing was sent.
        """
        if self._pipe is None:
            raise StoreError("no connection to Redis")
        self._pipe.send(packed, receive)

    async def call(self, *words: Word) -> Any:
        """One command on the ordered connection.

        Raises:
            StoreError: No answer in time (it may have been executed), or an error reply (`StoreRefusedError`).
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def receive(reply: Any) -> None:
            if not future.done():
                future.set_result(reply)

        self.submit(pack(*words), receive)
        reply = await future
        if isinstance(reply, StoreError):
            raise reply
        return reply

    def reset(self, reason: str) -> None:
        """Give up the present connection (it does not take writes, say); another is tried after a while."""
        if self._pipe is not None:
            self.last_error = reason
            self._pipe.abort(reason)

    def _set(self, available: bool) -> None:
        if self.available != available:
            self.available = available
            for listener in list(self.on_state):
                listener(available)

    def _lost(self, pipe: Pipe) -> None:
        if self._pipe is pipe:
            self._pipe = None
            self._ended.set()
            self._set(False)

    async def _run(self, connected: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        delay = RETRY_FIRST_S
        while not self._closed:
            try:
                pipe = await self._open()
            except (OSError, StoreError, TimeoutError) as error:
                self.last_error = f"{self.address}: {error or type(error).__name__}"
            else:
                began = loop.time()
                self.last_error = ""
                self._set(True)
                connected.set()
                while not pipe.lost:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._ended.wait(), HEARTBEAT_S)
                    if not pipe.lost and loop.time() - pipe.heard >= HEARTBEAT_S:
                        with contextlib.suppress(StoreError):
                            await self.call("PING")
                if loop.time() - began > RETRY_MOST_S:
                    delay = RETRY_FIRST_S
            # Spread, so that not all replicas come back in one moment.
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
            delay = min(delay * 2, RETRY_MOST_S)

    async def _open(self) -> Pipe:
        address = self.address
        assert address is not None
        loop = asyncio.get_running_loop()

        def build() -> Pipe:
            return Pipe(self.timeout_s, self._lost)

        async with asyncio.timeout(max(self.timeout_s, 1.0)):
            if address.path:
                _, pipe = await loop.create_unix_connection(build, address.path)
            else:
                _, pipe = await loop.create_connection(build, address.host, address.port, ssl=address.tls)
        self._pipe = pipe
        self._ended.clear()
        try:
            if address.password:
                await self.call(
                    *(["AUTH", address.user, address.password] if address.user else ["AUTH", address.password])
                )
            if address.database:
                await self.call("SELECT", address.database)
            await self.call("PING")
            for prepare in self.on_connect:
                await prepare()
        except BaseException:
            pipe.abort("the connection could not be prepared")
            raise
        if pipe.lost:
            raise StoreError("the connection was lost at once")
        return pipe
