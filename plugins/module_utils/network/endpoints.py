# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What may talk to what: security groups, and the endpoints through which AWS's services are reached inside the VPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import PlatformError, wait_until
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import ANYWHERE, Context, Item, new_id

__all__ = ["Endpoints", "Rule", "SecurityGroups", "permission", "rule_text", "rules_of"]

#: Protocol, first port, last port, source; ports are None where the protocol is -1, every one.
Rule = tuple[str, int | None, int | None, str]
_OUTWARD: Rule = ("-1", None, None, ANYWHERE)


class SecurityGroups:
    """Security groups whose ingress rules are exactly the wanted ones."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def wanted_rules(self) -> set[Rule]:
        """Return the rules of the network's own group: HTTPS inside the VPC, and what the inventory adds."""
        wanted: set[Rule] = {("tcp", 443, 443, cidr) for cidr in self.context.vpc_cidrs}
        for rule in self.context.params["security_group_rules"]:
            every = rule["protocol"] == "-1"
            ports = (None, None) if every else (rule["from_port"], rule["to_port"])
            wanted.add((rule["protocol"], *ports, rule["cidr"]))
        return wanted

    def find(self, suffix: str) -> Item | None:
        """Return one of our groups by the end of its name."""
        name = self.context.name + suffix
        return next((group for group in self.context.view.groups if group["GroupName"] == name), None)

    def check(self, suffix: str) -> None:
        """Refuse a name that another's group has, before anything is changed."""
        found = self.find(suffix)
        if found is not None and not self.context.may_take(found):
            raise PlatformError(
                f"security group {found['GroupName']} ({found['GroupId']}) in {self.context.vpc_id} is not ours, and"
                " names are taken once a VPC: give another network_name"
            )

    def present(self, suffix: str, role: str, description: str, wanted: set[Rule]) -> str:
        """Keep one group and its rules; return its id."""
        context = self.context
        name = context.name + suffix
        resource = f"security group {name}"
        tags = context.tags(role, suffix)
        found = self.find(suffix)
        if found is None:
            context.changes.create(resource, {"ingress": sorted(map(rule_text, wanted)), "tags": tags})
            answer = context.api.write(
                "create_security_group",
                resource,
                GroupName=name,
                Description=description,
                VpcId=context.vpc_id,
                TagSpecifications=context.specification("security-group", tags),
            )
            group_id = str(answer["GroupId"]) if answer else new_id(resource)
            self._write("authorize_security_group_ingress", resource, group_id, wanted)
            return group_id
        group_id = str(found["GroupId"])
        context.retag(resource, group_id, found.get("Tags"), tags)
        have = rules_of(found.get("IpPermissions", ()))
        missing, foreign = wanted - have, have - wanted
        before = {f"ingress {rule_text(rule)}": None for rule in sorted(missing, key=rule_text)}
        after = dict.fromkeys(before, "allowed")
        revoked = [f"ingress {rule_text(rule)}" for rule in sorted(foreign, key=rule_text)]
        context.changes.update(
            resource,
            {**before, **dict.fromkeys(revoked, "allowed")},
            {**after, **dict.fromkeys(revoked, "revoked")},
        )
        self._write("authorize_security_group_ingress", resource, group_id, missing)
        self._write("revoke_security_group_ingress", resource, group_id, foreign)
        if _OUTWARD not in rules_of(found.get("IpPermissionsEgress", ())):
            key = f"egress {rule_text(_OUTWARD)}"
            context.changes.update(resource, {key: None}, {key: "allowed"})
            self._write("authorize_security_group_egress", resource, group_id, {_OUTWARD})
        return group_id

    def remove(self, suffix: str = "") -> None:
        """Delete our groups, or the one whose name ends so. Those that Kubernetes made block the VPC; AWS says so."""
        for group in list(self.context.view.groups):
            if self.context.ours(group) and group["GroupName"].endswith(suffix):
                self.context.remove("delete_security_group", "security group", group, GroupId=group["GroupId"])
                self.context.view.groups.remove(group)

    def _write(self, operation: str, resource: str, group_id: str, rules: set[Rule]) -> None:
        if rules:
            permissions = [permission(rule) for rule in sorted(rules, key=rule_text)]
            self.context.api.write(operation, resource, GroupId=group_id, IpPermissions=permissions)


