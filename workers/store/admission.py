"""Writing jobs: each once, however often and by however many it is submitted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import text

from schema.errors import IdempotencyConflictError, InvalidRequestError, QueueFullError
from workers.store.part import StorePart
from workers.store.records import Admission

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

    from schema.jobs import JobSpec
    from workers.store.database import Database

# Sorted by id, so that two producers with the same jobs wait for each other instead of locking
# each other out.
_INSERT = text(
    """
    INSERT INTO jobs (id, namespace, model, channel, priority, request, options, idempotency_key,
                      deadline_at, batch_id, custom_id, row, max_attempts, traceparent, held,
                      sent_at)
    SELECT id, namespace, model, channel, priority, CAST(request AS jsonb),
           CAST(options AS jsonb), idempotency_key, deadline_at, batch_id, custom_id, row,
           max_attempts, CAST(:traceparent AS text), held,
           CASE WHEN :sent AND NOT held THEN now() END
    FROM unnest(
        CAST(:ids AS uuid[]), CAST(:namespaces AS text[]), CAST(:models AS text[]),
        CAST(:channels AS text[]), CAST(:priorities AS smallint[]), CAST(:requests AS text[]),
        CAST(:options AS text[]), CAST(:keys AS text[]), CAST(:deadlines AS timestamptz[]),
        CAST(:batch_ids AS uuid[]), CAST(:custom_ids AS text[]), CAST(:rows AS bigint[]),
        CAST(:max_attempts AS integer[]), CAST(:held AS boolean[])
    ) AS input (id, namespace, model, channel, priority, request, options, idempotency_key,
                deadline_at, batch_id, custom_id, row, max_attempts, held)
    WHERE batch_id IS NULL OR EXISTS (
        SELECT FROM batches
        WHERE batches.id = input.batch_id AND batches.namespace = input.namespace
    )
    ORDER BY id
    ON CONFLICT DO NOTHING
    RETURNING id
    """
)

_COMPARE = text(
    """
    SELECT input.id,
           jobs.id IS NOT NULL AND jobs.request = CAST(input.request AS jsonb) AS same,
           input.batch_id IS NOT NULL AND NOT EXISTS (
               SELECT FROM batches
               WHERE batches.id = input.batch_id AND batches.namespace = input.namespace
           ) AS stray
    FROM unnest(CAST(:ids AS uuid[]), CAST(:namespaces AS text[]), CAST(:requests AS text[]),
                CAST(:batch_ids AS uuid[])) AS input (id, namespace, request, batch_id)
    LEFT JOIN jobs ON jobs.id = input.id AND jobs.namespace = input.namespace
    """
)

# Three scans, each of one small index, that stop at the bound.
_WAITING = text(
    """
    SELECT (SELECT count(*) FROM (
               SELECT FROM jobs WHERE state = 'queued' AND sent_at IS NULL AND NOT held
               LIMIT :bound) AS unsent)
         + (SELECT count(*) FROM (
               SELECT FROM jobs WHERE state = 'queued' AND held LIMIT :bound) AS held)
         + (SELECT count(*) FROM (
               SELECT FROM jobs WHERE state = 'queued' AND sent_at IS NOT NULL LIMIT :bound
           ) AS sent)
    """
)


# Of those who stand, the namespace's own, up to its window; of those who wait, anybody.
_ROOM = text(
    """
    SELECT (SELECT count(*) FROM (
               SELECT FROM jobs
               WHERE state = 'queued' AND sent_at IS NOT NULL
                 AND model = :model AND namespace = :namespace
               LIMIT :window) AS standing) AS standing,
           EXISTS (SELECT FROM jobs WHERE state = 'queued' AND held AND model = :model) AS waited
    """
)


class QueueDepth:
    """An estimate of how many jobs wait, cheap enough to ask at every submission.

    It counts now and then, and adds what was admitted here since. Producers elsewhere are seen at
    the next count, so that the bound may be passed by what they submit in between.

    Args:
        fresh_s: Seconds for which a count is believed, at least.
    """

    _SHARE = 20  # of the time may go into counting: one part in so many

    def __init__(self, *, fresh_s: float = 1.0) -> None:
        self._fresh_s = fresh_s
        self._depth = 0
        self._limit: int | None = None
        self._stale_at = 0.0

    def add(self, jobs: int) -> None:
        """Note jobs that were written.

        Args:
            jobs: How many.
        """
        self._depth += jobs

    async def at_most(self, limit: int, connection: AsyncConnection) -> int:
        """Return the jobs that wait, counted up to a limit.

        Args:
            limit: The bound; counting stops there.
            connection: To count on.

        Returns:
            The estimate, which may be above the limit.
        """
        now = time.monotonic()
        if now >= self._stale_at or limit != self._limit:
            self._depth = await connection.scalar(_WAITING, {"bound": limit}) or 0
            self._limit = limit
            took = time.monotonic() - now
            self._stale_at = now + max(self._fresh_s, took * self._SHARE)
        return self._depth


class QueueRoom:
    """An estimate of how many more jobs of a namespace may go to a queue directly.

    It asks now and then, and subtracts what was sent here since.

    Args:
        fresh_s: Seconds for which an answer is believed, at least.
    """

    _SHARE = 20  # of the time may go into asking: one part in so many
    _REMEMBERED = 1000

    def __init__(self, *, fresh_s: float = 0.25) -> None:
        self._fresh_s = fresh_s
        self._room: dict[tuple[str, str], int] = {}
        self._stale_at: dict[tuple[str, str], float] = {}

    async def take(
        self, namespace: str, model: str, jobs: int, window: int, connection: AsyncConnection
    ) -> int:
        """Take room in a queue.

        Args:
            namespace: Tenant.
            model: Served model; names the queue.
            jobs: How many want in.
            window: How many of the namespace may stand there.
            connection: To ask on.

        Returns:
            How many may go to the queue now. The others wait, for their turn: once somebody
            waits, all that comes later does.
        """
        key, now = (namespace, model), time.monotonic()
        if now >= self._stale_at.get(key, 0.0):
            if len(self._room) >= self._REMEMBERED:
                self._room.clear()
                self._stale_at.clear()
            values = {"namespace": namespace, "model": model, "window": window}
            row = (await connection.execute(_ROOM, values)).one()
            self._room[key] = 0 if row.waited else max(window - row.standing, 0)
            took_s = time.monotonic() - now
            self._stale_at[key] = now + max(self._fresh_s, took_s * self._SHARE)
        taken = min(jobs, self._room[key])
        self._room[key] = self._room[key] - taken if taken == jobs else 0
        return taken


class Admissions(StorePart):
    """Writes jobs.

    Args:
        database: Where the jobs live.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._depth = QueueDepth()
        self._room = QueueRoom()

    async def admit(
        self,
        specs: Sequence[JobSpec],
        *,
        default_model: str,
        sent: bool,
        max_attempts: int,
        queue_limit: int | None = None,
        windows: Mapping[str, int] | None = None,
        traceparent: str | None = None,
        on_refusal: Literal["raise", "report"] = "raise",
    ) -> Admission:
        """Write jobs, each once: a job that is there already stays as it is.

        A job with an idempotency key must carry the id that `schema.names.job_id_for` gives.

        Args:
            specs: The jobs. The same id may come twice.
            default_model: Served model of jobs that name none.
            sent: Whether a queue message is there, or follows at once. A row whose message then
                does not come is found by `Recovery` when older messages have been read.
            max_attempts: Attempts of jobs that name no number.
            queue_limit: Jobs that may wait; None is no bound. It holds within what others submit
                in about a second.
            windows: Jobs of one namespace that may stand in each model's queue; what is beyond
                waits for its turn, without a message. None lets all of them in.
            traceparent: W3C trace context of the submission.
            on_refusal: ``raise`` writes nothing when one job cannot be written; ``report`` writes
                the others and names it.

        Returns:
            Which jobs are new, which were known, and which were refused.

        Raises:
            QueueFullError: The bound is reached; nothing was written.
            IdempotencyConflictError: An id or key is taken by another request; nothing was
                written. The message does not say whose.
            InvalidRequestError: A job names a batch that its namespace does not have.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        unique, refused = _distinct(specs)
        if refused and on_refusal == "raise":
            raise _refusal(*next(iter(refused.items())))
        if not unique:
            return Admission(inserted=frozenset(), known=frozenset(), refused=refused)
        values = _columns(unique, default_model=default_model, max_attempts=max_attempts)
        values |= {"sent": sent, "traceparent": traceparent}
        # A job alone is one statement: there is nothing to undo, so nothing to begin and to commit.
        alone = len(unique) == 1
        lend = self._database.connection if alone else self._database.transaction
        async with lend() as connection:
            if queue_limit is not None:
                await self._check_room(unique, values, queue_limit, connection)
            if windows is not None:
                values["held"] = await self._without_room(values, windows, connection)
            inserted = frozenset((await connection.scalars(_INSERT, values)).all())
            known, more = await _already_there(unique, values, inserted, connection)
            refused |= more
            if refused and on_refusal == "raise":
                raise _refusal(*next(iter(refused.items())))
        self._depth.add(len(inserted))
        held = {
            job_id for job_id, waits in zip(values["ids"], values["held"], strict=True) if waits
        }
        return Admission(
            inserted=inserted, known=known, refused=refused, held=inserted & frozenset(held)
        )

    async def _without_room(
        self, values: dict[str, Any], windows: Mapping[str, int], connection: AsyncConnection
    ) -> list[bool]:
        places: dict[tuple[str, str], list[int]] = {}
        for at, place in enumerate(zip(values["namespaces"], values["models"], strict=True)):
            places.setdefault(place, []).append(at)
        held = [False] * len(values["ids"])
        for (namespace, model), rows in places.items():
            window = windows.get(model)
            if window is None:
                continue
            room = await self._room.take(namespace, model, len(rows), window, connection)
            for at in rows[room:]:
                held[at] = True
        return held

    async def _check_room(
        self,
        specs: Sequence[JobSpec],
        values: dict[str, Any],
        limit: int,
        connection: AsyncConnection,
    ) -> None:
        depth = await self._depth.at_most(limit, connection)
        if depth + len(specs) <= limit:
            return
        known, _ = await _already_there(specs, values, frozenset(), connection)
        if depth + len(specs) - len(known) > limit and len(known) < len(specs):
            msg = (
                f"about {depth} jobs wait and {limit} may; {len(specs) - len(known)} more do not "
                "fit. Submit again later, or fewer at a time"
            )
            raise QueueFullError(msg)


def _distinct(specs: Sequence[JobSpec]) -> tuple[list[JobSpec], dict[UUID, str]]:
    """Drop repeats of an id; repeats that ask for something else are refused."""
    first: dict[UUID, JobSpec] = {}
    refused: dict[UUID, str] = {}
    for spec in specs:
        other = first.setdefault(spec.id, spec)
        if other is not spec and (other.request, other.namespace) != (spec.request, spec.namespace):
            refused[spec.id] = _TAKEN
    return [spec for spec in first.values() if spec.id not in refused], refused


_TAKEN = "its id or idempotency key is taken by a different request"
_STRAY = "its namespace has no such batch"


def _refusal(job_id: UUID, reason: str) -> IdempotencyConflictError | InvalidRequestError:
    msg = f"job {job_id} was not submitted: {reason}"
    if reason == _STRAY:
        return InvalidRequestError(msg, field="batch_id")
    return IdempotencyConflictError(msg)


async def _already_there(
    specs: Sequence[JobSpec],
    values: dict[str, Any],
    inserted: frozenset[UUID],
    connection: AsyncConnection,
) -> tuple[frozenset[UUID], dict[UUID, str]]:
    """Tell those that were there already from those that cannot be written."""
    if len(inserted) == len(specs):
        return frozenset(), {}
    rest = [at for at, spec in enumerate(specs) if spec.id not in inserted]
    picked = {
        name: [values[name][at] for at in rest]
        for name in ("ids", "namespaces", "requests", "batch_ids")
    }
    rows = (await connection.execute(_COMPARE, picked)).all()
    known = frozenset(row.id for row in rows if row.same)
    refused = {row.id: _STRAY if row.stray else _TAKEN for row in rows if not row.same}
    return known, refused


def _columns(specs: Sequence[JobSpec], *, default_model: str, max_attempts: int) -> dict[str, Any]:
    return {
        "ids": [spec.id for spec in specs],
        "namespaces": [spec.namespace for spec in specs],
        "models": [spec.model or default_model for spec in specs],
        "channels": [spec.channel for spec in specs],
        "priorities": [spec.priority for spec in specs],
        "requests": [spec.request.model_dump_json() for spec in specs],
        "options": [spec.options.model_dump_json(exclude_defaults=True) for spec in specs],
        "keys": [spec.idempotency_key for spec in specs],
        "deadlines": [spec.deadline for spec in specs],
        "batch_ids": [spec.batch_id for spec in specs],
        "custom_ids": [spec.custom_id for spec in specs],
        "rows": [spec.row for spec in specs],
        "max_attempts": [spec.options.max_attempts or max_attempts for spec in specs],
        "held": [False] * len(specs),
    }
