"""The tables, as SQLAlchemy models.

Postgres is the source of truth. Every table that holds a tenant's data has a `namespace`, and every
query names it. Times are Postgres' own clock.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    Uuid,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from schema.jobs import JobState

#: Dimensions of the shipped embedder's vectors (all-MiniLM-L6-v2).
EMBEDDING_DIMENSIONS = 384
#: Name under which the shipped embedder's vectors are stored.
EMBEDDER = "all-MiniLM-L6-v2"

_STATES = ", ".join(f"'{state}'" for state in JobState)
_LIVE = f"state in ('{JobState.QUEUED}', '{JobState.RUNNING}')"


class Base(DeclarativeBase):
    """Root of the models; names constraints so that migrations can address them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  SQLAlchemy reads it from the class
        str: Text(),
        datetime: DateTime(timezone=True),
        UUID: Uuid(),
        dict[str, Any]: JSONB(),
        list[str]: ARRAY(Text()),
        bytes: LargeBinary(),
        float: Double(),
    }


class BatchRow(Base):
    """A file's worth of jobs."""

    __tablename__ = "batches"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    namespace: Mapped[str]
    source: Mapped[str | None] = mapped_column(comment="name of the input file")
    digest: Mapped[bytes | None] = mapped_column(comment="SHA-256 of the input, to resume by")
    total: Mapped[int | None] = mapped_column(BigInteger, comment="rows, once known")
    status: Mapped[str] = mapped_column(server_default="in_progress")
    details: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (Index(None, "namespace", "created_at"),)


