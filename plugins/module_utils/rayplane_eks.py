# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What the EKS modules share: finding the cluster, waiting for updates, reading health."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.module_utils.rayplane_aws import Api, Changes, PlatformError, sync_tags, wait_until

__all__ = ["ABSENT", "find_cluster", "health", "minor", "require_cluster", "resolve_role", "retag", "wait_for_update"]

#: Error codes that mean "there is no such thing".
ABSENT = ("ResourceNotFoundException",)


def minor(version: str) -> int:
    """Return the minor number of a Kubernetes version such as ``1.34``; raise ``PlatformError`` for anything else."""
    parts = version.split(".")
    if len(parts) != 2 or parts[0] != "1" or not parts[1].isdigit():
        raise PlatformError(f"Kubernetes version {version!r} is not of the form 1.34: write major and minor in quotes")
    return int(parts[1])


def find_cluster(api: Api, name: str) -> dict[str, Any] | None:
    """Return the description of a cluster, or None."""
    answer = api.read("describe_cluster", f"cluster {name}", absent=ABSENT, name=name)
    found: dict[str, Any] | None = answer["cluster"] if answer else None
    return found


def require_cluster(api: Api, changes: Changes, name: str) -> dict[str, Any] | None:
    """Return the description of the cluster; None only in check mode, where an earlier task would have made it."""
    cluster = find_cluster(api, name)
    if cluster is None and not changes.check_mode:
        raise PlatformError(
            f"cluster {name} does not exist: run the eks role from its first task, or check platform_cluster_name"
            " and platform_region"
        )
    return cluster


def resolve_role(role: str, known: Mapping[str, str]) -> str:
    """Return the ARN of a role given as ARN or by a name in ``known``."""
    if role.startswith(("arn:", "<")):
        return role
    if role not in known:
        raise PlatformError(
            f"role_arn {role!r} is neither an ARN nor one of the roles made here: {', '.join(sorted(known)) or 'none'}"
        )
    return known[role]


def health(item: Mapping[str, Any]) -> str:
    """Return the health issues of a node group or an add-on as one line; empty when there is none."""
    issues = item.get("health", {}).get("issues", [])
    return "; ".join(f"{issue.get('code', '?')}: {issue.get('message', '')}" for issue in issues)


def retag(
    api: Api, changes: Changes, resource: str, arn: str, *, have: Mapping[str, str], want: Mapping[str, str]
) -> None:
    """Set the tags that are missing or differ."""
    lacking = sync_tags(changes, resource, have, want)
    if lacking:
        api.write("tag_resource", resource, resourceArn=arn, tags=lacking)


def wait_for_update(api: Api, resource: str, update: Any, timeout: float, **identity: str) -> None:
    """Wait until an update ends; ``identity`` names what is updated (``name``, ``nodegroupName``, ``addonName``).

    ``update`` is the answer of the updating call, None in check mode. Raises ``PlatformError`` with AWS's own errors
    if the update fails.
    """
    if not update:
        return
    update_id = update["update"]["id"]

    def probe() -> tuple[bool, str]:
        answer = api.read("describe_update", resource, updateId=update_id, **identity)["update"]
        if answer["status"] in ("Failed", "Cancelled"):
            reasons = "; ".join(
                f"{error.get('errorCode')}: {error.get('errorMessage')}" for error in answer.get("errors", [])
            )
            raise PlatformError(
                f"update {update_id} ({answer['type']}) of {resource} ended as {answer['status']}:"
                f" {reasons or 'no reason given'}"
            )
        return answer["status"] == "Successful", f"update {update_id} is {answer['status']}"

    wait_until(f"update of {resource}", probe, timeout, delay=10)
