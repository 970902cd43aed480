# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Everything in an AWS account that belongs to one cluster, whoever made it: the roles here, EKS, or Kubernetes.

Three marks tell what belongs to a cluster: our owner tag, a tag that EKS or a controller in the cluster sets, or one of
the few names that are made without tags. What bears another owner's tag never belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    tag_dict,
)

__all__ = ["KARPENTER_TAGS", "KEEP_TAG", "PVC_TAGS", "Item", "Sweep", "belongs", "kubernetes_tags"]

#: On volumes that stay when the cluster goes: their PersistentVolume had the reclaim policy Retain. Value: its name.
KEEP_TAG = "rayplane.io/keep"
#: Keys that the EBS CSI driver and its predecessor put on volumes of PersistentVolumeClaims, and on no others.
PVC_TAGS = ("kubernetes.io/created-for/pvc/name", "ebs.csi.aws.com/cluster", "CSIVolumeName")
#: Keys that Karpenter puts on what it starts.
KARPENTER_TAGS = ("karpenter.sh/nodepool", "karpenter.sh/nodeclaim")

# The tags' keys whose value is the cluster's name: EBS CSI driver (KubernetesCluster, ebs.csi...), AWS Load Balancer
# Controller (elbv2...), VPC CNI (cluster.k8s...), EKS and its node groups (eks:, aws:eks:), Karpenter (eks:eks-...).
_NAMED = (
    "KubernetesCluster",
    "ebs.csi.aws.com/cluster-name",
    "elbv2.k8s.aws/cluster",
    "cluster.k8s.amazonaws.com/name",
    "eks:cluster-name",
    "aws:eks:cluster-name",
    "eks:eks-cluster-name",
)


def kubernetes_tags(cluster: str) -> dict[str, str]:
    """Return the tags by which EKS and controllers mark what they make for a cluster."""
    return {f"kubernetes.io/cluster/{cluster}": "owned", **dict.fromkeys(_NAMED, cluster)}


def belongs(tags: Mapping[str, str], cluster: str) -> str:
    """Return by what mark something belongs to the cluster: ``owner``, ``kubernetes``, or nothing."""
    owner = tags.get(OWNER_TAG)
    if owner not in (None, cluster):
        return ""
    if any(tags.get(key) == value for key, value in kubernetes_tags(cluster).items()):
        return "kubernetes"
    return "owner" if owner else ""


@dataclass
class Item:
    """One thing that is there. ``mark`` is ``owner``, ``kubernetes`` or ``name``."""

    kind: str
    id: str
    name: str
    mark: str
    state: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """How it is named to people."""
        return f"{self.kind} {self.id}" if self.name in ("", self.id) else f"{self.kind} {self.name} ({self.id})"


@dataclass(frozen=True)
class _Ec2Kind:
    kind: str
    operation: str
    key: str
    id: str
    name: str = ""
    #: Where the state stands (dots go deeper), and the states that mean: gone.
    state: str = "State"
    gone: tuple[str, ...] = ()
    paged: bool = True
    filters: str = "Filters"
    #: Whether the call filters by tags; otherwise all of a kind are listed, and looked at here.
    by_tag: bool = True
    more: tuple[tuple[str, Any], ...] = ()


