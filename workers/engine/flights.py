"""`Flights`: the generations under way, how one starts, and what is kept of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from uuid import uuid4

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from workers.cache.memory import MemoryCache
from workers.engine.config import HandlerConfig
from workers.engine.delivery import ANSWER_ENRICHMENTS, ANSWER_NLP, RequestDelivery
from workers.engine.durable import DurableTier
from workers.engine.enrichment import Enrichers, EnrichmentRun
from workers.engine.flight import Flight, Reader
from workers.engine.notes import FlightNotes
from workers.engine.pace import Pace
from workers.engine.plan import RequestPlan
from workers.engine.protocols import StoredAnswer
from workers.engine.replay import NotStorableError, with_outputs
from workers.engine.scope import RequestScope
from workers.engine.side_tasks import SideTasks
from workers.engine.stats import EngineStats


class Flights:
    """Starts generations, lets requests join them, and keeps what they answer.

    Args:
        config: What is switched on, and how long answers live.
        enrichers: What runs beside a generation.
        memory: The first tier.
        durable: The tier behind it.
        stats: Counts.
        tasks: Owner of what runs beside a generation.
        writes: Owner of what is written after it.
        pace: Of what starts or ends at the same moment.
        engine: Digest of the engine's identity.
        model: Name under which the model is served.
        add: `AsyncLLM.add_request`.
        abort: `AsyncLLM.abort`.
    """

    def __init__(
        self,
        *,
        config: HandlerConfig,
        enrichers: Enrichers,
        memory: MemoryCache,
        durable: DurableTier,
        stats: EngineStats,
        tasks: SideTasks,
        writes: SideTasks,
        pace: Pace,
        engine: bytes,
        model: str,
        add: Callable[..., Awaitable[RequestOutputCollector]],
        abort: Callable[..., Awaitable[None]],
    ) -> None:
        self._config = config
        self._enrichers = enrichers
        self._memory = memory
        self._durable = durable
        self._stats = stats
        self._tasks = tasks
        self._writes = writes
        self._pace = pace
        self.engine = engine
        self._model = model
        self._add = add
        self._abort = abort
        self._by_name: dict[tuple[str, bytes, bool], Flight] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def board(self, planned: RequestPlan, delivery: RequestDelivery) -> Reader:
        """Join a flight that is under way, or start one.

        Args:
            planned: The request; one with a key.
            delivery: Its delivery; told which flight it is.
        """
        scope = delivery.scope
        flight = self._joinable(planned, scope)
        if flight is None:
            flight = self._take_off(planned, scope)
        else:
            delivery.coalesced = True
            self._stats.coalesced += 1
            _hurry(flight.notes.call, planned.call.get("priority") or 0)
        delivery.flight = flight
        flight.notes.engine_stores |= not scope.deferred
        flight.notes.analyse_answer |= scope.analyse_answer
        flight.notes.tags.update(dict.fromkeys(scope.tags))
        reader = flight.join(delivery.request_id, planned.params.output_kind)
        reader.flight = flight
        return reader

    def final_is_handed_out(self, delivery: RequestDelivery) -> None:
        """Complete the answer with what was found by now; what comes later reaches the store.

        Args:
            delivery: Of the final output.
        """
        self._stats.took({"total": time.perf_counter() - delivery.started})
        if (engine_s := delivery.passed_through) is not None:
            delivery.seconds["generate"] = engine_s
            self._stats.generated += 1
            self._stats.took({"generate": engine_s})
        notes = delivery.flight.notes if delivery.flight is not None else None
        if notes is None or notes.answer is None:
            return
        self._memory.complete(_complete(notes))
        if notes.enrichment is not None and not notes.enrichment.done:
            notes.late = True

    async def aclose(self) -> None:
        """End every flight; those who read are told that the engine is gone."""
        for flight in list(self._by_name.values()):
            flight.cancel()
            await flight.ended()

    def _joinable(self, planned: RequestPlan, scope: RequestScope) -> Flight | None:
        if not self._config.features.coalesce:
            return None
        # A reader that streams needs deltas; one that does not can read any flight.
        for streams in (True,) if planned.streams else (False, True):
            name = (scope.namespace, planned.key or b"", streams)
            if (flight := self._by_name.get(name)) is not None:
                return flight
        return None

    def _take_off(self, planned: RequestPlan, scope: RequestScope) -> Flight:
        params = planned.params.clone()
        if isinstance(params, SamplingParams):
            params.output_kind = (
                RequestOutputKind.DELTA if planned.streams else RequestOutputKind.FINAL_ONLY
            )
        # An id of its own: aborting the leader's must not reach the others' generation.
        flight_id = f"{planned.call['request_id']}~{uuid4().hex[:6]}"
        call = {**planned.call, "request_id": flight_id, "params": params}
        name = (scope.namespace, planned.key or b"", planned.streams)
        started = time.perf_counter()

        async def start() -> RequestOutputCollector:
            native = await self._add(**call)
            # Not before: in a burst, enrichment would hold up the generations of the others.
            if flight.stream.readers:
                flight.notes.enrichment = self.enrich(planned, scope)
            flight.notes.under_way.set()
            return native

        def gone(ended: Flight) -> None:
            if self._by_name.get(name) is ended:
                del self._by_name[name]
            ended.notes.under_way.set()
            if ended.notes.answer is None:
                if ended.notes.enrichment is not None:
                    ended.notes.enrichment.leave()
                self._durable.unmark(ended.notes, planned, scope)

        flight = Flight(
            look_up=lambda stream: self._durable.look_up(stream, planned, scope, flight.notes),
            start=start,
            abort=lambda native_id: self._abort(native_id, internal=True),
            turn=self._pace.turn,
            landed=lambda ended: self._landed(ended, planned, scope, started),
            gone=gone,
            streams=planned.streams,
        )
        flight.notes.call = call
        self._by_name[name] = flight
        return flight

    def enrich(self, planned: RequestPlan, scope: RequestScope) -> EnrichmentRun | None:
        """Start the enrichment of a request's prompt; None when there is nothing to do.

        Args:
            planned: The request.
            scope: Its scope.
        """
        text = planned.asked
        if not text or not self._enrichers.active:
            return None
        return EnrichmentRun(self._enrichers, text, namespace=scope.namespace, tasks=self._tasks)

    def _landed(
        self, flight: Flight, planned: RequestPlan, scope: RequestScope, started: float
    ) -> None:
        """Keep what was generated, before anybody is told that it is finished."""
        if flight.replayed:
            return
        notes = flight.notes
        notes.seconds["generate"] = engine_s = time.perf_counter() - started
        self._stats.generated += 1
        self._stats.took({"generate": engine_s})
        if planned.engine != self.engine:
            notes.not_storable = "not stored: the weights changed while it was generated"
            return
        try:
            answer = with_outputs(
                self._unanswered(planned, scope, notes.tags, engine_s), flight.stream
            )
        except NotStorableError as exc:
            notes.not_storable = f"not stored: {exc}"
            return
        notes.answer = answer
        if notes.analyse_answer and answer.completions:
            notes.enrichment = notes.enrichment or EnrichmentRun(
                self._enrichers, None, namespace=scope.namespace, tasks=self._tasks
            )
            notes.enrichment.analyse_answer(answer.completions[0].text)
        self._memory.put(answer)
        notes.forgettings = self._memory.forgettings
        self._writes.spawn(self._keep(notes, planned, scope), name="promptmill-keep")

    def _unanswered(
        self, planned: RequestPlan, scope: RequestScope, tags: Iterable[str], engine_s: float
    ) -> StoredAnswer:
        ttl_s, now = scope.ttl_s, time.time()
        adapter = planned.call.get("lora_request")
        return StoredAnswer(
            id=uuid4(),
            namespace=scope.namespace,
            fingerprint=planned.key or b"",
            engine=self.engine,
            # As jobs ask for it, so that its answers are forgotten by that name.
            model=self._model if adapter is None else adapter.lora_name,
            scope=planned.scope_digest,
            prompt=planned.asked,
            prompt_tokens=len(planned.prompt_token_ids),
            engine_s=engine_s,
            tags=tuple(tags),
            created_at=now,
            expires_at=now + ttl_s if ttl_s is not None else None,
        )

    async def _keep(self, notes: FlightNotes, planned: RequestPlan, scope: RequestScope) -> None:
        """Complete the answer once enrichment has ended, and store it unless somebody else does."""
        if notes.enrichment is not None:
            await notes.enrichment.wait()
            self._memory.complete(_complete(notes))
        if not (notes.engine_stores or await scope.accepted()):
            self._durable.unmark(notes, planned, scope)  # nobody waits for what will not come
        elif notes.engine_stores or notes.late:
            await self._durable.keep(notes, planned, scope)


def _hurry(call: dict[str, Any], priority: int) -> None:
    """Give a flight its most urgent reader's priority, as long as vLLM has not been asked.

    After that there is no way to change it: vLLM takes a priority with the request alone.
    """
    if priority < (call.get("priority") or 0):
        call["priority"] = priority


def _complete(notes: FlightNotes) -> StoredAnswer:
    """Add what was found by now to the answer of a flight that has one."""
    answer, run = notes.answer, notes.enrichment
    if answer is None:
        msg = "the flight has no answer"
        raise AssertionError(msg)
    if run is not None:
        findings = run.findings
        enrichments = dict(findings.enrichments)
        if findings.answer_analysis is not None:
            enrichments[ANSWER_NLP] = findings.answer_analysis.public()
        if findings.answer_enrichments:
            enrichments[ANSWER_ENRICHMENTS] = dict(findings.answer_enrichments)
        answer = notes.answer = dataclasses.replace(
            answer,
            analysis=findings.analysis,
            similar=findings.similar,
            enrichments=enrichments,
            vectors=findings.vectors,
        )
    return answer
