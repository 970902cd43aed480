"""Fixtures of the tests that need the AWS emulator, and neither Kubernetes nor root."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rayplane_local.shell import DIE_WITH_PARENT

from .account import Account
from .deployer import permits
from .faults import Call, Proxy

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache/rayplane")
TOOLS = ROOT / "tools" / "rayplane_local"

# Bounds of a run and of a test with the runs of its fixtures, in seconds: a run takes half a minute on an idle machine.
RUN_LIMIT = 600
TEST_LIMIT = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give these tests the time they need, with the making of the services' environment on a bare machine."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(TEST_LIMIT))


@pytest.fixture(scope="session")
def services() -> Path:
    """The environment of the platform's services, as the platform makes it; returns its Python."""
    from rayplane_local import python_env
    from rayplane_local.progress import Step
    from rayplane_local.settings import Settings

    settings = Settings(home=HOME)
    folder = python_env.folder(settings, "services")
    if not folder.is_dir():
        settings.build_logs.mkdir(parents=True, exist_ok=True)
        python_env.make(settings, "services", Step("services"))
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def emulator(services: Path) -> Iterator[int]:
    """An AWS emulator of the session's own, empty and without persistence; yields its port."""
    # The emulator is handed the socket: a free port might be taken by another program before it listens.
    listener = socket.create_server(("127.0.0.1", 0))
    port = int(listener.getsockname()[1])
    # Its own folder, and not pytest's: nothing but the emulator writes there while it ends.
    folder = Path(tempfile.mkdtemp(prefix="rayplane-emulator-"))
    for name in ("tmp", "services", "buckets"):
        (folder / name).mkdir()
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "GATEWAY_PORT": str(port),
        "MINISTACK_REGION": "us-west-2",
        "PERSIST_STATE": "0",
        "STATE_DIR": str(folder / "services"),
        "S3_PERSIST": "0",
        "S3_DATA_DIR": str(folder / "buckets"),
        "TMPDIR": str(folder / "tmp"),
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
        "LOG_LEVEL": "WARNING",
    }
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*DIE_WITH_PARENT, services, "-B", "emulator.py", f"fd://{listener.fileno()}"],
            cwd=TOOLS,
            env=environment,
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    listener.close()
    try:
        _wait_until_it_answers(process, port, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + 180
    while True:
        try:
            with opener.open(f"http://127.0.0.1:{port}/_ministack/health", timeout=5):
                return
        except (OSError, urllib.error.URLError) as error:
            stage = f"the emulator does not answer on port {port} (exit status {process.poll()}): {error}"
            assert process.poll() is None and time.monotonic() < end, f"{stage}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def proxy(emulator: int) -> Iterator[Proxy]:
    """The emulator with faults in front of it."""
    with Proxy(emulator) as one:
        yield one


_numbers = itertools.count(200000000001)


@pytest.fixture
def account(proxy: Proxy) -> Account:
    """An empty account of the test's own, behind the proxy."""
    return Account(str(next(_numbers)), proxy.url)


@pytest.fixture(scope="session")
def new_account(proxy: Proxy) -> Callable[[], Account]:
    """Make empty accounts."""
    return lambda: Account(str(next(_numbers)), proxy.url)


@dataclass
class Run:
    """A finished run of ansible-playbook."""

    returncode: int
    text: str
    report: dict[str, Any] = field(default_factory=dict)
    #: The AWS calls made meanwhile, by anybody.
    calls: list[Call] = field(default_factory=list)

    def results(self, host: str, task: str | tuple[str, ...] = "") -> Iterator[dict[str, Any]]:
        """Return the results of a host's tasks, in order; what ran in check mode to look ids up is left out.

        With `task`, only of those whose name begins so, or in one of these ways.
        """
        for play in self.report.get("plays", ()):
            for one in play["tasks"]:
                name = one["task"]["name"]
                if host in one["hosts"] and name.startswith(task) and not name.endswith("Look the network up"):
                    yield one["hosts"][host]

    def actions(self, host: str, task: str | tuple[str, ...] = "") -> list[str]:
        """Return what the modules did, or would do, on a host, in order."""
        return [action for result in self.results(host, task) for action in result.get("actions", ())]

    def failure(self, host: str) -> str:
        """Return why a host failed; empty where it did not."""
        return next((str(one.get("msg", one)) for one in self.results(host) if one.get("failed")), "")

    def changed(self, host: str) -> int:
        """Return the number of changed tasks of a host."""
        return int(self.report["stats"][host]["changed"])

    def succeeded(self, *hosts: str) -> Run:
        """Fail the test, saying why, unless the run (and so every host) succeeded."""
        told = {host: self.failure(host) for host in self.report.get("stats", {})}
        # Preflight's report stands in the text.
        text = self.text[: max(0, self.text.find("{\n"))] or self.text[-5000:]
        assert self.returncode == 0, json.dumps({k: v for k, v in told.items() if v}, indent=1) + text
        assert set(hosts) <= set(told), (hosts, sorted(told))
        return self


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a run: nothing of the user's AWS or Kubernetes settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "K8S_", "KUBECONFIG"))}
    return {
        **kept,
        "HOME": str(folder),
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_LOCAL_TEMP": str(folder / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


Playbook = Callable[..., Run]


def start(folder: Path, *arguments: str, variables: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """Start ansible-playbook as the leader of a process group."""
    folder.mkdir(parents=True, exist_ok=True)
    given = ["-e", json.dumps(variables)] if variables else []
    return subprocess.Popen(
        [*DIE_WITH_PARENT, "env", "--default-signal=INT", "ansible-playbook", *arguments, *given],
        cwd=ROOT,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> Run:
    """Wait for a run and read its report."""
    try:
        text, _ = process.communicate(timeout=RUN_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        pytest.fail(f"`{shlex.join(map(str, process.args))}` did not end within {RUN_LIMIT} s:\n{text[-3000:]}")  # type: ignore[arg-type]
    begin = text.find("{\n")
    try:
        report = json.JSONDecoder().raw_decode(text[begin:])[0] if begin >= 0 else {}
    except json.JSONDecodeError:
        report = {}
    return Run(process.returncode, text, report)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of the runs' own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def playbook(home: Path, proxy: Proxy) -> Playbook:
    """Run ansible-playbook: `playbook("playbooks/deploy.yml", "-i", ..., variables={...})`.

    Whatever it runs, the deployer's policy must allow all of its calls.
    """

    def run(*arguments: str, variables: dict[str, Any] | None = None) -> Run:
        begin = len(proxy.calls)
        done = finish(start(home, *arguments, variables=variables))
        done.calls = proxy.calls[begin:]
        denied = {str(call) for call in done.calls if not permits(call)}
        assert not denied, f"docs/deployer-policy does not allow {sorted(denied)}"
        return done

    return run


HOSTS = ["ray-llm-dev", "ray-llm-staging", "ray-llm-prod"]
INVENTORY = ("-i", "inventories/fleet")
# Upstream's kustomization and the hub are out of reach here.
PLAN = (
    "playbooks/deploy.yml",
    *INVENTORY,
    "--check",
    "--diff",
    "--skip-tags",
    "kuberay,models,rayservice,verify,monitoring",
)
#: The stages that need nothing but AWS.
CLOUD = ("playbooks/deploy.yml", *INVENTORY, "--tags", "encryption,network,storage,eks")


#: Somebody who may use the clusters; the inventories name nobody.
OPERATORS = "arn:aws:iam::111122223333:role/operators"
ENTRIES = [{"principal_arn": OPERATORS, "policies": [{"policy": "AmazonEKSClusterAdminPolicy"}]}]


@dataclass
class Fleet:
    """Development, staging and production in one account, and the runs that made them."""

    account: Account
    plan: Run
    #: What the account held after the plan, and before the first run.
    planned: dict[str, list[str]]
    first: Run
    #: What it held after the first run.
    counts: Counter[str]

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of every run on the fleet."""
        return {**self.account.environment, "eks_access_entries": ENTRIES}


@pytest.fixture(scope="session")
def fleet(new_account: Callable[[], Account], playbook: Playbook) -> Fleet:
    """The three environments, planned and built in one account. Who changes something repairs it."""
    account = new_account()
    variables = {**account.environment, "eks_access_entries": ENTRIES}
    plan = playbook(*PLAN, variables=variables).succeeded(*HOSTS)
    planned = account.sweep()
    first = playbook(*CLOUD, variables=variables).succeeded(*HOSTS)
    return Fleet(account, plan, planned, first, account.counts())
