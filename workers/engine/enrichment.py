"""Enrichment: what is found out about a prompt while vLLM answers it.

An enhancement that fails, hangs or is over its budget is cut, named in the metadata, counted, and
the answer comes as vLLM gave it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from schema.errors import CallerError
from workers.engine.breaker import Breaker, BreakerOpenError
from workers.engine.config import HandlerConfig
from workers.engine.protocols import (
    Analyser,
    Analysis,
    AnswerStore,
    Embedder,
    Enricher,
    Neighbour,
    PartVector,
)

_T = TypeVar("_T")


@dataclass
class Findings:
    """What was found so far; filled as the stages end."""

    analysis: Analysis | None = None
    answer_analysis: Analysis | None = None
    similar: tuple[Neighbour, ...] | None = None
    vectors: tuple[PartVector, ...] = ()
    enrichments: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # enhancement to reason
    seconds: dict[str, float] = field(default_factory=dict)  # stage to time
    running: set[str] = field(default_factory=set)  # stages not ended yet


class Enrichers:
    """The parts that enrich, with their budgets and breakers.

    Args:
        config: Which are on, and how long each may take.
        analyser: spaCy, or None.
        embedder: Makes vectors, or None.
        store: Knows the neighbours, or None.
        plugins: Enrichers of other packages.
    """

    def __init__(
        self,
        config: HandlerConfig,
        *,
        analyser: Analyser | None = None,
        embedder: Embedder | None = None,
        store: AnswerStore | None = None,
        plugins: Sequence[Enricher] = (),
    ) -> None:
        self.config = config
        self.analyser = analyser if config.features.nlp else None
        self.embedder = embedder if config.features.similarity else None
        self.store = store
        self.plugins = tuple(plugins) if config.features.plugins else ()
        names = ["nlp", "similarity", *(f"plugin:{plugin.name}" for plugin in self.plugins)]
        self.breakers = {name: Breaker(name) for name in names}
        self.disabled = self._why_disabled()

    def _why_disabled(self) -> dict[str, str]:
        features, reasons = self.config.features, {}
        if self.analyser is None:
            reasons["nlp"] = "no analyser" if features.nlp else "switched off"
        if self.embedder is None:
            reasons["similarity"] = "no embedder" if features.similarity else "switched off"
        elif self.store is None:
            reasons["similarity"] = "no answer store"
        if self.store is None:
            reasons["stored_answers"] = "no answer store"
        return reasons

    @property
    def active(self) -> bool:
        """Whether there is anything to do for a prompt."""
        similarity = self.embedder is not None and self.store is not None
        return self.analyser is not None or similarity or bool(self.plugins)

    async def _guarded(self, name: str, action: Callable[[], Awaitable[_T]], budget_s: float) -> _T:
        """Run one stage under its breaker and budget, and try again what may pass by."""
        retry = self.config.retry
        for attempt in range(1, retry.attempts + 1):
            try:
                return await self.breakers[name].call(action, budget_s=budget_s)
            except (BreakerOpenError, TimeoutError, CallerError):
                raise
            except Exception:
                if attempt == retry.attempts:
                    raise
                await asyncio.sleep(retry.wait_s * 2 ** (attempt - 1))
        raise AssertionError  # the loop returns or raises

    async def analyse(self, text: str) -> Analysis:
        """Analyse a text within the configured budget.

        Args:
            text: Any length; a long one is cut.

        Raises:
            Exception: What the analyser raised, or that it is over its budget.
        """
        analyser = self.analyser
        if analyser is None:
            msg = "no analyser"
            raise CallerError(msg)
        return await self._guarded("nlp", lambda: analyser.analyse(text), self.config.nlp.budget_s)

    async def neighbours(
        self, texts: Sequence[str], *, namespace: str, without: UUID | None = None
    ) -> tuple[tuple[PartVector, ...], tuple[Neighbour, ...]]:
        """Embed a prompt and its clauses, and name what lies near each.

        Args:
            texts: The prompt, then its clauses.
            namespace: Tenant.
            without: An answer that is not its own neighbour.

        Returns:
            The vectors, and the neighbours without repeats, nearest first.

        Raises:
            Exception: What embedder or store raised, or that they are over their budget.
        """
        embedder, store, config = self.embedder, self.store, self.config.similarity
        if embedder is None or store is None:
            msg = "no embedder or no store"
            raise CallerError(msg)

        async def look() -> tuple[tuple[PartVector, ...], tuple[Neighbour, ...]]:
            matrix = await embedder.embed(texts)
            vectors = tuple(
                PartVector(
                    part=part,
                    vector=vector,
                    embedder=embedder.name,
                    clause=texts[part] if part else None,
                )
                for part, vector in enumerate(matrix)
            )
            best: dict[UUID, Neighbour] = {}
            for part in vectors if config.neighbours else ():
                for near in await store.nearest(
                    namespace=namespace,
                    embedder=embedder.name,
                    vector=part.vector,
                    limit=config.neighbours,
                ):
                    known = best.get(near.answer_id)
                    if near.answer_id != without and (
                        known is None or near.similarity > known.similarity
                    ):
                        best[near.answer_id] = (
                            Neighbour(
                                answer_id=near.answer_id,
                                prompt=near.prompt,
                                similarity=near.similarity,
                                clause=part.clause,
                            )
                            if part.clause
                            else near
                        )
            ranked = sorted(best.values(), key=lambda item: -item.similarity)
            return vectors, tuple(ranked[: max(config.neighbours, 1)])

        return await self._guarded("similarity", look, config.budget_s)

    async def plug_in(self, plugin: Enricher, text: str, *, namespace: str) -> Mapping[str, Any]:
        """Run one enricher of another package within the budget of an analysis.

        Args:
            plugin: One of `plugins`.
            text: The prompt.
            namespace: Tenant.
        """
        return await self._guarded(
            f"plugin:{plugin.name}",
            lambda: plugin.enrich(text, namespace=namespace),
            self.config.nlp.budget_s,
        )

    async def aclose(self) -> None:
        """Stop what the parts run; idempotent."""
        for part in (self.analyser, self.embedder, *self.plugins):
            if part is not None:
                await part.aclose()


class EnrichmentRun:
    """The enrichment of one prompt: a task with an owner.

    Args:
        enrichers: What to run.
        text: The prompt as people wrote it.
        namespace: Tenant.
    """

    def __init__(self, enrichers: Enrichers, text: str, *, namespace: str) -> None:
        self.findings = Findings()
        self._enrichers = enrichers
        self._text = text
        self._namespace = namespace
        self._analysed: asyncio.Future[Analysis | None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name="promptmill-enrichment")

    @property
    def done(self) -> bool:
        """Whether all of it has ended."""
        return self._task.done()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when it has ended or the time is over; never raises what a stage raised.

        Args:
            timeout_s: Seconds; None waits to the end.
        """
        await asyncio.wait({self._task}, timeout=timeout_s)

    def cancel(self) -> None:
        """Stop it; what was found stays."""
        self._task.cancel()

    async def _run(self) -> None:
        enrichers = self._enrichers
        stages = []
        if enrichers.analyser is not None:
            stages.append(self._stage("nlp", self._analyse()))
        else:
            self._analysed.set_result(None)
        if enrichers.embedder is not None and enrichers.store is not None:
            stages.append(self._stage("similarity", self._look_around()))
        stages.extend(
            self._stage(f"plugin:{plugin.name}", self._plug_in(plugin))
            for plugin in enrichers.plugins
        )
        await asyncio.gather(*stages)

    async def _stage(self, name: str, work: Awaitable[None]) -> None:
        findings, started = self.findings, time.perf_counter()
        findings.running.add(name)
        try:
            await work
        except Exception as exc:  # noqa: BLE001  an enhancement may fail; it was counted
            findings.errors[name] = f"{type(exc).__name__}: {exc}"
        finally:
            findings.running.discard(name)
            findings.seconds[name] = time.perf_counter() - started

    async def _analyse(self) -> None:
        try:
            self.findings.analysis = await self._enrichers.analyse(self._text)
        finally:
            if not self._analysed.done():
                self._analysed.set_result(self.findings.analysis)

    async def _look_around(self) -> None:
        # The clauses come from the analysis; without it the prompt alone is looked up.
        analysis = await asyncio.shield(self._analysed)
        texts = [self._text, *(analysis.clauses if analysis else ())]
        self.findings.vectors, self.findings.similar = await self._enrichers.neighbours(
            texts, namespace=self._namespace
        )

    async def _plug_in(self, plugin: Enricher) -> None:
        found = await self._enrichers.plug_in(plugin, self._text, namespace=self._namespace)
        self.findings.enrichments[plugin.name] = dict(found)
