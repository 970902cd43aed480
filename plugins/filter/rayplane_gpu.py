"""Builds the Kubernetes objects of the role gpu_plugin, and the values of NVIDIA's GPU operator.

Two ways lead to `nvidia.com/gpu` on a node, chosen by ``mode``:

* ``device_plugin``: a DaemonSet of our own each for the device plugin, GPU feature discovery and the DCGM exporter, on
  images that have the driver and the container toolkit (AL2023 NVIDIA). It exposes MIG slices that exist and makes
  none.
* ``gpu_operator``: NVIDIA's operator makes the same DaemonSets, and its mig-manager partitions GPUs.

What the filters take is the mapping ``__gpu_plugin_settings`` of the role: the role's variables by their names without
``gpu_plugin_``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError

Json = dict[str, Any]

NVIDIA_REGISTRY = "nvcr.io/nvidia"
DEVICE_PLUGIN, GPU_OPERATOR = "device_plugin", "gpu_operator"
# Namespaces that Kubernetes has anyway, and that may not be made, labelled or deleted here.
_GIVEN_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
_PART_OF = "app.kubernetes.io/part-of"
_NAME = "app.kubernetes.io/name"

_GPU_RESOURCE = "nvidia.com/gpu"
_SHARED_RESOURCE = re.compile(r"nvidia\.com/(gpu|mig-[1-7]g\.[0-9]+gb(\.me)?)\Z")

# Nodes with NVIDIA GPUs, by whoever labelled them: role eks and the pools of Karpenter, GKE, GPU feature discovery,
# node feature discovery (which names PCI devices by vendor, or by class and vendor).
_GKE = "cloud.google.com/gke-accelerator"
_GPU_NODES: tuple[Json, ...] = (
    {"key": "rayplane.io/accelerator", "operator": "In", "values": ["nvidia"]},
    {"key": "nvidia.com/gpu.present", "operator": "In", "values": ["true"]},
    {"key": "feature.node.kubernetes.io/pci-10de.present", "operator": "In", "values": ["true"]},
    {"key": "feature.node.kubernetes.io/pci-0300_10de.present", "operator": "In", "values": ["true"]},
    {"key": "feature.node.kubernetes.io/pci-0302_10de.present", "operator": "In", "values": ["true"]},
)
# A second device plugin for the same resource would take the kubelet's socket from the first: where the image (or
# GKE, unless told otherwise, or EKS Auto Mode) brings one, ours stays away.
_HAS_NO_PLUGIN: tuple[Json, ...] = (
    {"key": "rayplane.io/device-plugin", "operator": "NotIn", "values": ["image"]},
    {"key": "eks.amazonaws.com/compute-type", "operator": "NotIn", "values": ["auto"]},
)
_NEURON_NODES: tuple[Json, ...] = (
    {"key": "rayplane.io/accelerator", "operator": "In", "values": ["neuron"]},
    {"key": "karpenter.k8s.aws/instance-accelerator-manufacturer", "operator": "In", "values": ["aws"]},
)


def problems(given: Mapping[str, Any]) -> list[str]:
    """What cannot be: each problem with the variable, its value, why, and the cure."""
    found = []
    mig = given["mig_strategy"]
    slicing = given["time_slicing_replicas"]
    for name, replicas in slicing.items():
        where = f"gpu_plugin_time_slicing_replicas ({name}: {replicas!r})"
        if not _SHARED_RESOURCE.match(str(name)):
            found.append(f"{where}: NVIDIA's plugin shares nvidia.com/gpu and nvidia.com/mig-<profile>, nothing else.")
        elif name != _GPU_RESOURCE and mig != "mixed":
            found.append(
                f"{where}: slices have a resource of their own only with gpu_plugin_mig_strategy mixed, not {mig}. "
                "Share nvidia.com/gpu, or choose mixed."
            )
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 2:
            found.append(
                f"{where}: the plugin takes 2 replicas or more. Leave the resource out where it is not shared."
            )
    if not slicing and (given["time_slicing_rename"] or given["time_slicing_fail_multiple"]):
        found.append(
            "gpu_plugin_time_slicing_rename and gpu_plugin_time_slicing_fail_multiple say how shared GPUs behave, but "
            "gpu_plugin_time_slicing_replicas shares none. Share nvidia.com/gpu, or leave both false."
        )
    if given["mig_configs"] and given["mode"] != GPU_OPERATOR:
        found.append(
            f"gpu_plugin_mig_configs ({', '.join(sorted(given['mig_configs']))}) says how to partition GPUs, which "
            "only the operator's mig-manager does. Set gpu_plugin_mode to gpu_operator, or partition in the nodes' "
            "image and leave it empty."
        )
    if given["mig_configs"] and mig == "none":
        found.append(
            f"gpu_plugin_mig_configs ({', '.join(sorted(given['mig_configs']))}) says how to partition GPUs, but "
            "gpu_plugin_mig_strategy none exposes no slices: the GPUs would vanish. Choose single (all slices alike) "
            "or mixed."
        )
    strategies = given["device_list_strategies"]
    if not strategies:
        found.append("gpu_plugin_device_list_strategies is []: name one or more, such as envvar.")
    if given["mode"] == GPU_OPERATOR and list(strategies) != ["envvar"]:
        found.append(
            f"gpu_plugin_device_list_strategies is {list(strategies)!r}, but the operator chooses the strategy itself "
            "(CDI unless gpu_plugin_operator_values sets cdi.enabled false). Leave it at [envvar]."
        )
    if given["operator_toolkit_enabled"] and given["mode"] == DEVICE_PLUGIN:
        found.append(
            "gpu_plugin_operator_toolkit_enabled is true, but in mode device_plugin nobody installs a container "
            "toolkit. Use images that have one (AL2023 NVIDIA), or set gpu_plugin_mode to gpu_operator."
        )
    if given["operator_driver_enabled"] and given["mode"] == DEVICE_PLUGIN:
        found.append(
            "gpu_plugin_operator_driver_enabled is true, but in mode device_plugin nobody installs a driver. Use "
            "images that have one (AL2023 NVIDIA), or set gpu_plugin_mode to gpu_operator."
        )
    names = [str(metric["name"]) for metric in given["dcgm_metrics"]]
    found += [
        f"gpu_plugin_dcgm_metrics ({name!r}): DCGM's fields are named DCGM_..., in capitals."
        for name in names
        if not re.fullmatch(r"DCGM_[A-Z0-9_]+", name)
    ]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        found.append(f"gpu_plugin_dcgm_metrics names {', '.join(twice)} twice: the exporter would refuse the list.")
    return found


def _checked(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if found := problems(given):
        raise AnsibleFilterError("gpu_plugin: " + " ".join(found))
    return given


def _yaml(value: Mapping[str, Any]) -> str:
    """YAML of Ansible's values, whose strings carry tags that the dumper knows nothing of."""
    text: str = yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False)
    return text


