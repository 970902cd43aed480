"""An OpenAI-compatible server that fails on request.

It answers as vLLM does (compact JSON, the same order of fields, `stream_options.include_usage` and
`continuous_usage_stats`) with texts that depend on the request alone, so that two requests with the same messages get
the same bytes. Knobs (class `Knobs`) are set for all requests by `POST /control` with a JSON object, for one request by
headers: `x-fake-token-s: 0.1` sets `token_s`. `GET /seen` lists the requests it got, `GET /generated` counts the tokens
it really wrote, `POST /reset` forgets both and the knobs, `POST /release` ends what `hold` began.

It speaks HTTP/1.1 over a plain asyncio transport, because a framework would not let it break the protocol.

    python -m tests.gateway.fake_backend --port 0        # prints `listening on PORT`
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import inspect
import os
import random
import re
import signal
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httptools
import msgspec
import uvloop

from .ports import reserve, taken
from .waiting import LONG_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
CREATED = 1_700_000_000
WORDS = [
    "The",
    " café",
    " über",
    " the",
    " river",
    " 日本",
    " opens",
    " 🚀",
    " at",
    " nine",
    ",",
    " naïve",
    " but",
    " warm",
    ".",
    " Then",
]
REASONS = {code.value: code.phrase for code in http.HTTPStatus}
TRACE = (
    "<html><head><title>500</title></head><body><h1>Internal Server Error</h1><pre>Traceback (most recent call last):\n"
    '  File "/srv/secret/engine.py", line 7, in generate\n    raise RuntimeError("CUDA error on 10.1.2.3")\n'
    "</pre></body></html>"
)


class Knobs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to answer. Times are seconds."""

    name: str = ""
    #: Models it has; empty: any name is fine (and /v1/models says "fake").
    models: list[str] = []
    #: Before the status line.
    latency_s: float = 0.0
    #: Between the status line and the first token (streams), or before the status line too (else).
    first_token_s: float = 0.0
    #: Between tokens; answers that are not streamed take it for each of their tokens.
    token_s: float = 0.0
    tokens: int = 8
    #: The model's context length: a longer request is refused as vLLM 0.29 does it.
    context: int = 8192
    #: As OpenAI's newer models: chats take max_completion_tokens and refuse max_tokens.
    newer_bound: bool = False
    #: The answer's text instead of so many words; its tokens are words with the space before them.
    text: str = ""
    #: The answer's text is the last message's.
    echo: bool = False
    status: int = 200
    #: The first n requests (since the knob was set) get `fail_status`, or die where that is 0.
    fail_first: int = 0
    fail_status: int = 503
    #: Abort the connection: before the status line, after the headers, after `after` tokens.
    die: Literal["", "before", "headers", "mid"] = ""
    #: Fall silent with the connection open, at the same places.
    hang: Literal["", "before", "headers", "mid"] = ""
    #: Wait with the connection open, at the same places, until `POST /release`.
    hold: Literal["", "before", "headers", "mid"] = ""
    #: Tokens before die, hang, hold, or a garbage chunk or event.
    after: int = 2
    #: json: 200 with no JSON; length: less body than content-length (or no last chunk), then the end; binary: no HTTP;
    #: chunk: a broken chunk header mid-stream; event: an event with broken JSON mid-stream.
    garbage: Literal["", "json", "length", "binary", "chunk", "event"] = ""
    #: In a stream, after `after` tokens: an error with this code as an event, as vLLM sends it, and the end.
    error_event: int = 0
    #: Answers of status 500 and above are an HTML page with a stack trace.
    html: bool = False
    #: Bytes of needless response headers.
    huge_headers: int = 0
    headers: dict[str, str] = {}
    #: Bytes of each write of a stream: 0: an event a write; -1: random places; n: every n bytes (inside characters).
    split: int = 0
    seed: int = 0
    #: Ends of lines in streams: lf, crlf, cr.
    newline: Literal["lf", "crlf", "cr"] = "lf"
    #: As OpenAI does: with include_usage every chunk carries `"usage":null`.
    usage_null: bool = False
    #: False: an engine that knows nothing of stream_options (no usage at all in streams).
    stream_usage: bool = True
    #: False: knows include_usage but not continuous_usage_stats.
    continuous: bool = True
    #: Leave out `data: [DONE]`.
    no_done: bool = False
    #: Of /v1/models and /health.
    health_status: int = 200
    health_latency_s: float = 0.0
    #: Call the first tool where tools are given.
    tool_calls: bool = True
    #: Keep what is asked in /seen.
    record: bool = True


TYPES = {field.encode_name: field.type for field in msgspec.structs.fields(Knobs)}
encode = msgspec.json.encode
decode = msgspec.json.decode


