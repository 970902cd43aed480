"""Drift: every difference by name and property, no secret, no guess, nothing changed, and the right exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.drift import (
    HIDDEN,
    Gap,
    Report,
    Row,
    differences,
    entries,
    is_secret,
    reason_of,
    rows_of,
    without_secrets,
)
from conftest import PROJECT

AWS = {
    "changed": True,
    "actions": [
        "update bucket m: versioning: Suspended -> Enabled",
        "create add-on metrics-server",
        "delete subnet s",
        "update kubeconfig /k: content",
    ],
    "diff": [
        {
            "before_header": "bucket m",
            "after_header": "bucket m",
            "before": {"versioning": "Suspended"},
            "after": {"versioning": "Enabled"},
        },
        {
            "before_header": "add-on metrics-server",
            "after_header": "add-on metrics-server",
            "before": {},
            "after": {"v": 1},
        },
        {"before_header": "subnet s", "after_header": "subnet s", "before": {"id": "s"}, "after": {}},
    ],
}

DEPLOYMENT = """\
kind: Deployment
spec:
  replicas: {replicas}
  template:
    spec:
      containers:
      - name: side
        image: s:1
      - name: ray
        env:
        - name: HF_TOKEN
          value: {token}
        image: {image}
"""


def kubernetes(before: str, after: str, header: str = "Deployment rayplane/x") -> dict[str, Any]:
    diff = {
        "before_header": f"{header} (live)",
        "after_header": f"{header} (declared)",
        "before": before,
        "after": after,
    }
    return {"changed": True, "diff": [diff]}


def test_properties_and_whole_resources_of_aws_modules() -> None:
    assert list(entries(AWS, "task")) == [
        ("bucket m", "versioning", "update", "Suspended", "Enabled"),
        ("add-on metrics-server", "", "create", None, {"v": 1}),
        ("subnet s", "", "delete", {"id": "s"}, None),
        # Named as an action only.
        ("kubeconfig /k", "content", "update", None, None),
    ]


def test_kubernetes_objects_are_compared_by_property_and_entry() -> None:
    before = DEPLOYMENT.format(replicas=1, image="r:1", token="t-1")
    after = DEPLOYMENT.format(replicas=2, image="r:2", token="t-1")
    assert list(entries(kubernetes(before, after), "task")) == [
        ("Deployment rayplane/x", "spec.replicas", "update", 1, 2),
        ("Deployment rayplane/x", "spec.template.spec.containers[ray].image", "update", "r:1", "r:2"),
    ]


def test_yaml_inside_of_a_property_is_compared_too() -> None:
    serve = {"spec": {"serveConfigV2": "applications:\n- name: a\n  args: {n: 1}\n"}}
    other = {"spec": {"serveConfigV2": "applications:\n- name: a\n  args: {n: 2}\n"}}
    assert list(differences(serve, other)) == [("spec.serveConfigV2.applications[a].args.n", 1, 2)]


def test_lists_without_names_are_compared_as_a_whole() -> None:
    assert list(differences({"z": ["a"]}, {"z": ["a", "b"]})) == [("z", ["a"], ["a", "b"])]
    assert list(differences({"z": [{"name": 1}, {"name": 1}]}, {"z": []})) == [("z", [{"name": 1}, {"name": 1}], [])]


def test_a_change_without_any_detail_bears_the_task() -> None:
    assert list(entries({"changed": True}, "Do it")) == [("Do it", "", "change", None, None)]
    assert next(entries({"changed": True, "actions": ["start etcd"]}, "Do it"))[0] == "start etcd"


def test_what_others_added_is_drift_that_nobody_would_change() -> None:
    report = Report()
    added = {"resource": "route table private", "property": "route 10.9.0.0/16", "value": "tgw-1"}
    registered = {"__network_result": {"changed": False, "foreign": [added]}}
    report.add("one", "network", rows_of("one", "network", registered))
    # A stage that looks the network up does not compare it.
    assert rows_of("one", "eks", registered) == []
    (row,) = report.rows
    assert (row.action, row.change(60)) == ("foreign", "tgw-1 -> not declared, left alone")
    assert report.exit_code == 2


def test_only_changed_items_of_a_loop_count() -> None:
    result = {"results": [{"changed": False, "diff": AWS["diff"]}, {"changed": True, "actions": ["create a"]}]}
    assert [entry[0] for entry in entries(result, "task")] == ["a"]


@pytest.mark.parametrize(
    "path",
    ["spec.containers[ray].env[AWS_SECRET_ACCESS_KEY].value", "data.token", "tag api_key", "db.password", "HF_TOKEN"],
)
def test_paths_of_secrets(path: str) -> None:
    assert is_secret(path.replace("tag ", "tag."))


@pytest.mark.parametrize(
    "path",
    ["spec.secretName", "encryption_key", "max_tokens", "kms_key_arn", "serviceAccountToken.path", "key", "tokenizer"],
)
def test_paths_of_no_secrets(path: str) -> None:
    assert not is_secret(path)


def test_secrets_are_hidden() -> None:
    report = Report()
    before = DEPLOYMENT.format(replicas=1, image="r", token="t-old")
    after = DEPLOYMENT.format(replicas=1, image="r", token="t-new")
    registered = {"__rayservice_a": kubernetes(before, after), "__rayservice_b": kubernetes("", after)}
    report.add("c", "rayservice", rows_of("c", "rayservice", registered))
    text = report.as_json("now") + report.as_markdown("now") + "\n".join(report.table(200))
    assert "t-old" not in text and "t-new" not in text
    assert [(row.property, row.action) for row in report.rows] == [
        ("spec.template.spec.containers[ray].env[HF_TOKEN].value", "update"),
        ("", "create"),
    ]
    assert without_secrets({"password": "p", "name": "n"}) == {"password": HIDDEN, "name": "n"}


def test_a_result_counts_once_and_for_the_stage_that_made_it() -> None:
    made = {"changed": True, "actions": ["create a"]}
    registered = {"__images_result": made, "__images_gateway_result": made, "__images_failed": {**made, "failed": True}}
    rows = rows_of("c", "images", registered)
    assert rows == [Row("c", "images", "a", "", "create", None, None)]
    # What a stage has another role do is its own.
    registered["__network_flow_logs_result"] = {"changed": True, "actions": ["create b"]}
    assert [row.resource for row in rows_of("c", "storage", registered, rows)] == ["b"]


def test_status_and_exit_code() -> None:
    report = Report()
    assert (report.status, report.exit_code) == ("incomplete", 1)
    report.add("a", "account", [])
    assert (report.status, report.exit_code) == ("incomplete", 1)
    report.add("a", "network", [])
    assert (report.status, report.exit_code) == ("clean", 0)
    report.add("a", "network", rows_of("a", "network", {"__network_result": AWS}))
    assert (report.status, report.exit_code) == ("drift", 2)
    report.add("b", "eks", [], Gap("b", "eks", "task", "AccessDenied"))
    assert (report.status, report.exit_code) == ("incomplete", 1)
    content = json.loads(report.as_json("now"))
    assert content["clusters"]["a"]["stages"] == {"network": "drift"}
    assert content["clusters"]["b"] == {
        "stages": {"eks": "not compared"},
        "drift": [],
        "not_compared": [{"cluster": "b", "stage": "eks", "task": "task", "reason": "AccessDenied"}],
    }
    assert content["clusters"]["a"]["drift"][0] == {
        "cluster": "a",
        "stage": "network",
        "resource": "bucket m",
        "property": "versioning",
        "action": "update",
        "is": "Suspended",
        "declared": "Enabled",
    }


def test_markdown_survives_pipes_and_lines() -> None:
    report = Report()
    changed = kubernetes("x: 'a | b'\n", "x: |\n  c\n  d\n", "ConfigMap a/b")
    report.add("a", "network", rows_of("a", "network", {"__network_result": changed}))
    assert "| network | ConfigMap a/b | x | a \\| b -> c d |" in report.as_markdown("now")


def test_reasons() -> None:
    assert reason_of({"msg": "denied"}) == "denied"
    assert reason_of(
        {"msg": "One or more items failed", "results": [{"failed": True, "msg": "no"}, {"msg": "ok"}]}
    ) == ("One or more items failed: no")
    assert reason_of({}) == "no reason given"


# The stages


def _plays(name: str = "deploy.yml") -> Iterator[dict[str, Any]]:
    """The plays of a playbook, and of those that it imports."""
    for play in yaml.safe_load((PROJECT / "playbooks" / name).read_text(encoding="utf-8")):
        if imported := play.get("ansible.builtin.import_playbook"):
            yield from _plays(imported)
        else:
            yield play


def _stages() -> Iterator[tuple[str, str, set[str]]]:
    """Role, entry file and tags of every stage of a deployment."""
    for play in _plays():
        for task in play.get("tasks", []):
            if task.get("ansible.builtin.import_tasks") == "tasks/stage.yml":
                part = task["vars"].get("stage_part", "main")
                tags = {*task.get("tags", []), *play.get("tags", [])}
                yield task["vars"]["stage_role"], part, tags


# Verify asks the models, and has nothing to compare.
def test_every_role_of_a_deployment_is_a_stage() -> None:
    """Another would neither be compared, nor keep a failure to itself."""
    roles = {role if isinstance(role, str) else role["role"] for play in _plays() for role in play.get("roles", [])}
    assert roles == {"platform", "preflight", "verify"}


def _tasks(entries: Any) -> Iterator[dict[str, Any]]:
    for task in entries or ():
        yield task
        for section in ("block", "rescue", "always"):
            yield from _tasks(task.get(section))


def test_no_result_of_a_stage_is_lost() -> None:
    """The report tells of what is registered; what is hidden from the screen hides its secrets by itself, too."""
    silent = ("k8s_api_probe", "k8s_kept_secrets", "show_once", "rayplane_preflight", "gateway_admin", "openai_smoke")
    ends = ("destroy", "down", "keys", "traffic", "remove_nodes")
    unheard, secret = [], set()
    for role in {role for role, _, _ in _stages()}:
        for file in sorted((PROJECT / "roles" / role / "tasks").glob("*.yml")):
            for task in _tasks(yaml.safe_load(file.read_text(encoding="utf-8"))):
                module = next((key.rpartition(".")[2] for key in task if key.startswith("rayplane.platform.")), "")
                if not module or file.stem.startswith(ends):
                    continue
                if task.get("no_log"):
                    secret.add(module)
                register = task.get("register", "")
                if module not in silent and task.get("changed_when") is not False and not register.startswith("__"):
                    unheard.append(f"{role}/{file.name}: {task['name']}")
    assert unheard == []
    assert secret <= {"k8s_apply_set", "k8s_kept_secrets", "show_once"}


def test_what_encrypts_with_the_clusters_key_has_it_looked_up() -> None:
    """A role run alone by its tag would otherwise see no key, and take it from what it keeps."""
    key_tags = set(yaml.safe_load((PROJECT / "roles/encryption/vars/main.yml").read_text())["__encryption_tags"])
    lacking = {}
    for role, part, tags in _stages():
        # What builds images only pushes them: it encrypts nothing.
        if (role, part) == ("images", "main"):
            continue
        files = [
            path for kind in ("tasks", "vars", "defaults") for path in (PROJECT / "roles" / role / kind).rglob("*.yml")
        ]
        if any("platform_kms_key_arn" in path.read_text(encoding="utf-8") for path in files):
            lacking |= {(role, part): tags - key_tags - {"always"}}
    assert lacking.keys() >= {("network", "main"), ("storage_class", "main"), ("autoscaler", "main")}
    assert {stage: tags for stage, tags in lacking.items() if tags} == {}


def test_no_tag_leaves_out_what_all_stages_look_up() -> None:
    """A role or play with further tags would be left out by `--skip-tags` with any of them."""
    tags = {role: tags for role, _, tags in _stages() if role in ("account", "encryption")}
    assert tags == {"account": {"always"}, "encryption": {"always"}}


def test_every_tag_that_chooses_the_images_has_them_made() -> None:
    """The role looks at the tags itself, so that one stage's tag builds no image of another."""
    (tags,) = [tags for role, part, tags in _stages() if (role, part) == ("images", "main")]
    tasks = yaml.safe_load((PROJECT / "roles/images/tasks/main.yml").read_text(encoding="utf-8"))
    for name, own in (("gateway.yml", "gateway"), ("ray.yml", "rayservice")):
        (task,) = [one for one in tasks if one["ansible.builtin.include_tasks"] == name]
        made = {word for condition in task["when"] for word in re.findall(r"'(\w+)'", condition)}
        assert made == {"all", "tagged", *tags} - {"gateway", "rayservice"} | {own}


