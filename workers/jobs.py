"""What a submission returns: a handle on the job, for asyncio code and for everybody else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from workers.cursors import START

if TYPE_CHECKING:
    from schema.jobs import JobResult, JobStatus
    from workers.aio_client import AsyncJobClient
    from workers.client import JobClient


@dataclass(frozen=True, kw_only=True)
class JobRef:
    """Where a job and its result are found; all that a handle knows."""

    id: UUID
    namespace: str
    channel: str
    known: bool = False  # an earlier submission under the same key had been accepted
    cursor: str = START  # the channel's end before the job was sent; used without a database


@dataclass(frozen=True, kw_only=True)
class AsyncJob(JobRef):
    """A submitted job, for asyncio code."""

    client: AsyncJobClient = field(repr=False, compare=False)

    async def result(self, timeout_s: float | None = None) -> JobResult:
        """Wait for the outcome; see `AsyncJobClient.result`."""
        return await self.client.result(self, timeout_s)

    async def status(self) -> JobStatus:
        """Return where the job stands; see `AsyncJobClient.status`."""
        return await self.client.status(self)

    async def cancel(self) -> bool:
        """Cancel the job; see `AsyncJobClient.cancel`."""
        return await self.client.cancel(self)


@dataclass(frozen=True, kw_only=True)
class Job(JobRef):
    """A submitted job."""

    client: JobClient = field(repr=False, compare=False)

    def result(self, timeout_s: float | None = None) -> JobResult:
        """Wait for the outcome; see `JobClient.result`."""
        return self.client.result(self, timeout_s)

    def status(self) -> JobStatus:
        """Return where the job stands; see `JobClient.status`."""
        return self.client.status(self)

    def cancel(self) -> bool:
        """Cancel the job; see `JobClient.cancel`."""
        return self.client.cancel(self)
