"""The autoscaler's objects: the cluster autoscaler's permissions and arguments, Karpenter's pools and classes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter.rayplane_autoscaler import (
    cluster_autoscaler_objects,
    karpenter_objects,
    karpenter_problems,
    karpenter_targets,
    karpenter_wants_spot,
)
from conftest import PROJECT

DEFAULTS = yaml.safe_load((PROJECT / "roles/autoscaler/defaults/main.yml").read_text(encoding="utf-8"))
SETTINGS = {
    "cluster_name": "c1",
    "region": "us-west-2",
    "namespace": "kube-system",
    "service_account": "cluster-autoscaler",
    "image": "registry.k8s.io/autoscaling/cluster-autoscaler:v1.34.1",
    "replicas": 2,
    "resources": {"requests": {"cpu": "100m"}},
    "arguments": {"expander": "least-waste", "balance-similar-node-groups": True, "v": 4},
    "priorities": {},
    "node_selector": {"kubernetes.io/os": "linux"},
    "tolerations": [],
}
NODES = {"cluster_name": "c1", "node_role": "c1-node", "kms_key_arn": "", "tags": {"rayplane.io/cluster": "c1"}}
CLASS = {"name": "default", "ami_alias": "al2023@v20260903"}
POOL = {"name": "cpu"}
CAPACITY = "karpenter.sh/capacity-type"
GPU = {"name": "gpu", "accelerator": "nvidia", "instance_families": ["g5"]}


def by_kind(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The objects by their kind, of which each has one."""
    found = {item["kind"]: item for item in objects}
    assert len(found) == len(objects)
    return found


# --- cluster autoscaler ----------------------------------------------------------------------------------------------


def test_the_cluster_autoscaler_finds_its_groups_by_tag() -> None:
    objects = by_kind(cluster_autoscaler_objects(SETTINGS))
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["args"] == [
        "--cloud-provider=aws",
        "--namespace=kube-system",
        "--node-group-auto-discovery=asg:tag=k8s.io/cluster-autoscaler/enabled,k8s.io/cluster-autoscaler/c1",
        "--expander=least-waste",
        "--balance-similar-node-groups=true",
        "--v=4",
    ]
    assert container["env"] == [{"name": "AWS_REGION", "value": "us-west-2"}]
    assert container["livenessProbe"]["httpGet"] == {"path": "/health-check", "port": "metrics"}
    assert pod["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"] == "cluster-autoscaler"
    selector = objects["Deployment"]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["selector"] == selector
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == selector
    assert "ConfigMap" not in objects


def test_its_permissions_are_the_least_it_needs() -> None:
    objects = by_kind(cluster_autoscaler_objects(SETTINGS))
    rules = objects["ClusterRole"]["rules"]
    granted = {(group, one, verb) for rule in rules for group in rule["apiGroups"] for one in rule["resources"]
               for verb in rule["verbs"]}  # fmt: skip
    writes = {entry for entry in granted if entry[2] not in ("get", "list", "watch")}
    assert writes == {
        ("", "events", "create"),
        ("", "events", "patch"),
        ("", "pods/eviction", "create"),
        ("", "pods/status", "update"),
        ("", "nodes", "update"),
    }
    # Without it 1.34 never adds a node.
    assert ("storage.k8s.io", "volumeattachments", "list") in granted
    assert not {entry for entry in granted if "secrets" in entry[1] or "*" in entry}
    assert all(rule.get("resourceNames") or rule["verbs"] == ["create"] for rule in objects["Role"]["rules"])


def test_priorities_are_a_config_map_that_it_may_read() -> None:
    objects = by_kind(cluster_autoscaler_objects({**SETTINGS, "priorities": {"10": [".*"], 50: ["eks-spot-.*"]}}))
    assert objects["ConfigMap"]["metadata"]["name"] == "cluster-autoscaler-priority-expander"
    assert yaml.safe_load(objects["ConfigMap"]["data"]["priorities"]) == {10: [".*"], 50: ["eks-spot-.*"]}
    assert any("watch" in rule["verbs"] for rule in objects["Role"]["rules"])


# --- Karpenter -------------------------------------------------------------------------------------------------------


def build(pool: dict[str, Any] = POOL, node_class: dict[str, Any] = CLASS, **nodes: Any) -> tuple[Any, Any]:
    """Specs of the class and the pool."""
    objects = by_kind(karpenter_objects([pool], [node_class], NODES | nodes))
    return objects["EC2NodeClass"]["spec"], objects["NodePool"]["spec"]


def requirements(pool: dict[str, Any]) -> dict[str, Any]:
    """Values of each requirement."""
    return {entry["key"]: entry.get("values") for entry in build(pool)[1]["template"]["spec"]["requirements"]}


