# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""A log group of CloudWatch Logs with retention, key and the owner's tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, Api, Changes, sync_tags

__all__ = ["LogGroup"]


class LogGroup:
    """One log group: what is there, and how it is brought to its description. ``logs`` makes the service's calls."""

    def __init__(self, logs: Callable[[], Api], changes: Changes, name: str, owner: str) -> None:
        self.logs, self.changes, self.name, self.owner = logs, changes, name, owner
        self.resource = f"log group {name}"

    def read(self) -> dict[str, Any] | None:
        """Return the log group with its tags; None where there is none."""
        logs = self.logs()
        found = logs.pages("describe_log_groups", "logGroups", self.name, logGroupNamePrefix=self.name)
        group: dict[str, Any] | None = next((one for one in found if one["logGroupName"] == self.name), None)
        if group is None:
            return None
        arn = group["arn"].removesuffix(":*")
        answer = logs.read("list_tags_for_resource", self.resource, resourceArn=arn)
        return {**group, "arn": arn, "tags": answer["tags"]}

    def keep(self, have: dict[str, Any] | None, days: int, key: str, tags: Mapping[str, Any]) -> None:
        """Make the log group, or change what differs: days that it keeps, the ARN of its KMS key (or none), tags."""
        logs, resource = self.logs(), self.resource
        wanted = {str(name): str(value) for name, value in tags.items()} | {OWNER_TAG: self.owner}
        if have is None:
            self.changes.create(resource, {"retention_days": days, "kms_key": key or None, "tags": wanted})
            encrypted: dict[str, Any] = {"kmsKeyId": key} if key else {}
            logs.write("create_log_group", resource, logGroupName=self.name, tags=wanted, **encrypted)
            logs.write("put_retention_policy", resource, logGroupName=self.name, retentionInDays=days)
            return
        if self.changes.update(resource, {"retention_days": have.get("retentionInDays")}, {"retention_days": days}):
            logs.write("put_retention_policy", resource, logGroupName=self.name, retentionInDays=days)
        if self.changes.update(resource, {"kms_key": have.get("kmsKeyId")}, {"kms_key": key or None}):
            if key:
                logs.write("associate_kms_key", resource, logGroupName=self.name, kmsKeyId=key)
            else:
                logs.write("disassociate_kms_key", resource, logGroupName=self.name)
        lacking = sync_tags(self.changes, resource, have["tags"], wanted)
        if lacking:
            logs.write("tag_resource", resource, resourceArn=have["arn"], tags=lacking)
