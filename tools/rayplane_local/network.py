"""The platform's own address, and what the kernel must do for pods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .keys import read_json, write_text
from .settings import Settings
from .shell import run

# What the kubelet and kube-proxy switch besides, kept so that it can be put back.
ALSO_CHANGED = (
    "net/ipv4/conf/all/route_localnet",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
# Folders that Kubernetes' programs make wherever they are told to keep their data; those that were not there before go
# again.
MADE_FOLDERS = (
    Path("/run/containerd"),
    Path("/run/netns"),
    Path("/var/log/pods"),
    Path("/var/log/containers"),
    Path("/var/lib/cni"),
    Path("/usr/libexec/kubernetes"),
)
# Forwarding for pods; bridged packets through the firewall rules, so that Services work between pods of one bridge.
SYSCTLS = {"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1"}
POD_BRIDGE = "rayplane-pods"
PROC = Path("/proc/sys")


def before_file(settings: Settings) -> Path:
    """What the machine's settings were before the platform changed them."""
    return settings.state / "before.json"


def has_address(settings: Settings) -> bool:
    shown = run(["ip", "-json", "address", "show", "dev", settings.interface], check=False)
    if shown.returncode != 0:
        return False
    links = json.loads(shown.stdout)
    return any(
        item.get("local") == settings.address for entry in links for item in entry.get("addr_info", [])
    ) and "UP" in links[0].get("flags", [])


def missing_routes(settings: Settings) -> list[str]:
    """The subnets of pods and Services that are not routed to the platform's interface.

    Without the route, a packet to a Service that kube-proxy has no rule for yet leaves by the default route, to whoever
    answers there; the API server then keeps that connection and goes on talking to a stranger.
    """
    shown = run(["ip", "-json", "route", "show", "dev", settings.interface], check=False)
    have = {route["dst"] for route in json.loads(shown.stdout or "[]")} if shown.returncode == 0 else set()
    return [subnet for subnet in (settings.service_subnet, settings.pod_subnet) if subnet not in have]


def pending(settings: Settings) -> list[str]:
    """What is not as the platform needs it."""
    wanted = [] if has_address(settings) else [f"interface {settings.interface} with {settings.address}"]
    wanted += [f"route {subnet}" for subnet in missing_routes(settings)]
    for name, value in SYSCTLS.items():
        file = PROC / name
        if not file.exists() or file.read_text().strip() != value:
            wanted.append(f"{name.replace('/', '.')}={value}")
    return wanted


def set_up(settings: Settings) -> None:
    """Give the platform its address and set the kernel's switches, keeping what they were."""
    if not (PROC / "net/bridge").exists() and shutil.which("modprobe"):
        run(["modprobe", "br_netfilter"], check=False)
    remember(settings)
    if not has_address(settings):
        run(["ip", "link", "add", settings.interface, "type", "bridge"], check=False)
        run(["ip", "address", "replace", f"{settings.address}/32", "dev", settings.interface])
        run(["ip", "link", "set", settings.interface, "up"])
    for subnet in missing_routes(settings):
        run(["ip", "route", "replace", subnet, "dev", settings.interface, "src", settings.address])
    for name, value in SYSCTLS.items():
        if (PROC / name).exists():
            (PROC / name).write_text(value)


def remember(settings: Settings) -> None:
    """Keep what the machine is like, once, before anything of it changes."""
    if before_file(settings).exists():
        return
    kept = [name for name in (*SYSCTLS, *ALSO_CHANGED) if (PROC / name).exists()]
    before = {
        "sysctls": {name: (PROC / name).read_text().strip() for name in kept},
        "folders": [str(folder) for folder in MADE_FOLDERS if folder.exists()],
    }
    write_text(before_file(settings), json.dumps(before, indent=1))


def made_folders(settings: Settings) -> list[Path]:
    """The folders that were not there before the platform."""
    before = read_json(before_file(settings))
    return (
        [folder for folder in MADE_FOLDERS if str(folder) not in before["folders"] and folder.exists()]
        if before
        else []
    )


def take_down(settings: Settings) -> list[str]:
    """Remove the platform's interfaces and put the kernel's switches back."""
    done = []
    for name in (settings.interface, POD_BRIDGE):
        if run(["ip", "link", "show", name], check=False).returncode == 0:
            run(["ip", "link", "delete", name])
            done.append(f"interface {name}")
    before = read_json(before_file(settings)) or {"sysctls": {}}
    for name, value in before["sysctls"].items():
        if (PROC / name).exists() and (PROC / name).read_text().strip() != value:
            (PROC / name).write_text(value)
            done.append(f"{name.replace('/', '.')}={value}")
    return done
