"""Where the cluster is, how to prove who we are, and for how long."""

from __future__ import annotations

import base64
import inspect
import json
import os
from pathlib import Path

import pytest
import yaml
from ansible_collections.kubernetes.core.plugins.module_utils.k8s import client as core
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    CredentialError,
    KubeError,
    NoKubeconfigError,
    certificates_removed,
    connection_from_environment,
    kubectl_settings,
)
from conftest import connection_to
from kube_fake import Json, Server
from kubernetes.config import kube_config

API = "client.authentication.k8s.io/v1"
PLUGIN = """#!/bin/sh
count=$(cat {folder}/count 2>/dev/null || echo 0)
count=$((count + 1))
echo $count > {folder}/count
until=$(date -u -d '+{life} seconds' +%Y-%m-%dT%H:%M:%SZ)
echo '{{"apiVersion": "{api}", "kind": "ExecCredential",'
echo ' "status": {{"token": "token-'$count'", "expirationTimestamp": "'$until'"}}}}'
"""


@pytest.fixture(autouse=True)
def _no_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("K8S_AUTH_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("KUBECONFIG", raising=False)


def kubeconfig(folder: Path, user: Json, **cluster: str) -> Path:
    """Write a kubeconfig with one cluster and one user."""
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://one:6443/", **cluster}}],
        "users": [{"name": "u", "user": user}],
    }
    path = folder / "config"
    path.write_text(yaml.safe_dump(config))
    return path


def plugin(folder: Path, life: int) -> Json:
    """A user whose credential plugin gives token-1, token-2 and so on, each for as many seconds as are asked."""
    program = folder / "plugin"
    program.write_text(PLUGIN.format(folder=folder, life=life, api=API))
    program.chmod(0o755)
    return {"exec": {"apiVersion": API, "command": str(program)}}


def test_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.crt").touch()
    path = kubeconfig(tmp_path, plugin(tmp_path, 3600), **{"certificate-authority": "ca.crt"})
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{path}")
    found = connection_from_environment()
    assert found.server == "https://one:6443"
    assert found.headers() == {"Authorization": "Bearer token-1"}
    assert found.configuration.ssl_ca_cert == str(tmp_path / "ca.crt")
    with pytest.raises(KubeError, match=r"config cannot be used: .* name other in .*contexts list"):
        connection_from_environment(context="other")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(NoKubeconfigError, match=r"no kubeconfig can be read.*No such file"):
        connection_from_environment()


