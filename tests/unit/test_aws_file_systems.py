"""File systems: encrypted, reached from each zone, repaired by property, and kept for their files."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import aws_file_systems
from aws_fake import Clock, FakeClient, refusal

Json = dict[str, Any]
ZONES = {"subnet-0000000a": "us-west-2a", "subnet-0000000b": "us-west-2b", "subnet-000000a2": "us-west-2a"}


class FakeAccount:
    """EFS and the part of EC2 that it needs."""

    def __init__(self) -> None:
        self.systems: list[Json] = []
        self.targets: list[Json] = []
        self.target_groups: dict[str, list[str]] = {}
        self.lifecycle: list[Json] = []
        self.backup = "DISABLED"
        self.groups: list[Json] = []
        self.efs = FakeClient(
            "efs",
            describe_file_systems=self.find,
            create_file_system=self.create,
            update_file_system=lambda FileSystemId, **given: self.systems[0].update(given),
            delete_file_system=self.delete,
            describe_lifecycle_configuration=lambda FileSystemId: {"LifecyclePolicies": self.lifecycle},
            put_lifecycle_configuration=self.put_lifecycle,
            describe_backup_policy=lambda FileSystemId: {"BackupPolicy": {"Status": self.backup}},
            put_backup_policy=lambda FileSystemId, BackupPolicy: setattr(self, "backup", BackupPolicy["Status"]),
            tag_resource=lambda ResourceId, Tags: self.systems[0]["Tags"].extend(Tags),
            describe_mount_targets=lambda FileSystemId: {
                "MountTargets": [one for one in self.targets if one["FileSystemId"] == FileSystemId]
            },
            create_mount_target=self.create_target,
            delete_mount_target=self.delete_target,
            describe_mount_target_security_groups=lambda MountTargetId: {
                "SecurityGroups": self.target_groups[MountTargetId]
            },
            modify_mount_target_security_groups=lambda MountTargetId, SecurityGroups: self.target_groups.update(
                {MountTargetId: SecurityGroups}
            ),
        )
        self.ec2 = FakeClient(
            "ec2",
            describe_subnets=lambda SubnetIds: {
                "Subnets": [{"SubnetId": i, "AvailabilityZone": ZONES[i], "VpcId": "vpc-1"} for i in SubnetIds]
            },
            describe_vpcs=lambda VpcIds: {"Vpcs": [{"CidrBlock": "10.0.0.0/16"}]},
            describe_security_groups=lambda Filters: {"SecurityGroups": list(self.groups)},
            create_security_group=self.create_group,
            authorize_security_group_ingress=lambda GroupId, IpPermissions: self.groups[0].update(
                IpPermissions=IpPermissions
            ),
            revoke_security_group_ingress=lambda GroupId, IpPermissions: self.groups[0].update(IpPermissions=[]),
            create_tags=lambda Resources, Tags: self.groups[0]["Tags"].extend(Tags),
            delete_security_group=lambda GroupId: self.groups.clear(),
        )

    def find(self, CreationToken: str = "") -> Json:
        found = [dict(one) for one in self.systems if CreationToken in ("", one["CreationToken"])]
        return {"FileSystems": found}

    def delete(self, FileSystemId: str) -> None:
        self.systems = [one for one in self.systems if one["FileSystemId"] != FileSystemId]

    def create(self, **given: Any) -> Json:
        assert given.pop("Encrypted") is True
        given.pop("Backup")
        made = {"FileSystemId": "fs-1", "LifeCycleState": "available", "Encrypted": True, "SizeInBytes": {"Value": 6}}
        self.systems.append({**made, **given})
        return self.systems[0]

    def put_lifecycle(self, FileSystemId: str, LifecyclePolicies: list[Json]) -> None:
        self.lifecycle = LifecyclePolicies

    def create_target(self, FileSystemId: str, SubnetId: str, SecurityGroups: list[str]) -> None:
        zone = ZONES[SubnetId]
        assert zone not in [one["AvailabilityZoneName"] for one in self.targets]
        target = {"MountTargetId": f"fsmt-{SubnetId}", "FileSystemId": FileSystemId, "SubnetId": SubnetId}
        self.targets.append({**target, "AvailabilityZoneName": zone, "LifeCycleState": "available"})
        self.target_groups[target["MountTargetId"]] = SecurityGroups

    def delete_target(self, MountTargetId: str) -> None:
        self.targets = [one for one in self.targets if one["MountTargetId"] != MountTargetId]

    def create_group(self, GroupName: str, VpcId: str, TagSpecifications: list[Json], **_: Any) -> Json:
        self.groups.append({"GroupId": "sg-00000001", "IpPermissions": [], "Tags": TagSpecifications[0]["Tags"]})
        return {"GroupId": "sg-00000001"}

    def writes(self) -> list[str]:
        return [name for client in (self.efs, self.ec2) for name, _ in client.writes()]


def systems(
    account: FakeAccount,
    check: bool = False,
    subnets: tuple[str, ...] = tuple(ZONES),
    destroy: bool = False,
    listed: bool = True,
    **given: Any,
) -> tuple[aws_file_systems.FileSystems, Changes]:
    changes = Changes(check)
    plain = {"name": "c1-shared", "kms_key_id": "", "performance_mode": "generalPurpose", "provisioned_mibps": 0}
    more = {"throughput_mode": "elastic", "ia_days": 30, "archive_days": 0, "back_on_access": True, "backup": False}
    params = {
        "cluster_name": "c1",
        "file_systems": [{**plain, **more, **given}] if listed else [],
        "subnet_ids": list(subnets),
        "client_cidrs": [],
        "tags": {},
        "destroy_data": destroy,
        "wait_timeout": 60,
    }
    return aws_file_systems.FileSystems(params, Api(account.efs, changes), Api(account.ec2, changes), changes), changes


def made() -> FakeAccount:
    account = FakeAccount()
    systems(account)[0].present()
    account.efs.calls.clear()
    account.ec2.calls.clear()
    return account


def test_a_file_system_is_predicted_made_and_left_alone() -> None:
    account = FakeAccount()
    one, changes = systems(account, check=True)
    assert one.present() == {"file_system_ids": {"c1-shared": "<new file system c1-shared>"}}
    predicted = changes.actions
    assert account.writes() == []
    one, changes = systems(account)
    assert one.present() == {"file_system_ids": {"c1-shared": "fs-1"}}
    assert changes.actions == predicted
    assert predicted == [
        "create security group c1-efs",
        "create file system c1-shared",
        "create mount target c1-shared in us-west-2a",
        "create mount target c1-shared in us-west-2b",
    ]
    account = made()
    one, changes = systems(account)
    one.present()
    assert changes.actions == []
    assert account.writes() == []


def test_it_is_predicted_before_there_is_a_network() -> None:
    one, changes = systems(FakeAccount(), check=True, subnets=("<new subnet a>", "<new subnet b>"))
    one.present()
    assert changes.actions[-1] == "create mount target c1-shared in <new subnet b>"


def test_every_property_is_told_and_repaired() -> None:
    account = made()
    account.systems[0]["ThroughputMode"] = "bursting"
    account.lifecycle = [{"TransitionToArchive": "AFTER_90_DAYS"}]
    account.backup = "ENABLED"
    account.systems[0]["Tags"] = [{"Key": "mine", "Value": "1"}]
    account.groups[0]["IpPermissions"] = [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    account.delete_target("fsmt-subnet-0000000b")
    account.target_groups["fsmt-subnet-0000000a"] = ["sg-0000other"]
    one, changes = systems(account)
    one.present()
    assert [action.split(" -> ")[0] for action in changes.actions] == [
        "update security group c1-efs: NFS from: ['-1 - 0.0.0.0/0']",
        "update file system c1-shared: ThroughputMode: bursting",
        "update file system c1-shared: TransitionToIA: absent",
        "update file system c1-shared: TransitionToPrimaryStorageClass: absent",
        "update file system c1-shared: TransitionToArchive: AFTER_90_DAYS",
        "update file system c1-shared: backup: ENABLED",
        "update file system c1-shared: tag rayplane.io/cluster: absent",
        "update file system c1-shared: tag Name: absent",
        "update mount target c1-shared in us-west-2a: security groups: ['sg-0000other']",
        "create mount target c1-shared in us-west-2b",
    ]
    one, changes = systems(account)
    one.present()
    assert changes.actions == []


def test_a_mount_target_moves_with_its_subnet(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    account = made()
    one, changes = systems(account, subnets=("subnet-000000a2", "subnet-0000000b"))
    one.present()
    assert changes.actions == [
        "delete mount target c1-shared in us-west-2a",
        "create mount target c1-shared in us-west-2a",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kms_key_id": "arn:aws:kms:other"}, "kms_key_id is None and cannot become arn:aws:kms:other"),
        ({"performance_mode": "maxIO"}, "performance_mode is generalPurpose and cannot become maxIO"),
        ({"name": "n" * 65}, "64 characters"),
        ({"throughput_mode": "provisioned"}, "goes with throughput_mode provisioned"),
        ({"provisioned_mibps": 5}, "goes with throughput_mode provisioned"),
    ],
)
def test_the_impossible_is_refused_before_anything(options: Json, said: str) -> None:
    account = made()
    with pytest.raises(PlatformError, match=said):
        systems(account, **options)[0].present()
    assert account.writes() == []


def test_ids_are_looked_up() -> None:
    assert systems(made())[0].found() == {"file_system_ids": {"c1-shared": "fs-1"}}
    assert systems(FakeAccount(), check=True)[0].found() == {
        "file_system_ids": {"c1-shared": "<new file system c1-shared>"}
    }
    with pytest.raises(PlatformError, match="run the stage storage first"):
        systems(FakeAccount())[0].found()


def test_files_are_kept_unless_told_and_the_network_is_let_go() -> None:
    account = made()
    one, changes = systems(account)
    assert one.absent() == {"kept": ["c1-shared"]}
    assert changes.actions == [
        "delete mount target c1-shared in us-west-2a",
        "delete mount target c1-shared in us-west-2b",
        "delete security group c1-efs",
    ]
    one, changes = systems(account, destroy=True)
    assert one.absent() == {"kept": []}
    assert changes.actions == ["delete file system c1-shared"]
    one, changes = systems(account, destroy=True)
    one.absent()
    assert changes.actions == []


def test_the_file_system_of_another_cluster_is_left_alone() -> None:
    account = made()
    account.systems[0]["Tags"] = [{"Key": "rayplane.io/cluster", "Value": "c2"}]
    with pytest.raises(PlatformError, match="belongs to cluster c2"):
        systems(account)[0].present()
    account.groups.clear()
    one, changes = systems(account, destroy=True)
    one.absent()
    assert changes.actions == []
    assert "left alone" in changes.warnings[0]


def test_what_is_switched_off_is_found_by_its_tag() -> None:
    account = made()
    # Another cluster's, and one that nobody has tagged.
    for number, tags in (("fs-2", [{"Key": "rayplane.io/cluster", "Value": "c2"}]), ("fs-3", [])):
        account.systems.append({**account.systems[0], "FileSystemId": number, "CreationToken": number, "Tags": tags})
    one, changes = systems(account, check=True, listed=False, destroy=True)
    one.absent()
    said = [
        "delete mount target c1-shared in us-west-2a",
        "delete mount target c1-shared in us-west-2b",
        "delete file system c1-shared",
        "delete security group c1-efs",
    ]
    assert changes.actions == said
    assert account.writes() == []
    one, changes = systems(account, listed=False, destroy=True)
    assert one.absent() == {"kept": []}
    assert changes.actions == said
    assert changes.warnings == []
    assert [one["FileSystemId"] for one in account.systems] == ["fs-2", "fs-3"]


def test_one_that_lost_its_tag_is_found_by_its_name() -> None:
    account = made()
    account.systems[0]["Tags"] = []
    one, changes = systems(account)
    one.absent()
    assert changes.actions[0] == "delete mount target c1-shared in us-west-2a"


def test_who_never_had_file_systems_needs_no_permission_for_them() -> None:
    def denied(**_: Any) -> Any:
        raise refusal("AccessDeniedException")

    account = FakeAccount()
    account.efs.handlers["describe_file_systems"] = denied
    one, changes = systems(account, listed=False)
    assert one.absent() == {"kept": []}
    assert "DescribeFileSystems" in changes.warnings[0]
    with pytest.raises(PlatformError, match="DescribeFileSystems failed"):
        systems(account)[0].absent()