def test_the_roles_own_pools_and_classes_are_right() -> None:
    pools, classes = DEFAULTS["autoscaler_node_pools"], DEFAULTS["autoscaler_node_classes"]
    assert karpenter_problems(pools, classes) == []
    gpu = next(item for item in karpenter_objects(pools, classes, NODES) if item["metadata"]["name"] == "gpu"
               and item["kind"] == "NodePool")["spec"]  # fmt: skip
    assert gpu["limits"] == {"nvidia.com/gpu": "8"}


def test_pools_of_accelerators_wear_the_labels_and_taints_of_node_groups() -> None:
    _, pool = build(GPU)
    assert pool["template"]["metadata"]["labels"] == {"rayplane.io/pool": "gpu", "rayplane.io/accelerator": "nvidia"}
    node = pool["template"]["spec"]
    assert node["taints"] == [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    assert node["expireAfter"] == "Never"
    assert pool["disruption"] == {
        "consolidationPolicy": "WhenEmpty",
        "consolidateAfter": "15m",
        "budgets": [{"nodes": "1"}],
    }
    _, neuron = build({**GPU, "accelerator": "neuron", "instance_families": ["inf2"]})
    assert neuron["template"]["spec"]["taints"][0]["key"] == "aws.amazon.com/neuron"


def test_a_taint_of_ones_own_replaces_the_derived_one() -> None:
    taint = {"key": "nvidia.com/gpu", "effect": "NoExecute"}
    _, pool = build({**GPU, "taints": [taint]})
    assert pool["template"]["spec"]["taints"] == [taint]


def test_other_pools_are_consolidated_and_expire() -> None:
    _, pool = build()
    assert pool["disruption"]["consolidationPolicy"] == "WhenEmptyOrUnderutilized"
    assert pool["template"]["spec"]["expireAfter"] == "720h"
    assert "taints" not in pool["template"]["spec"]
    assert "limits" not in pool


def test_requirements() -> None:
    found = requirements(
        {
            **GPU,
            "instance_categories": ["g"],
            "instance_sizes": ["xlarge"],
            "instance_types": ["g5.xlarge"],
            "min_generation": 5,
            "architectures": ["amd64", "arm64"],
            "capacity_types": ["spot", "on-demand"],
            "zones": ["us-west-2a"],
            "requirements": [{"key": "karpenter.k8s.aws/instance-gpu-count", "operator": "Gt", "values": [1]}],
        }
    )
    assert found == {
        "kubernetes.io/os": ["linux"],
        "kubernetes.io/arch": ["amd64", "arm64"],
        "karpenter.sh/capacity-type": ["spot", "on-demand"],
        "node.kubernetes.io/instance-type": ["g5.xlarge"],
        "karpenter.k8s.aws/instance-family": ["g5"],
        "karpenter.k8s.aws/instance-category": ["g"],
        "karpenter.k8s.aws/instance-size": ["xlarge"],
        "topology.kubernetes.io/zone": ["us-west-2a"],
        "karpenter.k8s.aws/instance-generation": ["4"],
        "karpenter.k8s.aws/instance-gpu-manufacturer": ["nvidia"],
        "karpenter.k8s.aws/instance-gpu-count": ["1"],
    }


def test_a_requirement_of_ones_own_replaces_the_derived_one() -> None:
    own = {"key": "kubernetes.io/arch", "operator": "In", "values": ["arm64"]}
    assert requirements({**POOL, "requirements": [own]})["kubernetes.io/arch"] == ["arm64"]


def test_classes_are_encrypted_and_take_tokens_only() -> None:
    node, _ = build(kms_key_arn="arn:key")
    disk = node["blockDeviceMappings"][0]["ebs"]
    assert (disk["encrypted"], disk["kmsKeyID"], disk["volumeType"], disk["volumeSize"]) == (
        True,
        "arn:key",
        "gp3",
        "100Gi",
    )
    assert node["metadataOptions"]["httpTokens"] == "required"
    assert node["metadataOptions"]["httpPutResponseHopLimit"] == 1
    assert node["role"] == "c1-node"
    assert node["subnetSelectorTerms"] == [{"tags": {"karpenter.sh/discovery": "c1"}}]
    assert node["securityGroupSelectorTerms"] == node["subnetSelectorTerms"]
    assert node["tags"] == {"rayplane.io/cluster": "c1"}
    assert "kmsKeyID" not in build()[0]["blockDeviceMappings"][0]["ebs"]


def test_bottlerocket_keeps_containers_on_its_second_disk() -> None:
    node, _ = build(node_class={"name": "default", "ami_alias": "bottlerocket@v1.60.0", "disk_size": 300})
    sizes = {device["deviceName"]: device["ebs"]["volumeSize"] for device in node["blockDeviceMappings"]}
    assert sizes == {"/dev/xvda": "4Gi", "/dev/xvdb": "300Gi"}


def test_optional_parts_of_a_class() -> None:
    node, _ = build(
        node_class={
            "name": "default",
            "ami_selector_terms": [{"id": "ami-1"}],
            "ami_family": "AL2023",
            "instance_store_raid0": True,
            "capacity_reservation_ids": ["cr-1"],
            "kubelet": {"maxPods": 50},
            "user_data": "#!/bin/sh",
            "disk_iops": 4000,
            "disk_throughput": 500,
            "tags": {"Team": "a"},
        }
    )
    assert node["instanceStorePolicy"] == "RAID0"
    assert node["capacityReservationSelectorTerms"] == [{"id": "cr-1"}]
    assert (node["amiFamily"], node["kubelet"], node["userData"]) == ("AL2023", {"maxPods": 50}, "#!/bin/sh")
    assert node["blockDeviceMappings"][0]["ebs"]["iops"] == 4000
    assert node["tags"]["Team"] == "a"


def test_what_is_waited_for() -> None:
    objects = karpenter_objects([POOL], [CLASS], NODES)
    assert [(target["kind"], target["name"]) for target in karpenter_targets(objects, ["karpenter"], "ns")] == [
        ("Deployment", "karpenter"),
        ("EC2NodeClass", "default"),
        ("NodePool", "cpu"),
    ]


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"name": "A"}, "autoscaler_node_pools[0] (A).name is 'A'"),
        ({**POOL, "node_class": "none"}, "node_class is 'none', which autoscaler_node_classes does not have (it has:"),
        ({**POOL, "accelerator": "nvidia"}, "instance_families is empty"),
        ({**POOL, "capacity_types": []}, "capacity_types is []: name at least one"),
        ({**POOL, "weight": 0}, "weight is 0: a whole number from 1 to 100"),
        ({**POOL, "expire_after": "30 days"}, "expire_after is '30 days': a duration"),
        ({**POOL, "termination_grace_period": "Never"}, "termination_grace_period is 'Never': leave it out"),
        ({**POOL, "disruption": {"consolidate_after": "soon"}}, "disruption.consolidate_after is 'soon'"),
        ({**POOL, "disruption": {"budgets": [{"nodes": "0", "schedule": "@daily"}]}}, "give both, or neither"),
    ],
)
def test_wrong_pools_are_explained(pool: Any, said: str) -> None:
    problems = karpenter_problems([pool], [CLASS])
    assert len(problems) == 1
    assert said in problems[0]
    with pytest.raises(AnsibleFilterError, match="autoscaler_node_pools"):
        karpenter_objects([pool], [CLASS], NODES)


