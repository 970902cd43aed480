# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Peering of the VPC with others: the request, its acceptance where that is ours to give, names and routes."""

from __future__ import annotations

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import PlatformError, wait_until
from ansible_collections.rayplane.platform.plugins.module_utils.network.addresses import check_peers
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import Context, Item, new_id
from ansible_collections.rayplane.platform.plugins.module_utils.network.routes import RouteTables

__all__ = ["Peerings"]

_WAITING = "pending-acceptance"
_RESOLVES = "AllowDnsResolutionFromRemoteVpc"


class Peerings:
    """The peerings that this VPC asks for; those that others asked this VPC for are theirs."""

    def __init__(self, context: Context, tables: RouteTables) -> None:
        self.context = context
        self.tables = tables
        self.peers: list[Item] = context.params["peerings"]

    def check(self) -> None:
        """Refuse peers whose addresses could not be routed to, before anything is changed."""
        vpcs = [peer["vpc_id"] for peer in self.peers]
        doubled = sorted({one for one in vpcs if vpcs.count(one) > 1})
        if doubled:
            raise PlatformError(f"network_peerings names {', '.join(doubled)} twice: two VPCs have one peering")
        if any(not peer["cidrs"] for peer in self.peers):
            raise PlatformError("network_peerings: cidrs is empty for a peer: name the addresses to reach through it")
        try:
            check_peers(
                self.context.vpc_cidrs, [(peer["name"] or peer["vpc_id"], peer["cidrs"]) for peer in self.peers]
            )
        except ValueError as error:
            raise PlatformError(f"network_peerings: {error}") from error

    def present(self) -> None:
        """Keep the peerings and the private subnets' routes to them; remove ours that are no longer asked for."""
        context = self.context
        ours = [one["VpcPeeringConnectionId"] for one in context.view.peerings if context.ours(one)]
        routes: dict[str, str] = {}
        for peer in self.peers:
            peering_id = self._peering(peer)
            routes |= dict.fromkeys(peer["cidrs"], peering_id)
        if routes and not self.tables.private:
            context.changes.warnings.append(
                f"the private subnets of {context.owner} have route tables of others: routes to"
                f" {', '.join(routes)} are theirs to make"
            )
        self.tables.peer_routes(routes, ours)
        self.tables.note_foreign(routes, ours)
        wanted = {peer["vpc_id"] for peer in self.peers}
        for peering in context.view.peerings:
            if context.ours(peering) and peering["AccepterVpcInfo"]["VpcId"] not in wanted:
                self._delete(peering)

    def remove(self) -> None:
        """Delete our peerings; their routes go with our tables."""
        for peering in self.context.view.peerings:
            if self.context.may_take(peering):
                self._delete(peering)

    def _resource(self, peer: Item) -> str:
        return f"peering {self.context.name}-{peer['name'] or peer['vpc_id']}"

    def _peering(self, peer: Item) -> str:
        context = self.context
        resource = self._resource(peer)
        suffix = f"-{peer['name'] or peer['vpc_id']}"
        tags = context.tags(f"peering-{peer['vpc_id']}", suffix)
        found = next(
            (
                one
                for one in context.view.peerings
                if one["AccepterVpcInfo"]["VpcId"] == peer["vpc_id"] and context.may_take(one)
            ),
            None,
        )
        if found is None:
            context.changes.create(
                resource, {"peer": peer["vpc_id"], "owner": peer["owner_id"] or "the same", "tags": tags}
            )
            elsewhere = {
                "PeerOwnerId": peer["owner_id"],
                "PeerRegion": peer["region"] if peer["region"] != context.region else "",
            }
            answer = context.api.write(
                "create_vpc_peering_connection",
                resource,
                VpcId=context.vpc_id,
                PeerVpcId=peer["vpc_id"],
                TagSpecifications=context.specification("vpc-peering-connection", tags),
                **{key: value for key, value in elsewhere.items() if value},
            )
            if not answer:
                self._note_foreign(resource, peer)
                return str(new_id(resource))
            created: Item = answer["VpcPeeringConnection"]
            peering_id = str(created["VpcPeeringConnectionId"])
            if self._accept(resource, peer, peering_id) and peer["dns"]:
                self._resolve(resource, peering_id)
            return peering_id
        peering_id = str(found["VpcPeeringConnectionId"])
        context.retag(resource, peering_id, found.get("Tags"), tags)
        active = found["Status"]["Code"] == "active"
        if found["Status"]["Code"] == _WAITING:
            if self._is_here(peer):
                context.changes.update(resource, {"status": _WAITING}, {"status": "active"})
            active = self._accept(resource, peer, peering_id)
        if active:
            self._dns(resource, peer, found)
        return peering_id

    def _is_here(self, peer: Item) -> bool:
        """Whether the peer's side is ours to accept: the same account and region."""
        context = self.context
        return peer["owner_id"] in ("", context.account) and peer["region"] in ("", context.region)

    def _note_foreign(self, resource: str, peer: Item) -> None:
        if not self._is_here(peer):
            context = self.context
            context.changes.warnings.append(
                f"{resource} waits to be accepted by {peer['owner_id'] or 'this account'} in"
                f" {peer['region'] or context.region} (aws ec2 accept-vpc-peering-connection); its routes work from"
                " then on"
            )

    def _accept(self, resource: str, peer: Item, peering_id: str) -> bool:
        """Accept a request if that is ours to do; return whether the peering is active."""
        context = self.context
        if not self._is_here(peer):
            self._note_foreign(resource, peer)
            return False
        if context.changes.check_mode:
            return True
        context.api.write("accept_vpc_peering_connection", resource, VpcPeeringConnectionId=peering_id)

        def probe() -> tuple[bool, str]:
            answer = context.api.read(
                "describe_vpc_peering_connections", resource, VpcPeeringConnectionIds=[peering_id]
            )["VpcPeeringConnections"]
            status = answer[0]["Status"] if answer else {"Code": "not listed yet"}
            if status["Code"] in ("failed", "rejected", "expired", "deleted"):
                raise PlatformError(
                    f"{resource} ({peering_id}) is {status['Code']}: {status.get('Message', 'no reason given')}"
                )
            return status["Code"] == "active", status["Code"]

        wait_until(resource, probe, context.params["wait_timeout"])
        return True

    def _dns(self, resource: str, peer: Item, found: Item) -> None:
        """Bring to what is asked for whether each side resolves the other's host names to private addresses."""
        sides = {"requester": "RequesterVpcInfo"}
        if self._is_here(peer):
            sides["accepter"] = "AccepterVpcInfo"
        have = {
            f"dns_{side}": bool(found[key].get("PeeringOptions", {}).get(_RESOLVES, False))
            for side, key in sides.items()
        }
        if self.context.changes.update(resource, have, dict.fromkeys(have, bool(peer["dns"]))):
            self._resolve(resource, found["VpcPeeringConnectionId"], peer["dns"], tuple(sides))

    def _resolve(
        self,
        resource: str,
        peering_id: str,
        enabled: bool = True,
        sides: tuple[str, ...] = ("requester", "accepter"),
    ) -> None:
        options: dict[str, Any] = {f"{side.title()}PeeringConnectionOptions": {_RESOLVES: enabled} for side in sides}
        self.context.api.write(
            "modify_vpc_peering_connection_options", resource, VpcPeeringConnectionId=peering_id, **options
        )

    def _delete(self, peering: Item) -> None:
        peering_id = peering["VpcPeeringConnectionId"]
        resource = f"peering {self.context.label(peering, peering_id)}"
        self.context.changes.delete(resource, {"id": peering_id, "peer": peering["AccepterVpcInfo"]["VpcId"]})
        self.context.discard(
            self.context.api, "delete_vpc_peering_connection", resource, VpcPeeringConnectionId=peering_id
        )
