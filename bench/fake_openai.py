"""An OpenAI-compatible server that does nothing but answer, for the gateway's benchmark.

    python bench/fake_openai.py --port 8000 --tokens 16 --token-ms 2

A raw asyncio protocol with answers made beforehand, so that it costs a core little next to what is measured in front of
it. It looks at three things of a request: whether it streams, and whether it asks for vLLM's usage chunks
(`include_usage`, `continuous_usage_stats`), which change the stream as they do in vLLM. Streams get their next token at
the tick of one clock, all together, as an engine that decodes in batches sends them. Everything else (health checks,
/v1/models) is answered 200.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import uvloop

MODEL = "fake"
#: What the model says, token by token; joined it is `TEXT`.
WORDS = ("The", " quick", " brown", " fox", " jumps", " over", " the", " lazy")
PROMPT_TOKENS = 12
COMMON = {"id": "chatcmpl-0f6cbd2d8b5d4c58", "created": 1700000000, "model": MODEL}


def words(tokens: int) -> list[str]:
    """The tokens of an answer."""
    return [WORDS[index % len(WORDS)] for index in range(tokens)]


def compact(value: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, separators=(",", ":")).encode()


def usage(completion: int) -> dict[str, int]:
    """Usage after so many tokens."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + completion,
        "completion_tokens": completion,
    }


def whole(tokens: int) -> bytes:
    """A response that does not stream: head and body."""
    message = {"role": "assistant", "content": "".join(words(tokens))}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = compact({**COMMON, "object": "chat.completion", "choices": [choice], "usage": usage(tokens)})
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunked(event: bytes) -> bytes:
    """One event as one chunk of HTTP."""
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


def stream(tokens: int, *, include: bool, continuous: bool) -> list[bytes]:
    """What a stream's response consists of: head with the first event, one piece a token, and the end."""

    def event(choices: list[dict[str, Any]], done: int, *, final: bool = False) -> bytes:
        value: dict[str, Any] = {**COMMON, "object": "chat.completion.chunk", "choices": choices}
        if continuous or final:
            value["usage"] = usage(done)
        return b"data: " + compact(value) + b"\n\n"

    def choice(delta: dict[str, str], reason: str | None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]

    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [head + chunked(event(choice({"role": "assistant", "content": ""}, None), 0))]
    for number, word in enumerate(words(tokens), 1):
        reason = "stop" if number == tokens else None
        pieces.append(chunked(event(choice({"content": word}, reason), number)))
    end = chunked(event([], tokens, final=True)) if include else b""
    pieces.append(end + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    return pieces


class Answers:
    """The prepared bytes, and the clock of the streams."""

    def __init__(self, tokens: int, token_s: float) -> None:
        self.whole = whole(tokens)
        self.other = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
        models = compact({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]})
        self.other += f"{len(models)}\r\n\r\n".encode() + models
        self.streams = {
            (include, continuous): stream(tokens, include=include, continuous=continuous)
            for include in (False, True)
            for continuous in (False, True)
        }
        self.token_s = token_s
        self.open: dict[Connection, tuple[list[bytes], int]] = {}
        self.ticking = False

    def start(self, connection: Connection, pieces: list[bytes]) -> None:
        """Begin a stream: its first event at once, the others tick by tick."""
        connection.write(pieces[0])
        self.open[connection] = (pieces, 1)
        if not self.ticking:
            self.ticking = True
            asyncio.get_running_loop().call_later(self.token_s, self.tick)

    def tick(self) -> None:
        """Send every open stream its next piece."""
        for connection, (pieces, number) in list(self.open.items()):
            # The last token's event and the end leave together, as an engine's do.
            last = number >= len(pieces) - 2
            connection.write(pieces[number] + pieces[-1] if last else pieces[number])
            if last:
                self.open.pop(connection, None)
                connection.answered()
            else:
                self.open[connection] = (pieces, number + 1)
        self.ticking = bool(self.open)
        if self.ticking:
            asyncio.get_running_loop().call_later(self.token_s, self.tick)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.data = b""
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.write = self.transport.write

    def connection_lost(self, _error: Exception | None) -> None:
        self.answers.open.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.data = self.data + data if self.data else data
        if not self.busy:
            self.parse()

    def answered(self) -> None:
        """The stream of this connection is complete; its next request may have come already."""
        self.busy = False
        if self.data:
            self.parse()

    def parse(self) -> None:
        """Answer the requests that are there completely."""
        while self.data:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.data[:end].lower()
            begin = end + 4
            at = head.find(b"\r\ncontent-length:")
            if at >= 0:
                line_end = head.find(b"\r\n", at + 2)
                begin_next = begin + int(head[at + 17 : line_end if line_end >= 0 else end])
            elif b"\r\ntransfer-encoding: chunked" in head:
                last = self.data.find(b"\r\n0\r\n\r\n", end)
                if last < 0:
                    return
                begin_next = last + 7
            else:
                begin_next = begin
            if len(self.data) < begin_next:
                return
            body, self.data = self.data[begin:begin_next], self.data[begin_next:]
            if not head.startswith(b"post "):
                self.write(self.answers.other)
            elif b'"stream":true' in body or b'"stream": true' in body:
                self.busy = True
                continuous = b'"continuous_usage_stats":true' in body or b'"continuous_usage_stats": true' in body
                include = b'"include_usage":true' in body or b'"include_usage": true' in body
                self.answers.start(self, self.answers.streams[include, continuous])
                return
            else:
                self.write(self.answers.whole)


async def serve(arguments: argparse.Namespace) -> None:
    """Listen until the process is ended."""
    answers = Answers(arguments.tokens, arguments.token_ms / 1000)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers), "127.0.0.1", arguments.port, backlog=2048)
    print(f"listening on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: a free one, which is printed")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (%(default)s)")
    parser.add_argument("--token-ms", type=float, default=2.0, help="between the tokens of a stream (%(default)s)")
    uvloop.run(serve(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
