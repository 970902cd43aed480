#!/usr/bin/python
"""Render a Helm chart into a file of objects for k8s_apply_set."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: helm_build
short_description: Render a Helm chart into a JSON file of objects
description:
  - Runs C(helm template). Hooks are left out (nothing runs them; what CRDs carry a hook annotation stay), lists are
    taken apart, and a namespaced object without a namespace is put into the release's.
  - The result is kept under a name made of everything it depends on (contents of a chart that is here, pinned version
    of one that is fetched, values, the helm itself), so a rerun renders nothing. Nothing but that cache is written.
options:
  chart:
    description: A folder, a C(.tgz) file, an C(oci://) address, or the name of a chart in O(repo_url).
    type: str
    required: true
  repo_url:
    description: Address of the repository, where the chart is named.
    type: str
    default: ""
  version:
    description: Version of a chart that is fetched; it has to be given there.
    type: str
    default: ""
  release:
    description: Name of the release, as the chart's templates see it.
    type: str
    required: true
  namespace:
    description: Namespace of the release.
    type: str
    required: true
  values:
    description: Values that differ from the chart's. They are given to helm on its standard input.
    type: dict
    default: {}
  include_crds:
    description: Whether the CRDs of the chart's C(crds) folder are objects too.
    type: bool
    default: true
  kube_version:
    description: Kubernetes version that the chart renders for.
    type: str
    default: "1.36"
  api_versions:
    description: API versions that the chart is told the cluster has (such as C(monitoring.coreos.com/v1)).
    type: list
    elements: str
    default: []
  leave_out:
    description: Kinds of which the chart's objects are left out, because somebody else makes them.
    type: list
    elements: str
    default: []
  cluster_scoped:
    description: Custom kinds without a namespace whose CRDs are not in the chart.
    type: list
    elements: str
    default: []
  helm:
    description: The helm to run.
    type: str
    default: helm
  cache_dir:
    description: Folder for rendered charts.
    type: path
    required: true
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Renders as otherwise; only the cache is written.
"""

EXAMPLES = r"""
- name: Render the GPU operator
  rayplane.platform.helm_build:
    chart: gpu-operator
    repo_url: https://helm.ngc.nvidia.com/nvidia
    version: v26.7.0
    release: gpu-operator
    namespace: gpu-system
    values: {driver: {enabled: false}}
    cache_dir: /var/cache/rayplane/helm
"""

