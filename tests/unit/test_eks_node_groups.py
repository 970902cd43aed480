"""Node groups: the set in one call, desired size left alone, fixed properties refused or replaced."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import eks_node_groups
import pytest
from ansible.module_utils.rayplane_aws import Api, Changes, PlatformError
from aws_fake import Clock, FakeClient, refusal

GROUP = {
    "name": "gpu",
    "instance_types": ["g4dn.xlarge"],
    "ami_type": "AL2023_x86_64_NVIDIA",
    "capacity_type": "ON_DEMAND",
    "min_size": 1,
    "max_size": 10,
    "desired_size": 2,
    "disk_size": 200,
    "labels": {"rayplane.io/pool": "gpu"},
    "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
    "subnet_ids": [],
    "role_arn": "",
    "launch_template": {},
    "release_version": "",
    "max_unavailable": 1,
    "tags": {},
}


def group(**changes: Any) -> dict[str, Any]:
    return {**GROUP, **changes}


class FakeEks:
    """A cluster with node groups."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.version = "1.34"
        self.exists = True
        self.groups = {one["nodegroupName"]: one for one in groups}
        self.client = FakeClient(
            "eks",
            describe_cluster=self.describe_cluster,
            list_nodegroups=lambda **_: {"nodegroups": list(self.groups)},
            describe_nodegroup=self.describe_nodegroup,
            create_nodegroup=self.create_nodegroup,
            delete_nodegroup=lambda nodegroupName, **_: self.groups.pop(nodegroupName),
            update_nodegroup_config=lambda **_: {"update": {"id": "u1"}},
            update_nodegroup_version=lambda **_: {"update": {"id": "u1"}},
            describe_update=lambda **_: {"update": {"status": "Successful", "type": "ConfigUpdate"}},
            tag_resource=lambda **_: {},
        )

    def describe_cluster(self, name: str) -> Any:
        if not self.exists:
            raise refusal("ResourceNotFoundException")
        return {"cluster": {"name": name, "version": self.version, "status": "ACTIVE"}}

    def describe_nodegroup(self, nodegroupName: str, **_: Any) -> Any:
        if nodegroupName not in self.groups:
            raise refusal("ResourceNotFoundException")
        return {"nodegroup": self.groups[nodegroupName]}

    def create_nodegroup(self, **given: Any) -> Any:
        self.groups[given["nodegroupName"]] = {
            **given,
            "nodegroupArn": "arn:ng",
            "status": "ACTIVE",
            "version": self.version,
        }
        return {"nodegroup": self.groups[given["nodegroupName"]]}


def converge(eks: FakeEks, *groups: dict[str, Any], check: bool = False, **params: Any) -> Changes:
    changes = Changes(check)
    given = {
        "cluster_name": "c1",
        "node_groups": list(groups),
        "role_arn": "arn:node",
        "subnet_ids": ["subnet-b", "subnet-a"],
        "tags": {},
        "replace": False,
        "force_upgrade": False,
        "purge": True,
        "kubernetes_version": "",
        "wait_timeout": 60,
        **params,
    }
    eks_node_groups.NodeGroups(given, Api(eks.client, changes), changes).reconcile()
    return changes


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def eks() -> FakeEks:
    """A cluster on which the GPU group stands as described."""
    fake = FakeEks()
    converge(fake, GROUP)
    fake.client.calls.clear()
    return fake


def test_a_new_group_is_asked_for_as_described() -> None:
    fake = FakeEks()
    changes = converge(fake, GROUP)
    ((operation, given),) = fake.client.writes()
    assert operation == "create_nodegroup"
    assert given["amiType"] == "AL2023_x86_64_NVIDIA"
    assert given["scalingConfig"] == {"minSize": 1, "maxSize": 10, "desiredSize": 2}
    assert given["taints"] == [{"key": "nvidia.com/gpu", "value": "present", "effect": "NO_SCHEDULE"}]
    assert given["subnets"] == ["subnet-a", "subnet-b"]
    assert changes.actions == ["create node group gpu"]


def test_groups_are_asked_for_together_before_any_wait() -> None:
    fake = FakeEks()
    converge(fake, group(name="a"), group(name="b"))
    names = [name for name, _ in fake.client.calls]
    last = max(index for index, name in enumerate(names) if name == "create_nodegroup")
    assert "describe_nodegroup" not in names[:last]


def test_check_mode_predicts_on_a_cluster_that_does_not_exist() -> None:
    fake = FakeEks()
    fake.exists = False
    assert converge(fake, GROUP, check=True, role_arn="<new role>").actions == ["create node group gpu"]
    assert fake.client.writes() == []
    with pytest.raises(PlatformError, match="cluster c1 does not exist"):
        converge(fake, GROUP)


