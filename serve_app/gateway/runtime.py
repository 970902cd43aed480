"""The parts of a running gateway, put together once and shared by the request path and the admin API."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from .audit import AuditFailed, AuditLog
from .auth import Authenticator
from .cache import Cache, version_of
from .config import Config, Role
from .dynamic import Dynamic
from .filters.base import RemoteFilter
from .filters.chain import Chain
from .limits import Limiter
from .logs import Logs
from .metrics import Metrics
from .policy import Policy
from .reload import Reloader
from .routing import Router
from .store import Store, StoreError
from .tracing import Tracing

#: A filter in trouble is named in the log so often, in seconds; metrics count every time.
TELL_EVERY_S = 10.0
#: Seconds between looks at the store's memory, and the share of it from which on that is said.
MEMORY_EVERY_S = 30.0
MEMORY_HIGH = 0.9


class Runtime:
    """What lives as long as the process. `policy` is replaced as a whole when the configuration changes; all else
    stays.

    Args:
        path: The configuration file.
        policy: What was read from it.
    """

    def __init__(self, path: Path, policy: Policy) -> None:
        config: Config = policy.config
        self.policy = policy
        self.started = time.time()
        self.instance = os.environ.get("HOSTNAME") or socket.gethostname()
        #: SIGTERM has come: no longer ready, open requests are finished.
        self.draining = False
        self.metrics = Metrics()
        self.logs = Logs(config.logging)
        self.tracing = Tracing(config.tracing)
        self.store = Store(config.store)
        # Before the limiter: a Redis that is full takes nothing from it, and tells all the same which keys are revoked.
        self.dynamic = Dynamic(self.store)
        self.limiter = Limiter(self.store)
        self.limiter.on_dropped = self.metrics.settlements_dropped
        self.cache = Cache(_place_of_cache(self.store), self.metrics)
        self.authenticator = Authenticator(self.informed)
        self.router = Router(self.metrics, self.logs.warning)
        self.audit = AuditLog(config.audit, self.instance, on_head=self._head_signed)
        self.reloader = Reloader(path, self.take_over, self._reload_failed)
        #: Changes when the same request may be answered differently.
        self.answers_version = version_of(config)
        self._chains: dict[str, Chain | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: The share of its memory that the store has filled; 0 where it has no bound.
        self.store_memory = 0.0
        self._memory_told: tuple[str, bool] = ("", False)
        self._watch: asyncio.Task[None] | None = None
        self._told: dict[str, float] = {}

    async def start(self) -> None:
        """Bring the parts up; a store or backend that is away is waited for while running."""
        self.store.on_state.append(self._store_changed)
        if not self.store.local:
            self.store.on_connect.append(self._look_at_memory)
            self.metrics.pull(
                "store_memory_ratio", "The share of its memory that the store has filled.", lambda: self.store_memory
            )
            self._watch = asyncio.create_task(self._watch_memory(), name="store-memory")
        self.dynamic.on_change.append(self._dynamic_changed)
        self.logs.start()
        self.audit.start()
        self.cache.configure(self.policy.config.cache)
        self.metrics.pull("log_lines_dropped", "Log lines lost because nobody read them.", lambda: self.logs.dropped)
        self.router.configure(self.policy)
        self.metrics.policy(self.policy.version)
        await self.store.start()
        await asyncio.gather(self.authenticator.start(), self.dynamic.start(), self.router.start())
        self.reloader.start(self.policy)

    async def close(self) -> None:
        """Write what is pending, then end the parts in reverse."""
        await self.reloader.stop()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.limiter.drain(5.0)
        self.limiter.close()
        await asyncio.gather(self.router.close(), self.dynamic.close(), self.authenticator.close())
        await self.cache.close()
        for chain in self._chains.values():
            if chain is not None:
                await chain.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.close()
        self.tracing.close()
        self.audit.close()
        self.logs.close()

    def ready(self) -> bool:
        """Whether requests can be answered: a backend can be reached, the store where it is indispensable, and it is
        known which keys are revoked.
        """
        closed = self.store.settings.on_failure == "closed"
        reached = self.store.local or self.store.available or not closed
        return not self.draining and self.router.ready() and reached and self.informed()

    def informed(self) -> bool:
        """Whether it is known which keys are revoked, or (declared so) does not have to be: see
        `store.start_without_revocations`.
        """
        return self.dynamic.loaded or self.store.settings.start_without_revocations

    def chain(self, name: str, role: Role) -> Chain | None:
        """The filters of a role, None where it has none."""
        try:
            return self._chains[name]
        except KeyError:
            filters = self.policy.config.filters
            chain = self._chains[name] = Chain.build(role.filters, filters) if role.filters else None
            for one in chain._filters if chain is not None else ():
                if isinstance(one, RemoteFilter):
                    one.on_error = partial(self.filter_failed, one.name)
            return chain

    def filter_failed(self, name: str, reason: str) -> None:
        """A filter that asks elsewhere could not decide; what that means for the request is its own affair."""
        self.metrics.filter_error(name)
        now = time.monotonic()
        if now - self._told.get(name, -TELL_EVERY_S) >= TELL_EVERY_S:
            self._told[name] = now
            self.logs.warning("a content filter could not decide", filter=name, reason=reason)

    def take_over(self, policy: Policy) -> None:
        """Go on with a new policy; requests that are under way end with the old one."""
        before = self.policy
        self.cache.configure(policy.config.cache)
        self.policy = policy
        self.answers_version = version_of(policy.config)
        chains, self._chains = self._chains, {}
        for chain in chains.values():
            if chain is not None:
                self._later(chain.close())
        self.router.configure(policy)
        self._dynamic_changed()
        self.metrics.policy(policy.version)
        self.logs.info("policy taken over", version=policy.version, before=before.version)
        kept = ("server", "store", "audit", "logging", "tracing")
        stale = [name for name in kept if getattr(before.config, name) != getattr(policy.config, name)]
        if stale:
            self.logs.warning("these sections change only with a restart", sections=stale)

    def _reload_failed(self, error: Exception) -> None:
        self.metrics.policy_failure()
        self.logs.error("the configuration has mistakes; the policy in force stays", error=str(error))

    def _store_changed(self, available: bool) -> None:
        self.metrics.store_available(available)
        self.metrics.degraded(not available and self.policy.config.store.on_failure == "local")
        (self.logs.info if available else self.logs.error)("the store is " + ("reached" if available else "away"))

    def _dynamic_changed(self) -> None:
        self.router.set_weights(self.dynamic.weights)
        self.router.set_canaries({name: one.percent for name, one in self.dynamic.canaries.items()})

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_EVERY_S)
            if self.store.available:
                await self._look_at_memory()

    async def _look_at_memory(self) -> None:
        """Say when Redis is nearly full, and (once) if it then drops what limits and revocations stand on."""
        try:
            said = await self.store.call("INFO", "memory")
        except StoreError:
            return  # not every user may ask
        facts = dict(line.split(":", 1) for line in said.decode("utf-8", "replace").split("\r\n") if ":" in line)
        policy, most = facts.get("maxmemory_policy", ""), int(facts.get("maxmemory", "0"))
        self.store_memory = int(facts.get("used_memory", "0")) / most if most else 0.0
        high = self.store_memory >= MEMORY_HIGH
        told, self._memory_told = self._memory_told, (policy, high)
        if most and policy not in ("", "noeviction", told[0]):
            self.logs.warning(
                "the store drops budgets when it is full: set its maxmemory-policy to noeviction, and give the cache a"
                " Redis of its own (store.cache_url)",
                policy=policy,
            )
        if high and not told[1]:
            self.logs.error(
                "the store is nearly full; once it is, it counts as away: give it more memory",
                share=round(self.store_memory, 3),
                bytes=most,
            )

    def audit_request(self, record: dict[str, Any]) -> None:
        """Add a request's record; the answer is on its way already, so a full disk refuses the next request."""
        try:
            self.audit.append(record)
        except AuditFailed as error:
            self.metrics.audit_failure()
            self.logs.error("a request is not in the audit log", error=error.message, request_id=record["request_id"])
        else:
            self.metrics.audit_record("request")

    def _head_signed(self, head: dict[str, Any]) -> None:
        """Keep the audit log's signed head outside its disk: in the log stream, and in Redis where there is one."""
        self.logs.info("audit head", head=head)
        if self.store.available and not self.store.local:
            self._later(self._anchor(head))

    async def _anchor(self, head: dict[str, Any]) -> None:
        text = msgspec.json.encode(head)
        try:
            await self.store.call("HSET", f"{self.store.prefix}:audit:heads", self.instance, text)
        except StoreError as error:
            self.logs.warning("the audit log's head is not in the store", error=str(error))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _place_of_cache(store: Store) -> Store:
    """Where cached answers are: with all else, unless a Redis of their own is named."""
    settings = store.settings
    if not settings.cache_url:
        return store
    return Store(msgspec.structs.replace(settings, url=settings.cache_url, password_env=settings.cache_password_env))
