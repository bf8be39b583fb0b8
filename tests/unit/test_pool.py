"""What the asyncio pool tells its worker, whatever happens to a task."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded, Terminated, WorkerLostError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.pool import AsyncTask, TaskPool, running_pool, wait_for

NAMES = ("callback", "error_callback", "accept_callback", "timeout_callback")


class Listener:
    """Stands where Celery's request does, and writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {name: self._hear(name) for name in NAMES}

    def _hear(self, name: str) -> Callable[..., None]:
        return lambda *args: self.heard.append((name, args))

    def outcomes(self) -> list[str]:
        """What ended it; a soft limit and the start do not."""
        return [
            name
            for name, args in self.heard
            if name != "accept_callback" and (name, args[:1]) != ("timeout_callback", (True,))
        ]

    def error(self) -> BaseException:
        (info,) = next(args for name, args in self.heard if name == "error_callback")
        exception: BaseException = info.exception
        return getattr(exception, "exc", exception)


@pytest.fixture
def pool() -> Iterator[TaskPool]:
    pool = TaskPool(4)
    pool.start()
    yield pool
    pool.terminate()
    assert not pool.did_start_ok()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def outcome(listener: Listener) -> str:
    until(listener.outcomes)
    (name,) = listener.outcomes()
    return name


def sleeps(seconds: float = 600) -> tuple[int, str, float]:
    wait_for(asyncio.sleep(seconds))
    return 0, "slept", 0.0


def raises(error: BaseException) -> None:
    raise error


def test_result(pool: TaskPool) -> None:
    listener = Listener()
    pool.apply_async(sleeps, (0.01,), **listener.callbacks())
    assert outcome(listener) == "callback"
    assert [name for name, _ in listener.heard] == ["accept_callback", "callback"]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("x"), ValueError),
        (SystemExit(3), WorkerLostError),
        (KeyboardInterrupt(), WorkerLostError),
        (GeneratorExit(), WorkerLostError),
        (asyncio.CancelledError(), WorkerLostError),
        (MemoryError(), WorkerLostError),
        (StopIteration(), StopIteration),
    ],
)
def test_tracer_raises(pool: TaskPool, raised: BaseException, told: type[BaseException]) -> None:
    listener = Listener()
    pool.apply_async(raises, (raised,), **listener.callbacks())
    assert outcome(listener) == "error_callback"
    assert isinstance(listener.error(), told)


def test_terminated_while_running(pool: TaskPool) -> None:
    listener = Listener()
    handle = pool.apply_async(sleeps, **listener.callbacks())
    until(lambda: listener.heard)
    handle.terminate("TERM")
    assert outcome(listener) == "error_callback"
    assert isinstance(listener.error(), Terminated)


def test_terminated_at_once_and_while_waiting(pool: TaskPool) -> None:
    running = [pool.apply_async(sleeps, **Listener().callbacks()) for _ in range(4)]
    listeners = [Listener() for _ in range(3)]
    handles = [pool.apply_async(sleeps, **each.callbacks()) for each in listeners]
    for handle in handles:
        handle.terminate()
    for listener in listeners:
        assert outcome(listener) == "error_callback"
        assert isinstance(listener.error(), Terminated)
        assert listener.heard[0][0] == "error_callback"  # never accepted
    for handle in running:
        handle.terminate()


def test_hard_limit_is_told_once_though_the_task_goes_on(pool: TaskPool) -> None:
    listener, ended = Listener(), threading.Event()

    def stubborn() -> tuple[int, str, float]:
        try:
            wait_for(asyncio.sleep(600))
        except asyncio.CancelledError:
            wait_for(asyncio.sleep(0.05))
        ended.set()
        return 0, "late", 0.0

    pool.apply_async(stubborn, timeout=0.01, **listener.callbacks())
    assert outcome(listener) == "timeout_callback"
    assert ended.wait(20)
    until(lambda: pool.info["running"] == 0)
    assert listener.outcomes() == ["timeout_callback"]


def test_soft_limit_without_wait_for(pool: TaskPool) -> None:
    from sqlalchemy.util.concurrency import await_

    listener = Listener()
    pool.apply_async(lambda: await_(asyncio.sleep(600)), soft_timeout=0.01, **listener.callbacks())
    assert outcome(listener) == "error_callback"
    assert isinstance(listener.error(), SoftTimeLimitExceeded)


