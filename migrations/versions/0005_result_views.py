"""Views by which people read results in SQL."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

JOB_RESULTS = """
CREATE VIEW job_results WITH (security_invoker = true) AS
SELECT id AS job_id,
       namespace,
       batch_id,
       row,
       custom_id,
       model,
       state,
       provenance,
       result ->> 'text' AS answer,
       result #>> '{outputs,0,finish_reason}' AS finish_reason,
       CAST(result #>> '{metadata,similarity}' AS double precision) AS similarity,
       CAST(result #>> '{metadata,source_answer_id}' AS uuid) AS source_answer_id,
       CAST(result #>> '{metadata,tokens,prompt_tokens}' AS bigint) AS prompt_tokens,
       CAST(result #>> '{metadata,tokens,completion_tokens}' AS bigint) AS completion_tokens,
       CAST(result #>> '{metadata,engine_s}' AS double precision) AS engine_s,
       error ->> 'type' AS error_type,
       error ->> 'message' AS error_message,
       attempts,
       created_at,
       started_at,
       finished_at,
       request,
       result -> 'body' AS body,
       result ? 'packed' AS packed
FROM jobs
WHERE state NOT IN ('queued', 'running')
"""

BATCH_PROGRESS = """
CREATE VIEW batch_progress WITH (security_invoker = true) AS
SELECT batches.id AS batch_id,
       batches.namespace,
       batches.source,
       batches.status,
       batches.total,
       count(jobs.id) AS jobs,
       count(jobs.id) FILTER (WHERE jobs.state = 'done') AS done,
       count(jobs.id) FILTER (WHERE jobs.state IN ('failed', 'cancelled', 'expired')) AS failed,
       count(jobs.id) FILTER (WHERE jobs.provenance IN ('exact', 'semantic', 'coalesced'))
           AS cached,
       batches.created_at,
       batches.finished_at
FROM batches LEFT JOIN jobs ON jobs.batch_id = batches.id
GROUP BY batches.id
"""


def upgrade() -> None:
    op.execute(JOB_RESULTS)
    op.execute(BATCH_PROGRESS)


def downgrade() -> None:
    op.execute("DROP VIEW batch_progress")
    op.execute("DROP VIEW job_results")
