"""What administrators change while replicas run, shared through a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from serve_app.gateway import config, dynamic
from serve_app.gateway.dynamic import Dynamic, Purge, Revocation
from serve_app.gateway.errors import Unavailable
from serve_app.gateway.store import Store

from .conftest import RedisServer
from .waiting import until


class Clock:
    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@contextlib.asynccontextmanager
async def replica(
    url: str, clock: Callable[[], float] = time.time, timeout_ms: int = 20_000
) -> AsyncIterator[tuple[Dynamic, Store]]:
    store = Store(config.Store(url=url, timeout_ms=timeout_ms))
    made = Dynamic(store, clock=clock)
    await store.start()
    await made.start()
    try:
        yield made, store
    finally:
        await made.close()
        await made.close()
        await store.close()


def run(work: Awaitable[None]) -> None:
    async def body() -> None:
        await work

    asyncio.run(body())


def test_a_revocation_reaches_every_replica(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, _), replica(redis_url) as (two, _):
            assert one.loaded
            assert two.loaded
            changes: list[frozenset[str]] = []
            two.on_change.append(lambda: changes.append(two.revoked))
            await one.revoke("key-1", actor="root", reason="lost")
            assert one.revoked == {"key-1"}
            await until(lambda: two.revoked == {"key-1"})
            found = two.revocations["key-1"]
            assert (found.actor, found.reason, found.until) == ("root", "lost", 0.0)
            assert abs(found.at - time.time()) < 60
            await two.restore("key-1")
            await until(lambda: not one.revoked)
            assert changes == [frozenset({"key-1"}), frozenset()]

    run(work())


def test_a_replica_that_starts_knows_at_once(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, _):
            await one.revoke("key/1 ü", actor="root")
            await one.set_weights("llama", {"blue": 1, "green": 3}, actor="root")
        async with replica(redis_url) as (two, store):
            assert store.available
            assert two.revoked == {"key/1 ü"}
            assert two.weights == {"llama": {"blue": 1, "green": 3}}

    run(work())


def test_weights_are_replaced_and_taken_back(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, _), replica(redis_url) as (two, _):
            await one.set_weights("llama", {"blue": 90, "green": 10}, actor="root")
            await until(lambda: two.weights == {"llama": {"blue": 90, "green": 10}})
            assert two.overrides["llama"].actor == "root"
            await two.set_weights("llama", {"blue": 0, "green": 10}, actor="root")
            await until(lambda: one.weights == {"llama": {"blue": 0, "green": 10}})
            await one.set_weights("llama", None, actor="root")
            await until(lambda: two.weights == {})
            with pytest.raises(TypeError):
                two.weights["llama"] = {}  # type: ignore[index]

    run(work())


def test_canaries_are_replaced_and_taken_back(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, _), replica(redis_url) as (two, _):
            await one.set_canary("llama", 2.5, actor="root")
            await until(lambda: "llama" in two.canaries)
            assert (two.canaries["llama"].percent, two.canaries["llama"].actor) == (2.5, "root")
            assert two.weights == {}
            await two.set_canary("llama", None, actor="root")
            await until(lambda: one.canaries == {})

    run(work())


@pytest.mark.parametrize("local", [True, False])
def test_a_revocation_ends_by_itself(redis_url: str, local: bool) -> None:
    async def work() -> None:
        clock = Clock()
        async with replica("" if local else redis_url, clock) as (one, _):
            changes: list[bool] = []
            one.on_change.append(lambda: changes.append("key-1" in one.revoked))
            await one.revoke("key-1", actor="root", until=time.time() + 1000)
            assert one.revoked == {"key-1"}
            clock.offset = 2000.0
            await until(lambda: not one.revoked)
            assert changes == [True, False]

    run(work())


def test_without_redis_it_holds_in_the_process() -> None:
    async def work() -> None:
        async with replica("") as (one, _):
            assert one.loaded
            await one.revoke("key-1", actor="root")
            await one.set_weights("llama", {"blue": 1}, actor="root")
            await one.request_purge("alice", actor="root")
            assert one.revoked == {"key-1"}
            assert one.weights == {"llama": {"blue": 1}}
            assert one.purges["alice"].actor == "root"
            await one.restore("key-1")
            await one.set_weights("llama", None, actor="root")
            assert (one.revoked, one.weights) == (frozenset(), {})

    run(work())


def test_the_last_known_state_holds_while_redis_is_away(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with replica(redis_server.url) as (one, store):
            await one.revoke("key-1", actor="root")
            await asyncio.to_thread(redis_server.stop)
            await until(lambda: not store.available)
            assert one.revoked == {"key-1"}
            with pytest.raises(Unavailable) as refused:
                await one.revoke("key-2", actor="root")
            assert (refused.value.status, refused.value.code) == (503, "store_unavailable")
            assert one.revoked == {"key-1"}
            await asyncio.to_thread(redis_server.start)
            await until(lambda: store.available)
            assert one.revoked == {"key-1"}

    run(work())


def test_an_emptied_redis_is_filled_again(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with replica(redis_server.url) as (one, store), replica(redis_server.url) as (two, other):
            await one.revoke("key-1", actor="root")
            await one.revoke("key-2", actor="root")
            await one.restore("key-2")
            await two.set_weights("llama", {"blue": 1}, actor="root")
            await until(lambda: one.weights != {} and two.revoked == {"key-1"})
            await asyncio.to_thread(redis_server.stop)
            await until(lambda: not store.available and not other.available)
            await asyncio.to_thread(redis_server.start)
            await until(lambda: store.available and other.available)
            async with replica(redis_server.url) as (three, _):
                assert three.revoked == {"key-1"}
                assert three.weights == {"llama": {"blue": 1}}
                await three.restore("key-1")
                await until(lambda: not one.revoked and not two.revoked)
            # Nobody brings it back.
            await asyncio.sleep(6 * dynamic.POLL_S)
            assert not one.revoked
            assert not two.revoked

    run(work())


def test_a_redis_flushed_under_an_open_connection_is_filled_again(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with replica(redis_server.url) as (one, _), replica(redis_server.url) as (two, _):
            await one.revoke("key-1", actor="root")
            await until(lambda: two.revoked == {"key-1"})
            await asyncio.to_thread(redis_server.command, "FLUSHALL")
            async with replica(redis_server.url) as (three, _):
                await until(lambda: three.revoked == {"key-1"})
            assert one.revoked == two.revoked == {"key-1"}

    run(work())


def test_a_frozen_redis_blocks_nobody(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with replica(redis_server.url) as (other, _):
            await other.revoke("key-1", actor="root")
        async with replica(redis_server.url, timeout_ms=300) as (one, store):
            await until(lambda: one.revoked == {"key-1"})
            redis_server.freeze()
            with pytest.raises(Unavailable):
                await one.revoke("key-2", actor="root")
            assert one.revoked >= {"key-1"}
            # The connections to come have time.
            store.timeout_s = 20
            redis_server.thaw()
            await until(lambda: store.available)
            await one.restore("key-1")
            assert "key-1" not in one.revoked

    run(work())


def test_the_later_change_wins_although_redis_clock_goes_back(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, store):
            ahead = int((time.time() + 3600) * 1_000_000)
            await store.call(
                "HSET", "rayplane:dynamic", "revoked/key-1", b'%d {"actor":"root"}' % ahead, "version", ahead
            )
            await until(lambda: one.revoked == {"key-1"})
            await one.restore("key-1")
            assert not one.revoked
            async with replica(redis_url) as (two, _):
                assert not two.revoked
                assert two.loaded

    run(work())


def test_entries_of_another_version_are_left_alone(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, store):
            for field, value in (
                ("revoked/a", "rubbish"),
                ("revoked/b", "12 {"),
                ("revoked/c", '12 {"actor":"root","more":1}'),
                ("weights/d", '12 {"actor":"root"}'),
                ("revoked/f", "9" * 5000 + ' {"actor":"root"}'),
                ("tomorrow/e", '12 {"actor":"root"}'),
                (b"revoked/\xff", '12 {"actor":"root"}'),
            ):
                await store.call("HSET", "rayplane:dynamic", field, value)
            await store.call("HSET", "rayplane:dynamic", "version", 7)
            await until(lambda: "c" in one.revoked)
            assert one.revoked == {"c", "\ufffd"}
            assert one.weights == {}

    run(work())


def test_purges_are_told_for_a_day(redis_url: str) -> None:
    async def work() -> None:
        clock = Clock()
        async with replica(redis_url) as (one, _), replica(redis_url, clock) as (two, _):
            await one.request_purge("alice", actor="root")
            await until(lambda: "alice" in two.purges)
            first = two.purges["alice"]
            assert isinstance(first, Purge)
            await one.request_purge("alice", actor="root")
            await until(lambda: two.purges["alice"].at > first.at)
            clock.offset = 90_000.0
            await until(lambda: not two.purges)

    run(work())


def test_a_listener_is_called_only_for_changes(redis_url: str) -> None:
    async def work() -> None:
        async with replica(redis_url) as (one, _):
            calls: list[int] = []
            one.on_change.append(lambda: calls.append(1))
            await one.revoke("key-1", actor="root")
            await asyncio.sleep(6 * dynamic.POLL_S)
            assert calls == [1]
            assert one.revocations == {"key-1": Revocation("root", at=one.revocations["key-1"].at)}

    run(work())


def test_a_listener_that_fails_harms_nobody_else(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with replica(redis_server.url) as (one, store):
            calls: list[int] = []

            def fail() -> None:
                raise ValueError("broken")

            one.on_change += [fail, lambda: calls.append(1)]
            await one.revoke("key-1", actor="root")
            assert (calls, one.revoked) == ([1], {"key-1"})
            assert one.last_error == "a listener failed: ValueError: broken"
            async with replica(redis_server.url) as (two, _):
                await two.revoke("key-2", actor="root")
                await until(lambda: calls == [1, 1])
            assert store.available

    run(work())
