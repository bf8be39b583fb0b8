"""Admission: the row first, then the message."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schema import wire
from schema.errors import (
    BrokerUnavailableError,
    InvalidRequestError,
    QueueFullError,
    UnknownModelError,
)
from schema.refusal import did_you_mean
from workers import registry, windows
from workers.cursors import START
from workers.endpoints import BUNDLED, served_name
from workers.server_clock import ServerClock
from workers.streams import broker_errors
from workers.tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from schema.jobs import JobSpec
    from workers.connection import Connection
    from workers.settings import Settings
    from workers.store.records import JobAddress

_REGISTRY_FRESH_S = 5.0
_FULL_RETRY_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What became of a group of jobs."""

    known: frozenset[UUID]  # were accepted before, by an earlier submission
    cursors: dict[tuple[str, str], str]  # channel's end before sending, by (namespace, channel)


class Sender:
    """Writes jobs to Postgres and to the queue.

    Args:
        connection: Open resources. The caller closes them.
        settings: Limits, and the default model.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._clock = ServerClock(connection.ledger)
        self._tracing = Tracing.start(settings)
        self._served: frozenset[str] = frozenset()
        self._served_until = 0.0
        self._windows: dict[str, tuple[int, float]] = {}  # and until when each is believed

    async def send(self, jobs: Sequence[JobSpec], *, wait_s: float = 0.0) -> Sent:
        """Accept jobs: with a database they are safe from then on, whatever becomes of Redis.

        Args:
            jobs: Valid jobs.
            wait_s: Seconds to wait for room in a full queue.

        Returns:
            Which were known already, and where their results will begin.

        Raises:
            QueueFullError: The queue is at its bound, and stayed so.
            UnknownModelError: No worker serves the model that a job names.
            IdempotencyConflictError: An idempotency key was used before with another request.
            DatabaseUnavailableError: Postgres cannot be used: nothing was accepted.
            BrokerUnavailableError: Redis cannot be used and there is no database: some of the jobs
                may have been accepted.
        """
        model = await self._models(jobs)
        until = time.monotonic() + wait_s
        while True:
            try:
                with self._tracing.span("submit", kind="producer", jobs=len(jobs), model=model):
                    return await self._accept(jobs, model)
            except QueueFullError:
                if time.monotonic() + _FULL_RETRY_S >= until:
                    raise
            await asyncio.sleep(_FULL_RETRY_S)

    async def served_models(self) -> frozenset[str]:
        """Return the models that living workers serve, as of some seconds ago.

        Returns:
            Names; empty also when Redis cannot be asked.
        """
        if time.monotonic() >= self._served_until:
            # Advice only: without Redis a row can still be written.
            with contextlib.suppress(BrokerUnavailableError):
                self._served = await registry.served_models(self._connection.redis)
                self._served_until = time.monotonic() + _REGISTRY_FRESH_S
        return self._served

    async def send_again(self, addresses: Iterable[JobAddress]) -> None:
        """Send messages for jobs that have rows and were queued once more.

        Args:
            addresses: From the store.

        Raises:
            BrokerUnavailableError: Redis failed; recovery sends them later.
        """
        jobs = [job for job in addresses if not job.held]
        await self.push(jobs)
        if self._connection.ledger is not None:
            await self._connection.ledger.mark_sent(job.id for job in jobs)

    async def push(self, jobs: Sequence[JobAddress]) -> None:
        """Write messages for jobs whose rows say already that they were sent.

        Args:
            jobs: In the order in which they are to be read.

        Raises:
            BrokerUnavailableError: Redis failed; some messages may have been written.
        """
        groups: dict[wire.Route, list[UUID]] = {}
        messages = []
        for job in jobs:
            route = wire.Route(namespace=job.namespace, model=job.model, priority=job.priority)
            group = groups.setdefault(route, [])
            group.append(job.id)
            if len(group) == self._settings.message_jobs:
                messages.append((route, group))
                del groups[route]
        messages += groups.items()
        now = await self._clock.now()
        await self._push(
            [
                (
                    route,
                    wire.JobMessage(namespace=route.namespace, sent_at=now, ids=tuple(ids)),
                )
                for route, ids in messages
            ]
        )

    async def _accept(self, jobs: Sequence[JobSpec], model: str) -> Sent:
        ledger = self._connection.ledger
        if ledger is None:
            await self._check_room(jobs, model)
            cursors = await self._ends(jobs)
            await self._push(self._messages(jobs, model, full=True, now=time.time()))
            return Sent(known=frozenset(), cursors=cursors)
        admitted = await ledger.admit(
            jobs,
            default_model=model,
            sent=True,
            max_attempts=self._settings.max_attempts,
            queue_limit=self._settings.queue_limit,
            windows={
                name: await self._window(name) for name in {job.model or model for job in jobs}
            },
            traceparent=self._tracing.traceparent(),
        )
        fresh = {job.id: job for job in jobs if job.id in admitted.inserted - admitted.held}
        # The rows stand: whatever becomes of Redis now, recovery sends the messages that are
        # missing. Telling the caller would make it submit what was accepted.
        with contextlib.suppress(BrokerUnavailableError):
            messages = self._messages(
                list(fresh.values()), model, full=False, now=await self._clock.now()
            )
            await self._push(messages)
        return Sent(known=admitted.known, cursors={})

    async def _window(self, model: str) -> int:
        if self._settings.namespace_window is not None:
            return self._settings.namespace_window
        known, until = self._windows.get(model, (windows.DEFAULT_WINDOW, 0.0))
        if time.monotonic() >= until:
            # Advice only, as above.
            with contextlib.suppress(BrokerUnavailableError):
                known = await windows.window(self._connection.redis, model)
            self._windows[model] = known, time.monotonic() + _REGISTRY_FRESH_S
        return known

    def _messages(
        self, jobs: Iterable[JobSpec], model: str, *, full: bool, now: float
    ) -> list[tuple[wire.Route, wire.JobMessage]]:
        messages = []
        for route, group in wire.grouped(jobs, model=model, limit=self._settings.message_jobs):
            what: dict[str, Any] = (
                {"jobs": tuple(group)} if full else {"ids": tuple(job.id for job in group)}
            )
            message = wire.JobMessage(
                namespace=route.namespace,
                sent_at=now,
                # A job that has a row bears it there.
                traceparent=self._tracing.traceparent() if full else None,
                **what,
            )
            messages.append((route, message))
        return messages

    async def _push(self, messages: Sequence[tuple[wire.Route, wire.JobMessage]]) -> None:
        if not messages:
            return
        with broker_errors("sending jobs"):
            async with self._connection.redis.pipeline(transaction=False) as pipe:
                for route, message in messages:
                    pipe.lpush(route.key, wire.encode(message, route))
                await pipe.execute()

    async def _check_room(self, jobs: Sequence[JobSpec], model: str) -> None:
        # Without rows to count, the messages that wait are the measure.
        limit = self._settings.queue_limit
        keys = {route.key for route, _ in wire.grouped(jobs, model=model, limit=len(jobs) or 1)}
        with broker_errors("counting what waits"):
            async with self._connection.redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.llen(key)
                waiting = sum(await pipe.execute())
        if waiting >= limit:
            msg = f"about {waiting} messages wait and {limit} jobs may; submit again later"
            raise QueueFullError(msg)

    async def _ends(self, jobs: Sequence[JobSpec]) -> dict[tuple[str, str], str]:
        # A job with a key may have been answered long ago: its result is looked for from the start.
        keyed = {(job.namespace, job.channel) for job in jobs if job.idempotency_key is not None}
        channels = {(job.namespace, job.channel) for job in jobs}
        return {
            (namespace, channel): START
            if (namespace, channel) in keyed
            else await self._connection.channel.end(namespace, channel)
            for namespace, channel in channels
        }

    async def _models(self, jobs: Sequence[JobSpec]) -> str:
        """Check the models that the jobs name, and return the one for those that name none."""
        own = served_name(self._settings)
        named = {job.model for job in jobs} - {None}
        if own is not None and not named:
            return own
        served = await self.served_models()
        for model in sorted(str(name) for name in named):
            if served and model not in served:
                msg = f"no worker serves {model!r}; served are {', '.join(sorted(served))}"
                raise UnknownModelError(
                    f"{msg}{did_you_mean(model, served)}", field="model", value=model
                )
        if own is not None or not served:
            return own or BUNDLED
        if len(served) == 1 or all(job.model for job in jobs):
            return min(served)
        if BUNDLED in served:
            return BUNDLED
        msg = f"name one of the models that are served: {', '.join(sorted(served))}"
        raise InvalidRequestError(msg, field="model")
