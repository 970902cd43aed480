"""Reading a configuration: what is good is taken, and every mistake is named in one pass."""

from __future__ import annotations

import copy
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.gateway import keys, policy
from serve_app.gateway.policy import Policy, PolicyError, load

ALICE = keys.generate()
BOB = keys.generate()


def base() -> dict[str, Any]:
    """A configuration without a mistake that uses every section."""
    return {
        "server": {"port": 0, "admin_port": 0},
        "store": {"url": "redis://:secret@127.0.0.1:6379/0", "local_fraction": 0.5},
        "auth": {
            "issuers": [
                {
                    "issuer": "https://id.example.com",
                    "audience": ["llm"],
                    "jwks_url": "https://id.example.com/jwks",
                    "role_map": {"staff": "premium"},
                    "default_role": "basic",
                }
            ]
        },
        "roles": {
            "basic": {"models": ["small-*"], "max_tokens": 256, "limits": {"requests": {"limit": 60}}},
            "premium": {"models": ["*"], "filters": ["pii"], "allowed_parameters": ["temperature"]},
            "admin": {"operations": ["admin"]},
        },
        "keys": [
            {"id": "alice", "prefix": ALICE.prefix, "hash": ALICE.hash, "role": "premium", "expires": "2030-01-01"},
            {"id": "bob", "prefix": BOB.prefix, "hash": BOB.hash, "role": "basic", "models": ["small-1"]},
        ],
        "tenants": {"*": {"daily_tokens": 1_000_000}, "research": {"monthly_cost": 10.5}},
        "backends": {
            "one": {"url": "http://one:8000", "headers": {"x-team": "a"}},
            "two": {"url": "https://two.example.com/llm", "timeouts": {"connect_s": 1}},
        },
        "routes": {
            "small-1": {"backends": [{"backend": "one", "weight": 1}, {"backend": "two", "priority": 1}]},
            "large": {
                "backends": [{"backend": "two"}],
                "aliases": ["gpt-4"],
                "canary": {"backend": "one", "percent": 5},
                "shadow": {"backend": "one", "percent": 1.5},
                "price": {"input": 1, "output": 2.5},
            },
        },
        "cache": {"enabled": True, "ttl_s": 60},
        "filters": {"pii": {"type": "sensitive_data", "action": "redact"}},
        "audit": {"directory": "audit"},
        "tracing": {"sample_ratio": 1},
    }


def put(values: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split("/")
    place: Any = values
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(values: object, name: str = "gateway.yaml") -> Path:
        file = tmp_path / name
        text = values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)
        if name.endswith(".json") and not isinstance(values, str):
            text = msgspec.json.encode(values).decode()
        file.write_text(text)
        return file

    return _write


def mistakes(file: Path, **environment: str) -> list[str]:
    """The problems of a file, each as `variable: reason`."""
    with pytest.raises(PolicyError) as caught:
        load(file, environment=environment)
    for one in caught.value.problems:
        assert str(one) in str(caught.value)
        assert one.reason and one.cure.endswith((".", "?"))
        assert "secret" not in str(one) or "shared secret" in str(one)
    return [f"{one.variable}: {one.reason}" for one in caught.value.problems]


# --- what is good


@pytest.mark.parametrize("name", ["gateway.yaml", "gateway.json", "gateway.conf"])
def test_a_good_configuration(write: Callable[..., Path], name: str) -> None:
    read = load(write(base(), name))
    assert read.route("large") == read.route("gpt-4") == ("large", read.config.routes["large"])
    assert read.route("other") is None
    assert read.role("basic") is read.config.roles["basic"]
    assert read.role("other") is None
    assert len(read.keys) == 2
    assert read.keys.find(ALICE.key, 1e9).role == "premium"
    assert read.config.routes["large"].price.output == 2.5
    assert len(read.version) == 16 and int(read.version, 16) >= 0
    assert read.files == (write(base(), name),)


def test_yaml_and_json_say_the_same(write: Callable[..., Path]) -> None:
    assert load(write(base())).config == load(write(base(), "gateway.json")).config


def test_json_in_a_yaml_file(write: Callable[..., Path]) -> None:
    assert load(write(msgspec.json.encode(base()).decode(), "config.yaml")).config == load(write(base())).config


def test_an_empty_mapping_is_enough(write: Callable[..., Path]) -> None:
    read = load(write("{}"))
    assert len(read.keys) == 0 and read.config.server.port == 8080


