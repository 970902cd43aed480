"""A proxy in front of an AWS endpoint that lets calls fail the way AWS and networks do, and counts them.

It runs in a thread of the test's process: rules are objects of the test. A call is known by the account (the access
key), the service and the operation, which come from the signature and from the SDK's own description of the service;
errors are answered in the service's own wire format.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
import urllib.parse
from dataclasses import dataclass
from functools import cache
from typing import Literal, NoReturn
from xml.sax.saxutils import escape

import botocore.session

# What a signature calls a service, where the SDK calls it otherwise.
SDK_NAMES = {"elasticloadbalancing": "elbv2", "elasticfilesystem": "efs", "monitoring": "cloudwatch"}
READING = ("Describe", "Get", "List", "Head")
# Seconds after which a connection is not used again: after 75 the emulator closes it, perhaps while a call arrives.
UPSTREAM_IDLE = 20
SCOPE = re.compile(rb"Credential=([^/]+)/\d+/[^/]+/([\w-]+)/aws4_request")


@dataclass(frozen=True)
class Call:
    """One request that came through."""

    account: str
    service: str
    operation: str
    body: bytes = b""
    #: Path and query.
    target: str = ""

    @property
    def writes(self) -> bool:
        """Whether it may change something."""
        return not self.operation.startswith(READING)

    def __str__(self) -> str:
        return f"{self.service}:{self.operation}"


@dataclass
class Rule:
    """What to do with some calls instead of passing them on.

    `fault`: `error` answers `code`, `status` and `message`; `reset` breaks the connection before, `lost` after the call
    was carried out; `hang` is silent until the client gives up, before the call is carried out; `garbage` answers what
    is not AWS. `cut` is silent for good: neither this call nor any other of the account is carried out from here on;
    with `cut after` this call is carried out, and only its answer does not arrive.
    """

    service: str
    operation: str
    fault: Literal["error", "reset", "lost", "hang", "garbage", "cut", "cut after"] = "error"
    code: str = ""
    status: int = 400
    message: str = "injected"
    #: How many calls it hits.
    times: int = 1
    account: str = ""
    hits: int = 0

    def takes(self, call: Call) -> bool:
        """Whether this call is one to fail; counts it."""
        if (self.service, self.operation) != (call.service, call.operation) or self.account not in ("", call.account):
            return False
        self.hits += 1
        return self.hits <= self.times


@cache
def _routes(service: str) -> list[tuple[str, re.Pattern[str], frozenset[str], str]]:
    """The paths of a REST service: method, path, query arguments that must be there, operation; most specific first."""
    model = botocore.session.get_session().get_service_model(service)
    routes = []
    for name in model.operation_names:
        http = model.operation_model(name).http
        path, _, query = http["requestUri"].partition("?")
        pattern = "".join(
            ".+" if part.endswith("+}") else "[^/]+" if part.startswith("{") else re.escape(part)
            for part in re.split(r"(\{[^}]+\})", path.rstrip("/"))
        )
        wanted = frozenset(one for one in query.split("&") if one)
        routes.append((http["method"], re.compile(pattern + "/?"), wanted, name))
    return sorted(
        routes, key=lambda route: (-len(route[2]), route[1].pattern.count("[^/]+") + route[1].pattern.count(".+"))
    )


@cache
def _protocol(service: str) -> str:
    try:
        return str(botocore.session.get_session().get_service_model(service).metadata["protocol"])
    except Exception:
        return ""


def identify(method: str, target: str, headers: dict[str, str], body: bytes) -> Call:
    """Name the call of a request."""
    match = SCOPE.search(headers.get("authorization", "").encode())
    account, scope = (match.group(1).decode(), match.group(2).decode()) if match else ("", "")
    service = SDK_NAMES.get(scope, scope)
    path, _, query = target.partition("?")
    protocol = _protocol(service) if service else ""
    operation = headers.get("x-amz-target", "").rpartition(".")[2]
    if not operation and protocol in ("query", "ec2"):
        operation = urllib.parse.parse_qs((body or query.encode()).decode()).get("Action", [""])[0]
    if not operation and protocol.startswith("rest"):
        arguments = urllib.parse.parse_qs(query, keep_blank_values=True)
        given = {*arguments, *(f"{key}={values[0]}" for key, values in arguments.items())}
        operation = next(
            (
                name
                for verb, pattern, wanted, name in _routes(service)
                if verb == method and wanted <= given and pattern.fullmatch(path.rstrip("/") or "/")
            ),
            "",
        )
    return Call(account, service, operation or f"{method} {path}", body, target)


def error_answer(call: Call, rule: Rule) -> tuple[int, str, bytes]:
    """Return status, content type and body of an error in the service's format."""
    protocol = _protocol(call.service)
    code, message = escape(rule.code), escape(rule.message)
    one = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    if protocol == "ec2":
        return (
            rule.status,
            "text/xml",
            f"<Response><Errors>{one}</Errors><RequestID>r-1</RequestID></Response>".encode(),
        )
    if protocol == "query":
        return rule.status, "text/xml", f"<ErrorResponse>{one}<RequestId>r-1</RequestId></ErrorResponse>".encode()
    if protocol == "rest-xml":
        return rule.status, "application/xml", f'<?xml version="1.0"?>{one}'.encode()
    body = {"__type": rule.code, "message": rule.message}
    return rule.status, "application/json", json.dumps(body).encode()


