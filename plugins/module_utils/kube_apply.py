"""Bring a set of Kubernetes objects to what is declared: apply, align, prune, wait.

One call handles everything a role declares. Objects are applied server-side with one field manager; a dry run asks the
API server the
same questions, so check mode's prediction passes through its defaulting and validation. What cannot be asked yet (the
namespace or the
CRD of an object comes with the same deployment) is predicted as created.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import yaml
from ansible.module_utils.kube_api import ApiError, Cluster, Json, KubeError, Resource

DIGEST = "rayplane.io/applied-digest"
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"
INSTANCE = "app.kubernetes.io/instance"
_VOLATILE = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink")
_BOOKKEEPING = (DIGEST, "deployment.kubernetes.io/revision")
_BASE_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# Serve's word for a configuration that it tried and could not run; it may stand there from the configuration before.
_FAILED = "DEPLOY_FAILED"
_FAILED_PATIENCE_S = 60.0
# Applied before everything else, in this order: others live in them or are instances of them.
_FIRST = ("Namespace", "CustomResourceDefinition")
# Kinds whose fields are fixed for life, while nothing that was made with an object needs it any more.
_REPLACED = ("StorageClass",)
# Lists whose entries have a name of their own, for alignment.
_ENTRY_KEYS = ("name", "groupName")


class _Dumper(_BASE_DUMPER):
    """Writes strings of several lines as they read, so that a diff of serveConfigV2 is one of lines."""


def _write_string(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _write_string)


class ApplyError(Exception):
    """The set cannot be applied; ``evidence`` says what the cluster shows."""

    def __init__(self, message: str, evidence: Sequence[str] = ()) -> None:
        self.evidence = list(evidence)
        super().__init__("\n".join([message, *evidence]))


def label(kind: str, name: str, namespace: str | None = None) -> str:
    """How an object is named to people: ``Secret rayplane/hf-token``."""
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def label_of(item: Json) -> str:
    return label(item["kind"], item["metadata"]["name"], item["metadata"].get("namespace"))


def comparable(item: Json | None) -> Json:
    """The part of an object that somebody declares: no status, no bookkeeping of the server."""
    if item is None:
        return {}
    result = {key: value for key, value in item.items() if key != "status"}
    meta = {key: value for key, value in item.get("metadata", {}).items() if key not in _VOLATILE}
    annotations = {
        key: value for key, value in (meta.pop("annotations", None) or {}).items() if key not in _BOOKKEEPING
    }
    if annotations:
        meta["annotations"] = annotations
    result["metadata"] = meta
    return result


def contains(live: Any, wanted: Any) -> bool:
    """Whether ``live`` has every value of ``wanted``; lists must have the same length."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            key in live and contains(live[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(live, list) and len(live) == len(wanted) and all(map(contains, live, wanted))
    return bool(live == wanted)


def digest_of(item: Json) -> str:
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()[:16]


def printable(item: Json, other: Json | None = None) -> str:
    """YAML for a diff: values of Secrets hidden (whether they differ is said), schemas of CRDs as a digest."""
    if not item:
        return ""
    shown = copy.deepcopy(comparable(item))
    if shown.get("kind") == "Secret":
        for part in ("data", "stringData"):
            for key, value in (shown.get(part) or {}).items():
                same = other is not None and (other.get(part) or {}).get(key) == value
                shown[part][key] = (
                    "(hidden)"
                    if same or other is None
                    else f"(hidden, {'before' if other.get('__after') else 'after'})"
                )
    if shown.get("kind") == "CustomResourceDefinition":
        for version in shown["spec"].get("versions", []):
            if "schema" in version:
                version["schema"] = f"(sha256 {digest_of(version['schema'])})"
    text: str = yaml.dump(shown, Dumper=_Dumper, sort_keys=True, default_flow_style=False, width=150)
    return text


