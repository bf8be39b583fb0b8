"""One worker process and its family: started anew when it dies, and none of it outlives it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import psutil

#: What a worker prints once it takes jobs.
READY = "promptmill worker ready"
#: Variable that tells a worker to end with the process that started it.
SUPERVISED = "PROMPTMILL_SUPERVISED"
#: Variable by which all that a worker starts is known, wherever it goes.
FAMILY = "PROMPTMILL_FAMILY"
#: Seconds beyond the drain that a worker's engine has to end.
STOP_GRACE_S = 15.0
_LAST_WORDS = 40  # lines of a dead worker that are shown
_QUICK_DEATH_S = 60.0  # a worker that lived shorter is not started anew at once
_MOST_FAILED_STARTS = 3
_BACKOFF_S = (0.0, 1.0, 5.0)
_GONE_S = 5.0  # a killed process may take so long to be gone
_LOOK_S = 0.02
_SAY_AGAIN_S = 30.0
_WAITS = re.compile(r"waiting for (Postgres|Redis)")


@dataclass
class WorkerProcess:
    """One worker, started anew when it dies.

    Args:
        name: What it runs on, for people.
        command: Of ``promptmill worker``.
        environment: All of it.
        on_event: Told what happens, in words.
        on_line: Given what it writes while it takes jobs: its log.
        all_lines: Whether also what it writes while it starts, which is long and shown when that
            fails, and while it ends.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str]
    on_event: Callable[[str], None]
    on_line: Callable[[str], None] = lambda _line: None
    all_lines: bool = False
    ready: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_WORDS))
    process: subprocess.Popen[str] | None = None
    took_jobs: bool = False  # in its present life
    _said_at: dict[str, float] = field(default_factory=dict)
    _family: str = ""
    _stopping: threading.Event = field(default_factory=threading.Event)
    # Held while a process is started or signalled: none may start after the word to stop.
    # Taken again by a handler of a signal that interrupts its holder.
    _lock: Any = field(default_factory=threading.RLock)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start it, and watch it from a thread."""
        self._thread = threading.Thread(target=self._watch, name=f"worker-{self.name}", daemon=True)
        self._thread.start()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end; `join` waits.

        Args:
            number: SIGTERM lets it finish what runs, SIGQUIT hands that back at once.
        """
        with self._lock:
            self._stopping.set()
            self._signal(number)

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended; kill it when it takes too long.

        Args:
            timeout_s: Seconds.
        """
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._lock:
                self._signal(signal.SIGKILL)
            self._thread.join(2 * _GONE_S)

    @property
    def alive(self) -> bool:
        """Whether it is watched still: it runs, or will be started anew."""
        return self._thread is not None and self._thread.is_alive()

    def _watch(self) -> None:
        quick_deaths = failed_starts = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            self.took_jobs = False
            code = self._run_once()
            was_ready = self.took_jobs
            if self._stopping.is_set():
                return
            lived_s = time.monotonic() - started
            # One that took jobs can start. It is never given up: a job that kills engines dies with
            # several of them before it is set aside.
            failed_starts = 0 if was_ready else failed_starts + 1
            quick_deaths = quick_deaths + 1 if lived_s < _QUICK_DEATH_S else 0
            if failed_starts >= _MOST_FAILED_STARTS or (code == 2 and not self.ready.is_set()):
                words = "\n".join(["; its last words:", *self.last_words])
                # Whoever waits for the first start is told them by the error that he gets.
                self.on_event(
                    f"worker on {self.name} is given up: it ended with {code}"
                    + (words if self.ready.is_set() else "")
                )
                self.given_up.set()
                return
            wait_s = _BACKOFF_S[min(quick_deaths, len(_BACKOFF_S) - 1)]
            when = f"in {wait_s:g} s" if wait_s else "at once"
            self.on_event(f"worker on {self.name} ended with {code}; started anew {when}")
            self._stopping.wait(wait_s)

    def _run_once(self) -> int:
        process = self._spawn()
        if process is None:
            return 0
        listener = threading.Thread(
            target=self._listen, args=(process.stdout,), name=f"hears-{self.name}", daemon=True
        )
        listener.start()
        # Not the end of its output: vLLM's engine holds that open, and lives on when the worker
        # was killed. Its number stays taken until it is reaped, so none of its session is confused
        # with a stranger.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        _end_family(process.pid, self._family)
        with self._lock:
            code = process.wait()
        listener.join(_GONE_S)
        return code

    def _signal(self, number: signal.Signals) -> None:
        # Not by `send_signal`, which reaps a dead process that others still count on.
        if self.process is not None and self.process.returncode is None:
            os.kill(self.process.pid, number)

    def _spawn(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            self._family = uuid4().hex
            self.last_words.clear()
            self.process = subprocess.Popen(
                self.command,
                env={
                    **self.environment,
                    SUPERVISED: "1",
                    FAMILY: self._family,
                    # A process that gives itself a title would write it over its environment.
                    "SPT_NOENV": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Never written to: its end tells the worker that whoever started it is gone.
                stdin=subprocess.PIPE,
                text=True,
                errors="replace",
                # A session of its own: Ctrl-C reaches it through us, after which it drains.
                start_new_session=True,
            )
            return self.process

    def _listen(self, output: IO[str]) -> None:
        with output:
            for line in output:
                if line.strip() == READY:
                    self.took_jobs = True
                    self.ready.set()
                    self.on_event(f"worker on {self.name} is ready")
                else:
                    self.last_words.append(line.rstrip())
                    working = self.took_jobs and not self._stopping.is_set()
                    if working or self.all_lines:
                        self.on_line(line.rstrip())
                    if waits := _WAITS.search(line):
                        self._say_that_it_waits(waits[1])

    def _say_that_it_waits(self, server: str) -> None:
        # Each of its jobs says so.
        now = time.monotonic()
        if now - self._said_at.get(server, float("-inf")) >= _SAY_AGAIN_S:
            self._said_at[server] = now
            self.on_event(f"worker on {self.name} waits for {server}")


def _end_family(leader: int, mark: str) -> None:
    """Kill all that a dead process left behind, and wait until it is gone.

    Args:
        leader: Number of the dead process, which led a session.
        mark: What its `FAMILY` was: some may have left the session.
    """
    import psutil  # the light client imports this module, and is installed without it

    end = time.monotonic() + _GONE_S
    while members := [one for one in psutil.process_iter() if _belongs(one, leader, mark)]:
        for one in members:
            with contextlib.suppress(psutil.Error):
                one.kill()
        if time.monotonic() > end:
            return  # one that hangs in the kernel; it is killed as soon as it leaves it
        time.sleep(_LOOK_S)


def _belongs(process: psutil.Process, leader: int, mark: str) -> bool:
    import psutil

    try:
        if process.pid == leader or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return os.getsid(process.pid) == leader or process.environ().get(FAMILY) == mark
    except (psutil.Error, OSError):
        return False
