"""Finding stored prompts near vectors, each in one namespace."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, bindparam, text

from schema.tables import EMBEDDER
from workers.engine.protocols import Neighbour
from workers.store.answer_json import vector_text
from workers.store.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from workers.engine.protocols import Vector
    from workers.store.database import Database

#: Vectors up to which a namespace is searched one by one. The graph is filtered after it is
#: walked, so a small tenant among large ones would be missed there; read alone it is found whole.
EXACT_UP_TO = 2_000

# More are read than asked for: an iterative scan stops at the first that fit, which under a filter
# are not quite the nearest, and without a scope a stored prompt has a vector for each of its
# clauses too, so one answer may come several times. Each costs a small tenant of a large table a
# longer walk: ten of them took a third of the time of twenty.
_MORE = {True: 2, False: 4}  # by whether there is a scope
_AT_LEAST = {True: 10, False: 20}

# How many candidates a search keeps (`hnsw.ef_search`): the more vectors the graph has, the more it
# takes to find the nearest. Among 100,000 real ones 100 took a fifth longer than 64 and found the
# same; in the largest namespace of a million made-up ones 64 found 0.80 of them in 2.5 ms, 100 0.89
# in 3.0, and 160 0.94 in 4.1.
_WIDTH, _WIDTH_FOR = 64, 100_000

#: Look-ups in one statement, at most: whoever comes next waits for all of them.
_TOGETHER = 16

_SIZE = text(
    """
    SELECT count(*) FROM (
        SELECT FROM embeddings
        WHERE namespace = :namespace AND (CAST(:scope AS bytea) IS NULL OR scope = :scope)
        LIMIT :bound
    ) AS counted
    """
)

# As of the last time that it was vacuumed or analysed; -1 before.
_VECTORS = text(
    "SELECT reltuples FROM pg_class WHERE oid = to_regclass('ix_embeddings_minilm_hnsw')"
)

# The graph's index is for one embedder, so its name is written into the statement: as a parameter
# it could not be proved to fit. Order is restored outside, since an iterative scan gives it nearly.
_APPROXIMATE = text(
    """
    WITH asked AS MATERIALIZED (
        SELECT place, CAST(vector AS halfvec(384)) AS vector,
               set_config('hnsw.ef_search', :width, true)
        FROM unnest(CAST(:vectors AS text[])) WITH ORDINALITY AS input (vector, place)
    )
    SELECT asked.place, near.id, near.prompt, near.distance
    FROM asked CROSS JOIN LATERAL (
        SELECT answers.id, answers.prompt,
               CAST(embeddings.vector AS halfvec(384)) <=> asked.vector AS distance
        FROM embeddings JOIN answers ON answers.id = embeddings.answer_id
        WHERE embeddings.embedder = :embedder
          AND embeddings.namespace = :namespace
          AND (CAST(:scope AS bytea) IS NULL OR embeddings.scope = :scope AND embeddings.part = 0)
          AND answers.namespace = :namespace AND answers.prompt IS NOT NULL
          AND answers.tombstoned_at IS NULL
          AND (answers.expires_at IS NULL OR answers.expires_at > now())
        ORDER BY CAST(embeddings.vector AS halfvec(384)) <=> asked.vector
        LIMIT :fetch
    ) AS near
    ORDER BY asked.place, near.distance
    """
).bindparams(bindparam("embedder", EMBEDDER, Text(), literal_execute=True))

_EXACT = text(
    """
    WITH asked AS MATERIALIZED (
        SELECT place, CAST(vector AS halfvec) AS vector
        FROM unnest(CAST(:vectors AS text[])) WITH ORDINALITY AS input (vector, place)
    ), candidate AS MATERIALIZED (
        SELECT answers.id, answers.prompt, embeddings.vector
        FROM embeddings JOIN answers ON answers.id = embeddings.answer_id
        WHERE embeddings.namespace = :namespace AND embeddings.embedder = :embedder
          AND (CAST(:scope AS bytea) IS NULL OR embeddings.scope = :scope AND embeddings.part = 0)
          AND answers.namespace = :namespace AND answers.prompt IS NOT NULL
          AND answers.tombstoned_at IS NULL
          AND (answers.expires_at IS NULL OR answers.expires_at > now())
    )
    SELECT asked.place, near.id, near.prompt, near.distance
    FROM asked CROSS JOIN LATERAL (
        SELECT id, prompt, candidate.vector <=> asked.vector AS distance
        FROM candidate
        ORDER BY distance
        LIMIT :fetch
    ) AS near
    ORDER BY asked.place, near.distance
    """
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A look-up, as `LookAround` gathers them."""

    namespace: str
    scope: bytes | None
    embedder: str
    limit: int
    vector: str


