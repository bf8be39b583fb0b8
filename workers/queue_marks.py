"""How old the oldest message still alive is: waiting in a list, or in a living worker's hands.

A job whose message was written before that moment, and that is still queued, has lost its message:
with Redis' data, or in the hands of a worker that died.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from schema import names, wire
from workers.streams import broker_errors

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Seconds that a worker's word about what it holds counts.
BEACON_S = 10


async def shine(redis: Redis, worker: str, state: dict[str, Any]) -> None:
    """Say that a worker lives and what it holds; to be repeated well within `BEACON_S`.

    Args:
        redis: A client of redis-py's asyncio interface.
        worker: Its name.
        state: JSON types; ``models`` (a list of names) and ``oldest_sent_at`` (Unix time or None)
            are read by others.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    with broker_errors("telling that a worker lives"):
        await redis.set(names.worker_key(worker), orjson.dumps(state), ex=BEACON_S)


async def living_workers(redis: Redis) -> dict[str, dict[str, Any]]:
    """Return what living workers said of themselves, by name.

    Args:
        redis: A client of redis-py's asyncio interface.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    prefix = names.worker_key("")
    workers: dict[str, dict[str, Any]] = {}
    with broker_errors("asking which workers live"):
        async for key in redis.scan_iter(match=f"{prefix}*@*", count=1000):
            said = await redis.get(key)
            if said is not None:
                workers[key.decode().removeprefix(prefix)] = orjson.loads(said)
    return workers


async def oldest_live_message_at(redis: Redis, now: float) -> datetime | None:
    """Return the moment before which every message written has left the queue for good.

    Args:
        redis: A client of redis-py's asyncio interface.
        now: The present moment as Unix time by Postgres' clock, by which senders date messages.

    Returns:
        Such a moment, now when nothing is alive; None when no worker lives, for then nobody says
        which queues there are.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    workers = await living_workers(redis)
    if not workers:
        return None
    marks = [now]
    models: set[str] = set()
    for state in workers.values():
        models.update(state.get("models") or ())
        if isinstance(state.get("oldest_sent_at"), (int, float)):
            marks.append(float(state["oldest_sent_at"]))
    with broker_errors("looking at the queues"):
        async with redis.pipeline(transaction=False) as pipe:
            for model in models:
                for priority in names.PRIORITIES:
                    # kombu pushes on the left and pops on the right: the oldest is the last.
                    pipe.lindex(names.priority_list(names.queue(model), priority), -1)
            oldest = await pipe.execute()
    marks += [sent_at for item in oldest if (sent_at := _sent_at(item)) is not None]
    return datetime.fromtimestamp(min(marks), UTC)


def _sent_at(item: bytes | None) -> float | None:
    if item is None:
        return None
    try:
        sent_at = float(orjson.loads(item)["headers"][names.JOBS_HEADER]["sent_at"])
    except (ValueError, KeyError, TypeError):
        return None  # not one of ours: the transport sets it aside
    return sent_at if 0 <= sent_at <= wire.LAST_SENT_AT else None  # nor that
