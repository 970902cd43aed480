#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: when the managed node groups of an EKS cluster change their size by the clock."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_node_group_schedules
short_description: Reconcile the scheduled sizes of an EKS cluster's node groups as one set
description:
  - EKS has no schedules of its own. This module keeps scheduled actions on the Auto Scaling groups that EKS made for
    the managed node groups, in one call.
  - The actions carry no tags, so this module's are known by their names, which start with C(rayplane-). Others are
    left alone.
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  state:
    description: Whether the actions exist.
    type: str
    choices: [present, absent]
    default: present
  schedules:
    description: The scheduled sizes.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the schedule, unique in its node group.
        type: str
        required: true
      node_group:
        description: Name of the managed node group.
        type: str
        required: true
      recurrence:
        description: When, as five fields of cron (minute, hour, day of month, month, day of week).
        type: str
        required: true
      timezone:
        description: Time zone of O(schedules[].recurrence), as an IANA name.
        type: str
        default: Etc/UTC
      min:
        description: Fewest nodes from then on.
        type: int
      max:
        description: Most nodes from then on.
        type: int
      desired:
        description: Nodes at that moment; afterwards the autoscaler decides within the bounds.
        type: int
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep GPU nodes warm during the working day
  rayplane.platform.eks_node_group_schedules:
    cluster_name: ray-llm-cluster
    schedules:
      - {name: morning, node_group: gpu, recurrence: 0 7 * * 1-5, timezone: Europe/Zurich, min: 2, desired: 2}
      - {name: evening, node_group: gpu, recurrence: 0 20 * * 1-5, timezone: Europe/Zurich, min: 0}
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
"""

from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import ABSENT, find_cluster, require_cluster

PREFIX = "rayplane-"
SIZES = {"min": "MinSize", "max": "MaxSize", "desired": "DesiredCapacity"}
CRON_FIELDS = 5

Action = tuple[str, str]


class Schedules:
    """The scheduled actions of one cluster's node groups: what is there, what is wanted, and the calls between."""

    def __init__(self, params: dict[str, Any], eks: Api, autoscaling: Api, changes: Changes) -> None:
        self.params = params
        self.eks = eks
        self.autoscaling = autoscaling
        self.changes = changes
        self.cluster_name: str = params["cluster_name"]

    def present(self) -> dict[str, Any]:
        """Bring the actions to their description; those of this module that are no longer listed go."""
        wanted = self._wanted()
        cluster = require_cluster(self.eks, self.changes, self.cluster_name)
        groups = self._groups() if cluster else {}
        missing = sorted({node_group for node_group, _ in wanted} - set(groups))
        # Where an earlier stage would make the node group in this very run, there is nothing to look up yet.
        if missing and not self.changes.check_mode:
            raise PlatformError(
                f"autoscaler_schedules names node group {', '.join(missing)}, which cluster {self.cluster_name} does"
                f" not have (it has: {', '.join(sorted(groups)) or 'none'})"
            )
        have = self._observe(groups)
        for key, properties in wanted.items():
            self._reconcile_one(key, properties, have.get(key), groups.get(key[0], ""))
        for key in have:
            if key not in wanted:
                self._delete(key, groups[key[0]])
        return {}

    def absent(self) -> dict[str, Any]:
        """Delete this module's actions."""
        groups = self._groups() if find_cluster(self.eks, self.cluster_name) else {}
        for key in self._observe(groups):
            self._delete(key, groups[key[0]])
        return {}

    def _wanted(self) -> dict[Action, dict[str, Any]]:
        wanted: dict[Action, dict[str, Any]] = {}
        for index, schedule in enumerate(self.params["schedules"]):
            at = f"autoscaler_schedules[{index}] ({schedule['name']})"
            sizes = {api: schedule[key] for key, api in SIZES.items() if schedule.get(key) is not None}
            if not sizes:
                raise PlatformError(f"{at} changes nothing: give min, max or desired")
            given = [sizes[api] for api in ("MinSize", "DesiredCapacity", "MaxSize") if api in sizes]
            if given != sorted(given) or given[0] < 0:
                shown = ", ".join(f"{key} {schedule[key]}" for key, api in SIZES.items() if api in sizes)
                raise PlatformError(f"{at} has {shown}: whole numbers with 0 <= min <= desired <= max are needed")
            if len(schedule["recurrence"].split()) != CRON_FIELDS:
                raise PlatformError(
                    f"{at}.recurrence is {schedule['recurrence']!r}: five fields of cron are needed, such as"
                    " '0 7 * * 1-5'"
                )
            _check_zone(at, schedule["timezone"])
            key = (schedule["node_group"], PREFIX + schedule["name"])
            if key in wanted:
                raise PlatformError(f"{at}: node group {key[0]} has two schedules of this name; rename one of them")
            wanted[key] = {"Recurrence": schedule["recurrence"], "TimeZone": schedule["timezone"], **sizes}
        return wanted

    def _groups(self) -> dict[str, str]:
        """Return the Auto Scaling group of each node group."""
        names = self.eks.pages(
            "list_nodegroups", "nodegroups", f"cluster {self.cluster_name}", clusterName=self.cluster_name
        )
        found: dict[str, str] = {}
        for name in names:
            answer = self.eks.read(
                "describe_nodegroup",
                f"node group {name}",
                absent=ABSENT,
                clusterName=self.cluster_name,
                nodegroupName=name,
            )
            made = (answer or {}).get("nodegroup", {}).get("resources", {}).get("autoScalingGroups") or []
            if made:
                found[name] = made[0]["name"]
        return found

    def _observe(self, groups: dict[str, str]) -> dict[Action, dict[str, Any]]:
        found: dict[Action, dict[str, Any]] = {}
        for node_group, scaling_group in groups.items():
            actions = self.autoscaling.pages(
                "describe_scheduled_actions",
                "ScheduledUpdateGroupActions",
                f"node group {node_group}",
                AutoScalingGroupName=scaling_group,
            )
            for action in actions:
                if action["ScheduledActionName"].startswith(PREFIX):
                    found[(node_group, action["ScheduledActionName"])] = action
        return found

    def _reconcile_one(
        self, key: Action, wanted: dict[str, Any], now: dict[str, Any] | None, scaling_group: str
    ) -> None:
        resource = _name(key)
        if now is None:
            self.changes.create(resource, wanted)
        else:
            # An action keeps no size that it is not given, so one that is no longer wanted is a difference, too.
            have = {name: now.get(name) for name in ("Recurrence", *SIZES.values())}
            have["TimeZone"] = now.get("TimeZone") or "Etc/UTC"
            if not self.changes.update(resource, have, dict.fromkeys(have) | wanted):
                return
        self.autoscaling.write(
            "put_scheduled_update_group_action",
            resource,
            AutoScalingGroupName=scaling_group,
            ScheduledActionName=key[1],
            **only_given(wanted),
        )

    def _delete(self, key: Action, scaling_group: str) -> None:
        self.changes.delete(_name(key))
        self.autoscaling.write(
            "delete_scheduled_action",
            _name(key),
            AutoScalingGroupName=scaling_group,
            ScheduledActionName=key[1],
        )


def _check_zone(at: str, zone: str) -> None:
    try:
        ZoneInfo(zone)
    except (KeyError, OSError, ValueError) as error:
        if not available_timezones():
            return  # this machine has no table of time zones; AWS will say
        raise PlatformError(f"{at}.timezone is {zone!r}: an IANA name such as Europe/Zurich is needed") from error


def _name(key: Action) -> str:
    return f"schedule {key[0]}/{key[1].removeprefix(PREFIX)}"


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    schedules = Schedules(
        module.params, Api(module.client("eks"), changes), Api(module.client("autoscaling"), changes), changes
    )
    return schedules.present() if module.params["state"] == "present" else schedules.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
