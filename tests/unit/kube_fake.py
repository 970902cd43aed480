"""An API server that speaks real HTTP and keeps its objects in memory."""

from __future__ import annotations

import copy
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

LABELS = {
    "app.kubernetes.io/part-of": "rayplane",
    "app.kubernetes.io/component": "test",
    "app.kubernetes.io/instance": "unit",
}
KINDS = {
    "v1": {"Namespace": ("namespaces", False), "Secret": ("secrets", True), "ConfigMap": ("configmaps", True),
           "Pod": ("pods", True), "Event": ("events", True), "Service": ("services", True), "Node": ("nodes", False)},
    "apps/v1": {"Deployment": ("deployments", True), "ReplicaSet": ("replicasets", True),
                "StatefulSet": ("statefulsets", True)},
    "apiextensions.k8s.io/v1": {"CustomResourceDefinition": ("customresourcedefinitions", False)},
}  # fmt: skip


class Server(ThreadingHTTPServer):
    """Objects by path; ``writes`` lists what was sent without a dry run."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Json] = {}
        self.kinds = copy.deepcopy(KINDS)
        self.writes: list[str] = []
        #: Tokens that are taken; None: everybody's.
        self.tokens: set[str] | None = None
        #: How long a token, which is the time of its making, is taken; 0: for ever.
        self.token_life_s = 0.0
        #: Paths that Ray lets in only with this in X-Ray-Authorization.
        self.protected: dict[str, str] = {}
        #: Plural names of kinds that nobody may list.
        self.unlisted: set[str] = set()
        self.lock = threading.Lock()

    def put(self, path: str, item: Json) -> None:
        self.objects[path] = item


def overlay(live: Any, wanted: Any) -> Any:
    if isinstance(live, dict) and isinstance(wanted, dict):
        return {**live, **{key: overlay(live.get(key), value) for key, value in wanted.items()}}
    return wanted


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        with self.server.lock:
            self.answer(*self.respond(url.path, query, body))

    do_GET = do_PATCH = do_PUT = do_DELETE = handle_any  # noqa: N815

    def respond(self, path: str, query: dict[str, str], body: Json | None) -> tuple[int, Json]:
        objects = self.server.objects
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.tokens is not None and token not in self.server.tokens:
            return 401, {"reason": "Unauthorized", "message": "Unauthorized"}
        if self.server.token_life_s and time.time() - float(token or 0) > self.server.token_life_s:
            return 401, {"reason": "Unauthorized", "message": "the token has expired"}
        for version, kinds in self.server.kinds.items():
            root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
            if path == root:
                return 200, {"resources": [{"kind": k, "name": n, "namespaced": s} for k, (n, s) in kinds.items()]}
        missing = (404, {"reason": "NotFound", "message": f"{path} not found"})
        if self.command == "GET":
            if self.headers.get("X-Ray-Authorization", "") != self.server.protected.get(path, ""):
                return 403, {"message": "Forbidden: Invalid authentication token"}
            if path in objects:
                return 200, objects[path]
            parts = path.split("/")
            if parts[-1] in self.server.unlisted:
                return 403, {"reason": "Forbidden", "message": f"cannot list resource {parts[-1]}"}
            if parts[-1] in {name for kinds in self.server.kinds.values() for name, _ in kinds.values()}:
                wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
                found = [
                    item
                    for key, item in objects.items()
                    if key.split("/")[-2] == parts[-1]
                    and ("namespaces" not in parts[:-1] or key.startswith(path))
                    and wanted.items() <= (item["metadata"].get("labels") or {}).items()
                    and query.get("fieldSelector", "").removeprefix("metadata.name=") in ("", item["metadata"]["name"])
                ]
                return 200, {"items": found}
            return missing
        if self.command == "DELETE":
            if path not in objects:
                return missing
            self.server.writes.append(f"DELETE {path}")
            return 200, objects.pop(path)
        assert body is not None
        parts = path.split("/")
        namespaced = "namespaces" in parts and parts[-2] != "namespaces"
        if namespaced and f"/api/v1/namespaces/{parts[parts.index('namespaces') + 1]}" not in objects:
            return missing
        live = objects.get(path, {"metadata": {"generation": 1}})
        after = body if self.command == "PUT" else overlay(live, body)
        if query.get("dryRun") != "All":
            self.server.writes.append(f"{self.command} {path}")
            if after != live:
                after["metadata"]["resourceVersion"] = str(len(self.server.writes))
            objects[path] = after
        return 200, after
