"""The store keeps within its bounds, and loses what is worth least first."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from tests.integration.builders import answer, change, full_answer, number
from workers.store.answers import PostgresAnswers
from workers.store.database import Database


async def aged(store: PostgresAnswers, database: Database, name: str, **fields: Any) -> UUID:
    """Store an answer that is an hour old."""
    made = answer(tags=(name,), **{"engine_s": 1.0, **fields})
    await store.put(made)
    await change(
        database,
        "UPDATE answers SET created_at = now() - interval '1 hour' WHERE id = :id",
        id=made.id,
    )
    return made.id


async def stays(database: Database, namespace: str = "default") -> set[str]:
    found = await number(
        database,
        "SELECT array_agg(tags[1]) FROM answers WHERE namespace = :namespace",
        namespace=namespace,
    )
    return set(found or ())


async def test_the_least_useful_goes_first(
    answer_store: PostgresAnswers, database: Database
) -> None:
    used = await aged(answer_store, database, "used")
    await aged(answer_store, database, "costly", engine_s=30.0)
    await aged(answer_store, database, "plain")
    words = "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(20_000))
    await aged(answer_store, database, "large", words=words)
    once = await aged(answer_store, database, "popular once", engine_s=4.0)
    await answer_store.touch({used: 9, once: 9})
    await change(
        database,
        "UPDATE answers SET last_hit_at = now() - interval '30 days' WHERE id = :id",
        id=once,
    )
    gone = []
    for keep in (4, 3, 2, 1, 0):
        before = await stays(database)
        assert await answer_store.evict("default", keep=keep) == 1
        gone += sorted(before - await stays(database))
    assert gone == ["popular once", "large", "plain", "used", "costly"]
    assert await answer_store.evict("default", keep=0) == 0


async def test_what_is_new_or_reported_or_anothers_stays(
    answer_store: PostgresAnswers, database: Database
) -> None:
    await answer_store.put(answer(tags=("new",)))
    reported = await aged(answer_store, database, "reported")
    await answer_store.report_bad("default", reported, "bad")
    await aged(answer_store, database, "theirs", namespace="other")
    await aged(answer_store, database, "old")
    assert await answer_store.crowded(1) == ["default"]
    assert await answer_store.evict("default", keep=0) == 1
    assert await stays(database) == {"new", "reported"}
    assert await stays(database, "other") == {"theirs"}
    assert await answer_store.crowded(1) == []
    assert await answer_store.evict("default", keep=0, grace_s=0) == 1


async def test_vectors_go_with_their_answer(
    answer_store: PostgresAnswers, database: Database
) -> None:
    await answer_store.put(full_answer())
    assert await number(database, "SELECT count(*) FROM embeddings") == 2
    assert await answer_store.evict("default", keep=0, grace_s=0) == 1
    assert await number(database, "SELECT count(*) FROM embeddings") == 0


async def test_more_than_one_statement_removes(
    answer_store: PostgresAnswers, database: Database
) -> None:
    await change(
        database,
        "INSERT INTO answers (id, namespace, fingerprint, engine, model, outputs, digest) "
        "SELECT gen_random_uuid(), 'default', CAST(CAST(n AS text) AS bytea), '', 'm', '{}', '' "
        "FROM generate_series(1, 4500) AS n",
    )
    assert await answer_store.evict("default", keep=10, grace_s=-1) == 4490
    assert await number(database, "SELECT count(*) FROM answers") == 10
