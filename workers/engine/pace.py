"""`Pace`: a burst of requests takes the event loop in portions.

asyncio runs all that is ready before it looks for anything new. So what is cheap for one request
stops the loop for as many times that when hundreds arrive, or end, at the same moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

#: Seconds of work in one turn of the loop after which the rest of a burst waits for the next.
_PORTION_S = 0.004


class Pace:
    """Lets through what fits into this turn of the loop, and the rest one a turn, in order.

    Args:
        portion_s: Seconds that may pass in one turn before others have to wait.
        clock: Seconds.
    """

    def __init__(
        self, *, portion_s: float = _PORTION_S, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._portion_s = portion_s
        self._clock = clock
        self._began: float | None = None  # when somebody first asked in this turn
        self._queue = asyncio.Lock()

    async def turn(self) -> None:
        """Return at once, or in a turn of the loop that has time left."""
        async with self._queue:
            if self._over():
                await asyncio.sleep(0)
                self._over()  # the clock of the new turn begins

    def _over(self) -> bool:
        if self._began is None:
            self._began = self._clock()
            asyncio.get_running_loop().call_soon(self._next)
            return False
        return self._clock() - self._began > self._portion_s

    def _next(self) -> None:
        self._began = None
