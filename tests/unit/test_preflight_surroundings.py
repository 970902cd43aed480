"""The controller and the outside: versions, packages, commands, AWS credentials, kubeconfigs, API servers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import environment, live
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from botocore.exceptions import ClientError
from conftest import PROJECT

# --- versions --------------------------------------------------------------------------------------------------------

METADATA = {
    "requires-python": ">=3.11,<3.14",
    "dependencies": ["ansible-core>=2.19.5,<2.20", "ansible==12.3.0", "boto3>=1.42,<2"],
}


@pytest.mark.parametrize(
    ("version", "fits"), [("3.11.0", True), ("3.13.9", True), ("3.10.9", False), ("3.14.0", False)]
)
def test_python_window(version: str, fits: bool) -> None:
    found = list(environment.check_python(METADATA, version))
    assert (not found) == fits
    for problem in found:
        assert ">=3.11,<3.14" in problem.reason


@pytest.mark.parametrize(
    ("core", "fits"), [("2.19.5", True), ("2.19.14", True), ("2.20.0", False), ("2.18.9", False), (None, False)]
)
def test_ansible_window(core: str | None, fits: bool) -> None:
    versions = {"ansible-core": core, "boto3": "1.42.7"}
    found = list(environment.check_packages(METADATA, versions.get))
    assert [problem.variable for problem in found] == ([] if fits else ["ansible-core"])


def test_this_environment_is_inside_the_windows() -> None:
    metadata = environment.project_metadata(PROJECT)
    assert metadata["requires-python"]
    assert list(environment.check_python(metadata)) == []
    assert list(environment.check_packages(metadata)) == []


def test_no_project_file_means_no_window(tmp_path: Path) -> None:
    assert environment.project_metadata(tmp_path) == {}
    assert list(environment.check_python({})) == []


def test_collections() -> None:
    wanted = {"amazon.aws": ">=10.1.2,<11", "a.b": ">=1,<2", "e.f": ">=1"}
    versions = {"amazon.aws": "11.3.0", "a.b": "1.5.0"}
    found = {problem.variable: problem for problem in environment.check_collections(wanted, versions.get)}
    assert set(found) == {"amazon.aws", "e.f"}
    assert "10.1.2" in found["amazon.aws"].reason
    assert "not installed" in found["e.f"].reason


def test_the_environment_has_the_collections_that_the_project_needs() -> None:
    wanted = environment.collection_dependencies(PROJECT)
    assert list(environment.check_collections(wanted, environment.collection_version)) == []


def test_installed_collections_are_found() -> None:
    assert environment.collection_version("kubernetes.core")
    assert environment.collection_version("no.such") is None


def test_tools() -> None:
    found = list(environment.check_tools({"git": "for this", "kubectl": "it applies"}, {"git": "/bin/git"}.get))
    assert [(problem.variable, problem.cure) for problem in found] == [
        ("kubectl", "install kubectl on the machine that runs Ansible")
    ]


# --- AWS -------------------------------------------------------------------------------------------------------------

IDENTITY = """<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult><Arn>a</Arn>
<UserId>u</UserId><Account>1</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"""
REFUSED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>{code}</Code>
<Message>{code} said STS</Message></Error></ErrorResponse>"""
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@contextlib.contextmanager
def answering(status: int, body: str, content_type: str) -> Iterator[str]:
    """A server that gives one answer to everything; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine the tests run on: neither its credentials nor its cloud's."""
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "aws").write_text("[profile team-a]\nregion = us-west-2\n", encoding="utf-8")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


def test_good_credentials() -> None:
    with answering(200, IDENTITY, "text/xml") as endpoint:
        assert list(live.check_aws(KEYS, "", "us-west-2", endpoint)) == []


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        ("InvalidClientTokenId", "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", "log in again"),
        ("AccessDenied", "policies"),
        ("Odd", "the clock"),
    ],
)
def test_refused_credentials(code: str, cure: str) -> None:
    with answering(403, REFUSED.format(code=code), "text/xml") as endpoint:
        (problem,) = live.check_aws(KEYS, "", "us-west-2", endpoint)
    assert "refused at http" in problem.reason
    assert code in problem.reason
    assert cure in problem.cure


def test_no_credentials() -> None:
    (problem,) = live.check_aws({}, "", "us-west-2", "http://127.0.0.1:9")
    assert problem.variable == "AWS credentials"
    assert "AWS_PROFILE" in problem.cure


def test_unknown_profile_names_the_nearest() -> None:
    (problem,) = live.check_aws({}, "team-b", "us-west-2", "")
    assert (problem.variable, problem.value, problem.cure) == ("platform_aws_profile", "team-b", "did you mean team-a?")
    (problem,) = live.check_aws({}, "zzz", "us-west-2", "")
    assert "known profiles: team-a" in problem.cure


def test_a_profile_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "team-b")
    (problem,) = live.check_aws(KEYS, "", "us-west-2", "http://127.0.0.1:9")
    assert (problem.variable, problem.value) == ("platform_aws_profile", "team-b")


def test_an_endpoint_where_nothing_listens() -> None:
    (problem,) = live.check_aws(KEYS, "", "us-west-2", "http://127.0.0.1:9")
    assert problem.variable == "platform_aws_endpoint_url"
    assert "does not answer" in problem.reason


def test_an_endpoint_that_is_none() -> None:
    (problem,) = live.check_aws(KEYS, "", "us-west-2", "nonsense")
    assert "nonsense" in problem.reason


