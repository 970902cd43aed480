"""The verbs that the roles need, on one API server: get, list, server-side apply, merge patch, delete, logs.

Where the server is and how to prove who we are is kubernetes.core's affair: every ``K8S_AUTH_*`` of its modules, exec
credentials, a pod's own account. What is asked and answered is the API's own JSON; models of the ``kubernetes`` package
would be made of it only to be taken apart again.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import yaml

# Preflight names a package that is missing.
with contextlib.suppress(ImportError):
    import urllib3

Json = dict[str, Any]


class KubeError(Exception):
    """The cluster cannot be reached, or its configuration cannot be read."""


class CredentialError(KubeError):
    """The kubeconfig's credential plugin gives no credential."""


class NoKubeconfigError(KubeError):
    """There is no kubeconfig where one was looked for."""


class ApiError(KubeError):
    """The API server refused a request. ``status`` is the HTTP status, ``body`` the server's Status object."""

    def __init__(self, method: str, path: str, status: int, body: Json) -> None:
        self.status = status
        self.body = body
        self.reason = str(body.get("reason", ""))
        super().__init__(f"{method} {path}: {status} {body.get('message') or self.reason or 'no message'}")


@functools.cache
def client() -> Any:
    """kubernetes.core's client and what it stands on, imported where a cluster is first asked: it takes a while."""
    try:
        from ansible_collections.kubernetes.core.plugins.module_utils.k8s import client as core  # noqa: PLC0415
        from kubernetes.client.configuration import Configuration  # noqa: PLC0415
        from kubernetes.client.rest import RESTClientObject  # noqa: PLC0415
        from kubernetes.config import kube_config  # noqa: PLC0415
        from kubernetes.config.config_exception import ConfigException  # noqa: PLC0415
    except ImportError as error:
        raise KubeError(f"the Python package kubernetes is not installed: {error}") from error
    return SimpleNamespace(
        core=core,
        Configuration=Configuration,
        RESTClientObject=RESTClientObject,
        ConfigException=ConfigException,
        kube_config=kube_config,
    )


class Connection:
    """Where the API server is and how to prove who we are: a ``kubernetes.client.Configuration`` and where it is from.

    ``source`` gives the configuration; it is asked again when the server refuses what it gave. Raises KubeError.
    """

    def __init__(self, source: Callable[[], Any]) -> None:
        self._source = source
        self._renewing = threading.Lock()
        self.configuration = source()
        self.renewals = 0

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self.configuration.host).rstrip("/")

    def headers(self) -> Any:
        """Who we are, as urllib3's headers; a token about to end is taken anew.

        Raises CredentialError where that fails.
        """
        with _complaints() as complaints:
            value = self.configuration.get_api_key_with_prefix("authorization")
        if complaints:
            raise CredentialError(complaints[-1])
        headers = urllib3.HTTPHeaderDict({"Authorization": value.strip()} if value else {})
        for name, given in client().core._create_headers().items():
            for one in given if isinstance(given, list) else [given]:
                headers.add(name, one)
        return headers

    def renew(self, renewals: int) -> None:
        """Take everything anew, unless another thread has since the count of ``renewals`` was read."""
        with self._renewing:
            if self.renewals == renewals:
                self.configuration = self._source()
                self.renewals += 1


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """Why a credential plugin failed: the client only logs it, and goes on without a credential."""
    complaints: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complaints.append(f"the kubeconfig's credential plugin failed: {record.getMessage()}")

    root, listener = logging.getLogger(), Listener(logging.ERROR)
    root.addHandler(listener)
    try:
        yield complaints
    finally:
        root.removeHandler(listener)


@contextlib.contextmanager
def certificates_removed() -> Iterator[None]:
    """Remove what the client writes into files: ssl reads certificates from files only. A process that ends by itself
    does so, but not a task's."""
    try:
        yield
    finally:
        client().kube_config._cleanup_temp_files()


def connection_from_environment(kubeconfig: str | None = None, context: str | None = None) -> Connection:
    """Find the cluster as kubernetes.core does: a given host, a kubeconfig, a pod's own account, kubectl's kubeconfig.

    Raises NoKubeconfigError where there is no file of the kubeconfig, KubeError for what cannot be used.
    """
    return Connection(lambda: _configuration(_paths(kubeconfig), context or os.environ.get("K8S_AUTH_CONTEXT")))


def _paths(kubeconfig: str | None) -> str:
    """The kubeconfig files, separated by colons; empty where those of kubectl's default place are meant."""
    return kubeconfig or os.environ.get("K8S_AUTH_KUBECONFIG") or os.environ.get("KUBECONFIG") or ""


