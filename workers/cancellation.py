"""Cancelling tasks, and cancellations that get lost below us."""

from __future__ import annotations

import asyncio
from typing import Any


def heed_cancellation() -> None:
    """Raise a cancellation of this task that somebody swallowed; for the head of every long loop.

    Before Python 3.12 `asyncio.wait_for`, by which redis-py sends, hands out a result that arrives
    together with a cancellation, and the cancellation is gone (python/cpython#86296). A loop that
    waits again and again would then never end.

    Raises:
        asyncio.CancelledError: This task was asked to end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended.

    Args:
        task: Raises nothing else, or what it raises is meant for the caller.

    Raises:
        asyncio.CancelledError: The caller was cancelled while it waited; the task ends by itself.
    """
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
