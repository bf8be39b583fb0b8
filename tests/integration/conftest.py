"""Databases for tests: each gets its own, cloned from one that was migrated once."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
import redis
from psycopg import sql
from sqlalchemy.engine import make_url

from workers.local import LocalStack
from workers.store import schema_upgrade
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.jobs import JobStore

_numbers = itertools.count()


class Cluster:
    """The server that test databases are made on."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url).set(drivername="postgresql")

    def url_of(self, name: str) -> str:
        """Address of a database on this server."""
        return self._url.set(database=name).render_as_string(hide_password=False)

    def create(self, *, template: str | None = None) -> str:
        """Make a database, empty or as a copy; return its name."""
        name = f"test_{os.getpid()}_{next(_numbers)}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(template or "template0")
        )
        with self._admin() as connection:
            connection.execute(statement)
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        with self._admin() as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )

    @contextlib.contextmanager
    def _admin(self) -> Iterator[psycopg.Connection]:
        url = self._url.render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            yield connection


@pytest.fixture(scope="session")
def cluster(stack: LocalStack) -> Cluster:
    """The Postgres server of this test run."""
    return Cluster(stack.database_url)


@pytest.fixture(scope="session")
def migrated_template(cluster: Cluster) -> Iterator[str]:
    """Name of a database with all tables and no rows."""
    name = cluster.create()
    schema_upgrade.upgrade(cluster.url_of(name))
    yield name
    cluster.drop(name)


@pytest.fixture
def empty_database_url(cluster: Cluster) -> Iterator[str]:
    """Address of a database without any tables."""
    name = cluster.create()
    yield cluster.url_of(name)
    cluster.drop(name)


@pytest.fixture
def database_url(cluster: Cluster, migrated_template: str) -> Iterator[str]:
    """Address of a migrated database of this test's own."""
    name = cluster.create(template=migrated_template)
    yield cluster.url_of(name)
    cluster.drop(name)


@pytest.fixture
def own_redis_url(stack: LocalStack) -> Iterator[str]:
    """Address of an empty database of the stack's Valkey, of this test's own.

    A worker takes care of messages that dead ones hold. On the database that all tests share those
    are of other tests, whose jobs would get rows in this test's Postgres database.
    """
    url = f"{stack.redis_url}?db=7"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database of this test's own."""
    database = Database(database_url)
    yield database
    await database.aclose()


@pytest.fixture
def job_store(database: Database) -> JobStore:
    """The job store on this test's database."""
    return JobStore(database)


@pytest.fixture
def answer_store(database: Database) -> PostgresAnswers:
    """The store of answers on this test's database."""
    return PostgresAnswers(database)
