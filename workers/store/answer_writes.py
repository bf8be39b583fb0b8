"""Writing answers with their analyses and vectors, many at a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import text

from workers.store import stored_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

    from workers.engine.protocols import StoredAnswer

_PUT_ANALYSES = text(
    """
    INSERT INTO nlp_results (id, namespace, digest, pipeline, result)
    SELECT id, namespace, digest, pipeline, CAST(result AS jsonb)
    FROM unnest(CAST(:ids AS uuid[]), CAST(:namespaces AS text[]), CAST(:digests AS bytea[]),
                CAST(:pipelines AS text[]), CAST(:results AS text[]))
         AS input (id, namespace, digest, pipeline, result)
    ORDER BY id
    ON CONFLICT DO NOTHING
    """
)

# Of two answers to one request the first stays, as long as it is live; one that has expired makes
# way. The same answer comes again when its analysis was late, or with a job that was given it: what
# was found is added to it, and its time goes on as it was. A
# reported answer is no longer in the index that decides this, so a new one can take its
# place, unless it says the same again.
_PUT_ANSWERS = text(
    """
    INSERT INTO answers (id, namespace, fingerprint, engine, model, kind, scope, prompt, outputs,
                         digest, nlp_result_id, prompt_tokens, completion_tokens, engine_s, tags,
                         expires_at)
    SELECT id, namespace, fingerprint, engine, model, kind, scope, prompt,
           CAST(outputs AS jsonb), digest, nlp_result_id, prompt_tokens, completion_tokens,
           engine_s, ARRAY(SELECT jsonb_array_elements_text(CAST(tags AS jsonb))),
           now() + make_interval(secs => ttl_s)
    FROM unnest(
        CAST(:ids AS uuid[]), CAST(:namespaces AS text[]), CAST(:fingerprints AS bytea[]),
        CAST(:engines AS bytea[]), CAST(:models AS text[]), CAST(:kinds AS text[]),
        CAST(:scopes AS bytea[]), CAST(:prompts AS text[]), CAST(:outputs AS text[]),
        CAST(:digests AS bytea[]), CAST(:nlp_result_ids AS uuid[]),
        CAST(:prompt_tokens AS integer[]), CAST(:completion_tokens AS integer[]),
        CAST(:engine_s AS double precision[]), CAST(:tags AS text[]),
        CAST(:ttl_s AS double precision[])
    ) AS input (id, namespace, fingerprint, engine, model, kind, scope, prompt, outputs, digest,
                nlp_result_id, prompt_tokens, completion_tokens, engine_s, tags, ttl_s)
    WHERE NOT EXISTS (
        SELECT FROM answers AS reported
        WHERE reported.namespace = input.namespace AND reported.fingerprint = input.fingerprint
          AND reported.tombstoned_at IS NOT NULL
          AND (reported.digest = input.digest OR reported.id = input.id)
    )
    ORDER BY namespace, fingerprint
    ON CONFLICT (namespace, fingerprint) WHERE tombstoned_at IS NULL
    DO UPDATE SET
        id = excluded.id, engine = excluded.engine, model = excluded.model,
        kind = excluded.kind, scope = excluded.scope, prompt = excluded.prompt,
        outputs = CASE WHEN answers.id = excluded.id AND excluded.nlp_result_id IS NULL
                       THEN answers.outputs ELSE excluded.outputs END,
        digest = excluded.digest,
        nlp_result_id = CASE WHEN answers.id = excluded.id
                             THEN coalesce(excluded.nlp_result_id, answers.nlp_result_id)
                             ELSE excluded.nlp_result_id END,
        prompt_tokens = excluded.prompt_tokens,
        completion_tokens = excluded.completion_tokens, engine_s = excluded.engine_s,
        tags = excluded.tags,
        hits = CASE WHEN answers.id = excluded.id THEN answers.hits ELSE 0 END,
        last_hit_at = CASE WHEN answers.id = excluded.id THEN answers.last_hit_at END,
        created_at = CASE WHEN answers.id = excluded.id THEN answers.created_at ELSE now() END,
        expires_at = CASE WHEN answers.id = excluded.id THEN answers.expires_at
                          ELSE excluded.expires_at END
    WHERE answers.expires_at <= now() OR answers.id = excluded.id
    RETURNING id
    """
)

_PUT_VECTORS = text(
    """
    INSERT INTO embeddings (answer_id, embedder, part, namespace, scope, clause, vector)
    SELECT answer_id, embedder, part, namespace, scope, clause, CAST(vector AS halfvec)
    FROM unnest(CAST(:answer_ids AS uuid[]), CAST(:embedders AS text[]),
                CAST(:parts AS smallint[]), CAST(:namespaces AS text[]),
                CAST(:scopes AS bytea[]), CAST(:clauses AS text[]), CAST(:vectors AS text[]))
         AS input (answer_id, embedder, part, namespace, scope, clause, vector)
    ORDER BY answer_id, embedder, part
    ON CONFLICT DO NOTHING
    """
)


async def put_answers(answers: Sequence[StoredAnswer], connection: AsyncConnection) -> None:
    """Store answers, unless live ones to the same requests are there already.

    Args:
        answers: The answers. Of several to one request the first is taken.
        connection: In a transaction; the caller commits.
    """
    first: dict[tuple[str, bytes], StoredAnswer] = {}
    for answer in answers:
        first.setdefault((answer.namespace, answer.fingerprint), answer)
    unique = list(first.values())
    await _put_analyses(unique, connection)
    stored = frozenset((await connection.scalars(_PUT_ANSWERS, _columns(unique))).all())
    await _put_vectors([answer for answer in unique if answer.id in stored], connection)


async def _put_analyses(answers: Sequence[StoredAnswer], connection: AsyncConnection) -> None:
    from workers.store.answer_json import analysis_key

    rows: dict[UUID, tuple[str, bytes, str, str]] = {}
    for answer in answers:
        if (analysis := answer.analysis) is not None:
            key, text_digest = analysis_key(answer.namespace, analysis)
            if key not in rows:
                document = stored_json.dump(analysis.to_json())
                rows[key] = (answer.namespace, text_digest, analysis.pipeline, document)
    if not rows:
        return
    namespaces, digests, pipelines, results = zip(*rows.values(), strict=True)
    values = {
        "ids": list(rows),
        "namespaces": list(namespaces),
        "digests": list(digests),
        "pipelines": list(pipelines),
        "results": list(results),
    }
    await connection.execute(_PUT_ANALYSES, values)


async def _put_vectors(answers: Sequence[StoredAnswer], connection: AsyncConnection) -> None:
    from workers.store.answer_json import vector_text

    rows = [
        (
            answer.id,
            part.embedder,
            part.part,
            answer.namespace,
            answer.scope,
            None if part.clause is None else stored_json.clean(part.clause),
            vector,
        )
        for answer in answers
        for part in answer.vectors
        if (vector := vector_text(part.vector)) is not None
    ]
    if not rows:
        return
    names = ("answer_ids", "embedders", "parts", "namespaces", "scopes", "clauses", "vectors")
    columns = (list(column) for column in zip(*rows, strict=True))
    await connection.execute(_PUT_VECTORS, dict(zip(names, columns, strict=True)))


def _columns(answers: Sequence[StoredAnswer]) -> dict[str, Any]:
    from workers.store.answer_json import analysis_key, digest, outputs_text

    return {
        "ids": [answer.id for answer in answers],
        "namespaces": [answer.namespace for answer in answers],
        "fingerprints": [answer.fingerprint for answer in answers],
        "engines": [answer.engine for answer in answers],
        "models": [answer.model for answer in answers],
        "kinds": [answer.kind for answer in answers],
        "scopes": [answer.scope for answer in answers],
        "prompts": [
            None if answer.prompt is None else stored_json.clean(answer.prompt)
            for answer in answers
        ],
        "outputs": [outputs_text(answer) for answer in answers],
        "digests": [digest(answer) for answer in answers],
        "nlp_result_ids": [
            None if answer.analysis is None else analysis_key(answer.namespace, answer.analysis)[0]
            for answer in answers
        ],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "completion_tokens": [answer.completion_tokens for answer in answers],
        "engine_s": [answer.engine_s for answer in answers],
        "tags": [orjson.dumps(answer.tags).decode() for answer in answers],
        "ttl_s": [_ttl_s(answer) for answer in answers],
    }


def _ttl_s(answer: StoredAnswer) -> float | None:
    """Return the seconds an answer is to live: a span, so that only Postgres' clock counts."""
    if answer.expires_at is None:
        return None
    return answer.expires_at - (answer.created_at or time.time())
