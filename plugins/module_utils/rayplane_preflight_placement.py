# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules that put pods beside nodes: each Ray pod fits on one, also beside the cluster that an upgrade replaces."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.kube_room import quantity, tolerates
from ansible.module_utils.rayplane_gpus import gpu_of_instance, gpus_named
from ansible.module_utils.rayplane_instances import Machine, machine, room
from ansible.module_utils.rayplane_preflight import Problem
from ansible.module_utils.rayplane_preflight_nodes import filters
from ansible.module_utils.rayplane_preflight_platform import gpus_of_instance
from ansible.module_utils.rayplane_preflight_values import Values, entries_of, strings, whole

__all__ = ["placement"]

WHOLE = "nvidia.com/gpu"
_SHARED = "nvidia.com/gpu.shared"
_DEVICE = re.compile(r"nvidia\.com/(gpu|gpu\.shared|mig-[1-7]g\.[0-9]+gb(\.me)?)(\.shared)?")
_GIB = 2.0**30
_EFFECTS = {"NO_SCHEDULE": "NoSchedule", "NO_EXECUTE": "NoExecute", "PREFER_NO_SCHEDULE": "PreferNoSchedule"}


@dataclass(frozen=True)
class _Nodes:
    """A node group whose machines are known: the smallest of its types, since any of them may come."""

    name: str
    kind: str
    machine: Machine
    gpus: int
    most: int | None
    labels: Mapping[str, str]
    taints: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class _Pod:
    """A pod of the Ray cluster, and the variables that its size comes from."""

    what: str
    cpu: float
    memory: float
    gpus: int
    accelerator: str
    selector: Mapping[str, str]
    tolerations: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, tuple[str, Any]]


def placement(values: Values) -> Iterator[Problem]:
    """Every Ray pod against the largest node that may take it.

    Karpenter chooses machines by the pods, and the nodes of a given cluster are not known: both are left out, and so is
    a pod that only a group with machines unknown here could take.
    """
    yield from _devices(values)
    if values.get("platform") != "aws" or values.get("kubeconfig_source") == "given":
        return
    if values.get("platform_autoscaler") == "karpenter":
        return
    try:
        nodes, whole_list = _nodes(values)
        pods = list(_pods(values))
    except (KeyError, TypeError, AttributeError, ValueError):
        return  # a wrong type, which the argument spec tells
    for pod in pods:
        fit = [entry for entry in nodes if _may_take(entry, pod)]
        if not fit:
            # That a GPU is missing is told by its name (rayplane_preflight_memory.gpu_nodes).
            if whole_list and nodes and not gpus_named(pod.accelerator):
                yield _no_nodes(nodes, pod)
            continue
        if whole_list:
            yield from _too_large(fit, pod)
    if whole_list:
        yield from _upgrade(values, nodes)


def _devices(values: Values) -> Iterator[Problem]:
    """Pods ask for the devices that the nodes give: whole GPUs, shared ones, or slices by their profile."""
    if values.get("gpu_plugin_enabled") is not True:
        return
    mixed = values.get("gpu_plugin_mig_strategy") == "mixed"
    renamed = values.get("gpu_plugin_time_slicing_rename") is True
    partitioned = [
        (group.get("labels") or {}).get("nvidia.com/mig.config", "all-disabled") != "all-disabled"
        for _, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups"))
        if "NVIDIA" in str(group.get("ami_type"))
    ]
    ours = values.get("gpu_plugin_mode") == "gpu_operator" and values.get("platform") == "aws" and bool(partitioned)
    if mixed and ours and not any(partitioned):
        yield Problem(
            "gpu_plugin_mig_strategy",
            "mixed",
            "no node group bears the label nvidia.com/mig.config, without which GPUs stay whole",
            "give its labels nvidia.com/mig.config: all-1g.10gb, for example",
            warning=True,
        )
    pods = [(f"{path}.resources", entry.get("resources")) for path, entry in entries_of(values, "rayservice_models")]
    for path, wanted in (*pods, *entries_of(values, "rayservice_worker_groups")):
        if not isinstance(wanted, Mapping) or not wanted.get("gpu"):
            continue
        name = wanted.get("gpu_resource", WHOLE)
        slices = str(name).startswith("nvidia.com/mig-")
        reason = cure = ""
        if not isinstance(name, str) or not _DEVICE.fullmatch(name):
            reason = "NVIDIA's plugin knows no such device"
            cure = f"write {WHOLE}, {_SHARED}, or a slice such as nvidia.com/mig-1g.10gb"
        elif slices and not mixed:
            reason = "slices have names of their own only where gpu_plugin_mig_strategy is mixed"
            cure = f"set it to mixed, or write {WHOLE}"
        elif slices and ours and not any(partitioned):
            reason = "no node group has slices: none bears the label nvidia.com/mig.config"
            cure = "label one in eks_node_groups or eks_extra_node_groups"
        elif name == WHOLE and mixed and ours and all(partitioned):
            reason = "the nodes' GPUs are partitioned, and each slice is a device named by its profile"
            cure = "write the slice's name, such as nvidia.com/mig-3g.20gb"
        elif name == WHOLE and renamed and values.get("gpu_plugin_time_slicing_replicas"):
            reason = f"gpu_plugin_time_slicing_rename gives shared GPUs the name {_SHARED}"
            cure = f"write {_SHARED}"
        elif name == _SHARED and not renamed:
            reason = "GPUs have this name only with gpu_plugin_time_slicing_rename"
            cure = f"set it to true, or write {WHOLE}"
        if reason:
            yield Problem(f"{path}.gpu_resource", name, reason, cure)


