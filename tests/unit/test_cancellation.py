"""Ending a task, and being ended meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from workers.cancellation import end


async def test_a_task_has_ended_afterwards() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    await end(task)
    assert task.cancelled()
    await end(task)


async def test_what_a_task_raises_instead_is_meant_for_the_caller() -> None:
    async def fails() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ArithmeticError

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    with pytest.raises(ArithmeticError):
        await end(task)


async def test_a_caller_that_is_cancelled_while_it_waits_is_told() -> None:
    free, ending = asyncio.Event(), asyncio.Event()

    async def lingers() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ending.set()
            await free.wait()

    task = asyncio.create_task(lingers())
    await asyncio.sleep(0)
    caller = asyncio.create_task(end(task))
    async with asyncio.timeout(10):
        await ending.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not task.done(), "it was cancelled twice, in the middle of its ending"
        free.set()
        await asyncio.wait([task])
    assert task.cancelled()
