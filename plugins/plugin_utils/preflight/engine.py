# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over what starts a model: vLLM's arguments, Serve's options, LoRA, and the accelerator they run on.

Names and types come from ``roles/preflight/files/serving-<release>.json``, which tools/engine_arguments.py makes from
the classes of that release of Ray and its vLLM.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import GPUS, Gpu, ray_name
from ansible_collections.rayplane.platform.plugins.module_utils.serving.memory import config_of, shape_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.memory import model_gpu
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem, step
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.specs import KINDS, from_text, name_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    Values,
    bounds,
    bucket_name_problem,
    entries_of,
    strings,
    whole,
)

__all__ = ["check_type", "engines", "serving_release"]

_FILES = Path(__file__).resolve().parents[3] / "roles" / "preflight" / "files"

#: Arguments of earlier releases, and what stands in their place.
_DROPPED = {
    "max_concurrent_queries": "use max_ongoing_requests",
    "cuda_graph_sizes": "use cudagraph_capture_sizes",
    "device": "delete it; the image and resources.gpu say where the model runs",
    "disable_log_requests": "delete it; requests are logged only where enable_log_requests is true",
    "guided_decoding_backend": "use structured_outputs_config: {backend: ...}",
    "max_seq_len_to_capture": "use max_cudagraph_capture_size",
    "num_scheduler_steps": "delete it; vLLM's scheduler has no steps any more",
    "num_speculative_tokens": "use speculative_config: {num_speculative_tokens: ...}",
    "rope_scaling": "use hf_overrides: {rope_parameters: {...}}",
    "rope_theta": "use hf_overrides: {rope_parameters: {rope_theta: ...}}",
    "speculative_model": "use speculative_config: {model: ...}",
    "swap_space": "delete it; vLLM recomputes what it preempts",
    "task": "use runner and convert",
    "use_v2_block_manager": "delete it; there is only one",
}
#: Arguments of vLLM's own web server, which does not run here: Serve's does.
_OF_THE_SERVER = re.compile(r"allow(_credentials|ed_(headers|methods|origins))|api_key|host|port|middleware|root_path"
                            r"|ssl_.*|uds|uvicorn_log_level|enable_ssl_refresh")  # fmt: skip
#: Formats that a repository's name tells and that vLLM has no loader for.
_FORMATS = re.compile(
    r"(?<![a-z])(gguf|ggml|mlx|exl[23]|onnx|openvino|coreml|tflite|llamafile)(?![a-z])", re.IGNORECASE
)
#: An argument that works only beside another.
_NEEDS = {
    "enable_auto_tool_choice": "tool_call_parser",
    "enable_elastic_ep": "enable_eplb",
    "enable_eplb": "enable_expert_parallel",
    "numa_bind_cpus": "numa_bind",
    "numa_bind_nodes": "numa_bind",
}
#: An argument that does nothing without another.
_IDLE_WITHOUT = {
    "tool_call_parser": "enable_auto_tool_choice",
    **dict.fromkeys(
        ("max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype", "fully_sharded_loras", "lora_target_modules"),
        "enable_lora",
    ),
}
#: Compute capability from which an attention backend runs (vllm/v1/attention/backends); the others choose themselves.
_ATTENTION = {"FLASH_ATTN": 80, "FLASHINFER": 80, "FLASHMLA": 90, "CUTLASS_MLA": 100, "FLASHINFER_MLA": 100}
_LORA_SCHEMES = ("s3://", "gs://", "abfss://", "azure://")


@functools.cache
def serving_release(ray: str) -> Mapping[str, Any]:
    """What a release of Ray and its vLLM take; empty for one that is not on file."""
    try:
        file = _FILES / f"serving-{'.'.join(ray.split('.')[:2])}.json"
        found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found


