"""What a job costs the two servers that all workers share, in processor time and bytes.

Processor time, not the clock: it says how many jobs a second one core of Postgres or Valkey takes,
whatever else the machine does meanwhile. Every statement and command is the real one; a generation
is left out, for it costs these servers nothing. `docs/scale.md` reckons with these figures.
"""

from __future__ import annotations

import asyncio
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from redis.asyncio import Redis
from sqlalchemy import text

from schema import names, wire
from schema.jobs import JobResult, JobState
from schema.tables import EMBEDDER, EMBEDDING_DIMENSIONS
from tests.benchmarks.figures import Figure, alone
from tests.integration.builders import analysis, answer
from workers import AsyncJobClient, Settings, local
from workers.channel import ResultChannel
from workers.connection import open_redis
from workers.engine.protocols import PartVector
from workers.store import schema_upgrade
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import ClaimedJob, Outcome

MODEL = "stand-in"
GROUP = 64  # jobs a message, and outcomes a transaction, as in a busy worker
_TURN = 512
ANSWER = "It scatters the shorter wavelengths of the light most. " * 12  # 660 bytes, 130 tokens


@dataclass
class Bill:
    """Processor seconds by server, and of this process, which plays producer and worker."""

    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def billed(stack: local.LocalStack) -> Iterator[Bill]:
    """Read the servers' processor time before and after."""
    bill, before = Bill(), _clocks(stack)
    yield bill
    after = _clocks(stack)
    bill.seconds = {name: after[name] - before.get(name, 0.0) for name in after}


def _clocks(stack: local.LocalStack) -> dict[str, float]:
    own = resource.getrusage(resource.RUSAGE_SELF)
    found = {"postgres": 0.0, "valkey": 0.0, "python": own.ru_utime + own.ru_stime}
    for server in psutil.Process(stack.supervisor_pid).children():
        name = "valkey" if "valkey" in server.name() else "postgres"
        for process in (server, *server.children(recursive=True)):
            times = process.cpu_times()
            found[name] += times.user + times.system
        # Backends that have ended; their time is their parent's.
        ended = server.cpu_times()
        found[name] += ended.children_user + ended.children_system
    return found


class Played:
    """Does with the servers what a worker does, without an engine."""

    def __init__(self, redis: Redis, store: JobStore, *, new: bool) -> None:
        self._redis, self._store, self._new = redis, store, new
        self._channel = ResultChannel(redis)
        self._random = np.random.default_rng(0)

    async def run(self) -> int:
        """Answer all that waits; return how many."""
        done = 0
        key = names.priority_list(names.queue(MODEL), names.DEFAULT_PRIORITY)
        while (item := await self._redis.rpop(key)) is not None:
            assert isinstance(item, (str, bytes))
            message = wire.decode(json.loads(item)["headers"][names.JOBS_HEADER])
            claim = await self._store.claim(message.ids, owner="played", lease_s=60)
            outcomes = [self._outcome(job) for job in claim.jobs]
            await self._store.finish(outcomes)
            made = [(job.channel, it.result) for job, it in zip(claim.jobs, outcomes, strict=True)]
            await self._channel.publish(made)
            held = {it.job_id: it.token for it in outcomes}
            await self._store.mark_published(held, epoch=None)
            done += len(outcomes)
        return done

    def _outcome(self, job: ClaimedJob) -> Outcome:
        result = JobResult(
            job_id=job.id,
            namespace=job.namespace,
            status=JobState.DONE,
            token=job.token,
            text=ANSWER,
        )
        more: dict[str, Any] = {}
        if self._new:
            prompt = json.dumps(job.request)
            vector = self._random.normal(size=EMBEDDING_DIMENSIONS).astype(np.float32)
            more["answer"] = answer(
                ANSWER,
                prompt=prompt,
                analysis=analysis(prompt),
                scope=b"scope",
                vectors=(
                    PartVector(part=0, vector=vector / np.linalg.norm(vector), embedder=EMBEDDER),
                ),
            )
        return Outcome(job_id=job.id, token=job.token, result=result, **more)


async def measure(stack: local.LocalStack, jobs: int, *, new: bool) -> dict[str, float]:
    """Take so many jobs from submission to publication.

    Args:
        stack: The servers.
        jobs: How many.
        new: Whether each stores an answer, its vector and its analysis; else it was a hit.
    """
    database, redis = Database(stack.database_url), open_redis(stack.redis_url)
    settings = Settings(
        database_url=stack.database_url,
        redis_url=stack.redis_url,
        served_model_name=MODEL,
        namespace_window=jobs,  # no dispatcher runs here
    )
    played = Played(redis, JobStore(database), new=new)
    prompts = [f"{'new' if new else 'known'} question {number}?" for number in range(jobs)]
    before = await _bytes(database)
    async with AsyncJobClient(settings) as client:
        totals: dict[str, float] = {}
        submitted_s = worked_s = 0.0
        for at in range(0, jobs, _TURN):
            with billed(stack) as submitting:
                started = time.perf_counter()
                await client.submit_many(prompts[at : at + _TURN])
                submitted_s += time.perf_counter() - started
            with billed(stack) as working:
                started = time.perf_counter()
                assert await played.run() == min(_TURN, jobs)
                worked_s += time.perf_counter() - started
            for name, seconds in (
                ("postgres", submitting.seconds["postgres"] + working.seconds["postgres"]),
                ("valkey", submitting.seconds["valkey"] + working.seconds["valkey"]),
                ("producer", submitting.seconds["python"]),
            ):
                totals[name] = totals.get(name, 0.0) + seconds
    size = await _bytes(database) - before
    await redis.aclose()
    await database.aclose()
    return {
        "submitted_a_second": jobs / submitted_s,
        "done_a_second": jobs / worked_s,
        **{f"{name}_ms": 1000 * seconds / jobs for name, seconds in totals.items()},
        "postgres_bytes": size / jobs,
    }


async def _bytes(database: Database) -> float:
    async with database.connection() as connection:
        return float(
            await connection.scalar(text("SELECT pg_database_size(current_database())")) or 0
        )


def figures(*, quick: bool) -> Sequence[Figure]:
    """Measure both kinds of job.

    Args:
        quick: A tenth of the jobs.
    """
    jobs = 2_048 if quick else 20_480
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, local.start(Path(folder) / "data") as stack:
        schema_upgrade.upgrade(stack.database_url)
        asyncio.run(measure(stack, GROUP, new=True))  # caches and plans are warm from here on
        for kind in ("known", "new"):
            found[kind] = asyncio.run(measure(stack, jobs, new=kind == "new"))
        stack.close(wait_s=30)
    one = f"{jobs:,} jobs, {GROUP} a message"
    return [
        *(
            Figure(name=f"{kind}.{name}", value=value, unit=unit, comparison=one)
            for kind, values in found.items()
            for name, unit in (
                ("postgres_ms", "ms"),
                ("valkey_ms", "ms"),
                ("producer_ms", "ms"),
                ("submitted_a_second", "1/s"),
                ("done_a_second", "1/s"),
                ("postgres_bytes", "B"),
            )
            for value in (values[name],)
        ),
    ]


if __name__ == "__main__":
    alone(figures, __doc__)
