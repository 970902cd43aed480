"""Traces by OpenTelemetry, where they are wanted and its packages are installed; without, none of it is imported.

A request is a SERVER span; what the backend does for it is a CLIENT span below, with the attributes of the conventions
for generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/). Neither holds prompts or answers.
The context comes and goes in the headers of W3C Trace Context; the backend sees the CLIENT span as its parent.
"""

# ruff: noqa: PLC0415 - half a second of imports, only where tracing is enabled

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import __version__
from .config import Tracing as Settings
from .logs import redact

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

Header = tuple[bytes, bytes]

#: How long `close` waits for the collector, in seconds.
CLOSE_S = 5.0
_EXPORT_S = 5.0
_CONTEXT = (b"traceparent", b"tracestate")
#: A longer tracestate is left behind, as the specification allows beyond 512 characters.
_MAX_STATE = 512

#: The conventions' names of operations; others keep ours.
_OPERATIONS = {"completions": "text_completion", "responses": "chat"}
#: Parameters of a request that the conventions name, with the types that they may have.
_PARAMETERS: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    ("max_tokens", "gen_ai.request.max_tokens", (int,)),
    ("max_completion_tokens", "gen_ai.request.max_tokens", (int,)),
    ("max_output_tokens", "gen_ai.request.max_tokens", (int,)),
    ("temperature", "gen_ai.request.temperature", (int, float)),
    ("top_p", "gen_ai.request.top_p", (int, float)),
    ("top_k", "gen_ai.request.top_k", (int, float)),
    ("frequency_penalty", "gen_ai.request.frequency_penalty", (int, float)),
    ("presence_penalty", "gen_ai.request.presence_penalty", (int, float)),
    ("seed", "gen_ai.request.seed", (int,)),
    ("n", "gen_ai.request.choice.count", (int,)),
    ("stream", "gen_ai.request.stream", (bool,)),
)


class TracingError(Exception):
    """Tracing is enabled and cannot work."""


