"""Access entries and pod identities: granted, repaired, taken away; what others made stays."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import eks_access_entries, eks_pod_identities
from aws_fake import FakeClient

ADMIN = "arn:aws:iam::1:role/admin"
VIEW = "arn:aws:eks::aws:cluster-access-policy/AmazonEKSViewPolicy"


class FakeEntries:
    """A cluster with access entries."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.policies: dict[str, dict[str, Any]] = {}
        self.client = FakeClient(
            "eks",
            describe_cluster=lambda **_: {"cluster": {"version": "1.34"}},
            list_access_entries=lambda **_: {"accessEntries": list(self.entries)},
            describe_access_entry=lambda principalArn, **_: {"accessEntry": self.entries[principalArn]},
            create_access_entry=self.create,
            update_access_entry=lambda principalArn, clusterName, **given: self.entries[principalArn].update(given),
            delete_access_entry=lambda principalArn, **_: self.entries.pop(principalArn),
            list_associated_access_policies=lambda **_: {
                "associatedAccessPolicies": [
                    {"policyArn": arn, "accessScope": scope} for arn, scope in self.policies.items()
                ]
            },
            associate_access_policy=lambda policyArn, accessScope, **_: self.policies.update({policyArn: accessScope}),
            disassociate_access_policy=lambda policyArn, **_: self.policies.pop(policyArn),
            tag_resource=lambda **_: {},
        )

    def create(self, **given: Any) -> Any:
        self.entries[given["principalArn"]] = {**given, "accessEntryArn": "arn:entry"}


def entry(**changes: Any) -> dict[str, Any]:
    policies = [{"policy": "AmazonEKSViewPolicy", "namespaces": ["rayplane"]}]
    return {"principal_arn": ADMIN, "type": "STANDARD", "username": "", "groups": [], "policies": policies, **changes}


def grant(fake: FakeEntries, *entries: dict[str, Any], check: bool = False, creator: bool = True) -> Changes:
    changes = Changes(check)
    given = {"cluster_name": "c1", "entries": list(entries), "tags": {}, "purge": True, "creator_is_admin": creator}
    eks_access_entries.AccessEntries(given, Api(fake.client, changes), changes).reconcile()
    return changes


def test_access_is_granted_once() -> None:
    fake = FakeEntries()
    assert len(grant(fake, entry(), check=True).actions) == 2
    assert fake.client.writes() == []
    grant(fake, entry())
    assert fake.policies == {VIEW: {"type": "namespace", "namespaces": ["rayplane"]}}
    assert grant(fake, entry()).actions == []


def test_access_changed_by_hand_is_repaired_by_property() -> None:
    fake = FakeEntries()
    grant(fake, entry())
    fake.policies = {
        VIEW: {"type": "cluster", "namespaces": []},
        "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy": {"type": "cluster"},
    }
    fake.entries[ADMIN]["kubernetesGroups"] = ["system:masters"]
    actions = grant(fake, entry()).actions
    assert actions[0] == f"update access entry {ADMIN}: kubernetesGroups: ['system:masters'] -> []"
    assert actions[1].startswith(f"update access entry {ADMIN}: policy {VIEW}: {{'type': 'cluster'}} -> ")
    assert actions[2].endswith("AmazonEKSClusterAdminPolicy: {'type': 'cluster'} -> None")
    assert grant(fake, entry()).actions == []


def test_only_own_entries_are_purged() -> None:
    fake = FakeEntries()
    grant(fake, entry(policies=[]))
    fake.entries["arn:creator"] = {"type": "STANDARD", "tags": {}}
    assert grant(fake).actions == [f"delete access entry {ADMIN}"]
    assert list(fake.entries) == ["arn:creator"]


@pytest.mark.parametrize("creator", [True, False])
def test_entries_of_others_are_told_with_their_policies_and_stay(creator: bool) -> None:
    fake = FakeEntries()
    grant(fake, entry())
    fake.entries[ADMIN]["createdAt"] = 2
    linked = "arn:aws:iam::1:role/aws-service-role/eks.amazonaws.com/AWSServiceRoleForAmazonEKS"
    fake.entries |= {
        "arn:creator": {"type": "STANDARD", "createdAt": 1},
        "arn:intruder": {"type": "STANDARD", "createdAt": 3, "kubernetesGroups": ["admins"]},
        "arn:node": {"type": "EC2_LINUX", "createdAt": 1},
        linked: {"type": "STANDARD", "createdAt": 1.5},
    }
    for check in (True, False):
        changes = grant(fake, entry(), check=check, creator=creator)
        told = [(one["resource"], one["property"]) for one in changes.result().get("foreign", [])]
        wanted = [("access entry arn:intruder", ""), ("access entry arn:intruder", f"policy {VIEW}")]
        assert told[-2:] == wanted
        assert [resource for resource, _ in told[:-2]] == ([] if creator else ["access entry arn:creator"] * 2)
        assert changes.actions == []
    assert "arn:intruder" in fake.entries
    # Who lists it takes it over.
    adopted = entry(principal_arn="arn:intruder", groups=["admins"])
    fake.entries["arn:intruder"]["accessEntryArn"] = "arn:entry"
    assert grant(fake, entry(), adopted).result().get("foreign", []) == []


