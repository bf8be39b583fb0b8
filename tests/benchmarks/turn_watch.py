"""`TurnWatch`: how long an event loop is kept from everybody else."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class TurnWatch:
    """Measures each turn of the event loop: from when it looks for news until it looks again.

    So long nobody else gets the loop. By the wall clock (`wall`) other processes of a busy machine
    count too, whenever they are given the core. `own` is without what the loop's thread waited for
    a core when it was ready to run, as the kernel counts it: what is left is work, and waiting for
    anything else. `cpu` is the work alone.
    """

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.own_s: list[float] = []
        self.cpu_s: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the running loop."""
        selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        select, began = selector.select, None

        with _waiting_for_a_core() as waited_s:

            def watched(timeout: float | None = None) -> Any:
                nonlocal began
                if began is not None:
                    wall_s = time.perf_counter() - began[0]
                    self.wall_s.append(wall_s)
                    self.cpu_s.append(time.thread_time() - began[1])
                    self.own_s.append(wall_s - (waited_s() - began[2]))
                found = select(timeout)
                began = time.perf_counter(), time.thread_time(), waited_s()
                return found

            selector.select = watched
            try:
                yield
            finally:
                selector.select = select

    def summary(self) -> dict[str, float]:
        """Return milliseconds, of the median turn, of one in a hundred, and of the longest."""
        return {
            f"{name}_{clock}_ms": round(float(np.quantile(taken, share)) * 1e3, 2)
            for clock, taken in (("wall", self.wall_s), ("own", self.own_s), ("cpu", self.cpu_s))
            for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0))
        }


@contextmanager
def _waiting_for_a_core() -> Iterator[Callable[[], float]]:
    """Yield what returns the seconds that this thread has waited for a core, ready to run."""
    try:
        # Documentation/scheduler/sched-stats.rst: time on a core, time waiting for one, both in ns.
        file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
    except OSError:  # another system: then it is the wall clock once more
        yield lambda: 0.0
        return
    try:
        yield lambda: int(os.pread(file, 100, 0).split()[1]) / 1e9
    finally:
        os.close(file)
