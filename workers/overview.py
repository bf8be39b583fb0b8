"""`Watcher`: what a deployment is doing now, for those who look at it."""

from __future__ import annotations

import time
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


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """One living worker."""

    name: str
    device: str
    models: tuple[str, ...]
    running: int  # jobs
    slots: int  # jobs it may run at once
    ended: int  # jobs since its start
    jobs_per_s: float | None  # None until it was seen twice
    tokens_per_s: float | None
    reused: float | None  # share of its requests answered without a generation, 0 to 1
    memory_bytes: int
    lag_s: float  # the longest the event loop stood still, of late


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

    def public(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "at": self.at.isoformat(),
            "workers": [asdict(worker) for worker in self.workers],
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
        self._before: dict[str, tuple[float, int, int]] = {}  # moment, jobs and tokens

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
        self._before = {name: kept for name, kept in self._before.items() if name in states}
        running = await self._of(JobState.RUNNING, _LOOKED_AT)
        return Overview(
            at=datetime.now(UTC),
            workers=workers,
            queues=await self._queues(workers),
            slow=tuple(sorted(running, key=_began)[: self._jobs]),
            failed=tuple(await self._of(JobState.FAILED, self._jobs)),
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
        then, jobs_then, tokens_then = self._before.get(name, (now, ended, tokens))
        # A worker speaks every few seconds: between two words of it there is no news.
        if now == then or (ended, tokens) != (jobs_then, tokens_then) or now - then > 10:
            self._before[name] = (now, ended, tokens)
        passed_s = now - then
        engine = said.get("engine") or {}
        return WorkerView(
            name=name,
            device=str(said.get("device", "")),
            models=tuple(said.get("models") or ()),
            running=int(said.get("running") or 0),
            slots=int(said.get("slots") or 0),
            ended=ended,
            jobs_per_s=(ended - jobs_then) / passed_s if passed_s else None,
            tokens_per_s=(tokens - tokens_then) / passed_s if passed_s else None,
            reused=_reused(engine),
            memory_bytes=sum((said.get("memory") or {}).values()),
            lag_s=float(said.get("lag_s") or 0.0),
        )


def _began(job: JobStatus) -> datetime:
    return job.started_at or job.created_at


def _reused(engine: Mapping[str, Any]) -> float | None:
    reused = sum((engine.get("hits") or {}).values()) + (engine.get("coalesced") or 0)
    answered = reused + (engine.get("generated") or 0)
    return reused / answered if answered else None
