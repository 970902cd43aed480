"""What every benchmark ends with: its report, or one error."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class BenchError(Exception):
    """Why there is no figure."""


def run(options: argparse.Namespace, compare: Callable[[argparse.Namespace, Path], str]) -> int:
    """Measure in a folder of the run's own and print the report, to `options.output` too; 1 where there is none."""
    folder = Path(tempfile.mkdtemp(prefix="rayplane-bench-"))
    try:
        text = compare(options, folder)
    except (BenchError, NotImplementedError, OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0
