# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""How administrators get into the private subnets: by Systems Manager, by a bastion, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import PlatformError, wait_until
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import Context, Item, new_id
from ansible_collections.rayplane.platform.plugins.module_utils.network.endpoints import Rule, SecurityGroups
from ansible_collections.rayplane.platform.plugins.module_utils.network.roles import ServiceRole
from ansible_collections.rayplane.platform.plugins.module_utils.network.vpc import Subnets

__all__ = ["SSM_SERVICES", "Bastion"]

#: What the agent of Systems Manager calls (Systems Manager user guide, "VPC endpoints for Systems Manager").
SSM_SERVICES = ("ssm", "ssmmessages", "ec2messages")
_ENDED = ("shutting-down", "terminated")
_SUFFIX = "-bastion"
_SSH = 22


class Bastion:
    """One small instance in a public subnet, reached by SSH from the given addresses and by Systems Manager."""

    def __init__(self, context: Context, subnets: Subnets, groups: SecurityGroups) -> None:
        self.context = context
        self.subnets = subnets
        self.groups = groups
        self.wanted: bool = context.params["admin_access"] == "bastion" and context.params["state"] == "present"
        self.role = ServiceRole(context, f"{context.owner}-bastion", profile=True)
        self.instances: list[Item] = []

    # What is there

    def jobs(self) -> dict[str, Callable[[], Any]]:
        """Return the reading calls that need nothing else to be known."""
        return {"bastion_role": self.role.read} if self._looked_for() else {}

    def take(self, answers: dict[str, Any]) -> None:
        """Remember the answers to `jobs`; look for the instance where its security group says that there may be one."""
        group = self.groups.find(_SUFFIX)
        if group is not None and not self.context.may_take(group):
            group = None
        if self._looked_for() or group is not None:
            self.role.found = answers["bastion_role"] if "bastion_role" in answers else self.role.read()
        if group is not None:
            self.instances = self._read_instances(group["GroupId"])

    def _looked_for(self) -> bool:
        return self.wanted or self.context.params["state"] == "absent"

    def _read_instances(self, group_id: str) -> list[Item]:
        context = self.context
        # By the group and not by tags, which may have been removed.
        found = context.api.pages(
            "describe_instances",
            "Reservations",
            f"bastion {context.name}",
            Filters=[{"Name": "instance.group-id", "Values": [group_id]}],
        )
        return [
            one
            for reservation in found
            for one in reservation["Instances"]
            if one["State"]["Name"] not in _ENDED
            and group_id in {group["GroupId"] for group in one.get("SecurityGroups", ())}
            and context.owner_of(one) in (None, context.owner)
        ]

    # What is wanted

    def check(self) -> None:
        """Refuse what cannot be, before anything is changed."""
        if not self.wanted:
            return
        if not self.subnets.public:
            raise PlatformError(
                "network_admin_access bastion needs a public subnet: set network_public_subnets (or name"
                " network_existing_public_subnet_ids), or take ssm"
            )
        self.role.check()
        self.groups.check(_SUFFIX)

    def present(self) -> str:
        """Keep the bastion, or remove ours; return its id, empty without one."""
        if not self.wanted:
            if self.groups.find(_SUFFIX) is not None:
                self.remove()
                self.wait_until_gone()
                self.groups.remove(_SUFFIX)
            return ""
        context = self.context
        trust = {
            "Version": "2012-10-17",
            "Statement": [
                {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
            ],
        }
        managed = f"arn:{context.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
        self.role.present(f"Bastion of {context.owner}", trust, managed=managed)
        wanted: set[Rule] = {("tcp", _SSH, _SSH, cidr) for cidr in context.params["bastion_allowed_cidrs"]}
        group = self.groups.present(_SUFFIX, "bastion", "SSH to the bastion", wanted)
        return self._instance(group)

    def _instance(self, group: str) -> str:
        context = self.context
        params = context.params
        resource = f"bastion {context.name}{_SUFFIX}"
        tags = context.tags("bastion", _SUFFIX)
        want = {
            "instance_type": params["bastion_instance_type"],
            "key_name": params["bastion_key_name"] or None,
            "subnet": self.subnets.of("public")[0],
            "profile": self.role.name,
        }
        for doubled in self.instances[1:]:
            self._terminate(doubled)
        if not self.instances:
            context.changes.create(resource, {**want, "tags": tags})
            return self._run(resource, want, group, tags)
        found = self.instances[0]
        have = {
            "instance_type": found["InstanceType"],
            "key_name": found.get("KeyName") or None,
            "subnet": found.get("SubnetId"),
            "profile": found.get("IamInstanceProfile", {}).get("Arn", "").rpartition("/")[2] or None,
        }
        # It holds nothing: one that differs is replaced, after its successor runs.
        if context.changes.update(resource, have, want):
            successor = self._run(resource, want, group, tags)
            context.discard(context.api, "terminate_instances", resource, InstanceIds=[found["InstanceId"]])
            return successor
        instance_id = str(found["InstanceId"])
        context.retag(resource, instance_id, found.get("Tags"), tags)
        # Emulators do not say it; AWS always does.
        tokens = found.get("MetadataOptions", {}).get("HttpTokens", "required")
        if context.changes.update(resource, {"imds_tokens": tokens}, {"imds_tokens": "required"}):
            context.api.write(
                "modify_instance_metadata_options", resource, InstanceId=instance_id, HttpTokens="required"
            )
        groups = sorted(one["GroupId"] for one in found.get("SecurityGroups", ()))
        if context.changes.update(resource, {"security_groups": groups}, {"security_groups": [group]}):
            context.api.write("modify_instance_attribute", resource, InstanceId=instance_id, Groups=[group])
        return instance_id

    def _run(self, resource: str, want: dict[str, Any], group: str, tags: dict[str, str]) -> str:
        context = self.context
        if context.changes.check_mode:
            return str(new_id(resource))
        image = context.params["bastion_ami_id"] or self._newest_image(resource)
        disk = {"VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
        if context.params["bastion_kms_key_arn"]:
            disk["KmsKeyId"] = context.params["bastion_kms_key_arn"]
        described = context.api.read("describe_images", resource, ImageIds=[image])["Images"]
        device = described[0].get("RootDeviceName") if described else None
        arguments: dict[str, Any] = {
            "ImageId": image,
            "InstanceType": want["instance_type"],
            "MinCount": 1,
            "MaxCount": 1,
            "IamInstanceProfile": {"Name": want["profile"]},
            # Its own processes only: no container, no proxy reaches the instance's credentials.
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
            "BlockDeviceMappings": [{"DeviceName": device or "/dev/xvda", "Ebs": disk}],
            "TagSpecifications": [
                *context.specification("instance", tags),
                *context.specification("volume", tags),
            ],
        }
        if want["key_name"]:
            arguments["KeyName"] = want["key_name"]
        if self.subnets.existing:
            # Another's public subnet need not hand out addresses by itself.
            interface = {"DeviceIndex": 0, "SubnetId": want["subnet"], "Groups": [group]}
            arguments["NetworkInterfaces"] = [{**interface, "AssociatePublicIpAddress": True}]
        else:
            arguments |= {"SubnetId": want["subnet"], "SecurityGroupIds": [group]}
        answer = context.api.write("run_instances", resource, settle=60, **arguments)
        return str(answer["Instances"][0]["InstanceId"])

    def _newest_image(self, resource: str) -> str:
        name = self.context.params["bastion_ami_parameter"]
        answer = self.context.service("ssm").read(
            "get_parameter", f"{resource} (network_bastion_ami_parameter)", Name=name
        )
        return str(answer["Parameter"]["Value"])

    # The way down

    def remove(self) -> None:
        """Ask for the instance to be terminated, and delete its role; the group goes when the instance is gone."""
        for instance in self.instances:
            self._terminate(instance)
        self.role.remove()

    def wait_until_gone(self) -> None:
        """Wait until terminated instances no longer hold their subnet and group."""
        context = self.context
        ids = [one["InstanceId"] for one in self.instances]
        if not ids or context.changes.check_mode:
            return

        def probe() -> tuple[bool, str]:
            answer = context.api.read(
                "describe_instances", context.name, absent=("InvalidInstanceID.NotFound",), InstanceIds=ids
            )
            found = [one for reservation in (answer or {}).get("Reservations", ()) for one in reservation["Instances"]]
            left = [one for one in found if one["State"]["Name"] != "terminated"]
            return not left, ", ".join(f"{one['InstanceId']} {one['State']['Name']}" for one in left)

        wait_until(f"end of the bastion of {context.name}", probe, context.params["wait_timeout"])

    def _terminate(self, instance: Item) -> None:
        instance_id = instance["InstanceId"]
        resource = f"bastion {self.context.label(instance, instance_id)}"
        self.context.changes.delete(resource, {"id": instance_id})
        self.context.discard(self.context.api, "terminate_instances", resource, InstanceIds=[instance_id])
