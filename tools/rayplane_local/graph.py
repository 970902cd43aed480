"""A small graph of work: what waits for what, and which lane it runs in.

A lane runs one piece at a time, and lanes run beside each other: work that computes and work that downloads share a
machine well.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import CancelledError, PlatformError
from .progress import Report, Step, duration

HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Work:
    """One piece of work."""

    name: str
    action: Callable[[Step], None]
    lane: str = "compute"
    needs: tuple[str, ...] = ()


def order(works: Sequence[Work]) -> list[str]:
    """Names in an order in which every one comes after what it needs.

    Raises ValueError for a name given twice, a need that nothing provides, or a circle.
    """
    names = [work.name for work in works]
    if len(set(names)) != len(names):
        raise ValueError(f"the same name twice in {names}")
    left = {work.name: set(work.needs) for work in works}
    for name, needs in left.items():
        if unknown := needs - set(names):
            raise ValueError(f"{name} needs {', '.join(sorted(unknown))}, which nothing provides")
    done: list[str] = []
    while left:
        ready = [name for name, needs in left.items() if needs <= set(done)]
        if not ready:
            raise ValueError(f"a circle among {', '.join(sorted(left))}")
        done.extend(ready)
        for name in ready:
            del left[name]
    return done


def run_graph(works: Sequence[Work], report: Report, *, heartbeat: float = HEARTBEAT_SECONDS) -> dict[str, float]:
    """Run all work, each piece once what it needs is done, one at a time in each lane; gives every piece's seconds.

    The first failure stops the rest: running commands are ended, nothing new starts, and the failure is raised.
    """
    waiting = {name: next(work for work in works if work.name == name) for name in order(works)}
    running: dict[str, Step] = {}
    lanes: dict[str, str] = {}
    times: dict[str, float] = {}
    ended: queue.Queue[tuple[str, BaseException | None]] = queue.Queue()
    failure: BaseException | None = None

    def start(work: Work) -> None:
        step = Step(work.name)
        running[work.name] = step
        lanes[work.lane] = work.name

        def body() -> None:
            try:
                work.action(step)
            except BaseException as error:  # handed to the thread that waits
                ended.put((work.name, error))
            else:
                ended.put((work.name, None))

        threading.Thread(target=body, name=work.name, daemon=True).start()

    beat = time.monotonic() + heartbeat
    while waiting or running:
        if failure is None:
            for name, work in list(waiting.items()):
                if work.lane not in lanes and all(need in times for need in work.needs):
                    del waiting[name]
                    start(work)
        elif not running:
            break
        try:
            name, error = ended.get(timeout=max(0.05, beat - time.monotonic()))
        except queue.Empty:
            beat = time.monotonic() + heartbeat
            report("  ... " + "; ".join(step.line() for step in running.values()))
            continue
        step = running.pop(name)
        lanes = {lane: holder for lane, holder in lanes.items() if holder != name}
        if error is None:
            times[name] = step.elapsed()
            report(f"  {name}: done in {duration(times[name])}")
        elif failure is None or isinstance(failure, CancelledError):
            failure = error
            for other in running.values():
                other.cancel.set()
    if failure is not None:
        if isinstance(failure, (PlatformError, KeyboardInterrupt)):
            raise failure
        raise PlatformError(f"unexpected failure: {failure!r}") from failure
    return times