def _nodes(values: Values) -> tuple[list[_Nodes], bool]:
    """The node groups with known machines, and whether those are all."""
    found, complete = [], True
    for _, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups")):
        types = group.get("instance_types")
        if not strings(types) or not types:
            complete = False
            continue
        machines = [(kind, machine(kind), gpus_of_instance(kind)) for kind in types]
        known = [(kind, made, gpus) for kind, made, gpus in machines if made is not None and gpus is not None]
        if len(known) != len(machines):
            complete = False
            continue
        kind, smallest, gpus = min(known, key=lambda entry: (entry[1].memory, entry[1].vcpus))
        labels = {str(key): str(value) for key, value in (group.get("labels") or {}).items()}
        taints = tuple(
            {**taint, "effect": _EFFECTS.get(str(taint.get("effect")), str(taint.get("effect")))}
            for taint in group.get("taints") or ()
        )
        most = group.get("max_size")
        found.append(
            _Nodes(str(group.get("name")), kind, smallest, gpus, most if whole(most) else None, labels, taints)
        )
    return found, complete


def _pods(values: Values) -> Iterator[_Pod]:
    serve = filters("rayplane_serve")
    settings = {
        name.removeprefix("rayservice_"): value for name, value in values.items() if name.startswith("rayservice_")
    }
    head = settings["head"]
    beside = settings["autoscaler"] if settings.get("autoscaling") else {"cpu": 0, "memory": 0}
    yield _Pod(
        "the head, with Ray's autoscaler beside it",
        quantity(head["cpu"]) + quantity(beside.get("cpu", 0)),
        quantity(head["memory"]) + quantity(beside.get("memory", 0)),
        0,
        "",
        {**settings.get("node_selector", {}), **(head.get("node_selector") or {})},
        (*settings.get("tolerations", ()), *(head.get("tolerations") or ())),
        {key: (f"rayservice_head.{key}", head[key]) for key in ("cpu", "memory")},
    )
    models = list(entries_of(values, "rayservice_models"))
    given = list(entries_of(values, "rayservice_worker_groups"))
    for index, group in enumerate(serve.rayservice_worker_groups([entry for _, entry in models], settings)):
        gpus, accelerator = int(group.get("gpu", 0)), str(group.get("accelerator") or "")
        known = settings["accelerators"].get(accelerator, {})
        tolerations = (*settings.get("tolerations", ()), *(group.get("tolerations") or ()))
        if gpus:
            tolerations += ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},)
        yield _Pod(
            f"a pod of the worker group {group['name']}",
            quantity(group["cpu"]),
            quantity(group["memory"]),
            # A GPU has several slices: only that there is one can be told from here.
            gpus if group.get("gpu_resource", WHOLE) == WHOLE else min(gpus, 1),
            accelerator,
            {
                **settings.get("node_selector", {}),
                **(known.get("node_selector") or {}),
                **(group.get("node_selector") or {}),
            },
            tolerations,
            {
                **{key: _origin(key, group, index, given, models) for key in ("cpu", "memory", "gpu")},
                "accelerator": _origin("accelerator", group, index, given, models),
            },
        )


def _origin(
    key: str,
    group: Mapping[str, Any],
    index: int,
    given: list[tuple[str, Mapping[str, Any]]],
    models: list[tuple[str, Mapping[str, Any]]],
) -> tuple[str, Any]:
    """The variable that a group's size comes from: the group's own, a model's, or the CPU group's smallest size."""
    if given:
        return f"{given[index][0]}.{key}", group.get(key)
    for path, entry in models:
        resources = entry.get("resources") or {}
        at_home = bool(resources.get("gpu")) == bool(group.get("gpu"))
        if at_home and resources.get(key) == group.get(key) and group.get(key) is not None:
            return f"{path}.resources.{key}", group[key]
    return f"rayservice_cpu_group.{key}", group.get(key)


def _may_take(entry: _Nodes, pod: _Pod) -> bool:
    """Whether pods of this kind may run in the node group, whatever their size."""
    own = {"rayplane.io", "nvidia.com"}
    if any(
        entry.labels.get(key) != value
        for key, value in pod.selector.items()
        # Kubernetes and the cloud put further labels on a node, which are not known here.
        if key in entry.labels or key.split("/")[0] in own
    ):
        return False
    if not all(tolerates({"tolerations": list(pod.tolerations)}, dict(taint)) for taint in entry.taints):
        return False
    return not pod.gpus or (entry.gpus >= pod.gpus and _same_gpu(pod.accelerator, entry))


