"""What a worker exports, asked over HTTP; its engine is played, its servers are real."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import orjson
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from schema import names
from schema.wire import JobMessage
from tests.integration.builders import admit, spec
from tests.stand_ins import final_output
from workers import series
from workers.backlog import Backlog, SharedBacklog
from workers.connection import open_redis
from workers.endpoints import Endpoints
from workers.metrics_server import MetricsServer
from workers.pipeline import Pipeline
from workers.queue_marks import living_workers, shine
from workers.runtime import worker_runtime
from workers.serving import ServedModel
from workers.settings import load_settings
from workers.store.backlog import LiveCounts, LiveJobs
from workers.store.database import Database
from workers.store.jobs import JobStore

MODEL = f"m{uuid4().hex}"
STATS = {
    "requests": 7,
    "generated": 3,
    "coalesced": 1,
    "hits": {"exact/memory": 2, "semantic/store": 1},
    "decisions": {"served": 1, "numbers": 4},
    "stages": {"nlp": {"times": 2, "seconds": 0.5, "classes": [0, 0, 1, *[0] * 10, 1]}},
    "flights": 5,
    "side_tasks": 6,
    "memory": {"entries": 8, "bytes": 900},
    "failures": {"nlp": 1},
    "left_alone": {"nlp": 2},
}


class PlayedEngine:
    """As much of the engine as a worker touches; what it does follows from the prompt."""

    errored = False

    async def generate(self, prompt: str, _params: Any, request_id: str) -> AsyncIterator[Any]:
        """Answer, refuse, fail, or hang."""
        from workers.answering import TryAgainError

        if prompt == "refuse":
            raise ValueError("no")
        if prompt == "fail":
            from schema.jobs import JobError

            raise TryAgainError(JobError(type="Failed", message="for once"))
        if prompt == "hang":
            await asyncio.Event().wait()
        yield final_output(
            prompt,
            request_id,
            "A field.",
            token_ids=(1, 2, 3),
            metadata={"provenance": "exact"},
            stored=True,
        )

    def stats(self) -> dict[str, Any]:
        """Some of everything."""
        return STATS

    def forget(self, **_of: Any) -> int:
        """Nothing is remembered."""
        return 0


class Scrape:
    """What a worker answered, by series and labels."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = frozenset(sample.labels.items())
                self.values.setdefault(sample.name, {})[labels] = sample.value

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get(name, {}).get(frozenset(labels.items()))


@pytest.fixture(autouse=True)
def _melt() -> Iterator[None]:
    """A worker freezes what it has loaded; the tests go on."""
    yield
    gc.unfreeze()


@pytest.fixture
async def redis(own_redis_url: str) -> AsyncIterator[Redis]:
    redis = open_redis(own_redis_url)
    yield redis
    await redis.aclose()


@pytest.fixture
async def workers(own_redis_url: str, database_url: str, redis: Redis) -> AsyncIterator[Any]:
    """Starts workers, and ends them."""
    endpoints = Endpoints(redis_url=own_redis_url, database_url=database_url)
    async with AsyncExitStack() as running:

        async def start(**settings: Any) -> Pipeline:
            async def start_engine(*_: Any) -> tuple[Any, Any]:
                return PlayedEngine(), None

            return await running.enter_async_context(
                worker_runtime(
                    load_settings(**settings),
                    endpoints,
                    ServedModel(name=MODEL, path=MODEL),
                    start_engine=start_engine,
                )
            )

        yield start


