"""Builds what the rayservice role applies, from the model list: Serve applications, Ray groups, and the RayService
around them.

Facts about the systems behind it, each of which cost somebody a day:

* KubeRay starts a new Ray cluster for any change of ``rayClusterConfig`` but replicas, bounds and tolerations, and
  takes a change of
  ``serveConfigV2`` in place. So everything that belongs to one model stands in ``serveConfigV2``.
* KubeRay does not carry changed bounds or replicas, nor a changed Service, over to what it created:
  ``rayservice_alignment``.
* Serve LLM asks for ``accelerator_type:X`` in every bundle, and the Ray autoscaler knows that a group of size zero has
  it only where the
  group's ``resources`` say so. A group declares either ``resources`` or ``rayStartParams`` such as ``num-cpus``, never
  both.
* Serve LLM's own ingress deployment never scales unless it gets an ``autoscaling_config``.
* Placement groups belong to ``placement_group_config``; in ``deployment_config`` they are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.kube.quantity import quantity
from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import label_value, ray_name

Json = dict[str, Any]

IMPORT_PATH = "ray.serve.llm:build_openai_app"
SERVE_PORT = 8000
# What a pod asks of Kubernetes for a GPU, unless it wants a slice of one or a shared one.
GPU_RESOURCE = "nvidia.com/gpu"
_REMOTE = re.compile(r"(s3|gs|abfss?|azure)://")


def ray_accelerator(name: str, accelerators: Mapping[str, Json]) -> str:
    """Ray's name of an accelerator: ``nvidia-t4`` is ``T4``. The table ``accelerators`` wins over the rule."""
    return str(accelerators.get(name, {}).get("ray_name") or ray_name(name))


def replica_bounds(model: Mapping[str, Any]) -> tuple[int, int]:
    """A model's least and most replicas: what its deployment says to Serve, or else its ``replicas``."""
    replicas, deployment = model.get("replicas") or {}, model.get("deployment") or {}
    own, fixed = deployment.get("autoscaling_config") or {}, deployment.get("num_replicas")
    if fixed == "auto":
        return 1, 100  # Serve's own bounds for it
    if fixed is not None:
        return int(fixed), int(fixed)
    low = int(own.get("min_replicas", replicas.get("min", 1)))
    return low, int(own.get("max_replicas", replicas.get("max", max(low, 1))))


def worker_group_name(model: Mapping[str, Any]) -> str:
    """The derived group of a model's replicas: its accelerator and device, as part of a pod's name."""
    resources = model.get("resources") or {}
    if not resources.get("gpu"):
        return "cpu"
    # Slices and shared GPUs are other devices than whole ones, so their pods are others, too.
    device = str(resources.get("gpu_resource") or GPU_RESOURCE)
    parts = [str(resources.get("accelerator") or "gpu")]
    parts += [] if device == GPU_RESOURCE else [device.removeprefix("nvidia.com/")]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())


def rayservice_routes(models: Sequence[Json], gateway: bool = False) -> dict[str, str]:
    """Route prefix of each model: ``/<id>``, so that a second model moves no address of the first, or what the model
    says itself. The ``gateway`` has all models at ``/``."""
    return {model["id"]: "/" if gateway else model.get("route_prefix") or f"/{model['id']}" for model in models}


