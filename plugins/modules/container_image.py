#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: an image in a registry, built from files where the registry does not have it yet."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_image
short_description: Keep an image in a registry, tagged by what it is made of
description:
  - The tag is a digest of all that the image is made of. Where the registry has an image of this tag, nothing is built
    and nothing pushed; check mode tells which.
  - The build sees the files that are named and nothing else of their folder, so the tag changes with all of them.
  - Builds with buildah, podman or docker, whichever is there.
  - Clusters that are deployed side by side build an image once.
options:
  repository:
    description: Repository to push to, with its registry and without a tag.
    type: str
  ecr_repository:
    description: Name of a repository of Amazon ECR, in the account and the region of the environment, in its place.
    type: str
  containerfile:
    description: The Containerfile. Its build argument C(BASE) is O(base).
    type: path
    required: true
  context:
    description: Folder of O(files).
    type: path
    required: true
  files:
    description: Files and folders of O(context) that the build sees. What Python compiled is left out.
    type: list
    elements: str
    default: []
  texts:
    description: Further files that the build sees, by their path, with their content.
    type: dict
    default: {}
  base:
    description: >-
      What the image stands on: an image, or a tar archive with a root file system (an absolute path, where C(*) may
      stand for a part that is not known), which needs no registry.
    type: str
    required: true
  platform:
    description: Operating system and architecture of the nodes.
    type: str
    default: linux/amd64
  edition:
    description: Part of the tag; another one builds anew from the same files.
    type: str
    default: ""
  tool:
    description: What builds; V(auto) takes the first of them that is there.
    type: str
    choices: [auto, buildah, podman, docker]
    default: auto
  username:
    description: User at the registry; empty takes what the tool's own C(login) has stored.
    type: str
    default: ""
  password:
    description: The user's password or token.
    type: str
    default: ""
  pip_index_url:
    description: >-
      Where pip fetches from during the build; empty takes pip's own. It may hold a password and is in no layer.
    type: str
    default: ""
  ca_file:
    description: Authorities that pip trusts during the build; empty takes pip's own.
    type: str
    default: ""
  timeout:
    description: Seconds that one command of the tool may take.
    type: int
    default: 1800
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the gateway's image
  rayplane.platform.container_image:
    repository: registry.example.com/team/gateway
    containerfile: serve_app/Containerfile
    context: .
    files: [serve_app, tools/gateway/requirements.txt]
    base: docker.io/library/python:3.11-slim-bookworm
"""

RETURN = r"""
image:
  description: The image by its digest; in check mode, where it would be built, by its tag.
  returned: always
  type: str
tag:
  description: The tag, made of the digest of what the image is made of.
  returned: always
  type: str
actions:
  description: What was (in check mode would be) done.
  returned: always
  type: list
  elements: str
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError, run_with
from ansible_collections.rayplane.platform.plugins.module_utils.images.registry import (
    Credentials,
    RegistryError,
    auth_file_text,
    digest_of,
    parse,
    stored_credentials,
)

TOOLS = ("buildah", "podman", "docker")
#: Length of the tag: 64 bits are enough to tell the images of one repository apart.
TAG_LENGTH = 16
# Part of every tag: another value where the way of building changes what comes out.
_RECIPE = 1
_FROM_ARCHIVE = "FROM scratch\nADD base.tar /\n"
_NO_IMAGE = ("ImageNotFoundException", "RepositoryNotFoundException")
# Lines of a failed command that are shown.
_LAST_LINES = 15


class Registry:
    """Any registry that speaks the distribution specification."""

    def __init__(self, repository: str, credentials: Credentials | None) -> None:
        self.repository = repository
        self._given = credentials

    def digest(self, tag: str) -> str | None:
        """Return the digest of a tag, None where there is no such image. Raises PlatformError."""
        try:
            found: str | None = digest_of(f"{self.repository}:{tag}", self._given or stored_credentials(self.host))
        except RegistryError as error:
            refused = error.status in (401, 403)
            cure = (
                f"log in (podman login {self.host}, or docker login), or give images_registry_username and"
                " images_registry_password"
                if refused
                else "correct images_registry, or start the registry, and check HTTPS_PROXY and NO_PROXY"
            )
            raise PlatformError(f"{self.repository}: {error}. Cure: {cure}") from error
        return found

    @property
    def host(self) -> str:
        """The registry's address."""
        return str(parse(self.repository).registry)

    def credentials(self) -> Credentials | None:
        """Return what to push with; None leaves it to the tool, which reads its own files."""
        return self._given


