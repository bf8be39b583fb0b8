"""The history of the tables, for Alembic; run through `workers.store.schema_upgrade`."""
