"""The main path: a plan on an empty platform, a deployment that answers, repairs, failures.

The tests of this file build on one another and run in the order in which they stand here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import openai
import pytest

from .conftest import (
    ENDPOINT,
    HOME,
    MODEL,
    NAMESPACE,
    Kubectl,
    Runner,
    api_key,
    ask,
    aws,
    no_answer,
    our_vpcs,
    wait_until,
)

#: What only the local platform puts on a machine.
TRACES = (str(HOME / "state"), "/run/rayplane", "/var/lib/kubelet", "/etc/kubernetes")


def test_plan_of_an_empty_platform_predicts_and_changes_nothing(platform: Path, make: Runner, kubectl: Kubectl) -> None:
    plan = make("plan").expect_success()
    assert plan.changed > 0
    assert "RayService" in plan.output
    assert our_vpcs() == []
    assert f"namespace/{NAMESPACE}" not in kubectl("get", "namespaces", "--output", "name").split()


def processes() -> list[str]:
    """Command lines of the platform's processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if any(trace in line for trace in TRACES):
            found.append(line)
    return found


def mounts() -> list[str]:
    """Mount points of the platform."""
    return [line for line in Path("/proc/mounts").read_text().splitlines() if any(trace in line for trace in TRACES)]


def interfaces() -> list[str]:
    """Network interfaces of the platform and its pods."""
    lines = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split(": ")[1].partition("@")[0] for line in lines]
    return [name for name in names if name.startswith(("rayplane", "cni", "veth"))]


def firewall_rules() -> list[str]:
    """Firewall rules and chains of the platform, Kubernetes and CNI."""
    rules = []
    for command in ("iptables-save", "ip6tables-save"):
        output = subprocess.run([command], capture_output=True, text=True, check=False).stdout
        rules += [line for line in output.splitlines() if any(word in line for word in ("KUBE-", "CNI-", "RAYPLANE"))]
    return rules


def test_down_leaves_the_machine_as_it_was(platform: Path, make: Runner) -> None:
    """What comes after it deploys on a platform that was down."""
    assert processes()
    assert mounts()
    assert interfaces()
    assert firewall_rules()
    make("local-down").expect_success()
    assert processes() == []
    assert mounts() == []
    assert interfaces() == []
    assert firewall_rules() == []
    assert [trace for trace in TRACES if Path(trace).exists()] == []
    assert make("local-down").expect_success().changed == 0
    plan = make("plan").expect_success()
    assert "is not up, so the plan ends" in " ".join(plan.output.split())
    assert processes() == []


@pytest.mark.parametrize(
    "step", ["kuberay : Apply the operator", "models : Bring the models", "rayservice : Apply the RayService"]
)
def test_deploy_is_interrupted(platform: Path, make: Runner, step: str) -> None:
    """Ctrl-C in a stage that needs a cluster; the next run goes on, and the last (below) completes the deployment."""
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
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == ask()
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="absent", messages=[{"role": "user", "content": "hello"}])


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


def supervised(program: str) -> int:
    """The process id of a program that the local platform's supervisor keeps running; 0 while it does not run."""
    supervisor = (HOME / "state/supervisor/supervisord.pid").read_text().strip()
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        try:
            if program in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        except OSError:  # it ended meanwhile
            continue
    return 0


def test_what_is_killed_comes_back(deployed: Path, kubectl: Kubectl) -> None:
    """A worker pod, the kubelet and the AWS endpoint at once; that nothing was lost is seen by the idle rerun."""
    vpcs = our_vpcs()
    workers = ("-n", NAMESPACE, "-l", "ray.io/node-type=worker")
    before = set(kubectl("get", "pods", *workers, "-o", "name").split())
    kubectl("delete", "pods", *workers, "--grace-period=0", "--force")
    killed = {program: supervised(program) for program in ("kubelet", "emulator.py")}
    for program, pid in killed.items():
        assert pid > 1, program
        os.kill(pid, signal.SIGKILL)

    def not_restarted() -> str:
        return ", ".join(program for program, pid in killed.items() if supervised(program) in (0, pid))

    def no_new_worker() -> str:
        rows = "jsonpath={range .items[*]}pod/{.metadata.name} {.status.containerStatuses[*].ready}{'\\n'}{end}"
        pods = kubectl("--request-timeout=10s", "get", "pods", *workers, "-o", rows).splitlines()
        return "" if any(row.endswith("true") and row.split()[0] not in before for row in pods) else str(pods)

    wait_until("the supervisor restarts what was killed", not_restarted, 120)
    wait_until("another worker is ready", no_new_worker, 600, pause=2)
    wait_until("the model answers again", no_answer, 600, pause=2)
    assert our_vpcs() == vpcs
