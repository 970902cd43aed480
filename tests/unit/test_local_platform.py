"""The pure parts of the local platform: keys, stages, checks, parsing, and the files it writes for others to read."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rayplane_local import (
    checks,
    cluster,
    firewall,
    graph,
    keys,
    locking,
    network,
    oci,
    parts,
    releases,
    services,
    shell,
    stages,
)
from rayplane_local.errors import CommandError, PlatformError, Problem, RefusedError
from rayplane_local.progress import Step, duration, table
from rayplane_local.settings import Settings

from tests.gateway.waiting import wait_until

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


# Settings


def test_settings_take_only_what_they_know(tmp_path: Path) -> None:
    assert Settings.from_mapping({"home": str(tmp_path), "node_ports": ["30080"]}).node_ports == (30080,)
    with pytest.raises(ValueError, match="unknown settings of the local platform: houme"):
        Settings.from_mapping({"home": str(tmp_path), "houme": 1})


def test_settings_that_come_as_text_mean_what_they_say(tmp_path: Path) -> None:
    made = Settings.from_mapping(
        {"home": str(tmp_path), "keep_build_cache": "false", "memory_gib": "8.5", "emulator_port": "4577"}
    )
    assert (made.keep_build_cache, made.memory_gib, made.emulator_port) == (False, 8.5, 4577)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"home": "relative"}, "absolute path"),
        ({"keep_build_cache": "perhaps"}, "keep_build_cache must be true or false"),
        ({"disk_gib": "much"}, "disk_gib must be a number"),
        ({"source": "maybe"}, "auto, release or build"),
        ({"service_subnet": "10.96.0.0/12"}, r"local_platform_service_subnet .* holds local_platform_address"),
        ({"service_subnet": "10.244.128.0/20"}, "overlap"),
        ({"node_pod_subnet": "10.245.0.0/24"}, "is not inside"),
    ],
)
def test_settings_refuse_what_cannot_work(tmp_path: Path, values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_mapping({"home": str(tmp_path), **values})


def test_the_role_hands_over_settings_that_exist() -> None:
    role = PROJECT / "roles" / "local_platform"
    defaults = yaml.safe_load((role / "defaults" / "main.yml").read_text())
    handed = {name.removeprefix("local_platform_"): value for name, value in defaults.items()}
    fresh = Settings.from_mapping({**handed, "home": "/"})
    assert fresh.release_bases == {name: handed[f"release_base_{name}"] for name in ("kubernetes", "etcd")}
    fresh = Settings(home=Path("/"))
    same = {name: value for name, value in handed.items() if "{{" not in str(value)}
    for name in ("source", "address", "pod_subnet", "service_subnet", "emulator_port", "ray_image", "keep_build_cache"):
        assert same[name] == getattr(fresh, name)


def test_the_role_has_one_task_a_stage() -> None:
    folder = PROJECT / "roles" / "local_platform" / "tasks"
    tasks = [task for part in ("main", "monitoring") for task in yaml.safe_load((folder / f"{part}.yml").read_text())]
    named = [task["rayplane.platform.local_platform"]["stage"] for task in tasks]
    assert named == [stage.name for stage in stages.STAGES]


# Keys and files


def test_a_key_follows_values_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "go.mod"
    file.write_text("one")
    first = keys.content_key("a", {"b": 1}, files=[file])
    assert first == keys.content_key("a", {"b": 1}, files=[file])
    assert len(first) == keys.KEY_LENGTH
    file.write_text("two")
    assert keys.content_key("a", {"b": 1}, files=[file]) != first
    assert keys.content_key("a", {"b": 2}, files=[file]) != keys.content_key("a", {"b": 1}, files=[file])


def test_text_is_written_at_once_and_only_when_it_differs(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    assert keys.write_text(path, "x", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not keys.write_text(path, "x", 0o600)
    assert keys.write_text(path, "x", 0o644)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_links_are_replaced_at_once(tmp_path: Path) -> None:
    assert keys.link(tmp_path / "current", tmp_path / "one")
    assert not keys.link(tmp_path / "current", tmp_path / "one")
    assert keys.link(tmp_path / "current", tmp_path / "two")
    assert (tmp_path / "current").readlink() == tmp_path / "two"


def test_a_torn_json_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    assert keys.read_json(tmp_path / "a.json") is None
    assert keys.read_json(tmp_path / "b.json") is None


# One run at a time


def test_the_second_run_is_told_who_holds_the_platform(tmp_path: Path) -> None:
    holder = subprocess.Popen(["sleep", "60"])
    try:
        locking.acquire(tmp_path, holder.pid)
        with pytest.raises(PlatformError, match=rf"process {holder.pid}, since \d{{4}}-\d\d-\d\dT"):
            locking.acquire(tmp_path, os.getpid())
        locking.acquire(tmp_path, holder.pid)  # the holder itself goes on
    finally:
        holder.kill()
        holder.wait()
    locking.acquire(tmp_path, os.getpid())  # a dead holder holds nothing


def test_a_process_id_that_was_given_again_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / locking.LOCK_FILE).write_text(json.dumps({"pid": os.getpid(), "start": 1, "since": "then"}))
    holder = subprocess.Popen(["sleep", "60"])
    try:
        locking.acquire(tmp_path, holder.pid)
    finally:
        holder.kill()
        holder.wait()


def test_a_torn_lease_is_free(tmp_path: Path) -> None:
    (tmp_path / locking.LOCK_FILE).write_text('{"pid": 1')
    locking.acquire(tmp_path, os.getpid())


# The graph


def work(name: str, *needs: str, lane: str = "compute", log: list[str] | None = None) -> graph.Work:
    return graph.Work(name, lambda step: (log if log is not None else []).append(step.name), lane=lane, needs=needs)


def test_order_puts_needs_first() -> None:
    assert graph.order([work("c", "a", "b"), work("a"), work("b", "a")]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("works", "message"),
    [
        ([work("a"), work("a")], "the same name twice"),
        ([work("a", "b")], "a needs b, which nothing provides"),
        ([work("a", "b"), work("b", "a")], "a circle among a, b"),
    ],
)
def test_a_wrong_graph_is_refused(works: list[graph.Work], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph.order(works)


def test_work_runs_once_after_its_needs() -> None:
    log: list[str] = []
    lines: list[str] = []
    works = [
        work("model", "serve", lane="download", log=log),
        work("go", log=log),
        work("serve", lane="download", log=log),
    ]
    times = graph.run_graph(works, lines.append)
    assert set(times) == {"model", "go", "serve"}
    assert log.index("serve") < log.index("model")
    assert sorted(line.split(":")[0].strip() for line in lines) == ["go", "model", "serve"]


def test_a_lane_runs_one_piece_at_a_time() -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def action(step: Step) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1

    graph.run_graph([graph.Work(f"w{number}", action) for number in range(4)], lambda line: None)
    assert most == 1


def test_a_failure_stops_what_runs_beside_it_and_starts_nothing_more() -> None:
    log: list[str] = []

    def fail(step: Step) -> None:
        raise CommandError("no")

    def linger(step: Step) -> None:
        assert step.cancel.wait(60)

    works = [
        graph.Work("fails", fail),
        graph.Work("lingers", linger, lane="download"),
        work("after", "fails", log=log),
        work("queued", lane="download", log=log),
    ]
    with pytest.raises(CommandError, match=r"^no$"):
        graph.run_graph(works, lambda line: None)
    assert log == []


def test_progress_is_reported_while_work_goes_on() -> None:
    reported = threading.Event()

    def report(line: str) -> None:
        if "build: " in line and "half way" in line:
            reported.set()

    def slow(step: Step) -> None:
        step.note = "half way"
        assert reported.wait(60)

    graph.run_graph([graph.Work("build", slow)], report, heartbeat=0.05)


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (185, "3 min 05 s")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_starts_with_what_took_longest() -> None:
    assert table({"a": 1.0, "bb": 2.0}) == ["  bb  2.0 s", "  a   1.0 s"]


# Commands


def test_a_long_command_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"(?s)build failed with status 3; the end of .*what went wrong"):
        shell.run_long(["sh", "-c", "echo what went wrong; exit 3"], Step("build"), tmp_path / "build.log")


def test_a_long_command_notes_its_progress_and_can_be_stopped(tmp_path: Path) -> None:
    step = Step("build")

    def note(line: str, count: int) -> str:
        if count == 3:
            step.cancel.set()
        return f"{count} {line}"

    with pytest.raises(PlatformError, match="build was stopped"):
        shell.run_long(["sh", "-c", "echo one; echo two; exec sleep 3000"], step, tmp_path / "build.log", note=note)
    assert step.note == "3 two"  # the first line of a log is its command


@pytest.mark.skipif(os.geteuid() != 0, reason="process namespaces need root")
def test_a_killed_run_leaves_nothing_of_a_long_command(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from rayplane_local import progress, shell\n"
        "inner = 'setsid sh -c \"while :; do date > ' + sys.argv[2] + '/alive; sleep 0.05; done\" & wait'\n"
        "shell.run_long(['sh', '-c', inner], progress.Step('build'), pathlib.Path(sys.argv[2]) / 'log')\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(PROJECT / "tools"), str(tmp_path)])
    alive = tmp_path / "alive"
    wait_until(alive.exists)
    run.kill()
    run.wait()

    def dead() -> bool:
        alive.unlink(missing_ok=True)
        time.sleep(0.3)
        return not alive.exists()

    wait_until(dead, "the end of what the command started")


# Checks


def test_every_problem_is_named_at_once_with_its_cure() -> None:
    error = RefusedError([Problem("One.", "do this."), Problem("Two.", "do that.")])
    text = str(error)
    assert "1. One. Cure: do this." in text
    assert "2. Two. Cure: do that." in text
    assert "nothing was changed" in text
    assert "inventories/existing" in text


def test_problems_come_together(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(checks.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(checks.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(checks, "available_controllers", lambda: {"cpu", "memory"})
    monkeypatch.setattr(checks.cluster, "owner", lambda folder: "")
    monkeypatch.setattr(checks, "ports", lambda *arguments: [Problem("Port 6443 is taken.", "stop it.")])
    small = Settings(home=settings.home, memory_gib=1e6, disk_gib=1e6, disk_warm_gib=1e6)
    found = [str(problem) for problem in checks.problems(small)]
    for word in ("not root", "riscv64", "memory", "free disk", "cpuset", "/etc/kubernetes", "/var/lib/kubelet", "6443"):
        assert any(word in problem for problem in found), word
    with pytest.raises(RefusedError):
        checks.check(small)


def test_os_release_is_read() -> None:
    text = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n# comment\nVERSION_CODENAME=bookworm\n'
    release = checks.os_release(text)
    assert release["VERSION_CODENAME"] == "bookworm"
    assert list(checks.system(release, "x86_64", True)) == []
    assert "Ubuntu" in str(next(iter(checks.system({"PRETTY_NAME": "Ubuntu 24.04"}, "x86_64", True))))


def test_memory_and_disk_name_what_is_there_and_what_is_needed() -> None:
    assert list(checks.memory("MemTotal:       24684084 kB\n", 12)) == []
    (problem,) = checks.memory("MemTotal:        4000000 kB\n", 12)
    assert "3.8 GiB of memory; 12 GiB are needed" in problem.what
    (problem,) = checks.disk(5 << 30, 32, Path("/data"))
    assert "/data has 5.0 GiB" in problem.what
    assert "RAYPLANE_HOME" in problem.cure


def test_cgroups_name_what_lacks() -> None:
    assert list(checks.cgroups(set(checks.CONTROLLERS))) == []
    (problem,) = checks.cgroups({"cpu", "cpuset", "memory", "devices", "freezer"})
    assert "lack pids" in problem.what


def test_another_kubernetes_is_told_from_ones_own() -> None:
    folder, home = Path("/etc/kubernetes"), Path("/home/me")
    assert list(checks.foreign_kubernetes({folder: None}, home)) == []
    assert list(checks.foreign_kubernetes({folder: str(home)}, home)) == []
    (stranger,) = checks.foreign_kubernetes({folder: ""}, home)
    assert "kubeadm reset" in stranger.cure
    (other,) = checks.foreign_kubernetes({folder: "/other"}, home)
    assert "RAYPLANE_HOME=/other make local-down" in other.cure


def test_a_cluster_of_another_version_is_named_with_the_way_to_the_present_one(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(checks.os, "geteuid", lambda: 0)
    assert list(checks.recipe(settings)) == []
    keys.write_text(cluster.stamp(settings), json.dumps({"key": "other", "kubernetes": "v1.34.4"}))
    (problem,) = checks.recipe(settings)
    assert "v1.34.4" in problem.what and f"v{parts.KUBERNETES_VERSION}" in problem.what
    assert "make local-down" in problem.cure and "make deploy" in problem.cure
    keys.write_text(cluster.stamp(settings), json.dumps({"key": cluster.key(settings), "kubernetes": "v1.36.3"}))
    assert list(checks.recipe(settings)) == []


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:11D6 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 100 0 0 10 0
   1: 0100007F:11D6 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 4243 1 0 100 0 0 10 0
   2: 00000000:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4244 1 0 100 0 0 10 0
"""


