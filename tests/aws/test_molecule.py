"""The Molecule scenario of the cloud's roles: planned, built, built again, looked at and destroyed, role by role."""

from __future__ import annotations

import subprocess
from pathlib import Path

from rayplane_local.shell import DIE_WITH_PARENT

from .conftest import ROOT, RUN_LIMIT, environment
from .faults import Proxy


def test_molecule(proxy: Proxy, tmp_path: Path) -> None:
    given = {
        **dict.fromkeys(("NO_COLOR", "ANSIBLE_NOCOLOR"), "1"),
        "RAYPLANE_TEST_AWS_ENDPOINT_URL": proxy.url,
        # By default Molecule keeps its state in a folder that is named after the project's, in the user's home.
        "MOLECULE_EPHEMERAL_DIRECTORY": str(tmp_path / "molecule"),
    }
    kept = {name: value for name, value in environment(tmp_path).items() if not name.startswith("ANSIBLE_")}
    done = subprocess.run(
        [*DIE_WITH_PARENT, "molecule", "test", "--scenario-name", "aws"],
        cwd=ROOT,
        env={**kept, **given},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=2 * RUN_LIMIT,
    )
    assert done.returncode == 0, done.stdout[-50000:]
