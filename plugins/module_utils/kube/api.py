"""A small Kubernetes API client: kubeconfig in, JSON over HTTPS out.

The generated ``kubernetes`` package takes two to three seconds to import, which every module call would pay. The few
verbs that the
roles need (get, list, server-side apply, merge patch, delete, logs) take none of its models, so they are spoken
directly here.

Connection settings are read like kubernetes.core reads them: ``K8S_AUTH_HOST`` with ``K8S_AUTH_API_KEY`` (an AWX
credential),
``K8S_AUTH_KUBECONFIG`` and ``K8S_AUTH_CONTEXT``, ``KUBECONFIG``, ``~/.kube/config``, and a pod's own service account,
in this order. The environment's proxy is used as kubectl uses it.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
import yaml

Json = dict[str, Any]

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_METADATA_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class KubeError(Exception):
    """The cluster cannot be reached, or its configuration cannot be read."""


class CredentialError(KubeError):
    """The kubeconfig's credential plugin or token file gives no credential."""


class NoKubeconfigError(KubeError):
    """There is no kubeconfig where one was looked for."""


class ApiError(KubeError):
    """The API server refused a request. ``status`` is the HTTP status, ``body`` the server's Status object."""

    def __init__(self, method: str, path: str, status: int, body: Json) -> None:
        self.status = status
        self.body = body
        self.reason = str(body.get("reason", ""))
        super().__init__(f"{method} {path}: {status} {body.get('message') or self.reason or 'no message'}")


def load_yaml(text: str) -> list[Json]:
    """All documents of a YAML text, empty ones left out."""
    return [document for document in yaml.load_all(text, Loader=_METADATA_LOADER) if document]


@dataclass(frozen=True)
class Credential:
    """A token or the files of a client certificate. ``expires`` is a Unix time; None where nobody says."""

    token: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    expires: float | None = None


@dataclass
class Connection:
    """Where the API server is and how to prove who we are.

    ``source`` gives the credential anew where it does not stand in the kubeconfig itself; ``renew_at`` is the Unix time
    from which it should be asked, and ``renewals`` counts how often it was.
    """

    server: str
    ca_file: str | None = None
    verify: bool = True
    server_name: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    namespace: str = "default"
    proxy_url: str | None = None
    source: Callable[[], Credential] | None = None
    renew_at: float | None = None
    renewals: int = 0

    def renew(self) -> None:
        """Take the credential from its source. Raises KubeError where that fails."""
        if self.source is None:
            return
        asked = time.time()
        given = self.source()
        if given.token:
            self.headers = {**self.headers, "Authorization": f"Bearer {given.token}"}
        if given.cert_file:
            self.cert_file, self.key_file = given.cert_file, given.key_file
        # A minute before the end, or the last fifth of a life that is short.
        self.renew_at = given.expires - min(60.0, (given.expires - asked) / 5) if given.expires else None
        self.renewals += 1


def _temp(content: bytes) -> str:
    """Write ``content`` to a private file that lives as long as the process (ssl reads certificates from files
    only)."""
    handle = tempfile.NamedTemporaryFile(prefix="rayplane-kube-", delete=False)  # noqa: SIM115
    with handle:
        handle.write(content)
    _TEMPORARY.append(handle.name)
    return handle.name


_TEMPORARY: list[str] = []


def forget_temporary() -> None:
    """Remove the certificate files that this process wrote."""
    while _TEMPORARY:
        with contextlib.suppress(OSError):
            Path(_TEMPORARY.pop()).unlink()


def _read_kubeconfigs(paths: str) -> tuple[Json, Path]:
    """Merge the files of a colon-separated list as kubectl does: the first mention of a name wins.

    Returns the merged configuration and the folder that relative paths in it refer to (that of the first file read).
    """
    merged: Json = {"clusters": [], "users": [], "contexts": [], "current-context": ""}
    base: Path | None = None
    problems = []
    for path in (Path(part).expanduser() for part in paths.split(os.pathsep) if part):
        try:
            documents = load_yaml(path.read_text(encoding="utf-8"))
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        except yaml.YAMLError as error:
            raise KubeError(f"kubeconfig {path} is not YAML: {error}") from error
        content = documents[0] if documents else {}
        if not isinstance(content, dict):
            raise KubeError(f"kubeconfig {path} holds no mapping")
        base = base or path.absolute().parent
        for key in ("clusters", "users", "contexts"):
            known = {entry["name"] for entry in merged[key]}
            merged[key] += [entry for entry in content.get(key) or [] if entry["name"] not in known]
        merged["current-context"] = merged["current-context"] or content.get("current-context", "")
    if base is None:
        raise NoKubeconfigError(
            "no kubeconfig can be read ("
            + "; ".join(problems)
            + "). Set platform_kubeconfig or KUBECONFIG to one that can."
        )
    return merged, base


