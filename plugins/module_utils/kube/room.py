"""Whether the nodes of a cluster have room for a pod.

Labels, taints and requests are compared. What else the scheduler decides by (affinity, volumes, topology) is left to
it, so a node in doubt is taken to be fit.
"""

from __future__ import annotations

from collections.abc import Iterable

from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import ApiError, Cluster, Json, Resource
from ansible_collections.rayplane.platform.plugins.module_utils.kube.quantity import quantity

_NODE = Resource("v1", "Node", "nodes", False)
_POD = Resource("v1", "Pod", "pods", True)
# Taints that Kubernetes itself puts on nodes and takes off: not ready, under pressure, cordoned.
_PASSING = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/")


def requests_of(spec: Json) -> dict[str, float]:
    """What the scheduler reserves for a pod: its containers' sum, or an init container's where that is more.

    An init container that stays (``restartPolicy: Always``) counts as a container.
    """
    containers: list[Json] = list(spec.get("containers") or [])
    first: list[Json] = []
    for entry in spec.get("initContainers") or []:
        (containers if entry.get("restartPolicy") == "Always" else first).append(entry)

    def asked(entry: Json) -> dict[str, float]:
        resources = entry.get("resources") or {}
        wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        return {name: quantity(value) for name, value in wanted.items()}

    total: dict[str, float] = {}
    for entry in containers:
        for name, amount in asked(entry).items():
            total[name] = total.get(name, 0.0) + amount
    for entry in first:
        for name, amount in asked(entry).items():
            total[name] = max(total.get(name, 0.0), amount)
    for name, value in (spec.get("overhead") or {}).items():
        total[name] = total.get(name, 0.0) + quantity(value)
    return total


def tolerates(spec: Json, taint: Json) -> bool:
    """Whether a pod may run on a node with this taint, or once it has passed."""
    if taint.get("effect") == "PreferNoSchedule" or taint["key"].startswith(_PASSING):
        return True
    for entry in spec.get("tolerations") or []:
        fits = entry.get("key") in (None, "", taint["key"]) and entry.get("effect") in (None, "", taint["effect"])
        if fits and (entry.get("operator") == "Exists" or entry.get("value", "") == taint.get("value", "")):
            return True
    return False


def nodes_may_come(cluster: Cluster) -> bool:
    """Whether something makes nodes for pods that have none: Karpenter, or a cluster-autoscaler (it keeps a status)."""
    if cluster.resource("karpenter.sh/v1", "NodePool") is not None:
        return True
    # Wherever it runs: OpenShift's is in openshift-machine-api.
    named = {"fieldSelector": "metadata.name=cluster-autoscaler-status"}
    return bool(cluster.request("GET", "/api/v1/configmaps", query=named).get("items"))


def no_node_for(cluster: Cluster, spec: Json, without: Iterable[str] | None = None) -> str | None:
    """Why no node takes a pod with this ``spec``; None where one does, or where one may still come.

    Nodes count as empty. With ``without``, the names of the pods that the new one replaces, what every other pod of the
    cluster has reserved is taken off. Who may not see nodes and pods is told nothing.
    """
    try:
        return _no_node_for(cluster, spec, without)
    except ApiError as error:
        if error.status != 403:
            raise
        return None


def _no_node_for(cluster: Cluster, spec: Json, without: Iterable[str] | None) -> str | None:
    if nodes_may_come(cluster):
        return None
    wanted = {name: amount for name, amount in requests_of(spec).items() if amount > 0}
    selector = (spec.get("nodeSelector") or {}).items()
    nodes = cluster.list(_NODE)
    labelled = [node for node in nodes if selector <= (node["metadata"].get("labels") or {}).items()]
    if not labelled:
        return f"none of {len(nodes)} nodes has the labels {', '.join(f'{key}={value}' for key, value in selector)}"
    fit = [node for node in labelled if all(tolerates(spec, taint) for taint in node["spec"].get("taints") or [])]
    if not fit:
        taints = sorted({f"{t['key']}:{t['effect']}" for node in labelled for t in node["spec"].get("taints") or []})
        return f"it tolerates none of the taints of {len(labelled)} nodes ({', '.join(taints)})"
    room = {node["metadata"]["name"]: _allocatable(node) for node in fit}
    if without is not None:
        replaced = set(without)
        for pod in cluster.list(_POD):
            free = room.get(pod["spec"].get("nodeName", ""))
            if free is None or pod["metadata"]["name"] in replaced:
                continue
            if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
                for name, amount in requests_of(pod["spec"]).items():
                    free[name] = free.get(name, 0.0) - amount
    if any(all(free.get(name, 0.0) >= amount for name, amount in wanted.items()) for free in room.values()):
        return None
    short = [name for name in wanted if all(free.get(name, 0.0) < wanted[name] for free in room.values())] or wanted
    most = {name: max(free.get(name, 0.0) for free in room.values()) for name in short}
    kind = "free" if without is not None else "to give"
    return "it asks for " + ", ".join(
        f"{name} {_readable(name, wanted[name])} where a node has {_readable(name, most[name])} {kind} at most"
        for name in short
    )


def _allocatable(node: Json) -> dict[str, float]:
    return {name: quantity(value) for name, value in (node.get("status", {}).get("allocatable") or {}).items()}


def _readable(name: str, amount: float) -> str:
    if name == "memory" or name.endswith("storage"):
        return f"{amount / 2**30:.1f} GiB"
    return f"{amount:g}"
