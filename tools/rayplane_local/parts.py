"""The programs of the platform: which, from which sources, and how each is had (upstream's release file or a build)."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import packages
from .errors import PlatformError
from .keys import KEY_LENGTH, content_key, link
from .progress import Step
from .releases import Release, download
from .settings import TOOLS, Settings
from .shell import run, run_long

KUBERNETES_VERSION = "1.36.3"
ETCD_VERSION = "3.6.14"
COREDNS_VERSION = "1.14.7"
KUBERAY_VERSION = "1.6.2"
METRICS_SERVER_VERSION = "0.9.0"
LOCAL_PATH_VERSION = "0.0.30"
HELM_VERSION = "3.21.4"
PROMETHEUS_OPERATOR_VERSION = "0.93.1"
PROMETHEUS_VERSION = "3.15.1"
NODE_EXPORTER_VERSION = "1.12.1"

KUBERNETES_PROGRAMS = (
    "kubeadm",
    "kubelet",
    "kubectl",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
)

# Raised by hand when the recipe itself changes: it is part of every key.
RECIPE = 2

_VERSION_FLAGS = " ".join(
    f"-X {package}.{name}={value}"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for name, value in {
        "gitVersion": f"v{KUBERNETES_VERSION}",
        "gitMajor": KUBERNETES_VERSION.split(".", maxsplit=1)[0],
        "gitMinor": KUBERNETES_VERSION.split(".")[1],
        "gitTreeState": "clean",
    }.items()
)


@dataclass(frozen=True)
class Part:
    """Programs that come out of a Go module of ours (tools/go/MODULE), or out of one release file of upstream's.

    programs maps a program's name to its package. sources names files and folders of the module `source_module` that
    are kept beside the programs (manifests, CRDs).
    """

    name: str
    programs: Mapping[str, str]
    flags: str = ""
    release: Release | None = None
    source_module: str = ""
    sources: tuple[str, ...] = field(default=())
    # One module holds all that builds against the same k8s.io: every dependency has one version, and is compiled once.
    module_name: str = "platform"
    tags: str = ""

    @property
    def module(self) -> Path:
        return TOOLS / "go" / self.module_name

    def key(self) -> str:
        """Changes with anything that the programs are made of."""
        return content_key(
            RECIPE,
            self.name,
            dict(self.programs),
            self.flags,
            self.source_module,
            self.sources,
            *([self.tags] if self.tags else []),
            files=[self.module / "go.mod", self.module / "go.sum", *sorted((self.module / self.name).glob("*.go"))],
        )


PARTS: tuple[Part, ...] = (
    Part(
        name="kubernetes",
        programs={name: f"k8s.io/kubernetes/cmd/{name}" for name in KUBERNETES_PROGRAMS},
        flags=_VERSION_FLAGS,
        release=Release(
            base="kubernetes",
            file=f"v{KUBERNETES_VERSION}/kubernetes-server-linux-amd64.tar.gz",
            # The changelog with this release's checksum came after its tag; upstream has it beside the file, too.
            checksum=f"sha512:https://dl.k8s.io/v{KUBERNETES_VERSION}/kubernetes-server-linux-amd64.tar.gz.sha512",
            members={name: f"kubernetes/server/bin/{name}" for name in KUBERNETES_PROGRAMS},
        ),
    ),
    Part(
        name="etcd",
        programs={"etcd": "go.etcd.io/etcd/server/v3"},
        release=Release(
            base="etcd",
            file=f"v{ETCD_VERSION}/etcd-v{ETCD_VERSION}-linux-amd64.tar.gz",
            checksum="sha256:ffe840ff9295808e88cce2794a18a5ac87f12a5203c8314d0bf6aa119b41bac5",
            members={"etcd": f"etcd-v{ETCD_VERSION}-linux-amd64/etcd"},
        ),
    ),
    Part(name="coredns", programs={"coredns": "rayplane/tools/platform/coredns"}),
    Part(
        name="kuberay",
        programs={"kuberay-operator": "github.com/ray-project/kuberay/ray-operator"},
        source_module="github.com/ray-project/kuberay/ray-operator",
        sources=("config",),
        module_name="kuberay",
    ),
    Part(
        name="metrics-server",
        programs={"metrics-server": "sigs.k8s.io/metrics-server/cmd/metrics-server"},
        source_module="sigs.k8s.io/metrics-server",
        sources=("manifests/base",),
    ),
    Part(
        name="local-path-provisioner",
        programs={"local-path-provisioner": "github.com/rancher/local-path-provisioner"},
        source_module="github.com/rancher/local-path-provisioner",
        sources=("deploy/local-path-storage.yaml",),
    ),
)

# Built only when somebody asks (`ensure`): the local platform does without them.
ON_DEMAND: tuple[Part, ...] = (
    Part(
        name="helm",
        programs={"helm": "helm.sh/helm/v3/cmd/helm"},
        flags=f"-X helm.sh/helm/v3/internal/version.version=v{HELM_VERSION} "
        f"-X helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor={KUBERNETES_VERSION.split('.', maxsplit=1)[0]} "
        f"-X helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor={KUBERNETES_VERSION.split('.')[1]} "
        f"-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor={KUBERNETES_VERSION.split('.', maxsplit=1)[0]} "
        f"-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor={KUBERNETES_VERSION.split('.')[1]}",
    ),
)

# Made after the models have answered: they wait for nothing that only watches them.
MONITORING: tuple[Part, ...] = (
    Part(
        name="prometheus-operator",
        programs={
            "prometheus-operator": "github.com/prometheus-operator/prometheus-operator/cmd/operator",
            "prometheus-config-reloader": (
                "github.com/prometheus-operator/prometheus-operator/cmd/prometheus-config-reloader"
            ),
        },
        source_module="github.com/prometheus-operator/prometheus-operator",
        sources=("bundle.yaml", "kustomization.yaml"),
        module_name="monitoring",
    ),
    Part(
        name="prometheus",
        programs={
            "prometheus": "github.com/prometheus/prometheus/cmd/prometheus",
            "promtool": "github.com/prometheus/prometheus/cmd/promtool",
        },
        flags=f"-X github.com/prometheus/common/version.Version={PROMETHEUS_VERSION}",
        module_name="monitoring",
        # Of all that it can discover, Kubernetes alone: the SDKs of the clouds are most of its size.
        tags="netgo,remove_all_sd,enable_kubernetes_sd",
    ),
    Part(
        name="node-exporter",
        programs={"node_exporter": "github.com/prometheus/node_exporter"},
        flags=f"-X github.com/prometheus/common/version.Version={NODE_EXPORTER_VERSION}",
        module_name="monitoring",
    ),
)

ALL: tuple[Part, ...] = (*PARTS, *ON_DEMAND, *MONITORING)

# Programs that a person or the platform runs on the machine itself; the others only run in images.
ON_THE_MACHINE = ("kubeadm", "kubelet", "kubectl")


def part(name: str) -> Part:
    """The part of that name."""
    return next(item for item in ALL if item.name == name)


def folder(settings: Settings, item: Part) -> Path | None:
    """Where a part lies ready, or None. A folder is renamed to its name last, so one that is there is whole."""
    origins = {
        "auto": ("release", "build"),
        "release": ("release", "build") if item.release is None else ("release",),
        "build": ("build",),
    }
    for origin in origins[settings.source]:
        path = settings.parts / f"{item.name}-{item.key()}-{origin}"
        if path.is_dir():
            return path
    return None


def ready_folder(settings: Settings, item: Part) -> Path:
    """Where a part lies; raises PlatformError where it has not been made yet."""
    path = folder(settings, item)
    if path is None:
        raise PlatformError(f"{item.name} is not there yet: the stage `artefacts` makes it")
    return path


def program(settings: Settings, name: str) -> Path:
    """The path of one program."""
    item = next(item for item in ALL if name in item.programs)
    return ready_folder(settings, item) / "bin" / name


def go_environment(settings: Settings, caches: Path | None = None) -> dict[str, str]:
    """Go's caches lie in the platform's home, where they can be found and cleaned, or in the folder `caches`.

    Compilers and linkers live for seconds: below 2 GiB they collect no garbage. A build alone is hardly quicker by
    that, but it leaves a third of the processor's time to what runs beside it.
    """
    caches = caches or settings.home / "go"
    return {
        "GOCACHE": str(caches / "build"),
        "GOMODCACHE": str(caches / "mod"),
        "GOFLAGS": "-mod=readonly -buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "CGO_ENABLED": "0",
        "GOGC": "off",
        "GOMEMLIMIT": "2GiB",
    }


def go_needed() -> tuple[int, int, int]:
    """The newest Go version that one of the modules asks for."""
    found = [
        re.search(r"^go (\d+)\.(\d+)(?:\.(\d+))?$", (item.module / "go.mod").read_text(), re.MULTILINE) for item in ALL
    ]
    return max((int(match[1]), int(match[2]), int(match[3] or 0)) for match in found if match)


def find_go(settings: Settings) -> Path | None:
    """A Go toolchain that is new enough: the machine's own, or the one that `fetch_go` put into the platform's home."""
    for candidate in (shutil.which("go"), settings.home / "go" / "toolchain" / "bin" / "go"):
        if candidate and Path(candidate).is_file():
            match = re.match(
                r"go(\d+)\.(\d+)(?:\.(\d+))?",
                run([candidate, "env", "GOVERSION"], env={"GOTOOLCHAIN": "local"}, check=False).stdout,
            )
            if match and (int(match[1]), int(match[2]), int(match[3] or 0)) >= go_needed():
                return Path(candidate)
    return None


def build(settings: Settings, item: Part, go: Path, step: Step, caches: Path | None = None) -> None:
    """Build a part's programs from its module; Go's caches lie in the folder `caches` where one is given."""
    target = settings.parts / f"{item.name}-{item.key()}-build"
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    (work / "bin").mkdir(parents=True)
    environment = go_environment(settings, caches)
    # No debugging data: the linker would drop it, and making it is a tenth of the compiler's work.
    flags = ["-trimpath", "-gcflags", "all=-dwarf=false", "-ldflags", f"-s -w {item.flags}".strip()]
    flags += [f"-tags={item.tags}"] if item.tags else []

    def note(line: str, count: int) -> str:
        return (
            f"{line[12:].split(maxsplit=1)[0]} fetched"
            if line.startswith("go: downloading")
            else f"{count} packages compiled"
        )

    run_long(
        [go, "build", "-v", *flags, "-o", f"{work}/bin/", *item.programs.values()],
        step,
        settings.build_logs / f"build-{item.name}.log",
        env=environment,
        cwd=item.module,
        note=note,
    )
    for name, package in item.programs.items():
        # Go names a program after its package's last element that is no version (see `go help build`).
        elements = [element for element in package.split("/") if not re.fullmatch(r"v\d+", element)]
        built = work / "bin" / elements[-1]
        if built.name != name:
            built.rename(work / "bin" / name)
    copy_sources(settings, item, go, work)
    publish(work, target)


def ensure_go(settings: Settings, step: Step) -> Path:
    """A Go toolchain that is new enough, fetched first where the machine has none."""
    if find_go(settings) is None:
        packages.fetch_go(settings, step)
    go = find_go(settings)
    if go is None:
        raise PlatformError("no Go toolchain that is new enough was found")
    return go


def ensure(settings: Settings, name: str, step: Step | None = None) -> Path:
    """The path of a program of `ON_DEMAND`, built first where it has not been.

    Two processes that ask at the same time build it once. The platform's Go caches are used where they were kept;
    otherwise the build's own are dropped after it, as those of a deployment are.
    """
    item = next(item for item in ON_DEMAND if name in item.programs)
    settings.parts.mkdir(parents=True, exist_ok=True)
    with (settings.parts / f".{item.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder(settings, item) is None:
            step = step or Step(f"build {name}")
            go = ensure_go(settings, step)
            kept = (settings.home / "go" / "build").is_dir()
            caches = settings.home / "go" if kept else settings.parts / f".{item.name}.caches"
            try:
                build(settings, item, go, step, caches)
            finally:
                if not kept:
                    drop_go_caches(caches)
                    shutil.rmtree(caches, ignore_errors=True)
            prune(settings, (item,))
    return program(settings, name)


def drop_go_caches(caches: Path) -> None:
    """Remove Go's caches in a folder: gigabytes that only another build of the same sources would use."""
    for name in ("build", "mod"):
        for path in (caches / name).rglob("*"):  # Go makes its module cache read-only
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(caches / name, ignore_errors=True)


