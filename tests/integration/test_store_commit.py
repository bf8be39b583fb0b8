"""Group commit: company for those who wait at the same time, and the truth for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from schema.errors import DatabaseUnavailableError, InvalidRequestError
from tests.integration.builders import LONG_LEASE_S, admit, outcome, spec
from workers.store.commit import GroupCommit
from workers.store.jobs import JobStore
from workers.store.records import ClaimedJob, Finished, Outcome


class _Watched:
    """Passes groups on, notes their sizes, and fails when told."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.sizes: list[int] = []
        self.fail_next: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()

    async def finish(self, outcomes: Sequence[Outcome]) -> Finished:
        await self.open.wait()
        self.sizes.append(len(outcomes))
        if self.fail_next:
            raise self.fail_next.pop()
        return await self._store.finish(outcomes)


@pytest.fixture
def watched(job_store: JobStore) -> _Watched:
    return _Watched(job_store)


async def _hold(store: JobStore, count: int) -> list[ClaimedJob]:
    ids = await admit(store, *(spec(str(at)) for at in range(count)))
    return list((await store.claim(ids, owner="w", lease_s=LONG_LEASE_S)).jobs)


async def test_those_who_wait_share_a_commit(job_store: JobStore, watched: _Watched) -> None:
    jobs = await _hold(job_store, 21)
    lost = jobs[20]
    await job_store.release({lost.id: lost.token})
    async with GroupCommit(watched, max_group=8) as commit:
        accepted = await asyncio.gather(*(commit.finish(outcome(job)) for job in jobs))
    assert accepted == [True] * 20 + [False]
    assert sum(watched.sizes) == 21
    assert max(watched.sizes) == 8


@pytest.mark.parametrize("claimed", [False, True])
async def test_of_two_outcomes_of_one_job_each_is_judged_by_itself(
    job_store: JobStore, claimed: bool
) -> None:
    """As when its message came twice: who did not end it must not publish what is not stored."""
    ids = await admit(job_store, spec())
    (read,) = await job_store.claimable(ids)
    if claimed:
        await job_store.claim(ids, owner="w", lease_s=LONG_LEASE_S)
    first = outcome(read, words="first", unclaimed=True)
    second = outcome(read, words="second", unclaimed=not claimed)
    async with GroupCommit(job_store, gather_s=0.05) as commit:
        standing = await asyncio.gather(commit.finish_all([first]), commit.finish_all([second]))
    assert standing == ([set(), {read.id}] if claimed else [{read.id}, set()])
    stored = (await job_store.results("default", ids))[read.id]
    assert stored.text == ("second" if claimed else "first")


async def test_an_outage_reaches_everyone_who_waited(
    job_store: JobStore, watched: _Watched
) -> None:
    jobs = await _hold(job_store, 5)
    watched.fail_next = [DatabaseUnavailableError("away")]
    async with GroupCommit(watched, gather_s=0.05) as commit:
        results = await asyncio.gather(
            *(commit.finish(outcome(job)) for job in jobs), return_exceptions=True
        )
        assert [type(result) for result in results] == [DatabaseUnavailableError] * 5
        assert all(await asyncio.gather(*(commit.finish(outcome(job)) for job in jobs)))


async def test_one_that_cannot_be_stored_does_not_take_the_others_along(
    job_store: JobStore, watched: _Watched
) -> None:
    jobs = await _hold(job_store, 3)
    watched.fail_next = [InvalidRequestError("of the first alone"), InvalidRequestError("group")]
    async with GroupCommit(watched, gather_s=0.05) as commit:
        results = await asyncio.gather(
            *(commit.finish(outcome(job)) for job in jobs), return_exceptions=True
        )
    assert isinstance(results[0], InvalidRequestError)
    assert results[1:] == [True, True]


async def test_a_caller_who_leaves_does_not_undo_the_commit(
    job_store: JobStore, watched: _Watched
) -> None:
    (job, other) = await _hold(job_store, 2)
    commit = GroupCommit(watched)
    watched.open.clear()
    leaver = asyncio.create_task(commit.finish(outcome(job)))
    stayer = asyncio.create_task(commit.finish(outcome(other)))
    await asyncio.sleep(0)
    leaver.cancel()
    watched.open.set()
    assert await stayer
    await commit.aclose()
    await commit.aclose()
    assert leaver.cancelled()
    assert set(await job_store.results("default", [job.id, other.id])) == {job.id, other.id}
    with pytest.raises(RuntimeError, match="closed"):
        await commit.finish(outcome(job))


async def test_closing_that_is_cut_tells_those_who_wait(
    job_store: JobStore, watched: _Watched
) -> None:
    jobs = await _hold(job_store, 3)
    commit = GroupCommit(watched, max_group=1)
    watched.open.clear()
    waiting = [asyncio.create_task(commit.finish(outcome(job))) for job in jobs]
    await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await commit.aclose()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
