# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Run a module of this collection in the process that Ansible has forked for its task.

Ansible starts a fresh Python for every module, and importing an SDK takes that Python longer than most modules need for
their work (boto3 0.5 s, the Kubernetes client 0.4 s). This action imports modules once, in the process that schedules
the tasks: the strategy loads an action there before it forks. Each task's process then has everything imported, and the
module's unchanged ``main()`` runs in it. That process serves one task on one host and ends, so nothing a module sets is
seen by another.

``meta/runtime.yml`` names the modules that run so. Where a task is not for the controller itself (another connection,
another interpreter, become, async) the module runs as any other.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.vars import merge_hash
from ansible_collections.rayplane.platform.plugins.plugin_utils.ansible_private import (
    run_main,
    task_arguments,
    task_environment,
)

_MODULES = "ansible_collections.rayplane.platform.plugins.modules"

_PR_SET_PDEATHSIG = 1  # prctl(2)


def preload(*prefixes: str) -> None:
    """Import the modules whose names start so, and with them what they import."""
    for file in sorted((Path(__file__).parents[1] / "modules").glob("*.py")):
        if file.stem.startswith(prefixes):
            importlib.import_module(f"{_MODULES}.{file.stem}")


class ActionModule(ActionBase):
    """Runs the module in this process where the task allows it, and in one of its own otherwise."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module and return its result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        if not self._is_for_this_process(variables):
            in_background = self._task.async_val and not self._connection.has_native_async
            answer = self._execute_module(task_vars=task_vars, wrap_async=in_background)
            if not in_background:
                self._remove_tmp_path(self._connection._shell.tmpdir)
            return dict(merge_hash(result, answer))
        return dict(merge_hash(result, self._run_here(variables)))

    def _is_for_this_process(self, variables: Mapping[str, Any]) -> bool:
        interpreter = self._templar.template(variables.get("ansible_python_interpreter", "auto"))
        return (
            self._connection.transport == "local"
            and not self._play_context.become
            and not self._task.async_val
            # Discovery would look for a Python on the controller: there is none better than the one that runs.
            and (str(interpreter).startswith("auto") or interpreter == sys.executable)
        )

    def _run_here(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = self._task.action.rpartition(".")[2]
        module = importlib.import_module(f"{_MODULES}.{name}")
        _end_with_ansible()
        os.environ.update(task_environment(self))
        # Exit handlers, with which a module would remove its own folder, do not run in a forked process.
        with tempfile.TemporaryDirectory(prefix="rayplane-", ignore_cleanup_errors=True) as folder:
            # Nor do those of what it imports.
            tempfile.tempdir = folder
            arguments = {**task_arguments(self, name, variables), "_ansible_tmpdir": folder}
            return run_main(self, module.main, arguments)


def _end_with_ansible() -> None:
    """Have the kernel kill this process with its parent.

    Ansible gives each task's process a session of its own. Where Ansible is killed, the module would go on making
    things while the next run already makes the same.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
