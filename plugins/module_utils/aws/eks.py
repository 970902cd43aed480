# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What the EKS modules share: reading a whole set, fitting images to instances, waiting for updates, reading health."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    cure_of,
    sync_tags,
    wait_until,
)
from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import GPU_LABEL, LABEL_OF_FAMILY

__all__ = [
    "ABSENT",
    "AMI_TYPES",
    "GPU_LABEL",
    "NEURON_TAG",
    "EksSet",
    "accelerator",
    "concurrently",
    "find_cluster",
    "gp3_problem",
    "health",
    "image_problem",
    "minor",
    "neuron_devices",
    "node_group_problem",
    "node_labels",
    "refuse_ended",
    "require_cluster",
    "resolve_role",
    "retag",
    "wait_for",
    "wait_for_update",
]

#: Error codes that mean "there is no such thing".
ABSENT = ("ResourceNotFoundException",)

#: Images of managed node groups, as EKS's API names them. Those of Amazon Linux 2 get no releases since November 2025
#: and none for Kubernetes 1.33 and later; Windows runs no Ray.
AMI_TYPES = [
    "AL2023_x86_64_STANDARD",
    "AL2023_ARM_64_STANDARD",
    "AL2023_x86_64_NVIDIA",
    "AL2023_ARM_64_NVIDIA",
    "AL2023_x86_64_NEURON",
    "BOTTLEROCKET_x86_64",
    "BOTTLEROCKET_ARM_64",
    "BOTTLEROCKET_x86_64_NVIDIA",
    "BOTTLEROCKET_ARM_64_NVIDIA",
    "BOTTLEROCKET_x86_64_FIPS",
    "BOTTLEROCKET_ARM_64_FIPS",
    "BOTTLEROCKET_x86_64_NVIDIA_FIPS",
    "BOTTLEROCKET_ARM_64_NVIDIA_FIPS",
    "CUSTOM",
]

#: The tag that tells the cluster autoscaler how many Neuron devices a node of an empty group would have: unlike GPUs it
#: does not know them by the instance type. It reads the tags of managed node groups by DescribeNodegroup. Source:
#: kubernetes/autoscaler, cloudprovider/aws/aws_manager.go, buildNodeFromTemplate.
NEURON_TAG = "k8s.io/cluster-autoscaler/node-template/resources/aws.amazon.com/neuron"

# Neuron devices (chips) of a machine. Source: AWS Neuron documentation, the architecture pages of Inf1, Inf2, Trn1 and
# Trn2.
_NEURON_DEVICES = {
    **{"inf1.xlarge": 1, "inf1.2xlarge": 1, "inf1.6xlarge": 4, "inf1.24xlarge": 16},
    **{"inf2.xlarge": 1, "inf2.8xlarge": 1, "inf2.24xlarge": 6, "inf2.48xlarge": 12},
    **{"trn1.2xlarge": 1, "trn1.32xlarge": 16, "trn1n.32xlarge": 16},
    **{"trn2.3xlarge": 1, "trn2.48xlarge": 16, "trn2u.48xlarge": 16},
}

# Calls under way at a time: enough to hide latency, few enough for the rate limits of EKS and IAM.
READERS = 8

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def minor(version: str) -> int:
    """Return the minor number of a Kubernetes version such as ``1.36``; raise ``PlatformError`` for anything else."""
    parts = version.split(".")
    if len(parts) != 2 or parts[0] != "1" or not parts[1].isdigit():
        raise PlatformError(f"Kubernetes version {version!r} is not of the form 1.36: write major and minor in quotes")
    return int(parts[1])


def find_cluster(api: Api, name: str) -> dict[str, Any] | None:
    """Return the description of a cluster, or None."""
    answer = api.read("describe_cluster", f"cluster {name}", absent=ABSENT, name=name)
    found: dict[str, Any] | None = answer["cluster"] if answer else None
    return found


def _missing(name: str) -> PlatformError:
    return PlatformError(
        f"cluster {name} does not exist: run the eks role from its first task, or check platform_cluster_name"
        " and platform_region"
    )


def require_cluster(api: Api, changes: Changes, name: str) -> dict[str, Any] | None:
    """Return the description of the cluster; None only in check mode, where an earlier task would have made it."""
    cluster = find_cluster(api, name)
    if cluster is None and not changes.check_mode:
        raise _missing(name)
    return cluster


