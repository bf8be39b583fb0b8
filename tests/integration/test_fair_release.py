"""One namespace's backlog before another's job: real Postgres and Valkey, the workers played."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import orjson
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from sqlalchemy import text

from schema import names, wire
from schema.errors import BrokerUnavailableError
from tests.integration.builders import change, number
from workers import AsyncJobClient, Settings, dispatch
from workers.dispatch import Dispatcher, pause_s
from workers.local import LocalStack
from workers.sending import Sender
from workers.store import release
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.locks import DISPATCH, leading

WINDOW = 10
MANY = 120_000
HELD = "SELECT count(*) FROM jobs WHERE held AND state = 'queued' AND namespace = :namespace"


@pytest.fixture
def settings(stack: LocalStack, database_url: str) -> Settings:
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(stack.redis_url),
        served_model_name=f"m{uuid4().hex}",
        namespace_window=WINDOW,
        message_jobs=4,
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[AsyncJobClient]:
    async with AsyncJobClient(settings) as client:
        yield client


@pytest.fixture
async def make(client: AsyncJobClient, settings: Settings) -> AsyncIterator[Callable[..., Any]]:
    """Makes dispatchers on this test's servers."""
    connection = await client.connection()
    made = []

    def make(**changes: Any) -> Dispatcher:
        values: dict[str, Any] = {
            "database": connection.require_database(),
            "redis": connection.redis,
            "send": Sender(connection, settings).push,
            "weights": {},
            "window": WINDOW,
        }
        made.append(Dispatcher(**{**values, **changes}))
        return made[-1]

    yield make
    for dispatcher in made:
        await dispatcher.aclose()


class Queue:
    """What stands in the queue of a model, and a worker that claims it."""

    def __init__(self, redis: Redis, jobs: JobStore, model: str) -> None:
        self.redis, self.jobs, self.model = redis, jobs, model

    async def take(self, messages: int) -> list[str]:
        """Claim the jobs of the next messages; return the namespace of each job."""
        taken: list[str] = []
        for _ in range(messages):
            for priority in names.PRIORITIES:
                key = names.priority_list(names.queue(self.model), priority)
                if (item := await self.redis.rpop(key)) is not None:
                    assert isinstance(item, (str, bytes))
                    message = wire.decode(orjson.loads(item)["headers"][names.JOBS_HEADER])
                    claim = await self.jobs.claim(message.ids, owner="w", lease_s=60)
                    taken += [job.namespace for job in claim.jobs]
                    break
        return taken


@pytest.fixture
async def queue(client: AsyncJobClient, settings: Settings) -> Queue:
    connection = await client.connection()
    return Queue(connection.redis, connection.store("test"), str(settings.served_model_name))


async def fill(database: Database, namespace: str, model: str, jobs: int) -> None:
    """A backlog, as a submission leaves it beyond its window."""
    await change(
        database,
        "INSERT INTO jobs (id, namespace, model, channel, priority, request, held) "
        "SELECT gen_random_uuid(), :namespace, :model, 'default', 5, "
        "       CAST(:request AS jsonb), true FROM generate_series(1, :jobs)",
        namespace=namespace,
        model=model,
        jobs=jobs,
        request='{"kind": "prompt", "prompt": "x"}',
    )


