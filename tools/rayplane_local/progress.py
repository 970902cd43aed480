"""Lines for a person who waits: what runs, for how long, and what it took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Report = Callable[[str], None]


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 05 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


class Step:
    """One piece of work under way: its latest note and its age."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        self.note = ""
        self.cancel = threading.Event()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def line(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"{self.name}: {duration(self.elapsed())}{note}"


def table(rows: dict[str, float]) -> list[str]:
    """A small table of names and times, longest first."""
    width = max((len(name) for name in rows), default=0)
    return [
        f"  {name.ljust(width)}  {duration(seconds)}" for name, seconds in sorted(rows.items(), key=lambda row: -row[1])
    ]
