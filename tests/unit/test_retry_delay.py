"""The pause before a job is tried again: longer each time, never the same, and bounded."""

from __future__ import annotations

from itertools import pairwise

from workers.pipeline import Rules

RULES = Rules(model="m", owner="w", lease_s=10, max_attempts=3)


def test_it_doubles_to_a_bound() -> None:
    tried = [[RULES.delay_s(attempts) for _ in range(50)] for attempts in (1, 2, 3, 4, 20, 100)]
    assert all(0.5 <= each <= 1 for each in tried[0])
    assert all(max(less) <= min(more) for less, more in pairwise(tried[:4]))
    assert max(tried[-1]) <= 60
    assert min(tried[-1]) >= 30


def test_those_who_failed_together_do_not_come_back_together() -> None:
    assert len({RULES.delay_s(3) for _ in range(50)}) > 40
