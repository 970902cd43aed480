"""What clients see: the same through the gateway as directly, with the openai package, LangChain and curl."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from .fake_backend import FakeBackend
from .running import Gateway, ask, key_entry, settings, start

MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What opens at nine, naïvely? 日本 🚀"},
]
PART = [{"role": "user", "content": [{"type": "text", "text": "Only a part."}]}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALLED = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "warm"},
]


class Opening(BaseModel):
    """When something opens."""

    name: str
    hour: int
    closed: bool


@dataclass
class Pair:
    """A backend, and a gateway before it."""

    backend: FakeBackend
    gateway: Gateway

    def address(self, side: str) -> tuple[str, str]:
        """Where a side's API is, and the key for it."""
        if side == "direct":
            return f"{self.backend.url}/v1", "none"
        return f"{self.gateway.url}/v1", self.gateway.key("admin")

    def client(self, side: str) -> openai.OpenAI:
        url, key = self.address(side)
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config_folder = tmp_path_factory.mktemp("clients")
    with FakeBackend() as backend:
        config = settings(backend.url, open_operations=["audio", "files", "tokenize"])
        config["backends"]["one"]["health"]["eject_after"] = 1000
        gateway = start(config_folder / "gateway.json", config)
        yield Pair(backend, gateway)
        assert gateway.stop() == 0
        assert not gateway.errors


@pytest.fixture
def pair(both: Pair) -> Iterator[Pair]:
    both.backend.reset()
    yield both
    both.backend.reset()


