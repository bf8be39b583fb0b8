"""`LeaseKeeper`: holds the jobs that this worker runs, by heartbeat, and stops those it must."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from schema.errors import ServiceError
from workers.cancellation import end, heed_cancellation

if TYPE_CHECKING:
    from workers.store.jobs import JobStore
    from workers.store.records import ClaimedJob

_log = structlog.get_logger(__name__)


class Stopped(Enum):
    """Why a running job was stopped from outside."""

    LOST = "lost"  # another worker holds it: nothing of this run counts
    CANCELLED = "cancelled"  # somebody asked for it
    EXPIRED = "expired"  # its deadline passed while it ran


@dataclass
class Holding:
    """A job that this worker runs."""

    job: ClaimedJob
    task: asyncio.Task[object] | None  # None: its outcome is known, and needs no run
    stopped: Stopped | None = None

    def decided(self) -> None:
        """Note that the outcome is known: nothing stops the run any more.

        Once it is committed, a heartbeat finds the job running no longer, and would take the lease
        for lost while the outcome is still to be published.
        """
        self.task = None

    def stop(self, why: Stopped) -> None:
        """Cancel the run.

        Args:
            why: Told to whoever runs it; the first reason counts.
        """
        if self.task is not None and self.stopped is None and not self.task.done():
            self.stopped = why
            self.task.cancel()


class LeaseKeeper:
    """Renews the leases of all jobs in flight, together.

    Args:
        jobs: The job store.
        lease_s: Seconds a lease lasts.
        heartbeat_s: Seconds between two renewals.
    """

    def __init__(self, jobs: JobStore, *, lease_s: float, heartbeat_s: float) -> None:
        self._jobs = jobs
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._held: dict[UUID, Holding] = {}
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> dict[UUID, int]:
        """Fencing token by job, of all jobs in flight."""
        return {job_id: holding.job.token for job_id, holding in self._held.items()}

    def start(self) -> None:
        """Begin to beat; idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._beat(), name="promptmill-leases")

    async def aclose(self) -> None:
        """Stop beating; idempotent. What is still held can be claimed once its lease has ended."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    @contextlib.contextmanager
    def hold(self, job: ClaimedJob) -> Iterator[Holding]:
        """Keep a job's lease while the calling task runs it.

        Args:
            job: Just claimed.

        Yields:
            The holding, which says why the run was cancelled, if it was.
        """
        task = asyncio.current_task()
        if task is None:
            msg = "hold() must be called in a task"
            raise RuntimeError(msg)
        holding = self._held[job.id] = Holding(job=job, task=task)
        timer = None
        if job.left_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(job.left_s, 0.0), holding.stop, Stopped.EXPIRED)
        try:
            yield holding
        finally:
            if timer is not None:
                timer.cancel()
            if self._held.get(job.id) is holding:
                del self._held[job.id]

    @contextlib.contextmanager
    def hold_decided(self, jobs: Iterable[ClaimedJob]) -> Iterator[None]:
        """Keep the leases of jobs whose outcomes are known while they are committed.

        They cannot be stopped any more: an outcome that came first stands.

        Args:
            jobs: Just claimed.
        """
        holdings = {job.id: Holding(job=job, task=None) for job in jobs}
        self._held.update(holdings)
        try:
            yield
        finally:
            for job_id, holding in holdings.items():
                if self._held.get(job_id) is holding:
                    del self._held[job_id]

    def cancel(self, ids: Iterable[UUID], *, namespace: str) -> None:
        """Stop jobs that somebody cancelled.

        Args:
            ids: Those that this worker does not run are passed over.
            namespace: Tenant; others' jobs are left alone.
        """
        for job_id in ids:
            holding = self._held.get(job_id)
            if holding is not None and holding.job.namespace == namespace:
                holding.stop(Stopped.CANCELLED)

    def stop_all(self, why: Stopped) -> None:
        """Stop every run.

        Args:
            why: Told to whoever runs it.
        """
        for holding in tuple(self._held.values()):
            holding.stop(why)

    async def _beat(self) -> None:
        while True:
            heed_cancellation()
            await asyncio.sleep(self._heartbeat_s)
            if not (held := self.held):
                continue
            try:
                renewal = await self._jobs.renew(held, lease_s=self._lease_s)
            except ServiceError as exc:
                # Runs go on: if nobody claims them meanwhile, their outcomes still count.
                _log.warning("leases not renewed", jobs=len(held), reason=str(exc))
                continue
            for ids, why in ((renewal.lost, Stopped.LOST), (renewal.cancelled, Stopped.CANCELLED)):
                for job_id in ids:
                    # It may have ended, or been claimed anew, while the statement ran.
                    holding = self._held.get(job_id)
                    if holding is not None and holding.job.token == held[job_id]:
                        holding.stop(why)
