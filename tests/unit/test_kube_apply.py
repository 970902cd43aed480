"""Apply, align, prune and wait against an API server that speaks real HTTP and keeps its objects in memory."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from ansible.module_utils.kube_api import (
    ApiError,
    Cluster,
    ClusterToCome,
    Connection,
    KubeError,
    NoKubeconfigError,
    connection_from_environment,
)
from ansible.module_utils.kube_apply import (
    ApplyError,
    ApplySet,
    comparable,
    daemonset_state,
    deployment_state,
    diff_of,
    merged,
    rayservice_state,
    statefulset_state,
)

Json = dict[str, Any]

LABELS = {
    "app.kubernetes.io/part-of": "rayplane",
    "app.kubernetes.io/component": "test",
    "app.kubernetes.io/instance": "unit",
}
KINDS = {
    "v1": {"Namespace": ("namespaces", False), "Secret": ("secrets", True), "ConfigMap": ("configmaps", True),
           "Pod": ("pods", True), "Event": ("events", True), "Service": ("services", True)},
    "apps/v1": {"Deployment": ("deployments", True)},
    "apiextensions.k8s.io/v1": {"CustomResourceDefinition": ("customresourcedefinitions", False)},
}  # fmt: skip


class Server(ThreadingHTTPServer):
    """Objects by path; ``writes`` lists what was sent without a dry run."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Json] = {}
        self.kinds = copy.deepcopy(KINDS)
        self.writes: list[str] = []
        #: Paths that Ray lets in only with this in X-Ray-Authorization.
        self.protected: dict[str, str] = {}
        self.lock = threading.Lock()

    def put(self, path: str, item: Json) -> None:
        self.objects[path] = item


def overlay(live: Any, wanted: Any) -> Any:
    if isinstance(live, dict) and isinstance(wanted, dict):
        return {**live, **{key: overlay(live.get(key), value) for key, value in wanted.items()}}
    return wanted


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        with self.server.lock:
            self.answer(*self.respond(url.path, query, body))

    do_GET = do_PATCH = do_DELETE = handle_any  # noqa: N815

    def respond(self, path: str, query: dict[str, str], body: Json | None) -> tuple[int, Json]:
        objects = self.server.objects
        for version, kinds in self.server.kinds.items():
            root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
            if path == root:
                return 200, {"resources": [{"kind": k, "name": n, "namespaced": s} for k, (n, s) in kinds.items()]}
        missing = (404, {"reason": "NotFound", "message": f"{path} not found"})
        if self.command == "GET":
            if self.headers.get("X-Ray-Authorization", "") != self.server.protected.get(path, ""):
                return 403, {"message": "Forbidden: Invalid authentication token"}
            if path in objects:
                return 200, objects[path]
            parts = path.split("/")
            if parts[-1] in {name for kinds in self.server.kinds.values() for name, _ in kinds.values()}:
                wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
                found = [
                    item
                    for key, item in objects.items()
                    if key.split("/")[-2] == parts[-1]
                    and ("namespaces" not in parts[:-1] or key.startswith(path))
                    and wanted.items() <= (item["metadata"].get("labels") or {}).items()
                ]
                return 200, {"items": found}
            return missing
        if self.command == "DELETE":
            if path not in objects:
                return missing
            self.server.writes.append(f"DELETE {path}")
            return 200, objects.pop(path)
        assert body is not None
        parts = path.split("/")
        namespaced = "namespaces" in parts and parts[-2] != "namespaces"
        if namespaced and f"/api/v1/namespaces/{parts[parts.index('namespaces') + 1]}" not in objects:
            return missing
        live = objects.get(path, {"metadata": {"generation": 1}})
        after = overlay(live, body)
        if query.get("dryRun") != "All":
            self.server.writes.append(f"PATCH {path}")
            if after != live:
                after["metadata"]["resourceVersion"] = str(len(self.server.writes))
            objects[path] = after
        return 200, after


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cluster(server: Server) -> Cluster:
    return Cluster(Connection(server=f"http://127.0.0.1:{server.server_address[1]}"))


