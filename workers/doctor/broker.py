"""Looks at Redis or Valkey: whether it is fit for a queue, and what stands in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from schema import names
from workers.doctor.database import clock
from workers.doctor.findings import Check, error, ok, skipped, warning

if TYPE_CHECKING:
    from redis import Redis

_TIMEOUT_S = 5.0
_OLDEST = (6, 2)
_FULL = 0.9  # share of maxmemory
_AOF = "set `appendonly yes` (CONFIG SET, and in the server's file)"


def examine(redis_url: str) -> Iterator[Check]:
    """Look at the broker.

    Args:
        redis_url: Its address.

    Yields:
        Findings. A user that may not ask for something gets a finding that says so.
    """
    from redis import Redis
    from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

    try:
        redis = Redis.from_url(
            redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        )
        redis.ping()
    except AuthenticationError:
        remedy = "mend user and password in PROMPTMILL_REDIS_URL"
        yield error("redis", "it refuses this user and password", remedy)
        return
    except ValueError:
        remedy = "give one such as redis://user:password@host:6379/0"
        yield error("redis", "PROMPTMILL_REDIS_URL cannot be read", remedy)
        return
    except (RedisError, OSError) as exc:
        remedy = "start it, or mend PROMPTMILL_REDIS_URL; jobs wait in Postgres until then"
        yield error("redis", f"it cannot be used: {exc}", remedy)
        return
    with redis:
        for name, check in CHECKS.items():
            try:
                yield from check(redis)
            except NoPermissionError:
                yield skipped(name, "this user may not ask")


def models_at_work(redis_url: str) -> frozenset[str] | None:
    """Return the models that living workers serve; None where that cannot be asked.

    Args:
        redis_url: Address of the broker.
    """
    import asyncio

    from schema.errors import BrokerUnavailableError
    from workers.connection import open_redis
    from workers.queue_marks import living_workers

    async def ask() -> frozenset[str] | None:
        redis = open_redis(redis_url)
        try:
            workers = await living_workers(redis)
        except BrokerUnavailableError:
            return None
        finally:
            await redis.aclose()
        return frozenset(name for state in workers.values() for name in state.get("models") or ())

    return asyncio.run(ask())


def _info(redis: Redis, section: str) -> dict[str, Any]:
    found: Any = redis.info(section)
    return dict(found)


def _server(redis: Redis) -> Iterator[Check]:
    info = _info(redis, "server")
    kind = str(info.get("server_name") or "redis").capitalize()
    number = str(info.get("valkey_version") or info["redis_version"])
    if tuple(int(word) for word in number.split(".")[:2]) < _OLDEST:
        yield error("redis", f"{kind} {number} is too old", "use Redis 6.2 or Valkey, or newer")
    elif info.get("redis_mode") == "cluster":
        remedy = "use a server that is not a cluster: kombu's queues need one"
        yield error("redis", f"{kind} {number} runs as a cluster", remedy)
    else:
        yield ok("redis", f"{kind} {number}")


def _role(redis: Redis) -> Iterator[Check]:
    info = _info(redis, "replication")
    if info.get("role") == "slave":
        remedy = "name the primary in PROMPTMILL_REDIS_URL"
        yield error("redis role", "this server is a replica and takes no writes", remedy)
    else:
        yield ok("redis role", "it takes writes")


def _persistence(redis: Redis) -> Iterator[Check]:
    info = _info(redis, "persistence")
    name = "redis persistence"
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            remedy = "free disk where the server keeps its data"
            yield error(name, "the append-only file cannot be written", remedy)
        else:
            yield ok(name, "append-only file on")
    elif info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield error(name, "no append-only file, and the last snapshot failed", _AOF)
    else:
        found = "no append-only file: a crash loses results on channels and jobs without a row"
        yield warning(name, found, _AOF)


def _eviction(redis: Redis) -> Iterator[Check]:
    info = _info(redis, "memory")
    policy, most = info.get("maxmemory_policy", "noeviction"), int(info.get("maxmemory", 0))
    used, name = int(info.get("used_memory", 0)), "redis eviction"
    remedy = "set `maxmemory-policy noeviction`: a queue must refuse, not forget"
    if policy != "noeviction" and most:
        yield error(name, f"policy {policy}: a full server throws jobs and results away", remedy)
    elif policy != "noeviction":
        yield warning(name, f"policy {policy}, harmless only while maxmemory is unset", remedy)
    else:
        yield ok(name, "noeviction")
    if most and used > _FULL * most:
        remedy = "raise maxmemory, or let results live shorter (PROMPTMILL_RESULT_TTL_S)"
        yield warning("redis memory", f"{used / most:.0%} of maxmemory is in use", remedy)
    else:
        yield ok("redis memory", f"{used / 2**20:.0f} MB used")


def _clock(redis: Redis) -> Iterator[Check]:
    before = time.time()
    said: Any = redis.time()
    yield clock("Redis", said[0] + said[1] / 1e6, before, time.time())


def _dead_letters(redis: Redis) -> Iterator[Check]:
    found: Any = redis.llen(names.DEAD_LETTERS)
    if found:
        remedy = (
            f"look at them with LRANGE {names.DEAD_LETTERS} 0 9: some producer sends what is no "
            "message; DEL the list afterwards"
        )
        yield warning("dead letters", f"{found} items could not be read", remedy)
    else:
        yield ok("dead letters", "none")


CHECKS: dict[str, Callable[[Redis], Iterator[Check]]] = {
    "redis": _server,
    "redis role": _role,
    "redis persistence": _persistence,
    "redis eviction": _eviction,
    "clock (Redis)": _clock,
    "dead letters": _dead_letters,
}
