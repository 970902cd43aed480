"""The autoscaler role against a real API server: accepted, applied, switched, drained and removed.

Neither autoscaler runs here, there is no AWS to add nodes; what is proven is that the API server takes every object,
Karpenter's by the validation rules (CEL) of its own CRDs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rayplane_local import parts
from rayplane_local.settings import Settings

from .conftest import HOME, ROOT, Kubectl, Run, Runner, go_module, kubectl_on

KARPENTER = "github.com/aws/karpenter-provider-aws"
DEFAULTS = yaml.safe_load((ROOT / "roles/autoscaler/defaults/main.yml").read_text(encoding="utf-8"))
VERSION = DEFAULTS["autoscaler_karpenter_version"]
NAMESPACE = "rayplane-autoscaler-test"
PLAYBOOK = f"""
- name: Run the role
  hosts: clusters
  gather_facts: false
  environment: "{{{{ platform_module_environment }}}}"
  roles: [platform]
  tasks:
    - name: Run the role
      ansible.builtin.include_role:
        name: autoscaler
        tasks_from: "{{{{ test_entry }}}}"
  vars:
    test_entry: main
    autoscaler_namespace: {NAMESPACE}
    autoscaler_wait: false
    autoscaler_replicas: 0
"""
# Every option of pools and classes, so that each has met Karpenter's own rules.
CLASSES = [
    *DEFAULTS["autoscaler_node_classes"],
    {
        "name": "bottlerocket",
        "ami_alias": "bottlerocket@v1.60.0",
        "disk_size": 300,
        "disk_iops": 4000,
        "disk_throughput": 500,
        "instance_store_raid0": True,
        "capacity_reservation_ids": ["cr-0123456789abcdef0"],
        "detailed_monitoring": True,
        "kubelet": {"maxPods": 58, "systemReserved": {"cpu": "100m"}},
        "tags": {"Team": "inference"},
    },
    {
        "name": "custom",
        "ami_family": "AL2023",
        "ami_selector_terms": [{"id": "ami-0123456789abcdef0"}],
        "user_data": "#!/bin/sh\ntrue\n",
        "subnet_selector_terms": [{"id": "subnet-0123456789abcdef0"}],
        "security_group_selector_terms": [{"id": "sg-0123456789abcdef0"}],
        "hop_limit": 1,
    },
]
POOLS = [
    *DEFAULTS["autoscaler_node_pools"],
    {
        "name": "spot",
        "node_class": "bottlerocket",
        "accelerator": "nvidia",
        "instance_types": ["g5.xlarge", "g6.xlarge"],
        "capacity_types": ["spot", "on-demand", "reserved"],
        "architectures": ["amd64", "arm64"],
        "zones": ["us-west-2a", "us-west-2b"],
        "requirements": [{"key": "karpenter.k8s.aws/instance-gpu-count", "operator": "Lt", "values": ["5"]}],
        "labels": {"team": "inference"},
        "annotations": {"example.com/note": "spot"},
        "startup_taints": [{"key": "example.com/starting", "effect": "NoSchedule"}],
        "termination_grace_period": "1h",
        "expire_after": "336h",
        "disruption": {
            "consolidation_policy": "WhenEmptyOrUnderutilized",
            "consolidate_after": "1h30m",
            "budgets": [{"nodes": 0, "schedule": "0 7 * * 1-5", "duration": "12h"}, {"nodes": "20%"}],
        },
        "weight": 50,
    },
    {"name": "neuron", "accelerator": "neuron", "instance_families": ["inf2"], "instance_sizes": ["xlarge"]},
]
Role = Callable[..., Run]


@pytest.fixture(scope="module")
def kubectl(api: Path) -> Kubectl:
    """Call kubectl on the API server without a node."""
    return kubectl_on(api)


@pytest.fixture(scope="module")
def role(api: Path, run: Runner, kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Role:
    """Run the role with variables, in a namespace of its own."""
    playbook = tmp_path_factory.mktemp("autoscaler") / "playbook.yml"
    playbook.write_text(PLAYBOOK, encoding="utf-8")
    kubectl("create", "namespace", NAMESPACE)

    def _role(*options: str, **variables: Any) -> Run:
        given = playbook.with_name("variables.json")
        given.write_text(json.dumps({"platform_kubeconfig": str(api), **variables}), encoding="utf-8")
        return run("ansible-playbook", "-i", "inventories/local", str(playbook), "-e", f"@{given}", *options)

    return _role


@pytest.fixture(scope="module")
def karpenter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Variables that install Karpenter from its own sources: the chart as upstream packs it, with its CRDs."""
    settings = Settings(home=HOME)
    helm = parts.ensure(settings, "helm")
    source, said = go_module(f"{KARPENTER}@v{VERSION}", tmp_path_factory.mktemp("go"))
    if not (source / "charts/karpenter/Chart.yaml").is_file():
        pytest.skip(f"no chart: {KARPENTER}@v{VERSION} cannot be fetched here: {said}")
    chart = tmp_path_factory.mktemp("chart") / "karpenter"
    for origin, target in (("charts/karpenter", chart), ("pkg/apis/crds", chart / "crds")):
        shutil.copytree(source / origin, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
        target.chmod(0o755)  # the module cache is read-only
    return {
        "platform_autoscaler": "karpenter",
        "autoscaler_karpenter_chart": str(chart),
        "autoscaler_helm": str(helm),
        "autoscaler_cache_dir": str(tmp_path_factory.mktemp("helm")),
        "autoscaler_node_classes": CLASSES,
        "autoscaler_node_pools": POOLS,
        "platform_kms_key_arn": "arn:aws:kms:us-west-2:000000000000:key/1",
    }


def changes(finished: Run) -> set[str]:
    """What the role says it changed."""
    words = ("created ", "updated ", "deleted ")
    lines = (line.strip().removeprefix("| ").removeprefix("- ") for line in finished.output.splitlines())
    return {line for line in lines if line.startswith(words)}


def test_the_cluster_autoscaler_is_applied_where_it_belongs(role: Role) -> None:
    variables = {
        "platform_autoscaler": "cluster_autoscaler",
        "autoscaler_namespace": "kube-system",
        "autoscaler_priorities": {"10": [".*"]},
    }
    plan = role("--check", **variables).expect_success()
    done = role(**variables).expect_success()
    assert changes(plan) == changes(done)
    assert {line for line in changes(done) if "/" in line} == {
        "created ConfigMap kube-system/cluster-autoscaler-priority-expander",
        *(
            f"created {kind} kube-system/cluster-autoscaler"
            for kind in ("Deployment", "PodDisruptionBudget", "Role", "RoleBinding", "Service", "ServiceAccount")
        ),
    }
    again = role(**variables).expect_success()
    assert again.changed == 0, again.changed_tasks()


def test_karpenter_takes_its_place(role: Role, karpenter: dict[str, Any], kubectl: Kubectl) -> None:
    plan = role("--check", **karpenter).expect_success()
    done = role(**karpenter).expect_success()
    assert changes(plan) == changes(done)
    assert "deleted Deployment kube-system/cluster-autoscaler" in changes(done)
    again = role(**karpenter).expect_success()
    assert again.changed == 0, again.changed_tasks()
    for kind, wanted in (("nodepools", POOLS), ("ec2nodeclasses", CLASSES)):
        names = kubectl("get", kind, "-o", "jsonpath={.items[*].metadata.name}").split()
        assert sorted(names) == sorted(entry["name"] for entry in wanted)
    controller = json.loads(kubectl("-n", NAMESPACE, "get", "deployment", "karpenter", "-o", "json"))
    environment = {
        entry["name"]: entry.get("value") for entry in controller["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environment["CLUSTER_NAME"] == environment["INTERRUPTION_QUEUE"] == "ray-llm-cluster-local"
    assert controller["spec"]["template"]["spec"]["serviceAccountName"] == "karpenter"


def test_the_api_server_holds_pools_to_karpenters_rules(role: Role, karpenter: dict[str, Any]) -> None:
    """Without these rules in force, that the pools were accepted would prove nothing."""
    pool = {"name": "cpu", "labels": {"karpenter.sh/nodepool": "cpu"}}
    refused = role("--check", **{**karpenter, "autoscaler_node_pools": [pool]})
    assert refused.failed
    assert 'label "karpenter.sh/nodepool" is restricted' in refused.output.replace('\\"', '"')


def test_a_pool_that_left_the_list_goes(role: Role, karpenter: dict[str, Any]) -> None:
    fewer = role(**{**karpenter, "autoscaler_node_pools": POOLS[:-1]}).expect_success()
    assert changes(fewer) == {"deleted NodePool neuron"}


def test_karpenter_stays_as_long_as_it_has_nodes(role: Role, karpenter: dict[str, Any], kubectl: Kubectl) -> None:
    claim = {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodeClaim",
        "metadata": {
            "name": "gpu-1",
            "labels": {"rayplane.io/pool": "gpu"},
            "finalizers": ["karpenter.sh/termination"],
        },
        "spec": {
            "nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "gpu"},
            "requirements": [{"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}],
        },
    }
    file = Path(karpenter["autoscaler_cache_dir"]) / "claim.json"
    file.write_text(json.dumps(claim), encoding="utf-8")
    kubectl("apply", "-f", str(file))
    late = role(**{**karpenter, "test_entry": "destroy", "autoscaler_drain_timeout_s": 5})
    assert late.failed
    assert "NodeClaim rayplane.io/pool: 1 left: gpu-1" in late.output
    assert kubectl("-n", NAMESPACE, "get", "deployment", "karpenter", "-o", "name").strip()
    kubectl("patch", "nodeclaim", "gpu-1", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    kubectl("delete", "nodeclaim", "gpu-1")


def test_everything_goes_and_is_gone(role: Role, karpenter: dict[str, Any], kubectl: Kubectl) -> None:
    # Without the chart, which may be out of reach by now.
    variables = {"platform_autoscaler": "karpenter", "test_entry": "destroy"}
    role(**variables).expect_success()
    again = role(**variables).expect_success()
    assert again.changed == 0, again.changed_tasks()
    owned = "app.kubernetes.io/part-of=rayplane,app.kubernetes.io/component=autoscaler"
    kinds = "deployments,services,serviceaccounts,configmaps,poddisruptionbudgets,roles,rolebindings,clusterroles,"
    kinds += "clusterrolebindings,customresourcedefinitions"
    assert kubectl("get", kinds, "--all-namespaces", "-l", owned, "-o", "name").split() == []
    assert "karpenter" not in kubectl("get", "crd", "-o", "name")


def test_somebody_elses_autoscaler_is_left_alone(role: Role, kubectl: Kubectl) -> None:
    kubectl("-n", NAMESPACE, "create", "serviceaccount", "cluster-autoscaler")
    refused = role(platform_autoscaler="cluster_autoscaler")
    assert refused.failed
    assert "An autoscaler is installed here already" in refused.output
    assert kubectl("-n", NAMESPACE, "get", "deployments", "-o", "name").split() == []
    role(platform_autoscaler="cluster_autoscaler", autoscaler_existing="adopt").expect_success()
    role(platform_autoscaler="none").expect_success()
    assert kubectl("-n", NAMESPACE, "get", "deployments,serviceaccounts", "-o", "name").split() == [
        "serviceaccount/default"
    ]
