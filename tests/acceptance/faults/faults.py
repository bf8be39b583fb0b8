"""The faults: what is done to a running deployment, at random from a seed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path

import orjson
import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError

from schema import names
from tests.acceptance.faults import scripted_worker
from tests.acceptance.faults.doors import Door
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from workers.local import LocalStack

_CUT_S = (1.0, 6.0)
_LOST_S = (0.2, 2.5)
_AWAY_S = 60.0
_LONG_RUN_S = 180.0
_MOST_WRONG_CLOCK_S = 7200.0
#: The supervisor gives a server up that ends more than five times in a minute.
_SERVER_FAULTS_APART_S = 15.0
_POISON = (
    b"not JSON",
    b"\xff\xfe\x00",
    b"[]",
    b"{}",
    orjson.dumps({"body": "W10=", "headers": {}, "properties": {}}),
    orjson.dumps({"body": "W10=", "headers": {"task": "os.system", "id": "1"}, "properties": {}}),
)


class Faults:
    """Does one fault after the other.

    Args:
        seed: Decides which fault comes when.
        stack: The embedded servers.
        redis: A client of the embedded Valkey.
        workers: The scripted workers.
        crash_folder: Where workers look for the point to die at.
        doors: The ways to the servers, by name.
        freeze_s: Seconds that a frozen worker stands still; longer than a lease.
    """

    def __init__(
        self,
        *,
        seed: int,
        stack: LocalStack,
        redis: Redis,
        workers: ScriptedWorkers,
        crash_folder: Path,
        doors: Mapping[str, Door],
        freeze_s: float,
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._stack = stack
        self._redis = redis
        self._workers = workers
        self._crash_folder = crash_folder
        self._freeze_s = freeze_s
        self._doors = doors
        self._server_fault_at = float("-inf")
        self._mending: set[asyncio.Task[None]] = set()
        self.done: Counter[str] = Counter()
        self.data_losses = 0
        self.poisoned = 0
        self.poisoned_since_loss = 0  # those whose place on the dead list was not lost
        servers: list[tuple[str, Callable[[], Awaitable[bool]]]] = [
            ("Redis killed, data kept", self._kill_redis),
            ("Redis killed, data lost", self._lose_redis),
            ("Redis killed, last moments lost", self._lose_moments),
            ("Postgres restarted (SIGINT)", lambda: self._end("postgres", signal.SIGINT)),
            ("Postgres killed (SIGKILL)", lambda: self._end("postgres", signal.SIGKILL)),
        ]
        self._servers = servers
        self._others: list[tuple[str, Callable[[], Awaitable[bool]]]] = [
            ("worker killed (SIGKILL)", lambda: self._hit(signal.SIGKILL)),
            ("worker stopped (SIGTERM)", lambda: self._hit(signal.SIGTERM)),
            ("worker frozen past its lease", self._freeze),
            ("poisoned message", self._poison),
            ("workers' clocks jump", self._let_clocks_jump),
            *((f"{name} cut off", self._cutter(name, _CUT_S)) for name in doors),
            *((f"{name} silent", self._blocker(name)) for name in doors),
            ("engine dies", self._crasher(scripted_worker.ENGINE_DIES)),
            ("engine hangs", self._crasher(scripted_worker.ENGINE_HANGS)),
            ("event loop stands still", self._crasher(scripted_worker.LOOP_STANDS)),
            *(
                (f"worker dies {point.replace('-', ' ')}", self._crasher(point))
                for point in (
                    scripted_worker.BEFORE_PUBLISH,
                    scripted_worker.BEFORE_MARK,
                    scripted_worker.BEFORE_ACKNOWLEDGE,
                )
            ),
        ]

    async def run(self, seconds: float) -> None:
        """Go on for so long; the servers and workers are whole again some time after."""
        end = time.monotonic() + seconds
        if seconds >= _LONG_RUN_S:
            self._servers += [
                (f"{name} away for a minute", self._cutter(name, (_AWAY_S, _AWAY_S)))
                for name in self._doors
            ]
        server_turn, other_turn = self._shuffled(self._servers), self._shuffled(self._others)
        while time.monotonic() < end:
            await asyncio.sleep(self._random.uniform(0.5, 2.5))
            turn = other_turn
            if time.monotonic() - self._server_fault_at > _SERVER_FAULTS_APART_S:
                turn, self._server_fault_at = server_turn, time.monotonic()
            if not turn:  # each kind once before any comes again
                turn.extend(self._shuffled(self._servers if turn is server_turn else self._others))
            name, act = turn.pop()
            if await act():
                self.done[name] += 1
        await asyncio.gather(*self._mending)

    def _shuffled(
        self, kinds: list[tuple[str, Callable[[], Awaitable[bool]]]]
    ) -> list[tuple[str, Callable[[], Awaitable[bool]]]]:
        return self._random.sample(kinds, len(kinds))

    async def _hit(self, number: signal.Signals) -> bool:
        if not self._workers.ready:
            return False
        self._workers.signal(self._random.choice(sorted(self._workers.ready)), number)
        return True

    async def _freeze(self) -> bool:
        if not self._workers.ready:
            return False
        pid = self._random.choice(sorted(self._workers.ready))
        self._workers.signal(pid, signal.SIGSTOP)

        async def thaw() -> None:
            await asyncio.sleep(self._freeze_s)
            with contextlib.suppress(ProcessLookupError):
                self._workers.signal(pid, signal.SIGCONT)

        self._later(thaw())
        return True

    def _cutter(self, name: str, seconds: tuple[float, float]) -> Callable[[], Awaitable[bool]]:
        async def cut() -> bool:
            door, length = self._doors[name], self._random.uniform(*seconds)
            if not door.whole:
                return False
            door.shut()

            async def mend() -> None:
                await asyncio.sleep(length)
                door.open()

            self._later(mend())
            return True

        return cut

    def _blocker(self, name: str) -> Callable[[], Awaitable[bool]]:
        async def block() -> bool:
            door, length = self._doors[name], self._random.uniform(*_CUT_S)
            if not door.whole:
                return False
            door.block()

            async def mend() -> None:
                await asyncio.sleep(length)
                door.unblock()

            self._later(mend())
            return True

        return block

    def _later(self, work: Coroutine[None, None, None]) -> None:
        self._mending.add(asyncio.create_task(work))

    async def _let_clocks_jump(self) -> bool:
        off_s = self._random.uniform(-_MOST_WRONG_CLOCK_S, _MOST_WRONG_CLOCK_S)
        (self._crash_folder / scripted_worker.CLOCK).write_text(str(off_s))
        return True

    def _crasher(self, point: str) -> Callable[[], Awaitable[bool]]:
        async def arm() -> bool:
            file = self._crash_folder / point
            file.touch()
            try:
                async with asyncio.timeout(5):
                    while file.exists():
                        await asyncio.sleep(0.05)
            except TimeoutError:
                # No worker came by; it may have, just now.
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()
                    return False
            return True

        return arm

    async def _poison(self) -> bool:
        queue = names.queue(scripted_worker.MODEL)
        key = names.priority_list(queue, self._random.choice(names.PRIORITIES))
        try:
            await self._redis.lpush(key, self._random.choice(_POISON))
        except RedisError:
            return False
        self.poisoned += 1
        self.poisoned_since_loss += 1
        return True

    async def _kill_redis(self) -> bool:
        return await self._end("valkey", signal.SIGKILL)

    async def _lose_redis(self) -> bool:
        # Its file is emptied with it, so the new process begins with nothing.
        try:
            await self._redis.flushall()
        except RedisError:
            return False
        self.data_losses += 1
        self.poisoned_since_loss = 0
        return await self._end("valkey", signal.SIGKILL)

    async def _lose_moments(self) -> bool:
        """Cut off the end of its file, as if the last seconds had not reached the disk."""
        supervisor = psutil.Process(self._stack.supervisor_pid)
        files = list(self._stack.data_dir.rglob("*.incr.aof"))
        if len(files) != 1:
            return False  # it is being started, or begins a new file
        size = files[0].stat().st_size
        await asyncio.sleep(self._random.uniform(*_LOST_S))
        supervisor.suspend()  # it would start the server anew at once
        try:
            ended = await self._end("valkey", signal.SIGKILL)
            if ended:
                os.truncate(files[0], min(size, files[0].stat().st_size))
        finally:
            supervisor.resume()
        # An item that was moved to the dead list may be in its queue again, and may not.
        self.poisoned_since_loss = 0
        return ended

    async def _end(self, name: str, number: signal.Signals) -> bool:
        for child in psutil.Process(self._stack.supervisor_pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith(name):
                    os.kill(child.pid, number)
                    return True
        return False
