# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""How much GPU memory a model needs: weights, KV cache, and what vLLM sets aside for itself.

vLLM 0.29 takes ``gpu_memory_utilization`` of a GPU's memory, loads the weights, runs one batch of
``max_num_batched_tokens`` to see the peak of the activations, captures a few CUDA graphs to see what all will take, and
makes the rest the KV cache. It refuses to start where the rest holds less than one sequence of ``max_model_len``
(v1/worker/gpu_worker.py, determine_available_memory; v1/core/kv_cache_utils.py, check_enough_kv_cache_memory).

Nothing is asked of the network: shapes come from a folder's config.json or from a table.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import GPUS, Gpu

__all__ = [
    "GIB",
    "SHAPES",
    "UTILIZATION",
    "Need",
    "Shape",
    "config_of",
    "cures",
    "guess_of",
    "need",
    "shape_of",
    "sum_line",
]

GIB = 1024**3
#: Default of vLLM 0.29 (config/cache.py).
UTILIZATION = 0.92
BLOCK = 16
#: What libraries take beside PyTorch's tensors (kernels, cuBLAS' workspaces), and NCCL's buffers between GPUs.
_RUNTIME, _NCCL = 0.3 * GIB, 0.5 * GIB
#: One CUDA graph of one layer. Measured: 102 graphs of 32 layers took 0.98 GiB.
_GRAPH = 0.3 * 1024**2
#: The sampler's tensors an entry of the vocabulary: logits in 32 bit, twice, and the order of a sort.
_SAMPLER = 12

