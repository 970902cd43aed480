# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over how clients reach the gateway and the models: no plain HTTP on the internet, certificates that load
balancers can use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values, cidr_problems, whole

__all__ = ["exposure"]

_CERTIFICATE = re.compile(r"arn:aws(?:-cn|-us-gov)?:acm:(?P<region>[a-z0-9-]+):\d{12}:certificate/[0-9A-Za-z-]+")
_PLAIN = "keys, prompts and answers would cross the internet in plain text"
#: Seconds of silence that AWS takes. Source: its guides to application and network load balancers.
_IDLE = {"alb": (1, 4000), "nlb": (60, 6000)}
_AWS = "service.beta.kubernetes.io/aws-load-balancer-"
#: Annotations by which clouds keep a load balancer internal.
_INTERNAL = {
    "networking.gke.io/load-balancer-type": ("internal",),
    "cloud.google.com/load-balancer-type": ("internal",),
    "service.beta.kubernetes.io/azure-load-balancer-internal": ("true",),
    f"{_AWS}internal": ("true", "0.0.0.0/0"),
    f"{_AWS}scheme": ("internal",),
}


def exposure(values: Values) -> Iterator[Problem]:
    """Load balancers in front of the gateway and of the models."""
    if values.get("gateway_enabled") is not False:
        yield from _balancer(values)
        yield from _service(values, "gateway")
    yield from _service(values, "rayservice")


def _balancer(values: Values) -> Iterator[Problem]:
    given = values.get("gateway_load_balancer")
    if not isinstance(given, Mapping) or not given:
        return
    where, kind = "gateway_load_balancer", given.get("type")
    if kind is None:
        yield Problem(f"{where}.type", ABSENT, "it is not said which load balancer is meant", "write nlb or alb")
    if values.get("platform") in ("gcp", "azure"):
        reason = "load balancers of this kind are AWS's"
        yield Problem(where, dict(given), reason, "take it out, and use gateway_service_type LoadBalancer")
    elif values.get("load_balancer_controller_enabled") is False:
        # Where there is an IAM role and no controller of ours, somebody else installs it.
        elsewhere = values.get("platform") == "existing" or values.get("eks_load_balancer_controller") is True
        yield Problem(
            where,
            dict(given),
            "nothing makes the load balancer: the AWS Load Balancer Controller is not installed here",
            f"set {'load_balancer_controller_enabled' if elsewhere else 'eks_load_balancer_controller'} to true"
            + (", unless the cluster has it" if elsewhere else ""),
            warning=elsewhere,
        )
    certificate, public = given.get("certificate_arn"), given.get("scheme") == "internet-facing"
    if certificate:
        yield from _certificate(values, f"{where}.certificate_arn", certificate)
    elif public:
        cure = "name a certificate of ACM in certificate_arn, or set scheme to internal"
        yield Problem(f"{where}.scheme", given["scheme"], f"it is plain HTTP: {_PLAIN}", cure)
    else:
        reason = "it is plain HTTP: keys and prompts are readable to whoever sees the VPC's traffic"
        yield Problem(f"{where}.certificate_arn", ABSENT, reason, "name a certificate of ACM", warning=True)
    yield from cidr_problems(f"{where}.allowed_cidrs", given.get("allowed_cidrs"), ipv6=True)
    idle = given.get("idle_timeout_s")
    if idle is None or not isinstance(kind, str) or kind not in _IDLE:
        return
    low, high = _IDLE[kind]
    if kind == "nlb" and certificate:
        reason = "AWS fixes it at 350 s for TLS on a network load balancer"
        yield Problem(f"{where}.idle_timeout_s", idle, reason, "take it out, or set type to alb")
    elif whole(idle) and not low <= idle <= high:
        yield Problem(f"{where}.idle_timeout_s", idle, f"AWS takes {low} to {high} s here", f"write {high} at most")


def _certificate(values: Values, where: str, arn: Any) -> Iterator[Problem]:
    found = _CERTIFICATE.fullmatch(arn) if isinstance(arn, str) else None
    region = values.get("platform_region")
    if found is None:
        form = f"arn:aws:acm:{region}:123456789012:certificate/..."
        reason = "this is no ARN of a certificate in ACM"
        yield Problem(where, arn, reason, f"write it as ACM shows it ({form}); import one of IAM's into ACM first")
    elif values.get("platform") == "aws" and isinstance(region, str) and found["region"] != region:
        reason = f"the certificate is in {found['region']}, and a load balancer takes those of its own region, {region}"
        yield Problem(where, arn, reason, f"request or import it in {region}")


def _service(values: Values, role: str) -> Iterator[Problem]:
    """A load balancer that the cloud makes of the role's own Service."""
    variable, given = f"{role}_service_type", values.get(f"{role}_service_annotations")
    if values.get(variable) != "LoadBalancer" or not (given is None or isinstance(given, Mapping)):
        return
    told = {str(key): str(value) for key, value in (given or {}).items()}
    certificates = [arn.strip() for arn in told.get(f"{_AWS}ssl-cert", "").split(",") if arn.strip()]
    for arn in certificates:
        yield from _certificate(values, f"{role}_service_annotations.{_AWS}ssl-cert", arn)
    ports = [port.strip() for port in told.get(f"{_AWS}ssl-ports", "*").split(",")]
    if certificates and {"*", "http", "8000"} & set(ports):
        return
    # The controller's own default is internal; without it, AWS's is the internet.
    controlled = told.get(f"{_AWS}type") in ("external", "nlb-ip") and f"{_AWS}scheme" not in told
    if controlled or any(told.get(key, "").lower() in words for key, words in _INTERNAL.items()):
        reason = "it is plain HTTP: keys and prompts are readable to whoever sees the network's traffic"
        warning = True
    else:
        # What another cluster makes of it, only its owner knows.
        warning = values.get("platform") == "existing"
        reason = f"where the load balancer is reached from the internet, {_PLAIN}" if warning else _plain_public(role)
    cure = (
        "set it to ClusterIP and give gateway_load_balancer a certificate"
        if values.get("platform") == "aws"
        else "put something with TLS before it, or keep the load balancer internal by its annotation"
    )
    yield Problem(variable, "LoadBalancer", reason, cure, warning=warning)


def _plain_public(role: str) -> str:
    """Why a public load balancer of a role's Service is refused."""
    also = "; the models' own port asks for no key, either" if role == "rayservice" else ""
    return f"the cloud makes a public load balancer with plain HTTP of it: {_PLAIN}{also}"