def plugin_config(given: Mapping[str, Any]) -> str:
    """The configuration file of the device plugin and of GPU feature discovery (YAML, version v1).

    Fields: https://github.com/NVIDIA/k8s-device-plugin/blob/v0.20.0/api/config/v1
    """
    config: Json = {"version": "v1", "flags": {"migStrategy": given["mig_strategy"]}}
    if given["mode"] == DEVICE_PLUGIN:
        config["flags"] |= {
            "failOnInitError": given["fail_on_init_error"],
            "nvidiaDriverRoot": given["driver_root"],
            "plugin": {
                "deviceIDStrategy": given["device_id_strategy"],
                "deviceListStrategy": list(given["device_list_strategies"]),
                "passDeviceSpecs": given["pass_device_specs"],
            },
            "gfd": {"sleepInterval": f"{given['feature_discovery_interval_s']}s"},
        }
        if given["cdi_hook_path"]:
            config["flags"]["plugin"]["nvidiaCTKPath"] = given["cdi_hook_path"]
    if given["time_slicing_replicas"]:
        config["sharing"] = {
            "timeSlicing": {
                "renameByDefault": given["time_slicing_rename"],
                "failRequestsGreaterThanOne": given["time_slicing_fail_multiple"],
                "resources": [
                    {"name": name, "replicas": replicas}
                    for name, replicas in sorted(given["time_slicing_replicas"].items())
                ],
            }
        }
    return _yaml(config)


