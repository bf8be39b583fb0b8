"""A worker's process is replaced when it dies, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from workers.worker_process import READY, WorkerProcess

DEADLINE_S = 60.0
# Two children that hold its output open: one in a group, one in a session of its own.
_LEAVES_CHILDREN = f"""
import subprocess, sys, time
group = subprocess.Popen(["sleep", "600"], process_group=0)
session = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=1)
print("children", group.pid, session.pid, flush=True)
print({READY!r}, flush=True)
time.sleep(600)
"""
_HEEDS_NOTHING = f"""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print({READY!r}, flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def events() -> list[str]:
    """What was told of workers."""
    return []


@pytest.fixture
def lines() -> list[str]:
    """What workers wrote."""
    return []


@pytest.fixture
def make(events: list[str]) -> Iterator[Callable[[str], WorkerProcess]]:
    """Makes workers of a script; they are ended afterwards."""
    made: list[WorkerProcess] = []

    def of(script: str) -> WorkerProcess:
        worker = WorkerProcess(
            name="test",
            command=[sys.executable, "-c", script],
            environment=os.environ,
            on_event=events.append,
        )
        made.append(worker)
        worker.start()
        return worker

    yield of
    for worker in made:
        worker.stop(signal.SIGKILL)
        worker.join(DEADLINE_S)


def children_of(worker: WorkerProcess) -> list[int]:
    until(lambda: any("children" in line for line in worker.last_words) and worker.took_jobs)
    line = next(line for line in worker.last_words if "children" in line)
    return [int(word) for word in line.split()[1:]]


def test_a_killed_worker_is_replaced_though_its_children_hold_its_output(
    make: Callable[[str], WorkerProcess],
) -> None:
    worker = make(_LEAVES_CHILDREN)
    children = children_of(worker)
    assert worker.process is not None
    dead = worker.process.pid
    os.kill(dead, signal.SIGKILL)
    until(lambda: worker.process is not None and worker.process.pid != dead)
    assert all(gone(child) for child in children)


def test_a_worker_that_is_stopped_takes_its_children_along(
    make: Callable[[str], WorkerProcess],
) -> None:
    worker = make(_LEAVES_CHILDREN)
    children = children_of(worker)
    worker.stop()
    worker.join(DEADLINE_S)
    assert not worker.alive
    assert all(gone(child) for child in children)


def test_a_worker_that_does_not_end_is_killed(make: Callable[[str], WorkerProcess]) -> None:
    worker = make(_HEEDS_NOTHING)
    until(worker.ready.is_set)
    worker.stop()
    worker.join(0.1)
    assert not worker.alive
    assert not worker.given_up.is_set()


_WRITES = f"""
import signal, sys, time
def end(*_):
    print("three", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("one")
print({READY!r}, flush=True)
print("two", file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("all_lines", [False, True])
def test_what_a_worker_writes_is_handed_on(lines: list[str], all_lines: bool) -> None:
    """Its log would be seen by nobody otherwise; what its start and end have to say is long."""
    worker = WorkerProcess(
        name="test",
        command=[sys.executable, "-c", _WRITES],
        environment=os.environ,
        on_event=lambda _text: None,
        on_line=lines.append,
        all_lines=all_lines,
    )
    worker.start()
    until(lambda: "two" in lines)
    worker.stop()
    worker.join(DEADLINE_S)
    assert lines == (["one", "two", "three"] if all_lines else ["two"])


def test_it_is_told_once_what_a_worker_waits_for(
    make: Callable[[str], WorkerProcess], events: list[str]
) -> None:
    lines = ["[warning] waiting for Postgres to=claim", "[warning] waiting for Redis reason=away"]
    script = f"import time\nfor line in {lines * 2!r}: print(line, flush=True)\ntime.sleep(600)"
    worker = make(script)
    until(lambda: len(worker.last_words) == 4)
    waits = [f"worker on test waits for {server}" for server in ("Postgres", "Redis")]
    assert [event for event in events if "waits" in event] == waits


def test_one_that_took_jobs_is_started_anew_however_often_it_dies(
    make: Callable[[str], WorkerProcess],
) -> None:
    worker = make(f"print({READY!r}, flush=True)")
    lives: set[int] = set()

    def lived_often() -> bool:
        lives.add(worker.process.pid if worker.process else 0)
        return len(lives - {0}) > 3

    until(lived_often)
    assert not worker.given_up.is_set()


def test_one_that_dies_again_and_again_at_its_start_is_given_up(
    make: Callable[[str], WorkerProcess],
) -> None:
    worker = make("import sys; print('no engine'); sys.exit(7)")
    until(worker.given_up.is_set)
    assert "no engine" in worker.last_words
    worker.join(DEADLINE_S)
    assert not worker.alive
