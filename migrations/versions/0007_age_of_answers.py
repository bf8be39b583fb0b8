"""Indexes by which retention finds what a namespace has had for too long.

Made concurrently: workers go on writing answers while a large table is read for it.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_TABLES = ("answers", "nlp_results")


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for table in _TABLES:
            name = op.f(f"ix_{table}_namespace_created_at")
            # One whose making was cut short is there, and of no use.
            op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
            op.create_index(name, table, ["namespace", "created_at"], postgresql_concurrently=True)


def downgrade() -> None:
    for table in _TABLES:
        op.drop_index(op.f(f"ix_{table}_namespace_created_at"), table)
