"""Worker processes with a scripted stand-in for vLLM, so that many hundred of them can die.

Everything but the engine is the real thing: Celery, pool, transport, pipeline, store, publisher,
leases and recovery. The stand-in answers from the prompt alone, after a short random delay, so an
answer is the same whatever happened on the way to it. What is measured with it says nothing of
vLLM's speed.

Importing all that takes many seconds, so it is done once: this process imports, and then forks a
worker for each line on its input. It says what becomes of them in lines on its output: ``ready
PID`` and ``ended PID STATUS``. When its input ends, all of them are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import random
import selectors
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODEL = "scripted"
#: Folder in which a file named after a point lets the next worker that passes it die there.
CRASH_FOLDER = "PROMPTMILL_TEST_CRASH_FOLDER"
BEFORE_PUBLISH = "before-publish"  # between the commit and the publication
BEFORE_MARK = "before-mark"  # between the publication and the note of it
BEFORE_ACKNOWLEDGE = "before-acknowledge"  # between all that and the acknowledgement
ENDLESS = "endless"  # how a prompt begins whose answer never comes
ENGINE_DIES = "engine-dies"
ENGINE_HANGS = "engine-hangs"
LOOP_STANDS = "loop-stands"
#: File in that folder that says by how many seconds workers' wall clocks are wrong.
CLOCK = "clock"
KILLER = "kill"  # how a prompt begins with which the engine dies
REFUSED = "refuse"  # how a prompt begins that the engine does not take
#: Longest time an answer takes, in seconds.
SLOWEST = "PROMPTMILL_TEST_SLOWEST_S"
_SLOWEST_S = float(os.environ.get(SLOWEST, "0.25"))
_LOOK_S = 0.1
_STANDS_S = 30.0  # longer than the watchdog waits
_PR_SET_PDEATHSIG = 1
_IMPORTED = (
    "celery.apps.worker",
    "celery.bin.worker",
    "celery.worker.consumer",
    "psycopg",
    "redis.asyncio",
    "tests.stand_ins",
    "vllm.outputs",
    "vllm.sampling_params",
    "workers.announcements",
    "workers.answering",
    "workers.app",
    "workers.engine.output",
    "workers.pipeline",
    "workers.recovery",
    "workers.runtime",
    "workers.signals",
)


def scripted_answer(prompt: str) -> str:
    """What the stand-in answers."""
    return hashlib.sha256(prompt.encode()).hexdigest()


class ScriptedEngine:
    """As much of vLLM's engine as workers touch."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()
        self._hung = False

    @property
    def errored(self) -> bool:
        """Whether it is dead."""
        return self._gone.is_set()

    async def is_sleeping(self) -> bool:
        """Answer, unless it hangs."""
        if self._hung:
            await asyncio.Event().wait()
        return False

    async def generate(self, prompt: str, _params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield the one answer."""
        from tests.stand_ins import final_output

        if prompt.startswith(KILLER) or _asked_for(ENGINE_DIES):
            self._gone.set()
        self._hung = self._hung or _asked_for(ENGINE_HANGS)
        if _asked_for(LOOP_STANDS):
            time.sleep(_STANDS_S)  # noqa: ASYNC251  that is the fault
        endless = prompt.startswith(ENDLESS)
        await self._think(None if endless else random.uniform(0.0, _SLOWEST_S))  # noqa: S311  no secret
        if prompt.startswith(REFUSED):
            msg = "the scripted engine does not take this prompt"
            raise ValueError(msg)
        yield final_output(prompt, request_id, scripted_answer(prompt), metadata={})

    async def _think(self, seconds: float | None) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), seconds)
            raise EngineDeadError
        if self._hung:
            await asyncio.Event().wait()

    def stats(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def forget(self, **_of: Any) -> None:
        """Nothing is remembered."""


class ScriptedHandlers:
    """As much of vLLM's handlers: chats are answered like prompts."""

    async def answer(self, _url: str, body: dict[str, Any], *, on_text: Any = None) -> Any:
        """Return the one answer."""
        await asyncio.sleep(random.uniform(0.0, _SLOWEST_S))  # noqa: S311  no secret
        text = scripted_answer(body["messages"][-1]["content"])
        if on_text is not None:
            for at in range(0, len(text), 8):
                await on_text(0, at, text[at : at + 8])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 8, "completion_tokens": 16, "total_tokens": 24}
        whole = {
            "object": "chat.completion",
            "choices": [{**choice, "finish_reason": "stop"}],
            "usage": usage,
        }
        return SimpleNamespace(ok=True, status_code=200, body=whole)


