"""Service-linked roles: made where the account has none, and shared by the clusters in it."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import aws_service_linked_roles
from aws_fake import FakeClient, refusal

SPOT = "spot.amazonaws.com"
SAID = [f"create service-linked role of {SPOT}"]


class FakeIam:
    """An account's roles by their path."""

    def __init__(self, *paths: str) -> None:
        self.paths = list(paths)
        self.client = FakeClient(
            "iam",
            list_roles=lambda PathPrefix: {"Roles": [{"Path": one} for one in self.paths if one == PathPrefix]},
            create_service_linked_role=lambda AWSServiceName: self.paths.append(f"/aws-service-role/{AWSServiceName}/"),
        )


def ensure(iam: FakeIam, check: bool = False) -> Changes:
    changes = Changes(check)
    aws_service_linked_roles.ensure([SPOT], Api(iam.client, changes), changes)
    return changes


def test_it_is_predicted_made_and_left_alone() -> None:
    iam = FakeIam("/aws-service-role/autoscaling.amazonaws.com/", "/")
    assert ensure(iam, check=True).actions == SAID
    assert iam.client.writes() == []
    assert ensure(iam).actions == SAID
    assert iam.client.writes() == [("create_service_linked_role", {"AWSServiceName": SPOT})]
    assert ensure(iam).actions == []


def test_a_run_beside_this_one_may_have_made_it() -> None:
    def taken(**_: Any) -> Any:
        raise refusal("InvalidInput", "Service role name AWSServiceRoleForEC2Spot has been taken in this account")

    iam = FakeIam()
    iam.client.handlers["create_service_linked_role"] = taken
    assert ensure(iam).actions == SAID


def test_who_may_not_make_it_is_told() -> None:
    def denied(**_: Any) -> Any:
        raise refusal("AccessDenied")

    iam = FakeIam()
    iam.client.handlers["create_service_linked_role"] = denied
    with pytest.raises(PlatformError, match="give the deploying principal the permission iam:CreateServiceLinkedRole"):
        ensure(iam)
