"""Marks that say which worker is generating an answer, so that others may wait for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import text

from workers.store.gathering import Gathering
from workers.store.part import StorePart

if TYPE_CHECKING:
    from sqlalchemy import RowMapping

    from workers.store.database import Database

#: Namespace, fingerprint, owner and seconds to live.
_Mark: TypeAlias = tuple[str, bytes, str, float]

# Two that come at once meet at the key: the second waits for the first, and finds its mark.
_MARK = text(
    """
    INSERT INTO flight_markers (namespace, fingerprint, owner, until)
    SELECT namespace, fingerprint, owner, now() + make_interval(secs => ttl_s)
    FROM unnest(CAST(:namespaces AS text[]), CAST(:fingerprints AS bytea[]),
                CAST(:owners AS text[]), CAST(:ttls_s AS double precision[]))
         AS mark (namespace, fingerprint, owner, ttl_s)
    ORDER BY namespace, fingerprint
    ON CONFLICT (namespace, fingerprint)
    DO UPDATE SET owner = excluded.owner, until = excluded.until
    WHERE flight_markers.until < now() OR flight_markers.owner = excluded.owner
    RETURNING namespace, fingerprint, owner
    """
)

_UNMARK = text(
    """
    WITH gone AS (
        SELECT flight_markers.namespace, flight_markers.fingerprint
        FROM unnest(CAST(:namespaces AS text[]), CAST(:fingerprints AS bytea[]),
                    CAST(:owners AS text[])) AS mark (namespace, fingerprint, owner)
             JOIN flight_markers USING (namespace, fingerprint, owner)
        ORDER BY flight_markers.namespace, flight_markers.fingerprint
        FOR UPDATE OF flight_markers
    )
    DELETE FROM flight_markers USING gone
    WHERE flight_markers.namespace = gone.namespace
      AND flight_markers.fingerprint = gone.fingerprint
    """
)

# One statement sees one moment: where the mark went after the answer was stored, it is there.
_LOOK = text(
    """
    SELECT EXISTS (
               SELECT FROM flight_markers
               WHERE namespace = :namespace AND fingerprint = :fingerprint AND until > now()
           ) AS flying,
           EXISTS (
               SELECT FROM answers
               WHERE namespace = :namespace AND fingerprint = :fingerprint
                 AND tombstoned_at IS NULL AND (expires_at IS NULL OR expires_at > now())
           ) AS stored
    """
)

_FIRST_LOOK_S = 0.02
_MOST_BETWEEN_S = 0.5


class FlightMarks(StorePart):
    """Marks in Postgres, one a request, that end by themselves if their owner dies.

    Args:
        database: Where they live.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._marks = Gathering(self._mark, name="promptmill-marks")
        self._unmarks = Gathering(self._unmark, name="promptmill-unmarks")

    async def mark_flight(
        self, namespace: str, fingerprint: bytes, owner: str, ttl_s: float
    ) -> bool:
        """Say that the caller generates the answer to a request.

        Args:
            namespace: Tenant.
            fingerprint: SHA-256 of the canonical request.
            owner: Name of the caller. Its own mark is renewed.
            ttl_s: Seconds after which the mark no longer counts.

        Returns:
            True when the flight is the caller's, False when another's mark stands.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return bool(await self._marks.get((namespace, fingerprint, owner, ttl_s)))

    async def unmark_flight(self, namespace: str, fingerprint: bytes, owner: str) -> None:
        """Take the caller's own mark away, after the answer was stored or when there is none.

        Args:
            namespace: Tenant.
            fingerprint: SHA-256 of the canonical request.
            owner: As it was marked; another's mark stays.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        await self._unmarks.get((namespace, fingerprint, owner))

    async def _mark(self, marks: Sequence[_Mark]) -> dict[_Mark, bool]:
        # A statement can touch a row once: of several owners that ask at once the first gets it.
        first: dict[tuple[str, bytes], _Mark] = {}
        for mark in marks:
            first.setdefault(mark[:2], mark)
        namespaces, fingerprints, owners, ttls_s = zip(*first.values(), strict=True)
        values = {
            "namespaces": list(namespaces),
            "fingerprints": list(fingerprints),
            "owners": list(owners),
            "ttls_s": list(ttls_s),
        }
        async with self._database.connection() as connection:
            rows = (await connection.execute(_MARK, values)).all()
        marked = {(row.namespace, row.fingerprint): row.owner for row in rows}
        return {mark: marked.get(mark[:2]) == mark[2] for mark in marks}

    async def _unmark(self, marks: Sequence[tuple[str, bytes, str]]) -> dict[Any, Any]:
        namespaces, fingerprints, owners = zip(*marks, strict=True)
        values = {
            "namespaces": list(namespaces),
            "fingerprints": list(fingerprints),
            "owners": list(owners),
        }
        async with self._database.connection() as connection:
            await connection.execute(_UNMARK, values)
        return {}

    async def _flight_lands(self, namespace: str, fingerprint: bytes, timeout_s: float) -> bool:
        """Wait until an answer is stored (True), or nobody works at it or the time is over."""
        loop = asyncio.get_running_loop()
        end, wait_s = loop.time() + timeout_s, _FIRST_LOOK_S
        while True:
            seen = await self._look(namespace, fingerprint)
            if seen["stored"]:
                return True
            left_s = end - loop.time()
            if not seen["flying"] or left_s <= 0:
                return False
            # With jitter, so that those who wait for one flight do not all ask at once.
            await asyncio.sleep(min(left_s, wait_s * random.uniform(0.5, 1)))  # noqa: S311  no secret
            wait_s = min(wait_s * 2, _MOST_BETWEEN_S)

    async def _look(self, namespace: str, fingerprint: bytes) -> RowMapping:
        async with self._database.connection() as connection:
            found = await connection.execute(_LOOK, _key(namespace, fingerprint))
            return found.mappings().one()


def _key(namespace: str, fingerprint: bytes) -> dict[str, str | bytes]:
    return {"namespace": namespace, "fingerprint": fingerprint}
