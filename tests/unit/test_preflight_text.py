"""What has to be text is text: labels, annotations, selectors, environment, tags, parameters of ray start."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.text import Respelled, texts
from hypothesis import given
from hypothesis import strategies as st


def found(**values: Any) -> dict[str, Problem]:
    """Problems by variable, each told once."""
    problems = list(texts({"rayservice_ray_version": "2.60.0", **values}))
    assert len({problem.variable for problem in problems}) == len(problems)
    return {problem.variable: problem for problem in problems}


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("gateway_service_annotations", {"internal": True}, ".internal"),
        ("gateway_pod_annotations", {"prometheus.io/port": 9090}, ".prometheus.io/port"),
        ("rayservice_node_selector", {"spot": False}, ".spot"),
        ("rayservice_env", {"HF_HUB_OFFLINE": False}, ".HF_HUB_OFFLINE"),
        ("gateway_env", {"RATIO": 0.5}, ".RATIO"),
        ("kuberay_env", [{"name": "DEBUG", "value": True}], "[0].value"),
        ("platform_tags", {"Managed": True}, ".Managed"),
        ("platform_tags", {"Version": 1.10}, ".Version"),
        ("eks_tags", {"Owner": None}, ".Owner"),
        ("gpu_plugin_service_monitor_labels", {"release": 1}, ".release"),
        ("rayservice_tolerations", [{"key": "spot", "value": True}], "[0].value"),
        ("eks_extra_node_groups", [{"labels": {"team": 42}}], "[0].labels.team"),
        ("eks_extra_node_groups", [{"taints": [{"key": "a", "value": 1}]}], "[0].taints[0].value"),
        ("rayservice_worker_groups", [{"ray_start_params": {"block": True}}], "[0].ray_start_params.block"),
        ("rayservice_models", [{"env": {"VLLM_USE_V2_MODEL_RUNNER": True}}], "[0].env.VLLM_USE_V2_MODEL_RUNNER"),
        ("rayservice_models", [{"revision": 20240918}], "[0].revision"),
        ("rayservice_models", [{"license": 2.0}], "[0].license"),
        ("rayservice_models", [{"revision": datetime.date(2024, 9, 18)}], "[0].revision"),
        (
            "autoscaler_node_pools",
            [{"requirements": [{"key": "spot", "values": [True]}]}],
            "[0].requirements[0].values[0]",
        ),
        ("namespaces_list", [{"name": "a", "annotations": {"x": True}}], "[0].annotations.x"),
        ("autoscaler_karpenter_values", {"podAnnotations": {"x": True}}, ".podAnnotations.x"),
        ("secrets_extra", [{"name": "a", "data": {"DEBUG": True}}], "[0].data.DEBUG"),
        ("autoscaler_node_pools", [{"labels": {"nested": {"x": "y"}}}], "[0].labels.nested"),
    ],
)
def test_what_is_no_text_is_refused(name: str, value: Any, path: str) -> None:
    problem = found(**{name: value})[f"{name}{path}"]
    assert "text" in problem.reason or "True or False" in problem.reason
    assert not problem.warning


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gateway_service_annotations", {"internal": "true", "port": "9090"}),
        ("platform_tags", {"CostCenter": 1234}),
        ("rayservice_env", {"OMP_NUM_THREADS": 4, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}),
        ("rayservice_tolerations", [{"key": "a", "operator": "Exists", "tolerationSeconds": 60}]),
        ("eks_node_groups", [{"name": "gpu", "min_size": 1, "labels": {"a": "b"}, "taints": []}]),
        ("gateway_env", {}),
        ("storage_tags", None),
        ("secrets_extra", [{"name": "a", "data": {"PORT": 5432}}]),
        ("kuberay_feature_gates", {"RayCronJob": True}),
        ("gateway_cache", {"enabled": True, "data": {"x": True}}),
    ],
)
def test_text_and_what_is_written_as_text_passes(name: str, value: Any) -> None:
    assert found(**{name: value}) == {}


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("VLLM_USE_FLASHINFER_SAMPLER", True, 'write "1", as'),
        ("HF_HUB_OFFLINE", False, 'write "0", as'),
        ("TOKENIZERS_PARALLELISM", False, 'write "0" or "false"'),
        ("VLLM_USE_FLASHINFER_SAMPLER", "true", 'write "1"'),
        ("VLLM_CPU_KVCACHE_SPACE", "4Gi", "write a number"),
    ],
)
def test_flags_are_written_as_the_program_reads_them(name: str, value: Any, cure: str) -> None:
    assert cure in found(rayservice_env={name: value})[f"rayservice_env.{name}"].cure


def test_an_unknown_variable_of_vllm_warns_with_the_nearest() -> None:
    problem = found(rayservice_env={"VLLM_USE_FLASHINFER_SAMPLR": "1"})["rayservice_env.VLLM_USE_FLASHINFER_SAMPLR"]
    assert problem.warning
    assert problem.cure == "did you mean VLLM_USE_FLASHINFER_SAMPLER?"


def test_a_fault_is_told_where_it_was_made() -> None:
    tags, models = {"Managed": True}, [{"env": {"DEBUG": True}}]
    problems = found(
        platform_tags=tags,
        autoscaler_node_tags={**tags, "Name": "node"},
        eks_tags=tags,
        rayservice_models=models,
        gateway_models=models,
    )
    assert set(problems) == {"platform_tags.Managed", "rayservice_models[0].env.DEBUG"}


def respelled(written: str, value: int) -> Respelled:
    number = Respelled(value)
    number.written = written
    return number


@pytest.mark.parametrize("name", ["platform_tags", "gateway_env"])
def test_a_number_that_yaml_reads_otherwise_is_refused(name: str) -> None:
    problem = found(**{name: {"X": respelled("0042", 34)}})[f"{name}.X"]
    assert "0042 as the number 34" in problem.reason and problem.cure == 'put it in quotes: "0042"'


@pytest.mark.parametrize("value", [1.25, respelled("0125", 85)])
def test_a_secret_is_not_shown(value: float) -> None:
    problem = found(gateway_env={"API_TOKEN": value})["gateway_env.API_TOKEN"]
    assert "25" not in problem.reason + problem.cure + str(problem.as_dict())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["labels", "env", "tags", "taints", "name", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from(["platform_tags", "rayservice_env", "rayservice_models", "eks_node_groups"]), anything)
def test_any_value_is_met(name: str, value: Any) -> None:
    assert all(problem.cure for problem in found(**{name: value}).values())
