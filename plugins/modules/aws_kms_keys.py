#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the KMS keys of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_kms_keys
short_description: Reconcile the KMS keys of one cluster as one set
description:
  - Keeps symmetric customer managed keys with alias, description, policy, rotation and tags as described, in one call.
  - A key is known by its alias and by its tags, so one whose alias was deleted or points elsewhere is found again, and
    one that waits for its deletion is restored instead of being made anew.
  - A key that does not bear our tag is neither changed nor deleted, also where it has our alias.
  - With O(state=absent) keys are scheduled for deletion, except those that still encrypt one of O(keep_for_buckets) or
    any file system (EFS), volume or snapshot (EBS) or log group (CloudWatch) of the account in this region.
options:
  cluster_name:
    description: Owner of the keys; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  state:
    description: Whether the keys exist.
    type: str
    choices: [present, absent]
    default: present
  keys:
    description: The keys.
    type: list
    elements: dict
    required: true
    suboptions:
      alias:
        description: Name of the alias, without C(alias/).
        type: str
        required: true
      description:
        description: What the key is for.
        type: str
        default: ""
      rotation:
        description: Whether KMS makes new key material regularly; data stays readable.
        type: bool
        default: true
      rotation_days:
        description: Days between rotations, 90 to 2560.
        type: int
        default: 365
      users:
        description: >-
          Whom the key's policy lets use it, beside those of the account to whom IAM gives it. V(logs) is CloudWatch
          Logs, V(autoscaling) the service-linked role that starts nodes with encrypted disks, V(ebs) the
          roles of O(keys[].volume_roles), through EBS, V(log_delivery) services that write logs into
          buckets, V(events) EventBridge, for queues.
        type: list
        elements: str
        choices: [logs, autoscaling, ebs, log_delivery, events]
        default: [logs, autoscaling, ebs]
      volume_roles:
        description: >-
          Names of the account's roles that V(ebs) lets use the key through EBS, with the path of each; C(*) stands for
          any text. Empty lets everybody of the account who works with volumes.
        type: list
        elements: str
        default: []
      policy_statements:
        description: Further statements of the key's policy.
        type: list
        elements: dict
        default: []
  tags:
    description: Tags of every key.
    type: dict
    default: {}
  pending_days:
    description: With O(state=absent), days during which a deletion can be taken back, 7 to 30.
    type: int
    default: 30
  keep_for_buckets:
    description: With O(state=absent), buckets whose existence keeps the key that encrypts them.
    type: list
    elements: str
    default: []
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the cluster's key
  rayplane.platform.aws_kms_keys:
    cluster_name: ray-llm-cluster
    keys:
      - {alias: ray-llm-cluster, description: Encrypts what ray-llm-cluster stores}
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
arns:
  description: ARN of each key by its alias; in angle brackets for one that check mode would make.
  returned: state is present
  type: dict
kept:
  description: Aliases of the keys that still encrypt something.
  returned: state is absent
  type: list
  elements: str
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    ROLE_TAG,
    Api,
    Changes,
    PlatformError,
    run,
    sync_tags,
    wait_until,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import concurrently
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import VERSION, by_statement, partition_of

GONE = "absent"
UNKNOWN = ("NotFoundException",)
DOOMED = ("PendingDeletion", "PendingReplicaDeletion")
# What is said of a key without an owner.
UNTAGGED = f"bears no tag {OWNER_TAG} that these credentials can read"
#: What a service does with a key that it encrypts and decrypts with.
USE = ["kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:DescribeKey"]
# So many of the things that a key encrypts are named.
NAMED_USES = 10
#: KMS's bounds (API reference: EnableKeyRotation, ScheduleKeyDeletion).
ROTATION_DAYS = (90, 2560)
PENDING_DAYS = (7, 30)
# Longest time that KMS does not know a role made a moment ago, in seconds.
ROLE_PATIENCE = 60

Json = dict[str, Any]


class Listing(NamedTuple):
    """A call that lists what may be encrypted with a key, and where its answer says what is."""

    kind: str
    service: str
    operation: str
    items: str
    name: str
    #: Where an item has the ARN of its key.
    key: str = "KmsKeyId"
    arguments: Mapping[str, Any] = MappingProxyType({})


