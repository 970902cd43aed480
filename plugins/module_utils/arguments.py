# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""A module's argument spec, read from its documentation: each option is described once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

__all__ = ["argument_spec"]

_KEPT = ("type", "elements", "required", "default", "choices", "aliases")


def argument_spec(documentation: str, secret: Collection[str] = ()) -> dict[str, Any]:
    """The spec of a module's DOCUMENTATION; ``secret`` are the options that no log may show."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return _options(yaml.load(documentation, Loader=loader)["options"], secret)  # noqa: S506 - a safe loader, in C


def _options(documented: Mapping[str, Mapping[str, Any]], secret: Collection[str]) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for name, option in documented.items():
        # Stated for all: names like `kms_key` look like secrets to Ansible.
        spec[name] = {key: option[key] for key in _KEPT if key in option} | {"no_log": name in secret}
        if "suboptions" in option:
            spec[name]["options"] = _options(option["suboptions"], secret)
    return spec
