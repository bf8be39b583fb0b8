"""The first tables: batches, jobs, answers with embeddings and analyses, decisions on reuse."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=True, comment="name of the input file"),
        sa.Column(
            "digest", sa.LargeBinary(), nullable=True, comment="SHA-256 of the input, to resume by"
        ),
        sa.Column("total", sa.BigInteger(), nullable=True, comment="rows, once known"),
        sa.Column("status", sa.Text(), server_default="in_progress", nullable=False),
        sa.Column("details", JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_namespace_created_at"), "batches", ["namespace", "created_at"])
    op.create_table(
        "nlp_results",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="SHA-256 of the text"),
        sa.Column(
            "pipeline", sa.Text(), nullable=False, comment="name and version of the analysis"
        ),
        sa.Column("result", JSONB(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nlp_results")),
    )
    op.create_index(
        "uq_nlp_results_namespace_digest_pipeline",
        "nlp_results",
        ["namespace", "digest", "pipeline"],
        unique=True,
    )
    op.create_table(
        "reuse_decisions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column(
            "answer_id", sa.Uuid(), nullable=False, comment="the stored answer that was considered"
        ),
        sa.Column(
            "own_answer_id", sa.Uuid(), nullable=True, comment="the answer generated instead"
        ),
        sa.Column("similarity", sa.Double(), nullable=False, comment="cosine of the two prompts"),
        sa.Column("served", sa.Boolean(), nullable=False),
        sa.Column("shadow", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("rule", sa.Text(), nullable=True, comment="the guard's rule that refused"),
        sa.Column(
            "agreement", sa.Double(), nullable=True, comment="likeness of both answers, in shadow"
        ),
        sa.Column(
            "label", sa.Text(), nullable=True, comment="what a person said of it: right or wrong"
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("label in ('right', 'wrong')", name=op.f("ck_reuse_decisions_label")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reuse_decisions")),
    )
    op.create_index(op.f("ix_reuse_decisions_answer_id"), "reuse_decisions", ["answer_id"])
    op.create_index(
        op.f("ix_reuse_decisions_namespace_created_at"),
        "reuse_decisions",
        ["namespace", "created_at"],
    )
    op.create_table(
        "answers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column(
            "fingerprint",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 of the canonical request",
        ),
        sa.Column(
            "engine", sa.LargeBinary(), nullable=False, comment="digest of the engine's identity"
        ),
        sa.Column("model", sa.Text(), nullable=False, comment="name the model was served under"),
        sa.Column("kind", sa.Text(), server_default="completion", nullable=False),
        sa.Column(
            "scope",
            sa.LargeBinary(),
            nullable=True,
            comment="digest of what must be equal for reuse by meaning: engine, system prompt, "
            "earlier turns, sampling",
        ),
        sa.Column(
            "prompt", sa.Text(), nullable=True, comment="text that neighbours are compared by"
        ),
        sa.Column("outputs", JSONB(), nullable=False, comment="what replays the answer"),
        sa.Column(
            "digest",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 of what a reader sees, to know a reported answer when it comes again",
        ),
        sa.Column("nlp_result_id", sa.Uuid(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), server_default="0", nullable=False),
        sa.Column("completion_tokens", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "engine_s",
            sa.Double(),
            server_default="0",
            nullable=False,
            comment="seconds of generation",
        ),
        sa.Column(
            "tags", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False
        ),
        sa.Column("hits", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_hit_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "tombstoned_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="never served from then on",
        ),
        sa.Column("tombstone", sa.Text(), nullable=True, comment="why it is never served"),
        sa.ForeignKeyConstraint(
            ["nlp_result_id"],
            ["nlp_results.id"],
            name=op.f("fk_answers_nlp_result_id"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_answers")),
    )
    op.create_index(
        op.f("ix_answers_expires_at"),
        "answers",
        ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    )
    op.create_index(
        op.f("ix_answers_nlp_result_id"),
        "answers",
        ["nlp_result_id"],
        postgresql_where=sa.text("nlp_result_id IS NOT NULL"),
    )
    op.create_index(op.f("ix_answers_tags"), "answers", ["tags"], postgresql_using="gin")
    op.create_index(
        "ix_answers_tombstoned",
        "answers",
        ["namespace", "fingerprint"],
        postgresql_where=sa.text("tombstoned_at IS NOT NULL"),
    )
    op.create_index(
        "uq_answers_namespace_fingerprint",
        "answers",
        ["namespace", "fingerprint"],
        unique=True,
        postgresql_where=sa.text("tombstoned_at IS NULL"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False, comment="served model; names the queue"),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("request", JSONB(), nullable=False, comment="PromptRequest or OpenAIRequest"),
        sa.Column("options", JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("batch_id", sa.Uuid(), nullable=True),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("row", sa.BigInteger(), nullable=True),
        sa.Column(
            "traceparent", sa.Text(), nullable=True, comment="W3C trace context of the submission"
        ),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "available_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="not claimed before (back-off)",
        ),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "sent_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="when its message was last written",
        ),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.Integer(), server_default="3", nullable=False),
        sa.Column("crashes", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "token", sa.BigInteger(), server_default="0", nullable=False, comment="fencing token"
        ),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("provenance", sa.Text(), nullable=True),
        sa.Column("answer_id", sa.Uuid(), nullable=True),
        sa.Column("result", JSONB(), nullable=True, comment="JobResult as delivered"),
        sa.Column("error", JSONB(), nullable=True, comment="JobError"),
        sa.CheckConstraint(
            "state in ('queued', 'running', 'done', 'failed', 'cancelled', 'expired')",
            name=op.f("ck_jobs_state"),
        ),
        sa.CheckConstraint(
            "(state = 'running') = (lease_until IS NOT NULL)", name=op.f("ck_jobs_lease")
        ),
        sa.CheckConstraint(
            "(state in ('queued', 'running')) = (finished_at IS NULL)",
            name=op.f("ck_jobs_finished"),
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_jobs_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index(
        op.f("ix_jobs_answer_id"),
        "jobs",
        ["answer_id"],
        postgresql_where=sa.text("answer_id IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_deadline",
        "jobs",
        ["deadline_at"],
        postgresql_where=sa.text("state = 'queued' AND deadline_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_failed",
        "jobs",
        ["namespace", "created_at"],
        postgresql_where=sa.text("state = 'failed'"),
    )
    op.create_index(op.f("ix_jobs_namespace_created_at"), "jobs", ["namespace", "created_at"])
    op.create_index(
        "ix_jobs_running", "jobs", ["lease_until"], postgresql_where=sa.text("state = 'running'")
    )
    op.create_index(
        "ix_jobs_sent",
        "jobs",
        ["sent_at"],
        postgresql_where=sa.text("state = 'queued' AND sent_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_unpublished",
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text("published_at IS NULL AND NOT (state in ('queued', 'running'))"),
    )
    op.create_index(
        "ix_jobs_unsent",
        "jobs",
        ["available_at"],
        postgresql_where=sa.text("state = 'queued' AND sent_at IS NULL"),
    )
    op.create_index(
        "uq_jobs_batch_id_row",
        "jobs",
        ["batch_id", "row"],
        unique=True,
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    op.create_index(
        "uq_jobs_namespace_idempotency_key",
        "jobs",
        ["namespace", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "embeddings",
        sa.Column("answer_id", sa.Uuid(), nullable=False),
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column(
            "part", sa.SmallInteger(), nullable=False, comment="0 the prompt, 1 and up its clauses"
        ),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column(
            "scope",
            sa.LargeBinary(),
            nullable=True,
            comment="as the answer's, to filter in one table",
        ),
        sa.Column(
            "clause", sa.Text(), nullable=True, comment="its text; NULL for the prompt itself"
        ),
        sa.Column("vector", HALFVEC(), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer_id"],
            ["answers.id"],
            name=op.f("fk_embeddings_answer_id"),
            onupdate="CASCADE",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("answer_id", "embedder", "part", name=op.f("pk_embeddings")),
    )
    op.create_index(
        "ix_embeddings_minilm_hnsw",
        "embeddings",
        [sa.literal_column("(vector::halfvec(384))").label("halves")],
        postgresql_using="hnsw",
        postgresql_ops={"halves": "halfvec_cosine_ops"},
        postgresql_where=sa.text("embedder = 'all-MiniLM-L6-v2'"),
    )
    op.create_index(op.f("ix_embeddings_namespace_scope"), "embeddings", ["namespace", "scope"])


def downgrade() -> None:
    # The extension stays: others may use it, and dropping it may not be ours to do.
    for table in ("embeddings", "jobs", "answers", "reuse_decisions", "nlp_results", "batches"):
        op.drop_table(table)
