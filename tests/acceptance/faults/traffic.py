"""The traffic of a run: producers that repeat what failed, and consumers that keep what came."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

from schema import names
from schema.errors import ServiceError
from schema.jobs import JobResult
from tests.acceptance.faults.scripted_worker import REFUSED
from workers.aio_client import AsyncJobClient
from workers.cancellation import heed_cancellation

NAMESPACES = ("red", "green", "blue")
CHANNELS = ("left", "right")
#: Members of the second are away again and again, so that something is unread when Redis is lost.
GROUPS = ("prompt", "late")
PLACES = tuple((namespace, channel) for namespace in NAMESPACES for channel in CHANNELS)
_MOST_AT_ONCE = 8
_AGAIN_S = 0.2
AWAY_S = 4.0
_AWAY_SHARE = 0.05  # of the results of the late group that are followed by an absence


class Producer:
    """Submits jobs, and does so again under the same key when that failed."""

    def __init__(self, client: AsyncJobClient, *, seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._number = 0
        self.prompts: dict[UUID, str] = {}  # of accepted jobs
        self.places: dict[UUID, tuple[str, str]] = {}
        self.repeated = 0  # submissions that failed and were made again

    async def run(self, stop: asyncio.Event) -> None:
        """Submit until told to stop."""
        while not stop.is_set():
            namespace, channel = self._random.choice(PLACES)
            requests: list[dict[str, Any]] = []
            for _ in range(self._random.randint(1, _MOST_AT_ONCE)):
                self._number += 1
                refused = f"{REFUSED} " if self._random.random() < 0.03 else ""
                prompt = f"{refused}question {self._number}"
                requests.append({"prompt": prompt, "idempotency_key": f"key {self._number}"})
            await self._submit(requests, namespace, channel)
            await asyncio.sleep(self._random.uniform(0.05, 0.35))

    async def _submit(self, requests: list[dict[str, Any]], namespace: str, channel: str) -> None:
        while True:
            try:
                jobs = await self._client.submit_many(
                    requests,
                    namespace=namespace,
                    channel=channel,
                    reuse="off",
                    priority=self._random.randint(0, 9),
                )
            except ServiceError:
                self.repeated += 1
                await asyncio.sleep(_AGAIN_S)
                continue
            for job, request in zip(jobs, requests, strict=True):
                self.prompts[job.id] = request["prompt"]
                self.places[job.id] = (namespace, channel)
            return


class Consumers:
    """Every group of every channel, and one reader beside them that sees each repeat."""

    def __init__(self, client: AsyncJobClient, redis: Redis) -> None:
        self._client = client
        self._redis = redis
        #: Results by group and job, in order of arrival.
        self.by_group: dict[str, dict[UUID, list[JobResult]]] = {
            group: defaultdict(list) for group in GROUPS
        }
        #: Entries of the channels as they are, by job and token.
        self.raw: dict[tuple[UUID, int], list[bytes]] = defaultdict(list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Consume while the block runs."""
        tasks = [asyncio.create_task(self._read_all(), name="reader")]
        for group in GROUPS:
            for namespace, channel in PLACES:
                work = self._consume(group, namespace, channel)
                tasks.append(asyncio.create_task(work, name=f"{group}-{namespace}-{channel}"))
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _consume(self, group: str, namespace: str, channel: str) -> None:
        while True:
            heed_cancellation()
            try:
                results = await self._client.results(channel, group, "only", namespace=namespace)
                async for delivery in results:
                    heed_cancellation()
                    self.by_group[group][delivery.result.job_id].append(delivery.result)
                    await results.ack(delivery)
                    if group == GROUPS[1] and random.random() < _AWAY_SHARE:  # noqa: S311
                        await asyncio.sleep(AWAY_S)
            except ServiceError:
                await asyncio.sleep(_AGAIN_S)

    async def _read_all(self) -> None:
        cursors: dict[Any, Any] = {names.results_stream(*place): "0-0" for place in PLACES}
        while True:
            heed_cancellation()
            try:
                replies: Any = await self._redis.xread(cursors, block=500)
            except (RedisError, OSError):
                await asyncio.sleep(_AGAIN_S)
                continue
            pairs = replies.items() if isinstance(replies, dict) else replies
            for stream, found in pairs:
                entries = found[0] if found and isinstance(found[0], list) else found
                for at, fields in entries:
                    key = (UUID(fields[b"job_id"].decode()), int(fields[b"token"]))
                    self.raw[key].append(fields[b"result"])
                    cursors[stream.decode()] = at
