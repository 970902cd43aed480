"""The gateway's modules: files of hashes, values that are kept, and an admin API behind a proxy."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import Cluster
from ansible_collections.rayplane.platform.plugins.modules import gateway_admin
from ansible_collections.rayplane.platform.plugins.modules.gateway_admin import Admin, AdminError, reconcile
from ansible_collections.rayplane.platform.plugins.modules.gateway_keys import (
    KeysError,
    change,
    entry_of,
    moment,
    new_key,
    read,
    successor,
    write,
)
from ansible_collections.rayplane.platform.plugins.modules.k8s_kept_secrets import MAKERS, SecretError, keep
from conftest import PROJECT, connection_to
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import keys as theirs

Json = dict[str, Any]
UNTIL = "2030-01-01T00:00:00Z"


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_one_that_the_gateway_knows() -> None:
    for key in (new_key(set()), MAKERS["api_key"]()):
        assert len(key) == len(theirs.generate().key)
        assert theirs.PREFIX.fullmatch(key[3:15])
        entry = entry_of(key, "a", {"role": "basic"})
        assert entry == {"id": "a", "prefix": key[3:15], "hash": theirs.digest(key), "role": "basic"}


def test_issue_again_changes_settings_and_no_key() -> None:
    keys, entry, key, actions = change([], "issued", "a", {"role": "basic"}, UNTIL)
    assert key and actions == ["issue key a"] and keys == [entry]
    again, same, none, nothing = change(keys, "issued", "a", {"role": "basic"}, UNTIL)
    assert (again, same, none, nothing) == (keys, entry, "", [])
    after, _, none, actions = change(keys, "issued", "a", {"role": "premium"}, UNTIL)
    assert none == "" and actions == ["update key a"]
    assert after == [{**entry, "role": "premium"}]


def test_the_first_key_is_issued_where_there_is_none() -> None:
    keys, _, key, _ = change([], "first", "first", {"role": "admin"}, UNTIL)
    assert key
    assert change(keys, "first", "first", {"role": "admin"}, UNTIL) == (keys, {}, "", [])


def test_a_rotated_key_goes_on_for_a_while_and_keeps_its_holder() -> None:
    keys, old, _, _ = change([], "issued", "a", {"role": "basic", "tenant": "t", "expires": "2031-01-01"}, UNTIL)
    keys, new, key, actions = change(keys, "rotated", "a", {}, UNTIL)
    assert key and actions == ["issue key a-2", f"key a expires {UNTIL}"]
    assert keys == [{**old, "expires": UNTIL}, new]
    assert (new["id"], new["role"], new["tenant"], new["client"]) == ("a-2", "basic", "t", "a")
    assert "expires" not in new and new["hash"] != old["hash"]
    keys, newer, _, _ = change(keys, "rotated", "a-2", {}, UNTIL)
    assert newer["id"] == "a-3" and newer["client"] == "a"
    # One that ends sooner anyway ends then.
    keys, _, _, _ = change([{**old, "expires": "2029-06-01"}], "rotated", "a", {}, UNTIL)
    assert keys[0]["expires"] == "2029-06-01"


def test_revoke_restore_remove() -> None:
    keys, entry, _, _ = change([], "issued", "a", {"role": "basic"}, UNTIL)
    keys, _, _, actions = change(keys, "revoked", "a", {}, UNTIL)
    assert keys[0]["disabled"] is True and actions == ["revoke key a"]
    assert change(keys, "revoked", "a", {}, UNTIL)[3] == []
    with pytest.raises(KeysError, match="is revoked"):
        change(keys, "rotated", "a", {}, UNTIL)
    keys, _, _, actions = change(keys, "restored", "a", {}, UNTIL)
    assert keys == [entry] and actions == ["restore key a"]
    assert change(keys, "removed", "a", {}, UNTIL)[0] == []
    with pytest.raises(KeysError, match="there is no key b in the file; it has: a"):
        change(keys, "revoked", "b", {}, UNTIL)


@given(st.text(min_size=1), st.sets(st.text(min_size=1)))
def test_a_successors_name_is_free(identity: str, taken: set[str]) -> None:
    name = successor(identity, taken | {identity})
    assert name not in taken and name != identity


def test_times() -> None:
    assert moment("2030-01-01") == moment(UNTIL) == moment("2030-01-01T01:00:00+01:00")


def test_files_are_whole_and_an_entry_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    assert read(file) == []
    write(file, [])
    assert read(file) == []
    write(file, [{"id": "a"}, {"id": "b"}])
    assert file.read_text() == '{"keys": [\n  {"id": "a"},\n  {"id": "b"}\n]}\n'
    assert read(file) == [{"id": "a"}, {"id": "b"}]
    file.write_text('{"keys": [1]}')
    with pytest.raises(KeysError, match="has not the form"):
        read(file)
    file.write_text("{")
    with pytest.raises(KeysError, match="cannot be read"):
        read(file)


PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - name: Ask
      rayplane.platform.gateway_keys:
        path: "{{ path }}"
        state: "{{ state }}"
        id: a
        settings: {role: basic, tenant: ''}
        key_file: "{{ out or omit }}"
      register: done
      no_log: "{{ hidden }}"
    - name: Show
      rayplane.platform.show_once: {text: "{{ done.key }}"}
      no_log: true
    - name: Say
      ansible.builtin.debug: {msg: "{{ done.actions }}"}
"""