def test_listening_ports_are_read_from_the_kernels_table() -> None:
    assert checks.listeners(TCP) == {4566: {"4242"}, 6443: {"4244"}}


def test_a_port_of_ones_own_is_no_problem() -> None:
    listening = {6443: {"1"}, 4566: {"2"}, 2379: {"3"}}
    owners = {"1": 100, "2": 200}
    wanted = {6443: "the Kubernetes API", 4566: "the AWS emulator", 2379: "etcd", 10250: "the kubelet"}
    found = list(checks.ports(wanted, listening, lambda inodes: owners, lambda pid: pid == 100))
    assert [problem.what.split(" is ")[0] for problem in found] == ["Port 2379 (etcd)", "Port 4566 (the AWS emulator)"]


def test_the_holder_of_a_port_is_found() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        inodes = checks.listeners(Path("/proc/net/tcp").read_text())[port]
        assert set(checks.socket_owners(inodes).values()) == {os.getpid()}


# Parts


def test_every_part_has_its_module_and_only_releases_with_a_checksum() -> None:
    for part in parts.ALL:
        assert (part.module / "go.sum").is_file()
        if part.release is not None:
            algorithm, _, value = part.release.checksum.partition(":")
            address = f"https://dl.k8s.io/{part.release.file}.{algorithm}"
            assert value == address or len(value) == {"sha256": 64, "sha512": 128}[algorithm]
            assert set(part.release.members) == set(part.programs)


