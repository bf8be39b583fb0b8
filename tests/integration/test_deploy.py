"""The secrets, roles and users of a deployment, tried on real servers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege, ReadOnlySqlTransaction
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError
from sqlalchemy import text
from sqlalchemy.engine import make_url

from schema import names
from schema.errors import ConfigurationError
from tests.integration.test_client import PlayedWorker
from workers import AsyncJobClient, Settings, health, windows
from workers.app import make_app
from workers.connection import open_redis
from workers.data_loss import DataLoss
from workers.dispatch import Dispatcher
from workers.purge import purge
from workers.queue_marks import shine
from workers.sending import Sender
from workers.servers import postgres_folder, valkey_binary
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.locks import DISPATCH, leading
from workers.stranded import Stranded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPLOY = Path(__file__).parents[2] / "deploy"
ROLES = ("worker", "producer", "reader")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that deploy/make-secrets.sh makes."""
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run(["sh", DEPLOY / "make-secrets.sh", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def redis_url(secrets: Path) -> Iterator[Callable[[str], str]]:
    """Address, for a role, of a Valkey that knows the users of users.acl only."""
    path = secrets.parent / "valkey.sock"
    command: list[str | Path] = [valkey_binary(), "--port", "0", "--unixsocket", path, "--save", ""]
    command += ["--aclfile", secrets / "valkey-users.acl"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 30
    while not answers(path):
        assert server.poll() is None, server.stdout and server.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)

    def url(role: str) -> str:
        password = (secrets / f"valkey-{role}-password").read_text()
        return f"unix://promptmill_{role}:{password}@{quote(str(path))}"

    yield url
    server.terminate()
    server.wait(30)


def answers(path: Path) -> bool:
    """Ask as the health check does: without a name."""
    try:
        return bool(Redis(unix_socket_path=str(path)).ping())
    except RedisError:
        return False


@pytest.fixture
def role_url(database_url: str, secrets: Path) -> Callable[[str], str]:
    """Address of a migrated database for a role; run twice, for the second must change nothing."""
    for _ in range(2):
        command = [str(postgres_folder() / "psql"), "-Xq", "-d", database_url]
        for role in ROLES:
            password = (secrets / f"postgres-{role}-password").read_text()
            command += ["-v", f"{role}={password}"]
        subprocess.run(
            [*command, "-f", DEPLOY / "postgres/roles.sql"], check=True, capture_output=True
        )
    url = make_url(database_url)
    return lambda role: url.set(username=f"promptmill_{role}").render_as_string(hide_password=False)


def settings_for(role: str, redis_url: Callable[[str], str], role_url: Callable[[str], str]):
    return Settings(
        database_url=SecretStr(role_url(role)),
        redis_url=SecretStr(redis_url(role)),
        served_model_name="m",
    )


async def test_each_role_can_do_its_work(
    redis_url: Callable[[str], str], role_url: Callable[[str], str]
):
    database = Database(role_url("worker"))
    redis = open_redis(redis_url("worker"))
    worker = PlayedWorker(redis, JobStore(database), "m")
    async with (
        AsyncJobClient(settings_for("producer", redis_url, role_url)) as producer,
        AsyncJobClient(settings_for("reader", redis_url, role_url)) as reader,
    ):
        job, other = await producer.submit_many(["hello", "never mind"])
        assert await producer.cancel(other)
        await worker.run()
        assert (await producer.result(job, 30)).text == "HELLO"
        assert (await reader.result(job, 30)).text == "HELLO"
        seen = set()
        async for delivery in await reader.results("default", "group", "member"):
            seen.add(delivery.result.job_id)
            if seen == {job.id, other.id}:
                break
        assert await producer.retry(other) == [other.id]
        assert len(await reader.jobs()) == 2
    await redis.aclose()
    await database.aclose()


async def test_a_worker_may_dispatch_and_purge(
    redis_url: Callable[[str], str], role_url: Callable[[str], str]
):
    database, redis = Database(role_url("worker")), open_redis(redis_url("worker"))
    settings = settings_for("producer", redis_url, role_url)
    settings = settings.model_copy(update={"namespace_window": None, "namespace": "dispatched"})
    await windows.announce(redis, {"m": 2})
    async with AsyncJobClient(settings) as producer:
        await producer.submit_many(["1", "2", "3", "4", "5"])
        sender = Sender(await producer.connection(), settings)
        dispatcher = Dispatcher(
            database=database, redis=redis, send=sender.push, weights={}, window=4
        )
        async with leading(database, DISPATCH) as connection:
            assert connection is not None
            assert await dispatcher.run_once(connection) == 1  # beyond the window of two
    done = await purge(database, redis, "dispatched")
    assert done.clean
    assert done.deleted["jobs"] == 5
    assert done.deleted["messages"] >= 1
    await redis.aclose()
    await database.aclose()


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("worker", "DROP TABLE jobs"),
        ("worker", "CREATE TABLE t ()"),
        ("worker", "UPDATE alembic_version SET version_num = ''"),
        ("producer", "SELECT FROM answers"),
        ("producer", "SELECT FROM nlp_results"),
        ("producer", "DELETE FROM jobs"),
        ("producer", "CREATE TEMP TABLE t ()"),
        ("reader", "DELETE FROM jobs"),
        ("reader", "SET default_transaction_read_only = off; UPDATE answers SET hits = 0"),
    ],
)
def test_postgres_refuses(role: str, statement: str, role_url: Callable[[str], str]):
    with (
        psycopg.connect(role_url(role), autocommit=True) as connection,
        pytest.raises((InsufficientPrivilege, ReadOnlySqlTransaction)),
    ):
        connection.execute(statement)


