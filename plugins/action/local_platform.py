# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Run one stage of the local platform on the controller, with its progress on the screen.

An action plugin, because the platform is the controller's own machine and a module's output would be seen only after
its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.modules.local_platform import DOCUMENTATION

_TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
if _TOOLS not in sys.path:
    sys.path.insert(0, _TOOLS)

from rayplane_local import down, locking, stages
from rayplane_local.errors import PlatformError
from rayplane_local.settings import Settings

PR_SET_PDEATHSIG = 1


def run_stage(
    name: str, settings: Settings, check_mode: bool, report: Callable[[str], None]
) -> tuple[list[str], dict[str, float]]:
    """Do a stage, or say what it would do; gives the actions and the seconds of each piece of work."""
    if name == "down":
        return (down.pending(settings) if check_mode else down.take_down(settings, report)), {}
    stage = stages.stage(name)
    if check_mode:
        return stage.plan(settings), {}
    result = stage.apply(settings, report)
    return result.actions, result.times


class ActionModule(ActionBase):
    """The task ``local_platform``."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the stage; the lease on the platform's home belongs to the whole Ansible run."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        _, arguments = self.validate_argument_spec(argument_spec(DOCUMENTATION))
        display = Display()
        # A run that is killed must not leave this worker, and what it started, at work.
        playbook = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        check_mode: bool = self._task.check_mode
        try:
            # Ansible's values are subclasses that carry where they came from; the platform writes plain ones into
            # files.
            settings = Settings.from_mapping(json.loads(json.dumps(arguments["settings"])))
            if not check_mode and os.geteuid() == 0:
                locking.acquire(settings.home, playbook)
            actions, seconds = run_stage(arguments["stage"], settings, check_mode, display.display)
        except (PlatformError, ValueError) as error:
            return {**result, "failed": True, "msg": str(error)}
        result |= {"changed": bool(actions), "actions": actions}
        if seconds:
            result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        if actions and self._task.diff:
            verb = "would do" if check_mode else "did"
            result["diff"] = {"prepared": "".join(f"{verb}: {action}\n" for action in actions)}
        return result