# --- the openai package

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat.completions.create", {"messages": MESSAGES}),
    "chat, parts": ("chat.completions.create", {"messages": PART, "temperature": 0.5, "seed": 7}),
    "chat, two choices": ("chat.completions.create", {"messages": MESSAGES, "n": 2, "max_tokens": 3}),
    "chat, cut off": ("chat.completions.create", {"messages": MESSAGES, "max_completion_tokens": 2}),
    "chat, more parameters": (
        "chat.completions.create",
        {"messages": MESSAGES, "extra_body": {"top_k": 5, "min_p": 0.1}, "stop": ["\n"], "logprobs": False},
    ),
    "stream": ("chat.completions.create", {"messages": MESSAGES, "stream": True}),
    "stream, usage": (
        "chat.completions.create",
        {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "stream, no usage": (
        "chat.completions.create",
        {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": False}},
    ),
    "stream, two choices": ("chat.completions.create", {"messages": MESSAGES, "stream": True, "n": 2}),
    "tools": ("chat.completions.create", {"messages": MESSAGES, "tools": [TOOL]}),
    "tools, chosen": (
        "chat.completions.create",
        {
            "messages": MESSAGES,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "parallel_tool_calls": False,
        },
    ),
    "tools, not now": ("chat.completions.create", {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"}),
    "tools, streamed": ("chat.completions.create", {"messages": MESSAGES, "tools": [TOOL], "stream": True}),
    "tools, answered": ("chat.completions.create", {"messages": CALLED, "tools": [TOOL]}),
    "JSON schema": ("chat.completions.parse", {"messages": MESSAGES, "response_format": Opening}),
    "JSON object": (
        "chat.completions.create",
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
    ),
    "completion": ("completions.create", {"prompt": "Once upon a time"}),
    "completion, streamed": ("completions.create", {"prompt": ["Once upon a time"], "stream": True}),
    "response": ("responses.create", {"input": "Say something."}),
    "response, streamed": ("responses.create", {"input": "Say something.", "stream": True}),
    "embedding": ("embeddings.create", {"input": "A text."}),
    "embeddings as floats": ("embeddings.create", {"input": ["One.", "Two."], "encoding_format": "float"}),
    "transcription": ("audio.transcriptions.create", {"file": ("a.wav", b"RIFF" * 100)}),
    "speech": ("audio.speech.create", {"input": "Hello.", "voice": "alloy"}),
}


def prepared(client: Any, name: str) -> Any:
    """A call, made: its result, or what is awaited for it."""
    path, parameters = CALLS[name]
    for part in path.split("."):
        client = getattr(client, part)
    return client(model="m", **parameters)


def plain(result: Any) -> Any:
    """A result as what can be compared, with its type's name."""
    if isinstance(result, list):
        return [plain(one) for one in result]
    if isinstance(result, BaseModel):
        # What was parsed has another type than its field was declared with, which pydantic warns about.
        return type(result).__name__, result.model_dump(warnings=False)
    return type(result).__name__, result.read()


@pytest.mark.parametrize("name", CALLS)
def test_openai(pair: Pair, name: str) -> None:
    results = []
    for side in ("direct", "gateway"):
        with pair.client(side) as client:
            result = prepared(client, name)
            results.append(plain(list(result) if isinstance(result, openai.Stream) else result))
    assert results[0] == results[1]
    # Something was said, and the backend was asked twice.
    assert len(str(results[0])) > 50
    assert len(pair.backend.seen("/v1/" + CALLS[name][0].split(".")[0])) == 2


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("tools, ")])
def test_openai_async(pair: Pair, name: str) -> None:
    async def run(side: str) -> Any:
        url, key = pair.address(side)
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
            result = prepared(client, name)
            if inspect.isawaitable(result):
                result = await result
            return plain([one async for one in result] if isinstance(result, openai.AsyncStream) else result)

    assert asyncio.run(run("direct")) == asyncio.run(run("gateway"))


def test_openai_async_at_the_same_time(pair: Pair) -> None:
    """Answers do not get mixed up: each echoes its own question."""
    pair.backend.control(echo=True, token_s=0.005)

    async def run() -> list[str]:
        url, key = pair.address("gateway")
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:

            async def one(number: int) -> str:
                question: Any = [{"role": "user", "content": f"number {number} of many"}]
                if number % 2:
                    answer = await client.chat.completions.create(model="m", messages=question)
                    return answer.choices[0].message.content or ""
                stream = await client.chat.completions.create(model="m", messages=question, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(60)))

    assert asyncio.run(run()) == [f"number {number} of many" for number in range(60)]


def test_the_stream_helper_accumulates_the_same(pair: Pair) -> None:
    results = []
    for side in ("direct", "gateway"):
        with (
            pair.client(side) as client,
            client.chat.completions.stream(
                model="m", messages=MESSAGES, response_format=Opening, stream_options={"include_usage": True}
            ) as stream,
        ):
            kinds = [event.type for event in stream]
            results.append((kinds, plain(stream.get_final_completion())[1]))
    assert results[0] == results[1]
    assert results[0][1]["choices"][0]["message"]["parsed"] == {"name": "Müller 日本", "hour": 1, "closed": True}
    assert results[0][1]["usage"]["completion_tokens"] > 0


def test_a_stream_is_passed_on_as_it_comes(pair: Pair) -> None:
    """The first tokens are there while the backend still writes."""
    pair.backend.control(token_s=0.2, tokens=20)
    with pair.client("gateway") as client:
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        first = [next(stream).choices[0].delta.content for _ in range(3)]
        assert first == ["", "The", " café"]
        assert pair.backend.generated()["active"] == 1
        stream.close()
    pair.backend.wait(lambda counts: counts["active"] == 0)
    assert pair.backend.generated()["output_tokens"] < 20


def test_models_are_those_the_caller_may_use(pair: Pair) -> None:
    with pair.client("gateway") as client:
        assert [model.id for model in client.models.list()] == ["m"]
        assert client.models.retrieve("m").object == "model"
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("other")
    assert raised.value.code == "model_not_found"


def test_raw_responses_carry_what_clients_log(pair: Pair) -> None:
    with pair.client("gateway") as client:
        raw = client.chat.completions.with_raw_response.create(
            model="m", messages=MESSAGES, extra_headers={"x-request-id": "mine-1"}
        )
    assert raw.request_id == raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().choices[0].message.content


# --- errors


def raised_by(client: openai.OpenAI, **parameters: Any) -> tuple[str, int, Any]:
    """The exception that a chat completion ends with: its class, status and body."""
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**{"model": "m", "messages": MESSAGES, **parameters})
    return type(raised.value).__name__, raised.value.status_code, raised.value.body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"temperature": 3}, "BadRequestError"),
        ({"max_tokens": 0}, "BadRequestError"),
        ({"messages": []}, "BadRequestError"),
    ],
)
def test_what_the_backend_refuses_reads_the_same(
    pair: Pair, parameters: dict[str, Any], expected: str, stream: bool
) -> None:
    results = []
    for side in ("direct", "gateway"):
        with pair.client(side) as client:
            results.append(raised_by(client, **parameters, stream=stream))
    assert results[0] == results[1]
    assert results[0][0] == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, "BadRequestError"),
        (403, "PermissionDeniedError"),
        (404, "NotFoundError"),
        (409, "ConflictError"),
        (422, "UnprocessableEntityError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (503, "InternalServerError"),
    ],
)
def test_the_backends_own_errors_read_the_same(pair: Pair, status: int, expected: str) -> None:
    pair.backend.control(status=status)
    results = []
    for side in ("direct", "gateway"):
        with pair.client(side) as client:
            results.append(raised_by(client))
    assert results[0] == results[1]
    assert results[0][:2] == (expected, status)


