#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the S3 buckets of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_buckets
short_description: Reconcile the S3 buckets of one cluster as one set
description:
  - Keeps buckets with versioning, encryption, public access block, TLS-only policy, lifecycle, replication, access
    logs and tags as described, in one call.
  - Has a check mode and says property by property what differs, which the collection's bucket module does not.
  - A bucket that holds data is only deleted where O(destroy_data) says so.
options:
  cluster_name:
    description: Owner of the buckets; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  state:
    description: Whether the buckets exist.
    type: str
    choices: [present, absent]
    default: present
  buckets:
    description: The buckets.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the bucket.
        type: str
        required: true
      region:
        description: Region of the bucket; empty means the module's. A bucket cannot move.
        type: str
        default: ""
      versioning:
        description: Whether replaced and deleted objects are kept as versions.
        type: bool
        default: true
      kms_key_id:
        description: >-
          KMS key that encrypts objects, with a bucket key that spares calls of KMS; empty takes S3's own keys (AES256).
        type: str
        default: ""
      tls_only:
        description: Whether requests without TLS are refused.
        type: bool
        default: true
      policy_statements:
        description: Further statements of the bucket policy.
        type: list
        elements: dict
        default: []
      lifecycle:
        description: >-
          Lifecycle rules as S3 has them (C(ID), C(Status), C(Filter), C(Expiration), C(Transitions) ...); empty
          means none.
        type: list
        elements: dict
        default: []
      log_writers:
        description: >-
          AWS services that may write logs into the bucket: V(vended_logs) (VPC flow logs, network load balancers),
          V(access_logs) (those of other buckets, below C(s3/)) and V(load_balancers) (application load balancers).
          The last two write only where O(buckets[].kms_key_id) is empty.
        type: list
        elements: str
        choices: [vended_logs, access_logs, load_balancers]
        default: []
      access_logs:
        description: Where requests to this bucket are logged (C(bucket), C(prefix)); left out, they are not.
        type: dict
      replication:
        description: Where new objects are copied to; left out, they are not. Both buckets need versioning.
        type: dict
        suboptions:
          bucket:
            description: Name of the bucket that receives the copies.
            type: str
            required: true
          role_arn:
            description: Role that S3 takes to copy.
            type: str
            required: true
          prefix:
            description: Prefix of the objects that are copied; empty means all.
            type: str
            default: ""
          kms_key_id:
            description: >-
              KMS key, in the region of the receiving bucket, that encrypts the copies. Required where
              O(buckets[].kms_key_id) is given: objects encrypted with a key are not copied otherwise.
            type: str
            default: ""
          storage_class:
            description: Storage class of the copies; empty takes that of the original.
            type: str
            default: ""
  tags:
    description: Tags of every bucket.
    type: dict
    default: {}
  destroy_data:
    description: With O(state=absent), whether buckets that hold objects are emptied and deleted.
    type: bool
    default: false
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the buckets
  rayplane.platform.aws_buckets:
    cluster_name: ray-llm-cluster
    buckets:
      - name: ray-llm-cluster-models
      - name: ray-llm-cluster-datasets
        lifecycle:
          - {ID: expire, Status: Enabled, Filter: {Prefix: results/}, Expiration: {Days: 90}}
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
kept:
  description: Buckets that were not deleted because they hold data.
  returned: state is absent
  type: list
  elements: str
unreplicated:
  description: Buckets that were, and no longer are, copied to another one.
  returned: state is present
  type: list
  elements: str
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
    sync_tags,
    tag_dict,
    tag_list,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import concurrently
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import (
    VERSION,
    by_statement,
    log_statements,
    partition_of,
)

BLOCK = {"BlockPublicAcls": True, "IgnorePublicAcls": True, "BlockPublicPolicy": True, "RestrictPublicBuckets": True}
# S3 counts a region's first bucket API as us-east-1, which must not be named when a bucket is made.
UNNAMED_REGION = "us-east-1"
GONE = "absent"
# What is read of a bucket: property -> operation, and the error code that means that there is none.
READS: dict[str, tuple[str, tuple[str, ...]]] = {
    "versioning": ("get_bucket_versioning", ()),
    "encryption": ("get_bucket_encryption", ("ServerSideEncryptionConfigurationNotFoundError",)),
    "public_access_block": ("get_public_access_block", ("NoSuchPublicAccessBlockConfiguration",)),
    "policy": ("get_bucket_policy", ("NoSuchBucketPolicy",)),
    "lifecycle": ("get_bucket_lifecycle_configuration", ("NoSuchLifecycleConfiguration",)),
    "replication": ("get_bucket_replication", ("ReplicationConfigurationNotFoundError",)),
    "access_logs": ("get_bucket_logging", ()),
    "tags": ("get_bucket_tagging", ("NoSuchTagSet",)),
}

