"""`Vitals`: how a worker's process is doing: its event loop and its memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import psutil

from workers.cancellation import end, heed_cancellation
from workers.series import LAG_BUCKETS_S

_LOOK_S = 0.25
_MEMORY_FRESH_S = 10.0


class Vitals:
    """Watches the running event loop, and looks at memory when asked."""

    def __init__(self) -> None:
        self.lag_classes = [0] * (len(LAG_BUCKETS_S) + 1)
        self.lag_sum_s = 0.0
        self._worst_s = 0.0
        self._memory: dict[str, int] = {}
        self._memory_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch; idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="promptmill-vitals")

    async def aclose(self) -> None:
        """Stop watching; idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    def take_worst_lag_s(self) -> float:
        """Return how late the loop was at worst since this was last asked, in seconds."""
        worst, self._worst_s = self._worst_s, 0.0
        return worst

    async def memory(self) -> dict[str, int]:
        """Return resident bytes by kind of process, of some seconds ago at most.

        Memory that processes share is counted in each of them.
        """
        if time.monotonic() - self._memory_at >= _MEMORY_FRESH_S:
            # Looking through /proc takes milliseconds, which the loop must not wait.
            self._memory = await asyncio.to_thread(resident_bytes)
            self._memory_at = time.monotonic()
        return self._memory

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            heed_cancellation()
            due = loop.time() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            late_s = max(loop.time() - due, 0.0)
            self.lag_classes[bisect_left(LAG_BUCKETS_S, late_s)] += 1
            self.lag_sum_s += late_s
            self._worst_s = max(self._worst_s, late_s)


def resident_bytes() -> dict[str, int]:
    """Return resident bytes of this process and those below it, by what they do."""
    total: Counter[str] = Counter()
    for kind, process in _processes():
        with contextlib.suppress(psutil.Error):
            total[kind] += process.memory_info().rss
    return dict(total)


def _processes() -> Iterator[tuple[str, psutil.Process]]:
    own = psutil.Process()
    yield "worker", own
    with contextlib.suppress(psutil.Error):
        for child in own.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                yield _kind(" ".join(child.cmdline())), child


def _kind(command: str) -> str:
    if "EngineCore" in command or "VLLM::" in command:
        return "engine"
    return "enrichment" if "workers.enrich" in command else "other"
