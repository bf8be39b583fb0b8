"""A Redis that comes back with its data but for the last moments, as after the power failed.

A real Valkey is killed, and started anew on a copy of its data folder taken a moment before.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from schema import names
from tests.integration.builders import admit, change, claimed, number, outcome, spec
from workers.channel import ResultChannel
from workers.connection import open_redis
from workers.data_loss import DataLoss
from workers.publishing import Publisher
from workers.servers import valkey_binary
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import ResultGroup

KEEP_S = 3600.0


class Server:
    """A Valkey whose past can be brought back."""

    def __init__(self, folder: Path) -> None:
        self._data, self._past = folder / "data", folder / "past"
        self._data.mkdir()
        self._socket = folder / "v.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.redis: Redis = open_redis(f"unix://{self._socket}")

    async def start(self) -> None:
        self._process = subprocess.Popen(  # noqa: ASYNC220  it returns at once
            [
                valkey_binary(), "--port", "0", "--unixsocket", self._socket, "--save", "",
                "--appendonly", "yes", "--dir", self._data,
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.redis.ping()
                except (RedisError, OSError):
                    await asyncio.sleep(0.01)
                else:
                    return

    def keep(self) -> None:
        """Take the copy that `restart` brings back."""
        shutil.rmtree(self._past, ignore_errors=True)
        shutil.copytree(self._data, self._past)

    async def restart(self, *, loses: bool) -> None:
        """Kill it and start it anew, with or without what came since the copy."""
        await self.kill()
        if loses:
            shutil.rmtree(self._data)
            shutil.copytree(self._past, self._data)
        await self.start()

    async def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait, 30)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    await server.start()
    yield server
    await server.redis.aclose()
    await server.kill()


class Deployment:
    """Ends jobs, publishes them and reads them as a group does."""

    def __init__(self, server: Server, store: JobStore) -> None:
        self.redis, self.store = server.redis, store
        self.loss = DataLoss(server.redis, store, keep_s=KEEP_S)
        self.channel = ResultChannel(server.redis)
        self.publisher = Publisher(self.channel, store, ttl_s=KEEP_S)

    async def end(self, channel: str) -> UUID:
        job = await claimed(self.store, spec(channel=channel))
        await self.store.finish([outcome(job)])
        return job.id

    async def publish(self, channel: str = "c") -> UUID:
        job_id = await self.end(channel)
        await self.publish_late()
        return job_id

    async def publish_late(self) -> None:
        late = await self.store.unpublished(older_than_s=-1, limit=99)
        tokens = {each.result.job_id: each.result.token for each in late}
        epoch = await self.publisher.send(late)
        await self.store.mark_published(tokens, epoch=epoch)

    async def unpublished(self) -> set[UUID]:
        late = await self.store.unpublished(older_than_s=-1, limit=99)
        return {each.result.job_id for each in late}

    async def read(self, group: str, count: int, *, ack: bool = True) -> list[UUID]:
        found: list[UUID] = []
        consumer = self.channel.consume("default", "c", group, "only", block_s=0.1)
        async with asyncio.timeout(30):
            async for delivery in consumer:
                found.append(delivery.result.job_id)
                if ack:
                    await consumer.ack(delivery)
                if len(found) == count:
                    break
        return found


@pytest.fixture
async def deployment(server: Server, job_store: JobStore) -> AsyncIterator[Deployment]:
    deployment = Deployment(server, job_store)
    for _ in range(2):  # the first look gets to know the server, the second notes the moment on it
        assert await deployment.loss.heed() == 0
    yield deployment
    await deployment.publisher.aclose()


async def test_what_came_last_is_sent_and_published_again(
    server: Server, deployment: Deployment, job_store: JobStore
) -> None:
    read, pending = await deployment.publish(), await deployment.publish()
    (kept,) = await admit(job_store, spec())
    assert await deployment.read("g", 2, ack=False) == [read, pending]
    server.keep()
    # All of this is lost: an acknowledgement, two results, a group, and a message.
    assert await deployment.read("g", 1) == [read]
    lost, unheard = await deployment.publish(), await deployment.publish("unheard")
    await job_store.register_group(ResultGroup(namespace="default", channel="c", name="new"))
    await deployment.read("new", 1, ack=False)
    (unsent,) = await admit(job_store, spec())

    await server.restart(loses=True)
    assert await deployment.loss.heed() == 4
    assert await deployment.unpublished() == {read, pending, lost, unheard}
    again = await job_store.unsent(limit=9, older_than_s=0)
    assert {each.id for each in again} == {kept, unsent}
    await deployment.publish_late()
    assert set(await deployment.read("g", 3)) == {read, pending, lost}
    assert set(await deployment.read("new", 3)) == {read, pending, lost}
    assert [each.result.job_id for each in await deployment.channel.read("default", "unheard")] == [
        unheard
    ]
    assert await deployment.loss.heed() == 0


async def test_what_came_long_before_is_left_alone(
    server: Server, deployment: Deployment, job_store: JobStore, database: Database
) -> None:
    (kept,) = await admit(job_store, spec())
    old = await deployment.publish()
    await deployment.read("g", 1, ack=False)
    await change(
        database,
        "UPDATE jobs SET sent_at = sent_at - interval '5 minutes', "
        "published_at = published_at - interval '5 minutes'",
    )
    await deployment.loss.heed()
    server.keep()
    (unsent,) = await admit(job_store, spec())
    lost = await deployment.publish()
    await server.restart(loses=True)
    assert await deployment.loss.heed() == 1
    assert await deployment.unpublished() == {lost}
    again = {each.id for each in await job_store.unsent(limit=9, older_than_s=0)}
    assert again == {unsent}
    assert await deployment.read("g", 1) == [old]
    assert kept not in again


async def test_a_restart_that_loses_nothing_costs_what_was_read_nothing(
    server: Server, deployment: Deployment
) -> None:
    await deployment.publish()
    await deployment.read("g", 1)
    await deployment.loss.note_positions()
    await server.restart(loses=False)
    assert await deployment.loss.heed() == 0
    assert await deployment.unpublished() == set()


async def test_nothing_is_marked_that_went_to_the_server_before(
    server: Server, deployment: Deployment, job_store: JobStore
) -> None:
    job = await claimed(job_store)
    await job_store.finish([outcome(job)])
    server.keep()
    late = await job_store.unpublished(older_than_s=-1, limit=9)
    epoch = await deployment.publisher.send(late)
    await server.restart(loses=True)
    await deployment.loss.heed()
    await job_store.mark_published({job.id: job.token}, epoch=epoch)
    assert await deployment.unpublished() == {job.id}


async def test_a_group_is_not_taken_to_have_read_what_was_lost(
    server: Server, deployment: Deployment
) -> None:
    """It has read all that the new server has, and nobody has noticed yet that it is new."""
    await deployment.publish()
    await deployment.read("g", 1)
    server.keep()
    lost = await deployment.publish()
    await server.restart(loses=True)
    await deployment.loss.note_positions()
    assert await deployment.loss.heed() >= 1
    assert lost in await deployment.unpublished()


async def test_what_is_worked_on_is_acknowledged_in_its_new_place_too(
    server: Server, deployment: Deployment
) -> None:
    """Or a consumer that dies before it is done would not get it again."""
    await deployment.publish()
    server.keep()
    lost = await deployment.publish()
    consumer = deployment.channel.consume("default", "c", "g", "me", block_s=0.05)
    given = aiter(consumer)
    async with asyncio.timeout(30):
        first, second = await anext(given), await anext(given)
        assert second.result.job_id == lost
        await server.restart(loses=True)
        await deployment.loss.heed()
        await deployment.publish_late()
        new = await deployment.publish()
        assert (await anext(given)).result.job_id == new  # and no repeat before it
    pending = await deployment.redis.xpending(names.results_stream("default", "c"), "g")
    assert pending["pending"] > 2
    await consumer.ack(first, second)
    pending = await deployment.redis.xpending(names.results_stream("default", "c"), "g")
    assert pending["pending"] == 1


async def test_a_copy_from_before_the_first_look_has_lost_everything(
    server: Server, job_store: JobStore, database: Database
) -> None:
    server.keep()
    deployment = Deployment(server, job_store)
    for _ in range(2):
        await deployment.loss.heed()
    published = await deployment.publish()
    await deployment.read("g", 1, ack=False)
    await job_store.register_group(ResultGroup(namespace="default", channel="c", name="g"))
    await server.restart(loses=True)
    assert await deployment.loss.heed() == 1
    assert await deployment.unpublished() == {published}
    assert await number(database, "SELECT count(*) FROM broker") == 1
    await deployment.publisher.aclose()


async def test_a_redis_that_does_not_name_its_run_is_never_new(
    server: Server, deployment: Deployment, job_store: JobStore
) -> None:
    """Somebody's own list of rights may not have INFO in it."""
    await server.redis.acl_setuser(
        "default", enabled=True, nopass=True, keys="*", channels="*", categories=["+@all"],
        commands=["-info"],
    )  # fmt: skip
    assert await deployment.loss.heed() == 0
    assert (await job_store.known_redis()).server is not None
