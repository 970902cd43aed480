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

import emulator_ec2  # type: ignore[import-not-found,unused-ignore]
import emulator_eks  # type: ignore[import-not-found,unused-ignore]
import emulator_rules  # type: ignore[import-not-found,unused-ignore]
import ministack.app as ministack  # type: ignore[import-not-found,unused-ignore]
from hypercorn.asyncio import serve  # type: ignore[import-not-found,unused-ignore]
from hypercorn.config import Config  # type: ignore[import-not-found,unused-ignore]
from ministack.core import persistence  # type: ignore[import-not-found,unused-ignore]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# How the names of calls that only read begin, in a form body (Action=...) or in the X-Amz-Target header.
READING = (b"Describe", b"Get", b"List")
BACKGROUND_SECONDS = 5
# The last one's rules stand in front of what the others do.
PATCHES = (emulator_ec2, emulator_eks, emulator_rules)

saved: dict[str, str] = {}
loaded = asyncio.Event()


def reads_only(method: str, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
    """Whether a request cannot change anything."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return True
    for name, value in headers:
        if name.lower() == b"x-amz-target":
            return value.rpartition(b".")[2].startswith(READING)
    _, found, action = body.partition(b"Action=")
    return bool(found) and method == "POST" and action.startswith(READING)


def save_changes() -> None:
    """Write the state of every service that changed since it was last written, where MiniStack is to keep it at all."""
    if not persistence.PERSIST_STATE:
        return
    for name, state in ministack._build_persistence_save_dict().items():
        value = state()
        if value is None:
            continue
        digest = hashlib.sha256(json.dumps(value, default=persistence._json_default).encode()).hexdigest()
        if saved.get(name) != digest:
            persistence.save_state(name, value)
            saved[name] = digest


async def control(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answer a request about the emulator itself: its settings, and what is patched."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    operations: dict[str, list[str]] = {}
    for patches in PATCHES:
        for service, names in patches.operations().items():
            operations.setdefault(service, []).extend(names)
    status, answer = emulator_rules.control(scope["method"], scope["path"], body, operations)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """MiniStack's application, with its state on disk before the answer starts."""
    if scope["type"] == "lifespan":

        async def start_saving_and_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                loaded.set()
            await send(message)

        await ministack.app(scope, receive, start_saving_and_send)
        return
    if scope["type"] == "http" and scope["path"].startswith("/_rayplane/"):
        await control(scope, receive, send)
        return
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


async def save_now_and_then() -> None:
    """Save what changes without a request: a cluster that becomes active, a schedule that fires."""
    # Not before MiniStack has read what it wrote last time: its services are empty until then.
    await loaded.wait()
    while True:
        await asyncio.sleep(BACKGROUND_SECONDS)
        save_changes()


async def main(binds: list[str]) -> None:
    """Serve until a signal ends it."""
    for patches in PATCHES:
        patches.install()
    config = Config()
    config.bind = binds
    config.keep_alive_timeout = 75
    background = asyncio.create_task(save_now_and_then())
    await serve(app, config)
    background.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
