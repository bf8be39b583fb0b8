"""Waiting for the outcome of a job, with a database and without."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from schema import names
from schema.errors import JobNotFoundError, ResultTimeoutError
from workers.cancellation import heed_cancellation
from workers.cursors import START

if TYPE_CHECKING:
    from schema.jobs import JobResult
    from workers.connection import Connection
    from workers.jobs import JobRef

#: Seconds between two looks at the row by one who waits; a signal comes at once.
LOOK_S = 2.0
_BLOCK_S = 1.0


async def outcome(connection: Connection, job: JobRef, timeout_s: float | None) -> JobResult:
    """Wait until a job is over.

    With a database its row is the truth, and Redis only wakes the waiter; without one the result
    is looked for in the job's channel.

    Args:
        connection: Open resources.
        job: The job.
        timeout_s: Seconds to wait at most; None waits for ever, 0 only looks.

    Returns:
        The result, whatever the job's last state.

    Raises:
        ResultTimeoutError: The job was not over in time; it goes on.
        JobNotFoundError: The database has no such job.
        DatabaseUnavailableError: Postgres cannot be used now.
        BrokerUnavailableError: Redis cannot be used now, and there is no database.
    """
    until = None if timeout_s is None else time.monotonic() + timeout_s
    if connection.ledger is None:
        found = await _from_channel(connection, job, until)
    else:
        found = await _from_row(connection, job, until)
    if found is None:
        raise ResultTimeoutError(await _where_it_stands(connection, job, timeout_s or 0.0))
    return found


async def _from_row(connection: Connection, job: JobRef, until: float | None) -> JobResult | None:
    store = connection.store("waiting for a result")
    # A look first: what is over already needs no subscription.
    if (found := await store.result(job.namespace, job.id)) is not None:
        return found
    if await store.status(job.namespace, job.id) is None:
        raise not_found(job)
    if _left(until, LOOK_S) <= 0:
        return None
    async with connection.signals.watch(names.done_signal(job.namespace, job.id)) as signal:
        # After subscribing, so that an outcome between the two is not missed.
        while (found := await store.result(job.namespace, job.id)) is None:
            heed_cancellation()
            wait_s = _left(until, LOOK_S)
            if wait_s <= 0:
                return None
            try:
                async with asyncio.timeout(wait_s):
                    await signal.wait()
            except TimeoutError:
                continue
            signal.clear()
    return found


async def _from_channel(
    connection: Connection, job: JobRef, until: float | None
) -> JobResult | None:
    cursor = job.cursor or START
    while True:
        heed_cancellation()
        wait_s = _left(until, _BLOCK_S)
        block_s = wait_s if wait_s > 0 else None
        entries = await connection.channel.read(job.namespace, job.channel, cursor, block_s=block_s)
        for entry in entries:
            if entry.result.job_id == job.id:
                return entry.result
        if entries:
            cursor = entries[-1].cursor
        elif wait_s <= 0:
            return None


def _left(until: float | None, at_most: float) -> float:
    return at_most if until is None else min(at_most, until - time.monotonic())


async def _where_it_stands(connection: Connection, job: JobRef, timeout_s: float) -> str:
    text = f"job {job.id} was not over after {timeout_s:g} s"
    if connection.ledger is None:
        return f"{text}; it goes on"
    status = await connection.ledger.status(job.namespace, job.id)
    if status is None:
        raise not_found(job)
    tries = f", attempt {status.attempts}" if status.attempts else ""
    return f"{text}: it is {status.state.value}{tries}; it goes on"


def not_found(job: JobRef) -> JobNotFoundError:
    """Return the error that says so.

    Args:
        job: What was looked for.
    """
    return JobNotFoundError(f"namespace {job.namespace!r} has no job {job.id}")
