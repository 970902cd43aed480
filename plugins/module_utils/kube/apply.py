"""Bring a set of Kubernetes objects to what is declared: apply, align, prune, wait.

One call handles everything a role declares. Objects are applied server-side with one field manager; a dry run asks the
API server the
same questions, so check mode's prediction passes through its defaulting and validation. What cannot be asked yet (the
namespace or the
CRD of an object comes with the same deployment) is predicted as created.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    CredentialError,
    Json,
    KubeError,
    Resource,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.room import no_node_for, requests_of
from ansible_collections.rayplane.platform.plugins.module_utils.kube.serve import retry_failed
from ansible_collections.rayplane.platform.plugins.module_utils.kube.state import (
    READY,
    Final,
    cannot_start,
    collect_evidence,
    current_condition_state,
    current_pods,
    is_ready,
    pods_problem,
    selector_of,
)

DIGEST = "rayplane.io/applied-digest"
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"
INSTANCE = "app.kubernetes.io/instance"
_VOLATILE = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink")
_BOOKKEEPING = (DIGEST, "deployment.kubernetes.io/revision")
_BASE_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# A refused credential may be an API server's that has just started and does not know its rules yet.
_REFUSED_PATIENCE_S = 15.0
# Applied before everything else, in this order: others live in them or are instances of them.
_FIRST = ("Namespace", "CustomResourceDefinition")
# Kinds whose fields are fixed for life, while nothing that was made with an object needs it any more.
_REPLACED = ("StorageClass",)
# Kinds of which a change replaces pods that run.
_REPLACES_PODS = ("Deployment", "StatefulSet")
# Lists whose entries have a name of their own, for alignment.
_ENTRY_KEYS = ("name", "groupName")


class _Dumper(_BASE_DUMPER):  # type: ignore[misc]
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
        # Objects with pods as they were before a change, by label.
        self._before: dict[str, Json] = {}

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
        self._look_for_room(item, live)
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
            if item["kind"] in _REPLACES_PODS and not self.dry_run:
                self._before[label_of(item)] = live
        return kind, live, after

    def _look_for_room(self, item: Json, live: Json | None) -> None:
        """Refuse a change of pods that run for some that no node could take if it were empty; and for some without room
        now where the old pod goes first: a StatefulSet's does, and a Deployment's whose strategy is Recreate."""
        if live is None or item["kind"] not in _REPLACES_PODS:
            return
        old, new = live["spec"]["template"]["spec"], item["spec"]["template"]["spec"]
        if requests_of(old) == requests_of(new) and (old.get("nodeSelector") or {}) == (new.get("nodeSelector") or {}):
            return
        strategy = item["spec"].get("strategy") or live["spec"].get("strategy") or {}
        labels = live["spec"]["selector"].get("matchLabels") or {}
        without = None
        if labels and (item["kind"] == "StatefulSet" or strategy.get("type") == "Recreate"):
            pods = Resource("v1", "Pod", "pods", True)
            try:
                own = self.cluster.list(pods, live["metadata"].get("namespace"), selector_of(labels))
                without = [pod["metadata"]["name"] for pod in own]
            except ApiError as error:
                if error.status != 403:
                    raise
        if why := no_node_for(self.cluster, new, without):
            raise ApplyError(
                f"{label_of(item)} stays as it is: its changed pod fits on no node: {why}. "
                "Lower what it asks for, or add a node."
            )

    def _restore(self, names: Iterable[str], certain: bool) -> list[str]:
        """Give objects that cannot become ready back the pods that they had; what was done, in words.

        Where it is not ``certain``, an object whose pods are merely slow is left to go on.
        """
        done = []
        for name in names:
            before = self._before.get(name)
            resource = self.cluster.resource(before["apiVersion"], before["kind"]) if before else None
            if before is None or resource is None:
                continue
            meta = before["metadata"]
            try:
                live = self.cluster.get(resource, meta["namespace"], meta["name"])
                if live is None or not (certain or cannot_start(self.cluster, live)):
                    continue
                version = {"resourceVersion": live["metadata"]["resourceVersion"]}
                path = resource.path(meta["namespace"], meta["name"])
                self.cluster.request("PUT", path, {**before, "metadata": {**meta, **version}})
            except KubeError as error:
                done.append(f"{name} could not be set back to what ran before: {error}")
                continue
            done.append(f"{name} was set back to what ran before")
            if live["kind"] == "StatefulSet":
                done += self._end_stuck_pods(live)
        return done

    def _end_stuck_pods(self, live: Json) -> list[str]:
        """Delete the pods of a StatefulSet that do not start: before it replaces them, its controller waits for them to
        get ready, for ever. Returns what went wrong, in words."""
        try:
            for pod in current_pods(self.cluster, live):
                if not is_ready(pod):
                    meta = pod["metadata"]
                    self.cluster.delete(Resource("v1", "Pod", "pods", True), meta["namespace"], meta["name"])
        except KubeError as error:
            return [f"delete the pods of {label_of(live)} that are not ready, or they stay as they are: {error}"]
        return []

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

    def refuse_while_used(self, kinds: Iterable[Json], users: Iterable[Json]) -> None:
        """Stop where objects are left that need what the set owns among ``kinds`` for their own end.

        ``users`` are ``api_version`` and ``kind``, with the cure as ``hint``. Raises ApplyError.
        """
        for user in users:
            resource = self.cluster.resource(user["api_version"], user["kind"])
            left = self.cluster.list(resource) if resource else []
            owned = (found for kind in kinds if (found := self.cluster.resource(kind["api_version"], kind["kind"])))
            if left and any(self.cluster.list(found, selector=self.selector) for found in owned):
                names = ", ".join(label_of({"kind": user["kind"], **item}) for item in left[:5])
                raise ApplyError(f"nothing is deleted: {names} could not go any more. {user['hint']}")

    def _in_use(self, crd: Json) -> bool:
        spec = crd["spec"]
        version = next(entry["name"] for entry in spec["versions"] if entry.get("storage"))
        resource = self.cluster.resource(f"{spec['group']}/{version}", spec["names"]["kind"])
        return resource is not None and bool(self.cluster.list(resource))

    def retry(self, targets: Iterable[Json]) -> None:
        """Have Serve try again what failed with a configuration that this set did not change."""
        for target in targets:
            name = _target_label(target)
            live = self._seen.get(name)
            if target["kind"] != "RayService" or name not in self.outcome.unchanged or not live:
                continue
            for application, status in retry_failed(self.cluster, live, self.dry_run).items():
                said = f"application {application} of {name}"
                self.outcome.aligned.append(said)
                self.outcome.diff.append(
                    {
                        "before_header": said,
                        "after_header": said,
                        "before": f"status: {status}\n",
                        "after": "status: DEPLOYING\n",
                    }
                )

    def wait(self, targets: Iterable[Json], timeout: float, evidence: Json | None = None, poll: float = 0.5) -> float:
        """Wait until every target is ready. Returns the seconds it took.

        Raises ApplyError with evidence when ``timeout`` is over, and as soon as a target cannot become ready any more.
        """
        started = time.monotonic()
        waiting = list(targets)
        reasons: dict[str, str] = {}
        final_since: dict[str, float] = {}
        pause = poll
        while True:
            still = []
            for target in waiting:
                name = _target_label(target)
                state = self._seen_state(target)
                if state is not None:
                    still.append(target)
                    reasons[name] = state
                if not isinstance(state, Final):
                    final_since.pop(name, None)
            waiting = still
            elapsed = time.monotonic() - started
            if not waiting:
                return elapsed
            names = [_target_label(target) for target in waiting]
            lost = []
            for name in names:
                state = reasons[name]
                if isinstance(state, Final) and elapsed - final_since.setdefault(name, elapsed) >= state.patience_s:
                    lost.append(name)
            if lost or elapsed > timeout:
                said = "; ".join(f"{name}: {reasons[name]}" for name in lost or names)
                shown = collect_evidence(self.cluster, waiting, evidence or {})
                restored = self._restore(lost or names, certain=bool(lost))
                how = "cannot become ready" if lost else f"not ready after {elapsed:.0f} s"
                raise ApplyError(f"{how}: {said}", [*restored, *shown])
            time.sleep(pause)
            pause = min(pause * 1.3, 3.0)

    def _seen_state(self, target: Json) -> str | None:
        """None where the target is as wanted, else why not. An API server that restarts is waited for like
        everything else."""
        state: str | None
        try:
            state = self._state(target)
        except KubeError as error:
            refused = isinstance(error, CredentialError) or (isinstance(error, ApiError) and error.status in (401, 403))
            state = Final(str(error), _REFUSED_PATIENCE_S) if refused else str(error)
        return state

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
            state: str | None = current_condition_state(live, target.get("condition") or "Ready")
        else:
            state = check(self.cluster, live)
        if state is not None and not isinstance(state, Final):
            state = pods_problem(self.cluster, live) or state
        return state


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
