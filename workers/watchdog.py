"""`Watchdog`: ends a worker whose engine is dead or answers no more, or whose loop stands still.

Only a new process gets a new engine. What was in flight goes back first, as suspects.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import structlog

from workers.cancellation import end

if TYPE_CHECKING:
    from workers.pipeline import Pipeline

_log = structlog.get_logger(__name__)
_LOOK_S = 0.5
_LOOKS_BETWEEN_QUESTIONS = 10
_GIVE_BACK_S = 5.0
#: Seconds that an orderly end may take, once the engine is given up.
_END_S = 30.0


class Watchdog:
    """Watches the engine from the loop, and the loop from a thread.

    Time is counted in looks and not by a clock, so that a process that was stopped and goes on, or
    a machine that slept, is not taken for one that hangs.

    Args:
        llm: vLLM's engine, or what stands in its place.
        pipeline: Gives back what is in flight.
        timeout_s: Seconds that the engine may leave a question unanswered, and the loop may stand.
    """

    def __init__(self, llm: Any, pipeline: Pipeline, *, timeout_s: float) -> None:
        self._llm = llm
        self._pipeline = pipeline
        self._looks = max(2, int(timeout_s / _LOOK_S))
        self._timeout_s = timeout_s
        self._turns = 0
        self._closed = threading.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch; to be called on the engine's loop."""
        self._task = asyncio.create_task(self._watch(), name="promptmill-watchdog")
        threading.Thread(target=self._watch_loop, name="promptmill-watchdog", daemon=True).start()

    async def aclose(self) -> None:
        """Stop watching; idempotent."""
        self._closed.set()
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def _watch(self) -> None:
        if await self._until_gone():
            _log.error(
                "vLLM's engine answers no more; this worker ends and is to be started anew",
                silent_s=self._timeout_s,
            )
        else:
            _log.error("vLLM's engine is dead; this worker ends and is to be started anew")
        self._end_for_sure()
        self._pipeline.engine_died.set()
        # Jobs in flight give themselves back when the engine is dead, and are given back when not.
        await self._pipeline.idle(timeout_s=_GIVE_BACK_S if self._llm.errored else 0.0)
        if self._pipeline.running:
            await self._pipeline.give_up()
        # Celery's cold shutdown: messages go back to the queue.
        os.kill(os.getpid(), signal.SIGQUIT)

    async def _until_gone(self) -> bool:
        """Return when the engine is gone: True when it hangs, False when it is dead."""
        asked: asyncio.Task[Any] | None = None
        looks = 0
        try:
            while not (self._llm.errored or self._pipeline.engine_died.is_set()):
                self._turns += 1
                if asked is None or (asked.done() and looks >= _LOOKS_BETWEEN_QUESTIONS):
                    # The engine's own loop answers it between two steps.
                    asked, looks = asyncio.create_task(_ask(self._llm)), 0
                elif not asked.done() and looks >= self._looks:
                    return True
                looks += 1
                await asyncio.sleep(_LOOK_S)
        finally:
            if asked is not None:
                asked.cancel()
        return False

    def _watch_loop(self) -> None:
        seen, looks = self._turns, 0
        while not self._closed.wait(_LOOK_S) and not self._pipeline.engine_died.is_set():
            looks = looks + 1 if self._turns == seen else 0
            seen = self._turns
            if looks >= self._looks:
                # Nothing can be given back without the loop. The leases have ended long ago.
                _log.critical("the event loop stands still; this worker is killed")
                os.kill(os.getpid(), signal.SIGKILL)

    def _end_for_sure(self) -> None:
        # Whatever a broken engine keeps from ending; its supervisor ends what it leaves behind.
        timer = threading.Timer(_END_S, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


async def _ask(llm: Any) -> None:
    # What goes wrong otherwise is seen in `errored`.
    with contextlib.suppress(Exception):
        await llm.is_sleeping()
