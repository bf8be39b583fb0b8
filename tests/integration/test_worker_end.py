"""A worker that cannot start says why, once, and by the code that it ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.engine import make_url

from workers.store import schema_upgrade

if TYPE_CHECKING:
    from workers.local import LocalStack

# The command, whose engine does not start. vLLM itself would be imported for many seconds.
_FAILS = """
import sys
from contextlib import asynccontextmanager
from schema import errors
from workers import cli, runtime

@asynccontextmanager
async def worker_runtime(*_, **__):
    raise {error}
    yield

runtime.worker_runtime = worker_runtime
sys.exit(cli.main(["worker"]))
"""


def run(error: str, stack: LocalStack, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _FAILS.format(error=error)],
        env={
            **os.environ,
            "PROMPTMILL_DATA_DIR": str(stack.data_dir),
            "PROMPTMILL_LOG_FORMAT": "console",
            **settings,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("error", "code"), [("errors.ConfigurationError('no')", 2), ("errors.StackError('no')", 3)]
)
def test_a_reason_of_ours_is_one_line(error: str, code: int, stack: LocalStack) -> None:
    """By code 2 `promptmill up` knows that another try would end alike."""
    done = run(error, stack)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("promptmill: ")
    assert "Traceback" not in done.stderr


def test_any_other_is_told_at_length(stack: LocalStack) -> None:
    """A supervisor that starts anew what failed must see that it did."""
    done = run("RuntimeError('the card has fallen off the bus')", stack)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\nRuntimeError: the card has fallen off the bus") == 1, done.stderr


@pytest.mark.parametrize(("revision", "says"), [(None, "are missing"), ("0001", "revision 0001")])
def test_tables_that_are_older_than_the_worker(
    stack: LocalStack, empty_database_url: str, revision: str | None, says: str
) -> None:
    """It is told before a model is loaded, and not again and again afterwards."""
    if revision is not None:
        schema_upgrade.upgrade(empty_database_url, revision=revision)
    servers = {
        "PROMPTMILL_DATABASE_URL": empty_database_url,
        "PROMPTMILL_REDIS_URL": stack.redis_url,
    }
    done = run("RuntimeError('it was started')", stack, **servers)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "promptmill db upgrade" in done.stderr
    assert "it was started" not in done.stderr


def test_tables_that_are_newer_are_let_pass(database_url: str) -> None:
    """Workers of the version before go on while their successors' tables are there."""
    url = make_url(database_url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    schema_upgrade.refuse_older(database_url)
    schema_upgrade.refuse_older("postgresql://nobody@127.0.0.1:1/none")  # it is waited for


def test_a_role_that_may_not_ask_is_let_pass(empty_database_url: str) -> None:
    schema_upgrade.upgrade(empty_database_url, revision="0001")
    url, role = make_url(empty_database_url), f"r{uuid4().hex}"
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        try:
            schema_upgrade.refuse_older(url.set(username=role).render_as_string())
        finally:
            connection.execute(f"DROP ROLE {role}".encode())