def error_of(answer: Any) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape."""
    body = answer.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert answer.headers["content-type"].startswith("application/json")
    return dict(error)


@pytest.mark.parametrize(
    ("path", "sent", "key", "expected"),
    [
        ("chat/completions", {"model": "m", "messages": MESSAGES}, "", (401, "missing_api_key", None)),
        ("chat/completions", {"model": "m", "messages": MESSAGES}, "rp-wrong", (401, "invalid_api_key", None)),
        ("chat/completions", {"model": "none", "messages": MESSAGES}, None, (404, "model_not_found", "model")),
        ("chat/completions", {"messages": MESSAGES}, None, (400, None, "model")),
        ("chat/completions", {"model": 7, "messages": MESSAGES}, None, (400, None, "model")),
        ("chat/completions", b"{", None, (400, None, None)),
        ("chat/completions", b"[]", None, (400, None, None)),
        ("chat/completions", {"model": "m", "messages": MESSAGES, "stream": "yes"}, None, (400, None, "stream")),
        ("nothing", {"model": "m"}, None, (404, "unknown_url", None)),
        ("chat/completions", None, None, (405, "method_not_allowed", None)),
    ],
)
def test_the_gateways_own_errors_have_openais_shape(
    pair: Pair, path: str, sent: Any, key: str | None, expected: tuple[int, str | None, str | None]
) -> None:
    key = pair.gateway.key("premium") if key is None else key
    answer = ask(f"{pair.gateway.url}/v1/{path}", sent, key=key)
    error = error_of(answer)
    assert (answer.status, error["code"], error["param"]) == expected
    assert not pair.backend.seen("/v1/chat")


def test_a_backend_that_refuses_the_gateway_is_not_the_callers_fault(pair: Pair) -> None:
    """Its 401 is about the gateway's own key: a caller that believed it would look for a mistake in its own."""
    pair.backend.control(status=401)
    with pair.client("gateway") as client:
        assert raised_by(client)[:2] == ("InternalServerError", 502)


def test_a_stack_trace_of_the_backend_stays_there(pair: Pair) -> None:
    pair.backend.control(status=500, html=True)
    answer = pair.gateway.chat()
    assert answer.status == 502
    assert error_of(answer)["code"] == "bad_gateway"
    assert b"secret" not in answer.body
    with pair.client("gateway") as client:
        assert raised_by(client)[:2] == ("InternalServerError", 502)


