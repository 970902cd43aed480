"""IAM roles and the filters that build their documents."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.filter.rayplane_iam import (
    aws_partition,
    aws_service_trust,
    bucket_reader_policy,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import aws_iam_roles
from aws_fake import FakeClient, refusal

READ_ONLY = "arn:aws:iam::aws:policy/ReadOnlyAccess"
ADMIN = "arn:aws:iam::aws:policy/AdministratorAccess"
TAGS = {"rayplane.io/cluster": "c1", "rayplane.io/region": "us-west-2"}


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


def test_documents_are_compared_by_meaning() -> None:
    one = {"Statement": [{"Action": ["b", "a"], "Resource": "*"}]}
    assert aws_iam_roles.canonical(one) == aws_iam_roles.canonical(
        {"Statement": {"Action": ["a", "b"], "Resource": ["*"]}}
    )


class FakeIam:
    """An account with one role."""

    def __init__(self, exists: bool = True) -> None:
        self.exists = exists
        self.tags: dict[str, str] = dict(TAGS)
        self.below: list[str] = []
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
            list_roles=lambda PathPrefix: {"Roles": [{"RoleName": name} for name in self.below]},
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
        tags = [{"Key": key, "Value": value} for key, value in self.tags.items()]
        return {"Role": {"Arn": "arn:r", "AssumeRolePolicyDocument": self.trust, "Tags": tags}}


def roles(fake: FakeIam, check: bool = False, prune_path: str = "", **role: Any) -> tuple[aws_iam_roles.Roles, Changes]:
    changes = Changes(check)
    wanted = {
        "name": "r",
        "state": "present",
        "path": "/",
        "description": "",
        "trust": aws_service_trust("ec2.amazonaws.com"),
        "managed_policies": [READ_ONLY],
        "kept_policies": [],
        "inline_policies": {"read": {"Statement": []}},
        "boundary": "",
        **role,
    }
    return aws_iam_roles.Roles(
        {"cluster_name": "c1", "roles": [wanted], "prune_path": prune_path, "tags": {}},
        "us-west-2",
        Api(fake.client, changes),
        changes,
    ), changes


def test_roles_are_predicted_with_their_inline_policies() -> None:
    fake = FakeIam(exists=False)
    reconciler, changes = roles(fake, check=True)
    assert reconciler.present() == {"arns": {"r": "<new role r>"}, "kept": []}
    assert "read" in changes.result()["diff"][0]["after"]["inline_policies"]
    assert changes.result()["diff"][0]["after"]["tags"] == TAGS
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


def test_a_policy_that_somebody_still_needs_stays() -> None:
    fake = FakeIam()
    fake.attached = {READ_ONLY, ADMIN}
    reconciler, changes = roles(fake, kept_policies=[ADMIN])
    assert reconciler.present()["kept"] == ["r"]
    assert changes.actions == []


def test_roles_lose_their_policies_before_they_go() -> None:
    fake = FakeIam()
    reconciler, _ = roles(fake)
    reconciler.absent()
    assert [name for name, _ in fake.client.writes()] == ["detach_role_policy", "delete_role_policy", "delete_role"]


def test_a_name_too_long_for_iam_is_refused() -> None:
    reconciler, _ = roles(FakeIam(), name="r" * 65)
    with pytest.raises(PlatformError, match="IAM allows 64"):
        reconciler.present()


def test_nothing_to_do_reads_each_role_once() -> None:
    fake = FakeIam()
    reconciler, _ = roles(fake)
    reconciler.present()
    assert sorted(name for name, _ in fake.client.calls) == [
        "get_role",
        "get_role_policy",
        "list_attached_role_policies",
        "list_role_policies",
    ]


def test_a_role_that_is_switched_off_goes() -> None:
    fake = FakeIam()
    reconciler, changes = roles(fake, state="absent")
    assert reconciler.present() == {"arns": {}, "kept": []}
    assert changes.actions == ["delete role r"]
    fake.exists = False
    reconciler, changes = roles(fake, state="absent")
    reconciler.present()
    assert changes.actions == []


def test_another_clusters_role_is_neither_taken_nor_deleted() -> None:
    fake = FakeIam()
    fake.tags = {**TAGS, "rayplane.io/cluster": "c2", "rayplane.io/region": "eu-west-1"}
    reconciler, _ = roles(fake)
    with pytest.raises(PlatformError, match="belongs to cluster c2"):
        reconciler.present()
    reconciler, changes = roles(fake)
    reconciler.absent()
    assert changes.actions == []
    assert changes.warnings == ["role r belongs to cluster c2 by its tag rayplane.io/cluster, and is left alone"]
    assert fake.client.writes() == []


@pytest.mark.parametrize("check", [False, True])
def test_a_role_made_by_hand_is_neither_taken_nor_deleted(check: bool) -> None:
    fake = FakeIam()
    fake.tags = {"Team": "x"}
    with pytest.raises(PlatformError, match=r"(?s)role r is there already and bears no tag .*aws iam tag-role"):
        roles(fake, check)[0].present()
    # Switched off by an ordinary deployment, taken apart by destroying, below the path of the cluster's own.
    for reconciler, changes in (roles(fake, check, state="absent"), roles(fake, check)):
        if reconciler.params["roles"][0]["state"] == "absent":
            assert reconciler.present() == {"arns": {}, "kept": []}
        else:
            reconciler.absent()
        assert changes.actions == []
        assert changes.warnings == ["role r bears no tag rayplane.io/cluster=c1, and is left alone"]
    fake.below = ["stray"]
    reconciler, changes = roles(fake, check, prune_path="/rayplane/c1/")
    reconciler.absent()
    assert changes.actions == [] and len(changes.warnings) == 2
    assert fake.client.writes() == []


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("state", ["present", "absent"])
def test_a_role_of_the_same_cluster_in_another_region_ends_the_run(state: str, check: bool) -> None:
    fake = FakeIam()
    fake.tags["rayplane.io/region"] = "eu-west-1"
    fake.attached = {ADMIN}
    reconciler, changes = roles(fake, check, state=state)
    said = r"c1 in eu-west-1 .*this run is for us-west-2: no role was touched. Set platform_region to eu-west-1"
    for act in (reconciler.present, reconciler.absent):
        with pytest.raises(PlatformError, match=said):
            act()
    assert changes.actions == []
    assert fake.client.writes() == []


def test_the_region_is_looked_at_before_anything_is_deleted() -> None:
    fake = FakeIam()
    fake.below = ["elsewhere"]
    get = fake.get_role

    def get_role(RoleName: str) -> Any:
        fake.tags = {**TAGS, "rayplane.io/region": "eu-west-1"} if RoleName == "elsewhere" else TAGS
        return get()

    fake.client.handlers["get_role"] = get_role
    for act in ("present", "absent"):
        with pytest.raises(PlatformError, match="role elsewhere is that of the cluster c1 in eu-west-1"):
            getattr(roles(fake, prune_path="/rayplane/c1/", state="absent")[0], act)()
    assert fake.client.writes() == []


def test_a_role_of_an_earlier_version_gets_its_region_and_counts_as_ours() -> None:
    fake = FakeIam()
    del fake.tags["rayplane.io/region"]
    reconciler, changes = roles(fake)
    reconciler.present()
    assert changes.actions == ["update role r: tag rayplane.io/region: absent -> us-west-2"]
    assert fake.client.writes() == [
        ("tag_role", {"RoleName": "r", "Tags": [{"Key": "rayplane.io/region", "Value": "us-west-2"}]})
    ]
    reconciler, changes = roles(fake)
    reconciler.absent()
    assert changes.actions == ["delete role r"]


def test_roles_of_a_path_that_are_not_listed_go() -> None:
    fake = FakeIam()
    fake.below = ["r", "former"]
    reconciler, changes = roles(fake, prune_path="/rayplane/c1/")
    reconciler.present()
    assert changes.actions == ["delete role former"]
    reconciler, _ = roles(fake, prune_path="/")
    with pytest.raises(PlatformError, match="whole account"):
        reconciler.present()


def test_a_role_is_made_below_its_path_and_not_moved() -> None:
    fake = FakeIam(exists=False)
    roles(fake, path="/rayplane/c1/")[0].present()
    assert fake.client.writes()[0][1]["Path"] == "/rayplane/c1/"
    fake = FakeIam()
    get = fake.get_role
    fake.client.handlers["get_role"] = lambda **given: {"Role": {**get(**given)["Role"], "Path": "/"}}
    with pytest.raises(PlatformError, match="IAM cannot move it"):
        roles(fake, path="/rayplane/c1/")[0].present()
