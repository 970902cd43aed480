"""The images of the platform, under upstream's own names, so that unchanged manifests find them."""

from __future__ import annotations

import hashlib
import json
import py_compile
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import mounts, oci, parts, python_env
from .errors import CommandError, PlatformError
from .keys import content_key, read_json, write_text
from .progress import Step
from .settings import TOOLS, Settings
from .shell import run, run_long

SUITE = "bookworm"
# What the Ray pods, kube-proxy, the gateway and Redis find in their image. Ray itself is mounted; KubeRay's probes call
# wget; vLLM wants libnuma, OpenMP and tcmalloc.
BASE_PACKAGES = (
    "ca-certificates",
    "conntrack",
    "iptables",
    "kmod",
    "libgomp1",
    "libnuma1",
    "libtcmalloc-minimal4",
    "procps",
    "python3",
    "redis-server",
    "wget",
)
RAY_USER = 1000
RECIPE = 1
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BUSYBOX = Path("/bin/busybox")

KUBERNETES = f"v{parts.KUBERNETES_VERSION}"
ETCD_TAG = f"{parts.ETCD_VERSION}-0"
COREDNS_TAG = f"v{parts.COREDNS_VERSION}"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10.2"
OPERATOR_IMAGE = f"quay.io/kuberay/operator:v{parts.KUBERAY_VERSION}"
METRICS_SERVER_IMAGE = f"registry.k8s.io/metrics-server/metrics-server:v{parts.METRICS_SERVER_VERSION}"
PROVISIONER_IMAGE = f"docker.io/rancher/local-path-provisioner:v{parts.LOCAL_PATH_VERSION}"
PROMETHEUS_OPERATOR = f"v{parts.PROMETHEUS_OPERATOR_VERSION}"
BUSYBOX_IMAGE = "docker.io/library/busybox:1.35.0"
# Where the gateway's Python environment and its code lie in its image.
GATEWAY_FOLDER = "opt/rayplane/gateway"
CODE_FOLDER = "opt/rayplane/code"
CODE = TOOLS.parent / "serve_app"

_USERS = """\
root:x:0:0:root:/root:/sbin/nologin
nonroot:x:65532:65532:nonroot:/:/sbin/nologin
nobody:x:65534:65534:nobody:/:/sbin/nologin
"""


def base_key() -> str:
    return content_key(RECIPE, SUITE, BASE_PACKAGES, RAY_USER)


def base_file(settings: Settings) -> Path:
    """The root file system that all images with more than one program share: one layer, as a tar file."""
    return settings.images / f"base-{base_key()}.tar"


def make_base(settings: Settings, step: Step) -> None:
    """Make the root file system from Debian's packages, with this machine's own package sources."""
    target = base_file(settings)
    work = settings.images / f".{target.name}.new.tar"
    scratch = settings.images / ".scratch"
    if scratch.exists():  # of a run that was killed
        mounts.unmount_below(scratch)
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    run_long(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(BASE_PACKAGES)}",
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")),
            f'--customize-hook=chroot "$1" useradd --create-home --uid {RAY_USER} --gid 100 --shell /bin/bash ray',
            SUITE,
            work,
        ],
        step,
        settings.build_logs / "base-image.log",
        env={"TMPDIR": str(scratch)},
        note=lambda line, count: line[:60],
    )
    shutil.rmtree(scratch)
    work.rename(target)
    for other in settings.images.glob("*.tar"):
        if other != target:
            other.unlink()


@dataclass(frozen=True)
class Recipe:
    """How one image is made: programs by their path in it, whether it stands on the base, its user and its entry
    point; `python` names an environment of tools/ that goes into it, together with the code of serve_app.
    """

    name: str
    programs: Mapping[str, str]
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    on_base: bool = False
    links: tuple[str, ...] = ()
    path: str = PATH
    directory: str = "/"
    python: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    def key(self, settings: Settings) -> str:
        """Changes with anything that the image is made of; cheap, because parts are keyed themselves."""
        sources = {path: str(source(settings, name).parent.parent.name) for path, name in self.programs.items()}
        base = base_key() if self.on_base else ""
        further = (python_env.key(self.python), code_digests(), dict(self.variables)) if self.python else ()
        return content_key(
            RECIPE,
            self.name,
            sources,
            base,
            self.entrypoint,
            self.user,
            self.links,
            self.path,
            self.directory,
            *further,
        )


