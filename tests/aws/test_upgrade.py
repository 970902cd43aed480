"""From one version of Kubernetes to the default two releases later: control plane, add-ons, nodes, in this order."""

from __future__ import annotations

from itertools import pairwise

import yaml

from .account import Account
from .conftest import INVENTORY, ROOT, Playbook

HOST = "ray-llm-staging"
NAME = "ray-llm-upgrade"
EKS = ("playbooks/deploy.yml", *INVENTORY, "-l", HOST, "--tags", "eks")
OLD = "1.34"
NEW = yaml.safe_load((ROOT / "roles/eks/defaults/main.yml").read_text())["eks_kubernetes_version"]


def _versions(account: Account) -> set[str]:
    """The Kubernetes versions of the control plane and the node groups."""
    eks = account.client("eks")
    groups = eks.list_nodegroups(clusterName=NAME)["nodegroups"]
    assert len(groups) == 3, groups
    nodes = {eks.describe_nodegroup(clusterName=NAME, nodegroupName=one)["nodegroup"]["version"] for one in groups}
    return {eks.describe_cluster(name=NAME)["cluster"]["version"], *nodes}


def _clients(account: Account) -> set[str]:
    """The networks that the cluster's own security group admits."""
    network = account.client("eks").describe_cluster(name=NAME)["cluster"]["resourcesVpcConfig"]
    (group,) = account.ec2.describe_security_groups(GroupIds=[network["clusterSecurityGroupId"]])["SecurityGroups"]
    return {one["CidrIp"] for rule in group["IpPermissions"] for one in rule["IpRanges"]}


def test_a_cluster_follows_the_default(account: Account, playbook: Playbook) -> None:
    subnets = [one["SubnetId"] for one in account.ec2.describe_subnets()["Subnets"]][:2]
    variables = {
        **account.environment,
        "platform_cluster_name": NAME,
        "encryption_enabled": False,
        "eks_subnet_ids": subnets,
        "eks_addons": [{"name": "coredns"}],
    }
    playbook(*EKS, variables={**variables, "eks_kubernetes_version": OLD}).succeeded(HOST)
    assert _versions(account) == {OLD}
    # Without the stage network, too, the VPC reaches the private endpoint.
    vpcs = {one["CidrBlock"] for one in account.ec2.describe_vpcs()["Vpcs"]}
    assert _clients(account) == vpcs
    plan = playbook(*EKS, "--check", variables=variables).succeeded(HOST)
    assert _versions(account) == {OLD}
    done = playbook(*EKS, variables=variables).succeeded(HOST)
    assert plan.actions(HOST) == done.actions(HOST)
    steps = [f"1.{minor}" for minor in range(int(OLD[2:]), int(NEW[2:]) + 1)]
    assert len(steps) > 2, "the default is no two releases ahead: start from an older version"
    path = [f"version: {have} -> {want}" for have, want in pairwise(steps)]
    assert done.actions(HOST) == [
        *(f"update cluster {NAME}: {step}" for step in path),
        f"update add-on coredns: version: v{OLD}.0-eksbuild.1 -> v{NEW}.0-eksbuild.1",
        f"update add-on coredns: tag rayplane.io/kubernetes-version: {OLD} -> {NEW}",
        *(f"update node group {group}: version: {OLD} -> {NEW}" for group in ("cpu", "gpu", "gpu-l4")),
    ]
    assert _versions(account) == {NEW}
    again = playbook(*EKS, variables=variables).succeeded(HOST)
    assert again.actions(HOST) == [] and again.changed(HOST) == 0
