"""Log lines about one job each, whether it was run or answered with others.

They bear the job's id and its trace's, and names and numbers of what happened: never the text of a
prompt, an answer or an error, which may quote them. What ends well is told at level DEBUG only, so
that a worker which answers thousands a second from its cache pays for a look at the level.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any

import structlog

from schema.jobs import JobState
from workers.tracing import trace_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from schema.jobs import JobError, JobResult
    from workers.store.records import ClaimedJob, Outcome

_log = structlog.get_logger(__name__)
_level = logging.getLogger(__name__)
#: Ends that nobody needs to hear of.
_AS_WISHED = frozenset({JobState.DONE, JobState.CANCELLED})


def ended(job: ClaimedJob, outcome: Outcome) -> None:
    """Say how a job ended, when its outcome was committed."""
    result = outcome.result
    if result.status in _AS_WISHED and not _level.isEnabledFor(logging.DEBUG):
        return
    provenance = outcome.provenance.value if outcome.provenance is not None else None
    _say(result, {**_about(job), "attempt": job.attempts, "provenance": provenance})


def ended_unrun(result: JobResult) -> None:
    """Say of a job that it was over when it was to be claimed."""
    if result.status not in _AS_WISHED or _level.isEnabledFor(logging.DEBUG):
        _say(result, {"job_id": str(result.job_id)})


def lost(job: ClaimedJob) -> None:
    """Say that a job's outcome was dropped."""
    _log.info("outcome dropped: another worker has the job by now", **_about(job))


def put_back(job: ClaimedJob, error: JobError, *, delay_s: float) -> None:
    """Say that an attempt failed and that there will be another."""
    _log.info(
        "attempt failed; the job is tried again",
        attempt=job.attempts,
        of=job.max_attempts,
        error=error.type,
        delay_s=round(delay_s, 3),
        **_about(job),
    )


def unforeseen(job: ClaimedJob, exc: Exception) -> None:
    """Say where a run failed in a way that is nobody's plan; its words are in the job's row."""
    frames = "".join(traceback.format_tb(exc.__traceback__)).rstrip()
    _log.error(
        "job failed in a way nobody foresaw",
        error=type(exc).__name__,
        frames=frames,
        **_about(job),
    )


def _say(result: JobResult, about: Mapping[str, Any]) -> None:
    level = logging.DEBUG if result.status in _AS_WISHED else logging.INFO
    error = result.error.type if result.error is not None else None
    said = {"state": result.status.value, "error": error, "namespace": result.namespace, **about}
    _log.log(level, "job ended", **{key: value for key, value in said.items() if value is not None})


def _about(job: ClaimedJob) -> dict[str, str]:
    trace = trace_id(job.traceparent)
    return {"job_id": str(job.id), **({"trace_id": trace} if trace is not None else {})}
