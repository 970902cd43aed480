# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules that put pods beside nodes: each of Ray and of the gateway fits on one, and Ray's beside the cluster that an
upgrade replaces."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ansible_collections.rayplane.platform.plugins.filter import rayplane_serve
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import node_labels
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import (
    Machine,
    gpus_of_instance,
    machine,
    room,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.quantity import quantity
from ansible_collections.rayplane.platform.plugins.module_utils.kube.room import requests_of, tolerates
from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import gpu_of_instance, gpus_named
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    Values,
    entries_of,
    strings,
    whole,
)

__all__ = ["placement"]

WHOLE = "nvidia.com/gpu"
_SHARED = "nvidia.com/gpu.shared"
_DEVICE = re.compile(r"nvidia\.com/(gpu|gpu\.shared|mig-[1-7]g\.[0-9]+gb(\.me)?)(\.shared)?")
_SLICE = re.compile(r"nvidia\.com/mig-(\d)g")
_GIB = 2.0**30
_UNITS = {"cpu": "CPUs", "memory": "GiB"}
#: Labels that Kubernetes, the cloud, Karpenter and NVIDIA's feature discovery put on nodes.
_OTHERS_LABELS = re.compile(r"(.+\.)?(kubernetes\.io|k8s\.io|k8s\.aws|amazonaws\.com|karpenter\.sh|nvidia\.com)/.*")


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
    """A pod, and the variables that its size comes from."""

    what: str
    cpu: float
    memory: float
    #: Whole GPUs, or the part of one that a slice is.
    gpus: Fraction
    accelerator: str
    selector: Mapping[str, str]
    tolerations: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, tuple[str, Any]]
    #: How many there are at least and at most.
    least: int = 1
    most: int = 1


def placement(values: Values) -> Iterator[Problem]:
    """Every pod of Ray and of the gateway against the largest node that may take it.

    Karpenter chooses machines by the pods, and the nodes of a given cluster are not known: both are left out, and so is
    a pod that only a group with machines unknown here could take.
    """
    yield from _devices(values)
    if values.get("platform") != "aws" or values.get("kubeconfig_source") == "given":
        return
    if values.get("platform_autoscaler") == "karpenter":
        return
    for rule in (_ray_beside_nodes, _gateway_beside_nodes):
        try:
            nodes, whole_list = _nodes(values)
            found = list(rule(values, nodes)) if nodes and whole_list else []
        except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
            continue  # a wrong type or no quantity, which the argument spec or the rules of models tell
        yield from found


def _ray_beside_nodes(values: Values, nodes: list[_Nodes]) -> Iterator[Problem]:
    pods = list(_pods(values))
    yield from _beside_nodes(nodes, pods)
    yield from _capacity(values, nodes, pods)


def _gateway_beside_nodes(values: Values, nodes: list[_Nodes]) -> Iterator[Problem]:
    yield from _beside_nodes(nodes, _gateway_pods(values))


def _beside_nodes(nodes: list[_Nodes], pods: Iterable[_Pod]) -> Iterator[Problem]:
    most = max(entry.gpus for entry in nodes)
    homeless: dict[str, Problem] = {}
    for pod in pods:
        fit = [entry for entry in nodes if _may_take(entry, pod)]
        if fit:
            yield from _too_large(fit, pod)
            yield from _too_large_for_some(fit, pod)
        # That a GPU is missing is told by its name (rayplane_preflight_memory.gpu_nodes), and that a model asks for
        # more than any node has by rayplane_preflight_platform.node_groups.
        elif not gpus_named(pod.accelerator) and not (pod.gpus > most and "models" in pod.variables["gpu"][0]):
            problem = _no_nodes(nodes, pod)
            homeless.setdefault(problem.variable, problem)
    yield from homeless.values()


