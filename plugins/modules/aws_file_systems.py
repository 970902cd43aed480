#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the EFS file systems of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_file_systems
short_description: Reconcile the EFS file systems of one cluster as one set
description:
  - Keeps encrypted file systems with throughput, lifecycle, backup and tags, a mount target in each zone, and the
    security group that lets the VPC reach them, in one call.
  - With O(state=absent) mount targets and security group go, so that the network can; the files only where
    O(destroy_data) says so. That is about all file systems that bear the cluster's tag, also those that are listed no
    longer.
options:
  cluster_name:
    description: Owner of the file systems; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  state:
    description: Whether the file systems exist; V(found) only looks their ids up.
    type: str
    choices: [present, absent, found]
    default: present
  file_systems:
    description: >-
      The file systems. With O(state=absent) those that lost their tag are found by it; where none is listed,
      credentials that may not look for file systems get a warning only.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the file system, at most 64 characters.
        type: str
        required: true
      kms_key_id:
        description: ARN of the KMS key that encrypts it; empty takes AWS's own. Fixed for life.
        type: str
        default: ""
      performance_mode:
        description: Fixed for life.
        type: str
        choices: [generalPurpose, maxIO]
        default: generalPurpose
      throughput_mode:
        description: How throughput is given; V(elastic) is paid by use.
        type: str
        choices: [elastic, bursting, provisioned]
        default: elastic
      provisioned_mibps:
        description: MiB/s, with V(provisioned).
        type: int
        default: 0
      ia_days:
        description: Days without access after which files move to Infrequent Access; 0 means never.
        type: int
        choices: [0, 1, 7, 14, 30, 60, 90, 180, 270, 365]
        default: 30
      archive_days:
        description: Days without access after which files move to Archive; 0 means never.
        type: int
        choices: [0, 1, 7, 14, 30, 60, 90, 180, 270, 365]
        default: 0
      back_on_access:
        description: Whether files move back to Standard with their first access.
        type: bool
        default: true
      backup:
        description: Whether AWS Backup keeps daily copies.
        type: bool
        default: false
  subnet_ids:
    description: Subnets, of which the first of each zone gets a mount target.
    type: list
    elements: str
    default: []
  client_cidrs:
    description: Who may mount; empty means the VPC.
    type: list
    elements: str
    default: []
  tags:
    description: Tags of everything.
    type: dict
    default: {}
  destroy_data:
    description: With O(state=absent), whether the files are deleted, too.
    type: bool
    default: false
  wait_timeout:
    description: Longest wait for one file system or mount target, in seconds.
    type: int
    default: 600
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the shared files
  rayplane.platform.aws_file_systems:
    cluster_name: ray-llm-cluster
    file_systems:
      - {name: ray-llm-cluster-shared}
    subnet_ids: [subnet-0a1b2c3d4e5f60718, subnet-0a1b2c3d4e5f60719]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
file_system_ids:
  description: Id of each file system by its name; in angle brackets for one that check mode would make.
  returned: state is present or found
  type: dict
kept:
  description: File systems that were kept for their files.
  returned: state is absent
  type: list
  elements: str
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    run,
    sync_tags,
    tag_dict,
    tag_list,
    wait_until,
)

NFS_PORT = 2049
LONGEST_NAME = 64
DENIED = ("AccessDenied", "AccessDeniedException")

Json = dict[str, Any]


