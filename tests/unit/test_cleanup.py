"""What Kubernetes made: given back by the cluster, deleted in its place, never somebody else's, and the proof."""

# ruff: noqa: N803, PLW0108 -- the fakes take arguments under the names AWS gives them
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.module_utils.aws.sweep import KEEP_TAG, Sweep, belongs
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    KubeError,
    Resource,
)
from ansible_collections.rayplane.platform.plugins.modules import (
    aws_kubernetes_made,
    aws_leftovers,
    k8s_api_probe,
    k8s_release_cloud,
)
from aws_fake import Clock, FakeClient, refusal
from conftest import PROJECT, connection_to

OWNED = {"kubernetes.io/cluster/c1": "owned"}
PVC = {**OWNED, "kubernetes.io/created-for/pvc/name": "data"}


@pytest.mark.parametrize(
    ("tags", "mark"),
    [
        ({OWNER_TAG: "c1"}, "owner"),
        (OWNED, "kubernetes"),
        ({**OWNED, OWNER_TAG: "c1"}, "kubernetes"),
        ({"elbv2.k8s.aws/cluster": "c1"}, "kubernetes"),
        ({"kubernetes.io/cluster/c1": "shared"}, ""),
        ({"kubernetes.io/cluster/c10": "owned"}, ""),
        ({"elbv2.k8s.aws/cluster": "c10"}, ""),
        ({**OWNED, OWNER_TAG: "c2"}, ""),
        ({}, ""),
    ],
)
def test_what_belongs_to_a_cluster(tags: dict[str, str], mark: str) -> None:
    assert belongs(tags, "c1") == mark


