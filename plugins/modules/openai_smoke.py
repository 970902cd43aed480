#!/usr/bin/python
"""Ask every model something through the OpenAI API and judge the answers."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: openai_smoke
short_description: Ask every model something through the OpenAI API and judge the answers
description:
  - For each model the list of models, a chat completion (twice, at temperature 0), a completion and a streamed chat
    completion are asked
    for with the C(openai) package. Finish reason, token counts and the text are checked.
  - While nothing answers, the question is asked again until O(timeout) is over, because a service that has just been
    deployed may still be
    starting. An answer that is wrong three times fails at once.
  - Without O(base_url) the Service in the cluster is reached through a C(kubectl port-forward) that lives as long as
    the call. It gets the kubeconfig and the context of the other modules (E(K8S_AUTH_KUBECONFIG), E(K8S_AUTH_CONTEXT),
    E(K8S_AUTH_HOST), E(KUBECONFIG)).
  - Nothing is changed. In check mode nothing is asked.
options:
  base_url:
    description: Address of the API without C(/v1), for example C(http://127.0.0.1:30080).
    type: str
    default: ""
  service:
    description: The C(namespace), C(name) and C(port) of the Service for the port-forward.
    type: dict
    default: {}
  kubectl:
    description: The kubectl for the port-forward.
    type: str
    default: kubectl
  api_key:
    description: The key to send, where the API wants one.
    type: str
    default: ""
  api_key_file:
    description: A file with the key, read where O(api_key) is empty.
    type: path
  api_key_secret:
    description: >-
      The C(namespace) and C(name) of a Secret that has the key (C(key)), read where neither of the two above gives one.
    type: dict
    default: {}
  models:
    description: >-
      What to ask: C(id), C(route_prefix), and optionally C(prompt), C(expect) (a text that the chat answer must
      contain), C(max_tokens).
    type: list
    elements: dict
    required: true
  timeout:
    description: Seconds until the models must have answered, in all.
    type: int
    default: 300
  request_timeout:
    description: Seconds for one request.
    type: int
    default: 60
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Lists what would be asked.
"""

EXAMPLES = r"""
- name: Ask the models
  rayplane.platform.openai_smoke:
    base_url: http://127.0.0.1:30080
    models:
      - {id: smollm2-135m-instruct, route_prefix: /, prompt: "What is the capital of France?", expect: Paris}
"""

RETURN = r"""
answers:
  description: For each model the address, the texts, finish reasons, token counts and seconds.
  type: list
  returned: success
"""

import base64
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    Cluster,
    KubeError,
    Resource,
    connection_from_environment,
    kubectl_settings,
)

Json = dict[str, Any]

PROMPT = "What is the capital of France? Answer in one sentence."
# A chat model may well end at once after a bare question, but not in the middle of a tale.
OPENING = "Once upon a time, in a small village by the sea, there lived"
# An answer that is wrong this often is wrong; a service that does not answer at all may still be starting.
WRONG_ANSWERS = 3


class AnswerError(Exception):
    """An answer is not what a healthy model gives."""


class WrongAnswerError(AnswerError):
    """Asking again does not help."""


def sane(text: str, what: str) -> str:
    """``text`` where it is non-empty printable prose, else AnswerError."""
    stripped = text.strip()
    if not stripped:
        raise AnswerError(f"{what}: the answer is empty")
    odd = [char for char in stripped if not char.isprintable() and char not in "\n\t\r"]
    if odd or "\N{REPLACEMENT CHARACTER}" in stripped:
        raise AnswerError(f"{what}: the answer holds unprintable characters: {stripped[:80]!r}")
    if not re.search(r"\w", stripped):
        raise AnswerError(f"{what}: the answer holds no word: {stripped[:80]!r}")
    return stripped


def check_usage(usage: Any, what: str) -> Json:
    """Token counts that add up."""
    if usage is None:
        raise AnswerError(f"{what}: no token counts")
    counts = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens, "total": usage.total_tokens}
    if counts["prompt"] < 1 or counts["completion"] < 1 or counts["prompt"] + counts["completion"] != counts["total"]:
        raise AnswerError(f"{what}: token counts do not add up: {counts}")
    return counts


def check_finish(reason: str | None, what: str) -> str:
    if reason not in ("stop", "length"):
        raise AnswerError(f"{what}: finish reason is {reason!r}, not stop or length")
    return reason


