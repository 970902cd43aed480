"""Node groups: the set in one call, desired size left alone, fixed properties refused or replaced."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
import re
from typing import Any

import boto3
import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import (
    AMI_TYPES,
    ENDED,
    GPU_LABEL,
    NEURON_TAG,
    image_problem,
    neuron_devices,
    node_labels,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.node_images import newer, parameter
from ansible_collections.rayplane.platform.plugins.modules import eks_node_groups
from aws_fake import Clock, FakeClient, refusal
from conftest import PROJECT

GROUP = {
    "name": "gpu",
    "instance_types": ["g4dn.xlarge"],
    "ami_type": "AL2023_x86_64_NVIDIA",
    "capacity_type": "ON_DEMAND",
    "min_size": 1,
    "max_size": 10,
    "desired_size": 2,
    "disk_size": 200,
    "disk_iops": 0,
    "disk_throughput": 0,
    "labels": {"rayplane.io/pool": "gpu"},
    "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
    "subnet_ids": [],
    "role_arn": "",
    "launch_template": {},
    "capacity_reservation_id": "",
    "capacity_reservation_preference": "",
    "placement_group": "",
    "placement_strategy": "",
    "release_version": "",
    "max_unavailable": 1,
    "max_unavailable_percentage": None,
    "update_strategy": "",
    "node_repair": False,
    "tags": {},
}


def group(**changes: Any) -> dict[str, Any]:
    return {**GROUP, **changes}


class FakeEc2:
    """Launch templates, whose versions never change, and placement groups."""

    def __init__(self) -> None:
        self.templates: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, list[dict[str, Any]]] = {}
        self.placements: dict[str, dict[str, Any]] = {}
        self.client = FakeClient(
            "ec2",
            describe_launch_templates=lambda Filters: {"LaunchTemplates": self._find(self.templates, Filters)},
            create_launch_template=self.create,
            describe_launch_template_versions=lambda LaunchTemplateId, Versions: {
                "LaunchTemplateVersions": [
                    {"LaunchTemplateData": self.versions[LaunchTemplateId][int(one) - 1]} for one in Versions
                ]
            },
            create_launch_template_version=self.create_version,
            delete_launch_template=self.delete_template,
            describe_placement_groups=lambda Filters: {"PlacementGroups": self._find(self.placements, Filters)},
            create_placement_group=self.create_placement_group,
            delete_placement_group=self.delete_placement_group,
            create_tags=self.create_tags,
        )

    def named(self, number: str) -> dict[str, str]:
        return {"name": self.templates[number]["LaunchTemplateName"]} if number in self.templates else {}

    def create(self, LaunchTemplateName: str, LaunchTemplateData: Any, TagSpecifications: Any) -> Any:
        number = f"lt-{len(self.versions)}"
        self.templates[number] = {
            "LaunchTemplateId": number,
            "LaunchTemplateName": LaunchTemplateName,
            "LatestVersionNumber": 1,
            "Tags": TagSpecifications[0]["Tags"],
        }
        self.versions[number] = [LaunchTemplateData]
        return {"LaunchTemplate": self.templates[number]}

    def create_version(self, LaunchTemplateId: str, LaunchTemplateData: Any) -> Any:
        self.versions[LaunchTemplateId].append(LaunchTemplateData)
        self.templates[LaunchTemplateId]["LatestVersionNumber"] += 1
        return {"LaunchTemplateVersion": {"VersionNumber": len(self.versions[LaunchTemplateId])}}

    def create_placement_group(self, GroupName: str, Strategy: str, TagSpecifications: Any) -> Any:
        tags = TagSpecifications[0]["Tags"]
        self.placements[GroupName] = {"GroupName": GroupName, "GroupId": "pg", "Strategy": Strategy, "Tags": tags}

    def delete_template(self, LaunchTemplateId: str) -> None:
        del self.templates[LaunchTemplateId]

    def delete_placement_group(self, GroupName: str) -> None:
        del self.placements[GroupName]

    def create_tags(self, Resources: list[str], Tags: Any) -> None:
        self.templates[Resources[0]]["Tags"] = Tags

    @staticmethod
    def _find(things: dict[str, Any], filters: Any) -> list[Any]:
        ((key, values),) = [(one["Name"], one["Values"]) for one in filters]
        if key.startswith("tag:"):
            wanted = {"Key": key.removeprefix("tag:"), "Value": values[0]}
            return [thing for thing in things.values() if wanted in thing["Tags"]]
        names = ("LaunchTemplateName", "GroupName")
        return [thing for thing in things.values() if any(thing.get(name) in values for name in names)]


class FakeEks:
    """A cluster with node groups."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.version = "1.34"
        self.exists = True
        self.groups = {one["nodegroupName"]: one for one in groups}
        self.ec2 = FakeEc2()
        # The newest release of every image.
        self.published = "1.34.2-20261110"
        self.ssm = FakeClient("ssm", get_parameters=self.get_parameters)
        self.client = FakeClient(
            "eks",
            describe_cluster=self.describe_cluster,
            list_nodegroups=self.list_nodegroups,
            describe_nodegroup=self.describe_nodegroup,
            create_nodegroup=self.create_nodegroup,
            delete_nodegroup=lambda nodegroupName, **_: self.groups.pop(nodegroupName),
            update_nodegroup_config=lambda **_: {"update": {"id": "u1"}},
            update_nodegroup_version=self.update_nodegroup_version,
            describe_update=lambda **_: {"update": {"status": "Successful", "type": "ConfigUpdate"}},
            tag_resource=lambda **_: {},
        )

    def describe_cluster(self, name: str) -> Any:
        if not self.exists:
            raise refusal("ResourceNotFoundException")
        return {"cluster": {"name": name, "version": self.version, "status": "ACTIVE"}}

    def get_parameters(self, Names: list[str]) -> Any:
        return {"Parameters": [{"Name": name, "Value": self.published} for name in Names]}

    def describe_nodegroup(self, nodegroupName: str, **_: Any) -> Any:
        if nodegroupName not in self.groups:
            raise refusal("ResourceNotFoundException")
        return {"nodegroup": self.groups[nodegroupName]}

    def list_nodegroups(self, **_: Any) -> Any:
        self.describe_cluster("c1")
        return {"nodegroups": list(self.groups)}

    def update_nodegroup_version(self, nodegroupName: str, launchTemplate: Any = None, **_: Any) -> Any:
        if launchTemplate:
            self.groups[nodegroupName]["launchTemplate"] = {**self.ec2.named(launchTemplate["id"]), **launchTemplate}
        return {"update": {"id": "u1"}}

    def create_nodegroup(self, **given: Any) -> Any:
        assert "diskSize" not in given
        given["launchTemplate"] = {**self.ec2.named(given["launchTemplate"]["id"]), **given["launchTemplate"]}
        self.groups[given["nodegroupName"]] = {
            **given,
            "nodegroupArn": "arn:ng",
            "status": "ACTIVE",
            "version": self.version,
        }
        return {"nodegroup": self.groups[given["nodegroupName"]]}


