# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What this collection uses of ansible-core that has no public name.

Nothing else touches such names. ``tests/unit/test_ansible_private.py`` compares them with the installed ansible-core,
and fails where a release has changed one.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from ansible._internal._datatag._tags import Origin
from ansible.module_utils import basic
from ansible.module_utils.common.json import Direction, get_module_encoder
from ansible.plugins.action import ActionBase

__all__ = ["PROFILE", "USED", "Origin", "run_main", "task_arguments", "task_environment"]

#: How a module that states nothing else reads its arguments and writes its result.
PROFILE = "legacy"

#: Private functions and their signatures, as ansible-core 2.19 has them.
USED: Mapping[Callable[..., Any], str] = {
    ActionBase._compute_environment_string: "(self, raw_environment_out=None)",
    ActionBase._update_module_args: "(self, module_name, module_args, task_vars, ignore_unknown_opts: 'bool' = False)",
    ActionBase._parse_returned_data: "(self, res: 'dict[str, t.Any]', profile: 'str') -> 'dict[str, t.Any]'",
    get_module_encoder: "(name: 'str', direction: 'Direction', /) -> 'type[_stdlib_json.JSONEncoder]'",
}


def task_environment(action: Any) -> dict[str, str]:
    """The ``environment`` of the action's task, of its blocks and of its play."""
    environment: dict[str, Any] = {}
    action._compute_environment_string(environment)
    return {key: str(value) for key, value in environment.items()}


def task_arguments(action: Any, module: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The task's arguments with those that Ansible hands to every module (check mode, verbosity and so on)."""
    arguments = dict(action._task.args)
    action._update_module_args(module, arguments, variables)
    return arguments


def run_main(action: Any, main: Callable[[], None], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call a module's ``main()`` with these arguments in this process; gives its result."""
    encoder = get_module_encoder(PROFILE, Direction.CONTROLLER_TO_MODULE)
    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}, cls=encoder).encode()
    basic._ANSIBLE_PROFILE = PROFILE
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main()
    answer: dict[str, Any] = action._parse_returned_data({"stdout": output.getvalue(), "stderr": ""}, PROFILE)
    for key in [key for key in answer if key.startswith("_ansible_") and key != "_ansible_parsed"]:
        del answer[key]
    return answer
