"""The history of the tables leads to what the models say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from schema.errors import ConfigurationError, DatabaseUnavailableError
from schema.tables import Base
from schema.views import BATCH_PROGRESS, JOB_RESULTS
from workers.store import schema_upgrade

if TYPE_CHECKING:
    from tests.integration.conftest import Cluster

_COLUMNS = """
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
           pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum)
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
         LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
      AND NOT a.attisdropped AND c.relname <> 'alembic_version'
"""
_CONSTRAINTS = """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
    FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
      AND conrelid::regclass::text <> 'alembic_version'
"""
_INDEXES = """
    SELECT tablename, indexname, indexdef FROM pg_indexes
    WHERE schemaname = 'public' AND tablename <> 'alembic_version'
"""
_VIEWS = """
    SELECT viewname, definition FROM pg_views WHERE schemaname = 'public'
"""


def _catalogue(url: str) -> list[list[tuple[object, ...]]]:
    with psycopg.connect(url) as connection:
        return [
            sorted(connection.execute(query).fetchall(), key=repr)
            for query in (_COLUMNS, _CONSTRAINTS, _INDEXES, _VIEWS)
        ]


def _engine_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def test_a_migrated_database_equals_a_fresh_one(database_url: str, empty_database_url: str) -> None:
    engine = create_engine(_engine_url(empty_database_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE EXTENSION vector"))
        Base.metadata.create_all(connection)
    engine.dispose()

    for migrated, fresh in zip(
        _catalogue(database_url), _catalogue(empty_database_url), strict=True
    ):
        assert migrated == fresh
        assert migrated


def test_views_are_made_of_what_the_models_say() -> None:
    # Importing them is what lets a fresh schema have them.
    assert all("CREATE VIEW" in view for view in (JOB_RESULTS, BATCH_PROGRESS))


def test_alembic_finds_nothing_to_change(database_url: str) -> None:
    engine = create_engine(_engine_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_upgrading_and_downgrading(empty_database_url: str) -> None:
    assert schema_upgrade.current(empty_database_url) is None
    schema_upgrade.upgrade(empty_database_url)
    assert schema_upgrade.current(empty_database_url) == schema_upgrade.head()
    schema_upgrade.upgrade(empty_database_url)

    schema_upgrade.downgrade(empty_database_url)
    assert schema_upgrade.current(empty_database_url) is None
    assert _catalogue(empty_database_url) == [[], [], [], []]

    schema_upgrade.upgrade(empty_database_url)
    assert schema_upgrade.current(empty_database_url) == schema_upgrade.head()


def test_several_upgrade_at_once(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(schema_upgrade.upgrade, empty_database_url) for _ in range(4)]:
            done.result(timeout=60)
    assert schema_upgrade.current(empty_database_url) == schema_upgrade.head()


def test_a_failed_upgrade_lets_the_next_one_in(cluster: Cluster, empty_database_url: str) -> None:
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE jobs (id int)")
        with pytest.raises(Exception, match="jobs"):
            schema_upgrade.upgrade(empty_database_url)
        assert schema_upgrade.current(empty_database_url) is None
        connection.execute("DROP TABLE jobs")
    schema_upgrade.upgrade(empty_database_url)
    assert schema_upgrade.current(empty_database_url) == schema_upgrade.head()


def test_a_server_that_is_away_is_named_without_its_password() -> None:
    with pytest.raises(DatabaseUnavailableError) as caught:
        schema_upgrade.upgrade("postgresql://me:hush-hush@127.0.0.1:1/none")
    assert "127.0.0.1:1/none" in str(caught.value)
    assert "hush-hush" not in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize("url", ["", "no address", "mysql://me:hush-hush@host/db"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        schema_upgrade.upgrade(url)
    assert "hush-hush" not in str(caught.value)
