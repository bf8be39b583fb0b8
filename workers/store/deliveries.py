"""Outcomes as they are published, read from the rows of their jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schema.jobs import JobError, JobResult
from workers.store import stored_json
from workers.store.records import Delivery

if TYPE_CHECKING:
    from sqlalchemy import RowMapping


def delivery(row: RowMapping) -> Delivery:
    """Return the outcome of a job that is over, equal at every reading.

    Args:
        row: id, namespace, channel, options, state, token, custom_id, batch_id, finished_at, error
            and result.

    Returns:
        The result and where it is published.
    """
    return Delivery(
        channel=row["channel"], result=result(row), stream=bool(row["options"].get("stream"))
    )


def result(row: RowMapping) -> JobResult:
    """Return the result of a job that is over.

    A job that ended without having been run has none stored; what its row says is its result.

    Args:
        row: As for `delivery`.

    Returns:
        The result as delivered.
    """
    stored: dict[str, Any] | None = stored_json.load(row["result"])
    if stored is not None:
        return JobResult.model_validate(stored)
    return JobResult(
        job_id=row["id"],
        namespace=row["namespace"],
        status=row["state"],
        token=row["token"],
        custom_id=row["custom_id"],
        batch_id=row["batch_id"],
        error=job_error(row["error"]),
        finished_at=row["finished_at"],
    )


def job_error(value: Any) -> JobError | None:
    """Read the column `error`.

    Args:
        value: As the driver read it.

    Returns:
        The error, or None.
    """
    stored = stored_json.load(value)
    return None if stored is None else JobError.model_validate(stored)
