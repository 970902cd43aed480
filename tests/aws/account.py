"""An AWS account seen by boto3 alone: what is in it, how many of each kind, and whether anything is left."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

# One for all accounts: a session keeps the services' descriptions, which are large.
_SESSION = boto3.Session()
OWNER_TAG = "rayplane.io/cluster"
GONE = ("deleted", "deleting", "terminated", "shutting-down", "failed")

# Kind -> service, listing, key of its items, name of an item. Everything a deployment makes, and what Kubernetes makes.
LISTINGS: dict[str, tuple[str, str, str, str]] = {
    "VPC": ("ec2", "describe_vpcs", "Vpcs", "VpcId"),
    "subnet": ("ec2", "describe_subnets", "Subnets", "SubnetId"),
    "internet gateway": ("ec2", "describe_internet_gateways", "InternetGateways", "InternetGatewayId"),
    "NAT gateway": ("ec2", "describe_nat_gateways", "NatGateways", "NatGatewayId"),
    "address": ("ec2", "describe_addresses", "Addresses", "AllocationId"),
    "route table": ("ec2", "describe_route_tables", "RouteTables", "RouteTableId"),
    "VPC endpoint": ("ec2", "describe_vpc_endpoints", "VpcEndpoints", "VpcEndpointId"),
    "security group": ("ec2", "describe_security_groups", "SecurityGroups", "GroupId"),
    "flow log": ("ec2", "describe_flow_logs", "FlowLogs", "FlowLogId"),
    "VPC peering": ("ec2", "describe_vpc_peering_connections", "VpcPeeringConnections", "VpcPeeringConnectionId"),
    "launch template": ("ec2", "describe_launch_templates", "LaunchTemplates", "LaunchTemplateName"),
    "placement group": ("ec2", "describe_placement_groups", "PlacementGroups", "GroupName"),
    "volume": ("ec2", "describe_volumes", "Volumes", "VolumeId"),
    "network interface": ("ec2", "describe_network_interfaces", "NetworkInterfaces", "NetworkInterfaceId"),
    "cluster": ("eks", "list_clusters", "clusters", ""),
    "role": ("iam", "list_roles", "Roles", "RoleName"),
    "instance profile": ("iam", "list_instance_profiles", "InstanceProfiles", "InstanceProfileName"),
    "OIDC provider": ("iam", "list_open_id_connect_providers", "OpenIDConnectProviderList", "Arn"),
    "repository": ("ecr", "describe_repositories", "repositories", "repositoryName"),
    "bucket": ("s3", "list_buckets", "Buckets", "Name"),
    "alias": ("kms", "list_aliases", "Aliases", "AliasName"),
    "file system": ("efs", "describe_file_systems", "FileSystems", "FileSystemId"),
    "load balancer": ("elbv2", "describe_load_balancers", "LoadBalancers", "LoadBalancerName"),
    "target group": ("elbv2", "describe_target_groups", "TargetGroups", "TargetGroupName"),
    "queue": ("sqs", "list_queues", "QueueUrls", ""),
    "event rule": ("events", "list_rules", "Rules", "Name"),
    "log group": ("logs", "describe_log_groups", "logGroups", "logGroupName"),
    "autoscaling group": ("autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups", "AutoScalingGroupName"),
}


class Account:
    """One account of the emulator: its number is the access key."""

    def __init__(self, number: str, endpoint: str, region: str = "us-west-2") -> None:
        self.number, self.endpoint, self.region = number, endpoint, region
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        """Return the client of a service."""
        if service not in self._clients:
            config = Config(retries={"total_max_attempts": 2}, connect_timeout=5, read_timeout=20)
            self._clients[service] = _SESSION.client(
                service,
                endpoint_url=self.endpoint,
                region_name=self.region,
                aws_access_key_id=self.number,
                aws_secret_access_key="test",
                config=config,
            )
        return self._clients[service]

    @property
    def ec2(self) -> Any:
        """The client of EC2."""
        return self.client("ec2")

    @property
    def environment(self) -> dict[str, Any]:
        """The variables that send a run of Ansible into this account."""
        return {
            "platform_aws_access_key_id": self.number,
            "platform_aws_secret_access_key": "test",
            "platform_aws_endpoint_url": self.endpoint,
            # Outside dev it is demanded; nobody is asked for this machine's own address.
            "eks_endpoint_public_cidrs": ["8.8.8.0/24"],
            "platform_address_url": "",
            # No hub is asked; production's models are gated.
            "platform_hub_url": "",
            "secrets_hugging_face_token": f"hf_{'a' * 34}",
            # Preflight looks for the tools of all stages; those of Kubernetes do not run here.
            "autoscaler_helm": sys.executable,
            "load_balancer_controller_helm": sys.executable,
            "kuberay_kubectl": sys.executable,
            "verify_kubectl": sys.executable,
            "kuberay_kustomize_source": str(Path(__file__).parent),
            # Nor is an image built here, where it is not asked for.
            "gateway_image": "registry.of.ours/rayplane/gateway:1",
        }

    # What is there

    def items(self, kind: str) -> list[Any]:
        """Return what there is of a kind, without what AWS itself puts into every account."""
        if kind == "key":
            return list(self._keys())
        if kind == "instance":
            answer = self.ec2.describe_instances()["Reservations"]
            return [one for each in answer for one in each["Instances"] if one["State"]["Name"] not in GONE]
        service, operation, key, _ = LISTINGS[kind]
        client = self.client(service)
        pages = (
            client.get_paginator(operation).paginate()
            if client.can_paginate(operation)
            else [getattr(client, operation)()]
        )
        keep = _KEEP.get(kind, lambda _: True)
        return [item for page in pages for item in page.get(key) or [] if not _gone(item) and keep(item)]

    def names(self, kind: str) -> list[str]:
        """Return the names or ids of what there is of a kind; those in the region's default VPC do not count."""
        items = self.items(kind)
        if kind in ("subnet", "internet gateway", "route table", "security group", "network interface"):
            default = {vpc["VpcId"] for vpc in self.ec2.describe_vpcs()["Vpcs"] if vpc.get("IsDefault")}
            items = [item for item in items if not default & _vpcs(item)]
        name = {"key": "KeyId", "instance": "InstanceId"}.get(kind) or LISTINGS[kind][3]
        return [item[name] if name else item for item in items]

    def counts(self) -> Counter[str]:
        """Count everything in the account, by kind; kinds of which there is nothing are left out."""
        return Counter({kind: len(names) for kind in (*LISTINGS, "key", "instance") if (names := self.names(kind))})

    def sweep(self) -> dict[str, list[str]]:
        """Return everything that is left in the account, by kind."""
        return {kind: names for kind in (*LISTINGS, "key", "instance") if (names := self.names(kind))}

    def owned(self, kind: str, cluster: str) -> list[dict[str, Any]]:
        """Return the EC2 resources of a kind that bear the cluster's tag."""
        return [item for item in self.items(kind) if tags(item).get(OWNER_TAG) == cluster]

    def named(self, kind: str, cluster: str, name: str) -> dict[str, Any]:
        """Return the one EC2 resource of a cluster and kind with this Name."""
        found = [item for item in self.owned(kind, cluster) if tags(item).get("Name") == name]
        assert len(found) == 1, f"{kind} {name}: {found or sorted(tags(i).get('Name', '') for i in self.items(kind))}"
        return found[0]

    def _keys(self) -> Iterator[dict[str, Any]]:
        kms = self.client("kms")
        for page in kms.get_paginator("list_keys").paginate():
            for key in page["Keys"]:
                about = kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"]
                if about["KeyState"] != "PendingDeletion" and about.get("KeyManager", "CUSTOMER") == "CUSTOMER":
                    yield about


def tags(item: dict[str, Any]) -> dict[str, str]:
    """Return EC2's tags as a mapping."""
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags", ())}


def _gone(item: Any) -> bool:
    state = item.get("State", item.get("Status", "")) if isinstance(item, dict) else ""
    return str(state.get("Code", "") if isinstance(state, dict) else state).lower() in GONE


def _vpcs(item: dict[str, Any]) -> set[str]:
    return {item["VpcId"]} if "VpcId" in item else {one.get("VpcId", "") for one in item.get("Attachments", ())}


# What AWS makes itself is nobody's to remove.
_KEEP: dict[str, Callable[[Any], bool]] = {
    "VPC": lambda vpc: not vpc.get("IsDefault"),
    "route table": lambda table: not any(one.get("Main") for one in table.get("Associations", ())),
    "security group": lambda group: group["GroupName"] != "default",
    "role": lambda role: "/aws-service-role/" not in role["Path"],
    "alias": lambda alias: not alias["AliasName"].startswith("alias/aws/"),
    "event rule": lambda rule: not rule.get("ManagedBy"),
}