class Request:
    """One request as it came."""

    __slots__ = (
        "aborted",
        "body",
        "done",
        "headers",
        "json",
        "keep_alive",
        "knobs",
        "method",
        "path",
        "query",
        "target",
        "tokens",
    )

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.path = ""
        self.query = ""
        self.headers: list[tuple[str, str]] = []
        self.body = b""
        self.json: Any = None
        self.keep_alive = True
        self.tokens = 0
        self.aborted = False
        self.done = False
        self.knobs: Knobs = Knobs()

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")

    def seen(self) -> dict[str, Any]:
        """What /seen tells of it; `body_base64` is the body to the byte."""
        return {
            "method": self.method,
            "path": self.path,
            "query": self.query,
            "headers": self.headers,
            "body": self.body.decode("utf-8", "replace") if len(self.body) < 65536 else "",
            "body_base64": base64.b64encode(self.body).decode() if len(self.body) < 65536 else "",
            "body_length": len(self.body),
            "json": self.json if len(self.body) < 65536 else None,
            "tokens": self.tokens,
            "aborted": self.aborted,
            "done": self.done,
        }


class State:
    """What all connections share."""

    def __init__(self, knobs: Knobs) -> None:
        self.first = knobs
        self.reset()
        self.connections: set[Connection] = set()
        self.accepted = 0

    def reset(self) -> None:
        self.knobs = msgspec.structs.replace(self.first)
        self.requests: deque[Request] = deque(maxlen=20_000)
        self.count = 0
        self.failures = 0
        self.output_tokens = 0
        self.input_tokens = 0
        self.by_model: dict[str, dict[str, int]] = {}
        self.released = asyncio.Event()

    def generated(self, model: str, prompt: int, output: int) -> None:
        self.input_tokens += prompt
        self.output_tokens += output
        entry = self.by_model.setdefault(model, {"input_tokens": 0, "output_tokens": 0})
        entry["input_tokens"] += prompt
        entry["output_tokens"] += output


class DieError(Exception):
    """The connection is to be aborted."""


class BadRequestError(Exception):
    """An answer in vLLM's shape of errors."""

    def __init__(
        self, status: int, message: str, type: str = "BadRequestError", param: str | None = None, code: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"error": {"message": message, "type": type, "param": param, "code": code or status}}