_EC2_KINDS = (
    _Ec2Kind("VPC", "describe_vpcs", "Vpcs", "VpcId"),
    _Ec2Kind("subnet", "describe_subnets", "Subnets", "SubnetId"),
    _Ec2Kind("route table", "describe_route_tables", "RouteTables", "RouteTableId"),
    _Ec2Kind("internet gateway", "describe_internet_gateways", "InternetGateways", "InternetGatewayId"),
    _Ec2Kind(
        "egress-only internet gateway",
        "describe_egress_only_internet_gateways",
        "EgressOnlyInternetGateways",
        "EgressOnlyInternetGatewayId",
    ),
    _Ec2Kind(
        "NAT gateway",
        "describe_nat_gateways",
        "NatGateways",
        "NatGatewayId",
        gone=("deleted", "failed"),
        filters="Filter",
    ),
    _Ec2Kind("address", "describe_addresses", "Addresses", "AllocationId", paged=False),
    _Ec2Kind(
        "VPC endpoint",
        "describe_vpc_endpoints",
        "VpcEndpoints",
        "VpcEndpointId",
        gone=("deleted", "deleting", "failed", "rejected", "expired"),
    ),
    _Ec2Kind("security group", "describe_security_groups", "SecurityGroups", "GroupId", name="GroupName"),
    _Ec2Kind("network ACL", "describe_network_acls", "NetworkAcls", "NetworkAclId"),
    _Ec2Kind(
        "network interface",
        "describe_network_interfaces",
        "NetworkInterfaces",
        "NetworkInterfaceId",
        name="Description",
        state="Status",
    ),
    _Ec2Kind("flow log", "describe_flow_logs", "FlowLogs", "FlowLogId", state="FlowLogStatus", filters="Filter"),
    _Ec2Kind(
        "VPC peering connection",
        "describe_vpc_peering_connections",
        "VpcPeeringConnections",
        "VpcPeeringConnectionId",
        state="Status.Code",
        gone=("deleted", "deleting", "rejected", "expired", "failed"),
    ),
    _Ec2Kind(
        "launch template",
        "describe_launch_templates",
        "LaunchTemplates",
        "LaunchTemplateId",
        name="LaunchTemplateName",
    ),
    _Ec2Kind(
        "placement group",
        "describe_placement_groups",
        "PlacementGroups",
        "GroupId",
        name="GroupName",
        gone=("deleted",),
        paged=False,
    ),
    _Ec2Kind(
        "instance",
        "describe_instances",
        "Reservations",
        "InstanceId",
        state="State.Name",
        gone=("terminated", "shutting-down"),
    ),
    _Ec2Kind("volume", "describe_volumes", "Volumes", "VolumeId", gone=("deleting", "deleted")),
    _Ec2Kind("snapshot", "describe_snapshots", "Snapshots", "SnapshotId", more=(("OwnerIds", ["self"]),)),
    _Ec2Kind("key pair", "describe_key_pairs", "KeyPairs", "KeyPairId", name="KeyName", paged=False),
    _Ec2Kind(
        "prefix list",
        "describe_managed_prefix_lists",
        "PrefixLists",
        "PrefixListId",
        name="PrefixListName",
        by_tag=False,
    ),
    _Ec2Kind("DHCP options", "describe_dhcp_options", "DhcpOptions", "DhcpOptionsId"),
    _Ec2Kind(
        "spot request",
        "describe_spot_instance_requests",
        "SpotInstanceRequests",
        "SpotInstanceRequestId",
        gone=("cancelled", "closed", "failed"),
    ),
)
# What describe_tags calls the kinds above: anything else it lists is of a kind that nobody here knows.
_TAG_KINDS = {
    "vpc",
    "subnet",
    "route-table",
    "internet-gateway",
    "egress-only-internet-gateway",
    "natgateway",
    "elastic-ip",
    "vpc-endpoint",
    "security-group",
    "security-group-rule",
    "network-acl",
    "network-interface",
    "vpc-flow-log",
    "vpc-peering-connection",
    "launch-template",
    "placement-group",
    "instance",
    "volume",
    "snapshot",
    "key-pair",
    "prefix-list",
    "dhcp-options",
    "spot-instances-request",
    # An attribute of an instance, gone with it, and described without tags.
    "reserved-instances",
}
# Services whose resources are looked at one by one below; the tagging API lags behind them by minutes.
_LOOKED_AT = ("ec2", "eks", "iam", "s3", "kms", "elasticfilesystem", "elasticloadbalancing", "sqs", "events", "logs")
_ABSENT_KEYS = ("PendingDeletion", "PendingReplicaDeletion")


