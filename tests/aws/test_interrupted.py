"""A deployment that is killed again and again, each time a few changing calls further on, and in the end completes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .account import Account
from .conftest import ROOT, Run, finish, start
from .faults import Call, Proxy

# Changing calls between two interruptions; a stage has more of them, so every stage is interrupted.
STEP = 9
ROLES = ["encryption", "network", "storage", "eks"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a playbook of the cloud's roles, and an inventory of one small cluster with everything on."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "group_vars" / "all").mkdir(parents=True)
    (folder / "group_vars" / "all" / "00_shared.yml").symlink_to(ROOT / "group_vars" / "shared.yml")
    variables = {
        "platform": "aws",
        "platform_cluster_name": "interrupted",
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "encryption_enabled": True,
        "network_availability_zones": ["us-west-2a", "us-west-2b"],
        "network_nat_mode": "per_zone",
        "network_interface_endpoints": ["sts"],
    }
    (folder / "hosts").write_text(yaml.safe_dump({"clusters": {"hosts": {"interrupted": variables}}}))
    play = {
        "name": "Build the cloud",
        "hosts": "clusters",
        "gather_facts": False,
        "environment": "{{ platform_module_environment }}",
        "roles": ROLES,
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    return folder


class Interruption:
    """Ends a run at its n-th changing call, before the call is carried out or before it is answered."""

    def __init__(self, account: str, at: int, number: signal.Signals, after: bool) -> None:
        self.account, self.left, self.number, self.after = account, at, number, after
        self.group = 0
        self.met = ""

    def __call__(self, call: Call, after: bool) -> None:
        """Look at a call."""
        if call.account == self.account and call.writes and after == self.after and not self.met and self.group:
            self.left -= 1
            if self.left == 0:
                self.met = str(call)
                os.killpg(self.group, self.number)


def test_an_interrupted_deployment_is_continued(
    stack: Path, home: Path, proxy: Proxy, new_account: Callable[[], Account]
) -> None:
    def deploy(account: Account, interruption: Interruption | None = None) -> Run:
        # Bucket names are shared by all accounts.
        variables = {**account.environment, "platform_cluster_name": f"cut-{account.number}"}
        process = start(home, str(stack / "play.yml"), "-i", str(stack / "hosts"), variables=variables)
        if interruption is not None:
            interruption.group = process.pid
        return finish(process)

    whole, cut = new_account(), new_account()
    deploy(whole).succeeded("interrupted")
    met: list[str] = []
    for turn in range(40):
        # Killed outright and by Ctrl-C, and with the call carried out or not, in turn.
        number = signal.SIGKILL if turn % 4 < 2 else signal.SIGINT
        interruption = Interruption(cut.number, STEP + turn % 3, number, after=bool(turn % 2))
        proxy.watch = interruption
        run = deploy(cut, interruption)
        proxy.watch = None
        if not interruption.met:
            run.succeeded("interrupted")
            break
        assert run.returncode != 0
        met.append(interruption.met)
    assert {call.partition(":")[0] for call in met} >= {"ec2", "s3", "eks"}, met
    assert len(met) >= 6, met
    again = deploy(cut).succeeded("interrupted")
    assert again.actions("interrupted") == [] and again.changed("interrupted") == 0
    assert cut.counts() == whole.counts(), met
