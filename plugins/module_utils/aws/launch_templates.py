# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Launch templates and placement groups of node groups: what EKS itself has no settings for.

A launch template's version never changes, so a changed setting makes a new version and EKS rolls the nodes to it.
Settings that EKS keeps (image type, instance types, sizes, subnets, role) must not stand in a template.
Source: EKS user guide, "Customize managed nodes with launch templates".
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    only_given,
    sync_tags,
    tag_dict,
    tag_list,
)

__all__ = ["GROUP_TAG", "LaunchTemplates", "PlacementGroups", "settings", "template_data"]

#: On launch templates and placement groups: the node group they were made for. Karpenter's templates lack it.
GROUP_TAG = "rayplane.io/node-group"


def template_data(
    group: dict[str, Any], *, kms_key_arn: str, hop_limit: int, placement_group: str, tags: dict[str, str]
) -> dict[str, Any]:
    """Return the data of a node group's launch template, as EC2's API takes it.

    ``group`` has the options of the module eks_node_groups. The disk is encrypted in any case: with ``kms_key_arn``, or
    with AWS's own key where that is empty.
    """

    def disk(device: str, **more: int) -> dict[str, Any]:
        ebs = {"VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True, "KmsKeyId": kms_key_arn}
        return {"DeviceName": device, "Ebs": only_given({**ebs, **{key: value or None for key, value in more.items()}})}

    sizes = {"VolumeSize": group["disk_size"], "Iops": group["disk_iops"], "Throughput": group["disk_throughput"]}
    # Bottlerocket keeps its system on the first disk, containers and their images on the second.
    bottlerocket = group["ami_type"].startswith("BOTTLEROCKET")
    disks = [disk("/dev/xvda"), disk("/dev/xvdb", **sizes)] if bottlerocket else [disk("/dev/xvda", **sizes)]
    data: dict[str, Any] = {
        "BlockDeviceMappings": disks,
        "MetadataOptions": {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": hop_limit,
        },
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": tag_list(tags)} for kind in ("instance", "network-interface", "volume")
        ],
    }
    if placement_group:
        data["Placement"] = {"GroupName": placement_group}
    reservation = group["capacity_reservation_id"]
    if reservation:
        kind = "CapacityReservationResourceGroupArn" if reservation.startswith("arn:") else "CapacityReservationId"
        data["CapacityReservationSpecification"] = {"CapacityReservationTarget": {kind: reservation}}
    elif group["capacity_reservation_preference"]:
        preference = group["capacity_reservation_preference"]
        data["CapacityReservationSpecification"] = {"CapacityReservationPreference": preference}
    if group["capacity_type"] == "CAPACITY_BLOCK":
        # EKS user guide, "Create a managed node group with Capacity Blocks": market and type stand in the template.
        data["InstanceMarketOptions"] = {"MarketType": "capacity-block"}
        data["InstanceType"] = group["instance_types"][0]
    return data


