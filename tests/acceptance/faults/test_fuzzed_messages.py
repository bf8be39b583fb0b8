"""Fuzzed items in the queue of a real worker: it lives, and none of them is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from sqlalchemy import text

from schema import names
from schema.jobs import JobResult
from tests.acceptance.faults.fuzz import Fuzz
from tests.acceptance.faults.scripted_worker import MODEL, scripted_answer
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from workers import AsyncJobClient, Settings
from workers.local import LocalStack
from workers.transport import read_dead

pytestmark = pytest.mark.timeout(600)
WAIT_S = 120.0
ITEMS = int(os.environ.get("PROMPTMILL_FUZZED_ITEMS", "1000"))
#: How a worker says that a message goes to the dead list.
_REFUSALS = {"schema.errors.MessageFormatError", "celery.exceptions.Reject"}
#: Any other may be given; the default makes a failure one that can be seen again.
SEED = int(os.environ.get("PROMPTMILL_FAULT_SEED", "20261"))


@pytest.fixture(scope="module")
async def worker(
    stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[ScriptedWorkers, Path]]:
    from workers.store.schema_upgrade import upgrade

    upgrade(stack.database_url)
    log = tmp_path_factory.mktemp("fuzz") / "worker.log"
    values = {
        "PROMPTMILL_DATABASE_URL": stack.database_url,
        "PROMPTMILL_REDIS_URL": stack.redis_url,
    }
    worker = ScriptedWorkers(count=1, environment=values, log=log)
    await worker.start()
    yield worker, log
    await worker.stop()


async def test_fuzzed_messages_stop_nobody_and_none_is_lost(
    stack: LocalStack, worker: tuple[ScriptedWorkers, Path]
) -> None:
    fuzz = Fuzz(seed=SEED, model=MODEL)
    items = [fuzz.item() for _ in range(ITEMS)]
    settings = Settings(
        database_url=SecretStr(stack.database_url),
        redis_url=SecretStr(stack.redis_url),
        served_model_name=MODEL,
    )
    async with AsyncJobClient(settings) as client:
        redis = (await client.connection()).redis
        await redis.delete(names.DEAD_LETTERS)
        before = await _told(redis)
        queue = names.priority_list(names.queue(MODEL), names.DEFAULT_PRIORITY)
        await redis.lpush(queue, *items)
        good = await client.submit_many([f"after {number}" for number in range(5)], reuse="off")
        results = [await job.result(WAIT_S) for job in good]
        async with asyncio.timeout(WAIT_S):  # what some of them are about is still done
            while await redis.hlen("unacked"):
                await asyncio.sleep(0.05)
        dead = {read_dead(entry)[0] for entry in await redis.lrange(names.DEAD_LETTERS, 0, -1)}
        # The servers are shared with tests that ask whether all is well.
        await redis.delete(names.DEAD_LETTERS)
        told = {id_: result for id_, result in (await _told(redis)).items() if id_ not in before}
        named, nameless = _jobs_of(item for item in items if item not in dead)
        ended = await _ended(client, named)
    assert [result.text for result in results] == [
        scripted_answer(f"after {number}") for number in range(5)
    ]
    assert dead <= set(items)
    assert ITEMS / 10 < len(dead) < ITEMS * 9 / 10  # both ways are tried
    assert named - ended <= told.keys()
    refused = [result for result in told.values() if result.token == 0]
    assert len(refused) >= nameless
    assert all(one.error is not None and one.error.message for one in refused)
    assert not worker[0].endings
    assert _raised(await asyncio.to_thread(worker[1].read_text)) <= _REFUSALS


def _raised(log: str) -> set[str]:
    """Return the classes of all errors whose tracebacks stand in a log."""
    return set(re.findall(r"^([\w.]+(?:Error|Exception|Reject))\b", log, re.MULTILINE))


def _jobs_of(items: Iterable[bytes]) -> tuple[set[UUID], int]:
    """Return the ids of the jobs in full that items carry, and how many have no readable id."""
    named: set[UUID] = set()
    nameless = 0
    for item in items:
        for job in json.loads(item)["headers"][names.JOBS_HEADER].get("jobs", ()):
            job_id = _id(job)
            if job_id is None:
                nameless += 1
            else:
                named.add(job_id)
    return named, nameless


def _id(job: Any) -> UUID | None:
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        return UUID(job["id"])
    return None


async def _ended(client: AsyncJobClient, ids: set[UUID]) -> set[UUID]:
    """Return those of the jobs that have a row, and an outcome in it."""
    database = (await client.connection()).require_database()
    statement = text("SELECT id FROM jobs WHERE id = ANY(:ids) AND finished_at IS NOT NULL")
    async with database.connection() as connection:
        return {row.id for row in await connection.execute(statement, {"ids": list(ids)})}


async def _told(redis: Redis) -> dict[UUID, JobResult]:
    """Every result on every channel."""
    found: dict[UUID, JobResult] = {}
    async for stream in redis.scan_iter(match=names.results_stream("*", "*"), count=1000):
        for _at, fields in await redis.xrange(stream):
            assert fields is not None
            result = JobResult.model_validate_json(fields[b"result"])
            found[result.job_id] = result
    return found
