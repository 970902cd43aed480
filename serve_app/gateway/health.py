"""Which backends may get requests: by active checks, and by what requests saw (outlier ejection).

The two are independent. A check finds a server that is away; ejection finds one that answers its checks and fails its
requests. A backend whose checks fail gets nothing. An ejected one may still be the last resort: how many are ejected at
a time is bounded by the caller (`config.Health.max_ejected`), because taking out everything helps nobody.

The ejection is Envoy's "consecutive 5xx", its time doubled for each ejection in a row
(https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/outlier).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from .config import Health as Settings

#: An ejection lasts at most so many times `eject_s`.
MAX_EJECTION = 10


class Health:
    """What is known of one backend. Times are the event loop's seconds.

    Args:
        settings: The backend's.
        on_change: Told whether it is usable, whenever that may have changed.
        on_eject: Told for how many seconds requests took it out.
    """

    __slots__ = (
        "_on_change",
        "_on_eject",
        "_results",
        "ejected_until",
        "ejections",
        "failures",
        "known",
        "reason",
        "settings",
        "up",
    )

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[bool], None] = lambda _: None,
        on_eject: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self._on_change = on_change
        self._on_eject = on_eject
        #: No check failed (often enough). True before the first one, so that a start waits for nothing.
        self.up = True
        #: A check or a request was answered, or a check failed: before that nobody knows, and the gateway is not ready.
        self.known = False
        #: What the check said that took it down.
        self.reason = ""
        #: Failed requests in a row.
        self.failures = 0
        self.ejected_until = 0.0
        #: Ejections that followed closely on each other.
        self.ejections = 0
        #: Checks in a row with the same result: good ones above 0, bad ones below.
        self._results = 0

    def take(self, other: Health) -> None:
        """Go on from what another one, of the same server, knew."""
        self.up, self.known, self.reason, self._results = other.up, other.known, other.reason, other._results

    def ejected(self, now: float) -> bool:
        """Whether requests took it out, for the time being."""
        return self.ejected_until > now

    def usable(self, now: float) -> bool:
        """Whether it is up and not ejected."""
        return self.up and self.ejected_until <= now

    def checked(self, error: str, now: float) -> None:
        """Take an active check's result: what went wrong, or an empty text."""
        if error:
            self._results = min(0, self._results) - 1
            # Of a backend that nobody has heard of yet one failure says enough.
            if not self.known or -self._results >= self.settings.unhealthy_after:
                self.up, self.reason = False, error
        else:
            self._results = max(0, self._results) + 1
            if not self.known or self._results >= self.settings.healthy_after:
                self.up, self.reason = True, ""
        self.known = True
        self._on_change(self.usable(now))

    def succeeded(self) -> None:
        """A request was answered."""
        self.known = True
        self.failures = 0

    def failed(self, now: float) -> None:
        """A request failed: no connection, 5xx, a time-out, a broken answer."""
        if self.ejected_until > now:
            # Requests that were under way when it was taken out say nothing new.
            return
        self.failures += 1
        if self.failures < self.settings.eject_after:
            return
        longest = self.settings.eject_s * MAX_EJECTION
        if now - self.ejected_until > longest:
            self.ejections = 0
        lasts = min(self.settings.eject_s * 2**self.ejections, longest)
        self.ejections += 1
        self.ejected_until = now + lasts
        # Afterwards it is on trial: the first request decides.
        self.failures = self.settings.eject_after - 1
        self._on_eject(lasts)
        self._on_change(False)


async def watch(health: Health, check: Callable[[], Awaitable[str]]) -> None:
    """Check a backend for ever, once an interval.

    Args:
        health: Takes the results.
        check: Asks the backend; returns what went wrong, or an empty text. It has its own time-out.
    """
    loop = asyncio.get_running_loop()
    while True:
        error = await check()
        health.checked(error, loop.time())
        # Replicas that started together do not ask together for ever.
        await asyncio.sleep(health.settings.interval_s * random.uniform(0.9, 1.1))  # noqa: S311 - no secret