class Sweep:
    """Looks at one region of one account. ``client`` makes a boto3 client of a service."""

    def __init__(self, cluster: str, client: Callable[[str], Any], changes: Changes, names: Sequence[str] = ()) -> None:
        self.cluster = cluster
        #: Further names that are the cluster's own, of roles and buckets.
        self.names = set(names)
        self.unanswered: list[str] = []
        self._client = client
        self._changes = changes
        self._apis: dict[str, Api] = {}

    def api(self, service: str) -> Api:
        """The calls of one service."""
        if service not in self._apis:
            self._apis[service] = Api(self._client(service), self._changes)
        return self._apis[service]

    def everything(self) -> list[Item]:
        """Everything of the cluster. What an essential service refuses to say is an error; others are noted in
        ``unanswered``."""
        items = [*self.ec2(), *self.eks(), *self.iam(), *self.buckets()]
        optional: list[tuple[str, Callable[[], Iterable[Item]]]] = [
            ("elbv2", self.load_balancers),
            ("elb", self.classic_load_balancers),
            ("kms", self.keys),
            ("efs", self.file_systems),
            ("fsx", self.fsx),
            ("sqs", self.queues),
            ("events", self.rules),
            ("logs", self.log_groups),
            ("autoscaling", self.scaling_groups),
            ("resourcegroupstaggingapi", self.tagged),
        ]
        for service, look in optional:
            items += self.attempt(service, look)
        return items

    def attempt(self, service: str, look: Callable[[], Iterable[Item]]) -> list[Item]:
        """What ``look`` finds; a refusal is noted and finds nothing."""
        try:
            return list(look())
        except PlatformError as error:
            self.unanswered.append(f"{service}: {error}")
            return []

    def _item(self, kind: str, id_: str, name: str, tags: Mapping[str, str], **more: Any) -> Iterator[Item]:
        mark = belongs(tags, self.cluster)
        if mark:
            yield Item(kind, id_, tags.get("Name") or name, mark, tags=dict(tags), **more)

    # EC2

    def ec2(self, only: Sequence[str] = ()) -> Iterator[Item]:
        """Everything that EC2's API calls its own, or the kinds named."""
        for kind in _EC2_KINDS:
            if not only or kind.kind in only:
                yield from self._ec2_kind(kind)
        if not only:
            for tag in self._pages("ec2", "describe_tags", "Tags", Filters=self._owner_filter()):
                if tag["ResourceType"] not in _TAG_KINDS and tag.get("Value") == self.cluster:
                    yield Item(tag["ResourceType"], tag["ResourceId"], "", "owner", tags={OWNER_TAG: self.cluster})

    def _owner_filter(self) -> list[dict[str, Any]]:
        return [{"Name": "key", "Values": [OWNER_TAG]}, {"Name": "value", "Values": [self.cluster]}]

    def _ec2_kind(self, kind: _Ec2Kind) -> Iterator[Item]:
        keys = [OWNER_TAG, *kubernetes_tags(self.cluster)]
        arguments = dict(kind.more)
        if kind.by_tag:
            arguments[kind.filters] = [{"Name": "tag-key", "Values": keys}]
        if kind.paged:
            found = self._pages("ec2", kind.operation, kind.key, **arguments)
        else:
            found = self.api("ec2").read(kind.operation, self.cluster, **arguments).get(kind.key, [])
        if kind.kind == "instance":
            found = [instance for reservation in found for instance in reservation.get("Instances", [])]
        for one in found:
            state: Any = one
            for part in kind.state.split("."):
                state = state.get(part, "") if isinstance(state, dict) else ""
            if str(state).lower() in kind.gone:
                continue
            tags = tag_dict(one.get("Tags") or one.get("TagSet"))
            yield from self._item(
                kind.kind,
                one[kind.id],
                str(one.get(kind.name, "")) if kind.name else "",
                tags,
                state=str(state),
                raw=one,
            )

    def _pages(self, service: str, operation: str, key: str, **arguments: Any) -> list[Any]:
        items: list[Any] = self.api(service).pages(operation, key, self.cluster, **arguments)
        return items

    # Load balancers

    def load_balancers(self) -> Iterator[Item]:
        """Load balancers and target groups of ELB's second API."""
        for kind, operation, key, arn, name in (
            ("load balancer", "describe_load_balancers", "LoadBalancers", "LoadBalancerArn", "LoadBalancerName"),
            ("target group", "describe_target_groups", "TargetGroups", "TargetGroupArn", "TargetGroupName"),
        ):
            found = {one[arn]: one for one in self._pages("elbv2", operation, key)}
            arns = list(found)
            for start in range(0, len(arns), 20):  # so many a call of DescribeTags
                answer = self.api("elbv2").read("describe_tags", kind, ResourceArns=arns[start : start + 20])
                for described in answer["TagDescriptions"]:
                    one = found[described["ResourceArn"]]
                    yield from self._item(kind, one[arn], one[name], tag_dict(described.get("Tags")), raw=one)

    def classic_load_balancers(self) -> Iterator[Item]:
        """Load balancers of ELB's first API, which Services get where no load balancer controller runs."""
        answer = self.api("elb").read("describe_load_balancers", self.cluster)
        found = {one["LoadBalancerName"]: one for one in answer.get("LoadBalancerDescriptions", [])}
        names = list(found)
        for start in range(0, len(names), 20):
            answer = self.api("elb").read(
                "describe_tags", "load balancers", LoadBalancerNames=names[start : start + 20]
            )
            for described in answer["TagDescriptions"]:
                name = described["LoadBalancerName"]
                tags = tag_dict(described.get("Tags"))
                yield from self._item("classic load balancer", name, name, tags, raw=found[name])

    # EKS, IAM

    def eks(self) -> Iterator[Item]:
        """The cluster itself; node groups, add-ons and access entries are part of it."""
        answer = self.api("eks").read(
            "describe_cluster", self.cluster, absent=("ResourceNotFoundException",), name=self.cluster
        )
        if answer:
            cluster = answer["cluster"]
            yield Item("EKS cluster", self.cluster, self.cluster, "name", cluster["status"], cluster.get("tags") or {})

    def iam(self) -> Iterator[Item]:
        """Roles, customer-managed policies, instance profiles and OIDC providers."""
        for role in self._pages("iam", "list_roles", "Roles"):
            if self._named_alike(role["RoleName"]):
                tags = self._iam_tags("list_role_tags", RoleName=role["RoleName"])
                yield from self._named_item("IAM role", role["RoleName"], role["Arn"], tags)
        for policy in self._pages("iam", "list_policies", "Policies", Scope="Local"):
            if self._named_alike(policy["PolicyName"]):
                tags = self._iam_tags("list_policy_tags", PolicyArn=policy["Arn"])
                yield from self._named_item("IAM policy", policy["PolicyName"], policy["Arn"], tags)
        yield from self.instance_profiles()
        for provider in self.api("iam").read("list_open_id_connect_providers", self.cluster)[
            "OpenIDConnectProviderList"
        ]:
            arn = provider["Arn"]
            tags = self._iam_tags("list_open_id_connect_provider_tags", OpenIDConnectProviderArn=arn)
            yield from self._item("OIDC provider", arn, "", tags)

    def instance_profiles(self) -> Iterator[Item]:
        """Instance profiles; Karpenter makes its own."""
        for profile in self._pages("iam", "list_instance_profiles", "InstanceProfiles"):
            name = profile["InstanceProfileName"]
            if self._named_alike(name):
                tags = self._iam_tags("list_instance_profile_tags", InstanceProfileName=name)
                yield from self._named_item("instance profile", name, profile["Arn"], tags, raw=profile)

    def _iam_tags(self, operation: str, **identity: str) -> dict[str, str]:
        answer = self.api("iam").read(operation, next(iter(identity.values())), absent=("NoSuchEntity",), **identity)
        tags: dict[str, str] = tag_dict((answer or {}).get("Tags"))
        return tags

    def _named_alike(self, name: str) -> bool:
        return name in self.names or name.startswith(self.cluster)

    def _named_item(self, kind: str, name: str, id_: str, tags: Mapping[str, str], **more: Any) -> Iterator[Item]:
        """Something that is the cluster's by its tags, or untagged by one of the exact names."""
        found = list(self._item(kind, id_, name, tags, **more))
        if not found and name in self.names and OWNER_TAG not in tags:
            found = [Item(kind, id_, name, "name", tags=dict(tags), **more)]
        for item in found:
            item.name = name
            yield item

    # Storage

    def buckets(self) -> Iterator[Item]:
        """Buckets by their names; one whose name tells nothing is found by the tagging API."""
        for bucket in self.api("s3").read("list_buckets", self.cluster).get("Buckets", []):
            if self._named_alike(bucket["Name"]):
                yield from self._bucket(bucket["Name"])

    def _bucket(self, name: str) -> Iterator[Item]:
        absent = ("NoSuchTagSet", "NoSuchBucket", "NoSuchTagSetError")
        answer = self.api("s3").read("get_bucket_tagging", f"bucket {name}", absent=absent, Bucket=name)
        yield from self._named_item("bucket", name, name, tag_dict((answer or {}).get("TagSet")))

    def holds_data(self, bucket: str) -> bool:
        """Whether a bucket holds an object, an older version or a delete marker."""
        answer = self.api("s3").read("list_object_versions", f"bucket {bucket}", Bucket=bucket, MaxKeys=1)
        return bool(answer.get("Versions") or answer.get("DeleteMarkers"))

    def keys(self) -> Iterator[Item]:
        """KMS keys with our tag that are not waiting for their deletion."""
        for entry in self._pages("kms", "list_keys", "Keys"):
            key = entry["KeyId"]
            # A key of another service or owner may refuse to tell its tags; it is not ours then.
            try:
                tags = self.api("kms").read("list_resource_tags", f"key {key}", KeyId=key).get("Tags", [])
            except PlatformError:
                continue
            named = {tag["TagKey"]: tag["TagValue"] for tag in tags}
            if not belongs(named, self.cluster):
                continue
            described = self.api("kms").read("describe_key", f"key {key}", KeyId=key)["KeyMetadata"]
            if described["KeyState"] not in _ABSENT_KEYS:
                yield from self._item("KMS key", described["Arn"], "", named, state=described["KeyState"])
        own = {f"alias/{name}" for name in (self.cluster, *self.names)}
        for alias in self._pages("kms", "list_aliases", "Aliases"):
            name, key = alias["AliasName"], alias.get("TargetKeyId")
            if name in own and key:
                # An alias goes with its key.
                described = self.api("kms").read("describe_key", name, absent=("NotFoundException",), KeyId=key)
                if described and described["KeyMetadata"]["KeyState"] not in _ABSENT_KEYS:
                    yield Item("KMS alias", name, name, "name")

    def file_systems(self) -> Iterator[Item]:
        """EFS file systems and access points."""
        for system in self._pages("efs", "describe_file_systems", "FileSystems"):
            state = system.get("LifeCycleState", "")
            if state not in ("deleting", "deleted"):
                tags = tag_dict(system.get("Tags"))
                yield from self._item(
                    "EFS file system", system["FileSystemId"], system.get("Name", ""), tags, state=state, raw=system
                )
        for point in self._pages("efs", "describe_access_points", "AccessPoints"):
            if point.get("LifeCycleState") not in ("deleting", "deleted"):
                tags = tag_dict(point.get("Tags"))
                yield from self._item("EFS access point", point["AccessPointId"], "", tags, raw=point)

    def fsx(self) -> Iterator[Item]:
        """FSx file systems."""
        for system in self._pages("fsx", "describe_file_systems", "FileSystems"):
            if system.get("Lifecycle") != "DELETING":
                yield from self._item("FSx file system", system["FileSystemId"], "", tag_dict(system.get("Tags")))

    # Messages, logs, groups

    def queues(self) -> Iterator[Item]:
        """SQS queues."""
        for url in self.api("sqs").read("list_queues", self.cluster, QueueNamePrefix=self.cluster).get("QueueUrls", []):
            name = url.rpartition("/")[2]
            answer = self.api("sqs").read(
                "list_queue_tags",
                name,
                absent=("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"),
                QueueUrl=url,
            )
            yield from self._named_item("queue", name, url, (answer or {}).get("Tags") or {})

    def rules(self) -> Iterator[Item]:
        """EventBridge rules of the default bus."""
        for rule in self.api("events").read("list_rules", self.cluster, NamePrefix=self.cluster).get("Rules", []):
            answer = self.api("events").read("list_tags_for_resource", rule["Name"], ResourceARN=rule["Arn"])
            yield from self._named_item("event rule", rule["Name"], rule["Arn"], tag_dict(answer.get("Tags")))

    def log_groups(self) -> Iterator[Item]:
        """Log groups of the cluster: EKS and the CloudWatch agent make them without tags."""
        made = (f"/aws/eks/{self.cluster}/", f"/aws/containerinsights/{self.cluster}/")
        for prefix in (*made, f"/aws/vpc/{self.cluster}", f"/{self.cluster}", self.cluster):
            for group in self._pages("logs", "describe_log_groups", "logGroups", logGroupNamePrefix=prefix):
                name = group["logGroupName"]
                arn = str(group.get("logGroupArn") or group.get("arn", "")).removesuffix(":*")
                answer = self.api("logs").read(
                    "list_tags_for_resource", name, absent=("ResourceNotFoundException",), resourceArn=arn
                )
                tags = (answer or {}).get("tags") or {}
                if name.startswith(made) and tags.get(OWNER_TAG, self.cluster) == self.cluster:
                    yield Item("log group", name, name, "kubernetes", tags=tags)
                else:
                    yield from self._named_item("log group", name, name, tags)

    def scaling_groups(self) -> Iterator[Item]:
        """Auto Scaling groups, which EKS makes for node groups."""
        for group in self._pages("autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups"):
            name = group["AutoScalingGroupName"]
            if group.get("Status") != "Delete in progress":
                yield from self._item("Auto Scaling group", name, name, tag_dict(group.get("Tags")))

    def tagged(self) -> Iterator[Item]:
        """What the tagging API lists of services that nobody looked at, and buckets of any name."""
        filters = [{"Key": OWNER_TAG, "Values": [self.cluster]}]
        for entry in self._pages(
            "resourcegroupstaggingapi", "get_resources", "ResourceTagMappingList", TagFilters=filters
        ):
            arn = entry["ResourceARN"]
            service = arn.split(":")[2]
            if service == "s3" and not self._named_alike(arn.rpartition(":")[2]):
                yield from self._bucket(arn.rpartition(":")[2])
            elif service not in (*_LOOKED_AT, "autoscaling", "fsx"):
                yield Item(f"{service} resource", arn, "", "owner", tags=tag_dict(entry.get("Tags")))
