"""Answers kept in Redis, or in this process where the store is local.

An entry is found by a hash over everything its answer depends on: the model, the operation, the request as it goes to
the backend, the filters of the caller's role, the version of the policy and the scope (tenant, client or everybody). Of
equal requests that arrive together one asks the backend: the others wait for its answer, in the same process for a
future, in another replica for a lock in Redis, and go on alone when it takes too long.

Only whole, successful answers are kept. While Redis is away there is no cache, and nothing else changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from . import config
from .errors import Unavailable
from .store import Store, StoreError, StoreRefusedError

if TYPE_CHECKING:
    from .auth import Caller
    from .metrics import Metrics

#: Entries held in this process where the store is local, in bytes.
MEMORY_BYTES = 64 * 1024 * 1024
#: Entries on their way to Redis, in bytes; more are not kept.
PENDING_BYTES = 32 * 1024 * 1024
#: The lock of the replica that asks the backend. When it ends too early one more replica asks, which costs work only.
LOCK_MS = 30_000
#: How long a semantic index may take.
SEMANTIC_S = 1.0
_POLL_S = (0.01, 0.25)
_PURGE_BATCH = 500

#: Parameters that name the caller or the queue and leave the answer as it is.
_IGNORED = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "priority"}
)
#: Operations without chance in them.
_EXACT = frozenset({"embeddings", "rerank", "score"})
#: Parameters of answers that live on at the backend, or change with the world outside.
_UNSTABLE = ("previous_response_id", "conversation", "background", "web_search_options", "kv_transfer_params")

# In a JSON text quotation marks of a model's own output stand behind a backslash, so these are the answer's own fields.
_UNFINISHED = re.compile(rb'"finish_reason" ?: ?"(?:content_filter|abort|error)"')
_ERROR_EVENT = re.compile(rb'(?:^|[\r\n])(?:event: ?(?:error|response\.failed)|data: ?\{ ?"error")')
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")

_ASK = """
local value = redis.call('GET', KEYS[1])
if value then return {2, value} end
local generation = redis.call('GET', KEYS[3]) or '0'
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return {1, generation} end
return {0, generation}
"""
# The entry, and three indexes (tenant, client, model) by which it can be purged. They live as long as their last entry.
_PUT = """
if redis.call('GET', KEYS[2]) == ARGV[3] then redis.call('DEL', KEYS[2]) end
if (redis.call('GET', KEYS[3]) or '0') ~= ARGV[4] then return 0 end
local ttl = tonumber(ARGV[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ttl)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 4, 6 do
  redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
  redis.call('ZADD', KEYS[i], now + ttl, KEYS[1])
  if redis.call('PTTL', KEYS[i]) < ttl then redis.call('PEXPIRE', KEYS[i], ttl) end
end
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_PURGE = """
local names = redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)
local gone = 0
for _, name in ipairs(names) do
  gone = gone + redis.call('UNLINK', name)
  redis.call('ZREM', KEYS[1], name)
end
return {#names, gone}
"""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A kept answer.

    `body` is what the first caller got, for a stream the whole of its events. `usage` is (input tokens, output tokens).
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    stream: bool
    usage: tuple[int, int]
    #: When it was kept, by the clock of the replica that did, in seconds since 1970.
    stored: float = 0.0
    #: How it was found: kept before, from an equal request under way, or by likeness.
    how: Literal["hit", "shared", "semantic"] = "hit"
    #: Of which version of the model it is: `main` or `canary`.
    variant: str = "main"

    def pieces(self, size: int = 16384) -> Iterator[bytes]:
        """The body for sending: a stream's first event alone, then groups of whole events of about `size` bytes."""
        if not self.stream:
            yield self.body
            return
        start, wanted = 0, 1
        for end in _EVENT_END.finditer(self.body):
            if end.end() - start >= wanted:
                yield self.body[start : end.end()]
                start, wanted = end.end(), size
        if start < len(self.body):
            yield self.body[start:]


class CacheKey(msgspec.Struct, frozen=True):
    """Where a request's answer is kept, and what is needed to keep it there."""

    name: str
    tenant: str
    client: str
    model: str
    ttl_s: float
    max_entry_bytes: int
    wait_s: float
    #: For a semantic index: what has to be equal, and the text that may be alike. Empty without one.
    scope: str = ""
    text: str = ""
    threshold: float = 1.0


class SemanticIndex(Protocol):
    """Finds kept answers to texts that mean the same. None is shipped: `cache.semantic` names a class of yours.

    It is made with `**cache.semantic_options`. It holds texts of callers, so it has to forget them when told to. What
    it raises counts as nothing found.
    """

    async def nearest(self, scope: str, text: str, threshold: float) -> str | None:
        """The name added with the text most like `text` in `scope`, if their likeness (0 to 1) reaches `threshold`."""

    async def add(self, scope: str, text: str, key: CacheKey) -> None:
        """Remember for `key.ttl_s` seconds that the answer to `text` is kept under `key.name`, and for whom."""

    async def forget(self, *, tenant: str | None, client: str | None, model: str | None) -> None:
        """Remove what was added with a key of that tenant, client or model (of each that is named)."""


class _Flight:
    """A request whose answer others wait for."""

    __slots__ = ("began", "done")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.began = loop.time()
        self.done: asyncio.Future[Entry | None] = loop.create_future()


class Lead:
    """The task to get an answer that nobody has: `put` it, or `release` those who wait. Only the first call counts."""

    __slots__ = ("_cache", "_flight", "_generation", "_open", "_token", "key")

    def __init__(self, cache: Cache, key: CacheKey, flight: _Flight | None, token: bytes, generation: bytes) -> None:
        self._cache = cache
        self._flight = flight
        self._token = token
        self._generation = generation
        self._open = flight is not None
        self.key = key

    async def put(self, entry: Entry) -> bool:
        """Keep an answer and give it to those who wait, at once; Redis gets it in the background.

        Returns:
            False if it is not one to be kept (an error, a stream without its end, filtered, too large), if this request
            goes on alone beside another one's, or if the store is away.
        """
        if not self._open:
            return False
        if not worth(entry):
            self._cache.count("refused")
            self.release()
            return False
        self._open = False
        named = [pair for pair in entry.headers if pair[0].lower() == b"content-type"]
        entry = msgspec.structs.replace(entry, headers=named, stored=time.time(), how="hit")
        assert self._flight is not None
        self._cache.land(self.key.name, self._flight, entry)
        return self._cache.keep(self.key, entry, self._token, self._generation)

    def release(self) -> None:
        """Let those who wait go on by themselves."""
        if self._open:
            self._open = False
            assert self._flight is not None
            self._cache.land(self.key.name, self._flight, None)
            self._cache.unlock(self.key.name, self._token)


def worth(entry: Entry) -> bool:
    """Whether an answer may be kept: successful, whole, of one encoding, cut short by no filter."""
    body = entry.body
    if entry.status != 200 or any(
        name.lower() == b"content-encoding" and value.lower() != b"identity" for name, value in entry.headers
    ):
        return False
    if _UNFINISHED.search(body):
        return False
    if not entry.stream:
        bare = body.strip()
        return bare[:1] == b"{" and bare[-1:] == b"}" and not bare.startswith((b'{"error"', b'{ "error"'))
    if _ERROR_EVENT.search(body) or not body.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
        return False
    last = _EVENT_END.split(body.rstrip())[-1]
    return last in (b"data: [DONE]", b"data:[DONE]") or last.startswith(b"event: response.completed")


def version_of(settings: config.Config) -> str:
    """A version of what answers depend on: routes, backends, filters. A new key changes neither it nor the cache."""
    text = msgspec.json.encode([settings.routes, settings.backends, settings.filters], order="deterministic")
    return hashlib.sha256(text).hexdigest()[:16]


def _deterministic(operation: str, body: Mapping[str, Any]) -> bool:
    if operation in _EXACT:
        return True
    temperature = body.get("temperature")
    return type(temperature) in (int, float) and temperature == 0


def _stable(body: Mapping[str, Any]) -> bool:
    """Whether an answer depends on the request alone: on no earlier answer, no tool of the backend's, no other site."""
    if body.get("store") is True or any(body.get(name) for name in _UNSTABLE):
        return False
    tools = body.get("tools")
    if isinstance(tools, list) and any(
        not isinstance(tool, dict) or tool.get("type", "function") not in ("function", "custom") for tool in tools
    ):
        return False
    for name in ("messages", "input"):
        messages = body.get(name)
        if isinstance(messages, list):
            for message in messages:
                content = message.get("content") if isinstance(message, dict) else None
                if isinstance(content, list) and any(map(_fetched, content)):
                    return False
    return True


def _fetched(part: object) -> bool:
    """Whether a part of a message is somewhere else (a URL, a file at the backend), where it may change."""
    if not isinstance(part, dict):
        return False
    for name, value in part.items():
        inner = value if isinstance(value, dict) else {name: value}
        for key, link in inner.items():
            if key == "file_id" and link:
                return True
            if (key == "url" or key.endswith("_url")) and isinstance(link, str) and not link.startswith("data:"):
                return True
    return False


def _alike(operation: str, body: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    """A request without the text that may be alike, and that text: the last message of a user, or a prompt."""
    if operation == "chat":
        messages = body.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(messages, list) and isinstance(last, dict) and last.get("role") == "user":
            text = last.get("content")
            if isinstance(text, str):
                return {**body, "messages": [*messages[:-1], {**last, "content": None}]}, text
    elif operation == "completions" and isinstance(body.get("prompt"), str):
        return {**body, "prompt": None}, body["prompt"]
    return None


def _hash(*parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class Cache:
    """The answers of one gateway process or, through Redis, of all.

    Args:
        store: Where it lives. The cache has a connection of its own, so that a large entry keeps no limit waiting.
        metrics: Where `stored`, `refused` and `error` are counted; the request path counts what it found itself.
    """

    def __init__(self, store: Store, metrics: Metrics | None = None) -> None:
        self._metrics = metrics
        self._own: Store | None = None if store.local else Store(store.settings)
        self._memory = _Memory() if store.local else None
        self._prefix = f"{store.prefix}:cache:"
        # Redis names scripts by their SHA-1.
        scripts = (_ASK, _PUT, _RELEASE, _PURGE)
        self._shas = {text: hashlib.sha1(text.encode()).hexdigest() for text in scripts}  # noqa: S324
        self._started = False
        self._flights: dict[str, _Flight] = {}
        self._marks = secrets.token_hex(8)
        self._number = 0
        self._pending = 0
        self._index: SemanticIndex | None = None
        self._index_of: tuple[str, dict[str, Any]] = ("", {})
        self._tasks: set[asyncio.Task[None]] = set()

    # -- a request's way ------------------------------------------------------------------------------------

    def key_of(  # noqa: PLR0917 - all of them make the key
        self,
        cfg: config.Cache,
        caller: Caller,
        route_id: str,
        operation: str,
        body: Mapping[str, Any],
        policy_version: str,
        *,
        asked: bool = False,
        extra: str = "",
    ) -> CacheKey | None:
        """Where the answer to a request is kept; None if it must not be.

        Args:
            body: The request as it goes to the backend, so filters have seen it.
            policy_version: Anything that changes when answers may, such as `version_of`.
            asked: The caller wants it cached although it leaves room for chance.
            extra: What else the answer depends on: the backend that the caller asked for, whether it is on the canary.
        """
        if not cfg.enabled or not caller.retain or operation not in cfg.operations:
            return None
        certain = _deterministic(operation, body)
        if not asked and (cfg.when == "asked" or not certain):
            return None
        if not certain and ((body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1):
            return None
        if not _stable(body):
            return None
        # The order of parameters means nothing; within them it may: a schema's fields are answered in its order.
        kept = {name: body[name] for name in sorted(body) if name not in _IGNORED or operation == "responses"}
        if not kept.get("stream"):
            kept.pop("stream", None)
        scope = ("" if cfg.scope == "all" else caller.tenant, caller.client if cfg.scope == "client" else "")
        rest = (scope, cfg.scope, operation, route_id, caller.role.filters, policy_version, extra)
        alike = _alike(operation, kept) if cfg.semantic and self.configure(cfg) is not None else None
        return CacheKey(
            name=_hash(rest, kept),
            tenant=caller.tenant,
            client=caller.client,
            model=route_id,
            ttl_s=cfg.ttl_s,
            max_entry_bytes=cfg.max_entry_bytes,
            wait_s=cfg.wait_s,
            scope=_hash(rest, alike[0]) if alike else "",
            text=alike[1] if alike else "",
            threshold=cfg.semantic_threshold,
        )

    async def lookup(self, key: CacheKey) -> Entry | Lead:
        """The kept answer, or the task to get one. Waits at most `wait_s` for an equal request that is under way."""
        name = key.name
        flight = self._flights.get(name)
        if flight is not None:
            waited = asyncio.get_running_loop().time() - flight.began
            entry = await self._follow(flight, key.wait_s - waited)
            return msgspec.structs.replace(entry, how="shared") if entry else Lead(self, key, None, b"", b"")
        flight = self._flights[name] = _Flight()
        self._number += 1
        token = f"{self._marks}-{self._number}".encode()
        try:
            found = await self._find(key, flight, token)
        except BaseException:
            self.land(name, flight, None)
            self.unlock(name, token)
            raise
        if isinstance(found, Entry):
            self.land(name, flight, found)
        return found

    async def _follow(self, flight: _Flight, seconds: float) -> Entry | None:
        if seconds <= 0:
            return flight.done.result() if flight.done.done() else None
        await asyncio.wait((flight.done,), timeout=seconds)
        return flight.done.result() if flight.done.done() else None

    async def _find(self, key: CacheKey, flight: _Flight, token: bytes) -> Entry | Lead:
        if self._memory is not None:
            entry = self._memory.get(key.name) or await self._like(key)
            return entry or Lead(self, key, flight, token, self._memory.generation)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + key.wait_s
        pause, most = _POLL_S
        shared: Literal["hit", "shared"] = "hit"
        while True:
            state, value = await self._ask(key.name, token)
            if state == 2:
                with contextlib.suppress(msgspec.DecodeError):
                    return msgspec.structs.replace(_ENTRY.decode(value), how=shared)
                # Of another release: it will be overwritten.
                return Lead(self, key, flight, token, await self._generation())
            if state == 1:
                # The lock is ours.
                entry = await self._like(key)
                if entry is None:
                    return Lead(self, key, flight, token, value)
                self.unlock(key.name, token)
                return entry
            if state < 0 or loop.time() + pause > deadline:
                break
            # Another replica asks the backend.
            shared = "shared"
            await asyncio.sleep(pause)
            pause = min(pause * 2, most)
        self.land(key.name, flight, None)
        return Lead(self, key, None, b"", b"")

    def land(self, name: str, flight: _Flight, entry: Entry | None) -> None:
        """End a flight: whoever waits gets the entry, or goes on."""
        if self._flights.get(name) is flight:
            del self._flights[name]
        if not flight.done.done():
            flight.done.set_result(entry)

    # -- where entries are ----------------------------------------------------------------------------------

    async def _ask(self, name: str, token: bytes) -> tuple[int, bytes]:
        """(2, entry), (1, generation) with the lock, (0, generation) without it, or (-1, b"") while Redis is away."""
        try:
            keys = (self._key("entry:", name), self._key("lock:", name), self._key("generation"))
            state, value = await self._script(_ASK, keys, token, LOCK_MS)
        except StoreError:
            self.count("error")
            return -1, b""
        return state, value

    async def _generation(self) -> bytes:
        if self._memory is not None:
            return self._memory.generation
        try:
            assert self._own is not None
            return await self._own.call("GET", self._key("generation")) or b"0"
        except StoreError:
            return b"-"

    def keep(self, key: CacheKey, entry: Entry, token: bytes, generation: bytes) -> bool:
        """Put an entry where it is found, in the background. Use `Lead.put`."""
        size = len(entry.body)
        if size > key.max_entry_bytes or key.ttl_s <= 0 or self._pending + size > PENDING_BYTES:
            self.count("refused")
            self.unlock(key.name, token)
            return False
        if self._memory is not None:
            if generation != self._memory.generation:
                return False
            self._memory.put(key, entry)
        elif self._own is None or not self._own.available:
            return False
        self._pending += size
        self._later(self._keep(key, entry, token, generation, size))
        return True

    async def _keep(self, key: CacheKey, entry: Entry, token: bytes, generation: bytes, size: int) -> None:
        try:
            if self._memory is None:
                indexes = [self._key(f"of:{kind}:", getattr(key, kind)) for kind in ("tenant", "client", "model")]
                keys = (self._key("entry:", key.name), self._key("lock:", key.name), self._key("generation"), *indexes)
                ttl_ms = max(1, int(key.ttl_s * 1000))
                if not await self._script(_PUT, keys, _ENCODER.encode(entry), ttl_ms, token, generation):
                    self.count("refused")
                    return
            self.count("stored")
            if self._index is not None and key.text:
                await self._index.add(key.scope, key.text, key)
                if await self._generation() != generation:
                    # A purge came between the entry and its text.
                    await self._index.forget(tenant=None, client=key.client, model=None)
        except StoreError:
            self.count("error")
        except Exception:  # an index is somebody else's code; without it the cache is exact
            self.count("semantic_error")
        finally:
            self._pending -= size

    def unlock(self, name: str, token: bytes) -> None:
        """Give the lock of a replica back, in the background. Use `Lead.release`."""
        if token and self._own is not None and self._own.available:
            self._later(self._unlock(name, token))

    async def _unlock(self, name: str, token: bytes) -> None:
        with contextlib.suppress(StoreError):
            await self._script(_RELEASE, (self._key("lock:", name),), token)

    async def purge(self, *, tenant: str | None = None, client: str | None = None, model: str | None = None) -> int:
        """Remove what was kept for a tenant, for requests of a client, or of a model (of each that is named).

        What is under way when the purge begins is not kept afterwards, in any replica.

        Returns:
            How many entries went.

        Raises:
            Unavailable: Redis is away; some entries may be left.
        """
        wanted = {"tenant": tenant, "client": client, "model": model}
        if self._memory is not None:
            gone = self._memory.purge(wanted)
            if self._index is not None:
                await self._index.forget(**wanted)
            return gone
        gone = 0
        try:
            await self._start()
            assert self._own is not None
            await self._own.call("INCR", self._key("generation"))
            if self._index is not None:
                await self._index.forget(**wanted)
            for kind, name in wanted.items():
                left = _PURGE_BATCH if name is not None else 0
                while left == _PURGE_BATCH:
                    left, removed = await self._script(_PURGE, (self._key(f"of:{kind}:", name or ""),), _PURGE_BATCH)
                    gone += removed
        except StoreError:
            raise Unavailable("The store is away: the cache could not be purged.", code="store_unavailable") from None
        return gone

    # -- likeness -------------------------------------------------------------------------------------------

    def configure(self, cfg: config.Cache) -> SemanticIndex | None:
        """Make the semantic index that a configuration names, unless it is there already.

        Raises:
            ValueError: There is no such class, or it does not take these options.
        """
        if (cfg.semantic, cfg.semantic_options) != self._index_of:
            self._index = None
            if cfg.semantic:
                path, _, name = cfg.semantic.rpartition(".")
                try:
                    self._index = getattr(importlib.import_module(path), name)(**cfg.semantic_options)
                except (ImportError, AttributeError, TypeError, ValueError) as error:
                    raise ValueError(f"cache.semantic: {cfg.semantic} cannot be used: {error}") from error
            self._index_of = (cfg.semantic, cfg.semantic_options)
        return self._index

    async def _like(self, key: CacheKey) -> Entry | None:
        if self._index is None or not key.text:
            return None
        try:
            async with asyncio.timeout(SEMANTIC_S):
                name = await self._index.nearest(key.scope, key.text, key.threshold)
                if name is None:
                    return None
                if self._memory is not None:
                    entry = self._memory.get(name)
                else:
                    assert self._own is not None
                    value = await self._own.call("GET", self._key("entry:", name))
                    entry = _ENTRY.decode(value) if value else None
        except Exception:  # an index is somebody else's code; without it the cache is exact
            self.count("semantic_error")
            return None
        if entry is None:
            return None
        return msgspec.structs.replace(entry, how="semantic")

    # -- the connection -------------------------------------------------------------------------------------

    async def _start(self) -> None:
        if not self._started and self._own is not None:
            self._started = True
            self._own.on_connect.append(self._load)
            await self._own.start()

    async def _load(self) -> None:
        assert self._own is not None
        for script in self._shas:
            await self._own.call("SCRIPT", "LOAD", script)

    async def _script(self, script: str, keys: Sequence[str], *words: bytes | str | int) -> Any:
        assert self._own is not None
        if not self._started:
            await self._start()
        try:
            return await self._own.call("EVALSHA", self._shas[script], len(keys), *keys, *words)
        except StoreRefusedError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
            return await self._own.call("EVAL", script, len(keys), *keys, *words)

    async def drain(self, timeout: float = 2.0) -> None:
        """Wait until entries on their way are kept, at most `timeout` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)

    async def close(self) -> None:
        """Let go of everybody who waits, and of the connection."""
        await self.drain()
        for name, flight in list(self._flights.items()):
            self.land(name, flight, None)
        if self._own is not None and self._started:
            await self._own.close()

    def count(self, result: str) -> None:
        """Count what became of an entry."""
        if self._metrics is not None:
            self._metrics.cache(result)

    def _key(self, kind: str, name: str = "") -> str:
        return self._prefix + kind + name

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Memory:
    """Entries in this process, those used longest ago going first when there are too many."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, tuple[float, CacheKey, Entry]] = OrderedDict()
        self._size = 0
        self._purges = 0

    @property
    def generation(self) -> bytes:
        return b"%d" % self._purges

    def get(self, name: str) -> Entry | None:
        found = self._entries.get(name)
        if found is None:
            return None
        if found[0] <= time.monotonic():
            self._drop(name)
            return None
        self._entries.move_to_end(name)
        return found[2]

    def put(self, key: CacheKey, entry: Entry) -> None:
        self._drop(key.name)
        self._entries[key.name] = (time.monotonic() + key.ttl_s, key, entry)
        self._size += len(entry.body)
        while self._size > MEMORY_BYTES:
            self._drop(next(iter(self._entries)))

    def purge(self, wanted: Mapping[str, str | None]) -> int:
        self._purges += 1
        names = [
            name
            for name, (_, key, _) in self._entries.items()
            if any(value is not None and getattr(key, kind) == value for kind, value in wanted.items())
        ]
        for name in names:
            self._drop(name)
        return len(names)

    def _drop(self, name: str) -> None:
        found = self._entries.pop(name, None)
        if found is not None:
            self._size -= len(found[2].body)


_ENTRY = msgspec.msgpack.Decoder(Entry)
_ENCODER = msgspec.msgpack.Encoder()
