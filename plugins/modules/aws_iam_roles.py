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
extends_documentation_fragment:
  - amazon.aws.common.modules
  - amazon.aws.region.modules
  - amazon.aws.boto3
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the role of the control plane
  aws_iam_roles:
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
"""

import json
from typing import Any

from ansible.module_utils.rayplane_aws import (
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
from ansible.module_utils.rayplane_eks import concurrently
from ansible.module_utils.rayplane_policy import canonical
from ansible_collections.amazon.aws.plugins.module_utils.modules import AnsibleAWSModule

ABSENT = ("NoSuchEntity",)


class Roles:
    """The IAM roles of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], api: Api, changes: Changes) -> None:
        self.params = params
        self.api = api
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.owner}

    def present(self) -> dict[str, Any]:
        """Bring the roles to their description and return their ARNs."""
        for role in self.params["roles"]:
            if len(role["name"]) > 64:
                raise PlatformError(
                    f"role {role['name']} has {len(role['name'])} characters, IAM allows 64: shorten"
                    " platform_cluster_name"
                )
        wanted = [role for role in self.params["roles"] if role["state"] == "present"]
        dropped = [role["name"] for role in self.params["roles"] if role["state"] == "absent"]
        have = self._observe([role["name"] for role in self.params["roles"]])
        for role in wanted:
            self._refuse_anothers(role, have.get(role["name"]))
        arns = {role["name"]: self._present(role, have.get(role["name"])) for role in wanted}
        self._delete({name: have[name] for name in dropped if name in have})
        self._prune([role["name"] for role in wanted])
        return {"arns": arns}

    def absent(self) -> dict[str, Any]:
        """Delete the roles, with their policies first."""
        self._delete(self._observe([role["name"] for role in self.params["roles"]]))
        self._prune([])
        return {}

    def _observe(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Return the roles that exist, each with what hangs on it."""
        found = zip(names, concurrently(self._read, names), strict=True)
        return {name: role for name, role in found if role}

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

    def _refuse_anothers(self, role: dict[str, Any], now: dict[str, Any] | None) -> None:
        if now is None:
            return
        owner = tag_dict(now.get("Tags")).get(OWNER_TAG, self.owner)
        if owner != self.owner:
            raise PlatformError(
                f"role {role['name']} belongs to cluster {owner} by its tag {OWNER_TAG}: change platform_cluster_name"
            )
        if now.get("Path", role["path"]) != role["path"]:
            raise PlatformError(
                f"role {role['name']} has the path {now['Path']}, asked for is {role['path']}: IAM cannot move it;"
                " delete the role first"
            )

    def _delete(self, roles: dict[str, dict[str, Any]]) -> None:
        for name, now in roles.items():
            if tag_dict(now.get("Tags")).get(OWNER_TAG, self.owner) != self.owner:
                continue
            resource = f"role {name}"
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

    def _prune(self, kept: list[str]) -> None:
        path = self.params["prune_path"]
        if not path:
            return
        if path == "/":
            raise PlatformError("prune_path / is the whole account: name a path of this cluster's own")
        listed = self.api.pages("list_roles", "Roles", f"roles below {path}", PathPrefix=path)
        self._delete(self._observe([one["RoleName"] for one in listed if one["RoleName"] not in kept]))

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
    roles = Roles(module.params, Api(module.client("iam"), changes), changes)
    return roles.present() if module.params["state"] == "present" else roles.absent()


def main() -> None:
    """Run the module."""
    role = {
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "path": {"type": "str", "default": "/"},
        "description": {"type": "str", "default": ""},
        "trust": {"type": "dict", "default": {}},
        "managed_policies": {"type": "list", "elements": "str", "default": []},
        "inline_policies": {"type": "dict", "default": {}},
        "boundary": {"type": "str", "default": ""},
    }
    module = AnsibleAWSModule(
        argument_spec={
            "cluster_name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "roles": {"type": "list", "elements": "dict", "required": True, "options": role},
            "prune_path": {"type": "str", "default": ""},
            "tags": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    run(module, reconcile)


if __name__ == "__main__":
    main()