def converge(eks: FakeEks, *groups: dict[str, Any], check: bool = False, **params: Any) -> Changes:
    changes = Changes(check)
    given = {
        "cluster_name": "c1",
        "node_groups": list(groups),
        "role_arn": "arn:node",
        "subnet_ids": ["subnet-b", "subnet-a"],
        "tags": {},
        "kms_key_arn": "",
        "metadata_hop_limit": 2,
        "gpu_label": True,
        "replace": False,
        "force_upgrade": False,
        "purge": True,
        "kubernetes_version": "",
        "image_patches": "ignore",
        "wait_timeout": 60,
        **params,
    }
    api, ec2, ssm = (Api(client, changes) for client in (eks.client, eks.ec2.client, eks.ssm))
    reconciler = eks_node_groups.NodeGroups(given, api, changes, ec2, lambda: ssm)
    reconciler.absent() if params.get("state") == "absent" else reconciler.present()
    return changes


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def eks() -> FakeEks:
    """A cluster on which the GPU group stands as described."""
    fake = FakeEks()
    converge(fake, GROUP)
    fake.client.calls.clear()
    fake.ec2.client.calls.clear()
    return fake


def test_a_new_group_is_asked_for_as_described() -> None:
    fake = FakeEks()
    changes = converge(fake, GROUP)
    ((operation, given),) = fake.client.writes()
    assert operation == "create_nodegroup"
    assert given["amiType"] == "AL2023_x86_64_NVIDIA"
    assert given["scalingConfig"] == {"minSize": 1, "maxSize": 10, "desiredSize": 2}
    assert given["taints"] == [{"key": "nvidia.com/gpu", "value": "present", "effect": "NO_SCHEDULE"}]
    assert given["subnets"] == ["subnet-a", "subnet-b"]
    assert given["labels"] == {
        "rayplane.io/pool": "gpu",
        "rayplane.io/accelerator": "nvidia",
        "k8s.amazonaws.com/accelerator": "nvidia-tesla-t4",
    }
    assert changes.actions == ["create launch template c1-gpu", "create node group gpu"]


def test_groups_are_asked_for_together_before_any_wait() -> None:
    fake = FakeEks()
    converge(fake, group(name="a"), group(name="b"))
    names = [name for name, _ in fake.client.calls]
    last = max(index for index, name in enumerate(names) if name == "create_nodegroup")
    assert "describe_nodegroup" not in names[:last]


