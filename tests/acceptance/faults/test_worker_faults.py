"""One fault at a time, done to scripted workers on real servers."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from schema.jobs import JobState
from tests.acceptance.faults import scripted_worker
from tests.acceptance.faults.scripted_worker import CRASH_FOLDER, ENDLESS, KILLER, MODEL
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from workers import AsyncJobClient, Settings
from workers.app import make_app
from workers.jobs import AsyncJob
from workers.local import LocalStack
from workers.store.claims import MAX_CRASHES

pytestmark = pytest.mark.timeout(600)
WAIT_S = 120.0
#: What the default settings promise.
DEATH_COSTS_AT_MOST_S = 15.0


class Deployment:
    """Two scripted workers with the default settings, and a client."""

    def __init__(self, workers: ScriptedWorkers, client: AsyncJobClient, faults: Path) -> None:
        self.workers, self.client, self.faults = workers, client, faults

    async def submit(self, *prompts: str) -> list[AsyncJob]:
        return await self.client.submit_many(prompts, reuse="off", namespace="faults")

    async def holder(self, job: AsyncJob) -> int | None:
        """Process id of the worker that runs a job."""
        database = (await self.client.connection()).require_database()
        async with database.connection() as connection:
            owner = await connection.scalar(
                text("SELECT lease_owner FROM jobs WHERE id = :id"), {"id": job.id}
            )
        return None if owner is None else int(owner.rpartition(":")[2])

    async def held(self, job: AsyncJob, *, not_by: int | None = None) -> int:
        """Wait until some worker runs a job."""
        async with asyncio.timeout(WAIT_S):
            while (holder := await self.holder(job)) in (None, not_by):
                await asyncio.sleep(0.05)
        assert holder is not None
        return holder

    async def whole(self) -> None:
        """Wait until both workers take jobs."""
        async with asyncio.timeout(WAIT_S):
            while len(self.workers.ready) < 2:
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def workers(
    stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[ScriptedWorkers, Path]]:
    from workers.store.schema_upgrade import upgrade

    upgrade(stack.database_url)
    folder = tmp_path_factory.mktemp("faults")
    values = {
        CRASH_FOLDER: str(folder),
        "PROMPTMILL_DATABASE_URL": stack.database_url,
        "PROMPTMILL_REDIS_URL": stack.redis_url,
        "PROMPTMILL_ENGINE_TIMEOUT_S": "3",
        "PROMPTMILL_SHOW_PROMPTS": "yes",
    }
    workers = ScriptedWorkers(count=2, environment=values, log=folder / "workers.log")
    await workers.start()
    yield workers, folder
    await workers.stop()


@pytest.fixture
async def deployment(
    stack: LocalStack, workers: tuple[ScriptedWorkers, Path]
) -> AsyncIterator[Deployment]:
    settings = Settings(
        database_url=SecretStr(stack.database_url),
        redis_url=SecretStr(stack.redis_url),
        served_model_name=MODEL,
    )
    async with AsyncJobClient(settings) as client:
        deployment = Deployment(workers[0], client, workers[1])
        await deployment.whole()
        yield deployment


async def test_a_killed_worker_costs_no_more_than_promised(deployment: Deployment) -> None:
    (job,) = await deployment.submit(f"{ENDLESS} story")
    dead = await deployment.held(job)
    deployment.workers.signal(dead, signal.SIGKILL)
    began = time.monotonic()
    await deployment.held(job, not_by=dead)
    assert time.monotonic() - began < DEATH_COSTS_AT_MOST_S
    status = await job.status()
    assert (status.attempts, status.crashes) == (1, 1)
    await job.cancel()
    assert (await job.result(WAIT_S)).status is JobState.CANCELLED


async def test_prompts_show_where_that_was_wished(
    deployment: Deployment, stack: LocalStack
) -> None:
    """That they do not otherwise is tested in `test_order_of_jobs`."""
    settings = Settings(redis_url=SecretStr(stack.redis_url), served_model_name=MODEL)
    app = make_app(settings, stack.redis_url, MODEL)
    words = [f"secret{uuid4().hex}" for _ in range(2)]
    async with AsyncJobClient(settings) as alone:  # its jobs come in full
        jobs = [
            *await deployment.submit(f"{ENDLESS} {words[0]}"),
            await alone.submit(f"{ENDLESS} {words[1]}"),
        ]
        expected = {str(job.id): f"{ENDLESS} {word}" for job, word in zip(jobs, words, strict=True)}
        async with asyncio.timeout(WAIT_S):
            while True:
                active = await asyncio.to_thread(app.control.inspect(timeout=1).active) or {}
                requests = [task for tasks in active.values() for task in tasks]
                seen = {key: job for task in requests for key, job in task.get("jobs", {}).items()}
                if {key: job["prompt"] for key, job in seen.items() if key in expected} == expected:
                    break
    said = await asyncio.to_thread((deployment.faults / "workers.log").read_text)
    assert all(word in said for word in words)
    for job in jobs:
        assert await deployment.client.cancel(job)
    app.close()


async def test_only_the_job_that_kills_engines_is_set_aside(deployment: Deployment) -> None:
    innocent = [f"innocent {number}" for number in range(40)]
    jobs = await deployment.submit(*innocent[:20], f"{KILLER} the engine", *innocent[20:])
    results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    guilty = results.pop(20)
    assert {result.status for result in results} == {JobState.DONE}
    assert guilty.status is JobState.FAILED
    assert guilty.error is not None
    assert "set aside" in guilty.error.message
    status = await jobs[20].status()
    assert status.crashes == MAX_CRASHES
    # One death may have been in company; from then on it was alone.
    others = [await job.status() for job in jobs if job.id != jobs[20].id]
    assert max(each.crashes for each in others) <= 1
    assert {each.attempts for each in others} == {1}


@pytest.mark.parametrize(
    "fault",
    [scripted_worker.ENGINE_HANGS, scripted_worker.LOOP_STANDS, scripted_worker.ENGINE_DIES],
)
async def test_a_worker_that_hangs_is_replaced_and_its_jobs_are_done(
    deployment: Deployment, fault: str
) -> None:
    before = sum(deployment.workers.endings.values())
    (deployment.faults / fault).touch()
    jobs = await deployment.submit(*(f"{fault} {number}" for number in range(20)))
    results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    assert {result.status for result in results} == {JobState.DONE}
    async with asyncio.timeout(WAIT_S):
        while sum(deployment.workers.endings.values()) == before:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGQUIT,)], ids=["interrupted", "quit"]
)
async def test_a_worker_told_to_stop_now_hands_its_jobs_back(
    deployment: Deployment, signals: tuple[signal.Signals, ...]
) -> None:
    (job,) = await deployment.submit(f"{ENDLESS} tale")
    first = await deployment.held(job)
    killed = deployment.workers.endings[-signal.SIGKILL]
    before = sum(deployment.workers.endings.values())
    for number in signals:
        deployment.workers.signal(first, number)
        await asyncio.sleep(0.5)  # two at once are one
    await deployment.held(job, not_by=first)
    status = await job.status()
    assert (status.attempts, status.crashes) == (1, 0)  # handed back, and not found by its lease
    async with asyncio.timeout(WAIT_S):
        while sum(deployment.workers.endings.values()) == before:
            await asyncio.sleep(0.05)
    assert deployment.workers.endings[-signal.SIGKILL] == killed
    await job.cancel()
    assert (await job.result(WAIT_S)).status is JobState.CANCELLED
