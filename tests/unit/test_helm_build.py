"""The module helm_build: what it runs and when again, what it makes of the output, what its errors say."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.kube.build import BuildError, parse
from ansible_collections.rayplane.platform.plugins.modules.helm_build import chart_state, command_of, fit, rendered
from rayplane_local import parts
from rayplane_local.settings import Settings

Json = dict[str, Any]

OUTPUT = """\
---
# Source: a chart
apiVersion: apps/v1
kind: Deployment
metadata: {name: a, labels: {built: 2026-01-02}}
---
---
apiVersion: v1
kind: ConfigMapList
items:
  - {apiVersion: v1, kind: ConfigMap, metadata: {name: c, namespace: elsewhere}, data: {operator: =}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: hook, annotations: {helm.sh/hook: "pre-install"}}
"""


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    folder = tmp_path / "chart"
    (folder / "templates").mkdir(parents=True)
    (folder / "Chart.yaml").write_text("name: x")
    (folder / "templates" / "a.yaml").write_text("a")
    return folder


@pytest.fixture
def helm(tmp_path: Path) -> Path:
    """A helm that notes how it was called and prints OUTPUT."""
    program = tmp_path / "helm"
    (tmp_path / "output").write_text(OUTPUT)
    program.write_text(f'#!/bin/sh\ncat >> {tmp_path}/stdin\necho "$@" >> {tmp_path}/calls\ncat {tmp_path}/output\n')
    program.chmod(0o755)
    return program


def asked(chart: Path | str, helm: Path | str, cache: Path, **changes: Any) -> Json:
    return {
        "chart": str(chart),
        "repo_url": "",
        "version": "",
        "release": "r",
        "namespace": "ns",
        "values": {},
        "include_crds": True,
        "kube_version": "1.34",
        "api_versions": [],
        "cluster_scoped": [],
        "leave_out": [],
        "helm": str(helm),
        "cache_dir": str(cache),
    } | changes


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_a_chart_becomes_objects_without_hooks_lists_and_missing_namespaces(
    chart: Path, helm: Path, tmp_path: Path
) -> None:
    path, objects = rendered(asked(chart, helm, tmp_path / "cache", values={"secret": "s3cret"}))
    assert [(item["kind"], item["metadata"]["namespace"]) for item in objects] == [
        ("Deployment", "ns"),
        ("ConfigMap", "elsewhere"),
    ]
    assert objects[0]["metadata"]["labels"] == {"built": "2026-01-02"}  # a date stays what was written
    assert objects[1]["data"] == {"operator": "="}
    assert json.loads(path.read_text()) == objects
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert calls(tmp_path) == [
        f"template r {chart} --namespace ns --values - --kube-version 1.34 --include-crds"
    ]  # values never stand on a command line
    assert json.loads((tmp_path / "stdin").read_text()) == {"secret": "s3cret"}
    _, without = rendered(asked(chart, helm, tmp_path / "cache", leave_out=["Deployment"]))
    assert without == objects[1:]


def test_it_is_rendered_again_only_when_something_it_depends_on_changed(
    chart: Path, helm: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first, _ = rendered(asked(chart, helm, cache))
    assert rendered(asked(chart, helm, cache))[0] == first
    os.utime(chart / "templates" / "a.yaml", (1, 1))  # a fresh checkout is the same chart
    assert rendered(asked(chart, helm, cache))[0] == first
    assert len(calls(tmp_path)) == 1
    variants: list[Json] = [
        {"values": {"a": 1}},
        {"namespace": "other"},
        {"release": "s"},
        {"include_crds": False},
        {"kube_version": "1.33"},
        {"api_versions": ["monitoring.coreos.com/v1"]},
        {"leave_out": ["Deployment"]},
    ]
    for number, changes in enumerate(variants, start=2):
        assert rendered(asked(chart, helm, cache, **changes))[0] != first
        assert len(calls(tmp_path)) == number, changes
    (chart / "templates" / "a.yaml").write_text("b")
    assert rendered(asked(chart, helm, cache))[0] != first
    before = len(calls(tmp_path))
    helm.write_text(helm.read_text() + "\n")
    rendered(asked(chart, helm, cache))
    assert len(calls(tmp_path)) == before + 1


def test_a_file_added_to_or_taken_from_a_folder_counts(chart: Path) -> None:
    seen = [chart_state(str(chart), "", "")]
    (chart / "crds").mkdir()
    (chart / "crds" / "c.yaml").write_text("c")
    seen.append(chart_state(str(chart), "", ""))
    (chart / "crds" / "c.yaml").rename(chart / "crds" / "d.yaml")
    seen.append(chart_state(str(chart), "", ""))
    assert len({json.dumps(state) for state in seen}) == 3


def test_what_is_fetched_is_known_by_its_pinned_version(tmp_path: Path) -> None:
    assert chart_state("x", "v1.2.3", "https://r") != chart_state("x", "v1.2.4", "https://r")
    assert chart_state("oci://r/x", "1.2.3", "") == chart_state("oci://r/x", "1.2.3", "")
    for version in ("", "1", "^1.2.0", ">=1.0.0", "latest"):
        with pytest.raises(BuildError, match="exact version"):
            chart_state("oci://r/x", version, "")
    with pytest.raises(BuildError, match="Give repo_url"):
        chart_state("gpu-operator", "1.2.3", "")
    with pytest.raises(BuildError, match="no such file"):
        chart_state(str(tmp_path / "none.tgz"), "", "")
    with pytest.raises(BuildError, match=r"no Chart\.yaml"):
        chart_state(str(tmp_path), "", "")


def test_the_command_line() -> None:
    given = asked(
        "x", "helm", Path("/c"), repo_url="https://r", version="1.2.3", include_crds=False, api_versions=["a/v1"]
    )
    assert " ".join(command_of(given)) == (
        "helm template r x --namespace ns --values - --kube-version 1.34 "
        "--repo https://r --version 1.2.3 --api-versions a/v1"
    )


def test_a_version_is_not_asked_of_a_chart_that_is_here(chart: Path) -> None:
    assert "--version" not in command_of(asked(chart, "helm", Path("/c"), version="9.9.9"))


def test_kinds_without_a_namespace_get_none() -> None:
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "p", "annotations": {"helm.sh/hook": "crd-install"}},
        "spec": {"scope": "Cluster", "names": {"kind": "Policy"}},
    }
    objects: list[Json] = [
        {"apiVersion": "x/v1", "kind": "Policy", "metadata": {"name": "p", "namespace": "wrong"}},
        crd,
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "r"}},
        {"apiVersion": "y/v1", "kind": "Global", "metadata": {"name": "g"}},
        {"apiVersion": "y/v1", "kind": "Local", "metadata": {"name": "l"}},
    ]
    found = {item["kind"]: item["metadata"].get("namespace") for item in fit(objects, "ns", ["Global"])}
    assert found == {
        "Policy": None,
        "CustomResourceDefinition": None,
        "ClusterRole": None,
        "Global": None,
        "Local": "ns",
    }


def test_errors_tell_what_helm_said_and_the_cure(chart: Path, tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'Error: values do not meet the schema' >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(BuildError, match=r"values do not meet the schema.*helm dependency build"):
        rendered(asked(chart, failing, tmp_path / "cache"))
    with pytest.raises(BuildError, match="no-such-helm is not installed") as caught:
        rendered(asked("oci://r/x", "no-such-helm", tmp_path / "cache", version="1.2.3"))
    assert "is reached from here" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_output_that_is_no_object_is_an_error() -> None:
    with pytest.raises(BuildError, match="no Kubernetes object"):
        parse("just: text")
    with pytest.raises(BuildError, match="not YAML"):
        parse("a: [")
    assert parse("") == []


# The helm that is built for this machine where somebody asks


def test_helm_is_built_on_demand_only() -> None:
    assert "helm" not in {part.name for part in parts.PARTS}
    assert f"helm.sh/helm/v3 v{parts.HELM_VERSION}" in (parts.part("helm").module / "go.mod").read_text()


@pytest.mark.parametrize("kept", [True, False])
def test_helm_is_built_once_and_leaves_only_caches_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    settings = Settings(home=tmp_path)
    kept_cache = tmp_path / "go" / "build" / "kept"
    if kept:
        kept_cache.mkdir(parents=True)
    built: list[Path] = []

    def build(settings: Settings, item: parts.Part, go: Path, step: Any, caches: Path) -> None:
        built.append(caches)
        (caches / "mod" / "read-only").mkdir(parents=True)
        (caches / "mod" / "read-only").chmod(0o555)
        program = settings.parts / f"helm-{item.key()}-build" / "bin" / "helm"
        program.parent.mkdir(parents=True)
        program.touch()

    monkeypatch.setattr(parts, "find_go", lambda _: Path("/go"))
    monkeypatch.setattr(parts, "build", build)
    stale = settings.parts / "helm-0123456789abcdef-build"
    stale.mkdir(parents=True)
    path = parts.ensure(settings, "helm")
    assert parts.ensure(settings, "helm") == path
    assert path.is_file()
    assert len(built) == 1
    assert not stale.exists()
    assert kept_cache.is_dir() is kept
    assert built[0].exists() is kept
