"""Reuse by meaning: the look-up for a neighbour's answer races vLLM's generation.

The request goes to the engine at once. If a neighbour that the guard allows is found before the
first output has been handed out, the request leaves its flight and is served the stored answer;
others on the flight notice nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from schema.jobs import Provenance, Verify
from workers.engine.breaker import Breaker
from workers.engine.decisions import DecisionLog
from workers.engine.delivery import RequestDelivery, Won
from workers.engine.enrichment import Enrichers
from workers.engine.flight import Flight, Reader
from workers.engine.notes import Reused
from workers.engine.plan import RequestPlan
from workers.engine.protocols import Considered, Decision, Reuser, StoredAnswer
from workers.engine.replay import stream_of
from workers.engine.scope import RequestScope
from workers.engine.side_tasks import SideTasks
from workers.engine.stats import EngineStats

#: The rule named when an answer might have been given, and was found too late.
TOO_LATE = "too_late"


class _TooLate:
    """A neighbour that the guard allowed when the request had begun to be answered.

    Args:
        found: The neighbour.
    """

    served = False
    rule = TOO_LATE

    def __init__(self, found: Considered) -> None:
        self.answer_id = found.answer_id
        self.similarity = found.similarity


class Races:
    """Starts races, and notes how they end.

    Args:
        reuser: Finds the neighbour.
        enrichers: For the budget, and to compare answers in shadow mode.
        stats: Counts.
        log: Takes the decisions.
        tasks: Owner of the races.
        seat: Makes a reader known as the one of a request.
        used: Told of each stored answer that is served.
        verify: The served model's word on two prompts, for requests that ask for it.
    """

    def __init__(
        self,
        *,
        reuser: Reuser,
        enrichers: Enrichers,
        stats: EngineStats,
        log: DecisionLog,
        tasks: SideTasks,
        seat: Callable[[RequestDelivery, Reader], None],
        used: Callable[[StoredAnswer, RequestScope], None],
        verify: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self.breaker = Breaker("semantic")
        self._reuser = reuser
        self._enrichers = enrichers
        self._config = enrichers.config.similarity
        self._stats = stats
        self.log = log
        self._tasks = tasks
        self._seat = seat
        self._used = used
        self._verify = verify

    def start(self, planned: RequestPlan, delivery: RequestDelivery, flight: Flight) -> None:
        """Look for a neighbour's answer while the flight flies.

        Args:
            planned: The request; one with a key.
            delivery: Its delivery, which may adopt what is found.
            flight: That it has boarded.
        """
        if delivery.scope.shadow:
            self._tasks.spawn(self._shadow(planned, delivery, flight), name="promptmill-shadow")
        else:
            delivery.race = self._tasks.spawn(
                self._race(planned, delivery, flight), name="promptmill-race"
            )

    async def _race(
        self, planned: RequestPlan, delivery: RequestDelivery, flight: Flight
    ) -> Won | None:
        found = await self._look(planned, delivery, flight)
        if found is None:
            return None
        answer, considered = found
        if answer is None:
            self._record(delivery, considered)
            return None
        similarity = next(item.similarity for item in considered if item.served)
        reused = Reused(
            answer=answer, provenance=Provenance.SEMANTIC, tier="store", similarity=similarity
        )
        source = Reader(
            stream_of(
                answer,
                request_id=delivery.request_id,
                prompt=planned.text,
                prompt_token_ids=planned.prompt_token_ids,
                lora_request=planned.call.get("lora_request"),
            ),
            request_id=delivery.request_id,
            kind=planned.params.output_kind,
        )

        def served() -> None:
            self._stats.hit("store", Provenance.SEMANTIC)
            self._used(answer, delivery.scope)
            self._record(delivery, considered)
            self._seat(delivery, source)

        def missed() -> None:
            late = [_TooLate(item) if item.served else item for item in considered]
            self._record(delivery, late)

        return Won(reused=reused, source=source, served=served, missed=missed)

    async def _look(
        self, planned: RequestPlan, delivery: RequestDelivery, flight: Flight
    ) -> tuple[StoredAnswer | None, Sequence[Considered]] | None:
        """Return the answer and all neighbours looked at, or None when there was no looking."""
        await flight.notes.under_way.wait()
        run, text = flight.notes.enrichment, planned.asked
        if run is None or not text:
            return None
        started = time.perf_counter()
        analysis = vector = None
        if run.text == text:
            # What the flight finds out about the prompt serves the guard too.
            analysis, vector = await run.prompt()
            if analysis is None or vector is None:
                return None  # the run says what failed
        try:
            found = await self.breaker.call(
                lambda: self._reuser.find_reusable(
                    text,
                    namespace=delivery.scope.namespace,
                    scope=planned.scope_digest,
                    threshold=delivery.scope.threshold,
                    analysis=analysis,
                    vector=None if vector is None else vector.vector,
                    verify=self._verify if delivery.scope.verify == Verify.ENGINE else None,
                ),
                budget_s=self._config.budget_s,
            )
        except Exception as exc:  # noqa: BLE001  vLLM answers; the breaker counted it
            delivery.errors["semantic"] = f"{type(exc).__name__}: {exc}"
            return None
        seconds = {"semantic": time.perf_counter() - started}
        delivery.seconds |= seconds
        self._stats.took(seconds)
        return found

    async def _shadow(
        self, planned: RequestPlan, delivery: RequestDelivery, flight: Flight
    ) -> None:
        found = await self._look(planned, delivery, flight)
        if found is None:
            return
        answer, considered = found
        await flight.ended()
        own = flight.notes.answer
        agreement = None
        if answer is not None and own is not None:
            agreement = await self._agreement(answer, own)
        self._record(delivery, considered, agreement=agreement, own=own)

    async def _agreement(self, one: StoredAnswer, other: StoredAnswer) -> float | None:
        """Return the cosine of two answers' texts; None when it cannot be had."""
        texts = [answer.completions[0].text for answer in (one, other) if answer.completions]
        if len(texts) != 2:
            return None
        if texts[0] == texts[1]:
            return 1.0
        try:
            first, second = await self._enrichers.embed(texts)
        except Exception:  # noqa: BLE001  a decision without it is still worth keeping
            return None
        return float(np.clip(np.dot(first.vector, second.vector), -1.0, 1.0))

    def _record(
        self,
        delivery: RequestDelivery,
        considered: Sequence[Considered],
        *,
        agreement: float | None = None,
        own: StoredAnswer | None = None,
    ) -> None:
        decisions = [
            Decision(
                namespace=delivery.scope.namespace,
                request_id=delivery.request_id,
                answer_id=item.answer_id,
                similarity=item.similarity,
                served=item.served,
                rule=item.rule,
                shadow=bool(delivery.scope.shadow),
                agreement=agreement if item.served else None,
                own_answer_id=own.id if own is not None else None,
            )
            for item in considered
        ]
        for decision in decisions:
            self._stats.decided(decision)
        delivery.scope.report.decisions.extend(decisions)
        self.log.add(decisions)
