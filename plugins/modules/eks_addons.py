#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: all add-ons of an EKS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_addons
short_description: Reconcile the add-ons of an EKS cluster as one set
description:
  - Installs, changes, upgrades and removes EKS add-ons in one call.
  - An add-on without a version gets what EKS offers as default, stays on it, and moves to the new default when the
    cluster's Kubernetes
    version changes. The tag C(rayplane.io/kubernetes-version) remembers for which version it was chosen.
  - While no node group has nodes nothing is waited for, because some add-ons become active only on nodes; RV(pending)
    names those to wait for afterwards, with O(wait_for).
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  addons:
    description: The add-ons.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the add-on.
        type: str
        required: true
      version:
        description: Version to pin; empty takes EKS's default for the cluster's Kubernetes version.
        type: str
        default: ""
      configuration:
        description: Settings of the add-on, as its own schema has them.
        type: dict
        default: {}
      role_arn:
        description: IAM role of the add-on's service account, where it does not use pod identity.
        type: str
        default: ""
      pod_identities:
        description: Pod identity associations of the add-on.
        type: list
        elements: dict
        default: []
        suboptions:
          service_account:
            description: Service account of the add-on.
            type: str
            required: true
          role_arn:
            description: IAM role of the service account, as ARN or by a name in O(role_arns).
            type: str
            required: true
      resolve_conflicts:
        description: What EKS does with settings changed inside the cluster.
        type: str
        choices: [NONE, OVERWRITE, PRESERVE]
        default: OVERWRITE
  role_arns:
    description: ARNs of roles by name, for roles given by name.
    type: dict
    default: {}
  tags:
    description: Tags of every add-on.
    type: dict
    default: {}
  kubernetes_version:
    description: >-
      Version that the cluster has once its own task is done; lets check mode predict what follows an upgrade. Empty
      asks EKS.
    type: str
    default: ""
  wait_for:
    description: >-
      Where this names add-ons, the call only waits until they are active, and fails where one cannot be. Nothing is
      changed. On a cluster whose node groups are all empty only those that failed are told.
    type: list
    elements: str
    default: []
  purge:
    description: Whether add-ons that this module made and that are no longer listed are removed.
    type: bool
    default: true
  wait_timeout:
    description: Longest wait for one add-on, in seconds.
    type: int
    default: 1200
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the add-ons
  rayplane.platform.eks_addons:
    cluster_name: ray-llm-cluster
    addons:
      - {name: vpc-cni}
      - {name: coredns, configuration: {replicaCount: 3}}
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
addons:
  description: Version and status of each add-on by name.
  returned: always
  type: dict
pending:
  description: Add-ons that are not active yet and were not waited for, because there are no nodes.
  returned: always
  type: list
  elements: str
