"""`SchemaChecker`: holds answers to JSON schemas in a process of its own, for a bounded time.

Python's regular expressions backtrack, and they hold the interpreter meanwhile: a schema's pattern
like ``(a|a)*$`` would stop the event loop for good. References can make a check as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from schema.errors import InvalidRequestError, ServiceError, shown

_LIMIT_S = 5.0
_MEMORY_BYTES = 2**30
_PATIENCE_S = 60.0  # by the clock on the wall: a process that stands still takes no processor time
_REMEMBERED = 256  # schemas that were too costly, and why
_SHOWN = 3  # patterns of one, in its message
_REPLY_BYTES = 2**24  # far more than a message for each of a job's answers
_REAP_S = 5.0


class SchemaChecker:
    """Checks answers one job at a time; the process starts with the first, and again when it died.

    Args:
        limit_s: Seconds of processor time that the check of a job's answers may take.
        memory_bytes: Memory that it may take.
    """

    def __init__(self, *, limit_s: float = _LIMIT_S, memory_bytes: int = _MEMORY_BYTES) -> None:
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._turn = asyncio.Lock()
        self._child: _Child | None = None
        self._closed = False
        self._costly: LRUCache[tuple[str, str], str] = LRUCache(_REMEMBERED)

    async def faults(
        self, schema: dict[str, Any] | bool, texts: list[str], *, namespace: str
    ) -> list[str | None]:
        """Return why each text does not fit a schema; None for one that does.

        Args:
            schema: One that `check_schema` passes.
            texts: Should be JSON.
            namespace: Tenant. What a check costs is up to the texts too, and no tenant's may
                refuse another's schema.

        Raises:
            InvalidRequestError: The schema cannot be checked by, as when it refers to what it does
                not hold; or checking is too costly: so is every check by it from then on, for the
                namespace.
            ServiceError: The process died for another reason, or did not answer in time or at all.
        """
        if not texts:
            return []
        name = namespace, json.dumps(schema)
        async with self._turn:
            if (known := self._costly.get(name)) is not None:
                raise _too_costly(schema, known)
            said = await self._ask(json.dumps({"schema": schema, "texts": texts}))
            if isinstance(said, int):
                if said != -signal.SIGPROF:
                    self._insist_on_being_open()
                    msg = f"the process that checks answers ended with status {said}"
                    raise ServiceError(msg)
                self._costly[name] = f"{self._limit_s:g} s of processor time"
                raise _too_costly(schema, self._costly[name])
            if "out_of_memory" in said:
                await self._end_child()  # who knows what it is like now
                self._costly[name] = f"{self._memory_bytes // 2**20} MiB of memory"
                raise _too_costly(schema, self._costly[name])
        if "wrong" in said:
            raise InvalidRequestError(said["wrong"], field="schema")
        faults: list[str | None] = said["faults"]
        return faults

    async def aclose(self) -> None:
        """End the process, and the check that is under way; idempotent. There is no other then."""
        self._closed = True
        await self._end_child()

    def _insist_on_being_open(self) -> None:
        if self._closed:
            msg = "the checker of answers was closed"
            raise ServiceError(msg)

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    async def _ask(self, request: str) -> dict[str, Any] | int:
        """Return the reply, or the status with which the process ended instead."""
        self._insist_on_being_open()
        if (child := self._child) is None:
            child = self._child = await _Child.start(self._limit_s, self._memory_bytes)
        try:
            self._insist_on_being_open()
            async with asyncio.timeout(_PATIENCE_S):
                if (reply := await child.ask(request)) is not None:
                    return reply
            status = await child.status()
        except BaseException as exc:
            await self._end_child()  # what it would still say belongs to nobody
            if isinstance(exc, TimeoutError):
                msg = f"the process that checks answers said nothing for {_PATIENCE_S:g} s"
                raise ServiceError(msg) from exc
            if isinstance(exc, ValueError):  # too long a line, or half of one
                msg = f"the reply of the process that checks answers cannot be read: {exc}"
                raise ServiceError(msg) from exc
            raise
        self._child = None
        return status


def _too_costly(schema: dict[str, Any] | bool, limit: str) -> InvalidRequestError:
    msg = f"checking an answer takes more than {limit}"
    patterns = [shown(pattern) for pattern in _patterns(schema)]
    if not patterns:
        return InvalidRequestError(f"is too costly: {msg}", field="schema")
    named = ", ".join(patterns[:_SHOWN]) + (" …" if len(patterns) > _SHOWN else "")
    msg = f"has too costly a pattern: {msg}; write it without nested repetition ({named})"
    return InvalidRequestError(msg, field="schema")


def _patterns(schema: object) -> Iterator[str]:
    """Yield the regular expressions of a schema, and perhaps what only looks like one."""
    if isinstance(schema, dict):
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        if isinstance(keyed := schema.get("patternProperties"), dict):
            yield from keyed
    if isinstance(schema, (dict, list)):
        for part in schema.values() if isinstance(schema, dict) else schema:
            yield from _patterns(part)


@dataclass(frozen=True, kw_only=True)
class _Child:
    """The process, and the connection to it."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def start(cls, limit_s: float, memory_bytes: int) -> _Child:
        """Start it; nothing waits between that and its being known.

        Raises:
            ServiceError: It could not be started.
        """
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            reader, writer = await asyncio.open_connection(sock=ours, limit=_REPLY_BYTES)
            undo.pop_all()
            undo.callback(writer.transport.abort)
            try:
                process = _spawn(theirs, limit_s, memory_bytes)
            except OSError as exc:
                msg = f"the process that checks answers could not be started: {exc}"
                raise ServiceError(msg) from exc
            undo.pop_all()
        return cls(process=process, reader=reader, writer=writer)

    async def ask(self, request: str) -> dict[str, Any] | None:
        """Return the reply to a request, or None when the process ended instead."""
        with contextlib.suppress(OSError):
            self.writer.write(request.encode() + b"\n")
            await self.writer.drain()
            if line := await self.reader.readline():
                reply: dict[str, Any] = json.loads(line)
                return reply
        return None

    async def status(self) -> int:
        """Return the status with which it ended, once it has; one that does not is killed."""
        self.writer.transport.abort()
        try:
            return await asyncio.to_thread(self.process.wait, _REAP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -signal.SIGKILL

    async def end(self) -> None:
        """End it; it keeps no state."""
        self.process.kill()
        await self.status()


def _spawn(connection: socket.socket, limit_s: float, memory_bytes: int) -> subprocess.Popen[bytes]:
    """Start it from scratch: vLLM's threads and CUDA do not survive a fork.

    It is done in the caller's thread, since the kernel ends the child with the *thread* that
    started it.
    """
    bounds = (str(os.getpid()), str(limit_s), str(memory_bytes))
    return subprocess.Popen(
        [sys.executable, "-m", "workers.schema_checker_main", *bounds],
        stdin=connection.fileno(),
        stdout=connection.fileno(),
        cwd=Path(__file__).parents[1],
    )
