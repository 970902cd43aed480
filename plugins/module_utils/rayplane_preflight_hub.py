# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the hub gives the models: those that are gated need the token of an account that accepted their licence."""

from __future__ import annotations

import fnmatch
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from ansible.module_utils.rayplane_preflight import ABSENT, Problem
from ansible.module_utils.rayplane_preflight_values import HUB_ID, Values, entries_of

__all__ = ["check_hub", "hub_models", "known_gated"]

_PATIENCE = 5
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


def _ask(url: str, model: str, token: str) -> tuple[int, str] | None:
    """The hub's status and error code on a model's files; None where it does not answer.

    As ``huggingface_hub.HfApi.auth_check`` asks.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/api/models/{quote(model)}/auth-check", headers=headers)  # noqa: S310
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=_PATIENCE) as answer:
            return int(answer.status), ""
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


def check_hub(values: Values) -> Iterator[Problem]:
    """Each model of the hub can be fetched with the token that is given, as the hub says or, without it, a table."""
    given, url = values.get(_TOKEN), values.get("platform_hub_url")
    token = given if isinstance(given, str) else ""
    asking = isinstance(url, str) and bool(url) and os.environ.get("HF_HUB_OFFLINE", "") not in ("1", "true", "TRUE")
    lacking: list[str] = []
    for path, model in hub_models(values):
        answer = _ask(str(url), model, token) if asking else None
        # One that does not answer is not asked again.
        asking = asking and answer is not None
        if answer is None:
            if not token and known_gated(model):
                lacking.append(model)
            continue
        status, code = answer
        if status < 400:
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
