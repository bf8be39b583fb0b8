"""vLLM's own batch runner, as the peer of a benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.serving import ServedModel

_MOST_S = 1800.0
_LOOK_S = 0.005
_BEGINS = "Reading batch from"


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """One pass over one file."""

    rows: int
    seconds: float
    answered: int  # rows that were not refused

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def rows_of(path: Path) -> int:
    """Count the lines that hold something."""
    return sum(1 for line in path.read_bytes().splitlines() if line.strip())


def answered(output: Path) -> int:
    """Count the rows of an output that have an answer and no error."""
    lines = (json.loads(line) for line in output.read_text().splitlines() if line.strip())
    return sum(
        not line.get("error") and (line.get("response") or {}).get("status_code") == 200
        for line in lines
    )


def peer_run(source: Path, target: Path, model: ServedModel) -> PeerRun:
    """Run vLLM's own batch runner over a file.

    Args:
        source: Rows.
        target: Where it writes.
        model: What it serves, and with which arguments.

    Returns:
        The time from its reading the file to its whole output, start-up thus taken out.

    Raises:
        RuntimeError: It did not start, or did not finish; with its last words.
    """
    started = time.monotonic()
    print(f"starting run_batch on {source.name}", file=sys.stderr, flush=True)
    with _process(source, target, model) as peer:
        began = peer.began(_MOST_S)
        print(f"it reads after {began - started:.0f} s", file=sys.stderr, flush=True)
        rows = rows_of(source)
        while not (target.exists() and rows_of(target) >= rows):
            if time.monotonic() - began > _MOST_S or peer.process.poll() not in (None, 0):
                raise RuntimeError(f"run_batch did not finish:\n{peer.last_words}")
            time.sleep(_LOOK_S)
        seconds = time.monotonic() - began
    print(f"run_batch: {rows} rows in {seconds:.2f} s", file=sys.stderr, flush=True)
    return PeerRun(rows=rows, seconds=seconds, answered=answered(target))


class _Peer:
    """The process, and a thread that reads all it says, so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._said: deque[str] = deque(maxlen=30)
        self._began = threading.Event()
        self._began_at = 0.0
        self._reader = threading.Thread(target=self._read, name="run_batch-output", daemon=True)
        self._reader.start()

    @property
    def last_words(self) -> str:
        return "".join(self._said)

    def began(self, most_s: float) -> float:
        """Wait until it reads its input; return when that was, by the monotonic clock."""
        end = time.monotonic() + most_s
        while not self._began.wait(0.1):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"run_batch did not start:\n{self.last_words}")
        return self._began_at

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._said.append(line)
            if _BEGINS in line and not self._began.is_set():
                self._began_at = time.monotonic()
                self._began.set()


@contextlib.contextmanager
def _process(source: Path, target: Path, model: ServedModel) -> Iterator[_Peer]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    command += ["-i", str(source), "-o", str(target), "--model", model.path]
    command += ["--served-model-name", model.name, *model.engine_args]
    process = subprocess.Popen(
        command,
        # Its log says when it begins.
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CONFIGURE_LOGGING": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield _Peer(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
