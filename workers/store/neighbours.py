"""Finding stored prompts near a vector, in one namespace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, bindparam, text

from schema.tables import EMBEDDER
from workers.engine.protocols import Neighbour
from workers.store.answer_json import vector_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from workers.engine.protocols import Vector

#: Vectors up to which a namespace is searched one by one. The graph is filtered after it is
#: walked, so a small tenant among large ones would be missed there; read alone it is found whole.
EXACT_UP_TO = 2_000

# More are read than asked for: an iterative scan stops at the first that fit, which under a filter
# are not quite the nearest, and without a scope a stored prompt has a vector for each of its
# clauses too, so one answer may come several times. Each costs a small tenant of a large table a
# longer walk: ten of them took a third of the time of twenty.
_MORE = {True: 2, False: 4}  # by whether there is a scope
_AT_LEAST = {True: 10, False: 20}

_SIZE = text(
    """
    SELECT count(*) FROM (
        SELECT FROM embeddings
        WHERE namespace = :namespace AND (CAST(:scope AS bytea) IS NULL OR scope = :scope)
        LIMIT :bound
    ) AS counted
    """
)

# The graph's index is for one embedder, so its name is written into the statement: as a parameter
# it could not be proved to fit. Order is restored outside, since an iterative scan gives it nearly.
_APPROXIMATE = text(
    """
    WITH near AS MATERIALIZED (
        SELECT answers.id, answers.prompt,
               CAST(embeddings.vector AS halfvec(384)) <=> CAST(:vector AS halfvec(384)) AS distance
        FROM embeddings JOIN answers ON answers.id = embeddings.answer_id
        WHERE embeddings.embedder = :embedder
          AND embeddings.namespace = :namespace
          AND (CAST(:scope AS bytea) IS NULL OR embeddings.scope = :scope AND embeddings.part = 0)
          AND answers.namespace = :namespace AND answers.prompt IS NOT NULL
          AND answers.tombstoned_at IS NULL
          AND (answers.expires_at IS NULL OR answers.expires_at > now())
        ORDER BY CAST(embeddings.vector AS halfvec(384)) <=> CAST(:vector AS halfvec(384))
        LIMIT :fetch
    )
    SELECT id, prompt, distance FROM near ORDER BY distance
    """
).bindparams(bindparam("embedder", EMBEDDER, Text(), literal_execute=True))

_EXACT = text(
    """
    WITH candidate AS MATERIALIZED (
        SELECT embeddings.answer_id, embeddings.vector
        FROM embeddings
        WHERE embeddings.namespace = :namespace AND embeddings.embedder = :embedder
          AND (CAST(:scope AS bytea) IS NULL OR embeddings.scope = :scope AND embeddings.part = 0)
    )
    SELECT answers.id, answers.prompt,
           candidate.vector <=> CAST(:vector AS halfvec) AS distance
    FROM candidate JOIN answers ON answers.id = candidate.answer_id
    WHERE answers.namespace = :namespace AND answers.prompt IS NOT NULL
      AND answers.tombstoned_at IS NULL
      AND (answers.expires_at IS NULL OR answers.expires_at > now())
    ORDER BY distance
    LIMIT :fetch
    """
)


class Sizes:
    """Remembers which namespaces and scopes are large, so as not to count at every search.

    Args:
        believed_s: Seconds for which a large one is taken to be large.
        small_s: Seconds for which a small one is taken to be small; they grow.
        entries: How many are remembered.
    """

    def __init__(
        self, *, believed_s: float = 300.0, small_s: float = 2.0, entries: int = 10_000
    ) -> None:
        self._believed_s = {True: believed_s, False: small_s}
        self._entries = entries
        self._known: dict[tuple[str, bytes | None], tuple[bool, float]] = {}

    async def large(self, namespace: str, scope: bytes | None, connection: AsyncConnection) -> bool:
        """Whether there are too many vectors to look at each.

        Args:
            namespace: Tenant.
            scope: When given, only vectors of this scope count.
            connection: To count on.

        Returns:
            Whether there are more than `EXACT_UP_TO`.
        """
        key = (namespace, scope)
        now = time.monotonic()
        large, until = self._known.get(key, (False, 0.0))
        if until > now:
            return large
        values = {"namespace": namespace, "scope": scope, "bound": EXACT_UP_TO + 1}
        large = (await connection.scalar(_SIZE, values) or 0) > EXACT_UP_TO
        if len(self._known) >= self._entries:
            self._known.clear()
        self._known[key] = large, now + self._believed_s[large]
        return large


async def nearest(
    *,
    namespace: str,
    embedder: str,
    vector: Vector,
    limit: int,
    scope: bytes | None,
    sizes: Sizes,
    connection: AsyncConnection,
) -> list[Neighbour]:
    """Return live neighbours, nearest first, each answer once.

    Args:
        namespace: Tenant.
        embedder: Name of what made `vector`.
        vector: Shape [dimensions], unit length.
        limit: How many at most.
        scope: When given, only whole prompts of this scope.
        sizes: Remembers which namespaces are large.
        connection: To ask on.

    Returns:
        The neighbours; the similarity is that of the nearest part of each stored prompt.
    """
    asked = vector_text(vector)
    if asked is None or limit < 1:
        return []
    values: dict[str, Any] = {
        "namespace": namespace,
        "scope": scope,
        "vector": asked,
        "fetch": max(limit * _MORE[scope is not None], _AT_LEAST[scope is not None]),
    }
    if embedder != EMBEDDER or not await sizes.large(namespace, scope, connection):
        found = await connection.execute(_EXACT, {**values, "embedder": embedder})
    else:
        found = await connection.execute(_APPROXIMATE, values)
    return _distinct(found.mappings().all(), limit)


def _distinct(rows: Sequence[RowMapping], limit: int) -> list[Neighbour]:
    nearest_part: dict[Any, RowMapping] = {}
    for row in rows:
        nearest_part.setdefault(row["id"], row)
    return [
        Neighbour(answer_id=row["id"], prompt=row["prompt"], similarity=1.0 - row["distance"])
        for row in list(nearest_part.values())[:limit]
    ]
