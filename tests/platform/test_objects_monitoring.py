"""monitoring on a real API server: what production declares is accepted, and a Prometheus that is there is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rayplane_local import parts
from rayplane_local.progress import Step
from rayplane_local.settings import Settings

from .conftest import HOME, Kubectl, Runner, kubectl_on

PLAY = """
- hosts: clusters
  gather_facts: false
  roles: [platform]
  tasks: [{ansible.builtin.include_role: {name: monitoring, tasks_from: "{{ test_entry }}"}}]
"""
#: What the operator's own CRDs have to accept.
PRODUCTION = {
    "monitoring_prometheus_volume": {"size": "50Gi", "class": "gp3"},
    "monitoring_prometheus_replicas": 2,
    "monitoring_retention_size": "40GB",
    "monitoring_external_labels": {"cluster": "ray-llm-cluster-prod", "environment": "prod"},
    "monitoring_remote_write": [
        {"url": "https://aps-workspaces.us-west-2.amazonaws.com/workspaces/ws-1/api/v1/remote_write",
         "sigv4": {"region": "us-west-2"}},
    ],
    "monitoring_service_account_annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/r"},
    "monitoring_node_selector": {"rayplane.io/pool": "cpu"},
    "monitoring_tolerations": [{"key": "dedicated", "operator": "Equal", "value": "system", "effect": "NoSchedule"}],
}  # fmt: skip


@pytest.fixture
def kubectl(api: Path) -> Kubectl:
    """Call kubectl on the API server without a node, which has the operator's CRDs."""
    call, settings, operator = kubectl_on(api), Settings(home=HOME), parts.part("prometheus-operator")
    if parts.folder(settings, operator) is None:
        step = Step("build")
        parts.build(settings, operator, parts.ensure_go(settings, step), step)
    parts.link_sources(settings, [operator])
    call("apply", "--server-side", "-k", str(HOME / "sources/prometheus-operator"))
    call("wait", "--for=condition=Established", "--timeout=60s", "crd/podmonitors.monitoring.coreos.com")
    return call


@pytest.fixture
def role(run: Runner, api: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the role with variables."""
    play = tmp_path / "play.yml"

    def _role(*options: str, tasks: str = "main", **variables: Any) -> Any:
        play.write_text(PLAY)
        values = json.dumps({**variables, "test_entry": tasks})
        command = ["ansible-playbook", str(play), "-i", "inventories/local", "-e", values, *options]
        return run(*command, env={"K8S_AUTH_KUBECONFIG": str(api)})

    return _role


def test_production_is_accepted(role: Callable[..., Any], kubectl: Kubectl) -> None:
    refused = role("--check")
    assert refused.returncode != 0 and "Set monitoring_stack to 'existing' to use that operator" in refused.output
    accepted = role("--check", monitoring_adopt=True, **PRODUCTION).expect_success()
    for name in ("Prometheus monitoring/rayplane", "PodMonitor monitoring/rayplane-gateway", "DaemonSet monitoring/"):
        assert f"created {name}" in accepted.output


def test_a_prometheus_that_is_there_is_found(role: Callable[..., Any], kubectl: Kubectl, tmp_path: Path) -> None:
    missing = role(monitoring_stack="existing")
    assert missing.returncode != 0 and "no object of the kind Prometheus" in missing.output
    kubectl("create", "namespace", "theirs")
    theirs = tmp_path / "theirs.json"
    selector = {"matchLabels": {"release": "kps"}}
    theirs.write_text(
        json.dumps(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "Prometheus",
                "metadata": {"name": "kps", "namespace": "theirs"},
                "spec": {"podMonitorSelector": selector},
            }
        )
    )
    kubectl("apply", "-f", str(theirs))
    assert role(monitoring_stack="existing").expect_success().changed == 1
    names = kubectl("-n", "theirs", "get", "podmonitors", "-l", "release=kps", "-o", "name").split()
    assert [name.rpartition("/")[2] for name in names] == [
        "rayplane-dcgm-exporter",
        "rayplane-gateway",
        "rayplane-kuberay",
        "rayplane-nvidia-dcgm-exporter",
        "rayplane-ray-head",
        "rayplane-ray-workers",
    ]
    assert role(monitoring_stack="existing").expect_success().changed == 0
    assert role(tasks="destroy", monitoring_stack="existing").expect_success().changed == 1
    assert kubectl("-n", "theirs", "get", "podmonitors", "-o", "name") == ""
    assert "/kps" in kubectl("-n", "theirs", "get", "prometheuses", "-o", "name")
