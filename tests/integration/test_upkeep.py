"""The store is kept within its bounds by one worker at a time, and hits are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from uuid import UUID, uuid4

import pytest

from schema.errors import DatabaseUnavailableError
from schema.jobs import JobResult, JobState, Provenance
from tests.integration.builders import answer, change, number
from workers.hits import HitCounter
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.locks import UPKEEP, only_one
from workers.store.records import Outcome
from workers.upkeep import Tidied, Upkeep


@pytest.fixture
def upkeep(database: Database, answer_store: PostgresAnswers) -> Upkeep:
    """The subject, with room for two answers."""
    return Upkeep(database=database, answers=answer_store, answers_limit=2, every_s=0.02)


async def fill(database: Database, answers: PostgresAnswers) -> None:
    """Store four old answers, one that has expired and a mark that nobody owns."""
    for _ in range(4):
        await answers.put(answer(engine_s=1.0))
    await change(database, "UPDATE answers SET created_at = now() - interval '1 hour'")
    over = answer()
    await answers.put(over)
    await change(database, "UPDATE answers SET expires_at = now() WHERE id = :id", id=over.id)
    await answers.mark_flight("default", b"k", "dead", 1)
    await change(database, "UPDATE flight_markers SET until = now() - interval '1 hour'")


async def test_a_pass_removes_what_is_over_and_what_is_too_much(
    upkeep: Upkeep, database: Database, answer_store: PostgresAnswers
) -> None:
    await fill(database, answer_store)
    assert await upkeep.run_once() == Tidied(expired=1, evicted=2, flights=1)
    done = await upkeep.run_once()
    assert done is not None
    assert not done.anything


async def test_one_at_a_time(upkeep: Upkeep, database: Database) -> None:
    async with only_one(database, UPKEEP) as mine:
        assert mine
        assert await upkeep.run_once() is None


async def test_passes_go_on_by_themselves(
    upkeep: Upkeep,
    database: Database,
    answer_store: PostgresAnswers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await fill(database, answer_store)
    crowded, failures = answer_store.crowded, [DatabaseUnavailableError("away"), ValueError("bug")]

    async def stumble(limit: int) -> list[str]:
        if failures:
            raise failures.pop()
        return await crowded(limit)

    monkeypatch.setattr(answer_store, "crowded", stumble)
    upkeep.start()
    upkeep.start()
    async with asyncio.timeout(60):
        while await number(database, "SELECT count(*) FROM answers") != 2:
            await asyncio.sleep(0.02)
    await upkeep.aclose()
    await upkeep.aclose()


def given(answer_id: UUID | None, provenance: Provenance | None) -> Outcome:
    job_id = uuid4()
    result = JobResult(job_id=job_id, namespace="default", status=JobState.DONE, token=1)
    return Outcome(
        job_id=job_id, token=1, result=result, answer_id=answer_id, provenance=provenance
    )


async def test_hits_are_counted_together_and_prolong_nothing(
    answer_store: PostgresAnswers, database: Database
) -> None:
    made = answer()
    await answer_store.put(made)
    await change(database, "UPDATE answers SET expires_at = now() + interval '1 hour'")
    before = await number(database, "SELECT expires_at FROM answers")
    hits = HitCounter(answer_store, every_s=0.02)
    hits.start()
    hits.start()
    for provenance in (*Provenance, None):
        hits.note(given(made.id, provenance))
    hits.note(given(None, Provenance.EXACT))
    async with asyncio.timeout(60):
        while await number(database, "SELECT hits FROM answers") != 3:
            await asyncio.sleep(0.02)
    hits.note(given(made.id, Provenance.EXACT))
    await hits.aclose()  # writes what has gathered
    await hits.aclose()
    assert await number(database, "SELECT hits FROM answers") == 4
    assert await number(database, "SELECT expires_at FROM answers") == before


class _Away:
    def __init__(self) -> None:
        self.away = True
        self.kept: dict[UUID, int] = {}

    async def touch(self, hits: Mapping[UUID, int]) -> None:
        if self.away:
            raise DatabaseUnavailableError("away")
        self.kept.update(hits)


async def test_hits_wait_for_a_store_that_is_away() -> None:
    store, answer_id = _Away(), uuid4()
    hits = HitCounter(store)
    for _ in range(2):
        hits.note(given(answer_id, Provenance.SEMANTIC))
        with pytest.raises(DatabaseUnavailableError):
            await hits.flush()
    store.away = False
    await hits.flush()
    assert store.kept == {answer_id: 2}
