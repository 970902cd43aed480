"""A filter elsewhere, asked over HTTP.

It gets ``{"phase": "input" | "output", "operation", "texts": [...], "before", "client", "tenant", "model",
"request_id", "retain"}`` by POST and answers ``{"action": "allow" | "block" | "redact", "texts": [...], "reason"}``,
with as many texts as it got where it redacts. `retain` false: it must keep nothing. A stream is sent in pieces of about
`hold_back` characters, cut between words; `before` is what went directly before the piece.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import msgspec

from .. import config
from ..errors import Unavailable
from .base import About, Options, Phase, RemoteFilter, Verdict

if TYPE_CHECKING:
    import aiohttp

_MOST_BYTES = 64 * 1024 * 1024


class _Answer(msgspec.Struct):
    action: Literal["allow", "block", "redact"]
    texts: list[str] = []
    reason: str = ""


_DECODER = msgspec.json.Decoder(_Answer)


class Webhook(RemoteFilter):
    """Asks an HTTP service.

    The filter's action limits what the service may do: `flag` only counts what it would have blocked or redacted.

    Options:
        url: Where it is.
        timeout_ms: Milliseconds for each question; default: 1000.
        on_error: What a service means that does not answer, or answers what is no answer: `block` (503, the default) or
            `allow`.
        unretained: What happens to requests of clients that allow no retention: `send` (with retain false, the default)
            or `skip`.
        headers: Further request headers.
        secret_env: Environment variable with a secret. The request then carries `x-rayplane-signature: sha256=<hex>`,
            the HMAC-SHA256 of its body.
        max_connections: At most so many questions at a time; default: 64.
    """

    def __init__(self, name: str, settings: config.Filter) -> None:
        super().__init__(name, settings)
        options = Options(settings.options)
        self._url = options.text("url", "")
        self._timeout_s = options.number("timeout_ms", 1000, 1, 60_000) / 1000
        self._allow = options.choice("on_error", "block", ("block", "allow")) == "allow"
        self._skip = options.choice("unretained", "send", ("send", "skip")) == "skip"
        self._headers = options.mapping("headers")
        secret = options.text("secret_env", "")
        self._connections = int(options.number("max_connections", 64, 1, 10_000))
        try:
            parts = urlsplit(self._url)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname)
        except ValueError:
            usable = False
        if not usable:
            options.problems.append(f"options.url is {self._url!r}: give http(s)://host...")
        if secret and not os.environ.get(secret):
            options.problems.append(f"options.secret_env names {secret}, which is not set: set it")
        options.end()
        self._secret = os.environ.get(secret, "").encode() if secret else b""
        self._session: aiohttp.ClientSession | None = None
        self._asking = 0
        self._closing = False
        #: Questions that found no answer.
        self.failures = 0

    async def judge(self, phase: Phase, operation: str, texts: Sequence[str], before: str, about: About) -> Verdict:
        if self._skip and not about.retain:
            return Verdict("allow")
        body = msgspec.json.encode(
            {
                "phase": phase,
                "operation": operation,
                "texts": texts,
                "before": before,
                "client": about.client,
                "tenant": about.tenant,
                "model": about.model,
                "request_id": about.request_id,
                "retain": about.retain,
            }
        )
        self._asking += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = _DECODER.decode(await self._post(body))
            if answer.action == "redact" and len(answer.texts) != len(texts):
                raise ValueError("it answers another number of texts")
        except (OSError, TimeoutError, ValueError) as error:
            self.failures += 1
            self.on_error(str(error) or type(error).__name__)
            if self._allow:
                return Verdict("allow", reason="no answer")
            raise Unavailable(
                f"The content filter {self.name!r} gives no answer. Retry later.", code="filter_unavailable"
            ) from error
        finally:
            self._asking -= 1
            if self._closing and not self._asking:
                await self.close()
        return Verdict(answer.action, answer.texts, answer.reason)

    async def _post(self, body: bytes) -> bytes:
        # Imported here: most configurations have no webhook, and start without it.
        import aiohttp  # noqa: PLC0415

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections),
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        headers = {**self._headers, "content-type": "application/json"}
        if self._secret:
            headers["x-rayplane-signature"] = "sha256=" + hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        try:
            async with self._session.post(self._url, data=body, headers=headers, allow_redirects=False) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}")
                answer = bytearray()
                async for piece in response.content.iter_chunked(65536):
                    answer += piece
                    if len(answer) > _MOST_BYTES:
                        raise ValueError("its answer is too large")
                return bytes(answer)
        except aiohttp.ClientError as error:
            raise OSError(str(error)) from error

    async def close(self) -> None:
        self._closing = True
        if self._session is not None and not self._asking:
            session, self._session = self._session, None
            await session.close()
