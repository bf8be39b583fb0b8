"""The asyncio pool in real worker processes."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import (
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeLimitExceeded,
    WorkerLostError,
)

from tests.integration.pool_worker import (
    DEADLINE_S,
    Worker,
    kombu_url,
    plain_redis,
    running,
    until,
)

TERM, QUIT, INT = signal.SIGTERM, signal.SIGQUIT, signal.SIGINT
_logs = itertools.count()


@pytest.fixture(scope="module")
def server(stack: Any) -> Iterator[Any]:
    client = plain_redis(stack.redis_url)
    client.flushdb()
    yield client
    client.flushdb()
    client.close()


@pytest.fixture(scope="module")
def tasks(stack: Any, server: Any) -> Iterator[Any]:
    """The application's tasks, ready to be sent from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POOL_APP_URL", kombu_url(stack.redis_url))
        module = importlib.import_module("tests.integration.pool_app")
        yield module
    module.app.close()


@pytest.fixture(scope="module")
def worker(stack: Any, server: Any, tasks: Any, tmp_path_factory: Any) -> Iterator[Worker]:
    """One worker for all tests that leave it alive."""
    log = tmp_path_factory.mktemp("pool") / "worker.log"
    with running(kombu_url(stack.redis_url), server, log) as worker:
        yield worker.ready()
        if not worker.gone():
            worker.send(TERM)
            assert worker.exit_code() == 0, worker.output()


@pytest.fixture
def start(stack: Any, server: Any, tasks: Any, tmp_path: Path, request: Any) -> Any:
    """Start workers of one's own, with the queue and the traces empty."""
    # A queue of their own, because the shared worker would take the messages.
    with contextlib.ExitStack() as stop:

        def start(*, wait: bool = True, **settings: Any) -> Worker:
            log = tmp_path / f"worker{next(_logs)}.log"
            worker = stop.enter_context(
                running(kombu_url(stack.redis_url), server, log, queue="own", **settings)
            )
            return worker.ready() if wait else worker

        server.delete("own", "events", "unacked", "unacked_index")
        yield start


def send(task: Any, *args: Any, **options: Any) -> Any:
    """Send to the queue of a worker of the test's own."""
    return task.apply_async(args, queue="own", **options)


def unacknowledged(server: Any) -> int:
    return int(server.hlen("unacked"))


def settled(server: Any) -> None:
    until("all messages to be acknowledged", lambda: unacknowledged(server) == 0)


# A worker at work --------------------------------------------------------------------------


def test_five_hundred_naps_are_taken_at_once_in_one_thread(
    worker: Worker, tasks: Any, server: Any
) -> None:
    results = [tasks.nap.delay(0.5) for _ in range(500)]
    said = {result.get(timeout=DEADLINE_S) for result in results}
    assert said == {"asyncio-pool 2"}  # the consumer's thread and the loop's
    settled(server)


def test_each_of_many_tasks_is_acknowledged(worker: Worker, tasks: Any, server: Any) -> None:
    before = total(tasks, tasks.empty)
    for _ in range(2000):
        tasks.empty.apply_async(ignore_result=True)
    until("all to be run", lambda: total(tasks, tasks.empty) == before + 2000)
    settled(server)
    assert "Couldn't ack" not in worker.output()
    assert "outcome failed" not in worker.output()


def total(tasks: Any, task: Any) -> int:
    stats = until("stats", lambda: tasks.app.control.inspect(["w@test"], timeout=2).stats())
    return int(stats["w@test"]["total"].get(task.name, 0))


def test_ordinary_task_waits_for_a_coroutine(worker: Worker, tasks: Any) -> None:
    assert tasks.plain_nap.delay(0.01).get(timeout=DEADLINE_S) == "asyncio-pool"


def test_a_task_knows_its_request_in_the_coroutine(worker: Worker, tasks: Any) -> None:
    results = [tasks.who.delay() for _ in range(20)]
    assert [result.get(timeout=DEADLINE_S) for result in results] == [r.id for r in results]


def test_failure_is_reported(worker: Worker, tasks: Any, server: Any) -> None:
    with pytest.raises(ValueError, match="no luck"):
        tasks.fails.delay().get(timeout=DEADLINE_S)
    settled(server)


def test_a_coroutine_task_is_retried(worker: Worker, tasks: Any) -> None:
    assert tasks.fails_once.delay().get(timeout=DEADLINE_S) == 1


@pytest.mark.parametrize(
    "kind", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError", "GreenletExit"]
)
def test_what_is_no_exception_fails_the_task_only(
    worker: Worker, tasks: Any, server: Any, kind: str
) -> None:
    with pytest.raises(WorkerLostError, match=kind):
        tasks.raises.delay(kind).get(timeout=DEADLINE_S)
    settled(server)
    assert not worker.gone()


