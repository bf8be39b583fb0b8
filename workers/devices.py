"""Devices and the worker processes on them: one worker a device or tensor-parallel group.

A worker is pinned by ``CUDA_VISIBLE_DEVICES`` in the environment that it is started with, so before
anything in it can touch CUDA. Each worker is a process of its own, started anew when it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError, EngineGoneError, InvalidRequestError
from workers.worker_process import STOP_GRACE_S, SUPERVISED, WorkerProcess

if TYPE_CHECKING:
    from workers.settings import Settings

_LOOK_S = 0.05


def end_with_starter(*, drain_s: float) -> None:
    """Make this worker drain and end when the process that started it is gone, however it went.

    Args:
        drain_s: Seconds it may take; then it is killed, with all that it started.
    """
    if os.environ.pop(SUPERVISED, None) is None:
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_s + STOP_GRACE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="promptmill-starter", daemon=True).start()


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one worker runs on."""

    gpus: tuple[str, ...] = ()  # indices, UUIDs or MIG names; none is the CPU

    @property
    def name(self) -> str:
        """For people."""
        return "+".join(self.gpus) if self.gpus else "cpu"

    def environment(self) -> dict[str, str]:
        """Variables that pin a process to it."""
        if not self.gpus:
            return {}
        # By bus order, so that an index means the same as in nvidia-smi.
        return {
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }

    def engine_args(self) -> tuple[str, ...]:
        """Arguments of vLLM's command line that it asks for."""
        if len(self.gpus) < 2:
            return ()
        return ("--tensor-parallel-size", str(len(self.gpus)))


def parse_gpus(text: str) -> list[Device]:
    """Parse ``0,1:2,3``: groups separated by a colon, devices of a group by a comma.

    A UUID or MIG name may stand for an index. ``0:1`` is two workers, ``0,1`` one on two devices.

    Args:
        text: As on the command line.

    Raises:
        InvalidRequestError: It names no device, or one twice.
    """
    groups = [tuple(name.strip() for name in group.split(",")) for group in text.split(":")]
    named = [name for group in groups for name in group]
    for name in named:
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            msg = "is no device; give indices or GPU-/MIG- names, such as 0,1:2,3"
            raise InvalidRequestError(msg, field="gpus", value=name)
    if len(set(named)) < len(named):
        msg = "names a device twice; each worker needs devices of its own"
        raise InvalidRequestError(msg, field="gpus", value=text)
    return [Device(gpus=group) for group in groups]


def visible_devices() -> list[str]:
    """Return what this process' own CUDA_VISIBLE_DEVICES names; empty where it is unset."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()]


def cpu_cores(workers: int) -> list[str]:
    """Divide this process' cores among workers, as vLLM's ``VLLM_CPU_OMP_THREADS_BIND`` has it.

    Args:
        workers: How many.

    Raises:
        ConfigurationError: There are more workers than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        msg = f"{workers} workers need as many cores, and there are {len(cores)}"
        raise ConfigurationError(msg)
    share = len(cores) // workers
    return [",".join(map(str, cores[at * share : (at + 1) * share])) for at in range(workers)]


class Fleet:
    """The workers of this machine.

    Args:
        settings: Read from the environment and the command line.
        devices: One worker each.
        engine_args: Further arguments of vLLM's command line.
        on_event: Told what happens, in words.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Sequence[Device],
        *,
        engine_args: Sequence[str] = (),
        on_event: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.settings = settings
        self._stop_by = float("inf")  # by the clock of `time.monotonic`
        on_cpu = [device for device in devices if not device.gpus]
        cores = cpu_cores(len(on_cpu)) if len(on_cpu) > 1 else []
        self.workers = []
        for index, device in enumerate(devices):
            environment = device.environment()
            if cores and not device.gpus:
                environment["VLLM_CPU_OMP_THREADS_BIND"] = cores[index]
            command = [sys.executable, "-m", "workers.cli", "worker"]
            command += [f"--vllm-arg={word}" for word in (*device.engine_args(), *engine_args)]
            self.workers.append(
                WorkerProcess(
                    name=device.name,
                    command=command,
                    environment={**os.environ, **environment, **_settings_environment(settings)},
                    on_event=on_event,
                )
            )

    def start(self) -> None:
        """Start all workers."""
        for worker in self.workers:
            worker.start()

    def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Return when every worker takes jobs.

        Args:
            timeout_s: Seconds.

        Raises:
            EngineGoneError: A worker was given up, or the time is over; with its last words.
        """
        end = time.monotonic() + timeout_s
        while not all(worker.ready.is_set() for worker in self.workers):
            for worker in self.workers:
                if worker.given_up.is_set() or time.monotonic() > end:
                    words = "\n".join(worker.last_words)
                    msg = f"the worker on {worker.name} did not start; its last words:\n"
                    raise EngineGoneError(msg + words)
            time.sleep(_LOOK_S)

    @property
    def given_up(self) -> bool:
        """Whether no worker is left that could take jobs."""
        return all(worker.given_up.is_set() for worker in self.workers)

    def stop(self) -> None:
        """Let every worker finish what runs, then end it."""
        if self._stop_by == float("inf"):
            self._stop_by = time.monotonic() + self.settings.drain_s + STOP_GRACE_S
            for worker in self.workers:
                worker.stop()
        while any(worker.alive for worker in self.workers) and time.monotonic() < self._stop_by:
            time.sleep(_LOOK_S)
        for worker in self.workers:
            worker.join(0)

    def stop_now(self) -> None:
        """Let every worker hand back what it runs and end; `stop` waits for it.

        It may be called while `stop` waits, from a handler of a signal.
        """
        self._stop_by = min(self._stop_by, time.monotonic() + STOP_GRACE_S)
        for worker in self.workers:
            worker.stop(signal.SIGQUIT)


