"""What a caller sent: the operation behind a path, the body within bounds, the parameters the gateway goes by."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any, Literal

import msgspec

from .config import Operation
from .errors import AuthenticationFailed, GatewayError, InvalidRequest, NotFound, TooLarge

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

#: What may be asked with POST. A path that ends in `/` stands for all below it.
_POST: dict[str, Operation] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/score": "score",
    "/score": "score",
    "/v1/audio/transcriptions": "audio",
    "/v1/audio/translations": "audio",
    "/v1/audio/speech": "audio",
    "/v1/files": "files",
    "/tokenize": "tokenize",
    "/detokenize": "tokenize",
    "/v1/tokenize": "tokenize",
    "/v1/detokenize": "tokenize",
}
#: Closed unless the configuration opens them.
CLOSED: frozenset[Operation] = frozenset({"audio", "files", "tokenize"})
#: Operations whose answers may come as server-sent events with token usage in OpenAI's chunks.
CHUNKED: frozenset[Operation] = frozenset({"chat", "completions"})

#: Request headers that reach a backend. Everything else ends here: what a backend would believe (tenants, users,
#: forwarded addresses, credentials) is not the caller's to say.
FORWARDED = frozenset(
    {
        b"accept",
        b"accept-language",
        b"content-type",
        b"idempotency-key",
        b"openai-beta",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-session-id",
    }
)
#: Answer headers that reach the caller.
RETURNED = frozenset(
    {
        b"cache-control",
        b"content-disposition",
        b"content-language",
        b"content-type",
        b"openai-model",
        b"openai-processing-ms",
        b"openai-version",
        b"retry-after",
    }
)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:\-]{1,128}")
_SEEN_ONCE = frozenset({b"authorization", b"content-type", b"content-length", b"content-encoding", b"x-request-id"})


def operation_of(method: str, path: str) -> Operation:
    """The operation of a method and path.

    Raises:
        NotFound: The path is none of the API's.
        GatewayError: 405, the path wants another method.
    """
    if path == "/v1/models" or path.startswith("/v1/models/"):
        if method in ("GET", "HEAD"):
            return "models"
        raise GatewayError(
            f"{method} is not allowed for {_shown(path)}: use GET.",
            status=405,
            code="method_not_allowed",
            headers={"allow": "GET"},
        )
    if path == "/v1/files" or path.startswith("/v1/files/"):
        if method in ("GET", "POST", "DELETE"):
            return "files"
    elif method == "POST" and path in _POST:
        return _POST[path]
    elif path in _POST:
        raise GatewayError(
            f"{method} is not allowed for {path}: use POST.",
            status=405,
            code="method_not_allowed",
            headers={"allow": "POST"},
        )
    raise NotFound(f"Unknown request URL: {method} {_shown(path)}.", code="unknown_url")


def _shown(path: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in path[:200])


class Headers:
    """The request's headers: those that the gateway reads by name, and those that go on to a backend."""

    __slots__ = ("forwarded", "known")

    def __init__(self, pairs: list[Header]) -> None:
        """Sort headers out.

        Raises:
            InvalidRequest: One that may come once only comes twice: two readers could choose differently.
        """
        self.known: dict[bytes, bytes] = {}
        self.forwarded: list[Header] = []
        known = self.known
        for pair in pairs:
            name = pair[0]
            if name in known and name in _SEEN_ONCE:
                error = f"The header {name.decode('latin-1')} is there more than once."
                raise AuthenticationFailed(error) if name == b"authorization" else InvalidRequest(error)
            known[name] = pair[1]
            if name in FORWARDED:
                self.forwarded.append(pair)

    def text(self, name: bytes) -> str:
        """A header's value, or an empty text."""
        return self.known.get(name, b"").decode("latin-1")


def request_id(headers: Headers) -> str:
    """The caller's own x-request-id where it is harmless, else a new one."""
    given = headers.known.get(b"x-request-id")
    if given and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return "req_" + secrets.token_hex(12)


