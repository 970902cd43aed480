"""Server-sent events as bytes: cut where they end, left as they are.

https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end with CR LF, LF or CR, an empty line ends an
event. Nothing here changes a byte except `cut_usage`, and that only what it is asked to take out.
"""

from __future__ import annotations

import re

import msgspec

from .errors import BackendFailed
from .request import Usage

#: No language model says so much at once, though the last event of the responses API holds the whole text.
MAX_EVENT_BYTES = 16 * 1024 * 1024

# Two ends of lines. Atomic, for CR LF is one end and never two.
_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE = re.compile(rb"\r\n|\n|\r")
_SCALAR = rb'(?:null|true|false|-?[0-9.eE+-]+|"(?:[^"\\]|\\.)*"|\[[0-9,. ]*\])'
# A top-level member `usage` after others, with nothing but plain members behind it: as that tail holds no brace, the
# brace after it is the outermost one. Inside a text the quotes would have backslashes.
_USAGE = re.compile(
    rb',\s*"usage"\s*:\s*(?P<value>null|\{(?:[^{}"]|"[^"\\{}]*"|\{[^{}]*\})*\})'
    rb'(?:\s*,\s*"[A-Za-z0-9_]+"\s*:\s*' + _SCALAR + rb")*\s*\}\s*\Z"
)
_NULL = b"null"
_usage = msgspec.json.Decoder(Usage)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Events:
    """Cuts a stream into events, however its pieces fall.

    Args:
        limit: Bytes that an event may have.
    """

    __slots__ = ("_buffer", "_limit", "_scanned")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._limit = limit

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that are complete with this piece, each with its empty line.

        Raises:
            BackendFailed: An event is larger than the limit.
        """
        if not self._buffer and piece.endswith(b"\n\n") and b"\r" not in piece:
            # As nearly every piece is: one or more whole events.
            if piece.find(b"\n\n") == len(piece) - 2:
                return [piece]
            return [event + b"\n\n" for event in piece.split(b"\n\n")[:-1]]
        buffer = self._buffer
        buffer += piece
        events: list[bytes] = []
        begin = 0
        for match in _END.finditer(buffer, max(0, self._scanned - 3)):
            end = match.end()
            if end == len(buffer) and buffer[end - 1] == 13 and buffer[end - 2] == 10:
                # LF CR, and no more yet: the LF of a CR LF is on its way. (After CR CR nothing is waited for: such
                # a stream ends its lines with CR alone, and an event that waits for the next one comes a token late.)
                break
            events.append(bytes(buffer[begin:end]))
            begin = end
        if begin:
            del buffer[:begin]
        if len(buffer) > self._limit:
            raise BackendFailed(f"The backend sent an event of more than {self._limit} bytes.")
        self._scanned = len(buffer)
        return events

    def rest(self) -> bytes:
        """What is left at the end of the stream: an event that nobody ended, or nothing."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._scanned = 0
        return rest


def data(event: bytes) -> bytes | None:
    """The event's data: its `data` lines joined by LF; None where it has none (a comment, a ping)."""
    if event.startswith(b"data: ") and event.endswith(b"\n\n") and event.find(b"\n") == len(event) - 2:
        text = event[6:-2]
        if b"\r" not in text:
            return text
    lines: list[bytes] = []
    for line in _LINE.split(event):
        name, colon, value = line.partition(b":")
        if name == b"data" and (colon or line == b"data"):
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


def is_done(event: bytes) -> bool:
    """Whether it is OpenAI's end mark, `data: [DONE]`."""
    return len(event) < 64 and b"[DONE]" in event and (data(event) or b"").strip() == b"[DONE]"


class _Fault(msgspec.Struct):
    code: int | str | None = None


class _Said(msgspec.Struct):
    error: _Fault | str | None = None
    object: str = ""
    type: str = ""
    code: int | str | None = None


_said = msgspec.json.Decoder(_Said)


def error_of(event: bytes) -> int:
    """The status of an event that says that the backend failed (an error, a failed response), or 0."""
    text = data(event) if b'"error"' in event or b'"response.failed"' in event else None
    if text is None:
        return 0
    try:
        said = _said.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    if said.error is None and said.object != "error" and said.type not in ("error", "response.failed"):
        return 0
    code = said.error.code if isinstance(said.error, _Fault) else said.code
    return code if isinstance(code, int) and 400 <= code < 600 else 502


def cut_usage(event: bytes) -> tuple[bytes, Usage | None]:
    """Take the member `usage` out of a chunk.

    It comes of `stream_options` that the gateway added: vLLM's `continuous_usage_stats` puts counts into every chunk,
    others put `"usage":null` there. All other bytes stay; only where `usage` stands at an unusual place is the data
    encoded anew.

    Returns:
        The event without it (the event itself where there is none, or none that is understood), and the counts (None
        for `null`).
    """
    place = event.rfind(b'"usage"')
    if place < 0:
        return event, None
    if event.startswith(b',"usage":{', place - 1) and event.endswith(b"}}\n\n"):
        # As vLLM writes it: the last member, plain. Its end is the outermost object's but for one brace.
        value = event[place + 8 : -3]
        if value.count(b"{") == 1 and value.count(b"}") == 1:
            try:
                return event[: place - 1] + b"}\n\n", _usage.decode(value)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return event, None
    comma = event.rfind(b",", 0, place)
    match = _USAGE.match(event, comma) if comma >= 0 else None
    if match is None:
        return _cut_decoded(event)
    value = match["value"]
    if value == _NULL:
        return event[:comma] + event[match.end("value") :], None
    try:
        usage = _usage.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return event, None
    return event[:comma] + event[match.end("value") :], usage


def _cut_decoded(event: bytes) -> tuple[bytes, Usage | None]:
    text = data(event)
    if text is None:
        return event, None
    try:
        members = _object.decode(text)
        value = members.pop("usage", None)
        if value is None:
            return event, None
        usage = None if bytes(value) == _NULL else _usage.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return event, None
    lines = [line for line in _LINE.split(event) if line and not line.startswith(b"data")]
    return b"\n".join([*lines, b"data: " + msgspec.json.encode(members), b"", b""]), usage
