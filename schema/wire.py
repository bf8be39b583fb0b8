r"""The message on the queue: a Celery task message, built by hand from its documented JSON.

Celery's message protocol 2 as kombu's Redis transport lays it on a list. Building it by hand keeps
Celery out of the client, and shows what a producer in any other language has to write::

    LPUSH promptmill.<model><separator><priority> '{
      "body": "[[], {}, {\"callbacks\": null, …}]",
      "content-encoding": "utf-8", "content-type": "application/json",
      "headers": {"lang": "py", "task": "promptmill.run_jobs", "id": "<uuid>", …,
                  "promptmill": {"v": 1, "namespace": "default", "sent_at": 1700000000.0,
                                 "ids": ["<job id>", …]}},
      "properties": {"delivery_tag": "<uuid>", "priority": 5, …}}'

The jobs ride in the header, either as ids of rows that are in Postgres (``ids``) or in full
(``jobs``, each the JSON of a `schema.jobs.JobSpec`). The task's arguments stay empty because
``celery inspect`` shows arguments and not headers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import orjson
from pydantic import ValidationError

from schema import names
from schema.errors import InvalidRequestError, MessageFormatError, shown
from schema.jobs import JobSpec
from schema.refusal import refusal, refuse_non_finite

#: Most jobs that a reader accepts in one message.
MAX_MESSAGE_JOBS = 4096
#: Latest moment that a message may name as its own, in Unix time: the end of the year 9999.
LAST_SENT_AT = 253_402_300_799
#: Full jobs are cut into messages of about this many bytes, so that no list item grows huge.
MESSAGE_BYTES = 4 * 1024 * 1024

# Arguments, keyword arguments and embedded canvas of a Celery task: none, ever. Plain text: kombu
# decodes base64 only where `properties.body_encoding` says so.
_EMPTY_BODY = '[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
_ORIGIN = f"promptmill{os.getpid()}@{socket.gethostname()}"


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a message goes: what all jobs of one message share."""

    namespace: str
    model: str  # served name of the model
    priority: int  # 0 is served first, 9 last

    @property
    def queue(self) -> str:
        """Name of the Celery queue."""
        return names.queue(self.model)

    @property
    def key(self) -> str:
        """Redis list that the message is pushed on."""
        return names.priority_list(self.queue, self.priority)


@dataclass(frozen=True, kw_only=True)
class RefusedJob:
    """A job of a readable message that cannot itself be read."""

    id: UUID | None  # None when not even the id is readable
    channel: str
    error: InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class JobMessage:
    """What one message asks for: jobs by id, or in full."""

    namespace: str
    sent_at: float  # Unix time by the sender's clock
    ids: tuple[UUID, ...] = ()
    jobs: tuple[JobSpec, ...] = ()
    traceparent: str | None = None  # W3C trace context of the submission, of jobs in full
    refused: tuple[RefusedJob, ...] = ()  # only ever filled by `decode`


def encode(message: JobMessage, route: Route) -> bytes:
    """Return the list item that asks for the jobs of `message`.

    Args:
        message: Either ids or full jobs, at most `MAX_MESSAGE_JOBS`.
        route: Its place; push the item on ``route.key``.

    Returns:
        JSON, to be pushed with LPUSH.

    Raises:
        ValueError: The message holds no jobs, both kinds, or too many.
    """
    count = len(message.ids) + len(message.jobs)
    if not 0 < count <= MAX_MESSAGE_JOBS or (message.ids and message.jobs):
        msg = f"a message carries 1 to {MAX_MESSAGE_JOBS} jobs of one kind, not {count}"
        raise ValueError(msg)
    header: dict[str, Any] = {
        "v": names.WIRE_VERSION,
        "namespace": message.namespace,
        "sent_at": message.sent_at,
    }
    if message.ids:
        header["ids"] = [str(job_id) for job_id in message.ids]
    else:
        header["jobs"] = [orjson.Fragment(job.model_dump_json()) for job in message.jobs]
        if message.traceparent is not None:
            header["traceparent"] = message.traceparent
    return orjson.dumps(_envelope(header, route))


def _envelope(header: dict[str, Any], route: Route) -> dict[str, Any]:
    task_id = str(uuid4())
    return {
        "body": _EMPTY_BODY,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": names.RUN_JOBS_TASK,
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "group": None,
            "shadow": None,
            "eta": None,
            "expires": None,
            "retries": 0,
            "timelimit": [None, None],
            "argsrepr": "()",
            "kwargsrepr": "{}",
            "origin": _ORIGIN,
            "ignore_result": True,
            names.JOBS_HEADER: header,
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": route.queue},
            "priority": route.priority,
            "delivery_tag": str(uuid4()),
        },
    }


