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
where the task waits; a task that goes on regardless is cancelled again after half the
time it has for its clean-up (below).

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
import functools
import logging
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks as run_pending_acks
from celery.worker import state

from .pool_loop import TaskLoop
from .pool_task import AsyncTask, TaskHandle, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    from celery import Celery

    Lifespan = Callable[["TaskPool"], AbstractAsyncContextManager[Any]]

__all__ = ["AsyncTask", "TaskHandle", "TaskPool", "lifespan", "running_pool", "wait_for"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

TICK_S = 0.02  # how often the main thread looks, while it waits for the loop's

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


def _nothing() -> None:
    pass


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
        self._news: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._news_due = False
        self._hub: Any = None
        self._draining = False
        self._tasks = TaskLoop(
            limit=self.limit,
            cancel_again_s=self._cancel_timeout_s / 2,
            tell=self._post,
            ended=functools.partial(self._post, self._release),
            acks_late=self._acks_late,
            died=self._stop_worker,
        )

    # Use ---------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which all tasks and lifespans run.

        Raises:
            RuntimeError: the pool has not been started.
        """
        return self._tasks.loop

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run `coroutine` on the loop from another thread, and wait for it.

        Args:
            coroutine: what to run.
            timeout_s: seconds to wait; the coroutine is cancelled when they are over.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            RuntimeError: called in the loop's own thread, or before the start.
        """
        if threading.current_thread() is self._tasks.thread:
            coroutine.close()
            raise RuntimeError("run() would block the loop in its own thread: use await")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def wake(self) -> None:
        """Let the hub look again whether to fetch messages. From any thread."""
        self._post(_nothing)

    # Celery's side: the hub's thread ---------------------------------------------------

    def on_start(self) -> None:
        """Start the loop's thread and enter the lifespans.

        Raises:
            Exception: whatever a lifespan raised; the worker then ends.
        """
        global _running  # noqa: PLW0603  there is one pool in a worker process
        registered = [] if self.app is None else _lifespans.get(self.app, [])
        self._tasks.start([functools.partial(enter, self) for enter in registered])
        try:
            while not self._tasks.started.done():
                time.sleep(TICK_S)
                # A signal during a long start (loading a model) is only a flag so far.
                state.maybe_shutdown()
        except BaseException:
            self._tasks.leave()
            self._tasks.thread.join(self._cancel_timeout_s)
            raise
        self._tasks.started.result()
        _running = self

    def did_start_ok(self) -> bool:
        """Say whether the loop runs."""
        return self._tasks.alive

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
            on_terminate=self._tasks.terminate,
        )
        self._tasks.admit(handle)
        return handle

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Do nothing: all tasks share this process.

        Celery calls it before `TaskHandle.terminate`, which ends the right one.
        """

    def flush(self) -> None:
        """Give back what has not started: the connection its message came by is gone."""
        self._tasks.give_back_waiting()

    def grow(self, n: int = 1) -> None:
        """Allow `n` more tasks in flight."""
        self._resize(self.limit + n)
        if self._semaphore is not None:
            self._semaphore.grow(n)

    def shrink(self, n: int = 1) -> None:
        """Allow `n` fewer tasks in flight; those running go on.

        Raises:
            ValueError: fewer than one would be left.
        """
        if self.limit - n < 1:
            raise ValueError(f"cannot shrink a pool of {self.limit} by {n}: one must be left")
        self._resize(self.limit - n)
        if self._semaphore is not None:
            self._semaphore.shrink(n)

    def _resize(self, limit: int) -> None:
        self.limit = limit
        self._tasks.resize(limit)

    @property
    def num_processes(self) -> int:
        """How many tasks may be in flight; Celery fetches messages by this number."""
        return int(self.limit)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return info | {
            "processes": [os.getpid()],
            "running": len(self._tasks.in_flight),
            "waiting": len(self._tasks.waiting),
            "event-loop": type(self.loop).__module__,
            "timeouts": [self.options.get("soft_timeout"), self.options.get("timeout")],
        }

    # Stopping: the hub's thread, and a signal handler within it ---------------------------

    def on_close(self) -> None:
        """Start nothing any more."""
        self._tasks.close()

    def on_stop(self) -> None:
        """Drain (warm), or interrupt (called by the handler of a cold shutdown).

        The handler runs in the middle of anything, a drain and kombu's locks included.
        So here it only ends the tasks, and leaves telling the worker to whoever it
        interrupted or to `on_terminate`. Polling, for the same reason: the condition
        of an `Event` is no lock to be taken twice by one thread.
        """
        if self._draining or state.should_terminate:
            self._interrupt()
            return
        self._draining = True
        limit_s = self._setting("worker_pool_drain_timeout_s", None)
        end = None if limit_s is None else time.monotonic() + limit_s
        while self._tasks.handles and self._tasks.alive and not state.should_terminate:
            if end is not None and time.monotonic() > end:
                logger.warning("%d tasks outlast the drain", len(self._tasks.handles))
                break
            time.sleep(TICK_S)
            self._tell_and_ack()
        self.on_terminate()

    def on_terminate(self) -> None:
        """Interrupt what still runs, leave the lifespans, end the thread."""
        global _running  # noqa: PLW0603
        self._interrupt()
        self._tell_and_ack()
        self._tasks.leave()
        if self._tasks.alive:
            self._tasks.thread.join(self._setting("worker_pool_exit_timeout_s", 60))
            if self._tasks.alive:
                logger.critical("the asyncio pool's thread does not end; it is abandoned")
        self._tell_and_ack()
        _running = None

    def _interrupt(self) -> None:
        end = time.monotonic() + self._cancel_timeout_s
        self._tasks.interrupt()
        while self._tasks.handles and self._tasks.alive and time.monotonic() < end:
            time.sleep(TICK_S)
        if self._tasks.handles:
            logger.error("%d tasks did not end when cancelled", len(self._tasks.handles))

    def _stop_worker(self) -> None:
        # Without its loop the worker would take messages and answer none.
        state.should_stop = 1

    @property
    def _cancel_timeout_s(self) -> float:
        return float(self._setting("worker_pool_cancel_timeout_s", 10))

    def _setting(self, name: str, default: Any) -> Any:
        return default if self.app is None else self.app.conf.get(name, default)

    def _acks_late(self, handle: TaskHandle) -> bool:
        task = self.app.tasks.get(handle.args[0]) if self.app and handle.args else None
        return task is None or bool(task.acks_late)

    # Telling the worker -----------------------------------------------------------------

    def _post(self, function: Callable[..., Any], *args: Any) -> None:
        self._news.append((function, args))
        if self._hub is None:
            self._tell()  # no hub with this transport: the loop's thread has to do it
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

    def _tell_and_ack(self) -> None:
        self._tell()
        if self._hub is not None:
            # The hub does not turn any more. What is done must not wait for its end: the
            # process may be killed before.
            run_pending_acks(self._hub)

    def _release(self) -> None:
        if self.active and self._semaphore is not None:
            self._semaphore.release()
