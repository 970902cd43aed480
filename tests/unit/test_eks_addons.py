"""Add-ons: versions pinned or EKS's choice, upgraded with the cluster, purged when ours and no longer listed."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import eks_addons
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
        self.nodes = {"cpu": 2}
        self.addons: dict[str, dict[str, Any]] = {}
        #: Pod identity associations by their number: service account and role.
        self.associations: dict[str, tuple[str, str]] = {}
        self.client = FakeClient(
            "eks",
            describe_cluster=lambda **_: {"cluster": {"version": self.version, "status": "ACTIVE"}},
            list_addons=lambda **_: {"addons": list(self.addons)},
            list_nodegroups=lambda **_: {"nodegroups": list(self.nodes)},
            describe_nodegroup=lambda nodegroupName, **_: {
                "nodegroup": {"status": "ACTIVE", "scalingConfig": {"desiredSize": self.nodes[nodegroupName]}}
            },
            describe_pod_identity_association=self.describe_association,
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
        self.associate(name, given.get("podIdentityAssociations", []))
        return {"addon": self.addons[name]}

    def associate(self, name: str, wanted: list[dict[str, str]]) -> None:
        """Own the associations, and describe them by ARN, as EKS does."""
        arns = []
        for one in wanted:
            number = f"a-{len(self.associations)}"
            self.associations[number] = (one["serviceAccount"], one["roleArn"])
            arns.append(f"arn:aws:eks:us-west-2:1:podidentityassociation/c1/{number}")
        self.addons[name]["podIdentityAssociations"] = arns

    def describe_association(self, associationId: str, **_: Any) -> Any:
        if associationId not in self.associations:
            raise refusal("ResourceNotFoundException")
        account, role = self.associations[associationId]
        return {"association": {"serviceAccount": account, "roleArn": role}}

    def roles(self, name: str) -> dict[str, str]:
        """Roles of an add-on's service accounts."""
        numbers = [arn.rpartition("/")[2] for arn in self.addons[name]["podIdentityAssociations"]]
        return dict(self.associations[number] for number in numbers)

    def update_addon(self, addonName: str, **given: Any) -> Any:
        associations = given.pop("podIdentityAssociations", None)
        self.addons[addonName].update(given)
        if associations is not None:
            self.associate(addonName, associations)
        return {"update": {"id": "u1", "status": "InProgress"}}

    def describe_addon_versions(self, **_: Any) -> Any:
        versions = [
            {"addonVersion": "v3", "compatibilities": [{"defaultVersion": False}]},
            {"addonVersion": "v2", "compatibilities": [{"defaultVersion": True}]},
        ]
        return {"addons": [{"addonVersions": versions}]}


def converge(eks: FakeEks, *addons: dict[str, Any], check: bool = False, **params: Any) -> Changes:
    return facts(eks, *addons, check=check, **params)[1]


def facts(eks: FakeEks, *addons: dict[str, Any], check: bool = False, **params: Any) -> tuple[dict[str, Any], Changes]:
    changes = Changes(check)
    given = {
        "cluster_name": "c1",
        "addons": list(addons),
        "role_arns": {"csi": "arn:aws:iam::1:role/csi", "other": "arn:aws:iam::1:role/other"},
        "tags": {},
        "purge": True,
        "kubernetes_version": "",
        "wait_for": [],
        "wait_timeout": 60,
        **params,
    }
    return eks_addons.Addons(given, Api(eks.client, changes), changes).reconcile(), changes


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
    assert eks.roles("csi") == {"a": "arn:aws:iam::1:role/csi"}
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


@pytest.mark.parametrize(
    "held",
    ['{"a": {"b": 1}, "c": "x"}', '{\n\t"c": "x",\n\t"a": {"b": 1}\n}', "a:\n  b: 1\nc: x\n", "{a: {b: 1}, c: x}"],
)
def test_settings_are_read_in_either_language_of_eks(held: str) -> None:
    eks = FakeEks()
    wanted = {"a": {"b": 1}, "c": "x"}
    converge(eks, addon(configuration=wanted))
    eks.addons["coredns"]["configurationValues"] = held
    assert converge(eks, addon(configuration=wanted)).actions == []


@pytest.mark.parametrize("held", ["a: 2", "no mapping", "a: [unfinished"])
def test_settings_that_differ_are_replaced_whatever_their_language(held: str) -> None:
    eks = FakeEks()
    converge(eks, addon(configuration={"a": 1}))
    eks.addons["coredns"]["configurationValues"] = held
    (action,) = converge(eks, addon(configuration={"a": 1})).actions
    assert action.startswith("update add-on coredns: configuration: ") and action.endswith(" -> {'a': 1}")
    assert eks.addons["coredns"]["configurationValues"] == '{"a": 1}'


def identities(**roles: str) -> dict[str, Any]:
    """The add-on with service accounts and their roles."""
    return addon("csi", pod_identities=[{"service_account": name, "role_arn": role} for name, role in roles.items()])


