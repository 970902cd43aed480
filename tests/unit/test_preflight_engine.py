"""A model's engine, deployment and LoRA against the release that serves it, each other, and the accelerator."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.engine import (
    check_type,
    engines,
    serving_release,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.config import Timeouts

RAY = "2.60.0"
SCALES = {"min": 1, "max": 4, "target_ongoing_requests": 10}


def found(ray: str = RAY, **model: Any) -> dict[str, Problem]:
    """Problems of one model, by what comes after the model's own path."""
    entry = {"id": "m", "source": "organisation/model", **model}
    problems = list(engines({"rayservice_ray_version": ray, "models_ignore": ["*.bin"], "rayservice_models": [entry]}))
    assert len({problem.variable for problem in problems}) == len(problems), "told twice"
    return {problem.variable.removeprefix("rayservice_models[0]."): problem for problem in problems}


@pytest.mark.parametrize(
    ("name", "table", "told"),
    [
        ("nvidia-tesla-t4", {}, ""), ("Tesla-T4", {}, ""), ("NVIDIA-H100-80GB-HBM3", {}, ""), ("nvidia-a10", {}, ""),
        ("AMD-Instinct-MI300X-OAM", {}, ""), ("nvidia-rtx-pro-6000", {}, ""), ("me", {"me": {"ray_name": "L4"}}, ""),
        ("nvidia-t5", {}, "did you mean nvidia-t4?"), ("nvidia-tezla-t4", {}, "did you mean nvidia-t4"),
        ("g4dn.xlarge", {}, "such as V100"), ("tpu-v6e", {}, "did you mean TPU-V6E"),
    ],
)  # fmt: skip
def test_ray_knows_the_accelerator(name: str, table: dict[str, Any], told: str) -> None:
    entry = {"id": "m", "source": "a/b", "resources": gpu(name)}
    problems = list(
        engines({"rayservice_ray_version": RAY, "rayservice_models": [entry], "rayservice_accelerators": table})
    )
    assert [told in problem.cure for problem in problems] == ([True] if told else [])


def gpu(name: str, number: int = 1) -> dict[str, Any]:
    return {"gpu": number, "accelerator": name}


