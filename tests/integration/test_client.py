"""The client against real servers; the worker is played by the job store."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from schema import names, wire
from schema.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DatabaseUnavailableError,
    IdempotencyConflictError,
    InvalidRequestError,
    JobNotFoundError,
    QueueFullError,
    ResultTimeoutError,
    UnknownModelError,
)
from schema.jobs import Completion, JobResult, JobSpec, JobState, PromptRequest
from workers import AsyncJobClient, JobClient, Settings, registry
from workers.channel import ResultChannel
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import Outcome
from workers.store.schema_upgrade import upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.local import LocalStack

NOBODY = "redis://127.0.0.1:1"


class PlayedWorker:
    """Takes the messages of one model and answers them with the prompt in capitals."""

    def __init__(self, redis: Redis, store: JobStore, model: str) -> None:
        self.redis, self.store, self.model = redis, store, model
        self.channel = ResultChannel(redis)

    async def messages(self) -> list[wire.JobMessage]:
        """Take every message that waits, most urgent first."""
        found = []
        for priority in names.PRIORITIES:
            key = names.priority_list(names.queue(self.model), priority)
            while (item := await self.redis.rpop(key)) is not None:
                assert isinstance(item, (str, bytes))
                found.append(wire.decode(json.loads(item)["headers"][names.JOBS_HEADER]))
        return found

    async def run(self, *, publish: bool = True) -> list[JobResult]:
        """Run all that waits."""
        results = []
        for message in await self.messages():
            if message.jobs:
                made = [(spec.channel, self.answer(spec, 1)) for spec in message.jobs]
                await self.channel.publish(made)
                results += [result for _, result in made]
                continue
            claim = await self.store.claim(message.ids, owner="played", lease_s=30)
            for job in claim.jobs:
                spec = JobSpec(id=job.id, namespace=job.namespace, request=job.parse_request())
                result = self.answer(spec, job.token)
                await self.store.finish([Outcome(job_id=job.id, token=job.token, result=result)])
                if publish:
                    await self.channel.publish([(job.channel, result)])
                results.append(result)
        return results

    def answer(self, spec: JobSpec, token: int) -> JobResult:
        """Return what the model would have said."""
        assert isinstance(spec.request, PromptRequest)
        text = spec.request.prompt.upper()
        return JobResult(
            job_id=spec.id,
            namespace=spec.namespace,
            status=JobState.DONE,
            token=token,
            text=text,
            outputs=[Completion(text=text)],
            finished_at=datetime.now(UTC),
        )


@pytest.fixture(scope="session")
def database_url(stack: LocalStack) -> str:
    """The stack's database, with its tables."""
    upgrade(stack.database_url)
    return stack.database_url


@pytest.fixture
def settings(stack: LocalStack, database_url: str) -> Settings:
    """Both servers, a tenant and a model of this test's own."""
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(stack.redis_url),
        namespace=f"n{uuid4().hex}",
        served_model_name=f"m{uuid4().hex}",
    )


@pytest.fixture
def redis_alone(settings: Settings) -> Settings:
    """The same without a database."""
    return settings.model_copy(update={"database_url": None})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[AsyncJobClient]:
    """The subject, with a database."""
    async with AsyncJobClient(settings) as client:
        yield client


@pytest.fixture
async def light(redis_alone: Settings) -> AsyncIterator[AsyncJobClient]:
    """The subject, with Redis alone."""
    async with AsyncJobClient(redis_alone) as client:
        yield client


@pytest.fixture
async def worker(settings: Settings, client: AsyncJobClient) -> AsyncIterator[PlayedWorker]:
    """Somebody who answers."""
    assert settings.redis_url
    assert settings.database_url
    assert settings.served_model_name
    redis = Redis.from_url(settings.redis_url.get_secret_value())
    database = Database(settings.database_url.get_secret_value())
    yield PlayedWorker(redis, JobStore(database), settings.served_model_name)
    await database.aclose()
    await redis.aclose()


async def test_a_job_is_submitted_run_and_read(client: AsyncJobClient, worker: PlayedWorker):
    job = await client.submit("hello", sampling={"max_tokens": 4}, channel="mine")
    assert (await job.status()).state is JobState.QUEUED
    await worker.run()
    result = await job.result(timeout_s=20)
    assert (result.status, result.text, result.error) == (JobState.DONE, "HELLO", None)
    assert result.outputs[0].text == "HELLO"
    assert (await client.status(str(job.id))).state is JobState.DONE
    assert [status.job_id for status in await client.jobs(state="done")] == [job.id]
    assert await client.jobs(state=JobState.FAILED) == []