def code_files() -> dict[str, Path]:
    """The files of serve_app by their path in it, without what an interpreter left."""
    return {
        str(path.relative_to(CODE)): path
        for path in sorted(CODE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def code_digests() -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in code_files().items()}


def compiled_code() -> dict[str, str | bytes]:
    """serve_app for an image: its files, and what Python makes of them, because the image is read-only."""
    content: dict[str, str | bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in code_files().items():
            inside = f"{CODE_FOLDER}/{CODE.name}/{name}"
            content[inside] = path.read_bytes()
            if path.suffix == ".py":
                made = Path(folder) / "made.pyc"
                # Times of files in an image are no times of change.
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                py_compile.compile(str(path), str(made), f"/{inside}", doraise=True, invalidation_mode=mode)
                cached = Path(inside).parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
                content[str(cached)] = made.read_bytes()
    return content


def source(settings: Settings, name: str) -> Path:
    """The file of a program in an image."""
    return BUSYBOX if name == "busybox" else parts.program(settings, name)


def recipes(settings: Settings) -> list[Recipe]:
    """Every image of the platform."""
    control_plane = [
        Recipe(f"registry.k8s.io/{name}:{KUBERNETES}", {f"usr/local/bin/{name}": name})
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
    ]
    applets = tuple(run([BUSYBOX, "--list"]).stdout.split())
    return [
        *control_plane,
        Recipe(f"registry.k8s.io/kube-proxy:{KUBERNETES}", {"usr/local/bin/kube-proxy": "kube-proxy"}, on_base=True),
        Recipe(f"registry.k8s.io/etcd:{ETCD_TAG}", {"usr/local/bin/etcd": "etcd"}),
        Recipe(f"registry.k8s.io/coredns/coredns:{COREDNS_TAG}", {"coredns": "coredns"}, entrypoint=("/coredns",)),
        Recipe(
            PAUSE_IMAGE,
            {"bin/busybox": "busybox"},
            entrypoint=("/bin/busybox", "sleep", "2147483647"),
            user="65534:65534",
        ),
        Recipe(OPERATOR_IMAGE, {"manager": "kuberay-operator"}, entrypoint=("/manager",), user="65532:65532"),
        Recipe(
            METRICS_SERVER_IMAGE,
            {"metrics-server": "metrics-server"},
            entrypoint=("/metrics-server",),
            user="65534:65534",
        ),
        Recipe(
            PROVISIONER_IMAGE,
            {"usr/bin/local-path-provisioner": "local-path-provisioner"},
            entrypoint=("local-path-provisioner",),
        ),
        Recipe(
            BUSYBOX_IMAGE,
            {"bin/busybox": "busybox"},
            entrypoint=("/bin/sh",),
            links=tuple(f"bin/{name}" for name in applets if name != "busybox"),
        ),
        Recipe(
            settings.ray_image,
            {},
            user=f"{RAY_USER}:100",
            on_base=True,
            path=f"/opt/rayplane/env/bin:{PATH}",
            directory="/home/ray",
            entrypoint=(),
        ),
        Recipe(
            settings.gateway_image,
            {},
            entrypoint=(f"/{GATEWAY_FOLDER}/bin/python", "-m", "serve_app.gateway"),
            user="65532:65532",
            on_base=True,
            python="gateway",
            variables={"PYTHONPATH": f"/{CODE_FOLDER}", "PYTHONUNBUFFERED": "1"},
        ),
        Recipe(settings.redis_image, {}, entrypoint=("redis-server",), user="65532:65532", on_base=True),
    ]


def monitoring_recipes() -> list[Recipe]:
    """The images of what watches the platform."""
    return [
        Recipe(
            f"quay.io/prometheus-operator/prometheus-operator:{PROMETHEUS_OPERATOR}",
            {"bin/operator": "prometheus-operator"},
            entrypoint=("/bin/operator",),
            user="65534:65534",
        ),
        Recipe(
            f"quay.io/prometheus-operator/prometheus-config-reloader:{PROMETHEUS_OPERATOR}",
            {"bin/prometheus-config-reloader": "prometheus-config-reloader"},
            entrypoint=("/bin/prometheus-config-reloader",),
            user="65534:65534",
        ),
        Recipe(
            f"quay.io/prometheus/prometheus:v{parts.PROMETHEUS_VERSION}",
            {"bin/prometheus": "prometheus", "bin/promtool": "promtool"},
            entrypoint=("/bin/prometheus",),
            user="65534:65534",
        ),
        Recipe(
            f"quay.io/prometheus/node-exporter:v{parts.NODE_EXPORTER_VERSION}",
            {"bin/node_exporter": "node_exporter"},
            entrypoint=("/bin/node_exporter",),
            user="65534:65534",
        ),
    ]


def build(settings: Settings, recipe: Recipe, base: oci.Blob | None) -> oci.Image:
    """Turn a recipe into an image."""
    texts: dict[str, str | bytes] = {} if recipe.on_base else {"etc/passwd": _USERS}
    files = {path: source(settings, name) for path, name in recipe.programs.items()}
    layers = [base] if recipe.on_base and base is not None else []
    if files:
        layers.append(oci.layer(files, links=dict.fromkeys(recipe.links, "busybox"), texts=texts))
    if recipe.python:
        # Two layers: the code changes more often than what it stands on.
        environment = python_env.folder(settings, recipe.python)
        layers.append(oci.layer({}, trees={f"opt/rayplane/{recipe.python}": environment}))
        layers.append(oci.layer({}, texts=compiled_code()))
    variables = [f"{name}={value}" for name, value in recipe.variables.items()]
    config: dict[str, object] = {"Env": [f"PATH={recipe.path}", *variables], "WorkingDir": recipe.directory}
    if recipe.entrypoint:
        config["Entrypoint"] = list(recipe.entrypoint)
    if recipe.user:
        config["User"] = recipe.user
    return oci.Image(recipe.name, layers, config)


def ctr(settings: Settings, *words: str) -> Sequence[str]:
    return ("ctr", "--address", str(settings.containerd_socket), "--namespace", "k8s.io", *words)


def stamp(settings: Settings) -> Path:
    """Which key each image was imported under. It lies with containerd's own data: both are removed together."""
    return settings.state / "images.json"


def missing(settings: Settings, wanted: Sequence[Recipe] = ()) -> list[Recipe]:
    """Those of the images wanted, or of all that the platform stands on, that containerd does not hold, or holds from
    other inputs."""
    have = set(run(ctr(settings, "images", "list", "--quiet")).stdout.split())
    keys = read_json(stamp(settings)) or {}
    return [
        recipe
        for recipe in wanted or recipes(settings)
        if recipe.name not in have or keys.get(recipe.name) != recipe.key(settings)
    ]


def load(settings: Settings, wanted: Sequence[Recipe], step: Step, report: Callable[[str], None]) -> None:
    """Make images and stream them into containerd, without a file between."""
    step.note = "hashing"
    base = oci.blob_of_file(base_file(settings)) if any(recipe.on_base for recipe in wanted) else None
    images = [build(settings, recipe, base) for recipe in wanted]
    child = subprocess.Popen(
        ctr(settings, "images", "import", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdin is not None and child.stdout is not None
    output: list[bytes] = []
    reader = threading.Thread(target=lambda stream: output.append(stream.read()), args=(child.stdout,), daemon=True)
    reader.start()

    def note(text: str) -> None:
        step.note = text

    try:
        with child.stdin as stream:
            oci.write_archive(images, stream, note)
    except BrokenPipeError:
        pass  # its own words say why
    step.note = "unpacking"
    status = child.wait()
    reader.join(5)
    if status != 0:
        raise CommandError(
            f"containerd did not take the images: {b''.join(output).decode(errors='replace').strip()[-2000:]}"
        )
    left = set(run(ctr(settings, "images", "list", "--quiet")).stdout.split())
    if lost := [recipe.name for recipe in wanted if recipe.name not in left]:
        raise PlatformError(f"containerd took the archive but does not list {', '.join(lost)}")
    keys = read_json(stamp(settings)) or {}
    write_text(
        stamp(settings),
        json.dumps({**keys, **{recipe.name: recipe.key(settings) for recipe in wanted}}, indent=1, sort_keys=True),
    )