class Endpoints:
    """The gateway endpoint of S3 and the interface endpoints."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def service(self, short: str) -> str:
        """Return the full name of a service by its short one, such as ecr.api."""
        region = self.context.region
        prefix = "cn.com.amazonaws" if region.startswith("cn-") and short != "s3" else "com.amazonaws"
        return f"{prefix}.{region}.{short}"

    def s3(self, tables: Sequence[str]) -> None:
        """Keep the gateway endpoint in the given route tables."""
        context = self.context
        service = self.service("s3")
        resource = f"gateway endpoint {context.name}-s3"
        found = next(
            (
                one
                for one in context.view.endpoints
                if one["ServiceName"] == service and one["VpcEndpointType"] == "Gateway" and context.may_take(one)
            ),
            None,
        )
        # In an adopted VPC whose subnets exist no route table is ours to put it in.
        if not context.params["s3_endpoint"] or not tables:
            if found is not None and context.ours(found):
                self.delete([found])
            return
        tags = context.tags("endpoint-s3", "-s3")
        if found is None:
            context.changes.create(resource, {"service": service, "route_tables": list(tables), "tags": tags})
            context.api.write(
                "create_vpc_endpoint",
                resource,
                VpcId=context.vpc_id,
                ServiceName=service,
                VpcEndpointType="Gateway",
                RouteTableIds=list(tables),
                TagSpecifications=context.specification("vpc-endpoint", tags),
            )
            return
        context.retag(resource, found["VpcEndpointId"], found.get("Tags"), tags)
        self._modify(resource, found, "route table", "RouteTableIds", set(tables), exactly=False)

    def interfaces(self, names: Sequence[str], subnets: Sequence[str], group: str) -> None:
        """Keep interface endpoints of the named services in the subnets, and no others of ours."""
        context = self.context
        wanted = {self.service(short): short for short in names}
        interfaces = [one for one in context.view.endpoints if one["VpcEndpointType"] == "Interface"]
        # Ours first: in an adopted VPC its owner may have one of the same service, which serves us as well.
        found = {one["ServiceName"]: one for one in sorted(interfaces, key=context.ours)}
        for service, short in wanted.items():
            endpoint = found.get(service)
            if endpoint is None:
                self._create(service, short, subnets, group)
            elif context.may_take(endpoint):
                self._keep(endpoint, short, subnets, group)
        self.delete([one for one in interfaces if context.ours(one) and one["ServiceName"] not in wanted])

    def _create(self, service: str, short: str, subnets: Sequence[str], group: str) -> None:
        context = self.context
        resource = f"interface endpoint {context.name}-{short}"
        tags = context.tags(f"endpoint-{short}", f"-{short}")
        context.changes.create(resource, {"service": service, "subnets": list(subnets), "tags": tags})
        context.api.write(
            "create_vpc_endpoint",
            resource,
            VpcId=context.vpc_id,
            ServiceName=service,
            VpcEndpointType="Interface",
            SubnetIds=list(subnets),
            SecurityGroupIds=[group],
            PrivateDnsEnabled=True,
            TagSpecifications=context.specification("vpc-endpoint", tags),
        )

    def _keep(self, endpoint: Item, short: str, subnets: Sequence[str], group: str) -> None:
        context = self.context
        resource = f"interface endpoint {context.name}-{short}"
        tags = context.tags(f"endpoint-{short}", f"-{short}")
        context.retag(resource, endpoint["VpcEndpointId"], endpoint.get("Tags"), tags)
        self._modify(resource, endpoint, "subnet", "SubnetIds", set(subnets))
        # Emulators do not say these two; AWS always does.
        if "Groups" in endpoint:
            groups = {**endpoint, "SecurityGroupIds": [one["GroupId"] for one in endpoint["Groups"]]}
            self._modify(resource, groups, "security group", "SecurityGroupIds", {group})
        if "PrivateDnsEnabled" in endpoint and context.changes.update(
            resource, {"private_dns": endpoint["PrivateDnsEnabled"]}, {"private_dns": True}
        ):
            context.api.write(
                "modify_vpc_endpoint", resource, VpcEndpointId=endpoint["VpcEndpointId"], PrivateDnsEnabled=True
            )

    def _modify(
        self, resource: str, endpoint: Item, what: str, key: str, wanted: set[str], *, exactly: bool = True
    ) -> None:
        """Bring what an endpoint is associated with to ``wanted``; ``exactly`` says whether anything else goes."""
        have = set(endpoint.get(key, ()))
        missing = sorted(wanted - have)
        foreign = sorted(have - wanted) if exactly else []
        self.context.changes.update(
            resource,
            {f"{what} {one}": "associated" for one in foreign},
            {**{f"{what} {one}": "associated" for one in missing}, **{f"{what} {one}": "removed" for one in foreign}},
        )
        calls: dict[str, Any] = {}
        if missing:
            calls[f"Add{key}"] = missing
        if foreign:
            calls[f"Remove{key}"] = foreign
        if calls:
            self.context.api.write("modify_vpc_endpoint", resource, VpcEndpointId=endpoint["VpcEndpointId"], **calls)

    def delete(self, endpoints: Sequence[Item]) -> None:
        """Ask for the deletion of endpoints; that of interface endpoints takes a minute or two."""
        context = self.context
        for endpoint in endpoints:
            name = context.label(endpoint, endpoint["VpcEndpointId"])
            context.changes.delete(
                f"endpoint {name}", {"id": endpoint["VpcEndpointId"], "service": endpoint["ServiceName"]}
            )
        if endpoints:
            ids = [endpoint["VpcEndpointId"] for endpoint in endpoints]
            answer = context.api.write("delete_vpc_endpoints", context.name, VpcEndpointIds=ids)
            failed = [one for one in (answer or {}).get("Unsuccessful", ()) if "NotFound" not in str(one)]
            if failed:
                raise PlatformError(
                    f"ec2:DeleteVpcEndpoints failed for {failed[0].get('ResourceId')}:"
                    f" {failed[0].get('Error', {}).get('Message')}"
                )

    def wait_until_gone(self, endpoints: Sequence[Item]) -> None:
        """Wait until the network interfaces of deleted endpoints no longer hold their subnets and groups."""
        context = self.context
        ids = {one["VpcEndpointId"] for one in endpoints if one["VpcEndpointType"] == "Interface"}
        if not ids or context.changes.check_mode:
            return

        def probe() -> tuple[bool, str]:
            # By VPC and not by id: an id that is gone would be an error.
            found = context.api.pages(
                "describe_vpc_endpoints",
                "VpcEndpoints",
                context.name,
                Filters=[{"Name": "vpc-id", "Values": [context.vpc_id]}],
            )
            left = [one for one in found if one["VpcEndpointId"] in ids and str(one["State"]).lower() != "deleted"]
            return not left, ", ".join(f"{one['VpcEndpointId']} {one['State']}" for one in left)

        wait_until(f"deletion of endpoints of {context.name}", probe, context.params["wait_timeout"])


def rules_of(permissions: Any) -> set[Rule]:
    """Return EC2's nested permissions as flat rules; sources other than CIDRs keep their id."""
    rules: set[Rule] = set()
    for one in permissions:
        protocol = one["IpProtocol"]
        ports = (None, None) if protocol == "-1" else (one.get("FromPort"), one.get("ToPort"))
        sources = [source["CidrIp"] for source in one.get("IpRanges", ())]
        sources += [source["CidrIpv6"] for source in one.get("Ipv6Ranges", ())]
        sources += [source["GroupId"] for source in one.get("UserIdGroupPairs", ())]
        sources += [source["PrefixListId"] for source in one.get("PrefixListIds", ())]
        rules |= {(protocol, *ports, source) for source in sources}
    return rules


def permission(rule: Rule) -> Item:
    """Return a flat rule in EC2's nested form."""
    protocol, first, last, source = rule
    nested: Item = {"IpProtocol": protocol}
    if first is not None:
        nested |= {"FromPort": first, "ToPort": last}
    if source.startswith("sg-"):
        nested["UserIdGroupPairs"] = [{"GroupId": source}]
    elif source.startswith("pl-"):
        nested["PrefixListIds"] = [{"PrefixListId": source}]
    elif ":" in source:
        nested["Ipv6Ranges"] = [{"CidrIpv6": source}]
    else:
        nested["IpRanges"] = [{"CidrIp": source}]
    return nested


def rule_text(rule: Rule) -> str:
    """Return a rule as a person reads it."""
    protocol, first, last, source = rule
    return f"all from {source}" if protocol == "-1" else f"{protocol} {first}-{last} from {source}"