@pytest.mark.parametrize(("role", "says"), [("reader", "read-only"), ("worker", "denied")])
async def test_whoever_may_not_is_told_where_that_is_decided(
    role: str, says: str, role_url: Callable[[str], str]
):
    database = Database(role_url(role))
    with pytest.raises(ConfigurationError, match=rf"{says}.*deploy/postgres/roles\.sql"):
        async with database.transaction() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = ''"))
    await database.aclose()


def test_tables_of_later_revisions_are_covered(database_url: str, role_url: Callable[[str], str]):
    with psycopg.connect(
        make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    ) as owner:
        owner.execute("CREATE TABLE later (n integer)")
    with psycopg.connect(role_url("worker")) as worker:
        worker.execute("INSERT INTO later VALUES (1)")
    with psycopg.connect(role_url("reader")) as reader:
        assert reader.execute("SELECT n FROM later").fetchall() == [(1,)]


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("worker", "FLUSHALL"),
        ("worker", "CONFIG SET appendonly no"),
        ("producer", "RPOP promptmill.m"),
        ("producer", "LRANGE promptmill.m 0 -1"),
        ("producer", "DEL promptmill.m"),
        ("producer", "SET promptmill:epoch 1"),
        ("producer", "XADD tokens:default:1 * t x"),
        ("producer", "KEYS *"),
        ("reader", "LPUSH promptmill.m x"),
        ("reader", "XADD results:default:default * result x"),
        ("reader", "PUBLISH promptmill:cancel x"),
        ("default", "GET promptmill:epoch"),
        ("default", "INFO"),
    ],
)
def test_redis_refuses(role: str, command: str, redis_url: Callable[[str], str], secrets: Path):
    if role == "default":
        client = Redis(unix_socket_path=str(secrets.parent / "valkey.sock"))
    else:
        client = Redis.from_url(redis_url(role))
    with client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split(" "))


async def test_a_worker_may_look_after_what_redis_loses(
    redis_url: Callable[[str], str], role_url: Callable[[str], str]
):
    database, redis = Database(role_url("worker")), open_redis(redis_url("worker"))
    jobs = JobStore(database)
    loss = DataLoss(redis, jobs, keep_s=60)
    for _ in range(2):
        assert await loss.heed() == 0
    assert (await jobs.known_redis()).server is not None
    assert await redis.get(names.MOMENT) is not None
    assert await Stranded(redis, jobs, max_attempts=3).adopt() == 0
    await redis.delete(names.EPOCH, names.MOMENT)
    await redis.aclose()
    await database.aclose()


def test_celery_comes_in_by_user_and_password(redis_url: Callable[[str], str]):
    with make_app(Settings(), redis_url("worker"), "m").connection_for_write() as connection:
        assert connection.ensure_connection(max_retries=1).default_channel.client.ping()


def test_a_second_call_keeps_the_secrets(secrets: Path):
    before = {file.name: file.read_bytes() for file in secrets.iterdir()}
    subprocess.run(["sh", DEPLOY / "make-secrets.sh", secrets], check=True, capture_output=True)
    assert {file.name: file.read_bytes() for file in secrets.iterdir()} == before
    assert secrets.stat().st_mode & 0o077 == 0
    passwords = [content for name, content in before.items() if name.endswith("-password")]
    assert len(set(passwords)) == len(passwords) == 8
    assert all(len(password) == 48 for password in passwords)


async def test_a_container_is_healthy_while_its_worker_says_so(
    redis_url: Callable[[str], str], role_url: Callable[[str], str]
):
    settings = settings_for("worker", redis_url, role_url)
    redis = open_redis(redis_url("worker"))
    await shine(redis, "m@elsewhere:1", {"host": "elsewhere", "models": ["m"]})
    assert await health.workers_here(settings) == []
    await shine(redis, "m@here:2", {"host": socket.gethostname(), "models": ["m"]})
    assert await health.workers_here(settings) == ["m@here:2"]
    await redis.aclose()


@pytest.mark.parametrize(("who", "status"), [("nobody", 1), (socket.gethostname(), 0)])
def test_the_health_check_says_so_by_its_exit_status(
    who: str, status: int, redis_url: Callable[[str], str], secrets: Path
):
    url = redis_url("worker")
    with Redis.from_url(url) as redis:
        for key in redis.scan_iter(names.worker_key("*@*")):
            redis.delete(key)
        redis.set(names.worker_key("m@h:1"), json.dumps({"host": who}), ex=60)
    done = subprocess.run(
        [sys.executable, "-m", "workers.health"],
        env={"PATH": os.environ["PATH"], "PROMPTMILL_REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done


async def test_settings_in_files_reach_the_command(tmp_path: Path):
    (tmp_path / "PROMPTMILL_REDIS_URL").write_text("redis://user:a b$(c)'\"@host/0\n")
    (tmp_path / "PROMPTMILL_MODEL").write_text("from-file")
    (tmp_path / "OTHER").write_text("x")
    show = 'printf "%s|" "$PROMPTMILL_REDIS_URL" "$PROMPTMILL_MODEL" "${OTHER-unset}" "$1"'
    process = await asyncio.create_subprocess_exec(
        "sh", DEPLOY / "with-secrets.sh", "sh", "-c", show, "sh", "an argument",
        env={"PATH": "/usr/bin:/bin", "PROMPTMILL_SECRETS_DIR": str(tmp_path),
             "PROMPTMILL_MODEL": "from-environment"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, _ = await process.communicate()
    expected = "redis://user:a b$(c)'\"@host/0|from-environment|unset|an argument|"
    assert printed.decode() == expected
