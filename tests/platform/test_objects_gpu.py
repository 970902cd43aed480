"""gpu_plugin on a real API server: every object is accepted, and the role applies, changes its mode, and destroys.

There is no node, so every DaemonSet wants no pod: what is shown is that the objects are valid, that a rerun
changes nothing, that nothing of another mode is left, and that the role waits for nothing there.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.filter.rayplane_gpu import gpu_plugin_objects
from rayplane_local import parts
from rayplane_local.settings import Settings

from .conftest import HOME, ROOT, Kubectl, Runner, go_module, kubectl_on

Json = dict[str, Any]

KINDS = "daemonsets,deployments,configmaps,services,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings"
OURS = "app.kubernetes.io/component=gpu-plugin"
# The newest chart that Go's module system knows (later tags break its rule of versions); another one is named by the
# environment.
CHART_MODULE = "github.com/NVIDIA/gpu-operator@v1.11.1"

PLAYBOOK = [
    {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": "gpu_plugin", "tasks_from": "{{ way }}"}}],
    }
]


def settings(**changes: Any) -> Json:
    """The role's defaults, as the role hands them to the filters."""
    defaults = yaml.safe_load((ROOT / "roles/gpu_plugin/defaults/main.yml").read_text())
    return {name.removeprefix("gpu_plugin_"): value for name, value in defaults.items()} | changes


def variants() -> Iterator[Json]:
    """Settings that together make every object and every field that the filter can make."""
    strategies = (["envvar"], ["cdi-cri", "cdi-annotations"], ["volume-mounts"])
    for mig, listed in itertools.product(("none", "single", "mixed"), strategies):
        yield settings(mig_strategy=mig, device_list_strategies=listed)
    yield settings(
        feature_discovery_enabled=True,
        neuron_enabled=True,
        pass_device_specs=True,
        runtime_class="nvidia",
        image_pull_secrets=["pull"],
        time_slicing_replicas={"nvidia.com/gpu": 4},
        extra_node_terms=[{"matchExpressions": [{"key": "pool", "operator": "In", "values": ["gpu"]}]}],
    )
    yield settings(dcgm_metrics=[])


@pytest.fixture(scope="module")
def kubectl(api: Path) -> Kubectl:
    """Call kubectl on the API server without a node."""
    return kubectl_on(api)


def test_every_object_is_accepted_by_the_api_server(kubectl: Kubectl, tmp_path: Path) -> None:
    seen = {}
    build = gpu_plugin_objects
    for item in itertools.chain.from_iterable(build(variant) for variant in variants()):
        # A dry run in a namespace asks for one that is there.
        if item["metadata"].get("namespace"):
            item["metadata"]["namespace"] = "default"
        seen[json.dumps(item, sort_keys=True)] = item
    assert {item["kind"] for item in seen.values()} == {
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
        "Namespace",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    }
    for number, item in enumerate(seen.values()):
        (tmp_path / f"{number}.json").write_text(json.dumps(item))
    said = kubectl("apply", "--server-side", "--dry-run=server", "--field-manager=rayplane", "-f", str(tmp_path))
    assert said.count("serverside-applied (server dry run)") == len(seen)


Apply = Callable[..., Any]


