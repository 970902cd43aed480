"""Whole gateways in trouble: backends that break, a Redis that goes and comes back, tokens that are none.

What a client gets, what is written down, and that every token is counted once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import openai
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from serve_app.gateway.tokens import REFETCH_S

from .conftest import RedisServer, StartGateway
from .fake_backend import FakeBackend
from .redis_proxy import RedisProxy
from .running import ROLES, Answer, Gateway, ask, settings
from .test_exchange import audited, records
from .waiting import LONG_S, wait_until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
#: Where a time-out is to be seen, and where none is, however busy the machine is.
SHORT = {"connect_s": 60.0, "first_token_s": 0.5, "between_tokens_s": 0.5}
PATIENT = {"connect_s": 60.0}


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def backend(engine: FakeBackend) -> FakeBackend:
    engine.reset()
    return engine


def configured(backend: FakeBackend, redis: str = "", *, hangs: bool = False, **more: Any) -> dict[str, Any]:
    """One retry, a backend that is never taken out, and a budget nobody uses up.

    Where the backend `hangs`, the time-outs of the model `m` are short; `patient` is the same without them.
    """
    roles = {**ROLES, "premium": {"models": ["*"], "limits": {"daily_tokens": 10_000_000}}}
    config = settings(backend.url, redis, **{"roles": roles, **more})
    one = config["backends"]["one"]
    one |= {"timeouts": PATIENT, "health": {**one["health"], "eject_after": 1000}}
    config["routes"]["m"]["retries"] = 1
    if hangs:
        config["backends"] = {"one": {**one, "timeouts": SHORT}, "patient": one}
        config["routes"]["patient"] = {"backends": [{"backend": "patient"}]}
    return config


def streamed(gateway: Gateway, **more: Any) -> Answer:
    """A streamed chat as plain bytes."""
    return gateway.chat(stream=True, **more)


def events(answer: Answer) -> list[Any]:
    """The data of a stream's events."""
    found = [one.removeprefix("data: ") for one in answer.body.decode().split("\n\n") if one]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


def told(stream: list[Any]) -> str:
    """The text of a stream."""
    chunks = [one for one in stream if one != "[DONE]" and one.get("choices")]
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks)


def spent(redis: RedisServer) -> int:
    """What Redis says of the premium key's daily budget."""
    day = datetime.now(UTC).strftime("%Y%m%d")
    reply = redis.command("HGET", f"rayplane:budget:{day}:key:premium", "t").split(b"\r\n")
    return int(reply[1]) if reply[0] != b"$-1" else 0


def counted(gateway: Gateway) -> dict[str, int]:
    """Usage of the premium key as the admin API reports it."""
    total: Counter[str] = Counter()
    for row in gateway.admin("GET", "/admin/v1/usage?days=2&by=key").json()["usage"]:
        if row["key"] == "premium":
            total.update({name: value for name, value in row.items() if isinstance(value, int)})
    return dict(total)


def lines(gateway: Gateway) -> list[dict[str, Any]]:
    return [line for line in gateway.requests() if line["key"] == "premium"]


def agree(gateway: Gateway, redis: RedisServer, requests: int) -> None:
    """The budget in Redis, the usage and the log agree to the token."""
    gateway.wait_for(lambda: len(lines(gateway)) == requests, f"{requests} lines of requests")
    logged = sum(line["input_tokens"] + line["output_tokens"] for line in lines(gateway))
    wait_until(lambda: spent(redis) == logged, f"a budget of {logged}", lambda: spent(redis))
    usage = counted(gateway)
    assert usage["input_tokens"] + usage["output_tokens"] == logged


# --- backends


