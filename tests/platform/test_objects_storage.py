"""The clouds' storage classes on a real API server."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Runner


def test_the_clouds_storage_classes_are_accepted(api: Path, run: Runner) -> None:
    values = json.dumps({"storage_class_enabled": True, "storage_class_efs_enabled": False})
    role = ("clusters", "-i", "inventories/local", "-m", "ansible.builtin.include_role", "-a", "name=storage_class")
    done = run("ansible", *role, "-e", values, "--check", env={"K8S_AUTH_KUBECONFIG": str(api)}).expect_success()
    assert "StorageClass gp3" in done.output