@pytest.mark.parametrize(
    ("engine", "key", "reason", "cure"),
    [
        ({"max-model-len": 8192}, "max-model-len", "knows no such key", "did you mean max_model_len?"),
        ({"--max-model-len": 8192}, "--max-model-len", "vLLM 0.29.0 knows", "did you mean max_model_len?"),
        ({"gpu_memory_utilisation": 0.85}, "gpu_memory_utilisation", "no such key", "gpu_memory_utilization"),
        ({"disable_log_requests": True}, "disable_log_requests", "no such key", "delete it; requests are logged only"),
        ({"swap_space": 4}, "swap_space", "no such key", "delete it"),
        ({"zzz": 4}, "zzz", "no such key", "delete it"),
        ({"max_model_len": "8192"}, "max_model_len", "a whole number here, and it is text", "write 8192 without"),
        ({"max_model_len": "16k"}, "max_model_len", "and it is text", "write 16000 without"),
        ({"max_model_len": "16K"}, "max_model_len", "and it is text", "write 16384 without"),
        ({"max_model_len": 8192.5}, "max_model_len", "a whole number", "write 8192"),
        ({"max_model_len": "auto"}, "max_model_len", "and it is text", "or delete it"),
        ({"cpu_offload_gb": "4"}, "cpu_offload_gb", "and it is text", "write 4 without"),
        ({"nnodes": 2}, "nnodes", "nobody would start", "pipeline_parallel_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size", "placement group", "delete"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size", "which is 1", "divisor of 1"),
        ({"data_parallel_size_local": 2}, "data_parallel_size_local", "placement group", "delete"),
        ({"enforce_eager": "yes"}, "enforce_eager", "true or false here, and it is text", "write true without"),
        ({"enforce_eager": 1}, "enforce_eager", "it is a number", "write true"),
        ({"tokenizer_revision": 20240918}, "tokenizer_revision", "text here, and it is a number", '"20240918"'),
        ({"enforce_eager": None}, "enforce_eager", "nothing stands behind the colon", "delete the line"),
        ({"dtype": "fp16"}, "dtype", "none of the values", "choose one of auto, half, float16"),
        ({"dtype": "bfloat"}, "dtype", "none of the values", "or bfloat16"),
        ({"load_format": "gguf"}, "load_format", "none of the values", "choose one of"),
        ({"quantization": "gguf"}, "quantization", "none of the values", "choose one of"),
        ({"max_lora_rank": 24, "enable_lora": True}, "max_lora_rank", "none of the values", "choose one of 1, 8"),
        ({"compilation_config": 3}, "compilation_config", "must be a mapping", "known keys: mode"),
        (
            {"speculative_config": {"num_speculative": 3}},
            "speculative_config.num_speculative",
            "no such key",
            "speculative",
        ),
        ({"kv_transfer_config": {"kv_role": "both"}}, "kv_transfer_config.kv_role", "none of the", "kv_both"),
        ({"disable_log_stats": True}, "disable_log_stats", "refuses to start", "delete it"),
        ({"data_parallel_size": 2}, "data_parallel_size", "other 1 ranks", "replicas.min to 2"),
        ({"enable_auto_tool_choice": True}, "enable_auto_tool_choice", "without tool_call_parser", "hermes"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "max_num_batched_tokens", "which is 512", "512 or more"),
        ({"load_format": "npcache"}, "load_format", ".bin files, and models_ignore (*.bin)", "safetensors"),
    ],
)
def test_an_engine_that_cannot_start(engine: dict[str, Any], key: str, reason: str, cure: str) -> None:
    problem = found(engine=engine)[f"engine.{key}"]
    assert reason in problem.reason
    assert cure in problem.cure
    assert not problem.warning


@pytest.mark.parametrize(
    "engine",
    [
        {"max_model_len": None, "max_num_seqs": 64, "gpu_memory_utilization": 1, "enable_prefix_caching": True},
        {"max_model_len": -1},
        {"dtype": "auto", "kv_cache_dtype": "fp8", "quantization": None, "hf_overrides": {"anything": {"goes": 1}}},
        {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "chat_template": "/template.jinja"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
        {"compilation_config": {"mode": "VLLM_COMPILE", "cudagraph_mode": "FULL"}, "optimization_level": 2},
        {"limit_mm_per_prompt": {"image": 2}, "served_model_name": "told by another rule"},
    ],
)
def test_an_engine_that_starts(engine: dict[str, Any]) -> None:
    assert found(engine=engine) == {}


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        ({"tool_call_parser": "hermes"}, "tool_call_parser"),
        ({"max_lora_rank": 32}, "max_lora_rank"),
        ({"api_key": ["secret"]}, "api_key"),
        ({"host": "127.0.0.1"}, "host"),
    ],
)
def test_an_argument_without_effect_warns(engine: dict[str, Any], key: str) -> None:
    problem = found(engine=engine)[f"engine.{key}"]
    assert problem.warning
    assert "secret" not in str(problem.value)