def config_map(name: str, **data: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "llm"}, "data": data}


NAMESPACE: Json = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}


def work(cluster: Cluster, dry_run: bool = False) -> ApplySet:
    return ApplySet(cluster, LABELS, "rayplane", dry_run)


def test_apply_creates_then_leaves_alone(server: Server, cluster: Cluster) -> None:
    first = work(cluster)
    first.apply([config_map("a", key="1"), NAMESPACE])
    assert first.outcome.created == ["Namespace llm", "ConfigMap llm/a"]
    second = work(cluster)
    second.apply([config_map("a", key="1"), NAMESPACE])
    assert not second.outcome.changed
    assert server.objects["/api/v1/namespaces/llm/configmaps/a"]["metadata"]["labels"] == LABELS


def test_check_mode_predicts_without_writing(server: Server, cluster: Cluster) -> None:
    """On an empty cluster: neither the namespace nor the CRD of what is declared exists."""
    plan = work(cluster, dry_run=True)
    custom = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "r", "namespace": "llm"}}
    plan.apply([NAMESPACE, config_map("a", key="1"), custom])
    assert plan.outcome.created == ["Namespace llm", "ConfigMap llm/a", "RayService llm/r"]
    assert server.writes == []
    assert server.objects == {}


def test_a_change_by_hand_is_repaired_and_named(server: Server, cluster: Cluster) -> None:
    work(cluster).apply([NAMESPACE, config_map("a", key="1"), config_map("b", key="1")])
    server.objects["/api/v1/namespaces/llm/configmaps/a"]["data"]["key"] = "2"
    repair = work(cluster)
    repair.apply([NAMESPACE, config_map("a", key="1"), config_map("b", key="1")])
    assert repair.outcome.updated == ["ConfigMap llm/a"]
    assert "key: '2'" in repair.outcome.diff[0]["before"]
    assert "key: '1'" in repair.outcome.diff[0]["after"]


