"""Result channels on a real server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from redis.asyncio import Redis

from schema import names
from schema.errors import BrokerUnavailableError, InvalidRequestError
from schema.jobs import JobResult, JobState
from workers.channel import START, Delivery, ResultChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.local import LocalStack


@pytest.fixture
async def redis(stack: LocalStack) -> AsyncIterator[Redis]:
    """A client of the stack's Valkey."""
    client = Redis.from_url(stack.redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def channel(redis: Redis) -> ResultChannel:
    """The subject."""
    return ResultChannel(redis)


@pytest.fixture
def namespace() -> str:
    """A tenant of this test's own."""
    return f"n{uuid4().hex}"


def outcome(namespace: str, job_id: UUID | None = None, token: int = 1) -> JobResult:
    """Return a result."""
    return JobResult(
        job_id=job_id or uuid4(), namespace=namespace, status=JobState.DONE, token=token, text="hü"
    )


async def take(consumer: Any, count: int) -> list[Delivery]:
    """Return the next deliveries of a consumer."""
    found: list[Delivery] = []
    async with asyncio.timeout(20):
        async for delivery in consumer:
            found.append(delivery)
            if len(found) == count:
                break
    return found


async def nothing_more(consumer: Any) -> bool:
    """Whether a consumer stays silent."""
    try:
        async with asyncio.timeout(0.5):
            async for _ in consumer:
                return False
    except TimeoutError:
        return True
    return True


async def test_results_are_read_in_order_from_any_cursor(channel: ResultChannel, namespace: str):
    results = [outcome(namespace) for _ in range(5)]
    await channel.publish([("c", result) for result in results])
    read = await channel.read(namespace, "c")
    assert [delivery.result for delivery in read] == results
    again = await channel.read(namespace, "c", read[1].cursor, count=2)
    assert [delivery.result for delivery in again] == results[2:4]
    assert await channel.read(namespace, "c", read[-1].cursor) == []
    assert await channel.end(namespace, "c") == read[-1].cursor


async def test_an_empty_channel_is_empty(channel: ResultChannel, namespace: str):
    assert await channel.read(namespace, "c") == []
    assert await channel.read(namespace, "c", block_s=0.01) == []
    assert await channel.end(namespace, "c") == START


async def test_a_reader_that_waits_is_woken(channel: ResultChannel, namespace: str):
    reading = asyncio.create_task(channel.read(namespace, "c", block_s=20))
    result = outcome(namespace)
    await channel.publish([("c", result)])
    assert [delivery.result for delivery in await reading] == [result]


async def test_publishing_wakes_those_who_wait_for_the_job(
    channel: ResultChannel, redis: Redis, namespace: str
):
    result = outcome(namespace)
    signals: Any = redis.pubsub(ignore_subscribe_messages=True)
    async with signals:
        await signals.subscribe(names.done_signal(namespace, result.job_id))
        await signals.get_message(timeout=5)
        await channel.publish([("c", result)])
        async with asyncio.timeout(10):
            while (message := await signals.get_message(timeout=1)) is None:
                pass
    assert message["data"] == b"done"


async def test_namespaces_and_channels_do_not_meet(channel: ResultChannel, namespace: str):
    await channel.publish([("a", outcome(namespace)), ("b", outcome(namespace + "x"))])
    assert await channel.read(namespace, "b") == []
    assert await channel.read(namespace + "x", "a") == []


async def test_a_channel_is_trimmed_and_expires(
    channel: ResultChannel, redis: Redis, namespace: str
):
    for _ in range(10):
        await channel.publish([("c", outcome(namespace)) for _ in range(100)], maxlen=100, ttl_s=60)
    stream = names.results_stream(namespace, "c")
    assert 100 <= await redis.xlen(stream) < 400
    assert 0 < await redis.ttl(stream) <= 60


async def test_a_group_shares_the_results(channel: ResultChannel, namespace: str):
    results = [outcome(namespace) for _ in range(10)]
    await channel.publish([("c", result) for result in results])
    one = channel.consume(namespace, "c", "g", "one", count=5)
    two = channel.consume(namespace, "c", "g", "two", count=5)
    found = await take(one, 5) + await take(two, 5)
    assert {delivery.result.job_id for delivery in found} == {r.job_id for r in results}
    other = channel.consume(namespace, "c", "other group", "one")
    assert len(await take(other, 10)) == 10


async def test_what_was_not_acknowledged_comes_again_after_a_restart(
    channel: ResultChannel, namespace: str
):
    await channel.publish([("c", outcome(namespace)) for _ in range(3)])
    first = channel.consume(namespace, "c", "g", "me")
    found = await take(first, 3)
    await first.ack(found[0])
    await first.ack(found[0])
    again = await take(channel.consume(namespace, "c", "g", "me"), 2)
    assert again == found[1:]


async def test_a_group_goes_back_to_a_cursor(channel: ResultChannel, namespace: str):
    results = [outcome(namespace) for _ in range(4)]
    await channel.publish([("c", result) for result in results])
    consumer = channel.consume(namespace, "c", "g", "me", block_s=0.05)
    found = await take(consumer, 4)
    await consumer.ack(*found)
    await consumer.replay(found[1].cursor)
    again = await take(consumer, 2)
    assert again == found[2:]
    await consumer.ack(*again)
    await consumer.replay()
    assert await take(consumer, 4) == found
    await consumer.ack(*found)
    assert await nothing_more(consumer)
    # A group that is new, and a member that has just come.
    fresh = channel.consume(namespace, "c", "another", "me", block_s=0.05)
    await fresh.replay(found[2].cursor)
    assert await take(fresh, 1) == found[3:]
    with pytest.raises(InvalidRequestError, match="is not a stream position"):
        await consumer.replay("yesterday")


async def test_what_a_dead_member_left_is_taken_over(channel: ResultChannel, namespace: str):
    await channel.publish([("c", outcome(namespace)) for _ in range(3)])
    found = await take(channel.consume(namespace, "c", "g", "dead"), 3)
    heir = channel.consume(namespace, "c", "g", "heir", stale_s=0.05, block_s=0.05)
    assert await take(heir, 3) == found


async def test_repeats_are_dropped_and_never_left_pending(
    channel: ResultChannel, redis: Redis, namespace: str
):
    result = outcome(namespace)
    newer = outcome(namespace, result.job_id, token=2)
    await channel.publish([("c", result), ("c", result), ("c", newer), ("c", result)])
    consumer = channel.consume(namespace, "c", "g", "me", stale_s=0.05, block_s=0.05)
    found = await take(consumer, 2)
    assert [delivery.result for delivery in found] == [result, newer]
    await consumer.ack(*found)
    assert await nothing_more(consumer)
    pending: Any = await redis.xpending(names.results_stream(namespace, "c"), "g")
    assert pending["pending"] == 0


async def test_a_slow_consumer_is_not_given_its_own_work_twice(
    channel: ResultChannel, redis: Redis, namespace: str
):
    await channel.publish([("c", outcome(namespace))])
    consumer = channel.consume(namespace, "c", "g", "me", stale_s=0.05, block_s=0.05)
    await take(consumer, 1)
    assert await nothing_more(consumer)
    pending: Any = await redis.xpending(names.results_stream(namespace, "c"), "g")
    assert pending["pending"] == 1


async def test_a_foreign_entry_stops_nobody(channel: ResultChannel, redis: Redis, namespace: str):
    stream = names.results_stream(namespace, "c")
    await redis.xadd(stream, {"nonsense": "\x00"})
    await redis.xadd(stream, {"result": "{}"})
    await channel.publish([("c", outcome(namespace))])
    assert len(await channel.read(namespace, "c")) == 1
    assert len(await take(channel.consume(namespace, "c", "g", "me"), 1)) == 1


async def test_a_group_survives_the_loss_of_its_stream(
    channel: ResultChannel, redis: Redis, namespace: str
):
    await channel.publish([("c", outcome(namespace))])
    consumer = channel.consume(namespace, "c", "g", "me", block_s=0.05)
    iterator = aiter(consumer)
    async with asyncio.timeout(20):
        await anext(iterator)
        await redis.delete(names.results_stream(namespace, "c"))
        following = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0.1)
        result = outcome(namespace)
        await channel.publish([("c", result)])
        assert (await following).result == result


