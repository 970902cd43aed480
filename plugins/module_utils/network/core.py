# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What the parts of a cluster's network share: whose it is, its tags, and one look at all that is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    ROLE_TAG,
    Api,
    Changes,
    sync_tags,
    tag_dict,
    tag_list,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import partition_of

__all__ = ["ANYWHERE", "Context", "Item", "View", "blocks_of", "new_id", "together"]

ANYWHERE = "0.0.0.0/0"
Item = dict[str, Any]

# Calls in flight at a time. Below the ten connections that a client of the SDK keeps open.
_READERS = 8


def together(jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run reading calls side by side and return their answers by name; the first error in the order of jobs counts.

    On AWS a call is 50 to 150 ms of waiting, and a network has a dozen of them that do not depend on each other.
    """
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in running.items()}


def blocks_of(vpc: Mapping[str, Any]) -> list[str]:
    """Return all blocks of addresses of a VPC, as EC2 describes it, the first one first."""
    blocks = [str(vpc["CidrBlock"])]
    for association in vpc.get("CidrBlockAssociationSet", ()):
        state = association.get("CidrBlockState", {}).get("State", "associated")
        if state in ("associated", "associating") and association["CidrBlock"] not in blocks:
            blocks.append(association["CidrBlock"])
    return blocks


def new_id(resource: str) -> str:
    """Return what stands for the id of something that check mode would create; other stages accept it there."""
    return f"<new {resource}>"


@dataclass
class View:
    """What is there, as AWS describes it; only what is in the VPC, or bears the cluster's tag."""

    vpc: Item | None = None
    dns: dict[str, bool] = field(default_factory=dict)
    subnets: list[Item] = field(default_factory=list)
    gateways: list[Item] = field(default_factory=list)
    nats: list[Item] = field(default_factory=list)
    tables: list[Item] = field(default_factory=list)
    endpoints: list[Item] = field(default_factory=list)
    groups: list[Item] = field(default_factory=list)
    addresses: list[Item] = field(default_factory=list)
    flow_logs: list[Item] = field(default_factory=list)
    peerings: list[Item] = field(default_factory=list)


class Context:
    """The cluster whose network it is, what is asked for, and the record of changes."""

    def __init__(self, params: dict[str, Any], region: str, client: Callable[[str], Any], changes: Changes) -> None:
        self.params = params
        self.region = region
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.name: str = params["name"] or self.owner
        self.vpc_id = ""
        self.account = ""
        # Whether the VPC is somebody else's: then only what bears our tag is ours.
        self.adopted = False
        self.view = View()
        self._client = client
        self._apis: dict[str, Api] = {}
        self.api = self.service("ec2")

    def service(self, name: str) -> Api:
        """Return the calls of one AWS service; its client is made when it is first needed."""
        if name not in self._apis:
            self._apis[name] = Api(self._client(name), self.changes)
        return self._apis[name]

    @property
    def partition(self) -> str:
        """The partition of the region, the second part of every ARN."""
        partition: str = partition_of(self.region)
        return partition

    @property
    def vpc_cidrs(self) -> list[str]:
        """All blocks of addresses of the VPC; of one that is not there yet, those asked for."""
        return blocks_of(self.view.vpc) if self.view.vpc else [self.params["vpc_cidr"]]

    # Whose something is

    def owner_of(self, item: Mapping[str, Any]) -> str | None:
        """Return the cluster whose tag a resource bears."""
        found: str | None = tag_dict(item.get("Tags")).get(OWNER_TAG)
        return found

    def role_of(self, item: Mapping[str, Any]) -> str | None:
        """Return which part of a network a resource says it is."""
        found: str | None = tag_dict(item.get("Tags")).get(ROLE_TAG)
        return found

    def ours(self, item: Mapping[str, Any]) -> bool:
        """Whether a resource bears our tag."""
        return self.owner_of(item) == self.owner

    def may_take(self, item: Mapping[str, Any]) -> bool:
        """Whether a resource is ours, or was before its tag was removed by hand. In a VPC of others only tags count."""
        return self.ours(item) if self.adopted else self.owner_of(item) in (None, self.owner)

    # Tags

    def tags(self, role: str, suffix: str = "", **more: str) -> dict[str, str]:
        """Return the tags of one of our resources."""
        tags = {str(key): str(value) for key, value in {**self.params["tags"], **more}.items()}
        return {**tags, "Name": self.name + suffix, OWNER_TAG: self.owner, ROLE_TAG: role}

    def specification(self, kind: str, tags: Mapping[str, str]) -> list[Item]:
        """Return tags in the form that EC2 takes with a creation."""
        return [{"ResourceType": kind, "Tags": tag_list(tags)}]

    def retag(self, resource: str, resource_id: str, have: Any, want: Mapping[str, str]) -> None:
        """Put back the tags that a resource of EC2 lacks."""
        lacking = sync_tags(self.changes, resource, tag_dict(have), want)
        if lacking:
            self.api.write("create_tags", resource, Resources=[resource_id], Tags=tag_list(lacking))

    # Removing

    def label(self, item: Mapping[str, Any], resource_id: str) -> str:
        """Return the name by which a person knows a resource."""
        return str(tag_dict(item.get("Tags")).get("Name", resource_id))

    def remove(self, operation: str, kind: str, item: Mapping[str, Any], **identity: str) -> None:
        """Delete a resource of EC2; one that is gone by now is as good as deleted."""
        (resource_id,) = identity.values()
        resource = f"{kind} {self.label(item, resource_id)}"
        self.changes.delete(resource, {"id": resource_id})
        # Network interfaces of endpoints and load balancers take a while to let go.
        self.discard(self.api, operation, resource, busy=min(120, self.params["wait_timeout"]), **identity)

    def discard(self, api: Api, operation: str, resource: str, busy: float = 0, **arguments: Any) -> None:
        """Call a deleting operation. What it deletes was there when it was read, so nothing has to settle first."""
        api.write(operation, resource, settle=0, busy=busy, **arguments)
