"""Which models are served now: workers say so with each heartbeat, producers ask before they send.

It is advice, not truth: it lives in Redis alone and may be lost or late, so an empty answer forbids
nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from schema import names
from workers.streams import broker_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis.asyncio import Redis

#: Sorted set of served models; the score is when a worker last said so, in Unix time.
SERVED_MODELS = names.worker_key("served-models")
#: Seconds for which a worker's word counts.
FRESH_S = 60.0


async def announce(redis: Redis, models: Iterable[str]) -> None:
    """Say that a worker serves these models; to be repeated well within `FRESH_S`.

    Args:
        redis: A client of redis-py's asyncio interface.
        models: Names they are served under.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    with broker_errors("announcing models"):
        now = time.time()
        untyped: Any = redis
        await untyped.zadd(SERVED_MODELS, dict.fromkeys(models, now))
        await untyped.zremrangebyscore(SERVED_MODELS, "-inf", now - 10 * FRESH_S)


async def served_models(redis: Redis) -> frozenset[str]:
    """Return the models that living workers serve, as far as is known.

    Args:
        redis: A client of redis-py's asyncio interface.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    with broker_errors("asking which models are served"):
        untyped: Any = redis
        found = await untyped.zrangebyscore(SERVED_MODELS, time.time() - FRESH_S, "+inf")
    return frozenset(name.decode() for name in found)
