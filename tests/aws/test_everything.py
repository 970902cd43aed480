"""One cluster with everything switched on that the three environments leave off, and one in a VPC that exists."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from .account import Account
from .conftest import INVENTORY, Playbook, Run

HOST = "ray-llm-prod"
CLUSTER = "ray-llm-everything"
TAGS = "encryption,network,storage,eks,autoscaler_cloud"
DEPLOY = ("playbooks/deploy.yml", *INVENTORY, "-l", HOST, "--tags", TAGS)
OTHER_REGION = "eu-west-1"


def node_group(name: str, types: list[str], image: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "instance_types": types, "ami_type": image, "max_size": 2, **more}


def everything(account: Account, peer: str, key_elsewhere: str) -> dict[str, Any]:
    """Variables of a cluster with everything on."""
    return {
        **account.environment,
        "platform_cluster_name": CLUSTER,
        # Not run: the stages in Kubernetes are left out.
        "autoscaler_helm": sys.executable,
        "platform_autoscaler": "karpenter",
        "network_peerings": [{"name": "office", "vpc_id": peer, "cidrs": ["172.16.0.0/16"]}],
        "network_admin_access": "bastion",
        "network_bastion_allowed_cidrs": ["203.0.113.0/24"],
        "network_bastion_ami_id": "ami-0123456789abcdef0",
        "network_security_group_rules": [{"protocol": "tcp", "from_port": 443, "to_port": 443, "cidr": "10.0.0.0/8"}],
        "storage_replica_region": OTHER_REGION,
        "storage_replica_kms_key_id": key_elsewhere,
        "storage_datasets_lifecycle": [
            {"name": "results", "prefix": "results/", "transitions": {"STANDARD_IA": 30}, "expire_days": 365}
        ],
        "storage_efs_enabled": True,
        "eks_efs_csi": True,
        "eks_load_balancer_controller": True,
        "eks_external_secrets": True,
        "gpu_plugin_neuron_enabled": True,
        "eks_irsa": [
            {
                "namespace": "jobs",
                "service_account": "reader",
                "managed_policies": ["arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"],
            }
        ],
        "eks_extra_node_groups": [
            node_group("spot", ["g5.xlarge", "g5.2xlarge"], "AL2023_x86_64_NVIDIA", capacity_type="SPOT"),
            node_group("arm", ["m7g.xlarge"], "AL2023_ARM_64_STANDARD"),
            node_group("neuron", ["inf2.xlarge"], "AL2023_x86_64_NEURON"),
            node_group("bottle", ["g5.xlarge"], "BOTTLEROCKET_x86_64_NVIDIA"),
            node_group("close", ["p4d.24xlarge"], "AL2023_x86_64_NVIDIA", placement_strategy="cluster"),
            node_group("kept", ["g5.xlarge"], "AL2023_x86_64_NVIDIA", capacity_reservation_id="cr-0123456789abcdef0"),
        ],
        "autoscaler_scheduled_scaling": True,
        "autoscaler_schedules": [
            {"name": "evening", "node_group": "gpu", "recurrence": "0 20 * * MON-FRI", "min": 0, "desired": 0},
            {"name": "morning", "node_group": "gpu", "recurrence": "0 7 * * MON-FRI", "min": 1, "desired": 2},
        ],
    }


@dataclass
class Built:
    """The cluster, and the runs that planned and made it."""

    account: Account
    variables: dict[str, Any]
    #: What was in the account before.
    before: dict[str, list[str]]
    plan: Run
    first: Run


@pytest.fixture(scope="module")
def built(new_account: Callable[[], Account], playbook: Playbook) -> Built:
    account = new_account()
    peer = account.ec2.create_vpc(CidrBlock="172.16.0.0/16")["Vpc"]["VpcId"]
    elsewhere = Account(account.number, account.endpoint, OTHER_REGION).client("kms")
    key = elsewhere.create_key()["KeyMetadata"]["Arn"]
    before = account.sweep()
    variables = everything(account, peer, key)
    plan = playbook(*DEPLOY, "--check", "--diff", variables=variables).succeeded(HOST)
    first = playbook(*DEPLOY, variables=variables).succeeded(HOST)
    return Built(account, variables, before, plan, first)


def actions(run: Run) -> list[str]:
    """What a run did; ids and zones of subnets to come, which a plan cannot know, are left out."""
    unknown = r"<new [^>]*>|\b[a-z]+-[0-9a-f]{17}\b|(?<= in )us-west-2[a-c]|arn:aws:iam::\d+:role/[\w-]+"
    return [re.sub(unknown, "...", action) for action in run.actions(HOST)]


def test_the_plan_is_what_happens(built: Built) -> None:
    assert not [str(call) for call in built.plan.calls if call.writes]
    assert actions(built.plan) == actions(built.first)


def test_everything_is_there(built: Built) -> None:
    account = built.account
    groups = account.client("eks").list_nodegroups(clusterName=CLUSTER)["nodegroups"]
    assert set(groups) == {"cpu", "gpu", "spot", "arm", "neuron", "bottle", "close", "kept"}
    counts = account.counts()
    for kind in ("VPC peering", "file system", "OIDC provider", "placement group", "queue", "instance"):
        assert counts[kind] >= 1, (kind, counts)
    replicas = account.client("s3").get_bucket_replication(Bucket=f"{CLUSTER}-models")
    assert replicas["ReplicationConfiguration"]["Rules"][0]["Status"] == "Enabled"


def test_every_policy_of_a_role_was_accepted_and_is_read_back(built: Built) -> None:
    """What the emulator has is JSON with AWS's fields; every statement names its actions and resources."""
    iam = built.account.client("iam")
    seen = set()
    for role in built.account.items("role"):
        name = role["RoleName"]
        for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            document = document if isinstance(document, dict) else json.loads(document)
            assert document["Version"] == "2012-10-17"
            assert all({"Effect", "Action", "Resource"} <= set(one) for one in document["Statement"]), policy
            seen.add(name.removeprefix(f"{CLUSTER}-"))
    assert seen >= {"models-reader", "autoscaler", "load-balancer-controller", "external-secrets"}


