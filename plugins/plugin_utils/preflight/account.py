# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What an AWS account has to give before money is spent: quotas, machines, names, and the right to deploy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.account import bucket_suffix
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, explain, tag_dict
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import vcpus_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.access import is_administrator
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    Values,
    entries_of,
    strings,
    whole,
)

__all__ = ["STAND_IN", "check_account", "family_of"]

#: Stands for the account's number in names that are derived before anybody has been asked.
STAND_IN = "000000000000"

#: Zones that EKS's control plane does not run in. Source: EKS user guide, "VPC and subnet requirements".
UNSUPPORTED_ZONES = ("use1-az3", "usw1-az2", "cac1-az3")

#: Beginnings of the codes by which services tell that a permission is missing; a HEAD request has the status alone.
_DENIED = ("AccessDenied", "UnauthorizedOperation", "AuthorizationError", "AuthFailure", "Forbidden", "403")

#: EC2's quotas, counted in vCPUs: first letters of the families, their name, codes on demand and for spot. Source: the
#: Service Quotas console; the EC2 user guide, "On-Demand Instance quotas", has the families.
_QUOTAS = {
    ("g", "gr", "vt"): ("G and VT", "L-DB2E81BA", "L-3819A6DF"),
    ("a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z"): ("Standard", "L-1216C47A", "L-34B43A08"),
    ("p",): ("P", "L-417A185B", ""),
    ("inf",): ("Inf", "L-1945791B", "L-B5D1601B"),
    ("trn",): ("Trn", "L-2C3B7624", "L-6B0D517C"),
}


@dataclass(frozen=True)
class Quota:
    """One of EC2's quotas."""

    name: str
    code: str
    letters: tuple[str, ...]
    spot: bool


def family_of(instance_type: str, spot: bool) -> Quota | None:
    """The quota that a machine counts against; None where its family is not in the table."""
    match = re.match(r"([a-z]+)\d", instance_type)
    for letters, (name, on_demand, for_spot) in _QUOTAS.items():
        code = for_spot if spot else on_demand
        if match and match[1] in letters and code:
            long = f"All {name} Spot Instance Requests" if spot else f"Running On-Demand {name} instances"
            return Quota(long, code, letters, spot)
    return None


@dataclass(frozen=True)
class Group:
    """A node group as far as it costs quota."""

    path: str
    name: str
    types: Sequence[str]
    spot: bool
    desired: int
    most: int
    own_subnets: bool

    def vcpus(self, choose: Callable[[list[int]], int]) -> int:
        """vCPUs of one node, of the smallest or the largest of its types."""
        known = [size for kind in self.types if (size := vcpus_of(kind)) is not None]
        return choose(known) if known else 0


def _groups(values: Values) -> list[Group]:
    found = []
    for path, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups")):
        types, low, high = group.get("instance_types"), group.get("min_size"), group.get("max_size")
        desired = group.get("desired_size")
        if not strings(types) or not types or not whole(high):
            continue
        lowest = low if whole(low) else 0
        found.append(
            Group(
                path,
                str(group.get("name")),
                types,
                group.get("capacity_type") == "SPOT",
                # Capacity that is reserved in blocks is no part of the quotas.
                0 if group.get("capacity_type") == "CAPACITY_BLOCK" else desired if whole(desired) else lowest,
                0 if group.get("capacity_type") == "CAPACITY_BLOCK" else high,
                bool(group.get("subnet_ids")),
            )
        )
    return found


class _Asking:
    """The account's answers; what it does not answer is remembered, and told once."""

    def __init__(self, client: Callable[[str], Any]) -> None:
        self._client = client
        #: Calls that may not be made, by the permission that is missing, with AWS's code.
        self.refused: dict[str, str] = {}
        #: What AWS says of a variable's value, and the cure, if one is known.
        self.wrong: dict[str, tuple[str, str]] = {}
        #: The same of calls that failed for another reason, by call.
        self.failed: dict[str, tuple[str, str]] = {}

    def read(self, operation: str, resource: str, absent: Sequence[str] = (), **arguments: Any) -> Any:
        """Call an operation of S3, in the form that ``Api.read`` has."""
        return self.ask("s3", operation, absent, **arguments)

    def ask(
        self, service: str, operation: str, absent: Sequence[str] = (), variable: str = "", **arguments: Any
    ) -> Any:
        """Call an operation; None where it fails, or is answered with one of the ``absent`` codes.

        ``variable`` is the one whose value is asked about.
        """
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - slow to import

        call = f"{service.replace('-', '')}:{_camel(operation)}"
        try:
            client = self._client(service)
            if client.can_paginate(operation):
                pages = client.get_paginator(operation).paginate(**arguments)
                return pages.build_full_result()
            return getattr(client, operation)(**arguments)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code.startswith(_DENIED) and code not in absent:
                self.refused[call] = code
            elif code not in absent and variable and code.startswith("Invalid"):
                self.wrong[variable] = explain(call, error)
            elif code not in absent:
                self.failed[call] = explain(call, error)
        except BotoCoreError as error:
            self.failed[call] = explain(call, error)
        return None


