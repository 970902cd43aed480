"""Look at, fill or sweep the scenario's AWS account with the SDK alone: `account.py --cluster NAME VERB`."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "aws"))

from account import Account  # type: ignore[import-not-found,unused-ignore]

ANYWHERE = "0.0.0.0/0"


class Scenario:
    """The account, seen for one cluster."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self.account = Account(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_ENDPOINT_URL"])
        self.buckets = [f"{cluster}-{kind}" for kind in ("models", "datasets", "logs")]

    def check(self) -> None:
        """Assert that the account holds what the roles promise; of the security groups one is the cluster's own."""
        expected = {
            **{"VPC": 1, "subnet": 9, "internet gateway": 1, "NAT gateway": 3, "address": 3, "route table": 5},
            **{"VPC endpoint": 7, "security group": 4, "flow log": 1, "launch template": 8, "cluster": 1},
            **{"bucket": 3, "key": 1, "alias": 1, "queue": 1, "event rule": 5, "file system": 1, "OIDC provider": 1},
            **{"instance": 1, "placement group": 1},
        }
        counts = {kind: self.account.counts()[kind] for kind in expected}
        assert counts == expected, counts
        self._check_routes()
        s3 = self.account.client("s3")
        for bucket in self.buckets:
            assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
            block = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
            assert all(block.values()), block
            policy = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
            conditions = [statement.get("Condition") for statement in policy["Statement"]]
            assert {"Bool": {"aws:SecureTransport": "false"}} in conditions, policy
        self._check_cluster()

    def _check_routes(self) -> None:
        nats = {nat["SubnetId"]: nat["NatGatewayId"] for nat in self.account.owned("NAT gateway", self.cluster)}
        public = {
            subnet["SubnetId"]: subnet["AvailabilityZone"]
            for subnet in self.account.owned("subnet", self.cluster)
            if subnet["MapPublicIpOnLaunch"]
        }
        for subnet, nat in nats.items():
            table = self.account.named("route table", self.cluster, f"{self.cluster}-private-{public[subnet]}")
            (route,) = [route for route in table["Routes"] if route.get("DestinationCidrBlock") == ANYWHERE]
            assert route["NatGatewayId"] == nat, (subnet, route)
            assert len(table["Associations"]) == 1

    def _check_cluster(self) -> None:
        eks: Any = self.account.client("eks")
        cluster = eks.describe_cluster(name=self.cluster)["cluster"]
        defaults = yaml.safe_load((ROOT / "roles/eks/defaults/main.yml").read_text(encoding="utf-8"))
        assert cluster["version"] == defaults["eks_kubernetes_version"], cluster["version"]
        intra = {
            subnet["SubnetId"]
            for subnet in self.account.owned("subnet", self.cluster)
            if any("-intra-" in tag["Value"] for tag in subnet["Tags"])
        }
        assert set(cluster["resourcesVpcConfig"]["subnetIds"]) == intra
        (key,) = self.account.names("key")
        assert cluster["encryptionConfig"][0]["provider"]["keyArn"].endswith(key)
        groups = {
            name: eks.describe_nodegroup(clusterName=self.cluster, nodegroupName=name)["nodegroup"]
            for name in eks.list_nodegroups(clusterName=self.cluster)["nodegroups"]
        }
        shapes = {
            name: (
                group["instanceTypes"],
                group["amiType"],
                *(group["scalingConfig"][bound] for bound in ("minSize", "maxSize")),
            )
            for name, group in groups.items()
            if name in ("cpu", "gpu")
        }
        assert set(groups) - set(shapes) == {"spot", "arm", "neuron", "bottle", "close", "kept"}, groups
        assert shapes == {
            "cpu": (["m5.2xlarge"], "AL2023_x86_64_STANDARD", 2, 5),
            "gpu": (["g4dn.xlarge"], "AL2023_x86_64_NVIDIA", 1, 10),
        }, shapes
        assert groups["gpu"]["taints"] == [{"key": "nvidia.com/gpu", "value": "present", "effect": "NO_SCHEDULE"}]
        reader = self.account.client("iam").get_role_policy(
            RoleName=f"{self.cluster}-models-reader", PolicyName="read-models"
        )
        actions = {
            action
            for one in reader["PolicyDocument"]["Statement"]
            for action in one["Action"]
            if action.startswith("s3:")
        }
        assert actions == {"s3:GetBucketLocation", "s3:ListBucket", "s3:GetObject"}, actions

    def fill(self) -> None:
        """Put an object and a second version of it into the models bucket, if there is one."""
        s3 = self.account.client("s3")
        for body in (b"one", b"two"):
            try:
                s3.put_object(Bucket=self.buckets[0], Key="models/x", Body=body)
            except s3.exceptions.NoSuchBucket:
                return

    def empty(self) -> None:
        """Assert that the whole account is empty, but for what AWS itself puts there."""
        left = self.account.sweep()
        assert not left, left


def main() -> None:
    """Read the arguments and run the verb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("verb", choices=["check", "fill", "empty"])
    given = parser.parse_args()
    verb: Callable[[], None] = getattr(Scenario(given.cluster), given.verb)
    verb()


if __name__ == "__main__":
    main()
