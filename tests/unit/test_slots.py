"""Slots: who gets a place, and how many there are."""

from __future__ import annotations

import asyncio

from workers.slots import Slots


async def test_more_is_claimed_while_nearly_all_jobs_are_repeats() -> None:
    slots = Slots(4, most_extra=12)
    for _ in range(30):
        slots.claimed(4, repeats=4)
    assert slots.places == 16
    assert await slots.take(20) == 16
    waiting = asyncio.create_task(slots.take(2))
    await asyncio.sleep(0)
    slots.claimed(4, repeats=0)
    assert slots.places == 4
    # What was taken beyond the four has to come back before anybody gets a place again.
    slots.give(12)
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.give(1)
    assert await waiting == 1
    slots.give(4)
    assert slots.free == 4


async def test_a_number_that_was_asked_for_is_kept() -> None:
    slots = Slots(4)
    assert not slots.nearly_all_repeat
    for _ in range(30):
        slots.claimed(4, repeats=4)
    assert slots.nearly_all_repeat
    assert slots.places == 4
    assert await slots.take(20) == 4


async def test_all_places_are_taken_whatever_their_number_becomes() -> None:
    slots = Slots(2, most_extra=2)
    assert await slots.take(1) == 1
    everything = asyncio.create_task(slots.take_all())
    await asyncio.sleep(0)
    for _ in range(30):
        slots.claimed(1, repeats=1)
    slots.give(1)
    taken = await everything
    assert taken == slots.places == 4
    assert slots.free == 0
    slots.give(taken)
    assert slots.free == 4


async def test_the_most_urgent_is_served_first() -> None:
    slots = Slots(1)
    await slots.take(1)
    served: list[str] = []

    async def take(name: str, priority: int) -> None:
        await slots.take(1, priority=priority)
        served.append(name)

    waiting = [
        asyncio.create_task(take(name, priority))
        for name, priority in (("late", 9), ("usual", 5), ("next", 5), ("urgent", 0))
    ]
    await asyncio.sleep(0)
    for _ in waiting:
        slots.give(1)
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert served == ["urgent", "usual", "next", "late"]
