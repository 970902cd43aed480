"""Calls of AWS that fail: what is repeated and for how long, what is looked up, and what a person is told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import botocore.exceptions as errors
import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws import core as rayplane_aws
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    ROLE_TAG,
    Api,
    Changes,
    PlatformError,
    wait_until,
)
from aws_fake import Clock, FakeClient, refusal
from botocore.parsers import ResponseParserError

SPECIFICATION = [
    {
        "ResourceType": "vpc",
        "Tags": [{"Key": OWNER_TAG, "Value": "c1"}, {"Key": ROLE_TAG, "Value": "vpc"}, {"Key": "Name", "Value": "c1"}],
    }
]
OURS = {"VpcId": "vpc-1", "Tags": SPECIFICATION[0]["Tags"]}
LOST = errors.ReadTimeoutError(endpoint_url="http://aws")


def failing(*problems: Exception, then: Any = None) -> Callable[..., Any]:
    """Return an operation that fails with each of these in turn and then answers."""
    left = list(problems)

    def operation(**_: Any) -> Any:
        if left:
            raise left.pop(0)
        return then

    return operation


def api(service: str, check: bool = False, **handlers: Any) -> tuple[Api, FakeClient]:
    client = FakeClient(service, **handlers)
    return Api(client, Changes(check)), client


def test_nothing_is_written_in_check_mode() -> None:
    ec2, client = api("ec2", check=True)
    assert ec2.write("create_vpc", "VPC x", CidrBlock="10.0.0.0/16") is None
    assert client.calls == []


@pytest.mark.parametrize(
    ("service", "operation", "arguments", "error"),
    [
        ("ec2", "create_subnet", {"VpcId": "v", "CidrBlock": "c"}, refusal("InvalidVpcID.NotFound")),
        ("s3", "delete_bucket_policy", {"Bucket": "b" * 3}, refusal("OperationAborted")),
        (
            "iam",
            "create_role",
            {"RoleName": "r", "AssumeRolePolicyDocument": "{}"},
            refusal("MalformedPolicyDocument", "Invalid principal in policy"),
        ),
        (
            "eks",
            "delete_addon",
            {"clusterName": "c", "addonName": "a"},
            refusal("ResourceInUseException", "an update is in progress"),
        ),
    ],
)
def test_what_settles_is_repeated_for_a_while(
    monkeypatch: pytest.MonkeyPatch, service: str, operation: str, arguments: dict[str, Any], error: Exception
) -> None:
    clock = Clock(monkeypatch)
    good, _ = api(service, **{operation: failing(error, error, then={"done": True})})
    assert good.write(operation, "x", **arguments) == {"done": True}
    bad, _ = api(service, **{operation: failing(*[error] * 99)})
    start = clock.now
    with pytest.raises(PlatformError):
        bad.write(operation, "x", **arguments)
    assert 30 <= clock.now - start <= 40


def test_patience_is_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setenv("RAYPLANE_AWS_SETTLE", "2")
    ec2, _ = api("ec2", create_vpc=failing(*[refusal("InvalidX.NotFound")] * 99))
    with pytest.raises(PlatformError):
        ec2.write("create_vpc", "VPC x", CidrBlock="10.0.0.0/16")
    assert clock.now < 4


def test_what_was_just_made_may_be_unknown_and_what_was_not_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    iam, client = api(
        "iam",
        get_role=failing(refusal("NoSuchEntity"), then={"Role": {}}),
        tag_role=lambda **_: {},
    )
    with pytest.raises(PlatformError, match="NoSuchEntity"):
        iam.read("get_role", "role r", RoleName="r")
    client.handlers["get_role"] = failing(refusal("NoSuchEntity"), then={"Role": {}})
    iam.write("tag_role", "role r", RoleName="r", Tags=[])
    assert iam.read("get_role", "role r", RoleName="r") == {"Role": {}}
    client.handlers["get_role"] = failing(refusal("NoSuchEntity"))
    assert iam.read("get_role", "role r", absent=("NoSuchEntity",), RoleName="r") is None


def test_deleting_what_is_gone_succeeds() -> None:
    ec2, _ = api("ec2", delete_vpc=failing(refusal("InvalidVpcID.NotFound")))
    assert ec2.write("delete_vpc", "VPC x", VpcId="vpc-1") == {}
    iam, _ = api("iam", create_service_linked_role=failing(refusal("InvalidInput")))
    assert iam.write("create_service_linked_role", "role x", done=("InvalidInput",), AWSServiceName="a") == {}


def test_a_creation_whose_answer_was_lost_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    others = [{**OURS, "VpcId": "vpc-0", "Tags": []}, {**OURS, "VpcId": "vpc-9", "State": "deleted"}]
    ec2, client = api("ec2", create_vpc=failing(LOST), describe_vpcs=lambda **_: {"Vpcs": [*others, OURS]})
    answer = ec2.write("create_vpc", "VPC c1", CidrBlock="10.0.0.0/16", TagSpecifications=SPECIFICATION)
    assert answer == {"Vpc": OURS}
    assert [name for name, _ in client.writes()] == ["create_vpc"]


def test_a_creation_that_did_not_happen_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    for problem in (LOST, ResponseParserError("<html>")):
        ec2, client = api(
            "ec2", create_vpc=failing(problem, then={"Vpc": OURS}), describe_vpcs=lambda **_: {"Vpcs": []}
        )
        ec2.write("create_vpc", "VPC c1", CidrBlock="10.0.0.0/16", TagSpecifications=SPECIFICATION)
        assert [name for name, _ in client.writes()] == ["create_vpc", "create_vpc"]


def test_a_second_request_for_what_the_first_made_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    repeated = refusal("EntityAlreadyExists")
    repeated.response["ResponseMetadata"] = {"RetryAttempts": 1}
    iam, _ = api("iam", create_role=failing(repeated), get_role=lambda **_: {"Role": {"Arn": "arn:r"}})
    arguments = {"RoleName": "r", "AssumeRolePolicyDocument": "{}"}
    assert iam.write("create_role", "role r", **arguments) == {"Role": {"Arn": "arn:r"}}
    foreign, _ = api("iam", create_role=failing(refusal("EntityAlreadyExists")))
    with pytest.raises(PlatformError, match="choose another"):
        foreign.write("create_role", "role r", **arguments)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (refusal("VpcLimitExceeded"), "ec2:CreateVpc failed for VPC x: VpcLimitExceeded: no. Cure: .*L-F678F1CE"),
        (refusal("AddressLimitExceeded"), "L-0263D0A3.*network_nat_mode"),
        (refusal("NatGatewayLimitExceeded"), "L-FE5A380F.*network_nat_mode"),
        (refusal("VpcEndpointLimitExceeded"), "L-29B6F2EB.*network_interface_endpoints"),
        (refusal("ResourceLimitExceededException"), "Service Quotas"),
        (refusal("FooLimitExceeded"), "Service Quotas"),
        (refusal("RequestLimitExceeded"), "run again later"),
        (refusal("UnauthorizedOperation", "Encoded authorization failure message: abc"), "decode-authorization"),
        (refusal("AccessDenied", "not authorized to perform: iam:PassRole on x"), "the permission iam:PassRole"),
        (refusal("ExpiredToken"), "log in again"),
        (errors.NoCredentialsError(), "NoCredentialsError.*AWS_PROFILE"),
        (errors.SSOTokenLoadError(profile_name="p", error_msg="no"), "aws sso login"),
        (errors.EndpointConnectionError(endpoint_url="http://x"), "platform_aws_endpoint_url"),
        (errors.SSLError(endpoint_url="http://x", error="bad"), "AWS_CA_BUNDLE"),
        (errors.ProxyConnectionError(proxy_url="http://x"), "HTTPS_PROXY"),
        (LOST, "run again; what was made is found and kept"),
        (ResponseParserError("<html>"), "is not AWS"),
    ],
)
def test_errors_name_call_resource_reason_and_cure(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    Clock(monkeypatch)
    ec2, _ = api("ec2", create_vpc=failing(*[error] * 99))
    with pytest.raises(PlatformError, match=told) as failure:
        ec2.write("create_vpc", "VPC x", CidrBlock="10.0.0.0/16")
    assert str(failure.value).startswith("ec2:CreateVpc failed for VPC x: ")
    assert "Cure: " in str(failure.value)


def test_a_permission_is_named_as_iam_names_it() -> None:
    s3, _ = api("s3", put_public_access_block=failing(refusal("AccessDenied")))
    with pytest.raises(PlatformError, match="the permission s3:PutBucketPublicAccessBlock"):
        s3.write(
            "put_public_access_block",
            "bucket b",
            Bucket="bbb",
            PublicAccessBlockConfiguration={"BlockPublicAcls": True},
        )


def test_zones_that_are_offered_are_told() -> None:
    error = refusal("UnsupportedAvailabilityZoneException", "no capacity.")
    error.response["validZones"] = ["us-west-2a", "us-west-2b"]
    eks, _ = api("eks", create_cluster=failing(error))
    with pytest.raises(PlatformError, match=r"us-west-2a, us-west-2b.*network_availability_zones"):
        eks.write("create_cluster", "cluster c", name="c", roleArn="r", resourcesVpcConfig={})


def test_an_answer_without_a_member_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    answers = [{"ResponseMetadata": {}}, {"cluster": {}}]
    eks, _ = api("eks", describe_cluster=lambda **_: answers.pop(0))
    assert eks.read("describe_cluster", "cluster c", name="c") == {"cluster": {}}
    broken, _ = api("ec2", describe_vpcs=lambda **_: {})
    with pytest.raises(PlatformError, match="is not AWS"):
        broken.pages("describe_vpcs", "Vpcs", "c")


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ({"caught_exception": LOST}, False),
        ({"caught_exception": errors.EndpointConnectionError(endpoint_url="http://x")}, None),
        ({"response": (SimpleNamespace(status_code=500), {"Error": {"Code": "InternalError"}})}, False),
        ({"response": (SimpleNamespace(status_code=503), {"Error": {"Code": "RequestLimitExceeded"}})}, None),
        ({"response": (SimpleNamespace(status_code=200), {})}, None),
    ],
)
def test_the_sdk_repeats_no_creation_that_may_have_happened(answer: dict[str, Any], repeats: bool | None) -> None:
    assert rayplane_aws._repeat_by_sdk(**answer) is repeats


def test_waits_begin_short_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    seen: list[float] = []

    def probe() -> tuple[bool, str]:
        seen.append(clock.now)
        return False, "pending"

    with pytest.raises(PlatformError, match="not there after 20 s, last seen: pending"):
        wait_until("it", probe, timeout=20, delay=5)
    assert seen[:4] == [0, 0.5, 1.5, 3.5]
    assert seen[-1] <= 20


def test_a_module_is_given_limits_and_ends_with_the_explanation() -> None:
    class Module:
        check_mode, _name = False, "aws_x"

        def __init__(self) -> None:
            self.params: dict[str, Any] = {"aws_config": {"read_timeout": 7}}
            self.ended: dict[str, Any] = {}

        def fail_json(self, **result: Any) -> None:
            self.ended = result
            raise SystemExit

    def reconcile(*_: Any) -> dict[str, Any]:
        raise errors.NoCredentialsError

    module = Module()
    with pytest.raises(SystemExit):
        rayplane_aws.run_with(module, reconcile)
    assert module.params["aws_config"] == {"connect_timeout": 10.0, "read_timeout": 7}
    assert "aws_x: Unable to locate credentials. Cure: set AWS_PROFILE" in module.ended["msg"]
