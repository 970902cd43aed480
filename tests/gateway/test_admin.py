"""The admin port: probes, metrics, and every call of the admin API with what it leaves in the audit log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from serve_app.gateway import audit_cli, audit_format
from serve_app.gateway.admin import Admin
from serve_app.gateway.audit import AuditLog
from serve_app.gateway.auth import Authenticator
from serve_app.gateway.cache import Cache
from serve_app.gateway.dynamic import Dynamic
from serve_app.gateway.logs import Logs
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.policy import Policy, load
from serve_app.gateway.reload import Reloader
from serve_app.gateway.store import Store

from .conftest import RedisServer
from .fake_backend import FakeBackend
from .running import ROLES, Gateway, key, settings, start
from .waiting import until


class Backends:
    """Which backends can be reached, for probes; the real router has tests of its own."""

    def __init__(self) -> None:
        self.reached = True
        self.ignored: frozenset[str] = frozenset()

    def ready(self) -> bool:
        return self.reached

    def snapshot(self) -> list[dict[str, Any]]:
        return [{"name": "blue", "healthy": self.reached}]


class Parts:
    """The parts of one replica that the admin API shows and changes, all but the router real."""

    def __init__(self, folder: Path, configuration: dict[str, Any], instance: str) -> None:
        self.path = folder / "gateway.json"
        if not self.path.exists():
            self.path.write_text(json.dumps(configuration))
        self.policy: Policy = load(self.path)
        config = self.policy.config
        self.output = io.StringIO()
        self.instance = instance
        self.started = time.time()
        self.draining = False
        self.metrics = Metrics()
        self.logs = Logs(config.logging, self.output)
        self.store = Store(config.store)
        self.cache = Cache(self.store, self.metrics)
        self.dynamic = Dynamic(self.store)
        self.authenticator = Authenticator()
        self.router = Backends()
        self.audit = AuditLog(config.audit, instance)
        self.reloader = Reloader(self.path, self._take_over, lambda _: None)

    def _take_over(self, policy: Policy) -> None:
        self.policy = policy

    def ready(self) -> bool:
        return not self.draining and self.router.ready() and (self.store.local or self.store.available)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


class Replica:
    """An admin application and a way to call it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.admin = Admin(parts)  # type: ignore[arg-type]

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        role: str | None = "admin",
        headers: dict[str, str] | None = None,
        pieces: list[dict[str, Any]] | None = None,
    ) -> Answer:
        path, _, query = path.partition("?")
        sent = {name.lower(): value for name, value in (headers or {}).items()}
        if role is not None:
            sent.setdefault("authorization", f"Bearer {key(role).key}")
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        messages = pieces or [
            {"type": "http.request", "body": data[:1], "more_body": True},
            {"type": "http.request", "body": data[1:]},
        ]
        scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        }
        waiting = iter(messages)
        out: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return next(waiting)

        async def send(message: Any) -> None:
            out.append(message)

        await self.admin(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in out[0]["headers"]}
        assert [one["type"] for one in out] == ["http.response.start", "http.response.body"]
        assert found["cache-control"] == "no-store"
        return Answer(out[0]["status"], found, out[1]["body"])

    async def get(self, path: str, **more: Any) -> Any:
        answer = await self.call("GET", f"/admin/v1/{path}", **more)
        assert answer.status == 200, answer.body
        return answer.json

    def audited(self, kind: str = "admin") -> list[dict[str, Any]]:
        """What the audit log says of administrators."""
        log = self.parts.audit
        log.sync_now()
        records = [
            audit_format.parse(raw, log.instance)[0]
            for path in audit_format.segments(log.directory, log.instance)
            for raw in path.read_bytes().split(b"\n")[:-1]
        ]
        return [record.content() for record in records if record.kind == kind]


