"""The main path: a plan on an empty platform, a deployment that answers, idle reruns, repairs, failures.

The tests of this file build on one another and run in the order in which they stand here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import yaml

from .conftest import AWS, ENDPOINT, HOME, NAMESPACE, ROOT, Runner, api_key, aws, our_vpcs

MODEL = "smollm2-135m-instruct"
Kubectl = Callable[..., str]
LOCAL = {
    key: value
    for name in ("ray", "gateway")
    for key, value in yaml.safe_load(
        (ROOT / f"inventories/local/group_vars/all/{name}.yml")
        .read_text()
        .replace("{{ local_platform_home }}", str(HOME))
        .replace("{{ platform_region }}", AWS["AWS_REGION"])
    ).items()
}


def ask(prompt: str = "What is the capital of France?", timeout: float = 60) -> str:
    """One deterministic answer of the local model, through the openai package."""
    client = openai.OpenAI(base_url=ENDPOINT, api_key=api_key(), max_retries=0, timeout=timeout)
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=32
    )
    return answer.choices[0].message.content or ""


def seconds_until_answer(limit: float) -> float:
    """How long until the model answers again, in seconds; fails the test after `limit`."""
    start = time.monotonic()
    while True:
        try:
            assert "Paris" in ask(timeout=20)
            return time.monotonic() - start
        except openai.OpenAIError:
            if time.monotonic() - start > limit:
                raise
            time.sleep(2)


def test_plan_of_an_empty_platform_predicts_and_changes_nothing(platform: Path, make: Runner, kubectl: Kubectl) -> None:
    plan = make("plan").expect_success()
    assert plan.changed > 0
    assert "RayService" in plan.output
    assert our_vpcs() == []
    assert f"namespace/{NAMESPACE}" not in kubectl("get", "namespaces", "--output", "name").split()


def test_deploy_goes_on_after_interruptions(platform: Path, make: Runner) -> None:
    """Ctrl-C in five stages, one run after the other; the run after them (the next test) completes the deployment."""
    for step in (
        "network : Reconcile VPC",
        "eks : Reconcile the control plane",
        "kuberay : Apply the operator",
        "models : Bring the models to the bucket",
        "rayservice : Apply the RayService",
    ):
        run = make("deploy", interrupt_at=f"TASK [{step}")
        assert f"TASK [{step}" in run.output
        assert run.returncode != 0


def test_deploy_ends_with_a_real_answer(platform: Path, make: Runner) -> None:
    deploy = make("deploy").expect_success()
    assert len(our_vpcs()) == 1
    nat_filters = [{"Name": "vpc-id", "Values": [str(our_vpcs()[0]["VpcId"])]}]
    gateways = aws("ec2").describe_nat_gateways(Filters=nat_filters)["NatGateways"]
    assert [gateway["State"] for gateway in gateways] == ["available"]
    assert len(aws("ec2").describe_addresses()["Addresses"]) == 1
    assert ENDPOINT in deploy.output
    assert "Paris" in ask()


def test_second_deploy_changes_nothing(deployed: Path, make: Runner) -> None:
    again = make("deploy").expect_success()
    assert again.changed_tasks() == []
    assert again.changed == 0


def test_plan_after_deploy_is_empty(deployed: Path, make: Runner) -> None:
    plan = make("plan").expect_success()
    assert plan.changed_tasks() == []


def test_drift_of_what_was_just_deployed_is_none(deployed: Path, run: Runner, tmp_path: Path) -> None:
    report = run("ansible-playbook", "playbooks/drift.yml", "-i", "inventories/local", "-e", f"drift_dir={tmp_path}")
    report.expect_success()
    assert json.loads((tmp_path / "drift.json").read_text())["status"] == "clean"


def test_the_clouds_storage_classes_are_accepted(deployed: Path, make: Runner) -> None:
    plan = make("plan", "--tags storage_class -e storage_class_enabled=true -e storage_class_efs_enabled=false")
    assert "StorageClass gp3" in plan.expect_success().output


def test_any_openai_client_works(deployed: Path) -> None:
    client = openai.OpenAI(base_url=ENDPOINT, api_key=api_key())
    assert [model.id for model in client.models.list()] == [MODEL]
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=16
    )
    assert chat.choices[0].finish_reason in {"stop", "length"}
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    sampled = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say hello."}],
        temperature=0.8,
        top_p=0.9,
        logprobs=True,
        max_tokens=16,
    )
    assert sampled.choices[0].logprobs is not None
    completion = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=8)
    assert "5" in completion.choices[0].text
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
        )
        if chunk.choices
    ]
    assert len(pieces) > 1
    assert "".join(pieces) == ask()


def test_curl_reads_the_same_answer(deployed: Path) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{ENDPOINT}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {api_key()}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"]


def test_unknown_model_gets_an_openai_error(deployed: Path) -> None:
    client = openai.OpenAI(base_url=ENDPOINT, api_key=api_key(), max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="absent", messages=[{"role": "user", "content": "hello"}])


def test_nothing_listens_beyond_this_machine(deployed: Path) -> None:
    """The API of the models and the AWS endpoint are on loopback and the platform's own address only."""
    sockets = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
    wide = [
        line.split()[3]
        for line in sockets.splitlines()
        if line.split()[3].startswith(("0.0.0.0:4566", "*:4566", "0.0.0.0:30080"))
    ]
    assert wide == []


