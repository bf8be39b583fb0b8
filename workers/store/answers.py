"""`PostgresAnswers`: the durable tier of stored answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy import text

from schema.errors import InvalidRequestError
from workers.store import stored_json
from workers.store.answer_json import answer_from
from workers.store.answer_puts import AnswerPuts
from workers.store.eviction import Eviction
from workers.store.flight_marks import FlightMarks
from workers.store.gathering import Gathering
from workers.store.neighbours import LookAround
from workers.store.reuse_labels import ReuseLabels

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import TextClause

    from workers.engine.protocols import Decision, Neighbour, StoredAnswer, Vector
    from workers.store.database import Database

_BY_FINGERPRINT = text(
    """
    SELECT answers.id, answers.namespace, answers.fingerprint, engine, model, kind, scope, prompt,
           outputs, prompt_tokens, completion_tokens, engine_s, tags,
           CAST(extract(epoch FROM answers.created_at) AS double precision) AS created_at,
           CAST(extract(epoch FROM expires_at) AS double precision) AS expires_at,
           nlp_results.result AS analysis
    FROM unnest(CAST(:namespaces AS text[]), CAST(:fingerprints AS bytea[]))
         AS wanted (namespace, fingerprint)
         JOIN answers ON answers.namespace = wanted.namespace
                     AND answers.fingerprint = wanted.fingerprint
         LEFT JOIN nlp_results ON nlp_results.id = nlp_result_id
    WHERE tombstoned_at IS NULL AND (expires_at IS NULL OR expires_at > now())
    """
)

_BY_ID = text(
    """
    SELECT answers.id, answers.namespace, fingerprint, engine, model, kind, scope, prompt,
           outputs, prompt_tokens, completion_tokens, engine_s, tags,
           CAST(extract(epoch FROM answers.created_at) AS double precision) AS created_at,
           CAST(extract(epoch FROM expires_at) AS double precision) AS expires_at,
           nlp_results.result AS analysis
    FROM answers LEFT JOIN nlp_results ON nlp_results.id = nlp_result_id
    WHERE answers.namespace = :namespace AND answers.id = :id
      AND tombstoned_at IS NULL AND (expires_at IS NULL OR expires_at > now())
    """
)

_RECORD = text(
    """
    INSERT INTO reuse_decisions (id, namespace, request_id, answer_id, own_answer_id, similarity,
                                 served, shadow, rule, agreement)
    SELECT * FROM unnest(
        CAST(:ids AS uuid[]), CAST(:namespaces AS text[]), CAST(:request_ids AS text[]),
        CAST(:answer_ids AS uuid[]), CAST(:own_answer_ids AS uuid[]),
        CAST(:similarities AS double precision[]), CAST(:served AS boolean[]),
        CAST(:shadows AS boolean[]), CAST(:rules AS text[]),
        CAST(:agreements AS double precision[]))
    """
)

_TOUCH = text(
    """
    WITH hit AS (
        SELECT answers.id, hits.times
        FROM answers JOIN unnest(CAST(:ids AS uuid[]), CAST(:times AS bigint[]))
             AS hits (id, times) ON answers.id = hits.id
        ORDER BY answers.id
        FOR NO KEY UPDATE OF answers
    )
    UPDATE answers SET hits = hits + hit.times, last_hit_at = now()
    FROM hit WHERE answers.id = hit.id
    """
)

_EXTEND = text(
    """
    UPDATE answers SET expires_at = greatest(expires_at, now() + make_interval(secs => :ttl_s))
    WHERE namespace = :namespace AND id = :id AND tombstoned_at IS NULL AND expires_at > now()
    """
)

_INVALIDATE = text(
    """
    WITH gone AS (
        SELECT id FROM answers
        WHERE namespace = :namespace AND tombstoned_at IS NULL
          AND (CAST(:tag AS text) IS NULL OR tags @> ARRAY[CAST(:tag AS text)])
          AND (CAST(:model AS text) IS NULL OR model = :model)
          AND (CAST(:ids AS uuid[]) IS NULL OR id = ANY(CAST(:ids AS uuid[])))
        LIMIT :limit
    )
    DELETE FROM answers USING gone WHERE answers.id = gone.id
    """
)

_TOMBSTONE = text(
    """
    UPDATE answers SET tombstoned_at = coalesce(tombstoned_at, now()),
                       tombstone = coalesce(tombstone, :reason)
    WHERE namespace = :namespace AND id = :id
    RETURNING id
    """
)

_FORGET_VECTORS = text("DELETE FROM embeddings WHERE answer_id = :id AND namespace = :namespace")

# Whoever was given a bad answer in place of his own was wrongly given it.
_LABEL_WRONG = text(
    """
    UPDATE reuse_decisions SET label = 'wrong'
    WHERE namespace = :namespace AND answer_id = :id AND served AND NOT shadow AND label IS NULL
    """
)

_USED_BY = text("SELECT id FROM jobs WHERE namespace = :namespace AND answer_id = :id ORDER BY id")

_STATS = text(
    """
    SELECT count(*) FILTER (WHERE tombstoned_at IS NULL
                            AND (expires_at IS NULL OR expires_at > now())) AS live,
           count(*) FILTER (WHERE expires_at <= now() AND tombstoned_at IS NULL) AS expired,
           count(tombstoned_at) AS reported,
           coalesce(sum(hits), 0) AS hits,
           coalesce(sum(hits * completion_tokens), 0) AS tokens_saved,
           coalesce(sum(hits * engine_s), 0) AS engine_s_saved
    FROM answers WHERE namespace = :namespace
    """
)

_DECISIONS = text(
    """
    SELECT count(*) FILTER (WHERE served) AS served, count(*) FILTER (WHERE NOT served) AS refused
    FROM reuse_decisions WHERE namespace = :namespace AND NOT shadow
    """
)

_AT_A_TIME = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerStats:
    """What a namespace has stored, and what that has saved."""

    live: int  # answers that may be given
    expired: int  # not yet purged
    reported: int  # never served again
    hits: int  # times one was given, as far as counted
    tokens_saved: int  # completion tokens not generated
    engine_s_saved: float  # seconds of generation not spent
    served_by_meaning: int  # decisions for a neighbour
    refused_by_guard: int  # decisions against one


class PostgresAnswers(Eviction, FlightMarks, ReuseLabels):
    """Answers in Postgres, an `AnswerStore` of the engine, with its `FlightMarkers`.

    Time to live runs by Postgres' clock. Of two answers to one request the first stays until it
    expires or is reported. A reported answer stays as a record; another answer to the same request
    may follow it, and the same words again may not.

    Args:
        database: Where they live. The caller closes it.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._around = LookAround(database)
        self._look_ups = Gathering(self._look_up, wanted_only=True, name="promptmill-look-ups")
        self._puts = AnswerPuts(database)

    async def get(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return the live answer to a request, with its analysis.

        Args:
            namespace: Tenant.
            fingerprint: SHA-256 of the canonical request.

        Returns:
            The answer without its vectors, or None.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._look_ups.get((namespace, fingerprint))

    async def by_id(self, namespace: str, answer_id: UUID) -> StoredAnswer | None:
        """Return a live answer, with its analysis.

        Args:
            namespace: Tenant.
            answer_id: The answer.

        Returns:
            The answer without its vectors, or None.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._one(_BY_ID, {"namespace": namespace, "id": answer_id})

    async def put(self, answer: StoredAnswer) -> None:
        """Store an answer with its analysis and vectors; a second put of one is harmless.

        Answers that are put at the same time share a transaction.

        Args:
            answer: The answer. Its `expires_at` counts from its `created_at`.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
            InvalidRequestError: Postgres cannot hold a value of this one.
        """
        await self._puts.put(answer)

    async def nearest(
        self,
        *,
        namespace: str,
        embedder: str,
        vector: Vector,
        limit: int,
        scope: bytes | None = None,
    ) -> Sequence[Neighbour]:
        """Return live neighbours, nearest first, each answer once.

        Look-ups that come at the same time share a statement.

        Args:
            namespace: Tenant; no other's prompts are ever looked at.
            embedder: Name of what made `vector`.
            vector: Shape [dimensions], unit length.
            limit: How many at most.
            scope: When given, only whole prompts of this scope: those that may be served.

        Returns:
            The neighbours; the similarity is that of the nearest part of each stored prompt.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._around.nearest(
            namespace=namespace, embedder=embedder, vector=vector, limit=limit, scope=scope
        )

    async def record(self, decisions: Sequence[Decision]) -> None:
        """Keep decisions for or against reuse.

        Args:
            decisions: The decisions.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        if not decisions:
            return
        values = {
            "ids": [uuid4() for _ in decisions],
            "namespaces": [decision.namespace for decision in decisions],
            "request_ids": [stored_json.clean(decision.request_id) for decision in decisions],
            "answer_ids": [decision.answer_id for decision in decisions],
            "own_answer_ids": [decision.own_answer_id for decision in decisions],
            "similarities": [decision.similarity for decision in decisions],
            "served": [decision.served for decision in decisions],
            "shadows": [decision.shadow for decision in decisions],
            "rules": [decision.rule for decision in decisions],
            "agreements": [decision.agreement for decision in decisions],
        }
        async with self._database.connection() as connection:
            await connection.execute(_RECORD, values)

    async def touch(self, hits: Mapping[UUID, int]) -> None:
        """Count how often answers were given.

        Args:
            hits: Times by answer, since the last call.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        if hits:
            values = {"ids": list(hits), "times": list(hits.values())}
            async with self._database.connection() as connection:
                await connection.execute(_TOUCH, values)

    async def extend(self, namespace: str, answer_id: UUID, ttl_s: float) -> None:
        """Let a live answer live for `ttl_s` seconds from now, if that is longer than it would.

        Args:
            namespace: Tenant.
            answer_id: The answer; one that never expires goes on so.
            ttl_s: Seconds.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "id": answer_id, "ttl_s": ttl_s}
        async with self._database.connection() as connection:
            await connection.execute(_EXTEND, values)

    async def invalidate(
        self,
        namespace: str,
        *,
        tag: str | None = None,
        model: str | None = None,
        ids: Iterable[UUID] | None = None,
        everything: bool = False,
    ) -> int:
        """Forget answers. Those that were reported stay as a record.

        Args:
            namespace: Tenant.
            tag: Those that carry this tag.
            model: Those of this served model.
            ids: These. Several conditions must all hold.
            everything: All of the namespace; must be said when no condition is given.

        Returns:
            How many were forgotten.

        Raises:
            InvalidRequestError: Neither a condition nor `everything` was given.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        if tag is None and model is None and ids is None and not everything:
            msg = "say which answers to forget: by tag, model or ids, or everything"
            raise InvalidRequestError(msg)
        values = {
            "namespace": namespace,
            "tag": tag,
            "model": model,
            "ids": None if ids is None else list(ids),
            "limit": _AT_A_TIME,
        }
        forgotten = 0
        async with self._database.connection() as connection:
            # Some at a time, so that no statement runs long and no lock is held for long.
            while (gone := (await connection.execute(_INVALIDATE, values)).rowcount) > 0:
                forgotten += gone
        return forgotten

    async def report_bad(
        self, namespace: str, answer_id: UUID, reason: str
    ) -> tuple[UUID, ...] | None:
        """Mark an answer as bad: it is never served again.

        Decisions that served it are labelled as wrong, unless somebody labelled them before.

        Args:
            namespace: Tenant.
            answer_id: The answer.
            reason: Why, for people.

        Returns:
            The jobs that were given it, or None when the namespace neither stores it nor gave it.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "id": answer_id}
        async with self._database.transaction() as connection:
            marked = await connection.scalar(
                _TOMBSTONE, {**values, "reason": stored_json.clean(reason)}
            )
            await connection.execute(_FORGET_VECTORS, values)
            await connection.execute(_LABEL_WRONG, values)
            used_by = tuple((await connection.scalars(_USED_BY, values)).all())
        return used_by if marked or used_by else None

    async def stats(self, namespace: str) -> AnswerStats:
        """Return what a namespace has stored, and what that has saved.

        Args:
            namespace: Tenant.

        Returns:
            The numbers.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            stored = (await connection.execute(_STATS, {"namespace": namespace})).one()
            decided = (await connection.execute(_DECISIONS, {"namespace": namespace})).one()
        return AnswerStats(
            live=stored.live,
            expired=stored.expired,
            reported=stored.reported,
            hits=int(stored.hits),
            tokens_saved=int(stored.tokens_saved),
            engine_s_saved=float(stored.engine_s_saved),
            served_by_meaning=decided.served,
            refused_by_guard=decided.refused,
        )

    async def wait_answer(
        self, namespace: str, fingerprint: bytes, timeout_s: float
    ) -> StoredAnswer | None:
        """Wait for the answer that another worker is generating.

        Args:
            namespace: Tenant.
            fingerprint: SHA-256 of the canonical request.
            timeout_s: Seconds to wait at most.

        Returns:
            The answer, or None as soon as no mark stands any more, or the time is over.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        if await self._flight_lands(namespace, fingerprint, timeout_s):
            return await self.get(namespace, fingerprint)
        return None

    async def _look_up(
        self, keys: Sequence[tuple[str, bytes]]
    ) -> dict[tuple[str, bytes], StoredAnswer]:
        namespaces, fingerprints = zip(*keys, strict=True)
        values = {"namespaces": list(namespaces), "fingerprints": list(fingerprints)}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_BY_FINGERPRINT, values)).mappings().all()
        return {(row["namespace"], row["fingerprint"]): answer_from(row) for row in rows}

    async def _one(self, statement: TextClause, values: dict[str, object]) -> StoredAnswer | None:
        async with self._database.connection() as connection:
            row = (await connection.execute(statement, values)).mappings().first()
        return None if row is None else answer_from(row)
