"""The stages of the local platform, in order: what each would do, and doing it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import addons, checks, cluster, down, images, model, packages, parts, python_env, releases, services
from .errors import PlatformError
from .graph import Work, run_graph
from .progress import Report, Step, table
from .settings import Settings


@dataclass
class Result:
    """What a stage did, or (when only planning) would do."""

    actions: list[str]
    times: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage: a plan that changes nothing, and the doing."""

    name: str
    title: str
    plan: Callable[[Settings], list[str]]
    apply: Callable[[Settings, Report], Result]


def one_step(name: str, action: Callable[[Step], object], report: Report) -> dict[str, float]:
    """Run one piece of work with progress lines."""
    return run_graph([Work(name, lambda step: (action(step), None)[1])], report)


def plan_check(settings: Settings) -> list[str]:
    checks.check(settings)
    return []


def check(settings: Settings, report: Report) -> Result:
    return Result(plan_check(settings))


def install_packages(settings: Settings, report: Report) -> Result:
    wanted = packages.missing()
    if not wanted:
        return Result([])
    times = one_step("system packages", lambda step: packages.install(settings, wanted, step), report)
    return Result([f"package {name}" for name in wanted], times)


def from_release(settings: Settings) -> set[str]:
    """The parts to take from upstream's release files; asks upstream only where the answer matters."""
    wanted = [part for part in parts.PARTS if part.release is not None and parts.folder(settings, part) is None]
    if not wanted or settings.source == "build":
        return set()
    if settings.source == "release" or releases.reachable([part.release for part in wanted if part.release], settings):
        return {part.name for part in wanted}
    return set()


def artefacts_works(settings: Settings, released: set[str]) -> list[Work]:
    """The work that is left: what lies ready is not in it."""
    works: list[Work] = []
    built = [part for part in parts.PARTS if parts.folder(settings, part) is None]
    to_build = [part for part in built if part.name not in released]
    works += [
        Work(f"python {name}", partial(python_env.make, settings, name), lane="download")
        for name in ("services", "gateway")
        if not python_env.folder(settings, name).is_dir()
    ]
    if not images.base_file(settings).is_file():
        works.append(Work("base image", lambda step: images.make_base(settings, step), lane="download"))
    works += [
        Work(f"release {part.name}", partial(parts.take_release, settings, part), lane="download")
        for part in built
        if part.name in released
    ]
    serve = not python_env.folder(settings, "serve").is_dir()
    if serve:
        works.append(Work("python serve", lambda step: python_env.make(settings, "serve", step), lane="download"))
    if not model.is_ready(settings):
        works.append(
            Work(
                "model",
                lambda step: model.make(settings, step),
                lane="download",
                needs=("python serve",) if serve else (),
            )
        )
    return works + build_works(settings, to_build)


def build_works(settings: Settings, to_build: Sequence[parts.Part]) -> list[Work]:
    """The work of building parts, and of fetching Go first where the machine has none."""
    works: list[Work] = []
    go_step: tuple[str, ...] = ()
    if to_build and parts.find_go(settings) is None:
        works.append(Work("go toolchain", lambda step: packages.fetch_go(settings, step), lane="compute"))
        go_step = ("go toolchain",)
    # KubeRay's module shares only Go's own packages with the other, so the two are built beside each other.
    return works + [
        Work(
            f"build {part.name}",
            partial(build, settings, part),
            lane="download" if part.module_name == "kuberay" else "compute",
            needs=go_step,
        )
        for part in to_build
    ]


def build(settings: Settings, part: parts.Part, step: Step) -> None:
    go = parts.find_go(settings)
    if go is None:
        raise PlatformError("no Go toolchain that is new enough was found")
    parts.build(settings, part, go, step)


def links_pending(settings: Settings) -> bool:
    expected: dict[Path, Path | None] = {settings.home / "serve" / "current": python_env.folder(settings, "serve")}
    for name in parts.ON_THE_MACHINE:
        folder = parts.folder(settings, next(item for item in parts.PARTS if name in item.programs))
        expected[settings.bin / name] = folder / "bin" / name if folder else None
    for item in parts.PARTS:
        if item.sources:
            folder = parts.folder(settings, item)
            expected[settings.home / "sources" / item.name] = folder / "source" if folder else None
    return any(not link.is_symlink() or link.readlink() != target for link, target in expected.items())


def plan_artefacts(settings: Settings) -> list[str]:
    works = [work.name for work in artefacts_works(settings, from_release(settings))]
    return works or (["links to the current parts"] if links_pending(settings) else [])


