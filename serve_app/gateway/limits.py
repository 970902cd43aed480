"""Limits of keys, tenants and models: one atomic script in Redis (limits.lua), fed with a moment's requests together.

Exactness. A request is admitted by all its subjects or by none. What cannot be known, because the connection broke
before the answer came, is taken back: batches are numbered, admissions that were sent and not answered are fenced
off and undone, and settlements are repeated until Redis says that it has them, and counted once. Nothing of this needs
the replicas' clocks.

Estimates. Tokens and cost are reserved when a request is admitted and corrected when it is settled. A token bucket may
then go below zero, by as much as its size at most: the caller waits for that to be refilled. Budgets and usage are
corrected in full, and both belong to the day on which the request was admitted. A gateway that is killed leaves the
estimate of what it was serving in the budgets, for nobody knows what those requests used.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .config import Limits
from .errors import RateLimited, Unavailable
from .limits_local import KINDS, Local, Spec, clean, day_of
from .store import Store, StoreError, StoreRefusedError, Word, pack

if TYPE_CHECKING:
    from .auth import Caller
    from .config import Route
    from .policy import Policy

SCRIPT = Path(__file__).with_suffix(".lua").read_bytes()
SHA = hashlib.sha1(SCRIPT).hexdigest()  # noqa: S324 - the name that EVALSHA wants

LEASE_S = 30.0
RENEW_S = 10.0
#: Batches whose answers may be outstanding at a time.
IN_FLIGHT = 2
#: Admissions, and entries to write, of one batch: a few milliseconds of Redis at most.
BATCH_ADMITS = 500
BATCH_WRITES = 1000
#: Settlements of a moment without admissions wait so long for company.
GATHER_S = 0.004
#: Entries kept while Redis is away; more are dropped and counted.
MOST_PENDING = 100_000
#: Larger counts are no counts but a backend's nonsense.
MOST_COUNT = 10**12

NO_LIMITS = Limits()
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom limits count: `key:<id>`, `tenant:<name>` or `model:<id>`."""

    name: str
    limits: Limits


_known: dict[tuple[str, str, str, str | None], tuple[Subject, ...]] = {}
_known_of: list[object] = [None]


def subjects(policy: Policy, caller: Caller, model_id: str | None, route: Route | None) -> tuple[Subject, ...]:
    """The subjects with limits of a request. Equal for equal callers until the policy is another one."""
    if _known_of[0] is not policy or len(_known) > MOST_PENDING:
        _known.clear()
        _known_of[0] = policy
    who = (caller.id, caller.role_name, caller.tenant, model_id)
    found = _known.get(who)
    if found is None:
        tenants = policy.config.tenants
        tenant = tenants.get(caller.tenant) or tenants.get("*")
        all_of_them = (
            (f"key:{caller.id}", caller.limits),
            (f"tenant:{caller.tenant}", tenant),
            (f"model:{model_id}", route.limits if route is not None else None),
        )
        found = tuple(
            Subject(name, limits) for name, limits in all_of_them if limits is not None and limits != NO_LIMITS
        )
        _known[who] = found
    return found


@dataclass(slots=True)
class Used:
    """What a request used in the end. `charged` False (a cache hit that counts against nothing): no limit sees it."""

    caller_id: str
    client: str
    tenant: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    #: Millionths of the currency.
    cost_micro: int = 0
    cached: bool = False
    requests: int = 1
    aborted: bool = False
    #: The tokens are the gateway's estimate, for the backend did not say.
    estimated: bool = False
    charged: bool = True


@dataclass(slots=True)
class Admission:
    """A request that may go on; give it to `Limiter.settle` when it has ended, whatever the end was."""

    headers: list[tuple[bytes, bytes]]
    #: Limits were those of this replica alone, for Redis was away.
    degraded: bool
    specs: tuple[Spec, ...] = ()
    tokens: int = 0
    cost: int = 0
    day: int = 0
    lease: str = ""
    settled: bool = False


class LimitReached(RateLimited):
    """A limit refused; `limit` names it for metrics: `key:requests`, `tenant:daily_tokens`, `model:concurrency` ..."""

    limit = ""


class _Waiter:
    __slots__ = ("cost", "future", "lease", "specs", "tokens")

    def __init__(
        self, specs: tuple[Spec, ...], tokens: int, cost: int, lease: str, future: asyncio.Future[Any]
    ) -> None:
        self.specs = specs
        self.tokens = tokens
        self.cost = cost
        self.lease = lease
        self.future = future


