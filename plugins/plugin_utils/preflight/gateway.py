# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over the gateway's variables. What its configuration must be like, the gateway itself says: it reads the one
that would be deployed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter import rayplane_gateway, rayplane_serve
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values, bounds, whole

__all__ = ["gateway"]

_PROJECT = Path(__file__).resolve().parents[3]
#: Files that are in the pod only.
_IN_THE_POD = ("signing_key_file", "api_key_file", "verify_tls")
_NAMES = {"auth.issuers": "gateway_issuers", "auth.anonymous_role": "gateway_anonymous_role"}
_FROM_KEYS = re.compile(r"keys\.json: keys\[(\d+)\](.*)", re.DOTALL)


def gateway(values: Values) -> Iterator[Problem]:
    """The gateway's size, its place, and its configuration."""
    if not isinstance(values.get("gateway_roles"), Mapping) or values.get("gateway_enabled") is False:
        return
    yield from _place(values)
    yield from _volumes(values)
    yield from _configuration(values)


def _place(values: Values) -> Iterator[Problem]:
    port: Any = values.get("gateway_node_port")
    if whole(port) and port != 0 and not 30000 <= port <= 32767:
        reason = "Kubernetes gives out node ports from 30000 to 32767"
        yield Problem("gateway_node_port", port, reason, "write 30080, for example")
    elif port and port == values.get("rayservice_node_port") and values.get("rayservice_service_type") != "ClusterIP":
        reason = "it is rayservice_node_port, too, and a port is one Service's"
        yield Problem(
            "gateway_node_port", port, reason, "set rayservice_service_type to ClusterIP: the gateway asks there"
        )
    replicas = values.get("gateway_replicas")
    if isinstance(replicas, Mapping):
        low = replicas.get("min", 1)
        yield from bounds("gateway_replicas", low, replicas.get("max", low))
        if values.get("gateway_redis") == "" and whole(replicas.get("max", low)) and replicas.get("max", low) > 1:
            yield Problem(
                "gateway_redis",
                "",
                "without a Redis every pod counts for itself: limits and budgets hold once for each of them",
                "set it to in_cluster, or to the address of a Redis",
                warning=True,
            )


def _volumes(values: Values) -> Iterator[Problem]:
    audit, volume = values.get("gateway_audit"), values.get("gateway_audit_volume")
    if not isinstance(audit, Mapping) or not audit.get("enabled") or not isinstance(volume, Mapping):
        return
    if not volume.get("size"):
        yield Problem(
            "gateway_audit_volume",
            dict(volume),
            "the audit log lies in its pod and ends with it",
            "give its size: each pod then has a volume of its own; or take gateway_audit.enabled out",
            warning=True,
        )


def _settings(values: Values) -> dict[str, Any]:
    settings = {name.removeprefix("gateway_"): value for name, value in values.items() if name.startswith("gateway_")}
    return settings | {
        "issued_keys": rayplane_gateway.gateway_issued_keys(settings["keys_file"]),
        "serve_routes": rayplane_serve.rayservice_routes(settings["models"]),
    }


def _configuration(values: Values) -> Iterator[Problem]:
    try:
        settings = _settings(values)
        found = rayplane_gateway.gateway_problems(settings)
        files = rayplane_gateway.gateway_files(settings, "rp-" + "a" * 12 + "-" + "A" * 43)
        exposed = rayplane_gateway.gateway_secret_environment(settings["env"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return  # of a wrong type: the argument spec tells
    except AnsibleFilterError as error:
        reason, _, cure = str(error).partition(": ")
        yield Problem("gateway_keys_file", values.get("gateway_keys_file", ABSENT), reason, cure or "correct it")
        return
    told = []
    for text in found:
        variable, _, rest = text.partition(": ")
        reason, _, cure = rest.partition("; ")
        told.append(variable)
        yield Problem(variable, ABSENT, reason, cure)
    for name in exposed:
        yield Problem(
            f"gateway_env.{name}",
            ABSENT,
            "it would stand in the pods' specification, readable by all who may look at them",
            "put it into a Secret, and name that in gateway_env_from_secrets",
            warning=True,
        )
    try:
        rayplane_gateway.gateway_config_maps(files)
    except AnsibleFilterError as error:
        variable, _, rest = str(error).partition(": ")
        reason, _, cure = rest.partition("; ")
        yield Problem(variable, ABSENT, reason, cure)
    yield from (one for one in _asked(files, settings) if not one.variable.startswith(tuple(told)))


def _asked(files: Mapping[str, str], settings: Mapping[str, Any]) -> Iterator[Problem]:
    """What the gateway says of the configuration."""
    if str(_PROJECT) not in sys.path:
        sys.path.append(str(_PROJECT))
    try:
        from serve_app.gateway.policy import PolicyError, load  # noqa: PLC0415 - only where its packages are
    except ImportError as error:
        yield Problem(
            "gateway",
            ABSENT,
            f"its configuration is not checked beforehand: {error.name} is not installed on this controller",
            "install the project's extra `gateway`",
            warning=True,
        )
        return
    with tempfile.TemporaryDirectory(prefix="rayplane-") as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        try:
            load(Path(folder) / "config.json", environment=None)
        except PolicyError as error:
            problems = error.problems
        else:
            return
    told = set()
    for problem in problems:
        variable = _variable(problem.variable, settings)
        # What all models' backends have is wrong in each of them.
        if not problem.variable.endswith(_IN_THE_POD) and (variable, problem.reason) not in told:
            told.add((variable, problem.reason))
            yield Problem(variable, _value(problem.value), problem.reason, problem.cure)


def _value(text: str) -> object:
    """A value that the gateway has shown as JSON, unless it had to be cut."""
    try:
        return json.loads(text) if text else ABSENT
    except ValueError:
        return text


def _variable(name: str, settings: Mapping[str, Any]) -> str:
    """The inventory's variable for a place in the configuration."""
    if match := _FROM_KEYS.fullmatch(name):
        # The first is the playbooks' own.
        place = int(match[1]) - 1
        if place < len(settings["keys"]):
            return f"gateway_keys[{place}]{match[2]}"
        return f"gateway_keys_file.keys[{place - len(settings['keys'])}]{match[2]}"
    for prefix, variable in _NAMES.items():
        if name.startswith(prefix):
            return variable + name.removeprefix(prefix)
    head, _, rest = name.partition(".")
    model = rest.split(".")[0].split("[")[0]
    if head == "backends" and model not in settings["backends"]:
        return f"gateway_backend_defaults{rest.removeprefix(model)}"
    return f"gateway_{name}"
