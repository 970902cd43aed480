"""Mount points: which there are, and taking ours away."""

from __future__ import annotations

from pathlib import Path

from .shell import run


def points() -> list[Path]:
    """Every mount point, deepest first."""
    found = [
        line.split()[1].encode().decode("unicode_escape") for line in Path("/proc/self/mounts").read_text().splitlines()
    ]
    return sorted({Path(point) for point in found}, key=lambda path: len(path.parts), reverse=True)


def unmount_below(folder: Path) -> int:
    """Unmount everything at or below a folder; gives the number."""
    count = 0
    for point in points():
        if point == folder or folder in point.parents:
            done = run(["umount", point], check=False)
            if done.returncode != 0:
                run(["umount", "--lazy", point])
            count += 1
    return count