@pytest.mark.parametrize(
    ("model", "key", "reason"),
    [
        ({"engine": {"dtype": "bfloat16"}, "resources": gpu("nvidia-t4")}, "engine.dtype", "compute capability 7.5"),
        (
            {"source": "openai/gpt-oss-20b", "resources": gpu("nvidia-t4")},
            "engine.quantization",
            "mxfp4 weights need 8.0",
        ),
        ({"engine": {"dtype": "bfloat16"}, "resources": gpu("nvidia-l4")}, "", ""),
        ({"engine": {"dtype": "float16"}, "resources": gpu("nvidia-tesla-t4")}, "", ""),
        ({"engine": {"dtype": "bfloat16"}}, "", ""),
        ({"engine": {"kv_cache_dtype": "fp8"}, "resources": gpu("T4")}, "engine.kv_cache_dtype", "needs 8.0"),
        ({"engine": {"kv_cache_dtype": "fp8_e5m2"}, "resources": gpu("V100")}, "engine.kv_cache_dtype", "needs 8.0"),
        ({"engine": {"kv_cache_dtype": "nvfp4"}, "resources": gpu("H100")}, "engine.kv_cache_dtype", "needs 10.0"),
        ({"engine": {"kv_cache_dtype": "fp8"}, "resources": gpu("nvidia-a10g")}, "", ""),
        ({"engine": {"quantization": "awq"}, "resources": gpu("nvidia-v100")}, "engine.quantization", "need 7.5"),
        ({"engine": {"quantization": "awq"}, "resources": gpu("nvidia-t4")}, "", ""),
        ({"source": "google/gemma-2-9b-it", "resources": gpu("nvidia-t4")}, "engine.dtype", "gemma2 models"),
        ({"source": "google/gemma-2-9b-it", "resources": gpu("nvidia-l4")}, "", ""),
        ({"source": "google/gemma-3-4b-it", "engine": {"dtype": "half"}}, "engine.dtype", "gemma3 models"),
        (
            {"source": "Qwen/Qwen2.5-7B-Instruct", "engine": {"tensor_parallel_size": 8}},
            "engine.tensor_parallel_size",
            "28 attention heads",
        ),
        ({"source": "Qwen/Qwen2.5-7B-Instruct", "engine": {"tensor_parallel_size": 4}}, "", ""),
        (
            {"engine": {"distributed_executor_backend": "mp"}, "resources": gpu("nvidia-l4")},
            "engine.distributed_executor_backend",
            "refuses any other",
        ),
        ({"engine": {"distributed_executor_backend": "mp"}}, "", ""),
        ({"source": "Qwen/Qwen2.5-0.5B-Instruct-GGUF"}, "source", "no loader"),
        ({"source": "Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M"}, "source", "no loader"),
        ({"source": "Qwen/Qwen2.5-0.5B-Instruct:Q4_K_M"}, "source", "follows the colon"),
        ({"source": "mlx-community/Qwen2.5-7B-Instruct-4bit"}, "source", "says mlx"),
        ({"source": "s3://bucket/models/qwen.gguf"}, "source", "names one file"),
        ({"source": "s3://bucket/qwen/model.safetensors"}, "source", "names one file"),
        ({"source": "/models/pytorch_model.bin"}, "source", "names one file"),
        ({"source": "s3://onnx-and-others/qwen"}, "", ""),
        ({"source": "hf://organisation/model"}, "", ""),
        ({"deployment": {"max_ongoing_request": 8}}, "deployment.max_ongoing_request", "Ray Serve knows no such"),
        (
            {"deployment": {"autoscaling_config": {"upscale_delay": 8}}},
            "deployment.autoscaling_config.upscale_delay",
            "no such",
        ),
        ({"deployment": {"max_ongoing_requests": 0}}, "deployment.max_ongoing_requests", "above 0"),
        ({"deployment": {"num_replicas": "auto", "ray_actor_options": {"num_cpus": 0.5}}}, "", ""),
        ({"placement": {"bundles": [{"GPU": 1}], "strategy": "PACKED"}}, "placement.strategy", "none of the values"),
        ({"replicas": {**SCALES, "initial": 8}}, "replicas.initial", "1 to 4"),
        ({"replicas": {**SCALES, "min": 2, "initial": 3}}, "", ""),
        ({"replicas": {"min": 1, "max": 4}}, "replicas.target_ongoing_requests", "never go from 1 to 4"),
        ({"replicas": {"min": 2, "max": 2}}, "", ""),
        ({"engine": {"attention_backend": "flash_attn"}, "resources": gpu("T4")}, "engine.attention_backend", "from"),
        ({"engine": {"attention_backend": "FLASH_ATTN"}, "resources": gpu("L4")}, "", ""),
        ({"source": "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"}, "source", "says bnb"),
        (
            {"engine": {"enable_lora": True}, "lora": {"dynamic_lora_loading_path": "s3://My_Bucket/a"}},
            "lora.dynamic_lora_loading_path",
            "its bucket",
        ),
        (
            {"replicas": {"max": 4, "target_ongoing_requests": 32}, "deployment": {"max_ongoing_requests": 16}},
            "replicas.target_ongoing_requests",
            "never add one",
        ),
        (
            {"deployment": {"autoscaling_config": {"max_replicas": 1, "initial_replicas": 3}}},
            "deployment.autoscaling_config.initial_replicas",
            "1 to 1",
        ),
        (
            {
                "engine": {"enable_lora": True},
                "lora": {"dynamic_lora_loading_path": "/data/loras"},
            },
            "lora.dynamic_lora_loading_path",
            "object storage alone",
        ),
        (
            {"engine": {"enable_lora": True}, "lora": {"max_num_adapter_per_replica": 8}},
            "lora.max_num_adapter_per_replica",
            "knows no such",
        ),
        ({"lora": {"dynamic_lora_loading_path": "s3://bucket/loras"}}, "lora", "enable_lora is true"),
        ({"engine": {"enable_lora": True}, "lora": {"dynamic_lora_loading_path": "s3://bucket/loras"}}, "", ""),
    ],
)
def test_a_model_under_serve_on_its_accelerator(model: dict[str, Any], key: str, reason: str) -> None:
    problems = found(**model)
    assert list(problems) == ([key] if key else [])
    assert not key or reason in problems[key].reason


