"""`JobClient`: what a producer uses. A thin bridge to `AsyncJobClient`, which documents each call.

Example::

    from workers import JobClient

    with JobClient.from_settings() as client:
        job = client.submit("The capital of France is", sampling={"max_tokens": 8})
        print(job.id, job.result(timeout_s=60).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, Unpack

from schema.names import DEFAULT_CHANNEL
from workers.cursors import START
from workers.jobs import Job
from workers.loop_thread import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from uuid import UUID

    from schema.jobs import JobResult, JobSpec, JobState, JobStatus
    from workers.aio_client import JobName
    from workers.batch import BatchOptions, BatchProgress
    from workers.channel import TokenDelta
    from workers.consumer import ChannelConsumer
    from workers.jobs import AsyncJob
    from workers.settings import Settings
    from workers.streams import Delivery
    from workers.submission import SubmitOptions


class JobClient:
    """Submits jobs and reads their results, from code without an event loop and from any thread.

    Args:
        settings: Read from the environment.
        wait_s: Seconds that a submission waits for room in a full queue.
    """

    def __init__(self, settings: Settings, *, wait_s: float = 0.0) -> None:
        from workers.aio_client import AsyncJobClient  # late: most of what an import costs

        self._aio = AsyncJobClient(settings, wait_s=wait_s)
        self._thread = LoopThread("promptmill client")

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

    def __enter__(self) -> Self:
        """Connect."""
        self._thread.run(self._aio.connection())
        return self

    def __exit__(self, *_: object) -> None:
        """Close every connection."""
        self.close()

    def close(self) -> None:
        """Close every connection; idempotent. Jobs go on."""
        self._thread.run(self._aio.aclose())
        self._thread.close()

    @property
    def settings(self) -> Settings:
        """What the client was opened with."""
        return self._aio.settings

    def submit(self, prompt: str | None = None, **options: Unpack[SubmitOptions]) -> Job:
        """Submit one job; see `AsyncJobClient.submit`."""
        return self._job(self._thread.run(self._aio.submit(prompt, **options)))

    def submit_many(
        self,
        requests: Iterable[str | Mapping[str, Any] | JobSpec],
        **common: Unpack[SubmitOptions],
    ) -> list[Job]:
        """Submit many jobs; see `AsyncJobClient.submit_many`."""
        # Read here: a caller's generator must not run in the client's own thread.
        listed = list(requests)
        jobs = self._thread.run(self._aio.submit_many(listed, **common))
        return [self._job(job) for job in jobs]

    def status(self, job: JobName, *, namespace: str | None = None) -> JobStatus:
        """Return where a job stands; see `AsyncJobClient.status`."""
        return self._thread.run(self._aio.status(job, namespace=namespace))

    def result(
        self,
        job: JobName,
        timeout_s: float | None = None,
        *,
        namespace: str | None = None,
        channel: str = DEFAULT_CHANNEL,
    ) -> JobResult:
        """Wait for the outcome of a job; see `AsyncJobClient.result`."""
        waiting = self._aio.result(job, timeout_s, namespace=namespace, channel=channel)
        return self._thread.run(waiting)

    def request(self, job: JobName, *, namespace: str | None = None) -> dict[str, Any]:
        """Return what a job asks; see `AsyncJobClient.request`."""
        return self._thread.run(self._aio.request(job, namespace=namespace))

    def served_models(self) -> frozenset[str]:
        """Return the models that are served; see `AsyncJobClient.served_models`."""
        return self._thread.run(self._aio.served_models())

    def cancel(self, job: JobName, *, namespace: str | None = None) -> bool:
        """Cancel a job; see `AsyncJobClient.cancel`."""
        return self._thread.run(self._aio.cancel(job, namespace=namespace))

    def retry(
        self,
        *jobs: JobName,
        namespace: str | None = None,
        batch_id: UUID | None = None,
        states: Iterable[JobState | str] = ("failed", "expired", "cancelled"),
    ) -> list[UUID]:
        """Run jobs that are over once more; see `AsyncJobClient.retry`."""
        again = self._aio.retry(*jobs, namespace=namespace, batch_id=batch_id, states=states)
        return self._thread.run(again)

    def jobs(
        self,
        *,
        namespace: str | None = None,
        state: JobState | str | None = None,
        batch_id: UUID | None = None,
        limit: int = 100,
        before: UUID | None = None,
    ) -> list[JobStatus]:
        """Return jobs, newest first; see `AsyncJobClient.jobs`."""
        listing = self._aio.jobs(
            namespace=namespace, state=state, batch_id=batch_id, limit=limit, before=before
        )
        return self._thread.run(listing)

    def results(
        self,
        channel: str = DEFAULT_CHANNEL,
        group: str = "default",
        consumer: str = "default",
        *,
        namespace: str | None = None,
        cursor: str = START,
    ) -> Results:
        """Join a consumer group on a result channel; see `AsyncJobClient.results`."""
        joining = self._aio.results(channel, group, consumer, namespace=namespace, cursor=cursor)
        return Results(self._thread, self._thread.run(joining))

    def stream(
        self, job: JobName, cursor: str = START, *, namespace: str | None = None
    ) -> Iterator[TokenDelta]:
        """Yield a job's text as it grows; see `AsyncJobClient.stream`."""
        return self._thread.iterate(self._aio.stream(job, cursor, namespace=namespace))

    def run_batch(
        self,
        source: str,
        target: str,
        options: BatchOptions | None = None,
        *,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> BatchProgress:
        """Answer every row of a batch file; see `workers.batch.run_batch`."""
        from workers.batch import BatchOptions, run_batch

        given = options or BatchOptions()
        return self._thread.run(
            run_batch(self._aio, source, target, given, on_progress=on_progress)
        )

    def _job(self, job: AsyncJob) -> Job:
        return Job(
            id=job.id,
            namespace=job.namespace,
            channel=job.channel,
            known=job.known,
            cursor=job.cursor,
            client=self,
        )


class Results:
    """An endless iterator of deliveries on a channel, with `ack` and `replay`.

    Args:
        thread: Runs what has to be waited for.
        consumer: The member of the group.
    """

    def __init__(self, thread: LoopThread, consumer: ChannelConsumer) -> None:
        self._thread = thread
        self._consumer = consumer

    def __iter__(self) -> Iterator[Delivery]:
        """Yield results as they come; see `ChannelConsumer`."""
        return self._thread.iterate(aiter(self._consumer))

    def ack(self, *deliveries: Delivery) -> None:
        """Say that these are done with; see `ChannelConsumer.ack`."""
        self._thread.run(self._consumer.ack(*deliveries))

    def replay(self, cursor: str = START) -> None:
        """Have the group be given again what came after a cursor; see `ChannelConsumer.replay`."""
        self._thread.run(self._consumer.replay(cursor))
