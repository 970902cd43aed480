"""What Prometheus' operator would refuse is found before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.monitoring import monitoring
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.rules import required_tools

GOOD: dict[str, Any] = {
    "monitoring_enabled": True,
    "monitoring_stack": "operator",
    "monitoring_prometheus_image": "quay.io/prometheus/prometheus:v3.15.1",
    "monitoring_retention": "15d",
    "monitoring_retention_size": "",
    "monitoring_scrape_interval": "15s",
    "monitoring_prometheus_volume": {"size": "50Gi"},
}


@pytest.mark.parametrize("values", [{}, {"monitoring_retention": "1d12h"}, {"monitoring_retention_size": "40GB"}])
def test_what_it_takes(values: dict[str, Any]) -> None:
    assert list(monitoring({**GOOD, **values})) == []


@pytest.mark.parametrize(
    ("variable", "value", "where", "cure"),
    [
        ("monitoring_prometheus_image", "a/prometheus:latest", "", "let it end in a version"),
        ("monitoring_prometheus_image", "a/prometheus@sha256:00", "", "let it end in a version"),
        ("monitoring_retention", "15 days", "", "write one such as"),
        ("monitoring_retention", "", "", "write one such as"),
        ("monitoring_scrape_interval", "15", "", "write one such as"),
        ("monitoring_retention_size", "40Gi", "", "write one such as 40GB"),
        ("monitoring_prometheus_volume", {"size": "50gb"}, ".size", "write 50Gi"),
    ],
)
def test_what_it_refuses(variable: str, value: Any, where: str, cure: str) -> None:
    (problem,) = monitoring({**GOOD, variable: value})
    assert problem.variable == variable + where
    assert problem.cure.startswith(cure)
    for other in ({"monitoring_stack": "existing"}, {"monitoring_enabled": False}):
        assert list(monitoring({**GOOD, variable: value, **other})) == []


def test_the_operator_takes_a_kubectl_and_git() -> None:
    source = {"monitoring_kubectl": "kubectl-1", "monitoring_kustomize_source": "https://example.com/x?ref=v1"}
    assert set(required_tools({**GOOD, **source})) == {"kubectl-1", "git"}
    assert required_tools({**GOOD, **source, "monitoring_stack": "existing"}) == {}
