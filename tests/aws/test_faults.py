"""What goes wrong at AWS and on the way there: it is repeated and the run succeeds, or explained, and nothing is lost.

Every case is a host with an account of its own; all of them run side by side: with the fault, without it, and,
where the first run failed, once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from .account import Account
from .conftest import ROOT, Playbook, Run
from .faults import Proxy, Rule

RETRIED = ""


@dataclass
class Case:
    """A role, what is injected, and what the first run has to say (RETRIED: nothing, it succeeds)."""

    role: str
    name: str
    rules: list[Rule]
    says: str = RETRIED
    account: Account = field(default=None)  # type: ignore[assignment]

    @property
    def host(self) -> str:
        """Its host, which is its cluster, too."""
        return f"{self.role}-{self.name}"


def _error(service: str, operation: str, code: str, status: int = 400, message: str = "no", **more: Any) -> Rule:
    return Rule(service, operation, "error", code, status, message, **more)


def _network() -> list[Case]:
    def case(name: str, says: str, *rules: Rule) -> Case:
        return Case("network", name, list(rules), says)

    ec2 = "ec2"
    lost = {
        "vpc": "CreateVpc",
        "subnet": "CreateSubnet",
        "gateway": "CreateInternetGateway",
        "address": "AllocateAddress",
        "nat": "CreateNatGateway",
        "table": "CreateRouteTable",
        "endpoint": "CreateVpcEndpoint",
        "group": "CreateSecurityGroup",
        "route": "CreateRoute",
        "association": "AssociateRouteTable",
    }
    return [
        case("plain", RETRIED),
        case("throttled", RETRIED, _error(ec2, "CreateVpc", "RequestLimitExceeded", 503, times=2)),
        case("throttled-reading", RETRIED, _error(ec2, "DescribeVpcs", "Throttling", times=2)),
        case(
            "throttled-for-good",
            "ec2:CreateSubnet failed for subnet .*RequestLimitExceeded.* run again later",
            _error(ec2, "CreateSubnet", "RequestLimitExceeded", 503, times=99),
        ),
        case(
            "denied",
            "ec2:CreateNatGateway failed for NAT gateway .*the permission ec2:CreateNatGateway.*decode-authorization",
            _error(ec2, "CreateNatGateway", "UnauthorizedOperation", 403, "Encoded authorization failure message: x"),
        ),
        case(
            "quota-vpc",
            "ec2:CreateVpc failed for VPC network-quota-vpc: VpcLimitExceeded.*L-F678F1CE",
            _error(ec2, "CreateVpc", "VpcLimitExceeded"),
        ),
        case(
            "quota-address",
            "ec2:AllocateAddress failed for address .*AddressLimitExceeded.*network_nat_mode",
            _error(ec2, "AllocateAddress", "AddressLimitExceeded"),
        ),
        case(
            "quota-nat",
            "NatGatewayLimitExceeded.*network_nat_mode",
            _error(ec2, "CreateNatGateway", "NatGatewayLimitExceeded"),
        ),
        case(
            "quota-endpoint",
            "VpcEndpointLimitExceeded.*network_interface_endpoints",
            _error(ec2, "CreateVpcEndpoint", "VpcEndpointLimitExceeded", skip=1),
        ),
        case("unsettled-vpc", RETRIED, _error(ec2, "CreateSubnet", "InvalidVpcID.NotFound", times=2)),
        case("unsettled-subnet", RETRIED, _error(ec2, "AssociateRouteTable", "InvalidSubnetID.NotFound", times=2)),
        case("unsettled-nat", RETRIED, _error(ec2, "CreateRoute", "InvalidNatGatewayID.NotFound", times=2)),
        case("internal", RETRIED, _error(ec2, "CreateInternetGateway", "InternalError", 500)),
        case("unavailable", RETRIED, _error(ec2, "AllocateAddress", "Unavailable", 503)),
        case("reset", RETRIED, Rule(ec2, "CreateVpc", "reset"), Rule(ec2, "DescribeVpcs", "reset")),
        case("hang", RETRIED, Rule(ec2, "CreateSubnet", "hang")),
        case("garbage", RETRIED, Rule(ec2, "CreateVpc", "garbage"), Rule(ec2, "DescribeVpcs", "garbage")),
        case(
            "garbage-for-good",
            "ec2:DescribeVpcs failed .*what answered is not AWS",
            Rule(ec2, "DescribeVpcs", "garbage", times=99),
        ),
        case(
            "reset-for-good",
            "ec2:CreateVpc failed for VPC .*run again; what was made is found",
            Rule(ec2, "CreateVpc", "reset", times=99),
        ),
        *(case(f"lost-{name}", RETRIED, Rule(ec2, operation, "lost")) for name, operation in lost.items()),
    ]


def _storage() -> list[Case]:
    def case(name: str, says: str, *rules: Rule) -> Case:
        return Case("storage", name, list(rules), says)

    return [
        case("plain", RETRIED),
        case("slow-down", RETRIED, _error("s3", "PutBucketVersioning", "SlowDown", 503, times=2)),
        case(
            "denied",
            "s3:PutBucketPolicy failed for bucket .*AccessDenied.*the permission s3:PutBucketPolicy",
            _error("s3", "PutBucketPolicy", "AccessDenied", 403),
        ),
        case("unsettled", RETRIED, _error("s3", "PutBucketVersioning", "NoSuchBucket", 404)),
        case("conflict", RETRIED, _error("s3", "CreateBucket", "OperationAborted", 409)),
        case("taken", "bucket .*choose another name", _error("s3", "CreateBucket", "BucketAlreadyExists", 409)),
        case("internal", RETRIED, _error("s3", "PutBucketEncryption", "InternalError", 500)),
        case("lost", RETRIED, Rule("s3", "CreateBucket", "lost")),
    ]


def _eks() -> list[Case]:
    def case(name: str, says: str, *rules: Rule) -> Case:
        return Case("eks", name, list(rules), says)

    role = "The role with arn arn:aws:iam::1:role/x could not be assumed"
    invalid = "InvalidParameterException"
    zones = {"validZones": ["us-west-2a", "us-west-2d"]}
    return [
        case("plain", RETRIED),
        case("throttled", RETRIED, _error("eks", "CreateNodegroup", "TooManyRequestsException", 429, times=2)),
        case("throttled-role", RETRIED, _error("iam", "CreateRole", "Throttling", times=2)),
        case("unsettled-role", RETRIED, _error("eks", "CreateCluster", invalid, 400, role, times=2)),
        case("unsettled-policy", RETRIED, _error("iam", "AttachRolePolicy", "NoSuchEntity", 404, times=2)),
        case("updating", RETRIED, _error("eks", "CreateAddon", "ResourceInUseException", 409, "Update in progress")),
        case(
            "quota",
            "eks:CreateCluster failed for cluster eks-quota: ResourceLimitExceededException.*Service Quotas",
            _error("eks", "CreateCluster", "ResourceLimitExceededException"),
        ),
        case(
            "zone",
            "UnsupportedAvailabilityZoneException.*us-west-2d.*network_availability_zones",
            _error("eks", "CreateCluster", "UnsupportedAvailabilityZoneException", 400, "zone", extra=zones),
        ),
        case(
            "denied",
            "eks:CreateAddon failed for add-on .*the permission eks:CreateAddon",
            _error("eks", "CreateAddon", "AccessDeniedException", 403),
        ),
        case("garbage", RETRIED, Rule("eks", "DescribeCluster", "garbage")),
        case("lost-role", RETRIED, Rule("iam", "CreateRole", "lost")),
        case("lost-cluster", RETRIED, Rule("eks", "CreateCluster", "lost")),
        case("lost-nodes", RETRIED, Rule("eks", "CreateNodegroup", "lost")),
        case("lost-addon", RETRIED, Rule("eks", "CreateAddon", "lost")),
        case("internal", RETRIED, _error("eks", "CreateNodegroup", "ServerException", 500)),
    ]


CASES = [*_network(), *_storage(), *_eks()]


@dataclass
class Runs:
    """The three runs of all cases."""

    faulty: Run
    repaired: Run
    again: Run


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    new_account: Callable[[], Account],
    proxy: Proxy,
    playbook: Playbook,
) -> Runs:
    """Run all cases side by side."""
    folder = tmp_path_factory.mktemp("faults")
    hosts = {}
    for case in CASES:
        case.account = new_account()
        hosts[case.host] = {**case.account.environment, "case_role": case.role, "platform_cluster_name": case.host}
        for rule in case.rules:
            rule.account = case.account.number
            proxy.rules.append(rule)
    (folder / "group_vars" / "all").mkdir(parents=True)
    (folder / "group_vars" / "all" / "00_shared.yml").symlink_to(ROOT / "group_vars" / "shared.yml")
    inventory = {
        "clusters": {
            "hosts": hosts,
            "vars": {
                "platform": "aws",
                "ansible_connection": "local",
                "ansible_python_interpreter": "{{ ansible_playbook_python }}",
                "network_availability_zones": ["us-west-2a", "us-west-2b"],
                "network_interface_endpoints": ["sts"],
                "eks_subnet_ids": ["subnet-1", "subnet-2"],
                "eks_addons": [{"name": "coredns"}],
                "network_vpc_id": "vpc-1",
            },
        }
    }
    (folder / "hosts").write_text(yaml.safe_dump(inventory))
    tasks = [{"name": "Run the role", "ansible.builtin.include_role": {"name": "{{ case_role }}"}}]
    play = {
        "name": "Run a role a host",
        "hosts": "clusters",
        "gather_facts": False,
        "strategy": "free",
        "environment": "{{ platform_module_environment }}",
        "tasks": tasks,
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))

    def run(*limit: str) -> Run:
        return playbook(str(folder / "play.yml"), "-i", str(folder / "hosts"), "--forks", "8", *limit)

    faulty = run()
    assert faulty.report, faulty.text[-3000:]
    proxy.rules.clear()
    # What succeeded has its second run in the second already.
    failed = ",".join(case.host for case in CASES if case.says != RETRIED)
    return Runs(faulty, run(), run("--limit", failed))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.host)
def test_a_fault_is_survived_or_explained(case: Case, runs: Runs) -> None:
    assert all(rule.hits > rule.skip for rule in case.rules), "the fault was never met"
    failure = runs.faulty.failure(case.host)
    if case.says == RETRIED:
        assert failure == ""
    else:
        assert re.search(case.says, failure, re.DOTALL), failure
        assert "Cure: " in failure or "choose another name" in failure
    assert runs.repaired.failure(case.host) == ""
    second = runs.repaired if case.says == RETRIED else runs.again
    assert second.failure(case.host) == ""
    assert second.actions(case.host) == []
    assert second.changed(case.host) == 0
    plain = next(one for one in CASES if one.host == f"{case.role}-plain")
    assert case.account.counts() == plain.account.counts()


def test_what_a_user_sees_is_one_sentence(runs: Runs) -> None:
    for case in CASES:
        assert "Traceback" not in runs.faulty.failure(case.host), case.host
