"""One namespace tries to reach into another, in each tier beside the two stores.

What the stores refuse is tried in test_store_jobs and test_store_answers.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from schema import names, wire
from schema.errors import JobNotFoundError, ServiceError
from schema.jobs import JobSpec
from tests.integration.builders import answer, claimed, outcome, spec
from workers import AsyncJobClient, Settings
from workers.cache.memory import MemoryCache
from workers.leases import LeaseKeeper
from workers.local import LocalStack
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.jobs import JobStore

SECRET = "hunter2-never-shown"


@pytest.fixture
def settings(stack: LocalStack, database_url: str) -> Settings:
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(stack.redis_url),
        served_model_name=f"m{uuid4().hex}",
    )


def test_memory_parts_them_even_under_one_fingerprint():
    memory = MemoryCache(entries=10, max_bytes=1_000_000, ttl_s=60)
    mine = answer(namespace="mine")
    memory.put(mine)
    assert memory.get("yours", mine.fingerprint) is None
    assert memory.forget(namespace="yours") == 0
    assert memory.forget(namespace="yours", answer_ids=frozenset({mine.id})) == 0
    assert memory.get("mine", mine.fingerprint) is not None


async def test_marks_of_flights_part_them(database: Database):
    answers, fingerprint = PostgresAnswers(database), uuid4().bytes * 2
    assert await answers.mark_flight("mine", fingerprint, "w1", 60.0)
    assert await answers.mark_flight("yours", fingerprint, "w2", 60.0)
    await answers.unmark_flight("yours", fingerprint, "w1")
    assert not await answers.mark_flight("mine", fingerprint, "w3", 60.0)


async def test_a_cancellation_from_elsewhere_stops_nothing(job_store: JobStore):
    job = await claimed(job_store, spec(namespace="mine"))
    leases = LeaseKeeper(job_store, lease_s=60, heartbeat_s=20)
    running = asyncio.Event()

    async def run() -> None:
        with leases.hold(job):
            await running.wait()

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    leases.cancel([job.id], namespace="yours")
    running.set()
    await task
    assert not task.cancelled()


async def test_no_call_of_the_client_crosses(settings: Settings, job_store: JobStore):
    async with AsyncJobClient(settings) as client:
        job = await client.submit("mine", namespace="mine", stream=True, idempotency_key="k")
        yours: Any = {"namespace": "yours"}
        for call in (
            client.status(job.id, **yours),
            client.request(job.id, **yours),
            client.result(job.id, 5, **yours),
            client.cancel(job.id, **yours),
        ):
            with pytest.raises(JobNotFoundError):
                await call
        with pytest.raises(JobNotFoundError):
            async for _ in client.stream(job.id, **yours):
                pass
        assert await client.retry(job.id, **yours) == []
        assert await client.jobs(**yours) == []
        # The same key elsewhere is another job, and does not tell of the first.
        other = await client.submit("yours", namespace="yours", idempotency_key="k")
        assert other.id != job.id
        assert not other.known


async def test_channels_and_token_streams_of_one_name_are_two(
    settings: Settings, job_store: JobStore
):
    async with AsyncJobClient(settings) as client:
        channel = (await client.connection()).channel
        mine = f"mine-{uuid4().hex[:8]}"
        job = await claimed(job_store, spec(namespace=mine))
        await channel.publish([("c", outcome(job).result)])
        await channel.append_tokens(mine, job.id, [(0, 0, "secret")])
        for namespace in (f"{mine}.x", mine[:-1], "yours"):
            assert await channel.read(namespace, "c") == []
            assert await channel.read_tokens(namespace, job.id) == []
        assert len(await channel.read(mine, "c")) == 1


@pytest.mark.parametrize("name", ["a:b", "*", "a*", "", "a b", "mine:c", "a\n", "x" * 129])
def test_no_name_can_reach_into_anothers_keys(name: str):
    assert not names.is_name(name)


def test_a_message_cannot_carry_another_namespaces_job():
    job = JobSpec(namespace="yours", request=spec().request).model_dump(mode="json")
    header = {"v": 1, "namespace": "mine", "sent_at": 1.0, "jobs": [job]}
    message = wire.decode(header)
    assert message.jobs == ()
    assert "namespace" in str(message.refused[0].error)


async def test_passwords_are_in_no_error_and_no_repr(settings: Settings):
    away = settings.model_copy(
        update={
            "database_url": SecretStr(f"postgresql://u:{SECRET}@127.0.0.1:1/d"),
            "redis_url": SecretStr(f"redis://u:{SECRET}@127.0.0.1:1/0"),
        }
    )
    async with AsyncJobClient(away) as client:
        connection = await client.connection()
        shown = [repr(away), str(away), repr(connection), repr(connection.database)]
        shown += [repr(connection.endpoints), repr(client)]
        for call in (client.submit("x"), client.jobs()):
            with pytest.raises(ServiceError) as raised:
                await call
            error: BaseException | None = raised.value
            while error is not None:
                shown += [str(error), repr(error)]
                error = error.__cause__ or error.__context__
    assert not [text for text in shown if SECRET in text]
