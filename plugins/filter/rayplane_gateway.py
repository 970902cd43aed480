# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Builds what the gateway role applies: the gateway's configuration from the model list and the role's variables, and
the Kubernetes objects around it.

Facts behind it:

* The gateway reads its configuration anew while it runs, except the sections that are bound at its start. So a pod is
  replaced for these, for its image and for its environment only: ``rayplane.io/started-with`` on the pods changes then.
* A ConfigMap holds at most 1 MiB, about 5,000 keys. More are spread over further ones, each key by its id, so that a
  change of one moves no other. A volume shows several ConfigMaps as they come, one after the other: so the
  configuration names the content of each file, and the gateway takes all of it over or nothing.
* A key is stored as a hash. Of 256 random bits nothing can be guessed from it, so it may lie in a repository.
* Redis never drops what limits stand on: it refuses when it is full. Cached answers have a Redis beside it that drops
  those used longest ago.
* Load balancers on AWS go on sending to a pod that leaves: an application load balancer for half a minute, a network
  load balancer for two (kubernetes-sigs/aws-load-balancer-controller, issues 1064 and 2366). So behind one a pod serves
  on for as long after it has said that it is not ready. An application load balancer keeps connections to the pods, so
  theirs stay open for longer than it keeps an idle one.
* A load balancer has an object of its own, so the gateway's Service stays as it is when one comes, changes or goes.
* A volume that one node alone can mount cannot be shared by pods. So with such a volume for the audit log the pods are
  a StatefulSet's: each has a volume of its own, and finds it again under its name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.errors import AnsibleFilterError

Json = dict[str, Any]

