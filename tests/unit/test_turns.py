"""Whose turn it is."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.turns import Turns


def test_equals_alternate():
    assert Turns({}).take(["a", "b"], 6) == ["a", "b", "a", "b", "a", "b"]


def test_nobody_waits():
    assert Turns({}).take([], 5) == []
    assert Turns({}).take(["a"], -3) == []


def test_who_comes_late_is_next_and_gains_nothing_by_it():
    turns = Turns({})
    turns.take(["a"], 1000)
    order = turns.take(["a", "b"], 10)
    assert order[:2].count("b") >= 1
    assert Counter(order)["b"] in {5, 6}


def test_turns_without_a_job_are_given_back():
    turns = Turns({})
    turns.take(["a", "b"], 200)
    turns.give_back("b", 100)
    # It had no job for them, so it has had no more than the present moment.
    assert turns.take(["a", "b"], 2).count("b") >= 1


@settings(deadline=None)
@given(
    weights=st.dictionaries(
        st.sampled_from("abcde"), st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]), min_size=2
    ),
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_shares_are_as_the_weights(weights: dict[str, float], steps: list[int]):
    turns = Turns(weights)
    had: Counter[str] = Counter()
    for step in steps:
        had.update(turns.take(list(weights), step))
    # Between any two that wait all the time the paper bounds the difference in normalised
    # service by one job of each.
    for one, weight in weights.items():
        for other, others in weights.items():
            apart = abs(had[one] / weight - had[other] / others)
            assert apart <= 1 / weight + 1 / others + 1e-9
