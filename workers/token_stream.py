"""Following a job's text while it grows, across reconnections and beyond the stream's end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from schema.errors import BrokerUnavailableError, InvalidRequestError
from workers.cancellation import heed_cancellation
from workers.channel import TokenDelta
from workers.cursors import START
from workers.outcome import LOOK_S, not_found

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from schema.jobs import JobResult
    from workers.connection import Connection
    from workers.jobs import JobRef

_BLOCK_S = 1.0
_AGAIN_S = 0.5
# Seconds for which Redis may be away, where there is no database to take the answer from.
_PATIENCE_S = 120.0


async def follow(
    connection: Connection, job: JobRef, cursor: str = START
) -> AsyncIterator[TokenDelta]:
    """Yield the text of a job as it grows, and what remains of it once the stream is gone.

    A cursor says both the place in the stream and how much text of each answer was handed out, so
    that nothing is lost or repeated when the stream has expired, or a second run wrote it anew.

    Args:
        connection: Open resources.
        job: The job; it must have been submitted with ``stream=True`` for text to come early.
        cursor: Of the last delta that the caller has; from the beginning unless given.

    Yields:
        Deltas, the last of which has ``finished`` set.

    Raises:
        InvalidRequestError: `cursor` is none of ours.
        JobNotFoundError: The database has no such job.
        BrokerUnavailableError: Redis was away for two minutes, and there is no database.
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    place, had = _parse(cursor)
    store = connection.ledger
    looked_at, away_since = 0.0, None
    ended = gap = False
    while True:
        heed_cancellation()
        deltas: list[TokenDelta] = []
        try:
            deltas = await connection.channel.read_tokens(
                job.namespace, job.id, place, block_s=_BLOCK_S
            )
            away_since = None
        except BrokerUnavailableError:
            # With a database the answer still comes, whole, from its row.
            away_since = away_since or time.monotonic()
            if store is None and time.monotonic() - away_since > _PATIENCE_S:
                raise
            await asyncio.sleep(_AGAIN_S)
        for delta in deltas:
            place = delta.cursor
            ended = ended or delta.finished
            # Pieces were lost with Redis: the row has them, and all that follows, in order.
            gap = gap or (store is not None and delta.offset > had[delta.index])
            if not gap and (text := delta.text[max(0, had[delta.index] - delta.offset) :]):
                had[delta.index] = delta.offset + len(delta.text)
                yield TokenDelta(
                    cursor=_format(place, had),
                    text=text,
                    index=delta.index,
                    offset=had[delta.index] - len(text),
                )
        if store is None:
            if ended:
                yield TokenDelta(cursor=_format(place, had), text="", finished=True)
                return
            continue
        if not ended and ((deltas and not gap) or time.monotonic() - looked_at < LOOK_S):
            continue
        looked_at, ended = time.monotonic(), False
        # At the end too: the last pieces may not have reached Redis.
        result = await store.result(job.namespace, job.id)
        if result is not None:
            for rest in _rest(result, place, had):
                yield rest
            return
        if await store.status(job.namespace, job.id) is None:
            raise not_found(job)


def _rest(result: JobResult, place: str, had: Counter[int]) -> Iterator[TokenDelta]:
    texts = {answer.index: answer.text for answer in result.outputs}
    if not texts and result.text is not None:
        texts = {0: result.text}
    for index, text in sorted(texts.items()):
        offset = had[index]
        if rest := text[offset:]:
            had[index] += len(rest)
            yield TokenDelta(cursor=_format(place, had), text=rest, index=index, offset=offset)
    yield TokenDelta(cursor=_format(place, had), text="", finished=True)


def _format(place: str, had: Counter[int]) -> str:
    return "/".join([place, *(f"{index}:{count}" for index, count in sorted(had.items()) if count)])


def _parse(cursor: str) -> tuple[str, Counter[int]]:
    place, *counts = cursor.split("/")
    had: Counter[int] = Counter()
    try:
        for count in counts:
            index, _, number = count.partition(":")
            had[int(index)] = int(number)
    except ValueError:
        msg = "is not the cursor of a token delta"
        raise InvalidRequestError(msg, field="cursor", value=cursor) from None
    return place, had