class Proxy:
    """The proxy: `with Proxy(upstream_port) as proxy: ... proxy.url ... proxy.rules.append(Rule(...))`."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.port = 0
        self.rules: list[Rule] = []
        self.calls: list[Call] = []
        #: Accounts that were cut off: their calls are neither carried out nor answered.
        self.silent: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        used = 0.0
        try:
            while head := await _read_head(reader):
                if upstream is not None and self._loop.time() - used > UPSTREAM_IDLE:
                    upstream[1].close()
                    upstream = None
                used = self._loop.time()
                if upstream is None:
                    upstream = await asyncio.open_connection("127.0.0.1", self.upstream)
                await self._one(head, reader, writer, *upstream)
        except (OSError, asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            writer.close()
            if upstream is not None:
                upstream[1].close()

    async def _one(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        requests: asyncio.StreamWriter,
    ) -> None:
        line, headers = _parse(head)
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body, raw = await _read_body(reader, headers)
        method, target, _ = line.split(" ", 2)
        call = identify(method, target, headers, body)
        self.calls.append(call)
        if call.account in self.silent:
            await _hang(reader)
        rule = next((rule for rule in self.rules if rule.takes(call)), None)
        if rule is not None and rule.fault not in ("lost", "cut after"):
            await self._fail(call, rule, method, reader, writer)
            return
        kept = re.sub(rb"(?im)^expect:.*\r\n", b"", head)
        requests.write(kept + raw)
        answer = await _read_head(answers)
        status, answer_headers = _parse(answer)
        _, content = (
            (b"", b"")
            if method == "HEAD" or status.split(" ")[1] in ("204", "304")
            else await _read_body(answers, answer_headers)
        )
        if rule is not None and rule.fault == "cut after":
            self.silent.add(call.account)
            await _hang(reader)
        if rule is not None:
            _reset(writer)
            raise ConnectionResetError
        writer.write(answer + content)
        await writer.drain()

    async def _fail(
        self, call: Call, rule: Rule, method: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if rule.fault == "reset":
            _reset(writer)
            raise ConnectionResetError
        if rule.fault in ("hang", "cut"):
            if rule.fault == "cut":
                self.silent.add(call.account)
            await _hang(reader)
        if rule.fault == "garbage":
            answer = (200, "text/html", b"<html><body>Welcome to the hotel! Please log in.<br></body></html>")
        else:
            answer = error_answer(call, rule)
        status, kind, body = answer
        body = b"" if method == "HEAD" else body
        writer.write(
            f"HTTP/1.1 {status} Injected\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"x-amzn-ErrorType: {rule.code}\r\nx-amzn-RequestId: r-1\r\n\r\n".encode()
            + body
        )
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees a reset connection."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def _hang(reader: asyncio.StreamReader) -> NoReturn:
    """Be silent until the client gives up or ends."""
    await reader.read(1)
    raise ConnectionResetError


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
    return first, headers


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bytes]:
    """Return the body and its bytes on the wire."""
    if "chunked" not in headers.get("transfer-encoding", "").lower():
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return body, body
    content, raw = b"", b""
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
        raw += size + chunk
        content += chunk[:-2]
        if len(chunk) == 2:
            return content, raw
