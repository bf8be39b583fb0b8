"""What is to be done with one request: rendered, keyed, and judged for reuse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from cachetools import LRUCache
from vllm import PoolingParams, SamplingParams
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest

from schema.jobs import Reuse
from workers.engine.config import Features
from workers.engine.fingerprint import (
    fingerprint,
    lora_digest,
    params_digest,
    prompt_parts,
    scope_digest,
)
from workers.engine.last_turn import LastTurn
from workers.engine.scope import RequestScope

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

#: Up to here a text is tokenized where it stands; beyond, on the renderer's threads, since a
#: tokenizer takes about a millisecond for this many characters and the loop must not wait.
_INLINE_CHARS = 4_000
#: Characters of prompts whose rendered form is kept, and parameters whose digest is.
_KEPT_CHARS = 2**20
_KEPT_PARAMS = 1024

Params: TypeAlias = SamplingParams | PoolingParams

_quick = msgspec.msgpack.Encoder()


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """One request, ready to be answered."""

    call: dict[str, Any]  # arguments for AsyncLLM.add_request
    text: str | None = None  # the prompt's text, if it has one
    named: str | None = None  # what it asks, as its scope says
    turns: LastTurn | None = None  # finds what it asks where its scope does not say
    prompt_token_ids: tuple[int, ...] = ()
    key: bytes | None = None  # fingerprint; None when the request may not be reused
    not_reusable: str | None = None  # why there is no key
    engine: bytes = b""  # what the digest of the scope is made of
    context: bytes = b""
    params_digest: bytes = b""
    lora: str | None = None
    besides: Mapping[str, Any] = field(default_factory=dict)  # what counts besides the text

    @property
    def params(self) -> Params:
        """VLLM's parameters, as the caller gave them."""
        params: Params = self.call["params"]
        return params

    @property
    def streams(self) -> bool:
        """Whether the caller reads the answer while it grows."""
        return self.params.output_kind != RequestOutputKind.FINAL_ONLY

    @property
    def asked(self) -> str | None:
        """What it asks: the text that is analysed, and compared with others."""
        if self.named is not None:
            return self.named
        return self._last_turn[0] if self._last_turn is not None else self.text

    @cached_property
    def _last_turn(self) -> tuple[str, str] | None:
        return None if self.turns is None or self.text is None else self.turns.of(self.text)

    @cached_property
    def scope_digest(self) -> bytes:
        """What must be equal, beside the namespace, for reuse by meaning."""
        besides = self.besides
        if self.named is None and self._last_turn is not None:
            besides = {**besides, "around": self._last_turn[1]}
        return scope_digest(
            engine=self.engine,
            context=self.context,
            params=self.params_digest,
            lora=self.lora,
            besides=besides,
        )

    @property
    def not_comparable(self) -> str | None:
        """Why the answer to a prompt of the same meaning would not do, or None when it would."""
        if isinstance(self.params, PoolingParams):
            return "what is computed of a text is of its very words"
        if self.params.prompt_logprobs is not None:
            return "log probabilities of a prompt are of its very words"
        return None


def why_not_reusable(params: Params, scope: RequestScope, features: Features) -> str | None:
    """Return why a request is neither answered from the cache nor stored, or None.

    Args:
        params: vLLM's.
        scope: What the caller asked for.
        features: What is switched on.
    """
    if not features.exact:
        return "exact reuse is switched off"
    if scope.reuse == Reuse.OFF:
        return "the caller asked for no reuse"
    if isinstance(params, PoolingParams):
        return None
    sampled = params.temperature > 0 and params.seed is None
    if sampled and scope.reuse != Reuse.ALWAYS:
        return "sampled without a seed"
    if params.extra_args:
        return "it carries extra arguments"
    if params.flat_logprobs:
        return "flat log probabilities are not stored"
    return None


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


