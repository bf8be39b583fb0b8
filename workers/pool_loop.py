"""The thread in which the asyncio pool's tasks run.

`TaskLoop` owns the event loop: it starts tasks while there is room, keeps their time
limits, cancels them, and decides what the worker is to be told of each. It knows Celery's
exceptions, but not its worker: what there is to tell goes through one function it is given.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import Reject, SoftTimeLimitExceeded, Terminated, WorkerLostError
from sqlalchemy.util.concurrency import greenlet_spawn

from .pool_task import Reason, TaskHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

logger = logging.getLogger(__name__)


class TaskLoop:
    """An event loop in a thread of its own, and the tasks on it.

    Args:
        limit: how many tasks may be in flight.
        cancel_again_s: seconds after which a task that ignores its cancellation, or is
            slow to clean up, is cancelled again.
        tell: called in the loop's thread with a function and its arguments, to be called
            in order where the worker listens.
        ended: told, after a task's outcome, that a task has left.
        acks_late: says of a handle whether its message is still unacknowledged.
        died: called when the loop ends without having been asked to.
    """

    def __init__(
        self,
        *,
        limit: int,
        cancel_again_s: float,
        tell: Callable[..., None],
        ended: Callable[[], None],
        acks_late: Callable[[TaskHandle], bool],
        died: Callable[[], None],
    ) -> None:
        self.limit = limit
        self.handles: set[TaskHandle] = set()  # all not yet ended, held strongly
        self.in_flight: set[TaskHandle] = set()
        self.waiting: deque[TaskHandle] = deque()
        self._cancel_again_s = cancel_again_s
        self._tell = tell
        self._on_end = ended
        self._acks_late = acks_late
        self._died = died
        self._closed = False  # no task is started any more
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life: asyncio.Task[Any] | None = None
        self._leave = asyncio.Event()
        self.started: Future[None] = Future()
        self.thread = threading.Thread(target=self._main, name="asyncio-pool", daemon=True)
        self._lifespans: Sequence[Callable[[], AbstractAsyncContextManager[Any]]] = ()

    # From any thread -------------------------------------------------------------------

    def start(self, lifespans: Sequence[Callable[[], AbstractAsyncContextManager[Any]]]) -> None:
        """Start the thread; `started` has the outcome once all `lifespans` are entered."""
        self._lifespans = lifespans
        self.thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop.

        Raises:
            RuntimeError: it has not been started.
        """
        if self._loop is None:
            raise RuntimeError("the asyncio pool has not been started")
        return self._loop

    @property
    def alive(self) -> bool:
        """Whether the loop's thread runs."""
        return self.thread.is_alive()

    def admit(self, handle: TaskHandle) -> None:
        """Take a task in; it starts when there is room."""
        self.handles.add(handle)
        self._soon(self._admit, handle)

    def terminate(self, handle: TaskHandle) -> None:
        """Cancel a task, running or waiting."""
        self._soon(self._cancel, handle, Reason.TERMINATED)

    def resize(self, limit: int) -> None:
        """Set how many tasks may be in flight; those running go on."""
        self.limit = limit
        self._soon(self._start_waiting)

    def give_back_waiting(self) -> None:
        """Give back the tasks that have not started."""
        self._soon(self._give_back_waiting)

    def close(self) -> None:
        """Start no task any more."""
        self._closed = True
        self.give_back_waiting()

    def interrupt(self) -> None:
        """Give back what waits and cancel what runs, because the worker is stopping."""
        self._closed = True
        self._soon(self._interrupt)

    def leave(self) -> None:
        """Leave the lifespans and end the thread; or give up entering them."""
        if self.started.done():
            self._soon(self._leave.set)
        else:
            self._soon(lambda: self._life and self._life.cancel())

    def _soon(self, function: Callable[..., Any], *args: Any) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the asyncio pool's loop has ended")

    # The loop's own thread ---------------------------------------------------------------

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                runner.run(self._live())
        except BaseException as exc:
            if not self.started.done():
                self.started.set_exception(exc)  # whoever waits for the start tells it
                return
            logger.exception("the asyncio pool's loop has ended")
        if not self._leave.is_set():
            self._died()

    async def _live(self) -> None:
        self._loop, self._life = asyncio.get_running_loop(), asyncio.current_task()
        async with AsyncExitStack() as stack:
            for enter in self._lifespans:
                await stack.enter_async_context(enter())
            self.started.set_result(None)
            await self._leave.wait()

    def _admit(self, handle: TaskHandle) -> None:
        if self._closed:
            self._give_back(handle)
        elif len(self.in_flight) < self.limit:
            self._start(handle)
        else:
            self.waiting.append(handle)

    def _start_waiting(self) -> None:
        while self.waiting and len(self.in_flight) < self.limit:
            self._start(self.waiting.popleft())

    def _start(self, handle: TaskHandle) -> None:
        if handle.reason is not None:  # terminated on its way here
            self._end(handle, None, asyncio.CancelledError())
            return
        self.in_flight.add(handle)
        self._report(handle, "accept_callback", os.getpid(), time.monotonic())
        handle.asyncio_task = self.loop.create_task(
            greenlet_spawn(handle.call), name=f"celery-{handle.correlation_id}"
        )
        handle.asyncio_task.add_done_callback(lambda done: self._ended(handle, done))
        for limit_s, reached in (
            (handle.soft_timeout_s, self._soft_limit),
            (handle.timeout_s, self._hard_limit),
        ):
            if limit_s:
                handle.timers.append(self.loop.call_later(limit_s, reached, handle))

    def _ended(self, handle: TaskHandle, done: asyncio.Task[Any]) -> None:
        for timer in handle.timers:
            timer.cancel()
        self.in_flight.discard(handle)
        # Cancelled before its first step, the greenlet was never entered.
        value, error = (None, asyncio.CancelledError()) if done.cancelled() else done.result()
        self._end(handle, value, error)
        # Its context holds the handle, and that all of the message: nothing waits for a collection.
        handle.asyncio_task = None
        self._start_waiting()

    def _end(self, handle: TaskHandle, value: Any, error: BaseException | None) -> None:
        """Tell the outcome if it has not been told, and forget the handle."""
        if not handle.settled:
            handle.settled = True
            error = self._told_as(handle, value, error)
            if error is None:
                self._report(handle, "callback", value)
            else:
                self._report(handle, "error_callback", _exception_info(error))
        self.handles.discard(handle)
        self._on_end()

    def _told_as(
        self, handle: TaskHandle, value: Any, error: BaseException | None
    ) -> BaseException | None:
        if handle.reason is Reason.TERMINATED:
            return Terminated(handle.signal)
        if handle.reason is Reason.SHUTDOWN and error is not None:
            if handle.asyncio_task is None or self._acks_late(handle):
                return Reject("the worker is shutting down", requeue=True)
            return WorkerLostError("the worker was shut down while the task ran")
        if isinstance(error, asyncio.CancelledError) and handle.soft_limit_due:
            return SoftTimeLimitExceeded(handle.soft_timeout_s)  # waited without wait_for
        if error is None:
            error = _memory_error(value)
        if error is None or (isinstance(error, Exception) and not isinstance(error, MemoryError)):
            return error
        # Celery would take it for the end of the worker's process, and raise it.
        return WorkerLostError(f"the task raised {error!r}")

    # Cancelling -----------------------------------------------------------------------------

    def _give_back_waiting(self) -> None:
        while self.waiting:
            self._give_back(self.waiting.popleft())

    def _give_back(self, handle: TaskHandle) -> None:
        handle.reason = handle.reason or Reason.SHUTDOWN
        self._end(handle, None, asyncio.CancelledError())

    def _interrupt(self) -> None:
        self._give_back_waiting()
        for handle in tuple(self.in_flight):
            self._cancel(handle, Reason.SHUTDOWN)

    def _cancel(self, handle: TaskHandle, reason: Reason) -> None:
        handle.reason = handle.reason or reason
        if handle.asyncio_task is None:
            if handle in self.waiting:
                self.waiting.remove(handle)
                self._end(handle, None, asyncio.CancelledError())
        elif not handle.asyncio_task.done():
            handle.asyncio_task.cancel()
            again = self.loop.call_later(self._cancel_again_s, self._cancel, handle, reason)
            handle.timers.append(again)

    def _soft_limit(self, handle: TaskHandle) -> None:
        if handle.reason is None and handle.asyncio_task is not None:
            handle.soft_limit_due = True
            self._report(handle, "timeout_callback", True, handle.soft_timeout_s)
            handle.asyncio_task.cancel()

    def _hard_limit(self, handle: TaskHandle) -> None:
        if handle.reason is None:
            # Told at once, as of a killed process: the task may be slow to clean up.
            handle.settled = True
            self._report(handle, "timeout_callback", False, handle.timeout_s)
            self._cancel(handle, Reason.HARD_LIMIT)

    def _report(self, handle: TaskHandle, name: str, *args: Any) -> None:
        callback = handle.callbacks[name]
        if callback is not None:
            self._tell(callback, *args)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _memory_error(value: Any) -> MemoryError | None:
    """Return the MemoryError in the tracer's `(failed, result, runtime)`, if there is one."""
    if isinstance(value, tuple) and value and value[0] == 1:
        found = getattr(value[1], "exception", None)
        found = getattr(found, "exc", found)  # billiard wraps it together with its traceback
        return found if isinstance(found, MemoryError) else None
    return None


def _exception_info(error: BaseException) -> ExceptionInfo:
    try:
        raise error  # noqa: TRY301  one that never was raised has no traceback to report
    except BaseException:  # noqa: BLE001
        return ExceptionInfo()
