"""Builds the plain Kubernetes objects of the roles, and says what an apply did."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

Json = dict[str, Any]

_LEVELS = ("privileged", "baseline", "restricted")


def namespace_objects(namespaces: Sequence[Any], pod_security: str) -> list[Json]:
    """Namespaces with pod security labels, and their quota and default limits where given.

    An entry is a name, or a mapping with ``name`` and optionally ``pod_security``, ``labels``, ``annotations``,
    ``quota`` (the ``hard`` limits of
    a ResourceQuota) and ``limits`` (the ``limits`` of a LimitRange).
    """
    objects: list[Json] = []
    for given in namespaces:
        entry: Mapping[str, Any] = given if isinstance(given, Mapping) else {"name": str(given)}
        level = entry.get("pod_security", pod_security)
        if level not in _LEVELS:
            raise AnsibleFilterError(
                f"namespaces_list ({entry['name']}).pod_security is {level!r}: it has to be one of {', '.join(_LEVELS)}"
            )
        labels = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "audit")}
        metadata: Json = {"name": entry["name"], "labels": labels | dict(entry.get("labels") or {})}
        if entry.get("annotations"):
            metadata["annotations"] = dict(entry["annotations"])
        objects.append({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        inside = {"name": "rayplane", "namespace": entry["name"]}
        if entry.get("quota"):
            hard = {key: str(value) for key, value in entry["quota"].items()}
            objects.append({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": inside, "spec": {"hard": hard}})
        if entry.get("limits"):
            limits = list(entry["limits"])
            objects.append({"apiVersion": "v1", "kind": "LimitRange", "metadata": inside, "spec": {"limits": limits}})
    return objects


def secret_objects(secrets: Sequence[Mapping[str, Any]], namespace: str) -> list[Json]:
    """Secrets from ``name``, ``data`` (plain text) and optionally ``namespace``, ``type``, ``annotations``.

    Values are encoded here, so that what is applied is what the API server stores, and a rerun compares equal.
    """
    objects = []
    for entry in secrets:
        metadata: Json = {"name": entry["name"], "namespace": entry.get("namespace") or namespace}
        if entry.get("annotations"):
            metadata["annotations"] = dict(entry["annotations"])
        data = {key: base64.b64encode(str(value).encode()).decode() for key, value in entry["data"].items()}
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": metadata,
                "type": entry.get("type", "Opaque"),
                "data": data,
            }
        )
    return objects


def apply_summary(result: Mapping[str, Any]) -> list[str]:
    """What k8s_apply_set did (would do, in check mode), one line an object: ``created Secret rayplane/hf-token``."""
    words = {"created": "created", "updated": "updated", "aligned": "repaired", "pruned": "deleted"}
    return [f"{word} {name}" for key, word in words.items() for name in result.get(key) or []]


class FilterModule:
    """The filters of the Kubernetes roles."""

    def filters(self) -> dict[str, Any]:
        return {
            "apply_summary": apply_summary,
            "namespace_objects": namespace_objects,
            "secret_objects": secret_objects,
        }
