"""The engine's parts over Postgres, for a program that uses the engine without a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
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
        Parts for `EnhancedAsyncLLM`, with their models loaded; one that cannot be loaded is named
        by each request's metadata. `Parts.store` is a `PostgresAnswers`, by which answers are
        withdrawn and labelled. All is closed at the end, after the engine.
    """
    from workers.engine import Parts
    from workers.enrich.embedder import MiniLmEmbedder
    from workers.enrich.nlp import SpacyAnalyser

    async with AsyncExitStack() as stack:
        database = Database(database_url)
        stack.push_async_callback(database.aclose)
        analyser = SpacyAnalyser(config.nlp) if config.features.nlp else None
        embedder = MiniLmEmbedder(config.similarity) if config.features.similarity else None
        models = [model for model in (analyser, embedder) if model is not None]
        for model in models:
            stack.push_async_callback(model.aclose)
        await asyncio.gather(*(model.start() for model in models), return_exceptions=True)
        yield Parts(analyser=analyser, embedder=embedder, store=PostgresAnswers(database))
