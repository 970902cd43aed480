# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Filters that turn what an inventory says about storage into what S3, IAM and Kubernetes take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

__all__ = [
    "FilterModule",
    "bucket_lifecycle_rules",
    "storage_bucket_set",
    "storage_class_objects",
    "storage_replication_role",
]

Json = dict[str, Any]

# S3's classes from warm to cold; objects move only downwards (S3 user guide, "Transitioning objects using Amazon S3
# Lifecycle").
_CLASSES = ("STANDARD_IA", "INTELLIGENT_TIERING", "ONEZONE_IA", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE")
_ARCHIVES = ("GLACIER_IR", "GLACIER", "DEEP_ARCHIVE")
#: Classes that objects enter after 30 days at the earliest, and leave for an archive 30 days later at the earliest.
_INFREQUENT = ("STANDARD_IA", "ONEZONE_IA")
_DAYS_BEFORE_INFREQUENT = 30
_DAYS_IN_WARM_CLASS = 30
_MOST_KEPT_VERSIONS = 100
_LONGEST_RULE_NAME = 255
_LONGEST_BUCKET_NAME = 63
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def _whole(value: Any, what: str, least: int) -> int:
    """The number, or an error that names it; templates give numbers as text."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = least - 1
    if number < least or isinstance(value, bool) or (isinstance(value, float) and value != number):
        raise AnsibleFilterError(f"{what} is {value!r}: it has to be a whole number of at least {least}")
    return number


def _transitions(given: Any, what: str) -> list[tuple[str, int]]:
    """Storage classes with their days, warm to cold, as S3 accepts them."""
    if not isinstance(given, Mapping):
        raise AnsibleFilterError(f"{what} is {given!r}: write storage classes with their days, {{STANDARD_IA: 30}}")
    for name in given:
        if name not in _CLASSES:
            raise AnsibleFilterError(f"{what} names storage class {name!r}: S3 moves objects to {', '.join(_CLASSES)}")
    steps = [(name, _whole(given[name], f"{what}.{name}", 0)) for name in _CLASSES if name in given]
    for name, days in steps:
        if name in _INFREQUENT and days < _DAYS_BEFORE_INFREQUENT:
            raise AnsibleFilterError(
                f"{what}.{name} is {days}: S3 moves objects there after {_DAYS_BEFORE_INFREQUENT} days at the earliest"
            )
    for number, (name, days) in enumerate(steps):
        for earlier, before in steps[:number]:
            if earlier == "ONEZONE_IA" and name == "GLACIER_IR":
                raise AnsibleFilterError(f"{what}: S3 does not move objects from ONEZONE_IA to GLACIER_IR; drop one")
            wait = _DAYS_IN_WARM_CLASS if earlier not in _ARCHIVES and name in _ARCHIVES else 1
            if days < before + wait:
                raise AnsibleFilterError(
                    f"{what}.{name} is {days}: objects go to {earlier} at {before} days, and to {name} {wait} days"
                    f" later at the earliest; write {before + wait} or more"
                )
    return steps


def _chosen(rule: Mapping[str, Any], what: str) -> Json:
    """S3's filter of the objects that a rule is about."""
    parts: Json = {}
    if rule.get("prefix"):
        parts["Prefix"] = str(rule["prefix"])
    if rule.get("tags"):
        parts["Tags"] = [{"Key": str(key), "Value": str(value)} for key, value in sorted(rule["tags"].items())]
    for key, name in (("min_size", "ObjectSizeGreaterThan"), ("max_size", "ObjectSizeLessThan")):
        if rule.get(key):
            parts[name] = _whole(rule[key], f"{what}.{key}", 1)
    if len(parts) + len(parts.get("Tags", [])) - ("Tags" in parts) > 1:
        return {"And": parts}
    if "Tags" in parts:
        return {"Tag": parts["Tags"][0]}
    return parts or {"Prefix": ""}


def _lifecycle_rule(rule: Mapping[str, Any], what: str) -> Json:
    what = f"{what} ({rule['name']})"
    if len(str(rule["name"])) > _LONGEST_RULE_NAME:
        raise AnsibleFilterError(f"{what}: S3 allows {_LONGEST_RULE_NAME} characters in a rule's name")
    built: Json = {
        "ID": str(rule["name"]),
        "Status": "Enabled" if rule.get("enabled", True) else "Disabled",
        "Filter": _chosen(rule, what),
    }
    steps = _transitions(rule.get("transitions") or {}, f"{what}.transitions")
    if steps:
        built["Transitions"] = [{"Days": days, "StorageClass": name} for name, days in steps]
    if rule.get("expire_days"):
        days = _whole(rule["expire_days"], f"{what}.expire_days", 1)
        if steps and days <= steps[-1][1]:
            raise AnsibleFilterError(
                f"{what}.expire_days is {days}: objects go to {steps[-1][0]} at {steps[-1][1]} days, so they can end"
                f" at {steps[-1][1] + 1} days at the earliest"
            )
        built["Expiration"] = {"Days": days}
    if rule.get("expired_delete_markers"):
        if "Expiration" in built or rule.get("tags"):
            raise AnsibleFilterError(f"{what}: S3 takes expired_delete_markers without expire_days and without tags")
        built["Expiration"] = {"ExpiredObjectDeleteMarker": True}
    old = _transitions(rule.get("noncurrent_transitions") or {}, f"{what}.noncurrent_transitions")
    if old:
        built["NoncurrentVersionTransitions"] = [{"NoncurrentDays": days, "StorageClass": name} for name, days in old]
    if rule.get("keep_versions") and not rule.get("noncurrent_days"):
        raise AnsibleFilterError(f"{what}.keep_versions: say with noncurrent_days after how long all others go")
    if rule.get("noncurrent_days"):
        days = _whole(rule["noncurrent_days"], f"{what}.noncurrent_days", 1)
        if old and days <= old[-1][1]:
            raise AnsibleFilterError(
                f"{what}.noncurrent_days is {days}: versions go to {old[-1][0]} at {old[-1][1]} days, so they can end"
                f" at {old[-1][1] + 1} days at the earliest"
            )
        built["NoncurrentVersionExpiration"] = {"NoncurrentDays": days}
        if rule.get("keep_versions"):
            kept = _whole(rule["keep_versions"], f"{what}.keep_versions", 1)
            if kept > _MOST_KEPT_VERSIONS:
                raise AnsibleFilterError(f"{what}.keep_versions is {kept}: S3 allows {_MOST_KEPT_VERSIONS}")
            built["NoncurrentVersionExpiration"]["NewerNoncurrentVersions"] = kept
    if rule.get("abort_upload_days"):
        if rule.get("tags") or rule.get("min_size") or rule.get("max_size"):
            raise AnsibleFilterError(f"{what}: unfinished uploads have no tags and no size: make it a rule of its own")
        days = _whole(rule["abort_upload_days"], f"{what}.abort_upload_days", 1)
        built["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": days}
    if len(built) == len(("ID", "Status", "Filter")):
        raise AnsibleFilterError(f"{what} does nothing: give it transitions, expire_days, noncurrent_days or others")
    return built


def bucket_lifecycle_rules(
    rules: Sequence[Mapping[str, Any]],
    noncurrent_days: int = 0,
    abort_upload_days: int = 0,
    variable: str = "lifecycle",
) -> list[Json]:
    """Return S3's lifecycle configuration for rules as an inventory writes them.

    A rule has a ``name``; what it is about (``prefix``, ``tags``, ``min_size`` and ``max_size`` in bytes); and what
    happens: ``transitions`` and ``noncurrent_transitions`` (storage class: days), ``expire_days``, ``noncurrent_days``
    with ``keep_versions``, ``abort_upload_days``, ``expired_delete_markers``. ``enabled`` is true where not given. The
    two numbers are rules for the whole bucket: days after which old versions and unfinished uploads go; 0 is never.

    Raises AnsibleFilterError, with the path below ``variable``, for what S3 would refuse.
    """
    whole: list[Json] = []
    if _whole(noncurrent_days, "storage_noncurrent_days", 0):
        whole.append({"name": "drop-old-versions", "noncurrent_days": noncurrent_days})
    if _whole(abort_upload_days, "storage_abort_upload_days", 0):
        whole.append({"name": "drop-unfinished-uploads", "abort_upload_days": abort_upload_days})
    built = [_lifecycle_rule(rule, f"{variable}[{number}]") for number, rule in enumerate(rules)]
    built += [_lifecycle_rule(rule, variable) for rule in whole]
    names = [rule["ID"] for rule in built]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnsibleFilterError(f"{variable}: rules named twice: {', '.join(twice)}; give each its own name")
    return built


def storage_bucket_set(
    buckets: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], role_arn: str = ""
) -> list[Json]:
    """Return the options of the module aws_buckets for buckets as an inventory declares them.

    What a bucket does not say comes from ``settings``: ``versioning``, ``kms_key_id``, ``tls_only``,
    ``noncurrent_days``, ``abort_upload_days``, ``access_logs`` and ``logs_bucket``, ``region``, and ``replica_region``,
    ``replica_kms_key_id``, ``replica_storage_class``. A bucket with ``replicate`` is followed by its replica, which is
    as safe as itself. ``role_arn`` is the role that copies.

    Raises AnsibleFilterError for what S3 would refuse.
    """
    built: list[Json] = []
    for number, bucket in enumerate(buckets):
        what = f"storage_buckets[{number}] ({bucket.get('name')})"
        one: Json = {
            "name": bucket["name"],
            "versioning": bool(bucket.get("versioning", settings["versioning"])),
            "kms_key_id": bucket.get("kms_key_id", settings["kms_key_id"]),
            "tls_only": bool(bucket.get("tls_only", settings["tls_only"])),
            "policy_statements": list(bucket.get("policy_statements") or []),
            "log_writers": list(bucket.get("log_writers") or []),
            "lifecycle": bucket_lifecycle_rules(
                bucket.get("lifecycle") or [],
                bucket.get("noncurrent_days", settings["noncurrent_days"]),
                bucket.get("abort_upload_days", settings["abort_upload_days"]),
                f"{what}.lifecycle",
            ),
        }
        if bucket.get("access_logs", settings["access_logs"]) and bucket["name"] != settings["logs_bucket"]:
            one["access_logs"] = {"bucket": settings["logs_bucket"], "prefix": f"s3/{bucket['name']}/"}
        built.append(one)
        if bucket.get("replicate") and settings["replica_region"]:
            built.append(_replica(bucket, one, settings, role_arn, what))
    return built


