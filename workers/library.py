"""The engine's parts over Postgres, for a program that uses the engine without a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from workers.store.answers import PostgresAnswers
from workers.store.database import Database

if TYPE_CHECKING:
    from workers.engine import HandlerConfig, Parts

__all__ = ["postgres_parts"]


@asynccontextmanager
async def postgres_parts(database_url: str, config: HandlerConfig) -> AsyncIterator[Parts]:
    """Make the parts of an engine that stores answers, names neighbours, and reuses by meaning.

    Args:
        database_url: Of a Postgres with pgvector that has our tables (``promptmill db upgrade``).
        config: As the engine's; what it switches off is not made.

    Yields:
        Parts for `EnhancedAsyncLLM`, which closes them; the connections are closed at the end.
        `Parts.store` is a `PostgresAnswers`, by which answers are withdrawn and labelled.
    """
    from workers.engine import Parts
    from workers.enrich.embedder import MiniLmEmbedder
    from workers.enrich.nlp import SpacyAnalyser

    database = Database(database_url)
    try:
        yield Parts(
            analyser=SpacyAnalyser(config.nlp) if config.features.nlp else None,
            embedder=MiniLmEmbedder(config.similarity) if config.features.similarity else None,
            store=PostgresAnswers(database),
        )
    finally:
        await database.aclose()
