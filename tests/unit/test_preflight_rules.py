"""Rules over declared variables: each bad input is found, told with its cure, and good input passes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import gpus_of_instance
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.rules import (
    RULES,
    check_declared,
    required_tools,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.specs import check_options
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    DNS_LABEL,
    as_label,
    bucket_name_problem,
    quantity_problem,
)
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st

GOOD: dict[str, Any] = {
    "platform": "aws",
    "platform_cluster_name": "ray-llm-cluster-prod",
    "platform_region": "us-west-2",
    "platform_namespace": "rayplane",
    "platform_tags": {"Project": "rayplane"},
    "platform_models_bucket": "ray-llm-cluster-prod-models",
    "platform_datasets_bucket": "ray-llm-cluster-prod-datasets",
    "network_vpc_cidr": "10.0.0.0/16",
    "network_availability_zones": ["us-west-2a", "us-west-2b", "us-west-2c"],
    "network_private_subnet_cidrs": [],
    "network_public_subnet_cidrs": [],
    "eks_node_groups": [
        {"name": "cpu", "instance_types": ["m5.2xlarge"], "min_size": 2, "max_size": 5, "desired_size": 2},
        {
            "name": "gpu",
            "instance_types": ["g4dn.xlarge"],
            "ami_type": "AL2023_x86_64_NVIDIA",
            "min_size": 1,
            "max_size": 10,
            "desired_size": 2,
        },
    ],
    "kubeconfig_source": "cloud",
    "secrets_hugging_face_token": "hf_" + "a" * 34,
    "kuberay_kustomize_source": "https://github.com/ray-project/kuberay/ray-operator/config/default?ref=v1.6.2",
    "kuberay_feature_gates": {"RayClusterStatusConditions": True},
    "rayservice_name": "rayplane",
    "rayservice_ray_version": "2.60.0",
    "rayservice_image": "rayproject/ray-llm:2.60.0-py312-cu130",
    "rayservice_autoscaling": True,
    "rayservice_upgrade_strategy": "NewCluster",
    "rayservice_node_port": 30080,
    "rayservice_head": {"cpu": 1, "memory": "4Gi"},
    "rayservice_worker_groups": [],
    "rayservice_models": [
        {
            "id": "qwen",
            "source": "Qwen/Qwen2.5-0.5B-Instruct",
            "replicas": {"min": 1, "max": 5, "target_ongoing_requests": 10},
            "resources": {"cpu": 4, "memory": "16Gi", "gpu": 1, "accelerator": "nvidia-t4"},
            "engine": {"tensor_parallel_size": 1, "max_model_len": 16384, "gpu_memory_utilization": 0.85},
        }
    ],
}


def model(**changes: Any) -> dict[str, Any]:
    """The good list's model with keys changed; None takes a key out."""
    entry = {**GOOD["rayservice_models"][0], **changes}
    return {key: value for key, value in entry.items() if value is not None}


def found(**changes: Any) -> dict[str, Problem]:
    """Problems of the good values with some changed, by variable."""
    return {problem.variable: problem for problem in check_declared({**GOOD, **changes})}


@pytest.mark.parametrize(
    ("group", "variable", "warning"),
    [
        ({"instance_types": ["g4dn.xlarge"], "ami_type": "AL2023_x86_64_NVIDIA"}, "", False),
        ({"instance_types": ["m7g.large"], "ami_type": "AL2023_x86_64_STANDARD"}, "eks_node_groups[0].ami_type", False),
        ({"instance_types": ["m5.large"], "ami_type": "AL2023_x86_64_NVIDIA"}, "eks_node_groups[0].ami_type", False),
        ({"instance_types": ["m5.large"], "capacity_type": "SPOT"}, "eks_node_groups[0].instance_types", True),
        ({"instance_types": []}, "eks_node_groups[0].instance_types", False),
        ({"instance_types": [], "launch_template": {"id": "lt-1"}, "ami_type": "AL2023_x86_64_NVIDIA"}, "", False),
    ],
)
def test_images_fit_the_machines(group: dict[str, Any], variable: str, warning: bool) -> None:
    from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.platform import node_groups

    found = list(node_groups({"platform": "aws", "eks_node_groups": [{"name": "g", **group}]}))
    assert [(problem.variable, problem.warning) for problem in found] == ([(variable, warning)] if variable else [])