class FileSystems:
    """The file systems of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: Json, efs: Api, ec2: Api, changes: Changes) -> None:
        self.params = params
        self.efs = efs
        self.ec2 = ec2
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.group_name = f"{self.owner}-efs"
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.owner}

    def found(self) -> Json:
        """Look the ids up."""
        ids = {}
        for wanted in self.params["file_systems"]:
            have = self._find(wanted["name"])
            if have is None and not self.changes.check_mode:
                raise PlatformError(f"file system {wanted['name']} does not exist: run the stage storage first")
            ids[wanted["name"]] = have["FileSystemId"] if have else f"<new file system {wanted['name']}>"
        return {"file_system_ids": ids}

    def present(self) -> Json:
        """Bring the file systems to their description and return their ids."""
        have = {}
        for wanted in self.params["file_systems"]:
            if len(wanted["name"]) > LONGEST_NAME:
                raise PlatformError(
                    f"file system {wanted['name']}: EFS allows {LONGEST_NAME} characters in a name; give a shorter one"
                )
            if (wanted["throughput_mode"] == "provisioned") != bool(wanted["provisioned_mibps"]):
                raise PlatformError(
                    f"file system {wanted['name']}: provisioned_mibps ({wanted['provisioned_mibps']}) goes with"
                    f" throughput_mode provisioned, and with no other ({wanted['throughput_mode']})"
                )
            have[wanted["name"]] = self._find(wanted["name"])
            self._refuse_fixed(wanted, have[wanted["name"]])
        subnets, vpc_id = self._subnets()
        group = self._security_group(vpc_id)
        ids = {}
        for wanted in self.params["file_systems"]:
            name = wanted["name"]
            ids[name] = self._file_system(wanted, have[name])
            self._mount_targets(name, ids[name], subnets, group)
        return {"file_system_ids": ids}

    def absent(self) -> Json:
        """Remove mount targets and security group, and the file systems where that is allowed."""
        kept = []
        for have in self._to_remove():
            name = tag_dict(have.get("Tags")).get("Name") or have["CreationToken"]
            resource = f"file system {name}"
            self._remove_targets(name, self._targets(have["FileSystemId"]))
            if not self.params["destroy_data"]:
                kept.append(name)
                continue
            self.changes.delete(resource, {"bytes": have["SizeInBytes"]["Value"]})
            self.efs.write("delete_file_system", resource, FileSystemId=have["FileSystemId"])
        if kept:
            self.changes.warnings.append(
                f"kept, because they hold files: {', '.join(kept)}; set storage_destroy_data to true to delete them"
            )
        for group in self._groups():
            self.changes.delete(f"security group {self.group_name}")
            self.ec2.write(
                "delete_security_group", f"security group {self.group_name}", busy=300, GroupId=group["GroupId"]
            )
        return {"kept": kept}

    def _to_remove(self) -> list[Json]:
        """Return the cluster's file systems, by their tag, or by name where that was removed."""
        names = [wanted["name"] for wanted in self.params["file_systems"]]
        try:
            listed = self.efs.pages("describe_file_systems", "FileSystems", f"file systems of {self.owner}")
        except PlatformError as error:
            refused = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") in DENIED
            if names or not refused:
                raise
            self.changes.warnings.append(f"whether {self.owner} has file systems is not known: {error}")
            return []
        found = []
        for one in listed:
            owner, name = tag_dict(one.get("Tags")).get(OWNER_TAG), one["CreationToken"]
            if one["LifeCycleState"] in ("deleting", "deleted") or (owner != self.owner and name not in names):
                continue
            if owner in (None, self.owner):
                found.append(one)
            else:
                self.changes.warnings.append(f"{_foreign(name, owner)}; it is left alone")
        return found

    def _find(self, name: str) -> Json | None:
        """The creation token is the name, so EFS itself sees to it that there is one file system of a name."""
        answer = self.efs.read("describe_file_systems", f"file system {name}", CreationToken=name)
        found = [one for one in answer["FileSystems"] if one["LifeCycleState"] not in ("deleting", "deleted")]
        if not found:
            return None
        owner = tag_dict(found[0].get("Tags")).get(OWNER_TAG, self.owner)
        if owner != self.owner:
            raise PlatformError(_foreign(name, owner))
        return dict(found[0])

    def _refuse_fixed(self, wanted: Json, have: Json | None) -> None:
        if have is None:
            return
        fixed = {"encrypted": (have.get("Encrypted"), True)}
        fixed["performance_mode"] = (have.get("PerformanceMode"), wanted["performance_mode"])
        if wanted["kms_key_id"]:
            fixed["kms_key_id"] = (have.get("KmsKeyId"), wanted["kms_key_id"])
        for key, (was, will) in fixed.items():
            if was != will:
                raise PlatformError(
                    f"file system {wanted['name']}: {key} is {was} and cannot become {will}: it is fixed for life."
                    " Declare what it is, or give the new one another name and move the files"
                )

    def _subnets(self) -> tuple[dict[str, str], str]:
        """Return one subnet for each zone, and their VPC; in check mode they may not be there yet."""
        given = self.params["subnet_ids"]
        if not given:
            raise PlatformError("subnet_ids is empty: a file system is reached through mount targets in subnets")
        real = [one for one in given if not one.startswith("<")]
        if not real:
            return {one: one for one in given}, ""
        answer = self.ec2.read("describe_subnets", f"subnets {', '.join(real)}", SubnetIds=real)
        by_id = {one["SubnetId"]: one for one in answer["Subnets"]}
        zones: dict[str, str] = {}
        for subnet_id in given:
            zones.setdefault(by_id[subnet_id]["AvailabilityZone"] if subnet_id in by_id else subnet_id, subnet_id)
        return zones, str(answer["Subnets"][0]["VpcId"])

    def _groups(self, vpc_id: str = "") -> list[Json]:
        filters = [
            {"Name": "group-name", "Values": [self.group_name]},
            {"Name": f"tag:{OWNER_TAG}", "Values": [self.owner]},
        ]
        if vpc_id:
            filters.append({"Name": "vpc-id", "Values": [vpc_id]})
        answer = self.ec2.read("describe_security_groups", f"security group {self.group_name}", Filters=filters)
        return list(answer["SecurityGroups"])

    def _security_group(self, vpc_id: str) -> str:
        resource = f"security group {self.group_name}"
        found = self._groups(vpc_id) if vpc_id else []
        cidrs = sorted(self.params["client_cidrs"])
        if not cidrs and vpc_id:
            vpc = self.ec2.read("describe_vpcs", f"VPC {vpc_id}", VpcIds=[vpc_id])["Vpcs"][0]
            blocks = vpc.get("CidrBlockAssociationSet") or [{"CidrBlock": vpc["CidrBlock"]}]
            live = [one for one in blocks if one.get("CidrBlockState", {}).get("State", "associated") == "associated"]
            cidrs = sorted(one["CidrBlock"] for one in live)
        tags = {**self.tags, "Name": self.group_name}
        if not found:
            self.changes.create(resource, {"NFS from": cidrs or "the VPC", "tags": tags})
            answer = self.ec2.write(
                "create_security_group",
                resource,
                GroupName=self.group_name,
                Description=f"NFS to the file systems of {self.owner}",
                VpcId=vpc_id,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": tag_list(tags)}],
            )
            if answer is None:
                return f"<new security group {self.group_name}>"
            group_id = str(answer["GroupId"])
            self._authorize(group_id, cidrs)
            return group_id
        group = found[0]
        group_id = str(group["GroupId"])
        rules = group.get("IpPermissions", [])
        have = sorted(f"{_ports(rule)}{source}" for rule in rules for source in _sources(rule))
        if self.changes.update(resource, {"NFS from": have}, {"NFS from": cidrs}):
            if rules:
                self.ec2.write("revoke_security_group_ingress", resource, GroupId=group_id, IpPermissions=rules)
            self._authorize(group_id, cidrs)
        lacking = sync_tags(self.changes, resource, tag_dict(group.get("Tags")), tags)
        if lacking:
            self.ec2.write("create_tags", resource, Resources=[group_id], Tags=tag_list(lacking))
        return group_id

    def _authorize(self, group_id: str, cidrs: list[str]) -> None:
        permission = {
            "IpProtocol": "tcp",
            "FromPort": NFS_PORT,
            "ToPort": NFS_PORT,
            "IpRanges": [{"CidrIp": cidr, "Description": "NFS"} for cidr in cidrs],
        }
        resource = f"security group {self.group_name}"
        self.ec2.write("authorize_security_group_ingress", resource, GroupId=group_id, IpPermissions=[permission])

    def _file_system(self, wanted: Json, have: Json | None) -> str:
        name = wanted["name"]
        resource = f"file system {name}"
        tags = {**self.tags, "Name": name}
        throughput: Json = {"ThroughputMode": wanted["throughput_mode"]}
        if wanted["provisioned_mibps"]:
            throughput["ProvisionedThroughputInMibps"] = float(wanted["provisioned_mibps"])
        lifecycle, backup = _lifecycle(wanted), "ENABLED" if wanted["backup"] else "DISABLED"
        if have is None:
            self.changes.create(
                resource,
                {
                    **throughput,
                    "encryption": wanted["kms_key_id"] or "AWS's own key",
                    "lifecycle": lifecycle,
                    "backup": backup,
                    "tags": tags,
                },
            )
            key = {"KmsKeyId": wanted["kms_key_id"]} if wanted["kms_key_id"] else {}
            answer = self.efs.write(
                "create_file_system",
                resource,
                CreationToken=name,
                PerformanceMode=wanted["performance_mode"],
                Encrypted=True,
                Backup=wanted["backup"],
                Tags=tag_list(tags),
                **throughput,
                **key,
            )
            if answer is None:
                return f"<new file system {name}>"
            system_id = str(answer["FileSystemId"])
            self._wait_available(name)
            if lifecycle:
                self._put_lifecycle(name, system_id, lifecycle)
            return system_id
        system_id = str(have["FileSystemId"])
        if have["LifeCycleState"] != "available" and not self.changes.check_mode:
            self._wait_available(name)
        if self.changes.update(resource, have, throughput):
            self.efs.write("update_file_system", resource, FileSystemId=system_id, **throughput)
        answer = self.efs.read("describe_lifecycle_configuration", resource, FileSystemId=system_id)
        was = {key: value for one in answer["LifecyclePolicies"] for key, value in one.items()}
        gone = {key: "absent" for key in was if key not in lifecycle}
        if self.changes.update(resource, was, {**lifecycle, **gone}):
            self._put_lifecycle(name, system_id, lifecycle)
        answer = self.efs.read("describe_backup_policy", resource, absent=("PolicyNotFound",), FileSystemId=system_id)
        state = (answer or {}).get("BackupPolicy", {}).get("Status", "DISABLED").replace("ING", "ED")
        if self.changes.update(resource, {"backup": state}, {"backup": backup}):
            self.efs.write("put_backup_policy", resource, FileSystemId=system_id, BackupPolicy={"Status": backup})
        lacking = sync_tags(self.changes, resource, tag_dict(have.get("Tags")), tags)
        if lacking:
            self.efs.write("tag_resource", resource, ResourceId=system_id, Tags=tag_list(lacking))
        return system_id

    def _put_lifecycle(self, name: str, system_id: str, lifecycle: Json) -> None:
        self.efs.write(
            "put_lifecycle_configuration",
            f"file system {name}",
            FileSystemId=system_id,
            LifecyclePolicies=[{key: value} for key, value in lifecycle.items()],
        )

    def _wait_available(self, name: str) -> None:
        def probe() -> tuple[bool, str]:
            have = self._find(name)
            state = have["LifeCycleState"] if have else "not listed yet"
            if state == "error":
                raise PlatformError(f"file system {name} is in state error: see it in the EFS console, then delete it")
            return state == "available", f"state {state}"

        wait_until(f"file system {name}", probe, self.params["wait_timeout"])

    def _targets(self, system_id: str) -> list[Json]:
        answer = self.efs.pages(
            "describe_mount_targets", "MountTargets", f"file system {system_id}", FileSystemId=system_id
        )
        return [one for one in answer if one["LifeCycleState"] not in ("deleting", "deleted")]

    def _mount_targets(self, name: str, system_id: str, subnets: dict[str, str], group: str) -> None:
        have = [] if system_id.startswith("<") else self._targets(system_id)
        self._remove_targets(name, [one for one in have if one["SubnetId"] not in subnets.values()])
        by_subnet = {one["SubnetId"]: one for one in have}
        for zone, subnet_id in subnets.items():
            resource = f"mount target {name} in {zone}"
            target = by_subnet.get(subnet_id)
            if target is None:
                self.changes.create(resource, {"subnet": subnet_id, "security group": group})
                self.efs.write(
                    "create_mount_target", resource, FileSystemId=system_id, SubnetId=subnet_id, SecurityGroups=[group]
                )
                continue
            target_id = target["MountTargetId"]
            answer = self.efs.read("describe_mount_target_security_groups", resource, MountTargetId=target_id)
            if self.changes.update(
                resource, {"security groups": answer["SecurityGroups"]}, {"security groups": [group]}
            ):
                self.efs.write(
                    "modify_mount_target_security_groups", resource, MountTargetId=target_id, SecurityGroups=[group]
                )
        if len(by_subnet.keys() & set(subnets.values())) < len(subnets) and not self.changes.check_mode:
            self._wait_targets(name, system_id, len(subnets))

    def _wait_targets(self, name: str, system_id: str, count: int) -> None:
        def probe() -> tuple[bool, str]:
            states = [one["LifeCycleState"] for one in self._targets(system_id)]
            if "error" in states:
                raise PlatformError(
                    f"a mount target of file system {name} ({system_id}) is in state error: delete it, then run again"
                )
            return states.count("available") >= count, f"states {', '.join(states) or 'none'}"

        wait_until(f"mount targets of file system {name}", probe, self.params["wait_timeout"])

    def _remove_targets(self, name: str, targets: list[Json]) -> None:
        for one in targets:
            resource = f"mount target {name} in {one.get('AvailabilityZoneName', one['SubnetId'])}"
            self.changes.delete(resource, {"subnet": one["SubnetId"]})
            self.efs.write("delete_mount_target", resource, MountTargetId=one["MountTargetId"])
        if not targets or self.changes.check_mode:
            return
        ids = {one["MountTargetId"] for one in targets}
        system_id = targets[0]["FileSystemId"]

        def probe() -> tuple[bool, str]:
            answer = self.efs.pages(
                "describe_mount_targets", "MountTargets", f"file system {name}", FileSystemId=system_id
            )
            left = sorted(ids & {one["MountTargetId"] for one in answer})
            return not left, f"left: {', '.join(left)}"

        wait_until(f"removal of the mount targets of file system {name}", probe, self.params["wait_timeout"])


