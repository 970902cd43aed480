# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over models and the GPUs that they are given: memory, and nodes that have the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible.module_utils.rayplane_eks import node_labels
from ansible.module_utils.rayplane_gpus import GPU_LABEL, GPUS, Gpu, gpu_of_instance, gpus_named, label_value
from ansible.module_utils.rayplane_memory import Shape, cures, need, shape_of, sum_line
from ansible.module_utils.rayplane_preflight import ABSENT, Problem
from ansible.module_utils.rayplane_preflight_values import Values, entries_of, strings, whole

__all__ = ["gpu_memory", "gpu_nodes", "model_gpu"]


def _node_groups(values: Values) -> Iterator[Mapping[str, Any]]:
    """The node groups that can have nodes; none where the nodes are another cluster's, or Karpenter's."""
    given = values.get("kubeconfig_source") == "given" or values.get("platform_autoscaler") == "karpenter"
    if values.get("platform") != "aws" or given:
        return
    for name in ("eks_node_groups", "eks_extra_node_groups"):
        yield from (group for _, group in entries_of(values, name) if group.get("max_size") != 0)


def _types(group: Mapping[str, Any]) -> Sequence[str]:
    types: Any = group.get("instance_types")
    return types if strings(types) else ()


def _accelerator(entry: Mapping[str, Any]) -> str | None:
    """The accelerator of a model that asks for GPUs, empty for any; None for a model without."""
    resources = entry.get("resources")
    count: Any = resources.get("gpu") if isinstance(resources, Mapping) else None
    return (
        str(resources.get("accelerator") or "") if isinstance(resources, Mapping) and whole(count) and count else None
    )


def model_gpu(values: Values, entry: Mapping[str, Any]) -> Gpu | None:
    """The GPU that a model gets: of the nodes that may take it, the one with the least memory.

    Where no node group is known to have it, the name alone tells, and of two sizes it may mean the larger. None where
    nothing is known, or no GPU asked for.
    """
    accelerator = _accelerator(entry)
    if accelerator is None:
        return None
    have = [gpu for group in _node_groups(values) for kind in _types(group) if (gpu := gpu_of_instance(kind))]
    named = gpus_named(accelerator) if accelerator else GPUS
    if fitting := [gpu for gpu in have if gpu in named]:
        return min(fitting, key=lambda gpu: gpu.memory)
    return max(named, key=lambda gpu: gpu.memory) if accelerator and named else None


def gpu_memory(values: Values) -> Iterator[Problem]:
    """Each model fits its GPU's memory, where both are known."""
    if values.get("gpu_plugin_mig_strategy") not in (None, "none"):
        return
    for path, entry in entries_of(values, "rayservice_models"):
        gpu, engine = model_gpu(values, entry), entry.get("engine") or {}
        if gpu is None or not isinstance(engine, Mapping):
            continue
        shape = shape_of(entry.get("source"))
        if shape and not entry.get("placement") and not engine.get("kv_cache_memory_bytes"):
            yield from _fits(path, entry["resources"], engine, shape, gpu)


def _fits(
    path: str, resources: Mapping[str, Any], engine: Mapping[str, Any], shape: Shape, gpu: Gpu
) -> Iterator[Problem]:
    found = need(shape, engine, gpu)
    if found.fits and not found.tight:
        return
    known = "accelerator" if resources.get("accelerator") else "gpu"
    told = sum_line(found, shape, gpu)
    if found.fits:
        reason = f"it fits with little to spare: {told}; sequences of {found.length:,} tokens that fit: "
        reason += f"{found.sequences:.1f}"
    else:
        reason = f"the model does not fit: {told}"
    choices = list(cures(shape, engine, gpu, roomy=found.fits))
    # What a shorter length cures is the length's fault.
    long = any(choice.startswith("max_model_len") for choice in choices)
    variable = f"{path}.engine.max_model_len" if long else f"{path}.resources.{known}"
    value = engine.get("max_model_len", ABSENT) if long else resources[known]
    cure = "one of: " + "; ".join(choices) if choices else "a smaller model, or several of the changes together"
    yield Problem(variable, value, reason, cure, warning=found.fits)


def gpu_nodes(values: Values) -> Iterator[Problem]:
    """The accelerator of each model is on the nodes of a group, and they bear the label that its pods select."""
    label: Any = values.get("rayservice_gpu_node_label")
    groups = list(_node_groups(values))
    if label != GPU_LABEL or not groups or values.get("rayservice_worker_groups"):
        return
    own: Any = values.get("rayservice_accelerators")
    labels = values.get("eks_gpu_ready_label") is not False
    borne = {}
    for group in groups:
        given: Any = group.get("labels")
        image = str(group.get("ami_type", ""))
        all_labels = node_labels(image, _types(group), gpu_label=labels) | (
            dict(given) if isinstance(given, Mapping) else {}
        )
        borne[str(group.get("name"))] = all_labels.get(label, "")
    for path, entry in entries_of(values, "rayservice_models"):
        accelerator = _accelerator(entry) or ""
        settings = own.get(accelerator) if isinstance(own, Mapping) else None
        wanted = label_value(accelerator, label)
        if not wanted or wanted in borne.values() or (isinstance(settings, Mapping) and settings.get("node_selector")):
            continue
        have = ", ".join(f"{name}: {value}" for name, value in borne.items() if value) or "no group has one"
        families = [family for gpu in gpus_named(accelerator) for family in gpu.families]
        yield Problem(
            f"{path}.resources.accelerator",
            accelerator,
            f"no node group has this GPU alone: pods for it select nodes with the label {label}={wanted} ({have})",
            f"add a node group of {' or '.join(families)} machines to eks_extra_node_groups, name a GPU that is there,"
            f" or set rayservice_accelerators.{accelerator}.node_selector",
        )
