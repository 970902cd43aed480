"""Changes by hand in production: each is reported by name and property and repaired, and nothing else is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .account import Account
from .conftest import CLOUD, HOSTS, OPERATORS, Fleet, Playbook, Run

PROD = "ray-llm-prod"
NAME = "ray-llm-cluster-prod"
ANYWHERE = "0.0.0.0/0"
INTRUDER = "arn:aws:iam::111122223333:role/intruder"
ADMIN = "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"

Change = Callable[[Account], None]
#: What is done by hand, and what is to be said of it: resource and property (none: the resource itself is gone).
CHANGES: dict[str, tuple[Change, list[tuple[str, str]]]] = {}


def change(*said: tuple[str, str]) -> Callable[[Change], Change]:
    """Register a change by hand."""

    def register(function: Change) -> Change:
        CHANGES[function.__name__] = (function, list(said))
        return function

    return register


def _named(account: Account, kind: str, suffix: str, key: str) -> str:
    return str(account.named(kind, NAME, NAME + suffix)[key])


def _bucket(account: Account, kind: str) -> str:
    return f"{NAME}-{kind}-{account.number}-{account.region}"


@change((f"route table {NAME}-private-us-west-2b", f"route {ANYWHERE}"))
def a_route_deleted(account: Account) -> None:
    table = _named(account, "route table", "-private-us-west-2b", "RouteTableId")
    account.ec2.delete_route(RouteTableId=table, DestinationCidrBlock=ANYWHERE)


@change((f"security group {NAME}-private", f"ingress tcp 22-22 from {ANYWHERE}"))
def a_rule_added(account: Account) -> None:
    group = _named(account, "security group", "-private", "GroupId")
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ANYWHERE}]}
    account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])


@change((f"security group {NAME}-private", "ingress tcp 443-443 from 10.0.0.0/16"))
def a_rule_removed(account: Account) -> None:
    group = _named(account, "security group", "-private", "GroupId")
    https = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "10.0.0.0/16"}]}
    account.ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[https])


@change((f"subnet {NAME}-private-us-west-2a", "tag kubernetes.io/role/internal-elb"))
def a_tag_removed(account: Account) -> None:
    subnet = _named(account, "subnet", "-private-us-west-2a", "SubnetId")
    account.ec2.delete_tags(Resources=[subnet], Tags=[{"Key": "kubernetes.io/role/internal-elb"}])


@change((f"subnet {NAME}-public-us-west-2c", "public_addresses"))
def a_subnet_attribute_changed(account: Account) -> None:
    subnet = _named(account, "subnet", "-public-us-west-2c", "SubnetId")
    account.ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": False})


@change((f"gateway endpoint {NAME}-s3", ""))
def an_endpoint_deleted(account: Account) -> None:
    endpoint = _named(account, "VPC endpoint", "-s3", "VpcEndpointId")
    account.ec2.delete_vpc_endpoints(VpcEndpointIds=[endpoint])


@change((f"NAT gateway {NAME}-us-west-2c", ""), (f"route table {NAME}-private-us-west-2c", f"route {ANYWHERE}"))
def a_nat_gateway_deleted(account: Account) -> None:
    account.ec2.delete_nat_gateway(NatGatewayId=_named(account, "NAT gateway", "-us-west-2c", "NatGatewayId"))


@change((f"flow log {NAME}", ""))
def the_flow_log_deleted(account: Account) -> None:
    logs = [one["FlowLogId"] for one in account.owned("flow log", NAME)]
    account.ec2.delete_flow_logs(FlowLogIds=logs)


@change((f"KMS key {NAME}", "rotation"))
def key_rotation_switched_off(account: Account) -> None:
    kms = account.client("kms")
    kms.disable_key_rotation(KeyId=kms.describe_key(KeyId=f"alias/{NAME}")["KeyMetadata"]["KeyId"])


@change((f"bucket {NAME}-models", "versioning"))
def versioning_suspended(account: Account) -> None:
    suspended = {"Status": "Suspended"}
    account.client("s3").put_bucket_versioning(Bucket=_bucket(account, "models"), VersioningConfiguration=suspended)


@change((f"bucket {NAME}-models", "policy TlsOnly"))
def a_bucket_policy_removed(account: Account) -> None:
    account.client("s3").delete_bucket_policy(Bucket=_bucket(account, "models"))


@change((f"bucket {NAME}-datasets", "public_access_block"))
def a_public_access_block_removed(account: Account) -> None:
    account.client("s3").delete_public_access_block(Bucket=_bucket(account, "datasets"))


@change(
    (f"bucket {NAME}-datasets", "lifecycle drop-old-versions"),
    (f"bucket {NAME}-datasets", "lifecycle drop-unfinished-uploads"),
)
def a_lifecycle_removed(account: Account) -> None:
    account.client("s3").delete_bucket_lifecycle(Bucket=_bucket(account, "datasets"))


@change((f"bucket {NAME}-models", "encryption"), (f"bucket {NAME}-models", "bucket key"))
def encryption_changed(account: Account) -> None:
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    account.client("s3").put_bucket_encryption(
        Bucket=_bucket(account, "models"), ServerSideEncryptionConfiguration={"Rules": [rule]}
    )


@change((f"role {NAME}-node", "policy arn:aws:iam::aws:policy/AmazonEKSWorkerNodePolicy"))
def a_policy_detached(account: Account) -> None:
    policy = "arn:aws:iam::aws:policy/AmazonEKSWorkerNodePolicy"
    account.client("iam").detach_role_policy(RoleName=f"{NAME}-node", PolicyArn=policy)


@change((f"role {NAME}-ebs-csi", "trust"))
def a_trust_changed(account: Account) -> None:
    trust = {"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", "Action": "sts:AssumeRole"}]}
    account.client("iam").update_assume_role_policy(RoleName=f"{NAME}-ebs-csi", PolicyDocument=json.dumps(trust))


@change((f"role {NAME}-models-reader", "policy read-models"))
def an_inline_policy_deleted(account: Account) -> None:
    account.client("iam").delete_role_policy(RoleName=f"{NAME}-models-reader", PolicyName="read-models")


@change((f"cluster {NAME}", "publicAccessCidrs"))
def the_api_server_opened(account: Account) -> None:
    access = {"publicAccessCidrs": [ANYWHERE]}
    account.client("eks").update_cluster_config(name=NAME, resourcesVpcConfig=access)


@change((f"cluster {NAME}", "logging"))
def logs_switched_off(account: Account) -> None:
    setup = {"types": ["api", "audit", "authenticator", "controllerManager", "scheduler"], "enabled": False}
    account.client("eks").update_cluster_config(name=NAME, logging={"clusterLogging": [setup]})


@change(("node group gpu", "minSize"), ("node group gpu", "maxSize"))
def bounds_scaled(account: Account) -> None:
    bounds = {"minSize": 0, "maxSize": 3, "desiredSize": 1}
    account.client("eks").update_nodegroup_config(clusterName=NAME, nodegroupName="gpu", scalingConfig=bounds)


@change(("node group cpu", "release_version"))
def an_older_image(account: Account) -> None:
    older = {"nodegroupName": "cpu", "releaseVersion": "1.36.0-20260901"}
    account.client("eks").update_nodegroup_version(clusterName=NAME, **older)


@change(("add-on coredns", ""))
def an_add_on_deleted(account: Account) -> None:
    account.client("eks").delete_addon(clusterName=NAME, addonName="coredns")


@change(("add-on aws-ebs-csi-driver", "pod identity ebs-csi-controller-sa"))
def the_role_of_an_add_on_changed(account: Account) -> None:
    eks = account.client("eks")
    (arn,) = eks.describe_addon(clusterName=NAME, addonName="aws-ebs-csi-driver")["addon"]["podIdentityAssociations"]
    role = f"arn:aws:iam::{account.number}:role/{NAME}-node"
    eks.update_pod_identity_association(clusterName=NAME, associationId=arn.rpartition("/")[2], roleArn=role)


@change((f"access entry {OPERATORS}", ""), (f"access entry {OPERATORS}", f"policy {ADMIN}"))
def an_access_entry_deleted(account: Account) -> None:
    account.client("eks").delete_access_entry(clusterName=NAME, principalArn=OPERATORS)


@change(("pod identity rayplane/rayplane", ""))
def a_pod_identity_deleted(account: Account) -> None:
    eks = account.client("eks")
    for one in eks.list_pod_identity_associations(clusterName=NAME, namespace="rayplane")["associations"]:
        eks.delete_pod_identity_association(clusterName=NAME, associationId=one["associationId"])


#: What is added by hand and stays until somebody declares or removes it: said of it by drift alone.
ADDED: list[tuple[str, str]] = [
    (f"route table {NAME}-public", "route 192.168.0.0/16"),
    (f"access entry {INTRUDER}", ""),
    (f"access entry {INTRUDER}", f"policy {ADMIN}"),
    (f"security group of cluster {NAME}", f"ingress tcp 22-22 from {ANYWHERE}"),
]


def add(account: Account) -> Callable[[], None]:
    """Add things of others to ours; return what takes them away."""
    gateway = account.named("internet gateway", NAME, NAME)["InternetGatewayId"]
    table = _named(account, "route table", "-public", "RouteTableId")
    account.ec2.create_route(RouteTableId=table, DestinationCidrBlock="192.168.0.0/16", GatewayId=gateway)
    eks = account.client("eks")
    eks.create_access_entry(clusterName=NAME, principalArn=INTRUDER)
    scope = {"type": "cluster"}
    eks.associate_access_policy(clusterName=NAME, principalArn=INTRUDER, policyArn=ADMIN, accessScope=scope)
    group = eks.describe_cluster(name=NAME)["cluster"]["resourcesVpcConfig"]["clusterSecurityGroupId"]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ANYWHERE}]}
    account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])

    def take_away() -> None:
        account.ec2.delete_route(RouteTableId=table, DestinationCidrBlock="192.168.0.0/16")
        eks.delete_access_entry(clusterName=NAME, principalArn=INTRUDER)
        account.ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[ssh])

    return take_away


EXPECTED = sorted(said for _, all_said in CHANGES.values() for said in all_said)


def _report(run: Run, folder: Path) -> dict[str, Any]:
    assert (folder / "drift.json").is_file(), run.text[-3000:]
    clusters: dict[str, Any] = json.loads((folder / "drift.json").read_text())["clusters"]
    return clusters


def _said(actions: list[str]) -> Iterator[tuple[str, str]]:
    """Resource and property of what modules say they did."""
    for action in actions:
        verb, rest = action.split(" ", 1)
        if verb == "update":
            resource, rest = rest.split(": ", 1)
            yield resource, re.sub(r": [^ ].* -> .*$", "", rest, count=1, flags=re.DOTALL)
        else:
            yield rest, ""


@pytest.fixture(scope="module")
def drifted(fleet: Fleet) -> Iterator[Fleet]:
    """The three environments with production changed by hand."""
    for function, _ in CHANGES.values():
        function(fleet.account)
    take_away = add(fleet.account)
    yield fleet
    take_away()


def test_drift_is_reported_and_repaired(drifted: Fleet, playbook: Playbook, tmp_path: Path) -> None:
    assert len(CHANGES) >= 20
    variables = {**drifted.variables, "eks_node_image_patches": "update"}
    report_to = {"drift_report": True, "drift_dir": str(tmp_path)}
    found = playbook(*CLOUD, "--check", variables={**variables, **report_to})
    assert found.returncode == 2, found.text[-3000:]
    report = _report(found, tmp_path)
    # The report goes into documents, the actions name them.
    rows = {
        name: [(row["resource"], row["property"].partition(".Statement")[0]) for row in about["drift"]]
        for name, about in report.items()
    }
    added = [(row["resource"], row["property"]) for row in report[PROD]["drift"] if row["action"] == "foreign"]
    assert sorted(added) == sorted(ADDED)
    assert not (wrong := _difference(rows.pop(PROD), also=ADDED)), "\n".join(wrong)
    assert not any(rows.values()), rows
    # What was not touched has an empty plan.
    assert [found.changed(host) for host in HOSTS if host != PROD] == [0, 0]
    assert not [str(call) for call in found.calls if call.writes]

    repaired = playbook(*CLOUD, variables=variables).succeeded(*HOSTS)
    assert not (wrong := _difference(list(_said(repaired.actions(PROD))))), "\n".join(wrong)
    assert [repaired.actions(host) for host in HOSTS if host != PROD] == [[], []]
    assert [repaired.changed(host) for host in HOSTS if host != PROD] == [0, 0]

    clean = playbook(*CLOUD, variables=variables).succeeded(*HOSTS)
    assert {host: clean.actions(host) for host in HOSTS} == {host: [] for host in HOSTS}
    assert {host: clean.changed(host) for host in HOSTS} == dict.fromkeys(HOSTS, 0)
    assert not [str(call) for call in clean.calls if call.writes]
    assert drifted.account.counts() == drifted.counts


def _difference(said: list[tuple[str, str]], also: list[tuple[str, str]] | None = None) -> list[str]:
    """What was said and not expected, or expected and not said. Buckets are told without account and region."""
    expected = {*EXPECTED, *(also or [])}
    said = [(re.sub(r"^(bucket .*)-\d{12}-us-west-2$", r"\1", resource), rest) for resource, rest in said]
    return [f"too much: {one}" for one in sorted(set(said) - expected)] + [
        f"not said: {one}" for one in sorted(expected - set(said))
    ]
