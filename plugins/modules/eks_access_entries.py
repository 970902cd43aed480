#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: who may use an EKS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_access_entries
short_description: Reconcile the access entries of an EKS cluster as one set
description:
  - Grants IAM principals access to a cluster through EKS access entries and access policies, in one call.
  - Entries that this module did not make (EKS's own for node groups, the creator's) are left alone.
  - Entries of nodes (every type but C(STANDARD)) are made where they are missing and never changed or removed; they end
    with the cluster. EKS shares them with its node groups.
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  entries:
    description: The entries.
    type: list
    elements: dict
    default: []
    suboptions:
      principal_arn:
        description: IAM role or user.
        type: str
        required: true
      type:
        description: Kind of entry. Fixed for life.
        type: str
        default: STANDARD
      username:
        description: Kubernetes user name; empty takes EKS's.
        type: str
        default: ""
      groups:
        description: Kubernetes groups.
        type: list
        elements: str
        default: []
      policies:
        description: EKS access policies.
        type: list
        elements: dict
        default: []
        suboptions:
          policy:
            description: Name, such as C(AmazonEKSViewPolicy), or ARN of the policy.
            type: str
            required: true
          namespaces:
            description: Namespaces it holds in; empty means the whole cluster.
            type: list
            elements: str
            default: []
  tags:
    description: Tags of every entry.
    type: dict
    default: {}
  creator_is_admin:
    description: >-
      Whether EKS made an entry for who created the cluster. It is the first of all, and not among RV(foreign).
    type: bool
    default: true
  purge:
    description: Whether entries that this module made and that are no longer listed are removed.
    type: bool
    default: true
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Let the platform team administer and the auditors look
  rayplane.platform.eks_access_entries:
    cluster_name: ray-llm-cluster
    entries:
      - principal_arn: arn:aws:iam::123456789012:role/platform
        policies: [{policy: AmazonEKSClusterAdminPolicy}]
      - principal_arn: arn:aws:iam::123456789012:role/audit
        policies: [{policy: AmazonEKSViewPolicy, namespaces: [rayplane]}]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
foreign:
  description: Entries that others made, and their policies; they stay.
  returned: there are any
  type: list
  elements: dict
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import EksSet, concurrently, retag