def text_of(content: Any) -> str:
    """The text of a message's content, of a prompt, or of an input."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(
            text_of(part.get("text", part.get("content", "")) if isinstance(part, dict) else part) for part in content
        )
    return "" if content is None else str(content)


def count(text: str) -> int:
    """Prompt tokens: words."""
    return len(text.split())


def sample(schema: Any, root: Any) -> Any:
    """A value that a JSON schema allows."""
    if not isinstance(schema, dict):
        return "text"
    if "$ref" in schema:
        node = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        return sample(node, root)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return sample(schema[key][0], root)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object" or "properties" in schema:
        return {name: sample(part, root) for name, part in schema.get("properties", {}).items()}
    values = {"integer": 1, "number": 1.5, "boolean": True, "null": None}
    if kind == "array":
        return [sample(schema.get("items"), root)]
    return values.get(str(kind), "Müller 日本")


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}


class Plan:
    """The answer to a generation request: a prompt's size and the pieces of each choice."""

    def __init__(self, request: Request, operation: str) -> None:
        body, knobs = request.json, request.knobs
        self.operation = operation
        self.model = body.get("model") or (knobs.models[0] if knobs.models else "fake")
        if operation == "chat":
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise BadRequestError(
                    400, "[{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required'}]"
                )
            self.source = " ".join(
                text_of(message.get("content")) if isinstance(message, dict) else "" for message in messages
            )
            last = text_of(messages[-1].get("content")) if isinstance(messages[-1], dict) else ""
        else:
            given = body.get("prompt") if operation == "completions" else body.get("input")
            if given is None:
                field = "prompt" if operation == "completions" else "input"
                raise BadRequestError(
                    400, f"[{{'type': 'missing', 'loc': ('body', '{field}'), 'msg': 'Field required'}}]"
                )
            self.source = last = text_of(given)
        temperature = body.get("temperature")
        if isinstance(temperature, int | float) and not 0 <= temperature <= 2:
            raise BadRequestError(400, f"temperature must be in [0, 2], got {temperature}.", param="temperature")
        limit = self.bound(body, knobs)
        self.prompt = count(self.source)
        self.id = format(zlib.crc32(self.source.encode()), "08x") * 4
        self.finish = "stop"
        self.tool: str | None = None
        form = body.get("response_format") or (body.get("text") or {}).get("format") or {}
        tools = body.get("tools")
        chooses = body.get("tool_choice")
        answered = (
            operation == "chat"
            and isinstance(body["messages"][-1], dict)
            and body["messages"][-1].get("role") == "tool"
        )
        if tools and knobs.tool_calls and chooses != "none" and not answered and operation == "chat":
            function = tools[0]["function"]
            if isinstance(chooses, dict):
                function = next(
                    (tool["function"] for tool in tools if tool["function"]["name"] == chooses["function"]["name"]),
                    function,
                )
            self.tool = function["name"]
            self.finish = "tool_calls"
            text = knobs.text or encode(sample(function.get("parameters", {}), function.get("parameters", {}))).decode()
        elif form.get("type") == "json_schema":
            schema = form.get("json_schema", form).get("schema", {})
            text = encode(sample(schema, schema)).decode()
        elif form.get("type") == "json_object":
            text = '{"answer":"warm"}'
        elif knobs.echo:
            text = last
        else:
            text = knobs.text
        self.pieces = (
            re.findall(r"\s*\S+\s*$|\s*\S+", text) if text else [WORDS[i % len(WORDS)] for i in range(knobs.tokens)]
        )
        if limit < len(self.pieces):
            self.pieces = self.pieces[:limit]
            self.finish = "length"
        self.n = body.get("n") if isinstance(body.get("n"), int) else 1

    def bound(self, body: dict[str, Any], knobs: Knobs) -> int:
        """The most tokens of a choice: what is asked for, within what the longest prompt leaves of the context."""
        names = {"chat": ("max_completion_tokens", "max_tokens"), "completions": ("max_tokens",)}
        name, limit = next(
            (
                (one, body[one])
                for one in names.get(self.operation, ("max_output_tokens",))
                if body.get(one) is not None
            ),
            ("", 16 if self.operation == "completions" else None),
        )
        if knobs.newer_bound and self.operation == "chat" and "max_tokens" in body:
            raise BadRequestError(
                400,
                "Unsupported parameter: 'max_tokens' is not supported with this model."
                " Use 'max_completion_tokens' instead.",
                "invalid_request_error",
                "max_tokens",
                "unsupported_parameter",
            )
        if isinstance(limit, int) and name and limit < 1:
            raise BadRequestError(400, f"max_tokens must be at least 1, got {limit}.", param="max_tokens")
        limit = limit if isinstance(limit, int) else 0
        context = knobs.context
        if limit > context:
            raise BadRequestError(
                400,
                f"{name}={limit} cannot be greater than max_model_len=max_total_tokens={context}. Please request fewer"
                " output tokens.",
                param=name,
            )
        given = body.get("prompt")
        prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [self.source]
        longest = max(count(text_of(one)) for one in prompts)
        if longest > context - limit:
            # The tokenizer stops one token beyond what is allowed.
            most = context - limit + 1
            raise BadRequestError(
                400,
                f"This model's maximum context length is {context} tokens. However, you requested {limit} output tokens"
                f" and your prompt contains at least {most} input tokens, for a total of at least {most + limit}"
                " tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
                param="input_tokens",
            )
        return min(limit or context, context - longest)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        output = len(self.pieces) * self.n
        if self.operation == "responses":
            return self.response("completed", self.text)
        choices: list[dict[str, Any]] = []
        for index in range(self.n):
            if self.operation == "completions":
                choices.append(
                    {
                        "index": index,
                        "text": self.text,
                        "logprobs": None,
                        "finish_reason": self.finish,
                        "stop_reason": None,
                        "prompt_logprobs": None,
                    }
                )
                continue
            message: dict[str, Any] = {
                "role": "assistant",
                "content": self.text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
            }
            if self.tool:
                message["content"] = None
                message["tool_calls"] = [
                    {
                        "id": f"call_{self.id[:8]}",
                        "type": "function",
                        "function": {"name": self.tool, "arguments": self.text},
                    }
                ]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": self.finish,
                    "stop_reason": None,
                    "token_ids": None,
                }
            )
        kind, name = ("cmpl", "text_completion") if self.operation == "completions" else ("chatcmpl", "chat.completion")
        return {
            "id": f"{kind}-{self.id}",
            "object": name,
            "created": CREATED,
            "model": self.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": {**usage(self.prompt, output), "prompt_tokens_details": None},
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        }

    def response(self, status: str, text: str) -> dict[str, Any]:
        """An object of the responses API."""
        done = status == "completed"
        output = len(self.pieces)
        return {
            "id": f"resp_{self.id}",
            "created_at": CREATED,
            "incomplete_details": None,
            "instructions": None,
            "metadata": None,
            "model": self.model,
            "object": "response",
            "output": [self.item("completed", text)] if done else [],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "status": status,
            "usage": {
                "input_tokens": self.prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.prompt + output,
            }
            if done
            else None,
        }

    def item(self, status: str, text: str) -> dict[str, Any]:
        content = (
            [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}]
            if status == "completed"
            else []
        )
        return {"id": f"msg_{self.id}", "content": content, "role": "assistant", "status": status, "type": "message"}

    def events(self, options: Any, knobs: Knobs) -> Any:
        """The stream's events as (event bytes, tokens in it)."""
        if self.operation == "responses":
            yield from self.response_events(knobs)
            return
        options = options if isinstance(options, dict) else {}
        include = bool(options.get("include_usage")) and knobs.stream_usage
        continuous = include and bool(options.get("continuous_usage_stats")) and knobs.continuous
        chat = self.operation == "chat"
        kind, name = ("chatcmpl", "chat.completion.chunk") if chat else ("cmpl", "text_completion")
        head = b'data: {"id":"%s-%s","object":"%s","created":%d,"model":%s,"choices":' % (
            kind.encode(),
            self.id.encode(),
            name.encode(),
            CREATED,
            encode(self.model),
        )
        produced = 0

        def event(choices: list[dict[str, Any]], last: bytes = b"") -> bytes:
            tail = b""
            if continuous:
                tail = b',"usage":' + encode(usage(self.prompt, produced))
            elif include and knobs.usage_null:
                tail = b',"usage":null'
            return head + encode(choices) + tail + last + b"}\n\n"

        if chat:
            for index in range(self.n):
                choice = {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
                yield event([choice], b',"prompt_token_ids":null'), 0
        if self.tool:
            for index in range(self.n):
                call = {
                    "id": f"call_{self.id[:8]}",
                    "type": "function",
                    "index": 0,
                    "function": {"name": self.tool, "arguments": ""},
                }
                yield (
                    event([{"index": index, "delta": {"tool_calls": [call]}, "logprobs": None, "finish_reason": None}]),
                    0,
                )
        size = len(self.pieces)
        for place, piece in enumerate(self.pieces):
            for index in range(self.n):
                produced += 1
                if not chat:
                    final = self.finish if place == size - 1 else None
                    yield (
                        event(
                            [
                                {
                                    "index": index,
                                    "text": piece,
                                    "logprobs": None,
                                    "finish_reason": final,
                                    "stop_reason": None,
                                }
                            ]
                        ),
                        1,
                    )
                    continue
                delta = (
                    {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
                    if self.tool
                    else {"content": piece}
                )
                yield (
                    event(
                        [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}]
                    ),
                    1,
                )
        if chat:
            for index in range(self.n):
                choice = {
                    "index": index,
                    "delta": {"content": ""},
                    "logprobs": None,
                    "finish_reason": self.finish,
                    "stop_reason": None,
                    "token_ids": None,
                }
                yield event([choice]), 0
        if include:
            yield head + b'[],"usage":' + encode(usage(self.prompt, produced)) + b"}\n\n", 0
        if not knobs.no_done:
            yield b"data: [DONE]\n\n", 0

    def response_events(self, knobs: Knobs) -> Any:
        number = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            body = {**fields, "sequence_number": number, "type": kind}
            number += 1
            return b"event: " + kind.encode() + b"\ndata: " + encode(body) + b"\n\n"

        place = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}
        yield event("response.created", response=self.response("in_progress", "")), 0
        yield event("response.in_progress", response=self.response("in_progress", "")), 0
        yield event("response.output_item.added", item=self.item("in_progress", ""), output_index=0), 0
        part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        yield event("response.content_part.added", part=part, **place), 0
        for piece in self.pieces:
            yield event("response.output_text.delta", delta=piece, logprobs=[], **place), 1
        yield event("response.output_text.done", text=self.text, logprobs=[], **place), 0
        yield event("response.content_part.done", part={**part, "text": self.text}, **place), 0
        yield event("response.output_item.done", item=self.item("completed", self.text), output_index=0), 0
        yield event("response.completed", response=self.response("completed", self.text)), 0


