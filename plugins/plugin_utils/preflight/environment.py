# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""The controller: Python and ansible-core inside their window, packages and collections present, commands on the path.

The windows are written once, in the project's pyproject.toml and galaxy.yml, and read from there.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

__all__ = [
    "check_collections",
    "check_packages",
    "check_python",
    "check_tools",
    "collection_dependencies",
    "collection_version",
    "package_version",
    "project_metadata",
]

#: Packages that are looked at in another way: the collections that `ansible` carries may also be installed one by one.
_NOT_A_PACKAGE = {"ansible"}
_INSTALL = "run `make bootstrap`, or install the locked environment with `uv sync`"


def project_metadata(project: Path) -> Mapping[str, Any]:
    """The [project] table of the project's pyproject.toml; empty where there is none."""
    try:
        with (project / "pyproject.toml").open("rb") as file:
            table: Mapping[str, Any] = tomllib.load(file).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        return {}
    return table


def package_version(name: str) -> str | None:
    """The installed version of a Python distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(metadata: Mapping[str, Any], running: str = "") -> Iterator[Problem]:
    """The Python that runs Ansible lies inside `requires-python`."""
    version = running or ".".join(str(part) for part in sys.version_info[:3])
    window = str(metadata.get("requires-python", ""))
    if window and not _inside(version, window):
        yield Problem(
            "Python",
            version,
            f"the controller's Python must be {window}",
            "run Ansible from the project's own environment: `make deploy` builds it",
        )


def check_packages(
    metadata: Mapping[str, Any], installed: Callable[[str], str | None] = package_version
) -> Iterator[Problem]:
    """Every dependency of the project is installed in a version inside its window, ansible-core among them."""
    for text in metadata.get("dependencies", ()):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name in _NOT_A_PACKAGE or (requirement.marker and not requirement.marker.evaluate()):
            continue
        version = installed(requirement.name)
        window = str(requirement.specifier)
        if version is None:
            yield Problem(
                requirement.name,
                ABSENT,
                f"the Python package is not installed (wanted: {window or 'any version'})",
                _INSTALL,
            )
        elif not _inside(version, window):
            yield Problem(
                requirement.name, version, f"outside the versions this release was tested with: {window}", _INSTALL
            )


def collection_dependencies(project: Path) -> Mapping[str, str]:
    """The collections that the project needs, with versions: from galaxy.yml, or what an installation made of it."""
    manifest = project / "MANIFEST.json"
    if manifest.is_file():
        found: Any = json.loads(manifest.read_text(encoding="utf-8")).get("collection_info", {})
    else:
        found = yaml.safe_load((project / "galaxy.yml").read_text(encoding="utf-8"))
    dependencies: Mapping[str, str] = found["dependencies"]
    return dependencies


def check_collections(wanted: Mapping[str, str], installed: Callable[[str], str | None]) -> Iterator[Problem]:
    """Every collection that is needed is there, in a version that is allowed."""
    for name, window in wanted.items():
        version = installed(name)
        if version is None:
            yield Problem(name, ABSENT, f"the collection is not installed (wanted: {window})", _INSTALL)
        elif not _inside(version, window):
            yield Problem(name, version, f"outside the versions this release was tested with: {window}", _INSTALL)


def collection_version(name: str) -> str | None:
    """Version of an installed collection, by the import path Ansible uses for collections; None where it is missing."""
    namespace, _, collection = name.partition(".")
    for base in _collection_roots():
        manifest = base / namespace / collection / "MANIFEST.json"
        if manifest.is_file():
            try:
                return str(json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"])
            except (OSError, ValueError, KeyError):
                return None
    return None


def _collection_roots() -> Iterator[Path]:
    from ansible import constants  # noqa: PLC0415 - read late: tests replace it

    for path in [*constants.COLLECTIONS_PATHS, *sys.path]:  # type: ignore[attr-defined] # made when it is imported
        yield Path(path) / "ansible_collections"


def check_tools(tools: Mapping[str, str], found: Callable[[str], str | None] = shutil.which) -> Iterator[Problem]:
    """Every command is on the path; ``tools`` maps a command, or its path, to what it is needed for."""
    for command, purpose in tools.items():
        if command and found(command) is None:
            yield Problem(
                command,
                ABSENT,
                f"the command is not on the PATH; {purpose}",
                f"install {Path(command).name} on the machine that runs Ansible",
            )


def _inside(version: str, window: str) -> bool:
    try:
        return SpecifierSet(window).contains(Version(version), prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True
