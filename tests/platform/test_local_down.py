"""`make destroy` removes what deploy made, `make local-down` leaves the machine as it was, and deploy works again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from .conftest import HOME, NAMESPACE, Runner, aws, our_vpcs

# What only the local platform puts on a machine.
TRACES = (str(HOME / "state"), "/run/rayplane", "/var/lib/kubelet", "/etc/kubernetes")


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


def test_destroy_removes_what_deploy_made(deployed: Path, make: Runner, kubectl: Callable[..., str]) -> None:
    make("destroy").expect_success()
    assert our_vpcs() == []
    assert aws("eks").list_clusters()["clusters"] == []
    assert f"namespace/{NAMESPACE}" not in kubectl("get", "namespaces", "--output", "name").split()
    assert "ray-llm-cluster-local-models" in [bucket["Name"] for bucket in aws("s3").list_buckets()["Buckets"]]
    assert make("destroy").expect_success().changed == 0


def test_down_leaves_nothing_and_deploy_works_again(platform: Path, make: Runner) -> None:
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
    again = make("deploy").expect_success()
    assert "The capital of France is Paris" in again.output
