# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Builds what the gateway role applies: the gateway's configuration from the model list and the role's variables, and
the Kubernetes objects around it.

Facts behind it:

* The gateway reads its configuration anew while it runs, except the sections that are bound at its start. So a pod is
  replaced for these, for its image and for its environment only: ``rayplane.io/started-with`` on the pods changes then.
* A ConfigMap holds at most 1 MiB, and a volume of it is swapped as a whole: configuration and keys never disagree.
* A key is stored as a hash. Of 256 random bits nothing can be guessed from it, so it may lie in a repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

Json = dict[str, Any]

PUBLIC_PORT = 8080
ADMIN_PORT = 9090
SERVICE_PORT = 8000
REDIS_PORT = 6379
#: The user that an image of the gateway or of Redis runs as where the cluster does not choose one.
USER = 65532
CONFIG_FOLDER = "/etc/rayplane/gateway"
SIGNING_FOLDER = "/etc/rayplane/audit"
AUDIT_FOLDER = "/var/lib/rayplane/audit"
CONFIG_FILE = "config.json"
KEYS_FILE = "keys.json"
PASSWORD_VARIABLE = "RAYPLANE_REDIS_PASSWORD"  # noqa: S105 - a name
#: The caller that this project's own playbooks are, with a role that no inventory can give away.
OPERATOR = "rayplane-operator"
_OPERATOR_ROLE: Json = {"models": ["*"], "operations": ["chat", "completions", "models", "admin"]}
#: Sections that the gateway reads at its start only.
_AT_START = ("server", "store", "audit", "logging", "tracing")
_PASSED_ON = ("cache", "filters", "tenants", "logging", "tracing", "open_operations")
#: What a ConfigMap takes, less the room for its own fields.
_LARGEST_CONFIG = 1_000_000
_STARTED_WITH = "rayplane.io/started-with"


# --- configuration ---------------------------------------------------------------------------------------------------


