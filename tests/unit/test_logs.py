"""Log lines: an equal warning is written once a minute."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from workers import logs
from workers.logs import OnceAMinute
from workers.serving import prepare_environment


@pytest.fixture
def _kept() -> Iterator[None]:
    """What this process' lines look like is the same afterwards."""
    root, config = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)
    for name in logs._CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_kept")
def test_celery_says_nothing_of_messages_that_go_well_unless_asked() -> None:
    trace = logging.getLogger("celery.app.trace")
    logs.configure(level="INFO", form="json")
    assert not trace.isEnabledFor(logging.INFO)
    assert trace.isEnabledFor(logging.ERROR)
    assert logging.getLogger("celery.worker").isEnabledFor(logging.INFO)
    logs.configure(level="DEBUG", form="json")
    assert trace.isEnabledFor(logging.DEBUG)


@pytest.mark.usefixtures("_kept")
def test_lines_of_json_name_their_worker(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="INFO", form="json", worker="m@host:gpu0:1")
    structlog.get_logger("workers.x").info("ours")
    logging.getLogger("celery.y").info("theirs")
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["worker"]) for line in said] == [
        ("ours", "m@host:gpu0:1"),
        ("theirs", "m@host:gpu0:1"),
    ]


@pytest.fixture
def _vllms_logger() -> Iterator[None]:
    """It looks the same afterwards."""
    logger = logging.getLogger("vllm")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.mark.usefixtures("_vllms_logger")
def test_lines_of_vllms_processes_are_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are processes of vLLM's own: what it reads from the environment decides."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging

    for name in ("VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    prepare_environment(log_format="json")
    configure_logging(LoggingConfig())
    logger = logging.getLogger("vllm.some.module")
    capsys.readouterr()
    logger.info("unasked for")
    logger.warning("hello %s", "redis://me:hush@host")
    said = json.loads(capsys.readouterr().err)
    assert said.pop("timestamp")
    assert said == {
        "event": "hello redis://***@host",
        "level": "warning",
        "logger": "vllm.some.module",
    }


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
