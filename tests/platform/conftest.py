"""Fixtures of the tests that need a real platform: they bring up the local one, deploy, break, and take it down.

Files run in the order of their names, and each finds what those before it left: everything is deployed once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import openai
import pytest
from rayplane_local import parts, stages
from rayplane_local.progress import Step
from rayplane_local.settings import Settings

from .control_plane import control_plane

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache/rayplane")
ENDPOINT = "http://127.0.0.1:30080/v1"
AWS = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:4566",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-west-2",
    "AWS_DEFAULT_REGION": "us-west-2",
}
NAMESPACE = "rayplane"
MODEL = "smollm2-135m-instruct"
#: What deploy issues where no key is known yet.
KEY_FILE = HOME / "state/gateway-key"
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give these tests the time they need, and skip, by name, what only root can do."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(2400))
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="the local platform needs root"))


def api_key() -> str:
    """The API key of the local platform."""
    return KEY_FILE.read_text(encoding="utf-8").strip()


def aws(service: str):  # type: ignore[no-untyped-def]
    """A boto3 client of the local AWS endpoint."""
    return boto3.client(
        service,
        endpoint_url=AWS["AWS_ENDPOINT_URL"],
        region_name=AWS["AWS_REGION"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def our_vpcs() -> list[dict[str, object]]:
    """The VPCs of the local cluster."""
    filters = [{"Name": "tag:Cluster", "Values": ["ray-llm-cluster-local"]}]
    return list(aws("ec2").describe_vpcs(Filters=filters)["Vpcs"])


@dataclass(frozen=True)
class Run:
    """One finished command: its exit status, everything it printed, and its wall time in seconds."""

    returncode: int
    output: str
    seconds: float

    @property
    def changed(self) -> int:
        """The sum of `changed` over the hosts of the recap."""
        return sum(int(row[2]) for row in RECAP.findall(self.output))

    @property
    def failed(self) -> int:
        """The sum of `failed` and `unreachable` over the hosts of the recap."""
        return sum(int(row[3]) + int(row[4]) for row in RECAP.findall(self.output))

    def changed_tasks(self) -> list[str]:
        """The names of the tasks that reported a change, as the terminal shows them."""
        names: list[str] = []
        task = ""
        for line in self.output.splitlines():
            if match := re.match(r"TASK \[(.*?)\] \**", line):
                task = match.group(1)
            elif line.startswith("changed:"):
                names.append(task)
        return names

    def expect_success(self) -> Run:
        """Fail the test, with the end of the output, unless the command succeeded."""
        assert self.returncode == 0, f"exit status {self.returncode} after {self.seconds:.0f} s\n{self.output[-6000:]}"
        return self


Runner = Callable[..., Run]


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Runner:
    """Run a command in the project's folder; what it prints is shown as it comes: a long step is seen to move."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def _run(*command: str, env: dict[str, str] | None = None, timeout: float = 2400, interrupt_at: str = "") -> Run:
        """`interrupt_at`: press Ctrl-C when a line of the output contains this text, and again if that does not do."""
        start = time.monotonic()
        lines: list[str] = []
        with capture.global_and_fixture_disabled():
            sys.stdout.write(f"\n$ {' '.join(command)}\n")
            process = subprocess.Popen(
                # A shell's background jobs ignore Ctrl-C, and what they start would inherit that.
                ["env", "--default-signal=INT", *command],
                cwd=ROOT,
                env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            # A task's process that is interrupted while it hands its result over keeps Ansible waiting for good.
            again = threading.Timer(60, os.killpg, (process.pid, signal.SIGINT))
            try:
                with process.stdout as output:
                    for line in output:
                        lines.append(line)
                        sys.stdout.write(f"  | {line}")
                        sys.stdout.flush()
                        if interrupt_at and interrupt_at in line:
                            time.sleep(0.5)  # inside the step that the line announces
                            os.killpg(process.pid, signal.SIGINT)
                            again.start()
                            interrupt_at = ""
                        if time.monotonic() - start > timeout:
                            os.killpg(process.pid, signal.SIGKILL)
                returncode = process.wait()
            finally:
                again.cancel()
                if process.poll() is None:  # the tests were interrupted
                    os.killpg(process.pid, signal.SIGINT)
                    process.wait(30)
        return Run(returncode, "".join(lines), time.monotonic() - start)

    return _run


@pytest.fixture(scope="session")
def make(run: Runner) -> Runner:
    """Run one of the README's commands, with arguments for ansible-playbook and another inventory where given."""

    def _make(
        target: str,
        arguments: str = "",
        inventory: str = "",
        env: dict[str, str] | None = None,
        interrupt_at: str = "",
    ) -> Run:
        settings = [f"ARGS={arguments}"] if arguments else []
        settings += [f"INVENTORY={inventory}"] if inventory else []
        return run("make", "--no-print-directory", target, *settings, env=env, interrupt_at=interrupt_at)

    return _make


def go_module(module: str, folder: Path) -> tuple[Path, str]:
    """Fetch the sources of a Go module (`path@version`) below a folder; return where they are, and what Go said."""
    go = parts.ensure_go(Settings(home=HOME), Step("go toolchain"))
    answer = subprocess.run(
        [str(go), "mod", "download", "-modcacherw", "-json", module],
        env={**os.environ, "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOPATH": str(folder), "GOMODCACHE": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Path(json.loads(answer.stdout or "{}").get("Dir", "")), answer.stderr + answer.stdout


@pytest.fixture(scope="session")
def platform(run: Runner, make: Runner) -> Iterator[Path]:
    """A fresh local platform with nothing deployed; yields its kubeconfig. What was deployed there before is gone."""
    make("local-down").expect_success()
    run("ansible-playbook", "playbooks/local_up.yml").expect_success()
    yield HOME / "state/kubeconfig"
    make("local-down").expect_success()


@pytest.fixture(scope="session")
def deployed(platform: Path, make: Runner) -> Path:
    """The local platform with everything that the local inventory declares; yields its kubeconfig."""
    if not answers():
        make("deploy").expect_success()
    return platform


def answers() -> bool:
    """Whether the gateway answers: this session's tests have deployed it."""
    if not KEY_FILE.is_file():
        return False
    try:
        return bool(openai.OpenAI(base_url=ENDPOINT, api_key=api_key(), max_retries=0, timeout=10).models.list().data)
    except openai.OpenAIError:
        return False


def ask(key: str = "", timeout: float = 60, **more: object) -> str:
    """One deterministic answer of the local model, through the openai package."""
    client = openai.OpenAI(base_url=ENDPOINT, api_key=key or api_key(), max_retries=0, timeout=timeout)
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        **{"model": MODEL, "temperature": 0, "max_tokens": 32, **more},
    )
    return str(answer.choices[0].message.content)


def wait_until(what: str, missing: Callable[[], str], seconds: float, pause: float = 0.5) -> None:
    """Wait until `missing` returns nothing; after that many seconds the test fails with what it said last."""
    end = time.monotonic() + seconds
    while said := missing():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s; {said}"
        time.sleep(pause)


def no_answer() -> str:
    """Why the model does not answer; empty when it does."""
    try:
        said = ask(timeout=20)
    except openai.OpenAIError as error:
        return repr(error)
    return "" if "Paris" in said else f"it answered {said!r}"


Kubectl = Callable[..., str]


def kubectl_on(kubeconfig: Path) -> Kubectl:
    """Return what calls kubectl on a cluster and returns what it printed."""

    def call(*arguments: str) -> str:
        command = [str(HOME / "bin/kubectl"), "--kubeconfig", str(kubeconfig), *arguments]
        finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return call


@pytest.fixture(scope="session")
def kubectl() -> Kubectl:
    """Call kubectl on the local cluster."""
    return kubectl_on(HOME / "state/kubeconfig")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An API server without a node, empty; yields its kubeconfig. For objects that nothing here would run anyway."""
    settings = Settings(home=HOME)
    for name in ("packages", "artefacts"):
        stages.stage(name).apply(settings, print)
    names = ("etcd", "kube-apiserver", "kube-controller-manager")
    programs = {name: parts.program(settings, name) for name in names}
    with control_plane(programs, tmp_path_factory.mktemp("api")) as kubeconfig:
        yield kubeconfig