def _foreign(name: str, owner: str | None) -> str:
    return f"file system {name} belongs to cluster {owner} (tag {OWNER_TAG})"


def _ports(rule: Json) -> str:
    """Nothing for the NFS port, which is what is expected, otherwise protocol and ports."""
    if (rule.get("IpProtocol"), rule.get("FromPort"), rule.get("ToPort")) == ("tcp", NFS_PORT, NFS_PORT):
        return ""
    return f"{rule.get('IpProtocol')} {rule.get('FromPort', '')}-{rule.get('ToPort', '')} "


def _sources(rule: Json) -> list[str]:
    return [
        *(one["CidrIp"] for one in rule.get("IpRanges", [])),
        *(one["CidrIpv6"] for one in rule.get("Ipv6Ranges", [])),
        *(one["GroupId"] for one in rule.get("UserIdGroupPairs", [])),
        *(one["PrefixListId"] for one in rule.get("PrefixListIds", [])),
    ]


def _lifecycle(wanted: Json) -> Json:
    """EFS's lifecycle policies, in one mapping."""

    def after(days: int) -> str:
        return f"AFTER_{days}_DAY{'S' if days > 1 else ''}"

    policies = {}
    if wanted["ia_days"]:
        policies["TransitionToIA"] = after(wanted["ia_days"])
    if wanted["archive_days"]:
        policies["TransitionToArchive"] = after(wanted["archive_days"])
    if policies and wanted["back_on_access"]:
        policies["TransitionToPrimaryStorageClass"] = "AFTER_1_ACCESS"
    return policies


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    systems = FileSystems(
        module.params, Api(module.client("efs"), changes), Api(module.client("ec2"), changes), changes
    )
    actions = {"present": systems.present, "absent": systems.absent, "found": systems.found}
    return actions[module.params["state"]]()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