@pytest.mark.parametrize("kind", ["SystemExit", "GeneratorExit"])
def test_the_same_from_a_coroutine(worker: Worker, tasks: Any, server: Any, kind: str) -> None:
    with pytest.raises(WorkerLostError, match=kind):
        tasks.raises_async.delay(kind).get(timeout=DEADLINE_S)
    settled(server)


def test_memory_error_fails_the_task_only(worker: Worker, tasks: Any, server: Any) -> None:
    with pytest.raises((MemoryError, WorkerLostError)):
        tasks.raises.delay("MemoryError").get(timeout=DEADLINE_S)
    settled(server)
    assert not worker.gone()


def test_revoke_ends_a_running_task(worker: Worker, tasks: Any, server: Any) -> None:
    result = tasks.nap.delay(600, "revoked")
    worker.saw("start revoked")
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError, match="terminated"):
        result.get(timeout=DEADLINE_S)
    worker.saw("cancelled revoked", "finally revoked")
    settled(server)


def test_soft_limit_is_raised_in_the_coroutine(worker: Worker, tasks: Any, server: Any) -> None:
    result = tasks.nap.apply_async((600, "softly"), soft_time_limit=0.2)
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=DEADLINE_S)
    worker.saw("soft softly", "finally softly")
    settled(server)


def test_soft_limit_can_be_survived(worker: Worker, tasks: Any) -> None:
    result = tasks.plain_nap.apply_async((600, "plainly"), soft_time_limit=0.2, time_limit=600)
    assert result.get(timeout=DEADLINE_S) == "caught"


def test_hard_limit_cancels(worker: Worker, tasks: Any, server: Any) -> None:
    result = tasks.nap.apply_async((600, "hard"), time_limit=0.2)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=DEADLINE_S)
    worker.saw("cancelled hard", "finally hard")
    settled(server)


def test_a_task_that_swallows_its_cancellation_is_cancelled_again(
    worker: Worker, tasks: Any, server: Any
) -> None:
    result = tasks.stubborn.apply_async((600,), time_limit=0.2)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=DEADLINE_S)
    until("two cancellations", lambda: worker.events().count("swallowed") == 2)
    until("it to end", lambda: pool_stats(tasks)["running"] == 0)


def pool_stats(tasks: Any) -> dict[str, Any]:
    stats = until("stats", lambda: tasks.app.control.inspect(["w@test"], timeout=2).stats())
    return dict(stats["w@test"]["pool"])


def test_inspection(worker: Worker, tasks: Any) -> None:
    result = tasks.nap.delay(600, "inspected")
    worker.saw("start inspected")
    inspect = tasks.app.control.inspect(["w@test"], timeout=5)
    assert inspect.ping() == {"w@test": {"ok": "pong"}}
    assert [task["id"] for task in inspect.active()["w@test"]] == [result.id]
    assert [task["id"] for task in inspect.reserved()["w@test"]] == []
    stats = inspect.stats()["w@test"]["pool"]
    assert stats["implementation"] == "workers.pool:TaskPool"
    assert stats["processes"] == [worker.process.pid]
    assert (stats["max-concurrency"], stats["running"]) == (500, 1)
    result.revoke(terminate=True)
    until("it to end", lambda: pool_stats(tasks)["running"] == 0)


# A worker of the test's own ------------------------------------------------------------------


def test_waiting_tasks_are_revoked_and_room_is_kept(start: Any, tasks: Any, server: Any) -> None:
    worker = start(concurrency=1)
    first = send(tasks.nap, 600, "first")
    worker.saw("start first")
    second, third = send(tasks.nap, 0, "second"), send(tasks.nap, 0, "third")
    inspect = tasks.app.control.inspect(["w@test"], timeout=5)
    until("no room", lambda: server.llen("own") == 2 or inspect.reserved()["w@test"])
    second.revoke()
    tasks.app.control.revoke([], destination=["w@test"], reply=True)  # the one before has come
    first.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        second.get(timeout=DEADLINE_S)
    third.get(timeout=DEADLINE_S)
    assert "start second" not in worker.events()


