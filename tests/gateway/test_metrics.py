"""The metrics page, read with the parser of Prometheus' own client."""

from __future__ import annotations

import math
import os
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.gateway import metrics
from serve_app.gateway.metrics import Metrics


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels; a name or series that is there twice is a mistake."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    names = set()
    for family in text_string_to_metric_families(page.decode()):
        assert family.name not in names, family.name
        names.add(family.name)
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics.render())["rayplane_gateway_" + name, tuple(sorted(labels.items()))]


def has(metrics: Metrics, name: str) -> bool:
    return any(key[0] == "rayplane_gateway_" + name for key in samples(metrics.render()))


def test_an_empty_page_is_valid_and_shows_what_has_no_labels() -> None:
    made = Metrics()
    assert value(made, "in_flight") == 0
    assert value(made, "settlements_dropped_total") == 0
    assert not has(made, "requests_total")


def test_requests_are_counted_by_operation_model_and_status() -> None:
    made = Metrics()
    made.request("chat", "m", 200, 0.3)
    made.request("chat", "m", 200, 3.0)
    made.request("chat", "m", 429, 0.001)
    made.request("chat", "", 404, 0.001)
    assert value(made, "requests_total", operation="chat", model="m", status="200") == 2
    assert value(made, "requests_total", operation="chat", model="m", status="429") == 1
    assert value(made, "requests_total", operation="chat", model="", status="404") == 1
    assert value(made, "request_seconds_count", operation="chat", model="m") == 3
    assert value(made, "request_seconds_sum", operation="chat", model="m") == pytest.approx(3.301)


def test_the_page_is_written_while_series_come_and_go() -> None:
    made = Metrics()
    ended = threading.Event()
    failed: list[BaseException] = []

    def render() -> None:
        while not ended.is_set():
            try:
                made.render()
            except BaseException as error:
                failed.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    try:
        for number in range(20_000):
            made.healthy(f"backend-{number % 2000}", True)
            if number % 50 == 0:
                made.keep_backends([f"backend-{one}" for one in range(number % 7 * 100)])
    finally:
        ended.set()
        thread.join()
    assert not failed


def test_buckets_are_cumulative_and_their_borders_inclusive() -> None:
    made = Metrics()
    for seconds in (0.001, 0.0010001, 0.05, 1e9):
        made.first_token("m", seconds)
    buckets = {
        float(dict(labels)["le"]): number
        for (name, labels), number in samples(made.render()).items()
        if name == "rayplane_gateway_time_to_first_token_seconds_bucket"
    }
    assert buckets[0.001] == 1
    assert buckets[0.005] == 2
    assert buckets[0.04] == 2
    assert buckets[0.06] == 3
    assert buckets[160.0] == 3
    assert buckets[math.inf] == 4
    assert list(buckets) == sorted(buckets)
    assert [buckets[border] for border in sorted(buckets)] == sorted(buckets.values())


def test_gaps_between_tokens_count_as_often_as_they_were() -> None:
    made = Metrics()
    made.inter_token("m", 0.02)
    made.inter_token("m", 0.03, 4)
    assert value(made, "inter_token_latency_seconds_count", model="m") == 5
    assert value(made, "inter_token_latency_seconds_sum", model="m") == pytest.approx(0.14)
    assert value(made, "inter_token_latency_seconds_bucket", model="m", le="0.025") == 1
    assert value(made, "inter_token_latency_seconds_bucket", model="m", le="0.05") == 5


def test_labels_are_escaped() -> None:
    made = Metrics()
    odd = 'a"b\\c\nd{}=,'
    made.retry(odd)
    assert value(made, "retries_total", model=odd) == 1


def test_tokens_by_direction_and_source() -> None:
    made = Metrics()
    made.tokens("m", 10, 0)
    made.tokens("m", 5, 7)
    made.tokens("m", 3, 4, "cache")
    assert value(made, "tokens_total", model="m", direction="input", source="backend") == 15
    assert value(made, "tokens_total", model="m", direction="output", source="backend") == 7
    assert value(made, "tokens_total", model="m", direction="output", source="cache") == 4


def test_requests_under_way_go_up_and_down() -> None:
    made = Metrics()
    made.entered()
    made.entered()
    assert made.in_flight() == 2
    made.left()
    assert value(made, "in_flight") == 1


