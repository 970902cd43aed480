"""Policy documents: least privilege, held to one cluster, within IAM's sizes."""

import json
import re
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.filter import rayplane_iam
from ansible_collections.rayplane.platform.plugins.filter.rayplane_iam import (
    aws_service_trust,
    bucket_reader_policy,
    cluster_autoscaler_policy,
    ebs_encryption_policy,
    external_secrets_policy,
    irsa_roles,
    karpenter_policy,
    load_balancer_controller_policy,
)
from conftest import PROJECT

CLUSTER = "ray-llm-cluster-prod"
KEY = "arn:aws:kms:us-west-2:123456789012:key/11111111-2222-3333-4444-555555555555"
DOCUMENTS = {
    "models": bucket_reader_policy("c-models", "models", "aws", KEY),
    "autoscaler": cluster_autoscaler_policy(CLUSTER),
    "karpenter": karpenter_policy(CLUSTER, "us-west-2", f"{CLUSTER}-node", "aws", KEY),
    "load balancers": load_balancer_controller_policy(CLUSTER),
    "secrets": external_secrets_policy(f"{CLUSTER}/", "us-west-2", "aws", KEY),
    "disks": ebs_encryption_policy(KEY),
}
READS = ("Describe", "Get", "List")


def statements(document: dict[str, Any], action: str) -> list[dict[str, Any]]:
    """Return the statements that allow an action."""
    return [one for one in document["Statement"] if action in one["Action"]]


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_are_whole_and_fit_into_a_role(document: dict[str, Any]) -> None:
    names = [one["Sid"] for one in document["Statement"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9]+", name) for name in names)
    # IAM quota: 10,240 characters for all inline policies of a role, white space not counted.
    assert len(json.dumps(document, separators=(",", ":"))) < 10240
    for one in document["Statement"]:
        assert one["Effect"] == "Allow"
        assert all(re.fullmatch(r"[a-z0-9-]+:[A-Za-z0-9]+", action) for action in one["Action"]), one


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_only_reading_reaches_everything(document: dict[str, Any]) -> None:
    for one in document["Statement"]:
        if one["Resource"] == "*":
            assert all(action.split(":")[1].startswith(READS) for action in one["Action"]), one["Sid"]


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_other_partitions_have_other_arns(document: dict[str, Any]) -> None:
    assert '"arn:aws:' in json.dumps(document)
    others = [
        cluster_autoscaler_policy("c", "aws-cn"),
        karpenter_policy("c", "cn-north-1", "c-node", "aws-cn"),
        load_balancer_controller_policy("c", "aws-cn"),
        external_secrets_policy("c/", "cn-north-1", "aws-cn"),
    ]
    assert '"arn:aws:' not in json.dumps(others)


def test_the_autoscaler_scales_groups_of_its_cluster_only() -> None:
    (scale,) = statements(DOCUMENTS["autoscaler"], "autoscaling:SetDesiredCapacity")
    assert scale["Condition"] == {"StringEquals": {f"aws:ResourceTag/k8s.io/cluster-autoscaler/{CLUSTER}": "owned"}}
    # To scale from zero it asks EKS for labels and taints.
    (read,) = statements(DOCUMENTS["autoscaler"], "eks:DescribeNodegroup")
    assert read["Resource"] == f"arn:aws:eks:*:*:nodegroup/{CLUSTER}/*/*"


def test_karpenter_ends_only_its_own_and_passes_one_role() -> None:
    document = DOCUMENTS["karpenter"]
    (end,) = statements(document, "ec2:TerminateInstances")
    assert end["Condition"]["StringEquals"] == {f"aws:ResourceTag/kubernetes.io/cluster/{CLUSTER}": "owned"}
    (passing,) = statements(document, "iam:PassRole")
    assert passing["Resource"] == f"arn:aws:iam::*:role/{CLUSTER}-node"
    (queue,) = statements(document, "sqs:ReceiveMessage")
    assert queue["Resource"] == f"arn:aws:sqs:us-west-2:*:{CLUSTER}"
    for one in statements(document, "ec2:CreateLaunchTemplate") + statements(document, "iam:CreateInstanceProfile"):
        assert one["Condition"]["StringEquals"][f"aws:RequestTag/kubernetes.io/cluster/{CLUSTER}"] == "owned"
    assert statements(document, "kms:CreateGrant")
    assert not statements(karpenter_policy(CLUSTER, "us-west-2", "node"), "kms:CreateGrant")


def test_load_balancers_of_other_clusters_are_out_of_reach() -> None:
    document = DOCUMENTS["load balancers"]
    own = {"StringEquals": {"aws:ResourceTag/elbv2.k8s.aws/cluster": CLUSTER}}
    for action in ("DeleteLoadBalancer", "ModifyTargetGroup", "RegisterTargets"):
        assert [one["Condition"] for one in statements(document, f"elasticloadbalancing:{action}")] == [own]
    (deleting,) = statements(document, "ec2:DeleteSecurityGroup")
    assert deleting["Condition"] == own
    conditions = [one["Condition"] for one in statements(document, "ec2:AuthorizeSecurityGroupIngress")]
    assert conditions == [own, {"StringEquals": {f"aws:ResourceTag/kubernetes.io/cluster/{CLUSTER}": "owned"}}]
    (made,) = statements(document, "elasticloadbalancing:CreateLoadBalancer")
    assert made["Condition"] == {"StringEquals": {"aws:RequestTag/elbv2.k8s.aws/cluster": CLUSTER}}


def test_secrets_are_read_below_one_prefix() -> None:
    read, decrypt = DOCUMENTS["secrets"]["Statement"]
    assert read["Resource"] == f"arn:aws:secretsmanager:us-west-2:*:secret:{CLUSTER}/*"
    assert decrypt["Resource"] == KEY
    assert len(external_secrets_policy("c/", "us-west-2")["Statement"]) == 1


def test_disks_are_granted_to_aws_services_only() -> None:
    (grant,) = statements(DOCUMENTS["disks"], "kms:CreateGrant")
    assert grant["Condition"] == {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    assert {one["Resource"] for one in DOCUMENTS["disks"]["Statement"]} == {KEY}


def test_a_token_is_trusted_for_one_service_account() -> None:
    provider, issuer = "arn:aws:iam::1:oidc-provider/oidc.eks/id/1", "oidc.eks/id/1"
    account = {"namespace": "logging", "service_account": "fluent-bit", "managed_policies": ["arn:x"]}
    (role,) = irsa_roles([account], "c1", provider, issuer)
    (trust,) = role["trust"]["Statement"]
    assert trust["Principal"] == {"Federated": provider}
    assert trust["Condition"] == {
        "StringEquals": {
            "oidc.eks/id/1:sub": "system:serviceaccount:logging:fluent-bit",
            "oidc.eks/id/1:aud": "sts.amazonaws.com",
        }
    }
    assert (role["name"], role["path"]) == ("c1-irsa-logging-fluent-bit", "/rayplane/c1/")
    assert role["managed_policies"] == ["arn:x"]
    with pytest.raises(ValueError, match="twice"):
        irsa_roles([account, account], "c1", provider, issuer)


def test_long_names_stay_within_iams_limit_and_apart() -> None:
    accounts = [{"namespace": "n" * 60, "service_account": name} for name in ("a", "b")]
    names = [role["name"] for role in irsa_roles(accounts, "c1", "arn:p", "issuer")]
    assert len(set(names)) == 2
    assert all(len(name) <= 64 for name in names)
    (named,) = irsa_roles([{**accounts[0], "name": "mine"}], "c1", "arn:p", "issuer")
    assert named["name"] == "mine"


def test_every_filter_is_registered() -> None:
    filters = rayplane_iam.FilterModule().filters()
    assert set(filters) == set(rayplane_iam.__all__) - {"FilterModule"}
    assert filters["aws_service_trust"] is aws_service_trust


#: AWS's managed policies that are attached here, each below the path that it has (AWS managed policy reference): which
#: of them are in service-role/ follows no rule. Look a new one up there before it is added.
MANAGED = {
    "AmazonEBSCSIDriverPolicyV2",
    "AmazonEC2ContainerRegistryPullOnly",
    "AmazonEKSClusterPolicy",
    "AmazonEKSWorkerNodePolicy",
    "AmazonEKS_CNI_Policy",
    "AmazonSSMManagedInstanceCore",
    "service-role/AmazonEFSCSIDriverPolicy",
}


def managed_policies(text: str) -> set[str]:
    """Path and name of the managed policies that a file names."""
    return set(re.findall(r"(?:iam::aws:policy|_policies \}\})/([\w+=,.@/-]+)", text))


def test_managed_policies_have_the_path_that_aws_gives_them() -> None:
    files = [
        path for folder in ("roles", "plugins", "inventories", "playbooks") for path in (PROJECT / folder).rglob("*.*")
    ]
    named = {
        policy: path
        for path in files
        if path.suffix in (".yml", ".py", ".json")
        for policy in managed_policies(path.read_text(encoding="utf-8"))
    }
    assert {policy: path for policy, path in named.items() if policy not in MANAGED} == {}
    # None that is gone is kept, and every way to write one is seen.
    assert set(named) == MANAGED