#: Bytes of a weight by kind of quantization, scales included: groups of 128 with a scale in 16 and a zero point in
#: 4 bit (AWQ, GPTQ), blocks of 64 with a scale in 32 bit (bitsandbytes), of 32 with one in 8 bit (MXFP4).
QUANTIZED = {"fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128, "nf4": 0.5 + 4 / 64, "mxfp4": 0.5 + 1 / 32}
_ENGINE_QUANTIZATION = {
    **dict.fromkeys(("fp8", "fbgemm_fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8"), "fp8"),
    **dict.fromkeys(("awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin"), "int4"),
    **{"bitsandbytes": "nf4", "mxfp4": "mxfp4", "gpt_oss_mxfp4": "mxfp4", "int8_per_channel_weight_only": "int8"},
}
_QUANTIZATION_IN_NAME = (
    (r"gptq-int8|w8a8|w8a16|int8|8bit", "int8"),
    (r"fp8", "fp8"),
    (r"awq|gptq|w4a16|int4", "int4"),
    (r"bnb|4bit", "nf4"),
    (r"mxfp4", "mxfp4"),
)
#: Parts of a name that say of its weights that they are small in a way not counted here.
_OTHER_FORMATS = re.compile(r"gguf|\dbit|aqlm|hqq|eetq|quip|fp4|autoround|exl\d|lora|adapter|draft|eagle|bitnet|tiny")
#: vLLM 0.29 runs them in bfloat16 or float32 alone (config/model.py).
_NOT_IN_FLOAT16 = ("gemma2", "gemma3", "glm4")
#: Families whose parameters the sizes in config.json tell.
_FAMILIES = ("llama", "mistral", "phi3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss")
#: Parts of a name that say nothing of the shape.
_OTHER_PARTS = re.compile(
    r"meta|instruct|it|pt|base|chat|hf|text|unsloth|quantized|dynamic|bnb|[48]bit|fp8|awq|gptq|int[48]|w[48]a(8|16)|bf16|mxfp4"
)


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json describes it. ``intermediate`` is the width of the MLP, or of one expert."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    #: Whether the output layer is the embedding once more.
    tied: bool
    #: Longest context in tokens.
    length: int
    #: Biases, norms and routers of one layer.
    small: int = 0
    experts: int = 0
    #: Experts that one token goes through.
    active: int = 0
    #: Tokens that a layer with a sliding window looks back, and how many layers have none.
    window: int = 0
    full_layers: int = 0
    #: Parameters beside the decoder: the image encoder.
    tower: int = 0
    #: Values of one token and layer in the KV cache where it is no key and value a head (multi-head latent attention).
    latent: int = 0
    #: transformers' model_type.
    family: str = ""
    quantization: str = ""
    #: Bytes of the weights' files where they lie on this machine, and of one of their numbers.
    files: int = 0
    file_dtype: int = 2

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention matrices: queries and output, keys and values (grouped queries)."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp(self) -> int:
        """Parameters of one layer's gate, up and down matrices, of all experts."""
        return 3 * self.hidden * self.intermediate * max(self.experts, 1)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        ends = self.embedding * (1 if self.tied else 2) + self.hidden + self.tower
        return self.layers * (self.attention + self.mlp + self.small) + ends


def _make(family: str, *sizes: Any, **others: Any) -> Shape:
    """A shape with the small parameters of its family (transformers' modelling files)."""
    shape = Shape(*sizes, **others)
    queries = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    norms, router = 2 * shape.hidden, shape.hidden * shape.experts
    small = {
        "qwen2": norms + queries,
        "qwen3": norms + 2 * shape.head_dim,
        "qwen3_moe": norms + 2 * shape.head_dim + router,
        "mixtral": norms + router,
        "gemma2": 2 * norms,
        "gemma3": 2 * norms + 2 * shape.head_dim,
        # Biases everywhere, and a sink a head.
        "gpt_oss": norms + queries + shape.hidden + shape.heads + router + shape.experts
        + shape.experts * (2 * shape.intermediate + shape.hidden),
    }.get(family, norms)  # fmt: skip
    return replace(shape, small=small, family=family)


def _siglip(hidden: int) -> int:
    """Gemma 3's image encoder (27 layers of 1152, patches of 14, 4096 places) and the way from it to the text."""
    layer = 4 * 1152 * 1152 + 2 * 1152 * 4304 + 4 * 1152 + 4304 + 1152 + 4 * 1152
    return 27 * layer + 3 * 14 * 14 * 1152 + 1152 + 4096 * 1152 + 2 * 1152 + 1152 * hidden + 1152


def _pixtral(hidden: int) -> int:
    """Mistral Small 3.1's image encoder (24 layers of 1024, patches of 14) and the way from it to the text."""
    layer = 4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024
    return 24 * layer + 3 * 14 * 14 * 1024 + 2 * 1024 + 4 * 1024 * 1024 + 1024 * hidden + hidden * hidden


_K128 = 131072
#: Well-known models by the part of the hub's name that tells the shape. Source: config.json of each on the hub (family:
#: hidden, layers, heads, KV heads, head size, intermediate, vocabulary, tied, length), checked by the hub's counts.
SHAPES: dict[str, Shape] = {
    "llama-3-8b": _make("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, 8192),
    "llama-3-70b": _make("llama", 8192, 80, 64, 8, 128, 28672, 128256, False, 8192),
    "llama-3.1-8b": _make("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, _K128),
    "llama-3.1-70b": _make("llama", 8192, 80, 64, 8, 128, 28672, 128256, False, _K128),
    "llama-3.1-405b": _make("llama", 16384, 126, 128, 8, 128, 53248, 128256, False, _K128),
    "llama-3.2-1b": _make("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, _K128),
    "llama-3.2-3b": _make("llama", 3072, 28, 24, 8, 128, 8192, 128256, True, _K128),
    "llama-3.3-70b": _make("llama", 8192, 80, 64, 8, 128, 28672, 128256, False, _K128),
    "smollm2-135m": _make("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 8192),
    "smollm2-360m": _make("llama", 960, 32, 15, 5, 64, 2560, 49152, True, 8192),
    "smollm2-1.7b": _make("llama", 2048, 24, 32, 32, 64, 8192, 49152, True, 8192),
    "qwen2-0.5b": _make("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 32768),
    "qwen2.5-0.5b": _make("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 32768),
    "qwen2.5-1.5b": _make("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True, 32768),
    "qwen2.5-3b": _make("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, True, 32768),
    "qwen2.5-7b": _make("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False, 32768),
    "qwen2.5-14b": _make("qwen2", 5120, 48, 40, 8, 128, 13824, 152064, False, 32768),
    "qwen2.5-32b": _make("qwen2", 5120, 64, 40, 8, 128, 27648, 152064, False, 32768),
    "qwen2.5-72b": _make("qwen2", 8192, 80, 64, 8, 128, 29568, 152064, False, 32768),
    "qwen3-0.6b": _make("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 40960),
    "qwen3-1.7b": _make("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True, 40960),
    "qwen3-4b": _make("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True, 40960),
    "qwen3-8b": _make("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, 40960),
    "qwen3-14b": _make("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False, 40960),
    "qwen3-32b": _make("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 40960),
    "qwen3-30b-a3b": _make("qwen3_moe", 2048, 48, 32, 4, 128, 768, 151936, False, 40960, experts=128, active=8),
    "qwen3-235b-a22b": _make("qwen3_moe", 4096, 94, 64, 4, 128, 1536, 151936, False, 40960, experts=128, active=8),
    "mistral-7b-v0.1": _make("mistral", 4096, 32, 32, 8, 128, 14336, 32000, False, 32768),
    "mistral-7b-v0.2": _make("mistral", 4096, 32, 32, 8, 128, 14336, 32000, False, 32768),
    "mistral-7b-v0.3": _make("mistral", 4096, 32, 32, 8, 128, 14336, 32768, False, 32768),
    "mistral-small-24b-2501": _make("mistral", 5120, 40, 32, 8, 128, 32768, 131072, False, 32768),
    "mistral-small-3.1-24b-2503": _make(
        "mistral", 5120, 40, 32, 8, 128, 32768, 131072, False, _K128, tower=_pixtral(5120)
    ),
    "mistral-small-3.2-24b-2506": _make(
        "mistral", 5120, 40, 32, 8, 128, 32768, 131072, False, _K128, tower=_pixtral(5120)
    ),
    "mixtral-8x7b-v0.1": _make("mixtral", 4096, 32, 32, 8, 128, 14336, 32000, False, 32768, experts=8, active=2),
    "mixtral-8x22b-v0.1": _make("mixtral", 6144, 56, 48, 8, 128, 16384, 32768, False, 65536, experts=8, active=2),
    "gemma-2-2b": _make("gemma2", 2304, 26, 8, 4, 256, 9216, 256000, True, 8192, window=4096, full_layers=13),
    "gemma-2-9b": _make("gemma2", 3584, 42, 16, 8, 256, 14336, 256000, True, 8192, window=4096, full_layers=21),
    "gemma-2-27b": _make("gemma2", 4608, 46, 32, 16, 128, 36864, 256000, True, 8192, window=4096, full_layers=23),
    "gemma-3-1b": _make("gemma3", 1152, 26, 4, 1, 256, 6912, 262144, True, 32768, window=512, full_layers=4),
    "gemma-3-4b": _make(
        "gemma3", 2560, 34, 8, 4, 256, 10240, 262208, True, _K128, window=1024, full_layers=5, tower=_siglip(2560)
    ),
    "gemma-3-12b": _make(
        "gemma3", 3840, 48, 16, 8, 256, 15360, 262208, True, _K128, window=1024, full_layers=8, tower=_siglip(3840)
    ),
    "gemma-3-27b": _make(
        "gemma3", 5376, 62, 32, 16, 128, 21504, 262208, True, _K128, window=1024, full_layers=10, tower=_siglip(5376)
    ),
    "phi-3-mini-4k": _make("phi3", 3072, 32, 32, 32, 96, 8192, 32064, False, 4096),
    "phi-4": _make("phi3", 5120, 40, 40, 10, 128, 17920, 100352, False, 16384),
    "phi-4-mini": _make("phi3", 3072, 32, 24, 8, 128, 8192, 200064, True, _K128),
    "deepseek-r1-distill-qwen-1.5b": _make("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, False, _K128),
    "deepseek-r1-distill-qwen-7b": _make("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False, _K128),
    "deepseek-r1-distill-llama-8b": _make("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, _K128),
    "deepseek-r1-distill-qwen-14b": _make("qwen2", 5120, 48, 40, 8, 128, 13824, 152064, False, _K128),
    "deepseek-r1-distill-qwen-32b": _make("qwen2", 5120, 64, 40, 8, 128, 27648, 152064, False, _K128),
    "deepseek-r1-distill-llama-70b": _make("llama", 8192, 80, 64, 8, 128, 28672, 128256, False, _K128),
    "gpt-oss-20b": _make(
        *("gpt_oss", 2880, 24, 64, 8, 64, 2880, 201088, False, _K128), experts=32, active=4,
        window=128, full_layers=12, quantization="mxfp4",
    ),
    "gpt-oss-120b": _make(
        *("gpt_oss", 2880, 36, 64, 8, 64, 2880, 201088, False, _K128), experts=128, active=4,
        window=128, full_layers=18, quantization="mxfp4",
    ),
}  # fmt: skip


def folder(source: Any) -> Path | None:
    """The folder that a model's source names; None for a hub id or an address."""
    if not isinstance(source, str) or not source.startswith(("/", "~", "./", "../")):
        return None
    with contextlib.suppress(RuntimeError):  # ~nobody
        return Path(source).expanduser()
    return Path(source)


def config_of(source: Any) -> Mapping[str, Any]:
    """A local model's config.json; empty for any other, and for one that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        if place := folder(source):
            found = json.loads((place / "config.json").read_text(encoding="utf-8"))
            return found if isinstance(found, Mapping) else {}
    return {}


def shape_of(source: Any) -> Shape | None:
    """The shape of a model's source, by its name or from its folder; None where it is not known.

    A copy under another organisation's name, quantized or not, has the shape of the model it is named after.
    """
    if not isinstance(source, str):
        return None
    if place := folder(source):
        return _shape_of_folder(place, config_of(source))
    if "://" in source.removeprefix("hf://"):
        return None
    name = source.rpartition("/")[2].lower()
    if "gguf" in name:
        return None
    parts = [part for part in name.split("-") if not _OTHER_PARTS.fullmatch(part)]
    shape = SHAPES.get("-".join(parts))
    kind = next((kind for pattern, kind in _QUANTIZATION_IN_NAME if re.search(pattern, name)), "")
    return replace(shape, quantization=kind) if shape and kind else shape


def guess_of(source: Any) -> Shape | None:
    """A shape that the name of an unknown model suggests: of the known model in it (``Hermes-3-Llama-3.1-8B``), or no
    more than the weights that it speaks of (``70b``); None where it says neither, or a format that is not known here.
    """
    if not isinstance(source, str) or folder(source) or _OTHER_FORMATS.search(source.lower()):
        return None
    name = source.rstrip("/").rpartition("/")[2].lower()
    kind = next((kind for pattern, kind in _QUANTIZATION_IN_NAME if re.search(pattern, name)), "")
    inside = [key for key in SHAPES if re.search(rf"(^|[-_]){re.escape(key)}($|[-_])", name)]
    if inside:
        shape = SHAPES[max(inside, key=len)]
        return replace(shape, quantization=kind or shape.quantization)
    said = re.search(r"(?<![a-z0-9.])(\d+x)?(\d+(?:\.\d+)?)b(?![a-z0-9])", name)
    if not said:
        return None
    # Names round up, and experts share their attention.
    billions = float(said[2]) * (0.8 * int(said[1][:-1]) if said[1] else 0.9)
    # All weights in experts that none goes through: they take memory and nothing else does.
    return Shape(1, 1, 64, 64, 0, 1, 0, True, 2048, experts=int(billions * 1e9 / 3), quantization=kind)


def _shape_of_folder(place: Path, config: Mapping[str, Any]) -> Shape | None:
    """The shape in a folder's config.json, with the size of its safetensors files; None where it cannot be told."""
    try:
        files = _bytes_of_files(place)
        text = {**config, **(config.get("text_config") or {})}
        heads, hidden, layers = (int(text[key]) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        kinds = text.get("layer_types") or []
        cached = [kind for kind in kinds if "linear" not in kind and "mamba" not in kind] if kinds else [""] * layers
        sliding = [kind for kind in cached if "sliding" in kind]
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        experts = next((int(text[name]) for name in names if text.get(name)), 0)
        quantization = config.get("quantization_config") or {}
        family = str(text.get("model_type", "")).removesuffix("_text")
        if not files and family not in _FAMILIES:
            return None
        return _make(
            family, hidden, len(cached), heads, int(text.get("num_key_value_heads") or heads),
            int(text.get("head_dim") or hidden // heads),
            int((experts and text.get("moe_intermediate_size")) or text["intermediate_size"]),
            int(text["vocab_size"]), bool(text.get("tie_word_embeddings")), int(text["max_position_embeddings"]),
            experts=experts, active=int(text.get("num_experts_per_tok") or 0),
            window=int(text.get("sliding_window") or 0) if sliding else 0, full_layers=len(cached) - len(sliding),
            latent=int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"]) if text.get("kv_lora_rank") else 0,
            quantization=str(quantization.get("quant_method", "")), files=files,
            file_dtype=4 if str(text.get("dtype") or text.get("torch_dtype")).endswith("float32") else 2,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None


def _bytes_of_files(place: Path) -> int:
    """Bytes of a folder's safetensors files, as their index says or as they lie there; 0 without any."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        index = json.loads((place / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return int(index["metadata"]["total_size"])
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))


@dataclass(frozen=True)
class Need:
    """What one GPU of a replica has to hold, in bytes."""

    weights: float
    #: KV cache of one sequence of ``length`` tokens.
    cache: float
    length: int
    activations: float
    graphs: float
    runtime: float
    #: What vLLM may use.
    budget: float

    @property
    def total(self) -> float:
        """With one sequence of full length, the least with which vLLM starts."""
        return self.weights + self.cache + self.activations + self.graphs + self.runtime

    @property
    def fits(self) -> bool:
        """Whether vLLM starts."""
        return self.total <= self.budget

    @property
    def sequences(self) -> float:
        """How many sequences of full length the KV cache holds at a time."""
        return (self.budget - self.total) / self.cache + 1 if self.cache else math.inf

    @property
    def tight(self) -> bool:
        """Whether it fits with little to spare: less than a tenth of the budget, or than two sequences."""
        return self.fits and (self.total > 0.9 * self.budget or self.sequences < 2)


def _number(engine: Mapping[str, Any], name: str, default: float) -> float:
    value = engine.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else default


def need(shape: Shape, engine: Mapping[str, Any], gpu: Gpu) -> Need:
    """What a model needs of each of its GPUs, by the engine's arguments (vLLM's names and defaults)."""
    tensor, pipeline = (int(_number(engine, f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    # Defaults of engine/arg_utils.py for the OpenAI server.
    large = gpu.memory >= 70 and not gpu.name.startswith("a100")
    seqs = int(_number(engine, "max_num_seqs", 1024 if large else 256))
    # With -1 vLLM takes the longest that fits.
    length = BLOCK if engine.get("max_model_len") == -1 else int(_number(engine, "max_model_len", shape.length))
    default = 16384 if gpu.memory >= 160 else 8192 if large else 2048
    if engine.get("enable_chunked_prefill") is False:
        default = max(default, length)
    batched = int(_number(engine, "max_num_batched_tokens", default))
    dtype = _dtype(shape, engine, gpu)
    layers = math.ceil(shape.layers / pipeline)
    wide = shape.active * (3 * shape.intermediate + shape.hidden) or 3 * shape.intermediate
    activations = dtype * batched * (3 * shape.hidden + wide / tensor)
    sampler = _SAMPLER * seqs * shape.vocab
    eager = engine.get("enforce_eager") is True
    graphs = 0 if eager else _graphs(seqs, batched) * layers * _GRAPH
    # Measured: the run that compiles takes as much as the embedding once more.
    compiled = 0 if eager else dtype * shape.embedding / tensor
    share = _number(engine, "gpu_memory_utilization", UTILIZATION)
    return Need(
        weights=max(0.0, _weights(shape, engine, dtype, tensor, pipeline) - _number(engine, "cpu_offload_gb", 0) * GIB),
        cache=_cache(shape, engine, length, batched, dtype) * layers / shape.layers / _split(shape, tensor),
        length=length,
        activations=max(activations, sampler, compiled),
        graphs=graphs,
        runtime=_RUNTIME + (_NCCL if tensor * pipeline > 1 else 0),
        budget=gpu.memory * GIB * share,
    )


def _dtype(shape: Shape, engine: Mapping[str, Any], gpu: Gpu) -> int:
    """Bytes of a number that is not quantized. Some families go wrong in float16, and older GPUs have no bfloat16."""
    given = engine.get("dtype", "auto")
    full = given == "auto" and gpu.capability < 8 and shape.family in _NOT_IN_FLOAT16
    return 4 if full or given in ("float32", "float") else 2


def _split(shape: Shape, tensor: int) -> float:
    """Into how many parts tensor parallelism cuts the KV cache: whole heads, and a latent not at all."""
    return 1 if shape.latent else shape.kv_heads / math.ceil(shape.kv_heads / tensor)


def _quantization(shape: Shape, engine: Mapping[str, Any]) -> str:
    given = engine.get("quantization")
    return _ENGINE_QUANTIZATION.get(given, shape.quantization) if isinstance(given, str) else shape.quantization


def _weights(shape: Shape, engine: Mapping[str, Any], dtype: int, tensor: int, pipeline: int) -> float:
    """Bytes of one GPU's weights. Quantization leaves embeddings and norms alone, and MXFP4 all but the experts."""
    kind = _quantization(shape, engine)
    if shape.files and (shape.quantization or kind not in QUANTIZED):
        return shape.files * (1 if shape.quantization else dtype / shape.file_dtype) / tensor / pipeline
    small = QUANTIZED.get(kind, dtype)
    attention = shape.attention * (dtype if kind == "mxfp4" else small)
    layer = attention + shape.mlp * small + shape.small * dtype
    ends = shape.embedding * (1 if shape.tied or pipeline > 1 else 2) + shape.hidden + shape.tower
    return (math.ceil(shape.layers / pipeline) * layer + ends * dtype) / tensor


def _cache(shape: Shape, engine: Mapping[str, Any], length: int, batched: int, dtype: int) -> float:
    """Bytes of one sequence in the KV cache, over all layers and GPUs."""
    kind = str(engine.get("kv_cache_dtype", "auto"))
    size = 0.5 if kind.startswith(("int4", "nvfp4")) else 1 if kind.startswith(("fp8", "int8")) else dtype
    token = (shape.latent or 2 * shape.kv_heads * shape.head_dim) * size
    # Blocks are whole; a window may start inside one, and one block of the pool is never given out.
    whole = (math.ceil(length / BLOCK) + 1) * BLOCK
    if not shape.window:
        return shape.layers * whole * token
    window = (math.ceil(min(shape.window - 1 + batched, length) / BLOCK) + 2) * BLOCK
    return (shape.full_layers * whole + (shape.layers - shape.full_layers) * min(window, whole)) * token


def _graphs(seqs: int, batched: int) -> int:
    """How many CUDA graphs vLLM captures: one a size for mixed batches, one more where a batch may be all decoding."""
    largest = min(seqs * 2, 512, batched)
    sizes: list[int] = [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if size <= largest]
    return len(sizes) + len([size for size in sizes if size <= seqs])


def sum_line(found: Need, shape: Shape, gpu: Gpu) -> str:
    """The sum in words: each part in GiB, and what it is held against."""
    counted = "files" if shape.files else f"{shape.parameters / 1e9:.2f} billion parameters"
    parts = {
        f"weights ({counted})": found.weights,
        f"KV cache of one sequence of {found.length:,} tokens": found.cache,
        "activations": found.activations,
        "CUDA graphs": found.graphs,
        "runtime": found.runtime,
    }
    told = " + ".join(f"{size / GIB:.1f} {name}" for name, size in parts.items() if size >= GIB / 20)
    share = found.budget / GIB / gpu.memory
    return (
        f"{told} = {found.total / GIB:.1f} GiB, and vLLM may use {found.budget / GIB:.1f} GiB of the {gpu.title}"
        f" ({gpu.memory} GiB x {share:.2f})"
    )


def cures(shape: Shape, engine: Mapping[str, Any], gpu: Gpu, roomy: bool = False) -> Iterator[str]:
    """What would make the model fit (with room to spare where ``roomy``), with its numbers."""

    def told(changed: Mapping[str, Any], on: Gpu = gpu, of: Shape = shape) -> str:
        found = need(of, {**engine, **changed}, on)
        fits = found.fits and not (roomy and found.tight)
        return f"{found.total / GIB:.1f} of {found.budget / GIB:.1f} GiB" if fits else ""

    share = _number(engine, "gpu_memory_utilization", UTILIZATION)
    if share < UTILIZATION and (fits := told({"gpu_memory_utilization": UTILIZATION})):
        yield f"gpu_memory_utilization {UTILIZATION} ({fits})"
    for length in range((need(shape, engine, gpu).length - 1) // 1024 * 1024, 0, -1024):
        if fits := told({"max_model_len": length}):
            yield f"max_model_len {length} ({fits})"
            break
    if not _quantization(shape, engine) and (fits := told({}, of=replace(shape, quantization="int4", files=0))):
        yield f"the model in AWQ or GPTQ with 4 bit ({fits})"
    tensor = int(_number(engine, "tensor_parallel_size", 1))
    for more in (2, 4, 8):
        if tensor < more and shape.heads % more == 0 and (fits := told({"tensor_parallel_size": more})):
            yield f"tensor_parallel_size and resources.gpu {more} ({fits} each)"
            break
    for other in GPUS:
        if other.memory > gpu.memory and other.capability >= 7.5 and (fits := told({}, other)):
            yield f"nvidia-{other.name}, of {other.families[0]} machines ({fits})"
            break
