"""Whether a worker of this host takes jobs; the health check of a container.

A living worker says so in Redis every few seconds, from the loop that its engine runs on: a loop
that hangs falls silent, and a worker whose engine died ends. ``python -m workers.health`` asks.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

from schema.errors import PromptmillError
from workers import endpoints
from workers.connection import open_redis
from workers.queue_marks import living_workers
from workers.settings import load_settings

if TYPE_CHECKING:
    from workers.settings import Settings


async def workers_here(settings: Settings, *, host: str | None = None) -> list[str]:
    """Return the names of the living workers of a host.

    Args:
        settings: Read from the environment.
        host: As the workers call it; None is this one.

    Raises:
        ConfigurationError: No server is named, or an address is wrong.
        BrokerUnavailableError: Redis cannot be asked.
    """
    found = await asyncio.to_thread(endpoints.find, settings)
    redis = open_redis(found.redis_url)
    try:
        living = await living_workers(redis)
    finally:
        await redis.aclose()
        found.close()
    here = host or socket.gethostname()
    return sorted(name for name, state in living.items() if state.get("host") == here)


def main() -> int:
    """Print who lives here, and return 0 if anybody does and 1 otherwise."""
    try:
        names = asyncio.run(workers_here(load_settings()))
    except PromptmillError as error:
        print(f"promptmill: {error}", file=sys.stderr)
        return 1
    print("\n".join(names) if names else "no worker of this host takes jobs")
    return 0 if names else 1


if __name__ == "__main__":
    sys.exit(main())