def settings(data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a launch template's data by the names a person knows, for comparison and display."""
    found: dict[str, Any] = {}
    for mapping in data.get("BlockDeviceMappings", ()):
        ebs, device = mapping.get("Ebs", {}), mapping["DeviceName"]
        found[f"disk {device}"] = only_given(
            {
                "size": ebs.get("VolumeSize"),
                "type": ebs.get("VolumeType"),
                "iops": ebs.get("Iops"),
                "throughput": ebs.get("Throughput"),
                "encrypted": ebs.get("Encrypted"),
                "kms_key": ebs.get("KmsKeyId"),
                "ends_with_instance": ebs.get("DeleteOnTermination"),
            }
        )
    metadata = data.get("MetadataOptions", {})
    found["metadata_tokens"] = metadata.get("HttpTokens")
    found["metadata_hop_limit"] = metadata.get("HttpPutResponseHopLimit")
    for one in data.get("TagSpecifications", ()):
        found[f"{one['ResourceType']}_tags"] = tag_dict(one.get("Tags"))
    found["placement_group"] = data.get("Placement", {}).get("GroupName")
    reserved = data.get("CapacityReservationSpecification", {})
    target = reserved.get("CapacityReservationTarget", {})
    found["capacity_reservation"] = (
        target.get("CapacityReservationId")
        or target.get("CapacityReservationResourceGroupArn")
        or reserved.get("CapacityReservationPreference")
    )
    found["market"] = data.get("InstanceMarketOptions", {}).get("MarketType")
    found["instance_type"] = data.get("InstanceType")
    for key in ("ImageId", "UserData", "KeyName", "SecurityGroupIds"):
        if data.get(key):
            found[key] = data[key]
    return found


class LaunchTemplates:
    """The launch templates of one cluster's node groups, found by their tags in one call."""

    def __init__(self, api: Api, changes: Changes, cluster_name: str) -> None:
        self.api = api
        self.changes = changes
        self.cluster_name = cluster_name
        self.have: dict[str, dict[str, Any]] = {}

    def observe(self, wanted: Collection[str]) -> None:
        """Read the templates made here, and those of ``wanted`` that lost their tags."""
        self.have = _made_here(
            "launch template", self._find, ("launch-template-name", "LaunchTemplateName"), wanted, self.cluster_name
        )

    def _find(self, key: str, values: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.pages(
            "describe_launch_templates",
            "LaunchTemplates",
            f"launch templates of {self.cluster_name}",
            Filters=[{"Name": key, "Values": values}],
        )
        return found

    def keep(
        self, name: str, group_name: str, *, data: dict[str, Any], tags: dict[str, str], used: dict[str, Any]
    ) -> dict[str, str]:
        """Return template and version whose settings are those of ``data``, made where there is none.

        ``used`` is what the node group runs with now, as EKS answers it, or empty. Its version is kept where its
        settings fit; otherwise the newest is taken if it fits (an interrupted run made it), or a new one is made.
        """
        resource, now = f"launch template {name}", self.have.get(name)
        tags = {**tags, GROUP_TAG: group_name}
        if now is None:
            self.changes.create(resource, {**settings(data), "tags": tags})
            answer = self.api.write(
                "create_launch_template",
                resource,
                LaunchTemplateName=name,
                LaunchTemplateData=data,
                TagSpecifications=[{"ResourceType": "launch-template", "Tags": tag_list(tags)}],
            )
            made = answer["LaunchTemplate"]["LaunchTemplateId"] if answer else f"<new {resource}>"
            return {"id": made, "version": "1"}
        number = str(now["LaunchTemplateId"])
        lacking = sync_tags(self.changes, resource, tag_dict(now.get("Tags")), tags)
        if lacking:
            self.api.write("create_tags", resource, Resources=[number], Tags=tag_list(lacking))
        latest = str(now["LatestVersionNumber"])
        version = str(used["version"]) if used.get("id") == number and str(used.get("version")).isdigit() else latest
        held, want = self._settings(resource, number, version), settings(data)
        if held == want:
            return {"id": number, "version": version}
        before, after = dict.fromkeys(want) | held, dict.fromkeys(held) | want
        self.changes.update(resource, before, after)
        if version != latest and self._settings(resource, number, latest) == want:
            return {"id": number, "version": latest}
        answer = self.api.write(
            "create_launch_template_version", resource, LaunchTemplateId=number, LaunchTemplateData=data
        )
        made = answer["LaunchTemplateVersion"]["VersionNumber"] if answer else int(latest) + 1
        return {"id": number, "version": str(made)}

    def prune(self, kept: Collection[str]) -> None:
        """Delete the templates made here that no group needs any more."""
        for name, template in self.have.items():
            if name not in kept:
                self.changes.delete(f"launch template {name}", {"versions": template["LatestVersionNumber"]})
                self.api.write(
                    "delete_launch_template",
                    f"launch template {name}",
                    LaunchTemplateId=template["LaunchTemplateId"],
                )

    def _settings(self, resource: str, number: str, version: str) -> dict[str, Any]:
        answer = self.api.read(
            "describe_launch_template_versions",
            resource,
            absent=("InvalidLaunchTemplateId.VersionNotFound",),
            LaunchTemplateId=number,
            Versions=[version],
        )
        versions = answer["LaunchTemplateVersions"] if answer else []
        return settings(versions[0]["LaunchTemplateData"]) if versions else {}


class PlacementGroups:
    """The placement groups of one cluster's node groups, found by their tags in one call."""

    def __init__(self, api: Api, changes: Changes, cluster_name: str) -> None:
        self.api = api
        self.changes = changes
        self.cluster_name = cluster_name
        self.have: dict[str, dict[str, Any]] = {}

    def observe(self, wanted: Collection[str]) -> None:
        """Read the placement groups made here, and those of ``wanted`` that lost their tags."""
        self.have = _made_here("placement group", self._find, ("group-name", "GroupName"), wanted, self.cluster_name)

    def _find(self, key: str, values: list[str]) -> list[dict[str, Any]]:
        answer = self.api.read(
            "describe_placement_groups",
            f"placement groups of {self.cluster_name}",
            Filters=[{"Name": key, "Values": values}],
        )
        return [one for one in answer["PlacementGroups"] if one.get("State") not in ("deleting", "deleted")]

    def keep(self, name: str, group_name: str, strategy: str, tags: dict[str, str], busy: float) -> None:
        """Make the placement group, or bring its tags up to date; one of another strategy is made anew."""
        resource, now = f"placement group {name}", self.have.get(name)
        tags = {**tags, GROUP_TAG: group_name}
        if now is not None and now.get("Strategy") != strategy:
            self._delete(name, now, busy)
            now = None
        if now is None:
            self.changes.create(resource, {"strategy": strategy, "tags": tags})
            self.api.write(
                "create_placement_group",
                resource,
                GroupName=name,
                Strategy=strategy,
                TagSpecifications=[{"ResourceType": "placement-group", "Tags": tag_list(tags)}],
            )
            return
        lacking = sync_tags(self.changes, resource, tag_dict(now.get("Tags")), tags)
        if lacking:
            self.api.write("create_tags", resource, Resources=[now["GroupId"]], Tags=tag_list(lacking))

    def prune(self, kept: Collection[str], busy: float) -> None:
        """Delete the placement groups made here that no group needs; instances hold them for at most ``busy`` s."""
        for name, group in self.have.items():
            if name not in kept:
                self._delete(name, group, busy)

    def _delete(self, name: str, group: dict[str, Any], busy: float) -> None:
        self.changes.delete(f"placement group {name}", {"strategy": group.get("Strategy")})
        self.api.write(
            "delete_placement_group",
            f"placement group {name}",
            busy=busy,
            GroupName=name,
        )


def _made_here(
    kind: str,
    find: Callable[[str, list[str]], list[dict[str, Any]]],
    naming: tuple[str, str],
    wanted: Collection[str],
    cluster_name: str,
) -> dict[str, dict[str, Any]]:
    """Return by name what bears the tags of this cluster's groups, and what of ``wanted`` lost them.

    ``naming``: the filter for names, and the key of a name. Raises PlatformError for what is another cluster's.
    """
    by_name, key = naming
    tagged = find(f"tag:{OWNER_TAG}", [cluster_name])
    have = {one[key]: one for one in tagged if GROUP_TAG in tag_dict(one.get("Tags"))}
    missing = sorted(set(wanted) - set(have))
    for one in find(by_name, missing) if missing else ():
        _refuse_anothers(f"{kind} {one[key]}", one, cluster_name)
        have[one[key]] = one
    return have


def _refuse_anothers(resource: str, thing: dict[str, Any], cluster_name: str) -> None:
    owner = tag_dict(thing.get("Tags")).get(OWNER_TAG, cluster_name)
    if owner != cluster_name:
        raise PlatformError(
            f"{resource} belongs to cluster {owner} by its tag {OWNER_TAG}: rename the node group, or remove the other"
        )
