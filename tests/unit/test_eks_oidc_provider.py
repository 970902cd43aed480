"""The IAM OIDC provider of a cluster: registered once, repaired, found by its tag when the cluster is gone."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import eks_oidc_provider
from aws_fake import FakeClient, refusal

ISSUER = "oidc.eks.us-west-2.amazonaws.com/id/1"
ARN = f"arn:aws:iam::1:oidc-provider/{ISSUER}"
OTHER = "arn:aws:iam::1:oidc-provider/token.actions.githubusercontent.com"


class FakeAccount:
    """A cluster and the providers of its account, one of which is somebody else's."""

    def __init__(self) -> None:
        self.cluster: dict[str, Any] | None = {"identity": {"oidc": {"issuer": f"https://{ISSUER}"}}}
        self.providers: dict[str, dict[str, Any]] = {OTHER: {"ClientIDList": ["sts.amazonaws.com"], "Tags": []}}
        self.eks = FakeClient("eks", describe_cluster=self.describe_cluster)
        self.iam = FakeClient(
            "iam",
            list_open_id_connect_providers=lambda: {
                "OpenIDConnectProviderList": [{"Arn": arn} for arn in self.providers]
            },
            get_open_id_connect_provider=lambda OpenIDConnectProviderArn: self.providers[OpenIDConnectProviderArn],
            create_open_id_connect_provider=self.create,
            add_client_id_to_open_id_connect_provider=lambda OpenIDConnectProviderArn, ClientID: self.providers[
                OpenIDConnectProviderArn
            ]["ClientIDList"].append(ClientID),
            tag_open_id_connect_provider=lambda OpenIDConnectProviderArn, Tags: self.providers[
                OpenIDConnectProviderArn
            ]["Tags"].extend(Tags),
            delete_open_id_connect_provider=self.delete,
        )

    def describe_cluster(self, name: str) -> Any:
        if self.cluster is None:
            raise refusal("ResourceNotFoundException")
        return {"cluster": self.cluster}

    def create(self, Url: str, ClientIDList: list[str], Tags: Any) -> Any:
        self.providers[ARN] = {"Url": Url, "ClientIDList": ClientIDList, "Tags": Tags}
        return {"OpenIDConnectProviderArn": ARN}

    def delete(self, OpenIDConnectProviderArn: str) -> None:
        del self.providers[OpenIDConnectProviderArn]


def reconcile(
    fake: FakeAccount, state: str, check: bool = False, region: str = "us-west-2"
) -> tuple[dict[str, Any], Changes]:
    changes = Changes(check)
    params = {"cluster_name": "c1", "tags": {}}
    provider = eks_oidc_provider.Provider(params, region, Api(fake.eks, changes), Api(fake.iam, changes), changes)
    return (provider.present() if state == "present" else provider.absent()), changes


def provide(fake: FakeAccount, state: str = "present", check: bool = False) -> tuple[dict[str, Any], list[str]]:
    facts, changes = reconcile(fake, state, check)
    return facts, changes.actions


def test_the_issuer_is_registered_once() -> None:
    fake = FakeAccount()
    assert provide(fake, check=True)[1] == ["create OIDC provider of cluster c1"]
    assert fake.iam.writes() == []
    assert provide(fake) == ({"arn": ARN, "issuer": ISSUER}, ["create OIDC provider of cluster c1"])
    ((_, given),) = fake.iam.writes()
    # IAM verifies EKS's issuers itself.
    assert "ThumbprintList" not in given
    assert provide(fake)[1] == []


def test_check_mode_predicts_before_there_is_a_cluster() -> None:
    fake = FakeAccount()
    fake.cluster = None
    facts, actions = provide(fake, check=True)
    assert facts["arn"].startswith("<new")
    assert actions == ["create OIDC provider of cluster c1"]
    with pytest.raises(PlatformError, match="does not exist"):
        provide(fake)


def test_audience_and_tags_are_repaired() -> None:
    fake = FakeAccount()
    provide(fake)
    fake.providers[ARN].update(ClientIDList=["mine"], Tags=[])
    assert provide(fake)[1] == [
        "update OIDC provider of cluster c1: audiences: ['mine'] -> ['mine', 'sts.amazonaws.com']",
        "update OIDC provider of cluster c1: tag rayplane.io/cluster: absent -> c1",
        "update OIDC provider of cluster c1: tag rayplane.io/region: absent -> us-west-2",
    ]
    assert provide(fake)[1] == []


def test_only_the_clusters_own_goes_also_without_the_cluster() -> None:
    fake = FakeAccount()
    provide(fake)
    fake.cluster = None
    assert provide(fake, "absent")[1] == ["delete OIDC provider of cluster c1"]
    assert list(fake.providers) == [OTHER]
    assert provide(fake, "absent")[1] == []


def test_that_of_a_cluster_of_the_same_name_in_another_region_stays() -> None:
    fake = FakeAccount()
    provide(fake)
    fake.iam.calls.clear()
    for check in (True, False):
        _, changes = reconcile(fake, "absent", check, region="eu-west-1")
        assert changes.actions == []
        assert changes.warnings == [
            f"OIDC provider of cluster c1 in us-west-2 (tag rayplane.io/region of {ARN}) is left alone, because this"
            " run is for eu-west-1; to delete it set platform_region to us-west-2"
        ]
    assert fake.iam.writes() == []
    # One of an earlier version bears no region.
    fake.providers[ARN]["Tags"] = [{"Key": "rayplane.io/cluster", "Value": "c1"}]
    assert reconcile(fake, "absent")[1].actions == ["delete OIDC provider of cluster c1"]