async def _start_engine(*_: Any) -> tuple[Any, Any]:
    return ScriptedEngine(), ScriptedHandlers()


def _asked_for(point: str) -> bool:
    folder = os.environ.get(CRASH_FOLDER)
    if folder is None:
        return False
    try:
        # Whoever removes the file is the one that is meant.
        (Path(folder) / point).unlink()
    except FileNotFoundError:
        return False
    return True


def _die_at(point: str) -> None:
    if _asked_for(point):
        os.kill(os.getpid(), signal.SIGKILL)


def _let_clock_jump() -> None:
    """Have Python's wall clock be wrong by what a file says; done before anything imports it."""
    folder = os.environ.get(CRASH_FOLDER)
    if folder is None:
        return
    file, right, looked_at, off_s = Path(folder) / CLOCK, time.time, 0.0, 0.0

    def wrong() -> float:
        nonlocal looked_at, off_s
        if (now := time.monotonic()) - looked_at > _LOOK_S:
            looked_at = now
            with contextlib.suppress(FileNotFoundError, ValueError):
                off_s = float(file.read_text())
        return right() + off_s

    time.time = wrong


def _set_crash_points() -> None:
    from workers.pipeline import Pipeline
    from workers.publishing import Publisher
    from workers.store.jobs import JobStore

    publish, mark, run = Publisher.publish, JobStore.mark_published, Pipeline.run_message

    async def dying_publish(self: Any, deliveries: Any) -> None:
        if deliveries:
            _die_at(BEFORE_PUBLISH)
        await publish(self, deliveries)

    async def dying_mark(self: Any, published: Any, **options: Any) -> None:
        if published:
            _die_at(BEFORE_MARK)
        await mark(self, published, **options)

    async def dying_run(self: Any, message: Any, **how: Any) -> None:
        await run(self, message, **how)
        _die_at(BEFORE_ACKNOWLEDGE)

    Publisher.publish = dying_publish  # type: ignore[method-assign]
    JobStore.mark_published = dying_mark  # type: ignore[method-assign]
    Pipeline.run_message = dying_run  # type: ignore[method-assign]


def _import_all() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)


def _work(say: Callable[[str], None]) -> int:
    from workers import endpoints
    from workers.app import run_worker
    from workers.serving import ServedModel
    from workers.settings import load_settings

    settings = load_settings()
    return run_worker(
        settings,
        endpoints=endpoints.find(settings),
        model=ServedModel(name=MODEL, path=MODEL),
        on_ready=lambda: say(f"ready {os.getpid()}"),
        start_engine=_start_engine,
    )


def _fork(log: int, say: Callable[[str], None]) -> None:
    starter = os.getpid()
    if os.fork() != 0:
        return
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != starter:
            os._exit(1)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _work(say)
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(log_path: str) -> None:
    """Fork workers until the input ends."""
    out = os.dup(1)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def say(line: str) -> None:
        os.write(out, f"{line}\n".encode())

    _let_clock_jump()
    _import_all()
    _set_crash_points()
    gc.collect()
    gc.freeze()
    say("imported 0")
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    while True:
        if selector.select(_LOOK_S):
            asked = os.read(0, 1024)
            if not asked:
                return  # the kernel kills the workers
            for _ in range(asked.count(b"\n")):
                _fork(log, say)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                say(f"ended {ended[0]} {os.waitstatus_to_exitcode(ended[1])}")


if __name__ == "__main__":
    main(sys.argv[1])
