"""Batches that nobody waits for: submitted, looked at, and collected later, all from Postgres."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from schema.errors import JobNotFoundError, PromptmillError, ServiceError
from schema.jobs import JobState
from schema.openai_batch import BadLine, BatchLine, error_line, output_line
from workers.batch_input import BatchInput
from workers.batch_order import STRETCH_ROWS, beginning, stretches
from workers.batch_output import BatchOutput
from workers.batch_rows import DEFAULTS, BatchOptions, RowBuilder, open_batch
from workers.cancellation import heed_cancellation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from schema.jobs import JobSpec
    from workers.aio_client import AsyncJobClient
    from workers.store.jobs import JobStore
    from workers.store.records import Batch

_PAGE = 500
_LOOK_S = 0.5
# Lines that could not become jobs are kept with the batch, up to so many.
_MOST_ERRORS = 100_000
_SETTLED = ("completed", "cancelled")


async def submit_batch(
    client: AsyncJobClient, source: str, options: BatchOptions = DEFAULTS
) -> dict[str, Any]:
    """Submit every row of a batch file and return; `collect` fetches the answers later.

    Args:
        client: With a database.
        source: Input of one OpenAI request a line: a file, ``.gz``, ``.zst`` or ``-``.
        options: Namespace, model and job options are heeded.

    Returns:
        The batch as `describe` gives it.

    Raises:
        InvalidFileError: The input cannot be read, or is no file of JSON lines.
        ConfigurationError: This client has no database.
        ServiceError: Postgres cannot be used now.
    """
    connection = await client.connection()
    store = connection.store("submitting a batch to be collected later")
    namespace = options.namespace or client.settings.namespace
    batch_id = uuid4()
    with BatchInput(source) as rows:
        submission = _Submission(client, options, batch_id)
        try:
            async for stretch in stretches(rows, most_rows=STRETCH_ROWS):
                if submission.total == 0:
                    await open_batch(connection, namespace, batch_id, source)
                await submission.add(stretch)
            await submission.send()
        except (PromptmillError, OSError, asyncio.CancelledError):
            if submission.total:
                # Its rows so far run; nobody must take them for the whole file.
                with suppress(ServiceError):
                    await store.update_batch(namespace, batch_id, status="failed", over=True)
            raise
    await store.update_batch(
        namespace, batch_id, total=submission.total, details=submission.details()
    )
    return await describe(client, batch_id, namespace=namespace)


class _Submission:
    """What has been submitted of one batch."""

    def __init__(self, client: AsyncJobClient, options: BatchOptions, batch_id: UUID) -> None:
        self._client = client
        self._options = options
        self._builder = RowBuilder(client, options, batch_id, with_rows=True)
        self._group: list[JobSpec] = []
        self._urls: set[str] = set()
        self._errors: list[dict[str, Any]] = []
        self._refused = 0
        self.total = 0

    async def add(self, stretch: list[BatchLine | BadLine]) -> None:
        self.total += len(stretch)
        if self._options.grouped:
            stretch.sort(key=beginning)
        for line in stretch:
            built = line if isinstance(line, BadLine) else await self._builder.build(line)
            if isinstance(built, BadLine):
                self._refused += 1
                if len(self._errors) < _MOST_ERRORS:
                    self._errors.append(_kept(built))
                continue
            self._urls.add(built.url)
            self._group.append(built.spec)
            if len(self._group) >= self._client.settings.message_jobs:
                await self.send()

    async def send(self) -> None:
        group, self._group = self._group, []
        await self._client.submit_specs(group, wait_s=float("inf"))

    def details(self) -> dict[str, Any]:
        """Return what is kept with the batch."""
        errors = sorted(self._errors, key=lambda error: int(error["line"]))
        endpoint = {"endpoint": next(iter(self._urls))} if len(self._urls) == 1 else {}
        return {"errors": errors, "refused": self._refused, **endpoint}


def _kept(bad: BadLine) -> dict[str, Any]:
    return {
        "line": bad.number,
        "message": bad.message,
        "custom_id": bad.custom_id,
        "param": bad.param,
    }


def _refused(batch: Batch) -> Iterator[BadLine]:
    """Yield the lines that could not become jobs; of very many, the rest as one."""
    kept = list(batch.details.get("errors") or ())
    for wrong in kept:
        yield BadLine(
            number=wrong["line"],
            message=wrong["message"],
            custom_id=wrong["custom_id"],
            param=wrong["param"],
        )
    if (more := int(batch.details.get("refused") or 0) - len(kept)) > 0:
        last = kept[-1]["line"]
        yield BadLine(number=last, message=f"{more} more lines were refused and are not listed")


async def describe(
    client: AsyncJobClient, batch_id: UUID, *, namespace: str | None = None
) -> dict[str, Any]:
    """Return where a batch stands, in the shape of OpenAI's Batch object.

    Args:
        client: With a database.
        batch_id: The batch.
        namespace: Tenant; the settings' own unless told.

    Raises:
        JobNotFoundError: The namespace has no such batch.
        ConfigurationError: This client has no database.
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    store = (await client.connection()).store("the state of a batch")
    tenant = namespace or client.settings.namespace
    batch = await store.batch(tenant, batch_id)
    if batch is None:
        msg = f"namespace {tenant!r} has no batch {batch_id}"
        raise JobNotFoundError(msg)
    counts = await store.counts(tenant, batch_id=batch_id)
    batch = await _settled(store, batch, live=_live(counts))
    return _object(batch, counts)


