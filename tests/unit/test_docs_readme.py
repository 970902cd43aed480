"""What the documents say is so: paths exist, targets and variables are real, examples pass preflight."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.action.rayplane_preflight import FACTS
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.rules import check_declared
from conftest import PROJECT

DOCUMENTS = sorted(
    path for pattern in ("README.md", "docs/**/*.md", "roles/*/README.md") for path in PROJECT.glob(pattern)
)
TOP = [".config", *sorted(path.name for path in PROJECT.iterdir() if path.is_dir() and path.name[0] != ".")]
#: Words that look like a role's variable: facts, modules and codes of errors, named in prose.
NAMES_OF_PLUGINS = {path.stem for path in PROJECT.glob("plugins/*/*.py")}
CODES_OF_ERRORS = set(re.findall(r'"([a-z_]+)"', (PROJECT / "serve_app/gateway/errors.py").read_text(encoding="utf-8")))


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    """Inline code, fenced blocks and indented blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", text, re.M)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [*fenced, *indented, *inline]


def ids(path: Path) -> str:
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (document.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_paths_exist(document: Path) -> None:
    folders = "|".join(re.escape(name) for name in TOP)
    for piece in code(read(document)):
        for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./*-]*)", piece):
            pattern = path.rstrip("/.")
            assert list(PROJECT.glob(pattern)), f"{ids(document)} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {target for piece in code(read(document)) for target in re.findall(r"\bmake ([a-z-]+)", piece)}
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_variables_exist(document: Path) -> None:
    known: set[str] = NAMES_OF_PLUGINS | CODES_OF_ERRORS
    roles = [path.parent.parent.name for path in PROJECT.glob("roles/*/meta/argument_specs.yml")]
    for role in roles:
        for entry in yaml.safe_load(read(PROJECT / "roles" / role / "meta" / "argument_specs.yml"))[
            "argument_specs"
        ].values():
            known |= set(entry.get("options") or {})
    known |= set(FACTS)
    words = rf"(?<![\w/.-])((?:{'|'.join(roles)})_[a-z0-9_]*[a-z0-9])(?![\w/*]|\.\w)"
    named = {name for piece in code(read(document)) for name in re.findall(words, piece)}
    assert sorted(named - known - set(roles)) == []


def examples(document: Path) -> list[dict[str, Any]]:
    """YAML examples of a document that hold a model list."""
    pieces = [piece for piece in code(read(document)) if "rayservice_models:" in piece]
    return [yaml.safe_load(piece) for piece in pieces if "\n" in piece]


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_model_lists_pass_preflight(document: Path) -> None:
    for example in examples(document):
        problems = [problem for problem in check_declared({"platform": "existing", **example}) if not problem.warning]
        assert problems == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_nothing_is_left_to_fill_in(document: Path) -> None:
    assert re.findall(r"@[A-Z_]+@|\bTODO\b|\bFIXME\b", read(document)) == []


def test_no_file_names_a_place_of_one_machine() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = []
    places = re.compile(r"(?<![\w.])/(?:work|root)/\w")
    for name in listed:
        file = PROJECT / name
        if name and file.is_file() and not file.is_symlink() and file.suffix not in (".sum", ".lock", ".svg", ".gguf"):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            found += [f"{name}: {line.strip()[:80]}" for line in text.splitlines() if places.search(line)]
    assert found == []
