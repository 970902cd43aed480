# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over what stands around the nodes: autoscaler, GPU and Neuron plugins, keys, buckets, volumes.

What a role's own filter refuses while it builds its objects is asked of that filter here, before anything is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter import rayplane_autoscaler, rayplane_gpu, rayplane_storage
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import gp3_problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem, split_path, step
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    Values,
    entries_of,
    strings,
    whole,
)

__all__ = ["accelerators", "autoscaler", "encryption", "node_tools", "storage", "volumes"]

_MINOR = re.compile(r"v?(\d+\.\d+)(\.\d+)?([-+].*)?")
_KEY_ARN = re.compile(r"arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:key/[0-9A-Za-z-]+")
#: EventBridge's rules carry the cluster's name and a suffix, in 64 characters.
_QUEUE_NAME = 39


def _told(sentence: str, values: Values, fallback: str) -> Problem:
    """A filter's sentence (variable, value, reason, cure) as a problem."""
    text = sentence.rstrip(".")
    match = re.match(r"[a-z]+_[a-z_]+(\[\d+\])?", text)
    variable = match[0] if match else fallback
    root, *rest = split_path(variable)
    value: Any = values.get(str(root))
    for part in rest:
        value = step(value, part)
    mark = next((mark for mark in (". ", "; ", ": ") if mark in text), ": ")
    reason, _, cure = text.rpartition(mark)
    return Problem(variable, value, reason or text, cure if reason else "see the README of its role")


def autoscaler(values: Values) -> Iterator[Problem]:
    """The autoscaler fits the cluster's version, and Karpenter's pools are possible."""
    kind = values.get("platform_autoscaler")
    if kind == "cluster_autoscaler" and values.get("platform") == "aws":
        wanted, found = values.get("eks_kubernetes_version"), values.get("autoscaler_version")
        match = _MINOR.fullmatch(found) if isinstance(found, str) else None
        if match and isinstance(wanted, str) and wanted and match[1] != wanted:
            yield Problem(
                "autoscaler_version",
                found,
                f"the cluster autoscaler simulates the scheduler of its own version, and the cluster is {wanted}",
                f"take a release v{wanted}.x",
                warning=True,
            )
    if kind != "karpenter":
        return
    name = values.get("platform_cluster_name")
    if isinstance(name, str) and len(name) > _QUEUE_NAME:
        yield Problem(
            "platform_cluster_name",
            name,
            f"with karpenter it is part of the names of EventBridge rules, and has {len(name)} characters",
            f"use {_QUEUE_NAME} or fewer",
        )
    pools, classes = values.get("autoscaler_node_pools"), values.get("autoscaler_node_classes")
    try:
        found = rayplane_autoscaler.karpenter_problems(pools or (), classes or ())
    except (TypeError, AttributeError):
        found = []  # a wrong type, which the argument spec tells
    for sentence in found:
        yield _told(sentence, values, "autoscaler_node_pools")
    for path, group in entries_of(values, "eks_node_groups"):
        if "NVIDIA" in str(group.get("ami_type", "")) and group.get("max_size"):
            yield Problem(
                f"{path}.name",
                group.get("name"),
                "Karpenter starts GPU nodes itself, and a managed group of them stays at its desired size beside it",
                "leave the group out of eks_node_groups, or mean it",
                warning=True,
            )


def accelerators(values: Values) -> Iterator[Problem]:
    """Settings of the GPU plugin go together, and with the images of the nodes."""
    if values.get("gpu_plugin_enabled") is not True:
        return
    settings = {
        name.removeprefix("gpu_plugin_"): value for name, value in values.items() if name.startswith("gpu_plugin_")
    }
    try:
        found = rayplane_gpu.problems(settings)
    except (KeyError, TypeError, AttributeError, ValueError):
        # A wrong type, which the argument spec tells.
        found = []
    for sentence in found:
        yield _told(sentence, values, "gpu_plugin_mode")
    if values.get("platform") != "aws" or values.get("kubeconfig_source") == "given":
        return
    for path, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups")):
        image: Any = group.get("ami_type")
        labels = group.get("labels")
        if not isinstance(image, str):
            continue
        if "NEURON" in image and values.get("gpu_plugin_neuron_enabled") is False:
            yield Problem(
                f"{path}.ami_type",
                image,
                "Kubernetes sees the accelerators of these nodes only through the Neuron device plugin",
                "set gpu_plugin_neuron_enabled to true",
            )
        own_plugin = image.startswith("BOTTLEROCKET") and "NVIDIA" in image
        given = labels.get("nvidia.com/gpu.deploy.device-plugin") if isinstance(labels, Mapping) else None
        if own_plugin and values.get("gpu_plugin_mode") == "gpu_operator" and given != "false":
            yield Problem(
                f"{path}.labels",
                labels or {},
                "this image has a device plugin of its own, and the operator would put a second one beside it",
                'add the label nvidia.com/gpu.deploy.device-plugin: "false"',
            )


def encryption(values: Values) -> Iterator[Problem]:
    """The key that everything is encrypted with is named by its ARN; one that is made has possible dates."""
    if values.get("platform") != "aws":
        return
    key, made = values.get("platform_kms_key_arn"), values.get("encryption_enabled") is True
    if isinstance(key, str) and key and not _KEY_ARN.fullmatch(key):
        yield Problem(
            "platform_kms_key_arn",
            key,
            "EKS, EBS and S3 together take a key only by its ARN",
            "write arn:aws:kms:REGION:ACCOUNT:key/ID, or leave it empty and set encryption_enabled",
        )
    elif key and made:
        yield Problem(
            "encryption_enabled",
            True,
            "no key is made, because platform_kms_key_arn names one",
            "set it to false, or leave platform_kms_key_arn empty",
            warning=True,
        )
    for name, low, high in (("encryption_pending_days", 7, 30), ("encryption_rotation_days", 90, 2560)):
        found = values.get(name)
        if made and whole(found) and not low <= found <= high:
            yield Problem(name, found, f"KMS takes {low} to {high} days", f"write {min(max(found, low), high)}")


def storage(values: Values) -> Iterator[Problem]:
    """Buckets are possible as declared, and so are the classes of volumes."""
    if values.get("platform") != "aws":
        return
    settings = {
        name.removeprefix("storage_"): value for name, value in values.items() if name.startswith("storage_")
    } | {"logs_bucket": values.get("platform_logs_bucket"), "region": values.get("platform_region")}
    if values.get("encryption_enabled") is True and not settings.get("kms_key_id"):
        settings["kms_key_id"] = "made by the role encryption"
    try:
        buckets: Any = values.get("storage_buckets")
        rayplane_storage.storage_bucket_set(buckets, settings)
    except AnsibleFilterError as error:
        yield _told(str(error), values, "storage_buckets")
    except (KeyError, TypeError, AttributeError, ValueError):
        pass  # a wrong type, which the argument spec tells
    if values.get("storage_class_efs_enabled") is True:
        wanted = values.get("storage_class_efs_file_system")
        named = [entry.get("name") for _, entry in entries_of(values, "storage_efs_file_systems")]
        if values.get("storage_efs_enabled") is not True:
            yield Problem(
                "storage_class_efs_enabled", True, "there is no file system for it", "set storage_efs_enabled to true"
            )
        elif wanted not in named:
            yield Problem(
                "storage_class_efs_file_system",
                wanted,
                "storage_efs_file_systems has none of this name",
                f"name one of {', '.join(map(str, named)) or 'them'}",
            )


def volumes(values: Values) -> Iterator[Problem]:
    """Disks of nodes and volumes of claims are such as gp3 has."""
    if values.get("storage_class_enabled") is True:
        yield from _gp3(values, "storage_class_", "storage_class_")
    if values.get("platform") != "aws":
        return
    karpenter = ["autoscaler_node_classes"] * (values.get("platform_autoscaler") == "karpenter")
    for name in ("eks_node_groups", "eks_extra_node_groups", *karpenter):
        for path, entry in entries_of(values, name):
            if not entry.get("launch_template"):
                yield from _gp3({"disk_size": 100, **entry}, "disk_", f"{path}.disk_")


def _gp3(options: Mapping[str, Any], prefix: str, path: str) -> Iterator[Problem]:
    iops, throughput, size = (options.get(prefix + key, 0) for key in ("iops", "throughput", "size"))
    if whole(iops) and whole(throughput) and whole(size) and (found := gp3_problem(iops, throughput, size)):
        yield Problem(f"{path}{found[0]}", options[f"{prefix}{found[0]}"], found[1], found[2])


def node_tools(values: Values) -> dict[str, str]:
    """Commands of the controller that the roles for nodes need, and what for."""
    tools: dict[str, str] = {}
    if values.get("platform_autoscaler") == "karpenter" and strings([values.get("autoscaler_helm")]):
        tools[str(values["autoscaler_helm"])] = "it renders Karpenter's chart"
    operator = values.get("gpu_plugin_mode") == "gpu_operator"
    discovery = values.get("gpu_plugin_feature_discovery_enabled") is True and values.get("gpu_plugin_nfd_enabled")
    if (
        values.get("gpu_plugin_enabled") is True
        and (operator or discovery)
        and strings([values.get("gpu_plugin_helm")])
    ):
        tools[str(values["gpu_plugin_helm"])] = "it renders the charts of GPU nodes"
    balancers = values.get("load_balancer_controller_enabled") is True
    if balancers and strings([values.get("load_balancer_controller_helm")]):
        tools[str(values["load_balancer_controller_helm"])] = "it renders the load balancer controller's chart"
    return tools
