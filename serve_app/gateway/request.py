"""What a caller sent: the operation behind a path, the body within bounds, the parameters the gateway goes by."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from .config import Operation
from .errors import (
    AuthenticationFailed,
    GatewayError,
    InvalidRequest,
    NotFound,
    RateLimited,
    TooLarge,
    Unavailable,
)
from .logs import redact

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
#: A key of this gateway's, wherever in a text it begins.
_OWN_KEY = re.compile(rb"rp-[A-Za-z0-9]{12}-[A-Za-z0-9_-]{8}")
#: Headers in which clients of other providers send their keys as they are.
_KEYS = (b"x-api-key", b"api-key")
_SEEN_ONCE = frozenset(
    {b"authorization", *_KEYS, b"content-type", b"content-length", b"content-encoding", b"x-request-id"}
)


_SLASHES = re.compile("//+")


def plain(path: str) -> str:
    """A path without slashes that say nothing: clients join addresses as `/v1//chat/completions`, `/v1/models/`."""
    if "//" in path:
        path = _SLASHES.sub("/", path)
    return path.rstrip("/") if path.endswith("/") else path


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
                raise AuthenticationFailed(error) if name in (b"authorization", *_KEYS) else InvalidRequest(error)
            known[name] = pair[1]
            if name in FORWARDED:
                self.forwarded.append(pair)

    def authorization(self) -> bytes | None:
        """The Authorization header, or what stands for it: a key in a header of its own."""
        given = self.known.get(b"authorization")
        if given is None or given.strip().lower() in (b"", b"bearer"):
            key = next((self.known[name] for name in _KEYS if self.known.get(name)), b"")
            return b"Bearer " + key if key else given
        return given

    def text(self, name: bytes) -> str:
        """A header's value, or an empty text."""
        return self.known.get(name, b"").decode("latin-1")


def request_id(headers: Headers) -> str:
    """The caller's own x-request-id where it is harmless, else a new one.

    It goes into logs, the audit log, traces and to the backend: an id that holds a key or token is not taken.
    """
    given = headers.known.get(b"x-request-id")
    if given and _REQUEST_ID.fullmatch(given) and not _OWN_KEY.search(given) and redact(given) == given:
        return given.decode("ascii")
    return "req_" + secrets.token_hex(12)


class Bodies:
    """How many bytes the process holds for requests' bodies, counted as they arrive.

    One caller gets half of the room at most, so that nobody shuts the others out.

    Args:
        limit: `server.max_buffered_bytes`.
    """

    __slots__ = ("_by_caller", "held", "limit", "share")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.share = limit // 2
        #: Bytes held now.
        self.held = 0
        self._by_caller: dict[str, int] = {}

    def take(self, caller: str, size: int) -> None:
        """Hold so many bytes more, for the caller with this id.

        Raises:
            Unavailable: The process holds as much as it may.
            RateLimited: The caller's requests hold as much as they may.
            TooLarge: A single body would need more than any caller gets.
        """
        own = self._by_caller.get(caller, 0) + size
        if size > self.share:
            raise TooLarge("The body would take more memory than a caller's requests may hold.")
        if self.held + size > self.limit:
            raise Unavailable("Too many requests' bodies are held at the moment. Please try again.", headers=_AGAIN)
        if own > self.share:
            raise RateLimited(
                "The bodies of your requests under way are too large together. Please try again.", headers=_AGAIN
            )
        self.held += size
        self._by_caller[caller] = own

    def give(self, caller: str, size: int) -> None:
        """Let go of so many bytes."""
        self.held -= size
        left = self._by_caller.get(caller, 0) - size
        if left > 0:
            self._by_caller[caller] = left
        else:
            self._by_caller.pop(caller, None)


_AGAIN: Final = {"retry-after": "1"}


#: What a smaller body takes beside itself is not worth counting: the request's own objects take more.
LIGHT_BYTES = 4096


