"""The way of a job through a worker, from the message to the acknowledgement.

Read it from top to bottom:

1. `run_message` takes a queue message. Jobs that came in full are written to Postgres first, by
   `Intake`.
2. As engine slots free, jobs are claimed: a lease, and a fencing token that only grows.
3. `_run` answers one job, while the lease keeper renews its lease. Requests that this worker knows
   the answer to need no run: they skip to the next step, all of a group together, and while nearly
   all are such they need no claim either.
4. `_commit_all`: one transaction for answer, embedding, NLP result and outcome.
5. `_publish`: the outcome goes on its result channel, and is marked as published.
6. `run_message` returns when all its jobs have ended, and Celery acknowledges the message.

Commit before publish, publish before acknowledge: a worker that dies between two steps leaves
something that another can go on with.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog
from cachetools import LRUCache
from vllm.v1.engine.exceptions import EngineDeadError

from schema.errors import BrokerUnavailableError, DatabaseUnavailableError
from schema.jobs import JobError, JobState
from schema.names import DEFAULT_PRIORITY
from workers import job_lines, logs
from workers.answering import Answerer, TryAgainError, failed
from workers.display import Display
from workers.growing_text import GrowingText
from workers.hits import HitCounter
from workers.intake import Intake
from workers.leases import Holding, LeaseKeeper, Stopped
from workers.patience import Patience
from workers.publishing import Publisher
from workers.recall import Recall
from workers.slots import Slots
from workers.store.records import Claim, ClaimedJob, Delivery, Outcome
from workers.tracing import Tracing, describe_answer, trace_id

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from schema.wire import JobMessage
    from workers.channel import ResultChannel
    from workers.metrics import Meter
    from workers.store.commit import GroupCommit
    from workers.store.jobs import JobStore

_log = structlog.get_logger(__name__)

_IDLE_LOOK_S = 0.02
_STORED_REMEMBERED = 20_000  # answers known to be in Postgres; twice what the memory tier has
_STOPPED = {
    Stopped.CANCELLED: (JobState.CANCELLED, "JobCancelled", "cancelled while it ran"),
    Stopped.EXPIRED: (JobState.EXPIRED, "DeadlinePassed", "its deadline passed while it ran"),
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Limits of the pipeline."""

    model: str  # name the worker's model is served under
    owner: str  # name of the worker, for people
    lease_s: float
    max_attempts: int  # of jobs that state none
    show_prompts: bool = False  # in the log and to whoever inspects the worker
    backoff_s: float = 1.0  # before the second attempt; doubles after
    backoff_most_s: float = 60.0
    waiting_s: float = 0.2  # between two tries of a server that is away; doubles after
    waiting_most_s: float = 5.0

    def delay_s(self, attempts: int) -> float:
        """Return how long a job waits for its next attempt.

        Exponential back-off with jitter (M. Brooker, AWS Architecture Blog, 2015).

        Args:
            attempts: How many it has had.
        """
        most = min(self.backoff_s * 2 ** (attempts - 1), self.backoff_most_s)
        return random.uniform(most / 2, most)  # noqa: S311  no secret


