"""`Database`: a pool of connections to Postgres, and the edge where its errors become ours."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import orjson
from psycopg import errors as pg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from schema.errors import ConfigurationError, DatabaseUnavailableError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncConnection

_DRIVER = "postgresql+psycopg"
_SCHEMES = {"postgresql", "postgres", "postgresql+psycopg"}

# Iterative scans make a filtered search go on until it has found enough; "relaxed" gives them
# nearly in order, and the query sorts them again. The bound on tuples keeps a search for what is
# not there from reading the whole graph. How wide it is, `workers.store.neighbours` says.
_SESSION = (
    "SET hnsw.iterative_scan = 'relaxed_order'",
    "SET hnsw.max_scan_tuples = 40000",
    "SET timezone = 'UTC'",
    # A plan kept from when a table was small reads all of it when it has grown, and one for any
    # parameters cannot use what is known of these; a new plan costs a tenth of a millisecond.
    "SET plan_cache_mode = force_custom_plan",
)


def parse_url(database_url: str) -> URL:
    """Read a database address.

    Args:
        database_url: Such as ``postgresql://user:password@host:5432/name``.

    Returns:
        The address, for psycopg 3. Its `str` hides the password.

    Raises:
        ConfigurationError: It is no address of a Postgres database. The message does not repeat
            it, since it may hold a password.
    """
    try:
        url = make_url(database_url)
    except (exc.ArgumentError, ValueError):
        msg = (
            "the database address cannot be read; give one such as "
            "postgresql://user:password@host:5432/name"
        )
        raise ConfigurationError(msg) from None
    if "@" in (url.host or ""):
        msg = "the database address cannot be read: write an @ of the password as %40"
        raise ConfigurationError(msg)
    if url.drivername not in _SCHEMES:
        msg = f"the database address begins with {url.drivername}://; only postgresql:// works"
        raise ConfigurationError(msg)
    return url.set(drivername=_DRIVER)


def place(url: URL) -> str:
    """Name a database for people: host, port and name, without user and password.

    Args:
        url: From `parse_url`.

    Returns:
        Such as ``localhost:5432/promptmill``.
    """
    host = url.host or url.query.get("host") or "the local socket"
    if not isinstance(host, str):
        host = host[0]
    return f"{host}{f':{url.port}' if url.port else ''}/{url.database or ''}"


@contextmanager
def errors_become_ours(url: URL) -> Iterator[None]:
    """Turn the driver's errors into promptmill's.

    Args:
        url: The database, to be named in the message.

    Yields:
        Nothing.

    Raises:
        DatabaseUnavailableError: Postgres is away, broke off, or had no connection free.
        ConfigurationError: The tables are missing, or of another version; or the role has not the
            right to do it.
        InvalidRequestError: A value is of a kind that Postgres cannot hold.
    """
    try:
        yield
    except exc.TimeoutError as error:
        msg = f"no connection to Postgres at {place(url)} came free in time"
        raise DatabaseUnavailableError(msg) from error
    except exc.DBAPIError as error:
        cause = error.orig
        if isinstance(cause, (pg.UndefinedTable, pg.UndefinedColumn)):
            msg = (
                f"the tables at {place(url)} are missing or of another version; "
                "run `promptmill db upgrade`"
            )
            raise ConfigurationError(msg) from error
        if isinstance(cause, (pg.InsufficientPrivilege, pg.ReadOnlySqlTransaction)):
            msg = (
                f"this role may not do that at {place(url)} ({cause.diag.message_primary}); "
                "deploy/postgres/roles.sql says who may do what"
            )
            raise ConfigurationError(msg) from error
        if isinstance(error, exc.DataError):
            msg = f"Postgres cannot hold a value ({type(cause).__name__})"
            raise InvalidRequestError(msg) from error
        if error.connection_invalidated or isinstance(
            error, (exc.OperationalError, exc.InterfaceError)
        ):
            msg = f"Postgres at {place(url)} cannot be used now ({type(cause).__name__})"
            raise DatabaseUnavailableError(msg) from error
        raise


class Database:
    """A pool of connections to one Postgres database.

    It belongs to the event loop that first uses it.

    Args:
        url: Address of the database.
        pool_size: Connections kept open.
        pool_timeout_s: Seconds to wait for a free connection.
        connect_timeout_s: Seconds that opening a connection may take.
        statement_timeout_s: Seconds after which Postgres ends a statement.
        prepare: Whether statements are prepared. Off behind a pooler that mixes sessions.

    Raises:
        ConfigurationError: The address cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 8,
        pool_timeout_s: float = 10.0,
        connect_timeout_s: float = 5.0,
        statement_timeout_s: float = 60.0,
        prepare: bool = True,
    ) -> None:
        self._url = parse_url(url)
        self._statement_timeout_ms = int(statement_timeout_s * 1000)
        self._engine = create_async_engine(
            self._url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=pool_timeout_s,
            pool_recycle=1800,
            # Prompts are parameters: they must not show in errors or logs.
            hide_parameters=True,
            json_serializer=lambda value: orjson.dumps(value).decode(),
            json_deserializer=orjson.loads,
            connect_args={
                "connect_timeout": max(1, int(connect_timeout_s)),
                "application_name": "promptmill",
                "prepare_threshold": 3 if prepare else None,
                # A host that vanished is noticed in seconds, not in the kernel's two hours.
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 20_000,
            },
        )
        self._each_by_itself = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        event.listen(self._engine.sync_engine, "connect", self._set_up)

    def __repr__(self) -> str:
        """Name the place alone: user and password stay out of logs."""
        return f"Database({place(self._url)})"

    @property
    def place(self) -> str:
        """Host, port and name, for people; neither user nor password."""
        return place(self._url)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection for several statements that hold together.

        Yields:
            The connection. Leaving commits; an error, or a cancellation, rolls back.

        Raises:
            DatabaseUnavailableError: Postgres is away, broke off, or had no connection free.
            ConfigurationError: The tables are missing, or of another version.
            InvalidRequestError: A value is of a kind that Postgres cannot hold.
        """
        with errors_become_ours(self._url):
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection on which each statement is a transaction of its own.

        It saves the two round trips that begin and commit cost.

        Yields:
            The connection.

        Raises:
            DatabaseUnavailableError: Postgres is away, broke off, or had no connection free.
            ConfigurationError: The tables are missing, or of another version.
            InvalidRequestError: A value is of a kind that Postgres cannot hold.
        """
        with errors_become_ours(self._url):
            async with self._each_by_itself.connect() as connection:
                yield connection

    async def aclose(self) -> None:
        """Close every connection; idempotent."""
        await self._engine.dispose()

    def _set_up(self, connection: Any, _record: object) -> None:
        # As text, every quote in an array of JSON documents would be escaped, by a regular
        # expression: that took more time than all the rest of a group of writes.
        connection.driver_connection.adapters.register_dumper(list, ListBinaryDumper)
        cursor = connection.cursor()
        try:
            for statement in _SESSION:
                cursor.execute(statement)
            cursor.execute(f"SET statement_timeout = {self._statement_timeout_ms}")
            # A process stopped in the middle of a transaction must not keep its locks for ever.
            cursor.execute("SET idle_in_transaction_session_timeout = '30s'")
        finally:
            cursor.close()
        connection.commit()