def test_scaling_to_zero_tells_what_the_first_caller_gets() -> None:
    values = {
        "rayservice_models": [{"source": "a/b", "replicas": {**SCALES, "min": 0}}],
        "rayservice_request_timeout_s": 900,
        "gateway_backend_defaults": {"timeouts": {"first_token_s": 300}},
    }
    (problem,) = engines(values)
    assert problem.warning
    assert re.search(r"first caller .* gateway waits 300 s .* Serve 900 s", problem.reason)
    (problem,) = engines({**values, "gateway_backend_defaults": {}})
    assert f"gateway waits {Timeouts().first_token_s:g} s" in problem.reason


@pytest.mark.parametrize(
    ("image", "name", "refused"),
    [
        ("rayproject/ray-llm:2.60.0-py312-cu130", "nvidia-v100", True),
        ("rayproject/ray-llm:2.60.0-py312-cu128", "nvidia-v100", False),
        ("rayproject/ray-llm:2.60.0-py312-cu130", "nvidia-t4", False),
        ("registry.example.com/ray@sha256:0123", "nvidia-v100", False),
    ],
)
def test_the_images_cuda_knows_the_gpu(image: str, name: str, refused: bool) -> None:
    models = [{"id": "m", "source": "organisation/model", "resources": gpu(name)}]
    problems = list(engines({"rayservice_image": image, "rayservice_models": models}))
    assert [problem.variable for problem in problems] == (["rayservice_models[0].resources"] if refused else [])


SIZES = {"model_type": "llama", "hidden_size": 896, "num_hidden_layers": 2, "intermediate_size": 4864}
SIZES |= {"vocab_size": 9, "max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("config", "engine", "key"),
    [
        ({**SIZES, "num_attention_heads": 14}, {"tensor_parallel_size": 4}, "engine.tensor_parallel_size"),
        ({"text_config": {**SIZES, "num_attention_heads": 16}}, {"tensor_parallel_size": 4}, ""),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            {"quantization": "fp8"},
            "engine.quantization",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, {"quantization": "awq_marlin"}, ""),
        ({"model_type": "gemma2"}, {"dtype": "float16"}, "engine.dtype"),
    ],
)
def test_a_local_model_tells_its_shape(tmp_path: Path, config: Any, engine: dict[str, Any], key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert list(found(source=str(tmp_path), engine=engine)) == ([key] if key else [])


def test_a_release_that_is_not_on_file_passes_with_a_warning() -> None:
    assert [problem.warning for problem in found("2.99.0", engine={"no_such": 1}).values()] == [True]


def test_the_file_has_only_types_that_are_checked() -> None:
    release = serving_release(RAY)

    def words(said: Any) -> Any:
        if isinstance(said, dict):
            for inner in said.values():
                yield from words(inner)
        elif isinstance(said, str):
            yield from said.split("|")

    kinds = {word.rstrip("0123456789<>=") for section in ("engine", "deployment", "lora", "placement")
             for word in words(release[section])}  # fmt: skip
    assert kinds == {"any", "bool", "dict", "float", "int", "list", "null", "str"}


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(serving_release(RAY)["engine"])), anything)
def test_arguments_meet_any_type_without_failing(name: str, value: Any) -> None:
    for problem in check_type("engine", {name: value}, serving_release(RAY)["engine"], "vLLM"):
        assert problem.reason
        assert problem.cure


@given(st.sampled_from(["engine", "deployment", "lora", "replicas", "resources", "placement", "source"]), anything)
def test_rules_meet_any_model_without_failing(key: str, value: Any) -> None:
    assert all(problem.cure for problem in found(**{key: value}).values())
