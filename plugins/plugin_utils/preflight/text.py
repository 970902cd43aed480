# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What has to be text stays text: labels, annotations, selectors, environment, tags, parameters of ``ray start``.

Kubernetes refuses anything else there, and Python would write YAML's ``true`` as ``True``, which no program expects.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.engine import serving_release
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import (
    ABSENT,
    Problem,
    is_secret,
    nearest,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.specs import from_text, name_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values, entries_of

__all__ = ["Respelled", "texts"]

#: Variables and keys whose mappings hold text alone, by the end of their names; also those of charts' values.
_TEXT = re.compile(r"(^|_)(annotations|env|labels|node_selector|ray_start_params|tags)$"
                   r"|([a-z]A|^a)nnotations$|([a-z]L|^l)abels$|nodeSelector$")  # fmt: skip
_TAINTS = re.compile(r"(^|_|[a-z])([tT]aints|[tT]olerations)$")
_ENV = re.compile(r"(^|_|[a-z])[eE]nv$")
#: Programs that take 1 and 0 for true and false, by the beginnings of their variables.
_ONE_AND_ZERO = re.compile(r"(VLLM|HF|RAY|NCCL|TORCH|TORCHDYNAMO|PYTORCH|CUDA|TRANSFORMERS|PYTHON)_?[A-Z]")
#: A model's own words, and where a number or a truth value was surely meant as text.
_MODEL_TEXTS = ("source", "revision", "license", "checksum", "route_prefix")


class Respelled(int):
    """A whole number whose digits are not what its author wrote: YAML reads 0042 as 34, and 12:30:00 as 45000."""

    written: str


def texts(values: Values) -> Iterator[Problem]:
    """Every value that Kubernetes, AWS or a program takes as text is written as text."""
    # Variables that are filled in from another have its faults, which are told there.
    tags, models = values.get("platform_tags"), values.get("rayservice_models")
    for name, value in sorted(values.items()):
        given = value
        if name.endswith("_tags") and name != "platform_tags" and isinstance(value, Mapping):
            given = {key: inner for key, inner in value.items() if _own(tags, key) != inner}
        if name == "rayservice_models" or value != models:
            yield from _walk(name, name, given, name.startswith("secrets_"))
    for path, pool in entries_of(values, "autoscaler_node_pools"):
        for where, requirement in entries_of({path: pool.get("requirements")}, path):
            said: Any = requirement.get("values")
            for index, value in enumerate(said if isinstance(said, list | tuple) else ()):
                if not _is_text(value):
                    yield _problem(f"{where.replace(path, f'{path}.requirements')}.values[{index}]", value)
    for path, entry in entries_of(values, "rayservice_models"):
        for key in _MODEL_TEXTS:
            if entry.get(key) is not None and not isinstance(entry[key], str):
                yield _problem(f"{path}.{key}", entry[key])
    yield from _vllm_environment(values)


def _own(mapping: Any, key: str) -> Any:
    return mapping.get(key, ABSENT) if isinstance(mapping, Mapping) else ABSENT


def _walk(path: str, key: str, value: Any, secret: bool) -> Iterator[Problem]:
    if isinstance(value, Mapping):
        if _TEXT.search(key) or _ENV.search(key) or (secret and key == "data"):
            # Whole numbers are written as text where no API would take another kind.
            whole = key.endswith("tags") or bool(_ENV.search(key)) or key == "data"
            for name, inner in value.items():
                if not _is_text(inner, whole):
                    yield _problem(f"{path}.{name}", inner, str(name) if _ENV.search(key) else "")
            return
        for name, inner in value.items():
            yield from _walk(f"{path}.{name}", str(name), inner, secret)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            where = f"{path}[{index}]"
            if isinstance(inner, Mapping) and (_TAINTS.search(key) or _ENV.search(key)):
                if "value" in inner and not _is_text(inner["value"]):
                    name = str(inner.get("name", "")) if _ENV.search(key) else ""
                    yield _problem(f"{where}.value", inner["value"], name)
            else:
                yield from _walk(where, "", inner, secret)


def _is_text(value: Any, whole: bool = False) -> bool:
    return isinstance(value, str) or (whole and isinstance(value, int) and not isinstance(value, bool | Respelled))


def _problem(path: str, value: Any, variable: str = "") -> Problem:
    """``variable`` is the environment variable that the value is for, if it is for one."""
    if value is None:
        return Problem(path, None, "nothing stands behind the colon, and it must be text", 'write "", or delete it')
    if isinstance(value, bool) and variable:
        number = f'"{int(value)}"'
        cure = f"write {number}" if _ONE_AND_ZERO.match(variable) else f'write {number} or "{str(value).lower()}"'
        reason = "YAML reads it as true or false, which a program would get as True or False"
        return Problem(path, value, reason, f"{cure}, as the program reads it")
    if isinstance(value, bool):
        word = str(value).lower()
        reason = f"YAML reads {'yes and on' if value else 'no and off'} as {word}, too, and it must be text"
        return Problem(path, value, reason, f'put it in quotes, as you mean it: "{word}"')
    if isinstance(value, Respelled) and not is_secret(path, value):
        reason = f"YAML reads {value.written} as the number {value}, and it must be text"
        return Problem(path, value, reason, f'put it in quotes: "{value.written}"')
    if isinstance(value, int | float | datetime.date):
        cure = "put it in quotes" if is_secret(path, value) else f'put it in quotes: "{value}"'
        return Problem(path, value, f"YAML reads it as {name_of(value)}, and it must be text", cure)
    return Problem(path, value, f"it is {name_of(value)}, and it must be text", 'write it as one text, "..."')


def _vllm_environment(values: Values) -> Iterator[Problem]:
    """vLLM's own variables: their names, and that flags and numbers are digits."""
    ray = values.get("rayservice_ray_version")
    release = serving_release(ray) if isinstance(ray, str) and re.fullmatch(r"[\d.]+", ray) else {}
    found = [("rayservice_env", values.get("rayservice_env"))]
    found += [(f"{path}.env", entry.get("env")) for path, entry in entries_of(values, "rayservice_models")]
    for path, env in found:
        for name, value in env.items() if isinstance(env, Mapping) and release else ():
            if not str(name).startswith("VLLM_"):
                continue
            if name not in release["environment"]:
                guess = nearest(str(name), release["environment"], 0.7)
                cure = f"did you mean {guess}?" if guess else "delete it"
                reason = f"vLLM {release['vllm']} reads no such variable"
                yield Problem(f"{path}.{name}", value, reason, cure, warning=True)
            elif (
                name in release["environment_numbers"]
                and isinstance(value, str)
                and not re.fullmatch(r"\s*[-+]?\d[\d_.]*\s*", value)
            ):
                word = from_text(value, "bool")
                cure = {"true": 'write "1"', "false": 'write "0"'}.get(word, "write a number in quotes")
                reason = "vLLM reads a number here and does not start with anything else"
                yield Problem(f"{path}.{name}", value, reason, cure)
