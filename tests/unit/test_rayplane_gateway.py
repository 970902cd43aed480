"""The gateway role's filters: a configuration that the gateway itself takes, and objects that hold what it needs."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter import rayplane_gateway
from ansible_collections.rayplane.platform.plugins.filter.rayplane_gateway import (
    OPERATOR,
    gateway_applied_version,
    gateway_config,
    gateway_config_maps,
    gateway_files,
    gateway_issued_keys,
    gateway_key_entry,
    gateway_key_lines,
    gateway_objects,
    gateway_patience,
    gateway_problems,
    gateway_secret_environment,
    gateway_secret_values,
    gateway_secrets,
    gateway_targets,
    gateway_traffic_lines,
    gateway_version,
    local_image_key,
)
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import keys as gateway_keys_of_the_gateway
from serve_app.gateway.config import Server, Timeouts
from serve_app.gateway.policy import Policy, load

Json = dict[str, Any]

KEY = "rp-abcdefghij12-" + "A" * 43
PRIVATE = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
"""
VALUES = {
    "gateway-operator": {"key": KEY},
    "gateway-redis": {"password": "word"},
    "gateway-audit": {"private.pem": PRIVATE},
}
MODELS = [
    {"id": "llama", "source": "a/b", "access": ["premium"]},
    {"id": "qwen", "source": "a/c"},
]
DEFAULTS: Json = yaml.safe_load((PROJECT / "roles/gateway/defaults/main.yml").read_text(encoding="utf-8"))


def settings(**changes: Any) -> Json:
    """The role's defaults as its vars hand them to the filters, with some changed."""
    values = {name.removeprefix("gateway_"): copy.deepcopy(value) for name, value in DEFAULTS.items()}
    return {
        **values,
        "namespace": "rayplane",
        "models": MODELS,
        "serve_routes": {"llama": "/llama", "qwen": "/qwen"},
        "serve_url": "http://rayplane-serve-svc.rayplane.svc:8000",
        "issued_keys": [],
        "labels": {"app.kubernetes.io/component": "gateway"},
        **changes,
    }


def built(folder: Path, **changes: Any) -> Policy:
    """What the gateway makes of the configuration, with files in place of those that only a pod has."""
    signing = folder / "private.pem"
    signing.write_text(PRIVATE, encoding="utf-8")
    audit = {**changes.pop("audit", {"enabled": True}), "signing_key_file": str(signing)}
    for name, text in gateway_files(settings(audit=audit, **changes), KEY).items():
        (folder / name).write_text(text, encoding="utf-8")
    return load(folder / "config.json", environment=None)


def one(objects: list[Json], kind: str, name: str = "gateway") -> Json:
    return next(item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name))


def pod(**changes: Any) -> Json:
    spec: Json = one(gateway_objects(settings(**changes), VALUES), "Deployment")["spec"]["template"]
    return spec


def volume(spec: Json, name: str) -> Json:
    return next(item for item in spec["spec"]["volumes"] if item["name"] == name)


def many(count: int, **more: Any) -> list[Json]:
    """So many keys, as a file of keys has them."""
    return [gateway_key_entry(f"rp-a{number:011d}-x", f"team-{number}", "basic") | more for number in range(count)]


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_gateway_takes_the_defaults(tmp_path: Path) -> None:
    policy = built(tmp_path)
    assert [key.id for key in policy.keys] == [OPERATOR]
    assert policy.keys.find(KEY, 0).role == OPERATOR
    assert policy.config.backends["llama"].url == "http://rayplane-serve-svc.rayplane.svc:8000/llama"
    assert policy.config.routes["qwen"].backends[0].backend == "qwen"
    assert policy.config.server.admin_port == 9090
    assert policy.config.store.on_failure == "local"
    assert policy.config.store.start_without_revocations is False


def test_a_model_alone_is_at_the_root(tmp_path: Path) -> None:
    policy = built(tmp_path, models=MODELS[1:], serve_routes={"qwen": "/"})
    assert policy.config.backends["qwen"].url == "http://rayplane-serve-svc.rayplane.svc:8000"


def test_access_decides_which_role_has_which_model(tmp_path: Path) -> None:
    roles = built(tmp_path).config.roles
    assert roles["basic"].models == ["qwen"]
    assert sorted(roles["premium"].models) == ["llama", "qwen"]
    assert roles["admin"].models == ["*"]
    assert roles[OPERATOR].operations == ["chat", "completions", "models", "admin"]


