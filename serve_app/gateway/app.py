"""The ASGI application of the public port."""

from __future__ import annotations

from .exchange import Exchange
from .request import Bodies, Receive, Scope, Send, plain
from .runtime import Runtime

_PROBES = ("/livez", "/readyz", "/health", "/healthz")


class Gateway:
    """Answers OpenAI's API, and the probes of load balancers: /livez, and the others for readiness."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._bodies = Bodies(runtime.policy.config.server.max_buffered_bytes)
        runtime.metrics.pull("buffered_bytes", "Bytes that requests' bodies take.", lambda: self._bodies.held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["path"] = plain(scope["path"])
        if scope["path"] in _PROBES and scope["method"] in ("GET", "HEAD"):
            well = scope["path"] == "/livez" or self._runtime.ready()
            body = b"ok\n" if well else b"not ready\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200 if well else 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await Exchange(self._runtime, scope, receive, send, self._bodies).run()
