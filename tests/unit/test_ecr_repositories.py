"""Image repositories on AWS: made, repaired, refused to others, and removed with their images."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import ecr_repositories
from aws_fake import FakeClient, refusal

NAME = "c1/gateway"


class FakeAccount:
    """The repositories of an account, by name, as ECR describes them."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.policies: dict[str, str] = {}
        self.client = FakeClient(
            "ecr",
            describe_repositories=lambda repositoryNames: {"repositories": [self._get(repositoryNames[0])]},
            list_tags_for_resource=lambda resourceArn: {
                "tags": [{"Key": key, "Value": value} for key, value in self.tags[resourceArn].items()]
            },
            create_repository=self._create,
            put_lifecycle_policy=lambda repositoryName, lifecyclePolicyText: self.policies.update(
                {repositoryName: lifecyclePolicyText}
            ),
            get_lifecycle_policy=self._policy,
            put_image_tag_mutability=lambda repositoryName, **given: self.found[repositoryName].update(given),
            put_image_scanning_configuration=lambda repositoryName, **given: self.found[repositoryName].update(given),
            tag_resource=self._tag,
            delete_repository=lambda repositoryName, force: self.found.pop(repositoryName),
        )

    def _get(self, name: str) -> dict[str, Any]:
        if name not in self.found:
            raise refusal("RepositoryNotFoundException")
        return self.found[name]

    def _create(self, repositoryName: str, tags: Any, **given: Any) -> Any:
        self.found[repositoryName] = {"repositoryArn": f"arn:{repositoryName}", **given}
        self._tag(f"arn:{repositoryName}", tags)

    def _tag(self, resourceArn: str, tags: Any) -> None:
        self.tags.setdefault(resourceArn, {}).update({tag["Key"]: tag["Value"] for tag in tags})

    def _policy(self, repositoryName: str) -> Any:
        if repositoryName not in self.policies:
            raise refusal("LifecyclePolicyNotFoundException")
        return {"lifecyclePolicyText": self.policies[repositoryName]}


def run(account: FakeAccount, check: bool = False, **params: Any) -> Changes:
    """Reconcile once; a fresh call as Ansible would make it."""
    changes = Changes(check)
    given = {
        "cluster_name": "c1",
        "repositories": [NAME],
        "state": "present",
        "scan_on_push": True,
        "untagged_days": 7,
        "keep_images": 50,
        "kms_key": "arn:key",
        "tags": {"Project": "p"},
        **params,
    }
    account.client.calls.clear()
    repositories = ecr_repositories.Repositories(given, Api(account.client, changes), changes)
    repositories.present() if given["state"] == "present" else repositories.absent()
    return changes


@pytest.fixture
def account() -> FakeAccount:
    return FakeAccount()


def test_a_repository_is_planned_made_and_left_alone(account: FakeAccount) -> None:
    assert run(account, check=True).actions == [f"create repository {NAME}"]
    assert account.found == {}
    assert run(account).actions == [f"create repository {NAME}"]
    made = account.found[NAME]
    assert made["imageTagMutability"] == "IMMUTABLE"
    assert made["imageScanningConfiguration"] == {"scanOnPush": True}
    assert made["encryptionConfiguration"] == {"encryptionType": "KMS", "kmsKey": "arn:key"}
    assert account.tags[f"arn:{NAME}"] == {"Project": "p", "rayplane.io/cluster": "c1"}
    untagged, others = json.loads(account.policies[NAME])["rules"]
    assert (untagged["selection"]["countNumber"], others["selection"]["countNumber"]) == (7, 50)
    again = run(account)
    assert (again.actions, again.warnings, account.client.writes()) == ([], [], [])


@pytest.mark.parametrize(
    ("property_", "change"),
    [
        ("tag mutability", lambda account: account.found[NAME].update(imageTagMutability="MUTABLE")),
        ("scan on push", lambda account: account.found[NAME].pop("imageScanningConfiguration")),
        ("lifecycle policy", lambda account: account.policies.clear()),
        ("tag Project", lambda account: account.tags[f"arn:{NAME}"].pop("Project")),
    ],
)
def test_what_somebody_changed_is_repaired(account: FakeAccount, property_: str, change: Any) -> None:
    run(account)
    change(account)
    planned = run(account, check=True).actions
    assert len(planned) == 1 and planned[0].startswith(f"update repository {NAME}: {property_}: ")
    assert run(account).actions == planned
    assert run(account).actions == []


def test_encryption_stays_as_it_was_made(account: FakeAccount) -> None:
    run(account)
    changes = run(account, kms_key="")
    assert changes.actions == [] and "stays encrypted with arn:key" in changes.warnings[0]


def test_a_repository_of_others_is_refused_and_not_deleted(account: FakeAccount) -> None:
    run(account)
    with pytest.raises(PlatformError, match=r"without the tag rayplane.io/cluster=c2: repository c1/gateway"):
        run(account, cluster_name="c2")
    assert run(account, cluster_name="c2", state="absent").actions == []
    assert run(account, state="absent", repositories=[NAME, "c1/ray"]).actions == [f"delete repository {NAME}"]
    assert account.found == {}
    assert run(account, state="absent").actions == []
