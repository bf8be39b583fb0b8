"""`GroupCommit`: outcomes that wait at the same time share one transaction."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from schema.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from workers.store.records import Finished, Outcome


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
        self._waiting: deque[tuple[Outcome, asyncio.Future[bool]]] = deque()
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
        if self._closed:
            msg = "GroupCommit is closed"
            raise RuntimeError(msg)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="group-commit")
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((outcome, future))
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
                size = min(len(self._waiting), self._max_group)
                await self._commit([self._waiting.popleft() for _ in range(size)])
            if self._closed:
                return

    async def _commit(self, group: list[tuple[Outcome, asyncio.Future[bool]]]) -> None:
        try:
            finished = await self._store.finish([outcome for outcome, _ in group])
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
            for outcome, future in group:
                if not future.done():
                    future.set_result(outcome.job_id in finished.accepted)


def _fail(group: list[tuple[Outcome, asyncio.Future[bool]]], error: Exception) -> None:
    for _, future in group:
        if not future.done():
            future.set_exception(error)
