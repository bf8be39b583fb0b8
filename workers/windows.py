"""How many jobs of one namespace may stand in the queue of a model: the dispatcher says so.

What is beyond it waits in Postgres, so the number decides how much stands before whoever comes
next. It is advice: without it producers take a default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schema import names
from workers.streams import broker_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis

#: Where no dispatcher has said anything.
DEFAULT_WINDOW = 1000
_TOLD_S = 60


async def announce(redis: Redis, windows: Mapping[str, int]) -> None:
    """Say how many jobs of a namespace may stand in each queue; to be repeated.

    Args:
        redis: A client of redis-py's asyncio interface.
        windows: Jobs, by served model.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    if windows:
        with broker_errors("announcing the windows of queues"):
            async with redis.pipeline(transaction=False) as pipe:
                for model, jobs in windows.items():
                    pipe.set(names.window_key(model), jobs, ex=_TOLD_S)
                await pipe.execute()


async def window(redis: Redis, model: str) -> int:
    """Return how many jobs of one namespace may stand in the queue of a model.

    Args:
        redis: A client of redis-py's asyncio interface.
        model: Served name.

    Raises:
        BrokerUnavailableError: Redis failed.
    """
    with broker_errors("asking for the window of a queue"):
        said = await redis.get(names.window_key(model))
    return int(said) if said is not None and said.isdigit() else DEFAULT_WINDOW