class Setup:
    """A folder with a configuration, and replicas that share it."""

    def __init__(self, folder: Path, redis: str = "", **more: Any) -> None:
        self.folder = folder
        audit_cli.main(["keygen", str(folder / "key.pem"), str(folder / "key.pub")])
        self.configuration = settings(
            {"blue": "http://127.0.0.1:1", "green": "http://127.0.0.1:2"},
            redis,
            **{
                "audit": {
                    "enabled": True,
                    "directory": str(folder / "log"),
                    "signing_key_file": str(folder / "key.pem"),
                },
                **more,
            },
        )
        routes = self.configuration["routes"]
        routes["org/big"] = {
            "backends": [{"backend": "blue", "weight": 70}, {"backend": "green", "weight": 30, "priority": 1}],
            "aliases": ["big"],
            "canary": {"backend": "green", "percent": 5},
        }

    @contextlib.asynccontextmanager
    async def replica(self, instance: str = "gw-0") -> AsyncIterator[Replica]:
        parts = Parts(self.folder, self.configuration, instance)
        replica = Replica(parts)
        parts.audit.start()
        await parts.store.start()
        await parts.dynamic.start()
        try:
            yield replica
        finally:
            await parts.dynamic.close()
            await parts.cache.close()
            await parts.authenticator.close()
            await parts.store.close()
            parts.audit.close()
            parts.logs.close()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.fixture
def shared(tmp_path: Path, redis_url: str) -> Setup:
    return Setup(tmp_path, redis_url)


def with_replica(setup: Setup, work: Callable[[Replica], Awaitable[None]]) -> None:
    async def body() -> None:
        async with setup.replica() as replica:
            await work(replica)

    asyncio.run(body())


# --- without a key


def test_probes_and_metrics_ask_for_no_key(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        alive = await replica.call("GET", "/livez", role=None)
        assert (alive.status, alive.json) == (200, {"status": "alive"})
        ready = await replica.call("GET", "/readyz", role=None)
        assert (ready.status, ready.json["status"]) == (200, "ready")
        checks = {"draining": False, "backend": True, "store": "local", "revocations": True, "audit": True}
        assert ready.json["checks"] == checks
        metrics = await replica.call("GET", "/metrics", role=None)
        assert metrics.status == 200
        assert metrics.headers["content-type"].startswith("text/plain")
        assert b"rayplane_gateway_" in metrics.body
        head = await replica.call("HEAD", "/livez", role=None)
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(alive.body)))
        wrong = await replica.call("POST", "/livez", role=None)
        assert (wrong.status, wrong.headers["allow"], wrong.error["code"]) == (405, "GET", "method_not_allowed")
        assert (await replica.call("GET", "/v1/models", role="admin")).status == 404

    with_replica(setup, work)