def test_the_kind_of_an_entry_cannot_change() -> None:
    fake = FakeEntries()
    grant(fake, entry(policies=[]))
    with pytest.raises(PlatformError, match="cannot change it"):
        grant(fake, entry(type="EC2_LINUX", policies=[]))


def test_entries_of_nodes_are_made_and_then_left_alone() -> None:
    fake = FakeEntries()
    node = "arn:aws:iam::1:role/node"
    nodes = entry(principal_arn=node, type="EC2_LINUX", policies=[])
    assert grant(fake, nodes).actions == [f"create access entry {node}"]
    # EKS fills in what its nodes need.
    fake.entries[node].update(username="system:node:{{EC2PrivateDNSName}}", kubernetesGroups=["system:nodes"])
    assert grant(fake, nodes).actions == []
    # Managed nodes use the same entry: without it they would leave the cluster.
    assert grant(fake).actions == []


def test_a_principal_named_twice_is_refused_before_anything_is_asked_for() -> None:
    fake = FakeEntries()
    with pytest.raises(PlatformError, match="listed twice"):
        grant(fake, entry(), entry())
    assert fake.client.calls == []


def test_a_wrong_kind_is_refused_before_other_entries_are_made() -> None:
    fake = FakeEntries()
    grant(fake, entry(policies=[]))
    fake.client.calls.clear()
    with pytest.raises(PlatformError, match="cannot change it"):
        grant(fake, entry(principal_arn="arn:aws:iam::1:role/new"), entry(type="EC2_LINUX"))
    assert fake.client.writes() == []


class FakeIdentities:
    """A cluster with pod identity associations."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        self.client = FakeClient(
            "eks",
            describe_cluster=lambda **_: {"cluster": {"version": "1.34"}},
            list_pod_identity_associations=lambda **_: {"associations": list(self.known.values())},
            describe_pod_identity_association=lambda associationId, **_: {"association": self.known[associationId]},
            create_pod_identity_association=self.create,
            update_pod_identity_association=lambda associationId, roleArn, **_: self.known[associationId].update(
                roleArn=roleArn
            ),
            delete_pod_identity_association=lambda associationId, **_: self.known.pop(associationId),
            tag_resource=lambda **_: {},
        )

    def create(self, **given: Any) -> Any:
        number = f"a-{len(self.known)}"
        self.known[number] = {**given, "associationId": number, "associationArn": f"arn:{number}"}


def associate(fake: FakeIdentities, *pairs: tuple[str, str], check: bool = False) -> Changes:
    changes = Changes(check)
    associations = [{"namespace": "rayplane", "service_account": account, "role_arn": role} for account, role in pairs]
    given = {
        "cluster_name": "c1",
        "associations": associations,
        "role_arns": {"reader": "arn:reader"},
        "tags": {},
        "purge": True,
    }
    eks_pod_identities.PodIdentities(given, Api(fake.client, changes), changes).reconcile()
    return changes


def test_pods_get_their_role_by_name_or_arn() -> None:
    fake = FakeIdentities()
    wanted = (("ray", "reader"), ("batch", "arn:batch"))
    assert len(associate(fake, *wanted, check=True).actions) == 2
    associate(fake, *wanted)
    assert [one["roleArn"] for one in fake.known.values()] == ["arn:reader", "arn:batch"]
    assert associate(fake, *wanted).actions == []


def test_a_changed_role_is_repaired_and_an_unlisted_one_removed() -> None:
    fake = FakeIdentities()
    associate(fake, ("ray", "reader"), ("batch", "arn:batch"))
    fake.known["a-0"]["roleArn"] = "arn:other"
    assert associate(fake, ("ray", "reader")).actions == [
        "update pod identity rayplane/ray: role_arn: arn:other -> arn:reader",
        "delete pod identity rayplane/batch",
    ]


def test_associations_of_add_ons_are_described_only_where_they_are_asked_for() -> None:
    fake = FakeIdentities()
    associate(fake, ("ray", "reader"), ("aws-node", "arn:cni"))
    fake.known["a-1"]["ownerArn"] = "arn:addon"
    for asked, described in (((("ray", "reader"),), ["a-0"]), ((("aws-node", "arn:cni"),), ["a-0", "a-1"])):
        fake.client.calls.clear()
        associate(fake, *asked, check=True)
        told = [given["associationId"] for name, given in fake.client.calls if name.startswith("describe_pod")]
        assert sorted(told) == described


def test_a_service_account_has_one_role() -> None:
    with pytest.raises(PlatformError, match="listed twice"):
        associate(FakeIdentities(), ("ray", "reader"), ("ray", "arn:other"))
