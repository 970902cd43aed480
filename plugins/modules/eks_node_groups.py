#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: all managed node groups of an EKS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_node_groups
short_description: Reconcile the managed node groups of an EKS cluster as one set
description:
  - Creates, changes, upgrades and deletes managed node groups in one call. Groups are created side by side and waited
    for together.
  - The desired size counts when a group is made; afterwards it is the autoscaler's, and is touched only where it lies
    outside the bounds.
  - Groups that this module made and that are no longer listed are deleted; others are left alone.
  - Each group gets a launch template of its own, which holds what EKS has no settings for (encrypted gp3 disk, metadata
    service by tokens only, tags of instances and volumes, reserved capacity, placement). A changed setting makes a new
    version, to which EKS rolls the nodes; unchanged settings make none.
  - An image that does not fit the instance types is refused before anything is changed.
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  state:
    description: >-
      C(absent) deletes the launch templates and placement groups that are left of a cluster; the groups themselves go
      with it, in M(rayplane.platform.eks_cluster).
    type: str
    choices: [present, absent]
    default: present
  node_groups:
    description: The groups.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the group.
        type: str
        required: true
      instance_types:
        description: >-
          Instance types, the preferred first. Fixed for life. Empty only where O(node_groups[].launch_template) names
          the type: EKS takes it from one place.
        type: list
        elements: str
        default: [m5.2xlarge]
      ami_type:
        description: >-
          Image of the nodes, such as C(AL2023_x86_64_STANDARD) or C(AL2023_x86_64_NVIDIA). Fixed for life. Nodes of
          NVIDIA and Neuron images are labelled C(rayplane.io/accelerator), those of NVIDIA images also as O(gpu_label)
          says. C(CUSTOM) is the image of a launch template of your own.
        type: str
        default: AL2023_x86_64_STANDARD
      capacity_type:
        description: >-
          On-demand, spot or a capacity block. Fixed for life. A capacity block takes one instance type and
          O(node_groups[].capacity_reservation_id), or a launch template that has both.
        type: str
        choices: [ON_DEMAND, SPOT, CAPACITY_BLOCK]
        default: ON_DEMAND
      min_size:
        description: Fewest nodes.
        type: int
        default: 0
      max_size:
        description: Most nodes.
        type: int
        required: true
      desired_size:
        description: Nodes to begin with; absent takes O(node_groups[].min_size).
        type: int
      disk_size:
        description: >-
          Disk for images and pods in GiB, gp3 and encrypted; not used with a launch template of your own.
        type: int
        default: 100
      disk_iops:
        description: >-
          IOPS of that disk, 3000 to 80000 and 500 for each GiB at most; 0 leaves gp3's own 3000.
        type: int
        default: 0
      disk_throughput:
        description: >-
          MiB/s of that disk, 125 to 2000 and a quarter of the IOPS at most; 0 leaves gp3's own 125. A machine has a
          limit of its own.
        type: int
        default: 0
      capacity_reservation_id:
        description: Capacity reservation or block to run in, by id, or a resource group of reservations by ARN.
        type: str
        default: ""
      capacity_reservation_preference:
        description: >-
          Whether nodes take open reservations that match (C(open)), none, or run in reservations only. Empty leaves
          EC2's default, which is open.
        type: str
        choices: ["", open, none, capacity-reservations-only]
        default: ""
      placement_group:
        description: Placement group of yours to run in, by name.
        type: str
        default: ""
      placement_strategy:
        description: >-
          Makes a placement group for this group. C(cluster) packs the nodes close together for fast networking between
          them, in one zone, so it takes one subnet, by default the first. Fixed for life.
        type: str
        choices: ["", cluster, partition, spread]
        default: ""
      labels:
        description: Kubernetes labels of the nodes.
        type: dict
        default: {}
      taints:
        description: Kubernetes taints of the nodes.
        type: list
        elements: dict
        default: []
        suboptions:
          key:
            description: Key of the taint.
            type: str
            required: true
          value:
            description: Value of the taint.
            type: str
            default: ""
          effect:
            description: Effect of the taint.
            type: str
            choices: [NoSchedule, NoExecute, PreferNoSchedule]
            default: NoSchedule
      subnet_ids:
        description: Subnets of the nodes; empty takes O(subnet_ids). Fixed for life.
        type: list
        elements: str
        default: []
      role_arn:
        description: IAM role of the nodes; empty takes O(role_arn). Fixed for life.
        type: str
        default: ""
      launch_template:
        description: >-
          Launch template of your own, with C(name) or C(id) and C(version), in place of the one that is made here.
        type: dict
        default: {}
      release_version:
        description: Image release to stay on; empty takes the newest when nodes are made or upgraded.
        type: str
        default: ""
      max_unavailable:
        description: Nodes replaced at a time during an update.
        type: int
        default: 1
      max_unavailable_percentage:
        description: Share of the nodes replaced at a time, in percent, in place of O(node_groups[].max_unavailable).
        type: int
      update_strategy:
        description: >-
          Whether new nodes come before old ones go (V(DEFAULT)), or old ones go first (V(MINIMAL)), which takes no
          machine beyond those that are there. Empty takes V(MINIMAL) for GPU and Neuron images, whose machines are
          scarce and count against small quotas.
        type: str
        choices: ["", DEFAULT, MINIMAL]
        default: ""
      node_repair:
        description: Whether EKS replaces nodes that it finds broken.
        type: bool
        default: false
      tags:
        description: >-
          Further tags of the group, its instances and its disks. Groups of Inferentia and Trainium also get the tag
          that tells the cluster autoscaler how many Neuron devices a node has, so that they grow from zero.
        type: dict
        default: {}
  role_arn:
    description: IAM role of the nodes of groups that name none.
    type: str
    default: ""
  subnet_ids:
    description: Subnets of the nodes of groups that name none.
    type: list
    elements: str
    default: []
  tags:
    description: Tags of every group, its instances and its disks.
    type: dict
    default: {}
  kms_key_arn:
    description: KMS key that encrypts the disks; empty takes AWS's own key.
    type: str
    default: ""
  metadata_hop_limit:
    description: >-
      How many network hops the metadata service's answers live. Pods are the second; 1 keeps them from it.
    type: int
    default: 1
  gpu_label:
    description: >-
      Whether nodes of NVIDIA images are labelled C(k8s.amazonaws.com/accelerator), by which the cluster autoscaler
      waits for their device plugin before it adds another node. Must be false where the plugin calls GPUs anything but
      C(nvidia.com/gpu), which is the only name that the autoscaler knows.
    type: bool
    default: true
  replace:
    description: >-
      Whether a group is deleted and made anew when a property changes that is fixed for life. Its nodes are drained
      and lost.
    type: bool
    default: false
  force_upgrade:
    description: Whether a version upgrade goes on when a pod disruption budget holds pods back.
    type: bool
    default: false
  image_patches:
    description: >-
      What happens where AWS has published a newer release of a group's image for its Kubernetes version. V(ignore) does
      not ask, V(report) warns, V(update) rolls the nodes to it. Groups with O(node_groups[].release_version) or an
      image of their own are passed by.
    type: str
    choices: [ignore, report, update]
    default: ignore
  kubernetes_version:
    description: >-
      Version that the cluster has once its own task is done; lets check mode predict what follows an upgrade. Empty
      asks EKS.
    type: str
    default: ""
  purge:
    description: Whether groups that this module made and that are no longer listed are deleted.
    type: bool
    default: true
  wait_timeout:
    description: Longest wait for one step, in seconds.
    type: int
    default: 2400
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the node groups
  rayplane.platform.eks_node_groups:
    cluster_name: ray-llm-cluster
    role_arn: arn:aws:iam::123456789012:role/ray-llm-cluster-node
    subnet_ids: [subnet-1, subnet-2]
    node_groups:
      - {name: cpu, instance_types: [m5.2xlarge], min_size: 2, max_size: 5}
      - name: gpu
        instance_types: [g4dn.xlarge]
        ami_type: AL2023_x86_64_NVIDIA
        min_size: 1
        max_size: 10
        desired_size: 2
        taints:
          - {key: nvidia.com/gpu, value: present}
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
node_groups:
  description: Status of each group by name.
  returned: always
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import (
    NEURON_TAG,
    EksSet,
    concurrently,
    find_cluster,
    health,
    minor,
    neuron_devices,
    node_group_problem,
    node_labels,
    retag,
    wait_for,
    wait_for_update,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.launch_templates import (
    LaunchTemplates,
    PlacementGroups,
    template_data,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.node_images import newer, newest_releases

EFFECTS = {"NoSchedule": "NO_SCHEDULE", "NoExecute": "NO_EXECUTE", "PreferNoSchedule": "PREFER_NO_SCHEDULE"}
BUSY = ("CREATING", "UPDATING", "DELETING")


class NodeGroups(EksSet):
    """The node groups of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], api: Api, changes: Changes, ec2: Api, ssm: Callable[[], Api]) -> None:
        super().__init__(params, api, changes)
        # Asked for only where it is needed: a client costs a tenth of a second.
        self.ssm = ssm
        self.newest: dict[str, str] = {}
        self.templates = LaunchTemplates(ec2, changes, self.cluster_name)
        self.placements = PlacementGroups(ec2, changes, self.cluster_name)
        self.touched: list[str] = []

    def present(self) -> dict[str, Any]:
        """Bring the set to its description and return the groups' status."""
        groups = self.params["node_groups"]
        self._refuse_nonsense()
        have = self._observe(self.list_all("list_nodegroups", "nodegroups"))
        self.templates.observe([self._made_name(group) for group in groups if not group["launch_template"]])
        self.placements.observe([self._made_name(group) for group in groups if group["placement_strategy"]])
        # Everything that must fail, fails before anything is changed.
        replaced = [group["name"] for group in groups if self._must_be_replaced(group, have.get(group["name"]))]
        version = self.params["kubernetes_version"] or (find_cluster(self.api, self.cluster_name) or {}).get(
            "version", ""
        )
        self._look_for_patches({**have, **dict.fromkeys(replaced)}, version)
        unwanted = self.unwanted(have, [group["name"] for group in groups])
        self._delete({**{name: have[name] for name in replaced}, **unwanted})
        for group in groups:
            now = None if group["name"] in replaced else have.get(group["name"])
            template = self._prepare(group, now)
            if now is None:
                self._create(group, template)
            else:
                self._update(group, now, version, template)
        self._wait_for(self.touched)
        self._prune(groups)
        if self.changes.actions and not self.changes.check_mode:
            have = self._observe([*{*have, *(group["name"] for group in groups)}])
        self._warn_of_degraded({group["name"]: have[group["name"]] for group in groups if group["name"] in have})
        return {"node_groups": {name: group["status"] for name, group in have.items()}}

    def absent(self) -> dict[str, Any]:
        """Delete what the groups of a deleted cluster were launched from."""
        self.templates.observe([])
        self.placements.observe([])
        self._prune([])
        return {"node_groups": {}}

    def _refuse_nonsense(self) -> None:
        names = [group["name"] for group in self.params["node_groups"]]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise PlatformError(f"node group named twice: {', '.join(doubled)}; give each its own name")
        for group in self.params["node_groups"]:
            problem = node_group_problem(group)
            if problem:
                raise PlatformError(f"node group {group['name']}: {problem}")
            unknown = neuron_devices(group["instance_types"]) is None
            if unknown and not group["min_size"] and NEURON_TAG not in group["tags"]:
                self.changes.warnings.append(
                    f"node group {group['name']}: it is not known how many Neuron devices"
                    f" {', '.join(group['instance_types'])} have, so the cluster autoscaler will not start its first"
                    f" node. Cure: give the number in its tags, {NEURON_TAG}"
                )

    def _observe(self, names: list[str]) -> dict[str, dict[str, Any]]:
        found = zip(names, concurrently(self._describe, names), strict=True)
        return {name: group for name, group in found if group}

    def _describe(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.describe(
            "describe_nodegroup", "nodegroup", f"node group {name}", nodegroupName=name
        )
        return found

    def _made_name(self, group: dict[str, Any]) -> str:
        return f"{self.cluster_name}-{group['name']}"

    def _look_for_patches(self, have: dict[str, Any], cluster_version: str) -> None:
        """Find the groups whose image has a newer release, and say so or have them updated."""
        if self.params["image_patches"] == "ignore":
            return
        asked = {
            group["name"]: now
            for group in self.params["node_groups"]
            # Nodes that follow the control plane get the newest release with it.
            if (now := have.get(group["name"])) and not group["release_version"] and not _behind(now, cluster_version)
        }
        for name, release in newest_releases(self.ssm(), asked).items() if asked else ():
            runs = asked[name].get("releaseVersion") or ""
            if newer(release, runs) and self.params["image_patches"] == "update":
                self.newest[name] = release
            elif newer(release, runs):
                self.changes.warnings.append(
                    f"node group {name}: image release {release} is published, its nodes run {runs}. Cure: set"
                    f" eks_node_image_patches to update, or the group's release_version to {release}"
                )

    def _prepare(self, group: dict[str, Any], now: dict[str, Any] | None) -> dict[str, str]:
        """Keep what the group is launched from, and return its launch template."""
        placement = group["placement_group"]
        if group["placement_strategy"]:
            placement = self._made_name(group)
            self.placements.keep(
                placement, group["name"], group["placement_strategy"], self._tags(group), self.params["wait_timeout"]
            )
        if group["launch_template"]:
            return _template(group)
        name = self._made_name(group)
        data = template_data(
            group,
            kms_key_arn=self.params["kms_key_arn"],
            hop_limit=self.params["metadata_hop_limit"],
            placement_group=placement,
            tags={"Name": name, **self._tags(group)},
        )
        used = (now or {}).get("launchTemplate") or {}
        kept: dict[str, str] = self.templates.keep(name, group["name"], data=data, tags=self._tags(group), used=used)
        return kept

    def _prune(self, groups: list[dict[str, Any]]) -> None:
        if self.params["purge"]:
            self.templates.prune({self._made_name(group) for group in groups if not group["launch_template"]})
            placed = {self._made_name(group) for group in groups if group["placement_strategy"]}
            self.placements.prune(placed, self.params["wait_timeout"])

    def _must_be_replaced(self, group: dict[str, Any], now: dict[str, Any] | None) -> bool:
        if now is None:
            return False
        resource = f"node group {group['name']}"
        if now["status"] in ("CREATE_FAILED", "DELETE_FAILED", "DELETING"):
            # It never becomes active again.
            return True
        want = only_given(self._fixed(group))
        have = {key: sorted(now[key]) if key == "subnets" else now.get(key) for key in want}
        differing = [key for key in want if have[key] != want[key] and not str(want[key]).startswith(("<", "['<"))]
        self._compare_origin(group, now, have, want, differing)
        if differing and not self.params["replace"]:
            detail = ", ".join(f"{key} {have[key]} -> {want[key]}" for key in differing)
            raise PlatformError(
                f"{resource} of {self.cluster_name}: {detail} cannot change in place. Give the group another name"
                " (the new one is made, the old"
                " one deleted), or set eks_node_groups_replace to true to delete it first and lose its nodes for"
                " minutes"
            )
        return bool(differing)

    def _compare_origin(
        self,
        group: dict[str, Any],
        now: dict[str, Any],
        have: dict[str, Any],
        want: dict[str, Any],
        differing: list[str],
    ) -> None:
        # EKS keeps a group with the launch template that it was made with, by id; only the version moves.
        held = now.get("launchTemplate") or {}
        given = group["launch_template"]
        name = given.get("name", "") if given else self._made_name(group)
        same = held.get("id") == given["id"] if given.get("id") else held.get("name") == name
        if not given:
            ours = self.templates.have.get(name)
            same = same and ours is not None and ours["LaunchTemplateId"] == held.get("id")
        if not same:
            gone = " (which is gone)" if held.get("name") == name else ""
            have["launchTemplate"] = f"{held['name']}{gone}" if held.get("name") else "none"
            want["launchTemplate"] = given.get("id") or name
            differing.append("launchTemplate")
        placement = self.placements.have.get(self._made_name(group)) if group["placement_strategy"] else None
        if placement and placement.get("Strategy") != group["placement_strategy"]:
            have["placement_strategy"] = placement.get("Strategy")
            want["placement_strategy"] = group["placement_strategy"]
            differing.append("placement_strategy")

    def _delete(self, groups: dict[str, dict[str, Any]]) -> None:
        for name, group in groups.items():
            resource = f"node group {name}"
            self.changes.delete(
                resource, only_given({key: group.get(key) for key in ("instanceTypes", "amiType", "scalingConfig")})
            )
            if group["status"] != "DELETING":
                self.api.write(
                    "delete_nodegroup",
                    resource,
                    busy=self.params["wait_timeout"],
                    clusterName=self.cluster_name,
                    nodegroupName=name,
                )
        self._wait_for(list(groups), gone=True)

    def _fixed(self, group: dict[str, Any]) -> dict[str, Any]:
        # The type of a capacity block stands in its launch template, and nowhere else.
        block = group["capacity_type"] == "CAPACITY_BLOCK" and not group["launch_template"]
        # Nodes close together stand in one zone.
        subnets = self.params["subnet_ids"][: 1 if group["placement_strategy"] == "cluster" else None]
        return {
            "instanceTypes": None if block else group["instance_types"],
            "amiType": None if group["ami_type"] == "CUSTOM" else group["ami_type"],
            "capacityType": group["capacity_type"],
            "subnets": sorted(group["subnet_ids"] or subnets),
            "nodeRole": group["role_arn"] or self.params["role_arn"],
        }

    def _tags(self, group: dict[str, Any]) -> dict[str, str]:
        return {**{str(key): str(value) for key, value in group["tags"].items()}, **self.tags}

    def _group_tags(self, group: dict[str, Any]) -> dict[str, str]:
        # On the group alone: in the launch template it would roll nodes that have no use for it.
        devices = neuron_devices(group["instance_types"])
        return {**({NEURON_TAG: str(devices)} if devices else {}), **self._tags(group)}

    def _labels(self, group: dict[str, Any]) -> dict[str, str]:
        given = {str(key): str(value) for key, value in group["labels"].items()}
        made = node_labels(group["ami_type"], group["instance_types"], gpu_label=self.params["gpu_label"])
        return {**made, **given}

    def _create(self, group: dict[str, Any], template: dict[str, str]) -> None:
        resource = f"node group {group['name']}"
        wanted = only_given(
            {
                **self._fixed(group),
                "scalingConfig": {
                    "minSize": group["min_size"],
                    "maxSize": group["max_size"],
                    "desiredSize": _desired(group),
                },
                "labels": self._labels(group),
                "taints": _taints(group),
                "updateConfig": {**_update_config(group), "updateStrategy": _strategy(group)},
                "nodeRepairConfig": {"enabled": True} if group["node_repair"] else None,
                "launchTemplate": template,
                "releaseVersion": group["release_version"],
                "tags": self._group_tags(group),
            }
        )
        self.changes.create(resource, wanted)
        self.api.write(
            "create_nodegroup",
            resource,
            settle=90,
            clusterName=self.cluster_name,
            nodegroupName=group["name"],
            **wanted,
        )
        self.touched.append(group["name"])

    def _update(self, group: dict[str, Any], now: dict[str, Any], version: str, template: dict[str, str]) -> None:
        resource = f"node group {group['name']}"
        if now["status"] in BUSY:
            self._wait_for([group["name"]])
        config = {**self._scaling(resource, group, now), **self._labels_and_taints(resource, group, now)}
        limits = _update_config(group)
        held = {key: value for key, value in (now.get("updateConfig") or {}).items() if key.startswith("maxUnavail")}
        strategy = (now.get("updateConfig") or {}).get("updateStrategy", "DEFAULT")
        differs = self.changes.update(resource, {"update_limit": held}, {"update_limit": limits})
        if (
            self.changes.update(resource, {"update_strategy": strategy}, {"update_strategy": _strategy(group)})
            or differs
        ):
            config["updateConfig"] = {**limits, "updateStrategy": _strategy(group)}
        repair = bool((now.get("nodeRepairConfig") or {}).get("enabled"))
        if self.changes.update(resource, {"node_repair": repair}, {"node_repair": group["node_repair"]}):
            config["nodeRepairConfig"] = {"enabled": group["node_repair"]}
        if config:
            self._step("update_nodegroup_config", resource, group["name"], config)
        wanted = self._group_tags(group)
        retag(self.api, self.changes, resource, now["nodegroupArn"], have=now.get("tags", {}), want=wanted)
        self._upgrade(resource, group, now, version, template)

    def _scaling(self, resource: str, group: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        scaling = now["scalingConfig"]
        want = {"minSize": group["min_size"], "maxSize": group["max_size"]}
        # The autoscaler owns the desired size; it is moved only as far as the new bounds demand.
        inside = min(max(scaling["desiredSize"], want["minSize"]), want["maxSize"])
        want["desiredSize"] = inside
        return {"scalingConfig": want} if self.changes.update(resource, scaling, want) else {}

    def _labels_and_taints(self, resource: str, group: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = {}
        have, want = now.get("labels") or {}, self._labels(group)
        gone = sorted(set(have) - set(want))
        if self.changes.update(resource, {"labels": have}, {"labels": want}):
            config["labels"] = only_given({"addOrUpdateLabels": want, "removeLabels": gone})
        held, wished = _ordered(now.get("taints") or []), _ordered(_taints(group))
        if self.changes.update(resource, {"taints": held}, {"taints": wished}):
            kept = {(taint["key"], taint["effect"]) for taint in wished}
            dropped = [taint for taint in held if (taint["key"], taint["effect"]) not in kept]
            config["taints"] = only_given({"addOrUpdateTaints": wished, "removeTaints": dropped})
        return config

    def _upgrade(
        self, resource: str, group: dict[str, Any], now: dict[str, Any], cluster_version: str, template: dict[str, str]
    ) -> None:
        wanted: dict[str, Any] = {}
        version = now.get("version") or ""
        if _behind(now, cluster_version) and group["ami_type"] != "CUSTOM":
            self.changes.update(resource, {"version": version}, {"version": cluster_version})
            wanted["version"] = cluster_version
        release = group["release_version"] or self.newest.get(group["name"])
        if release and self.changes.update(
            resource, {"release_version": now.get("releaseVersion")}, {"release_version": release}
        ):
            wanted["releaseVersion"] = release
        held, pinned = now.get("launchTemplate") or {}, template.get("version", "")
        if pinned.isdigit() and self.changes.update(
            resource, {"launch_template_version": str(held.get("version"))}, {"launch_template_version": pinned}
        ):
            wanted["launchTemplate"] = template
        if wanted:
            self._step(
                "update_nodegroup_version", resource, group["name"], {**wanted, "force": self.params["force_upgrade"]}
            )

    def _step(self, operation: str, resource: str, name: str, arguments: dict[str, Any]) -> None:
        update = self.api.write(
            operation,
            resource,
            busy=self.params["wait_timeout"],
            clusterName=self.cluster_name,
            nodegroupName=name,
            **arguments,
        )
        wait_for_update(
            self.api, resource, update, self.params["wait_timeout"], name=self.cluster_name, nodegroupName=name
        )

    def _wait_for(self, names: list[str], *, gone: bool = False) -> None:
        if not self.changes.check_mode:
            wait_for(
                "node group",
                names,
                self._describe,
                owner=self.cluster_name,
                timeout=self.params["wait_timeout"],
                until=("ACTIVE", "DEGRADED"),
                gone=gone,
            )

    def _warn_of_degraded(self, groups: dict[str, dict[str, Any]]) -> None:
        for name, group in groups.items():
            if group["status"] == "DEGRADED":
                self.changes.warnings.append(f"node group {name} is degraded: {health(group) or 'no reason given'}")


def _behind(now: dict[str, Any], cluster_version: str) -> bool:
    # Nodes follow the control plane, never the other way round; a custom image has a version of its own.
    version = now.get("version") or ""
    return bool(version and cluster_version) and minor(version) < minor(cluster_version)


def _desired(group: dict[str, Any]) -> int:
    return int(group["min_size"] if group["desired_size"] is None else group["desired_size"])


def _update_config(group: dict[str, Any]) -> dict[str, int]:
    if group["max_unavailable_percentage"] is not None:
        return {"maxUnavailablePercentage": int(group["max_unavailable_percentage"])}
    return {"maxUnavailable": int(group["max_unavailable"])}


def _strategy(group: dict[str, Any]) -> str:
    accelerated = any(word in group["ami_type"] for word in ("NVIDIA", "NEURON"))
    return str(group["update_strategy"] or ("MINIMAL" if accelerated else "DEFAULT"))


def _taints(group: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"key": taint["key"], "value": taint["value"], "effect": EFFECTS[taint["effect"]]} for taint in group["taints"]
    ]


def _ordered(taints: list[dict[str, str]]) -> list[dict[str, str]]:
    full = [{"key": taint["key"], "value": taint.get("value", ""), "effect": taint["effect"]} for taint in taints]
    return sorted(full, key=lambda taint: (taint["key"], taint["effect"]))


def _template(group: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in group["launch_template"].items() if key in ("name", "id", "version")}


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    eks, ec2 = (Api(module.client(name), changes) for name in ("eks", "ec2"))
    groups = NodeGroups(module.params, eks, changes, ec2, lambda: Api(module.client("ssm"), changes))
    return groups.present() if module.params["state"] == "present" else groups.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
