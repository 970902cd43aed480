"""Gateways as processes of their own, for tests that talk to them as a client would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rayplane_local.shell import DIE_WITH_PARENT

from serve_app.gateway.keys import NewKey, generate

from .waiting import LONG_S, wait_until

PROJECT = Path(__file__).resolve().parents[2]
ROLES = {
    "basic": {"models": ["m"], "max_tokens": 512},
    "premium": {"models": ["*"]},
    "admin": {
        "models": ["*"],
        "operations": [
            "chat",
            "completions",
            "responses",
            "embeddings",
            "rerank",
            "score",
            "models",
            "audio",
            "files",
            "tokenize",
            "admin",
        ],
        "choose_backend": True,
    },
}


@cache
def key(role: str) -> NewKey:
    """One key a role, the same in every test of this run."""
    return generate()


def key_entry(name: str, **more: Any) -> dict[str, Any]:
    """The entry of a key in a configuration; its role bears its name unless told otherwise."""
    made = key(name)
    return {"id": name, "prefix": made.prefix, "hash": made.hash, "role": name, "tenant": f"tenant-{name}", **more}


def stored(gateway: Gateway, entries: float) -> None:
    """Wait until a gateway has written so many cache entries: it does so after their answers were sent."""
    name = "rayplane_gateway_cache_total"
    gateway.wait_for(lambda: gateway.metric(name, result="stored") >= entries, f"{entries} cache entries")


def settings(backend: str | Mapping[str, str], redis: str = "", **more: Any) -> dict[str, Any]:
    """A configuration with one model `m` on the given backends, and a key a role; `more` replaces sections."""
    backends = {"one": backend} if isinstance(backend, str) else dict(backend)
    # Checked often, but a machine that is busy takes no backend out, and no Redis away.
    quick = {"interval_s": 0.2, "timeout_s": LONG_S}
    return {
        "server": {"port": 0, "admin_port": 0, "reload_interval_s": 0.1, "drain_s": 20},
        "store": {"url": redis, "timeout_ms": 20_000} if redis else {},
        "roles": ROLES,
        "keys": [key_entry(role) for role in ROLES],
        "backends": {name: {"url": url, "health": quick} for name, url in backends.items()},
        "routes": {"m": {"backends": [{"backend": name} for name in backends]}},
        **more,
    }


@dataclass
class Answer:
    """What a plain HTTP client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    url: str,
    body: Any = None,
    *,
    key: str = "",
    method: str = "",
    headers: Mapping[str, str] | None = None,
    timeout: float = LONG_S,
) -> Answer:
    """One request; errors are answers too."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **(headers or {})}
    if key:
        sent["authorization"] = f"Bearer {key}"
    one = urllib.request.Request(url, data=data, headers=sent, method=method or ("GET" if data is None else "POST"))
    try:
        with urllib.request.urlopen(one, timeout=timeout) as got:
            return Answer(got.status, {name.lower(): value for name, value in got.headers.items()}, got.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, {name.lower(): value for name, value in error.headers.items()}, error.read())


@dataclass
class Gateway:
    """A gateway process, and what it logged."""

    path: Path
    config: dict[str, Any]
    process: subprocess.Popen[bytes]
    lines: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    address: str = ""
    admin_address: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_address}"

    def key(self, role: str = "premium") -> str:
        return key(role).key

    def chat(self, content: str = "Hello", *, role: str = "premium", model: str = "m", **more: Any) -> Answer:
        """A chat completion; `headers` and `timeout` are the request's, all else goes into its body."""
        headers, timeout = more.pop("headers", None), more.pop("timeout", LONG_S)
        body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
        return ask(f"{self.url}/v1/chat/completions", body, key=self.key(role), headers=headers, timeout=timeout)

    def admin(self, method: str, path: str, body: Any = None) -> Answer:
        """A call of the admin API."""
        return ask(f"{self.admin_url}{path}", body, key=self.key("admin"), method=method)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples whose labels are these."""
        text = ask(f"{self.admin_url}/metrics").body.decode()
        total = 0.0
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{one}="{word}"' in head for one, word in labels.items()):
                total += float(value)
        return total

    def requests(self) -> list[dict[str, Any]]:
        """The lines of requests."""
        return [line for line in self.lines if line.get("operation")]

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition()` holds, or the gateway has ended; what it gave."""

        def asked() -> Any:
            found = condition()
            assert found or self.process.poll() is None, f"the gateway ended: {self.errors}"
            return found

        return wait_until(asked, what, lambda: self.lines[-10:])

    def line(self, request_id: str) -> dict[str, Any]:
        """The line of one request: those of others may still be on their way."""
        found: dict[str, Any] = self.wait_for(
            lambda: next((one for one in self.requests() if one["request_id"] == request_id), None),
            f"the line of the request {request_id}",
        )
        return found

    def rewrite(self, config: dict[str, Any]) -> None:
        """Put another configuration in place, as a ConfigMap does: at once."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(config))
        new.replace(self.path)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End it, by force where it does not end by itself in a minute."""
        if self.process.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LONG_S)
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


def start(
    path: Path, config: dict[str, Any], environment: Mapping[str, str] | None = None, *, wait: bool = True
) -> Gateway:
    """Start a gateway on a configuration and wait until it listens (and, unless told otherwise, is ready)."""
    path.write_text(json.dumps(config))
    process = subprocess.Popen(
        [*DIE_WITH_PARENT, sys.executable, "-m", "serve_app.gateway", "--config", str(path)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    made = Gateway(path, config, process)

    def read_out() -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                made.lines.append(json.loads(line))

    def read_errors() -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in stream:
                made.errors.append(line.decode("utf-8", "replace").rstrip())

    for one in (read_out, read_errors):
        threading.Thread(target=one, daemon=True).start()
    made.wait_for(lambda: any(line["message"] == "listening" for line in made.lines), "listening")
    said = next(line for line in made.lines if line["message"] == "listening")
    made.address, made.admin_address = said["address"], said["admin_address"]
    if wait:
        made.wait_for(lambda: ask(f"{made.admin_url}/readyz").status == 200, "getting ready")
    return made
