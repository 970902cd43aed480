# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Names of container images, and what a registry says of one (OCI distribution specification 1.1, HTTP API V2)."""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Credentials", "Reference", "RegistryError", "auth_file_text", "digest_of", "parse", "stored_credentials"]

#: Seconds to connect, and to answer; a credential helper's, too.
PATIENCE = 10
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json,"
    " application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"
)
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(
    rf"(?:(?P<registry>localhost|[\w.-]*\.[\w.-]+|[\w.-]+(?=:\d))(?P<port>:\d+)?/)?(?P<path>{_PATH}(?:/{_PATH})*)"
    r"(?::(?P<tag>[\w][\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_HUB = "docker.io"
#: Hosts of the Docker Hub whose names differ from that of its images.
_API_HOSTS = {_HUB: "registry-1.docker.io"}
_HUB_AUTH = "https://index.docker.io/v1/"
#: What stands in place of a user's name where the password is an identity token.
_IDENTITY = "<token>"


class RegistryError(Exception):
    """The registry does not say. ``status`` is that of its answer, 0 where none came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Credentials(NamedTuple):
    """What a registry knows somebody by. With an identity token as password the username is ``<token>``."""

    username: str
    password: str

    @property
    def basic(self) -> str:
        return base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class Reference(NamedTuple):
    """The parts of an image's name, as docker and containerd read it."""

    registry: str
    repository: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        """The name with nothing left out: buildah and CRI-O know of no registry to look a short one up in."""
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def loopback(self) -> bool:
        """Whether only the machine itself reaches the registry."""
        host = self.registry.partition(":")[0]
        return host == "localhost" or host.startswith("127.")


def parse(image: str) -> Reference:
    """Split an image's name; without a registry it is the Docker Hub's, without a tag the tag is ``latest``.

    Raises ValueError where no container runtime would take it.
    """
    found = _NAME.fullmatch(image)
    if found is None:
        raise ValueError("no container runtime takes it as an image's name (REGISTRY/REPOSITORY:TAG, in lower case)")
    registry = (found["registry"] or _HUB) + (found["port"] or "")
    path = found["path"]
    if registry == _HUB and "/" not in path:
        path = f"library/{path}"
    return Reference(registry, path, found["tag"] or ("" if found["digest"] else "latest"), found["digest"] or "")


def digest_of(image: str, credentials: Credentials | None = None, timeout: float = PATIENCE) -> str | None:
    """Return the digest of an image's manifest; None where its registry has no such image.

    Raises RegistryError where the registry does not say.
    """
    reference = parse(image)
    host = _API_HOSTS.get(reference.registry, reference.registry)
    scheme = "http" if reference.loopback else "https"
    wanted = reference.digest or reference.tag
    url = f"{scheme}://{host}/v2/{reference.repository}/manifests/{wanted}"
    # A proxy would look for the loopback address on its own machine.
    proxies = urllib.request.ProxyHandler({}) if reference.loopback else urllib.request.ProxyHandler()
    opener = urllib.request.build_opener(proxies)
    try:
        try:
            return _head(opener, url, "", timeout)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            way = error.headers.get("WWW-Authenticate", "")
            error.close()
        token = _authorization(opener, way, reference.repository, credentials, timeout)
        return _head(opener, url, token, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None
        raise RegistryError(f"{reference.registry} answers {error.code} {error.reason}", error.code) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise RegistryError(f"{reference.registry} does not answer: {reason}") from error


def _head(opener: urllib.request.OpenerDirector, url: str, authorization: str, timeout: float) -> str:
    request = urllib.request.Request(url, headers={"Accept": _MANIFESTS}, method="HEAD")  # noqa: S310 - the scheme is ours
    if authorization:
        # Not for the host that a redirect leads to.
        request.add_unredirected_header("Authorization", authorization)
    with opener.open(request, timeout=timeout) as answer:
        digest = answer.headers["Docker-Content-Digest"]
    if not digest:
        raise ValueError("it tells no digest (header Docker-Content-Digest)")
    return str(digest)


def _authorization(
    opener: urllib.request.OpenerDirector, way: str, repository: str, credentials: Credentials | None, timeout: float
) -> str:
    """Return the Authorization header that a registry asks for: Basic, or a token of the server that it names."""
    scheme, _, rest = way.partition(" ")
    if scheme.lower() != "bearer":
        return f"Basic {credentials.basic}" if credentials else ""
    given = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    query = {"service": given.get("service", ""), "scope": f"repository:{repository}:pull"}
    realm = given["realm"] if given.get("realm", "").startswith(("https://", "http://")) else ""
    if credentials and credentials.username == _IDENTITY:
        # An OAuth 2 refresh token (distribution, docs/content/spec/auth/oauth.md).
        query |= {"grant_type": "refresh_token", "client_id": "rayplane", "refresh_token": credentials.password}
        request = urllib.request.Request(realm, urllib.parse.urlencode(query).encode())  # noqa: S310 - checked above
    else:
        request = urllib.request.Request(f"{realm}?{urllib.parse.urlencode(query)}")  # noqa: S310 - checked above
        if credentials:
            request.add_unredirected_header("Authorization", f"Basic {credentials.basic}")
    with opener.open(request, timeout=timeout) as answer:
        token = json.load(answer)
    return f"Bearer {token.get('token') or token.get('access_token')}"


def stored_credentials(registry: str) -> Credentials | None:
    """Return what ``podman login``, ``buildah login`` or ``docker login`` keep for a registry: in their files, or with
    the credential helper that these name."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    files = [os.environ.get("REGISTRY_AUTH_FILE", ""), f"{runtime}/containers/auth.json", "~/.docker/config.json"]
    alias = _HUB_AUTH if registry == _HUB else f"https://{registry}"
    for file in files:
        try:
            known = json.loads(Path(file).expanduser().read_text(encoding="utf-8")) if file else {}
            if found := _from_helper(known, registry, alias):
                return found
            entries = known.get("auths") or {}
            entry = entries.get(registry) or entries.get(alias) or {}
            if entry.get("identitytoken"):
                return Credentials(_IDENTITY, entry["identitytoken"])
            username, _, password = base64.b64decode(entry.get("auth", "")).decode().partition(":")
        except (OSError, ValueError, AttributeError, binascii.Error):
            continue
        if username:
            return Credentials(username, password)
    return None


def _from_helper(known: dict[str, Any], registry: str, alias: str) -> Credentials | None:
    """Ask the registry's credential helper, or the store of all credentials (docker/docker-credential-helpers).

    One that is not installed, does not answer or knows no such registry has none.
    """
    helpers = known.get("credHelpers") or {}
    key = next((name for name in (registry, alias) if name in helpers), alias if registry == _HUB else registry)
    helper = helpers.get(key) or known.get("credsStore")
    if not helper:
        return None
    try:
        asked = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=key,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        answer = json.loads(asked.stdout)
        return Credentials(answer["Username"], answer["Secret"]) if answer["Username"] else None
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError):
        return None


def auth_file_text(registry: str, credentials: Credentials) -> str:
    """Return the text of a file that podman and buildah take as ``--authfile``."""
    return json.dumps({"auths": {registry: {"auth": credentials.basic}}})