def test_what_kubernetes_core_knows_holds_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # AWX gives a credential so, beside the kubeconfig that the play names.
    monkeypatch.setenv("K8S_AUTH_KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("K8S_AUTH_HOST", "https://awx/")
    monkeypatch.setenv("K8S_AUTH_API_KEY", "key")
    monkeypatch.setenv("K8S_AUTH_VERIFY_SSL", "no")
    monkeypatch.setenv("K8S_AUTH_PROXY", "http://given:3128")
    monkeypatch.setenv("K8S_AUTH_IMPERSONATE_USER", "somebody")
    monkeypatch.setenv("K8S_AUTH_IMPERSONATE_GROUPS", "a,b")
    found = connection_from_environment()
    assert (found.server, found.configuration.verify_ssl) == ("https://awx", False)
    assert found.configuration.proxy == "http://given:3128"
    headers = found.headers()
    assert (headers["Authorization"], headers["Impersonate-User"]) == ("Bearer key", "somebody")
    assert headers.getlist("Impersonate-Group") == ["a", "b"]


def test_private_names_of_the_client_are_there() -> None:
    """kubernetes.core and the client have no public names for these; another release may change them."""
    wanted = {
        core._create_auth_spec: "(module=None, **kwargs)",
        core._create_configuration: "(auth",
        core._create_headers: "(module=None, **kwargs)",
        kube_config._cleanup_temp_files: "()",
    }
    for function, signature in wanted.items():
        assert str(inspect.signature(function)).startswith(signature), function


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str, given: str | None, proxy: str | None
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://environment:3128")
    monkeypatch.setenv("NO_PROXY", ".inside.example")
    path = kubeconfig(tmp_path, {"token": "t"}, server=server, **({"proxy-url": given} if given else {}))
    found = Cluster(connection_from_environment(str(path)))._pool.proxy
    assert (found and found.url) == proxy


def test_no_api_server_is_told_by_its_address() -> None:
    with pytest.raises(KubeError, match=r"http://127.0.0.1:9 does not answer"):
        Cluster(connection_to("http://127.0.0.1:9")).request("GET", "/version")


def test_a_refusal_carries_the_servers_words(cluster: Cluster) -> None:
    with pytest.raises(ApiError, match="GET /nothing: 404 /nothing not found"):
        cluster.request("GET", "/nothing")


def test_a_credential_is_renewed_before_it_ends(server: Server, tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, plugin(tmp_path, 120), server=f"http://127.0.0.1:{server.server_address[1]}")
    cluster = Cluster(connection_from_environment(str(path)))
    for count in (2, 3):
        server.tokens = {f"token-{count}"}
        assert cluster.request("GET", "/api/v1")["resources"]
    assert cluster.connection.renewals == 0


def test_a_refused_credential_is_renewed_once(server: Server, tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, plugin(tmp_path, 3600), server=f"http://127.0.0.1:{server.server_address[1]}")
    server.tokens = {"token-2"}
    cluster = Cluster(connection_from_environment(str(path)))
    assert cluster.request("GET", "/api/v1")["resources"]
    server.tokens = set()
    with pytest.raises(ApiError, match="401 Unauthorized"):
        cluster.request("GET", "/api/v1")
    assert cluster.connection.renewals == 2


def test_a_plugin_that_fails_says_why(tmp_path: Path) -> None:
    user = plugin(tmp_path, 120)
    connection = connection_from_environment(str(kubeconfig(tmp_path, user)))
    (tmp_path / "plugin").write_text("#!/bin/sh\necho the session has ended >&2\nexit 1\n")
    for ask in (connection.headers, lambda: connection_from_environment(str(tmp_path / "config"))):
        with pytest.raises(CredentialError, match=r"plugin failed: .*the session has ended"):
            ask()


def test_a_token_file_is_read_again(server: Server, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    path = kubeconfig(tmp_path, {"tokenFile": "token"}, server=f"http://127.0.0.1:{server.server_address[1]}")
    cluster = Cluster(connection_from_environment(str(path)))
    token.write_text("two\n")
    server.tokens = {"two"}
    assert cluster.request("GET", "/api/v1")["resources"]


def test_certificates_of_a_kubeconfig_leave_no_file(tmp_path: Path) -> None:
    data = base64.b64encode(b"certificate").decode()
    path = kubeconfig(tmp_path, {"client-certificate-data": data, "client-key-data": data})
    with certificates_removed():
        found = connection_from_environment(str(path)).configuration
        assert Path(found.cert_file).read_bytes() == b"certificate"
    assert not Path(found.cert_file).exists()


def test_kubectl_gets_the_cluster_that_the_modules_talk_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", "/decoy")
    monkeypatch.setenv("K8S_AUTH_KUBECONFIG", "/own")
    options, environment = kubectl_settings(tmp_path)
    assert (options, environment["KUBECONFIG"]) == ([], "/own")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("K8S_AUTH_KUBECONFIG", "~/.kube/one:/two")
    monkeypatch.setenv("K8S_AUTH_CONTEXT", "mine")
    options, environment = kubectl_settings(tmp_path)
    assert (options, environment["KUBECONFIG"]) == (["--context", "mine"], "/home/me/.kube/one:/two")
    monkeypatch.setenv("K8S_AUTH_HOST", "https://awx:6443")
    monkeypatch.setenv("K8S_AUTH_API_KEY", "key")
    monkeypatch.setenv("K8S_AUTH_VERIFY_SSL", "no")
    options, environment = kubectl_settings(tmp_path)
    path = Path(environment["KUBECONFIG"])
    assert (options, path.parent, oct(path.stat().st_mode & 0o777)) == ([], tmp_path, "0o600")
    config = json.loads(path.read_text())
    assert config["clusters"][0]["cluster"] == {"server": "https://awx:6443", "insecure-skip-tls-verify": True}
    assert config["users"][0]["user"] == {"token": "key"}
