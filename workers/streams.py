"""What all readers of Redis Streams share: cursors, entries, and errors turned into ours."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from schema.errors import BrokerUnavailableError
from schema.jobs import JobResult
from workers.pauses import no_collection

if TYPE_CHECKING:
    from collections.abc import Iterator

#: One entry of a stream: its id and its fields.
Entry = tuple[bytes, dict[bytes, bytes]]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One result as it came from a channel."""

    cursor: str  # id of the stream entry: read on from here, or acknowledge it
    result: JobResult


@contextmanager
def broker_errors(doing: str) -> Iterator[None]:
    """Turn a failing Redis into our error.

    Args:
        doing: What was tried, for the message, such as ``publishing results``.

    Raises:
        BrokerUnavailableError: Redis could not be reached or refused the command.
    """
    from redis.exceptions import RedisError  # late: redis-py takes a while to import

    try:
        yield
    except (RedisError, OSError) as exc:
        msg = f"Redis failed while {doing}: {exc or type(exc).__name__}"
        raise BrokerUnavailableError(msg) from exc


@contextmanager
def reply(code: str) -> Iterator[Event]:
    """Take one error of Redis for an answer.

    Args:
        code: First word of the error, such as ``NOGROUP``.

    Yields:
        An event that is set when Redis answered so.
    """
    from redis.exceptions import ResponseError

    said = Event()
    try:
        yield said
    except ResponseError as exc:
        if not str(exc).startswith(code):
            raise
        said.set()


def entries_of(replies: Any) -> list[Entry]:
    """Return the entries of one stream from a reply of XREAD or XREADGROUP."""
    # A list of (stream, entries) in Redis' second protocol, a mapping in its third.
    pairs = replies.items() if isinstance(replies, dict) else replies or ()
    entries: list[Entry] = []
    for _, found in pairs:
        group = found[0] if found and isinstance(found[0], list) else found
        entries.extend((cursor, fields or {}) for cursor, fields in group)
    return entries


def deliveries_of(entries: list[Entry]) -> list[Delivery]:
    """Return the results among stream entries; what is not one of ours is passed over."""
    deliveries = []
    with no_collection():
        for cursor, fields in entries:
            try:
                result = JobResult.model_validate_json(fields[b"result"])
            except (KeyError, ValidationError):
                # Not one of ours. A foreign entry must not stop the channel for everybody.
                continue
            deliveries.append(Delivery(cursor=cursor.decode(), result=result))
    return deliveries


def milliseconds(seconds: float | None) -> int | None:
    """Return a block time for Redis, which takes 0 for ever."""
    return None if seconds is None else max(1, int(seconds * 1000))
