# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over names: what is made of the cluster's name, what belongs to Kubernetes, what it takes as a label."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    DNS_1035_LABEL,
    DNS_LABEL,
    Values,
    as_label,
    entries_of,
)

__all__ = ["derived_names", "kubernetes_names"]

#: Ends of the IAM roles' names, each with the variable and its value that make the role; without one it is always made.
_ROLES: dict[str, tuple[str, Any] | None] = {
    "-control-plane": None,
    "-models-reader": None,
    "-load-balancer-controller": ("eks_load_balancer_controller", True),
    "-external-secrets": ("eks_external_secrets", True),
    "-flow-logs": ("network_flow_logs", True),
    "-bastion": ("network_admin_access", "bastion"),
}
_LONGEST_ROLE = 64
_LAUNCH_TEMPLATE = 128
_NODE_GROUP = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,62}")
_ROLE = re.compile(r"[\w+=,.@-]{1,64}")
_ALIAS = re.compile(r"(?!aws/)[0-9A-Za-z/_-]{1,250}")
_LOAD_BALANCER = re.compile(r"(?!internal-)[0-9A-Za-z]([0-9A-Za-z-]{0,30}[0-9A-Za-z])?")
_LOAD_BALANCER_NAME = re.compile(r"(service\.beta|alb\.ingress)\.kubernetes\.io/(aws-)?load-balancer-name")

#: A StatefulSet's pods bear its name and a hash of ten characters in a label of at most 63; Redis' adds its own end.
_LONGEST_GATEWAY = 63 - len("-redis") - 11
#: Services of these names set variables that programs read: VLLM_PORT, RAY_ADDRESS, KUBERNETES_SERVICE_HOST.
_INJECTING = ("kubernetes", "ray", "redis", "vllm")
#: Namespaces of single roles, as they are shipped.
_OWN_NAMESPACES = {
    "kuberay_namespace": "kuberay-system",
    "gpu_plugin_namespace": "gpu-system",
    "autoscaler_namespace": "kube-system",
    "monitoring_namespace": "monitoring",
}
#: The kubelet starts with labels of Kubernetes' own domains only where they are on its list.
_KUBELET_LABELS = re.compile(r"(kubelet|node)\.kubernetes\.io/.*|kubernetes\.io/(arch|hostname|os)"
                             r"|topology\.kubernetes\.io/(region|zone)")  # fmt: skip
_OWN_DOMAIN = re.compile(r"([a-z0-9.-]+\.)?(kubernetes|k8s)\.io/.*|eks\.amazonaws\.com/.*")
_LABEL_KEY = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)