Json = dict[str, Any]


class Buckets:
    """The buckets of one cluster: what is there, what is wanted, and the calls between the two.

    ``api_of`` gives S3 of a region, ``account_of`` the account's number; both are asked only where needed.
    """

    def __init__(
        self,
        params: Json,
        region: str,
        api_of: Callable[[str], Api],
        account_of: Callable[[], str],
        changes: Changes,
    ) -> None:
        self.params = params
        self.region = region
        self.changes = changes
        self.buckets: dict[str, Json] = {bucket["name"]: bucket for bucket in params["buckets"]}
        self.owner: str = params["cluster_name"]
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.owner}
        self.apis = {region: api_of(region)}
        for bucket in self.buckets.values():
            if self._region(bucket) not in self.apis:
                self.apis[self._region(bucket)] = api_of(self._region(bucket))
        self._account_of = account_of

    def present(self) -> Json:
        """Bring the buckets to their description; return the names of those that lost their replication."""
        self._refuse_impossible()
        there = self._list()
        have = self._observe([name for name in self.buckets if name in there])
        self._refuse_foreign(there, have)
        writing = any(bucket["log_writers"] for bucket in self.buckets.values())
        account = self._account_of() if writing else ""
        wanted = {name: self._wanted(bucket, account) for name, bucket in self.buckets.items()}
        differing = {name: self._compare(name, have.get(name), wanted[name]) for name in self.buckets}
        for name, keys in differing.items():
            self._repair(name, keys, have.get(name), wanted[name])
        # Only now every bucket that copies and logs go to is there, with its versioning and policy.
        for name, keys in differing.items():
            for key in ("replication", "access_logs"):
                if key in keys and (key == "access_logs" or wanted[name][key]):
                    self._set(name, key, wanted[name][key])
        lost = [name for name, one in have.items() if one["replication"] and not wanted[name]["replication"]]
        return {"unreplicated": lost}

    def absent(self) -> Json:
        """Delete the buckets that may be deleted; return the names of those kept for their data."""
        there = self._list()
        names = [name for name in self.buckets if name in there]
        tags = dict(zip(names, concurrently(lambda name: self._read(name, "tags"), names), strict=True))
        for name in names:
            if tags[name].get(OWNER_TAG, self.owner) == self.owner:
                cure = "no bucket was deleted; set platform_region, or this bucket's own region, to where it is"
                self._refuse_elsewhere(name, there[name], cure)
        kept = [name for name in names if not self._absent(name, tags[name])]
        if kept:
            self.changes.warnings.append(
                f"kept, because they hold data: {', '.join(kept)}; set storage_destroy_data to true to delete them"
                " with all versions"
            )
        return {"kept": kept}

    def _region(self, bucket: Json) -> str:
        return bucket["region"] or self.region

    def _api(self, name: str) -> Api:
        return self.apis[self._region(self.buckets[name])]

    def _refuse_impossible(self) -> None:
        if len(self.buckets) != len(self.params["buckets"]):
            names = [bucket["name"] for bucket in self.params["buckets"]]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlatformError(f"buckets named twice: {', '.join(twice)}; give each its own name")
        for name, bucket in self.buckets.items():
            copies = bucket["replication"]
            if copies:
                for one in (name, copies["bucket"]):
                    if one in self.buckets and not self.buckets[one]["versioning"]:
                        raise PlatformError(
                            f"bucket {name}: replication to {copies['bucket']} needs versioning, which bucket {one} has"
                            " switched off: set its versioning to true, or leave its replication out"
                        )
                if copies["bucket"] == name:
                    raise PlatformError(f"bucket {name}: replication to itself; name another bucket")
                if bucket["kms_key_id"] and not copies["kms_key_id"]:
                    raise PlatformError(
                        f"bucket {name}: its objects are encrypted with a KMS key, and S3 copies such objects only to a"
                        f" key in the region of {copies['bucket']}: give the replication a kms_key_id"
                    )
            plain = [writer for writer in bucket["log_writers"] if writer != "vended_logs"]
            if bucket["kms_key_id"] and plain:
                raise PlatformError(
                    f"bucket {name}: {' and '.join(plain)} are written only into buckets with S3's own keys: leave its"
                    " kms_key_id empty, or take them out of its log_writers"
                )

    def _list(self) -> dict[str, str]:
        """Return the account's buckets among ours, with their regions; all at once, where listing is allowed."""
        # Names are no paths: every character that they share counts.
        prefix = os.path.commonprefix(list(self.buckets))  # noqa: RUF071
        found: dict[str, str] = {}
        token = ""
        while True:
            answer = self.apis[self.region].read(
                "list_buckets",
                "the account's buckets",
                absent=("AccessDenied",),
                MaxBuckets=1000,
                **only_given({"Prefix": prefix, "ContinuationToken": token}),
            )
            if answer is None:
                heads = {name: self._head(name) for name in self.buckets}
                return {name: region for name, region in heads.items() if region is not None}
            for one in answer.get("Buckets", []):
                if one["Name"] in self.buckets:
                    found[one["Name"]] = one.get("BucketRegion") or ""
            token = answer.get("ContinuationToken")
            if not token:
                return found

    def _head(self, name: str) -> str | None:
        """Return the region of a bucket, empty where S3 does not tell it; None where there is no such bucket."""
        absent = ("404", "NoSuchBucket", "NotFound")
        try:
            answer = self._api(name).read("head_bucket", f"bucket {name}", absent=absent, Bucket=name)
            return None if answer is None else str(answer.get("BucketRegion") or "")
        except PlatformError as error:
            if " 403" in str(error) or "Forbidden" in str(error):
                raise self._taken(name) from error
            raise

    def _taken(self, name: str) -> PlatformError:
        return PlatformError(
            f"bucket {name} belongs to another account or is closed to these credentials: bucket names are shared by"
            " all of AWS; choose another name, or check the credentials"
        )

    def _refuse_foreign(self, there: dict[str, str], have: dict[str, Json]) -> None:
        for name in self.buckets:
            if name not in there:
                if self._head(name) is not None:
                    raise self._taken(name)
                continue
            owner = have[name]["tags"].get(OWNER_TAG, self.owner)
            if owner != self.owner:
                raise PlatformError(
                    f"bucket {name} belongs to cluster {owner} (tag {OWNER_TAG}): choose another name for"
                    f" {self.owner}'s"
                )
            self._refuse_elsewhere(name, there[name], "a bucket cannot move; choose another name, or delete it first")

    def _refuse_elsewhere(self, name: str, region: str, cure: str) -> None:
        wanted = self._region(self.buckets[name])
        if region not in ("", wanted):
            raise PlatformError(f"bucket {name} is in {region} and not in {wanted}: {cure}")

    def _observe(self, names: Iterable[str]) -> dict[str, Json]:
        """Read all properties of the buckets, several requests at a time."""
        pairs = [(name, key) for name in names for key in READS]
        values = concurrently(lambda pair: self._read(*pair), pairs)
        have: dict[str, Json] = {}
        for (name, key), value in zip(pairs, values, strict=True):
            have.setdefault(name, {})[key] = value
        return have

    def _read(self, name: str, key: str) -> Any:
        operation, absent = READS[key]
        answer = self._api(name).read(operation, f"bucket {name}", absent=absent, Bucket=name) or {}
        if key == "versioning":
            return answer.get("Status")
        if key == "encryption":
            return _encryption(answer.get("ServerSideEncryptionConfiguration"))
        if key == "public_access_block":
            return answer.get("PublicAccessBlockConfiguration")
        if key == "policy":
            return json.loads(answer["Policy"]) if answer.get("Policy") else None
        if key == "lifecycle":
            return answer.get("Rules", [])
        if key == "replication":
            return answer.get("ReplicationConfiguration")
        if key == "access_logs":
            target = answer.get("LoggingEnabled")
            return {"bucket": target["TargetBucket"], "prefix": target.get("TargetPrefix", "")} if target else None
        return tag_dict(answer.get("TagSet"))

    def _wanted(self, bucket: Json, account: str) -> Json:
        logs = bucket["access_logs"]
        return {
            "versioning": "Enabled" if bucket["versioning"] else "Suspended",
            "encryption": {"key": bucket["kms_key_id"] or "AES256", "bucket_key": bool(bucket["kms_key_id"])},
            "public_access_block": BLOCK,
            "policy": self._policy(bucket, account),
            "lifecycle": bucket["lifecycle"],
            "replication": self._replication(bucket),
            "access_logs": {"bucket": logs["bucket"], "prefix": logs.get("prefix") or ""} if logs else None,
        }

    def _compare(self, name: str, have: Json | None, wanted: Json) -> list[str]:
        """Record what differs, each in the parts a person thinks in, and return the properties to be set."""
        resource = f"bucket {name}"
        if have is None:
            self.changes.create(resource, {**wanted, "region": self._region(self.buckets[name]), "tags": self.tags})
            keys = [key for key in wanted if wanted[key]]
            if not self.buckets[name]["versioning"]:
                keys.remove("versioning")
            return keys
        differing = []
        for key, after in wanted.items():
            if key == "versioning" and after == "Suspended" and have[key] is None:
                continue  # never switched on is as good as suspended
            was, will = _parts(key, have[key]), _parts(key, after)
            will = {**{part: GONE for part in was if part not in will}, **will}
            if self.changes.update(resource, was, will):
                differing.append(key)
        return differing

    def _repair(self, name: str, keys: list[str], have: Json | None, wanted: Json) -> None:
        resource = f"bucket {name}"
        api = self._api(name)
        if have is None:
            region = self._region(self.buckets[name])
            location: Json = (
                {} if region == UNNAMED_REGION else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            )
            api.write("create_bucket", resource, Bucket=name, **location)
            tags = self.tags
        else:
            lacking = sync_tags(self.changes, resource, have["tags"], self.tags)
            tags = {**have["tags"], **self.tags} if lacking else {}
        # First whose it is, so that what an interrupted run leaves is known as ours.
        if tags:
            api.write("put_bucket_tagging", resource, Bucket=name, Tagging={"TagSet": tag_list(tags)})
        # While objects are copied, versioning cannot be suspended.
        if "replication" in keys and not wanted["replication"]:
            self._set(name, "replication", None)
        for key in keys:
            if key not in ("replication", "access_logs"):
                self._set(name, key, wanted[key])

    def _policy(self, bucket: Json, account: str) -> Json | None:
        region = self._region(bucket)
        statements = log_statements(bucket["name"], bucket["log_writers"], region, account)
        if bucket["tls_only"]:
            arn = f"arn:{partition_of(region)}:s3:::{bucket['name']}"
            statements.insert(
                0,
                {
                    "Sid": "TlsOnly",
                    "Effect": "Deny",
                    "Principal": "*",
                    "Action": "s3:*",
                    "Resource": [arn, f"{arn}/*"],
                    "Condition": {"Bool": {"aws:SecureTransport": "false"}},
                },
            )
        statements += bucket["policy_statements"]
        return {"Version": VERSION, "Statement": statements} if statements else None

    def _replication(self, bucket: Json) -> Json | None:
        copies = bucket["replication"]
        if not copies:
            return None
        destination: Json = {"Bucket": f"arn:{partition_of(self.region)}:s3:::{copies['bucket']}"}
        if copies["storage_class"]:
            destination["StorageClass"] = copies["storage_class"]
        rule: Json = {
            "ID": "rayplane",
            "Priority": 1,
            "Status": "Enabled",
            "Filter": {"Prefix": copies["prefix"]},
            "DeleteMarkerReplication": {"Status": "Enabled"},
            "Destination": destination,
        }
        if copies["kms_key_id"]:
            destination["EncryptionConfiguration"] = {"ReplicaKmsKeyID": copies["kms_key_id"]}
            rule["SourceSelectionCriteria"] = {"SseKmsEncryptedObjects": {"Status": "Enabled"}}
        return {"Role": copies["role_arn"], "Rules": [rule]}

    def _set(self, name: str, key: str, value: Any) -> None:
        def write(operation: str, **arguments: Any) -> None:
            self._api(name).write(operation, f"bucket {name}", Bucket=name, **arguments)

        if key == "versioning":
            write("put_bucket_versioning", VersioningConfiguration={"Status": value})
        elif key == "encryption":
            default = {"SSEAlgorithm": "AES256"}
            if value["bucket_key"]:
                default = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": value["key"]}
            rule = {"ApplyServerSideEncryptionByDefault": default, "BucketKeyEnabled": value["bucket_key"]}
            write("put_bucket_encryption", ServerSideEncryptionConfiguration={"Rules": [rule]})
        elif key == "public_access_block":
            write("put_public_access_block", PublicAccessBlockConfiguration=value)
        elif key == "policy" and value:
            write("put_bucket_policy", Policy=json.dumps(value))
        elif key == "policy":
            write("delete_bucket_policy")
        elif key == "lifecycle" and value:
            write("put_bucket_lifecycle_configuration", LifecycleConfiguration={"Rules": value})
        elif key == "lifecycle":
            write("delete_bucket_lifecycle")
        elif key == "replication" and value:
            write("put_bucket_replication", ReplicationConfiguration=value)
        elif key == "replication":
            write("delete_bucket_replication")
        else:
            target = {"TargetBucket": value["bucket"], "TargetPrefix": value["prefix"]} if value else None
            write("put_bucket_logging", BucketLoggingStatus={"LoggingEnabled": target} if target else {})

    def _absent(self, name: str, tags: dict[str, str]) -> bool:
        """Delete a bucket and return true; return false where it is kept for its data."""
        resource = f"bucket {name}"
        owner = tags.get(OWNER_TAG)
        if owner not in (None, self.owner):
            self.changes.warnings.append(f"{resource} belongs to cluster {owner} (tag {OWNER_TAG}) and is left alone")
            return True
        items, uploads = self._page(name)
        # A bucket without our tag is one that an interrupted run made, and empty, or somebody's own.
        if items and not (self.params["destroy_data"] and owner):
            return False
        self.changes.delete(resource, {"data": bool(items)})
        api = self._api(name)
        while (items or uploads) and not self.changes.check_mode:
            self._delete_objects(name, items)
            for upload in uploads:
                api.write("abort_multipart_upload", resource, Bucket=name, **upload)
            items, uploads = self._page(name)
        api.write("delete_bucket", resource, Bucket=name)
        return True

    def _delete_objects(self, name: str, items: list[dict[str, str]]) -> None:
        if not items:
            return
        delete = {"Objects": items, "Quiet": True}
        answer = self._api(name).write("delete_objects", f"bucket {name}", Bucket=name, Delete=delete) or {}
        for error in answer.get("Errors", []):
            raise PlatformError(
                f"bucket {name}: {error.get('Key')} cannot be deleted: {error.get('Code')}: {error.get('Message')}"
            )

    def _page(self, name: str) -> tuple[list[dict[str, str]], list[Json]]:
        """Return up to 1000 versions (delete markers included) and up to 1000 unfinished uploads."""
        api = self._api(name)
        answer = api.read("list_object_versions", f"bucket {name}", Bucket=name, MaxKeys=1000)
        items = [
            {"Key": item["Key"], "VersionId": item["VersionId"]}
            for item in [*answer.get("Versions", []), *answer.get("DeleteMarkers", [])]
        ]
        uploads = api.read("list_multipart_uploads", f"bucket {name}", Bucket=name).get("Uploads", [])
        return items, [{"Key": upload["Key"], "UploadId": upload["UploadId"]} for upload in uploads]


