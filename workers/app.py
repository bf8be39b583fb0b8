"""The Celery application, and one worker of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from celery import Celery
from kombu import Exchange, Queue

from schema import names
from schema.errors import PromptmillError
from workers import logs, tasks
from workers.pinning import device_here, worker_name
from workers.pool import lifespan
from workers.transport import broker_settings, limit_intake

if TYPE_CHECKING:
    from workers.endpoints import Endpoints
    from workers.pipeline import Pipeline
    from workers.pool import TaskPool
    from workers.runtime import StartEngine
    from workers.serving import ServedModel
    from workers.settings import Settings

#: Recovery does not need redelivery; this only clears what dead workers left in Redis.
_VISIBILITY_TIMEOUT_S = 6 * 3600
#: Messages that a worker may hold where the engine decides how many jobs run.
_MESSAGES = 1024


def make_app(settings: Settings, redis_url: str, *models: str) -> Celery:
    """Return a Celery application whose workers run the jobs of a model and its adapters.

    Args:
        settings: Read from the environment.
        redis_url: Address of the broker.
        models: Served names, one at least; each names a queue.
    """
    app = Celery("promptmill", set_as_current=False)
    queues = [names.queue(model) for model in models]
    broker = broker_settings(redis_url, task_names={names.RUN_JOBS_TASK})
    broker["broker_transport_options"] |= {
        "priority_steps": list(names.PRIORITIES),
        "queue_order_strategy": "round_robin",
        "visibility_timeout": _VISIBILITY_TIMEOUT_S,
        "sep": "\x06\x16",
    }
    app.conf.update(
        **broker,
        worker_pool="workers.pool:TaskPool",
        # Messages in flight; each carries one job or many, and the slots bound the jobs.
        worker_concurrency=settings.max_running or _MESSAGES,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_pool_drain_timeout_s=settings.drain_s,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_acks_late=True,
        task_ignore_result=True,
        task_default_queue=queues[0],
        task_queues=[Queue(queue, Exchange(""), routing_key=queue) for queue in queues],
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
    )
    return app


def run_worker(
    settings: Settings,
    *,
    endpoints: Endpoints,
    model: ServedModel,
    on_ready: Callable[[], None] | None = None,
    start_engine: StartEngine | None = None,
) -> int:
    """Run one worker in this process until it is told to stop.

    Args:
        settings: Read from the environment and the command line.
        endpoints: Addresses of the servers.
        model: What to serve.
        on_ready: Called once jobs are taken.
        start_engine: Starts something else in vLLM's place.

    Returns:
        The process' exit code: 0 after it was told to stop.

    Raises:
        PromptmillError: It did not start, for a reason that needs no traceback.
    """
    from workers.runtime import worker_runtime

    app = make_app(settings, endpoints.redis_url, *model.names)
    current: list[Pipeline] = []
    refused: list[PromptmillError] = []
    tasks.register(app, current)
    _serve(
        app,
        lambda: worker_runtime(settings, endpoints, model, start_engine=start_engine),
        current=current,
        refused=refused,
    )
    if on_ready is not None:
        from celery.signals import worker_ready

        worker_ready.connect(lambda **_: on_ready(), weak=False)
    name = worker_name(model.name)
    logs.configure(level=settings.log_level, form=settings.log_format, worker=name)
    words = ["--quiet", "worker", "--without-gossip", "--without-mingle"]
    words += ["--loglevel", settings.log_level, "--hostname", _hostname(model.name)]
    code = _run(app, words)
    if refused:
        raise refused[0]
    return code


def _serve(
    app: Celery,
    start: Callable[[], AbstractAsyncContextManager[Pipeline]],
    *,
    current: list[Pipeline],
    refused: list[PromptmillError],
) -> None:
    """Let the application's pool start a worker's parts and end them; note what came of it."""

    @lifespan(app)
    @asynccontextmanager
    async def serve(pool: TaskPool) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            try:
                pipeline = await stack.enter_async_context(start())
            except PromptmillError as exc:
                refused.append(exc)
                raise SystemExit(1) from exc  # any other is told at length, by Celery
            current.append(pipeline)
            pipeline.on_hungry = pool.wake
            limit_intake(lambda: pipeline.hungry)
            try:
                yield pipeline
            finally:
                limit_intake(None)
                current.clear()


def _run(app: Celery, words: list[str]) -> int:
    """Run Celery's command; return its exit code, which Celery itself drops."""
    from celery.exceptions import SecurityWarning
    from celery.signals import celeryd_after_setup

    # Of root with pickle, which is not accepted here; it asks for an option that there is not.
    warnings.simplefilter("ignore", SecurityWarning)
    made: list[Any] = []
    celeryd_after_setup.connect(lambda instance, **_: made.append(instance), weak=False)
    try:
        app.worker_main(words)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    return int(made[0].exitcode or 0) if made else 1


def _hostname(model: str) -> str:
    return f"{model.replace('/', '.')}-{device_here()}-{os.getpid()}@%h"
