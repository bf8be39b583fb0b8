"""`Slots`: how many jobs this worker runs at once; a bounded count that is taken in groups."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from schema.names import DEFAULT_PRIORITY

_MEMORY = 0.2  # weight of the newest group in the share of repeats
_NEARLY_ALL = 0.9


class Slots:
    """Places in the engine.

    Whoever is most urgent is served first, and of those whoever has waited longest, so that a
    message of many jobs and one of a single job make progress side by side.

    Repeats of what was answered before need no engine, but until a job is claimed nobody knows that
    it is one. So while nearly all jobs are, there are more places than the engine has. Should that
    change, what was taken too much waits inside the engine, once.

    Args:
        total: Jobs that may run at once.
        most_extra: Places that may be added while nearly all jobs are repeats.
    """

    def __init__(self, total: int, *, most_extra: int = 0) -> None:
        self.total = total
        self.free = total  # below 0 while more is taken than there is
        self._most_extra = most_extra
        self._extra = 0
        self._repeats = 0.0  # share of the jobs claimed of late
        # By priority and then by number, so that the futures are never compared.
        self._waiting: list[tuple[int, int, int, asyncio.Future[int]]] = []
        self._numbers = itertools.count()

    @property
    def places(self) -> int:
        """Places there are now."""
        return self.total + self._extra

    @property
    def nearly_all_repeat(self) -> bool:
        """Whether nearly all jobs of late needed no run."""
        return self._repeats > _NEARLY_ALL

    def claimed(self, jobs: int, *, repeats: int) -> None:
        """Note what some jobs turned out to be.

        Args:
            jobs: How many were claimed together.
            repeats: How many of them needed no run.
        """
        if not jobs:
            return
        self._repeats += _MEMORY * (repeats / jobs - self._repeats)
        extra = self._most_extra if self.nearly_all_repeat else 0
        added, self._extra = extra - self._extra, extra
        self.give(added)

    async def take(self, most: int, *, priority: int = DEFAULT_PRIORITY) -> int:
        """Wait for a free place, and take as many as there are.

        Args:
            most: Places wanted.
            priority: 0 is served first.

        Returns:
            Places taken, from 1 to `most`.
        """
        if self.free > 0 and not self._waiting:
            taken = min(most, self.free)
            self.free -= taken
            return taken
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._numbers), most, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())
            raise

    async def take_all(self) -> int:
        """Wait until every place is free, and take them all; only one caller at a time may wait.

        Returns:
            Places taken, to be given back.
        """
        taken = 0
        try:
            while taken < self.places:
                taken += await self.take(self.places - taken)
        except asyncio.CancelledError:
            self.give(taken)
            raise
        return taken

    def give(self, count: int = 1) -> None:
        """Give places back.

        Args:
            count: As many as were taken and are not needed any more.
        """
        self.free += count
        while self.free > 0 and self._waiting:
            _, _, most, future = heapq.heappop(self._waiting)
            if future.done():
                continue
            taken = min(most, self.free)
            self.free -= taken
            future.set_result(taken)
