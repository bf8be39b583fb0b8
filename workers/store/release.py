"""Jobs that wait for their namespace's turn: whose there are, and letting some into the queue.

Each function takes the connection on which its caller holds the dispatcher's lock. None reads more
than the heads of an index and the jobs that it lets in, however many wait.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING

from sqlalchemy import text

from workers.store.records import JobAddress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

# From one pair to the next along the index ("loose index scan" in PostgreSQL's wiki): what it costs
# goes with the pairs and not with the rows.
_WAITING = text(
    """
    WITH RECURSIVE head AS (
        (SELECT model, namespace FROM jobs WHERE state = 'queued' AND held
         ORDER BY model, namespace LIMIT 1)
        UNION ALL
        SELECT next.model, next.namespace
        FROM head CROSS JOIN LATERAL (
            SELECT model, namespace FROM jobs
            WHERE state = 'queued' AND held
              AND (model, namespace) > (head.model, head.namespace)
            ORDER BY model, namespace LIMIT 1) AS next
    )
    SELECT model, namespace FROM head
    """
)

_STANDING = text(
    """
    SELECT namespace, count(*) AS jobs FROM (
        SELECT namespace FROM jobs
        WHERE state = 'queued' AND sent_at IS NOT NULL AND model = :model LIMIT :bound
    ) AS standing
    GROUP BY namespace
    """
)

# A row that somebody holds at this moment, to cancel it for one, has its turn next time. The
# planner takes an array for short and a join for long, and would then read the whole table.
_RELEASE = text(
    """
    WITH picked AS (
        SELECT head.id
        FROM unnest(CAST(:namespaces AS text[]), CAST(:counts AS integer[])) AS turn (name, jobs)
             CROSS JOIN LATERAL (
                 SELECT id FROM jobs
                 WHERE state = 'queued' AND held AND model = :model AND namespace = turn.name
                   AND available_at <= now()
                 ORDER BY priority, created_at
                 LIMIT turn.jobs
                 FOR NO KEY UPDATE SKIP LOCKED) AS head
    )
    UPDATE jobs SET held = false, sent_at = now()
    WHERE jobs.id = ANY(ARRAY(SELECT id FROM picked)) AND state = 'queued'
    RETURNING jobs.id, namespace, model, priority, created_at, row
    """
)

_HOLD_AGAIN = text(
    """
    WITH mine AS (
        SELECT id FROM jobs
        WHERE id = ANY(CAST(:ids AS uuid[])) AND state = 'queued'
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs SET held = true, sent_at = NULL FROM mine WHERE jobs.id = mine.id
    """
)


async def waiting(connection: AsyncConnection) -> dict[str, list[str]]:
    """Return the namespaces that have jobs waiting for their turn, by served model.

    Args:
        connection: Each statement on it is a transaction of its own.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for row in (await connection.execute(_WAITING)).all():
        found[row.model].append(row.namespace)
    return dict(found)


async def standing(connection: AsyncConnection, model: str, *, bound: int) -> Counter[str]:
    """Count the jobs of a model that were sent and that nobody has claimed, by namespace.

    Args:
        connection: Each statement on it is a transaction of its own.
        model: Served name.
        bound: Counting stops there.
    """
    rows = (await connection.execute(_STANDING, {"model": model, "bound": bound})).all()
    return Counter({row.namespace: row.jobs for row in rows})


async def release(
    connection: AsyncConnection, model: str, counts: Mapping[str, int]
) -> dict[str, deque[JobAddress]]:
    """Let jobs of a model into the queue: each namespace's most urgent first, then its oldest.

    Args:
        connection: Each statement on it is a transaction of its own.
        model: Served name.
        counts: How many at most, by namespace.

    Returns:
        Those whose messages are to be written now, in order, by namespace.
    """
    values = {"model": model, "namespaces": list(counts), "counts": list(counts.values())}
    rows = (await connection.execute(_RELEASE, values)).all()
    found: dict[str, deque[JobAddress]] = defaultdict(deque)
    for row in sorted(rows, key=lambda row: (row.priority, row.created_at, row.row or 0)):
        found[row.namespace].append(
            JobAddress(id=row.id, namespace=row.namespace, model=row.model, priority=row.priority)
        )
    return found


async def hold_again(connection: AsyncConnection, ids: Iterable[UUID]) -> None:
    """Let jobs wait once more whose messages could not be written.

    Args:
        connection: Each statement on it is a transaction of its own.
        ids: The jobs.
    """
    await connection.execute(_HOLD_AGAIN, {"ids": list(ids)})
