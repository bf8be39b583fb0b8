"""What the engine needs of others: small protocols and the values that pass through them.

The engine imports no database, no queue and no spaCy. `workers.cache`, `workers.enrich` and
`workers.store` implement these protocols beside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from uuid import UUID

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


# Of these two the memory tier holds hundreds of thousands. They point at nothing that could point
# back, and the collector, which stops the event loop while it looks, need not look at them.
class Token(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One token as spaCy saw it; the guard's raw material."""

    text: str
    lemma: str
    pos: str  # universal part of speech
    tag: str  # fine-grained part of speech
    dep: str  # relation to the head
    head: int  # index of the head in the same list
    ent: str = ""  # label of the entity it belongs to, or empty
    start: int = 0  # first character in the text


class Entity(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A named entity."""

    text: str
    label: str
    start: int  # first character
    end: int  # one past the last character


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What an `Analyser` found in one text."""

    text: str
    pipeline: str  # name and version of what made it
    language: str = ""
    sentences: tuple[str, ...] = ()
    entities: tuple[Entity, ...] = ()
    noun_phrases: tuple[str, ...] = ()
    connectives: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()  # of a compound question; empty when it asks one thing
    tokens: tuple[Token, ...] = ()
    truncated: bool = False  # only the first part of the text was analysed

    def public(self) -> dict[str, Any]:
        """Return what users see: everything but the text and the tokens, as JSON types."""
        return {
            "pipeline": self.pipeline,
            "language": self.language,
            "sentences": list(self.sentences),
            "entities": [msgspec.structs.asdict(entity) for entity in self.entities],
            "noun_phrases": list(self.noun_phrases),
            "connectives": list(self.connectives),
            "clauses": list(self.clauses),
            "truncated": self.truncated,
        }

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON types, for the store."""
        tokens = [msgspec.structs.asdict(token) for token in self.tokens]
        return {**self.public(), "text": self.text, "tokens": tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Analysis:
        """Rebuild what `to_json` wrote."""
        return cls(
            text=data["text"],
            pipeline=data["pipeline"],
            language=data.get("language", ""),
            sentences=tuple(data["sentences"]),
            entities=tuple(Entity(**item) for item in data["entities"]),
            noun_phrases=tuple(data["noun_phrases"]),
            connectives=tuple(data["connectives"]),
            clauses=tuple(data["clauses"]),
            tokens=tuple(Token(**item) for item in data["tokens"]),
            truncated=data.get("truncated", False),
        )


@dataclass(frozen=True, kw_only=True)
class StoredCompletion:
    """One of the `n` answers, with all that a faithful replay needs."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    # For each token: [token id, log probability, rank, decoded token] of each candidate.
    logprobs: tuple[tuple[tuple[int, float, int | None, str | None], ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StoredAnswer:
    """An answer that may be given again, and what was found out about its prompt."""

    id: UUID
    namespace: str
    fingerprint: bytes  # SHA-256 of the canonical request
    engine: bytes  # digest of the engine's identity
    model: str
    kind: str = "completion"  # or "pooling"
    scope: bytes | None = None  # what must be equal for reuse by meaning
    prompt: str | None = None  # text that neighbours are compared by
    completions: tuple[StoredCompletion, ...] = ()
    # For each prompt token, as in StoredCompletion.logprobs; None for the first token.
    prompt_logprobs: tuple[Any, ...] | None = None
    pooled: Any = None  # nested lists of a pooling output
    pooled_dtype: str | None = None
    analysis: Analysis | None = None
    similar: tuple[Neighbour, ...] | None = None
    enrichments: Mapping[str, Any] = field(default_factory=dict)  # of plug-ins, by name
    vectors: tuple[PartVector, ...] = ()  # written, never read back with the answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    engine_s: float = 0.0  # seconds of generation
    tags: tuple[str, ...] = ()
    created_at: float = 0.0  # Unix time
    expires_at: float | None = None  # Unix time


@dataclass(frozen=True, kw_only=True)
class PartVector:
    """The vector of a prompt (part 0) or of one of its clauses (part 1 and up)."""

    part: int
    vector: Vector  # shape [dimensions], unit length
    embedder: str
    clause: str | None = None


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A stored prompt near the one asked."""

    answer_id: UUID
    prompt: str
    similarity: float  # cosine, 1 is equal
    clause: str | None = None  # the clause of the asked prompt that it is near to

    def public(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "answer_id": str(self.answer_id),
            "prompt": self.prompt,
            "similarity": round(self.similarity, 6),
            **({"clause": self.clause} if self.clause else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard says of one pair of prompts."""

    allowed: bool
    rule: str | None = None  # the rule that refused
    detail: str | None = None  # what differed, for people
    added: int = 0  # content words that only one has, where that is allowed; asks for nearness


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One decision for or against serving a neighbour's answer, for the record."""

    namespace: str
    request_id: str
    answer_id: UUID
    similarity: float
    served: bool
    rule: str | None = None
    shadow: bool = False
    agreement: float | None = None
    own_answer_id: UUID | None = None


@runtime_checkable
class Analyser(Protocol):
    """Finds sentences, entities and the like in a text, off the event loop."""

    @property
    def pipeline(self) -> str:
        """Name and version; results of different pipelines are never mixed."""
        ...

    async def analyse(self, text: str) -> Analysis:
        """Analyse one text."""
        ...

    async def aclose(self) -> None:
        """Stop what runs; idempotent."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors, off the event loop."""

    @property
    def name(self) -> str:
        """Name under which the vectors are stored."""
        ...

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        ...

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors, shape [len(texts), dimensions]."""
        ...

    async def aclose(self) -> None:
        """Stop what runs; idempotent."""
        ...


@runtime_checkable
class AnswerStore(Protocol):
    """Keeps answers durably. The tier behind the memory tier."""

    async def get(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return the live answer (not expired, not tombstoned), or None."""
        ...

    async def by_id(self, namespace: str, answer_id: UUID) -> StoredAnswer | None:
        """Return the live answer with its analysis, or None."""
        ...

    async def put(self, answer: StoredAnswer) -> None:
        """Store an answer with its analysis and vectors; a second put of one is harmless."""
        ...

    async def nearest(
        self,
        *,
        namespace: str,
        embedder: str,
        vector: Vector,
        limit: int,
        scope: bytes | None = None,
    ) -> Sequence[Neighbour]:
        """Return live neighbours, nearest first.

        Args:
            namespace: Tenant; no other's prompts are ever looked at.
            embedder: Name of what made `vector`.
            vector: Shape [dimensions], unit length.
            limit: How many at most.
            scope: When given, only answers of this scope (those that may be served).
        """
        ...

    async def record(self, decisions: Sequence[Decision]) -> None:
        """Keep decisions for or against reuse."""
        ...


@runtime_checkable
class FlightMarkers(Protocol):
    """What a store may offer besides: one generation of an answer among many workers."""

    async def mark_flight(
        self, namespace: str, fingerprint: bytes, owner: str, ttl_s: float
    ) -> bool:
        """Return whether the caller is to generate; False when another does already.

        Args:
            namespace: Tenant.
            fingerprint: SHA-256 of the canonical request.
            owner: Name of the caller. Its own mark is renewed.
            ttl_s: Seconds after which the mark no longer counts, should the caller die.
        """
        ...

    async def unmark_flight(self, namespace: str, fingerprint: bytes, owner: str) -> None:
        """Take the caller's own mark away, once the answer is stored or there will be none."""
        ...

    async def wait_answer(
        self, namespace: str, fingerprint: bytes, timeout_s: float
    ) -> StoredAnswer | None:
        """Return the answer as soon as it is stored.

        None as soon as no mark stands any more, or when the time is over: then generate.
        """
        ...


@runtime_checkable
class ExtendsLives(Protocol):
    """What a store may offer besides: more time for an answer that is still wanted."""

    async def extend(self, namespace: str, answer_id: UUID, ttl_s: float) -> None:
        """Let a live answer live for `ttl_s` seconds from now, if that is longer than it would.

        Args:
            namespace: Tenant.
            answer_id: The answer; one that never expires goes on so.
            ttl_s: Seconds.
        """
        ...


class Considered(Protocol):
    """One neighbour that might have been served, and what was decided."""

    @property
    def answer_id(self) -> UUID:
        """The stored answer."""
        ...

    @property
    def similarity(self) -> float:
        """Cosine of the two prompts."""
        ...

    @property
    def served(self) -> bool:
        """Whether it may be given."""
        ...

    @property
    def rule(self) -> str | None:
        """Why not."""
        ...


@runtime_checkable
class Reuser(Protocol):
    """Decides which stored answer may be given to a prompt that means the same."""

    async def find_reusable(
        self,
        text: str,
        *,
        namespace: str,
        scope: bytes,
        threshold: float | None = None,
        analysis: Analysis | None = None,
        vector: Vector | None = None,
        verify: Callable[[str, str], Awaitable[bool]] | None = None,
    ) -> tuple[StoredAnswer | None, Sequence[Considered]]:
        """Return the answer of the nearest neighbour that may be given, and all looked at.

        Args:
            text: The prompt.
            namespace: Tenant.
            scope: What must be equal: engine, system prompt, earlier turns.
            threshold: Cosine from which a neighbour is considered; None takes the configured one.
            analysis: The prompt's analysis, if it has been made already.
            vector: The prompt's unit vector, shape [dimensions], if it has been made already.
            verify: Has the last word on the asked and the stored prompt; None leaves it to the
                rules.
        """
        ...


@runtime_checkable
class Enricher(Protocol):
    """A plug-in of the entry-point group ``promptmill.enrichers``."""

    @property
    def name(self) -> str:
        """Key of its result in ``metadata["enrichments"]``."""
        ...

    async def enrich(self, text: str, *, namespace: str) -> Mapping[str, Any]:
        """Return JSON types about one text."""
        ...

    async def aclose(self) -> None:
        """Stop what runs; idempotent."""
        ...