# The real playbook, over roles that need no cloud

HOSTS = """
clusters:
  vars: {ansible_connection: local, ansible_python_interpreter: "{{ ansible_playbook_python }}",
         platform: existing, platform_module_environment: {K8S_AUTH_HOST: "http://127.0.0.1:1", K8S_AUTH_API_KEY: key}}
  hosts: {one: {}, two: {}}
embedded: {}
"""
CLOUD_HOSTS = HOSTS.replace("platform: existing", "platform: aws")
NOTHING = "- name: Nothing\n  ansible.builtin.command: echo same\n  changed_when: false\n  check_mode: false\n"
WRITE = """
- name: Write
  ansible.builtin.copy:
    content: "wanted: {{ inventory_hostname }}"
    dest: "{{ lookup('ansible.builtin.env', 'DRIFT_TEST') }}/{{ inventory_hostname }}"
    mode: "0600"
  register: __test_written
"""
STAGES = ("preflight", "verify", *dict.fromkeys(role for role, _, _ in _stages()))


class Drift:
    """Runs the real deploy.yml over fake roles."""

    def __init__(self, folder: Path, hosts: str = CLOUD_HOSTS) -> None:
        self.folder = folder
        (folder / "hosts.yml").write_text(hosts, encoding="utf-8")
        (folder / "made").mkdir()
        for stage in STAGES:
            for part in ("main", "cloud", "monitoring"):
                self.role(stage, NOTHING, part)
        for role in ("drift", "platform"):
            (folder / "roles" / role).symlink_to(PROJECT / "roles" / role)
        self.environment = os.environ | {
            "ANSIBLE_ROLES_PATH": str(folder / "roles"),
            "DRIFT_TEST": str(folder / "made"),
            "ANSIBLE_FORCE_COLOR": "0",
        }

    def role(self, name: str, tasks: str, part: str = "main") -> None:
        path = self.folder / "roles" / name / "tasks" / f"{part}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\n{tasks}", encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        return [
            str(Path(sys.executable).parent / "ansible-playbook"),
            str(PROJECT / "playbooks/deploy.yml"),
            *("-i", str(self.folder / "hosts.yml"), "--check"),
            *("-e", json.dumps({"drift_report": True, "drift_dir": str(self.folder / "report")})),
            *arguments,
        ]

    def run(self, *arguments: str) -> tuple[int, str, dict[str, Any]]:
        run = subprocess.run(
            self.command("--tags", "network,eks", *arguments),
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        return run.returncode, run.stdout + run.stderr, self.report()

    def report(self) -> dict[str, Any]:
        path = self.folder / "report" / "drift.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return content


@pytest.fixture(name="drift")
def _drift(tmp_path: Path) -> Drift:
    return Drift(tmp_path)


def test_clean_is_zero(drift: Drift) -> None:
    code, output, report = drift.run()
    assert code == 0, output
    assert report["clusters"]["one"]["stages"] == {"encryption": "clean", "network": "clean", "eks": "clean"}
    assert "nothing differs" in output


def test_drift_is_two_and_nothing_is_changed_without_check(drift: Drift) -> None:
    # A role within a role, a file within a file: check mode has to reach all of them.
    drift.role("network", "- name: Include\n  ansible.builtin.include_role: {name: storage}\n")
    drift.role("storage", "- name: Include\n  ansible.builtin.include_tasks: write.yml\n")
    # ansible_check_mode tells of --check, as a rule.
    drift.role("storage", WRITE + '  check_mode: "{{ ansible_check_mode }}"\n', "write")
    code, output, report = drift.run()
    assert code == 2, output
    assert list((drift.folder / "made").iterdir()) == []
    # What a role includes is part of its stage.
    assert report["clusters"]["one"]["stages"]["network"] == "drift"
    (row,) = report["clusters"]["one"]["drift"]
    assert row["stage"] == "network"
    assert (drift.folder / "report" / "drift.md").exists()


def test_one_broken_cluster_and_one_broken_stage_hide_nothing_else(drift: Drift) -> None:
    fail = 'ansible.builtin.fail: {msg: "AccessDenied: ec2:DescribeVpcs"}'
    drift.role("network", f"- name: Ask\n  {fail}\n  when: inventory_hostname == 'one'\n{NOTHING}")
    drift.role("eks", WRITE)
    code, output, report = drift.run()
    assert code == 1, output
    assert report["status"] == "incomplete"
    one, two = report["clusters"]["one"], report["clusters"]["two"]
    assert one["stages"] == {"encryption": "clean", "network": "not compared", "eks": "drift"}
    assert one["not_compared"][0]["reason"] == "AccessDenied: ec2:DescribeVpcs"
    assert two["stages"] == {"encryption": "clean", "network": "clean", "eks": "drift"}
    assert "not compared: one: network, Ask: AccessDenied" in output


def test_a_cluster_that_preflight_refuses_is_not_compared(drift: Drift) -> None:
    drift.role(
        "preflight", '- name: Check\n  ansible.builtin.fail: {msg: "bad"}\n  when: inventory_hostname == "one"\n'
    )
    code, output, report = drift.run()
    assert code == 1, output
    assert report["clusters"]["one"]["not_compared"][0]["stage"] == "preflight"
    assert report["clusters"]["two"]["stages"]["network"] == "clean"


def test_failures_that_a_role_rescues_are_none(drift: Drift) -> None:
    rescued = """
- name: Try
  block:
    - name: Fail
      ansible.builtin.fail: {msg: no}
  rescue:
    - name: Manage
      ansible.builtin.command: echo
      changed_when: false
      check_mode: false
"""
    drift.role("network", rescued)
    code, output, _ = drift.run()
    assert code == 0, output
    drift.role("network", rescued + "- name: Fail\n  ansible.builtin.fail: {msg: yes}\n")
    drift.role("eks", rescued.replace("ansible.builtin.command: echo", "ansible.builtin.fail: {msg: no}"))
    code, output, report = drift.run()
    assert code == 1, output
    stages = {"encryption": "clean", "network": "not compared", "eks": "not compared"}
    assert report["clusters"]["one"]["stages"] == stages


@pytest.mark.parametrize("tags", ["kuberay,secrets", "cluster"])
def test_an_api_server_that_does_not_answer_is_said_once(drift: Drift, tags: str) -> None:
    (drift.folder / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    drift.role("kubeconfig", "- name: Ask\n  rayplane.platform.k8s_api_probe: {required: true}\n")
    code, output, report = drift.run("--limit", "one", "--tags", f"kubeconfig,{tags}")
    assert code == 1, output
    (gap,) = report["clusters"]["one"]["not_compared"]
    assert "does not answer" in gap["reason"] and "no stage in Kubernetes is compared" in gap["reason"]
    assert "secrets" not in report["clusters"]["one"]["stages"]


def test_a_run_without_any_stage_is_not_clean(drift: Drift) -> None:
    (drift.folder / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    code, output, _ = drift.run()
    assert code == 1, output
    assert "Nothing was compared" in output


def test_a_report_that_would_deploy_is_refused(drift: Drift) -> None:
    drift.role("network", WRITE)
    command = [word for word in drift.command("--tags", "network") if word != "--check"]
    run = subprocess.run(
        command, cwd=PROJECT, env=drift.environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode != 0
    assert "Nothing has been changed. Add --check" in " ".join(run.stdout.split())
    assert list((drift.folder / "made").iterdir()) == [] and drift.report() == {}


def test_nothing_of_a_run_is_left_for_the_next(drift: Drift) -> None:
    """AWX keeps facts between jobs where it is told to."""
    drift.environment |= {"ANSIBLE_CACHE_PLUGIN": "jsonfile", "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(drift.folder)}
    drift.role("network", WRITE)
    assert drift.run()[0] == 2
    drift.role("network", NOTHING)
    code, output, _ = drift.run()
    assert code == 0, output


def test_secrets_of_tasks_stay_hidden(drift: Drift) -> None:
    drift.role("network", WRITE.replace("wanted:", "s3cr3t-value") + "  no_log: true\n")
    code, output, _ = drift.run("--diff")
    text = output + (drift.folder / "report/drift.json").read_text() + (drift.folder / "report/drift.md").read_text()
    assert code == 2 and "s3cr3t-value" not in text


def test_ansible_runner_gets_report_and_code(drift: Drift) -> None:
    # ansible-runner, and with it AWX, sets its own callback path and standard output.
    drift.role("network", WRITE)
    private = drift.folder / "private"
    private.mkdir()
    program = (
        "import ansible_runner, sys\n"
        "run = ansible_runner.run(private_data_dir=sys.argv[1], project_dir=sys.argv[2], playbook=sys.argv[3],"
        " cmdline=sys.argv[4], quiet=True)\n"
        "events = [event['event'] for event in run.events]\n"
        "print(run.rc, 'playbook_on_stats' in events)\n"
    )
    _, playbook, *arguments = drift.command("--tags", "network")
    command = [sys.executable, "-c", program, str(private), str(PROJECT), playbook, shlex.join(arguments)]
    environment = drift.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.stdout.split() == ["2", "True"], run.stdout + run.stderr
    assert drift.report()["status"] == "drift"
