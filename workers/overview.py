"""`Watcher`: what a deployment is doing now, for those who look at it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from schema.jobs import JobState
from workers.backlog import SharedBacklog
from workers.queue_marks import living_workers

if TYPE_CHECKING:
    from schema.jobs import JobStatus
    from workers.aio_client import AsyncJobClient

_LOOKED_AT = 200  # newest running jobs, among which the slow ones are looked for
_SILENT_S = 10  # a worker whose counts stay the same for so long does nothing


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """What a worker had done at a moment, and how fast it was until then."""

    at: float  # by the monotonic clock
    ended: int
    tokens: int
    jobs_per_s: float | None = None
    tokens_per_s: float | None = None

    def until(self, now: float, ended: int, tokens: int) -> _Pace:
        """Return the pace now: the former one until the worker tells of something new."""
        passed_s = now - self.at
        still = (ended, tokens) == (self.ended, self.tokens)
        if passed_s <= 0 or (still and passed_s < _SILENT_S):
            return self
        return _Pace(
            at=now,
            ended=ended,
            tokens=tokens,
            # Counts of a worker that was started anew under its name begin at zero.
            jobs_per_s=max(ended - self.ended, 0) / passed_s,
            tokens_per_s=max(tokens - self.tokens, 0) / passed_s,
        )


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """One living worker."""

    name: str
    device: str
    models: tuple[str, ...]
    running: int  # jobs
    slots: int  # jobs it may run at once
    ended: int  # jobs since its start
    jobs_per_s: float | None  # None until two of its words were seen
    tokens_per_s: float | None
    answers: Mapping[str, int]  # its requests by how they were answered: generated, exact, …
    memory_bytes: int
    lag_s: float  # the longest the event loop stood still, of late

    @property
    def reused(self) -> float | None:
        """Share of its requests answered without a generation, 0 to 1; None before the first."""
        return _reused(self.answers)

    def public(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {**asdict(self), "reused": self.reused}


@dataclass(frozen=True, kw_only=True)
class QueueView:
    """Jobs of one model that are not over."""

    model: str
    queued: int
    running: int
    oldest_s: float  # how long the one that waits longest has waited


@dataclass(frozen=True, kw_only=True)
class Overview:
    """One look at a deployment."""

    at: datetime
    workers: tuple[WorkerView, ...]
    queues: tuple[QueueView, ...]
    slow: tuple[JobStatus, ...]  # running, the longest first; of the watcher's namespace
    failed: tuple[JobStatus, ...]  # the newest first; of the watcher's namespace

    @property
    def answers(self) -> Counter[str]:
        """Requests of all workers by how they were answered."""
        return sum((Counter(worker.answers) for worker in self.workers), Counter[str]())

    @property
    def reused(self) -> float | None:
        """Share of all requests answered without a generation, 0 to 1; None before the first."""
        return _reused(self.answers)

    def public(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "at": self.at.isoformat(),
            "reused": self.reused,
            "answers": dict(self.answers),
            "workers": [worker.public() for worker in self.workers],
            "queues": [asdict(queue) for queue in self.queues],
            "slow": [job.model_dump(mode="json") for job in self.slow],
            "failed": [job.model_dump(mode="json") for job in self.failed],
        }


class Watcher:
    """Looks again and again; rates are those between two looks.

    Args:
        client: Connected to the deployment, with a database.
        namespace: Whose slow and failed jobs are shown; None is the client's own.
        jobs: How many of each, at most.
    """

    def __init__(
        self, client: AsyncJobClient, *, namespace: str | None = None, jobs: int = 10
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._jobs = jobs
        self._paces: dict[str, _Pace] = {}

    async def look(self) -> Overview:
        """Look once.

        Raises:
            ConfigurationError: The client has no database.
            ServiceError: Postgres or Redis cannot be used now.
        """
        connection = await self._client.connection()
        states = await living_workers(connection.redis)
        now = time.monotonic()
        workers = tuple(self._worker(name, states[name], now) for name in sorted(states))
        self._paces = {name: kept for name, kept in self._paces.items() if name in states}
        running = await self._of(JobState.RUNNING, _LOOKED_AT)
        failed = await self._of(JobState.FAILED, self._jobs)
        # One that failed between the two questions is in both answers.
        over = {job.job_id for job in failed}
        slow = sorted((job for job in running if job.job_id not in over), key=_began)
        return Overview(
            at=datetime.now(UTC),
            workers=workers,
            queues=await self._queues(workers),
            slow=tuple(slow[: self._jobs]),
            failed=tuple(failed),
        )

    async def _of(self, state: JobState, limit: int) -> list[JobStatus]:
        return await self._client.jobs(namespace=self._namespace, state=state, limit=limit)

    async def _queues(self, workers: tuple[WorkerView, ...]) -> tuple[QueueView, ...]:
        connection = await self._client.connection()
        database = connection.database
        backlog = (
            None if database is None else await SharedBacklog(connection.redis, database).get()
        )
        live = () if backlog is None else backlog.jobs
        oldest = {} if backlog is None else backlog.oldest_s()
        models = {job.model for job in live} | {name for one in workers for name in one.models}
        return tuple(
            QueueView(
                model=model,
                queued=0 if backlog is None else backlog.total("queued", model),
                running=0 if backlog is None else backlog.total("running", model),
                oldest_s=oldest.get(model, 0.0),
            )
            for model in sorted(models)
        )

    def _worker(self, name: str, said: Mapping[str, Any], now: float) -> WorkerView:
        ended = sum((said.get("jobs") or {}).values())
        tokens = int(said.get("tokens") or 0)
        before = self._paces.get(name) or _Pace(at=now, ended=ended, tokens=tokens)
        pace = self._paces[name] = before.until(now, ended, tokens)
        return WorkerView(
            name=name,
            device=str(said.get("device", "")),
            models=tuple(said.get("models") or ()),
            running=int(said.get("running") or 0),
            slots=int(said.get("slots") or 0),
            ended=ended,
            jobs_per_s=pace.jobs_per_s,
            tokens_per_s=pace.tokens_per_s,
            answers=_answers(said.get("engine") or {}),
            memory_bytes=sum((said.get("memory") or {}).values()),
            lag_s=float(said.get("lag_s") or 0.0),
        )


def _began(job: JobStatus) -> datetime:
    return job.started_at or job.created_at


def _answers(engine: Mapping[str, Any]) -> dict[str, int]:
    found = Counter(generated=engine.get("generated") or 0, coalesced=engine.get("coalesced") or 0)
    for kind_and_tier, count in (engine.get("hits") or {}).items():
        found[kind_and_tier.partition("/")[0]] += count
    return dict(found)


def _reused(answers: Mapping[str, int]) -> float | None:
    answered = sum(answers.values())
    return 1 - answers.get("generated", 0) / answered if answered else None
