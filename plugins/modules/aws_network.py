#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the whole network of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_network
short_description: Reconcile the VPC of one cluster as a whole
description:
  - Keeps a VPC with its internet gateway, subnets, NAT gateways, route tables, VPC endpoints and security group as
    described, in one call.
  - Says property by property what differs and repairs only that. Works in check mode on an account where nothing
    exists yet.
  - Resources are found by what they are (a subnet by its CIDR, a route table by its subnet) and by the tag
    C(rayplane.io/cluster), so an
    interrupted run is continued and a lost tag is repaired instead of a second resource being made.
  - Tags and routes that it was not asked for are left alone.
options:
  cluster_name:
    description: Owner of the network; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  state:
    description: Whether the network exists.
    type: str
    choices: [present, absent]
    default: present
  name:
    description: Start of the resources' C(Name) tags. Empty takes O(cluster_name).
    type: str
    default: ""
  vpc_cidr:
    description: Addresses of the VPC, /16 to /28.
    type: str
    default: 10.0.0.0/16
  availability_zones:
    description: Two to six zones, in order; new ones go to the end. Required to create a network.
    type: list
    elements: str
    default: []
  private_subnet_cidrs:
    description: One CIDR a zone; empty has them computed.
    type: list
    elements: str
    default: []
  public_subnets:
    description: Whether there are public subnets and an internet gateway.
    type: bool
    default: true
  public_subnet_cidrs:
    description: One CIDR a zone; empty has them computed.
    type: list
    elements: str
    default: []
  nat_mode:
    description: NAT gateways for the private subnets - none, one for all, or one in each zone.
    type: str
    choices: [none, single, per_zone]
    default: single
  s3_endpoint:
    description: >-
      Whether S3 is reached through a gateway endpoint, which costs nothing and spares the NAT gateways the model
      files.
    type: bool
    default: true
  interface_endpoints:
    description: >-
      Short names of services to reach through interface endpoints in the private subnets, such as C(ecr.api),
      C(sts).
    type: list
    elements: str
    default: []
  security_group_rules:
    description: Ingress rules of the network's own security group, beside HTTPS from the VPC. The group has no others.
    type: list
    elements: dict
    default: []
    suboptions:
      protocol:
        description: Protocol name; V(-1) is every one.
        type: str
        default: tcp
      from_port:
        description: First port.
        type: int
        required: true
      to_port:
        description: Last port.
        type: int
        required: true
      cidr:
        description: Where the traffic comes from.
        type: str
        required: true
  tags:
    description: Tags of every resource.
    type: dict
    default: {}
  private_subnet_tags:
    description: Further tags of private subnets.
    type: dict
    default: {}
  public_subnet_tags:
    description: Further tags of public subnets.
    type: dict
    default: {}
  wait_timeout:
    description: Longest wait for one slow resource (NAT gateways, endpoints), in seconds.
    type: int
    default: 600
extends_documentation_fragment:
  - amazon.aws.common.modules
  - amazon.aws.region.modules
  - amazon.aws.boto3
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the network of a cluster over two zones
  aws_network:
    cluster_name: ray-llm-cluster
    availability_zones: [us-west-2a, us-west-2b]
    nat_mode: per_zone
    tags:
      Project: rayplane
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
vpc_id:
  description: Id of the VPC; a description in angle brackets where check mode predicts a new one.
  returned: state is present
  type: str
private_subnet_ids:
  description: Ids of the private subnets in the order of the zones.
  returned: state is present
  type: list
  elements: str
public_subnet_ids:
  description: Ids of the public subnets in the order of the zones.
  returned: state is present
  type: list
  elements: str
security_group_id:
  description: Id of the network's security group.
  returned: state is present
  type: str
nat_public_ips:
  description: Addresses that the private subnets have on the internet.
  returned: state is present
  type: list
  elements: str
