"""The values that pass through the store: frozen, and of Python's own types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from schema.errors import InvalidRequestError
from schema.jobs import JobOptions, JobResult, OpenAIRequest, PromptRequest, Provenance

if TYPE_CHECKING:
    from workers.engine.protocols import StoredAnswer

#: Who holds what: fencing token by job.
Held = Mapping[UUID, int]

_REQUEST: TypeAdapter[PromptRequest | OpenAIRequest] = TypeAdapter(PromptRequest | OpenAIRequest)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobAddress:
    """What a queue message needs to know of a job."""

    id: UUID
    namespace: str
    model: str  # names the queue
    priority: int  # 0 is served first
    held: bool = False  # waits for its namespace's turn: the dispatcher writes its message


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What became of jobs that were to be written."""

    inserted: frozenset[UUID]  # new rows
    known: frozenset[UUID]  # rows that were there already, with the same request
    refused: Mapping[UUID, str]  # why nothing was written, by job; empty unless asked for
    held: frozenset[UUID] = frozenset()  # of the new rows, those that wait for their turn


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimedJob:
    """A job that the caller holds until its lease ends."""

    id: UUID
    namespace: str
    model: str
    channel: str
    priority: int
    request: dict[str, Any]  # PromptRequest or OpenAIRequest, as JSON types
    options: dict[str, Any]  # JobOptions, as JSON types
    token: int  # fencing token of this run
    attempts: int  # this run included
    max_attempts: int
    crashes: int  # engines or processes that died with it in flight
    deadline_at: datetime | None
    left_s: float | None = None  # until the deadline, at the moment of the claim
    batch_id: UUID | None
    custom_id: str | None
    cancel_requested: bool
    created_at: datetime
    traceparent: str | None  # W3C trace context of the submission

    def parse_request(self) -> PromptRequest | OpenAIRequest:
        """Return the request as its model.

        Raises:
            InvalidRequestError: A newer version wrote it, or it was changed in the database.
        """
        try:
            return _REQUEST.validate_python(self.request)
        except ValidationError as exc:
            raise _unreadable("request", exc) from exc

    def parse_options(self) -> JobOptions:
        """Return the options as their model.

        Raises:
            InvalidRequestError: A newer version wrote them, or they were changed in the database.
        """
        try:
            return JobOptions.model_validate(self.options)
        except ValidationError as exc:
            raise _unreadable("options", exc) from exc


def _unreadable(field: str, exc: ValidationError) -> InvalidRequestError:
    first = exc.errors(include_url=False, include_input=False)[0]
    at = ".".join(str(part) for part in first["loc"])
    return InvalidRequestError(first["msg"], field=f"{field}.{at}" if at else field)


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """An outcome that is committed and has to be published."""

    channel: str
    result: JobResult
    stream: bool = False  # whether the job asked for deltas, so that its stream must be ended


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What came of an attempt to take jobs; those held by others are in neither list."""

    jobs: tuple[ClaimedJob, ...]  # to be run by the caller
    ended: tuple[Delivery, ...]  # cancelled, expired or set aside instead; to be published


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """What a heartbeat found."""

    lost: frozenset[UUID]  # no longer the caller's: stop working on them
    cancelled: frozenset[UUID]  # still the caller's, and asked to stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of one run, to be committed."""

    job_id: UUID
    token: int  # fencing token of the run
    result: JobResult  # its status is the job's last state
    unclaimed: bool = False  # it needed no run: it stands if the job may still be claimed
    answer: StoredAnswer | None = None  # to be stored in the same transaction
    provenance: Provenance | None = None
    answer_id: UUID | None = None  # the stored answer that was given or made
    fingerprint: bytes | None = None  # of the answer, when a repeat of the request is given it


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Which outcomes stand."""

    accepted: frozenset[UUID]  # committed, now or by an earlier call of the same run
    refused: frozenset[UUID]  # the run had lost its lease: nothing was written


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancellation:
    """What became of jobs that were to be cancelled."""

    ended: tuple[Delivery, ...]  # had not begun: cancelled now, to be published
    running: frozenset[UUID]  # their workers are to stop them
    ignored: frozenset[UUID]  # over already, or not of this namespace


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRedis:
    """What Postgres knows of Redis, and what time it is there."""

    epoch: str | None  # of Redis' data; None before anybody has looked
    server: str | None  # run_id of the server that had the data when somebody last looked
    moment: datetime  # by Postgres' clock, now


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultGroup:
    """A consumer group on a result channel."""

    namespace: str
    channel: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPosition:
    """How far a consumer group has acknowledged its channel."""

    group: ResultGroup
    unread_job: UUID | None = None  # of the oldest entry not acknowledged; None: all are
    unread_token: int | None = None  # fencing token in that entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A file's worth of jobs."""

    id: UUID
    namespace: str
    source: str | None  # name of the input file
    digest: bytes | None  # SHA-256 of the input, to resume by
    total: int | None  # rows, once known
    status: str
    details: dict[str, Any]
    created_at: datetime
    finished_at: datetime | None