@dataclass(slots=True)
class _Pending:
    """What has to be written, summed up as far as it can be."""

    undo: list[tuple[int, list[list[Any]], list[list[Any]]]] = field(default_factory=list)
    renew: dict[str, list[str]] = field(default_factory=dict)
    release: dict[str, list[str]] = field(default_factory=dict)
    buckets: dict[Spec, float] = field(default_factory=dict)
    budgets: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    usage: dict[tuple[int, str, str, str, str], list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.usage or self.release or self.buckets or self.budgets or self.renew or self.undo)

    def take(self) -> bytes:
        """The next batch as the script reads it."""
        undo, self.undo = self.undo, []
        room = BATCH_WRITES
        renew, room = _some_lists(self.renew, room)
        release, room = _some_lists(self.release, room)
        buckets = [[spec.wire, 0, delta] for spec, delta in _some(self.buckets, room)]
        room -= len(buckets)
        budgets = [[str(period), name, *deltas] for (period, name), deltas in _some(self.budgets, room)]
        room -= len(budgets)
        usage = []
        for (day, *who), counts in _some(self.usage, room):
            usage.append([day, msgspec.json.encode([clean(name) for name in who]).decode(), counts])
        return msgspec.msgpack.encode([undo, renew, release, buckets, budgets, usage])


def _some(entries: dict[K, V], room: int) -> list[tuple[K, V]]:
    return [entries.popitem() for _ in range(min(room, len(entries)))]


def _some_lists(entries: dict[str, list[str]], room: int) -> tuple[list[tuple[str, list[str]]], int]:
    taken = []
    while entries and room > 0:
        name, members = entries.popitem()
        if len(members) > room:
            entries[name] = members[room:]
            members = members[:room]
        room -= len(members)
        taken.append((name, members))
    return taken, room


class _Batch:
    __slots__ = ("admits", "items", "number", "specs", "waiters", "write")

    def __init__(self, number: int, waiters: list[_Waiter], write: int) -> None:
        self.number = number
        self.waiters = waiters
        self.write = write
        self.specs: list[list[Any]] = []
        self.items: list[list[Any]] = []

    def encode(self) -> bytes:
        places: dict[Spec, int] = {}
        for waiter in self.waiters:
            item: list[Any] = [waiter.tokens, waiter.cost, waiter.lease]
            for spec in waiter.specs:
                place = places.get(spec)
                if place is None:
                    place = places[spec] = len(places) + 1
                item.append(place)
            self.items.append(item)
        self.specs = [spec.wire for spec in places]
        return msgspec.msgpack.encode([self.specs, self.items])


