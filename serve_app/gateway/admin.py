"""The admin port: probes, metrics and the admin API. It belongs on no public address.

`GET /livez`, `/readyz` and `/metrics` ask for no key. Everything below `/admin/v1/` asks for a caller whose role has
the operation `admin`, by `Authorization: Bearer KEY` or by `x-rayplane-key: KEY`: proxies such as the Kubernetes API
server's take the Authorization header for themselves.

    GET    status                 this replica: version, store, limits, audit, reload
    GET    routes                 routes with their backends, weights, canaries and health
    PUT    routes/MODEL/weights   {"weights": {"blue": 90, "green": 10}}, on all replicas; others keep theirs
    DELETE routes/MODEL/weights   back to the configuration's
    PUT    routes/MODEL/canary    {"percent": 5}, on all replicas
    DELETE routes/MODEL/canary    back to the configuration's
    GET    keys?limit=&after=     keys without their hashes
    POST   keys/ID/revoke         {"until": "2026-01-31T00:00:00Z", "reason": "..."}, both optional; on all replicas
    POST   keys/ID/restore
    POST   reload                 read the configuration anew, this replica
    GET    usage?days=&by=        by key, client, tenant or model
    POST   clients/CLIENT/purge   usage and cache; the content of audit records, on all replicas
    GET    audit/head             the last signed head, to be kept elsewhere

Every change is audited with its actor, before and after.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import parse_qsl

import msgspec

from . import __version__, usage
from .audit_format import stamp
from .auth import ANONYMOUS
from .authorise import authorise
from .errors import AuthenticationFailed, GatewayError, InvalidRequest, NotFound, PermissionDenied, TooLarge

if TYPE_CHECKING:
    from .auth import Caller
    from .runtime import Runtime

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 64 * 1024
MAX_WEIGHT = 1_000_000
MAX_KEYS = 1000
MAX_DAYS = 366
#: A client whose body does not come within so many seconds is given up.
BODY_S = 10.0
_JSON = b"application/json"
_PREFIX = "/admin/v1/"


class _Weights(msgspec.Struct, forbid_unknown_fields=True):
    weights: dict[str, int]


class _Canary(msgspec.Struct, forbid_unknown_fields=True):
    percent: float


class _Revoke(msgspec.Struct, forbid_unknown_fields=True):
    until: datetime | None = None
    reason: str = ""


class MethodError(GatewayError):
    """The path exists, with other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class PolicyRefusedError(GatewayError):
    """The configuration has mistakes; the policy in force stays."""

    status = 422
    type = "invalid_request_error"
    code = "policy_invalid"


@dataclass(frozen=True, slots=True)
class _Request:
    """What a handler gets: the caller, the name in the path (empty: none), the query and the body."""

    caller: Caller
    name: str
    query: dict[str, str]
    body: bytes


Handler = Callable[[_Request], Awaitable[Any]]


