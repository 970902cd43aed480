"""The clouds' storage classes on a real API server."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Runner


def test_the_clouds_storage_classes_are_accepted(api: Path, run: Runner, tmp_path: Path) -> None:
    play = tmp_path / "play.yml"
    play.write_text("- {hosts: clusters, gather_facts: false, roles: [platform, storage_class]}\n")
    values = json.dumps({"storage_class_enabled": True, "storage_class_efs_enabled": False})
    arguments = (str(play), "-i", "inventories/local", "--check", "-e", values)
    done = run("ansible-playbook", *arguments, env={"K8S_AUTH_KUBECONFIG": str(api)}).expect_success()
    assert "StorageClass gp3" in done.output
