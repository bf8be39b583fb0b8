"""`promptmill up` with the real engine, for all acceptance tests of a run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from tests.otlp_collector import Collector
from workers.aio_client import AsyncJobClient
from workers.local import LocalStack
from workers.settings import Settings, load_settings

_ALL_READY = re.compile(r"^ready$", re.MULTILINE)
_WORKER_READY = re.compile(r"^worker on .* is ready$", re.MULTILINE)
# The command, which the kernel is to end when the tests are killed; they stop it otherwise.
_UP = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {signal.SIGTERM.value})  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, "-m", "workers.cli", "up"])
"""
READY_S = 900.0
ENDED_S = 180.0


class Deployment:
    """The command in a process of its own, with one worker, on the embedded stack.

    Args:
        settings: Of clients.
        log: File that takes what the command says.
        otlp_endpoint: Where its workers send spans.
    """

    def __init__(self, settings: Settings, log: Path, *, otlp_endpoint: str) -> None:
        self.settings = settings
        self._log = log
        self._otlp_endpoint = otlp_endpoint
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: object) -> None:
        """Start it, with settings of its own; return when jobs are taken."""
        settings = {"otlp_endpoint": self._otlp_endpoint, **settings}
        told = {f"PROMPTMILL_{name.upper()}": str(value) for name, value in settings.items()}
        before = self._said(_ALL_READY)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _UP],
                env={**self.environment(), **told},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + READY_S
        while self._said(_ALL_READY) == before:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.1)

    def end(self, *signals: signal.Signals) -> int:
        """Send it signals; return its exit code. Nothing that it started may be left."""
        assert self._process is not None
        family = psutil.Process(self._process.pid).children(recursive=True)
        for number in signals:
            self._process.send_signal(number)
            time.sleep(0.5)  # two at once are one
        code = self._process.wait(ENDED_S)
        assert [one for one in family if _lives(one)] == []
        return code

    def stop(self) -> None:
        """End it if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGINT, signal.SIGINT)

    @property
    def worker_pid(self) -> int | None:
        """Of the worker's main process; None while it is replaced."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(child.pid) == child.pid:  # a worker has a session of its own
                    return child.pid
        return None

    def worker_processes(self) -> list[psutil.Process]:
        """The worker's main process, and all that it started."""
        pid = self.worker_pid
        assert pid is not None  # or it would be this process
        main = psutil.Process(pid)
        return [main, *main.children(recursive=True)]

    def engine_core(self) -> psutil.Process:
        """vLLM's engine process below the worker."""
        for child in self.worker_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("EngineCore" in word for word in child.cmdline()):
                    return child
        msg = "the worker has no engine process"
        raise AssertionError(msg)

    @contextlib.asynccontextmanager
    async def replaced(self) -> AsyncIterator[None]:
        """Leave the block once a new worker takes jobs."""
        before, said = self.worker_pid, self._said(_WORKER_READY)
        yield
        async with asyncio.timeout(READY_S):
            while self._said(_WORKER_READY) == said:
                await asyncio.sleep(0.1)
        assert self.worker_pid != before

    def environment(self) -> dict[str, str]:
        """For commands that are to use this deployment."""
        return {**os.environ, "PROMPTMILL_DATA_DIR": str(self.settings.data_dir)}

    def _said(self, line: re.Pattern[str]) -> int:
        return len(line.findall(self._log.read_text())) if self._log.exists() else 0


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Takes the spans of the deployment's worker."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="package")
def deployment(
    stack: LocalStack, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """One that takes jobs; gone before other packages' tests, which need the cores."""
    # Clients in this process are not traced: a process has one tracer for all its life.
    settings = load_settings(data_dir=Path(stack.data_dir))
    log = tmp_path_factory.mktemp("up") / "up.log"
    made = Deployment(settings, log, otlp_endpoint=collector.url)
    try:
        made.start(lease_s=6.0)
        yield made
    finally:
        made.stop()


@pytest.fixture
async def client(deployment: Deployment) -> AsyncIterator[AsyncJobClient]:
    """A client of the deployment."""
    async with AsyncJobClient(deployment.settings) as client:
        yield client
