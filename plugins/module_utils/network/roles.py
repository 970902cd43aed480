# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""The IAM roles that parts of the network are run under, each for one AWS service with one policy."""

from __future__ import annotations

import json
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    PlatformError,
    sync_tags,
    tag_dict,
    tag_list,
)
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import Context, Item, new_id

__all__ = ["ServiceRole"]

_ABSENT = ("NoSuchEntity",)
# The name of a role's own policy.
_POLICY = "network"


class ServiceRole:
    """A role, and the instance profile around it where an instance bears it."""

    def __init__(self, context: Context, name: str, profile: bool = False) -> None:
        self.context = context
        self.name = name
        self.profile = profile
        self.resource = f"role {name}"
        self.found: Item | None = None
        self.api = context.service("iam")

    def read(self) -> Item | None:
        """Return the role with its policies and instance profiles; None where there is none."""
        answer = self.api.read("get_role", self.resource, absent=_ABSENT, RoleName=self.name)
        if not answer:
            return None
        found: Item = dict(answer["Role"])
        if self.profile:
            attached = self.api.pages(
                "list_attached_role_policies", "AttachedPolicies", self.resource, RoleName=self.name
            )
            found["managed"] = [one["PolicyArn"] for one in attached]
            profiles = self.api.pages(
                "list_instance_profiles_for_role", "InstanceProfiles", self.resource, RoleName=self.name
            )
            found["profiles"] = [one["InstanceProfileName"] for one in profiles]
        else:
            policy = self.api.read(
                "get_role_policy", self.resource, absent=_ABSENT, RoleName=self.name, PolicyName=_POLICY
            )
            found["policy"] = policy["PolicyDocument"] if policy else None
        return found

    def check(self) -> None:
        """Refuse a role that another cluster owns, and a name that IAM refuses."""
        if len(self.name) > 64:
            raise PlatformError(
                f"{self.resource} has {len(self.name)} characters, IAM allows 64: shorten platform_cluster_name"
            )
        owner = self.context.owner_of(self.found or {})
        if owner not in (None, self.context.owner):
            raise PlatformError(f"{self.resource} belongs to {owner}: give this cluster another name")

    def present(
        self, description: str, trust: dict[str, Any], policy: dict[str, Any] | None = None, managed: str = ""
    ) -> str:
        """Keep the role with the given trust and either a policy of its own or a managed one; return its ARN."""
        context = self.context
        tags = {str(key): str(value) for key, value in context.params["tags"].items()} | {OWNER_TAG: context.owner}
        found = self.found
        if found is None:
            context.changes.create(self.resource, {"trust": trust, "policy": policy or managed, "tags": tags})
            answer = self.api.write(
                "create_role",
                self.resource,
                RoleName=self.name,
                Description=description,
                AssumeRolePolicyDocument=json.dumps(trust),
                Tags=tag_list(tags),
            )
            found = {"Arn": answer["Role"]["Arn"] if answer else new_id(self.resource), "new": True}
            self._policies(found, policy, managed)
        else:
            have = found.get("AssumeRolePolicyDocument")
            if context.changes.update(self.resource, {"trust": have}, {"trust": trust}):
                self.api.write(
                    "update_assume_role_policy",
                    self.resource,
                    RoleName=self.name,
                    PolicyDocument=json.dumps(trust),
                )
            lacking = sync_tags(context.changes, self.resource, tag_dict(found.get("Tags")), tags)
            if lacking:
                self.api.write("tag_role", self.resource, RoleName=self.name, Tags=tag_list(lacking))
            self._policies(found, policy, managed)
        if self.profile:
            self._profile(found, tags)
        return str(found["Arn"])

    def _policies(self, found: Item, policy: dict[str, Any] | None, managed: str) -> None:
        changes = self.context.changes
        if policy is not None and found.get("policy") != policy:
            if "new" not in found:
                changes.update(self.resource, {f"policy {_POLICY}": found["policy"]}, {f"policy {_POLICY}": policy})
            self.api.write(
                "put_role_policy",
                self.resource,
                RoleName=self.name,
                PolicyName=_POLICY,
                PolicyDocument=json.dumps(policy),
            )
        attached = found.get("managed", [])
        if managed and managed not in attached:
            if "new" not in found:
                changes.update(self.resource, {f"policy {managed}": None}, {f"policy {managed}": "attached"})
            self.api.write("attach_role_policy", self.resource, RoleName=self.name, PolicyArn=managed)
        for other in attached:
            if other != managed:
                changes.update(self.resource, {f"policy {other}": "attached"}, {f"policy {other}": "detached"})
                self.api.write("detach_role_policy", self.resource, RoleName=self.name, PolicyArn=other)

    def _profile(self, found: Item, tags: dict[str, str]) -> None:
        if self.name in found.get("profiles", ()):
            return
        resource = f"instance profile {self.name}"
        exists = self.api.read("get_instance_profile", resource, absent=_ABSENT, InstanceProfileName=self.name)
        if not exists:
            self.context.changes.create(resource, {"role": self.name, "tags": tags})
            self.api.write("create_instance_profile", resource, InstanceProfileName=self.name, Tags=tag_list(tags))
        else:
            self.context.changes.update(resource, {"role": None}, {"role": self.name})
        self.api.write("add_role_to_instance_profile", resource, InstanceProfileName=self.name, RoleName=self.name)

    def remove(self) -> None:
        """Delete the role with its policies and its instance profile, if it is ours."""
        context = self.context
        if self.profile:
            self._remove_profile()
        if self.found is None or not context.ours(self.found):
            return
        context.changes.delete(self.resource, {"arn": self.found["Arn"]})
        for arn in self.found.get("managed", ()):
            context.discard(self.api, "detach_role_policy", self.resource, RoleName=self.name, PolicyArn=arn)
        if self.found.get("policy"):
            context.discard(self.api, "delete_role_policy", self.resource, RoleName=self.name, PolicyName=_POLICY)
        context.discard(self.api, "delete_role", self.resource, RoleName=self.name)

    def _remove_profile(self) -> None:
        context = self.context
        resource = f"instance profile {self.name}"
        answer = self.api.read("get_instance_profile", resource, absent=_ABSENT, InstanceProfileName=self.name)
        if not answer or not context.ours(answer["InstanceProfile"]):
            return
        context.changes.delete(resource, {"arn": answer["InstanceProfile"]["Arn"]})
        for role in answer["InstanceProfile"].get("Roles", ()):
            context.discard(
                self.api,
                "remove_role_from_instance_profile",
                resource,
                InstanceProfileName=self.name,
                RoleName=role["RoleName"],
            )
        context.discard(self.api, "delete_instance_profile", resource, InstanceProfileName=self.name)