def _camel(operation: str) -> str:
    return "".join(part.title() for part in operation.split("_"))


def check_account(
    client: Callable[[str], Any], identity: Mapping[str, Any], region: str, values: Values
) -> Iterator[Problem]:
    """Everything that only the account can tell. ``identity`` is STS's answer on the caller."""
    asking = _Asking(client)
    account, cluster = str(identity.get("Account", "")), str(values.get("platform_cluster_name") or "")
    groups = _groups(values)
    yield from _quotas(asking, groups, region, cluster)
    yield from _machines(asking, groups, values, region)
    yield from _buckets(asking, values, cluster, account, region)
    yield from _administrator(asking, values, cluster, str(identity.get("Arn", "")))
    if asking.refused:
        yield Problem(
            "AWS permissions",
            sorted(asking.refused),
            f"what these calls would tell is not known: {'; '.join(sorted(set(asking.refused.values())))}",
            "allow them to whoever runs preflight, which then finds what AWS would refuse later",
            warning=True,
        )
    for variable, (said, cure) in asking.wrong.items():
        reason = f"AWS says {said}"
        yield Problem(variable, values.get(variable), reason, cure or "correct it, or the region or account it is in")
    if asking.failed:
        said = "; ".join(f"{call}: {what}" for call, (what, _) in sorted(asking.failed.items()))
        cures = sorted({cure for _, cure in asking.failed.values() if cure})
        reason = f"what these calls would tell is not known: {said}"
        yield Problem("AWS", sorted(asking.failed), reason, "; ".join(cures) or "run preflight again", warning=True)


# --- quotas ----------------------------------------------------------------------------------------------------------


