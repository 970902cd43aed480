"""`-e name=value` in the type that the variable's role declares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.callback.rayplane_overrides import declared_type, typed

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("4", "int", 4),
        ("four", "int", "four"),
        ("1.5", "int", "1.5"),
        ("1.5", "float", 1.5),
        ("2", "float", 2),
        ("false", "bool", False),
        ("yes", "bool", True),
        ("true", "int", "true"),
        ("[g4dn.2xlarge]", "list", ["g4dn.2xlarge"]),
        ("g4dn.2xlarge", "list", "g4dn.2xlarge"),
        ("{a: 1}", "dict", {"a": 1}),
        ("[unclosed", "list", "[unclosed"),
        ("1.34", "str", "1.34"),
        ("007", "str", "007"),
        ("4", "", "4"),
    ],
)
def test_text_becomes_what_was_declared(value: str, kind: str, expected: Any) -> None:
    read = typed(value, kind)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eks_gpu_instance_types", "list"),
        ("eks_gpu_max_size", "int"),
        ("eks_kubernetes_version", "str"),
        ("platform_confirm_destroy", "bool"),
        ("local_platform_home", "path"),
        ("nobodys_variable", ""),
        ("eks_gpu_max_sise", ""),
    ],
)
def test_types_come_from_the_specs(name: str, kind: str) -> None:
    assert declared_type(name) == kind


def test_a_run_sees_the_types(tmp_path: Path) -> None:
    playbook, report = tmp_path / "play.yml", tmp_path / "report.json"
    names = ["eks_gpu_instance_types", "eks_gpu_max_size", "eks_kubernetes_version", "platform_confirm_destroy", "word"]
    values = ", ".join(f"{name}: '{{{{ {name} }}}}'" for name in names)
    playbook.write_text(
        f"""
- hosts: all
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.copy:
        dest: {report}
        content: "{{{{ seen | to_json }}}}"
        mode: "0600"
      vars:
        seen: {{{values}}}
""",
        encoding="utf-8",
    )
    given = {
        "eks_gpu_instance_types": "[g4dn.2xlarge]",
        "eks_gpu_max_size": "4",
        "eks_kubernetes_version": "1.30",
        "platform_confirm_destroy": "false",
        "word": "4",
    }
    overrides = [argument for name, value in given.items() for argument in ("-e", f"{name}={value}")]
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    interpreter = json.dumps({"ansible_python_interpreter": sys.executable})
    subprocess.run(
        [program, str(playbook), "-i", "one,", *overrides, "-e", interpreter],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        timeout=280,
        env=os.environ | {"ANSIBLE_INVENTORY_ENABLED": "host_list"},
    )
    assert json.loads(report.read_text(encoding="utf-8")) == {
        "eks_gpu_instance_types": ["g4dn.2xlarge"],
        "eks_gpu_max_size": 4,
        "eks_kubernetes_version": "1.30",
        "platform_confirm_destroy": False,
        "word": "4",
    }