class Ecr(Registry):
    """Amazon's registry of one account and region, asked through its API; ecr_repositories keeps its repositories."""

    def __init__(self, name: str, api: Api) -> None:
        answer = api.read("get_authorization_token", "these credentials' registry")["authorizationData"][0]
        user, _, password = base64.b64decode(answer["authorizationToken"]).decode().partition(":")
        super().__init__(f"{answer['proxyEndpoint'].partition('://')[2]}/{name}", Credentials(user, password))
        self._name, self._api = name, api

    def digest(self, tag: str) -> str | None:
        """Return the digest of a tag, None where there is no such image."""
        answer = self._api.read(
            "describe_images",
            f"image {self._name}:{tag}",
            absent=_NO_IMAGE,
            repositoryName=self._name,
            imageIds=[{"imageTag": tag}],
        )
        details = (answer or {}).get("imageDetails") or []
        return str(details[0]["imageDigest"]) if details else None


def inputs_of(context: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the files of a context by their path in it. Raises PlatformError for a name that is not there."""
    found: dict[str, Path] = {}
    for name in names:
        path = context / name
        if not path.exists():
            raise PlatformError(f"there is no {path}, of which the image is made")
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        found |= {str(one.relative_to(context)): one for one in files if "__pycache__" not in one.parts}
    return found


def tag_of(given: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """Return the tag of an image: a digest of all that it is made of."""
    digest = hashlib.sha256()

    def add(name: str, content: bytes, kind: str = "") -> None:
        digest.update(f"{name}\0{kind}\0{len(content)}\0".encode() + content)

    add("recipe", json.dumps([_RECIPE, given["platform"], given["edition"]]).encode())
    base = given["base"]
    add("base", (_archive_key(archive_of(base)) if is_archive(base) else _name_of(base)).encode())
    add("containerfile", Path(given["containerfile"]).read_bytes())
    for name, path in sorted(files.items()):
        add(name, path.read_bytes(), "x" if path.stat().st_mode & 0o100 else "")
    for name, text in sorted(given["texts"].items()):
        add(name, str(text).encode())
    return digest.hexdigest()[:TAG_LENGTH]


def is_archive(base: str) -> bool:
    """Whether a base is a root file system and no image's name."""
    return base.startswith("/")


def _name_of(base: str) -> str:
    try:
        return str(parse(base).name)
    except ValueError as error:
        raise PlatformError(f"images_base is {base!r}: {error}") from error


def archive_of(base: str) -> Path:
    """Return the one file that a base names. Raises PlatformError where there is none, or more than one."""
    found = sorted(Path("/").glob(base.lstrip("/")))
    if len(found) != 1 or not found[0].is_file():
        raise PlatformError(f"images_base is {base}, which names {len(found)} files: name an image, or one tar archive")
    return found[0]


def _archive_key(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:TAG_LENGTH]


class Builder:
    """One of the tools, which take the same arguments for what is done here."""

    def __init__(self, tool: str, timeout: float) -> None:
        self.tool = self._find(tool)
        self._timeout = timeout

    @staticmethod
    def _find(tool: str) -> str:
        wanted = TOOLS if tool == "auto" else (tool,)
        for name in wanted:
            if shutil.which(name):
                return name
        raise PlatformError(
            f"images_tool is {tool}: {', '.join(wanted)}: none on the PATH. Cure: install buildah, podman or docker on"
            " the machine that runs Ansible, or run playbooks/images.yml where there is one and write what it prints"
            " into the inventory"
        )

    def has(self, image: str) -> bool:
        """Whether the tool's own storage has an image."""
        return self._run(["inspect", "--type", "image", image]).returncode == 0

    def build(self, image: str, folder: Path, platform: str, base: str = "", secrets: Mapping[str, Path] = {}) -> None:
        """Build an image of a folder with a Containerfile."""
        command = ["build", "--platform", platform, "--tag", image, "--file", str(folder / "Containerfile")]
        for name, path in secrets.items():
            command += ["--secret", f"id={name},src={path}"]
        if base:
            command += ["--build-arg", f"BASE={base}"]
        cure = "Where a base cannot be pulled, log in at its registry, or name a mirror's in images_base"
        self._must([*command, str(folder / "context")], f"build {image}", cure=cure)

    def push(self, image: str, target: str, credentials: Credentials | None, folder: Path) -> None:
        """Push an image under another name."""
        reference = parse(target)
        if self.tool == "docker":
            if credentials:
                login = ["login", "--username", credentials.username, "--password-stdin", reference.registry]
                self._must(login, f"log in at {reference.registry}", stdin=credentials.password)
            self._must(["tag", image, target], f"tag {target}")
            self._must(["push", target], f"push {target}")
            return
        options = []
        if credentials:
            file = folder / "auth.json"
            file.write_text(auth_file_text(reference.registry, credentials), encoding="utf-8")
            options += ["--authfile", str(file)]
        if reference.loopback:
            # As docker does by itself: who listens on this machine needs no certificate.
            options.append("--tls-verify=false")
        self._must(["push", *options, image, f"docker://{target}"], f"push {target}")

    def _must(self, words: Sequence[str], what: str, stdin: str = "", cure: str = "") -> None:
        done = self._run(words, stdin)
        if done.returncode != 0:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            told = [f"{self.tool} could not {what} (exit status {done.returncode}):", *lines[-_LAST_LINES:], cure]
            raise PlatformError("\n".join(told).rstrip())

    def _run(self, words: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self.tool, *words],
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=self._timeout,
                env={"DOCKER_BUILDKIT": "1", **os.environ},
            )
        except subprocess.TimeoutExpired as error:
            raise PlatformError(
                f"{self.tool} {words[0]} did not end within {self._timeout:g} s (images_timeout_s)"
            ) from error


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold a lock of this machine and user while an image is built: the next finds it made."""
    with (Path(tempfile.gettempdir()) / f"rayplane-{os.getuid()}-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(given: Mapping[str, Any], files: Mapping[str, Path], builder: Builder, image: str) -> None:
    """Build an image, on a folder of its own that holds what it is made of and nothing else."""
    with tempfile.TemporaryDirectory(prefix="rayplane-image-") as name:
        folder = Path(name)
        context = folder / "context"
        context.mkdir()
        if not is_archive(given["base"]):
            base = _name_of(given["base"])
        else:
            archive = archive_of(given["base"])
            base = f"localhost/rayplane/base:{_archive_key(archive)}"
            if not builder.has(base):
                (folder / "Containerfile").write_text(_FROM_ARCHIVE, encoding="utf-8")
                _link(archive, context / "base.tar")
                builder.build(base, folder, given["platform"])
                (context / "base.tar").unlink()
        shutil.copyfile(given["containerfile"], folder / "Containerfile")
        for path, file in files.items():
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, context / path)
        for path, text in given["texts"].items():
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            (context / path).write_text(str(text), encoding="utf-8")
        builder.build(image, folder, given["platform"], base, _secrets(given, folder))


def _link(source: Path, target: Path) -> None:
    """Put a large file into a context, without a copy where both are on one file system."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _secrets(given: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Return the files that RUN steps see below /run/secrets: pip's settings, and the authorities it trusts."""
    secrets: dict[str, Path] = {}
    settings = {"index-url": given["pip_index_url"]} if given["pip_index_url"] else {}
    if given["ca_file"]:
        secrets["ca.crt"] = Path(given["ca_file"])
        settings["cert"] = "/run/secrets/ca.crt"
    if settings:
        file = folder / "pip.conf"
        file.write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items()), ""]))
        secrets["pip.conf"] = file
    return secrets


