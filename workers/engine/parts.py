"""The parts that an engine works with, and those made for a library user who names none."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.config import HandlerConfig
from workers.engine.protocols import Analyser, AnswerStore, Embedder, Enricher


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Implementations of the engine's protocols; each may be missing."""

    analyser: Analyser | None = None
    embedder: Embedder | None = None
    store: AnswerStore | None = None
    plugins: tuple[Enricher, ...] = ()


def default_parts(config: HandlerConfig) -> Parts:
    """Return the parts that need no server: spaCy, if it is on, and plug-ins.

    Without a store there is nobody to be near to, so no embedder is loaded.

    Args:
        config: What is switched on.
    """
    analyser: Analyser | None = None
    if config.features.nlp:
        # The one place where the engine reaches for an adapter: the default of a library user.
        from workers.enrich.nlp import SpacyAnalyser

        analyser = SpacyAnalyser(config.nlp)
    return Parts(analyser=analyser)
