"""Marks of answers that a worker is generating, for other workers to wait for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "flight_markers",
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column(
            "fingerprint",
            sa.LargeBinary(),
            nullable=False,
            comment="SHA-256 of the canonical request",
        ),
        sa.Column("owner", sa.Text(), nullable=False, comment="who generates the answer"),
        sa.Column(
            "until",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="the mark no longer counts from then on",
        ),
        sa.PrimaryKeyConstraint("namespace", "fingerprint", name=op.f("pk_flight_markers")),
        # Marks live for seconds; after a crash of the server none is missed.
        prefixes=["UNLOGGED"],
    )


def downgrade() -> None:
    op.drop_table("flight_markers")
