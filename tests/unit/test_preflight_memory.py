"""Memory of models: shapes against published counts, sums against vLLM's own log, preflight's verdicts, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import memory_table
import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import gpus_of_instance
from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import (
    GPUS,
    LABEL_OF_FAMILY,
    gpus_named,
    ray_name,
)
from ansible_collections.rayplane.platform.plugins.module_utils.serving.memory import GIB, SHAPES, need, shape_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.memory import gpu_memory, gpu_nodes, model_gpu
from conftest import PROJECT

GPU = {gpu.name: gpu for gpu in GPUS}
#: Parameters that the hub counts in the safetensors files. (Qwen3 0.6B's files hold the tied output layer once more.)
COUNTED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8030261248,
    "meta-llama/Llama-3.2-1B": 1235814400,
    "meta-llama/Llama-3.2-3B-Instruct": 3212749824,
    "meta-llama/Llama-3.3-70B-Instruct": 70553706496,
    "Qwen/Qwen2.5-0.5B-Instruct": 494032768,
    "Qwen/Qwen2.5-7B-Instruct": 7615616512,
    "Qwen/Qwen2.5-72B-Instruct": 72706203648,
    "Qwen/Qwen3-0.6B": 751632384 - 151936 * 1024,
    "Qwen/Qwen3-8B": 8190735360,
    "Qwen/Qwen3-30B-A3B": 30532122624,
    "mistralai/Mistral-7B-Instruct-v0.3": 7248023552,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23572403200,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 24011361280,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46702792704,
    "google/gemma-2-9b-it": 9241705984,
    "google/gemma-3-1b-it": 999885952,
    "google/gemma-3-27b-it": 27432406640,
    "microsoft/phi-4": 14659507200,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1777088000,
    "openai/gpt-oss-20b": 20914757184,
    "openai/gpt-oss-120b": 116829156672,
}


@pytest.mark.parametrize("source", COUNTED)
def test_parameters_are_those_that_the_hub_counts(source: str) -> None:
    shape = shape_of(source)
    assert shape is not None
    assert shape.parameters == COUNTED[source]


@pytest.mark.parametrize(
    ("source", "known", "quantization"),
    [
        ("hf://meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", ""),
        ("RedHatAI/gemma-2-9b-it-FP8", "gemma-2-9b", "fp8"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "llama-3.1-8b", "int4"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "qwen2.5-7b", "int8"),
        ("unsloth/Llama-3.2-3B-Instruct-bnb-4bit", "llama-3.2-3b", "nf4"),
        ("openai/gpt-oss-20b", "gpt-oss-20b", "mxfp4"),
        ("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "", ""),
        ("s3://bucket/Llama-3.1-8B-Instruct", "", ""),
        ("somebody/a-model-of-their-own", "", ""),
        (None, "", ""),
    ],
)
def test_a_model_is_known_by_its_name(source: str | None, known: str, quantization: str) -> None:
    expected = replace(SHAPES[known], quantization=quantization) if known else None
    assert shape_of(source) == expected


def test_a_folder_tells_its_shape_and_the_size_of_its_files(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        **{"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144},
        **{"max_position_embeddings": 32768, "sliding_window": 512, "tie_word_embeddings": True},
        "layer_types": ["sliding_attention", "full_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}), encoding="utf-8")
    shape = shape_of(str(tmp_path))
    assert shape is not None
    assert (shape.window, shape.full_layers, shape.files) == (512, 1, 0)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert (shape_of(str(tmp_path)) or shape).files == 1000
    index = {"metadata": {"total_size": 7 * GIB}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    shape = shape_of(str(tmp_path)) or shape
    assert need(shape, {}, GPU["t4"]).weights == 7 * GIB * 2  # no bfloat16 on a T4, no float16 for this family
    assert need(shape, {}, GPU["l4"]).weights == 7 * GIB
    assert need(shape, {"tensor_parallel_size": 2}, GPU["l4"]).weights == 3.5 * GIB
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert shape_of(str(tmp_path)) is None
    assert shape_of("~nobody-of-this-name/model") is None


def test_the_sum_is_what_vllm_logs() -> None:
    """A model of Llama 3.1 8B's shape with a vocabulary of 49,152 on an H200, max_model_len 8192, other things left.

    vLLM logged "Model loading took 13.8 GiB", "Available KV cache memory: 113.66 GiB" before graphs, "Graph capturing
    ... took 0.98 GiB", "GPU KV cache size: 931,104 tokens".
    """
    found = need(replace(SHAPES["llama-3.1-8b"], vocab=49152), {"max_model_len": 8192}, GPU["h200"])
    assert found.weights / GIB == pytest.approx(13.8, abs=0.1)
    assert found.graphs / GIB == pytest.approx(0.98, abs=0.1)
    room = found.budget - found.weights - found.activations - found.runtime
    assert room / GIB == pytest.approx(113.66, abs=0.5)
    assert room / found.cache * found.length == pytest.approx(931104, rel=0.01)


def test_cache_by_format_length_and_parallelism() -> None:
    llama, gemma = SHAPES["llama-3.1-8b"], SHAPES["gemma-2-9b"]
    whole = need(llama, {"max_model_len": 16384}, GPU["l4"]).cache
    assert whole / GIB == pytest.approx(2.0, abs=0.01)
    assert need(llama, {"max_model_len": 16384, "kv_cache_dtype": "fp8"}, GPU["l4"]).cache == whole / 2
    assert need(llama, {"max_model_len": 16384, "tensor_parallel_size": 4}, GPU["l4"]).cache == whole / 4
    # Each GPU holds at least one head: 16 of them hold 8 heads twice.
    assert need(llama, {"max_model_len": 16384, "tensor_parallel_size": 16}, GPU["l4"]).cache == whole / 8
    assert need(llama, {"max_model_len": 16384, "pipeline_parallel_size": 2}, GPU["l4"]).cache == whole / 2
    # Half of the layers look back 4,096 tokens.
    short, long = (need(gemma, {"max_model_len": size}, GPU["l4"]).cache for size in (4096, 65536))
    assert long < 0.6 * 16 * short


@pytest.mark.parametrize(
    ("engine", "gib"),
    [
        ({}, 14.96),
        ({"dtype": "float32"}, 29.92),
        ({"quantization": "fp8"}, 8.46),
        ({"quantization": "awq"}, 5.34),
        ({"quantization": "bitsandbytes"}, 5.62),
        ({"tensor_parallel_size": 2}, 7.48),
        ({"cpu_offload_gb": 4}, 10.96),
    ],
)
def test_weights_by_format(engine: dict[str, Any], gib: float) -> None:
    assert need(SHAPES["llama-3.1-8b"], engine, GPU["l4"]).weights / GIB == pytest.approx(gib, abs=0.01)


def test_formats_of_experts() -> None:
    assert need(SHAPES["gpt-oss-20b"], {}, GPU["h100"]).weights / 1e9 == pytest.approx(13.76, abs=0.05)


def values(*models: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A cluster on AWS with a group of T4 nodes and one of L4 nodes."""
    image = {"ami_type": "AL2023_x86_64_NVIDIA", "max_size": 2}
    return {
        "platform": "aws",
        "rayservice_gpu_node_label": "k8s.amazonaws.com/accelerator",
        "eks_node_groups": [{"name": "gpu", "instance_types": ["g4dn.xlarge"], **image}],
        "eks_extra_node_groups": [{"name": "gpu-l4", "instance_types": ["g6.2xlarge"], **image}],
        "rayservice_models": list(models),
        **changes,
    }


