"""What administrators change while replicas run: revoked keys, weights and canaries of routes, purges. Shared through
Redis.

One hash holds one entry a thing, each with the time (of Redis) at which it was set; the later one wins, and what was
taken back stays as an entry that says so. So a Redis that was emptied, or put back from an old copy, is filled again
from the replicas' memory, and a key once revoked stays revoked. Every replica looks twice a second; while Redis is away
the last known state holds. A new connection counts as available only after the state was read through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from .errors import Unavailable
from .store import Store, StoreError

#: Seconds between two looks.
POLL_S = 0.5
#: Replicas carry a purge out if they learn of it within so many seconds (one that was away longer: `rayplane-audit
#: purge`).
PURGE_FOR_S = 86400.0
#: A time in microseconds has 16 digits until the year 2286.
MAX_DIGITS = 18
_VERSION = b"version"

# Sets one entry. The time never goes back for an entry, whatever Redis's clock does.
_CHANGE = """
local now = redis.call('TIME')
local at = now[1] * 1000000 + now[2]
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old then
  local before = tonumber(string.match(old, '^%d+'))
  if before and before >= at then at = before + 1 end
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f ', at) .. ARGV[2])
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0') or 0
redis.call('HSET', KEYS[1], 'version', string.format('%.0f', math.max(at, version + 1)))
return string.format('%.0f', at)
"""
# Puts entries back that Redis has lost or has older ones of.
_MERGE = """
local now = redis.call('TIME')
for i = 1, #ARGV, 2 do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  local before = old and tonumber(string.match(old, '^%d+')) or -1
  if before < tonumber(string.match(ARGV[i + 1], '^%d+')) then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0') or 0
redis.call('HSET', KEYS[1], 'version', string.format('%.0f', math.max(now[1] * 1000000 + now[2], version + 1)))
return 1
"""


class Revocation(msgspec.Struct, frozen=True):
    """Why a key is refused, since (and until) when; `until` 0: for ever. Times are seconds since 1970."""

    actor: str
    reason: str = ""
    until: float = 0.0
    at: float = 0.0


class Weights(msgspec.Struct, frozen=True):
    """A route's weights by backend, in place of the configuration's."""

    actor: str
    weights: dict[str, int]
    at: float = 0.0


class Canary(msgspec.Struct, frozen=True):
    """The percentage of a route's callers that its canary gets, in place of the configuration's."""

    actor: str
    percent: float
    at: float = 0.0


class Purge(msgspec.Struct, frozen=True):
    """A client's content is to go, as far as it was written before `at`."""

    actor: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Entry:
    #: Microseconds since 1970.
    at: int
    #: JSON; `null`: taken back.
    value: bytes

    def raw(self) -> bytes:
        return b"%d %s" % (self.at, self.value)


def _entry(raw: bytes) -> _Entry | None:
    at, _, value = raw.partition(b" ")
    return _Entry(int(at), value) if at.isdigit() and len(at) < MAX_DIGITS and value else None


