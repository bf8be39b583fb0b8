"""One run: a deployment, traffic, faults at random from a seed, and the verdict."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from schema import names
from schema.errors import ServiceError
from tests.acceptance.faults.doors import Door
from tests.acceptance.faults.faults import Faults
from tests.acceptance.faults.scripted_worker import CRASH_FOLDER, MODEL
from tests.acceptance.faults.traffic import AWAY_S, Consumers, Producer
from tests.acceptance.faults.verdict import Verdict, judge, open_jobs, stored_rows
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from workers import endpoints
from workers.aio_client import AsyncJobClient
from workers.connection import open_redis
from workers.settings import load_settings
from workers.store.database import Database, parse_url

WORKERS = 3
LEASE_S = 4.0
_FREEZE_S = 2 * LEASE_S
_SETTLE_S = 180.0
_QUIET_S = 2 * AWAY_S
_LOOK_S = 0.3


@dataclass
class Report:
    """What a run did and found."""

    seed: int
    seconds: float
    faults: dict[str, int]
    verdict: Verdict
    dead_letters: int
    poisoned: int
    data_losses: int
    endings: dict[int, int]
    settled: bool
    log: Path

    @property
    def errors(self) -> int:
        """Workers that ended otherwise than killed, or as asked to."""
        return sum(count for code, count in self.endings.items() if code not in (0, -9))

    def table(self) -> str:
        """For people."""
        rows: list[tuple[str, object]] = [("seed", self.seed), ("seconds", f"{self.seconds:.0f}")]
        rows += sorted(self.faults.items())
        rows += [("faults in all", sum(self.faults.values()))]
        rows += list(self.verdict.counts.items())
        rows += [
            ("poisoned messages sent", self.poisoned),
            ("items on the dead list", self.dead_letters),
            ("times Redis lost its data", self.data_losses),
            ("workers that ended by an error", self.errors),
        ]
        rows += [("promises broken", len(self.verdict.wrong))]
        width = max(len(name) for name, _ in rows)
        head = "The engine is a scripted stand-in; all else is real.\n"
        return head + "\n".join(f"{name:<{width}}  {value:>8}" for name, value in rows)


async def run(
    folder: Path, *, seed: int, seconds: float, say: Callable[[str], None] = print
) -> Report:
    """Do one run.

    Args:
        folder: Empty; takes the servers' data and the workers' log.
        seed: Decides the traffic and the faults.
        seconds: How long there are faults.
        say: Told how it goes.
    """
    say(f"seed {seed}")
    crash_folder, log = folder / "crash", folder / "workers.log"
    crash_folder.mkdir()
    base = load_settings(data_dir=folder / "data", served_model_name=MODEL)
    found = await asyncio.to_thread(endpoints.find, base)
    assert found.stack is not None
    assert found.database_url is not None
    doors = {"Postgres": Door(_postgres_socket(found)), "Redis": Door(_redis_socket(found))}
    ports = {name: await door.start() for name, door in doors.items()}
    database_url = f"postgresql://promptmill@127.0.0.1:{ports['Postgres']}/promptmill"
    redis_url = f"redis://127.0.0.1:{ports['Redis']}/0"
    environment = {
        CRASH_FOLDER: str(crash_folder),
        "PROMPTMILL_DATABASE_URL": database_url,
        "PROMPTMILL_REDIS_URL": redis_url,
        "PROMPTMILL_ENGINE_TIMEOUT_S": "4",
        "PROMPTMILL_SERVED_MODEL_NAME": MODEL,
        "PROMPTMILL_LEASE_S": str(LEASE_S),
        "PROMPTMILL_DRAIN_S": "3",
        "PROMPTMILL_MAX_RUNNING": "16",
        "PROMPTMILL_MESSAGE_JOBS": "16",
    }
    workers = ScriptedWorkers(count=WORKERS, environment=environment, log=log)
    settings = load_settings(
        database_url=database_url,
        redis_url=redis_url,
        served_model_name=MODEL,
        message_jobs=16,
    )
    redis = open_redis(found.redis_url)
    database = Database(found.database_url, pool_size=2)
    try:
        await workers.start()
        say(f"{WORKERS} workers take jobs")
        async with AsyncJobClient(settings) as client:
            producer = Producer(client, seed=seed)
            consumers = Consumers(client, redis)
            faults = Faults(
                seed=seed,
                stack=found.stack,
                redis=redis,
                workers=workers,
                crash_folder=crash_folder,
                doors=doors,
                freeze_s=_FREEZE_S,
            )
            async with consumers.running():
                stop = asyncio.Event()
                producing = asyncio.create_task(producer.run(stop), name="producer")
                try:
                    await faults.run(seconds)
                finally:
                    stop.set()
                    await producing
                say(f"{len(producer.prompts)} jobs accepted; waiting for the last of them")
                settled = await _settle(database, consumers, say)
            rows = await stored_rows(database)
        dead = await redis.llen(names.DEAD_LETTERS)
    finally:
        await workers.stop()
        for door in doors.values():
            await door.stop()
        await redis.aclose()
        await database.aclose()
        await asyncio.to_thread(found.stack.close, wait_s=30)
    verdict = judge(producer, consumers, rows)
    if dead < faults.poisoned_since_loss:
        verdict.wrong.append(f"{faults.poisoned_since_loss - dead} poisoned messages were not kept")
    if not settled:
        verdict.wrong.append(f"not every job was over and published within {_SETTLE_S:g} s")
    return Report(
        seed=seed,
        seconds=seconds,
        faults=dict(faults.done),
        verdict=verdict,
        dead_letters=dead,
        poisoned=faults.poisoned,
        data_losses=faults.data_losses,
        endings=dict(workers.endings),
        settled=settled,
        log=log,
    )


def _postgres_socket(found: endpoints.Endpoints) -> Path:
    return Path(str(parse_url(found.database_url or "").query["host"])) / ".s.PGSQL.5432"


def _redis_socket(found: endpoints.Endpoints) -> Path:
    return Path(unquote(found.redis_url.removeprefix("unix://")))


async def _settle(database: Database, consumers: Consumers, say: Callable[[str], None]) -> bool:
    """Wait until all is over and published, and nothing more comes; say whether it came to that."""
    end = time.monotonic() + _SETTLE_S
    left = -1
    while time.monotonic() < end:
        try:
            left = await open_jobs(database)
        except ServiceError:
            left = -1
        if left == 0:
            break
        await asyncio.sleep(_LOOK_S)
    say(f"{left} jobs are not over")
    before, quiet_since = -1, time.monotonic()
    while time.monotonic() - quiet_since < _QUIET_S:
        now = sum(
            len(results) for group in consumers.by_group.values() for results in group.values()
        )
        if now != before:
            before, quiet_since = now, time.monotonic()
        await asyncio.sleep(_LOOK_S)
    return left == 0