def test_words_that_older_yaml_takes_for_something_else(write: Callable[..., Path]) -> None:
    """`on:` is a name of a filter, `no` may be a role's, and a time stays a text."""
    text = f"""
roles: {{no: {{models: [yes, 'on']}}}}
keys:
  - id: a
    prefix: {ALICE.prefix}
    hash: {ALICE.hash}
    role: no
    expires: 2030-01-01T00:00:00Z
    retain: false
filters:
  pii: {{type: sensitive_data, on: [input]}}
"""
    read = load(write(text))
    assert read.config.roles["no"].models == ["yes", "on"]
    assert read.config.keys[0].expires == "2030-01-01T00:00:00Z"
    assert read.config.keys[0].retain is False
    assert read.config.filters["pii"].on == ["input"]


def test_anchors_and_merges(write: Callable[..., Path]) -> None:
    text = """
roles:
  basic: &basic {models: ["a"], max_tokens: 5}
  more: &more {<<: *basic, max_tokens: 6}
  most: {<<: *more, max_tokens: 7}
"""
    roles = load(write(text)).config.roles
    assert [(one.models, one.max_tokens) for one in roles.values()] == [(["a"], 5), (["a"], 6), (["a"], 7)]


def test_the_version_is_of_all_files_content(write: Callable[..., Path]) -> None:
    values = {**base(), "key_files": ["more.json"]}
    write([], "more.json")
    first = load(write(values)).version
    assert load(write(values)).version == first
    write([{"id": "carol", "prefix": "carolcarol12", "hash": "sha256:" + "0" * 64, "role": "basic"}], "more.json")
    second = load(write(values)).version
    assert second != first
    put(values, "roles/basic/max_tokens", 255)
    assert load(write(values)).version not in {first, second}


def test_a_policy_of_a_config_alone() -> None:
    """As tests and tools make it, without a file."""
    read = Policy(load_config(base()))
    assert read.keys.find(BOB.key, 1e9).id == "bob"
    assert read.route("gpt-4") is not None


def load_config(values: dict[str, Any]) -> policy.Config:
    return msgspec.convert(values, policy.Config)


# --- key files


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", ["more.json", "more.yaml"])
def test_key_files(write: Callable[..., Path], name: str, wrap: bool) -> None:
    made = [keys.generate() for _ in range(3)]
    listed = [{"id": f"k{n}", "prefix": one.prefix, "hash": one.hash, "role": "basic"} for n, one in enumerate(made)]
    file = write({"keys": listed} if wrap else listed, name)
    read = load(write({**base(), "key_files": [name]}))
    assert [read.keys.find(one.key, 0).id for one in made] == ["k0", "k1", "k2"]
    assert len(read.keys) == 5
    assert read.files[1] == file


def test_a_key_file_that_is_not_the_configurations_is_not_taken(write: Callable[..., Path]) -> None:
    entry = {"id": "k0", "prefix": "aaaaaaaaaaaa", "hash": "sha256:" + "0" * 64, "role": "basic"}
    file = write([entry], "keys-00.json")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    main = write({**base(), "key_files": [f"keys-00.json#sha256={digest}"]})
    assert load(main).keys.get("k0") is not None and load(main).files[1] == file
    write([{**entry, "role": "premium"}], "keys-00.json")
    assert mistakes(main) == ["keys-00.json: is not the file that the configuration was written with"]


def test_mistakes_of_key_files_name_file_and_place(write: Callable[..., Path]) -> None:
    good = {"id": "k0", "prefix": "aaaaaaaaaaaa", "hash": "sha256:" + "0" * 64, "role": "basic"}
    write({"keys": [good, {**good, "id": "k1"}, {**good, "rolle": 1}, "text"], "other": 1}, "a.json")
    write({"keys": [{**good, "prefix": "bbbbbbbbbbbb"}]}, "b.yaml")
    write("[{]", "c.json")
    write("{'a': ", "d.yaml")
    write("text", "e.yaml")
    (write("", "f.json")).unlink()
    assert mistakes(write({**base(), "key_files": ["a.json", "c.json", "d.yaml", "f.json"]})) == [
        "a.json: other: there is no such setting",
        "a.json: keys[1].prefix: a.json: keys[0] has the same prefix",
        "a.json: keys[2].rolle: there is no such setting",
        "a.json: keys[2].id: a.json: keys[0] has the same id",
        "a.json: keys[2].prefix: a.json: keys[0] has the same prefix",
        "a.json: keys[3]: expected `object`, got `str`",
        "c.json: keys: is not JSON: JSON is malformed: expected '\"' (byte 2)",
        "d.yaml: is not YAML: did not find expected node content (line 2, column 1)",
        f"{write('', 'g').parent / 'f.json'}: cannot be read: no such file or directory",
    ]
    assert mistakes(write({**base(), "key_files": ["a.json", "b.yaml"]}))[-1] == (
        "b.yaml: keys[0].id: a.json: keys[0] has the same id"
    )
    assert mistakes(write({**base(), "key_files": ["e.yaml"]})) == ["e.yaml: is no list of keys"]


