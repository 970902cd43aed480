"""What kustomize_build and helm_build share: run a builder once, keep its objects under what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

# Built-in kinds without a namespace (`kubectl api-resources --namespaced=false` of Kubernetes 1.36), but for those that
# nobody declares (reviews, component statuses).
CLUSTER_SCOPED = frozenset(
    {
        "APIService",
        "CSIDriver",
        "CSINode",
        "CertificateSigningRequest",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "DeviceClass",
        "FlowSchema",
        "IPAddress",
        "IngressClass",
        "MutatingAdmissionPolicy",
        "MutatingAdmissionPolicyBinding",
        "MutatingWebhookConfiguration",
        "Namespace",
        "Node",
        "PersistentVolume",
        "PriorityClass",
        "PriorityLevelConfiguration",
        "ResourceSlice",
        "RuntimeClass",
        "ServiceCIDR",
        "StorageClass",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
        "ValidatingWebhookConfiguration",
        "VolumeAttachment",
        "VolumeAttributesClass",
    }
)


class BuildError(Exception):
    """The objects cannot be built; the text says what was run, how it ended, and the cure."""


_BASE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BASE_LOADER):  # type: ignore[misc]
    """YAML as Kubernetes reads it: a date and a lone `=` are strings (PyYAML makes a datetime, or an error, of
    them)."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
    ]
    for first, resolvers in _BASE_LOADER.yaml_implicit_resolvers.items()
}


def parse(text: str) -> list[Json]:
    """The objects of a YAML text: empty documents left out, the items of every `List` in its place.

    Raises BuildError for a document that is no object.
    """
    objects: list[Json] = []
    try:
        pending = [document for document in yaml.load_all(text, Loader=_Loader) if document]
    except yaml.YAMLError as error:
        raise BuildError(f"what was built is not YAML: {error}") from error
    while pending:
        item = pending.pop(0)
        if not isinstance(item, dict) or not item.get("kind") or not item.get("apiVersion"):
            raise BuildError(f"what was built holds a document that is no Kubernetes object: {str(item)[:200]!r}")
        if item["kind"].endswith("List") and isinstance(item.get("items"), list):
            pending[:0] = item["items"]
        else:
            objects.append(item)
    return objects


def run_builder(command: Sequence[str], cure: str, stdin: str | None = None, timeout: float = 300) -> str:
    """What a builder printed; raises BuildError with the end of its stderr and the cure where it fails."""
    said = " ".join(command)
    try:
        built = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError as error:
        raise BuildError(f"{said}: {command[0]} is not installed. {cure}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{said}: {error}. {cure}") from error
    if built.returncode != 0:
        raise BuildError(f"{said} failed: {built.stderr.strip()[-1500:]} {cure}")
    return built.stdout


def cached(folder: Path, prefix: str, depends_on: Sequence[Any], build: Callable[[], list[Json]]) -> tuple[Path, Any]:
    """The file with the built objects, and the objects; built only where nothing is kept under what they depend on.

    Readable by its owner alone: a chart may render Secrets. Two runs that build at the same time write the same file.
    """
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{prefix}-{key}.json"
    if path.exists():
        return path, json.loads(path.read_text(encoding="utf-8"))
    objects = build()
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{prefix}-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(objects, stream)
    Path(temporary).replace(path)
    return path, objects


def names(objects: Sequence[Json], kind: str) -> list[str]:
    """Sorted names of the objects of a kind."""
    return sorted(item["metadata"]["name"] for item in objects if item["kind"] == kind)
