"""Preflight's rules over autoscaler, accelerators and keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.nodes import (
    accelerators,
    autoscaler,
    encryption,
    node_tools,
    storage,
    volumes,
)

PROJECT = Path(__file__).resolve().parents[2]


def _read(path: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((PROJECT / "roles" / path).read_text(encoding="utf-8"))
    return read


GPU = _read("gpu_plugin/defaults/main.yml")


def test_the_defaults_are_sound() -> None:
    assert list(accelerators({**GPU, "platform": "aws"})) == []
    eks, scaler = _read("eks/defaults/main.yml"), _read("autoscaler/defaults/main.yml")
    for kind in ("cluster_autoscaler", "karpenter"):
        assert list(autoscaler({**eks, **scaler, "platform": "aws", "platform_autoscaler": kind})) == []
    assert eks["eks_kubernetes_version"] in _read("cost/files/prices-aws.yml")["eks_standard_support_until"]


def test_what_the_gpu_filter_refuses_is_found_before_anything_is_changed() -> None:
    wrong = {"gpu_plugin_time_slicing_replicas": {"nvidia.com/gpu": 1}, "gpu_plugin_mig_configs": {"half": []}}
    found = list(accelerators({**GPU, **wrong}))
    assert {problem.variable for problem in found} == set(wrong)
    assert found[0].value == {"nvidia.com/gpu": 1}
    assert found[0].cure == "Leave the resource out where it is not shared"
    assert list(accelerators({**GPU, **wrong, "gpu_plugin_enabled": False})) == []


def test_wrong_types_are_left_to_the_specs() -> None:
    assert list(accelerators({**GPU, "gpu_plugin_dcgm_metrics": "all"})) == []


@pytest.mark.parametrize(
    ("image", "settings", "path"),
    [
        ("AL2023_x86_64_NEURON", {}, "eks_node_groups[0].ami_type"),
        ("AL2023_x86_64_NEURON", {"gpu_plugin_neuron_enabled": True}, ""),
        ("BOTTLEROCKET_x86_64_NVIDIA", {"gpu_plugin_mode": "gpu_operator"}, "eks_node_groups[0].labels"),
        ("BOTTLEROCKET_x86_64_NVIDIA", {}, ""),
    ],
)
def test_images_and_plugins_fit(image: str, settings: dict[str, Any], path: str) -> None:
    groups = {"platform": "aws", "eks_node_groups": [{"name": "g", "ami_type": image}]}
    assert [problem.variable for problem in accelerators({**GPU, **groups, **settings})] == ([path] if path else [])


def test_karpenter() -> None:
    values = {
        "platform": "aws",
        "platform_autoscaler": "karpenter",
        "platform_cluster_name": "c" * 40,
        "autoscaler_node_pools": [{"name": "A", "weight": 1000}],
        "autoscaler_node_classes": [{"name": "default", "ami_alias": "al2023@latest"}],
        "eks_node_groups": [{"name": "gpu", "ami_type": "AL2023_x86_64_NVIDIA", "max_size": 3}],
    }
    found = list(autoscaler(values))
    assert [problem.variable for problem in found if not problem.warning] == [
        "platform_cluster_name",
        "autoscaler_node_classes[0]",
        "autoscaler_node_pools[0]",
        "autoscaler_node_pools[0]",
    ]
    assert found[1].value == {"name": "default", "ami_alias": "al2023@latest"}
    assert [problem.variable for problem in found if problem.warning] == ["eks_node_groups[0].name"]
    assert list(autoscaler({**values, "platform_autoscaler": "none"})) == []


def test_the_autoscaler_is_of_the_clusters_version() -> None:
    values = {"platform": "aws", "platform_autoscaler": "cluster_autoscaler", "eks_kubernetes_version": "1.34"}
    assert list(autoscaler({**values, "autoscaler_version": "v1.34.1"})) == []
    (problem,) = autoscaler({**values, "autoscaler_version": "v1.33.0"})
    assert problem.warning
    assert problem.cure == "take a release v1.34.x"


def test_keys_are_named_by_their_arn() -> None:
    good = "arn:aws:kms:us-west-2:111122223333:key/0a1b2c3d-0000-1111-2222-333344445555"
    assert list(encryption({"platform": "aws", "platform_kms_key_arn": good})) == []
    assert list(encryption({"platform": "aws", "platform_kms_key_arn": ""})) == []
    (problem,) = encryption({"platform": "aws", "platform_kms_key_arn": "alias/mine"})
    assert problem.variable == "platform_kms_key_arn"


def test_a_key_to_be_made() -> None:
    made = {"platform": "aws", "encryption_enabled": True, "encryption_pending_days": 3}
    (problem,) = encryption(made)
    assert (problem.variable, problem.cure) == ("encryption_pending_days", "write 7")
    given = {**made, "encryption_pending_days": 7, "platform_kms_key_arn": "arn:aws:kms:us-west-2:111122223333:key/1"}
    (problem,) = encryption(given)
    assert problem.warning


STORAGE: dict[str, Any] = {
    **yaml.safe_load((PROJECT / "roles/storage/defaults/main.yml").read_text(encoding="utf-8")),
    **yaml.safe_load((PROJECT / "roles/storage_class/defaults/main.yml").read_text(encoding="utf-8")),
    "platform": "aws",
    "platform_region": "us-west-2",
    "platform_logs_bucket": "logs",
    "storage_kms_key_id": "",
    "storage_buckets": [{"name": "models", "lifecycle": [], "replicate": True}],
}


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({}, ""),
        ({"storage_replica_region": "us-west-2"}, "storage_replica_region"),
        ({"storage_replica_region": "eu-west-1"}, ""),
        ({"storage_replica_region": "eu-west-1", "storage_versioning": False}, "storage_buckets[0]"),
        ({"storage_replica_region": "eu-west-1", "encryption_enabled": True}, "storage_buckets[0]"),
        ({"storage_buckets": [{"name": "m", "lifecycle": [{"name": "x"}]}]}, "storage_buckets[0]"),
        ({"storage_buckets": "models"}, ""),
        ({"storage_class_efs_enabled": True}, "storage_class_efs_enabled"),
        (
            {"storage_class_efs_enabled": True, "storage_efs_enabled": True, "storage_class_efs_file_system": "x"},
            "storage_class_efs_file_system",
        ),
    ],
)
def test_buckets_and_volumes_are_possible(changes: dict[str, Any], variable: str) -> None:
    assert [problem.variable for problem in storage({**STORAGE, **changes})] == ([variable] if variable else [])


@pytest.mark.parametrize(
    ("disk", "key", "said"),
    [
        ({}, "", ""),
        ({"size": 1, "iops": 3000, "throughput": 750}, "", ""),
        ({"size": 160, "iops": 80000, "throughput": 2000}, "", ""),
        ({"iops": 100}, "iops", "has 3000 to 80000.*write 3000, or 0 for 3000"),
        ({"iops": 80001}, "iops", "write 80000"),
        ({"throughput": 100}, "throughput", "has 125 to 2000.*write 125"),
        ({"throughput": 800}, "throughput", r"3000 / 4 = 750.*give it 3200 IOPS, or write 750"),
        ({"size": 20, "iops": 16000}, "iops", r"20 GiB x 500 = 10000.*write 10000, or give the volume 32 GiB"),
        ({"iops": "many"}, "", ""),
    ],
)
@pytest.mark.parametrize("name", ["eks_node_groups", "eks_extra_node_groups", "autoscaler_node_classes"])
def test_disks_are_such_as_gp3_has(name: str, disk: dict[str, Any], key: str, said: str) -> None:
    values = {"platform": "aws", "platform_autoscaler": "karpenter"}
    entry = {f"disk_{option}": value for option, value in disk.items()}
    found = list(volumes({**values, name: [{"name": "a", **entry}]}))
    assert [problem.variable for problem in found] == ([f"{name}[0].disk_{key}"] if key else [])
    assert all(re.search(said, f"{problem.reason}: {problem.cure}") for problem in found)


def test_the_class_of_volumes_is_such_as_gp3_has() -> None:
    values = {"storage_class_enabled": True, "storage_class_iops": 4000, "storage_class_throughput": 2000}
    (problem,) = volumes(values)
    assert (problem.variable, problem.value) == ("storage_class_throughput", 2000)
    assert list(volumes({**values, "storage_class_iops": 8000})) == []


def test_helm_is_wanted_only_where_charts_are() -> None:
    helm = {"autoscaler_helm": "helm", "gpu_plugin_helm": "helm"}
    assert node_tools({**GPU, **helm}) == {}
    assert list(node_tools({**helm, "platform_autoscaler": "karpenter"})) == ["helm"]
    assert list(node_tools({**GPU, **helm, "gpu_plugin_mode": "gpu_operator"})) == ["helm"]
    assert list(node_tools({"load_balancer_controller_enabled": True, "load_balancer_controller_helm": "h"})) == ["h"]