def test_gpus_that_a_launch_template_names_are_taken_on_trust() -> None:
    group = {"name": "gpu", "max_size": 2, "launch_template": {"id": "lt-1"}}
    wants = [model(resources={"cpu": 4, "memory": "16Gi", "gpu": 8})]
    template = found(eks_node_groups=[{**group, "instance_types": []}], rayservice_models=wants)
    assert "rayservice_models[0].resources.gpu" not in template
    named = found(eks_node_groups=[{**group, "instance_types": ["g4dn.xlarge"]}], rayservice_models=wants)
    assert "rayservice_models[0].resources.gpu" in named


LOGS = {"network_flow_logs": True, "network_flow_logs_destination": "s3", "platform_logs_bucket": "logs"}


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        # The logs bucket is made after the network; role storage makes the flow log with it.
        ({"network_flow_logs_bucket": "logs", "storage_log_writers": ["vended_logs", "access_logs"]}, ""),
        ({"network_flow_logs_bucket": "logs", "storage_log_writers": ["access_logs"]}, "storage_log_writers"),
        ({"network_flow_logs_bucket": "another", "storage_log_writers": []}, ""),
        ({"network_flow_logs_bucket": "logs", "storage_log_writers": [], "network_flow_logs": False}, ""),
        (
            {
                "network_flow_logs_bucket": "logs",
                "storage_log_writers": [],
                "network_flow_logs_destination": "cloudwatch",
            },
            "",
        ),
    ],
)
def test_the_logs_bucket_admits_flow_logs_that_go_there(changes: dict[str, Any], variable: str) -> None:
    assert list(found(**LOGS | changes)) == ([variable] if variable else [])


CLOSED = ["ec2", "ecr.api", "ecr.dkr", "eks-auth", "sts"]


@pytest.mark.parametrize(
    ("changes", "missing", "warning"),
    [
        ({"network_interface_endpoints": CLOSED}, "", False),
        ({}, "ec2, ecr.api, ecr.dkr, eks-auth, sts", False),
        ({"network_existing_vpc_id": "vpc-1"}, "ec2, ecr.api, ecr.dkr, eks-auth, sts", True),
        ({"network_existing_private_subnet_ids": ["subnet-1", "subnet-2"]}, "", False),
        ({"network_nat_mode": "single"}, "", False),
        ({"network_interface_endpoints": CLOSED[1:], "platform_autoscaler": "karpenter"}, "ec2, eks, sqs, ssm", False),
        (
            {"network_interface_endpoints": [*CLOSED, "eks", "sqs"], "platform_autoscaler": "karpenter"}
            | {"network_admin_access": "ssm"},
            "",
            False,
        ),
    ],
)
def test_without_nat_gateways_endpoints_are_the_only_way(changes: dict[str, Any], missing: str, warning: bool) -> None:
    values = {"network_nat_mode": "none", "network_interface_endpoints": [], **changes}
    problem = found(**values).get("network_interface_endpoints")
    assert (problem is not None) == bool(missing)
    if problem is not None:
        assert (problem.reason.endswith(f"nothing reaches {missing}"), problem.warning) == (True, warning)


def test_good_values_have_no_problem() -> None:
    assert found() == {}


def test_no_values_at_all_lack_only_the_platform() -> None:
    assert [problem.variable for problem in check_declared({})] == ["platform"]


