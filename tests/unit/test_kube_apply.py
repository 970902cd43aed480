"""Apply, align and prune against an API server that keeps its objects in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    ClusterToCome,
    NoKubeconfigError,
    connection_from_environment,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.apply import (
    ApplyError,
    ApplySet,
    comparable,
    diff_of,
    merged,
)
from conftest import connection_to
from kube_fake import LABELS, Json, Server


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


def test_nothing_is_removed_that_others_need_for_their_own_end(server: Server, cluster: Cluster) -> None:
    kinds = [{"api_version": "apps/v1", "kind": "Deployment"}, {"api_version": "v1", "kind": "ConfigMap"}]
    users = [{"api_version": "x.io/v1", "kind": "Thing", "hint": "?"}]
    users += [{"api_version": "v1", "kind": "Service", "hint": "Take the Services away first."}]
    server.put("/api/v1/namespaces/llm/services/s", {"metadata": {"name": "s", "namespace": "llm"}})
    # Somebody else's are none of the set's concern.
    work(cluster).refuse_while_used(kinds, users)
    work(cluster).apply([NAMESPACE, config_map("a")])
    with pytest.raises(ApplyError, match=r"Service llm/s could not go any more\. Take the Services away first"):
        work(cluster).refuse_while_used(kinds, users)
    del server.objects["/api/v1/namespaces/llm/services/s"]
    work(cluster).refuse_while_used(kinds, users)


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
    cluster = Cluster(connection_to(f"http://127.0.0.1:{server.server_address[1]}"), retries=0)
    plan = ApplySet(cluster, LABELS, "rayplane", dry_run=True)
    plan.apply([wanted])
    assert plan.outcome.created == ["Service a/new"]
    with pytest.raises(ApplyError, match="already allocated"):
        ApplySet(cluster, LABELS, "rayplane").apply([wanted])
    holder["metadata"]["labels"] = {}
    with pytest.raises(ApplyError, match="already allocated"):
        ApplySet(cluster, LABELS, "rayplane", dry_run=True).apply([wanted])


STATEFUL = "/apis/apps/v1/namespaces/llm/statefulsets/gateway"


def stateful(cpu: str, image: str = "old") -> Json:
    container = {"name": "c", "image": image, "resources": {"requests": {"cpu": cpu, "memory": "1Gi"}}}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "gateway", "namespace": "llm"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": "gateway"}},
            "template": {"metadata": {"labels": {"app": "gateway"}}, "spec": {"containers": [container]}},
        },
    }


def pod(name: str, cpu: str, revision: str = "1", **status: Any) -> Json:
    labels = {"app": name.rsplit("-", 1)[0], "controller-revision-hash": revision}
    spec = {"nodeName": "one", "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}
    return {"metadata": {"name": name, "namespace": "llm", "labels": labels}, "spec": spec, "status": status}


@pytest.fixture
def two_cores(server: Server) -> Server:
    """A node with two cores: a gateway's pod reserves one of them, another's pod a half."""
    server.put("/api/v1/namespaces/llm", NAMESPACE)
    node = {"metadata": {"name": "one"}, "spec": {}, "status": {"allocatable": {"cpu": "2", "memory": "8Gi"}}}
    server.put("/api/v1/nodes/one", node)
    live = stateful("1")
    live["metadata"] |= {"resourceVersion": "7", "generation": 1, "labels": LABELS}
    server.put(STATEFUL, {**live, "status": {"observedGeneration": 1, "updateRevision": "2"}})
    server.put("/api/v1/namespaces/llm/pods/gateway-0", pod("gateway-0", "1"))
    server.put("/api/v1/namespaces/llm/pods/other-0", pod("other-0", "500m"))
    return server


@pytest.mark.parametrize(
    ("kind", "strategy", "cpu"),
    [
        ("StatefulSet", {}, "64"),
        ("StatefulSet", {}, "1800m"),
        ("Deployment", {"type": "Recreate"}, "1800m"),
        ("Deployment", {"type": "RollingUpdate"}, "64"),
    ],
)
def test_a_running_pod_is_not_ended_for_one_without_a_place(
    two_cores: Server, cluster: Cluster, kind: str, strategy: Json, cpu: str
) -> None:
    """The plan says so, too. The pod that goes leaves its own reservation to its successor."""
    two_cores.put(STATEFUL.replace("statefulset", kind.lower()), {**stateful("1"), "kind": kind})
    changed = {**stateful(cpu), "kind": kind}
    changed["spec"]["strategy"] = strategy
    for dry_run in (True, False):
        with pytest.raises(ApplyError, match=rf"{kind} llm/gateway stays as it is: .*has (1.5 free|2 to give) at most"):
            work(cluster, dry_run).apply([changed])
    assert two_cores.writes == []
    changed["spec"]["template"] = stateful("1500m")["spec"]["template"]
    work(cluster).apply([changed])
    assert len(two_cores.writes) == 1


def test_room_that_is_used_up_is_waited_for_beside_the_old_pod(two_cores: Server, cluster: Cluster) -> None:
    """Nodes may come that nobody announced. Who may not list pods changes theirs, too."""
    path = STATEFUL.replace("statefulset", "deployment")
    two_cores.put(path, {**stateful("1"), "kind": "Deployment"})
    work(cluster).apply([{**stateful("1800m"), "kind": "Deployment"}])
    two_cores.unlisted = {"pods"}
    work(cluster).apply([stateful("1800m")])
    assert two_cores.writes == [f"PATCH {path}", f"PATCH {STATEFUL}"]


def test_a_node_that_is_not_ready_may_get_ready_again(two_cores: Server, cluster: Cluster) -> None:
    taint = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}
    two_cores.objects["/api/v1/nodes/one"]["spec"]["taints"] = [taint]
    work(cluster).apply([stateful("1500m")])
    assert two_cores.writes == [f"PATCH {STATEFUL}"]


@pytest.mark.parametrize("autoscaler", ["karpenter", "cluster-autoscaler"])
def test_where_nodes_may_come_room_is_not_asked_for(two_cores: Server, cluster: Cluster, autoscaler: str) -> None:
    if autoscaler == "karpenter":
        two_cores.kinds["karpenter.sh/v1"] = {"NodePool": ("nodepools", False)}
    else:
        status = {"metadata": {"name": "cluster-autoscaler-status", "namespace": "openshift-machine-api"}}
        two_cores.put("/api/v1/namespaces/openshift-machine-api/configmaps/cluster-autoscaler-status", status)
    work(cluster).apply([stateful("64")])
    assert two_cores.writes == [f"PATCH {STATEFUL}"]


def test_no_selector_and_an_empty_one_are_the_same(two_cores: Server, cluster: Cluster) -> None:
    """Or a rerun without a change would be refused where the large node has gone."""
    deployment = {**stateful("64"), "kind": "Deployment"}
    two_cores.put("/apis/apps/v1/namespaces/llm/deployments/gateway", {**stateful("64"), "kind": "Deployment"})
    deployment["spec"]["template"]["spec"]["nodeSelector"] = {}
    work(cluster).apply([deployment])


def test_a_change_that_cannot_start_is_taken_back(
    two_cores: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"waiting": {"reason": "ErrImagePull", "message": "no/such:image: not found"}}
    status = {"containerStatuses": [{"name": "c", "image": "no/such:image", "state": gone}]}
    stuck = "/api/v1/namespaces/llm/pods/gateway-0"
    two_cores.put(stuck, pod("gateway-0", "1", revision="2", **status))
    change = work(cluster)
    change.apply([stateful("1", image="no/such:image")])
    monkeypatch.setattr("ansible_collections.rayplane.platform.plugins.module_utils.kube.state.IMAGE_PATIENCE_S", 0.05)
    target = {"api_version": "apps/v1", "kind": "StatefulSet", "namespace": "llm", "name": "gateway"}
    with pytest.raises(ApplyError, match=r"cannot become ready: .*image no/such:image cannot be pulled") as caught:
        change.wait([target], 60, {"namespace": "llm"}, poll=0.02)
    assert "StatefulSet llm/gateway was set back to what ran before" in str(caught.value)
    assert two_cores.writes[-2:] == [f"PUT {STATEFUL}", f"DELETE {stuck}"]
    assert two_cores.objects[STATEFUL]["spec"]["template"]["spec"]["containers"][0]["image"] == "old"


@pytest.mark.parametrize(
    ("container", "set_back"),
    [
        ({"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 1}, True),
        ({"state": {"running": {}}, "restartCount": 3}, True),
        ({"state": {"waiting": {"reason": "ImagePullBackOff", "message": "i/o timeout"}}, "restartCount": 0}, True),
        ({"state": {"waiting": {"reason": "ContainerCreating"}}, "restartCount": 0}, False),
        ({"state": {"running": {}}, "restartCount": 0}, False),
        ({"state": {"running": {}}, "restartCount": 3, "ready": True}, False),
    ],
)
def test_when_time_is_over_a_change_that_fails_is_taken_back_and_a_slow_one_is_not(
    two_cores: Server, cluster: Cluster, container: Json, set_back: bool
) -> None:
    status = {"containerStatuses": [{"name": "c", "image": "new", **container}]}
    two_cores.put("/api/v1/namespaces/llm/pods/gateway-0", pod("gateway-0", "1", revision="2", **status))
    change = work(cluster)
    change.apply([stateful("1", image="new")])
    target = {"api_version": "apps/v1", "kind": "StatefulSet", "namespace": "llm", "name": "gateway"}
    with pytest.raises(ApplyError, match="not ready after") as caught:
        change.wait([target], 0)
    assert ("was set back" in str(caught.value)) is set_back
    assert (f"PUT {STATEFUL}" in two_cores.writes) is set_back


@pytest.mark.parametrize(
    ("condition", "set_back"),
    [
        ({"type": "Progressing", "status": "True"}, False),
        ({"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}, True),
        ({"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}, True),
        ({"type": "Available", "status": "False"}, True),
    ],
)
def test_who_may_not_list_pods_is_told_by_the_deployment(
    two_cores: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, condition: Json, set_back: bool
) -> None:
    path = "/apis/apps/v1/namespaces/llm/deployments/gateway"
    available = {"type": "Available", "status": "True"}
    live: Json = {**stateful("1"), "kind": "Deployment"}
    live["metadata"] |= {"resourceVersion": "7", "generation": 1, "labels": LABELS}
    live["status"] = {"observedGeneration": 1, "conditions": [condition, available]}
    two_cores.put(path, live)
    two_cores.unlisted = {"pods", "replicasets"}
    monkeypatch.setattr(
        "ansible_collections.rayplane.platform.plugins.module_utils.kube.apply._REFUSED_PATIENCE_S", 0.0
    )
    change = work(cluster)
    change.apply([{**stateful("1", image="new"), "kind": "Deployment"}])
    target = {"api_version": "apps/v1", "kind": "Deployment", "namespace": "llm", "name": "gateway"}
    with pytest.raises(ApplyError, match="not ready after") as caught:
        change.wait([target], 0)
    assert ("was set back" in str(caught.value)) is set_back
    assert two_cores.writes == [f"PATCH {path}", *([f"PUT {path}"] if set_back else [])]