async def test_who_waits_is_woken(client: AsyncJobClient, worker: PlayedWorker):
    jobs = await client.submit_many([f"prompt {n}" for n in range(20)])
    waiting = [asyncio.create_task(job.result(timeout_s=30)) for job in jobs]
    await asyncio.sleep(0.1)
    await worker.run()
    results = await asyncio.gather(*waiting)
    assert [result.text for result in results] == [f"PROMPT {n}" for n in range(20)]


async def test_who_waits_sees_an_outcome_that_was_never_announced(
    client: AsyncJobClient, worker: PlayedWorker
):
    job = await client.submit("hello")
    waiting = asyncio.create_task(job.result(timeout_s=30))
    await asyncio.sleep(0.1)
    await worker.run(publish=False)
    assert (await waiting).text == "HELLO"


async def test_many_jobs_share_messages(client: AsyncJobClient, worker: PlayedWorker):
    jobs = await client.submit_many([{"prompt": f"p{n}", "priority": n % 2} for n in range(200)])
    messages = await worker.messages()
    assert len(messages) <= 8
    assert {id_ for message in messages for id_ in message.ids} == {job.id for job in jobs}


async def test_a_key_makes_one_job_of_many_submissions(
    client: AsyncJobClient, light: AsyncJobClient, worker: PlayedWorker
):
    jobs = await asyncio.gather(*(client.submit("a", idempotency_key="k") for _ in range(8)))
    assert len({job.id for job in jobs}) == 1
    assert sum(not job.known for job in jobs) == 1
    assert (await light.submit("a", idempotency_key="k")).id == jobs[0].id
    assert sum(len(message.ids) for message in await worker.messages()) == 1
    with pytest.raises(IdempotencyConflictError):
        await client.submit("b", idempotency_key="k")


async def test_a_result_that_is_late_is_named(client: AsyncJobClient):
    job = await client.submit("hello")
    with pytest.raises(ResultTimeoutError, match="it is queued; it goes on"):
        await job.result(timeout_s=0)
    with pytest.raises(ResultTimeoutError, match=r"not over after 0\.1 s"):
        await client.result(job.id, timeout_s=0.1)


async def test_other_namespaces_jobs_are_not_found(client: AsyncJobClient):
    job = await client.submit("hello")
    for call in (client.status, client.result, client.cancel):
        with pytest.raises(JobNotFoundError, match="'other' has no job"):
            await call(job.id, namespace="other")
    with pytest.raises(InvalidRequestError, match="job: is not the id"):
        await client.status("seven")


async def test_a_waiting_job_is_cancelled_and_run_once_more(
    client: AsyncJobClient, worker: PlayedWorker
):
    job = await client.submit("hello", channel="c")
    assert await job.cancel() is True
    assert await job.cancel() is False
    assert (await job.result(timeout_s=10)).status is JobState.CANCELLED
    delivered = await worker.channel.read(job.namespace, "c")
    assert [delivery.result.status for delivery in delivered] == [JobState.CANCELLED]
    await worker.messages()
    assert await client.retry(job) == [job.id]
    assert await client.retry(job) == []
    await worker.run()
    assert (await job.result(timeout_s=10)).text == "HELLO"
    with pytest.raises(InvalidRequestError, match="say which jobs"):
        await client.retry()


async def test_cancelling_a_running_job_is_announced(client: AsyncJobClient, worker: PlayedWorker):
    job = await client.submit("hello")
    (message,) = await worker.messages()
    await worker.store.claim(message.ids, owner="played", lease_s=30)
    pubsub: Any = worker.redis.pubsub(ignore_subscribe_messages=True)
    async with pubsub:
        await pubsub.subscribe(names.CANCELLATIONS)
        await pubsub.get_message(timeout=5)
        assert await job.cancel() is True
        async with asyncio.timeout(10):
            while (notice := await pubsub.get_message(timeout=1)) is None:
                pass
    assert json.loads(notice["data"]) == {
        "v": 1,
        "namespace": job.namespace,
        "ids": [str(job.id)],
    }


async def test_a_full_queue_is_said(settings: Settings, worker: PlayedWorker):
    small = settings.model_copy(update={"queue_limit": 1})
    async with AsyncJobClient(small) as client:
        with pytest.raises(QueueFullError):
            await client.submit_many(["a", "b"])
        assert await worker.messages() == []


