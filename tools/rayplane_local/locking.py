"""One run at a time: a lease that ends with the process that holds it."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from pathlib import Path

from .errors import PlatformError

LOCK_FILE = "lock"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None where there is no such process (or only its
    zombie).

    With the process id it names one process for good: the kernel gives ids again. See proc(5), fields 3 and 22 of stat.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def acquire(home: Path, owner: int) -> None:
    """Take the lease on a home folder for a process, or keep it where that process has it already.

    The lease is the process itself: when it ends, however it ends, the lease is free. Raises PlatformError naming the
    holder.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOCK_FILE).open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        try:
            held = json.loads(stream.read())
        except ValueError:
            held = {}
        pid = held.get("pid")
        if pid == owner and held.get("start") == start_time(owner):
            return
        if pid is not None and held.get("start") is not None and start_time(pid) == held["start"]:
            raise PlatformError(
                f"another run works on {home}: process {pid}, since {held.get('since')}. "
                f"Let it end (or stop it: kill {pid}), then run this one again."
            )
        stream.seek(0)
        stream.truncate()
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"pid": owner, "start": start_time(owner), "since": since}, stream)
        stream.flush()
        os.fsync(stream.fileno())