def test_limits_are_what_the_openai_package_waits_for(pair: Pair, tmp_path: Path) -> None:
    """429 with retry-after: the package tries again by itself, and gets its answer."""
    limits = {"requests": {"limit": 1, "per": "second"}}
    config = settings(pair.backend.url, keys=[key_entry("premium", limits=limits)])
    gateway = start(tmp_path / "limited.json", config)
    try:
        url = f"{gateway.url}/v1"
        with openai.OpenAI(base_url=url, api_key=gateway.key("premium"), max_retries=0) as client:
            create = client.chat.completions.with_raw_response.create
            headers = create(model="m", messages=MESSAGES).headers
            assert headers["x-ratelimit-limit-requests"] == "1"
            assert headers["x-ratelimit-remaining-requests"] == "0"
            # On a machine that is slow another second may have begun.
            with pytest.raises(openai.RateLimitError) as raised:
                for _ in range(100):
                    create(model="m", messages=MESSAGES)
        assert raised.value.code == "rate_limit_exceeded"
        assert float(raised.value.response.headers["retry-after"]) > 0
        with openai.OpenAI(base_url=url, api_key=gateway.key("premium"), max_retries=5) as patient:
            for _ in range(2):
                assert patient.chat.completions.create(model="m", messages=MESSAGES).choices
    finally:
        gateway.stop()


# --- LangChain


def langchain(pair: Pair, side: str) -> ChatOpenAI:
    url, key = pair.address(side)
    return ChatOpenAI(model="m", base_url=url, api_key=key, max_retries=0, timeout=60, stream_usage=True)


def message(one: Any) -> dict[str, Any]:
    """A LangChain message without the number of its run."""
    return {name: value for name, value in one.model_dump().items() if name != "id"}


def test_langchain(pair: Pair) -> None:
    results = []
    for side in ("direct", "gateway"):
        chat = langchain(pair, side)
        results.append(
            [
                message(chat.invoke("What opens at nine?")),
                [message(chunk) for chunk in chat.stream("What opens at nine?")],
                message(chat.bind_tools([TOOL]).invoke("How is it in Köln?")),
                [message(chunk) for chunk in chat.bind_tools([TOOL]).stream("How is it in Köln?")],
                chat.with_structured_output(Opening, method="json_schema").invoke("What opens?"),
                [message(answer) for answer in chat.batch(["one", "two", "three"])],
            ]
        )
    assert results[0] == results[1]
    assert results[1][2]["tool_calls"][0]["args"] == {"city": "Müller 日本", "days": 1}
    assert results[1][4] == Opening(name="Müller 日本", hour=1, closed=True)
    assert any(chunk["usage_metadata"] for chunk in results[1][1])


def test_langchain_async(pair: Pair) -> None:
    async def run(side: str) -> list[Any]:
        chat = langchain(pair, side)
        return [
            message(await chat.ainvoke("What opens at nine?")),
            [message(chunk) async for chunk in chat.astream("What opens at nine?")],
        ]

    assert asyncio.run(run("direct")) == asyncio.run(run("gateway"))


def test_langchain_embeddings(pair: Pair) -> None:
    results = []
    for side in ("direct", "gateway"):
        url, key = pair.address(side)
        embeddings = OpenAIEmbeddings(model="m", base_url=url, api_key=key, check_embedding_ctx_length=False)
        results.append([embeddings.embed_documents(["One.", "Two."]), embeddings.embed_query("Three.")])
    assert results[0] == results[1]
    assert [len(vector) for vector in results[1][0]] == [8, 8]


# --- curl: the bytes


