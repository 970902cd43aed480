# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""The ways out of the subnets: NAT gateways with their addresses, route tables, and the routes of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import PlatformError, tag_dict, wait_until
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import ANYWHERE, Context, Item, new_id
from ansible_collections.rayplane.platform.plugins.module_utils.network.vpc import Subnets

__all__ = ["NatGateways", "RouteTables"]

_NAT_LIVES = ("pending", "available")
_DESTINATIONS = ("DestinationCidrBlock", "DestinationIpv6CidrBlock", "DestinationPrefixListId")
_TARGETS = (
    *("NatGatewayId", "GatewayId", "VpcPeeringConnectionId", "TransitGatewayId", "NetworkInterfaceId"),
    *("EgressOnlyInternetGatewayId", "CarrierGatewayId", "LocalGatewayId", "CoreNetworkArn"),
)


class NatGateways:
    """NAT gateways and the public addresses that they keep for life, so that partners can list them."""

    def __init__(self, context: Context, subnets: Subnets) -> None:
        self.context = context
        self.subnets = subnets
        self.wanted: dict[str, str] = {}

    def zones(self) -> list[str]:
        """Return the zones that are to have a gateway; none where the private subnets are somebody else's."""
        zones = self.subnets.zones
        if self.subnets.existing:
            return []
        chosen: list[str] = {"none": [], "single": zones[:1], "per_zone": zones}[self.context.params["nat_mode"]]
        return chosen

    def check(self) -> None:
        """Refuse what would allocate a second address for a zone, before anything is changed."""
        for zone in self.zones():
            address = self._address_of(zone)
            if address is None or not address.get("AssociationId") or self._gateway_using(address):
                continue
            user = address.get("InstanceId") or address.get("NetworkInterfaceId") or "something else"
            raise PlatformError(
                f"address {self.context.label(address, zone)} ({address['AllocationId']}) is kept for the NAT gateway"
                f" of {zone}, but {user} uses it: disassociate it, or remove its tags"
            )

    def request(self) -> None:
        """Ask for the gateways that are missing; `wait` waits for all of them at once."""
        for zone in self.zones():
            self.wanted[zone] = self._gateway(zone, self.subnets.ids["public", zone])

    def wait(self) -> None:
        """Wait until every wanted gateway works: routes are made to working ones only."""
        context = self.context
        pending = {
            nat["NatGatewayId"]
            for nat in context.view.nats
            if nat["State"] == "pending" and nat["NatGatewayId"] in self.wanted.values()
        }
        if context.changes.check_mode or not pending:
            return

        def probe() -> tuple[bool, str]:
            answer = context.api.read("describe_nat_gateways", context.name, NatGatewayIds=sorted(pending))
            states = {nat["NatGatewayId"]: nat for nat in answer["NatGateways"]}
            for nat_id, nat in states.items():
                if nat["State"] == "failed":
                    raise PlatformError(
                        f"NAT gateway {context.label(nat, nat_id)} ({nat_id}) failed:"
                        f" {nat.get('FailureMessage', 'no reason given')}"
                    )
            waiting = [one for one in sorted(pending) if states.get(one, {}).get("State") != "available"]
            return not waiting, ", ".join(f"{one} {states.get(one, {}).get('State', 'not listed')}" for one in waiting)

        wait_until(f"NAT gateways of {context.name}", probe, context.params["wait_timeout"])

    def public_ips(self) -> list[str]:
        """Return the addresses under which the private subnets appear on the internet."""
        return [
            address["PublicIp"]
            for zone in self.wanted
            if (address := self._address_of(zone)) is not None and address.get("PublicIp")
        ]

    def retire(self) -> None:
        """Delete gateways that are no longer wanted, and the addresses of zones that have none."""
        view = self.context.view
        stale = [
            nat
            for nat in view.nats
            if nat["State"] in _NAT_LIVES and nat["NatGatewayId"] not in self.wanted.values() and self.context.ours(nat)
        ]
        self.delete(stale)
        self.wait_until_gone(stale)
        roles = {f"nat-{zone}" for zone in self.wanted}
        for address in list(view.addresses):
            role = self.context.role_of(address) or ""
            if self.context.ours(address) and role.startswith("nat-") and role not in roles:
                self._release(address)

    def delete(self, nats: Sequence[Item]) -> None:
        """Ask for the deletion of gateways; their addresses can be released when they are gone."""
        for nat in nats:
            resource = f"NAT gateway {self.context.label(nat, nat['NatGatewayId'])}"
            self.context.changes.delete(resource, {"id": nat["NatGatewayId"], "subnet": nat["SubnetId"]})
            self.context.discard(self.context.api, "delete_nat_gateway", resource, NatGatewayId=nat["NatGatewayId"])

    def wait_until_gone(self, nats: Sequence[Item]) -> None:
        """Wait until gateways whose deletion was asked for no longer hold their subnets and addresses."""
        ids = [nat["NatGatewayId"] for nat in nats]
        if not ids or self.context.changes.check_mode:
            return

        def probe() -> tuple[bool, str]:
            answer = self.context.api.read(
                "describe_nat_gateways", self.context.name, absent=("NatGatewayNotFound",), NatGatewayIds=ids
            )
            left = [nat for nat in answer["NatGateways"] if nat["State"] not in ("deleted", "failed")] if answer else []
            return not left, ", ".join(f"{nat['NatGatewayId']} {nat['State']}" for nat in left)

        wait_until(f"deletion of NAT gateways of {self.context.name}", probe, self.context.params["wait_timeout"])

    def living(self) -> list[Item]:
        """Return the gateways that stand in the way of deleting the network, those already going away included."""
        return [
            nat
            for nat in self.context.view.nats
            if nat["State"] in (*_NAT_LIVES, "deleting") and self.context.may_take(nat)
        ]

    def release_all(self) -> None:
        """Give back every address that bears our tag."""
        for address in list(self.context.view.addresses):
            if self.context.ours(address):
                self._release(address)

    def _gateway(self, zone: str, subnet_id: str) -> str:
        context = self.context
        resource = f"NAT gateway {context.name}-{zone}"
        tags = context.tags(f"nat-{zone}", f"-{zone}")
        found = next(
            (
                nat
                for nat in context.view.nats
                if nat["SubnetId"] == subnet_id and nat["State"] in _NAT_LIVES and context.may_take(nat)
            ),
            None,
        )
        if found is not None:
            context.retag(resource, found["NatGatewayId"], found.get("Tags"), tags)
            self._keep_address(zone, found)
            return str(found["NatGatewayId"])
        address = self._address(zone)
        context.changes.create(resource, {"subnet": subnet_id, "address": address, "tags": tags})
        answer = context.api.write(
            "create_nat_gateway",
            resource,
            SubnetId=subnet_id,
            AllocationId=address,
            TagSpecifications=context.specification("natgateway", tags),
        )
        if not answer:
            return str(new_id(resource))
        context.view.nats.append({**answer["NatGateway"], "State": "pending"})
        return str(answer["NatGateway"]["NatGatewayId"])

    def _keep_address(self, zone: str, nat: Item) -> None:
        used = {one.get("AllocationId") for one in nat.get("NatGatewayAddresses", ())}
        for address in self.context.view.addresses:
            if address["AllocationId"] in used and self.context.owner_of(address) in (None, self.context.owner):
                self._retag(zone, address)
                return
        address_of_zone = self._address_of(zone)
        if address_of_zone is not None:
            self._retag(zone, address_of_zone)

    def _retag(self, zone: str, address: Item) -> None:
        tags = self.context.tags(f"nat-{zone}", f"-nat-{zone}")
        resource = f"address {self.context.name}-nat-{zone}"
        self.context.retag(resource, address["AllocationId"], address.get("Tags"), tags)
        # So that what follows in this run knows it, in check mode, too.
        address["Tags"] = [
            {"Key": key, "Value": value} for key, value in {**tag_dict(address.get("Tags")), **tags}.items()
        ]

    def _address_of(self, zone: str) -> Item | None:
        return next(
            (
                one
                for one in self.context.view.addresses
                if self.context.ours(one) and self.context.role_of(one) == f"nat-{zone}"
            ),
            None,
        )

    def _gateway_using(self, address: Item) -> Item | None:
        for nat in self.context.view.nats:
            if address["AllocationId"] in {one.get("AllocationId") for one in nat.get("NatGatewayAddresses", ())}:
                return nat
        return None

    def _address(self, zone: str) -> str:
        context = self.context
        resource = f"address {context.name}-nat-{zone}"
        kept = self._address_of(zone)
        if kept is not None:
            # One that an interrupted run allocated, or whose gateway was deleted by hand, perhaps a moment ago.
            self._retag(zone, kept)
            last = self._gateway_using(kept)
            if last is not None and kept.get("AssociationId"):
                self.wait_until_gone([last])
            return str(kept["AllocationId"])
        tags = context.tags(f"nat-{zone}", f"-nat-{zone}")
        context.changes.create(resource, {"tags": tags})
        answer = context.api.write(
            "allocate_address", resource, Domain="vpc", TagSpecifications=context.specification("elastic-ip", tags)
        )
        if not answer:
            return str(new_id(resource))
        context.view.addresses.append({**answer, "Tags": [{"Key": key, "Value": tags[key]} for key in tags]})
        return str(answer["AllocationId"])

    def _release(self, address: Item) -> None:
        allocation_id = address["AllocationId"]
        resource = f"address {self.context.label(address, allocation_id)}"
        self.context.changes.delete(resource, {"id": allocation_id, "public_ip": address.get("PublicIp")})
        self.context.discard(self.context.api, "release_address", resource, AllocationId=allocation_id)
        self.context.view.addresses.remove(address)


