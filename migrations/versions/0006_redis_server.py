"""The run of the Redis server, to notice that it was restarted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "broker",
        sa.Column(
            "server", sa.Text(), nullable=True, comment="run_id of the Redis that bore it last"
        ),
    )


def downgrade() -> None:
    op.drop_column("broker", "server")
