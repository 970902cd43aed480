# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Builds the Kubernetes objects of the autoscaler role: the cluster autoscaler, and Karpenter's pools and classes.

Facts behind it, each of which cost somebody a day:

* The cluster autoscaler of 1.33 and later lists volume attachments before it does anything; without that permission it
  never adds a node (kubernetes/autoscaler issue 8678).
* Karpenter expires nodes whatever the disruption budgets say, so pools of accelerators never expire by default: new
  images reach them by drift, which keeps to the budgets.
* A pool of accelerators is consolidated only when empty: moving a model means loading it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError

Json = dict[str, Any]

NAME = "cluster-autoscaler"
METRICS_PORT = 8085
PRIORITIES = "cluster-autoscaler-priority-expander"
STATUS = "cluster-autoscaler-status"

POOL_LABEL = "rayplane.io/pool"
ACCELERATOR_LABEL = "rayplane.io/accelerator"
# What role eks puts on the node groups of the same kind, so that pods need not know who made their node.
_TAINT_KEYS = {"nvidia": "nvidia.com/gpu", "neuron": "aws.amazon.com/neuron"}
_MANUFACTURER = {
    "nvidia": ("karpenter.k8s.aws/instance-gpu-manufacturer", "nvidia"),
    "neuron": ("karpenter.k8s.aws/instance-accelerator-manufacturer", "aws"),
}
_DURATION = re.compile(r"(([0-9]+(s|m|h))+|Never)\Z")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_ALIAS = re.compile(r"(al2|al2023|bottlerocket)@(.+)\Z")
_CAPACITY_KEY = "karpenter.sh/capacity-type"
# Karpenter puts these on its instances itself, and refuses classes that have them.
_RESERVED_TAGS = (
    "eks:eks-cluster-name",
    "karpenter.sh/nodepool",
    "karpenter.sh/nodeclaim",
    "karpenter.k8s.aws/ec2nodeclass",
)


# --- cluster autoscaler ----------------------------------------------------------------------------------------------


