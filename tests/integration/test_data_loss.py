"""A Redis that lost its data: what it had been given is sent and published again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from redis.asyncio import Redis

from schema import names
from schema.errors import ServiceError
from schema.jobs import JobState
from tests.integration.builders import admit, claimed, number, outcome, spec
from workers.channel import ResultChannel
from workers.connection import open_redis
from workers.data_loss import DataLoss
from workers.publishing import Publisher
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.outcomes import _MARK_PUBLISHED
from workers.store.records import ResultGroup

KEEP_S = 3600.0


@pytest.fixture
async def redis(own_redis_url: str) -> AsyncIterator[Redis]:
    client = open_redis(own_redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def loss(redis: Redis, job_store: JobStore) -> DataLoss:
    return DataLoss(redis, job_store, keep_s=KEEP_S)


@pytest.fixture
async def publisher(redis: Redis, job_store: JobStore) -> AsyncIterator[Publisher]:
    publisher = Publisher(ResultChannel(redis), job_store, ttl_s=KEEP_S)
    yield publisher
    await publisher.aclose()


class Deployment:
    """Ends jobs and publishes them, and reads them as a group does."""

    def __init__(self, redis: Redis, store: JobStore, publisher: Publisher) -> None:
        self.redis, self.store, self.publisher = redis, store, publisher
        self.channel = ResultChannel(redis)

    async def publish(self, channel: str = "c") -> str:
        job = await claimed(self.store, spec(channel=channel))
        finished = outcome(job)
        await self.store.finish([finished])
        deliveries = await self.store.unpublished(older_than_s=-1, limit=99)
        epoch = await self.publisher.send(deliveries)
        await self.store.mark_published(
            {each.result.job_id: each.result.token for each in deliveries}, epoch=epoch
        )
        return str(job.id)

    async def read(self, group: str, count: int, *, ack: bool = True) -> list[str]:
        consumer = self.channel.consume("default", "c", group, "only", block_s=0.1)
        found: list[str] = []
        async with asyncio.timeout(30):
            async for delivery in consumer:
                found.append(str(delivery.result.job_id))
                if ack:
                    await consumer.ack(delivery)
                if len(found) == count:
                    break
        return found

    async def unpublished(self) -> set[str]:
        late = await self.store.unpublished(older_than_s=-1, limit=99)
        return {str(each.result.job_id) for each in late}


@pytest.fixture
def deployment(redis: Redis, job_store: JobStore, publisher: Publisher) -> Deployment:
    return Deployment(redis, job_store, publisher)


async def test_what_a_group_has_not_acknowledged_is_published_again(
    redis: Redis, loss: DataLoss, deployment: Deployment
) -> None:
    assert await loss.heed() == 0
    read, given, unread = [await deployment.publish() for _ in range(3)]
    assert await deployment.read("g", 1) == [read]
    assert await deployment.read("g", 1, ack=False) == [given]
    await loss.note_positions()
    await deployment.publish("unheard")
    assert await loss.heed() == 0
    assert await deployment.unpublished() == set()

    await redis.flushdb()
    assert await loss.heed() == 2
    assert await deployment.unpublished() == {given, unread}
    new = await deployment.publish()
    assert set(await deployment.read("g", 3)) == {given, unread, new}
    await loss.note_positions()
    await redis.flushdb()
    assert await loss.heed() == 0


async def test_a_group_that_fell_behind_others_gets_its_own(
    redis: Redis, loss: DataLoss, deployment: Deployment, database: Database
) -> None:
    await loss.heed()
    first, second = [await deployment.publish() for _ in range(2)]
    await deployment.read("quick", 2)
    await deployment.read("slow", 1)
    await loss.note_positions()
    await redis.flushdb()
    assert await loss.heed() == 1
    assert await deployment.unpublished() == {second}
    assert first not in await deployment.unpublished()
    assert await number(database, "SELECT count(*) FROM result_groups") == 2


async def test_a_group_is_registered_before_it_has_read_anything(
    redis: Redis, loss: DataLoss, deployment: Deployment, job_store: JobStore
) -> None:
    await loss.heed()
    job = await deployment.publish()
    group = ResultGroup(namespace="default", channel="c", name="away")
    await job_store.register_group(group)
    await job_store.register_group(group)
    await redis.flushdb()
    assert await loss.heed() == 1
    assert await deployment.unpublished() == {job}
    # It stands before anything is published, for a member that would begin at the end.
    assert [each["name"] for each in await redis.xinfo_groups("results:default:c")] == [b"away"]


async def test_messages_that_were_lost_are_sent_again(
    redis: Redis, loss: DataLoss, job_store: JobStore
) -> None:
    await loss.heed()
    ids = await admit(job_store, spec(), spec())
    assert await job_store.unsent(limit=9, older_than_s=0) == []
    await redis.flushdb()
    await loss.heed()
    assert {each.id for each in await job_store.unsent(limit=9, older_than_s=0)} == set(ids)


async def test_nothing_is_marked_that_went_to_a_redis_that_lost_it(
    redis: Redis, loss: DataLoss, job_store: JobStore, publisher: Publisher
) -> None:
    await loss.heed()
    job = await claimed(job_store)
    await job_store.finish([outcome(job)])
    (delivery,) = await job_store.unpublished(older_than_s=-1, limit=9)
    epoch = await publisher.send([delivery])
    await redis.flushdb()
    await loss.heed()
    await job_store.mark_published({job.id: job.token}, epoch=epoch)
    assert len(await job_store.unpublished(older_than_s=-1, limit=9)) == 1
    # Nor what went to one that bears no epoch yet.
    await redis.delete(names.EPOCH)
    assert await publisher.send([delivery]) is None
    await job_store.mark_published({job.id: job.token}, epoch=None)
    assert len(await job_store.unpublished(older_than_s=-1, limit=9)) == 1


async def test_entering_an_epoch_waits_for_marks_on_their_way(
    redis: Redis, loss: DataLoss, job_store: JobStore, database: Database, deployment: Deployment
) -> None:
    await loss.heed()
    job = await claimed(job_store, spec(channel="c"))
    await job_store.finish([outcome(job)])
    (delivery,) = await job_store.unpublished(older_than_s=-1, limit=9)
    epoch = await deployment.publisher.send([delivery])
    await job_store.register_group(ResultGroup(namespace="default", channel="c", name="g"))
    async with database.transaction() as connection:
        await connection.execute(
            _MARK_PUBLISHED, {"ids": [job.id], "tokens": [job.token], "epoch": epoch}
        )
        await redis.flushdb()
        entering = asyncio.create_task(loss.heed())
        while not await number(
            database, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.01)
    assert await entering == 1


async def test_an_entry_of_a_run_that_was_done_over_hides_nothing(
    redis: Redis, loss: DataLoss, job_store: JobStore, deployment: Deployment
) -> None:
    await loss.heed()
    first, second = [await deployment.publish() for _ in range(2)]
    again = await job_store.retry("default", ids=[UUID(first)], states=[JobState.DONE])
    claim = await job_store.claim([each.id for each in again], owner="w", lease_s=60)
    await job_store.finish([outcome(claim.jobs[0])])
    await deployment.read("g", 1, ack=False)
    await loss.note_positions()  # the oldest unread entry is of the first run
    await redis.flushdb()
    assert await loss.heed() == 1
    assert await deployment.unpublished() == {first, second}


async def test_a_redis_that_is_away_is_no_loss(
    tmp_path: Path, job_store: JobStore, database: Database
) -> None:
    nobody = open_redis(f"unix://{tmp_path}/none.sock")
    with pytest.raises(ServiceError):
        await DataLoss(nobody, job_store, keep_s=KEEP_S).heed()
    assert await number(database, "SELECT count(*) FROM broker") == 0
    await nobody.aclose()