async def get(address: str, path: str) -> bytes:
    """Return what a worker serves."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200")), head
    return body


async def addresses(redis: Redis, count: int) -> list[str]:
    """Wait until so many workers of this file say where they are."""
    async with asyncio.timeout(60):
        while True:
            living = [
                state["metrics"]
                for state in (await living_workers(redis)).values()
                if state["models"] == [MODEL] and state.get("metrics")
            ]
            if len(living) >= count:
                return living
            await asyncio.sleep(0.05)


async def run(pipeline: Pipeline, store: JobStore, *prompts: str) -> None:
    jobs = [spec(text, model=MODEL) for text in prompts]
    ids = await admit(store, *jobs)
    message = JobMessage(ids=tuple(ids), namespace="default", sent_at=time.time())
    await pipeline.run_message(message)


async def test_every_series_is_exported_and_counts(
    workers: Any, redis: Redis, job_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or recovery sends the failed job again, and counts it, before it is asked for.
    monkeypatch.setattr("workers.pipeline.Rules.delay_s", lambda _self, _attempts: 600.0)
    pipeline = await workers()
    (address,) = await addresses(redis, 1)
    await run(pipeline, job_store, "answer", "answer too", "refuse", "fail")
    hanging = asyncio.create_task(run(pipeline, job_store, "hang"))
    async with asyncio.timeout(60):
        while not pipeline.running:
            await asyncio.sleep(0.01)
        while (scrape := Scrape((await get(address, "/metrics")).decode()))(
            "promptmill_event_loop_lag_seconds_count"
        ) == 0:
            await asyncio.sleep(0.05)
    missing = {one.name for one in series.ALL if not set(one.samples) <= scrape.values.keys()}
    # Nothing was returned or recovered yet: these begin with the first of their labels.
    assert missing == {series.JOBS_RETURNED.name, series.RECOVERED.name}

    assert scrape(series.JOBS.name, model=MODEL, state="done", provenance="exact") == 2
    assert scrape(series.JOBS.name, model=MODEL, state="failed", provenance="none") == 1
    assert scrape(series.JOB_RETRIES.name, model=MODEL) == 1
    assert scrape(series.JOB_TOKENS.name, model=MODEL, source="reused") == 6
    assert scrape(f"{series.JOB_WAIT.name}_count", model=MODEL) == 5
    assert scrape(f"{series.JOB_RUN.name}_count", model=MODEL, provenance="exact") == 2
    assert scrape(series.JOBS_RUNNING.name, model=MODEL) == 1
    assert scrape(series.JOB_SLOTS.name, model=MODEL) == pipeline.total_slots
    assert scrape(series.HITS.name, tier="memory", kind="exact") == 2
    assert scrape(series.HITS.name, tier="store", kind="semantic") == 1
    assert scrape(series.REUSE_REFUSALS.name, rule="numbers") == 4
    assert scrape(series.REUSE_SERVED.name) == 1
    assert scrape(series.FAILURES.name, enhancement="nlp") == 1
    assert scrape(f"{series.STAGE.name}_bucket", stage="nlp", le="0.005") == 1
    assert scrape(f"{series.STAGE.name}_bucket", stage="nlp", le="+Inf") == 2
    assert (scrape(series.RESIDENT.name, process="worker") or 0) > 10_000_000
    assert (scrape(series.WORKERS.name, model=MODEL) or 0) >= 1
    states = {"queued": 1, "running": 1}
    for state, jobs in states.items():
        labels = {"model": MODEL, "namespace": "default", "state": state}
        assert scrape(series.QUEUE_JOBS.name, **labels) == jobs

    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    scrape = Scrape((await get(address, "/metrics")).decode())
    assert scrape(series.JOBS_RETURNED.name, model=MODEL, reason="stopping") == 1


async def test_workers_of_a_host_take_a_port_each_and_list_one_another(
    workers: Any, redis: Redis
) -> None:
    await workers()
    (address,) = await addresses(redis, 1)

    async def nothing() -> None:
        return None

    async def no_targets() -> list[tuple[str, dict[str, str]]]:
        return []

    first = int(address.rpartition(":")[2])
    beside = MetricsServer(
        CollectorRegistry(), refresh=nothing, targets=no_targets, host="127.0.0.1", port=first
    )
    beside.start()
    assert beside.address not in {None, address}
    assert await get(str(beside.address), "/metrics") == b""
    await beside.aclose()

    # One that had the port before, and was killed: it is still believed to live.
    killed = {"models": [MODEL], "metrics": address, "started_at": "2000-01-01T00:00:00+00:00"}
    for name in ("0", "z"):
        await shine(redis, f"{name}@{MODEL}", killed)
    (group,) = [
        group
        for group in orjson.loads(await get(address, "/targets"))
        if group["targets"] == [address]
    ]
    assert group["labels"]["worker"].startswith(f"{MODEL}@")
    for name in ("0", "z"):
        await redis.delete(names.worker_key(f"{name}@{MODEL}"))


async def test_metrics_can_be_switched_off(workers: Any, redis: Redis) -> None:
    await workers(metrics_port=0)
    async with asyncio.timeout(60):
        while not (
            mine := [
                state
                for state in (await living_workers(redis)).values()
                if state["models"] == [MODEL]
            ]
        ):
            await asyncio.sleep(0.05)
    assert [state["metrics"] for state in mine] == [None]


async def test_the_queue_is_counted_once_for_all(
    database: Database, redis: Redis, job_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = 0
    live = LiveCounts.live

    async def counting(self: LiveCounts) -> list[LiveJobs]:
        nonlocal counted
        counted += 1
        return await live(self)

    monkeypatch.setattr(LiveCounts, "live", counting)
    await admit(job_store, spec("one", model=MODEL), spec("two", model=MODEL, namespace="other"))
    lookers = [SharedBacklog(redis, database, every_s=60) for _ in range(8)]
    found = [await looker.get() for looker in lookers]
    assert counted == 1
    assert {one.total("queued") for one in found if one is not None} == {2}
    assert all(one is not None and one.oldest_s()[MODEL] >= 0 for one in found)
    # Too old: the first to look counts anew.
    async with asyncio.timeout(60):
        while counted == 1:
            await SharedBacklog(redis, database, every_s=0.0).get()
            await asyncio.sleep(0.01)
    assert counted == 2


def test_tenants_beyond_the_bound_share_a_series() -> None:
    jobs = tuple(
        LiveJobs(model="m", namespace=f"n{size}", state="queued", jobs=size, oldest_s=size)
        for size in range(1, 101)
    )
    bounded = Backlog(at=time.time(), took_s=0, jobs=jobs).bounded()
    assert len(bounded.jobs) == series.BOUND + 1
    assert bounded.total("queued") == sum(range(1, 101))
    (rest,) = [live for live in bounded.jobs if live.namespace == series.OTHERS]
    assert rest.oldest_s == 80
