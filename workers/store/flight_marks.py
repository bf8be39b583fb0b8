"""Marks that say which worker is generating an answer, so that others may wait for it."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from sqlalchemy import text

from workers.store.part import StorePart

if TYPE_CHECKING:
    from sqlalchemy import RowMapping

# Two that come at once meet at the key: the second waits for the first, and finds its mark.
_MARK = text(
    """
    INSERT INTO flight_markers (namespace, fingerprint, owner, until)
    VALUES (:namespace, :fingerprint, :owner, now() + make_interval(secs => :ttl_s))
    ON CONFLICT (namespace, fingerprint)
    DO UPDATE SET owner = excluded.owner, until = excluded.until
    WHERE flight_markers.until < now() OR flight_markers.owner = excluded.owner
    RETURNING owner
    """
)

_UNMARK = text(
    """
    DELETE FROM flight_markers
    WHERE namespace = :namespace AND fingerprint = :fingerprint AND owner = :owner
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

_PURGE = text(
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
)

_FIRST_LOOK_S = 0.02
_MOST_BETWEEN_S = 0.5


class FlightMarks(StorePart):
    """Marks in Postgres, one a request, that end by themselves if their owner dies."""

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
        values = {**_key(namespace, fingerprint), "owner": owner, "ttl_s": ttl_s}
        async with self._database.connection() as connection:
            return await connection.scalar(_MARK, values) is not None

    async def unmark_flight(self, namespace: str, fingerprint: bytes, owner: str) -> None:
        """Take the caller's own mark away, after the answer was stored or when there is none.

        Args:
            namespace: Tenant.
            fingerprint: SHA-256 of the canonical request.
            owner: As it was marked; another's mark stays.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {**_key(namespace, fingerprint), "owner": owner}
        async with self._database.connection() as connection:
            await connection.execute(_UNMARK, values)

    async def purge_flights(self, *, limit: int = 2_000) -> int:
        """Remove marks whose owners died.

        Args:
            limit: How many at most.

        Returns:
            How many were removed.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            return (await connection.execute(_PURGE, {"limit": limit})).rowcount

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
