"""The scripted workers of one run: so many of them, a dead one replaced at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path


class ScriptedWorkers:
    """Keeps a number of scripted worker processes alive.

    Args:
        count: How many.
        environment: What they read their settings from.
        log: File that takes what they say.
    """

    def __init__(self, *, count: int, environment: Mapping[str, str], log: Path) -> None:
        self._count = count
        self._environment = environment
        self._log = log
        self.ready: set[int] = set()
        self.endings: Counter[int] = Counter()  # exit status: how many
        self._wanted = True

    async def start(self, *, timeout_s: float = 400.0) -> None:
        """Start them; return when all take jobs."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.acceptance.faults.scripted_worker",
            str(self._log),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment},
            cwd=Path(__file__).parents[3],
        )
        self._listener = asyncio.create_task(self._listen(), name="scripted-workers")
        async with asyncio.timeout(timeout_s):
            while len(self.ready) < self._count:
                if self._listener.done():
                    msg = f"the scripted workers did not start: {self._log.read_text()[-2000:]}"
                    raise RuntimeError(msg)
                await asyncio.sleep(0.1)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send one of them a signal."""
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.ready.discard(pid)
        os.kill(pid, number)

    async def stop(self) -> None:
        """Kill all of them."""
        self._wanted = False
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._listener

    async def _listen(self) -> None:
        stdout, stdin = self._process.stdout, self._process.stdin
        assert stdout is not None
        assert stdin is not None
        async for line in stdout:
            what, pid, *rest = line.decode().split()
            if what == "imported":
                stdin.write(b"start\n" * self._count)
            elif what == "ready":
                self.ready.add(int(pid))
            else:
                self.ready.discard(int(pid))
                self.endings[int(rest[0])] += 1
                if self._wanted:
                    stdin.write(b"start\n")