@pytest.mark.parametrize(
    ("changes", "variable", "reason", "cure"),
    [
        ({"platform": "amazon"}, "platform", "unknown platform", "did you mean aws?"),
        ({"platform": "azrue"}, "platform", "unknown platform", "did you mean azure?"),
        ({"platform": "gcp"}, "platform", "no role builds this cloud", "set platform to existing"),
        ({"platform": ""}, "platform", "every cluster states", "aws, gcp, azure, existing"),
        ({"platform_namespace": "Ray_Plane"}, "platform_namespace", "DNS label", "write ray-plane"),
        ({"platform_cluster_name": "ray llm!"}, "platform_cluster_name", "EKS takes", "write ray-llm"),
        ({"platform_region": "us-west-2a"}, "platform_region", "form of an AWS region", "without the zone's letter"),
        ({"platform_tags": {"aws:x": "y"}}, "platform_tags.aws:x", "belong to AWS", "another key"),
        ({"platform_tags": {"x": "y" * 257}}, "platform_tags.x", "at most 128", "shorten"),
        ({"platform_models_bucket": "My_Models"}, "platform_models_bucket", "lower-case", "write my-models"),
        (
            {"platform_datasets_bucket": "ray-llm-cluster-prod-models"},
            "platform_datasets_bucket",
            "name of platform_models_bucket, too",
            "its own name",
        ),
        ({"network_vpc_cidr": "10.0.0.1/16"}, "network_vpc_cidr", "host bits", "write 10.0.0.0/16"),
        ({"network_vpc_cidr": "ten"}, "network_vpc_cidr", "no CIDR block", "10.0.0.0/16"),
        ({"network_vpc_cidr": "10.0.0.0/27"}, "network_vpc_cidr", "does not hold", "/25"),
        (
            {"network_private_subnet_cidrs": ["10.0.0.0/20", "10.0.16.0/20", "192.168.0.0/20"]},
            "network_vpc_cidr",
            "not inside",
            "within it",
        ),
        ({"network_public_subnet_cidrs": ["10.0.0.0/33"]}, "network_public_subnet_cidrs[0]", "no CIDR block", "write"),
        (
            {"eks_node_groups": [{"name": "a", "min_size": 5, "max_size": 2}]},
            "eks_node_groups[0].max_size",
            "below min_size, which is 5",
            "write 5 or more",
        ),
        (
            {"eks_node_groups": [{"name": "a", "min_size": 1, "max_size": 2, "desired_size": 9}]},
            "eks_node_groups[0].desired_size",
            "outside min_size to max_size, 1 to 2",
            "write 2",
        ),
        (
            {"eks_node_groups": [{"name": "a", "max_size": 2}, {"name": "a", "max_size": 2}]},
            "eks_node_groups[1].name",
            "taken by eks_node_groups[0]",
            "its own name",
        ),
        ({"secrets_hugging_face_token": "'hf_x'"}, "secrets_hugging_face_token", "starts with hf_", "copy it again"),
        ({"rayservice_name": "Ray"}, "rayservice_name", "starts with a letter", "write ray"),
        ({"rayservice_name": "9ray"}, "rayservice_name", "starts with a letter", "write r9ray"),
        ({"rayservice_name": "a" * 48}, "rayservice_name", "at most 47 characters, this name has 48", "a" * 47),
        ({"rayservice_image": "rayproject/ray-llm:2.56.0-py312"}, "rayservice_ray_version", "Ray 2.56.0", "write 2.56"),
        (
            {"rayservice_upgrade_strategy": "NewClusterWithIncrementalUpgrade", "rayservice_autoscaling": False},
            "rayservice_upgrade_strategy",
            "autoscaler",
            "rayservice_autoscaling to true",
        ),
        (
            {"kuberay_feature_gates": {"RayCronJob": True, "RayClusterMTLS": False}},
            "kuberay_feature_gates.RayClusterMTLS",
            "from 1.7 on, kuberay_kustomize_source is 1.6",
            "?ref=v1.7.1",
        ),
        (
            {
                "rayservice_auth_mode": "token",
                "rayservice_ray_version": "2.51.0",
                "rayservice_image": "x/y",
            },
            "rayservice_auth_mode",
            "from 2.52 on, rayservice_ray_version is 2.51.0",
            "disabled",
        ),
        ({"rayservice_ingress": {"min": 3, "max": 1}}, "rayservice_ingress.max", "below min, which is 3", "write 3"),
        (
            {"rayservice_ingress": {"target_ongoing_requests": 50, "max_ongoing_requests": 20}},
            "rayservice_ingress.target_ongoing_requests",
            "never has more",
            "write 15",
        ),
        ({"rayservice_node_port": 8000}, "rayservice_node_port", "30000 to 32767", "30080"),
        ({"rayservice_head": {"memory": "16GB"}}, "rayservice_head.memory", "no Kubernetes quantity", "write 16Gi"),
    ],
)
def test_bad_platform_and_rayservice(changes: dict[str, Any], variable: str, reason: str, cure: str) -> None:
    problem = found(**changes)[variable]
    assert reason in problem.reason
    assert cure in problem.cure
    assert not problem.warning


