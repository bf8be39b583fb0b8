"""Running a batch file: rows stream in as jobs, answers stream out as lines.

Memory stays constant: at most a window of rows is under way, and a row leaves the window when its
line has been handed to the output.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from schema.errors import BrokerUnavailableError, DatabaseUnavailableError
from schema.jobs import JobState
from schema.openai_batch import BadLine, BatchLine, error_line, id_digest, output_line
from workers.batch_input import BatchInput, identity
from workers.batch_output import BatchOutput
from workers.batch_rows import DEFAULTS, BatchOptions, RowBuilder, batch_channel, open_batch
from workers.cancellation import heed_cancellation
from workers.cursors import START

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from schema.jobs import JobResult, JobSpec
    from workers.aio_client import AsyncJobClient
    from workers.connection import Connection

__all__ = ["BatchOptions", "BatchProgress", "run_batch"]

_BLOCK_S = 0.5
# With no result for so long, Postgres is asked: what is stored there may never be announced.
_SILENCE_S = 5.0
_ASK_AT_ONCE = 1000
# Seconds for which a server may be away before the run gives up; what is written stays.
_PATIENCE_S = 120.0


@dataclass(kw_only=True)
class BatchProgress:
    """Where a run stands; also its summary at the end."""

    batch_id: UUID
    read: int = 0  # rows of the input seen so far
    kept: int = 0  # answered by an earlier run
    written: int = 0  # lines written by this run
    failed: int = 0  # of those written and kept, with an error
    prompt_tokens: int = 0
    completion_tokens: int = 0
    provenance: Counter[str] = field(default_factory=Counter)  # answers of this run by origin
    read_all: bool = False  # the end of the input was reached, so `read` is the total
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    @property
    def cached(self) -> int:
        """Answers of this run that were not generated for their own row."""
        return sum(self.provenance.values()) - self.provenance["generated"]

    def add(self, result: JobResult) -> None:
        """Count one answer."""
        self.failed += result.status is not JobState.DONE
        if result.status is JobState.DONE:
            self.provenance[str(result.metadata.get("provenance", "generated"))] += 1
        usage = (result.body or {}).get("usage") or {}
        self.prompt_tokens += int(usage.get("prompt_tokens") or 0)
        self.completion_tokens += int(usage.get("completion_tokens") or 0)


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
            target, identity=identity(source), resume=options.resume, redo=options.redo
        )
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
    job_id: UUID | None
    line: bytes | None = None  # what will be written, once known


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
        self._under_way: dict[UUID, _Row] = {}
        self._held: dict[int, _Row] = {}  # finished ahead of their turn, by place
        self._places = self._next_place = 0
        self._reading = True
        self._cursor = START  # in the batch's channel
        self._moved = asyncio.Event()  # a row is under way, or no more will be
        kept = output.kept
        self.progress = BatchProgress(
            batch_id=output.batch_id, kept=kept.answered, failed=kept.failed
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
        async for line in self._rows:
            heed_cancellation()
            self.progress.read += 1
            if isinstance(line, BatchLine) and self._is_kept(line):
                continue
            if self._room.locked():
                # What is in hand must be under way before waiting for room that it would make.
                await self._send(group)
            await self._room.acquire()
            row = _Row(place=self._places, job_id=None)
            self._places += 1
            spec = line if isinstance(line, BadLine) else await self._builder.build(line)
            if isinstance(spec, BadLine):
                self.progress.failed += 1
                self._finish(row, error_line(spec))
                continue
            row.job_id = spec.id
            self._under_way[spec.id] = row
            self._moved.set()
            group.append(spec)
            if len(group) >= self._client.settings.message_jobs or not self._rows.ready:
                await self._send(group)
        await self._send(group)
        self.progress.read_all = True
        self._reading = False
        self._moved.set()

    def _is_kept(self, line: BatchLine) -> bool:
        return id_digest(line.custom_id) in self._output.kept.digests

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
                self._on_progress(self.progress)
            elif time.monotonic() - heard > _SILENCE_S:
                heard = time.monotonic()
                await self._ask(self._under_way)

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
        row = self._under_way.pop(result.job_id, None)
        if row is not None:
            self.progress.add(result)
            self._finish(row, output_line(result))

    def _finish(self, row: _Row, line: bytes) -> None:
        row.line = line
        if not self._options.ordered:
            self._write(row)
        else:
            self._held[row.place] = row
            while (following := self._held.pop(self._next_place, None)) is not None:
                self._next_place += 1
                self._write(following)

    def _write(self, row: _Row) -> None:
        self._output.write(row.line or b"")
        self.progress.written += 1
        self._room.release()

    async def _close_batch(self) -> None:
        store = self._connection.ledger
        if store is not None:
            await store.update_batch(
                self._namespace, self._output.batch_id, status="completed",
                total=self.progress.read, details={"failed": self.progress.failed}, over=True,
            )  # fmt: skip
        # Every result is in the output: the channel has no other reader.
        await self._connection.channel.drop(self._namespace, self._channel)
