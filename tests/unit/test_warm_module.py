"""The action that runs our modules in the task's own process: same results, same errors, as Ansible's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]

# A kubectl whose objects tell in which process and with which environment the module ran it.
KUBECTL = """#!/bin/sh
[ "$RAYPLANE_TEST_WORD" = fail ] && { echo "no such folder" >&2; exit 1; }
echo "{apiVersion: v1, kind: ConfigMap,"
echo " metadata: {name: $RAYPLANE_TEST_WORD, annotations: {parent: '$(cat /proc/$PPID/comm)'}}}"
"""

PLAY = """
- hosts: all
  gather_facts: false
  environment: {RAYPLANE_TEST_WORD: "{{ word }}"}
  tasks:
    - rayplane.platform.kustomize_build:
        source: https://example.invalid/kustomization
        cache_dir: "{{ cache }}"
        kubectl: "{{ kubectl }}"
        namespace: here
"""


def play(tmp_path: Path, word: str, interpreter: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run the play; return the task's result and everything that was printed with -vvv."""
    kubectl, playbook = tmp_path / "kubectl", tmp_path / "play.yml"
    kubectl.write_text(KUBECTL, encoding="utf-8")
    kubectl.chmod(0o755)
    playbook.write_text(PLAY, encoding="utf-8")
    values = {
        "ansible_connection": "local",
        "ansible_python_interpreter": interpreter,
        "word": word,
        "kubectl": str(kubectl),
        "cache": str(tmp_path / f"cache-{Path(interpreter).name}-{word}"),
    }
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    done = subprocess.run(
        [program, str(playbook), "-i", "one,", "-e", json.dumps(values), *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ
        | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}
        | {"ANSIBLE_INVENTORY_ENABLED": "host_list"},
    )
    listed = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    result: dict[str, Any] = listed["plays"][0]["tasks"][0]["hosts"]["one"]
    return result, done.stdout + done.stderr


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that is not, by its name, the one that runs Ansible."""
    link = tmp_path_factory.mktemp("python") / "other-python"
    link.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    link.chmod(0o755)
    return str(link)


def test_every_module_has_its_action() -> None:
    modules = {path.stem for path in (PROJECT / "plugins" / "modules").glob("*.py")}
    routing = yaml.safe_load((PROJECT / "meta/runtime.yml").read_text(encoding="utf-8"))["plugin_routing"]["action"]
    # Others are documentation of an action of the same name.
    actions = {path.stem for path in (PROJECT / "plugins" / "action").glob("*.py")}
    assert routing.keys() == modules - actions
    for route in routing.values():
        assert (PROJECT / f"plugins/action/{route['redirect'].removeprefix('rayplane.platform.')}.py").is_file()


def test_a_module_runs_in_the_process_of_its_task(tmp_path: Path, other_python: str) -> None:
    here, _ = play(tmp_path, "word", sys.executable)
    alone, _ = play(tmp_path, "word", other_python)
    objects = [json.loads(Path(result["path"]).read_text(encoding="utf-8")) for result in (here, alone)]
    # The environment of the task arrived both ways.
    assert [made[0]["metadata"]["name"] for made in objects] == ["word", "word"]
    parents = [made[0]["metadata"]["annotations"]["parent"] for made in objects]
    assert parents[0].startswith("ansible")  # Ansible names its processes
    assert parents[1].startswith("python")
    differing = ("path", "size", "invocation")  # the file of the cache, which holds the parent's name
    assert {key: here[key] for key in here if key not in differing} == {
        key: alone[key] for key in alone if key not in differing
    }


def test_a_failure_is_told_the_same_way(tmp_path: Path, other_python: str) -> None:
    here, _ = play(tmp_path, "fail", sys.executable)
    alone, _ = play(tmp_path, "fail", other_python)
    assert here["failed"] is True
    assert "no such folder" in here["msg"]
    assert here["msg"] == alone["msg"].replace(other_python, sys.executable)


def test_check_mode_and_the_module_arguments_arrive(tmp_path: Path) -> None:
    result, _ = play(tmp_path, "word", sys.executable, "--check")
    assert result["changed"] is False
    assert result["invocation"]["module_args"]["namespace"] == "here"


def test_other_ways_of_connecting_are_left_to_ansible(tmp_path: Path) -> None:
    # become on the controller itself: the module must run as somebody else, which this process cannot become.
    result, output = play(tmp_path, "word", sys.executable, "--become", "--become-method", "no.such.method")
    assert result["failed"] is True
    assert "no.such.method" in output


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    play(tmp_path, "word", sys.executable)
    assert [path for path in folder.iterdir() if path.name.startswith("rayplane-")] == []