def _same_gpu(wanted: str, entry: _Nodes) -> bool:
    """Whether a group has the GPU of this name; no name, or one that is not known here, means any."""
    named = gpus_named(wanted)
    return not named or gpu_of_instance(entry.kind) in named


def _no_nodes(nodes: list[_Nodes], pod: _Pod) -> Problem:
    variable, value = pod.variables.get("gpu" if pod.gpus else "cpu") or next(iter(pod.variables.values()))
    have = ", ".join(f"{entry.name} ({entry.kind}{f', {entry.gpus} GPUs' if entry.gpus else ''})" for entry in nodes)
    lacks = f"{pod.gpus} GPUs for one pod" if pod.gpus else "the labels that it selects and no taint that it lacks"
    return Problem(
        variable,
        value,
        f"no node group takes {pod.what}: none has {lacks}; there are {have}",
        "add a node group with such machines to eks_extra_node_groups, or ask for what one of these has",
    )


def _too_large(fit: list[_Nodes], pod: _Pod) -> Iterator[Problem]:
    rooms = [(entry, room(entry.machine)) for entry in fit]
    if any(left.cpu >= pod.cpu and left.memory >= pod.memory for _, left in rooms):
        return
    for key, wanted, unit in (("cpu", pod.cpu, "CPUs"), ("memory", pod.memory, "GiB")):
        entry, left = max(rooms, key=lambda pair: getattr(pair[1], key))
        most = getattr(left, key)
        if wanted <= most:
            continue
        scale = _GIB if key == "memory" else 1.0
        total = entry.machine.memory / _GIB if key == "memory" else entry.machine.vcpus
        fitting = f"{math.floor(most / _GIB)}Gi" if key == "memory" else math.floor(most * 10) / 10
        variable, value = pod.variables[key]
        yield Problem(
            variable,
            value,
            f"{pod.what} asks for {wanted / scale:.4g} {unit}, and the largest node that may take it, {entry.kind} in"
            f" {entry.name}, has {most / scale:.3g} of its {total:g} left for pods (the kubelet and each node's own"
            " pods keep the rest)",
            f"write {fitting} or less, or give the group larger machines",
        )


def _upgrade(values: Values, nodes: list[_Nodes]) -> Iterator[Problem]:
    """Room for a second cluster beside the first, and for all replicas that the bounds allow."""
    if values.get("rayservice_worker_groups"):
        return
    strategy = values.get("rayservice_upgrade_strategy")
    kinds: dict[str, list[tuple[str, int, int, Mapping[str, Any]]]] = {}
    for path, entry in entries_of(values, "rayservice_models"):
        resources, replicas = entry.get("resources") or {}, entry.get("replicas") or {}
        gpus, low = resources.get("gpu", 0), replicas.get("min", 1)
        high = replicas.get("max", low)
        if resources.get("gpu_resource", WHOLE) != WHOLE:
            return
        if whole(gpus) and gpus and whole(low) and whole(high):
            kinds.setdefault(str(resources.get("accelerator") or ""), []).append(
                (path, low * gpus, high * gpus, replicas)
            )
    for kind, models in kinds.items():
        homes = [entry for entry in nodes if entry.gpus and _same_gpu(kind, entry)]
        if not homes or any(entry.most is None for entry in homes):
            continue
        most = sum(entry.gpus * int(entry.most or 0) for entry in homes)
        per_node = max(entry.gpus for entry in homes)
        reach = f"the node groups reach {most}: " + ", ".join(
            f"{entry.name} ({entry.most} x {entry.gpus})" for entry in homes
        )
        running, wanted = sum(entry[1] for entry in models), sum(entry[2] for entry in models)
        path, _, _, replicas = max(models, key=lambda entry: entry[2])
        if running > most:
            yield Problem(
                f"{path}.replicas.min",
                replicas.get("min", 1),
                f"the least replicas of the models want {running} GPUs, and {reach}",
                f"raise max_size of a node group by {-(-(running - most) // per_node)}, or lower min",
            )
            continue
        if wanted > most:
            yield Problem(
                f"{path}.replicas.max",
                replicas.get("max"),
                f"all replicas that the models' bounds allow want {wanted} GPUs, and {reach}",
                f"raise max_size of a node group by {-(-(wanted - most) // per_node)}, or lower max",
                warning=True,
            )
        if strategy != "None" and 2 * running > most:
            yield Problem(
                "rayservice_upgrade_strategy",
                strategy,
                f"an upgrade starts a second cluster beside the first, which takes {2 * running} GPUs at least, and"
                f" {reach}; it would never be ready",
                f"raise max_size by {-(-(2 * running - most) // per_node)}, or write None and delete the RayService"
                " before a change of its cluster",
                warning=True,
            )
