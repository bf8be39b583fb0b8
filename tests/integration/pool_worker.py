"""A real worker process of `pool_app`, and what a test waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
DB = 13


def until(what: str, condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value of `condition`; fail after the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {deadline_s:g} s in vain for: {what}")


def kombu_url(redis_url: str) -> str:
    """Return a redis-py URL as kombu has it, on the database of these tests."""
    plain = redis_url.partition("?")[0]
    if plain.startswith("unix://"):
        return f"redis+socket://{plain.removeprefix('unix://')}?virtual_host={DB}"
    return f"{plain.rpartition('/')[0] if plain.count('/') > 2 else plain}/{DB}"


def plain_redis(redis_url: str) -> redis.Redis:  # type: ignore[type-arg]
    return redis.Redis.from_url(redis_url.partition("?")[0], db=DB)


class Worker:
    """One worker process, and the traces it leaves."""

    def __init__(self, url: str, server: Any, log: Path, settings: dict[str, Any]) -> None:
        self.server = server
        self.log = log
        environ = {f"POOL_APP_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", "celery", "-A", "tests.integration.pool_app", "worker"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "-l", "INFO", "--without-gossip", "--without-mingle", "-n", "w@test"],
                cwd=ROOT,
                env={**os.environ, "POOL_APP_URL": url, "PYTHONPATH": str(ROOT), **environ},
                stdout=out,
                stderr=subprocess.STDOUT,
                # Of a group of its own, so that a Ctrl-C for pytest does not reach it.
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ready(self) -> Worker:
        until("the worker to be ready", lambda: " ready." in self.output() or self.gone())
        assert self.process.poll() is None, self.output()
        return self

    def gone(self) -> bool:
        return self.process.poll() is not None

    def send(self, *signals: signal.Signals) -> None:
        for number in signals:
            self.process.send_signal(number)

    def exit_code(self, deadline_s: float = 30) -> int:
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker does not end:\n{self.output()[-3000:]}") from None

    def events(self) -> list[str]:
        return [item.decode() for item in self.server.lrange("events", 0, -1)]

    def saw(self, *events: str) -> None:
        until(f"events {events}", lambda: all(event in self.events() for event in events))


@contextlib.contextmanager
def running(url: str, server: Any, log: Path, **settings: Any) -> Iterator[Worker]:
    """Run a worker; it is killed at the end if it has not ended."""
    worker = Worker(url, server, log, settings)
    try:
        yield worker
    finally:
        if not worker.gone():
            worker.process.kill()
        worker.process.wait()
