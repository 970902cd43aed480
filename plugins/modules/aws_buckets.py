#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the S3 buckets of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_buckets
short_description: Reconcile the S3 buckets of one cluster as one set
description:
  - Keeps buckets with versioning, encryption, public access block, TLS-only policy, lifecycle and tags as described,
    in one call.
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
      versioning:
        description: Whether replaced and deleted objects are kept as versions.
        type: bool
        default: true
      kms_key_id:
        description: KMS key that encrypts objects; empty takes S3's own keys (AES256).
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
  tags:
    description: Tags of every bucket.
    type: dict
    default: {}
  destroy_data:
    description: With O(state=absent), whether buckets that hold objects are emptied and deleted.
    type: bool
    default: false
extends_documentation_fragment:
  - amazon.aws.common.modules
  - amazon.aws.region.modules
  - amazon.aws.boto3
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the buckets
  aws_buckets:
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
"""

import json
from typing import Any

from ansible.module_utils.rayplane_aws import OWNER_TAG, Api, Changes, PlatformError, run, sync_tags, tag_dict, tag_list
from ansible_collections.amazon.aws.plugins.module_utils.modules import AnsibleAWSModule

BLOCK = {"BlockPublicAcls": True, "IgnorePublicAcls": True, "BlockPublicPolicy": True, "RestrictPublicBuckets": True}
# S3 counts a region's first bucket API as us-east-1, which must not be named when a bucket is made.
UNNAMED_REGION = "us-east-1"


class Buckets:
    """The buckets of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], region: str, api: Api, changes: Changes) -> None:
        self.params = params
        self.region = region
        self.api = api
        self.changes = changes
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {
            OWNER_TAG: params["cluster_name"]
        }

    def present(self) -> dict[str, Any]:
        """Bring the buckets to their description."""
        for bucket in self.params["buckets"]:
            self._present(bucket)
        return {}

    def absent(self) -> dict[str, Any]:
        """Delete the buckets that may be deleted; return the names of those kept for their data."""
        kept = [bucket["name"] for bucket in self.params["buckets"] if not self._absent(bucket["name"])]
        if kept:
            self.changes.warnings.append(
                f"kept, because they hold data: {', '.join(kept)}; set storage_destroy_data to true to delete them"
                " with all versions"
            )
        return {"kept": kept}

    def _exists(self, name: str) -> bool:
        try:
            return (
                self.api.read("head_bucket", f"bucket {name}", absent=("404", "NoSuchBucket", "NotFound"), Bucket=name)
                is not None
            )
        except PlatformError as error:
            if " 403" in str(error) or "Forbidden" in str(error):
                raise PlatformError(
                    f"bucket {name} belongs to another account or is closed to these credentials: bucket names are"
                    " shared by all of AWS;"
                    " choose another name, or check the credentials"
                ) from error
            raise

    def _present(self, bucket: dict[str, Any]) -> None:
        name = bucket["name"]
        resource = f"bucket {name}"
        wanted = {
            "versioning": "Enabled" if bucket["versioning"] else "Suspended",
            "encryption": bucket["kms_key_id"] or "AES256",
            "public_access_block": BLOCK,
            "policy": self._policy(bucket),
            "lifecycle": bucket["lifecycle"] or None,
        }
        if self._exists(name):
            have = self._observe(name)
            tags = have.pop("tags")
            if not bucket["versioning"] and have["versioning"] is None:
                # Never switched on is as good as suspended.
                wanted["versioning"] = None
            differing = [key for key in wanted if have[key] != wanted[key]]
            self.changes.update(resource, have, wanted)
            lacking = sync_tags(self.changes, resource, tags, self.tags)
            tags = {**tags, **self.tags} if lacking else {}
        else:
            self.changes.create(resource, {**wanted, "tags": self.tags})
            location = (
                {}
                if self.region == UNNAMED_REGION
                else {"CreateBucketConfiguration": {"LocationConstraint": self.region}}
            )
            self.api.write("create_bucket", resource, Bucket=name, **location)
            differing = [key for key in wanted if wanted[key] is not None]
            if not bucket["versioning"]:
                differing.remove("versioning")
            tags = self.tags
        for key in differing:
            self._set(key, resource, bucket, wanted[key])
        if tags:
            self.api.write("put_bucket_tagging", resource, Bucket=name, Tagging={"TagSet": tag_list(tags)})

    def _policy(self, bucket: dict[str, Any]) -> dict[str, Any] | None:
        statements = list(bucket["policy_statements"])
        if bucket["tls_only"]:
            partition = (
                "aws-cn"
                if self.region.startswith("cn-")
                else "aws-us-gov"
                if self.region.startswith("us-gov-")
                else "aws"
            )
            arn = f"arn:{partition}:s3:::{bucket['name']}"
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
        return {"Version": "2012-10-17", "Statement": statements} if statements else None

    def _observe(self, name: str) -> dict[str, Any]:
        resource = f"bucket {name}"

        def read(operation: str, *absent: str) -> dict[str, Any]:
            return self.api.read(operation, resource, absent=absent, Bucket=name) or {}

        encryption = read("get_bucket_encryption", "ServerSideEncryptionConfigurationNotFoundError")
        rules = encryption.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
        default = rules[0].get("ApplyServerSideEncryptionByDefault", {}) if rules else {}
        policy = read("get_bucket_policy", "NoSuchBucketPolicy").get("Policy")
        block = read("get_public_access_block", "NoSuchPublicAccessBlockConfiguration")
        return {
            "versioning": read("get_bucket_versioning").get("Status"),
            "encryption": default.get("KMSMasterKeyID") or default.get("SSEAlgorithm"),
            "public_access_block": block.get("PublicAccessBlockConfiguration"),
            "policy": json.loads(policy) if policy else None,
            "lifecycle": read("get_bucket_lifecycle_configuration", "NoSuchLifecycleConfiguration").get("Rules"),
            "tags": tag_dict(read("get_bucket_tagging", "NoSuchTagSet").get("TagSet")),
        }

    def _set(self, key: str, resource: str, bucket: dict[str, Any], value: Any) -> None:
        name = bucket["name"]
        if key == "versioning":
            self.api.write(
                "put_bucket_versioning", resource, Bucket=name, VersioningConfiguration={"Status": value or "Suspended"}
            )
        elif key == "encryption":
            algorithm = (
                {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": value}
                if bucket["kms_key_id"]
                else {"SSEAlgorithm": value}
            )
            rule = {"ApplyServerSideEncryptionByDefault": algorithm, "BucketKeyEnabled": bool(bucket["kms_key_id"])}
            self.api.write(
                "put_bucket_encryption", resource, Bucket=name, ServerSideEncryptionConfiguration={"Rules": [rule]}
            )
        elif key == "public_access_block":
            self.api.write("put_public_access_block", resource, Bucket=name, PublicAccessBlockConfiguration=value)
        elif key == "policy" and value:
            self.api.write("put_bucket_policy", resource, Bucket=name, Policy=json.dumps(value))
        elif key == "policy":
            self.api.write("delete_bucket_policy", resource, Bucket=name)
        elif value:
            self.api.write(
                "put_bucket_lifecycle_configuration", resource, Bucket=name, LifecycleConfiguration={"Rules": value}
            )
        else:
            self.api.write("delete_bucket_lifecycle", resource, Bucket=name)

    def _absent(self, name: str) -> bool:
        resource = f"bucket {name}"
        if not self._exists(name):
            return True
        empty = self._page(name)[0] == []
        if not empty and not self.params["destroy_data"]:
            return False
        self.changes.delete(resource, {"data": not empty})
        while not empty and not self.changes.check_mode:
            items, _ = self._page(name)
            if not items:
                break
            answer = self.api.write("delete_objects", resource, Bucket=name, Delete={"Objects": items, "Quiet": True})
            if answer.get("Errors"):
                error = answer["Errors"][0]
                raise PlatformError(
                    f"{resource}: {error.get('Key')} cannot be deleted: {error.get('Code')}: {error.get('Message')}"
                )
        for upload in self._page(name)[1]:
            self.api.write("abort_multipart_upload", resource, Bucket=name, **upload)
        self.api.write("delete_bucket", resource, Bucket=name)
        return True

    def _page(self, name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Return up to 1000 versions (delete markers included) and the unfinished uploads."""
        resource = f"bucket {name}"
        answer = self.api.read("list_object_versions", resource, Bucket=name, MaxKeys=1000)
        items = [
            {"Key": item["Key"], "VersionId": item["VersionId"]}
            for item in [*answer.get("Versions", []), *answer.get("DeleteMarkers", [])]
        ]
        uploads = self.api.read("list_multipart_uploads", resource, Bucket=name).get("Uploads", [])
        return items, [{"Key": upload["Key"], "UploadId": upload["UploadId"]} for upload in uploads]


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    buckets = Buckets(module.params, module.region, Api(module.client("s3"), changes), changes)
    return buckets.present() if module.params["state"] == "present" else buckets.absent()


def main() -> None:
    """Run the module."""
    bucket = {
        "name": {"type": "str", "required": True},
        "versioning": {"type": "bool", "default": True},
        "kms_key_id": {"type": "str", "default": "", "no_log": False},
        "tls_only": {"type": "bool", "default": True},
        "policy_statements": {"type": "list", "elements": "dict", "default": []},
        "lifecycle": {"type": "list", "elements": "dict", "default": []},
    }
    module = AnsibleAWSModule(
        argument_spec={
            "cluster_name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "buckets": {"type": "list", "elements": "dict", "required": True, "options": bucket},
            "tags": {"type": "dict", "default": {}},
            "destroy_data": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run(module, reconcile)


if __name__ == "__main__":
    main()
