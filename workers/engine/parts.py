"""The parts that an engine works with, and those made where none are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.engine.config import HandlerConfig
from workers.engine.protocols import Analyser, AnswerStore, Embedder, Enricher, Reuser


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Implementations of the engine's protocols; each may be missing."""

    analyser: Analyser | None = None
    embedder: Embedder | None = None
    store: AnswerStore | None = None
    reuser: Reuser | None = None  # None makes one of the three above, when all are there
    plugins: tuple[Enricher, ...] | None = None  # None takes those installed
    missing: Mapping[str, str] = field(default_factory=dict)  # what could not be had, and why


# Below is the one place where the engine reaches for adapters: what nobody has named is made here.


def default_parts(config: HandlerConfig) -> Parts:
    """Return the parts that need no server.

    Without a store there is nobody to be near to, so no embedder is loaded.

    Args:
        config: What is switched on.
    """
    if not config.features.nlp:
        return Parts()
    from workers.enrich.nlp import SpacyAnalyser

    return Parts(analyser=SpacyAnalyser(config.nlp))


def complete(parts: Parts, config: HandlerConfig) -> Parts:
    """Add what can be made of the parts given: reuse by meaning, and installed plug-ins.

    Args:
        parts: Given by the user of the engine.
        config: What is switched on.
    """
    return _with_plugins(_with_reuser(parts, config), config)


def _with_reuser(parts: Parts, config: HandlerConfig) -> Parts:
    wanted = config.features.similarity and config.features.nlp
    if not wanted or parts.reuser is not None:
        return parts
    if parts.analyser is None or parts.embedder is None or parts.store is None:
        return parts
    from workers.enrich.guard import Guard
    from workers.enrich.neighbours import Similarity

    reuser = Similarity(
        embedder=parts.embedder,
        analyser=parts.analyser,
        store=parts.store,
        guard=Guard(),
        config=config.similarity,
    )
    return dataclasses.replace(parts, reuser=reuser)


def _with_plugins(parts: Parts, config: HandlerConfig) -> Parts:
    if not config.features.plugins:
        return dataclasses.replace(parts, plugins=())
    if parts.plugins is not None:
        return parts
    from workers.enrich.plugins import load_plugins

    found = load_plugins()
    broken = {f"plugin:{plugin.name}": plugin.reason for plugin in found.broken}
    return dataclasses.replace(parts, plugins=found.enrichers, missing={**parts.missing, **broken})