async def test_beyond_the_window_jobs_wait_for_their_turn(
    client: AsyncJobClient,
    make: Callable[..., Any],
    queue: Queue,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.store.admission.QueueRoom._SHARE", 0)  # asks again after 0.25 s
    await client.submit_many([f"{at}" for at in range(35)], namespace="big")
    assert await number(database, HELD, namespace="big") == 25
    # Somebody waits, so whoever comes now takes turns too; recovery has no business with them.
    late = await client.submit("late", namespace="small")
    assert await number(database, HELD, namespace="small") == 1
    assert await queue.jobs.unsent(limit=100, older_than_s=0) == []

    dispatcher = make()
    async with leading(database, DISPATCH) as connection:
        await dispatcher.run_once(connection)
        assert await number(database, HELD, namespace="small") == 1  # the window is full
        assert await queue.take(1) == ["big"] * 4
        await dispatcher.run_once(connection)
        assert await number(database, HELD, namespace="small") == 0
        # Turns alternate; the one that "small" had no job for is handed out again next time.
        assert await number(database, HELD, namespace="big") == 23
        served = await queue.take(100)
        while await dispatcher.run_once(connection):
            served += await queue.take(100)
        served += await queue.take(100)
    assert Counter(served) == {"big": 31, "small": 1}
    assert (await late.status()).state == "running"
    # When nobody waits any more, submissions go directly again.
    await asyncio.sleep(0.3)
    await client.submit("again", namespace="small")
    assert await number(database, HELD, namespace="small") == 0
    assert await queue.take(5) == ["small"]


async def test_a_huge_backlog_keeps_nobody_waiting(
    client: AsyncJobClient, make: Callable[..., Any], queue: Queue, database: Database
) -> None:
    await fill(database, "huge", queue.model, MANY)
    await change(database, "ANALYZE jobs")
    dispatcher = make(window=200)
    async with leading(database, DISPATCH) as connection:
        for _ in range(3):
            await dispatcher.run_once(connection)
            assert set(await queue.take(20)) == {"huge"}
        await client.submit("one", namespace="small")
        await client.submit_many(["a", "b", "c"], namespace="other")
        await dispatcher.run_once(connection)
        # Behind what stood there, and before the rest of the backlog.
        assert Counter(await queue.take(200))["small"] == 1
        assert await number(database, HELD, namespace="other") == 0
        assert await number(database, HELD, namespace="huge") > MANY - 1000


async def test_no_pass_reads_the_backlog(queue: Queue, database: Database) -> None:
    await fill(database, "huge", queue.model, MANY)
    await fill(database, "small", queue.model, 2)
    await change(database, "ANALYZE jobs")
    statements: dict[Any, dict[str, Any]] = {
        release._WAITING: {},
        release._STANDING: {"model": queue.model, "bound": 1000},
        release._RELEASE: {
            "model": queue.model,
            "namespaces": ["huge", "small"],
            "counts": [50, 2],
        },
    }
    async with database.connection() as connection:
        for statement, values in statements.items():
            explained = text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.text}")
            (plan,) = (await connection.scalars(explained, values)).all()
            read = plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]
            # The table has thousands of blocks, and its index hundreds.
            assert read < 1500, plan


async def test_a_slow_pass_does_not_leave_the_queue_empty(
    make: Callable[..., Any], queue: Queue, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes to let jobs in is not waited for again, and a pause has its bound."""
    await fill(database, "huge", queue.model, 50)

    async def slow(*given: Any) -> Any:
        await asyncio.sleep(0.5)
        return await release.release(*given)

    monkeypatch.setattr(dispatch, "release", slow)
    dispatcher = make()
    async with leading(database, DISPATCH) as connection:
        began = time.monotonic()
        assert await dispatcher.run_once(connection) == 1
        took_s = time.monotonic() - began
    assert await number(database, HELD, namespace="huge") == 50 - WINDOW
    assert 0 < dispatcher._look_s <= took_s - 0.49  # without what `slow` slept
    assert pause_s(1, dispatcher._look_s) <= max(5 * dispatcher._look_s, 0.02)
    assert pause_s(1, 60.0) == 0.5
    assert pause_s(0, 0.0) == 0.1


async def test_shares_follow_the_weights(
    make: Callable[..., Any], queue: Queue, database: Database
) -> None:
    for name in ("light", "heavy"):
        await fill(database, name, queue.model, 400)
    dispatcher = make(weights={"heavy": 3.0}, window=40)
    served: Counter[str] = Counter()
    async with leading(database, DISPATCH) as connection:
        while served.total() < 300:
            await dispatcher.run_once(connection)
            served.update(await queue.take(5))
    assert 2.5 < served["heavy"] / served["light"] < 3.5


async def test_one_dispatches_and_another_takes_over(
    make: Callable[..., Any], queue: Queue, database: Database
) -> None:
    await fill(database, "a", queue.model, 30)
    first, second = make(window=4), make(window=8)
    first.start()
    async with asyncio.timeout(30):
        while await number(database, HELD, namespace="a") != 26:
            await asyncio.sleep(0.02)
        second.start()
        await asyncio.sleep(0.2)
        assert await number(database, HELD, namespace="a") == 26
        await first.aclose()
        while await number(database, HELD, namespace="a") != 22:
            await asyncio.sleep(0.02)


async def test_jobs_wait_on_while_redis_is_away(
    make: Callable[..., Any], queue: Queue, database: Database
) -> None:
    async def away(_jobs: Any) -> None:
        raise BrokerUnavailableError

    await fill(database, "a", queue.model, 30)
    async with leading(database, DISPATCH) as connection:
        with pytest.raises(BrokerUnavailableError):
            await make(send=away).run_once(connection)
        assert await number(database, HELD, namespace="a") == 30
        await make().run_once(connection)
        assert await number(database, HELD, namespace="a") == 30 - WINDOW


async def test_a_batch_run_once_more_takes_turns(
    client: AsyncJobClient, queue: Queue, database: Database
) -> None:
    jobs = await client.submit_many([f"{at}" for at in range(8)], namespace="a")
    for job in jobs:
        await job.cancel()
    await queue.take(10)
    again = await queue.jobs.retry("a", ids=[job.id for job in jobs], directly=3)
    assert sorted(job.held for job in again) == [False] * 3 + [True] * 5
    assert await number(database, HELD, namespace="a") == 5
