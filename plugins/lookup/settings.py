# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""A role's variables without the role's name: what filters and modules call them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: settings
short_description: A role's variables as one mapping, without their prefix
description:
  - So that no role has to repeat the names of its variables where it hands all of them on.
author: rayplane contributors (@rayplane)
options:
  _terms:
    description: Names of roles.
    required: true
"""

EXAMPLES = r"""
- name: Make the objects of the gateway
  ansible.builtin.set_fact:
    objects: "{{ lookup('rayplane.platform.settings', 'gateway') | rayplane.platform.gateway_objects }}"
"""

RETURN = r"""
_list:
  description: For each role a mapping. C(gateway_image) is in it as C(image).
  type: list
  elements: dict
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.lookup import LookupBase

_ROLES = Path(__file__).resolve().parents[2] / "roles"


class LookupModule(LookupBase):
    """The lookup ``settings``."""

    def run(self, terms: Sequence[str], variables: Mapping[str, Any], **_: Any) -> list[dict[str, Any]]:
        """Look the variables up."""
        roles = [folder.name for folder in _ROLES.iterdir()]
        found = []
        template = self._templar.template  # type: ignore[union-attr] # set by whoever calls a lookup
        for term in terms:
            # `storage_class_name` is not of the role `storage`.
            others = tuple(f"{role}_" for role in roles if role.startswith(f"{term}_"))
            names = [name for name in variables if name.startswith(f"{term}_") and not name.startswith(others)]
            found.append({name.removeprefix(f"{term}_"): template(variables[name]) for name in names})
        return found
