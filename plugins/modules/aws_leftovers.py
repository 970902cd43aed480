#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: what of one cluster is left in an account."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_leftovers
short_description: List what of one cluster is left in a region of an account
description:
  - Looks at EC2, EKS, IAM, S3, KMS, EFS, FSx, load balancers, SQS, EventBridge, CloudWatch Logs and Auto Scaling, and
    asks the tagging API about all other services, for what bears the tag C(rayplane.io/cluster), tags that EKS and
    controllers in the cluster set, or one of the cluster's names.
  - Changes nothing. What waits for its deletion (a KMS key, a terminated instance) does not count.
  - Some things stay on purpose; they are listed with the reason. For the rest the module fails, unless told otherwise.
options:
  cluster_name:
    description: Whose things are looked for.
    type: str
    required: true
  names:
    description: Names that are the cluster's even without a tag (of buckets, roles, queues, log groups).
    type: list
    elements: str
    default: []
  keep_data:
    description: Whether buckets that hold data, and file systems, stay on purpose.
    type: bool
    default: true
  keep_volumes:
    description: Whether volumes of PersistentVolumeClaims stay on purpose.
    type: bool
    default: false
  keep_logs:
    description: Whether log groups stay on purpose.
    type: bool
    default: false
  kept:
    description: Further kinds that stay on purpose (such as V(EFS file system)), each with the reason.
    type: dict
    default: {}
  fail_on_rest:
    description: Whether something that is left for no known reason is a failure. In check mode it never is.
    type: bool
    default: true
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Prove that nothing is left
  rayplane.platform.aws_leftovers:
    cluster_name: ray-llm-cluster-dev
    names: [ray-llm-cluster-dev-models]
"""

RETURN = r"""
left:
  description: What is left for no known reason, each with C(kind), C(id), C(name), C(mark) and C(state).
  returned: always
  type: list
  elements: dict
explained:
  description: What stays on purpose, with C(why).
  returned: always
  type: list
  elements: dict
unanswered:
  description: Services that could not be asked, with the reason.
  returned: always
  type: list
  elements: str
summary:
  description: All of it as lines for people.
  returned: always
  type: list
  elements: str
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Changes, PlatformError, run
from ansible_collections.rayplane.platform.plugins.module_utils.aws.sweep import KEEP_TAG, PVC_TAGS, Item, Sweep

_ENCRYPTED = ("bucket", "volume", "EFS file system", "log group")


def reason(item: Item, sweep: Sweep, params: dict[str, Any]) -> str:
    """Return why a thing stays on purpose; empty where there is no such reason."""
    if item.kind in params["kept"]:
        return str(params["kept"][item.kind])
    if item.kind == "bucket" and params["keep_data"] and sweep.holds_data(item.id):
        return "it holds data; storage_destroy_data deletes it with all versions"
    if item.kind in ("EFS file system", "EFS access point", "FSx file system") and params["keep_data"]:
        return "it may hold data; storage_destroy_data deletes it"
    if item.kind == "volume" and KEEP_TAG in item.tags:
        return f"PersistentVolume {item.tags[KEEP_TAG]} had the reclaim policy Retain"
    if item.kind == "volume" and params["keep_volumes"] and any(key in item.tags for key in PVC_TAGS):
        return "it is the volume of a PersistentVolumeClaim, and cleanup_volumes is false"
    if item.kind == "log group" and params["keep_logs"]:
        return "cleanup_keep_logs is true"
    return ""


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    params = module.params
    cluster = params["cluster_name"]
    sweep = Sweep(cluster, module.client, changes, params["names"])
    items = list({(item.kind, item.id): item for item in sweep.everything()}.values())
    kept = {id(item): why for item in items if (why := reason(item, sweep, params))}
    if any(item.kind in _ENCRYPTED for item in items if id(item) in kept):
        # Without its key kept data is lost.
        kept |= {id(item): "data that is kept may be encrypted with it" for item in items if item.kind[:4] == "KMS "}
    left = [item for item in items if id(item) not in kept]
    where = f"{cluster} in {module.region}"
    summary = [f"Kept on purpose: {item.text()}: {kept[id(item)]}" for item in items if id(item) in kept]
    summary += [f"Left: {item.text()}{f', {item.state}' if item.state else ''}" for item in left]
    summary += [f"Not looked at: {line}" for line in sweep.unanswered]
    if not left:
        summary.insert(0, f"Nothing{' else' if kept else ''} of {where} is left.")
    if left and params["fail_on_rest"] and not changes.check_mode:
        raise PlatformError(
            f"{len(left)} things of {where} are left for no known reason. Run destroy.yml again; what is still there"
            " then was made by something else with the cluster's tags:\n" + "\n".join(summary)
        )
    return {
        "left": [_plain(item) for item in left],
        "explained": [{**_plain(item), "why": kept[id(item)]} for item in items if id(item) in kept],
        "unanswered": sweep.unanswered,
        "summary": summary,
    }


def _plain(item: Item) -> dict[str, str]:
    return {"kind": item.kind, "id": item.id, "name": item.name, "mark": item.mark, "state": item.state}


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