"""

from typing import Any

from ansible.module_utils.rayplane_aws import (
    OWNER_TAG,
    ROLE_TAG,
    Api,
    Changes,
    PlatformError,
    run,
    sync_tags,
    tag_dict,
    tag_list,
    wait_until,
)
from ansible.module_utils.rayplane_network import PlannedSubnet, plan_subnets
from ansible_collections.amazon.aws.plugins.module_utils.modules import AnsibleAWSModule

ANYWHERE = "0.0.0.0/0"
Rule = tuple[str, int | None, int | None, str]


class Network:
    """One cluster's network: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], region: str, api: Api, changes: Changes) -> None:
        self.params = params
        self.region = region
        self.api = api
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.name: str = params["name"] or self.owner
        self.vpc_id = ""

    # What is there

    def observe(self) -> None:
        """Read the VPC and all that is in it."""
        vpc = self._find_vpc()
        self.vpc = vpc
        self.vpc_id = vpc["VpcId"] if vpc else ""
        self.subnets = self._inside("describe_subnets", "Subnets")
        self.gateways = self._inside("describe_internet_gateways", "InternetGateways", "attachment.vpc-id")
        self.nats = [
            nat
            for nat in self._inside("describe_nat_gateways", "NatGateways")
            if nat["State"] in ("pending", "available")
        ]
        self.tables = self._inside("describe_route_tables", "RouteTables")
        self.endpoints = [
            endpoint
            for endpoint in self._inside("describe_vpc_endpoints", "VpcEndpoints")
            if str(endpoint.get("State", "available")).lower()
            not in ("deleting", "deleted", "failed", "rejected", "expired")
        ]
        self.groups = self._inside("describe_security_groups", "SecurityGroups")
        self.addresses = self.api.read(
            "describe_addresses", self.name, Filters=[{"Name": f"tag:{OWNER_TAG}", "Values": [self.owner]}]
        )["Addresses"]

    def _find_vpc(self) -> dict[str, Any] | None:
        found: list[dict[str, Any]] = []
        # The second look finds a VPC whose owner tag was removed by hand; one that another cluster owns is never taken.
        for key, value in ((OWNER_TAG, self.owner), ("Name", self.name)):
            answer = self.api.pages(
                "describe_vpcs", "Vpcs", self.name, Filters=[{"Name": f"tag:{key}", "Values": [value]}]
            )
            found = [vpc for vpc in answer if tag_dict(vpc.get("Tags")).get(OWNER_TAG, self.owner) == self.owner]
            if found:
                break
        if len(found) > 1:
            ids = ", ".join(sorted(vpc["VpcId"] for vpc in found))
            raise PlatformError(
                f"{len(found)} VPCs belong to {self.owner} ({ids}): remove the tag {OWNER_TAG} from all but the one"
                " to keep"
            )
        return found[0] if found else None

    def _inside(self, operation: str, key: str, attribute: str = "vpc-id") -> list[dict[str, Any]]:
        if not self.vpc_id:
            return []
        # NAT gateways are the one kind whose parameter is named Filter.
        filters = "Filter" if operation == "describe_nat_gateways" else "Filters"
        answer: list[dict[str, Any]] = self.api.pages(
            operation, key, self.name, **{filters: [{"Name": attribute, "Values": [self.vpc_id]}]}
        )
        return answer

    # What is wanted

    def present(self) -> dict[str, Any]:
        """Bring the network to its description and return its ids."""
        params = self.params
        try:
            plan = plan_subnets(
                params["vpc_cidr"],
                params["availability_zones"],
                params["public_subnets"],
                params["private_subnet_cidrs"],
                params["public_subnet_cidrs"],
            )
        except ValueError as error:
            raise PlatformError(f"network of {self.owner}: {error}") from error
        if params["nat_mode"] != "none" and not params["public_subnets"]:
            raise PlatformError(
                f"network of {self.owner}: nat_mode {params['nat_mode']} needs public subnets: set public_subnets,"
                " or nat_mode none with"
                " interface endpoints for what the nodes call"
            )
        self.observe()
        self._vpc()
        gateway = self._internet_gateway() if params["public_subnets"] else ""
        ids = {(subnet["role"], subnet["zone"]): self._subnet(subnet) for subnet in plan}
        self._unplanned_subnets(plan)
        nats = self._nat_gateways(ids)
        tables = self._route_tables(ids, gateway, nats)
        self._retire_nat_gateways(nats)
        group = self._security_group()
        zones = params["availability_zones"]
        private = [ids["private", zone] for zone in zones]
        self._s3_endpoint(tables)
        self._interface_endpoints(private, group)
        return {
            "vpc_id": self.vpc_id,
            "private_subnet_ids": private,
            "public_subnet_ids": [ids["public", zone] for zone in zones] if params["public_subnets"] else [],
            "security_group_id": group,
            "nat_public_ips": self._nat_addresses(nats),
        }

    def _tags(self, role: str, suffix: str = "", **more: str) -> dict[str, str]:
        tags = {str(key): str(value) for key, value in {**self.params["tags"], **more}.items()}
        return {**tags, "Name": self.name + suffix, OWNER_TAG: self.owner, ROLE_TAG: role}

    def _specification(self, kind: str, tags: dict[str, str]) -> list[dict[str, Any]]:
        return [{"ResourceType": kind, "Tags": tag_list(tags)}]

    def _retag(self, resource: str, resource_id: str, have: Any, want: dict[str, str]) -> None:
        lacking = sync_tags(self.changes, resource, tag_dict(have), want)
        if lacking:
            self.api.write("create_tags", resource, Resources=[resource_id], Tags=tag_list(lacking))

    def _vpc(self) -> None:
        resource = f"VPC {self.name}"
        cidr = self.params["vpc_cidr"]
        tags = self._tags("vpc")
        if self.vpc is None:
            self.changes.create(resource, {"cidr": cidr, "dns_support": True, "dns_hostnames": True, "tags": tags})
            answer = self.api.write(
                "create_vpc", resource, CidrBlock=cidr, TagSpecifications=self._specification("vpc", tags)
            )
            self.vpc_id = answer["Vpc"]["VpcId"] if answer else f"<new {resource}>"
            for attribute in ("EnableDnsSupport", "EnableDnsHostnames"):
                self.api.write("modify_vpc_attribute", resource, VpcId=self.vpc_id, **{attribute: {"Value": True}})
            # AWS makes a main route table and a default security group with the VPC; neither is ours.
            return
        if self.vpc["CidrBlock"] != cidr:
            raise PlatformError(
                f"{resource} ({self.vpc_id}) has the addresses {self.vpc['CidrBlock']}, network_vpc_cidr asks for"
                f" {cidr}: a VPC keeps its"
                " addresses for life; set the variable back, or destroy the cluster first"
            )
        self._retag(resource, self.vpc_id, self.vpc.get("Tags"), tags)
        for attribute, parameter in (
            ("enableDnsSupport", "EnableDnsSupport"),
            ("enableDnsHostnames", "EnableDnsHostnames"),
        ):
            answer = self.api.read("describe_vpc_attribute", resource, VpcId=self.vpc_id, Attribute=attribute)
            if self.changes.update(resource, {attribute: answer[parameter]["Value"]}, {attribute: True}):
                self.api.write("modify_vpc_attribute", resource, VpcId=self.vpc_id, **{parameter: {"Value": True}})

    def _internet_gateway(self) -> str:
        resource = f"internet gateway {self.name}"
        tags = self._tags("internet-gateway")
        found = self.gateways or self._detached_gateways()
        if not found:
            self.changes.create(resource, {"vpc": self.vpc_id, "tags": tags})
            answer = self.api.write(
                "create_internet_gateway", resource, TagSpecifications=self._specification("internet-gateway", tags)
            )
            gateway_id = str(answer["InternetGateway"]["InternetGatewayId"]) if answer else f"<new {resource}>"
            self.api.write("attach_internet_gateway", resource, InternetGatewayId=gateway_id, VpcId=self.vpc_id)
            return gateway_id
        gateway = found[0]
        gateway_id = str(gateway["InternetGatewayId"])
        if not gateway.get("Attachments"):
            self.changes.update(resource, {"vpc": None}, {"vpc": self.vpc_id})
            self.api.write("attach_internet_gateway", resource, InternetGatewayId=gateway_id, VpcId=self.vpc_id)
        self._retag(resource, gateway_id, gateway.get("Tags"), tags)
        return gateway_id

    def _detached_gateways(self) -> list[dict[str, Any]]:
        answer = self.api.pages(
            "describe_internet_gateways",
            "InternetGateways",
            self.name,
            Filters=[{"Name": f"tag:{OWNER_TAG}", "Values": [self.owner]}],
        )
        return [gateway for gateway in answer if not gateway.get("Attachments")]

    def _subnet(self, planned: PlannedSubnet) -> str:
        role, zone, cidr = planned["role"], planned["zone"], planned["cidr"]
        suffix = f"-{role}-{zone}"
        resource = f"subnet {self.name}{suffix}"
        balancer = "kubernetes.io/role/elb" if role == "public" else "kubernetes.io/role/internal-elb"
        kubernetes = {balancer: "1", f"kubernetes.io/cluster/{self.owner}": "shared"}
        tags = self._tags(f"{role}-{zone}", suffix, **kubernetes, **self.params[f"{role}_subnet_tags"])
        public = role == "public"
        found = next((subnet for subnet in self.subnets if subnet["CidrBlock"] == cidr), None)
        if found is None:
            self._refuse_move(resource, f"{role}-{zone}", cidr)
            self.changes.create(resource, {"cidr": cidr, "zone": zone, "public_addresses": public, "tags": tags})
            answer = self.api.write(
                "create_subnet",
                resource,
                VpcId=self.vpc_id,
                CidrBlock=cidr,
                AvailabilityZone=zone,
                TagSpecifications=self._specification("subnet", tags),
            )
            subnet_id = str(answer["Subnet"]["SubnetId"]) if answer else f"<new {resource}>"
            if public:
                self.api.write(
                    "modify_subnet_attribute", resource, SubnetId=subnet_id, MapPublicIpOnLaunch={"Value": True}
                )
            return subnet_id
        subnet_id = str(found["SubnetId"])
        if found["AvailabilityZone"] != zone:
            raise PlatformError(
                f"{resource}: {cidr} is {subnet_id} in {found['AvailabilityZone']}, not in {zone}: a subnet never"
                " moves; keep the order of"
                " network_availability_zones and add new zones at its end"
            )
        self._retag(resource, subnet_id, found.get("Tags"), tags)
        if self.changes.update(
            resource, {"public_addresses": found["MapPublicIpOnLaunch"]}, {"public_addresses": public}
        ):
            self.api.write(
                "modify_subnet_attribute", resource, SubnetId=subnet_id, MapPublicIpOnLaunch={"Value": public}
            )
        return subnet_id

    def _refuse_move(self, resource: str, role: str, cidr: str) -> None:
        for subnet in self.subnets:
            if tag_dict(subnet.get("Tags")).get(ROLE_TAG) == role:
                raise PlatformError(
                    f"{resource} exists with {subnet['CidrBlock']} ({subnet['SubnetId']}), asked for is {cidr}: a"
                    " subnet keeps its addresses"
                    " for life; set the CIDRs back, or remove that subnet first"
                )

    def _unplanned_subnets(self, plan: list[PlannedSubnet]) -> None:
        planned = {subnet["cidr"] for subnet in plan}
        for subnet in self.subnets:
            if subnet["CidrBlock"] not in planned and tag_dict(subnet.get("Tags")).get(OWNER_TAG) == self.owner:
                self.changes.warnings.append(
                    f"subnet {subnet['SubnetId']} ({subnet['CidrBlock']}) of {self.owner} is no longer in the plan;"
                    " nodes may use it, so it"
                    " stays: remove it by hand when it is empty"
                )

    # NAT gateways

    def _nat_zones(self) -> list[str]:
        zones: list[str] = self.params["availability_zones"]
        return {"none": [], "single": zones[:1], "per_zone": zones}[self.params["nat_mode"]]

    def _nat_gateways(self, ids: dict[tuple[str, str], str]) -> dict[str, str]:
        nats = {zone: self._nat_gateway(zone, ids["public", zone]) for zone in self._nat_zones()}
        if not self.changes.check_mode:
            pending = {nat["NatGatewayId"] for nat in self.nats if nat["State"] == "pending"}
            for zone, nat_id in nats.items():
                if nat_id in pending:
                    self._wait_for_nat(zone, nat_id)
        return nats

    def _nat_gateway(self, zone: str, subnet_id: str) -> str:
        resource = f"NAT gateway {self.name}-{zone}"
        tags = self._tags(f"nat-{zone}", f"-{zone}")
        found = next((nat for nat in self.nats if nat["SubnetId"] == subnet_id), None)
        if found is not None:
            self._retag(resource, found["NatGatewayId"], found.get("Tags"), tags)
            return str(found["NatGatewayId"])
        address = self._address(zone)
        self.changes.create(resource, {"subnet": subnet_id, "address": address, "tags": tags})
        answer = self.api.write(
            "create_nat_gateway",
            resource,
            SubnetId=subnet_id,
            AllocationId=address,
            TagSpecifications=self._specification("natgateway", tags),
        )
        if not answer:
            return f"<new {resource}>"
        # Waited for together, after all of them were asked for.
        self.nats.append({**answer["NatGateway"], "State": "pending"})
        return str(answer["NatGateway"]["NatGatewayId"])

    def _address(self, zone: str) -> str:
        resource = f"address {self.name}-nat-{zone}"
        tags = self._tags(f"nat-{zone}", f"-nat-{zone}")
        for address in self.addresses:
            # One that an interrupted run allocated, or whose gateway was deleted by hand.
            if tag_dict(address.get("Tags")).get(ROLE_TAG) == f"nat-{zone}" and not address.get("AssociationId"):
                return str(address["AllocationId"])
        self.changes.create(resource, {"tags": tags})
        answer = self.api.write(
            "allocate_address", resource, Domain="vpc", TagSpecifications=self._specification("elastic-ip", tags)
        )
        return str(answer["AllocationId"]) if answer else f"<new {resource}>"

    def _wait_for_nat(self, zone: str, nat_id: str) -> None:
        resource = f"NAT gateway {self.name}-{zone}"

        def probe() -> tuple[bool, str]:
            answer = self.api.read("describe_nat_gateways", resource, NatGatewayIds=[nat_id])["NatGateways"]
            state = answer[0]["State"] if answer else "not listed yet"
            if state == "failed":
                raise PlatformError(
                    f"{resource} ({nat_id}) failed: {answer[0].get('FailureMessage', 'no reason given')}"
                )
            return state == "available", state

        wait_until(resource, probe, self.params["wait_timeout"])

    def _retire_nat_gateways(self, wanted: dict[str, str]) -> None:
        stale = [
            nat
            for nat in self.nats
            if nat["NatGatewayId"] not in wanted.values() and tag_dict(nat.get("Tags")).get(OWNER_TAG) == self.owner
        ]
        self._delete_nats(stale)

    def _delete_nats(self, nats: list[dict[str, Any]]) -> None:
        for nat in nats:
            resource = f"NAT gateway {tag_dict(nat.get('Tags')).get('Name', nat['NatGatewayId'])}"
            self.changes.delete(resource, {"id": nat["NatGatewayId"], "subnet": nat["SubnetId"]})
            self.api.write("delete_nat_gateway", resource, NatGatewayId=nat["NatGatewayId"])
        for nat in nats:
            if not self.changes.check_mode:
                self._wait_until_gone(nat["NatGatewayId"])
            # An address cannot be released while its gateway lives.
            for used in nat.get("NatGatewayAddresses", ()):
                self._release(used.get("AllocationId", ""))

    def _wait_until_gone(self, nat_id: str) -> None:
        def probe() -> tuple[bool, str]:
            answer = self.api.read(
                "describe_nat_gateways", nat_id, absent=("NatGatewayNotFound",), NatGatewayIds=[nat_id]
            )
            states = [nat["State"] for nat in answer["NatGateways"]] if answer else []
            return all(state in ("deleted", "failed") for state in states), ", ".join(states)

        wait_until(f"deletion of NAT gateway {nat_id}", probe, self.params["wait_timeout"])

    def _release(self, allocation_id: str) -> None:
        for address in self.addresses:
            if address["AllocationId"] == allocation_id:
                resource = f"address {tag_dict(address.get('Tags')).get('Name', allocation_id)}"
                self.changes.delete(resource, {"id": allocation_id, "public_ip": address.get("PublicIp")})
                self.api.write("release_address", resource, AllocationId=allocation_id)
                self.addresses.remove(address)
                return

    def _nat_addresses(self, nats: dict[str, str]) -> list[str]:
        return [
            used["PublicIp"]
            for nat in self.nats
            if nat["NatGatewayId"] in nats.values()
            for used in nat.get("NatGatewayAddresses", ())
            if used.get("PublicIp")
        ]

    # Route tables

    def _route_tables(self, ids: dict[tuple[str, str], str], gateway: str, nats: dict[str, str]) -> list[str]:
        zones: list[str] = self.params["availability_zones"]
        tables = []
        if gateway:
            public = [ids["public", zone] for zone in zones]
            tables.append(self._route_table("public", "-public", public, "GatewayId", gateway))
        for zone in zones:
            # A table a zone even with one NAT gateway: going to one a zone then changes routes, not associations.
            nat = nats.get(zone) or next(iter(nats.values()), "")
            tables.append(
                self._route_table(f"private-{zone}", f"-private-{zone}", [ids["private", zone]], "NatGatewayId", nat)
            )
        return tables

    def _route_table(self, role: str, suffix: str, subnets: list[str], kind: str, target: str) -> str:
        resource = f"route table {self.name}{suffix}"
        tags = self._tags(role, suffix)
        table = self._find_table(role, subnets)
        if table is None:
            self.changes.create(
                resource, {"routes": {ANYWHERE: target} if target else {}, "subnets": subnets, "tags": tags}
            )
            answer = self.api.write(
                "create_route_table",
                resource,
                VpcId=self.vpc_id,
                TagSpecifications=self._specification("route-table", tags),
            )
            table_id = str(answer["RouteTable"]["RouteTableId"]) if answer else f"<new {resource}>"
            if target:
                self._create_route(resource, table_id, kind, target)
            for subnet_id in subnets:
                self._associate(resource, table_id, subnet_id)
            return table_id
        table_id = str(table["RouteTableId"])
        self._retag(resource, table_id, table.get("Tags"), tags)
        self._default_route(resource, table, kind, target)
        for subnet_id in subnets:
            now = self._association(subnet_id)
            if now is None or now["RouteTableId"] != table_id:
                self.changes.update(
                    resource,
                    {f"subnet {subnet_id}": f"in {now['RouteTableId']}" if now else None},
                    {f"subnet {subnet_id}": "associated"},
                )
                self._associate(resource, table_id, subnet_id)
        return table_id

    def _find_table(self, role: str, subnets: list[str]) -> dict[str, Any] | None:
        for table in self.tables:
            tags = tag_dict(table.get("Tags"))
            if tags.get(OWNER_TAG, self.owner) == self.owner and tags.get(ROLE_TAG) == role:
                return table
        # Its tags were removed by hand: the table that serves the subnet is the one, unless it bears another role.
        for table in self.tables:
            served = {association.get("SubnetId") for association in table.get("Associations", ())}
            if served & set(subnets) and ROLE_TAG not in tag_dict(table.get("Tags")):
                return table
        return None

    def _default_route(self, resource: str, table: dict[str, Any], kind: str, target: str) -> None:
        route = next((route for route in table["Routes"] if route.get("DestinationCidrBlock") == ANYWHERE), None)
        table_id = table["RouteTableId"]
        have = None
        if route is not None:
            have = route.get(kind) or route.get("NatGatewayId") or route.get("GatewayId") or "another target"
            if route.get("State") == "blackhole":
                have = f"{have} (gone)"
        if have == (target or None):
            return
        self.changes.update(resource, {f"route {ANYWHERE}": have}, {f"route {ANYWHERE}": target or None})
        if route is None:
            self._create_route(resource, table_id, kind, target)
        elif target:
            self.api.write(
                "replace_route", resource, RouteTableId=table_id, DestinationCidrBlock=ANYWHERE, **{kind: target}
            )
        else:
            self.api.write("delete_route", resource, RouteTableId=table_id, DestinationCidrBlock=ANYWHERE)

    def _create_route(self, resource: str, table_id: str, kind: str, target: str) -> None:
        self.api.write("create_route", resource, RouteTableId=table_id, DestinationCidrBlock=ANYWHERE, **{kind: target})

    def _association(self, subnet_id: str) -> dict[str, Any] | None:
        for table in self.tables:
            for association in table.get("Associations", ()):
                if association.get("SubnetId") == subnet_id:
                    return {**association, "RouteTableId": table["RouteTableId"]}
        return None

    def _associate(self, resource: str, table_id: str, subnet_id: str) -> None:
        now = self._association(subnet_id)
        if now is None:
            self.api.write("associate_route_table", resource, RouteTableId=table_id, SubnetId=subnet_id)
        else:
            self.api.write(
                "replace_route_table_association",
                resource,
                AssociationId=now["RouteTableAssociationId"],
                RouteTableId=table_id,
            )

    # Endpoints

    def _service(self, short: str) -> str:
        prefix = "cn.com.amazonaws" if self.region.startswith("cn-") and short != "s3" else "com.amazonaws"
        return f"{prefix}.{self.region}.{short}"

    def _s3_endpoint(self, tables: list[str]) -> None:
        service = self._service("s3")
        resource = f"gateway endpoint {self.name}-s3"
        found = next(
            (one for one in self.endpoints if one["ServiceName"] == service and one["VpcEndpointType"] == "Gateway"),
            None,
        )
        if not self.params["s3_endpoint"]:
            if found is not None and tag_dict(found.get("Tags")).get(OWNER_TAG) == self.owner:
                self._delete_endpoints([found])
            return
        tags = self._tags("endpoint-s3", "-s3")
        if found is None:
            self.changes.create(resource, {"service": service, "route_tables": tables, "tags": tags})
            self.api.write(
                "create_vpc_endpoint",
                resource,
                VpcId=self.vpc_id,
                ServiceName=service,
                VpcEndpointType="Gateway",
                RouteTableIds=tables,
                TagSpecifications=self._specification("vpc-endpoint", tags),
            )
            return
        self._retag(resource, found["VpcEndpointId"], found.get("Tags"), tags)
        missing = sorted(set(tables) - set(found.get("RouteTableIds", ())))
        if missing:
            self.changes.update(
                resource,
                {f"route table {one}": None for one in missing},
                {f"route table {one}": "associated" for one in missing},
            )
            self.api.write(
                "modify_vpc_endpoint", resource, VpcEndpointId=found["VpcEndpointId"], AddRouteTableIds=missing
            )

    def _interface_endpoints(self, subnets: list[str], group: str) -> None:
        wanted = {self._service(short): short for short in self.params["interface_endpoints"]}
        found = {one["ServiceName"]: one for one in self.endpoints if one["VpcEndpointType"] == "Interface"}
        for service, short in wanted.items():
            resource = f"interface endpoint {self.name}-{short}"
            tags = self._tags(f"endpoint-{short}", f"-{short}")
            endpoint = found.get(service)
            if endpoint is None:
                self.changes.create(resource, {"service": service, "subnets": subnets, "tags": tags})
                self.api.write(
                    "create_vpc_endpoint",
                    resource,
                    VpcId=self.vpc_id,
                    ServiceName=service,
                    VpcEndpointType="Interface",
                    SubnetIds=subnets,
                    SecurityGroupIds=[group],
                    PrivateDnsEnabled=True,
                    TagSpecifications=self._specification("vpc-endpoint", tags),
                )
                continue
            self._retag(resource, endpoint["VpcEndpointId"], endpoint.get("Tags"), tags)
            missing = sorted(set(subnets) - set(endpoint.get("SubnetIds", ())))
            if missing:
                self.changes.update(
                    resource,
                    {f"subnet {one}": None for one in missing},
                    {f"subnet {one}": "associated" for one in missing},
                )
                self.api.write(
                    "modify_vpc_endpoint", resource, VpcEndpointId=endpoint["VpcEndpointId"], AddSubnetIds=missing
                )
        ours = [one for one in found.values() if tag_dict(one.get("Tags")).get(OWNER_TAG) == self.owner]
        self._delete_endpoints([one for one in ours if one["ServiceName"] not in wanted])

    def _delete_endpoints(self, endpoints: list[dict[str, Any]]) -> None:
        for endpoint in endpoints:
            name = tag_dict(endpoint.get("Tags")).get("Name", endpoint["VpcEndpointId"])
            self.changes.delete(
                f"endpoint {name}", {"id": endpoint["VpcEndpointId"], "service": endpoint["ServiceName"]}
            )
        if endpoints:
            ids = [endpoint["VpcEndpointId"] for endpoint in endpoints]
            self.api.write("delete_vpc_endpoints", self.name, VpcEndpointIds=ids)

    # Security group

    def _security_group(self) -> str:
        name = f"{self.name}-private"
        resource = f"security group {name}"
        tags = self._tags("security-group", "-private")
        wanted: set[Rule] = {("tcp", 443, 443, self.params["vpc_cidr"])}
        for rule in self.params["security_group_rules"]:
            every = rule["protocol"] == "-1"
            wanted.add(
                (
                    rule["protocol"],
                    None if every else rule["from_port"],
                    None if every else rule["to_port"],
                    rule["cidr"],
                )
            )
        found = next((group for group in self.groups if group["GroupName"] == name), None)
        if found is None:
            self.changes.create(resource, {"ingress": sorted(map(_rule_text, wanted)), "tags": tags})
            answer = self.api.write(
                "create_security_group",
                resource,
                GroupName=name,
                Description="HTTPS inside the network, for VPC endpoints and load balancers",
                VpcId=self.vpc_id,
                TagSpecifications=self._specification("security-group", tags),
            )
            group_id = str(answer["GroupId"]) if answer else f"<new {resource}>"
            self._rules("authorize_security_group_ingress", resource, group_id, wanted)
            return group_id
        group_id = str(found["GroupId"])
        self._retag(resource, group_id, found.get("Tags"), tags)
        have = _rules_of(found.get("IpPermissions", ()))
        missing, foreign = wanted - have, have - wanted
        self.changes.update(
            resource,
            {
                **{f"ingress {_rule_text(rule)}": None for rule in missing},
                **{f"ingress {_rule_text(rule)}": "allowed" for rule in foreign},
            },
            {
                **{f"ingress {_rule_text(rule)}": "allowed" for rule in missing},
                **{f"ingress {_rule_text(rule)}": "revoked" for rule in foreign},
            },
        )
        self._rules("authorize_security_group_ingress", resource, group_id, missing)
        self._rules("revoke_security_group_ingress", resource, group_id, foreign)
        outward: Rule = ("-1", None, None, ANYWHERE)
        if outward not in _rules_of(found.get("IpPermissionsEgress", ())):
            self.changes.update(
                resource, {f"egress {_rule_text(outward)}": None}, {f"egress {_rule_text(outward)}": "allowed"}
            )
            self._rules("authorize_security_group_egress", resource, group_id, {outward})
        return group_id

    def _rules(self, operation: str, resource: str, group_id: str, rules: set[Rule]) -> None:
        if rules:
            permissions = [_permission(rule) for rule in sorted(rules, key=_rule_text)]
            self.api.write(operation, resource, GroupId=group_id, IpPermissions=permissions)

    # The way down

    def absent(self) -> dict[str, Any]:
        """Delete the network, from the outside in; what is gone already is skipped."""
        self.observe()
        self._delete_endpoints(
            [one for one in self.endpoints if tag_dict(one.get("Tags")).get(OWNER_TAG) == self.owner]
        )
        self._delete_nats(self.nats)
        for address in list(self.addresses):
            self._release(address["AllocationId"])
        for gateway in self.gateways or self._detached_gateways():
            self._delete_gateway(gateway)
        for subnet in self.subnets:
            self._delete("delete_subnet", "subnet", subnet, SubnetId=subnet["SubnetId"])
        for table in self.tables:
            if not any(association.get("Main") for association in table.get("Associations", ())):
                self._delete("delete_route_table", "route table", table, RouteTableId=table["RouteTableId"])
        for group in self.groups:
            # The default group goes with the VPC. Groups that Kubernetes made block it, and AWS says so.
            if tag_dict(group.get("Tags")).get(OWNER_TAG) == self.owner:
                self._delete("delete_security_group", "security group", group, GroupId=group["GroupId"])
        if self.vpc is not None:
            self._delete("delete_vpc", "VPC", self.vpc, VpcId=self.vpc_id)
        return {}

    def _delete_gateway(self, gateway: dict[str, Any]) -> None:
        gateway_id = gateway["InternetGatewayId"]
        if gateway.get("Attachments"):
            self.api.write("detach_internet_gateway", gateway_id, InternetGatewayId=gateway_id, VpcId=self.vpc_id)
        self._delete("delete_internet_gateway", "internet gateway", gateway, InternetGatewayId=gateway_id)

    def _delete(self, operation: str, kind: str, item: dict[str, Any], **identity: str) -> None:
        (resource_id,) = identity.values()
        resource = f"{kind} {tag_dict(item.get('Tags')).get('Name', resource_id)}"
        self.changes.delete(resource, {"id": resource_id})
        # Network interfaces of endpoints and load balancers take a while to let go.
        self.api.write(operation, resource, busy=min(120, self.params["wait_timeout"]), **identity)


