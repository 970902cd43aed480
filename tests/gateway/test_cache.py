"""The answer cache: what may be kept, where, for whom, and who asks when many want the same."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import cache as module
from serve_app.gateway import config
from serve_app.gateway.cache import Cache, CacheKey, Entry, Lead, version_of, worth
from serve_app.gateway.errors import Unavailable
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.store import Store

from .conftest import RedisServer
from .waiting import until

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
ON = config.Cache(enabled=True)
#: Nobody who waits for another's answer gives up, however busy the machine is.
PATIENT = config.Cache(enabled=True, wait_s=60)
EVENTS = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n'


def caller(client: str = "c1", tenant: str = "t1", retain: bool = True, filters: tuple[str, ...] = ()) -> Any:
    """As much of an `auth.Caller` as the cache reads."""
    return SimpleNamespace(client=client, tenant=tenant, retain=retain, role=config.Role(filters=list(filters)))


def entry(text: str = "hello", **more: Any) -> Entry:
    fields = {
        "status": 200,
        "headers": [(b"content-type", b"application/json")],
        "body": b'{"text":"%s"}' % text.encode(),
        "stream": False,
        "usage": (3, 5),
    }
    return Entry(**{**fields, **more})


def stream(body: bytes = EVENTS) -> Entry:
    return entry(headers=[(b"content-type", b"text/event-stream")], body=body, stream=True)


_KEYS = Cache(Store(config.Store()))


def key(body: dict[str, Any] | None = None, who: Any = None, cfg: config.Cache = ON, **more: Any) -> CacheKey | None:
    given = {"route_id": "m", "operation": "chat", "policy_version": "v1", **more}
    return _KEYS.key_of(cfg, who or caller(), body=CHAT if body is None else body, **given)


def sure(found: CacheKey | None) -> CacheKey:
    assert found is not None
    return found


@asynccontextmanager
async def caches(
    url: str, number: int = 1, metrics: Metrics | None = None, timeout_ms: int = 20_000
) -> AsyncIterator[list[Cache]]:
    """So many replicas on one Redis; an empty url: one on its own."""
    stores = [Store(config.Store(url=url, timeout_ms=timeout_ms)) for _ in range(number)]
    made = [Cache(store, metrics) for store in stores]
    for store in stores:
        await store.start()
    try:
        yield made
    finally:
        for one in made:
            await one.close()
        for store in stores:
            await store.close()


async def fill(cache: Cache, where: CacheKey, what: Entry) -> None:
    lead = await cache.lookup(where)
    assert isinstance(lead, Lead)
    assert await lead.put(what)
    await cache.drain()


async def get(cache: Cache, where: CacheKey) -> Entry | None:
    found = await cache.lookup(where)
    if isinstance(found, Entry):
        return found
    found.release()
    await cache.drain()
    return None


# -- what has a key ---------------------------------------------------------------------------------------


def test_nothing_is_kept_unless_the_cache_is_on() -> None:
    assert key(cfg=config.Cache()) is None
    assert key() is not None


def test_only_the_operations_of_the_configuration() -> None:
    assert key(operation="rerank") is None
    assert key({"model": "m", "input": "x"}, operation="embeddings") is not None
    assert key(cfg=config.Cache(enabled=True, operations=["embeddings"])) is None


def test_a_caller_that_wants_nothing_retained_has_no_key() -> None:
    assert key(who=caller(retain=False)) is None
    assert key(who=caller(retain=False), asked=True) is None


@pytest.mark.parametrize(
    ("change", "cached", "asked"),
    [
        ({}, True, True),
        ({"temperature": 0.0}, True, True),
        ({"temperature": 0, "n": 3}, True, True),
        ({"temperature": 0, "seed": 1}, True, True),
        ({"temperature": 0, "n": None}, True, True),
        ({"temperature": 1}, False, True),
        ({"temperature": None}, False, True),
        ({"temperature": False}, False, True),
        ({"temperature": "0"}, False, True),
        ({"temperature": 1, "n": 1}, False, True),
        ({"temperature": 1, "n": 2}, False, False),
        ({"temperature": 1, "best_of": 2}, False, False),
        ({"store": True}, False, False),
        ({"previous_response_id": "r1"}, False, False),
        ({"web_search_options": {"a": 1}}, False, False),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, True, True),
        ({"tools": [{"type": "web_search"}]}, False, False),
        ({"tools": ["odd"]}, False, False),
    ],
)
def test_chance_and_the_outside_world_keep_a_request_out(change: dict[str, Any], cached: bool, asked: bool) -> None:
    assert (key({**CHAT, **change}) is not None) is cached
    assert (key({**CHAT, **change}, asked=True) is not None) is asked


@pytest.mark.parametrize(
    ("part", "cached"),
    [
        ({"type": "text", "text": "see http://example.com"}, True),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, True),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, False),
        ({"type": "input_image", "image_url": "https://example.com/a.png"}, False),
        ({"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}, False),
        ({"type": "file", "file": {"file_id": "file-1"}}, False),
        ({"type": "input_file", "file_id": "file-1"}, False),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, True),
        ("odd", True),
    ],
)
def test_what_the_backend_would_fetch_is_not_kept(part: Any, cached: bool) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": [part]}]}
    assert (key(body) is not None) is cached
    cfg = config.Cache(enabled=True, operations=["responses"])
    body = {"model": "m", "input": [{"role": "user", "content": [part]}], "temperature": 0}
    assert (key(body, cfg=cfg, operation="responses") is not None) is cached


def test_when_asked_only_the_asking_count() -> None:
    cfg = config.Cache(enabled=True, when="asked")
    assert key(cfg=cfg) is None
    assert key(cfg=cfg, asked=True) is not None


def test_everything_the_answer_depends_on_is_in_the_key() -> None:
    same = sure(key()).name
    assert sure(key(dict(reversed(CHAT.items())))).name == same
    assert sure(key({**CHAT, "stream": False})).name == same
    assert sure(key({**CHAT, "user": "u", "metadata": {"a": "b"}})).name == same
    others = [
        key({**CHAT, "max_tokens": 5}),
        key({**CHAT, "stream": True}),
        key({**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        key({**CHAT, "messages": [{"role": "user", "content": "hi "}]}),
        key({**CHAT, "model": "alias"}),
        key(operation="completions"),
        key(route_id="m2"),
        key(policy_version="v2"),
        key(extra="canary"),
        key(who=caller(filters=("pii",))),
        key(who=caller(tenant="t2")),
        key(cfg=config.Cache(enabled=True, scope="client")),
        key(cfg=config.Cache(enabled=True, scope="all")),
    ]
    names = [sure(one).name for one in others]
    assert len({same, *names}) == len(names) + 1


def test_the_order_of_a_schemas_fields_is_part_of_the_request() -> None:
    def asking(*names: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        return {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}

    assert sure(key(asking("a", "b"))).name != sure(key(asking("b", "a"))).name


def test_scopes_share_as_far_as_they_say() -> None:
    def name(scope: Any, client: str, tenant: str) -> str:
        cfg = config.Cache(enabled=True, scope=scope)
        return sure(key(cfg=cfg, who=caller(client=client, tenant=tenant))).name

    assert name("tenant", "c1", "t1") == name("tenant", "c2", "t1") != name("tenant", "c1", "t2")
    assert name("client", "c1", "t1") == name("client", "c1", "t1") != name("client", "c2", "t1")
    assert name("client", "c1", "t1") != name("client", "c1", "t2")
    assert name("all", "c1", "t1") == name("all", "c2", "t2")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES, _VALUES)
def test_requests_that_differ_have_keys_that_differ(one: Any, other: Any) -> None:
    names = [sure(key({**CHAT, "x": value})).name for value in (one, other)]
    assert (names[0] == names[1]) == (msgspec.json.encode(one) == msgspec.json.encode(other))


def test_the_version_follows_what_answers_depend_on_and_no_more() -> None:
    plain = config.Config()
    assert version_of(plain) == version_of(config.Config(keys=[_key()], roles={"r": config.Role()}))
    assert version_of(plain) != version_of(config.Config(backends={"b": config.Backend(url="http://b")}))
    assert version_of(plain) != version_of(config.Config(filters={"f": config.Filter(type="words")}))
    assert version_of(plain) != version_of(config.Config(routes={"m": config.Route(backends=[])}))


def _key() -> config.Key:
    return config.Key(id="k", prefix="rp-abcdefghijkl", hash="sha256:" + "0" * 64, role="r")


# -- what is worth keeping --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (entry(), True),
        (entry(body=b' {"a":1}\n'), True),
        (entry(body=b'{"text":"the \\"finish_reason\\":\\"content_filter\\" of it"}'), True),
        (entry(body=b'{"choices":[{"finish_reason":"length"}]}'), True),
        (entry(status=500), False),
        (entry(status=206), False),
        (entry(body=b'{"error":{"message":"x"}}'), False),
        (entry(body=b'{"a":1'), False),
        (entry(body=b""), False),
        (entry(body=b"<html>"), False),
        (entry(body=b'{"choices":[{"finish_reason":"content_filter"}]}'), False),
        (entry(body=b'{"choices":[{"finish_reason": "abort"}]}'), False),
        (entry(headers=[(b"Content-Encoding", b"gzip")]), False),
        (entry(headers=[(b"content-encoding", b"identity")]), True),
        (stream(), True),
        (stream(EVENTS.replace(b"\n", b"\r\n")), True),
        (stream(b"event: response.created\ndata: {}\n\nevent: response.completed\ndata: {}\n\n"), True),
        (stream(b"event: response.created\ndata: {}\n\nevent: response.failed\ndata: {}\n\n"), False),
        (stream(b""), False),
        (stream(EVENTS.removesuffix(b"data: [DONE]\n\n")), False),
        (stream(EVENTS.removesuffix(b"\n")), False),
        (stream(b'data: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n'), False),
        (stream(b'data: {"a":1}\n\ndata: {"error": {}}\n\ndata: [DONE]\n\n'), False),
        (stream(b'data: {"choices":[{"finish_reason":"content_filter"}]}\n\ndata: [DONE]\n\n'), False),
        (stream(b'data: {"text":"data: {\\"error\\"}"}\n\ndata: [DONE]\n\n'), True),
    ],
)
def test_only_whole_and_successful_answers_are_worth_keeping(answer: Entry, kept: bool) -> None:
    assert worth(answer) is kept

    async def through() -> bool:
        async with caches("") as (cache,):
            lead = await cache.lookup(sure(key()))
            assert isinstance(lead, Lead)
            put = await lead.put(answer)
            await cache.drain()
            assert (await get(cache, sure(key())) is not None) is put
            return put

    assert asyncio.run(through()) is kept


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=8), st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]))
def test_a_stream_is_replayed_event_by_event_and_byte_by_byte(sizes: list[int], end: bytes) -> None:
    events = [b"data: " + b"x" * size + end for size in sizes]
    pieces = list(stream(b"".join(events)).pieces())
    assert b"".join(pieces) == b"".join(events)
    assert pieces[0] == events[0]
    assert all(piece.endswith(end) for piece in pieces)
    assert list(stream(b"data: 1\n\nrest").pieces()) == [b"data: 1\n\n", b"rest"]
    assert list(entry("x").pieces()) == [entry("x").body]


# -- keeping and finding, in Redis and in the process -----------------------------------------------------


@pytest.fixture(params=["redis", "process"])
def place(request: pytest.FixtureRequest) -> str:
    """The url of a Redis, or none."""
    return str(request.getfixturevalue("redis_url")) if request.param == "redis" else ""


def test_an_answer_is_found_again_as_it_was(place: str) -> None:
    async def go() -> None:
        metrics = Metrics()
        async with caches(place, metrics=metrics) as (cache,):
            binary = entry(body='{"ü":"\\u0000"}'.encode(), usage=(7, 11))
            await fill(cache, sure(key()), binary)
            found = await get(cache, sure(key()))
            assert found is not None
            assert (found.status, found.body, found.usage, found.how) == (200, binary.body, (7, 11), "hit")
            assert found.headers == [(b"content-type", b"application/json")]
            assert found.stored > 1e9
            assert await get(cache, sure(key({**CHAT, "max_tokens": 1}))) is None
            assert await get(cache, sure(key(who=caller(tenant="t2")))) is None
            streamed = {**CHAT, "stream": True}
            await fill(cache, sure(key(streamed)), stream())
            again = await get(cache, sure(key(streamed)))
            assert again is not None and again.stream and again.body == EVENTS
        assert b'cache_total{result="stored"} 2' in metrics.render()

    asyncio.run(go())


def test_headers_of_one_caller_are_not_another_ones(place: str) -> None:
    async def go() -> None:
        async with caches(place) as (cache,):
            headers = [(b"x-request-id", b"r1"), (b"set-cookie", b"a"), (b"Content-Type", b"application/json")]
            await fill(cache, sure(key()), entry(headers=headers))
            found = await get(cache, sure(key()))
            assert found is not None
            assert found.headers == [(b"Content-Type", b"application/json")]

    asyncio.run(go())


def test_an_entry_ends_with_its_time(place: str) -> None:
    async def go() -> None:
        async with caches(place) as (cache,):
            long = sure(key(cfg=config.Cache(enabled=True, ttl_s=3600)))
            await fill(cache, long, entry())
            assert await get(cache, long) is not None
            short = sure(key({**CHAT, "seed": 1}, cfg=config.Cache(enabled=True, ttl_s=0.05)))
            await fill(cache, short, entry())
            async with asyncio.timeout(60):
                while await get(cache, short) is not None:
                    await asyncio.sleep(0.01)
            assert await get(cache, long) is not None
            never = sure(key({**CHAT, "seed": 2}, cfg=config.Cache(enabled=True, ttl_s=0)))
            lead = await cache.lookup(never)
            assert isinstance(lead, Lead)
            assert not await lead.put(entry())
            assert await get(cache, never) is None

    asyncio.run(go())


def test_too_large_an_answer_is_given_to_those_who_wait_and_not_kept(place: str) -> None:
    async def go() -> None:
        async with caches(place) as (cache,):
            small = sure(key(cfg=config.Cache(enabled=True, max_entry_bytes=10)))
            lead = await cache.lookup(small)
            assert isinstance(lead, Lead)
            waiting = asyncio.create_task(cache.lookup(small))
            await asyncio.sleep(0)
            assert not await lead.put(entry())
            found = await waiting
            assert isinstance(found, Entry) and found.how == "shared"
            assert await get(cache, small) is None

    asyncio.run(go())


def test_the_process_holds_so_many_bytes_and_lets_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_BYTES", 1000)

    async def go() -> None:
        async with caches("") as (cache,):
            keys = [sure(key({**CHAT, "seed": number})) for number in range(4)]
            for where in keys[:3]:
                await fill(cache, where, entry("x" * 300))
            assert await get(cache, keys[0]) is not None
            await fill(cache, keys[3], entry("x" * 300))
            assert [await get(cache, where) is not None for where in keys] == [True, False, True, True]
            await fill(cache, keys[1], entry("x" * 300))
            assert [await get(cache, where) is not None for where in keys] == [False, True, True, True]

    asyncio.run(go())


# -- one asks for all -------------------------------------------------------------------------------------


async def ask(cache: Cache, where: CacheKey, backend: Callable[[], Awaitable[Entry]]) -> Entry:
    """A request as the gateway makes it."""
    found = await cache.lookup(where)
    if isinstance(found, Entry):
        return found
    try:
        made = await backend()
        await found.put(made)
        return made
    finally:
        found.release()


@pytest.mark.parametrize("replicas", [1, 4])
def test_equal_requests_at_once_ask_the_backend_once(redis_url: str, replicas: int) -> None:
    calls = 0

    async def backend() -> Entry:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.2)
        return entry(secrets.token_hex(8))

    async def go() -> None:
        async with caches(redis_url, replicas) as made:
            where = sure(key(cfg=PATIENT))
            answers = await asyncio.gather(*(ask(made[number % replicas], where, backend) for number in range(200)))
            assert calls == 1
            assert {one.body for one in answers} == {answers[0].body}
            assert {one.how for one in answers} == {"hit", "shared"}
            found = await get(made[-1], where)
            assert found is not None and found.how == "hit"

    asyncio.run(go())


def test_requests_of_a_process_alone_ask_once_too() -> None:
    calls = 0

    async def backend() -> Entry:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.05)
        return entry()

    async def go() -> None:
        async with caches("") as (cache,):
            await asyncio.gather(*(ask(cache, sure(key(cfg=PATIENT)), backend) for _ in range(50)))
            assert calls == 1
            await asyncio.gather(*(ask(cache, sure(key({**CHAT, "seed": one})), backend) for one in range(5)))
            assert calls == 6

    asyncio.run(go())


@pytest.mark.parametrize("replicas", [1, 2])
def test_those_who_wait_go_on_when_the_first_one_fails(redis_url: str, replicas: int) -> None:
    calls = 0

    async def backend() -> Entry:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(0.1)
            raise ConnectionError
        return entry()

    async def go() -> None:
        async with caches(redis_url, replicas) as made:
            where = sure(key(cfg=PATIENT))
            answers = await asyncio.gather(
                *(ask(made[number % replicas], where, backend) for number in range(10)), return_exceptions=True
            )
            assert sum(isinstance(one, ConnectionError) for one in answers) == 1
            assert sum(isinstance(one, Entry) for one in answers) == 9
            # The lock went back with the failure: the next one leads again, and keeps what it gets.
            later = sure(key({**CHAT, "seed": 2}))
            await fill(made[0], later, entry())
            await made[0].drain()
            lead = await made[0].lookup(where)
            if isinstance(lead, Lead):
                assert await lead.put(entry())

    asyncio.run(go())


def test_a_request_that_waited_long_enough_asks_itself(redis_url: str) -> None:
    async def go() -> None:
        async with caches(redis_url, 2) as (one, other):
            where = sure(key(cfg=config.Cache(enabled=True, wait_s=0.15)))
            lead = await one.lookup(where)
            assert isinstance(lead, Lead)
            # The same process waits for a future, the other for a lock in Redis; both give up.
            beside, elsewhere = await asyncio.gather(one.lookup(where), other.lookup(where))
            assert isinstance(beside, Lead) and isinstance(elsewhere, Lead)
            assert not await beside.put(entry("beside"))
            assert not await elsewhere.put(entry("elsewhere"))
            # Whoever comes later than that does not wait at all: not for a time, not for the loop to turn often.
            coming = asyncio.create_task(one.lookup(where))
            for _ in range(5):
                await asyncio.sleep(0)
            assert coming.done()
            late = coming.result()
            assert isinstance(late, Lead) and not await late.put(entry("late"))
            assert await lead.put(entry("first"))
            await one.drain()
            for cache in (one, other):
                found = await get(cache, where)
                assert found is not None and found.body == entry("first").body

    asyncio.run(go())


def test_a_replica_that_dies_holds_nobody_up(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with caches(redis_url, 2) as (dead, alive):
            where = sure(key(cfg=PATIENT))
            with monkeypatch.context() as patch:
                patch.setattr(module, "LOCK_MS", 200)
                assert isinstance(await dead.lookup(where), Lead)
            lead = await alive.lookup(where)
            assert isinstance(lead, Lead)
            assert await lead.put(entry())
            await alive.drain()
            assert await get(alive, where) is not None

    asyncio.run(go())


def test_a_caller_that_leaves_while_it_looks_up_blocks_nobody(redis_url: str) -> None:
    async def go() -> None:
        async with caches(redis_url, 2) as (one, other):
            where = sure(key())
            lead = await one.lookup(where)
            assert isinstance(lead, Lead)
            follower = asyncio.create_task(one.lookup(where))
            poller = asyncio.create_task(other.lookup(where))
            await asyncio.sleep(0.05)
            for task in (follower, poller):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            lead.release()
            lead.release()
            assert not await lead.put(entry())
            await one.drain()
            for cache in (other, one):
                found = await cache.lookup(where)
                assert isinstance(found, Lead)
                # It leads, and does not merely go on beside a request that nobody answers any more.
                assert found._flight is not None
                found.release()
                await cache.drain()

    asyncio.run(go())


def test_closing_lets_everybody_go(redis_url: str) -> None:
    async def go() -> None:
        async with caches(redis_url) as (cache,):
            lead = await cache.lookup(sure(key()))
            waiting = asyncio.create_task(cache.lookup(sure(key())))
            await asyncio.sleep(0.01)
            await cache.close()
            assert isinstance(await waiting, Lead)
            assert isinstance(lead, Lead)
            lead.release()

    asyncio.run(go())


# -- purging ----------------------------------------------------------------------------------------------


def test_purging_takes_what_belongs_to_a_tenant_a_client_or_a_model(place: str) -> None:
    async def go() -> None:
        async with caches(place) as (cache,):
            keys = {
                (client, tenant, model): sure(key(who=caller(client, tenant), route_id=model, extra=client))
                for client, tenant in (("c1", "t1"), ("c2", "t1"), ("c3", "t2"))
                for model in ("m1", "m2")
            }

            async def left() -> set[tuple[str, str, str]]:
                return {name for name, where in keys.items() if await get(cache, where) is not None}

            for where in keys.values():
                await fill(cache, where, entry())
            assert await left() == set(keys)
            assert await cache.purge() == 0
            assert await cache.purge(client="nobody") == 0
            assert await left() == set(keys)
            assert await cache.purge(client="c1") == 2
            assert await left() == {name for name in keys if name[0] != "c1"}
            assert await cache.purge(model="m1") == 2
            assert await left() == {("c2", "t1", "m2"), ("c3", "t2", "m2")}
            assert await cache.purge(tenant="t1", client="c3") == 2
            assert await left() == set()

    asyncio.run(go())


def test_a_purge_takes_more_than_one_batch(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PURGE_BATCH", 7)

    async def go() -> None:
        async with caches(redis_url) as (cache,):
            for number in range(21):
                await fill(cache, sure(key({**CHAT, "seed": number})), entry())
            assert await cache.purge(tenant="t1") == 21
            assert await cache.purge(model="m") == 0

    asyncio.run(go())


def test_what_was_under_way_when_a_purge_came_is_not_kept(place: str) -> None:
    async def go() -> None:
        async with caches(place, 2 if place else 1) as made:
            where = sure(key())
            lead = await made[0].lookup(where)
            assert isinstance(lead, Lead)
            # By another replica, where there is one.
            await made[-1].purge(client="c1")
            await lead.put(entry())
            await made[0].drain()
            assert await get(made[0], where) is None
            await fill(made[0], where, entry())
            assert await get(made[-1], where) is not None

    asyncio.run(go())


def test_indexes_hold_no_more_than_there_is(redis_url: str, shared_redis: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_url) as (cache,):
            long, middle, short = (config.Cache(enabled=True, ttl_s=ttl_s) for ttl_s in (3600, 600, 0.05))
            await fill(cache, sure(key(cfg=long, who=caller("c9"), body={**CHAT, "seed": 0})), entry())
            for number in range(1, 6):
                await fill(cache, sure(key(cfg=short, who=caller("c9"), body={**CHAT, "seed": number})), entry())
            await asyncio.sleep(0.1)
            await fill(cache, sure(key(cfg=middle, who=caller("c9"), body={**CHAT, "seed": 9})), entry())
            assert shared_redis.command("ZCARD", "rayplane:cache:of:client:c9") == b":2\r\n"
            # An entry of short life does not shorten the index of a long one.
            left = int(shared_redis.command("PTTL", "rayplane:cache:of:client:c9")[1:])
            assert 3_000_000 < left <= 3_600_000
            assert await cache.purge(client="c9") == 2

    asyncio.run(go())


# -- Redis is away ----------------------------------------------------------------------------------------


def test_without_redis_there_is_no_cache_and_nothing_else_changes(redis_server: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_server.url) as (cache,):
            where = sure(key())
            await fill(cache, where, entry())
            assert await get(cache, where) is not None
            redis_server.stop()
            for _ in range(3):
                lead = await cache.lookup(where)
                assert isinstance(lead, Lead)
                assert not await lead.put(entry())
                lead.release()
            with pytest.raises(Unavailable):
                await cache.purge(client="c1")
            redis_server.start()
            await until(lambda: cache._own is not None and cache._own.available)
            assert await get(cache, where) is None
            await fill(cache, where, entry())
            assert await get(cache, where) is not None

    asyncio.run(go())


def test_a_redis_that_hangs_costs_one_time_out_and_no_request(redis_server: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_server.url, timeout_ms=1000) as (cache,):
            where = sure(key())
            redis_server.freeze()
            found = await asyncio.gather(*(cache.lookup(sure(key({**CHAT, "seed": one}))) for one in range(20)))
            assert all(isinstance(one, Lead) for one in found)
            assert cache._own is not None
            # The connections to come have time.
            cache._own.timeout_s = 20
            redis_server.thaw()
            await until(lambda: cache._own is not None and cache._own.available)
            await fill(cache, where, entry())
            assert await get(cache, where) is not None

    asyncio.run(go())


def test_a_redis_that_goes_while_the_backend_answers(redis_server: RedisServer) -> None:
    async def go() -> None:
        metrics = Metrics()
        async with caches(redis_server.url, metrics=metrics, timeout_ms=1000) as (cache,):
            first = await cache.lookup(sure(key()))
            second = await cache.lookup(sure(key({**CHAT, "seed": 2})))
            assert isinstance(first, Lead) and isinstance(second, Lead)
            redis_server.freeze()
            # The entry is on its way when it turns out that nobody takes it.
            assert await first.put(entry())
            waiting = asyncio.create_task(cache.lookup(sure(key({**CHAT, "seed": 2}))))
            await cache.drain()
            assert b'cache_total{result="error"} 1' in metrics.render()
            assert b"stored" not in metrics.render()
            # From then on it is known; whoever waits in this process still gets the answer.
            assert not await second.put(entry())
            assert isinstance(await waiting, Entry)
            redis_server.thaw()

    asyncio.run(go())


def test_a_redis_that_comes_later_is_used_from_then_on(redis_server: RedisServer) -> None:
    redis_server.stop()

    async def go() -> None:
        metrics = Metrics()
        async with caches(redis_server.url, metrics=metrics, timeout_ms=500) as (cache,):
            found = await cache.lookup(sure(key()))
            assert isinstance(found, Lead)
            assert not await found.put(entry())
            assert b'cache_total{result="error"} 1' in metrics.render()
            assert cache._own is not None
            cache._own.timeout_s = 20
            redis_server.start()
            await until(lambda: cache._own is not None and cache._own.available)
            await fill(cache, sure(key()), entry())
            assert await get(cache, sure(key())) is not None

    asyncio.run(go())


def test_scripts_that_redis_forgot_are_sent_again(redis_url: str, shared_redis: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_url) as (cache,):
            await fill(cache, sure(key()), entry())
            shared_redis.command("SCRIPT", "FLUSH")
            assert await get(cache, sure(key())) is not None
            shared_redis.command("SCRIPT", "FLUSH")
            await fill(cache, sure(key({**CHAT, "seed": 1})), entry())
            assert await cache.purge(tenant="t1") == 2

    asyncio.run(go())


def test_a_value_of_another_release_is_a_miss_and_is_replaced(redis_url: str, shared_redis: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_url) as (cache,):
            where = sure(key())
            shared_redis.command("SET", f"rayplane:cache:entry:{where.name}", "nonsense")
            await fill(cache, where, entry())
            found = await get(cache, where)
            assert found is not None and found.body == entry().body

    asyncio.run(go())


def test_an_error_reply_of_redis_is_no_error_of_the_request(redis_url: str, shared_redis: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_url) as (cache,):
            where = sure(key())
            shared_redis.command("LPUSH", f"rayplane:cache:entry:{where.name}", "x")
            lead = await cache.lookup(where)
            assert isinstance(lead, Lead)
            assert not await lead.put(entry())

    asyncio.run(go())


def test_entries_on_their_way_are_bounded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING_BYTES", 1000)

    async def go() -> None:
        async with caches(redis_url) as (cache,):
            leads = [await cache.lookup(sure(key({**CHAT, "seed": one}))) for one in range(5)]
            put = [await lead.put(entry("x" * 400)) for lead in leads if isinstance(lead, Lead)]
            assert put == [True, True, False, False, False]
            await cache.drain()
            await fill(cache, sure(key({**CHAT, "seed": 9})), entry("x" * 400))

    asyncio.run(go())


# -- likeness ---------------------------------------------------------------------------------------------


class Words:
    """An index by the share of common words, as simple as one can be."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.held: list[tuple[str, str, CacheKey]] = []

    async def nearest(self, scope: str, text: str, threshold: float) -> str | None:
        if self.broken:
            raise RuntimeError("the index is down")
        for held, words, where in self.held:
            one, other = set(words.split()), set(text.split())
            if held == scope and len(one & other) / len(one | other) >= threshold:
                return where.name
        return None

    async def add(self, scope: str, text: str, key: CacheKey) -> None:
        if self.broken:
            raise RuntimeError("the index is down")
        self.held.append((scope, text, key))

    async def forget(self, *, tenant: str | None, client: str | None, model: str | None) -> None:
        self.held = [
            one for one in self.held if one[2].tenant != tenant and one[2].client != client and one[2].model != model
        ]


