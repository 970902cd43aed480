"""The objects of gpu_plugin: where the DaemonSets run, what they may do, what the settings become, what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter.rayplane_gpu import (
    FilterModule,
    dcgm_csv,
    gpu_namespace,
    gpu_nfd_values,
    gpu_operator_values,
    gpu_plugin_objects,
    gpu_wait_targets,
    plugin_config,
    problems,
)

Json = dict[str, Any]

PROJECT = Path(__file__).resolve().parents[2]
SHARED = {"nvidia.com/gpu": 4}


def settings(**changes: Any) -> Json:
    """The role's defaults, as the role hands them to the filters."""
    defaults = yaml.safe_load((PROJECT / "roles/gpu_plugin/defaults/main.yml").read_text())
    names = {name.removeprefix("gpu_plugin_"): value for name, value in defaults.items()}
    assert changes.keys() <= names.keys()
    return names | changes


def daemon_set(name: str, **changes: Any) -> Json:
    found = gpu_plugin_objects(settings(**changes))
    return next(item for item in found if item["kind"] == "DaemonSet" and item["metadata"]["name"] == name)


def container(name: str, **changes: Any) -> Json:
    found: Json = daemon_set(name, **changes)["spec"]["template"]["spec"]["containers"][0]
    return found


def runs_on(item: Json, **labels: str) -> bool:
    """Whether the DaemonSet's node affinity matches a node with these labels (`__` stands for `/`, `_` for `-`)."""
    given = {key.replace("__", "/").replace("_", "-"): value for key, value in labels.items()}
    affinity = item["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    checks = {
        "In": lambda term: given.get(term["key"]) in term["values"],
        "NotIn": lambda term: given.get(term["key"]) not in term["values"],
        "Exists": lambda term: term["key"] in given,
        "DoesNotExist": lambda term: term["key"] not in given,
    }
    return any(
        all(checks[expression["operator"]](expression) for expression in term["matchExpressions"])
        for term in affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    )


NVIDIA = {"rayplane.io__accelerator": "nvidia"}
NEURON = {"rayplane.io__accelerator": "neuron"}
GKE = {"cloud.google.com__gke_accelerator": "nvidia-l4"}


@pytest.mark.parametrize(
    ("labels", "plugin", "exporter"),
    [
        ({}, False, False),
        (NVIDIA, True, True),
        (NEURON, False, False),
        (NVIDIA | {"rayplane.io__device_plugin": "image"}, False, True),  # Bottlerocket
        ({"nvidia.com__gpu.present": "true"}, True, True),
        ({"nvidia.com__gpu.present": "false"}, False, False),
        ({"feature.node.kubernetes.io__pci_10de.present": "true"}, True, True),
        (NVIDIA | {"eks.amazonaws.com__compute_type": "auto"}, False, True),
        (GKE, False, True),
        (GKE | {"nvidia.com__gpu.present": "true"}, False, True),
        (GKE | {"gke_no_default_nvidia_gpu_device_plugin": "true"}, True, True),
        ({"pool": "gpu"}, False, False),
    ],
)
def test_where_the_daemon_sets_run(labels: dict[str, str], plugin: bool, exporter: bool) -> None:
    assert runs_on(daemon_set("nvidia-device-plugin"), **labels) is plugin
    assert runs_on(daemon_set("dcgm-exporter"), **labels) is exporter
    assert runs_on(daemon_set("gpu-feature-discovery", feature_discovery_enabled=True), **labels) is exporter


def test_where_the_neuron_plugin_runs() -> None:
    item = daemon_set("neuron-device-plugin", neuron_enabled=True)
    assert runs_on(item, **NEURON)
    assert not runs_on(item, **NVIDIA)
    assert not runs_on(item)
    assert item["spec"]["template"]["spec"]["tolerations"][0] == {"key": "aws.amazon.com/neuron", "operator": "Exists"}


def test_nodes_that_no_known_label_tells_can_be_named() -> None:
    term = {"matchExpressions": [{"key": "pool", "operator": "In", "values": ["gpu"]}]}
    for name in ("nvidia-device-plugin", "dcgm-exporter"):
        assert runs_on(daemon_set(name, extra_node_terms=[term]), pool="gpu")


