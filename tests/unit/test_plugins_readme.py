"""Every module says why no collection has it, and names real ones."""

from __future__ import annotations

import importlib.util
import re

from conftest import PROJECT

ROWS = re.findall(
    r"^\| (`.*?) \| (.*?) \| (.*?) \|$", (PROJECT / "plugins/README.md").read_text(encoding="utf-8"), re.M
)


def test_every_module_has_a_row() -> None:
    named = [name for cell, _, _ in ROWS for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(path.stem for path in (PROJECT / "plugins/modules").glob("*.py"))
    assert all(reason for _, _, reason in ROWS)


def test_the_modules_of_collections_are_there() -> None:
    named = {name for _, cell, _ in ROWS for name in re.findall(r"`(\w+\.\w+)\.(\w+)`", cell)}
    missing = []
    for collection, module in sorted(named):
        package = f"ansible_collections.{collection}.plugins"
        if not any(importlib.util.find_spec(f"{package}.{kind}.{module}") for kind in ("modules", "lookup")):
            missing.append(f"{collection}.{module}")
    assert missing == []
