"""A deployment that is ended again and again, in every stage, and in the end completes as one that never was."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .account import Account
from .conftest import Playbook, finish, start
from .faults import Proxy, Rule

ROLES = ["encryption", "network", "storage", "eks"]
#: The calls at which a run is ended, in the order of the deployment. Of every stage one before the call is carried out
#: and one after, and one by Ctrl-C and one by the hard way.
CUTS: list[tuple[str, str, str, signal.Signals]] = [
    ("kms", "CreateKey", "cut after", signal.SIGKILL),
    ("kms", "CreateAlias", "cut", signal.SIGINT),
    ("ec2", "AllocateAddress", "cut after", signal.SIGINT),
    ("ec2", "AssociateRouteTable", "cut", signal.SIGKILL),
    ("s3", "CreateBucket", "cut after", signal.SIGKILL),
    ("s3", "PutBucketPolicy", "cut", signal.SIGINT),
    ("iam", "CreateRole", "cut", signal.SIGKILL),
    ("eks", "CreateCluster", "cut after", signal.SIGINT),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a playbook of the cloud's roles and the variables of a small cluster with everything on."""
    folder = tmp_path_factory.mktemp("interrupted")
    play = {
        "name": "Build the cloud",
        "hosts": "clusters",
        "gather_facts": False,
        "environment": "{{ platform_module_environment }}",
        "roles": ["platform", *ROLES],
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    return folder


def inventory(accounts: dict[str, Account]) -> dict[str, Any]:
    """A small cluster an account."""
    variables = {
        "platform": "aws",
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "encryption_enabled": True,
        "network_availability_zones": ["us-west-2a", "us-west-2b"],
        "network_nat_mode": "per_zone",
        "network_interface_endpoints": ["sts"],
    }
    hosts = {name: {**one.environment, "platform_cluster_name": f"rp-{name}"} for name, one in accounts.items()}
    return {"clusters": {"hosts": hosts, "vars": variables}}


def processes(home: Path) -> Iterator[str]:
    """What runs with this home folder."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"HOME={home}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                yield f"{entry.name} {(entry / 'cmdline').read_bytes().decode().replace(chr(0), ' ')}"
        except OSError:
            continue


def wait_until_ended(home: Path) -> None:
    """Wait for the end of all processes of a run, those that Ansible gave a session of their own among them."""
    end = time.monotonic() + 120
    while left := list(processes(home)):
        assert time.monotonic() < end, f"waited 120 s for the end of the run's processes; left: {left}"
        time.sleep(0.05)


def test_an_interrupted_deployment_is_continued(
    stack: Path, playbook: Playbook, tmp_path: Path, proxy: Proxy, new_account: Callable[[], Account]
) -> None:
    cut, whole = new_account(), new_account()
    (stack / "hosts").write_text(yaml.safe_dump(inventory({"cut": cut, "whole": whole})))
    deploy = (str(stack / "play.yml"), "-i", str(stack / "hosts"))
    for service, operation, fault, number in CUTS:
        rule = Rule(service, operation, fault, account=cut.number)  # type: ignore[arg-type]
        proxy.rules.append(rule)
        process = start(tmp_path, *deploy, "--limit", "cut")
        while cut.number not in proxy.silent and process.poll() is None:
            time.sleep(0.02)
        # As a terminal and as the kernel do it: Ansible's own processes for tasks get no signal by this.
        if process.poll() is None:
            os.killpg(process.pid, number)
        # One that is interrupted while it hands its result over keeps Ansible waiting for good: Ctrl-C once more.
        again = threading.Timer(60, os.killpg, (process.pid, number))
        again.start()
        try:
            run = finish(process)
        finally:
            again.cancel()
        wait_until_ended(tmp_path)
        proxy.rules.remove(rule)
        assert cut.number in proxy.silent, f"{service}:{operation} was never called: {run.text[-3000:]}"
        proxy.silent.clear()
        assert run.returncode != 0
    playbook(*deploy).succeeded("cut", "whole")
    again = playbook(*deploy).succeeded("cut", "whole")
    assert {host: again.actions(host) for host in ("cut", "whole")} == {"cut": [], "whole": []}
    assert (again.changed("cut"), again.changed("whole")) == (0, 0)
    assert cut.counts() == whole.counts()
