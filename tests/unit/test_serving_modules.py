"""The modules kustomize_build and openai_smoke: what they make of an operator's objects and of a model's answers."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.modules.kustomize_build import CLUSTER_SCOPED, fit, source_state
from ansible_collections.rayplane.platform.plugins.modules.openai_smoke import (
    AnswerError,
    WrongAnswerError,
    ask,
    forwarded,
    key_of,
    run,
    sane,
)

Json = dict[str, Any]


def operator() -> list[Json]:
    container = {"name": "o", "image": "kuberay/operator:v1", "args": ["--feature-gates=A=true", "--verbose"]}
    return [
        {"kind": "CustomResourceDefinition", "metadata": {"name": "c"}},
        {
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "b"},
            "subjects": [
                {"kind": "ServiceAccount", "name": "o", "namespace": "default"},
                {"kind": "User", "name": "u"},
            ],
        },
        {
            "kind": "Deployment",
            "metadata": {"name": "o", "namespace": "default"},
            "spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}},
        },
    ]


def test_fit() -> None:
    wanted = {
        "image": "mirror/operator:v2",
        "replicas": 2,
        "resources": {"limits": {"cpu": "1"}},
        "feature_gates": {"B": True, "A": False},
        "node_selector": {"pool": "system"},
        "tolerations": [],
    }
    crd, binding, deployment = fit(operator(), "kuberay-system", wanted, CLUSTER_SCOPED)
    assert "namespace" not in crd["metadata"]
    assert binding["subjects"][0]["namespace"] == "kuberay-system"
    assert "namespace" not in binding["subjects"][1]
    assert deployment["metadata"]["namespace"] == "kuberay-system"
    pod = deployment["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "mirror/operator:v2"
    assert pod["containers"][0]["args"] == ["--verbose", "--feature-gates=A=false,B=true", "--enable-leader-election"]
    assert pod["nodeSelector"] == {"pool": "system"}
    assert "tolerations" not in pod


def test_further_arguments_stand_beside_the_kustomizations_own() -> None:
    *_, before = fit(operator(), "n", {}, CLUSTER_SCOPED)
    *_, after = fit(operator(), "n", {"extra_args": ["--enable-metrics", "--verbose"]}, CLUSTER_SCOPED)
    own, now = (one["spec"]["template"]["spec"]["containers"][0]["args"] for one in (before, after))
    assert "--verbose" in own and now == [*own, "--enable-metrics"]


def test_fit_without_wishes_keeps_upstream() -> None:
    deployment = fit(operator(), "default", {}, CLUSTER_SCOPED)[2]
    assert deployment == operator()[2]


def test_a_changed_neighbour_changes_the_state(tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    (tmp_path / "crd").mkdir()
    (tmp_path / "crd" / "a.yaml").write_text("a")
    before = source_state(str(tmp_path / "default"))
    (tmp_path / "crd" / "a.yaml").write_text("ab")
    assert source_state(str(tmp_path / "default")) != before
    assert source_state("https://host/x?ref=v1") == "https://host/x?ref=v1"


class Api:
    """The part of an OpenAI client that is used. ``chat`` gives the texts of successive answers."""

    def __init__(self, chat: list[str], finish: str = "stop", tokens: tuple[int, int, int] = (5, 3, 8)) -> None:
        self.texts = iter(chat)
        self.finish = finish
        self.usage = SimpleNamespace(prompt_tokens=tokens[0], completion_tokens=tokens[1], total_tokens=tokens[2])
        self.models = SimpleNamespace(list=lambda: [SimpleNamespace(id="m")])
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.answer))
        self.completions = SimpleNamespace(create=self.complete)

    def answer(self, stream: bool = False, **_: Any) -> Any:
        text = next(self.texts)
        if not stream:
            choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason=self.finish)
            return SimpleNamespace(choices=[choice], usage=self.usage)
        pieces = [SimpleNamespace(delta=SimpleNamespace(content=char), finish_reason=None) for char in text]
        last = SimpleNamespace(delta=SimpleNamespace(content=None), finish_reason=self.finish)
        return [SimpleNamespace(choices=[piece]) for piece in [*pieces, last]]

    def complete(self, **_: Any) -> Any:
        return SimpleNamespace(choices=[SimpleNamespace(text="more", finish_reason="length")], usage=self.usage)


def test_a_good_model() -> None:
    answer = ask(Api(["Paris."] * 4), {"id": "m", "expect": "paris"})
    assert answer["answer"] == "Paris."
    assert answer["stream_chunks"] == 6
    assert answer["usage"] == {"prompt": 5, "completion": 3, "total": 8}


@pytest.mark.parametrize(
    ("api", "model", "said"),
    [
        (Api(["Paris."] * 4), {"id": "other"}, "other is not listed"),
        (Api(["Paris.", "Rome."]), {"id": "m"}, "at temperature 0 differ"),
        (Api(["Rome."] * 3), {"id": "m", "expect": "Paris"}, "'Paris' is expected"),
        (Api(["Paris.", "Paris.", "Rome?", "Par"]), {"id": "m"}, "streamed answer"),
        (Api(["Paris."] * 4, finish="error"), {"id": "m"}, "finish reason"),
        (Api(["Paris."] * 4, tokens=(5, 0, 5)), {"id": "m"}, "do not add up"),
        (Api(["Paris."] * 4, tokens=(5, 3, 9)), {"id": "m"}, "do not add up"),
    ],
)
def test_bad_answers(api: Api, model: Json, said: str) -> None:
    with pytest.raises(AnswerError, match=said):
        ask(api, model)


def test_a_request_that_the_engine_refuses_is_not_asked_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(400, "no chat template")

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr("ansible_collections.rayplane.platform.plugins.modules.openai_smoke.time.sleep", lambda _: None)
    module: Any = SimpleNamespace(params={"request_timeout": 10, "models": [{"id": "m"}]})
    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(WrongAnswerError, match="no chat template"):
            run(module, f"http://127.0.0.1:{server.server_port}", "", time.monotonic() + 3600, [])
        server.shutdown()


@pytest.mark.parametrize("text", ["", "  \n", "!!! ...", "a\x00b", "caf\N{REPLACEMENT CHARACTER}"])
def test_text_that_is_not_sane(text: str) -> None:
    with pytest.raises(AnswerError):
        sane(text, "chat")


def test_sane_text() -> None:
    assert sane(" Die Hauptstadt ist Paris, 首都 \n", "chat") == "Die Hauptstadt ist Paris, 首都"


def test_the_key_is_given_or_in_a_file_or_in_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    given: Json = {"api_key": "", "api_key_file": str(file), "api_key_secret": {}}
    assert key_of(given) == ""
    file.write_text("from-file\n")
    assert key_of(given) == "from-file"
    assert key_of({**given, "api_key": "given"}) == "given"

    class Cluster:
        def __init__(self, _: Any) -> None: ...

        def get(self, _: Any, namespace: str, name: str) -> Json | None:
            return {"data": {"key": "ZnJvbS1zZWNyZXQ="}} if (namespace, name) == ("n", "s") else None

    monkeypatch.setattr("ansible_collections.rayplane.platform.plugins.modules.openai_smoke.Cluster", Cluster)
    monkeypatch.setattr(
        "ansible_collections.rayplane.platform.plugins.modules.openai_smoke.connection_from_environment", lambda: None
    )
    asked: Json = {"api_key": "", "api_key_file": None, "api_key_secret": {"namespace": "n", "name": "s"}}
    assert key_of(asked) == "from-secret"
    assert key_of({**asked, "api_key_secret": {"namespace": "n", "name": "absent"}}) == ""


def test_a_port_forward_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\nexec >&-\nsleep 0.2\necho 'services \"s\" not found' >&2\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("K8S_AUTH_HOST", "https://api:6443")
    monkeypatch.setenv("K8S_AUTH_API_KEY", "key")
    place = {"namespace": "n", "name": "s", "port": 80}
    with pytest.raises(AnswerError, match='services "s" not found'), forwarded(str(kubectl), place, tmp_path):
        pass