def test_check_mode_predicts_on_a_cluster_that_does_not_exist() -> None:
    fake = FakeEks()
    fake.exists = False
    said = ["create launch template c1-gpu", "create node group gpu"]
    assert converge(fake, GROUP, check=True, role_arn="<new role>").actions == said
    assert fake.client.writes() == []
    assert fake.ec2.client.writes() == []
    with pytest.raises(PlatformError, match="cluster c1 does not exist"):
        converge(fake, GROUP)


def test_second_run_changes_nothing(eks: FakeEks) -> None:
    assert converge(eks, GROUP).actions == []
    assert eks.client.writes() == []
    assert eks.ec2.client.writes() == []


def test_the_desired_size_is_the_autoscalers(eks: FakeEks) -> None:
    eks.groups["gpu"]["scalingConfig"]["desiredSize"] = 7
    assert converge(eks, GROUP).actions == []
    changes = converge(eks, group(max_size=5))
    assert changes.actions == [
        "update node group gpu: maxSize: 10 -> 5",
        "update node group gpu: desiredSize: 7 -> 5",
    ]
    ((_, given),) = eks.client.writes()
    assert given["scalingConfig"] == {"minSize": 1, "maxSize": 5, "desiredSize": 5}


def test_labels_and_taints_are_taken_away_too(eks: FakeEks) -> None:
    eks.groups["gpu"]["labels"]["stray"] = "x"
    eks.groups["gpu"]["taints"].append({"key": "stray", "value": "x", "effect": "NO_EXECUTE"})
    changes = converge(eks, GROUP)
    ((_, given),) = eks.client.writes()
    assert given["labels"]["removeLabels"] == ["stray"]
    assert [taint["key"] for taint in given["taints"]["removeTaints"]] == ["stray"]
    assert len(changes.actions) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"instance_types": ["g5.xlarge"]},
        {"capacity_type": "SPOT"},
        {"ami_type": "BOTTLEROCKET_x86_64_NVIDIA"},
        {"launch_template": {"id": "lt-other", "version": "1"}},
    ],
)
def test_a_fixed_property_is_refused_before_anything_changes(eks: FakeEks, change: dict[str, Any]) -> None:
    with pytest.raises(PlatformError, match="cannot change in place"):
        converge(eks, group(name="new"), group(**change))
    assert eks.client.writes() == []


def test_a_fixed_property_is_replaced_where_allowed(eks: FakeEks) -> None:
    changes = converge(eks, group(instance_types=["g5.xlarge"]), replace=True)
    assert [name for name, _ in eks.client.writes()] == ["delete_nodegroup", "create_nodegroup"]
    assert changes.actions == ["delete node group gpu", "create node group gpu"]


@pytest.mark.parametrize("status", ["CREATE_FAILED", "DELETE_FAILED"])
def test_a_group_that_failed_is_made_anew(eks: FakeEks, status: str) -> None:
    eks.groups["gpu"]["status"] = status
    assert converge(eks, GROUP).actions == ["delete node group gpu", "create node group gpu"]


def test_only_own_groups_are_purged(eks: FakeEks) -> None:
    eks.groups["foreign"] = {**eks.groups["gpu"], "nodegroupName": "foreign", "tags": {}}
    assert converge(eks, group(name="other")).actions == [
        "delete node group gpu",
        "create launch template c1-other",
        "create node group other",
        "delete launch template c1-gpu",
    ]
    assert "foreign" in eks.groups


def test_nodes_follow_the_control_plane(eks: FakeEks) -> None:
    eks.version = "1.35"
    assert converge(eks, GROUP).actions == ["update node group gpu: version: 1.34 -> 1.35"]
    ((operation, given),) = eks.client.writes()
    assert (operation, given["version"]) == ("update_nodegroup_version", "1.35")


PATCH = "update node group gpu: release_version: 1.34.2-20260901 -> 1.34.2-20261110"


@pytest.mark.parametrize(
    ("patches", "runs", "pinned", "outcome"),
    [
        ("ignore", "1.34.2-20260901", "", ""),
        ("report", "1.34.2-20260901", "", "warned"),
        ("report", "1.34.2-20261110", "", ""),
        ("update", "1.34.2-20260901", "", "updated"),
        # AWS withdrew a release: nodes do not go back.
        ("update", "1.34.3-20261115", "", ""),
        ("update", "1.34.2-20260901", "1.34.2-20260901", ""),
    ],
)
def test_image_patches_are_a_choice(eks: FakeEks, patches: str, runs: str, pinned: str, outcome: str) -> None:
    eks.groups["gpu"]["releaseVersion"] = runs
    for check in (True, False):
        changes = converge(eks, group(release_version=pinned), image_patches=patches, check=check)
        assert changes.actions == [PATCH] * (outcome == "updated")
        assert len(changes.warnings) == (outcome == "warned")
    written = [(name, given["releaseVersion"]) for name, given in eks.client.writes()]
    assert written == [("update_nodegroup_version", "1.34.2-20261110")] * (outcome == "updated")
    assert len(eks.ssm.calls) == (0 if patches == "ignore" or pinned else 2)


