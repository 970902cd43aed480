"""Where the cluster is, how to prove who we are, and for how long."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    Connection,
    CredentialError,
    KubeError,
    connection_from_environment,
    forget_temporary,
    kubectl_settings,
)
from kube_fake import Json, Server


def test_kubeconfig(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("K8S_AUTH_HOST", "K8S_AUTH_KUBECONFIG", "K8S_AUTH_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    plugin = tmp_path / "token.sh"
    plugin.write_text('#!/bin/sh\necho \'{"status": {"token": "secret"}}\'\n')
    plugin.chmod(0o755)
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://one:6443/", "certificate-authority": "ca.crt"}}],
        "users": [{"name": "u", "user": {"exec": {"command": str(plugin)}}}],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{path}")
    found = connection_from_environment()
    assert found.server == "https://one:6443"
    assert found.headers == {"Authorization": "Bearer secret"}
    assert found.ca_file == str(tmp_path / "ca.crt")
    with pytest.raises(KubeError, match=r"no context 'other' .*it has: c"):
        connection_from_environment(context="other")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(KubeError, match=r"no kubeconfig can be read.*No such file"):
        connection_from_environment()
    monkeypatch.setenv("K8S_AUTH_HOST", "https://awx")
    monkeypatch.setenv("K8S_AUTH_API_KEY", "key")
    assert connection_from_environment().headers == {"Authorization": "Bearer key"}


@pytest.mark.parametrize(
    ("server", "given", "proxy"),
    [
        ("https://x.eks.amazonaws.com", None, "http://environment:3128"),
        ("https://x.eks.amazonaws.com", "http://kubeconfig:3128", "http://kubeconfig:3128"),
        ("https://api.inside.example", None, None),
        ("https://api.inside.example", "http://kubeconfig:3128", "http://kubeconfig:3128"),
        ("https://10.97.0.1:6443", None, None),
        ("https://127.0.0.1:6443", None, None),
        ("https://localhost:6443", None, None),
        ("http://x.eks.amazonaws.com", None, None),
    ],
)
def test_the_way_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, server: str, given: str | None, proxy: str | None
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "no_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://environment:3128")
    monkeypatch.setenv("NO_PROXY", ".inside.example")
    found = Cluster(Connection(server=server, proxy_url=given))._pool.proxy
    assert (found and found.url) == proxy


def test_no_api_server_is_told_by_its_address() -> None:
    with pytest.raises(KubeError, match=r"http://127.0.0.1:9 does not answer"):
        Cluster(Connection(server="http://127.0.0.1:9")).request("GET", "/version")


def test_a_refusal_carries_the_servers_words(cluster: Cluster) -> None:
    with pytest.raises(ApiError, match="GET /nothing: 404 /nothing not found"):
        cluster.request("GET", "/nothing")


PLUGIN = """#!/bin/sh
count=$(cat {folder}/count 2>/dev/null || echo 0)
count=$((count + 1))
echo $count > {folder}/count
until=$(date -u -d '+{life} seconds' +%Y-%m-%dT%H:%M:%SZ)
echo '{{"status": {{"token": "token-'$count'", "expirationTimestamp": "'$until'"}}}}'
"""


@pytest.fixture
def with_plugin(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A connection whose credential plugin gives token-1, token-2 and so on, each for as many seconds as are asked."""

    def made(life: int) -> Connection:
        plugin = tmp_path / "plugin"
        plugin.write_text(PLUGIN.format(folder=tmp_path, life=life))
        plugin.chmod(0o755)
        config = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
            "users": [{"name": "u", "user": {"exec": {"command": str(plugin)}}}],
        }
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        return connection_from_environment(str(tmp_path / "config"))

    monkeypatch.delenv("K8S_AUTH_HOST", raising=False)
    return made


def test_a_credential_is_renewed_before_it_ends(server: Server, with_plugin: Any) -> None:
    connection = with_plugin(life=900)
    server.tokens = {"token-1"}
    cluster = Cluster(connection)
    assert cluster.request("GET", "/api/v1")["resources"]
    assert connection.renew_at == pytest.approx(time.time() + 840, abs=60)
    server.tokens = {"token-2"}
    connection.renew_at = time.time()
    assert cluster.request("GET", "/api/v1")["resources"]
    assert connection.renewals == 2


def test_a_refused_credential_is_renewed_once(server: Server, with_plugin: Any) -> None:
    server.tokens = {"token-2"}
    cluster = Cluster(with_plugin(life=900))
    assert cluster.request("GET", "/api/v1")["resources"]
    server.tokens = set()
    with pytest.raises(ApiError, match="401 Unauthorized"):
        cluster.request("GET", "/api/v1")
    assert cluster.connection.renewals == 3


def test_a_plugin_that_fails_says_why(with_plugin: Any, tmp_path: Path) -> None:
    connection = with_plugin(life=900)
    (tmp_path / "plugin").write_text("#!/bin/sh\necho the session has ended >&2\nexit 1\n")
    with pytest.raises(CredentialError, match=r"plugin .* failed: the session has ended"):
        connection.renew()


def test_a_token_file_is_read_again(server: Server, tmp_path: Path) -> None:
    token, config = tmp_path / "token", tmp_path / "config"
    token.write_text("one\n")
    given: Json = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "u", "user": {"tokenFile": "token"}}],
    }
    config.write_text(yaml.safe_dump(given))
    cluster = Cluster(connection_from_environment(str(config)))
    token.write_text("two\n")
    server.tokens = {"two"}
    assert cluster.request("GET", "/api/v1")["resources"]


def test_kubectl_gets_the_cluster_that_the_modules_talk_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("K8S_AUTH_HOST", "K8S_AUTH_API_KEY", "K8S_AUTH_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", "/decoy")
    monkeypatch.setenv("K8S_AUTH_KUBECONFIG", "/own")
    options, environment = kubectl_settings()
    assert (options, environment["KUBECONFIG"]) == ([], "/own")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("K8S_AUTH_KUBECONFIG", "~/.kube/one:/two")
    assert kubectl_settings()[1]["KUBECONFIG"] == "/home/me/.kube/one:/two"
    monkeypatch.setenv("K8S_AUTH_CONTEXT", "mine")
    options, environment = kubectl_settings("/given")
    assert (options, environment["KUBECONFIG"]) == (["--context", "mine"], "/given")
    monkeypatch.setenv("K8S_AUTH_HOST", "https://awx:6443")
    monkeypatch.setenv("K8S_AUTH_API_KEY", "key")
    monkeypatch.setenv("K8S_AUTH_VERIFY_SSL", "no")
    options, environment = kubectl_settings()
    path = Path(environment["KUBECONFIG"])
    assert (options, oct(path.stat().st_mode & 0o777)) == ([], "0o600")
    config = json.loads(path.read_text())
    assert config["clusters"][0]["cluster"] == {"server": "https://awx:6443", "insecure-skip-tls-verify": True}
    assert config["users"][0]["user"] == {"token": "key"}
    forget_temporary()
    assert not path.exists()
