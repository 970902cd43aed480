"""Whether a machine can carry the platform: every reason why not, at once, before anything is changed."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from . import cluster, images, parts, python_env, services
from .errors import Problem, RefusedError
from .settings import KUBELET_FOLDER, KUBERNETES_FOLDER, Settings

GIB = 1 << 30
CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "devices", "freezer")

# What a Kubernetes node listens on besides the API server and the emulator: port, and what it is for.
NODE_PORTS = {
    2379: "etcd",
    2380: "etcd's peers",
    2381: "etcd's metrics",
    10248: "the kubelet's health",
    10249: "kube-proxy's metrics",
    10250: "the kubelet",
    10256: "kube-proxy's health",
    10257: "kube-controller-manager",
    10259: "kube-scheduler",
}


def os_release(text: str) -> dict[str, str]:
    """The values of an os-release file; see os-release(5)."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def listeners(*tables: str) -> dict[int, set[str]]:
    """Listening TCP ports with the socket inodes behind them, from the text of /proc/net/tcp and tcp6; see proc(5)."""
    found: dict[int, set[str]] = {}
    for table in tables:
        for line in table.splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "0A":
                found.setdefault(int(fields[1].rpartition(":")[2], 16), set()).add(fields[9])
    return found


def socket_owners(inodes: set[str]) -> dict[str, int]:
    """Which process holds each socket."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    owners: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            for descriptor in (folder / "fd").iterdir():
                inode = wanted.get(str(descriptor.readlink()))
                if inode is not None:
                    owners[inode] = int(folder.name)
        except OSError:
            continue
    return owners


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def is_ours(settings: Settings, pid: int) -> bool:
    """Whether a process belongs to this platform: below its supervisor, or in a container of its containerd."""
    supervisor = services.supervisor_pid(settings)
    seen = 0
    while pid > 1 and seen < 20:
        if pid == supervisor or str(settings.containerd_socket) in command_line(pid):
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
        seen += 1
    return False


def user(effective: int) -> Iterable[Problem]:
    if effective != 0:
        yield Problem(
            "It runs as a user who is not root; Kubernetes needs mounts, interfaces and firewall rules.",
            "run it as root (sudo make deploy).",
        )


def system(release: dict[str, str], machine: str, has_apt: bool) -> Iterable[Problem]:
    if machine != "x86_64":
        yield Problem(f"Its processor is {machine}; the pinned packages are for x86_64.", "use an x86_64 machine.")
    if release.get("VERSION_CODENAME") != images.SUITE or not has_apt:
        name = release.get("PRETTY_NAME", "an unknown system")
        yield Problem(
            f"It runs {name}; packages come from Debian 12 (bookworm) by apt-get.", "use a Debian 12 machine."
        )


def memory(meminfo: str, needed_gib: float) -> Iterable[Problem]:
    total = next((int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemTotal:")), 0)
    if total < needed_gib * GIB:
        yield Problem(
            f"It has {total / GIB:.1f} GiB of memory; {needed_gib:g} GiB are needed.",
            "use a larger machine, or lower local_platform_memory_gib if your models are smaller and pods may wait.",
        )


def disk(free: int, needed_gib: float, folder: Path) -> Iterable[Problem]:
    if free < needed_gib * GIB:
        yield Problem(
            f"{folder} has {free / GIB:.1f} GiB of free disk space; {needed_gib:g} GiB are needed.",
            "free some, or set RAYPLANE_HOME to a folder on a larger disk.",
        )


def cgroups(controllers: set[str]) -> Iterable[Problem]:
    wanted = [name for name in CONTROLLERS if name not in controllers]
    if wanted:
        yield Problem(
            f"The kernel's control groups lack {', '.join(wanted)}; pods cannot be limited without them.",
            "mount the cgroup file systems below /sys/fs/cgroup (a container needs --privileged and --cgroupns=host).",
        )


def available_controllers() -> set[str]:
    """Controllers of either cgroup version; version 2 has no devices and freezer controllers because it does both
    itself.
    """
    root = Path("/sys/fs/cgroup")
    unified = root / "cgroup.controllers"
    if unified.is_file():
        return {*unified.read_text().split(), "devices", "freezer"}
    return {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()


def foreign_kubernetes(owners: dict[Path, str | None], home: Path) -> Iterable[Problem]:
    for folder, owner in owners.items():
        if owner == "":
            yield Problem(
                f"{folder} belongs to another Kubernetes on this machine.",
                f"remove that one with its own tools (for instance kubeadm reset) and delete {folder}, "
                "or use its kubeconfig with inventories/existing.",
            )
        elif owner is not None and owner != str(home):
            yield Problem(
                f"{folder} belongs to the local platform in {owner}.",
                f"take that one down first: RAYPLANE_HOME={owner} make local-down.",
            )


def ports(
    wanted: dict[int, str],
    listening: dict[int, set[str]],
    owner: Callable[[set[str]], dict[str, int]],
    ours: Callable[[int], bool],
) -> Iterable[Problem]:
    taken = {port: listening[port] for port in wanted if port in listening}
    owners = owner({inode for inodes in taken.values() for inode in inodes}) if taken else {}
    for port, inodes in sorted(taken.items()):
        pids = {owners[inode] for inode in inodes if inode in owners}
        if pids and all(ours(pid) for pid in pids):
            continue
        holders = (
            ", ".join(f"process {pid} ({' '.join(command_line(pid))[:100]})" for pid in sorted(pids) if not ours(pid))
            or "a process that cannot be seen"
        )
        yield Problem(f"Port {port} ({wanted[port]}) is taken by {holders}.", "stop that process.")


def recipe(settings: Settings) -> Iterable[Problem]:
    made = cluster.other_recipe(settings) if os.geteuid() == 0 else None
    if made is not None:
        yield Problem(
            f"The cluster that is up was made with Kubernetes {made} from other versions or settings than the present "
            f"ones (Kubernetes {images.KUBERNETES}); it is not upgraded in place.",
            "run make local-down, which keeps the caches, and then make deploy.",
        )


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def is_warm(settings: Settings) -> bool:
    """Whether the big things lie ready already."""
    environment = python_env.folder(settings, "serve").is_dir()
    return environment and all(parts.folder(settings, part) is not None for part in parts.PARTS)


def wanted_ports(settings: Settings) -> dict[int, str]:
    return {
        settings.api_port: "the Kubernetes API",
        settings.emulator_port: "the AWS emulator",
        **dict.fromkeys(settings.node_ports, "a node port"),
        **NODE_PORTS,
    }


def problems(settings: Settings) -> list[Problem]:
    """Everything that stands against the platform on this machine."""
    release = Path("/etc/os-release")
    at = nearest(settings.home)
    # Only root sees who holds a port, and holders may be the platform itself.
    sources = (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if os.geteuid() == 0 else ()
    tables = [path.read_text() for path in sources if path.is_file()]
    return [
        *user(os.geteuid()),
        *system(
            os_release(release.read_text()) if release.is_file() else {},
            platform.machine(),
            shutil.which("apt-get") is not None,
        ),
        *memory(Path("/proc/meminfo").read_text(), settings.memory_gib),
        *disk(shutil.disk_usage(at).free, settings.disk_warm_gib if is_warm(settings) else settings.disk_gib, at),
        *cgroups(available_controllers()),
        *foreign_kubernetes(
            {folder: cluster.owner(folder) for folder in (KUBERNETES_FOLDER, KUBELET_FOLDER)}, settings.home
        ),
        *ports(wanted_ports(settings), listeners(*tables), socket_owners, lambda pid: is_ours(settings, pid)),
        *recipe(settings),
    ]


def check(settings: Settings) -> None:
    """Raise RefusedError with every problem there is."""
    if found := problems(settings):
        raise RefusedError(found)