def concurrently(read: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """Return ``read`` of each item, in order, a few at a time. Clients of the SDK may be shared by threads."""
    listed = list(items)
    if len(listed) < 2:
        return [read(item) for item in listed]
    with ThreadPoolExecutor(min(READERS, len(listed))) as pool:
        return list(pool.map(read, listed))


class EksSet:
    """What reconcilers of one kind of thing in one cluster share."""

    def __init__(self, params: dict[str, Any], api: Api, changes: Changes) -> None:
        self.params = params
        self.api = api
        self.changes = changes
        self.cluster_name: str = params["cluster_name"]
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.cluster_name}

    def list_all(self, operation: str, key: str) -> list[Any]:
        """Return what a listing operation of the cluster answers, all pages of it.

        A cluster that does not exist has nothing in check mode, where an earlier task would have made it; otherwise it
        is a ``PlatformError``. So no call is needed only to ask whether the cluster is there.
        """
        try:
            found: list[Any] = self.api.pages(
                operation, key, f"cluster {self.cluster_name}", clusterName=self.cluster_name
            )
            return found
        except PlatformError as error:
            answer = getattr(error.__cause__, "response", {})
            if answer.get("Error", {}).get("Code") not in ABSENT:
                raise
            if self.changes.check_mode:
                return []
            raise _missing(self.cluster_name) from error

    def describe(self, operation: str, key: str, resource: str, **identity: str) -> dict[str, Any] | None:
        """Return one thing of the cluster, or None where there is none."""
        answer = self.api.read(operation, resource, absent=ABSENT, clusterName=self.cluster_name, **identity)
        found: dict[str, Any] | None = answer[key] if answer else None
        return found

    def owned(self, thing: Mapping[str, Any]) -> bool:
        """Return whether the thing was made for this cluster by these modules."""
        return bool((thing.get("tags") or {}).get(OWNER_TAG) == self.cluster_name)

    def unwanted(self, have: Mapping[Any, dict[str, Any]], listed: Iterable[Any]) -> dict[Any, dict[str, Any]]:
        """Return what is there, was made here and is listed no longer; nothing where purging is off."""
        if not self.params["purge"]:
            return {}
        kept = set(listed)
        return {name: thing for name, thing in have.items() if name not in kept and self.owned(thing)}


def resolve_role(role: str, known: Mapping[str, str]) -> str:
    """Return the ARN of a role given as ARN or by a name in ``known``."""
    if role.startswith(("arn:", "<")):
        return role
    if role not in known:
        raise PlatformError(
            f"role_arn {role!r} is neither an ARN nor one of the roles made here: {', '.join(sorted(known)) or 'none'}"
        )
    return known[role]


def health(item: Mapping[str, Any]) -> str:
    """Return the health issues of a cluster, node group or add-on as one line; empty when there is none."""
    return "; ".join(
        _issue(one.get("code"), one.get("message"), one.get("resourceIds"))
        for one in item.get("health", {}).get("issues", [])
    )


def _issue(code: str | None, message: str | None, resources: Sequence[str] | None) -> str:
    of = f" ({', '.join(resources)})" if resources else ""
    return f"{code or '?'}: {(message or '').rstrip('. ')}{of}"


#: Kind -> statuses that end a wait for it to work, and those that end a wait for it to be gone: AWS does nothing more.
ENDED = {
    "cluster": (("FAILED", "DELETING"), ("FAILED",)),
    "node group": (("CREATE_FAILED", "DELETE_FAILED", "DELETING"), ("DELETE_FAILED",)),
    "add-on": (("CREATE_FAILED", "UPDATE_FAILED", "DELETE_FAILED", "DELETING"), ("DELETE_FAILED",)),
}
# Code of a health issue -> what to do about it, where the issue's own text names no error code of a call.
_ISSUE_CURES = {
    "NodeCreationFailure": "the nodes did not reach the API server: check their subnets' way there (NAT gateway or"
    " endpoints), the security groups and the policies of the node role",
    "InsufficientFreeAddresses": "the subnets are full: give larger ones (network_vpc_cidr) or free addresses",
    "PodEvictionFailure": "a pod disruption budget holds pods back: loosen it, or set eks_node_groups_force_upgrade to"
    " true",
    "ConfigurationConflict": "set the add-on's resolve_conflicts to OVERWRITE, or remove what conflicts",
    "Ec2SecurityGroupDeletionFailure": "something still uses the security group: remove it, then run again",
}


