"""The project as people get it without git: an archive, as AWX unpacks one, and an installed collection."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
#: Runs a playbook by ansible-runner, and prints what came of it as JSON.
RUNNER = """
import ansible_runner, json, sys
project, private, collections, playbook, cmdline = sys.argv[1:]
run = ansible_runner.run(
    project_dir=project, private_data_dir=private, envvars={"ANSIBLE_COLLECTIONS_PATH": collections},
    playbook=playbook, cmdline=cmdline, quiet=True,
)
events = sum(1 for event in run.events)
print(json.dumps({"rc": run.rc, "output": run.stdout.read(), "changed": sum(run.stats["changed"].values())}))
"""


def clean_environment() -> dict[str, str]:
    """The environment without any setting of Ansible's, and with this project's programs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    return {**kept, "PATH": f"{BIN}:{kept['PATH']}"}


def playbook(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """Run ansible-playbook in a folder, with success; gives its output."""
    done = subprocess.run(
        ["ansible-playbook", *arguments],
        cwd=folder,
        env={**environment, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files() -> list[Path]:
    """What git would put into an archive, as it stands in the working tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [Path(name) for name in listed if (ROOT / name).exists()]


def unpacked(folder: Path, kind: str = "tar.gz") -> Path:
    """Pack the project and unpack it as AWX does: every member that is no folder is written as a file."""
    archive, project = folder / f"project.{kind}", folder / "project"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packing:
            for file in files():
                # A link is stored as git stores it: a text with its aim.
                path = ROOT / file
                packing.writestr(str(file), str(path.readlink()) if path.is_symlink() else path.read_bytes())
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                (project / name).parent.mkdir(parents=True, exist_ok=True)
                (project / name).write_bytes(packed.read(name))
        return project
    with tarfile.open(archive, "w:gz") as packing_tar:
        for file in files():
            packing_tar.add(ROOT / file, str(file), recursive=False)
    with tarfile.open(archive) as packed_tar:
        for member in packed_tar.getmembers():
            (project / member.name).parent.mkdir(parents=True, exist_ok=True)
            content = packed_tar.extractfile(member) if member.isfile() else None
            (project / member.name).write_bytes(content.read() if content else b"")
    return project


def _galaxy(folder: Path, *arguments: str) -> None:
    command = ["ansible-galaxy", "collection", *arguments]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True, capture_output=True, timeout=280)


def installed(project: Path, collections: Path) -> dict[str, str]:
    """Install the collection from a tarball; gives the environment of a run that uses it, with nothing else set."""
    collections.mkdir()
    _galaxy(project, "build", "--output-path", str(collections))
    (tarball,) = collections.glob("*.tar.gz")
    _galaxy(collections, "install", str(tarball), "--offline", "-p", str(collections))
    return {**clean_environment(), "ANSIBLE_COLLECTIONS_PATH": str(collections)}


def run_as_awx(project: Path, folder: Path, playbook: str, *arguments: str) -> dict[str, Any]:
    """Run a playbook by ansible-runner, with the collections that a project update of AWX installs.

    Gives ``rc``, ``output`` and ``changed``.
    """
    collections, private = folder / "requirements_collections", folder / "private"
    if not private.exists():
        private.mkdir()
        _galaxy(project, "install", "-r", "collections/requirements.yml", "--offline", "-p", str(collections))
    places = [str(place) for place in (project, private, collections)]
    command = [sys.executable, "-c", RUNNER, *places, playbook, shlex.join(arguments)]
    run = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer
