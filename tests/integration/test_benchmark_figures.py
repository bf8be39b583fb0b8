"""The benchmarks of look-ups at a tiny size: they run, and what they measure is right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import million, similarity
from tests.benchmarks.figures import Figure
from tests.benchmarks.shelf import Kept


def by_name(found: list[Figure]) -> dict[str, float]:
    return {figure.name: figure.value for figure in found}


@pytest.mark.long
def test_look_ups_and_hits(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run measures what the first has stored."""
    monkeypatch.setattr(similarity, "LOOK_UPS", 20)
    monkeypatch.setattr(similarity, "HITS", 24)
    kept = Kept(database_url=database_url, folder=tmp_path)
    first = by_name(asyncio.run(similarity.measure(kept, 120)))
    assert kept.filled
    found = by_name(asyncio.run(similarity.measure(kept, 120)))
    assert found.keys() == first.keys()
    assert found["answers"] == 120
    assert found["guarded_hit.served"] > 0.9
    assert all(value == 1 for name, value in found.items() if name.endswith("recall"))
    assert all(value > 0 for name, value in found.items() if name.endswith("_ms"))


def test_made_up_vectors(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(million, "LOOK_UPS", 10)
    vectors = million.points(600, seed=1)
    owners = np.random.default_rng(3).choice(list(million.NAMESPACES), size=600)
    ids = million.made_up_ids(600)
    million.fill(database_url, ids, vectors, owners)
    took, recall = asyncio.run(million.look_ups(database_url, ids, vectors, owners))
    assert set(recall.values()) == {1.0}
    assert {len(times) for times in took.values()} == {10}