class Planner:
    """Plans requests.

    Rendered texts and digests of parameters are kept, since they are most of what an answer from
    memory costs.

    Args:
        llm: Whose renderer.
        engine: Digest of the engine's identity.
        features: What is switched on.
    """

    def __init__(self, llm: AsyncLLM, *, engine: bytes, features: Features) -> None:
        self._llm = llm
        self.engine = engine
        self._features = features
        self._texts: LRUCache[str, _Rendered] = LRUCache(
            _KEPT_CHARS, getsizeof=lambda rendered: max(64, 4 * len(rendered.ids))
        )
        self._params: LRUCache[tuple[type[Any], bytes], bytes] = LRUCache(_KEPT_PARAMS)
        self._adapters: dict[int, str] = {}  # content by vLLM's number, as first seen

    async def plan(self, call: dict[str, Any], *, scope: RequestScope | None) -> RequestPlan:
        """Render and key a request.

        Args:
            call: Arguments of `add_request` by name.
            scope: What the caller asked for; None where a scope is needed and there was none.

        Raises:
            VLLMValidationError: As vLLM raises it for a prompt that it cannot take.
        """
        prompt, params = call["prompt"], call["params"]
        if isinstance(prompt, (AsyncGenerator, EngineCoreRequest)):
            kind = (
                "streaming input" if isinstance(prompt, AsyncGenerator) else "a raw engine request"
            )
            return RequestPlan(call=call, not_reusable=f"{kind} is passed through")
        parts: Mapping[str, Any] | None
        tokenization: Mapping[str, Any] | None = None
        if isinstance(prompt, dict) and "type" in prompt:
            rendered: Mapping[str, Any] = prompt
            ids = tuple(rendered.get("prompt_token_ids") or ())
            parts = prompt_parts(rendered)
        else:
            rendered, ids, parts = await self._render(prompt, call.get("tokenization_kwargs"))
            call = {**call, "prompt": rendered}
            # Tokenized already: vLLM would warn of arguments it cannot use any more.
            tokenization = call.pop("tokenization_kwargs", None)
        known: dict[str, Any] = {
            "text": call.get("prompt_text") or rendered.get("prompt"),
            "named": None if scope is None else scope.text,
            "turns": self._turns,
            "prompt_token_ids": ids,
        }
        reason = (
            "no request scope" if scope is None else why_not_reusable(params, scope, self._features)
        )
        if rendered.get("type") == "multimodal" and not self._media_are_hashed():
            reason = reason or "with both of its media caches off, vLLM takes no hash of media"
        if parts is None:
            reason = reason or f"a prompt of type {rendered.get('type')!r} has no exact identity"
        adapter: LoRARequest | None = call.get("lora_request")
        # Beside the loop: an adapter that is new has to be read to its end.
        lora = None if adapter is None else await asyncio.to_thread(lora_digest, adapter)
        if adapter is not None and not self._is_loaded(adapter, lora or ""):
            reason = reason or "the adapter's files have changed since vLLM loaded them"
        if reason is not None or parts is None or scope is None:
            return RequestPlan(call=call, not_reusable=reason, **known)
        digest = self._digest(params)
        extra = {
            name: call[name]
            for name in ("reasoning_ended", "reasoning_parser_kwargs")
            if call.get(name) is not None
        }
        return RequestPlan(
            **known,
            call=call,
            key=fingerprint(
                namespace=scope.namespace,
                engine=self.engine,
                prompt=parts,
                params=digest,
                lora=lora,
                extra=extra,
            ),
            engine=self.engine,
            context=scope.context,
            params_digest=digest,
            lora=lora,
            besides={
                **{name: part for name, part in parts.items() if name != "ids"},
                **({"tokenization": tokenization} if tokenization else {}),
                **extra,
            },
        )

    @cached_property
    def _turns(self) -> LastTurn:
        return LastTurn(self._llm.tokenizer)

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

    def _media_are_hashed(self) -> bool:
        """Whether vLLM names media by content.

        With neither of its caches on, it numbers them by request instead, from one again with
        every start: two pictures would share a name.
        """
        media = self._llm.model_config.multimodal_config
        caches = self._llm.vllm_config.cache_config
        return media is None or bool(media.mm_processor_cache_gb or caches.enable_prefix_caching)

    def _is_loaded(self, adapter: LoRARequest, content: str) -> bool:
        """Whether vLLM answers by this content: it reads an adapter again only when told to."""
        if adapter.load_inplace:
            self._adapters[adapter.lora_int_id] = content
        return self._adapters.setdefault(adapter.lora_int_id, content) == content

    def _digest(self, params: Params) -> bytes:
        try:
            # The encoded fields decide the digest, and encoding is a tenth of its cost.
            name = (type(params), _quick.encode(params))
        except (TypeError, NotImplementedError):  # it holds what msgspec cannot write
            return params_digest(params)
        digest = self._params.get(name)
        if digest is None:
            digest = self._params[name] = params_digest(params)
        return digest
