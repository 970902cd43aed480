#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the whole network of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_network
short_description: Reconcile the VPC of one cluster as a whole
description:
  - Keeps a VPC with its internet gateway, subnets, NAT gateways, route tables, VPC endpoints, security groups, flow
    log, peerings and bastion as described, in one call.
  - Says property by property what differs and repairs only that. Works in check mode on an account where nothing
    exists yet.
  - Resources are found by what they are (a subnet by its CIDR, a route table by its subnet) and by the tag
    C(rayplane.io/cluster), so an
    interrupted run is continued and a lost tag is repaired instead of a second resource being made.
  - Tags and routes that it was not asked for are left alone.
  - In a VPC that exists (O(existing_vpc_id), O(existing_vpc_tags)) only what bears the cluster's tag is changed or
    deleted; subnets of others get the tags that Kubernetes needs, and lose them with O(state=absent).
options:
  cluster_name:
    description: Owner of the network; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  state:
    description: Whether the network exists.
    type: str
    choices: [present, absent]
    default: present
  part:
    description: >-
      What O(state=present) is about: V(flow_logs) keeps the flow log of a network that is there, and touches nothing
      else of it.
    type: str
    choices: [all, flow_logs]
    default: all
  name:
    description: Start of the resources' C(Name) tags. Empty takes O(cluster_name).
    type: str
    default: ""
  existing_vpc_id:
    description: A VPC that exists, to be used and not to be changed. Empty has one made.
    type: str
    default: ""
  existing_vpc_tags:
    description: The same, by tags that one VPC of the region bears.
    type: dict
    default: {}
  existing_private_subnet_ids:
    description: Subnets of that VPC for nodes, in two zones or more. With them no subnet, route or NAT gateway is made.
    type: list
    elements: str
    default: []
  existing_public_subnet_ids:
    description: Subnets of that VPC for load balancers.
    type: list
    elements: str
    default: []
  vpc_cidr:
    description: Addresses of the VPC, /16 to /28; in a VPC that exists, the block of it that the subnets are made in.
    type: str
    default: 10.0.0.0/16
  availability_zones:
    description: Two to six zones, in order; new ones go to the end. Required to create a network.
    type: list
    elements: str
    default: []
  private_subnet_cidrs:
    description: One CIDR a zone; empty has them computed.
    type: list
    elements: str
    default: []
  public_subnets:
    description: Whether there are public subnets and an internet gateway.
    type: bool
    default: true
  public_subnet_cidrs:
    description: One CIDR a zone; empty has them computed.
    type: list
    elements: str
    default: []
  intra_subnets:
    description: Whether there are subnets without any way to the internet, for the control plane's interfaces.
    type: bool
    default: false
  intra_subnet_cidrs:
    description: One CIDR a zone; empty has them computed.
    type: list
    elements: str
    default: []
  nat_mode:
    description: NAT gateways for the private subnets - none, one for all, or one in each zone.
    type: str
    choices: [none, single, per_zone]
    default: single
  s3_endpoint:
    description: >-
      Whether S3 is reached through a gateway endpoint, which costs nothing and spares the NAT gateways the model
      files.
    type: bool
    default: true
  interface_endpoints:
    description: >-
      Short names of services to reach through interface endpoints in the private subnets, such as C(ecr.api),
      C(sts).
    type: list
    elements: str
    default: []
  foreign_routes:
    description: >-
      Destinations of routes that others add to our route tables, CIDR blocks or prefix lists; they are not returned in
      RV(foreign).
    type: list
    elements: str
    default: []
  security_group_rules:
    description: Ingress rules of the network's own security group, beside HTTPS from the VPC. The group has no others.
    type: list
    elements: dict
    default: []
    suboptions:
      protocol:
        description: Protocol name; V(-1) is every one.
        type: str
        default: tcp
      from_port:
        description: First port.
        type: int
        required: true
      to_port:
        description: Last port.
        type: int
        required: true
      cidr:
        description: Where the traffic comes from.
        type: str
        required: true
  flow_logs:
    description: Whether the VPC's traffic is logged.
    type: bool
    default: false
  flow_logs_destination:
    description: Where to. For V(cloudwatch) a log group and the role C(CLUSTER-flow-logs) are made.
    type: str
    choices: [cloudwatch, s3]
    default: cloudwatch
  flow_logs_bucket:
    description: >-
      The bucket for O(flow_logs_destination=s3); it has to admit the log delivery service, and to exist unless
      O(flow_logs_bucket_later).
    type: str
    default: ""
  flow_logs_bucket_later:
    description: >-
      Whether the bucket is made after the network. As long as it is missing there is no flow log, and
      RV(flow_log_pending) is true; a call with O(part=flow_logs) makes it then.
    type: bool
    default: false
  flow_logs_retention_days:
    description: How long the log group keeps its events, one of the numbers that CloudWatch Logs takes.
    type: int
    default: 30
  flow_logs_kms_key_arn:
    description: Key of the log group; its policy has to admit C(logs.REGION.amazonaws.com). Empty takes AWS's own.
    type: str
    default: ""
  flow_logs_traffic:
    description: Which traffic.
    type: str
    choices: [ALL, ACCEPT, REJECT]
    default: ALL
  flow_logs_interval:
    description: Longest time of one record, in seconds.
    type: int
    choices: [60, 600]
    default: 600
  peerings:
    description: VPCs to be peered with. Accepted here where account and region are the same.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: End of the peering's name; empty takes the VPC's id.
        type: str
        default: ""
      vpc_id:
        description: The other VPC.
        type: str
        required: true
      owner_id:
        description: Account of the other VPC; empty for the same.
        type: str
        default: ""
      region:
        description: Region of the other VPC; empty for the same.
        type: str
        default: ""
      cidrs:
        description: Addresses that the private subnets reach through the peering.
        type: list
        elements: str
        required: true
      dns:
        description: Whether each side resolves the other's host names to private addresses.
        type: bool
        default: false
  admin_access:
    description: >-
      How administrators get in. V(ssm) by Systems Manager, for which interface endpoints are made where the private
      subnets have no way out; V(bastion) by an instance in a public subnet.
    type: str
    choices: [ssm, bastion, none]
    default: none
  bastion_instance_type:
    description: Type of the bastion.
    type: str
    default: t3.nano
  bastion_ami_parameter:
    description: Parameter of Systems Manager that names the image of a new bastion.
    type: str
    default: /aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64
  bastion_ami_id:
    description: The image itself, in place of the parameter.
    type: str
    default: ""
  bastion_allowed_cidrs:
    description: Where SSH is admitted from; empty leaves Systems Manager alone.
    type: list
    elements: str
    default: []
  bastion_key_name:
    description: Key pair for SSH; may be empty.
    type: str
    default: ""
  bastion_kms_key_arn:
    description: Key of the bastion's disk; empty takes AWS's own.
    type: str
    default: ""
  tags:
    description: Tags of every resource.
    type: dict
    default: {}
  private_subnet_tags:
    description: Further tags of private subnets.
    type: dict
    default: {}
  public_subnet_tags:
    description: Further tags of public subnets.
    type: dict
    default: {}
  wait_timeout:
    description: Longest wait for one slow resource (NAT gateways, endpoints), in seconds.
    type: int
    default: 600
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the network of a cluster over two zones
  rayplane.platform.aws_network:
    cluster_name: ray-llm-cluster
    availability_zones: [us-west-2a, us-west-2b]
    nat_mode: per_zone
    tags:
      Project: rayplane

