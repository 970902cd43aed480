"""The Serve configuration, the Ray groups and the RayService that the model list becomes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.filter.rayplane_serve import (
    FilterModule,
    rayservice_alignment,
    rayservice_objects,
    rayservice_routes,
    rayservice_serve_config,
    rayservice_worker_groups,
    smoke_questions,
)
from hypothesis import given
from hypothesis import strategies as st

PROJECT = Path(__file__).resolve().parents[2]

LLAMA: dict[str, Any] = {
    "id": "llama-3-8b",
    "source": "meta-llama/Llama-3.1-8B-Instruct",
    "replicas": {"min": 1, "max": 5, "target_ongoing_requests": 10},
    "resources": {"cpu": 4, "memory": "16Gi", "gpu": 1, "accelerator": "nvidia-t4"},
    "engine": {"max_model_len": 16384, "max_num_batched_tokens": 4096, "enable_chunked_prefill": True},
}
SMALL: dict[str, Any] = {
    "id": "small",
    "source": "/models/small",
    "replicas": {"min": 1, "max": 2},
    "resources": {"cpu": 2, "memory": "3Gi"},
    "engine": {"enforce_eager": True, "max_model_len": 2048},
    "env": {"VLLM_CPU_KVCACHE_SPACE": 1},
    "verify": {"expect": "Paris"},
}


def settings(**changes: Any) -> dict[str, Any]:
    """The role's defaults, as the role hands them to the filters."""
    defaults = yaml.safe_load((PROJECT / "roles/rayservice/defaults/main.yml").read_text())
    values = {name.removeprefix("rayservice_"): value for name, value in defaults.items()}
    return {**values, "namespace": "llm", "labels": {"app.kubernetes.io/component": "rayservice"}, **changes}


def rayservice(models: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    found = rayservice_objects(models, {"small": "s3://bucket/models/small/0123"}, settings(**changes))
    return next(item for item in found if item["kind"] == "RayService")


def test_one_application_a_model_in_stable_order() -> None:
    config = rayservice_serve_config([SMALL, LLAMA], {}, settings())
    assert [app["name"] for app in config["applications"]] == ["llama-3-8b", "small"]
    turned = rayservice_serve_config([LLAMA, SMALL], {}, settings())
    assert yaml.safe_dump(config) == yaml.safe_dump(turned)


def test_gpu_model() -> None:
    app = rayservice_serve_config([LLAMA], {}, settings())["applications"][0]
    llm = app["args"]["llm_configs"][0]
    assert app["import_path"] == "ray.serve.llm:build_openai_app"
    assert llm["accelerator_type"] == "T4"
    assert "placement_group_config" not in llm
    assert llm["model_loading_config"] == {"model_id": "llama-3-8b", "model_source": LLAMA["source"]}
    assert llm["deployment_config"]["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 5, "target_ongoing_requests": 10,
    }  # fmt: skip
    assert llm["engine_kwargs"] == LLAMA["engine"]
    # Left to itself Serve LLM's ingress would stay at one replica.
    assert app["args"]["ingress_deployment_config"]["autoscaling_config"]["max_replicas"] > 1


def test_cpu_model_has_bundles_and_no_accelerator() -> None:
    app = rayservice_serve_config([SMALL], {"small": "s3://bucket/models/small/0123"}, settings())["applications"][0]
    llm = app["args"]["llm_configs"][0]
    assert "accelerator_type" not in llm
    assert llm["placement_group_config"] == {"bundles": [{"CPU": 2}]}
    assert llm["model_loading_config"]["model_source"] == {"bucket_uri": "s3://bucket/models/small/0123"}
    assert llm["runtime_env"] == {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}}