def dcgm_csv(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The exporter's list of metrics: field, Prometheus type, help (a comma would end the help)."""
    lines = [f"{item['name']}, {item['type']}, {str(item.get('help', '')).replace(',', ';')}" for item in metrics]
    return "\n".join(lines) + "\n"


def _terms(keys: Sequence[Json], also: Sequence[Json], extra: Sequence[Json]) -> Json:
    """Required node affinity: any of ``keys`` together with all of ``also``, or one of the terms in ``extra``."""
    terms = [{"matchExpressions": [key, *also]} for key in keys] + [dict(term) for term in extra]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _gpu_affinity(given: Mapping[str, Any]) -> Json:
    """Every node with NVIDIA GPUs."""
    return _terms([*_GPU_NODES, {"key": _GKE, "operator": "Exists"}], (), given["extra_node_terms"])


def _plugin_affinity(given: Mapping[str, Any]) -> Json:
    """Nodes with NVIDIA GPUs that have no device plugin of their own. GKE's have, unless their label says no."""
    not_gke = {"key": _GKE, "operator": "DoesNotExist"}
    gke = {"key": "gke-no-default-nvidia-gpu-device-plugin", "operator": "In", "values": ["true"]}
    affinity = _terms(_GPU_NODES, [*_HAS_NO_PLUGIN, not_gke], given["extra_node_terms"])
    terms = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    terms.insert(len(_GPU_NODES), {"matchExpressions": [{"key": _GKE, "operator": "Exists"}, gke]})
    return affinity


def _host_path(name: str, path: str, kind: str) -> Json:
    return {"name": name, "hostPath": {"path": path, "type": kind}}


def _daemon_set(given: Mapping[str, Any], name: str, pod: Json, annotations: Mapping[str, str] | None = None) -> Json:
    """A DaemonSet of one container on accelerator nodes: critical to the node, rolled out a tenth at a time."""
    labels = {_NAME: name, _PART_OF: "rayplane"}
    metadata: Json = {"labels": labels}
    if annotations:
        metadata["annotations"] = dict(annotations)
    spec: Json = {"priorityClassName": "system-node-critical", "automountServiceAccountToken": False, **pod}
    if given["image_pull_secrets"]:
        spec["imagePullSecrets"] = [{"name": secret} for secret in given["image_pull_secrets"]]
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": given["namespace"], "labels": {_NAME: name}},
        "spec": {
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}},
            "template": {"metadata": metadata, "spec": spec},
        },
    }


def _object(given: Mapping[str, Any], api_version: str, kind: str, name: str, **body: Any) -> Json:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name, "namespace": given["namespace"], "labels": {_NAME: name}},
        **body,
    }


def _config_map(given: Mapping[str, Any], name: str, data: Mapping[str, str]) -> tuple[Json, Json]:
    """A ConfigMap, and the annotation by which a change of it rolls the pods that read it."""
    digest = hashlib.sha256(str(sorted(data.items())).encode()).hexdigest()[:16]
    return _object(given, "v1", "ConfigMap", name, data=dict(data)), {f"rayplane.io/{name}": digest}


def _runtime_class(given: Mapping[str, Any]) -> Json:
    return {"runtimeClassName": given["runtime_class"]} if given["runtime_class"] else {}


def _device_plugin_security(given: Mapping[str, Any]) -> Json:
    """As little as the plugin can do with: MIG and volume mounts need CAP_SYS_ADMIN, device specs all of it."""
    if given["pass_device_specs"]:
        return {"privileged": True}
    if given["mig_strategy"] != "none" or "volume-mounts" in given["device_list_strategies"]:
        return {"capabilities": {"add": ["SYS_ADMIN"]}}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


