"""Jobs answered from the cache, through the whole queue.

    python -m tests.benchmarks.cached_jobs --json

One worker with the real engine, the embedded Postgres and Valkey, and a client that submits and
reads the results from their channel, all on this machine. Every job has a row, is claimed,
committed and published; the figures count it when its result has come out of the channel.

On a machine that is busy with other things the rates mean little, so the processor time of every
part is measured too: ``processor_s_per_5000_jobs`` is what 5,000 jobs cost all parts together, so
that a machine of two idle cores has done them in half of that. ``stage`` says what each stage of a
job's way takes of it; see `tests.benchmarks.stages`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from schema import wire
from schema.jobs import JobState
from tests.benchmarks import chat_rows, stages
from tests.benchmarks.deployed import Deployed, deployed, say
from tests.benchmarks.figures import Figure, alone
from tests.benchmarks.stages import GROUP
from workers.cursors import START
from workers.submission import SubmitDefaults, build_spec

KINDS = ("prompt", "chat")
DISTINCT = 64
MAX_TOKENS = 16
LOOKS = 300
_WAIT_S = 600.0


def figures(*, quick: bool) -> list[Figure]:
    """Measure rates, costs and waits.

    Args:
        quick: A quarter of the jobs.
    """
    return asyncio.run(_measure(jobs=5_000 if quick else 20_000))


async def _measure(jobs: int) -> list[Figure]:
    found: list[Figure] = []
    async with deployed(engine_args=("--enforce-eager",)) as system:
        asked_of = {kind: [request(kind, number) for number in range(DISTINCT)] for kind in KINDS}
        for kind, asked in asked_of.items():
            first = await system.client.submit_many(asked, channel=f"warm-{kind}")
            await Reader(system, f"warm-{kind}").read(len(first))
            # Twice: what is learnt at a first hit is no part of what later ones cost.
            again = await system.client.submit_many(asked, channel=f"warm-{kind}-again")
            await Reader(system, f"warm-{kind}-again").read(len(again))
            found += await _rates(system, kind, asked, jobs)
        # Behind all rates: Postgres cleans up behind the rows that the stages remove.
        for kind, asked in asked_of.items():
            found += await stages.figures(system, kind, asked, jobs // 2 // GROUP * GROUP)
        found += await _waits(system)
    return found


def request(kind: str, number: int) -> dict[str, Any]:
    """Return one of the requests that are answered from the cache.

    Args:
        kind: ``prompt`` or ``chat``.
        number: Which.
    """
    questions = chat_rows.questions()
    question = [next(questions) for _ in range(number % DISTINCT + 1)][-1]
    sampling = {"max_tokens": MAX_TOKENS}
    if kind == "prompt":
        return {"prompt": question, "sampling": sampling}
    return {"messages": [{"role": "user", "content": question}], "sampling": sampling}


class Reader:
    """Reads a result channel from its start and counts."""

    def __init__(self, system: Deployed, channel: str) -> None:
        self._system = system
        self._channel = channel
        self._cursor = START
        self.cached = 0

    async def read(self, count: int) -> None:
        """Return when so many results have come.

        Args:
            count: How many.

        Raises:
            RuntimeError: One of them was not done, or they did not come.
        """
        channel = (await self._system.client.connection()).channel
        namespace = self._system.settings.namespace
        seen = 0
        async with asyncio.timeout(_WAIT_S):
            while seen < count:
                entries = await channel.read(
                    namespace, self._channel, self._cursor, count=1000, block_s=1.0
                )
                for entry in entries:
                    if entry.result.status is not JobState.DONE:
                        raise RuntimeError(f"a job failed: {entry.result.error}")
                    self.cached += entry.result.metadata.get("provenance") == "exact"
                seen += len(entries)
                if entries:
                    self._cursor = entries[-1].cursor


class Spent:
    """Seconds of the clock, and of the processor by part, that a block took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.by_part: dict[str, float] = {}

    @contextmanager
    def on(self, system: Deployed) -> Iterator[None]:
        """Measure the block."""
        before, started = system.processor_s(), time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
        after = system.processor_s()
        self.by_part = {part: after[part] - before.get(part, 0.0) for part in after}


