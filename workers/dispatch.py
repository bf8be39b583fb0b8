"""`Dispatcher`: lets jobs that wait in Postgres into the queue, namespace by namespace in turns.

A submission goes to the queue directly while nobody waits and its namespace has less than a
*window* of jobs there. What is beyond waits in Postgres, and so does everything submitted to that
model while anybody waits, for otherwise who comes late would pass those who wait. The dispatcher
keeps each queue filled up to the window, in the order of `Turns`. So a namespace with a million
jobs has no more than a window of them standing before whoever comes next.

Priorities order the jobs of one namespace while they wait. In the queue they order all jobs while
only one namespace has any; with several, those who waited stand there in the order of their turns.

The window is what workers take in a second, and never less than three rounds of their slots:
enough that no engine waits for the dispatcher, and little to stand behind.

Every worker has one; an advisory lock lets one of them do it, until its connection ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from schema.errors import BrokerUnavailableError, PromptmillError
from schema.names import DEFAULT_PRIORITY
from workers import windows
from workers.cancellation import end, heed_cancellation
from workers.queue_marks import living_workers
from workers.store.locks import DISPATCH, leading
from workers.store.release import hold_again, release, standing, waiting
from workers.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from redis.asyncio import Redis
    from sqlalchemy.ext.asyncio import AsyncConnection

    from workers.store.database import Database
    from workers.store.records import JobAddress

_log = structlog.get_logger(__name__)
_ROUNDS = 3  # of the slots of all workers: one in the engine, one in hand, one in the queue
_DRAIN_S = 1.0  # seconds of what workers take
_LOOK_S = 2.0  # between two looks at which workers live, and two tries to become the one
_IDLE_S = 0.1  # between two passes while nobody waits
_BUSY_S = 0.02  # and while somebody does
# Of the time: to look who waits and how much stands there may take one part in so many. To let jobs
# in costs the same however many passes it takes, so it is not counted.
_LOOK_SHARE = 5
_LONGEST_PAUSE_S = 0.5  # half of what the queue holds; a server that hung once must not empty it
_MOST_AT_ONCE = 4096


class Dispatcher:
    """Lets jobs into the queue in weighted fair order.

    Args:
        database: Where they wait.
        redis: Where workers say that they live.
        send: Writes queue messages for jobs.
        weights: Share of each namespace in relation to the others'; 1 for those not named.
        window: Jobs of one namespace, and of all that waited, that may stand in a queue; None
            follows what workers take.
    """

    def __init__(
        self,
        *,
        database: Database,
        redis: Redis,
        send: Callable[[Sequence[JobAddress]], Awaitable[None]],
        weights: Mapping[str, float],
        window: int | None = None,
    ) -> None:
        self._database = database
        self._redis = redis
        self._send = send
        self._weights = dict(weights)
        self._window = window
        self._slots: Counter[str] = Counter()  # of living workers, by model
        self._drain: dict[str, _Drain] = {}
        self._turns: dict[str, Turns] = {}
        self._looked_at = float("-inf")
        self._look_s = 0.0  # that looking took in this pass
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; idempotent. To be called on the loop that the database belongs to."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="promptmill-dispatcher")

    async def aclose(self) -> None:
        """Stop; idempotent. Another worker's takes over."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    def window(self, model: str) -> int:
        """Return how many jobs may stand in the queue of a model.

        Args:
            model: Served name.
        """
        if self._window is not None:
            return self._window
        drain = self._drain.get(model)
        taken = int(drain.a_second * _DRAIN_S) if drain else 0
        slots = self._slots[model] * _ROUNDS or windows.DEFAULT_WINDOW
        return max(slots, taken)

    async def run_once(self, connection: AsyncConnection) -> int:
        """Fill up every queue that somebody waits for.

        Args:
            connection: The one that holds the lock.

        Returns:
            Namespaces that waited, all models together.

        Raises:
            PromptmillError: Postgres or Redis cannot be used now.
        """
        began = time.monotonic()
        found = await waiting(connection)
        self._look_s = time.monotonic() - began
        for model, namespaces in found.items():
            await self._fill(connection, model, namespaces)
        return sum(len(namespaces) for namespaces in found.values())

    async def _fill(self, connection: AsyncConnection, model: str, namespaces: list[str]) -> None:
        drain = self._drain.setdefault(model, _Drain())
        window = self.window(model)
        began = time.monotonic()
        stand = await standing(connection, model, bound=2 * window)
        self._look_s += time.monotonic() - began
        drain.see(stand.total())
        turns = self._turns.setdefault(model, Turns(self._weights))
        order = turns.take(namespaces, min(window - stand.total(), _MOST_AT_ONCE))
        if not order:
            return
        counts = Counter(order)
        found = await release(connection, model, counts)
        for name, count in counts.items():
            turns.give_back(name, count - len(found.get(name, ())))
        jobs = [found[name].popleft() for name in order if found.get(name)]
        if not jobs:
            return
        if len(stand.keys() | set(namespaces)) > 1:
            # Or the turns of one who calls all its jobs urgent would be the only ones.
            jobs = [replace(job, priority=DEFAULT_PRIORITY) for job in jobs]
        drain.add(len(jobs))
        try:
            await self._send(jobs)
        except BrokerUnavailableError:
            await hold_again(connection, [job.id for job in jobs])
            raise

    async def _run(self) -> None:
        while True:
            heed_cancellation()
            try:
                async with leading(self._database, DISPATCH) as connection:
                    if connection is not None:
                        await self._lead(connection)
            except PromptmillError as exc:
                # The servers are away; the pipeline says so more loudly.
                _log.warning("dispatcher waits", reason=str(exc) or type(exc).__name__)
            except Exception:  # noqa: BLE001  logged with its traceback, and tried again
                # What waits for its turn would wait for ever, so it outlives a broken pass.
                _log.exception("a pass of the dispatcher failed")
            await asyncio.sleep(_LOOK_S)

    async def _lead(self, connection: AsyncConnection) -> None:
        self._turns.clear()
        self._drain.clear()
        while True:
            heed_cancellation()
            await self._look()
            waited = await self.run_once(connection)
            await asyncio.sleep(pause_s(waited, self._look_s))

    async def _look(self) -> None:
        """See now and then which workers live, and tell producers what follows from it."""
        if time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = time.monotonic()
        slots: Counter[str] = Counter()
        for state in (await living_workers(self._redis)).values():
            for model in state.get("models") or ():
                slots[model] += int(state.get("slots") or 0)
        self._slots = slots
        for model in [model for model, drain in self._drain.items() if drain.is_stale]:
            del self._drain[model]
        await windows.announce(self._redis, {model: self.window(model) for model in slots})