def _devices(values: Values) -> Iterator[Problem]:
    """Pods ask for the devices that the nodes give: whole GPUs, shared ones, or slices by their profile."""
    if values.get("gpu_plugin_enabled") is not True:
        return
    mixed = values.get("gpu_plugin_mig_strategy") == "mixed"
    renamed = values.get("gpu_plugin_time_slicing_rename") is True
    partitioned = [
        isinstance(labels := group.get("labels"), Mapping)
        and labels.get("nvidia.com/mig.config", "all-disabled") != "all-disabled"
        for _, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups"))
        if "NVIDIA" in str(group.get("ami_type"))
    ]
    ours = values.get("gpu_plugin_mode") == "gpu_operator" and values.get("platform") == "aws" and bool(partitioned)
    if mixed and ours and not any(partitioned):
        yield Problem(
            "gpu_plugin_mig_strategy",
            "mixed",
            "no node group bears the label nvidia.com/mig.config, without which GPUs stay whole",
            "give its labels nvidia.com/mig.config: all-1g.5gb, for example, and models that are to run on a slice"
            " resources.gpu_resource: nvidia.com/mig-1g.5gb",
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
    slicing = values.get("gpu_plugin_time_slicing_replicas")
    shared: Any = slicing.get(WHOLE, 1) if isinstance(slicing, Mapping) else 1
    shared = shared if whole(shared) else 1
    if values.get("gpu_plugin_mig_strategy") == "single":
        shared *= 7  # slices of the smallest profile
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
        labels = node_labels(str(group.get("ami_type", "")), types) | {
            str(key): str(value) for key, value in (group.get("labels") or {}).items()
        }
        taints = tuple({"effect": "NoSchedule", **taint} for taint in group.get("taints") or ())
        # Without an autoscaler the nodes stay as many as they are.
        most = group.get("desired_size" if values.get("platform_autoscaler") == "none" else "max_size")
        name = str(group.get("name"))
        found.append(_Nodes(name, kind, smallest, gpus * shared, most if whole(most) else None, labels, taints))
    return found, complete


def _pods(values: Values) -> Iterator[_Pod]:
    settings = {
        name.removeprefix("rayservice_"): value for name, value in values.items() if name.startswith("rayservice_")
    }
    head = settings["head"]
    beside = settings["autoscaler"] if settings.get("autoscaling") else {"cpu": 0, "memory": 0}
    common = settings.get("node_selector") or {}
    yield _Pod(
        "the head, with Ray's autoscaler beside it",
        quantity(head["cpu"]) + quantity(beside.get("cpu", 0)),
        quantity(head["memory"]) + quantity(beside.get("memory", 0)),
        Fraction(0),
        "",
        {**common, **(head.get("node_selector") or {})},
        (*settings.get("tolerations", ()), *(head.get("tolerations") or ())),
        {
            **{key: (f"rayservice_head.{key}", head[key]) for key in ("cpu", "memory")},
            "node_selector": _selector(common, "rayservice_head", head),
            **dict.fromkeys(("min", "max"), ("rayservice_head", head)),
        },
    )
    models = list(entries_of(values, "rayservice_models"))
    given = list(entries_of(values, "rayservice_worker_groups"))
    for index, group in enumerate(rayplane_serve.rayservice_worker_groups([entry for _, entry in models], settings)):
        gpus, accelerator = int(group.get("gpu", 0)), str(group.get("accelerator") or "")
        known = settings["accelerators"].get(accelerator, {})
        tolerations = (*settings.get("tolerations", ()), *(group.get("tolerations") or ()))
        if gpus:
            tolerations += ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},)
        mine = [(path, entry) for path, entry in models if rayplane_serve.worker_group_name(entry) == group["name"]]
        path = given[index][0] if given else "rayservice_worker_groups"
        least = int(group.get("min", 1))
        yield _Pod(
            f"a pod of the worker group {group['name']}",
            quantity(group["cpu"]),
            quantity(group["memory"]),
            gpus * Fraction(int(part[1]), 7)
            if (part := _SLICE.match(str(group.get("gpu_resource"))))
            else Fraction(gpus),
            accelerator,
            {**common, **(known.get("node_selector") or {}), **(group.get("node_selector") or {})},
            tolerations,
            {
                **(
                    {key: (f"{path}.{key}", group.get(key)) for key in ("cpu", "memory", "gpu", "min", "max")}
                    if given
                    else _origins(group, mine)
                ),
                "node_selector": _selector(common, path, group)
                if not known.get("node_selector")
                else (f"rayservice_accelerators.{accelerator}.node_selector", known["node_selector"]),
            },
            least,
            int(group.get("max", max(least, 1))),
        )


def _gateway_pods(values: Values) -> Iterator[_Pod]:
    if values.get("gateway_enabled") is not True:
        return
    yield _gateway_pod(values, "a pod of the gateway", "gateway_resources")
    if values.get("gateway_redis") == "in_cluster":
        what = "the pod of the gateway's two Redis servers"
        yield _gateway_pod(values, what, "gateway_redis_resources", "gateway_redis_cache_resources")


def _gateway_pod(values: Values, what: str, *containers: str) -> _Pod:
    """A pod whose containers ask for what these variables say."""
    asked = requests_of({"containers": [{"resources": values[variable]} for variable in containers]})
    # A limit is the request, too, where that is missing.
    origins = [
        {
            key: (f"{variable}.{part}.{key}", value)
            for part in ("limits", "requests")
            for key, value in (values[variable].get(part) or {}).items()
        }
        for variable in containers
    ]
    sizes = {key: max((one[key] for one in origins if key in one), key=lambda one: quantity(one[1])) for key in asked}
    selector = values.get("gateway_node_selector") or {}
    return _Pod(
        what,
        asked.get("cpu", 0.0),
        asked.get("memory", 0.0),
        Fraction(0),
        "",
        selector,
        tuple(values.get("gateway_tolerations") or ()),
        {**sizes, "node_selector": ("gateway_node_selector", selector)},
    )


