# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Names that all of AWS shares: those of buckets carry the account's number and the region."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ansible.module_utils.rayplane_aws import OWNER_TAG, tag_dict

__all__ = ["NOT_READABLE", "bucket_suffix"]

#: What S3 answers for the tags of a bucket that is not there, is another account's, or has none.
NOT_READABLE = ("NoSuchBucket", "NoSuchTagSet", "AccessDenied", "404", "403", "PermanentRedirect", "301")


def bucket_suffix(s3: Any, old: Iterable[str], cluster: str, account: str, region: str) -> str:
    """What the names of a cluster's buckets end with: account and region, or nothing where an old name is ours.

    ``s3`` is called as an ``Api`` is. Earlier releases named buckets by the cluster alone.
    """
    for name in old:
        tags = s3.read(
            "get_bucket_tagging", f"bucket {name}", absent=NOT_READABLE, Bucket=name, ExpectedBucketOwner=account
        )
        if tag_dict((tags or {}).get("TagSet")).get(OWNER_TAG) == cluster:
            return ""
    return f"-{account}-{region}"
