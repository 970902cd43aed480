"""The parts of EC2's networks that MiniStack 1.5 lacks, added to it in its own process: ``install()`` before it serves.

NAT gateways say which address they hold, and hold it until they are deleted. Interface endpoints have security groups
and private DNS. Routes lead to peerings, and are black holes when their target is gone. Peerings have DNS options, and
a type among tags. Flow logs take the tags that AWS takes. An instance's security groups can be changed, and its disks
end with it. Launch templates keep placement, reservations and keys.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ministack.services import ec2  # type: ignore[import-not-found,unused-ignore]

Answer = tuple[int, dict[str, str], bytes]
Params = dict[str, Any]
Inner = Callable[[Params], Answer]
_TYPE = re.compile(r"[a-z][a-z0-9-]*\d[a-z0-9-]*\.(nano|micro|small|medium|large|\d*xlarge|metal(-\d+xl)?)")

OPTION = "AllowDnsResolutionFromRemoteVpc"


def yes(value: bool) -> str:
    """Return a truth as XML has it."""
    return "true" if value else "false"


def create_flow_logs(inner: Inner, params: Params) -> Answer:
    """CreateFlowLogs: the type of its tags is vpc-flow-log."""
    renamed = {
        key: "flow-log" if key.endswith(".ResourceType") and ec2._p(params, key) == "vpc-flow-log" else value
        for key, value in params.items()
    }
    return inner(renamed)


def create_nat_gateway(inner: Inner, params: Params) -> Answer:
    """CreateNatGateway: an address is held by one gateway at a time."""
    allocation = ec2._p(params, "AllocationId")
    address = ec2._addresses.get(allocation)
    if address and address.get("AssociationId"):
        refusal: Answer = ec2._error(
            "Resource.AlreadyAssociated", f"Elastic IP address [{allocation}] is already associated", 400
        )
        return refusal
    answer = inner(params)
    if address and answer[0] == 200:
        address["AssociationId"] = f"eipassoc-{ec2.new_uuid().replace('-', '')[:17]}"
    return answer


def describe_nat_gateways(inner: Inner, params: Params) -> Answer:
    """DescribeNatGateways: with the address of each."""

    def show(match: re.Match[str]) -> str:
        allocation = ec2._nat_gateways[match[1]].get("AllocationId")
        public = ec2._addresses.get(allocation, {}).get("PublicIp", "")
        item = f"<item><allocationId>{allocation}</allocationId><publicIp>{public}</publicIp></item>"
        return f"{match[0].removesuffix('<natGatewayAddressSet/>')}<natGatewayAddressSet>{item}</natGatewayAddressSet>"

    status, headers, body = inner(params)
    pattern = r"<natGatewayId>([^<]+)</natGatewayId>.*?<natGatewayAddressSet/>"
    return status, headers, re.sub(pattern, show, body.decode(), flags=re.DOTALL).encode()


def delete_nat_gateway(inner: Inner, params: Params) -> Answer:
    """DeleteNatGateway: its address is free again."""
    nat = ec2._nat_gateways.get(ec2._p(params, "NatGatewayId"), {})
    address = ec2._addresses.get(nat.get("AllocationId"))
    if address:
        address["AssociationId"] = None
    return inner(params)


def create_vpc_endpoint(inner: Inner, params: Params) -> Answer:
    """CreateVpcEndpoint: with security groups and private DNS."""
    before = set(ec2._vpc_endpoints)
    answer = inner(params)
    for key in set(ec2._vpc_endpoints) - before:
        ec2._vpc_endpoints[key]["Groups"] = ec2._parse_member_list(params, "SecurityGroupId")
        ec2._vpc_endpoints[key]["PrivateDnsEnabled"] = ec2._p(params, "PrivateDnsEnabled") == "true"
    return answer


def modify_vpc_endpoint(inner: Inner, params: Params) -> Answer:
    """ModifyVpcEndpoint: with security groups and private DNS."""
    endpoint = ec2._vpc_endpoints.get(ec2._p(params, "VpcEndpointId"))
    if endpoint:
        removed = ec2._parse_member_list(params, "RemoveSecurityGroupId")
        kept = [group for group in endpoint.get("Groups", []) if group not in removed]
        endpoint["Groups"] = kept + ec2._parse_member_list(params, "AddSecurityGroupId")
        if ec2._p(params, "PrivateDnsEnabled"):
            endpoint["PrivateDnsEnabled"] = ec2._p(params, "PrivateDnsEnabled") == "true"
    return inner(params)


def describe_vpc_endpoints(inner: Inner, params: Params) -> Answer:
    """DescribeVpcEndpoints: with security groups and private DNS."""

    def show(match: re.Match[str]) -> str:
        endpoint = ec2._vpc_endpoints[match[1]]
        if endpoint["VpcEndpointType"] != "Interface":
            return match[0]
        groups = "".join(f"<item><groupId>{group}</groupId></item>" for group in endpoint.get("Groups", []))
        dns = yes(endpoint.get("PrivateDnsEnabled", False))
        return f"{match[0]}<groupSet>{groups}</groupSet><privateDnsEnabled>{dns}</privateDnsEnabled>"

    status, headers, body = inner(params)
    return status, headers, re.sub(r"<vpcEndpointId>([^<]+)</vpcEndpointId>", show, body.decode()).encode()


def replace_route(inner: Inner, params: Params) -> Answer:
    """ReplaceRoute: also to and from a peering."""
    answer = inner(params)
    table = ec2._route_tables.get(ec2._p(params, "RouteTableId"), {})
    peering = ec2._p(params, "VpcPeeringConnectionId")
    for route in table.get("Routes", []):
        if route.get("DestinationCidrBlock") == ec2._p(params, "DestinationCidrBlock"):
            route.pop("VpcPeeringConnectionId", None)
            if peering:
                route.pop("GatewayId", None)
                route["VpcPeeringConnectionId"] = peering
    return answer


def describe_route_tables(inner: Inner, params: Params) -> Answer:
    """DescribeRouteTables: a route whose target is gone is a black hole."""
    for table in ec2._route_tables.values():
        for route in table["Routes"]:
            route["State"] = "active" if leads_somewhere(route) else "blackhole"
    return inner(params)


def leads_somewhere(route: dict[str, Any]) -> bool:
    """Whether the target of a route works."""
    gateway, nat, peering = (route.get(key) for key in ("GatewayId", "NatGatewayId", "VpcPeeringConnectionId"))
    if nat:
        return bool(ec2._nat_gateways.get(nat, {}).get("State") == "available")
    if peering:
        return peering in ec2._vpc_peering and ec2._vpc_peering[peering]["Status"]["Code"] == "active"
    if gateway and gateway.startswith("igw-"):
        return bool(ec2._internet_gateways.get(gateway, {}).get("Attachments"))
    return True


def modify_peering_options(params: Params) -> Answer:
    """ModifyVpcPeeringConnectionOptions: of an active peering."""
    peering = ec2._p(params, "VpcPeeringConnectionId")
    if peering not in ec2._vpc_peering or ec2._vpc_peering[peering]["Status"]["Code"] != "active":
        refusal: Answer = ec2._error("OperationNotPermitted", f"Peering connection {peering} is not active", 400)
        return refusal
    for account, region in ec2._vpc_peering_scopes(ec2._vpc_peering[peering]):
        record = ec2._vpc_peering.get_scoped(account, region, peering)
        for side in ("Requester", "Accepter"):
            value = ec2._p(params, f"{side}PeeringConnectionOptions.{OPTION}")
            if record is not None and value:
                record[f"{side}VpcInfo"]["Resolves"] = value == "true"
    answer: Answer = ec2._xml(200, "ModifyVpcPeeringConnectionOptionsResponse", "")
    return answer


def describe_peerings(inner: Inner, params: Params) -> Answer:
    """DescribeVpcPeeringConnections: with the DNS options of both sides."""

    def show(match: re.Match[str]) -> str:
        item = match[0]
        for side in ("requester", "accepter"):
            resolves = yes(ec2._vpc_peering[match[1]][f"{side.title()}VpcInfo"].get("Resolves", False))
            name = OPTION[0].lower() + OPTION[1:]
            options = f"<peeringOptions><{name}>{resolves}</{name}></peeringOptions>"
            item = item.replace(f"</{side}VpcInfo>", f"{options}</{side}VpcInfo>")
        return item

    status, headers, body = inner(params)
    pattern = r"<vpcPeeringConnectionId>([^<]+)</vpcPeeringConnectionId>.*?</accepterVpcInfo>"
    return status, headers, re.sub(pattern, show, body.decode(), flags=re.DOTALL).encode()


def modify_instance_attribute(params: Params) -> Answer:
    """ModifyInstanceAttribute: the security groups."""
    instance = ec2._instances.get(ec2._p(params, "InstanceId"))
    if instance:
        groups = ec2._parse_member_list(params, "GroupId")
        names = {group: ec2._security_groups.get(group, {}).get("GroupName", group) for group in groups}
        instance["SecurityGroups"] = [{"GroupId": group, "GroupName": names[group]} for group in groups]
    answer: Answer = ec2._xml(200, "ModifyInstanceAttributeResponse", "<return>true</return>")
    return answer


def terminate_instances(inner: Inner, params: Params) -> Answer:
    """TerminateInstances: the disks that are to go with an instance do."""
    answer = inner(params)
    if answer[0] == 200:
        ended = ec2._parse_member_list(params, "InstanceId")
        for key, volume in list(ec2._volumes.items()):
            if any(one["InstanceId"] in ended and one["DeleteOnTermination"] for one in volume["Attachments"]):
                del ec2._volumes[key]
    return answer


def create_launch_template(inner: Inner, params: Params) -> Answer:
    """CreateLaunchTemplate: without a second record of the tags, which would hide what becomes of them later."""
    answer = inner(params)
    for template in ec2._launch_templates.values():
        template.pop("Tags", None)
    return answer


# What MiniStack drops of a launch template: path in a request, and the element of an answer.
TEMPLATE_SETTINGS = {
    ("Placement", "GroupName"): ("placement", "groupName"),
    ("InstanceMarketOptions", "MarketType"): ("instanceMarketOptions", "marketType"),
    ("CapacityReservationSpecification", "CapacityReservationPreference"): (
        "capacityReservationSpecification",
        "capacityReservationPreference",
    ),
    ("CapacityReservationSpecification", "CapacityReservationTarget", "CapacityReservationId"): (
        "capacityReservationSpecification",
        "capacityReservationTarget",
        "capacityReservationId",
    ),
    ("CapacityReservationSpecification", "CapacityReservationTarget", "CapacityReservationResourceGroupArn"): (
        "capacityReservationSpecification",
        "capacityReservationTarget",
        "capacityReservationResourceGroupArn",
    ),
}


def keep_template_settings() -> None:
    """Let launch templates keep the settings that MiniStack drops."""
    parse, render = ec2._parse_lt_data, ec2._lt_data_xml

    def parse_more(params: Any, prefix: str = "LaunchTemplateData") -> dict[str, Any]:
        data: dict[str, Any] = parse(params, prefix)
        for path in TEMPLATE_SETTINGS:
            value = ec2._p(params, ".".join((prefix, *path)))
            if value:
                place = data
                for step in path[:-1]:
                    place = place.setdefault(step, {})
                place[path[-1]] = value
        for index, mapping in enumerate(data.get("BlockDeviceMappings", ()), 1):
            key = ec2._p(params, f"{prefix}.BlockDeviceMapping.{index}.Ebs.KmsKeyId")
            if key:
                mapping["Ebs"]["KmsKeyId"] = key
        return data

    def render_more(data: dict[str, Any]) -> str:
        xml = str(render(data))
        for mapping in data.get("BlockDeviceMappings", ()):
            key = mapping.get("Ebs", {}).get("KmsKeyId")
            if key:
                device = f"<deviceName>{mapping['DeviceName']}</deviceName><ebs>"
                xml = xml.replace(device, f"{device}<kmsKeyId>{ec2._esc(key)}</kmsKeyId>")
        for path, elements in TEMPLATE_SETTINGS.items():
            value: Any = data
            for step in path:
                value = value.get(step, {})
            if value:
                opening = "".join(f"<{one}>" for one in elements)
                closing = "".join(f"</{one}>" for one in reversed(elements))
                xml += opening + str(ec2._esc(value)) + closing
        return xml

    ec2._parse_lt_data, ec2._lt_data_xml = parse_more, render_more


def resource_type(inner: Callable[[str], str], resource: str) -> str:
    """The type that DescribeTags gives a resource."""
    if resource.startswith("pcx-"):
        return "vpc-peering-connection"
    kind = inner(resource)
    return "vpc-flow-log" if kind == "flow-log" else kind


WRAPPED: dict[str, Callable[[Inner, Params], Answer]] = {
    "CreateFlowLogs": create_flow_logs,
    "CreateLaunchTemplate": create_launch_template,
    "CreateNatGateway": create_nat_gateway,
    "DescribeNatGateways": describe_nat_gateways,
    "DeleteNatGateway": delete_nat_gateway,
    "CreateVpcEndpoint": create_vpc_endpoint,
    "ModifyVpcEndpoint": modify_vpc_endpoint,
    "DescribeVpcEndpoints": describe_vpc_endpoints,
    "ReplaceRoute": replace_route,
    "DescribeRouteTables": describe_route_tables,
    "DescribeVpcPeeringConnections": describe_peerings,
    "TerminateInstances": terminate_instances,
}


def describe_instance_type_offerings(params: Params) -> Answer:
    """DescribeInstanceTypeOfferings: types that are named as AWS names them, in every zone."""
    items = "".join(
        f"<item><instanceType>{kind}</instanceType><locationType>availability-zone</locationType>"
        f"<location>{ec2.get_region()}{letter}</location></item>"
        for kind in ec2._parse_filters(params).get("instance-type", [])
        if _TYPE.fullmatch(kind)
        for letter in "abc"
    )
    answer: Answer = ec2._xml(
        200, "DescribeInstanceTypeOfferingsResponse", f"<instanceTypeOfferingSet>{items}</instanceTypeOfferingSet>"
    )
    return answer


ADDED: dict[str, Callable[[Params], Answer]] = {
    "ModifyVpcPeeringConnectionOptions": modify_peering_options,
    "ModifyInstanceAttribute": modify_instance_attribute,
    "DescribeInstanceTypeOfferings": describe_instance_type_offerings,
}


def operations() -> dict[str, list[str]]:
    """Return what is patched here, by service."""
    templates = ["CreateLaunchTemplateVersion", "DescribeLaunchTemplateVersions"]
    return {"ec2": [*WRAPPED, *ADDED, *templates, "DescribeTags"]}


def install() -> None:
    """Put these in front of MiniStack's own, or beside them."""
    keep_template_settings()
    ec2._guess_resource_type = partial(resource_type, ec2._guess_resource_type)
    for name, wrapper in WRAPPED.items():
        ec2._ACTION_MAP[name] = partial(wrapper, ec2._ACTION_MAP[name])
    for name, operation in ADDED.items():
        ec2._ACTION_MAP.setdefault(name, operation)