def _selector(common: Mapping[str, Any], path: str, group: Mapping[str, Any]) -> tuple[str, Any]:
    own = group.get("node_selector")
    return (f"{path}.node_selector", own) if own else ("rayservice_node_selector", common)


def _origins(group: Mapping[str, Any], models: list[tuple[str, Mapping[str, Any]]]) -> dict[str, tuple[str, Any]]:
    """The variables that a derived group's size comes from: its largest models', or the CPU group's smallest size."""
    found = {key: (f"rayservice_cpu_group.{key}", group.get(key)) for key in ("cpu", "memory", "gpu", "min", "max")}
    for key in ("cpu", "memory", "gpu"):
        asking = [(path, entry["resources"][key]) for path, entry in models if key in (entry.get("resources") or {})]
        if asking:
            path, value = max(asking, key=lambda one: quantity(one[1]))
            # Beside models the CPU group has a CPU for Serve's ingress.
            own = quantity(group[key]) - (1 if (key, group["name"]) == ("cpu", "cpu") else 0)
            if quantity(value) >= own:
                found[key] = f"{path}.resources.{key}", value
    for place, key in enumerate(("min", "max")):
        if models:
            path, entry = max(models, key=lambda one: rayplane_serve.replica_bounds(one[1])[place])
            found[key] = f"{path}.replicas.{key}", rayplane_serve.replica_bounds(entry)[place]
    return found


def _may_take(entry: _Nodes, pod: _Pod) -> bool:
    """Whether pods of this kind may run in the node group, whatever their size."""
    if not _selected(entry, pod) or not all(
        tolerates({"tolerations": list(pod.tolerations)}, dict(taint)) for taint in entry.taints
    ):
        return False
    return not pod.gpus or (entry.gpus >= pod.gpus and _same_gpu(pod.accelerator, entry))


def _selected(entry: _Nodes, pod: _Pod) -> bool:
    """Whether the nodes bear the labels that the pod selects; those that others put on a node are not known here."""
    return all(
        entry.labels.get(key) == value
        for key, value in pod.selector.items()
        if key in entry.labels or not _OTHERS_LABELS.fullmatch(key)
    )


def _same_gpu(wanted: str, entry: _Nodes) -> bool:
    """Whether a group has the GPU of this name; no name, or one that is not known here, means any."""
    named = gpus_named(wanted)
    return not named or gpu_of_instance(entry.kind) in named


def _no_nodes(nodes: list[_Nodes], pod: _Pod) -> Problem:
    if not any(_selected(entry, pod) for entry in nodes):
        variable, value = pod.variables["node_selector"]
        have = "; ".join(
            f"{entry.name}: {', '.join(f'{key}={said}' for key, said in entry.labels.items()) or 'none'}"
            for entry in nodes
        )
        return Problem(
            variable,
            value,
            f"no node group bears the labels that {pod.what} selects; their labels are {have}",
            "add them to a node group's labels, or select what a group bears",
        )
    variable, value = pod.variables.get("gpu" if pod.gpus else "cpu") or next(iter(pod.variables.values()))
    have = ", ".join(f"{entry.name} ({entry.kind}{f', {entry.gpus} GPUs' if entry.gpus else ''})" for entry in nodes)
    lacks = f"{pod.gpus} GPUs for one pod" if pod.gpus else "those labels and no taint that the pod does not tolerate"
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
    for key, wanted in (("cpu", pod.cpu), ("memory", pod.memory)):
        entry, left = max(rooms, key=lambda pair: getattr(pair[1], key))
        most = getattr(left, key)
        if wanted <= most:
            continue
        scale = _GIB if key == "memory" else 1.0
        total = entry.machine.memory / _GIB if key == "memory" else entry.machine.vcpus
        fitting = f"{math.floor(most / _GIB)}Gi" if key == "memory" else _floor(most)
        variable, value = pod.variables[key]
        yield Problem(
            variable,
            value,
            f"{pod.what} asks for {wanted / scale:.4g} {_UNITS[key]}, and the largest node that may take it,"
            f" {entry.kind} in {entry.name}, has {most / scale:.3g} of its {total:g} left for pods (the kubelet and"
            " each node's own pods keep the rest)",
            f"write {fitting} or less, or give the group larger machines",
        )