def test_an_empty_access_is_for_nobody_but_who_may_all(tmp_path: Path) -> None:
    policy = built(tmp_path, models=[{"id": "qwen", "access": []}])
    assert [name for name, role in policy.config.roles.items() if role.models] == ["admin", OPERATOR]


def test_routes_and_backends_of_ones_own(tmp_path: Path) -> None:
    policy = built(
        tmp_path,
        backends={"far": {"url": "https://llm.example.com", "api_key_env": "FAR_KEY"}},
        backend_defaults={"timeouts": {"total_s": 900}},
        routes={
            "llama": {"backends": [{"backend": "llama"}, {"backend": "far", "priority": 1}], "aliases": ["default"]},
            "remote": {"backends": [{"backend": "far"}], "access": ["admin"]},
        },
    )
    assert [target.backend for target in policy.config.routes["llama"].backends] == ["llama", "far"]
    assert policy.route("default") is not None
    assert policy.config.backends["qwen"].timeouts.total_s == 900
    assert policy.config.backends["far"].timeouts.total_s == 600
    assert "remote" not in policy.config.roles["premium"].models


@pytest.mark.parametrize(
    ("redis", "secret", "url", "variable"),
    [
        ("in_cluster", "", "redis://gateway-redis.rayplane.svc:6379/0", "RAYPLANE_REDIS_PASSWORD"),
        ("rediss://cache.example.com:6380/1", "redis", "rediss://cache.example.com:6380/1", "RAYPLANE_REDIS_PASSWORD"),
        ("redis://cache:6379/0", "", "redis://cache:6379/0", ""),
        ("", "", "", ""),
    ],
)
def test_redis_is_in_the_cluster_or_given_or_none(
    tmp_path: Path, redis: str, secret: str, url: str, variable: str
) -> None:
    policy = built(tmp_path, redis=redis, redis_password_secret=secret)
    assert (policy.config.store.url, policy.config.store.password_env) == (url, variable)
    beside = url.replace("6379", "6380") if redis == "in_cluster" else ""
    assert policy.config.store.cache_url == beside
    assert policy.config.store.cache_password_env == (variable if beside else "")
    kinds = [item["kind"] for item in gateway_objects(settings(redis=redis), VALUES)]
    assert ("StatefulSet" in kinds) == (redis == "in_cluster")


def test_everything_else_is_passed_on(tmp_path: Path) -> None:
    policy = built(
        tmp_path,
        cache={"enabled": True, "ttl_s": 60},
        filters={"pii": {"type": "sensitive_data", "action": "redact"}},
        tenants={"*": {"concurrency": 8}},
        logging={"level": "debug"},
        open_operations=["tokenize"],
        issuers=[{"issuer": "https://id.example.com", "audience": ["llm"], "jwks_url": "https://id.example.com/keys"}],
        server={"max_body_bytes": 1000},
    )
    config = policy.config
    assert (
        config.cache.ttl_s == 60 and config.filters["pii"].action == "redact" and config.tenants["*"].concurrency == 8
    )
    assert config.logging.level == "debug" and config.open_operations == ["tokenize"]
    assert config.auth.issuers[0].audience == ["llm"] and config.server.max_body_bytes == 1000


def test_the_version_is_the_gateways_own(tmp_path: Path) -> None:
    policy = built(tmp_path)
    files = {name: (tmp_path / name).read_text(encoding="utf-8") for name in ("config.json", "keys.json")}
    assert gateway_version(files) == policy.version
    objects = gateway_objects(settings(), VALUES)
    assert gateway_applied_version(objects) == gateway_version(one(objects, "ConfigMap", "gateway-config")["data"])
    assert gateway_applied_version([]) == ""


@given(st.text(min_size=1, max_size=60))
def test_a_key_is_stored_as_the_gateway_stores_it(tail: str) -> None:
    key = f"rp-abcdefghij12-{tail}"
    entry = gateway_key_entry(key, "x", "basic")
    assert entry["hash"] == gateway_keys_of_the_gateway.digest(key)
    assert entry["prefix"] == "abcdefghij12"


def test_no_key_is_in_the_configuration() -> None:
    assert KEY not in json.dumps(gateway_objects(settings(), VALUES))
    assert "word" not in [text for item in gateway_objects(settings(), VALUES) for text in json.dumps(item).split('"')]