def many_keys(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"team-{number}",
            "prefix": f"p{number:011d}",
            "hash": f"sha256:{number:064x}",
            "role": "basic",
            # Braces, commas and brackets in texts and inner objects must not be taken for borders of the list.
            "client": ["plain", "a},{b", '"}],', "\\"][number % 4],
            "limits": {"requests": {"limit": 1}, "tokens": {"limit": 5}} if number % 7 == 0 else None,
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_hundred_thousand_keys_come_complete(write: Callable[..., Path], tmp_path: Path, indent: int | None) -> None:
    listed = many_keys(100_000)
    data = msgspec.json.encode({"keys": listed})
    (tmp_path / "more.json").write_bytes(data if indent is None else msgspec.json.format(data, indent=indent))
    read = load(write({**base(), "key_files": ["more.json"]}))
    assert len(read.keys) == 100_002
    for number in (0, 1, 2, 3, 49_999, 99_998, 99_999):
        found = read.keys.get(f"team-{number}")
        assert found is not None
        assert (found.prefix, found.client) == (f"p{number:011d}", listed[number]["client"])
        assert (found.limits is not None) == (number % 7 == 0)


def test_every_mistake_in_a_large_key_file_is_found(write: Callable[..., Path], tmp_path: Path) -> None:
    listed = many_keys(5000)
    for number in range(0, 5000, 2):
        listed[number]["role"] = "nobody"
    listed[4999]["max_tokens"] = "many"
    (tmp_path / "more.json").write_bytes(msgspec.json.encode(listed))
    file = write({**base(), "key_files": ["more.json"]})
    with pytest.raises(PolicyError) as caught:
        load(file)
    assert len(caught.value.problems) == 2501
    assert caught.value.problems[-1].variable == "more.json: keys[4999].max_tokens"
    assert str(caught.value).startswith("the configuration has 2501 problems:\n")
    assert str(caught.value).endswith("\n... and 1501 more")


def test_a_large_malformed_file_is_not_decoded_again_and_again(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each comma behind a brace might be the border that is looked for: here there are twenty thousand, and none is."""
    data = msgspec.json.encode(many_keys(20_000))
    broken = data[: len(data) // 3] + b"}" + data[len(data) // 3 :]
    (tmp_path / "more.json").write_bytes(broken)
    file = write({**base(), "key_files": ["more.json"]})
    decoded = 0
    real = msgspec.json.decode

    def decode(*arguments: Any, **named: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return real(*arguments, **named)

    monkeypatch.setattr(policy.msgspec.json, "decode", decode)
    (found,) = mistakes(file)
    assert found.startswith("more.json: keys: is not JSON: ")
    assert decoded < 200


def test_other_threads_get_a_turn_after_every_piece(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = msgspec.json.encode(many_keys(20_000))
    (tmp_path / "more.json").write_bytes(data)
    turns: list[float] = []
    monkeypatch.setattr(policy.time, "sleep", turns.append)
    load(write({**base(), "key_files": ["more.json"]}))
    assert len(turns) >= len(data) // 70_000


# --- what is wrong


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("sever", {}, "sever: there is no such setting"),
        ("server/port", 70000, "server.port: is not between 0 and 65535"),
        ("server/port", "80", "server.port: expected `int`, got `str`"),
        ("server/max_body_bytes", 0, "server.max_body_bytes: is not greater than 0"),
        ("server/max_buffered_bytes", 9, "server.max_buffered_bytes: is less than eight times server.max_body_bytes"),
        ("server/reload_interval_s", -1, "server.reload_interval_s: is not greater than 0"),
        ("server/drain_s", -1, "server.drain_s: is not between 0 and 86400"),
        ("server/stream_comment_s", -1, "server.stream_comment_s: is not between 0 and 86400"),
        ("cors/origins", ["https://a.b/"], "cors.origins[0]: is no origin"),
        ("store/url", "http://:secret@x", "store.url: is no address"),
        ("store/url", "redis://", "store.url: is no address"),
        ("store/url", "redis://x:99999", "store.url: is no address"),
        ("store/password_env", "NOT_THERE", "store.password_env: the environment variable is not set"),
        ("store/cache_url", "http://x", "store.cache_url: is no address"),
        ("store/cache_password_env", "NOT_THERE", "store.cache_password_env: the environment variable is not set"),
        ("backends/one/api_key_header", "a b", "backends.one.api_key_header: is not the name of a header"),
        ("backends/one/api_key_header", "Host", "backends.one.api_key_header: is set by HTTP itself"),
        ("store/password_env", "secret!", "store.password_env: is not the name of an environment variable"),
        ("store/password_env", "sk_secret", "store.password_env: is not the name of an environment variable"),
        ("store/local_fraction", 0, "store.local_fraction: is no fraction"),
        ("store/on_failure", "open", "store.on_failure: it is none of the known values"),
        ("store/prefix", "a b", "store.prefix: is empty, or holds a space or brace"),
        ("store/timeout_ms", 0, "store.timeout_ms: is not greater than 0"),
        ("auth/anonymous_role", "basik", "auth.anonymous_role: there is no such role"),
        ("auth/issuers/0/audience", [], "auth.issuers[0].audience: names no audience"),
        ("auth/issuers/0/audience", [""], "auth.issuers[0].audience: names no audience"),
        ("auth/issuers/0/issuer", "", "auth.issuers[0].issuer: is empty"),
        ("auth/issuers/0/keys", ["x"], "auth.issuers[0]: has to have either jwks_url or keys"),
        ("auth/issuers/0/jwks_url", "", "auth.issuers[0]: has to have either jwks_url or keys"),
        ("auth/issuers/0/jwks_url", "file:///etc/x", "auth.issuers[0].jwks_url: is no address"),
        ("auth/issuers/0/algorithms", ["HS256"], "auth.issuers[0].algorithms[0]: it is none of the known values"),
        ("auth/issuers/0/algorithms", ["none"], "auth.issuers[0].algorithms[0]: it is none of the known values"),
        ("auth/issuers/0/algorithms", [], "auth.issuers[0].algorithms: is empty"),
        ("auth/issuers/0/leeway_s", 3600, "auth.issuers[0].leeway_s: is not between 0 and 600"),
        ("auth/issuers/0/jwks_cache_s", 0, "auth.issuers[0].jwks_cache_s: is not greater than 0"),
        ("auth/issuers/0/role_claim", "", "auth.issuers[0].role_claim: is empty"),
        ("auth/issuers/0/default_role", "x", "auth.issuers[0].default_role: there is no such role"),
        ("auth/issuers/0/role_map/staff", "x", "auth.issuers[0].role_map.staff: there is no such role"),
        ("roles/basic/modles", ["a"], "roles.basic.modles: there is no such setting"),
        ("roles/basic/models/0", "", "roles.basic.models[0]: is empty"),
        ("roles/basic/models/0", "gpt-4", "roles.basic.models[0]: is an alias"),
        ("roles/basic/operations", ["chat", "chatt"], "roles.basic.operations[1]: it is none of the known values"),
        ("roles/basic/max_tokens", 0, "roles.basic.max_tokens: is less than 1"),
        (
            "roles/premium/strict_max_tokens",
            True,
            "roles.premium.strict_max_tokens: there is no max_tokens to be strict about",
        ),
        ("roles/premium/denied_parameters", ["temperature"], "roles.premium.denied_parameters: is allowed too"),
        ("roles/premium/filters/0", "ppi", "roles.premium.filters[0]: there is no such filter"),
        ("roles/premium/filters", ["pii", "pii"], "roles.premium.filters[1]: stands in the list already"),
        ("roles/basic/limits/requests/limit", 0, "roles.basic.limits.requests.limit: is less than 1"),
        ("roles/basic/limits/requests/burst", 0, "roles.basic.limits.requests.burst: is less than 1"),
        ("roles/basic/limits/requests/per", "week", "roles.basic.limits.requests.per: it is none of the known values"),
        ("roles/basic/limits/concurrency", -1, "roles.basic.limits.concurrency: is less than 1"),
        ("tenants/*/daily_tokens", 0, "tenants.*.daily_tokens: is less than 1"),
        ("tenants/*/daily_cost", 0, "tenants.*.daily_cost: is not between 0 and 1e9"),
        ("keys/0/id", "bob", "keys[1].id: keys[0] has the same id"),
        ("keys/0/id", "jwt:x", "keys[0].id: is no id for a key"),
        ("keys/0/id", "anonymous", "keys[0].id: is no id for a key"),
        ("keys/0/id", "a b", "keys[0].id: is no id for a key"),
        pytest.param("keys/0/prefix", BOB.prefix, "keys[1].prefix: keys[0] has the same prefix", id="same prefix"),
        (
            "keys/0/prefix",
            "short",
            "keys[0].prefix: is not the 12 letters and digits between `rp-` and the next `-` of a key",
        ),
        ("keys/0/hash", "sha256:" + "0" * 63, "keys[0].hash: is not `sha256:` and 64 hexadecimal digits in lower case"),
        ("keys/0/role", "premum", "keys[0].role: there is no such role"),
        ("keys/0/tenant", "", "keys[0].tenant: is empty"),
        ("keys/0/expires", "soon", "keys[0].expires: is not a time as RFC 3339 writes it"),
        ("keys/0/expires", "2030-01-01T00:00:00", "keys[0].expires: is not a time as RFC 3339 writes it"),
        ("keys/0/not_before", "2031-01-01", "keys[0].expires: is not after not_before"),
        ("keys/0/max_tokens", 0, "keys[0].max_tokens: is less than 1"),
        ("keys/0/models", [""], "keys[0].models[0]: is empty"),
        ("keys/0/models", ["gpt-4"], "keys[0].models[0]: is an alias"),
        ("keys/0/operations", ["x"], "keys[0].operations[0]: it is none of the known values"),
        ("keys/0/limits", {"monthly_tokens": 0}, "keys[0].limits.monthly_tokens: is less than 1"),
        ("backends/one/url", "one:8000", "backends.one.url: is no address"),
        ("backends/one/url", "http://one:8000/v1", "backends.one.url: ends in /v1"),
        ("backends/one/url", "http://a:secret@one", "backends.one.url: holds more than an address"),
        ("backends/one/url", "http://one/?a=b", "backends.one.url: holds more than an address"),
        ("backends/one/url", "http://[::1", "backends.one.url: is no address"),
        ("backends/one/url", "http://bücher..example", "backends.one.url: is no address"),
        ("backends/one/api_key_env", "NOT_THERE", "backends.one.api_key_env: the environment variable is not set"),
        (
            "backends/one/api_key_file",
            "/nowhere",
            "backends.one.api_key_file: cannot be read: no such file or directory",
        ),
        ("backends/one/headers", {"a b": "c"}, "backends.one.headers.a b: is not the name of a header"),
        ("backends/one/headers", {"a": "b\nc: d"}, "backends.one.headers.a: has a value that no header can have"),
        ("backends/one/headers", {"Host": "b"}, "backends.one.headers.Host: is set by HTTP itself"),
        ("backends/one/headers", {"key": ["secret"]}, "backends.one.headers.key: expected `str`, got `array`"),
        ("backends/one/health", {"path": "v1"}, "backends.one.health.path: does not begin with /"),
        ("backends/one/health", {"max_ejected": 2}, "backends.one.health.max_ejected: is not between 0 and 1"),
        ("backends/one/health", {"eject_after": 0}, "backends.one.health.eject_after: is not greater than 0"),
        ("backends/one/timeouts", {"total_s": 0}, "backends.one.timeouts.total_s: is not greater than 0"),
        ("backends/one/keepalive", -1, "backends.one.keepalive: is not between 0 and 1e+06"),
        ("backends/one/verify_tls", "/no.pem", "backends.one.verify_tls: cannot be read: no such file or directory"),
        ("routes/large/backends", [], "routes.large.backends: is empty"),
        ("routes/large/backends/0/backend", "tow", "routes.large.backends[0].backend: there is no such backend"),
        ("routes/large/backends/0/weight", 0, "routes.large.backends: all weights are 0"),
        ("routes/large/backends/0/weight", -1, "routes.large.backends[0].weight: is not between 0 and 1e+06"),
        ("routes/small-1/backends/1/backend", "one", "routes.small-1.backends[1].backend: stands in the list already"),
        ("routes/large/canary/backend", "x", "routes.large.canary.backend: there is no such backend"),
        ("routes/large/canary/percent", 101, "routes.large.canary.percent: is not between 0 and 100"),
        ("routes/large/canary/header", "a b", "routes.large.canary.header: is not the name of a header"),
        ("routes/large/shadow/backend", "x", "routes.large.shadow.backend: there is no such backend"),
        ("routes/large/shadow/percent", -1, "routes.large.shadow.percent: is not between 0 and 100"),
        ("routes/large/sticky_header", "", "routes.large.sticky_header: is not the name of a header"),
        ("routes/large/retries", 11, "routes.large.retries: is not between 0 and 10"),
        ("routes/large/aliases", ["small-1"], "routes.large.aliases[0]: is the id of a model already"),
        ("routes/small-1/aliases", ["gpt-4"], "routes.large.aliases[0]: is an alias of small-1 already"),
        ("routes/large/aliases", [""], "routes.large.aliases[0]: is empty"),
        ("routes/large/operations", ["admin"], "routes.large.operations[0]: is no operation of a backend"),
        ("routes/large/price/input", -1, "routes.large.price.input: is not between 0 and 1e+09"),
        ("routes/large/limits", {"tokens": {"limit": -5}}, "routes.large.limits.tokens.limit: is less than 1"),
        ("cache/ttl_s", 0, "cache.ttl_s: is not greater than 0"),
        ("cache/semantic", "no path", "cache.semantic: is no dotted path of a class"),
        ("cache/semantic_threshold", 2, "cache.semantic_threshold: is not between 0 and 1"),
        ("filters/pii/type", "magic", "filters.pii.type: it is none of the known values"),
        ("filters/pii/on", [], "filters.pii.on: is empty"),
        ("filters/pii/hold_back", 0, "filters.pii.hold_back: is not between 1 and 1e+06"),
        ("audit/segment_bytes", 0, "audit.segment_bytes: is not greater than 0"),
        ("audit", {"content": True, "requests": False}, "audit.content: requests are not recorded at all"),
        ("audit", {"enabled": True, "directory": ""}, "audit.directory: is empty"),
        (
            "audit",
            {"enabled": True, "signing_key_file": "/no.pem"},
            "audit.signing_key_file: cannot be read: no such file or directory",
        ),
        ("tracing/sample_ratio", 1.5, "tracing.sample_ratio: is not between 0 and 1"),
        ("tracing/endpoint", "collector", "tracing.endpoint: is no address"),
        ("open_operations", ["admin"], "open_operations[0]: is no operation of a backend"),
        ("key_files", ["none.json"], "none.json: cannot be read: no such file or directory"),
    ],
)
def test_each_mistake_is_named_alone(
    write: Callable[..., Path], tmp_path: Path, path: str, value: object, expected: str
) -> None:
    values = base()
    put(values, path, value)
    found = [one.removeprefix(f"{tmp_path}/") for one in mistakes(write(values))]
    assert found == [expected]


def test_a_pattern_that_does_not_compile(write: Callable[..., Path]) -> None:
    values = base()
    put(values, "filters/bad", {"type": "words", "options": {"patterns": ["("]}})
    (found,) = mistakes(write(values))
    assert found.startswith("filters.bad: ")
    assert "unterminated subpattern" in found


def test_the_same_port_twice(write: Callable[..., Path]) -> None:
    values = base()
    values["server"] |= {"port": 8080, "admin_port": 8080}
    assert mistakes(write(values)) == ["server.admin_port: is server.port too"]


def test_both_ways_to_a_backends_key(write: Callable[..., Path], tmp_path: Path) -> None:
    values = base()
    (tmp_path / "key").write_text("secret")
    values["backends"]["one"] |= {"api_key_env": "KEY", "api_key_file": str(tmp_path / "key")}
    assert mistakes(write(values), KEY="x") == ["backends.one: has both api_key_env and api_key_file"]


def test_an_empty_file_of_a_backends_key(write: Callable[..., Path], tmp_path: Path) -> None:
    values = base()
    (tmp_path / "key").write_text("\n")
    values["backends"]["one"]["api_key_file"] = str(tmp_path / "key")
    assert mistakes(write(values)) == ["backends.one.api_key_file: is empty"]


def test_the_environment_need_not_be_there_on_another_machine(write: Callable[..., Path]) -> None:
    values = base()
    values["backends"]["one"]["api_key_env"] = "NOT_THERE"
    file = write(values)
    assert load(file, environment=None).config.backends["one"].api_key_env == "NOT_THERE"
    assert load(file, environment={"NOT_THERE": "x"}).version


def test_the_same_issuer_and_audience_twice(write: Callable[..., Path]) -> None:
    values = base()
    values["auth"]["issuers"] *= 2
    assert mistakes(write(values)) == ["auth.issuers[1].audience: an issuer above has it already"]


SHARED = {"kty": "oct", "k": "c2VjcmV0"}
ED25519 = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}


@pytest.mark.parametrize(
    ("listed", "algorithms", "expected"),
    [
        ([SHARED], ["RS256"], "auth.issuers[0].keys[0]: it is a shared secret, and only public keys are accepted"),
        ([ED25519, "text"], ["EdDSA"], "auth.issuers[0].keys[1]: it is not a public key in PEM"),
        ([ED25519], ["RS256", "ES256"], "auth.issuers[0].algorithms: none of them fits a key"),
    ],
)
def test_keys_of_an_issuer(write: Callable[..., Path], listed: list[Any], algorithms: list[str], expected: str) -> None:
    values = base()
    values["auth"]["issuers"][0] |= {"jwks_url": "", "keys": listed, "algorithms": algorithms}
    assert mistakes(write(values)) == [expected]
    values["auth"]["issuers"][0] |= {"keys": [ED25519], "algorithms": ["RS256", "EdDSA"]}
    assert load(write(values)).config.auth.issuers[0].keys == [ED25519]


def test_numbers_in_messages_are_those_of_the_file(write: Callable[..., Path]) -> None:
    """A wrong item of a list is left out of what is checked further; the others keep their numbers."""
    values = base()
    values["routes"]["small-1"]["backends"] = [{"weight": 1}, 5, {"backend": "x"}, {"backend": "one"}]
    values["auth"]["issuers"] = [{}, {**values["auth"]["issuers"][0], "default_role": "x"}]
    assert sorted(mistakes(write(values))) == [
        "auth.issuers[0].audience: it is missing",
        "auth.issuers[0].issuer: it is missing",
        "auth.issuers[1].default_role: there is no such role",
        "routes.small-1.backends[0].backend: it is missing",
        "routes.small-1.backends[1]: expected `object`, got `int`",
        "routes.small-1.backends[2].backend: there is no such backend",
    ]


def test_where_nothing_is_declared_the_cure_says_so(write: Callable[..., Path]) -> None:
    values = {"routes": {"a": {"backends": [{"backend": "b"}]}}}
    with pytest.raises(PolicyError) as caught:
        load(write(values))
    (found,) = caught.value.problems
    assert str(found) == 'routes.a.backends[0].backend: there is no such backend (it is "b"). None is declared.'


def test_all_mistakes_at_once(write: Callable[..., Path]) -> None:
    """Wrong types, unknown names and broken rules, in sections that refer to each other, come in one answer."""
    values = base()
    put(values, "server/prt", 1)
    put(values, "roles/basic/max_tokens", "many")
    put(values, "roles/premium/filters", ["other"])
    put(values, "keys/0/hash", "md5:0")
    put(values, "keys/1/role", "nobody")
    put(values, "keys/1/limits", {"tokens": {"per": "day"}})
    put(values, "backends/two", {})
    put(values, "routes/large/backends/0/weight", 0)
    put(values, "routes/large/canary/percent", 500)
    put(values, "audit", {"head_every_s": 0})
    assert sorted(mistakes(write(values))) == [
        "audit.head_every_s: is not greater than 0",
        "backends.two.url: it is missing",
        "keys[0].hash: is not `sha256:` and 64 hexadecimal digits in lower case",
        "keys[1].limits.tokens.limit: it is missing",
        "keys[1].role: there is no such role",
        "roles.basic.max_tokens: expected `int`, got `str`",
        "roles.premium.filters[0]: there is no such filter",
        "routes.large.backends: all weights are 0",
        "routes.large.canary.percent: is not between 0 and 100",
        "server.prt: there is no such setting",
    ]


def test_json_finds_as_much_as_yaml(write: Callable[..., Path]) -> None:
    values = base()
    put(values, "keys/0/hash", 5)
    put(values, "keys/1/role", "nobody")
    put(values, "roles/basic/models", "all")
    put(values, "routes/large/backends", {})
    assert sorted(mistakes(write(values, "gateway.json"))) == sorted(mistakes(write(values)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "gateway.yaml: is empty"),
        ("# nothing\n", "gateway.yaml: is empty"),
        ("just text", "gateway.yaml: is not a mapping"),
        ("- a", "gateway.yaml: is not a mapping"),
        ("roles: [", "gateway.yaml: is not YAML: did not find expected node content (line 2, column 1)"),
        ("roles: !!python/object/apply:os.getcwd []", "gateway.yaml: is not YAML: could not determine a constructor"),
        ("a: 1\na: 2", "gateway.yaml: `a` is given twice"),
        ("\x00", "gateway.yaml: is not YAML"),
        ("roles: {1: {}}", "roles: a name in it is no text"),
        ("1: {}", "1: there is no such setting"),
        ("server: 5", "server: expected `object`, got `int`"),
        ("roles: null", "roles: expected `object`, got `null`"),
        ("keys: {}", "keys: expected `array`, got `object`"),
        ('{"server": {"host": "\\ud800"}}', "gateway.yaml: is not"),
        ("[" * 5000, "gateway.yaml: is not"),
        ('{"roles": 1}x', "gateway.yaml: is not YAML"),
    ],
)
def test_files_that_are_no_configuration(write: Callable[..., Path], text: str, expected: str) -> None:
    (found,) = mistakes(write(text))
    assert found.startswith(expected)


@pytest.mark.parametrize("text", ['{"roles": }', '{"roles": {}', '{"roles": {}} x', '{"roles": "\x01"}', '{"a"}'])
def test_broken_json(write: Callable[..., Path], text: str) -> None:
    (found,) = mistakes(write(text, "gateway.json"))
    assert found.startswith("gateway.json: is not JSON: ")


def test_names_given_twice_deep_inside_are_all_found(write: Callable[..., Path]) -> None:
    text = "roles:\n  a: {models: [x], models: [y]}\n  b: {}\n  b: {}\n"
    assert sorted(mistakes(write(text))) == [
        "gateway.yaml: `b` is given twice (line 4)",
        "gateway.yaml: `models` is given twice (line 2)",
    ]


def test_a_missing_file(tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path / "none.yaml")
    assert found.endswith("none.yaml: cannot be read: no such file or directory")


def test_no_message_holds_a_key(write: Callable[..., Path]) -> None:
    values = base()
    values["keys"][0] |= {"hash": ALICE.key, "id": ALICE.key, "prefix": ALICE.key, "role": ALICE.key, ALICE.key: 1}
    values["backends"]["one"]["api_key_env"] = ALICE.key
    values["routes"]["large"]["aliases"] = [ALICE.key, ALICE.key]
    with pytest.raises(PolicyError) as caught:
        load(write(values))
    assert ALICE.key[16:] not in str(caught.value)
    assert len(caught.value.problems) == 6


# --- files to watch


def test_a_backends_key_file_is_watched_but_is_not_in_the_version(write: Callable[..., Path], tmp_path: Path) -> None:
    values = base()
    secret = tmp_path / "key"
    secret.write_text("one")
    values["backends"]["one"]["api_key_file"] = str(secret)
    first = load(write(values))
    secret.write_text("other")
    second = load(write(values))
    assert secret in first.files
    assert first.version == second.version
    assert first.seen[first.files.index(secret)] != second.seen[second.files.index(secret)]


def test_a_failure_names_the_files_that_would_mend_it(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write({**base(), "key_files": ["later.json"]})
    with pytest.raises(PolicyError) as caught:
        load(file)
    assert caught.value.files == (file, tmp_path / "later.json")
    assert caught.value.seen[1] is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(write: Callable[..., Path]) -> None:
    file = write(base())
    file.chmod(stat.S_IWUSR)
    (found,) = mistakes(file)
    assert "permission denied" in found


# --- anything at all

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(values: object, before: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [before, *(path for name, one in items for path in paths(one, (*before, name)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=150)
@given(st.data())
def test_any_change_to_a_configuration_loads_or_is_refused_by_name(folder: Path, data: st.DataObject) -> None:
    values: Any = copy.deepcopy(base())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(values)[1:]))
        place = values
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = data.draw(JUNK)
    file = folder / "any.json"
    file.write_bytes(msgspec.json.encode(values))
    try:
        read = load(file)
    except PolicyError as error:
        assert error.problems
    else:
        assert isinstance(read, Policy)
        assert all(read.role(one.role) is not None for one in read.keys)
