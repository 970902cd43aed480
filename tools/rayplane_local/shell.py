"""Running commands: quiet ones, long ones with a log and progress, and waiting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import CancelledError, CommandError
from .progress import Step, duration

# What outlives a killed run would go on writing under the next one's feet. The first child dies with this process; as
# root it also holds a process namespace, which the kernel empties with it, and its mounts are nobody else's.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
WITH_ALL_BELOW = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")


def run(
    command: Sequence[str | Path],
    *,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end and keep its output.

    Raises CommandError where it fails (unless check is false) or takes longer than timeout seconds.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise CommandError(f"{words[0]} is not installed: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"`{' '.join(words)}` did not end within {duration(timeout)}") from error
    if check and done.returncode != 0:
        raise CommandError(
            f"`{' '.join(words)}` failed with status {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return done


def run_long(
    command: Sequence[str | Path],
    step: Step,
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    note: Callable[[str, int], str | None] = lambda line, count: None,
) -> None:
    """Run a long command with its output in a log file.

    note is called with every line of output and its number; what it returns becomes the step's note. The command, with
    all that it started, dies with this process, and is ended when the step is cancelled. Raises CommandError with the
    last lines of the log where it fails.
    """
    words = [str(word) for word in command]
    guards = [*DIE_WITH_PARENT, *(WITH_ALL_BELOW if os.geteuid() == 0 else ())]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream, log.open() as reader:
        stream.write(f"$ {' '.join(words)}\n")
        stream.flush()
        child = subprocess.Popen(
            [*guards, *words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
        count = 0
        while True:
            ended = child.poll() is not None
            for line in reader:
                count += 1
                step.note = note(line.rstrip(), count) or step.note
            if ended:
                break
            if step.cancel.wait(0.2):
                child.kill()
                child.wait()
                raise CancelledError(f"{step.name} was stopped")
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CommandError(f"{step.name} failed with status {child.returncode}; the end of {log}:\n{tail}")


def wait_for(what: str, ready: Callable[[], str], step: Step, *, seconds: float, pause: float = 0.25) -> None:
    """Wait until ready() returns an empty string; what it returns before that says what is still missing.

    Raises CommandError with the last answer after that many seconds.
    """
    end = time.monotonic() + seconds
    while True:
        missing = ready()
        if not missing:
            return
        step.note = f"waiting for {what}"
        if time.monotonic() > end:
            raise CommandError(f"{what} did not come within {duration(seconds)}: {missing}")
        time.sleep(pause)
