"""Upgrading without downtime: older code on the tables of today's, beside today's code.

The older code is real: it is taken out of git, as it was when the revision before was the newest.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from alembic.script import ScriptDirectory

from tests.acceptance.faults.scripted_worker import MODEL, scripted_answer
from workers import AsyncJobClient, load_settings
from workers.store import schema_upgrade

ROOT = Path(__file__).parents[2]
JOBS = 60
_SUBMIT = """
import sys
from workers import JobClient
with JobClient.from_settings() as client:
    jobs = client.submit_many([f"{sys.argv[1]} {n}" for n in range(int(sys.argv[2]))])
    print("\\n".join(str(job.id) for job in jobs))
"""
_UPGRADE = """
import sys
from workers.store import schema_upgrade
schema_upgrade.upgrade(sys.argv[1])
print(schema_upgrade.head())
"""
_OWNERS = """
CREATE TABLE owners (name text PRIMARY KEY);
CREATE FUNCTION note_owner() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO owners VALUES (NEW.lease_owner) ON CONFLICT DO NOTHING; RETURN NULL;
END $$;
CREATE TRIGGER note_owner AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (NEW.lease_owner IS NOT NULL) EXECUTE FUNCTION note_owner();
"""


def history() -> list[str]:
    """Revisions, oldest first."""
    scripts = ScriptDirectory(str(ROOT / "migrations"))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else b""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last tree whose newest revision is not today's, and is one of today's history."""
    versions = "migrations/versions"
    today = sorted(path.name for path in (ROOT / versions).glob("0*.py"))
    archive = b""
    for commit in git("log", "--format=%H", "--", versions).decode().split():
        listed = git("ls-tree", "--name-only", commit, f"{versions}/").decode().split()
        then = sorted(path.name for path in map(Path, listed) if path.name.startswith("0"))
        if then and len(then) < len(today) and then == today[: len(then)]:
            archive = git("archive", commit)
            break
    if not archive:
        pytest.skip("the history that holds the code of the revision before is not here")
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
        tree.extractall(folder, filter="data")
    return folder


class Tree:
    """One revision of the code, used as a deployment of it would be.

    Args:
        root: Where it is.
        environment: What its processes read their settings from.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._root = root
        self._environment = {**os.environ, **environment, "PYTHONPATH": str(root)}

    async def python(self, code: str, *words: str) -> list[str]:
        """Run a program; return its lines."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, *words,
            cwd=self._root, env=self._environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(120):
            said, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return said.decode().split()

    @staticmethod
    def _said(log: Path) -> str:
        return log.read_text()[-3000:]

    @asynccontextmanager
    async def worker(self, log: Path) -> AsyncIterator[Callable[[], Awaitable[str]]]:
        """Import what a worker with a scripted engine needs.

        Yields:
            What starts it and returns its process' number.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.acceptance.faults.scripted_worker", str(log),
            cwd=self._root, env=self._environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        async def start() -> str:
            async with asyncio.timeout(240):
                assert (await stdout.readline()).startswith(b"imported"), self._said(log)
                stdin.write(b"start\n")
                word, pid = (await stdout.readline()).decode().split()[:2]
            assert word == "ready", self._said(log)
            return pid

        try:
            yield start
        finally:
            stdin.close()  # its workers are killed with it
            await process.wait()


@pytest.fixture
def environment(own_redis_url: str, empty_database_url: str) -> dict[str, str]:
    return {
        "PROMPTMILL_DATABASE_URL": empty_database_url,
        "PROMPTMILL_REDIS_URL": own_redis_url,
        "PROMPTMILL_SERVED_MODEL_NAME": MODEL,
    }


@pytest.mark.timeout(600)
async def test_old_and_new_workers_share_queue_and_tables(
    older: Path,
    environment: dict[str, str],
    empty_database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    old, new = Tree(older, environment), Tree(ROOT, environment)
    (before,) = await old.python(_UPGRADE, empty_database_url)
    assert before in history()[:-1]
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute(_OWNERS)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async with (
        old.worker(tmp_path / "old.log") as start_old,
        new.worker(tmp_path / "new.log") as start_new,
    ):
        old_pid = await start_old()
        # The tables change under a worker that has work, and under its producers.
        early = await old.python(_SUBMIT, "early", str(JOBS))
        await asyncio.to_thread(schema_upgrade.upgrade, empty_database_url)
        between = await old.python(_SUBMIT, "between", str(JOBS))
        new_pid = await start_new()
        async with AsyncJobClient(load_settings()) as client:
            for kind, ids in (("early", early), ("between", between)):
                await _all_answered(client, kind, ids)
            # Jobs of old and of new producers, until either worker has had its share.
            until = time.monotonic() + 120
            rounds = 0
            while not all(_has_worked(empty_database_url, pid) for pid in (old_pid, new_pid)):
                assert time.monotonic() < until
                rounds += 1
                mixed = await asyncio.gather(
                    old.python(_SUBMIT, f"old {rounds}", str(JOBS)),
                    new.python(_SUBMIT, f"new {rounds}", str(JOBS)),
                )
                for kind, ids in zip(("old", "new"), mixed, strict=True):
                    await _all_answered(client, f"{kind} {rounds}", ids)


async def _all_answered(client: AsyncJobClient, kind: str, ids: list[str]) -> None:
    assert len(ids) == JOBS
    for number, job in enumerate(ids):
        result = await client.result(job, 120)
        assert result.status == "done", result.error
        assert result.text == scripted_answer(f"{kind} {number}")


def _has_worked(url: str, pid: str) -> bool:
    with psycopg.connect(url) as connection:
        names = connection.execute("SELECT name FROM owners").fetchall()
    return any(name.endswith(f":{pid}") for (name,) in names)


_SHAPE = """
    SELECT c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod),
           a.attnotnull AND d.oid IS NULL AND a.attgenerated = '' AND a.attidentity = ''
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
         LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
      AND a.attnum > 0 AND NOT a.attisdropped AND c.relname <> 'alembic_version'