def _rules_of(permissions: Any) -> set[Rule]:
    """Return EC2's nested permissions as flat rules; sources other than CIDRs keep their id."""
    rules: set[Rule] = set()
    for permission in permissions:
        protocol = permission["IpProtocol"]
        ports = (None, None) if protocol == "-1" else (permission.get("FromPort"), permission.get("ToPort"))
        sources = [one["CidrIp"] for one in permission.get("IpRanges", ())]
        sources += [one["CidrIpv6"] for one in permission.get("Ipv6Ranges", ())]
        sources += [one["GroupId"] for one in permission.get("UserIdGroupPairs", ())]
        sources += [one["PrefixListId"] for one in permission.get("PrefixListIds", ())]
        rules |= {(protocol, *ports, source) for source in sources}
    return rules


def _permission(rule: Rule) -> dict[str, Any]:
    protocol, first, last, source = rule
    permission: dict[str, Any] = {"IpProtocol": protocol}
    if first is not None:
        permission |= {"FromPort": first, "ToPort": last}
    if source.startswith("sg-"):
        permission["UserIdGroupPairs"] = [{"GroupId": source}]
    elif source.startswith("pl-"):
        permission["PrefixListIds"] = [{"PrefixListId": source}]
    elif ":" in source:
        permission["Ipv6Ranges"] = [{"CidrIpv6": source}]
    else:
        permission["IpRanges"] = [{"CidrIp": source}]
    return permission