def engines(values: Values) -> Iterator[Problem]:
    """Each model's arguments are known to its release of vLLM and Serve, and fit each other and the accelerator."""
    ray = values.get("rayservice_ray_version")
    release = serving_release(ray) if isinstance(ray, str) and re.fullmatch(r"[\d.]+", ray) else {}
    models = list(entries_of(values, "rayservice_models"))
    if not release and isinstance(ray, str) and any(entry.get("engine") for _, entry in models):
        known = sorted(file.stem.removeprefix("serving-") for file in _FILES.glob("serving-*.json"))
        yield Problem(
            "rayservice_ray_version",
            ray,
            f"names and types of the models' engine are on file for Ray {', '.join(known)} alone, and pass unchecked",
            "run tools/engine_arguments.py with the image's Python, or look them up in vLLM's documentation",
            warning=True,
        )
    ignored = values.get("models_ignore") if values.get("models_hub_mode", "copy") == "copy" else ()
    for path, entry in models:
        engine = entry.get("engine")
        engine = engine if isinstance(engine, Mapping) else {}
        vllm = f"vLLM {release.get('vllm', '')}".rstrip()
        for key, section, owner in (
            ("engine", "engine", vllm),
            ("deployment", "deployment", "Ray Serve"),
            ("lora", "lora", "Ray Serve"),
            ("placement", "placement", "Ray Serve"),
        ):
            if release and isinstance(entry.get(key), Mapping):
                given = {
                    name: value
                    for name, value in entry[key].items()
                    if name not in ("model", "served_model_name") and not str(name).startswith("placement_group_")
                }
                yield from check_type(f"{path}.{key}", given, release[section], owner)
        yield from _format(path, entry, ignored if strings(ignored) else (), release, vllm)
        yield from _together(f"{path}.engine", engine)
        yield from _under_serve(path, entry, engine)
        yield from _known_to_ray(path, entry, values.get("rayservice_accelerators"), release)
        gpu = model_gpu(values, entry)
        yield from _on_accelerator(path, entry, engine, release, gpu)
        yield from _in_image(path, entry, values.get("rayservice_image"), gpu)
        yield from _heads(path, entry, engine)
        yield from _lora(path, entry, engine)
        yield from _scaling(path, entry, values)


def check_type(path: str, value: Any, said: Any, owner: str) -> Iterator[Problem]:
    """A value against a type of the file: the keys of a mapping, a list of values, or words for kinds."""
    if isinstance(said, Mapping):
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key in said:
                    yield from check_type(f"{path}.{key}", inner, said[key], owner)
                else:
                    yield Problem(f"{path}.{key}", inner, f"{owner} knows no such key", _nearest(str(key), said))
        elif value is not None:
            yield Problem(path, value, f"it is {name_of(value)} and must be a mapping", f"known keys: {_some(said)}")
        return
    if isinstance(said, list):
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in said):
            alike = difflib.get_close_matches(str(value), [str(one) for one in said if one], 3, 0.6)
            cure = f"did you mean {' or '.join(alike)}?" if alike else f"choose one of {_some(filter(None, said))}"
            yield Problem(path, value, f"it is none of the values that {owner} takes", cure)
        return
    alternatives = said.split("|")
    if value is None and ("null" in alternatives or said == "any"):
        return
    if value is None:
        yield Problem(path, None, "nothing stands behind the colon", "delete the line, or give a value")
    elif not any(_is(value, word) for word in alternatives):
        yield _wrong(path, value, [word for word in alternatives if word != "null"], owner)


def _is(value: Any, word: str) -> bool:
    kind, limits = re.match(r"([a-z]+)(.*)", word).groups()  # type: ignore[union-attr]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "any": True,
        "bool": isinstance(value, bool),
        "int": whole(value),
        "float": number,
        "str": isinstance(value, str),
        "list": isinstance(value, list | tuple),
        "dict": isinstance(value, Mapping),
    }
    return fits.get(kind, False) and (not number or not _outside(value, limits))