@pytest.mark.parametrize(
    ("given", "replicas", "fraction"),
    [
        ({"on_failure": "local"}, {"min": 3, "max": 12}, 0.0833),
        ({"on_failure": "local"}, {"min": 2, "max": 6}, 0.1666),
        ({"on_failure": "local"}, {"min": 1}, 1.0),
        ({"on_failure": "local", "local_fraction": 0.5}, {"min": 1, "max": 9}, 0.5),
    ],
)
def test_all_replicas_that_there_can_be_share_the_limits(
    tmp_path: Path, given: Json, replicas: Json, fraction: float
) -> None:
    store = built(tmp_path, store=given, replicas=replicas).config.store
    assert store.local_fraction == fraction
    if "local_fraction" not in given:
        assert store.local_fraction * replicas.get("max", 1) <= 1
    # Where it says nothing, a change of the replicas replaces no pod.
    closed = {"on_failure": "closed"}
    assert gateway_config(settings(store=closed)) == gateway_config(
        settings(store=closed, replicas={"min": 1, "max": 9})
    )


# --- many keys -------------------------------------------------------------------------------------------------------


def maps_of(objects: list[Json]) -> dict[str, dict[str, str]]:
    return {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}


def test_few_keys_lie_beside_the_configuration() -> None:
    found = maps_of(gateway_objects(settings(keys=many(1000)), VALUES))
    assert {name: sorted(data) for name, data in found.items()} == {"gateway-config": ["config.json", "keys.json"]}


def test_a_hundred_thousand_keys_are_spread_and_the_gateway_takes_them(tmp_path: Path) -> None:
    keys = many(100_000, tenant="search")
    objects = gateway_objects(settings(issued_keys=keys, audit={}), VALUES)
    found = maps_of(objects)
    assert all(len(json.dumps(data)) < 1024 * 1024 for data in found.values())
    # A pod finds each of them.
    sources = volume(one(objects, "Deployment")["spec"]["template"], "config")["projected"]["sources"]
    known = {source["configMap"]["name"] for source in sources}
    assert found.keys() <= known and len(found) > 10
    assert [source["configMap"]["name"] for source in sources if not source["configMap"].get("optional")] == [
        "gateway-config"
    ]
    for data in found.values():
        for name, text in data.items():
            (tmp_path / name).write_text(text)
    policy = load(tmp_path / "config.json", environment=None)
    assert len(policy.keys) == 100_001
    assert policy.keys.find(KEY, 0).role == OPERATOR
    assert gateway_applied_version(objects) == policy.version
    # One key more changes one of them, and the configuration that names its content.
    after = maps_of(gateway_objects(settings(issued_keys=[*many(1), *keys[1:]], audit={}), VALUES))
    assert sorted(name for name in after if after[name] != found[name])[0] == "gateway-config"
    assert len([name for name in after if after[name] != found[name]]) == 2


def test_more_keys_than_fit_are_refused_with_a_number() -> None:
    wide = many(3000, client="x" * 20_000)
    with pytest.raises(AnsibleFilterError, match=r"there are 3001 keys, and about 1[0-9]{3} like them fit into 32"):
        gateway_config_maps(gateway_files(settings(keys=wide), KEY))
    routes = {f"r{number}": {"backends": [{"backend": "qwen"}], "aliases": ["x" * 200]} for number in range(5000)}
    with pytest.raises(AnsibleFilterError, match="gateway_routes: the configuration without keys is"):
        gateway_config_maps(gateway_files(settings(routes=routes), KEY))


# --- problems --------------------------------------------------------------------------------------------------------


