"""What the three environments leave off: a cluster with everything on, and one in a VPC that exists, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from .account import OWNER_TAG, Account
from .conftest import ROOT, Playbook, Run

# Hosts, which are their clusters, too.
EVERYTHING, ADOPTED = "rp-everything", "rp-adopted"
HOSTS = [EVERYTHING, ADOPTED]
TAGS = "preflight,encryption,images_cloud,network,storage,eks,autoscaler_cloud"
OTHER_REGION = "eu-west-1"
GPU_AMI = "AL2023_x86_64_NVIDIA"


class Setup:
    """The inventory of both, each with an account of its own and all of production's variables."""

    def __init__(self, folder: Path, new_account: Callable[[], Account]) -> None:
        self.folder = folder
        self.inventory = ("-i", str(folder / "hosts"))
        self.deploy = ("playbooks/deploy.yml", *self.inventory, "--tags", TAGS)
        self.accounts = {host: new_account() for host in HOSTS}
        shared = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
        hosts = {host: {"platform": "aws"} for host in HOSTS}
        (folder / "hosts").write_text(yaml.safe_dump({"clusters": {"hosts": hosts, "vars": shared}}))
        for host in HOSTS:
            (folder / "host_vars" / host).mkdir(parents=True)
            for path in (ROOT / "inventories" / "prod" / "group_vars" / "all").iterdir():
                (folder / "host_vars" / host / path.name).symlink_to(path)
        # What Molecule's scenario has on.
        (folder / "host_vars" / EVERYTHING / "vars.yml").symlink_to(ROOT / "molecule" / "aws" / "vars.yml")

    def declare(self, host: str, **variables: Any) -> None:
        """Give a host its variables."""
        own = {**self.accounts[host].environment, "platform_cluster_name": host, **variables}
        (self.folder / "host_vars" / host / "zz.yml").write_text(yaml.safe_dump(own))


@dataclass
class Built:
    """Both clusters, and the runs that planned and made them."""

    setup: Setup
    adopted: dict[str, Any]
    #: What was in the account of the adopted VPC before.
    before: dict[str, list[str]]
    plan: Run
    first: Run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, new_account: Callable[[], Account], playbook: Playbook) -> Built:
    setup = Setup(tmp_path_factory.mktemp("choices"), new_account)
    account = setup.accounts[ADOPTED]
    ec2 = account.ec2
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    ec2.create_tags(Resources=[vpc], Tags=[{"Key": "team", "Value": "platform"}])
    ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.255.0/24")
    peer = ec2.create_vpc(CidrBlock="172.16.0.0/16")["Vpc"]["VpcId"]
    elsewhere = Account(account.number, account.endpoint, OTHER_REGION).client("kms")
    before = account.sweep()
    adopted = {
        "gateway_image": "",
        "network_existing_vpc_tags": {"team": "platform"},
        "network_vpc_cidr": "10.9.0.0/17",
        "network_intra_subnets": False,
        "network_peerings": [{"name": "office", "vpc_id": peer, "cidrs": ["172.16.0.0/16"]}],
        "network_flow_logs_destination": "s3",
        "storage_replica_region": OTHER_REGION,
        "storage_replica_kms_key_id": elsewhere.create_key()["KeyMetadata"]["Arn"],
    }
    setup.declare(EVERYTHING, gateway_image="", images_ray_packages=["peft"])
    setup.declare(ADOPTED, **adopted)
    plan = playbook(*setup.deploy, "--check", "--diff").succeeded(*HOSTS)
    assert setup.accounts[EVERYTHING].sweep() == {} and account.sweep() == before
    return Built(setup, adopted, before, plan, playbook(*setup.deploy).succeeded(*HOSTS))


def actions(run: Run, host: str) -> list[str]:
    """What a run did; ids and zones of subnets to come, which a plan cannot know, are left out."""
    unknown = r"<new [^>]*>|\b[a-z]+-[0-9a-f]{17}\b|(?<= in )us-west-2[a-c]|arn:aws:iam::\d+:role/[\w-]+"
    return [re.sub(unknown, "...", action) for action in run.actions(host)]


@pytest.mark.parametrize("host", HOSTS)
def test_the_plan_is_what_happens(built: Built, host: str) -> None:
    assert not [str(call) for call in built.plan.calls if call.writes]
    assert actions(built.plan, host) == actions(built.first, host)


def test_everything_is_there(built: Built) -> None:
    account = built.setup.accounts[EVERYTHING]
    groups = account.client("eks").list_nodegroups(clusterName=EVERYTHING)["nodegroups"]
    assert set(groups) == {"cpu", "gpu", "spot", "arm", "neuron", "bottle", "close", "kept"}
    counts = account.counts()
    for kind in ("file system", "OIDC provider", "placement group", "instance"):
        assert counts[kind] >= 1, (kind, counts)
    assert (counts["queue"], counts["event rule"], counts["repository"]) == (1, 5, 2)
    assert "create service-linked role of spot.amazonaws.com" in built.first.actions(EVERYTHING)