def _app(model: Json, route_prefix: str, location: str, settings: Mapping[str, Any]) -> Json:
    """One Serve application: the model behind ray.serve.llm's OpenAI ingress."""
    resources, replicas = model.get("resources") or {}, model.get("replicas") or {}
    engine = dict(model.get("engine") or {})
    gpu = int(resources.get("gpu", 0))
    low = int(replicas.get("min", 1))
    autoscaling: Json = {"min_replicas": low, "max_replicas": int(replicas.get("max", max(low, 1)))}
    for key, target in (
        ("initial", "initial_replicas"),
        ("target_ongoing_requests", "target_ongoing_requests"),
        ("upscale_delay_s", "upscale_delay_s"),
        ("downscale_delay_s", "downscale_delay_s"),
    ):
        if key in replicas:
            autoscaling[target] = replicas[key]
    deployment = dict(model.get("deployment") or {})
    if "num_replicas" not in deployment:
        deployment["autoscaling_config"] = autoscaling | dict(deployment.get("autoscaling_config") or {})
    config: Json = {
        "model_loading_config": {
            "model_id": model["id"],
            "model_source": {"bucket_uri": location} if _REMOTE.match(location) else location,
        },
        "engine_kwargs": engine,
        "deployment_config": deployment,
    }
    if gpu and resources.get("accelerator"):
        config["accelerator_type"] = ray_accelerator(resources["accelerator"], settings["accelerators"])
    if model.get("placement"):
        config["placement_group_config"] = model["placement"]
    elif not gpu:
        # Without it a replica asks for a GPU. CPUs in Ray are logical: the engine takes what the pod may use.
        config["placement_group_config"] = {"bundles": [{"CPU": max(1, math.floor(quantity(resources.get("cpu", 1))))}]}
    if model.get("lora"):
        config["lora_config"] = model["lora"]
    if model.get("env"):
        config["runtime_env"] = {"env_vars": {key: str(value) for key, value in model["env"].items()}}
    ingress = settings["ingress"]
    return {
        "name": model["id"],
        "route_prefix": route_prefix,
        "import_path": IMPORT_PATH,
        "args": {
            "llm_configs": [config],
            "ingress_deployment_config": {
                "autoscaling_config": {
                    "min_replicas": ingress["min"],
                    "max_replicas": ingress["max"],
                    "target_ongoing_requests": ingress["target_ongoing_requests"],
                },
                "max_ongoing_requests": ingress["max_ongoing_requests"],
                "ray_actor_options": {"num_cpus": ingress["cpu"]},
            },
        },
    }


def rayservice_serve_config(models: Sequence[Json], locations: Mapping[str, str], settings: Mapping[str, Any]) -> Json:
    """Serve's declarative configuration: one application a model, in the order of their ids.

    ``locations`` tells where each model's files are (the models role's fact); a model without one is loaded from its
    ``source``.
    """
    routes = rayservice_routes(models)
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": "0.0.0.0",  # noqa: S104 - inside the pod; what reaches it is the Service's and the network policy's affair
            "port": SERVE_PORT,
            "request_timeout_s": settings["request_timeout_s"],
        },
        "applications": [
            _app(model, routes[model["id"]], locations.get(model["id"], model["source"]), settings)
            for model in sorted(models, key=lambda entry: str(entry["id"]))
        ],
    }


def rayservice_worker_groups(models: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Json]:
    """The worker groups: those of ``settings.worker_groups`` where given, else one for CPU work and one for each
    accelerator.

    A derived group's pod is as large as the largest replica that runs in it, and its bounds are the sums of its
    models' bounds. Groups come in
    the order in which the model list first needs them, so that a new accelerator is appended: KubeRay then keeps the
    running cluster.
    """
    if settings["worker_groups"]:
        return [dict(group) for group in settings["worker_groups"]]
    groups: dict[str, Json] = {}
    # Serve's ingress replicas need a home that costs no GPU.
    groups["cpu"] = {
        "name": "cpu",
        "min": 1,
        "max": 1,
        "cpu": settings["cpu_group"]["cpu"],
        "memory": settings["cpu_group"]["memory"],
    }
    for model in models:
        resources = model.get("resources") or {}
        gpu = int(resources.get("gpu", 0))
        low, high = replica_bounds(model)
        pipeline = int((model.get("engine") or {}).get("pipeline_parallel_size", 1))
        name = worker_group_name(model)
        group = groups.setdefault(name, {"name": name, "min": 0, "max": 0, "cpu": 1, "memory": "1Gi", "gpu": 0})
        if gpu and resources.get("accelerator"):
            group["accelerator"] = resources["accelerator"]
        if gpu and resources.get("gpu_resource", GPU_RESOURCE) != GPU_RESOURCE:
            group["gpu_resource"] = resources["gpu_resource"]
        group["gpu"] = max(int(group.get("gpu", 0)), gpu)
        for key in ("cpu", "memory"):
            if key in resources and quantity(resources[key]) > quantity(group[key]):
                group[key] = resources[key]
        group["min"] += low * pipeline
        group["max"] += high * pipeline
    cpu_models = [model for model in models if not (model.get("resources") or {}).get("gpu")]
    if cpu_models:
        groups["cpu"]["cpu"] = quantity(groups["cpu"]["cpu"]) + 1  # the ingress replicas' share
    return [group for group in groups.values() if group["max"]]


