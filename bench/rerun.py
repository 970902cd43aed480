"""A rerun with nothing to do, side by side with `terraform plan` on the same resources and emulator.

    make bench                              the local inventory's network, buckets and cluster
    bench/rerun.py --inventory inventories/prod --pairs 11

Starts an AWS emulator of its own, lets our playbook fill one account of it, writes Terraform's configuration of the
same resources (terraform_twin.py) and applies it to a second account. Then it times, in interleaved pairs, our playbook
again (`changed=0` is checked), the same with `--check`, and `terraform plan` ("No changes" is checked); and says where
the time goes. Without Terraform or its AWS provider ours is measured alone.

The provider is taken from TERRAFORM_PLUGIN_DIR (a filesystem mirror), or from the folders that Terraform looks in by
itself; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT / "tools"), str(PROJECT / "bench")]

import reporting
from rayplane_local import python_env
from rayplane_local.settings import Settings
from reporting import BenchError
from terraform_twin import Account, Twin, kinds

OURS, THEIRS = "000000000701", "000000000702"
FIRST_RUN_SECONDS = 600
RUN_SECONDS = 180
PROVIDER = "registry.terraform.io/hashicorp/aws"


@dataclasses.dataclass
class Timed:
    """Wall times of one command, in seconds."""

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)

    def row(self) -> str:
        """Its line of the table."""
        low, middle, high = min(self.seconds), statistics.median(self.seconds), max(self.seconds)
        return f"| {self.name} | {low:.2f} s | {middle:.2f} s | {high:.2f} s |"


def run(command: Sequence[str | Path], env: Mapping[str, str], cwd: Path, limit: float) -> tuple[int, str, float]:
    """Run a command to its end: exit status, output, seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
    )
    return done.returncode, done.stdout, time.perf_counter() - began


