"""The roles of a cluster, exercised by Molecule on a cluster that exists: two models, one of which leaves."""

from __future__ import annotations

from pathlib import Path

from .conftest import AWS, Runner, ask


def test_molecule(deployed: Path, run: Runner, tmp_path: Path) -> None:
    environment = {**AWS, "KUBECONFIG": str(deployed), "MOLECULE_EPHEMERAL_DIRECTORY": str(tmp_path)}
    run("molecule", "test", "--scenario-name", "kubernetes", env=environment).expect_success()
    assert "Paris" in ask()
