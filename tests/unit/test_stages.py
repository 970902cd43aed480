"""The table of stages: times add up, failures that were rescued do not count, the recap stays as it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.rayplane.platform.plugins.callback.rayplane_stages import Stages, duration
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_times_add_up_by_stage() -> None:
    clock = Clock()
    stages = Stages(clock)
    for name, seconds in (("network", 5), ("eks", 60), ("network", 7)):
        stages.enter(name)
        clock.now += seconds
    stages.changed("eks")
    stages.changed("eks")
    stages.failed("network", "prod")
    lines = stages.table({"prod": 1})
    assert [line.split() for line in lines] == [
        ["stage", "time", "changed", "failed"],
        ["network", "12", "s", "1"],
        ["eks", "1", "min", "00", "s", "2"],
        ["-" * len(lines[0])],
        ["total", "1", "min", "12", "s", "2", "1"],
    ]


def test_time_between_stages_belongs_to_none() -> None:
    clock = Clock()
    stages = Stages(clock)
    stages.enter("a")
    clock.now += 1
    stages.leave()
    clock.now += 50
    stages.enter("b")
    clock.now += 2
    assert [line.split()[:2] for line in stages.table({})[1:3]] == [["a", "1.0"], ["b", "2.0"]]


def test_failures_that_were_rescued_do_not_count() -> None:
    stages = Stages(Clock())
    stages.enter("a")
    stages.failed("a", "prod")
    assert stages.table({})[1].split() == ["a", "0.0", "s"]


def test_an_empty_run() -> None:
    assert stages_words(Stages(Clock()).table({})) == [["stage", "time", "changed", "failed"], ["total", "0.0", "s"]]


def stages_words(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines if not line.startswith("-")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s")),
        *((725, "12 min 05 s"), (3599.7, "1 h 00 min"), (3725, "1 h 02 min")),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e6))
def test_duration_has_one_form(seconds: float) -> None:
    assert re.fullmatch(r"\d\.\d s|[1-5]\d s|\d+ min \d\d s|\d+ h \d\d min", duration(seconds))


PLAYBOOK = """
- name: A play of its own
  hosts: all
  gather_facts: false
  tasks:
    - name: Change
      ansible.builtin.command: "true"
    - name: Rescued
      block:
        - name: Fail
          ansible.builtin.fail:
      rescue:
        - name: Go on
          ansible.builtin.debug:
- name: A play of roles
  hosts: all
  gather_facts: false
  roles: [first, second]
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the playbook above on two hosts, with the table."""
    (folder / "play.yml").write_text(PLAYBOOK, encoding="utf-8")
    for role, task in (("first", "ansible.builtin.debug:"), ("second", "ansible.builtin.command: 'true'")):
        (folder / "roles" / role / "tasks").mkdir(parents=True)
        (folder / "roles" / role / "tasks" / "main.yml").write_text(f"- name: Do\n  {task}\n", encoding="utf-8")
    local = f"ansible_connection=local ansible_python_interpreter={sys.executable}"
    inventory = f"one {local}\ntwo {local}\n"
    (folder / "hosts").write_text(inventory, encoding="utf-8")
    config = f"[defaults]\ncallback_plugins={PROJECT}/plugins/callback\ncallbacks_enabled=rayplane_stages\n"
    (folder / "ansible.cfg").write_text(config, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", "hosts", "play.yml", *arguments],
        cwd=folder,
        env={**os.environ, "ANSIBLE_CONFIG": str(folder / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_a_real_run_ends_with_the_table_below_the_recap(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    recap, table = result.stdout.split("STAGES")
    assert len(re.findall(r"^(?:one|two) +: ok=4 +changed=2 .* rescued=1", recap, re.M)) == 2
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines() if " s" in line}
    assert list(rows) == ["A play of its own", "first", "second", "total"]
    assert rows["A play of its own"][-1] == "2"
    assert rows["first"][-1] == "s"
    assert rows["total"][-1] == "4"
    assert "WARNING" not in result.stderr


def test_output_for_machines_stays_as_it_is(tmp_path: Path) -> None:
    result = run(tmp_path, ANSIBLE_STDOUT_CALLBACK="ansible.posix.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "STAGES" not in result.stdout
