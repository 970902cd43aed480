# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""All rules over the declared variables of one cluster that no type can state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.access import administrators, api_access
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.engine import engines
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.exposure import exposure
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.gateway import gateway
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.images import images
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.memory import gpu_memory, gpu_nodes
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.monitoring import monitoring
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.names import derived_names, kubernetes_names
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.nodes import (
    accelerators,
    autoscaler,
    encryption,
    node_tools,
    storage,
    volumes,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.placement import placement
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.platform import (
    buckets,
    network,
    node_groups,
    platform,
    platform_names,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.serving import (
    models,
    operator,
    rayservice,
    secrets,
    worker_groups,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.text import texts
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values

__all__ = ["RULES", "check_declared", "required_tools"]

#: Every rule, in the order of the report.
RULES: tuple[Callable[[Values], Iterator[Problem]], ...] = (
    platform,
    platform_names,
    derived_names,
    kubernetes_names,
    buckets,
    encryption,
    network,
    api_access,
    administrators,
    storage,
    volumes,
    node_groups,
    autoscaler,
    accelerators,
    secrets,
    operator,
    rayservice,
    worker_groups,
    models,
    engines,
    gpu_nodes,
    gpu_memory,
    placement,
    texts,
    exposure,
    gateway,
    monitoring,
    images,
)


def check_declared(values: Values) -> Iterator[Problem]:
    """Every rule over one cluster's declared variables."""
    for rule in RULES:
        yield from rule(values)


def required_tools(values: Values) -> dict[str, str]:
    """Commands that this cluster's roles call on the controller, and what for."""
    tools: dict[str, str] = {}
    prober = values.get("verify_kubectl")
    own_stack = values.get("monitoring_enabled") is True and values.get("monitoring_stack") == "operator"
    for role in ("kuberay", *["monitoring"] * own_stack):
        builder, source = values.get(f"{role}_kubectl"), values.get(f"{role}_kustomize_source")
        if isinstance(builder, str):
            tools.setdefault(builder, f"it builds {role}_kustomize_source")
            if isinstance(source, str) and source.startswith(("https://", "http://", "git@", "ssh://")):
                tools.setdefault("git", f"kubectl fetches {role}_kustomize_source with it")
    if isinstance(prober, str) and not values.get("verify_base_url"):
        tools.setdefault(prober, "it forwards a port to the models")
    return {**tools, **node_tools(values)}