def tag_list(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


class Account:
    """An account with what a cluster's controllers leave behind, and things of others."""

    def __init__(self) -> None:
        self.cluster = False
        self.volumes = {"vol-pvc": {**PVC}, "vol-kept": {**PVC, KEEP_TAG: "pv-1"}, "vol-root": OWNED, "vol-other": {}}
        self.groups = {"sg-lb": OWNED, "sg-ours": {OWNER_TAG: "c1"}, "sg-foreign": {**OWNED, OWNER_TAG: "c2"}}
        self.interfaces = {"eni-cni": {"cluster.k8s.amazonaws.com/name": "c1"}}
        self.instances = {"i-karpenter": {**OWNED, "karpenter.sh/nodepool": "gpu"}}
        self.states = dict.fromkeys(self.instances, "running")
        self.balancers = {"arn:lb": {"elbv2.k8s.aws/cluster": "c1"}, "arn:lb-other": {"elbv2.k8s.aws/cluster": "c2"}}
        self.targets = {"arn:tg": {"elbv2.k8s.aws/cluster": "c1"}}
        self.logs = ["/aws/eks/c1/cluster"]
        self.buckets: dict[str, bool] = {}
        self.profiles: dict[str, dict[str, str]] = {}
        self.revoked: list[Any] = []
        none = {"IsTruncated": False}

        def described(key: str, id_key: str, items: dict[str, dict[str, str]], **more: Any) -> Any:
            return lambda **_: {key: [{id_key: one, "Tags": tag_list(tags), **more} for one, tags in items.items()]}

        def empty(key: str) -> Any:
            return lambda **_: {key: []}

        ec2 = {
            operation: empty(kind)
            for operation, kind in [
                ("describe_vpcs", "Vpcs"),
                ("describe_subnets", "Subnets"),
                ("describe_route_tables", "RouteTables"),
                ("describe_internet_gateways", "InternetGateways"),
                ("describe_egress_only_internet_gateways", "EgressOnlyInternetGateways"),
                ("describe_nat_gateways", "NatGateways"),
                ("describe_addresses", "Addresses"),
                ("describe_vpc_endpoints", "VpcEndpoints"),
                ("describe_network_acls", "NetworkAcls"),
                ("describe_flow_logs", "FlowLogs"),
                ("describe_vpc_peering_connections", "VpcPeeringConnections"),
                ("describe_launch_templates", "LaunchTemplates"),
                ("describe_placement_groups", "PlacementGroups"),
                ("describe_snapshots", "Snapshots"),
                ("describe_key_pairs", "KeyPairs"),
                ("describe_managed_prefix_lists", "PrefixLists"),
                ("describe_dhcp_options", "DhcpOptions"),
                ("describe_spot_instance_requests", "SpotInstanceRequests"),
            ]
        }
        ec2 |= {
            # An unknown kind of resource, by its tag.
            "describe_tags": lambda **_: {"Tags": self.tagged},
            "describe_volumes": described("Volumes", "VolumeId", self.volumes, State="available"),
            "describe_network_interfaces": described(
                "NetworkInterfaces", "NetworkInterfaceId", self.interfaces, Status="available"
            ),
            "describe_security_groups": self.describe_groups,
            "describe_instances": lambda **_: {
                "Reservations": [
                    {"Instances": [{"InstanceId": one, "Tags": tag_list(tags), "State": {"Name": self.states[one]}}]}
                    for one, tags in self.instances.items()
                ]
            },
            "terminate_instances": lambda InstanceIds: self.states.update(dict.fromkeys(InstanceIds, "terminated")),
            "delete_volume": lambda VolumeId: self.volumes.pop(VolumeId),
            "delete_network_interface": lambda NetworkInterfaceId: self.interfaces.pop(NetworkInterfaceId),
            "delete_security_group": lambda GroupId: self.groups.pop(GroupId),
            "revoke_security_group_ingress": lambda **given: self.revoked.append(given),
            "create_tags": lambda Resources, Tags: self.volumes[Resources[0]].update(
                {Tags[0]["Key"]: Tags[0]["Value"]}
            ),
        }
        self.tagged: list[dict[str, str]] = []
        self.clients = {
            "ec2": FakeClient("ec2", **ec2),
            "eks": FakeClient("eks", describe_cluster=self.describe_cluster),
            "elbv2": FakeClient(
                "elbv2",
                describe_load_balancers=lambda **_: {
                    "LoadBalancers": [{"LoadBalancerArn": arn, "LoadBalancerName": arn} for arn in self.balancers]
                },
                describe_target_groups=lambda **_: {
                    "TargetGroups": [{"TargetGroupArn": arn, "TargetGroupName": arn} for arn in self.targets]
                },
                describe_tags=lambda ResourceArns: {
                    "TagDescriptions": [
                        {"ResourceArn": arn, "Tags": tag_list({**self.balancers, **self.targets}[arn])}
                        for arn in ResourceArns
                    ]
                },
                delete_load_balancer=lambda LoadBalancerArn: self.balancers.pop(LoadBalancerArn),
                delete_target_group=lambda TargetGroupArn: self.targets.pop(TargetGroupArn),
            ),
            "elb": FakeClient("elb", describe_load_balancers=self.refuse),
            "iam": FakeClient(
                "iam",
                list_roles=lambda **_: {"Roles": [], **none},
                list_policies=lambda **_: {"Policies": [], **none},
                list_instance_profiles=lambda **_: {
                    "InstanceProfiles": [
                        {"InstanceProfileName": name, "Arn": f"arn:{name}", "Roles": [{"RoleName": "c1-node"}]}
                        for name in self.profiles
                    ],
                    **none,
                },
                list_instance_profile_tags=lambda InstanceProfileName: {
                    "Tags": tag_list(self.profiles[InstanceProfileName])
                },
                remove_role_from_instance_profile=lambda **_: {},
                delete_instance_profile=lambda InstanceProfileName: self.profiles.pop(InstanceProfileName),
                list_open_id_connect_providers=lambda: {"OpenIDConnectProviderList": []},
            ),
            "s3": FakeClient(
                "s3",
                list_buckets=lambda: {"Buckets": [{"Name": name} for name in self.buckets]},
                get_bucket_tagging=lambda Bucket: {"TagSet": tag_list({OWNER_TAG: "c1"})},
                list_object_versions=lambda Bucket, MaxKeys: {
                    "Versions": [{"Key": "a"}] if self.buckets[Bucket] else []
                },
            ),
            "kms": FakeClient("kms", list_keys=empty("Keys"), list_aliases=empty("Aliases")),
            "efs": FakeClient(
                "efs", describe_file_systems=empty("FileSystems"), describe_access_points=empty("AccessPoints")
            ),
            "fsx": FakeClient("fsx", describe_file_systems=empty("FileSystems")),
            "sqs": FakeClient("sqs", list_queues=lambda **_: {}),
            "events": FakeClient("events", list_rules=lambda **_: {"Rules": []}),
            "logs": FakeClient(
                "logs",
                describe_log_groups=lambda logGroupNamePrefix: {
                    "logGroups": [
                        {"logGroupName": name, "arn": f"arn:{name}:*"}
                        for name in self.logs
                        if name.startswith(logGroupNamePrefix)
                    ]
                },
                list_tags_for_resource=lambda resourceArn: {"tags": {}},
                delete_log_group=lambda logGroupName: self.logs.remove(logGroupName),
            ),
            "autoscaling": FakeClient("autoscaling", describe_auto_scaling_groups=empty("AutoScalingGroups")),
            "resourcegroupstaggingapi": FakeClient(
                "resourcegroupstaggingapi", get_resources=empty("ResourceTagMappingList")
            ),
        }

    def refuse(self, **_: Any) -> Any:
        raise refusal("AccessDenied")

    def describe_cluster(self, name: str) -> Any:
        if not self.cluster:
            raise refusal("ResourceNotFoundException")
        return {"cluster": {"status": "ACTIVE", "endpoint": "https://c1", "tags": {}}}

    def describe_groups(self, Filters: list[dict[str, Any]]) -> Any:
        groups = [{"GroupId": one, "GroupName": one, "Tags": tag_list(tags)} for one, tags in self.groups.items()]
        if Filters[0]["Name"] == "ip-permission.group-id":
            pairs = [{"GroupId": "sg-lb", "UserId": "1"}, {"GroupId": "sg-node"}]
            rule = {"IpProtocol": "tcp", "FromPort": 1, "ToPort": 2, "UserIdGroupPairs": pairs, "IpRanges": []}
            return {"SecurityGroups": [{**groups[1], "IpPermissions": [rule]}]}
        return {"SecurityGroups": groups}

    def writes(self) -> list[str]:
        return [call[0] for client in self.clients.values() for call in client.writes()]


def made(account: Account, check: bool = False, **params: Any) -> tuple[dict[str, Any], Changes]:
    changes = Changes(check)
    given = {"cluster_name": "c1", "state": "absent", "retained_volumes": {}, "volumes": True, "keep_logs": False}
    client = account.clients.__getitem__
    module = SimpleNamespace(params={**given, "wait_timeout": 60, **params}, client=client, region="us-west-2")
    return aws_kubernetes_made.reconcile(module, changes), changes


def test_leftovers_of_controllers_are_deleted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    account = Account()
    _, predicted = made(account, check=True)
    assert account.writes() == []
    _, changes = made(account)
    assert sorted(changes.actions) == sorted(predicted.actions)
    assert list(account.volumes) == ["vol-kept", "vol-root", "vol-other"]
    assert list(account.groups) == ["sg-ours", "sg-foreign"]
    assert list(account.balancers) == ["arn:lb-other"]
    assert account.targets == account.interfaces == {}
    assert account.states == {"i-karpenter": "terminated"}
    assert account.logs == []
    # Only the pair that names the group is taken out of another group's rule.
    (revoked,) = account.revoked
    assert revoked["IpPermissions"][0]["UserIdGroupPairs"] == [{"GroupId": "sg-lb", "UserId": "1"}]
    _, again = made(account)
    assert again.actions == []


def test_instance_profiles_of_another_region_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    place = "topology.kubernetes.io/region"
    here = {"c1_here": {**OWNED, place: "us-west-2"}, "c1_before": OWNED}
    account = Account()
    account.profiles = {**here, "c1_there": {**OWNED, place: "eu-west-1"}}
    _, predicted = made(account, check=True)
    _, changes = made(account)
    assert list(account.profiles) == ["c1_there"]
    for one in (predicted, changes):
        deleted = [action for action in one.actions if "instance profile" in action]
        assert deleted == [f"delete instance profile {name} (arn:{name})" for name in here]
        assert one.warnings[0] == (
            "instance profile c1_there (arn:c1_there) is left alone: it is that of the cluster c1 in eu-west-1 by its"
            f" tag {place}, and this run is for us-west-2"
        )


def test_nothing_is_deleted_while_the_controllers_run() -> None:
    account = Account()
    account.cluster = True
    with pytest.raises(PlatformError, match="still exists"):
        made(account)
    assert account.writes() == []


def test_volumes_and_logs_stay_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    account = Account()
    made(account, volumes=False, keep_logs=True)
    assert "vol-pvc" in account.volumes and account.logs


def test_waiting_is_bounded_and_retained_volumes_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    account = Account()
    account.cluster = True
    facts, changes = made(account, state="released", retained_volumes={"vol-pvc": "pv-data"})
    assert clock.now <= 60
    assert account.volumes["vol-pvc"][KEEP_TAG] == "pv-data"
    assert account.writes() == ["create_tags"]
    assert facts["left"] == ["load balancer arn:lb", "target group arn:tg", "instance i-karpenter"]
    assert any("not given back" in warning for warning in changes.warnings)
    account.cluster = False
    made(account)
    assert "vol-pvc" in account.volumes


def leftovers(account: Account, check: bool = False, **params: Any) -> dict[str, Any]:
    given = {
        "cluster_name": "c1",
        "names": [],
        "keep_data": True,
        "keep_volumes": False,
        "keep_logs": False,
        "kept": {},
    }
    params = {**given, "fail_on_rest": True, **params}
    module = SimpleNamespace(params=params, client=account.clients.__getitem__, region="us-west-2")
    return aws_leftovers.reconcile(module, Changes(check))


def test_the_proof_names_what_is_left_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    account = Account()
    with pytest.raises(PlatformError, match=r"(?s)left for no known reason.*Left: volume vol-pvc"):
        leftovers(account)
    assert {item["id"] for item in leftovers(account, check=True)["left"]} >= {"vol-pvc", "sg-ours", "arn:lb"}
    made(account)
    for gone in ("vol-root", "vol-other"):
        del account.volumes[gone]
    del account.groups["sg-ours"]
    account.buckets = {"c1-models": True, "c10-models": True, "else": True}
    monkeypatch.setitem(
        account.clients["s3"].handlers,
        "get_bucket_tagging",
        lambda Bucket: {"TagSet": tag_list({OWNER_TAG: Bucket.partition("-")[0]})},
    )
    facts = leftovers(account)
    assert facts["left"] == []
    assert {item["id"]: item["why"].split()[0] for item in facts["explained"]} == {
        "vol-kept": "PersistentVolume",
        "c1-models": "it",
    }
    assert facts["unanswered"][0].startswith("elb: elb:DescribeLoadBalancers failed")
    with pytest.raises(PlatformError, match="bucket c1-models"):
        leftovers(account, keep_data=False)
    account.tagged = [{"ResourceType": "fleet", "ResourceId": "fleet-1", "Key": OWNER_TAG, "Value": "c1"}]
    with pytest.raises(PlatformError, match="Left: fleet fleet-1"):
        leftovers(account)


def test_an_essential_service_that_refuses_is_no_proof() -> None:
    account = Account()
    account.clients["ec2"].handlers["describe_volumes"] = account.refuse
    with pytest.raises(PlatformError, match="DescribeVolumes"):
        Sweep("c1", account.clients.__getitem__, Changes(False)).everything()


# The playbook


def load(*parts: str) -> Any:
    return yaml.safe_load(PROJECT.joinpath(*parts).read_text(encoding="utf-8"))


def test_whether_the_cluster_may_be_deleted_is_asked_before_anything_is() -> None:
    plays = load("playbooks", "destroy.yml")
    includes = [
        (task["ansible.builtin.include_role"], play["hosts"])
        for play in plays
        for task in play["tasks"]
        if "ansible.builtin.include_role" in task
    ]
    assert includes[0] == ({"name": "cleanup", "tasks_from": "reach"}, "clusters")
    first = load("roles", "cleanup", "tasks", "reach.yml")[0]
    assert first["rayplane.platform.eks_cluster"] == {"name": "{{ platform_cluster_name }}", "state": "deletable"}
    assert first["when"] == "platform == 'aws'"


def test_a_key_that_was_kept_is_no_surprise(tmp_path: Path) -> None:
    expected = {
        "not_run": (None, ["EFS file system"]),
        "skipped": ({"skipped": True, "changed": False}, ["EFS file system"]),
        "deleted": ({"kept": []}, ["EFS file system"]),
        "kept": ({"kept": ["c1"]}, ["EFS file system", "KMS alias", "KMS key"]),
    }
    hosts = {host: {"__encryption_result": said} if said is not None else {} for host, (said, _) in expected.items()}
    variables = {"ansible_connection": "local", "cleanup_kept": {"EFS file system": "shared"}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": variables}}))
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars_files": [str(PROJECT / "roles/cleanup/vars/main.yml")],
        "tasks": [{"ansible.builtin.debug": {"var": "__cleanup_kept"}}],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    answer = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", tmp_path / "hosts.yml", tmp_path / "play.yml"],
        cwd=PROJECT,
        env=os.environ | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (task,) = json.loads(answer.stdout[answer.stdout.index("{\n") :])["plays"][0]["tasks"]
    kept = {host: sorted(result["__cleanup_kept"]) for host, result in task["hosts"].items()}
    assert kept == {host: kinds for host, (_, kinds) in expected.items()}


# Kubernetes


class FakeCluster:
    """An API server with objects that go when they are deleted, unless something holds them."""

    def __init__(self) -> None:
        self.objects: dict[str, list[dict[str, Any]]] = {}
        self.deleted: list[str] = []
        self.held: set[str] = set()

    def add(self, kind: str, name: str, namespace: str | None = "a", **parts: Any) -> None:
        meta = {"name": name, "uid": f"{kind}-{name}"} | ({"namespace": namespace} if namespace else {})
        meta |= parts.pop("metadata", {})
        self.objects.setdefault(kind, []).append({"kind": kind, "metadata": meta, **parts})

    def resource(self, api_version: str, kind: str) -> Resource | None:
        return Resource(api_version, kind, kind.lower(), True) if kind in self.objects else None

    def list(self, resource: Resource) -> list[dict[str, Any]]:
        return list(self.objects.get(resource.kind, []))

    def delete(self, resource: Resource, namespace: str | None, name: str) -> bool:
        self.deleted.append(f"{resource.kind} {name}")
        if name not in self.held:
            left = [item for item in self.objects[resource.kind] if item["metadata"]["name"] != name]
            self.objects[resource.kind] = left
            if resource.kind == "PersistentVolumeClaim":
                volumes = self.objects["PersistentVolume"]
                self.objects["PersistentVolume"] = [v for v in volumes if v["spec"]["claimRef"]["name"] != name]
        return True


def volume(cluster: FakeCluster, name: str, policy: str, dynamic: bool = True) -> None:
    annotations = {"pv.kubernetes.io/provisioned-by": "ebs.csi.aws.com"} if dynamic else {}
    spec = {
        "persistentVolumeReclaimPolicy": policy,
        "claimRef": {"namespace": "a", "name": name},
        "csi": {"volumeHandle": f"vol-{name}"},
    }
    cluster.add("PersistentVolume", f"pv-{name}", None, spec=spec, metadata={"annotations": annotations})
    cluster.add("PersistentVolumeClaim", name, spec={"volumeName": f"pv-{name}"})


def holdings() -> FakeCluster:
    cluster = FakeCluster()
    cluster.add("Service", "web", spec={"type": "LoadBalancer"})
    cluster.add("Service", "inner", spec={"type": "ClusterIP"})
    cluster.add("Ingress", "in")
    cluster.add("NodePool", "gpu", None)
    volume(cluster, "data-db-0", "Delete")
    volume(cluster, "kept", "Retain")
    volume(cluster, "given", "Delete", dynamic=False)
    cluster.add("StatefulSet", "db", spec={"volumeClaimTemplates": [{"metadata": {"name": "data"}}]})
    cluster.add("StatefulSet", "other", spec={"volumeClaimTemplates": [{"metadata": {"name": "data"}}]})
    cluster.add(
        "Pod", "db-0", spec={"volumes": [{"persistentVolumeClaim": {"claimName": "data-db-0"}}, {"emptyDir": {}}]}
    )
    cluster.add("Pod", "free", spec={})
    return cluster


def release(cluster: FakeCluster, check: bool = False, volumes: bool = True) -> tuple[dict[str, Any], Changes]:
    changes = Changes(check)
    return k8s_release_cloud.Release(cluster, changes, volumes, 30).release(), changes  # type: ignore[arg-type]


def test_a_cluster_gives_back_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    cluster = holdings()
    _, predicted = release(cluster, check=True)
    assert cluster.deleted == []
    cluster.held = {"data-db-0"}
    cluster.add("Gateway", "gw")
    facts, changes = release(cluster)
    assert set(predicted.actions) < set(changes.actions)
    assert set(cluster.deleted) == {
        "Service web",
        "Ingress in",
        "Gateway gw",
        "NodePool gpu",
        "StatefulSet db",
        "PersistentVolumeClaim data-db-0",
        "Pod db-0",
    }
    assert facts["retained_volumes"] == {"vol-kept": "pv-kept"}
    assert facts["left"] == ["PersistentVolumeClaim a/data-db-0", "PersistentVolume pv-data-db-0"]
    assert "still there after 30 s" in changes.warnings[0]
    assert len(changes.actions) == len(set(changes.actions))
    cluster.held = set()
    assert release(cluster)[0]["left"] == []
    assert release(cluster)[1].actions == []


def test_volumes_stay_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    cluster = holdings()
    release(cluster, volumes=False)
    assert set(cluster.deleted) == {"Service web", "Ingress in", "NodePool gpu"}


@pytest.mark.parametrize("module_of", [k8s_release_cloud, k8s_api_probe])
def test_only_the_cluster_that_goes_is_touched(monkeypatch: pytest.MonkeyPatch, module_of: Any) -> None:
    account = Account()
    params = {"cluster_name": "c1", "servers": [], "required": False, "volumes": True, "wait_timeout": 1}
    module = SimpleNamespace(params=params, client=account.clients.__getitem__)
    asked: list[str] = []

    class Server(FakeCluster):
        def __init__(self, connection: Any, timeout: float) -> None:
            super().__init__()
            self.server = connection.server

        def request(self, *_: str) -> Any:
            asked.append(self.server)
            if outcome["error"]:
                raise outcome["error"]
            return {"gitVersion": "v1.34.0"}

    outcome: dict[str, Any] = {"error": None, "server": "https://c1"}
    monkeypatch.setattr(module_of, "Cluster", Server)
    monkeypatch.setattr(module_of, "connection_from_environment", lambda: connection_to(outcome["server"]))
    why = "skipped_because" if module_of is k8s_release_cloud else "reason"

    def reconcile() -> str:
        return str(module_of.reconcile(module, Changes(False))[why])

    assert "gone already" in reconcile() or "does not exist" in reconcile()
    account.cluster = True
    assert reconcile() == "" and asked == ["https://c1"]
    outcome["server"] = "https://another"
    assert "leads to https://another" in reconcile() and asked == ["https://c1"]
    params["servers"] = ["https://another/"]
    assert reconcile() == ""
    outcome["error"] = KubeError("does not answer")
    assert "does not answer" in reconcile()
    if module_of is k8s_release_cloud:
        outcome["error"] = ApiError("GET", "/version", 403, {})
        with pytest.raises(PlatformError, match="give the deploying principal access"):
            reconcile()
