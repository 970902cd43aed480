"""From a model's name to a backend's answer: choice, retries, failover, canary, shadow."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from . import bound as bounds
from .bound import Bound
from .client import Header
from .config import Config, Route
from .errors import BackendFailed, BackendTimeout, GatewayError, InvalidRequest, Unavailable
from .health import Health, watch
from .metrics import Metrics
from .upstream import Answer, Failure, Pool, outcome_of

__all__ = ["Answer", "Call", "Router"]

Variant = Literal["main", "canary", "shadow"]

#: An error's body is read up to so many bytes.
MAX_ERROR_BYTES = 256 * 1024
#: Copies for shadow backends under way at a time; more are left out, because they must not take the callers' memory.
MAX_SHADOWS = 64
#: Seconds before the same backend is asked again, doubled each time.
BACKOFF_S = 0.05
#: How engines refuse a request that is too long.
_REFUSALS = frozenset({400, 413, 422})
_ONE_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')


class _Versioned(Protocol):
    """What the router needs of a policy."""

    @property
    def config(self) -> Config: ...


@dataclass(slots=True)
class Call:
    """A request on its way to a backend."""

    route_id: str
    route: Route
    method: str
    #: Percent-decoded, as ASGI has it.
    path: str
    query: bytes
    #: End-to-end, names in lower case, without credentials.
    headers: list[Header]
    body: bytes
    #: The body's JSON object, where it is one.
    decoded: dict[str, Any] | None
    stream: bool
    caller_id: str
    #: What keeps its backend where the route is sticky; empty: nothing.
    sticky: str
    #: The canary header's value.
    canary: str | None
    #: The backend that a privileged caller asked for.
    backend: str | None
    request_id: str
    #: False: no copy for the shadow backend.
    shadow: bool = True
    #: What bounds the answer where the request does not: in neither body nor `decoded`, for backends differ in it.
    bound: Bound | None = None


class _Target:
    """A backend's place in a route."""

    __slots__ = ("configured", "current", "pool", "priority", "weight")

    def __init__(self, pool: Pool, weight: int, priority: int) -> None:
        self.pool = pool
        self.configured = weight
        self.weight = weight
        self.priority = priority
        # Gateways that started together do not all begin with the same backend.
        self.current = random.uniform(0, weight)  # noqa: S311 - no secret


class _Table:
    """A route, ready for choices."""

    __slots__ = ("canary", "groups", "ignored", "percent", "pools", "route", "shadow", "targets")

    def __init__(self, route: Route, pools: Mapping[str, Pool]) -> None:
        self.route = route
        self.targets = [_Target(pools[one.backend], one.weight, one.priority) for one in route.backends]
        priorities = sorted({one.priority for one in self.targets})
        self.groups = [[one for one in self.targets if one.priority == number] for number in priorities]
        self.canary = pools[route.canary.backend] if route.canary else None
        self.percent = route.canary.percent if route.canary else 0.0
        #: Weights were set that leave no backend anything.
        self.ignored = False
        self.shadow = pools[route.shadow.backend] if route.shadow else None
        self.pools = {one.pool.name: one.pool for one in self.targets}
        for further in (self.canary, self.shadow):
            if further is not None:
                self.pools[further.name] = further

    def set_weights(self, weights: Mapping[str, int]) -> None:
        """Weights other than the configured ones. Those that leave no backend anything, because the one that had all
        is no longer the route's, are passed over.
        """
        wanted = [max(0, weights.get(one.pool.name, one.configured)) for one in self.targets]
        self.ignored = bool(weights) and not any(wanted)
        for one, weight in zip(self.targets, wanted, strict=True):
            one.weight = one.configured if self.ignored else weight

    def set_percent(self, percent: float | None) -> None:
        """The canary's percentage; None: the configured one."""
        canary = self.route.canary
        if canary is not None:
            self.percent = min(100.0, max(0.0, canary.percent if percent is None else percent))


