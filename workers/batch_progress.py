"""Where a batch run stands, and what it was spared: also the summary at its end."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from schema.jobs import JobState, Provenance

if TYPE_CHECKING:
    from schema.jobs import JobResult


@dataclass(kw_only=True)
class Saved:
    """What rows did not cost because their answers were there, or were made for another row."""

    prompt_tokens: int = 0  # not read
    completion_tokens: int = 0  # not generated
    engine_s: float = 0.0  # seconds that generating these answers took


@dataclass(kw_only=True)
class BatchProgress:
    """Where a run stands; also its summary at the end."""

    batch_id: UUID
    read: int = 0  # rows of the input seen so far
    kept: int = 0  # answered by an earlier run
    changed: int = 0  # answered by an earlier run, but asking something else by now
    written: int = 0  # lines written by this run
    failed: int = 0  # of those written and kept, with an error
    prompt_tokens: int = 0  # of all answers of this run
    completion_tokens: int = 0
    provenance: Counter[str] = field(default_factory=Counter)  # answers of this run by origin
    saved: Saved = field(default_factory=Saved)
    engine_s: float = 0.0  # seconds of generation, summed over rows that ran side by side
    read_all: bool = False  # the end of the input was reached, so `read` is the total
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    @property
    def answered(self) -> int:
        """Answers of this run."""
        return sum(self.provenance.values())

    @property
    def cached(self) -> int:
        """Answers of this run that were not generated for their own row."""
        return self.answered - self.provenance[Provenance.GENERATED]

    @property
    def cached_share(self) -> float:
        """The same, as a share of the answers of this run."""
        return self.cached / self.answered if self.answered else 0.0

    def add(self, result: JobResult, *, twin: bool = False) -> None:
        """Count one row that is over.

        Args:
            result: Its outcome.
            twin: Whether the job was another row's, with the same request.
        """
        if result.status is not JobState.DONE:
            self.failed += 1
            return
        origin = Provenance.COALESCED.value if twin else _origin(result)
        self.provenance[origin] += 1
        prompt, completion = _tokens(result)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        seconds = float(result.metadata.get("engine_s") or 0.0)
        if origin == Provenance.GENERATED:
            self.engine_s += seconds
        else:
            self.saved.prompt_tokens += prompt
            self.saved.completion_tokens += completion
            self.saved.engine_s += seconds

    def summary(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return {
            "batch_id": str(self.batch_id),
            "rows": self.read,
            "written": self.written,
            "kept": self.kept,
            "changed": self.changed,
            "failed": self.failed,
            "provenance": dict(self.provenance),
            "cached": self.cached,
            "cached_share": round(self.cached_share, 4),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "engine_s": round(self.engine_s, 3),
            "saved": {
                "prompt_tokens": self.saved.prompt_tokens,
                "completion_tokens": self.saved.completion_tokens,
                "engine_s": round(self.saved.engine_s, 3),
            },
            "elapsed_s": round(self.elapsed_s, 3),
        }


def _origin(result: JobResult) -> str:
    return str(result.metadata.get("provenance") or Provenance.GENERATED.value)


def _tokens(result: JobResult) -> tuple[int, int]:
    usage = (result.body or {}).get("usage") or result.metadata.get("tokens") or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
