#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the IAM roles of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_iam_roles
short_description: Reconcile the IAM roles of one cluster as one set
description:
  - Keeps roles with their trust, managed and inline policies as described, in one call, and says property by property
    what differs.
  - Predicts inline policies of roles that do not exist yet, which the collection's modules cannot.
  - A role is this cluster's if its tag C(rayplane.io/cluster) says so. One without that tag is neither changed nor
    deleted, whatever its name.
  - IAM has no regions, clusters do. A role that bears another region's tag C(rayplane.io/region) is that of a cluster
    of the same name there, and nothing is done. One without that tag, made by an earlier version, gets it.
options:
  cluster_name:
    description: Owner of the roles; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  state:
    description: Whether the roles exist.
    type: str
    choices: [present, absent]
    default: present
  roles:
    description: The roles.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the role, at most 64 characters.
        type: str
        required: true
      state:
        description: Whether this role exists; roles of a feature that is off are listed as C(absent).
        type: str
        choices: [present, absent]
        default: present
      path:
        description: Path of the role. Fixed for life.
        type: str
        default: /
      description:
        description: What it is for.
        type: str
        default: ""
      trust:
        description: Trust policy. Required to create a role.
        type: dict
        default: {}
      managed_policies:
        description: ARNs of managed policies. Others are detached.
        type: list
        elements: str
        default: []
      kept_policies:
        description: ARNs of managed policies that stay where they are attached, for who still needs them.
        type: list
        elements: str
        default: []
      inline_policies:
        description: Inline policies by name. Others are deleted.
        type: dict
        default: {}
      boundary:
        description: ARN of a permissions boundary.
        type: str
        default: ""
  prune_path:
    description: >-
      Path below which roles that are not listed are deleted. Empty prunes nothing. Must not be C(/).
    type: str
    default: ""
  tags:
    description: Tags of every role.
    type: dict
    default: {}
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the role of the control plane
  rayplane.platform.aws_iam_roles:
    cluster_name: ray-llm-cluster
    roles:
      - name: ray-llm-cluster-control-plane
        trust:
          Version: "2012-10-17"
          Statement: [{Effect: Allow, Principal: {Service: eks.amazonaws.com}, Action: "sts:AssumeRole"}]
        managed_policies: [arn:aws:iam::aws:policy/AmazonEKSClusterPolicy]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
arns:
  description: ARN of each role by name; a description in angle brackets where check mode predicts a new one.
  returned: state is present
  type: dict
kept:
  description: Names of the roles that have one of their O(roles[].kept_policies).
  returned: state is present
  type: list
  elements: str
