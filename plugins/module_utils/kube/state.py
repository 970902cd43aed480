"""When a Kubernetes object is ready, why it is not, and whether it still can be: states and evidence for waits."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from typing import Self

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    Json,
    KubeError,
    Resource,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.room import no_node_for

# Serve's word for a configuration that it tried and could not run.
DEPLOY_FAILED = "DEPLOY_FAILED"
# What a registry says of an image that will not come; anything else may be a network that comes back.
_NO_IMAGE = re.compile(r"not found|not exist|unknown|invalid reference", re.IGNORECASE)
# A new node's permissions, or a pull secret, may be a moment late: the kubelet tries again after 10 and 20 s.
_REFUSED = re.compile(r"denied|unauthorized|forbidden", re.IGNORECASE)
_NEVER_STARTS = ("ErrImageNeverPull", "InvalidImageName")
_STARTING = ("", "ContainerCreating", "PodInitializing")
IMAGE_PATIENCE_S = 5.0
_REFUSED_IMAGE_PATIENCE_S = 45.0


class Final(str):
    """Why something is not ready, where waiting does not mend it: the wait ends once it has been so for a while.

    ``patience_s`` are the seconds after which it is believed.
    """

    patience_s: float

    def __new__(cls, text: str, patience_s: float = 3.0) -> Self:
        made = super().__new__(cls, text)
        made.patience_s = patience_s
        return made


def condition_state(live: Json, condition: str) -> str | None:
    """None where the condition holds, else what it says."""
    for entry in live.get("status", {}).get("conditions") or []:
        if entry["type"] == condition:
            if entry["status"] == "True":
                return None
            return f"{condition} is {entry['status']}: {entry.get('reason', '')} {entry.get('message', '')}".rstrip()
    return f"no condition {condition} yet"


def current_condition_state(live: Json, condition: str) -> str | None:
    """None where the condition holds for the current generation (as far as it tells of which it is), else why not."""
    generation = live["metadata"].get("generation", 0)
    for entry in live.get("status", {}).get("conditions") or []:
        if entry["type"] == condition and entry.get("observedGeneration", generation) < generation:
            return f"{condition} is of an earlier generation: the controller has not seen the change"
    return condition_state(live, condition)


def crd_state(cluster: Cluster, live: Json) -> str | None:
    return condition_state(live, "Established")


def deployment_state(cluster: Cluster, live: Json) -> str | None:
    """A Deployment is ready when the current generation's replicas are all available and no older one is left."""
    status, wanted = live.get("status", {}), live["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < live["metadata"]["generation"]:
        return "the controller has not seen the change"
    if (
        status.get("updatedReplicas", 0) < wanted
        or status.get("replicas", 0) > wanted
        or status.get("availableReplicas", 0) < wanted
    ):
        progress = condition_state(live, "Available") or "rolling out"
        return f"{status.get('availableReplicas', 0)} of {wanted} replicas available ({progress})"
    return None


def daemonset_state(cluster: Cluster, live: Json) -> str | None:
    """A DaemonSet is ready when the current generation's pods are available on every node that they belong on.

    Where no node is one of those (no GPU node yet, say), there is nothing to wait for.
    """
    status = live.get("status", {})
    if status.get("observedGeneration", 0) < live["metadata"]["generation"]:
        return "the controller has not seen the change"
    wanted = status.get("desiredNumberScheduled", 0)
    if status.get("updatedNumberScheduled", 0) < wanted or status.get("numberAvailable", 0) < wanted:
        return (
            f"{status.get('numberAvailable', 0)} of {wanted} pods available, "
            f"{status.get('updatedNumberScheduled', 0)} up to date"
        )
    return None


def statefulset_state(cluster: Cluster, live: Json) -> str | None:
    """A StatefulSet is ready when the current revision's replicas are all ready."""
    status, wanted = live.get("status", {}), live["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < live["metadata"]["generation"]:
        return "the controller has not seen the change"
    if status.get("updatedReplicas", 0) < wanted or status.get("readyReplicas", 0) < wanted:
        up_to_date = status.get("updatedReplicas", 0)
        return f"{status.get('readyReplicas', 0)} of {wanted} replicas ready, {up_to_date} up to date"
    return None


def _ray_token(cluster: Cluster, rayservice: Json, ray_cluster: str) -> dict[str, str]:
    """The header by which a Ray dashboard with tokens lets us in; the API server keeps ``Authorization`` for itself."""
    if rayservice["spec"].get("rayClusterConfig", {}).get("authOptions", {}).get("mode") != "token":
        return {}
    namespace, selector = rayservice["metadata"]["namespace"], f"ray.io/cluster={ray_cluster}"
    tokens = [
        base64.b64decode(secret["data"]["auth_token"]).decode()
        for secret in cluster.list(Resource("v1", "Secret", "secrets", True), namespace, selector)
        if "auth_token" in secret.get("data", {})
    ]
    return {"X-Ray-Authorization": f"Bearer {tokens[0]}"} if tokens else {}


def serve_config(rayservice: Json) -> Json:
    """The declared configuration of Serve."""
    return {"applications": [], **yaml.safe_load(rayservice["spec"].get("serveConfigV2") or "{}")}


def _dashboard(cluster: Cluster, rayservice: Json, ray_cluster: str) -> tuple[str, dict[str, str]]:
    """Where Serve is reached on one Ray cluster, through the API server's proxy to the dashboard; headers for it."""
    namespace = rayservice["metadata"]["namespace"]
    path = f"/api/v1/namespaces/{namespace}/services/{ray_cluster}-head-svc:8265/proxy/api/serve/applications/"
    return path, _ray_token(cluster, rayservice, ray_cluster)


def ask_serve(cluster: Cluster, rayservice: Json, ray_cluster: str) -> Json:
    """The applications of Serve on one Ray cluster by name. Raises ApiError."""
    path, headers = _dashboard(cluster, rayservice, ray_cluster)
    found: Json = cluster.request("GET", path, headers=headers).get("applications", {})
    return found


def tell_serve(cluster: Cluster, rayservice: Json, ray_cluster: str, config: Json) -> None:
    """Have Serve on one Ray cluster run this configuration. Raises ApiError."""
    path, headers = _dashboard(cluster, rayservice, ray_cluster)
    cluster.request("PUT", path, config, headers=headers, raw=True)


def has_taken(deployed: Json, app: Json) -> bool:
    """Whether what Serve says of an application is about its declared configuration."""
    config = deployed.get("deployed_app_config") or {}
    return all(config.get(key) == app.get(key) for key in ("args", "route_prefix"))


def failed_deployments(deployed: Json) -> list[Json]:
    """The deployments of an application whose replicas did not start."""
    return [entry for entry in (deployed.get("deployments") or {}).values() if entry.get("status") == DEPLOY_FAILED]


def any_answers(deployments: Iterable[Json]) -> bool:
    return any(replica.get("state") == "RUNNING" for entry in deployments for replica in entry.get("replicas") or [])


def rayservice_state(cluster: Cluster, live: Json) -> str | None:
    """A RayService is ready when its current generation serves: no upgrade under way and each declared application
    RUNNING.

    A change of serveConfigV2 is applied in place, while the condition Ready stays True and the last statuses stay
    RUNNING, so Serve itself is asked (through the API server's proxy) whether it runs the declared configuration. Where
    the proxy is refused the object's status decides.
    """
    status = live.get("status", {})
    if status.get("observedGeneration", 0) < live["metadata"]["generation"]:
        return "the operator has not seen the change"
    pending = status.get("pendingServiceStatus") or {}
    active = status.get("activeServiceStatus") or {}
    declared = {app["name"]: app for app in serve_config(live)["applications"]}
    if pending.get("rayClusterName"):
        name = str(pending["rayClusterName"])
        state = _serve_state(cluster, live, name, declared, pending.get("applicationStatuses") or {})
        beside = f" beside {active['rayClusterName']}" if active.get("rayClusterName") else ""
        return (
            state if isinstance(state, Final) else f"cluster {name} is being prepared{beside}: {state or 'it answers'}"
        )
    reported = active.get("applicationStatuses") or {}
    if gone := sorted(reported.keys() - declared.keys()):
        return f"application {gone[0]} is being deleted ({reported[gone[0]].get('status')})"
    state = _serve_state(cluster, live, str(active.get("rayClusterName")), declared, reported)
    for name in declared if state is None else ():
        seen = (reported.get(name) or {}).get("status")
        if seen != "RUNNING":
            state = f"application {name}: the operator has not seen yet that it runs ({seen or 'no status'})"
    return state or condition_state(live, "Ready")


def _serve_state(cluster: Cluster, live: Json, ray_cluster: str, declared: Json, reported: Json) -> str | None:
    """What Serve on one Ray cluster makes of the declared applications; None where it runs them all.

    ``reported`` are the statuses that the operator wrote last. They may be those of the configuration before, so a
    failure in them is final after a while only; Serve's own word on the declared configuration is final at once.
    """
    deployed: Json | None = None
    silent = ""
    try:
        deployed = ask_serve(cluster, live, ray_cluster)
    except ApiError as error:
        if error.status not in (401, 403):
            silent = f"Serve's dashboard does not answer yet ({error.status})"
    for name, app in sorted(declared.items()):
        if deployed is None:
            said, patience_s = reported.get(name) or {}, 60.0
        else:
            said, patience_s = deployed.get(name) or {}, 3.0
            if said and not has_taken(said, app):
                return f"application {name}: Serve has not taken the new configuration yet"
        state = said.get("status", "not deployed yet")
        if state != "RUNNING":
            text = f"application {name} is {state}"
            reason = _serve_reason(said)
            text += f": {reason}" if reason else ""
            if state != DEPLOY_FAILED:
                return text
            if any_answers(failed_deployments(said)):
                cure = "its earlier replicas go on; any change of the model's entry, of env say, tries again"
            else:
                cure = "a rerun tries again"
            return Final(f"{text} ({cure})", patience_s)
    return silent or None


def _serve_reason(application: Json) -> str:
    """The last line of the traceback that says why an application, or one of its deployments, does not run."""
    deployments = application.get("deployments") or application.get("serveDeploymentStatuses") or {}
    messages = [
        *(str(entry.get("message") or "") for entry in deployments.values() if entry.get("status") != "HEALTHY"),
        str(application.get("message") or ""),
    ]
    lines = [message.strip().splitlines()[-1].strip() for message in messages if message.strip()]
    # An exception's line says more than "Failed to update the deployments"; a model's own says more than the ingress's.
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (told or lines or [""])[0][:300]


def current_pods(cluster: Cluster, live: Json) -> list[Json]:
    """The pods of an object's current revision: what those of an earlier one lack does not matter."""
    meta, status = live["metadata"], live.get("status", {})
    labels = dict((live.get("spec", {}).get("selector") or {}).get("matchLabels") or {})
    annotations = meta.get("annotations") or {}
    kind = live.get("kind")
    if kind == "RayService":
        services = [status.get(f"{name}ServiceStatus") or {} for name in ("pending", "active")]
        names = [entry["rayClusterName"] for entry in services if entry.get("rayClusterName")]
        labels = {"ray.io/cluster": names[0]} if names else {}
    elif kind == "StatefulSet":
        labels["controller-revision-hash"] = status.get("updateRevision")
    elif kind == "DaemonSet":
        labels["pod-template-generation"] = annotations.get("deprecated.daemonset.template.generation")
    elif kind == "Deployment":
        revision = "deployment.kubernetes.io/revision"
        sets = cluster.list(
            Resource("apps/v1", "ReplicaSet", "replicasets", True), meta["namespace"], selector_of(labels)
        )
        hashes = [
            item["metadata"]["labels"]["pod-template-hash"]
            for item in sets
            if (item["metadata"].get("annotations") or {}).get(revision) == annotations.get(revision)
        ]
        labels["pod-template-hash"] = hashes[0] if hashes else None
    else:
        return [pod for item in _made_of(cluster, meta) for pod in current_pods(cluster, item)]
    if not labels or None in labels.values():
        return []
    pods: list[Json] = cluster.list(Resource("v1", "Pod", "pods", True), meta["namespace"], selector_of(labels))
    return pods


def _made_of(cluster: Cluster, meta: Json) -> list[Json]:
    """The StatefulSets that an operator has made of its object."""
    if not meta.get("namespace"):
        return []
    found = cluster.list(Resource("apps/v1", "StatefulSet", "statefulsets", True), meta["namespace"])
    return [
        {**item, "kind": "StatefulSet"}
        for item in found
        if any(owner["uid"] == meta["uid"] for owner in item["metadata"].get("ownerReferences") or ())
    ]


def prometheus_state(cluster: Cluster, live: Json) -> str | None:
    """An object of the Prometheus operator is ready when the operator has taken this generation over, and the pods of
    what it has made of it are this generation's (its own word, Available, counts the pods that were there before)."""
    return (
        current_condition_state(live, "Reconciled")
        or next(
            (state for item in _made_of(cluster, live["metadata"]) if (state := statefulset_state(cluster, item))), None
        )
        or current_condition_state(live, "Available")
    )


def selector_of(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _visible_pods(cluster: Cluster, live: Json) -> list[Json] | None:
    """The pods of an object's current revision; None for who may not list them."""
    try:
        return current_pods(cluster, live)
    except ApiError as error:
        if error.status != 403:
            raise
        return None


def _rollout_problem(live: Json) -> Final | None:
    """What a Deployment's own conditions say against its change: its pods are refused, or its deadline has passed."""
    for entry in live.get("status", {}).get("conditions") or []:
        failed = (entry["type"], entry["status"]) in (("ReplicaFailure", "True"), ("Progressing", "False"))
        if failed and live.get("kind") == "Deployment":
            return Final(f"{entry.get('reason', entry['type'])}: {entry.get('message', '')}", 60.0)
    return None


def cannot_start(cluster: Cluster, live: Json) -> bool:
    """Whether pods of the object's current revision fail to start, rather than being slow.

    Where no pod is to be seen a Deployment's own conditions decide.
    """
    pods = _visible_pods(cluster, live)
    if pods:
        return any(_fails(pod) for pod in pods)
    lacking = pods is None and live.get("kind") == "Deployment" and condition_state(live, "Available") is not None
    return lacking or _rollout_problem(live) is not None


def _fails(pod: Json) -> bool:
    """Whether a pod has found no node, or has a container that cannot start or ends again and again."""
    for container in _containers(pod):
        waits = (container.get("state") or {}).get("waiting") or {}
        tried = container.get("restartCount", 0) > 1 or waits.get("reason", "") not in _STARTING
        if tried and not container.get("ready"):
            return True
    return any(entry.get("reason") == "Unschedulable" for entry in pod.get("status", {}).get("conditions") or [])


def _containers(pod: Json) -> list[Json]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def pods_problem(cluster: Cluster, live: Json) -> Final | None:
    """Why a pod of the object's current revision cannot start, where waiting does not mend it.

    Where no pod is to be seen a Deployment's own conditions decide.
    """
    pods = _visible_pods(cluster, live)
    for pod in pods or []:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for container in _containers(pod):
            waits = (container.get("state") or {}).get("waiting") or {}
            reason, message = waits.get("reason", ""), waits.get("message") or ""
            pulls = reason in ("ErrImagePull", "ImagePullBackOff")
            no_image = reason in _NEVER_STARTS or (pulls and _NO_IMAGE.search(message))
            if no_image or (pulls and _REFUSED.search(message)):
                return Final(
                    f"pod {name}: image {container.get('image')} cannot be pulled: {message or reason}",
                    IMAGE_PATIENCE_S if no_image else _REFUSED_IMAGE_PATIENCE_S,
                )
            if reason == "CreateContainerConfigError":
                return Final(f"pod {name}, container {container['name']}: {message or reason}", 20.0)
        for condition in status.get("conditions") or []:
            if condition.get("reason") != "Unschedulable":
                continue
            if why := no_node_for(cluster, pod["spec"]):
                return Final(f"pod {name} fits on no node: {why}", 10.0)
            # What runs may leave its place, as a cluster does that an upgrade replaces; a lost node's successor, or one
            # of an autoscaler that we do not know, takes minutes to come.
            if why := no_node_for(cluster, pod["spec"], [name]):
                return Final(f"pod {name} has no room beside what runs: {why}", 300.0)
    return None if pods else _rollout_problem(live)


def balancer_state(cluster: Cluster, live: Json) -> str | None:
    """A Service of type LoadBalancer, or an Ingress, is ready when its load balancer has an address."""
    if (live.get("status", {}).get("loadBalancer") or {}).get("ingress"):
        return None
    return "its load balancer has no address yet"


READY: dict[str, Callable[[Cluster, Json], str | None]] = {
    "CustomResourceDefinition": crd_state,
    "DaemonSet": daemonset_state,
    "Deployment": deployment_state,
    "Ingress": balancer_state,
    "Prometheus": prometheus_state,
    "RayService": rayservice_state,
    "Service": balancer_state,
    "StatefulSet": statefulset_state,
}


def is_ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)


def collect_evidence(cluster: Cluster, targets: Iterable[Json], where: Json, log_lines: int = 8) -> list[str]:
    """Conditions of the targets, and the pods, warning events and last log lines of ``where`` (``namespace``, pod
    ``selector``). Logs, the longest and least to the point, come last."""
    lines: list[str] = []
    logs: list[str] = []
    try:
        for target in targets:
            resource = cluster.resource(target["api_version"], target["kind"])
            live = target.get("name") and resource and cluster.get(resource, target.get("namespace"), target["name"])
            lines += [
                f"condition {entry['type']}={entry['status']} {entry.get('reason', '')}: {entry.get('message', '')}"
                for entry in (live or {}).get("status", {}).get("conditions") or []
            ]
        namespace = where.get("namespace")
        if not namespace:
            return lines
        pods = cluster.list(Resource("v1", "Pod", "pods", True), namespace, where.get("selector") or "")
        for pod in pods:
            said, logged = _pod_evidence(cluster, namespace, pod, log_lines)
            lines += said
            logs += logged
        if not pods:
            lines.append(f"no pod matches {where.get('selector') or 'anything'} in namespace {namespace}")
        events = cluster.list(Resource("v1", "Event", "events", True), namespace)
        events.sort(
            key=lambda event: (
                event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
            )
        )
        for event in [event for event in events if event.get("type") == "Warning"][-10:]:
            subject = event["involvedObject"]
            name = f"{subject.get('kind')}/{subject.get('name')}"
            lines.append(f"event {name}: {event.get('reason')}: {(event.get('message') or '').strip()}")
    except KubeError as error:
        lines.append(f"(no more evidence: {error})")
    return [*lines, *logs]


def _pod_evidence(cluster: Cluster, namespace: str, pod: Json, log_lines: int) -> tuple[list[str], list[str]]:
    """What a pod's status says, and the last lines of the containers that are not ready."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    lines = [f"pod {name}: {status.get('phase', 'unknown')}"]
    logs: list[str] = []
    lines += [
        f"  {entry['type']}: {entry['message']}"
        for entry in status.get("conditions") or []
        if entry["status"] != "True" and entry.get("message")
    ]
    for container in _containers(pod):
        state = next(iter((container.get("state") or {"unknown": {}}).items()))
        if state[0] == "terminated" and state[1].get("exitCode") == 0:
            continue
        said = " ".join(str(state[1][key]) for key in ("reason", "message", "exitCode") if key in state[1])
        lines.append(
            f"  container {container['name']}: {state[0]} {said} restarts={container.get('restartCount', 0)}".rstrip()
        )
        if state[0] != "waiting" or container.get("restartCount", 0):
            log = cluster.pod_log(namespace, name, container["name"], log_lines, previous=state[0] == "waiting")
            logs += [f"log of pod {name}, {container['name']}:", *(f"    | {line}" for line in log.splitlines())]
    return lines, logs