async def _rates(
    system: Deployed, kind: str, asked: list[dict[str, Any]], jobs: int
) -> list[Figure]:
    repeated = [asked[number % len(asked)] for number in range(jobs)]

    async def submit(channel: str) -> None:
        await system.client.submit_many(repeated, channel=channel)

    submitting, running, both = Spent(), Spent(), Spent()
    with system.workers_stopped(), submitting.on(system):
        await submit(f"queued-{kind}")
    reader = Reader(system, f"queued-{kind}")
    with running.on(system):
        await reader.read(jobs)
    _check(reader, jobs)
    reader = Reader(system, f"together-{kind}")
    with both.on(system):
        await asyncio.gather(submit(f"together-{kind}"), reader.read(jobs))
    _check(reader, jobs)
    for name, spent in (("submit", submitting), ("run", running), ("both", both)):
        parts = {part: round(s / jobs * 1e6) for part, s in spent.by_part.items()}
        say(f"{kind}, {name}: {jobs / spent.seconds:.0f} jobs/s; microseconds a job: {parts}")
    whole = sum(both.by_part.values()) / jobs * 5_000
    run = sum(running.by_part.values()) / jobs * 5_000
    return [
        Figure(name=f"{kind}.submitted_per_s", value=jobs / submitting.seconds, unit="jobs/s"),
        Figure(
            name=f"{kind}.run_per_s",
            value=jobs / running.seconds,
            unit="jobs/s",
            at_least=5_000,
            comparison="empty tasks: Celery 700, SAQ 1,660, taskiq 1,970, dramatiq 2,930",
        ),
        Figure(name=f"{kind}.submitted_and_run_per_s", value=jobs / both.seconds, unit="jobs/s"),
        Figure(name=f"{kind}.run_processor_s_per_5000_jobs", value=run, unit="s", at_most=2.0),
        Figure(name=f"{kind}.processor_s_per_5000_jobs", value=whole, unit="s", at_most=2.0),
        *(
            Figure(name=f"{kind}.{part}_us_per_job", value=spent / jobs * 1e6, unit="µs")
            for part, spent in both.by_part.items()
        ),
    ]


def _check(reader: Reader, jobs: int) -> None:
    if reader.cached != jobs:
        raise RuntimeError(f"{jobs - reader.cached} of {jobs} jobs were not from the cache")


async def _picked_up_ms(system: Deployed, kind: str) -> float:
    """Return the time from a job's being put on the queue to its being claimed."""
    connection = await system.client.connection()
    store = connection.store("a benchmark")
    asked = request(kind, 1)
    spec = build_spec(asked.pop("prompt", None), asked, SubmitDefaults())
    model = min(await system.client.served_models())
    await store.admit([spec], default_model=model, sent=True, max_attempts=3)
    route = wire.Route(namespace=spec.namespace, model=model, priority=spec.priority)
    pushed = time.time()
    message = wire.JobMessage(namespace=spec.namespace, sent_at=pushed, ids=(spec.id,))
    await connection.redis.lpush(route.key, wire.encode(message, route))
    await system.client.result(spec.id, _WAIT_S)
    status = await system.client.status(spec.id)
    # By Postgres' clock, which is this machine's.
    return (status.started_at.timestamp() - pushed) * 1e3 if status.started_at else float("nan")


async def _waits(system: Deployed) -> list[Figure]:
    """Measure one job at a time on an idle worker."""
    client = system.client

    async def once(kind: str) -> tuple[float, float]:
        started = time.perf_counter()
        job = await client.submit(**request(kind, 1))
        result = await job.result(timeout_s=_WAIT_S)
        took = time.perf_counter() - started
        if result.status is not JobState.DONE:
            raise RuntimeError(f"a job failed: {result.error}")
        return took * 1e3, await _picked_up_ms(system, kind)

    found = []
    for kind in KINDS:
        took, picked_up = zip(*[await once(kind) for _ in range(LOOKS)], strict=True)
        found += [
            Figure(
                name=f"{kind}.round_trip_p50_ms",
                value=statistics.median(took),
                unit="ms",
                at_most=10.0,
            ),
            Figure(
                name=f"{kind}.round_trip_p95_ms",
                value=sorted(took)[int(len(took) * 0.95)],
                unit="ms",
            ),
            Figure(
                name=f"{kind}.pick_up_p50_ms",
                value=statistics.median(picked_up),
                unit="ms",
                at_most=5.0,
                comparison="from being put on the queue to being claimed",
            ),
        ]
    return found


if __name__ == "__main__":
    alone(figures, __doc__)
