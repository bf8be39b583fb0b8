"""What fair release costs a namespace that is alone: jobs a second with and without it.

A backlog of one namespace is submitted while the worker stands still, and then run. With fair
release its jobs wait in Postgres, beyond a window, and the dispatcher lets them into the queue.
Without it, the client's window is as large as the backlog, so all of them go to the queue at once.

The engine is a stand-in that answers from memory, and every prompt is known to it: nothing makes a
job last longer, so what fair release adds shows most here. Behind a model it would not show at all.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text

from tests.benchmarks.deployed import Deployed, deployed, say
from tests.benchmarks.figures import Figure, alone
from workers.aio_client import AsyncJobClient

_PROMPTS = 400
_TURNS = 5
_WAIT_S = 600.0
_LOOK_S = 0.02
_HELD = text("SELECT count(*) FROM jobs WHERE namespace = :namespace AND held")
_OPEN = text("SELECT EXISTS (SELECT FROM jobs WHERE namespace = :namespace AND state = 'queued')")
_LEFT = text("SELECT count(*) FROM jobs WHERE namespace = :namespace AND finished_at IS NULL")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One backlog, from its first job to its last."""

    seconds: float
    processor_us: float  # a job: client, worker and servers together
    held: int  # jobs that waited for their turn


def figures(*, quick: bool) -> Sequence[Figure]:
    """Measure both ways in turns.

    Args:
        quick: A tenth of the jobs, and once each.
    """
    jobs, turns = (2_000, 1) if quick else (20_000, _TURNS)
    return asyncio.run(_measure(jobs, turns))


async def _measure(jobs: int, turns: int) -> list[Figure]:
    async with deployed(stand_in=True) as system:
        at_once = system.settings.model_copy(update={"namespace_window": jobs})
        async with AsyncJobClient(at_once) as direct:
            sides = {"fair": system.client, "direct": direct}
            runs: dict[str, list[Run]] = {side: [] for side in sides}
            await _run(system, direct, "warm", _PROMPTS)
            for turn in range(turns):
                for side, client in sides.items():
                    runs[side].append(await _run(system, client, f"{side}-{turn}", jobs))
    if any(run.held for run in runs["direct"]) or not all(run.held for run in runs["fair"]):
        raise RuntimeError(f"not what was to be compared: {runs}")
    rate = {s: jobs / statistics.median(run.seconds for run in runs[s]) for s in sides}
    spent = {s: statistics.median(run.processor_us for run in runs[s]) for s in sides}
    one = f"{jobs:,} jobs of one namespace, {turns} times each"
    return [
        Figure(name="fair_per_s", value=rate["fair"], unit="jobs/s", comparison=one),
        Figure(name="direct_per_s", value=rate["direct"], unit="jobs/s", comparison=one),
        Figure(name="share_of_direct", value=rate["fair"] / rate["direct"]),
        Figure(name="fair_us_per_job", value=spent["fair"], unit="µs"),
        Figure(name="direct_us_per_job", value=spent["direct"], unit="µs"),
    ]


async def _run(system: Deployed, client: AsyncJobClient, namespace: str, jobs: int) -> Run:
    prompts = [f"known question {number % _PROMPTS}?" for number in range(jobs)]
    # Answers are a namespace's own: each learns them first.
    for job in await client.submit_many(prompts[:_PROMPTS], namespace=namespace):
        await job.result(_WAIT_S)
    database = (await client.connection()).require_database()
    async with database.connection() as connection:
        with system.workers_stopped():
            await client.submit_many(prompts, namespace=namespace)
            held = int(await connection.scalar(_HELD, {"namespace": namespace}) or 0)
            before, started = system.processor_s(), time.perf_counter()
        # Cheap looks first: what is counted is looked for only once nobody waits any more.
        for open_ in (_OPEN, _LEFT):
            async with asyncio.timeout(_WAIT_S):
                while await connection.scalar(open_, {"namespace": namespace}):
                    await asyncio.sleep(_LOOK_S)
        seconds = time.perf_counter() - started
    after = system.processor_s()
    spent = sum(after[part] - before.get(part, 0.0) for part in after) / jobs * 1e6
    say(f"{namespace}: {jobs / seconds:.0f} jobs/s, {held} held, {spent:.0f} µs a job")
    return Run(seconds=seconds, processor_us=spent, held=held)


if __name__ == "__main__":
    alone(figures, __doc__)
