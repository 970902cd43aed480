"""Traces: what is exported of a request, what goes on to the backend, and that nothing is imported unasked."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from serve_app.gateway import config, tracing
from serve_app.gateway.tracing import Trace, Tracing, TracingError

PROJECT = Path(__file__).resolve().parents[2]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
RECORD: dict[str, Any] = {
    "request_id": "req_1",
    "operation": "chat",
    "model": "m",
    "status": 200,
    "success": True,
    "client": "team-a",
    "tenant": "t1",
    "backend": "one",
    "stream": True,
    "ttft_ms": 250.0,
    "input_tokens": 3,
    "output_tokens": 5,
    "latency_ms": 900.0,
}
BODY: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "a secret prompt"}],
    "temperature": 0,
    "max_tokens": 64,
    "top_p": "nonsense",
    "n": True,
    "stream": True,
}


class Collector:
    """An OTLP collector: it keeps what it is sent."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                message = ExportTraceServiceRequest()
                message.ParseFromString(body)
                collector.paths.append(self.path)
                for resource in message.resource_spans:
                    collector.resource = {one.key: one.value.string_value for one in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def named(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported at the end arrives, however busy the machine is."""
    monkeypatch.setattr(tracing, "CLOSE_S", 60)
    monkeypatch.setattr(tracing, "_EXPORT_S", 60)


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def tracer(collector: Collector, **more: Any) -> Tracing:
    return Tracing(config.Tracing(**{"enabled": True, "endpoint": collector.url, "sample_ratio": 1.0, **more}))


def begun(tracing: Tracing, headers: dict[bytes, bytes] | None = None) -> Trace:
    trace = tracing.begin("POST", "/v1/chat/completions", headers or {})
    assert trace is not None
    return trace


def test_a_request_is_a_server_span_with_the_backends_work_below_it(collector: Collector) -> None:
    made = tracer(collector)
    trace = begun(made)
    sent = trace.onward([(b"accept", b"*/*")], "chat", "m", BODY)
    trace.end(RECORD)
    made.close()
    assert collector.paths == ["/v1/traces"]
    assert collector.resource["service.name"] == "rayplane-gateway"
    assert len(collector.spans) == 2
    server, call = collector.named("POST /v1/chat/completions"), collector.named("chat m")
    assert (server.kind, call.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert server.parent_span_id == b"" and call.parent_span_id == server.span_id
    assert call.trace_id == server.trace_id == bytes.fromhex(trace.trace_id)
    assert attributes(server) == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "rayplane.request_id": "req_1",
        "rayplane.tenant": "t1",
        "enduser.id": "team-a",
    }
    assert attributes(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "rayplane",
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.time_to_first_chunk": 0.25,
        "rayplane.backend": "one",
    }
    assert [span.status.code for span in (server, call)] == [Status.STATUS_CODE_UNSET] * 2
    assert [name for name, _ in sent] == [b"accept", b"traceparent"]
    version, trace_id, parent, flags = sent[1][1].decode().split("-")
    assert (version, trace_id, parent, int(flags, 16) & 1) == ("00", trace.trace_id, call.span_id.hex(), 1)
    assert b"secret" not in b"".join(span.SerializeToString() for span in collector.spans)


def test_the_callers_trace_goes_on_and_its_headers_are_replaced(collector: Collector) -> None:
    made = tracer(collector)
    headers = {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode(), b"tracestate": b"vendor=1", b"x": b"y"}
    trace = begun(made, headers)
    assert trace.trace_id == TRACE
    sent = dict(trace.onward(list(headers.items()), "chat", "m", None))
    trace.end(RECORD)
    made.close()
    server, call = collector.named("POST /v1/chat/completions"), collector.named("chat m")
    assert server.parent_span_id.hex() == PARENT
    assert sent == {
        b"x": b"y",
        b"traceparent": f"00-{TRACE}-{call.span_id.hex()}-01".encode(),
        b"tracestate": b"vendor=1",
    }


@pytest.mark.parametrize(
    "headers",
    [
        {b"traceparent": b"nonsense"},
        {b"traceparent": f"00-{'0' * 32}-{PARENT}-01".encode()},
        {b"traceparent": b"\xff" * 55},
        {b"traceparent": b"0" * 100_000},
        {b"tracestate": b"vendor=1"},
    ],
)
def test_a_broken_context_is_none(collector: Collector, headers: dict[bytes, bytes]) -> None:
    made = tracer(collector)
    trace = begun(made, headers)
    sent = trace.onward(headers.items(), "chat", "m", None)
    trace.end(RECORD)
    made.close()
    assert [name for name, _ in sent] == [b"traceparent"]
    assert collector.named("POST /v1/chat/completions").parent_span_id == b""


def test_a_long_tracestate_is_left_behind(collector: Collector) -> None:
    made = tracer(collector)
    state = b",".join(b"v%d=%s" % (number, b"x" * 20) for number in range(30))
    trace = begun(made, {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode(), b"tracestate": state})
    assert trace.trace_id == TRACE
    assert [name for name, _ in trace.onward([], "chat", "m", None)] == [b"traceparent"]
    made.close()


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("completions", "text_completion m"),
        ("responses", "chat m"),
        ("embeddings", "embeddings m"),
        ("score", "score m"),
    ],
)
def test_operations_have_the_conventions_names(collector: Collector, operation: str, name: str) -> None:
    made = tracer(collector)
    trace = begun(made)
    trace.onward([], operation, "m", {"max_completion_tokens": 7})
    trace.end(RECORD)
    made.close()
    assert attributes(collector.named(name))["gen_ai.request.max_tokens"] == 7


@pytest.mark.parametrize(
    ("change", "server", "call"),
    [
        ({"success": False, "status": 502, "error": "bad_gateway"}, "bad_gateway", "bad_gateway"),
        ({"success": False, "status": 500}, "500", "500"),
        ({"success": False, "status": 429, "error": "rate_limit_exceeded"}, None, "rate_limit_exceeded"),
        ({"success": False, "status": 200, "error": "gateway_timeout"}, "gateway_timeout", "gateway_timeout"),
        ({}, None, None),
    ],
)
def test_errors_are_marked_where_they_are(
    collector: Collector, change: dict[str, Any], server: str | None, call: str | None
) -> None:
    made = tracer(collector)
    trace = begun(made)
    trace.onward([], "chat", "m", None)
    trace.end({**RECORD, **change})
    made.close()
    for name, kind in (("POST /v1/chat/completions", server), ("chat m", call)):
        span = collector.named(name)
        assert attributes(span).get("error.type") == kind
        assert (span.status.code == Status.STATUS_CODE_ERROR) is (kind is not None)


@pytest.mark.parametrize("path", ["/v1/files/file-1", "/v1/files/file-1/content", "/v1/files/x%0ay"])
def test_a_callers_text_names_no_span(collector: Collector, path: str) -> None:
    made = tracer(collector)
    trace = made.begin("GET", path, {})
    assert trace is not None
    trace.end(RECORD)
    made.close()
    assert attributes(collector.named("GET /v1/files/{id}"))["url.path"] == path


def test_a_key_in_a_path_is_in_no_trace(collector: Collector) -> None:
    key = "rp-Xy12Ab34Cd56-" + "s" * 43
    tracing = tracer(collector)
    trace = tracing.begin("GET", f"/v1/models/{key}", {})
    assert trace is not None
    trace.end(RECORD)
    tracing.close()
    (span,) = collector.spans
    assert attributes(span)["url.path"] == "/v1/models/rp-Xy12Ab34Cd56-[redacted]"


def test_a_request_that_reached_no_backend_has_no_span_of_one(collector: Collector) -> None:
    made = tracer(collector)
    trace = begun(made)
    trace.end({**RECORD, "cache": "hit", "backend": ""})
    made.close()
    assert [span.name for span in collector.spans] == ["POST /v1/chat/completions"]
    assert attributes(collector.spans[0])["rayplane.cache"] == "hit"


def test_the_ratio_decides_whatever_the_caller_says(collector: Collector) -> None:
    made = tracer(collector, sample_ratio=0.0)
    trace = begun(made, {b"traceparent": f"00-{TRACE}-{PARENT}-01".encode()})
    sent = dict(trace.onward([], "chat", "m", BODY))
    trace.end(RECORD)
    made.close()
    assert collector.spans == []
    # The context still goes on, so that the backend's spans stay with the caller's.
    assert sent[b"traceparent"].startswith(b"00-" + TRACE.encode())
    assert sent[b"traceparent"].endswith(b"-00")


def test_a_caller_can_keep_its_request_out(collector: Collector) -> None:
    made = tracer(collector)
    trace = begun(made, {b"traceparent": f"00-{TRACE}-{PARENT}-00".encode()})
    trace.end(RECORD)
    made.close()
    assert collector.spans == []


def test_a_collector_that_is_away_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S", 0.2)
    entered, leave = threading.Event(), threading.Event()

    class Stuck:
        def export(self, spans: object) -> object:
            entered.set()
            leave.wait(60)
            from opentelemetry.sdk.trace.export import SpanExportResult

            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return True

    made = Tracing(config.Tracing(enabled=True, sample_ratio=1.0), Stuck())  # type: ignore[arg-type]
    begun(made).end(RECORD)
    made.close()
    assert entered.wait(60) and not leave.is_set()
    assert made.begin("POST", "/v1/chat/completions", {}) is None
    made.close()
    leave.set()


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("", None),
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_where_spans_go(given: str, used: str | None) -> None:
    assert tracing._endpoint(given) == used


@pytest.mark.parametrize("wrong", ["collector:4318", "ftp://c", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(wrong: str) -> None:
    with pytest.raises(TracingError, match=r"tracing\.endpoint"):
        Tracing(config.Tracing(enabled=True, endpoint=wrong))


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingError, match=r"opentelemetry\.sdk\.trace is missing.*install opentelemetry-sdk"):
        Tracing(config.Tracing(enabled=True))


def test_nothing_is_imported_unless_tracing_is_on() -> None:
    code = (
        "import sys\n"
        "from serve_app.gateway import config, tracing\n"
        "made = tracing.Tracing(config.Tracing())\n"
        "assert made.begin('POST', '/v1/chat/completions', {}) is None\n"
        "made.close()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, check=True, timeout=60)
    assert done.stdout == b"[]\n"
