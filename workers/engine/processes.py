"""`Processes`: memory and processor time of an engine's process and its children."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import psutil

#: Seconds for which a snapshot is believed.
_FRESH_S = 1.0
#: Characters of a name that are shown.
_NAME_CHARS = 40


class Processes:
    """Looks at the processes when it is made, and at most once a second afterwards."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._looked_at = float("-inf")
        self._last = self._look()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return what each process uses, as JSON types, a moment ago.

        Returns:
            By name, ``self`` first: ``pid``, ``memory_bytes`` (resident; what processes share
            counts in each) and ``cpu_s`` (seconds of processor time since its start).
        """
        if time.monotonic() - self._looked_at >= _FRESH_S:
            self._looked_at = time.monotonic()
            # Finding the children reads every process of the machine, which an event loop that
            # asks for a snapshot must not wait for.
            threading.Thread(target=self._renew, name="promptmill-processes", daemon=True).start()
        return self._last

    def _renew(self) -> None:
        self._last = self._look()

    def _look(self) -> dict[str, dict[str, Any]]:
        found = {"self": _used(self._own)}
        times: Counter[str] = Counter()
        for child in self._own.children(recursive=True):
            try:
                name = _name(child)
                used = _used(child)
            except psutil.Error:  # it has just ended
                continue
            times[name] += 1
            found[name if times[name] == 1 else f"{name} {times[name]}"] = used
        return found


def _name(process: psutil.Process) -> str:
    """Return what a process does: what a module run by Python is told to be, or its own name."""
    words = process.cmdline()
    if "-m" in words[:-2] and (kind := words[words.index("-m") + 2]).isidentifier():
        return kind[:_NAME_CHARS]
    return process.name()[:_NAME_CHARS]


def _used(process: psutil.Process) -> dict[str, Any]:
    with process.oneshot():
        cpu = process.cpu_times()
        return {
            "pid": process.pid,
            "memory_bytes": process.memory_info().rss,
            "cpu_s": round(cpu.user + cpu.system, 2),
        }
