"""vLLM's own engine process stands still, or gets no memory: `make test-long` tries it."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from schema.jobs import JobState
from tests.acceptance.conftest import Deployment
from workers.aio_client import AsyncJobClient
from workers.jobs import AsyncJob

# Each lets a real engine start again: half a minute and more.
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
WAIT_S = 600.0
ENGINE_TIMEOUT_S = 10.0
JOBS = 8


@pytest.fixture(scope="module")
async def watched(deployment: Deployment) -> AsyncIterator[Deployment]:
    """The deployment with a watchdog that waits for less long."""
    deployment.stop()
    deployment.start(engine_timeout_s=ENGINE_TIMEOUT_S)
    yield deployment
    deployment.stop()
    deployment.start()


async def _running(client: AsyncJobClient, *, tokens: int) -> list[AsyncJob]:
    """Submit jobs; return when all of them run."""
    jobs = [
        await client.submit(
            f"Story number {number}:",
            sampling={"max_tokens": tokens, "ignore_eos": True},
            reuse="off",
        )
        for number in range(JOBS)
    ]
    store = (await client.connection()).store("test")
    async with asyncio.timeout(WAIT_S):
        while (await store.counts(None))[JobState.RUNNING] < JOBS:
            await asyncio.sleep(0.05)
    return jobs


async def _all_done_as_suspects(jobs: list[AsyncJob]) -> None:
    results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    assert Counter(result.status for result in results) == {JobState.DONE: JOBS}
    statuses = [await job.status() for job in jobs]
    assert {status.crashes for status in statuses} == {1}
    assert {status.attempts for status in statuses} == {1}  # a crash is no attempt


async def test_an_engine_that_stands_still_is_found_and_replaced(
    client: AsyncJobClient, watched: Deployment
) -> None:
    jobs = await _running(client, tokens=100)
    engine, worker = watched.engine_core(), watched.worker_processes()
    began = time.monotonic()
    async with watched.replaced():
        engine.send_signal(signal.SIGSTOP)
        store = (await client.connection()).store("test")
        async with asyncio.timeout(WAIT_S):
            while (await store.counts(None))[JobState.RUNNING]:
                await asyncio.sleep(0.05)
        found_s = time.monotonic() - began
    print(f"found after {found_s:.1f} s, replaced after {time.monotonic() - began:.1f} s")
    # It is asked every five seconds, and may be late to be seen on a busy machine.
    assert ENGINE_TIMEOUT_S - 1.0 < found_s < 4 * ENGINE_TIMEOUT_S
    assert not engine.is_running()
    assert not any(process.is_running() for process in worker)
    await _all_done_as_suspects(jobs)


async def test_an_engine_without_memory_is_replaced(
    client: AsyncJobClient, watched: Deployment
) -> None:
    jobs = await _running(client, tokens=100)
    engine = watched.engine_core()
    async with watched.replaced():
        # As full memory does: what the engine and its executor ask for, they are not given.
        for process in (engine, *engine.children(recursive=True)):
            process.rlimit(resource.RLIMIT_AS, (1, 1))
        # A prompt for which they need more than they have.
        jobs.append(await client.submit("word " * 3000, sampling={"max_tokens": 1}, reuse="off"))
    assert not engine.is_running()
    results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    assert Counter(result.status for result in results) == {JobState.DONE: JOBS + 1}
    statuses = [await job.status() for job in jobs]
    assert max(status.crashes for status in statuses) == 1
    assert {status.attempts for status in statuses} == {1}
