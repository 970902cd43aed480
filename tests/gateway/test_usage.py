from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast

import pytest

from serve_app.gateway import usage
from serve_app.gateway.config import Store as Settings
from serve_app.gateway.errors import InvalidRequest, Unavailable
from serve_app.gateway.limits import Limiter, Used
from serve_app.gateway.store import Store

from .conftest import RedisServer


@pytest.fixture(params=["redis", "process"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("redis_url")) if request.param == "redis" else ""


def noon(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, 12, tzinfo=UTC).timestamp()) * 10**6


#: The tests' midnight may pass between this line and theirs; the days that count are given everywhere but in `days=2`.
TODAY = datetime.now(UTC).date()
YESTERDAY = TODAY - timedelta(days=1)


async def counted(url: str, use: Callable[[Store], Awaitable[None]]) -> None:
    """Four requests of two keys of one client and one of another, on two days."""
    store = Store(Settings(url=url, timeout_ms=20_000))
    clock = [noon(YESTERDAY)]
    limiter = Limiter(store, now_us=lambda: clock[0])
    await store.start()
    for day, used in (
        (YESTERDAY, Used("k1", "alice", "a", "m1", 10, 20, 3)),
        (TODAY, Used("k1", "alice", "a", "m1", 100, 200, 30)),
        (TODAY, Used("k1", "alice", "a", "m1", 1, 2, 1, aborted=True)),
        (TODAY, Used("k2", "alice", "a", "m2", 1000, 0, 5, estimated=True)),
        (TODAY, Used("k3", "bob", "b", "m2", 7, 7, 7, cached=True, charged=False)),
    ):
        clock[0] = noon(day)
        limiter.settle(await limiter.admit((), tokens=0), usage=used)
        assert await limiter.drain(60)
    await use(store)
    limiter.close()
    await store.close()


def test_reports(url: str) -> None:
    async def use(store: Store) -> None:
        rows = await usage.report(store, days=(TODAY, TODAY), by="key")
        assert rows == [
            {
                "key": "k2",
                "requests": 1,
                "input_tokens": 1000,
                "output_tokens": 0,
                "cost_micro": 5,
                "cached_requests": 0,
                "uncharged_tokens": 0,
                "aborted_requests": 0,
                "estimated_requests": 1,
            },
            {
                "key": "k1",
                "requests": 2,
                "input_tokens": 101,
                "output_tokens": 202,
                "cost_micro": 31,
                "cached_requests": 0,
                "uncharged_tokens": 0,
                "aborted_requests": 1,
                "estimated_requests": 0,
            },
            {
                "key": "k3",
                "requests": 1,
                "input_tokens": 0,
                "output_tokens": 0,
                "cost_micro": 0,
                "cached_requests": 1,
                "uncharged_tokens": 14,
                "aborted_requests": 0,
                "estimated_requests": 0,
            },
        ]
        both = (YESTERDAY, TODAY)
        by_client = await usage.report(store, days=both, by="client")
        assert [(row["client"], row["requests"], row["input_tokens"]) for row in by_client] == [
            ("alice", 4, 1111),
            ("bob", 1, 0),
        ]
        by_model = await usage.report(store, days=both, by="model")
        assert [(row["model"], row["output_tokens"]) for row in by_model] == [("m2", 0), ("m1", 222)]
        by_tenant = await usage.report(store, days=(YESTERDAY, YESTERDAY), by="tenant")
        assert [(row["tenant"], row["cost_micro"]) for row in by_tenant] == [("a", 3)]
        assert await usage.report(store, days=3, by="client") == by_client
        old = TODAY - timedelta(days=30)
        assert await usage.report(store, days=(old, old)) == []

    asyncio.run(counted(url, use))


def test_purge_removes_a_client_and_nobody_else(url: str) -> None:
    async def use(store: Store) -> None:
        assert await usage.purge(store, "alice") == 3
        assert await usage.purge(store, "alice") == 0
        assert await usage.purge(store, "nobody") == 0
        rows = await usage.report(store, days=(YESTERDAY, TODAY), by="client")
        assert [row["client"] for row in rows] == ["bob"]

    asyncio.run(counted(url, use))


def test_many_entries_are_read_in_pieces(redis_url: str) -> None:
    async def main() -> None:
        store = Store(Settings(url=redis_url, timeout_ms=20_000))
        limiter = Limiter(store, now_us=lambda: noon(TODAY))
        await store.start()
        for number in range(3000):
            admission = await limiter.admit((), tokens=0)
            limiter.settle(admission, usage=Used(f"k{number}", f"c{number % 2}", "t", "m", number))
        assert await limiter.drain(60)
        rows = await usage.report(store, days=(TODAY, TODAY), by="key")
        assert sum(row["input_tokens"] for row in rows) == 3000 * 2999 // 2
        assert await usage.purge(store, "c1") == 1500
        limiter.close()
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("days", [0, -1, 401, (TODAY, YESTERDAY), (TODAY - timedelta(days=400), TODAY)])
def test_days_that_make_no_sense(days: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(usage.report(Store(Settings()), days=days))
    assert refused.value.param == "days"


def test_a_grouping_that_does_not_exist() -> None:
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(usage.report(Store(Settings()), by=cast(Any, "colour")))
    assert refused.value.param == "by"


def test_redis_away(redis_server: RedisServer) -> None:
    async def main() -> None:
        redis_server.stop()
        store = Store(Settings(url=redis_server.url))
        await store.start()
        with pytest.raises(Unavailable):
            await usage.report(store)
        with pytest.raises(Unavailable):
            await usage.purge(store, "alice")
        await store.close()
        redis_server.start()

    asyncio.run(main())