def test_not_ready_without_backend_or_while_draining_or_without_audit(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        async def state() -> tuple[int, str]:
            answer = await replica.call("GET", "/readyz", role=None)
            return answer.status, answer.json["status"]

        replica.parts.router.reached = False
        assert await state() == (503, "not ready")
        replica.parts.router.reached = True
        replica.parts.draining = True
        assert await state() == (503, "not ready")
        replica.parts.draining = False
        replica.parts.audit.failed = "No space left on device"
        assert await state() == (503, "not ready")
        replica.parts.audit.failed = ""
        assert await state() == (200, "ready")

    with_replica(setup, work)


def test_not_ready_while_the_store_is_away(tmp_path: Path, redis_server: RedisServer) -> None:
    async def work(replica: Replica) -> None:
        assert (await replica.call("GET", "/readyz", role=None)).status == 200
        await asyncio.to_thread(redis_server.stop)
        await until(lambda: not replica.parts.store.available)
        answer = await replica.call("GET", "/readyz", role=None)
        assert (answer.status, answer.json["checks"]["store"]) == (503, "away")
        status = await replica.get("status")
        assert status["ready"] is False
        assert status["store"]["state_known"] is True
        await until(lambda: bool(replica.parts.store.last_error))
        assert (await replica.get("status"))["store"]["last_error"]
        for method, path, body in (
            ("PUT", "routes/m/weights", {"weights": {"blue": 1}}),
            ("POST", "keys/basic/revoke", None),
            ("POST", "clients/alice/purge", None),
            ("GET", "usage", None),
        ):
            refused = await replica.call(method, f"/admin/v1/{path}", body)
            assert (refused.status, refused.error["code"]) == (503, "store_unavailable"), path
        assert replica.audited() == []
        await asyncio.to_thread(redis_server.start)

    with_replica(Setup(tmp_path, redis_server.url), work)


# --- who may


def test_only_administrators_get_in(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        for path in ("status", "routes", "keys", "usage", "audit/head", "nothing"):
            for headers in ({}, {"authorization": "Bearer rp-nothing"}, {"x-rayplane-key": "x"}):
                answer = await replica.call("GET", f"/admin/v1/{path}", role=None, headers=headers)
                assert answer.status == 401, path
                assert answer.error["type"] == "invalid_request_error"
            answer = await replica.call("GET", f"/admin/v1/{path}", role="premium")
            assert (answer.status, answer.error["code"]) == (403, "permission_denied")
        changed = await replica.call("PUT", "/admin/v1/routes/m/weights", {"weights": {"blue": 0}}, role="basic")
        assert changed.status == 403
        assert replica.parts.dynamic.weights == {}
        denied = replica.audited()
        assert denied[-1] == {
            "action": "denied",
            "actor": "basic",
            "actor_client": "basic",
            "path": "/admin/v1/routes/m/weights",
            "method": "PUT",
        }
        assert len(denied) == 7

    with_replica(setup, work)


def test_without_a_key_nobody_is_an_administrator(tmp_path: Path) -> None:
    async def work(replica: Replica) -> None:
        answer = await replica.call("GET", "/admin/v1/status", role=None)
        assert (answer.status, answer.error["code"]) == (401, "missing_api_key")
        assert (await replica.call("GET", "/admin/v1/status")).status == 200

    roles = {**ROLES, "basic": {"models": ["*"], "operations": ["chat", "admin"]}}
    with_replica(Setup(tmp_path, auth={"anonymous_role": "basic"}, roles=roles), work)


def test_the_key_may_come_in_a_header_that_proxies_leave_alone(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        for value in (key("admin").key, f"Bearer {key('admin').key}"):
            headers = {"authorization": "Bearer token-of-the-cluster", "x-rayplane-key": value}
            assert (await replica.call("GET", "/admin/v1/status", headers=headers, role=None)).status == 200
        headers = {"authorization": f"Bearer {key('admin').key}", "x-rayplane-key": "wrong"}
        assert (await replica.call("GET", "/admin/v1/status", headers=headers, role=None)).status == 401

    with_replica(setup, work)


def test_a_revoked_administrator_is_out(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        assert (await replica.call("POST", "/admin/v1/keys/admin/revoke")).status == 200
        answer = await replica.call("GET", "/admin/v1/status")
        assert (answer.status, answer.error["code"]) == (401, "revoked_api_key")

    with_replica(setup, work)


def test_no_key_and_no_hash_comes_out(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        seen = b""
        for path in ("/admin/v1/status", "/admin/v1/routes", "/admin/v1/keys", "/admin/v1/usage", "/metrics"):
            seen += (await replica.call("GET", path)).body
        await replica.call("POST", "/admin/v1/keys/basic/revoke")
        replica.parts.logs.flush()
        seen += replica.parts.output.getvalue().encode() + json.dumps(replica.audited()).encode()
        for role in ("basic", "premium", "admin"):
            made = key(role)
            assert made.key.encode() not in seen
            assert made.hash.encode() not in seen
            assert made.hash.removeprefix("sha256:").encode() not in seen
        assert b"admin action" in seen

    with_replica(setup, work)


# --- weights


def test_weights_change_on_all_replicas_and_back(shared: Setup) -> None:
    async def work() -> None:
        async with shared.replica("gw-0") as one, shared.replica("gw-1") as two:
            answer = await one.call("PUT", "/admin/v1/routes/big/weights", {"weights": {"green": 100}})
            assert answer.json == {
                "model": "org/big",
                "before": {"blue": 70, "green": 30},
                "weights": {"blue": 70, "green": 100},
            }
            await until(lambda: two.parts.dynamic.weights == {"org/big": {"blue": 70, "green": 100}})
            shown = (await two.get("routes"))["routes"]["org/big"]
            assert shown["backends"] == [
                {"backend": "blue", "priority": 0, "weight": 70, "configured": 70},
                {"backend": "green", "priority": 1, "weight": 100, "configured": 30},
            ]
            assert (shown["changed"]["actor"], shown["changed"]["ignored"], shown["aliases"]) == (
                "admin",
                False,
                ["big"],
            )
            back = await two.call("DELETE", "/admin/v1/routes/org%2Fbig/weights")
            assert back.json["weights"] == {"blue": 70, "green": 30}
            await until(lambda: one.parts.dynamic.weights == {})
            assert (await one.get("routes"))["routes"]["org/big"]["changed"] is None
            common = {"action": "weights", "actor": "admin", "actor_client": "admin", "model": "org/big"}
            first, last = {"blue": 70, "green": 30}, {"blue": 70, "green": 100}
            assert one.audited() == [{**common, "before": first, "after": last}]
            assert two.audited() == [{**common, "before": last, "after": first}]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("routes/none/weights", {"weights": {"blue": 1}}, 404, "no such model"),
        ("routes/m/weights", {"weights": {"red": 1}}, 400, "red: no backend of m; its backends are blue, green"),
        ("routes/m/weights", {"weights": {"blue": 0, "green": 0}}, 400, "all weights are 0"),
        ("routes/m/weights", {"weights": {"blue": -1}}, 400, "from 0 to"),
        ("routes/m/weights", {"weights": {"blue": 1_000_001}}, 400, "from 0 to"),
        ("routes/m/weights", {"weights": {"blue": 1.5}}, 400, "The body is not what this path takes"),
        ("routes/m/weights", {"weights": {"blue": 1}, "more": 1}, 400, "The body is not what this path takes"),
        ("routes/m/weights", b"\xff", 400, "The body is not what this path takes"),
        ("routes/m/weights", b"", 400, "The body is not what this path takes"),
        ("routes/m/weights", b"x" * 70_000, 413, "at most"),
    ],
)
def test_weights_that_make_no_sense_are_refused(setup: Setup, path: str, body: object, status: int, said: str) -> None:
    async def work(replica: Replica) -> None:
        answer = await replica.call("PUT", f"/admin/v1/{path}", body)
        assert (answer.status, said in answer.error["message"]) == (status, True), answer.body
        assert replica.parts.dynamic.weights == {}
        assert replica.audited() == []

    with_replica(setup, work)


def test_weights_of_a_model_that_is_gone_can_be_removed(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        assert (await replica.call("DELETE", "/admin/v1/routes/old/weights")).status == 404
        await replica.parts.dynamic.set_weights("old", {"blue": 1}, actor="root")
        assert (await replica.call("DELETE", "/admin/v1/routes/old/weights")).json["weights"] == {}
        assert replica.parts.dynamic.weights == {}

    with_replica(setup, work)


def test_weights_that_are_passed_over_are_shown_so(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        await replica.parts.dynamic.set_weights("m", {"blue": 0, "green": 0, "gone": 100}, actor="root")
        replica.parts.router.ignored = frozenset({"m"})
        assert (await replica.get("status"))["weights_ignored"] == ["m"]
        shown = (await replica.get("routes"))["routes"]["m"]
        assert [target["weight"] for target in shown["backends"]] == [100, 100]
        assert shown["changed"]["ignored"] is True
        # What holds is what a change begins from.
        answer = await replica.call("PUT", "/admin/v1/routes/m/weights", {"weights": {"green": 1}})
        assert answer.json["before"] == {"blue": 100, "green": 100}
        assert answer.json["weights"] == {"blue": 100, "green": 1}

    with_replica(setup, work)


# --- canaries


def test_a_canarys_percentage_changes_on_all_replicas_and_back(shared: Setup) -> None:
    async def work() -> None:
        async with shared.replica("gw-0") as one, shared.replica("gw-1") as two:
            plain = {"backend": "green", "percent": 5.0, "configured": 5.0, "changed": None}
            assert (await one.get("routes"))["routes"]["org/big"]["canary"] == plain
            answer = await one.call("PUT", "/admin/v1/routes/big/canary", {"percent": 12.5})
            assert answer.json == {"model": "org/big", "before": 5.0, "percent": 12.5}
            await until(lambda: "org/big" in two.parts.dynamic.canaries)
            shown = (await two.get("routes"))["routes"]["org/big"]["canary"]
            assert (shown["percent"], shown["configured"], shown["changed"]["actor"]) == (12.5, 5.0, "admin")
            back = await two.call("DELETE", "/admin/v1/routes/org%2Fbig/canary")
            assert back.json == {"model": "org/big", "before": 12.5, "percent": 5.0}
            await until(lambda: not one.parts.dynamic.canaries)
            common = {"action": "canary", "actor": "admin", "actor_client": "admin", "model": "org/big"}
            assert one.audited() == [{**common, "before": 5.0, "after": 12.5}]
            assert two.audited() == [{**common, "before": 12.5, "after": 5.0}]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("routes/none/canary", {"percent": 1}, 404, "no such model"),
        ("routes/m/canary", {"percent": 1}, 400, "has no canary"),
        ("routes/big/canary", {"percent": 100.5}, 400, "from 0 to 100"),
        ("routes/big/canary", {"percent": -1}, 400, "from 0 to 100"),
        ("routes/big/canary", {}, 400, "The body is not what this path takes"),
        ("routes/big/canary", {"percent": 1, "backend": "blue"}, 400, "The body is not what this path takes"),
    ],
)
def test_canaries_that_make_no_sense_are_refused(setup: Setup, path: str, body: object, status: int, said: str) -> None:
    async def work(replica: Replica) -> None:
        answer = await replica.call("PUT", f"/admin/v1/{path}", body)
        assert (answer.status, said in answer.error["message"]) == (status, True), answer.body
        assert replica.parts.dynamic.canaries == {} and replica.audited() == []

    with_replica(setup, work)


def test_the_percentage_of_a_canary_that_is_gone_can_be_removed(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        assert (await replica.call("DELETE", "/admin/v1/routes/old/canary")).status == 404
        for name in ("old", "m"):
            await replica.parts.dynamic.set_canary(name, 5, actor="root")
            removed = await replica.call("DELETE", f"/admin/v1/routes/{name}/canary")
            assert removed.json == {"model": name, "before": 5.0, "percent": None}
        assert replica.parts.dynamic.canaries == {}

    with_replica(setup, work)


# --- keys


def test_keys_are_listed_by_pages(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        await replica.call("POST", "/admin/v1/keys/premium/revoke", {"reason": "lost", "until": "2100-01-01T00:00:00Z"})
        page = await replica.get("keys?limit=2")
        assert (page["total"], page["after"]) == (3, "premium")
        assert page["keys"][0] == {
            "id": "basic",
            "prefix": key("basic").prefix,
            "role": "basic",
            "tenant": "tenant-basic",
            "client": "basic",
            "expires": None,
            "not_before": None,
            "disabled": False,
            "models": None,
            "operations": None,
            "revoked": None,
        }
        revoked = page["keys"][1]["revoked"]
        assert (revoked["actor"], revoked["reason"], revoked["until"]) == ("admin", "lost", "2100-01-01T00:00:00.000Z")
        rest = await replica.get("keys?limit=2&after=premium")
        assert ([one["id"] for one in rest["keys"]], rest["after"]) == (["admin"], None)
        for query, status in (("limit=0", 400), ("limit=x", 400), ("limit=9999", 400), ("after=gone", 404)):
            assert (await replica.call("GET", f"/admin/v1/keys?{query}")).status == status

    with_replica(setup, work)


def test_a_key_is_revoked_on_all_replicas_and_restored(shared: Setup) -> None:
    async def work() -> None:
        async with shared.replica("gw-0") as one, shared.replica("gw-1") as two:
            answer = await one.call("POST", "/admin/v1/keys/basic/revoke", {"reason": "lost"})
            assert answer.json == {"id": "basic", "revoked": True, "until": None}
            await until(lambda: "basic" in two.parts.dynamic.revoked)
            assert (await two.call("GET", "/admin/v1/status", role="basic")).status == 401
            assert (await two.call("POST", "/admin/v1/keys/basic/restore")).json == {"id": "basic", "revoked": False}
            await until(lambda: "basic" not in one.parts.dynamic.revoked)
            assert (await one.call("GET", "/admin/v1/status", role="basic")).status == 403
            assert one.audited()[0] == {
                "action": "revoke",
                "actor": "admin",
                "actor_client": "admin",
                "key": "basic",
                "before": False,
                "after": True,
                "until": None,
                "reason": "lost",
            }
            restored = two.audited()[-1]
            assert (restored["action"], restored["before"], restored["after"]) == ("restore", True, False)

    asyncio.run(work())


def test_revocations_that_make_no_sense_are_refused(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        for path, body, status in (
            ("keys/nobody/revoke", None, 404),
            ("keys/nobody/restore", None, 404),
            ("keys/basic/revoke", {"until": "2001-01-01T00:00:00Z"}, 400),
            ("keys/basic/revoke", {"until": "soon"}, 400),
            ("keys/basic/revoke", {"why": "lost"}, 400),
        ):
            assert (await replica.call("POST", f"/admin/v1/{path}", body)).status == status, path
        assert replica.parts.dynamic.revoked == frozenset()
        # A token's subject is in no list; neither is a key that went from the configuration while it was revoked.
        name = "jwt:https%3A%2F%2Fissuer%2F%23somebody"
        assert (await replica.call("POST", f"/admin/v1/keys/{name}/revoke")).status == 200
        assert replica.parts.dynamic.revoked == {"jwt:https://issuer/#somebody"}
        await replica.parts.dynamic.revoke("gone", actor="root")
        assert (await replica.call("POST", "/admin/v1/keys/gone/restore")).status == 200

    with_replica(setup, work)


# --- reload, usage, head


def test_reload_takes_over_what_is_right_and_names_what_is_wrong(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        before = replica.parts.policy.version
        setup.configuration["routes"]["m"]["aliases"] = ["n"]
        replica.parts.path.write_text(json.dumps(setup.configuration))
        answer = await replica.call("POST", "/admin/v1/reload")
        assert answer.status == 200
        assert answer.json["before"] == before != answer.json["version"] == replica.parts.policy.version
        setup.configuration["routes"]["m"]["backends"] = [{"backend": "red"}]
        setup.configuration["keys"][0]["role"] = "nobody"
        replica.parts.path.write_text(json.dumps(setup.configuration))
        wrong = await replica.call("POST", "/admin/v1/reload")
        assert (wrong.status, wrong.error["code"]) == (422, "policy_invalid")
        assert "red" in wrong.error["message"]
        assert "nobody" in wrong.error["message"]
        assert replica.parts.policy.version == answer.json["version"]
        assert (await replica.get("status"))["policy"]["last_error"]
        assert [one.get("refused", False) for one in replica.audited()] == [False, True]

    with_replica(setup, work)


def test_usage_is_reported_by_what_is_asked(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        assert await replica.get("usage") == {"days": 1, "by": "key", "usage": []}
        today = int(time.strftime("%Y%m%d", time.gmtime()))
        from serve_app.gateway.usage import COLUMNS

        counts = list(range(1, len(COLUMNS) + 1))
        replica.parts.store.usage[today] = {("basic", "alice", "t", "m"): counts}
        for by, name in (("key", "basic"), ("client", "alice"), ("tenant", "t"), ("model", "m")):
            found = await replica.get(f"usage?days=2&by={by}")
            assert found["usage"] == [{by: name, **dict(zip(COLUMNS, counts, strict=True))}]
        for query in ("days=0", "days=367", "days=-1", "days=1e3", "by=colour"):
            assert (await replica.call("GET", f"/admin/v1/usage?{query}")).status == 400

    with_replica(setup, work)


def test_the_last_head_is_for_an_anchor_elsewhere(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(replica: Replica) -> None:
        replica.parts.audit.append({"client": "alice"})
        head = (await replica.get("audit/head"))["head"]
        assert head["seq"] == 2
        (tmp_path / "head.json").write_text(json.dumps(head))

    with_replica(setup, work)
    words = ["verify", str(tmp_path / "log"), "--public-key", str(tmp_path / "key.pub")]
    assert audit_cli.main([*words, "--head", f"@{tmp_path / 'head.json'}"]) == 0
    assert "as they were written" in capsys.readouterr().out


def test_status_tells_of_this_replica(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        status = await replica.get("status")
        assert status["instance"] == "gw-0"
        assert status["policy"] == {"version": replica.parts.policy.version, "last_error": ""}
        assert status["audit"] == {"enabled": True, "records": 1, "lost": 0, "failed": ""}
        assert status["ready"] is True

    with_replica(setup, work)


# --- purge


def test_a_client_is_purged_everywhere(shared: Setup) -> None:
    async def work() -> None:
        async with shared.replica("gw-0") as one, shared.replica("gw-1") as two:
            for replica in (one, two):
                for client in ("alice", "bob"):
                    replica.parts.audit.append({"client": client, "content": "secret"})
            answer = await one.call("POST", "/admin/v1/clients/alice/purge")
            assert answer.status == 200
            assert answer.json == {
                "client": "alice",
                "usage": 0,
                "cache": 0,
                "audit": 1,
                "other_replicas": "asked to purge their audit logs",
            }
            await until(lambda: len([one for one in two.audited("request") if one]) == 1)
            for replica in (one, two):
                assert [record.get("client") for record in replica.audited("request")] == [None, "bob"]
                assert [record["actor"] for record in replica.audited("purge")] == ["admin"]
            assert one.audited()[-1]["action"] == "purge"
            two.parts.audit.append({"client": "alice", "content": "later"})
            await one.parts.dynamic.revoke("premium", actor="root")
            await until(lambda: "premium" in two.parts.dynamic.revoked)
            await asyncio.sleep(0.2)
            assert [record.get("client") for record in two.audited("request")] == [None, "bob", "alice"]
        # A replica that starts within the day carries out what it finds, and spares what came later.
        async with shared.replica("gw-1") as two:
            await until(lambda: "alice" in two.parts.dynamic.purges)
            await asyncio.sleep(0.2)
            assert [record.get("client") for record in two.audited("request")] == [None, "bob", "alice"]

    asyncio.run(work())
    words = ["verify", str(shared.folder / "log"), "--public-key", str(shared.folder / "key.pub")]
    assert audit_cli.main(words) == 0


def test_a_replica_that_was_away_purges_when_it_comes_back(shared: Setup) -> None:
    async def work() -> None:
        async with shared.replica("gw-0") as one:
            async with shared.replica("gw-1") as two:
                two.parts.audit.append({"client": "alice", "content": "secret"})
                await two.parts.dynamic.close()
                await two.parts.store.close()
                assert (await one.call("POST", "/admin/v1/clients/alice/purge")).json["audit"] == 0
                assert two.audited("request") != [{}]
            async with shared.replica("gw-1") as two:
                await until(lambda: two.audited("request") == [{}])

    asyncio.run(work())


# --- when the audit log is off, or cannot be written


def test_without_an_audit_log_changes_are_in_the_log_stream(tmp_path: Path) -> None:
    async def work(replica: Replica) -> None:
        assert (await replica.call("POST", "/admin/v1/keys/basic/revoke")).status == 200
        assert (await replica.call("POST", "/admin/v1/clients/alice/purge")).json["audit"] == 0
        assert (await replica.call("GET", "/admin/v1/audit/head")).error["code"] == "audit_disabled"
        replica.parts.logs.flush()
        lines = [json.loads(line) for line in replica.parts.output.getvalue().splitlines()]
        assert [(line["message"], line["action"], line["actor"]) for line in lines] == [
            ("admin action", "revoke", "admin"),
            ("admin action", "purge", "admin"),
        ]

    with_replica(Setup(tmp_path, audit={}), work)
    assert not (tmp_path / "log").exists()


def test_no_change_is_made_that_cannot_be_audited(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        replica.parts.audit.failed = "No space left on device"
        version = replica.parts.policy.version
        for method, path, body in (
            ("PUT", "routes/m/weights", {"weights": {"blue": 1}}),
            ("DELETE", "routes/m/weights", None),
            ("POST", "keys/basic/revoke", None),
            ("POST", "keys/basic/restore", None),
            ("POST", "clients/alice/purge", None),
            ("POST", "reload", None),
        ):
            answer = await replica.call(method, f"/admin/v1/{path}", body)
            assert (answer.status, answer.error["code"]) == (503, "audit_unavailable"), path
        dynamic = replica.parts.dynamic
        assert (dynamic.weights, dynamic.revoked, dynamic.purges) == ({}, frozenset(), {})
        assert replica.parts.policy.version == version
        replica.parts.audit.failed = ""

    with_replica(setup, work)


# --- the edges of HTTP


def test_methods_and_paths(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        for method, path, status in (
            ("POST", "status", 405),
            ("GET", "routes/m/weights", 405),
            ("GET", "nothing", 404),
            ("GET", "", 404),
            ("PUT", "routes//weights", 404),
            ("POST", "keys/revoke", 404),
            ("POST", "keys//revoke", 404),
        ):
            answer = await replica.call(method, f"/admin/v1/{path}")
            assert answer.status == status, path
        wrong = await replica.call("GET", "/admin/v1/routes/m/weights")
        assert wrong.headers["allow"] == "PUT, DELETE"

    with_replica(setup, work)


def test_a_body_that_does_not_come_is_not_waited_for_long(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(replica: Replica) -> None:
        monkeypatch.setattr("serve_app.gateway.admin.BODY_S", 0.05)
        monkeypatch.setattr("serve_app.gateway.admin._read", lambda _: asyncio.sleep(3600))
        answer = await replica.call("POST", "/admin/v1/keys/basic/revoke")
        assert answer.status == 408
        assert replica.parts.dynamic.revoked == frozenset()

    with_replica(setup, work)


def test_a_client_that_goes_away_changes_nothing(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        pieces = [{"type": "http.request", "body": b"", "more_body": True}, {"type": "http.disconnect"}]
        assert (await replica.call("POST", "/admin/v1/keys/basic/revoke", pieces=pieces)).status == 400
        assert replica.parts.dynamic.revoked == frozenset()

    with_replica(setup, work)


def test_what_fails_inside_stays_inside(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(replica: Replica) -> None:
        def broken() -> list[dict[str, Any]]:
            raise RuntimeError("the insides")

        monkeypatch.setattr(replica.parts.router, "snapshot", broken)
        answer = await replica.call("GET", "/admin/v1/routes")
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        assert b"insides" not in answer.body
        replica.parts.logs.flush()
        assert "the admin API failed" in replica.parts.output.getvalue()

    with_replica(setup, work)


def test_other_protocols_are_answered(setup: Setup) -> None:
    async def work(replica: Replica) -> None:
        async def talk(scope: dict[str, Any], *messages: str) -> list[str]:
            waiting = iter(messages)
            out: list[str] = []

            async def receive() -> dict[str, Any]:
                return {"type": next(waiting)}

            async def send(message: Any) -> None:
                out.append(message["type"])

            await replica.admin(scope, receive, send)
            return out

        assert await talk({"type": "lifespan"}, "lifespan.startup", "lifespan.shutdown") == [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ]
        assert await talk({"type": "websocket", "path": "/"}) == ["websocket.close"]

    with_replica(setup, work)


# --- processes


def test_two_gateways_share_what_administrators_change_and_leave_an_audit_log(tmp_path: Path, redis_url: str) -> None:
    setup = Setup(tmp_path, redis_url)
    with FakeBackend() as blue, FakeBackend() as green, contextlib.ExitStack() as stack:
        setup.configuration["backends"]["blue"]["url"] = blue.url
        setup.configuration["backends"]["green"]["url"] = green.url

        def launch(name: str) -> Gateway:
            gateway = start(tmp_path / f"{name}.json", setup.configuration, {"HOSTNAME": name})
            stack.callback(gateway.stop)
            return gateway

        one, two = launch("gw-0"), launch("gw-1")
        assert one.admin("PUT", "/admin/v1/routes/m/weights", {"weights": {"blue": 0}}).status == 200
        wait = "/admin/v1/routes"
        two.wait_for(
            lambda: two.admin("GET", wait).json()["routes"]["m"]["backends"][0]["weight"] == 0, "the new weights"
        )
        for _ in range(20):
            assert two.chat("a secret prompt").status == 200
        assert two.metric("rayplane_gateway_backend_requests_total", backend="blue") == 0
        assert two.metric("rayplane_gateway_backend_requests_total", backend="green") == 20
        assert two.admin("POST", "/admin/v1/keys/premium/revoke", {"reason": "lost"}).status == 200
        one.wait_for(lambda: one.chat().status == 401, "the revocation")
        assert one.admin("POST", "/admin/v1/keys/premium/restore").status == 200
        two.wait_for(lambda: two.chat().status == 200, "the restoration")
        usage = one.admin("GET", "/admin/v1/usage?by=client").json()["usage"]
        assert next(row["requests"] for row in usage if row["client"] == "premium") >= 21
        head = one.admin("GET", "/admin/v1/audit/head").json()["head"]
        (tmp_path / "head.json").write_text(json.dumps(head))
        # One is killed and comes back, the other ends as it should.
        one.process.kill()
        one.process.wait()
        assert two.stop() == 0
        assert launch("gw-0").stop() == 0
    words = ["verify", str(tmp_path / "log"), "--public-key", str(tmp_path / "key.pub")]
    assert audit_cli.main([*words, "--head", f"@{tmp_path / 'head.json'}"]) == 0
    everything = b"".join(path.read_bytes() for path in (tmp_path / "log").iterdir())
    assert everything.count(b'"kind":"request"') >= 21
    assert b"a secret prompt" not in everything
    assert key("premium").key.encode() not in everything
