"""Images: tagged by what they are made of, built once, pushed where the registry lacks them."""

from __future__ import annotations

import base64
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.module_utils.images import registry as container_registry
from ansible_collections.rayplane.platform.plugins.module_utils.images.registry import (
    Credentials,
    Reference,
    RegistryError,
    digest_of,
    parse,
)
from ansible_collections.rayplane.platform.plugins.modules import container_image
from aws_fake import FakeClient, refusal
from conftest import PROJECT

DIGEST = "sha256:" + "a" * 64
LOGIN = Credentials("robot", "sesame")

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ("redis", Reference("docker.io", "library/redis", "latest", "")),
        ("rayproject/ray-llm:2.60.0", Reference("docker.io", "rayproject/ray-llm", "2.60.0", "")),
        ("quay.io/a/b/c:v1", Reference("quay.io", "a/b/c", "v1", "")),
        ("127.0.0.1:5000/a/b", Reference("127.0.0.1:5000", "a/b", "latest", "")),
        ("registry:5000/b:1", Reference("registry:5000", "b", "1", "")),
        ("localhost/a:1", Reference("localhost", "a", "1", "")),
        (f"ghcr.io/a/b@{DIGEST}", Reference("ghcr.io", "a/b", "", DIGEST)),
        (f"ghcr.io/a/b:1@{DIGEST}", Reference("ghcr.io", "a/b", "1", DIGEST)),
    ],
)
def test_names_are_read_as_runtimes_read_them(image: str, reference: Reference) -> None:
    assert parse(image) == reference
    assert parse(reference.name) == reference


@pytest.mark.parametrize(
    "image", ["", "REGISTRY/a:1", "a b", "quay.io/a:", "quay.io/A", "a@sha256:1", "https://quay.io/a"]
)
def test_names_that_no_runtime_takes(image: str) -> None:
    with pytest.raises(ValueError, match="no container runtime"):
        parse(image)


# --- the registry ----------------------------------------------------------------------------------------------------


class FakeRegistry(http.server.BaseHTTPRequestHandler):
    """A registry with one image a/b:1; `way` is how it wants to be asked."""

    way = "anonymous"

    def do_HEAD(self) -> None:
        """Answer for a manifest."""
        asked = self.headers.get("Authorization", "")
        wanted = {"anonymous": "", "basic": f"Basic {LOGIN.basic}", "token": "Bearer t"}[self.way]
        if asked != wanted:
            self.send_response(401)
            address = f"http://127.0.0.1:{self.server.server_address[1]}/token"
            challenge = {"basic": 'Basic realm="x"', "token": f'Bearer realm="{address}",service="s"'}
            self.send_header("WWW-Authenticate", challenge[self.way])
        elif self.path == "/v2/a/b/manifests/1":
            self.send_response(200)
            self.send_header("Docker-Content-Digest", DIGEST)
        elif self.path == "/v2/a/b/manifests/silent":
            self.send_response(200)
        elif self.path == "/v2/a/b/manifests/garbage":
            self.wfile.write(b"no HTTP\r\n\r\n")
            return
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self) -> None:
        """Give out a token, to who logs in."""
        known = (
            self.headers.get("Authorization") == f"Basic {LOGIN.basic}"
            and "scope=repository%3Aa%2Fb%3Apull" in self.path
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"token": "t" if known else "nobody"}).encode())

    def do_POST(self) -> None:
        """Give out a token for an identity token."""
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        known = form["grant_type"] == ["refresh_token"] and form["refresh_token"] == ["word"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"access_token": "t" if known else "nobody"}).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeRegistry) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("way", ["anonymous", "basic", "token"])
def test_digests(registry: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRegistry, "way", way)
    login = None if way == "anonymous" else LOGIN
    assert digest_of(f"{registry}/a/b:1", login) == DIGEST
    assert digest_of(f"{registry}/a/b:2", login) is None
    if login:
        with pytest.raises(RegistryError) as refused:
            digest_of(f"{registry}/a/b:1")
        assert refused.value.status == 401


