"""The workers of a machine: one on each device or tensor-parallel group.

`workers.fleet_plan` says which there are to be, `workers.pinning` what binds each to its device,
`workers.worker_process` how one is started, watched and started anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError, EngineGoneError
from workers.fleet_plan import Post, cards_here, on_this_machine, plan
from workers.pinning import Device
from workers.worker_process import STOP_GRACE_S, SUPERVISED, WorkerProcess

if TYPE_CHECKING:
    from workers.fleet_file import FleetFile
    from workers.settings import Settings

__all__ = ["Device", "Fleet", "Post", "end_with_starter", "ensure_worker", "up"]

_LOOK_S = 0.05


def end_with_starter(*, drain_s: float) -> bool:
    """Make this worker drain and end when the process that started it is gone, however it went.

    Args:
        drain_s: Seconds it may take; then it is killed, with all that it started.

    Returns:
        Whether a fleet started it; if not, nothing happens.
    """
    if os.environ.pop(SUPERVISED, None) is None:
        return False

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_s + STOP_GRACE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="promptmill-starter", daemon=True).start()
    return True


class Fleet:
    """The workers of this machine.

    Args:
        settings: Read from the environment and the command line.
        posts: One worker each; a device alone is one with the settings' model.
        engine_args: Further arguments of vLLM's command line, for all.
        on_event: Told what happens, in words.
        on_line: Given the lines of workers' logs.
    """

    def __init__(
        self,
        settings: Settings,
        posts: Sequence[Device | Post],
        *,
        engine_args: Sequence[str] = (),
        on_event: Callable[[str], None] = lambda _text: None,
        on_line: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.settings = settings
        as_json = settings.log_format == "json"  # its lines name their worker themselves
        self._stop_by = float("inf")  # by the clock of `time.monotonic`
        self.workers = []
        for each in posts:
            post = each if isinstance(each, Post) else _post(each, engine_args)
            command = [sys.executable, "-m", "workers.cli", "worker"]
            command += [f"--vllm-arg={word}" for word in (*post.engine_args, *engine_args)]
            self.workers.append(
                WorkerProcess(
                    name=post.name,
                    command=command,
                    environment={
                        **os.environ,
                        **post.device.environment(),
                        **_settings_environment(post.settings(settings)),
                    },
                    on_event=on_event,
                    on_line=on_line if len(posts) == 1 or as_json else partial(_of, post, on_line),
                    # Whoever asks for JSON collects lines, and does not read along.
                    all_lines=as_json,
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


def _of(post: Post, on_line: Callable[[str], None], line: str) -> None:
    on_line(f"{post.device.name}: {line}")


def _post(device: Device, engine_args: Sequence[str]) -> Post:
    return Post(device=device, engine_args=device.engine_args(engine_args))


def _settings_environment(settings: Settings) -> dict[str, str]:
    """Return the settings as variables, so that a worker reads what its starter was told."""
    values = settings.model_dump(exclude_unset=True)
    environment = {}
    for name, value in values.items():
        plain = value.get_secret_value() if hasattr(value, "get_secret_value") else value
        # An empty variable is one that is not set, whatever this process' own was.
        text = "" if plain is None else json.dumps(plain) if isinstance(plain, dict) else str(plain)
        environment[f"PROMPTMILL_{name.upper()}"] = text
    return environment


def up(
    settings: Settings,
    *,
    gpus: str | None = None,
    workers: int | None = None,
    engine_args: Sequence[str] = (),
    file: FleetFile | None = None,
    on_event: Callable[[str], None] = print,
    on_line: Callable[[str], None] = lambda _line: None,
) -> int:
    """Run the stack and workers until this process is told to stop; say when jobs are taken.

    Args:
        settings: Read from the environment and the command line.
        gpus: As `parse_gpus` takes it; None runs on the CPU.
        workers: On the CPU, how many.
        engine_args: Further arguments of vLLM's command line.
        file: Which workers run, and with which arguments; in place of `gpus` and `workers`.
        on_event: Told what happens, in words; ``ready`` once every worker takes jobs.
        on_line: Given the lines of workers' logs.

    Returns:
        An exit code: 0 after it was told to stop, 3 when no worker is left.

    Raises:
        EngineGoneError: A worker did not start.
        InvalidRequestError: The machine has not what was asked for, or two words contradict.
        ConfigurationError: A model does not exist, or vLLM's build is the wrong one.
        StackError: The servers did not start, or the model hub cannot be reached.
    """
    from workers import endpoints

    planned = plan(gpus=gpus, workers=workers, engine_args=engine_args, file=file)
    posts = on_this_machine(planned, cards_here(planned))
    fetch_models(settings, posts, on_event=on_event)
    found = endpoints.find(settings)
    if found.embedded:
        on_event(f"Postgres and Valkey run, with their data in {settings.data_dir}")
    for post in posts:
        on_event(f"starting a worker on {post.name}; its model takes a while to load")
    fleet = Fleet(settings, posts, on_event=on_event, on_line=on_line)
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


def fetch_models(
    settings: Settings, posts: Sequence[Post], *, on_event: Callable[[str], None]
) -> None:
    """Bring the models that are wanted onto this machine, before workers ask for them all at once.

    Args:
        settings: Read from the environment and the command line.
        posts: What the workers are to do.
        on_event: Told what happens, in words.

    Raises:
        ConfigurationError: A model does not exist, or may not be read.
        StackError: The model hub cannot be reached.
    """
    from workers import hub

    wanted = {
        (model, hub.revision_of(post.engine_args)): None
        for post in posts
        if (model := post.settings(settings).model) is not None
    }
    for model, revision in wanted:
        if not hub.is_folder(model):
            on_event(f"looking for {model}")
            hub.fetch(model, revision=revision)
        elif not Path(model).expanduser().exists():
            raise ConfigurationError(f"there is no model at {model}")


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
