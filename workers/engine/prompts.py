"""`Prompts`: prompts as the model sees them, rendered by vLLM's own renderer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache
from vllm.renderers.inputs.preprocess import parse_model_prompt

from workers.engine.fingerprint import prompt_parts
from workers.engine.last_turn import LastTurn

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

#: Up to here a text is tokenized where it stands; beyond, on the renderer's threads, since a
#: tokenizer takes about a millisecond for this many characters and the loop must not wait.
_INLINE_CHARS = 4_000
#: Characters of prompts whose rendered form is kept.
_KEPT_CHARS = 2**20


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A prompt as the model sees it."""

    call: dict[str, Any]  # arguments of `add_request`, with the prompt rendered
    rendered: Mapping[str, Any]
    ids: tuple[int, ...]
    parts: Mapping[str, Any] | None  # what identifies it, if anything does
    tokenization: Mapping[str, Any] = field(default_factory=dict)  # arguments that it was cut by


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A text prompt as the renderer made it, kept for the next time."""

    template: Mapping[str, Any]
    ids: tuple[int, ...]
    parts: Mapping[str, Any] | None

    def fresh(self) -> dict[str, Any]:
        """Return it as if it had been rendered now; vLLM may change what it is given."""
        return {
            **self.template,
            "prompt_token_ids": list(self.ids),
            "arrival_time": time.time(),
        }


class Prompts:
    """Renders prompts, and keeps texts that were rendered: most of what a hit in memory costs.

    Args:
        llm: Whose renderer.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._texts: LRUCache[str, _Rendered] = LRUCache(
            _KEPT_CHARS, getsizeof=lambda rendered: max(64, 4 * len(rendered.ids))
        )

    @cached_property
    def turns(self) -> LastTurn:
        """Finds what a rendered chat asks."""
        return LastTurn(self._llm.tokenizer)

    def media_are_hashed(self) -> bool:
        """Whether vLLM names media by content.

        With neither of its caches on, it numbers them by request instead, from one again with
        every start: two pictures would share a name.
        """
        media = self._llm.model_config.multimodal_config
        caches = self._llm.vllm_config.cache_config
        return media is None or bool(media.mm_processor_cache_gb or caches.enable_prefix_caching)

    async def seen(self, call: dict[str, Any]) -> Seen:
        """Return a prompt as the model sees it.

        Args:
            call: Arguments of `add_request` by name.

        Raises:
            VLLMValidationError: As vLLM raises it for a prompt that it cannot take.
        """
        prompt = call["prompt"]
        if isinstance(prompt, dict) and "type" in prompt:
            return Seen(
                call=call,
                rendered=prompt,
                ids=tuple(prompt.get("prompt_token_ids") or ()),
                parts=prompt_parts(prompt),
            )
        rendered, ids, parts = await self._render(prompt, call.get("tokenization_kwargs"))
        call = {**call, "prompt": rendered}
        # Tokenized already: vLLM would warn of arguments it cannot use any more.
        arguments = call.pop("tokenization_kwargs", None) or {}
        return Seen(call=call, rendered=rendered, ids=ids, parts=parts, tokenization=arguments)

    async def _render(
        self, prompt: Any, kwargs: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], tuple[int, ...], Mapping[str, Any] | None]:
        """Return a prompt as vLLM's renderer makes it, its token ids, and what identifies it."""
        keep = isinstance(prompt, str) and not kwargs and len(prompt) <= _INLINE_CHARS
        if keep and (known := self._texts.get(prompt)) is not None:
            return known.fresh(), known.ids, known.parts
        rendered = await self._rendered_by_vllm(prompt, kwargs)
        ids, parts = tuple(rendered.get("prompt_token_ids") or ()), prompt_parts(rendered)
        if keep and rendered.get("type") == "token":
            self._texts[prompt] = _Rendered(template=dict(rendered), ids=ids, parts=parts)
        return rendered, ids, parts

    async def _rendered_by_vllm(
        self, prompt: Any, kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        renderer = self._llm.renderer
        parsed = parse_model_prompt(self._llm.model_config, prompt)
        params = renderer.default_cmpl_tok_params.with_kwargs(**(kwargs or {}))
        text = parsed.get("prompt") if isinstance(parsed, dict) else None
        media = isinstance(parsed, dict) and "multi_modal_data" in parsed
        if not media and len(text or "") <= _INLINE_CHARS:
            (rendered,) = renderer.render_cmpl([parsed], params)
        else:
            (rendered,) = await renderer.render_cmpl_async([parsed], params)
        result: dict[str, Any] = rendered
        return result