- name: Keep a cluster's own subnets in a VPC that exists
  rayplane.platform.aws_network:
    cluster_name: ray-llm-cluster
    existing_vpc_tags:
      Name: shared
    vpc_cidr: 10.20.0.0/18
    availability_zones: [us-west-2a, us-west-2b]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
foreign:
  description: Routes that others added to our route tables; they stay.
  returned: there are any
  type: list
  elements: dict
vpc_id:
  description: Id of the VPC; a description in angle brackets where check mode predicts a new one.
  returned: state is present
  type: str
private_subnet_ids:
  description: Ids of the private subnets in the order of the zones.
  returned: state is present
  type: list
  elements: str
public_subnet_ids:
  description: Ids of the public subnets in the order of the zones.
  returned: state is present
  type: list
  elements: str
intra_subnet_ids:
  description: Ids of the intra subnets in the order of the zones.
  returned: state is present
  type: list
  elements: str
admin_access:
  description: How administrators reach an instance in the private subnets, as a sentence.
  returned: state is present
  type: str
bastion_instance_id:
  description: Id of the bastion; empty without one.
  returned: state is present
  type: str
client_cidrs:
  description: Addresses of the VPC and of its peers.
  returned: state is present
  type: list
  elements: str
security_group_id:
  description: Id of the network's security group.
  returned: state is present
  type: str
nat_public_ips:
  description: Addresses that the private subnets have on the internet.
  returned: state is present
  type: list
  elements: str
flow_log_pending:
  description: Whether the flow log waits for its bucket.
  returned: state is present
  type: bool
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Changes, PlatformError, run
from ansible_collections.rayplane.platform.plugins.module_utils.network.bastion import SSM_SERVICES, Bastion
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import Context
from ansible_collections.rayplane.platform.plugins.module_utils.network.endpoints import Endpoints, SecurityGroups
from ansible_collections.rayplane.platform.plugins.module_utils.network.flow_logs import FlowLogs
from ansible_collections.rayplane.platform.plugins.module_utils.network.peering import Peerings
from ansible_collections.rayplane.platform.plugins.module_utils.network.routes import NatGateways, RouteTables
from ansible_collections.rayplane.platform.plugins.module_utils.network.vpc import Subnets, Vpc

_PRIVATE_GROUP = "-private"