def test_deployment_options_pass_through() -> None:
    model = {**SMALL, "deployment": {"max_ongoing_requests": 32, "autoscaling_config": {"upscale_delay_s": 5}}}
    config = rayservice_serve_config([model], {}, settings())
    deployment = config["applications"][0]["args"]["llm_configs"][0]["deployment_config"]
    assert deployment["max_ongoing_requests"] == 32
    assert deployment["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 5}


def test_routes() -> None:
    assert rayservice_routes([SMALL, LLAMA]) == {"small": "/small", "llama-3-8b": "/llama-3-8b"}
    assert rayservice_routes([{**SMALL, "route_prefix": "/"}]) == {"small": "/"}
    assert rayservice_routes([SMALL, LLAMA], gateway=True) == {"small": "/", "llama-3-8b": "/"}


def test_smoke_questions() -> None:
    assert smoke_questions([SMALL]) == [{"id": "small", "route_prefix": "/small", "expect": "Paris"}]


def test_derived_groups() -> None:
    big = {
        **LLAMA,
        "id": "big",
        "resources": {**LLAMA["resources"], "cpu": 8, "gpu": 2},
        "replicas": {"min": 0, "max": 2},
    }
    other = {**LLAMA, "id": "other", "resources": {"gpu": 1, "accelerator": "nvidia-l4"}}
    groups = rayservice_worker_groups([LLAMA, big, other], settings())
    assert [group["name"] for group in groups] == ["cpu", "nvidia-t4", "nvidia-l4"]
    t4 = groups[1]
    assert (t4["min"], t4["max"], t4["gpu"], t4["cpu"], t4["memory"]) == (1, 7, 2, 8, "16Gi")


@pytest.mark.parametrize(
    ("changes", "selector"),
    [
        ({}, {"k8s.amazonaws.com/accelerator": "nvidia-tesla-t4"}),
        ({"gpu_node_label": "karpenter.k8s.aws/instance-gpu-name"}, {"karpenter.k8s.aws/instance-gpu-name": "t4"}),
        ({"gpu_node_label": ""}, None),
        ({"accelerators": {"nvidia-t4": {"node_selector": {"pool": "mine"}}}}, {"pool": "mine"}),
        ({"worker_groups": [{"name": "own", "cpu": 1, "memory": "1Gi", "gpu": 1, "accelerator": "nvidia-t4"}]}, None),
    ],
)
def test_a_derived_group_takes_the_nodes_of_its_gpu(changes: dict[str, Any], selector: object) -> None:
    label = {"gpu_node_label": "k8s.amazonaws.com/accelerator"}
    groups = rayservice([LLAMA], **{**label, **changes})["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert groups[-1]["template"]["spec"].get("nodeSelector") == selector
    assert "nodeSelector" not in groups[0]["template"]["spec"] or len(groups) == 1


def test_groups_are_appended_for_a_new_accelerator() -> None:
    """KubeRay keeps the running cluster only where new groups come last."""
    before = rayservice_worker_groups([LLAMA], settings())
    after = rayservice_worker_groups(
        [LLAMA, {**LLAMA, "id": "b", "resources": {"gpu": 1, "accelerator": "nvidia-l4"}}], settings()
    )
    assert after[: len(before)] == before


def test_slices_have_groups_and_resources_of_their_own() -> None:
    device = "nvidia.com/mig-1g.10gb"
    sliced = {**LLAMA, "id": "sliced", "resources": {**LLAMA["resources"], "gpu_resource": device}}
    groups = rayservice([LLAMA, sliced])["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    asked = {group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups}
    assert asked["nvidia-t4"]["nvidia.com/gpu"] == "1"
    assert asked["nvidia-t4-mig-1g-10gb"][device] == "1"
    assert "nvidia.com/gpu" not in asked["nvidia-t4-mig-1g-10gb"]


def test_a_group_of_size_zero_declares_its_accelerator() -> None:
    model = {**LLAMA, "replicas": {"min": 0, "max": 3}}
    group = rayservice([model])["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    assert group["minReplicas"] == 0
    assert group["resources"] == {"CPU": "4", "GPU": "1", "accelerator_type:T4": "1"}
    # Both kinds of declaration in one group are refused by the operator.
    assert not {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])


def test_pods() -> None:
    spec = rayservice([LLAMA])["spec"]["rayClusterConfig"]
    head, gpu = spec["headGroupSpec"], spec["workerGroupSpecs"][1]["template"]["spec"]
    assert head["resources"] == {"CPU": "0"}
    assert head["template"]["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in head["template"]["spec"]["containers"][0]["env"]
    assert gpu["tolerations"][0] == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "serve", "containerPort": 8000} in head["template"]["spec"]["containers"][0]["ports"]
    assert head["template"]["spec"]["enableServiceLinks"] is gpu["enableServiceLinks"] is False
    names = [entry["name"] for entry in gpu["containers"][0]["env"]]
    assert "HF_TOKEN" in names
    assert "NVIDIA_VISIBLE_DEVICES" not in names


DRAFTED = {**SMALL, "engine": {"speculative_config": {"model": "meta-llama/Llama-3.2-1B", "method": "draft_model"}}}
TOKENIZED = {**SMALL, "engine": {"tokenizer": "meta-llama/Llama-3.1-8B"}}


@pytest.mark.parametrize(
    ("models", "told"),
    [([SMALL], False), ([LLAMA], True), ([SMALL, LLAMA], True), ([DRAFTED], True), ([TOKENIZED], True)],
)
def test_only_pods_that_read_from_the_hub_get_its_token(models: list[dict[str, Any]], told: bool) -> None:
    head = rayservice(models)["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert ("HF_TOKEN" in [entry["name"] for entry in head["containers"][0]["env"]]) is told


@pytest.mark.parametrize(("mode", "said"), [("disabled", ["disabled"] * 4), ("token", [])])
def test_authentication_is_stated(mode: str, said: list[str]) -> None:
    """To the operator, which makes the token, and to the pods, which it tells of tokens alone."""
    spec = rayservice([LLAMA], auth_mode=mode)["spec"]["rayClusterConfig"]
    assert (spec["rayVersion"], spec["authOptions"]) == ("2.60.0", {"mode": mode})
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    env = [entry for one in [*containers, spec["autoscalerOptions"]] for entry in one.get("env", [])]
    assert [entry["value"] for entry in env if entry["name"] == "RAY_AUTH_MODE"] == said


def test_autoscaling_is_one_switch() -> None:
    assert rayservice([LLAMA])["spec"]["rayClusterConfig"]["autoscalerOptions"]["version"] == "v2"
    off = rayservice([LLAMA], autoscaling=False)["spec"]["rayClusterConfig"]
    assert "enableInTreeAutoscaling" not in off
    assert "autoscalerOptions" not in off


def test_service() -> None:
    service = rayservice([SMALL], service_type="NodePort", node_port=30080)["spec"]["serveService"]
    assert service["spec"]["ports"][0]["nodePort"] == 30080
    assert "nodePort" not in rayservice([SMALL], node_port=30080)["spec"]["serveService"]["spec"]["ports"][0]


def test_engine_change_touches_serve_config_only() -> None:
    """So the operator takes it in place, and starts no second cluster."""
    before = rayservice([SMALL, LLAMA])["spec"]
    after = rayservice([{**SMALL, "engine": {"max_model_len": 1024}}, LLAMA])["spec"]
    assert before.pop("serveConfigV2") != after.pop("serveConfigV2")
    assert before == after


def test_alignment_leaves_replicas_to_the_autoscaler() -> None:
    scaled = rayservice_alignment([rayservice([LLAMA])])
    fixed = rayservice_alignment([rayservice([LLAMA], autoscaling=False)])
    assert "replicas" not in scaled[0]["merge"]["spec"]["workerGroupSpecs"][0]
    assert fixed[0]["merge"]["spec"]["workerGroupSpecs"][0]["replicas"] == 1
    assert fixed[1]["name"] == "rayplane-serve-svc"


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True, min_size=1), st.integers(0, 3), st.integers(1, 5))
def test_every_model_is_served_once(names: list[str], low: int, extra: int) -> None:
    models = [{**LLAMA, "id": name, "replicas": {"min": low, "max": low + extra}} for name in names]
    spec = rayservice(models)["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    assert sorted(app["name"] for app in config["applications"]) == sorted(names)
    assert len({app["route_prefix"] for app in config["applications"]}) == len(names)
    gpu = spec["rayClusterConfig"]["workerGroupSpecs"][1]
    assert (gpu["minReplicas"], gpu["maxReplicas"]) == (low * len(names), (low + extra) * len(names))
    json.dumps(spec)


def test_filters_are_named() -> None:
    assert set(FilterModule().filters()) >= {"rayservice_objects", "smoke_questions"}


SERVING = Path(os.environ.get("RAYPLANE_HOME") or Path.home() / ".cache/rayplane") / "serve/current/bin/python"

VALIDATE = """
import json, sys
from ray.serve.schema import ServeDeploySchema
from ray.serve.llm import LLMServingArgs
config = json.load(sys.stdin)
parsed = ServeDeploySchema.model_validate(config)
for app in config["applications"]:
    LLMServingArgs.model_validate(app["args"])
print(len(parsed.applications))
"""


@pytest.mark.skipif(not SERVING.exists(), reason="the serving environment (Ray, vLLM) is not on this machine")
@pytest.mark.timeout(300)
def test_real_ray_accepts_the_configuration() -> None:
    """Ray's own schemas take what the filters build, for a CPU and a GPU model with every key in use."""
    full = {
        **LLAMA,
        "deployment": {"max_ongoing_requests": 64, "max_queued_requests": 100, "health_check_period_s": 10},
        "replicas": {**LLAMA["replicas"], "initial": 2, "upscale_delay_s": 10, "downscale_delay_s": 300},
        "env": {"A": 1},
    }
    config = rayservice_serve_config([SMALL, full], {"small": "s3://bucket/models/small/0123"}, settings())
    environment = {**os.environ, "RAY_DEDUP_LOGS": "0", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [str(SERVING), "-c", VALIDATE],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("2")
