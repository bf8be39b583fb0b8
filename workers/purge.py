"""`purge`: deletes all that a namespace has, everywhere, and looks again whether it is gone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import orjson

from schema import names
from schema.errors import InvalidRequestError
from workers.redis_erasure import RedisErasure
from workers.store.erasure import Erasure
from workers.streams import broker_errors

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.store.database import Database

_LOOK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Purged:
    """What was deleted, and what is there all the same: nothing, if nobody goes on submitting."""

    deleted: Mapping[str, int]
    left: Mapping[str, int]
    running: int = 0  # jobs that their workers had not let go of in time
    kinds: tuple[str, ...] = field(default=())  # everything that was looked at

    @property
    def clean(self) -> bool:
        """Whether nothing is left."""
        return not any(self.left.values())


async def purge(
    database: Database, redis: Redis, namespace: str, *, wait_s: float = 30.0
) -> Purged:
    """Delete all jobs, answers, analyses, decisions, streams and messages of a namespace.

    What runs is stopped first. Workers forget what they hold in memory. The rows of jobs are
    deleted without an outcome: whoever waits for one is told that there is no such job.

    Args:
        database: Where its rows are.
        redis: Where its streams and messages are.
        namespace: Tenant.
        wait_s: Seconds that workers have to let go of what they run.

    Returns:
        What was deleted, and what a second look found.

    Raises:
        InvalidRequestError: That is not the name of a namespace.
        ServiceError: Postgres or Redis cannot be used now; purge again.
    """
    if not names.is_name(namespace):
        msg = f"must match {names.NAME_PATTERN}"
        raise InvalidRequestError(msg, field="namespace", value=namespace)
    rows, streams = Erasure(database), RedisErasure(redis)
    running = await _stop(rows, redis, namespace, wait_s=wait_s)
    deleted: Counter[str] = Counter()
    # Rows first, or recovery and the dispatcher would write new messages for them. Then once more:
    # what was under way when the rows went.
    for _ in range(2):
        deleted.update(await rows.erase(namespace))
        deleted.update(await streams.erase(namespace))
        await _forget(redis, namespace)
    left = Counter(await rows.remains(namespace))
    left.update(await streams.remains(namespace))
    kinds = tuple(dict.fromkeys([*left, *deleted]))
    return Purged(deleted=dict(deleted), left=dict(left), running=running, kinds=kinds)


async def apply_retention(
    database: Database, redis: Redis, *, keep_s: float | None, namespaces: Mapping[str, float]
) -> Counter[str]:
    """Delete what namespaces have had for longer than they may.

    Args:
        database: Where the rows are.
        redis: Where the streams are.
        keep_s: Seconds that jobs which are over, answers and results are kept; None is for ever.
        namespaces: The same for those that differ.

    Returns:
        What was deleted.

    Raises:
        ServiceError: Postgres or Redis cannot be used now.
    """
    rows, streams = Erasure(database), RedisErasure(redis)
    deleted: Counter[str] = Counter()
    if keep_s is None and not namespaces:
        return deleted
    known = namespaces if keep_s is None else {*namespaces, *await rows.namespaces()}
    for namespace in known:
        kept_s = namespaces.get(namespace, keep_s)
        if kept_s is not None:
            before = datetime.now(UTC) - timedelta(seconds=kept_s)
            older = await rows.erase_older(namespace, before)
            deleted.update(older)
            deleted["results"] += await streams.trim(namespace, before)
            if older["answers"]:
                await _forget(redis, namespace)
    return +deleted


async def _stop(rows: Erasure, redis: Redis, namespace: str, *, wait_s: float) -> int:
    until = time.monotonic() + wait_s
    while running := await rows.stop(namespace):
        notice = {"v": names.WIRE_VERSION, "namespace": namespace, "ids": list(map(str, running))}
        with broker_errors("announcing a cancellation"):
            await redis.publish(names.CANCELLATIONS, orjson.dumps(notice))
        if time.monotonic() > until:
            break
        await asyncio.sleep(_LOOK_S)
    return len(running)


async def _forget(redis: Redis, namespace: str) -> None:
    with broker_errors("announcing what was forgotten"):
        notice = {"v": names.WIRE_VERSION, "namespace": namespace}
        await redis.publish(names.INVALIDATIONS, orjson.dumps(notice))