def play(tmp_path: Path, state: str, *arguments: str, out: str = "", log: str = "") -> str:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAY)
    values = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "path": str(tmp_path / "keys.json"),
        "state": state,
        "out": out,
        "hidden": True,
    }
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            str(playbook),
            "-i",
            "one,",
            "-e",
            json.dumps(values),
            *arguments,
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={
            **__import__("os").environ,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOG_PATH": log,
            "ANSIBLE_INVENTORY_ENABLED": "host_list",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_key_is_seen_once_and_in_no_log(tmp_path: Path) -> None:
    log = tmp_path / "ansible.log"
    planned = play(tmp_path, "issued", "--check")
    assert theirs.LOOKS_LIKE_A_KEY.search(planned) is None and not (tmp_path / "keys.json").exists()
    output = play(tmp_path, "issued", "-vvv", log=str(log))
    (found,) = [match.group() for match in theirs.LOOKS_LIKE_A_KEY.finditer(output)]
    (entry,) = read(tmp_path / "keys.json")
    assert theirs.digest(found) == entry["hash"] and "tenant" not in entry
    assert "issue key a" in log.read_text() and found not in log.read_text()
    assert theirs.LOOKS_LIKE_A_KEY.search(play(tmp_path, "issued")) is None


def test_a_key_goes_into_a_file_of_its_owners(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "key"
    assert theirs.LOOKS_LIKE_A_KEY.search(play(tmp_path, "issued", out=str(out))) is None
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert theirs.digest(out.read_text().strip()) == read(tmp_path / "keys.json")[0]["hash"]


# --- a cluster with a gateway ----------------------------------------------------------------------------------------

KEY = "rp-abcdefghij12-" + "A" * 43


class Gateway(ThreadingHTTPServer):
    """An API server whose proxy leads to an admin API; `asked` lists what came to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.secrets: dict[str, Json] = {"operator": {"data": {"key": base64.b64encode(KEY.encode()).decode()}}}
        self.versions = {"pod-a": "old", "pod-b": "old"}
        self.asked: list[str] = []
        self.revoked: set[str] = set()
        self.weights: dict[str, int] = {}
        self.percent: float | None = None
        self.error = ""
        self.looks = self.vain_looks = 0


class Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        status, answer = self.respond(body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PATCH = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def respond(self, body: Any) -> tuple[int, Json]:
        gateway = self.server
        base = "/api/v1/namespaces/ns/"
        path = self.path.removeprefix(base)
        if path.startswith("secrets/"):
            found = gateway.secrets.get(path.removeprefix("secrets/"))
            return (200, found) if found else (404, {"reason": "NotFound"})
        if path.startswith("pods?"):
            return 200, {
                "items": [{"metadata": {"name": name}, "status": {"phase": "Running"}} for name in gateway.versions]
                + [
                    {"metadata": {"name": "leaving", "deletionTimestamp": "now"}, "status": {"phase": "Running"}},
                    {"metadata": {"name": "coming"}, "status": {"phase": "Pending"}},
                ]
            }
        if self.command == "PATCH":
            name = path.removeprefix("pods/").split("?")[0]
            # The kubelet looks at the volume, and the gateway takes over what it finds.
            gateway.looks += 1
            if not gateway.error and gateway.looks > gateway.vain_looks:
                gateway.versions[name] = body["metadata"]["annotations"]["rayplane.io/configuration"].split()[0]
            return 200, {"metadata": {"name": name}}
        place, _, asked = path.partition("/proxy/admin/v1/")
        if self.headers.get("x-rayplane-key") != KEY:
            return 401, {"error": {"message": "The API key is not valid."}}
        gateway.asked.append(f"{self.command} {place} {asked}")
        if asked == "status":
            version = gateway.versions[place.removeprefix("pods/").split(":")[0]]
            return 200, {"policy": {"version": version, "last_error": gateway.error}}
        if asked.startswith("keys?"):
            # In pages of one.
            names = ["a", "b/c"]
            place_of = 0 if "after" not in asked else 1
            name = names[place_of]
            entry = {"id": name, "revoked": {"at": 1} if name in gateway.revoked else None}
            return 200, {"keys": [entry], "after": name if place_of == 0 else None}
        if asked == "routes":
            backends = [
                {"backend": name, "weight": gateway.weights.get(name, 100), "configured": 100}
                for name in ("blue", "green")
            ]
            canary = {
                "backend": "green",
                "percent": 5.0 if gateway.percent is None else gateway.percent,
                "configured": 5.0,
                "changed": None if gateway.percent is None else {"actor": "operator"},
            }
            changed = {"actor": "operator"} if gateway.weights else None
            plain = {"backends": backends, "changed": None, "canary": None}
            return 200, {"routes": {"m": {**plain, "changed": changed, "canary": canary}, "plain": plain}}
        if asked.endswith("/revoke"):
            gateway.revoked.add(asked.removeprefix("keys/").removesuffix("/revoke").replace("%2F", "/"))
            return 200, {}
        if asked.endswith("/restore"):
            gateway.revoked.discard(asked.removeprefix("keys/").removesuffix("/restore").replace("%2F", "/"))
            return 200, {}
        if asked == "routes/m/weights":
            gateway.weights = body["weights"] if self.command == "PUT" else {}
            return 200, {}
        if asked == "routes/m/canary":
            gateway.percent = body["percent"] if self.command == "PUT" else None
            return 200, {}
        return 500, {"error": {"message": f"no {asked}"}}


@pytest.fixture(name="gateway")
def _gateway() -> Iterator[Gateway]:
    server = Gateway()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def cluster_of(gateway: Gateway) -> Cluster:
    return Cluster(connection_to(f"http://127.0.0.1:{gateway.server_address[1]}"), retries=0)


def admin(gateway: Gateway, **changes: Any) -> Admin:
    given = {
        "namespace": "ns",
        "service": "admin",
        "port": 9090,
        "secret": "operator",
        "selector": "x=y",
        "shared": True,
    }
    return Admin(cluster_of(gateway), {**given, **changes})


WANTED: Json = {"revoked": [], "restored": [], "weights": {}, "canaries": {}}


def test_what_is_in_a_secret_is_kept_and_what_is_missing_made(gateway: Gateway) -> None:
    wanted = [
        {"name": "operator", "values": {"key": "api_key", "more": "token"}},
        {"name": "new", "values": {"pem": "ed25519"}},
    ]
    values, made = keep(cluster_of(gateway), "ns", wanted)
    assert values["operator"]["key"] == KEY
    assert made == ["operator.more", "new.pem"]
    assert len(values["operator"]["more"]) == 43 and "BEGIN PRIVATE KEY" in values["new"]["pem"]
    assert keep(None, "ns", wanted)[1] == ["operator.key", "operator.more", "new.pem"]


def test_what_somebody_else_makes_is_never_made_here(gateway: Gateway) -> None:
    def wanted(name: str, **values: str) -> list[Json]:
        return [{"name": name, "values": values, "given": True}]

    cluster = cluster_of(gateway)
    values, made = keep(cluster, "ns", wanted("operator", key="api_key"))
    assert values == {"operator": {"key": KEY}} and made == []
    with pytest.raises(SecretError, match=r"no Secret ns/operator with the key private.pem"):
        keep(cluster, "ns", wanted("operator", **{"private.pem": "ed25519"}))
    # Before a first deployment it may not be there yet.
    assert keep(cluster, "ns", wanted("later", key="api_key"), predict=True)[1] == ["later.key"]
    for name, kind in (("operator", "api_key"), ("audit", "ed25519")):
        gateway.secrets[name] = {"data": {"key": base64.b64encode(b"something else").decode()}}
        with pytest.raises(SecretError, match=f"ns/{name} is not a") as caught:
            keep(cluster, "ns", wanted(name, key=kind))
        assert "something else" not in str(caught.value)
    # One Secret may hold several.
    pem = MAKERS["ed25519"]()
    pair = {
        "key": base64.b64encode(f"{KEY}\n".encode()).decode(),
        "private.pem": base64.b64encode(pem.encode()).decode(),
    }
    gateway.secrets["both"] = {"data": pair}
    both = [*wanted("both", key="api_key"), *wanted("both", **{"private.pem": "ed25519"})]
    assert keep(cluster, "ns", both)[0] == {"both": {"key": KEY, "private.pem": pem}}


def test_without_its_key_the_way_out_is_named(gateway: Gateway) -> None:
    with pytest.raises(AdminError, match=r"no Secret ns/none .*deploy the gateway first"):
        admin(gateway, secret="none")


def test_keys_are_revoked_and_restored_once(gateway: Gateway) -> None:
    assert reconcile(admin(gateway), {**WANTED, "revoked": ["b/c", "absent"]}, check=True) == ["revoke key b/c"]
    assert gateway.revoked == set()
    assert reconcile(admin(gateway), {**WANTED, "revoked": ["b/c"]}, check=False) == ["revoke key b/c"]
    assert gateway.revoked == {"b/c"}
    assert "POST services/http:admin:9090 keys/b%2Fc/revoke" in gateway.asked
    assert reconcile(admin(gateway), {**WANTED, "revoked": ["b/c"]}, check=False) == []
    assert reconcile(admin(gateway), {**WANTED, "restored": ["b/c", "a", "absent"]}, check=False) == ["restore key b/c"]
    assert gateway.revoked == set()


def test_without_a_shared_store_every_pod_is_told(gateway: Gateway) -> None:
    reconcile(admin(gateway, shared=False), {**WANTED, "revoked": ["a"]}, check=False)
    told = [line for line in gateway.asked if line.startswith("POST")]
    assert told == ["POST pods/pod-a:9090 keys/a/revoke", "POST pods/pod-b:9090 keys/a/revoke"]


def test_weights(gateway: Gateway) -> None:
    half = {**WANTED, "weights": {"m": {"green": 10}}}
    assert reconcile(admin(gateway), half, check=True) == ["weights of m: blue 100, green 100 -> blue 100, green 10"]
    assert gateway.weights == {}
    reconcile(admin(gateway), half, check=False)
    assert gateway.weights == {"green": 10}
    assert reconcile(admin(gateway), half, check=False) == []
    assert reconcile(admin(gateway), {**WANTED, "weights": {"m": None}}, check=False) == [
        "weights of m: blue 100, green 10 -> blue 100, green 100"
    ]
    assert reconcile(admin(gateway), {**WANTED, "weights": {"m": {}}}, check=False) == []
    with pytest.raises(AdminError, match="no model x; the gateway has m, plain"):
        reconcile(admin(gateway), {**WANTED, "weights": {"x": {}}}, check=False)
    with pytest.raises(AdminError, match="red: no backend of m; its backends are blue, green"):
        reconcile(admin(gateway), {**WANTED, "weights": {"m": {"red": 1}}}, check=False)


def test_canaries(gateway: Gateway) -> None:
    def told(percent: Any, model: str = "m", check: bool = False) -> list[str]:
        return reconcile(admin(gateway), {**WANTED, "canaries": {model: percent}}, check)

    assert told("12.5", check=True) == ["canary of m: 5 % -> 12.5 %"] and gateway.percent is None
    assert told("12.5") == ["canary of m: 5 % -> 12.5 %"] and gateway.percent == 12.5
    assert told(12.5) == []
    assert told("0") == ["canary of m: 12.5 % -> 0 %"] and gateway.percent == 0
    assert told(None) == ["canary of m: 0 % -> 5 %"] and gateway.percent is None
    assert told("") == [] == told(None)
    # A reset of a route without a canary is none of the canary's.
    assert told(None, "plain") == []
    for model, percent, says in (
        ("plain", 5, "the route of plain has no canary: declare one in gateway_routes.plain.canary"),
        ("m", 101, "from 0 to 100, not 101"),
        ("m", "some", "from 0 to 100, not 'some'"),
        ("x", 5, "no model x; the gateway has m, plain"),
    ):
        with pytest.raises(AdminError, match=says):
            told(percent, model)
    # Nothing is changed where one of both is wrong.
    with pytest.raises(AdminError, match="from 0 to 100"):
        reconcile(admin(gateway), {**WANTED, "weights": {"m": {"green": 10}}, "canaries": {"m": -1}}, check=False)
    assert gateway.weights == {}


def test_every_pod_takes_the_configuration_over(gateway: Gateway) -> None:
    admin(gateway).take_over("new", 5)
    assert gateway.versions == {"pod-a": "new", "pod-b": "new"}


def test_a_kubelet_that_looked_too_early_is_made_to_look_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_admin, "_LOOK_S", 0.1)
    gateway.vain_looks = 3
    admin(gateway).take_over("new", 60)
    assert gateway.versions == {"pod-a": "new", "pod-b": "new"}


def test_a_configuration_that_is_refused_is_told(gateway: Gateway) -> None:
    gateway.error = "roles.basic: there is no such filter"
    with pytest.raises(AdminError, match=r"pod-a works by old and says: roles.basic: there is no such filter"):
        admin(gateway).take_over("new", 0.1)


def test_the_gateways_own_words_are_told(gateway: Gateway) -> None:
    with pytest.raises(AdminError, match=r"GET /admin/v1/none: no none"):
        admin(gateway).ask("GET", "none")
    gateway.secrets["operator"] = {"data": {"key": base64.b64encode(b"rp-other").decode()}}
    with pytest.raises(AdminError, match="The API key is not valid"):
        admin(gateway).ask("GET", "status", pod="pod-a")
