"""Stored answers: given back as they were, to whom they belong, as long as they may be."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from sqlalchemy import event, text

from schema.errors import InvalidRequestError
from schema.tables import EMBEDDER
from tests.integration.builders import (
    analysis,
    answer,
    change,
    claimed,
    full_answer,
    number,
    outcome,
    unit_vectors,
)
from workers.engine.protocols import AnswerStore, Decision, PartVector, StoredAnswer, Vector
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.neighbours import _APPROXIMATE, EXACT_UP_TO, search_width

_UNLIKE = ("vectors", "created_at", "expires_at", "prompt")


def _replayed(given: StoredAnswer) -> dict[str, object]:
    return {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if field.name not in _UNLIKE
    }


def test_it_is_an_answer_store(answer_store: PostgresAnswers) -> None:
    assert isinstance(answer_store, AnswerStore)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"prompt": "NUL \x00 here"},
        {"kind": "pooling", "pooled": [[0.1, 2.0, -3.5]], "pooled_dtype": "float32"},
        {"kind": "pooling", "pooled": np.array([0.1, 1e-30], np.float32).tolist()},
        {"kind": "pooling", "pooled": [[1.0], [2.0, float("nan")]]},
        {"kind": "pooling", "pooled": [0.1, None]},
    ],
)
async def test_an_answer_comes_back_as_it_was(
    answer_store: PostgresAnswers, extra: dict[str, object]
) -> None:
    given = full_answer(**extra)
    await answer_store.put(given)
    await answer_store.put(given)
    by_fingerprint = await answer_store.get("default", given.fingerprint)
    assert by_fingerprint is not None
    assert repr(_replayed(by_fingerprint)) == repr(_replayed(given))  # NaN differs from itself
    assert by_fingerprint.created_at == pytest.approx(time.time(), abs=60)
    assert by_fingerprint.expires_at is None
    assert repr(await answer_store.by_id("default", given.id)) == repr(by_fingerprint)


async def test_of_two_answers_to_one_request_the_first_stays(
    database: Database, answer_store: PostgresAnswers
) -> None:
    rivals = [answer(f"{at}", fingerprint=b"f", analysis=analysis()) for at in range(8)]
    await asyncio.gather(*(answer_store.put(each) for each in rivals))
    assert await number(database, "SELECT count(*) FROM answers") == 1
    assert await number(database, "SELECT count(*) FROM nlp_results") == 1
    kept = await answer_store.get("default", b"f")
    await answer_store.put(answer("late", fingerprint=b"f"))
    assert await answer_store.get("default", b"f") == kept


async def test_answers_put_at_once_share_transactions_and_not_their_fate(
    database: Database, answer_store: PostgresAnswers
) -> None:
    """One that Postgres cannot hold is refused alone."""
    several = [answer(f"{number}", fingerprint=bytes([number])) for number in range(20)]
    several[7] = dataclasses.replace(several[7], prompt_tokens=2**40)
    ends = await asyncio.gather(
        *(answer_store.put(each) for each in several), return_exceptions=True
    )
    refused = [number for number, end in enumerate(ends) if end is not None]
    assert refused == [7]
    assert isinstance(ends[7], InvalidRequestError)
    again = [answer(f"{number}", fingerprint=bytes([100 + number])) for number in range(20)]
    await asyncio.gather(*(answer_store.put(each) for each in again))
    async with database.connection() as connection:
        statement = text(
            "SELECT count(*), count(DISTINCT CAST(xmin AS text)) FROM answers WHERE id = ANY(:ids)"
        )
        found = await connection.execute(statement, {"ids": [each.id for each in again]})
        assert tuple(found.one()) == (20, 1)


async def test_an_answer_lives_by_postgres_clock_and_then_makes_way(
    database: Database, answer_store: PostgresAnswers
) -> None:
    # A writer whose clock is a day behind gives a life of an hour all the same.
    yesterday = time.time() - 86_400
    old = full_answer(fingerprint=b"f", created_at=yesterday, expires_at=yesterday + 3600)
    await answer_store.put(old)
    live = await answer_store.get("default", b"f")
    assert live is not None
    assert live.expires_at == pytest.approx(time.time() + 3600, abs=60)

    await change(database, "UPDATE answers SET expires_at = now()")
    assert await answer_store.get("default", b"f") is None
    assert await answer_store.by_id("default", old.id) is None
    assert not await _near(answer_store, unit_vectors(1)[0])

    new = dataclasses.replace(old, id=uuid4(), tags=("new",), expires_at=None)
    await answer_store.put(new)
    found = await answer_store.get("default", b"f")
    assert found is not None
    assert (found.id, found.tags, found.expires_at) == (new.id, ("new",), None)
    (neighbour, *_) = await _near(answer_store, unit_vectors(1)[0])
    assert neighbour == new.id
    assert await number(database, "SELECT count(*) FROM embeddings") == 2


async def test_to_put_an_answer_again_gives_it_no_more_time(answer_store: PostgresAnswers) -> None:
    """It comes again with its late analysis, and with each job that memory gave it to."""
    now = time.time()
    first = answer(fingerprint=b"f", created_at=now, expires_at=now + 3600)
    await answer_store.put(first)
    for until_s in (7200, 60):
        again = dataclasses.replace(first, expires_at=now + until_s, analysis=analysis())
        await answer_store.put(again)
        kept = await answer_store.get("default", b"f")
        assert kept is not None
        assert kept.analysis is not None
        assert kept.expires_at == pytest.approx(now + 3600, abs=60)


async def test_a_reported_answer_is_never_served_again_and_its_jobs_are_named(
    database: Database, job_store: JobStore, answer_store: PostgresAnswers
) -> None:
    bad = full_answer(fingerprint=b"f")
    users = []
    for _ in range(2):
        job = await claimed(job_store)
        await job_store.finish([outcome(job, answer=bad, answer_id=bad.id)])
        users.append(job.id)

    assert await answer_store.report_bad("other", bad.id, "wrong") is None
    assert await answer_store.report_bad("default", uuid4(), "wrong") is None
    named = await answer_store.report_bad("default", bad.id, "wrong \x00")
    assert named == tuple(sorted(users))
    assert await answer_store.report_bad("default", bad.id, "again") == named

    async def gone() -> bool:
        return (
            await answer_store.get("default", b"f") is None
            and await answer_store.by_id("default", bad.id) is None
            and not await _near(answer_store, unit_vectors(1)[0])
        )

    assert await gone()
    await answer_store.put(bad)
    await answer_store.put(dataclasses.replace(bad, id=uuid4()))  # the same words again
    assert await gone()

    better = answer("Better.", fingerprint=b"f")
    await answer_store.put(better)
    found = await answer_store.get("default", b"f")
    assert found is not None
    assert found.id == better.id
    stats = await answer_store.stats("default")
    assert (stats.live, stats.reported) == (1, 1)


async def test_answers_are_forgotten_by_tag_model_and_id(answer_store: PostgresAnswers) -> None:
    answers = [
        answer(tags=("doc-1",), model="a"),
        answer(tags=("doc-1", "doc-2"), model="b"),
        answer(model="b"),
        answer(namespace="other", tags=("doc-1",), model="b"),
    ]
    for each in answers:
        await answer_store.put(each)
    with pytest.raises(InvalidRequestError):
        await answer_store.invalidate("default")
    assert await answer_store.invalidate("default", tag="doc") == 0
    assert await answer_store.invalidate("default", tag="doc-1", model="b") == 1
    assert await answer_store.invalidate("default", ids=[answers[2].id, answers[3].id]) == 1
    assert await answer_store.invalidate("default", everything=True) == 1
    assert await answer_store.get("other", answers[3].fingerprint) is not None


async def test_hits_are_counted_and_what_they_saved(answer_store: PostgresAnswers) -> None:
    given = answer(completion_tokens=10, engine_s=0.5)
    await answer_store.put(given)
    await answer_store.touch({given.id: 3, uuid4(): 1})
    await answer_store.touch({given.id: 1})
    await answer_store.touch({})
    stats = await answer_store.stats("default")
    assert (stats.live, stats.hits, stats.tokens_saved, stats.engine_s_saved) == (1, 4, 40, 2.0)
    assert (await answer_store.stats("other")).hits == 0


async def test_decisions_are_kept(database: Database, answer_store: PostgresAnswers) -> None:
    refusal = Decision(
        namespace="default",
        request_id="r\x00",
        answer_id=uuid4(),
        similarity=0.9,
        served=False,
        rule="numbers",
    )
    await answer_store.record([])
    await answer_store.record(
        [
            refusal,
            dataclasses.replace(refusal, served=True, rule=None, own_answer_id=uuid4()),
            dataclasses.replace(refusal, shadow=True, agreement=0.5),
        ]
    )
    stats = await answer_store.stats("default")
    assert (stats.served_by_meaning, stats.refused_by_guard) == (1, 1)
    assert await number(database, "SELECT count(*) FROM reuse_decisions WHERE shadow") == 1


async def test_expired_answers_are_purged_with_what_belongs_to_them(
    database: Database, answer_store: PostgresAnswers
) -> None:
    await answer_store.put(full_answer())
    await answer_store.put(answer())
    assert await answer_store.purge("expired") == 0
    await change(database, "UPDATE answers SET expires_at = now() WHERE scope IS NOT NULL")
    await change(database, "UPDATE nlp_results SET created_at = now() - interval '2 hours'")
    assert await answer_store.purge("expired") == 1
    assert await answer_store.purge("analyses") == 1
    for table, left in (("answers", 1), ("embeddings", 0), ("nlp_results", 0)):
        assert await number(database, f"SELECT count(*) FROM {table}") == left  # noqa: S608


async def test_no_query_crosses_a_namespace(answer_store: PostgresAnswers) -> None:
    mine = full_answer(namespace="mine")
    await answer_store.put(mine)
    assert await answer_store.get("yours", mine.fingerprint) is None
    assert await answer_store.by_id("yours", mine.id) is None
    for scope in (None, b"scope"):
        found = await answer_store.nearest(
            namespace="yours", embedder=EMBEDDER, vector=unit_vectors(1)[0], limit=9, scope=scope
        )
        assert found == []
    assert await answer_store.invalidate("yours", everything=True) == 0
    assert await answer_store.report_bad("yours", mine.id, "x") is None
    assert (await answer_store.stats("yours")).live == 0
    yours = dataclasses.replace(mine, id=uuid4(), namespace="yours")
    await answer_store.put(yours)
    assert await answer_store.get("mine", mine.fingerprint) is not None


# Neighbours


async def _near(
    store: PostgresAnswers, vector: Vector, *, limit: int = 5, **fields: object
) -> list[object]:
    asked = {"namespace": "default", "embedder": EMBEDDER, "scope": None, **fields}
    found = await store.nearest(vector=vector, limit=limit, **asked)  # type: ignore[arg-type]
    similarities = [neighbour.similarity for neighbour in found]
    assert similarities == sorted(similarities, reverse=True)
    return [neighbour.answer_id for neighbour in found]


async def test_a_neighbour_is_named_once_and_clauses_do_not_serve(
    answer_store: PostgresAnswers,
) -> None:
    first, second = unit_vectors(2)
    given = full_answer()  # the prompt is near the first, a clause near the second
    await answer_store.put(given)
    assert await _near(answer_store, second) == [given.id]
    (served,) = await answer_store.nearest(
        namespace="default", embedder=EMBEDDER, vector=second, limit=5, scope=b"scope"
    )
    assert served.similarity == pytest.approx(float(first @ second), abs=1e-3)
    assert await _near(answer_store, first, scope=b"another") == []
    assert await _near(answer_store, first, limit=0) == []
    assert await _near(answer_store, first * np.float32("nan")) == []


async def test_vectors_of_another_embedder_are_apart(answer_store: PostgresAnswers) -> None:
    short = np.array([0.6, 0.8], np.float32)
    part = PartVector(part=0, vector=short, embedder="tiny")
    given = answer(vectors=(part,))
    await answer_store.put(given)
    await answer_store.put(full_answer())
    assert await _near(answer_store, short, embedder="tiny") == [given.id]


async def _fill(
    database: Database, namespace: str, vectors: Vector, *, scope: bytes | None = None
) -> None:
    """Write many answers at once, numbered by their prompts."""
    await change(
        database,
        """
        WITH made AS (
            INSERT INTO answers (id, namespace, fingerprint, engine, model, prompt, outputs,
                                 digest, scope)
            SELECT gen_random_uuid(), :namespace, decode(md5(:namespace || n), 'hex'), 'e', 'm',
                   CAST(n AS text), '{"completions": []}', 'd', CAST(:scope AS bytea)
            FROM generate_series(0, :last) AS n
            RETURNING id, prompt
        )
        INSERT INTO embeddings (answer_id, embedder, part, namespace, scope, vector)
        SELECT id, :embedder, 0, :namespace, CAST(:scope AS bytea),
               CAST((CAST(:vectors AS text[]))[CAST(prompt AS int) + 1] AS halfvec)
        FROM made
        """,
        namespace=namespace,
        scope=scope,
        last=len(vectors) - 1,
        embedder=EMBEDDER,
        vectors=[str(vector.tolist()) for vector in vectors],
    )


async def test_recall_under_a_namespace_filter(
    database: Database, answer_store: PostgresAnswers
) -> None:
    spread = unit_vectors(60, seed=9)
    rng = np.random.default_rng(3)

    def clustered(count: int) -> Vector:
        noise = rng.normal(size=(count, spread.shape[1])).astype(np.float32) * np.float32(0.04)
        found = spread[rng.integers(0, len(spread), count)] + noise
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    sizes = {"large": EXACT_UP_TO + 1000, "medium": EXACT_UP_TO + 100, "tiny": 40}
    stored = {namespace: clustered(size) for namespace, size in sizes.items()}
    for namespace, vectors in stored.items():
        await _fill(database, namespace, vectors)

    for namespace, vectors in stored.items():
        right = asked = 0
        for query in clustered(40):
            truth = {str(at) for at in np.argsort(-(vectors @ query))[:5]}
            found = await answer_store.nearest(
                namespace=namespace, embedder=EMBEDDER, vector=query, limit=5
            )
            right += len(truth & {neighbour.prompt for neighbour in found})
            asked += len(truth)
        assert right / asked >= 0.98, (namespace, right / asked)


@pytest.mark.parametrize(
    ("vectors", "width"), [(-1, 64), (100_000, 64), (1_000_000, 81), (1e12, 321)]
)
async def test_the_more_vectors_there_are_the_wider_is_the_search(
    database: Database, vectors: float, width: int
) -> None:
    assert search_width(vectors) == width
    values: dict[str, Any] = {"namespace": "n", "scope": None, "fetch": 5, "width": str(width)}
    values["vectors"] = [str(unit_vectors(1, seed=0)[0].tolist())]
    async with database.transaction() as connection:
        await connection.execute(_APPROXIMATE, values)
        assert await connection.scalar(text("SHOW hnsw.ef_search")) == str(width)


async def test_look_ups_at_the_same_time_share_statements_and_nothing_else(
    database: Database, answer_store: PostgresAnswers
) -> None:
    vectors = unit_vectors(30, seed=5)
    await _fill(database, "mine", vectors[:20], scope=b"scope")
    await _fill(database, "yours", vectors[10:])
    asked = [
        {"namespace": namespace, "scope": scope, "vector": vector, "limit": limit}
        for vector in vectors[::3]
        for namespace, scope, limit in (
            ("mine", None, 3),
            ("mine", b"scope", 2),
            ("yours", None, 4),
        )
    ]
    alone = [await answer_store.nearest(embedder=EMBEDDER, **one) for one in asked]  # type: ignore[arg-type]
    statements: list[str] = []

    def executed(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    watched = database._engine.sync_engine, "before_cursor_execute", executed
    event.listen(*watched)
    together = await asyncio.gather(
        *(answer_store.nearest(embedder=EMBEDDER, **one) for one in asked)  # type: ignore[arg-type]
    )
    event.remove(*watched)
    assert together == alone
    assert {len(found) for found in together} == {2, 3, 4}
    assert 0 < len(statements) < len(asked) / 2


async def test_a_look_up_that_fails_takes_no_other_along(answer_store: PostgresAnswers) -> None:
    part = PartVector(part=0, vector=np.array([0.6, 0.8], dtype=np.float32), embedder="tiny")
    await answer_store.put(answer(vectors=(part,)))
    given = full_answer()
    await answer_store.put(given)

    async def near(vector: Vector, embedder: str) -> list[object]:
        return await _near(answer_store, vector, embedder=embedder)

    too_long = np.array([0.6, 0.8, 0.0], dtype=np.float32)
    (first,) = unit_vectors(1)
    first_one, failed, found = await asyncio.gather(
        near(first, EMBEDDER), near(too_long, "tiny"), near(first, EMBEDDER), return_exceptions=True
    )
    assert isinstance(failed, Exception)
    assert first_one == found == [given.id]
