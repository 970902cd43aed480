"""What the gateway measures, under names that begin with `rayplane_gateway_`; prometheus_client writes the page.

Label values are names from the policy, never a caller's text: a caller could otherwise fill the memory with names.
Unknown models are counted under the empty name.
"""

from __future__ import annotations

import functools
import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, Gauge, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "rayplane_gateway_"

#: A family keeps at most so many series; what comes beyond is counted under `other`. It guards against mistakes.
MAX_SERIES = 5000

Labels = tuple[object, ...]
Series = TypeVar("Series", "_Number", "_Spread")
Family = TypeVar("Family", "_Counter", "_Gauge", "_Histogram")


def _borders(text: str) -> tuple[float, ...]:
    return tuple(float(one) for one in text.split())


_REQUEST_S = _borders("0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 20.0 40.0 80.0 160.0 320.0 640.0")
# vLLM's own borders, so that its histograms and these can be laid over each other, and finer ones below.
_FIRST_TOKEN_S = _borders(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0"
)
_INTER_TOKEN_S = _borders(
    "0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 10.0 20.0"
)
_OVERHEAD_S = _borders("0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0")


class _Number:
    """A series of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value


class _Spread:
    """A series of a histogram."""

    __slots__ = ("_borders", "counts", "sum")

    def __init__(self, borders: tuple[float, ...]) -> None:
        self._borders = borders
        self.counts = [0] * (len(borders) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._borders, value)] += 1
        self.sum += value


class _Family(Collector, Generic[Series]):
    """A metric's series.

    They belong to the event loop, where every request counts a dozen of them; those of prometheus_client take a lock
    for each and cost five times as much. It is asked for what it is good at: the page.
    """

    def __init__(self, name: str, about: str, labels: tuple[str, ...], make: Callable[[], Series]) -> None:
        self._name = PREFIX + name
        self._about = about
        self._labels = labels
        self._make: Callable[[], Series] = make
        self._series: dict[Labels, Series] = {} if labels else {(): make()}

    def __getitem__(self, key: Labels) -> Series:
        one = self._series.get(key)
        if one is None:
            if len(self._series) >= MAX_SERIES:
                key = ("other",) * len(self._labels)
            one = self._series.setdefault(key, self._make())
        return one

    def series(self) -> list[Labels]:
        return list(self._series)

    def forget(self, key: Labels) -> None:
        """Take a series off the page."""
        del self._series[key]

    def describe(self) -> Iterable[Metric]:
        """Its name, for the registry, which refuses a second one."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """Its series, for the page."""
        family = self._family()
        # In one go: the page is written in a thread of its own.
        for key, one in list(self._series.items()):
            self._add(family, [str(value) for value in key], one)
        return [family]

    def _family(self) -> Metric:
        raise NotImplementedError

    def _add(self, family: Any, labels: list[str], one: Series) -> None:
        raise NotImplementedError


class _Counter(_Family[_Number]):
    def _family(self) -> Metric:
        return CounterMetricFamily(self._name, self._about, labels=self._labels)

    def _add(self, family: CounterMetricFamily, labels: list[str], one: _Number) -> None:
        family.add_metric(labels, one.value)


class _Gauge(_Family[_Number]):
    def _family(self) -> Metric:
        return GaugeMetricFamily(self._name, self._about, labels=self._labels)

    def _add(self, family: GaugeMetricFamily, labels: list[str], one: _Number) -> None:
        family.add_metric(labels, one.value)


class _Histogram(_Family[_Spread]):
    def __init__(self, name: str, about: str, labels: tuple[str, ...], borders: tuple[float, ...]) -> None:
        super().__init__(name, about, labels, functools.partial(_Spread, borders))
        self._upto = [*map(str, borders), "+Inf"]

    def _family(self) -> Metric:
        return HistogramMetricFamily(self._name, self._about, labels=self._labels)

    def _add(self, family: HistogramMetricFamily, labels: list[str], one: _Spread) -> None:
        buckets = list(zip(self._upto, itertools.accumulate(map(float, one.counts)), strict=True))
        family.add_metric(labels, buckets, one.sum)


class Metrics:
    """Every number of one gateway process. Each method is one cheap call; durations are seconds."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._pulled: dict[str, Gauge] = {}
        self._requests = self._counter("requests_total", "Answered requests.", "operation", "model", "status")
        self._request_s = self._histogram(
            "request_seconds", "From a request's first byte to its answer's last.", _REQUEST_S, "operation", "model"
        )
        self._overhead_s = self._histogram(
            "overhead_seconds", "The gateway's own share of the time before a request is with its backend.", _OVERHEAD_S
        )
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds",
            "From a streamed request to the first piece of text.",
            _FIRST_TOKEN_S,
            "model",
        )
        self._inter_token_s = self._histogram(
            "inter_token_latency_seconds", "Between pieces of a stream.", _INTER_TOKEN_S, "model"
        )
        self._tokens = self._counter(
            "tokens_total",
            "Tokens, read (input) and written (output), by where the answer came from.",
            "model",
            "direction",
            "source",
        )
        self._aborted = self._counter("aborted_total", "Requests whose client left before the answer's end.", "model")
        self._limited = self._counter("limited_total", "Requests refused by a limit or a budget.", "limit")
        self._degraded = self._gauge("degraded", "1 while limits are this replica's own, because the store is away.")
        self._degraded_requests = self._counter(
            "degraded_requests_total", "Requests admitted by this replica's own share of the limits."
        )
        self._cache = self._counter("cache_total", "Cache look-ups and stores.", "result")
        self._healthy = self._gauge(
            "backend_healthy", "1 if a backend gets requests, 0 if checks failed or it is ejected.", "backend"
        )
        self._backend_requests = self._counter("backend_requests_total", "Attempts at a backend.", "backend", "outcome")
        self._backend_s = self._histogram(
            "backend_seconds", "From an attempt to the head of the backend's answer.", _REQUEST_S, "backend"
        )
        self._backend_in_flight = self._gauge("backend_in_flight", "Attempts under way at a backend.", "backend")
        self._ejections = self._counter(
            "backend_ejections_total", "Times a backend was taken out because requests failed.", "backend"
        )
        self._retries = self._counter("retries_total", "Attempts after the first.", "model")
        self._shadow = self._counter(
            "shadow_total", "Copies of requests sent to a shadow backend.", "backend", "outcome"
        )
        self._findings = self._counter("filter_findings_total", "What filters found.", "filter", "action")
        self._filter_errors = self._counter(
            "filter_errors_total", "Filters that could not decide (a webhook that is away).", "filter"
        )
        self._auth_failures = self._counter("auth_failures_total", "Refused credentials.", "reason")
        self._policy_info = self._gauge("policy_info", "1 for the version of the policy in force.", "version")
        self._policy_loaded = self._gauge("policy_loaded_timestamp_seconds", "When the policy in force was loaded.")
        self._policy_reloads = self._counter("policy_reloads_total", "Policies taken over while running.")
        self._policy_failures = self._counter(
            "policy_reload_failures_total", "Policies refused; the old one stayed in force."
        )
        self._store_available = self._gauge("store_available", "1 while Redis answers.")
        self._audit_records = self._counter("audit_records_total", "Audit records written.", "kind")
        self._audit_failures = self._counter("audit_failures_total", "Audit records that could not be written.")
        self._settlements_dropped = self._counter(
            "settlements_dropped_total", "Usage lost, because the store was away for too long."
        )
        ProcessCollector(registry=self._registry)
        self._now_in_flight = 0
        self.pull("in_flight", "Requests under way.", lambda: self._now_in_flight)

    # -- requests ----------------------------------------------------------------------------------

    def request(self, operation: str, model: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests[(operation, model, status)].inc()
        self._request_s[(operation, model)].observe(seconds)

    def overhead(self, seconds: float) -> None:
        """What passed between a request's arrival and its start at the backend."""
        self._overhead_s[()].observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """The time to a stream's first piece of text."""
        self._first_token_s[(model,)].observe(seconds)

    def inter_token(self, model: str, seconds: float, times: int = 1) -> None:
        """The time between two pieces of a stream; `times`: so many gaps of that length."""
        child = self._inter_token_s[(model,)]
        for _ in range(times):
            child.observe(seconds)

    def tokens(self, model: str, inp: int, out: int, source: Literal["backend", "cache"] = "backend") -> None:
        """Count a request's tokens."""
        if inp:
            self._tokens[(model, "input", source)].inc(inp)
        if out:
            self._tokens[(model, "output", source)].inc(out)

    def entered(self) -> None:
        """A request begins."""
        self._now_in_flight += 1

    def left(self) -> None:
        """A request ends, however it ends."""
        self._now_in_flight -= 1

    def in_flight(self) -> int:
        """Requests under way."""
        return self._now_in_flight

    def aborted(self, model: str) -> None:
        """The client left before the answer's end."""
        self._aborted[(model,)].inc()

    # -- limits, cache, filters, credentials -------------------------------------------------------

    def limited(self, limit: str) -> None:
        """A request was refused; `limit` is the limit's kind (`key.requests`), without the subject's name."""
        self._limited[(limit,)].inc()

    def degraded(self, on: bool) -> None:
        """Limits are (or are no longer) this replica's own."""
        self._degraded[()].set(on)

    def degraded_request(self) -> None:
        """A request was admitted while degraded."""
        self._degraded_requests[()].inc()

    def cache(self, result: str) -> None:
        """`hit`, `shared` (an equal request's answer), `semantic`, `miss`, `bypass`, `stored`, `refused` or `error`."""
        self._cache[(result,)].inc()

    def finding(self, name: str, action: str) -> None:
        """The filter `name` found something and did `action`."""
        self._findings[(name, action)].inc()

    def filter_error(self, name: str) -> None:
        """The filter `name` could not decide (`Runtime.filter_failed` tells)."""
        self._filter_errors[(name,)].inc()

    def auth_failure(self, reason: str) -> None:
        """A credential was refused; `reason` is an error code."""
        self._auth_failures[(reason,)].inc()

    # -- backends ----------------------------------------------------------------------------------

    def backend(self, name: str, outcome: str, seconds: float) -> None:
        """An attempt at a backend, and the time to the head of its answer.

        `outcome` is `ok`, `client_error`, `error`, `timeout`, `connect`, `garbage`, `limited` ...
        """
        self._backend_requests[(name, outcome)].inc()
        self._backend_s[(name,)].observe(seconds)

    def backend_entered(self, name: str) -> None:
        """An attempt begins."""
        self._backend_in_flight[(name,)].inc(1)

    def backend_left(self, name: str) -> None:
        """An attempt ends."""
        self._backend_in_flight[(name,)].inc(-1)

    def healthy(self, name: str, value: bool) -> None:
        """A backend gets requests, or does not."""
        self._healthy[(name,)].set(int(value))

    def ejected(self, name: str) -> None:
        """Failed requests took a backend out."""
        self._ejections[(name,)].inc()

    def retry(self, model: str) -> None:
        """One more attempt."""
        self._retries[(model,)].inc()

    def shadow(self, name: str, outcome: str) -> None:
        """A copy went to the backend `name`; `outcome` as in `backend`, or `skipped` when too many are under way."""
        self._shadow[(name, outcome)].inc()

    def keep_backends(self, names: Collection[str]) -> None:
        """Take the health of backends that the policy no longer names off the page; their counters stay."""
        for family in (self._healthy, self._backend_in_flight):
            for key in [key for key in family.series() if key[0] not in names]:
                family.forget(key)

    # -- policy, store, audit ----------------------------------------------------------------------

    def policy(self, version: str) -> None:
        """A policy is in force; after the first one it counts as a reload."""
        if self._policy_info.series():
            self._policy_reloads[()].inc()
        for key in self._policy_info.series():
            self._policy_info.forget(key)
        self._policy_info[(version,)].set(1)
        self._policy_loaded[()].set(time.time())

    def policy_failure(self) -> None:
        """A policy was refused."""
        self._policy_failures[()].inc()

    def store_available(self, value: bool) -> None:
        """Redis answers, or does not."""
        self._store_available[()].set(int(value))

    def audit_record(self, kind: str) -> None:
        """A record of the kind `request`, `admin`, ... was written."""
        self._audit_records[(kind,)].inc()

    def audit_failure(self) -> None:
        """A record could not be written."""
        self._audit_failures[()].inc()

    def settlements_dropped(self, number: int = 1) -> None:
        """Usage was lost."""
        self._settlements_dropped[()].inc(number)

    # -- the page ----------------------------------------------------------------------------------

    def pull(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Show a number that another part keeps; `read` is called for every page. A name already shown is replaced."""
        if name not in self._pulled:
            self._pulled[name] = Gauge(PREFIX + name, about, registry=self._registry)
        self._pulled[name].set_function(read)

    def render(self) -> bytes:
        """The page, as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> _Counter:
        return self._known(_Counter(name, about, labels, _Number))

    def _gauge(self, name: str, about: str, *labels: str) -> _Gauge:
        return self._known(_Gauge(name, about, labels, _Number))

    def _histogram(self, name: str, about: str, borders: tuple[float, ...], *labels: str) -> _Histogram:
        return self._known(_Histogram(name, about, labels, borders))

    def _known(self, family: Family) -> Family:
        self._registry.register(family)
        return family
