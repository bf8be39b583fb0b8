"""What would stop the event loop: bursts, and the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from uuid import uuid4

from schema.jobs import JobResult, JobState
from workers.engine.pace import Pace
from workers.engine.protocols import Entity, Token
from workers.pauses import no_collection, short_pauses
from workers.streams import deliveries_of


class Work:
    """Work of one millisecond by a clock of its own, and in which turn of the loop it was done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turn = 0
        self.done: list[tuple[int, int]] = []  # turn, number

    def tick(self) -> None:
        self.turn += 1
        self._ticking = asyncio.get_running_loop().call_soon(self.tick)

    def stop(self) -> None:
        self._ticking.cancel()

    async def one(self, pace: Pace, number: int) -> None:
        await pace.turn()
        self.now += 0.001
        self.done.append((self.turn, number))


async def test_a_burst_takes_the_loop_in_portions() -> None:
    work = Work()
    pace = Pace(portion_s=0.004, clock=lambda: work.now)
    work.tick()
    await asyncio.gather(*(work.one(pace, number) for number in range(50)))
    work.stop()
    turns = [turn for turn, _ in work.done]
    assert max(turns.count(turn) for turn in set(turns)) <= 6
    assert [number for _, number in work.done] == list(range(50))  # in order


async def test_a_few_wait_for_nothing() -> None:
    work = Work()
    pace = Pace(portion_s=0.004, clock=lambda: work.now)
    work.tick()
    await asyncio.gather(*(work.one(pace, number) for number in range(4)))
    work.stop()
    assert len({turn for turn, _ in work.done}) == 1


async def test_whoever_gives_up_his_turn_holds_nobody_up() -> None:
    work = Work()
    pace = Pace(portion_s=0.0, clock=lambda: work.now)
    tasks = [asyncio.create_task(work.one(pace, number)) for number in range(10)]
    await asyncio.sleep(0)
    for task in tasks[1:8]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [number for _, number in work.done] == [0, 8, 9]


def test_what_survives_a_full_collection_is_not_looked_at_again() -> None:
    thresholds, watching = gc.get_threshold(), len(gc.callbacks)
    with short_pauses():
        kept = [[number] for number in range(1000)]
        assert any(one is kept for one in gc.get_objects())
        gc.collect()
        assert not any(one is kept for one in gc.get_objects())
    assert (gc.get_threshold(), len(gc.callbacks)) == (thresholds, watching)
    gc.unfreeze()


def test_full_collections_come_before_there_is_much_to_look_at() -> None:
    """However much there was when it began."""
    there = [[number] for number in range(300_000)]
    looks: list[int] = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            looks.append(len(gc.get_objects()))

    with short_pauses():
        gc.callbacks.append(count)
        kept = [[number] for number in range(60_000)]
        gc.callbacks.remove(count)
    gc.unfreeze()
    assert looks
    assert max(looks) < 15_000
    assert len(there) + len(kept) == 360_000


def test_the_collector_passes_over_tokens() -> None:
    """A full memory tier holds hundreds of thousands of them."""
    token = Token(text="a", lemma="a", pos="X", tag="X", dep="x", head=0)
    assert not gc.is_tracked(token)
    assert not gc.is_tracked(Entity(text="a", label="X", start=0, end=1))


def test_results_are_read_without_a_collection_and_it_goes_on_afterwards() -> None:
    result = JobResult(
        job_id=uuid4(), namespace="n", status=JobState.DONE, token=1, metadata={"similar": [{}] * 9}
    )
    entries = [(b"1-0", {b"result": result.json_text.encode()})] * 2_000
    looks: list[str] = []

    def count(phase: str, _info: dict[str, int]) -> None:
        looks.append(phase)

    gc.callbacks.append(count)
    try:
        found = deliveries_of(entries)
        at_once = looks.count("start")
        made = [[number] for number in range(20_000)]
    finally:
        gc.callbacks.remove(count)
    assert len(found) == 2_000
    assert at_once <= 1  # when it is on again; it would be thirty or more
    assert looks.count("start") > at_once, len(made)


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    with contextlib.suppress(RuntimeError), no_collection():
        raise RuntimeError
    assert gc.isenabled()