class Tracing:
    """The process's tracer.

    Args:
        settings: The configuration's section `tracing`.
        exporter: Where spans go; by default to the settings' endpoint by OTLP over HTTP.

    Raises:
        TracingError: It is enabled, and OpenTelemetry's packages are not installed or the endpoint is no URL.
    """

    def __init__(self, settings: Settings, exporter: SpanExporter | None = None) -> None:
        self.enabled = settings.enabled
        if not settings.enabled:
            return
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingError(
                f"tracing.enabled is true, but OpenTelemetry is not installed ({error.name} is missing): install "
                "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http, or set tracing.enabled to false"
            ) from error
        resource = Resource.create(
            {
                "service.name": settings.service_name,
                "service.version": __version__,
                "service.instance.id": os.environ.get("HOSTNAME", ""),
            }
        )
        # A caller's own decision does not bind the gateway to record: anybody could make it record everything.
        ratio = TraceIdRatioBased(settings.sample_ratio)
        self._provider = TracerProvider(
            sampler=ParentBased(root=ratio, remote_parent_sampled=ratio), resource=resource, shutdown_on_exit=False
        )
        if exporter is None:
            exporter = OTLPSpanExporter(endpoint=_endpoint(settings.endpoint), timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rayplane.gateway", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def begin(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Trace | None:
        """A request has come; None if tracing is off.

        Args:
            path: One of the API's; what names a single model or file is left out of the span's name.
            headers: The request's, with names in small letters.
        """
        if not self.enabled:
            return None
        carrier = {}
        for name in _CONTEXT:
            value = headers.get(name)
            if value and len(value) <= _MAX_STATE:
                carrier[name.decode()] = value.decode("latin-1")
        context = self._propagator.extract(carrier)
        span = self._tracer.start_span(
            f"{method} {_route(path)}",
            context,
            self._trace.SpanKind.SERVER,
            # Whoever takes a key for a model's name finds it in no trace.
            attributes={"http.request.method": method, "url.path": redact(path.encode(errors="replace")).decode()},
        )
        return Trace(self, span)

    def close(self) -> None:
        """Send what is left, waiting for the collector `CLOSE_S` seconds at most."""
        if self.enabled:
            self.enabled = False
            ending = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
            ending.start()
            ending.join(CLOSE_S)

    def child(self, parent: Span, name: str, attributes: Mapping[str, Any] | None) -> tuple[Span, list[Header]]:
        """A CLIENT span below `parent`, and the headers that name it."""
        trace = self._trace
        span = self._tracer.start_span(
            name, trace.set_span_in_context(parent), trace.SpanKind.CLIENT, attributes=attributes
        )
        return span, self.context(trace.set_span_in_context(span))

    def context(self, context: Context) -> list[Header]:
        """The headers that carry a context."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return [(name.encode(), value.encode()) for name, value in carrier.items()]

    def fail(self, span: Span, kind: str) -> None:
        """Mark a span as failed."""
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.StatusCode.ERROR)


class Trace:
    """The spans of one request."""

    __slots__ = ("_call", "_span", "_tracing", "trace_id")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span
        self._call: Span | None = None
        #: 32 hexadecimal digits, for logs.
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def onward(
        self, headers: Iterable[Header], operation: str, model: str, body: Mapping[str, Any] | None
    ) -> list[Header]:
        """The request goes to a backend: `headers` with the trace's context in place of the caller's.

        Args:
            body: The request as decoded; its parameters (not its texts) become attributes.
        """
        name = _OPERATIONS.get(operation, operation)
        attributes: dict[str, Any] | None = None
        if self._span.is_recording():
            attributes = {
                "gen_ai.operation.name": name,
                "gen_ai.provider.name": "rayplane",
                "gen_ai.request.model": model,
            }
            for parameter, attribute, types in _PARAMETERS:
                value = body.get(parameter) if body else None
                if type(value) in types:
                    attributes[attribute] = value
        self._call, context = self._tracing.child(self._span, f"{name} {model}", attributes)
        return [*(pair for pair in headers if pair[0] not in _CONTEXT), *context]

    def end(self, record: Mapping[str, Any]) -> None:
        """The request has ended.

        Args:
            record: What is logged of it (`Logs.request`).
        """
        span, call = self._span, self._call
        if not span.is_recording():
            return
        status = record["status"]
        failed = not record["success"]
        kind = str(record.get("error") or status)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("rayplane.request_id", record["request_id"])
        for name, attribute in (("client", "enduser.id"), ("tenant", "rayplane.tenant"), ("cache", "rayplane.cache")):
            if record.get(name):
                span.set_attribute(attribute, record[name])
        # A server's span is in error when the server is (semantic conventions for HTTP spans), not when its caller is.
        if failed and (status >= 500 or status < 400):
            self._tracing.fail(span, kind)
        if call is not None:
            call.set_attribute("gen_ai.usage.input_tokens", record["input_tokens"])
            call.set_attribute("gen_ai.usage.output_tokens", record["output_tokens"])
            if record.get("backend"):
                call.set_attribute("rayplane.backend", record["backend"])
            if record.get("stream") and record.get("ttft_ms") is not None:
                call.set_attribute("gen_ai.response.time_to_first_chunk", record["ttft_ms"] / 1000)
            if failed:
                self._tracing.fail(call, kind)
            call.end()
        span.end()


def _route(path: str) -> str:
    """The path as a span is named: spans of all models, and of all files, have one name each."""
    for collection in ("/v1/models/", "/v1/files/"):
        if path.startswith(collection):
            return collection + "{id}"
    return path


def _endpoint(url: str) -> str | None:
    """Where spans are sent; a URL without a path gets OTLP's. None: as the environment says (OTEL_EXPORTER_OTLP_*)."""
    if not url:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TracingError(f"tracing.endpoint has to be a URL such as http://collector:4318, not {url!r}")
    return url.rstrip("/") + "/v1/traces" if parts.path in ("", "/") else url
