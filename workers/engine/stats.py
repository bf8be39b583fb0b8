"""Counters of one engine, as one snapshot that metrics and commands read."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schema.jobs import Provenance
from workers.cache.memory import MemoryCache
from workers.engine.breaker import Breaker
from workers.engine.protocols import Decision

#: Upper bounds, in seconds, of the classes that times of stages are counted in.
STAGE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


@dataclass
class StageTimes:
    """How long one stage took, over all requests."""

    bounds: Sequence[float] = STAGE_BUCKETS_S  # upper, in seconds
    times: int = 0
    seconds: float = 0.0  # in all
    #: Times in each class of `bounds`, and last those above all of them.
    classes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.classes = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """Count one time.

        Args:
            seconds: Taken.
        """
        self.times += 1
        self.seconds += seconds
        self.classes[bisect_left(self.bounds, seconds)] += 1

    def snapshot(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "times": self.times,
            "seconds": round(self.seconds, 6),
            "classes": list(self.classes),
        }


@dataclass
class EngineStats:
    """What happened since the engine started."""

    requests: int = 0
    generated: int = 0
    coalesced: int = 0
    hits: Counter[tuple[str, Provenance]] = field(default_factory=Counter)
    stages: dict[str, StageTimes] = field(default_factory=dict)
    decisions: Counter[str] = field(default_factory=Counter)  # served, or the rule that refused

    def hit(self, tier: str, kind: Provenance) -> None:
        """Count a stored answer that was served.

        Args:
            tier: ``memory`` or ``store``.
            kind: ``exact`` or ``semantic``.
        """
        self.hits[tier, kind] += 1

    def took(self, seconds: Mapping[str, float]) -> None:
        """Count how long stages took.

        Args:
            seconds: By stage.
        """
        for stage, took_s in seconds.items():
            self.stages.setdefault(stage, StageTimes()).add(took_s)

    def decided(self, decision: Decision) -> None:
        """Count a decision for or against a neighbour's answer.

        Args:
            decision: Made.
        """
        self.decisions["served" if decision.served else decision.rule or "refused"] += 1

    def snapshot(
        self,
        *,
        memory: MemoryCache,
        flights: int,
        side_tasks: int,
        decisions_lost: int,
        breakers: Sequence[Breaker],
        processes: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return everything as JSON types.

        Args:
            memory: The memory tier.
            flights: Generations under way that others can join.
            side_tasks: Tasks that run beside requests.
            decisions_lost: Decisions that a store which is down could not be told.
            breakers: Of the parts.
            processes: Memory and processor time of this process and its children.
        """
        hits = {f"{kind}/{tier}": count for (tier, kind), count in self.hits.items()}
        served = {**hits, "coalesced": self.coalesced}
        asked = max(self.requests, 1)
        return {
            "requests": self.requests,
            "generated": self.generated,
            "coalesced": self.coalesced,
            "hits": hits,
            "hit_rate": sum(served.values()) / asked,
            "hit_rates": {name: count / asked for name, count in served.items()},
            "stages": {stage: took.snapshot() for stage, took in self.stages.items()},
            "decisions": dict(self.decisions),
            "decisions_lost": decisions_lost,
            "flights": flights,
            "side_tasks": side_tasks,
            "memory": {"entries": len(memory), "bytes": int(memory.size_bytes)},
            "failures": {breaker.name: breaker.failed for breaker in breakers},
            "processes": {name: dict(used) for name, used in processes.items()},
            "left_alone": {breaker.name: breaker.skipped for breaker in breakers},
        }