def test_unknown_kind_fails_with_its_name(cluster: Cluster) -> None:
    with pytest.raises(ApplyError, match=r"RayService llm/r: .*ray.io/v1 RayService; install its CRD"):
        work(cluster).apply(
            [{"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "r", "namespace": "llm"}}]
        )


def test_prune_deletes_only_our_own(server: Server, cluster: Cluster) -> None:
    work(cluster).apply([NAMESPACE, config_map("a"), config_map("b"), config_map("owned")])
    server.objects["/api/v1/namespaces/llm/configmaps/owned"]["metadata"]["ownerReferences"] = [{"name": "x"}]
    server.put("/api/v1/namespaces/llm/configmaps/other", {**config_map("other"), "kind": "ConfigMap"})
    kinds = [{"api_version": "v1", "kind": "ConfigMap"}]
    plan = work(cluster, dry_run=True)
    plan.prune(kinds, keep=[config_map("a")])
    assert plan.outcome.pruned == ["ConfigMap llm/b"]
    assert "/api/v1/namespaces/llm/configmaps/b" in server.objects
    real = work(cluster)
    real.prune(kinds, keep=[config_map("a")])
    assert sorted(server.objects) == [
        "/api/v1/namespaces/llm",
        "/api/v1/namespaces/llm/configmaps/a",
        "/api/v1/namespaces/llm/configmaps/other",
        "/api/v1/namespaces/llm/configmaps/owned",
    ]


def test_remove_leaves_what_is_not_ours(server: Server, cluster: Cluster) -> None:
    work(cluster).apply([NAMESPACE, config_map("a")])
    server.put("/api/v1/namespaces/llm/configmaps/foreign", config_map("foreign"))
    gone = work(cluster).remove([config_map("a"), config_map("foreign")], [])
    assert [target["name"] for target in gone] == ["a"]
    work(cluster).wait(gone, 1)
    assert work(cluster).remove([config_map("a")], []) == []


def test_foreign_objects_are_refused_before_any_change(server: Server, cluster: Cluster) -> None:
    foreign = config_map("a")
    foreign["metadata"]["annotations"] = {"meta.helm.sh/release-name": "kuberay-operator"}
    server.put("/api/v1/namespaces/llm/configmaps/a", foreign)
    with pytest.raises(ApplyError, match=r"Decide\. These objects .*ConfigMap llm/a \(Helm release kuberay-operator\)"):
        work(cluster).apply([NAMESPACE, config_map("a")], adopt=False, hint="Decide.")
    assert server.writes == []


def test_crds_are_sent_once(server: Server, cluster: Cluster) -> None:
    crd: Json = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.x.io"},
        "spec": {"group": "x.io", "names": {"kind": "Thing"}, "versions": [{"name": "v1", "schema": {"a": 1}}]},
    }
    work(cluster).apply([crd])
    work(cluster).apply([crd])
    assert server.writes == ["PATCH /apis/apiextensions.k8s.io/v1/customresourcedefinitions/things.x.io"]
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/things.x.io"
    server.objects[path]["spec"]["versions"][0]["schema"] = {"a": 2}
    repair = work(cluster)
    repair.apply([crd])
    assert repair.outcome.updated == ["CustomResourceDefinition things.x.io"]
    assert "sha256" in repair.outcome.diff[0]["after"]


def test_align_repairs_named_entries(server: Server, cluster: Cluster) -> None:
    live = config_map("r-abcde")
    live["metadata"]["labels"] = {"of": "r"}
    live["spec"] = {"groups": [{"groupName": "cpu", "replicas": 4, "x": 1}, {"groupName": "gpu", "replicas": 2}]}
    server.put("/api/v1/namespaces/llm/configmaps/r-abcde", live)
    rule = {
        "api_version": "v1",
        "kind": "ConfigMap",
        "namespace": "llm",
        "selector": "of=r",
        "merge": {"spec": {"groups": [{"groupName": "cpu", "replicas": 1}, {"groupName": "new", "replicas": 1}]}},
    }
    server.put("/api/v1/namespaces/llm", NAMESPACE)
    repair = work(cluster)
    repair.align([rule])
    assert repair.outcome.aligned == ["ConfigMap llm/r-abcde"]
    groups = server.objects["/api/v1/namespaces/llm/configmaps/r-abcde"]["spec"]["groups"]
    assert groups == [{"groupName": "cpu", "replicas": 1, "x": 1}, {"groupName": "gpu", "replicas": 2}]
    again = work(cluster)
    again.align([rule])
    assert not again.outcome.changed


def test_wait_fails_with_evidence(server: Server, cluster: Cluster) -> None:
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "llm", "generation": 1},
        "spec": {"replicas": 1},
        "status": {
            "observedGeneration": 1,
            "conditions": [{"type": "Available", "status": "False", "reason": "Slow", "message": "no pod"}],
        },
    }
    server.put("/apis/apps/v1/namespaces/llm/deployments/d", deployment)
    pod = {
        "metadata": {"name": "d-1", "namespace": "llm", "labels": {"app": "d"}},
        "status": {
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes available"}],
            "containerStatuses": [
                {"name": "c", "state": {"waiting": {"reason": "ImagePullBackOff"}}, "restartCount": 0}
            ],
        },
    }
    server.put("/api/v1/namespaces/llm/pods/d-1", pod)
    event = {
        "metadata": {"name": "e", "namespace": "llm", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "type": "Warning",
        "reason": "Failed",
        "message": "no such image",
        "involvedObject": {"kind": "Pod", "name": "d-1"},
    }
    server.put("/api/v1/namespaces/llm/events/e", event)
    target = {"api_version": "apps/v1", "kind": "Deployment", "namespace": "llm", "name": "d"}
    with pytest.raises(ApplyError) as caught:
        work(cluster).wait([target], 0.1, {"namespace": "llm", "selector": "app=d"}, poll=0.05)
    text = str(caught.value)
    for part in ("0 of 1 replicas", "0/1 nodes available", "ImagePullBackOff", "event Pod/d-1: Failed: no such image"):
        assert part in text


def test_a_deployment_that_failed_is_not_waited_for_to_the_end(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ansible.module_utils.kube_apply._FAILED_PATIENCE_S", 0.1)
    server.kinds["ray.io/v1"] = {"RayService": ("rayservices", True)}
    broken = {"activeServiceStatus": {"applicationStatuses": {"a": {"status": "DEPLOY_FAILED", "message": "no GPU"}}}}
    server.put("/apis/ray.io/v1/namespaces/llm/rayservices/r", {**service(**broken), "kind": "RayService"})
    target = {"api_version": "ray.io/v1", "kind": "RayService", "namespace": "llm", "name": "r"}
    with pytest.raises(ApplyError, match="application a is DEPLOY_FAILED: no GPU"):
        work(cluster).wait([target], 60, poll=0.05)


def test_secret_values_stay_out_of_the_diff() -> None:
    before = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"token": "b2xk", "same": "eA=="}}
    after = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"token": "bmV3", "same": "eA=="}}
    shown = diff_of(before, after)
    assert "b2xk" not in str(shown)
    assert "bmV3" not in str(shown)
    assert "token: (hidden, before)" in shown["before"]
    assert "token: (hidden, after)" in shown["after"]
    assert "same: (hidden)" in shown["after"]
    assert "bmV3" not in str(diff_of(None, after))


