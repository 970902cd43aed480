#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: have a Kubernetes cluster give back what it holds in the cloud."""

from __future__ import annotations

DOCUMENTATION = r"""
module: k8s_release_cloud
short_description: Have a cluster that is to be deleted give back its load balancers, volumes and nodes
description:
  - Deletes, in all namespaces, Services of type LoadBalancer, Ingresses, Gateways, Karpenter's NodePools and
    NodeClaims, and PersistentVolumeClaims whose volumes were provisioned dynamically with the reclaim policy Delete
    (with the StatefulSets that would claim anew and the pods that use them). Then waits until they are gone.
  - Does this only on the cluster that is to be deleted. Where the EKS cluster is gone, its API does not answer, or the
    kubeconfig leads to another cluster, nothing is done and RV(skipped_because) says why.
  - What is left when time is up is returned with a warning; it can be deleted through the cloud later.
options:
  cluster_name:
    description: EKS cluster that is to be deleted.
    type: str
    required: true
  volumes:
    description: Whether PersistentVolumeClaims are deleted.
    type: bool
    default: true
  servers:
    description: Addresses of API servers, beside the cluster's own endpoint, that lead to it (a proxy, a tunnel).
    type: list
    elements: str
    default: []
  wait_timeout:
    description: Longest wait, in seconds.
    type: int
    default: 600
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Give back load balancers and volumes
  rayplane.platform.k8s_release_cloud:
    cluster_name: ray-llm-cluster-dev
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) deleted.
  returned: always
  type: list
  elements: str
left:
  description: What is still there.
  returned: always
  type: list
  elements: str
retained_volumes:
  description: Ids of volumes that stay, each with the name of its PersistentVolume (reclaim policy Retain).
  returned: always
  type: dict
skipped_because:
  description: Why nothing was done; empty where something was.
  returned: always
  type: str
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    Api,
    Changes,
    PlatformError,
    run,
    wait_until,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import find_cluster
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    Json,
    KubeError,
    Resource,
    connection_from_environment,
)

_SERVICE = Resource("v1", "Service", "services", True)
_POD = Resource("v1", "Pod", "pods", True)
_CLAIM = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims", True)
_VOLUME = Resource("v1", "PersistentVolume", "persistentvolumes", False)
_STATEFUL_SET = Resource("apps/v1", "StatefulSet", "statefulsets", True)
# Kinds of which every object goes, where the cluster knows them. The first version that is served is asked.
_WHOLE_KINDS = (
    (("networking.k8s.io/v1",), "Ingress"),
    (("gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1beta1"), "Gateway"),
    (("karpenter.sh/v1", "karpenter.sh/v1beta1"), "NodePool"),
    (("karpenter.sh/v1", "karpenter.sh/v1beta1"), "NodeClaim"),
)
_PROVISIONER = "pv.kubernetes.io/provisioned-by"


class Release:
    """One cluster's holdings in the cloud, as Kubernetes knows them."""

    def __init__(self, cluster: Cluster, changes: Changes, volumes: bool, timeout: float) -> None:
        self.cluster = cluster
        self.changes = changes
        self.volumes = volumes
        self.timeout = timeout
        self._asked: set[str] = set()

    def release(self) -> dict[str, Any]:
        """Delete what holds something in the cloud, and wait until it is gone. Returns what is left and retained."""
        volumes = self.cluster.list(_VOLUME)
        facts: dict[str, Any] = {"retained_volumes": _retained(volumes), "skipped_because": "", "left": []}
        claims = {_claim_of(volume) for volume in volumes if _is_deleted_with_claim(volume)} if self.volumes else set()
        left = self._round(claims)
        if self.changes.check_mode or not left:
            return facts

        def probe() -> tuple[bool, str]:
            # Looked for anew each time: a controller may make one again while its own owner goes.
            left[:] = self._round(claims)
            return not left, ", ".join(left)

        try:
            wait_until("release of what the cluster holds in the cloud", probe, self.timeout, delay=3)
        except PlatformError:
            self.changes.warnings.append(
                f"still there after {self.timeout:g} s: {', '.join(left)}. What they hold in the cloud is deleted"
                " through AWS once the cluster is gone"
            )
        return {**facts, "left": list(left)}

    def _round(self, claims: set[str]) -> list[str]:
        """Delete once what is there; return the names of what is still there."""
        left = [
            self._end(_SERVICE, service)
            for service in self.cluster.list(_SERVICE)
            if service.get("spec", {}).get("type") == "LoadBalancer"
        ]
        for versions, kind in _WHOLE_KINDS:
            resource = next((one for version in versions if (one := self.cluster.resource(version, kind))), None)
            if resource is not None:
                left += [self._end(resource, item) for item in self.cluster.list(resource)]
        return left + self._claims(claims)

    def _claims(self, claims: set[str]) -> list[str]:
        if not claims:
            return []
        # Its controller would claim anew, under the same names.
        for item in self.cluster.list(_STATEFUL_SET):
            templates = item.get("spec", {}).get("volumeClaimTemplates") or []
            names = tuple(f"{_key(item)[0]}/{one['metadata']['name']}-{item['metadata']['name']}-" for one in templates)
            if names and any(claim.startswith(names) for claim in claims):
                self._end(_STATEFUL_SET, item)
        left = [self._end(_CLAIM, item) for item in self.cluster.list(_CLAIM) if "/".join(_key(item)) in claims]
        if left:
            # A claim goes only when no pod uses it any more.
            for pod in self.cluster.list(_POD):
                used = {
                    f"{_key(pod)[0]}/{volume['persistentVolumeClaim']['claimName']}"
                    for volume in pod.get("spec", {}).get("volumes") or []
                    if volume.get("persistentVolumeClaim")
                }
                if used & claims:
                    self._end(_POD, pod)
        # The driver deletes the disk before it lets the volume go.
        volumes = [_label(item) for item in self.cluster.list(_VOLUME) if _claim_of(item) in claims]
        return left + volumes

    def _end(self, resource: Resource, item: Json) -> str:
        name = _label(item)
        if not item["metadata"].get("deletionTimestamp"):
            # By uid: an object that was made anew is a new one.
            identity = str(item["metadata"].get("uid") or name)
            if identity not in self._asked:
                self._asked.add(identity)
                self.changes.delete(name)
            if not self.changes.check_mode:
                self.cluster.delete(resource, item["metadata"].get("namespace"), item["metadata"]["name"])
        return name