def model(source: str, accelerator: str = "", gpu: int = 1, **engine: Any) -> dict[str, Any]:
    """A model on GPUs."""
    return {"id": "m", "source": source, "engine": engine, "resources": {"gpu": gpu, "accelerator": accelerator}}


LLAMA, QWEN, GEMMA = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "RedHatAI/gemma-2-9b-it-FP8"


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (model(QWEN, "nvidia-t4"), {}),
        (model(GEMMA, "nvidia-t4", kv_cache_dtype="fp8", max_model_len=4096), {"resources.accelerator": False}),
        (model("openai/gpt-oss-20b", "nvidia-t4", max_model_len=4096), {"resources.accelerator": False}),
        (model(LLAMA, "nvidia-t4", max_model_len=16384), {"resources.accelerator": False}),
        # Any GPU may be the smallest.
        (model(LLAMA, max_model_len=16384), {"resources.gpu": False}),
        (model(LLAMA, "nvidia-l4"), {"engine.max_model_len": False}),
        (model(LLAMA, "nvidia-l4", max_model_len=16384), {"engine.max_model_len": True}),
        (model(LLAMA, "nvidia-l4", max_model_len=8192), {}),
        # The longest that fits; and text, which the rule of types tells.
        (model(LLAMA, "nvidia-l4", max_model_len=-1), {}),
        (model(LLAMA, "nvidia-l4", max_model_len="8192"), {}),
        (model(LLAMA, "nvidia-tesla-t4", gpu=2, tensor_parallel_size=2, max_model_len=8192), {}),
        # Nothing is known of the model, of the GPU, or of how much of it the cache takes.
        (model("somebody/a-model-of-their-own", "nvidia-t4"), {}),
        (model(LLAMA, "nvidia-x1"), {}),
        (model(LLAMA, "nvidia-t4", kv_cache_memory_bytes=1), {}),
        ({**model(LLAMA, "nvidia-t4"), "engine": "none"}, {}),
        (model(LLAMA, gpu=0), {}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_what_is_tight_warned_of(
    entry: dict[str, Any], found: dict[str, bool]
) -> None:
    problems = {problem.variable: problem.warning for problem in gpu_memory(values(entry))}
    assert problems == {f"rayservice_models[0].{name}": warning for name, warning in found.items()}


def test_the_sum_and_the_cures_are_told() -> None:
    (problem,) = gpu_memory(values(model(LLAMA, "nvidia-t4", max_model_len=16384)))
    for part in (
        "15.0 weights (8.03 billion parameters)",
        "2.0 KV cache of one sequence of 16,384",
        "13.4 GiB of the T4",
    ):
        assert part in problem.reason
    for part in (
        "AWQ or GPTQ with 4 bit (9.",
        "tensor_parallel_size and resources.gpu 2 (",
        "nvidia-l4, of g6 machines (",
    ):
        assert part in problem.cure
    (problem,) = gpu_memory(values(model(LLAMA, "nvidia-l4", max_model_len=32768)))
    assert "one of: max_model_len 25600 (" in problem.cure
    assert problem.value == 32768


@pytest.mark.parametrize(
    ("accelerator", "changes", "told"),
    [
        ("nvidia-t4", {}, ""),
        ("nvidia-l4", {}, ""),
        ("", {}, ""),
        ("nvidia-a100", {}, "p4d or p4de machines"),
        # A group whose nodes have either GPU has neither alone.
        ("nvidia-l4", {"eks_extra_node_groups": [{"name": "two", "instance_types": ["g5.xlarge", "g6.xlarge"],
                                                   "ami_type": "AL2023_x86_64_NVIDIA"}]}, "two: nvidia"),
        ("nvidia-l4", {"eks_gpu_ready_label": False}, "no group has one"),
        ("nvidia-a100", {"rayservice_accelerators": {"nvidia-a100": {"node_selector": {"pool": "a"}}}}, ""),
        ("nvidia-a100", {"rayservice_worker_groups": [{"name": "own"}]}, ""),
        ("nvidia-a100", {"platform_autoscaler": "karpenter"}, ""),
        ("nvidia-a100", {"kubeconfig_source": "given"}, ""),
        ("nvidia-a100", {"platform": "existing"}, ""),
    ],
)  # fmt: skip
def test_an_accelerator_is_on_the_nodes_of_a_group(accelerator: str, changes: dict[str, Any], told: str) -> None:
    problems = list(gpu_nodes(values(model(QWEN, accelerator), **changes)))
    assert len(problems) == bool(told)
    assert all(told in problem.reason + problem.cure for problem in problems)


def test_the_gpu_of_a_name_with_two_sizes_is_that_of_the_nodes() -> None:
    group = {"name": "big", "instance_types": ["p4d.24xlarge"], "max_size": 1}
    assert model_gpu(values(eks_extra_node_groups=[group]), model(LLAMA, "nvidia-a100")) == GPU["a100-40gb"]
    assert model_gpu(values(platform="existing"), model(LLAMA, "nvidia-a100")) == GPU["a100-80gb"]


@pytest.mark.parametrize(
    ("name", "known", "ray"),
    [
        ("nvidia-t4", ["t4"], "T4"),
        ("nvidia-tesla-t4", ["t4"], "T4"),
        ("A100-80G", ["a100-80gb"], "A100-80G"),
        ("nvidia-a100", ["a100-40gb", "a100-80gb"], "A100"),
        ("nvidia-a100-80gb", ["a100-80gb"], "A100-80G"),
        ("nvidia-h100-80gb", ["h100"], "H100"),
        ("nvidia-tesla-v100", ["v100", "v100-32gb"], "V100"),
        ("nvidia-rtx-pro-6000", [], "RTX-PRO-6000"),
    ],
)
def test_spellings_of_gpus(name: str, known: list[str], ray: str) -> None:
    assert [gpu.name for gpu in gpus_named(name)] == known
    assert ray_name(name) == ray


def test_gpus_are_in_the_order_of_their_memory() -> None:
    assert [gpu.memory for gpu in GPUS] == sorted(gpu.memory for gpu in GPUS)
    prices = yaml.safe_load((PROJECT / "roles/cost/files/prices-aws.yml").read_text(encoding="utf-8"))
    kinds = {kind for region in prices["regions"].values() for kind in region["instances"] if gpus_of_instance(kind)}
    assert {kind.partition(".")[0] for kind in kinds} <= set(LABEL_OF_FAMILY)


def test_the_document_shows_the_sum_of_our_own_inventories() -> None:
    document = (PROJECT / "docs/memory.md").read_text(encoding="utf-8")
    assert memory_table.table() in document, "run python tools/memory_table.py"


A100 = {"name": "a100", "instance_types": ["p4d.24xlarge"], "max_size": 2, "ami_type": "AL2023_x86_64_NVIDIA"}
SLICED = {**A100, "labels": {"nvidia.com/mig.config": "all-1g.5gb"}}
BOTH_SIZES = [A100, {**A100, "name": "large", "instance_types": ["p4de.24xlarge"]}]


@pytest.mark.parametrize(
    ("source", "device", "groups", "settings", "fits"),
    [
        (LLAMA, "nvidia.com/mig-1g.5gb", [SLICED], {"gpu_plugin_mig_strategy": "mixed"}, False),
        (QWEN, "nvidia.com/mig-1g.5gb", [SLICED], {"gpu_plugin_mig_strategy": "mixed"}, True),
        (LLAMA, "nvidia.com/mig-3g.20gb", [SLICED], {"gpu_plugin_mig_strategy": "mixed"}, True),
        (LLAMA, "nvidia.com/gpu", [SLICED], {"gpu_plugin_mig_strategy": "single"}, False),
        (LLAMA, "nvidia.com/gpu", [A100], {"gpu_plugin_mig_strategy": "mixed"}, True),
        ("Qwen/Qwen2.5-32B-Instruct", "nvidia.com/gpu", BOTH_SIZES, {}, False),
    ],
)
def test_slices_and_sizes_of_a_gpu_have_their_own_memory(
    source: str, device: str, groups: list[dict[str, Any]], settings: dict[str, Any], fits: bool
) -> None:
    entry = model(source, "A100-80G" if groups is BOTH_SIZES else "nvidia-a100", max_model_len=2048, max_num_seqs=16)
    entry["resources"]["gpu_resource"] = device
    problems = gpu_memory(values(entry, eks_node_groups=groups, **settings))
    assert all(problem.warning for problem in problems) == fits


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("NousResearch/Hermes-3-Llama-3.1-8B", "15.0 weights (8.03 billion"),
        ("s3://bucket/models/Llama-3.1-8B-Instruct", "15.0 weights"),
        ("codellama/CodeLlama-13b-Instruct-hf", "21.8 weights"),
        ("acme/secret-70b-AWQ", "30.5 weights"),
        ("acme/mixture-8x7B", "83.4 weights"),
        ("acme/secret-7b-awq", ""),
        ("acme/secret-70b-lora", ""),
        ("acme/secret-70b-3bit", ""),
        ("acme/secret-40B-A3B-GPTQ", "17.4 weights"),
        ("acme/e4b-3b", ""),
    ],
)
def test_what_a_name_says_is_worth_a_warning(source: str, told: str) -> None:
    problems = list(gpu_memory(values(model(source, "nvidia-t4", max_model_len=2048))))
    assert [problem.warning and told in problem.reason for problem in problems] == ([True] if told else [])


