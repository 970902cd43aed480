"""Private names of ansible-core: one file uses them, and they are as it expects."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path

from ansible.module_utils import basic
from ansible_collections.rayplane.platform.plugins.plugin_utils.ansible_private import USED, Origin
from conftest import PROJECT

FILE = PROJECT / "plugins/plugin_utils/ansible_private.py"
CORE = f"ansible-core {version('ansible-core')} has changed a private name: look at {FILE.relative_to(PROJECT)}"


def test_functions_have_the_signatures_that_are_expected() -> None:
    assert {function: str(inspect.signature(function)) for function in USED} == USED, CORE


def test_a_module_reads_its_arguments_from_these_names() -> None:
    source = inspect.getsource(basic._load_params)
    assert "buffer = _ANSIBLE_ARGS" in source and "profile = _ANSIBLE_PROFILE" in source, CORE


def test_values_are_tagged_with_their_origin() -> None:
    tagged = Origin(path="/inventory/main.yml", line_num=3, col_num=1).tag("value")
    origin = Origin.get_tag(tagged)
    assert origin is not None, CORE
    assert (origin.path, origin.line_num, origin.col_num) == ("/inventory/main.yml", 3, 1), CORE


def test_no_other_file_uses_private_names() -> None:
    private = re.compile(
        r"ansible\._internal|_internal\._|basic\._ANSIBLE|_options_vars|"
        + "|".join(rf"\._?{function.__name__.lstrip('_')}\b" for function in USED)
    )

    def uses(path: Path) -> bool:
        return path != FILE and bool(private.search(path.read_text(encoding="utf-8")))

    assert [str(path) for path in (PROJECT / "plugins").rglob("*.py") if uses(path)] == []