def test_pruning_spares_parts_whose_names_begin_alike(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    current = [settings.parts / f"{part.name}-{part.key()}-build" for part in parts.MONITORING]
    old = [settings.parts / f"{part.name}-{'0' * keys.KEY_LENGTH}-build" for part in parts.MONITORING]
    for folder in (*current, *old, settings.parts / f".{current[0].name}.new"):
        folder.mkdir(parents=True)
    parts.prune(settings, parts.MONITORING)
    assert sorted(settings.parts.iterdir()) == sorted(current)


def test_everything_but_the_operator_builds_against_one_kubernetes() -> None:
    replaced = (parts.part("kubernetes").module / "go.mod").read_text().partition("replace (")[2]
    assert set(re.findall(r"k8s\.io/[a-z-]+ (v\S+)", replaced)) == {f"v0.{parts.KUBERNETES_VERSION.partition('.')[2]}"}
    others = {item.name for item in (*parts.PARTS, *parts.ON_DEMAND) if item.module != parts.part("kubernetes").module}
    assert others == {"kuberay"}


@pytest.fixture
def published(tmp_path: Path) -> tuple[parts.Part, Settings]:
    """A release whose checksum lies beside it, as its upstream publishes it, and the settings to take it with."""
    with tarfile.open(tmp_path / "tool.tar.gz", "w:gz") as tar:
        tar.add(__file__, "bin/tool")
    address = f"{tmp_path.as_uri()}/tool.tar.gz.sha512"
    value = hashlib.sha512((tmp_path / "tool.tar.gz").read_bytes()).hexdigest()
    (tmp_path / "tool.tar.gz.sha512").write_text(f"{value}  tool.tar.gz\n")
    release = releases.Release("etcd", "tool.tar.gz", f"sha512:{address}", {"tool": "bin/tool"})
    bases = {"etcd": tmp_path.as_uri()}
    part = replace(parts.part("etcd"), programs={"tool": "tool"}, release=release)
    return part, Settings(home=tmp_path / "home", source="release", release_bases=bases)


def test_a_release_is_held_to_the_checksum_that_upstream_publishes(
    tmp_path: Path, published: tuple[parts.Part, Settings]
) -> None:
    part, settings = published
    parts.take_release(settings, part, Step("release"))
    assert (parts.ready_folder(settings, part) / "bin" / "tool").read_bytes() == Path(__file__).read_bytes()
    other = replace(settings, home=tmp_path / "other", release_checksums={"etcd": f"sha256:{'0' * 64}"})
    with pytest.raises(PlatformError, match=f"pinned is {'0' * 64}"):
        parts.take_release(other, part, Step("release"))


@pytest.mark.parametrize("text", ["0" * 128, "0" * 64, "<html>sign in</html>", "", None])
def test_nothing_is_unpacked_without_its_published_checksum(
    tmp_path: Path, published: tuple[parts.Part, Settings], text: str | None
) -> None:
    part, settings = published
    sums = tmp_path / "tool.tar.gz.sha512"
    sums.unlink() if text is None else sums.write_text(text)
    wanted = "is not the file that was pinned" if text == "0" * 128 else "local_platform_release_checksums.etcd"
    with pytest.raises(PlatformError, match=wanted):
        parts.take_release(settings, part, Step("release"))
    assert parts.folder(settings, part) is None


def test_versions_in_the_code_are_those_of_the_modules() -> None:
    for name, module, version in [
        ("kubernetes", "k8s.io/kubernetes", parts.KUBERNETES_VERSION),
        ("etcd", "go.etcd.io/etcd/server/v3", parts.ETCD_VERSION),
        ("coredns", "github.com/coredns/coredns", parts.COREDNS_VERSION),
        ("kuberay", "github.com/ray-project/kuberay/ray-operator", parts.KUBERAY_VERSION),
        ("metrics-server", "sigs.k8s.io/metrics-server", parts.METRICS_SERVER_VERSION),
        ("local-path-provisioner", "github.com/rancher/local-path-provisioner", parts.LOCAL_PATH_VERSION),
    ]:
        assert f"{module} v{version}" in (parts.part(name).module / "go.mod").read_text(), name


@pytest.mark.parametrize(
    ("source", "made", "found"),
    [
        ("auto", "build", "build"),
        ("auto", "release", "release"),
        ("build", "release", None),
        ("release", "build", None),
        ("release", "release", "release"),
    ],
)
def test_where_a_part_may_come_from(tmp_path: Path, source: str, made: str, found: str | None) -> None:
    here = Settings(home=tmp_path, source=source)
    item = parts.part("etcd")
    (here.parts / f"etcd-{item.key()}-{made}").mkdir(parents=True)
    folder = parts.folder(here, item)
    assert (folder.name.rpartition("-")[2] if folder else None) == found


def test_a_part_without_a_release_is_built_in_release_mode_too(tmp_path: Path) -> None:
    here = Settings(home=tmp_path, source="release")
    item = parts.part("coredns")
    (here.parts / f"coredns-{item.key()}-build").mkdir(parents=True)
    assert parts.folder(here, item) is not None


def test_nothing_ready_means_everything_is_to_be_made(settings: Settings) -> None:
    names = [item.name for item in stages.artefacts_works(settings, {"kubernetes"})]
    assert {"release kubernetes", "build etcd", "python serve", "python services", "base image", "model"} <= set(names)
    assert "build kubernetes" not in names
    graph.order(stages.artefacts_works(settings, {"kubernetes"}))


# Files for other programs


def test_the_configurations_are_well_formed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "program", lambda settings, name: settings.parts / name)
    containerd = tomllib.loads(services.containerd_config(settings))
    assert containerd["plugins"]["io.containerd.grpc.v1.cri"]["restrict_oom_score_adj"] is True
    assert json.loads(services.cni_config(settings))["plugins"][0]["bridge"] == network.POD_BRIDGE
    supervisor = services.supervisor_config(settings)
    assert supervisor.count("setpriv --pdeathsig KILL") == len(services.PROGRAMS)
    subprocess.run(["sh", "-n"], input=services.kubelet_script(settings), text=True, check=True)