class RouteTables:
    """One table for the public subnets, one for the intra subnets, and one a zone for the private subnets."""

    def __init__(self, context: Context, subnets: Subnets) -> None:
        self.context = context
        self.subnets = subnets
        self.public: list[str] = []
        self.private: list[str] = []
        # Tables that were there: resource -> what AWS says of it.
        self.found: dict[str, Item] = {}

    def present(self, gateway: str, nats: dict[str, str]) -> None:
        """Keep our tables, their default routes and their subnets; of subnets that are not ours, nothing."""
        if self.subnets.existing:
            return
        if gateway:
            self.public = [self._table("public", "-public", self.subnets.of("public"), "GatewayId", gateway)]
        for zone in self.subnets.zones:
            # A table a zone even with one NAT gateway: going to one a zone then changes routes, not associations.
            nat = nats.get(zone) or next(iter(nats.values()), "")
            self.private.append(
                self._table(
                    f"private-{zone}", f"-private-{zone}", [self.subnets.ids["private", zone]], "NatGatewayId", nat
                )
            )
        if self.subnets.of("intra"):
            self._table("intra", "-intra", self.subnets.of("intra"), "GatewayId", "")

    def peer_routes(self, wanted: dict[str, str], peerings: Sequence[str]) -> None:
        """Keep the private tables' routes to peers: ``wanted`` gives the peering of each CIDR block.

        Routes to one of our ``peerings`` that are no longer wanted go; those to peerings of others stay.
        """
        view = self.context.view
        by_id = {table["RouteTableId"]: table for table in view.tables}
        # Where the subnets are somebody else's there are none.
        for table_id, zone in zip(self.private, self.subnets.zones, strict=False):
            resource = f"route table {self.context.name}-private-{zone}"
            table = by_id.get(table_id, {"RouteTableId": table_id, "Routes": []})
            for cidr, peering in wanted.items():
                self._route(resource, table, cidr, "VpcPeeringConnectionId", peering)
            for route in table["Routes"]:
                cidr = route.get("DestinationCidrBlock")
                if route.get("VpcPeeringConnectionId") in peerings and cidr and cidr not in wanted:
                    self._route(resource, table, cidr, "VpcPeeringConnectionId", "")

    def note_foreign(self, cidrs: Collection[str], peerings: Collection[str]) -> None:
        """Record the routes that others added to our tables; they stay.

        ``cidrs`` are reached through our ``peerings``. Routes inside the VPC, to gateway endpoints and those that a
        virtual private gateway propagates are AWS's own.
        """
        for resource, table in self.found.items():
            for route in table["Routes"]:
                to, gateway = next(route[key] for key in _DESTINATIONS if route.get(key)), str(route.get("GatewayId"))
                made_by_aws = (
                    gateway == "local"
                    or route.get("Origin") == "EnableVgwRoutePropagation"
                    or ("DestinationPrefixListId" in route and gateway.startswith("vpce-"))
                )
                ours = to == ANYWHERE or to in cidrs or route.get("VpcPeeringConnectionId") in peerings
                if not made_by_aws and not ours and to not in self.context.params["foreign_routes"]:
                    self.context.changes.foreign(resource, f"route {to}", self._target(route, "GatewayId"))

    def has_way_out(self, subnet_id: str) -> bool:
        """Whether a subnet that exists has a default route, by its own table or by the VPC's main one."""
        tables = self.context.view.tables
        held = self._association(subnet_id)
        for table in tables:
            main = any(one.get("Main") for one in table.get("Associations", ()))
            if table["RouteTableId"] == held["RouteTableId"] if held else main:
                return any(
                    route.get("DestinationCidrBlock") == ANYWHERE and route.get("State") != "blackhole"
                    for route in table["Routes"]
                )
        return False

    def remove(self) -> None:
        """Delete our tables; the main one goes with the VPC."""
        for table in self.context.view.tables:
            main = any(association.get("Main") for association in table.get("Associations", ()))
            if not main and self.context.may_take(table):
                self.context.remove("delete_route_table", "route table", table, RouteTableId=table["RouteTableId"])

    def _table(self, role: str, suffix: str, subnets: Sequence[str], kind: str, target: str) -> str:
        context = self.context
        resource = f"route table {context.name}{suffix}"
        tags = context.tags(role, suffix)
        table = self._find(role, subnets)
        if table is None:
            routes = {ANYWHERE: target} if target else {}
            context.changes.create(resource, {"routes": routes, "subnets": list(subnets), "tags": tags})
            answer = context.api.write(
                "create_route_table",
                resource,
                VpcId=context.vpc_id,
                TagSpecifications=context.specification("route-table", tags),
            )
            table_id = str(answer["RouteTable"]["RouteTableId"]) if answer else new_id(resource)
            if target:
                self._create_route(resource, table_id, ANYWHERE, kind, target)
            for subnet_id in subnets:
                self._associate(resource, table_id, subnet_id)
            return table_id
        self.found[resource] = table
        table_id = str(table["RouteTableId"])
        context.retag(resource, table_id, table.get("Tags"), tags)
        self._route(resource, table, ANYWHERE, kind, target)
        for subnet_id in subnets:
            now = self._association(subnet_id)
            if now is None or now["RouteTableId"] != table_id:
                context.changes.update(
                    resource,
                    {f"subnet {subnet_id}": f"in {now['RouteTableId']}" if now else None},
                    {f"subnet {subnet_id}": "associated"},
                )
                self._associate(resource, table_id, subnet_id)
        return table_id

    def _find(self, role: str, subnets: Sequence[str]) -> Item | None:
        context = self.context
        for table in context.view.tables:
            if context.may_take(table) and context.role_of(table) == role:
                return table
        # Its tags were removed by hand: the table that serves the subnet is the one, unless it bears another role.
        for table in context.view.tables:
            served = {association.get("SubnetId") for association in table.get("Associations", ())}
            if served & set(subnets) and context.role_of(table) is None and context.may_take(table):
                return table
        return None

    def _route(self, resource: str, table: Item, cidr: str, kind: str, target: str) -> None:
        """Bring one route of a table to its target; an empty target means that there is none."""
        context = self.context
        route = next((route for route in table["Routes"] if route.get("DestinationCidrBlock") == cidr), None)
        table_id = table["RouteTableId"]
        have = self._target(route, kind) if route is not None else None
        if have == (target or None):
            return
        context.changes.update(resource, {f"route {cidr}": have}, {f"route {cidr}": target or None})
        if route is None:
            self._create_route(resource, table_id, cidr, kind, target)
        elif target:
            wanted: dict[str, Any] = {"RouteTableId": table_id, "DestinationCidrBlock": cidr, kind: target}
            context.api.write("replace_route", resource, **wanted)
        else:
            context.discard(context.api, "delete_route", resource, RouteTableId=table_id, DestinationCidrBlock=cidr)

    def _target(self, route: Item, kind: str) -> str:
        target = next((str(route[one]) for one in (kind, *_TARGETS) if route.get(one)), "another target")
        # A route to a peering that nobody accepted yet is a black hole by design, and becomes active by itself.
        if route.get("State") == "blackhole" and not route.get("VpcPeeringConnectionId"):
            return f"{target} (gone)"
        return target

    def _create_route(self, resource: str, table_id: str, cidr: str, kind: str, target: str) -> None:
        wanted: dict[str, Any] = {"RouteTableId": table_id, "DestinationCidrBlock": cidr, kind: target}
        self.context.api.write("create_route", resource, **wanted)

    def _association(self, subnet_id: str) -> Item | None:
        for table in self.context.view.tables:
            for association in table.get("Associations", ()):
                if association.get("SubnetId") == subnet_id:
                    return {**association, "RouteTableId": table["RouteTableId"]}
        return None

    def _associate(self, resource: str, table_id: str, subnet_id: str) -> None:
        now: Any = self._association(subnet_id)
        if now is None:
            self.context.api.write("associate_route_table", resource, RouteTableId=table_id, SubnetId=subnet_id)
        else:
            self.context.api.write(
                "replace_route_table_association",
                resource,
                AssociationId=now["RouteTableAssociationId"],
                RouteTableId=table_id,
            )