def _replica(bucket: Mapping[str, Any], one: Json, settings: Mapping[str, Any], role_arn: str, what: str) -> Json:
    """The bucket that receives copies of ``one``, which is told to send them."""
    region, key = settings["replica_region"], settings["replica_kms_key_id"]
    name = bucket.get("replica_name") or f"{one['name']}-{region}"
    if region == settings["region"]:
        raise AnsibleFilterError(
            f"storage_replica_region is {region!r}, the cluster's own: copies are kept in another region"
        )
    if not one["versioning"]:
        raise AnsibleFilterError(
            f"{what}: copies in {region} need versioning, which is off: set storage_versioning or the bucket's"
            " versioning to true, or its replicate to false"
        )
    if one["kms_key_id"] and not key:
        raise AnsibleFilterError(
            f"{what}: objects encrypted with a KMS key are copied only to a key of the other region: give"
            f" storage_replica_kms_key_id, a key in {region}"
        )
    if len(name) > _LONGEST_BUCKET_NAME:
        raise AnsibleFilterError(
            f"{what}: its replica would be named {name}, and S3 allows {_LONGEST_BUCKET_NAME} characters: give a"
            " replica_name"
        )
    one["replication"] = {
        "bucket": name,
        "role_arn": role_arn,
        "kms_key_id": key,
        "storage_class": settings["replica_storage_class"],
    }
    inherited = {option: one[option] for option in ("versioning", "tls_only", "lifecycle")}
    return {"name": name, "region": region, "kms_key_id": key, **inherited}


