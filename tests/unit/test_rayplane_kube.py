"""Plain Kubernetes objects of the roles."""

from __future__ import annotations

import base64

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter.rayplane_kube import (
    apply_summary,
    namespace_objects,
    secret_objects,
)


def test_namespaces() -> None:
    objects = namespace_objects(
        ["plain", {"name": "tight", "pod_security": "restricted", "quota": {"pods": 3}, "limits": [{"type": "Pod"}]}],
        "baseline",
    )
    assert [item["kind"] for item in objects] == ["Namespace", "Namespace", "ResourceQuota", "LimitRange"]
    assert objects[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"
    assert objects[1]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert objects[2]["spec"] == {"hard": {"pods": "3"}}
    assert objects[3]["metadata"]["namespace"] == "tight"


def test_unknown_level_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="one of privileged, baseline, restricted"):
        namespace_objects([{"name": "a", "pod_security": "strict"}], "baseline")


def test_secrets() -> None:
    objects = secret_objects(
        [{"name": "a", "data": {"key": "wert ü"}}, {"name": "b", "namespace": "x", "data": {}}], "llm"
    )
    assert base64.b64decode(objects[0]["data"]["key"]).decode() == "wert ü"
    assert [item["metadata"]["namespace"] for item in objects] == ["llm", "x"]


def test_summary() -> None:
    result = {"created": ["Namespace a"], "aligned": ["RayCluster a/b"], "pruned": [], "unchanged": ["Secret a/c"]}
    assert apply_summary(result) == ["created Namespace a", "repaired RayCluster a/b"]
