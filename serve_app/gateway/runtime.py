"""The parts of a running gateway, put together once and shared by the request path and the admin API."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from .audit import AuditFailed, AuditLog
from .auth import Authenticator
from .cache import Cache, version_of
from .config import Config, Role
from .dynamic import Dynamic
from .filters.chain import Chain
from .limits import Limiter
from .logs import Logs
from .metrics import Metrics
from .policy import Policy
from .reload import Reloader
from .routing import Router
from .store import Store, StoreError
from .tracing import Tracing


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
        self.limiter = Limiter(self.store)
        self.limiter.on_dropped = self.metrics.settlements_dropped
        self.cache = Cache(self.store, self.metrics)
        self.dynamic = Dynamic(self.store)
        self.authenticator = Authenticator()
        self.router = Router(self.metrics)
        self.audit = AuditLog(config.audit, self.instance, on_head=self._head_signed)
        self.reloader = Reloader(path, self.take_over, self._reload_failed)
        #: Changes when the same request may be answered differently.
        self.answers_version = version_of(config)
        self._chains: dict[str, Chain | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bring the parts up; a store or backend that is away is waited for while running."""
        self.store.on_state.append(self._store_changed)
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
        """Whether requests can be answered: a backend can be reached, and the store where it is indispensable."""
        closed = self.policy.config.store.on_failure == "closed"
        return not self.draining and self.router.ready() and (self.store.local or self.store.available or not closed)

    def chain(self, name: str, role: Role) -> Chain | None:
        """The filters of a role, None where it has none."""
        try:
            return self._chains[name]
        except KeyError:
            filters = self.policy.config.filters
            chain = self._chains[name] = Chain.build(role.filters, filters) if role.filters else None
            return chain

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
