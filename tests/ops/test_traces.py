"""One trace from submission to publication, vLLM's span included, at a real OTLP collector."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.ops.test_prometheus import wait_for
from workers.devices import Device, Fleet
from workers.local import LocalStack
from workers.settings import load_settings

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]
PROMPT = "A secret that no span may tell"
#: Submitted twice: the second is answered without a run.
SUBMIT = f"""
from workers import JobClient
with JobClient.from_settings() as client:
    for _ in range(2):
        result = client.submit({PROMPT!r}, sampling={{"max_tokens": 4}}).result(120)
        print(result.job_id)
"""


class Collector:
    """Takes spans over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_words: Any) -> None:
                """Stay silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def traces(self) -> dict[bytes, set[str]]:
        found: dict[bytes, set[str]] = {}
        for span in list(self.spans):
            found.setdefault(span.trace_id, set()).add(span.name)
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_one_trace_from_submission_to_publication(stack: LocalStack, collector: Collector):
    settings = load_settings(data_dir=Path(stack.data_dir), otlp_endpoint=collector.url)
    fleet = Fleet(settings, [Device()])
    fleet.start()
    try:
        fleet.wait_ready(timeout_s=300)
        environment = {
            "PROMPTMILL_DATA_DIR": str(stack.data_dir),
            "PROMPTMILL_OTLP_ENDPOINT": collector.url,
        }
        # A producer of its own: a process has one tracer for all its life.
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
        wait_for(lambda: sum(s.name == "job" for s in collector.spans) >= 2, "no spans of jobs")
        wait_for(lambda: any("llm" in s.name for s in collector.spans), "no span of vLLM's")
    finally:
        fleet.stop()
    ids = done.stdout.split()
    by_job = {
        attribute.value.string_value: span.trace_id
        for span in collector.spans
        for attribute in span.attributes
        if span.name == "job" and attribute.key == "promptmill.job_id"
    }
    assert set(ids) <= set(by_job)
    first, again = (collector.traces()[by_job[job_id]] for job_id in ids)
    assert {"submit", "job", "wait", "answer", "commit", "publish"} <= first
    assert any("llm" in name for name in first)
    assert {"submit", "job"} <= again
    told = json.dumps([str(span) for span in collector.spans])
    assert PROMPT not in told