_CONFIG_NAME = "nvidia-device-plugin-config"
_CONFIG_MOUNT: Json = {"name": "config", "mountPath": "/config", "readOnly": True}
_CONFIG_VOLUME: Json = {"name": "config", "configMap": {"name": _CONFIG_NAME}}


def _nvidia_environment(given: Mapping[str, Any]) -> list[Json]:
    """What makes NVIDIA's container runtime give the driver to a pod that requests no GPU."""
    wanted = {
        "CONFIG_FILE": "/config/config.yaml",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    }
    if given["mig_strategy"] != "none":
        wanted["NVIDIA_MIG_MONITOR_DEVICES"] = "all"
    return [{"name": name, "value": value} for name, value in wanted.items()]


def _device_plugin(given: Mapping[str, Any], annotations: Json) -> Json:
    mounts = [{"name": "device-plugins", "mountPath": "/var/lib/kubelet/device-plugins"}, _CONFIG_MOUNT]
    volumes = [_host_path("device-plugins", f"{given['kubelet_dir']}/device-plugins", "Directory"), _CONFIG_VOLUME]
    if any(name.startswith("cdi-") for name in given["device_list_strategies"]):
        # The plugin writes CDI specifications for the runtime, and looks the driver's files up to do so.
        mounts += [
            {"name": "cdi", "mountPath": "/var/run/cdi"},
            {"name": "driver-root", "mountPath": "/driver-root", "readOnly": True},
        ]
        volumes += [
            _host_path("cdi", "/var/run/cdi", "DirectoryOrCreate"),
            _host_path("driver-root", given["driver_root"], "Directory"),
        ]
    container = {
        "name": "nvidia-device-plugin",
        "image": f"{given['image_registry']}/k8s-device-plugin:{given['device_plugin_version']}",
        "command": ["nvidia-device-plugin"],
        "env": _nvidia_environment(given),
        "securityContext": _device_plugin_security(given),
        "volumeMounts": mounts,
        "resources": given["resources"],
    }
    pod = {
        "enableServiceLinks": False,
        **_runtime_class(given),
        "tolerations": given["tolerations"],
        "affinity": _plugin_affinity(given),
        "containers": [container],
        "volumes": volumes,
    }
    return _daemon_set(given, "nvidia-device-plugin", pod, annotations)


