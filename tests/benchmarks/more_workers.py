"""Jobs answered from the cache by two workers, beside one: what a second one adds on one machine.

    python -m tests.benchmarks.more_workers

Both deployments run all the time, each with its own embedded stack and the real engine, and have
their rounds by turns; the one that has none is idle. All share the machine's cores with the client
and the servers, so a second worker can add only what the cores have left: on two cores most of them
was busy with one.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks import cached_jobs
from tests.benchmarks.cached_jobs import Reader, Spent
from tests.benchmarks.deployed import Deployed, deployed, say
from tests.benchmarks.figures import Figure, alone

_ARGUMENTS = ("--enforce-eager", "--max-model-len", "1024")
_WARM_ROUNDS = 8  # until each worker knows every answer


@dataclass
class Fleet:
    """What so many workers did, round by round."""

    run: list[float] = field(default_factory=list)  # jobs a second that were queued before
    both: list[float] = field(default_factory=list)  # and such as came meanwhile
    spent: dict[str, float] = field(default_factory=dict)  # processor, by part, in all of `run`
    jobs: int = 0


def figures(*, quick: bool) -> list[Figure]:
    """Measure both fleets in turns.

    Args:
        quick: Fewer rounds, of fewer jobs.
    """
    return asyncio.run(_measure(rounds=2 if quick else 6, jobs=3_000 if quick else 15_000))


async def _measure(*, rounds: int, jobs: int) -> list[Figure]:
    asked = [cached_jobs.request("prompt", number) for number in range(cached_jobs.DISTINCT)]
    many = list(itertools.islice(itertools.cycle(asked), jobs))
    one, two = Fleet(), Fleet()
    async with (
        deployed(engine_args=_ARGUMENTS) as alone_,
        deployed(engine_args=_ARGUMENTS, workers=2, metrics_port=0) as pair,
    ):
        for system in (alone_, pair):
            for number in range(_WARM_ROUNDS):
                await _both(system, asked * 4, f"warm-{number}")
        for number in range(rounds):
            turn = [(alone_, one), (pair, two)]
            for system, fleet in turn[:: 1 if number % 2 else -1]:
                await _run(system, fleet, many, f"run-{number}")
                fleet.both.append(await _both(system, many, f"both-{number}"))
    return _told(one, two)


async def _run(system: Deployed, fleet: Fleet, asked: Sequence[Any], channel: str) -> None:
    """Let workers run what was queued before."""
    with system.workers_stopped():
        await system.client.submit_many(asked, channel=channel)
    spent, reader = Spent(), Reader(system, channel)
    with spent.on(system):
        await reader.read(len(asked))
    fleet.run.append(len(asked) / spent.seconds)
    fleet.jobs += len(asked)
    for part, seconds in spent.by_part.items():
        fleet.spent[part] = fleet.spent.get(part, 0.0) + seconds
    say(f"{channel}, {len(system.fleet.workers)} workers: {fleet.run[-1]:.0f} jobs/s")


async def _both(system: Deployed, asked: Sequence[Any], channel: str) -> float:
    """Let workers run what comes meanwhile; return jobs a second."""
    spent, reader = Spent(), Reader(system, channel)
    with spent.on(system):
        await asyncio.gather(
            system.client.submit_many(asked, channel=channel), reader.read(len(asked))
        )
    return len(asked) / spent.seconds


def _told(one: Fleet, two: Fleet) -> list[Figure]:
    found = []
    for what, single, pair in (
        ("run", one.run, two.run),
        ("submitted_and_run", one.both, two.both),
    ):
        beside, rate = statistics.median(single), statistics.median(pair)
        found += [
            Figure(name=f"one.{what}_per_s", value=beside, unit="jobs/s"),
            Figure(name=f"two.{what}_per_s", value=rate, unit="jobs/s"),
            Figure(
                name=f"{what}_gain",
                value=statistics.median(b / a for a, b in zip(single, pair, strict=True)),
                comparison=f"two workers' rate over one's, {len(single)} pairs of rounds",
            ),
        ]
    for name, fleet in (("one", one), ("two", two)):
        found += [
            Figure(name=f"{name}.{part}_us_per_job", value=s / fleet.jobs * 1e6, unit="µs")
            for part, s in fleet.spent.items()
        ]
    return found


if __name__ == "__main__":
    alone(figures, __doc__)