class Limiter:
    """Admits requests and settles them. One a process; it belongs to the event loop in which it is used.

    Args:
        store: Where limits are kept, not started yet; with a local store they hold in this process alone.
        lease_s: A running request that nobody renews counts so long against concurrency.
        renew_s: Running requests are renewed so often.
        now_us: A clock for tests, in microseconds; it replaces Redis' own.
    """

    def __init__(
        self,
        store: Store,
        *,
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
        now_us: Callable[[], int] | None = None,
    ) -> None:
        self.store = store
        #: Names this process in Redis.
        self.instance = os.urandom(8).hex()
        #: Settlements that found no room while Redis was away.
        self.dropped = 0
        #: Called with the number of settlements just dropped.
        self.on_dropped: Callable[[int], None] | None = None
        self._given_clock = now_us
        #: Microseconds from this machine's monotonic clock to Redis' clock, so that no jump of this machine's matters.
        self._ahead_us: int | None = None
        self._local = Local(self._now_us)
        self._lease_us = int(lease_s * 1_000_000)
        self._renew_s = renew_s
        self._specs: dict[str, Spec] = {}
        self._shares: dict[str, Spec] = {}
        self._ready = False
        self._waiting: deque[_Waiter] = deque()
        self._scheduled = False
        self._in_flight = 0
        self._admit_number = 0
        self._write_number = 0
        self._fence = 0
        self._leases = 0
        self._pending = _Pending()
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._live: dict[str, tuple[Spec, ...]] = {}
        self._write_timer: asyncio.TimerHandle | None = None
        self._renew_timer: asyncio.TimerHandle | None = None
        if not store.local:
            store.on_connect.append(self._connected)
            store.on_state.append(self._state)

    @property
    def degraded(self) -> bool:
        """Redis is configured and away: the declared choice (refuse, or this replica's fraction) applies."""
        return not (self._ready or self.store.local)

    @property
    def running(self) -> dict[str, int]:
        """This process' running requests by subject, of subjects with a concurrency limit."""
        return self._local.running

    async def admit(self, subjects: Sequence[Subject], *, tokens: int, cost_micro: int = 0) -> Admission:
        """Let a request pass all its limits, or none.

        Args:
            subjects: Whom it counts for.
            tokens: An estimate of its input and output tokens.
            cost_micro: An estimate of its cost in millionths of the currency; 0 is a request that costs nothing, which
                cost budgets let pass.

        Raises:
            LimitReached: A limit or a budget is used up.
            Unavailable: Redis is away and `store.on_failure` is `closed`.
        """
        if not subjects:
            return Admission([], False, day=day_of(self._now_us()))
        specs = tuple([self._spec(subject) for subject in subjects])
        # A caller may ask for any number of tokens, and numbers on the way to the script are bounded.
        tokens = min(max(tokens, 0), MOST_COUNT)
        cost_micro = min(max(cost_micro, 0), MOST_COUNT)
        if self._ready:
            self._leases += 1
            lease = f"{self.instance}:{self._leases}"
            loop = asyncio.get_running_loop()
            waiter = _Waiter(specs, tokens, cost_micro, lease, loop.create_future())
            self._waiting.append(waiter)
            if not self._scheduled:
                self._scheduled = True
                loop.call_soon(self._flush)
            try:
                answer = await waiter.future
            except asyncio.CancelledError:
                if waiter.future.done() and not waiter.future.cancelled():
                    self._give_back(waiter, waiter.future.result())
                raise
            if answer is not None:
                day, result = answer
                if not result[0]:
                    raise self._refused(specs, tokens, result)
                for spec in specs:
                    if spec.concurrency >= 0:
                        self._local.enter(spec)
                        self._keep(lease, specs)
                return Admission(_headers(result, 1), False, specs, tokens, cost_micro, day, lease)
        if self.store.local:
            day, result = self._local.admit(specs, tokens, cost_micro)
            if not result[0]:
                raise self._refused(specs, tokens, result)
            return Admission(_headers(result, 1), False, specs, tokens, cost_micro, day)
        if self.store.settings.on_failure == "closed":
            raise Unavailable(
                "Limits cannot be checked at the moment. Please try again.",
                code="limits_unavailable",
                headers={"Retry-After": "1"},
            )
        return self._admit_share(specs, tokens, cost_micro)

    def settle(self, admission: Admission, *, usage: Used | None) -> None:
        """Say what an admitted request used. Never waits and never raises; a second time changes nothing.

        Call it before the last byte is sent: a caller with a concurrency of one may send the next request at once.

        Args:
            admission: What `admit` gave.
            usage: None where the request never reached a model: tokens and cost are given back, nothing is counted.
        """
        if admission.settled:
            return
        admission.settled = True
        spent = cost = 0
        if usage is not None and usage.charged:
            spent = _sane(usage.input_tokens) + _sane(usage.output_tokens)
            cost = _sane(usage.cost_micro)
        if self.store.local:
            for spec in admission.specs:
                self._local.give(spec, 0, admission.tokens - spent)
                self._local.charge(admission.day, spec, spent - admission.tokens, cost - admission.cost)
                if spec.concurrency >= 0:
                    self._local.leave(spec)
        else:
            self._settle_shared(admission, spent, cost)
        if usage is not None:
            self._count(admission.day, usage)

    async def drain(self, timeout: float) -> bool:
        """Wait until all settlements are written, `timeout` seconds at most; False: some are not, for Redis is away."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not self.store.local and (self._pending or self._unacknowledged or self._in_flight):
            self._flush_writes()
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(0.005)
        return True

    def close(self) -> None:
        """Stop renewing what still runs."""
        for timer in (self._write_timer, self._renew_timer):
            if timer is not None:
                timer.cancel()
        self._write_timer = self._renew_timer = None
        self._live.clear()

    # Admission

    def _now_us(self) -> int:
        if self._given_clock is not None:
            return self._given_clock()
        if self._ahead_us is not None:
            return time.monotonic_ns() // 1000 + self._ahead_us
        return time.time_ns() // 1000

    def _spec(self, subject: Subject) -> Spec:
        found = self._specs.get(subject.name)
        if found is None or (found.limits is not subject.limits and found.limits != subject.limits):
            if len(self._specs) >= 2 * MOST_PENDING:
                self._specs.clear()
            found = self._specs[subject.name] = Spec(subject.name, subject.limits)
        return found

    def _share(self, spec: Spec) -> Spec:
        found = self._shares.get(spec.name)
        if found is None or found.limits is not spec.limits:
            if len(self._shares) >= 2 * MOST_PENDING:
                self._shares.clear()
            found = self._shares[spec.name] = Spec(spec.name, spec.limits, self.store.settings.local_fraction)
        return found

    def _admit_share(self, specs: tuple[Spec, ...], tokens: int, cost: int) -> Admission:
        shares = [self._share(spec) for spec in specs]
        day, result = self._local.admit(shares, tokens, cost)
        if not result[0]:
            raise self._refused(shares, tokens, result)
        self._leases += 1
        lease = f"{self.instance}:{self._leases}"
        if any(spec.concurrency >= 0 for spec in specs):
            self._keep(lease, specs)
        return Admission(_headers(result, 1), True, specs, tokens, cost, day, lease)

    def _refused(self, specs: Sequence[Spec], tokens: int, result: list[int]) -> LimitReached:
        _, place, kind, wait_us, *_ = result
        return _refusal(specs[place - 1], kind, wait_us, tokens, _headers(result, 4))

    def _give_back(self, waiter: _Waiter, answer: tuple[int, list[int]] | None) -> None:
        """The caller is gone, and was admitted all the same."""
        if answer is not None and answer[1][0]:
            day = answer[0]
            for spec in waiter.specs:
                if spec.concurrency >= 0:
                    self._local.enter(spec)
            self.settle(Admission([], False, waiter.specs, waiter.tokens, waiter.cost, day, waiter.lease), usage=None)

    # Settlement

    def _settle_shared(self, admission: Admission, spent: int, cost: int) -> None:
        pending, day = self._pending, admission.day
        # What was admitted while Redis was away has nothing reserved there.
        held, held_cost = (0, 0) if admission.degraded else (admission.tokens, admission.cost)
        lost = False
        for spec in admission.specs:
            if admission.degraded:
                share = self._share(spec)
                self._local.give(share, 0, admission.tokens - spent)
                self._local.charge(day, share, spent - admission.tokens, cost - admission.cost)
            elif spec.token_limit >= 0 and held != spent:
                if spec in pending.buckets or len(pending.buckets) < MOST_PENDING:
                    pending.buckets[spec] = pending.buckets.get(spec, 0) + held - spent
                else:
                    lost = True
            if held != spent or held_cost != cost:
                if spec.daily and not self._charge(day, spec.name, spent - held, cost - held_cost):
                    lost = True
                if spec.monthly and not self._charge(day // 100, spec.name, spent - held, cost - held_cost):
                    lost = True
            if spec.concurrency >= 0:
                self._local.leave(spec)
                # Nobody needs to be told of leases that began and ended while Redis was away.
                if self._ready or not admission.degraded:
                    pending.release.setdefault(spec.name, []).append(admission.lease)
        self._live.pop(admission.lease, None)
        if lost:
            self._drop()
        self._write_soon()

    def _charge(self, period: int, name: str, tokens: int, cost: int) -> bool:
        budgets = self._pending.budgets
        deltas = budgets.get((period, name))
        if deltas is None:
            if len(budgets) >= MOST_PENDING:
                return False
            deltas = budgets[(period, name)] = [0, 0]
        deltas[0] += tokens
        deltas[1] += cost
        return True

    def _count(self, day: int, usage: Used) -> None:
        inp, out, cost = _sane(usage.input_tokens), _sane(usage.output_tokens), _sane(usage.cost_micro)
        if self.store.local:
            counts = self.store.usage.setdefault(day, {}).setdefault(
                (usage.caller_id, usage.client, usage.tenant, usage.model), [0] * 8
            )
        else:
            who = (day, usage.caller_id, usage.client, usage.tenant, usage.model)
            found = self._pending.usage.get(who)
            if found is None:
                if len(self._pending.usage) >= MOST_PENDING:
                    self._drop()
                    return
                found = self._pending.usage[who] = [0] * 8
            counts = found
            self._write_soon()
        counts[0] += usage.requests
        if usage.charged:
            counts[1] += inp
            counts[2] += out
            counts[3] += cost
        else:
            counts[5] += inp + out
        counts[4] += usage.cached
        counts[6] += usage.aborted
        counts[7] += usage.estimated

    def _drop(self) -> None:
        self.dropped += 1
        if self.on_dropped is not None:
            self.on_dropped(1)

    # Leases

    def _keep(self, lease: str, specs: tuple[Spec, ...]) -> None:
        self._live[lease] = specs
        if self._renew_timer is None:
            self._renew_timer = asyncio.get_running_loop().call_later(self._renew_s, self._renew)

    def _renew(self) -> None:
        self._renew_timer = None
        if self._live:
            self._renew_timer = asyncio.get_running_loop().call_later(self._renew_s, self._renew)
            if self._ready:
                self._gather_renewals()
                self._flush_writes()

    def _gather_renewals(self) -> None:
        renew: dict[str, list[str]] = {}
        for lease, specs in self._live.items():
            for spec in specs:
                if spec.concurrency >= 0:
                    renew.setdefault(spec.name, []).append(lease)
        self._pending.renew = renew

    # Batches

    def _write_soon(self) -> None:
        if self._write_timer is None and self._ready:
            self._write_timer = asyncio.get_running_loop().call_later(GATHER_S, self._flush_writes)

    def _flush_writes(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if not self._scheduled:
            self._flush()

    def _flush(self) -> None:
        self._scheduled = False
        while self._ready and self._in_flight < IN_FLIGHT and (self._waiting or self._pending):
            self._send()

    def _send(self) -> None:
        waiters: list[_Waiter] = []
        waiting = self._waiting
        while waiting and len(waiters) < BATCH_ADMITS:
            waiter = waiting.popleft()
            if not waiter.future.done():
                waiters.append(waiter)
        write, writes, admits = 0, b"", b""
        if self._pending:
            write, writes = self._next_writes()
        elif not waiters:
            return
        number = 0
        if waiters:
            self._admit_number += 1
            number = self._admit_number
        batch = _Batch(number, waiters, write)
        if waiters:
            admits = batch.encode()
        self._in_flight += 1
        words = self._arguments(write, writes, number, admits)
        try:
            self.store.submit(pack("EVALSHA", SHA, *words), partial(self._answered, batch))
        except StoreError as error:
            self._answered(batch, error)

    def _next_writes(self) -> tuple[int, bytes]:
        self._write_number += 1
        entry = (self._write_number, self._pending.take())
        self._unacknowledged.append(entry)
        return entry

    def _arguments(self, write: int, writes: bytes, number: int, admits: bytes) -> tuple[Word, ...]:
        clock = "" if self._given_clock is None else str(self._given_clock())
        prefix = self.store.prefix
        return (1, prefix, self.instance, self._fence, write, writes, number, admits, self._lease_us, clock)

    def _answered(self, batch: _Batch, reply: Any) -> None:
        self._in_flight -= 1
        if isinstance(reply, StoreError):
            self._lost(batch, reply)
            return
        answer = msgspec.msgpack.decode(reply)
        if batch.write:
            self._unacknowledged.popleft()
        if batch.waiters:
            self._resolve(batch, answer)
        if self._waiting:
            self._flush_writes()
        elif self._pending:
            self._write_soon()

    def _resolve(self, batch: _Batch, answer: list[Any]) -> None:
        if not answer[0]:
            for waiter in batch.waiters:
                if not waiter.future.done():
                    waiter.future.set_result(None)
            return
        _, day, results, now = answer
        self._ahead_us = now - time.monotonic_ns() // 1000
        for waiter, result in zip(batch.waiters, results, strict=True):
            if waiter.future.done():
                self._give_back(waiter, (day, result))
            else:
                waiter.future.set_result((day, result))

    def _lost(self, batch: _Batch, reason: StoreError) -> None:
        """The answer will not come. The writes stay for the next connection; the admissions are undone there."""
        self._ready = False
        if batch.waiters:
            items = [[place, *item] for place, item in enumerate(batch.items, 1)]
            self._pending.undo.append((batch.number, batch.specs, items))
        for waiter in batch.waiters:
            if not waiter.future.done():
                waiter.future.set_result(None)
        if isinstance(reason, StoreRefusedError):
            self.store.reset(f"Redis refuses the script of the limits: {reason}")

    def _state(self, available: bool) -> None:
        if not available:
            self._ready = False
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.future.done():
                    waiter.future.set_result(None)

    async def _connected(self) -> None:
        """Settle with a new connection what the last one left open, before anything is admitted on it."""
        self._ready = False
        self._fence = self._admit_number
        self._gather_renewals()
        # Loaded this way, and not by EVAL, it is never evicted. Whoever flushes scripts makes this connection end.
        await self.store.call("SCRIPT", "LOAD", SCRIPT)
        first = True
        while first or self._unacknowledged or self._pending.undo:
            first = False
            if not self._unacknowledged and self._pending:
                self._next_writes()
            write, writes = self._unacknowledged[0] if self._unacknowledged else (0, b"")
            words = self._arguments(write, writes, 0, b"")
            answer = msgspec.msgpack.decode(await self.store.call("EVALSHA", SHA, *words))
            self._ahead_us = answer[3] - time.monotonic_ns() // 1000
            if write:
                self._unacknowledged.popleft()
        self._ready = True
        self._write_soon()


def _sane(count: Any) -> int:
    """A backend's count, or 0 where it is none."""
    return count if type(count) is int and 0 <= count <= MOST_COUNT else 0