def _feature_discovery(given: Mapping[str, Any], annotations: Json) -> list[Json]:
    """GPU feature discovery: writes a NodeFeature, from which node feature discovery makes the node's labels."""
    name = "gpu-feature-discovery"
    container = {
        "name": name,
        "image": f"{given['image_registry']}/k8s-device-plugin:{given['device_plugin_version']}",
        "command": [name],
        "env": [
            *_nvidia_environment(given),
            *(
                {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}
                for variable, path in (
                    ("NODE_NAME", "spec.nodeName"),
                    ("NAMESPACE", "metadata.namespace"),
                    ("POD_NAME", "metadata.name"),
                )
            ),
        ],
        # It reads what a vGPU says of itself from the PCI configuration space.
        "securityContext": {"privileged": True},
        "volumeMounts": [_CONFIG_MOUNT, {"name": "sys", "mountPath": "/sys", "readOnly": True}],
        "resources": given["resources"],
    }
    pod = {
        "enableServiceLinks": False,
        **_runtime_class(given),
        "serviceAccountName": name,
        "automountServiceAccountToken": True,
        "tolerations": given["tolerations"],
        "affinity": _gpu_affinity(given),
        "containers": [container],
        "volumes": [_CONFIG_VOLUME, _host_path("sys", "/sys", "Directory")],
    }
    group = "rbac.authorization.k8s.io"
    rules = [
        {
            "apiGroups": ["nfd.k8s-sigs.io"],
            "resources": ["nodefeatures"],
            "verbs": ["get", "list", "watch", "create", "update"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
    ]
    subject = {"kind": "ServiceAccount", "name": name, "namespace": given["namespace"]}
    reference = {"apiGroup": group, "kind": "Role", "name": name}
    return [
        _object(given, "v1", "ServiceAccount", name),
        _object(given, f"{group}/v1", "Role", name, rules=rules),
        _object(given, f"{group}/v1", "RoleBinding", name, roleRef=reference, subjects=[subject]),
        _daemon_set(given, name, pod, annotations),
    ]


def _dcgm_exporter(given: Mapping[str, Any]) -> list[Json]:
    """The DCGM exporter, its list of metrics, its Service and, where wanted, its ServiceMonitor."""
    name, port = "dcgm-exporter", 9400
    objects: list[Json] = []
    annotations: Json = {}
    arguments: list[str] = []
    mounts: list[Json] = [{"name": "pod-resources", "mountPath": "/var/lib/kubelet/pod-resources", "readOnly": True}]
    volumes: list[Json] = [_host_path("pod-resources", f"{given['kubelet_dir']}/pod-resources", "Directory")]
    if given["dcgm_metrics"]:
        config, annotations = _config_map(given, "dcgm-metrics", {"metrics.csv": dcgm_csv(given["dcgm_metrics"])})
        objects.append(config)
        arguments = ["-f", "/etc/rayplane/metrics.csv"]
        mounts.append({"name": "metrics", "mountPath": "/etc/rayplane", "readOnly": True})
        volumes.append({"name": "metrics", "configMap": {"name": "dcgm-metrics"}})
    probe = {"httpGet": {"path": "/health", "port": port}}
    container: Json = {
        "name": name,
        "image": f"{given['image_registry']}/k8s/dcgm-exporter:{given['dcgm_version']}",
        "env": [
            {"name": "DCGM_EXPORTER_LISTEN", "value": f":{port}"},
            {"name": "DCGM_EXPORTER_KUBERNETES", "value": "true"},
            {"name": "DCGM_EXPORTER_INTERVAL", "value": str(given["dcgm_interval_s"] * 1000)},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"},
            {"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "compute,utility"},
        ],
        "ports": [{"name": "metrics", "containerPort": port, "protocol": "TCP"}],
        # Profiling metrics (DCGM_FI_PROF_*) need CAP_SYS_ADMIN, and that root.
        "securityContext": {
            "runAsUser": 0,
            "allowPrivilegeEscalation": False,
            "capabilities": {"add": ["SYS_ADMIN"], "drop": ["ALL"]},
        },
        "livenessProbe": {**probe, "initialDelaySeconds": 45, "periodSeconds": 15},
        "readinessProbe": {**probe, "initialDelaySeconds": 15, "periodSeconds": 5},
        "volumeMounts": mounts,
        "resources": given["dcgm_resources"],
    }
    if arguments:
        container["args"] = arguments
    pod = {
        "enableServiceLinks": False,
        **_runtime_class(given),
        "tolerations": given["tolerations"],
        "affinity": _gpu_affinity(given),
        "containers": [container],
        "volumes": volumes,
    }
    objects.append(_daemon_set(given, name, pod, annotations))
    selector = {_NAME: name, _PART_OF: "rayplane"}
    service = {
        "selector": selector,
        "ports": [{"name": "metrics", "port": port, "targetPort": "metrics", "protocol": "TCP"}],
    }
    objects.append(_object(given, "v1", "Service", name, spec=service))
    if given["service_monitor_enabled"]:
        endpoint = {"port": "metrics", "path": "/metrics", "interval": f"{given['dcgm_interval_s']}s"}
        spec = {"selector": {"matchLabels": selector}, "endpoints": [endpoint]}
        monitor = _object(given, "monitoring.coreos.com/v1", "ServiceMonitor", name, spec=spec)
        monitor["metadata"]["labels"] |= given["service_monitor_labels"]
        objects.append(monitor)
    return objects


def _neuron(given: Mapping[str, Any]) -> list[Json]:
    """AWS's Neuron device plugin; it writes which cores a pod has into the pod's annotations."""
    name = "neuron-device-plugin"
    group = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "update", "patch"]},
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["update", "patch"]},
    ]
    role = _object(given, f"{group}/v1", "ClusterRole", name, rules=rules)
    subject = {"kind": "ServiceAccount", "name": name, "namespace": given["namespace"]}
    reference = {"apiGroup": group, "kind": "ClusterRole", "name": name}
    binding = _object(given, f"{group}/v1", "ClusterRoleBinding", name, roleRef=reference, subjects=[subject])
    for item in (role, binding):
        del item["metadata"]["namespace"]
    container = {
        "name": name,
        "image": f"{given['neuron_image']}:{given['neuron_version']}",
        "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "device-plugins", "mountPath": "/var/lib/kubelet/device-plugins"},
            {"name": "run", "mountPath": "/run"},
        ],
        "resources": given["resources"],
    }
    pod = {
        "enableServiceLinks": False,
        "serviceAccountName": name,
        "automountServiceAccountToken": True,
        "tolerations": given["neuron_tolerations"],
        "affinity": _terms(_NEURON_NODES, (), ()),
        "containers": [container],
        "volumes": [
            _host_path("device-plugins", f"{given['kubelet_dir']}/device-plugins", "Directory"),
            # The map of devices to cores, which the Neuron runtime reads.
            _host_path("run", "/run", "Directory"),
        ],
    }
    return [_object(given, "v1", "ServiceAccount", name), role, binding, _daemon_set(given, name, pod)]


