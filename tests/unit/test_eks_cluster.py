"""The control plane: creation, property by property updates, upgrades in order, refusals, bounded waits."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
import re
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import eks_cluster
from aws_fake import Clock, FakeClient, refusal

PARAMS = {
    "name": "c1",
    "state": "present",
    "version": "1.34",
    "role_arn": "arn:aws:iam::1:role/c1",
    "subnet_ids": ["subnet-a", "subnet-b"],
    "security_group_ids": [],
    "endpoint_public_access": True,
    "endpoint_private_access": True,
    "public_access_cidrs": ["0.0.0.0/0"],
    "private_access_cidrs": [],
    "private_access_vpc": False,
    "service_ipv4_cidr": "",
    "log_types": ["api", "audit"],
    "log_retention_days": 90,
    "log_kms_key_arn": "",
    "encryption_key_arn": "",
    "authentication_mode": "API",
    "creator_is_admin": True,
    "support_type": "",
    "deletion_protection": False,
    "zonal_shift": False,
    "security_group_tags": {},
    "tags": {"Project": "rayplane"},
    "wait_timeout": 100,
}


class FakeEks:
    """One cluster that takes updates like EKS does, one at a time."""

    def __init__(self, **overrides: Any) -> None:
        self.cluster: dict[str, Any] | None = {
            "name": "c1",
            "arn": "arn:aws:eks:us-west-2:1:cluster/c1",
            "version": "1.34",
            "status": "ACTIVE",
            "roleArn": "arn:aws:iam::1:role/c1",
            "endpoint": "https://c1",
            "certificateAuthority": {"data": "Q0E="},
            "resourcesVpcConfig": {
                "subnetIds": ["subnet-b", "subnet-a"],
                "securityGroupIds": [],
                "endpointPublicAccess": True,
                "endpointPrivateAccess": True,
                "publicAccessCidrs": ["0.0.0.0/0"],
                "clusterSecurityGroupId": "sg-1",
            },
            "logging": {
                "clusterLogging": [
                    {"types": ["api", "audit"], "enabled": True},
                    {"types": ["scheduler"], "enabled": False},
                ]
            },
            "accessConfig": {"authenticationMode": "API"},
            "tags": {"Project": "rayplane", "rayplane.io/cluster": "c1"},
            **overrides,
        }
        self.update_status = ["InProgress", "Successful"]
        #: What a node group's description holds beside its name and version.
        self.group: dict[str, Any] = {"status": "ACTIVE"}
        self.groups: list[str] = []
        self.nodes_version = "1.34"
        self.group_tags: list[dict[str, str]] = []
        self.rules: list[dict[str, Any]] = []
        self.ec2 = FakeClient(
            "ec2",
            describe_security_groups=lambda **_: {
                "SecurityGroups": [{"GroupId": "sg-1", "Tags": self.group_tags, "IpPermissions": self.rules}]
            },
            create_tags=lambda Tags, **_: self.group_tags.extend(Tags),
        )
        self.log_group: dict[str, Any] | None = {
            "logGroupName": "/aws/eks/c1/cluster",
            "arn": "arn:logs:c1:*",
            "retentionInDays": 90,
        }
        self.logs = FakeClient(
            "logs",
            describe_log_groups=lambda **_: {"logGroups": [self.log_group] if self.log_group else []},
            list_tags_for_resource=lambda **_: {"tags": PARAMS["tags"] | {"rayplane.io/cluster": "c1"}},
            create_log_group=lambda **_: {},
            put_retention_policy=lambda **_: {},
            associate_kms_key=lambda **_: {},
        )
        self._polls: list[str] = []
        self.client = FakeClient(
            "eks",
            describe_cluster=self.describe_cluster,
            create_cluster=self.create_cluster,
            update_cluster_version=self.update_cluster_version,
            update_cluster_config=self.update,
            associate_encryption_config=self.update,
            describe_update=self.describe_update,
            tag_resource=lambda **_: {},
            list_nodegroups=lambda **_: {"nodegroups": list(self.groups)},
            describe_nodegroup=self.describe_nodegroup,
            delete_nodegroup=lambda nodegroupName, **_: self.groups.remove(nodegroupName) or {},
            delete_cluster=self.delete_cluster,
        )

    def describe_cluster(self, name: str) -> Any:
        if self.cluster is None:
            raise refusal("ResourceNotFoundException")
        return {"cluster": self.cluster}

    def describe_nodegroup(self, nodegroupName: str, **_: Any) -> Any:
        if nodegroupName not in self.groups:
            raise refusal("ResourceNotFoundException")
        return {"nodegroup": {"nodegroupName": nodegroupName, "version": self.nodes_version, **self.group}}

    def create_cluster(self, **given: Any) -> Any:
        self.cluster = {**given, "arn": "arn:c1", "status": "ACTIVE", "endpoint": "https://c1"}
        return {"cluster": self.cluster}

    def delete_cluster(self, name: str) -> Any:
        assert not self.groups
        self.cluster = None
        return {}

    def update_cluster_version(self, name: str, version: str) -> Any:
        assert self.cluster
        assert int(version.split(".")[1]) == int(self.cluster["version"].split(".")[1]) + 1
        self.cluster = {**self.cluster, "version": version}
        return self.update()

    def update(self, **_: Any) -> Any:
        self._polls = list(self.update_status)
        return {"update": {"id": "u1", "status": "InProgress"}}

    def describe_update(self, **_: Any) -> Any:
        status = self._polls.pop(0) if len(self._polls) > 1 else self._polls[0]
        error = {"errorCode": "IpNotAvailable", "errorMessage": "no addresses", "resourceIds": ["subnet-a"]}
        errors = [error] if status == "Failed" else []
        return {"update": {"id": "u1", "status": status, "type": "VersionUpdate", "errors": errors}}


def converge(eks: FakeEks, check: bool = False, **params: Any) -> tuple[dict[str, Any], Changes]:
    changes = Changes(check)
    cluster = eks_cluster.Cluster(
        {**PARAMS, **params},
        Api(eks.client, changes),
        changes,
        lambda name: Api(eks.ec2 if name == "ec2" else eks.logs, changes),
    )
    return getattr(cluster, params.get("state", "present"))(), changes


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_nothing_to_do_writes_nothing() -> None:
    eks = FakeEks()
    facts, changes = converge(eks)
    assert changes.result() == {"changed": False, "actions": [], "diff": []}
    assert eks.client.writes() == []
    assert facts["cluster"]["endpoint"] == "https://c1"
    assert facts["cluster"]["security_group_id"] == "sg-1"


def test_check_mode_predicts_a_new_cluster_and_writes_nothing() -> None:
    eks = FakeEks()
    eks.cluster = None
    facts, changes = converge(eks, check=True, role_arn="<new role c1>", subnet_ids=["<new subnet>"])
    assert changes.actions == ["create cluster c1"]
    assert changes.result()["diff"][0]["after"]["version"] == "1.34"
    assert eks.client.writes() == []
    assert facts == {"cluster": {}}


def test_a_new_cluster_gets_everything_in_one_call() -> None:
    eks = FakeEks()
    eks.cluster = None
    converge(eks, encryption_key_arn="arn:key", service_ipv4_cidr="10.100.0.0/16", support_type="STANDARD")
    ((operation, given),) = eks.client.writes()
    assert operation == "create_cluster"
    assert given["accessConfig"] == {"authenticationMode": "API", "bootstrapClusterCreatorAdminPermissions": True}
    assert given["encryptionConfig"] == [{"resources": ["secrets"], "provider": {"keyArn": "arn:key"}}]
    assert given["tags"]["rayplane.io/cluster"] == "c1"


def test_a_new_cluster_waits_for_its_role_to_be_known() -> None:
    eks = FakeEks()
    eks.cluster = None
    answers = [refusal("InvalidParameterException", "Role c1 could not be assumed"), None]
    create = eks.create_cluster

    def create_later(**given: Any) -> Any:
        error = answers.pop(0)
        if error:
            raise error
        return create(**given)

    eks.client.handlers["create_cluster"] = create_later
    converge(eks)
    assert answers == []


def test_upgrade_goes_one_minor_version_at_a_time() -> None:
    eks = FakeEks(version="1.32")
    _, changes = converge(eks)
    assert [given["version"] for name, given in eks.client.writes() if name == "update_cluster_version"] == [
        "1.33",
        "1.34",
    ]
    assert changes.actions == [
        "update cluster c1: version: 1.32 -> 1.33",
        "update cluster c1: version: 1.33 -> 1.34",
    ]


def test_check_mode_predicts_every_step_of_an_upgrade() -> None:
    eks = FakeEks(version="1.32")
    _, changes = converge(eks, check=True)
    assert len(changes.actions) == 2
    assert eks.client.writes() == []


@pytest.mark.parametrize(
    ("have", "want", "reason"),
    [
        ("1.35", "1.34", "only upgrades are made here"),
        ("1.30", "1.34", 'deploy "1.33" first'),
        ("1.34", "v1.34", "not of the form"),
    ],
)
def test_impossible_versions_are_refused_before_anything_changes(have: str, want: str, reason: str) -> None:
    eks = FakeEks(version=have, logging={})
    with pytest.raises(PlatformError, match=reason):
        converge(eks, version=want)
    assert eks.client.writes() == []


def test_without_a_version_nothing_is_upgraded() -> None:
    eks = FakeEks(version="1.31")
    _, changes = converge(eks, version="")
    assert changes.actions == []


def test_properties_are_updated_one_kind_at_a_time_and_named() -> None:
    eks = FakeEks(
        logging={"clusterLogging": [{"types": ["api", "scheduler"], "enabled": True}]},
        accessConfig={"authenticationMode": "CONFIG_MAP"},
        tags={"rayplane.io/cluster": "c1"},
    )
    _, changes = converge(eks, public_access_cidrs=["192.0.2.0/24"], subnet_ids=["subnet-a", "subnet-c"])
    assert changes.actions == [
        "update cluster c1: publicAccessCidrs: ['0.0.0.0/0'] -> ['192.0.2.0/24']",
        "update cluster c1: subnetIds: ['subnet-a', 'subnet-b'] -> ['subnet-a', 'subnet-c']",
        "update cluster c1: authenticationMode: CONFIG_MAP -> API",
        "update cluster c1: logging: ['api', 'scheduler'] -> ['api', 'audit']",
        "update cluster c1: tag Project: absent -> rayplane",
    ]
    configs = [given for name, given in eks.client.writes() if name == "update_cluster_config"]
    assert [sorted(set(config) - {"name"}) for config in configs] == [
        ["resourcesVpcConfig"],
        ["resourcesVpcConfig"],
        ["accessConfig"],
        ["accessConfig"],
        ["logging"],
    ]
    assert [config["accessConfig"]["authenticationMode"] for config in configs[2:4]] == ["API_AND_CONFIG_MAP", "API"]


@pytest.mark.parametrize("there", [False, True])
def test_a_public_endpoint_for_nobody_is_refused_before_anything_is_made(there: bool) -> None:
    eks = FakeEks()
    eks.cluster = eks.cluster if there else None
    with pytest.raises(PlatformError, match="eks_endpoint_public_cidrs is empty"):
        converge(eks, public_access_cidrs=[])
    assert eks.client.writes() == eks.logs.writes() == []


def test_encryption_is_added_but_never_changed() -> None:
    eks = FakeEks()
    _, changes = converge(eks, encryption_key_arn="arn:key")
    assert changes.actions == ["update cluster c1: encryption_key: absent -> arn:key"]
    eks = FakeEks(encryptionConfig=[{"provider": {"keyArn": "arn:old"}, "resources": ["secrets"]}])
    with pytest.raises(PlatformError, match="cannot change the key"):
        converge(eks, encryption_key_arn="arn:key")


def test_access_mode_never_goes_back() -> None:
    with pytest.raises(PlatformError, match="cannot go back to CONFIG_MAP"):
        converge(FakeEks(), authentication_mode="CONFIG_MAP")


def test_the_role_of_a_cluster_cannot_change() -> None:
    with pytest.raises(PlatformError, match="keep the role"):
        converge(FakeEks(), role_arn="arn:aws:iam::1:role/other")


def test_a_failed_update_tells_what_aws_said() -> None:
    eks = FakeEks(version="1.33")
    eks.update_status = ["Failed"]
    with pytest.raises(PlatformError, match=r"IpNotAvailable: no addresses \(subnet-a\)"):
        converge(eks)


def test_waits_are_bounded_and_tell_what_was_seen(clock: Clock) -> None:
    eks = FakeEks(status="UPDATING")
    with pytest.raises(PlatformError, match="not there after 100 s, last seen: c1 is UPDATING"):
        converge(eks)
    assert clock.now <= 100


def test_a_cluster_that_failed_ends_the_wait_with_its_health(clock: Clock) -> None:
    issue = {"code": "Ec2SubnetNotFound", "message": "The subnet does not exist.", "resourceIds": ["subnet-a"]}
    eks = FakeEks(status="FAILED", health={"issues": [issue]})
    said = r"^cluster c1: FAILED: Ec2SubnetNotFound: The subnet does not exist \(subnet-a\)\. Cure: destroy it"
    with pytest.raises(PlatformError, match=said):
        converge(eks)
    assert clock.now == 0
    assert eks.client.writes() == []


def test_a_node_group_that_cannot_be_deleted_ends_the_destruction(clock: Clock) -> None:
    eks = FakeEks()
    eks.groups = ["gpu"]
    issue = {"code": "Ec2SecurityGroupDeletionFailure", "message": "in use", "resourceIds": ["sg-2"]}
    failed = {"status": "DELETE_FAILED", "health": {"issues": [issue]}}
    eks.client.handlers["delete_nodegroup"] = lambda **_: eks.group.update(failed)
    said = r"^node group gpu of c1: DELETE_FAILED: Ec2SecurityGroupDeletionFailure: in use \(sg-2\)\. Cure: something"
    with pytest.raises(PlatformError, match=said):
        converge(eks, state="absent")
    assert clock.now == 0


def test_a_refused_call_names_call_resource_reason_and_cure() -> None:
    eks = FakeEks()

    def refuse(name: str) -> Any:
        raise refusal("AccessDeniedException", "not authorized")

    eks.client.handlers["describe_cluster"] = refuse
    with pytest.raises(PlatformError) as caught:
        converge(eks)
    assert str(caught.value) == (
        "eks:DescribeCluster failed for cluster c1: AccessDeniedException: not authorized."
        " Cure: give the deploying principal the permission eks:DescribeCluster"
    )


def test_deletion_takes_the_node_groups_first() -> None:
    eks = FakeEks()
    eks.groups = ["cpu", "gpu"]
    _, changes = converge(eks, state="absent")
    assert [name for name, _ in eks.client.writes()] == ["delete_nodegroup", "delete_nodegroup", "delete_cluster"]
    assert changes.actions == ["delete node group cpu", "delete node group gpu", "delete cluster c1"]
    _, changes = converge(eks, state="absent")
    assert changes.actions == []


def test_deletion_in_check_mode_deletes_nothing() -> None:
    eks = FakeEks()
    eks.groups = ["cpu"]
    _, changes = converge(eks, check=True, state="absent")
    assert len(changes.actions) == 2
    assert eks.client.writes() == []


def test_networks_that_others_admitted_are_told_and_stay() -> None:
    eks = FakeEks()
    eks.rules = [
        {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-1"}]},
        {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "10.0.0.0/16"}]},
        {
            "IpProtocol": "tcp",
            "FromPort": 8000,
            "ToPort": 8000,
            "IpRanges": [
                {"CidrIp": "10.0.0.0/24", "Description": "elbv2.k8s.aws/targetGroupBinding=shared"},
                {"CidrIp": "10.0.0.0/24", "Description": "kubernetes.io/rule/nlb/health=a"},
                {"CidrIp": "0.0.0.0/0"},
            ],
            "Ipv6Ranges": [{"CidrIpv6": "::/0"}],
        },
    ]
    _, changes = converge(eks, private_access_cidrs=["10.0.0.0/16"])
    told = [one["property"] for one in changes.result().get("foreign", [])]
    assert told == ["ingress tcp 8000-8000 from 0.0.0.0/0", "ingress tcp 8000-8000 from ::/0"]
    assert eks.ec2.writes() == []


@pytest.mark.parametrize("there", [True, False])
def test_the_clusters_own_vpc_is_asked_for_its_addresses(there: bool) -> None:
    eks = FakeEks()
    if there:
        eks.cluster["resourcesVpcConfig"]["vpcId"] = "vpc-1"
    else:
        eks.cluster = None
    eks.ec2.handlers |= {
        "describe_subnets": lambda **_: {"Subnets": [{"VpcId": "vpc-1"}, {"VpcId": "vpc-1"}]},
        "describe_vpcs": lambda VpcIds: {"Vpcs": [{"CidrBlock": "10.7.0.0/16"}] if VpcIds == ["vpc-1"] else []},
    }
    _, changes = converge(eks, check=True, private_access_vpc=True, private_access_cidrs=["192.0.2.0/24"])
    assert changes.actions[-1] == (
        "update security group of cluster c1: clients: absent -> ['10.7.0.0/16', '192.0.2.0/24']"
    )


def test_nothing_to_do_takes_one_call_of_each_service() -> None:
    eks = FakeEks()
    converge(eks)
    assert [name for name, _ in eks.client.calls] == ["describe_cluster"]
    assert [name for name, _ in eks.ec2.calls] == ["describe_security_groups"]


@pytest.mark.parametrize(
    ("group", "types", "key", "calls"),
    [
        ("there", ["api"], "", []),
        ("there", ["api"], "arn:key", ["associate_kms_key"]),
        ("made by EKS", ["api"], "", ["put_retention_policy"]),
        ("", ["api"], "arn:key", ["create_log_group", "put_retention_policy"]),
        ("", [], "arn:key", []),
    ],
)
def test_the_log_group_is_kept_before_logs_come(group: str, types: list[str], key: str, calls: list[str]) -> None:
    for cluster in ("there", "new"):
        eks = FakeEks()
        eks.cluster = eks.cluster if cluster == "there" else None
        if group != "there":
            eks.log_group = {"logGroupName": "/aws/eks/c1/cluster", "arn": "arn:logs:c1:*"} if group else None
        converge(eks, log_types=types, log_kms_key_arn=key)
        assert [name for name, _ in eks.logs.writes()] == calls


def test_nodes_left_behind_by_an_earlier_upgrade_hold_the_next_one() -> None:
    eks = FakeEks(version="1.33")
    eks.groups, eks.nodes_version = ["gpu"], "1.31"
    with pytest.raises(PlatformError, match=r'node group gpu 1.31\).*deploy "1.34" first, nodes included'):
        converge(eks, version="1.35")
    assert eks.client.writes() == []
    converge(eks, version="1.34")


def test_protection_and_zonal_shift_are_kept_and_protection_holds_a_deletion() -> None:
    eks = FakeEks()
    _, changes = converge(eks, deletion_protection=True, zonal_shift=True)
    assert changes.actions == [
        "update cluster c1: zonal_shift: False -> True",
        "update cluster c1: deletion_protection: False -> True",
    ]
    eks = FakeEks(deletionProtection=True)
    eks.groups = ["gpu"]
    with pytest.raises(PlatformError, match="nothing was deleted: set eks_deletion_protection"):
        converge(eks, state="absent")
    assert eks.client.writes() == []


def test_the_security_group_is_tagged_for_discovery_and_predicted() -> None:
    tags = {"karpenter.sh/discovery": "c1"}
    eks = FakeEks()
    said = ["update security group of cluster c1: tag karpenter.sh/discovery: absent -> c1"]
    assert converge(eks, security_group_tags=tags)[1].actions == said
    assert eks.group_tags == [{"Key": "karpenter.sh/discovery", "Value": "c1"}]
    assert converge(eks, security_group_tags=tags)[1].actions == []
    eks.cluster = None
    assert converge(eks, check=True, security_group_tags=tags)[1].actions == ["create cluster c1", *said]


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("state", ["present", "absent", "deletable"])
@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"Terraform": "true"}, r"\(it does not bear the tag rayplane.io/cluster\)"),
        (None, r"\(it does not bear the tag rayplane.io/cluster\)"),
        ({"rayplane.io/cluster": "c2"}, r"\(it bears the tag rayplane.io/cluster=c2\)"),
    ],
)
def test_a_cluster_of_somebody_else_is_neither_changed_nor_deleted(
    tags: Any, why: str, state: str, check: bool
) -> None:
    for status in ("ACTIVE", "DELETING"):
        eks = FakeEks(tags=tags, logging={}, status=status)
        eks.groups = ["gpu"]
        with pytest.raises(PlatformError) as caught:
            converge(eks, check, state=state)
        assert re.search(f"cluster c1 is there and was not made by this platform {why}", str(caught.value))
        assert str(caught.value).endswith(
            "Choose another platform_cluster_name or, to have it managed (and once destroyed) here, aws eks"
            " tag-resource --resource-arn arn:aws:eks:us-west-2:1:cluster/c1 --tags rayplane.io/cluster=c1"
        )
        assert [name for name, _ in eks.client.calls] == ["describe_cluster"]


def test_whether_a_cluster_may_be_deleted_takes_one_call_and_changes_nothing() -> None:
    eks = FakeEks()
    eks.groups = ["gpu"]
    facts, changes = converge(eks, state="deletable")
    assert facts["cluster"]["endpoint"] == "https://c1"
    assert changes.result() == {"changed": False, "actions": [], "diff": []}
    assert [name for name, _ in eks.client.calls] == ["describe_cluster"]
    eks = FakeEks(deletionProtection=True)
    with pytest.raises(PlatformError, match="nothing was deleted: set eks_deletion_protection"):
        converge(eks, state="deletable")
    assert [name for name, _ in eks.client.calls] == ["describe_cluster"]
    eks.cluster = None
    assert converge(eks, state="deletable")[0] == {"cluster": {}}