# --- the emulator ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def emulator(folder: Path, region: str) -> Iterator[str]:
    """An AWS emulator with nothing in it, as the local platform runs it; ends with the block. Yields its address."""
    home = Path(os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache" / "rayplane")
    python = python_env.folder(Settings(home=home), "services") / "bin" / "python"
    if not python.is_file():
        raise BenchError(f"{python} is not there: `make deploy` brings the emulator's environment.")
    address = f"127.0.0.1:{free_port()}"
    folders = {name: folder / name for name in ("services", "buckets", "tmp")}
    for path in folders.values():
        path.mkdir(parents=True)
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folders["tmp"]),
        "GATEWAY_PORT": address.rpartition(":")[2],
        "MINISTACK_REGION": region,
        "PERSIST_STATE": "0",
        "STATE_DIR": str(folders["services"]),
        "S3_PERSIST": "0",
        "S3_DATA_DIR": str(folders["buckets"]),
    }
    with (folder / "emulator.log").open("wb") as log:
        process = subprocess.Popen(
            [python, "-B", "emulator.py", address],
            cwd=PROJECT / "tools" / "rayplane_local",
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(f"http://{address}/_ministack/health", process, folder / "emulator.log")
        yield f"http://{address}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the emulator answers, at most a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own address
            return
        time.sleep(0.2)
    raise BenchError(f"the emulator does not answer:\n{log.read_text(errors='replace')[-2000:]}")


# --- API calls -------------------------------------------------------------------------------------------------------


class Counting(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the emulator and counts them by service and action."""

    protocol_version = "HTTP/1.1"
    target = ""
    calls: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def handle_any(self) -> None:
        """One request: its name, its way, its answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        service = re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/", self.headers.get("Authorization", ""))
        action = re.search(rb"(?:^|&)Action=(\w+)", body)
        what = action[1].decode() if action else self.headers.get("X-Amz-Target", "").rpartition(".")[2]
        name = f"{service[1] if service else '?'} {what or self.command + ' ' + shape(self.path)}"
        with self.lock:
            self.calls[name] += 1
        connection = http.client.HTTPConnection(self.target, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(key, value)
        has_length = self.command == "HEAD" and answer.getheader("Content-Length")
        self.send_header("Content-Length", has_length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        connection.close()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any  # noqa: N815 - names of the library

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the figures are the output."""


def shape(path: str) -> str:
    """A path without what names one resource, so that calls of a kind are counted together."""
    place, _, query = path.partition("?")
    keys = "&".join(sorted({part.partition("=")[0] for part in query.split("&") if part}))
    parts = [part if index % 2 == 0 else "*" for index, part in enumerate(place.strip("/").split("/"))]
    return "/" + "/".join(parts) + (f"?{keys}" if keys else "")


@contextlib.contextmanager
def counting(endpoint: str) -> Iterator[tuple[str, Counter[str]]]:
    """A proxy in front of the emulator: its address, and the calls it has seen."""
    Counting.target = endpoint.removeprefix("http://")
    Counting.calls = Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", Counting.calls
    finally:
        server.shutdown()
        server.server_close()


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    """Our playbook over one account."""

    def __init__(self, arguments: argparse.Namespace, endpoint: str) -> None:
        self.arguments, self.endpoint = arguments, endpoint
        self.env = dict(os.environ) | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}

    def run(self, *more: str, endpoint: str = "", limit: float = RUN_SECONDS) -> tuple[str, float]:
        """One run: output and seconds. Raises where it fails."""
        extra = self.arguments.extra | {
            "platform_aws_endpoint_url": endpoint or self.endpoint,
            # Preflight looks for the tools of all stages; those of Kubernetes do not run here.
            "kuberay_kubectl": sys.executable,
            "eks_endpoint_public_cidrs": ["8.8.8.0/24"],
            "platform_address_url": "",
            "platform_hub_url": "",
            "secrets_hugging_face_token": f"hf_{'a' * 34}",
            "verify_kubectl": sys.executable,
            "kuberay_kustomize_source": str(PROJECT),
            "platform_aws_access_key_id": OURS,
            "platform_aws_secret_access_key": "test",
            "platform_region": self.arguments.region,
        }
        command = [
            *("ansible-playbook", "playbooks/deploy.yml", "-i", self.arguments.inventory, "-l", self.arguments.host),
            *("--tags", self.arguments.tags, "-e", json.dumps(extra), *more),
        ]
        status, output, seconds = run(command, self.env, PROJECT, limit)
        if status:
            raise BenchError(f"our playbook ended with {status}:\n{output[-4000:]}")
        return output, seconds

    def rerun(self, *more: str) -> tuple[str, float]:
        """A run that has to change nothing."""
        output, seconds = self.run(*more)
        changed = re.findall(r"changed=(\d+)", output)
        if not changed or any(int(number) for number in changed):
            raise BenchError(f"our rerun changed something:\n{output[-4000:]}")
        # A run that skipped a stage changes nothing, and measures nothing.
        for stage in self.arguments.tags.split(","):
            if f"TASK [{stage} : Reconcile" not in output:
                raise BenchError(f"stage {stage} did not compare anything:\n{output[-4000:]}")
        return output, seconds


def stages(output: str) -> list[tuple[str, float]]:
    """The table of stages below a run: name and seconds."""
    return [(name, float(value)) for name, value in re.findall(r"^(\S.*?) {2,}([\d.]+) s\b.*$", output, re.MULTILINE)]


# --- theirs ----------------------------------------------------------------------------------------------------------


def plugin_folder() -> Path | None:
    """A filesystem mirror that has the AWS provider: named by the environment, or where Terraform looks by itself.

    The latter as in Terraform's documentation, "Implied Local Mirror Directories".
    """
    shared = [Path(part) for part in os.environ.get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":") if part]
    named = os.environ.get("TERRAFORM_PLUGIN_DIR")
    places = [Path(named)] if named else []
    places += [Path.home() / ".terraform.d" / "plugins", Path.home() / ".local" / "share" / "terraform" / "plugins"]
    places += [path / "terraform" / "plugins" for path in shared]
    return next((path for path in places if (path / PROVIDER).is_dir()), None)


class Theirs:
    """Terraform over the other account."""

    def __init__(self, program: str, plugins: Path, folder: Path) -> None:
        self.program, self.plugins, self.folder = program, plugins, folder
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
        self.env |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
        folder.mkdir()

    def write(self, text: str) -> None:
        """Write the configuration."""
        (self.folder / "main.tf.json").write_text(text, encoding="utf-8")

    def call(self, *arguments: str, limit: float = RUN_SECONDS, good: Sequence[int] = (0,)) -> tuple[str, float]:
        """One command of Terraform: output and seconds."""
        status, output, seconds = run([self.program, *arguments], self.env, self.folder, limit)
        if status not in good:
            raise BenchError(f"terraform {arguments[0]} ended with {status}:\n{output[-6000:]}")
        return output, seconds

    def prepare(self) -> None:
        """Initialise from the mirror and apply."""
        self.call("init", "-input=false", "-no-color", f"-plugin-dir={self.plugins}")
        self.call("apply", "-input=false", "-no-color", "-auto-approve", limit=FIRST_RUN_SECONDS)

    def plan(self, *more: str) -> tuple[str, float]:
        """A plan that has to be empty."""
        flags = ("-input=false", "-no-color", "-lock=false", "-detailed-exitcode")
        output, seconds = self.call("plan", *flags, *(more or ("-refresh=true",)), good=(0, 2))
        if "No changes." not in output:
            raise BenchError(f"terraform's plan is not empty:\n{output[-8000:]}")
        return output, seconds


# --- the comparison --------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inventory", default="inventories/prod", help="whose AWS part is built (%(default)s)")
    parser.add_argument("--host", default="", help="cluster of the inventory; the first one if not given")
    parser.add_argument("--tags", default="network,storage,eks", help="stages that are run again (%(default)s)")
    parser.add_argument("--extra", type=json.loads, default={}, help="variables for our playbook, as JSON")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each (%(default)s)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    parser.add_argument("--twin", type=Path, help="also keep Terraform's configuration in this file")
    return parser.parse_args(arguments)


def first_host(inventory: str) -> tuple[str, str]:
    """First cluster of the inventory, and its region."""
    done = subprocess.run(
        ["ansible-inventory", "-i", inventory, "--list"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"the inventory {inventory} does not load:\n{done.stderr}")
    listed = json.loads(done.stdout)
    host = listed["clusters"]["hosts"][0]
    return host, str(listed["_meta"]["hostvars"][host]["platform_region"])


def compare(arguments: argparse.Namespace, folder: Path) -> str:
    """Build both sides, measure, and return the report."""
    host, region = first_host(arguments.inventory)
    arguments.host, arguments.region = arguments.host or host, region
    program, plugins = shutil.which("terraform"), plugin_folder()
    say = []
    with emulator(folder / "emulator", region) as endpoint:
        ours = Ours(arguments, endpoint)
        progress("our first run")
        _, first_seconds = ours.run(limit=FIRST_RUN_SECONDS)
        twin = Twin(Account(endpoint, OURS, region)).read()
        counts = twin.count()
        if arguments.twin:
            arguments.twin.write_text(twin.text(endpoint, THEIRS), encoding="utf-8")
        theirs = None
        if program and plugins:
            theirs = Theirs(program, plugins, folder / "terraform")
            theirs.write(twin.text(endpoint, THEIRS))
            progress(f"terraform's first run, {counts.total()} resources")
            theirs.prepare()
            both = Twin(Account(endpoint, THEIRS, region)).read().count()
            if both != counts:
                raise BenchError(f"the accounts differ: ours has {counts}, Terraform's {both}")
            theirs.plan()
        else:
            missing = "terraform is not on the PATH" if not program else "no folder has its AWS provider"
            say.append(f"Terraform was not measured: {missing} (see TERRAFORM_PLUGIN_DIR).")
        rerun, check, plan = Timed("our rerun"), Timed("our `--check`"), Timed("`terraform plan`")
        empty, cold = Timed("`ansible-playbook`, empty play"), Timed("`terraform plan -refresh=false`")
        share: dict[str, list[float]] = {}
        nothing = folder / "empty.yml"
        nothing.write_text("- hosts: localhost\n  gather_facts: false\n  tasks: []\n", encoding="utf-8")
        for pair in range(arguments.pairs):
            progress(f"pair {pair + 1} of {arguments.pairs}")
            steps = ["rerun", "plan", "check", "small"]
            for step in steps if pair % 2 == 0 else reversed(steps):
                if step == "rerun":
                    output, seconds = ours.rerun()
                    rerun.seconds.append(seconds)
                    for name, value in stages(output):
                        share.setdefault(name, []).append(value)
                elif step == "check":
                    check.seconds.append(ours.rerun("--check")[1])
                elif step == "plan" and theirs:
                    plan.seconds.append(theirs.plan()[1])
                elif step == "small":
                    command = ("ansible-playbook", "-i", "localhost,", nothing)
                    empty.seconds.append(run(command, ours.env, PROJECT, RUN_SECONDS)[2])
                    if theirs:
                        cold.seconds.append(theirs.plan("-refresh=false")[1])
        progress("API calls")
        with counting(endpoint) as (proxy, calls):
            ours.run(endpoint=proxy)
            our_calls = Counter(calls)
        their_calls: Counter[str] = Counter()
        if theirs:
            with counting(endpoint) as (proxy, calls):
                theirs.write(twin.text(proxy, THEIRS))
                theirs.plan()
                their_calls = Counter(calls)
    return report(
        arguments,
        counts,
        [timed for timed in (rerun, check, plan, empty, cold) if timed.seconds],
        share,
        calls=(our_calls, their_calls),
        left_out=twin.left_out,
        say=[f"Our first run took {first_seconds:.1f} s.", *say],
    )


def progress(what: str) -> None:
    """Tell on stderr what is going on: the report alone goes to stdout."""
    print(f"bench: {what}", file=sys.stderr, flush=True)


def report(
    arguments: argparse.Namespace,
    counts: Counter[str],
    timed: Sequence[Timed],
    share: Mapping[str, Sequence[float]],
    *,
    calls: tuple[Counter[str], Counter[str]],
    left_out: Mapping[str, str],
    say: Sequence[str],
) -> str:
    """The report, in Markdown."""
    lines = [
        f"{arguments.inventory}, tags {arguments.tags}: {counts.total()} resources as Terraform counts them, on both "
        f"sides ({', '.join(kinds(counts))}). {arguments.pairs} interleaved runs each on {os.cpu_count()} cores, "
        f"{platform.machine()}; the emulator answers from the same machine.",
        "",
        "| nothing to do | min | median | max |",
        "| --- | --- | --- | --- |",
        *(entry.row() for entry in timed),
    ]
    medians = {entry.name: statistics.median(entry.seconds) for entry in timed}
    pairs = {entry.name: entry.seconds for entry in timed}
    if "`terraform plan`" in medians:
        ratios = [mine / other for mine, other in zip(pairs["our rerun"], pairs["`terraform plan`"], strict=True)]
        lines += [
            "",
            f"Rerun against plan, pair by pair: {statistics.median(ratios):.2f} times (from {min(ratios):.2f} to "
            f"{max(ratios):.2f}); below 1 ours is quicker.",
        ]
    lines += ["", "| where our rerun's time goes | median |", "| --- | --- |"]
    named = {name: statistics.median(values) for name, values in share.items() if name != "total"}
    outside = medians["our rerun"] - statistics.median(share["total"]) if "total" in share else 0.0
    lines += [f"| {name} | {value:.1f} s |" for name, value in named.items() if value >= 0.05]
    lines += [f"| start and end of `ansible-playbook`, outside the stages | {outside:.1f} s |"]
    lines += ["", "| API calls of one run | number |", "| --- | --- |"]
    for name, counted in zip(("ours", "Terraform"), calls, strict=True):
        if counted:
            by_service = Counter[str]()
            for call, number in counted.items():
                by_service[call.partition(" ")[0]] += number
            parts = ", ".join(f"{service} {number}" for service, number in by_service.most_common())
            lines.append(f"| {name} | {counted.total()} ({parts}) |")
    if left_out and "`terraform plan`" in medians:
        lines += ["", "Left out of Terraform's configuration, because the emulator does not keep it:"]
        lines += [f"- {what}: {why}" for what, why in left_out.items()]
    return "\n".join([*lines, "", *say])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 with the reason where there is nothing to measure."""
    options = parse(arguments)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return reporting.run(options, compare)


if __name__ == "__main__":
    sys.exit(main())