def derived_names(values: Values) -> Iterator[Problem]:
    """Whatever is named after the cluster fits the limit of the service that it lives in."""
    if values.get("platform") != "aws":
        return
    cluster = values.get("platform_cluster_name")
    if isinstance(cluster, str):
        made = [end for end, when in _ROLES.items() if when is None or values.get(when[0]) == when[1]]
        if any(entry.get("replicate") for _, entry in entries_of(values, "storage_buckets")):
            made.append("-replication")
        longest = max(made, key=len)
        if len(cluster + longest) > _LONGEST_ROLE:
            fits = _LONGEST_ROLE - len(longest)
            yield Problem(
                "platform_cluster_name",
                cluster,
                f"the IAM role {cluster}{longest} would have {len(cluster + longest)} characters, and IAM takes"
                f" {_LONGEST_ROLE}",
                f"use {fits} characters or fewer, such as {cluster[:fits].rstrip('-_')}",
            )
    for path, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups")):
        name = group.get("name")
        if not isinstance(name, str):
            continue
        template = len(f"{cluster}-{name}")
        if not _NODE_GROUP.fullmatch(name):
            reason = "EKS takes 1 to 63 letters, digits, hyphens and underscores, the first a letter or digit"
            yield Problem(f"{path}.name", name, reason, _shorter(name, 63))
        elif template > _LAUNCH_TEMPLATE:
            reason = f"with the cluster's name its launch template's has {template} characters, of {_LAUNCH_TEMPLATE}"
            yield Problem(f"{path}.name", name, reason, "shorten it, or platform_cluster_name")
    for variable in ("eks_extra_roles", "eks_irsa"):
        for path, entry in entries_of(values, variable):
            name = entry.get("name")
            if isinstance(name, str) and name and not _ROLE.fullmatch(name):
                reason = "IAM takes 1 to 64 letters, digits and + = , . @ - _"
                yield Problem(f"{path}.name", name, reason, _shorter(name, 64))
    alias = values.get("encryption_alias")
    if values.get("encryption_enabled") is True and isinstance(alias, str) and not _ALIAS.fullmatch(alias):
        reason = "KMS takes letters, digits, / _ and -, at most 250, and aliases that start with aws/ are its own"
        yield Problem("encryption_alias", alias, reason, _shorter(alias.removeprefix("aws/"), 250))
    for path, entry in entries_of(values, "storage_efs_file_systems"):
        name = entry.get("name")
        if values.get("storage_efs_enabled") is True and isinstance(name, str) and len(name) > 64:
            reason = f"EFS takes 64 characters, and this name has {len(name)}"
            yield Problem(f"{path}.name", name, reason, _shorter(name, 64))
    for variable in ("gateway_service_annotations", "rayservice_service_annotations"):
        given = values.get(variable)
        for key, name in given.items() if isinstance(given, Mapping) else ():
            if _LOAD_BALANCER_NAME.fullmatch(str(key)) and isinstance(name, str) and not _LOAD_BALANCER.fullmatch(name):
                reason = (
                    f"a load balancer's name has at most 32 letters, digits and inner hyphens (this has {len(name)})"
                )
                yield Problem(
                    f"{variable}.{key}", name, f"{reason} and does not start with internal-", _shorter(name, 32)
                )


def _shorter(name: str, most: int) -> str:
    fixed = re.sub(r"[^0-9A-Za-z-]+", "-", name.removeprefix("internal-")).strip("-")[:most].rstrip("-")
    return f"write {fixed}, for example" if fixed and fixed != name else "choose another name"


def kubernetes_names(values: Values) -> Iterator[Problem]:
    """Names and labels are such as Kubernetes takes, and none that belongs to it or misleads programs."""
    namespaces = [
        (name, values.get(name)) for name in ("platform_namespace", "rayservice_namespace", "gateway_namespace")
    ]
    listed = values.get("namespaces_list")
    for index, entry in enumerate(listed if isinstance(listed, list | tuple) else ()):
        inside = isinstance(entry, Mapping)
        path = f"namespaces_list[{index}]{'.name' if inside else ''}"
        namespaces.append((path, entry.get("name") if isinstance(entry, Mapping) else entry))
    namespaces += [(name, values.get(name)) for name in _OWN_NAMESPACES]
    told: set[str] = set()
    for path, name in namespaces:
        own = _OWN_NAMESPACES.get(path)
        # Those that are not a role's own are the platform's unless they say otherwise.
        if not isinstance(name, str) or name == own or (name in told and not own):
            continue
        told.add(name)
        if name == "default" or name.startswith("kube-"):
            yield Problem(
                path,
                name,
                "the namespace belongs to Kubernetes: destroy could not delete it, and its pods would get our limits",
                f"write {own or 'rayplane'}, for example",
            )
        elif path != "platform_namespace" and not DNS_LABEL.fullmatch(name):
            reason = "a Kubernetes namespace is a DNS label: a-z, 0-9 and inner hyphens, at most 63"
            yield Problem(path, name, reason, as_label(name))
    gateway, service = values.get("gateway_name"), values.get("rayservice_name")
    if isinstance(gateway, str) and not DNS_1035_LABEL.fullmatch(gateway):
        reason = "a Service's name is a DNS label that starts with a letter: a-z, 0-9 and inner hyphens"
        yield Problem("gateway_name", gateway, reason, as_label(gateway, letter=True))
    elif isinstance(gateway, str) and len(gateway) > _LONGEST_GATEWAY:
        reason = (
            f"its Redis' pods bear the name with a hash as a label, so it has at most {_LONGEST_GATEWAY} characters"
        )
        yield Problem("gateway_name", gateway, reason, _shorter(gateway, _LONGEST_GATEWAY))
    for variable, name in (("gateway_name", gateway), ("rayservice_name", service)):
        # A RayService's own Services have ends (ray-head-svc), which of these words matters to vLLM alone.
        if name in _INJECTING and (variable == "gateway_name" or name in ("kubernetes", "vllm")):
            word = str(name).upper()
            yield Problem(
                variable,
                name,
                f"Kubernetes tells a Service to the pods of its namespace in variables that start with {word}_, and"
                " programs that read those fail on it",
                f"write rayplane-{name}, for example",
            )
    for path, group in entries_of(values, "rayservice_worker_groups"):
        name = group.get("name")
        if isinstance(name, str) and not DNS_LABEL.fullmatch(name):
            reason = "a group's name is part of its pods', so it is a DNS label: a-z, 0-9 and inner hyphens"
            yield Problem(f"{path}.name", name, reason, as_label(name))
    yield from _labels(values)


