"""Recovery: what was left behind is found, sent and published, by one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from schema.errors import BrokerUnavailableError
from schema.jobs import JobState
from tests.integration.builders import admit, change, claimed, let_leases_end, outcome, spec
from workers.data_loss import DataLoss
from workers.recovery import Recovery
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.locks import RECOVERY, only_one
from workers.store.records import Delivery, JobAddress


class _Elsewhere:
    """Queue and channels, as recovery sees them."""

    def __init__(self, jobs: JobStore) -> None:
        self.jobs = jobs
        self.sent: list[JobAddress] = []
        self.published: list[Delivery] = []
        self.low_water: datetime | None = None
        self.away = False
        self.epoch = "first"

    async def heed(self) -> int:
        await self.jobs.meet(self.epoch)
        return 0

    async def note_positions(self) -> None:
        """Nobody reads."""

    async def adopt(self) -> int:
        return 0

    async def send(self, jobs: Sequence[JobAddress]) -> None:
        if self.away:
            raise BrokerUnavailableError("away")
        self.sent += jobs

    async def publish(self, deliveries: Sequence[Delivery]) -> str:
        if self.away:
            raise BrokerUnavailableError("away")
        self.published += deliveries
        return self.epoch

    async def oldest(self) -> datetime | None:
        return self.low_water


@pytest.fixture
def elsewhere(job_store: JobStore) -> _Elsewhere:
    return _Elsewhere(job_store)


@pytest.fixture
def recovery(database: Database, job_store: JobStore, elsewhere: _Elsewhere) -> Recovery:
    return Recovery(
        database=database,
        jobs=job_store,
        send=elsewhere.send,
        publish=elsewhere.publish,
        oldest_live_message_at=elsewhere.oldest,
        data_loss=cast("DataLoss", elsewhere),
        adopt=elsewhere.adopt,
        every_s=0.02,
        new_row_grace_s=0,
        publish_grace_s=0,
        clock_slack_s=0,
        batch=2,
    )


async def test_a_pass_puts_everything_right_and_the_next_finds_nothing(
    database: Database, job_store: JobStore, recovery: Recovery, elsewhere: _Elsewhere
) -> None:
    left, done, unsent = spec("left"), spec("done"), spec("unsent")
    await claimed(job_store, left)
    await let_leases_end(database, [left.id])
    await job_store.finish([outcome(await claimed(job_store, done))])
    await admit(job_store, unsent, sent=False)
    expired = spec("expired", deadline=datetime(2020, 1, 1, tzinfo=UTC))
    await admit(job_store, expired)

    first = await recovery.run_once()
    assert first is not None
    assert (first.requeued, first.ended, first.sent, first.published) == (1, 1, 2, 1)
    assert {job.id for job in elsewhere.sent} == {left.id, unsent.id}
    assert {each.result.job_id: each.result.status for each in elsewhere.published} == {
        done.id: JobState.DONE,
        expired.id: JobState.EXPIRED,
    }
    again = await recovery.run_once()
    assert again is not None
    assert not again.anything


async def test_a_backlog_is_not_sent_again_and_lost_messages_are(
    database: Database, job_store: JobStore, recovery: Recovery, elsewhere: _Elsewhere
) -> None:
    old, new = spec("old"), spec("new")
    await admit(job_store, old, new)
    await change(
        database, "UPDATE jobs SET sent_at = now() - interval '1 hour' WHERE id = :id", id=old.id
    )
    await recovery.run_once()  # nobody can tell what waits
    assert elsewhere.sent == []
    elsewhere.low_water = datetime.now(UTC) - timedelta(hours=2)  # the backlog is older still
    await recovery.run_once()
    assert elsewhere.sent == []
    elsewhere.low_water = datetime.now(UTC) - timedelta(minutes=30)
    await recovery.run_once()
    assert [job.id for job in elsewhere.sent] == [old.id]
    await recovery.run_once()
    assert len(elsewhere.sent) == 1


async def test_one_worker_at_a_time_does_a_pass(database: Database, recovery: Recovery) -> None:
    async with only_one(database, RECOVERY) as mine:
        assert mine
        assert await recovery.run_once() is None
    assert await recovery.run_once() is not None


async def test_it_goes_on_by_itself_through_outages(
    job_store: JobStore, recovery: Recovery, elsewhere: _Elsewhere
) -> None:
    ids = await admit(job_store, *(spec(str(at)) for at in range(7)), sent=False)
    elsewhere.away = True
    with pytest.raises(BrokerUnavailableError):
        await recovery.run_once()
    recovery.start()
    recovery.start()
    await asyncio.sleep(0.1)
    elsewhere.away = False
    recovery.wake()
    async with asyncio.timeout(20):
        while len(elsewhere.sent) < len(ids):
            await asyncio.sleep(0.02)
    await recovery.aclose()
    await recovery.aclose()
    assert {job.id for job in elsewhere.sent} == set(ids)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "recovery"]


async def test_what_one_step_stumbles_over_does_not_keep_the_others(
    job_store: JobStore, recovery: Recovery, elsewhere: _Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    await job_store.finish([outcome(await claimed(job_store))])

    async def broken(jobs: Sequence[JobAddress]) -> None:
        raise ValueError("a bug")

    await admit(job_store, spec(), sent=False)
    monkeypatch.setattr(recovery, "_send", broken)
    with pytest.raises(ValueError, match="a bug"):
        await recovery.run_once()
    assert len(elsewhere.published) == 1