def _outside(value: float, limits: str) -> bool:
    signs = {">": value.__gt__, ">=": value.__ge__, "<": value.__lt__, "<=": value.__le__}
    return not all(signs[sign](type(value)(float(limit))) for sign, limit in re.findall(r"([<>]=?)([-\d.]+)", limits))


def _wrong(path: str, value: Any, alternatives: Sequence[str], owner: str) -> Problem:
    kinds = [re.sub(r"[<>=].*", "", word) for word in alternatives]
    wanted = " or ".join(KINDS[kind][0] for kind in kinds)
    if "list" in kinds and isinstance(value, str):
        return Problem(path, value, f"{owner} takes {wanted} here, and it is text", f"write [{value}]")
    if isinstance(value, str):
        example = next(filter(None, (from_text(value, kind) for kind in kinds)), "")
        if not example and "int" in kinds and (short := re.fullmatch(r"(\d+)([kKmMgG])", value)):
            power = "kmg".index(short[2].lower()) + 1
            example = str(int(short[1]) * (1000 if short[2].islower() else 1024) ** power)
        cure = f"write {example} without quotes" if example else f"write {wanted}, or delete it"
        return Problem(path, value, f"{owner} takes {wanted} here, and it is text", cure)
    limits = " or ".join(word for word in alternatives if re.search(r"[<>]", word))
    if limits and isinstance(value, int | float) and not isinstance(value, bool):
        bound = re.sub(r"^[a-z]+", "", limits).replace(">=", "from ").replace(">", "above ").replace("<=", " to ")
        return Problem(path, value, f"{owner} takes {wanted} {bound} here", f"write {wanted} {bound}")
    if kinds == ["int"] and isinstance(value, float):
        return Problem(path, value, f"{owner} takes {wanted} here", f"write {max(1, round(value))}")
    example = f'"{value}"' if kinds == ["str"] and not isinstance(value, Mapping | list) else KINDS[kinds[0]][1]
    return Problem(path, value, f"{owner} takes {wanted} here, and it is {name_of(value)}", f"write {example}")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    if name in _DROPPED:
        return _DROPPED[name]
    plain = name.lstrip("-").replace("-", "_").lower()
    alike = [plain] if plain in known else difflib.get_close_matches(plain, list(known), 3, 0.7)
    if alike:
        return f"did you mean {' or '.join(alike)}?"
    return f"delete it; known keys: {_some(known)}" if len(known) < 20 else "delete it; nothing known is alike"


def _some(known: Any) -> str:
    names = [str(name) for name in known]
    return ", ".join(names[:20]) + (" and so on" if len(names) > 20 else "")


def _format(
    path: str, entry: Mapping[str, Any], ignored: Sequence[str], release: Mapping[str, Any], vllm: str
) -> Iterator[Problem]:
    """The weights are in a format that the serving image loads, and that is brought to it."""
    engine = entry["engine"] if isinstance(entry.get("engine"), Mapping) else {}
    no_bnb = bool(release) and "bitsandbytes" not in release["engine"]["quantization"]
    source, load_format = entry.get("source"), engine.get("load_format")
    if isinstance(source, str) and (file := re.search(r"/[^/]+\.(safetensors|bin|pth?|ckpt|gguf|json)$", source)):
        yield Problem(
            f"{path}.source",
            source,
            "it names one file, and a model is a folder with config.json, tokenizer and weights in safetensors",
            f"write {source.removesuffix(file[0])}, if the folder holds them",
        )
    elif isinstance(source, str) and not source.startswith(("/", ".", "~")):
        scheme, address, rest = source.rpartition("://")
        name = rest.rstrip("/").rpartition("/")[2] if address and scheme != "hf" else rest
        found = _FORMATS.search(name) or (re.search(r"(?<![a-z])(bnb)(?![a-z])", name) if no_bnb else None)
        if found:
            yield Problem(
                f"{path}.source",
                source,
                f"the name says {found[1]}, and {vllm} in the serving image has no loader for it",
                "name the repository with the original weights in safetensors, or one quantized with AWQ, GPTQ or FP8",
            )
        elif ":" in name:
            yield Problem(
                f"{path}.source",
                source,
                f"what follows the colon chooses one file of a GGUF repository, which {vllm} does not load",
                "name a repository with weights in safetensors; a branch or commit is the model's revision",
            )
    if load_format in ("pt", "npcache"):
        ending = ".pt" if load_format == "pt" else ".bin"
        pattern = next((one for one in ignored if fnmatch.fnmatch(f"model{ending}", one)), None)
        if pattern:
            yield Problem(
                f"{path}.engine.load_format",
                load_format,
                f"it loads {ending} files, and models_ignore ({pattern}) keeps them from the bucket",
                f"convert the weights to safetensors and delete load_format, or take {pattern} out of models_ignore",
            )