@pytest.mark.parametrize(
    "case",
    [
        ({"die": "before"}, 502, "bad_gateway"),
        ({"die": "headers"}, 502, "bad_gateway"),
        ({"garbage": "binary"}, 502, "bad_gateway"),
        ({"garbage": "json"}, 502, "bad_gateway"),
        ({"status": 500, "html": True}, 502, "bad_gateway"),
        ({"hang": "before"}, 504, "gateway_timeout"),
        ({"hang": "headers"}, 504, "gateway_timeout"),
    ],
    ids=lambda case: "-".join(f"{name}-{value}" for name, value in case[0].items()),
)
def test_a_backend_that_gives_no_answer(
    redis_server: RedisServer,
    gateway: StartGateway,
    backend: FakeBackend,
    tmp_path: Path,
    case: tuple[dict[str, Any], int, str],
) -> None:
    knobs, status, code = case
    one = gateway(configured(backend, redis_server.url, hangs="hang" in knobs, audit=audited(tmp_path)))
    backend.control(**knobs)
    got = [one.chat(), streamed(one)]
    for answer in got:
        assert answer.status == status
        error = answer.json()["error"]
        assert (set(error), error["code"], error["type"]) == (
            {"message", "type", "param", "code"},
            code,
            "server_error",
        )
        assert "Traceback" not in answer.body.decode() and "10.1.2.3" not in answer.body.decode()
    backend.reset()
    assert one.chat(model="patient" if "hang" in knobs else "m").status == 200
    agree(one, redis_server, 3)
    assert one.stop() == 0
    found = [record for record in records(tmp_path) if record["kind"] == "request"]
    assert [(one["status"], one["success"], one.get("error")) for one in found if one["key"] == "premium"] == [
        (status, False, code),
        (status, False, code),
        (200, True, None),
    ]
    # Nothing was generated, as far as anybody knows; of an answer that cannot be read the tokens are guessed.
    charged = [one["input_tokens"] + one["output_tokens"] for one in found[:2] if not one.get("estimated")]
    assert charged == ([] if knobs == {"garbage": "json"} else [0, 0])


@pytest.mark.parametrize(
    "case",
    [
        ({"die": "mid"}, "bad_gateway"),
        ({"garbage": "chunk"}, "bad_gateway"),
        ({"garbage": "length"}, "bad_gateway"),
        ({"hang": "mid"}, "gateway_timeout"),
    ],
    ids=lambda case: "-".join(f"{name}-{value}" for name, value in case[0].items()),
)
def test_a_backend_that_breaks_in_the_middle_of_a_stream(
    redis_server: RedisServer,
    gateway: StartGateway,
    backend: FakeBackend,
    tmp_path: Path,
    case: tuple[dict[str, Any], str],
) -> None:
    knobs, code = case
    one = gateway(configured(backend, redis_server.url, hangs="hang" in knobs, audit=audited(tmp_path)))
    backend.control(after=3, **knobs)
    answer = streamed(one)
    stream = events(answer)
    assert answer.status == 200
    assert told(stream) == "The café über"
    assert stream[-1]["error"]["code"] == code and "[DONE]" not in stream
    client = openai.OpenAI(base_url=f"{one.url}/v1", api_key=one.key(), max_retries=0, timeout=60)
    texts = []
    with pytest.raises(openai.APIError) as caught:
        texts.extend(
            chunk.choices[0].delta.content
            for chunk in client.chat.completions.create(**CHAT, stream=True)  # type: ignore[call-overload]
        )
    assert caught.value.code == code and "".join(texts) == "The café über"
    agree(one, redis_server, 2)
    # What was delivered is paid for: three tokens, by the backend's own count.
    assert [(line["input_tokens"], line["output_tokens"], line.get("estimated")) for line in lines(one)] == [
        (1, 3, None)
    ] * 2
    assert one.stop() == 0
    found = [record for record in records(tmp_path) if record["kind"] == "request" and record["key"] == "premium"]
    assert [(one["status"], one["success"], one["error"]) for one in found] == [(200, False, code)] * 2


def test_an_event_that_is_no_json_is_the_clients_to_see(gateway: StartGateway, backend: FakeBackend) -> None:
    """Without filters the gateway does not look into events; with filters it must."""
    filters = {"private": {"type": "sensitive_data", "action": "redact"}}
    roles = {**ROLES, "basic": {"models": ["m"], "filters": ["private"]}}
    one = gateway(settings(backend.url, roles=roles, filters=filters))
    backend.control(garbage="event", after=3)
    passed = streamed(one).body
    assert b'"delta"\n\n' in passed and passed.endswith(b"data: [DONE]\n\n")
    stopped = events(streamed(one, role="basic"))
    assert stopped[-1]["error"]["code"] == "bad_gateway" and "[DONE]" not in stopped


