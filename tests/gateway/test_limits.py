from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from serve_app.gateway import limits as module
from serve_app.gateway import usage
from serve_app.gateway.auth import Caller
from serve_app.gateway.config import Config, Limits, Rate, Role, Route, Target
from serve_app.gateway.config import Store as Settings
from serve_app.gateway.errors import Unavailable
from serve_app.gateway.limits import Admission, Limiter, LimitReached, Subject, Used, subjects
from serve_app.gateway.policy import Policy
from serve_app.gateway.store import Store

from .conftest import RedisServer
from .redis_proxy import RedisProxy
from .waiting import LONG_S, until

PROJECT = Path(__file__).resolve().parents[2]
DAY = 86400 * 10**6
#: 2026-01-15, noon UTC.
NOON = 1_768_478_400 * 10**6


class Clock:
    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@asynccontextmanager
async def limiting(url: str, clock: Clock | None = None, **options: Any) -> AsyncIterator[Limiter]:
    times = {name: options.pop(name) for name in ("lease_s", "renew_s") if name in options}
    store = Store(Settings(url=url, **{"timeout_ms": 20_000, **options}))
    limiter = Limiter(store, now_us=clock, **times)
    await store.start()
    try:
        yield limiter
    finally:
        await limiter.drain(LONG_S)
        limiter.close()
        await store.close()


def used(tokens: int, cost: int = 0, **more: Any) -> Used:
    return Used("k", "c", "t", "m", input_tokens=tokens, cost_micro=cost, **more)


def key(**limits: Any) -> tuple[Subject, ...]:
    return (Subject("key:k", Limits(**limits)),)


async def admits(limiter: Limiter, whom: Sequence[Subject], number: int, tokens: int = 1) -> list[Admission]:
    """Those of `number` requests at once that are admitted."""
    results = await asyncio.gather(*[limiter.admit(whom, tokens=tokens) for _ in range(number)], return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, LimitReached):
            raise result
    return [result for result in results if isinstance(result, Admission)]