def test_comparable_ignores_the_servers_bookkeeping() -> None:
    item = {"metadata": {"name": "a", "uid": "1", "managedFields": [], "annotations": {"x": "1"}}, "status": {"a": 1}}
    assert comparable(item) == {"metadata": {"name": "a", "annotations": {"x": "1"}}}
    assert comparable(None) == {}


def test_merged_replaces_plain_lists() -> None:
    assert merged({"a": [1, 2], "b": 1}, {"a": [3]}) == {"a": [3], "b": 1}
    assert merged({"p": [{"name": "x", "port": 1}]}, {"p": [{"name": "x", "nodePort": 3}]}) == {
        "p": [{"name": "x", "port": 1, "nodePort": 3}]
    }


def test_deployment_is_not_ready_while_an_old_pod_is_left(cluster: Cluster) -> None:
    live: Json = {
        "metadata": {"generation": 2},
        "spec": {"replicas": 1},
        "status": {"observedGeneration": 2, "updatedReplicas": 1, "replicas": 2, "availableReplicas": 1},
    }
    assert deployment_state(cluster, live) is not None
    live["status"]["replicas"] = 1
    assert deployment_state(cluster, live) is None


def daemons(generation: int = 1, **status: int) -> Json:
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "d", "namespace": "llm", "generation": generation},
        "status": {"observedGeneration": 1, **status},
    }


def test_daemon_set_is_ready_where_no_node_wants_it(cluster: Cluster) -> None:
    nowhere = {"desiredNumberScheduled": 0, "numberAvailable": 0, "updatedNumberScheduled": 0}
    assert daemonset_state(cluster, daemons(**nowhere)) is None
    assert daemonset_state(cluster, daemons(2, **nowhere)) == "the controller has not seen the change"


def test_daemon_set_is_ready_once_every_node_runs_the_current_pods(cluster: Cluster) -> None:
    rolling = {"desiredNumberScheduled": 3, "numberAvailable": 3, "updatedNumberScheduled": 2}
    assert daemonset_state(cluster, daemons(**rolling)) == "3 of 3 pods available, 2 up to date"
    rolling["updatedNumberScheduled"] = 3
    assert daemonset_state(cluster, daemons(**rolling)) is None
    rolling["numberAvailable"] = 2
    assert daemonset_state(cluster, daemons(**rolling)) == "2 of 3 pods available, 3 up to date"


def test_a_wait_for_a_daemon_set_ends_with_the_reason(server: Server, cluster: Cluster) -> None:
    server.kinds["apps/v1"]["DaemonSet"] = ("daemonsets", True)
    server.put("/apis/apps/v1/namespaces/llm/daemonsets/d", daemons(desiredNumberScheduled=1))
    target = {"api_version": "apps/v1", "kind": "DaemonSet", "namespace": "llm", "name": "d"}
    with pytest.raises(ApplyError, match="DaemonSet llm/d: 0 of 1 pods available"):
        ApplySet(cluster, LABELS, "rayplane").wait([target], 0, poll=0.01)