def gateway_issued_keys(path: str) -> list[Json]:
    """The keys of a file that playbooks/keys.yml keeps; none where there is no file yet. Raises AnsibleFilterError."""
    if not path or not Path(path).is_file():
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        keys = content["keys"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnsibleFilterError(
            f'gateway_keys_file {path} is no file of keys ({error}): it has the form {{"keys": [...]}}; take it from'
            " version control, or move it away to begin anew"
        ) from error
    if not isinstance(keys, list):
        raise AnsibleFilterError(f"gateway_keys_file {path}: keys is no list")
    return keys


def gateway_key_entry(key: str, identity: str, role: str) -> Json:
    """What is stored of a key: its public prefix and the hash of the whole."""
    return {
        "id": identity,
        "prefix": key[3:15],
        "hash": f"sha256:{hashlib.sha256(key.encode()).hexdigest()}",
        "role": role,
    }


def gateway_problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong between the model list and the gateway's variables, each with its cure; empty where nothing is.

    Rules inside the configuration are the gateway's own (``serve_app.gateway.policy``), which preflight asks.
    """
    roles = set(settings["roles"])
    problems = []
    if OPERATOR in roles:
        problems.append(f"gateway_roles.{OPERATOR}: the name is taken by the playbooks' own role; choose another")
    for model in settings["models"]:
        access = model.get("access")
        if access is not None and (isinstance(access, str) or not isinstance(access, Sequence)):
            problems.append(f"rayservice_models ({model['id']}).access: it has to be a list of roles; it is {access!r}")
            continue
        problems += [
            f"rayservice_models ({model['id']}).access: there is no role {name}; gateway_roles has"
            f" {', '.join(sorted(roles)) or 'none'}"
            for name in access or ()
            if name not in roles
        ]
    derived = {model["id"] for model in settings["models"]}
    problems += [
        f"gateway_routes.{name}: no model of rayservice_models has this id, so its backends are unknown; give backends"
        for name, route in settings["routes"].items()
        if name not in derived and not route.get("backends")
    ]
    problems += [
        f"gateway_backends.{name}: the name is taken by the model of this id; choose another"
        for name in settings["backends"]
        if name in derived
    ]
    seen: dict[str, str] = {}
    for source in ("keys", "issued_keys"):
        variable = "gateway_keys" if source == "keys" else "gateway_keys_file"
        for key in settings[source]:
            for field in ("id", "prefix"):
                value = f"{field} {key.get(field)}"
                if value in seen and key.get(field):
                    problems.append(
                        f"{variable}: {value} stands in {seen[value]}, too; a key stands in one place, once"
                    )
                seen[value] = variable
            if key.get("id") == OPERATOR:
                problems.append(f"{variable}: the id {OPERATOR} is taken by the playbooks' own key; choose another")
    return problems


def _served(settings: Mapping[str, Any]) -> tuple[Json, Json]:
    """Backends and routes of the models, and those given."""
    backends: Json = {}
    routes: Json = {}
    for model in settings["models"]:
        prefix = settings["serve_routes"][model["id"]].rstrip("/")
        own = dict(settings["backend_defaults"])
        backends[model["id"]] = {"url": f"{settings['serve_url']}{prefix}", **own}
        routes[model["id"]] = {"backends": [{"backend": model["id"]}]}
    backends |= {name: dict(backend) for name, backend in settings["backends"].items()}
    for name, route in settings["routes"].items():
        routes[name] = {**routes.get(name, {}), **{key: value for key, value in route.items() if key != "access"}}
    return backends, routes


def _roles(settings: Mapping[str, Any]) -> Json:
    """The roles, each with the models that `access` gives it. A model that names no role is everybody's."""
    access: dict[str, Any] = {model["id"]: model.get("access") for model in settings["models"]}
    for name, route in settings["routes"].items():
        access[name] = route.get("access", access.get(name))
    roles: Json = {}
    for role, given in settings["roles"].items():
        patterns = list(given.get("models") or [])
        allowed = [model for model, names in access.items() if names is None or role in names]
        if "*" not in patterns:
            patterns += [model for model in allowed if model not in patterns]
        roles[role] = {**given, "models": patterns}
    roles[OPERATOR] = _OPERATOR_ROLE
    return roles


def _audit(settings: Mapping[str, Any]) -> Json:
    audit = dict(settings["audit"])
    if audit.get("enabled"):
        audit = {"directory": AUDIT_FOLDER, "signing_key_file": f"{SIGNING_FOLDER}/private.pem", **audit}
    return audit


def gateway_config(settings: Mapping[str, Any]) -> Json:
    """The gateway's configuration, in the shape of ``serve_app.gateway.config``."""
    backends, routes = _served(settings)
    config: Json = {
        "server": {
            "host": "0.0.0.0",  # noqa: S104 - inside the pod; what reaches it is the Services' affair
            "port": PUBLIC_PORT,
            "admin_host": "0.0.0.0",  # noqa: S104
            "admin_port": ADMIN_PORT,
            **settings["server"],
        },
        "store": _store(settings),
        "auth": {key: settings[key] for key in ("issuers", "anonymous_role") if settings[key]},
        "roles": _roles(settings),
        "key_files": [KEYS_FILE],
        "backends": backends,
        "routes": routes,
        "audit": _audit(settings),
    }
    config |= {name: settings[name] for name in _PASSED_ON if settings[name]}
    return {name: value for name, value in config.items() if value}


def _store(settings: Mapping[str, Any]) -> Json:
    place = settings["redis"]
    store: Json = {"prefix": f"rayplane-{settings['namespace']}"}
    if place == "in_cluster":
        store["url"] = f"redis://{settings['name']}-redis.{settings['namespace']}.svc:{REDIS_PORT}/0"
        store["password_env"] = PASSWORD_VARIABLE
    elif place:
        store["url"] = place
        if settings["redis_password_secret"]:
            store["password_env"] = PASSWORD_VARIABLE
    return {**store, **settings["store"]}


def gateway_files(settings: Mapping[str, Any], operator_key: str) -> Json:
    """The two files that the gateway reads. Stable: the same settings give the same bytes."""
    config = json.dumps(_plain(gateway_config(settings)), indent=2, sort_keys=True) + "\n"
    operator = gateway_key_entry(operator_key, OPERATOR, OPERATOR) | {"client": OPERATOR}
    entries = [operator, *_plain(settings["keys"]), *_plain(settings["issued_keys"])]
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    return {CONFIG_FILE: config, KEYS_FILE: f"[\n{lines}\n]\n"}


def _plain(value: Any) -> Any:
    """``value`` without the origin tags that Ansible puts on values."""
    return json.loads(json.dumps(value))


def gateway_version(files: Mapping[str, str]) -> str:
    """The version that the gateway gives a configuration of these two files (``serve_app.gateway.policy``)."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, KEYS_FILE):
        data = files[name].encode()
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:16]


def gateway_applied_version(objects: Sequence[Mapping[str, Any]]) -> str:
    """The version of the configuration among the objects; empty where there is none."""
    for item in objects:
        if item["kind"] == "ConfigMap" and CONFIG_FILE in item["data"]:
            return gateway_version(item["data"])
    return ""


# --- objects ---------------------------------------------------------------------------------------------------------


def gateway_secret_values(settings: Mapping[str, Any]) -> list[Json]:
    """What k8s_kept_secrets has to find or make: the Secrets that nobody declares a value for."""
    name = settings["name"]
    wanted: list[Json] = [{"name": f"{name}-operator", "values": {"key": "api_key"}}]
    if settings["redis"] == "in_cluster":
        wanted.append({"name": f"{name}-redis", "values": {"password": "token"}})
    if settings["audit"].get("enabled"):
        wanted.append({"name": f"{name}-audit", "values": {"private.pem": "ed25519"}})
    return wanted


def gateway_secrets(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> list[Json]:
    """The Secrets as objects; ``values`` are those that k8s_kept_secrets found or made, by name of the Secret."""
    objects = []
    for wanted in gateway_secret_values(settings):
        data = {key: values[wanted["name"]][key] for key in wanted["values"]}
        if "private.pem" in data:
            data["public.pem"] = _public(data["private.pem"])
        if "password" in data:
            # Redis itself gets the hash alone. The gateway manages data, not the server.
            digest = hashlib.sha256(data["password"].encode()).hexdigest()
            data["users.acl"] = f"user default on #{digest} ~* &* +@all -@admin\n"
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": wanted["name"], "namespace": settings["namespace"]},
                "type": "Opaque",
                "data": {key: base64.b64encode(text.encode()).decode() for key, text in data.items()},
            }
        )
    return objects


def _public(private: str) -> str:
    """The public key to a private one, both PEM: by it anybody can verify the audit log."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - only where there is an audit log

    key = serialization.load_pem_private_key(private.encode(), password=None).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def gateway_objects(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> list[Json]:
    """All objects of the role but the Secrets. Raises AnsibleFilterError where the configuration is too large.

    ``settings`` are the role's variables without their prefix (``vars/main.yml`` lists them).
    """
    name = settings["name"]
    files = gateway_files(settings, values[f"{name}-operator"]["key"])
    size = sum(len(text.encode()) for text in files.values())
    if size > _LARGEST_CONFIG:
        raise AnsibleFilterError(
            f"the gateway's configuration and keys are {size} bytes, and a ConfigMap takes {_LARGEST_CONFIG}: remove"
            " disabled and expired keys, or let callers come with tokens (gateway_issuers)"
        )
    objects = [
        _object(settings, "v1", "ServiceAccount", name, automountServiceAccountToken=False),
        _object(settings, "v1", "ConfigMap", f"{name}-config", data=files),
        _deployment(settings, values),
        _service(settings),
        _object(
            settings,
            "v1",
            "Service",
            f"{name}-admin",
            spec={
                "type": "ClusterIP",
                "selector": _selector(settings, "gateway"),
                # It is asked why the gateway is not ready, too.
                "publishNotReadyAddresses": True,
                "ports": [_port("admin", ADMIN_PORT, ADMIN_PORT)],
            },
        ),
        _object(
            settings,
            "policy/v1",
            "PodDisruptionBudget",
            name,
            spec={"maxUnavailable": 1, "selector": {"matchLabels": _selector(settings, "gateway")}},
        ),
        *_autoscaler(settings),
        *_claim(settings, "audit", settings["audit_volume"] if settings["audit"].get("enabled") else {}),
    ]
    if settings["redis"] == "in_cluster":
        objects += _redis(settings, values)
    return objects


def _object(settings: Mapping[str, Any], api: str, kind: str, name: str, **body: Any) -> Json:
    return {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": name, "namespace": settings["namespace"], "labels": _names(settings, name)},
        **body,
    }


def _names(settings: Mapping[str, Any], name: str) -> Json:
    part = "redis" if name.endswith("-redis") else "gateway"
    return {"app.kubernetes.io/name": part}


def _selector(settings: Mapping[str, Any], part: str) -> Json:
    return {"app.kubernetes.io/name": part, "rayplane.io/gateway": settings["name"]}


def _port(name: str, port: int, target: int) -> Json:
    return {"name": name, "port": port, "targetPort": target, "protocol": "TCP"}


def _service(settings: Mapping[str, Any]) -> Json:
    port = _port("http", SERVICE_PORT, PUBLIC_PORT)
    if settings["service_type"] in ("NodePort", "LoadBalancer") and settings["node_port"]:
        port["nodePort"] = int(settings["node_port"])
    spec = {"type": settings["service_type"], "selector": _selector(settings, "gateway"), "ports": [port]}
    service = _object(settings, "v1", "Service", settings["name"], spec=spec)
    if settings["service_annotations"]:
        service["metadata"]["annotations"] = dict(settings["service_annotations"])
    return service


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _probe(path: str, **times: int) -> Json:
    return {"httpGet": {"path": path, "port": "admin"}, **times}


_CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_POD_SECURITY: Json = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    # A volume of many files is not walked at every start.
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _pod_spec(settings: Mapping[str, Any], container: Json, volumes: list[Json]) -> Json:
    spec: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": dict(_POD_SECURITY),
        "containers": [container],
        "volumes": volumes,
    }
    if settings["image_pull_secrets"]:
        spec["imagePullSecrets"] = [{"name": name} for name in settings["image_pull_secrets"]]
    if settings["node_selector"]:
        spec["nodeSelector"] = dict(settings["node_selector"])
    if settings["tolerations"]:
        spec["tolerations"] = list(settings["tolerations"])
    return spec


def _deployment(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> Json:
    name, config = settings["name"], gateway_config(settings)
    labels = {**settings["labels"], **_selector(settings, "gateway")}
    drain = float(config["server"].get("drain_s", 60)) + float(config["server"].get("drain_delay_s", 0))
    env = [{"name": key, "value": str(value)} for key, value in sorted(settings["env"].items())]
    password = f"{name}-redis" if settings["redis"] == "in_cluster" else settings["redis_password_secret"]
    if settings["redis"] and password:
        source = {"secretKeyRef": {"name": password, "key": "password"}}
        env.append({"name": PASSWORD_VARIABLE, "valueFrom": source})
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own
    ]
    volumes: list[Json] = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if settings["audit"].get("enabled"):
        mounts += [
            {"name": "audit", "mountPath": AUDIT_FOLDER},
            {"name": "audit-key", "mountPath": SIGNING_FOLDER, "readOnly": True},
        ]
        kept = {"persistentVolumeClaim": {"claimName": f"{name}-audit"}}
        volumes += [
            {"name": "audit", **(kept if settings["audit_volume"].get("size") else {"emptyDir": {}})},
            {"name": "audit-key", "secret": {"secretName": f"{name}-audit", "defaultMode": 0o440}},
        ]
    container: Json = {
        "name": "gateway",
        "image": settings["image"],
        "imagePullPolicy": settings["image_pull_policy"],
        "args": ["--config", f"{CONFIG_FOLDER}/{CONFIG_FILE}"],
        "ports": [
            {"name": "http", "containerPort": PUBLIC_PORT},
            {"name": "admin", "containerPort": ADMIN_PORT},
        ],
        "env": env,
        "resources": settings["resources"],
        "securityContext": dict(_CONTAINER_SECURITY),
        "volumeMounts": mounts,
        "startupProbe": _probe("/livez", periodSeconds=1, failureThreshold=60, timeoutSeconds=2),
        "livenessProbe": _probe("/livez", periodSeconds=10, failureThreshold=3, timeoutSeconds=5),
        "readinessProbe": _probe("/readyz", periodSeconds=5, failureThreshold=2, timeoutSeconds=5),
    }
    if settings["env_from_secrets"]:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in settings["env_from_secrets"]]
    started_with = _digest(
        {section: config.get(section) for section in _AT_START},
        {secret: sorted(data.items()) for secret, data in values.items() if not secret.endswith("-operator")},
    )
    spec = _pod_spec(settings, container, volumes) | {
        "serviceAccountName": name,
        # Open streams finish: the gateway itself waits until load balancers have seen it go, then for its requests.
        "terminationGracePeriodSeconds": math.ceil(drain) + 15,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": _selector(settings, "gateway")},
            }
            for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ],
    }
    annotations = {_STARTED_WITH: started_with, **settings["pod_annotations"]}
    body: Json = {
        "selector": {"matchLabels": _selector(settings, "gateway")},
        # No request finds fewer pods than before.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "revisionHistoryLimit": 3,
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec},
    }
    if not _autoscaler(settings):
        body["replicas"] = int(settings["replicas"].get("min", 1))
    return _object(settings, "apps/v1", "Deployment", name, spec=body)