@pytest.mark.parametrize("alone", [False, True], ids=["database", "Redis alone"])
async def test_who_waits_for_room_gets_it_or_hears_that_there_is_none(
    settings: Settings, redis_alone: Settings, worker: PlayedWorker, *, alone: bool
):
    # Other tests leave jobs in the same tables.
    waiting = sum([(await worker.store.counts())[JobState.QUEUED] if not alone else 0, 1])
    small = (redis_alone if alone else settings).model_copy(update={"queue_limit": waiting})
    async with AsyncJobClient(small) as hasty, AsyncJobClient(small, wait_s=1.0) as patient:
        await hasty.submit("first")
        began = time.monotonic()
        with pytest.raises(QueueFullError):
            await patient.submit("second")
        assert time.monotonic() - began > 0.5
    async with AsyncJobClient(small, wait_s=60.0) as patient:
        third = asyncio.create_task(patient.submit("third"))
        await asyncio.sleep(0.3)
        assert not third.done()
        assert [result.text for result in await worker.run()] == ["FIRST"]
        await third
    assert [result.text for result in await worker.run()] == ["THIRD"]


async def test_a_job_outlives_a_redis_that_is_away(settings: Settings):
    away = settings.model_copy(update={"redis_url": SecretStr(NOBODY)})
    async with AsyncJobClient(away) as client:
        job = await client.submit("hello")
        assert (await job.status()).state is JobState.QUEUED
        with pytest.raises(ResultTimeoutError):
            await job.result(timeout_s=1)


async def test_without_any_server_nothing_is_accepted(settings: Settings):
    gone = SecretStr("postgresql://u:secret@127.0.0.1:1/none")
    async with AsyncJobClient(settings.model_copy(update={"database_url": gone})) as client:
        with pytest.raises(DatabaseUnavailableError) as caught:
            await client.submit("hello")
        assert "secret" not in str(caught.value)
    alone = settings.model_copy(update={"database_url": None, "redis_url": SecretStr(NOBODY)})
    async with AsyncJobClient(alone) as client:
        with pytest.raises(BrokerUnavailableError):
            await client.submit("hello")


async def test_a_database_alone_is_half_a_configuration(settings: Settings):
    client = AsyncJobClient(settings.model_copy(update={"redis_url": None}))
    with pytest.raises(ConfigurationError, match="PROMPTMILL_REDIS_URL is not"):
        await client.submit("hello")


async def test_redis_alone_carries_the_whole_job(light: AsyncJobClient, worker: PlayedWorker):
    jobs = await light.submit_many([f"p{n}" for n in range(3)], channel="c")
    waiting = asyncio.create_task(jobs[2].result(timeout_s=30))
    await worker.run()
    assert (await waiting).text == "P2"
    # By the id alone, from a client that submitted nothing.
    assert (await light.result(jobs[0].id, 10, channel="c")).text == "P0"
    with pytest.raises(ResultTimeoutError):
        await light.result(uuid4(), 0, channel="c")
    with pytest.raises(ConfigurationError, match="needs the database"):
        await jobs[0].status()


async def test_a_model_that_nobody_serves_is_refused_when_that_is_known(
    settings: Settings, worker: PlayedWorker
):
    free = settings.model_copy(update={"served_model_name": None})
    await worker.redis.delete(registry.SERVED_MODELS)  # a worker of another test's may stand there
    await registry.announce(worker.redis, [worker.model])
    try:
        async with AsyncJobClient(free) as client:
            with pytest.raises(UnknownModelError, match="no worker serves 'nope'"):
                await client.submit("hello", model="nope")
            job = await client.submit("hello")
            assert (await job.status()).model == worker.model
    finally:
        await worker.redis.delete(registry.SERVED_MODELS)


async def test_results_come_by_consumer_group(client: AsyncJobClient, worker: PlayedWorker):
    jobs = await client.submit_many(["a", "b"], channel="c")
    await worker.run()
    consumer = await client.results("c", "etl", "one")
    seen = []
    async with asyncio.timeout(20):
        async for delivery in consumer:
            seen.append(delivery.result.job_id)
            await consumer.ack(delivery)
            if len(seen) == 2:
                break
    assert sorted(seen) == sorted(job.id for job in jobs)