class Network:
    """One cluster's network: its parts, and the order in which they are made and removed."""

    def __init__(self, params: dict[str, Any], region: str, client: Callable[[str], Any], changes: Changes) -> None:
        self.params = params
        self.context = context = Context(params, region, client, changes)
        self.vpc = Vpc(context)
        self.subnets = Subnets(context)
        self.nats = NatGateways(context, self.subnets)
        self.tables = RouteTables(context, self.subnets)
        self.groups = SecurityGroups(context)
        self.endpoints = Endpoints(context)
        self.peerings = Peerings(context, self.tables)
        self.flow_logs = FlowLogs(context)
        self.bastion = Bastion(context, self.subnets, self.groups)

    def observe(self) -> None:
        """Read all that is there, in as few calls as it takes."""
        answers = self.vpc.observe({**self.flow_logs.jobs(), **self.bastion.jobs()})
        self.flow_logs.take(answers)
        self.bastion.take(answers)

    def present(self) -> dict[str, Any]:
        """Bring the network to its description and return its ids."""
        if self.params["part"] == "flow_logs":
            return self._only_flow_logs()
        self.subnets.plan_them()
        self._check_nat()
        self.observe()
        # What has to fail, fails here: nothing is changed yet.
        self.vpc.check()
        self.subnets.check()
        self.nats.check()
        self.groups.check(_PRIVATE_GROUP)
        self.peerings.check()
        self.flow_logs.check()
        self.bastion.check()

        self.vpc.present()
        gateway = self.vpc.internet_gateway() if self.subnets.public and not self.subnets.existing else ""
        self.subnets.present()
        self.nats.request()
        # All that does not need the NAT gateways is made while they come up.
        group = self.groups.present(
            _PRIVATE_GROUP,
            "security-group",
            "HTTPS inside the network, for VPC endpoints and load balancers",
            self.groups.wanted_rules(),
        )
        services = list(self.params["interface_endpoints"])
        by_endpoints = self.params["admin_access"] == "ssm" and not self._has_way_out()
        if by_endpoints:
            services += [one for one in SSM_SERVICES if one not in services]
        self.endpoints.interfaces(services, self.subnets.one_a_zone("private"), group)
        self.flow_logs.present()
        bastion = self.bastion.present()
        self.nats.wait()
        self.tables.present(gateway, self.nats.wanted)
        self.nats.retire()
        self.endpoints.s3([*self.tables.public, *self.tables.private])
        self.peerings.present()
        return {
            "vpc_id": self.context.vpc_id,
            "private_subnet_ids": self.subnets.of("private"),
            "public_subnet_ids": self.subnets.of("public"),
            "intra_subnet_ids": self.subnets.of("intra"),
            "security_group_id": group,
            "client_cidrs": sorted(
                {*self.context.vpc_cidrs, *(cidr for one in self.params["peerings"] for cidr in one["cidrs"])}
            ),
            "nat_public_ips": self.nats.public_ips(),
            "bastion_instance_id": bastion,
            "admin_access": self._admin_access(by_endpoints, bastion),
            "flow_log_pending": self.flow_logs.pending,
        }

    def _only_flow_logs(self) -> dict[str, Any]:
        self.flow_logs.take(self.vpc.observe(self.flow_logs.jobs()))
        if self.context.view.vpc is None and not self.context.changes.check_mode:
            raise PlatformError(f"{self.context.owner} has no network to log: run the stage network first")
        self.flow_logs.check()
        self.flow_logs.present()
        return {"flow_log_pending": False}

    def _check_nat(self) -> None:
        if self.params["nat_mode"] != "none" and not self.subnets.existing and not self.subnets.public:
            raise PlatformError(
                f"network of {self.context.owner}: nat_mode {self.params['nat_mode']} needs public subnets: set"
                " public_subnets, or nat_mode none with interface endpoints for what the nodes call"
            )

    def _has_way_out(self) -> bool:
        """Whether nodes reach the internet; in subnets of others their route tables tell."""
        if self.subnets.existing:
            return all(self.tables.has_way_out(one) for one in self.subnets.of("private"))
        return bool(self.params["nat_mode"] != "none")

    def _admin_access(self, by_endpoints: bool, bastion: str) -> str:
        if bastion:
            return f"through the bastion: aws ssm start-session --target {bastion}, or SSH where it is admitted"
        if self.params["admin_access"] != "ssm":
            return "none"
        way = f"interface endpoints {', '.join(SSM_SERVICES)}" if by_endpoints else "the nodes' way to the internet"
        return f"aws ssm start-session --target INSTANCE, by {way}"

    def absent(self) -> dict[str, Any]:
        """Delete the network, from the outside in; what is gone already is skipped."""
        self.observe()
        endpoints = [one for one in self.context.view.endpoints if self.context.ours(one)]
        nats = self.nats.living()
        # What takes minutes is asked for first, and waited for together.
        self.endpoints.delete(endpoints)
        self.nats.delete([nat for nat in nats if nat["State"] != "deleting"])
        self.bastion.remove()
        self.peerings.remove()
        self.flow_logs.remove()
        self.nats.wait_until_gone(nats)
        self.endpoints.wait_until_gone(endpoints)
        self.bastion.wait_until_gone()
        self.nats.release_all()
        self.vpc.remove_gateways()
        self.subnets.remove()
        self.tables.remove()
        self.groups.remove()
        self.vpc.remove()
        return {}


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    network = Network(module.params, module.region, module.client, changes)
    return network.present() if module.params["state"] == "present" else network.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
