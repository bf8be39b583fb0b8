"""Running a batch file: rows stream in as jobs, answers stream out as lines.

Memory stays constant: at most a window of rows is under way, and a row leaves the window when its
line has been handed to the output.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from schema.errors import BrokerUnavailableError, DatabaseUnavailableError
from schema.jobs import JobState
from schema.openai_batch import BadLine, BatchLine, error_line, output_line
from workers.batch_input import BatchInput, identity
from workers.batch_order import asked, beginning, stretches
from workers.batch_output import BatchOutput
from workers.batch_progress import BatchProgress
from workers.batch_rows import DEFAULTS, BatchOptions, RowBuilder, batch_channel, open_batch
from workers.cancellation import heed_cancellation
from workers.cursors import START

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from schema.jobs import JobResult, JobSpec
    from workers.aio_client import AsyncJobClient
    from workers.connection import Connection

__all__ = ["BatchOptions", "BatchProgress", "run_batch"]

# What decides which job a row is; an interrupted run goes on with its own unless told otherwise.
_RULES = ("max_tokens", "schema", "model")
_BLOCK_S = 0.5
# With no result for so long, Postgres is asked: what is stored there may never be announced.
_SILENCE_S = 5.0
_ASK_AT_ONCE = 1000
# Seconds for which a server may be away before the run gives up; what is written stays.
_PATIENCE_S = 120.0


async def run_batch(
    client: AsyncJobClient,
    source: str,
    target: str,
    options: BatchOptions = DEFAULTS,
    *,
    on_progress: Callable[[BatchProgress], None] | None = None,
) -> BatchProgress:
    """Answer every row of a batch file.

    A row that is wrong gets a line that says so, and the others go on. The output bears its name
    only when it is complete; when a run is interrupted, `BatchOptions.resume` goes on where it was.

    Args:
        client: Submits the rows.
        source: Input of one OpenAI request a line: a file, ``.gz``, ``.zst`` or ``-``.
        target: Output, likewise.
        options: How to go about it.
        on_progress: Called after every change, often; it must not take long.

    Returns:
        The summary.

    Raises:
        InvalidFileError: The input cannot be read, or is no file of JSON lines; or the output
            cannot be written. What was written before stays in ``OUT.partial``.
        InvalidRequestError: An option holds a value that cannot be accepted.
        ServiceError: A server stayed away for two minutes. What was written stays.
    """
    with BatchInput(source) as rows:
        output = BatchOutput(
            target,
            errors=options.errors,
            source=source,
            identity=identity(source),
            resume=options.resume,
            redo=options.redo,
            ordered=options.ordered,
            rules={name: getattr(options, name) for name in _RULES},
        )
        options = replace(options, **output.rules)
        try:
            run = _Run(client, await client.connection(), rows, output, options, on_progress)
            summary = await run.run(source)
            output.complete()
        finally:
            output.close()
    return summary


@dataclass(kw_only=True)
class _Row:
    """A row under way."""

    place: int  # among the lines of this run's output, for file order
    custom_id: str | None
    asked: int | None = None  # digest of what the file has it ask; see `workers.batch_order.asked`
    line: bytes | None = None  # what will be written, once known
    failed: bool = False


class _Run:
    def __init__(
        self,
        client: AsyncJobClient,
        connection: Connection,
        rows: BatchInput,
        output: BatchOutput,
        options: BatchOptions,
        on_progress: Callable[[BatchProgress], None] | None,
    ) -> None:
        self._client = client
        self._connection = connection
        self._rows = rows
        self._output = output
        self._options = options
        self._on_progress = on_progress or (lambda _: None)
        self._namespace = options.namespace or client.settings.namespace
        self._channel = batch_channel(output.batch_id)
        self._builder = RowBuilder(
            client, options, output.batch_id, with_rows=connection.ledger is not None
        )
        self._room = asyncio.Semaphore(options.window)
        # The first of a job's rows is its own; the others ask the same.
        self._under_way: dict[UUID, list[_Row]] = {}
        self._jobs: dict[bytes, UUID] = {}  # under way, by what they ask
        self._held: dict[int, _Row] = {}  # finished ahead of their turn, by place
        self._places = self._next_place = 0
        self._reading = True
        self._cursor = START  # in the batch's channel
        self._moved = asyncio.Event()  # a row is under way, or no more will be
        kept = output.kept
        self.progress = BatchProgress(
            batch_id=output.batch_id,
            kept=kept.answered,
            failed=kept.failed,
            changed=kept.changed,
        )

    async def run(self, source: str) -> BatchProgress:
        await open_batch(self._connection, self._namespace, self._output.batch_id, source)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._submit_all(), name="promptmill batch submission")
                tasks.create_task(self._collect(), name="promptmill batch results")
        except ExceptionGroup as group:
            # One failure ends the other task; it is the one that the caller wants to hear of.
            raise group.exceptions[0] from None
        self._output.flush()
        await self._close_batch()
        self._on_progress(self.progress)
        return self.progress

    async def _submit_all(self) -> None:
        group: list[JobSpec] = []
        # No more than the window holds: with `ordered`, its first row may be the last submitted.
        async for stretch in stretches(self._rows, most_rows=self._options.window):
            heed_cancellation()
            placed = [(line, self._places + at) for at, line in enumerate(self._wanted(stretch))]
            self._places += len(placed)
            if self._options.grouped:
                placed.sort(key=lambda item: beginning(item[0]))
            for line, place in placed:
                if self._room.locked():
                    # What is in hand must be under way before waiting for room it would make.
                    await self._send(group)
                await self._room.acquire()
                await self._submit(line, place, group)
                if len(group) >= self._client.settings.message_jobs:
                    await self._send(group)
            if self._rows.is_live:
                await self._send(group)
                self._output.flush()
        await self._send(group)
        self.progress.read_all = True
        self._reading = False
        self._moved.set()

    def _wanted(self, stretch: list[BatchLine | BadLine]) -> list[BatchLine | BadLine]:
        self.progress.read += len(stretch)
        for line in stretch:
            self._output.expect(line)
        kept = self._output.kept
        return [line for line in stretch if isinstance(line, BadLine) or line.custom_id not in kept]

    async def _submit(self, line: BatchLine | BadLine, place: int, group: list[JobSpec]) -> None:
        """Put a row under way, with a job of its own or as a further row of one that asks that."""
        row = _Row(place=place, custom_id=line.custom_id)
        if isinstance(line, BatchLine):
            row.asked = asked(line.url, line.body)
        built = line if isinstance(line, BadLine) else await self._builder.build(line)
        if isinstance(built, BadLine):
            self.progress.failed += 1
            self._finish(row, error_line(built), failed=True)
            return
        if built.shared is not None:
            known = self._jobs.get(built.shared)
            if known is not None and (rows := self._under_way.get(known)) is not None:
                rows.append(row)
                return
            self._jobs[built.shared] = built.spec.id
        self._under_way[built.spec.id] = [row]
        self._moved.set()
        group.append(built.spec)

    async def _send(self, group: list[JobSpec]) -> None:
        if not group:
            return
        specs, group[:] = list(group), []
        until = time.monotonic() + _PATIENCE_S
        while True:
            heed_cancellation()
            try:
                jobs = await self._client.submit_specs(specs, wait_s=float("inf"))
                break
            except (BrokerUnavailableError, DatabaseUnavailableError):
                # Their keys make a second submission harmless.
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(1.0)
        if known := [job.id for job in jobs if job.known]:
            await self._ask(known)

    async def _collect(self) -> None:
        heard = time.monotonic()
        away_since: float | None = None
        while self._reading or self._under_way:
            heed_cancellation()
            if not self._under_way:
                self._moved.clear()
                if self._reading and not self._under_way:
                    await self._moved.wait()
                continue
            try:
                found = await self._connection.channel.read(
                    self._namespace, self._channel, self._cursor, count=512, block_s=_BLOCK_S
                )
                away_since = None
            except BrokerUnavailableError:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > _PATIENCE_S:
                    raise
                found = []
                await asyncio.sleep(1.0)
            for delivery in found:
                self._cursor = delivery.cursor
                self._take(delivery.result)
            if found:
                heard = time.monotonic()
                self._output.flush()  # somebody may be reading along
                await self._trim()
                self._on_progress(self.progress)
            elif time.monotonic() - heard > _SILENCE_S:
                heard = time.monotonic()
                await self._ask(self._under_way)

    async def _trim(self) -> None:
        """Let Redis drop what was read: of a million rows it need not keep the answers."""
        if self._connection.ledger is None:
            return  # an interrupted run finds its answers there, and nowhere else
        with suppress(BrokerUnavailableError):
            await self._connection.channel.trim(self._namespace, self._channel, self._cursor)

    async def _ask(self, ids: Iterable[UUID]) -> None:
        """Take from Postgres the outcomes that are there already."""
        store = self._connection.ledger
        wanted = list(ids)
        if store is None:
            # An earlier run's results may have been passed over before their rows were sent again.
            self._cursor = START
            return
        for at in range(0, len(wanted), _ASK_AT_ONCE):
            try:
                found = await store.results(self._namespace, wanted[at : at + _ASK_AT_ONCE])
            except DatabaseUnavailableError:
                return  # asked again after the next silence
            for result in found.values():
                self._take(result)
        self._on_progress(self.progress)

    def _take(self, result: JobResult) -> None:
        # Repeats, and rows of an earlier run, are not under way.
        rows = self._under_way.pop(result.job_id, ())
        for at, row in enumerate(rows):
            twin = at > 0
            self.progress.add(result, twin=twin)
            line = output_line(result, custom_id=row.custom_id, twin=twin, asked=row.asked)
            self._finish(row, line, failed=result.status is not JobState.DONE)
        if len(self._jobs) > 2 * len(self._under_way) + _ASK_AT_ONCE:
            # Of those that are over the worker's own cache knows.
            self._jobs = {
                digest: job_id for digest, job_id in self._jobs.items() if job_id in self._under_way
            }

    def _finish(self, row: _Row, line: bytes, *, failed: bool) -> None:
        row.line = line
        row.failed = failed
        if not self._options.ordered:
            self._write(row)
        else:
            self._held[row.place] = row
            while (following := self._held.pop(self._next_place, None)) is not None:
                self._next_place += 1
                self._write(following)

    def _write(self, row: _Row) -> None:
        self._output.write(row.line or b"", failed=row.failed)
        self.progress.written += 1
        self._room.release()

    async def _close_batch(self) -> None:
        store = self._connection.ledger
        if store is not None:
            counts = {
                "completed": self.progress.read - self.progress.failed,
                "failed": self.progress.failed,
            }
            await store.update_batch(
                self._namespace, self._output.batch_id, status="completed",
                total=self.progress.read, details={"counts": counts}, over=True,
            )  # fmt: skip
        # Every result is in the output: the channel has no other reader.
        await self._connection.channel.drop(self._namespace, self._channel)
