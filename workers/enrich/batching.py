"""`ModelProcess`: texts from many tasks, in micro-batches, through one supervised child process."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from workers.enrich.child import Child
from workers.enrich.errors import (
    EnrichmentBusyError,
    EnrichmentError,
    EnrichmentTimeoutError,
    EnrichmentUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Seconds before a restart after n failures in a row: doubles from the first to the second.
_BACK_OFF_S = (0.1, 30.0)

#: Loading a model from a cold disk, beside an engine that takes all cores, can be slow.
_START_TIMEOUT_S = 120.0


class _Item:
    """One text on its way."""

    __slots__ = ("alone", "future", "text")

    def __init__(self, text: str, future: asyncio.Future[bytes]) -> None:
        self.text = text
        self.future = future
        self.alone = False  # it was in a batch that ended badly, and is tried by itself


class ModelProcess:
    """A child process that is started when needed and replaced when it dies or hangs.

    Whatever waits when the child becomes free is the next batch: no text waits for company, and
    under load the batches grow by themselves. It belongs to the event loop that first uses it.

    Args:
        kind: Which model, as `workers.enrich.child_main` knows it.
        config: Arguments of the model, JSON types.
        max_waiting: Texts that may wait or be worked on at a time.
        budget_s: Seconds a text may take from its submission to its reply.
        batch_texts: Texts in a batch, at most.
        batch_chars: Characters in a batch, at most; a single longer text still goes.
    """

    def __init__(
        self,
        *,
        kind: str,
        config: Mapping[str, Any],
        max_waiting: int,
        budget_s: float,
        batch_texts: int = 32,
        batch_chars: int = 20_000,
    ) -> None:
        self._kind = kind
        self._config = dict(config)
        self._max_waiting = max_waiting
        self._budget_s = budget_s
        self._batch_texts = batch_texts
        self._batch_chars = batch_chars
        self._waiting: deque[_Item] = deque()
        self._in_hand = 0
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._child: Child | None = None
        self._failures = 0  # of the child, in a row
        self._restart_at = 0.0  # by the loop's clock
        self._last_error = ""
        self._closed = False
        self._cores: frozenset[int] = frozenset()  # empty: all of them
        self.restarts = 0
        """How often a child had to be replaced."""

    @property
    def pid(self) -> int | None:
        """Process id of the running child, if there is one."""
        return None if self._child is None else self._child.pid

    def stay_on(self, cores: frozenset[int]) -> None:
        """Run the child on some cores only, the one that runs and those that follow.

        Any thread may call it.

        Args:
            cores: Their numbers; empty changes nothing.
        """
        self._cores = cores
        if cores and (child := self._child) is not None:
            child.stay_on(cores)

    async def start(self) -> None:
        """Load the model now rather than with the first text.

        Raises:
            EnrichmentUnavailableError: It cannot be loaded.
        """
        await self.submit([""], budget_s=_START_TIMEOUT_S)

    async def submit(self, texts: Sequence[str], *, budget_s: float | None = None) -> list[bytes]:
        """Send texts and wait for the replies.

        Args:
            texts: What to work on; each is batched by itself.
            budget_s: Seconds that may pass instead of the budget of this process.

        Returns:
            One payload a text, in order.

        Raises:
            EnrichmentTimeoutError: Over the budget.
            EnrichmentBusyError: Too many texts wait already.
            EnrichmentUnavailableError: The child does not start, or was closed.
            EnrichmentError: The model failed on a text.
        """
        if not texts:
            return []
        loop = asyncio.get_running_loop()
        self._check_open(loop.time(), len(texts))
        limit_s = self._budget_s if budget_s is None else budget_s
        items = [_Item(text, loop.create_future()) for text in texts]
        self._waiting.extend(items)
        self._in_hand += len(items)
        self._ensure_runner()
        self._wake.set()
        try:
            async with asyncio.timeout(limit_s):
                return [await item.future for item in items]
        except TimeoutError as exc:
            if isinstance(exc, EnrichmentError):
                raise
            msg = f"{self._kind}: no reply within the budget of {limit_s:g} s"
            raise EnrichmentTimeoutError(msg) from None
        finally:
            self._in_hand -= len(items)
            for item in items:
                _discard(item.future)

    async def aclose(self) -> None:
        """End the child and refuse what still waits; idempotent."""
        self._closed = True
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await runner
        if self._child is not None:
            await self._replace_child()
        self._refuse_all(EnrichmentUnavailableError(f"{self._kind}: closed"))

    def _check_open(self, now: float, count: int) -> None:
        if self._closed:
            msg = f"{self._kind}: closed"
            raise EnrichmentUnavailableError(msg)
        if self._child is None and now < self._restart_at and self._last_error:
            # To wait for a start that has just failed would cost every caller his whole budget.
            raise EnrichmentUnavailableError(self._last_error)
        if self._in_hand + count > max(self._max_waiting, count):
            msg = f"{self._kind}: {self._in_hand} texts wait, {self._max_waiting} may"
            raise EnrichmentBusyError(msg)

    def _ensure_runner(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run(), name=f"enrich-{self._kind}")

    async def _run(self) -> None:
        """Serve batches for as long as this object lives."""
        while True:
            await self._wake.wait()
            batch = self._next_batch()
            if not batch:
                self._wake.clear()
                continue
            try:
                child = await self._ready_child()
            except EnrichmentUnavailableError as exc:
                self._waiting.extendleft(reversed(batch))
                self._refuse_all(exc)
                continue
            try:
                await self._serve(child, batch)
            except asyncio.CancelledError:
                # Closed over this batch: whoever waits for it is told with the others.
                self._waiting.extendleft(reversed(batch))
                raise

    def _next_batch(self) -> list[_Item]:
        """Take what waits, up to the bounds; what its caller gave up is dropped."""
        batch: list[_Item] = []
        chars = 0
        while self._waiting and len(batch) < self._batch_texts:
            item = self._waiting[0]
            if item.future.done():
                self._waiting.popleft()
                continue
            chars += len(item.text)
            if batch and (chars > self._batch_chars or item.alone or batch[0].alone):
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _ready_child(self) -> Child:
        if self._child is None:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(max(0.0, self._restart_at - loop.time()))
            try:
                self._child = await Child.start(
                    self._kind, self._config, timeout_s=_START_TIMEOUT_S
                )
            except EnrichmentUnavailableError as exc:
                self._count_failure()
                self._last_error = f"{self._kind}: {exc}"
                raise EnrichmentUnavailableError(self._last_error) from exc
            self._last_error = ""
            if self._cores:
                self._child.stay_on(self._cores)
        return self._child

    async def _serve(self, child: Child, batch: list[_Item]) -> None:
        """Have one batch done; a child that dies or hangs over it is replaced."""
        open_items = dict(enumerate(batch))
        try:
            await child.send([item.text for item in batch])
            while open_items:
                async with asyncio.timeout(self._budget_s):
                    header, payload = await child.receive()
                _settle(open_items.pop(header.index), header.ok, payload, self._kind)
                # One reader a turn of the loop: a whole batch read in one turn would block it.
                await asyncio.sleep(0)
        except (EnrichmentUnavailableError, TimeoutError) as exc:
            self._count_failure()
            await self._replace_child()
            self._requeue(list(open_items.values()), exc)
        else:
            self._failures = 0

    def _requeue(self, items: list[_Item], exc: Exception) -> None:
        """Give the texts of a lost batch one more chance, each by itself.

        So a text that kills the child takes no other along, and itself fails the second time.
        """
        for item in reversed(items):
            if item.alone or (len(items) == 1 and isinstance(exc, TimeoutError)):
                msg = f"{self._kind}: the process died or hung over this text ({exc})"
                _fail(item.future, EnrichmentError(msg))
            else:
                item.alone = True
                self._waiting.appendleft(item)

    async def _replace_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.kill()
            self.restarts += not self._closed

    def _count_failure(self) -> None:
        """Put the next start off: at once after the first failure, then ever later."""
        self._failures += 1
        first_s, longest_s = _BACK_OFF_S
        delay_s = (
            0.0 if self._failures == 1 else min(longest_s, first_s * 2 ** (self._failures - 2))
        )
        self._restart_at = asyncio.get_running_loop().time() + delay_s

    def _refuse_all(self, exc: EnrichmentUnavailableError) -> None:
        while self._waiting:
            _fail(self._waiting.popleft().future, exc)


def _settle(item: _Item, ok: bool, payload: bytes, kind: str) -> None:
    if not ok:
        _fail(item.future, EnrichmentError(f"{kind}: {payload.decode('utf-8', 'replace')}"))
    elif not item.future.done():
        item.future.set_result(payload)


def _fail(future: asyncio.Future[bytes], exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)


def _discard(future: asyncio.Future[bytes]) -> None:
    """Forget a future whose caller has left, so that no exception is reported as unseen."""
    if future.done() and not future.cancelled():
        future.exception()
    else:
        future.cancel()
