"""Add-ons: versions pinned or EKS's choice, upgraded with the cluster, purged when ours and no longer listed."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import eks_addons
import pytest
from ansible.module_utils.rayplane_aws import Api, Changes, PlatformError
from aws_fake import Clock, FakeClient, refusal


def addon(name: str = "coredns", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": "",
        "configuration": {},
        "role_arn": "",
        "pod_identities": [],
        "resolve_conflicts": "OVERWRITE",
        **changes,
    }


class FakeEks:
    """A cluster with add-ons."""

    def __init__(self) -> None:
        self.version = "1.34"
        self.nodes = ["cpu"]
        self.addons: dict[str, dict[str, Any]] = {}
        self.client = FakeClient(
            "eks",
            describe_cluster=lambda **_: {"cluster": {"version": self.version, "status": "ACTIVE"}},
            list_addons=lambda **_: {"addons": list(self.addons)},
            list_nodegroups=lambda **_: {"nodegroups": self.nodes},
            describe_addon=self.describe_addon,
            create_addon=self.create_addon,
            update_addon=self.update_addon,
            delete_addon=lambda addonName, **_: self.addons.pop(addonName),
            describe_update=lambda **_: {"update": {"status": "Successful", "type": "AddonUpdate"}},
            describe_addon_versions=self.describe_addon_versions,
            tag_resource=lambda resourceArn, tags: self.addons[resourceArn]["tags"].update(tags),
        )

    def describe_addon(self, addonName: str, **_: Any) -> Any:
        if addonName not in self.addons:
            raise refusal("ResourceNotFoundException")
        return {"addon": self.addons[addonName]}

    def create_addon(self, **given: Any) -> Any:
        name = given["addonName"]
        self.addons[name] = {"addonVersion": "v1-eks", **given, "addonArn": name, "status": "ACTIVE"}
        return {"addon": self.addons[name]}

    def update_addon(self, addonName: str, **given: Any) -> Any:
        self.addons[addonName].update(given)
        return {"update": {"id": "u1", "status": "InProgress"}}

    def describe_addon_versions(self, **_: Any) -> Any:
        versions = [
            {"addonVersion": "v3", "compatibilities": [{"defaultVersion": False}]},
            {"addonVersion": "v2", "compatibilities": [{"defaultVersion": True}]},
        ]
        return {"addons": [{"addonVersions": versions}]}


def converge(eks: FakeEks, *addons: dict[str, Any], check: bool = False) -> Changes:
    changes = Changes(check)
    given = {
        "cluster_name": "c1",
        "addons": list(addons),
        "role_arns": {"csi": "arn:aws:iam::1:role/csi"},
        "tags": {},
        "purge": True,
        "kubernetes_version": "",
        "wait_timeout": 60,
    }
    eks_addons.Addons(given, Api(eks.client, changes), changes).reconcile()
    return changes


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_set_is_made_once_and_then_left_alone() -> None:
    eks = FakeEks()
    wanted = (
        addon(configuration={"replicaCount": 3}),
        addon("csi", pod_identities=[{"service_account": "a", "role_arn": "csi"}]),
    )
    assert converge(eks, *wanted, check=True).actions == ["create add-on coredns", "create add-on csi"]
    assert eks.client.writes() == []
    converge(eks, *wanted)
    assert eks.addons["csi"]["podIdentityAssociations"] == [
        {"serviceAccount": "a", "roleArn": "arn:aws:iam::1:role/csi"}
    ]
    assert converge(eks, *wanted).actions == []


def test_a_removed_addon_comes_back() -> None:
    eks = FakeEks()
    converge(eks, addon(), addon("csi"))
    del eks.addons["coredns"]
    assert converge(eks, addon(), addon("csi")).actions == ["create add-on coredns"]


def test_eks_choice_moves_only_with_the_cluster() -> None:
    eks = FakeEks()
    converge(eks, addon())
    assert converge(eks, addon()).actions == []
    eks.version = "1.35"
    assert converge(eks, addon()).actions == [
        "update add-on coredns: version: v1-eks -> v2",
        "update add-on coredns: tag rayplane.io/kubernetes-version: 1.34 -> 1.35",
    ]
    assert converge(eks, addon()).actions == []


def test_a_pinned_version_and_configuration_are_repaired() -> None:
    eks = FakeEks()
    converge(eks, addon(version="v9", configuration={"a": 1}))
    eks.addons["coredns"].update(addonVersion="v8", configurationValues='{"a": 2}')
    assert converge(eks, addon(version="v9", configuration={"a": 1})).actions == [
        "update add-on coredns: version: v8 -> v9",
        "update add-on coredns: configuration: {'a': 2} -> {'a': 1}",
    ]


def test_only_own_addons_are_purged() -> None:
    eks = FakeEks()
    converge(eks, addon(), addon("csi"))
    eks.addons["foreign"] = {"addonArn": "foreign", "status": "ACTIVE", "tags": {}}
    assert converge(eks, addon()).actions == ["delete add-on csi"]
    assert sorted(eks.addons) == ["coredns", "foreign"]


def test_without_nodes_nothing_is_waited_for(clock: Clock) -> None:
    eks = FakeEks()
    eks.nodes = []
    create = eks.create_addon
    eks.client.handlers["create_addon"] = lambda **given: create(**given)["addon"].update(status="CREATING")
    converge(eks, addon())
    assert clock.now == 0
    eks.nodes = ["cpu"]
    with pytest.raises(PlatformError, match="status CREATING"):
        converge(eks, addon())


def test_a_role_nobody_knows_is_refused() -> None:
    with pytest.raises(PlatformError, match="'typo' is neither an ARN nor one of the roles made here: csi"):
        converge(FakeEks(), addon(pod_identities=[{"service_account": "a", "role_arn": "typo"}]))


def test_a_name_given_twice_is_refused_before_anything_is_asked_for() -> None:
    eks = FakeEks()
    with pytest.raises(PlatformError, match="named twice: coredns"):
        converge(eks, addon(), addon())
    assert eks.client.calls == []


def test_a_cluster_that_does_not_exist_is_told_from_other_troubles() -> None:
    def missing(**_: Any) -> Any:
        raise refusal("ResourceNotFoundException")

    def denied(**_: Any) -> Any:
        raise refusal("AccessDeniedException")

    eks = FakeEks()
    eks.client.handlers["list_addons"] = eks.client.handlers["describe_cluster"] = missing
    assert converge(eks, addon(), check=True).actions == ["create add-on coredns"]
    with pytest.raises(PlatformError, match="cluster c1 does not exist"):
        converge(eks, addon())
    eks.client.handlers["list_addons"] = denied
    with pytest.raises(PlatformError, match="eks:ListAddons failed"):
        converge(eks, addon(), check=True)