def test_a_second_run_changes_nothing(built: Built, playbook: Playbook) -> None:
    again = playbook(*DEPLOY, variables=built.variables).succeeded(HOST)
    assert again.actions(HOST) == [] and again.changed(HOST) == 0
    assert not [str(call) for call in again.calls if call.writes]


def test_switching_it_off_removes_it(built: Built, playbook: Playbook) -> None:
    """What was on by choice goes by the same playbook; data stay."""
    off = {
        **built.variables,
        "platform_autoscaler": "cluster_autoscaler",
        "network_peerings": [],
        "network_admin_access": "ssm",
        "eks_load_balancer_controller": False,
        "eks_external_secrets": False,
        "eks_irsa": [],
        "eks_extra_node_groups": [],
        "autoscaler_schedules": [],
    }
    playbook(*DEPLOY, variables=off).succeeded(HOST)
    counts = built.account.counts()
    gone = ("VPC peering", "OIDC provider", "placement group", "queue", "event rule", "instance")
    assert {kind: counts[kind] for kind in gone} == dict.fromkeys(gone, 0)
    assert counts["file system"] == 1
    again = playbook(*DEPLOY, variables=off).succeeded(HOST)
    assert again.actions(HOST) == []
    playbook(*DEPLOY, variables=built.variables).succeeded(HOST)


def test_destroying_leaves_what_was_there_before(built: Built, playbook: Playbook) -> None:
    variables = {**built.variables, "destroy_confirm": CLUSTER, "storage_destroy_data": True}
    playbook("playbooks/destroy.yml", *INVENTORY, "-l", HOST, variables=variables).succeeded(HOST)
    assert built.account.sweep() == built.before


def test_a_vpc_that_exists_is_used_and_left_as_it_was(new_account: Callable[[], Account], playbook: Playbook) -> None:
    """Adoption by tags: subnets are made in it; its own are not touched; destroying removes only what is ours."""
    account = new_account()
    ec2 = account.ec2
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    ec2.create_tags(Resources=[vpc], Tags=[{"Key": "team", "Value": "platform"}])
    ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    own = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.255.0/24")["Subnet"]["SubnetId"]
    before = account.sweep()
    variables = {
        **account.environment,
        "platform_cluster_name": "ray-llm-adopted",
        "network_existing_vpc_tags": {"team": "platform"},
        "network_vpc_cidr": "10.9.0.0/17",
        "network_intra_subnets": False,
    }
    plan = playbook(*DEPLOY, "--check", variables=variables).succeeded(HOST)
    first = playbook(*DEPLOY, variables=variables).succeeded(HOST)
    assert actions(plan) == actions(first)
    assert account.counts()["VPC"] == 1 and account.counts()["internet gateway"] == 1
    again = playbook(*DEPLOY, variables=variables).succeeded(HOST)
    assert again.actions(HOST) == []
    gone = {**variables, "destroy_confirm": "ray-llm-adopted"}
    playbook("playbooks/destroy.yml", *INVENTORY, "-l", HOST, variables=gone).succeeded(HOST)
    assert account.sweep() == before
    assert own in account.names("subnet")
