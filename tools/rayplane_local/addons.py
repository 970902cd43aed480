"""What every cluster has and kubeadm does not bring: a default StorageClass and resource metrics."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from . import images, parts
from .cluster import kubectl
from .keys import content_key, read_json, write_text
from .progress import Step
from .settings import Settings
from .shell import run, wait_for

LABELS = {
    "app.kubernetes.io/part-of": "rayplane",
    "app.kubernetes.io/managed-by": "ansible",
    "app.kubernetes.io/component": "local_platform",
}
FIELD_MANAGER = "rayplane"
Name = tuple[str, str, str]
KUBE_PROXY: Name = ("kube-system", "daemonset", "kube-proxy")
# What has to be there, and whether it has to run before the platform counts as up: nothing waits for metrics, which
# need 20 s to come.
WORKLOADS: dict[Name, bool] = {
    ("kube-system", "deployment", "coredns"): True,
    KUBE_PROXY: True,
    ("kube-system", "deployment", "metrics-server"): False,
    ("local-path-storage", "deployment", "local-path-provisioner"): True,
}


def pod_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    """The pod template's spec of a workload, or None of anything else."""
    return document["spec"]["template"]["spec"] if document["kind"] in ("Deployment", "DaemonSet") else None


def set_images(document: dict[str, Any], image: str) -> None:
    """Let a workload run an image that is on the node."""
    if (spec := pod_spec(document)) is not None:
        for container in spec["containers"]:
            container["image"] = image
            container["imagePullPolicy"] = "Never"


def label(document: dict[str, Any]) -> None:
    """Put the project's labels on an object (selectors stay upstream's)."""
    document["metadata"]["labels"] = {**document["metadata"].get("labels", {}), **LABELS}


def metrics_server(settings: Settings) -> list[dict[str, Any]]:
    """metrics-server as upstream ships it; the kubelet's serving certificate is its own, so it is not verified."""
    base = settings.home / "sources" / "metrics-server" / "manifests" / "base"
    found = [
        document
        for document in yaml.safe_load_all(run([settings.bin / "kubectl", "kustomize", base]).stdout)
        if document
    ]
    for document in found:
        set_images(document, images.METRICS_SERVER_IMAGE)
        if (spec := pod_spec(document)) is not None:
            spec["containers"][0]["args"].append("--kubelet-insecure-tls")
            spec["containers"][0]["resources"] = {"requests": {"cpu": "10m", "memory": "64Mi"}}
    return found


def local_path(settings: Settings) -> list[dict[str, Any]]:
    """The local-path provisioner as upstream ships it, as the default class, with its volumes in the state folder."""
    file = settings.home / "sources" / "local-path-provisioner" / "deploy" / "local-path-storage.yaml"
    found = [document for document in yaml.safe_load_all(file.read_text()) if document]
    for document in found:
        set_images(document, images.PROVISIONER_IMAGE)
        if document["kind"] == "StorageClass":
            document["metadata"].setdefault("annotations", {})["storageclass.kubernetes.io/is-default-class"] = "true"
        if document["kind"] == "ConfigMap":
            config = json.loads(document["data"]["config.json"])
            config["nodePathMap"] = [
                {"node": "DEFAULT_PATH_FOR_NON_LISTED_NODES", "paths": [f"{settings.state}/volumes"]}
            ]
            document["data"]["config.json"] = json.dumps(config, indent=2)
            helper = yaml.safe_load(document["data"]["helperPod.yaml"])
            for container in helper["spec"]["containers"]:
                container["image"], container["imagePullPolicy"] = images.BUSYBOX_IMAGE, "Never"
            document["data"]["helperPod.yaml"] = yaml.safe_dump(helper)
    return found


def manifests(settings: Settings) -> str:
    """Every add-on's objects as one YAML stream, namespaces first."""
    found = [*local_path(settings), *metrics_server(settings)]
    for document in found:
        label(document)
    found.sort(key=lambda document: document["kind"] != "Namespace")
    return yaml.safe_dump_all(found, sort_keys=False)


def stamp(settings: Settings) -> Path:
    return settings.state / "addons.json"


def key(settings: Settings) -> str:
    """Changes with the parts' sources and with what is made of them, without reading them."""
    inputs = [item.key() for item in parts.PARTS if item.sources]
    return content_key(
        inputs,
        LABELS,
        images.METRICS_SERVER_IMAGE,
        images.PROVISIONER_IMAGE,
        str(settings.state),
        files=[Path(__file__)],
    )


def not_available(settings: Settings, names: Collection[Name] = tuple(WORKLOADS)) -> str:
    """Which of the cluster's own workloads are not there or do not run whole; empty when all do."""
    done = kubectl(
        settings, "--request-timeout=5s", "get", "deployments,daemonsets", "--all-namespaces", "-o", "json", check=False
    )
    if done.returncode != 0:
        return done.stderr.strip()[-300:]
    found = {}
    for item in json.loads(done.stdout)["items"]:
        status = item.get("status", {})
        wanted = item["spec"].get("replicas", status.get("desiredNumberScheduled", 1))
        have = status.get("availableReplicas", status.get("numberAvailable", 0))
        current = status.get("observedGeneration", 0) >= item["metadata"]["generation"]
        name = (item["metadata"]["namespace"], item["kind"].lower(), item["metadata"]["name"])
        found[name] = (current and have >= wanted) or not WORKLOADS.get(name, True)
    return ", ".join("/".join(name) for name in names if not found.get(name))


def pending(settings: Settings) -> list[str]:
    """What is not as it should be."""
    if read_json(stamp(settings)) != key(settings):
        return ["add-ons: local-path StorageClass, metrics-server"]
    return [f"add-ons: {missing}"] if (missing := not_available(settings)) else []


def apply(settings: Settings, step: Step) -> None:
    """Apply the add-ons (server-side, so that what upstream drops goes too) and wait until everything runs."""
    # Pods that start before Services work fail, and wait 10 s before they try again.
    wait_for("kube-proxy", lambda: not_available(settings, [KUBE_PROXY]), step, seconds=120)
    step.note = "applying"
    kubectl(
        settings,
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager",
        FIELD_MANAGER,
        "-f",
        "-",
        stdin=manifests(settings),
    )
    wait_for("the add-ons", lambda: not_available(settings), step, seconds=180, pause=0.5)
    write_text(stamp(settings), json.dumps(key(settings)))
