# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Values of the command line in their declared types: ``-e eks_gpu_max_size=4`` is a number, as in the inventory.

Ansible makes text of everything that follows ``-e name=``. Here such a value is read as YAML, as an inventory's would
be, where the role's argument spec declares the variable a list, a mapping, a number or a boolean, and the text is one.
Everything else, and what comes as JSON or from a file, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.plugins.callback import CallbackBase

try:
    # Keeps the place a value came from, for messages; Ansible has no public name for it yet.
    from ansible.module_utils._internal._datatag import AnsibleTagHelper
except ImportError:
    AnsibleTagHelper = None

DOCUMENTATION = r"""
name: rayplane_overrides
type: aggregate
short_description: Reads values of the command line in their declared types
description:
  - C(-e name=value) gives a number, a boolean, a list or a mapping where the argument spec of the variable's role
    declares one.
author: rayplane contributors
"""

PROJECT = Path(__file__).resolve().parents[2]

#: Python's types for those of argument specs that are not text. A whole number is a float, too.
TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "list": (list,),
    "dict": (dict,),
}


def typed(value: str, kind: str) -> Any:
    """Return the YAML value of the text if it is of that kind of an argument spec, and the text itself otherwise."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    fits = isinstance(read, TYPES.get(kind, ())) and not (kind != "bool" and isinstance(read, bool))
    return read if fits else value


def declared_type(name: str, project: Path = PROJECT) -> str:
    """Return the type that an argument spec gives to a variable; empty where none knows it."""
    files: list[tuple[Path, tuple[str, ...]]] = [
        (folder / "meta" / "argument_specs.yml", ("argument_specs", "main", "options"))
        for folder in (project / "roles").iterdir()
        if name.startswith(f"{folder.name}_")
    ]
    files.append((project / "roles" / "preflight" / "vars" / "main.yml", ("__preflight_shared_options",)))
    for file, path in files:
        found: Any = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        for part in (*path, name, "type"):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, str):
            return found
    return ""


class CallbackModule(CallbackBase):  # type: ignore[misc,unused-ignore]
    """Gives the run's extra variables their types, once, before the first play."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "rayplane_overrides"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._done = False

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """The first play is about to start."""
        manager = play.get_variable_manager()
        if self._done or manager is None:
            return
        self._done = True
        values = manager.extra_vars
        for name, value in list(values.items()):
            # Most values are words; only what YAML reads as something else is worth a look at the specs.
            if isinstance(value, str) and any(typed(value, kind) is not value for kind in TYPES):
                read = typed(value, declared_type(name))
                if read is not value:
                    values[name] = read if AnsibleTagHelper is None else AnsibleTagHelper.tag_copy(value, read)
