"""The AWS emulator, so that killing it loses nothing: `python emulator.py ADDRESS:PORT...`.

Runs in the services' environment. MiniStack writes its state when it is stopped properly; here every service whose
state changed is written before the request that changed it is answered, so an answer that a client saw survives
SIGKILL. Objects in buckets go to disk by MiniStack's S3_PERSIST.
"""

import asyncio
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import ministack.app as ministack  # type: ignore[import-not-found,unused-ignore]
from hypercorn.asyncio import serve  # type: ignore[import-not-found,unused-ignore]
from hypercorn.config import Config  # type: ignore[import-not-found,unused-ignore]
from ministack.core import persistence  # type: ignore[import-not-found,unused-ignore]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# The names of calls that only read, as they stand in a form body (Action=...) or in the X-Amz-Target header.
READING = (b"Describe", b"Get", b"List", b"Head", b"Batch", b"Search", b"Lookup", b"Simulate")

saved: dict[str, str] = {}


def reads_only(method: str, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
    """Whether a request cannot change anything."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return True
    for name, value in headers:
        if name.lower() == b"x-amz-target":
            return value.rpartition(b".")[2].startswith(READING[:3])
    _, found, action = body.partition(b"Action=")
    return bool(found) and method == "POST" and action.startswith(READING[:3])


def save_changes() -> None:
    """Write the state of every service that changed since it was last written."""
    for name, state in ministack._build_persistence_save_dict().items():
        value = state()
        if value is None:
            continue
        digest = hashlib.sha256(json.dumps(value, default=persistence._json_default).encode()).hexdigest()
        if saved.get(name) != digest:
            persistence.save_state(name, value)
            saved[name] = digest


async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """MiniStack's application, with its state on disk before the answer starts."""
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
        await ministack.app(scope, receive, send)
        return
    start = b""

    async def receive_and_look() -> Message:
        nonlocal start
        message = await receive()
        if len(start) < 4096 and message["type"] == "http.request":
            start += message.get("body", b"")[:4096]
        return message

    async def save_and_send(message: Message) -> None:
        if message["type"] == "http.response.start" and not reads_only(scope["method"], scope["headers"], start):
            save_changes()
        await send(message)

    await ministack.app(scope, receive_and_look, save_and_send)


if __name__ == "__main__":
    config = Config()
    config.bind = sys.argv[1:]
    config.keep_alive_timeout = 75
    asyncio.run(serve(app, config))