def saying(text: str, **more: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": text}], **more}


def semantic(threshold: float = 0.6, **options: Any) -> config.Cache:
    path = f"{__name__}.Words"
    return config.Cache(enabled=True, semantic=path, semantic_options=options, semantic_threshold=threshold)


def test_texts_that_are_alike_share_an_answer_and_nothing_else_does(place: str) -> None:
    async def go() -> None:
        async with caches(place) as (cache,):

            def at(body: dict[str, Any], operation: str = "chat", who: Any = None) -> CacheKey:
                return sure(cache.key_of(semantic(), who or caller(), "m", operation, body, "v1"))

            await fill(cache, at(saying("what is the capital of France")), entry("Paris"))
            found = await get(cache, at(saying("what is the capital of France ?")))
            assert found is not None and (found.how, found.body) == ("semantic", entry("Paris").body)
            exact = await get(cache, at(saying("what is the capital of France")))
            assert exact is not None and exact.how == "hit"
            assert await get(cache, at(saying("who wrote this"))) is None
            assert await get(cache, at(saying("what is the capital of France ?", max_tokens=9))) is None
            assert await get(cache, at(saying("what is the capital of France ?"), who=caller(tenant="t2"))) is None
            other = saying("what is the capital of France ?")
            other["messages"][0]["content"] = "another system prompt"
            assert await get(cache, at(other)) is None
            await fill(cache, at({"prompt": "a b c d", "temperature": 0}, "completions"), entry("e"))
            assert await get(cache, at({"prompt": "a b c d !", "temperature": 0}, "completions")) is not None
            # Embeddings of like texts are not alike enough.
            await fill(cache, at({"input": "a b c d"}, "embeddings"), entry("v"))
            assert await get(cache, at({"input": "a b c d !"}, "embeddings")) is None
            # What an index finds and Redis no longer has is a miss.
            index = cache.configure(semantic())
            assert isinstance(index, Words)
            assert await cache.purge(client="c1") == 3
            assert index.held == []
            await index.add(at(saying("a b c d")).scope, "a b c d", at(saying("gone")))
            assert await get(cache, at(saying("a b c d !"))) is None

    asyncio.run(go())


def test_an_answer_found_by_likeness_leaves_no_lock(redis_url: str, shared_redis: RedisServer) -> None:
    async def go() -> None:
        async with caches(redis_url) as (cache,):
            keys = [
                sure(cache.key_of(semantic(), caller(), "m", "chat", saying(text), "v1"))
                for text in ("a b c", "a b c d")
            ]
            await fill(cache, keys[0], entry())
            found = await get(cache, keys[1])
            assert found is not None and found.how == "semantic"
            await cache.drain()
            assert shared_redis.command("EXISTS", f"rayplane:cache:lock:{keys[1].name}") == b":0\r\n"

    asyncio.run(go())


def test_a_purge_between_an_entry_and_its_text_leaves_neither(place: str) -> None:
    async def go() -> None:
        async with caches(place) as (cache,):
            index = cache.configure(semantic())
            assert isinstance(index, Words)
            add = index.add

            async def late(scope: str, text: str, key: CacheKey) -> None:
                await cache.purge(client="c1")
                await add(scope, text, key)

            index.add = late  # type: ignore[method-assign]
            await fill(cache, sure(cache.key_of(semantic(), caller(), "m", "chat", saying("a"), "v1")), entry())
            assert index.held == []

    asyncio.run(go())


def test_an_index_that_is_broken_leaves_an_exact_cache(place: str) -> None:
    async def go() -> None:
        metrics = Metrics()
        async with caches(place, metrics=metrics) as (cache,):
            where = sure(cache.key_of(semantic(broken=True), caller(), "m", "chat", saying("a"), "v1"))
            await fill(cache, where, entry())
            found = await get(cache, where)
            assert found is not None and found.how == "hit"
        page = metrics.render()
        assert b'cache_total{result="stored"} 1' in page
        assert b'cache_total{result="semantic_error"} 2' in page

    asyncio.run(go())


@pytest.mark.parametrize(
    "wrong", [f"{__name__}.Nothing", "no_such_package.Index", "json.JSONDecoder", "collections.OrderedDict.x", "bare"]
)
def test_an_index_that_cannot_be_made_is_named(wrong: str) -> None:
    cfg = config.Cache(enabled=True, semantic=wrong, semantic_options={"unknown": 1})
    with pytest.raises(ValueError, match=wrong.replace(".", r"\.")):
        Cache(Store(config.Store())).configure(cfg)


def test_an_index_is_made_once_for_a_configuration() -> None:
    made = Cache(Store(config.Store()))
    first = made.configure(semantic())
    assert first is not None and made.configure(semantic(0.9)) is first
    assert made.configure(semantic(broken=True)) is not first
    assert made.configure(ON) is None
