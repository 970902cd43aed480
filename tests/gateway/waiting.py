"""Waiting for what has to happen. A wait that fails says what it waited for, and what it saw last."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

#: Far more than the slowest machine takes: only what hangs takes so long.
LONG_S = 60.0


def wait_until(condition: Callable[[], Any], what: str = "", saw: Callable[[], Any] | None = None) -> Any:
    """Wait until a condition holds; what it gave then.

    Args:
        condition: Asked again and again.
        what: What is waited for; the condition's source where it is not given.
        saw: What the failure shows; otherwise what the condition's variables hold.
    """
    for _ in _rounds(condition, what, saw):
        if found := condition():
            break
        time.sleep(0.01)
    return found


async def until(condition: Callable[[], Any], what: str = "", saw: Callable[[], Any] | None = None) -> Any:
    """`wait_until` in an event loop."""
    for _ in _rounds(condition, what, saw):
        if found := condition():
            break
        await asyncio.sleep(0.005)
    return found


def _rounds(condition: Callable[[], Any], what: str, saw: Callable[[], Any] | None) -> Iterator[None]:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        yield
    if not what:
        named = getattr(condition, "__name__", "<lambda>") != "<lambda>"
        what = str(condition) if named else inspect.getsource(condition).strip()
    seen = saw() if saw else dict(inspect.getclosurevars(condition).nonlocals)
    raise AssertionError(f"not within {LONG_S:g} s: {what}; seen last: {seen!r:.2000}")