def test_the_cluster_listens_on_the_platforms_address_only(settings: Settings) -> None:
    documents = {document["kind"]: document for document in yaml.safe_load_all(cluster.config(settings))}
    assert {"name": "bind-address", "value": "10.97.0.1"} in documents["ClusterConfiguration"]["apiServer"]["extraArgs"]
    assert documents["KubeletConfiguration"]["address"] == "10.97.0.1"
    assert documents["KubeProxyConfiguration"]["nodePortAddresses"] == ["127.0.0.0/8"]
    assert documents["ClusterConfiguration"]["certificateValidityPeriod"] == cluster.CERTIFICATE_HOURS
    assert documents["KubeletConfiguration"]["failCgroupV1"] is False


# Firewall

SAVED = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j DOCKER
-A DOCKER -s 10.0.0.0/8 -m comment --comment "KUBE-like words" -j ACCEPT
-A KUBE-FIREWALL -j DROP
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
:CNI-abc - [0:0]
-A POSTROUTING -s 10.244.0.2/32 -m comment --comment "name: \\"rayplane\\"" -j CNI-abc
-A CNI-abc -d 10.244.0.0/24 -j ACCEPT
COMMIT
*mangle
:DOCKER - [0:0]
COMMIT
"""


def test_only_our_firewall_rules_are_removed() -> None:
    assert firewall.removal(SAVED).splitlines() == [
        "*filter",
        "-D INPUT -j KUBE-FIREWALL",
        "-F KUBE-FIREWALL",
        "-X KUBE-FIREWALL",
        "COMMIT",
        "*nat",
        '-D POSTROUTING -s 10.244.0.2/32 -m comment --comment "name: \\"rayplane\\"" -j CNI-abc',
        "-F CNI-abc",
        "-X CNI-abc",
        "COMMIT",
    ]
    assert firewall.removal("*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n") == ""


# Images


def test_an_image_archive_is_a_whole_oci_layout_and_always_the_same(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF" * 1000)

    def archive() -> bytes:
        shared = oci.layer(
            {"usr/bin/tool": program}, links={"bin/sh": "tool"}, texts={"etc/passwd": "root:x:0:0::/:\n"}
        )
        images = [oci.Image(f"example.com/{name}:1", [shared], {"User": "1000"}) for name in ("one", "two")]
        stream = io.BytesIO()
        oci.write_archive(images, stream)
        return stream.getvalue()

    first = archive()
    os.utime(program, (1, 1))
    assert archive() == first
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        members = {member.name: tar.extractfile(member) for member in tar}
        blobs = {name: stream.read() for name, stream in members.items() if stream is not None}
    index = json.loads(blobs["index.json"])
    assert [item["annotations"]["io.containerd.image.name"] for item in index["manifests"]] == [
        "example.com/one:1",
        "example.com/two:1",
    ]
    for name, data in blobs.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(data).hexdigest() == name.rpartition("/")[2]
    manifest = json.loads(blobs["blobs/sha256/" + index["manifests"][0]["digest"].partition(":")[2]])
    assert manifest["layers"][0]["size"] == len(
        blobs["blobs/sha256/" + manifest["layers"][0]["digest"].partition(":")[2]]
    )
    layer = blobs["blobs/sha256/" + manifest["layers"][0]["digest"].partition(":")[2]]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert tar.getmember("tmp").mode == 0o1777
        assert tar.getmember("usr/bin/tool").mode == 0o755
        assert tar.getmember("bin/sh").linkname == "tool"


def test_a_layer_takes_a_folder_with_its_links_and_modes(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/tool").write_text("x")
    (folder / "bin/tool").chmod(0o744)
    (folder / "plain").write_text("y")
    (folder / "bin/python").symlink_to("/usr/bin/python3.11")
    stream = io.BytesIO()
    oci.layer({}, trees={"opt/env": folder}, texts={"etc/a": b"\xff"}).write(stream)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        assert tar.getmember("opt/env/bin/tool").mode == 0o755 and tar.getmember("opt/env/plain").mode == 0o644
        assert tar.getmember("opt/env/bin/python").linkname == "/usr/bin/python3.11"
        assert {member.mtime for member in tar} == {0}


# The emulator's launcher


def test_only_changes_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    names = (
        *("ministack", "ministack.app", "ministack.core", "emulator_ec2", "emulator_eks", "emulator_rules"),
        *("hypercorn", "hypercorn.asyncio", "hypercorn.config"),
    )
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    stubs = sys.modules
    stubs["ministack"].app = stubs["ministack.app"]  # type: ignore[attr-defined]
    stubs["ministack.core"].persistence = ModuleType("persistence")  # type: ignore[attr-defined]
    stubs["hypercorn.asyncio"].serve = None  # type: ignore[attr-defined]
    stubs["hypercorn.config"].Config = object  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "rayplane_local.emulator", raising=False)
    from rayplane_local import emulator

    target = b"AmazonEKS.DescribeCluster"
    assert emulator.reads_only("GET", [], b"")
    assert emulator.reads_only("POST", [], b"Version=2016-11-15&Action=DescribeVpcs")
    assert emulator.reads_only("POST", [(b"X-Amz-Target", target)], b"{}")
    assert not emulator.reads_only("POST", [], b"Action=CreateVpc&Version=2016-11-15")
    assert not emulator.reads_only("PUT", [], b"")
    assert not emulator.reads_only("POST", [(b"x-amz-target", b"TrentService.CreateKey")], b"{}")
    monkeypatch.delitem(sys.modules, "rayplane_local.emulator")