def test_unknown_region() -> None:
    with answering(200, IDENTITY, "text/xml") as endpoint:
        (problem,) = live.check_aws(KEYS, "", "us-wset-2", endpoint)
    assert (problem.variable, problem.cure) == ("platform_region", "did you mean us-west-2?")


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ({"rayplane.io/cluster": "one", "rayplane.io/region": "eu-west-1"}, "eu-west-1"),
        ({"rayplane.io/cluster": "one", "rayplane.io/region": "us-west-2"}, ""),
        ({"rayplane.io/cluster": "one"}, ""),
        ({"rayplane.io/cluster": "other", "rayplane.io/region": "eu-west-1"}, ""),
        (None, ""),
    ],
)
def test_a_cluster_that_stands_in_another_region(tags: dict[str, str] | None, found: str) -> None:
    class Iam:
        def get_role(self, **given: str) -> dict[str, Any]:
            assert given == {"RoleName": "one-control-plane"}
            if tags is None:
                raise ClientError({"Error": {"Code": "NoSuchEntity"}}, "GetRole")
            return {"Role": {"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}}

    problems = list(live._elsewhere(Iam(), "us-west-2", "one"))
    assert [problem.variable for problem in problems] == (["platform_region"] if found else [])
    assert all(f"set platform_region to {found}" in problem.cure for problem in problems)


# --- kubeconfig ------------------------------------------------------------------------------------------------------


def kubeconfig(folder: Path, server: str = "http://127.0.0.1:9", **changes: Any) -> str:
    """Path of a written kubeconfig, sound but for the changes."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "one",
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        **changes,
    }
    file = folder / "config"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


def test_sound_kubeconfig(tmp_path: Path) -> None:
    assert list(live.check_kubeconfig(kubeconfig(tmp_path), "", required=True)) == []
    assert list(live.check_kubeconfig(f"{tmp_path}/absent:{kubeconfig(tmp_path)}", "one", required=True)) == []


def test_absent_kubeconfig(tmp_path: Path) -> None:
    path = str(tmp_path / "absent")
    assert list(live.check_kubeconfig(path, "", required=False)) == []
    (problem,) = live.check_kubeconfig(path, "", required=True)
    assert (problem.value, problem.reason) == (path, "there is no such file")
    (problem,) = live.check_kubeconfig("", "", required=True)
    assert problem.reason == "no kubeconfig is named"


def broken(folder: Path, content: bytes) -> Problem:
    file = folder / "config"
    file.write_bytes(content)
    (problem,) = live.check_kubeconfig(str(file), "", required=False)
    return problem


def test_unreadable_kubeconfig(tmp_path: Path) -> None:
    assert "no YAML (line 2)" in broken(tmp_path, b"a: 1\nb: [").reason
    assert "it is no text" in broken(tmp_path, b"\xff\xfe\x00").reason
    assert "no `kind: Config`" in broken(tmp_path, b"- a\n").reason
    (problem,) = live.check_kubeconfig(str(tmp_path), "", required=True)
    assert "Is a directory" in problem.reason


@pytest.mark.parametrize(
    ("changes", "context", "reason", "cure"),
    [
        ({"current-context": ""}, "", "no current context", "one of its contexts: one"),
        ({}, "onee", "no context of this name", "did you mean one?"),
        ({"contexts": []}, "", "no context of this name", "its contexts are: none"),
        ({"clusters": []}, "", "names the cluster 'c'", "add the cluster"),
        ({"users": None}, "", "names the user 'u'", "add the user"),
    ],
)
def test_contexts(tmp_path: Path, changes: dict[str, Any], context: str, reason: str, cure: str) -> None:
    (problem,) = live.check_kubeconfig(kubeconfig(tmp_path, **changes), context, required=True)
    assert reason in problem.reason
    assert cure in problem.cure


# --- the API server --------------------------------------------------------------------------------------------------


def test_a_cluster_that_answers(tmp_path: Path) -> None:
    versions = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    with answering(200, json.dumps(versions), "application/json") as server:
        assert list(live.check_cluster(kubeconfig(tmp_path, server), "")) == []


@pytest.mark.parametrize(("status", "reason"), [(401, "refuses the kubeconfig's user (401"), (503, "answers 503")])
def test_a_cluster_that_refuses(tmp_path: Path, status: int, reason: str) -> None:
    with answering(status, "{}", "application/json") as server:
        (problem,) = live.check_cluster(kubeconfig(tmp_path, server), "")
    assert reason in problem.reason


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = live.check_cluster(kubeconfig(tmp_path), "")
    assert "no API server answers at http://127.0.0.1:9" in problem.reason
    assert "0x" not in problem.reason


def test_a_kubeconfig_the_client_cannot_use(tmp_path: Path) -> None:
    users = [{"name": "u", "user": {"client-certificate": str(tmp_path / "absent"), "client-key": "absent"}}]
    (problem,) = live.check_cluster(kubeconfig(tmp_path, "https://127.0.0.1:9", users=users), "")
    assert "cannot use it" in problem.reason


# --- folders of models -----------------------------------------------------------------------------------------------


def test_model_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name, weights in (("full", "model.safetensors"), ("old", "pytorch_model.bin")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        (tmp_path / name / weights).touch()
    names = ("absent", "empty", "full", "old")
    models = [*({"source": str(tmp_path / name)} for name in names), {"source": "organisation/model"}, "odd"]
    found = list(live.check_model_folders({"rayservice_models": models, "models_ignore": ["*.bin"]}))
    assert [(problem.variable, problem.reason.split(",")[0]) for problem in found] == [
        ("rayservice_models[0].source", "there is no such folder on the machine that runs Ansible"),
        ("rayservice_models[1].source", "the folder holds no config.json"),
        ("rayservice_models[3].source", "it holds no weights in safetensors (it has *.bin)"),
    ]
    assert "take *.bin out of models_ignore" in found[2].cure
    assert list(live.check_model_folders({"rayservice_models": models[2:4], "models_ignore": []})) == []
    assert list(live.check_model_folders({})) == []