def _settings_environment(settings: Settings) -> dict[str, str]:
    """Return the settings as variables, so that a worker reads what its starter was told."""
    values = settings.model_dump(exclude_defaults=True, exclude_unset=True)
    environment = {}
    for name, value in values.items():
        plain = value.get_secret_value() if hasattr(value, "get_secret_value") else value
        if plain is not None:
            environment[f"PROMPTMILL_{name.upper()}"] = str(plain)
    return environment


def devices_for(gpus: str | None, workers: int | None) -> list[Device]:
    """Return the devices that the command line asks for.

    Args:
        gpus: As `parse_gpus` takes it, or None.
        workers: On the CPU, how many; or None.

    Raises:
        InvalidRequestError: The two contradict each other.
    """
    if gpus is None:
        return [Device()] * (workers or 1)
    devices = parse_gpus(gpus)
    if workers not in (None, len(devices)):
        msg = f"{gpus!r} is {len(devices)} workers; leave the number out, or make them agree"
        raise InvalidRequestError(msg, field="workers", value=workers)
    return devices


def up(
    settings: Settings,
    *,
    gpus: str | None = None,
    workers: int | None = None,
    engine_args: Sequence[str] = (),
    on_event: Callable[[str], None] = print,
) -> int:
    """Run the stack and workers until this process is told to stop; say when jobs are taken.

    Args:
        settings: Read from the environment and the command line.
        gpus: As `parse_gpus` takes it; None runs on the CPU.
        workers: On the CPU, how many.
        engine_args: Further arguments of vLLM's command line.
        on_event: Told what happens, in words; ``ready`` once every worker takes jobs.

    Returns:
        An exit code: 0 after it was told to stop, 3 when no worker is left.

    Raises:
        EngineGoneError: A worker did not start.
    """
    from workers import endpoints

    found = endpoints.find(settings)
    fleet = Fleet(settings, devices_for(gpus, workers), engine_args=engine_args, on_event=on_event)
    stop = threading.Event()

    def told_to_stop(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            fleet.stop_now()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told_to_stop)
    try:
        fleet.start()
        _wait_ready_or(stop, fleet)
        if not stop.is_set():
            on_event("ready")
        while not stop.wait(0.2):
            if fleet.given_up:
                return 3
    finally:
        fleet.stop()
        found.close()
    return 0


def _wait_ready_or(stop: threading.Event, fleet: Fleet) -> None:
    while not stop.is_set():
        try:
            fleet.wait_ready(timeout_s=0.5)
        except EngineGoneError:
            if any(worker.given_up.is_set() for worker in fleet.workers):
                raise
        else:
            return


@contextlib.contextmanager
def ensure_worker(
    settings: Settings,
    *,
    engine_args: Sequence[str] = (),
    on_event: Callable[[str], None] = lambda _text: None,
) -> Iterator[bool]:
    """Make sure that some worker takes jobs while the block runs.

    Args:
        settings: Read from the environment and the command line.
        engine_args: Further arguments of vLLM's command line, for a worker started here.
        on_event: Told what happens, in words.

    Yields:
        Whether a worker was started here; it is stopped afterwards.

    Raises:
        EngineGoneError: The worker did not start; with its last words.
    """
    import asyncio

    from workers import endpoints
    from workers.connection import open_redis
    from workers.queue_marks import living_workers
    from workers.serving import served_model

    found = endpoints.find(settings)

    async def anybody() -> bool:
        redis = open_redis(found.redis_url)
        try:
            wanted = served_model(settings).name
            return any(
                wanted in (state.get("models") or ())
                for state in (await living_workers(redis)).values()
            )
        finally:
            await redis.aclose()

    try:
        if asyncio.run(anybody()):
            yield False
            return
        fleet = Fleet(settings, [Device()], engine_args=engine_args, on_event=on_event)
        try:
            fleet.start()
            fleet.wait_ready()
            yield True
        finally:
            fleet.stop()
    finally:
        found.close()