def test_prune_leaves_a_crd_of_which_objects_are_left(server: Server, cluster: Cluster) -> None:
    root = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for name in ("things", "others"):
        kind = name.capitalize()
        spec = {"group": "x.io", "names": {"kind": kind}, "versions": [{"name": "v1", "storage": True}]}
        server.put(f"{root}/{name}.x.io", {"metadata": {"name": f"{name}.x.io", "labels": LABELS}, "spec": spec})
    server.kinds["x.io/v1"] = {"Things": ("things", False), "Others": ("others", False)}
    server.put("/apis/x.io/v1/things/t", {"metadata": {"name": "t"}})
    work = ApplySet(cluster, LABELS, "rayplane")
    work.prune([{"api_version": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}], keep=[])
    assert work.outcome.pruned == ["CustomResourceDefinition others.x.io"]
    assert f"{root}/things.x.io" in server.objects


def service(**status: Any) -> Json:
    config = {"applications": [{"name": "a", "route_prefix": "/", "args": {"n": 1}}]}
    return {
        "metadata": {"name": "r", "namespace": "llm", "generation": 3},
        "spec": {"serveConfigV2": yaml.safe_dump(config)},
        "status": {
            "observedGeneration": 3,
            "conditions": [{"type": "Ready", "status": "True"}],
            "activeServiceStatus": {"rayClusterName": "r-1", "applicationStatuses": {"a": {"status": "RUNNING"}}},
            **status,
        },
    }


PROXY = "/api/v1/namespaces/llm/services/r-head-svc:8265/proxy/api/serve/applications/"


def test_rayservice_waits_for_serve_to_take_the_configuration(server: Server, cluster: Cluster) -> None:
    running = {"status": "RUNNING", "deployed_app_config": {"args": {"n": 0}, "route_prefix": "/"}}
    server.put(PROXY, {"applications": {"a": running}})
    assert "not taken the new configuration" in str(rayservice_state(cluster, service()))
    running["deployed_app_config"] = {"args": {"n": 1}, "route_prefix": "/"}
    assert rayservice_state(cluster, service()) is None


def test_a_dashboard_with_tokens_is_shown_the_clusters_own(server: Server, cluster: Cluster) -> None:
    live = service()
    live["spec"]["rayClusterConfig"] = {"authOptions": {"mode": "token"}}
    for name, token in (("r-0", "old"), ("r-1", "new")):
        secret = {
            "metadata": {"name": name, "labels": {"ray.io/cluster": name}},
            "data": {"auth_token": base64.b64encode(token.encode()).decode()},
        }
        server.put(f"/api/v1/namespaces/llm/secrets/{name}", secret)
    running = {"status": "RUNNING", "deployed_app_config": {"args": {"n": 0}, "route_prefix": "/"}}
    server.put(PROXY, {"applications": {"a": running}})
    server.protected[PROXY] = "Bearer new"
    assert "not taken the new configuration" in str(rayservice_state(cluster, live))
    # Refused, the object's own status decides.
    server.protected[PROXY] = "Bearer other"
    assert rayservice_state(cluster, live) is None


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"observedGeneration": 2}, "has not seen the change"),
        ({"pendingServiceStatus": {"rayClusterName": "r-2"}}, "cluster r-2 is being prepared beside r-1"),
        (
            {
                "activeServiceStatus": {
                    "applicationStatuses": {"a": {"status": "DEPLOY_FAILED", "message": "x\nno GPU"}}
                }
            },
            "application a is DEPLOY_FAILED: no GPU",
        ),
        ({"activeServiceStatus": {}}, "application a is not deployed yet"),
    ],
)
def test_rayservice_is_not_ready(cluster: Cluster, status: Json, said: str) -> None:
    assert said in str(rayservice_state(cluster, service(**status)))