def _autoscaler(settings: Mapping[str, Any]) -> list[Json]:
    """The HorizontalPodAutoscaler, where the bounds leave it something to do."""
    low = int(settings["replicas"].get("min", 1))
    high = int(settings["replicas"].get("max", low))
    if high <= low:
        return []
    target = {"type": "Utilization", "averageUtilization": int(settings["replicas"].get("cpu_percent", 70))}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": settings["name"]},
        "minReplicas": low,
        "maxReplicas": high,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        # Open streams make every pod that goes wait: not for a short lull.
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
    }
    return [_object(settings, "autoscaling/v2", "HorizontalPodAutoscaler", settings["name"], spec=spec)]


def _claim(settings: Mapping[str, Any], part: str, volume: Mapping[str, Any]) -> list[Json]:
    """A claim of a volume (`size`, `class`, `access_mode`), where a size is given."""
    if not volume.get("size"):
        return []
    spec: Json = {
        "accessModes": [volume.get("access_mode", "ReadWriteOnce")],
        "resources": {"requests": {"storage": str(volume["size"])}},
    }
    if volume.get("class"):
        spec["storageClassName"] = volume["class"]
    return [_object(settings, "v1", "PersistentVolumeClaim", f"{settings['name']}-{part}", spec=spec)]


def _redis(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> list[Json]:
    """One Redis with its password, its volume and its Service."""
    name = f"{settings['name']}-redis"
    volume = settings["redis_volume"]
    kept = {"persistentVolumeClaim": {"claimName": name}} if volume.get("size") else {"emptyDir": {}}
    arguments = {
        "--port": str(REDIS_PORT),
        "--aclfile": "/etc/redis/users.acl",
        "--dir": "/data",
        "--maxmemory": str(settings["redis_max_memory"]),
        # Cached answers are used less often than limits, and go first; budgets and usage never go.
        "--maxmemory-policy": "volatile-lru",
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
    }
    container: Json = {
        "name": "redis",
        "image": settings["redis_image"],
        "imagePullPolicy": settings["image_pull_policy"],
        "command": ["redis-server"],
        "args": [word for pair in arguments.items() for word in pair],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
        "resources": settings["redis_resources"],
        "securityContext": dict(_CONTAINER_SECURITY),
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "users", "mountPath": "/etc/redis", "readOnly": True},
        ],
        "startupProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 1, "failureThreshold": 120},
        "livenessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 20, "failureThreshold": 3},
        "readinessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 10},
    }
    users = {"secretName": name, "items": [{"key": "users.acl", "path": "users.acl"}], "defaultMode": 0o440}
    volumes: list[Json] = [{"name": "data", **kept}, {"name": "users", "secret": users}]
    labels = {**settings["labels"], **_selector(settings, "redis")}
    annotations = {_STARTED_WITH: _digest(values[name]["password"])}
    spec = {
        "serviceName": name,
        "replicas": 1,
        "selector": {"matchLabels": _selector(settings, "redis")},
        "template": {
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": _pod_spec(settings, container, volumes),
        },
    }
    service = {"selector": _selector(settings, "redis"), "ports": [_port("redis", REDIS_PORT, REDIS_PORT)]}
    return [
        _object(settings, "apps/v1", "StatefulSet", name, spec=spec),
        _object(settings, "v1", "Service", name, spec=service),
        *_claim(settings, "redis", volume),
    ]