def test_good_settings_have_no_problem() -> None:
    assert gateway_problems(settings()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"models": [{"id": "m", "access": ["gold"]}]},
            "(m).access: there is no role gold; gateway_roles has admin, basic",
        ),
        ({"roles": {OPERATOR: {}}, "models": []}, f"gateway_roles.{OPERATOR}: the name is taken"),
        ({"routes": {"other": {}}}, "gateway_routes.other: no model"),
        ({"backends": {"qwen": {"url": "http://x"}}}, "gateway_backends.qwen: the name is taken"),
        (
            {"keys": [{"id": "a", "prefix": "p1"}], "issued_keys": [{"id": "a", "prefix": "p2"}]},
            "gateway_keys_file: id a stands in gateway_keys, too",
        ),
        ({"keys": [{"id": "a", "prefix": "p"}, {"id": "b", "prefix": "p"}]}, "prefix p stands in gateway_keys, too"),
        ({"keys": [{"id": OPERATOR, "prefix": "p"}]}, f"the id {OPERATOR} is taken"),
        (
            {"backends": {"far": {"url": "https://x", "headers": {"Authorization": "Bearer hidden-1"}}}},
            "gateway_backends.far.headers.Authorization: it would lie in a ConfigMap",
        ),
        (
            {"backends": {"far": {"url": "https://x", "headers": {"api-key": "hidden-1"}}}},
            "in `api_key_env` and `api_key_header: api-key`, and a Secret that has it in gateway_env_from_secrets",
        ),
        (
            {"backend_defaults": {"headers": {"Cookie": "hidden-1"}}},
            "gateway_backend_defaults.headers.Cookie: it would",
        ),
        (
            {"filters": {"f": {"type": "webhook", "options": {"headers": {"Authorization": "hidden-1"}}}}},
            "gateway_filters.f.options.headers.Authorization: it would lie",
        ),
        (
            {"filters": {"f": {"type": "webhook", "options": {"url": "https://u:hidden-1@x"}}}},
            "gateway_filters.f.options.url: a password stands in the address",
        ),
        ({"redis": "rediss://u:hidden-1@x:6379/0"}, "gateway_redis: a password stands in the address"),
        ({"store": {"cache_url": "redis://:hidden-1@x"}}, "gateway_store.cache_url: a password stands in the address"),
    ],
)
def test_problems(changes: Json, says: str) -> None:
    (found,) = gateway_problems(settings(**changes))
    assert says in found
    assert "hidden-1" not in found and "; " in found


def test_what_is_no_secret_may_be_written_down() -> None:
    good = {"url": "https://x", "api_key_env": "FAR_KEY", "api_key_header": "api-key", "headers": {"x-team": "a"}}
    assert gateway_problems(settings(backends={"far": good}, redis="rediss://user@x:6379/0")) == []


def test_names_of_secrets_in_the_environment() -> None:
    env = {"HF_TOKEN": "x", "openai_api_key": "x", "DB_PASSWORD": "", "TOKENIZERS": "x", "KEY_FILE": "/x"}
    assert gateway_secret_environment(env) == ["HF_TOKEN", "openai_api_key"]


# --- objects ---------------------------------------------------------------------------------------------------------


def test_pods_run_with_as_little_as_they_can() -> None:
    for item in gateway_objects(settings(), VALUES):
        if item["kind"] not in ("Deployment", "StatefulSet"):
            continue
        spec = item["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


def test_limits_and_cached_answers_are_in_two_redis() -> None:
    objects = gateway_objects(settings(), VALUES)
    containers = one(objects, "StatefulSet", "gateway-redis")["spec"]["template"]["spec"]["containers"]
    started = {container["name"]: container["args"] for container in containers}

    def option(name: str, option: str) -> str:
        words: list[str] = started[name]
        return words[words.index(option) + 1]

    assert (option("redis", "--maxmemory-policy"), option("redis", "--appendonly")) == ("noeviction", "yes")
    assert (option("cache", "--maxmemory-policy"), option("cache", "--appendonly")) == ("allkeys-lru", "no")
    for container in containers:
        assert "--aclfile" in container["args"]
        bound = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))
        assert int(option(container["name"], "--maxmemory").removesuffix("mb")) < bound
    service = one(objects, "Service", "gateway-redis")["spec"]
    assert [(port["name"], port["port"]) for port in service["ports"]] == [("redis", 6379), ("cache", 6380)]


def test_pods_outlive_their_streams() -> None:
    assert pod(server={"drain_s": 100, "drain_delay_s": 7.5})["spec"]["terminationGracePeriodSeconds"] == 123


def test_services() -> None:
    objects = gateway_objects(settings(service_type="NodePort", node_port=30080), VALUES)
    service = one(objects, "Service")["spec"]
    assert service["ports"] == [
        {"name": "http", "port": 8000, "targetPort": 8080, "protocol": "TCP", "nodePort": 30080}
    ]
    admin = one(objects, "Service", "gateway-admin")["spec"]
    assert admin["type"] == "ClusterIP" and admin["publishNotReadyAddresses"] is True
    plain = one(gateway_objects(settings(node_port=30080), VALUES), "Service")["spec"]
    assert "nodePort" not in plain["ports"][0]
    labels = pod()["metadata"]["labels"]
    assert service["selector"].items() <= labels.items() and admin["selector"].items() <= labels.items()


