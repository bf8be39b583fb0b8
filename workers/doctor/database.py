"""Looks at Postgres: version, pgvector, tables, indexes, clock, room for connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors as pg

from workers.doctor.findings import Check, error, ok, skipped, warning
from workers.store.database import parse_url, place

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

_OLDEST_POSTGRES = 140000
_OLDEST_VECTOR = (0, 8)
_CONNECT_S = 5
_STATEMENT_S = 20
_SKEW_WARNING_S = 2.0
_SKEW_ERROR_S = 30.0
_UPGRADE = "run `promptmill db upgrade`"
_SPARE_CONNECTIONS = 20  # two workers' worth

Query = Callable[[str], list[tuple[Any, ...]]]


def examine(database_url: str) -> Iterator[Check]:
    """Look at the database.

    Args:
        database_url: Its address.

    Yields:
        Findings. A role that may not look at something gets a finding that says so.
    """
    url = parse_url(database_url)
    try:
        connection = psycopg.connect(
            url.set(drivername="postgresql").render_as_string(hide_password=False),
            autocommit=True,
            connect_timeout=_CONNECT_S,
            application_name="promptmill doctor",
            options=f"-c statement_timeout={_STATEMENT_S}s",
        )
    except psycopg.OperationalError as exc:
        yield _away(url, exc)
        return
    with connection:

        def query(statement: str) -> list[tuple[Any, ...]]:
            return connection.execute(statement.encode()).fetchall()

        for name, check in CHECKS.items():
            try:
                yield from check(query)
            except pg.InsufficientPrivilege:
                yield skipped(name, "this role may not look at it")


def waiting_jobs(database_url: str) -> dict[str, int]:
    """Return how many jobs wait, by model; empty where that cannot be asked.

    Args:
        database_url: Address of the database.
    """
    url = parse_url(database_url).set(drivername="postgresql")
    try:
        with psycopg.connect(
            url.render_as_string(hide_password=False), connect_timeout=_CONNECT_S
        ) as connection:
            statement = "SELECT model, count(*) FROM jobs WHERE state = 'queued' GROUP BY model"
            return dict(connection.execute(statement).fetchall())
    except psycopg.Error:
        return {}  # said elsewhere


def _away(url: URL, exc: psycopg.OperationalError) -> Check:
    where = place(url)
    said = (str(exc).strip().splitlines() or [type(exc).__name__])[-1].rpartition("FATAL:")[2]
    if "password" in said or "authentication" in said or "role" in said:
        remedy = "mend user and password in PROMPTMILL_DATABASE_URL"
    elif "does not exist" in said:
        remedy = "make the database, then run `promptmill db upgrade`"
    else:
        remedy = "start it, or mend PROMPTMILL_DATABASE_URL; nothing can be submitted until then"
    return error("postgres", f"{where} cannot be used: {said.strip()}", remedy)


def _server(query: Query) -> Iterator[Check]:
    ((number, version),) = query(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version')"
    )
    if number < _OLDEST_POSTGRES:
        yield error("postgres", f"PostgreSQL {version} is too old", "use PostgreSQL 14 or newer")
    else:
        yield ok("postgres", f"PostgreSQL {version}")


def _read_only(query: Query) -> Iterator[Check]:
    ((standby, read_only),) = query(
        "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')"
    )
    if standby:
        remedy = "name the primary server in PROMPTMILL_DATABASE_URL"
        yield error("writable", "this server is a standby and takes no writes", remedy)
    elif read_only == "on":
        yield warning("writable", "this role reads only", "submit and work with another role")
    else:
        yield ok("writable", "it takes writes")


def _vector(query: Query) -> Iterator[Check]:
    rows = query(
        "SELECT installed_version, default_version FROM pg_available_extensions "
        "WHERE name = 'vector'"
    )
    if not rows:
        remedy = "install pgvector 0.8 or newer on the server"
        yield error("pgvector", "the server does not have it", remedy)
        return
    installed, newest = rows[0]
    if installed is None:
        remedy = f"{_UPGRADE} as a role that may create extensions"
        yield error("pgvector", f"{newest} is there, and not switched on here", remedy)
    elif _version(installed) >= _OLDEST_VECTOR:
        yield ok("pgvector", f"pgvector {installed}")
    elif _version(newest) >= _OLDEST_VECTOR:
        remedy = "run ALTER EXTENSION vector UPDATE"
        yield error("pgvector", f"{installed} is in use, {newest} is installed", remedy)
    else:
        remedy = "install pgvector 0.8 or newer: older ones miss neighbours of a namespace"
        yield error("pgvector", f"{installed} is too old", remedy)


def _migrations(query: Query) -> Iterator[Check]:
    from workers.store import schema_upgrade

    known, head = schema_upgrade.revisions(), schema_upgrade.head()
    try:
        rows = query("SELECT version_num FROM alembic_version")
    except pg.UndefinedTable:
        rows = []
    current = rows[0][0] if rows else None
    if current == head:
        yield ok("migrations", f"at revision {head}, the newest")
    elif current is None:
        yield error("migrations", "the tables are missing", _UPGRADE)
    elif current in known:
        yield error("migrations", f"at revision {current}; the newest is {head}", _UPGRADE)
    else:
        remedy = "upgrade promptmill here too: a newer one has changed the tables"
        yield warning("migrations", f"at revision {current}, which is newer than {head}", remedy)


def _indexes(query: Query) -> Iterator[Check]:
    from schema.tables import Base

    rows = query(
        "SELECT c.relname, i.indisvalid AND i.indisready FROM pg_index i "
        "JOIN pg_class c ON c.oid = i.indexrelid "
        "WHERE c.relnamespace = 'public'::regnamespace"
    )
    valid: dict[str, bool] = dict(rows)
    if not valid:
        yield skipped("indexes", "there are no tables")
        return
    for name in sorted(name for name, usable in valid.items() if not usable):
        remedy = f"run REINDEX INDEX CONCURRENTLY {name}"
        yield error("indexes", f"{name} is not valid, and is not used", remedy)
    wanted = {str(index.name) for table in Base.metadata.tables.values() for index in table.indexes}
    missing = sorted(wanted - valid.keys())
    for name in missing:
        remedy = f"{_UPGRADE}; if it is at its newest, make the index again as schema/tables.py has"
        yield warning("indexes", f"{name} is missing", remedy)
    if all(valid.values()) and not missing:
        yield ok("indexes", f"{len(valid)} are valid")


def _clock(query: Query) -> Iterator[Check]:
    before = time.time()
    ((theirs,),) = query("SELECT extract(epoch FROM clock_timestamp())::float8")
    yield clock("Postgres", theirs, before, time.time())


def clock(whose: str, theirs: float, before: float, after: float) -> Check:
    """Compare a server's clock with this machine's.

    Args:
        whose: The server.
        theirs: Its time, in Unix seconds.
        before: Ours before it was asked.
        after: Ours after it had answered.
    """
    skew = theirs - min(max(theirs, before), after)  # what the round trip cannot explain
    name, found = f"clock ({whose})", f"{abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    remedy = "keep time on both machines (chrony, systemd-timesyncd): deadlines and ages rest on it"
    if abs(skew) >= _SKEW_ERROR_S:
        return error(name, found, remedy)
    if abs(skew) >= _SKEW_WARNING_S:
        return warning(name, found, remedy)
    return ok(name, "agrees with this machine's")


def _connections(query: Query) -> Iterator[Check]:
    ((most, used),) = query(
        "SELECT current_setting('max_connections')::int, "
        "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
    )
    found = f"{used} of {most} are open"
    if most - used < _SPARE_CONNECTIONS:
        remedy = "raise max_connections, or put a pooler before Postgres: a worker opens up to 10"
        yield warning("connections", found, remedy)
    else:
        yield ok("connections", found)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(".")[:2] if word.isdigit())


CHECKS: dict[str, Callable[[Query], Iterator[Check]]] = {
    "postgres": _server,
    "writable": _read_only,
    "pgvector": _vector,
    "migrations": _migrations,
    "indexes": _indexes,
    "clock (Postgres)": _clock,
    "connections": _connections,
}
