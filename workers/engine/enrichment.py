"""Enrichment: what is found out about a prompt while vLLM answers it.

An enhancement that fails, hangs or is over its budget is cut, named in the metadata, counted, and
the answer comes as vLLM gave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from schema.errors import CallerError
from workers.engine.breaker import Breaker, BreakerOpenError
from workers.engine.config import HandlerConfig, PluginConfig
from workers.engine.protocols import (
    Analyser,
    Analysis,
    AnswerStore,
    Embedder,
    Enricher,
    Neighbour,
    PartVector,
)
from workers.engine.side_tasks import SideTasks

_T = TypeVar("_T")
#: Seconds a part may take to stop what it runs.
_CLOSE_S = 5.0


@dataclass
class Findings:
    """What was found so far; filled as the stages end."""

    analysis: Analysis | None = None
    answer_analysis: Analysis | None = None
    similar: tuple[Neighbour, ...] | None = None
    vectors: tuple[PartVector, ...] = ()
    enrichments: dict[str, Any] = field(default_factory=dict)
    answer_enrichments: dict[str, Any] = field(default_factory=dict)
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
        missing: Parts that could not be had, and why.
        took: Told of each stage that has ended: its seconds by its name.
    """

    def __init__(
        self,
        config: HandlerConfig,
        *,
        analyser: Analyser | None = None,
        embedder: Embedder | None = None,
        store: AnswerStore | None = None,
        plugins: Sequence[Enricher] = (),
        missing: Mapping[str, str] | None = None,
        took: Callable[[Mapping[str, float]], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.took = took
        self.analyser = analyser if config.features.nlp else None
        self.embedder = embedder if config.features.similarity else None
        self.store = store
        self.plugins = tuple(plugins) if config.features.plugins else ()
        names = [
            "nlp",
            "embedder",
            "neighbours",
            *(f"plugin:{plugin.name}" for plugin in self.plugins),
        ]
        self.breakers = {name: Breaker(name) for name in names}
        self._retries = {
            "nlp": config.nlp.retry,
            "embedder": config.similarity.retry,
            "neighbours": config.similarity.retry,
            **{f"plugin:{plugin.name}": self._plugin(plugin).retry for plugin in self.plugins},
        }
        # What is more than the parts let in waits here, within its budget, and is no failure.
        self._gates = {
            "nlp": asyncio.Semaphore(config.nlp.concurrency),
            # A prompt with many clauses takes more than one of the embedder's places.
            "embedder": asyncio.Semaphore(max(1, config.similarity.concurrency // 4)),
            "neighbours": asyncio.Semaphore(config.similarity.look_ups),
            **{
                f"plugin:{plugin.name}": asyncio.Semaphore(self._plugin(plugin).concurrency)
                for plugin in self.plugins
            },
        }
        self.disabled = {**self._why_disabled(), **(missing or {})}

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
        """Run one stage in its turn, under its breaker and budget."""
        gate = self._gates[name]
        if gate.locked():
            try:
                async with asyncio.timeout(budget_s):
                    await gate.acquire()
            except TimeoutError:
                self.breakers[name].skipped += 1
                msg = f"{name} was busy for more than {budget_s:g} s"
                raise TimeoutError(msg) from None
        else:
            await gate.acquire()  # at once
        try:
            return await self._tried(name, action, budget_s)
        finally:
            gate.release()

    async def _tried(self, name: str, action: Callable[[], Awaitable[_T]], budget_s: float) -> _T:
        """Run one stage under its breaker and budget, and try again what may pass by."""
        retry = self._retries[name] or self.config.retry
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

    async def embed(self, texts: Sequence[str], *, first: int = 0) -> tuple[PartVector, ...]:
        """Embed the parts of a prompt within the configured budget.

        Args:
            texts: The prompt, or its clauses.
            first: Number of the first part: 0 is the prompt, its clauses follow.

        Returns:
            One vector a text.

        Raises:
            Exception: What the embedder raised, or that it is over its budget.
        """
        embedder = self.embedder
        if embedder is None:
            msg = "no embedder"
            raise CallerError(msg)

        async def vectors() -> tuple[PartVector, ...]:
            matrix = await embedder.embed(texts)
            return tuple(
                PartVector(
                    part=part,
                    vector=vector,
                    embedder=embedder.name,
                    clause=text if part else None,
                )
                for part, (text, vector) in enumerate(zip(texts, matrix, strict=True), first)
            )

        return await self._guarded("embedder", vectors, self.config.similarity.budget_s)

    async def nearest(self, part: PartVector, *, namespace: str) -> Sequence[Neighbour]:
        """Name what lies near one part of a prompt, within the configured budget.

        Args:
            part: The prompt or one of its clauses.
            namespace: Tenant.

        Returns:
            Neighbours, nearest first; those of a clause name it.

        Raises:
            Exception: What the store raised, or that it is over its budget.
        """
        store, config = self.store, self.config.similarity
        if store is None or config.neighbours == 0:
            return ()
        near = await self._guarded(
            "neighbours",
            lambda: store.nearest(
                namespace=namespace,
                embedder=part.embedder,
                vector=part.vector,
                limit=config.neighbours,
            ),
            config.budget_s,
        )
        if part.clause is None:
            return near
        return [dataclasses.replace(neighbour, clause=part.clause) for neighbour in near]

    async def plug_in(self, plugin: Enricher, text: str, *, namespace: str) -> Mapping[str, Any]:
        """Run one enricher of another package within its budget.

        Args:
            plugin: One of `plugins`.
            text: A prompt or an answer.
            namespace: Tenant.

        Returns:
            JSON types: what it found is stored, and must cost no answer its place.

        Raises:
            Exception: What it raised, that it is over its budget, or that JSON cannot hold what it
                returned.
        """

        async def found() -> dict[str, Any]:
            written = msgspec.json.encode(await plugin.enrich(text, namespace=namespace))
            return msgspec.json.decode(written, type=dict[str, Any])

        return await self._guarded(f"plugin:{plugin.name}", found, self._plugin(plugin).budget_s)

    def _plugin(self, plugin: Enricher) -> PluginConfig:
        return self.config.plugins.get(plugin.name, self.config.plugin)

    async def aclose(self) -> None:
        """Stop what the parts run, whichever of them fails at it; idempotent."""
        for part in (self.analyser, self.embedder, *self.plugins):
            if part is not None:
                with contextlib.suppress(Exception):  # the breaker logs it
                    closing = Breaker(f"closing {type(part).__name__}")
                    await closing.call(part.aclose, budget_s=_CLOSE_S)


class EnrichmentRun:
    """The enrichment of one request: tasks with an owner.

    Args:
        enrichers: What to run.
        text: The prompt as people wrote it; None when only the answer is analysed.
        namespace: Tenant.
        tasks: Owner of what runs.
    """

    def __init__(
        self, enrichers: Enrichers, text: str | None, *, namespace: str, tasks: SideTasks
    ) -> None:
        self.findings = Findings()
        self.text = text or ""
        self._enrichers = enrichers
        self._namespace = namespace
        self._side_tasks = tasks
        self._left = False
        loop = asyncio.get_running_loop()
        self._analysed: asyncio.Future[Analysis | None] = loop.create_future()
        self._embedded: asyncio.Future[PartVector | None] = loop.create_future()
        self._tasks: list[asyncio.Task[None]] = []
        if text:
            self._tasks.append(tasks.spawn(self._run(), name="promptmill-enrichment"))

    @property
    def done(self) -> bool:
        """Whether all of it has ended."""
        return all(task.done() for task in self._tasks)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when it has ended or the time is over; never raises what a stage raised.

        Args:
            timeout_s: Seconds; None waits to the end.
        """
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def prompt(self) -> tuple[Analysis | None, PartVector | None]:
        """Wait for the prompt's analysis and vector; None for what failed or is off."""
        return await asyncio.shield(self._analysed), await asyncio.shield(self._embedded)

    def analyse_answer(self, text: str) -> None:
        """Enrich the answer too: by spaCy and by each plug-in, stages like the others.

        Args:
            text: Of the first completion.
        """
        if not text:
            return
        stages = [
            self._stage(f"answer_plugin:{plugin.name}", self._plug_in_answer(plugin, text))
            for plugin in self._enrichers.plugins
        ]
        if self._enrichers.analyser is not None:
            stages.append(self._stage("answer_nlp", self._analyse_answer(text)))
        self._tasks.extend(
            self._side_tasks.spawn(stage, name="promptmill-answer-enrichment") for stage in stages
        )

    def leave(self) -> None:
        """Begin nothing more, since nobody wants it; what has begun ends by itself.

        It is not cancelled: a query cut half-way costs its connection.
        """
        self._left = True

    async def _run(self) -> None:
        enrichers = self._enrichers
        stages = []
        if enrichers.analyser is not None:
            stages.append(self._stage("nlp", self._analyse()))
        if enrichers.embedder is not None and enrichers.store is not None:
            stages.append(self._stage("similarity", self._look_around()))
        stages.extend(
            self._stage(f"plugin:{plugin.name}", self._plug_in(plugin))
            for plugin in enrichers.plugins
        )
        if enrichers.analyser is None:
            _resolve(self._analysed, None)
        try:
            await asyncio.gather(*stages)
        finally:
            # Nobody may wait for what will not come any more.
            _resolve(self._analysed, None)
            _resolve(self._embedded, None)

    async def _stage(self, name: str, work: Awaitable[None]) -> None:
        findings, started = self.findings, time.perf_counter()
        findings.running.add(name)
        try:
            await work
        except Exception as exc:  # noqa: BLE001  an enhancement may fail; it was counted
            findings.errors[name] = f"{type(exc).__name__}: {exc}"
        finally:
            findings.running.discard(name)
            findings.seconds[name] = took_s = time.perf_counter() - started
            self._enrichers.took({name: took_s})

    async def _analyse(self) -> None:
        try:
            self.findings.analysis = await self._enrichers.analyse(self.text)
        finally:
            _resolve(self._analysed, self.findings.analysis)

    async def _analyse_answer(self, text: str) -> None:
        self.findings.answer_analysis = await self._enrichers.analyse(text)

    async def _look_around(self) -> None:
        try:
            (whole,) = await self._enrichers.embed([self.text])
            self.findings.vectors = (whole,)
            _resolve(self._embedded, whole)
        finally:
            _resolve(self._embedded, None)
        if self._left:
            return
        found = await asyncio.gather(self._near([whole]), self._near_clauses())
        best: dict[UUID, Neighbour] = {}
        for near in itertools.chain(*found):
            known = best.get(near.answer_id)
            if known is None or near.similarity > known.similarity:
                best[near.answer_id] = near
        ranked = sorted(best.values(), key=lambda near: -near.similarity)
        self.findings.similar = tuple(ranked[: self._enrichers.config.similarity.neighbours])

    async def _near_clauses(self) -> list[Neighbour]:
        # The clauses come from the analysis; without it the prompt alone is looked up.
        analysis = await asyncio.shield(self._analysed)
        if analysis is None or not analysis.clauses or self._left:
            return []
        parts = await self._enrichers.embed(analysis.clauses, first=1)
        self.findings.vectors += parts
        return await self._near(parts)

    async def _near(self, parts: Sequence[PartVector]) -> list[Neighbour]:
        found = await asyncio.gather(
            *(self._enrichers.nearest(part, namespace=self._namespace) for part in parts)
        )
        return list(itertools.chain(*found))

    async def _plug_in(self, plugin: Enricher) -> None:
        found = await self._enrichers.plug_in(plugin, self.text, namespace=self._namespace)
        self.findings.enrichments[plugin.name] = found

    async def _plug_in_answer(self, plugin: Enricher, text: str) -> None:
        found = await self._enrichers.plug_in(plugin, text, namespace=self._namespace)
        self.findings.answer_enrichments[plugin.name] = found


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)