ARN = "arn:aws:acm:us-west-2:123456789012:certificate/0f3c2d1e-aaaa"


def balanced(kind: str, name: str, **balancer: Any) -> tuple[Json, Json]:
    """What the load balancer is made of, its annotations without their prefix, and its specification."""
    objects = gateway_objects(settings(load_balancer=balancer), VALUES)
    found = one(objects, kind, name)
    told = found["metadata"]["annotations"]
    prefixes = ("service.beta.kubernetes.io/aws-load-balancer-", "alb.ingress.kubernetes.io/")
    return {key.removeprefix(prefixes[0]).removeprefix(prefixes[1]): told[key] for key in told}, found["spec"]


def test_a_network_load_balancer_with_tls() -> None:
    told, spec = balanced("Service", "gateway-nlb", type="nlb", certificate_arn=ARN, allowed_cidrs=["10.0.0.0/8"])
    assert (told["scheme"], told["nlb-target-type"], told["healthcheck-path"]) == ("internal", "ip", "/healthz")
    assert (told["ssl-cert"], told["ssl-ports"], told["backend-protocol"]) == (ARN, "https", "tcp")
    assert told["target-group-attributes"].split(",") == [
        "deregistration_delay.timeout_seconds=180",  # what the pods take: 60 s, and 120 s before
        "target_health_state.unhealthy.connection_termination.enabled=false",
    ]
    assert (spec["type"], spec["loadBalancerClass"]) == ("LoadBalancer", "service.k8s.aws/nlb")
    assert spec["ports"] == [{"name": "https", "port": 443, "targetPort": 8080, "protocol": "TCP"}]
    assert spec["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
    # The gateway's own Service stays inside.
    assert (
        one(gateway_objects(settings(load_balancer={"type": "nlb"}), VALUES), "Service")["spec"]["type"] == "ClusterIP"
    )


def test_a_network_load_balancer_inside_without_tls() -> None:
    told, spec = balanced("Service", "gateway-nlb", type="nlb", annotations={"example.com/x": True})
    assert told["listener-attributes.TCP-80"] == "tcp.idle_timeout.seconds=660"
    assert told["example.com/x"] == "True" and "ssl-cert" not in told
    assert [port["port"] for port in spec["ports"]] == [80]


def test_an_application_load_balancer_with_tls() -> None:
    given: Json = {"type": "alb", "scheme": "internet-facing", "certificate_arn": ARN, "allowed_cidrs": ["1.2.3.0/24"]}
    told, spec = balanced("Ingress", "gateway-alb", **given)
    assert (told["scheme"], told["target-type"], told["inbound-cidrs"]) == ("internet-facing", "ip", "1.2.3.0/24")
    assert json.loads(told["listen-ports"]) == [{"HTTPS": 443}]
    assert told["certificate-arn"] == ARN and told["ssl-policy"].startswith("ELBSecurityPolicy-TLS13")
    assert told["load-balancer-attributes"] == "idle_timeout.timeout_seconds=660"
    assert "deregistration_delay.timeout_seconds=90" in told["target-group-attributes"]
    [path] = spec["rules"][0]["http"]["paths"]
    assert spec["ingressClassName"] == "alb"
    assert path["backend"] == {"service": {"name": "gateway", "port": {"name": "http"}}}


def test_the_gateways_own_defaults_are_repeated_as_they_are() -> None:
    own = Server()
    config = {"server": {}}
    assert rayplane_gateway._drain_s(config) == own.drain_s + own.drain_delay_s
    assert Timeouts().total_s < rayplane_gateway._IDLE_S
    found = rayplane_gateway._behind_balancer({"load_balancer": {"type": "alb", "idle_timeout_s": 1}, "server": {}})
    assert found["keep_alive_s"] == own.keep_alive_s


@pytest.mark.parametrize(
    ("balancer", "server", "wanted"),
    [
        ({}, {}, (5.0, 75.0)),
        ({"type": "nlb"}, {}, (120.0, 75.0)),
        ({"type": "alb"}, {}, (30.0, 690.0)),
        ({"type": "alb", "idle_timeout_s": 60}, {"drain_delay_s": 40}, (40.0, 90.0)),
    ],
)
def test_pods_fit_their_load_balancer(
    tmp_path: Path, balancer: Json, server: Json, wanted: tuple[float, float]
) -> None:
    given = {**DEFAULTS["gateway_server"], **server}
    found = built(tmp_path, load_balancer=balancer, server=given).config.server
    assert (found.drain_delay_s, found.keep_alive_s) == wanted
    grace = pod(load_balancer=balancer, server=given)["spec"]["terminationGracePeriodSeconds"]
    assert grace == wanted[0] + 60 + 15


@pytest.mark.parametrize(
    ("balancer", "volume", "ready", "patience"),
    [
        ({}, {}, None, 300),
        ({}, {"size": "20Gi"}, None, 300 + 3 * 65),
        ({"type": "alb"}, {}, 60, 300 + 3 * 60),
        ({"type": "nlb"}, {"size": "20Gi"}, 180, 300 + 3 * (180 + 120 + 60)),
    ],
)
def test_pods_are_replaced_at_the_pace_of_their_load_balancer(
    balancer: Json, volume: Json, ready: int | None, patience: int
) -> None:
    given = settings(
        load_balancer=balancer,
        audit={"enabled": bool(volume)},
        audit_volume=volume,
        replicas={"min": 2, "max": 3},
        server=DEFAULTS["gateway_server"],
    )
    workload = one(gateway_objects(given, VALUES), "StatefulSet" if volume else "Deployment", "gateway")
    assert workload["spec"].get("minReadySeconds") == ready
    assert gateway_patience(given, 300) == patience


def test_either_an_autoscaler_or_a_number_of_replicas() -> None:
    scaled = gateway_objects(settings(replicas={"min": 2, "max": 5}), VALUES)
    assert one(scaled, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 5
    assert "replicas" not in one(scaled, "Deployment")["spec"]
    fixed = gateway_objects(settings(replicas={"min": 3, "max": 3}), VALUES)
    assert "HorizontalPodAutoscaler" not in [item["kind"] for item in fixed]
    assert one(fixed, "Deployment")["spec"]["replicas"] == 3


STARTED = "rayplane.io/started-with"


@pytest.mark.parametrize(
    "changes",
    [
        {"roles": {"basic": {"max_tokens": 1}}},
        {"keys": [gateway_key_entry("rp-zzzzzzzzzzzz-x", "k", "basic")]},
        {"routes": {"qwen": {"retries": 5}}},
        {"filters": {"f": {"type": "injection"}}},
        {"cache": {"enabled": True}},
        {"cors": {"origins": ["*"]}},
    ],
)
def test_what_is_taken_over_while_it_runs_replaces_no_pod(changes: Json) -> None:
    assert pod(**changes) == pod()
    before, after = gateway_objects(settings(), VALUES), gateway_objects(settings(**changes), VALUES)
    assert one(before, "ConfigMap", "gateway-config") != one(after, "ConfigMap", "gateway-config")


@pytest.mark.parametrize(
    "changes",
    [
        {"server": {"drain_s": 1}},
        {"store": {"on_failure": "closed"}},
        {"logging": {"level": "debug"}},
        {"tracing": {"enabled": True, "endpoint": "http://otel:4318"}},
        {"audit": {"enabled": True, "content": True}},
    ],
)
def test_what_is_read_at_the_start_replaces_the_pods(changes: Json) -> None:
    assert pod(**changes)["metadata"]["annotations"][STARTED] != pod()["metadata"]["annotations"][STARTED]


def test_a_new_password_replaces_gateway_and_redis() -> None:
    other = {**VALUES, "gateway-redis": {"password": "other"}}
    for kind, name in (("Deployment", "gateway"), ("StatefulSet", "gateway-redis")):
        before = one(gateway_objects(settings(), VALUES), kind, name)["spec"]["template"]["metadata"]["annotations"]
        after = one(gateway_objects(settings(), other), kind, name)["spec"]["template"]["metadata"]["annotations"]
        assert before[STARTED] != after[STARTED]
    operator = {**VALUES, "gateway-operator": {"key": KEY.replace("A", "B")}}
    assert one(gateway_objects(settings(), operator), "Deployment") == one(
        gateway_objects(settings(), VALUES), "Deployment"
    )


def test_a_log_without_a_volume_fills_no_node() -> None:
    assert volume(pod(), "audit") == {"name": "audit", "emptyDir": {"sizeLimit": "2Gi"}}


@pytest.mark.parametrize("replicas", [{"min": 1, "max": 2}, {"min": 3, "max": 3}])
def test_with_a_volume_that_is_not_shared_each_pod_has_its_own(replicas: Json) -> None:
    changes: Json = {"audit_volume": {"size": "5Gi", "class": "gp3"}, "replicas": replicas}
    objects = gateway_objects(settings(**changes), VALUES)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert ("Deployment", "gateway") not in names and ("PersistentVolumeClaim", "gateway-audit") not in names
    spec = one(objects, "StatefulSet")["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "audit"
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "gp3",
    }
    # By them `destroy` finds the claims, which are nobody's else.
    assert settings()["labels"].items() <= claim["metadata"]["labels"].items()
    assert {"name": "audit", "mountPath": "/var/lib/rayplane/audit"} in spec["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert "audit" not in [item["name"] for item in spec["template"]["spec"]["volumes"]]
    assert spec["podManagementPolicy"] == "Parallel" and "strategy" not in spec
    service = one(objects, "Service", spec["serviceName"])
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    scalers = [item["spec"] for item in objects if item["kind"] == "HorizontalPodAutoscaler"]
    assert [scaler["scaleTargetRef"]["kind"] for scaler in scalers] == ["StatefulSet"] * len(scalers)
    assert spec.get("replicas") == (None if scalers else 3)
    assert gateway_targets(settings(**changes))[0]["kind"] == "StatefulSet"


def test_volumes() -> None:
    without = gateway_objects(settings(audit={}, redis_volume={}), VALUES)
    assert "PersistentVolumeClaim" not in [item["kind"] for item in without]
    assert "audit" not in [
        volume["name"] for volume in one(without, "Deployment")["spec"]["template"]["spec"]["volumes"]
    ]
    kept = gateway_objects(
        settings(audit_volume={"size": "5Gi", "class": "efs", "access_mode": "ReadWriteMany"}), VALUES
    )
    claim = one(kept, "PersistentVolumeClaim", "gateway-audit")["spec"]
    assert claim == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "efs",
    }


def test_secrets_hold_hash_and_public_key_too() -> None:
    wanted = gateway_secret_values(settings())
    assert not any(entry["given"] for entry in wanted)
    assert {entry["name"]: entry["values"] for entry in wanted} == {
        "gateway-operator": {"key": "api_key"},
        "gateway-redis": {"password": "token"},
        "gateway-audit": {"private.pem": "ed25519"},
    }
    data = {
        item["metadata"]["name"]: {key: base64.b64decode(text).decode() for key, text in item["data"].items()}
        for item in gateway_secrets(settings(), VALUES)
    }
    acl = data["gateway-redis"]["users.acl"]
    assert acl == f"user default on #{hashlib.sha256(b'word').hexdigest()} ~* &* +@all -@admin\n"
    assert data["gateway-audit"]["public.pem"].startswith("-----BEGIN PUBLIC KEY-----")
    assert gateway_secret_values(settings(redis="", audit={})) == [
        {"name": "gateway-operator", "values": {"key": "api_key"}, "given": False}
    ]


def test_secrets_that_somebody_else_makes() -> None:
    names = {"operator_secret": "ext-operator", "audit_secret": "ext-audit", "redis_password_secret": "ext-redis"}
    values = {
        "ext-operator": {"key": KEY},
        "ext-redis": {"password": "word"},
        "ext-audit": {"private.pem": PRIVATE},
    }
    wanted = gateway_secret_values(settings(**names))
    assert {entry["name"]: entry["given"] for entry in wanted} == dict.fromkeys(values, True)
    # Of what is given nothing is written but what Redis needs of its password: the hash.
    (secret,) = gateway_secrets(settings(**names), values)
    assert secret["metadata"]["name"] == "gateway-redis" and list(secret["data"]) == ["users.acl"]
    spec = one(gateway_objects(settings(**names), values), "Deployment")["spec"]["template"]
    assert volume(spec, "audit-key")["secret"]["secretName"] == "ext-audit"
    (password,) = [item for item in spec["spec"]["containers"][0]["env"] if item["name"] == "RAYPLANE_REDIS_PASSWORD"]
    assert password["valueFrom"]["secretKeyRef"] == {"name": "ext-redis", "key": "password"}
    # A rotated one replaces the pods.
    rotated = {**values, "ext-redis": {"password": "other"}}
    again = one(gateway_objects(settings(**names), rotated), "Deployment")["spec"]["template"]
    assert again["metadata"]["annotations"][STARTED] != spec["metadata"]["annotations"][STARTED]


def test_targets() -> None:
    balancers = [gateway_targets(settings(load_balancer={"type": kind}))[-1] for kind in ("nlb", "alb")]
    assert [(one["api_version"], one["kind"], one["name"]) for one in balancers] == [
        ("v1", "Service", "gateway-nlb"),
        ("networking.k8s.io/v1", "Ingress", "gateway-alb"),
    ]
    assert [target["kind"] for target in gateway_targets(settings())] == ["Deployment", "StatefulSet"]
    assert [target["kind"] for target in gateway_targets(settings(redis=""))] == ["Deployment"]


# --- files and tables ------------------------------------------------------------------------------------------------


def test_issued_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert gateway_issued_keys(str(file)) == [] == gateway_issued_keys("")
    file.write_text('{"keys": [{"id": "a"}]}')
    assert gateway_issued_keys(str(file)) == [{"id": "a"}]
    for text in ("[", "[]", '{"keys": 1}', "{}"):
        file.write_text(text)
        with pytest.raises(AnsibleFilterError, match="keys"):
            gateway_issued_keys(str(file))


def test_tables() -> None:
    keys = [
        {"id": OPERATOR, "prefix": "p", "role": OPERATOR},
        {
            "id": "a",
            "prefix": "p1",
            "role": "basic",
            "tenant": "t",
            "client": "a",
            "expires": None,
            "revoked": {"at": 1},
        },
        {"id": "b", "prefix": "p2", "role": "basic", "tenant": "t", "client": "b", "disabled": True},
    ]
    lines = gateway_key_lines(keys)
    assert [line.split()[-1] for line in lines] == ["state", "revoked", "disabled"]
    target = {"backend": "blue", "weight": 90, "configured": 100}
    lines = gateway_traffic_lines({"routes": {"m": {"backends": [target]}}})
    assert lines[1].split() == ["m", "blue", "90", "(declared:", "100)"]
    canary = {"backend": "green", "percent": 12.5, "configured": 5.0}
    route = {"backends": [{**target, "weight": 100}], "canary": canary, "changed": {"ignored": True}}
    lines = gateway_traffic_lines({"routes": {"m": route}})
    assert lines[1].split()[:3] == ["m", "blue", "100"] and "passed over" in lines[1]
    assert lines[2].split() == ["m", "green", "12.5", "%", "canary", "(declared:", "5", "%)"]


def test_local_image_key(tmp_path: Path) -> None:
    assert local_image_key(str(tmp_path), "i:1") == ""
    (tmp_path / "images.json").write_text('{"i:1": "abc"}')
    assert local_image_key(str(tmp_path), "i:1") == "abc"


def test_config_is_stable() -> None:
    assert json.dumps(gateway_config(settings())) == json.dumps(gateway_config(settings()))


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_image_holds_what_the_project_says_the_gateway_needs() -> None:
    import tomllib

    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (PROJECT / "tools/gateway/requirements.in").read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(
        [*extras["gateway"], *extras["tracing"]]
    )


def test_the_containerfile_copies_what_is_there() -> None:
    for line in (PROJECT / "serve_app/Containerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert (PROJECT / line.split()[1]).exists(), line


def test_the_local_image_runs_compiled_code() -> None:
    from rayplane_local import images

    content = images.compiled_code()
    source = "opt/rayplane/code/serve_app/gateway/__main__.py"
    assert content[source] == (PROJECT / "serve_app/gateway/__main__.py").read_bytes()
    compiled = content[
        f"opt/rayplane/code/serve_app/gateway/__pycache__/__main__.{__import__('sys').implementation.cache_tag}.pyc"
    ]
    assert isinstance(compiled, bytes)
    # Flags of PEP 552: by hash, never checked against the source.
    assert int.from_bytes(compiled[4:8], "little") == 1
    assert not [name for name in content if name.endswith(".pyc") and "__pycache__" not in name]
