"""Taking the platform down: the machine as it was before. Caches stay."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import time
import xmlrpc.client
from collections.abc import Iterable
from pathlib import Path

from . import cluster, firewall, mounts, network, services
from .errors import PlatformError
from .keys import read_json
from .locking import start_time
from .progress import Report
from .settings import KUBELET_FOLDER, KUBERNETES_FOLDER, RUN, Settings
from .shell import run

# Where containerd and runc keep what runs, whatever their configuration says.
CONTAINERD_RUN = Path("/run/containerd")
NAMESPACE = "k8s.io"


def pending(settings: Settings) -> list[str]:
    """What of the platform is on the machine."""
    found = [f"folder {folder}" for folder in owned_folders(settings)]
    if settings.state.exists():
        found.append(f"folder {settings.state}")
    found += [f"process {pid}" for pid in processes(settings)]
    if run(["ip", "link", "show", settings.interface], check=False).returncode == 0:
        found.append(f"interface {settings.interface}")
    return found


def owned_folders(settings: Settings) -> list[Path]:
    """Kubernetes' own folders, where they carry our mark."""
    return [folder for folder in (KUBERNETES_FOLDER, KUBELET_FOLDER) if cluster.owner(folder) == str(settings.home)]


def children() -> dict[int, list[int]]:
    """Every process's children."""
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(folder.name))
    return found


def below(pid: int, tree: dict[int, list[int]]) -> Iterable[int]:
    """All descendants of a process."""
    for child in tree.get(pid, []):
        yield child
        yield from below(child, tree)


def shims(settings: Settings) -> list[int]:
    """The processes that hold containers of our containerd: they are started with its socket's address."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"containerd-shim-runc-v2") and str(settings.containerd_socket).encode() in words:
                    found.append(int(folder.name))
    return found


def processes(settings: Settings) -> list[int]:
    """Every process of the platform: the supervisor, what it started, and the containers."""
    tree = children()
    supervisor = services.supervisor_pid(settings)
    roots = [*([supervisor] if supervisor else []), *shims(settings)]
    return [pid for root in roots for pid in (root, *below(root, tree))]


def bundles(settings: Settings) -> list[Path]:
    """The folders of running containers; each holds the configuration that runc was given."""
    root = settings.state / "containerd" / "run" / "io.containerd.runtime.v2.task" / NAMESPACE
    return sorted(root.iterdir()) if root.is_dir() else []


def network_namespaces(settings: Settings) -> set[Path]:
    """The files that keep our pods' network namespaces alive."""
    found = set()
    for bundle in bundles(settings):
        config = read_json(bundle / "config.json") or {}
        for item in config.get("linux", {}).get("namespaces", []):
            if item.get("type") == "network" and item.get("path", "").startswith(("/var/run/netns/", "/run/netns/")):
                found.add(Path("/run/netns") / Path(item["path"]).name)
    return found


def stop_containers(settings: Settings) -> int:
    """Kill every container's processes, then their shims."""
    tree = children()
    roots = shims(settings)
    victims = [pid for root in roots for pid in below(root, tree)] + roots
    started = {pid: start_time(pid) for pid in victims}
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while left := [pid for pid in victims if started[pid] is not None and start_time(pid) == started[pid]]:
        if time.monotonic() > end:
            raise PlatformError(f"these processes of containers do not end: {left}")
        time.sleep(0.05)
    return len(roots)


def remove_cgroups() -> int:
    """Remove the control groups of pods, deepest first; they are empty now."""
    count = 0
    root = Path("/sys/fs/cgroup")
    tops = [
        path
        for path in (root / "kubepods", *root.glob("*/kubepods"), *root.glob("*/k8s.io"), root / "k8s.io")
        if path.is_dir()
    ]
    for top in tops:
        folders = [path for path in top.rglob("*") if path.is_dir()]
        for folder in sorted([top, *folders], key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
                count += 1
    return count


def take_down(settings: Settings, report: Report) -> list[str]:
    """Stop and remove everything of the platform but its caches; gives what was done."""
    done: list[str] = []
    pid = services.supervisor_pid(settings)
    if pid is not None:
        report("  stopping the kubelet")
        with contextlib.suppress(xmlrpc.client.Fault, OSError, http.client.HTTPException):
            services.supervisor(settings).stopProcess("kubelet")
    namespaces = network_namespaces(settings)
    names = [bundle.name for bundle in bundles(settings)]
    report("  stopping containers")
    if count := stop_containers(settings):
        done.append(f"{count} pods' containers")
    if pid is not None:
        report("  stopping the supervised processes")
        services.end_process(pid, seconds=60)
        done.append("supervised processes")
    # A container that containerd was starting meanwhile.
    stop_containers(settings)
    mounted = sum(mounts.unmount_below(folder) for folder in (settings.state, *owned_folders(settings)))
    for namespace in namespaces:
        mounted += mounts.unmount_below(namespace)
        namespace.unlink(missing_ok=True)
    if mounted:
        done.append(f"{mounted} mounts")
    if groups := remove_cgroups():
        done.append(f"{groups} control groups")
    if (owned_folders(settings) or (settings.state / "cluster.json").exists()) and (chains := firewall.clean()):
        done.append(f"{chains} firewall chains")
    done += network.take_down(settings)
    for name in names:
        shutil.rmtree(CONTAINERD_RUN / "runc" / NAMESPACE / name, ignore_errors=True)
    for folder in network.made_folders(settings):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (*owned_folders(settings), RUN, settings.state):
        if folder.exists():
            cluster.empty(folder)
            folder.rmdir()
            done.append(f"folder {folder}")
    return done