def pause_s(waited: int, look_s: float) -> float:
    """Return the seconds from one pass to the next.

    Args:
        waited: Namespaces that waited.
        look_s: Seconds that it took to see who waits and how much stands in the queues.
    """
    least = _BUSY_S if waited else _IDLE_S
    return min(max(least, look_s * _LOOK_SHARE), _LONGEST_PAUSE_S)


class _Drain:
    """How many jobs a second leave a queue, as seen by who fills it."""

    # Over which it is averaged: short enough that a long queue of quick jobs is soon let in as fast
    # as it is taken, and long enough that idle workers who fill their slots at one blow count for
    # no more than the rounds of slots that are let in anyway.
    _MEMORY_S = 0.5
    _STALE_S = 4.0

    def __init__(self) -> None:
        self.a_second = 0.0
        self._stood: int | None = None
        self._seen_at = time.monotonic()

    @property
    def is_stale(self) -> bool:
        """Whether nobody has looked for a while."""
        return time.monotonic() - self._seen_at > self._STALE_S

    def see(self, standing: int) -> None:
        """Note how many stand there now."""
        now = time.monotonic()
        past_s, self._seen_at = now - self._seen_at, now
        if self._stood is not None and past_s > 0:
            taken = max(self._stood - standing, 0) / past_s
            share = min(past_s / self._MEMORY_S, 1.0)
            self.a_second += (taken - self.a_second) * share
        self._stood = standing

    def add(self, jobs: int) -> None:
        """Note that more were let in."""
        self._stood = (self._stood or 0) + jobs
