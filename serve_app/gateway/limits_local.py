"""The algorithm of limits.lua in this process: for a gateway without Redis, and for the time that Redis is away.

Kept equal to the script by a property test that runs both on the same sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from .config import Limits, Period, Rate

MICROSECONDS: dict[Period, int] = {"second": 10**6, "minute": 60 * 10**6, "hour": 3600 * 10**6, "day": 86400 * 10**6}
#: The kinds of limits, by the number with which the script names them.
KINDS = ("", "requests", "tokens", "concurrency", "daily_tokens", "monthly_tokens", "daily_cost", "monthly_cost")
DAY_US = 86400 * 10**6
#: As in the script: a rounding error must not refuse the last whole request.
EPSILON = 1e-6
#: Buckets kept before those that are full again (which is the same as not there) are forgotten.
MOST_BUCKETS = 100_000


def micro(amount: float | None) -> int:
    """An amount of the currency in millionths; -1 for none."""
    return -1 if amount is None else round(amount * 1_000_000)


def clean(name: str) -> str:
    """The name, fit for UTF-8: JSON, and with it a token's claims, can hold half of a surrogate pair."""
    return name if name.isascii() else name.encode(errors="replace").decode()


class Spec:
    """A subject's limits as the script reads them; -1 where there is none. See limits.lua for the order of `wire`."""

    __slots__ = (
        "concurrency",
        "daily",
        "daily_cost",
        "daily_tokens",
        "limits",
        "monthly",
        "monthly_cost",
        "monthly_tokens",
        "name",
        "request_burst",
        "request_limit",
        "request_per",
        "token_burst",
        "token_limit",
        "token_per",
        "wire",
    )

    def __init__(self, name: str, limits: Limits, fraction: float = 1.0) -> None:
        def rate(given: Rate | None) -> tuple[float, int, float]:
            if given is None:
                return -1, 1, -1
            burst = given.limit if given.burst is None else given.burst
            if fraction == 1.0:
                return given.limit, MICROSECONDS[given.per], burst
            # A share smaller than one request would be no share at all.
            return given.limit * fraction, MICROSECONDS[given.per], max(min(burst, 1), burst * fraction)

        def whole(given: int | None, least: int = 0) -> int:
            return -1 if given is None else max(min(given, least), math.floor(given * fraction))

        self.name = clean(name)
        self.limits = limits
        self.request_limit, self.request_per, self.request_burst = rate(limits.requests)
        self.token_limit, self.token_per, self.token_burst = rate(limits.tokens)
        self.concurrency = whole(limits.concurrency, 1)
        self.daily_tokens = whole(limits.daily_tokens)
        self.monthly_tokens = whole(limits.monthly_tokens)
        self.daily_cost = -1 if limits.daily_cost is None else math.floor(micro(limits.daily_cost) * fraction)
        self.monthly_cost = -1 if limits.monthly_cost is None else math.floor(micro(limits.monthly_cost) * fraction)
        self.daily = self.daily_tokens >= 0 or self.daily_cost >= 0
        self.monthly = self.monthly_tokens >= 0 or self.monthly_cost >= 0
        self.wire: list[str | int | float] = [
            self.name,
            self.request_limit,
            self.request_per,
            self.request_burst,
            self.token_limit,
            self.token_per,
            self.token_burst,
            self.concurrency,
            self.daily_tokens,
            self.monthly_tokens,
            self.daily_cost,
            self.monthly_cost,
        ]


