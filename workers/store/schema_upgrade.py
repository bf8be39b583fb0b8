"""Brings a database to the newest revision, and says which one it is at."""

from __future__ import annotations

import time
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from schema.errors import ConfigurationError, DatabaseUnavailableError
from workers.store.database import errors_become_ours, parse_url, place

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Key of the advisory lock that one upgrade at a time holds.
_UPGRADE_LOCK = 0x70726F6D70746D01
_TRY_FOR_S = 600
_TRY_EVERY_S = 0.1
_TRY = text("SELECT pg_try_advisory_lock(CAST(:key AS bigint))")
_UNLOCK = text("SELECT pg_advisory_unlock(CAST(:key AS bigint))")


def upgrade(database_url: str, *, revision: str = "head") -> None:
    """Bring the tables to a revision; nothing happens where they are there already.

    Several processes may call this at once: one works, the others wait for it.

    Args:
        database_url: Address of the database, which must exist.
        revision: Where to go; the newest unless told.

    Raises:
        DatabaseUnavailableError: Postgres cannot be reached, or another process takes very long.
        ConfigurationError: The address cannot be read.
    """
    with _locked(database_url) as connection:
        command.upgrade(_config(connection), revision)
        connection.commit()


def downgrade(database_url: str, *, revision: str = "base") -> None:
    """Take the tables back to an older revision; what they held is lost.

    Args:
        database_url: Address of the database.
        revision: Where to go; ``base`` removes every table.

    Raises:
        DatabaseUnavailableError: Postgres cannot be reached.
        ConfigurationError: The address cannot be read.
    """
    with _locked(database_url) as connection:
        command.downgrade(_config(connection), revision)
        connection.commit()


def current(database_url: str) -> str | None:
    """Return the revision a database is at, or None when it has no tables of ours.

    Args:
        database_url: Address of the database.

    Returns:
        The revision's id.

    Raises:
        DatabaseUnavailableError: Postgres cannot be reached.
        ConfigurationError: The address cannot be read.
    """
    with _connect(database_url) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def refuse_older(database_url: str) -> None:
    """Refuse tables that are missing, or of an older revision than this installation's.

    Newer ones are let pass, for migrations only expand; and so is a database that cannot be reached
    now, for whoever uses it waits for it, and one that does not tell this role.

    Args:
        database_url: Address of the database.

    Raises:
        ConfigurationError: They have to be upgraded first.
    """
    try:
        found = current(database_url)
    except DatabaseUnavailableError:
        return
    except ConfigurationError as exc:
        if isinstance(getattr(exc.__cause__, "orig", None), InsufficientPrivilege):
            return
        raise
    if found == head() or (found is not None and found not in revisions()):
        return
    state = "missing" if found is None else f"at revision {found}, and {head()} is needed"
    where = place(parse_url(database_url))
    raise ConfigurationError(f"the tables at {where} are {state}; run `promptmill db upgrade`")


def head() -> str:
    """Return the newest revision that this installation knows."""
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    if newest is None:  # the package was built without its revisions
        msg = "this installation of promptmill holds no migrations"
        raise RuntimeError(msg)
    return newest


def revisions() -> frozenset[str]:
    """Return all revisions that this installation knows."""
    scripts = ScriptDirectory.from_config(_config())
    return frozenset(script.revision for script in scripts.walk_revisions())


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    # Found as a package, so that it works from a wheel as from a checkout.
    config.set_main_option("script_location", str(resources.files("migrations")))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


@contextmanager
def _connect(database_url: str) -> Iterator[Connection]:
    url = parse_url(database_url)
    engine = create_engine(
        url,
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"connect_timeout": 10, "application_name": "promptmill upgrade"},
    )
    try:
        with errors_become_ours(url), engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _locked(database_url: str) -> Iterator[Connection]:
    with _connect(database_url) as connection:
        connection.execute(text(f"SET lock_timeout = '{_TRY_FOR_S}s'"))
        connection.commit()
        _take_turn(connection)
        try:
            yield connection
        except BaseException:
            connection.rollback()
            raise
        finally:
            if not connection.closed and not connection.invalidated:
                connection.execute(_UNLOCK, {"key": _UPGRADE_LOCK})
                connection.commit()


def _take_turn(connection: Connection) -> None:
    # Asked again and again: an index that is made concurrently waits for every statement that is
    # under way, and one that waits for the lock would never end.
    until = time.monotonic() + _TRY_FOR_S
    while True:
        mine = connection.scalar(_TRY, {"key": _UPGRADE_LOCK})
        connection.commit()
        if mine:
            return
        if time.monotonic() > until:
            msg = f"another process has been changing the tables for {_TRY_FOR_S} s"
            raise DatabaseUnavailableError(msg)
        time.sleep(_TRY_EVERY_S)