async def test_tokens_are_read_on_from_a_cursor(
    channel: ResultChannel, redis: Redis, namespace: str
):
    job_id = uuid4()
    await channel.append_tokens(namespace, job_id, [(0, 0, "Be"), (1, 0, "Ja"), (0, 2, "cause ")])
    first = await channel.read_tokens(namespace, job_id, count=2)
    assert [(delta.index, delta.offset, delta.text) for delta in first] == [
        (0, 0, "Be"),
        (1, 0, "Ja"),
    ]
    await channel.append_tokens(namespace, job_id, [(0, 8, "not.")], finished=True, ttl_s=60)
    rest = await channel.read_tokens(namespace, job_id, first[-1].cursor)
    assert [(delta.text, delta.finished) for delta in rest] == [
        ("cause ", False),
        ("not.", False),
        ("", True),
    ]
    assert 0 < await redis.ttl(names.tokens_stream(namespace, job_id)) <= 60
    await channel.drop_tokens(namespace, job_id)
    assert await channel.read_tokens(namespace, job_id) == []


@pytest.mark.parametrize("cursor", ["", "abc", "1-x", "-1", "$", "1-2-3"])
async def test_a_cursor_that_is_none_is_refused(
    channel: ResultChannel, namespace: str, cursor: str
):
    with pytest.raises(InvalidRequestError, match="cursor: is not a stream position"):
        await channel.read(namespace, "c", cursor)


async def test_a_redis_that_is_away_is_our_error(namespace: str):
    nobody: Redis = Redis.from_url("redis://127.0.0.1:1")
    channel = ResultChannel(nobody)
    for call in (
        channel.publish([("c", outcome(namespace))]),
        channel.read(namespace, "c"),
        channel.read_tokens(namespace, uuid4()),
        take(channel.consume(namespace, "c", "g", "me"), 1),
    ):
        with pytest.raises(BrokerUnavailableError, match="Redis failed while"):
            await call
    await nobody.aclose()