async def budget(limiter: Limiter, name: str = "key:k") -> tuple[int, int, int, int]:
    """Tokens and cost that Redis has for today and for this month."""
    store = limiter.store
    await limiter.drain(LONG_S)
    day = module.day_of(limiter._now_us())
    found = []
    for period in (day, day // 100):
        found += await store.call("HMGET", f"{store.prefix}:budget:{period}:{name}", "t", "c")
    return tuple(int(one or 0) for one in found)  # type: ignore[return-value]


async def leases(limiter: Limiter, name: str = "key:k") -> int:
    found: int = await limiter.store.call("ZCARD", f"{limiter.store.prefix}:lease:{name}")
    return found


@pytest.fixture(params=["redis", "process"])
def url(request: pytest.FixtureRequest) -> str:
    """The same must hold with Redis and without."""
    return str(request.getfixturevalue("redis_url")) if request.param == "redis" else ""


# Exactness


WORKER = """
import asyncio, sys, uvloop
from serve_app.gateway.config import Limits, Rate, Store as Settings
from serve_app.gateway.limits import Admission, Limiter, Subject
from serve_app.gateway.store import Store

async def main():
    store = Store(Settings(url=sys.argv[1], timeout_ms=60000))
    limiter = Limiter(store)
    await store.start()
    assert store.available
    rate = Rate(limit=100, per="day")
    whom = {
        "requests": (Subject("key:k", Limits(requests=rate)),),
        "tokens": (Subject("key:k", Limits(tokens=Rate(limit=1000, per="day"))),),
        "concurrency": (Subject("key:k", Limits(concurrency=100)),),
        "budget": (Subject("key:k", Limits(daily_tokens=1009)),),
        "cost": (Subject("key:k", Limits(monthly_cost=0.0003)),),
        # Only the last of several refuses: nothing may be taken from the others.
        "several": (
            Subject("key:" + sys.argv[3], Limits(requests=Rate(limit=250, per="day"))),
            Subject("tenant:t", Limits(tokens=Rate(limit=10000, per="day"), concurrency=1000)),
            Subject("model:m", Limits(requests=rate)),
        ),
    }[sys.argv[2]]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    results = await asyncio.gather(
        *[limiter.admit(whom, tokens=10, cost_micro=3) for _ in range(250)], return_exceptions=True
    )
    print(sum(isinstance(one, Admission) for one in results), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for one in results:
        if isinstance(one, Admission):
            limiter.settle(one, usage=None)
    assert await limiter.drain(60)
    await store.close()

uvloop.run(main())
"""


@pytest.mark.parametrize("what", ["requests", "tokens", "concurrency", "budget", "cost", "several"])
def test_a_thousand_requests_on_four_replicas_against_a_limit_of_a_hundred(redis_url: str, what: str) -> None:
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, redis_url, what, str(number)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    passed = []
    try:
        for step in ("start", "end"):
            for replica in replicas:
                assert replica.stdout is not None
                line = replica.stdout.readline().strip()
                if step == "end":
                    passed.append(int(line))
                else:
                    assert line == "ready"
            for replica in replicas:
                assert replica.stdin is not None
                replica.stdin.write("go\n")
                replica.stdin.flush()
        for replica in replicas:
            assert replica.wait(60) == 0
    finally:
        for replica in replicas:
            replica.kill()
            replica.communicate()
    assert sum(passed) == 100

    async def after() -> None:
        async with limiting(redis_url) as limiter:
            assert await budget(limiter) == (0, 0, 0, 0)
            assert await leases(limiter) == 0
            if what == "several":
                keys = [(Subject(f"key:{n}", Limits(requests=Rate(limit=250, per="day"))),) for n in range(4)]
                rest = [len(await admits(limiter, one, 300)) for one in keys]
                assert rest == [250 - one for one in passed]
                tenant = (Subject("tenant:t", Limits(tokens=Rate(limit=10000, per="day"))),)
                assert len(await admits(limiter, tenant, 2, 5000)) == 2

    asyncio.run(after())


def test_one_replica_is_exact_too(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            assert len(await admits(limiter, key(requests=Rate(limit=100, per="day")), 1000)) == 100

    asyncio.run(main())


# Each kind of limit


def test_requests_are_refilled_evenly_up_to_the_burst(url: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with limiting(url, clock) as limiter:
            whom = key(requests=Rate(limit=60, per="minute", burst=10))
            assert len(await admits(limiter, whom, 30)) == 10
            clock.now += 999_000
            assert await admits(limiter, whom, 5) == []
            clock.now += 1_001
            assert len(await admits(limiter, whom, 5)) == 1
            clock.now += 3_000_000
            assert len(await admits(limiter, whom, 5)) == 3
            clock.now += DAY
            assert len(await admits(limiter, whom, 30)) == 10

    asyncio.run(main())


def test_a_clock_that_jumps_back_neither_frees_nor_blocks(url: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with limiting(url, clock) as limiter:
            whom = key(requests=Rate(limit=60, per="minute", burst=10), concurrency=100)
            running = await admits(limiter, whom, 30)
            assert len(running) == 10
            clock.now -= 10 * 3600 * 10**6
            assert await admits(limiter, whom, 5) == []
            clock.now += 2_000_000
            running += await admits(limiter, whom, 5)
            assert len(running) == 12
            assert limiter.running == {"key:k": 12}
            for one in running:
                limiter.settle(one, usage=None)

    asyncio.run(main())


def test_leases_of_a_dead_replica_end_although_the_clock_jumped_back(redis_url: str) -> None:
    async def main() -> None:
        clock = Clock()
        whom = key(concurrency=5)
        async with limiting(redis_url, clock) as dead, limiting(redis_url, clock) as limiter:
            assert len(await admits(dead, whom, 5)) == 5
            dead.close()
            clock.now -= 3600 * 10**6
            assert await admits(limiter, whom, 1) == []
            clock.now += 29 * 10**6
            assert await admits(limiter, whom, 1) == []
            clock.now += 2 * 10**6
            assert len(await admits(limiter, whom, 9)) == 5

    asyncio.run(main())


def test_tokens_are_estimated_first_and_corrected_after(url: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with limiting(url, clock) as limiter:
            whom = key(tokens=Rate(limit=1000))
            first = await limiter.admit(whom, tokens=600)
            assert dict(first.headers)[b"x-ratelimit-remaining-tokens"] == b"400"
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(whom, tokens=401)
            assert refused.value.limit == "key:tokens"
            limiter.settle(first, usage=used(100))
            second = await limiter.admit(whom, tokens=900)
            assert dict(second.headers)[b"x-ratelimit-remaining-tokens"] == b"0"
            limiter.settle(second, usage=None)
            third = await limiter.admit(whom, tokens=900)
            # More than estimated: a debt, which the next ones wait for.
            limiter.settle(third, usage=used(1100))
            with pytest.raises(LimitReached):
                await limiter.admit(whom, tokens=0)
            clock.now += 12_000_000
            assert (await limiter.admit(whom, tokens=0)).degraded is False

    asyncio.run(main())


def test_a_debt_is_no_larger_than_the_bucket(url: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with limiting(url, clock) as limiter:
            whom = key(tokens=Rate(limit=1000))
            limiter.settle(await limiter.admit(whom, tokens=10), usage=used(10**9))
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(whom, tokens=0)
            assert refused.value.headers["Retry-After"] == "60"
            clock.now += 120 * 10**6
            await limiter.admit(whom, tokens=1000)

    asyncio.run(main())


def test_concurrency(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            whom = key(concurrency=3)
            running = await admits(limiter, whom, 10)
            assert len(running) == 3
            assert limiter.running == {"key:k": 3}
            for one in running[:2]:
                limiter.settle(one, usage=used(1))
                limiter.settle(one, usage=used(1))
            # At once: what is settled is written before what is asked next.
            assert len(await admits(limiter, whom, 10)) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("limits", "tokens", "cost", "limit"),
    [
        ({"daily_tokens": 1000}, 100, 0, "key:daily_tokens"),
        ({"monthly_tokens": 1000}, 100, 0, "key:monthly_tokens"),
        ({"daily_cost": 0.001}, 1, 100, "key:daily_cost"),
        ({"monthly_cost": 0.001}, 1, 100, "key:monthly_cost"),
    ],
)
def test_budgets(url: str, limits: dict[str, float], tokens: int, cost: int, limit: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with limiting(url, clock) as limiter:
            whom = key(**limits)
            running = [await limiter.admit(whom, tokens=tokens, cost_micro=cost) for _ in range(10)]
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(whom, tokens=tokens, cost_micro=cost)
            error = refused.value
            assert (error.limit, error.code, error.type, error.status) == (
                limit,
                "insufficient_quota",
                "insufficient_quota",
                429,
            )
            # Half of it was used in the end.
            for one in running:
                limiter.settle(one, usage=used(tokens // 2, cost // 2))
            left = 10 if tokens == 1 else 5
            after = [await limiter.admit(whom, tokens=tokens, cost_micro=cost) for _ in range(5)]
            with pytest.raises(LimitReached) as refused:
                for _ in range(left):
                    await limiter.admit(whom, tokens=tokens, cost_micro=cost)
            for one in after:
                limiter.settle(one, usage=None)
            clock.now += int(refused.value.headers["Retry-After"]) * 10**6
            assert len([await limiter.admit(whom, tokens=tokens, cost_micro=cost) for _ in range(10)]) == 10

    asyncio.run(main())


def test_budgets_begin_at_midnight_and_on_the_first(url: str) -> None:
    async def main() -> None:
        for date, days in ((1_769_860_800, 1), (1_770_724_800, 19), (1_709_208_000, 1), (1_735_646_400, 1)):
            # 2026-01-31, 2026-02-10, 2024-02-29, 2024-12-31, all noon; days until the first, less half a day.
            clock = Clock(date * 10**6)
            async with limiting(url, clock, prefix=f"p{date}") as limiter:
                with pytest.raises(LimitReached) as refused:
                    await limiter.admit(key(daily_tokens=5), tokens=6)
                assert refused.value.headers["Retry-After"] == str(43200)
                with pytest.raises(LimitReached) as refused:
                    await limiter.admit(key(monthly_tokens=5), tokens=6)
                assert refused.value.headers["Retry-After"] == str(days * 86400 - 43200)

    asyncio.run(main())


def test_a_request_over_midnight_belongs_to_the_day_it_was_admitted_on(redis_url: str) -> None:
    async def main() -> None:
        clock = Clock(NOON + DAY // 2 - 1000)
        async with limiting(redis_url, clock) as limiter:
            whom = key(daily_tokens=1000, monthly_tokens=10000)
            one = await limiter.admit(whom, tokens=100)
            clock.now += 2000
            limiter.settle(one, usage=used(70))
            two = await limiter.admit(whom, tokens=1000)
            assert await budget(limiter) == (1000, 0, 1070, 0)
            limiter.settle(two, usage=used(7))
            assert await budget(limiter) == (7, 0, 77, 0)
            clock.now -= 2000
            assert await budget(limiter) == (70, 0, 77, 0)

    asyncio.run(main())


def test_a_free_request_passes_a_cost_budget_and_an_uncounted_one_no_token_budget(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            await limiter.admit(key(daily_cost=0.0), tokens=5, cost_micro=0)
            whom = key(daily_tokens=10)
            limiter.settle(await limiter.admit(whom, tokens=0), usage=used(10))
            with pytest.raises(LimitReached):
                await limiter.admit(whom, tokens=0)

    asyncio.run(main())


def test_all_subjects_or_none(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            wide = Subject(
                "tenant:t",
                Limits(
                    requests=Rate(limit=3, per="day"),
                    tokens=Rate(limit=30, per="day"),
                    concurrency=3,
                    daily_tokens=30,
                    monthly_cost=30.0,
                ),
            )
            narrow = Subject("model:m", Limits(concurrency=1))
            first = await limiter.admit((wide, narrow), tokens=10, cost_micro=10_000_000)
            for _ in range(20):
                with pytest.raises(LimitReached) as refused:
                    await limiter.admit((wide, narrow), tokens=10, cost_micro=10_000_000)
                assert refused.value.limit == "model:concurrency"
            limiter.settle(first, usage=used(10, 10_000_000))
            for _ in range(2):
                await limiter.admit((wide,), tokens=10, cost_micro=10_000_000)
            with pytest.raises(LimitReached):
                await limiter.admit((wide,), tokens=10, cost_micro=10_000_000)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"requests": Rate(limit=0)}, 1),
        ({"requests": Rate(limit=5, burst=0)}, 1),
        ({"tokens": Rate(limit=0)}, 1),
        ({"concurrency": 0}, 1),
        ({"tokens": Rate(limit=100)}, 101),
    ],
)
def test_what_waiting_does_not_help_says_so(url: str, limits: dict[str, Any], tokens: int) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(key(**limits), tokens=tokens)
            assert "Retry-After" not in refused.value.headers
            assert refused.value.headers["x-should-retry"] == "false"
            assert "try again in" not in refused.value.message

    asyncio.run(main())


def test_headers_and_messages_are_openais(url: str) -> None:
    async def main() -> None:
        clock = Clock()
        async with limiting(url, clock) as limiter:
            whom = (
                Subject("key:k", Limits(requests=Rate(limit=60), tokens=Rate(limit=6000, burst=60000))),
                Subject("tenant:t", Limits(requests=Rate(limit=5, per="hour"), tokens=Rate(limit=600000))),
            )
            admission = await limiter.admit(whom, tokens=1000)
            assert admission.headers == [
                (b"x-ratelimit-limit-requests", b"5"),
                (b"x-ratelimit-remaining-requests", b"4"),
                (b"x-ratelimit-reset-requests", b"12m0s"),
                (b"x-ratelimit-limit-tokens", b"60000"),
                (b"x-ratelimit-remaining-tokens", b"59000"),
                (b"x-ratelimit-reset-tokens", b"10s"),
            ]
            await admits(limiter, whom, 4)
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(whom, tokens=1)
            error = refused.value
            assert error.message == (
                "Rate limit reached for tenant 't': 5 requests per hour. Please try again in 12m0s."
            )
            assert (error.status, error.type, error.code, error.limit) == (
                429,
                "requests",
                "rate_limit_exceeded",
                "tenant:requests",
            )
            assert error.headers["Retry-After"] == "720"
            assert error.headers["retry-after-ms"] == "720000"
            assert error.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(key(tokens=Rate(limit=10)), tokens=11)
            assert refused.value.type == "tokens"
            assert "needs about 11 tokens, and 10 is the most" in refused.value.message
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(key(daily_tokens=10), tokens=11)
            assert refused.value.message == (
                "The daily token budget of key 'k' (10 tokens) does not allow this request. It starts anew in 12h0m0s."
            )
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(key(monthly_cost=2.5), tokens=1, cost_micro=2_500_001)
            assert "monthly cost budget of key 'k' (2.5)" in refused.value.message

    asyncio.run(main())


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0ms"),
        (999, "999ms"),
        (1000, "1s"),
        (1500, "1.5s"),
        (59999, "59.999s"),
        (60000, "1m0s"),
        (3600000, "1h0m0s"),
    ],
)
def test_durations(milliseconds: int, text: str) -> None:
    assert module._duration(milliseconds) == text


def test_no_subjects_cost_nothing_and_are_counted(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            admission = await limiter.admit((), tokens=5)
            assert admission.headers == []
            limiter.settle(admission, usage=used(5, aborted=True, estimated=True))
            limiter.settle(admission, usage=used(5))
            assert await limiter.drain(LONG_S)
            (row,) = await usage.report(limiter.store)
            assert (row["requests"], row["input_tokens"]) == (1, 5)
            assert (row["aborted_requests"], row["estimated_requests"]) == (1, 1)

    asyncio.run(main())


def test_a_cache_hit_that_counts_against_nothing(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            whom = key(daily_tokens=100)
            limiter.settle(await limiter.admit(whom, tokens=100), usage=used(100, cached=True, charged=False))
            limiter.settle(await limiter.admit(whom, tokens=100), usage=used(100, cached=True))
            with pytest.raises(LimitReached):
                await limiter.admit(whom, tokens=1)
            assert await limiter.drain(LONG_S)
            (row,) = await usage.report(limiter.store)
            assert (row["requests"], row["cached_requests"]) == (2, 2)
            assert (row["input_tokens"], row["uncharged_tokens"]) == (100, 100)

    asyncio.run(main())


@pytest.mark.parametrize("count", [-5, 10**30, 1.5, None, "7", True])
def test_a_backends_nonsense_counts_nothing(url: str, count: Any) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            whom = key(daily_tokens=100, tokens=Rate(limit=100))
            one = await limiter.admit(whom, tokens=100)
            limiter.settle(one, usage=Used("k", "c", "t", "m", count, count, count))
            await limiter.admit(whom, tokens=100)

    asyncio.run(main())


def test_numbers_and_names_without_bounds(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            with pytest.raises(LimitReached):
                await limiter.admit(key(daily_tokens=100), tokens=10**40, cost_micro=10**40)
            odd = "jwt:https://issuer#\ud800 ключ\n\x00"
            whom = (Subject(f"key:{odd}", Limits(concurrency=1, daily_tokens=10, tokens=Rate(limit=10))),)
            one = await limiter.admit(whom, tokens=10)
            limiter.settle(one, usage=Used(odd, odd, odd, odd, 3))
            await limiter.admit(whom, tokens=7)
            assert await limiter.drain(LONG_S)
            (row,) = await usage.report(limiter.store, by="client")
            assert row["input_tokens"] == 3

    asyncio.run(main())


def test_limits_that_change_while_it_runs(url: str) -> None:
    async def main() -> None:
        async with limiting(url) as limiter:
            assert len(await admits(limiter, key(requests=Rate(limit=10, per="day"), concurrency=4), 8)) == 4
            assert len(await admits(limiter, key(requests=Rate(limit=5, per="day")), 20)) == 5
            assert len(await admits(limiter, key(concurrency=6), 20)) == 2

    asyncio.run(main())


def test_subjects() -> None:
    limits = Limits(concurrency=1)
    route = Route(backends=[Target(backend="b")], limits=limits)
    free = Route(backends=[Target(backend="b")])
    tenants = {"a": limits, "none": Limits(), "*": Limits(daily_tokens=5)}
    policy = Policy(Config(routes={"m": route, "free": free}, tenants=tenants))

    def caller(tenant: str, mine: Limits) -> Caller:
        return Caller("k", "c", tenant, "r", Role(), None, mine, True)

    assert [one.name for one in subjects(policy, caller("a", limits), "m", route)] == ["key:k", "tenant:a", "model:m"]
    assert subjects(policy, caller("none", Limits()), "free", free) == ()
    assert subjects(policy, caller("other", Limits()), None, None) == (Subject("tenant:other", tenants["*"]),)
    again = subjects(policy, caller("a", limits), "m", route)
    assert again is subjects(policy, caller("a", limits), "m", route)
    changed = Policy(Config(tenants={}))
    assert [one.name for one in subjects(changed, caller("a", limits), "m", route)] == ["key:k", "model:m"]


# Faults


def test_a_caller_that_goes_away_leaves_nothing_behind(redis_url: str) -> None:
    async def main() -> None:
        async with limiting(redis_url) as limiter:
            whom = key(concurrency=50, daily_tokens=1000, tokens=Rate(limit=1000, per="day"))
            for rounds in range(40):
                tasks = [asyncio.create_task(limiter.admit(whom, tokens=10)) for _ in range(20)]
                for _ in range(rounds % 8):
                    await asyncio.sleep(0)
                if rounds % 3 == 0:
                    await asyncio.sleep(0.001)
                for task in tasks:
                    if not task.cancel():
                        limiter.settle(task.result(), usage=None)
                for task in tasks:
                    with suppress(asyncio.CancelledError):
                        limiter.settle(await task, usage=None)
            assert await budget(limiter) == (0, 0, 0, 0)
            assert await leases(limiter) == 0
            assert limiter.running == {}
            assert len(await admits(limiter, whom, 1, 1000)) == 1

    asyncio.run(main())


def test_a_restart_keeps_what_runs_and_loses_no_settlement(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with limiting(redis_server.url) as limiter:
            whom = key(concurrency=3, daily_tokens=10**6)
            running = await admits(limiter, whom, 3, 100)
            redis_server.stop()
            await until(lambda: limiter.degraded, "the loss is noticed")
            with pytest.raises(Unavailable) as refused:
                await limiter.admit(whom, tokens=1)
            assert refused.value.headers["Retry-After"] == "1"
            limiter.settle(running[0], usage=used(70))
            assert not await limiter.drain(0.05)
            await asyncio.to_thread(redis_server.start)
            await until(lambda: limiter.store.available, "the store comes back")
            # Two still run, although this Redis had forgotten them.
            assert len(await admits(limiter, whom, 3)) == 1
            for one in running[1:]:
                limiter.settle(one, usage=used(50))
            assert await limiter.drain(LONG_S)
            (row,) = await usage.report(limiter.store)
            assert (row["requests"], row["input_tokens"]) == (3, 170)

    asyncio.run(main())


def test_answers_that_get_lost_are_neither_lost_nor_counted_twice(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with (
            RedisProxy(redis_server.port) as proxy,
            limiting(proxy.url) as limiter,
            limiting(redis_server.url) as observer,
        ):
            whom = key(
                requests=Rate(limit=1000, per="day"), concurrency=1000, daily_tokens=10**9, tokens=Rate(limit=10**6)
            )
            settled = 0
            for _ in range(8):
                running = await admits(limiter, whom, 5, 10)
                assert len(running) == 5
                proxy.deaf = True
                for one in running:
                    limiter.settle(one, usage=used(7, 3))
                    settled += 1
                # These are executed, and nobody learns of it.
                swallowed = proxy.swallowed
                asking = [asyncio.ensure_future(limiter.admit(whom, tokens=10)) for _ in range(20)]
                await until(lambda swallowed=swallowed: proxy.swallowed > swallowed)  # type: ignore[misc]
                limiter.store.reset("no answer, as if the time were out")
                results = await asyncio.gather(*asking, return_exceptions=True)
                assert all(isinstance(one, Unavailable) for one in results)
                proxy.deaf = False
                await until(lambda: limiter.store.available, "the store comes back")
            assert await limiter.drain(LONG_S)
            (row,) = await usage.report(observer.store)
            assert (row["requests"], row["input_tokens"], row["cost_micro"]) == (settled, settled * 7, settled * 3)
            assert await budget(observer) == (settled * 7, settled * 3, 0, 0)
            assert await leases(observer) == 0
            # 1000 less the settled ones: those of which nobody learnt were given back.
            assert len(await admits(observer, whom, 1000)) == 1000 - settled

    asyncio.run(main())


def test_commands_that_arrive_late_change_nothing(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with limiting(redis_server.url) as limiter:
            whom = key(requests=Rate(limit=100, per="day"), concurrency=100, daily_tokens=10**6)
            settled = 0
            for _ in range(5):
                running = await admits(limiter, whom, 3, 10)
                redis_server.freeze()
                for one in running:
                    limiter.settle(one, usage=used(4))
                    settled += 1
                # Written to a connection that nobody reads now; executed when it is thawed, before or after the rest.
                late = asyncio.ensure_future(limiter.admit(whom, tokens=10))
                await asyncio.sleep(0.01)
                limiter.store.reset("no answer, as if the time were out")
                with pytest.raises(Unavailable):
                    await late
                redis_server.thaw()
                await until(lambda: limiter.store.available, "the store comes back")
            assert await budget(limiter) == (settled * 4, 0, 0, 0)
            (row,) = await usage.report(limiter.store)
            assert (row["requests"], row["input_tokens"]) == (settled, settled * 4)
            assert await leases(limiter) == 0
            assert len(await admits(limiter, whom, 100)) == 100 - settled

    asyncio.run(main())


def test_commands_that_arrive_after_everything_was_settled_anew(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with (
            RedisProxy(redis_server.port) as proxy,
            limiting(proxy.url) as limiter,
            limiting(redis_server.url) as observer,
        ):
            whom = key(requests=Rate(limit=100, per="day"), concurrency=100, daily_tokens=10**6)
            settled = 0
            for _ in range(3):
                running = await admits(limiter, whom, 3, 10)
                proxy.holding = True
                for one in running:
                    limiter.settle(one, usage=used(4))
                    settled += 1
                late = asyncio.ensure_future(limiter.admit(whom, tokens=10))
                # One command is on its way, with the settlements and the admission; the next connection is open.
                await until(lambda: len(proxy._held) == 1)
                proxy.holding = False
                limiter.store.reset("no answer, as if the time were out")
                with pytest.raises(Unavailable):
                    await late
                await until(lambda: limiter.store.available, "the store comes back")
                assert await limiter.drain(LONG_S)
                before = redis_server.command("INFO", "commandstats")
                await proxy.release()
                await until(
                    lambda before=before: redis_server.command("INFO", "commandstats") != before,  # type: ignore[misc]
                    "it arrives",
                )
            assert await budget(observer) == (settled * 4, 0, 0, 0)
            (row,) = await usage.report(observer.store)
            assert (row["requests"], row["input_tokens"]) == (settled, settled * 4)
            assert await leases(observer) == 0
            assert len(await admits(observer, whom, 100)) == 100 - settled

    asyncio.run(main())


def test_connections_that_break_again_and_again(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with (
            RedisProxy(redis_server.port) as proxy,
            limiting(proxy.url) as limiter,
            limiting(redis_server.url) as observer,
        ):
            whom = key(requests=Rate(limit=10**6, per="day"), concurrency=10**6, daily_tokens=10**9)
            served = 0
            stop = False

            async def client() -> None:
                nonlocal served
                while not stop:
                    try:
                        one = await limiter.admit(whom, tokens=10)
                    except Unavailable:
                        await asyncio.sleep(0.005)
                        continue
                    await asyncio.sleep(0.001)
                    limiter.settle(one, usage=used(3, 2))
                    served += 1

            clients = [asyncio.create_task(client()) for _ in range(16)]
            for _ in range(6):
                before = served
                await until(lambda before=before: served > before + 20, "requests are served")  # type: ignore[misc]
                proxy.cut()
            stop = True
            await asyncio.gather(*clients)
            await until(lambda: limiter.store.available, "the store comes back")
            assert await limiter.drain(LONG_S)
            assert await budget(observer) == (served * 3, served * 2, 0, 0)
            (row,) = await usage.report(observer.store)
            assert (row["requests"], row["input_tokens"]) == (served, served * 3)
            assert await leases(observer) == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("break_it", "mend_it"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
)
def test_a_redis_that_takes_no_writes_is_away(
    redis_server: RedisServer, break_it: tuple[str, ...], mend_it: tuple[str, ...]
) -> None:
    async def main() -> None:
        async with limiting(redis_server.url) as limiter:
            whom = key(concurrency=5, daily_tokens=1000)
            one = await limiter.admit(whom, tokens=10)
            redis_server.command(*break_it)
            with pytest.raises(Unavailable):
                await limiter.admit(whom, tokens=10)
            limiter.settle(one, usage=used(8))
            await until(lambda: not limiter.store.available and limiter.store.last_error != "", "it counts as away")
            redis_server.command(*mend_it)
            await until(lambda: limiter.store.available, "the store comes back")
            assert await budget(limiter) == (8, 0, 0, 0)
            assert await leases(limiter) == 0

    asyncio.run(main())


def test_scripts_that_were_flushed(redis_url: str, shared_redis: RedisServer) -> None:
    async def main() -> None:
        async with limiting(redis_url) as limiter:
            whom = key(daily_tokens=1000)
            one = await limiter.admit(whom, tokens=100)
            shared_redis.command("SCRIPT", "FLUSH")
            limiter.settle(one, usage=used(9))
            await until(lambda: not limiter._pending and not limiter._unacknowledged, "it is written")
            assert await budget(limiter) == (9, 0, 0, 0)

    asyncio.run(main())


def test_leases_are_renewed_while_a_request_runs_and_end_with_the_replica(redis_url: str) -> None:
    async def main() -> None:
        whom, clock = key(concurrency=1), Clock()
        async with (
            limiting(redis_url, clock, lease_s=30, renew_s=0.02) as one,
            limiting(redis_url, clock, lease_s=30) as other,
        ):
            running = await one.admit(whom, tokens=1)

            async def ends() -> float:
                (_, score) = await one.store.call("ZRANGE", f"{one.store.prefix}:lease:key:k", 0, -1, "WITHSCORES")
                return float(score)

            for _ in range(5):
                before = await ends()
                clock.now += 20 * 10**6
                async with asyncio.timeout(LONG_S):
                    while await ends() == before:
                        await asyncio.sleep(0.01)
                assert await admits(other, whom, 1) == []
            assert await leases(other) == 1
            # The replica is gone without a word.
            one.close()
            one._pending.renew.clear()
            clock.now += 29 * 10**6
            assert await admits(other, whom, 1) == []
            clock.now += 2 * 10**6
            (found,) = await admits(other, whom, 1)
            other.settle(found, usage=None)
            one.settle(running, usage=None)

    asyncio.run(main())


def test_a_fraction_of_the_limits_while_redis_is_away(redis_server: RedisServer) -> None:
    async def main() -> None:
        options = {"on_failure": "local", "local_fraction": 0.25}
        async with limiting(redis_server.url, **options) as limiter:
            whom = (
                Subject("key:k", Limits(requests=Rate(limit=100, per="day"), daily_tokens=10**6)),
                Subject("tenant:t", Limits(concurrency=100)),
            )
            before = await limiter.admit(whom, tokens=10)
            assert not before.degraded
            redis_server.stop()
            await until(lambda: limiter.degraded, "the loss is noticed")
            limiter.settle(before, usage=used(10))
            away = await admits(limiter, whom, 100, 10)
            assert len(away) == 25
            assert all(one.degraded for one in away)
            small = await admits(limiter, (Subject("key:s", Limits(requests=Rate(limit=1, per="day"))),), 9)
            assert len(small) == 1
            none = await admits(limiter, (Subject("key:n", Limits(requests=Rate(limit=0))),), 9)
            assert none == []
            for one in away[:20]:
                limiter.settle(one, usage=used(4))
            await asyncio.to_thread(redis_server.start)
            await until(lambda: limiter.store.available, "the store comes back")
            assert not limiter.degraded
            # What still runs counts in Redis now.
            assert len(await admits(limiter, (whom[1],), 100)) == 95
            for one in away[20:]:
                limiter.settle(one, usage=used(4))
            assert await limiter.drain(LONG_S)
            (row,) = await usage.report(limiter.store)
            assert (row["requests"], row["input_tokens"]) == (26, 110)
            # The restart lost the 10 that were reserved for the first; all the rest is charged in full.
            assert (await budget(limiter))[0] == 25 * 4

    asyncio.run(main())


def test_what_waits_for_redis_is_bounded_and_what_is_dropped_counted(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 10)

    async def main() -> None:
        async with limiting(redis_server.url, on_failure="local", local_fraction=1.0) as limiter:
            redis_server.stop()
            await until(lambda: limiter.degraded, "the loss is noticed")
            drops: list[int] = []
            limiter.on_dropped = drops.append
            for number in range(25):
                one = await limiter.admit((), tokens=1)
                limiter.settle(one, usage=Used(f"k{number}", "c", "t", "m", 1))
            assert limiter.dropped == sum(drops) == 15
            await asyncio.to_thread(redis_server.start)
            await until(lambda: limiter.store.available, "the store comes back")
            assert await limiter.drain(LONG_S)
            assert len(await usage.report(limiter.store)) == 10

    asyncio.run(main())


def test_much_that_waited_is_written_in_pieces(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with limiting(redis_server.url, on_failure="local", local_fraction=1.0) as limiter:
            running = await admits(limiter, key(concurrency=5000, daily_tokens=10**9), 3000)
            redis_server.stop()
            await until(lambda: limiter.degraded, "the loss is noticed")
            for number, one in enumerate(running):
                limiter.settle(one, usage=Used(f"k{number}", "c", "t", "m", 2))
            await asyncio.to_thread(redis_server.start)
            await until(lambda: limiter.store.available, "the store comes back")
            assert await limiter.drain(LONG_S)
            rows = await usage.report(limiter.store)
            assert (len(rows), sum(row["input_tokens"] for row in rows)) == (3000, 6000)
            assert await leases(limiter) == 0
            scripts = redis_server.command("INFO", "commandstats")
            assert b"cmdstat_evalsha:calls=1," not in scripts

    asyncio.run(main())


def test_usage_and_budgets_agree_to_the_token_after_a_storm(redis_url: str) -> None:
    async def main() -> None:
        async with limiting(redis_url) as one, limiting(redis_url) as two:
            whom = key(daily_tokens=10**9, monthly_cost=10**6, concurrency=100, tokens=Rate(limit=10**9))

            async def client(limiter: Limiter, seed: int) -> None:
                for number in range(30):
                    try:
                        admission = await limiter.admit(whom, tokens=50 + seed, cost_micro=seed)
                    except LimitReached:
                        continue
                    await asyncio.sleep(0)
                    what = None if number % 5 == 0 else used(seed * number % 97, seed % 7, aborted=number % 2 == 0)
                    limiter.settle(admission, usage=what)

            await asyncio.gather(*[client(limiter, seed) for limiter in (one, two) for seed in range(100)])
            assert await one.drain(LONG_S) and await two.drain(LONG_S)
            (row,) = await usage.report(one.store)
            tokens, _, _, cost = await budget(one)
            assert row["input_tokens"] == tokens > 0
            assert row["cost_micro"] == cost > 0
            assert await leases(one) == 0

    asyncio.run(main())
