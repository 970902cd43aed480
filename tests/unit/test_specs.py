"""Every role: defaults and specs agree, names carry the prefix, READMEs are up to date; all YAML parses."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spec_docs
import yaml
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.specs import check_options
from conftest import PROJECT

ROLES = sorted(path.name for path in (PROJECT / "roles").iterdir() if path.is_dir())
PLAYBOOKS = sorted(path.name for path in (PROJECT / "playbooks").glob("*.yml"))
INVENTORIES = sorted(path.name for path in (PROJECT / "inventories").iterdir() if path.is_dir())
LONGEST_TABLE_OF_CONTENTS = 8
#: Folders of YAML that are ours.
YAML_FOLDERS = (
    ".config",
    "collections",
    "inventories",
    "molecule",
    "playbooks",
    "roles",
    "tests",
    "tools",
)


def load(*parts: str) -> Any:
    """A YAML file of the project; empty where there is none."""
    file = PROJECT.joinpath(*parts)
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.is_file() else {}


def options_of(role: str) -> dict[str, Any]:
    """Options of the role's first entry point."""
    options: dict[str, Any] = entry_point(role).get("options") or {}
    return options


def entry_point(role: str) -> dict[str, Any]:
    """The role's first entry point: `main`, but for the role that has variables alone."""
    entry: dict[str, Any] = next(iter(load("roles", role, "meta", "argument_specs.yml")["argument_specs"].values()))
    return entry


def run_ansible(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs in the project, with the settings of its ansible.cfg."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    return subprocess.run(
        command,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
    )


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_specs_agree(role: str) -> None:
    defaults, options = load("roles", role, "defaults", "main.yml"), options_of(role)
    assert set(defaults) == {name for name, option in options.items() if not option.get("required")}
    # A default stands in defaults/main.yml, and there alone.
    assert [name for name, option in options.items() if "default" in option] == []


@pytest.mark.parametrize("role", ROLES)
def test_variables_carry_the_roles_name(role: str) -> None:
    internals = load("roles", role, "vars", "main.yml")
    assert [name for name in options_of(role) if not name.startswith(f"{role}_") and name != "platform"] == []
    assert [name for name in internals if not name.startswith(f"__{role}_")] == []


@pytest.mark.parametrize("role", ROLES)
def test_every_option_is_described(role: str) -> None:
    def check(options: dict[str, Any], path: str) -> None:
        for name, option in options.items():
            assert option.get("description"), f"{path}{name} has no description"
            assert option.get("type"), f"{path}{name} has no type"
            check(option.get("options") or {}, f"{path}{name}.")

    check(options_of(role), "")
    assert entry_point(role)["short_description"]


# The role platform has variables alone.
@pytest.mark.parametrize("role", [role for role in ROLES if role != "platform"])
def test_tasks_main_is_a_table_of_contents(role: str) -> None:
    tasks = load("roles", role, "tasks", "main.yml")
    assert tasks, f"roles/{role}/tasks/main.yml is missing"
    assert len(tasks) <= LONGEST_TABLE_OF_CONTENTS


@pytest.mark.parametrize("role", ROLES)
def test_roles_depend_on_no_role(role: str) -> None:
    assert not load("roles", role, "meta", "main.yml").get("dependencies")


@pytest.mark.parametrize("role", ROLES)
def test_facts_for_other_roles_are_known_to_preflight(role: str) -> None:
    """A fact with a role's prefix would otherwise be reported as a misspelt variable in a later play."""
    from ansible_collections.rayplane.platform.plugins.action.rayplane_preflight import FACTS

    facts: set[str] = set()

    def collect(tasks: Any) -> None:
        for task in tasks or ():
            facts.update(name for name in task.get("ansible.builtin.set_fact") or {} if name != "cacheable")
            for section in ("block", "rescue", "always"):
                collect(task.get(section))

    for file in sorted((PROJECT / "roles" / role / "tasks").rglob("*.yml")):
        collect(yaml.safe_load(file.read_text(encoding="utf-8")))
    known = set(FACTS) | set(options_of(role))
    assert [name for name in sorted(facts) if name.startswith(f"{role}_") and name not in known] == []


# --- READMEs ---------------------------------------------------------------------------------------------------------


def test_readmes_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert spec_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_tables_hold_nested_options_and_choices() -> None:
    options = {
        "x_list": {
            "type": "list",
            "elements": "dict",
            "required": True,
            "description": ["A list | of things.", "More."],
            "options": {"kind": {"choices": ["a", "b"], "default": "a"}},
        },
        "x_empty": {"type": "str", "description": "Empty."},
        "x_none": {"type": "int", "description": "Nothing."},
    }
    assert spec_docs.table(options, {"x_empty": "", "x_none": None}).splitlines()[2:] == [
        "| `x_list` | list of dict | required | A list \\| of things. More. |",
        "| `x_list[].kind` | str | `a` | One of `a`, `b`. |",
        '| `x_empty` | str | `""` | Empty. |',
        "| `x_none` | int |  | Nothing. |",
    ]


