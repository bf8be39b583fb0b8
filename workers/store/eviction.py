"""Keeping the store of answers within bounds: what has expired goes, then what is least useful.

The measure of use is that of GreedyDual-Size-Frequency (L. Cherkasova, "Improving WWW proxies
performance with Greedy-Dual-Size-Frequency caching policy", HP Labs 1998): times given x cost of
making it anew / room it takes. The paper ages what was popular once by a clock that moves with each
eviction. Here use halves with each half-life since the answer was last given, as in LRFU (D. Lee et
al., IEEE Transactions on Computers 50, 2001), which needs no state and one statement.
"""

from __future__ import annotations

import math
from typing import Literal

from sqlalchemy import TextClause, text

from workers.store.part import StorePart

#: Seconds in which an answer's worth halves while nobody asks for it.
HALF_LIFE_S = 86_400.0
#: Younger answers are left alone: they had no time to show their use.
GRACE_S = 300.0
_AT_A_TIME = 2_000
_MOST_AT_ONCE = 50_000
# What an answer takes besides its outputs: its row, vectors and entries of indexes.
_ROOM_BESIDES = 2_048

Leftover = Literal["expired", "flights", "analyses"]

# Some at a time, so that no lock is held for long.
_PURGE: dict[Leftover, TextClause] = {
    # Answers past their time.
    "expired": text(
        """
        WITH gone AS (
            SELECT id FROM answers WHERE expires_at <= now() AND tombstoned_at IS NULL
            LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        DELETE FROM answers USING gone WHERE answers.id = gone.id
        """
    ),
    # Marks of flights whose owners died.
    "flights": text(
        """
        WITH gone AS (
            SELECT namespace, fingerprint FROM flight_markers
            WHERE until < now() - interval '1 minute'
            LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        DELETE FROM flight_markers USING gone
        WHERE flight_markers.namespace = gone.namespace
          AND flight_markers.fingerprint = gone.fingerprint
        """
    ),
    # Analyses that no answer has any more. It reads all there are of both.
    "analyses": text(
        """
        WITH gone AS (
            SELECT id FROM nlp_results
            WHERE created_at < now() - interval '1 hour'
              AND NOT EXISTS (SELECT FROM answers WHERE nlp_result_id = nlp_results.id)
            LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        DELETE FROM nlp_results USING gone WHERE nlp_results.id = gone.id
        """
    ),
}

_CROWDED = text(
    """
    SELECT namespace FROM answers WHERE tombstoned_at IS NULL
    GROUP BY namespace HAVING count(*) > :limit ORDER BY namespace
    """
)

_COUNT = text("SELECT count(*) FROM answers WHERE namespace = :namespace AND tombstoned_at IS NULL")

# By the logarithm, so that neither age nor size leaves the range of a number. The size is the
# stored one: nothing that is kept out of line has to be read.
_LEAST_USEFUL = text(
    """
    SELECT id FROM answers
    WHERE namespace = :namespace AND tombstoned_at IS NULL
      AND created_at < now() - make_interval(secs => :grace_s)
    ORDER BY ln(hits + 1) + ln(greatest(engine_s, 0.001))
             - ln(pg_column_size(outputs) + CAST(:room_besides AS double precision))
             - extract(epoch FROM now() - coalesce(last_hit_at, created_at)) * :decay,
             created_at, id
    LIMIT :limit
    """
)

_DELETE = text(
    """
    WITH gone AS (
        SELECT id FROM answers
        WHERE namespace = :namespace AND id = ANY(CAST(:ids AS uuid[])) AND tombstoned_at IS NULL
        FOR UPDATE SKIP LOCKED
    )
    DELETE FROM answers USING gone WHERE answers.id = gone.id
    """
)


class Eviction(StorePart):
    """Removes answers that are over or are worth least."""

    async def crowded(self, limit: int) -> list[str]:
        """Return the namespaces that store more answers than they may.

        Args:
            limit: Answers each may store.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            return list((await connection.scalars(_CROWDED, {"limit": limit})).all())

    async def evict(
        self,
        namespace: str,
        *,
        keep: int,
        grace_s: float = GRACE_S,
        half_life_s: float = HALF_LIFE_S,
    ) -> int:
        """Remove the least useful answers of a namespace; see the module for the measure.

        Answers that were reported stay as a record and do not count.

        Args:
            namespace: Tenant.
            keep: Answers that may stay. More stay while they are younger than `grace_s`, and
                one call removes a bounded number.
            grace_s: Seconds for which a new answer is left alone.
            half_life_s: Seconds in which an answer's worth halves while nobody asks for it.

        Returns:
            How many were removed.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        evicted = 0
        async with self._database.connection() as connection:
            stored = await connection.scalar(_COUNT, {"namespace": namespace})
            excess = min((stored or 0) - keep, _MOST_AT_ONCE)
            if excess <= 0:
                return 0
            values = {
                "namespace": namespace,
                "grace_s": grace_s,
                "decay": math.log(2) / half_life_s,
                "room_besides": _ROOM_BESIDES,
                "limit": excess,
            }
            ids = (await connection.scalars(_LEAST_USEFUL, values)).all()
            # Some at a time, so that no lock is held for long.
            for at in range(0, len(ids), _AT_A_TIME):
                doomed = {"namespace": namespace, "ids": list(ids[at : at + _AT_A_TIME])}
                evicted += (await connection.execute(_DELETE, doomed)).rowcount
        return evicted

    async def purge(self, what: Leftover) -> int:
        """Remove what is over: all there is of one kind.

        Args:
            what: ``expired`` answers, marks of ``flights`` whose owners died, or ``analyses`` that
                no answer has any more.

        Returns:
            How many were removed.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        purged = 0
        async with self._database.connection() as connection:
            while gone := (await connection.execute(_PURGE[what], {"limit": _AT_A_TIME})).rowcount:
                purged += gone
        return purged