def _together(where: str, engine: Mapping[str, Any]) -> Iterator[Problem]:
    """Arguments that exclude or need each other."""
    for name, needed in _NEEDS.items():
        if engine.get(name) and not engine.get(needed):
            example = "hermes, llama3_json or mistral, by the model" if needed == "tool_call_parser" else "true"
            yield Problem(
                f"{where}.{name}", engine[name], f"vLLM refuses it without {needed}", f"set {needed} to {example}"
            )
    for name, needed in _IDLE_WITHOUT.items():
        if name in engine and not engine.get(needed):
            yield Problem(
                f"{where}.{name}",
                engine[name],
                f"it has no effect without {needed}",
                f"set {needed} to true, or delete it",
                warning=True,
            )
    for low, high in (("max_num_seqs", "max_num_batched_tokens"), ("max_loras", "max_cpu_loras")):
        least: Any = engine.get(low)
        most: Any = engine.get(high)
        if whole(least) and whole(most) and 0 < most < least:
            yield Problem(
                f"{where}.{high}",
                most,
                f"vLLM takes no {high} below {low}, which is {least}",
                f"write {least} or more, or lower {low}",
            )


def _under_serve(path: str, entry: Mapping[str, Any], engine: Mapping[str, Any]) -> Iterator[Problem]:
    """What Ray Serve LLM decides itself."""
    where = f"{path}.engine"
    if engine.get("disable_log_stats") is True:
        yield Problem(
            f"{where}.disable_log_stats",
            True,
            "Ray Serve LLM makes the model's metrics from vLLM's statistics and refuses to start without them",
            "delete it",
        )
    size: Any = engine.get("data_parallel_size")
    told = ("data_parallel_size_local",) if whole(size) and size > 1 else ()
    if whole(size) and size > 1:
        yield Problem(
            f"{where}.data_parallel_size",
            size,
            "a replica has one placement group, with GPUs for tensor and pipeline parallelism alone, so the other"
            f" {size - 1} ranks would find none",
            f"delete the data_parallel_ keys and set {path}.replicas.min to {size}: replicas share the load as well",
        )
    alone = "a replica's placement group has GPUs for tensor and pipeline parallelism alone"
    for name, what in (
        *((name, alone) for name in ("prefill_context_parallel_size", "data_parallel_size_local") if name not in told),
        ("nnodes", "Ray starts the engine's workers, on other nodes, too: nobody would start the other node's engine"),
    ):
        number: Any = engine.get(name)
        if whole(number) and number > 1:
            yield Problem(f"{where}.{name}", number, what, f"delete {name}, or use pipeline_parallel_size")
    tensor, context = engine.get("tensor_parallel_size", 1), engine.get("decode_context_parallel_size", 1)
    if whole(tensor) and whole(context) and context > 1 and tensor % context:
        yield Problem(
            f"{where}.decode_context_parallel_size",
            context,
            f"it divides the GPUs of tensor_parallel_size, which is {tensor}",
            f"write a divisor of {tensor}, or delete it",
        )
    backend = engine.get("distributed_executor_backend")
    resources = entry.get("resources")
    gpu = resources.get("gpu") if isinstance(resources, Mapping) else 0
    if isinstance(backend, str) and backend != "ray" and gpu and not entry.get("placement"):
        yield Problem(
            f"{where}.distributed_executor_backend",
            backend,
            "on GPUs Ray Serve LLM runs vLLM's workers as Ray actors and refuses any other",
            "delete it",
        )
    for name in engine:
        if _OF_THE_SERVER.fullmatch(str(name)):
            yield Problem(
                f"{where}.{name}",
                "(not shown)" if name == "api_key" else engine[name],
                "it is of vLLM's own web server, which does not run here: Ray Serve's does",
                "delete it; keys, addresses and TLS are the gateway's and the Service's",
                warning=True,
            )


