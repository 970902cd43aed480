"""IAM roles, buckets and the filters that build their documents."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
import json
from typing import Any

import aws_buckets
import aws_iam_roles
import pytest
from ansible.module_utils.rayplane_aws import Api, Changes, PlatformError
from aws_fake import FakeClient, refusal
from rayplane_iam import aws_partition, aws_service_trust, bucket_lifecycle, bucket_reader_policy

READ_ONLY = "arn:aws:iam::aws:policy/ReadOnlyAccess"
ADMIN = "arn:aws:iam::aws:policy/AdministratorAccess"


def test_partitions() -> None:
    assert [aws_partition(region) for region in ("us-west-2", "cn-north-1", "us-gov-west-1")] == [
        "aws",
        "aws-cn",
        "aws-us-gov",
    ]


def test_pod_identity_may_tag_its_sessions() -> None:
    assert aws_service_trust("pods.eks.amazonaws.com")["Statement"][0]["Action"] == ["sts:AssumeRole", "sts:TagSession"]
    assert aws_service_trust("ec2.amazonaws.com")["Statement"][0]["Action"] == ["sts:AssumeRole"]


def test_the_reader_reads_one_prefix_and_nothing_else() -> None:
    policy = bucket_reader_policy("b", "models", kms_key_arn="arn:key")
    actions = {action: one["Resource"] for one in policy["Statement"] for action in one["Action"]}
    assert actions == {
        "s3:GetBucketLocation": "arn:aws:s3:::b",
        "s3:ListBucket": "arn:aws:s3:::b",
        "s3:GetObject": "arn:aws:s3:::b/models/*",
        "kms:Decrypt": "arn:key",
    }
    assert "kms:Decrypt" not in str(bucket_reader_policy("b", "models"))


def test_lifecycle_rules() -> None:
    assert [rule["ID"] for rule in bucket_lifecycle(30, 7)] == ["drop-old-versions", "drop-unfinished-uploads"]
    assert bucket_lifecycle(0, 0) == []


def test_documents_are_compared_by_meaning() -> None:
    one = {"Statement": [{"Action": ["b", "a"], "Resource": "*"}]}
    assert aws_iam_roles.canonical(one) == aws_iam_roles.canonical(
        {"Statement": {"Action": ["a", "b"], "Resource": ["*"]}}
    )


class FakeIam:
    """An account with one role."""

    def __init__(self, exists: bool = True) -> None:
        self.exists = exists
        self.attached = {READ_ONLY}
        self.inline: dict[str, Any] = {"read": {"Statement": []}}
        self.trust = aws_service_trust("ec2.amazonaws.com")
        self.client = FakeClient(
            "iam",
            get_role=self.get_role,
            list_attached_role_policies=lambda **_: {"AttachedPolicies": [{"PolicyArn": arn} for arn in self.attached]},
            list_role_policies=lambda **_: {"PolicyNames": list(self.inline)},
            list_instance_profiles_for_role=lambda **_: {"InstanceProfiles": []},
            get_role_policy=lambda PolicyName, **_: {"PolicyDocument": self.inline[PolicyName]},
            **dict.fromkeys(
                (
                    "create_role",
                    "delete_role",
                    "attach_role_policy",
                    "detach_role_policy",
                    "put_role_policy",
                    "delete_role_policy",
                    "update_assume_role_policy",
                    "tag_role",
                ),
                lambda **_: {"Role": {"Arn": "arn:r"}},
            ),
        )

    def get_role(self, **_: Any) -> Any:
        if not self.exists:
            raise refusal("NoSuchEntity")
        tags = [{"Key": "rayplane.io/cluster", "Value": "c1"}]
        return {"Role": {"Arn": "arn:r", "AssumeRolePolicyDocument": self.trust, "Tags": tags}}


def roles(fake: FakeIam, check: bool = False, **role: Any) -> tuple[aws_iam_roles.Roles, Changes]:
    changes = Changes(check)
    wanted = {
        "name": "r",
        "description": "",
        "trust": aws_service_trust("ec2.amazonaws.com"),
        "managed_policies": [READ_ONLY],
        "inline_policies": {"read": {"Statement": []}},
        "boundary": "",
        **role,
    }
    return aws_iam_roles.Roles(
        {"cluster_name": "c1", "roles": [wanted], "tags": {}}, Api(fake.client, changes), changes
    ), changes


def test_roles_are_predicted_with_their_inline_policies() -> None:
    fake = FakeIam(exists=False)
    reconciler, changes = roles(fake, check=True)
    assert reconciler.present() == {"arns": {"r": "<new role r>"}}
    assert "read" in changes.result()["diff"][0]["after"]["inline_policies"]
    assert fake.client.writes() == []


def test_roles_are_repaired_by_property() -> None:
    reconciler, changes = roles(FakeIam())
    reconciler.present()
    assert changes.actions == []
    fake = FakeIam()
    fake.attached = {ADMIN}
    fake.inline = {"stray": {}}
    fake.trust = aws_service_trust("lambda.amazonaws.com")
    reconciler, changes = roles(fake)
    reconciler.present()
    assert [action.removeprefix("update role r: ").split(": ")[0] for action in changes.actions] == [
        "trust",
        f"policy {READ_ONLY}",
        f"policy {ADMIN}",
        "policy read",
        "policy stray",
    ]


def test_roles_lose_their_policies_before_they_go() -> None:
    fake = FakeIam()
    reconciler, _ = roles(fake)
    reconciler.absent()
    assert [name for name, _ in fake.client.writes()] == ["detach_role_policy", "delete_role_policy", "delete_role"]


def test_a_name_too_long_for_iam_is_refused() -> None:
    reconciler, _ = roles(FakeIam(), name="r" * 65)
    with pytest.raises(PlatformError, match="IAM allows 64"):
        reconciler.present()


class FakeS3:
    """An account with one bucket."""

    def __init__(self, **state: Any) -> None:
        self.state = {"exists": True, "versions": [], "versioning": "Enabled", "policy": None, "head": None, **state}
        noop = dict.fromkeys(
            (
                "create_bucket",
                "put_bucket_versioning",
                "put_bucket_encryption",
                "put_public_access_block",
                "put_bucket_policy",
                "put_bucket_lifecycle_configuration",
                "put_bucket_tagging",
                "delete_bucket",
            ),
            lambda **_: {},
        )
        self.client = FakeClient(
            "s3",
            head_bucket=self.head,
            get_bucket_encryption=lambda **_: {
                "ServerSideEncryptionConfiguration": {
                    "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
                }
            },
            get_bucket_policy=self.policy,
            get_public_access_block=lambda **_: {"PublicAccessBlockConfiguration": aws_buckets.BLOCK},
            get_bucket_versioning=lambda **_: {"Status": self.state["versioning"]},
            get_bucket_lifecycle_configuration=lambda **_: {},
            get_bucket_tagging=lambda **_: {
                "TagSet": [{"Key": "mine", "Value": "x"}, {"Key": "rayplane.io/cluster", "Value": "c1"}]
            },
            list_object_versions=lambda **_: {"Versions": self.state["versions"]},
            list_multipart_uploads=lambda **_: {},
            delete_objects=self.delete_objects,
            **noop,
        )

    def head(self, **_: Any) -> Any:
        if self.state["head"] or not self.state["exists"]:
            raise refusal(self.state["head"] or "404")
        return {}

    def policy(self, **_: Any) -> Any:
        if self.state["policy"] is None:
            raise refusal("NoSuchBucketPolicy")
        return {"Policy": json.dumps(self.state["policy"])}

    def delete_objects(self, **_: Any) -> Any:
        self.state["versions"] = []
        return {}


def buckets(
    fake: FakeS3, check: bool = False, destroy: bool = False, **bucket: Any
) -> tuple[aws_buckets.Buckets, Changes]:
    changes = Changes(check)
    wanted = {
        "name": "b",
        "versioning": True,
        "kms_key_id": "",
        "tls_only": False,
        "policy_statements": [],
        "lifecycle": [],
    }
    params = {"cluster_name": "c1", "buckets": [{**wanted, **bucket}], "tags": {}, "destroy_data": destroy}
    return aws_buckets.Buckets(params, "us-west-2", Api(fake.client, changes), changes), changes


def test_buckets_are_made_closed() -> None:
    fake = FakeS3(exists=False)
    reconciler, changes = buckets(fake, tls_only=True)
    reconciler.present()
    assert changes.actions == ["create bucket b"]
    calls = dict(fake.client.writes())
    assert calls["create_bucket"]["CreateBucketConfiguration"] == {"LocationConstraint": "us-west-2"}
    assert json.loads(calls["put_bucket_policy"]["Policy"])["Statement"][0]["Effect"] == "Deny"
    assert "put_public_access_block" in calls


def test_buckets_are_repaired_by_property_and_foreign_tags_stay() -> None:
    fake = FakeS3(versioning="Suspended")
    reconciler, changes = buckets(fake)
    reconciler.present()
    assert changes.actions == ["update bucket b: versioning: Suspended -> Enabled"]
    assert [name for name, _ in fake.client.writes()] == ["put_bucket_versioning"]


def test_a_bucket_of_somebody_else_is_explained() -> None:
    reconciler, _ = buckets(FakeS3(head="403"))
    with pytest.raises(PlatformError, match="bucket names are shared by all of AWS"):
        reconciler.present()


def test_data_is_kept_unless_told() -> None:
    fake = FakeS3(versions=[{"Key": "k", "VersionId": "1"}])
    reconciler, changes = buckets(fake)
    assert reconciler.absent() == {"kept": ["b"]}
    assert changes.actions == []
    assert "storage_destroy_data" in changes.warnings[0]
    reconciler, changes = buckets(fake, check=True, destroy=True)
    reconciler.absent()
    assert changes.actions == ["delete bucket b"]
    assert fake.client.writes() == []
    reconciler, _ = buckets(fake, destroy=True)
    assert reconciler.absent() == {"kept": []}
    assert [name for name, _ in fake.client.writes()] == ["delete_objects", "delete_bucket"]
