"""Jobs in Postgres: written once, held by one, ended once, and nobody else's."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from schema.errors import IdempotencyConflictError, InvalidRequestError, QueueFullError
from schema.jobs import JobError, JobState, OpenAIRequest, PromptRequest, Provenance
from schema.names import job_id_for
from tests.integration.builders import (
    LONG_LEASE_S,
    admit,
    answer,
    change,
    claimed,
    let_leases_end,
    number,
    outcome,
    spec,
)
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.outcomes import _MARK_PUBLISHED

AGES_AGO = datetime(2020, 1, 1, tzinfo=UTC)


# Admission


async def test_a_job_is_written_once(job_store: JobStore) -> None:
    one, two = spec(), spec(model="other", priority=1)
    first = await job_store.admit([one, one], default_model="m", sent=True, max_attempts=3)
    again = await job_store.admit([one, two], default_model="m", sent=True, max_attempts=3)

    assert first.inserted == {one.id}
    assert (again.inserted, again.known) == ({two.id}, {one.id})
    status = await job_store.status("default", two.id)
    assert status is not None
    assert (status.state, status.model, status.priority) == (JobState.QUEUED, "other", 1)


async def test_one_key_submitted_by_many_at_once_is_one_job(job_store: JobStore) -> None:
    key = "order-7 \N{SNOWMAN}"
    same = [spec(id=job_id_for("default", key), idempotency_key=key) for _ in range(16)]
    admissions = await asyncio.gather(
        *(job_store.admit([each], default_model="m", sent=True, max_attempts=3) for each in same)
    )
    assert sum(len(admission.inserted) for admission in admissions) == 1
    assert sum(len(admission.known) for admission in admissions) == 15


async def test_another_request_under_the_same_key_is_refused_and_writes_nothing(
    job_store: JobStore,
) -> None:
    key_id = job_id_for("default", "k")
    await admit(job_store, spec("first", id=key_id, idempotency_key="k"))
    other, new = spec("second", id=key_id, idempotency_key="k"), spec("new")

    with pytest.raises(IdempotencyConflictError, match=str(key_id)):
        await admit(job_store, other, new)
    assert await job_store.status("default", new.id) is None

    report = await job_store.admit(
        [other, new], default_model="m", sent=True, max_attempts=3, on_refusal="report"
    )
    assert report.inserted == {new.id}
    assert set(report.refused) == {key_id}
    with pytest.raises(IdempotencyConflictError):
        await admit(job_store, spec("a", id=new.id), spec("b", id=new.id))
    with pytest.raises(IdempotencyConflictError):  # a key whose id was not derived from it
        await admit(job_store, spec("first", idempotency_key="k"))


async def test_an_id_of_another_namespace_is_neither_shown_nor_taken(job_store: JobStore) -> None:
    mine = spec("mine", namespace="a")
    await admit(job_store, mine)
    with pytest.raises(IdempotencyConflictError) as caught:
        await admit(job_store, spec("mine", namespace="b", id=mine.id))
    assert "'a'" not in str(caught.value)
    assert await job_store.status("b", mine.id) is None


async def test_a_batch_must_be_of_the_same_namespace(job_store: JobStore) -> None:
    batch = await job_store.create_batch("a", source="in.jsonl", total=2)
    await admit(job_store, spec(namespace="a", batch_id=batch.id, row=0, custom_id="r0"))
    for stray in (
        spec(namespace="b", batch_id=batch.id, row=1),
        spec(namespace="a", batch_id=uuid4(), row=1),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await admit(job_store, stray)
        assert caught.value.field == "batch_id"
    counts = await job_store.counts("a", batch_id=batch.id)
    assert counts[JobState.QUEUED] == 1


async def test_a_full_queue_refuses_new_jobs_and_knows_old_ones(job_store: JobStore) -> None:
    specs = [spec() for _ in range(5)]

    async def submit(*wanted: int, limit: int = 4) -> int:
        admission = await job_store.admit(
            [specs[at] for at in wanted],
            default_model="m",
            sent=True,
            max_attempts=3,
            queue_limit=limit,
        )
        return len(admission.inserted)

    assert await submit(0, 1, 2) == 3
    with pytest.raises(QueueFullError, match="4 may"):
        await submit(3, 4)
    assert await submit(0, 1, 2, 3) == 1
    assert await submit(0, 3) == 0
    with pytest.raises(QueueFullError):
        await submit(4)
    assert await submit(4, limit=5) == 1
    assert (await job_store.counts("default"))[JobState.QUEUED] == 5


@pytest.mark.parametrize(
    "request_",
    [
        PromptRequest(prompt="ü 😀 \u202e \\u0000 ' \" {} % : :x NaN"),
        OpenAIRequest(body={"messages": [{"role": "user", "content": "ü😀"}], "n": 1e30}),
    ],
)
async def test_a_request_comes_back_as_it_was(
    job_store: JobStore, request_: PromptRequest | OpenAIRequest
) -> None:
    asked = spec(stream=True).model_copy(update={"request": request_, "custom_id": "ü"})
    job = await claimed(job_store, asked)
    assert job.parse_request() == request_
    assert job.parse_options() == asked.options
    assert job.custom_id == "ü"


async def test_a_nul_that_got_past_the_schema_is_refused_by_name(job_store: JobStore) -> None:
    sneaky = spec().model_copy(
        update={"request": PromptRequest.model_construct(kind="prompt", prompt="a\x00b")}
    )
    with pytest.raises(InvalidRequestError):
        await admit(job_store, sneaky)


# Claims


async def test_two_claimers_never_hold_the_same_job(job_store: JobStore) -> None:
    ids = await admit(job_store, *(spec(str(number)) for number in range(60)))
    claims = await asyncio.gather(
        *(
            job_store.claim(ids[:: 1 if at % 2 else -1], owner=f"w{at}", lease_s=LONG_LEASE_S)
            for at in range(6)
        )
    )
    taken = [job.id for claim in claims for job in claim.jobs]
    assert sorted(taken) == sorted(ids)
    assert all(
        (job.token, job.attempts, job.crashes) == (1, 1, 0)
        for claim in claims
        for job in claim.jobs
    )


async def test_a_lease_that_ended_makes_the_job_claimable_and_the_old_holder_powerless(
    database: Database, job_store: JobStore
) -> None:
    old = await claimed(job_store)
    held = {old.id: old.token}
    assert (await job_store.claim([old.id], owner="w2", lease_s=60)).jobs == ()

    await let_leases_end(database, held)
    rivals = await asyncio.gather(
        *(job_store.claim([old.id], owner=f"w{at}", lease_s=60) for at in range(5))
    )
    (new,) = [job for claim in rivals for job in claim.jobs]
    assert (new.token, new.attempts, new.crashes) == (2, 1, 1)

    assert (await job_store.renew(held, lease_s=60)).lost == {old.id}
    assert (await job_store.finish([outcome(old)])).refused == {old.id}
    assert not await job_store.retry_later(old.id, old.token, delay_s=0)
    assert await job_store.release(held) == []
    assert await job_store.suspect(held) == []
    assert (await job_store.finish([outcome(new, words="new")])).accepted == {new.id}
    result = await job_store.result("default", new.id)
    assert result is not None
    assert (result.text, result.token) == ("new", 2)


async def test_a_heartbeat_keeps_the_lease_and_tells_of_cancellation(
    database: Database, job_store: JobStore
) -> None:
    job, held = await claimed(job_store), {}
    held = {job.id: job.token, uuid4(): 1}
    await let_leases_end(database, held)
    renewal = await job_store.renew(held, lease_s=60)
    assert renewal.lost == set(held) - {job.id}
    assert renewal.cancelled == frozenset()
    assert (await job_store.claim([job.id], owner="w2", lease_s=60)).jobs == ()

    assert (await job_store.cancel("default", [job.id])).running == {job.id}
    assert (await job_store.renew(held, lease_s=60)).cancelled == {job.id}


async def test_a_job_is_not_claimed_before_its_back_off_is_over(
    database: Database, job_store: JobStore
) -> None:
    job = await claimed(job_store)
    error = JobError(type="EngineFailedError", message="out of \x00 luck", retryable=True)
    assert await job_store.retry_later(job.id, job.token, delay_s=60, error=error)
    assert (await job_store.claim([job.id], owner="w", lease_s=60)).jobs == ()
    assert await job_store.unsent(limit=9, older_than_s=0) == []
    status = await job_store.status("default", job.id)
    assert status is not None
    assert (status.state, status.error) == (JobState.QUEUED, error)

    await change(database, "UPDATE jobs SET available_at = now()")
    assert [due.id for due in await job_store.unsent(limit=9, older_than_s=60)] == [job.id]
    (again,) = (await job_store.claim([job.id], owner="w", lease_s=60)).jobs
    assert (again.attempts, again.token, again.crashes) == (2, 2, 0)


async def test_what_was_given_back_lost_no_attempt(job_store: JobStore) -> None:
    job = await claimed(job_store)
    (address,) = await job_store.release({job.id: job.token})
    assert (address.id, address.namespace, address.model) == (job.id, "default", "m")
    (again,) = (await job_store.claim([job.id], owner="w", lease_s=60)).jobs
    assert (again.attempts, again.crashes, again.token) == (1, 0, 2)
    assert len(await job_store.suspect({again.id: again.token})) == 1
    (third,) = (await job_store.claim([job.id], owner="w", lease_s=60)).jobs
    assert (third.attempts, third.crashes, third.token) == (1, 1, 3)


async def test_a_job_with_which_processes_die_is_set_aside(
    database: Database, job_store: JobStore
) -> None:
    job = await claimed(job_store)
    await let_leases_end(database, [job.id])
    (job,) = (await job_store.claim([job.id], owner="w", lease_s=60, max_crashes=2)).jobs
    await let_leases_end(database, [job.id])
    claim = await job_store.claim([job.id], owner="w", lease_s=60, max_crashes=2)
    assert claim.jobs == ()
    (ended,) = claim.ended
    assert ended.result.status == JobState.FAILED
    assert ended.result.error is not None
    assert ended.result.error.type == "WorkerCrashed"


async def test_a_job_past_its_deadline_ends_instead_of_running(job_store: JobStore) -> None:
    late = spec(deadline=AGES_AGO, channel="c", stream=True)
    soon = spec(deadline=datetime.now(UTC) + timedelta(hours=1))
    ids = await admit(job_store, late, soon)
    claim = await job_store.claim(ids, owner="w", lease_s=60)
    assert [job.id for job in claim.jobs] == [soon.id]
    (ended,) = claim.ended
    assert (ended.channel, ended.stream, ended.result.status) == ("c", True, JobState.EXPIRED)
    assert await job_store.result("default", late.id) == ended.result
    assert (await job_store.unpublished(older_than_s=0, limit=9)) == [ended]


# Outcomes


async def test_an_outcome_is_committed_once_with_its_answer(
    database: Database, job_store: JobStore
) -> None:
    job = await claimed(job_store)
    made = answer(words="A field.")
    end = outcome(job, answer=made, answer_id=made.id, provenance=Provenance.GENERATED)
    assert (await job_store.finish([end, outcome(job, words="late")])).accepted == {job.id}
    assert (await job_store.finish([end])).accepted == {job.id}  # as after a lost reply

    result = await job_store.result("default", job.id)
    assert result == end.result
    assert await number(database, "SELECT count(*) FROM answers") == 1
    status = await job_store.status("default", job.id)
    assert status is not None
    assert status.provenance == Provenance.GENERATED
    assert status.finished_at is not None


async def test_a_refused_outcome_leaves_no_answer(database: Database, job_store: JobStore) -> None:
    job = await claimed(job_store)
    await job_store.release({job.id: job.token})
    refused = await job_store.finish([outcome(job, answer=answer())])
    assert refused.refused == {job.id}
    assert await number(database, "SELECT count(*) FROM answers") == 0


UNCLAIMED = """
    SELECT token, attempts, started_at IS NOT NULL, lease_until IS NULL, state
    FROM jobs WHERE id = :id
