"""What the engine keeps of a generation beside its outputs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from schema.jobs import Provenance
from workers.engine.enrichment import EnrichmentRun
from workers.engine.protocols import StoredAnswer


@dataclass(frozen=True, kw_only=True)
class Reused:
    """A stored answer that is served."""

    answer: StoredAnswer
    provenance: Provenance
    tier: str  # memory or store
    similarity: float = 1.0  # cosine


@dataclass(kw_only=True)
class FlightNotes:
    """Of one flight; filled in as it goes."""

    #: What vLLM is asked with; it may be changed until then.
    call: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # stage to time
    errors: dict[str, str] = field(default_factory=dict)  # part to reason
    #: Set once vLLM has the request, or the flight has ended before; the enrichment, if any, has
    #: been started by then.
    under_way: asyncio.Event = field(default_factory=asyncio.Event)
    enrichment: EnrichmentRun | None = None
    reused: Reused | None = None  # the store had it
    answer: StoredAnswer | None = None  # what was generated, once it is whole
    forgettings: int = 0  # of the memory tier, when it was given that answer
    not_storable: str | None = None  # why there is no answer to keep
    tags: dict[str, None] = field(default_factory=dict)  # of all its readers, in their order
    analyse_answer: bool = False  # one of its readers wants the answer analysed
    engine_stores: bool = False  # one of its readers leaves storing to the engine
    marked: bool = False  # other workers are told that this one generates
    late: bool = False  # a final output went out before enrichment had ended
