"""Who reaches an API server: declared rules, this machine's own address, and why a connection fails."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.module_utils.kube import reach
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import ApiError, KubeError
from ansible_collections.rayplane.platform.plugins.modules import eks_cluster, k8s_api_probe
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import access
from aws_fake import Clock, FakeClient
from conftest import connection_to
from test_preflight_rules import found
from test_preflight_surroundings import answering

OPEN = {"eks_endpoint_public_access": True, "eks_endpoint_private_access": True}
PRIVATE = {"eks_endpoint_public_access": False, "eks_endpoint_private_access": True}
CIDRS = "eks_endpoint_public_cidrs"


@pytest.mark.parametrize(
    ("changes", "variable", "text"),
    [
        ({**OPEN, CIDRS: ["8.8.8.8/32", "2600:1f14::/36"]}, "", ""),
        ({**OPEN, CIDRS: ["0.0.0.0/0"]}, f"{CIDRS}[0]", "open to the internet"),
        ({**OPEN, CIDRS: ["::/0"]}, f"{CIDRS}[0]", "open to the internet"),
        ({**OPEN, CIDRS: ["8.8.8.8/32", "0.0.0.0/1"]}, f"{CIDRS}[1]", "open to the internet"),
        ({**OPEN, CIDRS: ["0.0.0.0/0"], "platform_environment": "dev"}, "", ""),
        ({**OPEN, CIDRS: ["10.1.0.0/16"]}, f"{CIDRS}[0]", "reserved"),
        ({**OPEN, CIDRS: ["203.0.113.7/32"]}, f"{CIDRS}[0]", "reserved"),
        ({**OPEN, CIDRS: ["8.8.8.8/24"]}, f"{CIDRS}[0]", "write 8.8.8.0/24"),
        ({**OPEN, CIDRS: [f"8.8.{n}.0/24" for n in range(41)]}, CIDRS, "at most 40"),
        ({**OPEN, CIDRS: ["8.8.8.8/32"], "eks_endpoint_private_access": False}, "eks_endpoint_private_access", "NAT"),
        ({**PRIVATE, "eks_endpoint_private_access": False}, "eks_endpoint_private_access", "nobody"),
        ({**PRIVATE, "eks_endpoint_private_cidrs": ["corp"]}, "eks_endpoint_private_cidrs[0]", "no CIDR block"),
        # The security group's rules are of IPv4.
        ({**PRIVATE, "eks_endpoint_private_cidrs": ["fd00::/8"]}, "eks_endpoint_private_cidrs[0]", "no CIDR block"),
        ({**OPEN, CIDRS: "0.0.0.0/0"}, "", ""),
        ({"eks_creator_is_admin": False, "eks_access_entries": []}, "eks_access_entries", "nobody may deploy"),
        (
            {
                "eks_creator_is_admin": False,
                "eks_access_entries": [
                    {"principal_arn": "arn:x", "policies": [{"policy": "AmazonEKSClusterAdminPolicy"}]}
                ],
            },
            "",
            "",
        ),
    ],
)
def test_access_as_declared(changes: dict[str, Any], variable: str, text: str) -> None:
    told = found(**{"platform_environment": "prod", **changes})
    problems = {name: problem for name, problem in told.items() if not problem.warning}
    assert list(problems) == ([variable] if variable else [])
    for problem in problems.values():
        assert text in f"{problem.reason}; {problem.cure}"


def test_private_only_is_told_with_the_way_to_deploy() -> None:
    problem = found(**PRIVATE)["eks_endpoint_public_access"]
    assert problem.warning and "--tags cloud from anywhere" in problem.cure


@pytest.mark.parametrize(
    ("cidrs", "body", "warning", "text"),
    [
        ([], "198.51.100.7\n", False, '-e \'{"eks_endpoint_public_cidrs": ["198.51.100.7/32"]}\''),
        ([], "2001:db8::7", False, "2001:db8::7/128"),
        ([], "<html>no</html>", False, "such as 203.0.113.7/32"),
        (["8.8.8.8/32"], "198.51.100.7", True, "add 198.51.100.7/32"),
        (["8.8.8.8/32"], "no", None, ""),
        (["198.51.100.0/24"], "198.51.100.7", None, ""),
        (["0.0.0.0/0"], "198.51.100.7", None, ""),
    ],
)
def test_this_machine_s_address_is_the_cure(cidrs: list[str], body: str, warning: bool | None, text: str) -> None:
    with answering(200, body, "text/plain") as url:
        problems = list(access.check_own_address({**OPEN, CIDRS: cidrs, "platform_address_url": url}))
    assert [problem.warning for problem in problems] == ([] if warning is None else [warning])
    assert all(text in problem.cure for problem in problems)


def test_nobody_is_asked_where_no_service_is_named() -> None:
    assert reach.own_address("") == ""
    assert reach.own_address("http://127.0.0.1:9/") == ""


def caused(cause: BaseException) -> KubeError:
    error = KubeError("the API server does not answer")
    error.__cause__ = cause
    return error


def refused() -> KubeError:
    return caused(ConnectionRefusedError(111, "Connection refused"))


def late() -> KubeError:
    return caused(TimeoutError("timed out"))


@pytest.mark.parametrize(
    ("error", "settings", "seen", "words"),
    [
        (late, {"endpointPublicAccess": False}, ("192.168.1.5", ""), ("endpoint is private", "192.168.1.5")),
        (late, {"endpointPublicAccess": False}, ("10.0.3.4", ""), ("is inside", "security group")),
        (refused, {"publicAccessCidrs": ["8.8.8.0/24"]}, ("192.168.1.5", "9.9.9.9"), ("add 9.9.9.9/32",)),
        (late, {"publicAccessCidrs": ["9.9.9.0/24"]}, ("192.168.1.5", "9.9.9.9"), ("holds this machine", "firewalls")),
        (late, {"publicAccessCidrs": ["9.9.9.0/24"]}, ("", ""), ("could not be compared",)),
        (lambda: caused(socket.gaierror(-2, "Name or service not known")), {}, ("", ""), ("does not resolve",)),
        (lambda: caused(ssl.SSLError("unknown CA")), {}, ("", ""), ("certificate", "proxy")),
        (lambda: ApiError("GET", "/api", 401, {}), {}, ("", ""), ("access entry", "eks_access_entries")),
        (lambda: ApiError("GET", "/api", 503, {}), {}, ("", ""), ("answers 503",)),
    ],
)  # fmt: skip
def test_why_it_is_not_reached(
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], KubeError],
    settings: dict[str, Any],
    seen: tuple[str, str],
    words: tuple[str, ...],
) -> None:
    source, address = seen
    monkeypatch.setattr(reach, "source_address", lambda _: source)
    monkeypatch.setattr(reach, "own_address", lambda _: address)
    told = reach.explain("https://a.eks.amazonaws.com", error(), settings, ["10.0.0.0/16"], "")
    for word in words:
        assert word in told


def test_a_real_refusal_is_known_and_ends_the_stage_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = "https://127.0.0.1:9"
    cluster = {"name": "c1", "endpoint": server, "resourcesVpcConfig": {"endpointPublicAccess": False}}
    eks = FakeClient("eks", describe_cluster=lambda **_: {"cluster": cluster})
    params = {"cluster_name": "c1", "servers": [], "required": True, "client_cidrs": ["10.0.0.0/16"], "address_url": ""}
    monkeypatch.setattr(k8s_api_probe, "connection_from_environment", lambda: connection_to(server))
    module = SimpleNamespace(params=params, client=lambda _: eks)
    with pytest.raises(PlatformError, match=r"cluster c1: https://127.0.0.1:9 refuses the connection: the endpoint is"):
        k8s_api_probe.reconcile(module, Changes(False))
    assert clock.now == 0
    cluster["endpoint"] = server = "https://name.invalid"
    with pytest.raises(PlatformError, match=r"name\.invalid does not resolve"):
        k8s_api_probe.reconcile(module, Changes(False))
    assert clock.now > 0


class Group:
    """The security group that EKS made."""

    def __init__(self, **rules: str) -> None:
        self.rules = {cidr.replace("_", "."): description for cidr, description in rules.items()}
        self.ec2 = FakeClient(
            "ec2",
            describe_security_groups=self.describe,
            authorize_security_group_ingress=lambda IpPermissions, **_: self.rules.update(  # noqa: N803
                {one["CidrIp"]: one["Description"] for one in IpPermissions[0]["IpRanges"]}
            ),
            revoke_security_group_ingress=lambda IpPermissions, **_: [  # noqa: N803
                self.rules.pop(one["CidrIp"]) for one in IpPermissions[0]["IpRanges"]
            ],
        )

    def describe(self, **_: Any) -> dict[str, Any]:
        ranges = [{"CidrIp": cidr, "Description": text} for cidr, text in self.rules.items()]
        own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-1"}]}
        permission = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": ranges}
        return {"SecurityGroups": [{"GroupId": "sg-1", "IpPermissions": [own, permission]}]}


@pytest.mark.parametrize(
    ("rules", "cidrs", "after"),
    [
        ({}, ["10.0.0.0/16"], {"10.0.0.0/16"}),
        ({"10.0.0.0/16": "another's"}, ["10.0.0.0/16"], {"10.0.0.0/16"}),
        ({"10.9.0.0/16": eks_cluster.CLIENT_RULE, "10.8.0.0/16": "another's"}, [], {"10.8.0.0/16"}),
    ],
)
def test_the_private_endpoint_admits_its_clients(rules: dict[str, str], cidrs: list[str], after: set[str]) -> None:
    group = Group(**rules)
    now = {"resourcesVpcConfig": {"clusterSecurityGroupId": "sg-1"}}
    params = {"name": "c1", "tags": {}, "security_group_tags": {}, "private_access_cidrs": cidrs}
    params |= {"private_access_vpc": False}
    for check in (True, False, False):
        changes = Changes(check)
        cluster = eks_cluster.Cluster(
            params, Api(FakeClient("eks"), changes), changes, lambda _, c=changes: Api(group.ec2, c)
        )
        before = dict(group.rules)
        cluster._keep_security_group(now)
        assert not check or group.rules == before
    assert set(group.rules) == after
    assert changes.actions == []
