"""The gateway on the real platform: keys, roles, limits and weights by playbook, with a real model behind it."""

from __future__ import annotations

import base64
import json
import re
import stat
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from .conftest import ENDPOINT, HOME, NAMESPACE, Run, Runner, api_key

MODEL = "smollm2-135m-instruct"
KEY = re.compile(r"rp-[a-z0-9]{12}-[A-Za-z0-9_-]{43}")
# What a person waits for: the playbooks themselves wait until every pod knows.
SOON = 15.0
Kubectl = Callable[..., str]


def client(key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=ENDPOINT, api_key=key, max_retries=0, timeout=120)


def ask(key: str, **more: object) -> str:
    """One deterministic answer."""
    answer = client(key).chat.completions.create(  # type: ignore[call-overload]
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        **{"max_tokens": 32, **more},
    )
    return str(answer.choices[0].message.content)


def refused(key: str) -> bool:
    try:
        client(key).models.list()
    except openai.AuthenticationError:
        return True
    return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(name="keys")
def _keys(deployed: Path, run: Runner) -> Callable[..., Run]:
    """Run playbooks/keys.yml."""

    def _run(action: str, identity: str = "", *arguments: str) -> Run:
        words = ["-e", f"keys_action={action}", "-e", f"keys_id={identity}"]
        return run("ansible-playbook", "playbooks/keys.yml", "-i", "inventories/local", *words, *arguments)

    return _run


@pytest.fixture(name="traffic")
def _traffic(deployed: Path, run: Runner) -> Callable[..., Run]:
    """Run playbooks/traffic.yml."""

    def _run(values: dict[str, object], *arguments: str) -> Run:
        words = ["playbooks/traffic.yml", "-i", "inventories/local", "-e", json.dumps(values)]
        return run("ansible-playbook", *words, *arguments)

    return _run


def test_the_key_of_deploy_is_for_its_owner_alone(deployed: Path) -> None:
    file = HOME / "state/gateway-key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert KEY.fullmatch(api_key())
    assert api_key() not in (HOME / "state/gateway-keys.json").read_text()