@pytest.mark.parametrize(
    "changes",
    [
        {"kuberay_kustomize_source": "https://host/kuberay/ray-operator/config/default?ref=v1.7.1"},
        {"kuberay_kustomize_source": "/folder"},
        {"kuberay_existing_operator": "use"},
    ],
)
def test_gates_of_an_operator_that_may_know_them(changes: dict[str, Any]) -> None:
    assert found(kuberay_feature_gates={"RayClusterMTLS": True}, **changes) == {}


@pytest.mark.parametrize(
    ("entry", "variable", "reason", "cure"),
    [
        (model(id=None), "id", "without an id", "short name"),
        (model(id=""), "id", "without an id", "short name"),
        (model(id=8), "id", "is text", 'write "8"'),
        (model(id="Llama_3.1"), "id", "DNS label", "write llama-3-1"),
        (model(id="-x"), "id", "DNS label", "write x"),
        (model(id="a" * 64), "id", "DNS label", "write " + "a" * 63),
        (model(source=None), "source", "no weights", "organisation/model"),
        (model(source=""), "source", "no weights", "s3://"),
        (model(source="llama"), "source", "neither a hub id", "organisation/model"),
        (model(source="ss3://bucket/x"), "source", "nothing here reads ss3://", "did you mean s3://?"),
        (model(source="s3://My_Bucket/x"), "source", "its bucket", "write my-bucket"),
        (model(replicas={"min": -1, "max": 1}), "replicas.min", "negative", "0 or more"),
        (model(replicas={"min": 3, "max": 1}), "replicas.max", "below min, which is 3", "write 3 or more"),
        (model(replicas={"min": 0, "max": 0}), "replicas.max", "never be one", "1 or more"),
        (
            model(replicas={"min": 1, "max": 1, "target_ongoing_requests": 0}),
            "replicas.target_ongoing_requests",
            "above 0",
            "10",
        ),
        (model(resources={"gpu": -1}), "resources.gpu", "negative", "0 or more"),
        (model(resources={"gpu": 1, "memory": "16 GB"}), "resources.memory", "no Kubernetes quantity", "write 16Gi"),
        (model(resources={"gpu": 1, "cpu": 0}), "resources.cpu", "above 0", "1 or more"),
        (model(resources={"accelerator": "nvidia-t4"}), "resources.accelerator", "asks for none", "gpu to 1"),
        (model(resources={"gpu": 4}), "resources.gpu", "largest node of eks_node_groups has 1", "4 GPUs"),
        (model(engine={"tensor_parallel_size": 2}), "engine.tensor_parallel_size", "resources.gpu is 1", "gpu to 2"),
        (model(engine={"tensor_parallel_size": 0}), "engine.tensor_parallel_size", "from 1 on", "1 or more"),
        (
            model(engine={"tensor_parallel_size": 2}, resources=None),
            "engine.tensor_parallel_size",
            "resources.gpu is 0",
            "gpu to 2",
        ),
        (
            model(engine={"pipeline_parallel_size": 2}, resources=None),
            "engine.pipeline_parallel_size",
            "each pipeline stage needs GPUs",
            "resources.gpu",
        ),
        (
            model(source="HuggingFaceTB/SmolLM2-135M-Instruct", engine={"max_model_len": 16384}),
            "engine.max_model_len",
            "8192 tokens",
            "8192 or less",
        ),
        (
            model(engine={"max_model_len": 8192, "max_num_batched_tokens": 4096, "enable_chunked_prefill": False}),
            "engine.max_num_batched_tokens",
            "without chunked prefill",
            "enable_chunked_prefill",
        ),
        (model(engine={"gpu_memory_utilization": 85}), "engine.gpu_memory_utilization", "share", "0.9"),
        (model(engine={"model": "x/y"}), "engine.model", "source", "rayservice_models[0].source"),
        (model(deployment={"num_replicas": 2}), "deployment.num_replicas", "one of the two", "delete num_replicas"),
        (
            model(deployment={"placement_group_bundles": []}),
            "deployment.placement_group_bundles",
            "refuses placement groups",
            "delete it",
        ),
        (
            model(deployment={"autoscaling_config": {"min_replicas": 2, "max_replicas": 1}}),
            "deployment.autoscaling_config.max_replicas",
            "below min_replicas",
            "2 or more",
        ),
    ],
)
def test_bad_model(entry: dict[str, Any], variable: str, reason: str, cure: str) -> None:
    problem = found(rayservice_models=[entry])[f"rayservice_models[0].{variable}"]
    assert reason in problem.reason
    assert cure in problem.cure


