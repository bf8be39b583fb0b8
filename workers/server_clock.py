"""Postgres' clock, kept at hand: the wall clocks of machines differ, and may jump."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from schema.errors import ServiceError

if TYPE_CHECKING:
    from workers.store.jobs import JobStore

_ASK_EVERY_S = 20.0


class ServerClock:
    """Tells Postgres' time by this machine's monotonic clock, and asks Postgres now and then.

    Args:
        jobs: The job store; None leaves this machine's own clock.
    """

    def __init__(self, jobs: JobStore | None) -> None:
        self._jobs = jobs
        self._ahead_s: float | None = None  # of the monotonic clock
        self._ask_at = 0.0

    async def now(self) -> float:
        """Return the present moment as Unix time by Postgres' clock, to about a round trip.

        While Postgres is away it is told by the last answer, and without any by this machine.
        """
        if self._jobs is None:
            return time.time()
        if time.monotonic() >= self._ask_at:
            try:
                moment = (await self._jobs.now()).timestamp()
            except ServiceError:
                pass
            else:
                self._ahead_s = moment - time.monotonic()
                self._ask_at = time.monotonic() + _ASK_EVERY_S
        return time.time() if self._ahead_s is None else time.monotonic() + self._ahead_s
