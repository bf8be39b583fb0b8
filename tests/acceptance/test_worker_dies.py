"""A worker that is killed, or whose engine is, costs no job. Runs last: it replaces the worker."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter

import pytest

from schema.jobs import JobState
from tests.acceptance.conftest import Deployment
from workers.aio_client import AsyncJobClient
from workers.jobs import AsyncJob

pytestmark = pytest.mark.timeout(900)
WAIT_S = 600.0


async def _submit(client: AsyncJobClient, count: int, *, tokens: int) -> list[AsyncJob]:
    return list(
        await asyncio.gather(
            *(
                client.submit(
                    f"Story number {number}:",
                    sampling={"max_tokens": tokens, "ignore_eos": True},
                    reuse="off",
                )
                for number in range(count)
            )
        )
    )


async def _running(client: AsyncJobClient) -> None:
    connection = await client.connection()
    async with asyncio.timeout(WAIT_S):
        while not (await connection.store("test").counts(None))[JobState.RUNNING]:
            await asyncio.sleep(0.05)


async def _ready_again(deployment: Deployment, dead: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while deployment.worker_pid == dead or not deployment.fleet.workers[0].took_jobs:
            await asyncio.sleep(0.1)


async def test_jobs_survive_their_worker_and_its_engine(
    client: AsyncJobClient, deployment: Deployment
) -> None:
    jobs = await _submit(client, 300, tokens=8)
    for _ in range(2):
        await _running(client)
        dead = deployment.worker_pid
        os.kill(dead, signal.SIGKILL)
        await _ready_again(deployment, dead)
    first = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    assert Counter(result.status for result in first) == {JobState.DONE: 300}

    # The engine alone: the worker notices, gives its jobs back as suspects, and is replaced.
    jobs = await _submit(client, 20, tokens=200)
    await _running(client)
    dead = deployment.worker_pid
    deployment.engine_core().send_signal(signal.SIGKILL)
    await _ready_again(deployment, dead)
    second = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
    assert Counter(result.status for result in second) == {JobState.DONE: 20}
    statuses = [await job.status() for job in jobs]
    assert max(status.crashes for status in statuses) >= 1
    assert {status.attempts for status in statuses} == {1}  # a crash is no attempt


async def test_a_stopped_worker_hands_its_jobs_back(
    client: AsyncJobClient, deployment: Deployment
) -> None:
    jobs = await _submit(client, 4, tokens=3000)
    await _running(client)
    dead = deployment.worker_pid
    started = time.monotonic()
    os.kill(dead, signal.SIGQUIT)
    await _ready_again(deployment, dead)
    assert time.monotonic() - started < 60
    for job in jobs:
        await job.cancel()
        assert (await job.result(WAIT_S)).status is JobState.CANCELLED
