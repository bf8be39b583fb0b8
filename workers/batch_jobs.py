"""Batches that nobody waits for: submitted, looked at, and collected later, all from Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from schema.errors import JobNotFoundError
from schema.jobs import JobState
from schema.openai_batch import BadLine, error_line, output_line
from workers.batch_input import BatchInput
from workers.batch_output import BatchOutput
from workers.batch_rows import DEFAULTS, BatchOptions, RowBuilder, open_batch

if TYPE_CHECKING:
    from schema.jobs import JobSpec
    from workers.aio_client import AsyncJobClient
    from workers.store.records import Batch

_PAGE = 500
# Lines that could not become jobs are kept with the batch, up to so many.
_MOST_ERRORS = 1000


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
    batch_id, total = uuid4(), 0
    errors: list[dict[str, Any]] = []
    group: list[JobSpec] = []
    builder = RowBuilder(client, options, batch_id, with_rows=True)
    with BatchInput(source) as rows:
        opened = False
        async for line in rows:
            if not opened:
                await open_batch(connection, namespace, batch_id, source)
                opened = True
            total += 1
            spec = line if isinstance(line, BadLine) else await builder.build(line)
            if isinstance(spec, BadLine):
                errors.append(
                    {
                        "line": spec.number,
                        "message": spec.message,
                        "custom_id": spec.custom_id,
                        "param": spec.param,
                    }
                )
                continue
            group.append(spec)
            if len(group) >= client.settings.message_jobs:
                await client.submit_specs(group, wait_s=float("inf"))
                group = []
        await client.submit_specs(group, wait_s=float("inf"))
    details = {"errors": errors[:_MOST_ERRORS], "refused": len(errors)}
    await store.update_batch(namespace, batch_id, total=total, details=details)
    return await describe(client, batch_id, namespace=namespace)


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
    live = counts[JobState.QUEUED] + counts[JobState.RUNNING]
    if live == 0 and batch.total is not None and batch.finished_at is None:
        status = "cancelled" if batch.status == "cancelling" else "completed"
        batch = await store.finish_batch(tenant, batch_id, status=status) or batch
    return _object(batch, counts)


def _object(batch: Batch, counts: dict[JobState, int]) -> dict[str, Any]:
    refused = int(batch.details.get("refused") or 0)
    return {
        "id": str(batch.id),
        "object": "batch",
        "status": batch.status,
        "input_file": batch.source,
        "request_counts": {
            "total": batch.total if batch.total is not None else sum(counts.values()) + refused,
            "completed": counts[JobState.DONE],
            "failed": refused
            + sum(counts[state] for state in JobState if state.terminal)
            - counts[JobState.DONE],
        },
        "states": {state.value: count for state, count in counts.items()},
        "created_at": batch.created_at.isoformat(),
        "finished_at": batch.finished_at and batch.finished_at.isoformat(),
    }


async def collect(
    client: AsyncJobClient, batch_id: UUID, target: str, *, namespace: str | None = None
) -> dict[str, Any]:
    """Write what a batch has answered so far, in the form of `run_batch`; the newest rows first.

    Args:
        client: With a database.
        batch_id: The batch.
        target: Output file, or ``-``.
        namespace: Tenant; the settings' own unless told.

    Returns:
        The batch as `describe` gives it: while its status is ``in_progress``, rows are missing.

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
    output = BatchOutput(target)
    try:
        for wrong in (batch.details.get("errors") if batch else None) or ():
            bad = BadLine(
                number=wrong["line"],
                message=wrong["message"],
                custom_id=wrong["custom_id"],
                param=wrong["param"],
            )
            output.write(error_line(bad))
        before: UUID | None = None
        while page := await store.list_jobs(tenant, batch_id=batch_id, limit=_PAGE, before=before):
            before = page[-1].job_id
            found = await store.results(tenant, [job.job_id for job in page])
            for result in found.values():
                output.write(output_line(result))
        output.complete()
    finally:
        output.close()
    return described


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
    await describe(client, batch_id, namespace=tenant)
    store = (await client.connection()).store("cancelling a batch")
    while (done := await store.cancel_batch(tenant, batch_id)).ended or done.running:
        await client.announce(tenant, done.ended, done.running)
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
