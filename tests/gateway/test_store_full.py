"""The two Redis of the role, as it starts them, with little memory: what is dropped, what is refused, what stays."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serve_app.gateway import config
from serve_app.gateway.cache import Cache, CacheKey, Entry, Lead
from serve_app.gateway.config import Limits
from serve_app.gateway.limits import Limiter, LimitReached, Subject, Used
from serve_app.gateway.policy import load
from serve_app.gateway.runtime import Runtime
from serve_app.gateway.store import Store, StoreRefusedError

from .running import PROJECT, settings
from .waiting import LONG_S, until

PASSWORD = "a word"
ALICE = Subject("key:alice", Limits(daily_tokens=1000))


def role() -> ModuleType:
    """The role's filters."""
    name = "rayplane_gateway_of_the_role"
    if name not in sys.modules:
        path = PROJECT / "plugins/filter/rayplane_gateway.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def arguments() -> dict[str, list[str]]:
    """How the role starts redis-server, by container."""
    import yaml

    defaults = yaml.safe_load((PROJECT / "roles/gateway/defaults/main.yml").read_text(encoding="utf-8"))
    given = {name.removeprefix("gateway_"): value for name, value in defaults.items()}
    given |= {"namespace": "rayplane", "labels": {}}
    objects = role()._redis(given, {"gateway-redis": {"password": PASSWORD}})
    containers = objects[0]["spec"]["template"]["spec"]["containers"]
    return {one["name"]: one["args"] for one in containers}


@dataclass
class Two:
    """Addresses of the store and of the cache beside it."""

    store: str
    cache: str


@pytest.fixture
def two(redis_program: str, tmp_path: Path, port: Callable[[], int]) -> Iterator[Two]:
    """Both of them, with 3 MB each."""
    acl = tmp_path / "users.acl"
    acl.write_text(f"user default on #{hashlib.sha256(PASSWORD.encode()).hexdigest()} ~* &* +@all -@admin\n")
    started, ports = [], {}
    for name, words in arguments().items():
        ports[name] = port()
        options = dict(zip(words[::2], words[1::2], strict=True))
        folder = tmp_path / name
        folder.mkdir()
        options |= {"--port": str(ports[name]), "--aclfile": str(acl), "--dir": str(folder), "--maxmemory": "3mb"}
        flat = [word for pair in options.items() for word in pair]
        started.append(subprocess.Popen([redis_program, *flat, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL))
    yield Two(*(f"redis://:a%20word@127.0.0.1:{ports[name]}/0" for name in ("redis", "cache")))
    for process in started:
        process.terminate()
    for process in started:
        process.wait(LONG_S)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(100):
            await work()

    asyncio.run(body())


def runtime_of(folder: Path, two: Two, **store: Any) -> Runtime:
    given = settings("http://127.0.0.1:1", cache={"enabled": True})
    given["store"] = {"url": two.store, "cache_url": two.cache, "timeout_ms": 20_000, **store}
    path = folder / "gateway.json"
    path.write_text(json.dumps(given))
    return Runtime(path, load(path))


async def statistic(store: Store, section: str, name: str) -> int:
    said = (await store.call("INFO", section)).decode()
    return int(next(line.split(":")[1] for line in said.split("\r\n") if line.startswith(f"{name}:")))


async def keep(cache: Cache, number: int, size: int) -> None:
    """Keep an answer of so many bytes."""
    key = CacheKey(f"{number:064}", "t", "c", "m", 300.0, 1024 * 1024, 0.5)
    found = await cache.lookup(key)
    if isinstance(found, Lead):
        await found.put(Entry(200, [], b'{"x": "' + b"x" * size + b'"}', False, (1, 1)))


async def spend(limiter: Limiter, tokens: int) -> None:
    admission = await limiter.admit((ALICE,), tokens=tokens)
    limiter.settle(admission, usage=Used("alice", "alice", "t", "m", input_tokens=tokens))
    assert await limiter.drain(LONG_S)


def test_budgets_survive_a_flood_of_cached_answers(two: Two, tmp_path: Path) -> None:
    async def work() -> None:
        runtime = runtime_of(tmp_path, two)
        await runtime.start()
        watch = Store(config.Store(url=two.cache, timeout_ms=20_000))
        try:
            await watch.start()
            await until(lambda: runtime.store.available and watch.available)
            await spend(runtime.limiter, 1000)
            with pytest.raises(LimitReached):
                await runtime.limiter.admit((ALICE,), tokens=1)
            # Twenty times what fits.
            for number in range(1200):
                await keep(runtime.cache, number, 50_000)
                if number % 50 == 0:
                    await runtime.cache.drain(LONG_S)
            await runtime.cache.drain(LONG_S)
            assert await statistic(watch, "stats", "evicted_keys") > 500
            assert await statistic(runtime.store, "stats", "evicted_keys") == 0
            with pytest.raises(LimitReached):
                await runtime.limiter.admit((ALICE,), tokens=1)
        finally:
            await watch.close()
            await runtime.close()

    run(work)


def test_a_store_that_is_full_counts_as_away_and_forgets_nothing(two: Two, tmp_path: Path) -> None:
    async def work() -> None:
        runtime = runtime_of(tmp_path, two, on_failure="local", local_fraction=0.5)
        await runtime.start()
        watch = Store(config.Store(url=two.store, timeout_ms=20_000))
        try:
            await watch.start()
            await until(lambda: runtime.store.available and watch.available)
            await runtime.dynamic.revoke("bob", actor="root")
            await spend(runtime.limiter, 900)
            for number, size in enumerate([5000] * 2000 + [50] * 2000):
                with contextlib.suppress(StoreRefusedError):
                    await watch.call("SET", f"filler:{number}", "x" * size)
            await runtime._look_at_memory()
            assert runtime.store_memory > 0.9
            # By this replica's own share from now on.
            many, number = Limits(daily_tokens=10**9), 0
            while not (await runtime.limiter.admit((Subject(f"key:new-{number}", many),), tokens=1)).degraded:
                number += 1
            # A replica that starts now knows who is revoked, and can serve.
            late = runtime_of(tmp_path, two, on_failure="local", local_fraction=0.5, timeout_ms=1000)
            await late.start()
            try:
                await until(late.informed)
                assert late.dynamic.revoked == {"bob"}
            finally:
                await late.close()
            # Room is made, and the budget is where it was.
            for number in range(4000):
                await watch.call("DEL", f"filler:{number}")
            await until(lambda: not runtime.limiter.degraded)
            with pytest.raises(LimitReached):
                await runtime.limiter.admit((ALICE,), tokens=101)
        finally:
            await watch.close()
            await runtime.close()

    run(work)
