"""States of objects, waits and their ends, against an API server that keeps its objects in memory."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    connection_from_environment,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.apply import ApplyError, ApplySet
from ansible_collections.rayplane.platform.plugins.module_utils.kube.quantity import quantity
from ansible_collections.rayplane.platform.plugins.module_utils.kube.room import no_node_for, requests_of, tolerates
from ansible_collections.rayplane.platform.plugins.module_utils.kube.serve import retry_failed
from ansible_collections.rayplane.platform.plugins.module_utils.kube.state import (
    Final,
    daemonset_state,
    deployment_state,
    pods_problem,
    rayservice_state,
    statefulset_state,
)
from conftest import connection_to
from kube_fake import LABELS, Json, Server


def work(cluster: Cluster) -> ApplySet:
    return ApplySet(cluster, LABELS, "rayplane")


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


def test_a_load_balancer_is_waited_for(server: Server, cluster: Cluster) -> None:
    balanced: Json = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "llm"}, "spec": {}}
    server.put("/api/v1/namespaces/llm/services/s", balanced)
    target = {"api_version": "v1", "kind": "Service", "namespace": "llm", "name": "s"}
    with pytest.raises(ApplyError, match="Service llm/s: its load balancer has no address yet"):
        work(cluster).wait([target], 0)
    balanced["status"] = {"loadBalancer": {"ingress": [{"hostname": "x.elb.us-west-2.amazonaws.com"}]}}
    work(cluster).wait([target], 0)


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


@pytest.fixture
def prometheus(server: Server) -> Json:
    """An object of an operator, and the StatefulSet that the operator has made of it."""
    server.kinds["apps/v1"]["StatefulSet"] = ("statefulsets", True)
    server.kinds["monitoring.coreos.com/v1"] = {"Prometheus": ("prometheuses", True)}
    live: Json = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "Prometheus",
        "metadata": {"name": "p", "namespace": "llm", "generation": 2, "uid": "1"},
        "status": {
            "conditions": [
                {"type": "Available", "status": "True", "observedGeneration": 2},
                {"type": "Reconciled", "status": "True", "observedGeneration": 1},
            ]
        },
    }
    made: Json = {
        "metadata": {"name": "prometheus-p", "namespace": "llm", "generation": 2, "ownerReferences": [{"uid": "1"}]},
        "spec": {"selector": {"matchLabels": {"app": "p"}}},
        "status": {"observedGeneration": 2, "updateRevision": "r2", "readyReplicas": 1, "updatedReplicas": 0},
    }
    server.put("/apis/monitoring.coreos.com/v1/namespaces/llm/prometheuses/p", live)
    server.put("/apis/apps/v1/namespaces/llm/statefulsets/prometheus-p", made)
    return live


OPERATORS = {"api_version": "monitoring.coreos.com/v1", "kind": "Prometheus", "namespace": "llm", "name": "p"}


def test_an_operators_pods_are_those_of_this_generation(server: Server, cluster: Cluster, prometheus: Json) -> None:
    with pytest.raises(ApplyError, match="Prometheus llm/p: Reconciled is of an earlier generation"):
        work(cluster).wait([OPERATORS], 0)
    prometheus["status"]["conditions"][1]["observedGeneration"] = 2
    with pytest.raises(ApplyError, match="Prometheus llm/p: 1 of 1 replicas ready, 0 up to date"):
        work(cluster).wait([OPERATORS], 0)
    made = server.objects["/apis/apps/v1/namespaces/llm/statefulsets/prometheus-p"]
    made["status"]["updatedReplicas"] = 1
    work(cluster).wait([OPERATORS], 0)


def test_a_pod_of_an_operators_that_cannot_start_ends_the_wait(
    server: Server, cluster: Cluster, prometheus: Json
) -> None:
    prometheus["status"]["conditions"][1]["observedGeneration"] = 2
    waits = {"reason": "ErrImagePull", "message": "v0: not found"}
    pod: Json = {
        "metadata": {"name": "p-0", "namespace": "llm", "labels": {"app": "p", "controller-revision-hash": "r2"}},
        "spec": {},
        "status": {"containerStatuses": [{"name": "c", "image": "i:v0", "state": {"waiting": waits}}]},
    }
    server.put("/api/v1/namespaces/llm/pods/p-0", pod)
    with pytest.raises(
        ApplyError, match="cannot become ready: Prometheus llm/p: pod p-0: image i:v0 cannot be pulled: v0: not found"
    ):
        work(cluster).wait([OPERATORS], 120, poll=0.2)


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


PROXY = "/api/v1/namespaces/llm/services/r-1-head-svc:8265/proxy/api/serve/applications/"


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


def test_a_stateful_set_is_ready_with_the_current_revision() -> None:
    live: Json = {"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": {"observedGeneration": 1}}
    cluster: Any = None
    assert statefulset_state(cluster, live) == "the controller has not seen the change"
    live["status"] = {"observedGeneration": 2, "readyReplicas": 1}
    assert statefulset_state(cluster, live) == "1 of 1 replicas ready, 0 up to date"
    live["status"] |= {"updatedReplicas": 1}
    assert statefulset_state(cluster, live) is None


READY = [{"type": "Ready", "status": "True"}]
# Longer than any machine needs.
LONG_S = 300.0
RAY_TARGET = {"api_version": "ray.io/v1", "kind": "RayService", "namespace": "llm", "name": "r"}
TRACEBACK = """Deploying app 'a' failed with exception:
Traceback (most recent call last):
  File "engine.py", line 1, in from_args
