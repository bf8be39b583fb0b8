"""`Patience`: what needs Postgres is done however long it is away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from schema.errors import DatabaseUnavailableError

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class Patience:
    """Waits for Postgres.

    Args:
        first_s: Seconds between the first two tries; doubles after.
        most_s: Seconds between two tries, at most.
    """

    def __init__(self, *, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s

    async def until_done(self, what: str, action: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat an action of Postgres' until it works, saying once what is waited for.

        Args:
            what: Is done, for the log.
            action: Does it.

        Returns:
            What the action returned.
        """
        wait_s, said = self._first_s, False
        while True:
            try:
                return await action()
            except DatabaseUnavailableError as exc:
                if not said:
                    _log.warning("waiting for Postgres", to=what, reason=str(exc))
                    said = True
                await asyncio.sleep(wait_s * random.uniform(0.5, 1))  # noqa: S311  no secret
                wait_s = min(wait_s * 2, self._most_s)
