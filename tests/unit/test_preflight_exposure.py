"""Preflight's rules of how clients reach the platform: TLS on the internet, certificates, the controller."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.exposure import exposure

ARN = "arn:aws:acm:us-west-2:123456789012:certificate/0f3c2d1e-aaaa-bbbb-cccc-123456789abc"
AWS = "service.beta.kubernetes.io/aws-load-balancer-"
GOOD = {"type": "nlb", "scheme": "internet-facing", "certificate_arn": ARN}


def found(**changes: Any) -> dict[str, tuple[bool, str]]:
    """Whether each variable with a problem is only warned of, and why."""
    values = {
        "platform": "aws",
        "platform_region": "us-west-2",
        "load_balancer_controller_enabled": True,
        "gateway_load_balancer": {},
        "gateway_service_type": "ClusterIP",
        "rayservice_service_type": "ClusterIP",
        **changes,
    }
    return {problem.variable: (problem.warning, problem.reason) for problem in exposure(values)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gateway_load_balancer": GOOD},
        {"gateway_load_balancer": {**GOOD, "type": "alb", "idle_timeout_s": 4000, "allowed_cidrs": ["10.0.0.0/8"]}},
        {"gateway_load_balancer": {"type": "nlb", "scheme": "internet-facing"}, "gateway_enabled": False},
        {"gateway_service_type": "LoadBalancer", "gateway_service_annotations": {f"{AWS}ssl-cert": ARN}},
        {"gateway_load_balancer": "nlb"},
    ],
)
def test_good_values_have_no_problem(changes: dict[str, Any]) -> None:
    assert found(**changes) == {}


@pytest.mark.parametrize(
    ("balancer", "field", "reason"),
    [
        ({"type": "alb", "scheme": "internet-facing"}, "scheme", "plain text"),
        ({"scheme": "internet-facing", "certificate_arn": ARN}, "type", "which load balancer"),
        ({**GOOD, "certificate_arn": "my-certificate"}, "certificate_arn", "no ARN"),
        ({**GOOD, "certificate_arn": "arn:aws:iam::123456789012:server-certificate/x"}, "certificate_arn", "no ARN"),
        ({**GOOD, "certificate_arn": ARN.replace("us-west-2", "us-east-1")}, "certificate_arn", "is in us-east-1"),
        ({**GOOD, "allowed_cidrs": ["10.0.0.0/8", "10.0.0.1/8"]}, "allowed_cidrs[1]", "host bits"),
        ({**GOOD, "idle_timeout_s": 600}, "idle_timeout_s", "350 s"),
        ({**GOOD, "type": "alb", "idle_timeout_s": 5000}, "idle_timeout_s", "1 to 4000"),
    ],
)
def test_problems_of_the_load_balancer(balancer: dict[str, Any], field: str, reason: str) -> None:
    [(variable, (warning, said))] = found(gateway_load_balancer=balancer).items()
    assert (variable, warning) == (f"gateway_load_balancer.{field}", False)
    assert reason in said


def test_plain_http_inside_is_a_warning() -> None:
    assert found(gateway_load_balancer={"type": "nlb"})["gateway_load_balancer.certificate_arn"][0] is True


@pytest.mark.parametrize(("platform", "warning"), [("aws", False), ("gcp", False), ("existing", True)])
def test_nothing_else_makes_the_load_balancer(platform: str, warning: bool) -> None:
    problems = found(platform=platform, gateway_load_balancer=GOOD, load_balancer_controller_enabled=False)
    assert problems["gateway_load_balancer"][0] is warning


def test_a_controller_of_somebody_elses_makes_the_load_balancer() -> None:
    problems = found(
        gateway_load_balancer=GOOD, load_balancer_controller_enabled=False, eks_load_balancer_controller=True
    )
    assert problems["gateway_load_balancer"][0] is True


@pytest.mark.parametrize(
    ("platform", "annotations", "warning"),
    [
        ("aws", {}, False),
        ("aws", {f"{AWS}scheme": "internet-facing"}, False),
        ("aws", {f"{AWS}type": "external", f"{AWS}scheme": "internet-facing"}, False),
        ("aws", {f"{AWS}ssl-cert": ARN, f"{AWS}ssl-ports": "443"}, False),
        ("aws", {f"{AWS}internal": "false"}, False),
        ("gcp", {}, False),
        ("aws", {f"{AWS}internal": "true"}, True),
        ("aws", {f"{AWS}scheme": "internal"}, True),
        ("aws", {f"{AWS}type": "external"}, True),
        ("gcp", {"networking.gke.io/load-balancer-type": "Internal"}, True),
        ("existing", {}, True),
    ],
)
@pytest.mark.parametrize("role", ["gateway", "rayservice"])
def test_a_service_with_plain_http(role: str, platform: str, annotations: dict[str, str], warning: bool) -> None:
    changes: dict[str, Any] = {f"{role}_service_type": "LoadBalancer", f"{role}_service_annotations": annotations}
    problems = found(platform=platform, **changes)
    assert {variable: told for variable, (told, _) in problems.items()} == {f"{role}_service_type": warning}
