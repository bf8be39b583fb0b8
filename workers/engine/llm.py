"""`EnhancedAsyncLLM`: vLLM's `AsyncLLM`, never computing the same answer twice.

Real inheritance: `add_request`, `abort` and `shutdown` are overridden, and so are the constructor
and its two factories, which take a `HandlerConfig` more. Everything else is inherited, `generate`
and `encode` included. On a miss `add_request` calls the parent's and wraps the collector that it
returns: vLLM builds its own inside, so wrapping is what keeps n > 1, streaming input, LoRA, pooling
and vLLM's OpenAI handlers whole.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any
from uuid import UUID, uuid4

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.collection_utils import as_list
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from schema.jobs import Provenance
from workers.cache.memory import MemoryCache
from workers.engine.breaker import Breaker
from workers.engine.collector import EnhancedRequestOutputCollector
from workers.engine.config import HandlerConfig
from workers.engine.delivery import RequestDelivery, Reused
from workers.engine.enrichment import Enrichers, EnrichmentRun, Findings
from workers.engine.flight import Flight, NativeSource, Reader, Source, Stream
from workers.engine.identity import engine_digest
from workers.engine.parts import Parts, default_parts
from workers.engine.plan import RequestPlan, plan
from workers.engine.protocols import StoredAnswer
from workers.engine.replay import NotStorableError, pack, pack_pooled, replay, replay_pooled
from workers.engine.scope import RequestScope, current_scope
from workers.engine.stats import EngineStats

_SIGNATURE = inspect.signature(AsyncLLM.add_request)
_INIT_PARAMETERS = frozenset(inspect.signature(AsyncLLM.__init__).parameters) - {"self"}
#: Seconds the store may take to look up one answer before generation starts without it.
_LOOK_UP_BUDGET_S = 1.0


class EnhancedAsyncLLM(AsyncLLM):
    """An `AsyncLLM` with exact reuse, coalescing and enrichment.

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
            kwargs = _native_arguments(model, kwargs)
        super().__init__(*args, **kwargs)
        self.handler_config = config = handler_config or HandlerConfig()
        self.identity = engine_digest(self.vllm_config)
        self.parts = parts if parts is not None else default_parts(config)
        self.enrichers = Enrichers(
            config,
            analyser=self.parts.analyser,
            embedder=self.parts.embedder,
            store=self.parts.store,
            plugins=self.parts.plugins,
        )
        self.memory = MemoryCache(
            entries=config.cache.memory_entries,
            max_bytes=config.cache.memory_bytes,
            ttl_s=config.cache.memory_ttl_s,
        )
        self._store_breaker = Breaker("store")
        self._stats = EngineStats()
        self._flights: dict[tuple[str, bytes, bool], Flight] = {}
        self._readers: weakref.WeakValueDictionary[str, Reader] = weakref.WeakValueDictionary()
        self._side_tasks: set[asyncio.Task[Any]] = set()

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
        call = dict(_SIGNATURE.bind(self, *args, **kwargs).arguments)
        del call["self"]
        return await self._add_enhanced_request(call)

    # Callers, and vLLM's own contract, see the installed version's arguments.
    add_request.__signature__ = _SIGNATURE  # type: ignore[attr-defined]

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
        abandoned: list[Flight] = []
        for one in (request_id,) if isinstance(request_id, str) else as_list(request_id):
            readers = [
                reader
                for key, reader in list(self._readers.items())
                if one == (key if internal else reader.request_id)
            ]
            for reader in readers:
                if (flight := reader.flight) is not None and not reader.stream.finished:
                    abandoned.append(flight)
                reader.abort()
            if not readers:
                native.append(one)
        for flight in abandoned:
            if not flight.stream.readers:
                await flight.ended()
        if native:
            await super().abort(native, internal)

    async def aclose(self) -> None:
        """End every side task, then the engine; idempotent."""
        for flight in list(self._flights.values()):
            flight.cancel()
            await flight.ended()
        for task in list(self._side_tasks):
            task.cancel()
        await asyncio.gather(*self._side_tasks, return_exceptions=True)
        await self.enrichers.aclose()
        self.shutdown()

    def shutdown(self, timeout: float | None = None) -> None:
        """Shut the engine down, as `AsyncLLM.shutdown`; side tasks are cancelled.

        Args:
            timeout: Seconds the engine core may take.
        """
        # Also called by the parent's __del__, on objects that were never whole.
        for task in list(getattr(self, "_side_tasks", ())):
            loop = task.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
        super().shutdown(timeout=timeout)

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes, as JSON types: requests, hits by tier, failures, memory."""
        return self._stats.snapshot(
            memory=self.memory,
            flights=len(self._flights),
            breakers=[self._store_breaker, *self.enrichers.breakers.values()],
        )

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

    async def _add_enhanced_request(self, call: dict[str, Any]) -> EnhancedRequestOutputCollector:
        config, scope = self.handler_config, current_scope()
        if scope is None and not config.require_scope:
            scope = RequestScope(namespace=config.namespace, reuse=config.cache.reuse)
        started = time.perf_counter()
        planned = await plan(
            self, call, scope=scope, engine=self.identity, features=config.features
        )
        delivery = RequestDelivery(
            request_id=call["request_id"],
            scope=scope or RequestScope(),
            wait_s=config.enrichment_wait_s,
            disabled=self.enrichers.disabled,
            not_reusable=planned.not_reusable,
            on_final=self._final_is_handed_out,
            started=started,
        )
        self._stats.requests += 1
        if planned.key is None:
            return await self._pass_through(planned, delivery)
        source = self._from_memory(planned, delivery)
        if source is None:
            source = self._board(planned, delivery)
        internal_id = f"{delivery.request_id}-{uuid4().hex[:8]}"
        self._readers[internal_id] = source
        if delivery.flight is not None:
            try:
                await delivery.flight.ready()
            except BaseException:
                source.close()
                raise
        return self._collector(internal_id, planned, source, delivery)

    def _collector(
        self, internal_id: str, planned: RequestPlan, source: Source, delivery: RequestDelivery
    ) -> EnhancedRequestOutputCollector:
        return EnhancedRequestOutputCollector(
            request_id=internal_id,
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
        delivery.enrichment = self._enrich(planned, delivery.scope)
        delivery.owns_enrichment = True
        return self._collector(parent.request_id, planned, NativeSource(parent), delivery)

    def _from_memory(self, planned: RequestPlan, delivery: RequestDelivery) -> Reader | None:
        """Return a reader of a stored answer, if the memory tier has it."""
        answer = self.memory.get(delivery.scope.namespace, planned.key or b"")
        if answer is None:
            return None
        delivery.reused = Reused(answer=answer, provenance=Provenance.EXACT, tier="memory")
        self._stats.hit("memory", Provenance.EXACT)
        stream = _stream_of(answer, planned)
        return Reader(stream, request_id=delivery.request_id, kind=planned.params.output_kind)

    def _board(self, planned: RequestPlan, delivery: RequestDelivery) -> Reader:
        """Join a flight that is under way, or start one."""
        scope, key = delivery.scope, planned.key or b""
        # A reader that streams needs deltas; one that does not can read any flight.
        wanted = (True,) if planned.streams else (False, True)
        flight = None
        if self.handler_config.features.coalesce:
            flight = next(
                (
                    found
                    for streams in wanted
                    if (found := self._flights.get((scope.namespace, key, streams))) is not None
                ),
                None,
            )
        delivery.coalesced = flight is not None
        if flight is None:
            flight = self._take_off(planned, scope)
        else:
            self._stats.coalesced += 1
        delivery.flight = flight
        if not scope.deferred:
            flight.notes["engine_stores"] = True
        reader = flight.join(delivery.request_id, planned.params.output_kind)
        reader.flight = flight
        return reader

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
        native_add, native_abort = super().add_request, super().abort

        async def look_up(stream: Stream) -> bool:
            found = await self._look_up(stream, planned, scope, flight)
            if not found:
                flight.notes["enrichment"] = self._enrich(planned, scope)
            return found

        def gone(ended: Flight) -> None:
            if self._flights.get(name) is ended:
                del self._flights[name]
            run = ended.notes.get("enrichment")
            if run is not None and "answer" not in ended.notes:
                run.cancel()

        flight = Flight(
            look_up=look_up,
            start=lambda: native_add(**call),
            abort=lambda native_id: native_abort(native_id, internal=True),
            landed=lambda ended: self._landed(ended, planned, scope, started),
            gone=gone,
            streams=planned.streams,
        )
        flight.notes |= {"seconds": {}, "errors": {}}
        self._flights[name] = flight
        return flight

    async def _look_up(
        self, stream: Stream, planned: RequestPlan, scope: RequestScope, flight: Flight
    ) -> bool:
        """Fill the stream from the store, if it has the answer."""
        store = self.parts.store
        if store is None:
            return False
        started = time.perf_counter()
        try:
            answer = await self._store_breaker.call(
                lambda: store.get(scope.namespace, planned.key or b""), budget_s=_LOOK_UP_BUDGET_S
            )
        except Exception as exc:  # noqa: BLE001  without the store, vLLM answers; it was counted
            flight.notes["errors"]["store"] = f"{type(exc).__name__}: {exc}"
            return False
        flight.notes["seconds"]["look_up"] = time.perf_counter() - started
        if answer is None:
            return False
        self.memory.put(answer)
        self._stats.hit("store", Provenance.EXACT)
        flight.notes["reused"] = Reused(answer=answer, provenance=Provenance.EXACT, tier="store")
        filled = _stream_of(answer, planned)
        stream.transcript, stream.pooled = filled.transcript, filled.pooled
        return True

    def _enrich(self, planned: RequestPlan, scope: RequestScope) -> EnrichmentRun | None:
        text = scope.text or planned.text
        if not text or not self.enrichers.active:
            return None
        return EnrichmentRun(self.enrichers, text, namespace=scope.namespace)

    def _landed(
        self, flight: Flight, planned: RequestPlan, scope: RequestScope, started: float
    ) -> None:
        """Keep what was generated, before anybody is told that it is finished."""
        if flight.replayed:
            return
        flight.notes["seconds"]["generate"] = engine_s = time.perf_counter() - started
        self._stats.generated += 1
        ttl_s = scope.ttl_s or self.handler_config.cache.ttl_s
        now = time.time()
        answer = StoredAnswer(
            id=uuid4(),
            namespace=scope.namespace,
            fingerprint=planned.key or b"",
            engine=self.identity,
            model=str(self.model_config.served_model_name),
            scope=planned.scope_digest,
            prompt=scope.text or planned.text,
            prompt_tokens=len(planned.prompt_token_ids),
            engine_s=engine_s,
            tags=scope.tags,
            created_at=now,
            expires_at=now + ttl_s if ttl_s else None,
        )
        try:
            answer = _with_outputs(answer, flight.stream)
        except NotStorableError as exc:
            flight.notes["not_storable"] = f"not stored: {exc}"
            return
        flight.notes["answer"] = answer
        self.memory.put(answer)
        self._spawn(self._keep(flight), name="promptmill-keep")

    async def _keep(self, flight: Flight) -> None:
        """Complete the answer once enrichment has ended, and store it unless somebody else does."""
        run: EnrichmentRun | None = flight.notes.get("enrichment")
        if run is not None:
            await run.wait()
            self._add_findings(flight)
            self.memory.put(flight.notes["answer"])
        store = self.parts.store
        if store is None or not (flight.notes.get("engine_stores") or flight.notes.get("late")):
            return
        try:
            await self._store_breaker.call(
                lambda: store.put(flight.notes["answer"]),
                budget_s=self.handler_config.similarity.budget_s,
            )
        except Exception as exc:  # noqa: BLE001  the answer was given; it was counted and logged
            flight.notes["errors"]["store"] = f"{type(exc).__name__}: {exc}"

    def _final_is_handed_out(self, delivery: RequestDelivery) -> None:
        flight = delivery.flight
        if flight is None or "answer" not in flight.notes:
            return
        self._add_findings(flight)
        run: EnrichmentRun | None = flight.notes.get("enrichment")
        if run is not None and not run.done:
            # What comes later reaches the store only.
            flight.notes["late"] = True

    @staticmethod
    def _add_findings(flight: Flight) -> None:
        run: EnrichmentRun | None = flight.notes.get("enrichment")
        findings = run.findings if run is not None else Findings()
        flight.notes["answer"] = dataclasses.replace(
            flight.notes["answer"],
            analysis=findings.analysis,
            similar=findings.similar,
            enrichments=dict(findings.enrichments),
            vectors=findings.vectors,
        )

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)


def _native_arguments(model: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn the short form's arguments into those of `AsyncLLM`."""
    own = {name: value for name, value in kwargs.items() if name in _INIT_PARAMETERS}
    rest = {name: value for name, value in kwargs.items() if name not in _INIT_PARAMETERS}
    engine_args = AsyncEngineArgs(model=model, **rest)
    context = own.setdefault("usage_context", UsageContext.ENGINE_CONTEXT)
    config = engine_args.create_engine_config(context)
    own.setdefault("vllm_config", config)
    own.setdefault("executor_class", Executor.get_class(config))
    own.setdefault("log_stats", not engine_args.disable_log_stats)
    own.setdefault("log_requests", engine_args.enable_log_requests)
    return own


def _stream_of(answer: StoredAnswer, planned: RequestPlan) -> Stream:
    """Return a finished stream that replays an answer for this request."""
    stream = Stream()
    if answer.kind == "pooling":
        stream.pooled = replay_pooled(
            answer,
            request_id=planned.call["request_id"],
            prompt_token_ids=planned.prompt_token_ids,
        )
    else:
        stream.transcript = replay(
            answer,
            prompt=planned.text,
            prompt_token_ids=planned.prompt_token_ids,
            lora_request=planned.call.get("lora_request"),
        )
    return stream


def _with_outputs(answer: StoredAnswer, stream: Stream) -> StoredAnswer:
    """Add what was generated to the answer, or raise `NotStorableError`."""
    if stream.pooled is not None:
        pooled, dtype = pack_pooled(stream.pooled)
        return dataclasses.replace(answer, kind="pooling", pooled=pooled, pooled_dtype=dtype)
    completions, prompt_logprobs = pack(stream.transcript)
    return dataclasses.replace(
        answer,
        completions=completions,
        prompt_logprobs=prompt_logprobs,
        completion_tokens=sum(len(completion.token_ids) for completion in completions),
    )