def storage_replication_role(buckets: Sequence[Mapping[str, Any]], name: str, partition: str, region: str) -> Json:
    """Return the IAM role (as aws_iam_roles takes it) that copies between the buckets, and can do nothing else.

    ``buckets`` are those of ``storage_bucket_set``. Permissions: S3 user guide, "Setting up permissions for live
    replication"; those on keys only through S3.
    """
    statements: list[Json] = []
    regions = {bucket["name"]: bucket.get("region") or region for bucket in buckets}
    for bucket in buckets:
        copies = bucket.get("replication")
        if not copies:
            continue
        source = f"arn:{partition}:s3:::{bucket['name']}"
        statements += [
            _allow(["s3:GetReplicationConfiguration", "s3:ListBucket"], source),
            _allow(
                [
                    "s3:GetObjectVersionForReplication",
                    "s3:GetObjectVersionAcl",
                    "s3:GetObjectVersionTagging",
                ],
                f"{source}/*",
            ),
            _allow(
                ["s3:ReplicateObject", "s3:ReplicateDelete", "s3:ReplicateTags"],
                f"arn:{partition}:s3:::{copies['bucket']}/*",
            ),
        ]
        if bucket["kms_key_id"]:
            statements.append(_allow(["kms:Decrypt"], bucket["kms_key_id"], via=f"s3.{region}.amazonaws.com"))
        if copies["kms_key_id"]:
            via = f"s3.{regions[copies['bucket']]}.amazonaws.com"
            statements.append(_allow(["kms:Encrypt", "kms:GenerateDataKey"], copies["kms_key_id"], via=via))
    distinct = [one for number, one in enumerate(statements) if one not in statements[:number]]
    trust = {"Effect": "Allow", "Principal": {"Service": "s3.amazonaws.com"}, "Action": ["sts:AssumeRole"]}
    return {
        "name": name,
        "description": "Copies objects to another region",
        "trust": {"Version": "2012-10-17", "Statement": [trust]},
        "inline_policies": {"replicate": {"Version": "2012-10-17", "Statement": distinct}},
    }


