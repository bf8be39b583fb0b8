"""A circuit breaker: stop paying for what is down, and find out when it is back.

After M. Nygard, "Release It!" (2007), chapter 5.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from schema.errors import ServiceError

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)
_LOG_EVERY_S = 60.0


class BreakerOpenError(ServiceError):
    """The part was not asked, because it failed a moment ago."""


class Breaker:
    """Guards calls to one part.

    Args:
        name: Of the part, for messages and counters.
        failures: Failures in a row after which the part is left alone.
        rest_s: Seconds it is left alone; then one call tries it again.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int = 3,
        rest_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.failed = 0
        self.skipped = 0
        self._limit = failures
        self._rest_s = rest_s
        self._clock = clock
        self._in_a_row = 0
        self._open_until = 0.0
        self._logged_at = float("-inf")

    @property
    def open(self) -> bool:
        """Whether calls are refused at the moment."""
        return self._in_a_row >= self._limit and self._clock() < self._open_until

    async def call(self, action: Callable[[], Awaitable[_T]], *, budget_s: float) -> _T:
        """Await ``action()``, and remember how it went.

        Args:
            action: Makes the awaitable; not called while the breaker is open.
            budget_s: Seconds after which the call is cut.

        Raises:
            BreakerOpenError: The part is being left alone.
            TimeoutError: It took longer than `budget_s`.
            Exception: Whatever the action raised.
        """
        if self.open:
            self.skipped += 1
            msg = f"{self.name} is left alone for a moment after {self._in_a_row} failures in a row"
            raise BreakerOpenError(msg)
        if self._in_a_row >= self._limit:
            # One call tries; the others go on being refused until it has come back.
            self._open_until = self._clock() + max(self._rest_s, budget_s)
        try:
            async with asyncio.timeout(budget_s):
                result = await action()
        except TimeoutError as exc:
            self._note(f"took longer than {budget_s:g} s")
            msg = f"{self.name} took longer than {budget_s:g} s"
            raise TimeoutError(msg) from exc
        except Exception as exc:
            self._note(f"{type(exc).__name__}: {exc}")
            raise
        self._in_a_row = 0
        return result

    def _note(self, why: str) -> None:
        self.failed += 1
        self._in_a_row += 1
        now = self._clock()
        if self._in_a_row >= self._limit:
            self._open_until = now + self._rest_s
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            _log.warning("enhancement failed", part=self.name, why=why, failures=self.failed)