SPEC = yaml.safe_load((Path(__file__).parents[2] / "roles/rayservice/meta/argument_specs.yml").read_text("utf-8"))
MODELS = {"rayservice_models": SPEC["argument_specs"]["main"]["options"]["rayservice_models"]}


@pytest.mark.parametrize(
    ("entry", "key", "cure"),
    [
        (model(replica={"min": 1}), "replica", "did you mean replicas?"),
        (model(replicas={"minimum": 1}), "replicas.minimum", "did you mean min?"),
        (model(resources={"gpus": 1, "gpu": 1}), "resources.gpus", "did you mean gpu?"),
        (model(canary={"percent": 10}), "canary", "delete it; known keys are access"),
        (model(replicas={"min": "one"}), "replicas.min", "write 3 without quotes"),
        (model(resources="big"), "resources", "write {key: value} without quotes"),
        (model(id=None), "id", "set it: The name that callers ask for"),
    ],
)
def test_the_spec_knows_a_models_keys(entry: dict[str, Any], key: str, cure: str) -> None:
    (problem,) = check_options({"rayservice_models": [entry]}, MODELS)
    assert problem.variable == f"rayservice_models[0].{key}"
    assert cure in problem.cure


def test_the_spec_takes_a_good_model() -> None:
    assert list(check_options({"rayservice_models": [model(env={"A": "b"}, verify={"expect": "Paris"})]}, MODELS)) == []


def test_paths_of_models_are_their_own() -> None:
    entries = [model(route_prefix="/a"), model(id="b", route_prefix="/a"), model(id="c", route_prefix="c/")]
    entries += [model(id="d", route_prefix="/e"), model(id="e")]
    problems = found(rayservice_models=entries)
    assert "taken by rayservice_models[0]" in problems["rayservice_models[1].route_prefix"].reason
    assert problems["rayservice_models[2].route_prefix"].cure == "write /c"
    assert "taken by rayservice_models[4]" in problems["rayservice_models[3].route_prefix"].reason


def test_an_empty_model_list_warns() -> None:
    assert found(rayservice_models=[])["rayservice_models"].warning


def test_duplicate_ids_name_the_first() -> None:
    problem = found(rayservice_models=[model(), model(id="other"), model()])["rayservice_models[2].id"]
    assert "taken by rayservice_models[0]" in problem.reason


def test_pipeline_stages_may_sit_on_several_nodes() -> None:
    assert found(rayservice_models=[model(engine={"pipeline_parallel_size": 4})]) == {}


@pytest.mark.parametrize(
    ("more", "own", "common", "allowed"),
    [
        ({"hf_overrides": {"rope_parameters": {}}}, {}, {}, True),
        ({}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, {}, True),
        ({}, {}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, True),
        ({}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "0"}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, False),
    ],
)
def test_a_longer_context_than_the_models_own(
    more: dict[str, Any], own: dict[str, str], common: dict[str, str], allowed: bool
) -> None:
    entry = model(source="HuggingFaceTB/SmolLM2-135M-Instruct", engine={"max_model_len": 16384, **more}, env=own)
    problems = found(rayservice_models=[entry], rayservice_env=common)
    assert (not problems) == allowed, problems


