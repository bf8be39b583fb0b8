"""`SharedBacklog`: the count of waiting and running jobs, made by one process for all of them.

Every worker exports it and every `promptmill top` shows it. It is kept in Redis for some seconds,
and whoever finds it too old counts anew while the others go on with the old one. So the load on
Postgres does not grow with those who look.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
import structlog

from schema import names
from schema.errors import ServiceError
from workers.series import BOUND, OTHERS
from workers.store.backlog import LiveCounts, LiveJobs
from workers.streams import broker_errors

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.store.database import Database

_log = structlog.get_logger(__name__)
_KEPT_S = 3600
_COUNTING_S = 60  # a counter that died is replaced after that
_SHARE = 20  # of Postgres' time may go into counting: one part in so many


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """Jobs of the whole deployment that are not over."""

    at: float  # when they were counted; Unix time
    took_s: float
    jobs: tuple[LiveJobs, ...]

    @property
    def age_s(self) -> float:
        """Seconds since they were counted."""
        return max(time.time() - self.at, 0.0)

    def oldest_s(self) -> dict[str, float]:
        """Return how long the oldest job that could run has been waiting, by model."""
        oldest: dict[str, float] = {}
        for live in self.jobs:
            oldest[live.model] = max(oldest.get(live.model, 0.0), live.oldest_s)
        return oldest

    def total(self, state: str, model: str | None = None) -> int:
        """Return how many jobs stand so.

        Args:
            state: queued or running.
            model: Of one model; None is all.
        """
        return sum(
            live.jobs for live in self.jobs if live.state == state and model in (None, live.model)
        )

    def bounded(self) -> Backlog:
        """Return it with the smallest tenants and models put together, to bound labels."""
        models = _largest((live.model, live.jobs) for live in self.jobs)
        tenants = _largest((live.namespace, live.jobs) for live in self.jobs)
        merged: dict[tuple[str, str, str], LiveJobs] = {}
        for live in self.jobs:
            model = live.model if live.model in models else OTHERS
            namespace = live.namespace if live.namespace in tenants else OTHERS
            before = merged.get((model, namespace, live.state))
            merged[model, namespace, live.state] = LiveJobs(
                model=model,
                namespace=namespace,
                state=live.state,
                jobs=live.jobs + (before.jobs if before else 0),
                oldest_s=max(live.oldest_s, before.oldest_s if before else 0.0),
            )
        return dataclasses.replace(self, jobs=tuple(merged.values()))


def _largest(sizes: Iterable[tuple[str, int]]) -> frozenset[str]:
    total: Counter[str] = Counter()
    for name, size in sizes:
        total[name] += size
    return frozenset(name for name, _ in total.most_common(BOUND))


class SharedBacklog:
    """Reads the shared count, and makes it anew when it is old.

    Args:
        redis: Keeps it.
        database: Where jobs are counted.
        every_s: Seconds for which a count is good, at least.
    """

    def __init__(self, redis: Redis, database: Database, *, every_s: float = 5.0) -> None:
        self._redis = redis
        self._counts = LiveCounts(database)
        self._every_s = every_s

    async def get(self) -> Backlog | None:
        """Return the count, or None when there is none and none can be made now.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        with broker_errors("reading the backlog"):
            kept = await self._redis.get(names.BACKLOG)
        known = _parsed(kept)
        if known is not None and known.age_s < max(self._every_s, known.took_s * _SHARE):
            return known
        with broker_errors("reading the backlog"):
            mine = await self._redis.set(names.BACKLOG_LOCK, b"1", nx=True, ex=_COUNTING_S)
        return await self._count() or known if mine else known

    async def _count(self) -> Backlog | None:
        began = time.monotonic()
        try:
            jobs = await self._counts.live()
        except ServiceError as exc:
            # The pipeline says loudly enough that Postgres is away; the next look tries again.
            _log.debug("the backlog is not counted", reason=str(exc))
            return None
        else:
            counted = Backlog(
                at=time.time(), took_s=time.monotonic() - began, jobs=tuple(jobs)
            ).bounded()
            with broker_errors("keeping the backlog"):
                await self._redis.set(
                    names.BACKLOG, orjson.dumps(dataclasses.asdict(counted)), ex=_KEPT_S
                )
            return counted
        finally:
            with broker_errors("keeping the backlog"):
                await self._redis.delete(names.BACKLOG_LOCK)


def _parsed(kept: bytes | str | None) -> Backlog | None:
    if kept is None:
        return None
    try:
        said = orjson.loads(kept)
        jobs = tuple(LiveJobs(**live) for live in said.pop("jobs"))
        return Backlog(**said, jobs=jobs)
    except (ValueError, KeyError, TypeError):
        return None  # of another version: counted anew
