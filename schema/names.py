"""Every name that crosses a process: queues, streams, keys, tasks.

Names are built here and nowhere else. A namespace or a channel never holds a colon, so no two of
them can meet in one key.
"""

from __future__ import annotations

import os
import re
import time
from uuid import UUID, uuid5

#: A namespace, channel, group or model alias: short, printable, free of the separator.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/@-]{0,127}$"
_NAME = re.compile(NAME_PATTERN)

#: The one Celery task that producers address.
RUN_JOBS_TASK = "promptmill.run_jobs"
#: The message header that carries the jobs; the arguments stay empty so that nothing shows them.
JOBS_HEADER = "promptmill"
#: Version of the message and result formats. A reader refuses a higher one.
WIRE_VERSION = 1

DEFAULT_NAMESPACE = "default"
DEFAULT_CHANNEL = "default"

#: 0 is served first, 9 last, as in vLLM and in Celery on Redis.
PRIORITIES = tuple(range(10))
DEFAULT_PRIORITY = 5

#: Where unreadable queue items are kept, bytes and all.
DEAD_LETTERS = "promptmill:dead"
#: Pub/Sub channel on which invalidations of cached answers are announced.
INVALIDATIONS = "promptmill:invalidate"
#: Pub/Sub channel on which cancellations are announced.
CANCELLATIONS = "promptmill:cancel"
#: Key that holds the epoch of this Redis' data; gone when the data was lost.
EPOCH = "promptmill:epoch"
#: Key that holds the last moment, by Postgres' clock, whose messages and results this Redis has.
MOMENT = "promptmill:moment"
#: Sorted set of the channels that results were published on, by the time of the last one.
CHANNELS = "promptmill:channels"
#: Key of the shared count of jobs that wait and run, and of the mark that somebody counts.
BACKLOG = "promptmill:backlog"
BACKLOG_LOCK = "promptmill:backlog:counting"

_JOB_IDS = UUID("b0a8a4f2-7c64-5a7e-9a39-6d1c4b1f0d11")


def is_name(value: str) -> bool:
    """Whether `value` may be a namespace, channel, group or model alias."""
    # To the very end: `$` alone would let a line break pass.
    return _NAME.fullmatch(value) is not None


def queue(model: str) -> str:
    """Name of the Celery queue of one served model."""
    return f"promptmill.{model}"


def priority_list(queue_name: str, priority: int) -> str:
    """Redis list that kombu reads for one queue and priority (0 to 9)."""
    return queue_name if priority == 0 else f"{queue_name}\x06\x16{priority}"


def results_stream(namespace: str, channel: str) -> str:
    """Redis Stream on which the results of one channel are published."""
    return f"results:{namespace}:{channel}"


def channel_member(namespace: str, channel: str) -> str:
    """Return how a channel is named in the set of channels."""
    return f"{namespace}:{channel}"


def tokens_stream(namespace: str, job_id: UUID) -> str:
    """Redis Stream of one job's text deltas."""
    return f"tokens:{namespace}:{job_id}"


def done_signal(namespace: str, job_id: UUID) -> str:
    """Pub/Sub channel that wakes those who wait for one job."""
    return f"done:{namespace}:{job_id}"


def worker_key(name: str) -> str:
    """Key under which a living worker describes itself."""
    return f"promptmill:worker:{name}"


def window_key(model: str) -> str:
    """Key that says how many jobs of one namespace may stand in the queue of a model."""
    return f"promptmill:window:{model}"


def new_job_id() -> UUID:
    """Return an id for a new job (UUID version 7, RFC 9562, with parts of a millisecond).

    Ids of jobs that come together lie together in the index, so that writing them, taking them and
    ending them touches a few of its pages instead of one for each job.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    part = (rest << 12) // 1_000_000
    random = int.from_bytes(os.urandom(8), "big") >> 2
    return UUID(int=milliseconds << 80 | 7 << 76 | part << 64 | 2 << 62 | random)


def job_id_for(namespace: str, idempotency_key: str) -> UUID:
    """Return the id that every submission under one idempotency key shares (UUID version 5)."""
    return uuid5(_JOB_IDS, f"{namespace}\x00{idempotency_key}")
