"""What workers ask every few seconds is found by indexes, however much is stored.

Tables are filled in the database itself; with a million rows of each the plans are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import TextClause, create_engine, delete, select, text, tuple_
from sqlalchemy.dialects import postgresql

from tests.integration.conftest import Cluster
from workers.store import (
    admission,
    backlog,
    broker,
    erasure,
    eviction,
    inventory,
    outbox,
    outcomes,
    release,
    schema_upgrade,
)

# Nine of ten are over; the others wait in the queue or for their turn, or run.
_FILL = """
INSERT INTO jobs (id, namespace, model, channel, priority, request, state, created_at,
                  available_at, deadline_at, sent_at, held, token, lease_until, finished_at,
                  published_at)
SELECT gen_random_uuid(), CASE WHEN n % 20 = 0 THEN 'small' ELSE 'big' END, 'm', 'c', n % 10,
       jsonb_build_object('kind', 'prompt', 'prompt', repeat('word ', 20) || n), kind.state,
       made.at, made.at, CASE WHEN n % 7 = 0 THEN now() + interval '1 hour' END,
       CASE WHEN NOT (kind.state = 'queued' AND n % 2 = 0) THEN made.at END,
       kind.state = 'queued' AND n % 2 = 0, 1,
       CASE WHEN kind.state = 'running' THEN now() + interval '1 minute' END,
       CASE WHEN kind.state IN ('done', 'failed') THEN made.at END,
       CASE WHEN kind.state IN ('done', 'failed') THEN made.at END
FROM generate_series(1, 20000) AS n,
     LATERAL (SELECT CASE WHEN n % 100 < 90 THEN 'done' WHEN n % 100 < 92 THEN 'failed'
                          WHEN n % 1000 = 999 THEN 'running' ELSE 'queued' END) AS kind (state),
     LATERAL (SELECT now() - n * interval '1 second') AS made (at);
INSERT INTO nlp_results (id, namespace, digest, pipeline, result, created_at)
SELECT md5(n::text)::uuid, 'big', decode(md5(n::text), 'hex'), 'p', '{}',
       now() - n * interval '2 seconds'
FROM generate_series(1, 10000) AS n;
INSERT INTO answers (id, namespace, fingerprint, engine, model, outputs, digest, nlp_result_id,
                     created_at, expires_at)
SELECT gen_random_uuid(), 'big', decode(md5(n::text), 'hex'), 'e', 'm',
       jsonb_build_object('text', repeat('answer ', 30)), 'd', md5(n::text)::uuid,
       now() - n * interval '2 seconds', CASE WHEN n % 3 = 0 THEN now() + interval '1 day' END
FROM generate_series(1, 10000) AS n;
INSERT INTO reuse_decisions (id, namespace, request_id, answer_id, similarity, served, created_at)
SELECT gen_random_uuid(), 'big', 'r', gen_random_uuid(), 0.9, false,
       now() - n * interval '2 seconds'
FROM generate_series(1, 10000) AS n;
"""
_LOOK = {"limit": 500, "max_crashes": 5}
_SAYS = dict.fromkeys(("cancelled", "expired", "set_aside"), "{}")
_LIST = {"batch_id": None, "before": None, "limit": 100}
_OLD = datetime.now(UTC) - timedelta(seconds=20_000 - 40)  # few rows are older
PERIODIC: dict[str, tuple[TextClause, dict[str, Any]]] = {
    "rows without a message": (outbox._UNSENT, {"older_than_s": 5, "limit": 500}),
    "lost messages": (outbox._SENT_BEFORE, {"moment": _OLD, "limit": 500}),
    "ended leases": (outbox._REQUEUE, _LOOK),
    "passed deadlines": (outbox._END, {**_LOOK, **_SAYS}),
    "unpublished outcomes": (outcomes._UNPUBLISHED, {"older_than_s": 5, "limit": 500}),
    "who waits for a turn": (release._WAITING, {}),
    "who stands in the queue": (release._STANDING, {"model": "m", "bound": 400}),
    "whose turn it is": (
        release._RELEASE,
        {"model": "m", "namespaces": ["big", "small"], "counts": [50, 3]},
    ),
    "depth of the queue": (admission._WAITING, {"bound": 1_000_000}),
    "room in a window": (admission._ROOM, {"model": "m", "namespace": "small", "window": 384}),
    "live jobs": (backlog._LIVE, {}),
    "expired answers": (eviction._PURGE["expired"], {"limit": 2000}),
    "namespaces": (erasure._NAMESPACES, {}),
    "dead letters": (inventory._LIST, {"namespace": "big", "state": "failed", **_LIST}),
    "newest jobs": (inventory._LIST, {"namespace": "big", "state": None, **_LIST}),
    "last messages": (broker._UNSEND, {"since": datetime.now(UTC)}),
}


@pytest.fixture(scope="module")
def url(cluster: Cluster, migrated_template: str) -> Iterator[str]:
    name = cluster.create(template=migrated_template)
    engine = create_engine(cluster.url_of(name).replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(_FILL.replace("%", "%%"))
        connection.exec_driver_sql("VACUUM ANALYZE")
    engine.dispose()
    yield cluster.url_of(name)
    cluster.drop(name)


def plan(url: str, statement: str, values: dict[str, Any]) -> str:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        rows = connection.execute(text(f"EXPLAIN {statement}"), values).scalars().all()
    engine.dispose()
    return "\n".join(rows)


def reads_all(plan: str) -> bool:
    tables = ("jobs", "answers", "nlp_results", "reuse_decisions")
    return any(f"Seq Scan on {table}" in plan for table in tables)


@pytest.mark.parametrize("what", PERIODIC)
def test_no_look_reads_a_table(url: str, what: str) -> None:
    statement, values = PERIODIC[what]
    found = plan(url, statement.text, values)
    assert not reads_all(found), found


@pytest.mark.parametrize("table", ["jobs", "answers", "nlp_results", "reuse_decisions"])
def test_retention_finds_the_old_by_an_index(url: str, table: str) -> None:
    ((found, which),) = [each for each in erasure._too_old(_OLD) if each[0].name == table]
    key = list(found.primary_key.columns)
    group = select(*key).where(found.c.namespace == "big", *which).limit(5000)
    statement = delete(found).where(tuple_(*key).in_(group))
    said = statement.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
    shown = plan(url, str(said).replace(":", "\\:"), {})
    assert f"ix_{table}_namespace_created_at" in shown, shown
    assert not reads_all(shown), shown


def test_what_reads_a_table_is_seen(url: str) -> None:
    assert reads_all(plan(url, eviction._PURGE["analyses"].text, {"limit": 1}))


def test_an_index_whose_making_was_cut_short_is_made_anew(empty_database_url: str) -> None:
    schema_upgrade.upgrade(empty_database_url, revision="0006")
    engine = create_engine(empty_database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("CREATE INDEX ix_answers_namespace_created_at ON answers (model)"))
    schema_upgrade.upgrade(empty_database_url)
    with engine.begin() as connection:
        made = "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_answers_namespace_created_at'"
        assert "(namespace, created_at)" in (connection.scalar(text(made)) or "")
    engine.dispose()
