# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""From where an API server is reached: this machine's addresses, the endpoint's own limits, and why it fails."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.urls import open_url

__all__ = ["admitted", "explain", "kind_of", "own_address", "source_address"]

#: Seconds for the question which address this machine has on the internet: an answer is worth no longer wait.
_PATIENCE = 3

_INSIDE = (
    "run the stages of the cluster from inside (--tags cluster on a machine in the VPC, a peered network or behind a"
    " VPN), or set eks_endpoint_public_access with eks_endpoint_public_cidrs and run --tags eks; see docs/aws.md"
)


def own_address(url: str) -> str:
    """The address under which the internet sees this machine, as the service at ``url`` says; empty where unknown."""
    if not url:
        return ""
    try:
        text = open_url(url, timeout=_PATIENCE).read(100).decode().strip()
        return str(ipaddress.ip_address(text))
    except (OSError, ValueError, http.client.HTTPException):
        return ""


def source_address(host: str, port: int = 443) -> str:
    """The address with which this machine would talk to a host; empty without a route. Sends nothing."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def admitted(address: str, cidrs: Iterable[str]) -> bool:
    """Whether one of the CIDRs holds the address; what is no CIDR holds none."""
    for cidr in cidrs:
        try:
            if ipaddress.ip_address(address) in ipaddress.ip_network(cidr, strict=False):
                return True
        except ValueError:
            continue
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException | None] = [error]
    while seen:
        one = seen.pop()
        if isinstance(one, BaseException):
            yield one
            # urllib3 keeps what happened in `reason`.
            seen += [one.__cause__ or one.__context__, getattr(one, "reason", None)]


def kind_of(error: BaseException) -> str:
    """What kept a connection from being made: ``dns``, ``refused``, ``tls``, ``timeout``, or ``other``."""
    for one in _chain(error):
        if isinstance(one, socket.gaierror) or type(one).__name__ == "NameResolutionError":
            return "dns"
        if isinstance(one, ConnectionRefusedError):
            return "refused"
        if isinstance(one, ssl.SSLError):
            return "tls"
        if isinstance(one, TimeoutError) or type(one).__name__ in ("ConnectTimeoutError", "ReadTimeoutError"):
            return "timeout"
    return "other"


def explain(
    server: str, error: BaseException, access: Mapping[str, Any], clients: Iterable[str], address_url: str
) -> str:
    """Why this machine does not reach an EKS API server, with the cure.

    ``access`` is EKS's ``resourcesVpcConfig``; ``clients`` are the networks that the private endpoint admits;
    ``address_url`` tells this machine's address on the internet.
    """
    host = urlsplit(server).hostname or server
    kind = kind_of(error)
    status = getattr(error, "status", None)
    if status in (401, 403):
        return (
            f"{server} answers and refuses who asks ({status}): the AWS principal of this run has no access entry."
            " Add it to eks_access_entries with the policy AmazonEKSClusterAdminPolicy and run --tags eks"
        )
    if status:
        return (
            f"{server} answers {status}: see the cluster's health in the EKS console, then run again (--tags cluster)"
        )
    if kind == "tls":
        return (
            f"{server} answers with a certificate that is not the cluster's ({_short(error)}): a proxy opens TLS, or"
            " the kubeconfig is old. Take the host out of the proxy, or write the kubeconfig again (--tags kubeconfig)"
        )
    if kind == "dns":
        return (
            f"the name {host} does not resolve on this machine ({_short(error)}). Check its resolver; a cluster made a"
            " moment ago takes minutes to be known: run again with --tags cluster"
        )
    public = bool(access.get("endpointPublicAccess", True))
    cidrs = [str(cidr) for cidr in access.get("publicAccessCidrs") or ["0.0.0.0/0"]]
    source, clients = source_address(host), list(clients)
    how = "refuses the connection" if kind == "refused" else f"does not answer ({_short(error)})"
    if source and admitted(source, clients):
        return (
            f"{server} {how}, although this machine ({source}) is inside ({', '.join(clients)}): look at the cluster's"
            " security group (443 from these networks), at routes and at network ACLs, or run --tags eks"
        )
    if not public:
        inside = f", which is in none of {', '.join(clients)}" if clients else ""
        seen = f" (its address there is {source}{inside})" if source else ""
        return (
            f"{server} {how}: the endpoint is private (eks_endpoint_public_access: false) and this machine is"
            f" outside{seen}: {_INSIDE}"
        )
    address = own_address(address_url)
    if address and not admitted(address, cidrs):
        width = 32 if ":" not in address else 128
        return (
            f"{server} {how}: eks_endpoint_public_cidrs ({', '.join(cidrs)}) does not hold this machine's address"
            f" {address}: add {address}/{width} and run --tags eks"
        )
    known = (
        f"holds this machine's address {address}" if address else "could not be compared with this machine's address"
    )
    return (
        f"{server} {how}; eks_endpoint_public_cidrs ({', '.join(cidrs)}) {known}: look at firewalls and proxies between"
        " here and AWS, and at the cluster's health in the EKS console"
    )


def _short(error: BaseException) -> str:
    """The innermost reason, on one line and without the addresses of objects."""
    texts = [" ".join(str(one).split()) for one in _chain(error)]
    text = min((one for one in texts if one), key=len, default=type(error).__name__)
    return re.sub(r"<[^>]*>:? ?", "", text).rstrip(".")
