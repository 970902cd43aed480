"""Content keys: a thing is made again only when something that it is made of changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY_LENGTH = 16


def content_key(*values: Any, files: Iterable[Path] = ()) -> str:
    """A short key over plain values and the contents of files (their names count, their folders do not)."""
    digest = hashlib.sha256()
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for file in sorted(files):
        digest.update(f"\0{file.name}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:KEY_LENGTH]


def write_text(path: Path, text: str, mode: int = 0o644) -> bool:
    """Put text into a file at once (a reader sees the old text or the new one); tells whether it changed."""
    if path.is_file() and path.read_text() == text and path.stat().st_mode & 0o777 == mode:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    Path(name).chmod(mode)
    Path(name).replace(path)
    return True


def link(path: Path, target: Path) -> bool:
    """Point a symbolic link at a target at once; tells whether it changed."""
    if path.is_symlink() and path.readlink() == target:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    return True


def read_json(path: Path) -> Any:
    """A JSON file's value, or None where there is no whole one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
