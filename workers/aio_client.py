"""`AsyncJobClient`: what a producer in asyncio code uses, and the core of `JobClient`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self, Unpack
from uuid import UUID

import orjson

from schema import names
from schema.errors import ConfigurationError, InvalidRequestError, ServiceError
from schema.jobs import JobSpec, JobState
from schema.refusal import did_you_mean
from workers.cursors import START
from workers.jobs import AsyncJob, JobRef
from workers.outcome import not_found, outcome
from workers.streams import broker_errors
from workers.submission import SubmitDefaults, SubmitOptions, build_spec, build_specs
from workers.token_stream import follow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from schema.jobs import JobResult, JobStatus
    from workers.channel import TokenDelta
    from workers.connection import Connection
    from workers.consumer import ChannelConsumer
    from workers.sending import Sender
    from workers.settings import Settings
    from workers.store.records import Delivery

#: A job as callers name it: the handle, the id, or the id as text.
JobName = JobRef | UUID | str


# Jobs that are queued once more in one statement, so that no lock is held for long.
_RETRY_AT_ONCE = 10_000


class AsyncJobClient:
    """Submits jobs and reads their results.

    With a database the job's row is written first and its message after it: a job that was accepted
    is safe, and runs even if Redis was away at that moment, for recovery sends the message later.
    With Redis alone the whole job rides in the message: it is as safe as that Redis' data, and
    results are found in the channel for as long as the channel keeps them. A job is lost then if
    its worker is killed, or its connection breaks, in the instant in which it takes the message out
    of the queue; submit under an ``idempotency_key`` and do so again when in doubt.

    It connects when it is first used, and belongs to the event loop in which that happens.

    Args:
        settings: Read from the environment.
        wait_s: Seconds that a submission waits for room in a full queue.
    """

    def __init__(self, settings: Settings, *, wait_s: float = 0.0) -> None:
        self.settings = settings
        self._wait_s = wait_s
        self._connection: Connection | None = None
        self._sender: Sender | None = None
        self._opening: asyncio.Lock | None = None
        self._defaults = SubmitDefaults(
            namespace=settings.namespace, max_prompt_bytes=settings.max_prompt_bytes
        )

    @classmethod
    def from_settings(cls, settings: Settings | None = None, *, wait_s: float = 0.0) -> Self:
        """Return a client of the servers that the environment names, or of the embedded ones.

        Args:
            settings: Read already; None reads the environment.
            wait_s: Seconds that a submission waits for room in a full queue.

        Raises:
            ConfigurationError: A variable holds a value that cannot be used.
        """
        from workers.settings import load_settings

        return cls(settings or load_settings(), wait_s=wait_s)

    async def __aenter__(self) -> Self:
        """Connect."""
        await self.connection()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        await self.aclose()

    async def connection(self) -> Connection:
        """Return the open resources, opening them first if need be.

        Raises:
            ConfigurationError: No server is named and none is embedded, or an address is wrong.
            StackError: The embedded stack did not start.
        """
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._connection is None:
                from workers.connection import Connection

                self._connection = await Connection.open(self.settings)
        return self._connection

    async def aclose(self) -> None:
        """Close every connection; idempotent. Jobs go on."""
        connection, self._connection, self._sender = self._connection, None, None
        if connection is not None:
            await connection.aclose()

    async def submit(self, prompt: str | None = None, **options: Unpack[SubmitOptions]) -> AsyncJob:
        """Submit one job.

        Args:
            prompt: Text as the model shall see it; or give ``messages``, or ``body``.
            options: See `workers.submission.SubmitOptions`.

        Returns:
            A handle on the job.

        Raises:
            InvalidRequestError: A value cannot be accepted; nothing was enqueued.
            UnknownModelError: No worker serves that model; nothing was enqueued.
            IdempotencyConflictError: The key was used before with another request.
            QueueFullError: The queue is at its bound; nothing was enqueued.
            DatabaseUnavailableError: Postgres cannot be used: nothing was enqueued.
            BrokerUnavailableError: Redis cannot be used, and there is no database.
        """
        return (await self.submit_specs([build_spec(prompt, options, self._defaults)]))[0]

    async def submit_many(
        self,
        requests: Iterable[str | Mapping[str, Any] | JobSpec],
        **common: Unpack[SubmitOptions],
    ) -> list[AsyncJob]:
        """Submit many jobs; all are checked before the first is enqueued.

        Args:
            requests: Prompts, mappings with ``prompt`` and options, or `JobSpec` values.
            common: Options for those that do not say otherwise.

        Returns:
            A handle for each, in order.

        Raises:
            InvalidRequestError: One cannot be accepted, and the field says which; nothing was
                enqueued.
            PromptmillError: As `submit`; the groups before the failing one were accepted.
        """
        specs = list(build_specs(requests, common, self._defaults))
        jobs: list[AsyncJob] = []
        # Group by group, so that a million jobs are not one statement.
        step = 8 * self.settings.message_jobs
        for at in range(0, len(specs), step):
            jobs += await self.submit_specs(specs[at : at + step])
        return jobs

    async def submit_specs(
        self, specs: Sequence[JobSpec], *, wait_s: float | None = None
    ) -> list[AsyncJob]:
        """Submit one group of jobs that were checked already.

        Args:
            specs: Valid jobs; those with a key bear the id that the key decides.
            wait_s: Seconds to wait for room in a full queue; the client's own unless told.

        Returns:
            A handle for each, in order.

        Raises:
            PromptmillError: As `submit`.
        """
        if not specs:
            return []
        sender = await self._get_sender()
        sent = await sender.send(specs, wait_s=self._wait_s if wait_s is None else wait_s)
        return [
            AsyncJob(
                id=spec.id,
                namespace=spec.namespace,
                channel=spec.channel,
                known=spec.id in sent.known,
                cursor=sent.cursors.get((spec.namespace, spec.channel), START),
                client=self,
            )
            for spec in specs
        ]

    async def status(self, job: JobName, *, namespace: str | None = None) -> JobStatus:
        """Return where a job stands.

        Args:
            job: Handle or id.
            namespace: Tenant; the settings' own unless told.

        Raises:
            JobNotFoundError: The namespace has no such job.
            ConfigurationError: This client has no database.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        ref = self._ref(job, namespace)
        store = (await self.connection()).store("the status of a job")
        status = await store.status(ref.namespace, ref.id)
        if status is None:
            raise not_found(ref)
        return status

    async def request(self, job: JobName, *, namespace: str | None = None) -> dict[str, Any]:
        """Return what a job asks.

        Args:
            job: Handle or id.
            namespace: Tenant; the settings' own unless told.

        Returns:
            A `schema.jobs.PromptRequest` or `OpenAIRequest` as JSON types.

        Raises:
            JobNotFoundError: The namespace has no such job.
            ConfigurationError: This client has no database.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        ref = self._ref(job, namespace)
        store = (await self.connection()).store("the request of a job")
        request = await store.request(ref.namespace, ref.id)
        if request is None:
            raise not_found(ref)
        return dict(request)

    async def result(
        self,
        job: JobName,
        timeout_s: float | None = None,
        *,
        namespace: str | None = None,
        channel: str = names.DEFAULT_CHANNEL,
    ) -> JobResult:
        """Wait for the outcome of a job.

        Args:
            job: Handle or id.
            timeout_s: Seconds to wait at most; None waits for ever, 0 only looks.
            namespace: Tenant; the settings' own unless told.
            channel: Where to look for the result without a database, when only the id is given.

        Returns:
            The result, whatever the job's last state: look at its ``status``.

        Raises:
            ResultTimeoutError: The job was not over in time; the message says where it stands.
            JobNotFoundError: The namespace has no such job.
            ServiceError: Postgres, or Redis without a database, cannot be used now.
        """
        ref = self._ref(job, namespace, channel)
        return await outcome(await self.connection(), ref, timeout_s)

    async def cancel(self, job: JobName, *, namespace: str | None = None) -> bool:
        """Cancel a job: at once if it waits, as soon as its worker hears of it if it runs.

        Args:
            job: Handle or id.
            namespace: Tenant; the settings' own unless told.

        Returns:
            Whether it was still to be cancelled. A run that ends before its worker hears of it
            keeps its outcome.

        Raises:
            JobNotFoundError: The namespace has no such job.
            ConfigurationError: This client has no database.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        ref = self._ref(job, namespace)
        connection = await self.connection()
        store = connection.store("cancelling")
        done = await store.cancel(ref.namespace, [ref.id])
        if done.ignored and await store.status(ref.namespace, ref.id) is None:
            raise not_found(ref)
        await self.announce(ref.namespace, done.ended, done.running)
        return not done.ignored

    async def announce(
        self, namespace: str, ended: Sequence[Delivery], running: Iterable[UUID]
    ) -> None:
        """Tell of cancelled jobs: consumers of those that ended, workers of those that run.

        Args:
            namespace: Tenant.
            ended: Outcomes to publish.
            running: Jobs to be stopped.

        Raises:
            BrokerUnavailableError: Redis failed. The cancellation stands: workers see it with
                their next heartbeat, and recovery publishes.
        """
        connection = await self.connection()
        if ids := [str(job_id) for job_id in running]:
            notice = orjson.dumps({"v": names.WIRE_VERSION, "namespace": namespace, "ids": ids})
            with broker_errors("announcing a cancellation"):
                await connection.redis.publish(names.CANCELLATIONS, notice)
        if ended:
            found = [(over.channel, over.result) for over in ended]
            epoch = await connection.channel.publish(found)
            tokens = {over.result.job_id: over.result.token for over in ended}
            await connection.store("cancelling").mark_published(tokens, epoch=epoch)

    async def retry(
        self,
        *jobs: JobName,
        namespace: str | None = None,
        batch_id: UUID | None = None,
        states: Iterable[JobState | str] = (JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED),
    ) -> list[UUID]:
        """Run jobs that are over once more, as if they had never run.

        Args:
            jobs: Handles or ids.
            namespace: Tenant; the settings' own unless told.
            batch_id: Instead of single jobs: those of one batch.
            states: Only those that ended so.

        Returns:
            The jobs that are queued again.

        Raises:
            InvalidRequestError: Neither jobs nor a batch were given.
            ConfigurationError: This client has no database.
            ServiceError: Postgres or Redis cannot be used now.
        """
        if not jobs and batch_id is None:
            msg = "say which jobs, or which batch, to run once more"
            raise InvalidRequestError(msg, field="jobs")
        refs = [self._ref(job, namespace) for job in jobs]
        store = (await self.connection()).store("running jobs once more")
        sender = await self._get_sender()
        again: dict[UUID, None] = {}
        tenants = {ref.namespace for ref in refs} or {namespace or self.settings.namespace}
        for tenant in sorted(tenants):
            more = True
            while more:
                addresses = await store.retry(
                    tenant,
                    ids=[ref.id for ref in refs if ref.namespace == tenant] or None,
                    batch_id=batch_id,
                    states=[_state(state) for state in states],
                    limit=_RETRY_AT_ONCE,
                )
                await sender.send_again(addresses)
                # One that has failed again by now is not run a third time.
                fresh = [address.id for address in addresses if address.id not in again]
                again |= dict.fromkeys(fresh)
                more = len(addresses) == _RETRY_AT_ONCE and bool(fresh)
        return list(again)

    async def jobs(
        self,
        *,
        namespace: str | None = None,
        state: JobState | str | None = None,
        batch_id: UUID | None = None,
        limit: int = 100,
        before: UUID | None = None,
    ) -> list[JobStatus]:
        """Return jobs, newest first.

        Args:
            namespace: Tenant; the settings' own unless told.
            state: Only those that stand so.
            batch_id: Only those of one batch.
            limit: How many at most.
            before: The last job of the page before.

        Raises:
            ConfigurationError: This client has no database.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        store = (await self.connection()).store("listing jobs")
        return await store.list_jobs(
            namespace or self.settings.namespace,
            state=None if state is None else _state(state),
            batch_id=batch_id,
            limit=limit,
            before=before,
        )

    async def results(
        self,
        channel: str = names.DEFAULT_CHANNEL,
        group: str = "default",
        consumer: str = "default",
        *,
        namespace: str | None = None,
        cursor: str = START,
    ) -> ChannelConsumer:
        """Join a consumer group on a result channel.

        Args:
            channel: Name of the channel.
            group: The group; each result goes to one of its members.
            consumer: This member: the same name after a restart, and nobody else's.
            namespace: Tenant; the settings' own unless told.
            cursor: Where a new group begins; unless told with the oldest result kept. One that is
                there goes on where it was, unless it is told to `replay`.

        The group is registered in Postgres, if this client has it, and otherwise by the workers
        within seconds: from then on it gets what it has not acknowledged even if Redis loses it.

        Returns:
            An endless async iterator of deliveries, with `ack` and `replay`; repeats are dropped.

        Raises:
            InvalidRequestError: `cursor` is no place in a channel.
        """
        connection = await self.connection()
        tenant = namespace or self.settings.namespace
        ledger = connection.ledger

        async def register() -> None:
            if ledger is not None:
                from workers.store.records import ResultGroup

                # Nothing depends on it: workers register what they see.
                with contextlib.suppress(ServiceError, ConfigurationError):
                    await ledger.register_group(
                        ResultGroup(namespace=tenant, channel=channel, name=group)
                    )

        return connection.channel.consume(
            tenant, channel, group, consumer, cursor=cursor, on_join=register
        )

    async def stream(
        self, job: JobName, cursor: str = START, *, namespace: str | None = None
    ) -> AsyncIterator[TokenDelta]:
        """Yield a job's text as it grows; see `workers.token_stream.follow`.

        Args:
            job: Handle or id, of a job submitted with ``stream=True``.
            cursor: Of the last delta that the caller has.
            namespace: Tenant; the settings' own unless told.
        """
        connection = await self.connection()
        async for delta in follow(connection, self._ref(job, namespace), cursor):
            yield delta

    async def served_models(self) -> frozenset[str]:
        """Return the models that living workers serve, as far as is known.

        Returns:
            Names; empty also when Redis cannot be asked.
        """
        return await (await self._get_sender()).served_models()

    async def _get_sender(self) -> Sender:
        connection = await self.connection()
        if self._sender is None:
            from workers.sending import Sender

            self._sender = Sender(connection, self.settings)
        return self._sender

    def _ref(
        self, job: JobName, namespace: str | None, channel: str = names.DEFAULT_CHANNEL
    ) -> JobRef:
        if isinstance(job, JobRef):
            return job
        if isinstance(job, str):
            try:
                job = UUID(job)
            except ValueError:
                msg = "is not the id of a job, such as 6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
                raise InvalidRequestError(msg, field="job", value=job) from None
        return JobRef(id=job, namespace=namespace or self.settings.namespace, channel=channel)


def _state(state: JobState | str) -> JobState:
    try:
        return JobState(state)
    except ValueError:
        known = [known.value for known in JobState]
        msg = f"must be one of {', '.join(known)}{did_you_mean(str(state), known)}"
        raise InvalidRequestError(msg, field="state", value=state) from None
