"""A checkout, an installed collection and a project of AWX: the same variables, the same results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import environment as surroundings
from conftest import PROJECT

from tests.packed import clean_environment, installed, playbook, run_as_awx, unpacked

#: Writes every variable of an inventory and of the role platform, with its value, into a file.
DUMP = """
- name: Write the variables
  hosts: clusters
  gather_facts: false
  roles: [{role}]
  tasks:
    - name: Write them
      ansible.builtin.copy:
        content: "{{{{ dict(names | zip(query('ansible.builtin.vars', *names))) | to_json }}}}"
        dest: "{target}"
        mode: "0600"
"""


def names() -> list[str]:
    """Every variable that production's inventory has of itself or of the role platform."""
    found = {"platform"}
    for file in [PROJECT / "roles/platform/defaults/main.yml", *PROJECT.glob("inventories/prod/group_vars/all/*.yml")]:
        found |= set(yaml.safe_load(file.read_text(encoding="utf-8")))
    return sorted(found)


def variables(folder: Path, environment: dict[str, str], tmp_path: Path, role: str = "platform") -> dict[str, Any]:
    """The variables of production as a run in a folder sees them."""
    target = tmp_path / "variables.json"
    (tmp_path / "dump.yml").write_text(DUMP.format(role=role, target=target), encoding="utf-8")
    inventory = "inventories/prod"
    playbook(folder, environment, str(tmp_path / "dump.yml"), "-i", inventory, "-e", json.dumps({"names": names()}))
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    # Where files go is the folder's own.
    del found["platform_output_dir"]
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cost report of production in the checkout, and its variables."""
    folder = tmp_path_factory.mktemp("checkout")
    report = folder / "cost.json"
    playbook(
        PROJECT, clean_environment(), "playbooks/cost.yml", "-i", "inventories/prod", "-e", f"cost_report_file={report}"
    )
    return {
        "cost": json.loads(report.read_text(encoding="utf-8")),
        "variables": variables(PROJECT, clean_environment(), folder),
    }


def test_installed_it_does_the_same_from_an_empty_folder(checkout: dict[str, Any], tmp_path: Path) -> None:
    environment = installed(unpacked(tmp_path), tmp_path / "collections")
    folder = tmp_path / "empty"
    shutil.copytree(PROJECT / "inventories/prod", folder / "inventories/prod")
    prod = ("-i", "inventories/prod")
    said = playbook(folder, environment, "rayplane.platform.validate", *prod, "-e", '{"preflight_scope": "declared"}')
    assert "failed=0" in said
    playbook(folder, environment, "rayplane.platform.cost", *prod, "-e", f"cost_report_file={tmp_path / 'cost.json'}")
    assert json.loads((tmp_path / "cost.json").read_text(encoding="utf-8")) == checkout["cost"]
    assert variables(folder, environment, tmp_path, "rayplane.platform.platform") == checkout["variables"]


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_an_archive_loses_no_variable(checkout: dict[str, Any], tmp_path: Path, kind: str) -> None:
    project = unpacked(tmp_path, kind)
    report = tmp_path / "cost.json"
    done = run_as_awx(
        project, tmp_path, "playbooks/cost.yml", "-i", "inventories/prod", "-e", f"cost_report_file={report}"
    )
    assert done["rc"] == 0, done["output"]
    assert json.loads(report.read_text(encoding="utf-8")) == checkout["cost"]
    # What people see on the command line: the table of costs, and that of stages.
    assert "total, every node on demand" in done["output"]
    assert "STAGES" in done["output"]
    environment = {**clean_environment(), "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "requirements_collections")}
    found = variables(project, environment, tmp_path)
    assert found == checkout["variables"]
    assert list(found) == [name for name in names() if name != "platform_output_dir"]


def test_an_execution_environment_has_what_galaxy_yml_names() -> None:
    made = yaml.safe_load((PROJECT / "execution-environment.yml").read_text(encoding="utf-8"))["dependencies"]
    listed = {one["name"]: one["version"] for one in made["galaxy"]["collections"]}
    assert listed == surroundings.collection_dependencies(PROJECT)
