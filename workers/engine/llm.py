"""`EnhancedAsyncLLM`: vLLM's `AsyncLLM`, never computing the same answer twice.

Real inheritance: `add_request`, `abort`, `collective_rpc` and `shutdown` are overridden, and so are
the constructor and its two factories, which take a `HandlerConfig` more. Everything else is
inherited, `generate` and `encode` included. On a miss `add_request` calls the parent's and wraps
the collector that it returns: vLLM builds its own inside, so wrapping is what keeps n > 1,
streaming input, LoRA, pooling and vLLM's OpenAI handlers whole.
"""

from __future__ import annotations

import functools
import hashlib
import time
import weakref
from collections.abc import AsyncGenerator, Iterable
from typing import Any
from uuid import UUID, uuid4

from vllm import SamplingParams
from vllm.utils.collection_utils import as_list
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from schema.jobs import Provenance, Reuse
from workers.cache.memory import MemoryCache
from workers.engine.breaker import Breaker
from workers.engine.collector import EnhancedRequestOutputCollector
from workers.engine.config import HandlerConfig
from workers.engine.construction import Signature, native_arguments
from workers.engine.decisions import DecisionLog
from workers.engine.delivery import ANSWER_ENRICHMENTS, ANSWER_NLP, RequestDelivery
from workers.engine.durable import DurableTier, replayed
from workers.engine.enrichment import Enrichers, EnrichmentRun
from workers.engine.flight import Flight, NativeSource, Reader, Source
from workers.engine.flights import Flights
from workers.engine.identity import engine_digest
from workers.engine.notes import Reused
from workers.engine.pace import Pace
from workers.engine.parts import Parts, complete, default_parts
from workers.engine.plan import Planner, RequestPlan
from workers.engine.processes import Processes
from workers.engine.protocols import StoredAnswer
from workers.engine.race import Races
from workers.engine.scope import RequestScope, current_scope
from workers.engine.side_tasks import SideTasks
from workers.engine.stats import EngineStats
from workers.engine.verification import EngineVerifier

_SIGNATURE = Signature()
#: Seconds one write of decisions may take.
_RECORD_BUDGET_S = 10.0
#: Seconds that writing what is left may take when the engine is closed.
_LAST_WRITES_S = 5.0


