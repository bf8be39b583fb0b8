"""Any order of what can happen to jobs keeps them whole: hypothesis against real Postgres.

A model in plain Python says what each job is; after every step the store must say the same.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from schema.jobs import JobState
from tests.integration.builders import change, let_leases_end, outcome, spec
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import ClaimedJob

#: Crashes after which a job is set aside.
MAX_CRASHES = 3


@dataclass
class Model:
    """What a job should be."""

    state: JobState = JobState.QUEUED
    token: int = 0
    attempts: int = 0
    crashes: int = 0
    due: bool = True  # not backing off
    late: bool = False  # past its deadline
    lease_ended: bool = False
    cancel_requested: bool = False
    outcome: str | None = None  # words of the one outcome that counts

    @property
    def running(self) -> bool:
        return self.state == JobState.RUNNING

    def end(self, state: JobState, *, words: str | None = None) -> None:
        assert not self.state.terminal, "a job ended twice"
        self.state, self.outcome, self.lease_ended = state, words, False

    def queue(self, *, due: bool = True) -> None:
        self.state, self.lease_ended = JobState.QUEUED, False
        self.due = due or self.cancel_requested


class Jobs(RuleBasedStateMachine):
    # Set by the test: a machine is made anew for every example.
    database: ClassVar[Database]
    store: ClassVar[JobStore]
    runner: ClassVar[asyncio.Runner]

    jobs = Bundle("jobs")
    runs = Bundle("runs")  # every claim that was ever won, stale ones included

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[UUID, Model] = {}

    @initialize(target=jobs)
    def submit(self) -> Any:
        return multiple(*(self._submit() for _ in range(3)))

    def _submit(self) -> UUID:
        new = spec("p", deadline=datetime.now(UTC) + timedelta(hours=1))
        admission = self.runner.run(
            self.store.admit([new], default_model="m", sent=True, max_attempts=3)
        )
        assert admission.inserted == {new.id}
        self.model[new.id] = Model()
        return new.id

    @rule(target=runs, wanted=st.lists(jobs, min_size=1, max_size=3, unique=True))
    def claim(self, wanted: list[UUID]) -> Any:
        claim = self.runner.run(
            self.store.claim(wanted, owner="w", lease_s=300, max_crashes=MAX_CRASHES)
        )
        taken, ended = {}, {}
        for job_id in wanted:
            model = self.model[job_id]
            over = model.cancel_requested or model.late
            if model.state == JobState.QUEUED and (model.due or over):
                over = over or model.crashes >= MAX_CRASHES
                model.attempts += 0 if over else 1
            elif model.running and model.lease_ended:
                model.crashes += 1
                over = over or model.crashes >= MAX_CRASHES
            else:
                continue
            model.token += 1
            if not over:
                model.state, model.lease_ended = JobState.RUNNING, False
                taken[job_id] = model.token
            else:
                model.end(
                    JobState.CANCELLED
                    if model.cancel_requested
                    else JobState.EXPIRED
                    if model.late
                    else JobState.FAILED
                )
                ended[job_id] = (model.state, model.token)
        assert {job.id: job.token for job in claim.jobs} == taken
        assert {
            each.result.job_id: (each.result.status, each.result.token) for each in claim.ended
        } == ended
        # Postgres returns them by their ids, which differ when Hypothesis tries the same once more.
        return multiple(*sorted(claim.jobs, key=lambda job: wanted.index(job.id)))

    @rule(target=runs, job=runs)
    def overtake(self, job: ClaimedJob) -> Any:
        """The rarest and most dangerous turn, made likely: a stale run beside a new one."""
        self.lease_ends(job.id)
        new = self.claim([job.id])
        self.renew(job)
        self.retry_later(job, due=True)
        self.give_back(job, crashed=True)
        self.finish(job, fails=False)
        return new

    def _holds(self, job: ClaimedJob) -> bool:
        model = self.model[job.id]
        return model.running and model.token == job.token

    @rule(job=runs)
    def renew(self, job: ClaimedJob) -> None:
        renewal = self.runner.run(self.store.renew({job.id: job.token}, lease_s=300))
        model, holds = self.model[job.id], self._holds(job)
        assert (job.id in renewal.lost) == (not holds)
        assert (job.id in renewal.cancelled) == (holds and model.cancel_requested)
        if holds:
            model.lease_ended = False

    @rule(job=runs, fails=st.booleans())
    def finish(self, job: ClaimedJob, *, fails: bool) -> None:
        model, holds = self.model[job.id], self._holds(job)
        words = f"run {job.token}"
        state = JobState.FAILED if fails else JobState.DONE
        before = model.outcome == words and model.token == job.token
        finished = self.runner.run(self.store.finish([outcome(job, words=words, state=state)]))
        assert (job.id in finished.accepted) == (holds or before)
        if holds:
            model.end(state, words=words)

    @rule(job_id=jobs, fails=st.booleans())
    def run_to_the_end(self, job_id: UUID, *, fails: bool) -> None:
        for job in self.claim([job_id]).values:
            self.finish(job, fails=fails)
            self.finish(job, fails=not fails)

    @rule(job=runs, due=st.booleans())
    def retry_later(self, job: ClaimedJob, *, due: bool) -> None:
        holds = self._holds(job)
        given = self.runner.run(
            self.store.retry_later(job.id, job.token, delay_s=0 if due else 600)
        )
        assert given == holds
        if holds:
            self.model[job.id].queue(due=due)

    @rule(job=runs, crashed=st.booleans())
    def give_back(self, job: ClaimedJob, *, crashed: bool) -> None:
        model, holds = self.model[job.id], self._holds(job)
        give = self.store.suspect if crashed else self.store.release
        given = self.runner.run(give({job.id: job.token}))
        assert [address.id for address in given] == ([job.id] if holds else [])
        if holds:
            model.attempts = max(model.attempts - 1, 0)
            model.crashes += int(crashed)
            model.queue()

    @rule(job_id=jobs)
    def lease_ends(self, job_id: UUID) -> None:
        self.runner.run(let_leases_end(self.database, [job_id]))
        self.model[job_id].lease_ended = self.model[job_id].running

    @rule(job_id=jobs)
    def deadline_passes(self, job_id: UUID) -> None:
        statement = "UPDATE jobs SET deadline_at = now() - interval '1 second' WHERE id = :id"
        self.runner.run(change(self.database, statement, id=job_id))
        self.model[job_id].late = True

    @rule(job_id=jobs)
    def back_off_ends(self, job_id: UUID) -> None:
        self.runner.run(
            change(self.database, "UPDATE jobs SET available_at = now() WHERE id = :id", id=job_id)
        )
        self.model[job_id].due = True

    @rule(job_id=jobs)
    def cancel(self, job_id: UUID) -> None:
        model = self.model[job_id]
        cancelled = self.runner.run(self.store.cancel("default", [job_id]))
        assert (job_id in cancelled.ignored) == model.state.terminal
        assert (job_id in cancelled.running) == model.running
        if not model.state.terminal:
            model.cancel_requested = True
        if model.state == JobState.QUEUED:
            model.token += 1
            model.end(JobState.CANCELLED)

    @rule(job_id=jobs)
    def run_once_more(self, job_id: UUID) -> None:
        model = self.model[job_id]
        again = self.runner.run(self.store.retry("default", ids=[job_id]))
        may = model.state.terminal and model.state != JobState.DONE
        assert [address.id for address in again] == ([job_id] if may else [])
        if may:
            self.model[job_id] = Model(token=model.token)

    @rule()
    def recover(self) -> None:
        requeued = {
            job.id for job in self.runner.run(self.store.expired_leases(limit=99, max_crashes=3))
        }
        ended = {
            each.result.job_id
            for each in self.runner.run(self.store.end_overdue(limit=99, max_crashes=3))
        }
        for job_id, model in self.model.items():
            stale = model.running and model.lease_ended
            over = model.cancel_requested or model.late or model.crashes + 1 >= MAX_CRASHES
            assert (job_id in requeued) == (stale and not over)
            late = model.state == JobState.QUEUED and model.late
            assert (job_id in ended) == ((stale and over) or late)
            model.crashes += int(stale)
            if job_id in requeued:
                model.attempts = max(model.attempts - 1, 0)
                model.queue()
            elif job_id in ended:
                model.token += 1
                model.end(
                    JobState.CANCELLED
                    if model.cancel_requested
                    else JobState.EXPIRED
                    if model.late
                    else JobState.FAILED
                )

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        statuses = self.runner.run(self.store.statuses("default", self.model))
        results = self.runner.run(self.store.results("default", self.model))
        for job_id, model in self.model.items():
            status = statuses[job_id]
            assert (status.state, status.token, status.attempts, status.crashes) == (
                model.state,
                model.token,
                model.attempts,
                model.crashes,
            )
            assert (job_id in results) == model.state.terminal
            if model.state.terminal:
                result = results[job_id]
                assert (result.status, result.token) == (model.state, model.token)
                assert result.text == model.outcome

    def teardown(self) -> None:
        self.runner.run(change(self.database, "DELETE FROM jobs"))


def test_any_order_of_events_keeps_the_invariants(database_url: str) -> None:
    with asyncio.Runner() as runner:
        database = Database(database_url, pool_size=1)
        try:
            machine = {"database": database, "store": JobStore(database), "runner": runner}
            run_state_machine_as_test(
                type("JobsHere", (Jobs,), machine),
                settings=settings(
                    max_examples=40,
                    stateful_step_count=30,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(database.aclose())
