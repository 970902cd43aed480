"""The local model: SmolLM2-135M-Instruct (Apache-2.0), from a Python package that ships it, as vLLM reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import python_env
from .keys import content_key, read_json, write_text
from .progress import Step
from .settings import TOOLS, Settings
from .shell import run_long

NAME = "smollm2-135m-instruct"
CONVERTER = Path(__file__).with_name("gguf_to_safetensors.py")
REQUIREMENTS = TOOLS / "model" / "requirements.txt"


def key() -> str:
    return content_key(NAME, files=[REQUIREMENTS, CONVERTER])


def folder(settings: Settings) -> Path:
    return settings.home / "models" / NAME


def stamp(settings: Settings) -> Path:
    """Beside the folder, not in it: the folder's content is the model, and its digest is the model's version."""
    return settings.home / "models" / f".{NAME}.key"


def is_ready(settings: Settings) -> bool:
    return folder(settings).is_dir() and read_json(stamp(settings)) == key()


def make(settings: Settings, step: Step) -> None:
    """Fetch the package and turn its GGUF file into safetensors."""
    uv = python_env.find_uv(settings)
    assert uv is not None, "the serving environment comes first and needs uv"
    work = folder(settings).with_name(f".{NAME}.new")
    shutil.rmtree(work, ignore_errors=True)
    package = work / "package"
    package.mkdir(parents=True)
    python = python_env.folder(settings, "serve") / "bin" / "python"
    log = settings.build_logs / "model.log"
    environment = {
        "UV_CACHE_DIR": str(settings.home / "uv" / "cache"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    step.note = "fetching"
    run_long(
        [
            uv,
            "pip",
            "install",
            "--python",
            python,
            "--target",
            package,
            "--no-deps",
            "--require-hashes",
            "-r",
            REQUIREMENTS,
        ],
        step,
        log,
        env=environment,
    )
    step.note = "converting"
    run_long([python, CONVERTER, package, work / "model"], step, log, env=environment)
    stamp(settings).unlink(missing_ok=True)
    shutil.rmtree(folder(settings), ignore_errors=True)
    (work / "model").rename(folder(settings))
    shutil.rmtree(work)
    write_text(stamp(settings), f'"{key()}"')
