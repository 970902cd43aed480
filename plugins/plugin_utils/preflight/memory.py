# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over models and the GPUs that they are given: memory, and nodes that have the GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import node_labels
from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import (
    GPU_LABEL,
    GPUS,
    Gpu,
    gpu_of_instance,
    gpus_named,
    label_value,
)
from ansible_collections.rayplane.platform.plugins.module_utils.serving.memory import (
    UTILIZATION,
    Shape,
    cures,
    guess_of,
    need,
    shape_of,
    sum_line,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    Values,
    entries_of,
    strings,
    whole,
)

__all__ = ["gpu_memory", "gpu_nodes", "model_gpu"]

#: A MIG profile: its name and the GB of memory in it, of which CUDA calls a part the total.
_PROFILE = re.compile(r"[1-7]g\.(\d+)gb")
_OF_SLICE = 0.98


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
    # Pods find their nodes by a label, which two sizes of a kind share.
    alike = {gpu.label for gpu in named} if any(gpu in named for gpu in have) else ()
    if fitting := [gpu for gpu in have if gpu.label in alike]:
        gpu = min(fitting, key=lambda gpu: gpu.memory)
    elif accelerator and named:
        gpu = max(named, key=lambda gpu: gpu.memory)
    else:
        return None
    profile = _profile(values, entry, gpu)
    return replace(gpu, name=f"slice-{profile[0]}", memory=_OF_SLICE * int(profile[1])) if profile else gpu


def _profile(values: Values, entry: Mapping[str, Any], gpu: Gpu) -> re.Match[str] | None:
    """The MIG profile of a model's device: of its own name, or of the nodes where all slices are alike."""
    strategy = values.get("gpu_plugin_mig_strategy")
    if strategy == "mixed":
        return _PROFILE.search(str(entry["resources"].get("gpu_resource", "")))
    labels = [
        group.get("labels")
        for group in _node_groups(values)
        if gpu in {gpu_of_instance(kind) for kind in _types(group)}
    ]
    said = [str(one.get("nvidia.com/mig.config", "")) for one in labels if isinstance(one, Mapping)]
    return _PROFILE.search(said[0]) if strategy == "single" and said else None


def gpu_memory(values: Values) -> Iterator[Problem]:
    """Each model fits its GPU's memory, where both are known."""
    slicing: Any = values.get("gpu_plugin_time_slicing_replicas")
    for path, entry in entries_of(values, "rayservice_models"):
        gpu, engine = model_gpu(values, entry), entry.get("engine") or {}
        if gpu is None or not isinstance(engine, Mapping):
            continue
        known = shape_of(entry.get("source"))
        shape = known or guess_of(entry.get("source"))
        length = engine.get("max_model_len")
        # A length that is none is told elsewhere, and that the model's own does not fit would mislead.
        said = length is None or (whole(length) and (length > 0 or length == -1))
        judged = shape and said and not entry.get("placement")
        if shape and judged and not engine.get("kv_cache_memory_bytes"):
            yield from _fits(path, entry["resources"], engine, shape, gpu, guessed=known is None)
        device = str(entry["resources"].get("gpu_resource", "nvidia.com/gpu")).removesuffix(".shared")
        yield from _shared(path, engine, slicing.get(device) if isinstance(slicing, Mapping) else None)


def _shared(path: str, engine: Mapping[str, Any], replicas: Any) -> Iterator[Problem]:
    """Time slicing divides no memory: what each engine takes has to leave the others their share."""
    share = engine.get("gpu_memory_utilization", UTILIZATION)
    if whole(replicas) and replicas > 1 and isinstance(share, float) and share * replicas > 1:
        yield Problem(
            f"{path}.engine.gpu_memory_utilization",
            share,
            f"gpu_plugin_time_slicing_replicas lets {replicas} pods share a GPU, whose memory is not divided: together"
            f" they take {share} x {replicas} = {share * replicas:.2f} of it, and vLLM does not start where its share"
            " is not free",
            f"write {int(100 / replicas) / 100} or less",
            warning=True,
        )