def gateway_targets(settings: Mapping[str, Any]) -> list[Json]:
    """What k8s_apply_set waits for."""
    place = {"api_version": "apps/v1", "namespace": settings["namespace"]}
    targets = [{**place, "kind": "Deployment", "name": settings["name"]}]
    if settings["redis"] == "in_cluster":
        targets.append({**place, "kind": "StatefulSet", "name": f"{settings['name']}-redis"})
    return targets


def local_image_key(state: str, image: str) -> str:
    """What an image of the local platform was made of (``tools/rayplane_local/images.py``); empty where there is none.

    Its name stays when the code in it changes, so the pods carry this beside it.
    """
    try:
        return str(json.loads((Path(state) / "images.json").read_text(encoding="utf-8")).get(image, ""))
    except (OSError, ValueError):
        return ""


# --- what people read ------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    lines = [columns, *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]


def gateway_key_lines(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the gateway's keys, a line each, as its admin API lists them."""

    def state(key: Mapping[str, Any]) -> str:
        return "revoked" if key.get("revoked") else "disabled" if key.get("disabled") else "good"

    columns = ("id", "prefix", "role", "tenant", "client", "expires")
    rows = [[*(str(key.get(column) or "-") for column in columns), state(key)] for key in keys if key["id"] != OPERATOR]
    return _table([*columns, "state"], rows)


def gateway_traffic_lines(answer: Mapping[str, Any]) -> list[str]:
    """A table of the routes' backends and weights, a line each, as the admin API gives them."""
    rows = [
        [
            model,
            target["backend"],
            str(target["weight"]),
            "" if target["weight"] == target["configured"] else f"(declared: {target['configured']})",
        ]
        for model, route in sorted(answer["routes"].items())
        for target in route["backends"]
    ]
    return _table(["model", "backend", "weight", ""], rows)


class FilterModule:
    """The filters of the gateway role."""

    def filters(self) -> dict[str, Any]:
        return {
            "gateway_applied_version": gateway_applied_version,
            "gateway_config": gateway_config,
            "gateway_issued_keys": gateway_issued_keys,
            "gateway_key_lines": gateway_key_lines,
            "gateway_objects": gateway_objects,
            "gateway_problems": gateway_problems,
            "gateway_secret_values": gateway_secret_values,
            "gateway_secrets": gateway_secrets,
            "gateway_targets": gateway_targets,
            "gateway_traffic_lines": gateway_traffic_lines,
            "local_image_key": local_image_key,
        }
