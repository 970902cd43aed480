"""KMS keys: made once, found by alias or tags, restored, repaired, and kept while they encrypt something."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
import json
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import aws_kms_keys
from aws_fake import Clock, FakeClient, refusal

Json = dict[str, Any]
ACCOUNT = "111122223333"


class FakeAccount:
    """KMS and what the module asks besides: STS, IAM, S3, EFS, EC2 and CloudWatch Logs."""

    def __init__(self) -> None:
        self.keys: dict[str, Json] = {}
        self.aliases: dict[str, str] = {}
        self.scaling_role = False
        self.unknown_role_answers = 0
        self.encrypted: dict[str, str] = {}
        self.systems: list[Json] = []
        self.volumes: list[Json] = []
        self.snapshots: list[Json] = []
        self.groups: list[Json] = []
        kms = FakeClient(
            "kms",
            describe_key=self.describe,
            list_resource_tags=lambda KeyId, **_: {"Tags": self.keys[KeyId]["tags"]},
            list_keys=lambda: {"Keys": [{"KeyId": key_id} for key_id in self.keys]},
            get_key_policy=lambda KeyId, **_: {"Policy": self.keys[KeyId]["policy"]},
            put_key_policy=lambda KeyId, Policy, **_: self.keys[KeyId].update(policy=Policy),
            get_key_rotation_status=lambda KeyId: self.keys[KeyId]["rotation"],
            enable_key_rotation=lambda KeyId, RotationPeriodInDays: self.keys[KeyId].update(
                rotation={"KeyRotationEnabled": True, "RotationPeriodInDays": RotationPeriodInDays}
            ),
            disable_key_rotation=lambda KeyId: self.keys[KeyId].update(rotation={"KeyRotationEnabled": False}),
            update_key_description=lambda KeyId, Description: self.keys[KeyId]["meta"].update(Description=Description),
            tag_resource=self.tag,
            create_key=self.create,
            create_alias=self.create_alias,
            update_alias=lambda AliasName, TargetKeyId: self.aliases.update({AliasName: TargetKeyId}),
            delete_alias=lambda AliasName: {"gone": self.aliases.pop(AliasName)},
            cancel_key_deletion=lambda KeyId: self.keys[KeyId]["meta"].update(KeyState="Disabled"),
            enable_key=self.enable,
            schedule_key_deletion=lambda KeyId, **_: self.keys[KeyId]["meta"].update(KeyState="PendingDeletion"),
        )
        self.clients = {
            "kms": kms,
            "sts": FakeClient("sts", get_caller_identity=lambda: {"Account": ACCOUNT}),
            "iam": FakeClient("iam", list_roles=self.roles, create_service_linked_role=self.make_role),
            "s3": FakeClient("s3", get_bucket_encryption=self.encryption),
            "efs": FakeClient("efs", describe_file_systems=lambda: {"FileSystems": self.systems}),
            "ec2": FakeClient(
                "ec2", describe_volumes=self.describe_volumes, describe_snapshots=self.describe_snapshots
            ),
            "logs": FakeClient("logs", describe_log_groups=lambda: {"logGroups": self.groups}),
        }

    def describe(self, KeyId: str) -> Json:
        key_id = self.aliases.get(KeyId, KeyId)
        if key_id not in self.keys:
            raise refusal("NotFoundException")
        return {"KeyMetadata": dict(self.keys[key_id]["meta"])}

    def create(self, Description: str, Policy: str, Tags: list[Json]) -> Json:
        if not self.scaling_role and "AWSServiceRoleForAutoScaling" in Policy:
            raise refusal("MalformedPolicyDocumentException")
        if self.unknown_role_answers:
            self.unknown_role_answers -= 1
            raise refusal("MalformedPolicyDocumentException")
        key_id = f"k{len(self.keys) + 1}"
        arn = f"arn:aws:kms:us-west-2:{ACCOUNT}:key/{key_id}"
        meta = {"KeyId": key_id, "Arn": arn, "KeyState": "Enabled", "Description": Description}
        meta |= {"CreationDate": len(self.keys), "KeyManager": "CUSTOMER"}
        self.keys[key_id] = {
            "meta": meta,
            "policy": Policy,
            "tags": Tags,
            "rotation": {"KeyRotationEnabled": False},
        }
        return {"KeyMetadata": dict(meta)}

    def create_alias(self, AliasName: str, TargetKeyId: str) -> None:
        assert AliasName not in self.aliases
        self.aliases[AliasName] = TargetKeyId

    def enable(self, KeyId: str) -> None:
        assert self.keys[KeyId]["meta"]["KeyState"] == "Disabled"
        self.keys[KeyId]["meta"]["KeyState"] = "Enabled"

    def tag(self, KeyId: str, Tags: list[Json]) -> None:
        names = {tag["TagKey"] for tag in Tags}
        self.keys[KeyId]["tags"] = [tag for tag in self.keys[KeyId]["tags"] if tag["TagKey"] not in names] + Tags

    def roles(self, PathPrefix: str) -> Json:
        assert PathPrefix == "/aws-service-role/autoscaling.amazonaws.com/"
        return {"Roles": [{"RoleName": "AWSServiceRoleForAutoScaling"}] if self.scaling_role else []}

    def make_role(self, AWSServiceName: str) -> None:
        self.scaling_role = True

    def encryption(self, Bucket: str) -> Json:
        if Bucket not in self.encrypted:
            raise refusal("NoSuchBucket")
        default = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": self.encrypted[Bucket]}
        return {"ServerSideEncryptionConfiguration": {"Rules": [{"ApplyServerSideEncryptionByDefault": default}]}}

    def describe_volumes(self, Filters: list[Json]) -> Json:
        wanted = {one["Name"]: one["Values"] for one in Filters}
        assert wanted["encrypted"] == ["true"]
        return {"Volumes": [one for one in self.volumes if one["State"] in wanted["status"]]}

    def describe_snapshots(self, OwnerIds: list[str], Filters: list[Json]) -> Json:
        assert OwnerIds == ["self"] and Filters == [{"Name": "encrypted", "Values": ["true"]}]
        return {"Snapshots": self.snapshots}

    def writes(self) -> list[str]:
        return [name for client in self.clients.values() for name, _ in client.writes()]


def keys(account: FakeAccount, check: bool = False, **options: Any) -> tuple[aws_kms_keys.Keys, Changes]:
    changes = Changes(check)
    plain = {"alias": "c1", "description": "d", "rotation": True, "rotation_days": 365, "policy_statements": []}
    params = {
        "cluster_name": "c1",
        "keys": [{**plain, "users": ["logs", "autoscaling", "ebs"], "volume_roles": [], **options}],
        "tags": {"Team": "x"},
        "pending_days": 30,
        "keep_for_buckets": ["c1-models"],
    }
    return aws_kms_keys.Keys(
        params, "us-west-2", lambda service: Api(account.clients[service], changes), changes
    ), changes


def made() -> FakeAccount:
    account = FakeAccount()
    keys(account)[0].present()
    for client in account.clients.values():
        client.calls.clear()
    return account


def test_a_key_is_predicted_made_and_left_alone() -> None:
    account = FakeAccount()
    one, changes = keys(account, check=True)
    assert one.present() == {"arns": {"c1": "<new KMS key alias/c1>"}}
    predicted = changes.actions
    assert account.keys == {}
    one, changes = keys(account)
    assert one.present() == {"arns": {"c1": f"arn:aws:kms:us-west-2:{ACCOUNT}:key/k1"}}
    assert changes.actions == predicted == ["create role AWSServiceRoleForAutoScaling", "create KMS key c1"]
    assert account.aliases == {"alias/c1": "k1"}
    assert account.keys["k1"]["rotation"]["KeyRotationEnabled"] is True
    account.clients["kms"].calls.clear()
    one, changes = keys(account)
    one.present()
    assert changes.actions == []
    assert [name for name, _ in account.clients["kms"].calls] == [
        *("describe_key", "list_resource_tags", "get_key_policy", "get_key_rotation_status")
    ]


def test_a_role_made_a_moment_ago_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    account = FakeAccount()
    account.unknown_role_answers = 2
    keys(account)[0].present()
    assert list(account.keys) == ["k1"]


def test_the_policy_lets_in_whom_it_names_and_no_others() -> None:
    account = made()
    policy = json.loads(account.keys["k1"]["policy"])
    statements = {one["Sid"]: one for one in policy["Statement"]}
    assert list(statements) == ["Administrators", "CloudWatchLogs", "AutoScaling", "AutoScalingDisks", "Volumes"]
    assert statements["Administrators"]["Principal"] == {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}
    assert statements["Volumes"]["Condition"]["StringEquals"]["kms:CallerAccount"] == ACCOUNT
    assert "ArnLike" not in statements["Volumes"]["Condition"]
    assert statements["CloudWatchLogs"]["Principal"] == {"Service": "logs.us-west-2.amazonaws.com"}


def test_volumes_are_for_the_roles_that_work_with_them() -> None:
    account = FakeAccount()
    keys(account, volume_roles=["c1-ebs-csi"])[0].present()
    (volumes,) = [one for one in json.loads(account.keys["k1"]["policy"])["Statement"] if one["Sid"] == "Volumes"]
    roles = [f"arn:aws:iam::{ACCOUNT}:role/c1-ebs-csi"]
    assert volumes["Condition"]["ArnLike"] == {"aws:PrincipalArn": roles}


def retag(account: FakeAccount, key_id: str, tags: Json) -> None:
    account.keys[key_id]["tags"] = [{"TagKey": key, "TagValue": value} for key, value in tags.items()]


def test_every_property_is_told_and_repaired() -> None:
    account = made()
    key = account.keys["k1"]
    key["meta"] |= {"KeyState": "Disabled", "Description": "?"}
    key["rotation"] = {"KeyRotationEnabled": False}
    policy = json.loads(key["policy"])
    del policy["Statement"][1]
    policy["Statement"].append({"Sid": "Stray", "Effect": "Allow", "Principal": "*", "Action": "*", "Resource": "*"})
    key["policy"] = json.dumps(policy)
    key["tags"] = [tag for tag in key["tags"] if tag["TagKey"] != "Team"]
    account.aliases = {}
    one, changes = keys(account)
    one.present()
    assert [action.split(" -> ")[0].removeprefix("update KMS key c1: ")[:22] for action in changes.actions] == [
        "state: Disabled",
        "policy Stray: {'Action",
        "policy CloudWatchLogs:",
        "description: ?",
        "rotation: off",
        "tag Team: absent",
        "alias points to: absen",
    ]
    one, changes = keys(account)
    one.present()
    assert changes.actions == []


def test_an_alias_that_points_elsewhere_comes_back() -> None:
    account = made()
    account.create("other", "{}", [])
    account.aliases["alias/c1"] = "k2"
    one, changes = keys(account)
    one.present()
    assert changes.actions == ["update KMS key c1: alias points to: k2 -> k1"]
    assert account.aliases == {"alias/c1": "k1"}


def test_an_interrupted_creation_is_continued() -> None:
    account = made()
    account.aliases = {}
    account.keys["k1"]["rotation"] = {"KeyRotationEnabled": False}
    keys(account)[0].present()
    assert list(account.keys) == ["k1"]
    assert account.aliases == {"alias/c1": "k1"}


def test_a_key_of_somebody_else_is_refused() -> None:
    account = made()
    retag(account, "k1", {"rayplane.io/cluster": "c2"})
    with pytest.raises(PlatformError, match=r"belongs to cluster c2, .*: choose another alias"):
        keys(account)[0].present()
    one, changes = keys(account)
    assert one.absent() == {"kept": []}
    assert changes.actions == []
    assert "belongs to cluster c2, and is left alone" in changes.warnings[0]


def test_a_destroyed_key_is_restored_and_not_doubled() -> None:
    account = made()
    one, changes = keys(account)
    assert one.absent() == {"kept": []}
    assert changes.actions == ["delete alias c1", "delete KMS key c1"]
    one, changes = keys(account)
    one.absent()
    assert changes.actions == []
    one, changes = keys(account)
    one.present()
    assert changes.actions == [
        "update KMS key c1: state: PendingDeletion -> Enabled",
        "update KMS key c1: alias points to: absent -> k1",
    ]
    assert list(account.keys) == ["k1"]


def test_a_key_that_encrypts_what_was_kept_is_kept() -> None:
    account = made()
    arn = account.keys["k1"]["meta"]["Arn"]
    account.encrypted = {"c1-models": arn}
    account.systems = [{"FileSystemId": "fs-1", "KmsKeyId": arn}, {"FileSystemId": "fs-2", "KmsKeyId": "other"}]
    one, changes = keys(account)
    assert one.absent() == {"kept": ["c1"]}
    assert changes.actions == []
    assert "bucket c1-models, file system fs-1;" in changes.warnings[0]
    account.encrypted, account.systems = {"c1-models": "another"}, []
    assert keys(account)[0].absent() == {"kept": []}


@pytest.mark.parametrize(
    ("kind", "item", "said"),
    [
        ("volumes", {"VolumeId": "vol-1", "State": "available"}, "volume vol-1"),
        ("snapshots", {"SnapshotId": "snap-1"}, "snapshot snap-1"),
        ("groups", {"logGroupName": "/aws/eks/c1/cluster"}, "log group /aws/eks/c1/cluster"),
    ],
)
def test_volumes_snapshots_and_logs_keep_their_key(kind: str, item: Json, said: str) -> None:
    account = made()
    arn = account.keys["k1"]["meta"]["Arn"]
    name = "kmsKeyId" if kind == "groups" else "KmsKeyId"
    setattr(account, kind, [{**item, name: arn}])
    for check in (True, False):
        one, changes = keys(account, check)
        assert one.absent() == {"kept": ["c1"]}
        assert changes.actions == []
        assert changes.warnings == [
            f"KMS key c1 is kept, because it encrypts {said}; it goes with a destroy after them"
        ]
    assert account.writes() == []
    # Another key's, or none's, is no reason.
    setattr(account, kind, [{**item, name: arn + "0"}, item])
    assert keys(account)[0].absent() == {"kept": []}


def test_what_a_key_encrypts_is_named_in_one_sentence() -> None:
    account = made()
    arn = account.keys["k1"]["meta"]["Arn"]
    account.volumes = [{"VolumeId": "vol-gone", "State": "deleting", "KmsKeyId": arn}]
    account.snapshots = [{"SnapshotId": f"snap-{number}", "KmsKeyId": arn} for number in range(12)]
    one, changes = keys(account)
    one.absent()
    assert "snapshot snap-9 and 2 more; it goes" in changes.warnings[0]
    assert "vol-gone" not in changes.warnings[0]


def test_a_service_that_does_not_tell_what_it_encrypts_ends_the_run() -> None:
    account = made()

    def refuse() -> Any:
        raise refusal("AccessDeniedException")

    account.clients["logs"].handlers["describe_log_groups"] = refuse
    with pytest.raises(PlatformError, match="the permission logs:DescribeLogGroups"):
        keys(account)[0].absent()
    assert account.writes() == []


@pytest.mark.parametrize("check", [False, True])
def test_a_key_made_by_hand_is_neither_taken_nor_deleted(check: bool) -> None:
    account = made()
    retag(account, "k1", {"Team": "y"})
    policy = account.keys["k1"]["policy"] = "{}"
    said = (
        r"alias/c1 is that of key k1, which bears no tag rayplane.io/cluster .*choose another alias"
        r" .*tag-resource --key-id k1 --tags TagKey=rayplane.io/cluster,TagValue=c1"
    )
    with pytest.raises(PlatformError, match=said):
        keys(account, check)[0].present()
    one, changes = keys(account, check)
    assert one.absent() == {"kept": []}
    assert changes.actions == []
    assert changes.warnings[0].startswith("alias/c1 is that of key k1, which bears no tag")
    assert account.writes() == [] and account.keys["k1"]["policy"] == policy
    # The cure.
    retag(account, "k1", {"rayplane.io/cluster": "c1"})
    one, changes = keys(account, check)
    one.present()
    assert "update KMS key c1: tag rayplane.io/role: absent -> c1" in changes.actions


def test_numbers_that_kms_refuses_are_refused() -> None:
    account = FakeAccount()
    with pytest.raises(PlatformError, match="rotates keys every 90 to 2560 days"):
        keys(account, rotation_days=30)[0].present()
    one, _ = keys(account)
    one.params["pending_days"] = 3
    with pytest.raises(PlatformError, match="after 7 to 30 days"):
        one.absent()