class Dynamic:
    """The state, and the ways to change it.

    Args:
        store: Where it is shared; a local store: in this process alone, until it ends.
        clock: Seconds since 1970; ends revocations that have an `until`.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        #: Ids of keys (or `jwt:<issuer>#<sub>`) that are refused.
        self.revoked: frozenset[str] = frozenset()
        #: Weights by backend, by route, in place of the configuration's.
        self.weights: Mapping[str, Mapping[str, int]] = MappingProxyType({})
        self.revocations: Mapping[str, Revocation] = MappingProxyType({})
        self.overrides: Mapping[str, Weights] = MappingProxyType({})
        #: Percentages of canaries, by route, in place of the configuration's.
        self.canaries: Mapping[str, Canary] = MappingProxyType({})
        #: Purges of the last day, by client.
        self.purges: Mapping[str, Purge] = MappingProxyType({})
        #: Called after each change, wherever it was made.
        self.on_change: list[Callable[[], None]] = []
        #: Whether the shared state has ever been read; before, nothing is known to be revoked.
        self.loaded = store.local
        #: What went wrong last when a change was taken over; empty: nothing ever.
        self.last_error = ""
        self._store = store
        self._clock = clock
        self._key = f"{store.prefix}:dynamic"
        self._entries: dict[str, _Entry] = {}
        self._version = -1
        self._poller: asyncio.Task[None] | None = None
        if not store.local:
            store.on_connect.append(self.load)

    async def start(self) -> None:
        """Begin to look for changes. The state itself comes with the store's connection."""
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="dynamic")

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
            self._poller = None

    # --- changes

    async def revoke(self, key_id: str, *, actor: str, until: float | None = None, reason: str = "") -> None:
        """Refuse a key, on every replica within about a second.

        Raises:
            Unavailable: The store did not answer; the change may have been made or not, and may be made again.
        """
        await self._set(f"revoked/{key_id}", {"actor": actor, "reason": reason, "until": until or 0.0})

    async def restore(self, key_id: str) -> None:
        """Accept a revoked key again; raises as `revoke`."""
        await self._set(f"revoked/{key_id}", None)

    async def set_weights(self, route: str, weights: Mapping[str, int] | None, *, actor: str) -> None:
        """Replace a route's weights, or (None) go back to the configuration's; raises as `revoke`."""
        await self._set(f"weights/{route}", None if weights is None else {"actor": actor, "weights": dict(weights)})

    async def set_canary(self, route: str, percent: float | None, *, actor: str) -> None:
        """Replace the percentage of a route's canary, or (None) go back to the configuration's; raises as `revoke`."""
        await self._set(f"canary/{route}", None if percent is None else {"actor": actor, "percent": percent})

    async def request_purge(self, client: str, *, actor: str) -> None:
        """Tell every replica to take the client's content out of its audit log; raises as `revoke`."""
        await self._set(f"purge/{client}", {"actor": actor})

    async def _set(self, field: str, value: Mapping[str, Any] | None) -> None:
        encoded = msgspec.json.encode(value)
        if self._store.local:
            old = self._entries.get(field)
            at = max(int(self._clock() * 1_000_000), old.at + 1 if old else 0)
            self._entries[field] = _Entry(at, encoded)
            self._apply()
            return
        try:
            at = int(await self._store.call("EVAL", _CHANGE, 1, self._key, field, encoded))
            self._entries[field] = _Entry(at, encoded)
            self._apply()
        except StoreError as error:
            raise Unavailable(
                "The store did not answer; the change may not have been made.", code="store_unavailable"
            ) from error

    # --- state

    async def load(self) -> None:
        """Read the shared state, and give back to Redis what it has lost.

        Raises:
            StoreError: Redis did not answer.
        """
        flat: list[bytes] = await self._store.call("HGETALL", self._key)
        found = dict(zip(flat[::2], flat[1::2], strict=True))
        self._version = _number(found.pop(_VERSION, None))
        lost: list[bytes | str] = []
        shared = {name.decode("utf-8", "replace"): entry for name, raw in found.items() if (entry := _entry(raw))}
        for field, known in self._entries.items():
            entry = shared.get(field)
            if entry is None or entry.at < known.at:
                lost += (field, known.raw())
                shared[field] = known
        self._entries = shared
        if lost:
            # Somebody else's change may come in between: the next look reads everything again.
            self._version = -1
            await self._store.call("EVAL", _MERGE, 1, self._key, *lost)
        self.loaded = True
        self._apply()

    def _apply(self) -> None:
        revocations: dict[str, Revocation] = {}
        overrides: dict[str, Weights] = {}
        canaries: dict[str, Canary] = {}
        purges: dict[str, Purge] = {}
        now = self._clock()
        for field, entry in self._entries.items():
            kind, _, name = field.partition("/")
            if entry.value == b"null":
                continue
            at = entry.at / 1_000_000
            # An entry that another version of the gateway wrote and this one cannot read is as if it were absent.
            with contextlib.suppress(msgspec.DecodeError, UnicodeError):
                if kind == "revoked":
                    revocation = _of(entry, Revocation, at)
                    if not revocation.until or revocation.until > now:
                        revocations[name] = revocation
                elif kind == "weights":
                    overrides[name] = _of(entry, Weights, at)
                elif kind == "canary":
                    canaries[name] = _of(entry, Canary, at)
                elif kind == "purge" and at + PURGE_FOR_S > now:
                    purges[name] = _of(entry, Purge, at)
        found = (revocations, overrides, canaries, purges)
        if found == (self.revocations, self.overrides, self.canaries, self.purges):
            return
        self.revocations = MappingProxyType(revocations)
        self.overrides = MappingProxyType(overrides)
        self.canaries = MappingProxyType(canaries)
        self.purges = MappingProxyType(purges)
        self.revoked = frozenset(revocations)
        self.weights = MappingProxyType({name: MappingProxyType(one.weights) for name, one in overrides.items()})
        for listener in list(self.on_change):
            try:
                listener()
            except Exception as error:  # neither the other listeners nor the store's connection shall suffer from one
                self.last_error = f"a listener failed: {type(error).__name__}: {error}"

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if not self._store.local and self._store.available:
                with contextlib.suppress(StoreError):
                    version = await self._store.call("HGET", self._key, _VERSION)
                    if _number(version) != self._version:
                        await self.load()
            # Revocations and purges end by the clock, too.
            self._apply()


def _number(version: bytes | None) -> int:
    """The state's version: the microsecond of its last change.

    So an emptied Redis never comes to an old one again.
    """
    return int(version) if version and version.isdigit() and len(version) < MAX_DIGITS else 0


def _of(entry: _Entry, kind: type[Any], at: float) -> Any:
    return msgspec.structs.replace(msgspec.json.decode(entry.value, type=kind), at=at)
