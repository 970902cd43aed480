"""The gateway on the real platform: keys, roles, limits and weights by playbook, with a real model behind it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import yaml

from tests.packed import installed, playbook, run_as_awx, unpacked

from .conftest import (
    ENDPOINT,
    HOME,
    MODEL,
    NAMESPACE,
    ROOT,
    Kubectl,
    Run,
    Runner,
    api_key,
    ask,
    no_answer,
    wait_until,
)

KEY = re.compile(r"rp-[a-z0-9]{12}-[A-Za-z0-9_-]{43}")
# What a person waits for: the playbooks themselves wait until every pod knows.
SOON = 60.0


def refused(key: str) -> bool:
    try:
        openai.OpenAI(base_url=ENDPOINT, api_key=key, max_retries=0, timeout=60).models.list()
    except openai.AuthenticationError:
        return True
    except openai.RateLimitError:
        pass
    return False


def wait_until_refused(key: str, wanted: bool) -> None:
    words = "the key is refused", "the key is good"
    wait_until(words[not wanted], lambda: "" if refused(key) == wanted else words[wanted], SOON)


@pytest.fixture(name="keys")
def _keys(deployed: Path, run: Runner) -> Callable[..., Run]:
    """Run playbooks/keys.yml."""

    def _run(action: str, identity: str = "", **more: object) -> Run:
        options = ["--check"] if more.pop("check", False) else []
        values = {"keys_action": action, "keys_id": identity, **more}
        words = ["playbooks/keys.yml", "-i", "inventories/local", "-e", json.dumps(values, default=str)]
        return run("ansible-playbook", *words, *options)

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


def test_without_a_key_nobody_is_answered(deployed: Path) -> None:
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


def test_ray_dashboard_wants_the_clusters_token(deployed: Path, kubectl: Kubectl) -> None:
    status = "jsonpath={.status.activeServiceStatus.rayClusterName}"
    cluster = kubectl("get", "rayservice", "rayplane", "-n", NAMESPACE, "-o", status)
    secret = kubectl("get", "secret", cluster, "-n", NAMESPACE, "-o", "jsonpath={.data.auth_token}")
    head = kubectl("get", "pods", "-n", NAMESPACE, "-l", "ray.io/node-type=head", "-o", "name").strip()
    code = (
        "import sys, urllib.request as u;"
        "print(u.urlopen(u.Request('http://127.0.0.1:8265/api/jobs/', headers={'Authorization': sys.argv[1]})).status)"
    )

    def asked(token: str) -> str:
        return kubectl("exec", "-n", NAMESPACE, head, "-c", "ray-head", "--", "python3", "-c", code, f"Bearer {token}")

    assert asked(base64.b64decode(secret).decode()).strip() == "200"
    with pytest.raises(AssertionError, match="403"):
        asked("another")


def test_a_keys_life(keys: Callable[..., Run], tmp_path: Path) -> None:
    """Issued, held to its limit, listed, revoked, restored, rotated, removed."""
    settings = {"limits": {"requests": {"limit": 2, "per": "hour"}}}
    asked = {"keys_role": "basic", "keys_tenant": "search", "keys_settings": settings}
    issued = keys("issue", "team-a", **asked).expect_success()
    (key,) = KEY.findall(issued.output)
    assert "Paris" in ask(key) and "Paris" in ask(key)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(key)
    assert int(caught.value.response.headers["retry-after"]) > 60
    again = keys("issue", "team-a", **asked).expect_success()
    assert again.changed == 0 and KEY.search(again.output) is None

    planned = keys("revoke", "team-a", check=True).expect_success()
    assert planned.changed > 0 and not refused(key)
    keys("revoke", "team-a").expect_success()
    wait_until_refused(key, True)
    listed = keys("list").expect_success()
    assert re.search(r"team-a +[a-z0-9]{12} +basic +search +team-a .* revoked", listed.output)
    assert KEY.search(listed.output) is None and "rayplane-operator" not in listed.output
    keys("restore", "team-a").expect_success()
    wait_until_refused(key, False)

    file = tmp_path / "key"
    rotated = keys("rotate", "team-a", keys_overlap_hours=1, keys_output=file).expect_success()
    assert KEY.search(rotated.output) is None and stat.S_IMODE(file.stat().st_mode) == 0o600
    successor = file.read_text().strip()
    assert not refused(key) and not refused(successor)
    for name, gone in (("team-a", key), ("team-a-2", successor)):
        keys("remove", name).expect_success()
        wait_until_refused(gone, True)
    failed = keys("revoke", "team-a")
    assert failed.returncode != 0 and "there is no key team-a" in failed.output


def test_a_changed_policy_replaces_no_pod(deployed: Path, make: Runner, kubectl: Kubectl) -> None:
    def pods() -> list[str]:
        return kubectl("get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=gateway", "-o", "name").split()

    before = pods()
    aliases = json.dumps({"gateway_routes": {MODEL: {"aliases": ["default"]}}})
    changed = make("deploy", f"--tags gateway -e '{aliases}'").expect_success()
    assert [name for name in changed.changed_tasks() if name.startswith("gateway")] == [
        "gateway : Apply the gateway and its store"
    ]
    assert ask(model="default")
    make("deploy", "--tags gateway").expect_success()
    assert pods() == before
    with pytest.raises(openai.NotFoundError):
        ask(model="default")


def test_a_policy_with_mistakes_is_refused_beforehand(deployed: Path, make: Runner) -> None:
    wrong = json.dumps({"gateway_routes": {MODEL: {"retrys": 3}}})
    run = make("deploy", f"--tags gateway -e '{wrong}'")
    assert run.returncode != 0
    assert "Did you mean `retries`?" in run.output and "Nothing has been changed" in run.output


def test_traffic_is_shifted_and_taken_back(traffic: Callable[..., Run]) -> None:
    half = {"traffic_action": "set", "traffic_model": MODEL, "traffic_weights": {MODEL: 50}}
    planned = traffic(half, "--check").expect_success()
    assert planned.changed == 1 and re.search(rf"{MODEL} +{MODEL} +100", planned.output)
    shifted = traffic(half).expect_success()
    assert shifted.changed == 1 and re.search(rf"{MODEL} +50 +\(declared: 100\)", shifted.output)
    assert traffic(half).expect_success().changed == 0
    assert "Paris" in ask()
    back = traffic({"traffic_action": "reset", "traffic_model": MODEL}).expect_success()
    assert back.changed == 1 and re.search(rf"{MODEL} +{MODEL} +100", back.output)
    wrong = traffic({**half, "traffic_weights": {"absent": 1}})
    assert wrong.returncode != 0 and "no backend of" in wrong.output


def test_the_audit_log_verifies(deployed: Path, run: Runner, kubectl: Kubectl, tmp_path: Path) -> None:
    pod = kubectl("get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=gateway", "-o", "name").split()[0]
    secret = kubectl(
        "get", "secret", "gateway-audit", "-n", NAMESPACE, "-o", 'go-template={{index .data "public.pem"}}'
    )
    (tmp_path / "public.pem").write_bytes(base64.b64decode(secret))

    def unproven() -> str:
        """A head is signed every ten seconds; what came after it cannot be judged yet."""
        archive = kubectl("exec", "-n", NAMESPACE, pod, "--", "tar", "-cf-", "-C", "/var/lib/rayplane/audit", ".")
        (tmp_path / "audit.tar").write_text(archive)
        with tarfile.open(tmp_path / "audit.tar") as tar:
            tar.extractall(tmp_path / "audit", filter="data")
        words = ("rayplane-audit", "verify", str(tmp_path / "audit"), "--public-key", str(tmp_path / "public.pem"))
        verified = run(*words)
        return verified.output if verified.returncode else ""

    wait_until("the audit log verifies", unproven, 60, pause=2)
    records = "".join(path.read_text() for path in (tmp_path / "audit").glob("*.jsonl"))
    assert "revoke" in records and KEY.search(records) is None and "capital of France" not in records


def test_rerun_plan_and_drift_find_nothing(deployed: Path, make: Runner, tmp_path: Path) -> None:
    """After all that was repaired, killed, given out and taken back."""
    again = make("deploy").expect_success()
    assert again.changed_tasks() == [] and again.changed == 0
    plan = make("plan").expect_success()
    assert plan.changed_tasks() == [] and KEY.search(plan.output) is None
    make("drift", f"-e drift_dir={tmp_path}").expect_success()
    assert json.loads((tmp_path / "drift.json").read_text())["status"] == "clean"


def test_installed_and_in_awx_it_finds_the_same(deployed: Path, tmp_path: Path) -> None:
    """A rerun from an empty folder with the installed collection, and by ansible-runner from an archive: no change."""
    project, folder = unpacked(tmp_path), tmp_path / "empty"
    environment = installed(project, tmp_path / "collections")
    shutil.copytree(ROOT / "inventories/local", folder / "inventory")
    again = playbook(folder, environment, "rayplane.platform.deploy", "-i", "inventory")
    assert re.search(r"^local +: ok=\d+ +changed=0 .* failed=0", again, re.M), again
    assert "Paris" in again

    deployment = ("playbooks/deploy.yml", "-i", "inventories/local")
    done = run_as_awx(project, tmp_path, *deployment)
    assert (done["rc"], done["changed"]) == (0, 0), done["output"]
    assert "Paris" in done["output"] and "STAGES" in done["output"]
    report = json.dumps({"drift_report": True, "drift_dir": str(tmp_path / "drift")})
    done = run_as_awx(project, tmp_path, *deployment, "--check", "-e", report)
    assert (done["rc"], done["changed"]) == (0, 0), done["output"]
    assert json.loads((tmp_path / "drift/drift.json").read_text())["status"] == "clean"


def test_verify_asks_this_cluster_through_a_port_forward(deployed: Path, run: Runner, tmp_path: Path) -> None:
    """What kubectl would ask by itself is another cluster."""
    decoy = tmp_path / ".kube/config"
    decoy.parent.mkdir()
    other = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "other",
        "clusters": [{"name": "other", "cluster": {"server": "https://127.0.0.1:9"}}],
        "users": [{"name": "other", "user": {"token": "t"}}],
        "contexts": [{"name": "other", "context": {"cluster": "other", "user": "other"}}],
    }
    decoy.write_text(json.dumps(other))
    env = {"HOME": str(tmp_path), "RAYPLANE_HOME": str(HOME), "KUBECONFIG": str(decoy)}
    values = {"verify_base_url": "", "verify_timeout_s": 120}
    words = ["playbooks/verify.yml", "-i", "inventories/local", "-e", json.dumps(values)]
    assert "Paris" in run("ansible-playbook", *words, env=env).expect_success().output


def test_a_model_that_cannot_start_ends_the_run_and_a_rerun_tries_again(
    deployed: Path, make: Runner, kubectl: Kubectl, tmp_path: Path
) -> None:
    """The same configuration starts once the cause has passed; the last run brings back what the inventory declares."""
    models = yaml.safe_load((ROOT / "inventories/local/group_vars/all/ray.yml").read_text())["rayservice_models"]
    models[0]["engine"]["tokenizer"] = "/tmp/late-tokenizer"
    words = ("deploy", f"-e '{json.dumps({'rayservice_models': models})}'")
    failed = make(*words)
    said = " ".join(failed.output.split())
    assert failed.returncode != 0
    assert (
        "cannot become ready: RayService rayplane/rayplane: application smollm2-135m-instruct is DEPLOY_FAILED" in said
    )
    assert "/tmp/late-tokenizer" in said
    for file in (HOME / "models" / models[0]["id"]).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    for pod in kubectl("get", "pods", "-n", NAMESPACE, "-l", "ray.io/cluster", "-o", "name").split():
        kubectl("cp", str(tmp_path), f"{NAMESPACE}/{pod.removeprefix('pod/')}:/tmp/late-tokenizer")
    assert make(*words).expect_success().changed_tasks() == ["rayservice : Apply the RayService"]
    make("deploy").expect_success()
    assert no_answer() == ""