@pytest.fixture
def role(run: Runner, api: Path, tmp_path: Path) -> Iterator[Apply]:
    """Run the role with variables; whatever it leaves is destroyed after the test."""
    playbook, inventory = tmp_path / "play.yml", tmp_path / "hosts.yml"
    playbook.write_text(yaml.safe_dump(PLAYBOOK))
    host = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    inventory.write_text(yaml.safe_dump({"all": {"hosts": {"local": host}}}))

    def _role(way: str = "main", *options: str, **variables: Any) -> Any:
        given = {f"gpu_plugin_{key}": value for key, value in variables.items()}
        given |= {"way": way, "gpu_plugin_cache_dir": str(tmp_path / "cache")}
        command = ["ansible-playbook", str(playbook), "-i", str(inventory), "-e", json.dumps(given), *options]
        environment = {"K8S_AUTH_KUBECONFIG": str(api), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")}
        return run(*command, env=environment).expect_success()

    yield _role
    _role("destroy")


def left(kubectl: Kubectl) -> list[str]:
    """Names of the role's objects on the cluster."""
    return kubectl("get", KINDS, "-A", "-l", OURS, "-o", "name").split()


def test_the_role_applies_once_and_destroys_once(role: Apply, kubectl: Kubectl) -> None:
    wanted = {"neuron_enabled": True, "time_slicing_replicas": {"nvidia.com/gpu": 4}}
    assert role("main", "--check", "--diff", **wanted).changed == 1
    assert left(kubectl) == []
    assert role(**wanted).changed == 1
    assert role(**wanted).changed == 0
    columns = "custom-columns=NAME:.metadata.name,DESIRED:.status.desiredNumberScheduled"
    rows = kubectl("-n", "gpu-system", "get", "daemonsets", "--no-headers", "-o", columns)
    assert sorted(row.split()[0] for row in rows.splitlines()) == [
        "dcgm-exporter",
        "neuron-device-plugin",
        "nvidia-device-plugin",
    ]
    assert {row.split()[1] for row in rows.splitlines()} == {"0"}
    assert "deleted DaemonSet gpu-system/neuron-device-plugin" in role().output
    assert role("destroy").changed == 2
    assert role("destroy").changed == 0
    assert left(kubectl) == []
    assert "gpu-system" not in kubectl("get", "namespaces")


def test_what_somebody_else_installed_is_not_taken_over(run: Runner, role: Apply, kubectl: Kubectl) -> None:
    kubectl("create", "namespace", "gpu-system")
    with pytest.raises(AssertionError, match="gpu_plugin_adopt"):
        role()
    assert left(kubectl) == []
    role(adopt=True)
    assert left(kubectl)


@pytest.fixture(scope="session")
def helm() -> str:
    """The helm of this machine, built where it has not been (some two minutes)."""
    return str(parts.ensure(Settings(home=HOME), "helm"))


@pytest.fixture(scope="session")
def operator_chart(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bool]:
    """The GPU operator's chart, and whether it is of today: one named by the environment, or that of the Go module."""
    if given := os.environ.get("RAYPLANE_GPU_OPERATOR_CHART"):
        return given, True
    source, said = go_module(CHART_MODULE, tmp_path_factory.mktemp("go"))
    folder = source / "deployments/gpu-operator"
    if not (folder / "Chart.yaml").is_file():
        pytest.skip(f"no chart: name one by RAYPLANE_GPU_OPERATOR_CHART; {CHART_MODULE} cannot be fetched here: {said}")
    return str(folder), False


def test_the_operator_replaces_our_daemon_sets_and_goes_when_switched_off(
    role: Apply, kubectl: Kubectl, helm: str, operator_chart: tuple[str, bool]
) -> None:
    chart, today = operator_chart
    wanted: Json = {
        "mode": "gpu_operator",
        "helm": helm,
        "operator_chart": chart,
        "operator_repo_url": "",
        "mig_strategy": "mixed",
        "wait_timeout_s": 0,  # its image cannot be had here
    }
    if today:
        half = [{"devices": "all", "mig-enabled": True, "mig-devices": {"3g.40gb": 2}}]
        wanted |= {"mig_configs": {"half": half}, "time_slicing_replicas": {"nvidia.com/mig-3g.40gb": 2}}
    else:
        wanted |= {"dcgm_metrics": []}  # the chart of then passes a field on that its CRD does not know
    role()
    assert "deleted DaemonSet gpu-system/nvidia-device-plugin" in role(**wanted).output
    assert role(**wanted).changed == 0
    policy = json.loads(kubectl("get", "clusterpolicy", "cluster-policy", "-o", "json"))["spec"]
    assert policy["driver"]["enabled"] is False
    assert policy["toolkit"]["enabled"] is False
    assert policy["mig"]["strategy"] == "mixed"
    assert "deleted ClusterPolicy cluster-policy" in role().output
    role(enabled=False)
    assert left(kubectl) == []
    assert role(enabled=False).changed == 0
    assert kubectl("get", "customresourcedefinitions", "-l", OURS, "-o", "name") == ""
