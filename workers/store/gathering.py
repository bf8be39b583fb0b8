"""`Gathering`: questions that are asked at the same time become one statement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Gathering(Generic[K, V]):
    """Asks for many callers together.

    While one group is being asked the next one gathers, so a lone caller waits for nobody and a
    crowd shares the cost of a statement. A caller that is cancelled costs the others nothing: the
    statement goes on for them.

    Args:
        ask: Answers a group of distinct keys; a key may be missing from what it returns.
        most: Keys a group may have.
        wanted_only: Whether a key is passed over when all who waited for it have left; else it is
            asked for all the same.
        name: Of the task that asks.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]],
        *,
        most: int = 256,
        wanted_only: bool = False,
        name: str,
    ) -> None:
        self._ask = ask
        self._most = most
        self._wanted_only = wanted_only
        self._name = name
        self._waiting: dict[K, list[asyncio.Future[V | None]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V | None:
        """Ask for one key, in company.

        Args:
            key: Callers with the same one share the answer.

        Returns:
            What was answered; None where nothing was.

        Raises:
            Exception: What asking raised.
        """
        future: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=self._name)
        return await future

    async def _run(self) -> None:
        """Ask until nobody waits; whoever comes then starts anew."""
        group: dict[K, list[asyncio.Future[V | None]]] = {}
        try:
            while self._waiting:
                if self._wanted_only:
                    self._pass_over_unwanted()
                keys = list(self._waiting)[: self._most]
                if not keys:
                    break
                group = {key: self._waiting.pop(key) for key in keys}
                try:
                    found = await self._ask(keys)
                except Exception as exc:  # noqa: BLE001  raised where each of them is waited for
                    _end(group, exc)
                    continue
                for key, futures in group.items():
                    for future in futures:
                        if not future.done():
                            future.set_result(found.get(key))
        except asyncio.CancelledError:
            for waiting in (group, self._waiting):
                for futures in waiting.values():
                    for future in futures:
                        future.cancel()
            self._waiting.clear()
            raise
        finally:
            self._task = None

    def _pass_over_unwanted(self) -> None:
        for key, futures in list(self._waiting.items()):
            if all(future.done() for future in futures):
                del self._waiting[key]


def _end(group: Mapping[K, list[asyncio.Future[V | None]]], exc: Exception) -> None:
    for futures in group.values():
        for future in futures:
            if not future.done():
                future.set_exception(exc)
