"""The Kubernetes cluster: one node, made by kubeadm."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from . import images, mounts, parts, services
from .errors import PlatformError
from .keys import content_key, read_json, write_text
from .progress import Step
from .settings import KUBELET_FOLDER, KUBERNETES_FOLDER, MARKER, Settings
from .shell import run, run_long, wait_for

# Ten years: a platform on one machine has nobody who would renew its certificates.
CERTIFICATE_HOURS = "87600h"


def stamp(settings: Settings) -> Path:
    """Written when kubeadm is through; holds the key of what the cluster was made from."""
    return settings.state / "cluster.json"


def key(settings: Settings) -> str:
    return content_key(config(settings))


def config(settings: Settings) -> str:
    """kubeadm's configuration (v1beta4), with the kubelet's and kube-proxy's."""
    documents: list[dict[str, Any]] = [
        {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "InitConfiguration",
            "localAPIEndpoint": {"advertiseAddress": settings.address, "bindPort": settings.api_port},
            "nodeRegistration": {
                "name": settings.node_name,
                "criSocket": f"unix://{settings.containerd_socket}",
                "taints": [],
                "imagePullPolicy": "Never",
                "kubeletExtraArgs": [{"name": "node-ip", "value": settings.address}],
            },
        },
        {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "ClusterConfiguration",
            "clusterName": "rayplane-local",
            "kubernetesVersion": images.KUBERNETES,
            "networking": {"podSubnet": settings.pod_subnet, "serviceSubnet": settings.service_subnet},
            "certificateValidityPeriod": CERTIFICATE_HOURS,
            "caCertificateValidityPeriod": CERTIFICATE_HOURS,
            # Only on the platform's own address: no other machine routes there.
            "apiServer": {
                "extraArgs": [{"name": "bind-address", "value": settings.address}],
                "certSANs": [settings.address],
            },
            "dns": {"imageTag": images.COREDNS_TAG},
            "etcd": {"local": {"dataDir": f"{settings.state}/etcd", "imageTag": images.ETCD_TAG}},
        },
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": settings.address,
            "cgroupDriver": "cgroupfs",
            "containerRuntimeEndpoint": f"unix://{settings.containerd_socket}",
            "failSwapOn": False,
            # Debian 12 in a container may have version 1 only, which Kubernetes refuses by default since 1.35.
            "failCgroupV1": False,
            "enforceNodeAllocatable": ["pods"],
            # Nothing can pull an image back that the kubelet deleted to free disk space.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "podLogsDir": f"{settings.logs}/pods",
            "shutdownGracePeriod": "0s",
        },
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "nodePortAddresses": ["127.0.0.0/8"],
            "healthzBindAddress": f"{settings.address}:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "conntrack": {"maxPerCore": 0},
        },
    ]
    return yaml.safe_dump_all(documents, sort_keys=False)


def kubectl(
    settings: Settings, *words: str, stdin: str | None = None, check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run kubectl as the cluster's administrator."""
    command: list[str | Path] = [settings.bin / "kubectl", "--kubeconfig", settings.kubeconfig, *words]
    return run(command, stdin=stdin, check=check, timeout=timeout)


def owner(folder: Path) -> str | None:
    """Which platform's home a folder of Kubernetes belongs to: empty for a stranger's, None for no folder."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        return (folder / MARKER).read_text().strip()
    except OSError:
        return ""


def node_error(settings: Settings) -> str:
    """Empty when the API answers and its node is ready now, else what is missing."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            "http://127.0.0.1:10248/healthz", timeout=5
        ):
            pass
    except OSError as error:
        return f"the kubelet does not answer ({error}); its log: {settings.logs}/kubelet.log"
    done = kubectl(settings, "--request-timeout=5s", "get", "node", settings.node_name, "-o", "json", check=False)
    if done.returncode != 0:
        return f"the API does not answer ({done.stderr.strip()[-300:]}); logs: {settings.logs}/{{pods,kubelet.log}}"
    conditions = json.loads(done.stdout)["status"].get("conditions", [])
    ready: dict[str, str] = next((item for item in conditions if item["type"] == "Ready"), {})
    return (
        ""
        if ready.get("status") == "True"
        else f"node {settings.node_name} is not ready: {ready.get('message', 'no condition yet')}"
    )


def pending(settings: Settings) -> list[str]:
    """What is not as it should be."""
    if read_json(stamp(settings)) is None:
        return ["cluster by kubeadm"]
    return [f"wait: {error}"] if (error := node_error(settings)) else []


def other_recipe(settings: Settings) -> str | None:
    """The Kubernetes version of a cluster that was made from other settings or versions, or None."""
    made = read_json(stamp(settings))
    return None if made is None or made.get("key") == key(settings) else made.get("kubernetes", "of another version")


def init(settings: Settings, step: Step) -> list[str]:
    """Make the cluster, or bring one that is there back; gives what was done."""
    if read_json(stamp(settings)) is not None:
        wait_for("the node", lambda: node_error(settings), step, seconds=180)
        return ["cluster started again"]
    if (settings.state / "etcd").exists() or owner(KUBERNETES_FOLDER) is not None:
        step.note = "clearing what an interrupted start left"
        clear(settings, step)
    for folder in (KUBERNETES_FOLDER, KUBELET_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MARKER, f"{settings.home}\n")
    file = settings.state / "kubeadm.yaml"
    write_text(file, config(settings))
    kubeadm = parts.program(settings, "kubeadm")
    run_long(
        [kubeadm, "init", "--config", file, "--ignore-preflight-errors", "all", "--skip-token-print"],
        step,
        settings.logs / "kubeadm.log",
        env={"PATH": f"{settings.bin}:{images.PATH}"},
        note=lambda line, count: line[:70] if line.startswith("[") else None,
    )
    write_text(settings.kubeconfig, (KUBERNETES_FOLDER / "admin.conf").read_text(), 0o600)
    wait_for("the node", lambda: node_error(settings), step, seconds=120)
    write_text(stamp(settings), json.dumps({"key": key(settings), "kubernetes": images.KUBERNETES}))
    return [f"cluster {images.KUBERNETES} by kubeadm"]


def clear(settings: Settings, step: Step) -> None:
    """Remove a half-made cluster: its containers, its data, its certificates. The kubelet waits for its configuration
    again afterwards.
    """
    server = services.supervisor(settings)
    if services.states(settings).get("kubelet") in ("RUNNING", "STARTING", "BACKOFF"):
        server.stopProcess("kubelet")
    remove_containers(settings)
    mounts.unmount_below(KUBELET_FOLDER)
    for folder in (KUBERNETES_FOLDER, KUBELET_FOLDER):
        empty(folder)
    shutil.rmtree(settings.state / "etcd", ignore_errors=True)
    settings.kubeconfig.unlink(missing_ok=True)
    server.startProcess("kubelet", False)


def empty(folder: Path) -> None:
    """Remove what is in a folder, and keep the folder's marker until last."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_containers(settings: Settings) -> int:
    """Kill and delete every container of the platform's containerd; gives their number."""
    names = run(images.ctr(settings, "containers", "list", "--quiet")).stdout.split()
    tasks = [line.split()[0] for line in run(images.ctr(settings, "tasks", "list")).stdout.splitlines()[1:]]
    for name in tasks:
        run(images.ctr(settings, "tasks", "delete", "--force", name), check=False)
    for name in names:
        done = run(images.ctr(settings, "containers", "delete", name), check=False)
        if done.returncode != 0 and "not found" not in done.stderr:
            raise PlatformError(f"container {name} could not be deleted: {done.stderr.strip()}")
    return len(names)
