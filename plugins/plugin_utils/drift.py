# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run in check mode found to differ from what is declared, stage by stage, and the report of it.

The tasks of stages register their results (``__network_result``), so nothing that they say is lost. The modules hide
what is secret in what they say; what looks like a secret is hidden here once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

CLEAN, NOT_COMPARED, DRIFT = 0, 1, 2
HIDDEN = "(hidden)"
#: Stages that ask and compare nothing.
ASKING = ("account",)

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
    #: Empty where none of its tasks ran.
    task: str
    reason: str

    def where(self) -> str:
        """Stage and task."""
        return ", ".join(filter(None, (self.stage, self.task)))


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


def rows_of(cluster: str, stage: str, variables: Mapping[str, Any], noted: Iterable[Row] = ()) -> list[Row]:
    """What the results among a host's variables say they would change, and what others added to the stage.

    ``noted`` are the rows of the stages before, whose results are still there.
    """
    known = [replace(row, stage=stage) for row in noted]
    rows: list[Row] = []
    for name, result in variables.items():
        if not name.startswith("__") or not isinstance(result, Mapping):
            continue
        said = []
        if result.get("changed") is True and not result.get("failed"):
            for resource, path, action, *values in entries(result, name.removeprefix("__")):
                hidden = [HIDDEN, f"{HIDDEN}, another"] if path and is_secret(path) else map(without_secrets, values)
                said.append(Row(cluster, stage, resource, path, action, *hidden))
        # A stage that looks another up (the network's ids) does not compare it.
        if name.startswith(f"__{stage}_"):
            for one in result.get("foreign") or []:
                value = without_secrets(one["value"])
                said.append(Row(cluster, stage, one["resource"], one["property"], "foreign", value, None))
        # A result may be kept under a second name.
        rows += [row for row in said if row not in rows and row not in known]
    return rows


@dataclass
class Report:
    """What was compared in one run, and what came of it."""

    rows: list[Row] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    #: Cluster -> stage -> whether it was compared to its end, in order.
    compared: dict[str, dict[str, bool]] = field(default_factory=dict)

    def add(self, cluster: str, stage: str, rows: Iterable[Row], gap: Gap | None = None) -> None:
        """A stage was compared: to its end, or up to the gap."""
        self.rows += [row for row in rows if row not in self.rows]
        if gap is not None:
            self.gaps.append(gap)
        if gap is not None or stage not in ASKING:
            stages = self.compared.setdefault(cluster, {})
            stages[stage] = stages.get(stage, True) and gap is None

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
                lines += [f"- {gap.where()}: {' '.join(gap.reason.split())}" for gap in gaps]
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
        lines += [f"not compared: {gap.cluster}: {gap.where()}: {shown(gap.reason, 400)}" for gap in self.gaps]
        return [*lines, self.sentence()]

    def sentence(self) -> str:
        """The outcome in one sentence."""
        looked = f"{_count(len(self.clusters()), 'cluster')} compared"
        resources = _count(len({(row.cluster, row.resource) for row in self.rows}), "resource")
        found = f"{_count(len(self.rows), 'difference')} in {resources}" if self.rows else "nothing differs"
        if self.status == "incomplete" and not self.gaps:
            return "Nothing was compared: no stage of a cluster matches the arguments (--limit, --tags)."
        if self.status == "incomplete":
            left = f"{_count(len(self.gaps), 'part')} could not"
            return f"{looked}, not completely: {found} in what could be compared, {left}."
        return f"{looked}: {found}{'' if self.rows else ' from what is declared'}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
