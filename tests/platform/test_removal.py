"""`make destroy` removes what deploy made."""

from __future__ import annotations

from pathlib import Path

from .conftest import NAMESPACE, Kubectl, Runner, aws, our_vpcs


def test_destroy_removes_what_deploy_made(deployed: Path, make: Runner, kubectl: Kubectl) -> None:
    make("destroy").expect_success()
    assert our_vpcs() == []
    assert aws("eks").list_clusters()["clusters"] == []
    namespaces = kubectl("get", "namespaces", "--output", "name").split()
    assert {f"namespace/{NAMESPACE}", "namespace/monitoring"}.isdisjoint(namespaces)
    assert "monitoring.coreos.com" not in kubectl("get", "crds,clusterroles,clusterrolebindings", "--output", "name")
    names = [bucket["Name"] for bucket in aws("s3").list_buckets()["Buckets"]]
    assert any(name.startswith("ray-llm-cluster-local-models") for name in names)
    assert make("destroy").expect_success().changed == 0
