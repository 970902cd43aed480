# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Show and write the report of drift. An action plugin, because it looks at all hosts' variables."""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.rayplane.platform.plugins.action.drift_stage import NOTED
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.modules.drift_report import DOCUMENTATION
from ansible_collections.rayplane.platform.plugins.plugin_utils.drift import Gap, Report, Row


class ActionModule(ActionBase):
    """The task ``drift_report``, run once for all hosts of the play."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write and show the report."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        _validation, arguments = self.validate_argument_spec(argument_spec(DOCUMENTATION))
        folder = Path(arguments["folder"]) if arguments["folder"] else None
        report = Report()
        if not arguments["begin"]:
            for cluster in variables["ansible_play_hosts_all"]:
                for stage, rows, gap in _stages(cluster, variables):
                    report.add(cluster, stage, rows, gap)
            if folder:
                for cluster in variables["groups"].get("platform_pending", ()):
                    gap = Gap(cluster, "local_platform", "", "the local platform is not up; nothing on it is compared")
                    report.add(cluster, gap.stage, (), gap)
        if folder:
            try:
                _write(report, folder)
            except OSError as error:
                why = f"drift_dir is {folder}: the report cannot be written: {error}"
                return {**result, "failed": True, "msg": why}
            result["ansible_stats"] = {"data": {"exit_code": report.exit_code}, "per_host": False, "aggregate": False}
        result.update(changed=False, status=report.status, differences=len(report.rows), not_compared=len(report.gaps))
        if arguments["begin"]:
            return result
        for line in report.table(shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 200):
            self._display.display(line)
        if folder:
            self._display.display(f"Report: {folder / 'drift.md'} and drift.json; exit code {report.exit_code}")
        return {**result, "sentence": report.sentence()}


def _stages(cluster: str, variables: Mapping[str, Any]) -> Iterator[tuple[str, list[Row], Gap | None]]:
    """The stages that a cluster's run noted, and why it noted no more."""
    noted = variables["hostvars"][cluster].get(NOTED, {}).get("stages", [])
    for one in noted:
        yield one["stage"], [Row(**row) for row in one["rows"]], Gap(**one["gap"]) if one["gap"] else None
    if cluster not in variables["ansible_play_hosts"]:
        last = noted[-1]["stage"] if noted else "preflight"
        stage, task = ("preflight", "") if last == "preflight" else (f"after {last}", "")
        yield stage, [], Gap(cluster, stage, task, "the run on this cluster ended before its end; its error is above")


def _write(report: Report, folder: Path) -> None:
    now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("drift.json", report.as_json(now)), ("drift.md", report.as_markdown(now))):
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