def test_only_the_marked_section_is_touched(tmp_path: Path) -> None:
    role = tmp_path / "roles" / "demo"
    (role / "meta").mkdir(parents=True)
    spec = {"argument_specs": {"main": {"short_description": "Shows", "description": ["One."], "options": {}}}}
    (role / "meta" / "argument_specs.yml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    arguments = ["--project", str(tmp_path)]
    readme = role / "README.md"
    assert spec_docs.main([*arguments, "--check"]) == 1
    assert spec_docs.main([*arguments, "another"]) == 0
    assert not readme.exists()
    assert spec_docs.main(arguments) == 0
    begun = readme.read_text(encoding="utf-8")
    assert begun.startswith("# demo\n\nShows.\n\n- One.\n\n## Variables\n")
    readme.write_text(
        begun.replace("- One.", "By hand.").replace("| Variable", "| Stale") + "\nAfter.\n", encoding="utf-8"
    )
    assert spec_docs.main([*arguments, "--check"]) == 1
    assert spec_docs.main(arguments) == 0
    assert readme.read_text(encoding="utf-8") == begun.replace("- One.", "By hand.") + "\nAfter.\n"
    assert spec_docs.main([*arguments, "--check"]) == 0


# --- playbooks and inventories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        (
            "autoscaler_node_classes",
            [{"name": "a", "amiFamily": "AL2023"}],
            {"[0].amiFamily": "did you mean ami_family?"},
        ),
        ("autoscaler_node_pools", ["cpu"], {"[0]": "write {key: value} without quotes"}),
        (
            "autoscaler_node_pools",
            [{"instance_family": ["g5"]}],
            {"[0].instance_family": "did you mean instance_families?", "[0].name": "set it"},
        ),
        (
            "autoscaler_node_pools",
            [{"name": "a", "accelerator": "amd", "capacity_types": ["SPOT"], "weight": "5"}],
            {
                "[0].accelerator": "nvidia, neuron",
                "[0].capacity_types": "on-demand, spot",
                "[0].weight": "write 5 without",
            },
        ),
        (
            "autoscaler_node_pools",
            [{"name": "a", "disruption": {"consolidationPolicy": "x", "consolidation_policy": "x"}}],
            {
                "[0].disruption.consolidationPolicy": "consolidation_policy",
                "[0].disruption.consolidation_policy": "WhenEmpty",
            },
        ),
        (
            "autoscaler_node_pools",
            [{"name": "a", "startup_taints": [{"key": "a", "effect": "no"}]}],
            {"[0].startup_taints[0].effect": "NoSchedule"},
        ),
        ("eks_addons", [{"name": "vpc-cni", "versoin": "v1"}], {"[0].versoin": "did you mean version?"}),
        ("eks_extra_roles", [{"name": "a", "managed_policy": []}], {"[0].managed_policy": "managed_policies"}),
        ("eks_pod_identities", [{"namespace": "a", "service_account": "b"}], {"[0].role_arn": "set it"}),
        (
            "eks_irsa",
            [{"namespace": "a", "serviceaccount": "b"}],
            {"[0].serviceaccount": "service_account", "[0].service_account": "set it"},
        ),
        ("gateway_audit_volume", {"size": "5Gi", "access_mode": "RWX"}, {".access_mode": "ReadWriteMany"}),
        ("gateway_redis_volume", {"storage": "5Gi"}, {".storage": "known keys are access_mode, class, size"}),
        ("gateway_replicas", {"minimum": 2}, {".minimum": "did you mean min?"}),
        ("gateway_redis_resources", {"limts": {"cpu": 1}}, {".limts": "did you mean limits?"}),
        (
            "gpu_plugin_dcgm_metrics",
            [{"name": "DCGM_FI_X", "type": "number", "help": ""}],
            {"[0].type": "counter, gauge"},
        ),
        ("gpu_plugin_device_list_strategies", ["cdi"], {"": "envvar, volume-mounts"}),
        ("kuberay_tolerations", [{"key": "a", "effect": "NoScedule"}], {"[0].effect": "did you mean NoSchedule?"}),
        ("rayservice_cpu_group", {"cpu": 2}, {".memory": "set it"}),
        (
            "rayservice_head",
            {"cpu": 1, "memory": "4Gi", "tolerations": [{"operator": "exists"}]},
            {".tolerations[0].operator": "Exists"},
        ),
        (
            "rayservice_ingress",
            {"min": 1, "max": 2, "target_ongoing_requests": 8, "max_ongoing_requests": 16},
            {".cpu": "set"},
        ),
        (
            "rayservice_models",
            [{"id": "a", "source": "b/c", "access": "basic"}],
            {"[0].access": '["basic"] without quotes'},
        ),
        (
            "rayservice_worker_groups",
            [{"name": "a", "cpu": 1, "memory": "1Gi", "max_replicas": 3, "ray_resources": {"x": 1}}],
            {"[0].max_replicas": "did you mean replicas?"},
        ),
        ("secrets_extra", [{"name": "a", "stringData": {}}], {"[0].stringData": "", "[0].data": "set it"}),
        (
            "storage_buckets",
            [{"name": "a", "lifecycle": [{"name": "b", "expire": 3}]}],
            {"[0].lifecycle[0].expire": "did you mean expire_days?"},
        ),
    ],
)
def test_what_a_structure_does_not_hold_is_found(variable: str, value: Any, found: dict[str, str]) -> None:
    role = max((role for role in ROLES if variable.startswith(f"{role}_")), key=len)
    problems = list(check_options({variable: value}, {variable: options_of(role)[variable]}))
    assert {problem.variable.removeprefix(variable) for problem in problems} == found.keys()
    for problem in problems:
        assert found[problem.variable.removeprefix(variable)] in problem.cure, problem


