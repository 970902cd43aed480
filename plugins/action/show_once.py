# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Show a secret on the screen. An action plugin, because only the controller has a screen."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.modules.show_once import DOCUMENTATION


class ActionModule(ActionBase):
    """The task ``show_once``."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Show it."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(argument_spec(DOCUMENTATION))
        if not self._task.check_mode:
            Display().display(str(arguments["text"]), screen_only=True)
        result["changed"] = False
        return result