def _named(config: Json, kind: str, name: str) -> Json:
    for entry in config[kind]:
        if entry["name"] == name:
            value = entry.get(kind[:-1])
            return value if isinstance(value, dict) else {}
    known = ", ".join(entry["name"] for entry in config[kind]) or "none"
    raise KubeError(f"the kubeconfig has no {kind[:-1]} {name!r} (it has: {known})")


def _exec_credential(spec: Json) -> Credential:
    """Run a credential plugin (``aws eks get-token``, ``gke-gcloud-auth-plugin``, ``kubelogin``).

    Protocol: https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
    """
    command = [spec["command"], *(spec.get("args") or [])]
    environment = dict(os.environ)
    environment.update({entry["name"]: entry["value"] for entry in spec.get("env") or []})
    environment["KUBERNETES_EXEC_INFO"] = json.dumps(
        {"apiVersion": spec.get("apiVersion"), "kind": "ExecCredential", "spec": {"interactive": False}}
    )
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CredentialError(f"the kubeconfig's credential plugin {command[0]!r} cannot be run: {error}") from error
    if result.returncode != 0:
        raise CredentialError(
            f"the kubeconfig's credential plugin {command[0]!r} failed: {result.stderr.strip()[-500:]}"
        )
    try:
        status = json.loads(result.stdout)["status"]
        until = status.get("expirationTimestamp")
        expires = datetime.fromisoformat(until).timestamp() if until else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CredentialError(f"the kubeconfig's credential plugin {command[0]!r} printed no ExecCredential") from error
    certificate = status.get("clientCertificateData")
    return Credential(
        token=status.get("token"),
        cert_file=_temp(certificate.encode()) if certificate else None,
        key_file=_temp(status["clientKeyData"].encode()) if certificate else None,
        expires=expires,
    )


def _token_file(path: Path) -> Credential:
    """A token that somebody keeps fresh in a file, as the kubelet does for a pod's service account."""
    try:
        return Credential(token=path.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise CredentialError(f"the token file {path} cannot be read: {error.strerror}") from error


def _from_kubeconfig(paths: str, context_name: str | None) -> Connection:
    config, base = _read_kubeconfigs(paths)
    context_name = context_name or config["current-context"]
    if not context_name:
        raise KubeError(f"kubeconfig {paths} has no current-context; set platform_kube_context")
    context = _named(config, "contexts", context_name)
    cluster = _named(config, "clusters", context.get("cluster", ""))
    user = _named(config, "users", context["user"]) if context.get("user") else {}

    def file_of(source: Json, key: str) -> str | None:
        if source.get(f"{key}-data"):
            return _temp(base64.b64decode(source[f"{key}-data"]))
        value = source.get(key)
        return str(base / Path(value).expanduser()) if value else None

    connection = Connection(
        server=str(cluster["server"]).rstrip("/"),
        ca_file=file_of(cluster, "certificate-authority"),
        verify=not cluster.get("insecure-skip-tls-verify", False),
        server_name=cluster.get("tls-server-name"),
        cert_file=file_of(user, "client-certificate"),
        key_file=file_of(user, "client-key"),
        namespace=context.get("namespace") or "default",
        proxy_url=cluster.get("proxy-url"),
    )
    if user.get("token"):
        connection.headers["Authorization"] = f"Bearer {user['token']}"
    elif user.get("tokenFile"):
        connection.source = partial(_token_file, base / user["tokenFile"])
    elif user.get("exec"):
        connection.source = partial(_exec_credential, user["exec"])
    elif user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}".encode()
        connection.headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
    connection.renew()
    return connection


def _kubeconfig_paths(kubeconfig: str | None) -> str | None:
    """The kubeconfig files to read, or None where those of kubectl's default place are meant."""
    return kubeconfig or os.environ.get("K8S_AUTH_KUBECONFIG") or os.environ.get("KUBECONFIG")


def _context_name(context: str | None) -> str | None:
    return context or os.environ.get("K8S_AUTH_CONTEXT") or None