def _fits(
    path: str, resources: Mapping[str, Any], engine: Mapping[str, Any], shape: Shape, gpu: Gpu, *, guessed: bool
) -> Iterator[Problem]:
    """``guessed`` is a shape that the name suggests: what it says is worth a warning, and only where nothing fits."""
    found = need(shape, engine, gpu)
    if found.fits and (guessed or not found.tight):
        return
    known = "accelerator" if resources.get("accelerator") else "gpu"
    told = sum_line(found, shape, gpu)
    if found.fits:
        reason = f"it fits with little to spare: {told}; sequences of {found.length:,} tokens that fit: "
        reason += f"{found.sequences:.1f}"
    else:
        reason = f"{'by its name ' * guessed}the model does not fit: {told}"
    choices = list(cures(shape, engine, gpu, roomy=found.fits))
    # What a shorter length cures is the length's fault.
    long = any(choice.startswith("max_model_len") for choice in choices)
    variable = f"{path}.engine.max_model_len" if long else f"{path}.resources.{known}"
    value = engine.get("max_model_len", ABSENT) if long else resources[known]
    cure = "one of: " + "; ".join(choices) if choices else "a smaller model, or several of the changes together"
    yield Problem(variable, value, reason, cure, warning=found.fits or guessed)


def gpu_nodes(values: Values) -> Iterator[Problem]:
    """The accelerator of each model or worker group is on the nodes of a node group that bear the label it selects."""
    groups = {str(group.get("name")): group for group in _node_groups(values)}
    if not groups or not all(map(_types, groups.values())):
        return
    given = list(entries_of(values, "rayservice_worker_groups"))
    label: Any = values.get("rayservice_gpu_node_label") if not given else ""
    own: Any = values.get("rayservice_accelerators")
    kinds = {name: {gpu_of_instance(kind) for kind in _types(group)} for name, group in groups.items()}
    borne = {name: _labels(values, group).get(label, "") for name, group in groups.items()}
    wanting = [(f"{path}.resources", _accelerator(entry)) for path, entry in entries_of(values, "rayservice_models")]
    if given:
        wanting = [(path, _accelerator({"resources": entry})) for path, entry in given]
    for path, accelerator in wanting:
        settings = own.get(accelerator) if isinstance(own, Mapping) else None
        named = gpus_named(accelerator or "")
        if not named or (isinstance(settings, Mapping) and settings.get("node_selector")):
            continue
        families = [family for gpu in named for family in gpu.families]
        machines = f"{' or '.join(families)} machines"
        otherwise = f"set rayservice_accelerators.{accelerator}.node_selector"
        homes = [name for name, here in kinds.items() if here & set(named)]
        wanted = label_value(accelerator or "", label) if label == GPU_LABEL else ""
        bearing = [name for name in groups if borne[name] == wanted and wanted]
        others = [name for name in bearing if not kinds[name] <= set(named)]
        if not homes or (wanted and not bearing):
            have = (
                {name: borne[name] or "" for name in groups}
                if wanted
                else {name: ", ".join(gpu.title for gpu in here if gpu) for name, here in kinds.items()}
            )
            there = ", ".join(f"{name}: {value}" for name, value in have.items() if value) or "no group has one"
            select = f" alone: pods for it select nodes with the label {label}={wanted}" if wanted else ""
            yield Problem(
                f"{path}.accelerator",
                accelerator,
                f"no node group has this GPU{select} ({there})",
                f"add a node group of {machines} to eks_extra_node_groups, name a GPU that is there, or {otherwise}",
            )
        elif others:
            yield Problem(
                f"{path}.accelerator",
                accelerator,
                f"pods for it select nodes with the label {label}={wanted}, which other GPUs bear as well"
                f" ({', '.join(others)})",
                f"leave one of the groups out, or {otherwise}",
                warning=True,
            )


def _labels(values: Values, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The labels that the group's nodes bear."""
    given: Any = group.get("labels")
    ready = values.get("eks_gpu_ready_label") is not False
    made = node_labels(str(group.get("ami_type", "")), _types(group), gpu_label=ready)
    return {**made, **(given if isinstance(given, Mapping) else {})}