def test_an_answer_cut_short_is_no_answer(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(configured(backend, hangs=True))
    for knobs in ({"die": "mid"}, {"garbage": "length"}, {"hang": "mid"}):
        backend.reset()
        backend.control(**knobs)
        got = one.chat()
        assert got.status in (502, 504) and got.json()["error"]["type"] == "server_error", knobs


def test_a_stream_of_the_responses_api_that_breaks(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(configured(backend))
    backend.control(die="mid", after=2)
    body = {"model": "m", "input": "Hello", "stream": True}
    got = ask(f"{one.url}/v1/responses", body, key=one.key())
    assert got.status == 200 and b"response.completed" not in got.body
    last = got.body.decode().rstrip().split("\n\n")[-1]
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "bad_gateway"
    one.wait_for(lambda: bool(lines(one)), "a line of the request")
    assert lines(one)[0]["output_tokens"] > 0 and lines(one)[0]["estimated"]


def test_every_token_is_counted_once_whatever_happens(
    redis_server: RedisServer, gateway: StartGateway, backend: FakeBackend
) -> None:
    """Whole answers, streams, streams whose client leaves, and backends that break, at the same time."""
    one = gateway(configured(backend, redis_server.url))
    backend.control(tokens=200, token_s=0.002)
    client = openai.OpenAI(base_url=f"{one.url}/v1", api_key=one.key(), max_retries=0, timeout=60)
    kinds = ("whole", "stream", "leave", "die", "before")

    def run(number: int) -> None:
        kind = kinds[number % len(kinds)]
        text = f"Say {number}"
        if kind == "whole":
            one.chat(text)
        elif kind == "stream":
            streamed(one, content=text)
        elif kind == "before":
            one.chat(text, headers={"x-session-id": text}, model="broken")
        elif kind == "die":
            streamed(one, content=text, model="mid")
        else:
            with client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": text}],
                stream=True,
                extra_headers={"x-fake-tokens": "100000", "x-fake-token-s": "0.01"},
            ) as stream:
                for place, _ in enumerate(stream):
                    if place == number % 17 + 2:
                        break

    with FakeBackend(die="before") as broken, FakeBackend(die="mid", after=5) as mid:
        for name, other in (("broken", broken), ("mid", mid)):
            quick = one.config["backends"]["one"]
            one.config["backends"][name] = {**quick, "url": other.url}
            one.config["routes"][name] = {"backends": [{"backend": name}], "retries": 0}
        one.rewrite(one.config)
        one.wait_for(lambda: any(line["message"] == "policy taken over" for line in one.lines), "a reload")
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(run, range(50)))
        agree(one, redis_server, 50)
    by = Counter(line.get("error", "") if line["status"] == 200 else str(line["status"]) for line in lines(one))
    assert (by["499"], by["502"], by["bad_gateway"]) == (10, 10, 10)
    assert {line["output_tokens"] for line in lines(one) if line["model"] == "mid"} == {5}
    assert all(2 <= line["output_tokens"] < 100_000 for line in lines(one) if line["status"] == 499)
    assert not any(line.get("estimated") for line in lines(one))
    # Nothing is left running, and nobody's place is taken.
    one.wait_for(lambda: one.metric("rayplane_gateway_in_flight") == 0, "no request under way")
    assert one.metric("rayplane_gateway_buffered_bytes") == 0


def test_an_upload_is_never_sent_twice(gateway: StartGateway, backend: FakeBackend) -> None:
    one = gateway(configured(backend, open_operations=["files"]))
    backend.control(die="before")
    body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--b--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    got = ask(f"{one.url}/v1/files", body, key=one.key("admin"), headers=headers)
    assert (got.status, got.json()["error"]["code"]) == (502, "bad_gateway")
    assert len(backend.seen("/v1/files")) == 1


# --- Redis