PUBLIC_PORT = 8080
ADMIN_PORT = 9090
SERVICE_PORT = 8000
REDIS_PORT = 6379
CACHE_PORT = 6380
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
_PASSED_ON = ("cors", "cache", "filters", "tenants", "logging", "tracing", "open_operations")
#: What a ConfigMap takes, less the room for its own fields.
_LARGEST_CONFIG = 1_000_000
#: ConfigMaps of keys alone that a pod looks for. They need not be there, so a pod that runs finds what comes later.
_MOST_KEY_MAPS = 32
#: What an audit log without a volume of its own may fill of its node's disk; the pod that holds more is replaced.
_AUDIT_WITHOUT_VOLUME = "2Gi"
#: Headers that carry a credential, and how a backend's are given without writing them down.
_SECRET_HEADERS = ("authorization", "proxy-authorization", "cookie", "api-key", "x-api-key", "x-goog-api-key")
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
_STARTED_WITH = "rayplane.io/started-with"
#: Seconds for which load balancers go on sending to a pod that is not ready any more.
_LEAVING_S = {"alb": 30, "nlb": 120}
#: Seconds until load balancers send to a new pod. Fewer, and a release could leave them pods that come and go alone
#: (the controller's docs/deploy/pod_readiness_gate.md).
_ARRIVING_S = {"alb": 60, "nlb": 180}
#: Longer than a request takes (``timeouts.total_s``, 600) with its queueing and its body.
_IDLE_S = 660
_TLS_POLICY = "ELBSecurityPolicy-TLS13-1-2-2021-06"


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
        problems += [
            f"rayservice_models ({model['id']}).access: there is no role {name}; gateway_roles has"
            f" {', '.join(sorted(roles)) or 'none'}"
            for name in (access if isinstance(access, list) else ())
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
    return [*problems, *_written_down(settings)]


def _written_down(settings: Mapping[str, Any]) -> Iterator[str]:
    """Secrets that would lie in a ConfigMap, where everybody reads them who may look at the namespace. They are named
    by their place and never shown.
    """
    place = "it would lie in a ConfigMap, readable by all who may look at the namespace"
    backends = {f"gateway_backends.{name}": backend for name, backend in settings["backends"].items()}
    for where, backend in {**backends, "gateway_backend_defaults": settings["backend_defaults"]}.items():
        for header in backend.get("headers") or {}:
            if header.lower() not in _SECRET_HEADERS:
                continue
            bearer = header.lower() == "authorization"
            how = "" if bearer else f" and `api_key_header: {header}`"
            yield (
                f"{where}.headers.{header}: {place}; name the key's environment variable in `api_key_env`{how}, and a"
                " Secret that has it in gateway_env_from_secrets"
            )
    for name, one in settings["filters"].items():
        options = one.get("options") or {}
        for header in options.get("headers") or {}:
            if header.lower() in _SECRET_HEADERS:
                yield (
                    f"gateway_filters.{name}.options.headers.{header}: {place}; let the service check a signature: name"
                    " an environment variable in `secret_env`, and a Secret that has it in gateway_env_from_secrets"
                )
    named = [
        ("gateway_redis", settings["redis"], "give it by gateway_redis_password_secret"),
        ("gateway_store.url", settings["store"].get("url"), "give it by `password_env` and gateway_env_from_secrets"),
        (
            "gateway_store.cache_url",
            settings["store"].get("cache_url"),
            "give it by `cache_password_env` and gateway_env_from_secrets",
        ),
        ("gateway_tracing.endpoint", settings["tracing"].get("endpoint"), "let a collector beside the gateway have it"),
        *(
            (f"gateway_issuers[{number}].jwks_url", one.get("jwks_url"), "key sets are public: take it out")
            for number, one in enumerate(settings["issuers"])
        ),
        *(
            (f"gateway_filters.{name}.options.url", (one.get("options") or {}).get("url"), "use `secret_env` instead")
            for name, one in settings["filters"].items()
        ),
    ]
    for where, address, cure in named:
        if isinstance(address, str) and _has_password(address):
            yield f"{where}: a password stands in the address, and {place}; {cure}"


def _has_password(address: str) -> bool:
    try:
        return bool(urlsplit(address).password)
    except ValueError:
        return False


def gateway_secret_environment(env: Mapping[str, Any]) -> list[str]:
    """The names in ``env`` that speak of a secret. Their values would stand in the pods' specification."""
    return [name for name, value in env.items() if value and _SECRET_NAME.search(name.upper())]


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
            **_behind_balancer(settings),
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


def _behind_balancer(settings: Mapping[str, Any]) -> Json:
    """What the server needs behind its load balancer."""
    balancer, server = settings["load_balancer"], settings["server"]
    if not balancer:
        return {}
    found: Json = {"drain_delay_s": max(server.get("drain_delay_s", 0), _LEAVING_S[balancer["type"]])}
    if balancer["type"] == "alb":
        found["keep_alive_s"] = max(server.get("keep_alive_s", 75), balancer.get("idle_timeout_s", _IDLE_S) + 30)
    return found


def _store(settings: Mapping[str, Any]) -> Json:
    place = settings["redis"]
    store: Json = {"prefix": f"rayplane-{settings['namespace']}"}
    if place and settings["store"].get("on_failure") == "local":
        # All replicas that there can be have the whole limit together, and not more.
        _, high = _bounds(settings)
        store["local_fraction"] = math.floor(10_000 / high) / 10_000
    if place == "in_cluster":
        server = f"redis://{settings['name']}-redis.{settings['namespace']}.svc"
        store |= {"url": f"{server}:{REDIS_PORT}/0", "password_env": PASSWORD_VARIABLE}
        store |= {"cache_url": f"{server}:{CACHE_PORT}/0", "cache_password_env": PASSWORD_VARIABLE}
    elif place:
        store["url"] = place
        if settings["redis_password_secret"]:
            store["password_env"] = PASSWORD_VARIABLE
    return {**store, **settings["store"]}


def _bounds(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The least and the most pods."""
    low = int(settings["replicas"].get("min", 1))
    return low, max(1, low, int(settings["replicas"].get("max", low)))


def gateway_files(settings: Mapping[str, Any], operator_key: str) -> dict[str, str]:
    """The two files that the gateway reads. Stable: the same settings give the same bytes."""
    config = _written(gateway_config(settings))
    operator = gateway_key_entry(operator_key, OPERATOR, OPERATOR) | {"client": OPERATOR}
    entries = [operator, *_plain(settings["keys"]), *_plain(settings["issued_keys"])]
    return {CONFIG_FILE: config, KEYS_FILE: _listed([json.dumps(entry, sort_keys=True) for entry in entries])}


def _written(config: Json) -> str:
    return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"


def _listed(lines: Sequence[str]) -> str:
    return "[\n" + ",\n".join(lines) + "\n]\n"


def gateway_config_maps(files: Mapping[str, str]) -> list[dict[str, str]]:
    """The two files of ``gateway_files`` as ConfigMaps hold them: both in one, or, where that is too small, the
    configuration in the first and the keys in files of their own, one in each of the others.

    Raises AnsibleFilterError where even that is too little.
    """
    if sum(len(text.encode()) for text in files.values()) <= _LARGEST_CONFIG:
        return [dict(files)]
    lines = files[KEYS_FILE].split("\n")[1:-2]
    sizes = [0] * _MOST_KEY_MAPS
    places = []
    for line in lines:
        # By its id: a new key is put beside others, and moves none.
        place = zlib.crc32(str(json.loads(line.rstrip(","))["id"]).encode()) % _MOST_KEY_MAPS
        places.append(place)
        sizes[place] += len(line.encode()) + 2
    count = 1
    while count < _MOST_KEY_MAPS and max(sum(sizes[place::count]) for place in range(count)) > _LARGEST_CONFIG:
        count *= 2
    if max(sum(sizes[place::count]) for place in range(count)) > _LARGEST_CONFIG:
        fit = len(lines) * _LARGEST_CONFIG // max(sizes)
        raise AnsibleFilterError(
            f"gateway_keys_file: there are {len(lines)} keys, and about {fit} like them fit into {_MOST_KEY_MAPS}"
            " ConfigMaps; remove those that are revoked or expired, or let callers come with tokens (gateway_issuers)"
        )
    shares: list[list[str]] = [[] for _ in range(count)]
    for line, place in zip(lines, places, strict=True):
        shares[place % count].append(line.rstrip(","))
    spread = {f"keys-{place:02}.json": _listed(share) for place, share in enumerate(shares)}
    config = json.loads(files[CONFIG_FILE])
    config["key_files"] = [
        f"{name}#sha256={hashlib.sha256(text.encode()).hexdigest()}" for name, text in spread.items()
    ]
    written = _written(config)
    if len(written.encode()) > _LARGEST_CONFIG:
        raise AnsibleFilterError(
            f"gateway_routes: the configuration without keys is {len(written.encode())} bytes, and a ConfigMap takes"
            f" {_LARGEST_CONFIG}; declare fewer routes, backends, roles or words of filters"
        )
    return [{CONFIG_FILE: written}, *({name: text} for name, text in spread.items())]


def _plain(value: Any) -> Any:
    """``value`` without the origin tags that Ansible puts on values."""
    return json.loads(json.dumps(value))


def gateway_version(files: Mapping[str, str]) -> str:
    """The version that the gateway gives a configuration of these files (``serve_app.gateway.policy``)."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, *(name.partition("#")[0] for name in json.loads(files[CONFIG_FILE])["key_files"])):
        data = files[name].encode()
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:16]


def gateway_applied_version(objects: Sequence[Mapping[str, Any]]) -> str:
    """The version of the configuration among the objects; empty where there is none."""
    files = {
        name: text for item in objects if item["kind"] == "ConfigMap" for name, text in item.get("data", {}).items()
    }
    return gateway_version(files) if CONFIG_FILE in files else ""


# --- objects ---------------------------------------------------------------------------------------------------------


def gateway_secret_values(settings: Mapping[str, Any]) -> list[Json]:
    """What k8s_kept_secrets has to find or make: the Secrets that nobody declares a value for. One that is ``given`` by
    name is found or missed, never made.
    """
    wanted = [("operator", {"key": "api_key"})]
    if settings["redis"] == "in_cluster":
        wanted.append(("redis", {"password": "token"}))
    if settings["audit"].get("enabled"):
        wanted.append(("audit", {"private.pem": "ed25519"}))
    return [
        {"name": _secret(settings, part), "values": values, "given": bool(settings[_GIVEN_SECRETS[part]])}
        for part, values in wanted
    ]


#: Variables that name a Secret which somebody else makes (External Secrets, say).
_GIVEN_SECRETS = {"operator": "operator_secret", "redis": "redis_password_secret", "audit": "audit_secret"}


def _secret(settings: Mapping[str, Any], part: str) -> str:
    """The name of the Secret with a part's secret."""
    return str(settings[_GIVEN_SECRETS[part]] or f"{settings['name']}-{part}")


def gateway_secrets(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> list[Json]:
    """The Secrets as objects; ``values`` are those that k8s_kept_secrets found or made, by name of the Secret."""
    objects = []
    for wanted in gateway_secret_values(settings):
        name = wanted["name"]
        found = {key: values[name][key] for key in wanted["values"]}
        data = {} if wanted["given"] else dict(found)
        if "private.pem" in data:
            data["public.pem"] = _public(data["private.pem"])
        if "password" in found:
            # Redis itself gets the hash alone. The gateway manages data, not the server.
            digest = hashlib.sha256(found["password"].encode()).hexdigest()
            data["users.acl"] = f"user default on #{digest} ~* &* +@all -@admin\n"
            name = f"{settings['name']}-redis"
        if data:
            objects.append(
                {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"name": name, "namespace": settings["namespace"]},
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
    files = gateway_files(settings, values[_secret(settings, "operator")]["key"])
    first, *further = gateway_config_maps(files)
    objects = [
        _object(settings, "v1", "ServiceAccount", name, automountServiceAccountToken=False),
        _object(settings, "v1", "ConfigMap", f"{name}-config", data=first),
        *(
            _object(settings, "v1", "ConfigMap", f"{name}-keys-{place:02}", data=data)
            for place, data in enumerate(further)
        ),
        _workload(settings, values),
        _service(settings),
        *_balancer(settings),
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
        *_claim(settings, "audit", settings["audit_volume"] if _audit_place(settings) == "shared" else {}),
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


def _balancer(settings: Mapping[str, Any]) -> list[Json]:
    """What the AWS Load Balancer Controller makes the load balancer of. Its annotations are described in the
    controller's docs/guide/service/annotations.md and docs/guide/ingress/annotations.md."""
    balancer = settings["load_balancer"]
    if not balancer:
        return []
    build = _network_balancer if balancer["type"] == "nlb" else _application_balancer
    item = build(settings, balancer, "https" if balancer.get("certificate_arn") else "http")
    item["metadata"]["annotations"] |= {key: str(value) for key, value in (balancer.get("annotations") or {}).items()}
    return [item]


def _leaving(settings: Mapping[str, Any]) -> str:
    """The attribute by which open requests of a pod that leaves are let finish."""
    return f"deregistration_delay.timeout_seconds={min(_drain_s(gateway_config(settings)), 3600)}"


def _drain_s(config: Json) -> int:
    """Seconds that a pod takes to leave, at most."""
    return math.ceil(float(config["server"].get("drain_s", 60)) + float(config["server"].get("drain_delay_s", 0)))


def _network_balancer(settings: Mapping[str, Any], balancer: Json, scheme: str) -> Json:
    port = 443 if scheme == "https" else 80
    targets = (
        _leaving(settings),
        # An open stream outlives the pod's saying that it takes no more.
        "target_health_state.unhealthy.connection_termination.enabled=false",
    )
    told = {
        "scheme": balancer.get("scheme", "internal"),
        "nlb-target-type": "ip",
        "healthcheck-protocol": "http",
        "healthcheck-path": "/healthz",
        "healthcheck-interval": "10",
        "healthcheck-healthy-threshold": "2",
        "healthcheck-unhealthy-threshold": "2",
        "healthcheck-success-codes": "200",
        "target-group-attributes": ",".join(targets),
    }
    if scheme == "https":
        told |= {
            "ssl-cert": balancer["certificate_arn"],
            "ssl-ports": scheme,
            "ssl-negotiation-policy": balancer.get("ssl_policy", _TLS_POLICY),
            "backend-protocol": "tcp",
        }
    else:
        idle = balancer.get("idle_timeout_s", _IDLE_S)
        told[f"listener-attributes.TCP-{port}"] = f"tcp.idle_timeout.seconds={idle}"
    spec = {
        "type": "LoadBalancer",
        "loadBalancerClass": "service.k8s.aws/nlb",
        "allocateLoadBalancerNodePorts": False,
        "selector": _selector(settings, "gateway"),
        "ports": [_port(scheme, port, PUBLIC_PORT)],
    }
    if balancer.get("allowed_cidrs"):
        spec["loadBalancerSourceRanges"] = list(balancer["allowed_cidrs"])
    item = _object(settings, "v1", "Service", f"{settings['name']}-nlb", spec=spec)
    prefix = "service.beta.kubernetes.io/aws-load-balancer"
    item["metadata"]["annotations"] = {f"{prefix}-{key}": value for key, value in told.items()}
    return item


def _application_balancer(settings: Mapping[str, Any], balancer: Json, scheme: str) -> Json:
    port = 443 if scheme == "https" else 80
    told = {
        "scheme": balancer.get("scheme", "internal"),
        "target-type": "ip",
        "listen-ports": json.dumps([{scheme.upper(): port}]),
        "healthcheck-path": "/healthz",
        "healthcheck-interval-seconds": "10",
        "success-codes": "200",
        "load-balancer-attributes": f"idle_timeout.timeout_seconds={balancer.get('idle_timeout_s', _IDLE_S)}",
        # Requests differ in length by orders of magnitude.
        "target-group-attributes": f"{_leaving(settings)},load_balancing.algorithm.type=least_outstanding_requests",
    }
    if scheme == "https":
        told |= {
            "certificate-arn": balancer["certificate_arn"],
            "ssl-policy": balancer.get("ssl_policy", _TLS_POLICY),
        }
    if balancer.get("allowed_cidrs"):
        told["inbound-cidrs"] = ",".join(balancer["allowed_cidrs"])
    backend = {"service": {"name": settings["name"], "port": {"name": "http"}}}
    spec = {
        "ingressClassName": "alb",
        "rules": [{"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}],
    }
    item = _object(settings, "networking.k8s.io/v1", "Ingress", f"{settings['name']}-alb", spec=spec)
    item["metadata"]["annotations"] = {f"alb.ingress.kubernetes.io/{key}": value for key, value in told.items()}
    return item


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


def _pod_spec(settings: Mapping[str, Any], containers: list[Json], volumes: list[Json]) -> Json:
    spec: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": dict(_POD_SECURITY),
        "containers": containers,
        "volumes": volumes,
    }
    if settings["image_pull_secrets"]:
        spec["imagePullSecrets"] = [{"name": name} for name in settings["image_pull_secrets"]]
    if settings["node_selector"]:
        spec["nodeSelector"] = dict(settings["node_selector"])
    if settings["tolerations"]:
        spec["tolerations"] = list(settings["tolerations"])
    return spec


def _audit_place(settings: Mapping[str, Any]) -> str:
    """Where the audit log lies: nowhere (empty), in the ``pod``, on a ``shared`` volume, or on each pod's ``own``."""
    volume = settings["audit_volume"]
    if not settings["audit"].get("enabled"):
        return ""
    if not volume.get("size"):
        return "pod"
    return "shared" if volume.get("access_mode") == "ReadWriteMany" else "own"


def _workload_kind(settings: Mapping[str, Any]) -> str:
    return "StatefulSet" if _audit_place(settings) == "own" else "Deployment"


def _workload(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> Json:
    """The pods: a Deployment's, or, with volumes of their own, a StatefulSet's."""
    name, config = settings["name"], gateway_config(settings)
    labels = {**settings["labels"], **_selector(settings, "gateway")}
    env = [{"name": key, "value": str(value)} for key, value in sorted(settings["env"].items())]
    in_cluster = settings["redis"] == "in_cluster"
    password = _secret(settings, "redis") if in_cluster else settings["redis_password_secret"]
    if settings["redis"] and password:
        source = {"secretKeyRef": {"name": password, "key": "password"}}
        env.append({"name": PASSWORD_VARIABLE, "valueFrom": source})
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own
    ]
    keys = [{"configMap": {"name": f"{name}-keys-{place:02}", "optional": True}} for place in range(_MOST_KEY_MAPS)]
    volumes: list[Json] = [
        {"name": "config", "projected": {"sources": [{"configMap": {"name": f"{name}-config"}}, *keys]}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
    ]
    place = _audit_place(settings)
    if place:
        mounts += [
            {"name": "audit", "mountPath": AUDIT_FOLDER},
            {"name": "audit-key", "mountPath": SIGNING_FOLDER, "readOnly": True},
        ]
        key = {"secretName": _secret(settings, "audit"), "defaultMode": 0o440}
        volumes.append({"name": "audit-key", "secret": key})
    if place == "shared":
        volumes.append({"name": "audit", "persistentVolumeClaim": {"claimName": f"{name}-audit"}})
    elif place == "pod":
        volumes.append({"name": "audit", "emptyDir": {"sizeLimit": _AUDIT_WITHOUT_VOLUME}})
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
        [
            [wanted["name"], key, values[wanted["name"]][key]]
            for wanted in gateway_secret_values(settings)
            for key in wanted["values"]
            if key in ("password", "private.pem")
        ],
    )
    spec = _pod_spec(settings, [container], volumes) | {
        "serviceAccountName": name,
        # Open streams finish: the gateway itself waits until load balancers have seen it go, then for its requests.
        "terminationGracePeriodSeconds": _drain_s(config) + 15,
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
        "revisionHistoryLimit": 3,
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec},
    }
    if settings["load_balancer"]:
        body["minReadySeconds"] = _ARRIVING_S[settings["load_balancer"]["type"]]
    kind = _workload_kind(settings)
    if kind == "Deployment":
        # No request finds fewer pods than before.
        body["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    else:
        claim = _claim_spec(settings["audit_volume"])
        body |= {
            "serviceName": f"{name}-admin",
            "podManagementPolicy": "Parallel",
            # Replaced one after the other, each when the one before it serves. Volumes stay when pods become fewer.
            "updateStrategy": {"type": "RollingUpdate"},
            "volumeClaimTemplates": [
                {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    "metadata": {"name": "audit", "labels": {**settings["labels"], **_names(settings, name)}},
                    "spec": claim,
                }
            ],
        }
    if not _autoscaler(settings):
        body["replicas"] = _bounds(settings)[0]
    return _object(settings, "apps/v1", kind, name, spec=body)


def _autoscaler(settings: Mapping[str, Any]) -> list[Json]:
    """The HorizontalPodAutoscaler, where the bounds leave it something to do."""
    low, high = _bounds(settings)
    if high <= low:
        return []
    target = {"type": "Utilization", "averageUtilization": int(settings["replicas"].get("cpu_percent", 70))}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": _workload_kind(settings), "name": settings["name"]},
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
    name = f"{settings['name']}-{part}"
    return [_object(settings, "v1", "PersistentVolumeClaim", name, spec=_claim_spec(volume))]


def _claim_spec(volume: Mapping[str, Any]) -> Json:
    spec: Json = {
        "accessModes": [volume.get("access_mode", "ReadWriteOnce")],
        "resources": {"requests": {"storage": str(volume["size"])}},
    }
    if volume.get("class"):
        spec["storageClassName"] = volume["class"]
    return spec


def _redis(settings: Mapping[str, Any], values: Mapping[str, Mapping[str, str]]) -> list[Json]:
    """The Redis of limits and the Redis of cached answers, in one pod, with password, volume and Service."""
    name = f"{settings['name']}-redis"
    volume = settings["redis_volume"]
    kept = {"persistentVolumeClaim": {"claimName": name}} if volume.get("size") else {"emptyDir": {}}
    store = _redis_container(
        settings,
        "redis",
        REDIS_PORT,
        settings["redis_resources"],
        {
            "--dir": "/data",
            "--maxmemory": str(settings["redis_max_memory"]),
            # Budgets, usage and leases have an end, too: whatever is chosen among them to make room is a limit that
            # begins anew. So nothing is: full, it refuses, and store.on_failure decides.
            "--maxmemory-policy": "noeviction",
            "--appendonly": "yes",
            "--appendfsync": "everysec",
            "--save": "",
        },
    )
    store["volumeMounts"].append({"name": "data", "mountPath": "/data"})
    cache = _redis_container(
        settings,
        "cache",
        CACHE_PORT,
        settings["redis_cache_resources"],
        {
            "--maxmemory": str(settings["redis_cache_max_memory"]),
            "--maxmemory-policy": "allkeys-lru",
            "--appendonly": "no",
            "--save": "",
        },
    )
    users = {"secretName": name, "items": [{"key": "users.acl", "path": "users.acl"}], "defaultMode": 0o440}
    volumes: list[Json] = [{"name": "data", **kept}, {"name": "users", "secret": users}]
    labels = {**settings["labels"], **_selector(settings, "redis")}
    annotations = {_STARTED_WITH: _digest(values[_secret(settings, "redis")]["password"])}
    spec = {
        "serviceName": name,
        "replicas": 1,
        "selector": {"matchLabels": _selector(settings, "redis")},
        "template": {
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": _pod_spec(settings, [store, cache], volumes),
        },
    }
    ports = [_port("redis", REDIS_PORT, REDIS_PORT), _port("cache", CACHE_PORT, CACHE_PORT)]
    service = {"selector": _selector(settings, "redis"), "ports": ports}
    return [
        _object(settings, "apps/v1", "StatefulSet", name, spec=spec),
        _object(settings, "v1", "Service", name, spec=service),
        *_claim(settings, "redis", volume),
    ]


def _redis_container(
    settings: Mapping[str, Any], name: str, port: int, resources: Json, arguments: Mapping[str, str]
) -> Json:
    arguments = {"--port": str(port), "--aclfile": "/etc/redis/users.acl", **arguments}
    return {
        "name": name,
        "image": settings["redis_image"],
        "imagePullPolicy": settings["image_pull_policy"],
        "command": ["redis-server"],
        "args": [word for pair in arguments.items() for word in pair],
        "ports": [{"name": name, "containerPort": port}],
        "resources": resources,
        "securityContext": dict(_CONTAINER_SECURITY),
        "volumeMounts": [{"name": "users", "mountPath": "/etc/redis", "readOnly": True}],
        "startupProbe": {"tcpSocket": {"port": name}, "periodSeconds": 1, "failureThreshold": 120},
        "livenessProbe": {"tcpSocket": {"port": name}, "periodSeconds": 20, "failureThreshold": 3},
        "readinessProbe": {"tcpSocket": {"port": name}, "periodSeconds": 10},
    }


def gateway_targets(settings: Mapping[str, Any]) -> list[Json]:
    """What k8s_apply_set waits for."""
    place = {"api_version": "apps/v1", "namespace": settings["namespace"]}
    targets = [{**place, "kind": _workload_kind(settings), "name": settings["name"]}]
    if settings["redis"] == "in_cluster":
        targets.append({**place, "kind": "StatefulSet", "name": f"{settings['name']}-redis"})
    for item in _balancer(settings):
        name = item["metadata"]["name"]
        targets.append({**place, "api_version": item["apiVersion"], "kind": item["kind"], "name": name})
    return targets


def gateway_patience(settings: Mapping[str, Any], seconds: int) -> int:
    """Seconds to wait for pods of which each takes ``seconds`` to start at most.

    They are replaced one after the other, each once load balancers know the one before; and of a StatefulSet each
    leaves before its successor comes.
    """
    balancer = settings["load_balancer"]
    each = _ARRIVING_S[balancer["type"]] if balancer else 0
    if _workload_kind(settings) == "StatefulSet":
        each += _drain_s(gateway_config(settings))
    return seconds + _bounds(settings)[1] * each


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
    """A table of the routes' backends, weights and canaries, a line each, as the admin API gives them."""

    def row(model: str, backend: str, now: str, declared: str, note: str = "") -> list[str]:
        notes = [note, "" if now == declared else f"(declared: {declared})"]
        return [model, backend, now, " ".join(text for text in notes if text)]

    rows = []
    for model, route in sorted(answer["routes"].items()):
        note = "(weights that were set are passed over)" if (route.get("changed") or {}).get("ignored") else ""
        rows += [
            row(model, target["backend"], str(target["weight"]), str(target["configured"]), note)
            for target in route["backends"]
        ]
        canary = route.get("canary")
        if canary:
            now, declared = f"{canary['percent']:g} %", f"{canary['configured']:g} %"
            rows.append(row(model, canary["backend"], now, declared, "canary"))
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
            "gateway_secret_environment": gateway_secret_environment,
            "gateway_secret_values": gateway_secret_values,
            "gateway_secrets": gateway_secrets,
            "gateway_patience": gateway_patience,
            "gateway_targets": gateway_targets,
            "gateway_traffic_lines": gateway_traffic_lines,
            "local_image_key": local_image_key,
        }