def _live(counts: dict[JobState, int]) -> int:
    return counts[JobState.QUEUED] + counts[JobState.RUNNING]


async def _settled(store: JobStore, batch: Batch, *, live: int) -> Batch:
    """Return a batch with the end noted that it has come to; rows may be run once more after it."""
    if live and batch.status in _SETTLED:
        return replace(batch, status="in_progress", finished_at=None)
    status = None
    if not live and batch.status == "cancelling":
        status = "cancelled"
    elif not live and batch.total is not None and batch.finished_at is None:
        status = "completed"
    if status is None:
        return batch
    return await store.finish_batch(batch.namespace, batch.id, status=status) or batch


def _object(batch: Batch, counts: dict[JobState, int]) -> dict[str, Any]:
    """Return a batch with the fields of OpenAI's, and what we know beside them."""
    finished = batch.finished_at and int(batch.finished_at.timestamp())
    wrong = [
        {"code": "invalid_line", "line": error["line"], "message": error["message"],
         "param": error["param"]}
        for error in batch.details.get("errors") or ()
    ]  # fmt: skip
    created = int(batch.created_at.timestamp())
    return {
        "id": str(batch.id),
        "object": "batch",
        "completion_window": "unlimited",
        "endpoint": batch.details.get("endpoint"),
        "errors": {"object": "list", "data": wrong} if wrong else None,
        "input_file_id": batch.source,
        "status": batch.status,
        "created_at": created,
        "in_progress_at": created,
        "expires_at": None,
        "finalizing_at": None,
        "completed_at": finished if batch.status == "completed" else None,
        "failed_at": finished if batch.status == "failed" else None,
        "expired_at": None,
        "cancelling_at": batch.details.get("cancelling_at"),
        "cancelled_at": finished if batch.status == "cancelled" else None,
        "output_file_id": None,
        "error_file_id": None,
        "metadata": None,
        "request_counts": _request_counts(batch, counts),
        "states": {state.value: count for state, count in counts.items()},
        "namespace": batch.namespace,
    }


def _request_counts(batch: Batch, counts: dict[JobState, int]) -> dict[str, int]:
    refused = int(batch.details.get("refused") or 0)
    done = counts[JobState.DONE]
    over = sum(counts[state] for state in JobState if state.terminal)
    # Whoever waited for all rows has counted them, those that shared a job with another included.
    known = None if _live(counts) else batch.details.get("counts")
    known = known or {"completed": done, "failed": refused + over - done}
    total = batch.total if batch.total is not None else sum(counts.values()) + refused
    return {"total": total, **known}


def is_over(described: dict[str, Any]) -> bool:
    """Whether every row of a batch is over.

    Args:
        described: As `describe` gives it.
    """
    return described["completed_at"] is not None or described["cancelled_at"] is not None