def yaml_files() -> list[Path]:
    found = [path for folder in YAML_FOLDERS for path in (PROJECT / folder).rglob("*.yml")]
    found += PROJECT.glob("inventories/*/hosts")
    return sorted(path for path in found if "tools/go" not in str(path))


def test_every_yaml_file_parses() -> None:
    class Loader(yaml.SafeLoader):
        """Knows Ansible's own tags, and refuses a key given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key) for key, _ in node.value if not key.tag.endswith(":merge")]
            assert len(keys) == len(set(keys)), f"a key twice {node.start_mark}"
            return super().construct_mapping(node, deep)

    for tag in ("!vault", "!unsafe"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_scalar(node))
    for file in yaml_files():
        yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)


def test_playbooks_parse() -> None:
    playbooks = [f"playbooks/{name}" for name in PLAYBOOKS]
    result = run_ansible("ansible-playbook", "--syntax-check", "-i", "inventories/local", *playbooks)
    assert result.returncode == 0, result.stdout + result.stderr


@functools.cache
def inventory(name: str) -> dict[str, Any]:
    result = run_ansible("ansible-inventory", "-i", f"inventories/{name}", "--list")
    assert result.returncode == 0, result.stderr
    listed: dict[str, Any] = json.loads(result.stdout)
    return listed


def test_the_fleet_takes_each_environment_from_its_own_inventory() -> None:
    fleet = inventory("fleet")["_meta"]["hostvars"]
    alone = [inventory(name)["_meta"]["hostvars"] for name in ("dev", "staging", "prod")]
    assert fleet == {host: variables for one in alone for host, variables in one.items()}


@pytest.mark.parametrize(
    ("environments", "message"),
    [
        ("[one, absent]", "environments names absent, and there is no "),
        ("[one, two]", "one and two both have a host same; rename one of them"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(tmp_path: Path, environments: str, message: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts").write_text("clusters: {hosts: {same: {}}}\n", encoding="utf-8")
    file = tmp_path / "environments.yml"
    file.write_text(f"plugin: rayplane.platform.environments\nenvironments: {environments}\n", encoding="utf-8")
    result = run_ansible("ansible-inventory", "-i", str(file), "--list")
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


def test_nothing_is_a_link() -> None:
    """An archive may lose links, as AWX's projects of that kind do."""
    tracked = subprocess.run(["git", "ls-files", "-s"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    # Molecule runs in a checkout only.
    links = [line.split("\t")[1] for line in tracked.splitlines() if line.startswith("120000")]
    assert [path for path in links if not path.startswith("molecule/")] == []


@pytest.mark.parametrize("name", INVENTORIES)
def test_inventories_load_and_every_cluster_states_its_platform(name: str) -> None:
    listed = inventory(name)
    clusters = listed["clusters"]["hosts"]
    assert clusters
    for host in clusters:
        assert listed["_meta"]["hostvars"][host]["platform"] in ("aws", "gcp", "azure", "existing")
        assert listed["_meta"]["hostvars"][host]["ansible_connection"] == "local"


# The fleet's clusters are those of the other environments: the same variables, as another test shows.
@pytest.mark.parametrize("name", ["existing", "fleet", "local"])
def test_preflight_finds_nothing_wrong_in_our_own_inventories(name: str) -> None:
    result = run_ansible(
        "ansible-playbook",
        "-i",
        f"inventories/{name}",
        "playbooks/validate.yml",
        "-e",
        # inventories/existing cannot know where its nodes pull from.
        '{"preflight_scope": "declared", "images_registry": "127.0.0.1:5000/rayplane"}'
        if name == "local"
        else '{"preflight_scope": "declared", "images_registry": "registry.of.ours/rayplane"}',
    )
    assert result.returncode == 0, result.stdout + result.stderr