def working_bytes(body: bytes) -> int:
    """About how many bytes a JSON body takes beside itself until it is answered, never much less than it does: decoded,
    and in the copies that go on (with the backend's name of the model, with `stream_options`).

    Decoded, texts take up to four times their bytes (one character beyond U+FFFF widens all of a text's), values some
    more: a body of empty lists takes thirty times its bytes.
    """
    if len(body) <= LIGHT_BYTES:
        return 0
    values = body.count(b",") + body.count(b"[") + body.count(b"{") * 3
    return len(body) * (3 if body.isascii() else 6) + values * 64


async def read_body(
    receive: Receive,
    headers: Headers,
    max_bytes: int,
    timeout_s: float,
    hold: Callable[[int], None],
    *,
    whole: bool = False,
) -> bytes:
    """The whole body.

    Args:
        hold: Called with the bytes of each piece as it comes; it may refuse.
        whole: It is there, and nothing has to be waited for.

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
    message = await (receive() if whole else _first(receive, timeout_s))
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if len(body) > max_bytes:
        raise TooLarge(f"The body has more than {max_bytes} bytes.")
    if body:
        hold(len(body))
    if message.get("more_body"):
        body = await _rest(receive, body, max_bytes, timeout_s, hold)
    return body


async def _first(receive: Receive, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError:
        raise InvalidRequest(
            f"The body did not arrive within {timeout_s:g} s.", status=408, code="request_timeout"
        ) from None
    return message


async def _rest(receive: Receive, first: bytes, max_bytes: int, timeout_s: float, hold: Callable[[int], None]) -> bytes:
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
                hold(len(piece))
                pieces.append(piece)
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        raise InvalidRequest(
            f"The body did not arrive within {timeout_s:g} s.", status=408, code="request_timeout"
        ) from None


class ClientGone(Exception):  # noqa: N818 - nothing went wrong here
    """The caller closed the connection; nobody reads an answer."""


#: Lists and objects inside one another; the parser of vLLM's own server (jiter) takes 200. What is decoded is copied,
#: searched and encoded by functions that call themselves.
MAX_DEPTH = 200
_DECODER = msgspec.json.Decoder()
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        InvalidRequest: It is none, or nested too deeply.
    """
    try:
        decoded = _DECODER.decode(body)
    except RecursionError:
        raise InvalidRequest(_TOO_DEEP) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest("We could not parse the JSON body of your request.") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("The body has to be a JSON object.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _too_deep(decoded):
        raise InvalidRequest(_TOO_DEEP)
    return decoded


_TOO_DEEP: Final = f"The JSON body of your request is nested more than {MAX_DEPTH} levels deep."


def _too_deep(decoded: dict[str, Any]) -> bool:
    level: list[Any] = [decoded]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


_SPACE = re.compile(rb"[ \t\r\n]*")


def one_reading(body: bytes) -> bool:
    """Whether all readers find the same members in a JSON object: every name once, and spelled without escapes.

    Of a name that is there twice (or once more as `"mod\\u0065l"`) readers choose the first or the last; the body that
    goes on must be the one that was looked at.

    Args:
        body: What `decode` took.
    """
    members = _MEMBERS.decode(body)
    size = 1 + max(1, len(members))
    for name, value in members.items():
        size += len(name) + 3 + len(value)
    if size == len(body):
        # Without any space: there is no room for more.
        return True
    if size + 2 * len(members) - 1 == len(body):
        # Python's own way.
        pairs = [b'"%s": %s' % (name.encode(), value) for name, value in members.items()]
        if body == b"{" + b", ".join(pairs) + b"}":
            return True
    at = body.find(b"{") + 1
    for name, value in members.items():
        for part in (b'"%s"' % name.encode(), b":", value):
            at = _SPACE.match(body, at).end()  # type: ignore[union-attr]
            if not body.startswith(part, at):
                return False
            at += len(part)
        at = _SPACE.match(body, at).end()  # type: ignore[union-attr]
        at += body.startswith(b",", at)
    return body[at:].strip() == b"}"


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


#: Boundaries that every reader takes for the same (RFC 2046 allows commas and spaces too).
_BOUNDARY = re.compile(rb"(\"?)([0-9A-Za-z'()+_./:?-]{1,70})\1")
#: Bytes of the headers of a form's part, and parts of a form.
_MAX_HEAD = 8 * 1024
_MAX_PARTS = 1000
_PARAMETER = re.compile(rb';[ \t]*([A-Za-z0-9!#$%&\'*+.^_`|~-]+)=("(?:[^"\\\r\n]|\\[^\r\n])*"|[^";\s]*)[ \t]*')
_UNENCODED = frozenset({b"7bit", b"8bit", b"binary"})


@dataclass(slots=True)
class Form:
    """A multipart form (an audio upload): the model it names, and its other fields that are texts."""

    model: str
    #: Where each stands in the body, and what it says.
    fields: list[tuple[int, int, str]]
    _boundary: bytes

    def replaced(self, body: bytes, texts: list[str]) -> bytes:
        """The form's body with other texts in its fields, as many as there are.

        Raises:
            InvalidRequest: A text holds the form's boundary.
        """
        pieces: list[bytes] = []
        at = 0
        for (begin, end, _), text in zip(self.fields, texts, strict=True):
            new = text.encode()
            if self._boundary in new:
                raise _ambiguous("a field holds its boundary")
            pieces += (body[at:begin], new)
            at = end
        return b"".join([*pieces, body[at:]])


def form(content_type: bytes, body: bytes) -> Form:
    """Read a multipart form.

    Only forms with one reading are taken: one boundary, which stands nowhere but between parts, lines that end in
    CR LF, and parts whose names are plain (RFC 7578). A backend's reader may be laxer than this one, and would else see
    other fields.

    Raises:
        InvalidRequest: The form has no field `model`, more than one, is ambiguous, or is no form.
    """
    kind, _, parameters = content_type.partition(b";")
    if kind.strip().lower() != b"multipart/form-data":
        raise InvalidRequest("The body has to be a multipart form.", status=415)
    boundary = _boundary(parameters)
    models: list[str] = []
    fields: list[tuple[int, int, str]] = []
    for begin, empty, end in _parts(boundary, body):
        name, plain = _part_name(body[begin:empty])
        if not plain:
            if name == b"model":
                raise _ambiguous("the field model is a file or encoded")
            continue
        try:
            text = body[empty + 4 : end].decode()
        except UnicodeDecodeError:
            raise _ambiguous("a field is no text in UTF-8") from None
        if name == b"model":
            models.append(text.strip())
        else:
            fields.append((empty + 4, end, text))
    if len(models) != 1 or not models[0]:
        raise InvalidRequest("The form has to have one field model.", param="model")
    return Form(models[0], fields, boundary)


def _ambiguous(why: str) -> InvalidRequest:
    return InvalidRequest(f"The multipart form is not well formed: {why}.")


def _boundary(parameters: bytes) -> bytes:
    """The boundary in a content type's parameters."""
    found = b""
    for one in parameters.split(b";"):
        name, equals, value = one.strip().partition(b"=")
        if name.lower() == b"charset" and equals:
            continue
        match = _BOUNDARY.fullmatch(value)
        if name.lower() != b"boundary" or match is None or found:
            raise _ambiguous("its content type has to have one plain boundary and nothing else")
        found = match[2]
    return found


def _parts(boundary: bytes, body: bytes) -> list[tuple[int, int, int]]:
    """The parts of a form: where each begins, where the empty line behind its headers is, and where it ends."""
    mark = b"--" + boundary
    parts: list[tuple[int, int, int]] = []
    if not body.startswith(mark):
        raise _ambiguous("it does not begin with its boundary")
    at = len(mark)
    while body[at : at + 2] == b"\r\n" and len(parts) < _MAX_PARTS:
        begin = at + 2
        at = body.find(mark, begin)
        empty = body.find(b"\r\n\r\n", begin, min(begin + _MAX_HEAD, at))
        if at < 0 or empty < 0 or empty + 4 > at - 2 or body[at - 2 : at] != b"\r\n":
            # A boundary within a line, or after a bare line feed, is one to lax readers only.
            raise _ambiguous("a part has no end, or a boundary in it")
        parts.append((begin, empty, at - 2))
        at += len(mark)
    if body[at:] not in (b"--", b"--\r\n"):
        raise _ambiguous("a boundary is followed by something else, or the last one is missing")
    return parts


def _part_name(head: bytes) -> tuple[bytes, bool]:
    """The name of a form's part, and whether it is a plain field: no file, not encoded."""
    name = b""
    plain = True
    lines = head.split(b"\r\n")
    if any(bad in one for one in lines for bad in (b"\r", b"\n", b"\0")):
        raise _ambiguous("lines have to end in CR LF")
    for one in lines:
        title, colon, value = one.partition(b":")
        title = title.lower()
        if not colon or title != title.strip():
            raise _ambiguous("a part has a header that is none")
        if title == b"content-transfer-encoding":
            plain = plain and value.strip().lower() in _UNENCODED
        if title != b"content-disposition":
            continue
        kind, _, rest = value.strip().partition(b";")
        given = [(match[1].lower(), match[2]) for match in _PARAMETER.finditer(b";" + rest)]
        names = [text.strip(b'"') for key, text in given if key == b"name"]
        if (
            name
            or kind.strip().lower() != b"form-data"
            or _PARAMETER.sub(b"", b";" + rest)
            or len(names) != 1
            or not names[0]
            or b"\\" in names[0]
            or any(key.startswith(b"name*") for key, _ in given)
        ):
            raise _ambiguous("a part has no plain name")
        name = names[0]
        if any(b"name=" in text.lower() for _, text in given):
            # Readers that search instead of reading would take it for the name.
            raise _ambiguous("a part is named like a parameter")
        plain = plain and not any(key.startswith(b"filename") for key, _ in given)
    if not name:
        raise _ambiguous("a part has no plain name")
    return name, plain


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


#: The names that bound an operation's answer: other operations' names bound nothing, whatever they say.
BOUNDS: Final[dict[str, tuple[str, ...]]] = {
    "chat": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}


def number(value: object) -> int:
    """A count as engines read it, to whom 4, 4.0 and "4" are the same; what is none, or negative, is 0."""
    if isinstance(value, str):
        value = int(value) if len(value) < 20 and value.isascii() and value.isdigit() else 0
    if isinstance(value, float):
        value = int(value) if value.is_integer() else 0
    return min(max(0, value), 1 << 53) if isinstance(value, int) else 0


def answers(operation: str, decoded: dict[str, Any]) -> tuple[int, str]:
    """How many answers a request asks for, each with a bound of its own, and the parameter that says so (the one that
    multiplies most; empty where there is one answer only).

    It is max(n, best_of) for every prompt: `best_of` candidates are generated whatever number is returned.
    """
    if operation not in ("chat", "completions"):
        return 1, ""
    choices, name = max((number(decoded.get(one)), one) for one in ("n", "best_of"))
    prompts = 1 if operation == "chat" else _prompts(decoded)
    if prompts > max(1, choices):
        name = "prompt"
    choices = max(1, choices)
    return choices * prompts, name if choices * prompts > 1 else ""


def _prompts(decoded: dict[str, Any]) -> int:
    """Prompts of a completion: a text, tokens, or a list of these; in vLLM embeddings beside them."""
    count = 0
    for name in ("prompt", "prompt_embeds"):
        value = decoded.get(name)
        if isinstance(value, list) and value and not isinstance(value[0], int):
            count += len(value)
        elif value:
            count += 1
    return max(1, count)


def output_tokens(operation: Operation, decoded: dict[str, Any], assumed: int) -> int:
    """How many tokens an answer may have at most, or probably has where the request states no maximum: the largest
    bound stated (to some engines 0 is none), for each answer that is asked for.
    """
    if operation in ("embeddings", "rerank", "score", "models", "files", "tokenize"):
        return 0
    limit = max((number(decoded.get(name)) for name in BOUNDS.get(operation, ())), default=0)
    return (limit or assumed) * answers(operation, decoded)[0]


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