def _quotas(asking: _Asking, groups: Sequence[Group], region: str, cluster: str) -> Iterator[Problem]:
    by_quota: dict[Quota, list[Group]] = {}
    for group in groups:
        # All types of a group are of one kind, or the first is what it starts.
        quota = family_of(group.types[0], group.spot)
        if quota and group.most:
            by_quota.setdefault(quota, []).append(group)
    for quota, some in by_quota.items():
        answer = asking.ask("service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=quota.code)
        if answer is None:
            continue
        limit = int(answer["Quota"]["Value"])
        desired = sum(group.desired * group.vcpus(min) for group in some)
        most = sum(group.most * group.vcpus(max) for group in some)
        # Machines of the standard families are too many to be looked through.
        used = 0 if "m" in quota.letters else _used_by_others(asking, quota, cluster)
        if desired + used > limit:
            yield _over(quota, some, limit, used, region, at_start=True)
        elif most + used > limit:
            yield _over(quota, some, limit, used, region, at_start=False)


def _over(quota: Quota, groups: Sequence[Group], limit: int, used: int, region: str, *, at_start: bool) -> Problem:
    bound, choose = ("desired", min) if at_start else ("most", max)
    counts = [(one, getattr(one, bound), one.vcpus(choose)) for one in groups]
    group, size, _ = max(counts, key=lambda count: count[1] * count[2])
    terms = [f"{one.name}: {nodes} x {vcpus}" for one, nodes, vcpus in counts if nodes * vcpus]
    others = f", of which {used} are in use beside this cluster" if used else ""
    then = "the groups cannot start" if at_start else "they cannot grow so far"
    total = sum(nodes * vcpus for _, nodes, vcpus in counts)
    enough = used + sum(one.most * one.vcpus(max) for one in groups)
    return Problem(
        f"{group.path}.{'desired_size' if at_start else 'max_size'}",
        size,
        f"the groups {'begin with' if at_start else 'may reach'} {total} vCPUs ({', '.join(terms)}), and the"
        f" account's quota {quota.code} ({quota.name}) in {region} is {limit}{others}: {then}",
        "aws service-quotas request-service-quota-increase --service-code ec2"
        f" --quota-code {quota.code} --region {region} --desired-value {enough} (hours to days), or lower the sizes",
        warning=not at_start,
    )


def _used_by_others(asking: _Asking, quota: Quota, cluster: str) -> int:
    """vCPUs of a quota that run already and are not this cluster's nodes."""
    answer = asking.ask(
        "ec2",
        "describe_instances",
        Filters=[
            {"Name": "instance-state-name", "Values": ["pending", "running"]},
            {"Name": "instance-type", "Values": [f"{letters}*" for letters in quota.letters]},
        ],
    )
    total = 0
    for one in (one for each in (answer or {}).get("Reservations", ()) for one in each["Instances"]):
        tags = {tag["Key"]: tag["Value"] for tag in one.get("Tags", ())}
        counted = family_of(one["InstanceType"], one.get("InstanceLifecycle") == "spot")
        if counted != quota or cluster in (tags.get("eks:cluster-name"), tags.get(OWNER_TAG)):
            continue
        cpu = one.get("CpuOptions", {})
        total += cpu.get("CoreCount", 0) * cpu.get("ThreadsPerCore", 1) or vcpus_of(one["InstanceType"]) or 0
    return total


# --- zones and machines ----------------------------------------------------------------------------------------------


def _machines(asking: _Asking, groups: Sequence[Group], values: Values, region: str) -> Iterator[Problem]:
    answer = asking.ask("ec2", "describe_availability_zones")
    known = {
        one["ZoneName"]: one.get("ZoneId", "")
        for one in (answer or {}).get("AvailabilityZones", ())
        if one.get("ZoneType", "availability-zone") == "availability-zone"
    }
    if not known:
        return
    variable, names = _zones(asking, values, region)
    chosen = list(dict.fromkeys(names))
    good = sorted(name for name, zone_id in known.items() if zone_id not in UNSUPPORTED_ZONES)
    for index, zone in enumerate(chosen):
        where = f"{variable}[{index}]" if variable == "network_availability_zones" else variable
        if zone not in known:
            yield Problem(where, zone, f"this account has no such zone in {region}", f"take some of {', '.join(good)}")
        elif known[zone] in UNSUPPORTED_ZONES:
            yield Problem(
                where,
                zone,
                f"the zone is {known[zone]} in this account, and EKS runs no control plane there",
                f"take others of {', '.join(good)}",
            )
    types = sorted({kind for group in groups for kind in group.types})
    offered = _offerings(asking, types) if types else {}
    if offered is None or not chosen:
        return
    for group in groups:
        if not group.own_subnets:
            yield from _offered(group, offered, chosen, region)


def _zones(asking: _Asking, values: Values, region: str) -> tuple[str, list[str]]:
    """The zones of the nodes, and the variable they come from."""
    for variable in ("eks_subnet_ids", "network_existing_private_subnet_ids"):
        ids = values.get(variable)
        if strings(ids) and ids:
            answer = asking.ask("ec2", "describe_subnets", variable=variable, SubnetIds=list(ids))
            return variable, [one["AvailabilityZone"] for one in (answer or {}).get("Subnets", ())]
    zones = values.get("network_availability_zones")
    names = [region + zone if len(zone) == 1 else zone for zone in zones] if strings(zones) else []
    return "network_availability_zones", names


def _offerings(asking: _Asking, types: Sequence[str]) -> dict[str, set[str]] | None:
    """Where in the region each type is offered."""
    answer = asking.ask(
        "ec2",
        "describe_instance_type_offerings",
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": list(types)}],
    )
    if answer is None:
        return None
    found: dict[str, set[str]] = {kind: set() for kind in types}
    for one in answer.get("InstanceTypeOfferings", ()):
        found.setdefault(one["InstanceType"], set()).add(one["Location"])
    return found


def _offered(group: Group, offered: Mapping[str, set[str]], chosen: Sequence[str], region: str) -> Iterator[Problem]:
    for kind in group.types:
        where, anywhere = f"{group.path}.instance_types", sorted(offered[kind])
        lacking = [zone for zone in chosen if zone not in offered[kind]]
        if not anywhere:
            yield Problem(
                where,
                list(group.types),
                f"AWS offers no {kind} in {region}",
                "correct the type, or take one that is offered there"
                f" (aws ec2 describe-instance-type-offerings --region {region})",
            )
        elif len(lacking) == len(chosen):
            yield Problem(
                where,
                list(group.types),
                f"{kind} is offered in none of the zones chosen ({', '.join(chosen)})",
                f"take zones among {', '.join(anywhere)}, or another type",
                # Others of the group start in its place.
                warning=len(group.types) > 1,
            )
        elif lacking:
            yield Problem(
                where,
                list(group.types),
                f"{kind} is not offered in {', '.join(lacking)}: its nodes start in the other zones alone",
                f"take zones among {', '.join(anywhere)}, or mean it",
                warning=True,
            )


# --- names -----------------------------------------------------------------------------------------------------------


#: What S3 answers where there is no such bucket, or it is in another region.
_NO_BUCKET = ("NoSuchBucket", "NotFound", "404", "PermanentRedirect", "301", "AuthorizationHeaderMalformed", "400")


def _buckets(asking: _Asking, values: Values, cluster: str, account: str, region: str) -> Iterator[Problem]:
    old = values.get("account_old_buckets")
    suffix = bucket_suffix(asking, old if strings(old) else (), cluster, account, region)
    for variable in ("platform_models_bucket", "platform_datasets_bucket", "platform_logs_bucket"):
        name = values.get(variable)
        if not isinstance(name, str) or not 3 <= len(name) <= 63:
            continue
        name = name.removesuffix(f"-{STAND_IN}-{region}") + (suffix if name.endswith(f"-{STAND_IN}-{region}") else "")
        answer = asking.ask("s3", "get_bucket_tagging", ("NoSuchTagSet", *_NO_BUCKET), Bucket=name)
        # The tags may be closed where the bucket is not.
        if asking.refused.pop("s3:GetBucketTagging", ""):
            asking.ask("s3", "head_bucket", _NO_BUCKET, Bucket=name)
        if asking.refused.pop("s3:HeadBucket", ""):
            yield Problem(
                variable,
                name,
                "all of AWS shares the names of buckets, and this one belongs to another account or is closed to these"
                " credentials",
                "choose another name, or check the credentials",
            )
        owner = tag_dict((answer or {}).get("TagSet")).get(OWNER_TAG, cluster)
        if owner != cluster:
            yield Problem(
                variable, name, f"the bucket belongs to the cluster {owner} (tag {OWNER_TAG})", "choose another name"
            )


# --- who deploys -----------------------------------------------------------------------------------------------------


def _administrator(asking: _Asking, values: Values, cluster: str, arn: str) -> Iterator[Problem]:
    """The caller will be allowed to deploy into the cluster."""
    if values.get("kubeconfig_source") == "given" or values.get("eks_authentication_mode") == "CONFIG_MAP":
        return
    # EKS gives the root user no entry, and asks nobody for it.
    if not cluster or not arn or arn.endswith(":root") or arn in _declared(values) or _role(arn) in _declared(values):
        return
    cure = f"add {{principal_arn: {_role(arn)}, policies: [{{policy: AmazonEKSClusterAdminPolicy}}]}}"
    if ":assumed-role/" in arn:
        cure += "; EKS wants the role's path, too, if it has one, as roles of IAM Identity Center do: aws iam get-role"
        cure += f" --role-name {_role(arn).rpartition('/')[2]}"
    found = asking.ask("eks", "describe_cluster", ("ResourceNotFoundException",), name=cluster)
    if {"eks:DescribeCluster"} & {*asking.refused, *asking.failed}:
        return
    if found is None:
        if values.get("eks_creator_is_admin") is False:
            yield Problem(
                "eks_access_entries",
                sorted(_declared(values)),
                f"eks_creator_is_admin is false, and the caller of this run, {_role(arn)}, is no"
                " administrator: the stages of the cluster will be refused",
                cure,
            )
        return
    # Its ConfigMap, which nobody can ask AWS for, may admit the caller, too.
    if (found["cluster"].get("accessConfig") or {}).get("authenticationMode", "API") != "API":
        return
    entries = asking.ask("eks", "list_access_entries", clusterName=cluster)
    if entries is not None and not {arn, _role(arn)} & {_bare(one) for one in entries.get("accessEntries", ())}:
        yield Problem(
            "eks_access_entries",
            sorted(_declared(values)),
            f"the cluster {cluster} was made by somebody else, and the caller of this run, {_role(arn)}, has no access"
            " entry: the stages of the cluster will be refused",
            cure,
        )


def _declared(values: Values) -> set[str]:
    """The administrators among the entries."""
    return {
        _bare(str(entry.get("principal_arn")))
        for _, entry in entries_of(values, "eks_access_entries")
        if is_administrator(entry)
    }


def _role(arn: str) -> str:
    """The role behind an assumed role's ARN; STS leaves its path out."""
    match = re.fullmatch(r"arn:([\w-]+):sts::(\d+):assumed-role/([^/]+)/.+", arn)
    return f"arn:{match[1]}:iam::{match[2]}:role/{match[3]}" if match else arn


def _bare(arn: str) -> str:
    """A role's ARN without its path."""
    return re.sub(r"(:role/)(?:.+/)?([^/]+)$", r"\1\2", arn)