def test_limits_of_the_pool_hold_where_the_task_has_none() -> None:
    pool = TaskPool(1, timeout=0.01, soft_timeout=None)
    pool.start()
    listener = Listener()
    pool.apply_async(sleeps, **listener.callbacks())
    assert outcome(listener) == "timeout_callback"
    pool.terminate()


def test_shutdown_gives_back_what_runs_and_what_waits() -> None:
    pool = TaskPool(1)
    pool.start()
    listeners = [Listener() for _ in range(3)]
    for listener in listeners:
        pool.apply_async(sleeps, **listener.callbacks())
    until(lambda: listeners[0].heard)
    pool.close()
    pool.terminate()
    late = Listener()
    for listener in listeners:
        assert outcome(listener) == "error_callback"
        error = listener.error()
        assert isinstance(error, Reject)
        assert error.requeue
    assert late.heard == []


def test_a_failing_callback_spares_the_others(pool: TaskPool) -> None:
    broken = {name: (lambda *_: 1 / 0) for name in NAMES}
    pool.apply_async(sleeps, (0,), **broken)
    listener = Listener()
    pool.apply_async(sleeps, (0,), **listener.callbacks())
    assert outcome(listener) == "callback"


def test_run_and_loop(pool: TaskPool) -> None:
    async def here() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert pool.run(here()) is pool.loop
    assert running_pool() is pool
    with pytest.raises(TimeoutError):
        pool.run(asyncio.sleep(600), timeout_s=0.01)


def test_run_in_the_loop_is_refused(pool: TaskPool) -> None:
    listener = Listener()
    pool.apply_async(lambda: pool.run(asyncio.sleep(0)), **listener.callbacks())
    assert outcome(listener) == "error_callback"
    assert "use await" in str(listener.error())


def test_shrink_keeps_one(pool: TaskPool) -> None:
    pool.shrink(3)
    assert pool.num_processes == 1
    with pytest.raises(ValueError, match="one must be left"):
        pool.shrink(1)
    pool.grow(2)
    assert pool.num_processes == 3


def test_wait_for_outside_the_pool() -> None:
    with pytest.raises(RuntimeError, match="outside a task"):
        wait_for(asyncio.sleep(0))


def test_no_pool_runs_here() -> None:
    with pytest.raises(RuntimeError, match="no asyncio pool"):
        running_pool()


def test_async_task_outside_the_pool() -> None:
    app = Celery("t", set_as_current=False)

    @app.task(base=AsyncTask, bind=True)
    async def double(self: AsyncTask, n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    result: dict[str, int] = {}
    # pytest-asyncio has a loop in this thread.
    thread = threading.Thread(
        target=lambda: result.update(called=double(4), applied=double.apply((5,)).get())
    )
    thread.start()
    thread.join()
    assert result == {"called": 8, "applied": 10}


ends = st.sampled_from(["return", "raise", "exit", "terminate", "soft", "hard", "leave"])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kinds=st.lists(ends, min_size=1, max_size=12), warm=st.booleans())
def test_each_task_has_one_outcome(kinds: list[str], *, warm: bool) -> None:
    """Whatever mixture of ends, and a shutdown in the middle of them."""
    pool = TaskPool(3)
    pool.start()
    listeners = [Listener() for _ in kinds]
    for kind, listener in zip(kinds, listeners, strict=True):
        target: Callable[..., Any] = sleeps
        args: tuple[Any, ...] = ()
        limits: dict[str, float] = {}
        if kind == "return":
            args = (0.001,)
        elif kind == "raise":
            target, args = raises, (ValueError(),)
        elif kind == "exit":
            target, args = raises, (SystemExit(),)
        elif kind in {"soft", "hard"}:
            limits = {"soft_timeout" if kind == "soft" else "timeout": 0.002}
        handle = pool.apply_async(target, args, **limits, **listener.callbacks())
        if kind == "terminate":
            handle.terminate()
    if warm and "leave" not in kinds:
        pool.close()
        pool.stop()
    else:
        pool.terminate()
    assert [len(listener.outcomes()) for listener in listeners] == [1] * len(kinds)