"""

import json
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import (
    EksSet,
    concurrently,
    find_cluster,
    health,
    refuse_ended,
    resolve_role,
    retag,
    wait_for,
    wait_for_update,
)

VERSION_TAG = "rayplane.io/kubernetes-version"


class Addons(EksSet):
    """The add-ons of one cluster: what is there, what is wanted, and the calls between the two."""

    kubernetes = ""

    def reconcile(self) -> dict[str, Any]:
        """Bring the set to its description and return the add-ons' versions and status."""
        if self.params["wait_for"]:
            return self._wait()
        self._refuse_nonsense()
        have = self._observe()
        self.kubernetes = self.params["kubernetes_version"]
        if not self.kubernetes:
            self.kubernetes = (find_cluster(self.api, self.cluster_name) or {}).get("version", "")
        touched = []
        for addon in self.params["addons"]:
            now = have.get(addon["name"])
            if now is not None and now["status"] in ("CREATE_FAILED", "DELETE_FAILED", "DELETING"):
                self._delete({addon["name"]: now})
                now = None
            changed = self._create(addon) if now is None else self._update(addon, now)
            if changed:
                touched.append(addon["name"])
        self._delete(self.unwanted(have, [addon["name"] for addon in self.params["addons"]]))
        # Also what an earlier run left on its way: it may have been cut short before there were nodes.
        unsettled = [
            addon["name"]
            for addon in self.params["addons"]
            if addon["name"] in touched or have.get(addon["name"], {}).get("status") != "ACTIVE"
        ]
        pending: list[str] = []
        if unsettled and not self.changes.check_mode:
            if self._has_nodes():
                self._wait_for(touched)
            else:
                pending = unsettled
        if touched and not self.changes.check_mode:
            have = self._observe()
        return self._facts(have, pending)

    def _facts(self, have: dict[str, dict[str, Any]], pending: list[str]) -> dict[str, Any]:
        addons = {name: {"version": one.get("addonVersion"), "status": one["status"]} for name, one in have.items()}
        return {"addons": addons, "pending": pending}

    def _wait(self) -> dict[str, Any]:
        """Wait for add-ons that were made before there was a node."""
        if self.changes.check_mode:
            return self._facts({}, [])
        names: list[str] = self.params["wait_for"]
        if self._has_nodes():
            self._wait_for(names)
        have = {name: addon for name in names if (addon := self._describe(name))}
        refuse_ended("add-on", self.cluster_name, have)
        return self._facts(have, [name for name in names if have.get(name, {}).get("status") != "ACTIVE"])

    def _refuse_nonsense(self) -> None:
        names = [addon["name"] for addon in self.params["addons"]]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise PlatformError(f"add-on named twice: {', '.join(doubled)}; list each once in eks_addons")
        for addon in self.params["addons"]:
            # Before anything is changed: a role that nobody knows.
            self._identities(addon)

    def _observe(self) -> dict[str, dict[str, Any]]:
        names = self.list_all("list_addons", "addons")
        found = zip(names, concurrently(self._describe, names), strict=True)
        return {name: addon for name, addon in found if addon}

    def _describe(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.describe("describe_addon", "addon", f"add-on {name}", addonName=name)
        return found

    def _has_nodes(self) -> bool:
        """Whether a node group is to have nodes: one of size zero makes no add-on active."""

        def describe(name: str) -> dict[str, Any] | None:
            found: dict[str, Any] | None = self.describe(
                "describe_nodegroup", "nodegroup", f"node group {name}", nodegroupName=name
            )
            return found

        groups = concurrently(describe, self.list_all("list_nodegroups", "nodegroups"))
        return any(
            group["status"] != "CREATE_FAILED" and group["scalingConfig"]["desiredSize"] > 0
            for group in groups
            if group
        )

    def _tags(self) -> dict[str, str]:
        return {**self.tags, VERSION_TAG: self.kubernetes}

    def _create(self, addon: dict[str, Any]) -> bool:
        resource = f"add-on {addon['name']}"
        wanted = only_given(
            {
                "addonVersion": addon["version"],
                "configurationValues": _configuration(addon),
                "serviceAccountRoleArn": addon["role_arn"],
                "podIdentityAssociations": self._identities(addon),
                "resolveConflicts": "OVERWRITE"
                if addon["resolve_conflicts"] == "PRESERVE"
                else addon["resolve_conflicts"],
                "tags": self._tags(),
            }
        )
        self.changes.create(resource, wanted)
        self.api.write(
            "create_addon", resource, settle=90, clusterName=self.cluster_name, addonName=addon["name"], **wanted
        )
        return True

    def _update(self, addon: dict[str, Any], now: dict[str, Any]) -> bool:
        name = addon["name"]
        resource = f"add-on {name}"
        if now["status"] in ("CREATING", "UPDATING") and not self.changes.check_mode and self._has_nodes():
            self._wait_for([name])
        config: dict[str, Any] = {}
        version = self._version(addon, now)
        if self.changes.update(resource, {"version": now.get("addonVersion")}, {"version": version}):
            config["addonVersion"] = version
        have = _held_configuration(now)
        if self.changes.update(resource, {"configuration": have}, {"configuration": addon["configuration"]}):
            config["configurationValues"] = _configuration(addon) or "{}"
        role = addon["role_arn"]
        if role and self.changes.update(resource, {"role_arn": now.get("serviceAccountRoleArn")}, {"role_arn": role}):
            config["serviceAccountRoleArn"] = role
        held, wanted = self._held_identities(now), self._identities(addon)
        roles = {one["serviceAccount"]: one["roleArn"] for one in wanted}
        accounts = [*roles, *(account for account in held if account not in roles)]
        if self.changes.update(
            resource,
            {f"pod identity {account}": held.get(account) for account in accounts},
            {f"pod identity {account}": roles.get(account, "absent") for account in accounts},
        ):
            # EKS takes the whole set: what it does not name goes.
            config["podIdentityAssociations"] = wanted
        if config:
            update = self.api.write(
                "update_addon",
                resource,
                busy=self.params["wait_timeout"],
                clusterName=self.cluster_name,
                addonName=name,
                resolveConflicts=addon["resolve_conflicts"],
                **config,
            )
            if update and update["update"]["status"] != "Successful":
                wait_for_update(
                    self.api, resource, update, self.params["wait_timeout"], name=self.cluster_name, addonName=name
                )
        retag(self.api, self.changes, resource, now["addonArn"], have=now.get("tags", {}), want=self._tags())
        if now["status"] in ("DEGRADED", "UPDATE_FAILED") and not config:
            self.changes.warnings.append(f"{resource} is {now['status'].lower()}: {health(now) or 'no reason given'}")
        return bool(config)

    def _version(self, addon: dict[str, Any], now: dict[str, Any]) -> str:
        if addon["version"]:
            return str(addon["version"])
        chosen_for = now.get("tags", {}).get(VERSION_TAG, self.kubernetes)
        if chosen_for == self.kubernetes:
            return str(now.get("addonVersion"))
        # The cluster was upgraded since: move to what EKS offers for the new version.
        resource = f"add-on {addon['name']}"
        offered = self.api.pages(
            "describe_addon_versions", "addons", resource, addonName=addon["name"], kubernetesVersion=self.kubernetes
        )
        for version in offered[0]["addonVersions"] if offered else []:
            if any(one.get("defaultVersion") for one in version.get("compatibilities", ())):
                return str(version["addonVersion"])
        raise PlatformError(
            f"{resource}: EKS offers no default version for Kubernetes {self.kubernetes}; name one in eks_addons"
        )

    def _held_identities(self, now: dict[str, Any]) -> dict[str, str]:
        """Return the roles of the add-on's service accounts. EKS answers associations by their ARN only."""

        def describe(arn: str) -> dict[str, Any] | None:
            found: dict[str, Any] | None = self.describe(
                "describe_pod_identity_association",
                "association",
                f"pod identity of add-on {now['addonName']}",
                associationId=arn.rpartition("/")[2],
            )
            return found

        found = concurrently(describe, now.get("podIdentityAssociations") or [])
        return {one["serviceAccount"]: one["roleArn"] for one in found if one}

    def _identities(self, addon: dict[str, Any]) -> list[dict[str, str]]:
        known = self.params["role_arns"]
        return [
            {"serviceAccount": one["service_account"], "roleArn": resolve_role(one["role_arn"], known)}
            for one in addon["pod_identities"]
        ]

    def _delete(self, addons: dict[str, dict[str, Any]]) -> None:
        for name, addon in addons.items():
            resource = f"add-on {name}"
            self.changes.delete(resource, {"version": addon.get("addonVersion")})
            if addon["status"] != "DELETING":
                self.api.write("delete_addon", resource, clusterName=self.cluster_name, addonName=name)
        if not self.changes.check_mode:
            self._wait_for(list(addons), gone=True)

    def _wait_for(self, names: list[str], *, gone: bool = False) -> None:
        timeout = self.params["wait_timeout"]
        wait_for("add-on", names, self._describe, owner=self.cluster_name, timeout=timeout, gone=gone)


def _configuration(addon: dict[str, Any]) -> str:
    return json.dumps(addon["configuration"], sort_keys=True) if addon["configuration"] else ""


def _held_configuration(now: dict[str, Any]) -> Any:
    """Return the settings that an add-on has: EKS keeps the text that it was given, which may be JSON or YAML."""
    text = now.get("configurationValues") or ""
    try:
        held = json.loads(text) if text.strip() else {}
    except ValueError:
        try:
            held = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return {} if held is None else held


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    return Addons(module.params, Api(module.client("eks"), changes), changes).reconcile()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