@pytest.mark.parametrize("tag", ["silent", "garbage"])
def test_a_registry_that_says_something_else_tells_no_digest(registry: str, tag: str) -> None:
    with pytest.raises(RegistryError):
        digest_of(f"{registry}/a/b:{tag}")


def test_a_registry_that_does_not_answer_says_nothing_of_an_image() -> None:
    with pytest.raises(RegistryError, match="does not answer") as silent:
        digest_of("127.0.0.1:1/a:1")
    assert silent.value.status == 0


@pytest.mark.parametrize("file", ["containers/auth.json", ".docker/config.json"])
def test_what_login_stored_is_found(registry: str, file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(container_registry.auth_file_text("quay.io", LOGIN))
    assert container_registry.stored_credentials("quay.io") == LOGIN
    assert container_registry.stored_credentials("ghcr.io") is None


HELPER = """#!/bin/sh
read server
case "$1 $server" in
"get quay.io") echo '{"ServerURL": "quay.io", "Username": "robot", "Secret": "sesame"}' ;;
"get https://index.docker.io/v1/") echo '{"Username": "<token>", "Secret": "word"}' ;;
"get slow.io") exec sleep 600 ;;
"get odd.io") echo sesame ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("config", "asked", "login"),
    [
        ({"credsStore": "fake"}, "quay.io", LOGIN),
        ({"credHelpers": {"quay.io": "fake"}, "credsStore": "absent"}, "quay.io", LOGIN),
        ({"credHelpers": {"ghcr.io": "fake"}}, "quay.io", None),
        ({"credsStore": "fake"}, "docker.io", Credentials("<token>", "word")),
        ({"credsStore": "absent"}, "quay.io", None),
        *(({"credsStore": "fake"}, host, None) for host in ("ghcr.io", "slow.io", "odd.io")),
        ({"credsStore": "fake", "auths": {"ghcr.io": {"auth": LOGIN.basic}}}, "ghcr.io", LOGIN),
        ({"auths": {"a.io": {"auth": LOGIN.basic, "identitytoken": "t"}}}, "a.io", Credentials("<token>", "t")),
    ],
)
def test_credential_helpers_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, asked: str, login: Credentials | None
) -> None:
    helper = tmp_path / "docker-credential-fake"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(container_registry, "PATIENCE", 0.1 if asked == "slow.io" else 60)
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text(json.dumps(config))
    assert container_registry.stored_credentials(asked) == login


def test_an_identity_token_gets_a_token(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRegistry, "way", "token")
    assert digest_of(f"{registry}/a/b:1", Credentials("<token>", "word")) == DIGEST


def test_ecr_is_asked_by_its_own_api() -> None:
    token = {
        "authorizationToken": base64.b64encode(b"AWS:word").decode(),
        "proxyEndpoint": "https://1.dkr.ecr.eu-west-1.amazonaws.com",
    }

    def describe(**asked: Any) -> Any:
        if asked["imageIds"] != [{"imageTag": "t"}]:
            raise refusal("ImageNotFoundException")
        return {"imageDetails": [{"imageDigest": DIGEST}]}

    client = FakeClient("ecr", get_authorization_token=lambda: {"authorizationData": [token]}, describe_images=describe)
    ecr = container_image.Ecr("c/gateway", Api(client, Changes(False)))
    assert ecr.repository == "1.dkr.ecr.eu-west-1.amazonaws.com/c/gateway"
    assert ecr.credentials() == Credentials("AWS", "word")
    assert (ecr.digest("t"), ecr.digest("u")) == (DIGEST, None)


# --- the tag ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What a task asks for: two files of a folder with more in it."""
    for name, text in {"app/a.py": "1", "app/__pycache__/a.pyc": "x", "lock.txt": "2", "other": "3"}.items():
        (tmp_path / "context" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "context" / name).write_text(text)
    (tmp_path / "Containerfile").write_text("ARG BASE\nFROM ${BASE}\n")
    return {
        "containerfile": str(tmp_path / "Containerfile"),
        "context": str(tmp_path / "context"),
        "files": ["app", "lock.txt"],
        "texts": {},
        "base": "quay.io/base:1",
        "platform": "linux/amd64",
        "edition": "",
        "tool": "buildah",
        "pip_index_url": "",
        "ca_file": "",
        "timeout": 60,
    }


def tag(given: dict[str, Any]) -> str:
    return container_image.tag_of(given, container_image.inputs_of(Path(given["context"]), given["files"]))


def test_the_tag_changes_with_all_that_the_image_is_made_of(given: dict[str, Any], tmp_path: Path) -> None:
    context, first = Path(given["context"]), tag(given)
    seen = {first}
    changed = [{"platform": "linux/arm64"}, {"edition": "2"}, {"base": "quay.io/base:2"}, {"texts": {"r": "x"}}]
    for change in changed:
        seen.add(tag(given | change))
    for size in (1, 2):
        (tmp_path / "base.tar").write_bytes(b"x" * size)
        seen.add(tag(given | {"base": str(tmp_path / "base*.tar")}))
    (context / "app/a.py").chmod(0o755)
    seen.add(tag(given))
    (context / "app/a.py").chmod(0o644)
    for file in (context / "app/a.py", context / "lock.txt", Path(given["containerfile"])):
        text = file.read_text()
        file.write_text(text + " ")
        seen.add(tag(given))
        file.write_text(text)
    assert len(seen) == len(changed) + 7
    (context / "other").write_text("another")
    (context / "app/__pycache__/a.pyc").write_text("another")
    assert tag(given | {"pip_index_url": "https://mirror", "tool": "podman"}) == first


def test_what_is_not_there_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(PlatformError, match=r"there is no .*/lost"):
        tag(given | {"files": ["lost"]})
    with pytest.raises(PlatformError, match=r"images_base is /lost\.tar, which names 0 files"):
        tag(given | {"base": "/lost.tar"})
    with pytest.raises(PlatformError, match="images_base is 'A': no container runtime"):
        tag(given | {"base": "A"})


# --- building and pushing --------------------------------------------------------------------------------------------

TOOL = """#!/bin/sh
echo "${{0##*/}} $*" >> "{folder}/calls"
case "$1" in
  inspect) grep -qs "^$4$" "{folder}/images" ;;
  build) if [ -e "{folder}/broken" ]; then echo 'no space left' >&2; exit 3; fi
         while [ "$1" != --tag ]; do shift; done; echo "$2" >> "{folder}/images"
         for last; do :; done; (cd "$last" && find . -type f | sort) >> "{folder}/context" ;;
  push) for last; do :; done; echo "${{last#docker://}}" >> "{folder}/pushed" ;;
esac
"""


class Shop(container_image.Registry):
    """A registry that has what the tool has pushed."""

    def __init__(
        self, folder: Path, credentials: Credentials | None = None, repository: str = "quay.io/a/gateway"
    ) -> None:
        super().__init__(repository, credentials)
        self.folder = folder

    def digest(self, tag: str) -> str | None:
        """Look into the tool's notes."""
        pushed = self.folder / "pushed"
        there = pushed.is_file() and f"{self.repository}:{tag}" in pushed.read_text().splitlines()
        return DIGEST if there else None

    def lines(self, file: str) -> list[str]:
        """What the tool noted."""
        path = self.folder / file
        return path.read_text().splitlines() if path.is_file() else []


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with podman, buildah and docker that note what they are asked."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in container_image.TOOLS:
        (folder / name).write_text(TOOL.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def keep(given: dict[str, Any], registry: container_image.Registry, check: bool = False) -> tuple[str, list[str]]:
    changes = Changes(check)
    return container_image.keep(given, registry, changes)["image"], changes.actions


def test_an_unchanged_input_builds_and_pushes_nothing(given: dict[str, Any], tools: Path) -> None:
    shop = Shop(tools)
    planned = keep(given, shop, check=True)
    assert planned == (f"quay.io/a/gateway:{tag(given)}", [f"create image quay.io/a/gateway:{tag(given)}"])
    assert shop.lines("calls") == []
    assert keep(given, shop) == (f"quay.io/a/gateway@{DIGEST}", planned[1])
    # The build sees what it is told of.
    assert shop.lines("context") == ["./app/a.py", "./lock.txt"]
    calls = shop.lines("calls")
    for check in (True, False):
        assert keep(given, shop, check) == (f"quay.io/a/gateway@{DIGEST}", [])
    assert shop.lines("calls") == calls


def test_a_second_repository_gets_the_image_that_is_built(given: dict[str, Any], tools: Path) -> None:
    keep(given, Shop(tools))
    keep(given, Shop(tools, repository="quay.io/b/gateway"))
    assert [line.split()[1] for line in Shop(tools).lines("calls")] == ["inspect", "build", "push", "inspect", "push"]


def test_a_root_file_system_becomes_the_base(given: dict[str, Any], tools: Path, tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(b"x")
    keep(given | {"base": str(tmp_path / "root.tar")}, Shop(tools))
    base, image = (line for line in Shop(tools).lines("calls") if " build " in line)
    assert "--tag localhost/rayplane/base:" in base
    assert f"--build-arg BASE={base.split('--tag ')[1].split()[0]}" in image


@pytest.mark.parametrize(
    ("tool", "push"),
    [
        ("buildah", "buildah push --authfile FILE --tls-verify=false LOCAL docker://127.0.0.1:5000/gateway:TAG"),
        ("podman", "podman push --authfile FILE --tls-verify=false LOCAL docker://127.0.0.1:5000/gateway:TAG"),
        ("docker", "docker push 127.0.0.1:5000/gateway:TAG"),
    ],
)
def test_each_tool_is_told_in_its_words(given: dict[str, Any], tools: Path, tool: str, push: str) -> None:
    shop = Shop(tools, LOGIN, "127.0.0.1:5000/gateway")
    keep(given | {"tool": tool, "pip_index_url": "https://user:word@mirror"}, shop)
    told = tag(given)
    words = shop.lines("calls")[-1].replace(told, "TAG").replace("localhost/rayplane/gateway:TAG", "LOCAL").split()
    assert ["FILE" if word.endswith("/auth.json") else word for word in words] == push.split()
    # Neither a registry's nor an index's password stands in a command line.
    assert not [line for line in shop.lines("calls") if "word@" in line or LOGIN.password in line]


def test_what_the_tool_says_is_told(given: dict[str, Any], tools: Path) -> None:
    (tools / "broken").touch()
    with pytest.raises(PlatformError, match=r"(?s)buildah could not build .*exit status 3.*no space left"):
        keep(given, Shop(tools))


def test_without_a_tool_it_says_so_before_anything_is_built(
    given: dict[str, Any], tools: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PATH", str(tools.parent))
    for check in (True, False):
        with pytest.raises(PlatformError, match="images_tool is auto: buildah, podman, docker: none"):
            keep(given | {"tool": "auto"}, Shop(tools), check)


@pytest.mark.parametrize(
    ("role", "variables", "refused"),
    [
        ("gateway", {"gateway_enabled": True, "gateway_image": ""}, "gateway_image"),
        ("gateway", {"gateway_enabled": True, "gateway_image": "a/b:1"}, ""),
        ("gateway", {"gateway_enabled": False, "gateway_image": ""}, ""),
        ("rayservice", {"images_ray_packages": ["peft"]}, "images_ray_packages"),
        ("rayservice", {"images_ray_packages": ["peft"], "images_ray_made": True}, ""),
        ("rayservice", {}, ""),
    ],
)
def test_a_run_without_the_images_is_refused_where_one_is_missing(
    role: str, variables: dict[str, Any], refused: str
) -> None:
    """Tags may leave the role out that makes them."""
    *_, task = yaml.safe_load((PROJECT / "roles" / role / "tasks/check.yml").read_text(encoding="utf-8"))
    of_task = {name: trust_as_template(text) for name, text in task.get("vars", {}).items()}
    templar = Templar(DataLoader(), variables={**variables, **of_task})
    wanted = templar.evaluate_conditional(trust_as_template(task.get("when", "true")))
    met = templar.evaluate_conditional(trust_as_template(task["ansible.builtin.assert"]["that"]))
    assert (wanted and not met) is bool(refused)
    assert refused in templar.template(trust_as_template(task["ansible.builtin.assert"]["fail_msg"]))
