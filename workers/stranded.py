"""`Stranded`: jobs of producers without a database, in messages that workers hold.

Such a job has no row until a worker has read its message, and who dies before has it with him:
Celery delivers the message again after the visibility timeout, hours later. So what has been in
hand for a while is looked at, and jobs that have no row get one. From then on they are like all
others, and recovery sends them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson
from cachetools import LRUCache

from schema import names, wire
from schema.errors import CallerError, MessageFormatError
from workers.streams import broker_errors

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from schema.jobs import JobSpec
    from workers.store.jobs import JobStore

#: Where kombu keeps the messages that workers hold, and when each was taken.
IN_HAND, IN_HAND_INDEX = "unacked", "unacked_index"
_REMEMBERED = 100_000
_AT_A_TIME = 100


class Stranded:
    """Writes rows for jobs that came in full and that nobody wrote one for.

    Args:
        redis: A client of redis-py's asyncio interface. The caller closes it.
        jobs: The job store.
        max_attempts: Of jobs that state none.
        within_s: Seconds for which rows of jobs that are over are kept at least; a message that was
            taken longer ago may be of jobs that were run and deleted. None: they are kept for ever.
        grace_s: Seconds that a worker has to write the rows itself.
    """

    def __init__(
        self,
        redis: Redis,
        jobs: JobStore,
        *,
        max_attempts: int,
        within_s: float | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self._redis: Any = redis  # parts of redis-py have no annotations
        self._jobs = jobs
        self._max_attempts = max_attempts
        self._within_s = within_s
        self._grace_s = grace_s
        self._known: LRUCache[bytes, bool] = LRUCache(_REMEMBERED)  # delivery tags looked at

    async def adopt(self) -> int:
        """Look through messages that have been in hand for a while, each once.

        Returns:
            How many jobs got a row.

        Raises:
            ServiceError: Postgres or Redis cannot be used now.
        """
        adopted, now = 0, time.time()
        since = "-inf" if self._within_s is None else now - self._within_s
        with broker_errors("looking at messages in hand"):
            tags = await self._redis.zrangebyscore(IN_HAND_INDEX, since, now - self._grace_s)
        new = [tag for tag in tags if tag not in self._known]
        for at in range(0, len(new), _AT_A_TIME):
            group = new[at : at + _AT_A_TIME]
            with broker_errors("reading messages in hand"):
                entries = await self._redis.hmget(IN_HAND, group)
            for tag, entry in zip(group, entries, strict=True):
                adopted += await self._adopt(entry) if entry is not None else 0
                self._known[tag] = True
        return adopted

    async def _adopt(self, entry: bytes) -> int:
        try:
            message, _exchange, queue = orjson.loads(entry)
            header = message["headers"][names.JOBS_HEADER]
            # Ids are of rows.
            jobs = wire.decode(header).jobs if "jobs" in header else ()
        except (ValueError, LookupError, TypeError, MessageFormatError):
            return 0  # not one of ours
        return sum([await self._admit(job, queue) for job in jobs])

    async def _admit(self, job: JobSpec, queue: str) -> int:
        try:
            admission = await self._jobs.admit(
                [job],
                default_model=queue.removeprefix(names.queue("")),
                sent=False,
                max_attempts=self._max_attempts,
            )
        except CallerError:
            return 0  # whoever runs the message tells its sender
        return len(admission.inserted)
