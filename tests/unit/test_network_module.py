"""The network module where no emulator is needed: prediction on an empty account, refusals, waits."""

from typing import Any

import aws_network
import pytest
from ansible.module_utils.rayplane_aws import Api, Changes, PlatformError
from aws_fake import Clock, FakeClient

PARAMS = {
    "cluster_name": "c1",
    "state": "present",
    "name": "",
    "vpc_cidr": "10.0.0.0/16",
    "availability_zones": ["us-west-2a", "us-west-2b"],
    "private_subnet_cidrs": [],
    "public_subnets": True,
    "public_subnet_cidrs": [],
    "nat_mode": "per_zone",
    "s3_endpoint": True,
    "interface_endpoints": ["sts"],
    "security_group_rules": [],
    "tags": {"Project": "rayplane"},
    "private_subnet_tags": {},
    "public_subnet_tags": {},
    "wait_timeout": 60,
}
KINDS = {
    "describe_vpcs": "Vpcs",
    "describe_subnets": "Subnets",
    "describe_internet_gateways": "InternetGateways",
    "describe_nat_gateways": "NatGateways",
    "describe_route_tables": "RouteTables",
    "describe_vpc_endpoints": "VpcEndpoints",
    "describe_security_groups": "SecurityGroups",
    "describe_addresses": "Addresses",
}


def account(**found: Any) -> FakeClient:
    """Return an account that holds what is given by operation, and nothing else."""
    return FakeClient(
        "ec2", **{name: lambda key=key, name=name, **_: {key: found.get(name, [])} for name, key in KINDS.items()}
    )


def network(client: FakeClient, check: bool = True, **params: Any) -> tuple[aws_network.Network, Changes]:
    changes = Changes(check)
    return aws_network.Network({**PARAMS, **params}, "us-west-2", Api(client, changes), changes), changes


def test_an_empty_account_is_predicted_as_a_whole() -> None:
    client = account()
    reconciler, changes = network(client)
    facts = reconciler.present()
    kinds = [" ".join(action.split()[:2]) for action in changes.actions]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "create VPC": 1,
        "create internet": 1,
        "create subnet": 4,
        "create address": 2,
        "create NAT": 2,
        "create route": 3,
        "create security": 1,
        "create gateway": 1,
        "create interface": 1,
    }
    assert client.writes() == []
    assert len(facts["private_subnet_ids"]) == len(facts["public_subnet_ids"]) == 2


def test_subnets_carry_the_tags_that_load_balancers_look_for() -> None:
    reconciler, changes = network(account())
    reconciler.present()
    tags = {
        one["after_header"]: one["after"]["tags"] for one in changes.result()["diff"] if "subnet" in one["after_header"]
    }
    assert tags["subnet c1-private-us-west-2a"]["kubernetes.io/role/internal-elb"] == "1"
    assert tags["subnet c1-public-us-west-2a"]["kubernetes.io/role/elb"] == "1"
    assert tags["subnet c1-public-us-west-2a"]["kubernetes.io/cluster/c1"] == "shared"


VPC = {"VpcId": "vpc-1", "CidrBlock": "10.0.0.0/16", "Tags": [{"Key": "rayplane.io/cluster", "Value": "c1"}]}


@pytest.mark.parametrize(
    ("found", "params", "reason"),
    [
        ({"describe_vpcs": [VPC, {**VPC, "VpcId": "vpc-2"}]}, {}, "2 VPCs belong to c1"),
        ({"describe_vpcs": [{**VPC, "CidrBlock": "10.9.0.0/16"}]}, {}, "keeps its addresses for life"),
        ({}, {"vpc_cidr": "10.0.0.0/24"}, "does not hold"),
        ({}, {"public_subnets": False}, "needs public subnets"),
    ],
)
def test_what_cannot_be_is_refused(found: dict[str, Any], params: dict[str, Any], reason: str) -> None:
    client = account(**found)
    client.handlers["describe_vpc_attribute"] = lambda **_: {
        "EnableDnsSupport": {"Value": True},
        "EnableDnsHostnames": {"Value": True},
    }
    reconciler, _ = network(client, **params)
    with pytest.raises(PlatformError, match=reason):
        reconciler.present()
    assert client.writes() == []


def test_a_vpc_of_another_cluster_with_our_name_is_not_taken() -> None:
    other = {**VPC, "Tags": [{"Key": "rayplane.io/cluster", "Value": "c2"}, {"Key": "Name", "Value": "c1"}]}
    reconciler, changes = network(account(describe_vpcs=[other]))
    reconciler.present()
    assert changes.actions[0] == "create VPC c1"


def test_a_nat_gateway_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    nat = {"State": "failed", "FailureMessage": "Network vpc-1 has no Internet gateway attached"}
    reconciler, _ = network(account(describe_nat_gateways=[nat]), check=False)
    with pytest.raises(PlatformError, match="no Internet gateway attached"):
        reconciler._wait_for_nat("us-west-2a", "nat-1")


def test_rules_are_compared_flat() -> None:
    permissions = [
        {
            "IpProtocol": "tcp",
            "FromPort": 443,
            "ToPort": 443,
            "IpRanges": [{"CidrIp": "10.0.0.0/16"}],
            "UserIdGroupPairs": [],
        },
        {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-1"}]},
    ]
    rules = aws_network._rules_of(permissions)
    assert rules == {("tcp", 443, 443, "10.0.0.0/16"), ("-1", None, None, "sg-1")}
    assert aws_network._rules_of([aws_network._permission(rule) for rule in rules]) == rules
