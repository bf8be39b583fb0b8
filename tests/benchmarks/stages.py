"""Where the time of a job from the cache goes, stage by stage; `cached_jobs` asks for it.

The real parts, one after the other, on groups as large as a message and on the servers of a
deployment whose workers stand still meanwhile. What is measured is processor time: of this process,
which plays client and worker, and of the servers. What a real worker takes beyond the sum is
Celery's handling of a message, the event loop, and what runs now and then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any
from uuid import uuid4

from schema import names, wire
from schema.jobs import JobResult
from tests.benchmarks.deployed import Deployed
from tests.benchmarks.figures import Figure
from workers.app import make_app
from workers.cache.memory import MemoryCache
from workers.connection import Connection
from workers.cursors import START
from workers.engine.protocols import StoredAnswer
from workers.recall import Recall
from workers.settings import Settings
from workers.store.records import ClaimedJob, Outcome
from workers.submission import build_spec

GROUP = 128  # jobs a message, as by the default of `message_jobs`
_MODEL = "nobody"  # its queue is read by no worker
_CHANNEL = "stages"
_PARTS = {"client": "Python", "postgres": "Postgres", "redis": "Valkey"}


async def figures(
    system: Deployed, kind: str, asked: Sequence[dict[str, Any]], jobs: int
) -> list[Figure]:
    """Take jobs through each stage.

    Args:
        system: Its workers have answered each of the requests.
        kind: Goes before the names of the figures.
        asked: Requests, as `AsyncJobClient.submit` takes them; no more than `GROUP`.
        jobs: How many, a multiple of `GROUP`.
    """
    answered = [await (await system.client.submit(**request)).result(60.0) for request in asked]
    with system.workers_stopped():
        connection = await system.client.connection()
        run = _Run(connection, system.settings, asked, jobs, answered)
        run.epoch = await connection.channel.publish([(f"{_CHANNEL}-before", answered[0])])
        found = [await _spent(system, kind, run.row, jobs)]
        await run.learn()
        steps = (run.message, run.read, run.look_up, run.commit, run.publish, run.mark, run.result)
        found += [await _spent(system, kind, step, jobs) for step in steps]
        # What stands in place of `read` while not nearly all jobs are repeats.
        await run.start_anew()
        found.append(await _spent(system, kind, run.claim, jobs))
        await run.clear()
    return found


async def _spent(
    system: Deployed, kind: str, stage: Callable[[], Awaitable[None]], jobs: int
) -> Figure:
    before = system.processor_s()
    await stage()
    after = system.processor_s()
    spent = {name: (after[part] - before[part]) / jobs * 1e6 for part, name in _PARTS.items()}
    return Figure(
        name=f"{kind}.stage.{stage.__name__}_us",
        value=sum(spent.values()),
        unit="µs",
        comparison=", ".join(f"{name} {us:.0f}" for name, us in spent.items()),
    )


class _Run:
    """The stages, in groups; each leaves what the next one needs."""

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        asked: Sequence[dict[str, Any]],
        jobs: int,
        answered: Sequence[JobResult],
    ) -> None:
        self._connection, self._settings = connection, settings
        self._store, self._channel = connection.store("a benchmark"), connection.channel
        self._asked, self._jobs, self._answered = asked, jobs, answered
        self._namespace = answered[0].namespace
        self._memory = _Memory(answered[0])
        self._recall = Recall(self._memory)
        self._claimable: list[list[ClaimedJob]] = []
        self._ended: list[list[Outcome]] = []
        self.epoch: str | None = None
        self._set_rows()

    def _set_rows(self) -> None:
        specs = (
            build_spec(request.get("prompt"), {**request, "prompt": None, "channel": _CHANNEL})
            for request in (self._asked[at % len(self._asked)] for at in range(self._jobs))
        )
        self._rows = [list(islice(specs, GROUP)) for _ in range(self._jobs // GROUP)]
        self._ids = [[spec.id for spec in group] for group in self._rows]

    async def learn(self) -> None:
        """Remember what the requests were answered."""
        jobs = {job.id: job for job in await self._store.claimable(self._ids[0])}
        for job_id, result in zip(self._ids[0], self._answered, strict=False):
            outcome = Outcome(
                job_id=result.job_id,
                token=result.token,
                result=result,
                fingerprint=self._memory.fingerprint,
            )
            self._recall.note(replace(jobs[job_id], id=result.job_id), outcome)

    async def start_anew(self) -> None:
        """Write other rows."""
        self._set_rows()
        await self.row()

    async def clear(self) -> None:
        """Leave no job that waits, and no result."""
        await self._store.cancel(self._namespace, chain.from_iterable(self._ids))
        await self._channel.drop(self._namespace, _CHANNEL)

    async def row(self) -> None:
        for group in self._rows:
            await self._store.admit(group, default_model=_MODEL, sent=True, max_attempts=3)

    async def message(self) -> None:
        space = self._namespace
        route = wire.Route(namespace=space, model=_MODEL, priority=names.DEFAULT_PRIORITY)
        for ids in self._ids:
            message = wire.JobMessage(namespace=space, sent_at=0.0, ids=tuple(ids))
            await self._connection.redis.lpush(route.key, wire.encode(message, route))
        url = self._connection.endpoints.redis_url
        with make_app(self._settings, url, _MODEL).connection_for_read() as broker:
            for _ in self._ids:
                taken = broker.default_channel.basic_get(route.queue)
                wire.decode(taken.headers[names.JOBS_HEADER])
                taken.ack()

    async def read(self) -> None:
        self._claimable = [await self._store.claimable(ids) for ids in self._ids]

    async def look_up(self) -> None:
        for jobs in self._claimable:
            known = self._recall.outcomes(jobs, unclaimed=True)
            self._ended.append([known[job.id] for job in jobs])

    async def commit(self) -> None:
        for group in self._ended:
            if (await self._store.finish(group)).refused:
                msg = "a job could not be ended"
                raise RuntimeError(msg)

    async def publish(self) -> None:
        for group in self._ended:
            await self._channel.publish([(_CHANNEL, end.result) for end in group], ttl_s=600.0)

    async def mark(self) -> None:
        for group in self._ended:
            held = {outcome.job_id: outcome.token for outcome in group}
            await self._store.mark_published(held, epoch=self.epoch)

    async def result(self) -> None:
        cursor, seen = START, 0
        while seen < self._jobs:
            read = await self._channel.read(self._namespace, _CHANNEL, cursor, count=1000)
            cursor, seen = read[-1].cursor, seen + len(read)

    async def claim(self) -> None:
        for ids in self._ids:
            await self._store.claim(ids, owner="a benchmark", lease_s=60.0)


class _Memory:
    """The memory tier with one answer, and what the engine says of it."""

    def __init__(self, result: JobResult) -> None:
        self.fingerprint = uuid4().bytes * 2
        self._metadata = dict(result.metadata)
        self._cache = MemoryCache(entries=10, max_bytes=2**20, ttl_s=600.0)
        self._cache.put(
            StoredAnswer(
                id=uuid4(),
                namespace=result.namespace,
                fingerprint=self.fingerprint,
                engine=b"e",
                model=_MODEL,
                prompt=None,
                completions=(),
            )
        )

    def recall(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        return self._cache.get(namespace, fingerprint)

    def recalled_metadata(self, _answer: StoredAnswer) -> dict[str, Any]:
        return self._metadata
