"""What ``promptmill top`` shows and does, over real servers; the worker is played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from uuid import uuid4

import pytest

from schema.jobs import JobError, JobResult, JobState
from tests.integration.builders import admit, spec
from workers import registry
from workers.aio_client import AsyncJobClient
from workers.cli.top_view import JobScreen, TopView
from workers.local import LocalStack
from workers.overview import Watcher
from workers.queue_marks import shine
from workers.settings import load_settings
from workers.store.jobs import JobStore
from workers.store.records import Outcome

SAID = {
    "models": ["m"],
    "device": "gpu0",
    "running": 3,
    "slots": 8,
    "oldest_sent_at": None,
    "jobs": {"done": 10, "failed": 2},
    "tokens": 100,
    "memory": {"worker": 2_000_000_000, "engine": 1_000_000_000},
    "lag_s": 0.004,
    "engine": {"generated": 1, "coalesced": 1, "hits": {"exact/memory": 2}},
}


@pytest.fixture
async def client(stack: LocalStack) -> AsyncIterator[AsyncJobClient]:
    settings = load_settings(data_dir=stack.data_dir, namespace=f"n{uuid4().hex[:8]}")
    async with AsyncJobClient(settings) as client:
        yield client


@pytest.fixture
async def worker(client: AsyncJobClient) -> str:
    name = f"m@host:gpu0:{uuid4().hex[:6]}"
    redis = (await client.connection()).redis
    await registry.announce(redis, ["m"])
    await shine(redis, name, SAID)
    return name


async def failed_and_running(client: AsyncJobClient) -> tuple[str, str]:
    """A job that failed, and one that runs."""
    database = (await client.connection()).database
    assert database is not None
    store = JobStore(database)
    jobs = [spec(namespace=client.settings.namespace) for _ in range(2)]
    await admit(store, *jobs)
    claim = await store.claim([job.id for job in jobs], owner="w", lease_s=600)
    bad = claim.jobs[0]
    error = JobError(type="EngineFailedError", message="the card has fallen off the bus")
    result = JobResult(
        job_id=bad.id,
        namespace=bad.namespace,
        status=JobState.FAILED,
        token=bad.token,
        error=error,
    )
    await store.finish([Outcome(job_id=bad.id, token=bad.token, result=result)])
    return str(bad.id), str(claim.jobs[1].id)


def named(jobs: Iterable[object]) -> list[str]:
    return [str(job.job_id) for job in jobs]  # type: ignore[attr-defined]


async def test_a_look_has_workers_queues_and_jobs(client: AsyncJobClient, worker: str) -> None:
    bad, running = await failed_and_running(client)
    watcher = Watcher(client)
    seen = await watcher.look()
    (mine,) = [one for one in seen.workers if one.name == worker]
    assert (mine.running, mine.slots, mine.ended, mine.reused) == (3, 8, 12, 0.75)
    assert (mine.memory_bytes, mine.jobs_per_s) == (3_000_000_000, None)
    assert "m" in {queue.model for queue in seen.queues}
    assert named(seen.failed) == [bad]
    assert named(seen.slow) == [running]
    assert seen.public()["failed"][0]["error"]["message"] == "the card has fallen off the bus"

    # The rate is what came between two looks.
    redis = (await client.connection()).redis
    await shine(redis, worker, {**SAID, "jobs": {"done": 20, "failed": 2}, "tokens": 600})
    (mine,) = [one for one in (await watcher.look()).workers if one.name == worker]
    assert mine.jobs_per_s is not None
    assert mine.jobs_per_s > 0
    assert mine.tokens_per_s == pytest.approx(50 * mine.jobs_per_s)


async def test_keys_look_into_cancel_and_retry(client: AsyncJobClient, worker: str) -> None:
    bad, running = await failed_and_running(client)
    app = TopView(client, every_s=3600)
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.pause()
        jobs = app.query_one("#jobs")
        assert app.query_one("#workers").row_count >= 1  # type: ignore[attr-defined]
        assert jobs.row_count == 2  # type: ignore[attr-defined]

        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        assert running in app.screen._text  # type: ignore[attr-defined]
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, JobScreen))

        await pilot.press("c")
        await until(pilot, lambda: bool(app._notifications))
        await pilot.press("down", "r")
        async with asyncio.timeout(30):
            while (await client.status(bad)).state is not JobState.QUEUED:
                await pilot.pause(0.05)
        await pilot.press("q")


async def until(pilot: object, condition: object) -> None:
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]
            await pilot.pause(0.02)  # type: ignore[attr-defined]
