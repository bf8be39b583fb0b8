"""`Slots`: how many jobs this worker runs at once; a bounded count that is taken in groups."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from schema.names import DEFAULT_PRIORITY


class Slots:
    """Places in the engine.

    Whoever is most urgent is served first, and of those whoever has waited longest, so that a
    message of many jobs and one of a single job make progress side by side.

    Args:
        total: Jobs that may run at once.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        # By priority and then by number, so that the futures are never compared.
        self._waiting: list[tuple[int, int, int, asyncio.Future[int]]] = []
        self._numbers = itertools.count()

    async def take(self, most: int, *, priority: int = DEFAULT_PRIORITY) -> int:
        """Wait for a free place, and take as many as there are.

        Args:
            most: Places wanted.
            priority: 0 is served first.

        Returns:
            Places taken, from 1 to `most`.
        """
        if self.free and not self._waiting:
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

    async def take_all(self) -> None:
        """Wait until every place is free, and take them all; only one caller at a time may wait."""
        taken = 0
        try:
            while taken < self.total:
                taken += await self.take(self.total - taken)
        except asyncio.CancelledError:
            self.give(taken)
            raise

    def give(self, count: int = 1) -> None:
        """Give places back.

        Args:
            count: As many as were taken and are not needed any more.
        """
        self.free += count
        while self.free and self._waiting:
            _, _, most, future = heapq.heappop(self._waiting)
            if future.done():
                continue
            taken = min(most, self.free)
            self.free -= taken
            future.set_result(taken)