@pytest.mark.parametrize("name", ["nvidia-device-plugin", "dcgm-exporter", "gpu-feature-discovery"])
def test_every_daemon_set_is_critical_and_tolerates_the_gpu_taint(name: str) -> None:
    item = daemon_set(name, feature_discovery_enabled=True, image_pull_secrets=["pull"], runtime_class="nvidia")
    pod = item["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == "system-node-critical"
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["enableServiceLinks"] is False
    assert pod["runtimeClassName"] == "nvidia"
    assert item["spec"]["selector"]["matchLabels"].items() <= item["spec"]["template"]["metadata"]["labels"].items()
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_plugin_may_do_as_little_as_its_settings_need() -> None:
    name = "nvidia-device-plugin"
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    needs_admin = {"capabilities": {"add": ["SYS_ADMIN"]}}
    assert container(name, mig_strategy="single")["securityContext"] == needs_admin
    assert container(name, device_list_strategies=["volume-mounts"])["securityContext"] == needs_admin
    assert container(name, pass_device_specs=True)["securityContext"] == {"privileged": True}


def test_cdi_gets_the_folders_it_writes_and_reads() -> None:
    item = daemon_set("nvidia-device-plugin", device_list_strategies=["cdi-cri"], driver_root="/opt/driver")
    paths = {
        volume["name"]: volume["hostPath"]["path"]
        for volume in item["spec"]["template"]["spec"]["volumes"]
        if "hostPath" in volume
    }
    assert paths == {
        "cdi": "/var/run/cdi",
        "device-plugins": "/var/lib/kubelet/device-plugins",
        "driver-root": "/opt/driver",
    }
    assert "driver-root" not in str(daemon_set("nvidia-device-plugin"))


def test_the_configuration_file() -> None:
    config = yaml.safe_load(plugin_config(settings()))
    assert config["version"] == "v1"
    assert config["flags"]["migStrategy"] == "none"
    assert config["flags"]["plugin"] == {
        "deviceIDStrategy": "uuid",
        "deviceListStrategy": ["envvar"],
        "passDeviceSpecs": False,
    }
    assert "sharing" not in config
    shared = yaml.safe_load(plugin_config(settings(time_slicing_replicas=SHARED, time_slicing_rename=True)))
    assert shared["sharing"]["timeSlicing"] == {
        "renameByDefault": True,
        "failRequestsGreaterThanOne": False,
        "resources": [{"name": "nvidia.com/gpu", "replicas": 4}],
    }


@pytest.mark.parametrize("name", ["nvidia-device-plugin", "gpu-feature-discovery"])
def test_a_changed_configuration_rolls_the_pods(name: str) -> None:
    plain, shared = (
        daemon_set(name, feature_discovery_enabled=True, time_slicing_replicas=replicas)["spec"]["template"]["metadata"]
        for replicas in ({}, SHARED)
    )
    assert plain["annotations"] != shared["annotations"]


def test_a_changed_list_of_metrics_rolls_the_exporter_and_no_list_leaves_the_images() -> None:
    metrics = [{"name": "DCGM_FI_DEV_GPU_TEMP", "type": "gauge", "help": "warm, or not"}]
    item = daemon_set("dcgm-exporter", dcgm_metrics=metrics)
    other = daemon_set("dcgm-exporter")
    assert item["spec"]["template"]["metadata"]["annotations"] != other["spec"]["template"]["metadata"]["annotations"]
    assert dcgm_csv(metrics) == "DCGM_FI_DEV_GPU_TEMP, gauge, warm; or not\n"
    bare = container("dcgm-exporter", dcgm_metrics=[])
    assert "args" not in bare
    assert [mount["name"] for mount in bare["volumeMounts"]] == ["pod-resources"]


def test_the_default_metrics_are_a_list_that_the_exporter_takes() -> None:
    lines = dcgm_csv(settings()["dcgm_metrics"]).splitlines()
    assert len(lines) > 15
    assert all(line.count(",") == 2 for line in lines)


def test_the_service_selects_the_exporters_pods() -> None:
    found = gpu_plugin_objects(settings(service_monitor_enabled=True, service_monitor_labels={"release": "prom"}))
    by_kind = {item["kind"]: item for item in found}
    pod = daemon_set("dcgm-exporter")["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"].items() <= pod.items()
    assert by_kind["ServiceMonitor"]["metadata"]["labels"]["release"] == "prom"
    # The ServiceMonitor selects Services: k8s_apply_set adds part-of to ours.
    labels = by_kind["Service"]["metadata"]["labels"] | {"app.kubernetes.io/part-of": "rayplane"}
    assert by_kind["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert "ServiceMonitor" not in {item["kind"] for item in gpu_plugin_objects(settings())}


def test_the_parts_are_switched_one_by_one() -> None:
    def names(**changes: Any) -> set[str]:
        return {
            item["metadata"]["name"] for item in gpu_plugin_objects(settings(**changes)) if item["kind"] == "DaemonSet"
        }

    assert names() == {"nvidia-device-plugin", "dcgm-exporter"}
    assert names(dcgm_enabled=False) == {"nvidia-device-plugin"}
    assert "gpu-feature-discovery" in names(feature_discovery_enabled=True)
    assert names(mode="gpu_operator") == set()
    assert names(mode="gpu_operator", neuron_enabled=True) == {"neuron-device-plugin"}


def test_cluster_roles_have_no_namespace_and_bindings_name_the_account() -> None:
    found = gpu_plugin_objects(settings(neuron_enabled=True, feature_discovery_enabled=True, namespace="ns"))
    for item in found:
        cluster_wide = item["kind"] in ("Namespace", "ClusterRole", "ClusterRoleBinding")
        assert item["metadata"].get("namespace") == (None if cluster_wide else "ns"), item["kind"]
        for subject in item.get("subjects", []):
            accounts = [other["metadata"]["name"] for other in found if other["kind"] == "ServiceAccount"]
            assert subject["namespace"] == "ns"
            assert subject["name"] in accounts


def test_the_namespace_lets_privileged_pods_in_and_kubernetes_own_are_left_alone() -> None:
    (namespace,) = gpu_namespace(settings())
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    assert gpu_namespace(settings(namespace="kube-system")) == []


def test_the_operator_installs_neither_driver_nor_toolkit_beside_those_of_the_image() -> None:
    values = gpu_operator_values(settings(mode="gpu_operator"))
    assert values["driver"]["enabled"] is False
    assert values["toolkit"]["enabled"] is False
    assert values["mig"] == {"strategy": "none"}
    assert values["migManager"] == {"enabled": False}
    assert values["operator"] == {"upgradeCRD": False, "cleanupCRD": False}
    assert values["dcgmExporter"]["config"]["data"].startswith("DCGM_")
    assert "repository" not in str(values)
    assert "config" not in values["devicePlugin"]


def test_the_operator_gets_time_slicing_mig_and_a_mirror() -> None:
    half = [{"devices": "all", "mig-enabled": True, "mig-devices": {"3g.40gb": 2}}]
    values = gpu_operator_values(
        settings(
            mode="gpu_operator",
            time_slicing_replicas={"nvidia.com/mig-3g.40gb": 2},
            mig_strategy="mixed",
            mig_configs={"half": half},
            image_registry="mirror/nvidia",
            image_pull_secrets=["pull"],
            runtime_class="nvidia-gpu",
            kubelet_dir="/data/kubelet",
        )
    )
    config = values["devicePlugin"]["config"]
    assert yaml.safe_load(config["data"][config["default"]])["sharing"]["timeSlicing"]["resources"] == [
        {"name": "nvidia.com/mig-3g.40gb", "replicas": 2}
    ]
    assert yaml.safe_load(values["migManager"]["config"]["data"]["config.yaml"])["mig-configs"] == {"half": half}
    assert values["migManager"]["enabled"] is True
    assert values["toolkit"]["repository"] == "mirror/nvidia/k8s"
    assert values["driver"]["manager"]["repository"] == "mirror/nvidia/cloud-native"
    assert values["devicePlugin"]["imagePullSecrets"] == ["pull"]
    assert values["operator"]["runtimeClass"] == "nvidia-gpu"
    assert values["hostPaths"] == {"kubeletRootDir": "/data/kubelet"}


def test_values_of_ones_own_are_laid_over_the_derived_ones() -> None:
    given = {"toolkit": {"enabled": True}, "cdi": {"enabled": False}}
    values = gpu_operator_values(settings(mode="gpu_operator", operator_values=given))
    assert values["toolkit"] == {"enabled": True}
    assert values["cdi"] == {"enabled": False}
    assert values["driver"]["enabled"] is False
    nfd = gpu_nfd_values(settings(nfd_values={"worker": {"hostNetwork": True}}))
    assert nfd["worker"]["hostNetwork"] is True
    assert nfd["worker"]["tolerations"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_slicing_replicas": {"nvidia.com/gpu": 1}}, "2 replicas or more"),
        ({"time_slicing_replicas": {"nvidia.com/gpu": True}}, "2 replicas or more"),
        ({"time_slicing_replicas": {"nvidia.com/gpu": "4"}}, "2 replicas or more"),
        ({"time_slicing_replicas": {"amd.com/gpu": 2}}, "nothing else"),
        ({"time_slicing_replicas": {"nvidia.com/mig-1g.10gb": 2}}, "mig_strategy mixed"),
        ({"time_slicing_rename": True}, "shares none"),
        ({"mig_configs": {"x": []}, "mig_strategy": "single"}, "Set gpu_plugin_mode to gpu_operator"),
        ({"mig_configs": {"x": []}, "mode": "gpu_operator"}, "would vanish"),
        ({"device_list_strategies": []}, "name one or more, such as envvar"),
        ({"device_list_strategies": ["cdi-cri"], "mode": "gpu_operator"}, "chooses the strategy itself"),
        ({"operator_driver_enabled": True}, "nobody installs a driver"),
        ({"operator_toolkit_enabled": True}, "nobody installs a container toolkit"),
        ({"dcgm_metrics": [{"name": "GPU_TEMP", "type": "gauge", "help": ""}]}, "DCGM_"),
        ({"dcgm_metrics": [{"name": "DCGM_FI_X", "type": "gauge", "help": ""}] * 2}, "DCGM_FI_X twice"),
    ],
)
def test_what_cannot_be_is_refused_with_variable_and_cure(changes: Json, said: str) -> None:
    for build in (gpu_plugin_objects, gpu_operator_values):
        with pytest.raises(AnsibleFilterError, match=said) as caught:
            build(settings(**changes))
        assert "gpu_plugin_" + next(iter(changes)) in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    found = problems(settings(time_slicing_replicas={"amd.com/gpu": 1}, operator_driver_enabled=True))
    assert len(found) == 3


def test_what_the_modes_allow() -> None:
    for mode, mig in itertools.product(("device_plugin", "gpu_operator"), ("none", "single", "mixed")):
        assert problems(settings(mode=mode, mig_strategy=mig, time_slicing_replicas=SHARED)) == []
    assert problems(settings(mode="gpu_operator", operator_driver_enabled=True, operator_toolkit_enabled=True)) == []
    assert problems(settings(mode="gpu_operator", mig_strategy="mixed", mig_configs={"x": []})) == []


def test_what_is_waited_for() -> None:
    built = {"deployments": ["gpu-operator"], "daemonsets": ["nfd"], "skipped": False}
    targets = gpu_wait_targets(gpu_plugin_objects(settings()), [built], "ns")
    assert [(target["kind"], target["name"]) for target in targets] == [
        ("DaemonSet", "dcgm-exporter"),
        ("DaemonSet", "nfd"),
        ("DaemonSet", "nvidia-device-plugin"),
        ("Deployment", "gpu-operator"),
    ]
    assert {target["namespace"] for target in targets} == {"ns"}


def test_the_filters_are_registered() -> None:
    assert set(FilterModule().filters()) == {
        "gpu_namespace",
        "gpu_nfd_values",
        "gpu_operator_values",
        "gpu_plugin_objects",
        "gpu_wait_targets",
    }
