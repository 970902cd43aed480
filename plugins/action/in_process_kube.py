# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Modules that talk to Kubernetes, run in the task's own process; the client is imported before."""

import contextlib

from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import KubeError, client
from ansible_collections.rayplane.platform.plugins.plugin_utils.warm_module import ActionModule, preload

__all__ = ["ActionModule"]

preload("k8s_", "helm_", "kustomize_", "gateway_")
# Where it is missing, the module that asks a cluster says so.
with contextlib.suppress(KubeError):
    client()
