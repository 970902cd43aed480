#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: which pods of an EKS cluster have which IAM role."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_pod_identities
short_description: Reconcile the pod identity associations of an EKS cluster as one set
description:
  - Gives Kubernetes service accounts their IAM roles through EKS Pod Identity, in one call.
  - Associations that this module did not make (an add-on's own) are left alone.
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  associations:
    description: The associations.
    type: list
    elements: dict
    default: []
    suboptions:
      namespace:
        description: Namespace of the service account.
        type: str
        required: true
      service_account:
        description: Name of the service account.
        type: str
        required: true
      role_arn:
        description: IAM role that its pods get, as ARN or by a name in O(role_arns).
        type: str
        required: true
  role_arns:
    description: ARNs of roles by name, for roles given by name.
    type: dict
    default: {}
  tags:
    description: Tags of every association.
    type: dict
    default: {}
  purge:
    description: Whether associations that this module made and that are no longer listed are removed.
    type: bool
    default: true
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Let the Ray pods read the models
  rayplane.platform.eks_pod_identities:
    cluster_name: ray-llm-cluster
    associations:
      - namespace: rayplane
        service_account: ray
        role_arn: arn:aws:iam::123456789012:role/ray-llm-cluster-models-reader
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
"""

from collections.abc import Collection
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError, run
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import EksSet, concurrently, resolve_role, retag

Account = tuple[str, str]


class PodIdentities(EksSet):
    """The pod identity associations of one cluster: what is there, what is wanted, and the calls between the two."""

    def reconcile(self) -> dict[str, Any]:
        """Bring the set to its description."""
        wanted: dict[Account, str] = {}
        for association in self.params["associations"]:
            account = (association["namespace"], association["service_account"])
            if account in wanted:
                raise PlatformError(f"{_name(account)} is listed twice: a service account has one role")
            wanted[account] = resolve_role(association["role_arn"], self.params["role_arns"])
        have = self._observe(wanted)
        for account, role_arn in wanted.items():
            self._reconcile_one(account, role_arn, have.get(account))
        for account, now in self.unwanted(have, wanted).items():
            self.changes.delete(_name(account), {"role_arn": now["roleArn"]})
            self._write("delete_pod_identity_association", account, associationId=now["associationId"])
        return {}

    def _observe(self, wanted: Collection[Account]) -> dict[Account, dict[str, Any]]:
        # Those of add-ons are the add-ons' own, unless they are asked for here.
        summaries = [
            one
            for one in self.list_all("list_pod_identity_associations", "associations")
            if not one.get("ownerArn") or (one["namespace"], one["serviceAccount"]) in wanted
        ]

        def describe(summary: dict[str, Any]) -> dict[str, Any] | None:
            found: dict[str, Any] | None = self.describe(
                "describe_pod_identity_association",
                "association",
                _name((summary["namespace"], summary["serviceAccount"])),
                associationId=summary["associationId"],
            )
            return found

        found = [association for association in concurrently(describe, summaries) if association]
        return {(one["namespace"], one["serviceAccount"]): one for one in found}

    def _reconcile_one(self, account: Account, role_arn: str, now: dict[str, Any] | None) -> None:
        resource = _name(account)
        if now is None:
            self.changes.create(resource, {"role_arn": role_arn, "tags": self.tags})
            namespace, service_account = account
            self._write(
                "create_pod_identity_association",
                account,
                namespace=namespace,
                serviceAccount=service_account,
                roleArn=role_arn,
                tags=self.tags,
            )
            return
        if self.changes.update(resource, {"role_arn": now["roleArn"]}, {"role_arn": role_arn}):
            self._write(
                "update_pod_identity_association", account, associationId=now["associationId"], roleArn=role_arn
            )
        retag(self.api, self.changes, resource, now["associationArn"], have=now.get("tags", {}), want=self.tags)

    def _write(self, operation: str, account: Account, **arguments: Any) -> None:
        # A role made a moment ago is not known to EKS at once.
        self.api.write(operation, _name(account), settle=90, clusterName=self.cluster_name, **arguments)


def _name(account: Account) -> str:
    return f"pod identity {account[0]}/{account[1]}"


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    return PodIdentities(module.params, Api(module.client("eks"), changes), changes).reconcile()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
