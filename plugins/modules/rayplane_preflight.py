# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rayplane_preflight
short_description: Check everything that can be checked before a cluster is touched
description:
  - Reports every problem in one pass, each with the variable, its value and place, the reason and the cure.
  - Nothing is changed.
author: rayplane contributors (@rayplane)
options:
  scope:
    description: C(declared) is what stands in the inventory, C(live) what only the outside can tell, C(all) is both.
    type: str
    choices: [declared, live, all]
    default: all
  project:
    description: The folder with the roles, C(pyproject.toml) and C(galaxy.yml).
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Check what is declared
  rayplane.platform.rayplane_preflight:
    scope: declared
    project: "{{ role_path | dirname | dirname }}"
"""
