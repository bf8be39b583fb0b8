"""`Similarity`: which stored prompts are near, and whose answer may be given again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from uuid import UUID

    from workers.engine.config import SimilarityConfig
    from workers.engine.protocols import (
        Analyser,
        Analysis,
        AnswerStore,
        Embedder,
        Neighbour,
        StoredAnswer,
        Vector,
        Verdict,
    )
    from workers.enrich.guard import Guard

_A = TypeVar("_A")
_B = TypeVar("_B")

#: How much nearer two prompts have to be for each content word that only one of them has.
NEARER_PER_ADDED_WORD = 0.015

#: The rule named when the guard allows a pair that is not near enough for the words added.
NOT_NEAR_ENOUGH = "not_near_enough"

#: The rule named when a neighbour's answer was withdrawn between look-up and reading.
WITHDRAWN = "withdrawn"

#: The rule named when the guard allows a pair and the served model does not.
ENGINE = "engine"

#: Says of the asked and the stored prompt whether they are the same.
Verifier = Callable[[str, str], Awaitable[bool]]


@dataclass(frozen=True, kw_only=True)
class Considered:
    """One neighbour that might have been served, and what was decided."""

    answer_id: UUID
    prompt: str
    similarity: float  # cosine
    served: bool
    rule: str | None = None  # why not; a name from `rules.RULES` or one of this module's
    detail: str | None = None  # what differed, for people


class Similarity:
    """Looks up neighbours and decides which of them may answer.

    Args:
        embedder: Makes vectors.
        analyser: Analyses prompts for the guard; None serves nothing.
        store: Knows the stored prompts.
        guard: Compares two prompts; None serves nothing.
        config: How many neighbours, and from which similarity on.
    """

    def __init__(
        self,
        *,
        embedder: Embedder,
        store: AnswerStore,
        config: SimilarityConfig,
        analyser: Analyser | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._embedder = embedder
        self._analyser = analyser
        self._store = store
        self._guard = guard
        self._config = config

    async def neighbours(
        self,
        text: str,
        analysis: Analysis | None = None,
        *,
        namespace: str,
        scope: bytes | None = None,
    ) -> tuple[Neighbour, ...]:
        """Find what is near to a prompt and to each clause of a compound question.

        Args:
            text: The prompt.
            analysis: Its analysis, for the clauses; without one the whole prompt alone counts.
            namespace: Tenant.
            scope: When given, only answers of this scope.

        Returns:
            Each stored prompt once, with its highest similarity, nearest first; as many as
            configured. One found by a clause alone names that clause.

        Raises:
            Exception: What embedder or store raised.
        """
        if self._config.neighbours == 0:
            return ()
        parts = (text, *(analysis.clauses if analysis is not None else ()))
        vectors = await self._embedder.embed(parts)
        found = await asyncio.gather(
            *(
                self._nearest(vector, namespace, scope, self._config.neighbours)
                for vector in vectors
            )
        )
        best: dict[UUID, Neighbour] = {}
        for part, near in enumerate(found):
            for neighbour in near:
                known = best.get(neighbour.answer_id)
                if known is None or neighbour.similarity > known.similarity:
                    best[neighbour.answer_id] = (
                        replace(neighbour, clause=parts[part]) if part else neighbour
                    )
        ranked = sorted(best.values(), key=lambda neighbour: -neighbour.similarity)
        return tuple(ranked[: self._config.neighbours])

    async def find_reusable(
        self,
        text: str,
        *,
        namespace: str,
        scope: bytes,
        threshold: float | None = None,
        analysis: Analysis | None = None,
        vector: Vector | None = None,
        verify: Verifier | None = None,
    ) -> tuple[StoredAnswer | None, list[Considered]]:
        """Find a stored answer that may be given to a prompt.

        Args:
            text: The prompt.
            namespace: Tenant.
            scope: What must be equal: engine, system prompt, earlier turns.
            threshold: Cosine from which a neighbour is considered; None takes the configured one.
            analysis: The prompt's analysis, if it has been made already.
            vector: The prompt's unit vector, shape [dimensions], if it has been made already.
            verify: Has the last word on a pair that the guard allows; None leaves it to the guard.

        Returns:
            The answer of the nearest neighbour that the guard allows, or None; and every
            neighbour that was looked at, nearest first.

        Raises:
            Exception: What embedder, analyser or store raised.
        """
        analyser, guard = self._analyser, self._guard
        if analyser is None or guard is None:
            return None, []
        least = self._config.threshold if threshold is None else threshold
        candidates, asked = await _both(
            self._candidates(text, vector, namespace, scope, least),
            _analysis_of(text, analysis, analyser),
        )
        considered: list[Considered] = []
        for neighbour in candidates:
            answer = await self._store.by_id(namespace, neighbour.answer_id)
            refused = Considered(
                answer_id=neighbour.answer_id,
                prompt=neighbour.prompt,
                similarity=neighbour.similarity,
                served=False,
            )
            if answer is None:
                considered.append(replace(refused, rule=WITHDRAWN))
                continue
            stored = await _analysis_of(neighbour.prompt, answer.analysis, analyser)
            decided = _decide(refused, guard.check(asked, stored), least)
            if decided.served and verify is not None and not await verify(text, neighbour.prompt):
                detail = "the served model takes them for different"
                decided = replace(refused, rule=ENGINE, detail=detail)
            considered.append(decided)
            if decided.served:
                return answer, considered
        return None, considered

    async def _candidates(
        self, text: str, vector: Vector | None, namespace: str, scope: bytes, least: float
    ) -> Sequence[Neighbour]:
        if vector is None:
            vector = (await self._embedder.embed([text]))[0]
        near = await self._nearest(vector, namespace, scope, self._config.candidates)
        return [neighbour for neighbour in near if neighbour.similarity >= least]

    async def _nearest(
        self, vector: Vector, namespace: str, scope: bytes | None, limit: int
    ) -> Sequence[Neighbour]:
        return await self._store.nearest(
            namespace=namespace,
            embedder=self._embedder.name,
            vector=vector,
            limit=limit,
            scope=scope,
        )


async def _both(one: Coroutine[Any, Any, _A], other: Coroutine[Any, Any, _B]) -> tuple[_A, _B]:
    """Wait for two at once: embedder and spaCy have a process each, so it costs the longer.

    When one fails the other is cancelled, and the error comes out as it was raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            first, second = group.create_task(one), group.create_task(other)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return first.result(), second.result()


def _decide(refused: Considered, verdict: Verdict, least: float) -> Considered:
    """Turn the guard's verdict into a decision: each added word asks for more nearness."""
    if not verdict.allowed:
        return replace(refused, rule=verdict.rule, detail=verdict.detail)
    if refused.similarity < least + NEARER_PER_ADDED_WORD * verdict.added:
        detail = f"{verdict.added} words are only in one"
        return replace(refused, rule=NOT_NEAR_ENOUGH, detail=detail)
    return replace(refused, served=True)


async def _analysis_of(text: str, known: Analysis | None, analyser: Analyser) -> Analysis:
    """Return an analysis by today's pipeline, made anew where none such was kept."""
    if known is not None and known.pipeline == analyser.pipeline:
        return known
    return await analyser.analyse(text)
