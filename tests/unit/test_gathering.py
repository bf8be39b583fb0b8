"""Questions asked at once: one statement, and nobody pays for another's trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from workers.store.gathering import Gathering


class Asked:
    """Answers squares, of even numbers alone, when it is let."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.go = asyncio.Event()
        self.fails = False

    async def __call__(self, keys: Sequence[int]) -> dict[int, int]:
        """Answer a group."""
        self.groups.append(list(keys))
        await self.go.wait()
        if self.fails:
            raise OSError("away")
        return {key: key * key for key in keys if key % 2 == 0}


async def test_those_who_come_while_one_is_asked_go_together() -> None:
    """The first waits for nobody; the same key is asked for once."""
    asked = Asked()
    gathering = Gathering(asked, name="test", most=3)
    callers = [asyncio.create_task(gathering.get(0))]
    while not asked.groups:
        await asyncio.sleep(0)
    callers += [asyncio.create_task(gathering.get(key)) for key in (2, 3, 2, 4, 6)]
    await asyncio.sleep(0)
    asked.go.set()
    assert await asyncio.gather(*callers) == [0, 4, None, 4, 16, 36]
    assert asked.groups == [[0], [2, 3, 4], [6]]


async def test_who_is_cancelled_costs_the_others_nothing() -> None:
    """The statement goes on."""
    asked = Asked()
    gathering = Gathering(asked, name="test")
    first, second = (asyncio.create_task(gathering.get(key)) for key in (2, 4))
    while not asked.groups:
        await asyncio.sleep(0)
    first.cancel()
    asked.go.set()
    assert await second == 16
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_failure_is_told_to_all_of_its_group_and_no_other() -> None:
    """Whoever asks next asks anew."""
    asked = Asked()
    asked.fails = True
    asked.go.set()
    gathering = Gathering(asked, name="test")
    failed = await asyncio.gather(*map(gathering.get, (2, 4)), return_exceptions=True)
    assert [type(failure) for failure in failed] == [OSError, OSError]
    asked.fails = False
    assert await gathering.get(8) == 64


@pytest.mark.parametrize("wanted_only", [True, False])
async def test_what_nobody_waits_for_any_more_is_asked_for_only_where_that_matters(
    wanted_only: bool,
) -> None:
    asked = Asked()
    gathering = Gathering(asked, name="test", wanted_only=wanted_only)
    callers = [asyncio.create_task(gathering.get(0))]
    while not asked.groups:
        await asyncio.sleep(0)
    callers += [asyncio.create_task(gathering.get(key)) for key in (2, 4, 4)]
    await asyncio.sleep(0)
    callers[1].cancel()
    callers[2].cancel()  # another waits for the same
    asked.go.set()
    await asyncio.gather(*callers, return_exceptions=True)
    assert callers[3].result() == 16
    assert asked.groups == [[0], [4] if wanted_only else [2, 4]]
