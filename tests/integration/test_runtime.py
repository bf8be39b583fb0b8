"""What a worker process holds besides its engine, on real servers, with an engine played."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest

from schema import names
from schema.errors import DatabaseUnavailableError
from schema.wire import JobMessage
from tests.integration.builders import admit, answer, number, spec
from tests.stand_ins import final_output
from workers.cache.memory import MemoryCache
from workers.channel import ResultChannel
from workers.connection import open_redis
from workers.endpoints import Endpoints
from workers.pipeline import Pipeline
from workers.runtime import worker_runtime
from workers.serving import ServedModel
from workers.settings import load_settings
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.jobs import JobStore

MODEL = f"m{uuid4().hex}"


class PlayedEngine:
    """As much of the engine as a worker touches; it gives one stored answer again and again."""

    errored = False

    def __init__(self, answer_id: UUID | None = None) -> None:
        self.answer_id = answer_id
        self.listening = False
        self.memory = MemoryCache(entries=10, max_bytes=1_000_000, ttl_s=60)

    async def generate(self, prompt: str, _params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield the one answer, as one read from the store."""
        metadata = {"provenance": "exact", "answer_id": str(self.answer_id)}
        yield final_output(prompt, request_id, "A field.", metadata=metadata, stored=True)

    def stats(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def forget(self, **of: Any) -> int:
        """As the real one; all of it is forgotten when the worker begins to listen."""
        self.listening = self.listening or not of
        return self.memory.forget(**of)


@pytest.fixture(autouse=True)
def _melt() -> Iterator[None]:
    """A worker freezes what it has loaded; the tests go on."""
    yield
    gc.unfreeze()


@pytest.fixture
async def start(own_redis_url: str, database_url: str) -> AsyncIterator[Callable[..., Any]]:
    """Starts workers on this test's database, and ends them."""
    endpoints = Endpoints(redis_url=own_redis_url, database_url=database_url)
    async with AsyncExitStack() as workers:

        async def start(engine: PlayedEngine) -> Pipeline:
            async def start_engine(*_: Any) -> tuple[Any, Any]:
                return engine, None

            return await workers.enter_async_context(
                worker_runtime(
                    load_settings(),
                    endpoints,
                    ServedModel(name=MODEL, path=MODEL),
                    start_engine=start_engine,
                )
            )

        yield start


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not met():
            await asyncio.sleep(0.01)


async def test_every_worker_forgets_at_once(start: Callable[..., Any], own_redis_url: str) -> None:
    workers = [PlayedEngine(), PlayedEngine()]
    for worker in workers:
        await start(worker)
    redis = open_redis(own_redis_url)
    # A worker forgets all when it begins to listen; what comes later is what counts.
    await until(lambda: all(worker.listening for worker in workers))
    doomed, other = answer(tags=("t",), namespace=MODEL), answer(namespace=MODEL)
    for which in ({"ids": [doomed.id]}, {"tag": "t"}):
        for worker in workers:
            worker.memory.put(doomed)
            worker.memory.put(other)
        said = {"v": names.WIRE_VERSION, "namespace": MODEL, "ids": None, "tag": None, **which}
        began = time.monotonic()
        await redis.publish(names.INVALIDATIONS, orjson.dumps(said))
        await until(
            lambda: all(not worker.memory.get(MODEL, doomed.fingerprint) for worker in workers)
        )
        # The promise is a second; a busy machine may be late, never five times.
        assert time.monotonic() - began < 5
        assert all(worker.memory.get(MODEL, other.fingerprint) for worker in workers)
    await redis.aclose()


async def test_hits_of_jobs_are_counted(
    start: Callable[..., Any],
    database: Database,
    job_store: JobStore,
    answer_store: PostgresAnswers,
) -> None:
    made = answer()
    await answer_store.put(made)
    pipeline = await start(PlayedEngine(made.id))
    ids = await admit(job_store, spec(model=MODEL), spec(model=MODEL))
    await pipeline.run_message(JobMessage(ids=tuple(ids), namespace="default", sent_at=time.time()))
    async with asyncio.timeout(60):
        while await number(database, "SELECT hits FROM answers") != 2:
            await asyncio.sleep(0.02)
    assert (await answer_store.reuse_report("default")).hits_by_kind == {"exact": 2}


async def test_a_heartbeat_between_commit_and_publication_stops_nothing(
    start: Callable[..., Any],
    job_store: JobStore,
    own_redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job runs no longer then, and its lease is not lost for that."""
    monkeypatch.setenv("PROMPTMILL_HEARTBEAT_S", "0.1")
    committed, beaten = asyncio.Event(), asyncio.Event()
    real_finish, real_renew = JobStore.finish, JobStore.renew

    async def finish(self: JobStore, outcomes: Any) -> Any:
        finished = await real_finish(self, outcomes)
        committed.set()
        await beaten.wait()
        await asyncio.sleep(0.01)
        return finished

    async def renew(self: JobStore, held: Any, **words: Any) -> Any:
        renewal = await real_renew(self, held, **words)
        if committed.is_set():
            beaten.set()
        return renewal

    monkeypatch.setattr(JobStore, "finish", finish)
    monkeypatch.setattr(JobStore, "renew", renew)
    pipeline = await start(PlayedEngine())
    ids = await admit(job_store, spec(model=MODEL, channel="beaten"))
    async with asyncio.timeout(60):
        await pipeline.run_message(
            JobMessage(ids=tuple(ids), namespace="default", sent_at=time.time())
        )
    redis = open_redis(own_redis_url)
    delivered = await ResultChannel(redis).read("default", "beaten")
    await redis.aclose()
    assert [delivery.result.job_id for delivery in delivered] == ids


class RecallingEngine(PlayedEngine):
    """Keeps the answers it gives in memory, as the real one, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    async def generate(self, prompt: str, params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield an answer of its own for each run."""
        from workers.engine.scope import ReportEntry, current_scope

        self.runs += 1
        scope = current_scope()
        assert scope is not None
        made = answer(f"Answer {self.runs}.", fingerprint=uuid4().bytes * 2)
        self.memory.put(made)
        async for output in super().generate(prompt, params, request_id):
            metadata = {"provenance": "generated", "answer_id": str(made.id)}
            scope.report.entries[:] = [
                ReportEntry(request_id=request_id, metadata=metadata, answer=made, stored=False)
            ]
            yield output

    def recall(self, namespace: str, fingerprint: bytes) -> Any:
        """As the real one."""
        return self.memory.get(namespace, fingerprint)

    def recalled_metadata(self, given: Any) -> dict[str, Any]:
        """As the real one, in short."""
        return {"provenance": "exact", "cached": True, "source_answer_id": str(given.id)}


async def test_repeats_need_no_run(
    start: Callable[..., Any], database: Database, job_store: JobStore, own_redis_url: str
) -> None:
    """They are committed, published and counted as all others, until the answer is forgotten."""
    engine = RecallingEngine()
    pipeline = await start(engine)
    await until(lambda: engine.listening)

    async def run(*specs: Any) -> list[Any]:
        ids = await admit(job_store, *specs)
        message = JobMessage(ids=tuple(ids), namespace="default", sent_at=time.time())
        await pipeline.run_message(message)
        found = await job_store.results("default", ids)
        return [found[job_id] for job_id in ids]

    (first,) = await run(spec(model=MODEL))
    again = await run(*(spec(model=MODEL, custom_id=f"row {n}", channel="c") for n in range(5)))
    assert engine.runs == 1
    assert {result.text for result in again} == {first.text} == {"Answer 1."}
    assert [result.custom_id for result in again] == [f"row {n}" for n in range(5)]
    assert {result.metadata["provenance"] for result in again} == {"exact"}
    assert all(result.metadata["processing_time"]["total"] >= 0 for result in again)
    assert all(result.metadata["tokens"] == first.metadata["tokens"] for result in again)
    # What is read from the channel is what was stored, and it is noted that it is there.
    redis = open_redis(own_redis_url)
    delivered = await ResultChannel(redis).read("default", "c")
    await redis.aclose()
    own = {result.job_id: result for result in again}
    assert {d.result.job_id: d.result for d in delivered if d.result.job_id in own} == own
    async with asyncio.timeout(60):
        unpublished = "SELECT count(*) FROM jobs WHERE published_at IS NULL"
        while await number(database, unpublished):
            await asyncio.sleep(0.02)
    assert await number(database, "SELECT count(*) FROM jobs WHERE answer_id IS NULL") == 0
    # These ask for more than the answer, or for another one.
    await run(spec(model=MODEL, stream=True), spec("What is ML?", model=MODEL))
    assert engine.runs == 3
    engine.forget(namespace="default")
    (anew,) = await run(spec(model=MODEL))
    assert (engine.runs, anew.text) == (4, "Answer 4.")


async def test_many_repeats_need_no_claim(
    start: Callable[..., Any],
    job_store: JobStore,
    own_redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read, ended and published; what is no repeat, or was taken, is claimed as ever."""
    engine = RecallingEngine()
    pipeline = await start(engine)
    await until(lambda: engine.listening)
    claimed: list[UUID] = []
    claim, claimable = JobStore.claim, JobStore.claimable

    async def watched(self: JobStore, ids: Any, **more: Any) -> Any:
        claimed.extend(ids)
        return await claim(self, ids, **more)

    monkeypatch.setattr(JobStore, "claim", watched)

    async def run(*specs: Any) -> list[Any]:
        ids = await admit(job_store, *specs)
        claimed.clear()
        await pipeline.run_message(
            JobMessage(ids=tuple(ids), namespace="default", sent_at=time.time())
        )
        found = await job_store.results("default", ids)
        return [found.get(job_id) for job_id in ids]

    for _ in range(20):
        first, *_ = await run(spec(model=MODEL))
    assert not claimed
    same = spec(model=MODEL)
    assert await run(same, same) == [(await run(same))[0]] * 2
    mixed = await run(*(spec(model=MODEL, channel="c") for _ in range(5)), spec("New", model=MODEL))
    assert claimed == [mixed[-1].job_id]
    assert [result.text for result in mixed] == [first.text] * 5 + ["Answer 2."]
    assert {result.token for result in mixed} == {1}
    redis = open_redis(own_redis_url)
    delivered = await ResultChannel(redis).read("default", "c")
    await redis.aclose()
    assert {d.result.job_id: d.result for d in delivered} == {r.job_id: r for r in mixed[:5]}

    # What cannot be read now is claimed, which waits for Postgres.
    async def away(_self: JobStore, _ids: Any) -> Any:
        raise DatabaseUnavailableError("away")

    monkeypatch.setattr(JobStore, "claimable", away)
    (result,) = await run(spec(model=MODEL))
    assert claimed == [result.job_id]
    assert result.text == first.text

    # Between being read and being ended one is taken by another worker, one is cancelled.
    async def meanwhile(self: JobStore, ids: Any) -> Any:
        found = await claimable(self, ids)
        await claim(self, ids[:1], owner="another", lease_s=300)
        await self.cancel("default", ids[1:2])
        return found

    for _ in range(3):
        await run(spec(model=MODEL))
    monkeypatch.setattr(JobStore, "claimable", meanwhile)
    taken, cancelled, left = await run(*(spec(model=MODEL) for _ in range(3)))
    assert taken is None
    assert cancelled.status == "cancelled"
    assert left.text == first.text
    assert len(claimed) == 2
    assert pipeline.running == 0
    async with asyncio.timeout(10):
        assert await pipeline._slots.take(pipeline._slots.places) == pipeline._slots.places


async def test_a_repeat_that_others_hold_is_not_answered(
    start: Callable[..., Any], job_store: JobStore
) -> None:
    """The fencing token counts for it as for any other."""
    engine = RecallingEngine()
    pipeline = await start(engine)
    await until(lambda: engine.listening)
    ids = await admit(job_store, spec(model=MODEL), spec(model=MODEL))
    first, second = ids
    await pipeline.run_message(JobMessage(ids=(first,), namespace="default", sent_at=time.time()))
    await job_store.claim([second], owner="another", lease_s=300)
    await pipeline.run_message(JobMessage(ids=(second,), namespace="default", sent_at=time.time()))
    status = await job_store.status("default", second)
    assert status is not None
    assert (status.state, status.token) == ("running", 1)
