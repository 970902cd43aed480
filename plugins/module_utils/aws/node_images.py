# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Releases of the images of managed node groups: where AWS publishes the newest, and which of two is newer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api

__all__ = ["newer", "newest_releases", "parameter"]

# Names that GetParameters takes at a time.
_MOST_NAMES = 10


def parameter(ami_type: str, version: str) -> str:
    """Return the public parameter with the newest release of an image for a Kubernetes version; empty for ``CUSTOM``.

    Sources: EKS user guide, "Retrieve recommended Amazon Linux AMI IDs", and the same of Bottlerocket.
    """
    match = re.fullmatch(r"(AL2023|BOTTLEROCKET)_(x86_64|ARM_64)_?(\w*)", ami_type)
    if match is None:
        return ""
    family, architecture, flavour = match[1], match[2].replace("ARM_64", "arm64"), match[3].lower()
    if family == "AL2023":
        return (
            f"/aws/service/eks/optimized-ami/{version}/amazon-linux-2023/{architecture}/{flavour}"
            "/recommended/release_version"
        )
    variant = "-".join(["aws-k8s", version, *filter(None, flavour.split("_"))])
    return f"/aws/service/bottlerocket/{variant}/{architecture}/latest/image_version"


def newer(release: str, than: str) -> bool:
    """Return whether a release such as ``1.36.2-20261110`` (Bottlerocket: ``1.50.0-2a1b3c4d``) is newer than one."""
    return _key(release) > _key(than)


def _key(release: str) -> list[int]:
    # What follows Bottlerocket's version is a commit, which has no order.
    parts = release.split("-")
    dated = [part for part in parts[1:] if re.fullmatch(r"20\d{6}", part)]
    return [int(number) for part in (parts[0], *dated) for number in re.findall(r"\d+", part)]


def newest_releases(api: Api, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the newest release of each node group's image; groups whose image AWS does not publish are left out.

    ``groups``: name -> the group as EKS describes it. ``api`` is that of Systems Manager.
    """
    wanted = {name: parameter(group.get("amiType", ""), group["version"]) for name, group in groups.items()}
    names = sorted(set(filter(None, wanted.values())))
    found: dict[str, str] = {}
    for start in range(0, len(names), _MOST_NAMES):
        answer = api.read("get_parameters", "releases of node images", Names=names[start : start + _MOST_NAMES])
        found |= {one["Name"]: one["Value"] for one in answer["Parameters"]}
    return {name: found[place] for name, place in wanted.items() if place in found}