def _cure(issues: str) -> str:
    return cure_of(issues) or next((cure for code, cure in _ISSUE_CURES.items() if code in issues), "")


def refuse_ended(kind: str, owner: str, found: Mapping[str, Mapping[str, Any] | None], *, gone: bool = False) -> None:
    """Raise ``PlatformError`` with AWS's health issues where waiting for these things, by name, is pointless."""
    ended = []
    for name, thing in found.items():
        if thing is None or thing["status"] not in ENDED[kind][gone]:
            continue
        issues = health(thing)
        cure = _cure(issues) or "destroy it and run again" * (kind == "cluster")
        text = f"{kind} {name}{f' of {owner}' * (owner != name)}: {thing['status']}: {issues or 'no reason given'}"
        anew = f". {kind[0].upper()}{kind[1:]}s whose creation failed are made anew by the next run"
        ended.append(f"{text}{f'. Cure: {cure}' if cure else ''}{anew if thing['status'] == 'CREATE_FAILED' else ''}")
    if ended:
        raise PlatformError("; ".join(ended))


def wait_for(
    kind: str,
    names: Iterable[str],
    describe: Callable[[str], Mapping[str, Any] | None],
    *,
    owner: str,
    timeout: float,
    until: Sequence[str] = ("ACTIVE",),
    gone: bool = False,
) -> None:
    """Wait until all of these things have a status of ``until`` or, with ``gone``, are there no more.

    They are looked at side by side, so the first that fails ends the wait at once.
    """
    left = list(names)

    def probe() -> tuple[bool, str]:
        found = dict(zip(left, concurrently(describe, left), strict=True))
        refuse_ended(kind, owner, found, gone=gone)
        left[:] = [
            name
            for name, thing in found.items()
            if (thing is not None if gone else thing is None or thing["status"] not in until)
        ]
        states = {name: found[name] or {"status": "not listed yet"} for name in left}
        return not left, ", ".join(f"{name} is {one['status']} {health(one)}".strip() for name, one in states.items())

    if left:
        wait_until(f"{'deletion of ' * gone}{kind} {', '.join(left)}", probe, timeout)


def retag(
    api: Api, changes: Changes, resource: str, arn: str, *, have: Mapping[str, str], want: Mapping[str, str]
) -> None:
    """Set the tags that are missing or differ."""
    lacking = sync_tags(changes, resource, have, want)
    if lacking:
        api.write("tag_resource", resource, resourceArn=arn, tags=lacking)


def wait_for_update(api: Api, resource: str, update: Any, timeout: float, **identity: str) -> None:
    """Wait until an update ends; ``identity`` names what is updated (``name``, ``nodegroupName``, ``addonName``).

    ``update`` is the answer of the updating call, None in check mode. Raises ``PlatformError`` with AWS's own errors
    if the update fails.
    """
    if not update:
        return
    update_id = update["update"]["id"]

    def probe() -> tuple[bool, str]:
        answer = api.read("describe_update", resource, updateId=update_id, **identity)["update"]
        if answer["status"] in ("Failed", "Cancelled"):
            reasons = "; ".join(
                _issue(error.get("errorCode"), error.get("errorMessage"), error.get("resourceIds"))
                for error in answer.get("errors", [])
            )
            cure = _cure(reasons)
            raise PlatformError(
                f"update {update_id} ({answer['type']}) of {resource} ended as {answer['status']}:"
                f" {reasons or 'no reason given'}{f'. Cure: {cure}' if cure else ''}"
            )
        return answer["status"] == "Successful", f"update {update_id} is {answer['status']}"

    wait_until(f"update of {resource}", probe, timeout, delay=10)


def _architecture(instance_type: str) -> str:
    # AWS's naming: letters of the series, number of the generation, then attributes, of which g is Graviton.
    match = re.match(r"([a-z]+)(\d+)([a-z]*)", instance_type)
    if match is None:
        return ""
    series, number, attributes = match.groups()
    arm = "g" in attributes or (series, number) == ("a", "1") or (series + number + attributes) == "p6e"
    return "ARM_64" if arm else "x86_64"


