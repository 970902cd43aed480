"""What the engine's benchmark reads from both sides, and its table; what it measures is run by hand."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "bench"))

import engine
from gateway import Credentials

METRICS = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
vllm:prompt_tokens_total{engine="0",model_name="m"} 700.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 20.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
rayplane_gateway_tokens_total{model="m",direction="input",source="backend"} 5.0
rayplane_gateway_tokens_total{model="m",direction="output",source="backend"} 7.0
rayplane_gateway_tokens_total{model="m",direction="output",source="cache"} 1.0
rayplane_gateway_requests_total{model="m",operation="chat",status="200"} 9.0
"""


class Server(BaseHTTPRequestHandler):
    """Metrics, and an answer by the body: refused, or what was asked."""

    def do_GET(self) -> None:
        self.answer(200, METRICS)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "top_p" in body:
            self.answer(200, "fine")
        elif "temperature" in body:
            self.answer(400, f"no: {self.server.server_port}")
        else:
            self.answer(400, "no")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_tokens_are_summed_over_engines_and_sources(port: int) -> None:
    assert engine.tokens(port) == {"input": 725, "output": 48}


def test_refusals_are_compared_by_status_and_byte(port: int) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        options = argparse.Namespace(engine=f"http://127.0.0.1:{port}", model="m")
        lines = engine.Engine(options, other.server_port, other.server_port, Credentials("key")).refusals()
        other.shutdown()
    told = {line.split(" | ")[0].strip("| "): line for line in lines[2:]}
    assert told["no messages"] == "| no messages | 400 | 400 | the same |"
    assert "instead of" in told["temperature of -1"]
    assert told["top_p of 7"] == "| top_p of 7 | 200 | 200 | not refused |"