class Traffic:
    """Chats without a pause until it is stopped; `statuses` holds what came when."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.got: list[tuple[float, Answer]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(3)]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            answer = self.gateway.chat(f"Say {number}", max_tokens=8)
            self.got.append((time.monotonic(), answer))
            self._stop.wait(0.01)

    def since(self, moment: float) -> list[Answer]:
        return [answer for when, answer in self.got if when > moment]

    def __enter__(self) -> Traffic:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._threads:
            one.join(LONG_S)


class Network:
    """The way to a Redis, with its faults."""

    def __init__(self, redis: RedisServer, how: str) -> None:
        self.redis = redis
        self.how = how
        self._loop = asyncio.new_event_loop()
        self._proxy = RedisProxy(redis.port)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._proxy.__aenter__(), self._loop).result(LONG_S)
        self.url = self._proxy.url

    def fail(self) -> None:
        if self.how == "restarted":
            self.redis.stop()
        elif self.how == "frozen":
            self.redis.freeze()
        else:
            # What is asked arrives and is done; the answers are lost.
            self._proxy.deaf = True

    def mend(self) -> None:
        self._proxy.deaf = False
        self.redis.start() if self.how == "restarted" else self.redis.thaw()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._proxy.__aexit__(), self._loop).result(LONG_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG_S)
        self._loop.close()


@pytest.fixture(params=["restarted", "frozen", "unheard"])
def network(redis_server: RedisServer, request: pytest.FixtureRequest) -> Iterator[Network]:
    made = Network(redis_server, request.param)
    yield made
    made.close()


def test_a_redis_that_goes_while_limits_are_closed(
    network: Network, gateway: StartGateway, backend: FakeBackend
) -> None:
    config = configured(backend, network.url)
    config["store"]["timeout_ms"] = 2000
    one = gateway(config)
    with Traffic(one) as traffic:
        one.wait_for(lambda: len(traffic.got) > 20, "traffic")
        assert {answer.status for _, answer in traffic.got} == {200}
        network.fail()
        one.wait_for(lambda: one.metric("rayplane_gateway_store_available") == 0, "noticing it")
        moment = time.monotonic()
        one.wait_for(lambda: len(traffic.since(moment)) > 20, "refusals")
        away = traffic.since(moment)
        assert ask(f"{one.admin_url}/readyz").status == 503
        network.mend()
        one.wait_for(lambda: one.metric("rayplane_gateway_store_available") == 1, "the recovery")
        one.wait_for(lambda: ask(f"{one.admin_url}/readyz").status == 200, "getting ready")
        one.wait_for(lambda: traffic.got[-1][1].status == 200, "answers")
        moment = time.monotonic()
        one.wait_for(lambda: len(traffic.since(moment)) > 20, "traffic again")
        again = traffic.since(moment)
    # A request that was under way when it went may get its answer still.
    refused = [answer for answer in away if answer.status != 200]
    assert len(refused) >= len(away) - 3 and {answer.status for answer in refused} == {503}
    assert {answer.json()["error"]["code"] for answer in refused} == {"limits_unavailable"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert {answer.status for answer in again} == {200}
    assert all("x-rayplane-limits" not in answer.headers for answer in again)
    if network.how != "restarted":  # that one forgot everything
        agree(one, network.redis, len(traffic.got))


def test_a_redis_that_goes_while_limits_may_be_local(
    network: Network, gateway: StartGateway, backend: FakeBackend
) -> None:
    config = configured(backend, network.url)
    config["store"] |= {"on_failure": "local", "local_fraction": 0.5, "timeout_ms": 2000}
    one = gateway(config)
    with Traffic(one) as traffic:
        one.wait_for(lambda: len(traffic.got) > 20, "traffic")
        network.fail()
        one.wait_for(lambda: one.metric("rayplane_gateway_degraded") == 1, "noticing it")
        moment = time.monotonic()
        one.wait_for(lambda: len(traffic.since(moment)) > 20, "local answers")
        away = traffic.since(moment)
        assert ask(f"{one.admin_url}/readyz").status == 200
        assert one.metric("rayplane_gateway_degraded_requests_total") > 0
        network.mend()
        one.wait_for(lambda: one.metric("rayplane_gateway_degraded") == 0, "the recovery")
        one.wait_for(lambda: "x-rayplane-limits" not in traffic.got[-1][1].headers, "shared limits")
        moment = time.monotonic()
        one.wait_for(lambda: len(traffic.since(moment)) > 20, "traffic again")
        again = traffic.since(moment)
    # Nobody was refused at any time.
    assert {answer.status for _, answer in traffic.got} == {200}
    marked = [answer.headers.get("x-rayplane-limits") for answer in away]
    assert marked.count("local") >= len(marked) - 3
    assert all("x-rayplane-limits" not in answer.headers for answer in again)
    if network.how != "restarted":  # that one forgot everything
        agree(one, network.redis, len(traffic.got))


# --- tokens


class Issuer:
    """Signs tokens, and serves its keys."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.fetched = 0
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        body = json.dumps({"keys": [{**public, "kid": "a", "use": "sig", "alg": "RS256"}]}).encode()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetched += 1
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/keys"

    def token(self, key: Any = None, algorithm: str = "RS256", kid: str | None = "a", **claims: Any) -> str:
        now = int(time.time())
        values = {"iss": "https://id", "aud": "llm", "sub": "ann", "role": "premium", "iat": now, "exp": now + 600}
        headers = {} if kid is None else {"kid": kid}
        return jwt.encode({**values, **claims}, self.key if key is None else key, algorithm, headers=headers)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.close()