async def collect(
    client: AsyncJobClient,
    batch_id: UUID,
    target: str,
    *,
    errors: str | None = None,
    namespace: str | None = None,
) -> dict[str, Any]:
    """Write what a batch has answered so far, in the form of `run_batch` and in file order.

    While rows are missing a file is left as ``TARGET.partial``: only what is complete bears the
    name that was asked for.

    Args:
        client: With a database.
        batch_id: The batch.
        target: Output file, or ``-``.
        errors: File for the rows that failed, which `target` then leaves out.
        namespace: Tenant; the settings' own unless told.

    Returns:
        The batch as `describe` gives it, and ``complete``: whether the output has every row.

    Raises:
        JobNotFoundError: The namespace has no such batch.
        InvalidFileError: The output cannot be written.
        ConfigurationError: This client has no database.
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    tenant = namespace or client.settings.namespace
    described = await describe(client, batch_id, namespace=tenant)
    store = (await client.connection()).store("the results of a batch")
    batch = await store.batch(tenant, batch_id)
    refused = deque(_refused(batch) if batch is not None else ())
    written = int(batch.details.get("refused") or 0) if batch is not None else 0
    output = BatchOutput(target, errors=errors)
    try:
        after = -1
        while page := await store.batch_results(tenant, batch_id, after=after, limit=_PAGE):
            after = page[-1][0]
            for row, result in page:
                while refused and refused[0].number <= row + 1:
                    output.write(error_line(refused.popleft()), failed=True)
                output.write(output_line(result), failed=result.status is not JobState.DONE)
            written += len(page)
        for bad in refused:
            output.write(error_line(bad), failed=True)
        output.flush()
        # A file of which the end was never submitted has no total; and of a `batch run`, rows that
        # shared a job with another are in its own output only.
        whole = batch is not None and batch.total == written
        described["complete"] = whole and is_over(described)
        if described["complete"]:
            output.complete()
    finally:
        output.close()
    return described


async def wait_until_over(
    client: AsyncJobClient,
    batch_id: UUID,
    *,
    namespace: str | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Wait until every row of a batch is over, or it is known that this will never be.

    Args:
        client: With a database.
        batch_id: The batch.
        namespace: Tenant; the settings' own unless told.
        on_progress: Told where it stands, each time that is looked up.

    Returns:
        The batch as `describe` gives it.

    Raises:
        JobNotFoundError: The namespace has no such batch.
        ConfigurationError: This client has no database.
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    while True:
        heed_cancellation()
        described = await describe(client, batch_id, namespace=namespace)
        if on_progress is not None:
            on_progress(described)
        if is_over(described) or described["failed_at"] is not None:
            return described
        await asyncio.sleep(_LOOK_S)


async def cancel_batch(
    client: AsyncJobClient, batch_id: UUID, *, namespace: str | None = None
) -> dict[str, Any]:
    """Cancel what waits and stop what runs of a batch; answers that are there stay.

    Args:
        client: With a database.
        batch_id: The batch.
        namespace: Tenant; the settings' own unless told.

    Returns:
        The batch as `describe` gives it.

    Raises:
        JobNotFoundError: The namespace has no such batch.
        ConfigurationError: This client has no database.
        ServiceError: Postgres or Redis cannot be used now.
    """
    tenant = namespace or client.settings.namespace
    described = await describe(client, batch_id, namespace=tenant)
    if described["status"] in _SETTLED:
        return described  # what is over stays what it is
    store = (await client.connection()).store("cancelling a batch")
    if described["cancelling_at"] is None:
        await store.update_batch(tenant, batch_id, details={"cancelling_at": int(time.time())})
    while (done := await store.cancel_batch(tenant, batch_id)).ended or done.running:
        await client.announce(tenant, done.ended, done.running)
    if described["status"] == "failed":
        await store.update_batch(tenant, batch_id, status="failed")  # it never was the whole file
    return await describe(client, batch_id, namespace=tenant)


async def list_batches(
    client: AsyncJobClient, *, namespace: str | None = None, limit: int = 20
) -> list[dict[str, Any]]:
    """Return batches, newest first, as `describe` gives them.

    Args:
        client: With a database.
        namespace: Tenant; the settings' own unless told.
        limit: How many at most.

    Raises:
        ConfigurationError: This client has no database.
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    tenant = namespace or client.settings.namespace
    store = (await client.connection()).store("listing batches")
    found = await store.list_batches(tenant, limit=limit)
    return [await describe(client, batch.id, namespace=tenant) for batch in found]