def _known_to_ray(path: str, entry: Mapping[str, Any], table: Any, release: Mapping[str, Any]) -> Iterator[Problem]:
    """Serve LLM takes the accelerators of Ray's list alone."""
    resources = entry.get("resources")
    name = str(resources.get("accelerator") or "") if isinstance(resources, Mapping) and resources.get("gpu") else ""
    own = table.get(name) if isinstance(table, Mapping) else None
    known = release.get("accelerators", [])
    ray = (own.get("ray_name") if isinstance(own, Mapping) else None) or ray_name(name)
    if not name or not known or ray in known:
        return
    spelt = {one.lower(): one for one in known} | {gpu.name: f"nvidia-{gpu.name}" for gpu in GPUS}
    plain = re.sub(r"^(nvidia-)?(te[sz]la-)?", "", name.lower())
    alike = [spelt[one] for one in difflib.get_close_matches(plain, list(spelt), 2, 0.5)]
    yield Problem(
        f"{path}.resources.accelerator",
        name,
        f"Ray {release['ray']} knows no accelerator {ray}, and Serve LLM refuses it",
        (f"did you mean {' or '.join(alike)}? Or " if alike else "")
        + f"set rayservice_accelerators.{name}.ray_name to a name that Ray knows, such as {', '.join(known[:8])}",
    )


def _on_accelerator(
    path: str, entry: Mapping[str, Any], engine: Mapping[str, Any], release: Mapping[str, Any], gpu: Gpu | None
) -> Iterator[Problem]:
    """Number formats need hardware that computes with them."""
    found = round(gpu.capability * 10) if gpu else 0
    has = f"the {gpu.title} has compute capability {gpu.capability}" if gpu else ""
    dtype, cache, method = engine.get("dtype", "auto"), engine.get("kv_cache_dtype"), engine.get("quantization")
    unsafe = _no_float16(entry.get("source"), release)
    if found and found < 80 and dtype == "bfloat16":
        cure = "write float32, which takes twice the memory, or take a newer GPU" if unsafe else "write float16"
        yield Problem(f"{path}.engine.dtype", dtype, f"bfloat16 needs 8.0, and {has}", cure)
    elif unsafe and (dtype in ("half", "float16") or (dtype == "auto" and found and found < 80)):
        reason = f"{unsafe} models do not work in float16, so vLLM refuses it"
        reason += f"; bfloat16 needs 8.0, and {has}" if found and found < 80 else ""
        cure = "write float32, which takes twice the memory, or take a newer GPU"
        yield Problem(f"{path}.engine.dtype", dtype, reason, cure if found and found < 80 else "write bfloat16")
    if isinstance(cache, str) and found:
        least = 100 if cache.startswith("nvfp4") else 80 if cache.startswith(("fp8", "bfloat16")) else 0
        if found < least:
            yield Problem(
                f"{path}.engine.kv_cache_dtype",
                cache,
                f"a KV cache in {cache} needs {least / 10}, and {has}",
                "write auto, or take a newer GPU",
            )
    attention = str(engine.get("attention_backend") or "").upper()
    if found and found < _ATTENTION.get(attention, 0):
        reason = f"{attention} runs from compute capability {_ATTENTION[attention] / 10} on, and {has}"
        yield Problem(
            f"{path}.engine.attention_backend", engine["attention_backend"], reason, "delete it: vLLM chooses"
        )
    shape = shape_of(entry.get("source"))
    kind = method or (shape.quantization if shape else "")
    least = release.get("quantization_capability", {}).get(kind, 0) if isinstance(kind, str) else 0
    if found and found < least:
        yield Problem(
            f"{path}.engine.quantization",
            kind,
            f"{kind} weights need {least / 10}, and {has}",
            "take weights that are quantized in another way (gptq runs from 6.0 on), or a newer GPU",
        )
    own = config_of(entry.get("source")).get("quantization_config")
    own = own.get("quant_method") if isinstance(own, Mapping) else None
    if isinstance(method, str) and isinstance(own, str) and _family(own) != _family(method):
        yield Problem(
            f"{path}.engine.quantization",
            method,
            f"the model's config.json says {own}, and vLLM refuses another",
            "delete it: vLLM reads the method from the model",
        )