def test_kubeconfig(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("K8S_AUTH_HOST", "K8S_AUTH_KUBECONFIG", "K8S_AUTH_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    plugin = tmp_path / "token.sh"
    plugin.write_text('#!/bin/sh\necho \'{"status": {"token": "secret"}}\'\n')
    plugin.chmod(0o755)
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://one:6443/", "certificate-authority": "ca.crt"}}],
        "users": [{"name": "u", "user": {"exec": {"command": str(plugin)}}}],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{path}")
    found = connection_from_environment()
    assert found.server == "https://one:6443"
    assert found.headers == {"Authorization": "Bearer secret"}
    assert found.ca_file == str(tmp_path / "ca.crt")
    with pytest.raises(KubeError, match=r"no context 'other' .*it has: c"):
        connection_from_environment(context="other")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(KubeError, match=r"no kubeconfig can be read.*No such file"):
        connection_from_environment()
    monkeypatch.setenv("K8S_AUTH_HOST", "https://awx")
    monkeypatch.setenv("K8S_AUTH_API_KEY", "key")
    assert connection_from_environment().headers == {"Authorization": "Bearer key"}


def test_a_cluster_to_come_is_predicted_without_asking_anybody(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("K8S_AUTH_KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(NoKubeconfigError, match="no kubeconfig can be read"):
        connection_from_environment()
    work = ApplySet(ClusterToCome(), LABELS, "rayplane", dry_run=True)
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "one"}}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": "one"},
        "data": {"k": "dg=="},
    }
    work.apply([secret, namespace], adopt=False)
    work.align([{"api_version": "v1", "kind": "Secret", "selector": "a=b", "merge": {}}])
    work.prune([{"api_version": "v1", "kind": "Secret"}], keep=[secret])
    assert work.outcome.created == ["Namespace one", "Secret one/s"]
    assert "dg==" not in json.dumps(work.outcome.diff)


def test_no_api_server_is_told_by_its_address() -> None:
    with pytest.raises(KubeError, match=r"http://127.0.0.1:9 does not answer"):
        Cluster(Connection(server="http://127.0.0.1:9")).request("GET", "/version")


def test_a_refusal_carries_the_servers_words(cluster: Cluster) -> None:
    with pytest.raises(ApiError, match="GET /nothing: 404 /nothing not found"):
        cluster.request("GET", "/nothing")


def test_a_stateful_set_is_ready_with_the_current_revision() -> None:
    live: Json = {"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": {"observedGeneration": 1}}
    cluster: Any = None
    assert statefulset_state(cluster, live) == "the controller has not seen the change"
    live["status"] = {"observedGeneration": 2, "readyReplicas": 1}
    assert statefulset_state(cluster, live) == "1 of 1 replicas ready, 0 up to date"
    live["status"] |= {"updatedReplicas": 1}
    assert statefulset_state(cluster, live) is None


def test_a_plan_lets_a_node_port_move_between_our_services(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Service that has it gives it up in an earlier stage, which a dry run has not carried out."""
    wanted = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "new", "namespace": "a"},
        "spec": {"ports": [{"port": 1, "nodePort": 30080}]},
    }
    holder = {"metadata": {"name": "old", "labels": dict(LABELS)}, "spec": {"ports": [{"port": 1, "nodePort": 30080}]}}
    server.put("/api/v1/namespaces/a/services/old", holder)

    def refuse(*_: Any, **__: Any) -> Json:
        raise ApiError("PATCH", "/", 422, {"message": "Invalid value: 30080: provided port is already allocated"})

    monkeypatch.setattr(Cluster, "apply", refuse)
    cluster = Cluster(Connection(server=f"http://127.0.0.1:{server.server_address[1]}"), retries=0)
    plan = ApplySet(cluster, LABELS, "rayplane", dry_run=True)
    plan.apply([wanted])
    assert plan.outcome.created == ["Service a/new"]
    with pytest.raises(ApplyError, match="already allocated"):
        ApplySet(cluster, LABELS, "rayplane").apply([wanted])
    holder["metadata"]["labels"] = {}
    with pytest.raises(ApplyError, match="already allocated"):
        ApplySet(cluster, LABELS, "rayplane", dry_run=True).apply([wanted])