class EnhancedAsyncLLM(AsyncLLM):
    """An `AsyncLLM` with exact reuse, reuse by meaning, coalescing and enrichment.

    Either as vLLM makes its own, by `from_engine_args` and `from_vllm_config`, or short:
    ``EnhancedAsyncLLM(model="…", handler_config=HandlerConfig())``.

    Args:
        *args: Of `AsyncLLM`.
        model: Name or folder of the model, instead of a ``vllm_config``.
        handler_config: What to do beside generating; None is the default configuration.
        parts: Analyser, embedder, store and plug-ins; None makes those that need no server.
        **kwargs: Of `AsyncLLM`; with `model` also those of `AsyncEngineArgs`.
    """

    def __init__(
        self,
        *args: Any,
        model: str | None = None,
        handler_config: HandlerConfig | None = None,
        parts: Parts | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            kwargs = native_arguments(model, kwargs)
        super().__init__(*args, **kwargs)
        self.identity = engine_digest(self.vllm_config)
        self._equip(handler_config or HandlerConfig(), parts)

    @classmethod
    def from_vllm_config(
        cls,
        *args: Any,
        handler_config: HandlerConfig | None = None,
        parts: Parts | None = None,
        **kwargs: Any,
    ) -> EnhancedAsyncLLM:
        """As `AsyncLLM.from_vllm_config`, with our arguments beside vLLM's."""
        # The parent's factory calls ``cls(...)`` with fixed arguments; this adds ours to them.
        make = functools.partial(cls, handler_config=handler_config, parts=parts)
        llm: EnhancedAsyncLLM = AsyncLLM.from_vllm_config.__func__(make, *args, **kwargs)
        return llm

    @classmethod
    def from_engine_args(
        cls,
        *args: Any,
        handler_config: HandlerConfig | None = None,
        parts: Parts | None = None,
        **kwargs: Any,
    ) -> EnhancedAsyncLLM:
        """As `AsyncLLM.from_engine_args`, with our arguments beside vLLM's."""
        make = functools.partial(cls, handler_config=handler_config, parts=parts)
        llm: EnhancedAsyncLLM = AsyncLLM.from_engine_args.__func__(make, *args, **kwargs)
        return llm

    async def add_request(self, *args: Any, **kwargs: Any) -> EnhancedRequestOutputCollector:
        """Add a request, as `AsyncLLM.add_request`, with its signature.

        Returns:
            A collector whose outputs carry metadata.

        Raises:
            EngineDeadError: The engine is gone.
            VLLMValidationError: vLLM cannot take the request.
        """
        if self.errored:
            raise EngineDeadError
        return await self._add_enhanced_request(_SIGNATURE.bind(args, kwargs))

    # Callers, and vLLM's own contract, see the installed version's arguments.
    add_request.__signature__ = _SIGNATURE.signature  # type: ignore[attr-defined]

    async def generate_enhanced(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[Any, None]:
        """Generate, as `generate`; kept for callers of old.

        Args:
            prompt: As for `generate`.
            sampling_params: vLLM's.
            request_id: None makes one.

        Yields:
            `EnhancedRequestOutput`.
        """
        async for output in self.generate(
            prompt, sampling_params, request_id or f"enhanced-{uuid4().hex}"
        ):
            yield output

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Abort requests, as `AsyncLLM.abort`.

        Whoever shares a generation with others only leaves it; the last to leave ends it.

        Args:
            request_id: One or several.
            internal: Whether they are ids of collectors rather than the callers' own.
        """
        native: list[str] = []
        left: list[Flight] = []
        for one in (request_id,) if isinstance(request_id, str) else as_list(request_id):
            readers = self._readers_of(one, internal=internal)
            if not readers:
                native.append(one)
            for reader in readers:
                if reader.flight is not None and not reader.stream.finished:
                    left.append(reader.flight)
                reader.abort()
        for flight in left:
            if not flight.stream.readers:
                await flight.ended()
        if native:
            await super().abort(native, internal)

    async def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call every worker of the engine, as `AsyncLLM.collective_rpc`.

        By it weights are changed while an engine runs, and another model it is then: nothing that
        was answered before is given any more.

        Args:
            method: Of the workers.
            *args: As for the parent.
            **kwargs: As for the parent.
        """
        if "weight" not in str(method):
            return await super().collective_rpc(method, *args, **kwargs)
        self._become_another()
        try:
            return await super().collective_rpc(method, *args, **kwargs)
        finally:
            self._become_another()  # what was answered meanwhile is half of either

    async def aclose(self) -> None:
        """Write what was answered, end every side task, then the engine; idempotent."""
        try:
            await self._flights.aclose()
            await self._side_tasks.aclose()
            # What they found by now goes with the answers that wait for it.
            await self._writes.aclose(wait_s=_LAST_WRITES_S)
            await self.enrichers.aclose()
        finally:
            self.shutdown()

    def shutdown(self, timeout: float | None = None) -> None:
        """Shut the engine down, as `AsyncLLM.shutdown`; side tasks are cancelled.

        Args:
            timeout: Seconds the engine core may take.
        """
        # Also called by the parent's __del__: on objects that were never whole, and on those
        # closed already when the interpreter ends and the parent's module is gone.
        if vars(self).get("_shut_down", False):
            return
        self._shut_down = True
        for name in ("_side_tasks", "_writes"):
            if (tasks := vars(self).get(name)) is not None:
                tasks.cancel()
        super().shutdown(timeout=timeout)

    def stats(self) -> dict[str, Any]:
        """Return one snapshot as JSON types, for metrics and commands.

        Requests, hits by tier and kind, seconds by stage, decisions on reuse, failures by
        enhancement, and memory and processor time of this process and each of its children.
        """
        return self._stats.snapshot(
            processes=self._processes.snapshot(),
            memory=self.memory,
            flights=len(self._flights),
            side_tasks=len(self._side_tasks) + len(self._writes),
            decisions_lost=self._races.log.lost if self._races is not None else 0,
            breakers=[
                self._store_breaker,
                *self.enrichers.breakers.values(),
                *([self._races.breaker] if self._races is not None else []),
            ],
        )

    def recall(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return an answer that the memory tier may give now; it counts as a request served.

        For callers that know a request's fingerprint from an earlier one, and need no collector.

        Args:
            namespace: Tenant.
            fingerprint: Of the request, as in `StoredAnswer.fingerprint`.
        """
        answer = self.memory.get(namespace, fingerprint)
        if answer is not None:
            self._stats.requests += 1
            self._stats.hit("memory", Provenance.EXACT)
            scope = RequestScope(namespace=namespace)
            self._durable.used(answer, scope.under(self._policy(namespace)))
        return answer

    def recalled_metadata(self, answer: StoredAnswer) -> dict[str, Any]:
        """Return the metadata of an output that gives a recalled answer.

        Args:
            answer: From `recall`.
        """
        delivery = RequestDelivery(
            request_id="",
            scope=RequestScope(namespace=answer.namespace),
            wait_s=0.0,
            disabled=self.enrichers.disabled,
            reused=Reused(answer=answer, provenance=Provenance.EXACT, tier="memory"),
        )
        return delivery.metadata(final=True)

    def forget(
        self,
        *,
        namespace: str | None = None,
        answer_ids: frozenset[UUID] = frozenset(),
        tag: str | None = None,
        model: str | None = None,
    ) -> int:
        """Drop answers from the memory tier; see `MemoryCache.forget`."""
        return self.memory.forget(namespace=namespace, answer_ids=answer_ids, tag=tag, model=model)

    def _become_another(self) -> None:
        self.identity = hashlib.sha256(self.identity + uuid4().bytes).digest()
        self._planner.engine = self._flights.engine = self.identity
        self.memory.forget()

    def _equip(self, config: HandlerConfig, parts: Parts | None) -> None:
        """Make all that works beside the engine."""
        self._shut_down = False
        self.handler_config = config
        self._policy = functools.lru_cache(maxsize=1024)(config.policy)
        self.parts = parts = complete(default_parts(config) if parts is None else parts, config)
        self._stats = EngineStats()
        self.enrichers = Enrichers(
            config,
            took=self._stats.took,
            analyser=parts.analyser,
            embedder=parts.embedder,
            store=parts.store,
            plugins=parts.plugins or (),
            missing=parts.missing,
        )
        self.memory = MemoryCache(
            entries=config.cache.memory_entries,
            max_bytes=config.cache.memory_bytes,
            ttl_s=config.cache.memory_ttl_s,
        )
        self._planner = Planner(self, engine=self.identity, features=config.features)
        self._processes = Processes()
        self._side_tasks, self._writes = SideTasks(), SideTasks()
        self._pace = Pace()
        self._store_breaker = Breaker("store")
        self._readers: weakref.WeakValueDictionary[str, Reader] = weakref.WeakValueDictionary()
        self._durable = DurableTier(
            store=parts.store,
            wait_s=config.cache.flight_wait_s,
            memory=self.memory,
            breaker=self._store_breaker,
            stats=self._stats,
            tasks=self._writes,
        )
        self._flights = Flights(
            config=config,
            enrichers=self.enrichers,
            memory=self.memory,
            durable=self._durable,
            stats=self._stats,
            tasks=self._side_tasks,
            writes=self._writes,
            pace=self._pace,
            engine=self.identity,
            model=str(self.model_config.served_model_name),
            add=super().add_request,
            abort=super().abort,
        )
        self._races = self._make_races()

    def _make_races(self) -> Races | None:
        if self.parts.reuser is None:
            return None
        log = DecisionLog(
            store=self.parts.store,
            breaker=self._store_breaker,
            budget_s=_RECORD_BUDGET_S,
            tasks=self._writes,
        )
        return Races(
            reuser=self.parts.reuser,
            enrichers=self.enrichers,
            stats=self._stats,
            log=log,
            tasks=self._side_tasks,
            seat=self._seat,
            used=self._durable.used,
            verify=EngineVerifier(
                add=super().add_request, abort=super().abort, tokenizer=self.get_tokenizer
            ).same,
        )

    async def _add_enhanced_request(self, call: dict[str, Any]) -> EnhancedRequestOutputCollector:
        started = time.perf_counter()
        await self._pace.turn()
        config, scope = self.handler_config, current_scope()
        if scope is None and not config.require_scope:
            scope = RequestScope(namespace=config.namespace)
        if scope is not None:
            scope = scope.under(self._policy(scope.namespace))
            if scope.trace_headers and not call.get("trace_headers"):
                # vLLM's OpenAI handlers take them from an HTTP request, and there is none.
                call["trace_headers"] = scope.trace_headers
        planned = await self._planner.plan(call, scope=scope)
        delivery = RequestDelivery(
            request_id=call["request_id"],
            scope=scope or RequestScope(),
            wait_s=config.enrichment_wait_s,
            disabled=self.enrichers.disabled,
            not_reusable=planned.not_reusable,
            on_arrival=self._final_has_arrived,
            on_final=self._flights.final_is_handed_out,
            started=started,
        )
        self._stats.requests += 1
        if planned.key is None:
            return await self._pass_through(planned, delivery)
        source = self._from_memory(planned, delivery) or self._flights.board(planned, delivery)
        delivery.internal_id = f"{delivery.request_id}-{uuid4().hex[:8]}"
        self._seat(delivery, source)
        if (flight := delivery.flight) is not None:
            try:
                await flight.ready()
            except BaseException:
                source.close()
                raise
            if delivery.scope.reuse == Reuse.SEMANTIC and self._races is not None:
                if (why := planned.not_comparable) is not None:
                    delivery.disabled = {**delivery.disabled, "semantic": why}
                else:
                    self._races.start(planned, delivery, flight)
        return self._collector(planned, source, delivery)

    def _collector(
        self, planned: RequestPlan, source: Source, delivery: RequestDelivery
    ) -> EnhancedRequestOutputCollector:
        return EnhancedRequestOutputCollector(
            request_id=delivery.internal_id,
            output_kind=planned.params.output_kind,
            source=source,
            delivery=delivery,
            abort=functools.partial(self.abort, internal=True),
        )

    async def _pass_through(
        self, planned: RequestPlan, delivery: RequestDelivery
    ) -> EnhancedRequestOutputCollector:
        """Read vLLM's own collector: for what cannot be reused, and so not shared either."""
        parent = await super().add_request(**planned.call)
        delivery.internal_id = parent.request_id
        delivery.enrichment = self._flights.enrich(planned, delivery.scope)
        source = NativeSource(parent)
        delivery.spoken = source.text
        return self._collector(planned, source, delivery)

    def _from_memory(self, planned: RequestPlan, delivery: RequestDelivery) -> Reader | None:
        """Return a reader of a stored answer, if the memory tier has it."""
        answer = self.memory.get(delivery.scope.namespace, planned.key or b"")
        if answer is None:
            return None
        delivery.reused = Reused(answer=answer, provenance=Provenance.EXACT, tier="memory")
        self._stats.hit("memory", Provenance.EXACT)
        self._durable.used(answer, delivery.scope)
        return Reader(
            replayed(answer, planned),
            request_id=delivery.request_id,
            kind=planned.params.output_kind,
        )

    def _seat(self, delivery: RequestDelivery, reader: Reader) -> None:
        """Let `abort` find a request's reader."""
        self._readers[delivery.internal_id] = reader

    def _readers_of(self, request_id: str, *, internal: bool) -> list[Reader]:
        if internal:
            reader = self._readers.get(request_id)
            return [] if reader is None else [reader]
        return [
            reader for reader in list(self._readers.values()) if reader.request_id == request_id
        ]

    def _final_has_arrived(self, delivery: RequestDelivery) -> None:
        """Enrich an answer where that was asked for and its flight does not do it."""
        if not delivery.scope.analyse_answer:
            return
        reused = delivery.source_of_reuse
        if reused is not None:
            known = reused.answer.enrichments.keys() & {ANSWER_NLP, ANSWER_ENRICHMENTS}
            completions = () if known else reused.answer.completions
            text = completions[0].text if completions else ""
        else:
            text = delivery.spoken() if delivery.spoken is not None else ""
        if text:
            run = delivery.enrichment or EnrichmentRun(
                self.enrichers,
                None,
                namespace=delivery.scope.namespace,
                tasks=self._side_tasks,
            )
            run.analyse_answer(text)
            delivery.enrichment = run
