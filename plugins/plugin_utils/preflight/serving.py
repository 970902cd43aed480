# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over what serves: the model list, the RayService and its groups, the token for the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import ray_name
from ansible_collections.rayplane.platform.plugins.module_utils.serving.memory import shape_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.hub import hub_models
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem, nearest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    DNS_1035_LABEL,
    DNS_LABEL,
    HUB_ID,
    Values,
    as_label,
    bounds,
    bucket_name_problem,
    entries_of,
    quantity_problem,
    taken_name,
    whole,
)

__all__ = [
    "models",
    "operator",
    "rayservice",
    "secrets",
    "worker_groups",
]

_GATES_OF_1_7 = frozenset(
    {
        "GCSFaultToleranceEmbeddedStorage", "KubernetesWAS", "RayClusterHistoryServer", "RayClusterMTLS",
        "RayClusterNetworkPolicy", "SidecarSubmitterRestart",
    }
)  # fmt: skip

_LONGEST_RAYSERVICE_NAME = 47
#: Parameters of `ray start` that declare resources, and the group's own keys for them.
_GROUP_KEYS = {"num-cpus": "ray_cpus", "num-gpus": "gpu", "memory": "memory", "resources": "ray_resources"}
#: vLLM then takes lengths above the model's own.
_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_MODEL_SCHEMES = ("s3", "gs", "abfs", "abfss", "hf")


def models(values: Values) -> Iterator[Problem]:
    """Each entry of the model list for itself, then the list as a whole."""
    if values.get("rayservice_models") == []:
        yield Problem(
            "rayservice_models",
            [],
            "no model is declared, so nothing will answer",
            "add an entry with id and source",
            warning=True,
        )
    seen: dict[str, str] = {}
    models = list(entries_of(values, "rayservice_models"))
    routes = {f"/{entry.get('id')}": path for path, entry in models if not entry.get("route_prefix")}
    for path, entry in models:
        yield from _model_id(path, entry.get("id", ABSENT), seen)
        yield from _model_source(path, entry)
        yield from _model_route(path, entry.get("route_prefix"), routes)
        yield from _model_resources(path, entry)
        yield from _model_engine(path, entry, values.get("rayservice_env"))
        yield from _model_deployment(path, entry)


def _model_route(path: str, prefix: Any, seen: dict[str, str]) -> Iterator[Problem]:
    where = f"{path}.route_prefix"
    if not isinstance(prefix, str) or not prefix:
        return
    if not prefix.startswith("/") or (prefix.endswith("/") and prefix != "/"):
        reason = "Serve's paths start with a slash and do not end with one"
        yield Problem(where, prefix, reason, f"write /{prefix.strip('/')}")
    elif prefix in seen:
        yield Problem(where, prefix, f"the path is taken by {seen[prefix]}", "give each model its own path")
    seen.setdefault(prefix, path)


def _model_id(path: str, name: Any, seen: dict[str, str]) -> Iterator[Problem]:
    where = f"{path}.id"
    if name is ABSENT or name is None or name == "":
        yield Problem(
            where, name, "a model without an id cannot be asked for", "give it a short name, such as llama-3-8b"
        )
        return
    if not isinstance(name, str):
        yield Problem(where, name, "an id is text", f'write "{name}"')
        return
    if not DNS_LABEL.fullmatch(name):
        yield Problem(
            where,
            name,
            "an id names Kubernetes and Serve objects, so it is a DNS label: a-z, 0-9 and inner hyphens, at most 63",
            as_label(name),
        )
    if name in seen:
        yield Problem(
            where,
            name,
            f"the id is taken by {seen[name]}",
            "give each model its own id, or delete one of the two",
        )
    seen.setdefault(name, path)