def copy_sources(settings: Settings, item: Part, go: Path, work: Path) -> None:
    """Keep a module's manifests beside its programs: the module cache may be cleared."""
    if not item.sources:
        return
    module = run(
        [go, "list", "-m", "-f", "{{.Dir}}", item.source_module],
        env=go_environment(settings),
        cwd=item.module,
        timeout=300,
    ).stdout.strip()
    for name in item.sources:
        source, target = Path(module) / name, work / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    for path in (work / "source").rglob("*"):  # the module cache is read-only
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def publish(work: Path, target: Path) -> None:
    """Give finished work its name, in one step, and drop what earlier keys left."""
    for path in sorted(work.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)


def take_release(settings: Settings, item: Part, step: Step) -> None:
    """Download upstream's release file, check it against its checksum, and take the programs out of it."""
    release = item.release
    if release is None:
        raise PlatformError(f"{item.name} has no release file")
    archive = settings.home / "downloads" / release.file.replace("/", "-")
    download(release, settings, archive, step)
    target = settings.parts / f"{item.name}-{item.key()}-release"
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    (work / "bin").mkdir(parents=True)
    step.note = "unpacking"
    wanted = {member: name for name, member in release.members.items()}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            name = wanted.pop(member.name, None)
            stream = tar.extractfile(member) if name is not None else None
            if name is not None and stream is not None:
                with (work / "bin" / name).open("wb") as output:
                    shutil.copyfileobj(stream, output, 1 << 20)
                (work / "bin" / name).chmod(0o755)
    if wanted:
        raise PlatformError(f"{release.file} holds no {', '.join(sorted(wanted))}")
    publish(work, target)
    archive.unlink()


def link_programs(settings: Settings) -> list[str]:
    """Point bin/ and sources/ at the current parts; gives the names that changed."""
    changed = [f"bin/{name}" for name in ON_THE_MACHINE if link(settings.bin / name, program(settings, name))]
    return changed + link_sources(settings, PARTS)


def link_sources(settings: Settings, items: Iterable[Part]) -> list[str]:
    """Point sources/ at the current parts; gives the names that changed."""
    changed = []
    for item in items:
        if item.sources and link(settings.home / "sources" / item.name, ready_folder(settings, item) / "source"):
            changed += [f"sources/{item.name}"]
    return changed


def prune(settings: Settings, items: Iterable[Part] = PARTS) -> None:
    """Remove parts of earlier keys, and what cut-off builds left."""
    for item in items:
        key = "?" * KEY_LENGTH  # other parts' names may begin with this one's
        for pattern in (f"{item.name}-{key}-build", f"{item.name}-{key}-release", f".{item.name}-{key}-*.new"):
            for path in settings.parts.glob(pattern):
                if path.name.startswith(".") or item.key() not in path.name:
                    shutil.rmtree(path, ignore_errors=True)
