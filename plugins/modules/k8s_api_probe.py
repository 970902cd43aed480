#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: does the cluster's API server answer?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: k8s_api_probe
short_description: Say whether the API server of a cluster answers
description:
  - Asks the API server that the environment names (E(K8S_AUTH_KUBECONFIG), E(K8S_AUTH_CONTEXT), E(K8S_AUTH_HOST),
    E(KUBECONFIG)) for its version. Changes nothing; that it does not answer is a result, not a failure.
  - With O(cluster_name) it has to be the API server of that EKS cluster.
options:
  cluster_name:
    description: EKS cluster whose API server it has to be. Empty takes any.
    type: str
    default: ""
  servers:
    description: Addresses, beside the cluster's own endpoint, that lead to it (a proxy, a tunnel).
    type: list
    elements: str
    default: []
  required:
    description: >-
      Whether the module fails where an EKS cluster is there and its API server is not reached, with the reason - a
      private endpoint and a machine outside, networks that do not hold this machine, a name that does not resolve, a
      refused connection, a principal that the cluster does not know.
    type: bool
    default: false
  client_cidrs:
    description: Networks that the private endpoint admits, by which O(required) tells inside from outside.
    type: list
    elements: str
    default: []
  address_url:
    description: Where this machine learns its address on the internet. Empty asks nobody.
    type: str
    default: ""
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Ask the API server
  rayplane.platform.k8s_api_probe:
    cluster_name: ray-llm-cluster-dev
  register: __cleanup_probe
"""

RETURN = r"""
exists:
  description: Whether the EKS cluster exists; true where none was named.
  type: bool
  returned: always
reachable:
  description: Whether the API server answers, and is the one that was asked for.
  type: bool
  returned: always
reason:
  description: Why not.
  type: str
  returned: always
server:
  description: Its address, as far as it is known.
  type: str
  returned: always
version:
  description: Its version.
  type: str
  returned: always
"""

import contextlib
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
    Cluster,
    Connection,
    KubeError,
    connection_from_environment,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.reach import explain, kind_of

# The name of a new endpoint takes a moment to be known everywhere; nothing else gets better by waiting.
_NAME_SECONDS = 60


def require(module: Any, cluster: dict[str, Any], connection: Connection) -> dict[str, Any]:
    """Return the server's version; raise PlatformError that says why it is not reached."""
    found: dict[str, Any] = {}

    def probe() -> tuple[bool, str]:
        try:
            client = Cluster(connection, timeout=20, retries=0)
            # Who may not discover is not known to the cluster; the version is told to everybody.
            client.request("GET", "/api")
            found["version"] = client.request("GET", "/version").get("gitVersion", "")
        except KubeError as error:
            found["error"] = error
            return kind_of(error) != "dns", str(error)
        found.pop("error", None)
        return True, "answers"

    with contextlib.suppress(PlatformError):
        wait_until("the API server's name", probe, _NAME_SECONDS, delay=5)
    if "error" in found:
        access = cluster.get("resourcesVpcConfig", {})
        params = module.params
        why = explain(connection.server, found["error"], access, params["client_cidrs"], params["address_url"])
        raise PlatformError(f"cluster {cluster['name']}: {why}")
    return found


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    name = module.params["cluster_name"]
    facts: dict[str, Any] = {"exists": True, "reachable": False, "reason": "", "server": "", "version": ""}
    own: list[str] = []
    found = None
    if name:
        found = find_cluster(Api(module.client("eks"), changes), name)
        if found is None:
            return {**facts, "exists": False, "reason": f"EKS cluster {name} does not exist"}
        own = [str(found.get("endpoint", "")), *module.params["servers"]]
    try:
        connection = connection_from_environment()
        facts["server"] = connection.server
        if name and connection.server not in [server.rstrip("/") for server in own]:
            why = f"the kubeconfig leads to {connection.server}, the API server of {name} is {own[0] or 'not known'}"
            if module.params["required"]:
                raise PlatformError(f"{why}: write it again (--tags kubeconfig)")
            return {**facts, "reason": why}
        if found is not None and module.params["required"]:
            return {**facts, **require(module, found, connection), "reachable": True}
        answer = Cluster(connection, timeout=20).request("GET", "/version")
    except (KubeError, OSError, KeyError, ValueError) as error:
        if module.params["required"]:
            raise PlatformError(str(error)) from error
        return {**facts, "reason": str(error)}
    return {**facts, "reachable": True, "version": str(answer.get("gitVersion", ""))}


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
