"""Schedules of node groups: kept on their Auto Scaling groups, known by name, refused where they make no sense."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import eks_node_group_schedules
from aws_fake import FakeClient, refusal

MORNING = {
    "name": "morning",
    "node_group": "gpu",
    "recurrence": "0 7 * * 1-5",
    "timezone": "Europe/Zurich",
    "min": 2,
    "max": None,
    "desired": 2,
}
EVENING = {**MORNING, "name": "evening", "recurrence": "0 20 * * 1-5", "min": 0, "desired": None}


class FakeCluster:
    """A cluster with one node group and the actions on its Auto Scaling group."""

    def __init__(self) -> None:
        self.exists = True
        self.actions: dict[str, dict[str, Any]] = {}
        self.eks = FakeClient(
            "eks",
            describe_cluster=self.describe_cluster,
            list_nodegroups=lambda **_: {"nodegroups": ["gpu"]},
            describe_nodegroup=lambda **_: {"nodegroup": {"resources": {"autoScalingGroups": [{"name": "eks-gpu"}]}}},
        )
        self.autoscaling = FakeClient(
            "autoscaling",
            describe_scheduled_actions=lambda **_: {"ScheduledUpdateGroupActions": list(self.actions.values())},
            put_scheduled_update_group_action=lambda **given: self.actions.update(
                {given["ScheduledActionName"]: given}
            ),
            delete_scheduled_action=lambda ScheduledActionName, **_: self.actions.pop(ScheduledActionName),
        )

    def describe_cluster(self, **_: Any) -> Any:
        if not self.exists:
            raise refusal("ResourceNotFoundException")
        return {"cluster": {"version": "1.34"}}


def run(cluster: FakeCluster, *schedules: dict[str, Any], check: bool = False, state: str = "present") -> Changes:
    changes = Changes(check)
    cluster.autoscaling.calls.clear()
    work = eks_node_group_schedules.Schedules(
        {"cluster_name": "c1", "schedules": list(schedules)},
        Api(cluster.eks, changes),
        Api(cluster.autoscaling, changes),
        changes,
    )
    if state == "present":
        work.present()
    else:
        work.absent()
    return changes


def test_schedules_are_planned_made_and_kept() -> None:
    cluster = FakeCluster()
    plan = run(cluster, MORNING, EVENING, check=True)
    assert cluster.autoscaling.writes() == []
    done = run(cluster, MORNING, EVENING)
    assert plan.actions == done.actions == ["create schedule gpu/morning", "create schedule gpu/evening"]
    assert cluster.actions["rayplane-evening"] == {
        "AutoScalingGroupName": "eks-gpu",
        "ScheduledActionName": "rayplane-evening",
        "Recurrence": "0 20 * * 1-5",
        "TimeZone": "Europe/Zurich",
        "MinSize": 0,
    }
    assert run(cluster, MORNING, EVENING).actions == []


def test_schedules_are_repaired_by_property_and_others_are_left_alone() -> None:
    cluster = FakeCluster()
    run(cluster, MORNING, EVENING)
    cluster.actions["rayplane-morning"]["MinSize"] = 7
    cluster.actions["rayplane-evening"]["DesiredCapacity"] = 0
    cluster.actions["somebody"] = {**cluster.actions["rayplane-morning"], "ScheduledActionName": "somebody"}
    cluster.actions["rayplane-stray"] = {**cluster.actions["somebody"], "ScheduledActionName": "rayplane-stray"}
    assert run(cluster, MORNING, EVENING).actions == [
        "update schedule gpu/morning: MinSize: 7 -> 2",
        "update schedule gpu/evening: DesiredCapacity: 0 -> None",
        "delete schedule gpu/stray",
    ]
    assert run(cluster, MORNING, EVENING).actions == []
    assert run(cluster, state="absent").actions == ["delete schedule gpu/morning", "delete schedule gpu/evening"]
    assert list(cluster.actions) == ["somebody"]
    assert run(cluster, state="absent").actions == []


def test_the_plan_comes_before_the_cluster() -> None:
    cluster = FakeCluster()
    cluster.exists = False
    assert run(cluster, MORNING, check=True).actions == ["create schedule gpu/morning"]
    assert run(cluster, state="absent").actions == []
    with pytest.raises(PlatformError, match="cluster c1 does not exist"):
        run(cluster, MORNING)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"min": None, "desired": None}, "changes nothing: give min, max or desired"),
        ({"min": 3, "desired": 2}, "has min 3, desired 2: whole numbers with 0 <= min <= desired <= max"),
        ({"desired": None, "max": 1}, "has min 2, max 1: whole numbers"),
        ({"min": -1}, "has min -1, desired 2: whole numbers"),
        ({"recurrence": "@daily"}, "recurrence is '@daily': five fields of cron"),
        ({"timezone": "Mars/Olympus"}, "timezone is 'Mars/Olympus': an IANA name"),
        ({"node_group": "tpu"}, r"names node group tpu, which cluster c1 does not have \(it has: gpu\)"),
    ],
)
def test_wrong_schedules_are_explained_before_anything_changes(schedule: dict[str, Any], said: str) -> None:
    cluster = FakeCluster()
    with pytest.raises(PlatformError, match=said):
        run(cluster, EVENING, {**MORNING, **schedule})
    assert cluster.autoscaling.writes() == []


def test_a_schedule_has_one_name_in_its_group() -> None:
    with pytest.raises(PlatformError, match="two schedules of this name"):
        run(FakeCluster(), MORNING, MORNING)