def test_roles_of_service_accounts_are_compared_and_repaired_one_by_one() -> None:
    eks = FakeEks()
    converge(eks, identities(a="csi", b="csi"))
    (number, *_) = eks.associations
    eks.associations[number] = ("a", "arn:aws:iam::1:role/by-hand")
    said = ["update add-on csi: pod identity a: arn:aws:iam::1:role/by-hand -> arn:aws:iam::1:role/csi"]
    assert converge(eks, identities(a="csi", b="csi"), check=True).actions == said
    assert eks.roles("csi")["a"] == "arn:aws:iam::1:role/by-hand"
    assert converge(eks, identities(a="csi", b="csi")).actions == said
    assert eks.roles("csi") == {"a": "arn:aws:iam::1:role/csi", "b": "arn:aws:iam::1:role/csi"}
    # As many as before, and yet others.
    assert converge(eks, identities(a="other", c="csi")).actions == [
        "update add-on csi: pod identity a: arn:aws:iam::1:role/csi -> arn:aws:iam::1:role/other",
        "update add-on csi: pod identity c: absent -> arn:aws:iam::1:role/csi",
        "update add-on csi: pod identity b: arn:aws:iam::1:role/csi -> absent",
    ]
    assert eks.roles("csi") == {"a": "arn:aws:iam::1:role/other", "c": "arn:aws:iam::1:role/csi"}
    assert converge(eks, identities(a="other", c="csi")).actions == []


def test_an_association_that_was_deleted_comes_back() -> None:
    eks = FakeEks()
    converge(eks, identities(a="csi"))
    eks.associations.clear()
    said = ["update add-on csi: pod identity a: absent -> arn:aws:iam::1:role/csi"]
    assert converge(eks, identities(a="csi")).actions == said
    assert converge(eks, identities()).actions == [
        "update add-on csi: pod identity a: arn:aws:iam::1:role/csi -> absent"
    ]
    assert eks.roles("csi") == {}


def creating(eks: FakeEks, status: str = "CREATING") -> None:
    """Let add-ons be made and not become active."""
    create = eks.create_addon
    eks.client.handlers["create_addon"] = lambda **given: create(**given)["addon"].update(status=status)


@pytest.mark.parametrize("nodes", [{}, {"gpu": 0}])
def test_without_nodes_nothing_is_waited_for(clock: Clock, nodes: dict[str, int]) -> None:
    eks = FakeEks()
    eks.nodes = nodes
    creating(eks)
    answer, _ = facts(eks, addon())
    assert clock.now == 0
    assert answer["pending"] == ["coredns"]
    # A run cut short here leaves it to the next.
    assert facts(eks, addon())[0]["pending"] == ["coredns"]
    eks.nodes = {"cpu": 2}
    with pytest.raises(PlatformError, match="coredns is CREATING"):
        converge(eks, addon())


def test_what_waited_for_nodes_is_looked_at_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    eks = FakeEks()
    eks.nodes = {}
    creating(eks)
    (name,) = facts(eks, addon())[0]["pending"]
    eks.nodes = {"cpu": 1}
    sleep = clock.sleep

    def wake(seconds: float) -> None:
        sleep(seconds)
        if clock.now > 5:
            eks.addons["coredns"]["status"] = "ACTIVE"

    monkeypatch.setattr("ansible_collections.rayplane.platform.plugins.module_utils.aws.core._sleep", wake)
    eks.client.calls.clear()
    answer, changes = facts(eks, wait_for=[name])
    assert 5 < clock.now < 60
    assert answer == {"addons": {"coredns": {"version": "v1-eks", "status": "ACTIVE"}}, "pending": []}
    assert changes.actions == [] and eks.client.writes() == []


def test_one_that_failed_on_the_nodes_fails_the_run() -> None:
    eks = FakeEks()
    eks.nodes = {}
    creating(eks, "CREATE_FAILED")
    assert facts(eks, addon())[0]["pending"] == ["coredns"]
    eks.addons["coredns"]["health"] = {"issues": [{"code": "ConfigurationConflict", "message": "conflicts found"}]}
    for nodes in ({}, {"cpu": 1}):
        eks.nodes = nodes
        with pytest.raises(PlatformError, match=r"coredns of c1: CREATE_FAILED: ConfigurationConflict.*made anew"):
            converge(eks, wait_for=["coredns"])
    eks.addons["coredns"]["status"] = "DEGRADED"
    with pytest.raises(PlatformError, match="coredns is DEGRADED ConfigurationConflict"):
        converge(eks, wait_for=["coredns"])
    # Groups of size zero will not make it active; that is no reason to fail.
    eks.nodes = {"gpu": 0}
    assert facts(eks, wait_for=["coredns"])[0]["pending"] == ["coredns"]


def test_a_removal_that_fails_ends_the_wait(clock: Clock) -> None:
    eks = FakeEks()
    converge(eks, addon())
    issue = {"code": "AdmissionRequestDenied", "message": "denied by a webhook", "resourceIds": ["coredns"]}
    failed = {"status": "DELETE_FAILED", "health": {"issues": [issue]}}
    eks.client.handlers["delete_addon"] = lambda addonName, **_: eks.addons[addonName].update(failed)
    said = r"^add-on coredns of c1: DELETE_FAILED: AdmissionRequestDenied: denied by a webhook \(coredns\)$"
    with pytest.raises(PlatformError, match=said):
        converge(eks)
    assert clock.now == 0


def test_a_run_with_nothing_to_do_asks_for_no_nodes() -> None:
    eks = FakeEks()
    converge(eks, addon(), addon("csi"))
    eks.client.calls.clear()
    answer, _ = facts(eks, addon(), addon("csi"))
    assert answer["pending"] == []
    assert not {"list_nodegroups", "describe_nodegroup"} & {name for name, _ in eks.client.calls}
    assert facts(eks, addon("new"), check=True)[0]["pending"] == []


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
