"""`EngineVerifier`: the served model's own word on whether two prompts are the same question.

One token, held to "yes" or "no" by vLLM's structured output. How good the word is depends on the
model; a small one is no judge. It comes after the guard and can only refuse.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.output_processor import RequestOutputCollector

# As JSON strings, so that a prompt cannot end its own quotation and go on as instructions.
_ASKED = (
    "Below are two requests as JSON strings. Would a correct and complete answer to the first be "
    "a correct and complete answer to the second as well, with nothing to change in it? "
    "Say yes or no.\n\nFirst: {asked}\nSecond: {stored}"
)
_COMPLETION = "{question}\n\nAnswer:"
_YES, _NO = "yes", "no"


class EngineVerifier:
    """Asks the engine; beside its requests, and not through its caches.

    Args:
        add: `AsyncLLM.add_request`.
        abort: `AsyncLLM.abort`.
        tokenizer: Of the served model, with its chat template if it has one.
    """

    def __init__(
        self,
        *,
        add: Callable[..., Awaitable[RequestOutputCollector]],
        abort: Callable[..., Awaitable[None]],
        tokenizer: Callable[[], Any],
    ) -> None:
        self._add = add
        self._abort = abort
        self._tokenizer = tokenizer

    async def same(self, asked: str, stored: str) -> bool:
        """Return whether the model takes two prompts for the same.

        Args:
            asked: The prompt that waits for an answer.
            stored: The prompt that has one.

        Raises:
            Exception: What vLLM raised; a pair that is too long for the model, for one.
        """
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            structured_outputs=StructuredOutputsParams(choice=[_YES, _NO]),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        collector = await self._add(
            request_id=f"verify-{uuid4().hex}", prompt=self._prompt(asked, stored), params=params
        )
        try:
            while not (output := collector.get_nowait() or await collector.get()).finished:
                pass
        except asyncio.CancelledError:
            await self._abort(collector.request_id, internal=True)
            raise
        finally:
            collector.close()
        # One token may hold a part of the word only; that part decides.
        said = output.outputs[0].text.strip().lower()
        return bool(said) and _YES.startswith(said)

    def _prompt(self, asked: str, stored: str) -> Any:
        question = _ASKED.format(asked=json.dumps(asked), stored=json.dumps(stored))
        tokenizer = self._tokenizer()
        if getattr(tokenizer, "chat_template", None) is None:
            return _COMPLETION.format(question=question)
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return {"prompt_token_ids": list(ids)}