class Pipeline:
    """Runs jobs.

    Args:
        rules: Limits.
        answerer: Answers a claimed job.
        jobs: The job store.
        commit: Commits outcomes in groups.
        publisher: Publishes them in groups.
        channel: Takes the text of growing answers.
        leases: Keeps what is in flight.
        slots: Places in the engine.
        hits: Counts how often stored answers were given.
        recall: Knows the answers to requests that were answered here before.
        meter: Told what becomes of jobs.
        tracing: Makes the spans of jobs.
    """

    def __init__(
        self,
        *,
        rules: Rules,
        answerer: Answerer,
        jobs: JobStore,
        commit: GroupCommit,
        publisher: Publisher,
        channel: ResultChannel,
        leases: LeaseKeeper,
        slots: Slots,
        hits: HitCounter,
        recall: Recall,
        meter: Meter,
        tracing: Tracing,
    ) -> None:
        self._rules = rules
        self._answerer = answerer
        self._jobs = jobs
        self._commit_group = commit
        self._publisher = publisher
        self._channel = channel
        self._leases = leases
        self._slots = slots
        self._hits = hits
        self._recall = recall
        self._meter = meter
        self._tracing = tracing
        self._patience = Patience(first_s=rules.waiting_s, most_s=rules.waiting_most_s)
        self._intake = Intake(
            jobs,
            publish=self._publish,
            patience=self._patience,
            model=rules.model,
            max_attempts=rules.max_attempts,
        )
        self._one_suspect = asyncio.Lock()
        self._stored: LRUCache[UUID, bool] = LRUCache(_STORED_REMEMBERED)
        self._in_hand: dict[object, float] = {}  # messages, and when each was written
        self._unclaimed = 0  # jobs of messages in hand that wait for a slot
        #: What of the jobs is shown to people.
        self.display = Display(on=rules.show_prompts)
        #: Called when the worker wants messages again; see `hungry`.
        self.on_hungry: Callable[[], None] = lambda: None
        #: Set when vLLM's engine has died: the process is to be replaced.
        self.engine_died = asyncio.Event()

    async def run_message(self, message: JobMessage, *, priority: int = DEFAULT_PRIORITY) -> None:
        """Run the jobs of a message; return when the message may be acknowledged.

        Jobs that others hold, that are over or that are not due yet are passed over: they have a
        row, and recovery sends them again when that is needed.

        Args:
            message: Decoded.
            priority: Of all its jobs; 0 is served first.

        Raises:
            asyncio.CancelledError: The worker stops; jobs in flight were given back.
        """
        in_hand = object()
        self._in_hand[in_hand] = message.sent_at
        try:
            ids = [*message.ids, *await self._intake.admit(message)]
            await self._run_all(list(dict.fromkeys(ids)), priority)
        finally:
            del self._in_hand[in_hand]

    @property
    def oldest_sent_at(self) -> float | None:
        """When the oldest message in this worker's hands was written; Unix time."""
        return min(self._in_hand.values(), default=None)

    @property
    def hungry(self) -> bool:
        """Whether another message is of use: no more than a round of jobs waits here already.

        More would only be out of reach of other workers, and of what is more urgent.
        """
        return self._unclaimed < self._slots.places

    @property
    def running(self) -> int:
        """Jobs in flight."""
        return len(self._leases)

    @property
    def total_slots(self) -> int:
        """Jobs that may be in flight."""
        return self._slots.total

    async def idle(self, *, timeout_s: float) -> None:
        """Return when no job is in flight, or the time is over.

        Args:
            timeout_s: Seconds.
        """
        end = asyncio.get_running_loop().time() + timeout_s
        while self.running and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110  bounded
            await asyncio.sleep(_IDLE_LOOK_S)

    async def give_up(self) -> None:
        """Give back all that is in flight, as suspects: the engine answers no more."""
        self.engine_died.set()
        try:
            await self._jobs.suspect(self._leases.held)
        except DatabaseUnavailableError as exc:
            _log.warning("jobs not given back; their leases end", reason=str(exc))
        self._leases.stop_all(Stopped.LOST)

    async def _run_all(self, ids: list[UUID], priority: int) -> None:
        running: set[asyncio.Task[None]] = set()
        suspects: list[UUID] = []
        by_claim = False  # whether repeats are claimed as well
        self._unclaimed += len(ids)
        try:
            while ids:
                taken = await self._slots.take(len(ids), priority=priority)
                group, ids = ids[:taken], ids[taken:]
                self._no_longer_waiting(taken)
                found = [] if by_claim else await self._claimable(group)
                claimed_at = time.time()
                repeats = self._repeats(found, unclaimed=True)
                known = {job.id for job, _ in repeats}
                rest = [job_id for job_id in group if job_id not in known]
                started = 0
                if rest:
                    claim = await self._claim(rest)
                    claimed_at = time.time()
                    repeats += (more := self._repeats(claim.jobs, unclaimed=False))
                    known = {job.id for job, _ in more}
                    for job in claim.jobs:
                        if job.id not in known:
                            self._start(job, running)
                    started = len(claim.jobs) - len(more)
                    suspects += await self._left_alone(rest, claim)
                self._learn(started + len(repeats), repeats=len(repeats))
                if lost := await self._settle(repeats, claimed_at=claimed_at):
                    ids, by_claim = [*lost, *ids], True
                    self._unclaimed += len(lost)
            while running:
                await asyncio.wait(running)
            await self._run_suspects(suspects, running)
        except BaseException:
            self._no_longer_waiting(len(ids))
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            raise

    def _no_longer_waiting(self, jobs: int) -> None:
        was_hungry = self.hungry
        self._unclaimed -= jobs
        if self.hungry and not was_hungry:
            self.on_hungry()

    def _learn(self, jobs: int, *, repeats: int) -> None:
        was_hungry = self.hungry
        self._slots.claimed(jobs, repeats=repeats)
        if self.hungry and not was_hungry:
            self.on_hungry()

    def _start(
        self, job: ClaimedJob, running: set[asyncio.Task[None]], *, slots: int = 1
    ) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(job, slots), name=f"promptmill-job-{job.id}")
        running.add(task)
        task.add_done_callback(running.discard)
        return task

    async def _run_suspects(self, ids: Sequence[UUID], running: set[asyncio.Task[None]]) -> None:
        """Run jobs that were in flight when an engine died, each with nothing beside it.

        So the guilty one is found: only what dies with the engine again and again is set aside.
        None is claimed before its turn, or another's death would be counted against it.
        """
        if not ids:
            return
        async with self._one_suspect:
            taken = await self._slots.take_all()
            try:
                for job_id in ids:
                    claim = await self._patient_claim([job_id], suspects=True)
                    await self._publish(claim.ended)
                    for job in claim.jobs:
                        await asyncio.wait([self._start(job, running, slots=0)])
            finally:
                self._slots.give(taken)

    async def _left_alone(self, ids: Sequence[UUID], claim: Claim) -> list[UUID]:
        """Return the suspects among jobs of which some could not be claimed."""
        left = {*ids} - {job.id for job in claim.jobs} - {end.result.job_id for end in claim.ended}
        if not left:
            return []
        return await self._patience.until_done(
            "look for suspects", lambda: self._jobs.suspects_among(left)
        )

    async def _claimable(self, ids: Sequence[UUID]) -> list[ClaimedJob]:
        """Read jobs that may be claimed, when nearly all are repeats and may need no claim."""
        if not self._slots.nearly_all_repeat:
            return []
        try:
            return await self._jobs.claimable(ids)
        except DatabaseUnavailableError:
            return []  # the claim waits for Postgres
        except BaseException:
            self._slots.give(len(ids))
            raise

    def _repeats(
        self, jobs: Sequence[ClaimedJob], *, unclaimed: bool
    ) -> list[tuple[ClaimedJob, Outcome]]:
        """Return the jobs that need no run, with their outcomes; they need no slots."""
        known = self._recall.outcomes(jobs, unclaimed=unclaimed)
        self._slots.give(len(known))
        return [(job, known[job.id]) for job in jobs if job.id in known]

    async def _claim(self, ids: Sequence[UUID]) -> Claim:
        """Claim what can be claimed; slots that are not needed are given back."""
        try:
            claim = await self._patient_claim(ids, suspects=False)
        except BaseException:
            self._slots.give(len(ids))
            raise
        self._slots.give(len(ids) - len(claim.jobs))
        await self._publish(claim.ended)
        return claim

    async def _patient_claim(self, ids: Sequence[UUID], *, suspects: bool) -> Claim:
        if self.engine_died.is_set():
            # What is claimed now would only be blamed. The process ends in a moment, and the
            # message goes back.
            await asyncio.get_running_loop().create_future()
        claim = await self._patience.until_done(
            "claim jobs",
            lambda: self._jobs.claim(
                ids, owner=self._rules.owner, lease_s=self._rules.lease_s, suspects=suspects
            ),
        )
        self._taken_up(claim.jobs)
        for end in claim.ended:
            self._meter.ended_unrun(end.result)
            job_lines.ended_unrun(end.result)
        return claim

    def _taken_up(self, jobs: Iterable[ClaimedJob]) -> None:
        for job in jobs:
            self._meter.claimed(job)
            self.display.claimed(job)

    async def _run(self, job: ClaimedJob, slots: int) -> None:
        """Run one claimed job to its outcome; its slots are free again once it has an answer."""
        logs.bind_job(job.id, trace_id(job.traceparent))
        with self._span_of(job), self._leases.hold(job) as holding:
            try:
                with self.display.running(job):
                    outcome = await self._outcome(job, holding)
                    holding.decided()
            finally:
                self._slots.give(slots)
            if outcome is not None and await self._commit_all([(job, outcome)]):
                asks_for_deltas = bool(job.options.get("stream"))
                await self._publish(
                    [Delivery(channel=job.channel, result=outcome.result, stream=asks_for_deltas)]
                )
                self._recall.note(job, outcome)

    async def _settle(
        self, repeats: Sequence[tuple[ClaimedJob, Outcome]], *, claimed_at: float
    ) -> list[UUID]:
        """Commit and publish outcomes that needed no run, together.

        Returns:
            Jobs that were not claimed and could not be ended so: a claim finds out why.
        """
        if not repeats:
            return []
        ends = [("wait", claimed_at), ("answer", time.time())]
        self._taken_up(job for job, end in repeats if end.unclaimed)
        with self._leases.hold_decided(job for job, end in repeats if not end.unclaimed):
            standing = await self._commit_all(repeats)
            ends.append(("commit", time.time()))
            published = await self._publish(
                [
                    Delivery(channel=job.channel, result=outcome.result)
                    for job, outcome in repeats
                    if job.id in standing
                ]
            )
            ends.append(("publish", time.time()))
        failed_at = None if published else "publish"
        for job, outcome in repeats:
            lost = job.id not in standing
            if (lost and outcome.unclaimed) or not self._tracing.wants(job.traceparent):
                continue
            self._tracing.settled(
                job.traceparent,
                outcome,
                ends=ends[:-1] if lost else ends,
                failed_at="commit" if lost else failed_at,
                **_attributes(job),
            )
            await asyncio.sleep(0)  # making spans of hundreds must not hold up the loop
        return [job.id for job, end in repeats if end.unclaimed and job.id not in standing]

    def _span_of(self, job: ClaimedJob) -> AbstractContextManager[Any]:
        return self._tracing.job(job.traceparent, **_attributes(job))

    async def _outcome(self, job: ClaimedJob, holding: Holding) -> Outcome | None:
        """Return what is to be committed, or None when the job was given back or is lost."""
        try:
            with self._tracing.span("answer") as span:
                outcome = await self._answerer.answer(
                    job,
                    on_text=self._on_text(job),
                    trace_headers=self._tracing.headers(job.traceparent),
                )
                if span is not None:
                    describe_answer(span, outcome)
                return outcome
        except asyncio.CancelledError:
            return await self._stopped(job, holding)
        except EngineDeadError:
            # Which of the jobs in flight killed it cannot be told: all of them are suspects.
            self.engine_died.set()
            self._meter.returned(job, "engine-died")
            await self._patience.until_done(
                "give jobs back", lambda: self._jobs.suspect({job.id: job.token})
            )
            return None
        except TryAgainError as exc:
            return await self._try_again(job, exc.error)
        except Exception as exc:  # noqa: BLE001  whatever it was, the job must not be lost
            job_lines.unforeseen(job, exc)
            error = JobError(type=type(exc).__name__, message=str(exc), retryable=True)
            return await self._try_again(job, error)

    async def _stopped(self, job: ClaimedJob, holding: Holding) -> Outcome | None:
        """Say what becomes of a job whose run was cancelled."""
        if holding.stopped is None or holding.task is None:
            # The worker stops: whoever comes next runs it, and it loses no attempt.
            self._meter.returned(job, "stopping")
            await asyncio.shield(self._release(job))
            raise asyncio.CancelledError
        # The cancellation was meant for the run, not for the commit that follows.
        holding.task.uncancel()
        if holding.stopped is Stopped.LOST:
            self._meter.returned(job, "lease-lost")
            return None
        status, kind, message = _STOPPED[holding.stopped]
        return failed(job, JobError(type=kind, message=message), status=status)

    async def _try_again(self, job: ClaimedJob, error: JobError) -> Outcome | None:
        """Put the job back with a due time, or end it when its attempts are used up."""
        if job.attempts >= job.max_attempts:
            return failed(job, error)
        delay_s = self._rules.delay_s(job.attempts)
        self._meter.put_back(job)
        job_lines.put_back(job, error, delay_s=delay_s)
        await self._patience.until_done(
            "give a job back",
            lambda: self._jobs.retry_later(job.id, job.token, delay_s=delay_s, error=error),
        )
        return None

    async def _release(self, job: ClaimedJob) -> None:
        try:
            await self._jobs.release({job.id: job.token})
        except DatabaseUnavailableError as exc:
            # Its lease ends by itself.
            _log.warning("job not given back", job_id=str(job.id), reason=str(exc))

    async def _commit_all(self, ended: Sequence[tuple[ClaimedJob, Outcome]]) -> frozenset[UUID]:
        """Commit outcomes together, however long Postgres is away.

        Returns:
            The jobs that were still this worker's.
        """
        # Of a hit from memory of what was stored before, only the outcome is new.
        new = [
            replace(outcome, answer=None)
            if outcome.answer is not None and outcome.answer.id in self._stored
            else outcome
            for _job, outcome in ended
        ]
        with self._tracing.span("commit"):
            standing = await self._patience.until_done(
                "commit outcomes", lambda: self._commit_group.finish_all(new)
            )
        for job, outcome in ended:
            if job.id not in standing:
                if outcome.unclaimed:
                    self._meter.passed_over(job)
                else:
                    self._meter.returned(job, "lease-lost")
                    job_lines.lost(job)
                continue
            if outcome.answer is not None:
                self._stored[outcome.answer.id] = True
            self._hits.note(outcome)
            self._meter.ended(job, outcome)
            job_lines.ended(job, outcome)
        return standing

    async def _publish(self, deliveries: Sequence[Delivery]) -> bool:
        """Publish outcomes; return whether they are on their channels."""
        try:
            with self._tracing.span("publish"):
                await self._publisher.publish(deliveries)
        except BrokerUnavailableError:
            return False  # committed and unpublished: recovery publishes it
        return True

    def _on_text(self, job: ClaimedJob) -> GrowingText | None:
        return GrowingText(self._channel, job) if job.options.get("stream") else None


def _attributes(job: ClaimedJob) -> dict[str, Any]:
    """Return what the span of a job is told."""
    return {
        "waited_since": job.created_at.timestamp(),
        "job_id": str(job.id),
        "namespace": job.namespace,
        "model": job.model,
        "attempt": job.attempts,
    }
