"""The one Celery task: it decodes a message and hands it to the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject
from celery.worker.request import Request

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

    class JobsRequest(Request):
        """What Celery's ``inspect`` is told of a message in hand."""

        def info(self, safe: bool = False) -> dict[str, Any]:
            said = self.request_dict.get(names.JOBS_HEADER)
            shown = pipeline[0].display.requests(_ids(said)) if pipeline else {}
            return {**super().info(safe=safe), **({"jobs": shown} if shown else {})}

    @app.task(
        name=names.RUN_JOBS_TASK,
        base=AsyncTask,
        bind=True,
        acks_late=True,
        ignore_result=True,
        Request=JobsRequest,
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


def _ids(header: Any) -> list[Any]:
    # As it came: a message that cannot be read is refused when it is run.
    said = header if isinstance(header, dict) else {}
    ids, jobs = (part if isinstance(part := said.get(of), list) else [] for of in ("ids", "jobs"))
    return [*ids, *(job.get("id") for job in jobs if isinstance(job, dict))]