def test_nodes_that_follow_the_control_plane_get_the_newest_image_with_it(eks: FakeEks) -> None:
    eks.groups["gpu"]["releaseVersion"] = "1.34.2-20260901"
    eks.version = "1.35"
    assert converge(eks, GROUP, image_patches="update").actions == ["update node group gpu: version: 1.34 -> 1.35"]
    assert eks.ssm.calls == []


@pytest.mark.parametrize(
    ("image", "place"),
    [
        (
            "AL2023_x86_64_STANDARD",
            "eks/optimized-ami/1.36/amazon-linux-2023/x86_64/standard/recommended/release_version",
        ),
        ("AL2023_ARM_64_NVIDIA", "eks/optimized-ami/1.36/amazon-linux-2023/arm64/nvidia/recommended/release_version"),
        ("BOTTLEROCKET_x86_64", "bottlerocket/aws-k8s-1.36/x86_64/latest/image_version"),
        ("BOTTLEROCKET_ARM_64_NVIDIA_FIPS", "bottlerocket/aws-k8s-1.36-nvidia-fips/arm64/latest/image_version"),
    ],
)
def test_where_the_newest_release_is_published(image: str, place: str) -> None:
    assert parameter(image, "1.36") == f"/aws/service/{place}"


def test_every_image_of_ours_has_a_published_release() -> None:
    assert [image for image in AMI_TYPES if not parameter(image, "1.36")] == ["CUSTOM"]


def test_releases_are_ordered_by_version_and_date() -> None:
    assert newer("1.36.10-20261110", "1.36.9-20261110") and newer("1.36.2-20261110", "1.36.2-20261012")
    assert newer("1.51.0-0aa", "1.9.0-fff") and not newer("1.50.0-fff", "1.50.0-0aa")


def test_check_mode_predicts_that_nodes_follow(eks: FakeEks) -> None:
    changes = converge(eks, GROUP, check=True, kubernetes_version="1.35")
    assert changes.actions == ["update node group gpu: version: 1.34 -> 1.35"]
    assert eks.client.writes() == []


