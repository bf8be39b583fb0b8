"""Log lines: an equal warning is written once a minute."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from workers.logs import OnceAMinute


def written(processor: OnceAMinute, **event: Any) -> dict[str, Any] | None:
    try:
        return dict(processor(None, "", {"level": "warning", **event}))
    except structlog.DropEvent:
        return None


def test_an_equal_warning_is_written_once_a_minute() -> None:
    now = [0.0]
    once = OnceAMinute(clock=lambda: now[0])
    down = {"event": "waiting for Redis", "reason": "refused"}
    lines = []
    for second in range(121):
        now[0] = float(second)
        lines.append(written(once, timestamp=second, **down))
    kept = [line for line in lines if line is not None]
    assert [line["timestamp"] for line in kept] == [0, 60, 120]
    assert [line.get("repeated") for line in kept] == [None, 59, 59]


def test_what_says_something_else_is_written() -> None:
    once = OnceAMinute(clock=lambda: 0.0)
    for job_id in range(1000):
        assert written(once, event="job refused", job_id=job_id) is not None
    assert written(once, event="job refused", job_id=999) is None
    for _ in range(2):  # an error is never left out
        assert written(once, event="job refused", job_id=999, level="error") is not None


@pytest.mark.parametrize("event", ["a", "b"])
def test_a_first_line_says_nothing_of_others(event: str) -> None:
    assert written(OnceAMinute(), event=event) == {"level": "warning", "event": event}
