"""Memory of a batch run against the size of its file: a client process, a worker, many rows.

    python -m tests.benchmarks.batch_memory --json

The engine is a scripted stand-in, so the rate says nothing of vLLM's speed, and the worker's own
memory is measured without a model. Everything else is the real thing: the command ``batch run``,
Postgres, Valkey, Celery, the pipeline. What the worker has taken after the first rows counts as
its start; what comes on top is its growth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.acceptance.faults.scripted_worker import MODEL, SLOWEST
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from tests.benchmarks import chat_rows
from tests.benchmarks.figures import Figure, alone
from workers import local
from workers.store.schema_upgrade import upgrade

MB = 2**20
ROWS, QUICK_ROWS = 1_000_000, 20_000
_WARM_ROWS = 1_000
_LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run took."""

    rows: int
    seconds: float
    client_peak: int  # bytes
    worker_start: int  # bytes, after the first rows
    worker_peak: int  # bytes

    @property
    def worker_growth(self) -> int:
        """Bytes on top of the start."""
        return max(0, self.worker_peak - self.worker_start)


def figures(*, quick: bool) -> list[Figure]:
    """Measure one file.

    Args:
        quick: A small one.
    """
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the servers may run as another user
        stack = local.start(folder / "data")
        try:
            upgrade(stack.database_url)
            found = asyncio.run(measure(folder, stack, rows=QUICK_ROWS if quick else ROWS))
        finally:
            stack.close(wait_s=60)
    told = f"{found.rows:,} rows, scripted engine"
    return [
        Figure(
            name="client_peak_mb",
            value=found.client_peak / MB,
            unit="MB",
            at_most=300,
            comparison=told,
        ),
        Figure(
            name="worker_growth_mb",
            value=found.worker_growth / MB,
            unit="MB",
            at_most=200,
            comparison=f"on top of {found.worker_start / MB:.0f} MB after {_WARM_ROWS:,} rows",
        ),
        Figure(name="rows_per_s", value=found.rows / found.seconds, unit="rows/s", comparison=told),
    ]


async def measure(folder: Path, stack: local.LocalStack, *, rows: int) -> Measured:
    """Run one file of distinct rows.

    Args:
        folder: Takes the files.
        stack: The servers.
        rows: How many.
    """
    environment = {
        "PROMPTMILL_DATABASE_URL": stack.database_url,
        "PROMPTMILL_REDIS_URL": stack.redis_url,
        "PROMPTMILL_SERVED_MODEL_NAME": MODEL,
        SLOWEST: "0.01",
    }
    workers = ScriptedWorkers(count=1, environment=environment, log=folder / "workers.log")
    await workers.start()
    try:
        (pid,) = workers.ready
        worker = psutil.Process(pid)
        await _to_end(_client(folder, environment, rows=_WARM_ROWS, name="warm"), None)
        start = worker.memory_info().rss
        began = time.monotonic()
        client_peak, worker_peak = await _to_end(
            _client(folder, environment, rows=rows, name="rows"), worker
        )
        seconds = time.monotonic() - began
    finally:
        await workers.stop()
    return Measured(
        rows=rows,
        seconds=seconds,
        client_peak=client_peak,
        worker_start=start,
        worker_peak=worker_peak,
    )


def _client(folder: Path, environment: dict[str, str], *, rows: int, name: str) -> psutil.Popen:
    source, target = folder / f"{name}.jsonl", folder / f"{name}.out.jsonl"
    questions = chat_rows.questions()
    with source.open("w") as file:
        for number in range(rows):
            file.write(json.dumps(chat_rows.row(f"{name}-{number}", next(questions))) + "\n")
    words = ("-m", "workers.cli", "batch", "run", str(source), "-o", str(target))
    return psutil.Popen([sys.executable, *words], env={**os.environ, **environment})


async def _to_end(client: psutil.Popen, worker: psutil.Process | None) -> tuple[int, int]:
    """Wait for the client; return the most that both have taken, in bytes."""
    peaks = [0, 0]
    try:
        while client.poll() is None:
            for at, process in enumerate((client, worker)):
                if process is not None:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        peaks[at] = max(peaks[at], process.memory_info().rss)
            await asyncio.sleep(_LOOK_S)
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
    if client.returncode != 0:
        msg = f"the client ended with {client.returncode}"
        raise RuntimeError(msg)
    return peaks[0], peaks[1]


if __name__ == "__main__":
    alone(figures, __doc__)