def accelerator(instance_type: str) -> str:
    """Return ``nvidia``, ``neuron`` or an empty text for an instance type, by AWS's naming.

    Source: "Amazon EC2 instance type naming conventions"; series g, gr and p carry NVIDIA GPUs (g4ad carries AMD's),
    inf and trn carry AWS's Neuron cores.
    """
    series = re.match(r"[a-z]*", instance_type)
    name = series.group() if series else ""
    if name in ("g", "gr", "p") and not instance_type.startswith("g4ad"):
        return "nvidia"
    return "neuron" if name in ("inf", "trn") else ""


def _image_accelerator(ami_type: str) -> str:
    return "nvidia" if "_NVIDIA" in ami_type else "neuron" if "_NEURON" in ami_type else ""


def image_problem(ami_type: str, instance_types: Sequence[str]) -> str:
    """Return why an image cannot run on instance types, with the cure, or an empty text.

    Looks at architecture and accelerator. An image of one's own (``CUSTOM``) is not judged.
    """
    if ami_type == "CUSTOM":
        return ""
    if ami_type.startswith(("AL2_", "WINDOWS")):
        reason = "gets no releases any more" if ami_type.startswith("AL2_") else "runs no Ray"
        return f"image {ami_type} {reason}: take one of {', '.join(AMI_TYPES)}"
    if ami_type not in AMI_TYPES:
        return f"image {ami_type} is not one of {', '.join(AMI_TYPES)}"
    architecture = "ARM_64" if "ARM_64" in ami_type else "x86_64"
    has = _image_accelerator(ami_type)
    for one in instance_types:
        needs_architecture, needs = _architecture(one), accelerator(one)
        if not needs_architecture:
            return f"{one!r} is not the name of an instance type. Cure: write one such as g5.xlarge"
        if (architecture, has) == (needs_architecture, needs):
            continue
        wrong = []
        if architecture != needs_architecture:
            wrong.append(f"{one} is {needs_architecture}")
        if has != needs:
            wrong.append(f"{one} has {needs or 'no accelerator'}, the image drives {has or 'none'}")
        family = "BOTTLEROCKET" if ami_type.startswith("BOTTLEROCKET") and needs != "neuron" else "AL2023"
        suffix = {"nvidia": "_NVIDIA", "neuron": "_NEURON"}.get(needs, "_STANDARD" if family == "AL2023" else "")
        fitting = f"{family}_{needs_architecture}{suffix}"
        cure = f"set ami_type {fitting}" if fitting in AMI_TYPES else "take other instance types"
        return f"image {ami_type} does not fit: {' and '.join(wrong)}. Cure: {cure}, or other instance types"
    return ""


#: IOPS and MiB/s of a gp3 volume: what each has, and the most that it can be given. Source: EBS user guide, "General
#: Purpose SSD volumes".
_GP3 = {"iops": (3000, 80000), "throughput": (125, 2000)}


def gp3_problem(iops: int, throughput: int, size: float = 0) -> tuple[str, str, str] | None:
    """Return which of ``iops`` and ``throughput`` (MiB/s) gp3 does not have, why, and the cure.

    0 leaves the volume's own. ``size`` is in GiB, 0 where it is not known.
    """
    for name, found in (("iops", iops), ("throughput", throughput)):
        low, high = _GP3[name]
        if found and not low <= found <= high:
            return name, f"a gp3 volume has {low} to {high}", f"write {min(max(found, low), high)}, or 0 for {low}"
    given = iops or _GP3["iops"][0]
    if throughput * 4 > given:
        reason = f"gp3 has a quarter MiB/s for each of its IOPS, and {given} / 4 = {given // 4}"
        return "throughput", reason, f"give it {throughput * 4} IOPS, or write {given // 4}"
    # Source: the same. The smallest volumes have their 3000 IOPS, too.
    most = max(int(size * 500), _GP3["iops"][0])
    if size and iops > most:
        reason = f"gp3 has 500 IOPS for each GiB at most, and {size:g} GiB x 500 = {size * 500:g}"
        return "iops", reason, f"write {most}, or give the volume {-(-iops // 500)} GiB"
    return None


