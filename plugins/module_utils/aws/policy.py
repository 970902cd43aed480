# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Policy documents: comparing them by meaning, statement by statement, and who may write logs into a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["LOG_WRITERS", "VERSION", "by_statement", "canonical", "log_statements", "partition_of"]

VERSION = "2012-10-17"
#: Services that put logs into a bucket, by the name under which a bucket lets them in.
LOG_WRITERS = ("vended_logs", "access_logs", "load_balancers")


def partition_of(region: str) -> str:
    """Return the partition that the ARNs of a region begin with, such as ``aws`` or ``aws-cn``."""
    if region.startswith("cn-"):
        return "aws-cn"
    return "aws-us-gov" if region.startswith("us-gov-") else "aws"


def canonical(value: Any) -> Any:
    """Return a policy document, or part of one, in one form: AWS writes a list of one as its element and sorts lists.

    Lists are sorted, also that of statements, whose order has no meaning; values are strings, because AWS answers
    ``"true"`` where ``true`` was given.
    """
    if isinstance(value, Mapping):
        return {key: canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        items = sorted((canonical(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
        return items[0] if len(items) == 1 else items
    return str(value).lower() if isinstance(value, bool) else str(value)


def by_statement(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the statements of a policy in canonical form under their Sid, or under their place where they have none.

    A document without statements, or none at all, is empty.
    """
    found = (document or {}).get("Statement") or []
    statements = found if isinstance(found, list) else [found]
    return {str(one.get("Sid") or number): canonical(one) for number, one in enumerate(statements, 1)}


def log_statements(bucket: str, writers: Iterable[str], region: str, account: str) -> list[dict[str, Any]]:
    """Return the statements of a bucket policy that let AWS services of one account write their logs.

    ``vended_logs`` are VPC flow logs, network load balancers and others that go through CloudWatch Logs' delivery
    (CloudWatch Logs user guide, "Logs sent to Amazon S3"), ``access_logs`` those of other buckets, below ``s3/``
    (S3 user guide, "Permissions for log delivery"), ``load_balancers`` application load balancers' (ELB user guide,
    "Access logs", the principal of all regions).
    """
    partition = partition_of(region)
    arn = f"arn:{partition}:s3:::{bucket}"
    mine = {"aws:SourceAccount": account}
    statements: list[dict[str, Any]] = []
    if "vended_logs" in writers:
        source = {"aws:SourceArn": f"arn:{partition}:logs:{region}:{account}:*"}
        principal = {"Service": "delivery.logs.amazonaws.com"}
        statements += [
            {
                "Sid": "AWSLogDeliveryWrite",
                "Effect": "Allow",
                "Principal": principal,
                "Action": "s3:PutObject",
                "Resource": f"{arn}/*AWSLogs/{account}/*",
                "Condition": {
                    "StringEquals": {**mine, "s3:x-amz-acl": "bucket-owner-full-control"},
                    "ArnLike": source,
                },
            },
            {
                "Sid": "AWSLogDeliveryAclCheck",
                "Effect": "Allow",
                "Principal": principal,
                "Action": ["s3:GetBucketAcl", "s3:ListBucket"],
                "Resource": arn,
                "Condition": {"StringEquals": mine, "ArnLike": source},
            },
        ]
    if "access_logs" in writers:
        statements.append(
            {
                "Sid": "S3AccessLogs",
                "Effect": "Allow",
                "Principal": {"Service": "logging.s3.amazonaws.com"},
                "Action": "s3:PutObject",
                "Resource": f"{arn}/s3/*",
                "Condition": {"StringEquals": mine, "ArnLike": {"aws:SourceArn": f"arn:{partition}:s3:::*"}},
            }
        )
    if "load_balancers" in writers:
        balancers = f"arn:{partition}:elasticloadbalancing:{region}:{account}:loadbalancer/*"
        statements.append(
            {
                "Sid": "LoadBalancerLogs",
                "Effect": "Allow",
                "Principal": {"Service": "logdelivery.elasticloadbalancing.amazonaws.com"},
                "Action": "s3:PutObject",
                "Resource": f"{arn}/*AWSLogs/{account}/*",
                "Condition": {"StringEquals": mine, "ArnLike": {"aws:SourceArn": balancers}},
            }
        )
    return statements
