"""Which backend gets a request, and what happens when it fails."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from serve_app.gateway.config import Backend, Canary, Config, Health, Route, Shadow, Target, Timeouts
from serve_app.gateway.errors import BackendFailed, BackendTimeout, GatewayError, InvalidRequest, Unavailable
from serve_app.gateway.routing import MAX_SHADOWS, _renamed, _renamed_form

from .fake_backend import FakeBackend
from .routed import LIMIT, QUICK, Policy, Routed, routed, run, settings
from .waiting import until


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[FakeBackend, FakeBackend, FakeBackend]]:
    with FakeBackend(name="a") as a, FakeBackend(name="b") as b, FakeBackend(name="c") as c:
        yield a, b, c


@pytest.fixture
def three(servers: tuple[FakeBackend, FakeBackend, FakeBackend]) -> dict[str, FakeBackend]:
    """Three backends with their knobs reset, all of them running."""
    made = dict(zip("abc", servers, strict=True))
    for one in made.values():
        if one.process is None:
            one.start()
        one.reset()
    return made


def urls(backends: dict[str, FakeBackend], names: str = "abc") -> dict[str, str]:
    return {name: backends[name].url for name in names}


def targets(**weights: int) -> dict[str, Any]:
    return {"backends": [Target(backend=name, weight=weight) for name, weight in weights.items()]}


def asked(backend: FakeBackend) -> int:
    """Generation requests that a backend got."""
    return len(backend.seen("/v1/chat"))


# --- choice


def test_weights_share_the_traffic_exactly(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three), targets(a=50, b=30, c=20))) as it:
            counts = Counter(await it.names(100))
            for name, weight in {"a": 50, "b": 30, "c": 20}.items():
                assert abs(counts[name] - weight) <= 1

    run(main())


def test_weight_0_gets_nothing(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), targets(a=1, b=0))) as it:
            assert set(await it.names(20)) == {"a"}

    run(main())


def test_all_weights_0_is_unavailable(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), targets(a=0, b=0))) as it:
            with pytest.raises(Unavailable) as caught:
                await it.ask()
            assert caught.value.headers["retry-after"]

    run(main())


def test_weights_change_while_running(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        config = settings(urls(three, "ab"), targets(a=100, b=0))
        async with routed(config) as it:
            assert set(await it.names(10)) == {"a"}
            it.router.set_weights({"m": {"a": 0, "b": 100}, "unknown": {"a": 1}})
            assert set(await it.names(10)) == {"b"}
            assert it.router.snapshot()[0]["overridden"] is True
            assert (it.state("b")["weight"], it.state("b")["configured_weight"]) == (100, 0)
            # They outlive a reload of the policy.
            it.router.configure(Policy(config))
            assert set(await it.names(10)) == {"b"}
            it.router.set_weights({})
            assert set(await it.names(10)) == {"a"}
            assert it.router.snapshot()[0]["overridden"] is False

    run(main())


def test_weights_that_leave_no_backend_anything_are_passed_over(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), targets(a=100, b=0)), start=True) as it:
            it.router.set_weights({"m": {"a": 0, "b": 100}})
            assert set(await it.names(4)) == {"b"}
            assert it.router.ignored == frozenset() and it.told == []
            # A deployment takes the backend away that had all of it.
            without = Policy(settings(urls(three, "ac"), targets(a=100, c=0)))
            it.router.configure(without)
            it.router.configure(without)
            assert set(await it.names(4)) == {"a"}
            assert it.router.ignored == {"m"} and it.router.snapshot()[0]["overridden"] is False
            ((sentence, fields),) = it.told
            assert "passed over" in sentence and fields["model"] == "m" and fields["reason"]
            it.router.set_weights({"m": {"a": 0, "c": 1}})
            assert set(await it.names(4)) == {"c"}
            assert it.router.ignored == frozenset()

    run(main())


def test_a_backend_that_gets_nothing_makes_nobody_ready(three: dict[str, FakeBackend], port: Callable[[], int]) -> None:
    async def main() -> None:
        away = {"a": three["a"].url, "away": f"http://127.0.0.1:{port()}"}
        async with routed(settings(away, targets(a=0, away=1)), start=True) as it:
            await until(lambda: it.state("a")["known"] and it.state("away")["known"])
            assert not it.router.ready()
            it.router.set_weights({"m": {"a": 1}})
            assert it.router.ready()

    run(main())


def test_the_higher_priority_takes_over_when_the_lower_is_away(three: dict[str, FakeBackend]) -> None:
    route = {
        "backends": [
            Target(backend="a", priority=0),
            Target(backend="b", priority=1),
            Target(backend="c", priority=1),
        ]
    }

    async def main() -> None:
        async with routed(settings(urls(three), route), start=True) as it:
            await until(it.router.ready)
            assert set(await it.names(10)) == {"a"}
            three["a"].control(health_status=500)
            await until(lambda: not it.state("a")["healthy"])
            assert set(await it.names(10)) == {"b", "c"}
            three["a"].control(health_status=200)
            await until(lambda: it.state("a")["healthy"])
            assert set(await it.names(10)) == {"a"}

    run(main())


def test_sticky_callers_keep_their_backend(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three), {"sticky": "client"}), start=True) as it:
            await until(it.router.ready)
            callers = [f"caller-{number}" for number in range(30)]
            before = {one: (await it.names(1, sticky=one))[0] for one in callers}
            assert set(before.values()) == {"a", "b", "c"}
            assert {one: (await it.names(1, sticky=one))[0] for one in callers} == before
            three["a"].control(health_status=500)
            await until(lambda: not it.state("a")["healthy"])
            after = {one: (await it.names(1, sticky=one))[0] for one in callers}
            moved = {one for one in callers if after[one] != before[one]}
            assert moved == {one for one in callers if before[one] == "a"}
            assert "a" not in after.values()

    run(main())


def test_sticky_shares_follow_the_weights(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        route = {**targets(a=90, b=10), "sticky": "header"}
        async with routed(settings(urls(three, "ab"), route)) as it:
            counts = Counter([(await it.names(1, sticky=f"session-{number}"))[0] for number in range(200)])
            assert 3 <= counts["b"] <= 40

    run(main())


def test_no_key_is_not_sticky(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three), {"sticky": "header"})) as it:
            assert set(await it.names(9, sticky="")) == {"a", "b", "c"}

    run(main())


def test_the_asked_for_backend(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three))) as it:
            assert set(await it.names(6, backend="b")) == {"b"}
            with pytest.raises(InvalidRequest, match="no backend of that name"):
                await it.ask(backend="elsewhere")

    run(main())


# --- canary


def canary(**fields: Any) -> dict[str, Any]:
    return {"backends": [Target(backend="a")], "canary": Canary(backend="b", **fields)}


def test_the_canary_gets_its_share_of_the_callers(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), canary(percent=25))) as it:
            first = [(await it.names(1, caller_id=f"caller-{number}"))[0] for number in range(200)]
            assert 25 <= first.count("b") <= 80
            again = [(await it.names(1, caller_id=f"caller-{number}"))[0] for number in range(200)]
            assert first == again
            answer, _ = await it.ask(caller_id=f"caller-{first.index('b')}")
            assert answer.variant == "canary"

    run(main())


def test_a_growing_canary_keeps_its_callers(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), canary(percent=10))) as it:
            callers = [f"caller-{number}" for number in range(100)]
            small = {one for one in callers if (await it.names(1, caller_id=one)) == ["b"]}
            it.router.set_canaries({"m": 60.5, "unknown": 1})
            large = {one for one in callers if (await it.names(1, caller_id=one)) == ["b"]}
            assert small < large
            it.router.set_canaries({"m": 0})
            assert set(await it.names(20, caller_id=min(small))) == {"a"}
            assert it.router.snapshot()[0]["canary"]["percent"] == 0
            assert it.router.snapshot()[0]["canary"]["configured_percent"] == 10
            it.router.set_canaries({})
            assert {one for one in callers if (await it.names(1, caller_id=one)) == ["b"]} == small

    run(main())


def test_the_percentage_of_a_canary_that_is_a_target_too(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        route = {**targets(a=100, b=0), "canary": Canary(backend="b", percent=0)}
        async with routed(settings(urls(three, "ab"), route)) as it:
            assert set(await it.names(10)) == {"a"}
            it.router.set_canaries({"m": 100})
            assert set(await it.names(10)) == {"b"}
            assert it.state("b")["weight"] == 0

    run(main())


def test_the_canary_by_header(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), canary(percent=0, value="please"))) as it:
            answer, _ = await it.ask(canary="please")
            assert (answer.backend, answer.variant) == ("b", "canary")
            assert set(await it.names(5, canary="no")) == {"a"}

    run(main())


def test_a_canary_that_fails_costs_no_request(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        three["b"].control(status=500)
        async with routed(settings(urls(three, "ab"), canary(percent=100))) as it:
            answer, _ = await it.ask()
            assert (answer.status, answer.backend, answer.variant, answer.attempts) == (200, "a", "main", 2)

    run(main())


# --- shadow


def test_the_shadow_gets_copies_and_nobody_sees_its_answer(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        three["b"].control(text="only the shadow says so")
        route = {"backends": [Target(backend="a")], "shadow": Shadow(backend="b", percent=100)}
        async with routed(settings(urls(three, "ab"), route)) as it:
            for _ in range(5):
                answer, body = await it.ask()
                assert answer.backend == "a"
                assert b"only the shadow" not in body
            await it.ask(shadow=False)
            await until(lambda: it.metric("shadow_total", backend="b", outcome="ok") == 5)
            assert it.router.snapshot()[0]["shadow"]["percent"] == 100

    run(main())
    assert asked(three["b"]) == 5
    assert three["b"].seen("/v1/chat")[0]["body"] == three["a"].seen("/v1/chat")[0]["body"]


@pytest.mark.parametrize("knobs", [{"hang": "before"}, {"die": "before"}, {"status": 500}, {"garbage": "binary"}])
def test_a_bad_shadow_harms_nobody(three: dict[str, FakeBackend], knobs: dict[str, Any]) -> None:
    async def main() -> None:
        three["b"].control(**knobs)
        route = {"backends": [Target(backend="a")], "shadow": Shadow(backend="b", percent=100)}
        config = settings(urls(three, "ab"), route, {"b": Timeouts(first_token_s=0.3)})
        async with routed(config) as it:
            assert [(await it.ask())[0].status for _ in range(3)] == [200] * 3
            await until(lambda: it.metric("shadow_total", backend="b") == 3)
            assert it.metric("shadow_total", outcome="ok") == 0

    run(main())


def test_shadows_are_bounded(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        three["b"].control(hang="before")
        route = {"backends": [Target(backend="a")], "shadow": Shadow(backend="b", percent=100)}
        async with routed(settings(urls(three, "ab"), route)) as it:
            await it.names(MAX_SHADOWS + 10)
            assert it.metric("shadow_total", outcome="skipped") == 10

    run(main())
    # Closing the router ended the rest.
    three["b"].wait(lambda counts: counts["active"] == 0)


# --- failures


@pytest.mark.parametrize(
    "knobs",
    [
        {"status": 500},
        {"status": 503},
        {"status": 500, "html": True},
        {"die": "before"},
        {"die": "headers"},
        {"garbage": "binary"},
        {"huge_headers": 5_000_000},
        {"status": 429},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_another_backend_answers_instead(three: dict[str, FakeBackend], knobs: dict[str, Any], stream: bool) -> None:
    async def main() -> None:
        three["a"].control(**knobs)
        async with routed(settings(urls(three, "ab"))) as it:
            for _ in range(6):
                answer, body = await it.ask({"stream": stream})
                assert (answer.status, answer.backend) == (200, "b")
                assert body
            assert it.metric("retries_total", model="m") == 3
            assert it.metric("backend_in_flight") == 0

    run(main())
    assert asked(three["a"]) == 3


def test_a_backend_that_is_away(three: dict[str, FakeBackend], port: Callable[[], int]) -> None:
    async def main() -> None:
        backends = {"away": f"http://127.0.0.1:{port()}", **urls(three, "b")}
        async with routed(settings(backends)) as it:
            assert set(await it.names(6)) == {"b"}
            assert it.metric("backend_requests_total", backend="away", outcome="connect") == 3

    run(main())


@pytest.mark.parametrize("place", ["before", "headers"])
def test_a_backend_that_hangs(three: dict[str, FakeBackend], place: str) -> None:
    async def main() -> None:
        three["a"].control(hang=place)
        async with routed(settings(urls(three, "ab"), timeouts={"a": Timeouts(first_token_s=0.3)})) as it:
            assert {(await it.ask({"stream": True}))[0].backend for _ in range(2)} == {"b"}
            assert it.metric("backend_requests_total", backend="a", outcome="timeout") == 1

    run(main())


def test_the_same_backend_is_asked_again_where_there_is_no_other(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        three["a"].control(fail_first=2)
        async with routed(settings(urls(three, "a"))) as it:
            answer, _ = await it.ask()
            assert (answer.status, answer.attempts) == (200, 3)

    run(main())


@pytest.mark.parametrize("knobs", [{"status": 429}, {"hang": "before"}])
def test_a_busy_or_silent_backend_is_not_asked_again(three: dict[str, FakeBackend], knobs: dict[str, Any]) -> None:
    async def main() -> None:
        three["a"].control(**knobs)
        timeouts = {"a": Timeouts(first_token_s=0.3)} if "hang" in knobs else {}
        async with routed(settings(urls(three, "a"), timeouts=timeouts)) as it:
            if "hang" in knobs:
                with pytest.raises(BackendTimeout, match=r"within 0\.3 s"):
                    await it.ask()
            else:
                answer, body = await it.ask()
                assert answer.status == 429
                assert json.loads(body)["error"]["type"] == "RateLimitError"

    run(main())
    assert asked(three["a"]) == 1


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_attempts_are_bounded(three: dict[str, FakeBackend], retries: int) -> None:
    async def main() -> None:
        for one in three.values():
            one.control(status=503)
        async with routed(settings(urls(three), {"retries": retries})) as it:
            answer, _ = await it.ask()
            assert (answer.status, answer.attempts) == (503, retries + 1)

    run(main())
    assert sum(asked(one) for one in three.values()) == retries + 1


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
def test_the_backends_own_errors_arrive_to_the_byte(three: dict[str, FakeBackend], status: int) -> None:
    async def main() -> None:
        three["a"].control(status=status)
        async with routed(settings(urls(three, "a"), {"retries": 0})) as it:
            answer, body = await it.ask()
            assert answer.status == status
            assert body == three["a"].ask_raw("POST", "/v1/chat/completions", {"messages": [{"role": "user"}]})

    run(main())
    assert asked(three["a"]) == 2


def test_client_errors_are_not_repeated_and_eject_nobody(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        health = Health(eject_after=1)
        async with routed(settings(urls(three, "ab"), health=health)) as it:
            for _ in range(6):
                answer, _ = await it.ask({"temperature": 7})
                assert (answer.status, answer.attempts) == (400, 1)
            assert it.metric("backend_ejections_total") == 0

    run(main())


@pytest.mark.parametrize(
    ("knobs", "error", "status"),
    [
        ({"status": 500, "html": True}, BackendFailed, 502),
        ({"status": 401}, BackendFailed, 502),
        ({"die": "before"}, BackendFailed, 502),
        ({"garbage": "binary"}, BackendFailed, 502),
        ({"huge_headers": 5_000_000}, BackendFailed, 502),
    ],
)
def test_what_a_caller_must_not_see(
    three: dict[str, FakeBackend], knobs: dict[str, Any], error: type[GatewayError], status: int
) -> None:
    async def main() -> None:
        three["a"].control(**knobs)
        async with routed(settings(urls(three, "a"), {"retries": 0})) as it:
            with pytest.raises(error) as caught:
                await it.ask()
            assert caught.value.status == status
            for secret in ("CUDA", "Traceback", "10.1.2.3", "127.0.0.1", "fake"):
                assert secret not in caught.value.message

    run(main())


def test_nobody_there(three: dict[str, FakeBackend], port: Callable[[], int]) -> None:
    async def main() -> None:
        async with routed(settings({"away": f"http://127.0.0.1:{port()}"})) as it:
            with pytest.raises(Unavailable) as caught:
                await it.ask()
            assert "127.0.0.1" not in caught.value.message
            with pytest.raises(Unavailable, match="no longer offered"):
                await it.ask(route_id="gone")

    run(main())


def test_uploads_are_not_repeated_once_they_were_sent(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        three["a"].control(die="before")
        three["b"].control(die="before")
        async with routed(settings(urls(three, "ab"))) as it:
            with pytest.raises(BackendFailed):
                await it.ask(path="/v1/files", decoded=None)

    run(main())
    assert len(three["a"].seen("/v1/files")) + len(three["b"].seen("/v1/files")) == 1


# --- health


def test_requests_eject_a_backend_and_it_comes_back(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        health = Health(interval_s=0.05, timeout_s=60, eject_after=3, eject_s=600)
        async with routed(settings(urls(three, "ab"), health=health), start=True) as it:
            await until(it.router.ready)
            three["a"].control(status=500)
            assert {(await it.ask())[0].backend for _ in range(20)} == {"b"}
            assert asked(three["a"]) == 3
            assert it.metric("backend_ejections_total", backend="a") == 1
            assert it.state("a")["ejected_s"] > 0
            three["a"].control(status=200)
            # The time is over.
            it.router._pools["a"].health.ejected_until = 0.0
            assert it.state("a")["ejected_s"] == 0
            assert set(await it.names(4)) == {"a", "b"}
            await until(lambda: len(it.told) > 1, saw=lambda: it.told)
            assert it.metric("backend_healthy", backend="a") == 1
            assert [message for message, fields in it.told if fields["backend"] == "a"][:2] == [
                "a backend is out",
                "a backend is back",
            ]

    run(main())


def test_not_all_backends_are_ejected(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        for one in three.values():
            one.control(status=503)
        health = Health(eject_after=1, eject_s=60)
        async with routed(settings(urls(three), {"retries": 0}, health=health)) as it:
            for _ in range(9):
                answer, _ = await it.ask()
                assert answer.status == 503
            for one in three.values():
                one.control(status=200)
            # One of three may be out (half of them, rounded down): the other two are asked, suspicion or not.
            counts = Counter(await it.names(20))
            assert len(counts) == 2
            assert set(counts.values()) == {10}

    run(main())


def test_a_single_backend_is_never_ejected(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        three["a"].control(status=503)
        async with routed(settings(urls(three, "a"), {"retries": 0}, health=Health(eject_after=1, eject_s=60))) as it:
            for _ in range(3):
                await it.ask()
            three["a"].control(status=200)
            assert (await it.ask())[0].status == 200

    run(main())


@pytest.mark.parametrize("fault", ["status", "stopped", "frozen"])
def test_checks_find_a_backend_that_is_away(three: dict[str, FakeBackend], fault: str) -> None:
    async def main() -> None:
        a = three["a"]
        quick = msgspec.structs.replace(QUICK, timeout_s=0.5) if fault == "frozen" else QUICK
        async with routed(settings(urls(three, "a"), health=quick), start=True) as it:
            await until(it.router.ready)
            await it.ask()
            if fault == "status":
                a.control(health_status=503)
            elif fault == "stopped":
                a.stop()
            else:
                a.freeze()
            await until(lambda: not it.router.ready())
            assert it.state("a")["reason"]
            assert it.metric("backend_healthy", backend="a") == 0
            with pytest.raises(Unavailable):
                await it.ask()
            if fault == "status":
                a.control(health_status=200)
            elif fault == "stopped":
                a.start()
            else:
                a.thaw()
            await until(it.router.ready)
            assert (await it.ask())[0].status == 200
            assert it.metric("backend_healthy", backend="a") == 1

    run(main())


def test_not_ready_before_a_backend_was_heard_of(three: dict[str, FakeBackend], port: Callable[[], int]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "a"))) as it:
            assert not it.router.ready()
            await it.ask()
            assert it.router.ready()
        async with routed(settings({"away": f"http://127.0.0.1:{port()}"}), start=True) as it:
            await until(lambda: it.state("away")["known"])
            assert not it.router.ready()

    run(main())


# --- new policies


def test_a_gateway_that_ends_right_after_a_new_policy_leaves_no_connection(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab"), targets(a=0, b=1))) as it:
            await it.ask()
            gone = it.router._pools["b"]
            it.router.configure(Policy(settings(urls(three, "a"))))
            assert len(gone.connections) == 1
        assert len(gone.connections) == 0

    run(main())


def test_unchanged_backends_keep_connections_and_health(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab")), start=True) as it:
            await until(it.router.ready)
            three["b"].control(health_status=500)
            await until(lambda: not it.state("b")["healthy"])
            await it.names(2)
            old = dict(it.router._pools)
            it.router.configure(Policy(settings(urls(three))))
            assert it.router._pools["a"] is old["a"]
            assert it.router._pools["b"] is old["b"]
            assert set(await it.names(6)) == {"a", "c"}
            # Another setting, the same server: what is known of it stays.
            it.router.configure(Policy(settings(urls(three), keepalive=7)))
            assert it.router._pools["b"] is not old["b"]
            assert set(await it.names(6)) == {"a", "c"}
            three["b"].control(health_status=200)
            await until(lambda: it.state("b")["healthy"])
            it.router.configure(Policy(settings(urls(three, "c"))))
            assert set(await it.names(3)) == {"c"}
            assert it.metric("backend_healthy", backend="a") == 0
            assert 'backend_healthy{backend="a"}' not in it.metrics.render().decode()
            assert set(it.router._watches) == {"c"}

    run(main())


def test_no_request_is_lost_while_policies_change(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "ab")), start=True) as it:
            ended = False

            async def client() -> int:
                done = 0
                while not ended:
                    answer, body = await it.ask({"stream": done % 2 == 0})
                    assert answer.status == 200
                    assert body
                    done += 1
                return done

            clients = [asyncio.ensure_future(client()) for _ in range(4)]
            for number in range(20):
                names = ("ab", "bc", "ca")[number % 3]
                it.router.configure(Policy(settings(urls(three, names), keepalive=10 + number)))
                await asyncio.sleep(0.02)
            ended = True
            assert all(await asyncio.gather(*clients))
            await until(lambda: not it.router._retired)

    run(main())


# --- the model's name


def test_a_backend_gets_its_own_name_for_the_model(three: dict[str, FakeBackend]) -> None:
    config = Config(
        backends={
            "a": Backend(url=three["a"].url, model="org/llama", health=QUICK),
            "b": Backend(url=three["b"].url, health=QUICK),
        },
        routes={"m": Route(backends=[Target(backend="a"), Target(backend="b")])},
    )

    async def main() -> None:
        three["a"].control(models=["org/llama"])
        three["b"].control(models=["m"])
        async with routed(config) as it:
            for _ in range(4):
                answer, _ = await it.ask({"model": "alias"})
                assert answer.status == 200
            three["a"].control(status=500)
            for _ in range(2):
                assert (await it.ask())[0].status == 200

    run(main())


def test_renaming_keeps_all_other_bytes() -> None:
    body = b'{ "a" : 1.50,\n "model" : "x\\"y", "messages":[{"content":"caf\\u00e9"}] }'
    assert _renamed(body, 'n"é') == '{ "a" : 1.50,\n "model":"n\\"é", "messages":[{"content":"caf\\u00e9"}] }'.encode()


def test_renaming_where_the_word_is_there_twice() -> None:
    body = b'{"tools":[{"model":"inner"}],"model":"outer","stream_options":{"include_usage":true}}'
    assert msgspec.json.decode(_renamed(body, "new")) == {
        "tools": [{"model": "inner"}],
        "model": "new",
        "stream_options": {"include_usage": True},
    }


FORM = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nname="model" \x00\xff\r\n'
    b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nold\r\n--B--\r\n'
)


def test_renaming_in_a_form() -> None:
    kind = b"multipart/form-data; boundary=B"
    assert _renamed_form(FORM, kind, "new-one") == FORM.replace(b"\r\n\r\nold", b"\r\n\r\nnew-one")
    assert _renamed_form(FORM, kind, "old") == FORM
    assert _renamed_form(FORM, b"multipart/form-data", "new") == FORM
    assert _renamed_form(b"--B--\r\n", kind, "new") == b"--B--\r\n"


def test_forms_arrive_renamed(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        async with routed(settings(urls(three, "a"))) as it:
            call = it.call(path="/v1/audio/transcriptions", decoded=None)
            call.headers = [(b"content-type", b"multipart/form-data; boundary=B")]
            call.body = FORM
            answer = await it.router.open(call)
            assert answer.status == 200
            await answer.read(LIMIT)
            await answer.close()

    run(main())
    assert "\r\n\r\nm\r\n--B--" in three["a"].seen("/v1/audio")[0]["body"]


# --- the end


def test_closing_ends_everything(three: dict[str, FakeBackend]) -> None:
    async def main() -> None:
        it = Routed(settings(urls(three)))
        await it.router.start()
        await until(it.router.ready)
        await it.names(3)
        answer = await it.router.open(it.call({"stream": True}, headers=[(b"x-fake-hang", b"mid")]))
        await it.router.close()
        with pytest.raises(GatewayError):
            await answer.read(LIMIT)
        await answer.close()
        assert len(asyncio.all_tasks()) == 1

    run(main())
    for one in three.values():
        one.wait(lambda counts: counts["connections"] == 0)