def _gpu_nodes(group: Mapping[str, Any], settings: Mapping[str, Any]) -> Json:
    """Selects the nodes of a group's accelerator: as rayservice_accelerators says, or, for a derived group, by the
    label that nodes with this GPU bear, so that no other GPU serves it."""
    accelerator = str(group.get("accelerator") or "")
    given = settings["accelerators"].get(accelerator, {}).get("node_selector")
    label = settings["gpu_node_label"]
    if given or settings["worker_groups"] or not label:
        return dict(given or {})
    value = label_value(accelerator, label)
    return {label: value} if value else {}


def _plain_env(settings: Mapping[str, Any]) -> list[Json]:
    env = dict(settings["env"])
    if settings["auth_mode"] == "disabled":
        # The operator tells its pods of "token" alone, and from Ray 2.61 on a pod that is told nothing wants a token.
        env["RAY_AUTH_MODE"] = "disabled"
    return [{"name": key, "value": str(value)} for key, value in sorted(env.items())]


def _env(settings: Mapping[str, Any]) -> list[Json]:
    env = _plain_env(settings)
    secret = settings["hugging_face_secret"]
    if secret:
        # Both names are read: HF_TOKEN by the hub's library, the long one by older tools.
        reference = {"secretKeyRef": {"name": secret, "key": "token", "optional": True}}
        env += [{"name": name, "valueFrom": reference} for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    return env


def _pod(group: Mapping[str, Any], settings: Mapping[str, Any], head: bool) -> Json:
    """Pod template of a group. Requests are the group's cpu and memory; memory is limited, CPU only where
    ``cpu_limit`` says so."""
    requests: Json = {"cpu": str(group["cpu"]), "memory": str(group["memory"])}
    limits: Json = {"memory": str(group.get("memory_limit") or group["memory"])}
    if group.get("cpu_limit"):
        limits["cpu"] = str(group["cpu_limit"])
    gpu = int(group.get("gpu", 0))
    if gpu:
        resource = str(group.get("gpu_resource") or GPU_RESOURCE)
        requests[resource] = limits[resource] = str(gpu)
    env = _env(settings)
    if not gpu:
        # A node's GPUs are not for pods that asked for none.
        env.append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"})
    selector = dict(settings["node_selector"]) | _gpu_nodes(group, settings) | dict(group.get("node_selector") or {})
    tolerations = [*settings["tolerations"], *(group.get("tolerations") or [])]
    if gpu:
        tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, *tolerations]
    container: Json = {
        "name": "ray-head" if head else "ray-worker",
        "image": group.get("image") or settings["image"],
        "imagePullPolicy": settings["image_pull_policy"],
        "env": env,
        "resources": {"requests": requests, "limits": limits},
        # A worker leaves Ray before it is killed.
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}},
    }
    if settings["env_from_secrets"]:
        container["envFrom"] = [
            {"secretRef": {"name": name, "optional": True}} for name in settings["env_from_secrets"]
        ]
    if settings["volume_mounts"]:
        container["volumeMounts"] = list(settings["volume_mounts"])
    if head:
        container["ports"] = [
            {"name": name, "containerPort": port}
            for name, port in (
                ("gcs-server", 6379), ("dashboard", 8265), ("client", 10001), ("serve", SERVE_PORT), ("metrics", 8080),
                ("as-metrics", 44217), ("dash-metrics", 44227),
            )
        ]  # fmt: skip
    else:
        container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    annotations = dict(group.get("annotations") or {})
    if head:
        # Losing the head loses the cluster: no autoscaler may move it.
        annotations |= {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
    # A Service named vllm would set VLLM_PORT in every pod of its namespace, to an address that vLLM fails on.
    spec: Json = {"containers": [container], "enableServiceLinks": False}
    if settings["volumes"]:
        spec["volumes"] = list(settings["volumes"])
    if settings["service_account"]:
        spec["serviceAccountName"] = settings["service_account"]
    if settings["image_pull_secrets"]:
        spec["imagePullSecrets"] = [{"name": name} for name in settings["image_pull_secrets"]]
    if selector:
        spec["nodeSelector"] = selector
    if tolerations:
        spec["tolerations"] = tolerations
    metadata: Json = {"labels": dict(settings["labels"])}
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def _ray_resources(group: Mapping[str, Any], settings: Mapping[str, Any]) -> Json:
    """What Ray schedules on a pod of the group, as strings; declared, so that the autoscaler knows it of a group of
    size zero too."""
    cpus = group.get("ray_cpus")
    resources: Json = {"CPU": str(max(1, math.floor(quantity(group["cpu"]))) if cpus is None else int(cpus))}
    gpu = int(group.get("gpu", 0))
    if gpu:
        resources["GPU"] = str(gpu)
        if group.get("accelerator"):
            resources[f"accelerator_type:{ray_accelerator(group['accelerator'], settings['accelerators'])}"] = "1"
    return resources | {key: str(value) for key, value in (group.get("ray_resources") or {}).items()}


def _bounds(group: Mapping[str, Any]) -> Json:
    low = int(group.get("min", 1))
    high = int(group.get("max", max(low, 1)))
    return {"replicas": int(group.get("replicas", low)), "minReplicas": low, "maxReplicas": high}


def _from_hub(model: Json, location: str) -> bool:
    """Whether pods read something of a model from the hub, and not from a bucket or a folder: itself, a tokenizer of
    its own, a draft model."""
    engine = model.get("engine") or {}
    draft = engine.get("speculative_config")
    read = [location, engine.get("tokenizer"), draft.get("model") if isinstance(draft, Mapping) else None]
    return any(not (_REMOTE.match(place) or place.startswith(("/", "./", "../", "~"))) for place in read if place)


def rayservice_manifest(models: Sequence[Json], locations: Mapping[str, str], settings: Mapping[str, Any]) -> Json:
    """The RayService: Serve's configuration, the Ray cluster and the Service in front of it.

    ``settings`` are the role's variables without their prefix (``vars/main.yml`` lists them).
    """
    name = settings["name"]
    if not any(_from_hub(model, locations.get(model["id"], model["source"])) for model in models):
        # What the pods read themselves needs no token of the hub.
        settings = {**settings, "hugging_face_secret": ""}
    head = settings["head"]
    head_spec: Json = {
        "rayStartParams": {"dashboard-host": "0.0.0.0"},  # noqa: S104 - the operator and probes ask it from other pods
        "resources": _ray_resources({"ray_cpus": 0, **head}, settings),
        "template": _pod(head, settings, head=True),
    }
    cluster: Json = {
        "rayVersion": settings["ray_version"],
        "authOptions": {"mode": settings["auth_mode"]},
        "headGroupSpec": head_spec,
        "workerGroupSpecs": [
            {
                "groupName": group["name"],
                **_bounds(group),
                "rayStartParams": dict(group.get("ray_start_params") or {}),
                "resources": _ray_resources(group, settings),
                # The operator writes it whenever it updates the object itself: undeclared, a rerun would take it out.
                "scaleStrategy": {},
                "template": _pod(group, settings, head=False),
            }
            for group in rayservice_worker_groups(models, settings)
        ],
    }
    if settings["autoscaling"]:
        scaler = settings["autoscaler"]
        size = {"cpu": str(scaler["cpu"]), "memory": str(scaler["memory"])}
        cluster["enableInTreeAutoscaling"] = True
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "upscalingMode": scaler["upscaling_mode"],
            "idleTimeoutSeconds": scaler["idle_timeout_s"],
            "imagePullPolicy": settings["image_pull_policy"],
            "resources": {"requests": size, "limits": {"memory": size["memory"]}},
        }
        # It runs the same image, so it needs what the image needs.
        env = _plain_env(settings)
        cluster["autoscalerOptions"] |= {"env": env} if env else {}
        cluster["autoscalerOptions"] |= (
            {"volumeMounts": list(settings["volume_mounts"])} if settings["volume_mounts"] else {}
        )
    config = rayservice_serve_config(models, locations, settings)
    metadata: Json = {"name": name, "namespace": settings["namespace"]}
    if settings["initializing_timeout"]:
        metadata["annotations"] = {"ray.io/initializing-timeout": settings["initializing_timeout"]}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata,
        "spec": {
            "serveConfigV2": yaml.safe_dump(_plain(config), sort_keys=True, width=150),
            "rayClusterDeletionDelaySeconds": settings["old_cluster_delay_s"],
            "upgradeStrategy": {"type": settings["upgrade_strategy"]},
            "serveService": _service(settings),
            "rayClusterConfig": cluster,
        },
    }