def test_context_of_a_local_model_is_read_from_its_folder(tmp_path: Path) -> None:
    shape = {
        **{"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 2048},
    }
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    problems = found(rayservice_models=[model(source=str(tmp_path), engine={"max_model_len": 4096})])
    assert "2048 tokens" in problems["rayservice_models[0].engine.max_model_len"].reason
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert found(rayservice_models=[model(source=str(tmp_path), engine={"max_model_len": 4096})]) == {}


def test_an_accelerator_needs_a_worker_group_that_declares_it() -> None:
    group = {"name": "gpu", "min": 0, "max": 2, "cpu": 4, "memory": "16Gi", "gpu": 1}
    where = "rayservice_models[0].resources.accelerator"
    assert "never start a worker" in found(rayservice_worker_groups=[group])[where].reason
    assert found(rayservice_worker_groups=[{**group, "accelerator": "nvidia-t4"}]) == {}
    assert found(rayservice_worker_groups=[{**group, "ray_resources": {"accelerator_type:T4": 1}}]) == {}


def test_a_worker_group_declares_its_resources_once() -> None:
    group = {"name": "cpu", "max": 2, "cpu": 4, "memory": "1Gi", "accelerator": "nvidia-t4"}
    for key in ("num-cpus", "num-gpus", "memory", "resources"):
        problems = found(rayservice_worker_groups=[{**group, "ray_start_params": {key: "1"}}])
        assert "twice" in problems[f"rayservice_worker_groups[0].ray_start_params.{key}"].reason
    doubled = found(rayservice_worker_groups=[group, group])
    assert "taken by rayservice_worker_groups[0]" in doubled["rayservice_worker_groups[1].name"].reason


def test_gpus_are_not_counted_on_nodes_of_a_given_cluster() -> None:
    entry = model(resources={"gpu": 8})
    assert found(rayservice_models=[entry], kubeconfig_source="given") == {}
    assert found(rayservice_models=[entry], eks_node_groups=[], platform_autoscaler="karpenter") == {}
    assert (
        "no group"
        in found(rayservice_models=[model()], eks_node_groups=[])["rayservice_models[0].resources.gpu"].reason
    )


def _shipped() -> dict[str, Any]:
    """The roles' defaults and production's values, templates as they are written."""
    files = [*PROJECT.glob("roles/*/defaults/main.yml"), *sorted(PROJECT.glob("inventories/prod/group_vars/all/*.yml"))]
    read = {name: value for file in files for name, value in yaml.safe_load(file.read_text()).items()}
    read["rayservice_models"][0]["resources"]["gpu_resource"] = "nvidia.com/gpu"
    return {
        **read,
        "eks_node_groups": GOOD["eks_node_groups"],
        "platform": "aws",
        "platform_autoscaler": "cluster_autoscaler",
        "gpu_plugin_enabled": True,
        "gateway_load_balancer": {"type": "nlb", "idle_timeout_s": 60, "allowed_cidrs": ["10.0.0.0/8"]},
        "rayservice_node_selector": {"kubernetes.io/os": "linux"},
        "rayservice_tolerations": [{"key": "a", "operator": "Exists"}],
    }


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


@pytest.mark.parametrize("wrong", [None, "{{ undefined }}", 5, ["a"], {"a": None}, {1: 2}], ids=str)
@pytest.mark.parametrize(
    "variable",
    ["rayservice_models", "rayservice_node_selector", "rayservice_tolerations", "rayservice_head",
     "eks_extra_node_groups", "eks_endpoint_public_cidrs", "gateway_load_balancer"],
)  # fmt: skip
def test_no_rule_breaks_on_a_value_of_another_type(variable: str, wrong: Any) -> None:
    values = _shipped()
    for place in list(_places(values[variable])):
        changed = copy.deepcopy(values[variable])
        inner: Any = changed
        for key in place[:-1]:
            inner = inner[key]
        if place:
            inner[place[-1]] = wrong
        list(check_declared({**values, variable: changed if place else wrong}))


def test_other_platforms_have_no_aws_rules() -> None:
    assert found(platform="existing", platform_region="anywhere", network_vpc_cidr="ten") == {}


def test_an_absent_token_warns_only_where_the_hub_is_used(tmp_path: Path) -> None:
    warning = found(secrets_hugging_face_token="")["secrets_hugging_face_token"]
    assert warning.warning
    assert warning.value is ABSENT
    assert found(secrets_hugging_face_token="", rayservice_models=[model(source="s3://bucket/x")]) == {}


def test_an_unknown_ray_release_and_a_dotted_bucket_only_warn() -> None:
    problems = found(rayservice_ray_version="2.99.0", rayservice_image="x/y", platform_models_bucket="a.b.c")
    assert [problem.warning for problem in problems.values()] == [True, True]


# --- values of any type ----------------------------------------------------------------------------------------------


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100000) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(set(GOOD) - {"platform"})), anything)
def test_rules_meet_any_type_without_failing(name: str, value: Any) -> None:
    for problem in check_declared({**GOOD, name: value}):
        assert problem.reason
        assert problem.cure