def test_shared_gpus_have_their_memory_once() -> None:
    shared = {"gpu_plugin_time_slicing_replicas": {"nvidia.com/gpu": 4}}
    (problem,) = gpu_memory(values(model(QWEN, "nvidia-t4", max_model_len=2048), **shared))
    assert "0.92 x 4 = 3.68" in problem.reason
    assert problem.cure == "write 0.25 or less"


@pytest.mark.parametrize(
    ("accelerator", "changes", "told"),
    [
        ("A100-80G", {"eks_node_groups": [A100]}, "add a node group of p4de"),
        ("A100-80G", {"eks_node_groups": BOTH_SIZES}, "which other GPUs bear as well (a100)"),
        ("A100-80G", {"eks_node_groups": [A100], "rayservice_gpu_node_label": ""}, "no node group has this GPU ("),
        ("h100", {"rayservice_worker_groups": [{"name": "g", "gpu": 1, "accelerator": "h100"}]}, "gpu-l4: L4"),
        ("t4", {"rayservice_worker_groups": [{"name": "g", "gpu": 1, "accelerator": "T4"}]}, ""),
    ],
)
def test_the_gpu_is_there_whatever_selects_it(accelerator: str, changes: dict[str, Any], told: str) -> None:
    problems = list(gpu_nodes(values(model(QWEN, accelerator), **changes)))
    assert [told in problem.reason + problem.cure for problem in problems] == ([True] if told else [])


def test_a_model_without_a_kv_cache_holds_any_number_of_sequences() -> None:
    """All of its layers are linear, say."""
    found = need(replace(SHAPES["llama-3.1-8b"], head_dim=0), {"max_model_len": 1024}, GPU["h100"])
    assert found.cache == 0 and found.fits and not found.tight