_ENCRYPTED = {"Name": "encrypted", "Values": ["true"]}
_THERE = {"Name": "status", "Values": ["creating", "available", "in-use", "error"]}
#: Sources: API references of EFS (FileSystemDescription), EC2 (Volume, Snapshot) and CloudWatch Logs (LogGroup).
LISTINGS = (
    Listing("file system", "efs", "describe_file_systems", "FileSystems", "FileSystemId"),
    Listing("volume", "ec2", "describe_volumes", "Volumes", "VolumeId", arguments={"Filters": [_ENCRYPTED, _THERE]}),
    Listing(
        "snapshot",
        "ec2",
        "describe_snapshots",
        "Snapshots",
        "SnapshotId",
        arguments={"OwnerIds": ["self"], "Filters": [_ENCRYPTED]},
    ),
    Listing("log group", "logs", "describe_log_groups", "logGroups", "logGroupName", key="kmsKeyId"),
)


class Keys:
    """The keys of one cluster: what is there, what is wanted, and the calls between the two.

    ``apis`` has the services kms, iam, s3, efs, ec2, logs and sts, each made where it is needed.
    """

    def __init__(self, params: Json, region: str, apis: Callable[[str], Api], changes: Changes) -> None:
        self.params = params
        self.region = region
        self.partition = partition_of(region)
        self.apis = apis
        self.api = apis("kms")
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.owner}
        self._owned: list[tuple[str, dict[str, str]]] | None = None
        self._fresh_role = False

    def present(self) -> Json:
        """Bring the keys to their description and return their ARNs."""
        for key in self.params["keys"]:
            least, most = ROTATION_DAYS
            if not least <= key["rotation_days"] <= most:
                raise PlatformError(
                    f"rotation_days of KMS key {key['alias']} is {key['rotation_days']}: KMS rotates keys every {least}"
                    f" to {most} days"
                )
        found = {key["alias"]: self._find(key["alias"]) for key in self.params["keys"]}
        for alias, (_, target, stranger) in found.items():
            if stranger:
                tag = f"TagKey={OWNER_TAG},TagValue={self.owner}"
                adopt = f" or, to have the key managed here, aws kms tag-resource --key-id {target} --tags {tag}"
                raise PlatformError(
                    f"alias/{alias} is that of key {target}, which {stranger}, so both are left as they are: choose"
                    f" another alias (encryption_alias){adopt if stranger == UNTAGGED else ''}"
                )
        return {"arns": {key["alias"]: self._present(key, *found[key["alias"]][:2]) for key in self.params["keys"]}}

    def absent(self) -> Json:
        """Schedule the deletion of keys that encrypt nothing any more; return the aliases of the others."""
        least, most = PENDING_DAYS
        if not least <= self.params["pending_days"] <= most:
            raise PlatformError(
                f"pending_days is {self.params['pending_days']}: KMS deletes keys after {least} to {most} days"
            )
        kept = [key["alias"] for key in self.params["keys"] if not self._absent(key["alias"])]
        return {"kept": kept}

    def _find(self, alias: str) -> tuple[Json | None, str, str]:
        """Return our key's metadata with its tags, or None; the id that the alias points to; and whose that key is.

        The alias tells first, if the key it points to carries our tags; otherwise the tags of all keys do. The last is
        empty where a key of ours was found or the alias points to none.
        """
        resource = f"KMS key {alias}"
        answer = self.api.read("describe_key", resource, absent=UNKNOWN, KeyId=f"alias/{alias}")
        pointed = answer["KeyMetadata"] if answer else None
        target = str(pointed["KeyId"]) if pointed else ""
        if pointed:
            pointed["tags"] = self._tags(target)
            if pointed["tags"].get(OWNER_TAG) == self.owner and pointed["tags"].get(ROLE_TAG, alias) == alias:
                return pointed, target, ""
        candidates = []
        for key_id, tags in self._ours():
            if tags.get(ROLE_TAG) == alias:
                answer = self.api.read("describe_key", resource, absent=UNKNOWN, KeyId=key_id)
                if answer:
                    candidates.append({**answer["KeyMetadata"], "tags": tags})
        if candidates:
            # One that works before one that waits for its deletion, and of those the youngest.
            candidates.sort(key=lambda one: (one["KeyState"] in DOOMED, -_moment(one["CreationDate"])))
            return candidates[0], target, ""
        return None, target, self._stranger(pointed) if pointed else ""

    def _stranger(self, key: Json) -> str:
        """Return why a key is not the one that is looked for."""
        if key.get("KeyManager") == "AWS":
            return "belongs to AWS"
        owner, role = key["tags"].get(OWNER_TAG), key["tags"].get(ROLE_TAG)
        if owner is None:
            return UNTAGGED
        return f"belongs to cluster {owner}" + (f" as its key {role}" if owner == self.owner else "")

    def _tags(self, key_id: str) -> dict[str, str]:
        found = self.api.read(
            "list_resource_tags",
            f"KMS key {key_id}",
            absent=(*UNKNOWN, "AccessDeniedException"),
            KeyId=key_id,
            Limit=50,
        )
        return {tag["TagKey"]: tag["TagValue"] for tag in (found or {}).get("Tags", [])}

    def _ours(self) -> list[tuple[str, dict[str, str]]]:
        """Return id and tags of all keys that carry our owner's tag, those that wait for their deletion included."""
        if self._owned is None:
            ids = [one["KeyId"] for one in self.api.pages("list_keys", "Keys", "the region's KMS keys")]
            pairs = zip(ids, concurrently(self._tags, ids), strict=True)
            self._owned = [(key_id, one) for key_id, one in pairs if one.get(OWNER_TAG) == self.owner]
        return self._owned

    def _present(self, key: Json, found: Json | None, target: str) -> str:
        alias = key["alias"]
        resource = f"KMS key {alias}"
        tags = {**self.tags, ROLE_TAG: alias}
        if found is None:
            return self._create(key, tags)
        key_id = found["KeyId"]
        state = found["KeyState"]
        if self.changes.update(resource, {"state": state}, {"state": "Enabled"}):
            if state in DOOMED:
                self.api.write("cancel_key_deletion", resource, KeyId=key_id)
            self.api.write("enable_key", resource, KeyId=key_id)
        account = found["Arn"].split(":")[4]
        self._repair_policy(key, key_id, account)
        wanted = {"description": key["description"]}
        if self.changes.update(resource, {"description": found.get("Description", "")}, wanted):
            self.api.write("update_key_description", resource, KeyId=key_id, Description=key["description"])
        self._repair_rotation(key, key_id)
        lacking = sync_tags(self.changes, resource, found["tags"], tags)
        if lacking:
            self.api.write("tag_resource", resource, KeyId=key_id, Tags=_tag_list(lacking))
        if self.changes.update(resource, {"alias points to": target or GONE}, {"alias points to": key_id}):
            operation = "update_alias" if target else "create_alias"
            self.api.write(operation, resource, AliasName=f"alias/{alias}", TargetKeyId=key_id)
        return str(found["Arn"])

    def _create(self, key: Json, tags: dict[str, str]) -> str:
        alias = key["alias"]
        resource = f"KMS key {alias}"
        account = str(self.apis("sts").read("get_caller_identity", "these credentials")["Account"])
        policy = self._policy(key, account)
        self._ensure_users(key)
        self.changes.create(
            resource,
            {
                "description": key["description"],
                "policy": policy,
                "rotation": self._rotation(key),
                "tags": tags,
            },
        )
        answer = self._write_policy(
            "create_key", resource, policy, Description=key["description"], Tags=_tag_list(tags)
        )
        if answer is None:
            return f"<new KMS key alias/{alias}>"
        key_id = answer["KeyMetadata"]["KeyId"]
        self.api.write("create_alias", resource, AliasName=f"alias/{alias}", TargetKeyId=key_id)
        if key["rotation"]:
            self._write_rotation(key, key_id)
        return str(answer["KeyMetadata"]["Arn"])

    def _repair_policy(self, key: Json, key_id: str, account: str) -> None:
        resource = f"KMS key {key['alias']}"
        answer = self.api.read("get_key_policy", resource, KeyId=key_id, PolicyName="default")
        policy = self._policy(key, account)
        was = {f"policy {sid}": one for sid, one in by_statement(json.loads(answer["Policy"] or "{}")).items()}
        will = {f"policy {sid}": one for sid, one in by_statement(policy).items()}
        if self.changes.update(resource, was, {**{part: GONE for part in was if part not in will}, **will}):
            self._ensure_users(key)
            self._write_policy("put_key_policy", resource, policy, KeyId=key_id, PolicyName="default")

    def _write_policy(self, operation: str, resource: str, policy: Json, **arguments: Any) -> Any:
        """Write a policy, patiently where it names a role that was made a moment ago."""
        answers: list[Any] = []

        def probe() -> tuple[bool, str]:
            try:
                answers.append(self.api.write(operation, resource, Policy=json.dumps(policy), **arguments))
            except PlatformError as error:
                if not self._fresh_role or "MalformedPolicyDocument" not in str(error):
                    raise
                return False, str(error)
            return True, "written"

        wait_until(f"policy of {resource}", probe, ROLE_PATIENCE)
        return answers[0]

    def _rotation(self, key: Json) -> str:
        return f"every {key['rotation_days']} days" if key["rotation"] else "off"

    def _repair_rotation(self, key: Json, key_id: str) -> None:
        resource = f"KMS key {key['alias']}"
        answer = self.api.read("get_key_rotation_status", resource, KeyId=key_id)
        days = answer.get("RotationPeriodInDays", 365)
        was = f"every {days} days" if answer["KeyRotationEnabled"] else "off"
        if self.changes.update(resource, {"rotation": was}, {"rotation": self._rotation(key)}):
            self._write_rotation(key, key_id)

    def _write_rotation(self, key: Json, key_id: str) -> None:
        resource = f"KMS key {key['alias']}"
        if key["rotation"]:
            self.api.write("enable_key_rotation", resource, KeyId=key_id, RotationPeriodInDays=key["rotation_days"])
        else:
            self.api.write("disable_key_rotation", resource, KeyId=key_id)

    def _policy(self, key: Json, account: str) -> Json:
        """Return the key's policy: the account's administrators by IAM, and the services that need more than that.

        Sources: KMS developer guide, "Default key policy"; CloudWatch Logs user guide, "Encrypt log data"; EC2 Auto
        Scaling user guide, "Required key policy for use with encrypted volumes"; the policy of aws/ebs.
        """
        region, partition = self.region, self.partition
        root = f"arn:{partition}:iam::{account}:root"
        scaling = f"arn:{partition}:iam::{account}:role/aws-service-role/autoscaling.amazonaws.com"
        scaling += "/AWSServiceRoleForAutoScaling"
        # By condition and not as principals, which would have to exist before the key.
        volumes = [f"arn:{partition}:iam::{account}:role/{name}" for name in key["volume_roles"]]
        statements: dict[str, list[Json]] = {
            "logs": [
                {
                    "Sid": "CloudWatchLogs",
                    "Principal": {"Service": f"logs.{region}.amazonaws.com"},
                    "Action": USE,
                    "Condition": {
                        "ArnLike": {
                            "kms:EncryptionContext:aws:logs:arn": f"arn:{partition}:logs:{region}:{account}:log-group:*"
                        }
                    },
                }
            ],
            "autoscaling": [
                {"Sid": "AutoScaling", "Principal": {"AWS": scaling}, "Action": USE},
                {
                    "Sid": "AutoScalingDisks",
                    "Principal": {"AWS": scaling},
                    "Action": "kms:CreateGrant",
                    "Condition": {"Bool": {"kms:GrantIsForAWSResource": "true"}},
                },
            ],
            "ebs": [
                {
                    "Sid": "Volumes",
                    "Principal": {"AWS": "*"},
                    "Action": [*USE, "kms:CreateGrant"],
                    "Condition": {
                        "StringEquals": {
                            "kms:CallerAccount": account,
                            "kms:ViaService": f"ec2.{region}.amazonaws.com",
                        },
                        **({"ArnLike": {"aws:PrincipalArn": volumes}} if volumes else {}),
                    },
                }
            ],
            "log_delivery": [
                {
                    "Sid": "LogDelivery",
                    "Principal": {"Service": "delivery.logs.amazonaws.com"},
                    "Action": USE,
                    "Condition": {"StringEquals": {"aws:SourceAccount": account}},
                }
            ],
            "events": [
                {
                    "Sid": "Events",
                    "Principal": {"Service": "events.amazonaws.com"},
                    "Action": ["kms:Decrypt", "kms:GenerateDataKey"],
                    "Condition": {"StringEquals": {"aws:SourceAccount": account}},
                }
            ],
        }
        chosen = [{"Sid": "Administrators", "Principal": {"AWS": root}, "Action": "kms:*"}]
        chosen += [one for user in key["users"] for one in statements[user]]
        built = [{"Effect": "Allow", "Resource": "*", **one} for one in chosen]
        return {"Version": VERSION, "Statement": [*built, *key["policy_statements"]]}

    def _ensure_users(self, key: Json) -> None:
        """See to it that the roles a policy names exist: KMS refuses a policy that names one that does not.

        AWS makes the service-linked role with an account's first Auto Scaling group, which here comes after the key.
        """
        if "autoscaling" not in key["users"]:
            return
        name, service = "AWSServiceRoleForAutoScaling", "autoscaling.amazonaws.com"
        path = f"/aws-service-role/{service}/"
        if not self.apis("iam").pages("list_roles", "Roles", f"role {name}", PathPrefix=path):
            self._fresh_role = True
            self.changes.create(f"role {name}", {"service": service})
            # Clusters of one account may be deployed side by side: another may have made it since.
            taken = ("EntityAlreadyExists", "InvalidInput")
            self.apis("iam").write("create_service_linked_role", f"role {name}", done=taken, AWSServiceName=service)

    def _absent(self, alias: str) -> bool:
        resource = f"KMS key {alias}"
        found, target, stranger = self._find(alias)
        if stranger:
            self.changes.warnings.append(f"alias/{alias} is that of key {target}, which {stranger}, and is left alone")
        if found is not None and found["KeyState"] not in DOOMED:
            uses = self._uses(found["Arn"])
            if uses:
                more = f" and {len(uses) - NAMED_USES} more" if len(uses) > NAMED_USES else ""
                self.changes.warnings.append(
                    f"{resource} is kept, because it encrypts {', '.join(uses[:NAMED_USES])}{more}; it goes with a"
                    " destroy after them"
                )
                return False
        if found is not None and target == found["KeyId"]:
            self.changes.delete(f"alias {alias}")
            self.api.write("delete_alias", resource, AliasName=f"alias/{alias}")
        if found is not None and found["KeyState"] not in DOOMED:
            days = self.params["pending_days"]
            self.changes.delete(resource, {"key": found["KeyId"], "days to take it back": days})
            self.api.write("schedule_key_deletion", resource, KeyId=found["KeyId"], PendingWindowInDays=days)
        return True

    def _uses(self, arn: str) -> list[str]:
        """Return what the key still encrypts: of the given buckets, and whatever else the account has in the region."""
        uses = []
        for name in self.params["keep_for_buckets"]:
            answer = self.apis("s3").read(
                "get_bucket_encryption",
                f"bucket {name}",
                absent=("NoSuchBucket", "ServerSideEncryptionConfigurationNotFoundError", "AccessDenied"),
                Bucket=name,
            )
            if answer and arn in json.dumps(answer["ServerSideEncryptionConfiguration"]):
                uses.append(f"bucket {name}")
        for one in LISTINGS:
            found = self.apis(one.service).pages(one.operation, one.items, f"the region's {one.kind}s", **one.arguments)
            uses += [f"{one.kind} {item[one.name]}" for item in found if item.get(one.key) == arn]
        return uses


def _moment(date: Any) -> float:
    return float(date.timestamp()) if hasattr(date, "timestamp") else float(date)


def _tag_list(tags: dict[str, str]) -> list[dict[str, str]]:
    """KMS writes tags in its own way."""
    return [{"TagKey": key, "TagValue": tags[key]} for key in sorted(tags)]


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    apis = cache(lambda service: Api(module.client(service), changes))
    keys = Keys(module.params, module.region, apis, changes)
    return keys.present() if module.params["state"] == "present" else keys.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
