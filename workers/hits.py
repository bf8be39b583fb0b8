"""`HitCounter`: how often stored answers were given, written together once a second."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import structlog

from schema.errors import PromptmillError
from schema.jobs import Provenance
from workers.cancellation import end

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from workers.store.records import Outcome

_log = structlog.get_logger(__name__)
_HITS = frozenset({Provenance.EXACT, Provenance.SEMANTIC, Provenance.COALESCED})
#: Answers whose hits wait while Postgres is away; those of further answers are given up.
_WAITING = 100_000
_AT_A_TIME = 2_000


class CountsHits(Protocol):
    """What keeps the counts; `PostgresAnswers` does."""

    async def touch(self, hits: Mapping[UUID, int]) -> None:
        """Add to the counts."""
        ...


class HitCounter:
    """Gathers hits and writes them beside the jobs, which never wait for it.

    The counts decide what is evicted and say what was saved. They are near enough for both: a
    worker that dies loses the last second's. No hit prolongs the life of an answer.

    Args:
        store: Keeps the counts.
        every_s: Seconds between two writes.
    """

    def __init__(self, store: CountsHits, *, every_s: float = 1.0) -> None:
        self._store = store
        self._every_s = every_s
        self._waiting: Counter[UUID] = Counter()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write; idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="promptmill-hits")

    def note(self, outcome: Outcome) -> None:
        """Count the hit that an outcome was, if it was one.

        Args:
            outcome: Committed.
        """
        answer_id = outcome.answer_id
        if answer_id is None or outcome.provenance not in _HITS:
            return
        if answer_id in self._waiting or len(self._waiting) < _WAITING:
            self._waiting[answer_id] += 1

    async def flush(self) -> None:
        """Write what has gathered; what cannot be written waits for the next time.

        Raises:
            PromptmillError: Postgres cannot be used now.
        """
        while self._waiting:
            group = dict(self._waiting.most_common(_AT_A_TIME))
            await self._store.touch(group)
            # Others may have come meanwhile.
            for answer_id, times in group.items():
                self._waiting[answer_id] -= times
                if not self._waiting[answer_id]:
                    del self._waiting[answer_id]

    async def aclose(self) -> None:
        """Write what has gathered, if that can be, and stop; idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None
            await self._try_to_flush()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._try_to_flush()

    async def _try_to_flush(self) -> None:
        try:
            await self.flush()
        except PromptmillError as exc:
            # The pipeline says loudly enough that Postgres is away.
            _log.debug("hits wait to be counted", reason=str(exc))
