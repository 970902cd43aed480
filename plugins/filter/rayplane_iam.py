# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Filters that build AWS policies and lifecycle rules.

Policies name accounts as ``*``: a role's permissions reach its own account only, and the account is unknown until the
credentials are used. Conditions hold them to one cluster instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = [
    "FilterModule",
    "aws_partition",
    "aws_service_trust",
    "bucket_reader_policy",
    "cluster_autoscaler_policy",
    "ebs_encryption_policy",
    "external_secrets_policy",
    "irsa_roles",
    "karpenter_policy",
    "load_balancer_controller_policy",
]

VERSION = "2012-10-17"


def aws_partition(region: str) -> str:
    """Return the partition that the ARNs of a region begin with, such as ``aws`` or ``aws-cn``."""
    if region.startswith("cn-"):
        return "aws-cn"
    return "aws-us-gov" if region.startswith("us-gov-") else "aws"


def aws_service_trust(service: str) -> dict[str, Any]:
    """Return the trust policy that lets an AWS service take a role.

    EKS Pod Identity also tags the sessions it opens, hence its second action (EKS user guide, "EKS Pod Identity role").
    """
    actions = ["sts:AssumeRole", "sts:TagSession"] if service == "pods.eks.amazonaws.com" else ["sts:AssumeRole"]
    return {
        "Version": VERSION,
        "Statement": [{"Effect": "Allow", "Principal": {"Service": service}, "Action": actions}],
    }


def bucket_reader_policy(bucket: str, prefix: str, partition: str = "aws", kms_key_arn: str = "") -> dict[str, Any]:
    """Return the policy that lets its holder list and read one prefix of one bucket, and nothing else.

    ``prefix`` has no slash at either end. ``kms_key_arn`` is the key that encrypts the bucket, or empty.
    """
    arn = f"arn:{partition}:s3:::{bucket}"
    statements: list[dict[str, Any]] = [
        {"Sid": "Locate", "Effect": "Allow", "Action": ["s3:GetBucketLocation"], "Resource": arn},
        {
            "Sid": "List",
            "Effect": "Allow",
            "Action": ["s3:ListBucket"],
            "Resource": arn,
            "Condition": {"StringLike": {"s3:prefix": [prefix, f"{prefix}/*"]}},
        },
        {"Sid": "Read", "Effect": "Allow", "Action": ["s3:GetObject"], "Resource": f"{arn}/{prefix}/*"},
    ]
    if kms_key_arn:
        statements.append({"Sid": "Decrypt", "Effect": "Allow", "Action": ["kms:Decrypt"], "Resource": kms_key_arn})
    return {"Version": VERSION, "Statement": statements}


def _policy(*statements: Mapping[str, Any]) -> dict[str, Any]:
    return {"Version": VERSION, "Statement": [dict(statement) for statement in statements]}