def _duration(milliseconds: int) -> str:
    """As OpenAI's headers write durations: `120ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest}s"
    return f"{minutes // 60}h{minutes % 60}m{rest}s"


def _headers(result: list[int], first: int) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    for at, what in ((first, b"requests"), (first + 3, b"tokens")):
        if result[at] >= 0:
            headers.append((b"x-ratelimit-limit-" + what, b"%d" % result[at]))
            headers.append((b"x-ratelimit-remaining-" + what, b"%d" % result[at + 1]))
            headers.append((b"x-ratelimit-reset-" + what, _duration(result[at + 2]).encode()))
    return headers


def _refusal(spec: Spec, kind: int, wait_us: int, tokens: int, headers: list[tuple[bytes, bytes]]) -> LimitReached:
    sort, _, name = spec.name.partition(":")
    who, what = f"{sort} '{name}'", KINDS[kind]
    wait = _duration(max(1, math.ceil(wait_us / 1000)))
    again = f"Please try again in {wait}." if wait_us >= 0 else "Nothing is allowed at all."
    budget = kind >= 4
    error_type, code = "requests", "rate_limit_exceeded"
    if what == "requests":
        rate = f"{spec.request_limit:g} requests per {_per(spec, what)}"
        message = f"Rate limit reached for {who}: {rate}. {again}"
    elif what == "tokens":
        error_type = "tokens"
        rate = f"{spec.token_limit:g} tokens per {_per(spec, what)}"
        message = f"Rate limit reached for {who}: {rate}, requested about {tokens}. {again}"
        if wait_us < 0:
            message = (
                f"The request is too large for {who}: it needs about {tokens} tokens, and {spec.token_burst:g} is the "
                "most at once. Shorten the input or lower the maximum of output tokens."
            )
    elif what == "concurrency":
        message = f"Too many requests of {who} at a time: {spec.concurrency} may run. {again}"
    else:
        error_type = code = "insufficient_quota"
        period, _, of = what.partition("_")
        limit = getattr(spec, what)
        amount = f"{limit / 1_000_000:g}" if of == "cost" else f"{limit} tokens"
        message = (
            f"The {period} {of.removesuffix('s')} budget of {who} ({amount}) does not allow this request. "
            f"It starts anew in {wait}."
        )
    words = {name.decode(): value.decode() for name, value in headers}
    if wait_us >= 0:
        words["Retry-After"] = str(max(1, math.ceil(wait_us / 1_000_000)))
        if not budget:
            words["retry-after-ms"] = str(max(1, math.ceil(wait_us / 1000)))
    if wait_us < 0 or budget:
        # OpenAI's clients heed it: trying again soon is of no use.
        words["x-should-retry"] = "false"
    error = LimitReached(message, code=code, headers=words)
    error.type = error_type
    error.limit = f"{sort}:{what}"
    return error


def _per(spec: Spec, what: str) -> str:
    rate = spec.limits.requests if what == "requests" else spec.limits.tokens
    assert rate is not None
    return rate.per