def _too_large_for_some(fit: list[_Nodes], pod: _Pod) -> Iterator[Problem]:
    """A pod that names no GPU, and that only some of the nodes with one have room for."""
    if not pod.gpus or pod.accelerator:
        return
    small = [entry for entry in fit if entry.gpus and not _holds(entry, pod)]
    if not small or len(small) == len(fit):
        return
    entry, large = small[0], next(entry for entry in fit if entry not in small)
    left, total = room(entry.machine), entry.machine
    short = "cpu" if pod.cpu > left.cpu else "memory"
    variable, value = pod.variables[short]
    sizes = (pod.cpu, left.cpu, total.vcpus) if short == "cpu" else (pod.memory, left.memory, total.memory)
    asked, has, of = (size / (1 if short == "cpu" else _GIB) for size in sizes)
    gpu = gpu_of_instance(large.kind)
    yield Problem(
        variable,
        value,
        f"{pod.what} names no GPU and asks for {asked:.4g} {_UNITS[short]}: {entry.kind} in {entry.name} has {has:.3g}"
        f" of its {of:g} left for pods, so that it runs on {large.kind} in {large.name} alone",
        f"write {_floor(has)} or less, or name accelerator: nvidia-{gpu.name if gpu else '...'}",
        warning=True,
    )


def _holds(entry: _Nodes, pod: _Pod) -> int:
    """How many such pods one node has room for."""
    left = room(entry.machine)
    fits = [int(left.cpu / pod.cpu), int(left.memory / pod.memory)]
    return min([*fits, int(entry.gpus / pod.gpus)] if pod.gpus else fits)


def _floor(number: float) -> float:
    return math.floor(number * 10) / 10


def _capacity(values: Values, nodes: list[_Nodes], pods: list[_Pod]) -> Iterator[Problem]:
    """Room for all pods together that the same nodes may take: the least, the most, and twice the least in an upgrade.

    What is counted is a lower bound, so what is refused can never run: other pods want room, too.
    """
    homes = [frozenset(entry.name for entry in nodes if _may_take(entry, pod) and _holds(entry, pod)) for pod in pods]
    upgrade = values.get("rayservice_upgrade_strategy")
    told: set[str] = set()
    for home in dict.fromkeys(homes):
        at_home = [entry for entry in nodes if entry.name in home]
        members = [pod for pod, own in zip(pods, homes, strict=True) if own and own <= home]
        if not at_home or any(entry.most is None for entry in at_home):
            continue
        for kind, what, wanted in (
            ("min", "the pods that are always there", [(pod, pod.least) for pod in members]),
            ("max", "all replicas that the bounds allow", [(pod, pod.most) for pod in members]),
            (
                "",
                "an upgrade starts a second cluster beside the first, and both",
                [(pod, 2 * pod.least) for pod in members],
            ),
        ):
            problem = _short(what, wanted, at_home) if kind or upgrade != "None" else None
            if problem is None:
                continue
            reason, cure = problem
            largest, _ = max(wanted, key=lambda one: one[1])
            variable, value = largest.variables[kind] if kind else ("rayservice_upgrade_strategy", upgrade)
            if kind:
                cure += f", or lower {kind}"
            else:
                reason += "; the second would never be ready"
                cure += ", or write None and delete the RayService before a change of its cluster"
            if variable not in told:
                yield Problem(variable, value, reason, cure, warning=kind != "min")
            told.add(variable)
            if kind == "min":
                break


def _short(what: str, wanted: list[tuple[_Pod, int]], homes: list[_Nodes]) -> tuple[str, str] | None:
    """Why the nodes at their most have no room for so many pods, and what to do; None where they have."""

    def told(named: str, need: float, of_node: Callable[[_Nodes], float]) -> tuple[str, str] | None:
        have = sum(of_node(entry) * (entry.most or 0) for entry in homes)
        if need <= have:
            return None
        more = math.ceil((need - have) / max(of_node(entry) for entry in homes))
        reach = ", ".join(f"{entry.name} ({entry.most} x {of_node(entry):g})" for entry in homes if of_node(entry))
        return (
            f"{what} want {need:.4g} {named}, and the node groups reach {have:.4g}: {reach}",
            f"raise max_size of a node group by {more}",
        )

    gpus, cpus, gib = (
        float(sum(getattr(pod, key) * count for pod, count in wanted)) for key in ("gpus", "cpu", "memory")
    )
    return (
        told("GPUs", gpus, lambda entry: entry.gpus)
        or told("CPUs", cpus, lambda entry: _floor(room(entry.machine).cpu))
        or told("GiB", gib / _GIB, lambda entry: _floor(room(entry.machine).memory / _GIB))
        or next(
            filter(None, (told(f"times room for {pod.what}", count, lambda entry, pod=pod: _holds(entry, pod))  # type: ignore[misc]
                          for pod, count in wanted)), None
        )
    )  # fmt: skip