class AccessEntries(EksSet):
    """The access entries of one cluster: what is there, what is wanted, and the calls between the two."""

    def reconcile(self) -> dict[str, Any]:
        """Bring the set to its description."""
        arns = [entry["principal_arn"] for entry in self.params["entries"]]
        doubled = sorted({arn for arn in arns if arns.count(arn) > 1})
        if doubled:
            raise PlatformError(f"access entry listed twice: {', '.join(doubled)}; a principal has one entry")
        have = self._observe()
        for entry in self.params["entries"]:
            self._refuse_another_type(entry, have.get(entry["principal_arn"]))
        for entry in self.params["entries"]:
            now = have.get(entry["principal_arn"])
            if now is not None and entry["type"] != "STANDARD":
                continue
            self._reconcile_entry(entry, now)
            if entry["type"] == "STANDARD":
                self._reconcile_policies(entry, now is not None)
        for arn, now in self.unwanted(have, arns).items():
            if now["type"] == "STANDARD":
                self._delete(arn, now)
        self._note_foreign(have, arns)
        return {}

    def _note_foreign(self, have: dict[str, dict[str, Any]], listed: list[str]) -> None:
        """Record entries that others made, with their policies; they stay.

        EKS itself makes those of nodes (of other types), of service-linked roles, and the creator's, which is the first
        of all: nobody else can make one before the cluster is active.
        """
        standard = {arn: now for arn, now in have.items() if now["type"] == "STANDARD"}
        dated = [arn for arn, now in standard.items() if "createdAt" in now]
        creators = min(dated, key=lambda arn: standard[arn]["createdAt"], default="")
        for arn, now in standard.items():
            creator = arn == creators and self.params["creator_is_admin"]
            if arn in listed or creator or self.owned(now) or ":role/aws-service-role/" in arn:
                continue
            resource = f"access entry {arn}"
            groups = {"kubernetesGroups": now["kubernetesGroups"]} if now.get("kubernetesGroups") else {}
            self.changes.foreign(resource, "", {"type": now["type"], **groups})
            for policy, scope in self._policies(arn).items():
                self.changes.foreign(resource, f"policy {policy}", scope)

    def _policies(self, arn: str) -> dict[str, dict[str, Any]]:
        answer = self.api.pages(
            "list_associated_access_policies",
            "associatedAccessPolicies",
            f"access entry {arn}",
            clusterName=self.cluster_name,
            principalArn=arn,
        )
        return {policy["policyArn"]: _scope(policy["accessScope"].get("namespaces", [])) for policy in answer}

    def _observe(self) -> dict[str, dict[str, Any]]:
        arns = self.list_all("list_access_entries", "accessEntries")

        def describe(arn: str) -> dict[str, Any] | None:
            found: dict[str, Any] | None = self.describe(
                "describe_access_entry", "accessEntry", f"access entry {arn}", principalArn=arn
            )
            return found

        return {arn: entry for arn, entry in zip(arns, concurrently(describe, arns), strict=True) if entry}

    def _refuse_another_type(self, entry: dict[str, Any], now: dict[str, Any] | None) -> None:
        if now is not None and now["type"] != entry["type"]:
            raise PlatformError(
                f"access entry {entry['principal_arn']} is of type {now['type']}, asked for is {entry['type']}: EKS"
                " cannot change it; remove the entry first"
            )

    def _reconcile_entry(self, entry: dict[str, Any], now: dict[str, Any] | None) -> None:
        arn = entry["principal_arn"]
        resource = f"access entry {arn}"
        wanted = only_given({"username": entry["username"]}) | {"kubernetesGroups": sorted(entry["groups"])}
        if now is None:
            self.changes.create(resource, {**wanted, "type": entry["type"], "tags": self.tags})
            self.api.write(
                "create_access_entry",
                resource,
                settle=90,
                clusterName=self.cluster_name,
                principalArn=arn,
                type=entry["type"],
                tags=self.tags,
                **only_given(wanted),
            )
            return
        have = {"username": now.get("username"), "kubernetesGroups": sorted(now.get("kubernetesGroups", []))}
        if self.changes.update(resource, have, wanted):
            self.api.write("update_access_entry", resource, clusterName=self.cluster_name, principalArn=arn, **wanted)
        retag(self.api, self.changes, resource, now["accessEntryArn"], have=now.get("tags", {}), want=self.tags)

    def _reconcile_policies(self, entry: dict[str, Any], exists: bool) -> None:
        arn = entry["principal_arn"]
        resource = f"access entry {arn}"
        have = self._policies(arn) if exists else {}
        wanted = {_policy_arn(policy["policy"], arn): _scope(policy["namespaces"]) for policy in entry["policies"]}
        for policy, scope in wanted.items():
            if self.changes.update(resource, {f"policy {policy}": have.get(policy)}, {f"policy {policy}": scope}):
                self.api.write(
                    "associate_access_policy",
                    resource,
                    clusterName=self.cluster_name,
                    principalArn=arn,
                    policyArn=policy,
                    accessScope=scope,
                )
        for policy in sorted(set(have) - set(wanted)):
            self.changes.update(resource, {f"policy {policy}": have[policy]}, {f"policy {policy}": None})
            self.api.write(
                "disassociate_access_policy",
                resource,
                clusterName=self.cluster_name,
                principalArn=arn,
                policyArn=policy,
            )

    def _delete(self, arn: str, entry: dict[str, Any]) -> None:
        resource = f"access entry {arn}"
        self.changes.delete(resource, {"type": entry["type"], "kubernetesGroups": entry.get("kubernetesGroups", [])})
        self.api.write("delete_access_entry", resource, clusterName=self.cluster_name, principalArn=arn)


def _scope(namespaces: list[str]) -> dict[str, Any]:
    return {"type": "namespace", "namespaces": sorted(namespaces)} if namespaces else {"type": "cluster"}


def _policy_arn(policy: str, principal_arn: str) -> str:
    if policy.startswith("arn:"):
        return policy
    partition = principal_arn.split(":")[1] if principal_arn.startswith("arn:") else "aws"
    return f"arn:{partition}:eks::aws:cluster-access-policy/{policy}"


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    return AccessEntries(module.params, Api(module.client("eks"), changes), changes).reconcile()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
