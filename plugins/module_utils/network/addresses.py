# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Addresses of a cluster's network and of its peers. Pure arithmetic: no AWS call, no Ansible import."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TypedDict

__all__ = ["MAX_ZONES", "MIN_ZONES", "PlannedSubnet", "check_peers", "inside", "overlaps", "plan_subnets"]

#: EKS wants subnets in at least two zones; the plan below has room for six.
MIN_ZONES = 2
MAX_ZONES = 6

# AWS accepts VPCs and subnets between these prefix lengths (both inclusive).
_WIDEST_PREFIX = 16
_NARROWEST_PREFIX = 28

# The VPC is cut into eighths: eighth i is the private subnet of zone i, because pods take their addresses there. The
# last eighth is cut into eighths again for the public subnets, which hold only load balancers and NAT gateways, and the
# seventh likewise for the intra subnets, which hold only the control plane's interfaces. A zone's place depends on its
# position alone, so a zone added at the end moves no subnet that exists, and neither does a kind added later.
# Each pair: bits added to the VPC's prefix, number of the first block of that size.
_PRIVATE = (3, 0)
_INTRA = (6, 6 << 3)
_PUBLIC = (6, 7 << 3)


class PlannedSubnet(TypedDict):
    """One subnet of the plan."""

    role: str
    zone: str
    cidr: str


def plan_subnets(
    vpc_cidr: str,
    zones: Sequence[str],
    public: bool = True,
    private_cidrs: Sequence[str] = (),
    public_cidrs: Sequence[str] = (),
    *,
    intra: bool = False,
    intra_cidrs: Sequence[str] = (),
) -> list[PlannedSubnet]:
    """Return the subnets of a VPC: one private one a zone and, if asked for, one public and one intra one a zone.

    Given CIDRs are taken as they are, in the order of ``zones``; absent ones are computed from ``vpc_cidr``. ``role``
    in the result is ``private``, ``public`` or ``intra``, in this order, each kind in the order of ``zones``.

    Raises ``ValueError`` with the reason and the cure: malformed or unsuitable CIDRs, host bits set, too few or too
    many zones, doubled
    zones, a VPC too small for the subnets, given CIDRs outside the VPC, overlapping, or not one a zone.

    Limits are those of the VPC user guide, "VPC CIDR blocks" and "Subnet sizing" (/16 to /28), and of the EKS network
    requirements.
    """
    vpc = _network(vpc_cidr, "the VPC")
    _check_zones(zones)
    plan = _place("private", vpc, zones, private_cidrs, _PRIVATE)
    if public:
        plan += _place("public", vpc, zones, public_cidrs, _PUBLIC)
    if intra:
        plan += _place("intra", vpc, zones, intra_cidrs, _INTRA)
    _check_apart(plan)
    return plan


def overlaps(one: str, other: str) -> bool:
    """Return whether two CIDR blocks share an address."""
    return ipaddress.IPv4Network(one).overlaps(ipaddress.IPv4Network(other))


def inside(block: str, wider: Sequence[str]) -> bool:
    """Return whether ``block`` lies inside one of the blocks ``wider``."""
    network = ipaddress.IPv4Network(block)
    return any(network.subnet_of(ipaddress.IPv4Network(one)) for one in wider)


