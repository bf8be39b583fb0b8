"""`Turns`: whose job is let into the queue next, when several namespaces have more than fit.

Start-time fair queueing (P. Goyal, H. M. Vin, H. Cheng, "Start-time fair queuing: a scheduling
algorithm for integrated services packet switching networks", SIGCOMM 1996), with one job as the
unit of service: each namespace's next job bears a start tag, the smallest goes first, and serving
one moves the namespace's tag on by 1/weight. One that had nothing to wait for begins at the
present virtual time, so that it is served at once and gains nothing by having been away.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Turns:
    """The order in which the namespaces of one queue are served.

    Args:
        weights: Share of each namespace in relation to the others'; 1 for those not named.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._now = 0.0  # virtual time: the start tag of the job served last
        self._next: dict[str, float] = {}  # start tag of each namespace's next job

    def take(self, waiting: Collection[str], jobs: int) -> list[str]:
        """Hand out turns.

        Args:
            waiting: Namespaces that have jobs waiting.
            jobs: Turns to hand out.

        Returns:
            A namespace for each turn, in order; empty when nobody waits.
        """
        # Tags of the past are those of somebody who was away.
        self._next = {name: tag for name, tag in self._next.items() if tag > self._now}
        heap = [(self._next.get(name, self._now), name) for name in waiting]
        heapq.heapify(heap)
        served = []
        for _ in range(jobs if heap else 0):
            tag, name = heap[0]
            self._now = max(self._now, tag)
            self._next[name] = tag + 1 / self._weights.get(name, 1.0)
            heapq.heapreplace(heap, (self._next[name], name))
            served.append(name)
        return served

    def give_back(self, name: str, turns: int) -> None:
        """Take back turns that a namespace had no job for.

        Args:
            name: The namespace.
            turns: How many.
        """
        if name in self._next:
            self._next[name] -= turns / self._weights.get(name, 1.0)
