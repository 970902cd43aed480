"""`python -m rayplane_local up|down|plan [NAME=VALUE ...]`: the stages without Ansible, for work on the platform
itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from . import down, locking
from .errors import PlatformError
from .progress import duration
from .settings import Settings
from .stages import STAGES


def main(words: list[str]) -> int:
    """Run a verb; gives the exit status."""
    verb, *pairs = words
    values: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        values[name] = value
    values.setdefault("home", os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache" / "rayplane")
    settings = Settings.from_mapping(values)
    try:
        locking.acquire(settings.home, os.getpid())
        if verb == "down":
            for line in down.take_down(settings, print):
                print(line)
            return 0
        for stage in STAGES:
            began = time.monotonic()
            actions = (
                stage.plan(settings)
                if verb == "plan"
                else stage.apply(settings, lambda line: print(line, flush=True)).actions
            )
            print(
                f"{stage.name}: {', '.join(actions) or 'nothing to do'} ({duration(time.monotonic() - began)})",
                flush=True,
            )
    except PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
