"""What stands in, in tests, for a claimed job and for the engine's one final output."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from workers.store.records import ClaimedJob

if TYPE_CHECKING:
    from workers.engine.output import EnhancedRequestOutput
    from workers.engine.protocols import StoredAnswer


def claimed_job(request: dict[str, Any], **fields: Any) -> ClaimedJob:
    """Return a job as the store hands it out, without a store."""
    values: dict[str, Any] = {
        "id": uuid4(),
        "namespace": "n",
        "model": "m",
        "channel": "c",
        "priority": 5,
        "request": request,
        "options": {},
        "token": 1,
        "attempts": 1,
        "max_attempts": 3,
        "crashes": 0,
        "deadline_at": None,
        "batch_id": None,
        "custom_id": None,
        "cancel_requested": False,
        "created_at": datetime.now(UTC),
        "traceparent": None,
    }
    return ClaimedJob(**{**values, **fields})


def final_output(
    prompt: str,
    request_id: str,
    text: str,
    *,
    token_ids: tuple[int, ...] = (),
    metadata: dict[str, Any],
    answer: StoredAnswer | None = None,
    stored: bool = False,
) -> EnhancedRequestOutput:
    """Return an output as the engine's, and report it in the scope as the engine does."""
    # vLLM takes seconds to import; tests that only collect this do not pay for it.
    from vllm.outputs import CompletionOutput, RequestOutput

    from workers.engine.output import EnhancedRequestOutput
    from workers.engine.scope import ReportEntry, current_scope

    completion = CompletionOutput(
        index=0,
        text=text,
        token_ids=list(token_ids),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason="stop",
    )
    output = RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=[],
        prompt_logprobs=None,
        outputs=[completion],
        finished=True,
    )
    scope = current_scope()
    assert scope is not None
    scope.report.entries.append(
        ReportEntry(request_id=request_id, metadata=metadata, answer=answer, stored=stored)
    )
    return EnhancedRequestOutput.of(output, metadata)