def _in_image(path: str, entry: Mapping[str, Any], image: Any, gpu: Gpu | None) -> Iterator[Problem]:
    """The image's CUDA, which its tag tells, knows the GPU. Source: CUDA 13's release notes, which end at 7.5."""
    cuda = re.search(r"[-:]cu(\d\d)\d\b", image) if isinstance(image, str) else None
    if cuda and int(cuda[1]) >= 13 and gpu and gpu.capability < 7.5:
        yield Problem(
            f"{path}.resources",
            entry["resources"],
            f"rayservice_image has CUDA {cuda[1]}, which begins with compute capability 7.5, and the {gpu.title} has"
            f" {gpu.capability}",
            "take a newer GPU, or an image of CUDA 12 (cu128)",
        )


def _family(method: str) -> str:
    """Methods that load each other's weights have one family: awq_marlin, auto_awq and awq."""
    return next((name for name in ("awq", "gptq", "fp8", "modelopt") if name in method), method)


def _no_float16(source: Any, release: Mapping[str, Any]) -> str:
    """The model's type where it does not work in float16, by its config.json or its name; else empty."""
    kinds = release.get("no_float16", ())
    own = config_of(source).get("model_type")
    name = re.sub(r"[^a-z0-9]", "", source.lower()) if isinstance(source, str) else ""
    return next((kind for kind in kinds if kind == own or (own is None and kind in name)), "")


def _heads(path: str, entry: Mapping[str, Any], engine: Mapping[str, Any]) -> Iterator[Problem]:
    """Tensor parallelism shares out whole attention heads."""
    shape = shape_of(entry.get("source"))
    size: Any = engine.get("tensor_parallel_size")
    heads = shape.heads if shape else 0
    if whole(size) and size > 0 and heads % size:
        yield Problem(
            f"{path}.engine.tensor_parallel_size",
            size,
            f"the model has {heads} attention heads, which {size} GPUs cannot share evenly",
            f"write {' or '.join(str(n) for n in range(1, min(heads, 16) + 1) if not heads % n)}",
        )


def _lora(path: str, entry: Mapping[str, Any], engine: Mapping[str, Any]) -> Iterator[Problem]:
    lora = entry.get("lora")
    if not isinstance(lora, Mapping) or not lora:
        return
    where, folder = f"{path}.lora", lora.get("dynamic_lora_loading_path")
    if isinstance(folder, str) and not folder.startswith(_LORA_SCHEMES):
        yield Problem(
            f"{where}.dynamic_lora_loading_path",
            folder,
            "Ray Serve fetches adapters from object storage alone",
            f"write an address that starts with {', '.join(_LORA_SCHEMES)}, such as s3://bucket/adapters",
        )
    elif isinstance(folder, str) and (
        wrong := folder.startswith("s3://") and bucket_name_problem(folder.removeprefix("s3://").partition("/")[0])
    ):
        yield Problem(f"{where}.dynamic_lora_loading_path", folder, f"its bucket: {wrong[0]}", wrong[1])
    if engine.get("enable_lora") is not True:
        yield Problem(
            where,
            dict(lora),
            "vLLM loads no adapter unless the engine's enable_lora is true",
            f"set {path}.engine.enable_lora to true, and max_lora_rank to the adapters' rank",
        )


