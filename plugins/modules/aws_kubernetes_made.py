#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: load balancers, volumes and the like that controllers in a cluster made."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_kubernetes_made
short_description: Wait for, or delete, what Kubernetes made in AWS for one cluster
description:
  - Finds load balancers, target groups, volumes, instances, network interfaces, security groups, launch templates,
    instance profiles and log groups by the tags and names that EKS and controllers in the cluster give them.
  - With O(state=released), while the controllers still run, waits until what was given back is gone. What is left when
    time is up is returned, not a failure.
  - With O(state=absent), when the cluster is gone, deletes what its controllers left behind.
  - What bears another owner's tag C(rayplane.io/cluster) is never touched, and neither are volumes whose
    PersistentVolume had the reclaim policy Retain.
  - IAM has no regions, clusters do. Instance profiles that Karpenter made for a cluster of the same name in another
    region stay; the tag C(topology.kubernetes.io/region) tells.
options:
  cluster_name:
    description: Whose things these are.
    type: str
    required: true
  state:
    description: Whether to wait for the controllers, or to delete in their place.
    type: str
    choices: [released, absent]
    default: absent
  retained_volumes:
    description: >-
      Volumes (their ids, each with the name of its PersistentVolume) that stay; they are marked by a tag, so that a
      later run knows.
    type: dict
    default: {}
  volumes:
    description: Whether volumes of PersistentVolumeClaims are waited for and deleted.
    type: bool
    default: true
  keep_logs:
    description: Whether log groups of the control plane and of its containers stay.
    type: bool
    default: false
  wait_timeout:
    description: Longest wait in seconds, in all with O(state=released), for one kind with O(state=absent).
    type: int
    default: 600
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Delete what the cluster's controllers left behind
  rayplane.platform.aws_kubernetes_made:
    cluster_name: ray-llm-cluster-dev
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done.
  returned: always
  type: list
  elements: str
left:
  description: What the controllers have not given back in time.
  returned: state is released
  type: list
  elements: str
