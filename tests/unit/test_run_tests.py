"""What `make test` makes of its phases: counts, commands that rerun a test, and the end of an interrupted run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_tests
from conftest import PROJECT
from run_tests import Phase, again, summary

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.unit.test_a" name="test_good" time="0.1"/>
<testcase classname="tests.unit.test_a" name="test_bad[x]" time="0.1"><failure message="no">no</failure></testcase>
<testcase classname="tests.unit.test_a" name="test_bad[x]" time="0.1"><error message="teardown">no</error></testcase>
<testcase classname="tests.unit.test_b" name="test_skipped" time="0.1"><skipped message="root">root</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_tests, "RESULTS", tmp_path)


def test_the_end_is_a_table_with_the_commands_that_rerun_what_failed() -> None:
    unit, lint = Phase("unit"), Phase("lint")
    unit.report.write_text(REPORT)
    unit.count(1)
    lint.count(0)
    lines = summary([unit, lint], 75.0)
    assert lines[1].split() == ["unit", "1", "1", "1", "0.0", "s"]
    assert lines[2].split() == ["lint", "1", "0", "0", "0.0", "s"]
    assert "  make test-unit ARGS=\"'tests/unit/test_a.py::test_bad[x]'\"" in lines
    assert lines[-1] == "2 passed, 1 failed, 1 skipped"


def test_a_phase_without_a_report_has_failed_as_a_whole() -> None:
    phase = Phase("aws")
    phase.count(4)
    assert phase.failed == ["make test-aws"]


@pytest.mark.parametrize("name", ["plain", "a b", "c$d", "[e]'f", 'g"h`i\\j!'])
def test_a_name_survives_make_and_two_shells(name: str, tmp_path: Path) -> None:
    file = tmp_path / "Makefile"
    file.write_text("SHELL := /bin/bash\ntest-unit:\n\t@printf '%s|' $(ARGS)\n")
    command = again("unit", f"tests/unit/test_a.py::test_b[{name}]")
    # pytest may be run by make itself, and an inner make would announce its folder.
    of_a_user = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    said = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=of_a_user, capture_output=True, text=True, check=True
    ).stdout
    assert said == f"tests/unit/test_a.py::test_b[{name}]|"


def test_an_unknown_phase_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tests.main(["units"]) == 2
    assert "no phase units: there are unit, lint, gateway, aws, platform" in capsys.readouterr().err


WAITS = """
import os, time
try:
    print("waits in process", os.getpid(), flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("cleans up", flush=True)
"""
RUNS = f"""
import run_tests, sys
from pathlib import Path
run_tests.RESULTS = Path(sys.argv[1])
run_tests.Phase.command = lambda self: [sys.executable, "-c", {WAITS!r}]
sys.exit(run_tests.main(["gateway"]))
"""


def test_an_interrupted_run_ends_what_it_started(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "tools")}
    command = [sys.executable, "-c", RUNS, str(tmp_path)]
    waiting, lines = 0, []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line)
            if match := re.search(r"waits in process (\d+)", line):
                waiting = int(match[1])
                run.send_signal(signal.SIGINT)
    assert run.returncode == 130, lines
    assert [line.partition("| ")[2] for line in lines if "cleans up" in line] == ["cleans up\n"]
    assert not Path(f"/proc/{waiting}").exists()
