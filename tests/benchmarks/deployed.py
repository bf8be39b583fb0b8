"""A deployment for benchmarks: the embedded stack, a worker, and the time each part takes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import psutil

from tests.benchmarks.stand_in import MODEL
from workers.aio_client import AsyncJobClient
from workers.devices import Fleet
from workers.pinning import share_cpu
from workers.serving import prepare_environment
from workers.settings import Settings, load_settings

_START_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """Workers, most often one, on an embedded stack of their own, and a client of it."""

    settings: Settings
    fleet: Fleet
    client: AsyncJobClient

    @property
    def worker(self) -> psutil.Process:
        """The first worker's main process."""
        return self.workers[0]

    @property
    def workers(self) -> list[psutil.Process]:
        """The workers' main processes."""
        processes = [worker.process for worker in self.fleet.workers]
        if None in processes:
            msg = "a worker has not been started"
            raise RuntimeError(msg)
        return [psutil.Process(process.pid) for process in processes if process is not None]

    @contextmanager
    def workers_stopped(self) -> Iterator[None]:
        """Let the workers' main processes stand still meanwhile, so that a queue can fill."""
        workers = self.workers
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGCONT)

    def processor_s(self) -> dict[str, float]:
        """Return the seconds of processor time that each part has taken so far."""
        # The client runs in this very process.
        spent = {"client": _spent(psutil.Process()), "worker": sum(map(_spent, self.workers))}
        for child in chain.from_iterable(one.children(recursive=True) for one in self.workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent["engine"] = spent.get("engine", 0.0) + _spent(child)
        home = str(self.settings.data_dir)
        for process in psutil.process_iter(["name", "cmdline", "ppid"]):
            words = " ".join(process.info["cmdline"] or ())
            for part, program in (("postgres", "postgres"), ("redis", "valkey")):
                if home in words and program in (process.info["name"] or ""):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        family = [process, *process.children(recursive=True)]
                        spent[part] = spent.get(part, 0.0) + sum(map(_spent, family))
        return spent


def _spent(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


@asynccontextmanager
async def deployed(
    *,
    engine_args: Sequence[str] = (),
    workers: int = 1,
    stand_in: bool = False,
    **changes: object,
) -> AsyncIterator[Deployed]:
    """Start the embedded stack in a folder that is thrown away, and workers.

    Args:
        engine_args: Of vLLM's command line.
        workers: How many; they divide the cores.
        stand_in: Whether `tests.benchmarks.stand_in` takes vLLM's place.
        changes: Settings by name.

    Yields:
        The deployment, once it takes jobs.
    """
    prepare_environment()
    if stand_in:
        changes["served_model_name"] = MODEL
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-", ignore_cleanup_errors=True) as at:
        # The embedded servers may run as another user.
        os.chmod(at, 0o755)  # noqa: PTH101, S103  a coroutine may not ask a Path
        settings = load_settings(data_dir=Path(at) / "data", **changes)
        async with AsyncJobClient(settings) as client:
            await client.connection()
            say(f"starting {workers} worker{'s' * (workers > 1)}")
            started = time.monotonic()
            fleet = Fleet(settings, share_cpu([1] * workers), engine_args=engine_args, on_event=say)
            if stand_in:
                for worker in fleet.workers:
                    worker.command = [sys.executable, "-m", "tests.benchmarks.stand_in"]
            fleet.start()
            try:
                await asyncio.to_thread(fleet.wait_ready, _START_S)
                say(f"jobs are taken after {time.monotonic() - started:.0f} s")
                yield Deployed(settings=settings, fleet=fleet, client=client)
            finally:
                await asyncio.to_thread(fleet.stop)


def say(text: str) -> None:
    """Tell how it goes, on standard error."""
    print(f"[{os.getpid()}] {text}", file=sys.stderr, flush=True)
