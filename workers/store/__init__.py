"""Postgres: jobs, answers and what is known of them. Each part is imported by its own name."""