def _key(item: Json) -> tuple[str, str]:
    return str(item["metadata"].get("namespace", "")), str(item["metadata"]["name"])


def _label(item: Json) -> str:
    return f"{item['kind']} {'/'.join(part for part in _key(item) if part)}"


def _claim_of(volume: Json) -> str:
    claim = volume.get("spec", {}).get("claimRef") or {}
    return f"{claim.get('namespace', '')}/{claim.get('name', '')}"


def _is_deleted_with_claim(volume: Json) -> bool:
    dynamic = _PROVISIONER in (volume["metadata"].get("annotations") or {})
    spec = volume.get("spec", {})
    return dynamic and spec.get("persistentVolumeReclaimPolicy") == "Delete" and bool(spec.get("claimRef"))


def _retained(volumes: list[Json]) -> dict[str, str]:
    """Return the cloud's ids of volumes with the reclaim policy Retain."""
    retained = {}
    for volume in volumes:
        spec = volume.get("spec", {})
        handle = (spec.get("csi") or {}).get("volumeHandle") or (spec.get("awsElasticBlockStore") or {}).get("volumeID")
        if handle and spec.get("persistentVolumeReclaimPolicy") == "Retain":
            # The old provisioner wrote aws://zone/vol-1.
            retained[str(handle).rpartition("/")[2]] = volume["metadata"]["name"]
    return retained


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    params = module.params
    name = params["cluster_name"]
    nothing: dict[str, Any] = {"left": [], "retained_volumes": {}}
    found = find_cluster(Api(module.client("eks"), changes), name)
    if found is None:
        return {**nothing, "skipped_because": f"EKS cluster {name} is gone already"}
    try:
        connection = connection_from_environment()
        own = [str(found.get("endpoint", "")).rstrip("/"), *(server.rstrip("/") for server in params["servers"])]
        if connection.server not in own:
            why = (
                f"the kubeconfig leads to {connection.server}, and the API server of {name} is {own[0] or 'not known'}"
            )
            return {**nothing, "skipped_because": why}
        cluster = Cluster(connection, timeout=30)
        cluster.request("GET", "/version")
        return Release(cluster, changes, params["volumes"], params["wait_timeout"]).release()
    except ApiError as error:
        raise PlatformError(
            f"the API server of {name} refuses: {error}. Its load balancers and volumes would be left: give the"
            " deploying principal access (eks_access_entries), then run again"
        ) from error
    except KubeError as error:
        return {**nothing, "skipped_because": str(error)}


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