def diff_of(before: Json | None, after: Json | None) -> dict[str, str]:
    """One entry of Ansible's diff."""
    name = label_of(after or before or {})
    return {
        "before_header": f"{name} (live)",
        "after_header": f"{name} (declared)",
        "before": printable(before or {}, {**(after or {}), "__after": True} if before and after else None),
        "after": printable(after or {}, before),
    }


def merged(live: Any, wanted: Any) -> Any:
    """``live`` with ``wanted`` laid over it; lists of named entries are merged by name and never grow."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        return {**live, **{key: merged(live.get(key), value) for key, value in wanted.items()}}
    if isinstance(wanted, list) and isinstance(live, list):
        for key in _ENTRY_KEYS:
            if all(isinstance(entry, dict) and key in entry for entry in [*wanted, *live]):
                by_name = {entry[key]: entry for entry in wanted}
                return [merged(entry, by_name[entry[key]]) if entry[key] in by_name else entry for entry in live]
    return wanted


@dataclass
class Outcome:
    """What was done (what would be done, in a dry run), each object by its label."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    aligned: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    diff: list[dict[str, str]] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.created or self.updated or self.aligned or self.pruned)


class ApplySet:
    """Applies sets of objects to one cluster.

    ``labels`` are put on every object and, as a selector, tell what the set owns. ``dry_run`` changes nothing.
    """

    def __init__(self, cluster: Cluster, labels: dict[str, str], manager: str, dry_run: bool = False) -> None:
        self.cluster = cluster
        self.labels = labels
        self.manager = manager
        self.dry_run = dry_run
        self.outcome = Outcome()
        self._namespaces: dict[str, bool] = {}
        # Live objects by label, as long as nothing was sent that could change them.
        self._seen: dict[str, Json | None] = {}

    @property
    def selector(self) -> str:
        """Label selector of the objects that this set owns."""
        owned = {key: value for key, value in self.labels.items() if key in (PART_OF, COMPONENT, INSTANCE)}
        return ",".join(f"{key}={value}" for key, value in sorted(owned.items()))

    def declared(self, item: Json) -> Json:
        """``item`` with the set's labels."""
        meta = item["metadata"]
        return {**item, "metadata": {**meta, "labels": {**(meta.get("labels") or {}), **self.labels}}}

    def apply(self, objects: Iterable[Json], adopt: bool = True, hint: str = "") -> None:
        """Apply every object: namespaces and CRDs first, the rest at the same time.

        Where ``adopt`` is false, an existing object without our part-of label stops the run before anything is changed.
        """
        wanted = [self.declared(item) for item in objects]
        if not adopt:
            self._refuse_foreign(wanted, hint)
        arriving = {
            (f"{item['spec']['group']}/{version['name']}", item["spec"]["names"]["kind"])
            for item in wanted
            if item["kind"] == "CustomResourceDefinition"
            for version in item["spec"]["versions"]
        }
        for phase in [*_FIRST, None]:
            batch = [item for item in wanted if (item["kind"] == phase if phase else item["kind"] not in _FIRST)]
            if (
                phase is None
                and arriving
                and not self.dry_run
                and any((o["apiVersion"], o["kind"]) in arriving for o in batch)
            ):
                crds = [item for item in wanted if item["kind"] == "CustomResourceDefinition"]
                self.wait([_target_of(item) for item in crds], 60)
            with ThreadPoolExecutor(max_workers=8) as pool:
                for kind, before, after in pool.map(self._apply_one, batch):
                    getattr(self.outcome, kind).append(label_of(after))
                    if kind != "unchanged":
                        self.outcome.diff.append(diff_of(before, after))

    def _refuse_foreign(self, wanted: Iterable[Json], hint: str) -> None:
        foreign = []
        for item in wanted:
            resource = self.cluster.resource(item["apiVersion"], item["kind"])
            if resource is None:
                continue
            live = self._live(resource, item["metadata"].get("namespace"), item["metadata"]["name"])
            if live and (live["metadata"].get("labels") or {}).get(PART_OF) != self.labels.get(PART_OF):
                managers = sorted({entry.get("manager", "?") for entry in live["metadata"].get("managedFields") or []})
                release = (live["metadata"].get("annotations") or {}).get("meta.helm.sh/release-name")
                owner = f"Helm release {release}" if release else "field managers " + (", ".join(managers) or "unknown")
                foreign.append(f"{label_of(item)} ({owner})")
        if foreign:
            said = f"{hint.rstrip('.')}. " if hint else ""
            raise ApplyError(f"{said}These objects exist and belong to somebody else: {'; '.join(foreign)}")

    def _live(self, resource: Resource, namespace: str | None, name: str) -> Json | None:
        key = label(resource.kind, name, namespace)
        if key not in self._seen:
            self._seen[key] = self.cluster.get(resource, namespace, name)
        return self._seen[key]

    def _namespace_exists(self, namespace: str) -> bool:
        if namespace not in self._namespaces:
            resource = Resource("v1", "Namespace", "namespaces", False)
            self._namespaces[namespace] = self.cluster.get(resource, None, namespace) is not None
        return self._namespaces[namespace]

    def _apply_one(self, item: Json) -> tuple[str, Json | None, Json]:
        meta = item["metadata"]
        resource = self.cluster.resource(item["apiVersion"], item["kind"])
        if resource is None and not self.dry_run:
            resource = self.cluster.resource(item["apiVersion"], item["kind"], refresh=True)
        if resource is None:
            if self.dry_run:
                return "created", None, item
            raise ApplyError(
                f"{label_of(item)}: the cluster does not know {item['apiVersion']} {item['kind']}; install its CRD"
            )
        # Large objects carry a digest of what was applied, so that an unchanged one is not sent again.
        if item["kind"] == "CustomResourceDefinition":
            digest = digest_of(item)
            item = {**item, "metadata": {**meta, "annotations": {**(meta.get("annotations") or {}), DIGEST: digest}}}
        live = self._live(resource, meta.get("namespace"), meta["name"])
        if live is not None and item["kind"] == "CustomResourceDefinition":
            applied = (live["metadata"].get("annotations") or {}).get(DIGEST)
            if applied == digest and contains(live["spec"], item["spec"]):
                return "unchanged", live, item
        try:
            after = self.cluster.apply(resource, item, self.manager, self.dry_run)
        except ApiError as error:
            namespace = meta.get("namespace")
            if self.dry_run and error.status == 404 and namespace and not self._namespace_exists(namespace):
                return "created", None, item
            if (
                self.dry_run
                and error.status == 422
                and item["kind"] == "Service"
                and self._port_moves(item, str(error))
            ):
                return ("created" if live is None else "updated"), live, item
            ours = live is not None and (live["metadata"].get("labels") or {}).get(PART_OF) == self.labels.get(PART_OF)
            if error.status == 422 and item["kind"] in _REPLACED and ours:
                return self._replace(resource, live, item)
            raise ApplyError(f"{label_of(item)}: {error}") from error
        if live is None:
            self._seen.pop(label_of(item), None)
            return "created", None, after
        kind = "unchanged" if comparable(live) == comparable(after) else "updated"
        if kind == "updated":
            self._seen.pop(label_of(item), None)
        return kind, live, after

    def _port_moves(self, item: Json, said: str) -> bool:
        """Whether a node port is refused only because another Service of ours has it, which an earlier stage of the
        same deployment would make give it up."""
        if "port is already allocated" not in said:
            return False
        wanted = {port["nodePort"] for port in item["spec"].get("ports", []) if port.get("nodePort")}
        ours = self.cluster.list(
            Resource("v1", "Service", "services", True), selector=f"{PART_OF}={self.labels[PART_OF]}"
        )
        return bool(wanted & {port.get("nodePort") for live in ours for port in live["spec"].get("ports", [])})

    def _replace(self, resource: Resource, live: Json | None, item: Json) -> tuple[str, Json | None, Json]:
        """Delete an object of ours whose fields are fixed for life and make it anew."""
        if self.dry_run:
            return "updated", live, item
        self.cluster.delete(resource, None, item["metadata"]["name"])
        self._seen.pop(label_of(item), None)
        return "updated", live, self.cluster.apply(resource, item, self.manager)

    def align(self, rules: Iterable[Json]) -> None:
        """Repair fields of objects that an operator derived from ours and does not keep up to date itself.

        A rule names the objects (``api_version``, ``kind``, ``namespace``, and ``name`` or ``selector``, and ``where``,
        fields that they have) and the fields (``merge``).
        Nothing is created, and an entry of a list that the object lacks is left out.
        """
        for rule in rules:
            resource = self.cluster.resource(rule["api_version"], rule["kind"])
            if resource is None:
                continue
            try:
                found = self.cluster.list(resource, rule.get("namespace"), rule.get("selector") or "")
            except ApiError as error:
                if error.status == 404:
                    continue
                raise
            for live in found:
                if rule.get("name") and live["metadata"]["name"] != rule["name"]:
                    continue
                if not contains(live, rule.get("where") or {}):
                    continue
                after = merged(live, rule["merge"])
                if after == live or live["metadata"].get("deletionTimestamp"):
                    continue
                patch = {key: after[key] for key in rule["merge"]}
                name = live["metadata"]["name"]
                self.cluster.merge(
                    resource, live["metadata"].get("namespace"), name, patch, manager=self.manager, dry_run=self.dry_run
                )
                self.outcome.aligned.append(label_of(live))
                self.outcome.diff.append(diff_of(live, after))

    def prune(self, kinds: Iterable[Json], keep: Iterable[Json], protected: Iterable[str] = ()) -> list[Json]:
        """Delete what carries the set's labels, is of the given kinds, and is not in ``keep``. Returns what was
        deleted.

        Objects that something else owns (``ownerReferences``) are left to their owner, ``protected`` names are never
        deleted, and a CRD of which objects are left stays: deleting it would delete them.
        """
        kept = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in keep}
        gone = []
        for kind in kinds:
            resource = self.cluster.resource(kind["api_version"], kind["kind"])
            if resource is None:
                continue
            for live in self.cluster.list(resource, selector=self.selector):
                meta = live["metadata"]
                if (live["kind"], meta.get("namespace"), meta["name"]) in kept or meta["name"] in protected:
                    continue
                if meta.get("ownerReferences") or meta.get("deletionTimestamp"):
                    continue
                if live["kind"] == "CustomResourceDefinition" and self._in_use(live):
                    continue
                if not self.dry_run:
                    self.cluster.delete(resource, meta.get("namespace"), meta["name"])
                gone.append(live)
                self.outcome.pruned.append(label_of(live))
                self.outcome.diff.append(diff_of(live, None))
        return gone

    def remove(
        self,
        objects: Iterable[Json],
        kinds: Iterable[Json],
        protected: Iterable[str] = (),
        keep_crds: bool = False,
    ) -> list[Json]:
        """Delete the objects, and what else carries the set's labels among ``kinds``. Returns wait targets for their
        end.

        An object that lacks our part-of label is somebody else's and stays, and so does a CRD of which objects are
        left:
        deleting it would delete them.
        """
        protected = set(protected)
        gone = self.prune(kinds, keep=(), protected=protected)
        seen = {label_of(item) for item in gone}
        for item in objects:
            resource = self.cluster.resource(item["apiVersion"], item["kind"])
            meta = item["metadata"]
            live = resource and self.cluster.get(resource, meta.get("namespace"), meta["name"])
            if resource is None or not live or label_of(item) in seen or meta["name"] in protected:
                continue
            if (live["metadata"].get("labels") or {}).get(PART_OF) != self.labels.get(PART_OF):
                continue
            if item["kind"] == "CustomResourceDefinition" and (keep_crds or self._in_use(item)):
                continue
            if not self.dry_run:
                self.cluster.delete(resource, meta.get("namespace"), meta["name"])
            gone.append(live)
            self.outcome.pruned.append(label_of(live))
            self.outcome.diff.append(diff_of(live, None))
        return [{**_target_of(item), "gone": True} for item in gone]

    def _in_use(self, crd: Json) -> bool:
        spec = crd["spec"]
        version = next(entry["name"] for entry in spec["versions"] if entry.get("storage"))
        resource = self.cluster.resource(f"{spec['group']}/{version}", spec["names"]["kind"])
        return resource is not None and bool(self.cluster.list(resource))

    def wait(self, targets: Iterable[Json], timeout: float, evidence: Json | None = None, poll: float = 0.5) -> float:
        """Wait until every target is ready. Returns the seconds it took; raises ApplyError with evidence when
        ``timeout`` is over."""
        started = time.monotonic()
        waiting = list(targets)
        reasons: dict[str, str] = {}
        failed_since: float | None = None
        pause = poll
        while True:
            still = []
            for target in waiting:
                try:
                    state = self._state(target)
                except KubeError as error:
                    # An API server that restarts is waited for like everything else.
                    state = str(error)
                if state is not None:
                    still.append(target)
                    reasons[_target_label(target)] = state
            waiting = still
            elapsed = time.monotonic() - started
            if not waiting:
                return elapsed
            if not any(_FAILED in reasons[_target_label(target)] for target in waiting):
                failed_since = None
            elif failed_since is None:
                failed_since = elapsed
            if elapsed > timeout or (failed_since is not None and elapsed - failed_since > _FAILED_PATIENCE_S):
                open_ = [f"{name}: {reasons[name]}" for name in (_target_label(target) for target in waiting)]
                raise ApplyError(
                    f"not ready after {elapsed:.0f} s: " + "; ".join(open_),
                    collect_evidence(self.cluster, waiting, evidence or {}),
                )
            time.sleep(pause)
            pause = min(pause * 1.3, 3.0)

    def _state(self, target: Json) -> str | None:
        """None where the target is as wanted, else why not."""
        absent = bool(target.get("gone"))
        resource = self.cluster.resource(target["api_version"], target["kind"])
        if resource is None and not absent:
            resource = self.cluster.resource(target["api_version"], target["kind"], refresh=True)
        if resource is None:
            return None if absent else "its kind is not installed"
        if absent and target.get("selector"):
            left = self.cluster.list(resource, target.get("namespace"), target["selector"])
            return f"{len(left)} left: {', '.join(item['metadata']['name'] for item in left[:5])}" if left else None
        key = label(target["kind"], target["name"], target.get("namespace"))
        # What was read a moment ago and not changed since is as good as a new answer, once.
        live = self._seen.pop(key, None) or self.cluster.get(resource, target.get("namespace"), target["name"])
        if live is None:
            return None if absent else "it does not exist"
        if absent:
            finalizers = live["metadata"].get("finalizers") or live.get("spec", {}).get("finalizers") or []
            return "it still exists" + (f" (finalizers: {', '.join(finalizers)})" if finalizers else "")
        check = READY.get(target["kind"])
        if target.get("condition") or check is None:
            return condition_state(live, target.get("condition") or "Ready")
        return check(self.cluster, live)


