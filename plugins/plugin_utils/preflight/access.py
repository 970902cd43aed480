# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Who reaches a cluster's API server on AWS, and who is its administrator."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.kube.reach import admitted, own_address
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    Values,
    cidr_problems,
    entries_of,
    strings,
)

__all__ = ["OPEN_ENVIRONMENTS", "administrators", "api_access", "check_own_address", "is_administrator"]

PUBLIC = "eks_endpoint_public_cidrs"
PRIVATE = "eks_endpoint_private_cidrs"
#: Environments whose API server may be open to everybody.
OPEN_ENVIRONMENTS = ("dev", "local")
#: Shorter prefixes admit more than any one organisation has.
_SHORTEST = {4: 8, 6: 16}
#: EKS's quota "Public endpoint access CIDR ranges per cluster".
_MOST = 40
_ADMIN_POLICY = "AmazonEKSClusterAdminPolicy"
_PRIVATE_ONLY = "set eks_endpoint_public_access to false and run the cluster's stages from inside (docs/aws.md)"


def api_access(values: Values) -> Iterator[Problem]:
    """The API server can be reached, and outside dev not by everybody."""
    if values.get("platform") != "aws":
        return
    public, private, cidrs = (
        values.get(name) for name in ("eks_endpoint_public_access", "eks_endpoint_private_access", PUBLIC)
    )
    yield from cidr_problems(PRIVATE, values.get(PRIVATE))
    if public is False and private is False:
        yield Problem(
            "eks_endpoint_private_access",
            False,
            "with eks_endpoint_public_access false, too, nobody reaches the API server",
            "set it to true",
        )
    if public is False:
        yield Problem(
            "eks_endpoint_public_access",
            False,
            "the API server is reached from inside its network alone: from the VPC, its peers and"
            " eks_endpoint_private_cidrs",
            "run --tags cloud from anywhere, then --tags cluster on a machine that is inside (docs/aws.md)",
            warning=True,
        )
    if public is not True or not strings(cidrs):
        return
    if len(cidrs) > _MOST:
        yield Problem(
            PUBLIC, f"{len(cidrs)} networks", f"EKS takes at most {_MOST}", "join them, or name the networks of a VPN"
        )
    yield from cidr_problems(PUBLIC, cidrs, ipv6=True)
    wide = [index for index, cidr in enumerate(cidrs) if _is_wide(cidr)]
    for index in wide if values.get("platform_environment") not in OPEN_ENVIRONMENTS else ():
        yield Problem(
            f"{PUBLIC}[{index}]",
            cidrs[index],
            "outside dev the API server is not open to the internet, and this is more than any organisation has",
            f"name the networks of those who deploy, such as 203.0.113.7/32, or {_PRIVATE_ONLY}",
        )
    for index, cidr in enumerate(cidrs):
        if _is_reserved(cidr):
            yield Problem(
                f"{PUBLIC}[{index}]",
                cidr,
                "EKS refuses reserved addresses here: this is what the internet sees, not the address inside",
                f"write the public address of that network's way out, or move it to {PRIVATE}",
            )
    if private is False and cidrs and not wide:
        yield Problem(
            "eks_endpoint_private_access",
            False,
            f"nodes then reach the API server by their NAT gateways' addresses, which {PUBLIC} does not name",
            "set it to true",
        )


def _network(cidr: str) -> Any:
    try:
        return ipaddress.ip_network(cidr)
    except ValueError:
        return None


def _is_wide(cidr: str) -> bool:
    network = _network(cidr)
    return network is not None and network.prefixlen < _SHORTEST[network.version]


def _is_reserved(cidr: str) -> bool:
    network = _network(cidr)
    if network is None or network.prefixlen == 0:
        return False
    return bool(network.is_private or network.is_loopback or network.is_link_local or network.is_multicast)


def check_own_address(values: Values) -> Iterator[Problem]:
    """Somebody may reach the public endpoint, and this machine is among them.

    Asked of a deployment only: what a cluster costs, or where it differs, can be told without.
    """
    cidrs, url = values.get(PUBLIC), values.get("platform_address_url")
    if values.get("eks_endpoint_public_access") is not True or not strings(cidrs):
        return
    if any((network := _network(cidr)) is not None and network.prefixlen == 0 for cidr in cidrs):
        return
    address = own_address(url) if isinstance(url, str) else ""
    own = f"{address}/{128 if ':' in address else 32}" if address else ""
    if not cidrs:
        admit = f'this machine\'s address is {address}: -e \'{{"{PUBLIC}": ["{own}"]}}\' admits it' if own else ""
        yield Problem(
            PUBLIC,
            [],
            "the API server has a public endpoint, and nobody is named who may reach it",
            f"{admit or 'name the networks of those who deploy, such as 203.0.113.7/32'}; or {_PRIVATE_ONLY}",
        )
    elif address and not admitted(address, cidrs):
        yield Problem(
            PUBLIC,
            list(cidrs),
            f"it does not hold this machine's address, {address}: the stages of the cluster will not reach the API"
            " server, unless this machine is in its network",
            f"add {own}, or run --tags cluster from inside",
            warning=True,
        )


def is_administrator(entry: Mapping[str, Any]) -> bool:
    """Whether an access entry has the policy of cluster administrators."""
    policies = entry.get("policies")
    return any(
        isinstance(one, Mapping) and str(one.get("policy")).rpartition("/")[2] == _ADMIN_POLICY
        for one in (policies if isinstance(policies, list) else ())
    )


def administrators(values: Values) -> Iterator[Problem]:
    """Somebody will be allowed to deploy into the cluster: who makes it, or an access entry."""
    if values.get("platform") != "aws" or values.get("eks_creator_is_admin") is not False:
        return
    if values.get("eks_authentication_mode") == "CONFIG_MAP" or values.get("kubeconfig_source") == "given":
        return
    if any(is_administrator(entry) for _, entry in entries_of(values, "eks_access_entries")):
        return
    yield Problem(
        "eks_access_entries",
        values.get("eks_access_entries") or [],
        "eks_creator_is_admin is false and no entry is an administrator's: nobody may deploy into the cluster",
        "add {principal_arn: ARN, policies: [{policy: AmazonEKSClusterAdminPolicy}]} for whoever runs the playbooks",
    )