def cluster_autoscaler_objects(settings: Mapping[str, Any]) -> list[Json]:
    """The cluster autoscaler as plain objects.

    ``settings``: cluster_name, region, namespace, service_account, image, replicas, resources, arguments (flag name to
    value), priorities (number to list of patterns of Auto Scaling groups; empty without the priority expander),
    node_selector, tolerations.
    """
    namespace = str(settings["namespace"])
    labels = {"app.kubernetes.io/name": NAME}

    def entry(api: str, kind: str, name: str = NAME, scoped: bool = True, **body: Any) -> Json:
        metadata: Json = {"name": name, "labels": dict(labels)}
        if scoped:
            metadata["namespace"] = namespace
        return {"apiVersion": api, "kind": kind, "metadata": metadata, **body}

    rbac = "rbac.authorization.k8s.io"
    account = str(settings["service_account"])
    subjects = [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
    objects = [
        entry("v1", "ServiceAccount", account, automountServiceAccountToken=True),
        entry(f"{rbac}/v1", "ClusterRole", scoped=False, rules=_cluster_rules()),
        entry(
            f"{rbac}/v1",
            "ClusterRoleBinding",
            scoped=False,
            roleRef={"apiGroup": rbac, "kind": "ClusterRole", "name": NAME},
            subjects=subjects,
        ),
        entry(f"{rbac}/v1", "Role", rules=_namespace_rules(bool(settings["priorities"]))),
        entry(
            f"{rbac}/v1",
            "RoleBinding",
            roleRef={"apiGroup": rbac, "kind": "Role", "name": NAME},
            subjects=subjects,
        ),
        entry(
            "policy/v1",
            "PodDisruptionBudget",
            spec={"maxUnavailable": 1, "selector": {"matchLabels": dict(labels)}},
        ),
        entry(
            "v1",
            "Service",
            spec={
                "selector": dict(labels),
                "ports": [{"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics", "protocol": "TCP"}],
            },
        ),
        entry("apps/v1", "Deployment", spec=_deployment(settings, labels)),
    ]
    if settings["priorities"]:
        priorities = {int(key): [str(one) for one in value] for key, value in settings["priorities"].items()}
        text = yaml.safe_dump(priorities, default_flow_style=False, sort_keys=True)
        objects.append(entry("v1", "ConfigMap", PRIORITIES, data={"priorities": text}))
    return objects


def _rule(groups: Sequence[str], resources: Sequence[str], verbs: Sequence[str], names: Sequence[str] = ()) -> Json:
    rule: Json = {"apiGroups": list(groups), "resources": list(resources), "verbs": list(verbs)}
    return rule | ({"resourceNames": list(names)} if names else {})


def _cluster_rules() -> list[Json]:
    """Upstream's rules (charts/cluster-autoscaler) without those of APIs that 1.36 no longer has or it no longer
    uses: the group extensions, and endpoints as a lock."""
    read = ("get", "list", "watch")
    return [
        _rule([""], ["events"], ["create", "patch"]),
        _rule([""], ["pods/eviction"], ["create"]),
        _rule([""], ["pods/status"], ["update"]),
        _rule([""], ["nodes"], [*read, "update"]),
        _rule(
            [""],
            [
                "namespaces",
                "persistentvolumeclaims",
                "persistentvolumes",
                "pods",
                "replicationcontrollers",
                "services",
            ],
            read,
        ),
        _rule(["apps"], ["daemonsets", "replicasets", "statefulsets"], read),
        _rule(["batch"], ["cronjobs", "jobs"], read),
        _rule(["policy"], ["poddisruptionbudgets"], read),
        _rule(
            ["storage.k8s.io"],
            ["csidrivers", "csinodes", "csistoragecapacities", "storageclasses", "volumeattachments"],
            read,
        ),
        _rule(["resource.k8s.io"], ["deviceclasses", "resourceclaims", "resourceslices"], read),
    ]


def _namespace_rules(priorities: bool) -> list[Json]:
    """In its own namespace: its status, its lock, and the priorities where they are used."""
    rules = [
        _rule([""], ["configmaps"], ["create"]),
        _rule([""], ["configmaps"], ["delete", "get", "update"], [STATUS]),
        _rule(["coordination.k8s.io"], ["leases"], ["create"]),
        _rule(["coordination.k8s.io"], ["leases"], ["get", "update"], [NAME]),
    ]
    if priorities:
        # It watches the ConfigMaps of its namespace, which cannot be limited to one name.
        rules.append(_rule([""], ["configmaps"], ["get", "list", "watch"]))
    return rules


def _argument(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _deployment(settings: Mapping[str, Any], labels: Mapping[str, str]) -> Json:
    cluster = settings["cluster_name"]
    discovery = f"asg:tag=k8s.io/cluster-autoscaler/enabled,k8s.io/cluster-autoscaler/{cluster}"
    arguments = {
        "cloud-provider": "aws",
        "namespace": settings["namespace"],
        "node-group-auto-discovery": discovery,
        **settings["arguments"],
    }
    probe = {"httpGet": {"path": "/health-check", "port": "metrics"}}
    container = {
        "name": NAME,
        "image": settings["image"],
        "command": ["./cluster-autoscaler"],
        "args": [f"--{key}={_argument(value)}" for key, value in arguments.items()],
        "env": [{"name": "AWS_REGION", "value": settings["region"]}],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
        "resources": settings["resources"],
        # Its check fails when the loop has not run for ten minutes; it answers from the first second.
        "livenessProbe": {**probe, "initialDelaySeconds": 30, "periodSeconds": 20, "failureThreshold": 3},
        "readinessProbe": {**probe, "periodSeconds": 10},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    pod: Json = {
        "serviceAccountName": settings["service_account"],
        "priorityClassName": "system-cluster-critical",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65534,
            "runAsGroup": 65534,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "enableServiceLinks": False,
        "nodeSelector": dict(settings["node_selector"]),
        "tolerations": list(settings["tolerations"]),
        "containers": [container],
    }
    return {
        "replicas": int(settings["replicas"]),
        "selector": {"matchLabels": dict(labels)},
        # The node it runs on goes last: an autoscaler that evicts itself starts its clocks anew.
        "template": {
            "metadata": {
                "labels": dict(labels),
                "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            },
            "spec": pod,
        },
    }


# --- Karpenter -------------------------------------------------------------------------------------------------------


def karpenter_problems(pools: Sequence[Json], classes: Sequence[Json]) -> list[str]:
    """What no argument spec can say of autoscaler_node_pools and autoscaler_node_classes, each with variable, value,
    reason and cure; empty where nothing is wrong."""
    problems: list[str] = []
    names: dict[str, set[str]] = {}
    for variable, entries, check in (
        ("autoscaler_node_classes", classes, _class_problems),
        ("autoscaler_node_pools", pools, _pool_problems),
    ):
        seen = names.setdefault(variable, set())
        for index, entry in enumerate(entries):
            name = str(entry.get("name", ""))
            at = f"{variable}[{index}] ({name})"
            if name and not _DNS_LABEL.fullmatch(name):
                problems.append(f"{at}.name is {name!r}: it names an object, so it has to be a DNS label")
            elif name in seen:
                problems.append(f"{at}.name: the same name as one before it; rename one of them")
            seen.add(name)
            problems += [f"{at}.{problem}" for problem in check(entry)]
    for index, pool in enumerate(pools):
        wanted = pool.get("node_class", "default")
        if wanted not in names["autoscaler_node_classes"]:
            offered = ", ".join(sorted(names["autoscaler_node_classes"])) or "none"
            problems.append(
                f"autoscaler_node_pools[{index}].node_class is {wanted!r}, which autoscaler_node_classes does not have"
                f" (it has: {offered})"
            )
    return problems


def _pool_problems(pool: Mapping[str, Any]) -> list[str]:
    problems = []
    accelerator = pool.get("accelerator") or ""
    if pool.get("capacity_types") == []:
        problems.append("capacity_types is []: name at least one, or leave it out")
    if accelerator in _TAINT_KEYS and not any(
        pool.get(key) for key in ("instance_types", "instance_families", "requirements")
    ):
        problems.append(
            "instance_families is empty: a pool of accelerators without instance_types, instance_families or"
            " requirements may start any of them, the dearest included; name the ones you want"
        )
    weight = pool.get("weight", 1)
    if not 1 <= weight <= 100:
        problems.append(f"weight is {weight!r}: a whole number from 1 to 100 is needed")
    problems += [
        f"{key} is {pool[key]!r}: a duration such as 30m or 720h, or Never, is needed"
        for key in ("expire_after", "termination_grace_period")
        if key in pool and not _DURATION.fullmatch(str(pool[key]))
    ]
    if pool.get("termination_grace_period") == "Never":
        problems.append("termination_grace_period is 'Never': leave it out instead")
    disruption = pool.get("disruption") or {}
    after = disruption.get("consolidate_after", "0s")
    if not _DURATION.fullmatch(str(after)):
        problems.append(f"disruption.consolidate_after is {after!r}: a duration such as 15m, or Never, is needed")
    for index, budget in enumerate(disruption.get("budgets") or []):
        if ("schedule" in budget) != ("duration" in budget):
            problems.append(
                f"disruption.budgets[{index}] has one of schedule and duration: give both, or neither for always"
            )
    return problems


def _class_problems(entry: Mapping[str, Any]) -> list[str]:
    problems = []
    alias, terms = str(entry.get("ami_alias") or ""), entry.get("ami_selector_terms")
    if bool(alias) == bool(terms):
        problems.append("ami_alias and ami_selector_terms: give exactly one of them, to choose the nodes' image")
    match = _ALIAS.fullmatch(alias)
    if alias and not match:
        problems.append(f"ami_alias is {alias!r}: it has the form al2023@v20260903 or bottlerocket@v1.60.0")
    elif match and match[2] == "latest":
        problems.append(
            f"ami_alias is {alias!r}: with 'latest' every release of the image replaces all nodes by itself;"
            " pin a version, and change it when you want to upgrade"
        )
    if terms and not entry.get("ami_family"):
        problems.append("ami_family is missing: with ami_selector_terms Karpenter has to be told how nodes join")
    reserved = [
        key for key in entry.get("tags") or {} if key in _RESERVED_TAGS or key.startswith("kubernetes.io/cluster")
    ]
    problems += [f"tags: Karpenter sets {key} itself; leave it out" for key in reserved]
    return problems


def karpenter_objects(pools: Sequence[Json], classes: Sequence[Json], settings: Mapping[str, Any]) -> list[Json]:
    """NodePools and EC2NodeClasses.

    ``settings``: cluster_name, node_role, kms_key_arn, tags. Raises AnsibleFilterError with all problems at once.
    """
    problems = karpenter_problems(pools, classes)
    if problems:
        raise AnsibleFilterError("\n".join(problems))
    return [_node_class(entry, settings) for entry in classes] + [_node_pool(pool) for pool in pools]


def karpenter_wants_spot(pools: Sequence[Json]) -> bool:
    """Whether one of the NodePools may start spot instances."""

    def admits(requirement: Json) -> bool:
        values, operator = requirement.get("values", ()), requirement["operator"]
        return {"In": "spot" in values, "NotIn": "spot" not in values, "Exists": True}.get(operator, False)

    return any(all(admits(one) for one in _requirements(pool) if one["key"] == _CAPACITY_KEY) for pool in pools)


def karpenter_targets(objects: Sequence[Json], deployments: Sequence[str], namespace: str) -> list[Json]:
    """What to wait for: the controller, then what it says of each class and pool (k8s_apply_set's ``wait_for``)."""
    targets: list[Json] = [
        {"api_version": "apps/v1", "kind": "Deployment", "namespace": namespace, "name": name} for name in deployments
    ]
    return targets + [
        {"api_version": item["apiVersion"], "kind": item["kind"], "name": item["metadata"]["name"]} for item in objects
    ]


def _node_class(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Json:
    discovery = [{"tags": {"karpenter.sh/discovery": settings["cluster_name"]}}]
    key = entry.get("kms_key_arn", settings["kms_key_arn"])
    disk: Json = {
        "volumeSize": f"{int(entry.get('disk_size', 100))}Gi",
        "volumeType": "gp3",
        "encrypted": True,
        "deleteOnTermination": True,
    }
    disk |= {"kmsKeyID": key} if key else {}
    disk |= {name: int(entry[f"disk_{name}"]) for name in ("iops", "throughput") if entry.get(f"disk_{name}")}
    alias = str(entry.get("ami_alias") or "")
    bottlerocket = alias.startswith("bottlerocket@") or entry.get("ami_family") == "Bottlerocket"
    # Bottlerocket keeps images and containers on its second disk; the first one holds the system and stays small.
    devices: list[Json] = [{"deviceName": "/dev/xvda", "ebs": disk}]
    if bottlerocket:
        system = {**disk, "volumeSize": "4Gi"}
        system = {name: value for name, value in system.items() if name not in ("iops", "throughput")}
        devices = [{"deviceName": "/dev/xvda", "ebs": system}, {"deviceName": "/dev/xvdb", "ebs": disk}]
    spec: Json = {
        "role": entry.get("role") or settings["node_role"],
        "amiSelectorTerms": [{"alias": alias}] if alias else list(entry["ami_selector_terms"]),
        "subnetSelectorTerms": list(entry.get("subnet_selector_terms") or discovery),
        "securityGroupSelectorTerms": list(entry.get("security_group_selector_terms") or discovery),
        "blockDeviceMappings": devices,
        # One hop, which keeps pods from the node's role; tokens only (IMDSv2).
        "metadataOptions": {
            "httpEndpoint": "enabled",
            "httpProtocolIPv6": "disabled",
            "httpPutResponseHopLimit": int(entry.get("hop_limit", 1)),
            "httpTokens": "required",
        },
        "detailedMonitoring": bool(entry.get("detailed_monitoring", False)),
        "tags": {str(name): str(value) for name, value in {**settings["tags"], **(entry.get("tags") or {})}.items()},
    }
    if entry.get("ami_family"):
        spec["amiFamily"] = entry["ami_family"]
    if entry.get("instance_store_raid0"):
        spec["instanceStorePolicy"] = "RAID0"
    if entry.get("capacity_reservation_ids"):
        spec["capacityReservationSelectorTerms"] = [{"id": one} for one in entry["capacity_reservation_ids"]]
    if entry.get("user_data"):
        spec["userData"] = entry["user_data"]
    if entry.get("kubelet"):
        spec["kubelet"] = dict(entry["kubelet"])
    return _object("karpenter.k8s.aws/v1", "EC2NodeClass", str(entry["name"]), spec)


def _node_pool(pool: Mapping[str, Any]) -> Json:
    name, accelerator = str(pool["name"]), pool.get("accelerator") or ""
    labels = {POOL_LABEL: name} | ({ACCELERATOR_LABEL: accelerator} if accelerator else {})
    taints = list(pool.get("taints") or [])
    if accelerator and not any(taint["key"] == _TAINT_KEYS[accelerator] for taint in taints):
        taints.insert(0, {"key": _TAINT_KEYS[accelerator], "value": "present", "effect": "NoSchedule"})
    node: Json = {
        "nodeClassRef": {
            "group": "karpenter.k8s.aws",
            "kind": "EC2NodeClass",
            "name": pool.get("node_class", "default"),
        },
        "requirements": _requirements(pool),
        "expireAfter": str(pool.get("expire_after") or ("Never" if accelerator else "720h")),
    }
    node |= {"taints": taints} if taints else {}
    node |= {"startupTaints": list(pool["startup_taints"])} if pool.get("startup_taints") else {}
    if pool.get("termination_grace_period"):
        node["terminationGracePeriod"] = str(pool["termination_grace_period"])
    metadata: Json = {"labels": labels | {key: str(value) for key, value in (pool.get("labels") or {}).items()}}
    if pool.get("annotations"):
        metadata["annotations"] = {key: str(value) for key, value in pool["annotations"].items()}
    given = pool.get("disruption") or {}
    spec: Json = {
        "template": {"metadata": metadata, "spec": node},
        "disruption": {
            "consolidationPolicy": given.get("consolidation_policy")
            or ("WhenEmpty" if accelerator else "WhenEmptyOrUnderutilized"),
            "consolidateAfter": str(given.get("consolidate_after") or ("15m" if accelerator else "5m")),
            "budgets": [
                {key: str(value) if key == "nodes" else value for key, value in budget.items()}
                for budget in given.get("budgets") or [{"nodes": "1" if accelerator else "10%"}]
            ],
        },
        "weight": int(pool.get("weight", 1)),
    }
    if pool.get("limits"):
        spec["limits"] = {str(key): str(value) for key, value in pool["limits"].items()}
    return _object("karpenter.sh/v1", "NodePool", name, spec)


def _requirements(pool: Mapping[str, Any]) -> list[Json]:
    accelerator = pool.get("accelerator") or ""

    def among(key: str, values: Any) -> list[Json]:
        return [{"key": key, "operator": "In", "values": [str(value) for value in values]}] if values else []

    requirements = [
        *among("kubernetes.io/os", ["linux"]),
        *among("kubernetes.io/arch", pool.get("architectures", ["amd64"])),
        *among(_CAPACITY_KEY, pool.get("capacity_types", ["on-demand"])),
        *among("node.kubernetes.io/instance-type", pool.get("instance_types")),
        *among("karpenter.k8s.aws/instance-family", pool.get("instance_families")),
        *among("karpenter.k8s.aws/instance-category", pool.get("instance_categories")),
        *among("karpenter.k8s.aws/instance-size", pool.get("instance_sizes")),
        *among("topology.kubernetes.io/zone", pool.get("zones")),
    ]
    if pool.get("min_generation"):
        above = str(int(pool["min_generation"]) - 1)
        requirements.append({"key": "karpenter.k8s.aws/instance-generation", "operator": "Gt", "values": [above]})
    if accelerator:
        key, manufacturer = _MANUFACTURER[accelerator]
        requirements += among(key, [manufacturer])
    own = {entry["key"] for entry in pool.get("requirements") or []}
    # A requirement of one's own replaces the derived one of the same key.
    return [entry for entry in requirements if entry["key"] not in own] + [
        {**entry, **({"values": [str(value) for value in entry["values"]]} if "values" in entry else {})}
        for entry in pool.get("requirements") or []
    ]


def _object(api: str, kind: str, name: str, spec: Json) -> Json:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": json.loads(json.dumps(spec))}


class FilterModule:
    """The filters of the autoscaler role."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "cluster_autoscaler_objects": cluster_autoscaler_objects,
            "karpenter_objects": karpenter_objects,
            "karpenter_targets": karpenter_targets,
            "karpenter_wants_spot": karpenter_wants_spot,
        }
