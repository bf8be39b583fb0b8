"""One worker generates, the others wait for what it stores, and no longer than that."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.builders import answer, change, number
from workers.engine.protocols import FlightMarkers
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

KEY = b"k" * 32


def test_the_store_marks_flights(answer_store: PostgresAnswers) -> None:
    assert isinstance(answer_store, FlightMarkers)


async def test_of_many_at_once_one_is_the_leader(answer_store: PostgresAnswers) -> None:
    got = await asyncio.gather(
        *(answer_store.mark_flight("default", KEY, f"w{n}", 60) for n in range(8))
    )
    assert sum(got) == 1
    leader = f"w{got.index(True)}"
    assert await answer_store.mark_flight("default", KEY, leader, 60)  # renewed
    assert await answer_store.mark_flight("other", KEY, "w", 60)  # another tenant's
    await answer_store.unmark_flight("default", KEY, "stranger")
    assert not await answer_store.mark_flight("default", KEY, "stranger", 60)
    await answer_store.unmark_flight("default", KEY, leader)
    assert await answer_store.mark_flight("default", KEY, "stranger", 60)


async def test_a_dead_owners_mark_ends(answer_store: PostgresAnswers, database: Database) -> None:
    assert await answer_store.mark_flight("default", KEY, "dead", 60)
    await change(database, "UPDATE flight_markers SET until = now() - interval '1 second'")
    assert await answer_store.wait_answer("default", KEY, 60) is None
    assert await answer_store.purge("flights") == 0  # it may be taken over still
    assert await answer_store.mark_flight("default", KEY, "next", 60)
    await answer_store.unmark_flight("default", KEY, "dead")
    assert await number(database, "SELECT owner FROM flight_markers") == "next"
    await change(database, "UPDATE flight_markers SET until = now() - interval '1 hour'")
    assert await answer_store.purge("flights") == 1


async def test_the_answer_comes_to_those_who_wait(answer_store: PostgresAnswers) -> None:
    assert await answer_store.mark_flight("default", KEY, "leader", 60)
    waiting = [asyncio.create_task(answer_store.wait_answer("default", KEY, 60)) for _ in range(3)]
    given = answer(fingerprint=KEY)
    await answer_store.put(given)
    await answer_store.unmark_flight("default", KEY, "leader")
    got = await asyncio.gather(*waiting)
    assert [one.id for one in got if one] == [given.id] * 3


async def test_nobody_waits_for_a_flight_that_was_given_up(answer_store: PostgresAnswers) -> None:
    assert await answer_store.mark_flight("default", KEY, "leader", 60)
    waiting = asyncio.create_task(answer_store.wait_answer("default", KEY, 60))
    await answer_store.unmark_flight("default", KEY, "leader")
    async with asyncio.timeout(30):
        assert await waiting is None


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
async def test_the_wait_has_an_end(answer_store: PostgresAnswers, timeout_s: float) -> None:
    assert await answer_store.mark_flight("default", KEY, "leader", 60)
    async with asyncio.timeout(30):
        assert await answer_store.wait_answer("default", KEY, timeout_s) is None
