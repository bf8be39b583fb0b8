"""`DurableTier`: the store behind the memory tier, as a flight sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from uuid import uuid4

from schema.jobs import Provenance
from workers.cache.memory import MemoryCache
from workers.engine.breaker import Breaker
from workers.engine.flight import Stream
from workers.engine.notes import FlightNotes, Reused
from workers.engine.plan import RequestPlan
from workers.engine.protocols import AnswerStore, ExtendsLives, FlightMarkers, StoredAnswer
from workers.engine.replay import stream_of
from workers.engine.scope import RequestScope
from workers.engine.side_tasks import SideTasks
from workers.engine.stats import EngineStats

#: Seconds the store may take to look up one answer before generation starts without it.
_LOOK_UP_BUDGET_S = 1.0
#: Seconds after which other workers no longer wait for a generation of this one.
_MARK_TTL_S = 60.0
#: Part of its time that an answer must have lost before a hit starts it anew.
_WORTH_EXTENDING = 0.1
#: Seconds the store may take to write one answer.
_STORE_BUDGET_S = 10.0


class DurableTier:
    """Reads and writes answers; without a store it has none.

    Args:
        store: Keeps them, or None.
        wait_s: Seconds to wait for another worker's answer; 0 never waits.
        memory: Is given what is found.
        breaker: Of the store.
        stats: Counts.
        tasks: Owner of what runs.
    """

    def __init__(
        self,
        *,
        store: AnswerStore | None,
        wait_s: float,
        memory: MemoryCache,
        breaker: Breaker,
        stats: EngineStats,
        tasks: SideTasks,
    ) -> None:
        self._store = store
        self._wait_s = wait_s
        self._memory = memory
        self._breaker = breaker
        self._stats = stats
        self._tasks = tasks
        self._owner = uuid4().hex

    async def look_up(
        self, stream: Stream, planned: RequestPlan, scope: RequestScope, notes: FlightNotes
    ) -> bool:
        """Fill the stream from the store, if it has the answer or another worker brings it.

        Args:
            stream: Empty.
            planned: The request.
            scope: Of the request.
            notes: Of the flight.
        """
        store = self._store
        if store is None:
            return False
        started, forgettings = time.perf_counter(), self._memory.forgettings
        try:
            asked = self._breaker.call(
                lambda: store.get(scope.namespace, planned.key or b""), budget_s=_LOOK_UP_BUDGET_S
            )
            answer = await self._tasks.finish(asked, name="promptmill-look-up")
        except Exception as exc:  # noqa: BLE001  without the store, vLLM answers; it was counted
            notes.errors["store"] = f"{type(exc).__name__}: {exc}"
            return False
        self._took(notes, "look_up", started)
        if answer is None:
            answer = await self._from_another_worker(planned, scope, notes)
        if answer is None:
            return False
        if self._memory.forgettings == forgettings:
            self._memory.put(answer)  # else it may have been read before it was withdrawn
        self._stats.hit("store", Provenance.EXACT)
        self.used(answer, scope)
        notes.reused = Reused(answer=answer, provenance=Provenance.EXACT, tier="store")
        filled = replayed(answer, planned)
        stream.transcript, stream.pooled = filled.transcript, filled.pooled
        return True

    async def _from_another_worker(
        self, planned: RequestPlan, scope: RequestScope, notes: FlightNotes
    ) -> StoredAnswer | None:
        """Return the answer that another worker is generating; None makes this one generate."""
        store, wait_s = self._store, self._wait_s
        # Who streams wants the first token now, not the whole answer later.
        if wait_s == 0 or planned.streams or not isinstance(store, FlightMarkers):
            return None
        name = (scope.namespace, planned.key or b"")
        started = time.perf_counter()
        try:
            asked = self._breaker.call(
                lambda: store.mark_flight(*name, self._owner, _MARK_TTL_S),
                budget_s=_LOOK_UP_BUDGET_S,
            )
            notes.marked = await self._tasks.finish(asked, name="promptmill-mark")
            if notes.marked:
                return None
            answer = await self._breaker.call(
                lambda: store.wait_answer(*name, wait_s), budget_s=wait_s + _LOOK_UP_BUDGET_S
            )
        except Exception as exc:  # noqa: BLE001  without the store, vLLM answers; it was counted
            notes.errors["store"] = f"{type(exc).__name__}: {exc}"
            return None
        self._took(notes, "other_worker", started)
        return answer

    def _took(self, notes: FlightNotes, stage: str, started: float) -> None:
        notes.seconds[stage] = took_s = time.perf_counter() - started
        self._stats.took({stage: took_s})

    def used(self, answer: StoredAnswer, scope: RequestScope) -> None:
        """Start a stored answer's time anew, where whoever was given it asked for that.

        Args:
            answer: Given.
            scope: Of the request.
        """
        if not scope.sliding_ttl or scope.ttl_s is None or answer.expires_at is None:
            return
        until = time.time() + scope.ttl_s
        if until - answer.expires_at < scope.ttl_s * _WORTH_EXTENDING:
            return  # a popular answer must not be written at every hit
        self._memory.complete(dataclasses.replace(answer, expires_at=until))
        if isinstance(self._store, ExtendsLives):
            self._tasks.spawn(
                self._extended(self._store, answer, scope.ttl_s), name="promptmill-extend"
            )

    async def _extended(self, store: ExtendsLives, answer: StoredAnswer, ttl_s: float) -> None:
        with contextlib.suppress(Exception):  # it was counted, and the answer lives as before
            await self._breaker.call(
                lambda: store.extend(answer.namespace, answer.id, ttl_s),
                budget_s=_STORE_BUDGET_S,
            )

    def unmark(self, notes: FlightNotes, planned: RequestPlan, scope: RequestScope) -> None:
        """Let other workers go on: the answer is stored, or there will be none.

        Args:
            notes: Of the flight.
            planned: Its request.
            scope: Of that request.
        """
        if notes.marked and isinstance(self._store, FlightMarkers):
            notes.marked = False
            self._tasks.spawn(
                self._unmarked(self._store, scope.namespace, planned.key or b""),
                name="promptmill-unmark",
            )

    async def _unmarked(self, store: FlightMarkers, namespace: str, key: bytes) -> None:
        with contextlib.suppress(Exception):  # it was counted, and the mark ends by itself
            await self._breaker.call(
                lambda: store.unmark_flight(namespace, key, self._owner),
                budget_s=_LOOK_UP_BUDGET_S,
            )

    async def keep(self, notes: FlightNotes, planned: RequestPlan, scope: RequestScope) -> None:
        """Store a flight's answer.

        Args:
            notes: Of the flight.
            planned: Its request.
            scope: Of that request.
        """
        store, answer = self._store, notes.answer
        if store is None or answer is None or self._withdrawn(notes, answer):
            return
        try:
            await self._breaker.call(lambda: store.put(answer), budget_s=_STORE_BUDGET_S)
            self.unmark(notes, planned, scope)
        except Exception as exc:  # noqa: BLE001  the answer was given; it was counted and logged
            notes.errors["store"] = f"{type(exc).__name__}: {exc}"

    def _withdrawn(self, notes: FlightNotes, answer: StoredAnswer) -> bool:
        """Whether an answer may have been withdrawn since it was made, and must not come back."""
        if self._memory.forgettings == notes.forgettings:
            return False
        kept = self._memory.get(answer.namespace, answer.fingerprint)
        return kept is None or kept.id != answer.id


def replayed(answer: StoredAnswer, planned: RequestPlan) -> Stream:
    """Return a finished stream that replays an answer for a request.

    Args:
        answer: Stored earlier.
        planned: The request.
    """
    return stream_of(
        answer,
        request_id=planned.call["request_id"],
        prompt=planned.text,
        prompt_token_ids=planned.prompt_token_ids,
        lora_request=planned.call.get("lora_request"),
    )