"""


async def test_a_job_that_needs_no_run_is_ended_as_if_it_had_been_claimed(
    database: Database, job_store: JobStore
) -> None:
    (ran, *_), read = await _claim_and_read(job_store)
    assert {field: getattr(read, field) for field in _ALIKE} == {
        field: getattr(ran, field) for field in _ALIKE
    }
    one = outcome(read, unclaimed=True)
    assert (await job_store.finish([one])).accepted == {read.id}
    async with database.connection() as connection:
        row = (await connection.execute(text(UNCLAIMED), {"id": read.id})).one()
    assert tuple(row) == (1, 1, True, True, "done")
    assert (await job_store.results("default", [read.id]))[read.id] == one.result
    # Under this token another may have ended it: who asks again is not told that it was he.
    assert (await job_store.finish([one])).refused == {read.id}
    assert await job_store.claimable([read.id]) == []


_ALIKE = ("token", "attempts", "request", "options", "channel", "crashes", "custom_id", "model")


async def _claim_and_read(store: JobStore) -> tuple[Any, Any]:
    first, second = await admit(store, spec(), spec())
    claim = await store.claim([first], owner="w", lease_s=LONG_LEASE_S)
    (read,) = await store.claimable([first, second])
    assert read.id == second
    return claim.jobs, read


@pytest.mark.parametrize(
    "happens",
    [
        "UPDATE jobs SET crashes = 1",
        "UPDATE jobs SET cancel_requested = true",
        "UPDATE jobs SET deadline_at = now() - interval '1 second'",
        "UPDATE jobs SET available_at = now() + interval '1 minute'",
        "UPDATE jobs SET token = token + 1",
        "UPDATE jobs SET state = 'running', token = token + 1, lease_until = now()",
        "UPDATE jobs SET state = 'cancelled', token = token + 1, finished_at = now()",
    ],
)
async def test_a_job_that_may_not_be_claimed_any_more_is_not_ended_either(
    database: Database, job_store: JobStore, happens: str
) -> None:
    (job_id,) = await admit(job_store, spec())
    (read,) = await job_store.claimable([job_id])
    await change(database, happens)
    before = await number(database, "SELECT to_jsonb(jobs) FROM jobs")
    one = outcome(read, unclaimed=True, answer=answer())
    assert (await job_store.finish([one])).refused == {job_id}
    assert await number(database, "SELECT to_jsonb(jobs) FROM jobs") == before
    assert await number(database, "SELECT count(*) FROM answers") == 0


async def test_a_job_that_is_locked_does_not_keep_others_from_being_ended(
    database: Database, job_store: JobStore
) -> None:
    locked, free = await admit(job_store, spec(), spec())
    read = await job_store.claimable([locked, free])
    async with database.transaction() as connection:
        await connection.execute(
            text("SELECT FROM jobs WHERE id = :id FOR NO KEY UPDATE"), {"id": locked}
        )
        async with asyncio.timeout(10):
            finished = await job_store.finish([outcome(job, unclaimed=True) for job in read])
    assert (finished.accepted, finished.refused) == ({free}, {locked})


async def test_of_many_who_end_a_job_without_a_claim_one_does(job_store: JobStore) -> None:
    (job_id,) = await admit(job_store, spec())
    (read,) = await job_store.claimable([job_id])
    ended, claim = await asyncio.gather(
        asyncio.gather(
            *(job_store.finish([outcome(read, words=f"{at}", unclaimed=True)]) for at in range(6))
        ),
        job_store.claim([job_id], owner="w", lease_s=LONG_LEASE_S),
    )
    assert sum(len(one.accepted) for one in ended) + len(claim.jobs) == 1


@pytest.mark.parametrize("words", ["a\x00b", "half \ud83d", "NaN", "-Infinity \\u0000", "ü😀"])
async def test_any_text_can_be_an_outcome(job_store: JobStore, words: str) -> None:
    job = await claimed(job_store)
    end = outcome(
        job,
        words=words,
        state=JobState.FAILED,
        error=JobError(type="X", message=words, body={"at": float("inf"), "t": [words]}),
    )
    end = outcome(job, words=words) if "\ud83d" in words else end
    assert (await job_store.finish([end])).accepted == {job.id}
    assert await job_store.result("default", job.id) == end.result
    (delivery,) = await job_store.unpublished(older_than_s=0, limit=9)
    assert delivery.result == end.result


async def test_cancelling_races_completion_and_one_of_them_wins(job_store: JobStore) -> None:
    for _ in range(10):
        job = await claimed(job_store, spec(str(uuid4())))
        finished, cancelled = await asyncio.gather(
            job_store.finish([outcome(job)]), job_store.cancel("default", [job.id])
        )
        assert finished.accepted == {job.id}
        assert cancelled.running | cancelled.ignored == {job.id}
        status = await job_store.status("default", job.id)
        assert status is not None
        assert status.state == JobState.DONE


async def test_a_deadline_races_completion_and_one_of_them_wins(
    database: Database, job_store: JobStore
) -> None:
    """The worker is late with its heartbeat as well; recovery, and another worker, end the job."""
    states = set()
    for at in range(20):
        job = await claimed(job_store, spec(str(uuid4())))
        await change(
            database,
            "UPDATE jobs SET deadline_at = now(), lease_until = now() WHERE id = :id",
            id=job.id,
        )
        end = outcome(job, answer=answer(), answer_id=uuid4())
        events = [
            job_store.finish([end]),
            job_store.end_overdue(limit=9),
            job_store.claim([job.id], owner="another", lease_s=60),
        ]
        turns = [(at + turn) % 3 for turn in range(3)]
        each = await asyncio.gather(*(events[turn] for turn in turns))
        done: dict[int, Any] = dict(zip(turns, each, strict=True))
        expired = [*done[1], *done[2].ended]
        assert not done[2].jobs
        assert len(expired) + len(done[0].accepted) == 1
        result = await job_store.result("default", job.id)
        assert result == (end.result if done[0].accepted else expired[0].result)
        states.add(result.status)
        stored = await number(database, "SELECT count(*) FROM answers")
        assert stored == len(done[0].accepted)
        await change(database, "DELETE FROM answers")
    assert states <= {JobState.DONE, JobState.EXPIRED}


async def test_cancelling_races_claiming_and_one_of_them_wins(job_store: JobStore) -> None:
    for _ in range(10):
        (job_id,) = await admit(job_store, spec(str(uuid4())))
        claim, cancelled = await asyncio.gather(
            job_store.claim([job_id], owner="w", lease_s=60),
            job_store.cancel("default", [job_id]),
        )
        if claim.jobs:
            assert cancelled.running == {job_id}
        else:
            assert [ended.result.status for ended in cancelled.ended] == [JobState.CANCELLED]


async def test_publishing_is_noted_for_the_token_that_was_published(job_store: JobStore) -> None:
    job = await claimed(job_store)
    await job_store.finish([outcome(job)])
    epoch = (await job_store.meet("first")).epoch
    await job_store.mark_published({job.id: job.token + 1}, epoch=epoch)
    assert len(await job_store.unpublished(older_than_s=0, limit=9)) == 1
    assert await job_store.unpublished(older_than_s=60, limit=9) == []
    await job_store.mark_published({job.id: job.token}, epoch="another")
    await job_store.mark_published({job.id: job.token}, epoch=None)
    assert len(await job_store.unpublished(older_than_s=0, limit=9)) == 1
    await job_store.mark_published({job.id: job.token}, epoch=epoch)
    assert await job_store.unpublished(older_than_s=0, limit=9) == []


# Outbox


async def test_a_mark_of_publication_is_not_waited_for_until_it_is_on_disk(
    database: Database, job_store: JobStore
) -> None:
    job = await claimed(job_store)
    await job_store.finish([outcome(job)])
    await job_store.meet("epoch", "server")
    values = {"ids": [job.id], "tokens": [job.token], "epoch": "epoch"}
    shown = text("SHOW synchronous_commit")
    async with database.transaction() as connection:
        assert (await connection.execute(_MARK_PUBLISHED, values)).rowcount == 1
        assert await connection.scalar(shown) == "off"
    async with database.transaction() as connection:
        assert await connection.scalar(shown) == "on"


async def test_rows_without_a_live_message_are_found(
    database: Database, job_store: JobStore
) -> None:
    unsent, sent = spec("unsent"), spec("sent")
    await admit(job_store, unsent, sent=False)
    await admit(job_store, sent)
    assert await job_store.unsent(limit=9, older_than_s=60) == []
    assert [job.id for job in await job_store.unsent(limit=9, older_than_s=0)] == [unsent.id]
    now = await number(database, "SELECT now()")
    assert await job_store.sent_before(now - timedelta(minutes=1), limit=9) == []
    assert [job.id for job in await job_store.sent_before(now, limit=9)] == [sent.id]

    await job_store.mark_sent([unsent.id, sent.id])
    assert await job_store.unsent(limit=9, older_than_s=0) == []
    assert await job_store.sent_before(now, limit=9) == []


async def test_jobs_left_by_the_dead_are_queued_again_or_ended(
    database: Database, job_store: JobStore
) -> None:
    plain, stopped, late, waiting, alive = (spec(name) for name in "abcde")
    waiting = waiting.model_copy(update={"deadline": AGES_AGO})
    ids = [each.id for each in (plain, stopped, late)]
    await claimed(job_store, plain, stopped, late)
    await claimed(job_store, alive)
    await admit(job_store, waiting)
    await job_store.cancel("default", [stopped.id])
    await change(database, "UPDATE jobs SET deadline_at = now() WHERE id = :id", id=late.id)
    await let_leases_end(database, ids)

    assert [job.id for job in await job_store.expired_leases(limit=9)] == [plain.id]
    ended = {
        each.result.job_id: each.result.status for each in await job_store.end_overdue(limit=9)
    }
    assert ended == {
        stopped.id: JobState.CANCELLED,
        late.id: JobState.EXPIRED,
        waiting.id: JobState.EXPIRED,
    }
    assert await job_store.expired_leases(limit=9) == []
    assert await job_store.end_overdue(limit=9) == []
    (again,) = (await job_store.claim([plain.id], owner="w", lease_s=60)).jobs
    assert (again.attempts, again.crashes) == (1, 1)
    status = await job_store.status("default", alive.id)
    assert status is not None
    assert status.state == JobState.RUNNING


# Steering and reading


async def test_what_is_over_can_be_run_once_more(job_store: JobStore) -> None:
    batch = await job_store.create_batch("default")
    rows = [spec(str(row), batch_id=batch.id, row=row, deadline=AGES_AGO) for row in range(3)]
    await admit(job_store, *rows)
    await job_store.claim([row.id for row in rows], owner="w", lease_s=60)
    assert (await job_store.counts("default", batch_id=batch.id))[JobState.EXPIRED] == 3

    assert await job_store.retry("other", batch_id=batch.id) == []
    assert await job_store.retry("default", states=[JobState.FAILED, JobState.RUNNING]) == []
    assert len(await job_store.retry("default", ids=[rows[0].id])) == 1
    assert len(await job_store.retry("default", batch_id=batch.id)) == 2
    claim = await job_store.claim([row.id for row in rows], owner="w", lease_s=60)
    assert [(job.attempts, job.token) for job in claim.jobs] == [(1, 2)] * 3


async def test_jobs_are_listed_newest_first_in_pages(job_store: JobStore) -> None:
    batch = await job_store.create_batch("default")
    ids = [(await admit(job_store, spec(str(n), batch_id=batch.id, row=n)))[0] for n in range(7)]
    await admit(job_store, spec(namespace="other"))
    listed, page = [], await job_store.list_jobs("default", limit=3)
    while page:
        listed += [status.job_id for status in page]
        page = await job_store.list_jobs("default", limit=3, before=page[-1].job_id)
    assert listed == ids[::-1]
    assert await job_store.list_jobs("default", state=JobState.DONE) == []
    assert len(await job_store.list_jobs("default", batch_id=batch.id)) == 7
    with pytest.raises(InvalidRequestError, match="limit"):
        await job_store.list_jobs("default", limit=0)


async def test_a_batch_from_its_start_to_its_end(job_store: JobStore) -> None:
    batch = await job_store.create_batch(
        "default", source="in\x00.jsonl", digest=b"d" * 32, details={"endpoint": "/v1"}
    )
    assert await job_store.batch("other", batch.id) is None
    assert await job_store.batch_of("default", b"d" * 32) == batch
    waits, runs = spec("w", batch_id=batch.id, row=0), spec("r", batch_id=batch.id, row=1)
    await admit(job_store, waits)
    await claimed(job_store, runs)
    cancelled = await job_store.cancel_batch("default", batch.id)
    assert [each.result.job_id for each in cancelled.ended] == [waits.id]
    assert cancelled.running == {runs.id}
    rest = await job_store.cancel_batch("default", batch.id)
    assert (rest.ended, rest.running) == ((), frozenset())
    closed = await job_store.finish_batch("default", batch.id, status="cancelled")
    assert closed is not None
    assert (closed.status, closed.details) == ("cancelled", {"endpoint": "/v1"})
    assert closed.finished_at is not None
    assert await job_store.list_batches("default") == [closed]
    assert await job_store.list_batches("other") == []


async def test_no_query_crosses_a_namespace(job_store: JobStore) -> None:
    batch = await job_store.create_batch("mine")
    job = await claimed(job_store, spec(namespace="mine", batch_id=batch.id, row=0))
    await job_store.finish([outcome(job, state=JobState.FAILED)])
    waits = spec(namespace="mine", batch_id=batch.id, row=1)
    await admit(job_store, waits)
    both = [job.id, waits.id]

    assert await job_store.statuses("yours", both) == {}
    assert await job_store.results("yours", both) == {}
    assert await job_store.request("yours", job.id) is None
    assert await job_store.list_jobs("yours") == []
    assert await job_store.list_jobs("yours", batch_id=batch.id) == []
    assert await job_store.list_jobs("yours", before=waits.id) == []
    assert not any((await job_store.counts("yours")).values())
    assert not any((await job_store.counts("yours", batch_id=batch.id)).values())
    assert (await job_store.cancel("yours", both)).ignored == set(both)
    assert await job_store.retry("yours", ids=both) == []
    assert await job_store.batch_of("yours", b"") is None
    assert (await job_store.cancel_batch("yours", batch.id)).ended == ()
    assert await job_store.update_batch("yours", batch.id, status="x") is None
    assert (await job_store.counts("mine"))[JobState.QUEUED] == 1
    assert sum((await job_store.counts()).values()) == 2
