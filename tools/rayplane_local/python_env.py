"""Python environments from locked requirements: those of the Ray pods, the gateway, and the platform's services."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from .errors import PlatformError
from .keys import content_key, link
from .progress import Step
from .settings import TOOLS, Settings
from .shell import run_long

# Pods mount the serving environment, and their image (Debian 12, as this machine) has its interpreter at the same path.
INTERPRETER = Path("/usr/bin/python3.11")
RECIPE = 1


def find_uv(settings: Settings) -> Path | None:
    """uv: named by the environment, on the PATH, or where `make` put it."""
    for candidate in (os.environ.get("UV"), shutil.which("uv"), settings.home / "uv" / "bootstrap" / "bin" / "uv"):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    return None


def requirements(name: str) -> Path:
    return TOOLS / name / "requirements.txt"


def key(name: str) -> str:
    return content_key(RECIPE, name, str(INTERPRETER), files=[requirements(name)])


def folder(settings: Settings, name: str) -> Path:
    """Where the environment of that name lies once it is whole."""
    root = settings.home / "serve" if name == "serve" else settings.parts
    return root / (key(name) if name == "serve" else f"{name}-{key(name)}")


def make(settings: Settings, name: str, step: Step) -> None:
    """Make an environment: relocatable, so that it works wherever a pod mounts it, and compiled, because it is mounted
    read-only.

    Two processes that ask at the same time make it once.
    """
    target = folder(settings, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _make(settings, name, target, step)


def _make(settings: Settings, name: str, target: Path, step: Step) -> None:
    uv = find_uv(settings)
    if uv is None:
        raise PlatformError("uv is not there: `make deploy` brings it; by hand, install uv and put it on the PATH.")
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    environment = {
        "UV_CACHE_DIR": str(settings.home / "uv" / "cache"),
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_LINK_MODE": "hardlink",
        # What is compiled stays good whatever times an image gives the files; nobody edits them.
        "PYC_INVALIDATION_MODE": "UNCHECKED_HASH",
    }
    log = settings.build_logs / f"python-{name}.log"
    run_long([uv, "venv", "--relocatable", "--python", INTERPRETER, work], step, log, env=environment)
    run_long(
        [
            uv,
            "pip",
            "install",
            "--python",
            work / "bin" / "python",
            "--no-deps",
            "--require-hashes",
            "--compile-bytecode",
            "-r",
            requirements(name),
        ],
        step,
        log,
        env=environment,
        note=lambda line, count: line[:60],
    )
    work.rename(target)


def publish_serve(settings: Settings) -> list[str]:
    """Point serve/current at the current environment."""
    return ["serve/current"] if link(settings.home / "serve" / "current", folder(settings, "serve")) else []


def prune_serve(settings: Settings) -> None:
    """Remove earlier serving environments. Pods that run have theirs mounted, so this is for when none runs."""
    root = settings.home / "serve"
    for other in root.iterdir() if root.is_dir() else ():
        if other.is_dir() and not other.is_symlink() and other != folder(settings, "serve"):
            shutil.rmtree(other, ignore_errors=True)
