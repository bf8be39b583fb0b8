"""Whatever dies, every accepted job ends in exactly one outcome that is delivered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.acceptance.faults import harness

#: Any other may be given; the default makes a failure one that can be seen again.
SEED = int(os.environ.get("PROMPTMILL_FAULT_SEED", "20261"))
SECONDS = 60.0


@pytest.mark.timeout(900)
async def test_every_accepted_job_ends_once_and_is_delivered(tmp_path: Path) -> None:
    """A minute of faults with the scripted engine; `make soak` runs the same for longer."""
    report = await harness.run(tmp_path, seed=SEED, seconds=SECONDS)
    print(report.table())
    assert report.verdict.wrong == [], f"seed {report.seed}; see {report.log}"
    assert report.verdict.counts["jobs accepted"] > 0
    assert len(report.faults) >= 8, report.faults
    said = report.log.read_text()
    assert "waiting for Postgres" in said
    assert "waiting for Redis" in said