def _allow(
    sid: str, actions: Iterable[str], resource: str | list[str] = "*", condition: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    statement: dict[str, Any] = {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource}
    if condition:
        statement["Condition"] = dict(condition)
    return statement


def cluster_autoscaler_policy(cluster: str, partition: str = "aws") -> dict[str, Any]:
    """Return the policy of the cluster autoscaler: reads all groups, changes the sizes of one cluster's.

    EKS tags the groups of its managed node groups ``k8s.io/cluster-autoscaler/<cluster>: owned``. To scale from zero
    the autoscaler asks EKS for a group's labels and taints. Source: kubernetes/autoscaler,
    cluster-autoscaler/cloudprovider/aws/README.md, "Full Cluster Autoscaler Features Policy".
    """
    owned = {"StringEquals": {f"aws:ResourceTag/k8s.io/cluster-autoscaler/{cluster}": "owned"}}
    return _policy(
        _allow(
            "Read",
            [
                "autoscaling:DescribeAutoScalingGroups",
                "autoscaling:DescribeAutoScalingInstances",
                "autoscaling:DescribeLaunchConfigurations",
                "autoscaling:DescribeScalingActivities",
                "autoscaling:DescribeTags",
                "ec2:DescribeImages",
                "ec2:DescribeInstanceTypes",
                "ec2:DescribeLaunchTemplateVersions",
                "ec2:GetInstanceTypesFromInstanceRequirements",
            ],
        ),
        _allow("ReadNodeGroups", ["eks:DescribeNodegroup"], f"arn:{partition}:eks:*:*:nodegroup/{cluster}/*/*"),
        _allow(
            "Scale",
            ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"],
            f"arn:{partition}:autoscaling:*:*:autoScalingGroup:*:autoScalingGroupName/*",
            owned,
        ),
    )


def karpenter_policy(
    cluster: str, region: str, node_role: str, partition: str = "aws", kms_key_arn: str = ""
) -> dict[str, Any]:
    """Return the policy of Karpenter's controller (v1): it makes, tags and ends what bears its and the cluster's tags.

    ``node_role`` is the name of the nodes' role, the only one that it may pass; the interruption queue has the
    cluster's name. ``kms_key_arn`` encrypts the nodes' disks, or is empty.
    Source: karpenter.sh, "CloudFormation" reference, KarpenterControllerPolicy.
    """
    ec2, everywhere = f"arn:{partition}:ec2:{region}", f"arn:{partition}:ec2:{region}:*"
    owner, pool, klass = (f"kubernetes.io/cluster/{cluster}", "karpenter.sh/nodepool", "karpenter.k8s.aws/ec2nodeclass")
    made = [f"{everywhere}:{kind}/*" for kind in ("fleet", "instance", "volume", "network-interface")]
    made += [f"{everywhere}:launch-template/*", f"{everywhere}:spot-instances-request/*"]
    profiles = f"arn:{partition}:iam::*:instance-profile/*"
    asked = {
        "StringEquals": {f"aws:RequestTag/{owner}": "owned", "aws:RequestTag/eks:eks-cluster-name": cluster},
        "StringLike": {f"aws:RequestTag/{pool}": "*"},
    }
    own = {
        "StringEquals": {f"aws:ResourceTag/{owner}": "owned"},
        "StringLike": {f"aws:ResourceTag/{pool}": "*"},
    }
    place = "topology.kubernetes.io/region"
    profile_asked = {f"aws:RequestTag/{owner}": "owned", f"aws:RequestTag/{place}": region}
    profile_own = {f"aws:ResourceTag/{owner}": "owned", f"aws:ResourceTag/{place}": region}
    named = {f"aws:RequestTag/{klass}": "*"}
    statements = [
        _allow(
            "UseWhatIsThere",
            ["ec2:RunInstances", "ec2:CreateFleet"],
            [f"{ec2}::image/*", f"{ec2}::snapshot/*"]
            + [f"{everywhere}:{kind}/*" for kind in ("security-group", "subnet", "capacity-reservation")]
            + [f"{everywhere}:placement-group/*"],
        ),
        _allow(
            "UseOwnTemplates",
            ["ec2:RunInstances", "ec2:CreateFleet"],
            f"{everywhere}:launch-template/*",
            own,
        ),
        _allow("Make", ["ec2:RunInstances", "ec2:CreateFleet", "ec2:CreateLaunchTemplate"], made, asked),
        _allow(
            "TagWhatIsMade",
            ["ec2:CreateTags"],
            made,
            {
                **asked,
                "StringEquals": {
                    **asked["StringEquals"],
                    "ec2:CreateAction": ["RunInstances", "CreateFleet", "CreateLaunchTemplate"],
                },
            },
        ),
        _allow(
            "TagOwnInstances",
            ["ec2:CreateTags"],
            f"{everywhere}:instance/*",
            {
                **own,
                "StringEqualsIfExists": {"aws:RequestTag/eks:eks-cluster-name": cluster},
                "ForAllValues:StringEquals": {
                    "aws:TagKeys": ["eks:eks-cluster-name", "karpenter.sh/nodeclaim", "Name"]
                },
            },
        ),
        _allow(
            "EndOwn",
            ["ec2:TerminateInstances", "ec2:DeleteLaunchTemplate"],
            [f"{everywhere}:instance/*", f"{everywhere}:launch-template/*"],
            own,
        ),
        _allow(
            "ReadRegion",
            [
                "ec2:DescribeCapacityReservations",
                "ec2:DescribeImages",
                "ec2:DescribeInstanceStatus",
                "ec2:DescribeInstanceTypeOfferings",
                "ec2:DescribeInstanceTypes",
                "ec2:DescribeInstances",
                "ec2:DescribeLaunchTemplates",
                "ec2:DescribePlacementGroups",
                "ec2:DescribeSecurityGroups",
                "ec2:DescribeSpotPriceHistory",
                "ec2:DescribeSubnets",
            ],
            condition={"StringEquals": {"aws:RequestedRegion": region}},
        ),
        _allow("ReadImages", ["ssm:GetParameter"], f"arn:{partition}:ssm:{region}::parameter/aws/service/*"),
        _allow("ReadPrices", ["pricing:GetProducts"]),
        _allow(
            "ReadInterruptions",
            ["sqs:DeleteMessage", "sqs:GetQueueUrl", "sqs:GetQueueAttributes", "sqs:ReceiveMessage"],
            f"arn:{partition}:sqs:{region}:*:{cluster}",
        ),
        _allow(
            "PassNodeRole",
            ["iam:PassRole"],
            f"arn:{partition}:iam::*:role/{node_role}",
            {"StringEquals": {"iam:PassedToService": ["ec2.amazonaws.com", "ec2.amazonaws.com.cn"]}},
        ),
        _allow(
            "MakeProfiles",
            ["iam:CreateInstanceProfile"],
            profiles,
            {
                "StringEquals": {**profile_asked, "aws:RequestTag/eks:eks-cluster-name": cluster},
                "StringLike": named,
            },
        ),
        _allow(
            "TagOwnProfiles",
            ["iam:TagInstanceProfile"],
            profiles,
            {
                "StringEquals": {
                    **profile_own,
                    **profile_asked,
                    "aws:RequestTag/eks:eks-cluster-name": cluster,
                },
                "StringLike": {**named, f"aws:ResourceTag/{klass}": "*"},
            },
        ),
        _allow(
            "ChangeOwnProfiles",
            ["iam:AddRoleToInstanceProfile", "iam:RemoveRoleFromInstanceProfile", "iam:DeleteInstanceProfile"],
            profiles,
            {"StringEquals": profile_own, "StringLike": {f"aws:ResourceTag/{klass}": "*"}},
        ),
        _allow("ReadProfiles", ["iam:GetInstanceProfile"], profiles),
        _allow("ListProfiles", ["iam:ListInstanceProfiles"]),
        _allow("FindCluster", ["eks:DescribeCluster"], f"arn:{partition}:eks:{region}:*:cluster/{cluster}"),
    ]
    if kms_key_arn:
        statements += ebs_encryption_policy(kms_key_arn)["Statement"]
    return _policy(*statements)


def load_balancer_controller_policy(cluster: str, partition: str = "aws") -> dict[str, Any]:
    """Return the policy of the AWS load balancer controller, held to what it tags as this cluster's.

    The controller tags all it makes ``elbv2.k8s.aws/cluster: <cluster>``. Security group rules it also writes into the
    nodes' group, which it did not make; EKS tags that one ``kubernetes.io/cluster/<cluster>: owned``.
    Source: kubernetes-sigs/aws-load-balancer-controller, docs/install/iam_policy.json. Left out: Cognito, WAF and
    Shield, which nothing here uses, and server certificates in IAM, which ACM has replaced.
    """
    balancing = f"arn:{partition}:elasticloadbalancing:*:*"
    groups = f"arn:{partition}:ec2:*:*:security-group/*"
    asked = {"StringEquals": {"aws:RequestTag/elbv2.k8s.aws/cluster": cluster}}
    own = {"StringEquals": {"aws:ResourceTag/elbv2.k8s.aws/cluster": cluster}}
    balancers = [f"{balancing}:loadbalancer/{kind}/*/*" for kind in ("app", "net")]
    listeners = [f"{balancing}:listener/{kind}/*/*/*" for kind in ("app", "net")]
    rules = [f"{balancing}:listener-rule/{kind}/*/*/*/*" for kind in ("app", "net")]
    targets = f"{balancing}:targetgroup/*/*"
    elb = "elasticloadbalancing"
    return _policy(
        _allow(
            "ServiceRole",
            ["iam:CreateServiceLinkedRole"],
            f"arn:{partition}:iam::*:role/aws-service-role/elasticloadbalancing.amazonaws.com/*",
            {"StringEquals": {"iam:AWSServiceName": "elasticloadbalancing.amazonaws.com"}},
        ),
        _allow(
            "Read",
            [
                "acm:DescribeCertificate",
                "acm:ListCertificates",
                *(
                    f"ec2:Describe{things}"
                    for things in (
                        "AccountAttributes",
                        "Addresses",
                        "AvailabilityZones",
                        "CoipPools",
                        "Instances",
                        "InternetGateways",
                        "IpamPools",
                        "NetworkInterfaces",
                        "RouteTables",
                        "SecurityGroups",
                        "Subnets",
                        "Tags",
                        "VpcPeeringConnections",
                        "Vpcs",
                    )
                ),
                "ec2:GetCoipPoolUsage",
                "ec2:GetSecurityGroupsForVpc",
                *(
                    f"{elb}:Describe{things}"
                    for things in (
                        "CapacityReservation",
                        "ListenerAttributes",
                        "ListenerCertificates",
                        "Listeners",
                        "LoadBalancerAttributes",
                        "LoadBalancers",
                        "Rules",
                        "SSLPolicies",
                        "Tags",
                        "TargetGroupAttributes",
                        "TargetGroups",
                        "TargetHealth",
                        "TrustStores",
                    )
                ),
            ],
        ),
        _allow("MakeGroups", ["ec2:CreateSecurityGroup"], groups, asked),
        _allow("MakeGroupsInVpc", ["ec2:CreateSecurityGroup"], f"arn:{partition}:ec2:*:*:vpc/*"),
        _allow(
            "TagNewGroups",
            ["ec2:CreateTags"],
            groups,
            {
                "StringEquals": {
                    "ec2:CreateAction": "CreateSecurityGroup",
                    "aws:RequestTag/elbv2.k8s.aws/cluster": cluster,
                }
            },
        ),
        # A tag that says whose a thing is can be neither given to nor taken from what is there.
        _allow(
            "TagOwnGroups",
            ["ec2:CreateTags", "ec2:DeleteTags"],
            groups,
            {**own, "Null": {"aws:RequestTag/elbv2.k8s.aws/cluster": "true"}},
        ),
        _allow(
            "ChangeOwnGroups",
            ["ec2:AuthorizeSecurityGroupIngress", "ec2:RevokeSecurityGroupIngress", "ec2:DeleteSecurityGroup"],
            groups,
            own,
        ),
        _allow(
            "OpenNodes",
            ["ec2:AuthorizeSecurityGroupIngress", "ec2:RevokeSecurityGroupIngress"],
            groups,
            {"StringEquals": {f"aws:ResourceTag/kubernetes.io/cluster/{cluster}": "owned"}},
        ),
        _allow("Make", [f"{elb}:CreateLoadBalancer", f"{elb}:CreateTargetGroup"], [*balancers, targets], asked),
        _allow(
            "TagNew",
            [f"{elb}:AddTags"],
            [*balancers, targets],
            {
                "StringEquals": {
                    f"{elb}:CreateAction": ["CreateTargetGroup", "CreateLoadBalancer"],
                    "aws:RequestTag/elbv2.k8s.aws/cluster": cluster,
                }
            },
        ),
        _allow(
            "TagOwn",
            [f"{elb}:AddTags", f"{elb}:RemoveTags"],
            [*balancers, targets],
            {**own, "Null": {"aws:RequestTag/elbv2.k8s.aws/cluster": "true"}},
        ),
        _allow("TagListeners", [f"{elb}:AddTags", f"{elb}:RemoveTags"], [*listeners, *rules]),
        _allow(
            "ChangeOwn",
            [
                f"{elb}:{action}"
                for action in (
                    "DeleteLoadBalancer",
                    "DeleteTargetGroup",
                    "DeregisterTargets",
                    "ModifyCapacityReservation",
                    "ModifyIpPools",
                    "ModifyLoadBalancerAttributes",
                    "ModifyTargetGroup",
                    "ModifyTargetGroupAttributes",
                    "RegisterTargets",
                    "SetIpAddressType",
                    "SetSecurityGroups",
                    "SetSubnets",
                )
            ],
            [*balancers, targets],
            own,
        ),
        _allow(
            "Listen",
            [
                f"{elb}:{action}"
                for action in (
                    "AddListenerCertificates",
                    "CreateListener",
                    "CreateRule",
                    "DeleteListener",
                    "DeleteRule",
                    "ModifyListener",
                    "ModifyListenerAttributes",
                    "ModifyRule",
                    "RemoveListenerCertificates",
                    "SetRulePriorities",
                )
            ],
            [*balancers, *listeners, *rules],
        ),
    )


def external_secrets_policy(prefix: str, region: str, partition: str = "aws", kms_key_arn: str = "") -> dict[str, Any]:
    """Return the policy that lets its holder read the secrets whose names begin with ``prefix``, and nothing else.

    ``kms_key_arn`` is the key that encrypts them, or empty for AWS's own.
    Source: external-secrets.io, provider "AWS Secrets Manager"; its ListSecrets, for finding by tag, reaches beyond one
    prefix and is left out.
    """
    statements = [
        _allow(
            "Read",
            ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"],
            f"arn:{partition}:secretsmanager:{region}:*:secret:{prefix}*",
        )
    ]
    if kms_key_arn:
        statements.append(
            _allow(
                "Decrypt",
                ["kms:Decrypt"],
                kms_key_arn,
                {"StringLike": {"kms:ViaService": f"secretsmanager.{region}.amazonaws.com*"}},
            )
        )
    return _policy(*statements)


def ebs_encryption_policy(kms_key_arn: str) -> dict[str, Any]:
    """Return the policy that lets its holder make and attach disks encrypted with one KMS key.

    Source: kubernetes-sigs/aws-ebs-csi-driver, docs/install.md, "KMS"; grants only for AWS's own services.
    """
    return _policy(
        _allow("GrantKey", ["kms:CreateGrant"], kms_key_arn, {"Bool": {"kms:GrantIsForAWSResource": "true"}}),
        _allow(
            "UseKey",
            [
                "kms:Decrypt",
                "kms:DescribeKey",
                "kms:GenerateDataKeyWithoutPlaintext",
                "kms:ReEncryptFrom",
                "kms:ReEncryptTo",
            ],
            kms_key_arn,
        ),
    )


def irsa_roles(
    accounts: Iterable[Mapping[str, Any]], cluster: str, provider_arn: str, issuer: str
) -> list[dict[str, Any]]:
    """Return roles for service accounts, as the module aws_iam_roles takes them: trusted by token, not by pod identity.

    Each of ``accounts`` has namespace and service_account, and optionally name, managed_policies, inline_policies and
    boundary. A role trusts one service account of one cluster: both subject and audience of its tokens are compared.
    Source: EKS user guide, "IAM roles for service accounts". Raises ``ValueError`` for an account named twice.
    """
    roles: dict[tuple[str, str], dict[str, Any]] = {}
    for account in accounts:
        key = (str(account["namespace"]), str(account["service_account"]))
        if key in roles:
            raise ValueError(f"eks_irsa lists {key[0]}/{key[1]} twice: a service account has one role")
        subject = f"system:serviceaccount:{key[0]}:{key[1]}"
        trust = {
            "Effect": "Allow",
            "Principal": {"Federated": provider_arn},
            "Action": ["sts:AssumeRoleWithWebIdentity"],
            "Condition": {"StringEquals": {f"{issuer}:sub": subject, f"{issuer}:aud": "sts.amazonaws.com"}},
        }
        name = str(account.get("name") or f"{cluster}-irsa-{key[0]}-{key[1]}")
        if len(name) > 64 and not account.get("name"):
            name = f"{name[:55]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        roles[key] = {
            "name": name,
            "path": f"/rayplane/{cluster}/",
            "description": f"{key[0]}/{key[1]} in {cluster}",
            "trust": {"Version": VERSION, "Statement": [trust]},
            **{
                option: account[option]
                for option in ("managed_policies", "inline_policies", "boundary")
                if option in account
            },
        }
    return list(roles.values())


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "aws_partition": aws_partition,
            "aws_service_trust": aws_service_trust,
            "bucket_reader_policy": bucket_reader_policy,
            "cluster_autoscaler_policy": cluster_autoscaler_policy,
            "ebs_encryption_policy": ebs_encryption_policy,
            "external_secrets_policy": external_secrets_policy,
            "irsa_roles": irsa_roles,
            "karpenter_policy": karpenter_policy,
            "load_balancer_controller_policy": load_balancer_controller_policy,
        }
