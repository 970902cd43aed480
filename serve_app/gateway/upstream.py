"""One backend: its connections, a request to it, and its answer as it arrives."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, cast
from urllib.parse import quote

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

from .config import Backend
from .errors import BackendFailed, BackendTimeout, GatewayError, InvalidRequest, Unavailable
from .health import Health

Header = tuple[bytes, bytes]

#: uvicorn (and so vLLM) closes idle connections after 5 s. Who closes first never sends into a closing connection.
KEEP_ALIVE_S = 4.0
#: aiohttp sends larger bodies piece by piece, and warns about them otherwise.
_LARGE = 1 << 20
#: Paths whose URLs are kept; there are a dozen, and callers must not fill the memory with files' names.
_PATHS = 256
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_AUTOMATIC = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")
_BROKEN = (aiohttp.ClientError, HttpProcessingError, OSError)
_GARBAGE = (aiohttp.ClientResponseError, HttpProcessingError)


class Failure(Exception):  # noqa: N818 - told apart from errors that callers see
    """An attempt that gave no answer.

    Args:
        outcome: `connect`, `timeout`, `garbage` (what came is no HTTP) or `broken` (the connection ended).
        error: What the caller is told if this was the last attempt.
    """

    def __init__(self, outcome: str, error: GatewayError) -> None:
        super().__init__(outcome)
        self.outcome = outcome
        self.error = error


class _Handler(ResponseHandler):
    """aiohttp's connection. What ends it also ends the body that is being read.

    aiohttp tells the body of an early end, but not of a chunk header that is none: its reader would wait for ever.
    """

    def set_exception(self, exc: BaseException, *cause: Any) -> None:
        payload = self._payload
        if payload is not None and payload.exception() is None and not payload.is_eof():
            payload.set_exception(aiohttp.ClientPayloadError("the connection ended within the body"))
        super().set_exception(exc, *cause)


class _Connector(aiohttp.TCPConnector):
    """aiohttp's, with a bound on idle connections."""

    def __init__(self, idle: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.idle = idle
        factory = functools.partial(_Handler, loop=self._loop)
        self._factory = cast("functools.partial[ResponseHandler]", factory)

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        kept = self._conns.get(key)
        full = kept is not None and len(kept) >= self.idle
        super()._release(key, protocol, should_close=should_close or full or not self.idle)


class Pool:
    """A backend's connections, health and counts. It lives until the policy changes it and its last request is done.

    Args:
        name: The backend's.
        backend: Its settings.
        health: What is known of it.
        ended: Called once for every attempt with its outcome and the seconds to its answer's head.
    """

    def __init__(self, name: str, backend: Backend, health: Health, ended: Callable[[str, str, float], None]) -> None:
        self.name = name
        self.backend = backend
        self.health = health
        #: Attempts under way.
        self.in_flight = 0
        self._ended = ended
        self._session: aiohttp.ClientSession | None = None
        self._retired: Callable[[Pool], None] | None = None
        self._urls: dict[str, URL] = {}
        self._tls: ssl.SSLContext | None = None
        self._base = backend.url.rstrip("/")
        self._key_stamp: tuple[int, int, int] | None = None
        self._fixed: list[tuple[str, str]] = []
        self._own: frozenset[str] = frozenset()
        self.read_key()

    # --- settings

    def read_key(self) -> None:
        """Take the backend's own key; a file's again whenever it has changed."""
        backend = self.backend
        key = os.environ.get(backend.api_key_env, "") if backend.api_key_env else ""
        if backend.api_key_file:
            try:
                path = Path(backend.api_key_file)
                stat = path.stat()
                stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if stamp == self._key_stamp:
                    return
                key = path.read_text(encoding="utf-8").strip()
                self._key_stamp = stamp
            except (OSError, UnicodeDecodeError):
                # While a secret is being swapped the old one is the best there is; none at all shows as 401.
                if self._fixed:
                    return
        fixed = {"accept-encoding": "identity", **{name.lower(): value for name, value in backend.headers.items()}}
        if key and backend.api_key_header:
            fixed[backend.api_key_header.lower()] = key
        elif key:
            fixed["authorization"] = f"Bearer {key}"
        self._fixed = list(fixed.items())
        self._own = frozenset(fixed)

    def tls(self) -> ssl.SSLContext | bool:
        """How certificates are checked."""
        verify = self.backend.verify_tls
        if isinstance(verify, bool):
            return verify
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=verify)
        return self._tls

    def _open(self) -> aiohttp.ClientSession:
        backend = self.backend
        connector = _Connector(
            backend.keepalive,
            limit=backend.max_connections,
            keepalive_timeout=KEEP_ALIVE_S,
            # Headless services and failed-over names change their addresses.
            ttl_dns_cache=5,
            ssl=self.tls(),
        )
        connect = backend.timeouts.connect_s
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=_AUTOMATIC,
            # `connect` bounds the wait for one of max_connections too.
            timeout=aiohttp.ClientTimeout(total=None, connect=connect, sock_connect=connect, sock_read=None),
        )
        return self._session

    def url(self, path: str, query: bytes = b"") -> URL:
        """The backend's URL for a path (percent-decoded, as ASGI has it) and a raw query.

        Raises:
            InvalidRequest: The path goes upwards, or the query holds what a URL may not.
        """
        url = self._urls.get(path)
        if url is None:
            parts = path.split("/")
            if not path.startswith("/") or ".." in parts or "." in parts:
                raise InvalidRequest("The path is not valid.")
            url = URL(self._base + quote(path, safe="/:@!$&'()*+,;=-._~"), encoded=True)
            if len(self._urls) < _PATHS:
                self._urls[path] = url
        if not query:
            return url
        text = query.decode("latin-1")
        if any(not "!" <= one <= "~" or one in '"<>#' for one in text):
            raise InvalidRequest("The query is not valid.")
        return URL(f"{url}?{text}", encoded=True)

    # --- requests

    async def send(
        self, method: str, url: URL, headers: list[Header], body: bytes, began: float, *, model: str = ""
    ) -> Answer:
        """Send a request and wait for the first piece of its answer.

        Args:
            method: Of HTTP.
            url: From `url`.
            headers: The caller's, end-to-end, names in lower case. The backend's own replace them.
            body: To the byte.
            began: When the exchange began (the loop's time); `timeouts.total_s` counts from there.
            model: For messages.

        Raises:
            Failure: There was no answer.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        timeouts = self.backend.timeouts
        sent: CIMultiDict[str] = CIMultiDict(self._fixed)
        own = self._own
        for name, value in headers:
            text = name.decode("ascii", "replace")
            if text not in own:
                sent.add(text, value.decode("utf-8", "replace"))
        payload: bytes | io.BytesIO | None = body or None
        if len(body) > _LARGE:
            payload = io.BytesIO(body)
        response: aiohttp.ClientResponse | None = None
        wait = max(0.0, min(timeouts.first_token_s, began + timeouts.total_s - now))
        outcome = "aborted"
        self.in_flight += 1
        try:
            session = self._session or self._open()
            async with asyncio.timeout(wait):
                response = await session.request(method, url, data=payload, headers=sent, allow_redirects=False)
                first = await response.content.readany()
            outcome = ""
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            outcome = "connect"
            raise Failure(outcome, Unavailable(f"No backend of the model {model} can be reached.")) from error
        except TimeoutError as error:
            outcome = "timeout"
            told = f"The model {model} did not begin to answer within {wait:g} s."
            raise Failure(outcome, BackendTimeout(told)) from error
        except _BROKEN as error:
            outcome = "garbage" if isinstance(error, _GARBAGE) else "broken"
            raise Failure(outcome, BackendFailed(f"The backend of the model {model} gave no answer.")) from error
        finally:
            if outcome:
                # Cancelled too: closing the connection is what makes the backend stop its work.
                if response is not None:
                    response.close()
                self.left(outcome, loop.time() - now)
        return Answer(self, response, first, loop.time() - now, began + timeouts.total_s)

    async def check(self, session: aiohttp.ClientSession) -> str:
        """Ask the backend whether it is well; what is wrong, or an empty text."""
        settings = self.backend.health
        self.read_key()
        timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        try:
            url = URL(self._base + settings.path, encoded=True)
            async with session.get(
                url, headers=self._fixed, timeout=timeout, allow_redirects=False, ssl=self.tls()
            ) as response:
                if 200 <= response.status < 300:
                    return ""
                return f"status {response.status}"
        except TimeoutError:
            return f"no answer within {settings.timeout_s:g} s"
        except (*_BROKEN, ValueError) as error:
            return type(error).__name__

    def left(self, outcome: str, seconds: float) -> None:
        """An attempt ended."""
        self.in_flight -= 1
        self._ended(self.name, outcome, seconds)
        if self._retired is not None and not self.in_flight:
            self._retired(self)

    # --- the end

    def retire(self, done: Callable[[Pool], None]) -> None:
        """No more requests come; `done` is called when the last one has ended, perhaps at once."""
        self._retired = done
        if not self.in_flight:
            done(self)

    async def close(self) -> None:
        """Close all connections; attempts under way fail."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class Answer:
    """A backend's answer, the first piece of whose body is there.

    It is read once, with `read` or `pieces`, and closed in any case.
    """

    __slots__ = (
        "_content",
        "_ends_at",
        "_first",
        "_loop",
        "_open",
        "_pool",
        "_response",
        "_seconds",
        "_since",
        "_timer",
        "attempts",
        "backend",
        "headers",
        "status",
        "variant",
    )

    def __init__(
        self, pool: Pool, response: aiohttp.ClientResponse, first: bytes, seconds: float, ends_at: float
    ) -> None:
        self.status: int = response.status
        #: End-to-end headers, names in lower case.
        self.headers: list[Header] = _end_to_end(response.raw_headers)
        self.backend = pool.name
        self.variant: Literal["main", "canary", "shadow"] = "main"
        #: Requests that were sent until this answer came.
        self.attempts = 1
        self._pool = pool
        self._response = response
        self._content = response.content
        self._first: bytes | None = first
        self._seconds = seconds
        self._ends_at = ends_at
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        #: When the wait for the next piece began; 0: nobody waits.
        self._since = 0.0
        self._open = True
        if self._content.at_eof():
            self._end(self._outcome())

    def header(self, name: bytes) -> bytes:
        """A header's value, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")

    async def read(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            BackendFailed: It is larger than `limit` bytes, or was broken off.
            BackendTimeout: It took too long.
        """
        first = self._first
        if first is not None and not self._open and len(first) <= limit:
            self._first = None
            return first
        pieces: list[bytes] = []
        size = 0
        async for piece in self.pieces():
            size += len(piece)
            if size > limit:
                break
            pieces.append(piece)
        if size > limit:
            self._give_up("garbage")
            raise BackendFailed(f"The backend's answer has more than {limit} bytes.")
        return b"".join(pieces)

    async def hold(self, limit: int) -> bytes:
        """As `read`, and the answer can be read once more."""
        body = await self.read(limit)
        self._first = body
        return body

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; no piece is empty.

        Raises:
            BackendFailed: The backend broke off.
            BackendTimeout: The next piece or the end took too long.
        """
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        first = self._first
        if first is not None:
            self._first = None
            if first:
                return first
        if not self._open:
            raise StopAsyncIteration
        self._since = self._loop.time()
        if self._timer is None:
            self._watch()
        try:
            piece = await self._content.readany()
        except (BackendTimeout, *_BROKEN, RuntimeError) as error:
            # aiohttp raises what ended the body before it hands out what had come, and has no public way past that.
            piece = self._content._read_nowait(-1)
            if not piece:
                self._broken(error)
        self._since = 0.0
        if self._content.at_eof():
            self._end(self._outcome())
        if not piece:
            raise StopAsyncIteration
        return piece

    def restore(self, body: bytes) -> None:
        """Put a body back that was read to judge it."""
        self._first = body

    async def close(self) -> None:
        """Let go of the answer; a backend that is still at work is made to stop (its connection is closed)."""
        if self._open:
            self._response.close()
            self._end("aborted")

    # One timer an answer, not one a piece: it looks whether somebody has been waiting for too long, and sleeps on.

    def _watch(self) -> None:
        now = self._loop.time()
        between = self._pool.backend.timeouts.between_tokens_s
        if now >= self._ends_at:
            total = self._pool.backend.timeouts.total_s
            self._content.set_exception(BackendTimeout(f"The answer took longer than {total:g} s."))
            return
        late = (self._since or now) + between
        if now >= late:
            self._content.set_exception(BackendTimeout(f"The backend sent nothing for {between:g} s."))
            return
        self._timer = self._loop.call_at(min(late, self._ends_at), self._watch)

    def _outcome(self) -> str:
        return outcome_of(self.status)

    def _give_up(self, outcome: str) -> None:
        if self._open:
            self._response.close()
            self._pool.health.failed(self._loop.time())
            self._end(outcome)

    def _broken(self, error: Exception) -> NoReturn:
        if isinstance(error, BackendTimeout):
            self._give_up("timeout")
            raise error
        # RuntimeError: aiohttp's word for reading on a connection that is closed.
        self._give_up("broken")
        raise BackendFailed("The backend broke off in the middle of its answer.") from error

    def _end(self, outcome: str) -> None:
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.left(outcome, self._seconds)


def outcome_of(status: int) -> str:
    """The word for a status in metrics: `ok`, `limited`, `client_error` or `error`."""
    if status < 400:
        return "ok"
    if status == 429:
        return "limited"
    return "client_error" if status < 500 else "error"


def _end_to_end(raw: Sequence[Header]) -> list[Header]:
    headers = [(name.lower(), value) for name, value in raw]
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(one.strip().lower() for one in value.split(b","))
    return [one for one in headers if one[0] not in _HOP_BY_HOP and one[0] not in named]
