#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the AWS account, and how a cluster's buckets are named in it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_account
short_description: Say which AWS account this is, and what the names of a cluster's buckets end with
description:
  - Names of buckets are shared by all of AWS, so those of a cluster end with the account's number and the region.
  - A cluster whose buckets were named without them keeps those names - one of O(old_buckets) that bears the tag
    C(rayplane.io/cluster) with the cluster's name says so.
  - Changes nothing.
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  old_buckets:
    description: Names that the cluster's buckets had in earlier releases.
    type: list
    elements: str
    default: []
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Ask which account this is
  rayplane.platform.aws_account:
    cluster_name: ray-llm-cluster-dev
    old_buckets: [ray-llm-cluster-dev-models]
"""

RETURN = r"""
account:
  description: Number of the account.
  returned: always
  type: str
bucket_suffix:
  description: What the buckets' names end with; empty where the old names are in use.
  returned: always
  type: str
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.account import bucket_suffix
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, run


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    account = str(Api(module.client("sts"), changes).read("get_caller_identity", "the caller")["Account"])
    s3, params = Api(module.client("s3"), changes), module.params
    suffix = bucket_suffix(s3, params["old_buckets"], params["cluster_name"], account, module.region)
    return {"account": account, "bucket_suffix": suffix}


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
