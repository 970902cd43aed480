# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Clusters of several inventories side by side, each with the variables of its own."""

from __future__ import annotations

DOCUMENTATION = r"""
name: environments
short_description: Clusters of several inventories side by side
description:
  - Two inventories given with C(-i) share their group C(all), so the last one's C(group_vars/all) wins for every host.
    Here each host keeps the variables that it has in its own inventory.
  - Its file ends with C(environments.yml).
author: rayplane contributors (@rayplane)
options:
  plugin:
    description: The name of this plugin.
    type: str
    required: true
    choices: [rayplane.platform.environments]
  environments:
    description: The inventories, as paths relative to this file. No two of them may name the same host.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
plugin: rayplane.platform.environments
environments: [../dev, ../staging, ../prod]
"""

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.inventory.manager import InventoryManager
from ansible.plugins.inventory import BaseInventoryPlugin
from ansible.vars.manager import VariableManager


class InventoryModule(BaseInventoryPlugin):
    """Reads the inventories one by one."""

    NAME = "rayplane.platform.environments"

    def verify_file(self, path: str) -> bool:
        """Whether the file is one of this plugin's."""
        return bool(super().verify_file(path)) and path.endswith("environments.yml")

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Add the hosts and groups of each inventory; variables of groups become the hosts' own."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        seen: dict[str, str] = {}
        for environment in self.get_option("environments"):
            source = str((Path(path).parent / environment).resolve())
            if not Path(source).exists():
                raise AnsibleParserError(f"{path}: environments names {environment}, and there is no {source}")
            own = InventoryManager(loader=loader, sources=[source])
            variables = VariableManager(loader=loader, inventory=own)
            for name, group in own.groups.items():
                inventory.add_group(name)
                for child in group.child_groups:
                    inventory.add_group(child.name)
                    inventory.add_child(name, child.name)
            for host in own.get_hosts():
                if host.name in seen:
                    raise AnsibleParserError(
                        f"{path}: {seen[host.name]} and {environment} both have a host {host.name}; rename one of them"
                    )
                seen[host.name] = environment
                inventory.add_host(host.name)
                for group in host.get_groups():
                    inventory.add_child(group.name, host.name)
                # What Ansible itself adds, and -e.
                everywhere = {*variables.get_vars(include_hostvars=False), *host.get_magic_vars()}
                for key, value in variables.get_vars(host=host, include_hostvars=False).items():
                    if key not in everywhere:
                        inventory.set_variable(host.name, key, value)
