"""The network module where no emulator is needed: prediction on an empty account, refusals, waits."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.module_utils.network.endpoints import permission, rules_of
from ansible_collections.rayplane.platform.plugins.modules import aws_network
from aws_fake import Clock, FakeClient, refusal

PARAMS = {
    "cluster_name": "c1",
    "state": "present",
    "part": "all",
    "name": "",
    "vpc_cidr": "10.0.0.0/16",
    "availability_zones": ["us-west-2a", "us-west-2b"],
    "private_subnet_cidrs": [],
    "public_subnets": True,
    "public_subnet_cidrs": [],
    "nat_mode": "per_zone",
    "s3_endpoint": True,
    "interface_endpoints": ["sts"],
    "foreign_routes": [],
    "security_group_rules": [],
    "tags": {"Project": "rayplane"},
    "private_subnet_tags": {},
    "public_subnet_tags": {},
    "wait_timeout": 60,
    "existing_vpc_id": "",
    "existing_vpc_tags": {},
    "existing_private_subnet_ids": [],
    "existing_public_subnet_ids": [],
    "intra_subnets": False,
    "intra_subnet_cidrs": [],
    "flow_logs": False,
    "flow_logs_destination": "cloudwatch",
    "flow_logs_bucket": "",
    "flow_logs_bucket_later": False,
    "flow_logs_retention_days": 30,
    "flow_logs_kms_key_arn": "",
    "flow_logs_traffic": "ALL",
    "flow_logs_interval": 600,
    "peerings": [],
    "admin_access": "none",
    "bastion_instance_type": "t3.nano",
    "bastion_ami_parameter": "/ami",
    "bastion_ami_id": "",
    "bastion_allowed_cidrs": [],
    "bastion_key_name": "",
    "bastion_kms_key_arn": "",
}
PEER = {"name": "hub", "vpc_id": "vpc-9", "owner_id": "", "region": "", "cidrs": ["10.9.0.0/16"], "dns": False}
KINDS = {
    "describe_vpcs": "Vpcs",
    "describe_subnets": "Subnets",
    "describe_internet_gateways": "InternetGateways",
    "describe_nat_gateways": "NatGateways",
    "describe_route_tables": "RouteTables",
    "describe_vpc_endpoints": "VpcEndpoints",
    "describe_security_groups": "SecurityGroups",
    "describe_addresses": "Addresses",
    "describe_tags": "Tags",
    "describe_flow_logs": "FlowLogs",
    "describe_vpc_peering_connections": "VpcPeeringConnections",
}


def account(**found: Any) -> FakeClient:
    """Return an account that holds what is given by operation, and nothing else."""
    client = FakeClient(
        "ec2", **{name: lambda key=key, name=name, **_: {key: found.get(name, [])} for name, key in KINDS.items()}
    )
    client.handlers["describe_vpc_attribute"] = lambda **_: {
        "EnableDnsSupport": {"Value": True},
        "EnableDnsHostnames": {"Value": True},
    }
    return client


def empty_iam() -> FakeClient:
    def absent(**_: Any) -> Any:
        raise refusal("NoSuchEntity")

    return FakeClient("iam", get_role=absent, get_instance_profile=absent)


def empty_logs() -> FakeClient:
    return FakeClient("logs", describe_log_groups=lambda **_: {"logGroups": []})


def network(
    client: FakeClient, check: bool = True, s3: FakeClient | None = None, **params: Any
) -> tuple[aws_network.Network, Changes]:
    changes = Changes(check)
    clients = {"ec2": client, "iam": empty_iam(), "logs": empty_logs(), "s3": s3}
    return aws_network.Network({**PARAMS, **params}, "us-west-2", clients.__getitem__, changes), changes


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


def tagged(role: str, **more: str) -> list[dict[str, str]]:
    """Return the tags of a resource of c1."""
    tags = {"rayplane.io/cluster": "c1", "rayplane.io/role": role, **more}
    return [{"Key": key, "Value": value} for key, value in tags.items()]


VPC = {
    "VpcId": "vpc-1",
    "OwnerId": "111122223333",
    "CidrBlock": "10.0.0.0/16",
    "Tags": tagged("vpc", Name="c1", Project="rayplane"),
}
THEIRS = {**VPC, "VpcId": "vpc-2", "Tags": [{"Key": "Name", "Value": "shared"}]}
SUBNET = {
    "SubnetId": "subnet-1",
    "CidrBlock": "10.0.0.0/19",
    "AvailabilityZone": "us-west-2a",
    "MapPublicIpOnLaunch": False,
    "Tags": tagged("private-us-west-2a"),
}
USED = {
    "AllocationId": "eipalloc-1",
    "AssociationId": "eipassoc-1",
    "NetworkInterfaceId": "eni-1",
    "Tags": tagged("nat-us-west-2a"),
}


@pytest.mark.parametrize(
    ("found", "params", "reason"),
    [
        ({"describe_vpcs": [VPC, {**VPC, "VpcId": "vpc-2"}]}, {}, "2 VPCs belong to c1"),
        ({"describe_vpcs": [{**VPC, "CidrBlock": "10.9.0.0/16"}]}, {}, "keeps its addresses for life"),
        ({}, {"vpc_cidr": "10.0.0.0/24"}, "does not hold"),
        ({}, {"public_subnets": False}, "needs public subnets"),
        ({}, {"public_subnets": False, "nat_mode": "none", "admin_access": "bastion"}, "needs a public subnet"),
        ({}, {"peerings": [{**PEER, "cidrs": ["10.0.128.0/20"]}]}, "overlap the VPC's"),
        ({}, {"peerings": [PEER, {**PEER, "vpc_id": "vpc-8"}]}, "of peer hub"),
        ({}, {"peerings": [PEER, PEER]}, "names vpc-9 twice"),
        ({}, {"peerings": [{**PEER, "cidrs": []}]}, "cidrs is empty"),
        ({}, {"existing_vpc_id": "vpc-7"}, "this names one VPC"),
        ({}, {"existing_private_subnet_ids": ["subnet-1"]}, "set network_existing_vpc_id"),
        ({"describe_vpcs": [VPC]}, {"existing_vpc_id": "vpc-2"}, "this names one VPC"),
        ({"describe_vpcs": [VPC, THEIRS]}, {"existing_vpc_id": "vpc-2"}, "has a VPC of its own already"),
        ({"describe_vpcs": [THEIRS]}, {"existing_vpc_id": "vpc-2", "vpc_cidr": "10.1.0.0/16"}, "is not inside VPC"),
        (
            {"describe_vpcs": [VPC], "describe_subnets": [{**SUBNET, "CidrBlock": "10.0.40.0/24", "Tags": []}]},
            {},
            "overlaps subnet-1",
        ),
        ({"describe_vpcs": [VPC], "describe_subnets": [{**SUBNET, "AvailabilityZone": "z"}]}, {}, "never moves"),
        ({"describe_vpcs": [VPC], "describe_addresses": [USED]}, {}, "eni-1 uses it"),
        ({}, {"flow_logs": True, "flow_logs_destination": "s3"}, "network_flow_logs_bucket is empty"),
    ],
)
def test_what_cannot_be_is_refused(found: dict[str, Any], params: dict[str, Any], reason: str) -> None:
    client = account(**found)
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
    nat = {"NatGatewayId": "nat-1", "State": "failed", "FailureMessage": "Network vpc-1 has no Internet gateway"}
    reconciler, _ = network(account(describe_nat_gateways=[nat]), check=False)
    reconciler.nats.wanted = {"us-west-2a": "nat-1"}
    reconciler.context.view.nats = [{**nat, "State": "pending"}]
    with pytest.raises(PlatformError, match="no Internet gateway"):
        reconciler.nats.wait()


def test_an_address_of_a_gateway_that_is_being_deleted_is_waited_for_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    address = {**USED, "PublicIp": "198.51.100.7"}
    nat = {
        "NatGatewayId": "nat-1",
        "SubnetId": "subnet-9",
        "State": "deleting",
        "NatGatewayAddresses": [{"AllocationId": "eipalloc-1"}],
    }
    client = account()
    client.handlers["describe_nat_gateways"] = lambda **_: {
        "NatGateways": [{**nat, "State": "deleting" if clock.now < 30 else "deleted"}]
    }
    client.handlers["create_nat_gateway"] = lambda **_: {"NatGateway": {"NatGatewayId": "nat-2"}}
    client.handlers["create_tags"] = lambda **_: {}
    reconciler, changes = network(client, check=False, nat_mode="single")
    reconciler.context.view.nats, reconciler.context.view.addresses = [nat], [address]
    reconciler.subnets.ids["public", "us-west-2a"] = "subnet-9"
    reconciler.nats.check()
    reconciler.nats.request()
    assert [arguments["AllocationId"] for call, arguments in client.writes() if call == "create_nat_gateway"] == [
        "eipalloc-1"
    ]
    assert not any(action.startswith("create address") for action in changes.actions)
    assert clock.now >= 30
    assert reconciler.nats.public_ips() == ["198.51.100.7"]


LOCAL = {"DestinationCidrBlock": "10.0.0.0/16", "GatewayId": "local", "Origin": "CreateRouteTable"}


@pytest.mark.parametrize(
    ("route", "told"),
    [
        (LOCAL, ""),
        ({"DestinationPrefixListId": "pl-s3", "GatewayId": "vpce-1"}, ""),
        ({"DestinationCidrBlock": "10.8.0.0/16", "GatewayId": "vgw-1", "Origin": "EnableVgwRoutePropagation"}, ""),
        ({"DestinationCidrBlock": "10.9.0.0/16", "VpcPeeringConnectionId": "pcx-1"}, ""),
        ({"DestinationCidrBlock": "172.31.0.0/16", "TransitGatewayId": "tgw-2"}, ""),
        ({"DestinationCidrBlock": "192.168.0.0/16", "TransitGatewayId": "tgw-1"}, "route 192.168.0.0/16 tgw-1"),
        ({"DestinationCidrBlock": "10.8.0.0/16", "GatewayId": "vpce-1"}, "route 10.8.0.0/16 vpce-1"),
        ({"DestinationIpv6CidrBlock": "::/0", "EgressOnlyInternetGatewayId": "eigw-1"}, "route ::/0 eigw-1"),
        ({"DestinationCidrBlock": "10.8.0.0/16", "VpcPeeringConnectionId": "pcx-9"}, "route 10.8.0.0/16 pcx-9"),
    ],
)
def test_routes_of_others_are_told_and_stay(route: dict[str, Any], told: str) -> None:
    tags = {"rayplane.io/cluster": "c1", "rayplane.io/role": "private-us-west-2a"}
    table = {
        "RouteTableId": "rtb-1",
        "Routes": [LOCAL, route],
        "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
    }
    reconciler, changes = network(account(), foreign_routes=["172.31.0.0/16"])
    reconciler.context.view.tables = [table]
    reconciler.subnets.plan_them()
    reconciler.subnets.ids = {("private", zone): f"subnet-{zone}" for zone in PARAMS["availability_zones"]}
    reconciler.tables.present("", {})
    reconciler.tables.note_foreign(["10.9.0.0/16"], ["pcx-1"])
    found = [f"{one['property']} {one['value']}" for one in changes.result().get("foreign", [])]
    assert found == ([told] if told else [])
    assert not any("route 1" in action or "route :" in action for action in changes.actions)


def test_everything_there_is_to_switch_on_is_predicted() -> None:
    client = account()
    reconciler, changes = network(
        client, intra_subnets=True, flow_logs=True, admin_access="bastion", peerings=[PEER], nat_mode="single"
    )
    facts = reconciler.present()
    assert len(facts["intra_subnet_ids"]) == 2
    for action in (
        "create subnet c1-intra-us-west-2a",
        "create route table c1-intra",
        "create log group /aws/vpc-flow-logs/c1",
        "create role c1-flow-logs",
        "create flow log c1",
        "create peering c1-hub",
        "create role c1-bastion",
        "create instance profile c1-bastion",
        "create security group c1-bastion",
        "create bastion c1-bastion",
    ):
        assert action in changes.actions
    assert client.writes() == []
    intra = next(one for one in changes.result()["diff"] if one["after_header"] == "route table c1-intra")
    assert intra["after"]["routes"] == {}


def test_without_a_way_out_systems_manager_gets_endpoints() -> None:
    reconciler, changes = network(account(), nat_mode="none", admin_access="ssm")
    facts = reconciler.present()
    endpoints = [action for action in changes.actions if "interface endpoint" in action]
    assert endpoints == [f"create interface endpoint c1-{one}" for one in ("sts", "ssm", "ssmmessages", "ec2messages")]
    assert "ssmmessages" in facts["admin_access"]
    reconciler, changes = network(account(), nat_mode="single", admin_access="ssm")
    reconciler.present()
    assert "create interface endpoint c1-ssm" not in changes.actions


def test_an_endpoint_drifts_in_its_group_subnets_and_names() -> None:
    endpoint = {
        "VpcEndpointId": "vpce-1",
        "VpcEndpointType": "Interface",
        "ServiceName": "com.amazonaws.us-west-2.sts",
        "SubnetIds": ["subnet-1", "subnet-8"],
        "Groups": [{"GroupId": "sg-8"}],
        "PrivateDnsEnabled": False,
        "Tags": tagged("endpoint-sts", Name="c1-sts", Project="rayplane"),
    }
    client = account()
    client.handlers["modify_vpc_endpoint"] = lambda **_: {}
    reconciler, changes = network(client, check=False)
    reconciler.context.view.endpoints = [endpoint]
    reconciler.endpoints.interfaces(["sts"], ["subnet-1", "subnet-2"], "sg-1")
    assert sorted(changes.actions) == [
        "update interface endpoint c1-sts: private_dns: False -> True",
        "update interface endpoint c1-sts: security group sg-1: absent -> associated",
        "update interface endpoint c1-sts: security group sg-8: associated -> removed",
        "update interface endpoint c1-sts: subnet subnet-2: absent -> associated",
        "update interface endpoint c1-sts: subnet subnet-8: associated -> removed",
    ]
    assert [arguments for _, arguments in client.writes()] == [
        {"VpcEndpointId": "vpce-1", "AddSubnetIds": ["subnet-2"], "RemoveSubnetIds": ["subnet-8"]},
        {"VpcEndpointId": "vpce-1", "AddSecurityGroupIds": ["sg-1"], "RemoveSecurityGroupIds": ["sg-8"]},
        {"VpcEndpointId": "vpce-1", "PrivateDnsEnabled": True},
    ]


def test_a_black_hole_is_replaced_and_routes_of_others_stay() -> None:
    table = {
        "RouteTableId": "rtb-1",
        "Routes": [
            {"DestinationCidrBlock": "0.0.0.0/0", "NatGatewayId": "nat-1", "State": "blackhole"},
            {"DestinationCidrBlock": "192.0.2.0/24", "TransitGatewayId": "tgw-1", "State": "active"},
            {"DestinationCidrBlock": "10.9.0.0/16", "VpcPeeringConnectionId": "pcx-1", "State": "blackhole"},
        ],
        "Associations": [{"SubnetId": "subnet-1"}],
        "Tags": tagged("private-us-west-2a", Name="c1-private-us-west-2a", Project="rayplane"),
    }
    client = account()
    client.handlers["replace_route"] = lambda **_: {}
    reconciler, changes = network(client, check=False, availability_zones=["us-west-2a"], public_subnets=False)
    reconciler.context.view.tables = [table]
    reconciler.subnets.ids["private", "us-west-2a"] = "subnet-1"
    reconciler.tables.present("", {"us-west-2a": "nat-1"})
    reconciler.tables.peer_routes({"10.9.0.0/16": "pcx-1"}, ["pcx-1"])
    assert changes.actions == ["update route table c1-private-us-west-2a: route 0.0.0.0/0: nat-1 (gone) -> nat-1"]


def test_of_a_vpc_of_others_nothing_is_deleted_but_what_bears_our_tag() -> None:
    theirs = [{"Key": "kubernetes.io/cluster/c1", "Value": "shared"}, {"Key": "team", "Value": "x"}]
    client = account(
        describe_vpcs=[THEIRS],
        describe_subnets=[{**SUBNET, "Tags": theirs}],
        describe_internet_gateways=[{"InternetGatewayId": "igw-1", "Attachments": [{}]}],
        describe_route_tables=[{"RouteTableId": "rtb-1", "Routes": [], "Associations": []}],
        describe_security_groups=[{"GroupId": "sg-1", "GroupName": "c1-private"}],
        describe_nat_gateways=[{"NatGatewayId": "nat-1", "SubnetId": "subnet-1", "State": "available"}],
    )
    client.handlers["delete_tags"] = lambda **_: {}
    reconciler, changes = network(client, check=False, state="absent", existing_vpc_id="vpc-2")
    reconciler.absent()
    assert changes.actions == ["update subnet subnet-1: tag kubernetes.io/cluster/c1: shared -> None"]
    assert [call for call, _ in client.writes()] == ["delete_tags"]


def test_a_rerun_with_nothing_optional_asks_eleven_times() -> None:
    """Calls are the currency: whoever adds one has to say so here."""
    client = account(describe_vpcs=[VPC])
    reconciler, _ = network(client)
    reconciler.observe()
    assert sorted(call for call, _ in client.calls) == [
        "describe_addresses",
        "describe_internet_gateways",
        "describe_nat_gateways",
        "describe_route_tables",
        "describe_security_groups",
        "describe_subnets",
        "describe_tags",
        "describe_vpc_attribute",
        "describe_vpc_attribute",
        "describe_vpc_endpoints",
        "describe_vpcs",
    ]


def test_a_flow_log_waits_for_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def create(**_: Any) -> dict[str, Any]:
        if clock.now < 10:
            raise refusal("InvalidParameter", "Unable to assume given IAM role")
        return {"FlowLogIds": ["fl-1"], "Unsuccessful": []}

    client = account()
    client.handlers["create_flow_logs"] = create
    reconciler, _ = network(client, check=False, flow_logs=True)
    want = {"traffic": "ALL", "destination_type": "cloud-watch-logs", "destination": "g", "interval": 600}
    reconciler.flow_logs._create("flow log c1", want, "arn:aws:iam::1:role/r", {"a": "b"})
    assert clock.now >= 10
    client.handlers["create_flow_logs"] = lambda **_: {
        "Unsuccessful": [{"Error": {"Code": "400", "Message": "LogDestination: b does not exist"}}]
    }
    with pytest.raises(PlatformError, match="b does not exist"):
        reconciler.flow_logs._create("flow log c1", want, "", {"a": "b"})


TO_LOGS_BUCKET = {
    "flow_logs": True,
    "flow_logs_destination": "s3",
    "flow_logs_bucket": "c1-logs",
    "flow_logs_bucket_later": True,
}
FLOW_LOG = {
    "FlowLogId": "fl-1",
    "ResourceId": "vpc-1",
    "TrafficType": "ALL",
    "LogDestinationType": "s3",
    "LogDestination": "arn:aws:s3:::c1-logs/flow-logs",
    "Tags": tagged("flow-logs", Name="c1-flow-logs", Project="rayplane"),
}


def buckets(*names: str) -> FakeClient:
    def head(Bucket: str) -> Any:
        if Bucket not in names:
            raise refusal("404")
        return {}

    return FakeClient("s3", head_bucket=head)


def test_a_flow_log_waits_for_the_logs_bucket_which_is_made_after_the_network() -> None:
    client = account(describe_vpcs=[VPC])
    first, changes = network(client, s3=buckets(), **TO_LOGS_BUCKET)
    assert first.present()["flow_log_pending"] is True
    assert not [action for action in changes.actions if "flow log" in action]
    assert changes.warnings == []
    # What follows in the plan is the same as what follows in the deployment, where the bucket is there by then.
    client.handlers["create_flow_logs"] = lambda **_: {"FlowLogIds": ["fl-1"], "Unsuccessful": []}
    for check, s3 in ((True, buckets()), (False, buckets("c1-logs"))):
        then, changes = network(client, check=check, s3=s3, part="flow_logs", **TO_LOGS_BUCKET)
        assert then.present() == {"flow_log_pending": False}
        assert changes.actions == ["create flow log c1"]
        assert changes.warnings == []
    ((operation, given),) = client.writes()
    assert (operation, given["LogDestination"]) == ("create_flow_logs", "arn:aws:s3:::c1-logs/flow-logs")


def test_a_plan_of_an_empty_account_makes_the_flow_log_once() -> None:
    first, changes = network(account(), s3=buckets(), **TO_LOGS_BUCKET)
    assert first.present()["flow_log_pending"] is True
    assert "create flow log c1" not in changes.actions
    then, changes = network(account(), s3=buckets(), part="flow_logs", **TO_LOGS_BUCKET)
    then.present()
    assert changes.actions == ["create flow log c1"]
    alone, _ = network(account(), check=False, s3=buckets(), part="flow_logs", **TO_LOGS_BUCKET)
    with pytest.raises(PlatformError, match="run the stage network first"):
        alone.present()


def test_once_the_bucket_is_there_the_flow_log_is_the_networks() -> None:
    client = account(describe_vpcs=[VPC])
    reconciler, changes = network(client, s3=buckets("c1-logs"), **TO_LOGS_BUCKET)
    assert reconciler.present()["flow_log_pending"] is False
    assert "create flow log c1" in changes.actions
    # One that is there tells that the bucket is, without a call.
    client = account(describe_vpcs=[VPC], describe_flow_logs=[FLOW_LOG])
    reconciler, changes = network(client, s3=None, **TO_LOGS_BUCKET)
    assert reconciler.present()["flow_log_pending"] is False
    assert not [action for action in changes.actions if "flow log" in action]


def test_a_flow_log_that_moves_to_the_bucket_stays_until_the_bucket_is_there() -> None:
    client = account(
        describe_vpcs=[VPC],
        describe_flow_logs=[
            {**FLOW_LOG, "LogDestinationType": "cloud-watch-logs", "LogDestination": "", "LogGroupName": "g"}
        ],
    )
    reconciler, changes = network(client, s3=buckets(), **TO_LOGS_BUCKET)
    assert reconciler.present()["flow_log_pending"] is True
    assert not [action for action in changes.actions if "flow log" in action]
    reconciler, changes = network(client, s3=buckets("c1-logs"), **TO_LOGS_BUCKET)
    reconciler.present()
    assert "update flow log c1: destination_type: cloud-watch-logs -> s3" in changes.actions


def test_a_bucket_of_somebody_else_has_to_be_there() -> None:
    given = {**TO_LOGS_BUCKET, "flow_logs_bucket_later": False}
    reconciler, changes = network(account(describe_vpcs=[VPC]), s3=buckets(), **given)
    assert reconciler.present()["flow_log_pending"] is False
    assert "create flow log c1" in changes.actions
    assert "cannot be seen" in changes.warnings[0]


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
    rules = rules_of(permissions)
    assert rules == {("tcp", 443, 443, "10.0.0.0/16"), ("-1", None, None, "sg-1")}
    assert rules_of([permission(rule) for rule in rules]) == rules
