"""What a namespace has is deleted everywhere, and nothing of another; real servers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from schema import names, wire
from schema.errors import JobNotFoundError
from schema.jobs import JobState
from tests.integration.builders import admit, change, claimed, full_answer, outcome, spec
from workers import AsyncJobClient, Settings
from workers.channel import ResultChannel
from workers.cli.root import main
from workers.connection import open_redis
from workers.engine.protocols import Decision
from workers.local import LocalStack
from workers.purge import apply_retention, purge
from workers.redis_erasure import RedisErasure
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.erasure import Erasure, tenant_tables
from workers.store.jobs import JobStore

MODEL = f"m{uuid4().hex}"


@pytest.fixture
async def redis(stack: LocalStack) -> AsyncIterator[Redis]:
    client = open_redis(stack.redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def mine() -> str:
    return f"mine-{uuid4().hex[:8]}"


@pytest.fixture
def other(mine: str) -> str:
    # One whose name begins as the other's does.
    return f"{mine}.x"


async def furnish(namespace: str, database: Database, redis: Redis) -> None:
    """Give a namespace something of everything."""
    jobs, answers, channel = JobStore(database), PostgresAnswers(database), ResultChannel(redis)
    stored = replace(full_answer(), namespace=namespace)
    batch = await jobs.create_batch(namespace, source="in.jsonl")
    done = await claimed(jobs, spec(namespace=namespace, batch_id=batch.id, row=0))
    ended = outcome(done, answer=stored, answer_id=stored.id)
    await jobs.finish([ended])
    await channel.publish([("default", ended.result), ("a/b", ended.result)], ttl_s=600)
    await change(database, "UPDATE jobs SET published_at = now() WHERE id = :id", id=done.id)
    await change(
        database,
        "INSERT INTO result_groups (namespace, channel, name) VALUES (:namespace, 'a/b', 'g')",
        namespace=namespace,
    )
    await channel.append_tokens(namespace, done.id, [(0, 0, "Paris")])
    await answers.mark_flight(namespace, uuid4().bytes * 2, "w1", 60.0)
    decision = Decision(
        namespace=namespace, request_id="r", answer_id=stored.id, similarity=0.9, served=True
    )
    await answers.record([decision])
    waits = spec(namespace=namespace, priority=3)
    await admit(jobs, waits)
    route = wire.Route(namespace=namespace, model=MODEL, priority=3)
    for what in ({"ids": (waits.id,)}, {"jobs": (spec("a secret", namespace=namespace),)}):
        message = wire.JobMessage(namespace=namespace, sent_at=1.0, **what)
        item = wire.encode(message, route)
        await redis.lpush(route.key, item)
        await redis.rpush(
            names.DEAD_LETTERS,
            json.dumps({"v": 1, "reason": "r", "item_base64": base64.b64encode(item).decode()}),
        )
        await redis.hset("unacked", tag := uuid4().hex, json.dumps([json.loads(item), "", "q"]))
        await redis.zadd("unacked_index", {tag: 1.0})


async def everything(namespace: str, database: Database, redis: Redis) -> dict[str, int]:
    return {
        **await Erasure(database).remains(namespace),
        **await RedisErasure(redis).remains(namespace),
    }


async def test_everything_of_one_namespace_is_deleted_and_nothing_of_another(
    mine: str, other: str, database: Database, redis: Redis
) -> None:
    for namespace in (mine, other):
        await furnish(namespace, database, redis)
    before = await everything(other, database, redis)
    assert all(before.values()), before  # nothing is deleted that this test does not see
    heard = redis.pubsub()
    await heard.subscribe(names.INVALIDATIONS)

    done = await purge(database, redis, mine)
    assert done.clean, done.left
    assert not any((await everything(mine, database, redis)).values())
    assert {kind: done.deleted[kind] for kind in before} == before
    assert await everything(other, database, redis) == before
    await heard.get_message(timeout=5)
    notice: Any = await heard.get_message(timeout=5)
    assert json.loads(notice["data"])["namespace"] == mine
    await heard.aclose()
    again = await purge(database, redis, mine)
    assert again.clean
    assert not any(again.deleted.values())
    await purge(database, redis, other)


async def test_what_runs_is_stopped_and_its_late_outcome_leaves_nothing(
    mine: str, database: Database, redis: Redis
) -> None:
    jobs = JobStore(database)
    running = await claimed(jobs, spec(namespace=mine))
    heard = redis.pubsub()
    await heard.subscribe(names.CANCELLATIONS)
    await heard.get_message(timeout=5)
    done = await purge(database, redis, mine, wait_s=0.3)
    notice: Any = await heard.get_message(timeout=5)
    assert json.loads(notice["data"])["ids"] == [str(running.id)]
    await heard.aclose()
    assert done.clean
    assert done.running == 1
    late = replace(full_answer(), namespace=mine)
    finished = await jobs.finish([outcome(running, answer=late, answer_id=late.id)])
    assert finished.accepted == frozenset()
    assert not any((await everything(mine, database, redis)).values())


async def test_every_table_of_tenants_says_whose_a_row_is(database: Database) -> None:
    found = {table.name for table in tenant_tables()}
    everyone = {table.name for table in tenant_tables()[0].metadata.sorted_tables}
    # A table without a namespace would be passed over by a purge.
    assert everyone - found == {"broker"}


async def test_what_is_older_than_may_be_kept_goes(
    mine: str, other: str, database: Database, redis: Redis
) -> None:
    for namespace in (mine, other):
        await furnish(namespace, database, redis)
    for table in ("jobs", "answers", "nlp_results", "reuse_decisions", "batches"):
        statement = f"UPDATE {table} SET created_at = now() - interval '2 hours'"  # noqa: S608  ours
        await change(database, statement)
    await change(
        database,
        "UPDATE jobs SET finished_at = now() - interval '1 hour' WHERE finished_at IS NOT NULL",
    )
    later = datetime.now(UTC) + timedelta(seconds=1)
    deleted = await apply_retention(database, redis, keep_s=None, namespaces={mine: 1800.0})
    assert deleted == {
        "jobs": 1, "answers": 1, "nlp_results": 1, "reuse_decisions": 1, "batches": 1
    }  # fmt: skip
    left = await Erasure(database).remains(mine)
    # The job that waits stays, and what lives for seconds.
    seconds = {"flight_markers"}
    assert {name for name, rows in left.items() if rows} == {"jobs", "result_groups"} | seconds
    statuses = await JobStore(database).list_jobs(mine)
    assert [status.state for status in statuses] == [JobState.QUEUED]
    # Channels are trimmed by when a result came.
    assert await RedisErasure(redis).trim(mine, later) == 2
    assert all((await Erasure(database).remains(other)).values())
    deleted = await apply_retention(database, redis, keep_s=1800.0, namespaces={mine: 1800.0})
    assert deleted["jobs"] == 1
    assert not await apply_retention(database, redis, keep_s=None, namespaces={})
    for namespace in (mine, other):
        await purge(database, redis, namespace)


async def test_the_command_says_what_it_did(
    mine: str,
    stack: LocalStack,
    database_url: str,
    database: Database,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await furnish(mine, database, redis)
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", database_url)
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", stack.redis_url)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    words = ["purge", "--namespace", mine]
    assert await asyncio.to_thread(main, words) == 130  # nobody said yes
    assert await asyncio.to_thread(main, [*words, "--yes", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["clean"] is True
    assert said["deleted"]["jobs"] == 2
    assert await asyncio.to_thread(main, ["purge", "--yes"]) == 2
    assert await asyncio.to_thread(main, ["purge", "-n", "a:b", "--yes"]) == 2


async def test_who_waits_for_a_purged_job_hears_that_it_is_gone(
    mine: str, stack: LocalStack, database_url: str, database: Database, redis: Redis
) -> None:
    settings = Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(stack.redis_url),
        served_model_name=MODEL,
        namespace=mine,
    )
    async with AsyncJobClient(settings) as client:
        job = await client.submit("x")
        await purge(database, redis, mine)
        with pytest.raises(JobNotFoundError):
            await job.result(30)