def curl(url: str, key: str, body: bytes | None, *more: str) -> tuple[str, bytes]:
    """What curl gets: status with content type, and the body's bytes."""
    words = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60", "--output", "-"]
    words += ["--header", f"Authorization: Bearer {key}", "--header", "Content-Type: application/json"]
    words += ["--write-out", "%{stderr}%{http_code} %{content_type}", *more, url]
    done = subprocess.run(
        words if body is None else [*words, "--data-binary", "@-"], input=body, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.decode(), done.stdout


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", {"messages": MESSAGES}),
    "chat, streamed": ("chat/completions", {"messages": MESSAGES, "stream": True}),
    "chat, streamed with usage": (
        "chat/completions",
        {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat, streamed with all of vLLM's usage": (
        "chat/completions",
        {
            "messages": MESSAGES,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "chat, two choices streamed": ("chat/completions", {"messages": MESSAGES, "stream": True, "n": 2}),
    "tools, streamed": ("chat/completions", {"messages": MESSAGES, "stream": True, "tools": [TOOL]}),
    "refused": ("chat/completions", {"messages": MESSAGES, "temperature": 9}),
    "completion": ("completions", {"prompt": "Once"}),
    "completion, streamed": ("completions", {"prompt": "Once", "stream": True}),
    "response": ("responses", {"input": "Once"}),
    "response, streamed": ("responses", {"input": "Once", "stream": True}),
    "embeddings": ("embeddings", {"input": ["One.", "Zwei … drei"]}),
    "rerank": ("rerank", {"query": "river bank", "documents": ["a river", "a bank", "nothing"]}),
    "score": ("score", {"text_1": "one", "text_2": ["two", "three"]}),
}
STREAMS = [name for name in BODIES if "streamed" in name]


def same_bytes(pair: Pair, name: str) -> tuple[str, bytes]:
    """Ask both sides; their status, type and bytes are equal."""
    path, body = BODIES[name]
    text = json.dumps({"model": "m", **body}).encode()
    results = []
    for side in ("direct", "gateway"):
        url, key = pair.address(side)
        results.append(curl(f"{url}/{path}", key, text))
    assert results[0] == results[1]
    return results[1]


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_equal_byte_for_byte(pair: Pair, name: str) -> None:
    status, body = same_bytes(pair, name)
    assert status.startswith("400 application/json" if name == "refused" else "200 ")
    assert body


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    "knobs",
    [
        {"split": 1},
        {"split": 7},
        {"split": -1, "seed": 1},
        {"split": -1, "seed": 2, "newline": "crlf"},
        {"newline": "cr"},
        {"usage_null": True, "continuous": False},
        {"continuous": False},
        {"stream_usage": False},
        {"no_done": True},
        {"tokens": 0},
        {"text": 'The word "usage":{"prompt_tokens":1} in a text, \\"usage\\":null too'},
        {"huge_headers": 5000},
    ],
    ids=lambda knobs: ",".join(f"{name}={str(value)[:8]}" for name, value in knobs.items()),
)
def test_streams_are_equal_byte_for_byte(pair: Pair, name: str, knobs: dict[str, Any]) -> None:
    pair.backend.control(**knobs)
    status, body = same_bytes(pair, name)
    assert status.startswith("200 text/event-stream")
    assert body


def test_what_reaches_the_backend_are_the_callers_bytes(pair: Pair) -> None:
    """Order, spaces, escapes and numbers of the body stay, where nothing has to be changed."""
    text = b'{ "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9 / \\/"}],\n '
    text += b'"temperature":1.0,"model" : "m", "x": 1e2}'
    url, key = pair.address("gateway")
    status, _ = curl(f"{url}/chat/completions", key, text)
    assert status.startswith("200 ")
    assert pair.backend.seen("/v1/chat")[0]["body"] == text.decode()


def test_a_large_body_that_waits_for_continue(pair: Pair) -> None:
    """curl asks `Expect: 100-continue` before a large body."""
    pair.backend.control(echo=True)
    content = "ä" * 2_000_000
    text = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}, ensure_ascii=False).encode()
    url, key = pair.address("gateway")
    status, body = curl(f"{url}/chat/completions", key, text, "--header", "Expect: 100-continue")
    assert status.startswith("200 ")
    assert json.loads(body)["choices"][0]["message"]["content"] == content


def test_a_chunked_body(pair: Pair) -> None:
    text = json.dumps({"model": "m", "messages": MESSAGES}).encode()
    url, key = pair.address("gateway")
    chunked = curl(f"{url}/chat/completions", key, text, "--header", "Transfer-Encoding: chunked")
    assert chunked == curl(f"{url}/chat/completions", key, text)


def test_one_connection_for_many_requests(pair: Pair) -> None:
    url, key = pair.address("gateway")
    text = json.dumps({"model": "m", "messages": MESSAGES, "stream": True})
    common = ["--silent", "--output", "/dev/null", "--header", f"Authorization: Bearer {key}"]
    common += ["--write-out", "%{http_code} %{num_connects}\\n"]
    chat = [*common, "--header", "Content-Type: application/json", "--data", text, f"{url}/chat/completions"]
    done = subprocess.run(
        ["curl", *chat, "--next", *common, f"{url}/models", "--next", *chat],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "200 1\n200 0\n200 0\n"
