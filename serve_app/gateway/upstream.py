"""One backend: its connections, a request to it, and its answer as it arrives."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import quote, urlsplit

from . import bound
from .client import BrokenError, ClientError, ConnectError, Connection, Connections, GarbageError, Header, Response
from .config import Backend
from .errors import BackendFailed, BackendTimeout, GatewayError, InvalidRequest, Unavailable
from .health import Health

#: Paths whose request lines are kept; there are a dozen, and callers must not fill the memory with files' names.
_MOST_HEADS = 256
#: What a path may have as it is (RFC 3986, section 3.3).
_PATH = "/:@!$&'()*+,;=-._~"
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
#: Bytes of a list of models.
_MOST_MODELS = 1024 * 1024
_BROKEN = (ClientError, OSError)


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
        #: Context lengths by model, as the backend's /v1/models told.
        self.contexts: dict[str, int] = {}
        #: It takes max_completion_tokens and refuses max_tokens.
        self.newer_bound = False
        self._ended = ended
        self._retired: Callable[[Pool], None] | None = None
        self._tls: ssl.SSLContext | None = None
        parts = urlsplit(backend.url)
        self._base = quote(parts.path.rstrip("/"), safe=_PATH + "%")
        self.connections = Connections(backend.url, tls=self.tls, idle=backend.keepalive, most=backend.max_connections)
        # A new connection each time: a server that accepts none is found although old ones still work.
        self._checks = Connections(backend.url, tls=self.tls, idle=0)
        self._key_stamp: tuple[int, int, int] | None = None
        self._fixed = b""
        self._own: frozenset[bytes] = frozenset()
        self._heads: dict[tuple[str, str], bytes] = {}
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
        if not key.isprintable():
            # It would be a header of its own, or none at all.
            key = ""
        fixed = {"accept-encoding": "identity", **{name.lower(): value for name, value in backend.headers.items()}}
        if key and backend.api_key_header:
            fixed[backend.api_key_header.lower()] = key
        elif key:
            fixed["authorization"] = f"Bearer {key}"
        self._own = frozenset(name.encode("ascii") for name in fixed)
        self._fixed = b"".join(
            b"%s: %s\r\n" % (name.encode("ascii"), value.encode())
            for name, value in {"host": self.connections.host.decode("ascii"), **fixed}.items()
        )
        self._heads.clear()

    def tls(self) -> ssl.SSLContext:
        """How certificates are checked.

        Raises:
            OSError: The file with the authorities' certificates cannot be read.
        """
        if self._tls is None:
            verify = self.backend.verify_tls
            context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
            if verify is False:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            context.set_alpn_protocols(["http/1.1"])
            self._tls = context
        return self._tls

    def target(self, path: str, query: bytes = b"") -> bytes:
        """The backend's request target for a path (percent-decoded, as ASGI has it) and a raw query.

        Raises:
            InvalidRequest: The path goes upwards, or the query holds what a URL may not.
        """
        parts = path.split("/")
        if not path.startswith("/") or ".." in parts or "." in parts:
            raise InvalidRequest("The path is not valid.")
        target = (self._base + quote(path, safe=_PATH)).encode("ascii")
        if not query:
            return target
        if any(not 0x21 <= one <= 0x7E or one in b'"<>#' for one in query):
            raise InvalidRequest("The query is not valid.")
        return b"%s?%s" % (target, query)

    def head(self, method: str, path: str, query: bytes, headers: list[Header], length: int) -> bytes:
        """A request's line and headers.

        Args:
            method: Of HTTP.
            path: As for `target`.
            query: As for `target`.
            headers: The caller's, end-to-end, names in lower case. The backend's own replace them.
            length: The body's, in bytes.

        Raises:
            InvalidRequest: As `target` does; or a header holds what would be another one.
        """
        head = self._heads.get((method, path)) if not query else None
        if head is None:
            head = b"%s %s HTTP/1.1\r\n%s" % (method.encode("ascii"), self.target(path, query), self._fixed)
            if not query and len(self._heads) < _MOST_HEADS:
                self._heads[(method, path)] = head
        own = self._own
        lines = [b"%s: %s\r\n" % one for one in headers if one[0] not in own]
        text = b"".join(lines)
        # The parser lets no end of a line into a header; neither does this.
        if text.count(b"\n") > len(lines) or text.count(b"\r") > len(lines) or b"\0" in text:
            raise InvalidRequest("A header is not valid.")
        if length or method == "POST":
            return b"%s%scontent-length: %d\r\n\r\n" % (head, text, length)
        return b"%s%s\r\n" % (head, text)

    # --- requests

    async def send(self, head: bytes, body: bytes, began: float, *, model: str = "") -> Answer:
        """Send a request and wait for the first piece of its answer.

        Args:
            head: From `head`.
            body: To the byte.
            began: When the exchange began (the loop's time); `timeouts.total_s` counts from there.
            model: For messages.

        Raises:
            Failure: There was no answer.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        timeouts = self.backend.timeouts
        ends_at = began + timeouts.total_s
        by = min(now + timeouts.first_token_s, ends_at)
        response: Response | None = None
        timer: asyncio.TimerHandle | None = None
        outcome = "aborted"
        self.in_flight += 1
        try:
            kept = self.connections.kept()
            response = (kept or await self._connect(by)).send(head, body)
            timer = loop.call_at(by, response.fail, TimeoutError())
            try:
                first = await response.first()
            except BrokenError:
                # The server may have closed it in the moment in which it was used again. Whether it has begun with the
                # request nobody knows, so only what may be done twice is sent once more (RFC 9112, section 9.3.1).
                if kept is None or response.status or head.startswith(b"POST"):
                    raise
                timer.cancel()
                response = None
                response = (await self._connect(by)).send(head, body)
                timer = loop.call_at(by, response.fail, TimeoutError())
                first = await response.first()
            outcome = ""
        except TimeoutError as error:
            outcome = "timeout"
            if response is None and by > loop.time():
                outcome = "connect"
                raise Failure(outcome, self._unreachable(model)) from error
            told = f"The model {model} did not begin to answer within {max(0.0, by - now):g} s."
            raise Failure(outcome, BackendTimeout(told)) from error
        except ConnectError as error:
            outcome = "connect"
            raise Failure(outcome, self._unreachable(model)) from error
        except _BROKEN as error:
            outcome = "garbage" if isinstance(error, GarbageError) else "broken"
            raise Failure(outcome, BackendFailed(f"The backend of the model {model} gave no answer.")) from error
        finally:
            if timer is not None:
                timer.cancel()
            if outcome:
                # Cancelled too: closing the connection is what makes the backend stop its work.
                if response is not None:
                    response.close()
                self.left(outcome, loop.time() - now)
        return Answer(self, response, first, loop.time() - now, ends_at)

    async def _connect(self, by: float) -> Connection:
        # It bounds the wait for one of max_connections too.
        connect_by = asyncio.get_running_loop().time() + self.backend.timeouts.connect_s
        async with asyncio.timeout_at(min(by, connect_by)):
            return await self.connections.open()

    async def check(self) -> str:
        """Ask the backend whether it is well; what is wrong, or an empty text."""
        settings = self.backend.health
        self.read_key()
        head = b"GET %s HTTP/1.1\r\n%sconnection: close\r\n\r\n"
        head %= (self._base + quote(settings.path, safe=_PATH + "?%")).encode(), self._fixed
        response: Response | None = None
        try:
            async with asyncio.timeout(settings.timeout_s):
                connection = await self._checks.open()
                response = connection.send(head, b"")
                body = await response.first()
                while settings.path.endswith("/models") and not response.over and len(body) < _MOST_MODELS:
                    body += await response.piece()
            if response.status == 200:
                self.contexts = bound.contexts(body) or self.contexts
            return "" if 200 <= response.status < 300 else f"status {response.status}"
        except TimeoutError:
            return f"no answer within {settings.timeout_s:g} s"
        except _BROKEN as error:
            return str(error) or type(error).__name__
        finally:
            if response is not None:
                response.close()

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

    async def let_go(self) -> None:
        """Keep no connection any more. A retry that had chosen this backend before opens one for itself."""
        await self.connections.let_go()

    async def close(self) -> None:
        """Close all connections; attempts under way fail."""
        for connections in (self.connections, self._checks):
            await connections.close()

    @staticmethod
    def _unreachable(model: str) -> Unavailable:
        return Unavailable(f"No backend of the model {model} can be reached.")


class Answer:
    """A backend's answer, the first piece of whose body is there.

    It is read once, with `read` or `pieces`, and closed in any case.
    """

    __slots__ = (
        "_ends_at",
        "_fault",
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

    def __init__(self, pool: Pool, response: Response, first: bytes, seconds: float, ends_at: float) -> None:
        self.status: int = response.status
        #: End-to-end headers, names in lower case.
        self.headers: list[Header] = _end_to_end(response.headers)
        self.backend = pool.name
        self.variant: Literal["main", "canary", "shadow"] = "main"
        #: Requests that were sent until this answer came.
        self.attempts = 1
        self._pool = pool
        self._response = response
        self._first: bytes | None = first
        self._seconds = seconds
        self._ends_at = ends_at
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        #: When the wait for the next piece began; 0: nobody waits.
        self._since = 0.0
        self._open = True
        self._fault = ""
        if not response.over:
            self._watch()

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
        if first is not None and self._response.over and len(first) <= limit:
            self._first = None
            self._end()
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
        response = self._response
        piece = response.take()
        if not piece and not response.complete:
            self._since = self._loop.time()
            try:
                piece = await response.piece()
            except (BackendTimeout, ClientError) as error:
                self._broken(error)
            self._since = 0.0
        if not piece:
            self._end()
            raise StopAsyncIteration
        return piece

    def restore(self, body: bytes) -> None:
        """Put a body back that was read to judge it."""
        self._first = body

    async def close(self) -> None:
        """Let go of the answer; a backend that is still at work is made to stop (its connection is closed)."""
        if self._open:
            over = self._response.over
            self._response.close()
            self._end("" if over or self._fault else "aborted")

    # One timer an answer, not one a piece: it looks whether somebody has been waiting for too long, and sleeps on.

    def _watch(self) -> None:
        now = self._loop.time()
        between = self._pool.backend.timeouts.between_tokens_s
        if now >= self._ends_at:
            total = self._pool.backend.timeouts.total_s
            self._response.fail(BackendTimeout(f"The answer took longer than {total:g} s."))
            return
        late = (self._since or now) + between
        if now >= late:
            self._response.fail(BackendTimeout(f"The backend sent nothing for {between:g} s."))
            return
        self._timer = self._loop.call_at(min(late, self._ends_at), self._watch)

    def _give_up(self, outcome: str) -> None:
        if self._open:
            self._response.close()
            self._pool.health.failed(self._loop.time())
            self._end(outcome)

    def _broken(self, error: Exception) -> NoReturn:
        if isinstance(error, BackendTimeout):
            self._give_up("timeout")
            raise error
        self._give_up("broken")
        raise BackendFailed("The backend broke off in the middle of its answer.") from error

    def failed(self, status: int) -> None:
        """The backend says in its stream that it failed; `status`: as which error."""
        if not self._fault:
            self._fault = outcome_of(status)
            if status >= 500:
                self._pool.health.failed(self._loop.time())

    def _end(self, outcome: str = "") -> None:
        if not self._open:
            return
        self._open = False
        outcome = outcome or self._fault or outcome_of(self.status)
        if outcome == "ok":
            self._pool.health.succeeded()
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


def _end_to_end(headers: list[Header]) -> list[Header]:
    named = _HOP_BY_HOP
    for name, value in headers:
        if name == b"connection":
            named = named.union(one.strip().lower() for one in value.split(b","))
    return [one for one in headers if one[0] not in named]