def artefacts(settings: Settings, report: Report) -> Result:
    released = from_release(settings)
    works = artefacts_works(settings, released)
    times: dict[str, float] = {}
    if works:
        report(f"  to do: {', '.join(work.name for work in works)}")
        times = run_graph(works, report)
    changed = [*[work.name for work in works], *parts.link_programs(settings), *python_env.publish_serve(settings)]
    if not down.bundles(settings):
        python_env.prune_serve(settings)
    if works:
        parts.prune(settings)
        for line in table(times):
            report(line)
        if not settings.keep_build_cache:
            drop_build_cache(settings)
    return Result(changed, times)


def drop_build_cache(settings: Settings) -> None:
    """Free the gigabytes that only another build of the same sources would use."""
    parts.drop_go_caches(settings.home / "go")
    shutil.rmtree(settings.home / "downloads", ignore_errors=True)


def start_services(settings: Settings, report: Report) -> Result:
    pending = services.pending(settings)
    if not pending:
        return Result([])
    return Result(pending, one_step("services", lambda step: services.start(settings, step), report))


def lacks_artefacts(settings: Settings) -> bool:
    """Whether something that the later stages run is still to be made."""
    environments = (python_env.folder(settings, name) for name in ("services", "gateway"))
    return not all(folder.is_dir() for folder in environments) or any(
        parts.folder(settings, part) is None for part in parts.PARTS
    )


def plan_services(settings: Settings) -> list[str]:
    return (
        [f"process {name}" for name in services.PROGRAMS] if lacks_artefacts(settings) else services.pending(settings)
    )


def plan_images(settings: Settings) -> list[str]:
    if services.states(settings).get("containerd") != "RUNNING" or lacks_artefacts(settings):
        return ["images: what containerd lacks"]
    return [f"image {recipe.name}" for recipe in images.missing(settings)]


def load_images(settings: Settings, report: Report) -> Result:
    wanted = images.missing(settings)
    if not wanted:
        return Result([])
    times = one_step("images", lambda step: images.load(settings, wanted, step, report), report)
    return Result([f"image {recipe.name}" for recipe in wanted], times)


def start_cluster(settings: Settings, report: Report) -> Result:
    if not cluster.pending(settings):
        return Result([])
    done: list[str] = []
    times = one_step("cluster", lambda step: done.extend(cluster.init(settings, step)), report)
    return Result(done, times)


def apply_addons(settings: Settings, report: Report) -> Result:
    pending = addons.pending(settings)
    if not pending:
        return Result([])
    return Result(pending, one_step("add-ons", lambda step: addons.apply(settings, step), report))


def plan_monitoring(settings: Settings) -> list[str]:
    to_build = [part for part in parts.MONITORING if parts.folder(settings, part) is None]
    if to_build:
        return [*(f"build {part.name}" for part in to_build), *(f"image {r.name}" for r in images.monitoring_recipes())]
    return [f"image {recipe.name}" for recipe in images.missing(settings, images.monitoring_recipes())]


def make_monitoring(settings: Settings, report: Report) -> Result:
    to_build = [part for part in parts.MONITORING if parts.folder(settings, part) is None]
    times: dict[str, float] = {}
    if to_build:
        times = run_graph(build_works(settings, to_build), report)
        parts.prune(settings, parts.MONITORING)
        if not settings.keep_build_cache:
            drop_build_cache(settings)
    done = [f"build {part.name}" for part in to_build] + parts.link_sources(settings, parts.MONITORING)
    wanted = images.missing(settings, images.monitoring_recipes())
    if wanted:
        times |= one_step("images", lambda step: images.load(settings, wanted, step, report), report)
    return Result([*done, *(f"image {recipe.name}" for recipe in wanted)], times)


STAGES: tuple[Stage, ...] = (
    Stage("check", "this machine can carry the platform", plan_check, check),
    Stage(
        "packages",
        "system packages",
        lambda settings: [f"package {name}" for name in packages.missing()],
        install_packages,
    ),
    Stage("artefacts", "programs, Python environments, base image, model", plan_artefacts, artefacts),
    Stage("services", "containerd, kubelet, AWS emulator", plan_services, start_services),
    Stage("images", "container images", plan_images, load_images),
    Stage("cluster", "Kubernetes", cluster.pending, start_cluster),
    Stage("addons", "StorageClass and metrics", addons.pending, apply_addons),
    Stage("monitoring", "programs and images of monitoring", plan_monitoring, make_monitoring),
)


def stage(name: str) -> Stage:
    """The stage of that name."""
    for item in STAGES:
        if item.name == name:
            return item
    raise ValueError(f"no stage {name!r}: there are {', '.join(item.name for item in STAGES)}")