class Wait:
    """Marks a place where an answer has to wait; answers that never do need no task, which makes this server fast."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __await__(self) -> Any:
        return (yield self)


async def later(seconds: float) -> None:
    await Wait(lambda: asyncio.sleep(seconds))


async def until(event: asyncio.Event) -> None:
    await Wait(event.wait)


class Connection(asyncio.Protocol):
    """One client connection; requests are answered one after the other."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.request = Request()
        self.waiting: deque[Request] = deque()
        self.task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.closed = False

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.state.connections.add(self)
        self.state.accepted += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self.state.connections.discard(self)
        self.writable.set()
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.closed:
                self.respond(
                    400,
                    encode({"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}}),
                    keep=False,
                )

    # httptools' side

    def on_message_begin(self) -> None:
        self.request = Request()

    def on_url(self, url: bytes) -> None:
        self.request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin-1").lower()
        self.request.headers.append((key, value.decode("latin-1")))
        if key == "expect":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.request.body += body

    def on_message_complete(self) -> None:
        request = self.request
        request.method = self.parser.get_method().decode()
        path, _, query = request.target.decode("latin-1").partition("?")
        request.path, request.query = path, query
        request.keep_alive = self.parser.should_keep_alive()
        if self.task is not None:
            self.waiting.append(request)
            return
        self.start(request)

    def start(self, request: Request) -> None:
        """Answer at once where nothing has to be waited for, in a task otherwise."""
        knobs = self.state.knobs
        own = [(name[7:].replace("-", "_"), value) for name, value in request.headers if name.startswith("x-fake-")]
        if own:
            values = {
                name: (value if TYPES.get(name) is str else msgspec.convert(value, TYPES[name], strict=False))
                for name, value in own
            }
            knobs = msgspec.structs.replace(knobs, **values)
        request.knobs = knobs
        coroutine = self.answer(request)
        try:
            wait = coroutine.send(None)
        except StopIteration:
            return
        except DieError:
            self.transport.abort()
            return
        self.task = asyncio.get_running_loop().create_task(self.finish(coroutine, wait, request))

    async def finish(self, coroutine: Any, wait: Wait, request: Request) -> None:
        try:
            while True:
                await wait.make()
                wait = coroutine.send(None)
        except StopIteration:
            pass
        except DieError:
            request.aborted = True
            self.transport.abort()
        except asyncio.CancelledError:
            request.aborted = True
        finally:
            coroutine.close()
            self.task = None
        self.next()

    def next(self) -> None:
        while self.waiting and self.task is None and not self.closed:
            self.start(self.waiting.popleft())

    # Answers

    def respond(
        self, status: int, body: bytes, kind: str = "application/json", *, keep: bool = True, knobs: Knobs | None = None
    ) -> None:
        head = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nserver: fake\r\n"
            f"content-length: {len(body)}\r\ncontent-type: {kind}\r\n{self.extra(knobs)}"
        )
        self.transport.write((head + ("" if keep else "connection: close\r\n") + "\r\n").encode("latin-1") + body)
        if not keep:
            self.transport.close()

    def extra(self, knobs: Knobs | None) -> str:
        if knobs is None or not (knobs.headers or knobs.huge_headers or knobs.name):
            return ""
        lines = [f"{name}: {value}\r\n" for name, value in knobs.headers.items()]
        if knobs.name:
            lines.append(f"x-fake-name: {knobs.name}\r\n")
        lines += [f"x-huge-{i}: {'h' * 1000}\r\n" for i in range(knobs.huge_headers // 1000)]
        return "".join(lines)

    async def answer(self, request: Request) -> None:
        state, knobs, path = self.state, request.knobs, request.path
        if path in CONTROLS:
            CONTROLS[path](self, request)
            return
        if request.body and request.header("content-type").split(";")[0].strip() in ("application/json", ""):
            try:
                request.json = decode(request.body)
            except ValueError:
                request.json = None
        if knobs.record:
            state.requests.append(request)
        state.count += 1
        if path in ("/health", "/v1/models", "/ping") and request.method in ("GET", "HEAD"):
            if knobs.health_latency_s:
                await later(knobs.health_latency_s)
            body = b""
            if path == "/v1/models":
                cards = [
                    {
                        "id": name,
                        "object": "model",
                        "created": CREATED,
                        "owned_by": "vllm",
                        "root": name,
                        "parent": None,
                        "max_model_len": knobs.context,
                    }
                    for name in knobs.models or ["fake"]
                ]
                body = encode({"object": "list", "data": cards})
            self.respond(knobs.health_status, b"" if request.method == "HEAD" else body, knobs=knobs)
            request.done = True
            return
        if knobs.latency_s:
            await later(knobs.latency_s)
        if knobs.hang == "before":
            await later(1e6)
        if knobs.hold == "before":
            await until(state.released)
        if knobs.die == "before":
            raise DieError
        if state.knobs.fail_first > state.failures:
            state.failures += 1
            if not state.knobs.fail_status:
                raise DieError
            self.fail(state.knobs.fail_status, knobs)
            return
        if knobs.garbage == "binary":
            self.transport.write(bytes(range(256)) * 4)
            self.transport.close()
            return
        if knobs.garbage == "json":
            self.respond(200, b'{"id": "chatcmpl-1", "choices": [', knobs=knobs)
            return
        if knobs.status != 200:
            self.fail(knobs.status, knobs)
            return
        handler = HANDLERS.get(path) or next(
            (value for name, value in HANDLERS.items() if name.endswith("/") and path.startswith(name)), None
        )
        if handler is None:
            self.respond(404, b'{"detail":"Not Found"}', knobs=knobs)
            return
        try:
            await handler(self, request)
            request.done = True
        except BadRequestError as error:
            self.respond(error.status, encode(error.error), knobs=knobs)

    def fail(self, status: int, knobs: Knobs) -> None:
        if knobs.html and status >= 500:
            self.respond(status, TRACE.encode(), "text/html", knobs=knobs)
            return
        kinds = {
            400: "BadRequestError",
            401: "AuthenticationError",
            404: "NotFoundError",
            429: "RateLimitError",
            503: "ServiceUnavailableError",
        }
        kind = kinds.get(status, "InternalServerError")
        self.respond(
            status,
            encode(
                {"error": {"message": f"The fake backend says {status}.", "type": kind, "param": None, "code": status}}
            ),
            knobs=knobs,
        )

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON object, its model checked."""
        if not isinstance(request.json, dict):
            raise BadRequestError(400, "[{'type': 'json_invalid', 'loc': ('body', 0), 'msg': 'JSON decode error'}]")
        model = request.json.get("model")
        if request.knobs.models and model not in request.knobs.models:
            raise BadRequestError(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
        return request.json

    async def whole(self, request: Request, body: dict[str, Any], tokens: int) -> None:
        """A JSON answer, its time being that of its tokens."""
        knobs = request.knobs
        delay = knobs.first_token_s + knobs.token_s * tokens
        if delay:
            await later(delay)
        text = encode(body)
        if knobs.garbage == "length" or knobs.die in ("headers", "mid") or knobs.hang in ("headers", "mid"):
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n".encode()
            self.transport.write(head + (b"" if "headers" in (knobs.die, knobs.hang) else text[: len(text) // 2]))
            if knobs.hang:
                await later(1e6)
            if knobs.die:
                await later(0.05)
                raise DieError
            self.transport.close()
            return
        self.respond(200, text, knobs=knobs, keep=request.keep_alive)

    async def generate(self, request: Request) -> None:
        operation = OPERATIONS[request.path]
        body = self.body(request)
        plan = Plan(request, operation)
        if not body.get("stream"):
            output = len(plan.pieces) * plan.n
            request.tokens = output
            await self.whole(request, plan.whole(), output)
            self.state.generated(plan.model, plan.prompt, output)
            return
        knobs = request.knobs
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            + b"transfer-encoding: chunked\r\n"
            + self.extra(knobs).encode("latin-1")
            + b"\r\n"
        )
        if knobs.die == "headers":
            await later(0.05)
            raise DieError
        if knobs.hang == "headers":
            await later(1e6)
        if knobs.hold == "headers":
            await until(self.state.released)
        if knobs.first_token_s:
            await later(knobs.first_token_s)
        self.state.generated(plan.model, plan.prompt, 0)
        chop = Chopper(knobs)
        for event, tokens in plan.events(body.get("stream_options"), knobs):
            if tokens:
                if request.tokens == knobs.after:
                    await self.fault(knobs)
                    if knobs.error_event:
                        self.error_event(operation, knobs.error_event)
                        return
                if knobs.token_s and request.tokens:
                    await later(knobs.token_s)
            if not self.writable.is_set():
                await until(self.writable)
            if self.closed:
                request.aborted = True
                return
            text = (
                event if knobs.newline == "lf" else event.replace(b"\n", b"\r\n" if knobs.newline == "crlf" else b"\r")
            )
            if knobs.split == 0:
                self.transport.write(b"%x\r\n%s\r\n" % (len(text), text))
            else:
                for piece in chop.cut(text):
                    self.transport.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    await later(0)
            if tokens:
                request.tokens += tokens
                self.state.generated(plan.model, 0, tokens)
        rest = chop.rest()
        if rest:
            self.transport.write(b"%x\r\n%s\r\n" % (len(rest), rest))
        self.transport.write(b"0\r\n\r\n")

    def error_event(self, operation: str, code: int) -> None:
        error = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": code}
        if operation == "responses":
            failed = {"type": "response.failed", "response": {"status": "failed", "error": error}}
            text = b"event: response.failed\ndata: " + encode(failed) + b"\n\n"
        else:
            text = b"data: " + encode({"error": {**error, "param": None}}) + b"\n\ndata: [DONE]\n\n"
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text))

    async def fault(self, knobs: Knobs) -> None:
        """What goes wrong in the middle of a stream."""
        if knobs.die == "mid":
            await later(0.05)
            raise DieError
        if knobs.hang == "mid":
            await later(1e6)
        if knobs.hold == "mid":
            await until(self.state.released)
        if knobs.garbage == "chunk":
            # A reader that is late would else see the head, all chunks and the fault at once: an answer that is none.
            while not taken(self.transport.get_extra_info("socket")):
                await later(0.005)
            await later(0.05)
            self.transport.write(b"zz\r\nnot a chunk\r\n")
            await later(0.05)
            raise DieError
        if knobs.garbage == "length":
            # The end of the connection without the last chunk: a truncated stream.
            self.transport.close()
            await later(1e6)
        if knobs.garbage == "event":
            event = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta"\n\n'
            self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))

    async def embeddings(self, request: Request) -> None:
        body = self.body(request)
        given = body.get("input")
        if given is None:
            raise BadRequestError(400, "[{'type': 'missing', 'loc': ('body', 'input'), 'msg': 'Field required'}]")
        inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        prompt = sum(count(text_of(one)) if not isinstance(one, list) else len(one) for one in inputs)
        data = []
        for index, one in enumerate(inputs):
            vector = [round(random.Random(f"{one}{place}").uniform(-1, 1), 4) for place in range(8)]
            value: Any = vector
            if body.get("encoding_format") == "base64":
                import struct

                value = base64.b64encode(struct.pack("<8f", *vector)).decode()
            data.append({"index": index, "object": "embedding", "embedding": value})
        self.state.generated(body.get("model", "fake"), prompt, 0)
        use = {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0, "prompt_tokens_details": None}
        answer = {
            "id": "embd-1",
            "object": "list",
            "created": CREATED,
            "model": body.get("model"),
            "data": data,
            "usage": use,
        }
        await self.whole(request, answer, 0)

    async def rerank(self, request: Request) -> None:
        body = self.body(request)
        documents, query = body.get("documents"), body.get("query")
        if not isinstance(documents, list) or not isinstance(query, str):
            raise BadRequestError(400, "[{'type': 'missing', 'loc': ('body', 'documents'), 'msg': 'Field required'}]")
        words = set(query.lower().split())
        prompt = sum(count(text_of(one)) + count(query) for one in documents)
        scores = [
            (len(words & set(text_of(one).lower().split())) / (len(words) or 1), place)
            for place, one in enumerate(documents)
        ]
        results = [
            {
                "index": place,
                "document": {"text": text_of(documents[place]), "multi_modal": None},
                "relevance_score": score,
            }
            for score, place in sorted(scores, key=lambda pair: (-pair[0], pair[1]))
        ]
        self.state.generated(body.get("model", "fake"), prompt, 0)
        await self.whole(
            request,
            {
                "id": "rerank-1",
                "model": body.get("model"),
                "usage": {"prompt_tokens": prompt, "total_tokens": prompt},
                "results": results,
            },
            0,
        )

    async def score(self, request: Request) -> None:
        body = self.body(request)
        second = body.get("text_2")
        texts = second if isinstance(second, list) else [second]
        prompt = sum(count(text_of(one)) + count(text_of(body.get("text_1"))) for one in texts)
        data = [{"index": place, "object": "score", "score": round(1 / (place + 1), 4)} for place in range(len(texts))]
        use = {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0, "prompt_tokens_details": None}
        self.state.generated(body.get("model", "fake"), prompt, 0)
        await self.whole(
            request,
            {
                "id": "score-1",
                "object": "list",
                "created": CREATED,
                "model": body.get("model"),
                "data": data,
                "usage": use,
            },
            0,
        )

    async def transcription(self, request: Request) -> None:
        if not request.header("content-type").startswith("multipart/form-data") or b"filename=" not in request.body:
            raise BadRequestError(400, "[{'type': 'missing', 'loc': ('body', 'file'), 'msg': 'Field required'}]")
        text = request.knobs.text or f"{len(request.body)} bytes of sound"
        if b'name="stream"\r\n\r\ntrue' in request.body:
            events = [{"type": "transcript.text.delta", "delta": one} for one in re.findall(r"\s*\S+", text)]
            done = [*events, {"type": "transcript.text.done", "text": text}]
            body = b"".join(b"data: " + encode(one) + b"\n\n" for one in done)
            self.respond(200, body, "text/event-stream", knobs=request.knobs)
            return
        if b'name="response_format"\r\n\r\ntext' in request.body:
            self.respond(200, text.encode(), "text/plain; charset=utf-8", knobs=request.knobs)
            return
        await self.whole(request, {"text": text, "usage": {"type": "duration", "seconds": 1}}, 0)

    async def speech(self, request: Request) -> None:
        self.body(request)
        self.respond(200, b"RIFF" + bytes(range(256)) * 16, "audio/wav", knobs=request.knobs)

    async def files(self, request: Request) -> None:
        if request.path.endswith("/content"):
            self.respond(200, b'{"custom_id":"1"}\n{"custom_id":"2"}\n', "application/jsonl", knobs=request.knobs)
            return
        if request.method == "DELETE":
            await self.whole(request, {"id": request.path.rpartition("/")[2], "object": "file", "deleted": True}, 0)
            return
        card = {
            "id": "file-1",
            "object": "file",
            "bytes": len(request.body),
            "created_at": CREATED,
            "filename": "batch.jsonl",
            "purpose": "batch",
            "status": "processed",
        }
        await self.whole(
            request, card if request.method == "POST" else {"object": "list", "data": [card], "has_more": False}, 0
        )

    async def tokenize(self, request: Request) -> None:
        body = self.body(request)
        prompt = count(text_of(body.get("prompt")))
        await self.whole(
            request,
            {
                "count": prompt,
                "max_model_len": request.knobs.context,
                "tokens": list(range(prompt)),
                "token_strs": None,
            },
            0,
        )

    async def mirror(self, request: Request) -> None:
        """The request, to see what a proxy made of it."""
        await self.whole(request, request.seen(), 0)

    # Control

    def control(self, request: Request) -> None:
        if request.method == "POST":
            given = decode(request.body)
            values = {**msgspec.structs.asdict(self.state.knobs), **given}
            if "fail_first" in given:
                self.state.failures = 0
            self.state.knobs = msgspec.convert(values, Knobs)
        self.respond(200, encode(self.state.knobs))

    def reset(self, request: Request) -> None:
        self.state.reset()
        self.respond(200, b"{}")

    def release(self, request: Request) -> None:
        self.state.released.set()
        self.respond(200, b"{}")

    def seen(self, request: Request) -> None:
        self.respond(200, encode([one.seen() for one in self.state.requests]))

    def generated(self, request: Request) -> None:
        state = self.state
        active = sum(1 for one in state.connections if one.task is not None)
        self.respond(
            200,
            encode(
                {
                    "requests": state.count,
                    "input_tokens": state.input_tokens,
                    "output_tokens": state.output_tokens,
                    "by_model": state.by_model,
                    "connections": len(state.connections) - 1,
                    "accepted": state.accepted,
                    "active": active,
                }
            ),
        )


CONTROLS: dict[str, Callable[[Connection, Request], None]] = {
    "/control": Connection.control,
    "/reset": Connection.reset,
    "/release": Connection.release,
    "/seen": Connection.seen,
    "/generated": Connection.generated,
}

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/responses": "responses"}
HANDLERS: dict[str, Callable[[Connection, Request], Any]] = {
    **dict.fromkeys(OPERATIONS, Connection.generate),
    "/v1/embeddings": Connection.embeddings,
    "/v1/rerank": Connection.rerank,
    "/v2/rerank": Connection.rerank,
    "/rerank": Connection.rerank,
    "/v1/score": Connection.score,
    "/score": Connection.score,
    "/v1/audio/transcriptions": Connection.transcription,
    "/v1/audio/translations": Connection.transcription,
    "/v1/audio/speech": Connection.speech,
    "/v1/files": Connection.files,
    "/v1/files/": Connection.files,
    "/tokenize": Connection.tokenize,
    "/mirror": Connection.mirror,
}


class Chopper:
    """Cuts a stream at places that respect neither events nor characters."""

    def __init__(self, knobs: Knobs) -> None:
        self.size = knobs.split
        self.random = random.Random(knobs.seed)
        self.kept = b""

    def cut(self, text: bytes) -> list[bytes]:
        self.kept += text
        pieces: list[bytes] = []
        while True:
            size = self.size if self.size > 0 else self.random.randint(1, 97)
            if len(self.kept) < size:
                return pieces
            pieces.append(self.kept[:size])
            self.kept = self.kept[size:]

    def rest(self) -> bytes:
        return self.kept


async def serve(host: str, port: int, knobs: Knobs) -> None:
    """Listen until SIGTERM or SIGINT; connections still open are aborted."""
    loop = asyncio.get_running_loop()
    state = State(knobs)
    server = await loop.create_server(lambda: Connection(state), host, port, backlog=4096)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    print(f"listening on {server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()
    for connection in list(state.connections):
        connection.transport.abort()


class FakeBackend:
    """A fake backend in a process of its own: `with FakeBackend(tokens=3) as backend: ...`.

    Args:
        knobs: Fields of `Knobs`, kept over `reset`.
    """

    def __init__(self, **knobs: Any) -> None:
        self._held = reserve()
        self.port: int = self._held.getsockname()[1]
        self.knobs = knobs
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FakeBackend:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._held.close()

    @property
    def url(self) -> str:
        """Without `/v1`, as `config.Backend.url` has it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [
            sys.executable,
            "-m",
            "tests.gateway.fake_backend",
            "--port",
            str(self.port),
            "--knobs",
            encode(self.knobs).decode(),
        ]
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"listening on {self.port}\n", line

    def stop(self) -> None:
        """End it; its port refuses connections until `start`."""
        if self.process is not None:
            self.thaw()
            self.process.terminate()
            self.process.wait(LONG_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def kill(self) -> None:
        """End it as the kernel's out-of-memory killer would."""
        assert self.process is not None
        self.process.kill()
        self.stop()

    def freeze(self) -> None:
        """Connections are accepted (by the kernel) and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # It runs on for a moment on another core.
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request past any gateway; the answer's JSON."""
        return decode(self.ask_raw(method, path, body))

    def ask_raw(self, method: str, path: str, body: Any = None) -> bytes:
        """One request past any gateway; the answer's bytes, whatever its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)
        try:
            connection.request(
                method, path, encode(body) if body is not None else None, {"content-type": "application/json"}
            )
            return connection.getresponse().read()
        finally:
            connection.close()

    def control(self, **knobs: Any) -> None:
        """Set knobs for the requests to come."""
        self.ask("POST", "/control", knobs)

    def reset(self) -> None:
        self.ask("POST", "/reset", {})

    def release(self) -> None:
        """Let those go on that `hold` keeps."""
        self.ask("POST", "/release", {})

    def seen(self, path: str = "") -> list[dict[str, Any]]:
        """The requests so far, oldest first; health checks too, unless `path` (a beginning) tells which."""
        return [one for one in self.ask("GET", "/seen") if one["path"].startswith(path)]

    def generated(self) -> dict[str, Any]:
        """Counts: requests, input_tokens, output_tokens, by_model, connections (open, without this), accepted (since
        the start), active (answers under way)."""
        answer: dict[str, Any] = self.ask("GET", "/generated")
        return answer

    def wait(self, check: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The counts as soon as `check` is content with them."""
        counts: dict[str, Any] = {}

        def content() -> bool:
            counts.update(self.generated())
            return check(counts)

        wait_until(content, inspect.getsource(check).strip(), lambda: counts)
        return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--knobs", default="{}", help="a JSON object of knobs")
    words = parser.parse_args()
    uvloop.run(serve(words.host, words.port, msgspec.json.decode(words.knobs, type=Knobs)))


if __name__ == "__main__":
    main()
