"""Where Alembic enters: runs revisions on the connection that it is handed.

There is no offline mode and no address here. `workers.store.schema_upgrade` opens the connection,
holds the lock that keeps others out, and passes it on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import context

from schema.tables import Base

if TYPE_CHECKING:
    from sqlalchemy import Connection

connection: Connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    compare_type=True,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
