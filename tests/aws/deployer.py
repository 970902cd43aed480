"""The policy in docs/deployer-policy, asked about calls: which action a call needs, and whether it is allowed."""

from __future__ import annotations

import json
import re
import urllib.parse
from functools import cache
from pathlib import Path
from typing import Any

from .faults import Call

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "deployer-policy"
#: What CLUSTER stands for in the tests.
CLUSTER = r"(?:ray-llm|rp)-[\w-]+"

# What IAM calls a service, where SDK or signature call it otherwise.
_PREFIXES = {
    "efs": "elasticfilesystem",
    "elb": "elasticloadbalancing",
    "elbv2": "elasticloadbalancing",
    "resourcegroupstaggingapi": "tag",
    "service-quotas": "servicequotas",
    "tagging": "tag",
}
# Operations whose actions have other names (Service Authorization Reference, "Actions ... for Amazon S3").
_S3 = {
    "DeleteBucketLifecycle": ["PutLifecycleConfiguration"],
    "DeleteBucketReplication": ["PutReplicationConfiguration"],
    "DeleteObjects": ["DeleteObject", "DeleteObjectVersion"],
    "GetBucketEncryption": ["GetEncryptionConfiguration"],
    "GetBucketLifecycle": ["GetLifecycleConfiguration"],
    "GetBucketLifecycleConfiguration": ["GetLifecycleConfiguration"],
    "GetBucketReplication": ["GetReplicationConfiguration"],
    "GetPublicAccessBlock": ["GetBucketPublicAccessBlock"],
    "HeadBucket": ["ListBucket"],
    "ListBuckets": ["ListAllMyBuckets"],
    "ListMultipartUploads": ["ListBucketMultipartUploads"],
    "ListObjectVersions": ["ListBucketVersions"],
    "ListObjectsV2": ["ListBucket"],
    "PutBucketEncryption": ["PutEncryptionConfiguration"],
    "PutBucketLifecycle": ["PutLifecycleConfiguration"],
    "PutBucketLifecycleConfiguration": ["PutLifecycleConfiguration"],
    "PutBucketReplication": ["PutReplicationConfiguration"],
    "PutPublicAccessBlock": ["PutBucketPublicAccessBlock"],
}
# How a call names what it is about, and how the end of that resource's ARN is made of the name.
_RESOURCES = {
    "ecr": (r'"repositoryName":\s*"([^"]+)', "repository/{}"),
    "eks": (r"^/clusters/([^/?\s]+)", "cluster/{}"),
    "events": (r'"(?:Name|Rule)":\s*"([^"]+)', "rule/{}"),
    "iam": (r"\bRoleName=([^&\s]+)", "role/{}"),
    "kms": (r'"AliasName":\s*"([^"]+)', "{}"),
    "logs": (r'"logGroupName":\s*"([^"]+)', "log-group:{}"),
    "s3": (r"^/([^/?\s]+)", "{}"),
    "sqs": (r'"QueueName":\s*"([^"]+)', "{}"),
}


def actions(service: str, operation: str) -> list[str]:
    """Return the actions that a call needs; GetCallerIdentity needs none."""
    if (service, operation) == ("sts", "GetCallerIdentity"):
        return []
    names = _S3.get(operation, [operation]) if service == "s3" else [operation]
    return [f"{_PREFIXES.get(service, service)}:{name}" for name in names]


@cache
def statements() -> list[dict[str, Any]]:
    """Return the statements of all documents."""
    return [one for path in sorted(FOLDER.glob("*.json")) for one in json.loads(path.read_text())["Statement"]]


def allowed() -> set[str]:
    """Return every action that is allowed on something."""
    return {action for one in statements() for action in one["Action"]}


def permits(call: Call) -> bool:
    """Return whether the documents allow a call, on what it names. Conditions are not looked at."""
    pattern, end = _RESOURCES.get(call.service, ("(?!)", ""))
    text = f"{urllib.parse.unquote(call.target)}\n{call.body.decode(errors='replace')}"
    found = re.search(pattern, text)
    named = end.format(urllib.parse.unquote(found.group(1))) if found else ""
    return all(
        any(action in one["Action"] and _covers(one["Resource"], named) for one in statements())
        for action in actions(call.service, call.operation)
    )


def _covers(resources: str | list[str], named: str) -> bool:
    if not named or resources == "*":
        return True
    given = [resources] if isinstance(resources, str) else resources
    patterns = [re.escape(one.split(":", 5)[5]).replace(r"\*", ".*").replace("CLUSTER", CLUSTER) for one in given]
    # What is below a name, such as a bucket's objects, has it before a slash.
    return any(re.fullmatch(pattern, text) for pattern in patterns for text in (named, f"{named}/"))
