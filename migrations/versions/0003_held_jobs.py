"""Jobs that wait for their namespace's turn, kept apart from those that miss their message."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "held",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="waits here for its namespace's turn",
        ),
    )
    op.drop_index("ix_jobs_unsent", "jobs")
    op.create_index(
        "ix_jobs_unsent",
        "jobs",
        ["available_at"],
        postgresql_where=sa.text("state = 'queued' AND sent_at IS NULL AND NOT held"),
    )
    op.create_index(
        "ix_jobs_held",
        "jobs",
        ["model", "namespace", "priority", "created_at"],
        postgresql_where=sa.text("state = 'queued' AND held"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_held", "jobs")
    op.drop_index("ix_jobs_unsent", "jobs")
    op.drop_column("jobs", "held")
    op.create_index(
        "ix_jobs_unsent",
        "jobs",
        ["available_at"],
        postgresql_where=sa.text("state = 'queued' AND sent_at IS NULL"),
    )