"""
_RULES = """
    SELECT conname, conrelid::regclass::text, pg_get_constraintdef(c.oid),
           ARRAY(SELECT attname::text FROM pg_attribute
                 WHERE attrelid = conrelid AND attnum = ANY(conkey))
    FROM pg_constraint c
    WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'u', 'f', 'p')
    UNION ALL
    SELECT i.indexrelid::regclass::text, i.indrelid::regclass::text, pg_get_indexdef(i.indexrelid),
           ARRAY(SELECT attname::text FROM pg_attribute
                 WHERE attrelid = i.indrelid AND attnum = ANY(i.indkey))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indisunique AND c.relnamespace = 'public'::regnamespace
"""


def shape(url: str) -> dict[str, dict]:
    """Columns and rules, by name."""
    with psycopg.connect(url) as connection:
        return {
            name: {row[0]: row[1:] for row in connection.execute(query).fetchall()}
            for name, query in (("columns", _SHAPE), ("rules", _RULES))
        }


@pytest.fixture
def walked(empty_database_url: str) -> list[tuple[str, dict[str, dict]]]:
    """The shape of the tables after each revision."""
    found = []
    for revision in history():
        schema_upgrade.upgrade(empty_database_url, revision=revision)
        found.append((revision, shape(empty_database_url)))
    return found


def breaches(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """What of a revision's code would fail on the tables of the next one."""
    found = []
    tables = {column.partition(".")[0] for column in before["columns"]}
    for column, (kind, _needed) in before["columns"].items():
        if column not in after["columns"]:
            found.append(f"{column} is gone: that is to contract")
        elif after["columns"][column][0] != kind:
            found.append(f"{column} is of another type")
    for column, (_kind, needed) in after["columns"].items():
        was_needed = before["columns"].get(column, (None, False))[1]
        if needed and not was_needed and column.partition(".")[0] in tables:
            found.append(f"{column} has to be written")
    for name, (table, rule, columns) in after["rules"].items():
        unchanged = before["rules"].get(name, (None, None))[1] == rule
        if not unchanged and any(f"{table}.{column}" in before["columns"] for column in columns):
            found.append(f"{name} binds what older code writes")
    return found


def test_every_migration_expands(walked: list[tuple[str, dict[str, dict]]]):
    """What a revision's code names stays, and what it writes is still accepted, in the next one."""
    assert len(walked) > 1
    for (_, before), (revision, after) in itertools.pairwise(walked):
        assert breaches(before, after) == [], revision


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("ALTER TABLE jobs DROP COLUMN priority", "jobs.priority is gone"),
        ("ALTER TABLE jobs ALTER attempts TYPE bigint", "jobs.attempts is of another type"),
        ("ALTER TABLE jobs ADD colour text NOT NULL", "jobs.colour has to be written"),
        ("ALTER TABLE jobs ADD CHECK (model <> 'x')", "binds what older code writes"),
        ("CREATE UNIQUE INDEX u ON jobs (model)", "u binds what older code writes"),
        ("ALTER TABLE jobs ADD colour text NOT NULL DEFAULT 'red'", ""),
        ("ALTER TABLE jobs ADD colour text CHECK (colour <> 'red')", ""),
        ("CREATE TABLE more (id int PRIMARY KEY); CREATE INDEX i ON jobs (model)", ""),
    ],
)
def test_one_that_does_not_is_found(database_url: str, change: str, says: str):
    with psycopg.connect(database_url, autocommit=True) as connection:
        # Views would hold on to the columns.
        views = connection.execute("SELECT viewname FROM pg_views WHERE schemaname = 'public'")
        for (view,) in views.fetchall():
            connection.execute(f"DROP VIEW {view} CASCADE".encode())
        before = shape(database_url)
        connection.execute(change.encode())
    found = breaches(before, shape(database_url))
    assert [line for line in found if says in line] if says else found == []
