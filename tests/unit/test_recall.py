"""Repeats of requests: what is kept, what is filled in, and what is never given."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import orjson
import pytest

from schema.jobs import Completion, JobResult, JobState, Provenance
from tests.stand_ins import claimed_job
from workers.engine.protocols import StoredAnswer, StoredCompletion
from workers.recall import Recall
from workers.store.records import ClaimedJob, Outcome

FINGERPRINT = b"f" * 32


class Memory:
    """Has one answer, unless it was forgotten."""

    def __init__(self) -> None:
        completion = StoredCompletion(index=0, text="Paris.", token_ids=(1,), finish_reason="stop")
        self.answer: StoredAnswer | None = StoredAnswer(
            id=uuid4(),
            namespace="n",
            fingerprint=FINGERPRINT,
            engine=b"e",
            model="m",
            prompt="p",
            completions=(completion,),
            created_at=0.0,
        )

    def recall(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return it."""
        assert (namespace, fingerprint) == ("n", FINGERPRINT)
        return self.answer

    def recalled_metadata(self, answer: StoredAnswer) -> dict[str, Any]:
        """Return what the engine says of it."""
        return {"provenance": "exact", "source_answer_id": str(answer.id)}


def job(**fields: Any) -> ClaimedJob:
    chat = {"kind": "openai", "url": "/v1/chat/completions", "body": {"messages": []}}
    return claimed_job(**{"request": chat, **fields})


def outcome(of: ClaimedJob, **body: Any) -> Outcome:
    said = {"id": f"chatcmpl-{of.id}", "created": 1, "choices": [], **body}
    result = JobResult(
        job_id=of.id,
        namespace=of.namespace,
        status=JobState.DONE,
        token=of.token,
        text='"Paris" \u2028 \x00',
        outputs=[Completion(text="Paris.", token_ids=[1], cumulative_logprob=-0.5)],
        body=said,
        metadata={"provenance": "generated", "tokens": {"prompt_tokens": 3}},
        finished_at=datetime.now(UTC),
    )
    return Outcome(job_id=of.id, token=of.token, result=result, fingerprint=FINGERPRINT)


def test_a_repeat_gets_the_same_answer_under_its_own_name() -> None:
    """All that belongs to the job is its own; the rest is what was answered before."""
    recall, first = Recall(Memory()), job()
    recall.note(first, said := outcome(first))
    own = job(token=7, custom_id='a "row" é', batch_id=uuid4())
    found = recall.outcomes([own])[own.id]
    read = JobResult.model_validate_json(found.result.json_text)
    assert (read.job_id, read.token, read.custom_id) == (own.id, 7, own.custom_id)
    assert read.batch_id == own.batch_id
    assert (read.text, read.outputs) == (said.result.text, said.result.outputs)
    assert read.body is not None
    assert read.body["id"] == f"chatcmpl-{own.id}"
    assert read.body["created"] > 1
    assert read.metadata["provenance"] == "exact"
    assert read.metadata["tokens"] == {"prompt_tokens": 3}
    assert (found.token, found.provenance) == (7, Provenance.EXACT)
    # The order of the fields too: a repeat reads as what it repeats.
    assert list(orjson.loads(found.result.json_text)) == list(orjson.loads(said.result.json_text))


@pytest.mark.parametrize(
    "other",
    [
        {"namespace": "other"},
        {"model": "an adapter of it"},
        {"options": {"reuse": "off"}},
        {"options": {"reuse": "always"}},
        {"options": {"stream": True}},
        {"options": {"analyse_answer": True}},
        {"crashes": 1},
        {"request": {"kind": "prompt", "prompt": "p"}},
    ],
    ids=str,
)
def test_what_differs_needs_a_run(other: dict[str, Any]) -> None:
    """Another request, another tenant, another way of reuse, or a suspect."""
    recall, first = Recall(Memory()), job()
    recall.note(first, outcome(first))
    assert not recall.outcomes([job(**other)])


def test_what_may_not_be_repeated_is_not_kept() -> None:
    """An outcome without a fingerprint, and one that asks for none of the cache."""
    recall, first = Recall(Memory()), job()
    result = outcome(first).result
    recall.note(first, Outcome(job_id=first.id, token=1, result=result))
    off = job(options={"reuse": "off"})
    recall.note(off, outcome(off))
    assert not recall.outcomes([job(), job(options={"reuse": "off"})])


def test_what_the_memory_tier_forgot_is_not_given() -> None:
    """It expired, was invalidated, or was reported."""
    memory, first = Memory(), job()
    recall = Recall(memory)
    recall.note(first, outcome(first))
    assert recall.outcomes([job()])
    memory.answer = None
    assert not recall.outcomes([job()])


def test_a_response_id_of_the_callers_own_stays() -> None:
    """Only one that was made of the job's id is made anew."""
    recall, first = Recall(Memory()), job()
    recall.note(first, outcome(first, id="chatcmpl-mine"))
    own = job()
    body = orjson.loads(recall.outcomes([own])[own.id].result.json_text)["body"]
    assert body["id"] == "chatcmpl-mine"
