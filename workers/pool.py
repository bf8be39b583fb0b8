"""An asyncio pool for Celery: hundreds of tasks in flight on one event loop, in one thread.

Select it with the app setting `worker_pool = "workers.pool:TaskPool"` and give the number
of tasks in flight as `worker_concurrency`. Nothing of Celery is patched.

**How it works.** Celery's consumer stays in the main thread, in kombu's hub. The pool
owns one more thread with one asyncio loop (uvloop's where installed). Celery's tracer is
ordinary code, so each task runs it in a greenlet (SQLAlchemy's bridge), driven by an
`asyncio.Task` of its own: where the task calls `wait_for(coroutine)`, the greenlet is
left, the coroutine runs on the loop, and the other tasks go on. `AsyncTask` does this
for `async def` tasks. Between two waits a task has the loop to itself, so it must not
block; that includes Celery's own result back end, when one is used.

**Who is told what.** Whatever happens to a task, the worker is told its outcome once:

===========================  ============================================================
the tracer returned          `callback(result)`
the tracer raised            `error_callback`; what is no `Exception` as `WorkerLostError`
revoked, cancelled           cancelled, then `error_callback(Terminated)`
hard time limit              `timeout_callback(soft=False)` at once, and cancelled
soft time limit              `timeout_callback(soft=True)`, and `SoftTimeLimitExceeded` in
                             the task; the outcome is then whatever the task makes of it
interrupted by shutdown      `error_callback(Reject(requeue=True))`: with `acks_late` the
                             message goes back to its queue. A message acknowledged early
                             cannot go back: `error_callback(WorkerLostError)`
===========================  ============================================================

These calls are made in the hub's thread (as with Celery's process pool), so that
acknowledging and the worker's state need no locks. Cancelling raises `CancelledError`
where the task waits; a task that swallows it is cancelled again every second.

**Start and stop.** What must live on the loop as long as the loop (an engine, a
connection pool) is an async context manager registered with `lifespan(app)`. It is
entered before the first message is fetched, and left after the last task has ended.

A warm shutdown waits for running tasks, for at most `worker_pool_drain_timeout_s` seconds
(an app setting; None, the default, is no limit), then interrupts them. Tasks not yet
started are given back at once. A cold shutdown interrupts everything. Interrupted tasks
have `worker_pool_cancel_timeout_s` seconds (default 10) for their clean-up.
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
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks as run_pending_acks
from celery.exceptions import Reject, SoftTimeLimitExceeded, Terminated, WorkerLostError
from celery.worker import state
from sqlalchemy.util.concurrency import greenlet_spawn

from .pool_task import AsyncTask, Reason, TaskHandle, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    from celery import Celery

    Lifespan = Callable[["TaskPool"], AbstractAsyncContextManager[Any]]

__all__ = ["AsyncTask", "TaskHandle", "TaskPool", "lifespan", "running_pool", "wait_for"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

TICK_S = 0.02  # how often the main thread looks, while it waits for the loop's
CANCEL_AGAIN_S = 1.0

_lifespans: WeakKeyDictionary[Celery, list[Lifespan]] = WeakKeyDictionary()
_running: TaskPool | None = None


def lifespan(app: Celery) -> Callable[[Lifespan], Lifespan]:
    """Register an async context manager that lives as long as the pool's loop.

    Decorate a function that takes the pool and returns an async context manager (such
    as one made with `contextlib.asynccontextmanager`). Several are entered in the order
    of registration and left in reverse, all in one `asyncio.Task`. If entering raises,
    the worker ends with exit code 1, having fetched nothing.

    Args:
        app: the Celery application whose workers it is for.
    """

    def register(enter: Lifespan) -> Lifespan:
        _lifespans.setdefault(app, []).append(enter)
        return enter

    return register


def running_pool() -> TaskPool:
    """Return the pool of this process.

    Raises:
        RuntimeError: no asyncio pool is running in this process.
    """
    if _running is None:
        raise RuntimeError("no asyncio pool is running in this process")
    return _running


class TaskPool(BasePool):
    """The asyncio pool. Celery makes it; see the module's text for the contract."""

    # With these the worker keeps what exceeds the limit in front of the pool, where a
    # revoked task is still found, and lets one in with each `semaphore.release()`.
    uses_semaphore = True
    signal_safe = False
    task_join_will_block = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._semaphore = self.options.get("semaphore")
        self._handles: set[TaskHandle] = set()  # everything not yet ended, held strongly
        self._waiting: deque[TaskHandle] = deque()  # the loop's thread only
        self._in_flight: set[TaskHandle] = set()  # the loop's thread only
        self._news: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._news_due = False
        self._hub: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lives: asyncio.Task[Any] | None = None
        self._closing = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._started: Future[None] = Future()
        self._draining = False

    # Use ---------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which all tasks and lifespans run.

        Raises:
            RuntimeError: the pool has not been started.
        """
        if self._loop is None:
            raise RuntimeError("the asyncio pool has not been started")
        return self._loop

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run `coroutine` on the loop from another thread, and wait for it.

        Args:
            coroutine: what to run.
            timeout_s: seconds to wait; the coroutine is cancelled when they are over.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            RuntimeError: called in the loop's own thread, or before the start.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run() would block the loop in its own thread: use await")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    # Celery's side: the hub's thread ---------------------------------------------------

    def on_start(self) -> None:
        """Start the loop's thread and enter the lifespans.

        Raises:
            Exception: whatever a lifespan raised; the worker then ends.
        """
        self._thread = threading.Thread(target=self._main, name="asyncio-pool", daemon=True)
        self._thread.start()
        try:
            while not self._started.done():
                time.sleep(TICK_S)
                # A signal during a long start (loading a model) is only a flag so far.
                state.maybe_shutdown()
        except BaseException:
            self._from_outside(lambda: self._lives and self._lives.cancel())
            self._thread.join(self._cancel_timeout_s)
            raise
        self._started.result()

    def did_start_ok(self) -> bool:
        """Say whether the loop runs."""
        return self._thread is not None and self._thread.is_alive()

    def register_with_event_loop(self, loop: Any) -> None:
        """Learn of the hub, to which outcomes are handed."""
        self._hub = loop

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> TaskHandle:
        """Take a task in; it starts when there is room."""
        names = ("callback", "error_callback", "accept_callback", "timeout_callback")
        handle = TaskHandle(
            target,
            tuple(args or ()),
            kwargs or {},
            callbacks={name: options.get(name) for name in names},
            soft_timeout_s=options.get("soft_timeout") or self.options.get("soft_timeout"),
            timeout_s=options.get("timeout") or self.options.get("timeout"),
            correlation_id=options.get("correlation_id"),
            on_terminate=self._terminate_handle,
        )
        self._handles.add(handle)
        self._from_outside(self._admit, handle)
        return handle

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Do nothing: all tasks share this process.

        Celery calls it before `TaskHandle.terminate`, which ends the right one.
        """

    def flush(self) -> None:
        """Give back what has not started: the connection its message came by is gone."""
        self._from_outside(self._give_back_waiting)

    def grow(self, n: int = 1) -> None:
        """Allow `n` more tasks in flight."""
        self.limit += n
        if self._semaphore is not None:
            self._semaphore.grow(n)
        self._from_outside(self._start_waiting)

    def shrink(self, n: int = 1) -> None:
        """Allow `n` fewer tasks in flight; those running go on.

        Raises:
            ValueError: fewer than one would be left.
        """
        if self.limit - n < 1:
            raise ValueError(f"cannot shrink a pool of {self.limit} by {n}: one must be left")
        self.limit -= n
        if self._semaphore is not None:
            self._semaphore.shrink(n)

    @property
    def num_processes(self) -> int:
        """How many tasks may be in flight; Celery fetches messages by this number."""
        return int(self.limit)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        info.update(
            {
                "processes": [os.getpid()],
                "running": len(self._in_flight),
                "waiting": len(self._waiting),
                "event-loop": type(self._loop).__module__,
                "timeouts": [self.options.get("soft_timeout"), self.options.get("timeout")],
            }
        )
        return info

    # Stopping: the hub's thread, and a signal handler within it ---------------------------

    def on_close(self) -> None:
        """Start nothing any more."""
        self._from_outside(self._give_back_waiting)

    def on_stop(self) -> None:
        """Drain (warm), or interrupt (called by the handler of a cold shutdown).

        The handler runs in the middle of anything, a drain and kombu's locks included.
        So here it only ends the tasks, and leaves telling the worker to whoever it
        interrupted or to `on_terminate`. Polling, for the same reason: the condition
        of an `Event` is no lock to be taken twice by one thread.
        """
        if self._draining or state.should_terminate:
            self._interrupt_all()
            return
        self._draining = True
        limit_s = self._setting("worker_pool_drain_timeout_s", None)
        end = None if limit_s is None else time.monotonic() + limit_s
        while self._handles and not state.should_terminate:
            if (end is not None and time.monotonic() > end) or not self.did_start_ok():
                logger.warning("interrupting %d tasks: the drain is over", len(self._handles))
                break
            time.sleep(TICK_S)
            self._tell()
            if self._hub is not None:
                run_pending_acks(self._hub)  # so that no kill can take back what is done
        self.on_terminate()

    def on_terminate(self) -> None:
        """Interrupt what still runs, leave the lifespans, end the thread."""
        self._interrupt_all()
        self._tell()
        self._from_outside(self._closing.set)
        if self._thread is not None:
            self._thread.join(self._setting("worker_pool_exit_timeout_s", 60))
            if self._thread.is_alive():
                logger.critical("the asyncio pool's thread does not end; it is abandoned")
        self._tell()

    def _interrupt_all(self) -> None:
        end = time.monotonic() + self._cancel_timeout_s
        self._from_outside(self._interrupt_running)
        while self._handles and self.did_start_ok() and time.monotonic() < end:
            time.sleep(TICK_S)
        if self._handles:
            logger.error("%d tasks did not end when cancelled", len(self._handles))

    @property
    def _cancel_timeout_s(self) -> float:
        return float(self._setting("worker_pool_cancel_timeout_s", 10))

    def _setting(self, name: str, default: Any) -> Any:
        return default if self.app is None else self.app.conf.get(name, default)

    # The loop's thread ------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                runner.run(self._live())
        except BaseException as exc:
            logger.exception("the asyncio pool's loop has ended")
            if not self._started.done():
                self._started.set_exception(exc)
        finally:
            if not self._closing.is_set():
                # Without its loop the worker would take messages and answer none.
                state.should_stop = 1

    async def _live(self) -> None:
        global _running  # noqa: PLW0603  there is one pool in a worker process
        self._loop, self._lives = asyncio.get_running_loop(), asyncio.current_task()
        async with AsyncExitStack() as stack:
            for enter in _lifespans.get(self.app, ()):
                await stack.enter_async_context(enter(self))
            _running = self
            stack.callback(_forget_pool)
            self._started.set_result(None)
            await self._closing.wait()

    def _from_outside(self, function: Callable[..., Any], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _admit(self, handle: TaskHandle) -> None:
        if not self.active:
            self._give_back(handle)
        elif len(self._in_flight) < self.limit:
            self._start_handle(handle)
        else:
            self._waiting.append(handle)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._in_flight) < self.limit:
            self._start_handle(self._waiting.popleft())

    def _start_handle(self, handle: TaskHandle) -> None:
        if handle.reason is not None:
            self._end(handle, None, asyncio.CancelledError())
            return
        self._in_flight.add(handle)
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
        self._in_flight.discard(handle)
        # Cancelled before its first step, the greenlet was never entered.
        value, error = (None, asyncio.CancelledError()) if done.cancelled() else done.result()
        self._end(handle, value, error)
        self._start_waiting()

    def _end(self, handle: TaskHandle, value: Any, error: BaseException | None) -> None:
        """Settle the handle's outcome, forget it, and let the next one in."""
        if handle.reason is not None and (error is not None or handle.reason is Reason.TERMINATED):
            error = self._reported_as(handle)
        elif isinstance(error, asyncio.CancelledError) and handle.soft_limit_due:
            error = SoftTimeLimitExceeded(handle.soft_timeout_s)  # waited without wait_for
        elif error is not None and (
            not isinstance(error, Exception) or isinstance(error, MemoryError)
        ):
            # Celery takes these for the end of a worker's process, and would raise them.
            error = WorkerLostError(f"the task raised {error!r}")
        if not handle.settled:
            handle.settled = True
            if error is None:
                self._report(handle, "callback", value)
            else:
                self._report(handle, "error_callback", _exception_info(error))
        self._handles.discard(handle)
        if self._semaphore is not None:
            self._post(self._release)

    def _reported_as(self, handle: TaskHandle) -> BaseException:
        if handle.reason is not Reason.SHUTDOWN:
            return Terminated(handle.signal)
        task = self.app.tasks.get(handle.args[0]) if self.app and handle.args else None
        if task is not None and not task.acks_late and handle.asyncio_task is not None:
            return WorkerLostError("the worker was shut down while the task ran")
        return Reject("the worker is shutting down", requeue=True)

    def _terminate_handle(self, handle: TaskHandle) -> None:
        self._from_outside(self._cancel, handle, Reason.TERMINATED)

    def _interrupt_running(self) -> None:
        self._give_back_waiting()
        for handle in tuple(self._in_flight):
            self._cancel(handle, Reason.SHUTDOWN)

    def _give_back_waiting(self) -> None:
        while self._waiting:
            self._give_back(self._waiting.popleft())

    def _give_back(self, handle: TaskHandle) -> None:
        handle.reason = handle.reason or Reason.SHUTDOWN
        self._end(handle, None, asyncio.CancelledError())

    def _cancel(self, handle: TaskHandle, reason: Reason) -> None:
        handle.reason = handle.reason or reason
        if handle.asyncio_task is None:
            if handle in self._waiting:
                self._waiting.remove(handle)
                self._end(handle, None, asyncio.CancelledError())
        elif not handle.asyncio_task.done():
            handle.asyncio_task.cancel()
            handle.timers.append(
                self.loop.call_later(CANCEL_AGAIN_S, self._cancel, handle, handle.reason)
            )

    def _soft_limit(self, handle: TaskHandle) -> None:
        if handle.reason is None and handle.asyncio_task is not None:
            handle.soft_limit_due = True
            self._report(handle, "timeout_callback", True, handle.soft_timeout_s)
            handle.asyncio_task.cancel()

    def _hard_limit(self, handle: TaskHandle) -> None:
        if handle.reason is None:
            # Told at once, as if the task were killed: it may be slow to clean up.
            handle.settled = True
            self._report(handle, "timeout_callback", False, handle.timeout_s)
            self._cancel(handle, Reason.HARD_LIMIT)

    # Telling the worker -----------------------------------------------------------------

    def _report(self, handle: TaskHandle, name: str, *args: Any) -> None:
        callback = handle.callbacks[name]
        if callback is not None:
            self._post(callback, *args)

    def _post(self, function: Callable[..., Any], *args: Any) -> None:
        self._news.append((function, args))
        if self._hub is None:
            self._tell()
        elif not self._news_due:
            self._news_due = True  # one wake-up of the hub for all that gathers meanwhile
            self._hub.call_soon(self._tell)

    def _tell(self) -> None:
        self._news_due = False
        while self._news:
            try:
                function, args = self._news.popleft()
            except IndexError:
                return
            try:
                function(*args)
            except Exception:
                # Its message stays unacknowledged and will be delivered again. The
                # others must be told, and the hub must not end.
                logger.exception("telling the worker of a task's outcome failed")

    def _release(self) -> None:
        if self.active:
            self._semaphore.release()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _forget_pool() -> None:
    global _running  # noqa: PLW0603  there is one pool in a worker process
    _running = None


def _exception_info(error: BaseException) -> Any:
    from billiard.einfo import ExceptionInfo

    try:
        raise error  # noqa: TRY301  one that never was raised has no traceback to report
    except BaseException:  # noqa: BLE001
        return ExceptionInfo()
