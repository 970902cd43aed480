"""Run the tests in phases, those side by side that share a machine well, and end with a table of all of them.

`python tools/run_tests.py [PHASE ...] [-- ARGUMENTS OF PYTEST]`. A phase that fails stops no other. What a phase prints
is kept in test-results/PHASE.log.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rayplane_local import checks
from rayplane_local.progress import duration
from rayplane_local.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "test-results"
#: Phases of a group run side by side, groups one after the other.
GROUPS = (("unit",), ("lint", "gateway"), ("aws", "platform"))
OPTIONS = {
    "unit": ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "worksteal"),
    "gateway": ("--numprocesses", "2", "--dist", "worksteal"),
}
HEARTBEAT_S = 60.0
#: What interrupted tests get to take down what they started.
END_S = 120.0


@dataclass
class Phase:
    """One phase: its process, and what came of it."""

    name: str
    arguments: Sequence[str] = ()
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    passed: int = 0
    skipped: int = 0
    #: The command that reruns each failed test alone.
    failed: list[str] = field(default_factory=list)
    heard: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[str] | None = None

    @property
    def report(self) -> Path:
        return RESULTS / f"{self.name}.xml"

    def command(self) -> list[str]:
        if self.name == "lint":
            return ["make", "--no-print-directory", "lint"]
        chosen = any("tests/" in argument for argument in self.arguments)
        folder = () if chosen else (f"tests/{self.name}",)
        return ["pytest", *folder, *OPTIONS.get(self.name, ()), f"--junitxml={self.report}", *self.arguments]

    def run(self, said: threading.Lock) -> None:
        """Run the phase to its end; each line that it prints is shown with the phase's age and name."""
        self.report.unlink(missing_ok=True)
        self.began = time.monotonic()
        # A group of its own: Ctrl-C reaches it by way of `end`, once; and if this process is killed, so does its end.
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "INT", "env", "--default-signal=INT", *self.command()],
            cwd=ROOT,
            # Tests run make themselves, and its own variables would hand this run's ARGS on to it.
            env={key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS"))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        assert self.process.stdout is not None
        with self.process.stdout as output, (RESULTS / f"{self.name}.log").open("w", encoding="utf-8") as log:
            for line in output:
                self.heard = time.monotonic()
                log.write(line)
                log.flush()
                with said:
                    print(f"{self.age()} {self.name:8} | {line}", end="", flush=True)
        self.count(self.process.wait())
        self.seconds = time.monotonic() - self.began

    def age(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes:3}:{seconds:02}"

    def count(self, status: int) -> None:
        """Take the results out of pytest's report; of lint there is one."""
        cases = ElementTree.parse(self.report).iter("testcase") if self.report.is_file() else ()  # noqa: S314  our own
        failed: dict[str, None] = {}
        for case in cases:
            node = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                failed[again(self.name, node)] = None
            elif case.find("skipped") is not None:
                self.skipped += 1
            else:
                self.passed += 1
        self.failed = [*failed]
        if self.name == "lint" and status == 0:
            self.passed = 1
        if status and not self.failed:
            self.failed = [f"make {'lint' if self.name == 'lint' else f'test-{self.name}'}"]

    def end(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def again(phase: str, node: str) -> str:
    """The command that reruns one test: its name is quoted for make's own shell, and for the reader's around that."""
    inner = shlex.quote(node).replace("$", "$$")
    return f"make test-{phase} ARGS=" + (shlex.quote(inner) if set(inner) & set('"$`\\!') else f'"{inner}"')


def unfit() -> list[str]:
    """Why the platform's tests cannot run on this machine; without root they are skipped by name, so none."""
    home = Path(os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache/rayplane")
    settings = Settings(home=home)
    # The tests take down a platform that is up, whatever it was made from.
    found = [] if os.geteuid() else checks.problems(settings)
    return [str(problem) for problem in found if problem not in checks.recipe(settings)]


def run_group(phases: Sequence[Phase]) -> bool:
    """Run phases side by side; gives whether they came to their end."""
    said = threading.Lock()
    threads = [threading.Thread(target=phase.run, args=(said,), name=phase.name) for phase in phases]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            for phase, thread in zip(phases, threads, strict=True):
                if thread.is_alive() and time.monotonic() - phase.heard > HEARTBEAT_S:
                    phase.heard = time.monotonic()
                    with said:
                        print(f"{phase.age()} {phase.name:8} | ... still runs", flush=True)
    except KeyboardInterrupt:
        print("interrupted: the tests that run take down what they started", flush=True)
        deadline = time.monotonic() + END_S
        for phase in phases:
            phase.end(signal.SIGINT)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for phase, thread in zip(phases, threads, strict=True):
            phase.end(signal.SIGKILL)
            thread.join()
        return False
    return True


def summary(phases: Sequence[Phase], seconds: float) -> list[str]:
    """The table, how to rerun what failed, and the closing line."""
    lines = [f"{'phase':<10}{'passed':>8}{'failed':>8}{'skipped':>9}  time"]
    for phase in phases:
        counts = f"{phase.passed:>8}{len(phase.failed):>8}{phase.skipped:>9}"
        lines.append(f"{phase.name:<10}{counts}  {duration(phase.seconds)}")
    passed, skipped = sum(phase.passed for phase in phases), sum(phase.skipped for phase in phases)
    failed = [command for phase in phases for command in phase.failed]
    lines.append(f"{'total':<10}{passed:>8}{len(failed):>8}{skipped:>9}  {duration(seconds)}")
    if failed:
        lines += ["", "Failed; each alone again:", *(f"  {command}" for command in failed)]
        lines += [f"What they printed: {RESULTS.name}/PHASE.log"]
    return [*lines, "", f"{passed} passed, {len(failed)} failed, {skipped} skipped"]


def main(words: Sequence[str]) -> int:
    """Run what is asked for (everything); gives the exit status."""
    split = words.index("--") if "--" in words else len(words)
    wanted, arguments = words[:split], words[split + 1 :]
    known = [name for group in GROUPS for name in group]
    if unknown := [word for word in wanted if word not in known]:
        print(f"error: no phase {', '.join(unknown)}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    groups = [[Phase(name, arguments) for name in group if not wanted or name in wanted] for group in GROUPS]
    phases = [phase for group in groups for phase in group]
    if any(phase.name == "platform" for phase in phases) and (problems := unfit()):
        print("error: this machine cannot run tests/platform:", *problems, sep="\n  ", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    began = time.monotonic()
    for group in groups:
        if group:
            print(f"==> {' beside '.join(phase.name for phase in group)}", flush=True)
        if not run_group(group):
            return 130
    print("", *summary(phases, time.monotonic() - began), sep="\n", flush=True)
    return int(any(phase.failed for phase in phases))


if __name__ == "__main__":
    # A shell's background jobs ignore Ctrl-C; CI ends a run by SIGTERM.
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