@given(st.sampled_from(sorted(GOOD["rayservice_models"][0])), anything)
def test_rules_meet_any_model_without_failing(key: str, value: Any) -> None:
    for problem in check_declared({**GOOD, "rayservice_models": [{**GOOD["rayservice_models"][0], key: value}]}):
        assert problem.cure


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_says_what_it_is_for(rule: Callable[..., Any]) -> None:
    assert rule.__doc__


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["abc", "my-models", "a.b.c", "1-2-3", "a" * 63, "model-s3", "xn-models"])
def test_bucket_names_s3_takes(name: str) -> None:
    assert bucket_name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("", "ab", "a" * 64, "-abc", "abc-", ".abc", "abc.", "Abc", "a_b", "a b", "a..b", "192.168.5.4", "xn--abc"),
        *(
            "sthree-abc",
            "amzn-s3-demo-abc",
            "abc-s3alias",
            "abc--ol-s3",
            "abc.mrap",
            "abc--x-s3",
            "abc--table-s3",
            "äbc",
        ),
    ],
)
def test_bucket_names_s3_refuses(name: str) -> None:
    problem = bucket_name_problem(name)
    assert problem
    reason, cure = problem
    assert reason
    if write := re.fullmatch(r"write (\S+)", cure):
        assert bucket_name_problem(write[1]) is None


@given(st.text(max_size=80))
def test_a_bucket_name_we_propose_is_one(name: str) -> None:
    problem = bucket_name_problem(name)
    if problem and (write := re.fullmatch(r"write (.+)", problem[1])):
        again = bucket_name_problem(write[1])
        # Only reserved words and the shape of an address may be left: each is told in the next run.
        assert again is None or "belong to AWS" in again[0] or "IP address" in again[0]


@given(st.text(max_size=80))
def test_a_label_we_propose_is_one(name: str) -> None:
    for letter in (False, True):
        cure = as_label(name, letter)
        if cure.startswith("write "):
            assert DNS_LABEL.fullmatch(cure.removeprefix("write "))


@pytest.mark.parametrize("value", [1, 0.5, "1", "500m", "16Gi", "1.5G", "1e3", "100Mi", ".5"])
def test_quantities_kubernetes_takes(value: Any) -> None:
    assert quantity_problem(value) is None


@pytest.mark.parametrize("value", ["16GB", "16 Gi", "16gb", "", "x", True, None, [], 0, "0Gi", -1, "1GiB", "1 m"])
def test_quantities_kubernetes_refuses(value: Any) -> None:
    assert quantity_problem(value)


@pytest.mark.parametrize(
    ("kind", "gpus"),
    [
        ("m5.2xlarge", 0),
        ("g4dn.xlarge", 1),
        ("g4dn.12xlarge", 4),
        ("g5.48xlarge", 8),
        ("p3.2xlarge", 1),
        ("p3.8xlarge", 4),
        ("p5.48xlarge", 8),
        ("p9.huge", None),
        ("inf2.xlarge", 0),
    ],
)
def test_gpus_of_instances(kind: str, gpus: int | None) -> None:
    assert gpus_of_instance(kind) == gpus


def test_tools_depend_on_what_is_used() -> None:
    values = {
        "kuberay_kubectl": "kubectl",
        "kuberay_kustomize_source": "https://host/x?ref=1",
        "verify_kubectl": "kubectl",
    }
    assert set(required_tools(values)) == {"kubectl", "git"}
    assert set(required_tools({**values, "kuberay_kustomize_source": "/folder"})) == {"kubectl"}
    assert required_tools({"verify_kubectl": "kubectl", "verify_base_url": "http://x"}) == {}
