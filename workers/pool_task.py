"""One task in the asyncio pool: its handle, and what its author calls.

`TaskHandle` is what Celery holds of a running task. `wait_for` lets ordinary task
code wait for a coroutine without blocking the loop, and `AsyncTask` is the task base
class with which `async def` functions are tasks.

A task runs in a greenlet driven by an `asyncio.Task`. All of a handle's state belongs
to the loop's thread; only `terminate` may be called from elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
from contextvars import ContextVar
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.util.concurrency import await_, in_greenlet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

T = TypeVar("T")

_handle: ContextVar[TaskHandle] = ContextVar("promptmill_pool_handle")
_request: ContextVar[Any] = ContextVar("promptmill_pool_request")


class Reason(Enum):
    """Why the pool cancels a task; it decides what Celery is told."""

    TERMINATED = "terminated"  # revoked, or cancelled by Celery: told `Terminated`
    HARD_LIMIT = "hard limit"  # told through the time-out callback
    SHUTDOWN = "shutdown"  # the message goes back to its queue


class TaskHandle:
    """What `TaskPool.apply_async` returns, and Celery keeps a weak reference to.

    Args:
        target: Celery's tracer, with the `args` and `kwargs` to call it with.
        callbacks: what the worker wants to hear, by Celery's names (`callback`,
            `error_callback`, `accept_callback`, `timeout_callback`).
        soft_timeout_s: seconds until `SoftTimeLimitExceeded` is raised in the task.
        timeout_s: seconds until the task is cancelled for good.
        on_terminate: called, in any thread, with the handle when it is to end.
    """

    __slots__ = (
        "__weakref__",
        "args",
        "asyncio_task",
        "callbacks",
        "correlation_id",
        "kwargs",
        "on_terminate",
        "reason",
        "settled",
        "signal",
        "soft_limit_due",
        "soft_timeout_s",
        "target",
        "timeout_s",
        "timers",
    )

    def __init__(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        callbacks: dict[str, Callable[..., Any] | None],
        soft_timeout_s: float | None,
        timeout_s: float | None,
        correlation_id: str | None,
        on_terminate: Callable[[TaskHandle], None],
    ) -> None:
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.callbacks = callbacks
        self.soft_timeout_s = soft_timeout_s
        self.timeout_s = timeout_s
        self.correlation_id = correlation_id
        self.on_terminate = on_terminate
        self.asyncio_task: asyncio.Task[Any] | None = None
        self.reason: Reason | None = None
        self.signal: Any = None
        self.settled = False
        self.soft_limit_due = False
        self.timers: list[asyncio.TimerHandle] = []

    def terminate(self, signal: Any = None) -> None:
        """Cancel the task, from any thread; `CancelledError` arrives inside it.

        Args:
            signal: the signal a process would have got; only reported.
        """
        self.signal = signal
        self.on_terminate(self)

    def call(self) -> tuple[Any, BaseException | None]:
        """Run the tracer in the task's greenlet; nothing is raised out of it.

        `SystemExit` and `KeyboardInterrupt` would end the loop, `GeneratorExit` and
        `GreenletExit` would be taken for something else by what drives the greenlet.

        Returns:
            The tracer's value and None, or None and what it raised.
        """
        _handle.set(self)
        try:
            return self.target(*self.args, **self.kwargs), None
        except BaseException as exc:  # noqa: BLE001  it is told to the worker, not dropped
            return None, exc

    def take_soft_limit(self) -> bool:
        """Return once whether the pending cancellation stands for the soft limit."""
        due, self.soft_limit_due = self.soft_limit_due, False
        return due and self.reason is None


def wait_for(awaitable: Awaitable[T]) -> T:
    """Wait for `awaitable` from ordinary task code; other tasks run meanwhile.

    Args:
        awaitable: a coroutine, future or anything else that may be awaited. It runs on
            the pool's loop, in the task's own `asyncio.Task` and context.

    Returns:
        What the awaitable returns.

    Raises:
        asyncio.CancelledError: the task was revoked, ran into its hard time limit, or
            the worker is shutting down. Clean up and let it pass.
        SoftTimeLimitExceeded: the soft time limit; also raised inside the coroutine.
        RuntimeError: not called from a task that runs in this pool.
    """
    if not in_greenlet():
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise RuntimeError(
            "wait_for() was called outside a task of the asyncio pool: set worker_pool to "
            "'workers.pool:TaskPool', and inside a coroutine use await"
        )
    handle = _handle.get(None)
    if handle is not None and handle.soft_timeout_s:
        return await_(_with_soft_limit(_as_coroutine(awaitable), handle))
    return await_(awaitable)


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


@types.coroutine
def _with_soft_limit(
    coroutine: Coroutine[Any, Any, T], handle: TaskHandle
) -> Generator[Any, Any, T]:
    """Drive `coroutine`, turning the soft limit's cancellation into its exception.

    The exception is thrown in at the innermost await, so that an `async def` task can
    catch it where it waits, as a task in a process of its own could.
    """
    try:
        pending = coroutine.send(None)
        while True:
            try:
                value = yield pending
            except GeneratorExit:
                coroutine.close()
                raise
            except asyncio.CancelledError as exc:
                if handle.take_soft_limit():
                    # The request to cancel is answered by another exception.
                    handle.asyncio_task and handle.asyncio_task.uncancel()
                    pending = coroutine.throw(SoftTimeLimitExceeded(handle.soft_timeout_s))
                else:
                    pending = coroutine.throw(exc)
            except BaseException as exc:  # noqa: BLE001  handed on, whatever it is
                pending = coroutine.throw(exc)
            else:
                pending = coroutine.send(value)
    except StopIteration as stop:
        return stop.value


class AsyncTask(Task):
    """Base class of tasks that are coroutine functions.

    Use it as `@app.task(base=AsyncTask)` above an `async def`. Every option of Celery's
    works: `bind`, `acks_late`, `autoretry_for`, time limits. `self.request` and
    `self.retry()` work in the coroutine too; Celery's `current_task` does not.

    Outside the pool (called directly, `apply`, or `task_always_eager`) the coroutine
    gets a loop of its own for as long as it runs.
    """

    abstract = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give Celery an ordinary function where `run` is a coroutine function."""
        super().__init_subclass__(**kwargs)
        run = cls.__dict__.get("run")
        function = run.__func__ if isinstance(run, staticmethod) else run
        if inspect.iscoroutinefunction(function):
            ordinary = _ordinary(function, cls)
            cls.run = staticmethod(ordinary) if isinstance(run, staticmethod) else ordinary

    @property
    def request(self) -> Any:
        """The request being run, in the task's greenlet and in its coroutine.

        Celery keeps requests by greenlet, and a coroutine runs in the loop's.
        """
        own = self.request_stack.top
        carried = None if own is not None else _request.get(None)
        if carried is not None and carried.task == self.name:
            return carried
        return own if own is not None else self._get_request()


def _ordinary(function: Callable[..., Coroutine[Any, Any, Any]], cls: Any) -> Callable[..., Any]:
    """Wrap a coroutine function in an ordinary one that waits for it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not in_greenlet():
            return asyncio.run(function(*args, **kwargs))
        _request.set(cls.request_stack.top)
        return wait_for(function(*args, **kwargs))

    # Celery tells a coroutine function by this attribute's target; ours is none.
    del run.__wrapped__
    return run
