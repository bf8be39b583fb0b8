"""How fast a queue is taken, as seen by who fills it: soon right, and not led astray by a blow."""

from __future__ import annotations

import pytest

from workers import dispatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dispatch, "time", clock)
    return clock


@pytest.mark.parametrize("pause_s", [0.02, 0.2])
def test_what_is_taken_is_soon_known(clock: Clock, pause_s: float):
    drain = dispatch._Drain()
    drain.see(0)
    while clock.now < 1.5:
        drain.add(round(2_000 * pause_s))
        clock.now += pause_s
        drain.see(0)  # all of it was taken
    assert 1_700 < drain.a_second < 2_300


def test_slots_that_are_filled_at_one_blow_do_not_count_for_much(clock: Clock):
    slots = 256
    drain = dispatch._Drain()
    drain.see(3 * slots)
    clock.now += 0.02
    drain.see(2 * slots)
    # Three rounds of slots are let in anyway.
    assert drain.a_second <= 3 * slots
