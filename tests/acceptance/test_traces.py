"""One trace from submission to publication, vLLM's span included, at an OTLP collector."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.acceptance.conftest import Deployment

if TYPE_CHECKING:
    from tests.otlp_collector import Collector

PROMPT = "A secret that no span may tell"
WAIT_S = 120.0
#: Submitted twice: the second is answered without a run.
SUBMIT = f"""
from workers import JobClient
with JobClient.from_settings() as client:
    for _ in range(2):
        result = client.submit({PROMPT!r}, sampling={{"max_tokens": 4}}).result(120)
        print(result.job_id)
"""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_one_trace_from_submission_to_publication(
    deployment: Deployment, collector: Collector
) -> None:
    # A producer of its own: a process has one tracer for all its life.
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT],
        env={**deployment.environment(), "PROMPTMILL_OTLP_ENDPOINT": collector.url},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    ids = done.stdout.split()

    def by_job() -> dict[str, bytes]:
        return {
            attribute.value.string_value: span.trace_id
            for span in list(collector.spans)
            for attribute in span.attributes
            if span.name == "job" and attribute.key == "promptmill.job_id"
        }

    wait_for(lambda: set(ids) <= set(by_job()), "no spans of the jobs")
    first, again = (by_job()[job_id] for job_id in ids)
    ours = {"submit", "job", "wait", "answer", "commit", "publish"}
    wait_for(lambda: collector.traces()[first] > ours, "no span of vLLM's")
    assert collector.traces()[first] == {*ours, "llm_request"}
    # vLLM was not asked again.
    assert collector.traces()[again] == ours
    assert PROMPT not in json.dumps([str(span) for span in list(collector.spans)])