def _scaling(path: str, entry: Mapping[str, Any], values: Values) -> Iterator[Problem]:
    """Bounds of Serve's autoscaling, of the model's ``replicas`` or its deployment's ``autoscaling_config``."""
    replicas, deployment = entry.get("replicas"), entry.get("deployment")
    deployment = deployment if isinstance(deployment, Mapping) else {}
    own = deployment.get("autoscaling_config")
    if isinstance(replicas, Mapping):
        yield from bounds(f"{path}.replicas", replicas.get("min"), replicas.get("max"))
    if isinstance(own, Mapping):
        names = "min_replicas", "max_replicas"
        yield from bounds(f"{path}.deployment.autoscaling_config", own.get(names[0]), own.get(names[1]), names)
    found: dict[str, tuple[str, Any]] = {}
    for name, place in (("min", "min_replicas"), ("max", "max_replicas"), ("initial", "initial_replicas"),
                        ("target_ongoing_requests", "target_ongoing_requests")):  # fmt: skip
        if isinstance(own, Mapping) and place in own:
            found[name] = f"{path}.deployment.autoscaling_config.{place}", own[place]
        elif isinstance(replicas, Mapping) and name in replicas:
            found[name] = f"{path}.replicas.{name}", replicas[name]
    low: Any = found.get("min", ("", 1))[1]
    high: Any = found.get("max", ("", max(low, 1) if whole(low) else 1))[1]
    where, initial = found.get("initial", ("", None))
    if whole(initial) and whole(low) and whole(high) and low <= high and not low <= initial <= high:
        yield Problem(
            where,
            initial,
            f"Serve takes an initial number from min to max, {low} to {high}",
            f"write {min(max(initial, low), high)}",
        )
    where, target = found.get("target_ongoing_requests", ("", None))
    if target is None and whole(low) and whole(high) and high > max(low, 1) and "max" in found:
        yield Problem(
            f"{path}.replicas.target_ongoing_requests",
            ABSENT,
            f"Serve LLM's default is a billion requests a replica, so Serve would never go from {low or 1} to {high}",
            "write 10, for example: how many requests a replica works on before another is added",
            warning=True,
        )
    number = isinstance(target, int | float) and not isinstance(target, bool)
    if number and target <= 0:
        yield Problem(
            where,
            target,
            "a replica's load is measured against it, so it is above 0",
            "write 10, for example",
        )
    most: Any = deployment.get("max_ongoing_requests")
    if number and whole(most) and target > most > 0:
        yield Problem(
            where,
            target,
            f"a replica never has more than {path}.deployment.max_ongoing_requests, {most}: Serve would never add one",
            f"write {max(1, most * 3 // 4)}, for example, or raise max_ongoing_requests",
        )
    if whole(low) and low == 0 and "min" in found:
        first = step(step(values.get("gateway_backend_defaults"), "timeouts"), "first_token_s")
        yield Problem(
            found["min"][0],
            0,
            "with no replica the first caller waits for a GPU node, its image and the weights: 5 to 15 minutes, of"
            f" which the gateway waits {120 if first is ABSENT else first} s (gateway_backend_defaults.timeouts."
            f"first_token_s) and Serve {values.get('rayservice_request_timeout_s')} s (rayservice_request_timeout_s)",
            "write 1, or mean it: callers get 504 until a replica runs, and have to ask again",
            warning=True,
        )