def gpu_namespace(given: Mapping[str, Any]) -> list[Json]:
    """The namespace, open to pods that mount the host's folders; none where Kubernetes has it anyway."""
    if given["namespace"] in _GIVEN_NAMESPACES:
        return []
    labels = {f"pod-security.kubernetes.io/{mode}": "privileged" for mode in ("enforce", "audit", "warn")}
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": given["namespace"], "labels": labels}}]


def gpu_plugin_objects(given: Mapping[str, Any]) -> list[Json]:
    """All objects of the role that come from no chart.

    Raises AnsibleFilterError, with every problem, for settings that cannot be.
    """
    given = _checked(given)
    objects = gpu_namespace(given)
    if given["mode"] == DEVICE_PLUGIN:
        config, annotations = _config_map(given, _CONFIG_NAME, {"config.yaml": plugin_config(given)})
        objects += [config, _device_plugin(given, annotations)]
        if given["feature_discovery_enabled"]:
            objects += _feature_discovery(given, annotations)
        if given["dcgm_enabled"]:
            objects += _dcgm_exporter(given)
    if given["neuron_enabled"]:
        objects += _neuron(given)
    return objects


def _laid_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> Json:
    """``under`` with ``over`` laid on it, mapping by mapping."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = _laid_over(below, value) if both and isinstance(below, Mapping) else value
    return result


def gpu_operator_values(given: Mapping[str, Any]) -> Json:
    """Values of the chart gpu-operator: what the role's variables say, and ``operator_values`` over it.

    Raises AnsibleFilterError, with every problem, for settings that cannot be.
    """
    given = _checked(given)
    registry, secrets = given["image_registry"], list(given["image_pull_secrets"])
    tolerations = list(given["tolerations"])

    def images(repository: str, *parts: str) -> Json:
        # The chart's own addresses stand where nothing else is wanted.
        mirrored = {"repository": repository} if registry != NVIDIA_REGISTRY else {}
        return {part: {**mirrored, **({"imagePullSecrets": secrets} if secrets else {})} for part in parts}

    values: Json = {
        **images(registry, "validator", "operator", "driver", "devicePlugin", "gfd", "nodeStatusExporter"),
        **images(registry, "sandboxDevicePlugin"),
        **images(f"{registry}/k8s", "toolkit", "dcgmExporter"),
        **images(f"{registry}/cloud-native", "dcgm", "migManager", "vgpuDeviceManager", "vfioManager", "ccManager"),
        **images(f"{registry}/cloud-native", "kataSandboxDevicePlugin", "gds", "gdrcopy"),
    }
    values = {part: content for part, content in values.items() if content} | {"migManager": values["migManager"]}
    if registry != NVIDIA_REGISTRY:
        driver_manager = {"repository": f"{registry}/cloud-native"}
        values["driver"]["manager"] = driver_manager
        values["vfioManager"]["driverManager"] = driver_manager
        values["vgpuManager"] = {"driverManager": driver_manager}
    values = _laid_over(
        values,
        {
            # The images of role eks have a driver and a container toolkit; a second one would break both.
            "driver": {"enabled": given["operator_driver_enabled"]},
            "toolkit": {"enabled": given["operator_toolkit_enabled"]},
            "daemonsets": {"tolerations": tolerations},
            "mig": {"strategy": given["mig_strategy"]},
            "devicePlugin": {"version": given["device_plugin_version"], "resources": given["resources"]},
            "gfd": {"version": given["device_plugin_version"], "enabled": True},
            "dcgmExporter": {
                "enabled": given["dcgm_enabled"],
                "version": given["dcgm_version"],
                "resources": given["dcgm_resources"],
                "serviceMonitor": {
                    "enabled": given["service_monitor_enabled"],
                    "interval": f"{given['dcgm_interval_s']}s",
                    "additionalLabels": dict(given["service_monitor_labels"]),
                },
            },
            "node-feature-discovery": {"worker": {"tolerations": tolerations}},
            # CRDs come with every apply; the chart's own job for them is a hook, and hooks are not run.
            "operator": {"upgradeCRD": False, "cleanupCRD": False},
        },
    )
    if given["runtime_class"]:
        values["operator"]["runtimeClass"] = given["runtime_class"]
    if given["kubelet_dir"] != "/var/lib/kubelet":
        values["hostPaths"] = {"kubeletRootDir": given["kubelet_dir"]}
    if given["time_slicing_replicas"]:
        values["devicePlugin"]["config"] = {
            "create": True,
            "name": _CONFIG_NAME,
            "default": "rayplane",
            "data": {"rayplane": plugin_config(given)},
        }
    if given["dcgm_enabled"] and given["dcgm_metrics"]:
        values["dcgmExporter"]["config"] = {
            "name": "dcgm-metrics",
            "create": True,
            "data": dcgm_csv(given["dcgm_metrics"]),
        }
    # Nodes without the label nvidia.com/mig.config keep their GPUs whole: the operator takes no other default.
    values["migManager"]["enabled"] = given["mig_strategy"] != "none"
    if given["mig_configs"]:
        text = _yaml({"version": "v1", "mig-configs": given["mig_configs"]})
        values["migManager"]["config"] = {"create": True, "name": "mig-configs", "data": {"config.yaml": text}}
    return _laid_over(values, given["operator_values"])


def gpu_nfd_values(given: Mapping[str, Any]) -> Json:
    """Values of the chart node-feature-discovery: labels of nvidia.com are allowed, workers run on GPU nodes too."""
    sources = {"pci": {"deviceClassWhitelist": ["02", "03"], "deviceLabelFields": ["vendor"]}}
    values: Json = {
        "priorityClassName": "system-node-critical",
        "master": {"config": {"extraLabelNs": ["nvidia.com"]}},
        "worker": {"tolerations": list(given["tolerations"]), "config": {"sources": sources}},
    }
    return _laid_over(values, given["nfd_values"])


def gpu_wait_targets(objects: Sequence[Mapping[str, Any]], charts: Sequence[Mapping[str, Any]], namespace: str) -> Any:
    """What to wait for: the DaemonSets among the objects, the Deployments and DaemonSets of built charts."""
    found = [("DaemonSet", item["metadata"]["name"]) for item in objects if item["kind"] == "DaemonSet"]
    for chart in charts:
        found += [("Deployment", name) for name in chart.get("deployments") or []]
        found += [("DaemonSet", name) for name in chart.get("daemonsets") or []]
    return [
        {"api_version": "apps/v1", "kind": kind, "namespace": namespace, "name": name} for kind, name in sorted(found)
    ]


class FilterModule:
    """The filters of the role gpu_plugin."""

    def filters(self) -> dict[str, Any]:
        return {
            "gpu_namespace": gpu_namespace,
            "gpu_nfd_values": gpu_nfd_values,
            "gpu_operator_values": gpu_operator_values,
            "gpu_plugin_objects": gpu_plugin_objects,
            "gpu_wait_targets": gpu_wait_targets,
        }
