"""One request on its way to its consumer: its source, what is known of it, what it reports."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from schema.jobs import Provenance
from workers.engine.enrichment import EnrichmentRun, Findings
from workers.engine.flight import Flight, Source
from workers.engine.notes import Reused
from workers.engine.protocols import StoredAnswer
from workers.engine.scope import ReportEntry, RequestScope

#: Under these names the analysis of an answer, and what plug-ins said of it, are stored among the
#: enrichments.
ANSWER_NLP, ANSWER_ENRICHMENTS = "answer_nlp", "answer_enrichments"

_NOTHING = Findings()


@dataclass(frozen=True, kw_only=True)
class Won:
    """A race that found an answer, with what is to be done once it is served."""

    reused: Reused
    source: Source
    served: Callable[[], None]
    missed: Callable[[], None]  # instead, when the answer came too late


@dataclass(kw_only=True)
class RequestDelivery:
    """State of one request; implements the collector's `Delivery`.

    The engine fills it in; the collector asks it.
    """

    request_id: str
    scope: RequestScope
    wait_s: float  # how long the final output waits for enrichment
    disabled: Mapping[str, str]
    internal_id: str = ""  # by which the request can be aborted
    not_reusable: str | None = None  # why neither read nor stored
    flight: Flight | None = None
    coalesced: bool = False  # joined somebody else's flight
    reused: Reused | None = None
    enrichment: EnrichmentRun | None = None  # of this request alone
    race: asyncio.Task[Won | None] | None = None
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # stage of its own to time
    spoken: Callable[[], str] | None = None  # text of an answer that is not kept
    on_arrival: Callable[[RequestDelivery], None] | None = None
    on_final: Callable[[RequestDelivery], None] | None = None
    started: float = field(default_factory=time.perf_counter)
    _arrived_at: float | None = None
    _reported: bool = False

    def adopt(self) -> Source | None:
        """Return the stored answer's source, when the race has just been won."""
        race = self.race
        if race is None or not race.done():
            return None
        self.race = None
        if race.cancelled() or race.exception() is not None or (won := race.result()) is None:
            return None
        self.reused = won.reused
        won.served()
        return won.source

    def racing(self) -> asyncio.Task[Any] | None:
        """Return the look-up for a neighbour's answer, while it runs."""
        return self.race

    def handed_out(self) -> None:
        """An output has gone to the consumer: the race is lost, and runs out by itself."""
        race, self.race = self.race, None
        if race is not None:
            race.add_done_callback(_missed)

    def arrived(self) -> None:
        """Note the time of the last token; the race is lost."""
        self.handed_out()
        if self._arrived_at is None:
            self._arrived_at = time.perf_counter()
            if self.on_arrival is not None:
                self.on_arrival(self)

    def settled(self) -> bool:
        """Whether enrichment has ended, or had its time."""
        run = self._awaited()
        if run is None or run.done:
            return True
        return time.perf_counter() - (self._arrived_at or 0.0) >= self.wait_s

    async def settle(self) -> None:
        """Wait for enrichment, `wait_s` at most from the last token on."""
        if (run := self._awaited()) is not None and self._arrived_at is not None:
            left_s = self.wait_s - (time.perf_counter() - self._arrived_at)
            await run.wait(max(left_s, 0.0))

    def left(self) -> None:
        """Let go of the race, and of the enrichment that ran for this request alone."""
        self.handed_out()
        if self.enrichment is not None:
            self.enrichment.leave()

    def metadata(self, *, final: bool) -> dict[str, Any]:
        """Return the metadata of an output that is handed out now.

        Args:
            final: Whether it is the last; then the scope's report is filled too.
        """
        reused = self.source_of_reuse
        data: dict[str, Any] = {"cached": reused is not None, "provenance": str(self.provenance)}
        if not final:
            return data
        first = not self._reported
        self._reported = True
        if first and self.on_final is not None:
            self.on_final(self)
        data |= self._details()
        if first:
            self.scope.report.entries.append(
                ReportEntry(
                    request_id=self.request_id,
                    metadata=data,
                    answer=self.answer,
                    stored=reused is not None and reused.tier == "store",
                )
            )
        return data

    @property
    def passed_through(self) -> float | None:
        """Seconds that vLLM took to answer this request alone; None for one that is shared."""
        if self.flight is not None or self.reused is not None or self._arrived_at is None:
            return None
        return self._arrived_at - self.started

    @property
    def provenance(self) -> Provenance:
        """How the answer came about."""
        if (reused := self.source_of_reuse) is not None:
            return reused.provenance
        return Provenance.COALESCED if self.coalesced else Provenance.GENERATED

    @property
    def source_of_reuse(self) -> Reused | None:
        """The stored answer that is given, if one is."""
        if self.reused is not None:
            return self.reused
        return self.flight.notes.reused if self.flight is not None else None

    @property
    def answer(self) -> StoredAnswer | None:
        """The answer given, with what is known of it by now; None when it may not be stored."""
        if (reused := self.source_of_reuse) is not None:
            return reused.answer
        return self.flight.notes.answer if self.flight is not None else None

    def _of_the_flight(self) -> EnrichmentRun | None:
        return self.flight.notes.enrichment if self.flight is not None else None

    def _awaited(self) -> EnrichmentRun | None:
        """Return the enrichment that the final output waits for."""
        if self.enrichment is not None or self.source_of_reuse is not None:
            return self.enrichment
        return self._of_the_flight()

    def _findings(self) -> Findings:
        """Return what was found out about this request's prompt."""
        run = self._of_the_flight() or self.enrichment
        return run.findings if run is not None else _NOTHING

    def _details(self) -> dict[str, Any]:
        reused, answer, findings = self.source_of_reuse, self.answer, self._findings()
        own = self.enrichment.findings if self.enrichment is not None else findings
        analysis, similar = findings.analysis, findings.similar
        enrichments = findings.enrichments
        spoken = own.answer_analysis.public() if own.answer_analysis is not None else None
        of_answer = own.answer_enrichments
        if reused is not None:
            enrichments = {**reused.answer.enrichments, **enrichments}
            stored = enrichments.pop(ANSWER_NLP, None)
            spoken = spoken or stored
            of_answer = {**enrichments.pop(ANSWER_ENRICHMENTS, {}), **of_answer}
            if reused.provenance == Provenance.EXACT:
                analysis, similar = reused.answer.analysis, reused.answer.similar
        seconds = {**findings.seconds, **own.seconds, **self.seconds}
        errors = {**self.errors, **findings.errors, **own.errors}
        if self.flight is not None:
            seconds = {**self.flight.notes.seconds, **seconds}
            errors = {**self.flight.notes.errors, **errors}
        seconds["total"] = time.perf_counter() - self.started
        given_id = str(answer.id) if answer is not None else None
        return {
            "similarity": reused.similarity if reused is not None else None,
            "source_answer_id": given_id if reused is not None else None,
            "answer_id": given_id,
            "tier": reused.tier if reused is not None else None,
            "nlp_result": analysis.public() if analysis is not None else None,
            # Copies: the answer may be given to others, and to do as they like with.
            "answer_nlp_result": copy.deepcopy(spoken),
            "similar": [near.public() for near in similar or ()],
            "enrichments": copy.deepcopy(dict(enrichments)),
            "answer_enrichments": copy.deepcopy(dict(of_answer)),
            "processing_time": {stage: round(value, 6) for stage, value in seconds.items()},
            "errors": errors,
            "disabled": dict(self.disabled),
            "late": sorted(findings.running | own.running),
            "not_reusable": self._why_not(),
        }

    def _why_not(self) -> str | None:
        if self.not_reusable is not None or self.flight is None:
            return self.not_reusable
        return self.flight.notes.not_storable


def _missed(race: asyncio.Task[Won | None]) -> None:
    if race.cancelled() or race.exception() is not None or (won := race.result()) is None:
        return
    won.missed()
