"""What was withdrawn is forgotten by every process, and a Redis that is gone costs a line."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.builders import answer
from tests.integration.test_last_moments import Server, server  # noqa: F401  a fixture
from workers.cli import main
from workers.store.answers import PostgresAnswers

LINE_S = 240.0


async def said(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(LINE_S):
        return (await process.stdout.readline()).decode().strip()


def _is_ours(line: str) -> bool:
    """Whether a log line is written as ours are; libraries write others while they are imported."""
    return line.startswith("{")


async def test_all_tiers_of_all_processes_forget(
    server: Server,  # noqa: F811
    answer_store: PostgresAnswers,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespace = f"n{uuid4().hex}"
    doomed = answer(namespace=namespace, fingerprint=b"d" * 32)
    kept = answer(namespace=namespace, fingerprint=b"k" * 32)
    for each in (doomed, kept):
        await answer_store.put(each)
    redis_url = f"unix://{tmp_path / 'v.sock'}"
    command = (redis_url, database_url, namespace, str(doomed.id), str(kept.id))
    workers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration.forgetting_worker", *command),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
        )
        for _ in range(2)
    ]
    try:
        # It forgets all when it begins to listen; what comes later is what counts.
        assert [await said(worker) for worker in workers] == ["left 0", "left 0"]

        monkeypatch.setenv("PROMPTMILL_DATABASE_URL", database_url)
        monkeypatch.setenv("PROMPTMILL_REDIS_URL", redis_url)
        words = ["cache", "report-bad", str(doomed.id), "--namespace", namespace]
        assert await asyncio.to_thread(main, words) == 0
        told = time.monotonic()
        assert [await said(worker) for worker in workers] == ["left 1", "left 1"]
        # The promise is a second; a busy machine may be late. By itself it takes five minutes.
        assert time.monotonic() - told < 15
        assert await answer_store.get(namespace, doomed.fingerprint) is None
        assert await answer_store.get(namespace, kept.fingerprint) is not None

        # What is withdrawn while Redis is away cannot be heard of: all is forgotten.
        await server.kill()
        await asyncio.sleep(3)  # six times as long as a worker waits before it tries again
        await server.start()
        assert [await said(worker) for worker in workers] == ["left 0", "left 0"]
    finally:
        errors = [(await worker.communicate(b""))[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    for lines in errors:
        warned = Counter(
            (line["event"], line.get("reason"))
            for line in map(json.loads, filter(_is_ours, lines.decode().splitlines()))
            if line["level"] == "warning"
        )
        assert any(event == "announcements interrupted" for event, _ in warned)
        assert set(warned.values()) == {1}, warned