def test_second_run_changes_nothing(eks: FakeEks) -> None:
    assert converge(eks, GROUP).actions == []
    assert eks.client.writes() == []


def test_the_desired_size_is_the_autoscalers(eks: FakeEks) -> None:
    eks.groups["gpu"]["scalingConfig"]["desiredSize"] = 7
    assert converge(eks, GROUP).actions == []
    changes = converge(eks, group(max_size=5))
    assert changes.actions == [
        "update node group gpu: maxSize: 10 -> 5",
        "update node group gpu: desiredSize: 7 -> 5",
    ]
    ((_, given),) = eks.client.writes()
    assert given["scalingConfig"] == {"minSize": 1, "maxSize": 5, "desiredSize": 5}


def test_labels_and_taints_are_taken_away_too(eks: FakeEks) -> None:
    eks.groups["gpu"]["labels"]["stray"] = "x"
    eks.groups["gpu"]["taints"].append({"key": "stray", "value": "x", "effect": "NO_EXECUTE"})
    changes = converge(eks, GROUP)
    ((_, given),) = eks.client.writes()
    assert given["labels"]["removeLabels"] == ["stray"]
    assert [taint["key"] for taint in given["taints"]["removeTaints"]] == ["stray"]
    assert len(changes.actions) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"instance_types": ["g5.xlarge"]},
        {"capacity_type": "SPOT"},
        {"disk_size": 50},
        {"ami_type": "BOTTLEROCKET_x86_64"},
    ],
)
def test_a_fixed_property_is_refused_before_anything_changes(eks: FakeEks, change: dict[str, Any]) -> None:
    with pytest.raises(PlatformError, match="cannot change in place"):
        converge(eks, group(name="new"), group(**change))
    assert eks.client.writes() == []


def test_a_fixed_property_is_replaced_where_allowed(eks: FakeEks) -> None:
    changes = converge(eks, group(instance_types=["g5.xlarge"]), replace=True)
    assert [name for name, _ in eks.client.writes()] == ["delete_nodegroup", "create_nodegroup"]
    assert changes.actions == ["delete node group gpu", "create node group gpu"]


def test_a_group_that_failed_at_birth_is_made_anew(eks: FakeEks) -> None:
    eks.groups["gpu"]["status"] = "CREATE_FAILED"
    assert converge(eks, GROUP).actions == ["delete node group gpu", "create node group gpu"]


def test_only_own_groups_are_purged(eks: FakeEks) -> None:
    eks.groups["foreign"] = {**eks.groups["gpu"], "nodegroupName": "foreign", "tags": {}}
    assert converge(eks, group(name="other")).actions == ["delete node group gpu", "create node group other"]
    assert "foreign" in eks.groups


def test_nodes_follow_the_control_plane(eks: FakeEks) -> None:
    eks.version = "1.35"
    assert converge(eks, GROUP).actions == ["update node group gpu: version: 1.34 -> 1.35"]
    ((operation, given),) = eks.client.writes()
    assert (operation, given["version"]) == ("update_nodegroup_version", "1.35")


def test_check_mode_predicts_that_nodes_follow(eks: FakeEks) -> None:
    changes = converge(eks, GROUP, check=True, kubernetes_version="1.35")
    assert changes.actions == ["update node group gpu: version: 1.34 -> 1.35"]
    assert eks.client.writes() == []


@pytest.mark.parametrize("sizes", [(3, 2, 2), (0, 0, 0), (1, 3, 4), (-1, 3, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    low, high, desired = sizes
    with pytest.raises(PlatformError, match="do not fit"):
        converge(FakeEks(), group(min_size=low, max_size=high, desired_size=desired))


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(PlatformError, match="named twice: gpu"):
        converge(FakeEks(), GROUP, GROUP)


def test_waiting_for_nodes_is_bounded_and_shows_their_health(eks: FakeEks, clock: Clock) -> None:
    eks.groups["gpu"]["status"] = "CREATING"
    eks.groups["gpu"]["health"] = {"issues": [{"code": "InsufficientFreeAddresses", "message": "subnet is full"}]}
    with pytest.raises(PlatformError, match="InsufficientFreeAddresses: subnet is full"):
        converge(eks, GROUP)
    assert clock.now <= 60


def test_a_degraded_group_is_reported(eks: FakeEks) -> None:
    eks.groups["gpu"]["status"] = "DEGRADED"
    eks.groups["gpu"]["health"] = {"issues": [{"code": "AsgInstanceLaunchFailures", "message": "no capacity"}]}
    assert "no capacity" in converge(eks, GROUP).warnings[0]