def test_backends_that_the_policy_no_longer_names_leave_the_page() -> None:
    made = Metrics()
    for name in ("old", "new"):
        made.healthy(name, True)
        made.backend_entered(name)
        made.backend(name, "ok", 0.1)
    made.healthy("new", False)
    made.backend_left("new")
    made.keep_backends({"new"})
    assert value(made, "backend_healthy", backend="new") == 0
    assert value(made, "backend_in_flight", backend="new") == 0
    with pytest.raises(KeyError):
        value(made, "backend_healthy", backend="old")
    assert value(made, "backend_requests_total", backend="old", outcome="ok") == 1
    assert value(made, "backend_seconds_count", backend="old") == 1


def test_the_policy_in_force_is_the_only_one_shown() -> None:
    made = Metrics()
    made.policy("aaaa")
    assert value(made, "policy_reloads_total") == 0
    made.policy("bbbb")
    made.policy_failure()
    assert value(made, "policy_info", version="bbbb") == 1
    with pytest.raises(KeyError):
        value(made, "policy_info", version="aaaa")
    assert value(made, "policy_reloads_total") == 1
    assert value(made, "policy_reload_failures_total") == 1
    assert value(made, "policy_loaded_timestamp_seconds") > 1e9


def test_every_other_number_has_its_name() -> None:
    made = Metrics()
    made.overhead(0.0004)
    made.aborted("m")
    made.limited("key.requests")
    made.degraded(True)
    made.degraded_request()
    made.cache("hit")
    made.finding("pii", "redact")
    made.filter_error("hook")
    made.auth_failure("expired_api_key")
    made.ejected("b")
    made.shadow("b", "ok")
    made.store_available(True)
    made.audit_record("request")
    made.audit_failure()
    made.settlements_dropped(3)
    assert value(made, "overhead_seconds_bucket", le="0.0005") == 1
    assert value(made, "overhead_seconds_bucket", le="0.00025") == 0
    assert value(made, "aborted_total", model="m") == 1
    assert value(made, "limited_total", limit="key.requests") == 1
    assert value(made, "degraded") == 1
    assert value(made, "degraded_requests_total") == 1
    assert value(made, "cache_total", result="hit") == 1
    assert value(made, "filter_findings_total", filter="pii", action="redact") == 1
    assert value(made, "filter_errors_total", filter="hook") == 1
    assert value(made, "auth_failures_total", reason="expired_api_key") == 1
    assert value(made, "backend_ejections_total", backend="b") == 1
    assert value(made, "shadow_total", backend="b", outcome="ok") == 1
    assert value(made, "store_available") == 1
    assert value(made, "audit_records_total", kind="request") == 1
    assert value(made, "audit_failures_total") == 1
    assert value(made, "settlements_dropped_total") == 3
    made.degraded(False)
    made.store_available(False)
    assert value(made, "degraded") == 0
    assert value(made, "store_available") == 0


def test_numbers_that_another_part_keeps_are_asked_for_each_page() -> None:
    made = Metrics()
    held = {"now": 1.0}
    made.pull("open_streams", "Streams.", lambda: held["now"])
    assert value(made, "open_streams") == 1
    held["now"] = math.inf
    assert value(made, "open_streams") == math.inf
    held["now"] = math.nan
    assert math.isnan(value(made, "open_streams"))
    made.pull("open_streams", "Streams.", lambda: -math.inf)
    assert value(made, "open_streams") == -math.inf


def test_names_from_outside_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SERIES", 10)
    made = Metrics()
    for number in range(100):
        made.aborted(f"m{number}")
        made.first_token(f"m{number}", 0.1)
        made.healthy(f"b{number}", True)
    assert value(made, "aborted_total", model="m9") == 1
    assert value(made, "aborted_total", model="other") == 90
    assert value(made, "time_to_first_token_seconds_count", model="other") == 90
    assert value(made, "backend_healthy", backend="other") == 1
    assert made.render().count(b"rayplane_gateway_aborted_total{") == 11


def test_the_process_shows_its_own_numbers() -> None:
    page = samples(Metrics().render())
    assert page["process_resident_memory_bytes", ()] > 10e6
    assert page["process_virtual_memory_bytes", ()] > page["process_resident_memory_bytes", ()]
    assert page["process_cpu_seconds_total", ()] > 0
    assert page["process_start_time_seconds", ()] > 1e9
    with open(os.devnull, "rb"):  # noqa: PTH123
        assert samples(Metrics().render())["process_open_fds", ()] >= page["process_open_fds", ()]
