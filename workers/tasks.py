"""The one Celery task: it decodes a message and hands it to the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject

from schema import names, wire
from schema.errors import MessageFormatError
from workers.pool import AsyncTask

if TYPE_CHECKING:
    from celery import Celery

    from workers.pipeline import Pipeline


def register(app: Celery, pipeline: list[Pipeline]) -> None:
    """Register the task on an application.

    Args:
        app: Celery's.
        pipeline: Holds the one pipeline while the worker runs.
    """

    @app.task(
        name=names.RUN_JOBS_TASK, base=AsyncTask, bind=True, acks_late=True, ignore_result=True
    )
    async def run_jobs(self: Any, *_args: Any, **_kwargs: Any) -> None:
        try:
            message = wire.decode(self.request.get(names.JOBS_HEADER))
        except MessageFormatError as exc:
            # To the dead list, bytes and all: another version may be able to read it.
            raise Reject(str(exc), requeue=False) from exc
        priority = (self.request.delivery_info or {}).get("priority")
        await pipeline[0].run_message(
            message, priority=priority if isinstance(priority, int) else names.DEFAULT_PRIORITY
        )
