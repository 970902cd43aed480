"""Prometheus on the local platform: everything is scraped, samples are whole, and what somebody edits is drift."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from .conftest import NAMESPACE, Kubectl, Runner, ask, wait_until

#: Every job, and how many targets of it there are at least.
JOBS = {
    "kubelet": 1,
    "cadvisor": 1,
    "apiserver": 1,
    # Ray's own series, its autoscaler's, its dashboard's.
    "monitoring/rayplane-ray-head": 3,
    "monitoring/rayplane-ray-workers": 1,
    "monitoring/rayplane-kuberay": 1,
    "monitoring/rayplane-gateway": 1,
    "monitoring/rayplane-coredns": 1,
    "monitoring/rayplane-node-exporter": 1,
    "monitoring/rayplane-prometheus": 2,
    "monitoring/rayplane-prometheus-operator": 1,
}
Query = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def prometheus(deployed: Path, kubectl: Kubectl) -> Callable[..., Any]:
    """Ask Prometheus' API, through the API server's proxy."""
    service = "/api/v1/namespaces/monitoring/services/prometheus-operated:web/proxy/api/v1"

    def ask_it(path: str, **parameters: str) -> Any:
        answer = json.loads(kubectl("get", "--raw", f"{service}/{path}?{urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    return ask_it


@pytest.fixture(scope="module")
def query(prometheus: Callable[..., Any]) -> Query:
    """The samples that an expression gives now."""

    def samples(expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = prometheus("query", query=expression)["result"]
        return found

    return samples


def value(samples: list[dict[str, Any]]) -> float:
    """The value of the only sample; 0 where there is none."""
    assert len(samples) < 2, samples
    return float(samples[0]["value"][1]) if samples else 0.0


def test_every_target_is_up(prometheus: Callable[..., Any]) -> None:
    def not_up() -> str:
        targets = prometheus("targets", state="active")["activeTargets"]
        found = {job: [one["health"] for one in targets if one["scrapePool"].startswith(f"podMonitor/{job}/")
                       or one["scrapePool"] == job] for job in JOBS}  # fmt: skip
        few = [f"{job} has {len(health)} targets" for job, health in found.items() if len(health) < JOBS[job]]
        return "; ".join(few + [f"{one['scrapeUrl']}: {one['lastError']}" for one in targets if one["health"] != "up"])

    wait_until("everything is scraped", not_up, 240, pause=2)


def test_no_sample_is_refused(query: Query) -> None:
    """Two series of one target with the same labels would lose one of them at every scrape, in silence."""
    names = ("duplicate_timestamp", "out_of_order", "out_of_bounds")
    for name in names:
        assert value(query(f"sum(increase(prometheus_target_scrapes_sample_{name}_total[10m]))")) == 0, name
    assert value(query("sum(increase(prometheus_target_scrapes_exceeded_sample_limit_total[10m]))")) == 0


def told(text: str, name: str) -> float:
    """The sum of a family's samples in what a target answers."""
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def test_requests_and_tokens_are_counted_to_the_last(query: Query, kubectl: Kubectl) -> None:
    """What a client has asked stands in Prometheus: at the gateway, at Serve, and at the engine."""
    worker = kubectl(
        "get", "pods", "-n", NAMESPACE, "-l", "ray.io/node-type=worker", "-o", "jsonpath={.items[0].metadata.name}"
    )
    sources = {
        "rayplane_gateway_requests_total": "gateway-0:9090",
        "ray_vllm_request_generation_tokens_count": f"{worker}:8080",
    }

    def by_themselves() -> dict[str, float]:
        pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
        return {
            name: told(kubectl("get", "--raw", f"{pods}/{pod}/proxy/metrics"), name) for name, pod in sources.items()
        }

    before = by_themselves()
    for _ in range(5):
        assert "Paris" in ask()

    def not_counted() -> str:
        there, here = by_themselves(), {name: value(query(f"sum({name})")) for name in sources}
        # Ray exports its counters every ten seconds, the gateway tells its own at once.
        counted = all(there[name] >= before[name] + 5 for name in sources) and there == here
        return "" if counted else f"{before} became {there}, and {here} in Prometheus"

    wait_until("five requests are counted", not_counted, 240, pause=2)
    assert by_themselves()["rayplane_gateway_requests_total"] == before["rayplane_gateway_requests_total"] + 5
    assert query('ray_serve_num_http_requests_total{route="/-/healthz"}') == []
    (cluster,) = {one["metric"]["ray_io_cluster"] for one in query("ray_vllm_generation_tokens_total")}
    assert cluster.startswith("rayplane")
    assert query('{__name__=~"ray_(serve|vllm)_.*", WorkerId!=""}') == []
    assert value(query('kuberay_service_condition_ready{name="rayplane", condition="true"}')) == 1


def test_an_edited_monitor_is_drift_and_is_repaired(
    deployed: Path, make: Runner, kubectl: Kubectl, tmp_path: Path
) -> None:
    patch = [{"op": "replace", "path": "/spec/podMetricsEndpoints/0/interval", "value": "5m"}]
    kubectl("patch", "podmonitor", "rayplane-gateway", "-n", "monitoring", "--type=json", "-p", json.dumps(patch))
    assert make("drift", f"-e drift_dir={tmp_path} --tags monitoring").returncode == 2
    rows = json.loads((tmp_path / "drift.json").read_text())["clusters"]["local"]["drift"]
    assert [row["stage"] for row in rows] == ["monitoring"]
    assert "rayplane-gateway" in json.dumps(rows)
    repair = make("deploy", "--tags monitoring").expect_success()
    assert all(name.startswith("monitoring") for name in repair.changed_tasks())
    assert "5m" not in kubectl("get", "podmonitor", "rayplane-gateway", "-n", "monitoring", "-o", "yaml")
