"""Running a batch file: rows stream in as jobs, answers stream out as lines.

Memory stays constant: at most a window of rows is under way, and a row leaves the window when its
line has been handed to the output.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson

from schema.errors import BrokerUnavailableError, DatabaseUnavailableError, InvalidRequestError
from schema.jobs import JobState
from schema.openai_batch import BadLine, BatchLine, error_line, id_digest, output_line
from workers.batch_input import BatchInput, identity
from workers.batch_output import BatchOutput
from workers.cursors import START
from workers.submission import SubmitDefaults, build_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from schema.jobs import JobResult, JobSpec
    from workers.aio_client import AsyncJobClient
    from workers.batch_output import Redo
    from workers.connection import Connection

_BLOCK_S = 0.5
# With no result for so long, Postgres is asked: what is stored there may never be announced.
_SILENCE_S = 5.0
_ASK_AT_ONCE = 1000
# Seconds for which a server may be away before the run gives up; what is written stays.
_PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch is run."""

    namespace: str | None = None  # tenant; None is the settings' own
    model: str | None = None  # served model; None is each row's own, if served, or the default
    resume: bool = False  # go on with what an earlier run left
    redo: Redo | None = None  # answer rows of a finished run anew: failed or truncated
    max_tokens: int | None = None  # new limit for every row
    ordered: bool = False  # lines in the order of the input
    window: int = 4096  # rows under way at most
    job: dict[str, Any] = field(default_factory=dict)  # further `SubmitOptions` of every row


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
    options: BatchOptions = BatchOptions(),
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
        self._channel = f"batch-{output.batch_id.hex}"
        self._defaults = SubmitDefaults(
            namespace=self._namespace, max_prompt_bytes=client.settings.max_prompt_bytes
        )
        self._room = asyncio.Semaphore(options.window)
        self._under_way: dict[UUID, _Row] = {}
        self._held: dict[int, _Row] = {}  # finished ahead of their turn, by place
        self._places = self._next_place = 0
        self._reading = True
        self._moved = asyncio.Event()  # a row is under way, or no more will be
        kept = output.kept
        self.progress = BatchProgress(
            batch_id=output.batch_id, kept=kept.answered, failed=kept.failed
        )

    async def run(self, source: str) -> BatchProgress:
        await self._open_batch(source)
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
            self.progress.read += 1
            if isinstance(line, BatchLine) and self._is_kept(line):
                continue
            if self._room.locked():
                # What is in hand must be under way before waiting for room that it would make.
                await self._send(group)
            await self._room.acquire()
            row = _Row(place=self._places, job_id=None)
            self._places += 1
            spec = line if isinstance(line, BadLine) else await self._spec(line)
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

    async def _spec(self, line: BatchLine) -> JobSpec | BadLine:
        body = dict(line.body)
        if self._options.max_tokens is not None:
            body.pop("max_completion_tokens", None)
            body["max_tokens"] = self._options.max_tokens
        # The same row under the same batch is the same job, however often it is submitted.
        digest = hashlib.sha256(orjson.dumps([line.url, body], option=orjson.OPT_SORT_KEYS))
        options: dict[str, Any] = {
            **self._options.job,
            "url": line.url,
            "body": body,
            "channel": self._channel,
            "custom_id": line.custom_id,
            "idempotency_key": f"{self._output.batch_id.hex}:{line.number}:{digest.hexdigest()}",
            "model": self._options.model or await self._served(body.get("model")),
        }
        if self._connection.ledger is not None:
            options |= {"batch_id": self._output.batch_id, "row": line.number - 1}
        try:
            return build_spec(None, options, self._defaults)
        except InvalidRequestError as exc:
            return BadLine(
                number=line.number,
                message=f"line {line.number}: {exc}",
                custom_id=line.custom_id,
                param=exc.field,
            )

    async def _served(self, model: object) -> str | None:
        # A model that nobody is known to serve goes to the default's queue, where vLLM answers
        # that it does not exist; in a queue of its own the row would wait for ever.
        if isinstance(model, str) and model in await self._client.served_models():
            return model
        return None

    async def _send(self, group: list[JobSpec]) -> None:
        if not group:
            return
        specs, group[:] = list(group), []
        until = time.monotonic() + _PATIENCE_S
        while True:
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
        cursor = START
        heard = time.monotonic()
        away_since: float | None = None
        while self._reading or self._under_way:
            if not self._under_way:
                self._moved.clear()
                if self._reading and not self._under_way:
                    await self._moved.wait()
                continue
            try:
                found = await self._connection.channel.read(
                    self._namespace, self._channel, cursor, count=512, block_s=_BLOCK_S
                )
                away_since = None
            except BrokerUnavailableError:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > _PATIENCE_S:
                    raise
                found = []
                await asyncio.sleep(1.0)
            for delivery in found:
                cursor = delivery.cursor
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

    async def _open_batch(self, source: str) -> None:
        store = self._connection.ledger
        if store is None:
            return
        if await store.batch(self._namespace, self._output.batch_id) is None:
            await store.create_batch(
                self._namespace,
                batch_id=self._output.batch_id,
                source=source,
                details={"output": self._output.path},
            )

    async def _close_batch(self) -> None:
        store = self._connection.ledger
        if store is not None:
            await store.update_batch(
                self._namespace, self._output.batch_id, status="completed",
                total=self.progress.read, details={"failed": self.progress.failed}, over=True,
            )  # fmt: skip
        # Every result is in the output: the channel has no other reader.
        await self._connection.channel.drop(self._namespace, self._channel)
