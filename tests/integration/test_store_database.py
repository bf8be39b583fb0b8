"""The edge to Postgres: its errors become ours, and nothing secret passes."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy import text

from schema.errors import ConfigurationError, DatabaseUnavailableError
from tests.integration.builders import admit, number, spec
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.locks import only_one

PASSWORD = "hush-hush"


async def test_a_server_that_is_away_is_said_without_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    database = Database(f"postgresql://me:{PASSWORD}@127.0.0.1:1/none?application_name=x")
    with pytest.raises(DatabaseUnavailableError, match=r"127\.0\.0\.1:1/none") as caught:
        await JobStore(database).counts()
    await database.aclose()
    seen = f"{database!r} {database.place} {caught.value} {caught.value.__cause__} {caplog.text}"
    assert PASSWORD not in seen


@pytest.mark.parametrize("url", [f"mysql://me:{PASSWORD}@host/db", f"{PASSWORD}", ""])
def test_an_address_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(url)
    assert PASSWORD not in str(caught.value)


async def test_missing_tables_say_what_to_do(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    with pytest.raises(ConfigurationError, match="promptmill db upgrade"):
        await JobStore(database).counts()
    await database.aclose()


async def test_a_pool_that_is_empty_is_said_after_its_time(database_url: str) -> None:
    database = Database(database_url, pool_size=1, pool_timeout_s=0.05)
    async with database.connection():
        with pytest.raises(DatabaseUnavailableError, match="came free in time"):
            await JobStore(database).counts()
    await JobStore(database).counts()
    await database.aclose()


async def test_after_a_broken_connection_the_next_call_works(
    database: Database, job_store: JobStore
) -> None:
    async with database.connection() as other:
        async with database.connection() as connection:
            own = await connection.scalar(text("SELECT pg_backend_pid()"))
        ended = text(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        assert (await other.scalars(ended)).all()
        assert own
    answers = await asyncio.gather(job_store.counts(), job_store.counts(), return_exceptions=True)
    assert any(isinstance(answer, DatabaseUnavailableError) for answer in answers)
    await job_store.counts()


async def test_a_cancelled_call_gives_its_connection_back(database_url: str) -> None:
    database = Database(database_url, pool_size=1, pool_timeout_s=5)

    async def long() -> None:
        async with database.transaction() as connection:
            await connection.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(long())
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any((await JobStore(database).counts()).values())
    await database.aclose()


async def test_a_statement_that_runs_too_long_is_ended(database_url: str) -> None:
    database = Database(database_url, statement_timeout_s=0.1)
    with pytest.raises(DatabaseUnavailableError, match="QueryCanceled"):
        await number(database, "SELECT pg_sleep(60)")
    await database.aclose()


async def test_an_error_in_a_transaction_takes_all_of_it_back(
    database: Database, job_store: JobStore
) -> None:
    async def insert_and_fail() -> None:
        async with database.transaction() as connection:
            await connection.execute(
                text("INSERT INTO batches (id, namespace) VALUES (gen_random_uuid(), 'default')")
            )
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await insert_and_fail()
    assert await job_store.list_batches("default") == []


async def test_filtered_searches_go_on_until_they_have_found_enough(database: Database) -> None:
    assert await number(database, "SHOW hnsw.iterative_scan") == "relaxed_order"


async def test_without_prepared_statements_all_works_too(database_url: str) -> None:
    database = Database(database_url, prepare=False)
    store = JobStore(database)
    for _ in range(8):
        await admit(store, spec())
    assert await number(database, "SELECT count(*) FROM pg_prepared_statements") == 0
    await database.aclose()


async def test_a_lock_is_held_by_one_and_set_free_however_the_body_ends(
    database: Database,
) -> None:
    async with only_one(database, 7) as first, only_one(database, 7) as second:
        assert (first, second) == (True, False)

    async def hold_and_fail() -> None:
        async with only_one(database, 7) as held:
            assert held
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await hold_and_fail()
    async with only_one(database, 7) as held:
        assert held
