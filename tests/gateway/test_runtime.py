"""How the parts of a gateway hang together: what is said in its log, when it is ready, which Redis holds what."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve_app.gateway import runtime as runtime_module
from serve_app.gateway.filters.base import About, Phase, RemoteFilter, Verdict
from serve_app.gateway.logs import Logs
from serve_app.gateway.policy import load
from serve_app.gateway.runtime import Runtime

from .conftest import RedisServer, StartGateway
from .fake_backend import FakeBackend
from .running import ROLES, Gateway, ask, settings

LOCAL = {"on_failure": "local", "local_fraction": 1.0, "timeout_ms": 1500}


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def backend(engine: FakeBackend) -> FakeBackend:
    engine.reset()
    return engine


def told(gateway: Gateway, sentence: str) -> list[dict[str, Any]]:
    return [line for line in gateway.lines if sentence in line["message"]]


# --- revocations


def test_a_gateway_that_cannot_know_who_is_revoked_lets_nobody_in(
    redis_server: RedisServer, gateway: StartGateway, backend: FakeBackend
) -> None:
    config = settings(backend.url)
    config["store"] = {"url": redis_server.url, **LOCAL}
    first = gateway(config)
    assert first.admin("POST", "/admin/v1/keys/premium/revoke").status == 200
    redis_server.freeze()
    # It starts while Redis is away, and its limits would be its own.
    late = gateway(config, wait=False)
    late.wait_for(lambda: ask(f"{late.admin_url}/readyz").json()["checks"]["backend"], "hearing of the backend")
    ready = ask(f"{late.admin_url}/readyz")
    assert (ready.status, ready.json()["checks"]["revocations"]) == (503, False)
    for role in ("premium", "basic"):
        got = late.chat(role=role)
        assert (got.status, got.json()["error"]["code"]) == (503, "store_unavailable")
    assert late.admin("GET", "/admin/v1/status").status == 503
    # One that knew it goes on.
    first.wait_for(lambda: first.chat(role="basic").status == 200, "going on alone")
    assert first.chat().status == 401
    assert ask(f"{first.admin_url}/readyz").status == 200
    redis_server.thaw()
    late.wait_for(lambda: ask(f"{late.admin_url}/readyz").status == 200, "getting ready")
    assert (late.chat(role="basic").status, late.chat().status) == (200, 401)


def test_the_way_out_is_declared(gateway: StartGateway, backend: FakeBackend, port: Callable[[], int]) -> None:
    config = settings(backend.url)
    config["store"] = {"url": f"redis://127.0.0.1:{port()}/0", **LOCAL, "start_without_revocations": True}
    one = gateway(config)
    assert one.chat().status == 200
    assert ask(f"{one.admin_url}/readyz").json()["checks"]["revocations"] is False
    # It would wait a while for its settlements, which nobody takes.
    one.process.kill()


# --- canaries and weights


def test_a_canary_grows_while_it_runs(gateway: StartGateway, redis_url: str) -> None:
    with FakeBackend(name="blue") as blue, FakeBackend(name="green") as green:
        config = settings({"blue": blue.url, "green": green.url}, redis_url)
        config["routes"]["m"] = {"backends": [{"backend": "blue"}], "canary": {"backend": "green", "percent": 0}}
        one, other = gateway(config), gateway(config)

        def asked() -> str:
            return other.chat(role="admin").headers["x-rayplane-backend"]

        assert asked() == "blue"
        assert one.admin("PUT", "/admin/v1/routes/m/canary", {"percent": 100}).status == 200
        other.wait_for(lambda: asked() == "green", "the canary")
        assert one.admin("DELETE", "/admin/v1/routes/m/canary").json()["percent"] == 0
        other.wait_for(lambda: asked() == "blue", "the end of the canary")


def test_weights_of_a_backend_that_a_deployment_removes_end_with_it(gateway: StartGateway) -> None:
    with FakeBackend(name="blue") as blue, FakeBackend(name="green") as green:
        config = settings({"blue": blue.url, "green": green.url})
        one = gateway(config)
        assert one.admin("PUT", "/admin/v1/routes/m/weights", {"weights": {"blue": 0, "green": 100}}).status == 200
        assert one.chat().status == 200 and not blue.seen("/v1/chat/completions")
        config["routes"]["m"] = {"backends": [{"backend": "blue"}]}
        one.rewrite(config)
        one.wait_for(lambda: told(one, "policy taken over"), "a reload")
        assert one.chat().status == 200 and blue.seen("/v1/chat/completions")
        one.wait_for(lambda: told(one, "weights are passed over"), "the warning")
        (line,) = told(one, "weights are passed over")
        assert (line["level"], line["model"]) == ("warning", "m")
        assert one.admin("GET", "/admin/v1/status").json()["weights_ignored"] == ["m"]


def test_a_backend_that_goes_and_comes_back_is_in_the_log(gateway: StartGateway) -> None:
    with FakeBackend(name="blue") as blue, FakeBackend(name="green") as green:
        one = gateway(settings({"blue": blue.url, "green": green.url}))
        blue.control(health_status=500)
        one.wait_for(lambda: told(one, "a backend is out"), "its end")
        (line,) = told(one, "a backend is out")
        assert (line["backend"], bool(line["reason"])) == ("blue", True)
        blue.control(health_status=200)
        one.wait_for(lambda: told(one, "a backend is back"), "its return")


# --- the store and the cache


def entries(server: RedisServer, pattern: str) -> int:
    reply = server.command("EVAL", f"\"return #redis.call('KEYS','{pattern}')\"", "0")
    return int(reply.strip().removeprefix(b":"))


def test_cached_answers_lie_in_a_redis_of_their_own(
    redis_server: RedisServer, gateway: StartGateway, backend: FakeBackend, redis_url: str, shared_redis: RedisServer
) -> None:
    config = settings(backend.url, cache={"enabled": True})
    config["store"] = {"url": redis_url, "cache_url": redis_server.url, "timeout_ms": 20_000}
    one = gateway(config)
    one.chat("twice", temperature=0)
    one.wait_for(lambda: entries(redis_server, "*:cache:entry:*"), "an entry")
    assert one.chat("twice", temperature=0).headers["x-rayplane-cache"] == "hit"
    assert entries(shared_redis, "*:cache:*") == 0 and entries(shared_redis, "*") > 0
    # Without it nothing but the cache is away.
    redis_server.stop()
    assert one.chat("twice", temperature=0).status == 200
    assert ask(f"{one.admin_url}/readyz").status == 200


def test_a_store_that_drops_budgets_is_named(
    redis_server: RedisServer, gateway: StartGateway, backend: FakeBackend
) -> None:
    quiet = gateway(settings(backend.url, redis_server.url))
    redis_server.command("CONFIG", "SET", "maxmemory", "64mb")
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    one = gateway(settings(backend.url, redis_server.url))
    one.wait_for(lambda: told(one, "drops budgets"), "the warning")
    (line,) = told(one, "drops budgets")
    assert (line["level"], line["policy"]) == ("warning", "volatile-lru")
    assert not told(quiet, "drops budgets")


# --- filters


class Absent(RemoteFilter):
    """Asks somebody who never answers, and allows, as a webhook with `on_error: allow` does."""

    async def judge(self, phase: Phase, operation: str, texts: Sequence[str], before: str, about: About) -> Verdict:
        self.on_error("no answer")
        return Verdict("allow")


def test_a_filter_that_cannot_decide_is_counted_and_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "TELL_EVERY_S", 3600)
    config = settings(
        "http://127.0.0.1:1",
        filters={"far": {"type": "words", "options": {"class": f"{__name__}:Absent"}}},
        roles={**ROLES, "basic": {"models": ["m"], "filters": ["far"]}},
    )
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps(config))
    policy = load(path)

    async def work() -> None:
        runtime = Runtime(path, policy)
        out = io.StringIO()
        runtime.logs = Logs(policy.config.logging, out)
        chain = runtime.chain("basic", policy.config.roles["basic"])
        assert chain is not None
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        for _ in range(3):
            await chain.request("chat", body, About("r", "c", "t", "m"))
        runtime.logs.close()
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [(line["filter"], line["reason"]) for line in lines] == [("far", "no answer")]
        assert 'rayplane_gateway_filter_errors_total{filter="far"} 3.0' in runtime.metrics.render().decode()

    asyncio.run(work())