def kubectl_settings(kubeconfig: str | None = None, context: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Options and environment with which kubectl talks to the cluster of ``connection_from_environment``.

    Call ``forget_temporary`` once kubectl has ended.
    """
    env = os.environ
    paths = _kubeconfig_paths(kubeconfig)
    if env.get("K8S_AUTH_HOST") and not kubeconfig:
        found = connection_from_environment()
        cluster: Json = {"server": found.server, "insecure-skip-tls-verify": not found.verify}
        if found.ca_file and found.verify:
            cluster["certificate-authority"] = found.ca_file
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
        return [], {**env, "KUBECONFIG": _temp(json.dumps(config).encode())}
    options = ["--context", name] if (name := _context_name(context)) else []
    if not paths:
        return options, dict(env)
    # kubectl itself does not know ~.
    expanded = os.pathsep.join(str(Path(path).expanduser()) for path in paths.split(os.pathsep) if path)
    return options, {**env, "KUBECONFIG": expanded}


def connection_from_environment(kubeconfig: str | None = None, context: str | None = None) -> Connection:
    """Find the cluster: given settings first, then kubernetes.core's environment, kubectl's, and a pod's own account.

    Raises KubeError with what was tried when nothing fits.
    """
    env = os.environ
    host = env.get("K8S_AUTH_HOST")
    if host and not kubeconfig:
        verify = env.get("K8S_AUTH_VERIFY_SSL", "true").lower() not in ("0", "false", "no")
        connection = Connection(server=host.rstrip("/"), ca_file=env.get("K8S_AUTH_SSL_CA_CERT"), verify=verify)
        if env.get("K8S_AUTH_API_KEY"):
            connection.headers["Authorization"] = f"Bearer {env['K8S_AUTH_API_KEY']}"
        connection.cert_file, connection.key_file = env.get("K8S_AUTH_CERT_FILE"), env.get("K8S_AUTH_KEY_FILE")
        return connection
    paths = _kubeconfig_paths(kubeconfig)
    default = Path("~/.kube/config").expanduser()
    if not paths and not default.exists() and (_SERVICE_ACCOUNT / "token").exists():
        connection = Connection(
            server=f"https://{env['KUBERNETES_SERVICE_HOST']}:{env['KUBERNETES_SERVICE_PORT']}",
            ca_file=f"{_SERVICE_ACCOUNT}/ca.crt",
            source=partial(_token_file, _SERVICE_ACCOUNT / "token"),
        )
        connection.renew()
        return connection
    return _from_kubeconfig(paths or str(default), _context_name(context))


def _proxy_of(connection: Connection) -> str | None:
    """The kubeconfig's proxy, or the environment's (HTTPS_PROXY, NO_PROXY), as kubectl takes them; but none for a
    private address, which is seldom a proxy's to reach."""
    server = urlsplit(connection.server)
    host = server.hostname or ""
    if connection.proxy_url or host == "localhost" or proxy_bypass(host):
        return connection.proxy_url
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_private:
            return None
    return getproxies_environment().get(server.scheme)


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
        self._renewing = threading.Lock()
        self._limits: Json = {
            "maxsize": 8,
            "timeout": urllib3.Timeout(connect=10.0, read=timeout),
            "retries": urllib3.Retry(
                total=retries, connect=min(retries, 2), read=0, backoff_factor=0.3, allowed_methods=None
            ),
        }
        self._pool = self._open()

    def _open(self) -> Any:
        connection, options = self.connection, dict(self._limits)
        if connection.server.startswith("https"):
            options |= {
                "ca_certs": connection.ca_file,
                "cert_reqs": "CERT_REQUIRED" if connection.verify else "CERT_NONE",
            }
            options |= {"cert_file": connection.cert_file, "key_file": connection.key_file}
            if connection.server_name:
                options |= {"server_hostname": connection.server_name, "assert_hostname": connection.server_name}
            if not connection.verify:
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        if proxy := _proxy_of(connection):
            return urllib3.ProxyManager(proxy, **options)
        return urllib3.PoolManager(**options)

    def _renew(self, renewals: int) -> None:
        """Take a new credential, unless another thread has since the count of ``renewals`` was read."""
        connection = self.connection
        with self._renewing:
            if connection.renewals == renewals:
                certificate = connection.cert_file
                connection.renew()
                if connection.cert_file != certificate:
                    self._pool = self._open()

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
        renewals = connection.renewals
        if connection.renew_at is not None and time.time() >= connection.renew_at:
            self._renew(renewals)

        def send() -> Any:
            try:
                return self._pool.request(method, url, body=payload, headers={**connection.headers, **headers})
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise KubeError(f"the API server {connection.server} does not answer: {error}") from error

        renewals = connection.renewals
        answer = send()
        if answer.status == 401 and connection.source:
            self._renew(renewals)
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
        super().__init__(Connection(server="http://cluster-to-come.invalid"))

    def resource(self, api_version: str, kind: str, refresh: bool = False) -> Resource | None:
        """None: nothing is there yet."""
        return None