def test_manual_changes_are_repaired_and_named(deployed: Path, make: Runner, kubectl: Kubectl) -> None:
    ec2 = aws("ec2")
    subnet = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [str(our_vpcs()[0]["VpcId"])]}])["Subnets"][0]
    ec2.delete_tags(Resources=[subnet["SubnetId"]], Tags=[{"Key": "Environment"}])
    service = json.loads(kubectl("get", "rayservice", "rayplane", "-n", NAMESPACE, "-o", "json"))
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    patch = [
        {
            "op": "replace",
            "path": "/spec/rayClusterConfig/workerGroupSpecs/0/maxReplicas",
            "value": int(group["maxReplicas"]) + 1,
        }
    ]
    kubectl("patch", "rayservice", "rayplane", "-n", NAMESPACE, "--type=json", "-p", json.dumps(patch))
    repair = make("deploy", "--diff").expect_success()
    names = repair.changed_tasks()
    assert any(name.startswith("network") for name in names)
    assert any(name.startswith("rayservice") for name in names)
    assert not [name for name in names if not name.startswith(("network", "rayservice"))]
    assert "maxReplicas" in repair.output
    assert make("deploy").expect_success().changed == 0


def test_worker_pod_killed_comes_back(deployed: Path, kubectl: Kubectl) -> None:
    kubectl("delete", "pod", "-n", NAMESPACE, "-l", "ray.io/node-type=worker", "--grace-period=0", "--force")
    assert seconds_until_answer(420) < 420


def test_kubelet_killed_comes_back(deployed: Path, kubectl: Kubectl) -> None:
    kill("kubelet")
    assert seconds_until_answer(120) < 120


def supervised(program: str) -> int:
    """The process id of a program that the local platform's supervisor keeps running; 0 while it does not run."""
    supervisor = (HOME / "state/supervisor/supervisord.pid").read_text().strip()
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        if program in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    return 0


def kill(program: str) -> None:
    """End a supervised program the hard way, and wait until the supervisor has started it again."""
    pid = supervised(program)
    assert pid > 1
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while supervised(program) in (0, pid):
        assert time.monotonic() < deadline, f"{program} was not restarted"
        time.sleep(0.5)


def test_aws_endpoint_killed_loses_nothing(deployed: Path, make: Runner) -> None:
    before = our_vpcs()[0]["VpcId"]
    kill("emulator.py")
    again = make("deploy").expect_success()
    assert our_vpcs()[0]["VpcId"] == before
    assert again.changed_tasks() == []


@pytest.mark.parametrize("scenario", ["aws", "kubernetes"])
def test_molecule(deployed: Path, run: Runner, scenario: str) -> None:
    environment = {**AWS, "K8S_AUTH_KUBECONFIG": str(deployed)}
    run("molecule", "test", "--scenario-name", scenario, env=environment).expect_success()


def existing(models: list[dict[str, object]]) -> str:
    """Arguments that give inventories/existing what this machine has: local addresses and small sizes."""
    values = {
        "kuberay_kustomize_source": str(HOME / "sources/kuberay/config/default"),
        "kuberay_kubectl": str(HOME / "bin/kubectl"),
        "verify_kubectl": str(HOME / "bin/kubectl"),
        "platform_namespace": "rayplane-existing",
        "platform_models_bucket": "ray-llm-cluster-local-models",
        "namespaces_pod_security": "privileged",
        "secrets_aws_access_key_id": "test",
        "secrets_aws_secret_access_key": "test",
        "rayservice_name": "existing",
        **{key: value for key, value in LOCAL.items() if key.startswith(("rayservice_", "gateway_"))},
        "gateway_service_type": "ClusterIP",
        "gateway_node_port": 0,
        # Nobody gets a key: verify asks with the playbooks' own.
        "gateway_keys_file": "",
        "gateway_first_key_file": "",
        "gateway_pod_annotations": {},
        "rayservice_models": models,
    }
    return f"-e '{json.dumps(values)}'"


def test_existing_cluster_is_served_and_a_removed_model_goes(deployed: Path, make: Runner, kubectl: Kubectl) -> None:
    """inventories/existing needs a kubeconfig; two models share a Ray cluster, and one of them leaves."""
    environment = {**AWS, "KUBECONFIG": str(deployed)}
    first, second = ({**LOCAL["rayservice_models"][0], "id": name} for name in ("first", "second"))
    both = make("deploy", existing([first, second]), "inventories/existing", environment).expect_success()
    assert both.output.count("The capital of France is Paris") >= 2

    def replicas() -> dict[str, str]:
        """The applications of the RayService and when each last changed."""
        status = json.loads(kubectl("get", "rayservice", "existing", "-n", "rayplane-existing", "-o", "json"))["status"]
        return {
            name: str(application) for name, application in status["activeServiceStatus"]["applicationStatuses"].items()
        }

    assert set(replicas()) == {"first", "second"}
    pods = kubectl("get", "pods", "-n", "rayplane-existing", "-o", "name")
    one = make("deploy", existing([{**first, "route_prefix": "/first"}]), "inventories/existing", environment)
    one.expect_success()
    deadline = time.monotonic() + 120
    while set(replicas()) != {"first"}:
        assert time.monotonic() < deadline, "the removed model's application stayed"
        time.sleep(2)
    assert kubectl("get", "pods", "-n", "rayplane-existing", "-o", "name") == pods
    arguments = existing([first]) + " -e destroy_confirm=existing -e kuberay_existing_operator=use"
    make("destroy", arguments, "inventories/existing", environment).expect_success()
    assert "Paris" in ask()
