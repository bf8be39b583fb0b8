"""`DecisionLog`: decisions for or against reuse on their way to the store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from workers.engine.breaker import Breaker
from workers.engine.protocols import AnswerStore, Decision
from workers.engine.side_tasks import SideTasks

#: Decisions that wait for a store that is down; older ones are given up.
_WAITING = 10_000
_AT_A_TIME = 500


class DecisionLog:
    """Writes decisions beside the requests: what comes while one write runs is the next.

    Args:
        store: Keeps them, or None.
        breaker: Of the store.
        budget_s: Seconds one write may take.
        tasks: Owner of the writer.
    """

    def __init__(
        self, *, store: AnswerStore | None, breaker: Breaker, budget_s: float, tasks: SideTasks
    ) -> None:
        self.lost = 0
        self._store = store
        self._breaker = breaker
        self._budget_s = budget_s
        self._tasks = tasks
        self._waiting: deque[Decision] = deque()
        self._writing = False

    def add(self, decisions: Iterable[Decision]) -> None:
        """Take decisions in; they are written soon.

        Args:
            decisions: Taken.
        """
        if self._store is None:
            return
        self._waiting.extend(decisions)
        while len(self._waiting) > _WAITING:
            self._waiting.popleft()
            self.lost += 1
        if self._waiting and not self._writing:
            self._writing = True
            self._tasks.spawn(self._write(self._store), name="promptmill-decisions")

    async def _write(self, store: AnswerStore) -> None:
        try:
            while self._waiting:
                batch = [
                    self._waiting.popleft() for _ in range(min(_AT_A_TIME, len(self._waiting)))
                ]
                await self._breaker.call(lambda b=batch: store.record(b), budget_s=self._budget_s)  # type: ignore[misc]
        except Exception:  # noqa: BLE001  a record must not cost a request; the breaker counted it
            # They wait for the next decision, which tries again.
            self._waiting.extendleft(reversed(batch))
        finally:
            self._writing = False