def keep(given: Mapping[str, Any], registry: Registry, changes: Changes) -> dict[str, Any]:
    """Bring the image into the registry and return its name by its digest."""
    files = inputs_of(Path(given["context"]), given["files"])
    tag = tag_of(given, files)
    target = f"{registry.repository}:{tag}"
    digest = registry.digest(tag)
    if digest is None:
        changes.create(f"image {target}", {"base": given["base"], "platform": given["platform"]})
        builder = Builder(given["tool"], given["timeout"])
        if changes.check_mode:
            return {"image": target, "tag": tag}
        with alone(tag):
            local = f"localhost/rayplane/{registry.repository.rpartition('/')[2]}:{tag}"
            if not builder.has(local):
                make(given, files, builder, local)
            with tempfile.TemporaryDirectory(prefix="rayplane-push-") as folder:
                builder.push(local, target, registry.credentials(), Path(folder))
        digest = registry.digest(tag)
        if digest is None:
            raise PlatformError(f"{target} was pushed, and the registry does not know it: see its log, then run again")
    return {"image": f"{registry.repository}@{digest}", "tag": tag}


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    given = module.params
    if given["ecr_repository"]:
        import boto3  # noqa: PLC0415 - half a second, and only for images on AWS
        from botocore.config import Config  # noqa: PLC0415

        registry: Registry = Ecr(
            given["ecr_repository"], Api(boto3.client("ecr", config=Config(**given["aws_config"])), changes)
        )
    else:
        login = Credentials(given["username"], given["password"]) if given["username"] else None
        registry = Registry(given["repository"], login)
    return keep(given, registry, changes)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION, secret=("password", "pip_index_url")),
        required_one_of=[("repository", "ecr_repository")],
        mutually_exclusive=[("repository", "ecr_repository")],
        supports_check_mode=True,
    )
    run_with(module, reconcile)


if __name__ == "__main__":
    main()