def _configuration(paths: str, context: str | None) -> Any:
    core = client().core
    auth = core._create_auth_spec(kubeconfig=paths or None, context=context or None)
    from_files = paths and not auth.get("host")
    if from_files and not any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep) if path):
        raise NoKubeconfigError(
            f"no kubeconfig can be read ({paths}: No such file). Set platform_kubeconfig or KUBECONFIG to one that can."
        )
    try:
        with _complaints() as complaints:
            # What an earlier call in this process has read.
            client().Configuration.set_default(None)
            configuration = core._create_configuration(auth)
        proxy = auth.get("proxy") or (_proxy_of_kubeconfig(paths, context) if from_files else None)
    except (client().ConfigException, OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        if not paths:
            raise NoKubeconfigError(f"no kubeconfig can be read: {error}") from error
        raise KubeError(f"the kubeconfig {paths} cannot be used: {error}") from error
    if complaints:
        raise CredentialError(complaints[-1])
    configuration.proxy = proxy or _proxy_of_environment(configuration.host)
    return configuration


def _proxy_of_kubeconfig(paths: str, context: str | None) -> str | None:
    """The cluster's `proxy-url`, which the client passes over."""
    merged = client().kube_config.KubeConfigMerger(paths).config
    active = merged["contexts"].get_with_name(context or merged["current-context"])["context"]
    url: str | None = merged["clusters"].get_with_name(active["cluster"])["cluster"].safe_get("proxy-url")
    return url


def _proxy_of_environment(server: str) -> str | None:
    """HTTPS_PROXY and NO_PROXY as kubectl takes them; but none for a private address, seldom a proxy's to reach."""
    address = urlsplit(server)
    host = address.hostname or ""
    if host == "localhost" or proxy_bypass(host):
        return None
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_private:
            return None
    return getproxies_environment().get(address.scheme)


def kubectl_settings(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Options and environment with which kubectl talks to the cluster of ``connection_from_environment``.

    ``folder`` takes the kubeconfig of a cluster that is given by K8S_AUTH_HOST.
    """
    env = os.environ
    if env.get("K8S_AUTH_HOST"):
        found = connection_from_environment().configuration
        cluster: Json = {"server": found.host, "insecure-skip-tls-verify": not found.verify_ssl}
        if found.ssl_ca_cert and found.verify_ssl:
            cluster["certificate-authority"] = found.ssl_ca_cert
        given = {
            "token": env.get("K8S_AUTH_API_KEY"),
            "client-certificate": found.cert_file,
            "client-key": found.key_file,
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "given",
            "clusters": [{"name": "given", "cluster": cluster}],
            "users": [{"name": "given", "user": {key: value for key, value in given.items() if value}}],
            "contexts": [{"name": "given", "context": {"cluster": "given", "user": "given"}}],
        }
        path = folder / "kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config), encoding="utf-8")
        return [], {**env, "KUBECONFIG": str(path)}
    options = ["--context", name] if (name := env.get("K8S_AUTH_CONTEXT")) else []
    # kubectl itself does not know ~.
    expanded = os.pathsep.join(str(Path(path).expanduser()) for path in _paths(None).split(os.pathsep) if path)
    return options, {**env, "KUBECONFIG": expanded} if expanded else dict(env)


@dataclass(frozen=True)
class Resource:
    """How one kind is addressed in the API."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool

    def path(self, namespace: str | None, name: str | None = None) -> str:
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        if self.namespaced and namespace:
            root += f"/namespaces/{quote(namespace)}"
        root += f"/{self.plural}"
        return f"{root}/{quote(name)}" if name else root


class Cluster:
    """The verbs the roles need, on one API server. Safe to share between threads.

    ``warnings`` collects the API server's own Warning headers, each once.
    """

    def __init__(self, connection: Connection, timeout: float = 60.0, retries: int = 3) -> None:
        self.connection = connection
        self.warnings: list[str] = []
        self._discovered: dict[str, dict[str, Resource]] = {}
        self._limits: Json = {
            "timeout": urllib3.Timeout(connect=10.0, read=timeout),
            "retries": urllib3.Retry(
                total=retries, connect=min(retries, 2), read=0, backoff_factor=0.3, allowed_methods=None
            ),
        }
        self._pool = self._open()

    def _open(self) -> Any:
        return client().RESTClientObject(self.connection.configuration, maxsize=8).pool_manager

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, str] | None = None,
        *,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        raw: bool = False,
    ) -> Any:
        """One request; the decoded JSON (text where ``raw``). Raises ApiError on a refusal, KubeError when nothing
        answers. ``headers`` are further ones, for what is asked through the API server's proxy."""
        connection = self.connection
        url = connection.server + path + ("?" + urlencode(query) if query else "")
        headers = {"Accept": "application/json", **(headers or {})}
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = content_type

        def send() -> Any:
            sent = connection.headers()
            sent.update(headers)
            try:
                return self._pool.request(method, url, body=payload, headers=sent, **self._limits)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise KubeError(f"the API server {connection.server} does not answer: {error}") from error

        renewals = connection.renewals
        answer = send()
        if answer.status == 401:
            connection.renew(renewals)
            self._pool = self._open()
            answer = send()
        for warning in answer.headers.getlist("Warning"):
            text = warning.split('"')[1] if '"' in warning else warning
            if text not in self.warnings:
                self.warnings.append(text)
        if answer.status >= 400:
            try:
                status = json.loads(answer.data)
            except ValueError:
                status = {"message": answer.data.decode(errors="replace")[:500]}
            raise ApiError(
                method, path, answer.status, status if isinstance(status, dict) else {"message": str(status)}
            )
        if raw:
            return answer.data.decode(errors="replace")
        return json.loads(answer.data)

    def resource(self, api_version: str, kind: str, refresh: bool = False) -> Resource | None:
        """The address of a kind, or None where the cluster does not know it (its CRD is not installed)."""
        if refresh or api_version not in self._discovered:
            root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
            try:
                listed = self.request("GET", root)["resources"]
            except ApiError as error:
                if error.status != 404:
                    raise
                listed = []
            self._discovered[api_version] = {
                entry["kind"]: Resource(api_version, entry["kind"], entry["name"], entry["namespaced"])
                for entry in listed
                if "/" not in entry["name"]
            }
        return self._discovered[api_version].get(kind)

    def get(self, resource: Resource, namespace: str | None, name: str) -> Json | None:
        """The live object, or None."""
        try:
            found: Json = self.request("GET", resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def list(self, resource: Resource, namespace: str | None = None, selector: str = "") -> list[Json]:
        """Objects of a kind (in all namespaces where none is given), optionally by label selector."""
        query = {"labelSelector": selector} if selector else None
        items: list[Json] = self.request("GET", resource.path(namespace), query=query).get("items") or []
        return [{"apiVersion": resource.api_version, "kind": resource.kind, **item} for item in items]

    def apply(self, resource: Resource, definition: Json, manager: str, dry_run: bool = False) -> Json:
        """Server-side apply with forced ownership; the object as it is afterwards (as it would be, in a dry run)."""
        meta = definition["metadata"]
        query = {"fieldManager": manager, "force": "true"} | ({"dryRun": "All"} if dry_run else {})
        result: Json = self.request(
            "PATCH",
            resource.path(meta.get("namespace"), meta["name"]),
            definition,
            query,
            content_type="application/apply-patch+yaml",
        )
        return result

    def merge(
        self, resource: Resource, namespace: str | None, name: str, patch: Json, *, manager: str, dry_run: bool = False
    ) -> Json:
        """JSON merge patch (RFC 7386)."""
        query = {"fieldManager": manager} | ({"dryRun": "All"} if dry_run else {})
        path = resource.path(namespace, name)
        result: Json = self.request("PATCH", path, patch, query, content_type="application/merge-patch+json")
        return result

    def delete(self, resource: Resource, namespace: str | None, name: str) -> bool:
        """Delete in the background; False where it was gone already."""
        try:
            self.request("DELETE", resource.path(namespace, name), {"propagationPolicy": "Background"})
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def pod_log(self, namespace: str, pod: str, container: str, lines: int, previous: bool = False) -> str:
        """The last lines of a container's log; the reason in brackets where there is none."""
        query = {"container": container, "tailLines": str(lines)} | ({"previous": "true"} if previous else {})
        try:
            text: str = self.request("GET", f"/api/v1/namespaces/{namespace}/pods/{pod}/log", query=query, raw=True)
        except KubeError as error:
            return f"[no log: {error}]"
        return text.rstrip()


class ClusterToCome(Cluster):
    """A cluster that an earlier stage would make: what check mode compares with before the first run. Knows no kind."""

    def __init__(self) -> None:
        self.warnings = []

    def resource(self, api_version: str, kind: str, refresh: bool = False) -> Resource | None:
        """None: nothing is there yet."""
        return None