class AnswerRow(Base):
    """An answer that may be given again."""

    __tablename__ = "answers"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    namespace: Mapped[str]
    fingerprint: Mapped[bytes] = mapped_column(comment="SHA-256 of the canonical request")
    engine: Mapped[bytes] = mapped_column(comment="digest of the engine's identity")
    model: Mapped[str] = mapped_column(comment="name the model was served under")
    kind: Mapped[str] = mapped_column(server_default="completion")
    scope: Mapped[bytes | None] = mapped_column(
        comment="digest of what must be equal for reuse by meaning: engine, system prompt, "
        "earlier turns, sampling"
    )
    prompt: Mapped[str | None] = mapped_column(comment="text that neighbours are compared by")
    outputs: Mapped[dict[str, Any]] = mapped_column(comment="what replays the answer")
    digest: Mapped[bytes] = mapped_column(
        comment="SHA-256 of what a reader sees, to know a reported answer when it comes again"
    )
    nlp_result_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("nlp_results.id", ondelete="SET NULL")
    )
    prompt_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    engine_s: Mapped[float] = mapped_column(server_default="0", comment="seconds of generation")
    tags: Mapped[list[str]] = mapped_column(server_default=text("'{}'::text[]"))
    hits: Mapped[int] = mapped_column(BigInteger, server_default="0")
    last_hit_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    tombstoned_at: Mapped[datetime | None] = mapped_column(comment="never served from then on")
    tombstone: Mapped[str | None] = mapped_column(comment="why it is never served")

    __table_args__ = (
        # A reported answer stays as a record and does not keep a better one from its place.
        Index(
            "uq_answers_namespace_fingerprint",
            "namespace",
            "fingerprint",
            unique=True,
            postgresql_where=text("tombstoned_at IS NULL"),
        ),
        Index(
            "ix_answers_tombstoned",
            "namespace",
            "fingerprint",
            postgresql_where=text("tombstoned_at IS NOT NULL"),
        ),
        Index(None, "namespace", "created_at"),
        Index(None, "tags", postgresql_using="gin"),
        Index(None, "nlp_result_id", postgresql_where=text("nlp_result_id IS NOT NULL")),
        Index(None, "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )


class EmbeddingRow(Base):
    """A vector of a stored prompt, or of one clause of it."""

    __tablename__ = "embeddings"

    answer_id: Mapped[UUID] = mapped_column(
        ForeignKey("answers.id", ondelete="CASCADE", onupdate="CASCADE"), primary_key=True
    )
    embedder: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(
        SmallInteger, primary_key=True, comment="0 the prompt, 1 and up its clauses"
    )
    namespace: Mapped[str]
    scope: Mapped[bytes | None] = mapped_column(comment="as the answer's, to filter in one table")
    clause: Mapped[str | None] = mapped_column(comment="its text; NULL for the prompt itself")
    # Without a dimension, so that embedders of any size share the table; the index names its own.
    vector: Mapped[Any] = mapped_column(HALFVEC())

    __table_args__ = (
        Index(
            "ix_embeddings_minilm_hnsw",
            literal_column(f"(vector::halfvec({EMBEDDING_DIMENSIONS}))").label("halves"),
            postgresql_using="hnsw",
            postgresql_ops={"halves": "halfvec_cosine_ops"},
            postgresql_where=text(f"embedder = '{EMBEDDER}'"),
        ),
        Index(None, "namespace", "scope"),
    )


class NlpResultRow(Base):
    """What spaCy and other enrichers found in one text."""

    __tablename__ = "nlp_results"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    namespace: Mapped[str]
    digest: Mapped[bytes] = mapped_column(comment="SHA-256 of the text")
    pipeline: Mapped[str] = mapped_column(comment="name and version of the analysis")
    result: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        Index(
            "uq_nlp_results_namespace_digest_pipeline",
            "namespace",
            "digest",
            "pipeline",
            unique=True,
        ),
        Index(None, "namespace", "created_at"),
    )


class JobRow(Base):
    """A job, from submission to delivery."""

    __tablename__ = "jobs"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    namespace: Mapped[str]
    model: Mapped[str] = mapped_column(comment="served model; names the queue")
    channel: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger)
    request: Mapped[dict[str, Any]] = mapped_column(comment="PromptRequest or OpenAIRequest")
    options: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    idempotency_key: Mapped[str | None]
    batch_id: Mapped[UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    custom_id: Mapped[str | None]
    row: Mapped[int | None] = mapped_column(BigInteger)
    traceparent: Mapped[str | None] = mapped_column(comment="W3C trace context of the submission")

    state: Mapped[str] = mapped_column(server_default=JobState.QUEUED.value)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    available_at: Mapped[datetime] = mapped_column(
        server_default=func.now(), comment="not claimed before (back-off)"
    )
    deadline_at: Mapped[datetime | None]
    sent_at: Mapped[datetime | None] = mapped_column(comment="when its message was last written")
    held: Mapped[bool] = mapped_column(
        Boolean, server_default=text("false"), comment="waits here for its namespace's turn"
    )
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    max_attempts: Mapped[int] = mapped_column(Integer, server_default="3")
    crashes: Mapped[int] = mapped_column(Integer, server_default="0")
    token: Mapped[int] = mapped_column(BigInteger, server_default="0", comment="fencing token")
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    published_at: Mapped[datetime | None]
    provenance: Mapped[str | None]
    # Not a foreign key: a result names the answer it was given even after that was forgotten.
    answer_id: Mapped[UUID | None]
    result: Mapped[dict[str, Any] | None] = mapped_column(comment="JobResult as delivered")
    error: Mapped[dict[str, Any] | None] = mapped_column(comment="JobError")

    __table_args__ = (
        CheckConstraint(f"state in ({_STATES})", name="state"),
        CheckConstraint(
            f"(state = '{JobState.RUNNING}') = (lease_until IS NOT NULL)", name="lease"
        ),
        CheckConstraint(f"({_LIVE}) = (finished_at IS NULL)", name="finished"),
        Index(
            "uq_jobs_namespace_idempotency_key",
            "namespace",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index(
            "uq_jobs_batch_id_row",
            "batch_id",
            "row",
            unique=True,
            postgresql_where=text("batch_id IS NOT NULL"),
        ),
        # Rows with and without a message are looked for by different times, and a backlog of
        # millions of one must not be read to find the other.
        Index(
            "ix_jobs_unsent",
            "available_at",
            postgresql_where=text("state = 'queued' AND sent_at IS NULL AND NOT held"),
        ),
        # The heads of what waits for its turn, each namespace's by itself.
        Index(
            "ix_jobs_held",
            "model",
            "namespace",
            "priority",
            "created_at",
            postgresql_where=text("state = 'queued' AND held"),
        ),
        Index(
            "ix_jobs_sent",
            "sent_at",
            postgresql_where=text("state = 'queued' AND sent_at IS NOT NULL"),
        ),
        Index(
            "ix_jobs_deadline",
            "deadline_at",
            postgresql_where=text("state = 'queued' AND deadline_at IS NOT NULL"),
        ),
        Index(
            "ix_jobs_failed",
            "namespace",
            "created_at",
            postgresql_where=text("state = 'failed'"),
        ),
        Index("ix_jobs_running", "lease_until", postgresql_where=text("state = 'running'")),
        Index(
            "ix_jobs_unpublished",
            "finished_at",
            postgresql_where=text(f"published_at IS NULL AND NOT ({_LIVE})"),
        ),
        Index(None, "namespace", "created_at"),
        Index(None, "answer_id", postgresql_where=text("answer_id IS NOT NULL")),
    )


class ReuseDecisionRow(Base):
    """One decision for or against serving a neighbour's answer."""

    __tablename__ = "reuse_decisions"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    namespace: Mapped[str]
    job_id: Mapped[UUID | None]
    request_id: Mapped[str]
    answer_id: Mapped[UUID] = mapped_column(comment="the stored answer that was considered")
    own_answer_id: Mapped[UUID | None] = mapped_column(comment="the answer generated instead")
    similarity: Mapped[float] = mapped_column(comment="cosine of the two prompts")
    served: Mapped[bool]
    shadow: Mapped[bool] = mapped_column(server_default=text("false"))
    rule: Mapped[str | None] = mapped_column(comment="the guard's rule that refused")
    agreement: Mapped[float | None] = mapped_column(comment="likeness of both answers, in shadow")
    label: Mapped[str | None] = mapped_column(comment="what a person said of it: right or wrong")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        Index(None, "namespace", "created_at"),
        Index(None, "answer_id"),
        CheckConstraint("label in ('right', 'wrong')", name="label"),
    )


class BrokerRow(Base):
    """The one row that says which epoch of Redis' data the other tables speak of."""

    __tablename__ = "broker"

    id: Mapped[int] = mapped_column(
        SmallInteger, primary_key=True, autoincrement=False, server_default="1"
    )
    epoch: Mapped[str] = mapped_column(comment="as Redis bears it")
    server: Mapped[str | None] = mapped_column(comment="run_id of the Redis that bore it last")
    since: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (CheckConstraint("id = 1", name="one"),)


class ResultGroupRow(Base):
    """A consumer group of a result channel, and how far it is known to have read."""

    __tablename__ = "result_groups"

    namespace: Mapped[str] = mapped_column(primary_key=True)
    channel: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    acknowledged_to: Mapped[datetime | None] = mapped_column(
        comment="what was published until then was acknowledged"
    )


class FlightMarkerRow(Base):
    """A mark that a worker is generating the answer to a request, for others to wait for."""

    __tablename__ = "flight_markers"

    namespace: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(
        primary_key=True, comment="SHA-256 of the canonical request"
    )
    owner: Mapped[str] = mapped_column(comment="who generates the answer")
    until: Mapped[datetime] = mapped_column(comment="the mark no longer counts from then on")

    # Marks live for seconds; after a crash of the server none is missed.
    __table_args__ = ({"prefixes": ["UNLOGGED"]},)
