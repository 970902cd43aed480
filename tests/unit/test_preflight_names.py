"""Names: what is made of the cluster's, what belongs to Kubernetes, what Kubernetes takes as a label."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.names import derived_names, kubernetes_names
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from hypothesis import given
from hypothesis import strategies as st

ROLES = Path(__file__).parents[2] / "roles"
GOOD: dict[str, Any] = {
    "platform": "aws",
    "platform_cluster_name": "ray-llm-prod",
    "platform_namespace": "rayplane",
    "gateway_name": "gateway",
    "rayservice_name": "rayplane",
    "namespaces_list": ["rayplane"],
}


def found(**changes: Any) -> dict[str, Problem]:
    values = {**GOOD, **changes}
    return {problem.variable: problem for rule in (derived_names, kubernetes_names) for problem in rule(values)}


BALANCER = "service.beta.kubernetes.io/aws-load-balancer-name"


@pytest.mark.parametrize(
    ("changes", "variable", "reason", "cure"),
    [
        ({"platform_cluster_name": "a" * 51}, "platform_cluster_name", "would have 65 characters", "50 characters or"),
        (
            {"platform_cluster_name": "a" * 40, "eks_load_balancer_controller": True},
            "platform_cluster_name",
            "load-balancer-controller would have 65",
            "39 characters",
        ),
        (
            {"platform_cluster_name": "a" * 48, "eks_external_secrets": True},
            "platform_cluster_name",
            "-external-secrets",
            "47",
        ),
        ({"eks_node_groups": [{"name": "gpu nodes"}]}, "eks_node_groups[0].name", "letters, digits", "gpu-nodes"),
        ({"eks_extra_node_groups": [{"name": "g" * 64}]}, "eks_extra_node_groups[0].name", "1 to 63", "write ggg"),
        (
            {"platform_cluster_name": "a" * 70, "eks_node_groups": [{"name": "g" * 60}]},
            "eks_node_groups[0].name",
            "131 characters, of 128",
            "shorten",
        ),
        ({"eks_irsa": [{"name": "r" * 65}]}, "eks_irsa[0].name", "IAM takes 1 to 64", "write rrr"),
        ({"encryption_enabled": True, "encryption_alias": "aws/x y"}, "encryption_alias", "are its own", "write x-y"),
        (
            {"storage_efs_enabled": True, "storage_efs_file_systems": [{"name": "s" * 65}]},
            "storage_efs_file_systems[0].name",
            "has 65",
            "write sss",
        ),
        (
            {"gateway_service_annotations": {BALANCER: "a" * 33}},
            f"gateway_service_annotations.{BALANCER}",
            "32 letters",
            "write aaa",
        ),
        ({"platform_namespace": "kube-system"}, "platform_namespace", "belongs to Kubernetes", "write rayplane"),
        ({"gateway_namespace": "default"}, "gateway_namespace", "belongs to Kubernetes", "write rayplane"),
        ({"namespaces_list": ["rayplane", "kube-public"]}, "namespaces_list[1]", "belongs to", "write rayplane"),
        ({"kuberay_namespace": "default"}, "kuberay_namespace", "belongs to Kubernetes", "write kuberay-system"),
        ({"gpu_plugin_namespace": "kube-system"}, "gpu_plugin_namespace", "belongs to", "write gpu-system"),
        ({"gpu_plugin_namespace": "GPU"}, "gpu_plugin_namespace", "DNS label", "write gpu"),
        ({"autoscaler_namespace": "kube-public"}, "autoscaler_namespace", "belongs to", "write kube-system"),
        ({"namespaces_list": [{"name": "Team_A"}]}, "namespaces_list[0].name", "DNS label", "write team-a"),
        ({"gateway_name": "vllm"}, "gateway_name", "VLLM_", "write rayplane-vllm"),
        ({"rayservice_name": "vllm"}, "rayservice_name", "VLLM_", "write rayplane-vllm"),
        ({"gateway_name": "9gate"}, "gateway_name", "starts with a letter", "write r9gate"),
        ({"gateway_name": "g" * 47}, "gateway_name", "at most 46", "write ggg"),
        ({"rayservice_worker_groups": [{"name": "GPU_1"}]}, "rayservice_worker_groups[0].name", "DNS", "write gpu-1"),
        (
            {"eks_node_groups": [{"labels": {"node-role.kubernetes.io/gpu": ""}}]},
            "eks_node_groups[0].labels.node-role.kubernetes.io/gpu",
            "no node would join",
            "write rayplane.io/gpu",
        ),
        (
            {"autoscaler_node_pools": [{"labels": {"k8s.io/pool": "x"}}]},
            "autoscaler_node_pools[0].labels.k8s.io/pool",
            "belongs to",
            "rayplane.io/pool",
        ),
        (
            {"namespaces_list": [{"name": "a", "labels": {"kubernetes.io/metadata.name": "b"}}]},
            "namespaces_list[0].labels.kubernetes.io/metadata.name",
            "sets this label itself",
            "delete it",
        ),
        (
            {"eks_extra_node_groups": [{"taints": [{"key": "two words"}]}]},
            "eks_extra_node_groups[0].taints[0].key",
            "a taint's key",
            "choose another",
        ),
        (
            {"rayservice_node_selector": {"team": "two words"}},
            "rayservice_node_selector.team",
            "a label's value",
            "write two-words",
        ),
        ({"rayservice_head": {"node_selector": {"a b": "c"}}}, "rayservice_head.node_selector.a b", "key", "choose"),
    ],
)
def test_a_name_that_is_refused(changes: dict[str, Any], variable: str, reason: str, cure: str) -> None:
    problem = found(**changes)[variable]
    assert reason in problem.reason
    assert cure in problem.cure


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"platform_cluster_name": "a" * 50},
        {"platform": "existing", "platform_cluster_name": "a" * 80},
        {"rayservice_name": "ray"},
        {"eks_node_groups": [{"name": "gpu_1", "labels": {"node.kubernetes.io/pool": "gpu", "nvidia.com/gpu": "T4"}}]},
        {"rayservice_node_selector": {"kubernetes.io/arch": "amd64", "karpenter.sh/nodepool": "gpu"}},
        {"namespaces_list": [{"name": "a", "labels": {"pod-security.kubernetes.io/warn": "baseline"}}]},
        {"gateway_service_annotations": {BALANCER: "rayplane-prod"}},
        {
            name: yaml.safe_load((ROLES / f"{role}/defaults/main.yml").read_text(encoding="utf-8"))[name]
            for role in ("kuberay", "gpu_plugin", "autoscaler")
            for name in [f"{role}_namespace"]
        },
    ],
)
def test_a_name_that_is_taken(changes: dict[str, Any]) -> None:
    assert found(**changes) == {}


def test_every_role_of_the_cluster_fits_where_its_name_is_longest() -> None:
    """A role that is added with a longer end has to be known to the rule."""
    from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import names

    text = "\n".join(file.read_text(encoding="utf-8") for file in ROLES.glob("*/vars/main.yml"))
    ends = re.findall(r'role: "\{\{ platform_cluster_name \}\}(-[a-z-]+)"', text)
    always = max((end for end, when in names._ROLES.items() if when is None), key=len)
    assert ends
    assert [end for end in ends if len(end) > len(always) and end not in names._ROLES] == []


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "labels", "node_selector"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from([*GOOD, "eks_node_groups", "rayservice_head", "eks_irsa", "rayservice_node_selector"]), anything)
def test_any_value_is_met(name: str, value: Any) -> None:
    assert all(problem.cure for problem in found(**{name: value}).values())
