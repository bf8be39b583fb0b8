"""`SideTasks`: the owner of tasks that run beside requests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class SideTasks:
    """Holds tasks until they end, and ends them when asked."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a coroutine.

        Args:
            work: Deals with its own failures.
            name: Of the task.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, work: Coroutine[Any, Any, _T], *, name: str) -> _T:
        """Await a coroutine that goes on to its end when its caller is cancelled.

        A database query that is cancelled half-way costs its connection, so it is let finish.

        Args:
            work: Bounded in time.
            name: Of the task.
        """
        result: _T = await asyncio.shield(self.spawn(work, name=name))
        return result

    def cancel(self) -> None:
        """Cancel all of them, from whatever thread."""
        for task in list(self._tasks):
            loop = task.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

    async def aclose(self, *, wait_s: float = 0.0) -> None:
        """Cancel all of them, and wait until they have ended.

        Args:
            wait_s: Seconds in which they may end by themselves.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while self._tasks and (left_s := end - loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=left_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