def decode(header: object) -> JobMessage:
    """Read what a message's header ``promptmill`` holds.

    A message that is wrong as a whole is refused; one bad job among good ones is not: it is
    returned in `JobMessage.refused`, so that the others run and its own sender hears of it.

    Args:
        header: The header as parsed from JSON.

    Returns:
        The message.

    Raises:
        MessageFormatError: It is missing, of another version, or not of the documented shape.
    """
    if not isinstance(header, Mapping):
        msg = f"the header {names.JOBS_HEADER!r} must be an object, not {shown(header)}"
        raise MessageFormatError(msg)
    version = header.get("v")
    if isinstance(version, bool) or version != names.WIRE_VERSION:
        msg = f"message version {shown(version)} cannot be read; this worker reads version "
        raise MessageFormatError(f"{msg}{names.WIRE_VERSION}")
    namespace = header.get("namespace")
    if not isinstance(namespace, str) or not names.is_name(namespace):
        msg = f"namespace must match {names.NAME_PATTERN}, not {shown(namespace)}"
        raise MessageFormatError(msg)
    sent_at = header.get("sent_at")
    if isinstance(sent_at, bool) or not isinstance(sent_at, (int, float)):
        msg = f"sent_at must be a Unix time in seconds, not {shown(sent_at)}"
        raise MessageFormatError(msg)
    # Compared as it is: a whole number may be too large for a float. Recovery reckons with it.
    if not 0 <= sent_at <= LAST_SENT_AT:
        msg = f"sent_at must be a Unix time from 1970 to the year 9999, not {shown(sent_at)}"
        raise MessageFormatError(msg)
    if ("ids" in header) == ("jobs" in header):
        msg = "exactly one of the fields ids and jobs must be given"
        raise MessageFormatError(msg)
    if "ids" in header:
        ids = tuple(_job_id(item) for item in _items(header["ids"], "ids"))
        return JobMessage(namespace=namespace, sent_at=float(sent_at), ids=ids)
    jobs: list[JobSpec] = []
    refused: list[RefusedJob] = []
    for item in _items(header["jobs"], "jobs"):
        read = _job(item, namespace)
        if isinstance(read, JobSpec):
            jobs.append(read)
        else:
            refused.append(read)
    traceparent = header.get("traceparent")
    return JobMessage(
        namespace=namespace,
        sent_at=float(sent_at),
        jobs=tuple(jobs),
        # Advice: a job is not refused because its trace cannot be read.
        traceparent=traceparent if isinstance(traceparent, str) else None,
        refused=tuple(refused),
    )


def _items(value: object, field: str) -> list[Any]:
    if not isinstance(value, list):
        msg = f"{field} must be a list, not {shown(value)}"
        raise MessageFormatError(msg)
    if not 0 < len(value) <= MAX_MESSAGE_JOBS:
        msg = f"{field} must hold 1 to {MAX_MESSAGE_JOBS} items, not {len(value)}"
        raise MessageFormatError(msg)
    return value


def _job_id(item: object) -> UUID:
    try:
        if isinstance(item, str):
            return UUID(item)
    except ValueError:
        pass
    msg = f"ids must hold UUIDs, not {shown(item)}"
    raise MessageFormatError(msg)


def _job(item: object, namespace: str) -> JobSpec | RefusedJob:
    try:
        return _read_job(item, namespace)
    except InvalidRequestError as exc:
        return RefusedJob(id=_known_id(item), channel=_known_channel(item), error=exc)


def _read_job(item: object, namespace: str) -> JobSpec:
    # A job may leave its namespace out: it is the message's.
    stated = {"namespace": namespace, **item} if isinstance(item, dict) else item
    try:
        refuse_non_finite(stated, "job")
        # Strict JSON: true is no number, "5" is no number, and an id may be a string.
        job = JobSpec.model_validate_json(orjson.dumps(stated), strict=True)
    except ValidationError as exc:
        raise refusal(exc) from None
    except (orjson.JSONEncodeError, RecursionError) as exc:
        # Half a surrogate pair, an integer above 64 bits, or nesting without end.
        msg = f"is not JSON that can be stored ({exc})"
        raise InvalidRequestError(msg, field="job") from None
    if job.namespace != namespace:
        msg = f"{shown(job.namespace)} is not the message's ({namespace})"
        raise InvalidRequestError(msg, field="namespace", value=job.namespace)
    return job if job.idempotency_key is None else _keyed(job, job.idempotency_key)


def _keyed(job: JobSpec, key: str) -> JobSpec:
    """Return a job that has a key under the id that follows from it."""
    job_id = names.job_id_for(job.namespace, key)
    if "id" not in job.model_fields_set:
        return job.model_copy(update={"id": job_id})
    if job.id != job_id:
        # Its row would be another job's, and its sender would hear nothing.
        msg = f"must be {job_id}, which follows from namespace and idempotency_key"
        raise InvalidRequestError(msg, field="id", value=str(job.id))
    return job


def _known_id(item: object) -> UUID | None:
    try:
        return UUID(item["id"]) if isinstance(item, dict) else None
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _known_channel(item: object) -> str:
    channel = item.get("channel") if isinstance(item, dict) else None
    if isinstance(channel, str) and names.is_name(channel):
        return channel
    return names.DEFAULT_CHANNEL


def grouped(
    jobs: Iterable[JobSpec], *, model: str, limit: int, max_bytes: int = MESSAGE_BYTES
) -> Iterator[tuple[Route, list[JobSpec]]]:
    """Split jobs into the groups that one message each may carry.

    Args:
        jobs: Jobs of any namespaces, models and priorities.
        model: Served name for the jobs that name no model.
        limit: Most jobs a group.
        max_bytes: Most bytes of request a group, a single larger job excepted.

    Yields:
        The route that the jobs of the group share, and the jobs in the order given.
    """
    open_groups: dict[Route, tuple[list[JobSpec], int]] = {}
    for job in jobs:
        route = Route(namespace=job.namespace, model=job.model or model, priority=job.priority)
        group, size = open_groups.get(route, ([], 0))
        weight = _weight(job)
        if group and (len(group) >= limit or size + weight > max_bytes):
            yield route, group
            group, size = [], 0
        group.append(job)
        open_groups[route] = (group, size + weight)
    for route, (group, _) in open_groups.items():
        yield route, group


def _weight(job: JobSpec) -> int:
    # Close enough to bound a message: text is nearly all of a large job.
    request = job.request
    return len(request.prompt) if request.kind == "prompt" else len(str(request.body))
