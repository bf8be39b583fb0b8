"""`Aside`: an enricher of another package, on an event loop and a thread of its own.

Whoever writes one may block: with a driver that knows no asyncio, or by computing for a while. The
engine's loop must not wait for that, and one that never comes back must stop no other.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from workers.engine.protocols import Enricher

_T = TypeVar("_T")


class Aside:
    """An `Enricher` that hands all calls of another to a thread, which starts with the first.

    Args:
        plugin: All of its coroutines run on one loop, and one after the other where they block.
    """

    def __init__(self, plugin: Enricher) -> None:
        self._plugin = plugin
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()  # belongs to that loop
        self._closed = False

    @property
    def name(self) -> str:
        """As the plug-in calls itself."""
        return self._plugin.name

    async def enrich(self, text: str, *, namespace: str) -> Mapping[str, Any]:
        """Return what the plug-in finds.

        Args:
            text: A prompt or an answer.
            namespace: Tenant.

        Raises:
            RuntimeError: It was closed.
            Exception: Whatever the plug-in raised.
        """
        return await self._call(lambda: self._plugin.enrich(text, namespace=namespace))

    async def aclose(self) -> None:
        """Close the plug-in, and end the thread as soon as it comes back; idempotent."""
        if self._closed:
            return
        try:
            await self._call(self._plugin.aclose)
        finally:
            self._closed = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._over.set)

    async def _call(self, action: Callable[[], Awaitable[_T]]) -> _T:
        loop = self._started()

        async def acted() -> _T:
            return await action()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(acted(), loop))

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            msg = f"{self.name} was closed"
            raise RuntimeError(msg)
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon: a program may end though a plug-in does not come back.
            threading.Thread(
                target=self._live, args=(self._loop,), name=f"promptmill-{self.name}", daemon=True
            ).start()
        return self._loop

    def _live(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._over.wait())
