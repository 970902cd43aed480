# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Note what a stage found. An action plugin, because it looks at all results that the host's tasks registered.

Its task registers the result under ``NOTED``, which holds all stages so far. (Facts might outlive the run, where they
are cached.)
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.modules.drift_stage import DOCUMENTATION
from ansible_collections.rayplane.platform.plugins.plugin_utils.drift import Gap, Row, reason_of, rows_of

NOTED = "__drift_noted"
#: Where this stage is not compared, none after it can be.
NEEDED = "kubeconfig"


class ActionModule(ActionBase):
    """The task ``drift_stage``."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Add the stage to those noted so far."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        _validation, arguments = self.validate_argument_spec(argument_spec(DOCUMENTATION))
        cluster, stage = str(variables["inventory_hostname"]), arguments["stage"]
        before: dict[str, Any] = variables.get(NOTED) or {"stages": [], "unreached": False}
        stages, unreached = before["stages"], before["unreached"]
        if not unreached:
            rows = rows_of(cluster, stage, variables, [Row(**row) for one in stages for row in one["rows"]])
            gap = None
            if arguments["task"]:
                gap = Gap(cluster, stage, arguments["task"], reason_of(arguments["result"]))
                if unreached := stage == NEEDED:
                    gap.reason += "; no stage in Kubernetes is compared"
            noted = {"stage": stage, "rows": [asdict(row) for row in rows], "gap": asdict(gap) if gap else None}
            stages = [*stages, noted]
        return {**result, "changed": False, "stages": stages, "unreached": unreached}