RETURN = r"""
path:
  description: The JSON file with the list of objects.
  type: str
  returned: always
deployments:
  description: Names of the Deployments in it.
  type: list
  returned: always
daemonsets:
  description: Names of the DaemonSets in it.
  type: list
  returned: always
crds:
  description: Names of the CustomResourceDefinitions in it.
  type: list
  returned: always
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.kube.build import (
    CLUSTER_SCOPED,
    BuildError,
    Json,
    cached,
    names,
    parse,
    run_builder,
)

HOOK = "helm.sh/hook"


def chart_state(chart: str, version: str, repo_url: str) -> list[str]:
    """What stands for the chart's content: names and contents of its files where it is here, else its address and
    version.

    Raises BuildError where neither tells.
    """
    path = Path(chart)
    looks_local = chart.endswith(".tgz") or chart.startswith((".", "/", "~"))
    if path.is_dir() and not repo_url:
        if not (path / "Chart.yaml").is_file():
            raise BuildError("the folder holds no Chart.yaml. Give the folder of a chart.")
        digest = hashlib.sha256()
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            digest.update(f"\0{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
        return ["folder", path.resolve().name, digest.hexdigest()]
    if path.is_file() and not repo_url:
        return ["file", hashlib.sha256(path.read_bytes()).hexdigest()]
    if looks_local and not repo_url:
        raise BuildError("there is no such file or folder here. Give a path that exists.")
    if not chart.startswith("oci://") and not repo_url:
        raise BuildError(
            "this is neither a path that exists here nor an oci:// address. "
            "Give repo_url, the address of the repository that has it."
        )
    if not re.fullmatch(r"v?\d+\.\d+\.\d+([-+].*)?", version):
        raise BuildError(
            f"version is {version!r}. A chart that is fetched needs an exact version (1.2.3): "
            "another one would change the deployment without anybody's doing."
        )
    return ["address", repo_url, chart, version]


def helm_state(helm: str) -> list[Any]:
    """What stands for the helm itself: another helm may render otherwise."""
    found = shutil.which(helm)
    if found is None:
        return []
    status = Path(found).resolve().stat()
    return [status.st_size, status.st_mtime_ns]


def command_of(given: Json) -> list[str]:
    """The `helm template` command line; the values come on standard input."""
    command = [given["helm"], "template", given["release"], given["chart"], "--namespace", given["namespace"]]
    command += ["--values", "-", "--kube-version", given["kube_version"]]
    if given["include_crds"]:
        command.append("--include-crds")
    for key, option in (("repo_url", "--repo"), ("version", "--version")):
        # A chart that is here has one version, and helm refuses the option for one that differs.
        if given[key] and not (key == "version" and Path(given["chart"]).exists() and not given["repo_url"]):
            command += [option, given[key]]
    for version in given["api_versions"]:
        command += ["--api-versions", version]
    return command


def fit(
    objects: list[Json], namespace: str, cluster_scoped: Iterable[str] = (), leave_out: Sequence[str] = ()
) -> list[Json]:
    """Leave out hooks and the kinds of ``leave_out``, and put namespaced objects without a namespace into
    ``namespace``, as `helm install` does."""
    without = CLUSTER_SCOPED | set(cluster_scoped)
    for item in objects:
        if item["kind"] == "CustomResourceDefinition" and item["spec"].get("scope") == "Cluster":
            without |= {item["spec"]["names"]["kind"]}
    kept = []
    for item in objects:
        meta = item["metadata"]
        if HOOK in (meta.get("annotations") or {}) and item["kind"] != "CustomResourceDefinition":
            continue
        if item["kind"] in leave_out:
            continue
        if item["kind"] not in without and not meta.get("namespace"):
            meta["namespace"] = namespace
        if item["kind"] in without:
            meta.pop("namespace", None)
        kept.append(item)
    return kept


def rendered(given: Json) -> tuple[Path, list[Json]]:
    """The file with the chart's objects, and the objects; rendered where they have not been.

    Raises BuildError.
    """
    here = Path(given["chart"]).exists() and not given["repo_url"]
    cure = f"(It takes helm 3: install it, or name the program by `helm`; it is {given['helm']!r} now. " + (
        f"A chart in a folder needs its dependencies in charts/: `helm dependency build {given['chart']}`.)"
        if here
        else "A chart that is fetched takes an address that is reached from here; a folder or a .tgz does without.)"
    )

    def build() -> list[Json]:
        text = run_builder(command_of(given), cure, stdin=json.dumps(given["values"]))
        return fit(parse(text), given["namespace"], given["cluster_scoped"], given["leave_out"])

    asked = {key: value for key, value in given.items() if key not in ("cache_dir", "helm", "chart")}
    depends_on = [chart_state(given["chart"], given["version"], given["repo_url"]), helm_state(given["helm"])]
    path, objects = cached(Path(given["cache_dir"]), "helm", [*depends_on, asked, 1], build)
    return path, objects


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    given = module.params
    try:
        path, objects = rendered(given)
    except (BuildError, OSError) as error:
        module.fail_json(msg=f"chart {given['chart']} (release {given['release']}): {error}")
    module.exit_json(
        changed=False,
        path=str(path),
        deployments=names(objects, "Deployment"),
        daemonsets=names(objects, "DaemonSet"),
        crds=names(objects, "CustomResourceDefinition"),
    )


if __name__ == "__main__":
    main()