def day_of(now_us: int) -> int:
    """The UTC date as a number: 20260131."""
    date = datetime.fromtimestamp(now_us // 10**6, UTC)
    return date.year * 10000 + date.month * 100 + date.day


def _months(period: int) -> int:
    """Months since year 0 of a day (20260131) or a month (202601)."""
    month = period // 100 if period > 999999 else period
    return month // 100 * 12 + month % 100


def until_month(now_us: int) -> int:
    """Microseconds until the first of the next month, UTC."""
    date = datetime.fromtimestamp(now_us // 10**6, UTC)
    after = datetime(date.year + date.month // 12, date.month % 12 + 1, 1, tzinfo=UTC)
    return int(after.timestamp()) * 10**6 - now_us


def fill_ms(level: float, limit: float, per: int, burst: float) -> float:
    """Milliseconds until a bucket is full."""
    if limit < 0 or level >= burst:
        return 0
    return 40 * 86400 * 1000 if limit == 0 else (burst - level) * per / limit / 1000


class Local:
    """Limits held in this process. `now_us` gives the time in microseconds; it may jump back (see limits.lua)."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        self._now_us = now_us
        self._buckets: dict[str, list[float]] = {}
        self._budgets: dict[tuple[int, str], list[int]] = {}
        self._latest = 0
        #: Running requests by subject; whoever admits adds, whoever settles takes away.
        self.running: dict[str, int] = {}

    def enter(self, spec: Spec) -> None:
        """A request of the subject began."""
        self.running[spec.name] = self.running.get(spec.name, 0) + 1

    def leave(self, spec: Spec) -> None:
        """A request of the subject ended."""
        left = self.running.get(spec.name, 0) - 1
        if left > 0:
            self.running[spec.name] = left
        else:
            self.running.pop(spec.name, None)

    def give(self, spec: Spec, requests: float, tokens: float) -> None:
        """Correct the buckets; a debt never exceeds the bucket."""
        if spec.request_limit < 0 and spec.token_limit < 0:
            return
        bucket = self._bucket(spec, self._now_us())
        if requests and spec.request_limit >= 0:
            bucket[0] = max(-spec.request_burst, min(spec.request_burst, bucket[0] + requests))
        if tokens and spec.token_limit >= 0:
            bucket[1] = max(-spec.token_burst, min(spec.token_burst, bucket[1] + tokens))

    def charge(self, day: int, spec: Spec, tokens: int, cost: int) -> None:
        """Correct the budgets of a day (20260131) and its month."""
        if spec.daily:
            budget = self._budget(day, spec.name)
            budget[0] += tokens
            budget[1] += cost
        if spec.monthly:
            budget = self._budget(day // 100, spec.name)
            budget[0] += tokens
            budget[1] += cost

    def admit(self, specs: Sequence[Spec], tokens: int, cost: int) -> tuple[int, list[int]]:
        """Admit a request by all subjects, or by none: the day, and a result as the script gives it (subjects from 1).

        An admitted request runs until `leave` for each of the subjects with a concurrency.
        """
        now = self._now_us()
        day = day_of(now)
        at, kind, wait = 0, 0, 0
        before = [(bucket, bucket[:]) for spec in specs if (bucket := self._buckets.get(spec.name)) is not None]
        for number, spec in enumerate(specs, 1):
            found, needed = self._refusal(spec, now, day, tokens, cost)
            if found and wait >= 0 and (needed < 0 or needed > wait):
                at, kind, wait = number, found, needed
        if kind:
            result = [0, at, kind, wait, *self._left(specs)]
            for changed, old in before:
                # As in the script: what admits nothing keeps nothing, unless the clock went back.
                if old[2] <= now:
                    changed[:] = old
            return day, result
        for spec in specs:
            bucket = self._buckets.get(spec.name)
            if bucket is not None:
                if spec.request_limit >= 0:
                    bucket[0] -= 1
                if spec.token_limit >= 0:
                    bucket[1] -= tokens
            if spec.concurrency >= 0:
                self.enter(spec)
            self.charge(day, spec, tokens, cost)
        return day, [1, *self._left(specs)]

    def _bucket(self, spec: Spec, now: int) -> list[float]:
        bucket = self._buckets.get(spec.name)
        if bucket is None:
            if len(self._buckets) >= MOST_BUCKETS:
                self._forget()
            bucket = self._buckets[spec.name] = [math.inf, math.inf, now]
        passed = max(0, now - bucket[2])
        bucket[2] = now
        if spec.request_limit >= 0:
            bucket[0] = min(spec.request_burst, bucket[0] + passed * spec.request_limit / spec.request_per)
        if spec.token_limit >= 0:
            bucket[1] = min(spec.token_burst, bucket[1] + passed * spec.token_limit / spec.token_per)
        return bucket

    def _forget(self) -> None:
        # The half that was idle longest is full by now or will be soon; forgetting it costs a burst at most.
        for name in sorted(self._buckets, key=lambda one: self._buckets[one][2])[: MOST_BUCKETS // 2]:
            del self._buckets[name]

    def _budget(self, period: int, name: str) -> list[int]:
        budget = self._budgets.get((period, name))
        if budget is None:
            if period > self._latest > 0:
                # Settlements may still come for what was admitted before midnight; nothing asks for older periods.
                for old in [one for one in self._budgets if _months(one[0]) < _months(period) - 1]:
                    del self._budgets[old]
            if period > 999999:
                self._latest = max(self._latest, period)
            budget = self._budgets[(period, name)] = [0, 0]
        return budget

    def _refusal(self, spec: Spec, now: int, day: int, tokens: int, cost: int) -> tuple[int, int]:
        kind, wait = 0, 0
        if spec.request_limit >= 0 or spec.token_limit >= 0:
            requests_left, tokens_left, _ = self._bucket(spec, now)
            if spec.request_limit >= 0 and requests_left + EPSILON < 1:
                if spec.request_limit == 0 or spec.request_burst < 1:
                    return 1, -1
                kind, wait = 1, math.ceil((1 - requests_left) * spec.request_per / spec.request_limit)
            if spec.token_limit >= 0 and tokens_left + EPSILON < tokens:
                if spec.token_limit == 0 or spec.token_burst < tokens:
                    return 2, -1
                more = math.ceil((tokens - tokens_left) * spec.token_per / spec.token_limit)
                if more > wait:
                    kind, wait = 2, more
        if spec.concurrency >= 0 and self.running.get(spec.name, 0) >= spec.concurrency:
            if spec.concurrency == 0:
                return 3, -1
            if wait < 10**6:
                kind, wait = 3, 10**6
        need = max(tokens, 1)
        if spec.daily:
            used = self._budget(day, spec.name)
            rest = DAY_US - now % DAY_US
            if spec.daily_tokens >= 0 and used[0] + need > spec.daily_tokens:
                kind, wait = 4, max(wait, rest)
            if spec.daily_cost >= 0 and cost > 0 and used[1] + cost > spec.daily_cost:
                kind, wait = 6, max(wait, rest)
        if spec.monthly:
            used = self._budget(day // 100, spec.name)
            if spec.monthly_tokens >= 0 and used[0] + need > spec.monthly_tokens:
                kind, wait = 5, max(wait, until_month(now))
            if spec.monthly_cost >= 0 and cost > 0 and used[1] + cost > spec.monthly_cost:
                kind, wait = 7, max(wait, until_month(now))
        return kind, wait

    def _left(self, specs: Sequence[Spec]) -> list[int]:
        limit: list[float] = [-1, -1]
        rest: list[float] = [0, 0]
        full: list[float] = [0, 0]
        for spec in specs:
            bucket = self._buckets.get(spec.name)
            if bucket is None:
                continue
            if spec.request_limit >= 0 and (limit[0] < 0 or bucket[0] < rest[0]):
                limit[0], rest[0] = spec.request_burst, bucket[0]
                full[0] = fill_ms(bucket[0], spec.request_limit, spec.request_per, spec.request_burst)
            if spec.token_limit >= 0 and (limit[1] < 0 or bucket[1] < rest[1]):
                limit[1], rest[1] = spec.token_burst, bucket[1]
                full[1] = fill_ms(bucket[1], spec.token_limit, spec.token_per, spec.token_burst)
        result = []
        for i in (0, 1):
            result += [math.floor(limit[i]), max(0, math.floor(rest[i] + EPSILON)), math.ceil(full[i])]
        return result
