"""One worker process with the real engine, for all acceptance tests of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from workers.aio_client import AsyncJobClient
from workers.devices import Device, Fleet
from workers.local import LocalStack
from workers.settings import Settings, load_settings


@dataclass
class Deployment:
    """A fleet of one worker on the embedded stack."""

    settings: Settings
    fleet: Fleet
    events: list[str] = field(default_factory=list)

    @property
    def worker_pid(self) -> int:
        """Of the worker's main process."""
        process = self.fleet.workers[0].process
        assert process is not None
        return process.pid

    def environment(self) -> dict[str, str]:
        """For commands that are to use this deployment."""
        return {**os.environ, "PROMPTMILL_DATA_DIR": str(self.settings.data_dir)}

    def engine_core(self) -> psutil.Process:
        """vLLM's engine process below the worker."""
        for child in psutil.Process(self.worker_pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("EngineCore" in word for word in child.cmdline()):
                    return child
        msg = "the worker has no engine process"
        raise AssertionError(msg)


@pytest.fixture(scope="package")
def deployment(stack: LocalStack) -> Iterator[Deployment]:
    """A worker that takes jobs; gone before other packages' tests, which need the cores."""
    settings = load_settings(data_dir=Path(stack.data_dir), lease_s=6.0)
    events: list[str] = []
    fleet = Fleet(settings, [Device()], on_event=events.append)
    fleet.start()
    try:
        fleet.wait_ready(timeout_s=900)
        yield Deployment(settings=settings, fleet=fleet, events=events)
    finally:
        fleet.stop()


@pytest.fixture
async def client(deployment: Deployment) -> AsyncIterator[AsyncJobClient]:
    """A client of the deployment."""
    async with AsyncJobClient(deployment.settings) as client:
        yield client
