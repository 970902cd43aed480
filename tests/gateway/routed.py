"""A router on fake backends, without the rest of the gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvloop

from serve_app.gateway.config import Backend, Config, Health, Route, Target, Timeouts
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.routing import Answer, Call, Router

#: Checks that come often and have time, ejection that is out of the way.
QUICK = Health(interval_s=0.05, timeout_s=60, eject_after=1000)
LIMIT = 1 << 24


@dataclass
class Policy:
    """As much of a policy as the router looks at."""

    config: Config


class Routed:
    """A router with its metrics and what it told."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.metrics = Metrics()
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.router = Router(self.metrics, lambda message, **fields: self.told.append((message, fields)))
        self.router.configure(Policy(config))

    def call(self, body: dict[str, Any] | None = None, **fields: Any) -> Call:
        """A chat request for the model `m`; `headers` and the other fields are the call's."""
        decoded = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **(body or {})}
        text = json.dumps(decoded).encode()
        given: dict[str, Any] = {
            "route_id": "m",
            "route": self.config.routes["m"],
            "method": "POST",
            "path": "/v1/chat/completions",
            "query": b"",
            "headers": [(b"content-type", b"application/json")],
            "body": text,
            "decoded": decoded,
            "stream": bool(decoded.get("stream")),
            "caller_id": "caller",
            "sticky": "caller",
            "canary": None,
            "backend": None,
            "request_id": "req_1",
        }
        return Call(**{**given, **fields})

    async def ask(self, body: dict[str, Any] | None = None, **fields: Any) -> tuple[Answer, bytes]:
        """The answer and its whole body, closed."""
        answer = await self.router.open(self.call(body, **fields))
        try:
            return answer, await answer.read(LIMIT)
        finally:
            await answer.close()

    async def names(self, times: int, **fields: Any) -> list[str]:
        """The backends of so many requests."""
        return [(await self.ask(**fields))[0].backend for _ in range(times)]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.metrics.render().decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == f"rayplane_gateway_{name}" and all(
                f'{k}="{v}"' in head for k, v in labels.items()
            ):
                total += float(value)
        return total

    def state(self, backend: str) -> dict[str, Any]:
        """A backend of the model `m` in the snapshot."""
        entry = self.router.snapshot()[0]
        cards = [*entry["backends"], *(one for one in (entry["canary"], entry["shadow"]) if one)]
        return next(one for one in cards if one["backend"] == backend)


def settings(
    backends: dict[str, str],
    route: dict[str, Any] | None = None,
    timeouts: dict[str, Timeouts] | None = None,
    **fields: Any,
) -> Config:
    """Backends by name and URL, all of them targets of the model `m` unless `route` says otherwise.

    Time-outs of a backend that are not given are longer than any busy machine takes.
    """
    given = {"health": QUICK, **fields}
    patient = Timeouts(connect_s=60)
    return Config(
        backends={
            name: Backend(url=url, timeouts=(timeouts or {}).get(name, patient), **given)
            for name, url in backends.items()
        },
        routes={"m": Route(**{"backends": [Target(backend=name) for name in backends], **(route or {})})},
    )


@asynccontextmanager
async def routed(config: Config, *, start: bool = False) -> AsyncIterator[Routed]:
    """A router on a configuration; checks run where `start` is set."""
    made = Routed(config)
    if start:
        await made.router.start()
    try:
        yield made
    finally:
        await made.router.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine on the loop that the gateway uses."""
    uvloop.run(main)
