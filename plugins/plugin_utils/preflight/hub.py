# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the hub gives the models: those that are gated need the token of an account that accepted their licence, and
all have weights that vLLM loads."""

from __future__ import annotations

import fnmatch
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from ansible_collections.rayplane.platform.plugins.module_utils.serving.model_sync import has_weights, skipped
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    HUB_ID,
    Values,
    entries_of,
    strings,
)

__all__ = ["check_hub", "hub_models", "known_gated", "no_weights"]

_PATIENCE = 5
_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".tflite")
_TOKEN = "secrets_hugging_face_token"  # noqa: S105 - the variable's name
#: Repositories whose pages ask for the licence to be accepted, for where the hub cannot be asked.
_GATED = (
    *("meta-llama/*", "google/gemma*", "google/*gemma-*", "CohereLabs/*", "CohereForAI/*", "bigcode/starcoder*"),
    *("mistralai/Mixtral-8x22B*", "mistralai/Mistral-7B*", "mistralai/Mistral-Large*", "mistralai/Codestral*"),
    *("tiiuae/falcon-180B*", "black-forest-labs/FLUX.1-dev", "stabilityai/stable-*"),
)


def known_gated(model: str) -> bool:
    """Whether a hub id is among those that are known to be gated."""
    return any(fnmatch.fnmatchcase(model.lower(), pattern.lower()) for pattern in _GATED)


def hub_models(values: Values) -> Iterator[tuple[str, str]]:
    """Path and id of each model that comes from the hub."""
    for path, entry in entries_of(values, "rayservice_models"):
        source = entry.get("source")
        if isinstance(source, str) and HUB_ID.fullmatch(source):
            yield f"{path}.source", source


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a renamed repository, and takes the token to no other host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:  # noqa: PLR0917
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _ask(url: str, what: str, token: str) -> tuple[int, str] | None:
    """The hub's status, and its answer or error code; None where it does not answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/api/models/{what}", headers=headers)  # noqa: S310
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=_PATIENCE) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _code(error.headers.get("X-Error-Code"), error.read(2000))
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _code(header: str | None, body: bytes) -> str:
    if header:
        return header
    try:
        return str(json.loads(body).get("error", ""))
    except (ValueError, AttributeError):
        return ""


def no_weights(where: str, entry: Mapping[str, Any], names: Sequence[str], ignored: Any) -> Iterator[Problem]:
    """Among a source's files are none that vLLM loads, or ``ignored`` leaves them out of what is brought to it."""
    patterns, engine = ignored if strings(ignored) else (), entry.get("engine")
    if has_weights(engine, [name for name in names if not skipped(name, patterns)]):
        return
    kinds = ", ".join(sorted({f"*{ending}" for ending in _WEIGHTS for name in names if name.endswith(ending)}))
    loaded = [name for name in names if has_weights(engine, [name])]
    left_out = ", ".join(one for one in patterns if any(skipped(name, [one]) for name in loaded))
    yield Problem(
        where,
        entry["source"],
        f"it holds no weights in safetensors (it has {kinds or 'no weights'})",
        "name a source that has them: save_pretrained of the transformers library writes them"
        + (f"; or take {left_out} out of models_ignore" if left_out else ""),
    )


def _files(url: str, model: str, entry: Mapping[str, Any], token: str) -> list[str]:
    """Names of a model's files; empty where the hub does not tell them."""
    answer = _ask(url, f"{quote(model)}/revision/{quote(str(entry.get('revision') or 'main'), safe='')}", token)
    try:
        return [str(one["rfilename"]) for one in json.loads(answer[1] if answer else "")["siblings"]]
    except (ValueError, KeyError, TypeError):
        return []


def check_hub(values: Values) -> Iterator[Problem]:
    """Each model of the hub can be fetched with the token that is given, as the hub says or, without it, a table."""
    given, url = values.get(_TOKEN), values.get("platform_hub_url")
    token = given if isinstance(given, str) else ""
    asking = isinstance(url, str) and bool(url) and os.environ.get("HF_HUB_OFFLINE", "") not in ("1", "true", "TRUE")
    ignored = values.get("models_ignore") if values.get("models_hub_mode", "copy") == "copy" else ()
    entries = dict(entries_of(values, "rayservice_models"))
    lacking: list[str] = []
    for path, model in hub_models(values):
        # As huggingface_hub.HfApi.auth_check asks.
        answer = _ask(str(url), f"{quote(model)}/auth-check", token) if asking else None
        # One that does not answer is not asked again.
        asking = asking and answer is not None
        if answer is None:
            if not token and known_gated(model):
                lacking.append(model)
            continue
        status, code = answer
        if status < 400:
            entry = entries[path.removesuffix(".source")]
            if names := _files(str(url), model, entry, token):
                yield from no_weights(path, entry, names, ignored)
            continue
        if code == "GatedRepo" and not token:
            lacking.append(model)
        elif code == "GatedRepo":
            yield Problem(
                path,
                model,
                f"the model is gated, and the account of {_TOKEN} has no access to it",
                f"accept its licence with that account at {str(url).rstrip('/')}/{model}, and give the token the right"
                " to read gated repositories",
            )
        elif code == "RepoNotFound" or status == 404:
            yield Problem(
                path,
                model,
                f"{url} has no such model, or it is private and {_TOKEN} may not read it",
                "correct the id, or give a token that may read it",
            )
        elif status == 401 and token:
            yield Problem(_TOKEN, ABSENT, f"{url} does not accept the token ({code or status})", "make a new one")
            return
    if lacking:
        yield Problem(
            _TOKEN,
            ABSENT,
            "no Hugging Face token, and the hub gives gated models to accounts alone that accepted their licence"
            f" ({', '.join(dict.fromkeys(lacking))})",
            "accept the licence on the model's page, then set HUGGING_FACE_HUB_TOKEN in the environment; or name a"
            " folder or an s3:// address as source",
        )