"""

from collections.abc import Callable, Sequence
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Changes, PlatformError, run, wait_until
from ansible_collections.rayplane.platform.plugins.module_utils.aws.sweep import (
    KARPENTER_TAGS,
    KEEP_TAG,
    PVC_TAGS,
    Item,
    Sweep,
)

#: On instance profiles that Karpenter makes: the region of its cluster (karpenter.sh, "CloudFormation" reference).
_PLACE_TAG = "topology.kubernetes.io/region"


class Made:
    """What Kubernetes made for one cluster."""

    def __init__(self, params: dict[str, Any], region: str, sweep: Sweep, changes: Changes) -> None:
        self.params = params
        self.region = region
        self.sweep = sweep
        self.changes = changes
        self.timeout: int = params["wait_timeout"]

    # While the controllers run

    def released(self) -> dict[str, Any]:
        """Mark volumes that stay, and wait until the rest of what the controllers give back is gone."""
        self._retain()
        left: list[Item] = []

        def probe() -> tuple[bool, str]:
            left[:] = self._to_be_released()
            return not left, ", ".join(item.text() for item in left)

        if self.changes.check_mode:
            return {"left": [item.text() for item in self._to_be_released()]}
        try:
            wait_until("release of what Kubernetes made", probe, self.timeout)
        except PlatformError:
            if not left:
                raise
            self.changes.warnings.append(
                f"not given back by the cluster's controllers in {self.timeout} s: "
                f"{', '.join(item.text() for item in left)}; deleted through AWS once the cluster is gone"
            )
        return {"left": [item.text() for item in left]}

    def _retain(self) -> None:
        retained: dict[str, str] = self.params["retained_volumes"]
        for volume in self.sweep.ec2(["volume"]) if retained else ():
            if volume.id in retained and KEEP_TAG not in volume.tags:
                name = retained[volume.id]
                self.changes.update(volume.text(), {f"tag {KEEP_TAG}": None}, {f"tag {KEEP_TAG}": name})
                tags = [{"Key": KEEP_TAG, "Value": name}]
                self.sweep.api("ec2").write("create_tags", volume.text(), Resources=[volume.id], Tags=tags)

    def _to_be_released(self) -> list[Item]:
        items = self._balancers()
        for item in self._ec2("instance", "volume", "security group"):
            # Managed nodes and the cluster's own security group go with the cluster.
            if item.kind == "instance" and not any(key in item.tags for key in KARPENTER_TAGS):
                continue
            if item.kind == "security group" and "elbv2.k8s.aws/cluster" not in item.tags:
                continue
            if item.kind == "volume" and not self._is_claimed(item):
                continue
            items.append(item)
        return items

    def _is_claimed(self, volume: Item) -> bool:
        return (
            bool(self.params["volumes"])
            and KEEP_TAG not in volume.tags
            and volume.id not in self.params["retained_volumes"]
            and any(key in volume.tags for key in PVC_TAGS)
        )

    def _balancers(self) -> list[Item]:
        return self._kubernetes(
            self.sweep.attempt("elbv2", self.sweep.load_balancers)
            + self.sweep.attempt("elb", self.sweep.classic_load_balancers)
        )

    def _ec2(self, *kinds: str) -> list[Item]:
        return self._kubernetes(list(self.sweep.ec2(kinds)))

    @staticmethod
    def _kubernetes(items: Sequence[Item]) -> list[Item]:
        return [item for item in items if item.mark == "kubernetes"]

    # When they are gone

    def absent(self) -> dict[str, Any]:
        """Delete what is left, from the outside in; what is gone already is skipped."""
        if not self.changes.check_mode and list(self.sweep.eks()):
            raise PlatformError(
                f"cluster {self.params['cluster_name']} still exists, and its controllers would make anew what is"
                " deleted here: delete the cluster first (roles/eks/tasks/destroy.yml)"
            )
        self._delete_balancers()
        self._delete_instances()
        self._delete_volumes()
        self._delete_interfaces()
        self._delete_groups()
        for item in self._ec2("launch template"):
            self._delete("ec2", "delete_launch_template", item, LaunchTemplateId=item.id)
        self._delete_profiles()
        self._delete_logs()
        return {}

    def _delete(self, service: str, operation: str, item: Item, busy: float = 0, **identity: Any) -> None:
        self.changes.delete(item.text(), {"id": item.id})
        self.sweep.api(service).write(operation, item.text(), busy=busy, **identity)

    def _wait_until_none(self, what: str, find: Callable[[], list[Item]]) -> None:
        def probe() -> tuple[bool, str]:
            items = find()
            return not items, ", ".join(f"{item.text()} {item.state}".rstrip() for item in items)

        if not self.changes.check_mode:
            wait_until(f"deletion of {what}", probe, self.timeout)

    def _delete_balancers(self) -> None:
        items = self._balancers()
        for item in items:
            if item.kind == "load balancer":
                self._delete("elbv2", "delete_load_balancer", item, LoadBalancerArn=item.id)
            elif item.kind == "classic load balancer":
                self._delete("elb", "delete_load_balancer", item, LoadBalancerName=item.id)
        groups = [item for item in items if item.kind == "target group"]
        if len(groups) < len(items):
            self._wait_until_none(
                "load balancers", lambda: [item for item in self._balancers() if item.kind != "target group"]
            )
        for item in groups:
            # A listener that is going holds its target group for a moment.
            self._delete("elbv2", "delete_target_group", item, busy=self.timeout, TargetGroupArn=item.id)

    def _delete_instances(self) -> None:
        items = self._ec2("instance")
        for item in items:
            self.changes.delete(item.text(), {"id": item.id, "type": item.raw.get("InstanceType")})
        if items:
            ids = [item.id for item in items]
            self.sweep.api("ec2").write("terminate_instances", "instances of the cluster", InstanceIds=ids)
            # Their interfaces and volumes are free only when they have ended.
            self._wait_until_ended(ids)

    def _wait_until_ended(self, ids: list[str]) -> None:
        def probe() -> tuple[bool, str]:
            answer = self.sweep.api("ec2").read(
                "describe_instances", "instances", absent=("InvalidInstanceID.NotFound",), InstanceIds=ids
            )
            states = {
                instance["InstanceId"]: instance["State"]["Name"]
                for reservation in (answer or {}).get("Reservations", [])
                for instance in reservation["Instances"]
            }
            running = [f"{name} {state}" for name, state in states.items() if state != "terminated"]
            return not running, ", ".join(running)

        if not self.changes.check_mode:
            wait_until("end of the instances", probe, self.timeout)

    def _volumes(self) -> list[Item]:
        return [item for item in self._ec2("volume") if self._is_claimed(item)]

    def _delete_volumes(self) -> None:
        items = self._volumes()
        for item in items:
            self._delete("ec2", "delete_volume", item, busy=self.timeout, VolumeId=item.id)
        if items:
            self._wait_until_none("volumes", self._volumes)

    def _delete_interfaces(self) -> None:
        items = self._ec2("network interface")
        for item in items:
            self.changes.delete(item.text(), {"id": item.id})
        if not items or self.changes.check_mode:
            return

        def remaining() -> list[Item]:
            found = self._ec2("network interface")
            for item in found:
                # One in use is detached by whoever holds it, such as a load balancer that is going.
                if item.state == "available":
                    self.sweep.api("ec2").write("delete_network_interface", item.text(), NetworkInterfaceId=item.id)
            return found

        self._wait_until_none("network interfaces", remaining)

    def _delete_groups(self) -> None:
        groups = self._ec2("security group")
        ids = {group.id for group in groups}
        api = self.sweep.api("ec2")
        if groups and not self.changes.check_mode:
            # Groups that name each other in their rules, or are named in those of the nodes, cannot be deleted.
            naming = api.pages(
                "describe_security_groups",
                "SecurityGroups",
                "rules that name the groups",
                Filters=[{"Name": "ip-permission.group-id", "Values": sorted(ids)}],
            )
            for group in naming:
                rules = [_only_naming(rule, ids) for rule in group.get("IpPermissions", ())]
                rules = [rule for rule in rules if rule["UserIdGroupPairs"]]
                if rules:
                    api.write(
                        "revoke_security_group_ingress",
                        f"security group {group['GroupId']}",
                        GroupId=group["GroupId"],
                        IpPermissions=rules,
                    )
        for group in groups:
            # Interfaces of load balancers outlive them by a minute or two.
            self._delete("ec2", "delete_security_group", group, busy=self.timeout, GroupId=group.id)

    def _delete_profiles(self) -> None:
        for item in self._kubernetes(list(self.sweep.instance_profiles())):
            region = item.tags.get(_PLACE_TAG, self.region)
            if region != self.region:
                self.changes.warnings.append(
                    f"{item.text()} is left alone: it is that of the cluster {self.params['cluster_name']} in {region}"
                    f" by its tag {_PLACE_TAG}, and this run is for {self.region}"
                )
                continue
            for role in item.raw.get("Roles", ()):
                self.sweep.api("iam").write(
                    "remove_role_from_instance_profile",
                    item.text(),
                    InstanceProfileName=item.name,
                    RoleName=role["RoleName"],
                )
            self._delete("iam", "delete_instance_profile", item, InstanceProfileName=item.name)

    def _delete_logs(self) -> None:
        if self.params["keep_logs"]:
            return
        for item in self._kubernetes(self.sweep.attempt("logs", self.sweep.log_groups)):
            self._delete("logs", "delete_log_group", item, logGroupName=item.id)


def _only_naming(rule: dict[str, Any], groups: set[str]) -> dict[str, Any]:
    """Return a rule with only those of its sources that are among the groups."""
    pairs = [
        {key: pair[key] for key in ("GroupId", "UserId") if key in pair}
        for pair in rule.get("UserIdGroupPairs", ())
        if pair.get("GroupId") in groups
    ]
    ports = {key: rule[key] for key in ("IpProtocol", "FromPort", "ToPort") if key in rule}
    return {**ports, "UserIdGroupPairs": pairs}


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    sweep = Sweep(module.params["cluster_name"], module.client, changes)
    made = Made(module.params, module.region, sweep, changes)
    facts = made.released() if module.params["state"] == "released" else made.absent()
    changes.warnings += [f"not looked at: {line}" for line in sweep.unanswered]
    return facts


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
