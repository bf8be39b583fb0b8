"""`Upkeep`: keeps the store of answers within its bounds.

Every worker runs one; an advisory lock lets one at a time do a pass. A pass removes

1. answers that have expired,
2. the least useful answers of each namespace that has too many,
3. marks of flights whose owners died, and
4. now and then, what namespaces have had for longer than they may, and analyses whose answers have
   gone.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import structlog

from schema.errors import PromptmillError
from workers.cancellation import end
from workers.store.locks import UPKEEP, only_one

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable

    from workers.store.answers import PostgresAnswers
    from workers.store.database import Database

_log = structlog.get_logger(__name__)
#: Share of the limit that is made free at once, so that not every pass has to weigh all answers.
_HEADROOM = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Tidied:
    """What one pass removed."""

    expired: int = 0  # answers past their time to live
    evicted: int = 0  # answers worth least, where there were too many
    flights: int = 0  # marks of owners that died
    outlived: int = 0  # rows and results kept for as long as they may be
    analyses: int = 0  # those whose answers have gone

    @property
    def anything(self) -> bool:
        """Whether the pass removed something."""
        return any(asdict(self).values())


class Upkeep:
    """Removes stored answers that are over or too many, every minute or so.

    Args:
        database: For the lock that lets one worker at a time do it.
        answers: The store of answers, on the same database.
        answers_limit: Answers that each namespace may store.
        every_s: Seconds between passes, about.
        pass_timeout_s: Seconds after which a pass is cut; the next one goes on.
        retain: Removes what may not be kept any longer; returns what that was. None keeps all.
        seldom_s: Seconds between two calls of it, and two looks at all analyses, at least.
    """

    def __init__(
        self,
        *,
        database: Database,
        answers: PostgresAnswers,
        answers_limit: int,
        every_s: float = 60.0,
        pass_timeout_s: float = 120.0,
        retain: Callable[[], Awaitable[Counter[str]]] | None = None,
        seldom_s: float = 600.0,
    ) -> None:
        self._database = database
        self._answers = answers
        self._limit = answers_limit
        self._every_s = every_s
        self._pass_timeout_s = pass_timeout_s
        self._retain = retain
        self._seldom_s = seldom_s
        self._next_seldom = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the passes; idempotent. To be called on the loop that the database belongs to."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="upkeep")

    async def aclose(self) -> None:
        """Stop; idempotent. A pass that is under way is cut, which leaves nothing half done."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def run_once(self) -> Tidied | None:
        """Do one pass.

        Returns:
            What it removed, or None when another worker is at it.

        Raises:
            PromptmillError: Postgres cannot be used now.
            TimeoutError: The pass took too long.
        """
        async with (
            asyncio.timeout(self._pass_timeout_s),
            only_one(self._database, UPKEEP) as mine,
        ):
            return await self._pass() if mine else None

    async def _run(self) -> None:
        while True:
            # Workers that were started together do not all come at once.
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1.5))  # noqa: S311  no secret
            try:
                done = await self.run_once()
            except (PromptmillError, TimeoutError) as exc:
                _log.warning("upkeep waits", reason=str(exc) or type(exc).__name__)
            except Exception:  # noqa: BLE001  logged with its traceback, and tried again
                # A store that grows without bound fills the disk, so upkeep outlives a broken pass.
                _log.exception("a pass of upkeep failed")
            else:
                if done is not None and done.anything:
                    _log.info("tidied", **asdict(done))

    async def _pass(self) -> Tidied:
        expired, evicted = await self._answers.purge("expired"), 0
        for namespace in await self._answers.crowded(self._limit):
            keep = self._limit - self._limit // _HEADROOM
            evicted += await self._answers.evict(namespace, keep=keep)
        flights = await self._answers.purge("flights")
        done = Tidied(expired=expired, evicted=evicted, flights=flights)
        if time.monotonic() < self._next_seldom:
            return done
        outlived = 0 if self._retain is None else (await self._retain()).total()
        analyses = await self._answers.purge("analyses")
        self._next_seldom = time.monotonic() + self._seldom_s
        return replace(done, outlived=outlived, analyses=analyses)
