"""Preflight as a person meets it: real runs of validate.yml over inventories with everything wrong at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT

HOSTS = """
clusters:
  vars: {ansible_connection: local}
  hosts:
    cloud: {platform: aws}
    own: {platform: existing}
    odd: {platform: amazon}
embedded: {}
"""

EVERYTHING_WRONG = """
platform_models_bucket: My_Models
platform_namespace: "{{ platform_nmespace }}-x"
platform_region: us-west-2a
platform_tags: {CostCenter: 1234, Code: 0042}
rayservice_modles: []
eks_gpu_max_size: 0
eks_kubernetes_version: 1.30
network_vpc_cidr: 10.0.0.0/28
network_nat_mode: one
rayservice_name: a-very-long-name-that-goes-on-and-on-and-on-until-it-hurts
rayservice_wait: "no"
secrets_hugging_face_token: sesame-open
rayservice_models:
  - id: Llama_3
    source: meta-llama/Meta-Llama-3-8B-Instruct
    replicas: {min: 3, max: 1}
    engine: {tensor_parallel_size: 4, max_model_len: 16384}
  - id: qwen
    replicas: {min: -1, max: 1}
  - id: qwen
    source: s3://bucket/qwen
"""


@dataclass
class Run:
    """One run of validate.yml."""

    status: int
    output: str

    def problems(self, cluster: str, kind: str = "problem") -> dict[str, str]:
        """The reported entries of a cluster: the text below each variable."""
        report = re.search(
            rf"^Preflight: \d+ {kind}s? in cluster {cluster}\b.*?(?=^\S)", f"{self.output}.", re.M | re.S
        )
        if not report:
            return {}
        chunks = re.split(r"^ +\d+\. (\S.*)$", report[0], flags=re.M)[1:]
        # Without the place behind the variable, which has a test of its own.
        entries = zip(chunks[::2], chunks[1::2], strict=True)
        return {name.split("   (")[0]: text for name, text in entries}


@pytest.fixture(name="validate")
def _validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs validate.yml over three clusters with the given variables."""
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    group_vars = tmp_path / "inventory" / "group_vars" / "all"
    group_vars.mkdir(parents=True)
    (tmp_path / "inventory" / "hosts").write_text(HOSTS, encoding="utf-8")

    def run(variables: str, *arguments: str) -> Run:
        (group_vars / "main.yml").write_text(variables, encoding="utf-8")
        settings = {
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
            "ANSIBLE_NOCOLOR": "1",
            "KUBECONFIG": str(tmp_path / "absent"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "playbooks/validate.yml"]
        result = subprocess.run(
            [*command, "-i", str(tmp_path / "inventory"), *arguments],
            cwd=PROJECT,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=280,
        )
        return Run(result.returncode, result.stdout)

    return run


def test_everything_is_found_in_one_pass(validate) -> None:  # type: ignore[no-untyped-def]
    run = validate(EVERYTHING_WRONG, "-e", "platform_confirm_destroy=perhaps")
    assert run.status != 0
    assert set(run.problems("cloud")) == {
        "rayservice_modles",
        "platform_namespace",
        "platform_confirm_destroy",
        "eks_kubernetes_version",
        "network_nat_mode",
        "rayservice_wait",
        "platform_models_bucket",
        "platform_region",
        "platform_tags.Code",
        "network_vpc_cidr",
        "eks_node_groups[1].max_size",
        "secrets_hugging_face_token",
        "rayservice_name",
        "rayservice_models[0].id",
        "rayservice_models[0].replicas.max",
        "rayservice_models[0].engine.tensor_parallel_size",
        "rayservice_models[0].engine.max_model_len",
        "rayservice_models[1].source",
        "rayservice_models[1].replicas.min",
        "rayservice_models[2].id",
        "AWS credentials",
    }, run.output
    assert 'quotes: "0042"' in run.problems("cloud")["platform_tags.Code"]
    # Another platform's variables are not this cluster's affair; an unknown platform is told, and the rest checked.
    assert "network_vpc_cidr" not in run.problems("own")
    assert "there is no such file" in run.problems("own")["platform_kubeconfig"]
    assert "did you mean aws?" in run.problems("odd")["platform"]
    assert "rayservice_models[2].id" in run.problems("odd")
    for cluster in ("cloud", "own", "odd"):
        for text in run.problems(cluster).values():
            assert re.match(r"\n {5}value .*\n {5}reason .*\n( {13}.*\n)*? {5}cure ", text), text


def test_the_output_is_readable(validate) -> None:  # type: ignore[no-untyped-def]
    run = validate(EVERYTHING_WRONG, "-l", "cloud")
    count = len(run.problems("cloud"))
    assert f"Preflight found {count} problems in cluster cloud, listed above. Nothing has been changed." in run.output
    assert run.output.count("reason ") == count + len(run.problems("cloud", "warning"))
    assert "Traceback" not in run.output
    assert "sesame" not in run.output
    places = re.findall(r"^ +\d+\. (\S+)   \(.*group_vars/all/main.yml:(\d+)\)$", run.output, re.M)
    lines = EVERYTHING_WRONG.splitlines()
    # What is absent is told by the entry that lacks it; what was filled in, by the variable that filled it.
    filled = ["eks_gpu_max_size"]
    elsewhere = {"rayservice_models[1].source": ["qwen"], "eks_node_groups[1].max_size": filled}
    assert len(places) > 10
    for variable, line in places:
        words = re.split(r"[.\[\]]+", variable)
        texts = lines[int(line) - 1]
        assert any(word in texts for word in [*words, *elsewhere.get(variable, ())]), (variable, texts)


def test_nothing_is_changed_and_check_mode_finds_the_same(validate) -> None:  # type: ignore[no-untyped-def]
    first, second = validate(EVERYTHING_WRONG, "-l", "own"), validate(EVERYTHING_WRONG, "-l", "own", "--check")
    assert first.problems("own") == second.problems("own")
    assert "changed=0" in first.output
    assert "changed=0" in second.output


def test_a_sound_cluster_passes_and_warns(validate) -> None:  # type: ignore[no-untyped-def]
    models = "rayservice_models: [{id: small, source: organisation/small, resources: {cpu: 1, memory: 1Gi}}]\n"
    run = validate(models, "-l", "cloud", "-e", '{"preflight_scope": "declared"}')
    assert run.status == 0, run.output
    assert set(run.problems("cloud", "warning")) == {
        "secrets_hugging_face_token",
        "gateway_audit_volume",
    }


def test_every_tag_runs_it(validate) -> None:  # type: ignore[no-untyped-def]
    run = validate("rayservice_nmae: x\n", "-l", "own", "--tags", "rayservice")
    assert "did you mean rayservice_name?" in run.problems("own")["rayservice_nmae"]


def test_one_bad_cluster_stops_all_of_them(validate) -> None:  # type: ignore[no-untyped-def]
    run = validate("", "-l", "odd,own")
    assert set(run.problems("odd")) == {"platform"}
    assert run.status != 0
