# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Filters that build AWS policies and lifecycle rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["FilterModule", "aws_partition", "aws_service_trust", "bucket_lifecycle", "bucket_reader_policy"]

VERSION = "2012-10-17"


def aws_partition(region: str) -> str:
    """Return the partition that the ARNs of a region begin with, such as ``aws`` or ``aws-cn``."""
    if region.startswith("cn-"):
        return "aws-cn"
    return "aws-us-gov" if region.startswith("us-gov-") else "aws"


def aws_service_trust(service: str) -> dict[str, Any]:
    """Return the trust policy that lets an AWS service take a role.

    EKS Pod Identity also tags the sessions it opens, hence its second action (EKS user guide, "EKS Pod Identity role").
    """
    actions = ["sts:AssumeRole", "sts:TagSession"] if service == "pods.eks.amazonaws.com" else ["sts:AssumeRole"]
    return {
        "Version": VERSION,
        "Statement": [{"Effect": "Allow", "Principal": {"Service": service}, "Action": actions}],
    }


def bucket_reader_policy(bucket: str, prefix: str, partition: str = "aws", kms_key_arn: str = "") -> dict[str, Any]:
    """Return the policy that lets its holder list and read one prefix of one bucket, and nothing else.

    ``prefix`` has no slash at either end. ``kms_key_arn`` is the key that encrypts the bucket, or empty.
    """
    arn = f"arn:{partition}:s3:::{bucket}"
    statements: list[dict[str, Any]] = [
        {"Sid": "Locate", "Effect": "Allow", "Action": ["s3:GetBucketLocation"], "Resource": arn},
        {
            "Sid": "List",
            "Effect": "Allow",
            "Action": ["s3:ListBucket"],
            "Resource": arn,
            "Condition": {"StringLike": {"s3:prefix": [prefix, f"{prefix}/*"]}},
        },
        {"Sid": "Read", "Effect": "Allow", "Action": ["s3:GetObject"], "Resource": f"{arn}/{prefix}/*"},
    ]
    if kms_key_arn:
        statements.append({"Sid": "Decrypt", "Effect": "Allow", "Action": ["kms:Decrypt"], "Resource": kms_key_arn})
    return {"Version": VERSION, "Statement": statements}


def bucket_lifecycle(noncurrent_days: int, abort_upload_days: int = 0) -> list[dict[str, Any]]:
    """Return S3 lifecycle rules that drop old versions and unfinished uploads after so many days; 0 means never."""
    rules: list[dict[str, Any]] = []
    if int(noncurrent_days):
        rules.append(
            {
                "ID": "drop-old-versions",
                "Status": "Enabled",
                "Filter": {"Prefix": ""},
                "NoncurrentVersionExpiration": {"NoncurrentDays": int(noncurrent_days)},
            }
        )
    if int(abort_upload_days):
        rules.append(
            {
                "ID": "drop-unfinished-uploads",
                "Status": "Enabled",
                "Filter": {"Prefix": ""},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": int(abort_upload_days)},
            }
        )
    return rules


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "aws_partition": aws_partition,
            "aws_service_trust": aws_service_trust,
            "bucket_lifecycle": bucket_lifecycle,
            "bucket_reader_policy": bucket_reader_policy,
        }