ValueError: Unknown engine argument: no_such_argument
"""


def failed(message: str, n: int = 1) -> Json:
    config = {"args": {"n": n}, "route_prefix": "/"}
    return {"applications": {"a": {"status": "DEPLOY_FAILED", "message": message, "deployed_app_config": config}}}


@pytest.mark.parametrize("which", ["active", "pending"])
def test_a_failed_application_ends_the_wait_with_its_last_line(server: Server, cluster: Cluster, which: str) -> None:
    server.kinds["ray.io/v1"] = {"RayService": ("rayservices", True)}
    status = {"activeServiceStatus": {}, f"{which}ServiceStatus": {"rayClusterName": "r-1"}}
    server.put("/apis/ray.io/v1/namespaces/llm/rayservices/r", {**service(**status), "kind": "RayService"})
    server.put(PROXY, failed(TRACEBACK))
    with pytest.raises(ApplyError) as caught:
        work(cluster).wait([RAY_TARGET], 60, poll=0.1)
    assert str(caught.value).splitlines()[0] == (
        "cannot become ready: RayService llm/r: application a is DEPLOY_FAILED: "
        "ValueError: Unknown engine argument: no_such_argument (a rerun tries again)"
    )


def test_the_failure_of_the_configuration_before_is_waited_out(server: Server, cluster: Cluster) -> None:
    server.put(PROXY, failed(TRACEBACK, n=0))
    state = rayservice_state(cluster, service())
    assert state is not None and "not taken the new" in state and not isinstance(state, Final)


def test_a_deployments_reason_is_told_rather_than_the_applications(server: Server, cluster: Cluster) -> None:
    answer = failed("Failed to update the deployments ['LLMServer'].")
    error = "The deployment failed to start 3 times in a row. Error:\nTraceback\nRuntimeError: Engine core failed"
    answer["applications"]["a"]["deployments"] = {
        "Ingress": {"status": "UPDATING", "message": "Waiting for 1 replica."},
        "LLMServer": {"status": "DEPLOY_FAILED", "message": error},
    }
    server.put(PROXY, answer)
    said = "application a is DEPLOY_FAILED: RuntimeError: Engine core failed"
    assert rayservice_state(cluster, service()) == f"{said} (a rerun tries again)"
    answer["applications"]["a"]["deployments"]["LLMServer"]["replicas"] = [{"state": "RUNNING"}]
    assert str(rayservice_state(cluster, service())).startswith(f"{said} (its earlier replicas go on")


class Serve(Cluster):
    """Serve with these applications; ``told`` are the names in each configuration that it was given."""

    def __init__(self, applications: Json, refuses: dict[int, int] | None = None) -> None:
        self.applications = applications
        self.told: list[list[str]] = []
        self.refuses = refuses or {}

    def request(self, method: str, path: str, body: Any = None, query: Any = None, **options: Any) -> Any:
        if method == "PUT":
            if status := self.refuses.get(len(self.told)):
                raise ApiError(method, path, status, {})
            self.told.append([app["name"] for app in body["applications"]])
            self.applications = {name: app for name, app in self.applications.items() if name in self.told[-1]}
        return {"applications": self.applications}


def seen_as(status: str) -> Json:
    return service(activeServiceStatus={"rayClusterName": "r-1", "applicationStatuses": {"a": {"status": status}}})


BUILD_FAILED = failed(TRACEBACK)["applications"]["a"]
NO_REPLICA = BUILD_FAILED | {"deployments": {"LLMServer": {"status": "DEPLOY_FAILED", "replicas": []}}}
OLD_REPLICA = BUILD_FAILED | {
    "deployments": {"LLMServer": {"status": "DEPLOY_FAILED", "replicas": [{"state": "RUNNING"}]}}
}


@pytest.mark.parametrize(
    ("applications", "status", "told"),
    [
        ({"a": BUILD_FAILED}, "DEPLOY_FAILED", [["a"]]),
        ({"a": NO_REPLICA}, "DEPLOY_FAILED", [[], ["a"]]),
        ({"a": OLD_REPLICA}, "", []),
        ({}, "absent", [["a"]]),
        ({"a": BUILD_FAILED | {"status": "RUNNING"}}, "", []),
        (failed(TRACEBACK, n=0)["applications"], "", []),
    ],
    ids=["not built", "no replica", "an old replica answers", "lost", "runs", "an earlier configuration's failure"],
)
def test_a_rerun_tries_a_failed_application_again(applications: Json, status: str, told: list[list[str]]) -> None:
    cluster, live = Serve(applications), seen_as("DEPLOY_FAILED")
    again = retry_failed(cluster, live, dry_run=True)
    assert again == ({"a": status} if told else {}) and not cluster.told
    assert retry_failed(cluster, live) == again and cluster.told == told


def test_serve_is_not_asked_where_the_operator_saw_all_applications_run() -> None:
    cluster: Any = None
    assert retry_failed(cluster, seen_as("RUNNING")) == {}


def test_what_serve_does_not_take_is_told() -> None:
    """An application that is gone by then, the next run brings back. Who may not tell Serve changes nothing."""
    assert retry_failed(Serve({"a": NO_REPLICA}, {0: 403}), seen_as("DEPLOY_FAILED")) == {}
    broken = Serve({"a": NO_REPLICA}, {1: 500})
    with pytest.raises(ApiError):
        retry_failed(broken, seen_as("DEPLOY_FAILED"))
    broken.refuses = {}
    assert retry_failed(broken, seen_as("DEPLOY_FAILED")) == {"a": "absent"} and broken.told == [[], ["a"]]


def test_a_rerun_reports_what_it_tries_again(server: Server, cluster: Cluster) -> None:
    server.kinds["ray.io/v1"] = {"RayService": ("rayservices", True)}
    path = "/apis/ray.io/v1/namespaces/llm/rayservices/r"
    item = {"apiVersion": "ray.io/v1", "kind": "RayService", **seen_as("DEPLOY_FAILED")}
    server.put("/api/v1/namespaces/llm", {"metadata": {"name": "llm"}})
    server.put(PROXY, failed(TRACEBACK))
    work(cluster).apply([item])
    server.objects[path]["status"] = item["status"]
    for expected in (["application a of RayService llm/r"], []):
        again = ApplySet(cluster, LABELS, "rayplane", dry_run=True)
        again.apply([item])
        again.retry([RAY_TARGET])
        assert again.outcome.aligned == expected
        server.put(PROXY, {"applications": {"a": {"status": "DEPLOYING"}}})


def test_credentials_that_stay_refused_end_the_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ansible_collections.rayplane.platform.plugins.module_utils.kube.apply._REFUSED_PATIENCE_S", 0.1
    )
    server.tokens = {"good"}
    refused = Cluster(connection_to(f"http://127.0.0.1:{server.server_address[1]}", "bad"))
    target = {"api_version": "v1", "kind": "Secret", "namespace": "llm", "name": "s"}
    with pytest.raises(ApplyError, match="cannot become ready: Secret llm/s: GET /api/v1: 401 Unauthorized"):
        work(refused).wait([target], 60, poll=0.05)


V1 = "client.authentication.k8s.io/v1"
PLUGIN = """#!/bin/sh
until=$(date -u -d '+5 seconds' +%Y-%m-%dT%H:%M:%SZ)
echo 1 >> $0.count
echo '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",'
echo ' "status": {"token": "'$(date +%s.%N)'", "expirationTimestamp": "'$until'"}}'
"""


def test_a_wait_outlives_tokens_that_live_five_seconds(server: Server, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(PLUGIN)
    plugin.chmod(0o755)
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "u", "user": {"exec": {"apiVersion": V1, "command": str(plugin)}}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    server.token_life_s = 5.0
    connection = connection_from_environment(str(tmp_path / "config"))
    place = "/api/v1/namespaces/llm/secrets/s"
    late = threading.Timer(12.0, server.put, (place, {"metadata": {"name": "s"}, "status": {"conditions": READY}}))
    late.start()
    target = {"api_version": "v1", "kind": "Secret", "namespace": "llm", "name": "s"}
    waited = work(Cluster(connection)).wait([target], LONG_S)
    late.join()
    assert waited > 10
    assert (tmp_path / "plugin.count").read_text().count("1") >= 3


def deployment() -> Json:
    selector = {"matchLabels": {"app": "d"}}
    return {
        "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "llm", "annotations": {"deployment.kubernetes.io/revision": "2"}},
        "spec": {"selector": selector},
    }


def running_set(server: Server, revision: str, waiting: Json) -> None:
    """A ReplicaSet of the Deployment d, and its pod whose container waits."""
    meta = {
        "name": f"d-{revision}",
        "namespace": "llm",
        "labels": {"app": "d", "pod-template-hash": f"hash{revision}"},
        "annotations": {"deployment.kubernetes.io/revision": revision},
    }
    server.put(f"/apis/apps/v1/namespaces/llm/replicasets/d-{revision}", {"metadata": meta})
    status = {"containerStatuses": [{"name": "c", "image": "i:1", "state": {"waiting": waiting}}]}
    server.put(f"/api/v1/namespaces/llm/pods/d-{revision}-x", {"metadata": meta, "spec": {}, "status": status})


@pytest.mark.parametrize(
    ("reason", "message", "said"),
    [
        ("ErrImageNeverPull", "", "image i:1 cannot be pulled: ErrImageNeverPull"),
        ("ImagePullBackOff", "Back-off: pull access denied", "image i:1 cannot be pulled: Back-off"),
        ("CreateContainerConfigError", 'secret "s" not found', 'container c: secret "s" not found'),
        ("ErrImagePull", "dial tcp: i/o timeout", None),
        ("ContainerCreating", "", None),
    ],
)
def test_what_a_pod_cannot_get_over(
    server: Server, cluster: Cluster, reason: str, message: str, said: str | None
) -> None:
    running_set(server, "2", {"reason": reason, "message": message})
    found = pods_problem(cluster, deployment())
    assert said in str(found) if said else found is None


@pytest.mark.parametrize(
    ("message", "patience_s"),
    [
        ("manifest for i:1 not found", 5),
        ("pull access denied, repository does not exist or may require authorization", 5),
        ("unexpected status from HEAD request: 403 Forbidden", 45),
    ],
)
def test_a_refused_pull_is_tried_again_before_it_is_final(
    server: Server, cluster: Cluster, message: str, patience_s: float
) -> None:
    running_set(server, "2", {"reason": "ErrImagePull", "message": message})
    problem = pods_problem(cluster, deployment())
    assert problem is not None and problem.patience_s == patience_s


def test_pods_of_an_earlier_revision_do_not_matter(server: Server, cluster: Cluster) -> None:
    running_set(server, "1", {"reason": "InvalidImageName"})
    running_set(server, "2", {"reason": "ContainerCreating"})
    assert pods_problem(cluster, deployment()) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("300m", 0.3),
        ("16Gi", 16 * 2**30),
        (4, 4.0),
        ("1e3", 1000.0),
        ("2k", 2000.0),
        ("1Ki", 1024),
        ("1.5E", 1.5e18),
        ("100n", 1e-7),
    ],
)
def test_quantities(value: Any, number: float) -> None:
    assert quantity(value) == pytest.approx(number)


@pytest.mark.parametrize("value", ["16GiB", "1K", "", "four", "1 Gi", "1.2.3", True, None])
def test_no_quantities(value: object) -> None:
    with pytest.raises(ValueError, match="is no Kubernetes quantity"):
        quantity(value)


def test_a_pod_reserves_the_sum_of_its_containers_or_its_largest_first_one() -> None:
    def entry(cpu: str, **more: Any) -> Json:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {
        "containers": [entry("1"), {"resources": {"limits": {"cpu": "500m", "nvidia.com/gpu": 1}}}],
        "initContainers": [entry("4"), entry("250m", restartPolicy="Always")],
        "overhead": {"cpu": "100m"},
    }
    assert requests_of(spec) == pytest.approx({"cpu": 4.1, "nvidia.com/gpu": 1.0})


@pytest.mark.parametrize(
    ("toleration", "yes"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "false"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations(toleration: Json, yes: bool) -> None:
    taint = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}
    assert tolerates({"tolerations": [toleration]}, taint) is yes


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, None),
        ({"nodeSelector": {"zone": "b"}}, "none of 2 nodes has the labels zone=b"),
        ({"nodeSelector": {"gpu": "yes"}}, "it tolerates none of the taints of 1 nodes (gpu:NoSchedule)"),
        ({"memory": "9Gi"}, "it asks for memory 9.0 GiB where a node has 8.0 GiB to give at most"),
        ({"gpu": 1}, "it asks for nvidia.com/gpu 1 where a node has 0 to give at most"),
        ({"gpu": 1, "nodeSelector": {"gpu": "yes"}, "tolerations": [{"operator": "Exists"}]}, None),
    ],
)
def test_why_no_node_takes_a_pod(server: Server, cluster: Cluster, spec: Json, said: str | None) -> None:
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    for name, labels, taints, more in (
        ("plain", {"zone": "a"}, [], {}),
        ("accelerated", {"gpu": "yes"}, [taint], {"nvidia.com/gpu": "1"}),
    ):
        node = {
            "metadata": {"name": name, "labels": labels},
            "spec": {"taints": taints},
            "status": {"allocatable": {"cpu": "2", "memory": "8Gi", **more}},
        }
        server.put(f"/api/v1/nodes/{name}", node)
    requests = {"memory": spec.pop("memory", "1Gi"), **({"nvidia.com/gpu": spec.pop("gpu")} if "gpu" in spec else {})}
    assert no_node_for(cluster, {**spec, "containers": [{"resources": {"requests": requests}}]}) == said
