"""One running child process that holds a model, seen from its parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.enrich import frames
from workers.enrich.errors import EnrichmentUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: How long a killed process may take to be gone before we stop looking, in seconds.
_REAP_S = 5.0

#: Nothing of ours in a child may use a GPU, and one thread each keeps the cores for generation.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Child:
    """A child process and the connection to it; made by `start`.

    Args:
        process: The running process.
        reader: Replies.
        writer: Requests.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, kind: str, config: Mapping[str, Any], *, timeout_s: float) -> Child:
        """Start a process and wait until its model is loaded.

        Args:
            kind: Which model, as `workers.enrich.child_main` knows it.
            config: Arguments of the model, JSON types.
            timeout_s: Seconds that loading may take.

        Returns:
            A child that takes requests.

        Raises:
            EnrichmentUnavailableError: The model could not be loaded, or not in time.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = _spawn(kind, config, theirs)
            reader, writer = await asyncio.open_connection(sock=ours)
        except OSError as exc:
            ours.close()
            msg = f"the {kind} process could not be started: {exc}"
            raise EnrichmentUnavailableError(msg) from exc
        child = cls(process, reader, writer)
        try:
            async with asyncio.timeout(timeout_s):
                await child.receive()
        except BaseException as exc:
            await child.kill()
            if isinstance(exc, TimeoutError):
                msg = f"the {kind} process was not ready after {timeout_s:g} s"
                raise EnrichmentUnavailableError(msg) from exc
            raise
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def stay_on(self, cores: frozenset[int]) -> None:
        """Have the kernel run it on some cores only.

        Args:
            cores: Their numbers.
        """
        with contextlib.suppress(OSError):  # it has just ended
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)

    async def send(self, texts: Sequence[str]) -> None:
        """Send a request.

        Raises:
            EnrichmentUnavailableError: The process is gone.
        """
        try:
            self._writer.write(frames.pack_request(texts))
            await self._writer.drain()
        except OSError as exc:
            raise self._gone() from exc

    async def receive(self) -> tuple[frames.ReplyHeader, bytes]:
        """Receive one reply.

        Returns:
            Its header and its payload.

        Raises:
            EnrichmentUnavailableError: The process is gone, or could not load its model.
        """
        try:
            header = frames.unpack_reply_header(
                await self._reader.readexactly(frames.REPLY_HEADER_BYTES)
            )
            payload = await self._reader.readexactly(header.size)
        except (OSError, asyncio.IncompleteReadError) as exc:
            raise self._gone() from exc
        if header.index == frames.READY and not header.ok:
            msg = f"the model could not be loaded: {payload.decode('utf-8', 'replace')}"
            raise EnrichmentUnavailableError(msg)
        return header, payload

    async def kill(self) -> None:
        """End the process and wait until it is gone; idempotent.

        It keeps no state, so there is nothing that it would have to finish.
        """
        self._writer.transport.abort()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _REAP_S)

    def _gone(self) -> EnrichmentUnavailableError:
        status = self._process.poll()
        ending = "closed its connection" if status is None else f"ended with status {status}"
        return EnrichmentUnavailableError(f"process {self.pid} {ending}")


def _spawn(
    kind: str, config: Mapping[str, Any], connection: socket.socket
) -> subprocess.Popen[bytes]:
    """Start the child from scratch: vLLM's threads and CUDA do not survive a fork.

    It is done in the caller's thread, since the kernel ends the child with the *thread* that
    started it.
    """
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ  # handed on, not read: the child needs PATH, HOME, proxies and the like
    path = os.pathsep.join(part for part in (root, inherited.get("PYTHONPATH", "")) if part)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "workers.enrich.child_main",
            kind,
            str(connection.fileno()),
            json.dumps({**config, "parent_pid": os.getpid()}),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(connection.fileno(),),
        env={**inherited, **_ENVIRONMENT, "PYTHONPATH": path},
    )
