"""How many jobs wait and run, over all tenants; for those who run the service."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text

from workers.store.part import StorePart

# Each part reads one small index: what is over, however much there is, costs nothing.
_LIVE = text(
    """
    SELECT model, namespace, state, count(*) AS jobs,
           coalesce(extract(epoch FROM now() - min(available_at)
                            FILTER (WHERE state = 'queued' AND available_at <= now())), 0)
               AS oldest_s
    FROM (
        SELECT model, namespace, state, available_at FROM jobs
        WHERE state = 'queued' AND sent_at IS NULL AND NOT held
        UNION ALL
        SELECT model, namespace, state, available_at FROM jobs
        WHERE state = 'queued' AND held
        UNION ALL
        SELECT model, namespace, state, available_at FROM jobs
        WHERE state = 'queued' AND sent_at IS NOT NULL
        UNION ALL
        SELECT model, namespace, state, available_at FROM jobs WHERE state = 'running'
    ) AS live
    GROUP BY model, namespace, state
    """
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveJobs:
    """Jobs of one model, tenant and state."""

    model: str
    namespace: str
    state: str  # queued or running
    jobs: int
    oldest_s: float  # seconds that the oldest one that could run has been waiting


class LiveCounts(StorePart):
    """Counts jobs that are not over."""

    async def live(self) -> list[LiveJobs]:
        """Count the jobs that wait or run.

        Returns:
            A number for each model, tenant and state that has any.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            rows = (await connection.execute(_LIVE)).mappings().all()
        return [LiveJobs(**{**row, "oldest_s": float(row["oldest_s"])}) for row in rows]