@pytest.mark.parametrize(
    ("node_class", "said"),
    [
        ({"name": "default"}, "give exactly one of them"),
        ({**CLASS, "ami_alias": "al2023@latest"}, "every release of the image replaces all nodes by itself"),
        ({**CLASS, "ami_alias": "ubuntu@v1"}, "it has the form al2023@v20260903"),
        ({"name": "default", "ami_selector_terms": [{"id": "ami-1"}]}, "ami_family is missing"),
        ({**CLASS, "tags": {"kubernetes.io/cluster/c1": "owned"}}, "Karpenter sets kubernetes.io/cluster/c1 itself"),
    ],
)
def test_wrong_classes_are_explained(node_class: Any, said: str) -> None:
    problems = karpenter_problems([POOL], [node_class])
    assert len(problems) == 1
    assert problems[0].startswith("autoscaler_node_classes[0] (default).")
    assert said in problems[0]


def test_names_are_unique() -> None:
    assert "rename one of them" in karpenter_problems([POOL, POOL], [CLASS])[0]


@pytest.mark.parametrize(
    ("pool", "spot"),
    [
        ({}, False),
        ({"capacity_types": ["on-demand", "reserved"]}, False),
        ({"capacity_types": ["spot", "on-demand"]}, True),
        # A requirement of one's own takes the place of capacity_types.
        ({"requirements": [{"key": CAPACITY, "operator": "In", "values": ["spot"]}]}, True),
        ({"requirements": [{"key": CAPACITY, "operator": "Exists"}]}, True),
        ({"requirements": [{"key": CAPACITY, "operator": "NotIn", "values": ["spot"]}]}, False),
        ({"requirements": [{"key": CAPACITY, "operator": "NotIn", "values": ["reserved"]}]}, True),
        ({"capacity_types": ["spot"], "requirements": [{"key": CAPACITY, "operator": "DoesNotExist"}]}, False),
        ({"capacity_types": ["spot"], "requirements": [{"key": "x", "operator": "Exists"}]}, True),
    ],
)
def test_spot_is_wanted_where_a_pool_may_start_it(pool: dict[str, Any], spot: bool) -> None:
    assert karpenter_wants_spot([POOL, {**POOL, **pool}]) is spot
    assert karpenter_wants_spot(DEFAULTS["autoscaler_node_pools"]) is False
