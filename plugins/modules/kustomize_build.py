#!/usr/bin/python
"""Build a kustomization into a file of objects for k8s_apply_set."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kustomize_build
short_description: Build a kustomization into a JSON file of objects
description:
  - Runs C(kubectl kustomize) and fits the result to the cluster (namespace, image, resources, arguments of its
    Deployment).
  - The result is kept under a name made of everything it depends on, so a rerun builds nothing. Nothing but that cache
    is written.
options:
  source:
    description: A folder with a kustomization, or an address that kustomize fetches. An address is taken to be pinned
      by its C(ref).
    type: str
    required: true
  cache_dir:
    description: Folder for built kustomizations.
    type: path
    required: true
  kubectl:
    description: The kubectl to run.
    type: str
    default: kubectl
  namespace:
    description: Namespace of all namespaced objects, and of the subjects of role bindings.
    type: str
    required: true
  deployment:
    description: >-
      Overrides for the kustomization's Deployment: C(image), C(replicas), C(resources), C(env), C(node_selector),
      C(tolerations),
      C(feature_gates) (name to bool), C(args) (in place of its own), C(extra_args) (beside them).
    type: dict
    default: {}
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Builds as otherwise; only the cache is written.
"""

EXAMPLES = r"""
- name: Build the operator's objects
  rayplane.platform.kustomize_build:
    source: https://github.com/ray-project/kuberay/ray-operator/config/default?ref=v1.6.2
    cache_dir: /var/cache/rayplane/kustomize
    namespace: kuberay-system
    deployment: {replicas: 2}
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
crds:
  description: Names of the CustomResourceDefinitions in it.
  type: list
  returned: always
"""

import hashlib
import json
from collections.abc import Set as AbstractSet
from pathlib import Path

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


def source_state(source: str) -> str:
    """What stands for the source's content: for a folder, names, sizes and times of its tree; for an address,
    itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    # A kustomization refers to its neighbours (../crd), so the tree starts one level up.
    files = sorted(path for path in folder.resolve().parent.rglob("*") if path.is_file())
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def fit(objects: list[Json], namespace: str, deployment: Json, cluster_scoped: AbstractSet[str]) -> list[Json]:
    """Put the objects into ``namespace`` and lay ``deployment`` over the Deployments."""
    for item in objects:
        if item["kind"] not in cluster_scoped:
            item["metadata"]["namespace"] = namespace
        for subject in item.get("subjects") or []:
            if subject.get("kind") == "ServiceAccount":
                subject["namespace"] = namespace
        if item["kind"] == "Deployment":
            _fit_deployment(item["spec"], deployment)
    return objects


def _fit_deployment(spec: Json, wanted: Json) -> None:
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    for key in ("image", "resources", "env", "args"):
        if wanted.get(key):
            container[key] = wanted[key]
    if extra := [arg for arg in wanted.get("extra_args") or () if arg not in (container.get("args") or [])]:
        container["args"] = [*(container.get("args") or []), *extra]
    if wanted.get("replicas") is not None:
        spec["replicas"] = wanted["replicas"]
    if wanted.get("feature_gates"):
        gates = ",".join(f"{name}={str(on).lower()}" for name, on in sorted(wanted["feature_gates"].items()))
        others = [arg for arg in container.get("args") or [] if not arg.startswith("--feature-gates")]
        container["args"] = [*others, f"--feature-gates={gates}"]
    if spec.get("replicas", 1) > 1 and "--enable-leader-election" not in (container.get("args") or []):
        container["args"] = [*(container.get("args") or []), "--enable-leader-election"]
    for key, name in (("node_selector", "nodeSelector"), ("tolerations", "tolerations")):
        if wanted.get(key):
            pod[name] = wanted[key]


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    given = module.params
    cure = (
        f"(source {given['source']} has to be a folder with a kustomization, "
        "or an address that git can fetch from here)"
    )

    def build() -> list[Json]:
        text = run_builder([given["kubectl"], "kustomize", given["source"]], cure)
        return fit(parse(text), given["namespace"], given["deployment"], CLUSTER_SCOPED)

    try:
        depends_on = [source_state(given["source"]), given["namespace"], given["deployment"], 1]
        path, objects = cached(Path(given["cache_dir"]), "kustomize", depends_on, build)
    except (BuildError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=False,
        path=str(path),
        deployments=names(objects, "Deployment"),
        crds=names(objects, "CustomResourceDefinition"),
    )


if __name__ == "__main__":
    main()