def _target_label(target: Json) -> str:
    return label(target["kind"], target.get("name") or target.get("selector") or "", target.get("namespace"))


def _target_of(item: Json) -> Json:
    meta = item["metadata"]
    return {
        "api_version": item["apiVersion"],
        "kind": item["kind"],
        "namespace": meta.get("namespace"),
        "name": meta["name"],
    }


def condition_state(live: Json, condition: str) -> str | None:
    """None where the condition holds for the current generation, else what it says."""
    for entry in live.get("status", {}).get("conditions") or []:
        if entry["type"] == condition:
            if entry["status"] == "True":
                return None
            return f"{condition} is {entry['status']}: {entry.get('reason', '')} {entry.get('message', '')}".rstrip()
    return f"no condition {condition} yet"


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


def rayservice_state(cluster: Cluster, live: Json) -> str | None:
    """A RayService is ready when its current generation serves: no upgrade under way and each declared application
    RUNNING.

    A change of serveConfigV2 is applied in place, while the condition Ready stays True and the last statuses stay
    RUNNING, so Serve itself is
    asked (through the API server's proxy) whether it runs the declared configuration. Where the proxy is refused the
    object's status decides.
    """
    status = live.get("status", {})
    if status.get("observedGeneration", 0) < live["metadata"]["generation"]:
        return "the operator has not seen the change"
    pending = (status.get("pendingServiceStatus") or {}).get("rayClusterName")
    active = status.get("activeServiceStatus") or {}
    if pending:
        return f"cluster {pending} is being prepared" + (
            f" beside {active.get('rayClusterName')}" if active.get("rayClusterName") else ""
        )
    declared = {
        app["name"]: app for app in yaml.safe_load(live["spec"].get("serveConfigV2") or "{}").get("applications", [])
    }
    reported = active.get("applicationStatuses") or {}
    for name in sorted(declared.keys() | reported.keys()):
        state = (reported.get(name) or {}).get("status", "not deployed yet")
        if name not in declared:
            return f"application {name} is being deleted ({state})"
        if state != "RUNNING":
            message = (reported.get(name) or {}).get("message", "").strip().splitlines()
            return f"application {name} is {state}" + (f": {message[-1][:300]}" if message else "")
    meta = live["metadata"]
    path = f"/api/v1/namespaces/{meta['namespace']}/services/{meta['name']}-head-svc:8265/proxy/api/serve/applications/"
    try:
        headers = _ray_token(cluster, live, str(active.get("rayClusterName")))
        deployed: Json = cluster.request("GET", path, headers=headers).get("applications", {})
    except ApiError as error:
        if error.status not in (401, 403):
            return f"Serve's dashboard does not answer yet ({error.status})"
    else:
        for name, app in declared.items():
            running = deployed.get(name) or {}
            config = running.get("deployed_app_config") or {}
            if config.get("args") != app.get("args") or config.get("route_prefix") != app.get("route_prefix"):
                return f"application {name}: Serve has not taken the new configuration yet"
            if running.get("status") != "RUNNING":
                return (
                    f"application {name} is {running.get('status')}: {str(running.get('message', '')).strip()[-300:]}"
                )
    return condition_state(live, "Ready")