def test_a_client_with_the_key_is_answered(deployed: Path) -> None:
    assert "Paris" in ask(api_key())
    assert [model.id for model in client(api_key()).models.list()] == [MODEL]
    chunks = list(
        client(api_key()).chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_without_a_key_nobody_is(deployed: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{ENDPOINT}/models", timeout=30)
    assert caught.value.code == 401
    error = json.load(caught.value)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert refused("rp-aaaaaaaaaaaa-" + "A" * 43) and refused("none")


def test_ray_serve_and_the_admin_api_are_on_no_port_of_this_machine(deployed: Path, kubectl: Kubectl) -> None:
    services = json.loads(kubectl("get", "services", "-n", NAMESPACE, "-o", "json"))["items"]
    ports = {
        service["metadata"]["name"]: [port["nodePort"] for port in service["spec"]["ports"] if port.get("nodePort")]
        for service in services
    }
    assert {name: found for name, found in ports.items() if found} == {"gateway": [30080]}


def test_issue_revoke_restore(keys: Callable[..., Run]) -> None:
    issued = keys("issue", "team-a", "-e", "keys_role=basic", "-e", "keys_tenant=search").expect_success()
    (key,) = KEY.findall(issued.output)
    assert "Paris" in ask(key)
    again = keys("issue", "team-a", "-e", "keys_role=basic", "-e", "keys_tenant=search").expect_success()
    assert again.changed == 0 and KEY.search(again.output) is None
    listed = keys("list").expect_success()
    assert re.search(r"team-a +[a-z0-9]{12} +basic +search +team-a +- +good", listed.output)
    assert KEY.search(listed.output) is None and "rayplane-operator" not in listed.output

    planned = keys("revoke", "team-a", "--check").expect_success()
    assert planned.changed > 0 and not refused(key)
    keys("revoke", "team-a").expect_success()
    assert within(SOON, lambda: refused(key))
    assert re.search(r"team-a .* revoked", keys("list").expect_success().output)
    assert keys("revoke", "team-a").expect_success().changed == 0

    keys("restore", "team-a").expect_success()
    assert within(SOON, lambda: not refused(key))
    keys("remove", "team-a").expect_success()
    assert within(SOON, lambda: refused(key))
    failed = keys("revoke", "team-a")
    assert failed.returncode != 0 and "there is no key team-a" in failed.output


def test_a_rotated_key_and_its_successor_are_good_for_a_while(keys: Callable[..., Run], tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    issued = keys("issue", "team-b", "-e", f"keys_output={old}").expect_success()
    assert KEY.search(issued.output) is None and stat.S_IMODE(old.stat().st_mode) == 0o600
    keys("rotate", "team-b", "-e", "keys_overlap_hours=1", "-e", f"keys_output={new}").expect_success()
    assert "Paris" in ask(old.read_text().strip()) and "Paris" in ask(new.read_text().strip())
    keys("rotate", "team-b-2", "-e", "keys_overlap_hours=0", "-e", f"keys_output={new}").expect_success()
    listed = keys("list").expect_success().output
    assert re.search(r"team-b-3 .* team-b ", listed)
    for name in ("team-b", "team-b-2", "team-b-3"):
        keys("remove", name).expect_success()


def test_a_role_is_held_to_what_it_may(keys: Callable[..., Run], tmp_path: Path) -> None:
    out = tmp_path / "key"
    limits = {"keys_settings": {"limits": {"requests": {"limit": 2, "per": "hour"}}}}
    keys("issue", "few", "-e", f"keys_output={out}", "-e", json.dumps(limits)).expect_success()
    key = out.read_text().strip()
    assert "Paris" in ask(key) and "Paris" in ask(key)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(key)
    assert int(caught.value.response.headers["retry-after"]) > 60
    keys("remove", "few").expect_success()


def test_a_changed_policy_replaces_no_pod(deployed: Path, make: Runner, kubectl: Kubectl) -> None:
    def pods() -> list[str]:
        return kubectl("get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=gateway", "-o", "name").split()

    before = pods()
    aliases = json.dumps({"gateway_routes": {MODEL: {"aliases": ["default"]}}})
    changed = make("deploy", f"--tags gateway -e '{aliases}'").expect_success()
    assert [name for name in changed.changed_tasks() if name.startswith("gateway")] == [
        "gateway : Apply the gateway and its store"
    ]
    answer = client(api_key()).chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert answer.choices
    make("deploy", "--tags gateway").expect_success()
    assert pods() == before
    assert make("deploy", "--tags gateway").expect_success().changed == 0
    with pytest.raises(openai.NotFoundError):
        client(api_key()).chat.completions.create(model="default", messages=[{"role": "user", "content": "Hello"}])


def test_a_policy_with_mistakes_is_refused_beforehand(deployed: Path, make: Runner) -> None:
    wrong = json.dumps({"gateway_routes": {MODEL: {"retrys": 3}}})
    run = make("deploy", f"--tags gateway -e '{wrong}'")
    assert run.returncode != 0
    assert "Did you mean `retries`?" in run.output and "Nothing has been changed" in run.output


def test_traffic_is_shifted_and_taken_back(traffic: Callable[..., Run]) -> None:
    assert re.search(rf"{MODEL} +{MODEL} +100", traffic({}).expect_success().output)
    half = {"traffic_action": "set", "traffic_model": MODEL, "traffic_weights": {MODEL: 50}}
    assert traffic(half, "--check").expect_success().changed == 1
    assert traffic(half).expect_success().changed == 1
    assert traffic(half).expect_success().changed == 0
    assert re.search(rf"{MODEL} +50 +\(declared: 100\)", traffic({}).expect_success().output)
    assert "Paris" in ask(api_key())
    assert traffic({"traffic_action": "reset", "traffic_model": MODEL}).expect_success().changed == 1
    wrong = traffic({**half, "traffic_weights": {"absent": 1}})
    assert wrong.returncode != 0 and "no backend of" in wrong.output
    wrong = traffic({**half, "traffic_weights": {}, "traffic_canary": 5})
    assert wrong.returncode != 0 and "has no canary" in wrong.output


def test_the_audit_log_verifies(deployed: Path, run: Runner, kubectl: Kubectl, tmp_path: Path) -> None:
    pod = kubectl("get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=gateway", "-o", "name").split()[0]
    # A head is signed every ten seconds; what came after it cannot be judged yet.
    time.sleep(12)
    archive = kubectl("exec", "-n", NAMESPACE, pod, "--", "tar", "-cf-", "-C", "/var/lib/rayplane/audit", ".")
    (tmp_path / "audit.tar").write_text(archive)
    secret = kubectl(
        "get", "secret", "gateway-audit", "-n", NAMESPACE, "-o", 'go-template={{index .data "public.pem"}}'
    )
    (tmp_path / "public.pem").write_bytes(base64.b64decode(secret))
    with tarfile.open(tmp_path / "audit.tar") as tar:
        tar.extractall(tmp_path / "audit", filter="data")
    verified = run("rayplane-audit", "verify", str(tmp_path / "audit"), "--public-key", str(tmp_path / "public.pem"))
    verified.expect_success()
    records = "".join(path.read_text() for path in (tmp_path / "audit").glob("*.jsonl"))
    assert "revoke" in records and KEY.search(records) is None and "capital of France" not in records


def test_rerun_and_plan_change_nothing(deployed: Path, make: Runner) -> None:
    assert make("deploy").expect_success().changed == 0
    plan = make("plan").expect_success()
    assert plan.changed_tasks() == [] and KEY.search(plan.output) is None