async def read_body(receive: Receive, headers: Headers, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        TooLarge: More than `max_bytes`, by its own header or in fact.
        InvalidRequest: The body is encoded, or takes longer than `timeout_s`.
        ClientGone: The caller closed the connection.
    """
    encoding = headers.known.get(b"content-encoding", b"identity")
    if encoding.lower() not in (b"", b"identity"):
        raise InvalidRequest("Encoded bodies are not taken: send the body without Content-Encoding.", status=415)
    declared = headers.known.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise TooLarge(f"The body has {declared[:20].decode()} bytes; at most {max_bytes} are taken.")
    message = await _first(receive, timeout_s)
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        body = await _rest(receive, body, max_bytes, timeout_s)
    if len(body) > max_bytes:
        raise TooLarge(f"The body has more than {max_bytes} bytes.")
    return body


async def _first(receive: Receive, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError:
        raise InvalidRequest(
            f"The body did not arrive within {timeout_s:g} s.", status=408, code="request_timeout"
        ) from None
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message


async def _rest(receive: Receive, first: bytes, max_bytes: int, timeout_s: float) -> bytes:
    pieces = [first]
    size = len(first)
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise TooLarge(f"The body has more than {max_bytes} bytes.")
                pieces.append(piece)
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        raise InvalidRequest(
            f"The body did not arrive within {timeout_s:g} s.", status=408, code="request_timeout"
        ) from None


class ClientGone(Exception):  # noqa: N818 - nothing went wrong here
    """The caller closed the connection; nobody reads an answer."""


_DECODER = msgspec.json.Decoder()


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        InvalidRequest: It is none, or nested too deeply.
    """
    try:
        decoded = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("We could not parse the JSON body of your request.") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("The body has to be a JSON object.")
    return decoded


def model_of(decoded: dict[str, Any]) -> str:
    """The model that a body names.

    Raises:
        InvalidRequest: None, or no text.
    """
    model = decoded.get("model")
    if isinstance(model, str) and model:
        return model
    if model is None or model == "":
        raise InvalidRequest("You must provide a model parameter.", param="model")
    raise InvalidRequest("The parameter model has to be a text.", param="model")


def flag(decoded: dict[str, Any], name: str) -> bool:
    """A parameter that is true or false.

    Raises:
        InvalidRequest: It is something else.
    """
    value = decoded.get(name)
    if value is None or value is False:
        return False
    if value is True:
        return True
    raise InvalidRequest(f"The parameter {name} has to be true or false.", param=name)


def form_model(content_type: bytes, body: bytes) -> str:
    """The field `model` of a multipart form (audio uploads).

    Raises:
        InvalidRequest: The form has none, more than one, or is no form.
    """
    if not content_type.lower().startswith(b"multipart/form-data"):
        raise InvalidRequest("The body has to be a multipart form.", status=415)
    parsed = BytesParser(policy=HTTP).parsebytes(b"content-type: " + content_type + b"\r\n\r\n" + body)
    found = [
        part.get_payload(decode=True)
        for part in parsed.iter_parts()
        if part.get_param("name", header="content-disposition") == "model"
    ]
    if len(found) != 1 or not isinstance(found[0], bytes):
        raise InvalidRequest("The form has to have one field model.", param="model")
    return found[0].decode("utf-8", "replace").strip()


#: Bytes of JSON a token stands for, on average, in English prose with its quotes and names: the first estimate only.
BYTES_PER_TOKEN = 4
_MEASURED_BYTES = 16 * 1024


def input_tokens(decoded: dict[str, Any], body: bytes) -> int:
    """About how many tokens a request holds. Corrected by the backend's own count afterwards."""
    size = len(body) if len(body) <= _MEASURED_BYTES else _text_bytes(decoded)
    return size // BYTES_PER_TOKEN + 1


def _text_bytes(decoded: dict[str, Any]) -> int:
    """The length of texts that a model reads; images and sound inside the body are no text."""
    size = 0
    queue: list[Any] = [decoded]
    while queue:
        value = queue.pop()
        if isinstance(value, str):
            size += 256 if value.startswith("data:") else len(value)
        elif isinstance(value, dict):
            queue.extend(one for name, one in value.items() if name not in ("data", "b64_json", "file_data"))
        elif isinstance(value, list):
            queue.extend(value)
        else:
            size += 4
    return size


def output_tokens(operation: Operation, decoded: dict[str, Any], assumed: int) -> int:
    """How many tokens an answer may have at most, or probably has where the request states no maximum."""
    if operation in ("embeddings", "rerank", "score", "models", "files", "tokenize"):
        return 0
    limit = None
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = decoded.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            limit = value
            break
    count = decoded.get("n")
    many = count if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= 1024 else 1
    return (assumed if limit is None else limit) * many


STREAM_OPTIONS = {"include_usage": True}
CONTINUOUS_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


def with_usage(body: bytes, decoded: dict[str, Any], continuous: bool) -> bytes:
    """The body of a streamed request that asks for token usage, whether the caller did or not.

    Where the caller gave no stream_options the text is put in front, so that all else keeps its bytes.

    Raises:
        InvalidRequest: The caller's own stream_options is no object.
    """
    wanted = CONTINUOUS_OPTIONS if continuous else STREAM_OPTIONS
    given = decoded.get("stream_options")
    if given is None and "stream_options" not in decoded:
        text = body.lstrip(b" \t\r\n")
        return b'{"stream_options":' + msgspec.json.encode(wanted) + b"," + text[1:]
    if given is not None and not isinstance(given, dict):
        raise InvalidRequest("The parameter stream_options has to be an object.", param="stream_options")
    return msgspec.json.encode({**decoded, "stream_options": {**(given or {}), **wanted}})


def wants_usage(decoded: dict[str, Any]) -> Literal["none", "last", "all"]:
    """Whether the caller itself asked for a stream's usage: in its last chunk, or in every one."""
    options = decoded.get("stream_options")
    if not isinstance(options, dict) or options.get("include_usage") is not True:
        return "none"
    return "all" if options.get("continuous_usage_stats") is True else "last"


class Usage(msgspec.Struct):
    """Token counts under both APIs' names; absent ones are None."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None

    def counts(self) -> tuple[int, int]:
        """Tokens in, tokens out."""
        took = self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens
        gave = self.completion_tokens if self.completion_tokens is not None else self.output_tokens
        if took is None:
            took = (self.total_tokens or 0) - (gave or 0)
        return max(0, took), max(0, gave or 0)


class _Answer(msgspec.Struct):
    usage: Usage | None = None


_ANSWER = msgspec.json.Decoder(_Answer)


def usage_of(body: bytes) -> Usage | None:
    """The usage in a whole answer, None where it states none.

    Raises:
        msgspec.DecodeError: The answer is no JSON object of that shape.
    """
    return _ANSWER.decode(body).usage