def _model_source(path: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    where = f"{path}.source"
    source = entry.get("source", ABSENT)
    if source is ABSENT or source is None or source == "":
        yield Problem(
            where,
            source,
            "a model without a source has no weights",
            "name a hub id (organisation/model), a folder, or an address such as s3://bucket/path",
        )
        return
    if not isinstance(source, str):
        return  # rayplane_preflight_text tells
    scheme, separator, rest = source.partition("://")
    if separator:
        if scheme not in _MODEL_SCHEMES:
            guess = nearest(scheme, _MODEL_SCHEMES, 0.4)
            yield Problem(
                where,
                source,
                f"nothing here reads {scheme}:// addresses",
                f"use one of {', '.join(_MODEL_SCHEMES)}" + (f"; did you mean {guess}://?" if guess else ""),
            )
        elif scheme == "s3" and (found := bucket_name_problem(rest.partition("/")[0])):
            yield Problem(where, source, f"its bucket: {found[0]}", found[1])
    elif not source.startswith(("/", "./", "../", "~")) and ":" not in source and not HUB_ID.fullmatch(source):
        yield Problem(
            where,
            source,
            "it is neither a hub id (organisation/model) nor a folder nor an address",
            "write organisation/model, a path that starts with / or ./, or an address such as s3://bucket/path",
        )


def _model_resources(path: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    resources = entry.get("resources")
    if not isinstance(resources, Mapping):
        return
    where = f"{path}.resources"
    for name in ("cpu", "memory"):
        if name in resources and (found := quantity_problem(resources[name])):
            yield Problem(f"{where}.{name}", resources[name], found[0], found[1])
    gpu: Any = resources.get("gpu")
    if whole(gpu) and gpu < 0:
        yield Problem(f"{where}.gpu", gpu, "a number of GPUs cannot be negative", "write 0 or more")
    if resources.get("accelerator") and not gpu:
        yield Problem(
            f"{where}.accelerator",
            resources["accelerator"],
            "the model names a kind of GPU and asks for none",
            f"set {where}.gpu to 1 or more, or leave accelerator out",
        )


def _model_engine(path: str, entry: Mapping[str, Any], common: Any) -> Iterator[Problem]:
    engine = entry.get("engine")
    if not isinstance(engine, Mapping):
        return
    where = f"{path}.engine"
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_loras",
        "block_size",
    ):
        value: Any = engine.get(name)
        if whole(value) and value < 1 and (name, value) != ("max_model_len", -1):
            yield Problem(f"{where}.{name}", value, "it is a whole number from 1 on", "write 1 or more")
    share = engine.get("gpu_memory_utilization")
    if isinstance(share, int | float) and not isinstance(share, bool) and not 0 < share <= 1:
        yield Problem(
            f"{where}.gpu_memory_utilization",
            share,
            "it is a share of the GPU's memory, above 0 and at most 1",
            "write 0.9, for example",
        )
    yield from _parallelism(path, entry, engine)
    yield from _lengths(where, entry, engine, common)
    for name in ("model", "served_model_name"):
        if name in engine:
            yield Problem(
                f"{where}.{name}",
                engine[name],
                f"the model's own {'source' if name == 'model' else 'id'} says this",
                f"set {path}.{'source' if name == 'model' else 'id'} and delete it here",
            )


def _parallelism(path: str, entry: Mapping[str, Any], engine: Mapping[str, Any]) -> Iterator[Problem]:
    """A tensor-parallel group sits in one pod, on the GPUs of one node; pipeline stages may sit in several."""
    resources = entry.get("resources")
    gpu = resources.get("gpu", 0) if isinstance(resources, Mapping) else 0
    if not whole(gpu) or gpu < 0 or entry.get("placement"):
        return
    tensor, pipeline = engine.get("tensor_parallel_size", 1), engine.get("pipeline_parallel_size", 1)
    if whole(tensor) and tensor > max(gpu, 1):
        yield Problem(
            f"{path}.engine.tensor_parallel_size",
            tensor,
            f"each of the {tensor} shards needs a GPU of the same node, and resources.gpu is {gpu}",
            f"set {path}.resources.gpu to {tensor}, on nodes that have as many, or lower tensor_parallel_size",
        )
    if whole(pipeline) and pipeline > 1 and not gpu:
        yield Problem(
            f"{path}.engine.pipeline_parallel_size",
            pipeline,
            "each pipeline stage needs GPUs, and resources.gpu is 0",
            f"set {path}.resources.gpu, or take pipeline_parallel_size out",
        )


def _lengths(where: str, entry: Mapping[str, Any], engine: Mapping[str, Any], common: Any) -> Iterator[Problem]:
    length: Any = engine.get("max_model_len")
    batched: Any = engine.get("max_num_batched_tokens")
    if not whole(length) or length < 1:
        return
    if whole(batched) and batched < length and engine.get("enable_chunked_prefill") is False:
        yield Problem(
            f"{where}.max_num_batched_tokens",
            batched,
            f"without chunked prefill a whole prompt must fit in one batch, and max_model_len is {length}",
            f"write {length} or more, or set enable_chunked_prefill to true",
        )
    known = (env for env in (entry.get("env"), common) if isinstance(env, Mapping) and _LONGER in env)
    if "hf_overrides" in engine or str(next(known, {}).get(_LONGER)).strip().lower() in ("1", "true"):
        return
    shape = shape_of(entry.get("source"))
    if shape and length > shape.length:
        yield Problem(
            f"{where}.max_model_len",
            length,
            f"the model's own context is {shape.length} tokens",
            f"write {shape.length} or less",
        )


def _model_deployment(path: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    deployment = entry.get("deployment")
    if not isinstance(deployment, Mapping):
        return
    where = f"{path}.deployment"
    if "num_replicas" in deployment and ("autoscaling_config" in deployment or "replicas" in entry):
        other = "replicas" if "replicas" in entry else "deployment.autoscaling_config"
        yield Problem(
            f"{where}.num_replicas",
            deployment["num_replicas"],
            f"{path}.{other} sets the number of replicas, too, and Serve takes one of the two",
            "delete num_replicas",
        )
    for name in sorted(deployment):
        if str(name).startswith("placement_group_"):
            yield Problem(
                f"{where}.{name}",
                deployment[name],
                "Ray Serve LLM refuses placement groups among the deployment's options",
                "delete it; Serve builds one bundle a GPU from the engine's parallelism",
            )


def operator(values: Values) -> Iterator[Problem]:
    """The operator knows its feature gates: it does not start with one that it does not know. Source: KubeRay,
    ray-operator/pkg/features/features.go of v1.6.2 and v1.7.0."""
    source, given = values.get("kuberay_kustomize_source"), values.get("kuberay_feature_gates")
    gates: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    ref = re.search(r"[?&]ref=v(\d+)\.(\d+)", source) if isinstance(source, str) else None
    if values.get("kuberay_existing_operator") == "use" or ref is None or (int(ref[1]), int(ref[2])) >= (1, 7):
        return
    for gate in sorted(_GATES_OF_1_7 & gates.keys()):
        yield Problem(
            f"kuberay_feature_gates.{gate}",
            gates[gate],
            f"KubeRay has this gate from 1.7 on, kuberay_kustomize_source is {ref[1]}.{ref[2]}, and the operator does"
            " not start with a gate that it does not know",
            "delete it, or let kuberay_kustomize_source end in ?ref=v1.7.1",
        )


def rayservice(values: Values) -> Iterator[Problem]:
    """The RayService: its name, its versions, how it is upgraded and reached."""
    name = values.get("rayservice_name")
    if isinstance(name, str):
        if not DNS_1035_LABEL.fullmatch(name):
            reason = "a RayService's name is a DNS label that starts with a letter: a-z, 0-9 and inner hyphens"
            yield Problem("rayservice_name", name, reason, as_label(name, letter=True))
        elif len(name) > _LONGEST_RAYSERVICE_NAME:
            reason = f"KubeRay takes at most {_LONGEST_RAYSERVICE_NAME} characters, this name has {len(name)}"
            yield Problem(
                "rayservice_name", name, reason, f"write {name[:_LONGEST_RAYSERVICE_NAME].rstrip('-')}, for example"
            )
    yield from _image(values.get("rayservice_image"), values.get("rayservice_ray_version"))
    ray, mode = values.get("rayservice_ray_version"), values.get("rayservice_auth_mode")
    series = re.match(r"(\d+)\.(\d+)", ray) if isinstance(ray, str) else None
    if mode == "token" and series and (int(series[1]), int(series[2])) < (2, 52):
        yield Problem(
            "rayservice_auth_mode",
            mode,
            f"Ray knows tokens from 2.52 on, rayservice_ray_version is {ray}",
            "set it to disabled, or take a later Ray",
        )
    strategy = values.get("rayservice_upgrade_strategy")
    if strategy == "NewClusterWithIncrementalUpgrade" and values.get("rayservice_autoscaling") is False:
        yield Problem(
            "rayservice_upgrade_strategy",
            strategy,
            "KubeRay moves traffic step by step only between clusters that its autoscaler resizes",
            "set rayservice_autoscaling to true, or rayservice_upgrade_strategy to NewCluster",
        )
    ingress = values.get("rayservice_ingress")
    if isinstance(ingress, Mapping):
        yield from bounds("rayservice_ingress", ingress.get("min"), ingress.get("max"))
        target: Any = ingress.get("target_ongoing_requests")
        most: Any = ingress.get("max_ongoing_requests")
        if whole(target) and whole(most) and target > most > 0:
            yield Problem(
                "rayservice_ingress.target_ongoing_requests",
                target,
                f"a replica never has more than max_ongoing_requests, {most}: Serve would never add one",
                f"write {max(1, most * 3 // 4)}, for example, or raise max_ongoing_requests",
            )
    port: Any = values.get("rayservice_node_port")
    if whole(port) and port != 0 and not 30000 <= port <= 32767:
        yield Problem(
            "rayservice_node_port",
            port,
            "Kubernetes gives out node ports from 30000 to 32767",
            "write 30080, for example",
        )


def _image(image: Any, ray: Any) -> Iterator[Problem]:
    """Where the image's tag tells a Ray release, it is the one KubeRay is told."""
    tag = re.search(r":(\d+\.\d+\.\d+)(?:[-.][^/]*)?$", image) if isinstance(image, str) else None
    if tag and isinstance(ray, str) and ray and tag[1] != ray:
        yield Problem(
            "rayservice_ray_version",
            ray,
            f"the tag of rayservice_image says Ray {tag[1]}",
            f"write {tag[1]}, or take another image",
        )


def worker_groups(values: Values) -> Iterator[Problem]:
    """Head and worker groups: one kind of resource declaration, sizes, and a home for every model's accelerator."""
    yield from _sizes("rayservice_head", values.get("rayservice_head"))
    groups = list(entries_of(values, "rayservice_worker_groups"))
    if not groups:
        return
    offered: set[str] = set()
    seen: dict[str, str] = {}
    for path, group in groups:
        yield from bounds(path, group.get("min"), group.get("max"))
        yield from _sizes(path, group)
        name = group.get("name")
        yield from taken_name(path, name, seen)
        offered |= {str(group.get("accelerator") or ""), ray_name(str(group.get("accelerator") or "")).lower()}
        extra = group.get("ray_resources")
        offered.update(
            str(key).removeprefix("accelerator_type:").lower() for key in (extra if isinstance(extra, Mapping) else ())
        )
    for path, entry in entries_of(values, "rayservice_models"):
        resources = entry.get("resources")
        accelerator = resources.get("accelerator") if isinstance(resources, Mapping) else None
        if isinstance(accelerator, str) and accelerator and not {accelerator, ray_name(accelerator).lower()} & offered:
            yield Problem(
                f"{path}.resources.accelerator",
                accelerator,
                "no worker group declares it, so Ray's autoscaler would never start a worker for the model",
                f"add accelerator: {accelerator} to a worker group, or empty rayservice_worker_groups: groups are then"
                " derived from the models",
            )


def _sizes(path: str, group: Any) -> Iterator[Problem]:
    if not isinstance(group, Mapping):
        return
    for key in ("cpu", "memory", "memory_limit", "cpu_limit"):
        if group.get(key) and (found := quantity_problem(group[key])):
            yield Problem(f"{path}.{key}", group[key], found[0], found[1])
    params = group.get("ray_start_params")
    for key, own in _GROUP_KEYS.items():
        if isinstance(params, Mapping) and key in params:
            yield Problem(
                f"{path}.ray_start_params.{key}",
                params[key],
                "cpu, gpu and ray_resources declare the resources, and KubeRay refuses to have them declared twice",
                f"delete it and set the group's {own}",
            )


def secrets(values: Values) -> Iterator[Problem]:
    """The Hugging Face token has a token's shape; without one, only open models can be fetched."""
    name = "secrets_hugging_face_token"
    token = values.get(name)
    if isinstance(token, str) and token and not re.fullmatch(r"hf_[A-Za-z0-9]{20,}", token):
        yield Problem(
            name,
            token,
            "a Hugging Face token starts with hf_ and goes on with 20 letters and digits or more",
            "copy it again from the account's settings; look for quotes and blanks around it",
        )
    elif token in (None, "") and name in values and (hub := [source for _, source in hub_models(values)]):
        yield Problem(
            name,
            ABSENT,
            f"no Hugging Face token: gated models cannot be fetched (from the hub: {', '.join(hub)})",
            "set HUGGING_FACE_HUB_TOKEN in the environment, if one of them is gated",
            warning=True,
        )
