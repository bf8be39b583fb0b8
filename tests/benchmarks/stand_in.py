"""A worker whose engine is a stand-in for vLLM, for measuring what is around the engine.

Everything but the engine is the real thing: Celery, pool, transport, pipeline, store, publisher,
leases, recovery. The stand-in answers prompts at once with words made of the prompt, and keeps and
looks up its answers as the real one does: in memory first, then in Postgres. What is measured with
it says nothing of vLLM's speed.

    python -m tests.benchmarks.stand_in     # takes jobs until it is told to stop
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from workers.cache.memory import MemoryCache
from workers.engine.protocols import StoredAnswer, StoredCompletion

if TYPE_CHECKING:
    from workers.serving import ServedModel
    from workers.settings import Settings
    from workers.store.answers import PostgresAnswers

MODEL = "stand-in"
_WORDS = 24
_MEMORY_ENTRIES = 10_000
_MEMORY_BYTES = 64 * 2**20


def stand_in_answer(namespace: str, prompt: str) -> StoredAnswer:
    """Return the stand-in's answer to a prompt.

    Args:
        namespace: Tenant.
        prompt: Any text.
    """
    fingerprint = hashlib.sha256(f"{namespace}\x00{prompt}".encode()).digest()
    text = " ".join(fingerprint.hex()[at : at + 4] for at in range(0, 2 * _WORDS, 2))
    completion = StoredCompletion(
        index=0, text=text, token_ids=tuple(range(_WORDS)), finish_reason="stop"
    )
    return StoredAnswer(
        id=uuid4(),
        namespace=namespace,
        fingerprint=fingerprint,
        engine=b"stand-in",
        model=MODEL,
        prompt=prompt,
        completions=(completion,),
        prompt_tokens=len(prompt) // 4,
        completion_tokens=_WORDS,
        created_at=time.time(),
    )


class StandIn:
    """As much of the engine as a worker touches.

    Args:
        store: The durable tier.
    """

    errored = False

    def __init__(self, store: PostgresAnswers) -> None:
        self._store = store
        self._memory = MemoryCache(entries=_MEMORY_ENTRIES, max_bytes=_MEMORY_BYTES, ttl_s=3600.0)
        self._counts = {"requests": 0, "memory": 0, "store": 0}

    async def generate(self, prompt: str, _params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield the one answer."""
        from workers.engine.output import EnhancedRequestOutput
        from workers.engine.scope import ReportEntry, current_scope

        scope = current_scope()
        if scope is None:
            msg = "a worker's requests have a scope"
            raise RuntimeError(msg)
        self._counts["requests"] += 1
        made = stand_in_answer(scope.namespace, prompt)
        tier: str | None = "memory"
        answer = self._memory.get(scope.namespace, made.fingerprint)
        if answer is None:
            answer = await self._store.get(scope.namespace, made.fingerprint)
            tier = "store" if answer is not None else None
            answer = answer or made
            self._memory.put(answer)
        if tier is not None:
            self._counts[tier] += 1
        metadata = self._metadata(answer, tier)
        entry = ReportEntry(
            request_id=request_id, metadata=metadata, answer=answer, stored=tier == "store"
        )
        scope.report.entries.append(entry)
        yield EnhancedRequestOutput.of(_output(request_id, prompt, answer), metadata)

    def recall(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return an answer that may be given now."""
        answer = self._memory.get(namespace, fingerprint)
        if answer is not None:
            self._counts["requests"] += 1
            self._counts["memory"] += 1
        return answer

    def recalled_metadata(self, answer: StoredAnswer) -> dict[str, Any]:
        """Return the metadata of an output that gives it."""
        return self._metadata(answer, "memory")

    def stats(self) -> dict[str, Any]:
        """Return what was counted."""
        return dict(self._counts)

    def forget(self, **of: Any) -> int:
        """Drop answers from memory."""
        return self._memory.forget(**of)

    def _metadata(self, answer: StoredAnswer, tier: str | None) -> dict[str, Any]:
        return {
            "cached": tier is not None,
            "provenance": "generated" if tier is None else "exact",
            "source_answer_id": None if tier is None else str(answer.id),
            "answer_id": str(answer.id),
            "tier": tier,
            "nlp_result": None,
            "similar": [],
            "processing_time": {"total": 0.0},
            "errors": {},
        }


def _output(request_id: str, prompt: str, answer: StoredAnswer) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    completion = CompletionOutput(
        index=0,
        text=answer.completions[0].text,
        token_ids=list(answer.completions[0].token_ids),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason="stop",
    )
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=[],
        prompt_logprobs=None,
        outputs=[completion],
        finished=True,
    )


class StandInHandlers:
    """As much of vLLM's OpenAI handlers as chat rows need, over the stand-in.

    Args:
        engine: The stand-in.
    """

    def __init__(self, engine: StandIn) -> None:
        self._engine = engine

    async def answer(self, _url: str, body: dict[str, Any], **_: Any) -> Any:
        """Answer the last turn of a chat."""
        from workers.handlers import HandlerAnswer

        asked, request_id = body["messages"][-1]["content"], body["request_id"]
        text = ""
        async for output in self._engine.generate(asked, None, request_id):
            text = output.outputs[0].text
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": _WORDS}
        return HandlerAnswer(
            status_code=200,
            body={
                "id": f"chatcmpl-{request_id}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": MODEL,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {**usage, "total_tokens": sum(usage.values())},
            },
        )


async def _start(
    _settings: Settings, _model: ServedModel, answers: PostgresAnswers, _stack: AsyncExitStack
) -> tuple[Any, Any]:
    engine = StandIn(answers)
    return engine, StandInHandlers(engine)


def main() -> int:
    """Run a worker until it is told to stop."""
    from workers import endpoints
    from workers.app import run_worker
    from workers.devices import end_with_starter
    from workers.serving import ServedModel
    from workers.settings import load_settings
    from workers.worker_process import READY

    settings = load_settings()
    end_with_starter(drain_s=settings.drain_s)
    return run_worker(
        settings,
        endpoints=endpoints.find(settings),
        model=ServedModel(name=MODEL, path=MODEL),
        on_ready=lambda: print(READY, flush=True),
        start_engine=_start,
    )


if __name__ == "__main__":
    sys.exit(main())