def part(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def test_tokens_end_to_end(gateway: StartGateway, backend: FakeBackend, issuer: Issuer) -> None:
    entry = {"issuer": "https://id", "audience": ["llm"], "jwks_url": issuer.url, "tenant_claim": "org"}
    one = gateway(settings(backend.url, auth={"issuers": [entry]}))
    url = f"{one.url}/v1/chat/completions"

    def present(token: str) -> tuple[int, str]:
        answer = ask(url, CHAT, key=token)
        if answer.status == 200:
            return 200, ""
        assert answer.headers["www-authenticate"].startswith("Bearer") and token not in answer.body.decode()
        return answer.status, answer.json()["error"]["code"]

    good = issuer.token(org="search")
    assert present(good) == (200, "")
    one.wait_for(lambda: bool(one.requests()), "a line of the request")
    line = one.requests()[0]
    assert (line["client"], line["tenant"], line["key"]) == ("ann", "search", "jwt:https://id#ann")
    assert present(issuer.token(role="basic", sub="bob")) == (200, "")

    head, body, signature = good.split(".")
    none = part(b'{"alg":"none","typ":"JWT"}')
    pem = issuer.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    confused = part(b'{"alg":"HS256","kid":"a"}') + "." + body
    confused += "." + part(hmac.new(pem, confused.encode(), hashlib.sha256).digest())
    forged = {
        "alg none": f"{none}.{body}.",
        "alg none, a signature": f"{none}.{body}.{signature}",
        "the public key as a secret": confused,
        "no signature": f"{head}.{body}.",
        "another's signature": issuer.token(key=stranger),
        "an unknown kid": issuer.token(kid="b"),
        "another audience": issuer.token(aud="other"),
        "another issuer": issuer.token(iss="https://other"),
        "an unknown role": issuer.token(role="root"),
        "huge": issuer.token(padding="x" * 20_000),
    }
    found = {name: present(token) for name, token in forged.items()}
    assert {status for status, _ in found.values()} == {401}, found
    assert {code for _, code in found.values()} <= {"invalid_token", "invalid_api_key"}, found
    assert present(issuer.token(exp=int(time.time()) - 100)) == (401, "expired_token")
    # Unknown key ids are no way to make the gateway fetch without end.
    before, began = issuer.fetched, time.monotonic()
    for number in range(20):
        assert present(issuer.token(kid=f"k{number}"))[0] == 401
    assert issuer.fetched - before <= 2 + (time.monotonic() - began) / REFETCH_S
    # Beyond what any head may have it is refused before anybody looks at it.
    parts = urlsplit(one.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=LONG_S) as link:
        with contextlib.suppress(OSError):
            head_text = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {'a' * 100_000}\r\n\r\n"
            )
            link.sendall(head_text.encode())
        assert b" 431 " in link.recv(65536).split(b"\r\n")[0]
    assert present(good) == (200, "")
    assert len(backend.seen("/v1/chat/completions")) == 3
    assert one.stop() == 0
    said = json.dumps(one.lines) + "\n".join(one.errors)
    for token in (good, *forged.values()):
        assert token not in said