def search_width(vectors: float) -> int:
    """Return how many candidates a search of the graph keeps.

    Args:
        vectors: In the graph, about.
    """
    return round(_WIDTH * max(vectors / _WIDTH_FOR, 1.0) ** 0.1)


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
        self._width = (_WIDTH, 0.0)

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

    async def width(self, connection: AsyncConnection) -> int:
        """Return how wide the graph is to be searched.

        Args:
            connection: To ask for its size on.
        """
        width, until = self._width
        if until <= (now := time.monotonic()):
            width = search_width(await connection.scalar(_VECTORS) or 0.0)
            self._width = width, now + self._believed_s[True]
        return width


class LookAround:
    """Looks for neighbours of many vectors together.

    What the look-ups of a statement share, such as its plan and the vectors of a small namespace,
    is paid for once. Look-ups in a scope are for answers that may be served, so they do not wait
    for those that only name neighbours.

    Args:
        database: Where the vectors live.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sizes = Sizes()
        self._groups = {
            scoped: Gathering(
                self._ask, most=_TOGETHER, wanted_only=True, name="promptmill-neighbours"
            )
            for scoped in (True, False)
        }

    async def nearest(
        self, *, namespace: str, embedder: str, vector: Vector, limit: int, scope: bytes | None
    ) -> Sequence[Neighbour]:
        """Return live neighbours, nearest first, each answer once.

        Args:
            namespace: Tenant.
            embedder: Name of what made `vector`.
            vector: Shape [dimensions], unit length.
            limit: How many at most.
            scope: When given, only whole prompts of this scope.

        Returns:
            The neighbours; the similarity is that of the nearest part of each stored prompt.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        asked = vector_text(vector)
        if asked is None or limit < 1:
            return []
        group = self._groups[scope is not None]
        found = await group.get(Asked(namespace, scope, embedder, limit, asked))
        if isinstance(found, Exception):
            raise found
        return found or []

    async def _ask(self, asked: Sequence[Asked]) -> dict[Asked, list[Neighbour] | Exception]:
        alike: defaultdict[tuple[str, bytes | None, str, int], list[Asked]] = defaultdict(list)
        for one in asked:
            alike[one.namespace, one.scope, one.embedder, one.limit].append(one)
        found: dict[Asked, list[Neighbour] | Exception] = {}
        for together in alike.values():
            try:
                async with self._database.connection() as connection:
                    found |= await self._ask_alike(together, connection)
            except Exception as exc:  # noqa: BLE001  for those who asked that, and no others
                found |= dict.fromkeys(together, exc)
        return found

    async def _ask_alike(
        self, asked: Sequence[Asked], connection: AsyncConnection
    ) -> dict[Asked, list[Neighbour]]:
        """Ask for vectors that differ in nothing else."""
        first = asked[0]
        scoped = first.scope is not None
        values: dict[str, Any] = {
            "namespace": first.namespace,
            "scope": first.scope,
            "vectors": [one.vector for one in asked],
            "fetch": max(first.limit * _MORE[scoped], _AT_LEAST[scoped]),
        }
        if first.embedder != EMBEDDER or not await self._sizes.large(
            first.namespace, first.scope, connection
        ):
            found = await connection.execute(_EXACT, {**values, "embedder": first.embedder})
        else:
            width = str(await self._sizes.width(connection))
            found = await connection.execute(_APPROXIMATE, {**values, "width": width})
        rows: list[list[RowMapping]] = [[] for _ in asked]
        for row in found.mappings():
            rows[row["place"] - 1].append(row)
        return {one: _distinct(near, one.limit) for one, near in zip(asked, rows, strict=True)}


def _distinct(rows: Sequence[RowMapping], limit: int) -> list[Neighbour]:
    nearest_part: dict[Any, RowMapping] = {}
    for row in rows:
        nearest_part.setdefault(row["id"], row)
    return [
        Neighbour(answer_id=row["id"], prompt=row["prompt"], similarity=1.0 - row["distance"])
        for row in list(nearest_part.values())[:limit]
    ]
