"""Everything one worker process holds, made in order and taken down in reverse."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import structlog

from schema import names
from schema.errors import BrokerUnavailableError
from workers import logs, registry
from workers.cancellation import end, heed_cancellation
from workers.channel import ResultChannel
from workers.connection import open_redis
from workers.pauses import short_pauses
from workers.pinning import device_here, let_engine_give_way, spare_cores, worker_name
from workers.queue_marks import oldest_live_message_at, shine
from workers.sending import Sender
from workers.serving import ServedModel, vllm_arguments
from workers.slots import Slots
from workers.store.answers import PostgresAnswers
from workers.store.commit import GroupCommit
from workers.store.database import Database
from workers.store.jobs import JobStore

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.endpoints import Endpoints
    from workers.engine.config import HandlerConfig
    from workers.engine.llm import EnhancedAsyncLLM
    from workers.observation import Observation
    from workers.pipeline import Pipeline
    from workers.recovery import Recovery
    from workers.settings import Settings

_log = structlog.get_logger(__name__)
_ANNOUNCE_S = 2.0
#: Seconds a finished answer waits for its analysis. Whoever submits a job has gone away, and an
#: answer without its analysis is worth less to him than this.
_ENRICHMENT_WAIT_S = 1.0
#: Engine slots over an engine that is not vLLM's.
_SLOTS = 128
#: Jobs that may be claimed at a time while nearly all are repeats, which need no engine.
_SLOTS_FOR_REPEATS = 512


#: Starts an engine and what calls it with OpenAI bodies; their ends go on the stack.
StartEngine = Callable[
    ["Settings", "ServedModel", PostgresAnswers, AsyncExitStack], Awaitable[tuple[Any, Any]]
]


@asynccontextmanager
async def worker_runtime(
    settings: Settings,
    endpoints: Endpoints,
    model: ServedModel,
    *,
    start_engine: StartEngine | None = None,
) -> AsyncIterator[Pipeline]:
    """Start everything a worker needs; yield the pipeline; take everything down again.

    Args:
        settings: Read from the environment and the command line.
        endpoints: Addresses of the servers.
        model: What this worker serves.
        start_engine: Starts something else in vLLM's place.

    Yields:
        A pipeline that takes messages.
    """
    # vLLM takes seconds to import; only a worker pays for it.
    from workers.answering import Answerer
    from workers.hits import HitCounter
    from workers.leases import LeaseKeeper
    from workers.observation import Observation
    from workers.pipeline import Pipeline, Rules
    from workers.publishing import Publisher
    from workers.recall import Recall
    from workers.schema_checker import SchemaChecker
    from workers.tracing import Tracing
    from workers.watchdog import Watchdog

    name = worker_name(model.name)
    async with AsyncExitStack() as stack:
        database = Database(endpoints.database_url or "", pool_size=8)
        stack.push_async_callback(database.aclose)
        redis = open_redis(endpoints.redis_url)
        stack.push_async_callback(redis.aclose)
        # Before the engine, so that vLLM's spans go the same way.
        tracing = Tracing.start(settings)
        stack.push_async_callback(tracing.aclose)
        jobs, channel = JobStore(database), ResultChannel(redis)
        answers = PostgresAnswers(database)
        llm, handlers = await (start_engine or _engine)(settings, model, answers, stack)
        publisher = Publisher(channel, jobs, ttl_s=settings.result_ttl_s)
        stack.push_async_callback(publisher.aclose)
        hits = HitCounter(answers)
        hits.start()
        stack.push_async_callback(hits.aclose)
        commit = await stack.enter_async_context(GroupCommit(jobs))
        leases = LeaseKeeper(jobs, lease_s=settings.lease_s, heartbeat_s=settings.heartbeat_s)
        leases.start()
        stack.push_async_callback(leases.aclose)
        observation = Observation(
            settings,
            redis=redis,
            database=database,
            worker=name,
            model=model.name,
            device=device_here(),
        )
        checker = SchemaChecker()
        stack.push_async_callback(checker.aclose)
        pipeline = Pipeline(
            rules=Rules(
                model=model.name,
                owner=name,
                lease_s=settings.lease_s,
                max_attempts=settings.max_attempts,
                show_prompts=settings.show_prompts,
            ),
            answerer=Answerer(
                llm, handlers, checker=checker, model=model.name, others=model.others
            ),
            jobs=jobs,
            commit=commit,
            publisher=publisher,
            channel=channel,
            leases=leases,
            slots=_slots(settings, llm),
            hits=hits,
            recall=Recall(llm),
            meter=observation.metrics,
            tracing=tracing,
        )
        observation.start(pipeline, llm)
        stack.push_async_callback(observation.aclose)
        recovery = await _helpers(
            stack, settings, database, jobs, redis, endpoints, channel, publisher
        )
        recovery.on_pass = lambda done: observation.metrics.recovered(done.by_action())
        _keep_up(stack, settings, database, redis, answers)
        _listen(stack, redis, llm, leases)
        announcing = _announce(redis, name, model.names, pipeline, observation)
        task = asyncio.create_task(announcing, name="promptmill-announce")
        stack.push_async_callback(end, task)
        watchdog = Watchdog(llm, pipeline, timeout_s=settings.engine_timeout_s)
        watchdog.start()
        stack.push_async_callback(watchdog.aclose)
        stack.enter_context(short_pauses())
        yield pipeline


def _slots(settings: Settings, llm: Any) -> Slots:
    """Return as many slots as the engine runs requests; more would only wait inside it."""
    if settings.max_running is not None:
        return Slots(settings.max_running)
    config = getattr(llm, "vllm_config", None)
    total = _SLOTS if config is None else int(config.scheduler_config.max_num_seqs)
    return Slots(total, most_extra=max(_SLOTS_FOR_REPEATS - total, 0))


async def _engine(
    settings: Settings, model: ServedModel, answers: PostgresAnswers, stack: AsyncExitStack
) -> tuple[EnhancedAsyncLLM, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from workers.engine import EnhancedAsyncLLM, Parts
    from workers.enrich.embedder import MiniLmEmbedder
    from workers.enrich.nlp import SpacyAnalyser
    from workers.handlers import OpenAIHandlers

    logs.adopt_libraries()  # now that they are imported
    args = vllm_arguments(model, otlp_endpoint=settings.otlp_endpoint)
    config = engine_config(settings)
    on = config.features
    analyser = SpacyAnalyser(config.nlp) if on.nlp else None
    embedder = MiniLmEmbedder(config.similarity) if on.similarity else None
    helpers = [part for part in (analyser, embedder) if part is not None]
    for part in helpers:
        stack.push_async_callback(part.aclose)
    make = partial(
        EnhancedAsyncLLM.from_engine_args,
        AsyncEngineArgs.from_cli_args(args),
        handler_config=config,
        parts=Parts(analyser=analyser, embedder=embedder, store=answers),
    )
    # All three load models for many seconds; the engine does it in a thread, as it would block.
    made, *starts = await asyncio.gather(
        asyncio.to_thread(make),
        *(part.start() for part in helpers),
        return_exceptions=True,
    )
    if isinstance(made, BaseException):
        raise made
    llm = cast("EnhancedAsyncLLM", made)
    logs.adopt_libraries()  # vLLM decides anew how its lines look when an engine is made
    stack.push_async_callback(llm.aclose)
    let_engine_give_way()
    cores = spare_cores()
    for part in helpers:
        part.stay_on(cores)
    for failure in starts:
        if isinstance(failure, BaseException):
            # An enhancement: jobs are answered without it, and it is tried again.
            _log.warning("enhancement did not start", reason=str(failure))
    return llm, await OpenAIHandlers.over(llm, args)


def engine_config(settings: Settings) -> HandlerConfig:
    """Return what a worker's engine does beside generating.

    Args:
        settings: Name the file, if there is one.

    Raises:
        ConfigurationError: The file says something that cannot be.
    """
    from workers.engine.config import HandlerConfig

    path = settings.engine_config
    config = HandlerConfig() if path is None else HandlerConfig.from_file(path)
    said = config.model_fields_set
    own: dict[str, Any] = {"require_scope": True}
    if "namespace" not in said:
        own["namespace"] = settings.namespace
    if "enrichment_wait_s" not in said:
        own["enrichment_wait_s"] = _ENRICHMENT_WAIT_S
    return config.model_copy(update=own)


async def _helpers(
    stack: AsyncExitStack,
    settings: Settings,
    database: Database,
    jobs: JobStore,
    redis: Redis,
    endpoints: Endpoints,
    channel: ResultChannel,
    publisher: Any,
) -> Recovery:
    """Start recovery and the dispatcher, which every worker runs and one at a time does."""
    from workers.connection import Connection
    from workers.data_loss import DataLoss
    from workers.dispatch import Dispatcher
    from workers.recovery import Recovery
    from workers.server_clock import ServerClock
    from workers.signals import DoneSignals
    from workers.stranded import Stranded

    connection = Connection(
        endpoints=endpoints,
        redis=redis,
        channel=channel,
        signals=DoneSignals(redis),
        database=database,
        ledger=jobs,
    )
    sender = Sender(connection, settings)
    clock = ServerClock(jobs)

    async def oldest() -> datetime | None:
        return await oldest_live_message_at(redis, await clock.now())

    recovery = Recovery(
        database=database,
        jobs=jobs,
        send=sender.send_again,
        publish=publisher.send,
        oldest_live_message_at=oldest,
        data_loss=DataLoss(redis, jobs, keep_s=settings.result_ttl_s),
        adopt=Stranded(
            redis,
            jobs,
            max_attempts=settings.max_attempts,
            within_s=min(
                filter(None, [settings.retention_s, *settings.namespace_retention_s.values()]),
                default=None,
            ),
        ).adopt,
    )
    recovery.start()
    stack.push_async_callback(recovery.aclose)
    dispatcher = Dispatcher(
        database=database,
        redis=redis,
        send=sender.push,
        weights=settings.namespace_weights,
        window=settings.namespace_window,
    )
    dispatcher.start()
    stack.push_async_callback(dispatcher.aclose)
    return recovery


def _keep_up(
    stack: AsyncExitStack,
    settings: Settings,
    database: Database,
    redis: Redis,
    answers: PostgresAnswers,
) -> None:
    """Start upkeep of what is stored, which every worker runs and one at a time does."""
    from workers.purge import apply_retention
    from workers.upkeep import Upkeep

    upkeep = Upkeep(
        database=database,
        answers=answers,
        answers_limit=settings.answers_limit,
        retain=partial(
            apply_retention,
            database,
            redis,
            keep_s=settings.retention_s,
            namespaces=settings.namespace_retention_s,
        ),
    )
    upkeep.start()
    stack.push_async_callback(upkeep.aclose)


def _listen(stack: AsyncExitStack, redis: Redis, llm: EnhancedAsyncLLM, leases: Any) -> None:
    """Hear of cancelled jobs and of answers to be forgotten."""
    from workers.announcements import Announcements

    def cancel(said: dict[str, Any]) -> None:
        leases.cancel([UUID(job_id) for job_id in said["ids"]], namespace=said["namespace"])

    def forget(said: dict[str, Any]) -> None:
        llm.forget(
            namespace=said["namespace"],
            answer_ids=frozenset(UUID(answer_id) for answer_id in said.get("ids") or ()),
            tag=said.get("tag"),
            model=said.get("model"),
        )

    def forget_all() -> None:
        llm.forget()

    announcements = Announcements(
        redis,
        {names.CANCELLATIONS: cancel, names.INVALIDATIONS: forget},
        # What was invalidated while nobody listened must not be served from memory.
        missed=forget_all,
    )
    announcements.start()
    stack.push_async_callback(announcements.aclose)


async def _announce(
    redis: Redis,
    name: str,
    models: Sequence[str],
    pipeline: Pipeline,
    observation: Observation,
) -> None:
    """Say every few seconds that this worker lives, what it serves and what it holds."""
    started = datetime.now(UTC).isoformat()
    while True:
        heed_cancellation()
        state = {
            "v": names.WIRE_VERSION,
            "models": list(models),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "device": device_here(),
            "started_at": started,
            "oldest_sent_at": pipeline.oldest_sent_at,
            "running": pipeline.running,
            "slots": pipeline.total_slots,
            **await observation.state(),
        }
        try:
            await registry.announce(redis, models)
            await shine(redis, name, state)
        except BrokerUnavailableError as exc:
            _log.warning("waiting for Redis", reason=str(exc))
        await asyncio.sleep(_ANNOUNCE_S)
