# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What playbooks/drift.yml ends with: a report of what differs from what is declared, and an exit code."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ansible import constants
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: rayplane_drift
type: aggregate
short_description: Report of drift, as a table, as JSON and as Markdown
description:
  - Collects what the tasks of C(playbooks/drift.yml), all in check mode, would change, and what they say that others
    added (C(foreign)). It does nothing in other playbooks.
  - The folder of the report is the custom statistic C(drift_dir) of the run.
  - Ends the run with exit code 0 (nothing differs), 2 (something differs) or 1 (something could not be compared).
author: rayplane contributors
"""

CLEAN, NOT_COMPARED, DRIFT = 0, 1, 2
#: Set while a report is made; drift.yml requires it, so that it never says "clean" without having looked.
MARK = "RAYPLANE_DRIFT_REPORT"
HIDDEN = "(hidden)"

_CELL = 60
# Where such a word stands in a property's path, as a whole part of a name, its value is not for a report.
_SECRET = re.compile(
    r"(?i)(^|[._\-\[])(passwords?|passwd|secrets?|token|api_?keys?|access_?key|private_?key)($|[._\-\]])"
)
# Parts of paths in which these words name no secret: a Secret's name, who may read it, how a token is mounted.
_NO_SECRET = re.compile(r"(?i)(secret_?name|secret_?ref|secret_?key_?ref|token_?(path|expiration)|kms|encryption|arn)")
_NAMES = ("name", "groupName", "key", "id", "Sid", "ID")
_ACTION = re.compile(r"^(?P<verb>create|delete|update) (?P<resource>.*?)(?:: (?P<rest>.*))?$", re.S)


@dataclass
class Row:
    """One property of one resource that is not as declared; for a whole resource the property is empty."""

    cluster: str
    stage: str
    resource: str
    property: str
    action: str
    is_: Any
    declared: Any

    def plain(self) -> dict[str, Any]:
        """The row for JSON."""
        return {"is" if key == "is_" else key: value for key, value in asdict(self).items()}

    def change(self, length: int) -> str:
        """``is -> declared`` in at most about twice ``length`` characters."""
        if self.action == "create":
            return "absent -> to be created"
        if self.action == "foreign":
            return f"{shown(self.is_, length)} -> not declared, left alone"
        if self.action == "delete":
            return "present, not declared -> to be deleted"
        if self.is_ is None and self.declared is None:
            return "would change"
        return f"{shown(self.is_, length)} -> {shown(self.declared, length)}"


@dataclass
class Gap:
    """Something that could not be compared."""

    cluster: str
    stage: str
    task: str
    reason: str


def shown(value: Any, length: int = _CELL) -> str:
    """A value as a person reads it, on one line, cut to ``length`` characters."""
    if value is None:
        return "absent"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    text = " ".join(text.split()) or '""'
    return text if len(text) <= length else text[: length - 1] + "…"


def _structure(value: Any) -> Any:
    """What a text says, where it is YAML of a mapping or a list; else the value itself."""
    if not isinstance(value, str) or not ("\n" in value or value[:1] in "{["):
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return parsed if isinstance(parsed, dict | list) else value


def _by_name(items: list[Any]) -> dict[str, Any] | None:
    """A list of named entries as a mapping; None where the entries have no names of their own."""
    for key in _NAMES:
        if items and all(isinstance(item, dict) and isinstance(item.get(key), str | int) for item in items):
            named = {str(item[key]): item for item in items}
            return named if len(named) == len(items) else None
    return None


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value before and value after of each property in which two structures differ."""
    before, after = _structure(before), _structure(after)
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            name = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), after.get(key), name)
        return
    if isinstance(before, list) and isinstance(after, list):
        named = _by_name(before), _by_name(after)
        if named[0] is not None and named[1] is not None:
            for key in [*named[0], *(key for key in named[1] if key not in named[0])]:
                yield from differences(named[0].get(key), named[1].get(key), f"{path}[{key}]")
            return
    yield path, before, after


def is_secret(path: str) -> bool:
    """Whether the value at a path must not be shown."""
    return bool(_SECRET.search(path)) and not _NO_SECRET.search(path)


