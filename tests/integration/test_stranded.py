"""Jobs of producers with Redis alone, in the hands of a worker that died before it wrote rows."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import orjson
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from schema import names, wire
from tests.integration.builders import number, spec
from workers import AsyncJobClient, Settings
from workers.app import make_app
from workers.connection import open_redis
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.stranded import IN_HAND, IN_HAND_INDEX, Stranded


@pytest.fixture
async def redis(own_redis_url: str) -> AsyncIterator[Redis]:
    client = open_redis(own_redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def stranded(redis: Redis, job_store: JobStore) -> Stranded:
    return Stranded(redis, job_store, max_attempts=3, grace_s=0.0)


async def test_jobs_in_dead_hands_get_rows(
    own_redis_url: str, stranded: Stranded, job_store: JobStore, database: Database
) -> None:
    settings = Settings(redis_url=SecretStr(own_redis_url), served_model_name="m")
    async with AsyncJobClient(settings) as alone:
        jobs = await alone.submit_many(["one", "two"], namespace="mine")
    assert await stranded.adopt() == 0  # nobody has taken the message
    with make_app(settings, own_redis_url, "m").connection_for_read() as connection:
        channel = connection.default_channel
        assert channel.basic_get(names.queue("m")) is not None
        assert await stranded.adopt() == 2
        assert await stranded.adopt() == 0
    unsent = await job_store.unsent(limit=9, older_than_s=0)
    assert {(each.id, each.namespace, each.model) for each in unsent} == {
        (job.id, "mine", "m") for job in jobs
    }
    # By a worker that was slow and not dead they are found to be known.
    await stranded.adopt()
    assert await number(database, "SELECT count(*) FROM jobs") == 2


async def test_what_may_have_been_run_and_deleted_is_left_alone(
    redis: Redis, job_store: JobStore, database: Database
) -> None:
    route = wire.Route(namespace="default", model="m", priority=5)
    message = wire.JobMessage(namespace="default", sent_at=0.0, jobs=(spec(),))
    entry = orjson.dumps([orjson.loads(wire.encode(message, route)), "", route.queue])
    await redis.hset(IN_HAND, "tag", entry)
    await redis.zadd(IN_HAND_INDEX, {"tag": time.time() - 100})
    for within_s, found in ((50.0, 0), (1000.0, 1)):
        stranded = Stranded(redis, job_store, max_attempts=3, within_s=within_s)
        assert await stranded.adopt() == found
    assert await number(database, "SELECT count(*) FROM jobs") == 1


async def test_what_has_rows_or_is_none_of_ours_is_left_alone(
    redis: Redis, stranded: Stranded, job_store: JobStore, database: Database
) -> None:
    route = wire.Route(namespace="default", model="m", priority=5)
    key = {"id": names.job_id_for("default", "key"), "idempotency_key": "key"}
    known, other, conflicting = spec("known"), spec("other", **key), spec("another", **key)
    await job_store.admit([known, other], default_model="m", sent=True, max_attempts=3)
    messages: list[Any] = [
        orjson.loads(wire.encode(wire.JobMessage(namespace="default", sent_at=0.0, **what), route))
        for what in ({"ids": (uuid4(),)}, {"jobs": (known,)}, {"jobs": (conflicting,)})
    ]
    entries = [orjson.dumps([message, "", route.queue]) for message in messages]
    entries += [b"not JSON", b"[]", b"[1, 2, 3]", orjson.dumps([{"headers": {}}, "", "q"])]
    for entry in entries:
        tag = str(uuid4())
        await redis.hset(IN_HAND, tag, entry)
        await redis.zadd(IN_HAND_INDEX, {tag: 1.0})
    await redis.zadd(IN_HAND_INDEX, {"gone": 1.0})
    assert await stranded.adopt() == 0
    assert await number(database, "SELECT count(*) FROM jobs") == 2