def _rule_text(rule: Rule) -> str:
    protocol, first, last, source = rule
    return f"all from {source}" if protocol == "-1" else f"{protocol} {first}-{last} from {source}"


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    network = Network(module.params, module.region, Api(module.client("ec2"), changes), changes)
    return network.present() if module.params["state"] == "present" else network.absent()


def main() -> None:
    """Run the module."""
    text_list = {"type": "list", "elements": "str", "default": []}
    module = AnsibleAWSModule(
        argument_spec={
            "cluster_name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "default": ""},
            "vpc_cidr": {"type": "str", "default": "10.0.0.0/16"},
            "availability_zones": text_list,
            "private_subnet_cidrs": text_list,
            "public_subnets": {"type": "bool", "default": True},
            "public_subnet_cidrs": text_list,
            "nat_mode": {"type": "str", "choices": ["none", "single", "per_zone"], "default": "single"},
            "s3_endpoint": {"type": "bool", "default": True},
            "interface_endpoints": text_list,
            "security_group_rules": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "protocol": {"type": "str", "default": "tcp"},
                    "from_port": {"type": "int", "required": True},
                    "to_port": {"type": "int", "required": True},
                    "cidr": {"type": "str", "required": True},
                },
            },
            "tags": {"type": "dict", "default": {}},
            "private_subnet_tags": {"type": "dict", "default": {}},
            "public_subnet_tags": {"type": "dict", "default": {}},
            "wait_timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    run(module, reconcile)


if __name__ == "__main__":
    main()