@pytest.mark.parametrize("sizes", [(3, 2, 2), (0, 0, 0), (1, 3, 4), (-1, 3, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    low, high, desired = sizes
    with pytest.raises(PlatformError, match="do not fit"):
        converge(FakeEks(), group(min_size=low, max_size=high, desired_size=desired))


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(PlatformError, match="named twice: gpu"):
        converge(FakeEks(), GROUP, GROUP)


def test_waiting_for_nodes_is_bounded_and_shows_their_health(eks: FakeEks, clock: Clock) -> None:
    eks.groups["gpu"]["status"] = "CREATING"
    eks.groups["gpu"]["health"] = {"issues": [{"code": "InsufficientFreeAddresses", "message": "subnet is full"}]}
    with pytest.raises(PlatformError, match="InsufficientFreeAddresses: subnet is full"):
        converge(eks, GROUP)
    assert clock.now <= 60


QUOTA = (
    "Could not launch On-Demand Instances. VcpuLimitExceeded - You have requested more vCPU capacity than your current"
    " vCPU limit of 0 allows. Launching EC2 instance failed."
)


def test_the_first_group_that_fails_ends_the_wait_with_its_health(clock: Clock) -> None:
    fake = FakeEks()
    issue = {"code": "AsgInstanceLaunchFailures", "message": QUOTA, "resourceIds": ["eks-gpu-1", "eks-gpu-2"]}
    failed = {"status": "CREATE_FAILED", "health": {"issues": [issue]}}

    def create(**given: Any) -> Any:
        made = FakeEks.create_nodegroup(fake, **given)
        made["nodegroup"].update(failed if given["nodegroupName"] == "gpu" else {"status": "CREATING"})
        return made

    fake.client.handlers["create_nodegroup"] = create
    with pytest.raises(PlatformError) as caught:
        converge(fake, group(name="cpu"), GROUP)
    assert clock.now == 0
    said = str(caught.value)
    assert said.startswith(
        f"node group gpu of c1: CREATE_FAILED: AsgInstanceLaunchFailures: {QUOTA.rstrip('.')} (eks-gpu-1, eks-gpu-2)."
        " Cure: raise the quota for vCPUs"
    )
    assert "\n" not in said


def test_a_deletion_that_fails_ends_the_wait(eks: FakeEks, clock: Clock) -> None:
    failed = {"status": "DELETE_FAILED", "health": {"issues": [{"code": "PodEvictionFailure", "message": "held"}]}}
    eks.client.handlers["delete_nodegroup"] = lambda nodegroupName, **_: eks.groups[nodegroupName].update(failed)
    with pytest.raises(PlatformError, match=r"gpu of c1: DELETE_FAILED: PodEvictionFailure: held\. Cure: a pod disr"):
        converge(eks)
    assert clock.now == 0


@pytest.mark.parametrize(
    ("kind", "shape"), [("cluster", "ClusterStatus"), ("node group", "NodegroupStatus"), ("add-on", "AddonStatus")]
)
def test_every_failed_status_of_the_service_ends_a_wait(kind: str, shape: str) -> None:
    model = boto3.Session().client("eks", region_name="us-west-2").meta.service_model
    known = set(model.shape_for(shape).enum)
    for ended in ENDED[kind]:
        assert set(ended) <= known
    assert {one for one in known if "FAILED" in one} <= set(ENDED[kind][0])


def test_a_degraded_group_is_reported(eks: FakeEks) -> None:
    eks.groups["gpu"]["status"] = "DEGRADED"
    eks.groups["gpu"]["health"] = {"issues": [{"code": "AsgInstanceLaunchFailures", "message": "no capacity"}]}
    assert "no capacity" in converge(eks, GROUP).warnings[0]


def data_of(eks: FakeEks, version: int = 1) -> dict[str, Any]:
    return eks.ec2.versions["lt-0"][version - 1]


def test_the_template_holds_what_eks_has_no_setting_for(eks: FakeEks) -> None:
    data = data_of(eks)
    assert data["BlockDeviceMappings"] == [
        {
            "DeviceName": "/dev/xvda",
            "Ebs": {"VolumeSize": 200, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True},
        }
    ]
    assert data["MetadataOptions"] == {
        "HttpEndpoint": "enabled",
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 2,
    }
    assert {one["ResourceType"] for one in data["TagSpecifications"]} == {"instance", "network-interface", "volume"}
    assert {"Key": "Name", "Value": "c1-gpu"} in data["TagSpecifications"][0]["Tags"]
    # What EKS keeps itself must not stand in a template.
    assert not {"InstanceType", "ImageId", "IamInstanceProfile", "NetworkInterfaces"} & set(data)
    assert "Placement" not in data


def test_bottlerocket_keeps_images_on_its_second_disk() -> None:
    fake = FakeEks()
    fast = {"disk_iops": 6000, "disk_throughput": 1000}
    converge(fake, group(ami_type="BOTTLEROCKET_x86_64_NVIDIA", **fast), kms_key_arn="arn:key")
    system, images = data_of(fake)["BlockDeviceMappings"]
    assert (system["DeviceName"], images["DeviceName"], images["Ebs"]["VolumeSize"]) == ("/dev/xvda", "/dev/xvdb", 200)
    assert (images["Ebs"]["Iops"], images["Ebs"]["Throughput"]) == (6000, 1000)
    assert not {"VolumeSize", "Iops", "Throughput"} & set(system["Ebs"])
    assert [disk["Ebs"]["KmsKeyId"] for disk in (system, images)] == ["arn:key", "arn:key"]
    assert fake.groups["gpu"]["labels"]["rayplane.io/device-plugin"] == "image"


def test_a_changed_setting_makes_one_version_and_rolls_the_group(eks: FakeEks) -> None:
    wanted = group(disk_size=300)
    predicted = converge(eks, wanted, check=True).actions
    assert eks.ec2.client.writes() == []
    assert converge(eks, wanted).actions == predicted
    assert predicted[0].startswith("update launch template c1-gpu: disk /dev/xvda: {'size': 200")
    assert predicted[1:] == ["update node group gpu: launch_template_version: 1 -> 2"]
    ((operation, given),) = eks.client.writes()
    assert (operation, given["launchTemplate"]) == ("update_nodegroup_version", {"id": "lt-0", "version": "2"})
    assert converge(eks, wanted).actions == []
    assert len(eks.ec2.versions["lt-0"]) == 2


def test_a_version_that_an_interrupted_run_made_is_used(eks: FakeEks) -> None:
    def broken(**_: Any) -> Any:
        raise refusal("ServerException")

    working, eks.client.handlers["update_nodegroup_version"] = eks.update_nodegroup_version, broken
    with pytest.raises(PlatformError):
        converge(eks, group(disk_size=300))
    eks.client.handlers["update_nodegroup_version"] = working
    converge(eks, group(disk_size=300))
    assert len(eks.ec2.versions["lt-0"]) == 2
    assert eks.groups["gpu"]["launchTemplate"]["version"] == "2"


def test_a_version_made_by_hand_is_rolled_back_by_property(eks: FakeEks) -> None:
    eks.ec2.create_version("lt-0", {**data_of(eks), "MetadataOptions": {"HttpTokens": "optional"}})
    eks.groups["gpu"]["launchTemplate"]["version"] = "2"
    assert converge(eks, GROUP).actions == [
        "update launch template c1-gpu: metadata_tokens: optional -> required",
        "update launch template c1-gpu: metadata_hop_limit: absent -> 2",
        "update node group gpu: launch_template_version: 2 -> 3",
    ]


def test_a_template_that_lost_its_tags_is_found_and_tagged_again(eks: FakeEks) -> None:
    eks.ec2.templates["lt-0"]["Tags"] = []
    said = converge(eks, GROUP).actions
    assert said == [
        "update launch template c1-gpu: tag rayplane.io/cluster: absent -> c1",
        "update launch template c1-gpu: tag rayplane.io/node-group: absent -> gpu",
    ]


def test_another_clusters_template_is_not_taken() -> None:
    fake = FakeEks()
    tags = [{"Key": "rayplane.io/cluster", "Value": "c2"}]
    fake.ec2.create("c1-gpu", {}, [{"Tags": tags}])
    with pytest.raises(PlatformError, match="belongs to cluster c2"):
        converge(fake, GROUP)
    assert fake.client.writes() == []


def test_a_template_that_is_gone_cannot_be_given_back(eks: FakeEks) -> None:
    eks.ec2.templates.clear()
    with pytest.raises(PlatformError, match=r"launchTemplate c1-gpu \(which is gone\)"):
        converge(eks, GROUP)
    fixed = converge(eks, GROUP, replace=True).actions
    assert fixed == ["delete node group gpu", "create launch template c1-gpu", "create node group gpu"]


def test_karpenters_templates_are_left_alone(eks: FakeEks) -> None:
    tags = [{"Key": "rayplane.io/cluster", "Value": "c1"}]
    eks.ec2.create("karpenter.k8s.aws/1", {}, [{"Tags": tags}])
    assert converge(eks, GROUP).actions == []


def test_a_template_of_ones_own_is_used_as_it_is() -> None:
    fake = FakeEks()
    converge(fake, group(ami_type="CUSTOM", launch_template={"id": "lt-mine", "version": "7"}))
    ((_, given),) = fake.client.writes()
    assert given["launchTemplate"] == {"id": "lt-mine", "version": "7"}
    assert "amiType" not in given
    assert fake.ec2.templates == {}


def test_a_template_of_ones_own_may_name_the_type(eks: FakeEks) -> None:
    fake = FakeEks()
    block = {"capacity_type": "CAPACITY_BLOCK", "launch_template": {"id": "lt-mine", "version": "7"}}
    wanted = group(instance_types=[], **block)
    assert converge(fake, wanted, check=True).actions == ["create node group gpu"]
    converge(fake, wanted)
    ((_, given),) = fake.client.writes()
    # EKS refuses a type here beside one in the template.
    assert "instanceTypes" not in given
    assert given["labels"][GPU_LABEL] == "nvidia"
    assert converge(fake, wanted).actions == []
    # What EKS says of such a group differs by what stands where; neither is a change.
    fake.groups["gpu"]["instanceTypes"] = ["p5.48xlarge"]
    assert converge(fake, wanted).actions == []
    with pytest.raises(PlatformError, match="instance_types is empty"):
        converge(eks, group(instance_types=[]))


@pytest.mark.parametrize(
    ("types", "name"),
    [
        (["g4dn.xlarge"], "nvidia-tesla-t4"),
        (["g5.xlarge", "g5.2xlarge"], "nvidia-a10g"),
        (["gr6.4xlarge"], "nvidia-l4"),
        (["p5en.48xlarge"], "nvidia-h200"),
        (["p6-b200.48xlarge"], "nvidia-b200"),
        # Two kinds in a group, one that is not known yet, and a type that stands in the template.
        (["g5.xlarge", "g6.xlarge"], "nvidia"),
        (["g99.xlarge"], "nvidia"),
        ([], "nvidia"),
    ],
)
def test_gpu_nodes_are_known_to_the_cluster_autoscaler(types: list[str], name: str) -> None:
    assert node_labels("AL2023_x86_64_NVIDIA", types)[GPU_LABEL] == name
    assert GPU_LABEL not in node_labels("AL2023_x86_64_NVIDIA", types, gpu_label=False)
    assert GPU_LABEL not in node_labels("AL2023_x86_64_STANDARD", ["m5.large"])
    assert GPU_LABEL not in node_labels("AL2023_x86_64_NEURON", ["inf2.xlarge"])


@pytest.mark.parametrize(
    ("plugin", "label"),
    [
        ({}, True),
        ({"gpu_plugin_time_slicing_rename": False, "gpu_plugin_mig_strategy": "single"}, True),
        # The autoscaler knows neither nvidia.com/gpu.shared nor nvidia.com/mig-...
        ({"gpu_plugin_time_slicing_rename": True}, False),
        ({"gpu_plugin_mig_strategy": "mixed"}, False),
    ],
)
def test_nodes_whose_gpus_have_other_names_do_not_get_the_label(plugin: dict[str, Any], label: bool) -> None:
    defaults = yaml.safe_load((PROJECT / "roles/eks/defaults/main.yml").read_text(encoding="utf-8"))
    templar = Templar(DataLoader(), variables=plugin)
    assert templar.template(trust_as_template(defaults["eks_gpu_ready_label"])) is label


def test_the_gpu_label_comes_to_groups_that_are_there_and_may_be_left_out(eks: FakeEks) -> None:
    del eks.groups["gpu"]["labels"][GPU_LABEL]
    (said,) = converge(eks, GROUP).actions
    assert said.startswith("update node group gpu: labels")
    ((_, given),) = eks.client.writes()
    assert given["labels"]["addOrUpdateLabels"][GPU_LABEL] == "nvidia-tesla-t4"
    assert converge(eks, GROUP, gpu_label=False).actions == []
    # A name of one's own wins.
    fake = FakeEks()
    converge(fake, group(labels={GPU_LABEL: "mine"}))
    assert fake.groups["gpu"]["labels"][GPU_LABEL] == "mine"


INFERENTIA = {"instance_types": ["inf2.24xlarge", "inf2.48xlarge"], "ami_type": "AL2023_x86_64_NEURON", "min_size": 0}


def test_neuron_groups_grow_from_zero() -> None:
    fake = FakeEks()
    wanted = group(**INFERENTIA, desired_size=0)
    converge(fake, wanted)
    ((_, given),) = fake.client.writes()
    assert given["tags"][NEURON_TAG] == "6"
    # Not on the nodes: a new version of the template would roll them.
    assert NEURON_TAG not in str(data_of(fake))
    assert converge(fake, wanted).actions == []
    # A group of before gets it in place, and a number of one's own wins.
    del fake.groups["gpu"]["tags"][NEURON_TAG]
    assert converge(fake, wanted).actions == [f"update node group gpu: tag {NEURON_TAG}: absent -> 6"]
    own = group(**INFERENTIA, desired_size=0, tags={NEURON_TAG: "9"})
    assert f"update node group gpu: tag {NEURON_TAG}: absent -> 9" in converge(fake, own, check=True).actions


def test_a_neuron_group_that_will_not_grow_is_told() -> None:
    unknown = {**INFERENTIA, "instance_types": ["trn9.xlarge"], "desired_size": 0}
    (warning,) = converge(FakeEks(), group(**unknown)).warnings
    assert "trn9.xlarge" in warning and NEURON_TAG in warning
    assert converge(FakeEks(), group(**{**unknown, "min_size": 1, "desired_size": 1})).warnings == []
    assert converge(FakeEks(), group(**unknown, tags={NEURON_TAG: "2"})).warnings == []
    assert neuron_devices(["g5.xlarge"]) == neuron_devices([]) == 0
    assert neuron_devices(["trn1.32xlarge", "trn9.xlarge"]) is None


def test_a_placement_group_is_made_tagged_used_and_removed() -> None:
    fake = FakeEks()
    wanted = group(placement_strategy="cluster")
    said = ["create placement group c1-gpu", "create launch template c1-gpu", "create node group gpu"]
    assert converge(fake, wanted, check=True).actions == said
    assert converge(fake, wanted).actions == said
    assert data_of(fake)["Placement"] == {"GroupName": "c1-gpu"}
    # Close together is in one zone.
    assert fake.groups["gpu"]["subnets"] == ["subnet-b"]
    assert converge(fake, wanted).actions == []
    fake.groups.clear()
    assert converge(fake, state="absent").actions == ["delete launch template c1-gpu", "delete placement group c1-gpu"]
    assert converge(fake, state="absent").actions == []


def test_a_capacity_block_has_its_type_in_the_template() -> None:
    fake = FakeEks()
    converge(
        fake, group(capacity_type="CAPACITY_BLOCK", capacity_reservation_id="cr-1", instance_types=["p5.48xlarge"])
    )
    data = data_of(fake)
    assert data["InstanceType"] == "p5.48xlarge"
    assert data["InstanceMarketOptions"] == {"MarketType": "capacity-block"}
    assert data["CapacityReservationSpecification"] == {"CapacityReservationTarget": {"CapacityReservationId": "cr-1"}}
    assert "instanceTypes" not in fake.groups["gpu"]


def test_update_limits_and_repair_are_kept(eks: FakeEks) -> None:
    wanted = group(max_unavailable_percentage=33, node_repair=True, update_strategy="DEFAULT")
    assert converge(eks, wanted).actions == [
        "update node group gpu: update_limit: {'maxUnavailable': 1} -> {'maxUnavailablePercentage': 33}",
        "update node group gpu: update_strategy: MINIMAL -> DEFAULT",
        "update node group gpu: node_repair: False -> True",
    ]
    ((_, given),) = eks.client.writes()
    assert given["updateConfig"] == {"maxUnavailablePercentage": 33, "updateStrategy": "DEFAULT"}
    assert given["nodeRepairConfig"] == {"enabled": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instance_types": ["g5g.xlarge"]}, "g5g.xlarge is ARM_64. Cure: set ami_type AL2023_ARM_64_NVIDIA"),
        ({"instance_types": ["g5.xlarge", "m7g.large"]}, "m7g.large is ARM_64"),
        ({"instance_types": ["m5.large"]}, "has no accelerator"),
        ({"instance_types": ["inf2.xlarge"]}, "Cure: set ami_type AL2023_x86_64_NEURON"),
        ({"ami_type": "AL2023_x86_64_STANDARD"}, "Cure: set ami_type AL2023_x86_64_NVIDIA"),
        ({"disk_throughput": 1000}, "3000 / 4 = 750: give it 4000 IOPS, or write 750"),
        ({"ami_type": "BOTTLEROCKET_x86_64"}, "Cure: set ami_type BOTTLEROCKET_x86_64_NVIDIA"),
        ({"ami_type": "AL2023_x86_64_NEURON"}, "the image drives neuron"),
        ({"ami_type": "AL2_x86_64_GPU"}, "gets no releases any more"),
        ({"ami_type": "WINDOWS_CORE_2022_x86_64"}, "runs no Ray"),
        ({"ami_type": "AL2024"}, "is not one of"),
        ({"ami_type": "CUSTOM"}, "takes its image from launch_template"),
        ({"instance_types": []}, "name at least one"),
        (
            {"capacity_type": "CAPACITY_BLOCK", "launch_template": {"id": "lt-1"}},
            "stands in the launch_template where one is given: write instance_types: []",
        ),
        ({"instance_types": ["large"]}, "is not the name of an instance type"),
        ({"launch_template": {"version": "1"}}, "has neither id nor name"),
        ({"launch_template": {"id": "lt-1"}, "placement_group": "pg"}, "set them there"),
        ({"max_unavailable_percentage": 0}, "between 1 and 100"),
        ({"capacity_type": "CAPACITY_BLOCK"}, "needs capacity_reservation_id"),
        (
            {
                "capacity_type": "CAPACITY_BLOCK",
                "capacity_reservation_id": "cr-1",
                "instance_types": ["p5.48xlarge", "p5e.48xlarge"],
            },
            "one type",
        ),
        ({"capacity_type": "SPOT", "capacity_reservation_id": "cr-1"}, "spot nodes do not run in reservations"),
        (
            {"capacity_reservation_id": "cr-1", "capacity_reservation_preference": "open"},
            "exclude each other",
        ),
        ({"placement_group": "mine", "placement_strategy": "spread"}, "keep one of them"),
        ({"placement_strategy": "cluster", "subnet_ids": ["a", "b"]}, "stays in one zone"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_asked_for(change: dict[str, Any], reason: str) -> None:
    fake = FakeEks()
    with pytest.raises(PlatformError, match=re.escape(reason)):
        converge(fake, group(name="fine"), group(**change))
    assert fake.client.calls == []


@pytest.mark.parametrize(
    ("image", "types"),
    [
        ("AL2023_x86_64_STANDARD", ["m5.2xlarge", "c7i-flex.large", "t3.medium", "g4ad.xlarge", "dl1.24xlarge"]),
        (
            "AL2023_ARM_64_STANDARD",
            ["m7g.2xlarge", "c7gn.large", "a1.large", "t4g.small", "im4gn.large", "is4gen.large"],
        ),
        ("AL2023_x86_64_NVIDIA", ["g4dn.xlarge", "g6e.xlarge", "gr6.4xlarge", "p4de.24xlarge", "p6-b200.48xlarge"]),
        ("AL2023_ARM_64_NVIDIA", ["g5g.xlarge", "p6e-gb200.36xlarge"]),
        ("AL2023_x86_64_NEURON", ["inf2.xlarge", "trn1n.32xlarge", "trn2.48xlarge"]),
        ("BOTTLEROCKET_x86_64_NVIDIA_FIPS", ["g5.xlarge"]),
        ("BOTTLEROCKET_ARM_64", ["r8g.large"]),
    ],
)
def test_images_fit_their_families(image: str, types: list[str]) -> None:
    assert image_problem(image, types) == ""
