"""What goes wrong at AWS and on the way there: it is repeated and the run succeeds, or explained, and nothing is lost.

Every case is a host with an account of its own; all of them run side by side: with the fault, without it, and,
where the first run failed, once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from .account import Account
from .conftest import Playbook, Run
from .faults import Proxy, Rule

RETRIED = ""
BROKEN: tuple[Literal["reset", "garbage"], ...] = ("reset", "garbage")


@dataclass
class Case:
    """A role, what is injected, and what the first run has to say (RETRIED: nothing, it succeeds)."""

    role: str
    name: str
    rules: list[Rule] = field(default_factory=list)
    says: str = RETRIED
    #: Patience of the SDK and of our own, where what goes wrong is to go on.
    environment: dict[str, str] = field(default_factory=dict)
    account: Account = field(default=None)  # type: ignore[assignment]

    @property
    def host(self) -> str:
        """Its host, which is its cluster, too."""
        return f"rp-{self.role}-{self.name}"


def _error(service: str, operation: str, code: str, status: int = 400, **more: Any) -> Rule:
    return Rule(service, operation, "error", code, status, **more)


EC2_CREATIONS = (
    *("CreateVpc", "CreateSubnet", "CreateInternetGateway", "AllocateAddress", "CreateNatGateway", "CreateRouteTable"),
    *("CreateVpcEndpoint", "CreateSecurityGroup", "CreateRoute", "AssociateRouteTable"),
)
EKS_CREATIONS = (("iam", "CreateRole"), ("eks", "CreateCluster"), ("eks", "CreateNodegroup"), ("eks", "CreateAddon"))
ENCODED = "Encoded authorization failure message: x"
UNASSUMABLE = "The role with arn arn:aws:iam::1:role/x could not be assumed"

#: What is survived shares a host a role; what ends a run has one of its own. The codes of errors and the creations that
#: are not met here are those of tests/unit/test_rayplane_aws.py.
CASES = [
    Case("network", "plain"),
    Case(
        "network",
        "errors",
        [
            _error("ec2", "CreateVpc", "RequestLimitExceeded", 503, times=2),
            _error("ec2", "DescribeVpcs", "Throttling", times=2),
            _error("ec2", "CreateSubnet", "InvalidVpcID.NotFound", times=2),
            _error("ec2", "AssociateRouteTable", "InvalidSubnetID.NotFound", times=2),
            _error("ec2", "CreateRoute", "InvalidNatGatewayID.NotFound", times=2),
            _error("ec2", "CreateInternetGateway", "InternalError", 500),
            _error("ec2", "AllocateAddress", "Unavailable", 503),
        ],
    ),
    Case(
        "network",
        "broken",
        [
            *(Rule("ec2", operation, fault) for operation in ("CreateVpc", "DescribeVpcs") for fault in BROKEN),
            Rule("ec2", "CreateSubnet", "hang"),
        ],
        environment={"RAYPLANE_AWS_READ_TIMEOUT": "5"},
    ),
    Case("network", "lost", [Rule("ec2", operation, "lost") for operation in EC2_CREATIONS]),
    Case(
        "network",
        "throttled-for-good",
        [_error("ec2", "CreateSubnet", "RequestLimitExceeded", 503, times=99)],
        "ec2:CreateSubnet failed for subnet .*RequestLimitExceeded.* run again later",
        {"AWS_MAX_ATTEMPTS": "2"},
    ),
    Case(
        "network",
        "garbage-for-good",
        [Rule("ec2", "DescribeVpcs", "garbage", times=99)],
        "ec2:DescribeVpcs failed .*what answered is not AWS",
    ),
    Case(
        "network",
        "reset-for-good",
        [Rule("ec2", "CreateVpc", "reset", times=99)],
        "ec2:CreateVpc failed for VPC .*run again; what was made is found",
        {"AWS_MAX_ATTEMPTS": "2", "RAYPLANE_AWS_SETTLE": "1"},
    ),
    Case(
        "network",
        "denied",
        [_error("ec2", "CreateNatGateway", "UnauthorizedOperation", 403, message=ENCODED)],
        "ec2:CreateNatGateway failed for NAT gateway .*the permission ec2:CreateNatGateway.*decode-authorization",
    ),
    Case(
        "network",
        "quota",
        [_error("ec2", "AllocateAddress", "AddressLimitExceeded")],
        "ec2:AllocateAddress failed for address .*AddressLimitExceeded.*network_nat_mode",
    ),
    Case("storage", "plain"),
    Case(
        "storage",
        "errors",
        [
            _error("s3", "CreateBucket", "OperationAborted", 409),
            Rule("s3", "CreateBucket", "lost"),
            _error("s3", "PutBucketVersioning", "SlowDown", 503, times=2),
            _error("s3", "PutBucketVersioning", "NoSuchBucket", 404),
            _error("s3", "PutBucketEncryption", "InternalError", 500),
        ],
    ),
    Case(
        "storage",
        "denied",
        [_error("s3", "PutBucketPolicy", "AccessDenied", 403)],
        "s3:PutBucketPolicy failed for bucket .*AccessDenied.*the permission s3:PutBucketPolicy",
    ),
    Case(
        "storage",
        "taken",
        [_error("s3", "CreateBucket", "BucketAlreadyExists", 409)],
        "bucket .*choose another name",
    ),
    Case("eks", "plain"),
    Case(
        "eks",
        "errors",
        [
            _error("iam", "CreateRole", "Throttling", times=2),
            _error("iam", "AttachRolePolicy", "NoSuchEntity", 404, times=2),
            _error("eks", "CreateCluster", "InvalidParameterException", message=UNASSUMABLE, times=2),
            Rule("eks", "DescribeCluster", "garbage"),
            _error("eks", "CreateNodegroup", "TooManyRequestsException", 429, times=2),
            _error("eks", "CreateNodegroup", "ServerException", 500),
            _error("eks", "CreateAddon", "ResourceInUseException", 409, message="Update in progress"),
        ],
    ),
    Case("eks", "lost", [Rule(service, operation, "lost") for service, operation in EKS_CREATIONS]),
    Case(
        "eks",
        "denied",
        [_error("eks", "CreateAddon", "AccessDeniedException", 403)],
        "eks:CreateAddon failed for add-on .*the permission eks:CreateAddon",
    ),
    Case(
        "eks",
        "quota",
        [_error("eks", "CreateCluster", "ResourceLimitExceededException")],
        "eks:CreateCluster failed for cluster rp-eks-quota: ResourceLimitExceededException.*Service Quotas",
    ),
]


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
        hosts[case.host] = {
            **case.account.environment,
            "platform_cluster_name": case.host,
            "eks_subnet_ids": [one["SubnetId"] for one in case.account.ec2.describe_subnets()["Subnets"]][:2],
            "case_role": case.role,
            "case_environment": case.environment,
        }
        for rule in case.rules:
            rule.account, rule.hits = case.account.number, 0
            proxy.rules.append(rule)
    folder.mkdir(exist_ok=True)
    inventory = {
        "clusters": {
            "hosts": hosts,
            "vars": {
                "platform": "aws",
                "ansible_connection": "local",
                "ansible_python_interpreter": "{{ ansible_playbook_python }}",
                "network_availability_zones": ["us-west-2a", "us-west-2b"],
                "network_interface_endpoints": ["sts"],
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
        "environment": "{{ platform_module_environment | combine(case_environment) }}",
        "roles": ["platform"],
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
    missed = [rule for rule in case.rules if rule.hits < (rule.times if case.says == RETRIED else 1)]
    failure = runs.faulty.failure(case.host)
    assert not missed, f"never met: {missed} {failure}"
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
    plain = next(one for one in CASES if one.host == f"rp-{case.role}-plain")
    assert case.account.counts() == plain.account.counts()


def test_what_a_user_sees_is_one_sentence(runs: Runs) -> None:
    for case in CASES:
        assert "Traceback" not in runs.faulty.failure(case.host), case.host
