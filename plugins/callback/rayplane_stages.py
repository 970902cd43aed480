# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went: a table of stages below the recap."""

from __future__ import annotations

DOCUMENTATION = r"""
name: rayplane_stages
type: aggregate
short_description: Table of stages with their times at the end of a run
description:
  - A stage is a role, or a play where a task belongs to none. Its time runs from the start of its tasks to the start
    of what follows.
  - Adds its table below the recap and touches nothing else of the output.
  - Where a role sets the custom statistic C(exit_code), the run ends with it.
author: rayplane contributors (@rayplane)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible import constants
from ansible.plugins.callback import CallbackBase


@dataclass
class Stage:
    """What one stage has done so far."""

    name: str
    seconds: float = 0.0
    changed: int = 0
    #: Hosts on which a task of the stage failed or that it could not reach, one entry a failure.
    failed_hosts: list[str] = field(default_factory=list)


class Stages:
    """Stopwatch over the stages of a run: at any moment exactly one of them is running, or none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._stages: dict[str, Stage] = {}
        self._running: Stage | None = None
        self._since = self._began

    def enter(self, name: str) -> None:
        """The stage of this name runs from now on; one that ran before goes on counting."""
        self.leave()
        self._running = self._stages.setdefault(name, Stage(name))

    def leave(self) -> None:
        """Nothing runs from now on."""
        now = self._clock()
        if self._running is not None:
            self._running.seconds += now - self._since
        self._running, self._since = None, now

    def changed(self, name: str) -> None:
        """A task of the stage changed something on one host."""
        self._stages.setdefault(name, Stage(name)).changed += 1

    def failed(self, name: str, host: str) -> None:
        """A task of the stage failed on a host, or did not reach it."""
        self._stages.setdefault(name, Stage(name)).failed_hosts.append(host)

    def table(self, broken_hosts: Mapping[str, Any]) -> list[str]:
        """The table's lines. A failure counts if its host failed in the end: others were rescued."""
        self.leave()
        rows = [
            (stage.name, stage.seconds, stage.changed, sum(host in broken_hosts for host in stage.failed_hosts))
            for stage in self._stages.values()
        ]
        total = ("total", self._clock() - self._began, sum(row[2] for row in rows), sum(row[3] for row in rows))
        width = max([len("stage"), *(len(row[0]) for row in rows)])
        lines = [f"{'stage':<{width}}  {'time':>12}  {'changed':>7}  {'failed':>6}"]
        lines += [_line(row, width) for row in rows]
        return [*lines, "-" * len(lines[0]), _line(total, width)]


def _line(row: Sequence[Any], width: int) -> str:
    name, seconds, changed, failed = row
    return f"{name:<{width}}  {duration(seconds):>12}  {changed or '':>7}  {failed or '':>6}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``0.4 s``, ``42 s``, ``12 min 05 s``, ``1 h 02 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class CallbackModule(CallbackBase):
    """Feeds the stopwatch from Ansible's events."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "rayplane_stages"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._stages = Stages()
        self._play = ""

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """A play begins; what its first task belongs to is known when that task starts."""
        self._stages.leave()
        self._play = play.get_name().strip()

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """A task begins."""
        self._stages.enter(self._stage(task))

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """A handler begins."""
        self._stages.enter(self._stage(task))

    def v2_runner_on_ok(self, result: Any) -> None:
        """A task ended on a host."""
        if result.is_changed():
            self._stages.changed(self._stage(result.task))

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A task failed on a host."""
        if not ignore_errors:
            self._stages.failed(self._stage(result.task), result.host.get_name())

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host was not reached."""
        self._stages.failed(self._stage(result.task), result.host.get_name())

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """The run ended: show the table, unless the output is for a machine."""
        if constants.config.get_config_value("DEFAULT_STDOUT_CALLBACK").rpartition(".")[2] not in ("json", "jsonl"):
            self._display.banner("STAGES")
            for line in self._stages.table({**stats.failures, **stats.dark}):
                self._display.display(line)
            self._display.display("")
        code = stats.custom.get("_run", {}).get("exit_code")
        if code is not None:
            raise SystemExit(int(code))

    def _stage(self, task: Any) -> str:
        role = getattr(task, "_role", None)
        name: str = role.get_name() if role else task.get_vars().get("stage_role", self._play)
        return name