def _allow(actions: list[str], resource: str, via: str = "") -> Json:
    statement: Json = {"Effect": "Allow", "Action": actions, "Resource": resource}
    return {**statement, "Condition": {"StringEquals": {"kms:ViaService": via}}} if via else statement


def storage_class_objects(settings: Mapping[str, Any]) -> list[Json]:
    """Return the StorageClasses: ``name`` on EBS, and ``efs_name`` on the file system ``efs_id`` where that is given.

    Settings of the first: ``default``, ``encrypted``, ``kms_key_arn``, ``iops`` and ``throughput`` (MiB/s; 0 leaves
    them to AWS), ``fs_type``, ``reclaim_policy``, and ``tags`` of the volumes.
    """
    parameters = {
        "type": "gp3",
        "encrypted": str(bool(settings["encrypted"])).lower(),
        "csi.storage.k8s.io/fstype": settings["fs_type"],
    }
    if settings["encrypted"] and settings["kms_key_arn"]:
        parameters["kmsKeyId"] = settings["kms_key_arn"]
    for name in ("iops", "throughput"):
        if int(settings[name] or 0):
            parameters[name] = str(settings[name])
    for number, (key, value) in enumerate(sorted(settings["tags"].items()), 1):
        parameters[f"tagSpecification_{number}"] = f"{key}={value}"
    objects = [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": settings["name"],
                "annotations": {_DEFAULT_CLASS: str(bool(settings["default"])).lower()},
            },
            "provisioner": "ebs.csi.aws.com",
            "parameters": parameters,
            "reclaimPolicy": settings["reclaim_policy"],
            # The volume is made in the zone where its pod starts.
            "volumeBindingMode": "WaitForFirstConsumer",
            "allowVolumeExpansion": True,
        }
    ]
    if settings["efs_id"]:
        objects.append(
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {"name": settings["efs_name"]},
                "provisioner": "efs.csi.aws.com",
                # One access point a volume, so that claims do not see each other's files.
                "parameters": {
                    "provisioningMode": "efs-ap",
                    "fileSystemId": settings["efs_id"],
                    "directoryPerms": "700",
                    "basePath": "/volumes",
                },
                "reclaimPolicy": settings["reclaim_policy"],
                "volumeBindingMode": "Immediate",
            }
        )
    return objects


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "bucket_lifecycle_rules": bucket_lifecycle_rules,
            "storage_bucket_set": storage_bucket_set,
            "storage_class_objects": storage_class_objects,
            "storage_replication_role": storage_replication_role,
        }