"""

import json
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    REGION_TAG,
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
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import canonical

ABSENT = ("NoSuchEntity",)


class Roles:
    """The IAM roles of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], region: str, api: Api, changes: Changes) -> None:
        self.params = params
        self.region = region
        self.api = api
        self.changes = changes
        self.owner: str = params["cluster_name"]
        given = {str(key): str(value) for key, value in params["tags"].items()}
        self.tags = given | {OWNER_TAG: self.owner, REGION_TAG: region}
        self.kept: list[str] = []

    def present(self) -> dict[str, Any]:
        """Bring the roles to their description and return their ARNs."""
        for role in self.params["roles"]:
            if len(role["name"]) > 64:
                raise PlatformError(
                    f"role {role['name']} has {len(role['name'])} characters, IAM allows 64: shorten"
                    " platform_cluster_name"
                )
        wanted = {role["name"]: role for role in self.params["roles"] if role["state"] == "present"}
        have = self._observe()
        for name, role in wanted.items():
            self._refuse_anothers(role, have.get(name))
        arns = {name: self._present(role, have.get(name)) for name, role in wanted.items()}
        self._delete({name: now for name, now in have.items() if name not in wanted})
        return {"arns": arns, "kept": self.kept}

    def absent(self) -> dict[str, Any]:
        """Delete the roles, with their policies first."""
        self._delete(self._observe())
        return {}

    def _observe(self) -> dict[str, dict[str, Any]]:
        """Return those of the roles that exist, the listed ones and those to prune, each with what hangs on it."""
        names = list(dict.fromkeys([*(role["name"] for role in self.params["roles"]), *self._below()]))
        found = zip(names, concurrently(self._read, names), strict=True)
        have = {name: role for name, role in found if role}
        self._refuse_another_region(have)
        return have

    def _below(self) -> list[str]:
        path = self.params["prune_path"]
        if not path:
            return []
        if path == "/":
            raise PlatformError("prune_path / is the whole account: name a path of this cluster's own")
        listed = self.api.pages("list_roles", "Roles", f"roles below {path}", PathPrefix=path)
        return [one["RoleName"] for one in listed]

    def _read(self, name: str) -> dict[str, Any] | None:
        resource = f"role {name}"
        answer = self.api.read("get_role", resource, absent=ABSENT, RoleName=name)
        if answer is None:
            return None
        attached = self.api.pages("list_attached_role_policies", "AttachedPolicies", resource, RoleName=name)
        inline = {
            policy: self.api.read("get_role_policy", resource, RoleName=name, PolicyName=policy)["PolicyDocument"]
            for policy in self.api.pages("list_role_policies", "PolicyNames", resource, RoleName=name)
        }
        return {**answer["Role"], "Attached": {policy["PolicyArn"] for policy in attached}, "Inline": inline}

    def _stranger(self, now: dict[str, Any]) -> str:
        """Return why a role is not this cluster's; empty where it is."""
        owner = tag_dict(now.get("Tags")).get(OWNER_TAG)
        if owner is None:
            return f"bears no tag {OWNER_TAG}={self.owner}"
        return "" if owner == self.owner else f"belongs to cluster {owner} by its tag {OWNER_TAG}"

    def _refuse_another_region(self, have: dict[str, dict[str, Any]]) -> None:
        for name, now in have.items():
            region = tag_dict(now.get("Tags")).get(REGION_TAG, self.region)
            if region != self.region and not self._stranger(now):
                raise PlatformError(
                    f"role {name} is that of the cluster {self.owner} in {region} by its tag {REGION_TAG}, and this run"
                    f" is for {self.region}: no role was touched. Set platform_region to {region}, or choose another"
                    " platform_cluster_name"
                )

    def _refuse_anothers(self, role: dict[str, Any], now: dict[str, Any] | None) -> None:
        if now is None:
            return
        stranger = self._stranger(now)
        if stranger:
            raise PlatformError(
                f"role {role['name']} is there already and {stranger}, so it is left as it is: choose another"
                " platform_cluster_name or, to have it managed here, aws iam tag-role --role-name"
                f" {role['name']} --tags Key={OWNER_TAG},Value={self.owner}"
            )
        if now.get("Path", role["path"]) != role["path"]:
            raise PlatformError(
                f"role {role['name']} has the path {now['Path']}, asked for is {role['path']}: IAM cannot move it;"
                " delete the role first"
            )

    def _delete(self, roles: dict[str, dict[str, Any]]) -> None:
        for name, now in roles.items():
            resource = f"role {name}"
            stranger = self._stranger(now)
            if stranger:
                self.changes.warnings.append(f"{resource} {stranger}, and is left alone")
                continue
            self.changes.delete(resource, {"arn": now["Arn"]})
            for arn in sorted(now["Attached"]):
                self.api.write("detach_role_policy", resource, RoleName=name, PolicyArn=arn)
            for policy in now["Inline"]:
                self.api.write("delete_role_policy", resource, RoleName=name, PolicyName=policy)
            for profile in self._profiles(name):
                self.api.write(
                    "remove_role_from_instance_profile", resource, RoleName=name, InstanceProfileName=profile
                )
            self.api.write("delete_role", resource, RoleName=name)

    def _profiles(self, name: str) -> list[str]:
        answer = self.api.pages("list_instance_profiles_for_role", "InstanceProfiles", f"role {name}", RoleName=name)
        return [profile["InstanceProfileName"] for profile in answer]

    def _present(self, role: dict[str, Any], now: dict[str, Any] | None) -> str:
        name, resource = role["name"], f"role {role['name']}"
        if now is None:
            return self._create(role)
        trust = now.get("AssumeRolePolicyDocument")
        if self.changes.update(resource, {"trust": canonical(trust)}, {"trust": canonical(role["trust"])}):
            self.api.write(
                "update_assume_role_policy", resource, RoleName=name, PolicyDocument=json.dumps(role["trust"])
            )
        have = now.get("Description", "")
        if self.changes.update(resource, {"description": have}, {"description": role["description"]}):
            self.api.write("update_role", resource, RoleName=name, Description=role["description"])
        self._boundary(role, now)
        lacking = sync_tags(self.changes, resource, tag_dict(now.get("Tags")), self.tags)
        if lacking:
            self.api.write("tag_role", resource, RoleName=name, Tags=tag_list(lacking))
        self._managed(role, now["Attached"], record=True)
        self._inline(role, now["Inline"], record=True)
        return str(now["Arn"])

    def _create(self, role: dict[str, Any]) -> str:
        name, resource = role["name"], f"role {role['name']}"
        self.changes.create(
            resource,
            {
                "trust": role["trust"],
                "managed_policies": role["managed_policies"],
                "inline_policies": role["inline_policies"],
                "tags": self.tags,
            },
        )
        answer = self.api.write(
            "create_role",
            resource,
            RoleName=name,
            Path=role["path"],
            AssumeRolePolicyDocument=json.dumps(role["trust"]),
            Tags=tag_list(self.tags),
            **only_given({"Description": role["description"], "PermissionsBoundary": role["boundary"]}),
        )
        # Its policies are part of what was just recorded as created.
        self._managed(role, set(), record=False)
        self._inline(role, {}, record=False)
        return str(answer["Role"]["Arn"]) if answer else f"<new {resource}>"

    def _boundary(self, role: dict[str, Any], now: dict[str, Any]) -> None:
        name, resource = role["name"], f"role {role['name']}"
        have = now.get("PermissionsBoundary", {}).get("PermissionsBoundaryArn")
        want = role["boundary"] or None
        if self.changes.update(resource, {"boundary": have}, {"boundary": want}):
            if want:
                self.api.write("put_role_permissions_boundary", resource, RoleName=name, PermissionsBoundary=want)
            else:
                self.api.write("delete_role_permissions_boundary", resource, RoleName=name)

    def _managed(self, role: dict[str, Any], have: set[str], record: bool) -> None:
        name, resource = role["name"], f"role {role['name']}"
        want = set(role["managed_policies"])
        for arn in sorted(want - have):
            if record:
                self.changes.update(resource, {f"policy {arn}": None}, {f"policy {arn}": "attached"})
            self.api.write("attach_role_policy", resource, RoleName=name, PolicyArn=arn)
        for arn in sorted(have - want):
            if arn in role["kept_policies"]:
                self.kept.append(name)
                continue
            self.changes.update(resource, {f"policy {arn}": "attached"}, {f"policy {arn}": "detached"})
            self.api.write("detach_role_policy", resource, RoleName=name, PolicyArn=arn)

    def _inline(self, role: dict[str, Any], have: dict[str, Any], record: bool) -> None:
        name, resource = role["name"], f"role {role['name']}"
        for policy, document in role["inline_policies"].items():
            held = canonical(have[policy]) if policy in have else None
            if held == canonical(document):
                continue
            if record:
                self.changes.update(resource, {f"policy {policy}": held}, {f"policy {policy}": canonical(document)})
            self.api.write(
                "put_role_policy", resource, RoleName=name, PolicyName=policy, PolicyDocument=json.dumps(document)
            )
        for policy in sorted(set(have) - set(role["inline_policies"])):
            self.changes.update(resource, {f"policy {policy}": "present"}, {f"policy {policy}": "deleted"})
            self.api.write("delete_role_policy", resource, RoleName=name, PolicyName=policy)


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    roles = Roles(module.params, module.region, Api(module.client("iam"), changes), changes)
    return roles.present() if module.params["state"] == "present" else roles.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