class Admin:
    """The ASGI application of the admin port.

    Args:
        runtime: The parts of the gateway that it shows and changes.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # What is before and after the name in the path. The name may hold slashes: proxies undo their escaping.
        self._routes: list[tuple[str, str, dict[str, Handler]]] = [
            ("status", "", {"GET": self._status}),
            ("routes", "", {"GET": self._show_routes}),
            ("routes/", "/weights", {"PUT": self._put_weights, "DELETE": self._delete_weights}),
            ("routes/", "/canary", {"PUT": self._put_canary, "DELETE": self._delete_canary}),
            ("keys", "", {"GET": self._show_keys}),
            ("keys/", "/revoke", {"POST": self._revoke}),
            ("keys/", "/restore", {"POST": self._restore}),
            ("reload", "", {"POST": self._reload}),
            ("usage", "", {"GET": self._usage}),
            ("clients/", "/purge", {"POST": self._purge}),
            ("audit/head", "", {"GET": self._audit_head}),
        ]
        self._purged: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        runtime.dynamic.on_change.append(self._purge_own_log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: list[tuple[bytes, bytes]] = [(b"content-type", _JSON)]
        status = 200
        try:
            status, body, kind = await self._answer(scope, receive)
            headers = [(b"content-type", kind)]
        except GatewayError as error:
            status, body = error.status, error.body()
            headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        except Exception as error:  # the edge: whatever it is, the caller gets an answer without insides
            self._runtime.logs.exception("the admin API failed", error, path=scope["path"])  # noqa: PLE1205  not logging's
            status, body = 500, GatewayError("The gateway failed; its log tells more.").body()
        headers += [(b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes, bytes]:
        path: str = scope["path"]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if not path.startswith(_PREFIX):
            if path not in ("/livez", "/readyz", "/metrics"):
                raise NotFound("There is no such path.", code="not_found")
            _allow(method, ("GET",))
            if path == "/metrics":
                return (
                    200,
                    await asyncio.to_thread(self._runtime.metrics.render),
                    b"text/plain; version=0.0.4; charset=utf-8",
                )
            if path == "/livez":
                return 200, b'{"status":"alive"}', _JSON
            ready, checks = self._ready()
            text = {"status": "ready" if ready else "not ready", "checks": checks}
            return (200 if ready else 503), msgspec.json.encode(text), _JSON
        caller = await self._authenticate(scope)
        name, handlers = self._find(path[len(_PREFIX) :])
        _allow(method, tuple(handlers))
        body = b""
        if method in ("POST", "PUT"):
            try:
                body = await asyncio.wait_for(_read(receive), BODY_S)
            except TimeoutError:
                raise InvalidRequest("The body did not come in time.", status=408) from None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        found = await handlers[method](_Request(caller, name, query, body))
        return 200, msgspec.json.encode(found), _JSON

    def _find(self, path: str) -> tuple[str, dict[str, Handler]]:
        for begin, end, handlers in self._routes:
            if path == begin and not end:
                return "", handlers
            if end and path.startswith(begin) and path.endswith(end) and len(path) > len(begin) + len(end):
                return path[len(begin) : -len(end)], handlers
        raise NotFound("There is no such path.", code="not_found")

    def _ready(self) -> tuple[bool, dict[str, Any]]:
        runtime = self._runtime
        checks = {
            "draining": runtime.draining,
            "backend": runtime.router.ready(),
            "store": "local" if runtime.store.local else ("reached" if runtime.store.available else "away"),
            "revocations": runtime.dynamic.loaded,
            "audit": not runtime.audit.refusing,
        }
        return runtime.ready() and not runtime.audit.refusing, checks

    async def _authenticate(self, scope: Scope) -> Caller:
        """The caller, who may use the admin API.

        Raises:
            GatewayError: Not known, or not allowed.
        """
        runtime = self._runtime
        presented: bytes | None = None
        for header, value in scope["headers"]:
            if header == b"x-rayplane-key":
                presented = value if value[:7].lower() == b"bearer " else b"Bearer " + value
                break
            if header == b"authorization":
                presented = value
        try:
            caller = await runtime.authenticator.authenticate(
                runtime.policy, presented, runtime.dynamic.revoked, time.time()
            )
        except AuthenticationFailed as error:
            runtime.metrics.auth_failure(error.code or "")
            raise
        if caller.id == ANONYMOUS:
            # Whatever that role may do elsewhere.
            runtime.metrics.auth_failure("missing_api_key")
            raise AuthenticationFailed("The admin API asks for a key or a token.", code="missing_api_key")
        try:
            authorise(caller, "admin", None, None, None)
        except (PermissionDenied, InvalidRequest):
            # Every other answer would tell who is not an administrator how the admin API looks.
            self._record(caller, "denied", {"path": scope["path"], "method": scope["method"]})
            raise PermissionDenied("Your key's role does not have the operation `admin`.") from None
        return caller

    def _record(self, caller: Caller, action: str, details: Mapping[str, Any]) -> None:
        """Into the audit log and the log stream."""
        record = {"action": action, "actor": caller.id, "actor_client": caller.client, **details}
        self._runtime.logs.info("admin action", **record)
        if self._runtime.audit.config.enabled:
            self._runtime.audit.append({"kind": "admin", **record})
            self._runtime.metrics.audit_record("admin")

    # --- what is

    async def _status(self, _: _Request) -> dict[str, Any]:
        runtime = self._runtime
        ready, checks = self._ready()
        audit = runtime.audit
        return {
            "version": __version__,
            "instance": runtime.instance,
            "started": stamp(runtime.started),
            "ready": ready,
            "checks": checks,
            "in_flight": runtime.metrics.in_flight(),
            "policy": {"version": runtime.policy.version, "last_error": runtime.reloader.last_error},
            "store": {
                "last_error": runtime.store.last_error or runtime.dynamic.last_error,
                "state_known": runtime.dynamic.loaded,
            },
            "revoked": len(runtime.dynamic.revoked),
            # Routes whose weights were set so that no backend would get anything: the configured ones hold.
            "weights_ignored": sorted(runtime.router.ignored),
            "audit": {
                "enabled": audit.config.enabled,
                "records": audit.records,
                "lost": audit.lost,
                "failed": audit.failed,
            },
        }

    async def _show_routes(self, _: _Request) -> dict[str, Any]:
        runtime = self._runtime
        routes: dict[str, Any] = {}
        for name, route in runtime.policy.config.routes.items():
            override = runtime.dynamic.overrides.get(name)
            moved = runtime.dynamic.canaries.get(name)
            ignored = name in runtime.router.ignored
            weights = self._weights(name, {target.backend: target.weight for target in route.backends})
            routes[name] = {
                "aliases": route.aliases,
                "backends": [
                    {
                        "backend": target.backend,
                        "priority": target.priority,
                        "weight": weights[target.backend],
                        "configured": target.weight,
                    }
                    for target in route.backends
                ],
                "changed": {"actor": override.actor, "at": stamp(override.at), "ignored": ignored}
                if override
                else None,
                "canary": route.canary
                and {
                    "backend": route.canary.backend,
                    "percent": moved.percent if moved else route.canary.percent,
                    "configured": route.canary.percent,
                    "changed": {"actor": moved.actor, "at": stamp(moved.at)} if moved else None,
                },
                "shadow": route.shadow and {"backend": route.shadow.backend, "percent": route.shadow.percent},
            }
        return {"routes": routes, "backends": runtime.router.snapshot()}

    async def _show_keys(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        limit = _number(request.query, "limit", 100, MAX_KEYS)
        after = request.query.get("after", "")
        keys = list(runtime.policy.keys)
        begin = 0
        if after:
            begin = next((index for index, key in enumerate(keys, 1) if key.id == after), 0)
            if not begin:
                raise NotFound("The key named by `after` is gone.", param="after", code="key_not_found")
        shown = []
        for key in keys[begin : begin + limit]:
            revocation = runtime.dynamic.revocations.get(key.id)
            shown.append(
                {
                    "id": key.id,
                    "prefix": key.prefix,
                    "role": key.role,
                    "tenant": key.tenant,
                    "client": key.client or key.id,
                    "expires": key.expires or None,
                    "not_before": key.not_before or None,
                    "disabled": key.disabled,
                    "models": key.models,
                    "operations": key.operations,
                    "revoked": revocation and _revocation(revocation),
                }
            )
        more = begin + limit < len(keys)
        return {"keys": shown, "total": len(keys), "after": shown[-1]["id"] if more and shown else None}

    async def _usage(self, request: _Request) -> dict[str, Any]:
        days = _number(request.query, "days", 1, MAX_DAYS)
        by = request.query.get("by", "key")
        if by not in ("key", "client", "tenant", "model"):
            raise InvalidRequest("`by` is one of key, client, tenant, model.", param="by")
        kind = cast(Literal["key", "client", "tenant", "model"], by)
        return {"days": days, "by": by, "usage": await usage.report(self._runtime.store, days=days, by=kind)}

    async def _audit_head(self, _: _Request) -> dict[str, Any]:
        audit = self._runtime.audit
        if not audit.config.enabled:
            raise NotFound("The audit log is not enabled.", code="audit_disabled")
        await audit.sync()
        return {"head": audit.head}

    # --- changes

    async def _put_weights(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        found = runtime.policy.route(request.name)
        if found is None:
            raise NotFound("There is no such model.")
        name, route = found
        wanted = _decode(request.body, _Weights).weights
        configured = {target.backend: target.weight for target in route.backends}
        if unknown := sorted(set(wanted) - set(configured)):
            raise InvalidRequest(
                f"{', '.join(unknown)}: no backend of {name}; its backends are {', '.join(configured)}.",
                param="weights",
            )
        if any(not 0 <= weight <= MAX_WEIGHT for weight in wanted.values()):
            raise InvalidRequest(f"A weight is a whole number from 0 to {MAX_WEIGHT}.", param="weights")
        before = self._weights(name, configured)
        after = {**before, **wanted}
        if not any(after.values()):
            raise InvalidRequest(f"No backend of {name} would get anything: all weights are 0.", param="weights")
        runtime.audit.check()
        await runtime.dynamic.set_weights(name, after, actor=request.caller.id)
        self._record(request.caller, "weights", {"model": name, "before": before, "after": after})
        return {"model": name, "before": before, "weights": after}

    async def _delete_weights(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        found = runtime.policy.route(request.name)
        # A route that the configuration has no more may have left weights.
        name = found[0] if found else request.name
        if found is None and name not in runtime.dynamic.overrides:
            raise NotFound("There is no such model.")
        after = {target.backend: target.weight for target in found[1].backends} if found else {}
        before = self._weights(name, after)
        runtime.audit.check()
        await runtime.dynamic.set_weights(name, None, actor=request.caller.id)
        self._record(request.caller, "weights", {"model": name, "before": before, "after": after})
        return {"model": name, "before": before, "weights": after}

    async def _put_canary(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        found = runtime.policy.route(request.name)
        if found is None:
            raise NotFound("There is no such model.")
        name, route = found
        if route.canary is None:
            raise InvalidRequest(f"The route of {name} has no canary; declare one in the configuration.")
        percent = _decode(request.body, _Canary).percent
        if not 0 <= percent <= 100:
            raise InvalidRequest("A canary's percentage is a number from 0 to 100.", param="percent")
        before = self._percent(name, route.canary.percent)
        runtime.audit.check()
        await runtime.dynamic.set_canary(name, percent, actor=request.caller.id)
        self._record(request.caller, "canary", {"model": name, "before": before, "after": percent})
        return {"model": name, "before": before, "percent": percent}

    async def _delete_canary(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        found = runtime.policy.route(request.name)
        # A route that the configuration has no more, or without its canary, may have left a percentage.
        name = found[0] if found else request.name
        if found is None and name not in runtime.dynamic.canaries:
            raise NotFound("There is no such model.")
        after = found[1].canary.percent if found and found[1].canary else None
        before = self._percent(name, after)
        runtime.audit.check()
        await runtime.dynamic.set_canary(name, None, actor=request.caller.id)
        self._record(request.caller, "canary", {"model": name, "before": before, "after": after})
        return {"model": name, "before": before, "percent": after}

    def _percent(self, name: str, configured: float | None) -> float | None:
        changed = self._runtime.dynamic.canaries.get(name)
        return changed.percent if changed else configured

    def _weights(self, name: str, configured: Mapping[str, int]) -> dict[str, int]:
        changed = {} if name in self._runtime.router.ignored else self._runtime.dynamic.weights.get(name, {})
        return {backend: changed.get(backend, weight) for backend, weight in configured.items()}

    async def _revoke(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        self._known(request.name)
        body = _decode(request.body or b"{}", _Revoke)
        until = 0.0
        if body.until is not None:
            until = (body.until if body.until.tzinfo else body.until.replace(tzinfo=UTC)).timestamp()
            if until <= time.time():
                raise InvalidRequest("`until` lies in the past.", param="until")
        before = request.name in runtime.dynamic.revoked
        runtime.audit.check()
        await runtime.dynamic.revoke(request.name, actor=request.caller.id, until=until, reason=body.reason)
        ends = stamp(until) if until else None
        self._record(
            request.caller,
            "revoke",
            {"key": request.name, "before": before, "after": True, "until": ends, "reason": body.reason},
        )
        return {"id": request.name, "revoked": True, "until": ends}

    async def _restore(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        before = request.name in runtime.dynamic.revoked
        if not before:
            self._known(request.name)
        runtime.audit.check()
        await runtime.dynamic.restore(request.name)
        self._record(request.caller, "restore", {"key": request.name, "before": before, "after": False})
        return {"id": request.name, "revoked": False}

    def _known(self, key_id: str) -> None:
        # A token's subject is nowhere listed.
        if not key_id.startswith("jwt:") and self._runtime.policy.keys.get(key_id) is None:
            raise NotFound("There is no key with this id.", code="key_not_found")

    async def _reload(self, request: _Request) -> dict[str, Any]:
        from .policy import PolicyError  # noqa: PLC0415  the parser is loaded by now; only its name is needed

        runtime = self._runtime
        before = runtime.policy.version
        runtime.audit.check()
        try:
            policy = await runtime.reloader.now()
        except PolicyError as error:
            self._record(request.caller, "reload", {"before": before, "after": before, "refused": True})
            raise PolicyRefusedError(str(error)) from error
        self._record(request.caller, "reload", {"before": before, "after": policy.version})
        return {"before": before, "version": policy.version}

    async def _purge(self, request: _Request) -> dict[str, Any]:
        runtime = self._runtime
        client = request.name
        runtime.audit.check()
        # First what needs the store: nothing is gone from one place alone when it is away.
        done = self._purged.get(client, 0.0)
        self._purged[client] = math.inf
        try:
            await runtime.dynamic.request_purge(client, actor=request.caller.id)
            at = runtime.dynamic.purges[client].at
            counted = await usage.purge(runtime.store, client)
            cached = await runtime.cache.purge(client=client)
            audited = await runtime.audit.purge(client, actor=request.caller.id)
            done = at
        finally:
            # What was asked for and is not done yet goes on in the background.
            self._purged[client] = done
            self._purge_own_log()
        found = {"client": client, "usage": counted, "cache": cached, "audit": audited}
        self._record(request.caller, "purge", found)
        return {**found, "other_replicas": "asked to purge their audit logs"}

    def _purge_own_log(self) -> None:
        """Carry out purges that another replica was asked for (and this one's again, which finds nothing then)."""
        if not self._runtime.audit.config.enabled:
            return
        for client, purge in self._runtime.dynamic.purges.items():
            if self._purged.get(client, 0.0) < purge.at:
                self._purged[client] = purge.at
                task = asyncio.get_running_loop().create_task(self._purge_audit(client, purge.actor, purge.at))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _purge_audit(self, client: str, actor: str, before: float) -> None:
        try:
            await self._runtime.audit.purge(client, actor=actor, before=before)
        except (GatewayError, OSError) as error:
            # Tried again with the next change of the shared state.
            self._purged.pop(client, None)
            self._runtime.logs.error("a purge of the audit log failed", error=str(error))


def _revocation(revocation: Any) -> dict[str, Any]:
    return {
        "at": stamp(revocation.at),
        "until": stamp(revocation.until) if revocation.until else None,
        "actor": revocation.actor,
        "reason": revocation.reason,
    }


def _allow(method: str, methods: tuple[str, ...]) -> None:
    if method not in methods:
        raise MethodError(f"This path takes {' and '.join(methods)}.", headers={"Allow": ", ".join(methods)})


def _decode(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"The body is not what this path takes: {error}.") from error


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 1 <= int(text) <= most):
        raise InvalidRequest(f"`{name}` is a number from 1 to {most}.", param=name)
    return int(text)


async def _read(receive: Receive) -> bytes:
    """The body.

    Raises:
        TooLarge: More than an admin request ever needs.
        InvalidRequest: The client went away.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise InvalidRequest("The request ended early.")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"An admin request has {MAX_BODY_BYTES} bytes at most.")
        if not message.get("more_body"):
            return bytes(body)
