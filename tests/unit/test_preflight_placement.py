"""Preflight puts the Ray pods beside the nodes that may take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import machine, room
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.placement import placement

ROLES = Path(__file__).resolve().parents[2] / "roles"
DEFAULTS: dict[str, Any] = {
    **yaml.safe_load((ROLES / "rayservice/defaults/main.yml").read_text(encoding="utf-8")),
    "platform": "aws",
    "platform_autoscaler": "cluster_autoscaler",
    "rayservice_gpu_node_label": "",
}
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


def group(name: str, kind: str, most: int = 4, **more: Any) -> dict[str, Any]:
    gpu = {"taints": [TAINT]} if kind.startswith(("g", "p")) else {}
    return {
        "name": name,
        "instance_types": [kind],
        "max_size": most,
        "labels": {"rayplane.io/pool": name},
        **gpu,
        **more,
    }


def model(cpu: Any = 2, memory: str = "8Gi", gpu: int = 1, low: int = 1, high: int = 1, **more: Any) -> dict[str, Any]:
    resources = {"cpu": cpu, "memory": memory, "gpu": gpu, **more}
    return {"id": "m", "source": "a/b", "replicas": {"min": low, "max": high}, "resources": resources}


def found(*models: dict[str, Any], groups: list[dict[str, Any]] | None = None, **values: Any) -> dict[str, Any]:
    """The problems by variable."""
    nodes = groups or [group("cpu", "m5.2xlarge"), group("gpu", "g4dn.xlarge")]
    given = {**DEFAULTS, "eks_node_groups": nodes, "rayservice_models": list(models), **values}
    return {problem.variable: problem for problem in placement(given)}


@pytest.mark.parametrize(
    ("kind", "vcpus", "gib"),
    [
        ("m5.2xlarge", 8, 32),
        ("c7i.large", 2, 4),
        ("r6g.xlarge", 4, 32),
        ("t3.micro", 2, 1),
        ("t3.medium", 2, 4),
        ("t4g.large", 2, 8),
        ("m7i.metal-24xl", 96, 384),
        ("g4dn.xlarge", 4, 16),
        ("g5.12xlarge", 48, 192),
        ("g6e.xlarge", 4, 32),
        ("p3.2xlarge", 8, 61),
        ("p4d.24xlarge", 96, 1152),
        ("p5.48xlarge", 192, 2048),
        ("inf2.xlarge", 4, 16),
    ],
)
def test_machines_are_as_published(kind: str, vcpus: int, gib: float) -> None:
    made = machine(kind)
    assert made is not None
    assert (made.vcpus, made.memory / 2**30) == (vcpus, pytest.approx(gib))


def test_an_unknown_machine_is_not_guessed_at() -> None:
    assert machine("x2idn.16xlarge") is None
    assert machine("m5.metal") is None


def test_a_node_keeps_some_for_itself() -> None:
    """A g4dn.xlarge reports 3.92 CPUs and 14.7 GiB as allocatable, of which the daemons take a little."""
    made = machine("g4dn.xlarge")
    assert made is not None
    left = room(made)
    assert 3.5 < left.cpu < 3.92
    assert 13.5 < left.memory / 2**30 < 14.7


def test_a_pod_larger_than_its_node_is_refused_with_the_sum() -> None:
    problems = found(model(cpu=4, memory="16Gi"))
    assert set(problems) == {"rayservice_models[0].resources.cpu", "rayservice_models[0].resources.memory"}
    memory = problems["rayservice_models[0].resources.memory"]
    assert "asks for 16 GiB" in memory.reason
    assert "g4dn.xlarge in gpu, has 14.2 of its 16 left" in memory.reason
    assert memory.cure.startswith("write 14Gi or less")
    assert found(model(cpu=3.6, memory="14Gi")) == {}


def test_the_smallest_machine_of_a_group_counts() -> None:
    mixed = group("gpu", "g4dn.2xlarge") | {"instance_types": ["g4dn.2xlarge", "g4dn.xlarge"]}
    groups = [group("cpu", "m5.2xlarge"), mixed]
    assert "rayservice_models[0].resources.cpu" in found(model(cpu=6), groups=groups)


def test_head_and_cpu_group_are_placed_too() -> None:
    small = [group("cpu", "m5.large"), group("gpu", "g4dn.xlarge")]
    assert set(found(model(), groups=small)) == {"rayservice_cpu_group.cpu"}
    assert set(found(model(), rayservice_head={"cpu": 1, "memory": "40Gi"})) == {"rayservice_head.memory"}
    own = [{"name": "own", "cpu": 16, "memory": "8Gi", "min": 1, "max": 1}]
    assert set(found(model(), rayservice_worker_groups=own)) == {"rayservice_worker_groups[0].cpu"}


GATEWAY = yaml.safe_load((ROLES / "gateway/defaults/main.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("values", "variable", "reason"),
    [
        ({}, "", ""),
        ({"gateway_resources": {}, "gateway_redis_resources": {}}, "", ""),
        (
            {"gateway_resources": {"requests": {"cpu": "16", "memory": "1Gi"}}},
            "gateway_resources.requests.cpu",
            "a pod of the gateway asks for 16 CPUs, and the largest node that may take it, m5.2xlarge in cpu, has 7.68",
        ),
        ({"gateway_resources": {"limits": {"memory": "64Gi"}}}, "gateway_resources.limits.memory", "asks for 64 GiB"),
        (
            {"gateway_redis_cache_resources": {"requests": {"memory": "30Gi"}, "limits": {"memory": "40Gi"}}},
            "gateway_redis_cache_resources.requests.memory",
            "the pod of the gateway's two Redis servers asks for 30.12 GiB",
        ),
        ({"gateway_node_selector": {"team": "a"}}, "gateway_node_selector", "no node group bears the labels"),
        ({"gateway_redis": "redis://r", "gateway_redis_resources": {"requests": {"cpu": 90}}}, "", ""),
        ({"gateway_enabled": False, "gateway_resources": {"requests": {"cpu": 90}}}, "", ""),
    ],
)
def test_the_gateway_and_its_redis_are_placed_too(values: dict[str, Any], variable: str, reason: str) -> None:
    problems = found(model(), **{**GATEWAY, **values})
    assert list(problems) == ([variable] if variable else [])
    assert all(reason in problem.reason and not problem.warning for problem in problems.values())


def test_pods_without_a_gpu_do_not_run_beside_one() -> None:
    only_gpu = [group("gpu", "g4dn.12xlarge")]
    assert "rayservice_head.cpu" in found(model(), groups=only_gpu)


def test_bounds_and_upgrades_have_to_fit_beside_each_other() -> None:
    nodes = [group("cpu", "m5.2xlarge"), group("gpu", "g4dn.xlarge", most=1)]
    problems = found(model(high=20), groups=nodes)
    assert all(problem.warning for problem in problems.values())
    assert (
        "want 20 GPUs, and the node groups reach 1: gpu (1 x 1)" in problems["rayservice_models[0].replicas.max"].reason
    )
    assert problems["rayservice_upgrade_strategy"].cure.startswith("raise max_size of a node group by 1")
    assert found(model(), groups=nodes, rayservice_upgrade_strategy="None") == {}
    assert not found(model(low=2, high=2), groups=nodes)["rayservice_models[0].replicas.min"].warning


CPU, T4, L4 = group("cpu", "m5.2xlarge"), group("gpu", "g4dn.xlarge", most=2), group("l4", "g6.12xlarge", most=1)
SCALED = {"deployment": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 20}}}
OWN = {"name": "own", "gpu": 1, "cpu": 2, "memory": "8Gi", "min": 3, "max": 3}
TWO_SPELLINGS = (model(low=2, high=2, accelerator="T4"), {**model(accelerator="nvidia-tesla-t4"), "id": "n"})


@pytest.mark.parametrize(
    ("models", "values", "variable", "reason"),
    [
        ((model(cpu=5, gpu=0, low=9, high=9),), {}, "replicas.min", "want 61.2 CPUs"),
        ((model(cpu=5, gpu=0, low=2, high=30),), {}, "replicas.max", "reach 30.4: cpu (4 x 7.6)"),
        ((model(cpu=8, gpu=0),), {}, "resources.cpu", "asks for 9 CPUs"),
        (TWO_SPELLINGS, {}, "replicas.min", "want 3 GPUs, and the node groups reach 2: gpu (2 x 1)"),
        (({**model(), **SCALED},), {"eks_node_groups": [CPU, T4]}, "replicas.min", "want 3 GPUs"),
        (({**model(), "deployment": {"num_replicas": 3}},), {"eks_node_groups": [CPU, T4]}, "replicas.min", "3 GPUs"),
        (({**model(), "engine": {"pipeline_parallel_size": 3}},), {"eks_node_groups": [CPU, T4]}, "replicas.min", "3"),
        ((), {"rayservice_worker_groups": [OWN], "eks_node_groups": [CPU, T4]}, "groups[0].min", "want 3 GPUs"),
        ((model(cpu=30, accelerator="L4", low=2),), {"eks_node_groups": [CPU, L4]}, "replicas.min", "want 60 CPUs"),
        ((model(cpu=18, accelerator="L4", low=5),), {"eks_node_groups": [CPU, {**L4, "max_size": 2}]},
         "replicas.min", "l4 (2 x 2)"),
        ((model(low=2),), {"platform_autoscaler": "none", "eks_node_groups": [CPU, {**T4, "desired_size": 1}]},
         "replicas.min", "reach 1"),
        ((model(cpu=4),), {}, "resources.cpu", "it runs on g6.12xlarge in l4 alone"),
        ((model(),), {"rayservice_node_selector": {"team": "a"}}, "node_selector", "cpu: rayplane.io/pool=cpu"),
    ],
)  # fmt: skip
def test_pods_that_no_nodes_have_room_for_are_told(
    models: tuple[dict[str, Any], ...], values: dict[str, Any], variable: str, reason: str
) -> None:
    problems = found(*models, groups=[CPU, T4, L4], **values)
    said = [one.reason for name, one in problems.items() if name.endswith(variable)]
    assert said, problems
    assert reason in said[0]


@pytest.mark.parametrize(
    ("models", "values"),
    [
        ((model(low=4),), {"gpu_plugin_time_slicing_replicas": {"nvidia.com/gpu": 4}}),
        ((model(low=4),), {"gpu_plugin_mig_strategy": "single"}),
        ((model(low=28, high=28, gpu_resource="nvidia.com/mig-1g.5gb", cpu=1),), {"gpu_plugin_mig_strategy": "mixed"}),
        ((model(),), {"rayservice_node_selector": {"kubernetes.io/os": "linux"}}),
        ((model(accelerator="T4"),), {"rayservice_accelerators": {"T4": {"node_selector": {"nvidia.com/gpu.x": "1"}}}}),
    ],
)  # fmt: skip
def test_pods_that_nodes_have_room_for_are_let_through(
    models: tuple[dict[str, Any], ...], values: dict[str, Any]
) -> None:
    machine_of = "p4d.24xlarge" if values.get("gpu_plugin_mig_strategy") == "mixed" else "g4dn.xlarge"
    problems = found(*models, groups=[CPU, group("gpu", machine_of)], **values)
    assert [one for one in problems.values() if not one.warning and "gpu_resource" not in one.variable] == []


@pytest.mark.parametrize(
    "values",
    [
        {"platform": "existing"},
        {"kubeconfig_source": "given"},
        {"platform_autoscaler": "karpenter"},
        {"eks_extra_node_groups": [{"name": "t", "launch_template": {"id": "lt-1"}}]},
        {"eks_extra_node_groups": [group("big", "x2idn.16xlarge")]},
        {"rayservice_head": {"cpu": "four", "memory": "1Gi"}},
        {"rayservice_head": {"cpu": "1", "memory": "4GB"}},
        {
            "gpu_plugin_enabled": True,
            "eks_extra_node_groups": [group("x", "m5.large", ami_type="NVIDIA", labels=["a"])],
        },
        {"eks_extra_node_groups": [group("x", "m5.large", taints=[{"value": "no key"}])]},
        {"rayservice_tolerations": ["gpu"]},
    ],
)
def test_what_is_not_known_is_not_judged(values: dict[str, Any]) -> None:
    assert found(model(cpu=90), **values) == {}


def test_more_gpus_than_any_node_has_are_told_by_the_rule_of_node_groups() -> None:
    assert found(model(gpu=8)) == {}


PARTITIONED = group(
    "gpu", "p4d.24xlarge", ami_type="AL2023_x86_64_NVIDIA", labels={"nvidia.com/mig.config": "all-1g.5gb"}
)
UNDIVIDED = group("gpu", "p4d.24xlarge", ami_type="AL2023_x86_64_NVIDIA")
OPERATOR = {"gpu_plugin_enabled": True, "gpu_plugin_mode": "gpu_operator", "gpu_plugin_mig_strategy": "mixed"}
SLICE = "nvidia.com/mig-1g.5gb"


@pytest.mark.parametrize(
    ("resource", "nodes", "settings", "reason"),
    [
        (SLICE, PARTITIONED, OPERATOR, ""),
        ("nvidia.com/gpu", PARTITIONED, OPERATOR, "each slice is a device named by its profile"),
        (SLICE, UNDIVIDED, OPERATOR, "no node group has slices"),
        (SLICE, PARTITIONED, {**OPERATOR, "gpu_plugin_mig_strategy": "single"}, "gpu_plugin_mig_strategy is mixed"),
        ("nvidia.com/gpu", PARTITIONED, {**OPERATOR, "gpu_plugin_mig_strategy": "single"}, ""),
        ("nvidia.com/mig-1g", PARTITIONED, OPERATOR, "knows no such device"),
        ("nvidia.com/gpu.shared", UNDIVIDED, {"gpu_plugin_enabled": True}, "only with gpu_plugin_time_slicing_rename"),
        (
            "nvidia.com/gpu",
            UNDIVIDED,
            {
                "gpu_plugin_enabled": True,
                "gpu_plugin_time_slicing_rename": True,
                "gpu_plugin_time_slicing_replicas": {"nvidia.com/gpu": 4},
            },
            "the name nvidia.com/gpu.shared",
        ),
    ],
)
def test_pods_ask_for_the_devices_that_nodes_give(
    resource: str, nodes: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    problems = found(model(gpu_resource=resource), groups=[group("cpu", "m5.2xlarge"), nodes], **settings)
    said = problems.pop("rayservice_models[0].resources.gpu_resource", None)
    assert (reason in said.reason) if reason and said else said is None
    assert set(problems) <= {"gpu_plugin_mig_strategy"}