def check_peers(vpc_cidrs: Sequence[str], peers: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Refuse peers whose addresses could not be routed to; ``peers`` are pairs of a name and its CIDR blocks.

    Raises ``ValueError``: a malformed block, one that overlaps the VPC's own (AWS refuses such a peering: VPC peering
    guide, "Overlapping CIDR blocks"), one that two peers share (a route has one target).
    """
    seen: list[tuple[str, str]] = []
    for name, cidrs in peers:
        for cidr in cidrs:
            try:
                ipaddress.IPv4Network(cidr)
            except ValueError as error:
                raise ValueError(f"peer {name}: {cidr!r} is no CIDR block: {error}") from None
            for own in vpc_cidrs:
                if overlaps(cidr, own):
                    raise ValueError(
                        f"peer {name}: its addresses {cidr} overlap the VPC's {own}; VPCs that share addresses cannot"
                        " be peered"
                    )
            for other, taken in seen:
                if overlaps(cidr, taken):
                    raise ValueError(
                        f"peer {name}: its addresses {cidr} overlap {taken} of peer {other}; give each peer its own"
                    )
            seen.append((name, cidr))


def _network(cidr: str, what: str) -> ipaddress.IPv4Network:
    try:
        network = ipaddress.IPv4Network(cidr)
    except ValueError as error:
        try:
            cure = f"; write {ipaddress.IPv4Network(cidr, strict=False)}"
        except ValueError:
            cure = "; write an IPv4 block such as 10.0.0.0/16"
        raise ValueError(f"{cidr!r} is no CIDR for {what}: {error}{cure}") from None
    if not _WIDEST_PREFIX <= network.prefixlen <= _NARROWEST_PREFIX:
        raise ValueError(
            f"{cidr} cannot be {what}: AWS takes prefixes from /{_WIDEST_PREFIX} to /{_NARROWEST_PREFIX}, this one"
            f" is /{network.prefixlen}"
        )
    return network


def _check_zones(zones: Sequence[str]) -> None:
    if not MIN_ZONES <= len(zones) <= MAX_ZONES:
        raise ValueError(
            f"{len(zones)} availability zones given ({', '.join(zones) or 'none'}): EKS needs at least {MIN_ZONES},"
            f" the address plan holds at most {MAX_ZONES}"
        )
    doubled = sorted({zone for zone in zones if zones.count(zone) > 1})
    if doubled:
        raise ValueError(f"availability zone given twice: {', '.join(doubled)}; name each zone once")


def _place(
    role: str, vpc: ipaddress.IPv4Network, zones: Sequence[str], given: Sequence[str], layout: tuple[int, int]
) -> list[PlannedSubnet]:
    networks = _given(role, vpc, zones, given) if given else _computed(role, vpc, len(zones), layout)
    return [
        PlannedSubnet(role=role, zone=zone, cidr=str(network)) for zone, network in zip(zones, networks, strict=True)
    ]


def _given(
    role: str, vpc: ipaddress.IPv4Network, zones: Sequence[str], given: Sequence[str]
) -> list[ipaddress.IPv4Network]:
    if len(given) != len(zones):
        raise ValueError(
            f"{len(given)} {role} subnet CIDRs for {len(zones)} availability zones ({', '.join(zones)}): give one a"
            " zone, or none to have"
            " them computed"
        )
    networks = [_network(cidr, f"a {role} subnet") for cidr in given]
    for network in networks:
        if not network.subnet_of(vpc):
            raise ValueError(
                f"{role} subnet {network} is not inside the VPC's {vpc}; choose a block within it or widen the VPC"
            )
    return networks


def _computed(
    role: str, vpc: ipaddress.IPv4Network, count: int, layout: tuple[int, int]
) -> list[ipaddress.IPv4Network]:
    bits, first = layout
    prefix = vpc.prefixlen + bits
    if prefix > _NARROWEST_PREFIX:
        raise ValueError(
            f"{vpc} does not hold the {role} subnets: they would be /{prefix}, AWS takes none smaller than"
            f" /{_NARROWEST_PREFIX}; use a VPC of"
            f" /{_NARROWEST_PREFIX - bits} or wider, or give the subnet CIDRs yourself"
        )
    base = int(vpc.network_address)
    size = 1 << (32 - prefix)
    return [ipaddress.IPv4Network((base + (first + index) * size, prefix)) for index in range(count)]


def _check_apart(plan: Sequence[PlannedSubnet]) -> None:
    for index, one in enumerate(plan):
        for other in plan[index + 1 :]:
            if ipaddress.IPv4Network(one["cidr"]).overlaps(ipaddress.IPv4Network(other["cidr"])):
                raise ValueError(
                    f"{one['role']} subnet {one['cidr']} ({one['zone']}) overlaps {other['role']} subnet"
                    f" {other['cidr']} ({other['zone']});"
                    " choose blocks that lie apart"
                )
