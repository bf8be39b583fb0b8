"""One request on its way to its consumer: its source, what is known of it, what it reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from schema.jobs import Provenance
from workers.engine.enrichment import EnrichmentRun, Findings
from workers.engine.flight import Flight, Source
from workers.engine.protocols import StoredAnswer
from workers.engine.scope import ReportEntry, RequestScope


@dataclass
class Reused:
    """A stored answer that is served."""

    answer: StoredAnswer
    provenance: Provenance
    tier: str  # memory or store
    similarity: float = 1.0


@dataclass
class RequestDelivery:
    """State of one request; implements the collector's `Delivery`.

    The engine fills it in; the collector asks it.
    """

    request_id: str
    scope: RequestScope
    wait_s: float  # how long the final output waits for enrichment
    disabled: dict[str, str]
    not_reusable: str | None = None  # why neither read nor stored
    flight: Flight | None = None
    coalesced: bool = False  # joined somebody else's flight
    reused: Reused | None = None
    enrichment: EnrichmentRun | None = None
    owns_enrichment: bool = False  # nobody else reads it
    race: asyncio.Task[tuple[Reused, Source] | None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
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
        self.reused, source = won
        return source

    def racing(self) -> asyncio.Task[Any] | None:
        """Return the look-up for a neighbour's answer, while it runs."""
        return self.race

    def arrived(self) -> None:
        """Note the time of the last token; the race is lost."""
        if self.race is not None:
            self.race.cancel()
            self.race = None
        if self._arrived_at is None:
            self._arrived_at = time.perf_counter()

    def settled(self) -> bool:
        """Whether enrichment has ended, or had its time."""
        run = self._run()
        if run is None or run.done:
            return True
        return time.perf_counter() - (self._arrived_at or 0.0) >= self.wait_s

    async def settle(self) -> None:
        """Wait for enrichment, `wait_s` at most from the last token on."""
        if (run := self._run()) is not None and self._arrived_at is not None:
            left_s = self.wait_s - (time.perf_counter() - self._arrived_at)
            await run.wait(max(left_s, 0.0))

    def left(self) -> None:
        """Stop the race, and the enrichment if it ran for this request alone."""
        if self.race is not None:
            self.race.cancel()
            self.race = None
        if self.owns_enrichment and self.enrichment is not None and self._arrived_at is None:
            self.enrichment.cancel()

    def metadata(self, *, final: bool) -> dict[str, Any]:
        """Return the metadata of an output that is handed out now.

        Args:
            final: Whether it is the last; then the scope's report is filled too.
        """
        data: dict[str, Any] = {
            "cached": self._source_of_reuse() is not None,
            "provenance": str(self.provenance),
        }
        if not final:
            return data
        if self.on_final is not None and not self._reported:
            self.on_final(self)
        data |= self._details()
        if not self._reported:
            self._reported = True
            reused = self._source_of_reuse()
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
    def provenance(self) -> Provenance:
        """How the answer came about."""
        if (reused := self._source_of_reuse()) is not None:
            return reused.provenance
        return Provenance.COALESCED if self.coalesced else Provenance.GENERATED

    @property
    def answer(self) -> StoredAnswer | None:
        """The answer given, with what is known of it by now; None when it may not be stored."""
        if (reused := self._source_of_reuse()) is not None:
            return reused.answer
        if self.flight is None or self.flight.notes.get("answer") is None:
            return None
        answer: StoredAnswer = self.flight.notes["answer"]
        return answer

    def _source_of_reuse(self) -> Reused | None:
        if self.reused is not None:
            return self.reused
        return self.flight.notes.get("reused") if self.flight is not None else None

    def _run(self) -> EnrichmentRun | None:
        if self._source_of_reuse() is not None:
            return None
        if self.flight is not None:
            run: EnrichmentRun | None = self.flight.notes.get("enrichment")
            return run
        return self.enrichment

    def _details(self) -> dict[str, Any]:
        reused, answer = self._source_of_reuse(), self.answer
        run = self._run()
        findings = run.findings if run is not None else Findings()
        analysis = findings.analysis
        similar, enrichments = findings.similar, dict(findings.enrichments)
        if reused is not None:
            analysis, similar = reused.answer.analysis, reused.answer.similar
            enrichments = dict(reused.answer.enrichments)
        seconds = {**self.seconds, **findings.seconds}
        seconds["total"] = time.perf_counter() - self.started
        if self.flight is not None:
            seconds = {**self.flight.notes.get("seconds", {}), **seconds}
        flight_errors = self.flight.notes.get("errors", {}) if self.flight is not None else {}
        source_id: UUID | None = reused.answer.id if reused is not None else None
        answer_id = answer.id if answer is not None else None
        return {
            "similarity": reused.similarity if reused is not None else None,
            "source_answer_id": str(source_id) if source_id else None,
            "answer_id": str(answer_id) if answer_id else None,
            "tier": reused.tier if reused is not None else None,
            "nlp_result": analysis.public() if analysis is not None else None,
            "similar": [near.public() for near in similar or ()],
            "enrichments": enrichments,
            "processing_time": {stage: round(value, 6) for stage, value in seconds.items()},
            "errors": {**flight_errors, **self.errors, **findings.errors},
            "disabled": self.disabled,
            "late": sorted(findings.running),
            "not_reusable": self._why_not(),
        }

    def _why_not(self) -> str | None:
        if self.not_reusable is not None or self.flight is None:
            return self.not_reusable
        reason: str | None = self.flight.notes.get("not_storable")
        return reason
