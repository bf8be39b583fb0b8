"""`GroupCommit`: outcomes that wait at the same time share one transaction."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from schema.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self, TypeAlias

    from workers.store.records import Finished, Outcome

    #: Outcomes that came together, and who waits to hear which of them stand.
    _Waiting: TypeAlias = tuple[tuple[Outcome, ...], asyncio.Future[frozenset[UUID]]]


class FinishesJobs(Protocol):
    """What commits outcomes; `JobStore` does."""

    async def finish(self, outcomes: Sequence[Outcome]) -> Finished:
        """Commit outcomes in one transaction."""
        ...


class GroupCommit:
    """Commits outcomes of many callers together.

    While one group is being committed the next one gathers, so a lone outcome waits for nobody and
    a crowd shares the cost of a commit.

    Args:
        store: What commits.
        max_group: Outcomes a transaction may hold.
        gather_s: Seconds to wait for company before each commit; 0 is not to wait.
    """

    def __init__(self, store: FinishesJobs, *, max_group: int = 256, gather_s: float = 0.0) -> None:
        self._store = store
        self._max_group = max_group
        self._gather_s = gather_s
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Return itself; the writer starts with the first outcome."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit what waits, and stop."""
        await self.aclose()

    async def finish(self, outcome: Outcome) -> bool:
        """Commit an outcome, in company.

        A caller that is cancelled leaves its outcome in the group: it is committed all the same.

        Args:
            outcome: The outcome.

        Returns:
            Whether it stands; False when its run had lost the job.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now. Whether it committed is open;
                to call again with the same outcome is safe.
            RuntimeError: `aclose` was called before.
        """
        return bool(await self.finish_all([outcome]))

    async def finish_all(self, outcomes: Sequence[Outcome]) -> frozenset[UUID]:
        """Commit outcomes that came about together, in one transaction.

        Args:
            outcomes: One a job.

        Returns:
            The jobs whose outcome stands.

        Raises:
            DatabaseUnavailableError: As `finish`.
            RuntimeError: `aclose` was called before.
        """
        if self._closed:
            msg = "GroupCommit is closed"
            raise RuntimeError(msg)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="group-commit")
        future: asyncio.Future[frozenset[UUID]] = asyncio.get_running_loop().create_future()
        self._waiting.append((tuple(outcomes), future))
        self._wake.set()
        return await future

    async def aclose(self) -> None:
        """Commit what waits, and stop; idempotent.

        When it is cancelled, those who still wait are told so.
        """
        self._closed = True
        self._wake.set()
        if self._writer is None:
            return
        try:
            await self._writer
        finally:
            if not self._writer.done():
                self._writer.cancel()
                with suppress(asyncio.CancelledError):
                    await self._writer
            while self._waiting:
                self._waiting.popleft()[1].cancel()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                if self._gather_s and len(self._waiting) < self._max_group and not self._closed:
                    await asyncio.sleep(self._gather_s)
                await self._commit(self._group())
            if self._closed:
                return

    def _group(self) -> list[_Waiting]:
        """Take what waits, up to the bound; what came together stays together.

        A message that came twice may have one job ended twice at the same time. The second outcome
        is judged by a statement of its own: of one, the store hears of the first alone.
        """
        group: list[_Waiting] = []
        taken: set[UUID] = set()
        while self._waiting:
            ids = {outcome.job_id for outcome in self._waiting[0][0]}
            if group and (len(taken) + len(ids) > self._max_group or not taken.isdisjoint(ids)):
                break
            group.append(self._waiting.popleft())
            taken |= ids
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        try:
            finished = await self._store.finish([one for outcomes, _ in group for one in outcomes])
        except asyncio.CancelledError:
            for _, future in group:
                future.cancel()
            raise
        except DatabaseUnavailableError as exc:
            _fail(group, exc)
        except Exception as exc:  # noqa: BLE001  handed to those who wait
            # One outcome that cannot be stored must not take its neighbours along.
            if len(group) == 1:
                _fail(group, exc)
                return
            for member in group:
                await self._commit([member])
        else:
            for outcomes, future in group:
                if not future.done():
                    ids = frozenset(outcome.job_id for outcome in outcomes)
                    future.set_result(ids & finished.accepted)


def _fail(group: list[_Waiting], error: Exception) -> None:
    for _, future in group:
        if not future.done():
            future.set_exception(error)