def node_group_problem(group: Mapping[str, Any]) -> str:
    """Return what is wrong with a node group in itself, with the cure, or an empty text.

    ``group`` has the options of the module eks_node_groups, absent ones at their defaults. Nothing is asked of AWS, so
    that a preflight can use it.
    """
    low, high = int(group.get("min_size") or 0), int(group.get("max_size") or 0)
    given = group.get("desired_size")
    desired = low if given is None else int(given)
    if not 0 <= low <= desired <= high or high < 1:
        return f"min {low}, desired {desired}, max {high} do not fit: 0 <= min <= desired <= max and max >= 1"
    types, image = group.get("instance_types", ["m5.2xlarge"]), group.get("ami_type", "AL2023_x86_64_STANDARD")
    template = group.get("launch_template") or {}
    if not types and not template:
        return "instance_types is empty: name at least one, or give a launch_template that names the type"
    if image == "CUSTOM" and not template:
        return "ami_type CUSTOM takes its image from launch_template: give one with id or name, and version"
    if template and not ({"id", "name"} & set(template)):
        return f"launch_template {dict(template)} has neither id nor name"
    percentage = group.get("max_unavailable_percentage")
    if percentage is not None and not 1 <= int(percentage) <= 100:
        return f"max_unavailable_percentage {percentage} is not between 1 and 100"
    disk = {key: int(group.get(f"disk_{key}") or 0) for key in ("iops", "throughput")}
    if found := gp3_problem(**disk, size=int(group.get("disk_size") or 0)):
        return f"disk_{found[0]} {disk[found[0]]}: {found[1]}: {found[2]}"
    return image_problem(image, types) or _capacity_problem(group)


def _capacity_problem(group: Mapping[str, Any]) -> str:
    kind, template = group.get("capacity_type", "ON_DEMAND"), group.get("launch_template")
    reservation = group.get("capacity_reservation_id") or ""
    preference = group.get("capacity_reservation_preference")
    placement, strategy = group.get("placement_group"), group.get("placement_strategy")
    if template and (reservation or preference or placement or strategy):
        return "reservations and placement stand in the launch_template where one is given: set them there"
    if kind == "CAPACITY_BLOCK" and not template:
        if not reservation.startswith("cr-"):
            return "capacity_type CAPACITY_BLOCK needs capacity_reservation_id, the block's id (cr-...)"
        if len(group.get("instance_types", ())) != 1:
            return "a capacity block holds instances of one type: name that one in instance_types"
    if kind == "CAPACITY_BLOCK" and template and group.get("instance_types", ["m5.2xlarge"]):
        return "the type of a capacity block stands in the launch_template where one is given: write instance_types: []"
    if kind == "SPOT" and (reservation or preference):
        return "spot nodes do not run in reservations: set capacity_type ON_DEMAND, or drop the reservation"
    if reservation and preference:
        return "capacity_reservation_id and capacity_reservation_preference exclude each other: keep one"
    if strategy and placement:
        return "placement_group names one of yours, placement_strategy makes one: keep one of them"
    subnets = group.get("subnet_ids") or ()
    if strategy == "cluster" and len(subnets) > 1:
        return f"placement_strategy cluster stays in one zone, subnet_ids has {len(subnets)}: keep one of them"
    return ""


def node_labels(ami_type: str, instance_types: Sequence[str] = (), *, gpu_label: bool = True) -> dict[str, str]:
    """Return the labels that nodes of an image bear: device plugins are placed by them, the autoscaler goes by them.

    ``gpu_label`` is whether ``GPU_LABEL`` is among them. It must not be where the device plugin calls GPUs anything but
    ``nvidia.com/gpu``: the cluster autoscaler knows no other name, and would take such nodes for unready for ever
    (kubernetes/autoscaler issue 8095).
    """
    has = _image_accelerator(ami_type)
    labels = {"rayplane.io/accelerator": has} if has else {}
    if has == "nvidia" and gpu_label:
        names = {LABEL_OF_FAMILY.get(one.partition(".")[0], has) for one in instance_types}
        # One label for all nodes of a group: where they differ it only says whose they are.
        labels[GPU_LABEL] = names.pop() if len(names) == 1 else has
    # Bottlerocket's NVIDIA images run the device plugin on the node themselves.
    if has and ami_type.startswith("BOTTLEROCKET"):
        labels["rayplane.io/device-plugin"] = "image"
    return labels


def neuron_devices(instance_types: Sequence[str]) -> int | None:
    """Return the Neuron devices that every machine of these types has, 0 where one has none, None if it is not known.

    Where the types differ it is the fewest: what fits there fits all of them.
    """
    if not instance_types or any(accelerator(one) != "neuron" for one in instance_types):
        return 0
    counts = [_NEURON_DEVICES.get(one) for one in instance_types]
    known = [one for one in counts if one is not None]
    return min(known) if len(known) == len(counts) else None
