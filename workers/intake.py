"""`Intake`: rows for jobs that came in full, and a word to the senders of those that get none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog

from schema.errors import CallerError, IdempotencyConflictError, InvalidRequestError
from schema.jobs import JobError, JobResult, JobState
from workers.store.records import Delivery

if TYPE_CHECKING:
    from schema.jobs import JobSpec
    from schema.wire import JobMessage, RefusedJob
    from workers.patience import Patience
    from workers.store.jobs import JobStore

_log = structlog.get_logger(__name__)


class Intake:
    """Writes the jobs of messages.

    Args:
        jobs: The job store.
        publish: Puts outcomes on their result channels.
        patience: Waits for Postgres.
        model: Of jobs that name none.
        max_attempts: Of jobs that state none.
    """

    def __init__(
        self,
        jobs: JobStore,
        *,
        publish: Callable[[Sequence[Delivery]], Awaitable[object]],
        patience: Patience,
        model: str,
        max_attempts: int,
    ) -> None:
        self._jobs = jobs
        self._publish = publish
        self._patience = patience
        self._model = model
        self._max_attempts = max_attempts

    async def admit(self, message: JobMessage) -> list[UUID]:
        """Write rows for jobs that came in full, so that they are treated like all others.

        Args:
            message: Decoded.

        Returns:
            Those that have a row now.
        """
        for refusal in message.refused:
            await self._refuse(refusal, message.namespace)
        if not message.jobs:
            return []
        return await self._patience.until_done(
            "write jobs", lambda: self._admit_specs(message.jobs, message.traceparent)
        )

    async def _admit_specs(self, specs: Sequence[JobSpec], traceparent: str | None) -> list[UUID]:
        try:
            admission = await self._jobs.admit(
                specs,
                default_model=self._model,
                sent=True,
                max_attempts=self._max_attempts,
                traceparent=traceparent,
            )
        except CallerError as exc:
            if len(specs) == 1:
                return await self._refuse_spec(specs[0], exc)
            # One of them cannot be written: find it, and let the others in.
            admitted = []
            for spec in specs:
                admitted += await self._admit_specs([spec], traceparent)
            return admitted
        return sorted({*admission.inserted, *admission.known})

    async def _refuse_spec(self, spec: JobSpec, error: CallerError) -> list[UUID]:
        if isinstance(error, IdempotencyConflictError):
            # The first job under the key goes on; this one must not speak in its name.
            _log.warning("job refused", job_id=str(spec.id), reason=str(error))
            return []
        refusal_of = error if isinstance(error, InvalidRequestError) else None
        await self._publish_unwritten(spec.id, spec.namespace, spec.channel, str(error), refusal_of)
        return []

    async def _refuse(self, refusal: RefusedJob, namespace: str) -> None:
        await self._publish_unwritten(
            refusal.id or uuid4(), namespace, refusal.channel, str(refusal.error), refusal.error
        )

    async def _publish_unwritten(
        self,
        job_id: UUID,
        namespace: str,
        channel: str,
        message: str,
        error: InvalidRequestError | None,
    ) -> None:
        """Tell the sender of a job that could not be written; it has no row, so only once."""
        result = JobResult(
            job_id=job_id,
            namespace=namespace,
            status=JobState.FAILED,
            token=0,
            error=JobError(
                type="InvalidRequestError",
                message=message,
                field=error.field if error else None,
                value=error.value if error else None,
                status_code=400,
            ),
            finished_at=datetime.now(UTC),
        )
        await self._publish([Delivery(channel=channel, result=result)])
