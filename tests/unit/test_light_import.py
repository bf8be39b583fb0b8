"""What a producer pays for importing the client."""

from __future__ import annotations

import resource
import subprocess
import sys

import workers

HEAVY = "vllm torch spacy transformers sentence_transformers numpy celery kombu sqlalchemy alembic"

PROBE = f"""
import sys
from workers import AsyncJobClient, Job, JobClient, load_settings
client = JobClient.from_settings()
found = [name for name in {HEAVY!r}.split() if name in sys.modules]
print(",".join(found) or "light")
"""


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_the_client_brings_nothing_heavy():
    assert run(PROBE) == "light"


def test_importing_the_client_takes_no_time_that_a_person_notices():
    # Processor time, and the best of three: other work on the machine must not decide. The bound
    # is generous; an import of torch or vLLM takes many times as long.
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("from workers import JobClient")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 1.0, used


def test_the_public_names_are_these():
    assert sorted(workers.__all__) == [
        "AsyncJob",
        "AsyncJobClient",
        "Job",
        "JobClient",
        "Settings",
        "load_settings",
    ]
    for name in workers.__all__:
        assert getattr(workers, name).__name__ == name
        assert name in dir(workers)
