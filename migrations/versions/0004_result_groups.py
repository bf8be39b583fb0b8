"""The epoch of Redis' data, and the consumer groups that must get what it loses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "broker",
        sa.Column(
            "id",
            sa.SmallInteger(),
            autoincrement=False,
            server_default="1",
            nullable=False,
        ),
        sa.Column("epoch", sa.Text(), nullable=False, comment="as Redis bears it"),
        sa.Column(
            "since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.CheckConstraint("id = 1", name=op.f("ck_broker_one")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_broker")),
    )
    op.create_table(
        "result_groups",
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "acknowledged_to",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="what was published until then was acknowledged",
        ),
        sa.PrimaryKeyConstraint("namespace", "channel", "name", name=op.f("pk_result_groups")),
    )


def downgrade() -> None:
    op.drop_table("result_groups")
    op.drop_table("broker")
