# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""The VPC itself, ours or adopted, with its gateway and subnets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    PlatformError,
    tag_dict,
    tag_list,
)
from ansible_collections.rayplane.platform.plugins.module_utils.network.addresses import (
    MIN_ZONES,
    PlannedSubnet,
    inside,
    overlaps,
    plan_subnets,
)
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import Context, Item, new_id, together

__all__ = ["Subnets", "Vpc"]

# The attribute as DescribeVpcAttribute is asked for it, and as both calls spell its value.
_DNS = {"enableDnsSupport": "EnableDnsSupport", "enableDnsHostnames": "EnableDnsHostnames"}
_ENDED_ENDPOINTS = ("deleting", "deleted", "failed", "rejected", "expired")
_ENDED_PEERINGS = ("deleted", "deleting", "expired", "failed", "rejected")
# Tags that load balancer controllers choose subnets by.
_BALANCERS = {"private": "kubernetes.io/role/internal-elb", "public": "kubernetes.io/role/elb"}
_DISCOVERY = "karpenter.sh/discovery"


class Vpc:
    """Finds the VPC and reads what is in it; keeps the VPC, its attributes and its internet gateway."""

    def __init__(self, context: Context) -> None:
        self.context = context

    # What is there

    def observe(self, further: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Read the VPC, all that is in it, and what ``further`` names; return the answers to ``further``.

        Two rounds, each of calls side by side: the second needs the VPC's id.
        """
        context = self.context
        view = context.view
        view.vpc = self._find()
        if view.vpc is None:
            answers: dict[str, Any] = together({**further, "addresses": self._addresses})
            view.addresses = answers.pop("addresses")
            return answers
        context.vpc_id = view.vpc["VpcId"]
        context.account = view.vpc.get("OwnerId", "")
        jobs = {**further, **self._jobs()}
        answers = together(jobs)
        view.dns = {name: answers.pop(name) for name in _DNS}
        view.subnets = answers.pop("subnets")
        view.gateways = answers.pop("gateways")
        view.nats = answers.pop("nats")
        view.tables = answers.pop("tables")
        view.groups = answers.pop("groups")
        view.addresses = answers.pop("addresses")
        view.endpoints = [
            one
            for one in answers.pop("endpoints")
            if one["VpcId"] == context.vpc_id and str(one.get("State", "")).lower() not in _ENDED_ENDPOINTS
        ]
        extras = {kind: answers.pop(kind) for kind in ("flow_logs", "peerings") if kind in jobs}
        if "extras" in jobs:
            extras = answers.pop("extras")
        view.flow_logs = [one for one in extras["flow_logs"] if one["ResourceId"] == context.vpc_id]
        view.peerings = [
            one
            for one in extras["peerings"]
            if one["RequesterVpcInfo"]["VpcId"] == context.vpc_id and one["Status"]["Code"] not in _ENDED_PEERINGS
        ]
        return answers

    def _jobs(self) -> dict[str, Callable[[], Any]]:
        params = self.context.params
        jobs: dict[str, Callable[[], Any]] = {
            **{name: partial(self._dns_attribute, name) for name in _DNS},
            "subnets": lambda: self._inside("describe_subnets", "Subnets"),
            "gateways": lambda: self._inside("describe_internet_gateways", "InternetGateways", "attachment.vpc-id"),
            # NAT gateways and flow logs are the kinds whose parameter is named Filter.
            "nats": lambda: self._inside("describe_nat_gateways", "NatGateways", parameter="Filter"),
            "tables": lambda: self._inside("describe_route_tables", "RouteTables"),
            "endpoints": lambda: self._inside("describe_vpc_endpoints", "VpcEndpoints"),
            "groups": lambda: self._inside("describe_security_groups", "SecurityGroups"),
            "addresses": self._addresses,
        }
        if params["state"] == "present" and not params["flow_logs"] and not params["peerings"]:
            # Neither is asked for: one call tells whether there is any of ours to remove.
            jobs["extras"] = self._leftovers
        else:
            jobs |= {"flow_logs": self._flow_logs, "peerings": self._peerings}
        return jobs

    def _flow_logs(self) -> list[Item]:
        return self._inside("describe_flow_logs", "FlowLogs", "resource-id", parameter="Filter")

    def _peerings(self) -> list[Item]:
        return self._inside("describe_vpc_peering_connections", "VpcPeeringConnections", "requester-vpc-info.vpc-id")

    def _leftovers(self) -> dict[str, list[Item]]:
        tagged = self.context.api.pages(
            "describe_tags",
            "Tags",
            self.context.name,
            Filters=[
                {"Name": "key", "Values": [OWNER_TAG]},
                {"Name": "value", "Values": [self.context.owner]},
            ],
        )
        ids = {tag["ResourceId"].partition("-")[0] for tag in tagged}
        return {
            "flow_logs": self._flow_logs() if "fl" in ids else [],
            "peerings": self._peerings() if "pcx" in ids else [],
        }

    def _inside(self, operation: str, key: str, attribute: str = "vpc-id", parameter: str = "Filters") -> list[Item]:
        context = self.context
        found: list[Item] = context.api.pages(
            operation, key, context.name, **{parameter: [{"Name": attribute, "Values": [context.vpc_id]}]}
        )
        return found

    def _addresses(self) -> list[Item]:
        # All of the account's, which are few: one whose tags were removed is known by the NAT gateway that uses it.
        found: list[Item] = self.context.api.read("describe_addresses", self.context.name)["Addresses"]
        return found

    def _dns_attribute(self, name: str) -> bool:
        answer = self.context.api.read(
            "describe_vpc_attribute", f"VPC {self.context.name}", VpcId=self.context.vpc_id, Attribute=name
        )
        return bool(answer[_DNS[name]]["Value"])

    def _find(self) -> Item | None:
        context = self.context
        # One call for every way to look: a region has a handful of VPCs.
        vpcs = context.api.pages("describe_vpcs", "Vpcs", context.name)
        # The second look finds a VPC whose owner tag was removed by hand; one that another cluster owns is never taken.
        found = [vpc for vpc in vpcs if context.ours(vpc)] or [
            vpc for vpc in vpcs if context.owner_of(vpc) is None and context.label(vpc, "") == context.name
        ]
        if context.params["existing_vpc_id"] or context.params["existing_vpc_tags"]:
            return self._find_existing(vpcs, found)
        if len(found) > 1:
            ids = ", ".join(sorted(vpc["VpcId"] for vpc in found))
            raise PlatformError(
                f"{len(found)} VPCs belong to {context.owner} ({ids}): remove the tag {OWNER_TAG} from all but the one"
                " to keep"
            )
        return found[0] if found else None

    def _find_existing(self, vpcs: list[Item], own: list[Item]) -> Item | None:
        context = self.context
        vpc_id, tags = context.params["existing_vpc_id"], context.params["existing_vpc_tags"]
        context.adopted = True
        if vpc_id:
            asked = f"network_existing_vpc_id {vpc_id}"
            found = [vpc for vpc in vpcs if vpc["VpcId"] == vpc_id]
        else:
            asked = "network_existing_vpc_tags " + ", ".join(f"{key}={tags[key]}" for key in sorted(tags))
            found = [
                vpc for vpc in vpcs if {(key, str(tags[key])) for key in tags} <= tag_dict(vpc.get("Tags")).items()
            ]
        if not found and context.params["state"] == "absent":
            return None
        if len(found) != 1:
            ids = ", ".join(sorted(vpc["VpcId"] for vpc in found)) or "none"
            raise PlatformError(
                f"{asked}: this names one VPC of {context.region}, found: {ids}; see the VPCs of platform_region, or"
                " name one by network_existing_vpc_id"
            )
        others = [vpc["VpcId"] for vpc in own if vpc["VpcId"] != found[0]["VpcId"] and context.ours(vpc)]
        if others and context.params["state"] == "present":
            raise PlatformError(
                f"{asked}: {context.owner} has a VPC of its own already ({', '.join(others)}); a network does not move:"
                " destroy it first, or leave the variable empty"
            )
        # One that bears our tag was made by us, whatever the inventory calls it.
        context.adopted = not context.ours(found[0])
        return found[0]

    # What is wanted

    def check(self) -> None:
        """Refuse what cannot be, before anything is changed."""
        context = self.context
        vpc, cidr = context.view.vpc, context.params["vpc_cidr"]
        if vpc is None:
            return
        if not context.adopted and vpc["CidrBlock"] != cidr:
            raise PlatformError(
                f"VPC {context.name} ({context.vpc_id}) has the addresses {vpc['CidrBlock']}, network_vpc_cidr asks for"
                f" {cidr}: a VPC keeps its addresses for life; set the variable back, or destroy the cluster first"
            )
        off = [name for name in _DNS if not context.view.dns[name]]
        if context.adopted and off:
            raise PlatformError(
                f"VPC {context.vpc_id} has {' and '.join(off)} switched off; nodes find a private API server and"
                " interface endpoints by these. Its owner has to switch them on (aws ec2 modify-vpc-attribute): a VPC"
                " that is not ours is not changed"
            )

    def present(self) -> None:
        """Keep the VPC and its attributes; an adopted one stays as it is."""
        context = self.context
        if context.adopted:
            return
        resource = f"VPC {context.name}"
        cidr = context.params["vpc_cidr"]
        tags = context.tags("vpc")
        vpc = context.view.vpc
        if vpc is None:
            context.changes.create(resource, {"cidr": cidr, "dns_support": True, "dns_hostnames": True, "tags": tags})
            answer = context.api.write(
                "create_vpc", resource, CidrBlock=cidr, TagSpecifications=context.specification("vpc", tags)
            )
            context.vpc_id = answer["Vpc"]["VpcId"] if answer else new_id(resource)
            context.account = answer["Vpc"].get("OwnerId", "") if answer else "<account>"
            for parameter in _DNS.values():
                self._switch_on(resource, parameter)
            # AWS makes a main route table and a default security group with the VPC; neither is ours.
            return
        context.retag(resource, context.vpc_id, vpc.get("Tags"), tags)
        for name, parameter in _DNS.items():
            if context.changes.update(resource, {name: context.view.dns[name]}, {name: True}):
                self._switch_on(resource, parameter)

    def _switch_on(self, resource: str, parameter: str) -> None:
        context = self.context
        attribute: dict[str, Any] = {parameter: {"Value": True}}
        context.api.write("modify_vpc_attribute", resource, VpcId=context.vpc_id, **attribute)

    def internet_gateway(self) -> str:
        """Keep the way to the internet and return its id; an adopted VPC's own gateway is used as it is."""
        context = self.context
        resource = f"internet gateway {context.name}"
        tags = context.tags("internet-gateway")
        found = context.view.gateways or self._detached()
        if not found:
            context.changes.create(resource, {"vpc": context.vpc_id, "tags": tags})
            answer = context.api.write(
                "create_internet_gateway",
                resource,
                TagSpecifications=context.specification("internet-gateway", tags),
            )
            gateway_id = str(answer["InternetGateway"]["InternetGatewayId"]) if answer else new_id(resource)
            self._attach(resource, gateway_id)
            return gateway_id
        gateway = found[0]
        gateway_id = str(gateway["InternetGatewayId"])
        if not context.may_take(gateway):
            return gateway_id
        if not gateway.get("Attachments"):
            context.changes.update(resource, {"vpc": None}, {"vpc": context.vpc_id})
            self._attach(resource, gateway_id)
        context.retag(resource, gateway_id, gateway.get("Tags"), tags)
        return gateway_id

    def _attach(self, resource: str, gateway_id: str) -> None:
        context = self.context
        context.api.write("attach_internet_gateway", resource, InternetGatewayId=gateway_id, VpcId=context.vpc_id)

    def _detached(self) -> list[Item]:
        context = self.context
        found = context.api.pages(
            "describe_internet_gateways",
            "InternetGateways",
            context.name,
            Filters=[{"Name": f"tag:{OWNER_TAG}", "Values": [context.owner]}],
        )
        return [gateway for gateway in found if not gateway.get("Attachments")]

    # The way down

    def remove_gateways(self) -> None:
        """Detach and delete our internet gateway, also one that an interrupted run left detached."""
        context = self.context
        attached = [one for one in context.view.gateways if context.may_take(one)]
        for gateway in attached or self._detached():
            gateway_id = gateway["InternetGatewayId"]
            if gateway.get("Attachments"):
                context.discard(
                    context.api,
                    "detach_internet_gateway",
                    gateway_id,
                    # Public addresses of NAT gateways and load balancers hold it for a while.
                    busy=min(120, context.params["wait_timeout"]),
                    InternetGatewayId=gateway_id,
                    VpcId=context.vpc_id,
                )
            context.remove("delete_internet_gateway", "internet gateway", gateway, InternetGatewayId=gateway_id)

    def remove(self) -> None:
        """Delete the VPC, unless it is somebody else's."""
        context = self.context
        if context.view.vpc is not None and not context.adopted:
            context.remove("delete_vpc", "VPC", context.view.vpc, VpcId=context.vpc_id)


class Subnets:
    """The subnets of the plan, or those that the inventory names in an adopted VPC."""

    def __init__(self, context: Context) -> None:
        self.context = context
        params = context.params
        self.given: dict[str, list[str]] = {
            "private": params["existing_private_subnet_ids"],
            "public": params["existing_public_subnet_ids"],
        }
        self.existing = bool(self.given["private"] or self.given["public"])
        self.public: bool = bool(self.given["public"]) if self.existing else params["public_subnets"]
        self.zones: list[str] = params["availability_zones"]
        self.plan: list[PlannedSubnet] = []
        self.ids: dict[tuple[str, str], str] = {}

    def plan_them(self) -> None:
        """Compute the addresses; refuse combinations that cannot be."""
        params = self.context.params
        adopts = params["existing_vpc_id"] or params["existing_vpc_tags"]
        if self.existing:
            if not adopts:
                raise PlatformError(
                    "network_existing_private_subnet_ids and network_existing_public_subnet_ids name subnets of a VPC"
                    " that exists: set network_existing_vpc_id, too"
                )
            if not self.given["private"] or params["intra_subnets"]:
                raise PlatformError(
                    "with existing subnets none is made: name the private ones in network_existing_private_subnet_ids,"
                    " and set network_intra_subnets false"
                )
            return
        try:
            self.plan = plan_subnets(
                params["vpc_cidr"],
                params["availability_zones"],
                params["public_subnets"],
                params["private_subnet_cidrs"],
                params["public_subnet_cidrs"],
                intra=params["intra_subnets"],
                intra_cidrs=params["intra_subnet_cidrs"],
            )
        except ValueError as error:
            raise PlatformError(f"network of {self.context.owner}: {error}") from error

    def check(self) -> None:
        """Refuse what AWS or the owner of an adopted VPC would, before anything is changed."""
        if self.existing:
            self._check_given()
            return
        context = self.context
        if context.adopted and not inside(context.params["vpc_cidr"], context.vpc_cidrs):
            raise PlatformError(
                f"network_vpc_cidr {context.params['vpc_cidr']} is not inside VPC {context.vpc_id}, which has"
                f" {', '.join(context.vpc_cidrs)}: name the block of it in which the cluster's subnets may be made, or"
                " give network_existing_private_subnet_ids"
            )
        for planned in self.plan:
            self._check_planned(planned)

    def _check_given(self) -> None:
        context = self.context
        by_id = {subnet["SubnetId"]: subnet for subnet in context.view.subnets}
        for kind, ids in self.given.items():
            missing = [one for one in ids if one not in by_id]
            if missing:
                raise PlatformError(
                    f"network_existing_{kind}_subnet_ids: {', '.join(missing)} not in VPC {context.vpc_id}, which has"
                    f" {', '.join(sorted(by_id)) or 'none'}"
                )
        self.zones = list(dict.fromkeys(by_id[one]["AvailabilityZone"] for one in self.given["private"]))
        if len(self.zones) < MIN_ZONES:
            raise PlatformError(
                f"network_existing_private_subnet_ids lie in {', '.join(self.zones)} alone: EKS needs subnets in at"
                f" least {MIN_ZONES} zones"
            )

    def _check_planned(self, planned: PlannedSubnet) -> None:
        context = self.context
        resource, role, cidr = self._resource(planned), f"{planned['role']}-{planned['zone']}", planned["cidr"]
        found = self._find(cidr)
        if found is not None:
            if found["AvailabilityZone"] != planned["zone"]:
                raise PlatformError(
                    f"{resource}: {cidr} is {found['SubnetId']} in {found['AvailabilityZone']}, not in"
                    f" {planned['zone']}: a subnet never moves; keep the order of network_availability_zones and add"
                    " new zones at its end"
                )
            return
        for subnet in context.view.subnets:
            if context.ours(subnet) and context.role_of(subnet) == role:
                raise PlatformError(
                    f"{resource} exists with {subnet['CidrBlock']} ({subnet['SubnetId']}), asked for is {cidr}: a"
                    " subnet keeps its addresses for life; set the CIDRs back, or remove that subnet first"
                )
            if overlaps(cidr, subnet["CidrBlock"]):
                raise PlatformError(
                    f"{resource}: {cidr} overlaps {subnet['SubnetId']} ({subnet['CidrBlock']}), which is not ours:"
                    " give other blocks in network_private_subnet_cidrs and network_public_subnet_cidrs, or use"
                    " that subnet by network_existing_private_subnet_ids"
                )

    def _resource(self, planned: PlannedSubnet) -> str:
        return f"subnet {self.context.name}-{planned['role']}-{planned['zone']}"

    def _find(self, cidr: str) -> Item | None:
        context = self.context
        return next((one for one in context.view.subnets if one["CidrBlock"] == cidr and context.may_take(one)), None)

    def present(self) -> None:
        """Keep the subnets; of those that exist, only the tags that Kubernetes needs are kept."""
        if self.existing:
            self._tag_given()
            return
        for planned in self.plan:
            self.ids[planned["role"], planned["zone"]] = self._subnet(planned)
        self._warn_unplanned()

    def of(self, role: str) -> list[str]:
        """Return the ids of one kind of subnets, in the order of the zones."""
        if self.existing:
            return list(self.given.get(role, ()))
        return [self.ids[role, zone] for zone in self.zones if (role, zone) in self.ids]

    def one_a_zone(self, role: str) -> list[str]:
        """Return at most one subnet a zone, which is what an interface endpoint takes."""
        if not self.existing:
            return self.of(role)
        zones = {subnet["SubnetId"]: subnet["AvailabilityZone"] for subnet in self.context.view.subnets}
        first: dict[str, str] = {}
        for subnet_id in self.given[role]:
            first.setdefault(zones[subnet_id], subnet_id)
        return list(first.values())

    def _kubernetes_tags(self, role: str) -> dict[str, str]:
        tags = {f"kubernetes.io/cluster/{self.context.owner}": "shared"}
        if role in _BALANCERS:
            tags |= {_BALANCERS[role]: "1", **self.context.params[f"{role}_subnet_tags"]}
        return {str(key): str(value) for key, value in tags.items()}

    def _tag_given(self) -> None:
        by_id = {subnet["SubnetId"]: subnet for subnet in self.context.view.subnets}
        for role, ids in self.given.items():
            for subnet_id in ids:
                self.context.retag(
                    f"subnet {subnet_id}", subnet_id, by_id[subnet_id].get("Tags"), self._kubernetes_tags(role)
                )

    def _subnet(self, planned: PlannedSubnet) -> str:
        context = self.context
        role, zone, cidr = planned["role"], planned["zone"], planned["cidr"]
        resource = self._resource(planned)
        tags = context.tags(f"{role}-{zone}", f"-{role}-{zone}", **self._kubernetes_tags(role))
        public = role == "public"
        found = self._find(cidr)
        if found is None:
            context.changes.create(resource, {"cidr": cidr, "zone": zone, "public_addresses": public, "tags": tags})
            answer = context.api.write(
                "create_subnet",
                resource,
                VpcId=context.vpc_id,
                CidrBlock=cidr,
                AvailabilityZone=zone,
                TagSpecifications=context.specification("subnet", tags),
            )
            subnet_id = str(answer["Subnet"]["SubnetId"]) if answer else new_id(resource)
            if public:
                self._map_addresses(resource, subnet_id, True)
            return subnet_id
        subnet_id = str(found["SubnetId"])
        context.retag(resource, subnet_id, found.get("Tags"), tags)
        if context.changes.update(
            resource, {"public_addresses": found["MapPublicIpOnLaunch"]}, {"public_addresses": public}
        ):
            self._map_addresses(resource, subnet_id, public)
        return subnet_id

    def _map_addresses(self, resource: str, subnet_id: str, public: bool) -> None:
        self.context.api.write(
            "modify_subnet_attribute", resource, SubnetId=subnet_id, MapPublicIpOnLaunch={"Value": public}
        )

    def _warn_unplanned(self) -> None:
        context = self.context
        planned = {subnet["cidr"] for subnet in self.plan}
        for subnet in context.view.subnets:
            if subnet["CidrBlock"] not in planned and context.ours(subnet):
                context.changes.warnings.append(
                    f"subnet {subnet['SubnetId']} ({subnet['CidrBlock']}) of {context.owner} is no longer in the plan;"
                    " nodes may use it, so it stays: remove it by hand when it is empty"
                )

    # The way down

    def remove(self) -> None:
        """Delete our subnets, and take our tags off those of others."""
        context = self.context
        for subnet in context.view.subnets:
            if context.may_take(subnet):
                context.remove("delete_subnet", "subnet", subnet, SubnetId=subnet["SubnetId"])
            else:
                self._untag(subnet)

    def _untag(self, subnet: Item) -> None:
        context = self.context
        have = tag_dict(subnet.get("Tags"))
        mine = {f"kubernetes.io/cluster/{context.owner}": "shared", _DISCOVERY: context.owner}
        held = {key: value for key, value in mine.items() if have.get(key) == value}
        if held:
            resource = f"subnet {subnet['SubnetId']}"
            context.changes.update(
                resource, {f"tag {key}": held[key] for key in held}, {f"tag {key}": None for key in held}
            )
            context.discard(context.api, "delete_tags", resource, Resources=[subnet["SubnetId"]], Tags=tag_list(held))