def _plain(value: Any) -> Any:
    """``value`` without the origin tags that Ansible puts on values, which the YAML writer does not know."""
    return json.loads(json.dumps(value))


def _service(settings: Mapping[str, Any]) -> Json:
    port: Json = {"name": "serve", "port": SERVE_PORT, "targetPort": SERVE_PORT, "protocol": "TCP"}
    if settings["service_type"] in ("NodePort", "LoadBalancer") and settings["node_port"]:
        port["nodePort"] = int(settings["node_port"])
    metadata: Json = {"name": f"{settings['name']}-serve-svc", "labels": dict(settings["labels"])}
    if settings["service_annotations"]:
        metadata["annotations"] = dict(settings["service_annotations"])
    return {"metadata": metadata, "spec": {"type": settings["service_type"], "ports": [port]}}


def rayservice_objects(models: Sequence[Json], locations: Mapping[str, str], settings: Mapping[str, Any]) -> list[Json]:
    """All objects of the rayservice role: the RayService, and the service account of its pods where one is named."""
    objects = []
    if settings["service_account"] and settings["service_account"] != "default":
        metadata: Json = {"name": settings["service_account"], "namespace": settings["namespace"]}
        if settings["service_account_annotations"]:
            metadata["annotations"] = dict(settings["service_account_annotations"])
        objects.append({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
    return [*objects, rayservice_manifest(models, locations, settings)]


def rayservice_alignment(objects: Sequence[Json]) -> list[Json]:
    """Rules for k8s_apply_set's ``align``: what the operator derived from the RayService and does not follow.

    Bounds of the worker groups (replicas too, unless Ray's autoscaler owns them) on the Ray clusters, type and ports
    of the Service.
    """
    rules = []
    for item in objects:
        if item["kind"] != "RayService":
            continue
        meta, spec = item["metadata"], item["spec"]
        cluster = spec["rayClusterConfig"]
        keys = ["minReplicas", "maxReplicas"] + ([] if cluster.get("enableInTreeAutoscaling") else ["replicas"])
        groups = [
            {"groupName": group["groupName"], **{key: group[key] for key in keys}}
            for group in cluster["workerGroupSpecs"]
        ]
        rules.append(
            {
                "api_version": "ray.io/v1",
                "kind": "RayCluster",
                "namespace": meta["namespace"],
                "selector": f"ray.io/originated-from-cr-name={meta['name']},ray.io/originated-from-crd=RayService",
                "merge": {"spec": {"workerGroupSpecs": groups}},
            }
        )
        service = spec["serveService"]
        rules.append(
            {
                "api_version": "v1",
                "kind": "Service",
                "namespace": meta["namespace"],
                "name": service["metadata"]["name"],
                "merge": {"spec": {"type": service["spec"]["type"], "ports": service["spec"]["ports"]}},
            }
        )
    return rules


def smoke_questions(models: Sequence[Json], gateway: bool = False) -> list[Json]:
    """What openai_smoke asks: each model's id and route prefix, with what its ``verify`` says."""
    routes = rayservice_routes(models, gateway)
    return [{"id": model["id"], "route_prefix": routes[model["id"]], **(model.get("verify") or {})} for model in models]


class FilterModule:
    """The filters of the serving roles."""

    def filters(self) -> dict[str, Any]:
        return {
            "rayservice_alignment": rayservice_alignment,
            "rayservice_objects": rayservice_objects,
            "rayservice_routes": rayservice_routes,
            "rayservice_serve_config": rayservice_serve_config,
            "rayservice_worker_groups": rayservice_worker_groups,
            "smoke_questions": smoke_questions,
        }
