# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Names that all of AWS shares: those of buckets carry the account's number and the region."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, only_given, tag_dict

__all__ = ["NOT_READABLE", "bucket_suffix"]

#: What S3 answers for the tags of a bucket that is not there, is another account's, or has none.
NOT_READABLE = ("NoSuchBucket", "NoSuchTagSet", "AccessDenied", "404", "403", "PermanentRedirect", "301")


def bucket_suffix(s3: Any, old: Sequence[str], cluster: str, account: str, region: str) -> str:
    """What the names of a cluster's buckets end with: account and region, or nothing where an old name is ours.

    ``s3`` is called as an ``Api`` is. Earlier releases named buckets by the cluster alone.
    """
    # One answer for all names; who may not list buckets asks for each.
    prefix = only_given({"Prefix": os.path.commonprefix(old)})  # noqa: RUF071 - names, not paths
    denied = ("AccessDenied",)
    listed = old and s3.read("list_buckets", "the account's buckets", absent=denied, MaxBuckets=1000, **prefix)
    if listed and not listed.get("ContinuationToken"):
        there = {one["Name"] for one in listed.get("Buckets", ())}
        old = [name for name in old if name in there]
    for name in old:
        tags = s3.read(
            "get_bucket_tagging", f"bucket {name}", absent=NOT_READABLE, Bucket=name, ExpectedBucketOwner=account
        )
        if tag_dict((tags or {}).get("TagSet")).get(OWNER_TAG) == cluster:
            return ""
    return f"-{account}-{region}"