def test_only_what_there_is_room_for_is_fetched(start: Any, tasks: Any, server: Any) -> None:
    worker = start(concurrency=3, prefetch=50, disable_prefetch=1)
    naps = [send(tasks.nap, 600, f"{n}") for n in range(10)]
    until("three to start", lambda: sum("start" in event for event in worker.events()) == 3)
    tasks.app.control.inspect(["w@test"], timeout=5).ping()
    assert server.llen("own") == 7
    tasks.app.control.pool_grow(2, destination=["w@test"], reply=True)
    until("five to start", lambda: sum("start" in event for event in worker.events()) == 5)
    tasks.app.control.pool_shrink(4, destination=["w@test"], reply=True)
    started = {event.split()[1] for event in worker.events() if "start" in event}
    for nap in (nap for n, nap in enumerate(naps) if str(n) in started):
        nap.revoke(terminate=True)
    until("one more to start", lambda: sum("start" in event for event in worker.events()) == 6)
    tasks.app.control.inspect(["w@test"], timeout=5).ping()
    assert server.llen("own") == 4


def test_failing_lifespan_ends_the_worker(start: Any, tasks: Any, server: Any) -> None:
    send(tasks.empty)
    worker = start(wait=False, fail_start=1)
    assert worker.exit_code() == 1
    assert "the engine does not start" in worker.output()
    assert server.llen("own") == 1


def test_a_long_start_can_be_broken_off(start: Any) -> None:
    worker = start(wait=False, slow_start=1)
    worker.saw("entering")
    worker.send(TERM)
    assert worker.exit_code() == 0
    assert "start cancelled" in worker.events()


def test_warm_shutdown_finishes_what_runs_and_gives_back_the_rest(
    start: Any, tasks: Any, server: Any
) -> None:
    worker = start(concurrency=2, prefetch=10)
    for n in range(6):
        send(tasks.nap, 5, f"{n}")
    worker.saw("start 0", "start 1")
    worker.send(TERM)
    assert worker.exit_code() == 0
    events = worker.events()
    assert sum(event.startswith("start") for event in events) == 2
    assert not any(event.startswith("cancelled") for event in events)
    assert (events[0], events[-1]) == ("enter True", "leave")
    assert (server.llen("own"), unacknowledged(server)) == (4, 0)


def test_acknowledged_during_the_drain(start: Any, tasks: Any, server: Any) -> None:
    worker = start()
    send(tasks.nap, 1, "short")
    send(tasks.nap, 600, "long")
    worker.saw("start short", "start long")
    worker.send(TERM)
    until("the short one's acknowledgement", lambda: unacknowledged(server) == 1)
    assert not worker.gone()
    worker.send(QUIT)
    assert worker.exit_code() in {0, 1}
    assert server.llen("own") == 1


def test_drain_is_bounded(start: Any, tasks: Any, server: Any) -> None:
    worker = start(drain=0.5)
    send(tasks.nap, 600, "long")
    send(tasks.early, 600)
    worker.saw("start long", "start early")
    worker.send(TERM)
    assert worker.exit_code() == 0
    worker.saw("cancelled long", "finally long")
    assert worker.events()[-1] == "leave"
    # The one acknowledged late comes again; the other was acknowledged when it began.
    assert (server.llen("own"), unacknowledged(server)) == (1, 0)


@pytest.mark.parametrize("signals", [(QUIT,), (INT, INT), (TERM, QUIT), (QUIT, QUIT)])
def test_cold_shutdown_redelivers(
    start: Any, tasks: Any, server: Any, signals: tuple[signal.Signals, ...]
) -> None:
    worker = start()
    for n in range(20):
        send(tasks.nap, 600, f"{n}")
    until("all to start", lambda: sum("start" in event for event in worker.events()) == 20)
    worker.send(signals[0])
    if signals[1:]:
        until("the first signal to be seen", lambda: "hutdown" in worker.output())
        worker.send(*signals[1:])
    assert worker.exit_code() in {0, 1}
    assert sum("finally" in event for event in worker.events()) == 20
    assert worker.events()[-1] == "leave"
    assert (server.llen("own"), unacknowledged(server)) == (20, 0)


def test_a_blocked_loop_does_not_hold_up_a_cold_shutdown(
    start: Any, tasks: Any, server: Any
) -> None:
    worker = start(cancel=0.5, exit=0.5)
    send(tasks.blocks, 600)
    worker.saw("start blocks")
    worker.send(QUIT)
    assert worker.exit_code() in {0, 1}
    assert server.llen("own") == 1


def test_remote_shutdown(start: Any, tasks: Any) -> None:
    worker = start()
    tasks.app.control.shutdown(["w@test"])
    assert worker.exit_code() == 0


def test_killed_worker_leaves_its_messages(start: Any, tasks: Any, server: Any) -> None:
    worker = start()
    send(tasks.nap, 600, "lost")
    worker.saw("start lost")
    worker.process.kill()
    worker.process.wait()
    assert unacknowledged(server) == 1
    server.delete("unacked", "unacked_index")
