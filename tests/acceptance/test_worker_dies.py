"""What dies or is told to stop costs no job: `promptmill up` and the real engine.

Runs last: it kills workers, stops the command, and starts it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import psutil
import pytest

from schema.jobs import JobResult, JobState, JobStatus
from tests.acceptance.conftest import Deployment
from workers.aio_client import AsyncJobClient
from workers.jobs import AsyncJob

pytestmark = pytest.mark.timeout(900)
WAIT_S = 600.0
LONG = 3000  # tokens, of an answer that nobody waits for
DRAIN_S = 8.0


async def _submit(
    client: AsyncJobClient, tokens: Sequence[int], *, channel: str = "default"
) -> list[AsyncJob]:
    return list(
        await asyncio.gather(
            *(
                client.submit(
                    f"Story number {number}:",
                    sampling={"max_tokens": most, "ignore_eos": True},
                    reuse="off",
                    channel=channel,
                )
                for number, most in enumerate(tokens)
            )
        )
    )


async def _statuses(jobs: Sequence[AsyncJob]) -> list[JobStatus]:
    return [await job.status() for job in jobs]


async def _run(client: AsyncJobClient, *, at_least: int = 1) -> None:
    """Wait until so many jobs run."""
    store = (await client.connection()).store("test")
    async with asyncio.timeout(WAIT_S):
        while (await store.counts(None))[JobState.RUNNING] < at_least:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _consumed(client: AsyncJobClient, channel: str) -> AsyncIterator[dict[UUID, JobResult]]:
    """What a consumer group is given while the block runs, repeats dropped."""
    given: dict[UUID, JobResult] = {}

    async def consume() -> None:
        results = await client.results(channel, "readers", "only")
        async for delivery in results:
            given[delivery.result.job_id] = delivery.result
            await results.ack(delivery)

    task = asyncio.create_task(consume(), name="consumer")
    try:
        yield given
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_300_jobs_survive_two_deaths_of_all_worker_processes(
    client: AsyncJobClient, deployment: Deployment
) -> None:
    channel = f"deaths-{uuid4().hex[:8]}"
    async with _consumed(client, channel) as given:
        jobs = await _submit(client, [8] * 300, channel=channel)
        for _ in range(2):
            await _run(client)
            async with deployment.replaced():
                for process in deployment.worker_processes():
                    with contextlib.suppress(psutil.NoSuchProcess):  # it ended with another
                        process.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
        async with asyncio.timeout(WAIT_S):
            while len(given) < len(jobs):
                await asyncio.sleep(0.05)
    assert Counter(result.status for result in results) == {JobState.DONE: 300}
    assert given == {result.job_id: result for result in results}


async def test_jobs_survive_their_engine(client: AsyncJobClient, deployment: Deployment) -> None:
    """The worker notices, gives its jobs back as suspects, and is replaced."""
    jobs = await _submit(client, [120] * 8)
    await _run(client)
    async with deployment.replaced():
        deployment.engine_core().send_signal(signal.SIGKILL)
    results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    assert Counter(result.status for result in results) == {JobState.DONE: 8}
    statuses = await _statuses(jobs)
    assert max(status.crashes for status in statuses) >= 1
    assert {status.attempts for status in statuses} == {1}  # a crash is no attempt


async def test_two_interrupts_stop_up_now_and_cleanly(
    client: AsyncJobClient, deployment: Deployment
) -> None:
    jobs = await _submit(client, [LONG] * 4)
    await _run(client, at_least=4)
    began = time.monotonic()
    assert deployment.end(signal.SIGINT, signal.SIGINT) == 0
    # The jobs would have gone on for longer, and so would a drain.
    assert time.monotonic() - began < client.settings.drain_s
    await _handed_back(jobs)
    deployment.start(drain_s=DRAIN_S)


async def test_up_told_to_end_drains_and_hands_the_rest_back(
    client: AsyncJobClient, deployment: Deployment
) -> None:
    short = await _submit(client, range(10, 100, 10))
    long = await _submit(client, [LONG] * 2)
    async with asyncio.timeout(WAIT_S):
        while JobState.QUEUED in {status.state for status in await _statuses([*short, *long])}:
            await asyncio.sleep(0.05)
    unfinished = [job for job in short if not (await job.status()).state.terminal]
    assert unfinished
    began = time.monotonic()
    assert deployment.end(signal.SIGTERM) == 0
    assert time.monotonic() - began > DRAIN_S
    ended = {status.state for status in await _statuses(unfinished)}
    assert JobState.DONE in ended
    assert ended <= {JobState.DONE, JobState.QUEUED}
    await _handed_back(long)


async def _handed_back(jobs: Sequence[AsyncJob]) -> None:
    """See that jobs wait, lost nothing by it, and can be cancelled though nobody runs them."""
    for job in jobs:
        status = await job.status()
        assert (status.state, status.attempts, status.crashes) == (JobState.QUEUED, 0, 0)
        await job.cancel()
        assert (await job.result(WAIT_S)).status is JobState.CANCELLED