READY: dict[str, Callable[[Cluster, Json], str | None]] = {
    "CustomResourceDefinition": crd_state,
    "DaemonSet": daemonset_state,
    "Deployment": deployment_state,
    "RayService": rayservice_state,
    "StatefulSet": statefulset_state,
}


def collect_evidence(cluster: Cluster, targets: Iterable[Json], where: Json, log_lines: int = 15) -> list[str]:
    """Conditions of the targets, and the pods, last log lines and warning events of ``where`` (``namespace``, pod
    ``selector``)."""
    lines: list[str] = []
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
            lines += _pod_evidence(cluster, namespace, pod, log_lines)
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
    return lines


def _pod_evidence(cluster: Cluster, namespace: str, pod: Json, log_lines: int) -> list[str]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    lines = [f"pod {name}: {status.get('phase', 'unknown')}"]
    lines += [
        f"  {entry['type']}: {entry['message']}"
        for entry in status.get("conditions") or []
        if entry["status"] != "True" and entry.get("message")
    ]
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = next(iter((container.get("state") or {"unknown": {}}).items()))
        if state[0] == "terminated" and state[1].get("exitCode") == 0:
            continue
        said = " ".join(str(state[1][key]) for key in ("reason", "message", "exitCode") if key in state[1])
        lines.append(
            f"  container {container['name']}: {state[0]} {said} restarts={container.get('restartCount', 0)}".rstrip()
        )
        if state[0] != "waiting" or container.get("restartCount", 0):
            log = cluster.pod_log(namespace, name, container["name"], log_lines, previous=state[0] == "waiting")
            lines += [f"    | {line}" for line in log.splitlines()]
    return lines