async def test_a_stream_goes_on_where_it_was_left(client: AsyncJobClient, worker: PlayedWorker):
    job = await client.submit("hello", stream=True)
    space = job.namespace
    await worker.channel.append_tokens(space, job.id, [(0, 0, "HE")])
    deltas = client.stream(job)
    first = await anext(deltas)
    await deltas.aclose()  # type: ignore[attr-defined]  # it is a generator
    # A second run writes the text anew.
    await worker.channel.drop_tokens(space, job.id)
    await worker.channel.append_tokens(space, job.id, [(0, 0, "HEL"), (0, 3, "L")])
    second = client.stream(job, first.cursor)
    texts = [first.text, (await anext(second)).text]
    following = await anext(second)
    texts.append(following.text)
    # The stream expires; the row knows the rest.
    await worker.channel.drop_tokens(space, job.id)
    await worker.run()
    rest = [delta async for delta in client.stream(job, following.cursor)]
    assert "".join(texts + [delta.text for delta in rest]) == "HELLO"
    assert [delta.finished for delta in rest] == [False, True]
    with pytest.raises(InvalidRequestError, match="cursor"):
        await anext(client.stream(job, "0-0/x"))


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 0, "HE"), (0, 3, "LO")],  # one in the middle never reached Redis
        [(0, 0, "HEL")],  # the last did not
        [],
    ],
)
async def test_pieces_that_were_lost_with_redis_come_from_the_row(
    client: AsyncJobClient, worker: PlayedWorker, pieces: list[tuple[int, int, str]]
):
    job = await client.submit("hello", stream=True)
    await worker.channel.append_tokens(job.namespace, job.id, pieces)
    seen: list[str] = []

    async def read() -> None:
        seen.extend([delta.text async for delta in client.stream(job)])

    reader = asyncio.create_task(read())
    await worker.run()
    await worker.channel.append_tokens(job.namespace, job.id, [], finished=True)
    async with asyncio.timeout(20):
        await reader
    assert "".join(seen) == "HELLO"


async def test_a_stream_outlives_an_absence_of_redis(
    client: AsyncJobClient,
    light: AsyncJobClient,
    worker: PlayedWorker,
    monkeypatch: pytest.MonkeyPatch,
):
    real, tries = ResultChannel.read_tokens, 0

    async def away_at_first(self: ResultChannel, *args: Any, **named: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise BrokerUnavailableError("gone")
        return await real(self, *args, **named)

    monkeypatch.setattr("workers.token_stream._AGAIN_S", 0.01)
    monkeypatch.setattr(ResultChannel, "read_tokens", away_at_first)
    for one in (client, light):
        tries = 0
        job = await one.submit("hello", stream=True)
        await worker.channel.append_tokens(job.namespace, job.id, [(0, 0, "HEL"), (0, 3, "LO")])
        await worker.run()
        await worker.channel.append_tokens(job.namespace, job.id, [], finished=True)
        async with asyncio.timeout(20):
            deltas = [delta async for delta in one.stream(job)]
        assert "".join(delta.text for delta in deltas) == "HELLO"
        assert deltas[-1].finished
    monkeypatch.setattr("workers.token_stream._PATIENCE_S", 0.0)
    tries = -1000
    with pytest.raises(BrokerUnavailableError):
        await anext(light.stream(job))


async def test_what_is_wrong_is_refused_before_anything_is_enqueued(
    client: AsyncJobClient, light: AsyncJobClient, worker: PlayedWorker
):
    for one in (client, light):
        with pytest.raises(InvalidRequestError, match=r"requests\[1\]\.sampling\.temperature"):
            await one.submit_many(["fine", {"prompt": "x", "sampling": {"temperature": -1}}])
        with pytest.raises(InvalidRequestError, match="prompt: is 10,000,000 bytes long"):
            await one.submit("x" * 10_000_000)
    assert await worker.messages() == []


def test_code_without_a_loop_uses_the_same(settings: Settings, stack: LocalStack):
    with JobClient.from_settings(settings) as client:
        job = client.submit("hello")
        others = client.submit_many(f"p{n}" for n in range(3))
        assert job.status().state is JobState.QUEUED
        assert len(client.jobs()) == 4
        done: list[Any] = []
        waiting = [
            threading.Thread(target=lambda one=one: done.append(one.result(timeout_s=30)))
            for one in (job, *others)
        ]
        for thread in waiting:
            thread.start()
        assert settings.served_model_name

        async def work() -> None:
            redis = Redis.from_url(stack.redis_url)
            database = Database(stack.database_url)
            assert settings.served_model_name
            await PlayedWorker(redis, JobStore(database), settings.served_model_name).run()
            await database.aclose()
            await redis.aclose()

        worker = threading.Thread(target=lambda: asyncio.run(work()))
        worker.start()
        for thread in (worker, *waiting):
            thread.join(30)
        assert sorted(result.text for result in done) == ["HELLO", "P0", "P1", "P2"]
        results = client.results("default", "g", "one")

        def given() -> list[Any]:
            found = list(itertools.islice(results, 4))
            results.ack(*found)
            return [delivery.result.job_id for delivery in found]

        assert len(set(first := given())) == 4
        results.replay()
        assert sorted(given()) == sorted(first)
        assert [delta.text for delta in client.stream(job)] == ["HELLO", ""]
        assert client.cancel(job) is False
        assert client.retry(job) == []
    client.close()
