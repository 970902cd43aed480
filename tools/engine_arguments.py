"""Write down what a release of Ray Serve LLM and its vLLM take: names and types of engine, deployment and LoRA keys.

Run it with the Python of a serving environment, once a release of Ray:

    PYTHON tools/engine_arguments.py roles/preflight/files

It writes ``serving-<Ray's major.minor>.json``, which preflight reads. A type is a text of alternatives joined by ``|``
(``bool``, ``int``, ``float``, ``str``, ``list``, ``dict``, ``null``, ``any``; a number may carry bounds, ``int>0``), a
list of the possible values, or the mapping of a nested configuration's own keys.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import vllm
from pydantic import BaseModel
from ray.llm._internal.common.placement import PlacementGroupConfig
from ray.llm._internal.serve.core.configs.llm_config import AcceleratorType, LoraConfig
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Deployment, DeploymentConfig
from ray.serve.schema import RayActorOptionsSchema
from vllm import envs
from vllm.config import SpeculativeConfig
from vllm.config.model import _FLOAT16_NOT_SUPPORTED_MODELS
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

Type = str | list[Any] | dict[str, Any]

_PLAIN = {bool: "bool", int: "int", float: "float", str: "str", list: "list", set: "list", tuple: "list", dict: "dict"}
_PLAIN |= {type(None): "null", Path: "str"}
#: Options of a deployment that Serve LLM sets itself, or that name no option.
_NOT_OPTIONS = {"self", "func_or_class", "version", "placement_group_bundles", "placement_group_strategy"}


def kind(annotation: Any, metadata: tuple[Any, ...] = (), nested: bool = True) -> Type:
    """The type of one field in the words above; a configuration inside a ``nested`` one is just a ``dict``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0], (*metadata, *arguments[1:]), nested)
    if origin is typing.Literal:
        return list(arguments)
    if origin in (typing.Union, types.UnionType):
        # What no YAML can say (a class, a function) is no alternative.
        said = [one for one in arguments if typing.get_origin(one) not in (type, collections.abc.Callable)]
        return join([kind(one, metadata, nested) for one in said])
    if not isinstance(origin or annotation, type):
        return "any"
    if dataclasses.is_dataclass(annotation) or issubclass(origin or annotation, BaseModel):
        free = issubclass(annotation, BaseModel) and annotation.model_config.get("extra") == "allow"
        return keys(annotation, nested=False) if nested and not free else "dict"
    if issubclass(origin or annotation, enum.Enum):
        return "int|str" if issubclass(annotation, int) else "str"
    word = _PLAIN.get(origin or annotation, "any")
    return word + "".join(bounds(metadata)) if word in ("int", "float") else word


def bounds(metadata: tuple[Any, ...]) -> typing.Iterator[str]:
    """Bounds of a number, from the annotations that pydantic reads."""
    for entry in metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (limit := getattr(entry, name, None)) is not None:
                yield f"{sign}{limit:g}"


def join(parts: list[Type]) -> Type:
    """One type out of a union's: values and null stay a list of values, a nested configuration stands for itself."""
    nested = next((part for part in parts if isinstance(part, dict)), None)
    if nested is not None:
        return nested
    values = [value for part in parts if isinstance(part, list) for value in part]
    words = list(dict.fromkeys(word for part in parts if isinstance(part, str) for word in part.split("|")))
    if "any" in words:
        return "any"
    if values and set(words) <= {"null"}:
        return [*values, None] if words and None not in values else values
    return "|".join(words)


def keys(owner: Any, nested: bool = True) -> dict[str, Type]:
    """Names and types of what a configuration class takes."""
    if issubclass(owner, BaseModel):
        fields = owner.model_fields.items()
        return {name: kind(field.annotation, tuple(field.metadata), nested) for name, field in fields}
    found: dict[str, Type] = {}
    names = vars(sys.modules[owner.__module__]) | {"QuantizationConfigArgs": dict}
    for field in dataclasses.fields(owner):
        if field.name.startswith("_") or not field.init:
            continue
        annotation = field.type
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, names)  # noqa: S307 - vLLM's own annotations
            except (NameError, TypeError):
                annotation = Any
        default = getattr(field.default, "default", field.default)  # pydantic's Field(...) stands in for a default
        said = kind(annotation, nested=nested)
        found[field.name] = join([said, "null"]) if default is None else said
    return found


def deployment() -> dict[str, Type]:
    """Options of Serve's deployments, as ``Deployment.options`` takes them and their classes type them."""
    typed = keys(DeploymentConfig)
    found = {name: typed.get(name, "any") for name in inspect.signature(Deployment.options).parameters}
    found = {name: found[name] for name in found if not name.startswith("_") and name not in _NOT_OPTIONS}
    return found | {
        "name": "str",
        "num_replicas": "int>=0|str|null",
        "max_replicas_per_node": "int>0|null",
        "autoscaling_config": keys(AutoscalingConfig),
        "ray_actor_options": keys(RayActorOptionsSchema),
        "request_router_config": keys(RequestRouterConfig),
    }


def capability(method: str) -> int:
    """Smallest compute capability that a quantization method runs on, as vLLM writes it: 75 for 7.5."""
    return int(get_quantization_config(method).get_min_capability())


def environment() -> dict[str, list[str]]:
    """vLLM's environment variables, and those of them that take a number: they fail on ``true``."""
    names = sorted(name for name in envs.environment_variables if name.startswith("VLLM_"))
    numbers = []
    for name in names:
        before = os.environ.get(name)
        os.environ[name] = "true"
        try:
            envs.environment_variables[name]()
        except ValueError as error:
            if "invalid literal for int" in str(error) or "could not convert" in str(error):
                numbers.append(name)
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})
    return {"environment": names, "environment_numbers": numbers}


def schema() -> Mapping[str, Any]:
    """Everything, in the order of the file."""
    engine = keys(FrontendArgs) | keys(AsyncEngineArgs)
    engine |= {
        "speculative_config": {
            name: said
            for name, said in keys(SpeculativeConfig, nested=False).items()
            if not name.startswith(("target_", "draft_model_c", "draft_parallel", "draft_load"))
        },
        "load_format": sorted(_LOAD_FORMAT_TO_MODEL_LOADER),
        "quantization": [*sorted(QUANTIZATION_METHODS), None],
        "reasoning_parser": ["", *sorted(ReasoningParserManager.list_registered())],
        "tool_call_parser": [*sorted(ToolParserManager.list_registered()), None],
    }
    return {
        "ray": ray.__version__,
        "vllm": vllm.__version__.partition("+")[0],
        **environment(),
        "accelerators": [one.value for one in AcceleratorType],
        "no_float16": sorted(_FLOAT16_NOT_SUPPORTED_MODELS),
        "quantization_capability": {method: capability(method) for method in sorted(QUANTIZATION_METHODS)},
        "deployment": dict(sorted(deployment().items())),
        "lora": keys(LoraConfig),
        "placement": keys(PlacementGroupConfig),
        "engine": dict(sorted(engine.items())),
    }


def render(found: Mapping[str, Any]) -> str:
    """JSON with a line a key, so that releases can be compared."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            lines.append(f"{json.dumps(name)}: {{\n{inner}\n }}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


if __name__ == "__main__":
    found = schema()
    series = ".".join(found["ray"].split(".")[:2])
    target = Path(sys.argv[1]) / f"serving-{series}.json"
    target.write_text(render(found), encoding="utf-8")
    print(f"{target}: Ray {found['ray']}, vLLM {found['vllm']}, {len(found['engine'])} engine arguments")