def ask(client: Any, model: Json) -> Json:
    """All questions to one model. Raises AnswerError, or the client's own errors."""
    name = model["id"]
    prompt, limit = model.get("prompt") or PROMPT, int(model.get("max_tokens", 32))
    listed = [entry.id for entry in client.models.list()]
    if name not in listed:
        raise AnswerError(f"models: {name} is not listed (listed: {', '.join(listed) or 'none'})")
    messages = [{"role": "user", "content": prompt}]
    started = time.monotonic()
    chat = client.chat.completions.create(model=name, messages=messages, max_tokens=limit, temperature=0)
    seconds = time.monotonic() - started
    text = sane(chat.choices[0].message.content or "", "chat")
    finish = check_finish(chat.choices[0].finish_reason, "chat")
    usage = check_usage(chat.usage, "chat")
    again = client.chat.completions.create(model=name, messages=messages, max_tokens=limit, temperature=0)
    if (again.choices[0].message.content or "").strip() != text:
        raise AnswerError(
            f"chat: two answers at temperature 0 differ: {text!r} and {again.choices[0].message.content!r}"
        )
    expected = model.get("expect")
    if expected and expected.lower() not in text.lower():
        raise AnswerError(f"chat: {expected!r} is expected in the answer, which is {text!r}")
    # Sampling is another path of the engine than temperature 0, and most clients take it.
    sampled = client.chat.completions.create(model=name, messages=messages, max_tokens=limit)
    check_usage(sampled.usage, "sampled chat")
    check_finish(sampled.choices[0].finish_reason, "sampled chat")
    done = client.completions.create(model=name, prompt=OPENING, max_tokens=limit, temperature=0)
    check_usage(done.usage, "completion")
    check_finish(done.choices[0].finish_reason, "completion")
    sane(done.choices[0].text, "completion")
    pieces, stream_finish, first = [], None, 0.0
    started = time.monotonic()
    for chunk in client.chat.completions.create(
        model=name, messages=messages, max_tokens=limit, temperature=0, stream=True
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - started
            pieces.append(chunk.choices[0].delta.content)
        if chunk.choices and chunk.choices[0].finish_reason:
            stream_finish = chunk.choices[0].finish_reason
    check_finish(stream_finish, "stream")
    if "".join(pieces).strip() != text:
        raise AnswerError(f"stream: the streamed answer {''.join(pieces)!r} differs from the whole one {text!r}")
    return {
        "id": name,
        "prompt": prompt,
        "answer": text,
        "finish_reason": finish,
        "usage": usage,
        "seconds": round(seconds, 2),
        "first_token_s": round(first, 2),
        "stream_chunks": len(pieces),
    }


def key_of(given: Json) -> str:
    """The key to ask with: given, in a file, or in a Secret; empty where there is none. Raises KubeError, OSError."""
    if given["api_key"]:
        return str(given["api_key"])
    if given["api_key_file"] and Path(given["api_key_file"]).is_file():
        return Path(given["api_key_file"]).read_text(encoding="utf-8").strip()
    if not given["api_key_secret"]:
        return ""
    place = given["api_key_secret"]
    secret = Cluster(connection_from_environment()).get(
        Resource("v1", "Secret", "secrets", True), place["namespace"], place["name"]
    )
    return base64.b64decode(((secret or {}).get("data") or {}).get("key", "")).decode()


@contextmanager
def forwarded(kubectl: str, service: Json, folder: Path) -> Iterator[str]:
    """Address of a ``kubectl port-forward`` to the Service of the cluster that every other task talks to, ended
    afterwards."""
    options, environment = kubectl_settings(folder)
    command = [kubectl, *options, "port-forward", "--address", "127.0.0.1", "-n", service["namespace"]]
    command += [f"svc/{service['name']}", f":{service['port']}"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            match = re.search(r"127\.0\.0\.1:(\d+)", line)
            if not match:
                # Without a line it has ended, or is about to.
                said = line or (process.stderr.read() if process.stderr else "")
                raise AnswerError(f"{' '.join(command)}: {said.strip() or 'no answer'}")
            yield f"http://127.0.0.1:{match[1]}"
        finally:
            process.terminate()


def run(module: AnsibleModule, base_url: str, key: str, deadline: float, answers: list[Json]) -> None:
    """Ask the models that have not answered yet; each failure is retried until the deadline."""
    import httpx  # noqa: PLC0415 - two seconds that check mode need not pay
    import openai  # noqa: PLC0415

    given = module.params
    # No proxy and no keys of the environment: the answer has to come from the address that is printed.
    with httpx.Client(trust_env=False, timeout=given["request_timeout"]) as http:
        for model in given["models"][len(answers) :]:
            url = base_url.rstrip("/") + model.get("route_prefix", "/").rstrip("/") + "/v1"
            client = openai.OpenAI(base_url=url, api_key=key or "none", http_client=http, max_retries=0)
            wrong = 0
            while True:
                try:
                    answers.append({**ask(client, model), "url": url})
                    break
                except (openai.OpenAIError, httpx.HTTPError, AnswerError) as error:
                    # 400 and 422 are about the request: a model without a chat template, say.
                    wrong += isinstance(error, (AnswerError, openai.BadRequestError, openai.UnprocessableEntityError))
                    if wrong >= WRONG_ANSWERS:
                        raise WrongAnswerError(f"model {model['id']} at {url}: {error}") from error
                    if time.monotonic() > deadline:
                        raise AnswerError(f"model {model['id']} at {url}: {error}") from error
                    time.sleep(2)


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION, secret=("api_key",)),
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        questions = [f"{model['id']}: {model.get('prompt') or PROMPT}" for model in given["models"]]
        module.exit_json(changed=False, answers=[], questions=questions)
    deadline = time.monotonic() + given["timeout"]
    answers: list[Json] = []
    try:
        key = key_of(given)
    except (KubeError, OSError, ValueError) as error:
        module.fail_json(msg=f"the API key cannot be read: {error}")
    while True:
        try:
            if given["base_url"]:
                run(module, given["base_url"], key, deadline, answers)
            else:
                with forwarded(given["kubectl"], given["service"], Path(module.tmpdir)) as url:
                    # A port-forward ends with its pod: it gets a short patience, and a new one is opened.
                    run(module, url, key, min(deadline, time.monotonic() + 30), answers)
            break
        except AnswerError as error:
            if isinstance(error, WrongAnswerError):
                module.fail_json(msg=f"the answer is wrong: {error}", answers=answers)
            if time.monotonic() > deadline:
                module.fail_json(msg=f"no answer within {given['timeout']} s: {error}", answers=answers)
            time.sleep(2)
        except OSError as error:
            module.fail_json(msg=f"{given['kubectl']} cannot be started: {error}", answers=answers)
    module.exit_json(changed=False, answers=answers)


if __name__ == "__main__":
    main()