def _encryption(configuration: Json | None) -> Json | None:
    rules = (configuration or {}).get("Rules", [])
    if not rules:
        return None
    default = rules[0].get("ApplyServerSideEncryptionByDefault", {})
    algorithm = default.get("SSEAlgorithm", "AES256")
    key = default.get("KMSMasterKeyID") or algorithm
    # Bucket keys are a matter of KMS; S3's own keys have none, whatever the switch says.
    return {"key": key, "bucket_key": bool(rules[0].get("BucketKeyEnabled")) and algorithm != "AES256"}


def _parts(key: str, value: Any) -> Json:
    """A property in the parts that are compared and told one by one."""
    if key == "policy":
        return {f"policy {sid}": statement for sid, statement in by_statement(value).items()}
    if key == "lifecycle":
        return {f"lifecycle {rule.get('ID')}": _rule(rule) for rule in value}
    if key == "encryption":
        return {"encryption": value["key"], "bucket key": value["bucket_key"]} if value else {}
    if key == "replication" and value:
        rules = {
            f"replication rule {rule.get('ID')}": {one: rule[one] for one in rule if one != "ID"}
            for rule in value["Rules"]
        }
        return {"replication role": value.get("Role"), **rules}
    return {key: value} if value else {}


def _rule(rule: Json) -> Json:
    """A lifecycle rule in one form: S3 answers a filter with defaults, and transitions in any order."""
    answer = {key: value for key, value in rule.items() if key not in ("ID", "Prefix")}
    chosen = dict(rule.get("Filter") or {"Prefix": rule.get("Prefix", "")})
    chosen.update(chosen.pop("And", {}))
    if chosen.get("Tag"):
        chosen["Tags"] = [chosen.pop("Tag")]
    if chosen.get("Tags"):
        chosen["Tags"] = tag_dict(chosen["Tags"])
    answer["Filter"] = {name: value for name, value in chosen.items() if value}
    for key in ("Transitions", "NoncurrentVersionTransitions"):
        if answer.get(key):
            answer[key] = sorted(answer[key], key=lambda one: str(one.get("StorageClass")))
    return answer


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""

    def api_of(region: str) -> Api:
        return Api(module.client("s3", region=region), changes)

    def account_of() -> str:
        answer = Api(module.client("sts"), changes).read("get_caller_identity", "these credentials")
        return str(answer["Account"])

    buckets = Buckets(module.params, module.region, api_of, account_of, changes)
    return buckets.present() if module.params["state"] == "present" else buckets.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