def without_secrets(value: Any, path: str = "") -> Any:
    """A value with what is secret in it hidden."""
    if is_secret(path) and value is not None and not isinstance(value, dict | list):
        return HIDDEN
    if isinstance(value, dict):
        # An environment variable: its name tells, its value is beside it.
        name = str(value.get("name", ""))
        return {
            key: HIDDEN if key == "value" and is_secret(name) else without_secrets(item, f"{path}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item, path) for item in value]
    return value


def entries(result: Mapping[str, Any], task: str) -> Iterator[tuple[str, str, str, Any, Any]]:
    """Yield resource, property, action, is, declared for all that a task's result says it would change."""
    results = result.get("results")
    if isinstance(results, list) and results:
        for one in results:
            if isinstance(one, dict) and one.get("changed"):
                yield from entries(one, task)
        return
    named: list[str] = []
    diffs = result.get("diff") or []
    for diff in diffs if isinstance(diffs, list) else [diffs]:
        if isinstance(diff, dict) and ("before" in diff or "after" in diff):
            for entry in _diff_entries(diff, task):
                named.append(entry[0])
                yield entry
    # What a module names as an action and not in its diff.
    for action in result.get("actions") or []:
        found = _ACTION.match(str(action))
        if found is None:
            named.append(str(action))
            yield str(action), "", "change", None, None
        elif found["resource"] not in named:
            verb, rest = found["verb"], found["rest"] or ""
            name, arrow, wanted = rest.partition(" -> ")
            key, _, was = name.partition(": ")
            yield found["resource"], key, verb, *((was, wanted) if arrow else (None, None))
            named.append(found["resource"])
    if not named:
        yield task, "", "change", None, None


def _diff_entries(diff: Mapping[str, Any], task: str) -> Iterator[tuple[str, str, str, Any, Any]]:
    header = str(diff.get("after_header") or diff.get("before_header") or task)
    resource = re.sub(r" \((live|declared)\)$", "", header)
    before, after = _structure(diff.get("before") or None), _structure(diff.get("after") or None)
    if before is None or after is None:
        yield resource, "", "delete" if after is None else "create", before, after
        return
    for path, was, wanted in differences(before, after):
        yield resource, path, "update", was, wanted


@dataclass
class Report:
    """What was compared in one run, and what came of it."""

    rows: list[Row] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    #: Cluster -> stages of which at least one task ran, in order.
    compared: dict[str, dict[str, bool]] = field(default_factory=dict)
    _hidden: dict[tuple[str, str], Row] = field(default_factory=dict)

    def seen(self, cluster: str, stage: str) -> None:
        """A task of a stage was compared."""
        self.compared.setdefault(cluster, {}).setdefault(stage, True)

    def changed(self, cluster: str, stage: str, task: str, result: Mapping[str, Any]) -> None:
        """A task would change something. What comes after a gap in the same stage would guess, and is left out."""
        if not self.compared.get(cluster, {}).get(stage, True):
            return
        if "censored" in result and "diff" not in result:
            row = Row(cluster, stage, task, HIDDEN, "change", None, None)
            self.rows.append(row)
            self._hidden[cluster, stage] = row
            return
        for resource, path, action, *values in entries(result, task):
            hidden = [HIDDEN, f"{HIDDEN}, another"] if path and is_secret(path) else map(without_secrets, values)
            self.rows.append(Row(cluster, stage, resource, path, action, *hidden))

    def foreign(self, cluster: str, stage: str, result: Mapping[str, Any]) -> None:
        """A module found what others added; it would change nothing of it."""
        if self.compared.get(cluster, {}).get(stage, True):
            for one in result.get("foreign") or []:
                self.rows.append(
                    Row(
                        cluster, stage, one["resource"], one["property"], "foreign", without_secrets(one["value"]), None
                    )
                )

    def said(self, cluster: str, stage: str, message: Any) -> None:
        """A task printed something: after a hidden change it is what the role itself tells about it."""
        row = self._hidden.pop((cluster, stage), None)
        if row is not None and message:
            row.resource = "; ".join(map(str, message)) if isinstance(message, list) else str(message)

    def failed(self, cluster: str, stage: str, task: str, reason: str) -> None:
        """A task failed: its stage is not compared to the end."""
        self.gaps.append(Gap(cluster, stage, task, reason))
        self.compared.setdefault(cluster, {})[stage] = False

    @property
    def status(self) -> str:
        """``clean``, ``drift`` or ``incomplete``; an incomplete comparison is never clean."""
        if self.gaps or not any(stage for stages in self.compared.values() for stage in stages.values()):
            return "incomplete"
        return "drift" if self.rows else "clean"

    @property
    def exit_code(self) -> int:
        """The run's exit code."""
        return {"clean": CLEAN, "drift": DRIFT, "incomplete": NOT_COMPARED}[self.status]

    def clusters(self) -> list[str]:
        """All clusters that were looked at, by name."""
        return sorted({*self.compared, *(gap.cluster for gap in self.gaps)})

    def stage_states(self, cluster: str) -> dict[str, str]:
        """Stage -> ``clean``, ``drift`` or ``not compared``."""
        drifted = {row.stage for row in self.rows if row.cluster == cluster}
        return {
            stage: "not compared" if not complete else "drift" if stage in drifted else "clean"
            for stage, complete in self.compared.get(cluster, {}).items()
        }

    def as_json(self, now: str) -> str:
        """The report for programs."""
        content = {
            "generated_at": now,
            "status": self.status,
            "exit_code": self.exit_code,
            "clusters": {
                cluster: {
                    "stages": self.stage_states(cluster),
                    "drift": [row.plain() for row in self.rows if row.cluster == cluster],
                    "not_compared": [asdict(gap) for gap in self.gaps if gap.cluster == cluster],
                }
                for cluster in self.clusters()
            },
        }
        return json.dumps(content, indent=2, default=str) + "\n"

    def as_markdown(self, now: str) -> str:
        """The report for people, to be put into an issue or a mail."""
        lines = ["# Drift", "", f"{now}: {self.sentence()}", ""]
        for cluster in self.clusters():
            states = ", ".join(f"{stage} {state}" for stage, state in self.stage_states(cluster).items())
            lines += [f"## {cluster}", "", f"Stages: {states or 'none compared'}.", ""]
            rows = [row for row in self.rows if row.cluster == cluster]
            if rows:
                lines += ["| Stage | Resource | Property | Is -> declared |", "| --- | --- | --- | --- |"]
                cells = [(row.stage, row.resource, row.property, row.change(300)) for row in rows]
                lines += [f"| {' | '.join(_cell(one) for one in row)} |" for row in cells]
                lines.append("")
            gaps = [gap for gap in self.gaps if gap.cluster == cluster]
            if gaps:
                lines += ["Not compared:", ""]
                lines += [f"- {gap.stage}, {gap.task}: {' '.join(gap.reason.split())}" for gap in gaps]
                lines.append("")
        return "\n".join(lines)

    def table(self, width: int) -> list[str]:
        """The report for the terminal."""
        lines = []
        if self.rows:
            head = ("cluster", "stage", "resource", "property", "is -> declared")
            cells = [(row.cluster, row.stage, row.resource, row.property, row.change(_CELL)) for row in self.rows]
            limits = (24, 16, 60, 60)
            widths = [
                min(limit, max(len(row[column]) for row in [head, *cells])) for column, limit in enumerate(limits)
            ]
            for row in [head, *cells]:
                fixed = [_fit(text, room) for text, room in zip(row[:4], widths, strict=True)]
                lines.append(_fit("  ".join([*fixed, row[4]]), max(width, 120)).rstrip())
            lines.append("")
        lines += [
            f"not compared: {gap.cluster}: {gap.stage}, {gap.task}: {shown(gap.reason, 400)}" for gap in self.gaps
        ]
        return [*lines, self.sentence()]

    def sentence(self) -> str:
        """The outcome in one sentence."""
        looked = f"{len(self.clusters())} {'cluster' if len(self.clusters()) == 1 else 'clusters'} compared"
        resources = len({(row.cluster, row.resource) for row in self.rows})
        found = f"{len(self.rows)} differences in {resources} resources" if self.rows else "nothing differs"
        if self.status == "incomplete" and not self.gaps:
            return "Nothing was compared: no stage of a cluster matches the arguments (--limit, --tags)."
        if self.status == "incomplete":
            return f"{looked}, not completely: {found} in what could be compared, {len(self.gaps)} parts could not."
        return f"{looked}: {found}{'' if self.rows else ' from what is declared'}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or " "


def _fit(text: str, room: int) -> str:
    text = " ".join(text.split(" "))
    return text.ljust(room) if len(text) <= room else text[: room - 1] + "…"


def reason_of(result: Mapping[str, Any]) -> str:
    """Why a task failed, as it says itself."""
    for key in ("msg", "module_stderr", "stderr", "reason"):
        if result.get(key):
            text = str(result[key]).strip()
            items = [str(one["msg"]) for one in _failed_items(result) if one.get("msg")]
            return f"{text}: {'; '.join(items)}" if items else text
    items = [str(one.get("msg", "failed")) for one in _failed_items(result)]
    return "; ".join(items) or str(result.get("censored") or "no reason given")


def _failed_items(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    items: Sequence[Any] = result.get("results") or []
    return [one for one in items if isinstance(one, dict) and (one.get("failed") or one.get("unreachable"))]


Handler = Callable[..., None]


def _never_silent(handler: Handler) -> Handler:
    """Ansible makes an error of a callback a warning: here it would be a difference that nobody sees."""

    @functools.wraps(handler)
    def call(self: Any, result: Any, *more: Any, **given: Any) -> None:
        try:
            handler(self, result, *more, **given)
        except Exception as error:
            gap = f"the report does not understand the result: {error!r}"
            self._report.failed(result.host.get_name(), _stage(result.task) or self._play, result.task_name, gap)

    return call


class CallbackModule(CallbackBase):  # type: ignore[misc,unused-ignore]
    """Feeds the report from Ansible's events, in drift.yml and nowhere else."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "rayplane_drift"
    # Not by callbacks_enabled: who sets that for himself would get a run without a report.
    CALLBACK_NEEDS_ENABLED = False

    def __init__(self) -> None:
        super().__init__()
        self._report: Report | None = None
        self._play = ""

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Report only on the playbook that compares."""
        if Path(str(playbook._file_name)).name == "drift.yml":
            self._report = Report()
            os.environ[MARK] = "1"

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Remember the play, for tasks that are not of a role, and have every task know of check mode."""
        self._play = play.get_name().strip()
        if self._report is not None:
            # A play's check_mode leaves this variable false: only --check sets it, and tasks may decide by it.
            play.get_variable_manager()._options_vars["ansible_check_mode"] = True

    @_never_silent
    def v2_runner_on_ok(self, result: Any) -> None:
        """A task would change something, or nothing."""
        stage = _stage(result.task)
        if self._report is None or not stage:
            return
        cluster, answer = result.host.get_name(), result.result
        # Preflight looks at what is declared; that it ran says nothing about what is there.
        # Neither compares anything.
        if stage not in ("preflight", "account"):
            self._report.seen(cluster, stage)
        # A stage that looks another up (the network's ids) does not compare it.
        if _stage(result.task, innermost=True) == stage:
            self._report.foreign(cluster, stage, answer)
        if result.is_changed():
            self._report.changed(cluster, stage, result.task_name, answer)
        elif result.task.action in constants._ACTION_DEBUG:
            self._report.said(cluster, stage, answer.get("msg"))

    @_never_silent
    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A task failed; one that its own role rescues or ignores is no failure."""
        if self._report is not None and not ignore_errors and not _is_rescued(result.task):
            self._gap(result)

    @_never_silent
    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host was not reached."""
        if self._report is not None:
            self._gap(result)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """The run ended: write and show the report, and end with its code."""
        if self._report is None:
            return
        report, self._report = self._report, None
        os.environ.pop(MARK, None)
        try:
            folder = Path(str(stats.custom.get("_run", {}).get("drift_dir") or "drift"))
            self._finish(report, folder)
        except OSError as error:
            self._display.error(f"the drift report cannot be written: {error}")
            raise SystemExit(NOT_COMPARED) from error
        raise SystemExit(report.exit_code)

    def _finish(self, report: Report, folder: Path) -> None:
        now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("drift.json", report.as_json(now)), ("drift.md", report.as_markdown(now))):
            part = folder / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)
        if constants.DEFAULT_STDOUT_CALLBACK.rpartition(".")[2] in ("json", "jsonl"):
            return
        self._display.banner("DRIFT")
        for line in report.table(shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 200):
            self._display.display(line)
        self._display.display(f"Report: {folder / 'drift.md'} and drift.json; exit code {report.exit_code}")

    def _gap(self, result: Any) -> None:
        assert self._report is not None
        stage = _stage(result.task) or self._play
        self._report.failed(result.host.get_name(), stage, result.task_name, reason_of(result.result))


def _ancestors(task: Any) -> Iterator[Any]:
    parent = task
    while parent is not None:
        yield parent
        parent = getattr(parent, "_parent", None)


def _stage(task: Any, *, innermost: bool = False) -> str:
    """The role that the playbook names; roles that it includes work for it. ``innermost``: the role of the task."""
    roles = [role for one in _ancestors(task) if (role := getattr(one, "_role", None)) is not None]
    return str(roles[0 if innermost else -1].get_name()) if roles else ""


def _is_rescued(task: Any) -> bool:
    """Whether a block of a role has a rescue for the task (the playbook's own is what ends a stage)."""
    inner: list[str] = []
    for one in _ancestors(task):
        if getattr(one, "rescue", None) and getattr(one, "_role", None) is not None:
            # What fails in a rescue itself is not rescued. Tasks are copied as they are run; their ids stay.
            last = {str(member._uuid) for member in [*one.rescue, *one.always]}
            if not last.intersection(inner):
                return True
        inner.append(str(getattr(one, "_uuid", "")))
    return False