def test_image_repositories_are_kept_as_other_resources_are(built: Built) -> None:
    """With the cluster's key and tags, scanned, with tags that nobody moves, and an end for what is old."""
    account = built.setup.accounts[EVERYTHING]
    ecr = account.client("ecr")
    (key,) = [one["Arn"] for one in account.items("key")]
    for one in account.items("repository"):
        assert one["repositoryName"] in (f"{EVERYTHING}/gateway", f"{EVERYTHING}/ray")
        assert one["encryptionConfiguration"] == {"encryptionType": "KMS", "kmsKey": key}
        assert (one["imageTagMutability"], one["imageScanningConfiguration"]) == ("IMMUTABLE", {"scanOnPush": True})
        tags = {
            tag["Key"]: tag["Value"] for tag in ecr.list_tags_for_resource(resourceArn=one["repositoryArn"])["tags"]
        }
        assert tags[OWNER_TAG] == EVERYTHING and tags["Project"] == "rayplane"
        policy = ecr.get_lifecycle_policy(repositoryName=one["repositoryName"])["lifecyclePolicyText"]
        assert [rule["action"] for rule in json.loads(policy)["rules"]] == [{"type": "expire"}] * 2


def test_every_policy_of_a_role_was_accepted_and_is_read_back(built: Built) -> None:
    """What the emulator has is JSON with AWS's fields; every statement names its actions and resources."""
    account = built.setup.accounts[EVERYTHING]
    iam = account.client("iam")
    seen = set()
    for role in account.items("role"):
        name = role["RoleName"]
        for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            document = document if isinstance(document, dict) else json.loads(document)
            assert document["Version"] == "2012-10-17"
            assert all({"Effect", "Action", "Resource"} <= set(one) for one in document["Statement"]), policy
            seen.add(name.removeprefix(f"{EVERYTHING}-"))
    assert seen >= {"models-reader", "autoscaler", "load-balancer-controller", "external-secrets"}


def test_the_vpc_that_exists_is_used(built: Built) -> None:
    """Adoption by tags: subnets are made in it, no second gateway, and the peer is joined to it."""
    account = built.setup.accounts[ADOPTED]
    counts = account.counts()
    assert (counts["VPC"], counts["internet gateway"], counts["VPC peering"]) == (2, 1, 1)
    replicas = account.client("s3").get_bucket_replication(Bucket=f"{ADOPTED}-models-{account.number}-{account.region}")
    assert replicas["ReplicationConfiguration"]["Rules"][0]["Status"] == "Enabled"


def test_flow_logs_reach_the_logs_bucket_from_the_first_deployment(built: Built) -> None:
    assert built.first.actions(ADOPTED).count(f"create flow log {ADOPTED}") == 1
    account = built.setup.accounts[ADOPTED]
    (log,) = account.owned("flow log", ADOPTED)
    assert log["LogDestination"] == f"arn:aws:s3:::{ADOPTED}-logs-{account.number}-{account.region}/flow-logs"


def test_switching_it_off_removes_it(built: Built, playbook: Playbook) -> None:
    """What was on by choice goes by the same playbook; data stay. A flow log deleted by hand comes back meanwhile."""
    setup = built.setup
    account, other = setup.accounts[EVERYTHING], setup.accounts[ADOPTED]
    setup.declare(
        EVERYTHING,
        gateway_image="",
        platform_autoscaler="cluster_autoscaler",
        network_admin_access="ssm",
        eks_load_balancer_controller=False,
        eks_external_secrets=False,
        eks_irsa=[],
        # Production's model on an L4 keeps its group.
        eks_extra_node_groups=[
            {"name": "gpu-l4", "instance_types": ["g6.2xlarge"], "ami_type": GPU_AMI, "max_size": 2}
        ],
        autoscaler_schedules=[],
    )
    setup.declare(ADOPTED, **{**built.adopted, "network_peerings": []})
    other.ec2.delete_flow_logs(FlowLogIds=other.names("flow log"))
    plan = playbook(*setup.deploy, "--check").succeeded(*HOSTS)
    done = playbook(*setup.deploy).succeeded(*HOSTS)
    assert {host: actions(plan, host) for host in HOSTS} == {host: actions(done, host) for host in HOSTS}
    assert f"delete queue {EVERYTHING}" in done.actions(EVERYTHING)
    counts = account.counts()
    gone = ("OIDC provider", "placement group", "queue", "event rule", "instance")
    assert {kind: counts[kind] for kind in gone} == dict.fromkeys(gone, 0)
    assert counts["file system"] == 1
    assert other.counts()["VPC peering"] == 0
    # The network's own task brings it back, not the one that waits for a new bucket.
    assert f"create flow log {ADOPTED}" in done.actions(ADOPTED, "network : Reconcile VPC")
    again = playbook(*setup.deploy).succeeded(*HOSTS)
    assert {host: again.actions(host) for host in HOSTS} == {host: [] for host in HOSTS}
    assert {host: again.changed(host) for host in HOSTS} == dict.fromkeys(HOSTS, 0)
    assert not [str(call) for call in again.calls if call.writes]


def test_destroying_leaves_the_vpc_as_it_was(built: Built, playbook: Playbook) -> None:
    variables = {"destroy_confirm": ADOPTED}
    playbook("playbooks/destroy.yml", *built.setup.inventory, "-l", ADOPTED, variables=variables).succeeded(ADOPTED)
    assert built.setup.accounts[ADOPTED].sweep() == built.before
