# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over the images that pods run: each has a name that nodes can pull, or is one that role images makes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.images.registry import (
    Reference,
    RegistryError,
    digest_of,
    parse,
    stored_credentials,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values, entries_of

__all__ = ["check_images", "images"]

#: Names that nobody can have (RFC 2606): they stand in documents, to be replaced.
_RESERVED = re.compile(r"(?:.*\.)?(?:example\.(?:com|net|org)|example|invalid|test)(?::\d+)?")
#: Registries to which nodes bring no credentials of their own: who is refused here is refused there.
_PUBLIC = ("docker.io", "ghcr.io", "quay.io", "registry.k8s.io", "public.ecr.aws")
# Seconds for an answer: a registry that only nodes reach must not hold a preflight up.
_PATIENCE = 5
_TOOLS = ("buildah", "podman", "docker")
_MAKE = "name one that the nodes can pull, or leave gateway_image empty and name a registry in images_registry"


def images(values: Values) -> Iterator[Problem]:
    """Names of images, and where those go that are built."""
    embedded = "embedded" in values.get("group_names", ())
    for variable, image, policy in _named(values):
        yield from _name(variable, image, on_the_nodes=embedded or policy == "Never")
    wanted = _built(values)
    registry, base = values.get("images_registry"), values.get("images_base")
    if wanted and isinstance(base, str) and not base.startswith("/"):
        yield from _name("images_base", base, on_the_nodes=True)
    if wanted and isinstance(registry, str) and registry:
        yield from _name("images_registry", registry, on_the_nodes=embedded)
    elif wanted and values.get("platform") in ("gcp", "azure", "existing"):
        yield Problem(
            wanted[0],
            values.get(wanted[0]),
            "the image has to be built (playbooks/images.yml), and images_registry names no registry to push it to",
            "set images_registry to REGISTRY/PATH, which the nodes reach and this machine may push to"
            + (", or gateway_image to an image that is there" if wanted[0] == "gateway_image" else ""),
        )


def check_images(values: Values) -> Iterator[Problem]:
    """Their registries know the images; and there is a tool for those that are built.

    A registry that does not answer says nothing: the nodes' network is another one.
    """
    named = [(variable, image) for variable, image, policy in _named(values) if policy != "Never" and _asked(image)]
    secrets = {name: values.get(f"{name}_image_pull_secrets") for name in ("gateway", "rayservice")}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for (variable, image), reason in zip(named, pool.map(lambda item: _lacking(item[1]), named), strict=True):
            if reason and not (reason.startswith("refused") and secrets.get(variable.partition("_")[0])):
                yield Problem(variable, image, reason.removeprefix("refused: "), "correct the name, or push the image")
    tool = values.get("images_tool")
    tools = _TOOLS if tool == "auto" else (str(tool),)
    if (wanted := _built(values)) and not any(shutil.which(name) for name in tools):
        yield Problem(
            "images_tool",
            tool,
            f"no {' or '.join(tools)} on the PATH, to build what the registry does not have yet ({wanted[0]})",
            "install one, or run playbooks/images.yml where there is one",
            warning=True,
        )


def _named(values: Values) -> Iterator[tuple[str, str, Any]]:
    """Each image that the declared pods run, by its variable, and when it is pulled."""
    gateway, ray = values.get("gateway_image_pull_policy"), values.get("rayservice_image_pull_policy")
    found: list[tuple[str, Any, Any]] = [("rayservice_image", values.get("rayservice_image"), ray)]
    found += [
        (f"{path}.image", group.get("image"), ray) for path, group in entries_of(values, "rayservice_worker_groups")
    ]
    found.append(("kuberay_image", values.get("kuberay_image"), None))
    if values.get("monitoring_enabled") is True and values.get("monitoring_stack") == "operator":
        parts = ["operator", "reloader", "prometheus"]
        parts += ["node_exporter"] * (values.get("monitoring_node_exporter_enabled") is True)
        found += [(name := f"monitoring_{part}_image", values.get(name), None) for part in parts]
    if values.get("gateway_enabled") is not False:
        found.append(("gateway_image", values.get("gateway_image"), gateway))
        if values.get("gateway_redis") == "in_cluster":
            found.append(("gateway_redis_image", values.get("gateway_redis_image"), gateway))
    return ((variable, image, policy) for variable, image, policy in found if isinstance(image, str) and image)


def _built(values: Values) -> list[str]:
    """The variables that name images which role images makes."""
    built = (
        ["gateway_image"] if values.get("gateway_image") == "" and values.get("gateway_enabled") is not False else []
    )
    return built + (["images_ray_packages"] if values.get("images_ray_packages") else [])


def _name(variable: str, image: str, on_the_nodes: bool) -> Iterator[Problem]:
    """What is wrong with a name, without asking anybody."""
    try:
        reference = parse(image)
    except ValueError as error:
        yield Problem(variable, image, str(error), "write it as docker pull takes it, without https://")
        return
    if _RESERVED.fullmatch(reference.registry):
        yield Problem(
            variable, image, f"{reference.registry} is a placeholder: no node can pull from it", _cure(variable)
        )
    elif reference.loopback and not on_the_nodes:
        yield Problem(
            variable,
            image,
            f"{reference.registry} is each node itself: it has what is on this machine only where it is this machine",
            f"{_cure(variable)}. Where the nodes have the image already (kind load, a preloaded disk), set the pull"
            " policy (gateway_image_pull_policy, rayservice_image_pull_policy) to Never",
        )


def _cure(variable: str) -> str:
    return _MAKE if variable == "gateway_image" else "name one that the nodes reach"


def _asked(image: str) -> bool:
    try:
        reference: Reference = parse(image)
    except ValueError:
        return False
    return not reference.loopback


def _lacking(item: str) -> str:
    """Why an image cannot be pulled; empty where it can, or nobody says."""
    registry = parse(item).registry
    try:
        found = digest_of(item, stored_credentials(registry), timeout=_PATIENCE)
    except RegistryError as error:
        refused = error.status in (401, 403) and registry in _PUBLIC
        return f"refused: {registry} has no such image, or none for everybody" if refused else ""
    return "" if found else f"{registry} has no such image"