def _labels(values: Values) -> Iterator[Problem]:
    for variable in ("eks_node_groups", "eks_extra_node_groups", "autoscaler_node_pools"):
        for path, entry in entries_of(values, variable):
            yield from _label_set(f"{path}.labels", entry.get("labels"), node=True)
            yield from _taints(path, entry)
    for path, entry in entries_of(values, "namespaces_list"):
        yield from _label_set(f"{path}.labels", entry.get("labels"), node=False)
    for variable in ("rayservice_node_selector", "gateway_node_selector", "kuberay_node_selector"):
        yield from _label_set(variable, values.get(variable), node=None)
    groups: list[tuple[str, Any]] = list(entries_of(values, "rayservice_worker_groups"))
    for path, group in [*groups, ("rayservice_head", values.get("rayservice_head"))]:
        if isinstance(group, Mapping):
            yield from _label_set(f"{path}.node_selector", group.get("node_selector"), node=None)


def _taints(path: str, group: Mapping[str, Any]) -> Iterator[Problem]:
    for where, taint in entries_of({path: group.get("taints")}, path):
        key = taint.get("key")
        if isinstance(key, str) and not _LABEL_KEY.fullmatch(key):
            reason = "a taint's key is at most 63 letters, digits and - _ . behind a DNS name with a slash, or alone"
            yield Problem(
                f"{where.replace(path, f'{path}.taints')}.key",
                key,
                reason,
                "choose another key, such as example.com/team",
            )


def _label_set(path: str, labels: Any, node: bool | None) -> Iterator[Problem]:
    """Labels of a node, of a namespace, or (None) those that a pod looks for on a node."""
    for name, value in labels.items() if isinstance(labels, Mapping) else ():
        key = str(name)
        where = f"{path}.{key}"
        if not _LABEL_KEY.fullmatch(key):
            reason = "a label's key is at most 63 letters, digits and - _ . behind a DNS name with a slash, or alone"
            yield Problem(where, value, reason, "choose another key, such as example.com/team")
        elif isinstance(value, str) and not _LABEL_VALUE.fullmatch(value):
            reason = "a label's value has at most 63 letters, digits and inner - _ ."
            yield Problem(where, value, reason, _shorter(value, 63))
        elif node and _OWN_DOMAIN.fullmatch(key) and not _KUBELET_LABELS.fullmatch(key):
            reason = "the label belongs to Kubernetes or EKS: a kubelet does not start with it, so no node would join"
            yield Problem(where, value, reason, f"write rayplane.io/{key.rpartition('/')[2]}, or a domain of yours")
        elif node is False and key == "kubernetes.io/metadata.name":
            yield Problem(where, value, "Kubernetes sets this label itself", "delete it")
