"""What a client holds open: Redis, Postgres where there is one, the embedded stack if used."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schema.errors import ConfigurationError
from workers import endpoints
from workers.channel import ResultChannel
from workers.signals import DoneSignals

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.settings import Settings
    from workers.store.database import Database
    from workers.store.jobs import JobStore

# Longer than any blocking read of ours, short enough to notice a host that vanished.
_SOCKET_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0
_POOL_SIZE = 4


def open_redis(url: str) -> Redis:
    """Return a client of redis-py's asyncio interface; it connects when it is first used.

    Args:
        url: Address of Redis or Valkey.

    Raises:
        ConfigurationError: The address cannot be read. It is not repeated: it may hold a password.
    """
    from redis.asyncio import Redis

    try:
        return Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            health_check_interval=_SOCKET_TIMEOUT_S,
            client_name="promptmill",
        )
    except ValueError:
        msg = "PROMPTMILL_REDIS_URL cannot be read; give one such as redis://user:password@host/0"
        raise ConfigurationError(msg) from None


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Open resources of one client; it belongs to the event loop that opened it."""

    endpoints: endpoints.Endpoints
    redis: Redis
    channel: ResultChannel
    signals: DoneSignals
    database: Database | None  # None: Redis alone
    ledger: JobStore | None

    @classmethod
    async def open(cls, settings: Settings) -> Connection:
        """Find the servers that the settings mean; see `workers.endpoints.find`.

        Args:
            settings: Read from the environment.

        Raises:
            ConfigurationError: No server is named and none is embedded, or an address is wrong.
            StackError: The embedded stack did not start.
        """
        found = await asyncio.to_thread(endpoints.find, settings)
        redis = open_redis(found.redis_url)
        extra: dict[str, Any] = {"database": None, "ledger": None}
        if found.database_url is not None:
            from workers.store.database import Database
            from workers.store.jobs import JobStore

            extra["database"] = Database(found.database_url, pool_size=_POOL_SIZE)
            extra["ledger"] = JobStore(extra["database"])
        return cls(
            endpoints=found,
            redis=redis,
            channel=ResultChannel(redis),
            signals=DoneSignals(redis),
            **extra,
        )

    def store(self, what: str) -> JobStore:
        """Return the job store.

        Args:
            what: What needs it, for the message.

        Raises:
            ConfigurationError: This client has Redis alone.
        """
        if self.ledger is None:
            msg = f"{what} needs the database; set PROMPTMILL_DATABASE_URL"
            raise ConfigurationError(msg)
        return self.ledger

    def require_database(self) -> Database:
        """Return the pool of connections to Postgres.

        Raises:
            ConfigurationError: This client has Redis alone.
        """
        if self.database is None:
            msg = "this needs the database; set PROMPTMILL_DATABASE_URL"
            raise ConfigurationError(msg)
        return self.database

    async def aclose(self) -> None:
        """Close everything; idempotent."""
        await self.signals.aclose()
        await self.redis.aclose()
        if self.database is not None:
            await self.database.aclose()
        self.endpoints.close()