class Router:
    """Sends calls to backends.

    Args:
        metrics: Counts attempts, retries, health.
        notice: Told of backends that come and go, and of weights that are passed over: a sentence, then by name what it
            is about (`backend` or `model`) and the `reason`.
    """

    def __init__(self, metrics: Metrics, notice: Callable[..., None] | None = None) -> None:
        self._metrics = metrics
        self._notice = notice
        self._pools: dict[str, Pool] = {}
        self._tables: dict[str, _Table] = {}
        self._overrides: Mapping[str, Mapping[str, int]] = {}
        self._percents: Mapping[str, float] = {}
        #: Routes whose weights were set so that no backend would get anything: the configured ones hold.
        self.ignored: frozenset[str] = frozenset()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._checking = False
        self._retired: set[Pool] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._shadows = 0
        self._told: dict[str, bool] = {}

    # --- life

    def configure(self, policy: _Versioned) -> None:
        """Go by a new policy. Unchanged backends keep connections and health, others end with their last request."""
        config = policy.config
        before, self._pools = self._pools, {}
        for name, backend in config.backends.items():
            old = before.get(name)
            if old is not None and old.backend == backend:
                self._pools[name] = before.pop(name)
                continue
            pool = self._pools[name] = self._pool(name, config)
            if old is not None and (old.backend.url, old.backend.health) == (backend.url, backend.health):
                pool.health.take(old.health)
        self._tables = {name: _Table(route, self._pools) for name, route in config.routes.items()}
        self._apply()
        self._metrics.keep_backends(self._pools)
        for name, pool in before.items():
            watching = self._watches.pop(name, None)
            if watching is not None:
                watching.cancel()
            self._retired.add(pool)
            pool.retire(self._let_go)
        if self._checking:
            self._watch()

    def _pool(self, name: str, config: Config) -> Pool:
        backend = config.backends[name]

        def changed(usable: bool) -> None:
            self._metrics.healthy(name, usable)
            before = self._told.get(name, True)
            self._told[name] = usable
            if before != usable and self._notice is not None:
                pool = self._pools.get(name)
                reason = "" if usable or pool is None else pool.health.reason or "its requests failed"
                self._notice("a backend is back" if usable else "a backend is out", backend=name, reason=reason)

        def ejected(_: float) -> None:
            self._metrics.ejected(name)

        self._metrics.healthy(name, True)
        return Pool(name, backend, Health(backend.health, changed, ejected), self._ended)

    def _ended(self, name: str, outcome: str, seconds: float) -> None:
        self._metrics.backend(name, outcome, seconds)
        self._metrics.backend_left(name)

    def _let_go(self, pool: Pool) -> None:
        task = asyncio.get_running_loop().create_task(pool.let_go())
        self._tasks.add(task)

        def closed(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            self._retired.discard(pool)

        task.add_done_callback(closed)

    async def start(self) -> None:
        """Begin to check backends. It waits for none of them: `ready` tells."""
        self._checking = True
        self._watch()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        for name, pool in self._pools.items():
            if name not in self._watches:
                self._watches[name] = loop.create_task(watch(pool.health, pool.check))

    async def close(self) -> None:
        """End checks and copies, and close every connection; what is still under way fails."""
        # Those whose closing has not begun yet are closed here: it is cancelled with the other tasks.
        pools = [*self._pools.values(), *self._retired]
        tasks = [*self._watches.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watches.clear()
        for pool in pools:
            await pool.close()
        self._checking = False

    def ready(self) -> bool:
        """Whether a backend of some route is known to work, one that gets traffic."""
        return any(
            target.weight > 0 and target.pool.health.known and target.pool.health.up
            for table in self._tables.values()
            for target in table.targets
        )

    # --- weights

    def set_weights(self, overrides: Mapping[str, Mapping[str, int]]) -> None:
        """Replace all weights that are not the configured ones: by route, by backend.

        Routes and backends that are not there (or not yet) are passed over, and so are all weights of a route if they
        leave none of its backends anything.
        """
        self._overrides = overrides
        self._apply()

    def set_canaries(self, percents: Mapping[str, float]) -> None:
        """Replace all percentages of canaries that are not the configured ones, by route."""
        self._percents = percents
        self._apply()

    def _apply(self) -> None:
        for name, table in self._tables.items():
            table.set_weights(self._overrides.get(name, {}))
            table.set_percent(self._percents.get(name))
        before, self.ignored = self.ignored, frozenset(name for name, table in self._tables.items() if table.ignored)
        if self._notice is not None:
            for name in sorted(self.ignored - before):
                self._notice(
                    "weights are passed over, the configured ones hold",
                    model=name,
                    reason="they leave no backend of the route anything",
                )

    def snapshot(self) -> list[dict[str, Any]]:
        """Routes and their backends as they are now, for the admin API."""
        now = asyncio.get_running_loop().time()
        routes: list[dict[str, Any]] = []
        for name, table in self._tables.items():
            route = table.route
            entry: dict[str, Any] = {
                "model": name,
                "aliases": route.aliases,
                "overridden": bool(self._overrides.get(name)) and not table.ignored,
                "backends": [
                    {
                        **_state(target.pool, now),
                        "weight": target.weight,
                        "configured_weight": target.configured,
                        "priority": target.priority,
                    }
                    for target in table.targets
                ],
                "canary": None,
                "shadow": None,
            }
            if route.canary is not None and table.canary is not None:
                entry["canary"] = {
                    **_state(table.canary, now),
                    "percent": table.percent,
                    "configured_percent": route.canary.percent,
                    "header": route.canary.header,
                    "value": route.canary.value,
                }
            if route.shadow is not None and table.shadow is not None:
                entry["shadow"] = {**_state(table.shadow, now), "percent": route.shadow.percent}
            routes.append(entry)
        return routes

    # --- calls

    def on_canary(self, call: Call) -> bool:
        """Whether a call belongs to the canary, by its header or by its caller's place in the percentage. Another
        backend may answer it all the same, while the canary is out.
        """
        table = self._tables.get(call.route_id)
        return table is not None and table.canary is not None and _on_canary(table, call)

    async def open(self, call: Call) -> Answer:
        """Find a backend that answers.

        Until the first byte of an answer's body a failed attempt is followed by another, `route.retries` times at most:
        after connection errors and 5xx, after time-outs and 429 on other backends only.

        Raises:
            Unavailable: No backend is there or can be reached.
            BackendFailed: The last one broke, or answered what is no answer.
            BackendTimeout: The last one took too long.
            InvalidRequest: The asked-for backend is not the route's, or the backend refused the request with something
                that is no JSON.
        """
        table = self._tables.get(call.route_id)
        if table is None:
            raise Unavailable(f"The model {call.route_id} is no longer offered.")
        loop = asyncio.get_running_loop()
        began = loop.time()
        bodies = _Bodies(call)
        if table.shadow is not None and call.shadow:
            self._copy(table, table.shadow, call, bodies)
        tried: dict[Pool, bool] = {}
        attempts = 0
        answer: Answer | None = None
        error: GatewayError | None = None
        while True:
            chosen = self._choose(table, call, tried, loop.time())
            if chosen is None:
                break
            pool, variant = chosen
            if attempts:
                self._metrics.retry(call.route_id)
                if pool in tried:
                    await asyncio.sleep(BACKOFF_S * 2**attempts * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            attempts += 1
            answer = error = None
            try:
                answer = await self._attempt(pool, call, bodies, began)
                answer.variant = variant
                answer.attempts = attempts
                if answer.status < 300:
                    # Whether it is a success its end will tell.
                    pool.health.known = True
                    return answer
                again, anew = await self._judge(pool, answer)
                if not again:
                    return answer
            except Failure as failure:
                pool.health.failed(loop.time())
                error, again = failure.error, failure.outcome == "connect" or _repeatable(call)
                anew = failure.outcome != "timeout"
            except (BackendFailed, BackendTimeout) as failure:
                pool.health.failed(loop.time())
                error, again, anew = failure, _repeatable(call), isinstance(failure, BackendFailed)
            tried[pool] = anew
            if not again or attempts > table.route.retries:
                break
        if error is not None:
            raise error
        if answer is not None:
            return answer
        raise Unavailable(f"No backend of the model {call.route_id} can be reached.", headers={"retry-after": "5"})

    async def _attempt(self, pool: Pool, call: Call, bodies: _Bodies, began: float) -> Answer:
        name = pool.backend.model or call.route_id
        body = bodies.for_model(name)
        bound = call.bound and call.bound.within(pool.contexts.get(name, 0))
        while True:
            sent = bound.into(body, other=pool.newer_bound) if bound else body
            head = pool.head(call.method, call.path, call.query, call.headers, len(sent))
            self._metrics.backend_entered(pool.name)
            answer = await pool.send(head, sent, began, model=call.route_id)
            if bound is None or answer.status not in _REFUSALS:
                return answer
            # A bound that nobody asked for must not be why a request is refused.
            refusal = bounds.refusal(await answer.hold(MAX_ERROR_BYTES))
            if refusal.too_long:
                bound = bound.after(refusal)
            elif refusal.unsupported == bound.name and bound.other and not pool.newer_bound:
                pool.newer_bound = True
            else:
                return answer

    async def _judge(self, pool: Pool, answer: Answer) -> tuple[bool, bool]:
        """An answer that is an error: whether another attempt is due, and whether this backend may be asked again.

        Raises:
            BackendFailed: It is nothing that a caller should see.
        """
        try:
            body = await answer.read(MAX_ERROR_BYTES)
        finally:
            await answer.close()
        answer.restore(body)
        status = answer.status
        if status < 400:
            raise BackendFailed("The backend answered with a redirect.")
        if status >= 500:
            if not _is_error(body):
                raise BackendFailed("The backend failed on this request.")
            pool.health.failed(asyncio.get_running_loop().time())
            return True, True
        pool.health.succeeded()
        if status == 429:
            return True, False
        if status == 401:
            raise BackendFailed("The backend refused the gateway's own credentials.", code="backend_refused")
        if not _is_object(body):
            raise InvalidRequest("The backend refused the request.", status=status, code="backend_refused")
        return False, False

    # --- choice

    def _choose(self, table: _Table, call: Call, tried: Mapping[Pool, bool], now: float) -> tuple[Pool, Variant] | None:
        """The next backend; `tried` has those already asked, and whether they may be asked again."""
        if call.backend:
            asked = table.pools.get(call.backend)
            if asked is None:
                raise InvalidRequest(
                    f"The model {call.route_id} has no backend of that name.", param="x-rayplane-backend"
                )
            return (asked, _variant(table, asked)) if tried.get(asked, True) else None
        canary = table.canary
        if canary is not None and canary not in tried and canary.health.usable(now) and _on_canary(table, call):
            return canary, "canary"
        out = _ejected(table, now)
        key = call.sticky if table.route.sticky != "none" else ""
        # Fresh ones first; then, as ejection is only a suspicion, ejected ones; at last those that failed just now.
        for skip_ejected, fresh in ((True, True), (False, True), (False, False)):
            if not fresh and not tried:
                break
            for group in table.groups:
                able = [
                    one
                    for one in group
                    if one.weight > 0
                    and one.pool.health.up
                    and not (skip_ejected and one.pool in out)
                    and (one.pool not in tried if fresh else tried.get(one.pool, True))
                ]
                if able:
                    return (_by_hash(able, key) if key else _in_turn(able)), "main"
        return None

    # --- copies

    def _copy(self, table: _Table, pool: Pool, call: Call, bodies: _Bodies) -> None:
        shadow = table.route.shadow
        assert shadow is not None
        if random.uniform(0, 100) >= shadow.percent:  # noqa: S311 - no secret
            return
        if self._shadows >= MAX_SHADOWS or not pool.health.up:
            self._metrics.shadow(pool.name, "skipped")
            return
        self._shadows += 1
        task = asyncio.get_running_loop().create_task(self._shadow(pool, call, bodies))
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._shadows -= 1
            self._tasks.discard(done)

        task.add_done_callback(ended)

    async def _shadow(self, pool: Pool, call: Call, bodies: _Bodies) -> None:
        outcome = "error"
        answer: Answer | None = None
        try:
            answer = await self._attempt(pool, call, bodies, asyncio.get_running_loop().time())
            async for _ in answer.pieces():
                pass
            outcome = outcome_of(answer.status)
        except Failure as failure:
            outcome = failure.outcome
        except GatewayError as error:
            outcome = error.code or "error"
        finally:
            if answer is not None:
                await answer.close()
            self._metrics.shadow(pool.name, outcome)


class _Bodies:
    """A call's body under the names that its backends have for the model; each made once, and only where needed."""

    __slots__ = ("_call", "_made")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._made: dict[str, bytes] = {}

    def for_model(self, name: str) -> bytes:
        """The body with the model's name."""
        call = self._call
        if call.decoded is not None:
            if call.decoded.get("model") == name:
                return call.body
            body = self._made.get(name)
            if body is None:
                body = self._made[name] = _renamed(call.body, name)
            return body
        kind = next((value for key, value in call.headers if key == b"content-type"), b"")
        if not call.body or not kind.lower().startswith(b"multipart/form-data"):
            return call.body
        body = self._made.get(name)
        if body is None:
            body = self._made[name] = _renamed_form(call.body, kind, name)
        return body


def _renamed(body: bytes, name: str) -> bytes:
    """A JSON object's text with another model; all other bytes stay where the name stands once only."""
    matches = _ONE_MODEL.findall(body)
    if len(matches) == 1 and body.count(b'"model"') == 1:
        return body.replace(matches[0], b'"model":' + msgspec.json.encode(name), 1)
    decoded = msgspec.json.decode(body)
    decoded["model"] = name
    return msgspec.json.encode(decoded)


_BOUNDARY = re.compile(rb'boundary="?([^";,\s]+)"?', re.IGNORECASE)
_MODEL_FIELD = re.compile(rb'content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;|\r\n)', re.IGNORECASE)


def _renamed_form(body: bytes, kind: bytes, name: str) -> bytes:
    """A multipart form with another value in its field `model`."""
    found = _BOUNDARY.search(kind)
    if found is None:
        return body
    mark = b"--" + found[1]
    parts = body.split(mark)
    for place, part in enumerate(parts):
        head, empty, value = part.partition(b"\r\n\r\n")
        if empty and len(head) < 8192 and _MODEL_FIELD.search(head + b"\r\n"):
            if value.removesuffix(b"\r\n") == name.encode():
                return body
            parts[place] = head + b"\r\n\r\n" + name.encode() + b"\r\n"
            return mark.join(parts)
    return body


def _repeatable(call: Call) -> bool:
    """Whether asking twice does no harm: generating is repeatable, uploading a file is not."""
    return call.method == "GET" or not call.path.startswith("/v1/files")


def _variant(table: _Table, pool: Pool) -> Variant:
    return "canary" if pool is table.canary and all(one.pool is not pool for one in table.targets) else "main"


def _share(*words: str) -> float:
    """A number in (0, 1) that is the same for the same words everywhere and always."""
    digest = hashlib.blake2b("\0".join(words).encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return (int.from_bytes(digest, "big") + 0.5) / (1 << 56)


def _on_canary(table: _Table, call: Call) -> bool:
    canary = table.route.canary
    assert canary is not None
    if call.canary and call.canary == canary.value:
        return True
    # By caller: nobody's answers change to and fro.
    return table.percent > 0 and _share("canary", call.route_id, call.caller_id) * 100 < table.percent


def _ejected(table: _Table, now: float) -> list[Pool]:
    """Those that are out because of failed requests, at most the share that may be: those that are out the longest."""
    out = [one.pool for one in table.targets if one.pool.health.ejected_until > now]
    if not out:
        return out
    share = min(one.backend.health.max_ejected for one in out)
    allowed = math.floor(len(table.targets) * share)
    if len(out) > allowed:
        out.sort(key=lambda pool: pool.health.ejected_until, reverse=True)
        del out[allowed:]
    return out


def _in_turn(able: list[_Target]) -> Pool:
    """Smooth weighted round robin, as nginx does it: shares are exact over any stretch, and no backend gets a burst."""
    if len(able) == 1:
        return able[0].pool
    total = 0
    best = able[0]
    for one in able:
        total += one.weight
        one.current += one.weight
        if one.current > best.current:
            best = one
    best.current -= total
    return best.pool


def _by_hash(able: list[_Target], key: str) -> Pool:
    """Weighted rendezvous hashing: a backend that leaves moves only its own callers.

    Schindelhauer, Schomaker: Weighted distributed hash tables (SPAA 2005): the largest of -weight / ln(hash) wins.
    """
    return max(able, key=lambda one: -one.weight / math.log(_share("sticky", one.pool.name, key))).pool


class _Error(msgspec.Struct):
    """OpenAI's shape of an error, and the older one of vLLM."""

    error: dict[str, Any] | None = None
    object: str = ""
    message: str = ""


_error = msgspec.json.Decoder(_Error)


def _is_error(body: bytes) -> bool:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = _error.decode(body)
        if decoded.error is not None:
            return isinstance(decoded.error.get("message"), str)
        return decoded.object == "error" and bool(decoded.message)
    return False


def _is_object(body: bytes) -> bool:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return isinstance(msgspec.json.decode(body), dict)
    return False


def _state(pool: Pool, now: float) -> dict[str, Any]:
    health = pool.health
    return {
        "backend": pool.name,
        "url": pool.backend.url,
        "healthy": health.up,
        "known": health.known,
        "reason": health.reason,
        "ejected_s": round(max(0.0, health.ejected_until - now), 3),
        "failures": health.failures,
        "in_flight": pool.in_flight,
    }
