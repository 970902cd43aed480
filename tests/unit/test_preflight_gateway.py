"""Preflight's rules of the gateway: the configuration that would be deployed is read as the gateway reads it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.gateway import gateway
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from conftest import PROJECT

DEFAULTS = yaml.safe_load((PROJECT / "roles/gateway/defaults/main.yml").read_text(encoding="utf-8"))
KEY = {"id": "a", "prefix": "abcdefghij12", "hash": "sha256:" + "0" * 64, "role": "basic"}


def found(**changes: Any) -> dict[str, Problem]:
    """Problems of the role's defaults with some changed, by variable; the defaults' own warnings are left out."""
    values = {
        **copy.deepcopy(DEFAULTS),
        "gateway_models": [{"id": "llama", "source": "a/b"}, {"id": "qwen", "source": "a/c"}],
        "gateway_namespace": "rayplane",
        "gateway_serve_url": "http://rayplane-serve-svc.rayplane.svc:8000",
        "gateway_keys_file": "",
        "gateway_audit_volume": {"size": "1Gi", "access_mode": "ReadWriteMany"},
        "rayservice_service_type": "ClusterIP",
        **changes,
    }
    return {problem.variable: problem for problem in gateway(values)}


def test_good_values_have_no_problem() -> None:
    assert found() == {}
    assert list(gateway({})) == []
    assert found(gateway_enabled=False, gateway_backends={"qwen": {}}) == {}


@pytest.mark.parametrize(
    ("changes", "variable", "reason"),
    [
        ({"gateway_node_port": 80}, "gateway_node_port", "30000 to 32767"),
        (
            {"gateway_node_port": 30080, "rayservice_node_port": 30080, "rayservice_service_type": "NodePort"},
            "gateway_node_port",
            "a port is one Service's",
        ),
        ({"gateway_replicas": {"min": 3, "max": 2}}, "gateway_replicas.max", "below min"),
        (
            {"gateway_backends": {"far": {"url": "https://x", "headers": {"Authorization": "Bearer x"}}}},
            "gateway_backends.far.headers.Authorization",
            "lie in a ConfigMap",
        ),
        ({"gateway_redis": "redis://:word@x:6379/0"}, "gateway_redis", "a password stands in the address"),
        (
            {
                "gateway_keys": [
                    {**KEY, "id": f"k{number}", "prefix": f"a{number:011d}", "client": "x" * 30_000}
                    for number in range(1500)
                ]
            },
            "gateway_keys_file",
            "fit into 32",
        ),
        ({"gateway_server": {"trusted_proxies": []}}, "gateway_server.trusted_proxies", "no such setting"),
        ({"gateway_routes": {"x": {}}}, "gateway_routes.x", "no model of rayservice_models has this id"),
        ({"gateway_roles": {"basic": {"max_token": 5}}}, "gateway_roles.basic.max_token", "no such setting"),
        ({"gateway_store": {"timeout_ms": "soon"}}, "gateway_store.timeout_ms", "expected `int`"),
        ({"gateway_backend_defaults": {"timeouts": {"total_s": -1}}}, "gateway_backend_defaults.timeouts.total_s", "0"),
        ({"gateway_keys": [KEY, {**KEY, "id": "b", "prefix": "short"}]}, "gateway_keys[1].prefix", "12 letters"),
        ({"gateway_keys": [{**KEY, "role": "gold"}]}, "gateway_keys[0].role", "no such role"),
        ({"gateway_issuers": [{"issuer": "x"}]}, "gateway_issuers[0].audience", ""),
        ({"gateway_cache": {"scope": "world"}}, "gateway_cache.scope", ""),
        ({"gateway_cors": {"origins": ["app.example.com"]}}, "gateway_cors.origins[0]", "no origin"),
    ],
)
def test_problems(changes: dict[str, Any], variable: str, reason: str) -> None:
    problems = found(**changes)
    assert variable in problems, problems
    assert reason in problems[variable].reason and problems[variable].cure
    assert not problems[variable].warning


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"gateway_audit_volume": {}}, "gateway_audit_volume"),
        ({"gateway_redis": ""}, "gateway_redis"),
        ({"gateway_env": {"FAR_KEY": "x"}}, "gateway_env.FAR_KEY"),
    ],
)
def test_warnings(changes: dict[str, Any], variable: str) -> None:
    problems = found(**changes)
    assert [(name, problem.warning) for name, problem in problems.items()] == [(variable, True)]


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteMany"])
def test_a_volume_is_good_for_any_number_of_pods(mode: str) -> None:
    volume = {"size": "1Gi", "access_mode": mode}
    assert found(gateway_audit_volume=volume, gateway_replicas={"min": 3, "max": 12}) == {}
    assert found(gateway_audit_volume={"size": "1Gi"}, gateway_replicas={"min": 1, "max": 2}) == {}


def test_values_are_shown_as_they_stand() -> None:
    assert found(gateway_store={"timeout_ms": "soon"})["gateway_store.timeout_ms"].value == "soon"
    assert found(gateway_routes={"x": {}})["gateway_routes.x"].value is ABSENT


def test_what_is_wrong_in_the_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text("[]")
    assert found(gateway_keys_file=str(file)).keys() == {"gateway_keys_file"}
    file.write_text('{"keys": [{"id": "b", "prefix": "abcdefghij12", "hash": "sha256:x", "role": "basic"}]}')
    assert found(gateway_keys_file=str(file)).keys() == {"gateway_keys_file.keys[0].hash"}
    # Behind those of the inventory.
    problems = found(gateway_keys_file=str(file), gateway_keys=[{**KEY, "prefix": "abcdefghij13"}])
    assert problems.keys() == {"gateway_keys_file.keys[0].hash"}


def test_values_of_a_wrong_type_are_the_specs_to_report() -> None:
    assert found(gateway_routes=[1]) == {}
    assert found(gateway_models="none") == {}


def test_without_its_packages_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "serve_app.gateway.policy", None)
    problems = found(gateway_roles={"basic": {"max_token": 5}})
    assert problems["gateway"].warning
