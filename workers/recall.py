"""`Recall`: requests that this worker has answered, so that their repeats need no run.

To answer a repeat by the usual way costs about a millisecond even when the answer is in memory:
the request is checked, rendered, tokenized, keyed and replayed, and a response is written. None of
that can come out otherwise than the last time, as long as the answer still stands. So what came out
is kept beside the request, with gaps for all that belongs to the job, and the engine's memory tier
is asked whether the answer may be given: one that expired, was invalidated or reported is not.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID, uuid4

import orjson
from cachetools import LRUCache

from schema.jobs import JobResult, JobState, Provenance, Reuse
from workers.pauses import no_collection
from workers.store.records import ClaimedJob, Outcome

if TYPE_CHECKING:
    from workers.engine.protocols import StoredAnswer

#: Bytes that all of it may take, by estimate: about as many answers as the memory tier has.
_MOST_BYTES = 64 * 2**20
_OVERHEAD_BYTES = 4_000
_COPIES = 4  # of a result: as text, as values, its answer, and the text of the metadata
#: Options under which the usual way does more than to give the answer.
_UNUSUAL = ("stream", "analyse_answer", "sliding_ttl")

#: Namespace, model (a worker may serve adapters of it), way of reuse, and digest of the request.
_Key = tuple[str, str, str, bytes]

# A word that no model writes marks a gap, so that a text that was kept is not mistaken for one.
_MARK = uuid4().hex
_GAP = re.compile(f'"{_MARK}:([a-z_]+)"')


class RemembersAnswers(Protocol):
    """What has the answers; `EnhancedAsyncLLM` does."""

    def recall(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return an answer that may be given now."""
        ...

    def recalled_metadata(self, answer: StoredAnswer) -> dict[str, Any]:
        """Return the metadata of an output that gives it."""
        ...


class _Template:
    """JSON with gaps.

    Args:
        document: JSON types, with `gap` values where something is to be filled in.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        text = orjson.dumps(document).decode()
        # Texts and the names of the gaps between them, by turns.
        self._parts = _GAP.split(text)
        self.bytes = len(text)

    def filled(self, values: Mapping[str, str]) -> str:
        """Return the JSON.

        Args:
            values: JSON text by the name of the gap.
        """
        parts = self._parts.copy()
        parts[1::2] = [values[name] for name in parts[1::2]]
        return "".join(parts)


def _gap(name: str) -> str:
    return f"{_MARK}:{name}"


@dataclass(kw_only=True, slots=True)
class _Known:
    """A request that was answered."""

    fingerprint: bytes
    first: JobResult  # what was answered then
    result: _Template
    response_id: str  # how the response's own id begins; the job's follows
    answer: StoredAnswer | None = None  # that the metadata was made of
    metadata: dict[str, Any] = field(default_factory=dict)
    metadata_text: _Template | None = None

    @property
    def bytes(self) -> int:
        """What it takes in memory, by estimate."""
        return _COPIES * self.result.bytes + _OVERHEAD_BYTES


class Recall:
    """Answers repeats of requests from what was answered before.

    Args:
        engine: Has the answers.
    """

    def __init__(self, engine: RemembersAnswers) -> None:
        self._engine = engine
        self._known: LRUCache[_Key, _Known] = LRUCache(
            _MOST_BYTES, getsizeof=lambda known: known.bytes
        )

    def note(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Keep what a job was answered, if a repeat is to be answered the same.

        Args:
            job: The job.
            outcome: Committed, so that its answer is stored.
        """
        key = _key(job)
        if outcome.fingerprint is None or key is None or key in self._known:
            return
        try:
            document = orjson.loads(outcome.result.json_text)
        except orjson.JSONDecodeError:  # numbers that are none, which only pydantic writes
            return
        response_id = ""
        if isinstance(body := document.get("body"), dict):
            begin, own, rest = str(body.get("id", "")).partition(str(job.id))
            if own and not rest:
                response_id, body["id"] = begin, _gap("response_id")
            if "created" in body:
                body["created"] = _gap("created")
        for name in ("job_id", "token", "custom_id", "batch_id", "metadata", "finished_at"):
            document[name] = _gap(name)
        known = _Known(
            fingerprint=outcome.fingerprint,
            first=outcome.result,
            result=_Template(document),
            response_id=response_id,
        )
        if known.bytes <= _MOST_BYTES:
            self._known[key] = known

    def outcomes(
        self, jobs: Iterable[ClaimedJob], *, unclaimed: bool = False
    ) -> dict[UUID, Outcome]:
        """Return the outcomes of those jobs that need no run.

        Args:
            jobs: Just claimed, or as a claim would return them.
            unclaimed: The latter.
        """
        if not self._known:
            return {}
        found, started, now = {}, time.perf_counter(), datetime.now(UTC)
        common = {
            "finished_at": f'"{now.isoformat().replace("+00:00", "Z")}"',
            "created": str(int(now.timestamp())),
        }
        with no_collection():
            for job in jobs:
                key = _key(job)
                known = None if key is None else self._known.get(key)
                if known is None or job.crashes:
                    continue
                answer = self._engine.recall(job.namespace, known.fingerprint)
                if answer is not None:
                    common["total"] = f"{time.perf_counter() - started:.6f}"
                    found[job.id] = self._outcome(job, known, answer, common, now, unclaimed)
        return found

    def _outcome(
        self,
        job: ClaimedJob,
        known: _Known,
        answer: StoredAnswer,
        common: Mapping[str, str],
        now: datetime,
        unclaimed: bool,
    ) -> Outcome:
        if known.answer is not answer or known.metadata_text is None:
            # More may be known of the answer than when it was given last.
            now_known = self._engine.recalled_metadata(answer)
            known.answer, known.metadata = answer, {**known.first.metadata, **now_known}
            with_gap = {**known.metadata, "processing_time": {"total": _gap("total")}}
            known.metadata_text = _Template(with_gap)
        job_id = str(job.id)
        values = {
            **common,
            "job_id": f'"{job_id}"',
            "token": str(job.token),
            "custom_id": orjson.dumps(job.custom_id).decode(),
            "batch_id": "null" if job.batch_id is None else f'"{job.batch_id}"',
            "response_id": f'"{known.response_id}{job_id}"',
            "metadata": known.metadata_text.filled(common),
        }
        return Outcome(
            job_id=job.id,
            token=job.token,
            result=JobResult.written(
                known.result.filled(values),
                job_id=job.id,
                namespace=job.namespace,
                status=JobState.DONE,
                token=job.token,
                custom_id=job.custom_id,
                batch_id=job.batch_id,
                text=known.first.text,
                outputs=known.first.outputs,
                body=known.first.body,
                metadata=known.metadata,
                error=None,
                finished_at=now,
            ),
            provenance=Provenance.EXACT,
            answer_id=answer.id,
            unclaimed=unclaimed,
        )


def _key(job: ClaimedJob) -> _Key | None:
    """Return what two jobs share that get the same answer; None for one that needs a run."""
    options = job.options
    reuse = options.get("reuse", Reuse.EXACT)
    if reuse == Reuse.OFF or any(options.get(name) for name in _UNUSUAL):
        return None
    # Postgres keeps an object's keys in an order of its own, so equal requests read the same.
    return job.namespace, job.model, reuse, hashlib.sha256(orjson.dumps(job.request)).digest()
