"""Sequences of admissions, settlements and clock changes that nobody thought of."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.gateway import usage
from serve_app.gateway.config import Limits, Period, Rate
from serve_app.gateway.config import Store as Settings
from serve_app.gateway.limits import Admission, Limiter, LimitReached, Subject, Used
from serve_app.gateway.limits_local import MICROSECONDS
from serve_app.gateway.store import Store

SECOND = 10**6
DAY = 86400 * SECOND
#: Two hours before a day and a month began, not long ago: purges look back from the present day.
START = int(datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp() - 7200) * SECOND
#: Longer than any sequence, so that leases do not end by themselves: that is another test's.
LONG = 10.0**8

names = itertools.count()
PERIODS: tuple[Period, ...] = ("second", "minute", "hour", "day")
some = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def rates(most: int) -> st.SearchStrategy[Rate]:
    return st.builds(
        Rate,
        limit=st.integers(0, most),
        per=st.sampled_from(PERIODS),
        burst=st.none() | st.integers(0, most * 2),
    )


limits = st.builds(
    Limits,
    requests=st.none() | rates(8),
    tokens=st.none() | rates(100),
    concurrency=st.none() | st.integers(0, 4),
    daily_tokens=st.none() | st.integers(0, 300),
    monthly_tokens=st.none() | st.integers(0, 500),
    daily_cost=st.none() | st.integers(0, 300).map(lambda micro: micro / 10**6),
    monthly_cost=st.none() | st.integers(0, 500).map(lambda micro: micro / 10**6),
)


@dataclass(frozen=True)
class Admit:
    whom: frozenset[int]
    tokens: int
    cost: int


@dataclass(frozen=True)
class Settle:
    which: int
    #: Tokens and cost; None: nothing was used.
    used: tuple[int, int] | None


@dataclass(frozen=True)
class Pass:
    microseconds: int


ADMIT = st.builds(
    Admit, whom=st.frozensets(st.integers(0, 2), min_size=1), tokens=st.integers(0, 120), cost=st.integers(0, 120)
)
SETTLE = st.builds(
    Settle, which=st.integers(0, 30), used=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 200))
)
FORWARD = st.sampled_from([1, 1000, SECOND // 3, SECOND, 7 * SECOND, 60 * SECOND, 3600 * SECOND, DAY, 20 * DAY])
BACK = st.sampled_from([-1, -SECOND, -3600 * SECOND, -DAY])
STEPS = st.lists(st.one_of(ADMIT, ADMIT, ADMIT, SETTLE, SETTLE, st.builds(Pass, FORWARD | BACK)), max_size=40)
STEPS_FORWARD = st.lists(st.one_of(ADMIT, ADMIT, ADMIT, SETTLE, SETTLE, st.builds(Pass, FORWARD)), max_size=40)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


async def outcome(limiter: Limiter, whom: tuple[Subject, ...], step: Admit) -> Admission | LimitReached:
    try:
        return await limiter.admit(whom, tokens=step.tokens, cost_micro=step.cost)
    except LimitReached as refused:
        return refused


async def opened(url: str, clock: Clock) -> Limiter:
    # A Redis that others use too: their keys must not meet these.
    store = Store(Settings(url=url, prefix=f"property{next(names)}", timeout_ms=20_000))
    limiter = Limiter(store, lease_s=LONG, now_us=clock)
    await store.start()
    assert store.available
    return limiter


async def closed(limiter: Limiter) -> None:
    limiter.close()
    await limiter.store.close()


@some
@given(whose=st.tuples(limits, limits, limits), steps=STEPS)
def test_the_script_and_the_process_decide_alike(redis_url: str, whose: tuple[Limits, ...], steps: list[Any]) -> None:
    async def main() -> None:
        clock = Clock()
        shared, local = await opened(redis_url, clock), await opened("", clock)
        subjects = [Subject(f"key:{number}", one) for number, one in enumerate(whose)]
        running: list[tuple[Admission, Admission]] = []
        for step in steps:
            if isinstance(step, Pass):
                # Settlements are gathered for milliseconds; once the clock has moved they would meet a fuller bucket.
                assert await shared.drain(20)
                clock.now += step.microseconds
            elif isinstance(step, Admit):
                whom = tuple(subjects[number] for number in sorted(step.whom))
                one, other = await outcome(shared, whom, step), await outcome(local, whom, step)
                if isinstance(one, Admission) and isinstance(other, Admission):
                    assert one.headers == other.headers
                    assert one.day == other.day
                    running.append((one, other))
                else:
                    assert isinstance(one, LimitReached)
                    assert isinstance(other, LimitReached)
                    assert (one.message, one.headers, one.limit) == (other.message, other.headers, other.limit)
            elif running:
                one, other = running.pop(step.which % len(running))
                used = None if step.used is None else Used("k", "c", "t", "m", step.used[0], 0, step.used[1])
                shared.settle(one, usage=used)
                local.settle(other, usage=used)
            assert shared.running == local.running
        assert await shared.drain(20)
        for day, entries in local.store.usage.items():
            stored = await shared.store.call("HVALS", f"{shared.store.prefix}:usage:{day}")
            assert [[int(number) for number in one.split()] for one in stored] == list(entries.values())
        await closed(shared)

    asyncio.run(main())


@dataclass
class Ledger:
    """What must hold of a subject, worked out without any bucket: from the list of what was admitted."""

    limits: Limits
    #: When requests were admitted.
    admitted: list[int] = field(default_factory=list)
    running: int = 0
    #: Tokens reserved or used, over all days.
    tokens: int = 0
    #: By day: tokens and cost that are reserved or used.
    days: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))


def bound(rate: Rate, length: int) -> float:
    burst = rate.limit if rate.burst is None else rate.burst
    return burst + rate.limit * length / MICROSECONDS[rate.per] + 1e-3


@pytest.mark.parametrize("shared", [True, False], ids=["redis", "process"])
@some
@given(whose=st.tuples(limits, limits, limits), steps=STEPS_FORWARD)
def test_never_more_than_the_limits_allow(
    redis_url: str, shared: bool, whose: tuple[Limits, ...], steps: list[Any]
) -> None:
    async def main() -> None:
        clock = Clock()
        limiter = await opened(redis_url if shared else "", clock)
        subjects = [Subject(f"key:{number}", one) for number, one in enumerate(whose)]
        ledgers = [Ledger(one) for one in whose]
        running: list[tuple[Admission, Admit]] = []
        for step in steps:
            if isinstance(step, Pass):
                clock.now += step.microseconds
            elif isinstance(step, Admit):
                found = await outcome(limiter, tuple(subjects[number] for number in sorted(step.whom)), step)
                if isinstance(found, Admission):
                    running.append((found, step))
                    for number in step.whom:
                        ledger = ledgers[number]
                        ledger.admitted.append(clock.now)
                        ledger.running += 1
                        ledger.tokens += step.tokens
                        ledger.days[found.day][0] += step.tokens
                        ledger.days[found.day][1] += step.cost
                        check(ledger, found.day)
                else:
                    # A refusal names a subject of the request, and a limit that it has.
                    sort, what = found.limit.split(":")
                    assert sort == "key"
                    assert any(getattr(whose[number], what) is not None for number in step.whom)
            elif running:
                admission, admitted = running.pop(step.which % len(running))
                # At most what was reserved, so that no debt arises: what holds then is sharp.
                tokens, cost = step.used or (0, 0)
                tokens, cost = min(tokens, admitted.tokens), min(cost, admitted.cost)
                used = None if step.used is None else Used("k", "c", "t", "m", tokens, 0, cost)
                limiter.settle(admission, usage=used)
                for number in admitted.whom:
                    ledger = ledgers[number]
                    ledger.running -= 1
                    ledger.tokens += tokens - admitted.tokens
                    ledger.days[admission.day][0] += tokens - admitted.tokens
                    ledger.days[admission.day][1] += cost - admitted.cost
        assert await limiter.drain(20)
        for number, ledger in enumerate(ledgers):
            assert limiter.running.get(f"key:{number}", 0) == (
                ledger.running if ledger.limits.concurrency is not None else 0
            )
        if shared:
            for number, ledger in enumerate(ledgers):
                await compare(limiter, f"key:{number}", ledger)
        await closed(limiter)

    asyncio.run(main())


def check(ledger: Ledger, day: int) -> None:
    of = ledger.limits
    if of.requests is not None:
        for first, last in itertools.combinations_with_replacement(range(len(ledger.admitted)), 2):
            length = ledger.admitted[last] - ledger.admitted[first]
            assert last - first + 1 <= bound(of.requests, length)
    if of.tokens is not None:
        # What is given back late makes room in a later span, so only the whole has a bound.
        assert ledger.tokens <= bound(of.tokens, ledger.admitted[-1] - START)
    if of.concurrency is not None:
        assert ledger.running <= of.concurrency
    tokens, cost = ledger.days[day]
    month = [sum(sums[i] for d, sums in ledger.days.items() if d // 100 == day // 100) for i in (0, 1)]
    if of.daily_tokens is not None:
        assert tokens <= of.daily_tokens
    if of.monthly_tokens is not None:
        assert month[0] <= of.monthly_tokens
    # Budgets let pass what costs nothing.
    if of.daily_cost is not None:
        assert cost <= round(of.daily_cost * 10**6)
    if of.monthly_cost is not None:
        assert month[1] <= round(of.monthly_cost * 10**6)


async def compare(limiter: Limiter, name: str, ledger: Ledger) -> None:
    """Redis' books are the ledger's."""
    store = limiter.store
    if ledger.limits.daily_tokens is not None:
        for one, (tokens, cost) in ledger.days.items():
            found = await store.call("HMGET", f"{store.prefix}:budget:{one}:{name}", "t", "c")
            assert [int(number or 0) for number in found] == [tokens, cost]
    if ledger.limits.monthly_cost is not None:
        for month in {one // 100 for one in ledger.days}:
            found = await store.call("HMGET", f"{store.prefix}:budget:{month}:{name}", "t", "c")
            sums = [sum(two[i] for one, two in ledger.days.items() if one // 100 == month) for i in (0, 1)]
            assert [int(number or 0) for number in found] == sums
    if ledger.limits.concurrency is not None:
        assert await store.call("ZCARD", f"{store.prefix}:lease:{name}") == ledger.running


@some
@given(
    rate=rates(100).filter(lambda rate: rate.limit > 0 and rate.burst != 0),
    steps=st.lists(st.tuples(st.integers(0, 150), st.none() | st.integers(0, 500), FORWARD), max_size=25),
)
def test_after_the_wait_that_was_named_a_request_passes(
    redis_url: str, rate: Rate, steps: list[tuple[int, int | None, int]]
) -> None:
    async def main() -> None:
        clock = Clock()
        limiter = await opened(redis_url, clock)
        whom = (Subject("key:k", Limits(requests=rate, tokens=rate)),)
        for tokens, used, passed in steps:
            found = await outcome(limiter, whom, Admit(frozenset(), tokens, 0))
            if isinstance(found, LimitReached):
                wait = found.headers.get("retry-after-ms")
                size = rate.limit if rate.burst is None else rate.burst
                assert (wait is None) == (tokens > size)
                if wait is None:
                    continue
                # A millisecond for the rounding of what was named.
                clock.now += int(wait) * 1000 + 1000
                found = await outcome(limiter, whom, Admit(frozenset(), tokens, 0))
            assert isinstance(found, Admission)
            limiter.settle(found, usage=None if used is None else Used("k", "c", "t", "m", used))
            clock.now += passed
        await limiter.drain(20)
        await closed(limiter)

    asyncio.run(main())


@some
@given(
    entries=st.lists(
        st.tuples(
            *[st.text(max_size=8)] * 4,
            st.integers(0, 10**9),
            st.integers(0, 10**9),
            st.integers(0, 10**9),
            st.booleans(),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_usage_is_the_sum_of_its_entries_however_grouped(redis_url: str, entries: list[tuple[Any, ...]]) -> None:
    async def main() -> None:
        for url in (redis_url, ""):
            clock = Clock()
            limiter = await opened(url, clock)
            for *who, inp, out, cost, cached, aborted in entries:
                limiter.settle(
                    await limiter.admit((), tokens=0),
                    usage=Used(*who, inp, out, cost, cached=cached, aborted=aborted),
                )
            assert await limiter.drain(20)
            today = datetime.fromtimestamp(START // SECOND, UTC).date()
            for by, place in usage.PLACES.items():
                rows = await usage.report(limiter.store, days=(today, today), by=by)
                assert {row[by] for row in rows} == {entry[place] for entry in entries}
                for column, at in (("input_tokens", 4), ("output_tokens", 5), ("cost_micro", 6)):
                    assert sum(row[column] for row in rows) == sum(entry[at] for entry in entries)
                for row in rows:
                    mine = [entry for entry in entries if entry[place] == row[by]]
                    assert row["requests"] == len(mine)
                    assert row["aborted_requests"] == sum(entry[8] for entry in mine)
            clients = {entry[1] for entry in entries}
            for client in clients:
                wanted = len({entry[:4] for entry in entries if entry[1] == client})
                assert await usage.purge(limiter.store, client) == wanted
            assert await usage.report(limiter.store, days=(today, today)) == []
            await closed(limiter)

    asyncio.run(main())
