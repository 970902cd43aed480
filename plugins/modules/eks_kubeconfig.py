#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: a kubeconfig file for an EKS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_kubeconfig
short_description: Keep a kubeconfig file for an EKS cluster
description:
  - Asks EKS for endpoint and CA and writes a kubeconfig whose user fetches short-lived tokens through C(command).
  - The file is only written when its content or mode differs. It belongs to this module as a whole; a file that holds
    other clusters too is neither overwritten nor removed.
options:
  state:
    description: Whether the file exists.
    type: str
    choices: [present, absent]
    default: present
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  path:
    description: File to write, with mode 0600. Missing folders are made.
    type: path
    required: true
  context:
    description: Name of the context; empty takes O(cluster_name).
    type: str
    default: ""
  command:
    description: >-
      Program and arguments that print an ExecCredential. Empty takes the AWS CLI if it is installed, else
      O(fallback).
    type: list
    elements: str
    default: []
  fallback:
    description: Python script that prints an ExecCredential, run with the Python that runs this module.
    type: str
    default: ""
  token_profile:
    description: AWS profile that the program uses; not the module's own.
    type: str
    default: ""
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the kubeconfig
  rayplane.platform.eks_kubeconfig:
    cluster_name: ray-llm-cluster
    path: ~/.kube/ray-llm-cluster
    command: [aws, eks, get-token, --cluster-name, ray-llm-cluster]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order.
  returned: always
  type: list
  elements: str
endpoint:
  description: Address of the API server; empty where check mode predicts the cluster.
  returned: always
  type: str
"""

import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import require_cluster

MODE = 0o600


def kubeconfig(
    cluster: dict[str, Any], context: str, command: list[str], environment: dict[str, str]
) -> dict[str, Any]:
    """Return the kubeconfig for a cluster as EKS describes it.

    The exec section is that of client.authentication.k8s.io/v1beta1, which both the AWS CLI and the Kubernetes Python
    client speak.
    """
    program, *arguments = command
    execute = {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "command": program,
        "args": arguments,
        "env": [{"name": name, "value": str(environment[name])} for name in sorted(environment)],
        "interactiveMode": "IfAvailable",
        "provideClusterInfo": False,
    }
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "clusters": [
            {
                "name": context,
                "cluster": {
                    "server": cluster["endpoint"],
                    "certificate-authority-data": cluster["certificateAuthority"]["data"],
                },
            }
        ],
        "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
        "users": [{"name": context, "user": {"exec": execute}}],
    }


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    params = module.params
    name, path = params["cluster_name"], Path(params["path"])
    require_own(path, params["context"] or name)
    if params["state"] == "absent":
        if path.exists():
            changes.actions.append(f"delete kubeconfig {path}")
            if not module.check_mode:
                path.unlink()
        return {"endpoint": ""}
    cluster = require_cluster(Api(module.client("eks"), changes), changes, name)
    if cluster is None:
        changes.create(f"kubeconfig {path}", {"cluster": name})
        return {"endpoint": ""}
    if not cluster.get("endpoint"):
        raise PlatformError(
            f"cluster {name} has no endpoint yet (status {cluster['status']}): run again when it is active"
        )
    environment = only_given({"AWS_PROFILE": params["token_profile"]})
    content = kubeconfig(cluster, params["context"] or name, _command(module), environment)
    text = yaml.safe_dump(content, sort_keys=False)
    resource = f"kubeconfig {path}"
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    have = {"content": path.read_text(encoding="utf-8"), "mode": f"{mode:04o}"} if mode is not None else {}
    want = {"content": text, "mode": f"{MODE:04o}"}
    if have != want:
        if have:
            changes.actions.append(f"update {resource}: {', '.join(key for key in want if have[key] != want[key])}")
        else:
            changes.create(resource, {"server": cluster["endpoint"], "context": content["current-context"]})
        if not module.check_mode:
            _write(module, path, text)
    return {"endpoint": cluster["endpoint"]}


def require_own(path: Path, context: str) -> None:
    """Raise PlatformError if the file holds clusters other than the one that this module writes as ``context``."""
    if not path.exists():
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        names = {str(entry["name"]) for entry in content.get("clusters") or []}
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        raise PlatformError(f"{path} exists and is no kubeconfig: set platform_kubeconfig to another file") from None
    if others := sorted(names - {context}):
        raise PlatformError(
            f"kubeconfig {path} holds other clusters ({', '.join(others)}), and this file would be replaced as a whole:"
            f" set platform_kubeconfig to a file of its own for {context}"
        )


def _command(module: Any) -> list[str]:
    given: list[str] = module.params["command"]
    if given:
        return given
    target = ["--cluster-name", module.params["cluster_name"], "--region", module.region]
    if module.get_bin_path("aws"):
        return ["aws", "eks", "get-token", *target]
    if not module.params["fallback"]:
        raise PlatformError(
            "the AWS CLI is not installed and no other program that fetches tokens is given: set"
            " kubeconfig_token_command"
        )
    return [sys.executable, module.params["fallback"], *target]


def _write(module: Any, path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=module.tmpdir, delete=False, encoding="utf-8") as file:
        file.write(text)
    module.atomic_move(file.name, str(path))
    path.chmod(MODE)


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
