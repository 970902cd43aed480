#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: service-linked roles that an account has to have before something can be used in it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_service_linked_roles
short_description: See to it that an account has the service-linked roles of services
description:
  - AWS makes the role of a service when an account first uses that service with credentials that may make roles. Where
    only a controller uses it, which may not, the role has to be there before.
  - The roles are the account's, shared by all clusters in it; nothing here removes them.
options:
  services:
    description: Principals of the services, such as C(spot.amazonaws.com).
    type: list
    elements: str
    required: true
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Let Karpenter start spot instances
  rayplane.platform.aws_service_linked_roles:
    services: [spot.amazonaws.com]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order.
  returned: always
  type: list
  elements: str
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, run

# What IAM answers where the role is there: another run may have made it since it was looked for.
TAKEN = ("InvalidInput", "EntityAlreadyExists")


def ensure(services: list[str], iam: Api, changes: Changes) -> None:
    """Make the service-linked roles that are missing."""
    for service in services:
        resource = f"service-linked role of {service}"
        # Nothing but the service's own role is below this path (IAM user guide, "Create a service-linked role").
        if not iam.pages("list_roles", "Roles", resource, PathPrefix=f"/aws-service-role/{service}/"):
            changes.create(resource, {"service": service})
            iam.write("create_service_linked_role", resource, done=TAKEN, AWSServiceName=service)


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    ensure(module.params["services"], Api(module.client("iam"), changes), changes)
    return {}


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
